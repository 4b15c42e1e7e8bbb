//! PostgreSQL servers in a lab: a primary, replicas that stream from it, and all that happens to them.
//!
//! Each has its own data directory, listens on TCP alone (a network namespace does not separate paths) and
//! runs as the user `postgres`, since the server refuses to run as root.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User},
};
use tokio_postgres::{Client, Config, NoTls};

use super::{Namespace, Proc};

/// How long a server may take to start, or to be promoted.
const PATIENCE: Duration = Duration::from_secs(20);
/// Whom the server runs as.
const USER: &str = "postgres";

/// Fast rather than safe against power cuts of the machine that the tests run on.
const SETTINGS: &[&str] = &[
    "unix_socket_directories=",
    "fsync=off",
    "full_page_writes=off",
    "autovacuum=off",
    "shared_buffers=16MB",
    "min_wal_size=32MB",
    "max_wal_senders=10",
    "wal_keep_size=64MB",
    "wal_retrieve_retry_interval=200ms",
    "wal_receiver_timeout=5s",
    "wal_sender_timeout=5s",
];

/// A server, running or not.
#[derive(Debug)]
pub struct Postgres {
    place: Namespace,
    address: SocketAddr,
    data: PathBuf,
    settings: Vec<String>,
    server: Option<Proc>,
}

impl Postgres {
    /// A new, empty primary, running. `rules` come first in its `pg_hba.conf`; then everybody is trusted.
    /// `settings` are written `name=value`. What it keeps is below `directory`, which others must be able to
    /// enter.
    ///
    /// # Errors
    ///
    /// PostgreSQL is not installed, or does not start.
    pub fn primary(
        place: &Namespace,
        address: SocketAddr,
        directory: &Path,
        rules: &[&str],
        settings: &[&str],
    ) -> Result<Self> {
        let mut server = Self::at(place, address, directory, settings)?;
        let data = server.data.clone();
        let mut command = server.command("initdb")?;
        command.args(["--no-sync", "--auth=trust", "--locale=C", "--encoding=UTF8", "--username", USER]);
        finished(command.arg("--pgdata").arg(&data))?;
        let trust = ["host all all all trust", "host replication all all trust"];
        let rules: Vec<_> = rules.iter().copied().chain(trust).collect();
        fs::write(data.join("pg_hba.conf"), rules.join("\n") + "\n")?;
        server.start()?;
        Ok(server)
    }

    /// A replica of a running server, running. It takes over its rules. Its name for synchronous
    /// replication is its place's.
    ///
    /// # Errors
    ///
    /// It cannot be copied, or does not start.
    pub fn replica(
        place: &Namespace,
        address: SocketAddr,
        directory: &Path,
        of: SocketAddr,
        settings: &[&str],
    ) -> Result<Self> {
        let mut server = Self::at(place, address, directory, settings)?;
        server.copy(of)?;
        server.start()?;
        Ok(server)
    }

