//! The file system that pinned objects live in.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// The BPF file system cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount a BPF file system on {}: {source}; mount it as root: `mount -t bpf bpf {}`", .path.display(), .path.display())]
pub struct BpffsError {
    path: PathBuf,
    source: io::Error,
}

/// Makes sure that a BPF file system is there; says whether it had to be mounted.
///
/// # Errors
/// When there is none and it cannot be mounted.
pub fn ensure(path: &Path) -> Result<bool, BpffsError> {
    let failed = |source: io::Error| BpffsError { path: path.to_owned(), source };
    if is_bpffs(path) {
        return Ok(false);
    }
    std::fs::create_dir_all(path).map_err(failed)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|error| failed(error.into()))?;
    Ok(true)
}

/// Whether the path is in a BPF file system.
pub fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}
