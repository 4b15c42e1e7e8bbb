//! Requests through the reception desk, behind the program: real clients, real servers.

use std::{
    net::{IpAddr, SocketAddr},
    process::Output,
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    document::{backend_v4, backend_v6},
    requests::Crowd,
    stage::Stage,
};
use xtask::lab::{self, LabOptions};

/// Two services of the desk on the lab's two addresses, with a pool of the first backends for each.
fn document(lab: LabOptions, service: &str, routes: &str) -> String {
    let backends = |address: fn(LabOptions, usize) -> String| -> String {
        (0..lab.backends).map(|i| format!("{{ address = \"{}\" }}, ", address(lab, i))).collect()
    };
    let of = |name: &str, listen: &str, pool: &str| {
        let routes = routes.replace("[[routes]]", &format!("[[services.{name}.routes]]"));
        format!(
            "[services.{name}]\nlisten = \"{listen}\"\npool = \"{pool}\"\n{service}\n{}\n",
            routes.replace("POOL", pool)
        )
    };
    format!(
        "interfaces = [\"front\", \"back\"]\n\
         [pools.web]\nbackends = [ {}]\n[pools.web6]\nbackends = [ {}]\n{}{}",
        backends(backend_v4),
        backends(backend_v6),
        of("shop", "203.0.113.10:80/tcp", "web"),
        of("shop6", "[2001:db8:113::10]:80/tcp", "web6"),
    )
}

fn url(vip: IpAddr, path: &str) -> String {
    match vip {
        IpAddr::V4(vip) => format!("http://{vip}{path}"),
        IpAddr::V6(vip) => format!("http://[{vip}]{path}"),
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Packets that the program has passed to this host since it belongs to a local backend.
fn passed(stage: &Stage) -> Result<u64> {
    let counters = stage.json(&["counters"])?;
    let verdicts = counters["verdicts"].as_array().context("a list")?.iter();
    let passed = verdicts.filter(|verdict| verdict["name"] == "pass_local");
    passed.map(|verdict| verdict["packets"].as_u64().context("a number")).sum()
}

#[test]
fn requests_go_through_the_desk() -> Result<()> {
    if !lab::possible("requests_go_through_the_desk") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let routes = "[[routes]]\nhost = \"shop.example\"\npath = \"/static\"\npool = \"POOL\"\nstrip_prefix = true\n\
                  [[routes]]\npath = \"/hello\"\nrespond = { body = \"good day\\n\" }\n";
    let mut stage = Stage::without_daemon(options, &document(options, "", routes))?;
    (0..2).try_for_each(|backend| stage.nginx(backend))?;
    stage.start()?;
    std::fs::write(stage.directory().join("page"), "a page\n")?;
    for vip in Stage::VIPS {
        let before = passed(&stage)?;
        let mut answers: Vec<String> = Vec::new();
        for _ in 0..40 {
            answers.push(stage.curl(vip, "/")?);
        }
        answers.sort();
        answers.dedup();
        assert_eq!(answers, ["backend 1\n", "backend 2\n"], "{vip}");
        assert!(passed(&stage)? > before, "{vip}: packets do not come by the program");
        assert_eq!(stage.curl(vip, "/hello/you")?, "good day\n");
        let page = stage.try_curl(&["-H", "Host: shop.example", &url(vip, "/static/page")])?;
        assert_eq!(text(&page), "a page\n");
        ensure!(stage.curl(vip, "/static/page").is_ok_and(|page| page.contains("404")), "another host");
    }
    stage.checksums_were_right()
}

/// Processes of the desk in the balancer's place.
fn desks(stage: &Stage) -> Result<Vec<u32>> {
    let ours =
        std::fs::read_link(format!("/proc/{}/ns/net", stage.daemon.as_ref().context("a daemon")?.id()))?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        // It may be gone by now.
        let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let here = std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|net| net == ours);
        if here && line.split(|&byte| byte == 0).nth(1) == Some(b"desk-process") {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The one process of the desk, once there is only one, and not `other`.
fn desk(stage: &Stage, other: Option<u32>) -> Result<u32> {
    let mut pid = None;
    stage.until("one desk", |stage| {
        let found = desks(stage)?;
        pid = found.first().copied().filter(|pid| found.len() == 1 && Some(*pid) != other);
        Ok(pid.is_some())
    })?;
    pid.context("a desk")
}

fn kill(pid: u32) -> Result<()> {
    Ok(nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )?)
}

/// A route of the desk's own; everything else goes to the pool.
const HELLO: &str = "[[routes]]\npath = \"/hello\"\nrespond = { body = \"good day\\n\" }\n";

const FRONT: IpAddr = Stage::VIPS[0];

fn served(options: LabOptions) -> Result<Stage> {
    let mut stage = Stage::without_daemon(options, &document(options, "", HELLO))?;
    (0..options.backends).try_for_each(|backend| stage.nginx(backend))?;
    stage.start()?;
    Ok(stage)
}

/// The desk has nothing that its daemon has: no user, no rights, no files.
#[test]
fn the_desk_has_no_rights() -> Result<()> {
    if !lab::possible("the_desk_has_no_rights") {
        return Ok(());
    }
    let stage = served(LabOptions::default())?;
    stage.curl(FRONT, "/")?;
    let pid = desk(&stage, None)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Vec<String> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}\n{status}");
    }
    assert_eq!(field("NoNewPrivs:"), ["1"], "{status}");
    assert!(
        field("Uid:").iter().all(|uid| uid != "0") && field("Gid:").iter().all(|gid| gid != "0"),
        "{status}"
    );
    assert_eq!(field("Groups:"), Vec::<String>::new(), "{status}");
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let target = std::fs::read_link(entry?.path())?.display().to_string();
        let harmless =
            ["socket:", "pipe:", "anon_inode:[event", "/dev/null"].iter().any(|it| target.starts_with(it));
        assert!(harmless || target.ends_with("lb.log"), "{target}");
    }
    Ok(())
}

