//! Connections that are cut: both sides hear of it, though neither says anything.

use std::path::Path;

use anyhow::{Result, ensure};
use tests::{
    document::Web,
    silent::Silent,
    stage::{Stage, run},
};
use xtask::lab::{self, LabOptions, Namespace, VIP, VIP_V6};

#[test]
fn both_sides_of_a_silent_connection_hear_that_it_is_cut() -> Result<()> {
    if !lab::possible("both_sides_of_a_silent_connection_hear_that_it_is_cut") {
        return Ok(());
    }
    for two_interfaces in [true, false] {
        let options = LabOptions { backends: 1, two_interfaces, ..LabOptions::default() };
        let stage = Stage::new(options, &Web::of(options).text())?;
        let servers = [stage.lab.backend_v4(0).into(), stage.lab.backend_v6(0).into()];
        let mut connections = Vec::new();
        for (vip, server) in Stage::VIPS.into_iter().zip(servers) {
            let server = std::net::SocketAddr::new(server, 8080);
            connections.push(Silent::open(&stage.lab.client, vip, &stage.lab.backends[0], server)?);
        }
        stage.write(&Web { backends: 0, ..Web::of(options) }.text())?;
        for connection in connections {
            connection.is_reset()?;
        }
        for service in stage.json(&["service", "list"])?.as_array().into_iter().flatten() {
            assert_eq!(service["cut"], 1, "{service}");
        }
        stage.checksums_were_right()?;
    }
    Ok(())
}

/// The daemon is killed between any two changes of the tables, sometimes when it has cut and told nobody.
#[test]
fn the_next_daemon_tells_those_whom_one_that_died_has_cut() -> Result<()> {
    if !lab::possible("the_next_daemon_tells_those_whom_one_that_died_has_cut") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let (with, without) = (Web::of(options).text(), Web { backends: 0, ..Web::of(options) }.text());
    let mut stage = Stage::without_daemon(options, &with)?;
    let (mut deaths, mut cut_by_the_dead) = (0, 0);
    for points in 0.. {
        drop(stage.daemon.take());
        stage.write(&with)?;
        stage.start()?;
        let servers = [stage.lab.backend_v4(0).into(), stage.lab.backend_v6(0).into()];
        let mut connections = Vec::new();
        for (vip, server) in Stage::VIPS.into_iter().zip(servers) {
            let server = std::net::SocketAddr::new(server, 8080);
            connections.push(Silent::open(&stage.lab.client, vip, &stage.lab.backends[0], server)?);
        }
        // One more, which will not be silent.
        let server = std::net::SocketAddr::new(servers[0], 8080);
        let talker = Silent::open(&stage.lab.client, Stage::VIPS[0], &stage.lab.backends[0], server)?;
        let died = stage.dies_in(points, &without)?;
        cut_by_the_dead += u32::from(talker.is_cut()? && died);
        stage.start()?;
        for connection in connections {
            connection.is_reset()?;
        }
        if !died {
            break;
        }
        deaths += 1;
    }
    println!("{deaths} deaths, {cut_by_the_dead} of them when it had cut");
    ensure!(deaths > 4 && cut_by_the_dead > 0, "{deaths} deaths, {cut_by_the_dead} of them when it had cut");
    stage.checksums_were_right()
}

/// Lets in what belongs to a connection, and what `more` says; nothing else.
fn guard(place: &Namespace, more: &str) -> Result<()> {
    let rules = format!(
        "table inet guard {{ chain in {{\ntype filter hook input priority 0; policy drop;\nmeta l4proto icmpv6 accept\n\
         {more}\nct state invalid drop\nct state established accept\n}}\n}}"
    );
    let output = run(place, Path::new("nft"), &[&rules])?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn firewalls_that_follow_connections_do_not_keep_it_from_them() -> Result<()> {
    if !lab::possible("firewalls_that_follow_connections_do_not_keep_it_from_them") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let stage = Stage::new(options, &Web::of(options).text())?;
    guard(&stage.lab.backends[0], "tcp dport 8080 ct state new accept")?;
    // A SYN from whom it has called itself is nothing to a client's firewall but invalid.
    let services = format!("ip saddr {VIP} tcp sport 80 accept\nip6 saddr {VIP_V6} tcp sport 80 accept");
    guard(&stage.lab.client, &services)?;
    let mut connections = Vec::new();
    for (vip, server) in
        Stage::VIPS.into_iter().zip([stage.lab.backend_v4(0).into(), stage.lab.backend_v6(0).into()])
    {
        let server = std::net::SocketAddr::new(server, 8080);
        connections.push(Silent::open(&stage.lab.client, vip, &stage.lab.backends[0], server)?);
    }
    stage.write(&Web { backends: 0, ..Web::of(options) }.text())?;
    for connection in connections {
        connection.is_reset()?;
    }
    stage.checksums_were_right()
}
