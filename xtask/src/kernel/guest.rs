//! Inside the machine: what the kernel starts, before which there is nothing.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sys::reboot::{RebootMode, reboot},
};

/// Directory of the tests.
pub const TESTS: &str = "tests";
/// How the line begins that tells the kernel's version.
pub const RUNNING: &str = "running on ";
/// How the line begins that tells a test's end: its name, and `well` or `badly`.
pub const ENDED: &str = "ended: ";

/// Runs all tests, says how it went and switches the machine off.
///
/// # Errors
///
/// This is not a machine's first process, or it cannot be switched off.
pub fn run() -> Result<()> {
    anyhow::ensure!(std::process::id() == 1, "this is for the machine of `cargo xtask kernel`");
    if let Err(error) = tests() {
        println!("{error:#}");
    }
    reboot(RebootMode::RB_AUTOBOOT).context("the machine cannot be switched off")?;
    Ok(())
}

fn tests() -> Result<()> {
    for (kind, place) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/run")]
    {
        fs::create_dir_all(place)?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>).context(place)?;
    }
    println!("{RUNNING}{}", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim());
    for entry in fs::read_dir(Path::new("/").join(TESTS))? {
        let entry = entry?;
        // What cannot be tested here is a failure, and numbers that tests print are wanted.
        let status = Command::new(entry.path())
            .args(["--nocapture", "--test-threads", "1"])
            .env("CI", "true")
            .status()?;
        let outcome = if status.success() { "well" } else { "badly" };
        println!("{ENDED}{} {outcome}", entry.file_name().to_string_lossy());
    }
    Ok(())
}
