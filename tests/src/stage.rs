//! Lobby at work in a lab: its daemon in the balancer's namespace, real servers and real clients around it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use lb_userspace::dataplane::fault;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use xtask::lab::{Lab, LabOptions, Namespace, Proc, VIP, VIP_V6, link};

/// How long anything may take to come about.
const PATIENCE: Duration = Duration::from_secs(20);

/// Exit code of curl when nobody listens, which a RST tells at once (curl(1)).
pub const REFUSED: Option<i32> = Some(7);
/// Exit code of curl when nothing came in its `--max-time`.
pub const TIMED_OUT: Option<i32> = Some(28);
/// Exit code of curl when a connection broke.
pub const RESET: Option<i32> = Some(56);

/// A lab, a document and a daemon.
pub struct Stage {
    /// The networks.
    pub lab: Lab,
    /// The daemon, while one runs.
    pub daemon: Option<Proc>,
    /// What the servers said, and the document.
    directory: TempDir,
    /// By the name of their place.
    servers: BTreeMap<String, Proc>,
}

impl Stage {
    /// A lab with a daemon on this document.
    ///
    /// # Errors
    /// When the lab cannot be made, or the daemon does not get ready.
    pub fn new(options: LabOptions, document: &str) -> Result<Self> {
        let mut stage = Self::without_daemon(options, document)?;
        stage.start()?;
        Ok(stage)
    }

    /// A lab with a document and no daemon yet.
    ///
    /// # Errors
    /// When the lab cannot be made.
    pub fn without_daemon(options: LabOptions, document: &str) -> Result<Self> {
        let stage = Self {
            lab: Lab::new(options)?,
            daemon: None,
            directory: tempfile::tempdir()?,
            servers: BTreeMap::new(),
        };
        stage.write(document)?;
        Ok(stage)
    }

    /// Where the document is.
    pub fn document(&self) -> PathBuf {
        self.directory.path().join("lobby.toml")
    }

