//! Requests through the reception desk, behind the program: real clients, real servers.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::Output,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    document::{backend_v4, backend_v6},
    requests::{Crowd, Speaker},
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
        let before = stage.packets("pass_local")?;
        let mut answers: Vec<String> = Vec::new();
        for _ in 0..40 {
            answers.push(stage.curl(vip, "/")?);
        }
        answers.sort();
        answers.dedup();
        assert_eq!(answers, ["backend 1\n", "backend 2\n"], "{vip}");
        assert!(stage.packets("pass_local")? > before, "{vip}: packets do not come by the program");
        assert_eq!(stage.curl(vip, "/hello/you")?, "good day\n");
        let page = stage.try_curl(&["-H", "Host: shop.example", &url(vip, "/static/page")])?;
        assert_eq!(text(&page), "a page\n");
        ensure!(stage.curl(vip, "/static/page").is_ok_and(|page| page.contains("404")), "another host");
    }
    stage.checksums_were_right()
}

fn signal(pid: u32, signal: nix::sys::signal::Signal) -> Result<()> {
    Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal)?)
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

/// A request that the first server has got, and does not answer yet.
struct UnderWay {
    client: TcpStream,
    server: TcpStream,
}

impl UnderWay {
    /// Starts the daemon, and asks.
    fn start(stage: &mut Stage) -> Result<Self> {
        let backend = SocketAddr::new(stage.lab.backend_v4(0).into(), 8080);
        let listener = stage.lab.backends[0].run(|| TcpListener::bind(backend))??;
        stage.start()?;
        let mut client = stage.lab.client.run(|| TcpStream::connect((FRONT, 80)))??;
        client.write_all(b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
        let (mut server, _) = listener.accept()?;
        ensure!(server.read(&mut [0; 4096])? > 0, "the server was asked nothing");
        // A desk that says so has heard by now that it is to outlive its daemon.
        stage.until("the desk reports", |stage| Ok(stage.json(&["desk", "status"])?["open"] == 1))?;
        Ok(Self { client, server })
    }

    fn finish(mut self) -> Result<()> {
        self.server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")?;
        let mut answer = String::new();
        self.client.read_to_string(&mut answer)?;
        ensure!(answer.ends_with("\r\n\r\nok"), "{answer}");
        Ok(())
    }
}

/// A backend that is taken out has been left when its last answer is over, not before.
#[test]
fn a_backend_that_only_the_desk_speaks_to_is_drained_when_its_requests_have_ended() -> Result<()> {
    let name = "a_backend_that_only_the_desk_speaks_to_is_drained_when_its_requests_have_ended";
    if !lab::possible(name) {
        return Ok(());
    }
    for successor in [false, true] {
        drained_when_its_requests_have_ended(successor)?;
    }
    Ok(())
}

/// With another daemon, and so another desk, in between: what the first desk has under way is waited for, too.
fn drained_when_its_requests_have_ended(successor: bool) -> Result<()> {
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, &document(options, "", HELLO))?;
    let under_way = UnderWay::start(&mut stage)?;
    let requests = |stage: &Stage, count: u64| {
        stage.until("its requests", |stage| {
            Ok(stage.json(&["backend", "list", "--pool", "web"])?[0]["requests"] == count)
        })
    };
    requests(&stage, 1)?;
    // Kept: its desk would be killed with it.
    let mut before = if successor { stage.daemon.take() } else { None };
    if let Some(daemon) = &mut before {
        daemon.kill()?;
        stage.start()?;
        stage.until("two desks", |stage| Ok(stage.desks()?.len() == 2))?;
    }
    stage.lb(&["backend", "drain", "web", "10.2.0.10:8080"])?;
    // The daemon counts, and the desk reports, each second.
    std::thread::sleep(Duration::from_secs(3));
    stage.until_states("web", &["draining"])?;
    under_way.finish()?;
    stage.until_states("web", &["drained"])?;
    requests(&stage, 0)?;
    stage.checksums_were_right()
}

