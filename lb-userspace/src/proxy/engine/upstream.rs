//! Requests to backends, tried once more where that is safe.

use std::{error::Error, future::Future, net::SocketAddr, sync::Arc, time::Instant};

use http::{HeaderValue, Method, Request, Response, Uri, Version, header, request::Parts};
use http_body::Body as _;
use hyper::body::Incoming;
use tracing::warn;

use super::{
    body::{Body, Hold, Upload, nothing},
    connections::Line,
};
use crate::{
    model::desk::DeskTimeouts,
    proxy::{
        pools::{Call, NoBackend, Pool, Ticket, Wish},
        transport::Transport,
        voice::Trouble,
        worker::Worker,
    },
};

/// How often a request is sent at most.
const ATTEMPTS: usize = 3;

/// For whom a request is sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behalf {
    /// Where it comes from; a port of 0: only its proxy knows that.
    pub(super) client: SocketAddr,
    /// Where it has called.
    pub(super) called: SocketAddr,
    /// To whom it would rather come.
    pub(super) wish: Wish,
}

/// What became of one attempt.
enum Failed {
    /// Nothing of it has been sent.
    Unsent(Box<Request<Body>>),
    /// The server has not looked at it, and says so.
    Untouched,
    /// It broke, and nobody knows how far it had come.
    Broken,
    /// There was no answer in time.
    Slow,
}

/// Sends a request to a backend of a pool.
///
/// # Errors
/// Why there is no answer.
pub(super) async fn send(
    worker: &Worker,
    pool: &Arc<Pool>,
    behalf: Behalf,
    timeouts: &DeskTimeouts,
    (mut parts, body): (Parts, Body),
    upload: &Upload,
) -> Result<(Response<Incoming>, Hold), Trouble> {
    let call = || Call { port: behalf.called.port(), random: worker.chance.next(), wish: behalf.wish };
    let (pool, first) = enter(worker, Arc::clone(pool), call()).await?;
    let pool = pool.as_ref();
    let (transport, connections) = (&pool.transport, worker.connections(pool));
    pool.budget().earn();
    let repeatable = body.is_end_stream() && is_idempotent(&parts.method);
    let bodyless = body.is_end_stream();
    if transport.http2 {
        for_http2(&mut parts, transport)?;
    } else if !bodyless && !parts.headers.contains_key(header::CONTENT_LENGTH) {
        // Without it hyper writes no body for methods that seldom have one.
        parts.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let mut body = Some(body);
    let mut first = Some(first);
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut last = Trouble::Unreachable;
    let mut anew = false;
    for attempt in 0..ATTEMPTS {
        let ticket = match first.take() {
            Some(ticket) => ticket,
            None => match pool.enter(call(), &tried).await {
                Ok(ticket) => ticket,
                Err(NoBackend::Tried | NoBackend::Superseded) => return Err(last),
                Err(none) => return Err(none.into()),
            },
        };
        if attempt > 0 {
            worker.figures.retried();
        }
        // A kept connection that turned out closed is not followed by another.
        let kept = (attempt == 0).then(|| connections.kept(ticket.address, transport, repeatable)).flatten();
        let was_kept = kept.is_some();
        let line = match kept {
            Some(line) => Ok(line),
            None => {
                let introduction = transport.introduction(behalf.client, behalf.called);
                connections.open(ticket.address, transport, timeouts.connect, anew, &introduction).await
            }
        };
        let line = match line {
            Ok(line) => line,
            Err(why) => {
                note(worker, pool, &ticket, false);
                // Nothing of it has been touched: safe whatever it is.
                tried.push(ticket.address);
                last = why;
                if pool.budget().spend() {
                    continue;
                }
                return Err(last);
            }
        };
        let body_now = match body.take() {
            Some(body) => body,
            None if bodyless => nothing(),
            None => return Err(last),
        };
        let request = Request::from_parts(parts.clone(), body_now);
        match exchange(line, request, timeouts, upload).await {
            Ok((response, Line::Http1(sender))) => {
                note(worker, pool, &ticket, answers(&response));
                connections.keep(ticket.address, transport, sender);
                return Ok((response, Hold { ticket, share: None }));
            }
            Ok((response, Line::Http2(_, share))) => {
                note(worker, pool, &ticket, answers(&response));
                return Ok((response, Hold { ticket, share: Some(share) }));
            }
            Err(Failed::Unsent(request)) => {
                body = Some(request.into_body());
                // Others that were kept may be closing likewise.
                anew = true;
            }
            Err(Failed::Slow) => {
                let trouble = upload.trouble();
                // What stopped coming from the client says nothing of the server, nor does one that may have more to say.
                if trouble.is_none() && !upload.is_awaited() {
                    note(worker, pool, &ticket, false);
                }
                return Err(trouble.unwrap_or(Trouble::Slow));
            }
            Err(failed @ (Failed::Broken | Failed::Untouched)) => {
                let trouble = upload.trouble();
                if trouble.is_none() && !was_kept {
                    note(worker, pool, &ticket, false);
                }
                last = trouble.unwrap_or(Trouble::Broken);
                let untouched = matches!(failed, Failed::Untouched) && bodyless;
                if !(repeatable || untouched) {
                    return Err(last);
                }
                // A server that closed a kept connection has not failed, and is asked once more for nothing.
                if !was_kept {
                    tried.push(ticket.address);
                    if !pool.budget().spend() {
                        return Err(last);
                    }
                }
            }
        }
    }
    Err(last)
}

/// The first backend for a request, of the pool as it is by then: it may be ordered anew while it is waited for room.
pub(super) async fn enter(
    worker: &Worker,
    mut pool: Arc<Pool>,
    call: Call,
) -> Result<(Arc<Pool>, Ticket), Trouble> {
    loop {
        match pool.enter(call, &[]).await {
            Ok(ticket) => return Ok((pool, ticket)),
            Err(NoBackend::Superseded) => {
                let now = worker.shared.state.load().pools.get(&pool.name).cloned();
                pool = now.ok_or(Trouble::Closed)?;
            }
            Err(none) => return Err(none.into()),
        }
    }
}

impl From<NoBackend> for Trouble {
    fn from(none: NoBackend) -> Self {
        match none {
            NoBackend::Drained => Self::Drained,
            NoBackend::Full => Self::Full,
            NoBackend::Unfit | NoBackend::Tried | NoBackend::Superseded => Self::Closed,
        }
    }
}

/// Notes how a request went with its backend.
pub(super) fn note(worker: &Worker, pool: &Pool, ticket: &Ticket, went_well: bool) {
    if let Some(pause) = pool.note(ticket, went_well) {
        warn!(pool = pool.name, backend = %ticket.address, "it does not answer well, and gets no requests for {pause:?}");
        worker.figures.ejected(&pool.name, ticket.address);
    }
}

/// Whether it is an answer of the server's own, rather than that there is none (RFC 9110 sections 15.6.3 to 15.6.5).
fn answers(response: &Response<Incoming>) -> bool {
    !matches!(response.status().as_u16(), 502..=504)
}

/// A request as HTTP/2 has it (RFC 9113 section 8.3.1): the host is part of its address, and nothing is of one
/// connection alone.
fn for_http2(parts: &mut Parts, transport: &Transport) -> Result<(), Trouble> {
    // What it names has gone already, but for `TE: trailers`, which does not need to be named here.
    parts.headers.remove(header::CONNECTION);
    let host = parts.headers.remove(header::HOST);
    let host = host.as_ref().and_then(|host| host.to_str().ok()).filter(|host| !host.is_empty());
    let host = host.ok_or(Trouble::Wrong("it has no Host"))?;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let uri = Uri::builder().scheme(transport.scheme()).authority(host).path_and_query(path);
    parts.uri = uri.build().map_err(|_| Trouble::Wrong("its Host is no name"))?;
    parts.version = Version::HTTP_2;
    Ok(())
}

/// RFC 9110 section 9.2.2: doing it twice is as doing it once.
fn is_idempotent(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE].contains(method)
}

