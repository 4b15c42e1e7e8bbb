//! What the desk speaks with servers: HTTP/2, and TLS with a server that shows who it is.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use lb_userspace::{
    model::desk::{Ejection, ProxyVersion, ServerTls, Speech},
    proxy::{
        orders::{Pem, Secret},
        tls,
    },
};
use tests::{
    authority::Authority,
    desk::{Deed, Desk, Recorder, Settings, answer as said, backend},
    multiplex::{Exchange, Multiplex, answer, whole},
    requests::Speaker,
};
use tokio::net::TcpStream;

const SERVICE: &str = r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
timeouts = { header = "5s", connect = "2s", response = "5s", body = "5s" }
[[services.shop.routes]]
path = "/admin"
respond = 403
"#;

const H2C: Speech = Speech { http2: true, tls: None, proxy: None };

fn desk(speech: Speech, servers: &[SocketAddr]) -> Result<Desk> {
    let backends = servers.iter().map(|&server| backend(server)).collect();
    // Each worker has connections of its own: here they are counted of one.
    let settings = Settings { speech, alone: true, ..Settings::default() };
    Desk::with(settings, SERVICE, &[("web", backends)], &[])
}

/// A server that says how long the request was.
fn counting(tls: Option<Arc<rustls::ServerConfig>>) -> Result<Multiplex> {
    Multiplex::start(tls, 100, |mut it: Exchange| async move {
        let (body, _) = whole(it.request.body_mut()).await?;
        answer(&mut it.respond, format!("{} bytes", body.len()))
    })
}

fn ask(desk: &Desk, request: &str, body: &[u8]) -> Result<(u16, String)> {
    let mut speaker = Speaker::to(desk.addresses[0])?;
    speaker.say(format!("{request}\r\n\r\n").as_bytes())?;
    // A refusal may come before all of it has been sent.
    _ = speaker.say(body);
    let heard = speaker.hear()?.context("an answer")?;
    Ok((heard.status, heard.body))
}

