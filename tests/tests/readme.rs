//! The README's commands do what it says: they are taken out of it and run, in its order. Its documents, and pieces of them,
//! are such as Lobby takes.
//!
//! Of the commands nothing is rewritten but one word: `sudo` is left out, since this runs as root. The machine's own
//! directories that commands write to are covered by empty ones, which only the commands see.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lb_userspace::config::Document;
use nix::sys::signal::Signal;
use xtask::lab::{self, Namespace, Proc, link};

/// How long something may take to come about.
const PATIENCE: Duration = Duration::from_secs(30);

/// What becomes of a command of the README.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Run on the machine where Lobby is built, to its end, which must be good.
    Desk,
    /// The same, in the background, until nginx's page is there.
    Serve(&'static str),
    /// Run where Lobby is used, to its end, which must be good.
    Host,
    /// Run where Lobby is used, in the background: it goes on.
    Daemon,
    /// The same until it has said something, then ended as by Ctrl-C.
    Watch,
    /// Not run here, and why.
    Elsewhere(&'static str),
}

const WAYS: [(&str, Way); 28] = [
    ("cargo xtask demo", Way::Elsewhere("`cargo xtask ci` runs it, and reads its summary")),
    ("cargo xtask test", Way::Elsewhere("runs the tests, of which this is one")),
    ("cargo xtask demo 1", Way::Elsewhere("`cargo xtask ci` runs it")),
    ("cargo xtask demo 2", Way::Elsewhere("`cargo xtask ci` runs it")),
    ("cargo xtask demo 4", Way::Elsewhere("`cargo xtask ci` runs it, and reads its summary")),
    ("cargo xtask demo 5", Way::Elsewhere("`cargo xtask ci` runs it, and reads its summary")),
    ("cargo xtask demo --json result.json", Way::Elsewhere("`cargo xtask ci` runs it, with another file")),
    ("cargo xtask lab up --backends 3", Way::Desk),
    ("cargo xtask lab exec lb -- target/release/lb doctor", Way::Desk),
    ("cargo xtask lab exec b1 -- nginx -g 'daemon off;' &", Way::Serve("http://10.2.0.10/")),
    (
        "cargo xtask lab exec lb -- target/release/lb run --config target/lab.toml &",
        Way::Serve("http://203.0.113.10/"),
    ),
    ("cargo xtask lab exec client -- curl http://203.0.113.10/", Way::Desk),
    ("cargo xtask lab exec lb -- target/release/lb status", Way::Desk),
    ("cargo xtask lab down", Way::Desk),
    ("cargo xtask bench", Way::Elsewhere("measures for minutes, and nothing is right or wrong")),
    ("cargo xtask bench --control", Way::Elsewhere("measures for minutes, and nothing is right or wrong")),
    ("cargo xtask bench --desk", Way::Elsewhere("measures for minutes, and nothing is right or wrong")),
    ("cargo xtask fuzz", Way::Elsewhere("the test `fuzz` tries the same, for less long")),
    ("cargo xtask bench --database", Way::Elsewhere("measures for minutes, and nothing is right or wrong")),
    ("cargo build --release --package lb-userspace", Way::Desk),
    ("sudo install target/release/lb /usr/local/bin/", Way::Host),
    ("lb check /etc/lobby/lb.toml", Way::Host),
    ("sudo lb run --config /etc/lobby/lb.toml", Way::Daemon),
    ("sudo lb status --watch", Way::Watch),
    ("sudo lb doctor", Way::Host),
    ("sudo lb explain 198.51.100.7:40000 203.0.113.10:80/tcp", Way::Host),
    ("sudo lb explain --pcap shop.pcap", Way::Elsewhere("tests/tests/direct.rs has captures of its own")),
    ("sudo lb backend add web 10.0.0.13:8080", Way::Host),
];
/// The last one; what follows it is looked at apart.
const DRAIN: &str = "sudo lb backend drain web 10.0.0.11:8080 --deadline 5m";
/// Of the chapter on databases, after that.
const DATABASES: [(&str, Way); 2] = [
    ("sudo lb pool show accounts", Way::Elsewhere("tests/tests/databases.rs has servers for it")),
    ("sudo lb pool recheck accounts", Way::Elsewhere("tests/tests/databases.rs has servers for it")),
];

/// Commands in the README's sentences, with FILE for the document: run at the end, or not here, and why.
const IN_SENTENCES: [(&str, Way); 24] = [
    ("lb --help", Way::Host),
    ("lb completions", Way::Elsewhere("lb-userspace/tests/cli.rs has shells for it")),
    ("cargo xtask demo 4", Way::Elsewhere("see above")),
    ("lb auth hash anna --role admin < password", Way::Elsewhere("tests/tests/guards.rs has secrets for it")),
    ("lb auth hash robot --key < key", Way::Elsewhere("tests/tests/guards.rs has secrets for it")),
    ("lb desk status", Way::Host),
    ("lb route list", Way::Host),
    ("lb route explain https://shop.example/pay", Way::Elsewhere("tests/tests/guards.rs has routes for it")),
    ("cargo xtask setup --report", Way::Desk),
    ("cargo xtask ci", Way::Elsewhere("runs this test")),
    ("cargo xtask bench", Way::Elsewhere("see above")),
    ("cargo xtask bench --control", Way::Elsewhere("see above")),
    ("cargo xtask bench --desk", Way::Elsewhere("see above")),
    ("cargo xtask bench --database", Way::Elsewhere("see above")),
    ("cargo xtask kernel", Way::Elsewhere("fetches a kernel, and boots it for minutes")),
    ("lb run --ephemeral", Way::Elsewhere("tests/tests/trace.rs has all that it leaves behind")),
    ("sudo lb doctor --config FILE", Way::Host),
    ("lb apply FILE", Way::Host),
    ("lb plan FILE", Way::Host),
    ("lb service show shop", Way::Host),
    ("lb connections --service accounts-write", Way::Elsewhere("tests/tests/clients.rs has sessions for it")),
    ("lb pool promote", Way::Elsewhere("see below")),
    (
        "sudo lb pool promote accounts 10.0.0.21:5432",
        Way::Elsewhere("tests/tests/databases.rs has servers for it"),
    ),
    // Ends the daemon.
    ("lb detach", Way::Host),
];

fn readme() -> Result<String> {
    fs::read_to_string(xtask::workspace().join("README.md")).context("README.md")
}

/// The contents of fenced blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).filter_map(|rest| rest.split("\n```").next()).collect()
}

