//! Verdicts as log lines, in a build with the feature `trace`: what its program says of each packet comes out
//! with the daemon's own lines.
//!
//! The ring between program and daemon is not pinned. It belongs to one loaded program, and a daemon that
//! takes over loads its own and puts it in the place of the one before. So any build takes over from any
//! other: from then on verdicts are logged if the new one has the feature. A program whose daemon is gone
//! finds its ring full, says nothing more, and goes on forwarding.

use std::{
    io::{self, PipeWriter},
    os::fd::AsFd as _,
    thread::JoinHandle,
};

use aya::Ebpf;
use aya_log::EbpfLogger;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tracing::warn;

use super::OpenError;

/// A thread that reads the program's words and logs them, until this is dropped.
///
/// A thread and not a task: programs are loaded where there is no runtime too, and a flood of lines is to
/// take nothing from health checks but processor time.
#[derive(Debug)]
pub(super) struct Trace {
    /// Closed, it tells the thread to end.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Trace {
    /// Begins to read, once the program is loaded.
    pub(super) fn start(ebpf: &mut Ebpf) -> Result<Self, OpenError> {
        let mut words = EbpfLogger::init(ebpf).map_err(OpenError::load)?;
        let (stopped, stop) = io::pipe().map_err(OpenError::load)?;
        let read = move || {
            loop {
                let mut sources =
                    [words.as_fd(), stopped.as_fd()].map(|source| PollFd::new(source, PollFlags::POLLIN));
                let woken = poll(&mut sources, PollTimeout::NONE);
                let end = sources[1].any().unwrap_or(true);
                words.flush();
                match woken {
                    Ok(_) if end => return,
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return warn!("verdicts are not logged any more: {error}"),
                }
            }
        };
        let thread = std::thread::Builder::new().name("trace".into()).spawn(read);
        Ok(Self { stop: Some(stop), thread: Some(thread.map_err(OpenError::load)?) })
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so itself.
            _ = thread.join();
        }
    }
}