/// One request, and the head of its answer. The time for it begins anew with each part of the body.
async fn exchange(
    mut line: Line,
    request: Request<Body>,
    timeouts: &DeskTimeouts,
    upload: &Upload,
) -> Result<(Response<Incoming>, Line), Failed> {
    let is_sized = request.body().size_hint().exact().is_some();
    let answered = async {
        let answer = match &mut line {
            Line::Http1(sender) => sender.try_send_request(request).await,
            Line::Http2(sender, _) => sender.try_send_request(request).await,
        };
        answer.map_err(|mut error| match error.take_message() {
            Some(request) => Failed::Unsent(Box::new(request)),
            None if is_untouched(error.error()) => Failed::Untouched,
            None => Failed::Broken,
        })
    };
    let response = in_time(answered, timeouts, is_sized, upload).await?;
    Ok((response, line))
}

/// RFC 9113 section 8.7: such a request has not been processed in any way.
fn is_untouched(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    cause.and_then(h2::Error::reason) == Some(h2::Reason::REFUSED_STREAM)
}

async fn in_time(
    answered: impl Future<Output = Result<Response<Incoming>, Failed>>,
    timeouts: &DeskTimeouts,
    is_sized: bool,
    upload: &Upload,
) -> Result<Response<Incoming>, Failed> {
    tokio::pin!(answered);
    let mut since = Instant::now();
    loop {
        let before = upload.progress();
        match tokio::time::timeout(timeouts.response, answered.as_mut()).await {
            Ok(outcome) => return outcome,
            Err(_) if upload.progress() > before => since = Instant::now(),
            // Of a body whose length is known the client owes the rest, and there is a clock for that, which goes as long as
            // somebody asks for more of it. Of another, this may be all, and the server's turn.
            Err(_)
                if is_sized
                    && upload.is_awaited()
                    && since.elapsed() <= timeouts.body + timeouts.response => {}
            Err(_) => return Err(Failed::Slow),
        }
    }
}
