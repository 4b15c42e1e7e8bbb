//! A build with the feature `trace` logs every verdict, with the daemon's own lines. Needs root's rights, and
//! is skipped, by name, without.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use xtask::lab::{self, Lab, LabOptions, Namespace, Proc, VIP, link};

/// How long something may take on a slow machine before the test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the server sends each client: more packets than there is room for in the ring between program and
/// daemon.
const ANSWER: usize = 8 << 20;

#[test]
fn every_verdict_is_logged_whoever_takes_over() {
    if !lab::possible("every_verdict_is_logged_whoever_takes_over") {
        return;
    }
    let lab = Lab::new(LabOptions { backends: 1, ..LabOptions::default() }).unwrap();
    let server = SocketAddr::new(lab.backend_v4(0).into(), 8080);
    let listener = lab.backends[0].run(|| TcpListener::bind(server).unwrap()).unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            // A client may be gone before it has read all.
            _ = client.and_then(|mut client| client.write_all(&vec![7; ANSWER]));
        }
    });
    let directory = tempfile::tempdir().unwrap();
    let document = format!(
        "interfaces = [\"front\", \"back\"]\n[pools.web]\nbackends = [{{ address = \"{server}\" }}]\n\
         [services.shop]\nlisten = \"{VIP}:80/tcp\"\npool = \"web\"\n"
    );
    fs::write(directory.path().join("lb.toml"), document).unwrap();
    let [front, back] = ["front", "back"].map(|name| link::index(&lab.balancer, name).unwrap());
    let said = [format!("interface {front}: to_backend"), format!("interface {back}: to_client")];

    let mut daemon = Daemon::start(&lab.balancer, directory.path(), "text");
    ask(&lab.client);
    for words in &said {
        daemon.until(words, |line| line.contains("INFO") && line.ends_with(words.as_str()));
    }

    // Nobody reads the ring any more: it fills, and packets go on.
    daemon.process.kill().unwrap();
    ask(&lab.client);

    let daemon = Daemon::start(&lab.balancer, directory.path(), "json");
    ask(&lab.client);
    for words in &said {
        daemon.until(words, |line| {
            serde_json::from_str::<serde_json::Value>(line)
                .is_ok_and(|line| line["message"] == words.as_str() && line["level"] == "INFO")
        });
    }
}

/// Calls the service and reads its whole answer.
fn ask(client: &Namespace) {
    let answer = client.run(|| {
        let address = SocketAddr::new(VIP.into(), 80);
        let mut connection = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        answer.len()
    });
    assert_eq!(answer.unwrap(), ANSWER);
}

struct Daemon {
    process: Proc,
    log: std::path::PathBuf,
}

impl Daemon {
    /// Starts one on `lb.toml` in the directory and waits until it is ready.
    fn start(place: &Namespace, directory: &Path, format: &str) -> Self {
        let log = directory.join(format);
        let output = File::create(&log).unwrap();
        let mut command = place.command(env!("CARGO_BIN_EXE_lb"));
        command.args(["run", "--log-format", format, "--config"]).arg(directory.join("lb.toml"));
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        let daemon = Self { process: Proc::start(command).unwrap(), log };
        daemon.until("ready", |line| line.contains("ready"));
        daemon
    }

    /// Waits for a line of its log.
    fn until(&self, what: &str, is_it: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        loop {
            let log = fs::read_to_string(&self.log).unwrap();
            if log.lines().any(&is_it) {
                return;
            }
            let end = log.lines().take(40).collect::<Vec<_>>().join("\n");
            assert!(begun.elapsed() < PATIENCE, "no line says {what:?}; the log begins:\n{end}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
