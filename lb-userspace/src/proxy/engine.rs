//! The engine: HTTP/1.1 and HTTP/2 on a client's connection, by hyper. This module and those below it are all
//! that knows of hyper; what is decided, and by what rules, is in their siblings and speaks of `http` types alone.

mod body;
mod connections;
mod converse;
mod inquiry;
mod passthrough;
mod reply;
mod tunnel;
mod upstream;

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
    request::Parts,
};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use proxy_header::{ParseConfig, io::ProxiedStream};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsAcceptor;

pub use self::connections::Connections;
use self::{
    body::{Body, Upload, Watched, nothing},
    converse::{Pulse, Spoken, Way, converse},
    inquiry::Inquiry,
    passthrough::{Hello, pass},
    reply::{append, insert, plain, redirect, told, without_body},
    tunnel::{Tunnel, begun_with},
    upstream::Behalf,
};
use super::{
    access::Line,
    auth::{Caller, Passport, Refusal, certificate::Certificate},
    chain::{self, Origin},
    headers::{self, Asker},
    limits::network,
    page::Pages,
    pools::{self, Wish},
    request::{Target, target},
    route::{Asked, Found, passed, sent},
    state::{Called, Service},
    tls::{self, ClientRules},
    voice::{Form, Trouble},
    worker::Worker,
};
use crate::model::{
    Network,
    desk::{Action, HeaderEdits, Sticky},
};

/// A client's connection.
struct Visit {
    worker: Arc<Worker>,
    /// Where the client called.
    called: SocketAddr,
    /// Who called: a client, or a proxy.
    peer: IpAddr,
    /// The port that they called from.
    port: u16,
    tls: bool,
    /// Whether headers are believed, if a proxy called.
    believes: bool,
    /// What whoever called has shown, and by which rules it was found to be right.
    certificate: Option<(Certificate, Option<Arc<ClientRules>>)>,
    /// What the connection becomes when it has said its last answer.
    tunnel: Mutex<Option<Tunnel>>,
}

/// What the kernel takes for a client before it has been sent.
const UNSENT: u32 = 128 << 10;

/// Serves a connection to its end.
pub(super) async fn serve(worker: Arc<Worker>, called: SocketAddr, stream: TcpStream, peer: SocketAddr) {
    let Some(service) = worker.shared.state.load().service(called) else { return };
    // Answers are written whole: nothing is gained by waiting for more.
    _ = stream.set_nodelay(true);
    // Who reads slowly is seen to read: Linux wakes a writer when half of it has been sent, otherwise when a third of all that
    // it keeps is free, which may be megabytes.
    _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
    if !service.order.desk.proxy_protocol || !service.is_proxy(peer.ip()) {
        return receive(worker, &service, called, stream, (peer, true)).await;
    }
    let config = ParseConfig { include_tlvs: false, allow_v1: true, allow_v2: true };
    let header = ProxiedStream::create_from_tokio(stream, config);
    match tokio::time::timeout(service.order.desk.timeouts.header, header).await {
        Ok(Ok(stream)) => {
            // Without an address it is the proxy itself that asks, to see whether somebody is there; it does
            // not speak for others then.
            let Some(address) = stream.proxy_header().proxied_address() else {
                return receive(worker, &service, called, stream, (peer, false)).await;
            };
            let client = address.source;
            if Network::any(&service.order.deny, client.ip()) && !service.admits(client.ip()) {
                return worker.figures.refused("firewall");
            }
            let Some(_visitor) = worker.shared.enter(client.ip()) else {
                return worker.figures.refused("too_many_of_source");
            };
            receive(Arc::clone(&worker), &service, called, stream, (client, true)).await;
        }
        Ok(Err(_)) | Err(_) => worker.figures.refused("proxy_header"),
    }
}

