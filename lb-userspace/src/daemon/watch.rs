//! Notices that the document's file, or one that it names, may have changed.
//!
//! Directories are watched, not files: editors and configuration tools put a new file in its place.
//! What is noticed is only a reason to read: whether the text has changed is seen by comparing it.

use std::{collections::BTreeSet, io, path::PathBuf, time::Duration};

use futures::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

/// Some editors empty a file before they write it: how long it must be quiet before it is read.
pub const QUIET: Duration = Duration::from_millis(50);

/// It is read after so long all the same: somebody may be writing a log beside it all the time.
const LONGEST: Duration = Duration::from_millis(500);

/// Watches until dropped.
pub struct DocumentWatch {
    _watching: Option<AbortOnDropHandle<()>>,
    directories: BTreeSet<PathBuf>,
    changes: mpsc::Receiver<()>,
}

impl DocumentWatch {
    /// Watches directories. Where that is not possible, a warning is logged and nothing is
    /// ever noticed; SIGHUP and `lb reload` still work.
    pub fn new(directories: &BTreeSet<PathBuf>) -> Self {
        // One message says as much as many.
        let (settled, changes) = mpsc::channel(1);
        // A task of its own: who waits for `changed` may stop waiting at any moment, and no change is lost.
        let watching = match notices(directories) {
            Ok(notices) => Some(AbortOnDropHandle::new(tokio::spawn(settle(notices, settled)))),
            Err(error) => {
                warn!("cannot watch files: {error}; after an edit, use `lb reload`");
                None
            }
        };
        Self { _watching: watching, directories: directories.clone(), changes }
    }

    /// What is watched.
    pub fn directories(&self) -> &BTreeSet<PathBuf> {
        &self.directories
    }

    /// Waits until something has changed and it has been quiet for [`QUIET`], or not for long. May be cancelled.
    pub async fn changed(&mut self) {
        if self.changes.recv().await.is_none() {
            // Nobody watches.
            std::future::pending::<()>().await;
        }
    }
}

/// What happens in directories that may change a file: somebody has written one, put one in its place or taken it away, or
/// says who may read it. Not that one is read, nor each piece that is written to it: a server's files or a log in
/// the same directory would keep the daemon busy.
fn notices(directories: &BTreeSet<PathBuf>) -> io::Result<EventStream<[u8; 1024]>> {
    let inotify = Inotify::init()?;
    let changes = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVE
        | WatchMask::ATTRIB
        | WatchMask::MOVE_SELF;
    for directory in directories {
        if let Err(error) = inotify.watches().add(directory, changes) {
            warn!("cannot watch {}: {error}; after an edit, use `lb reload`", directory.display());
        }
    }
    inotify.into_event_stream([0; 1024])
}

/// Passes on that something has been noticed once it has been quiet.
async fn settle(mut notices: EventStream<[u8; 1024]>, settled: mpsc::Sender<()>) {
    while let Some(Ok(_)) = notices.next().await {
        let quiet =
            async { while let Ok(Some(Ok(_))) = tokio::time::timeout(QUIET, notices.next()).await {} };
        _ = tokio::time::timeout(LONGEST, quiet).await;
        _ = settled.try_send(());
    }
    warn!("files are not watched any more; after an edit, use `lb reload`");
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::daemon::document::DocumentFile;

    /// More than the machine can be slow.
    const LONG: Duration = Duration::from_secs(20);

    async fn noticed(watch: &mut DocumentWatch) {
        tokio::time::timeout(LONG, watch.changed()).await.unwrap();
    }

    #[tokio::test]
    async fn edits_in_place_and_by_renaming_are_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "one").unwrap();
        let file = DocumentFile::new(&path);
        let mut watch = DocumentWatch::new(&file.directories());
        std::fs::write(&path, "two").unwrap();
        noticed(&mut watch).await;
        let other = directory.path().join("lb.toml~");
        std::fs::write(&other, "three").unwrap();
        std::fs::rename(&other, &path).unwrap();
        noticed(&mut watch).await;
        file.write("four").unwrap();
        noticed(&mut watch).await;
    }

    #[tokio::test]
    async fn a_change_is_not_lost_on_who_stops_waiting_in_between() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "one").unwrap();
        let mut watch = DocumentWatch::new(&DocumentFile::new(&path).directories());
        std::fs::write(&path, "two").unwrap();
        // Waits for less than the quiet time, again and again, as an event loop with much to do.
        let often = async { while tokio::time::timeout(QUIET / 5, watch.changed()).await.is_err() {} };
        tokio::time::timeout(LONG, often).await.unwrap();
    }

    #[tokio::test]
    async fn a_change_is_noticed_beside_a_log_that_is_never_quiet() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "one").unwrap();
        let mut watch = DocumentWatch::new(&DocumentFile::new(&path).directories());
        let log = directory.path().join("access.log");
        let writes = async {
            loop {
                std::fs::write(&log, "a line").unwrap();
                tokio::time::sleep(QUIET / 10).await;
            }
        };
        tokio::select! {
            () = noticed(&mut watch) => {}
            () = writes => {}
        }
    }

    #[tokio::test]
    async fn who_reads_files_or_goes_on_writing_a_log_beside_them_is_not_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lb.toml");
        std::fs::write(&path, "one").unwrap();
        let mut log = std::fs::File::create(directory.path().join("access.log")).unwrap();
        let mut watch = DocumentWatch::new(&DocumentFile::new(&path).directories());
        for _ in 0..10 {
            std::fs::read(&path).unwrap();
            log.write_all(b"a line").unwrap();
        }
        assert!(tokio::time::timeout(4 * QUIET, watch.changed()).await.is_err());
        drop(log);
        noticed(&mut watch).await;
    }

    #[tokio::test]
    async fn an_edit_behind_a_symbolic_link_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let target = elsewhere.path().join("lb.toml");
        std::fs::write(&target, "one").unwrap();
        let link = directory.path().join("lb.toml");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let mut watch = DocumentWatch::new(&DocumentFile::new(&link).directories());
        std::fs::write(&target, "two").unwrap();
        noticed(&mut watch).await;
    }
}
