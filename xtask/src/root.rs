//! Root's rights: whether they are there, and asking for them through `sudo`, saying what for.

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};

use crate::toolchain;

/// Whether this process is root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command that will run as root: as it is if this process is, else through `sudo`.
///
/// # Errors
///
/// This process is not root, and there is no `sudo`.
pub fn command(what_for: &str, program: &str) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let Some(sudo) = toolchain::on_path("sudo") else {
        bail!("root's rights are needed {what_for}, and there is no sudo: run this as root");
    };
    eprintln!("root's rights are needed {what_for}: asking through sudo");
    let mut command = Command::new(sudo);
    command.arg(program);
    Ok(command)
}

/// Runs this program as root with other arguments, and the environment that it and cargo need.
///
/// # Errors
///
/// As [`command`], or it cannot be run.
pub fn myself(what_for: &str, arguments: &[OsString]) -> Result<ExitCode> {
    let mut sudo = command(what_for, "env")?;
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            let mut pair = OsString::from(format!("{name}="));
            pair.push(value);
            sudo.arg(pair);
        }
    }
    sudo.arg(path());
    let status = sudo.arg(std::env::current_exe()?).args(arguments).status()?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1).into())
}

/// Where programs are, as `PATH=…`, for what runs as root: sudo has a path of its own (`secure_path` in
/// sudoers(5)), without cargo's programs, and an ordinary user's is without the system's, such as nginx.
pub fn path() -> OsString {
    let mut path = OsString::from("PATH=");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

/// What sudo would take away besides, and is needed: where cargo is, and how to speak to the terminal.
pub const KEPT: [&str; 9] = [
    "HOME",
    "CARGO",
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "CI",
    "NO_COLOR",
    "TERM",
];
