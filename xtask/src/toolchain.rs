//! Where the compiler and the linker for BPF are.
//!
//! Rust's `core` is not shipped ready-made for BPF, so it is built from its sources: what is needed is
//! a `rustc` of at least this workspace's version that has them, and `bpf-linker`. They are looked for
//! in the places where people have them, in this order:
//!
//! 1. what the environment variable `LOBBY_BPF_RUSTC` names,
//! 2. the `rustc` that builds everything else,
//! 3. rustup's other toolchains, `nightly` first,
//! 4. `/usr/bin/rustc`, the distribution's.
//!
//! This file needs the standard library alone: `lb-userspace/build.rs` includes it, so that the
//! build and `cargo xtask setup` cannot disagree about what is there.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

/// Names the compiler to be used, against the usual search.
pub const RUSTC_VARIABLE: &str = "LOBBY_BPF_RUSTC";

/// What compiles for BPF.
pub struct Compiler {
    /// The compiler proper, never rustup's proxy.
    pub rustc: PathBuf,
    /// The `cargo` that belongs to it, where it has one.
    pub cargo: Option<PathBuf>,
}

/// What is not there, and how to get it: one sentence.
#[derive(Debug)]
pub struct Missing(String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// Finds a compiler that has the sources of `core`.
///
/// # Errors
///
/// There is none, or the one that [`RUSTC_VARIABLE`] names will not do.
pub fn compiler() -> Result<Compiler, Missing> {
    if let Some(named) = env::var_os(RUSTC_VARIABLE) {
        return usable(Path::new(&named)).ok_or_else(|| {
            Missing(format!(
                "{RUSTC_VARIABLE} names {}, which is no rustc {OLDEST} or later with the sources of core \
                 beside it; unset it, or name another",
                named.display()
            ))
        });
    }
    candidates().iter().find_map(|rustc| usable(rustc)).ok_or_else(|| {
        Missing(format!(
            "no rustc {OLDEST} or later with the sources of core, which BPF is compiled from, was found; \
             `cargo xtask setup` gets one (with rustup by hand: rustup component add rust-src)"
        ))
    })
}

/// Finds `bpf-linker`.
///
/// # Errors
///
/// It is neither on `PATH` nor where `cargo install` puts things.
pub fn linker() -> Result<PathBuf, Missing> {
    on_path("bpf-linker").or_else(|| existing(cargo_home()?.join("bin/bpf-linker"))).ok_or_else(|| {
        Missing("bpf-linker, which links BPF programs, was not found; `cargo xtask setup` gets it".into())
    })
}

/// Finds a program on `PATH`, and in the system's directories that an ordinary user's `PATH` lacks.
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).find_map(|directory| existing(directory.join(program)))
}

/// Oldest compiler that will do: the workspace's `rust-version`.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");

fn candidates() -> Vec<PathBuf> {
    let mut found = vec![env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from)];
    let toolchains =
        home("RUSTUP_HOME", ".rustup").and_then(|rustup| rustup.join("toolchains").read_dir().ok());
    let mut others: Vec<PathBuf> =
        toolchains.into_iter().flatten().flatten().map(|entry| entry.path().join("bin/rustc")).collect();
    // Newest last in the alphabet, and `nightly` most likely to have the sources.
    others
        .sort_by_key(|path| (!path.to_string_lossy().contains("/nightly-"), std::cmp::Reverse(path.clone())));
    found.extend(others);
    found.push(PathBuf::from("/usr/bin/rustc"));
    found
}

/// The compiler at `rustc`, if it runs, is new enough and has the sources of `core`.
fn usable(rustc: &Path) -> Option<Compiler> {
    let sysroot = PathBuf::from(ask(rustc, &["--print", "sysroot"])?.trim());
    existing(sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml"))?;
    let version = ask(rustc, &["--version"])?;
    (release(version.split_whitespace().nth(1)?)? >= release(OLDEST)?).then_some(())?;
    Some(Compiler {
        rustc: existing(sysroot.join("bin/rustc")).unwrap_or_else(|| rustc.to_owned()),
        cargo: existing(sysroot.join("bin/cargo")),
    })
}

/// Major and minor number of a version like `1.97.0-nightly`.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(['.', '-']).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// What a program prints, if it runs and succeeds.
fn ask(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn cargo_home() -> Option<PathBuf> {
    home("CARGO_HOME", ".cargo")
}

fn home(variable: &str, below_home: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(below_home)))
}

fn existing(path: PathBuf) -> Option<PathBuf> {
    path.is_file().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::release;

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(release("1.97.0-nightly"), Some((1, 97)));
        assert_eq!(release("1.95"), Some((1, 95)));
        assert!(release("1.100.0") > release("1.95.2"));
        assert_eq!(release("unknown"), None);
    }
}