/// What pieces of documents in the README may leave out, since it stands elsewhere there or is the reader's own.
const AROUND: &str = r#"
interfaces = ["eth0"]
[pools.web]
panic = "fail"
health = { http = "/healthz" }
backends = [ { address = "10.0.0.11:8080" } ]
[pools.accounts]
backends = [ { address = "10.0.0.21:5432" } ]
[pools.edge]
backends = [ { address = "10.0.0.41" } ]
[pools.payments]
backends = [ { address = "10.0.0.42:8080" } ]
[pools.wiki]
backends = [ { address = "10.0.0.43:8080" } ]
[pools.id]
backends = [ { address = "10.0.0.44:8080" } ]
[services.front]
listen = "203.0.113.11:443/tcp"
tls = { cert = "front.pem", key = "front.key" }
pool = "web"
"#;

/// What stands before some lines, where it is said in words: in which table.
const BEFORE: [(&str, &str); 1] = [("health = { http_role", "[pools.accounts]\n")];

/// What a block says, with what it may leave out around it; a whole document as it is.
fn document(block: &str) -> Result<String> {
    if block.contains("interfaces = ") {
        return Ok(block.to_owned());
    }
    let mut block = block.to_owned();
    for (line, before) in BEFORE {
        block = block.replacen(line, &format!("{before}{line}"), 1);
    }
    let mut all: toml::Table = AROUND.parse()?;
    lay_over(&mut all, block.parse()?);
    Ok(toml::to_string(&all)?)
}

/// Lays one table over another: what both have is as the upper one says.
fn lay_over(lower: &mut toml::Table, upper: toml::Table) {
    for (key, value) in upper {
        match (lower.get_mut(&key), value) {
            (Some(toml::Value::Table(lower)), toml::Value::Table(upper)) => lay_over(lower, upper),
            (_, value) => _ = lower.insert(key, value),
        }
    }
}

#[test]
fn every_piece_of_a_document_is_taken() -> Result<()> {
    let text = readme()?;
    let blocks = blocks(&text, "toml");
    let mut tried = 0;
    for block in &blocks {
        Document::parse(&document(block)?).map_err(|why| anyhow!("{block}\n\n{why}"))?;
        // And it would be noticed if a key of it were none.
        for line in block.lines() {
            let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| !key.contains(['{', '#'])) else {
                continue;
            };
            let wrong = block.replacen(line, &line.replacen(key, &format!("{key}-"), 1), 1);
            let refused = Document::parse(&document(&wrong)?).err().map(|why| why.to_string());
            assert!(refused.is_some_and(|why| why.contains(&format!("{}-", key.trim()))), "{wrong}");
            tried += 1;
        }
    }
    println!("{} pieces, {tried} wrong keys", blocks.len());
    Ok(())
}