    /// A directory of the stage's own.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Writes the document, as an editor does: whole, and renamed into place.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, document: &str) -> Result<()> {
        let draft = self.directory.path().join("lobby.toml.new");
        fs::write(&draft, document)?;
        fs::rename(draft, self.document()).context("the document cannot be put in place")
    }

    /// Starts the daemon and waits until it answers.
    ///
    /// # Errors
    /// When it ends, or does not answer in time.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(&[])
    }

    /// Starts the daemon with more arguments.
    ///
    /// # Errors
    /// When it ends, or does not answer in time.
    pub fn start_with(&mut self, arguments: &[&str]) -> Result<()> {
        let command = self.daemon_command(arguments)?;
        self.answers(command)
    }

    /// Starts the daemon of another build, by its program.
    ///
    /// # Errors
    /// When it ends, or does not answer in time.
    pub fn start_build(&mut self, program: &Path) -> Result<()> {
        let command = self.run_command(program, &[])?;
        self.answers(command)
    }

    /// Starts the daemon with more in its environment.
    ///
    /// # Errors
    /// When it ends, or does not answer in time.
    pub fn start_where(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        let mut command = self.daemon_command(&[])?;
        command.envs(environment.iter().copied());
        self.answers(command)
    }

    /// Starts the daemon and waits for nothing.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn start_only(&mut self) -> Result<()> {
        let command = self.daemon_command(&[])?;
        self.daemon = Some(Proc::start(command)?);
        Ok(())
    }

    /// Starts a daemon that passes so many points between two changes of the tables and dies at the next, as
    /// `kill -9` does it ([`fault`]; debug builds do). Says whether it answers: it may be dead by then.
    ///
    /// # Errors
    /// When it ends otherwise, or does not answer in time.
    pub fn start_mortal(&mut self, points: u64) -> Result<bool> {
        let mut command = self.daemon_command(&[])?;
        command.env(fault::VARIABLE, points.to_string());
        match self.answers_or_ends(command)? {
            None => Ok(true),
            Some(status) if status.signal() == Some(Signal::SIGKILL as i32) => Ok(false),
            Some(status) => bail!("lb run ended with {status}:\n{}", self.log()),
        }
    }

    /// The document changes under a daemon that dies so many points after its start ([`Self::start_mortal`]), if there
    /// are so many. Nobody runs afterwards; says whether it died, or had nothing to do any more.
    ///
    /// # Errors
    /// When neither comes about.
    pub fn dies_in(&mut self, points: u64, document: &str) -> Result<bool> {
        drop(self.daemon.take());
        let answers = self.start_mortal(points)?;
        self.write(document)?;
        let mut daemon = self.daemon.take().context("a daemon")?;
        let mut died = !answers;
        self.until("the change, or its end", |stage| {
            died = daemon.child().try_wait()?.is_some();
            Ok(died || stage.nothing_to_do().unwrap_or(false))
        })?;
        Ok(died)
    }

    fn daemon_command(&self, arguments: &[&str]) -> Result<Command> {
        self.run_command(&lb(), arguments)
    }

    fn run_command(&self, program: &Path, arguments: &[&str]) -> Result<Command> {
        let log = fs::File::options().create(true).append(true).open(self.log_path())?;
        let mut command = self.lab.balancer.command(program);
        command.args(["run", "--config"]).arg(self.document()).args(arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command)
    }

    /// Starts it and waits until it answers.
    fn answers(&mut self, command: Command) -> Result<()> {
        match self.answers_or_ends(command)? {
            None => Ok(()),
            Some(status) => bail!("lb run ended with {status}:\n{}", self.log()),
        }
    }

    /// Starts it and waits until it answers; or how it has ended before that.
    fn answers_or_ends(&mut self, command: Command) -> Result<Option<ExitStatus>> {
        let daemon = self.daemon.insert(Proc::start(command)?);
        let begun = Instant::now();
        loop {
            if let Some(status) = daemon.child().try_wait()? {
                return Ok(Some(status));
            }
            if run(&self.lab.balancer, &lb(), &["status", "--json"])?.status.success() {
                return Ok(None);
            }
            ensure!(begun.elapsed() < PATIENCE, "lb run does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("lb.log")
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Runs `lb` beside the daemon; what it printed.
    ///
    /// # Errors
    /// When it fails, with all that it said.
    pub fn lb(&self, arguments: &[&str]) -> Result<String> {
        let output = run(&self.lab.balancer, &lb(), arguments)?;
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "lb {arguments:?}: {}\n{out}{error}\n{}", output.status, self.log());
        Ok(out.into_owned())
    }

    /// Runs `lb` with `--json` and reads its answer.
    ///
    /// # Errors
    /// When it fails, or answers something else.
    pub fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let text = self.lb(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("lb {arguments:?} said {text}"))
    }

    /// Whether the tables are as the document wants them: a plan of it is empty.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn nothing_to_do(&self) -> Result<bool> {
        let path = self.document();
        let foreseen = self.json(&["plan", path.to_str().context("a path")?])?;
        Ok(foreseen["operations"].as_array().context("operations")?.is_empty())
    }

    /// Waits until something is so.
    ///
    /// # Errors
    /// When it does not come about, or cannot be found out.
    pub fn until(&self, what: &str, holds: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        self.within(PATIENCE, what, holds)
    }

    /// Waits until something is so that takes its time.
    ///
    /// # Errors
    /// When it does not come about, or cannot be found out.
    pub fn within(
        &self,
        patience: Duration,
        what: &str,
        mut holds: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<()> {
        let begun = Instant::now();
        while !holds(self)? {
            ensure!(begun.elapsed() < patience, "{what} does not come about:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Starts nginx on a backend, on port 8080 of all its addresses. It answers `/` with `backend N`, N from
    /// one, and the files of [`Stage::directory`] besides; `/fit` too, until [`Stage::fit`] says otherwise.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn nginx(&mut self, backend: usize) -> Result<()> {
        let place = self.lab.backends[backend].clone();
        self.fit(backend, true)?;
        self.nginx_at(&place, 8080, &(backend + 1).to_string())?;
        place.wait_for_tcp(SocketAddr::new(self.lab.backend_v4(backend).into(), 8080))
    }

    /// Starts nginx anywhere, on a port of all addresses, without waiting for it. It says in a header
    /// `Backend` and in its answer to `/` which it is.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn nginx_at(&mut self, place: &Namespace, port: u16, number: &str) -> Result<()> {
        let prefix = self.directory.path().join(place.name());
        fs::create_dir_all(&prefix)?;
        let configuration = format!(
            "daemon off; pid nginx.pid; error_log stderr; worker_processes 1;\n\
             events {{ worker_connections 4096; }}\n\
             http {{ access_log off; default_type application/octet-stream; keepalive_requests 1000000;\n\
             client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;\n\
             server {{ listen {port} backlog=4096; listen [::]:{port} backlog=4096; root {};\n\
             add_header Backend {number}; location = / {{ return 200 \"backend {number}\\n\"; }}\n\
             location = /fit {{ root {}; }} }} }}\n",
            self.directory.path().display(),
            prefix.display()
        );
        fs::write(prefix.join("nginx.conf"), configuration)?;
        let mut command = place.command("nginx");
        command.arg("-p").arg(&prefix).args(["-c", "nginx.conf"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(prefix.join("error.log"))?);
        self.servers.insert(place.name().to_owned(), Proc::start(command)?);
        Ok(())
    }

    /// Gives a backend both VIPs, as mode `dsr` wants it, and lets its answers pass by the balancer's own
    /// stack where that is their way.
    ///
    /// # Errors
    /// When the addresses cannot be had.
    pub fn hold_vips(&self, backend: usize) -> Result<()> {
        let place = &self.lab.backends[backend];
        // It must not answer for the address, or clients would find the backend by itself (arp_ignore in the
        // kernel's ip-sysctl).
        for (setting, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
            place.sysctl(&format!("net.ipv4.conf.all.{setting}"), value)?;
        }
        for (vip, prefix) in [(Self::VIPS[0], 32), (Self::VIPS[1], 128)] {
            link::address(place, "lo", vip, prefix)?;
        }
        for interface in self.lab.interfaces() {
            // The balancer has the VIP too, and takes a packet from it for forged.
            self.lab.balancer.sysctl(&format!("net.ipv4.conf.{interface}.accept_local"), "1")?;
        }
        Ok(())
    }

    /// Addresses of their own that are on the balancer's `lo`: those of services over IPv4.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn addresses_on_lo(&self) -> Result<BTreeSet<Ipv4Addr>> {
        let arguments = ["-4", "-oneline", "address", "show", "dev", "lo"];
        let shown = self.lab.balancer.command("ip").args(arguments).output()?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        let words = shown.lines().filter_map(|line| line.split_whitespace().nth(3)?.strip_suffix("/32"));
        Ok(words.map(str::parse).collect::<Result<_, _>>()?)
    }

    /// Kills the server of a backend, with all its workers.
    pub fn kill_server(&mut self, backend: usize) {
        self.servers.remove(self.lab.backends[backend].name());
    }

    /// Whether nginx on a backend has `/fit`, which health checks may ask for.
    ///
    /// # Errors
    /// When the file cannot be written or removed.
    pub fn fit(&self, backend: usize, fit: bool) -> Result<()> {
        let directory = self.directory.path().join(self.lab.backends[backend].name());
        fs::create_dir_all(&directory)?;
        let file = directory.join("fit");
        if fit {
            fs::write(file, "fit\n")?;
        } else {
            fs::remove_file(file)?;
        }
        Ok(())
    }

    /// Waits until backends of a pool, in the document's order, are in these states: "healthy" and so on.
    ///
    /// # Errors
    /// When they do not come to be.
    pub fn until_states(&self, pool: &str, states: &[&str]) -> Result<()> {
        self.until(&format!("{pool} {states:?}"), |stage| {
            let list = stage.json(&["backend", "list", "--pool", pool])?;
            let found = list.as_array().context("a list")?.iter();
            Ok(found.map(|backend| backend["state"].as_str()).eq(states.iter().copied().map(Some)))
        })
    }

    /// Asks for a path by curl from the client; the body.
    ///
    /// # Errors
    /// When curl fails, with what it said.
    pub fn curl(&self, vip: IpAddr, path: &str) -> Result<String> {
        let url = format!("http://{}{path}", SocketAddr::new(vip, 80));
        let output = self.try_curl(&["--max-time", "10", &url])?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "curl {url}: {} {error}\n{}", output.status, self.diagnosis());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs curl at the client, to whatever end.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn try_curl(&self, arguments: &[&str]) -> Result<Output> {
        let arguments = [&["--silent", "--show-error", "--globoff"], arguments].concat();
        run(&self.lab.client, Path::new("curl"), &arguments)
    }

    /// Curl's exit code for `/` of an address: [`REFUSED`], [`TIMED_OUT`] or 0.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn curl_exit(&self, vip: IpAddr, arguments: &[&str]) -> Result<Option<i32>> {
        let url = format!("http://{}/", SocketAddr::new(vip, 80));
        Ok(self.try_curl(&[arguments, &[&url]].concat())?.status.code())
    }

    /// What is scraped of the daemon, where its document says `metrics = "127.0.0.1:9100"`.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn metrics(&self) -> Result<String> {
        let output = run(&self.lab.balancer, Path::new("curl"), &["-sS", "http://127.0.0.1:9100/metrics"])?;
        ensure!(output.status.success(), "no metrics: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Processes of the desk in the balancer's place.
    ///
    /// # Errors
    /// When there is no daemon to tell that place by.
    pub fn desks(&self) -> Result<Vec<u32>> {
        let daemon = self.daemon.as_ref().context("a daemon")?;
        let ours = fs::read_link(format!("/proc/{}/ns/net", daemon.id()))?;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
            // It may be gone by now.
            let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
            let here = fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|net| net == ours);
            if here && line.split(|&byte| byte == 0).nth(1) == Some(b"desk-process") {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// The one process of the desk, once there is only one, and not `other`.
    ///
    /// # Errors
    /// When it does not come to be.
    pub fn desk(&self, other: Option<u32>) -> Result<u32> {
        let mut pid = None;
        self.until("one desk", |stage| {
            let found = stage.desks()?;
            pid = found.first().copied().filter(|pid| found.len() == 1 && Some(*pid) != other);
            Ok(pid.is_some())
        })?;
        pid.context("a desk")
    }

    /// Packets that had a verdict, since the tables were made.
    ///
    /// # Errors
    /// When nobody answers, or there is no such verdict.
    pub fn packets(&self, verdict: &str) -> Result<u64> {
        let counters = self.json(&["counters"])?;
        let mut verdicts = counters["verdicts"].as_array().context("counters")?.iter();
        let it = verdicts.find(|it| it["name"] == verdict).context("no such verdict")?;
        it["packets"].as_u64().context("a number")
    }

    /// Both VIPs that the lab's document may use.
    pub const VIPS: [IpAddr; 2] = [IpAddr::V4(VIP), IpAddr::V6(VIP_V6)];

    /// Fails if a packet with a wrong checksum has arrived anywhere.
    ///
    /// # Errors
    /// When one has.
    pub fn checksums_were_right(&self) -> Result<()> {
        for place in self.lab.places() {
            let errors = place.tcp_in_csum_errors()?;
            ensure!(errors == 0, "{errors} segments with wrong checksums at {}", place.name());
        }
        Ok(())
    }

    /// All that a daemon may leave behind at the balancer, line by line: programs on interfaces, addresses,
    /// routes, neighbours that are kept, mounts, pinned objects, and what is in `/run`.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn traces(&self) -> Result<BTreeSet<String>> {
        // Every system has /run/lock.
        let script = "ip -details -oneline link | grep -o '^[0-9]*: [^ ]*\\|xdp.*'; \
                      ip -oneline address | sed 's/ tentative//'; ip -4 route show table all; ip -6 route show table all; \
                      ip neighbour | grep -o '.*managed\\|.*PERMANENT'; mount | grep bpf; \
                      find /sys/fs/bpf /run -not -path /run/lock";
        let output = run(&self.lab.balancer, Path::new("sh"), &["-c", script])?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(text.contains("front"), "{text}{}", String::from_utf8_lossy(&output.stderr));
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// What is not as it was, each line with what became of it.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn changed_since(&self, before: &BTreeSet<String>) -> Result<Vec<String>> {
        let now = self.traces()?;
        let gone = before.difference(&now).map(|line| format!("gone: {line}"));
        Ok(gone.chain(now.difference(before).map(|line| format!("new: {line}"))).collect())
    }

    /// What helps to understand a failure.
    pub fn diagnosis(&self) -> String {
        let counters = self.lb(&["counters"]).unwrap_or_else(|error| error.to_string());
        format!("{counters}\n{}\n{}", self.log(), self.lab.diagnosis())
    }
}

/// The daemon's and command line's program, beside this one.
///
/// # Panics
/// When the test does not run from cargo's target directory.
pub fn lb() -> PathBuf {
    let this = std::env::current_exe().expect("a running program has a path");
    // A test is in target/PROFILE/deps, a benchmark in target/PROFILE.
    let mut beside = this.ancestors().skip(1).take(2).map(|directory| directory.join("lb"));
    let found = beside.find(|path| path.exists());
    found.unwrap_or_else(|| panic!("no lb beside {}; `cargo xtask test` builds it", this.display()))
}

/// Runs a program in a namespace to its end.
///
/// # Errors
/// When it cannot be started.
pub fn run(place: &Namespace, program: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command: Command = place.command(program);
    command.args(arguments).stdin(Stdio::null()).output().with_context(|| format!("{}", program.display()))
}
