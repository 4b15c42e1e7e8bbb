//! Connections outlive whatever happens to the pool, to the document and to the daemon.

use anyhow::Result;
use nix::sys::signal::Signal;
use tests::{
    document::{Web, backend_v4, backend_v6},
    download::{self, Download},
    stage::{RESET, Stage},
};
use xtask::lab::{self, LabOptions};

/// What each download reads while one thing happens.
const STEP: usize = 2 << 20;
/// More than all steps together.
const FILE: usize = 48 << 20;

/// Downloads over both families, from each of the first three backends.
struct Downloads(Vec<Download>);

impl Downloads {
    fn start(stage: &Stage, content: &std::sync::Arc<Vec<u8>>) -> Result<Self> {
        let mut downloads = Vec::new();
        for vip in Stage::VIPS {
            // One after the other, so each has its turn.
            for _ in 0..3 {
                downloads.push(Download::start(stage, vip, "file", content)?);
            }
            let mut backends: Vec<_> = downloads.iter().rev().take(3).map(|d| d.backend).collect();
            backends.sort_unstable();
            assert_eq!(backends, [0, 1, 2], "{vip}");
        }
        Ok(Self(downloads))
    }

    /// While all of them read, something happens; then each goes on reading, and a new client is served.
    fn through<T>(&mut self, stage: &mut Stage, what: impl FnOnce(&mut Stage) -> Result<T>) -> Result<T> {
        for download in &self.0 {
            download.allow(STEP);
        }
        let outcome = what(stage)?;
        self.go_on(stage)?;
        Ok(outcome)
    }

