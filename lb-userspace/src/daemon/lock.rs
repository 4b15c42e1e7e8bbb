//! One daemon at a time: for a run directory, for an interface, and for pinned tables.
//!
//! All three end with the process, however it ends, and only the first is a file, which goes with the run
//! directory. Two daemons with different run directories would still fight over an interface: that lock
//! is a name among the abstract sockets, which belong to a network namespace as interfaces do. For
//! pinned tables the directory that they are pinned in is locked itself.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};

/// Held by a daemon while it runs.
#[derive(Debug)]
pub struct Lock {
    _held: Held,
    /// A file to be removed at the end.
    path: Option<PathBuf>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "kept only to be dropped")]
enum Held {
    File(Flock<File>),
    Name(UnixListener),
}

/// The lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon has it.
    #[error("another lb daemon{} has {what}; stop it first, or talk to it: `lb status`", .pid.as_ref().map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Taken {
        /// What is locked.
        what: String,
        /// Its process, where that can be known.
        pid: Option<String>,
    },
    /// It cannot be locked.
    #[error("cannot lock {what}: {source}")]
    Failed {
        /// What.
        what: String,
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
        let what = || format!("the run directory {}", run_dir.display());
        let path = run_dir.join("lock");
        loop {
            let open = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path);
            let file = open.map_err(|source| LockError::Failed { what: what(), source })?;
            let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((mut file, Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    _ = file.read_to_string(&mut pid);
                    let pid = Some(pid.trim().to_owned()).filter(|pid| !pid.is_empty());
                    return Err(LockError::Taken { what: what(), pid });
                }
                Err((_, error)) => return Err(LockError::Failed { what: what(), source: error.into() }),
            };
            // Its owner may have removed the file between our opening and our locking it.
            let ours = file.metadata().map(|ours| ours.ino()).ok();
            if ours.is_none() || std::fs::metadata(&path).map(|now| now.ino()).ok() != ours {
                continue;
            }
            let written = file
                .set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            written.map_err(|source| LockError::Failed { what: what(), source })?;
            return Ok(Self { _held: Held::File(file), path: Some(path) });
        }
    }

    /// Locks an interface of this process's network namespace.
    ///
    /// # Errors
    /// When another process has it.
    pub fn interface(name: &str, index: u32) -> Result<Self, LockError> {
        let what = format!("the interface {name}");
        let named = SocketAddr::from_abstract_name(format!("lobby/interface/{index}"));
        match named.map(|address| (UnixListener::bind_addr(&address), address)) {
            Ok((Ok(listener), _)) => Ok(Self { _held: Held::Name(listener), path: None }),
            Ok((Err(error), address)) if error.kind() == io::ErrorKind::AddrInUse => {
                let pid = owner(&address).map(|pid| pid.to_string());
                Err(LockError::Taken { what, pid })
            }
            Ok((Err(source), _)) | Err(source) => Err(LockError::Failed { what, source }),
        }
    }

    /// Locks what is pinned in a BPF file system, which must be there.
    ///
    /// # Errors
    /// When another process has it, or there is no such directory.
    pub fn pins(bpffs: &Path) -> Result<Self, LockError> {
        let what = || format!("the tables pinned below {}", bpffs.display());
        let directory = File::open(bpffs).map_err(|source| LockError::Failed { what: what(), source })?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Self { _held: Held::File(held), path: None }),
            Err((_, Errno::EWOULDBLOCK)) => Err(LockError::Taken { what: what(), pid: None }),
            Err((_, error)) => Err(LockError::Failed { what: what(), source: error.into() }),
        }
    }

    /// Whether a process has what [`Lock::pins`] locks, as far as can be seen without taking it, which would be in the way of
    /// a daemon that starts at this moment.
    pub fn is_pins_taken(bpffs: &Path) -> bool {
        let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
        std::fs::metadata(bpffs).is_ok_and(|directory| has_lock(&locks, directory.dev(), directory.ino()))
    }
}

/// Whether a file is locked by flock(2), by what the kernel lists (proc_locks(5)).
fn has_lock(locks: &str, device: u64, inode: u64) -> bool {
    let device = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let file = format!("{:02x}:{:02x}:{inode}", device.0, device.1);
    let is_of = |line: &str| {
        let mut words = line.split_whitespace();
        words.any(|word| word == "FLOCK") && words.any(|word| word == file)
    };
    locks.lines().any(is_of)
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is still held, so that nobody's fresh file is removed. If it cannot be removed a file
        // stays, which hinders nobody.
        if let Some(path) = &self.path {
            _ = std::fs::remove_file(path);
        }
    }
}

/// The process that listens on a socket.
fn owner(address: &SocketAddr) -> Option<i32> {
    let stream = UnixStream::connect_addr(address).ok()?;
    getsockopt(&stream, PeerCredentials).ok().map(|peer| peer.pid())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(outcome: Result<Lock, LockError>) -> String {
        outcome.unwrap_err().to_string()
    }

    #[test]
    fn the_second_is_refused_and_told_who_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let lock = Lock::run_dir(directory.path()).unwrap();
        let error = refused(Lock::run_dir(directory.path()));
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains("lb status"), "{error}");
        drop(lock);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        Lock::run_dir(directory.path()).unwrap();
    }

    #[test]
    fn an_interface_is_locked_without_a_file() {
        // No interface has such a number; the lock does not mind.
        let number = u32::MAX - std::process::id();
        let lock = Lock::interface("eth0", number).unwrap();
        let error = refused(Lock::interface("eth0", number));
        assert!(
            error.contains(&format!("(process {}) has the interface eth0", std::process::id())),
            "{error}"
        );
        Lock::interface("eth1", number - 1).unwrap();
        drop(lock);
        Lock::interface("eth0", number).unwrap();
    }

    #[test]
    fn pins_are_locked_without_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let lock = Lock::pins(directory.path()).unwrap();
        assert!(refused(Lock::pins(directory.path())).contains("tables pinned below"));
        assert!(Lock::is_pins_taken(directory.path()));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        drop(lock);
        assert!(!Lock::is_pins_taken(directory.path()));
        Lock::pins(directory.path()).unwrap();
    }
}
