//! Bodies on their way: each may rest only for so long, a client's has a largest size, and at the end of an
//! answer somebody wants to know how long it was.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::connections::Share;
use crate::proxy::{pools::Ticket, request::BODY_LIMIT, voice::Trouble};

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
    fault: AtomicU8,
}

const STALLED: u8 = 1;
const TOO_LARGE: u8 = 2;
const BROKEN: u8 = 3;

impl Upload {
    /// How many parts have come.
    pub(super) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
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
    #[error("nothing of the body came for too long")]
    Stalled,
    #[error("the body is too large")]
    TooLarge,
}

/// A body that may rest only for so long.
pub(super) struct Watched {
    inner: Incoming,
    patience: Duration,
    rest: Pin<Box<Sleep>>,
    /// Whether somebody waits, since when `rest` counts.
    waiting: bool,
    left: u64,
    upload: Option<Arc<Upload>>,
    /// The backend is busy with it until it has ended.
    _hold: Option<Hold>,
}

impl Watched {
    fn new(inner: Incoming, patience: Duration, left: u64) -> Self {
        let rest = Box::pin(tokio::time::sleep(patience));
        Self { inner, patience, rest, waiting: false, left, upload: None, _hold: None }
    }

    /// A client's.
    pub(super) fn upload(inner: Incoming, patience: Duration, upload: Arc<Upload>) -> Self {
        Self { upload: Some(upload), ..Self::new(inner, patience, BODY_LIMIT) }
    }

    /// A backend's.
    pub(super) fn download(inner: Incoming, patience: Duration, hold: Hold) -> Self {
        Self { _hold: Some(hold), ..Self::new(inner, patience, u64::MAX) }
    }

    fn fault(&self, fault: u8) {
        if let Some(upload) = &self.upload {
            upload.fault.store(fault, Ordering::Relaxed);
        }
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) else {
            if !self.waiting {
                self.waiting = true;
                let until = Instant::now() + self.patience;
                self.rest.as_mut().reset(until);
            }
            ready!(self.rest.as_mut().poll(context));
            self.fault(STALLED);
            return Poll::Ready(Some(Err(Cut::Stalled.into())));
        };
        self.waiting = false;
        let Some(frame) = frame else { return Poll::Ready(None) };
        if let Some(upload) = &self.upload {
            upload.progress.fetch_add(1, Ordering::Relaxed);
        }
        match frame {
            Ok(frame) => {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
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
                Poll::Ready(Some(Err(error.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
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