/// The desk has nothing that its daemon has: no user, no rights, no files.
#[test]
fn the_desk_has_no_rights() -> Result<()> {
    if !lab::possible("the_desk_has_no_rights") {
        return Ok(());
    }
    let stage = served(LabOptions::default())?;
    stage.curl(FRONT, "/")?;
    let pid = stage.desk(None)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Vec<String> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}\n{status}");
    }
    assert_eq!(field("NoNewPrivs:"), ["1"], "{status}");
    assert_eq!(field("Seccomp:"), ["2"], "the kernel's calls are not filtered: {status}");
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
    let first = stage.desk(None)?;
    let crowd = Crowd::start(&stage.lab.client, SocketAddr::new(FRONT, 80), "/", 6);
    crowd.wait_for(200)?;
    let mut old = stage.daemon.take().context("a daemon")?;
    old.kill()?;
    crowd.wait_for(200)?;
    stage.start()?;
    let second = stage.desk(Some(first))?;
    crowd.wait_for(200)?;
    // And once more in order.
    let mut daemon = stage.daemon.take().context("a daemon")?;
    daemon.signal(nix::sys::signal::Signal::SIGTERM)?;
    ensure!(daemon.wait()?.success());
    crowd.wait_for(200)?;
    stage.start()?;
    stage.desk(Some(second))?;
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
    let first = stage.desk(None)?;
    let crowd = Crowd::start(&stage.lab.client, SocketAddr::new(FRONT, 80), "/", 4);
    crowd.wait_for(100)?;
    signal(first, nix::sys::signal::Signal::SIGKILL)?;
    let second = stage.desk(Some(first))?;
    crowd.wait_for(100)?;
    let account = crowd.finish()?;
    // Those that the desk was talking to at that moment, one for each client at most.
    let cut = |bad: &String| bad.contains("cut before the answer");
    assert!(account.bad.len() <= 4 && account.bad.iter().all(cut), "{:?}\n{}", account.bad, stage.log());
    assert_ne!(first, second);
    Ok(())
}

/// A desk that is about to end has nothing to hand over any more: the next daemon does not wait for it, and serves beside it.
#[test]
fn a_desk_that_ends_holds_up_no_daemon() -> Result<()> {
    if !lab::possible("a_desk_that_ends_holds_up_no_daemon") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, &document(options, "", HELLO))?;
    let under_way = UnderWay::start(&mut stage)?;
    let former = stage.desk(None)?;
    // Kept: its desk would be killed with it.
    let mut before = stage.daemon.take().context("a daemon")?;
    before.kill()?;
    signal(former, nix::sys::signal::Signal::SIGTERM)?;
    stage.until("the desk ends", |stage| Ok(stage.log().contains("the desk ends")))?;
    stage.start()?;
    assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n");
    assert!(stage.desks()?.contains(&former), "{}", stage.log());
    under_way.finish()?;
    // The error of a read that waited for all the time it had.
    assert!(!stage.log().contains("temporarily unavailable"), "{}", stage.log());
    Ok(())
}