    fn at(place: &Namespace, address: SocketAddr, directory: &Path, settings: &[&str]) -> Result<Self> {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o711))?;
        let home = directory.join(format!("postgres-{}", place.name()));
        fs::create_dir_all(&home)?;
        let user = User::from_name(USER)?.with_context(|| format!("there is no user {USER}"))?;
        chown(&home, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        Ok(Self { place: place.clone(), address, data: home.join("data"), settings, server: None })
    }

    /// Copies everything from a running server, in place of what there was, to follow it.
    ///
    /// # Errors
    ///
    /// It cannot be copied.
    pub fn copy(&mut self, of: SocketAddr) -> Result<()> {
        if self.data.exists() {
            fs::remove_dir_all(&self.data)?;
        }
        let mut command = self.command("pg_basebackup")?;
        command.args(["--checkpoint=fast", "--no-sync", "--wal-method=stream", "--write-recovery-conf"]);
        command.args(["--host", &of.ip().to_string(), "--port", &of.port().to_string()]);
        finished(command.args(["--username", USER]).arg("--pgdata").arg(&self.data))?;
        self.follow(of);
        Ok(())
    }

    /// Whom it follows when it starts next as a replica.
    pub fn follow(&mut self, of: SocketAddr) {
        self.settings.retain(|setting| !setting.starts_with("primary_conninfo="));
        self.settings.push(format!(
            "primary_conninfo=host={} port={} user={USER} application_name={} connect_timeout=2",
            of.ip(),
            of.port(),
            self.place.name()
        ));
    }

    /// Forgets that it is a replica: started next, it is a primary, on the timeline that it was on.
    ///
    /// # Errors
    ///
    /// It was none.
    pub fn forget_primary(&self) -> Result<()> {
        fs::remove_file(self.data.join("standby.signal")).context("it is no replica")
    }

    /// Starts it, and waits until it answers.
    ///
    /// # Errors
    ///
    /// It does not; its log is in the error.
    pub fn start(&mut self) -> Result<()> {
        _ = fs::remove_file(self.data.join("postmaster.pid"));
        let mut command = self.command("postgres")?;
        command.arg("-D").arg(&self.data).args(["-p", &self.address.port().to_string()]);
        command.args(["-c", &format!("listen_addresses={}", self.address.ip())]);
        for setting in SETTINGS.iter().copied().chain(self.settings.iter().map(String::as_str)) {
            command.args(["-c", setting]);
        }
        let log = File::options().create(true).append(true).open(self.log_path())?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.server = Some(Proc::start(command)?);
        let begun = Instant::now();
        while self.sql("SELECT 1").is_err() {
            let ended = self.server.as_mut().and_then(|server| server.child().try_wait().transpose());
            if ended.is_some() || begun.elapsed() > PATIENCE {
                bail!("PostgreSQL at {} does not answer:\n{}", self.address, self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it runs.
    pub fn place(&self) -> &Namespace {
        &self.place
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.data.with_file_name("log")
    }

    /// Runs SQL on it, past Lobby; what it answers, a row a line, columns separated by `|`.
    ///
    /// # Errors
    ///
    /// It does not answer, or refuses.
    pub fn sql(&self, sql: &str) -> Result<String> {
        psql(&self.place, self.address, USER, sql)
    }

    /// Makes it the primary, on a new timeline, and waits until it is.
    ///
    /// # Errors
    ///
    /// It does not become one.
    pub fn promote(&self) -> Result<()> {
        let done = self.sql("SELECT pg_promote(true, 20)")?;
        ensure!(done == "t", "{} was not promoted:\n{}", self.address, self.log());
        Ok(())
    }

    /// Ends it in order.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn stop(&mut self) -> Result<()> {
        let mut server = self.server.take().context("it is not running")?;
        // Fast shutdown: sessions are ended.
        server.signal(Signal::SIGINT)?;
        server.wait()?;
        Ok(())
    }

    /// Kills it as a power cut does: all its processes, without a word to anybody but by their sockets.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.server = None;
        Ok(())
    }

    /// Stops the world for it: it answers nothing, and does not know.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Goes on where it was paused.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// To the first process, which starts others, and then to those.
    fn signal(&self, signal: Signal) -> Result<()> {
        let first = Pid::from_raw(self.server.as_ref().context("it is not running")?.id().cast_signed());
        let children = children(first);
        kill(first, signal)?;
        // Who was started in between.
        for child in children.into_iter().chain(self::children(first)) {
            // Gone by itself is as good.
            _ = kill(child, signal);
        }
        Ok(())
    }

    /// One of PostgreSQL's programs, as its user, inside the place.
    fn command(&self, program: &str) -> Result<Command> {
        let mut command = self.place.command("setpriv");
        command.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--pdeathsig", "KILL"]);
        command.arg(programs()?.join(program)).current_dir("/");
        Ok(command)
    }
}

/// How to call a server's database `postgres` as this user.
pub fn config(server: SocketAddr, user: &str) -> Config {
    let mut config = Config::new();
    config.host(server.ip().to_string()).port(server.port()).user(user).dbname("postgres");
    config
}

/// A session, from where the caller is.
///
/// # Errors
/// When there is none.
pub async fn connect(config: &Config) -> Result<Client> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Promotes the second or the third server, whichever has more of the log, and makes the other follow it: COMMITs
/// may wait for one that does. Which one it was, and since when it is the primary.
///
/// # Errors
/// A server does not do it.
pub fn fail_over(servers: &mut [Postgres]) -> Result<(usize, Instant)> {
    let received = |server: &Postgres| -> Result<u64> {
        Ok(server.sql("SELECT (pg_last_wal_receive_lsn() - '0/0')::bigint")?.parse()?)
    };
    let (new, other) = if received(&servers[1])? >= received(&servers[2])? { (1, 2) } else { (2, 1) };
    servers[new].promote()?;
    let promoted = Instant::now();
    let address = servers[new].address();
    servers[other].stop()?;
    servers[other].follow(address);
    servers[other].start()?;
    Ok((new, promoted))
}

/// Runs SQL by psql from anywhere in the lab; what the server answers, a row a line, columns separated by `|`.
///
/// # Errors
///
/// There is no connection, or the server refuses.
pub fn psql(from: &Namespace, server: SocketAddr, user: &str, sql: &str) -> Result<String> {
    let mut command = from.command(programs()?.join("psql"));
    command.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--dbname", "postgres"]);
    command.args(["--host", &server.ip().to_string(), "--port", &server.port().to_string()]);
    command.args(["--username", user, "--set", "ON_ERROR_STOP=1", "--command", sql]);
    // It waits neither for replicas that are not there nor for a server that is stuck.
    command.env("PGOPTIONS", "-c synchronous_commit=local -c statement_timeout=20s");
    finished(command.env("PGCONNECT_TIMEOUT", "3"))
}

/// Where the programs of the newest PostgreSQL are.
///
/// # Errors
///
/// There is none.
pub fn programs() -> Result<PathBuf> {
    // Debian keeps versions side by side, and none of the servers on PATH.
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|version| Path::new(&format!("/usr/lib/postgresql/{version}/bin/postgres")).exists())
        .max();
    match newest {
        Some(version) => Ok(PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"))),
        None => crate::toolchain::on_path("postgres")
            .and_then(|program| Some(program.parent()?.to_owned()))
            .context("PostgreSQL is not installed; `cargo xtask setup` gets it"),
    }
}

fn children(of: Pid) -> Vec<Pid> {
    let path = format!("/proc/{of}/task/{of}/children");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|id| id.parse().ok()).map(Pid::from_raw).collect()
}

/// Runs a command to its end; what it printed.
fn finished(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    let program = command.get_args().find(|argument| argument.as_encoded_bytes().starts_with(b"/usr"));
    let name = program.unwrap_or(command.get_program()).display().to_string();
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
