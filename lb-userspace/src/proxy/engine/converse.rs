//! A client's connection: which HTTP it speaks, what it may ask for at once, and when it has to end.
//!
//! Whoever does not read what is written to them loses the connection. HTTP/1.1 has its other limits from hyper. Of
//! HTTP/2 hyper bounds what one connection can make us remember (streams, headers, resets that nobody has looked at,
//! frames that wait); when a connection has rested for too long, and when it begins requests only to give them up, is
//! seen here.

use std::{
    convert::Infallible,
    error::Error,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Request, Response, Version};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, oneshot},
    time::Instant,
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::task::AbortOnDropHandle;

use super::{Visit, body::Body};
use crate::{model::desk::DeskTimeouts, proxy::worker::Worker};

/// Most that a request's line and headers may take.
const HEAD_LIMIT: usize = 64 << 10;

/// Requests of a connection at the same time (HTTP/2).
const STREAMS: u32 = 100;

/// Streams that a client has reset before anybody has looked at them (CVE-2023-44487).
const UNSEEN_RESETS: usize = 20;

/// Streams that we have reset for a client's mistakes.
const MISTAKES: usize = 100;

/// What of a body may be on its way before somebody has read it: of one request, and of a connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;

/// What of answers may wait for a client, for each request.
const UNSENT: usize = 64 << 10;

/// So many requests may be given up by their client, and more if they are fewer than half of all.
const GIVEN_UP: u64 = 100;

/// What is left of a connection that is to end: to write what is being written.
const LAST: Duration = Duration::from_secs(1);

/// Why a connection ends on which the head of a first request did not come in time.
const HEAD_SLOW: &str = "head_slow";

/// Which HTTP a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spoken {
    /// HTTP/1, as agreed by TLS.
    Http1,
    /// HTTP/2, as agreed by TLS.
    Http2,
    /// What its first bytes say: without TLS there is nothing to agree by, and those of HTTP/2 (RFC 9113
    /// section 3.4) can be the beginning of nothing else.
    Unsaid,
}

/// A client's connection, as hyper has it.
pub(super) type Client<S> = TokioIo<Pin<Box<TimeoutStream<S>>>>;

/// Serves a connection to its end.
pub(super) async fn converse<S>(visit: Visit, stream: S, spoken: Spoken, timeouts: DeskTimeouts)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let patience = timeouts.header;
    // Whoever does not read what is written to them for so long is not waited for.
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(timeouts.body));
    let stream: Client<S> = TokioIo::new(Box::pin(stream));
    let worker = Arc::clone(&visit.worker);
    let (visit, pulse) = (Arc::new(visit), Arc::new(Pulse::new(spoken)));
    let answer = service_fn({
        let (visit, pulse) = (Arc::clone(&visit), Arc::clone(&pulse));
        move |request: Request<Incoming>| {
            let (visit, pulse) = (Arc::clone(&visit), Arc::clone(&pulse));
            // Of HTTP/2, hyper moves what is given back from place to place, and without a box that is a lot.
            Box::pin(async move { Ok::<Response<Body>, Infallible>(visit.answer(request, &pulse).await) })
        }
    });
    let builder = builder(spoken, patience);
    let connection = builder.serve_connection_with_upgrades(stream, answer);
    tokio::pin!(connection);
    // By itself, since here it would be asked for with every byte that comes.
    let (tell, mut told) = oneshot::channel();
    let watch = tokio::spawn(watch(Arc::clone(&worker), Arc::clone(&pulse), patience, tell));
    let _watching = AbortOnDropHandle::new(watch);
    // What breaks a connection is the client's affair; what is wrong with a request has been answered.
    let end = tokio::select! {
        biased;
        // Without it, nobody would ever tell.
        end = &mut told => end.unwrap_or(End::Leave),
        ended = connection.as_mut() => {
            if let Some(reason) = ended.err().and_then(|error| why_it_ended(error.as_ref(), &pulse)) {
                worker.figures.refused(reason);
            }
            let tunnel = visit.tunnel.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(tunnel) = tunnel {
                tunnel.carry::<S>(&worker).await;
            }
            return;
        }
    };
    match end {
        End::Calm => worker.figures.refused("resets"),
        // Requests under way are answered, others are to go elsewhere: of HTTP/2 the client is told which is
        // which (GOAWAY), so nothing is lost.
        End::Leave | End::Rested => {
            connection.as_mut().graceful_shutdown();
            if end == End::Rested {
                if !pulse.has_begun() {
                    worker.figures.refused(HEAD_SLOW);
                }
                let ended = tokio::time::timeout(LAST, connection.as_mut()).await;
                // A request may have come at the very last moment.
                if ended.is_ok() || !pulse.is_busy() {
                    return;
                }
            }
            tokio::select! {
                _ = connection.as_mut() => {}
                _ = pulse.over(patience) => {}
            }
        }
    }
}