/// The commands in blocks for a shell, without their comments.
fn commands(text: &str) -> Vec<&str> {
    let lines = blocks(text, "sh").into_iter().flat_map(str::lines);
    let commands = lines.map(|line| line.split_once(" #").map_or(line, |(command, _)| command).trim());
    commands.filter(|command| !command.is_empty()).collect()
}

/// The commands in backticks outside of blocks.
fn in_sentences(text: &str) -> BTreeSet<&str> {
    let sentences = text.split("```").step_by(2);
    let quoted = sentences.flat_map(|sentence| sentence.split('`').skip(1).step_by(2));
    quoted
        .filter(|words| ["cargo ", "lb ", "sudo "].iter().any(|program| words.starts_with(program)))
        .collect()
}

#[test]
fn every_command_is_run_or_there_is_a_reason() -> Result<()> {
    let text = readme()?;
    let databases = DATABASES.iter().map(|(command, _)| *command);
    let known: Vec<_> = WAYS.iter().map(|(command, _)| *command).chain([DRAIN]).chain(databases).collect();
    assert_eq!(commands(&text), known, "in this order; a new one needs its place in the list");
    assert_eq!(in_sentences(&text), IN_SENTENCES.iter().map(|(command, _)| *command).collect());
    Ok(())
}

#[test]
#[ignore = "builds Lobby for use; `cargo xtask ci` runs it"]
fn what_the_readme_says_works() -> Result<()> {
    if !lab::possible("what_the_readme_says_works") {
        return Ok(());
    }
    let text = readme()?;
    let machine = Machine::new(&text)?;
    let mut running = Vec::new();
    for command in commands(&text) {
        let way = WAYS.iter().chain(&DATABASES).find(|(known, _)| *known == command).map(|(_, way)| *way);
        println!("{command}: {way:?}");
        match way {
            Some(Way::Elsewhere(_)) => {}
            Some(Way::Desk) => drop(machine.desk(command)?),
            Some(Way::Serve(page)) => {
                running.push(machine.serve(command)?);
                let asking =
                    "cargo xtask lab exec client -- curl -sS --retry 30 --retry-all-errors --retry-delay 1";
                let page = machine.desk(&format!("{asking} {page}"))?;
                ensure!(page.contains("nginx"), "{page}");
            }
            Some(Way::Host) => drop(machine.host(command)?),
            Some(Way::Daemon) => {
                running.push(machine.start(command, Stdio::null())?);
                machine.until("both servers answer", |machine| machine.answers(&[11, 12]))?;
            }
            Some(Way::Watch) => machine.watch(command)?,
            None if command == DRAIN => {
                machine.until("the third server answers too", |machine| machine.answers(&[11, 12, 13]))?;
                machine.host(command)?;
                machine.until("the first is left alone", |machine| machine.answers(&[12, 13]))?;
                let document = machine.host("cat /etc/lobby/lb.toml")?;
                ensure!(document.contains("10.0.0.13:8080") && document.contains("drain"), "{document}");
            }
            None => bail!("{command} has no place in the list"),
        }
    }
    for (command, way) in IN_SENTENCES {
        println!("{command}: {way:?}");
        let command = command.replace("FILE", "/etc/lobby/lb.toml");
        match way {
            Way::Desk => {
                let said = machine.desk(&command)?;
                ensure!(said.contains("linker for BPF") && !said.contains("missing"), "{said}");
            }
            Way::Host => drop(machine.host(&command)?),
            _ => {}
        }
    }
    ensure!(machine.answers(&[])?, "somebody answers after `lb detach`");
    Ok(())
}

/// Where commands are run: a desk with a `/run` of its own, and a network as the README has it.
struct Machine {
    desk: Namespace,
    host: Namespace,
    client: Namespace,
    // Alive for as long as this.
    _servers: Vec<Proc>,
    _places: Vec<Namespace>,
    _directory: tempfile::TempDir,
}

