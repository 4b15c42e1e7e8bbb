//! Connections to backends, kept while they are of use: of HTTP/1.1 for one request after another, of HTTP/2 for many at
//! once.
//!
//! hyper-util's client keeps connections too, but does not tell whether a request went out on one that had been kept;
//! and that is what decides whether it may be sent again.

use std::{
    collections::HashMap,
    future::Future,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::body::Body;
use crate::proxy::{
    tls,
    transport::{Security, Transport},
    voice::Trouble,
};

/// How long a connection is kept for the next request. Many servers close theirs after a minute, some after
/// five seconds.
const KEPT: Duration = Duration::from_secs(30);

/// The same for a request that cannot be sent again, should the server close at that very moment.
const KEPT_FOR_ONCE: Duration = Duration::from_secs(1);

/// Most connections to one backend that are kept in one place.
const KEPT_MOST: usize = 128;

/// Requests on one connection of HTTP/2 at the same time; what comes beyond gets another. Most servers allow a hundred
/// and more (RFC 9113 section 6.5.2); where one allows fewer, that counts.
const STREAMS: usize = 100;

/// What of an answer may be on its way before its client has read it, and of a connection's answers together: so
/// much that slow clients never hold up the others of their connection.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS as u32;

/// Most that an answer's headers may take.
const HEAD_LIMIT: u32 = 64 << 10;

/// How long a connection of HTTP/2 may be silent before it is asked whether it is still there, and how long that
/// may take.
const ASKED_AFTER: Duration = Duration::from_secs(15);
const ASKED_FOR: Duration = Duration::from_secs(5);

/// A backend, and how it is spoken with: [`Transport::number`].
type Key = (SocketAddr, u64);

/// Connections that wait for a request, and those that take more: a worker's own, or those that workers have in common.
#[derive(Debug, Default)]
pub struct Connections {
    waiting: Arc<Mutex<HashMap<Key, Vec<Waiting>>>>,
    shared: Mutex<HashMap<Key, Arc<Lane>>>,
}

#[derive(Debug)]
struct Waiting {
    sender: http1::SendRequest<Body>,
    since: Instant,
}

/// The connections of HTTP/2 to one backend.
#[derive(Debug, Default)]
struct Lane {
    open: Mutex<Vec<Shared>>,
    /// Held while a connection is made: who wants one meanwhile gets a part of it.
    opening: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    sender: http2::SendRequest<Body>,
    /// One for each request under way, and this one.
    shares: Arc<Shares>,
    /// When it last got one.
    since: Instant,
}

/// What of a connection there is to be shared.
#[derive(Debug)]
struct Shares {
    /// How many the server allows, as far as it has said.
    allowed: AtomicUsize,
}

/// A part of a connection, until this is dropped.
#[derive(Debug)]
pub(super) struct Share(Arc<Shares>);

/// A connection for a request.
pub(super) enum Line {
    /// For it alone.
    Http1(http1::SendRequest<Body>),
    /// Shared with others.
    Http2(http2::SendRequest<Body>, Share),
}

impl Connections {
    /// A connection that is there already, the one used last; `repeatable`: the request could be sent again.
    pub(super) fn kept(&self, address: SocketAddr, transport: &Transport, repeatable: bool) -> Option<Line> {
        if transport.proxy.is_some() {
            return None;
        }
        let key = (address, transport.number);
        if transport.http2 {
            let lane = lock(&self.shared).get(&key).cloned()?;
            return lane.share();
        }
        let limit = if repeatable { KEPT } else { KEPT_FOR_ONCE };
        let mut all = lock(&self.waiting);
        let waiting = all.get_mut(&key)?;
        while let Some(waiting) = waiting.pop() {
            if waiting.sender.is_ready() && waiting.since.elapsed() < limit {
                return Some(Line::Http1(waiting.sender));
            }
        }
        None
    }

    /// A new connection, which begins with `introduction`; of HTTP/2 one that somebody else has made meanwhile does too, but where it is to be made `anew`.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn open(
        &self,
        address: SocketAddr,
        transport: &Transport,
        patience: Duration,
        anew: bool,
        introduction: &[u8],
    ) -> Result<Line, Trouble> {
        let opened = async {
            if !transport.http2 {
                return open(address, transport, STREAMS, introduction).await;
            }
            let lane = Arc::clone(lock(&self.shared).entry((address, transport.number)).or_default());
            let _opening = lane.opening.lock().await;
            if !anew && let Some(line) = lane.share() {
                return Ok(line);
            }
            let line = open(address, transport, lane.allowed(), &[]).await?;
            if let Line::Http2(sender, Share(shares)) = &line {
                let (sender, shares) = (sender.clone(), Arc::clone(shares));
                lock(&lane.open).push(Shared { sender, shares, since: Instant::now() });
            }
            Ok(line)
        };
        tokio::time::timeout(patience, opened).await.unwrap_or(Err(Trouble::Unreachable))
    }

    /// Keeps a connection of HTTP/1.1 once the answer on it has ended.
    pub(super) fn keep(
        &self,
        address: SocketAddr,
        transport: &Transport,
        mut sender: http1::SendRequest<Body>,
    ) {
        if transport.proxy.is_some() {
            // It was for this client alone.
            return;
        }
        let (all, key) = (Arc::clone(&self.waiting), (address, transport.number));
        let put = move |sender| {
            let mut all = lock(&all);
            let waiting = all.entry(key).or_default();
            if waiting.len() < KEPT_MOST {
                waiting.push(Waiting { sender, since: Instant::now() });
            }
        };
        // A short answer has come whole.
        if sender.is_ready() {
            return put(sender);
        }
        tokio::spawn(async move {
            // An error: it has been closed, or has become a websocket.
            if sender.ready().await.is_ok() {
                put(sender);
            }
        });
    }

    /// Lets go of connections that nobody needs any more.
    pub fn sweep(&self) {
        lock(&self.waiting).retain(|_, waiting| {
            waiting.retain(|waiting| waiting.sender.is_ready() && waiting.since.elapsed() < KEPT);
            !waiting.is_empty()
        });
        lock(&self.shared).retain(|_, lane| {
            let mut open = lock(&lane.open);
            open.retain(|shared| shared.is_open() && (shared.is_used() || shared.since.elapsed() < KEPT));
            // Somebody may be about to use it.
            !open.is_empty() || Arc::strong_count(lane) > 1
        });
    }
}

