//! Bodies on their way: each may rest only for so long, a client's has a largest size, and at the end of an
//! answer somebody wants to know how long it was.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderName;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use tokio::{
    task::AbortHandle,
    time::{Instant, Sleep},
};

use super::connections::Share;
use crate::proxy::{headers, pools::Ticket, request::BODY_LIMIT, voice::Trouble};

/// No body.
pub(super) fn nothing() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// Why a body ends early; what has begun is cut then, never completed with something else.
pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Any body.
pub(super) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// What an answer has of its backend until it has ended.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) ticket: Ticket,
    #[expect(dead_code, reason = "counted by being there")]
    pub(super) share: Option<Share>,
}

/// How it goes with a client's body.
#[derive(Debug, Default)]
pub(super) struct Upload {
    /// Counts the parts of it that have come.
    progress: AtomicU64,
    /// More of it is wanted, and does not come.
    awaited: AtomicBool,
    fault: AtomicU8,
    /// The answer to it has begun.
    answered: AtomicBool,
}

const STALLED: u8 = 1;
const TOO_LARGE: u8 = 2;
const BROKEN: u8 = 3;

impl Upload {
    /// How many parts have come.
    pub(super) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Whether its client is waited for, rather than who gets it.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Relaxed)
    }

    /// Why it did not come to its end.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        match self.fault.load(Ordering::Relaxed) {
            STALLED => Some(Trouble::Stalled),
            TOO_LARGE => Some(Trouble::TooLarge),
            BROKEN => Some(Trouble::Wrong("its body is not as it was announced")),
            _ => None,
        }
    }
}

/// A body ends early.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error("nothing of the body came for too long, or next to nothing")]
    Stalled,
    #[error("the body is too large")]
    TooLarge,
}

/// What must come of a client's body while it is waited for as long as it may rest. One that comes in drops would hold its
/// server for as long as it likes; slower than this is nobody who means to send it. Once the answer has begun both go on together.
const LEAST: u64 = 1024;

/// A body that may rest only for so long.
pub(super) struct Watched {
    source: Source,
    patience: Duration,
    /// Begins when somebody first waits.
    rest: Option<Pin<Box<Sleep>>>,
    /// Whether somebody waits, since when `rest` counts.
    waiting: Option<Instant>,
    /// How long was waited before, and how many bytes came, since [`Self::least`] last had come.
    waited: Duration,
    come: u64,
    /// How many bytes end a rest, if any do.
    least: u64,
    left: u64,
    upload: Arc<Upload>,
    /// A client's: names that it has no say in.
    withheld: Option<Vec<HeaderName>>,
    /// What had come of the upload when it was last looked at.
    seen: u64,
}

