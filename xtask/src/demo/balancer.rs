//! Lobby in the demo's lab: the daemon with a copy of an example, and the command line.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::lab::{Lab, Proc};

/// How long anything may take that Lobby was asked for.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running daemon.
pub struct Balancer<'a> {
    lab: &'a Lab,
    program: PathBuf,
    daemon: Proc,
    log: PathBuf,
}

/// What Lobby says of a backend.
#[derive(Clone, Debug, Deserialize)]
pub struct Backend {
    /// The pool that it belongs to.
    pub pool: String,
    /// Address and port.
    pub address: String,
    /// Its state, in a word.
    pub state: String,
    /// It gets new connections.
    pub usable: bool,
}

impl<'a> Balancer<'a> {
    /// Starts the daemon with a copy of an example, and waits until it answers.
    ///
    /// # Errors
    ///
    /// It does not; the last lines of its log are in the error.
    pub fn start(lab: &'a Lab, program: &Path, example: &str, directory: &Path) -> Result<Self> {
        let document = directory.join("lb.toml");
        let example = crate::workspace().join("examples").join(example);
        // A copy, since Lobby writes into it what the command line changes.
        fs::copy(&example, &document).with_context(|| example.display().to_string())?;
        let log = directory.join("lb.log");
        let output = File::create(&log)?;
        let mut command = lab.balancer.command(program);
        command.arg("run").arg("--config").arg(&document);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut balancer =
            Self { lab, program: program.to_owned(), daemon: Proc::start(command)?, log: log.clone() };
        let start = Instant::now();
        while let Err(error) = balancer.command(&["status"]) {
            let ended = balancer.daemon.child().try_wait()?;
            if ended.is_some() || start.elapsed() > PATIENCE {
                bail!("Lobby did not get ready: {error:#}\n{}", balancer.last_words());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(balancer)
    }

    /// Runs the command line, `lb` and these arguments; what it prints.
    ///
    /// # Errors
    ///
    /// It refuses; its words are in the error.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let output = self.lab.balancer.command(&self.program).args(arguments).output()?;
        ensure!(
            output.status.success(),
            "lb {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The backends, as `lb backend list` tells them.
    ///
    /// # Errors
    ///
    /// The daemon does not answer.
    pub fn backends(&self) -> Result<Vec<Backend>> {
        let text = self.command(&["--json", "backend", "list"])?;
        serde_json::from_str(&text).with_context(|| format!("lb backend list said {text}"))
    }

    /// Waits until the backends are as wanted.
    ///
    /// # Errors
    ///
    /// They are not for 20 seconds.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&[Backend]) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let backends = self.backends()?;
            if wanted(&backends) {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                let states: Vec<_> =
                    backends.iter().map(|backend| format!("{} {}", backend.address, backend.state)).collect();
                bail!("waited in vain for {what}: {}\n{}", states.join(", "), self.last_words());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The last lines of the daemon's log.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(15)..];
        format!("the last lines of its log:\n  {}", last.join("\n  "))
    }
}
