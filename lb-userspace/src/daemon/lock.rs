//! One daemon at a time: for a run directory, for an interface, and for pinned tables.
//!
//! The locks are `flock`s on files, so they end with the process however it ends. Those of interfaces
//! and of pinned tables are in a directory that all run directories share, since two daemons with
//! different run directories would fight over them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

/// Directory of the locks that all daemons of a host share.
const SHARED: &str = "/run/lock/lobby";

/// Held by a daemon while it runs.
#[derive(Debug)]
pub struct Lock {
    /// Held until dropped.
    _file: Flock<File>,
    path: PathBuf,
}

/// The lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon has it.
    #[error("another lb daemon{} has {what}; stop it first, or talk to it: `lb status`", .pid.as_ref().map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Taken {
        /// What is locked.
        what: String,
        /// Its process, as it says itself.
        pid: Option<String>,
    },
    /// The file cannot be used.
    #[error("cannot lock {}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Lock {
    /// Locks a run directory.
    ///
    /// # Errors
    /// When another process has it, or the file cannot be made.
    pub fn run_dir(run_dir: &Path) -> Result<Self, LockError> {
        Self::take(run_dir.join("lock"), format!("the run directory {}", run_dir.display()))
    }

    /// Locks an interface of this process's network namespace.
    ///
    /// # Errors
    /// When another process has it, or the file cannot be made.
    pub fn interface(name: &str, index: u32) -> Result<Self, LockError> {
        let own = Path::new("/proc/self/ns/net");
        let namespace =
            std::fs::metadata(own).map_err(|source| LockError::File { path: own.into(), source })?.ino();
        Self::shared(&format!("interface-{namespace}-{index}"), format!("the interface {name}"))
    }

    /// Locks what is pinned in a BPF file system, which must be there.
    ///
    /// # Errors
    /// When another process has it, or the file cannot be made.
    pub fn pins(bpffs: &Path) -> Result<Self, LockError> {
        let found =
            std::fs::metadata(bpffs).map_err(|source| LockError::File { path: bpffs.into(), source })?;
        Self::shared(
            &format!("pins-{}-{}", found.dev(), found.ino()),
            format!("the tables pinned below {}", bpffs.display()),
        )
    }

    fn shared(name: &str, what: String) -> Result<Self, LockError> {
        let directory = Path::new(SHARED);
        std::fs::create_dir_all(directory)
            .map_err(|source| LockError::File { path: directory.into(), source })?;
        Self::take(directory.join(name), what)
    }

    fn take(path: PathBuf, what: String) -> Result<Self, LockError> {
        loop {
            let open = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path);
            let file = open.map_err(|source| LockError::File { path: path.clone(), source })?;
            let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    _ = file.read_to_string(&mut pid);
                    let pid = Some(pid.trim().to_owned()).filter(|pid| !pid.is_empty());
                    return Err(LockError::Taken { what, pid });
                }
                Err((_, error)) => return Err(LockError::File { path, source: error.into() }),
            };
            // Its owner may have removed the file between our opening and our locking it.
            let same = std::fs::metadata(&path)
                .is_ok_and(|now| file.metadata().is_ok_and(|ours| now.ino() == ours.ino()));
            if !same {
                continue;
            }
            let written = file
                .set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            return match written {
                Ok(()) => Ok(Self { _file: file, path }),
                Err(source) => Err(LockError::File { path, source }),
            };
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still held, so that nobody's fresh file is removed. If it cannot be removed a file
        // stays, which hinders nobody.
        _ = std::fs::remove_file(&self.path);
        // The shared directory goes with its last file; a run directory is its owner's to remove.
        if let Some(directory) = self.path.parent().filter(|directory| *directory == Path::new(SHARED)) {
            _ = std::fs::remove_dir(directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_refused_and_told_who_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let lock = Lock::run_dir(directory.path()).unwrap();
        let error = Lock::run_dir(directory.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains("lb status"), "{error}");
        drop(lock);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        Lock::run_dir(directory.path()).unwrap();
    }
}
