//! Notices that the document's file, or one that it names, may have changed.
//!
//! Directories are watched, not files: editors and configuration tools put a new file in its place.
//! What is noticed is only a reason to read: whether the text has changed is seen by comparing it.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tracing::warn;

/// Some editors empty a file before they write it: how long it must be quiet before it is read.
pub const QUIET: Duration = Duration::from_millis(50);

/// It is read after so long all the same: somebody may be writing a log beside it all the time.
const LONGEST: Duration = Duration::from_millis(500);

/// Watches until dropped.
pub struct DocumentWatch {
    /// Kept for its thread.
    _watcher: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
    changes: mpsc::Receiver<()>,
}

impl DocumentWatch {
    /// Watches directories. Where that is not possible, a warning is logged and nothing is
    /// ever noticed; SIGHUP and `lb reload` still work.
    pub fn new(directories: &BTreeSet<PathBuf>) -> Self {
        // One message says as much as many.
        let (sender, mut noticed_changes) = mpsc::channel(1);
        let (settled, changes) = mpsc::channel(1);
        let noticed = move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access() || is_close_after_write(event.kind)) {
                _ = sender.try_send(());
            }
        };
        let mut watcher = match notify::recommended_watcher(noticed) {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                warn!("cannot watch files: {error}; after an edit, use `lb reload`");
                None
            }
        };
        for directory in directories {
            let watched =
                watcher.as_mut().map(|watcher| watcher.watch(directory, RecursiveMode::NonRecursive));
            if let Some(Err(error)) = watched {
                warn!("cannot watch {}: {error}; after an edit, use `lb reload`", directory.display());
            }
        }
        // A task of its own: who waits for `changed` may stop waiting at any moment, and no change is lost.
        tokio::spawn(async move {
            while noticed_changes.recv().await.is_some() {
                let quiet = async {
                    while let Ok(Some(())) = tokio::time::timeout(QUIET, noticed_changes.recv()).await {}
                };
                _ = tokio::time::timeout(LONGEST, quiet).await;
                _ = settled.try_send(());
            }
        });
        Self { _watcher: watcher, directories: directories.clone(), changes }
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

fn is_close_after_write(kind: notify::EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode, EventKind};
    matches!(kind, EventKind::Access(AccessKind::Close(AccessMode::Write)))
}

#[cfg(test)]
mod tests {
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
