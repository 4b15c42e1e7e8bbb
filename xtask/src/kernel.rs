//! Whether the oldest kernel that Lobby is promised for takes the program: Debian's, booted in QEMU.
//!
//! The kernel comes from Debian's package, which is unpacked below the target directory and not installed.
//! Its file system is an archive in memory (`archive`): the tests, their libraries, and this program itself
//! as what the kernel starts ([`guest`]). Nothing is needed of the machine but time.

mod archive;
pub mod guest;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::archive::Archive;
use crate::{check::Counts, setup};

/// Which kernel, and for how long.
#[derive(clap::Args, Clone, Debug)]
pub struct KernelOptions {
    /// The kernel's package; the newest of Linux 6.1 for virtual machines by default
    #[arg(long, value_name = "NAME")]
    package: Option<String>,
    /// The tests that run on it, of those in tests/tests
    #[arg(long = "test", value_name = "NAME", default_values_t = ["verdicts".to_owned(), "tables".to_owned()])]
    tests: Vec<String>,
    /// Seconds that it may take from switching on to switching off
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    patience: u64,
}

/// How the names of packages of the promised kernel begin, and how they end: small, without drivers.
const PACKAGE: (&str, &str) = ("linux-image-6.1.", "-cloud-amd64");

/// Runs tests on another kernel.
///
/// # Errors
///
/// Something could not be had, the kernel did not come to its end, or a test failed.
pub fn run(options: &KernelOptions) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "Lobby and this check are for x86-64");
    setup::build()?;
    setup::emulator()?;
    let directory = crate::target_directory().join("kernel");
    let package = match &options.package {
        Some(package) => package.clone(),
        None => newest(&setup::packages(PACKAGE.0)?).with_context(|| {
            format!(
                "the lists of packages have no {}*{}, which Debian 12 has; --package names another kernel",
                PACKAGE.0, PACKAGE.1
            )
        })?,
    };
    let image = image(&package, &directory)?;

    println!("building the tests {} …", options.tests.join(", "));
    let tests = build(&options.tests)?;
    let mut archive = Archive::default();
    archive.program("init", &std::env::current_exe()?)?;
    for (name, program) in &tests {
        archive.program(&format!("{}/{name}", guest::TESTS), program)?;
    }
    let initrd = directory.join("initrd");
    fs::write(&initrd, archive.finish())?;

    println!("booting {package} …");
    let mut machine = Command::new("qemu-system-x86_64");
    // Emulated even where virtualisation is to be had: within another virtual machine that often fails, and
    // most of the time goes into building. A reboot is its end.
    machine.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "2G"]);
    machine.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]);
    machine.arg("-kernel").arg(image).arg("-initrd").arg(&initrd);
    machine.args(["-append", "console=ttyS0 quiet panic=-1 -- kernel-guest"]);
    machine.stdin(Stdio::null()).stdout(Stdio::piped());
    let report = watch(
        Machine(machine.spawn().context("qemu-system-x86_64 cannot be run")?),
        Duration::from_secs(options.patience),
    )?;
    report.judge(&tests)
}

/// The newest of these packages that is of the promised kernel, by the numbers in its name.
fn newest(packages: &str) -> Option<String> {
    let numbers = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    let fits = packages.lines().filter(|name| name.starts_with(PACKAGE.0) && name.ends_with(PACKAGE.1));
    fits.max_by_key(|name| numbers(name)).map(str::to_owned)
}

/// The kernel's image out of its package, which is fetched unless it has been.
fn image(package: &str, directory: &Path) -> Result<PathBuf> {
    let unpacked = directory.join(package);
    let find = || -> Option<PathBuf> {
        let boot = fs::read_dir(unpacked.join("boot")).ok()?;
        let mut files = boot.flatten().map(|entry| entry.path());
        files.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
    };
    if let Some(image) = find() {
        return Ok(image);
    }
    fs::create_dir_all(directory)?;
    println!("fetching {package} …");
    // Into a draft, so that half a package is none.
    let draft = tempfile::Builder::new().prefix("package-").tempdir_in(directory)?;
    setup::unpack(package, draft.path())?;
    fs::rename(draft.path(), &unpacked)?;
    find().with_context(|| format!("the package {package} holds no kernel"))
}

