//! The tests, and everything that must hold before a change goes in.

mod counts;

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead as _, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{lab, root, setup, toolchain};
pub use counts::Counts;

/// How the tests are run.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct TestOptions {
    /// Do not ask for root's rights: what needs them is skipped, by name
    #[arg(long)]
    pub no_root: bool,
    /// Only tests whose name contains this
    pub filter: Option<String>,
}

/// Runs all tests of the workspace.
///
/// # Errors
///
/// Something could not be had, did not build, or a test failed.
pub fn test(options: &TestOptions) -> Result<Counts> {
    setup::everything()?;
    // Of the whole workspace, whose dependencies have the same features as in the tests: else they are built twice.
    step("build", crate::cargo().args(["build", "--workspace", "--bin", "lb"]))?;

    let skipped = skipped();
    // From the last run, if there was one.
    let _ = std::fs::remove_file(&skipped);
    let mut counts = Counts::default();
    if toolchain::on_path("cargo-nextest").is_some() {
        let mut command = tests(&["nextest", "run", "--workspace", "--no-fail-fast"], options, &skipped)?;
        // Nextest takes it for an error if the filter leaves nothing.
        command.arg("--no-tests=warn");
        counts += watched("test", &mut command)?;
        counts +=
            watched("test documentation", &mut tests(&["test", "--workspace", "--doc"], options, &skipped)?)?;
    } else {
        counts +=
            watched("test", &mut tests(&["test", "--workspace", "--no-fail-fast"], options, &skipped)?)?;
    }
    let names = std::fs::read_to_string(&skipped).unwrap_or_default();
    for name in names.lines() {
        println!("skipped: {name}");
    }
    // They returned early, so their runner took them for passed.
    counts.skip(names.lines().count());
    println!("{counts}");
    if counts.failed > 0 {
        bail!("{} failed", setup::count(counts.failed, "test"));
    }
    Ok(counts)
}