/// Why the desk has ended a connection: its client did not read what was written (not a time-out of the kernel's, which has
/// a number), or did not send the head of a request that is one, in time and of a size that is taken; such a head is nobody's
/// request yet, and hyper has answered it.
fn why_it_ended(error: &(dyn Error + 'static), pulse: &Pulse) -> Option<&'static str> {
    let causes = || std::iter::successors(Some(error), |&error| error.source());
    let is_unread =
        |error: &io::Error| error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none();
    if causes().filter_map(|error| error.downcast_ref::<io::Error>()).any(is_unread) {
        return Some("unread");
    }
    let error = causes().find_map(|error| error.downcast_ref::<hyper::Error>())?;
    if error.is_timeout() {
        // After a request, it is most likely one that rests.
        (!pulse.has_begun()).then_some(HEAD_SLOW)
    } else if error.is_parse_too_large() {
        Some("head_too_large")
    } else {
        error.is_parse().then_some("head_wrong")
    }
}

/// Tells when a connection has to end, and how.
async fn watch(worker: Arc<Worker>, pulse: Arc<Pulse>, patience: Duration, tell: oneshot::Sender<End>) {
    let another_takes_over = async {
        worker.draining.cancelled().await;
        // Of HTTP/1.1 the next answer says that it is the last.
        if !pulse.is_http2() {
            worker.closing.cancelled().await;
        }
    };
    let end = tokio::select! {
        end = pulse.over(patience) => end,
        () = another_takes_over => End::Leave,
    };
    // It may just have ended by itself.
    _ = tell.send(end);
}

fn builder(spoken: Spoken, patience: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(HEAD_LIMIT)
        .half_close(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEAD_LIMIT as u32)
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(UNSEEN_RESETS)
        .max_local_error_reset_streams(MISTAKES)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(UNSENT)
        // A client that is not there any more.
        .keep_alive_interval(patience)
        .keep_alive_timeout(patience);
    match spoken {
        Spoken::Http1 => builder.http1_only(),
        Spoken::Http2 => builder.http2_only(),
        Spoken::Unsaid => builder,
    }
}

/// Why a connection ends from our side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It has rested for too long.
    Rested,
    /// Its client gives up what it has begun, again and again.
    Calm,
    /// Another desk takes over.
    Leave,
}

/// What goes on on a connection.
pub(super) struct Pulse {
    beat: Mutex<Beat>,
    enough: Notify,
}

struct Beat {
    version: Spoken,
    under_way: u64,
    /// When the last request ended.
    since: Instant,
    begun: u64,
    given_up: u64,
}

impl Pulse {
    fn new(version: Spoken) -> Self {
        let beat = Beat { version, under_way: 0, since: Instant::now(), begun: 0, given_up: 0 };
        Self { beat: Mutex::new(beat), enough: Notify::new() }
    }

    fn beat(&self) -> MutexGuard<'_, Beat> {
        self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_http2(&self) -> bool {
        self.beat().version == Spoken::Http2
    }

    /// Whether there was a request.
    fn has_begun(&self) -> bool {
        self.beat().begun > 0
    }

    /// Whether requests are under way.
    fn is_busy(&self) -> bool {
        self.beat().under_way > 0
    }

    /// A request has come; it is under way until what is given back is dropped.
    pub(super) fn begin(self: &Arc<Self>, version: Version) -> Errand {
        let mut beat = self.beat();
        beat.version = if version == Version::HTTP_2 { Spoken::Http2 } else { Spoken::Http1 };
        beat.under_way += 1;
        beat.begun += 1;
        let way = Way { pulse: Arc::clone(self), is_over: AtomicBool::new(false) };
        Errand { way: Arc::new(way), is_done: false }
    }

    /// Comes back when the connection has to end.
    async fn over(&self, patience: Duration) -> End {
        let rested = async {
            loop {
                let until = {
                    let beat = self.beat();
                    match beat.version {
                        // hyper sees to it.
                        Spoken::Http1 => None,
                        _ if beat.under_way > 0 => Some(Instant::now() + patience / 4),
                        _ => Some(beat.since + patience),
                    }
                };
                match until {
                    None => std::future::pending().await,
                    Some(until) if until <= Instant::now() => return,
                    Some(until) => tokio::time::sleep_until(until).await,
                }
            }
        };
        tokio::select! {
            () = rested => End::Rested,
            () = self.enough.notified() => End::Calm,
        }
    }
}

/// A request, until its answer has ended or is given up.
pub(super) struct Errand {
    way: Arc<Way>,
    is_done: bool,
}

/// That a request is under way.
pub(super) struct Way {
    pulse: Arc<Pulse>,
    is_over: AtomicBool,
}

impl Way {
    /// The request is not under way any more, though its answer may be there still: nobody reads it, and a connection that
    /// has nothing else to do rests.
    pub(super) fn end(&self) {
        if !self.is_over.swap(true, Ordering::Relaxed) {
            let mut beat = self.pulse.beat();
            beat.under_way -= 1;
            beat.since = Instant::now();
        }
    }
}

impl Errand {
    /// Its being under way.
    pub(super) fn way(&self) -> Arc<Way> {
        Arc::clone(&self.way)
    }

    /// Its answer has ended, well or not.
    pub(super) fn done(mut self) {
        self.is_done = true;
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        self.way.end();
        if !self.is_done {
            let mut beat = self.way.pulse.beat();
            beat.given_up += 1;
            if beat.version == Spoken::Http2 && beat.given_up > GIVEN_UP && beat.given_up * 2 > beat.begun {
                self.way.pulse.enough.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn http2() -> Arc<Pulse> {
        Arc::new(Pulse::new(Spoken::Http2))
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_may_rest_only_for_so_long_and_not_with_a_request_under_way() {
        for spoken in [Spoken::Http2, Spoken::Unsaid] {
            let pulse = Arc::new(Pulse::new(spoken));
            let began = Instant::now();
            assert_eq!(pulse.over(PATIENCE).await, End::Rested);
            assert_eq!(began.elapsed(), PATIENCE, "{spoken:?}");
        }
        let pulse = http2();
        let errand = pulse.begin(Version::HTTP_2);
        assert!(tokio::time::timeout(10 * PATIENCE, pulse.over(PATIENCE)).await.is_err());
        errand.done();
        let rested = Instant::now();
        assert_eq!(pulse.over(PATIENCE).await, End::Rested);
        assert_eq!(rested.elapsed(), PATIENCE);
        let pulse = Arc::new(Pulse::new(Spoken::Unsaid));
        pulse.begin(Version::HTTP_11).done();
        assert!(tokio::time::timeout(10 * PATIENCE, pulse.over(PATIENCE)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_what_it_begins_again_and_again_is_not_heard_any_more() {
        let over = |pulse: Arc<Pulse>| async move {
            tokio::time::timeout(PATIENCE / 2, pulse.over(PATIENCE)).await.ok()
        };
        let pulse = http2();
        (0..GIVEN_UP).for_each(|_| drop(pulse.begin(Version::HTTP_2)));
        assert_eq!(over(Arc::clone(&pulse)).await, None);
        drop(pulse.begin(Version::HTTP_2));
        assert_eq!(over(pulse).await, Some(End::Calm));
        // Somebody who looks at many pages, and at most of them to the end.
        let pulse = http2();
        for _ in 0..10 * GIVEN_UP {
            pulse.begin(Version::HTTP_2).done();
            pulse.begin(Version::HTTP_2).done();
            drop(pulse.begin(Version::HTTP_2));
        }
        assert_eq!(over(pulse).await, None);
    }
}
