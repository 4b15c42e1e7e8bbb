//! Health checks as clients feel them.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::Result;
use tests::{
    document::{self, Web},
    download::{self, Download},
    stage::{REFUSED, RESET, Stage},
};
use xtask::lab::{self, LabOptions, VIP};

const CHECKS: &str = "health = { http = \"/fit\", interval = \"200ms\", rise = 2, fall = 2 }";
const FILE: usize = 16 << 20;

/// What `/` answers, asked so often that everybody who is asked at all answers.
fn answers(stage: &Stage) -> Result<BTreeSet<String>> {
    let mut answers = BTreeSet::new();
    for vip in Stage::VIPS {
        for _ in 0..30 {
            answers.insert(stage.curl(vip, "/")?);
        }
    }
    Ok(answers)
}

fn backends(numbers: &[usize]) -> BTreeSet<String> {
    numbers.iter().map(|number| format!("backend {number}\n")).collect()
}

fn both(stage: &Stage, states: &[&str]) -> Result<()> {
    stage.until_states("web", states)?;
    stage.until_states("web6", states)
}

/// A stage whose backends are all in use.
fn prepared(options: LabOptions, pool: &str) -> Result<Stage> {
    let mut stage = Stage::without_daemon(options, &Web { pool, ..Web::of(options) }.text())?;
    for backend in 0..options.backends {
        stage.nginx(backend)?;
    }
    stage.start()?;
    both(&stage, &vec!["healthy"; options.backends])?;
    Ok(stage)
}

/// Downloads until there is one from each of two backends; in their order.
fn one_of_each(stage: &Stage) -> Result<[Download; 2]> {
    let content = download::write(stage, "file", FILE)?;
    let (mut first, mut second) = (None, None);
    for _ in 0..100 {
        let download = Download::start(stage, VIP.into(), "file", &content)?;
        if download.backend == 0 {
            first = Some(download);
        } else {
            second = Some(download);
        }
        if first.is_some() && second.is_some() {
            break;
        }
    }
    Ok([first.expect("one from backend 1"), second.expect("one from backend 2")])
}

