//! The daemon as a process, on tables in memory, in network namespaces of the tests' own. They need
//! root's rights, and are skipped, by name, without.

#[path = "support/namespace.rs"]
mod namespace;
#[path = "support/request.rs"]
mod request;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use namespace::{in_namespace, ip};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use request::request;

const DOCUMENT: &str = r#"# the shop
interfaces = ["lb0"]
metrics = "127.0.0.1:9180"

[pools.web]
backends = [
  { address = "10.7.0.2:8080" }, # the first
]

[services.shop]
listen = "10.7.0.100:80/tcp"
pool = "web"
"#;

/// How long something may take on a slow machine before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

struct Daemon {
    child: Child,
    directory: PathBuf,
}

impl Daemon {
    /// Starts one on `lb.toml` in the directory and waits until it answers.
    fn start(directory: &Path) -> Self {
        let child = run_command(directory).stderr(Stdio::piped()).spawn().unwrap();
        let daemon = Self { child, directory: directory.to_owned() };
        until("the daemon answers", || daemon.lb(&["status"]).status.success());
        daemon
    }

    fn lb(&self, arguments: &[&str]) -> Output {
        lb(&self.directory).args(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; its output.
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.lb(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail; exit code and complaint.
    fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.lb(arguments);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.done(&["--json", "status"])).unwrap()
    }

    fn document(&self) -> String {
        fs::read_to_string(self.directory.join("lb.toml")).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// What it logs, from now on.
    fn log(&mut self) -> Arc<Mutex<String>> {
        let (log, mut stderr) = (Arc::<Mutex<String>>::default(), self.child.stderr.take().unwrap());
        let written = Arc::clone(&log);
        std::thread::spawn(move || {
            let mut piece = [0; 1024];
            while let Ok(length @ 1..) = stderr.read(&mut piece) {
                written.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..length]));
            }
        });
        log
    }

    /// Waits for its end; exit code and log.
    fn end(mut self) -> (Option<i32>, String) {
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

fn lb(directory: &Path) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("lb"));
    command.env("LB_RUN_DIR", directory.join("run")).env_remove("LB_LOG");
    command
}

fn run_command(directory: &Path) -> Command {
    let mut command = lb(directory);
    command.args(["run", "--memory", "--config"]).arg(directory.join("lb.toml"));
    command
}