/// Builds tests; each with its program.
fn build(names: &[String]) -> Result<Vec<(String, PathBuf)>> {
    let mut command = crate::cargo();
    command.args(["test", "--package", "tests", "--no-run", "--message-format", "json-render-diagnostics"]);
    for name in names {
        command.args(["--test", name]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("cargo cannot be run")?;
    ensure!(output.status.success(), "the tests did not build");
    let mut programs = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        if let (Some(name), Some(program)) =
            (message["target"]["name"].as_str(), message["executable"].as_str())
            && names.iter().any(|wanted| wanted == name)
        {
            programs.push((name.to_owned(), program.into()));
        }
    }
    ensure!(programs.len() == names.len(), "cargo built {programs:?}, not {names:?}");
    Ok(programs)
}

/// A running machine; dropped, it is switched off.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// What came out of the machine.
#[derive(Debug, Default)]
struct Report {
    kernel: Option<String>,
    instructions: Option<u32>,
    counts: Counts,
    /// Tests that came to an end, with how it went.
    ended: Vec<(String, bool)>,
}

impl Report {
    /// Reads one line of the machine's console.
    fn read(&mut self, line: &str) {
        self.counts.read(line);
        if let Some(kernel) = line.strip_prefix(guest::RUNNING) {
            self.kernel = Some(kernel.to_owned());
        }
        if let Some((name, outcome)) = line.strip_prefix(guest::ENDED).and_then(|rest| rest.split_once(' ')) {
            self.ended.push((name.to_owned(), outcome == "well"));
        }
        if let Some((_, number)) = line.split_once("verified instructions: ") {
            self.instructions = number.chars().filter(char::is_ascii_digit).collect::<String>().parse().ok();
        }
    }

    fn judge(&self, tests: &[(String, PathBuf)]) -> Result<()> {
        let kernel = self.kernel.as_deref().context("the kernel did not start its first program")?;
        let instructions = self.instructions.map_or("not told".to_owned(), |number| number.to_string());
        println!("Linux {kernel}: {}; verified instructions: {instructions}", self.counts);
        for (name, _) in tests {
            match self.ended.iter().find(|(ended, _)| ended == name) {
                Some((_, true)) => {}
                Some((_, false)) => bail!("{name} failed on Linux {kernel}"),
                None => bail!("{name} did not come to its end on Linux {kernel}"),
            }
        }
        ensure!(self.counts.failed == 0 && self.counts.passed > 0, "{} on Linux {kernel}", self.counts);
        Ok(())
    }
}

/// Shows what the machine says until it is off.
fn watch(mut machine: Machine, patience: Duration) -> Result<Report> {
    let console = machine.0.stdout.take().context("the machine has a console")?;
    let (say, said) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if say.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let begun = Instant::now();
    let mut report = Report::default();
    loop {
        match said.recv_timeout(patience.saturating_sub(begun.elapsed())) {
            Ok(line) => {
                // What firmware says before is for its own screen.
                if report.kernel.is_some() || line.starts_with(guest::RUNNING) || line.starts_with('[') {
                    println!("│ {line}");
                }
                report.read(&line);
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(report),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the machine was not done in {} s; --patience gives it longer", patience.as_secs())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Report, newest};

    #[test]
    fn the_newest_package_is_the_one_with_the_highest_numbers() {
        let packages = "linux-image-6.1.0-9-cloud-amd64\nlinux-image-6.1.0-56-cloud-amd64\n\
                        linux-image-6.1.0-57-amd64\nlinux-image-6.1.0-60-cloud-amd64-dbg\n";
        assert_eq!(newest(packages).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest("linux-image-6.12.0-1-cloud-amd64\n"), None);
    }

    #[test]
    fn only_tests_that_came_to_a_good_end_count() {
        let tests = [("one".to_owned(), "one".into()), ("two".to_owned(), "two".into())];
        let mut report = Report::default();
        for line in [
            "running on 6.1.0",
            "verified instructions: Some(85191)",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "ended: one well",
        ] {
            report.read(line);
        }
        assert_eq!(report.instructions, Some(85191));
        assert!(report.judge(&tests).unwrap_err().to_string().contains("two did not come to its end"));
        report.read("ended: two badly");
        assert!(report.judge(&tests).unwrap_err().to_string().contains("two failed"));
        assert!(report.judge(&tests[..1]).is_ok());
    }
}