    fn go_on(&mut self, stage: &Stage) -> Result<()> {
        for download in &mut self.0 {
            download.arrives(stage)?;
            download.allow(STEP / 4);
            download.arrives(stage)?;
        }
        for vip in Stage::VIPS {
            stage.curl(vip, "/")?;
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        self.0.into_iter().try_for_each(|download| download.finish(FILE))
    }
}

/// Both pools and the backend's address in each.
fn backend(options: LabOptions, number: usize) -> [(&'static str, String); 2] {
    [("web", backend_v4(options, number)), ("web6", backend_v6(options, number))]
}

fn revision(stage: &Stage) -> Result<String> {
    Ok(stage.json(&["status"])?["status"]["document"]["revision"].as_str().expect("a text").to_owned())
}

/// What `/` answers, asked so often that every backend of three or four has its turn.
fn answers(stage: &Stage) -> Result<std::collections::BTreeSet<String>> {
    let mut answers = std::collections::BTreeSet::new();
    for vip in Stage::VIPS {
        for _ in 0..12 {
            answers.insert(stage.curl(vip, "/")?.trim().to_owned());
        }
    }
    Ok(answers)
}

const WITH_CHECKS: &str = "health = { http = \"/fit\", interval = \"300ms\", rise = 1, fall = 3 }";

/// A stage with three backends in use and a fourth that is not yet.
fn prepared(options: LabOptions) -> Result<(Stage, std::sync::Arc<Vec<u8>>)> {
    let web =
        Web { backends: 3, pool: WITH_CHECKS, service: "scheduler = \"round-robin\"", ..Web::of(options) };
    let mut stage = Stage::without_daemon(options, &web.text())?;
    for number in 0..options.backends {
        stage.nginx(number)?;
    }
    stage.start()?;
    for pool in ["web", "web6"] {
        stage.until_states(pool, &["healthy"; 3])?;
    }
    let content = download::write(&stage, "file", FILE)?;
    Ok((stage, content))
}

#[test]
fn downloads_outlive_changes_of_the_pool() -> Result<()> {
    if !lab::possible("downloads_outlive_changes_of_the_pool") {
        return Ok(());
    }
    let options = LabOptions { backends: 4, ..LabOptions::default() };
    let (mut stage, content) = prepared(options)?;
    let mut downloads = Downloads::start(&stage, &content)?;
    let all = ["backend 1", "backend 2", "backend 3", "backend 4"];

    downloads.through(&mut stage, |stage| {
        for (pool, address) in backend(options, 3) {
            stage.lb(&["backend", "add", pool, &address])?;
            stage.until_states(pool, &["healthy"; 4])?;
        }
        Ok(())
    })?;
    assert!(answers(&stage)?.iter().eq(all), "added");

    downloads.through(&mut stage, |stage| {
        for (pool, address) in backend(options, 0) {
            stage.lb(&["backend", "drain", pool, &address])?;
        }
        Ok(())
    })?;
    assert!(answers(&stage)?.iter().eq(&all[1..]), "drained");
    let states: Vec<_> =
        stage.json(&["backend", "list", "--pool", "web"])?.as_array().expect("a list").clone();
    assert_eq!(states[0]["state"], "draining", "its download has not ended");
    for shown in [["service", "show", "shop"], ["pool", "show", "web"]] {
        let shown = stage.json(&shown)?;
        assert_eq!(shown["backends"], 4, "{shown}");
        assert_eq!(shown["backend_list"][0]["state"], "draining", "{shown}");
    }

    downloads.through(&mut stage, |stage| {
        for (pool, address) in backend(options, 1) {
            stage.lb(&["backend", "weight", pool, &address, "0"])?;
        }
        Ok(())
    })?;
    assert!(answers(&stage)?.iter().eq(&all[2..]), "without weight");

    downloads.through(&mut stage, |stage| {
        for number in [0, 1] {
            for (pool, address) in backend(options, number) {
                if number == 0 {
                    stage.lb(&["backend", "resume", pool, &address])?;
                } else {
                    stage.lb(&["backend", "weight", pool, &address, "3"])?;
                }
            }
        }
        Ok(())
    })?;
    assert!(answers(&stage)?.iter().eq(all), "resumed");

    // Removed at once: its connections are reset, and no others.
    for (pool, address) in backend(options, 2) {
        stage.lb(&["backend", "remove", pool, &address])?;
    }
    let (removed, kept): (Vec<_>, Vec<_>) =
        downloads.0.into_iter().partition(|download| download.backend == 2);
    assert_eq!(removed.len(), 2);
    for mut download in removed {
        let end = download.ended()?;
        assert!(end.starts_with(&format!("exit {}:", RESET.unwrap_or_default())), "{end}");
    }
    Downloads(kept).finish()?;
    stage.checksums_were_right()
}

#[test]
fn downloads_outlive_new_documents_and_bad_ones() -> Result<()> {
    if !lab::possible("downloads_outlive_new_documents_and_bad_ones") {
        return Ok(());
    }
    let options = LabOptions { backends: 4, ..LabOptions::default() };
    let (mut stage, content) = prepared(options)?;
    let mut downloads = Downloads::start(&stage, &content)?;
    let good = std::fs::read_to_string(stage.document())?;

    // By an editor: another scheduler for one service, a fourth backend for the other, and time-outs.
    let edited = good
        .replacen("scheduler = \"round-robin\"", "ring_size = 1031", 1)
        .replacen(
            &format!("{{ address = \"{}\" }},", backend_v6(options, 0)),
            &format!(
                "{{ address = \"{}\" }}, {{ address = \"{}\" }},",
                backend_v6(options, 3),
                backend_v6(options, 0)
            ),
            1,
        )
        .replacen("[pools.web]", "[timeouts]\nestablished = \"1h\"\n[pools.web]", 1);
    let before = revision(&stage)?;
    downloads.through(&mut stage, |stage| {
        stage.write(&edited)?;
        stage.until("the edit", |stage| Ok(revision(stage)? != before))?;
        stage.until_states("web6", &["healthy"; 4])
    })?;
    assert!(answers(&stage)?.contains("backend 4"));

    // By SIGHUP, with nothing new.
    let reloads = |stage: &Stage| -> Result<u64> {
        Ok(stage.json(&["status"])?["status"]["document"]["reloads"].as_u64().expect("a number"))
    };
    let before = reloads(&stage)?;
    downloads.through(&mut stage, |stage| {
        stage.daemon.as_ref().expect("a daemon").signal(Signal::SIGHUP)?;
        stage.until("the reload", |stage| Ok(reloads(stage)? > before))
    })?;

    // Bad ones change nothing, and `lb status` says what is wrong where.
    let in_force = revision(&stage)?;
    for (bad, place) in [
        (edited.replacen("interfaces", "interfeces", 1), "lobby.toml:1:1"),
        (edited.replacen("[timeouts]", "[timeouts", 1), "lobby.toml:3:"),
        (edited.replacen("\"front\"", "\"nowhere\"", 1), "lobby.toml:1:15"),
    ] {
        let refused = downloads.through(&mut stage, |stage| {
            stage.write(&bad)?;
            let mut refused = String::new();
            stage.until("the refusal", |stage| {
                let status = stage.json(&["status"])?;
                refused = status["status"]["document"]["refused"].as_str().unwrap_or_default().to_owned();
                Ok(refused.contains(place))
            })?;
            Ok(refused)
        })?;
        assert_eq!(revision(&stage)?, in_force, "{refused}");
        let shown = stage.lb(&["status"])?;
        assert!(shown.contains(place), "{refused}\n{shown}");
    }
    downloads.through(&mut stage, |stage| {
        stage.write(&good)?;
        stage.until("the good one", |stage| Ok(revision(stage)? != in_force))?;
        let status = stage.json(&["status"])?;
        assert!(status["status"]["document"]["refused"].is_null(), "{status}");
        Ok(())
    })?;
    downloads.finish()?;
    stage.checksums_were_right()
}

#[test]
fn downloads_outlive_the_daemon() -> Result<()> {
    if !lab::possible("downloads_outlive_the_daemon") {
        return Ok(());
    }
    let options = LabOptions { backends: 4, ..LabOptions::default() };
    let (mut stage, content) = prepared(options)?;
    let mut downloads = Downloads::start(&stage, &content)?;

    // A crash: nobody decides, everything is forwarded.
    downloads.through(&mut stage, |stage| stage.daemon.take().expect("a daemon").kill())?;
    assert!(answers(&stage)?.iter().eq(["backend 1", "backend 2", "backend 3"]));
    downloads.through(&mut stage, Stage::start)?;

    // SIGTERM: the same, and the daemon says so.
    downloads.through(&mut stage, |stage| {
        let mut daemon = stage.daemon.take().expect("a daemon");
        daemon.signal(Signal::SIGTERM)?;
        let status = daemon.wait()?;
        assert!(status.success(), "{status}");
        let log = stage.log();
        let last = log.lines().last().unwrap_or_default();
        assert!(last.contains("goes on forwarding") && last.contains("nobody checks health"), "{log}");
        Ok(())
    })?;
    assert!(answers(&stage)?.iter().eq(["backend 1", "backend 2", "backend 3"]));

    // The document changes while no daemon runs.
    let edited = std::fs::read_to_string(stage.document())?.replacen(
        &format!("{{ address = \"{}\" }},", backend_v4(options, 0)),
        &format!(
            "{{ address = \"{}\" }}, {{ address = \"{}\", drain = true }},",
            backend_v4(options, 3),
            backend_v4(options, 0)
        ),
        1,
    );
    stage.write(&edited)?;
    downloads.through(&mut stage, |stage| {
        stage.start()?;
        stage.until_states("web", &["healthy", "draining", "healthy", "healthy"])
    })?;

    // Again and again, while they read.
    for _ in 0..3 {
        downloads.through(&mut stage, |stage| {
            stage.daemon.take().expect("a daemon").kill()?;
            stage.start()
        })?;
    }
    downloads.finish()?;
    stage.checksums_were_right()
}
