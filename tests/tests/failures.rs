//! What the command line says when it fails: of which file, to whom (people, or programs), and by which exit code.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    document::Web,
    stage::{Stage, lb, run},
};
use xtask::lab::{self, LabOptions};

/// What is said on standard error, of a command that ends by that exit code and says nothing else.
fn said(output: &Output, code: i32) -> Result<String> {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{}, not {code}: {error}", output.status);
    ensure!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(error)
}

/// A service with a certificate, of files with these names.
fn with_certificate(cert: &str, key: &str) -> String {
    format!(
        "interfaces = [\"eth0\"]\n[pools.web]\nbackends = [ {{ address = \"10.0.0.11:80\" }} ]\n\
         [services.shop]\nlisten = \"203.0.113.10:443/tcp\"\n\
         tls = {{ cert = \"{cert}\", key = \"{key}\" }}\n\
         routes = [ {{ pool = \"web\" }} ]\n"
    )
}

#[test]
fn without_a_daemon_programs_hear_so_too() -> Result<()> {
    let nobody = tempfile::tempdir()?;
    let ask = |more: &[&str]| {
        Command::new(lb()).arg("--run-dir").arg(nobody.path()).arg("status").args(more).output()
    };
    let text = said(&ask(&[])?, 3)?;
    assert!(text.starts_with("error: no lb daemon is running"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&said(&ask(&["--json"])?, 3)?)?;
    assert_eq!(Some(json["error"].as_str().context("an error")?), text.trim_end().strip_prefix("error: "));
    Ok(())
}

#[test]
fn a_check_looks_at_the_files_that_a_document_names() -> Result<()> {
    let place = tempfile::tempdir()?;
    let file = place.path().join("lb.toml");
    let check = |more: &[&str]| Command::new(lb()).arg("check").arg(&file).args(more).output();
    let write = |name: &str, text: &str| fs::write(place.path().join(name), text);
    let [one, other] = [0, 1].map(|_| rcgen::generate_simple_self_signed(["shop.example".to_owned()]));
    let (one, other) = (one?, other?);
    write("one.pem", &one.cert.pem())?;
    write("one.key", &one.signing_key.serialize_pem())?;
    write("other.key", &other.signing_key.serialize_pem())?;
    for (key, says) in [("none.key", "none.key cannot be read"), ("other.key", "other.key: ")] {
        write("lb.toml", &with_certificate("one.pem", key))?;
        let text = said(&check(&[])?, 2)?;
        assert!(text.contains("lb.toml:6:") && text.contains(says), "{text}");
        assert!(text.trim_end().ends_with("lb.toml has 1 mistake"), "{text}");
        let output = check(&["--no-files"])?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json: serde_json::Value = serde_json::from_slice(&check(&["--json"])?.stdout)?;
        assert_eq!((json[0]["line"].as_u64(), json[0]["severity"].as_str()), (Some(6), Some("error")));
    }
    write("lb.toml", &with_certificate("one.pem", "one.key"))?;
    let output = check(&[])?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What only the daemon can know of a document is said with the name of the file that it was asked about.
#[test]
fn what_the_daemon_finds_in_a_file_is_said_with_that_files_name() -> Result<()> {
    if !lab::possible("what_the_daemon_finds_in_a_file_is_said_with_that_files_name") {
        return Ok(());
    }
    let good = Web::of(LabOptions::default()).text();
    let stage = Stage::new(LabOptions::default(), &good)?;
    let other = stage.directory().join("other.toml");
    fs::write(&other, good.replacen("\"back\"", "\"beck\"", 1))?;
    let other = other.to_str().context("a path")?;
    for command in ["plan", "apply"] {
        let ask = |more: &[&str]| run(&stage.lab.balancer, &lb(), &[&[command, other], more].concat());
        let text = said(&ask(&[])?, 2)?;
        assert!(text.starts_with(&format!("{other}:1:")) && !text.contains("lobby.toml"), "{text}");
        assert!(text.contains("there is no interface \"beck\""), "{text}");
        let json: serde_json::Value = serde_json::from_str(&said(&ask(&["--json"])?, 2)?)?;
        assert_eq!(json["complaints"][0]["line"], 1, "{json}");
        assert_eq!(json["complaints"][0]["message"], "there is no interface \"beck\"", "{json}");
    }
    assert_eq!(fs::read_to_string(stage.document())?, good);
    let refused =
        run(&stage.lab.balancer, Path::new(&lb()), &["backend", "remove", "web", "10.9.9.9:1", "--json"])?;
    let json: serde_json::Value = serde_json::from_str(&said(&refused, 1)?)?;
    assert!(json["error"].as_str().is_some_and(|why| why.contains("10.9.9.9:1")), "{json}");
    Ok(())
}

/// A document comes into force though another program has the port of one of its services: who puts it there is told.
#[test]
fn who_brings_an_alarm_about_is_told_of_it() -> Result<()> {
    if !lab::possible("who_brings_an_alarm_about_is_told_of_it") {
        return Ok(());
    }
    let good = Web::of(LabOptions::default()).text();
    let stage = Stage::new(LabOptions::default(), &good)?;
    let _other = stage.lab.balancer.run(|| std::net::TcpListener::bind("10.1.0.1:85"))??;
    let service = "[services.page]\nlisten = \"10.1.0.1:85/tcp\"\nroutes = [ { respond = 404 } ]\n";
    let file = stage.directory().join("other.toml");
    fs::write(&file, format!("{good}\n{service}"))?;
    let said = stage.lb(&["apply", file.to_str().context("a path")?])?;
    assert!(said.contains("the desk cannot listen on 10.1.0.1:85: Address already in use"), "{said}");
    Ok(())
}
