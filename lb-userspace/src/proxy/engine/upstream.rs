//! Connections to backends: kept while they are of use, and requests tried once more where that is safe.
//!
//! hyper-util's client keeps connections too, but does not tell whether a request went out on one that had
//! been kept; and that is what decides whether it may be sent again.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::{HeaderValue, Method, Request, Response, header, request::Parts};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::body::{Body, Upload, Watched, nothing};
use crate::{
    model::desk::DeskTimeouts,
    proxy::{
        desk::Shared,
        pools::{NoBackend, Pool, Ticket},
        voice::Trouble,
    },
};

/// How often a request is sent at most.
const ATTEMPTS: usize = 3;

/// How long a connection is kept for the next request. Many servers close theirs after a minute, some after
/// five seconds.
const KEPT: Duration = Duration::from_secs(30);

/// The same for a request that cannot be sent again, should the server close at that very moment.
const KEPT_FOR_ONCE: Duration = Duration::from_secs(1);

/// Most connections to one backend that are kept.
const KEPT_MOST: usize = 128;

/// Connections that wait for a request.
#[derive(Debug, Default)]
pub struct Upstream {
    idle: Arc<Mutex<HashMap<SocketAddr, Vec<Idle>>>>,
}

#[derive(Debug)]
struct Idle {
    sender: SendRequest<Body>,
    since: Instant,
}

/// What became of one attempt.
enum Failed {
    /// Nothing of it has been sent.
    Unsent(Box<Request<Body>>),
    /// It broke, and nobody knows how far it had come.
    Broken,
    /// There was no answer in time.
    Slow,
}

impl Upstream {
    /// Sends a request to a backend of a pool, which a client called on `port`.
    ///
    /// # Errors
    /// Why there is no answer.
    pub(super) async fn send(
        &self,
        shared: &Shared,
        pool: &Pool,
        port: u16,
        timeouts: &DeskTimeouts,
        (mut parts, body): (Parts, Watched),
        upload: &Upload,
    ) -> Result<(Response<Incoming>, Ticket), Trouble> {
        pool.budget().earn();
        let repeatable = body.is_end_stream() && is_idempotent(&parts.method);
        let bodyless = body.is_end_stream();
        if !bodyless && !parts.headers.contains_key(header::CONTENT_LENGTH) {
            // Without it hyper writes no body for methods that seldom have one.
            parts.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        let mut body = Some(body.boxed_unsync());
        let mut tried = Vec::new();
        let mut last = Trouble::Unreachable;
        for attempt in 0..ATTEMPTS {
            let ticket = match pool.choose(port, &tried, shared.chance.next()) {
                Ok(ticket) => ticket,
                Err(NoBackend::Drained) => return Err(Trouble::Drained),
                Err(NoBackend::Unfit) => return Err(Trouble::Closed),
                Err(NoBackend::Tried) => return Err(last),
            };
            if attempt > 0 {
                shared.figures.retried();
            }
            // A kept connection that turned out closed is not followed by another.
            let kept = (attempt == 0).then(|| self.kept(ticket.address, repeatable)).flatten();
            let (mut sender, was_kept) = match kept {
                Some(sender) => (sender, true),
                None => match connect(ticket.address, timeouts.connect).await {
                    Some(sender) => (sender, false),
                    None => {
                        // Nothing of it has been touched: safe whatever it is.
                        tried.push(ticket.address);
                        last = Trouble::Unreachable;
                        if pool.budget().spend() {
                            continue;
                        }
                        return Err(last);
                    }
                },
            };
            let body_now = match body.take() {
                Some(body) => body,
                None if bodyless => nothing(),
                None => return Err(last),
            };
            let request = Request::from_parts(parts.clone(), body_now);
            match exchange(&mut sender, request, timeouts.response, upload).await {
                Ok(response) => {
                    self.keep(ticket.address, sender);
                    return Ok((response, ticket));
                }
                Err(Failed::Unsent(request)) => body = Some(request.into_body()),
                Err(Failed::Slow) => return Err(upload.trouble().unwrap_or(Trouble::Slow)),
                Err(Failed::Broken) => {
                    last = upload.trouble().unwrap_or(Trouble::Broken);
                    if !repeatable {
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

    /// A connection that waits, the one used last.
    fn kept(&self, address: SocketAddr, repeatable: bool) -> Option<SendRequest<Body>> {
        let limit = if repeatable { KEPT } else { KEPT_FOR_ONCE };
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = idle.get_mut(&address)?;
        while let Some(idle) = waiting.pop() {
            if idle.sender.is_ready() && idle.since.elapsed() < limit {
                return Some(idle.sender);
            }
        }
        None
    }

    /// Keeps a connection once the answer on it has ended.
    fn keep(&self, address: SocketAddr, mut sender: SendRequest<Body>) {
        let idle = Arc::clone(&self.idle);
        tokio::spawn(async move {
            // An error: it has been closed.
            if sender.ready().await.is_ok() {
                let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
                let waiting = idle.entry(address).or_default();
                if waiting.len() < KEPT_MOST {
                    waiting.push(Idle { sender, since: Instant::now() });
                }
            }
        });
    }

    /// Lets go of connections that nobody needs any more.
    pub fn sweep(&self) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|_, waiting| {
            waiting.retain(|idle| idle.sender.is_ready() && idle.since.elapsed() < KEPT);
            !waiting.is_empty()
        });
    }
}

/// RFC 9110 section 9.2.2: doing it twice is as doing it once.
fn is_idempotent(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE].contains(method)
}

/// A new connection; `None`: it did not come about.
async fn connect(address: SocketAddr, patience: Duration) -> Option<SendRequest<Body>> {
    let stream = tokio::time::timeout(patience, TcpStream::connect(address)).await.ok()?.ok()?;
    _ = stream.set_nodelay(true);
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.ok()?;
    // Ends with the sender, or when the backend closes; or it becomes a websocket.
    tokio::spawn(connection.with_upgrades());
    Some(sender)
}

/// One request, and the head of its answer. The time for it begins anew with each part of the body.
async fn exchange(
    sender: &mut SendRequest<Body>,
    request: Request<Body>,
    patience: Duration,
    upload: &Upload,
) -> Result<Response<Incoming>, Failed> {
    let answer = sender.try_send_request(request);
    tokio::pin!(answer);
    loop {
        let before = upload.progress();
        match tokio::time::timeout(patience, answer.as_mut()).await {
            Ok(Ok(response)) => return Ok(response),
            Ok(Err(mut error)) => {
                return Err(match error.take_message() {
                    Some(request) => Failed::Unsent(Box::new(request)),
                    None => Failed::Broken,
                });
            }
            Err(_) if upload.progress() > before => {}
            Err(_) => return Err(Failed::Slow),
        }
    }
}