impl Machine {
    /// `eth0` of the host, a client and three servers on one network; the README's document is in place.
    fn new(text: &str) -> Result<Self> {
        let desk = Namespace::with_mounts("desk", true)?;
        let (host, client) = (Namespace::with_mounts("host", true)?, Namespace::new("client")?);
        let switch = Namespace::new("switch")?;
        link::bridge(&switch, "bridge")?;
        let join = |place: &Namespace, name: &str, last: u8| -> Result<()> {
            link::veth(place, "eth0", &switch, name)?;
            link::into_bridge(&switch, name, "bridge")?;
            link::address(place, "eth0", IpAddr::from([10, 0, 0, last]), 24)
        };
        join(&host, "host", 1)?;
        join(&client, "client", 2)?;
        link::default_route(&client, IpAddr::from([10, 0, 0, 1]))?;

        let directory = tempfile::tempdir()?;
        let (mut servers, mut places) = (Vec::new(), vec![switch.clone()]);
        for last in [11, 12, 13] {
            let place = Namespace::new(format!("server {last}"))?;
            let prefix = directory.path().join(last.to_string());
            let configuration = format!(
                "daemon off; pid nginx.pid; error_log stderr; events {{ }}\n\
                 http {{ access_log off; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3;\n\
                 uwsgi_temp_path t4; scgi_temp_path t5;\n\
                 server {{ listen 8080; location / {{ return 200 \"{last}\\n\"; }} }} }}\n"
            );
            fs::create_dir(&prefix)?;
            fs::write(prefix.join("nginx.conf"), configuration)?;
            join(&place, &format!("s{last}"), last)?;
            let mut nginx = place.command("nginx");
            nginx.arg("-p").arg(&prefix).args(["-c", "nginx.conf"]);
            nginx.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            servers.push(Proc::start(nginx)?);
            place.wait_for_tcp(SocketAddr::new(Ipv4Addr::new(10, 0, 0, last).into(), 8080))?;
            places.push(place);
        }

        let machine = Self { desk, host, client, _servers: servers, _places: places, _directory: directory };
        // Of the system's nginx, which the README starts.
        machine.desk("mount -t tmpfs logs /var/log/nginx")?;
        machine.host("mkdir /run/etc && mount --bind /etc /run/etc && mount -t tmpfs etc /etc")?;
        machine.host("cp -a /run/etc/. /etc/ && mount -t tmpfs bin /usr/local/bin && mkdir -p /etc/lobby")?;
        let document = blocks(text, "toml").first().copied().context("a document in the README")?.to_owned();
        machine.host.run(|| fs::write("/etc/lobby/lb.toml", document))??;
        Ok(machine)
    }

    /// Runs a command where Lobby is built; what it printed.
    fn desk(&self, command: &str) -> Result<String> {
        finish(shell(&self.desk, command), command)
    }

    /// Starts a command where Lobby is built.
    fn serve(&self, command: &str) -> Result<Proc> {
        let mut shell = shell(&self.desk, command.trim_end_matches('&'));
        shell.stdout(Stdio::null());
        Proc::start(shell)
    }

    /// Runs a command where Lobby is used; what it printed.
    fn host(&self, command: &str) -> Result<String> {
        finish(shell(&self.host, command), command)
    }

    /// Starts a command where Lobby is used.
    fn start(&self, command: &str, output: Stdio) -> Result<Proc> {
        let mut shell = shell(&self.host, command);
        shell.stdout(output);
        Proc::start(shell)
    }

    /// Reads what a command says again and again, until it has said so twice.
    fn watch(&self, command: &str) -> Result<()> {
        let mut process = self.start(command, Stdio::piped())?;
        let output = process.child().stdout.take().context("a pipe")?;
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        let mut heads = lines.filter(|line| line.contains("shop"));
        ensure!(heads.by_ref().take(2).count() == 2, "{command} does not go on");
        process.signal(Signal::SIGINT)?;
        let status = process.wait()?;
        ensure!(status.success(), "{command}: {status}");
        Ok(())
    }

    /// Whether exactly these servers answer a client's calls.
    fn answers(&self, servers: &[u8]) -> Result<bool> {
        let mut heard = BTreeSet::new();
        for _ in 0..40 {
            let mut curl = self.client.command("curl");
            let output = curl.args(["-sS", "--max-time", "5", "http://203.0.113.10/"]).output()?;
            if !output.status.success() {
                return Ok(servers.is_empty());
            }
            heard.insert(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        Ok(heard == servers.iter().map(u8::to_string).collect())
    }

    fn until(&self, what: &str, holds: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        while !holds(self)? {
            ensure!(begun.elapsed() < PATIENCE, "{what}: does not come about");
        }
        Ok(())
    }
}

/// A command as somebody types it in the project's directory.
fn shell(place: &Namespace, command: &str) -> Command {
    let mut shell = place.command("sh");
    let command = command.trim_start_matches("sudo ").trim();
    // A list of commands stays one; a single one takes the shell's place, so that signals reach it.
    let exec = if command.contains("&&") { "" } else { "exec " };
    shell.args(["-c", &format!("{exec}{command}")]).current_dir(xtask::workspace()).stdin(Stdio::null());
    shell
}

fn finish(mut shell: Command, command: &str) -> Result<String> {
    let output = shell.output()?;
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command}: {}\n{said}{complained}", output.status);
    Ok(said.into_owned())
}
