//! Everything around the desk changes while guests ask: documents, certificates, servers, the daemon, the desk itself.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tests::{authority::Authority, stage::Stage};
use xtask::{
    demo::guests::{Accounts, Door, Guests, Kind},
    lab::{self, LabOptions, VIP},
};

const NAME: &str = "shop.example";
const SERVERS: usize = 3;
/// So many that a server is always at something.
const GUESTS: usize = 16;
/// How often all of it happens.
const ROUNDS: usize = 3;

fn document(stage: &Stage, word: &str) -> String {
    let backends: String =
        (0..SERVERS).map(|i| format!("{{ address = \"{}:8080\" }}, ", stage.lab.backend_v4(i))).collect();
    format!(
        "interfaces = [\"front\", \"back\"]\n\
         [pools.web]\nhealth = {{ http = \"/fit\", interval = \"50ms\", rise = 1, fall = 1 }}\n\
         eject = {{ after = 2, pause = \"1s\" }}\n\
         backends = [{backends}]\n\
         [services.front]\nlisten = \"{VIP}:443/tcp\"\n\
         tls = {{ cert = \"shop.pem\", key = \"shop.key\" }}\n\
         [[services.front.routes]]\nhost = \"{NAME}\"\npool = \"web\"\nresponse_headers = {{ set = {{ x-word = \"{word}\" }} }}\n\
         [[services.front.routes]]\nhost = \"{NAME}\"\nexact_path = \"/word\"\nrespond = {{ status = 200, body = \"{word}\\n\" }}\n"
    )
}

/// A new certificate for the name.
fn certify(stage: &Stage, authority: &Authority) -> Result<()> {
    let issued = authority.server(NAME)?;
    // The key first: a pair that does not belong together is not used.
    fs::write(stage.directory().join("shop.key"), issued.key)?;
    fs::write(stage.directory().join("shop.pem"), issued.chain)?;
    Ok(())
}

/// What the service says itself, by a connection of its own.
fn word(stage: &Stage) -> Result<String> {
    let authority = stage.directory().join("authority.pem").display().to_string();
    let resolve = format!("{NAME}:443:{VIP}");
    let url = format!("https://{NAME}/word");
    let output = stage.try_curl(&["--cacert", &authority, "--resolve", &resolve, &url])?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The certificate that is shown, as s_client writes it.
fn shown(stage: &Stage) -> Result<String> {
    let command = format!("openssl s_client -connect {VIP}:443 -servername {NAME} < /dev/null 2> /dev/null");
    let output = stage.lab.client.command("sh").args(["-c", &command]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let begin = said.find("-----BEGIN").context("no certificate is shown")?;
    let end = said.find("-----END").context("no certificate is shown")?;
    Ok(said[begin..end].lines().skip(1).collect())
}

fn desk(stage: &Stage) -> Result<u64> {
    stage.json(&["desk", "status"])?["pid"].as_u64().context("no desk")
}

#[test]
fn no_request_is_lost_whatever_changes_around_the_desk() -> Result<()> {
    if !lab::possible("no_request_is_lost_whatever_changes_around_the_desk") {
        return Ok(());
    }
    let mut stage = Stage::without_daemon(LabOptions { backends: SERVERS, ..LabOptions::default() }, "")?;
    let authority = Authority::new()?;
    let trusted = stage.directory().join("authority.pem");
    fs::write(&trusted, &authority.pem)?;
    certify(&stage, &authority)?;
    stage.write(&document(&stage, "first"))?;
    (0..SERVERS).try_for_each(|server| stage.nginx(server))?;
    stage.start()?;
    stage.until_states("web", &["healthy"; SERVERS])?;

    let accounts = Accounts::default();
    let door = Door::new(SocketAddr::new(VIP.into(), 443), NAME, &trusted)?;
    let kind = Kind {
        name: "guest",
        path: "/",
        headers: Vec::new(),
        greeting: "backend ",
        rest: Duration::from_millis(1),
    };
    let guests = Guests::come(stage.lab.client.clone(), &door, &[(kind, GUESTS)], &accounts)?;
    let told = || guests.account("guest");
    let go_on = |stage: &Stage| {
        let before = told().answers();
        stage.until("more answers", |_| Ok(told().answers() > before + 10 * GUESTS as u64))
    };
    let nothing_lost = |what: &str| -> Result<()> {
        let account = told();
        ensure!(account.lost + account.closed + account.slowed == 0, "lost by {what}: {account:?}");
        Ok(())
    };
    go_on(&stage)?;
    for round in 0..ROUNDS {
        let new = format!("round {round}");
        stage.write(&document(&stage, &new))?;
        stage.until(&new, |stage| Ok(word(stage)? == new))?;
        go_on(&stage)?;
        nothing_lost("another document")?;

        let before = shown(&stage)?;
        certify(&stage, &authority)?;
        stage.until("another certificate", |stage| Ok(shown(stage).is_ok_and(|now| now != before)))?;
        go_on(&stage)?;
        nothing_lost("another certificate")?;

        let dead = round % SERVERS;
        stage.kill_server(dead);
        go_on(&stage)?;
        stage.nginx(dead)?;
        stage.until_states("web", &["healthy"; SERVERS])?;
        go_on(&stage)?;
        nothing_lost("a server's death")?;

        let address = format!("{}:8080", stage.lab.backend_v4((round + 1) % SERVERS));
        stage.lb(&["backend", "drain", "web", &address])?;
        go_on(&stage)?;
        stage.lb(&["backend", "resume", "web", &address])?;
        go_on(&stage)?;
        nothing_lost("a drain")?;

        let mut daemon = stage.daemon.take().context("a daemon")?;
        let first = desk_of(&stage, round % 2 == 0, &mut daemon)?;
        go_on(&stage)?;
        stage.start()?;
        stage.until("another desk", |stage| Ok(desk(stage).is_ok_and(|desk| desk != first)))?;
        go_on(&stage)?;
        nothing_lost("another daemon and desk")?;
        // Killed with its process group only now: the desk had to outlive it.
        drop(daemon);
    }
    let account = told();
    assert_eq!(account.answered.len(), SERVERS, "{account:?}");

    // One that is killed loses what it was at, a request for each guest at most, and no more.
    let first = desk(&stage)?;
    kill(Pid::from_raw(i32::try_from(first)?), Signal::SIGKILL)?;
    stage.until("another desk", |stage| Ok(desk(stage).is_ok_and(|desk| desk != first)))?;
    go_on(&stage)?;
    let account = told();
    assert!(account.lost <= GUESTS as u64 && account.closed == 0, "{account:?}");
    println!("{} answers, {} cut by the desk's death", account.answers(), account.lost);
    Ok(())
}

/// Ends a daemon, in order or not; which desk it had.
fn desk_of(stage: &Stage, in_order: bool, daemon: &mut lab::Proc) -> Result<u64> {
    let desk = desk(stage)?;
    if in_order {
        daemon.signal(Signal::SIGTERM)?;
        ensure!(daemon.wait()?.success());
    } else {
        daemon.kill()?;
    }
    Ok(desk)
}
