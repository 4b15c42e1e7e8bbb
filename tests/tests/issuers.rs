//! Keys of tokens that are had from their issuer: where it cannot be reached, where it changes them, and where it is gone.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use tests::{
    authority::Authority,
    document::backend_v4,
    stage::{Stage, lb, run},
    tokens::{claims, key_set, token},
};
use xtask::lab::{self, LabOptions, Proc};

const FIRST: &str = "c0ffee5e0f8a9d1b7c4f6e2d3a90817263545362718";
const SECOND: &str = "decaf90817263545362718c0ffee5e0f8a9d1b7c4f6e2d3a";

/// What a client with a token gets: a status.
fn ask(stage: &Stage, name: &str, secret: &str) -> Result<String> {
    let head = format!(r#"{{"alg":"HS256","kid":"{name}"}}"#);
    let bearer =
        format!("Authorization: Bearer {}", token(secret, &head, &claims("customer", "shop", 3600)?));
    let url = "http://203.0.113.10/pay";
    let output = stage.try_curl(&["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", &bearer, url])?;
    Ok(String::from_utf8(output.stdout)?)
}

fn alarms(stage: &Stage) -> Result<String> {
    Ok(stage.json(&["status"])?["status"]["alarms"].to_string())
}

/// How often keys were fetched with this outcome.
fn fetches(stage: &Stage, outcome: &str) -> Result<u64> {
    let metrics = stage.metrics()?;
    let name = format!("lobby_desk_key_fetches_total{{outcome=\"{outcome}\"}} ");
    let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
    Ok(count.with_context(|| metrics.clone())?.parse()?)
}

/// Applies a document, which must be refused with all of this; nothing changes.
fn refused(stage: &Stage, document: &str, wanted: &[&str]) -> Result<()> {
    let before = std::fs::read_to_string(stage.document())?;
    let file = stage.directory().join("next.toml");
    std::fs::write(&file, document)?;
    for verb in ["plan", "apply"] {
        let output = run(&stage.lab.balancer, &lb(), &[verb, &file.display().to_string()])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && wanted.iter().all(|it| said.contains(it)), "{verb}: {said}");
    }
    ensure!(std::fs::read_to_string(stage.document())? == before, "the document has changed");
    Ok(())
}