/// Everything that must hold before a change goes in: form, lints, documentation, licences, demos, the README,
/// tests.
///
/// # Errors
///
/// The first thing that does not hold.
pub fn ci() -> Result<()> {
    let start = Instant::now();
    step("format", crate::cargo().args(["fmt", "--all", "--check"]))?;
    setup::everything()?;
    step("lint", crate::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    // They are no part of the workspace, and of whatever it depends on they take the same.
    let fuzz = ["clippy", "--locked", "--bins", "--manifest-path", "fuzz/Cargo.toml", "--target-dir"];
    let mut lint = crate::cargo();
    step(
        "lint what is fuzzed",
        lint.args(fuzz).arg(crate::target_directory()).args(["--", "-D", "warnings"]),
    )?;
    step(
        "documentation",
        crate::cargo().env("RUSTDOCFLAGS", "-D warnings").args(["doc", "--workspace", "--no-deps"]),
    )?;
    let mut unchecked = "";
    if toolchain::on_path("cargo-deny").is_some() {
        step("dependencies", crate::cargo().args(["deny", "check", "bans", "licenses", "sources"]))?;
    } else {
        unchecked = "; dependencies not checked, since cargo-deny is not installed";
    }
    demos()?;
    // Before the others, which begin by building `lb` as it is meant to be.
    let mut counts = traced()?;
    counts += readme()?;
    counts += test(&TestOptions::default())?;
    println!(
        "all is well: format, lint, documentation, {counts}{unchecked}; {} s",
        start.elapsed().as_secs()
    );
    Ok(())
}

/// Shows all demos, and judges the greater ones by the summaries that they write.
fn demos() -> Result<()> {
    step("demo 1", crate::cargo().args(["xtask", "demo", "1"]))?;
    step("demo 2", crate::cargo().args(["xtask", "demo", "2"]))?;
    let payments = summary("demo", &["xtask", "demo"])?;
    let none = |what: &str| payments[what].as_array().is_some_and(Vec::is_empty);
    let all_paid =
        none("lost") && none("double") && none("unknown") && payments["payments"].as_u64() > Some(0);
    let all_served = payments["payments_by_server"].as_array().is_some_and(|servers| {
        servers.len() == 10 && servers.iter().all(|payments| payments.as_u64() > Some(0))
    });
    if payments["good"] != true || !all_paid || !all_served || payments["after_drain"] != 0 {
        bail!("the demo's summary is not good: {payments}");
    }
    let database = summary("demo 4", &["xtask", "demo", "4"])?;
    let right = database["lost"] == 0 && database["written_elsewhere"] == 0;
    let at_work = database["transfers"].as_u64() > Some(0) && database["reads"].as_u64() > Some(0);
    if database["good"] != true || !right || !at_work {
        bail!("the database demo's summary is not good: {database}");
    }
    let services = summary("demo 5", &["xtask", "demo", "5"])?;
    let none =
        ["lost", "told_closed_elsewhere", "told_to_slow_down_elsewhere"].map(|what| &services[what] == 0);
    let some = ["answered", "told_closed", "told_to_slow_down"].map(|what| services[what].as_u64() > Some(0));
    if services["good"] != true || none.contains(&false) || some.contains(&false) {
        bail!("the summary of the demo of five services is not good: {services}");
    }
    Ok(())
}

/// Shows a demo; the summary that it writes.
fn summary(name: &str, arguments: &[&str]) -> Result<serde_json::Value> {
    let file = crate::target_directory().join("demo.json");
    // Of another run, if there was one.
    let _ = std::fs::remove_file(&file);
    step(name, crate::cargo().args(arguments).arg("--json").arg(&file))?;
    let text = std::fs::read(&file).with_context(|| file.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

/// Runs the README's commands; what they build has been built for the demos.
fn readme() -> Result<Counts> {
    let arguments = ["test", "--workspace", "--test", "readme", "--", "--ignored", "--nocapture"];
    let mut command = tests(&arguments, &TestOptions::default(), &skipped())?;
    judged("the README's commands", &mut command)
}

/// Lints and tests the build that logs every verdict: another `lb`, from another program.
fn traced() -> Result<Counts> {
    // The whole workspace, whose dependencies are built by the other steps too.
    const BUILD: [&str; 3] = ["--workspace", "--features", "lb-userspace/trace"];
    let lint = ["--all-targets", "--", "-D", "warnings"];
    step("lint with traces", crate::cargo().arg("clippy").args(BUILD).args(lint))?;
    let arguments = [&["test"][..], &BUILD, &["--test", "verdict_log"]].concat();
    let mut command = tests(&arguments, &TestOptions::default(), &skipped())?;
    judged("test with traces", &mut command)
}

/// Runs a command that runs tests, none of which may fail.
fn judged(name: &str, command: &mut Command) -> Result<Counts> {
    let counts = watched(name, command)?;
    if counts.failed > 0 {
        bail!("{name}: {} failed", setup::count(counts.failed, "test"));
    }
    Ok(counts)
}

/// Where tests that were skipped write their names.
fn skipped() -> PathBuf {
    crate::target_directory().join("skipped-tests")
}

/// A command that runs tests, as root where that is wanted and possible.
fn tests(arguments: &[&str], options: &TestOptions, skipped: &Path) -> Result<Command> {
    let mut command = crate::cargo();
    command.args(arguments).env(lab::SKIPPED_VARIABLE, skipped);
    if let Some(filter) = &options.filter {
        command.arg(filter);
    }
    if !options.no_root && !root::is_root() {
        let what_for =
            "to make network namespaces and load XDP programs in the tests (--no-root leaves those out)";
        // Asked for once, before the build, and not in the middle of its output.
        let granted = root::command(what_for, "true")?.status().context("sudo cannot be run")?.success();
        if !granted {
            bail!("root's rights were not granted; --no-root leaves out what needs them");
        }
        let mut runner = "sudo --preserve-env".to_owned();
        let path = root::path().to_string_lossy().into_owned();
        // Cargo takes it apart at spaces.
        if !path.contains(char::is_whitespace) {
            runner += &format!(" env {path}");
        }
        command.env(runner_variable()?, runner);
    }
    Ok(command)
}

/// The variable that names the program cargo runs the tests with.
fn runner_variable() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("rustc cannot be run")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host =
        text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not tell its host")?;
    Ok(format!("CARGO_TARGET_{}_RUNNER", host.to_uppercase().replace('-', "_")))
}

/// Runs a command, its output shown.
fn step(name: &str, command: &mut Command) -> Result<()> {
    heading(name, command);
    let status = command.status().with_context(|| format!("{name}: the command cannot be run"))?;
    if !status.success() {
        bail!("{name} failed");
    }
    Ok(())
}

/// Runs a command that runs tests: its output shown, and counted.
fn watched(name: &str, command: &mut Command) -> Result<Counts> {
    heading(name, command);
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cargo cannot be run")?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut counts = Counts::default();
    std::thread::scope(|scope| {
        let from_stderr = scope.spawn(|| stderr.map(|pipe| tee(pipe, std::io::stderr())).unwrap_or_default());
        counts += stdout.map(|pipe| tee(pipe, std::io::stdout())).unwrap_or_default();
        // A thread that panicked has counted nothing; the exit status below still tells.
        counts += from_stderr.join().unwrap_or_default();
    });
    let status = child.wait()?;
    if !status.success() && counts.failed == 0 {
        bail!("{name} failed before any test did ({status})");
    }
    Ok(counts)
}

fn tee(from: impl Read, mut to: impl Write) -> Counts {
    let mut counts = Counts::default();
    for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
        counts.read(&String::from_utf8_lossy(&line));
        // Nobody may be reading any more; the count goes on.
        let _ = to.write_all(&line).and_then(|()| to.write_all(b"\n"));
    }
    counts
}

fn heading(name: &str, command: &Command) {
    let program = Path::new(command.get_program()).file_name().map(OsString::from);
    let words: Vec<_> = program.into_iter().chain(command.get_args().map(OsString::from)).collect();
    println!("── {name}: {}", words.join(OsStr::new(" ")).to_string_lossy());
}