/// Serves a connection of somebody, unless it is to be handed on as it is.
async fn receive<S>(
    worker: Arc<Worker>,
    service: &Service,
    called: SocketAddr,
    mut stream: S,
    (peer, believes): (SocketAddr, bool),
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let desk = &service.order.desk;
    if desk.passthrough.is_empty() {
        return attend(worker, service, called, stream, (peer, believes)).await;
    }
    let hello = match tokio::time::timeout(desk.timeouts.header, Hello::hear(&mut stream)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(_)) => return worker.figures.refused("tls"),
        Err(_) => return worker.figures.refused("tls_slow"),
    };
    match hello.name.as_deref().and_then(|name| passed(&desk.passthrough, name)) {
        Some(pool) => {
            // The pool alone is kept for as long as the connection lasts.
            let pool = worker.shared.state.load().pools.get(pool).cloned();
            match pool {
                Some(pool) => pass(&worker, &service.order, pool, (peer, called), hello, stream).await,
                None => worker.figures.refused("no_backend"),
            }
        }
        None if service.tls.is_none() => worker.figures.refused("unknown_name"),
        None => {
            let again = begun_with(hello.said, stream);
            attend(worker, service, called, again, (peer, believes)).await;
        }
    }
}

/// Serves a connection of somebody.
async fn attend<S>(
    worker: Arc<Worker>,
    service: &Service,
    called: SocketAddr,
    stream: S,
    (peer, believes): (SocketAddr, bool),
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let visit = |tls, certificate| {
        let worker = Arc::clone(&worker);
        let (peer, port) = (peer.ip(), peer.port());
        Visit { worker, called, peer, port, tls, believes, certificate, tunnel: Mutex::default() }
    };
    let timeouts = service.order.desk.timeouts;
    match &service.tls {
        None => converse(visit(false, None), stream, Spoken::Unsaid, timeouts).await,
        Some(config) => {
            let handshake = TlsAcceptor::from(Arc::clone(config)).accept(stream);
            match tokio::time::timeout(timeouts.header, handshake).await {
                Ok(Ok(stream)) => {
                    let session = stream.get_ref().1;
                    let is_http2 = session.alpn_protocol() == Some(tls::H2);
                    let spoken = if is_http2 { Spoken::Http2 } else { Spoken::Http1 };
                    let shown = session.peer_certificates().and_then(|shown| shown.first());
                    let certificate = shown.and_then(|shown| Certificate::of(shown));
                    let certificate = certificate.map(|shown| (shown, service.clients.clone()));
                    converse(visit(true, certificate), stream, spoken, timeouts).await;
                }
                Ok(Err(_)) => worker.figures.refused("tls"),
                Err(_) => worker.figures.refused("tls_slow"),
            }
        }
    }
}

/// What is known of a request for its answer, its line and the figures.
struct Case {
    id: String,
    /// There is no connection of its own that could be closed after it.
    is_http2: bool,
    /// That it is under way.
    way: Arc<Way>,
    form: Form,
    /// The route that it takes.
    called: Called,
    /// For the access log, where the service has one.
    line: Option<Line>,
    /// Where it comes from.
    origin: Origin,
    /// Whether its client asked over TLS.
    tls: bool,
    /// What the connection becomes with the answer.
    tunnel: Option<Tunnel>,
}

