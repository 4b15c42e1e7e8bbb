//! What clients and servers see where something is missing, forbidden, changed or used up.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tests::{
    document::Web,
    download::{self, Download},
    stage::{REFUSED, Stage, TIMED_OUT},
};
use xtask::lab::{self, LabOptions, VIP, VIP_V6, link};

/// Long enough for an answer, and not for patience.
const NO_ANSWER: &[&str] = &["--max-time", "2"];
const PATIENT: &[&str] = &["--max-time", "20"];

#[test]
fn without_a_usable_backend_clients_are_refused_at_once() -> Result<()> {
    if !lab::possible("without_a_usable_backend_clients_are_refused_at_once") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::new(options, &Web { backends: 0, ..Web::of(options) }.text())?;
    stage.nginx(0)?;
    for vip in Stage::VIPS {
        assert_eq!(stage.curl_exit(vip, PATIENT)?, REFUSED, "{vip}: an empty pool");
    }
    stage.write(&Web::of(options).text().replace("8080\" }", "8080\", disabled = true }"))?;
    stage.until_states("web6", &["disabled"])?;
    for vip in Stage::VIPS {
        assert_eq!(stage.curl_exit(vip, PATIENT)?, REFUSED, "{vip}: a disabled backend");
    }
    stage.write(&Web::of(options).text())?;
    stage.until_states("web6", &["healthy"])?;
    for vip in Stage::VIPS {
        assert_eq!(stage.curl(vip, "/")?, "backend 1\n");
    }
    stage.checksums_were_right()
}

#[test]
fn the_firewall_knows_clients_by_their_addresses() -> Result<()> {
    if !lab::possible("the_firewall_knows_clients_by_their_addresses") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    // The longest prefix wins, whichever list it is in.
    let rules = "allow = [\"10.1.0.64/26\", \"10.1.0.97\", \"fd00:1::4:0/112\", \"fd00:1::4:97\"]\n\
                 deny = [\"10.1.0.96/28\", \"fd00:1::4:90/124\"]";
    let mut stage = Stage::without_daemon(options, &Web { service: rules, ..Web::of(options) }.text())?;
    stage.nginx(0)?;
    let cases = [
        ("10.1.0.65", Some(0)),
        ("10.1.0.98", TIMED_OUT),
        ("10.1.0.97", Some(0)),
        // Its own address, in no list.
        ("10.1.0.2", TIMED_OUT),
        ("fd00:1::4:1", Some(0)),
        ("fd00:1::4:98", TIMED_OUT),
        ("fd00:1::4:97", Some(0)),
        ("fd00:1::2", TIMED_OUT),
    ];
    for (source, _) in cases {
        let source: IpAddr = source.parse()?;
        if ![IpAddr::V4(stage.lab.client_v4()), IpAddr::V6(stage.lab.client_v6())].contains(&source) {
            link::address(&stage.lab.client, "eth0", source, if source.is_ipv4() { 24 } else { 64 })?;
        }
    }
    stage.start()?;
    for (source, expected) in cases {
        let vip: IpAddr = if source.contains(':') { VIP_V6.into() } else { VIP.into() };
        let limits = if expected == TIMED_OUT { NO_ANSWER } else { PATIENT };
        let exit = stage.curl_exit(vip, &[limits, &["--interface", source]].concat())?;
        assert_eq!(exit, expected, "from {source}\n{}", stage.diagnosis());
    }
    // Without rules everybody comes in.
    stage.write(&Web::of(options).text())?;
    stage.until("everybody", |stage| Ok(stage.curl_exit(VIP.into(), NO_ANSWER)? == Some(0)))?;
    for vip in Stage::VIPS {
        stage.curl(vip, "/")?;
    }
    stage.checksums_were_right()
}

/// `local`: the packet is passed to this host, and its own server answers on the service's address.
#[test]
fn the_host_itself_can_be_a_backend() -> Result<()> {
    if !lab::possible("the_host_itself_can_be_a_backend") {
        return Ok(());
    }
    let options = LabOptions { backends: 0, ..LabOptions::default() };
    let document = Web::of(options).text().replace("backends = [\n", "backends = [{ address = \"local\" }\n");
    let mut stage = Stage::new(options, &document)?;
    let balancer = stage.lab.balancer.clone();
    stage.nginx_at(&balancer, 80, "local")?;
    for vip in Stage::VIPS {
        balancer.wait_for_tcp(SocketAddr::new(vip, 80))?;
        assert_eq!(stage.curl(vip, "/")?, "backend local\n");
    }
    stage.checksums_were_right()
}

