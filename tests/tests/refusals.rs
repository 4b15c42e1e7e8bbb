//! What `lb run` refuses: it says why, and changes nothing.

use std::{fs, path::Path, process::Output};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{Xdp, XdpMode},
};
use lb_userspace::dataplane::kernel::GENERATOR;
use tests::{
    document::Web,
    stage::{Stage, lb, run},
};
use xtask::lab::{self, LabOptions, link};

/// `lb run` on the stage's document, which is to end by itself.
fn lb_run(stage: &Stage, arguments: &[&str]) -> Result<Output> {
    let (lb, document) = (lb(), stage.document());
    let lb_run = [lb.to_str().context("a path")?, "run", "--config", document.to_str().context("a path")?];
    run(&stage.lab.balancer, Path::new("timeout"), &[&["20"], &lb_run[..], arguments].concat())
}

/// It ends with this exit code and says all of this, and leaves everything as it was before.
fn refused(stage: &Stage, arguments: &[&str], code: i32, says: &[&str]) -> Result<()> {
    let before = stage.traces()?;
    let output = lb_run(stage, arguments)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "{}, not {code}: {text}", output.status);
    for part in says {
        ensure!(text.contains(part), "{part:?} is not in what it said:\n{text}");
    }
    assert_eq!(stage.changed_since(&before)?, [""; 0], "{says:?}");
    Ok(())
}

#[test]
fn documents_that_do_not_fit_are_refused_with_their_place() -> Result<()> {
    if !lab::possible("documents_that_do_not_fit_are_refused_with_their_place") {
        return Ok(());
    }
    let good = Web::of(LabOptions::default()).text();
    let stage = Stage::without_daemon(LabOptions::default(), &good)?;
    let line = |text: &str, of: &str| -> Result<usize> {
        Ok(1 + text.lines().position(|line| line.contains(of)).context("no such line")?)
    };
    for (from, to, at, says) in [
        ("\"back\"", "\"beck\"", "beck", &["beck"][..]),
        // The reply of such a backend would pass by the program.
        (", \"back\"", "", "10.2.0.10", &["back", "10.2.0.10"]),
        ("pool = \"web\"", "pool = \"web\"\nweigth = 3", "weigth", &["weigth"]),
        ("pool = \"web\"", "pool = \"wep\"", "\"wep\"", &["wep", "web"]),
        ("[2001:db8:113::10]:80/tcp", "203.0.113.10:80/tcp", "[services.shop6]", &["203.0.113.10:80/tcp"]),
        ("pool = \"web\"", "pool = \"web6\"", "[services.shop]", &["web6"]),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good);
        stage.write(&bad)?;
        let output = lb_run(&stage, &[])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // In the line itself, or below the heading of what it is about.
        let first = line(&bad, at)?;
        let placed = (first..first + 3).any(|line| text.contains(&format!("lobby.toml:{line}:")));
        assert!(placed, "line {first} is not in what it said:\n{text}");
        refused(&stage, &[], 2, says)?;
    }
    Ok(())
}

#[test]
fn a_second_daemon_is_refused() -> Result<()> {
    if !lab::possible("a_second_daemon_is_refused") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::new(options, &Web::of(options).text())?;
    stage.nginx(0)?;
    let pid = stage.daemon.as_ref().context("a daemon")?.id().to_string();
    refused(&stage, &[], 1, &["/run/lobby", &pid])?;
    // Another directory for its state, and other pins: the interfaces are still the same.
    for (bpffs, ephemeral) in [("/sys/fs/bpf", false), ("/run/other-bpf", false), ("/sys/fs/bpf", true)] {
        let mut arguments = vec!["--run-dir", "/run/other", "--bpffs", bpffs];
        arguments.extend(ephemeral.then_some("--ephemeral"));
        refused(&stage, &arguments, 1, &["interface", &pid])?;
    }
    for vip in Stage::VIPS {
        stage.curl(vip, "/")?;
    }
    stage.checksums_were_right()
}

#[test]
fn a_foreign_program_is_refused_and_named() -> Result<()> {
    if !lab::possible("a_foreign_program_is_refused_and_named") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, &Web::of(options).text())?;
    stage.nginx(0)?;
    let before = stage.traces()?;
    let back = link::index(&stage.lab.balancer, "back")?;
    let mut foreign = Ebpf::load(GENERATOR)?;
    let program: &mut Xdp = foreign.program_mut("empty").context("a program")?.try_into()?;
    program.load()?;
    stage.lab.balancer.run(|| program.attach_to_if_index(back, XdpMode::Driver))??;
    refused(&stage, &[], 2, &["back", "empty", "lobby.toml:1:24"])?;
    // Once it is gone there is nothing to refuse.
    drop(foreign);
    stage.until("its end", |stage| Ok(stage.traces()? == before))?;
    stage.start()?;
    for vip in Stage::VIPS {
        stage.curl(vip, "/")?;
    }
    stage.checksums_were_right()
}

#[test]
fn without_rights_it_says_which() -> Result<()> {
    if !lab::possible("without_rights_it_says_which") {
        return Ok(());
    }
    let stage = Stage::without_daemon(LabOptions::default(), &Web::of(LabOptions::default()).text())?;
    let before = stage.traces()?;
    let (lb, document) = (lb(), stage.document());
    let (lb, document) = (lb.to_str().context("a path")?, document.to_str().context("a path")?);
    let without = |arguments: &[&str]| {
        let drop = ["20", "setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", lb];
        run(&stage.lab.balancer, Path::new("timeout"), &[&drop, arguments].concat())
    };
    let output = without(&["run", "--config", document])?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("not permitted") && text.contains("CAP_BPF") && text.contains("sudo"), "{text}");
    assert_eq!(stage.changed_since(&before)?, [""; 0], "{text}");
    // Which is then what helps.
    let output = without(&["doctor", "--config", document])?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for right in ["CAP_BPF", "CAP_NET_ADMIN", "sudo lb"] {
        assert!(text.contains(right), "{text}");
    }
    Ok(())
}

#[test]
fn tables_of_another_layout_are_not_touched() -> Result<()> {
    if !lab::possible("tables_of_another_layout_are_not_touched") {
        return Ok(());
    }
    let stage = Stage::without_daemon(LabOptions::default(), &Web::of(LabOptions::default()).text())?;
    stage.lab.balancer.run(|| fs::create_dir_all("/sys/fs/bpf/lobby/layout-999/links"))??;
    refused(&stage, &[], 1, &["/sys/fs/bpf/lobby/layout-999", "another layout", "nothing was touched"])?;
    let path = "/sys/fs/bpf/lobby/layout-999/links".to_owned();
    assert!(stage.traces()?.contains(&path));
    Ok(())
}