/// A daemon that is killed, and the next one: neither loses a request, by new connections or by kept ones.
#[test]
fn no_request_is_lost_when_the_daemon_is_killed() -> Result<()> {
    if !lab::possible("no_request_is_lost_when_the_daemon_is_killed") {
        return Ok(());
    }
    let mut stage = served(LabOptions { backends: 2, ..LabOptions::default() })?;
    let first = desk(&stage, None)?;
    let crowd = Crowd::start(&stage.lab.client, SocketAddr::new(FRONT, 80), "/", 6);
    crowd.wait_for(200)?;
    let mut old = stage.daemon.take().context("a daemon")?;
    old.kill()?;
    crowd.wait_for(200)?;
    stage.start()?;
    let second = desk(&stage, Some(first))?;
    crowd.wait_for(200)?;
    // And once more in order.
    let mut daemon = stage.daemon.take().context("a daemon")?;
    daemon.signal(nix::sys::signal::Signal::SIGTERM)?;
    ensure!(daemon.wait()?.success());
    crowd.wait_for(200)?;
    stage.start()?;
    desk(&stage, Some(second))?;
    crowd.wait_for(200)?;
    let account = crowd.finish()?;
    assert_eq!(account.bad, Vec::<String>::new(), "{}", stage.log());
    assert!(account.good > 1000);
    // Killed with their process groups only now: the desks had to outlive them.
    drop((old, daemon));
    Ok(())
}

/// A desk that is killed is there again; who calls meanwhile waits, and is answered.
#[test]
fn nobody_is_refused_when_the_desk_is_killed() -> Result<()> {
    if !lab::possible("nobody_is_refused_when_the_desk_is_killed") {
        return Ok(());
    }
    let stage = served(LabOptions { backends: 2, ..LabOptions::default() })?;
    let first = desk(&stage, None)?;
    let crowd = Crowd::start(&stage.lab.client, SocketAddr::new(FRONT, 80), "/", 4);
    crowd.wait_for(100)?;
    kill(first)?;
    let second = desk(&stage, Some(first))?;
    crowd.wait_for(100)?;
    let account = crowd.finish()?;
    // Those that the desk was talking to at that moment, one for each client at most.
    let cut = |bad: &String| bad.contains("cut before the answer");
    assert!(account.bad.len() <= 4 && account.bad.iter().all(cut), "{:?}\n{}", account.bad, stage.log());
    assert_ne!(first, second);
    Ok(())
}