#[test]
fn round_robin_takes_strict_turns() -> Result<()> {
    if !lab::possible("round_robin_takes_strict_turns") {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let document = Web { service: "scheduler = \"round-robin\"", ..Web::of(options) }.text();
    let mut stage = Stage::new(options, &document)?;
    for backend in 0..3 {
        stage.nginx(backend)?;
    }
    for vip in Stage::VIPS {
        let turns = (0..30).map(|_| stage.curl(vip, "/")).collect::<Result<Vec<_>>>()?;
        let mut first = turns[..3].to_vec();
        for (number, answer) in turns.iter().enumerate() {
            assert_eq!(*answer, first[number % 3], "{vip}: {turns:?}");
        }
        first.sort();
        first.dedup();
        assert_eq!(first.len(), 3, "{vip}: {turns:?}");
    }
    stage.checksums_were_right()
}

/// A server whose interface is exchanged goes on under its old address.
#[test]
fn a_next_hop_may_change_its_mac_address() -> Result<()> {
    const FILE: usize = 8 << 20;
    if !lab::possible("a_next_hop_may_change_its_mac_address") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::new(options, &Web::of(options).text())?;
    stage.nginx(0)?;
    let content = download::write(&stage, "file", FILE)?;
    let mut downloads = Vec::new();
    for vip in Stage::VIPS {
        downloads.push(Download::start(&stage, vip, "file", &content)?);
    }
    let before = link::mac(&stage.lab.backends[0], "eth0")?;
    let after = [2, 0, 0, 0, 0x77, 1];
    assert_ne!(before, after);
    link::set_mac(&stage.lab.backends[0], "eth0", after)?;
    for vip in Stage::VIPS {
        stage.until("an answer from the new address", |stage| {
            Ok(stage.curl_exit(vip, &["--max-time", "1"])? == Some(0))
        })?;
    }
    for download in downloads {
        download.finish(FILE)?;
    }
    stage.checksums_were_right()
}

/// Tables that know nothing of a connection, as after `lb detach` and a new start: it ends at once.
#[test]
fn a_connection_that_nobody_knows_is_reset() -> Result<()> {
    if !lab::possible("a_connection_that_nobody_knows_is_reset") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::new(options, &Web::of(options).text())?;
    stage.nginx(0)?;
    let mut connections = Vec::new();
    for vip in Stage::VIPS {
        let mut connection = connect(&stage, SocketAddr::new(vip, 80))?;
        assert!(ask(&mut connection)?.starts_with("HTTP/1.1 200"), "{vip}");
        connections.push(connection);
    }
    stage.lb(&["detach"])?;
    let status = stage.daemon.take().context("a daemon")?.wait()?;
    assert!(status.success(), "{status}");
    stage.start()?;
    for mut connection in connections {
        let peer = connection.peer_addr()?;
        let error = ask(&mut connection).expect_err("nobody knows it");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{peer}: {error}");
        stage.curl(peer.ip(), "/")?;
    }
    stage.checksums_were_right()
}

/// The server ends each connection, so that each port stays in TIME_WAIT for a minute (RFC 9293 section
/// 3.3.2). The port that was used longest ago is next, so that none of these is called while there are others:
/// a server may leave such a call unanswered.
#[test]
fn thousands_of_short_connections_never_call_a_port_in_time_wait() -> Result<()> {
    const CONNECTIONS: usize = 3000;
    if !lab::possible("thousands_of_short_connections_never_call_a_port_in_time_wait") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::new(options, &Web { top: "ports = \"20000-23999\"", ..Web::of(options) }.text())?;
    stage.nginx(0)?;
    for vip in Stage::VIPS {
        let address = SocketAddr::new(vip, 80);
        let failures = stage.lab.client.run(|| {
            let one = || -> std::io::Result<String> {
                let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
                stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer)
            };
            let answers = (0..CONNECTIONS).map(|number| (number, one()));
            answers
                .filter(|(_, answer)| !answer.as_ref().is_ok_and(|answer| answer.ends_with("backend 1\n")))
                .take(10)
                .map(|(number, answer)| format!("{number}: {answer:?}"))
                .collect::<Vec<_>>()
        })?;
        assert!(failures.is_empty(), "{vip}: {failures:#?}\n{}", stage.diagnosis());
        // Linux's own counter (proc_pid_net(5)).
        let again = stage.lab.client.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))??;
        let mut lines = again.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, numbers) = (lines.next().context("names")?, lines.next().context("numbers")?);
        let mut counters = names.split_whitespace().zip(numbers.split_whitespace());
        let again = counters.find(|(name, _)| *name == "TCPSynRetrans").context("a counter")?.1;
        assert_eq!(again, "0", "{vip}: SYNs that had to be sent again\n{}", stage.diagnosis());
    }
    stage.checksums_were_right()
}

/// A connection of the client.
fn connect(stage: &Stage, to: SocketAddr) -> Result<TcpStream> {
    let stream = stage.lab.client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10)))??;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

/// Sends a request; the first part of the answer.
fn ask(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")?;
    let mut answer = vec![0; 4096];
    let length = stream.read(&mut answer)?;
    answer.truncate(length);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
