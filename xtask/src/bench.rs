//! Measures: the packet path in the kernel, and the daemon's own work.

use anyhow::{Result, bail};

use crate::{root, setup};

/// Builds and runs the packet benchmark with these arguments; it prints a table and writes
/// `target/bench/report.json`.
///
/// # Errors
///
/// Something could not be had, or the benchmark failed.
pub fn packets(arguments: &[String]) -> Result<()> {
    setup::build()?;
    // What is measured runs in the kernel, and is always built for release.
    let build = crate::cargo().args(["build", "--package", "benches", "--bin", "packets"]).status()?;
    if !build.success() {
        bail!("the benchmark did not build");
    }
    let program = crate::target_directory().join("debug/packets");
    let status = root::command("to load XDP programs", &program.to_string_lossy())?
        .current_dir(crate::workspace())
        .args(arguments)
        .status()?;
    if !status.success() {
        bail!("the benchmark failed ({status})");
    }
    Ok(())
}

/// Runs the criterion benches of rings, plans and documents, and measures how soon a probe takes effect,
/// which is written to `target/bench/probes.json`, and how long a start takes with a great document, which is
/// written to `target/bench/start.json`.
///
/// # Errors
///
/// Something could not be had, or a bench failed.
pub fn control() -> Result<()> {
    setup::build()?;
    if !crate::cargo().args(["bench", "--package", "benches", "--bench", "control"]).status()?.success() {
        bail!("the benches failed");
    }
    in_namespaces("probes", &[])?;
    in_namespaces("start", &[])
}

/// Measures the reception desk beside nginx and HAProxy, which is written to `target/bench/desk.json`.
///
/// # Errors
///
/// Something could not be had, or the benchmark failed.
pub fn desk(arguments: &[String]) -> Result<()> {
    setup::everything()?;
    setup::rivals()?;
    in_namespaces("desk", arguments)
}

/// Measures a database through Lobby's ports beside the same server without Lobby, which is written to
/// `target/bench/database.json`.
///
/// # Errors
///
/// Something could not be had, or the benchmark failed.
pub fn database(arguments: &[String]) -> Result<()> {
    setup::everything()?;
    in_namespaces("database", arguments)
}

/// Builds a benchmark that makes a lab for release, and `lb` beside it, and runs it.
fn in_namespaces(name: &str, arguments: &[String]) -> Result<()> {
    let release = ["build", "--release", "--package", "benches", "--package", "lb-userspace"];
    let release = release.into_iter().chain(["--bin", name, "--bin", "lb"]);
    if !crate::cargo().args(release).status()?.success() {
        bail!("the benchmark {name} did not build");
    }
    let program = crate::target_directory().join("release").join(name);
    let status = root::command("for network namespaces", &program.to_string_lossy())?
        .current_dir(crate::workspace())
        .args(arguments)
        .status()?;
    if !status.success() {
        bail!("the benchmark failed ({status})");
    }
    Ok(())
}