impl Lane {
    /// How many requests at once the server has allowed lately.
    fn allowed(&self) -> usize {
        lock(&self.open).iter().map(Shared::allowed).min().unwrap_or(STREAMS)
    }

    /// A part of the connection that has most requests and takes more.
    fn share(&self) -> Option<Line> {
        let mut open = lock(&self.open);
        open.retain(Shared::is_open);
        let fits = open.iter_mut().filter(|shared| Arc::strong_count(&shared.shares) <= shared.allowed());
        let shared = fits.max_by_key(|shared| Arc::strong_count(&shared.shares))?;
        shared.since = Instant::now();
        Some(Line::Http2(shared.sender.clone(), Share(Arc::clone(&shared.shares))))
    }
}

impl Shared {
    fn allowed(&self) -> usize {
        self.shares.allowed.load(Ordering::Relaxed).clamp(1, STREAMS)
    }

    fn is_open(&self) -> bool {
        self.sender.is_ready()
    }

    fn is_used(&self) -> bool {
        Arc::strong_count(&self.shares) > 1
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new connection; `allowed`: so many requests at once, as far as is known of the server.
async fn open(
    address: SocketAddr,
    transport: &Transport,
    allowed: usize,
    introduction: &[u8],
) -> Result<Line, Trouble> {
    let mut stream = TcpStream::connect(address).await.map_err(|_| Trouble::Unreachable)?;
    _ = stream.set_nodelay(true);
    stream.write_all(introduction).await.map_err(|_| Trouble::Unreachable)?;
    match &transport.security {
        Security::Plain => speak(stream, transport.http2, allowed).await,
        Security::Unverifiable => Err(Trouble::Untrusted),
        Security::Tls(name, config) => {
            let handshake = TlsConnector::from(Arc::clone(config)).connect(name.clone(), stream).await;
            let stream = handshake.map_err(|error| {
                // What rustls has to say of a peer comes as this kind; all others are of the connection.
                match error.kind() {
                    std::io::ErrorKind::InvalidData => Trouble::Untrusted,
                    _ => Trouble::Unreachable,
                }
            })?;
            // A server that has agreed on nothing speaks HTTP/1.1 (RFC 9113 section 3.2).
            if transport.http2 && stream.get_ref().1.alpn_protocol() != Some(tls::H2) {
                return Err(Trouble::Unreachable);
            }
            speak(stream, transport.http2, allowed).await
        }
    }
}

async fn speak<S>(stream: S, http2: bool, allowed: usize) -> Result<Line, Trouble>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stream = TokioIo::new(stream);
    if !http2 {
        let (sender, connection) = http1::handshake(stream).await.map_err(|_| Trouble::Unreachable)?;
        // Ends with the sender, or when the backend closes; or it becomes a websocket.
        tokio::spawn(connection.with_upgrades());
        return Ok(Line::Http1(sender));
    }
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEAD_LIMIT)
        .keep_alive_interval(ASKED_AFTER)
        .keep_alive_timeout(ASKED_FOR)
        .handshake(stream)
        .await
        .map_err(|_| Trouble::Unreachable)?;
    let shares = Arc::new(Shares { allowed: AtomicUsize::new(allowed) });
    let theirs = Arc::downgrade(&shares);
    let mut connection = Box::pin(connection);
    // It is asked to go on for each request, and knows by then what the server allows.
    tokio::spawn(std::future::poll_fn(move |context| {
        let ended = connection.as_mut().poll(context);
        if let Some(shares) = theirs.upgrade() {
            // Until it has said so it allows whatever there is.
            let now = connection.current_max_send_streams().min(allowed);
            shares.allowed.store(now, Ordering::Relaxed);
        }
        ended
    }));
    Ok(Line::Http2(sender, Share(shares)))
}
