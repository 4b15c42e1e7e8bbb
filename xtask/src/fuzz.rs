//! Looks for bytes for which something does not hold that must: coverage-guided fuzzing by libFuzzer.
//!
//! The marks that lead it are the compiler's own, which every toolchain has; so neither nightly nor cargo-fuzz is needed.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::setup;

/// What to look at, in `fuzz/targets`.
const TARGETS: [&str; 3] = ["path", "route", "headers"];

/// What of code is marked: each edge, with a counter and its place, and what is compared.
const MARKS: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// How to look.
#[derive(Args, Debug)]
pub struct FuzzOptions {
    /// At what; all, one after another, if none is named
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// For how long at each
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Builds the targets and runs them; what has been tried with gain is kept in `target/fuzz/corpus`, bytes that show a mistake
/// in `target/fuzz/found`.
///
/// # Errors
///
/// Something could not be had, or a mistake was found.
pub fn run(options: &FuzzOptions) -> Result<()> {
    setup::build()?;
    setup::fuzzer()?;
    let directory = crate::target_directory().join("fuzz");
    let host = host()?;
    let build = crate::cargo()
        // With a target named, what runs at build time is built without marks.
        .args(["build", "--release", "--bins", "--target", &host, "--manifest-path", "fuzz/Cargo.toml"])
        .arg("--target-dir")
        .arg(&directory)
        .env("CARGO_ENCODED_RUSTFLAGS", MARKS.join("\u{1f}"))
        .status()?;
    ensure!(build.success(), "the targets did not build");
    let found = directory.join("found");
    fs::create_dir_all(&found)?;
    for target in TARGETS.iter().filter(|target| options.target.as_ref().is_none_or(|only| only == *target)) {
        let corpus = directory.join("corpus").join(target);
        fs::create_dir_all(&corpus)?;
        println!("{target}, for {} s", options.seconds);
        let status = Command::new(directory.join(&host).join("release").join(target))
            .arg(format!("-max_total_time={}", options.seconds))
            .arg(format!("-artifact_prefix={}/{target}-", found.display()))
            .args(["-print_final_stats=1", "-max_len=512"])
            .arg(&corpus)
            .status()
            .with_context(|| format!("{target} cannot be run"))?;
        if !status.success() {
            bail!("{target}: something does not hold; the bytes are in {}", found.display());
        }
    }
    Ok(())
}

/// What is built for here.
fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("rustc cannot be run")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc does not say what it builds for")
}