#[test]
fn a_request_by_http1_is_one_by_http2_to_the_server() -> Result<()> {
    let server = counting(None)?;
    let desk = desk(H2C, &[server.address])?;
    let head = "X-Own: 1\r\nConnection: keep-alive, x-private\r\nX-Private: 1\r\nTE: trailers\r\n\
                X-Forwarded-Proto: made-up\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c";
    let get = format!("GET /a/../b?x=1 HTTP/1.1\r\nHost: shop.example:8080\r\n{head}");
    assert_eq!(ask(&desk, &get, b"")?, (200, "0 bytes".into()));
    let post = "POST /up HTTP/1.1\r\nHost: shop.example\r\n";
    let large = vec![b'a'; 1_500_000];
    assert_eq!(
        ask(&desk, &format!("{post}Content-Length: {}", large.len()), &large)?,
        (200, "1500000 bytes".into())
    );
    let chunked =
        ask(&desk, &format!("{post}Transfer-Encoding: chunked"), b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")?;
    assert_eq!(chunked, (200, "5 bytes".into()));
    let heads = server.heads();
    let lines: Vec<&str> = heads.iter().map(|head| head.line.as_str()).collect();
    assert_eq!(
        lines,
        ["GET http://shop.example:8080/b?x=1", "POST http://shop.example/up", "POST http://shop.example/up"]
    );
    let names: BTreeSet<&str> = heads[0].headers.keys().map(http::HeaderName::as_str).collect();
    let wanted = ["te", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-own", "x-request-id"];
    assert_eq!(names, BTreeSet::from(wanted));
    assert_eq!(heads[0].headers["te"], "trailers");
    assert_eq!(heads[1].headers.get("content-length").map(HeaderValue::as_bytes), Some(&b"1500000"[..]));
    assert_eq!(heads[2].headers.get("transfer-encoding"), None);
    assert_eq!(server.connections(), 1, "one connection is for all");
    // Nobody can say which host without one.
    assert_eq!(ask(&desk, "GET / HTTP/1.0", b"")?.0, 400);
    Ok(())
}

/// Requests at the same time share a connection, a hundred of them or as many as the server allows; more get another.
#[test]
fn requests_share_connections() -> Result<()> {
    // One fewer at first: the desk may not know yet that the answer before has been taken.
    for (allowed, most, all) in [(200, 100, [99, 130]), (20, 20, [19, 50])] {
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        let waits = Arc::clone(&gate);
        let server = Multiplex::start(None, allowed, move |mut it: Exchange| {
            let waits = Arc::clone(&waits);
            async move {
                if it.request.uri().path() != "/first" {
                    waits.acquire().await?.forget();
                }
                answer(&mut it.respond, "done")
            }
        })?;
        let desk = desk(H2C, &[server.address])?;
        // What the server allows is known once it has answered.
        for _ in 0..2 {
            assert_eq!(ask(&desk, "GET /first HTTP/1.1\r\nHost: a", b"")?.0, 200);
        }
        let mut speakers = Vec::new();
        for wanted in all {
            while speakers.len() < wanted {
                let mut speaker = Speaker::to(desk.addresses[0])?;
                speaker.say(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
                speakers.push(speaker);
            }
            let began = std::time::Instant::now();
            while server.heads().len() < wanted + 2 {
                ensure!(began.elapsed() < Duration::from_secs(20), "{} of {wanted}", server.heads().len());
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(server.connections(), wanted.div_ceil(most), "{allowed} allowed, {wanted} wanted");
        }
        gate.add_permits(all[1]);
        for mut speaker in speakers {
            assert_eq!(speaker.hear()?.context("an answer")?.body, "done");
        }
    }
    Ok(())
}

/// What a server has not looked at is asked again; so is what is as good once more. A POST whose fate nobody knows is not.
#[test]
fn only_what_is_safe_is_sent_again() -> Result<()> {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let server = Multiplex::start(None, 100, move |mut it: Exchange| {
        let first = counter.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            let reason = match it.request.uri().path() {
                "/refused" => h2::Reason::REFUSED_STREAM,
                _ => h2::Reason::INTERNAL_ERROR,
            };
            if first {
                it.respond.send_reset(reason);
                return Ok(());
            }
            answer(&mut it.respond, "done")
        }
    })?;
    for (request, body, wanted, asked) in [
        ("POST /refused HTTP/1.1\r\nHost: a\r\nContent-Length: 0", &b""[..], 200, 2),
        ("GET /broken HTTP/1.1\r\nHost: a", b"", 200, 2),
        ("POST /broken HTTP/1.1\r\nHost: a\r\nContent-Length: 0", b"", 502, 1),
        ("POST /refused HTTP/1.1\r\nHost: a\r\nContent-Length: 3", b"abc", 502, 1),
    ] {
        let desk = desk(H2C, &[server.address])?;
        // On a connection that has been made before.
        count.store(1, Ordering::Relaxed);
        assert_eq!(ask(&desk, "GET / HTTP/1.1\r\nHost: a", b"")?.0, 200);
        let before = server.heads().len();
        count.store(0, Ordering::Relaxed);
        assert_eq!(ask(&desk, request, body)?.0, wanted, "{request}");
        assert_eq!(server.heads().len() - before, asked, "{request}");
    }
    Ok(())
}

/// A server that has ended is called anew, where it is there again.
#[test]
fn a_server_that_comes_back_is_called_anew() -> Result<()> {
    let server = Multiplex::start(None, 100, |mut it: Exchange| async move {
        let connection = it.connection;
        answer(&mut it.respond, format!("by {connection}"))
    })?;
    let desk = desk(H2C, &[server.address])?;
    let mut by = BTreeSet::new();
    for _ in 0..20 {
        by.insert(ask(&desk, "GET / HTTP/1.1\r\nHost: a", b"")?);
    }
    assert_eq!(by, BTreeSet::from([(200, "by 0".into())]));
    let address = server.address;
    drop(server);
    assert_eq!(ask(&desk, "GET / HTTP/1.1\r\nHost: a", b"")?.0, 502, "nobody is there");
    let again = Multiplex::at(address, None, 100, |mut it: Exchange| async move {
        answer(&mut it.respond, "by another")
    })?;
    assert_eq!(ask(&desk, "GET / HTTP/1.1\r\nHost: a", b"")?, (200, "by another".into()));
    assert_eq!(again.connections(), 1);
    Ok(())
}

/// Who vouches for servers, and the file that says so.
struct Vouching {
    authority: Authority,
    file: tempfile::NamedTempFile,
}

impl Vouching {
    fn new() -> Result<Self> {
        let (authority, file) = (Authority::new()?, tempfile::NamedTempFile::new()?);
        std::fs::write(file.path(), &authority.pem)?;
        Ok(Self { authority, file })
    }

    /// A server's TLS under this name, that can speak these protocols.
    fn server(&self, name: &str, alpn: &[&[u8]]) -> Result<Arc<rustls::ServerConfig>> {
        let issued = self.authority.server(name)?;
        let pem = Pem { chain: issued.chain, key: Secret::new(issued.key) };
        let config = tls::server(&[pem], None)?.context("TLS")?;
        let mut config = rustls::ServerConfig::clone(&config);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }

    fn speech(&self, http2: bool) -> Speech {
        Speech {
            http2,
            tls: Some(ServerTls { host: "shop.internal".into(), ca: self.file.path().to_owned() }),
            proxy: None,
        }
    }
}

#[test]
fn a_server_shows_who_it_is_or_gets_nothing() -> Result<()> {
    let (ours, theirs) = (Vouching::new()?, Vouching::new()?);
    let get = "GET /secret HTTP/1.1\r\nHost: a";
    for (what, tls, speech, status, reason) in [
        ("all is well", ours.server("shop.internal", &[b"h2"])?, ours.speech(true), 200, ""),
        ("another name", ours.server("other.internal", &[b"h2"])?, ours.speech(true), 502, "untrusted"),
        ("another authority", theirs.server("shop.internal", &[b"h2"])?, ours.speech(true), 502, "untrusted"),
        ("nothing agreed", ours.server("shop.internal", &[])?, ours.speech(true), 502, "unreachable"),
    ] {
        let server = counting(Some(tls))?;
        let desk = desk(speech, &[server.address])?;
        assert_eq!(ask(&desk, get, b"")?.0, status, "{what}");
        if status == 200 {
            assert_eq!(server.heads()[0].line, "GET https://a/secret");
            continue;
        }
        let report = desk.report(|report| !report.troubles.is_empty())?;
        assert_eq!(report.troubles.keys().collect::<Vec<_>>(), [reason], "{what}");
        assert!(server.heads().is_empty(), "{what}");
    }
    // A server in clear text gets no request, and nothing readable.
    let clear = Recorder::start(|_| Deed::Nothing)?;
    for http2 in [false, true] {
        let desk = desk(ours.speech(http2), &[clear.address])?;
        assert_eq!(ask(&desk, get, b"")?.0, 502);
    }
    assert!(clear.got().is_empty());
    Ok(())
}

/// HTTP/1.1 over TLS, on kept connections; another authority holds for the next connection.
#[test]
fn http1_goes_over_tls_too() -> Result<()> {
    let authority = Vouching::new()?;
    let tls = authority.server("shop.internal", &[b"http/1.1"])?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    std::thread::spawn(move || -> Result<()> {
        for stream in listener.incoming() {
            count.fetch_add(1, Ordering::Relaxed);
            let tls = rustls::ServerConnection::new(Arc::clone(&tls))?;
            let mut stream = rustls::StreamOwned::new(tls, stream?);
            std::thread::spawn(move || {
                use std::io::{Read as _, Write as _};
                let mut buffer = [0; 4096];
                // Requests of this test come in one piece each.
                while stream.read(&mut buffer).is_ok_and(|length| length > 0) {
                    _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nsafe");
                }
            });
        }
        Ok(())
    });
    let mut desk = desk(authority.speech(false), &[address])?;
    for _ in 0..5 {
        assert_eq!(ask(&desk, "GET / HTTP/1.1\r\nHost: a", b"")?, (200, "safe".into()));
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1);
    let other = Vouching::new()?;
    std::fs::copy(other.file.path(), authority.file.path())?;
    desk.serve(SERVICE, &[("web", vec![backend(address)])], &[])?;
    assert_eq!(ask(&desk, "GET / HTTP/1.1\r\nHost: a", b"")?.0, 502, "kept connections are of the old one");
    Ok(())
}

/// A call that says and hears by turns, with what comes behind the last message, in both directions.
#[test]
fn calls_stream_both_ways_and_end_with_trailers() -> Result<()> {
    let server = Multiplex::start(None, 100, |mut it: Exchange| async move {
        let head = Response::builder().header("content-type", "application/grpc").body(())?;
        let mut sender = it.respond.send_response(head, false)?;
        let body = it.request.body_mut();
        while let Some(part) = body.data().await {
            let part = part?;
            body.flow_control().release_capacity(part.len())?;
            sender.send_data(part, false)?;
        }
        let mut trailers = body.trailers().await?.unwrap_or_default();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        sender.send_trailers(trailers)?;
        Ok(())
    })?;
    let desk = desk(H2C, &[server.address])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = TcpStream::connect(desk.addresses[0]).await?;
        let (client, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        let mut client = client.ready().await?;
        let request = Request::post("http://shop.example/svc/Method")
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .body(())?;
        let (answer, mut sender) = client.send_request(request, false)?;
        let mut body = answer.await?.into_body();
        for size in [1, 50_000, 3] {
            let said = Bytes::from(vec![7; size]);
            sender.send_data(said.clone(), false)?;
            let mut heard = Vec::new();
            while heard.len() < size {
                let part = body.data().await.context("more of it")??;
                body.flow_control().release_capacity(part.len())?;
                heard.extend_from_slice(&part);
            }
            assert_eq!(heard, said);
        }
        let mut behind = HeaderMap::new();
        behind.insert("x-behind", HeaderValue::from_static("1"));
        sender.send_trailers(behind)?;
        let (rest, trailers) = whole(&mut body).await?;
        let trailers = trailers.context("trailers")?;
        assert_eq!(
            (rest.len(), &trailers["grpc-status"], &trailers["x-behind"]),
            (0, &"0".parse()?, &"1".parse()?)
        );
        anyhow::Ok(())
    })
}

/// Of a call that streams both ways one side may be silent for longer than a body may rest; not both.
#[test]
fn one_side_of_a_call_may_be_silent() -> Result<()> {
    let server = Multiplex::start(None, 100, |mut it: Exchange| async move {
        let talks = it.request.uri().path() == "/server-talks";
        let mut sender = it.respond.send_response(Response::new(()), false)?;
        if talks {
            for _ in 0..12 {
                sender.send_data(Bytes::from_static(b"word "), false)?;
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            sender.send_data(Bytes::from_static(b"end"), true)?;
            return Ok(());
        }
        let (heard, _) = whole(it.request.body_mut()).await?;
        sender.send_data(Bytes::from(format!("{} bytes", heard.len())), true)?;
        Ok(())
    })?;
    let hasty = SERVICE.replace("body = \"5s\"", "body = \"1s\"");
    let settings = Settings { speech: H2C, ..Settings::default() };
    let desk = Desk::with(settings, &hasty, &[("web", vec![backend(server.address)])], &[])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = TcpStream::connect(desk.addresses[0]).await?;
        let (mut client, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        let post = |path: &str| Request::post(format!("http://shop.example{path}")).body(());
        client = client.ready().await?;
        let (answer, kept_open) = client.send_request(post("/server-talks")?, false)?;
        let (heard, _) = whole(answer.await?.body_mut()).await?;
        assert_eq!(heard.len(), 12 * 5 + 3, "the client says nothing for three seconds");
        drop(kept_open);
        client = client.ready().await?;
        let (answer, mut sender) = client.send_request(post("/client-talks")?, false)?;
        let mut answer = answer.await?;
        for _ in 0..12 {
            sender.send_data(Bytes::from_static(b"word "), false)?;
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        sender.send_data(Bytes::new(), true)?;
        let (heard, _) = whole(answer.body_mut()).await?;
        assert_eq!(heard, b"60 bytes", "the server says nothing for three seconds");
        client = client.ready().await?;
        let (answer, kept_open) = client.send_request(post("/nobody-talks")?, false)?;
        let mut answer = answer.await?;
        assert!(whole(answer.body_mut()).await.is_err(), "neither says anything, and nobody ends it");
        drop(kept_open);
        anyhow::Ok(())
    })
}

/// Who does not read holds up nobody else of the same connection.
#[test]
fn a_client_that_does_not_read_holds_up_no_other() -> Result<()> {
    // More than the kernel keeps for who does not read.
    let large = Bytes::from(vec![1; 64 << 20]);
    let server = Multiplex::start(None, 100, move |mut it: Exchange| {
        let large = large.clone();
        async move {
            let is_large = it.request.uri().path() == "/large";
            answer(&mut it.respond, if is_large { large } else { Bytes::from_static(b"small") })
        }
    })?;
    let desk = desk(H2C, &[server.address])?;
    let stalled: Result<Vec<_>> = (0..10)
        .map(|_| {
            let mut speaker = Speaker::to(desk.addresses[0])?;
            speaker.say(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")?;
            Ok(speaker)
        })
        .collect();
    let stalled = stalled?;
    // For as long as it takes to fill all that there is on the way.
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        assert_eq!(ask(&desk, "GET /small HTTP/1.1\r\nHost: a", b"")?, (200, "small".into()));
    }
    assert_eq!(server.connections(), 1);
    drop(stalled);
    Ok(())
}

/// Websockets have no way yet over HTTP/2.
#[test]
fn a_websocket_to_a_server_of_http2_is_refused() -> Result<()> {
    let server = counting(None)?;
    let desk = desk(H2C, &[server.address])?;
    let request = "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    assert_eq!(ask(&desk, request, b"")?.0, 501);
    assert!(server.heads().is_empty());
    Ok(())
}

/// Two that fail in a row, and the third time nobody asks for a while; all others get their answers.
#[test]
fn who_does_not_answer_well_gets_no_requests_for_a_while() -> Result<()> {
    let ill = Arc::new(AtomicBool::new(true));
    let is_ill = Arc::clone(&ill);
    let first = Recorder::start(move |_| match is_ill.load(Ordering::Relaxed) {
        true => Deed::Say(b"HTTP/1.1 503 Oh\r\nContent-Length: 0\r\n\r\n".to_vec()),
        false => Deed::Say(said("first")),
    })?;
    let second = Recorder::start(|_| Deed::Say(said("second")))?;
    let ejection = Some(Ejection { after: 2, pause: Duration::from_secs(2) });
    let settings = Settings { ejection, ..Settings::default() };
    let servers = vec![backend(first.address), backend(second.address)];
    let desk = Desk::with(settings, SERVICE, &[("web", servers)], &[])?;
    let get = |times: usize| -> Result<Vec<u16>> {
        (0..times).map(|_| Ok(ask(&desk, "GET / HTTP/1.1\r\nHost: a", b"")?.0)).collect()
    };
    let began = std::time::Instant::now();
    while first.got().len() < 2 {
        ensure!(began.elapsed() < Duration::from_secs(20), "it is not asked twice");
        get(1)?;
    }
    first.take();
    assert_eq!(get(50)?, [200; 50], "the other one answers");
    ensure!(began.elapsed() > Duration::from_secs(2) || first.take().is_empty(), "it is asked all the same");
    let report = desk.report(|report| !report.ejections.is_empty())?;
    assert_eq!(report.ejections[0].backend, first.address.to_string());
    assert_eq!((report.ejections[0].pool.as_str(), report.ejections.len()), ("web", 1));
    ill.store(false, Ordering::Relaxed);
    while first.take().is_empty() {
        ensure!(began.elapsed() < Duration::from_secs(30), "it does not come back");
        assert_eq!(get(5)?, [200; 5]);
    }
    Ok(())
}

/// By the PROXY protocol a server hears whose a connection is before anything else, and nobody else's request comes by it.
#[test]
fn a_server_hears_whose_a_connection_is() -> Result<()> {
    let authority = Vouching::new()?;
    for (version, over_tls) in
        [(ProxyVersion::V1, false), (ProxyVersion::V2, false), (ProxyVersion::V1, true)]
    {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let acceptor = over_tls.then(|| authority.server("shop.internal", &[b"http/1.1"])).transpose()?;
        let heard = std::thread::spawn(move || -> Result<Vec<(Option<SocketAddr>, String)>> {
            (0..2).map(|_| introduced(&listener, acceptor.as_ref())).collect()
        });
        let speech = Speech {
            proxy: Some(version),
            ..if over_tls { authority.speech(false) } else { Speech::default() }
        };
        let desk = desk(speech, &[address])?;
        let mut clients = Vec::new();
        // One after the other from one connection: each by a connection of its own all the same.
        let mut speaker = Speaker::from_source([127, 0, 0, 7].into(), desk.addresses[0])?;
        for _ in 0..2 {
            speaker.say(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")?;
            assert_eq!(speaker.hear()?.context("an answer")?.body, "ok");
            clients.push(Some(speaker.address()?));
        }
        let heard = heard.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
        assert_eq!(heard.iter().map(|(client, _)| *client).collect::<Vec<_>>(), clients, "{version:?}");
        assert!(heard.iter().all(|(_, line)| line == "GET /x HTTP/1.1"), "{heard:?}");
    }
    Ok(())
}

/// Takes a connection: who it is said to come from, and the line of its request, which is answered.
fn introduced(
    listener: &std::net::TcpListener,
    tls: Option<&Arc<rustls::ServerConfig>>,
) -> Result<(Option<SocketAddr>, String)> {
    let (stream, _) = listener.accept()?;
    let mut stream =
        proxy_header::io::ProxiedStream::create_from_std(stream, proxy_header::ParseConfig::default())?;
    let client = stream.proxy_header().proxied_address().map(|address| address.source);
    let Some(tls) = tls else { return Ok((client, one_request(&mut stream)?)) };
    let session = rustls::ServerConnection::new(Arc::clone(tls))?;
    Ok((client, one_request(&mut rustls::StreamOwned::new(session, stream))?))
}

fn one_request(stream: &mut (impl std::io::Read + std::io::Write)) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    stream.write_all(&said("ok"))?;
    stream.flush()?;
    Ok(String::from_utf8(head)?.lines().next().unwrap_or_default().to_owned())
}
