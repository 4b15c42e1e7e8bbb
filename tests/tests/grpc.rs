//! gRPC through the desk: a client and servers by the library that most use, behind the program, over TLS on both sides.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use tests::{
    authority::Authority,
    document::backend_v4,
    stage::{Stage, run},
};
use xtask::lab::{self, LabOptions, Proc};

/// The one that Debian's packages are for; another may come first on `PATH`.
const PYTHON: &str = "/usr/bin/python3";

/// Writes an authority, and a certificate by it with its key, into files of these names.
fn certificates(directory: &Path, authority: &str, name: &str) -> Result<()> {
    let root = Authority::new()?;
    std::fs::write(directory.join(authority), &root.pem)?;
    let shown = root.server(name)?;
    std::fs::write(directory.join(format!("{name}.pem")), shown.chain)?;
    std::fs::write(directory.join(format!("{name}.key")), shown.key)?;
    Ok(())
}

/// The lines that the client prints.
fn call(stage: &Stage, calls: &[&str]) -> Result<Vec<String>> {
    let directory = stage.directory();
    let (script, believed) = (directory.join("client.py"), directory.join("front-ca.pem"));
    let (script, believed) = (script.display().to_string(), believed.display().to_string());
    let same = [script.as_str(), "203.0.113.10:443", believed.as_str(), "front.example"];
    let output = run(&stage.lab.client, Path::new(PYTHON), &[&same[..], calls].concat())?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

#[test]
fn calls_of_all_kinds_go_through() -> Result<()> {
    if !lab::possible("calls_of_all_kinds_go_through") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let servers = [backend_v4(options, 0), backend_v4(options, 1)];
    let document = |extra: &str| {
        format!(
            "interfaces = [\"front\", \"back\"]\n\
             [pools.shop]\nprotocol = \"h2\"\ntls = {{ host = \"shop.internal\", ca = \"shop-ca.pem\" }}\n\
             backends = [ {{ address = \"{}\"{extra} }}, {{ address = \"{}\"{extra} }} ]\n\
             [services.shop]\nlisten = \"203.0.113.10:443/tcp\"\n\
             tls = {{ cert = \"front.example.pem\", key = \"front.example.key\" }}\n\
             timeouts = {{ response = \"2s\" }}\n\
             [[services.shop.routes]]\npath = \"/shop.Shop\"\npool = \"shop\"\n",
            servers[0], servers[1],
        )
    };
    let mut stage = Stage::without_daemon(options, &document(""))?;
    let directory = stage.directory().to_owned();
    certificates(&directory, "front-ca.pem", "front.example")?;
    certificates(&directory, "shop-ca.pem", "shop.internal")?;
    std::fs::write(directory.join("server.py"), include_str!("../src/grpc/server.py"))?;
    std::fs::write(directory.join("client.py"), include_str!("../src/grpc/client.py"))?;
    let mut running = Vec::new();
    for (number, server) in servers.iter().enumerate() {
        let mut command = stage.lab.backends[number].command(PYTHON);
        command.arg(directory.join("server.py")).args([server, &format!("backend {number}")]);
        command.args([directory.join("shop.internal.pem"), directory.join("shop.internal.key")]);
        running.push(Proc::start(command)?);
        stage.lab.backends[number].wait_for_tcp(server.parse()?)?;
    }
    stage.start()?;
    let all = ["say", "large", "turns", "fail", "late", "who", "count", "add"];
    let wanted = [
        "say GOOD DAY 1",
        "large 3000000",
        "turns [3, 2, 27000]",
        "fail FAILED_PRECONDITION not today: zuerich",
        "late DEADLINE_EXCEEDED Deadline Exceeded",
        "who x-asked x-forwarded-for x-forwarded-host x-forwarded-proto x-request-id",
        "count 499500",
        "add 124750",
    ];
    assert_eq!(call(&stage, &all)?, wanted, "{}", stage.log());
    // What the desk itself has to say is said as gRPC says it.
    let own = call(&stage, &["unknown", "slow"])?;
    assert!(own[0].starts_with("unknown UNIMPLEMENTED No such room"), "{own:?}");
    assert!(own[1].starts_with("slow DEADLINE_EXCEEDED No answer in time"), "{own:?}");
    // Another authority: the servers are not believed any more, until it is the right one again.
    let right = std::fs::read(directory.join("shop-ca.pem"))?;
    std::fs::copy(directory.join("front-ca.pem"), directory.join("shop-ca.pem"))?;
    let says = |stage: &Stage, beginning: &str| {
        stage.until(beginning, |stage| Ok(call(stage, &["say"])?[0].starts_with(beginning)))
    };
    says(&stage, "say UNAVAILABLE Somebody else is behind this door")?;
    // A file that is of no use changes nothing and is told.
    std::fs::write(directory.join("shop-ca.pem"), "none")?;
    stage.until("an alarm", |stage| {
        let status = stage.json(&["status"])?;
        let alarms = status["status"]["alarms"].as_array().context("a list")?;
        Ok(alarms.iter().any(|alarm| alarm.to_string().contains("shop-ca.pem")))
    })?;
    says(&stage, "say UNAVAILABLE Somebody else is behind this door")?;
    std::fs::write(directory.join("shop-ca.pem"), right)?;
    says(&stage, "say GOOD DAY")?;
    stage.write(&document(", drain = true"))?;
    says(&stage, "say UNAVAILABLE This room is being closed")?;
    Ok(())
}

/// A document whose authority is not there is refused in its place.
#[test]
fn an_authority_that_is_none_is_refused() -> Result<()> {
    if !lab::possible("an_authority_that_is_none_is_refused") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let document = |tls: &str| {
        format!(
            "interfaces = [\"front\", \"back\"]\n[pools.shop]\nbackends = [ {{ address = \"{}\" }} ]\n{tls}\n\
             [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\n\
             [[services.shop.routes]]\npool = \"shop\"\n",
            backend_v4(options, 0)
        )
    };
    let stage = Stage::new(options, &document(""))?;
    for (text, why, remedy) in [
        ("", "ca.pem cannot be read", "name a file that is there"),
        ("none", "there is no certificate in PEM form in it", "PEM file with the certificate of who signs"),
    ] {
        if !text.is_empty() {
            std::fs::write(stage.directory().join("ca.pem"), text)?;
        }
        stage.write(&document(&format!("tls = {{ host = \"shop.internal\", ca = \"ca.pem\" }} # {text}")))?;
        stage.until(why, |stage| {
            let status = stage.json(&["status"])?;
            let refused = status["status"]["document"]["refused"].as_str().unwrap_or_default().to_owned();
            Ok(refused.contains(why) && refused.contains(":4:7: error") && refused.contains(remedy))
        })?;
    }
    Ok(())
}