/// What is forwarded goes past the desk: it does not notice whether there is one.
#[test]
fn what_is_forwarded_does_not_notice_the_desks_death() -> Result<()> {
    if !lab::possible("what_is_forwarded_does_not_notice_the_desks_death") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let forwarded = format!("[services.past]\nlisten = \"{FRONT}:81/tcp\"\npool = \"web\"\n");
    let mut stage = Stage::without_daemon(options, &format!("{}{forwarded}", document(options, "", HELLO)))?;
    (0..options.backends).try_for_each(|backend| stage.nginx(backend))?;
    stage.start()?;
    let past = SocketAddr::new(FRONT, 81);
    let mut pid = stage.desk(None)?;
    let ask = |speaker: &mut Speaker| -> Result<()> {
        speaker.say(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
        let answer = speaker.hear()?.context("an answer")?;
        ensure!(answer.status == 200 && answer.header("x-request-id").is_none(), "{answer:?}");
        Ok(())
    };
    let mut kept: Vec<_> =
        (0..20).map(|_| Speaker::connect(&stage.lab.client, past)).collect::<Result<_>>()?;
    kept.iter_mut().try_for_each(ask)?;
    let crowd = Crowd::start(&stage.lab.client, past, "/", 4);
    for deaths in 1..=3 {
        signal(pid, nix::sys::signal::Signal::SIGKILL)?;
        crowd.wait_for(50)?;
        kept.iter_mut().try_for_each(ask)?;
        pid = stage.desk(Some(pid))?;
        // Nor when the daemon has taken note of it.
        stage.until("its death is known", |stage| {
            Ok(stage.json(&["desk", "status"])?["restarts"] == deaths)
        })?;
        crowd.wait_for(50)?;
        kept.iter_mut().try_for_each(ask)?;
    }
    let account = crowd.finish()?;
    assert!(account.bad.is_empty(), "{:?}\n{}", account.bad, stage.log());
    kept.iter_mut().try_for_each(ask)
}

/// A desk that hangs without ending is ended and replaced.
#[test]
fn a_desk_that_hangs_is_replaced() -> Result<()> {
    if !lab::possible("a_desk_that_hangs_is_replaced") {
        return Ok(());
    }
    let stage = served(LabOptions::default())?;
    let first = stage.desk(None)?;
    assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n");
    signal(first, nix::sys::signal::Signal::SIGSTOP)?;
    stage
        .within(Duration::from_secs(60), "the desk is ended", |stage| Ok(!stage.desks()?.contains(&first)))?;
    stage.desk(Some(first))?;
    assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n");
    ensure!(stage.log().contains("the desk hangs"), "{}", stage.log());
    Ok(())
}

/// Documents that come and go under load lose nothing: routes change from one request to the next.
#[test]
fn no_request_is_lost_when_documents_change() -> Result<()> {
    if !lab::possible("no_request_is_lost_when_documents_change") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let stage = served(options)?;
    let first = stage.desk(None)?;
    let crowds = Stage::VIPS.map(|vip| Crowd::start(&stage.lab.client, SocketAddr::new(vip, 80), "/", 3));
    for number in 0..10 {
        let word = format!("number {number}\n");
        let routes = HELLO.replace("good day\\n", &format!("number {number}\\n"));
        stage.write(&document(options, "", &routes))?;
        stage.until(&word, |stage| Ok(stage.curl(FRONT, "/hello")? == word))?;
        crowds.iter().try_for_each(|crowd| crowd.wait_for(20))?;
    }
    for crowd in crowds {
        let account = crowd.finish()?;
        assert_eq!(account.bad, Vec::<String>::new(), "{}", stage.log());
        assert!(account.good > 200);
    }
    assert_eq!(stage.desk(None)?, first, "no document needs another process");
    Ok(())
}

/// Health and drain are the pool's: a server that fails or is drained gets no more requests, and when none is
/// left the room is closed and says so.
#[test]
fn a_room_closes_and_opens_with_its_servers() -> Result<()> {
    if !lab::possible("a_room_closes_and_opens_with_its_servers") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let health =
        "panic = \"fail\"\nhealth = { http = \"/fit\", interval = \"50ms\", rise = 1, fall = 1 }\n[services";
    let text = document(options, "", HELLO).replacen("[services", health, 1).replacen(
        "[pools.web6]\n",
        "panic = \"fail\"\nhealth = { http = \"/fit\", interval = \"50ms\", rise = 1, fall = 1 }\n[pools.web6]\n",
        1,
    );
    let mut stage = Stage::without_daemon(options, &text)?;
    (0..2).try_for_each(|backend| stage.nginx(backend))?;
    stage.start()?;
    stage.until_states("web", &["healthy", "healthy"])?;
    stage.fit(0, false)?;
    stage.until_states("web", &["unhealthy", "healthy"])?;
    let only = |stage: &Stage, wanted: &str| -> Result<bool> {
        Ok((0..20).map(|_| stage.curl(FRONT, "/")).collect::<Result<Vec<_>>>()?.iter().all(|it| it == wanted))
    };
    stage.until("only the second answers", |stage| only(stage, "backend 2\n"))?;
    stage.fit(1, false)?;
    stage.until("the room is closed", |stage| {
        let closed = stage.try_curl(&["--include", "-H", "Accept: application/json", &url(FRONT, "/")])?;
        Ok(text_of(&closed, &["503 Service Unavailable", "retry-after: 5", "\"reason\":\"no_backend\""]))
    })?;
    assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n", "what needs no server is open");
    stage.fit(0, true)?;
    stage.until("the first answers again", |stage| only(stage, "backend 1\n"))?;
    stage.lb(&["backend", "drain", "web", &backend_v4(options, 0)])?;
    stage.until("the room is being closed", |stage| Ok(stage.curl(FRONT, "/")?.contains("This room is")))?;
    let status = stage.json(&["desk", "status"])?;
    assert!(status["up_to_date"] == true && status["pid"].as_u64() > Some(0), "{status}");
    Ok(())
}

fn text_of(output: &Output, wanted: &[&str]) -> bool {
    let text = text(output);
    wanted.iter().all(|wanted| text.contains(wanted))
}

/// A certificate of its own making for a name: its PEM files below the stage's directory.
fn certificate(stage: &Stage, file: &str, name: &str) -> Result<()> {
    let made = rcgen::generate_simple_self_signed([name.to_owned()])?;
    // The key first: a pair that does not belong together is not used.
    std::fs::write(stage.directory().join(format!("{file}.key")), made.signing_key.serialize_pem())?;
    std::fs::write(stage.directory().join(format!("{file}.pem")), made.cert.pem())?;
    Ok(())
}

/// It is refused for want of a file; when the file is there, nobody has to say so.
#[test]
fn a_refused_document_comes_into_force_when_what_it_names_has_been_mended() -> Result<()> {
    if !lab::possible("a_refused_document_comes_into_force_when_what_it_names_has_been_mended") {
        return Ok(());
    }
    let options = LabOptions::default();
    let mut stage = Stage::without_daemon(options, &document(options, "", HELLO))?;
    stage.start()?;
    let tls = "tls = [{ cert = \"elsewhere/still/one.pem\", key = \"elsewhere/still/one.key\" }]";
    stage.write(&document(options, tls, HELLO).replace(":80/tcp", ":443/tcp"))?;
    let refused = |stage: &Stage| Ok(!stage.json(&["status"])?["status"]["document"]["refused"].is_null());
    stage.until("a refusal", refused)?;
    assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n", "the one before is in force");
    std::fs::create_dir_all(stage.directory().join("elsewhere/still"))?;
    certificate(&stage, "elsewhere/still/one", "one.example")?;
    stage.until("the document is in force", |stage| Ok(!refused(stage)?))?;
    let output = stage.try_curl(&["--insecure", &format!("https://{FRONT}/hello")])?;
    assert_eq!(text(&output), "good day\n");
    Ok(())
}

/// TLS by the name that is asked for, redirects to it, and certificates that change while it runs.
#[test]
fn certificates_are_shown_by_name_and_change_while_it_runs() -> Result<()> {
    if !lab::possible("certificates_are_shown_by_name_and_change_while_it_runs") {
        return Ok(());
    }
    let options = LabOptions::default();
    let tls = "tls = [{ cert = \"one.pem\", key = \"one.key\" }, { cert = \"two.pem\", key = \"two.key\" }]";
    let secure = document(options, tls, HELLO).replace(":80/tcp", ":443/tcp");
    let plain = "[services.plain]\nlisten = \"203.0.113.10:80/tcp\"\nroutes = [{ redirect = \"https\" }]\n";
    let mut stage = Stage::without_daemon(options, &(secure + plain))?;
    certificate(&stage, "one", "one.example")?;
    certificate(&stage, "two", "two.example")?;
    (0..options.backends).try_for_each(|backend| stage.nginx(backend))?;
    stage.start()?;
    let ask = |stage: &Stage, vip: IpAddr, name: &str, authority: &str| {
        let resolve = match vip {
            IpAddr::V4(vip) => format!("{name}:443:{vip}"),
            IpAddr::V6(vip) => format!("{name}:443:[{vip}]"),
        };
        let authority = stage.directory().join(authority).display().to_string();
        stage.try_curl(&["--resolve", &resolve, "--cacert", &authority, &format!("https://{name}/hello")])
    };
    for vip in Stage::VIPS {
        for (name, authority) in [("one.example", "one.pem"), ("two.example", "two.pem")] {
            let answer = ask(&stage, vip, name, authority)?;
            assert_eq!(text(&answer), "good day\n", "{vip} {name}");
        }
        assert!(!ask(&stage, vip, "two.example", "one.pem")?.status.success());
    }
    for version in ["--tlsv1.3", "--tls-max"] {
        let maximum = if version == "--tls-max" { "1.2" } else { "--silent" };
        let output = stage.try_curl(&["--insecure", version, maximum, &format!("https://{FRONT}/hello")])?;
        assert_eq!(text(&output), "good day\n", "{version}");
    }
    let redirect = stage.try_curl(&["--include", "-H", "Host: one.example", &url(FRONT, "/pay?x")])?;
    assert!(
        text_of(&redirect, &["308 Permanent Redirect", "location: https://one.example/pay?x"]),
        "{}",
        text(&redirect)
    );

    let first = stage.desk(None)?;
    let before = std::fs::read(stage.directory().join("one.pem"))?;
    certificate(&stage, "one", "one.example")?;
    assert_ne!(std::fs::read(stage.directory().join("one.pem"))?, before);
    stage.until("the new certificate is shown", |stage| {
        Ok(ask(stage, FRONT, "one.example", "one.pem")?.status.success())
    })?;
    // One that is no use is not used, and an alarm says so.
    std::fs::copy(stage.directory().join("one.pem"), stage.directory().join("kept.pem"))?;
    std::fs::write(stage.directory().join("one.pem"), "no certificate")?;
    stage.until("an alarm", |stage| {
        let status = stage.json(&["status"])?;
        let alarms = status["status"]["alarms"].as_array().context("alarms")?.clone();
        Ok(alarms.iter().any(|alarm| alarm.as_str().is_some_and(|it| it.contains("one.pem"))))
    })?;
    assert_eq!(text(&ask(&stage, FRONT, "one.example", "kept.pem")?), "good day\n");
    assert_eq!(stage.desk(None)?, first);
    // Nowhere is a key to be seen.
    let key = std::fs::read_to_string(stage.directory().join("two.key"))?;
    let secret = key.lines().nth(1).context("a key")?.to_owned();
    for said in [stage.log(), stage.lb(&["status", "--json"])?, stage.lb(&["desk", "status", "--json"])?] {
        assert!(!said.contains(&secret));
    }
    Ok(())
}

/// A certificate that is not its key's, or not there, refuses the document, with its place.
#[test]
fn unfit_certificates_are_refused_in_their_place() -> Result<()> {
    if !lab::possible("unfit_certificates_are_refused_in_their_place") {
        return Ok(());
    }
    let options = LabOptions::default();
    let stage = Stage::new(options, &document(options, "", HELLO))?;
    certificate(&stage, "one", "one.example")?;
    certificate(&stage, "two", "two.example")?;
    for (tls, why) in [
        ("tls = { cert = \"one.pem\", key = \"two.key\" }", "the key is not the certificate's"),
        ("tls = { cert = \"none.pem\", key = \"two.key\" }", "none.pem cannot be read"),
        ("tls = { cert = \"one.key\", key = \"one.key\" }", "there is no certificate in PEM form in it"),
        ("tls = { cert = \"one.pem\", key = \"one.pem\" }", "there is no private key in PEM form in it"),
    ] {
        stage.write(&document(options, tls, HELLO))?;
        stage.until(why, |stage| {
            let status = stage.json(&["status"])?;
            let refused = status["status"]["document"]["refused"].as_str().unwrap_or_default().to_owned();
            Ok(refused.contains(why) && refused.contains(":9:16: error"))
        })?;
        assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n");
    }
    Ok(())
}

/// `lb detach` ends the desk too, after what is under way, and leaves nothing.
#[test]
fn detaching_ends_the_desk() -> Result<()> {
    if !lab::possible("detaching_ends_the_desk") {
        return Ok(());
    }
    let options = LabOptions::default();
    let mut stage = Stage::without_daemon(options, &document(options, "", HELLO))?;
    let before = stage.traces()?;
    stage.start()?;
    assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n");
    let pid = stage.desk(None)?;
    stage.lb(&["detach"])?;
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    stage.daemon.as_mut().context("a daemon")?.wait()?;
    assert_eq!(stage.changed_since(&before)?, Vec::<String>::new());
    // The same where the daemon has gone before.
    stage.start()?;
    let pid = stage.desk(None)?;
    let mut daemon = stage.daemon.take().context("a daemon")?;
    daemon.kill()?;
    assert_eq!(stage.curl(FRONT, "/hello")?, "good day\n");
    stage.lb(&["detach"])?;
    let gone =
        || std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
    stage.until("the desk has ended", |_| Ok(gone()))?;
    // The kernel lets go of what was pinned a little later.
    stage.until("nothing is left", |stage| Ok(stage.changed_since(&before)?.is_empty()))?;
    Ok(())
}
