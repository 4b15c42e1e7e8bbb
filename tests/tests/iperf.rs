//! iperf3 through the program, to a service on all ports of its address: TCP and UDP, both directions, both
//! families; and UDP as its own clients see it.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use tests::stage::{Stage, run};
use xtask::lab::{self, LabOptions, Proc};

/// All ports of both addresses, TCP and UDP, to the one backend: iperf3 wants all its connections there.
const DOCUMENT: &str = r#"
interfaces = ["front", "back"]
[pools.all]
backends = [{ address = "10.2.0.10" }]
[pools.all6]
backends = [{ address = "fd00:2::10" }]
[services.tcp]
listen = "203.0.113.10:*/tcp"
pool = "all"
[services.udp]
listen = "203.0.113.10:*/udp"
pool = "all"
[services.tcp6]
listen = "[2001:db8:113::10]:*/tcp"
pool = "all6"
[services.udp6]
listen = "[2001:db8:113::10]:*/udp"
pool = "all6"
"#;

/// What iperf3 says of a run.
fn iperf3(stage: &Stage, vip: IpAddr, arguments: &[&str]) -> Result<serde_json::Value> {
    let vip = vip.to_string();
    // Ends by itself, whatever happens.
    let arguments = [&["60", "iperf3", "--client", &vip, "--json"], arguments].concat();
    let mut text = String::new();
    for _ in 0..3 {
        let output = run(&stage.lab.client, Path::new("timeout"), &arguments)?;
        text = String::from_utf8_lossy(&output.stdout).into_owned();
        let status = output.status;
        ensure!(status.success(), "iperf3 {arguments:?}: {status} {text}\n{}", stage.diagnosis());
        let report: serde_json::Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        // Without figures both ends have not agreed on them in time, as on a busy machine: asked for again.
        if report["end"]["sum"].is_object() || report["end"]["sum_received"].is_object() {
            return Ok(report);
        }
    }
    bail!("iperf3 {arguments:?} gives no figures: {text}")
}

#[test]
fn iperf3_to_all_ports() -> Result<()> {
    const BYTES: u64 = 64 << 20;
    if !lab::possible("iperf3_to_all_ports") {
        return Ok(());
    }
    let stage = Stage::new(LabOptions { backends: 1, ..LabOptions::default() }, DOCUMENT)?;
    let backend = &stage.lab.backends[0];
    let mut command = backend.command("iperf3");
    command.arg("--server").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Proc::start(command)?;
    backend.wait_for_tcp(SocketAddr::new(stage.lab.backend_v4(0).into(), 5201))?;
    let bytes = BYTES.to_string();
    for vip in Stage::VIPS {
        for direction in [&[][..], &["--reverse"]] {
            let report = iperf3(&stage, vip, &[direction, &["--bytes", &bytes, "--parallel", "4"]].concat())?;
            let received = report["end"]["sum_received"]["bytes"].as_u64();
            let received = received.with_context(|| report.to_string())?;
            // What is still in buffers when all is sent does not count.
            assert!(received >= BYTES / 4, "{vip} {direction:?}: {received} bytes of TCP");

            let udp = ["--udp", "--bandwidth", "20M", "--bytes", "2M", "--length", "1200"];
            let report = iperf3(&stage, vip, &[direction, &udp].concat())?;
            let (packets, lost) = (&report["end"]["sum"]["packets"], &report["end"]["sum"]["lost_packets"]);
            let (packets, lost) = (packets.as_u64().context("packets")?, lost.as_u64().context("lost")?);
            // A busy machine may lose some by itself.
            assert!(packets > 1000 && lost * 10 < packets, "{vip} {direction:?}: {lost} of {packets} lost");
        }
    }
    for place in stage.lab.places() {
        assert_eq!(place.snmp("Udp", "InCsumErrors")?, 0, "{}", place.name());
    }
    stage.checksums_were_right()
}

/// Answers come from the address and the port that were asked, and go to who asked.
#[test]
fn udp_answers_come_from_where_was_asked() -> Result<()> {
    if !lab::possible("udp_answers_come_from_where_was_asked") {
        return Ok(());
    }
    let stage = Stage::new(LabOptions { backends: 1, ..LabOptions::default() }, DOCUMENT)?;
    let patience = Some(Duration::from_secs(10));
    for vip in Stage::VIPS {
        let any = |port| SocketAddr::new(if vip.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, port);
        let server = stage.lab.backends[0].run(|| UdpSocket::bind(any(5300)))??;
        server.set_read_timeout(patience)?;
        let clients: Vec<UdpSocket> =
            (0..50).map(|_| Ok(stage.lab.client.run(|| UdpSocket::bind(any(0)))??)).collect::<Result<_>>()?;
        let mut buffer = [0; 2048];
        for (number, client) in clients.iter().enumerate() {
            client.set_read_timeout(patience)?;
            // Of every length up to a full packet, odd ones too.
            let question = vec![number as u8; 1 + number * 29];
            client.send_to(&question, SocketAddr::new(vip, 5300))?;
            let (length, from) = server.recv_from(&mut buffer)?;
            assert_eq!(buffer[..length], question);
            let balancer: IpAddr =
                if vip.is_ipv4() { stage.lab.back_v4().into() } else { stage.lab.back_v6().into() };
            assert_eq!(from.ip(), balancer, "the backend sees the balancer");
            server.send_to(&[&question[..], b" yes"].concat()[..length.min(1400)], from)?;
        }
        // Each gets its own, though they were given together.
        for (number, client) in clients.iter().enumerate() {
            let (length, from) = client.recv_from(&mut buffer)?;
            assert_eq!(from, SocketAddr::new(vip, 5300));
            assert!(buffer[..length].starts_with(&[number as u8]), "{number}: {:?}", &buffer[..length]);
        }
    }
    for place in stage.lab.places() {
        assert_eq!(place.snmp("Udp", "InCsumErrors")?, 0, "{}", place.name());
    }
    Ok(())
}
