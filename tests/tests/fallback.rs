//! The desk as the fallback of a service that forwards packets: it says that the room is closed while nobody is fit, and
//! whoever is with it when somebody is again goes on by it.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use tests::{
    document::{backend_v4, backend_v6},
    requests::{Answer, Speaker},
    stage::Stage,
};
use xtask::lab::{self, LabOptions};

fn ask(speaker: &mut Speaker) -> Result<Answer> {
    speaker.say(b"GET / HTTP/1.1\r\nHost: shop.example\r\nAccept: text/html\r\n\r\n")?;
    speaker.hear()?.context("an answer")
}

/// Whether it comes from the desk, whose requests have numbers.
fn is_by_desk(answer: &Answer) -> bool {
    answer.header("x-request-id").is_some()
}

#[test]
fn the_desk_stands_in_for_servers_and_no_connection_breaks() -> Result<()> {
    if !lab::possible("the_desk_stands_in_for_servers_and_no_connection_breaks") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let port = |address: &str| address.rsplit_once(':').map(|(_, port)| port.to_owned()).context("a port");
    let port = port(&backend_v4(options, 0))?;
    let pool = |name: &str, address: fn(LabOptions, usize) -> String| {
        let backends: Vec<_> =
            (0..2).map(|i| format!("{{ address = \"{}\" }}", address(options, i))).collect();
        format!(
            "[pools.{name}]\nbackends = [ {} ]\npanic = \"fail\"\n\
             health = {{ http = \"/fit\", interval = \"50ms\", rise = 1, fall = 1 }}\n",
            backends.join(", ")
        )
    };
    let document = |mode: &str| {
        format!(
            "interfaces = [\"front\", \"back\"]\n{}{}\
             [services.shop]\nlisten = \"203.0.113.10:{port}/tcp\"\npool = \"web\"\nforward = \"{mode}\"\nfallback = \"desk\"\n\
             [services.shop6]\nlisten = \"[2001:db8:113::10]:{port}/tcp\"\npool = \"web6\"\nforward = \"{mode}\"\n\
             fallback = {{ pages = {{ 503 = \"closed.html\" }} }}\n",
            pool("web", backend_v4),
            pool("web6", backend_v6),
        )
    };
    for mode in ["nat", "dsr"] {
        let mut stage = Stage::without_daemon(options, &document(mode))?;
        std::fs::write(stage.directory().join("closed.html"), "<p>Our shop is closed\n")?;
        for backend in 0..2 {
            stage.nginx(backend)?;
            if mode == "dsr" {
                stage.hold_vips(backend)?;
            }
        }
        stage.start()?;
        let both = |states: &[&str], stage: &Stage| -> Result<()> {
            ["web", "web6"].iter().try_for_each(|pool| stage.until_states(pool, states))
        };
        both(&["healthy", "healthy"], &stage)?;
        let to = |vip: IpAddr| SocketAddr::new(vip, port.parse().unwrap_or(0));
        let call = |stage: &Stage, vip: IpAddr| -> Result<Answer> {
            ask(&mut Speaker::connect(&stage.lab.client, to(vip))?)
        };
        for vip in Stage::VIPS {
            // Before anybody had shown that they are fit, the desk stood in.
            stage.until("the server answers", |stage| {
                let answer = call(stage, vip)?;
                ensure!(answer.status == 200 || is_by_desk(&answer), "{mode} {vip}: {answer:?}");
                Ok(answer.status == 200 && !is_by_desk(&answer))
            })?;
        }
        // Nobody is fit: the desk says so, to each new connection.
        (0..2).try_for_each(|backend| stage.fit(backend, false))?;
        both(&["unhealthy", "unhealthy"], &stage)?;
        let mut kept = Vec::new();
        for (vip, words) in Stage::VIPS.into_iter().zip(["This room is closed", "Our shop is closed"]) {
            stage.until("the desk answers", |stage| Ok(is_by_desk(&call(stage, vip)?)))?;
            for _ in 0..20 {
                let mut speaker = Speaker::connect(&stage.lab.client, to(vip))?;
                let answer = ask(&mut speaker)?;
                ensure!(answer.status == 503 && answer.body.contains(words), "{mode} {vip}: {answer:?}");
                kept.push(speaker);
            }
        }
        // One is fit again: new connections go there, and who is with the desk is answered by it from there.
        stage.fit(1, true)?;
        both(&["unhealthy", "healthy"], &stage)?;
        for vip in Stage::VIPS {
            stage.until("the server answers", |stage| Ok(!is_by_desk(&call(stage, vip)?)))?;
        }
        let mut with_server = Vec::new();
        for vip in Stage::VIPS {
            for _ in 0..10 {
                let mut speaker = Speaker::connect(&stage.lab.client, to(vip))?;
                ensure!(!is_by_desk(&ask(&mut speaker)?), "{mode} {vip}: the desk");
                with_server.push(speaker);
            }
        }
        for speaker in &mut kept {
            let answer = ask(speaker)?;
            ensure!(
                answer.status == 200 && answer.body == "backend 2\n" && is_by_desk(&answer),
                "{mode}: {answer:?}"
            );
        }
        // And closed again: who was with a server stays with it, as long as that answers; who was with the desk hears it from
        // there.
        stage.fit(1, false)?;
        both(&["unhealthy", "unhealthy"], &stage)?;
        for vip in Stage::VIPS {
            stage.until("the desk answers", |stage| Ok(is_by_desk(&call(stage, vip)?)))?;
        }
        for speaker in &mut with_server {
            let answer = ask(speaker)?;
            ensure!(answer.status == 200 && !is_by_desk(&answer), "{mode}: {answer:?}");
        }
        for speaker in &mut kept {
            let answer = ask(speaker)?;
            ensure!(answer.status == 503 && is_by_desk(&answer), "{mode}: {answer:?}");
        }
        let routes = stage.json(&["route", "list"])?.to_string();
        ensure!(routes.contains("\"service\":\"shop\""), "{routes}");
    }
    Ok(())
}
