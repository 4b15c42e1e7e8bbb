//! What is left after Lobby: everything where that is wanted, else nothing.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use tests::{
    document::Web,
    stage::{Stage, lb, run},
};
use xtask::lab::{self, LabOptions};

const OPTIONS: LabOptions = LabOptions { backends: 1, two_interfaces: true, ipv6: true, bpffs: true };

/// A stage without a daemon, and what it looks like before there was one.
fn untouched(options: LabOptions) -> Result<(Stage, BTreeSet<String>)> {
    let mut stage = Stage::without_daemon(options, &Web::of(options).text())?;
    stage.nginx(0)?;
    let before = stage.traces()?;
    Ok((stage, before))
}

fn serves(stage: &Stage) -> Result<()> {
    for vip in Stage::VIPS {
        assert_eq!(stage.curl(vip, "/")?, "backend 1\n");
    }
    Ok(())
}

fn serves_no_more(stage: &Stage) -> Result<()> {
    for vip in Stage::VIPS {
        assert_ne!(stage.curl_exit(vip, &["--max-time", "1"])?, Some(0), "{vip}");
    }
    Ok(())
}

fn ends(stage: &mut Stage, signal: Option<Signal>) -> Result<()> {
    let mut daemon = stage.daemon.take().context("a daemon")?;
    if let Some(signal) = signal {
        daemon.signal(signal)?;
    }
    let status = daemon.wait()?;
    assert!(status.success(), "{status}\n{}", stage.log());
    Ok(())
}

#[test]
fn an_ephemeral_daemon_leaves_nothing() -> Result<()> {
    if !lab::possible("an_ephemeral_daemon_leaves_nothing") {
        return Ok(());
    }
    for bpffs in [true, false] {
        let (mut stage, before) = untouched(LabOptions { bpffs, ..OPTIONS })?;
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            stage.start_with(&["--ephemeral"])?;
            serves(&stage)?;
            ends(&mut stage, Some(signal))?;
            serves_no_more(&stage)?;
            assert_eq!(stage.changed_since(&before)?, [""; 0], "{signal}");
        }
    }
    Ok(())
}

#[test]
fn detach_leaves_nothing_with_a_daemon_and_without() -> Result<()> {
    if !lab::possible("detach_leaves_nothing_with_a_daemon_and_without") {
        return Ok(());
    }
    let (mut stage, before) = untouched(OPTIONS)?;
    // The daemon does it itself and ends.
    stage.start()?;
    serves(&stage)?;
    stage.lb(&["detach"])?;
    ends(&mut stage, None)?;
    serves_no_more(&stage)?;
    assert_eq!(stage.changed_since(&before)?, [""; 0], "with a daemon");
    // After one that ended in order, and went on forwarding.
    stage.start()?;
    ends(&mut stage, Some(Signal::SIGTERM))?;
    let log = stage.log();
    let last = log.lines().last().unwrap_or_default();
    assert!(last.contains("nobody checks health"), "{log}");
    serves(&stage)?;
    let status = run(&stage.lab.balancer, &lb(), &["status"])?;
    let said = String::from_utf8_lossy(&status.stderr).into_owned();
    assert_eq!(status.status.code(), Some(3), "{said}");
    assert!(said.contains("forwarded as the last one left it (pinned in /sys/fs/bpf)"), "{said}");
    let doctor = run(&stage.lab.balancer, &lb(), &["doctor", "--json"])?;
    let findings: serde_json::Value = serde_json::from_slice(&doctor.stdout)?;
    let left = findings.as_array().context("findings")?.iter().find(|it| it["subject"] == "daemon");
    assert!(left.is_some_and(|it| it["verdict"] == "warning"), "{findings:#}");
    stage.lb(&["detach"])?;
    serves_no_more(&stage)?;
    assert_eq!(stage.changed_since(&before)?, [""; 0], "after SIGTERM");
    // After one that crashed.
    stage.start()?;
    stage.daemon.take().context("a daemon")?.kill()?;
    serves(&stage)?;
    // Who looks in the wrong place is not told that all is gone.
    let elsewhere = tempfile::tempdir()?;
    let wrong = stage.lb(&["detach", "--bpffs", &elsewhere.path().display().to_string()]).unwrap_err();
    assert!(format!("{wrong:#}").contains("goes on forwarding on front"), "{wrong:#}");
    serves(&stage)?;
    stage.lb(&["detach"])?;
    serves_no_more(&stage)?;
    assert_eq!(stage.changed_since(&before)?, [""; 0], "after a crash");
    // Nothing is left to take down.
    let status = run(&stage.lab.balancer, &lb(), &["status"])?;
    assert!(!String::from_utf8_lossy(&status.stderr).contains("left it"), "{status:?}");
    assert!(stage.lb(&["detach"])?.contains("nothing"));
    assert_eq!(stage.changed_since(&before)?, [""; 0]);
    Ok(())
}

/// An address that the host had before is not Lobby's to take away.
#[test]
fn addresses_that_were_there_stay() -> Result<()> {
    if !lab::possible("addresses_that_were_there_stay") {
        return Ok(());
    }
    let (mut stage, _) = untouched(OPTIONS)?;
    for (vip, prefix) in Stage::VIPS.into_iter().zip([32, 128]) {
        lab::link::address(&stage.lab.balancer, "front", vip, prefix)?;
    }
    let before = stage.traces()?;
    stage.start()?;
    serves(&stage)?;
    ends(&mut stage, Some(Signal::SIGTERM))?;
    serves(&stage)?;
    stage.lb(&["detach"])?;
    assert_eq!(stage.changed_since(&before)?, [""; 0]);
    Ok(())
}