#[test]
fn keys_are_had_from_their_issuer() -> Result<()> {
    if !lab::possible("keys_are_had_from_their_issuer") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let server = backend_v4(options, 1);
    let (host, _) = server.split_once(':').context("a port")?;
    let address = format!("{host}:8443");
    let document = |auth: &str| {
        format!(
            "interfaces = [\"front\", \"back\"]\nmetrics = \"127.0.0.1:9100\"\n[pools.web]\nbackends = [ {{ address = \"{}\" }} ]\n\
             [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n\
             [[services.shop.routes]]\npath = \"/pay\"\npool = \"web\"\n{auth}\n",
            backend_v4(options, 0)
        )
    };
    let refreshed = |path: &str, ca: &str, refresh: &str| {
        document(&format!(
            "auth = {{ jwt = {{ jwks_url = {{ url = \"https://{address}{path}\", ca = \"{ca}\", refresh = \"{refresh}\" }}, audience = \"shop\" }} }}"
        ))
    };
    // Nothing but what is asked for by a token, at first.
    let by = |path: &str, ca: &str| refreshed(path, ca, "1h");
    let mut stage = Stage::without_daemon(options, &document(""))?;
    let directory = stage.directory().to_owned();
    let file = |name: &str| directory.join(name);
    let (ours, others) = (Authority::new()?, Authority::new()?);
    let shown = ours.server(host)?;
    for (name, text) in [
        ("ca.pem", &ours.pem),
        ("other-ca.pem", &others.pem),
        ("id.pem", &shown.chain),
        ("id.key", &shown.key),
        ("keys.json", &key_set("one", FIRST)),
    ] {
        std::fs::write(file(name), text)?;
    }
    std::fs::write(file("issuer.py"), include_str!("../src/issuer.py"))?;
    let start = |stage: &Stage| -> Result<Proc> {
        let mut command = stage.lab.backends[1].command("python3");
        command.arg(file("issuer.py")).arg(&address).args([
            file("keys.json"),
            file("id.pem"),
            file("id.key"),
        ]);
        let issuer = Proc::start(command)?;
        stage.lab.backends[1].wait_for_tcp(address.parse()?)?;
        Ok(issuer)
    };
    stage.nginx(0)?;
    std::fs::write(file("pay"), "thanks\n")?;
    stage.start()?;

    // Nobody is there, or nobody who could be believed, or no keys: refused in its place, and nothing changes.
    let place = format!("no keys from https://{address}");
    refused(&stage, &by("/jwks.json", "ca.pem"), &[&place, "refused", "11:8", "jwks_uri"])?;
    let issuer = start(&stage)?;
    refused(&stage, &by("/jwks.json", "other-ca.pem"), &[&place, "certificate", "11:8"])?;
    refused(&stage, &by("/other", "ca.pem"), &[&place, "404", "11:8"])?;
    std::fs::write(file("keys.json"), "<html>")?;
    refused(&stage, &by("/jwks.json", "ca.pem"), &[&place, "no JSON", "11:8"])?;
    std::fs::write(file("keys.json"), key_set("one", FIRST))?;
    assert_eq!(
        (fetches(&stage, "failure")?, fetches(&stage, "success")?),
        (8, 0),
        "once for each plan and apply"
    );

    std::fs::write(file("next.toml"), by("/elsewhere", "ca.pem"))?;
    stage.lb(&["apply", &file("next.toml").display().to_string()])?;
    assert_eq!((fetches(&stage, "failure")?, fetches(&stage, "success")?), (8, 1));
    stage.until("who has a token comes in", |stage| Ok(ask(stage, "one", FIRST)? == "200"))?;
    assert_eq!(ask(&stage, "one", SECOND)?, "401");
    assert_eq!(alarms(&stage)?, "[]");

    // Another key: asked for by a token, and then there.
    std::fs::write(file("keys.json"), key_set("two", SECOND))?;
    stage.until("the new key is known", |stage| Ok(ask(stage, "two", SECOND)? == "200"))?;
    assert_eq!(ask(&stage, "one", FIRST)?, "401", "the old one holds no more");
    ensure!(fetches(&stage, "failure")? == 8 && fetches(&stage, "success")? >= 2, "{}", stage.metrics()?);

    // By itself, too, where the document says so.
    std::fs::write(file("next.toml"), refreshed("/elsewhere", "ca.pem", "15s"))?;
    stage.lb(&["apply", &file("next.toml").display().to_string()])?;

    // What it gives out is nothing, or it is gone: what was there holds, and somebody is told.
    std::fs::write(file("keys.json"), "[]")?;
    stage.until("an alarm", |stage| Ok(alarms(stage)?.contains("it is no set of keys")))?;
    drop(issuer);
    stage.until("another alarm", |stage| {
        Ok(alarms(stage)?.contains("os error 111); those from before still hold"))
    })?;
    assert_eq!(ask(&stage, "two", SECOND)?, "200");
    ensure!(fetches(&stage, "failure")? >= 10, "{}", stage.metrics()?);
    // It hinders no change of something else.
    stage.lb(&["backend", "add", "web", &backend_v4(options, 1)])?;
    stage.lb(&["backend", "remove", "web", &backend_v4(options, 1)])?;

    // A daemon that starts meanwhile serves everything else, and this once the issuer is there again.
    drop(stage.daemon.take());
    stage.start()?;
    stage.until("the daemon's own desk", |stage| Ok(ask(stage, "two", SECOND)? == "503"))?;
    assert!(alarms(&stage)?.contains("nobody comes in by them"), "{}", alarms(&stage)?);
    assert_eq!(stage.curl(Stage::VIPS[0], "/")?, "backend 1\n");
    std::fs::write(file("keys.json"), key_set("two", SECOND))?;
    let _issuer = start(&stage)?;
    stage.until("keys again", |stage| Ok(ask(stage, "two", SECOND)? == "200"))?;
    stage.until("no alarm", |stage| Ok(alarms(stage)? == "[]"))?;
    ensure!(fetches(&stage, "failure")? >= 1 && fetches(&stage, "success")? >= 1, "{}", stage.metrics()?);
    let everything = stage.log() + &stage.json(&["status"])?.to_string();
    assert!(![FIRST, SECOND].iter().any(|secret| everything.contains(secret)), "a secret is seen");
    let explained = run(&stage.lab.balancer, Path::new(&lb()), &["route", "list"])?;
    assert!(String::from_utf8_lossy(&explained.stdout).contains("jwt for shop"), "{explained:?}");
    Ok(())
}