fn directory(document: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("lb.toml"), document).unwrap();
    directory
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn addresses() -> String {
    let output = Command::new("ip").args(["address", "show"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn edits_by_command_keep_comments_and_two_at_once_lose_nothing() {
    in_namespace(|_| {
        let directory = directory(DOCUMENT);
        let daemon = Daemon::start(directory.path());
        std::thread::scope(|scope| {
            for n in 11..19 {
                let daemon = &daemon;
                scope.spawn(move || daemon.done(&["backend", "add", "web", &format!("10.7.0.{n}:8080")]));
            }
        });
        let text = daemon.document();
        assert!(text.starts_with("# the shop\n") && text.contains("# the first"), "{text}");
        for n in 11..19 {
            assert!(text.contains(&format!("10.7.0.{n}:8080")), "10.7.0.{n} is lost:\n{text}");
        }
        assert_eq!(daemon.status()["status"]["backends"], 9);

        // Thought out for a revision that is not there any more.
        let edit =
            r#"{"revision": "0000000000000000", "changes": [{"change": "remove-service", "name": "shop"}]}"#;
        let (status, body) = request(&directory.path().join("run/lb.sock"), "POST", "/v1/edits", edit);
        assert_eq!(status, 409, "{body}");
        assert_eq!(daemon.document(), text);

        let (code, why) = daemon.fails(&["backend", "add", "web", "10.7.0.11:8080"]);
        assert!(code == 1 && why.contains("already"), "{code} {why}");
        let (code, why) = daemon.fails(&["pool", "remove", "web"]);
        assert!(code == 1 && why.contains("shop"), "{code} {why}");
        let (code, why) =
            daemon.fails(&["service", "add", "x", "--listen", "10.7.0.100:80/tcp", "--pool", "web"]);
        assert!(code == 2 && why.contains("shop"), "{code} {why}");
        assert_eq!(daemon.document(), text);
    });
}

#[test]
fn every_change_has_its_command() {
    in_namespace(|_| {
        let directory = directory(DOCUMENT);
        let daemon = Daemon::start(directory.path());
        daemon.done(&["pool", "add", "db", "--backend", "10.7.0.21:5432", "--tcp", "--interval", "2s"]);
        daemon.done(&[
            "service",
            "add",
            "db",
            "--listen",
            "10.7.0.101:5432/tcp",
            "--pool",
            "db",
            "--allow",
            "10.0.0.0/8",
        ]);
        assert!(daemon.done(&["service", "show", "db"]).contains("10.0.0.0/8"));
        assert!(daemon.done(&["pool", "show", "db"]).contains("tcp every 2s"));
        daemon.done(&["backend", "weight", "web", "10.7.0.2:8080", "7"]);
        let backend = |n: usize| -> serde_json::Value { daemon.status()["backends"][n].clone() };
        assert_eq!(backend(1)["weight"], 7);
        daemon.done(&["backend", "disable", "web", "10.7.0.2:8080"]);
        assert_eq!(backend(1)["state"], "disabled");
        daemon.done(&["backend", "resume", "web", "10.7.0.2:8080"]);
        assert_eq!((&backend(1)["state"], &backend(1)["usable"]), (&"healthy".into(), &true.into()));
        daemon.done(&["backend", "drain", "web", "10.7.0.2:8080", "--deadline", "1h"]);
        // It has no connections.
        until("the drain is done", || backend(1)["state"] == "drained");
        assert!(backend(1)["deadline"].as_u64().unwrap() > 1_700_000_000);
        daemon.done(&["backend", "remove", "web", "10.7.0.2:8080"]);
        daemon.done(&["service", "remove", "db"]);
        daemon.done(&["pool", "remove", "db"]);
        assert_eq!(daemon.status()["status"]["backends"], 0);
        assert!(!addresses().contains("10.7.0.101"), "the address of a service that is gone stays");
        assert!(daemon.done(&["counters", "--all"]).contains("drop_no_port"));
        assert!(daemon.done(&["connections"]).contains("CLIENT"));
    });
}

#[test]
fn edits_by_hand_are_picked_up_and_bad_ones_are_refused_and_shown() {
    in_namespace(|_| {
        let directory = directory(DOCUMENT);
        let daemon = Daemon::start(directory.path());
        let file = directory.path().join("lb.toml");
        let revision = |daemon: &Daemon| daemon.status()["status"]["document"]["revision"].clone();
        let first = revision(&daemon);

        fs::write(&file, DOCUMENT.replace("10.7.0.100:80", "10.7.0.102:80")).unwrap();
        until("the edit is in force", || revision(&daemon) != first);
        assert!(addresses().contains("10.7.0.102/32") && !addresses().contains("10.7.0.100/32"));
        let second = revision(&daemon);

        // Both that it cannot be read and that this host does not have what it names.
        for (bad, why) in [("pool = 1", "lb.toml:"), ("eth9", "there is no interface \"eth9\"")] {
            let text = if bad == "eth9" {
                DOCUMENT.replace("lb0", bad)
            } else {
                DOCUMENT.replace("pool = \"web\"", bad)
            };
            fs::write(&file, text).unwrap();
            until("the refusal is shown", || {
                daemon.status()["status"]["document"]["refused"]
                    .as_str()
                    .is_some_and(|text| text.contains(why))
            });
            assert_eq!(revision(&daemon), second);
        }
        let (code, why) = daemon.fails(&["reload"]);
        assert!(code == 2 && why.contains("eth9"), "{code} {why}");

        // An editor puts a new file in its place.
        let other = directory.path().join("lb.toml.new");
        fs::write(&other, DOCUMENT).unwrap();
        fs::rename(&other, &file).unwrap();
        until("the document is in force again", || {
            revision(&daemon) == first && daemon.status()["status"]["document"]["refused"].is_null()
        });

        let loads = |daemon: &Daemon| daemon.status()["status"]["document"]["reloads"].as_u64().unwrap();
        let before = loads(&daemon);
        daemon.signal(Signal::SIGHUP);
        until("SIGHUP has been heard", || loads(&daemon) == before + 1);
        daemon.done(&["reload"]);
        assert_eq!(loads(&daemon), before + 2);

        let applied = directory.path().join("other.toml");
        fs::write(&applied, DOCUMENT.replace("# the shop", "# another")).unwrap();
        daemon.done(&["apply", applied.to_str().unwrap()]);
        assert!(daemon.document().starts_with("# another\n"));
        let before = daemon.document();
        fs::write(&applied, DOCUMENT.replace("lb0", "eth9")).unwrap();
        let (code, why) = daemon.fails(&["apply", applied.to_str().unwrap()]);
        assert!(code == 2 && why.contains("eth9"), "{code} {why}");
        assert_eq!(daemon.document(), before);
    });
}

#[test]
fn a_read_only_document_refuses_edits_with_the_reason() {
    in_namespace(|_| {
        let directory = directory(DOCUMENT);
        fs::set_permissions(directory.path().join("lb.toml"), fs::Permissions::from_mode(0o444)).unwrap();
        let daemon = Daemon::start(directory.path());
        let (code, why) = daemon.fails(&["backend", "add", "web", "10.7.0.3:80"]);
        assert!(code == 1 && why.contains("read-only") && why.contains("0444"), "{code} {why}");
        assert_eq!(daemon.document(), DOCUMENT);
        assert!(daemon.status()["status"]["document"]["read_only"].as_str().unwrap().contains("0444"));
    });
}

#[test]
fn a_start_that_cannot_be_says_why_and_touches_nothing() {
    in_namespace(|_| {
        let directory = directory(&DOCUMENT.replace("lb0", "eth9"));
        let output = run_command(directory.path()).output().unwrap();
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{why}");
        assert!(why.contains("lb.toml:2:15: error: there is no interface \"eth9\""), "{why}");
        assert!(!directory.path().join("run").exists());

        // The only way to this backend is by the peer's network, which is not listed.
        ip("link add other0 type veth peer name other1");
        ip("address add 10.9.0.1/24 dev other0");
        ip("link set other0 up");
        fs::write(directory.path().join("lb.toml"), DOCUMENT.replace("10.7.0.2", "10.9.0.2")).unwrap();
        let output = run_command(directory.path()).output().unwrap();
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{why}");
        assert!(why.contains("lb.toml:7:") && why.contains("other0"), "{why}");
        assert!(!addresses().contains("10.7.0.100"));

        fs::write(directory.path().join("lb.toml"), DOCUMENT).unwrap();
        let daemon = Daemon::start(directory.path());
        let output = run_command(directory.path()).output().unwrap();
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{why}");
        assert!(why.contains(&format!("process {}", daemon.child.id())), "{why}");
        // With a run directory of its own, the interface is still the first one's.
        let output =
            run_command(directory.path()).env("LB_RUN_DIR", directory.path().join("run2")).output().unwrap();
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{why}");
        assert!(why.contains("interface lb0"), "{why}");
        assert!(!directory.path().join("run2").exists());
        assert!(addresses().contains("10.7.0.100/32"), "the second daemon took the first one's address away");
        daemon.done(&["status"]);
    });
}

#[test]
fn the_end_leaves_everything_and_says_so_and_detach_leaves_nothing() {
    in_namespace(|_| {
        let before = addresses();
        let directory = directory(DOCUMENT);
        let run = directory.path().join("run");
        let daemon = Daemon::start(directory.path());
        let mode = fs::metadata(run.join("lb.sock")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        daemon.signal(Signal::SIGTERM);
        let (code, log) = daemon.end();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("goes on forwarding") && log.contains("nobody checks health"), "{log}");
        assert!(addresses().contains("10.7.0.100/32"));
        assert!(!run.join("lb.sock").exists());
        assert_eq!(lb(directory.path()).arg("status").output().unwrap().status.code(), Some(3));

        // A new one takes over, is killed, and another takes over again.
        let mut daemon = Daemon::start(directory.path());
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
        let daemon = Daemon::start(directory.path());
        daemon.done(&["detach"]);
        let (code, log) = daemon.end();
        assert_eq!(code, Some(0), "{log}");
        let stable = |text: &str| {
            text.lines().filter(|line| line.contains("inet 1")).map(String::from).collect::<Vec<_>>()
        };
        assert_eq!(stable(&addresses()), stable(&before));
        assert!(!run.exists(), "{:?}", fs::read_dir(&run).map(Iterator::count));
        let neighbours = Command::new("ip").args(["neigh", "show"]).output().unwrap();
        assert!(!String::from_utf8_lossy(&neighbours.stdout).contains("managed"));
    });
}

#[test]
fn detach_cleans_up_after_a_daemon_that_is_gone() {
    in_namespace(|_| {
        let directory = directory(DOCUMENT);
        let mut daemon = Daemon::start(directory.path());
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
        assert!(addresses().contains("10.7.0.100/32"));
        // Not where others have their pins.
        let nowhere = directory.path().join("bpf");
        let output = lb(directory.path()).args(["detach", "--bpffs"]).arg(&nowhere).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!addresses().contains("10.7.0.100/32"));
        assert!(!directory.path().join("run").exists());
        let output = lb(directory.path()).args(["detach", "--bpffs"]).arg(&nowhere).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("nothing to take down"));
    });
}

#[test]
fn health_and_next_hops_are_followed_and_metrics_tell_of_them() {
    in_namespace(|peer| {
        let document = DOCUMENT.replace(
            "[pools.web]\n",
            "[pools.web]\nhealth = { tcp = true, interval = \"100ms\", rise = 1, fall = 1 }\n",
        );
        let directory = directory(&document);
        let daemon = Daemon::start(directory.path());
        let backend = || daemon.status()["backends"][0].clone();
        until("the next hop is known", || backend()["next_hop"] == "02:00:00:00:00:02 on lb0");
        until("a probe has failed", || backend()["failure"].is_string());
        until("it has failed as often as it may", || backend()["state"] == "unhealthy");

        let server =
            "import socket; s = socket.create_server(('10.7.0.2', 8080))\nwhile True: s.accept()[0].close()";
        let server = Server(peer.command("python3").args(["-c", server]).spawn().unwrap());
        until("it is healthy", || backend()["state"] == "healthy");
        assert!(backend()["latency_ms"].as_f64().unwrap() > 0.0);

        // The server is replaced by another machine with its address.
        peer.ip("link set peer address 02:00:00:00:00:07");
        ip("neigh change 10.7.0.2 lladdr 02:00:00:00:00:07 dev lb0 nud reachable");
        until("the new next hop is known", || backend()["next_hop"] == "02:00:00:00:00:07 on lb0");

        drop(server);
        until("it is unhealthy", || backend()["state"] == "unhealthy");
        until("the alarm is raised", || {
            daemon.status()["status"]["alarms"].to_string().contains("every backend of pool web fails")
        });
        let text = metrics();
        assert!(
            text.contains(r#"lobby_backend_state{pool="web",backend="10.7.0.2:8080",state="unhealthy"} 1"#),
            "{text}"
        );
    });
}

#[test]
fn doctor_tells_what_the_daemon_raises_alarms_for() {
    in_namespace(|peer| {
        let desk = "[services.desk]\nlisten = \"10.7.0.1:85/tcp\"\nroutes = [{ respond = 200 }]\n";
        let directory = directory(&format!("{DOCUMENT}{desk}"));
        let _taken = std::net::TcpListener::bind("10.7.0.1:85").unwrap();
        let daemon = Daemon::start(directory.path());
        let problems = || -> Vec<String> {
            let output = daemon.lb(&["--json", "doctor"]);
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let problems = findings.as_array().unwrap().iter().filter(|it| it["verdict"] == "problem");
            problems
                .map(|it| format!("{}: {}", it["subject"].as_str().unwrap(), it["message"].as_str().unwrap()))
                .collect()
        };
        let found = problems();
        let deaf = "daemon: the desk cannot listen on 10.7.0.1:85: ";
        assert!(found.iter().any(|it| it.starts_with(deaf)), "{found:#?}");
        peer.ip("link set peer down");
        until("the alarm is raised", || {
            daemon.status()["status"]["alarms"].to_string().contains("interface lb0 is down")
        });
        let found = problems();
        let down: Vec<_> = found.iter().filter(|it| it.contains("is down")).collect();
        assert_eq!(down, ["interface lb0: is down: nothing is forwarded by it"], "{found:#?}");
        // Of a document that is not the daemon's, its alarms say nothing.
        let other = directory.path().join("other.toml");
        fs::write(&other, DOCUMENT).unwrap();
        let output = daemon.lb(&["doctor", "--config", other.to_str().unwrap()]);
        assert!(!String::from_utf8_lossy(&output.stdout).contains("cannot listen"), "{output:?}");
        // With the desk.
        daemon.done(&["detach"]);
    });
}

#[test]
fn a_certificate_that_has_expired_is_told_everywhere_and_served() {
    in_namespace(|_| {
        let service = "[services.desk]\nlisten = \"10.7.0.1:443/tcp\"\ntls = { cert = \"old.pem\", key = \"old.key\" }\nroutes = [{ respond = 200 }]\n";
        let directory = directory(&format!("{DOCUMENT}{service}"));
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["shop.example".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2026, 1, 1);
        let write = |name: &str, text: String| fs::write(directory.path().join(name), text).unwrap();
        write("old.pem", params.self_signed(&key).unwrap().pem());
        write("old.key", key.serialize_pem());
        let file = directory.path().join("lb.toml");
        let file = file.to_str().unwrap();
        let words = "old.pem has expired, on 2026-01-01T00:00:00Z";
        let daemon = Daemon::start(directory.path());
        let alarms = || daemon.status()["status"]["alarms"].to_string();
        assert!(alarms().contains(words), "{}", alarms());
        for arguments in [["check", file], ["plan", file], ["apply", file]] {
            let output = daemon.lb(&arguments);
            let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
            assert!(output.status.success(), "{arguments:?}: {said}");
            let placed = said.contains("lb.toml:15:") && said.contains("warning: ") && said.contains(words);
            assert!(placed, "{arguments:?}: {said}");
        }
        let doctor = daemon.lb(&["--json", "doctor"]);
        let doctor: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
        let found =
            doctor.as_array().unwrap().iter().filter(|it| it["message"].as_str().unwrap().contains(words));
        let found: Vec<_> = found.map(|it| (&it["verdict"], &it["subject"])).collect();
        assert_eq!(found, [(&"warning".into(), &"document line 15".into())]);
        let desk = daemon.done(&["desk", "status"]);
        assert!(desk.contains("2026-01-01T00:00:00Z"), "{desk}");
        let desk: serde_json::Value =
            serde_json::from_str(&daemon.done(&["--json", "desk", "status"])).unwrap();
        let shown = &desk["certificates"][0];
        assert_eq!(
            (&shown["service"], &shown["not_after"]),
            (&"desk".into(), &"2026-01-01T00:00:00Z".into())
        );
        assert!(shown["days_left"].as_i64().unwrap() < 0, "{shown}");
        let metric = metrics();
        let metric =
            metric.lines().find(|line| line.starts_with("lobby_desk_certificate_not_after_seconds{"));
        assert!(
            metric.is_some_and(|it| it.contains("service=\"desk\"") && it.ends_with(" 1767225600")),
            "{metric:?}"
        );
        // A new one ends the alarm, without anybody's doing.
        params.not_after = rcgen::date_time_ymd(4096, 1, 1);
        write("old.pem", params.self_signed(&key).unwrap().pem());
        until("the alarm is over", || !alarms().contains("old.pem"));
        assert!(!daemon.done(&["status"]).contains("old.pem"));
        daemon.done(&["detach"]);
    });
}

fn metrics() -> String {
    let mut stream = TcpStream::connect("127.0.0.1:9180").unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: lb\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_document_that_is_gone_is_an_alarm_until_it_is_back() {
    in_namespace(|_| {
        let directory = directory(DOCUMENT);
        let mut daemon = Daemon::start(directory.path());
        let log = daemon.log();
        let (file, away) = (directory.path().join("lb.toml"), directory.path().join("away"));
        let is_alarm = || daemon.status()["status"]["alarms"].to_string().contains("lb.toml is gone");
        for asked in [false, true] {
            fs::rename(&file, &away).unwrap();
            until("the alarm is raised", is_alarm);
            if asked {
                daemon.signal(Signal::SIGHUP);
                until("it is refused", || daemon.status()["status"]["document"]["refused"].is_string());
            }
            let times = |what: &str| log.lock().unwrap().matches(what).count();
            until("it is logged", || times("alarm: the document") == 1 + usize::from(asked));
            // What is in force stays.
            assert_eq!(daemon.status()["status"]["backends"], 1);
            fs::rename(&away, &file).unwrap();
            until("the alarm is over", || !is_alarm());
            until("that is logged", || times("over: the document") == 1 + usize::from(asked));
            until("nothing is refused", || daemon.status()["status"]["document"]["refused"].is_null());
        }
    });
}

#[test]
fn an_alarm_is_logged_when_it_begins_and_when_it_is_over() {
    in_namespace(|peer| {
        let directory = directory(DOCUMENT);
        let mut daemon = Daemon::start(directory.path());
        let log = daemon.log();
        let of_it = || -> Vec<String> {
            let log = log.lock().unwrap();
            log.lines().filter(|line| line.contains("lb0 is down")).map(str::to_owned).collect()
        };
        peer.ip("link set peer down");
        until("it is told", || of_it().len() == 1);
        assert!(of_it()[0].contains("WARN") && of_it()[0].contains("alarm: interface"), "{:?}", of_it());
        peer.ip("link set peer up");
        until("its end is told", || of_it().len() > 1);
        assert!(of_it()[1].contains("INFO") && of_it()[1].contains("over: interface"), "{:?}", of_it());
        assert_eq!(of_it().len(), 2);
    });
}

#[test]
fn who_is_added_is_not_said_to_be_silent_before_it_could_answer() {
    in_namespace(|peer| {
        let directory = directory(DOCUMENT);
        let daemon = Daemon::start(directory.path());
        peer.ip("address add 10.7.0.3/24 dev peer");
        let said = daemon.done(&["backend", "add", "web", "10.7.0.3:8080"]);
        assert!(said.starts_with("in force: "), "{said}");
        // Nor is one that is not there; which shows when the kernel has asked to the end.
        let said = daemon.done(&["backend", "add", "web", "10.7.0.4:8080"]);
        assert!(said.starts_with("in force: "), "{said}");
        until("it is an alarm", || {
            daemon.status()["status"]["alarms"].to_string().contains("10.7.0.4 does not answer ARP on lb0")
        });
        assert!(!daemon.status()["status"]["alarms"].to_string().contains("10.7.0.3"));
    });
}

/// Ends with the test, however that ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}
