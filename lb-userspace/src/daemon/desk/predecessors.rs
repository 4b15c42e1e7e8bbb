//! Desks that other daemons have started: found, asked for their sockets, and told to end.
//!
//! A daemon may die at any moment of a hand-over, and somebody is to serve all the same, whom the next one finds. So:
//!
//! - A desk stays by itself once it serves, and tells those before it to end in the same breath (`ToDesk::Stay`, which comes before
//!   its orders); no daemon is needed for that any more. One whose daemon dies earlier has not heard all of it: it has served nobody
//!   and ends, and those before have been told nothing.
//! - It is called under a name of its own from its birth, and under [`SOCKET`] when its daemon hears that it serves. The next daemon
//!   calls at all names. Who answers stays, since before that a desk takes no calls: it is the last, and gets the name [`SOCKET`]
//!   before anything else could take its own.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tracing::{info, warn};

use super::{PATIENCE, SOCKET};
use crate::proxy::orders::{self, FromDesk, ToDesk};

type Sockets = BTreeMap<SocketAddr, Arc<TcpListener>>;

/// Ways to desks that run, and what they listen on.
pub(super) struct Predecessors {
    streams: Vec<UnixStream>,
    pub(super) sockets: Sockets,
}

/// The name of a daemon's desk until it serves.
pub(super) fn fresh(run_dir: &Path) -> PathBuf {
    run_dir.join(format!(".{SOCKET}.{}", std::process::id()))
}

/// Such names, of whatever daemons.
fn all_fresh(run_dir: &Path) -> Vec<PathBuf> {
    let prefix = format!(".{SOCKET}.");
    let entries = fs::read_dir(run_dir).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    named.map(|entry| entry.path()).collect()
}

impl Predecessors {
    /// Asks for their sockets; `None`: there are none.
    pub(super) fn call(run_dir: &Path) -> Option<Self> {
        let mut found = Self { streams: Vec::new(), sockets: Sockets::new() };
        let mut silent = None;
        let mut call = |path: &Path| match UnixStream::connect(path).and_then(|stream| found.ask(stream)) {
            Ok(()) => true,
            Err(error) => {
                match error.kind() {
                    ErrorKind::ConnectionRefused => _ = fs::remove_file(path),
                    ErrorKind::NotFound => {}
                    _ => silent = Some(error),
                }
                false
            }
        };
        let socket = run_dir.join(SOCKET);
        call(&socket);
        for path in all_fresh(run_dir).into_iter().filter(|path| call(path)) {
            if let Err(error) = fs::rename(&path, &socket) {
                warn!("a desk keeps the name {}: {error}", path.display());
            }
        }
        if found.streams.is_empty() {
            if let Some(error) = silent {
                warn!("a desk is there and does not hand over its sockets: {error}");
            }
            return None;
        }
        info!(sockets = found.sockets.len(), "taking over from a desk that runs");
        Some(found)
    }

    fn ask(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        orders::send(&stream, &ToDesk::HandOver, &[])?;
        loop {
            let (said, fds): (FromDesk, Vec<OwnedFd>) =
                orders::receive(&stream)?.ok_or(ErrorKind::UnexpectedEof)?;
            let FromDesk::Sockets { addresses, more } = said else { continue };
            let these = addresses.into_iter().zip(fds);
            self.sockets.extend(these.map(|(at, socket)| (at, Arc::new(TcpListener::from(socket)))));
            if !more {
                self.streams.push(stream);
                return Ok(());
            }
        }
    }

    /// The ways to them, for the desk that comes after.
    pub(super) fn ways(&self) -> io::Result<Vec<OwnedFd>> {
        self.streams.iter().map(|stream| Ok(stream.try_clone()?.into())).collect()
    }

    /// Lets them end.
    pub(super) fn drain(&self, within: Duration, at_once: bool) {
        for stream in &self.streams {
            if let Err(error) = orders::send(stream, &ToDesk::drain(within, at_once), &[]) {
                warn!("the desk before does not hear that it is to end: {error}");
            }
        }
    }

    /// Waits until they have ended: their ends of the sockets are closed then.
    pub(super) fn wait(&self, within: Duration) {
        for stream in &self.streams {
            _ = stream.set_read_timeout(Some(within));
            while let Ok(Some(_)) = orders::receive::<FromDesk>(stream) {}
        }
    }
}
