//! The daemon: sole owner of the state.

pub mod bpffs;
pub mod checks;
pub mod document;
pub mod lock;
pub mod record;
pub mod watch;

use std::path::{Path, PathBuf};

/// How the daemon is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The document.
    pub config: PathBuf,
    /// Directory of its socket and state.
    pub run_dir: PathBuf,
    /// BPF file system to pin objects in.
    pub bpffs: PathBuf,
    /// Take everything down at the end.
    pub ephemeral: bool,
}

/// Runs the daemon until it is told to end.
///
/// # Errors
/// When it cannot start.
pub fn run(options: &Options) -> anyhow::Result<()> {
    anyhow::bail!("the daemon is not in this build; {} is left alone", options.config.display())
}

/// Takes a data plane down that no daemon looks after.
///
/// # Errors
/// When something of it cannot be removed.
pub async fn detach(run_dir: &Path, _bpffs: &Path) -> anyhow::Result<String> {
    anyhow::bail!("the daemon is not in this build; {} is left alone", run_dir.display())
}
