//! What one does with Lobby's source, as a library: the lab is used by the integration tests too.
//!
//! - [`toolchain`] finds the compiler and the linker for BPF; [`setup`] gets what is missing,
//! - [`check`] runs the tests, and everything that must hold before a change goes in,
//! - [`lab`] makes networks out of namespaces, for tests, for the demo and for people,
//! - [`demo`] tells the story of Lobby's stages on real servers,
//! - [`kernel`] runs tests on the oldest kernel that Lobby is promised for,
//! - [`bench`](mod@bench) measures,
//! - [`fuzz`] looks for bytes that break a rule.

pub mod bench;
pub mod check;
pub mod demo;
pub mod fuzz;
pub mod kernel;
pub mod lab;
pub mod root;
pub mod setup;
pub mod toolchain;

use std::path::PathBuf;

/// The directory of the workspace.
pub fn workspace() -> PathBuf {
    let mut directory = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    directory.pop();
    directory
}

/// Where the workspace's builds go: `CARGO_TARGET_DIR`, else `target`.
pub fn target_directory() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    workspace().join(named)
}

/// The `cargo` that runs this, else the one on `PATH`.
pub fn cargo() -> std::process::Command {
    let mut command = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}