/// Where a body comes from.
enum Source {
    /// A client.
    Client(Incoming),
    /// A backend, which is busy with it until it has ended.
    Backend(Incoming, #[expect(dead_code, reason = "counted by being there")] Hold),
    /// A backend whose answer goes to a client by HTTP/2: what that one does not take ends, see [`Guard`].
    Guarded(Arc<Guard>, AbortHandle),
}

/// An answer to a client by HTTP/2, which says for each how much it takes. One that takes nothing would hold the backend's
/// connection, and a place where there are only so many, for as long as it likes, since nobody asks a body for more that
/// nobody takes. (A connection of HTTP/1.1 notices by itself that what it has written is not read.)
#[derive(Debug)]
struct Guard {
    answer: Mutex<Option<Answer>>,
    /// Counts how often more was asked for.
    asked: AtomicU64,
    /// What was asked for last has not come: it is not the client who is waited for.
    waits: AtomicBool,
}

/// What is left of an answer. It is given out in pieces, so that who reads slowly is seen to read.
#[derive(Debug)]
struct Answer {
    body: Incoming,
    #[expect(dead_code, reason = "counted by being there")]
    hold: Hold,
    /// What has come and is not given out yet.
    rest: Bytes,
}

/// A frame of HTTP/2, unless both sides have agreed on larger ones (RFC 9113 section 4.2).
const PIECE: usize = 16 << 10;

impl Answer {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                other => return Poll::Ready(other.map(|frame| frame.map_err(Into::into))),
            };
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, more) = (self.rest.len() as u64, self.body.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(more.lower() + rest);
        if let Some(upper) = more.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

impl Guard {
    fn answer(&self) -> MutexGuard<'_, Option<Answer>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of an answer that nobody has asked for more of for so long, and says so.
    async fn watch(guard: Weak<Self>, patience: Duration, unread: impl FnOnce()) {
        let mut before = 0;
        loop {
            tokio::time::sleep(patience).await;
            let Some(guard) = guard.upgrade() else { return };
            let asked = guard.asked.load(Ordering::Relaxed);
            if asked == before && !guard.waits.load(Ordering::Relaxed) {
                guard.answer().take();
                return unread();
            }
            before = asked;
        }
    }
}

impl Source {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self {
            Self::Client(body) | Self::Backend(body, _) => {
                Pin::new(body).poll_frame(context).map(|frame| frame.map(|frame| frame.map_err(Into::into)))
            }
            Self::Guarded(guard, _) => {
                guard.asked.fetch_add(1, Ordering::Relaxed);
                match guard.answer().as_mut() {
                    Some(answer) => {
                        let frame = answer.poll(context);
                        guard.waits.store(frame.is_pending(), Ordering::Relaxed);
                        frame
                    }
                    None => Poll::Ready(Some(Err(Cut::Stalled.into()))),
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Client(body) | Self::Backend(body, _) => body.is_end_stream(),
            Self::Guarded(guard, _) => guard.answer().as_ref().is_some_and(Answer::is_end_stream),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Client(body) | Self::Backend(body, _) => body.size_hint(),
            Self::Guarded(guard, _) => guard.answer().as_ref().map(Answer::size_hint).unwrap_or_default(),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Self::Guarded(_, watching) = self {
            watching.abort();
        }
    }
}

impl Watched {
    fn new(source: Source, patience: Duration, upload: Arc<Upload>) -> Self {
        Self {
            source,
            patience,
            rest: None,
            waiting: None,
            waited: Duration::ZERO,
            come: 0,
            least: 0,
            left: u64::MAX,
            upload,
            withheld: None,
            seen: 0,
        }
    }

    fn is_upload(&self) -> bool {
        self.withheld.is_some()
    }

    /// A client's, of which trailers with these names go no further; `calls`: it is messages of a call, which may be rare.
    pub(super) fn upload(
        inner: Incoming,
        patience: Duration,
        calls: bool,
        withheld: Vec<HeaderName>,
        upload: Arc<Upload>,
    ) -> Self {
        let body = Self::new(Source::Client(inner), patience, upload);
        let least = if calls { 0 } else { LEAST };
        Self { left: BODY_LIMIT, least, withheld: Some(withheld), ..body }
    }

    /// A backend's, in answer to an upload; `unread`: to a client by HTTP/2, and this is called if it does not take it.
    pub(super) fn download(
        inner: Incoming,
        patience: Duration,
        hold: Hold,
        unread: Option<impl FnOnce() + Send + 'static>,
        upload: Arc<Upload>,
    ) -> Self {
        upload.answered.store(true, Ordering::Relaxed);
        let source = if let Some(unread) = unread.filter(|_| !inner.is_end_stream()) {
            let guard = Arc::new(Guard {
                answer: Mutex::new(Some(Answer { body: inner, hold, rest: Bytes::new() })),
                asked: AtomicU64::default(),
                waits: AtomicBool::default(),
            });
            let watching = tokio::spawn(Guard::watch(Arc::downgrade(&guard), patience, unread));
            Source::Guarded(guard, watching.abort_handle())
        } else {
            Source::Backend(inner, hold)
        };
        Self::new(source, patience, upload)
    }

    fn rest_anew(&mut self, now: Instant) {
        let until = now + self.patience.saturating_sub(self.waited);
        match &mut self.rest {
            Some(rest) => rest.as_mut().reset(until),
            None => self.rest = Some(Box::pin(tokio::time::sleep_until(until))),
        }
    }

    /// So many bytes have come: the rest is over, or goes on with the next wait.
    fn has_come(&mut self, bytes: u64) {
        self.come += bytes;
        let waited = self.waiting.take().map_or(Duration::ZERO, |since| since.elapsed());
        if self.come >= self.least {
            (self.come, self.waited) = (0, Duration::ZERO);
        } else if self.waited + waited < self.patience {
            self.waited += waited;
        }
        // Else it had come in time, and it was the desk that stood still.
    }

    fn fault(&self, fault: u8) {
        if self.is_upload() {
            self.upload.awaited.store(false, Ordering::Relaxed);
            self.upload.fault.store(fault, Ordering::Relaxed);
        }
    }

    /// Whether the exchange goes on though nothing has come in this direction: of a call that streams both ways one side
    /// may be silent for long.
    fn goes_on(&mut self) -> bool {
        if self.is_upload() {
            // Once there is an answer, its clock counts for both.
            return self.upload.answered.load(Ordering::Relaxed);
        }
        let now = self.upload.progress();
        std::mem::replace(&mut self.seen, now) != now
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = self.source.poll(context);
        if self.is_upload() {
            self.upload.awaited.store(polled.is_pending(), Ordering::Relaxed);
        }
        let Poll::Ready(frame) = polled else {
            if self.waiting.is_none() {
                let now = Instant::now();
                self.waiting = Some(now);
                self.seen = self.upload.progress();
                self.rest_anew(now);
            }
            loop {
                if let Some(rest) = &mut self.rest {
                    ready!(rest.as_mut().poll(context));
                }
                if !self.goes_on() {
                    break;
                }
                let now = Instant::now();
                (self.waiting, self.waited) = (Some(now), Duration::ZERO);
                self.rest_anew(now);
            }
            self.fault(STALLED);
            return Poll::Ready(Some(Err(Cut::Stalled.into())));
        };
        let length = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
        let length = length.map_or(0, |data| data.len() as u64);
        self.has_come(length);
        let Some(frame) = frame else { return Poll::Ready(None) };
        if self.is_upload() {
            self.upload.progress.fetch_add(1, Ordering::Relaxed);
        }
        match frame {
            Ok(mut frame) => {
                if let (Some(withheld), Some(trailers)) = (&self.withheld, frame.trailers_mut()) {
                    headers::trailers(trailers, withheld);
                }
                match self.left.checked_sub(length) {
                    Some(left) => self.left = left,
                    None => {
                        self.fault(TOO_LARGE);
                        return Poll::Ready(Some(Err(Cut::TooLarge.into())));
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Err(error) => {
                self.fault(BROKEN);
                Poll::Ready(Some(Err(error)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.source.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.source.size_hint()
    }
}

/// A body of which somebody is told how long it was, and whether it came to an end of its own, be it by breaking
/// off, or was given up by who should have got it.
pub(super) fn counted(body: Body, told: impl FnOnce(u64, bool) + Send + Unpin + 'static) -> Body {
    Counted { body, bytes: 0, has_ended: false, told: Some(told) }.boxed_unsync()
}

struct Counted<F: FnOnce(u64, bool)> {
    body: Body,
    bytes: u64,
    has_ended: bool,
    told: Option<F>,
}

impl<F: FnOnce(u64, bool) + Unpin> HttpBody for Counted<F> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => self.bytes += frame.data_ref().map_or(0, |data| data.len() as u64),
            Some(Err(_)) | None => self.has_ended = true,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<F: FnOnce(u64, bool)> Drop for Counted<F> {
    fn drop(&mut self) {
        let has_ended = self.has_ended || self.body.is_end_stream();
        if let Some(told) = self.told.take() {
            told(self.bytes, has_ended);
        }
    }
}