impl Visit {
    async fn answer(&self, request: Request<Incoming>, pulse: &Arc<Pulse>) -> Response<Body> {
        let began = Instant::now();
        let errand = pulse.begin(request.version());
        let (parts, body) = request.into_parts();
        let service = self.worker.shared.state.load().service(self.called);
        let origin = match &service {
            Some(service) if self.believes => chain::origin(self.peer, &parts.headers, &service.order.desk),
            _ => Origin::itself(self.peer),
        };
        let tls = origin.tls.unwrap_or(self.tls);
        // A number that a proxy of ours has given is one by which others know the request already.
        let id = origin.id.clone().unwrap_or_else(|| format!("{:016x}", self.worker.chance.next()));
        let mut case = Case {
            form: Form::wanted(&parts.headers),
            called: Called::default(),
            line: None,
            origin,
            tls,
            is_http2: parts.version == Version::HTTP_2,
            way: errand.way(),
            tunnel: None,
            id,
        };
        let Some(service) = service else {
            // It has gone while the client was connected.
            return self.trouble(&Trouble::Closed, &case, None);
        };
        let name = &service.order.name;
        let one_in = service.order.desk.access_log;
        case.line = one_in.map(|_| Line::of(&parts, name, case.origin.client, tls, &case.id));
        let is_head = parts.method == Method::HEAD;
        let mut response = match self.decide(&service, parts, body, &mut case).await {
            Ok(response) => response,
            Err(trouble) => {
                if let Trouble::Refused(_) | Trouble::TooOften(_) = trouble {
                    let (status, reason) = (trouble.words().status, trouble.reason());
                    self.worker.figures.denied(name, &case.called.route, status, reason);
                }
                if let Some(line) = &mut case.line {
                    line.trouble = Some(trouble.reason());
                }
                self.worker.figures.trouble(trouble.reason());
                self.trouble(&trouble, &case, Some(&service.pages))
            }
        };
        if is_head {
            response = without_body(response);
        }
        headers::number(response.headers_mut(), &case.id);
        let becomes_other = case.tunnel.is_some();
        if self.worker.draining.is_cancelled() && !case.is_http2 && !becomes_other {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        let status = response.status().as_u16();
        self.worker.figures.answer(name, &case.called, status, began.elapsed());
        let line = case.line.zip(one_in).and_then(|(mut line, one_in)| {
            case.called.route.as_ref().clone_into(&mut line.route);
            line.status = status;
            line.is_drawn(one_in, &self.worker.chance).then_some((line, began))
        });
        if let Some(tunnel) = case.tunnel {
            errand.done();
            *self.tunnel.lock().unwrap_or_else(PoisonError::into_inner) = Some(Tunnel { line, ..tunnel });
            return response;
        }
        let line = line.map(|line| (line, self.worker.shared.log.clone()));
        response.map(|body| {
            body::counted(body, move |bytes, ended| {
                if ended {
                    errand.done();
                }
                if let Some(((line, began), log)) = line {
                    log.write(line, began, bytes);
                }
            })
        })
    }

    /// Which way a request goes, and what comes of it.
    async fn decide(
        &self,
        service: &Service,
        mut parts: Parts,
        body: Incoming,
        case: &mut Case,
    ) -> Result<Response<Body>, Trouble> {
        let is_shown = || self.certificate(service).is_some_and(|shown| shown.holds(now()));
        if service.order.desk.clients.as_ref().is_some_and(|clients| clients.required) && !is_shown() {
            return Err(Trouble::NoCertificate);
        }
        let target = target(&parts)?;
        if let Some(line) = &mut case.line {
            line.path.clone_from(&target.path);
        }
        let asked = Asked {
            host: &target.host,
            path: &target.path,
            method: parts.method.as_str(),
            headers: &parts.headers,
        };
        let (number, route) = match service.table.find(&asked) {
            Found::Route(number, route) => (number, route),
            Found::OtherMethod(methods) => {
                return Err(Trouble::Method(methods.into_iter().collect::<Vec<_>>().join(", ")));
            }
            Found::NoPath => return Err(Trouble::NoPath),
            Found::NoHost => return Err(Trouble::NoHost),
        };
        case.called = service.name_of(number);
        let caller = Caller {
            headers: &parts.headers,
            source: case.origin.client,
            // That of a proxy says nothing of who asks by it.
            certificate: self.certificate(service).filter(|_| case.origin.client == self.peer),
            now: now(),
        };
        let errand = Inquiry { visit: self, service, parts: &parts, target: &target, case };
        let passport = service.admit(number, &caller, &self.worker.shared.porter, &errand).await?;
        let mut response = match &route.action {
            Action::Redirect { status, to } => redirect(*status, to, &target)?,
            Action::Respond { status, body, content_type } => {
                let mut response = plain(*status, body.clone());
                if !body.is_empty() {
                    insert(&mut response, header::CONTENT_TYPE, content_type);
                }
                response
            }
            Action::Forward { pool, sticky, headers, .. } => {
                let wish = wish(sticky.as_ref(), &parts.headers, case.origin.client);
                let path = sent(route, &target.path);
                let asker = self.asker(&target, case, &passport);
                let becoming = parts.extensions.remove::<OnUpgrade>().filter(|_| target.websocket);
                let mut parts = outgoing(parts, &path, target.query.as_deref(), &asker, headers)?;
                if becoming.is_some() {
                    headers::become_websocket(&mut parts.headers);
                }
                let withheld = match body.is_end_stream() {
                    true => Vec::new(),
                    false => headers::withheld(&passport, headers),
                };
                let (mut response, mark) =
                    self.forward(service, (pool, wish), (parts, body, withheld), becoming, case).await?;
                if let Some(Sticky::Cookie(name)) = sticky
                    && wish != Wish::Marked(mark)
                {
                    let secure = if case.tls { "; Secure" } else { "" };
                    let cookie = format!("{name}={mark:016x}; Path=/; HttpOnly; SameSite=Lax{secure}");
                    append(&mut response, header::SET_COOKIE, &cookie);
                }
                response
            }
        };
        headers::edit(response.headers_mut(), &route.response_headers);
        Ok(response)
    }

    /// What whoever called has shown, as long as the rules are those that it was found right by.
    fn certificate(&self, service: &Service) -> Option<&Certificate> {
        self.certificate.as_ref().filter(|(_, rules)| *rules == service.clients).map(|(shown, _)| shown)
    }

    /// For whom a request is sent.
    fn behalf(&self, case: &Case, wish: Wish) -> Behalf {
        // Of who asks by proxies nobody knows the port.
        let port = if case.origin.client == self.peer { self.port } else { 0 };
        Behalf { client: SocketAddr::new(case.origin.client, port), called: self.called, wish }
    }

    /// Who asks, as a backend is told.
    fn asker<'a>(&self, target: &'a Target, case: &'a Case, passport: &'a Passport) -> Asker<'a> {
        let Case { origin, tls, id, .. } = case;
        let said_host = origin.host.as_deref().unwrap_or(&target.authority);
        let (peer_tls, host) = (self.tls, target.authority.as_str());
        Asker { peer: self.peer, peer_tls, origin, tls: *tls, host, said_host, id, passport }
    }

    /// Has a backend answer; gives its mark too.
    async fn forward(
        &self,
        service: &Service,
        (pool, wish): (&str, Wish),
        (parts, body, withheld): (Parts, Incoming, Vec<HeaderName>),
        becoming: Option<OnUpgrade>,
        case: &mut Case,
    ) -> Result<(Response<Body>, u64), Trouble> {
        let state = self.worker.shared.state.load_full();
        let pool = state.pools.get(pool).ok_or(Trouble::Closed)?;
        if becoming.is_some() && pool.transport.http2 {
            return Err(Trouble::Unsupported("websockets with servers of HTTP/2"));
        }
        let timeouts = &service.order.desk.timeouts;
        let upload = Arc::new(Upload::default());
        let body = match body.is_end_stream() {
            true => nothing(),
            false => {
                // Anybody can say that it is gRPC; who speaks it to both sides means it.
                let calls = case.form == Form::Grpc && case.is_http2 && pool.transport.http2;
                Watched::upload(body, timeouts.body, calls, withheld, Arc::clone(&upload)).boxed_unsync()
            }
        };
        let sent =
            upstream::send(&self.worker, pool, self.behalf(case, wish), timeouts, (parts, body), &upload);
        let (response, hold) = sent.await?;
        let mark = hold.ticket.mark;
        if let Some(line) = &mut case.line {
            line.backend = Some(hold.ticket.address);
        }
        let (mut parts, body) = response.into_parts();
        let switches = parts.status == StatusCode::SWITCHING_PROTOCOLS;
        let to = parts.headers.get(header::UPGRADE).map(HeaderValue::as_bytes);
        let to_websocket = to.is_some_and(|to| to.eq_ignore_ascii_case(b"websocket"));
        headers::remove_hop_by_hop(&mut parts.headers);
        // Of the connection to the backend: whether it will send trailers is nothing that a client asks.
        parts.headers.remove(header::CONNECTION);
        parts.version = Version::HTTP_11;
        if switches {
            // To what nobody has asked for: what follows would be an answer to one and not to another.
            let agreed = becoming.zip(parts.extensions.remove::<OnUpgrade>()).filter(|_| to_websocket);
            let (client, backend) = agreed.ok_or(Trouble::Broken)?;
            headers::become_websocket(&mut parts.headers);
            let ticket = hold.ticket;
            case.tunnel = Some(Tunnel { client, backend, ticket, patience: timeouts.websocket, line: None });
            return Ok((Response::from_parts(parts, nothing()), mark));
        }
        // Of HTTP/2 a client says how much it takes of each, which may be nothing.
        let unread = case.is_http2.then(|| {
            let (worker, way) = (Arc::clone(&self.worker), Arc::clone(&case.way));
            move || {
                worker.figures.refused("unread");
                way.end();
            }
        });
        let body = Watched::download(body, timeouts.body, hold, unread, upload);
        Ok((Response::from_parts(parts, body.boxed_unsync()), mark))
    }

    fn trouble(&self, trouble: &Trouble, case: &Case, pages: Option<&Pages>) -> Response<Body> {
        let words = trouble.words();
        if let Trouble::Refused(Refusal::Told(answered)) = trouble
            && case.form != Form::Grpc
        {
            return told(answered);
        }
        let page = pages.and_then(|pages| pages.of(words.status)).filter(|_| case.form == Form::Html);
        let page = page.map(|page| page.fill(&words, &case.id));
        let is_grpc = case.form == Form::Grpc;
        // What became of a call by gRPC is not said by the status of HTTP.
        let status = if is_grpc { 200 } else { words.status };
        let mut response = plain(status, page.unwrap_or_else(|| case.form.page(&words, &case.id)));
        if is_grpc {
            let (code, message) = words.for_grpc(&case.id);
            insert(&mut response, HeaderName::from_static("grpc-status"), &code.to_string());
            insert(&mut response, HeaderName::from_static("grpc-message"), &message);
        }
        insert(&mut response, header::CONTENT_TYPE, case.form.media_type());
        insert(&mut response, header::CACHE_CONTROL, "no-store");
        if let Some(after) = words.retry_after_seconds() {
            insert(&mut response, header::RETRY_AFTER, &after.to_string());
        }
        for challenge in trouble.challenges() {
            response.headers_mut().append(header::WWW_AUTHENTICATE, challenge.clone());
        }
        match trouble {
            Trouble::Method(allowed) => insert(&mut response, header::ALLOW, allowed),
            // RFC 6455 section 4.4, RFC 9110 section 15.5.22.
            Trouble::WebsocketVersion => {
                headers::become_websocket(response.headers_mut());
                insert(&mut response, header::SEC_WEBSOCKET_VERSION, "13");
            }
            // Where the next request begins is not sure.
            Trouble::Wrong(_)
            | Trouble::TooLarge
            | Trouble::Stalled
            | Trouble::Unsupported(_)
            | Trouble::Expectation
            | Trouble::NoCertificate
                if !case.is_http2 =>
            {
                insert(&mut response, header::CONNECTION, "close");
            }
            _ => {}
        }
        response
    }
}