#[test]
fn a_killed_server_leaves_and_comes_back() -> Result<()> {
    if !lab::possible("a_killed_server_leaves_and_comes_back") {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = prepared(options, CHECKS)?;
    assert_eq!(answers(&stage)?, backends(&[1, 2, 3]));
    stage.kill_server(1);
    both(&stage, &["healthy", "unhealthy", "healthy"])?;
    assert_eq!(answers(&stage)?, backends(&[1, 3]));
    stage.nginx(1)?;
    both(&stage, &["healthy"; 3])?;
    assert_eq!(answers(&stage)?, backends(&[1, 2, 3]));
    stage.checksums_were_right()
}

#[test]
fn who_has_not_been_fit_yet_gets_nothing() -> Result<()> {
    if !lab::possible("who_has_not_been_fit_yet_gets_nothing") {
        return Ok(());
    }
    let options = LabOptions::default();
    let mut stage = Stage::without_daemon(options, &Web { pool: CHECKS, ..Web::of(options) }.text())?;
    for backend in 0..2 {
        stage.nginx(backend)?;
        stage.fit(backend, false)?;
    }
    stage.start()?;
    for vip in Stage::VIPS {
        assert_eq!(stage.curl_exit(vip, &["--max-time", "20"])?, REFUSED, "{vip}");
    }
    stage.fit(0, true)?;
    both(&stage, &["healthy", "unhealthy"])?;
    assert_eq!(answers(&stage)?, backends(&[1]));
    stage.fit(1, true)?;
    both(&stage, &["healthy"; 2])?;
    assert_eq!(answers(&stage)?, backends(&[1, 2]));
    stage.checksums_were_right()
}

/// When all fail at once, the check is more likely wrong than all servers.
#[test]
fn when_all_fail_the_last_set_stays() -> Result<()> {
    if !lab::possible("when_all_fail_the_last_set_stays") {
        return Ok(());
    }
    let options = LabOptions::default();
    let mut stage = prepared(options, CHECKS)?;
    for backend in [0, 1] {
        stage.fit(backend, false)?;
    }
    both(&stage, &["unhealthy"; 2])?;
    assert!(!answers(&stage)?.is_empty());
    let status = stage.json(&["status"])?;
    let alarms = status["status"]["alarms"].to_string();
    assert!(alarms.contains("web") && alarms.contains("web6"), "{alarms}");
    let words = stage.lb(&["status"])?;
    assert!(words.contains("4 of 4 usable, 4 of them unhealthy and kept in use"), "{words}");

    // A daemon that starts now does not know better.
    stage.daemon.take().expect("a daemon").kill()?;
    stage.start()?;
    assert!(!answers(&stage)?.is_empty());

    stage.write(&Web { pool: &format!("{CHECKS}\npanic = \"fail\""), ..Web::of(options) }.text())?;
    for vip in Stage::VIPS {
        stage
            .until("refused clients", |stage| Ok(stage.curl_exit(vip, &["--max-time", "20"])? == REFUSED))?;
    }
    stage.fit(1, true)?;
    both(&stage, &["unhealthy", "healthy"])?;
    assert_eq!(answers(&stage)?, backends(&[2]));
    stage.checksums_were_right()
}

#[test]
fn when_all_fail_clients_are_refused_where_the_document_says_so() -> Result<()> {
    if !lab::possible("when_all_fail_clients_are_refused_where_the_document_says_so") {
        return Ok(());
    }
    let stage = prepared(LabOptions::default(), &format!("{CHECKS}\npanic = \"fail\""))?;
    for backend in [0, 1] {
        stage.fit(backend, false)?;
    }
    both(&stage, &["unhealthy"; 2])?;
    for vip in Stage::VIPS {
        assert_eq!(stage.curl_exit(vip, &["--max-time", "20"])?, REFUSED, "{vip}");
    }
    let words = stage.lb(&["explain", "198.51.100.7:40000", "203.0.113.10:80/tcp"])?;
    for backend in [0, 1] {
        let address = document::backend_v4(LabOptions::default(), backend);
        assert!(words.contains(&format!("{address} is unhealthy (status 404)")), "{words}");
    }
    stage.fit(1, true)?;
    both(&stage, &["unhealthy", "healthy"])?;
    assert_eq!(answers(&stage)?, backends(&[2]));
    stage.checksums_were_right()
}

#[test]
fn connections_to_the_unhealthy_are_kept() -> Result<()> {
    if !lab::possible("connections_to_the_unhealthy_are_kept") {
        return Ok(());
    }
    let stage = prepared(LabOptions::default(), CHECKS)?;
    let downloads = one_of_each(&stage)?;
    stage.fit(0, false)?;
    both(&stage, &["unhealthy", "healthy"])?;
    assert_eq!(answers(&stage)?, backends(&[2]));
    for download in downloads {
        download.finish(FILE)?;
    }
    stage.checksums_were_right()
}

#[test]
fn connections_to_the_unhealthy_are_reset_where_the_document_says_so() -> Result<()> {
    if !lab::possible("connections_to_the_unhealthy_are_reset_where_the_document_says_so") {
        return Ok(());
    }
    let stage = prepared(LabOptions::default(), &format!("{CHECKS}\non_unhealthy = \"reset\""))?;
    let [mut to_unhealthy, to_healthy] = one_of_each(&stage)?;
    stage.fit(0, false)?;
    both(&stage, &["unhealthy", "healthy"])?;
    let end = to_unhealthy.ended()?;
    assert!(end.starts_with(&format!("exit {}:", RESET.unwrap_or_default())), "{end}");
    to_healthy.finish(FILE)?;
    stage.checksums_were_right()
}

#[test]
fn a_server_that_expects_the_proxy_protocol_is_asked_by_it() -> Result<()> {
    if !lab::possible("a_server_that_expects_the_proxy_protocol_is_asked_by_it") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    // HAProxy closes a connection that begins otherwise; and says what it heard, which of a check is its own end.
    let settings = stage.directory().join("haproxy.cfg");
    std::fs::write(
        &settings,
        "global\ndefaults\n mode http\n timeout client 10s\n\
         frontend f\n bind 10.2.0.10:8080 accept-proxy\n bind 10.2.0.10:8081\n\
         http-request return status 200 content-type text/plain lf-string \"for %[src]\\n\"\n",
    )?;
    let place = &stage.lab.backends[0];
    let _haproxy = place.spawn("haproxy", ["-db", "-f", &settings.display().to_string()])?;
    place.wait_for_tcp((stage.lab.backend_v4(0), 8080).into())?;
    let document = |pool: &str, check: &str| {
        format!(
            "interfaces = [\"front\", \"back\"]\n\
             [pools.web]\nbackends = [{{ address = \"10.2.0.10:8080\" }}]\n{pool}\n\
             health = {{ http = \"/\", interval = \"100ms\", rise = 1, fall = 1{check} }}\n\
             [services.shop]\nlisten = \"{VIP}:80/tcp\"\npool = \"web\"\n\
             [[services.shop.routes]]\npath = \"/hello\"\nrespond = 200\n\
             [services.shop6]\nlisten = \"[{}]:80/tcp\"\npool = \"web\"\n\
             [[services.shop6.routes]]\npath = \"/hello\"\nrespond = 200\n",
            Stage::VIPS[1]
        )
    };
    let clients = [IpAddr::from(stage.lab.client_v4()), stage.lab.client_v6().into()];
    stage.write(&document("proxy_protocol = \"v1\"", ""))?;
    stage.start()?;
    for (version, port) in [("v1", ""), ("v2", ", port = 8080"), ("v2", ", port = 8081")] {
        stage.until_states("web", &["healthy"])?;
        for (vip, client) in Stage::VIPS.into_iter().zip(clients) {
            assert_eq!(stage.curl(vip, "/")?, format!("for {client}\n"), "{version}{port}");
        }
        // Who is asked without it, or on a port where it is not expected with it, does not answer.
        stage.write(&document("", ""))?;
        stage.until_states("web", &["unhealthy"])?;
        let next = if version == "v1" { ", port = 8080" } else { ", port = 8081" };
        stage.write(&document("proxy_protocol = \"v2\"", next))?;
    }
    stage.checksums_were_right()
}