/// A request as the backend gets it: its path is the one that all was decided by.
fn outgoing(
    mut parts: Parts,
    path: &str,
    query: Option<&str>,
    asker: &Asker<'_>,
    edits: &HeaderEdits,
) -> Result<Parts, Trouble> {
    let whole = match query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    // What has been normalised is always a path.
    parts.uri = Uri::try_from(whole).map_err(|_| Trouble::Wrong("its path is none"))?;
    parts.version = Version::HTTP_11;
    headers::remove_hop_by_hop(&mut parts.headers);
    headers::join_cookies(&mut parts.headers);
    // The desk has said it already, or will.
    parts.headers.remove(header::EXPECT);
    headers::forward(&mut parts.headers, asker);
    if let Ok(host) = HeaderValue::from_str(asker.host) {
        parts.headers.insert(header::HOST, host);
    }
    headers::edit(&mut parts.headers, edits);
    Ok(parts)
}

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// To whom a request would rather come.
fn wish(sticky: Option<&Sticky>, headers: &HeaderMap, client: IpAddr) -> Wish {
    match sticky {
        None => Wish::Anyone,
        Some(Sticky::Source) => Wish::Same(pools::key(network(client).to_string().as_bytes())),
        Some(Sticky::Header(name)) => match headers.get(name) {
            Some(value) => Wish::Same(pools::key(value.as_bytes())),
            None => Wish::Anyone,
        },
        Some(Sticky::Cookie(name)) => {
            let mark = headers::cookie(headers, name).and_then(|mark| u64::from_str_radix(mark, 16).ok());
            mark.map_or(Wish::Anyone, Wish::Marked)
        }
    }
}
