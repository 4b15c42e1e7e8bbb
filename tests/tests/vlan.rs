//! Clients and servers in a VLAN, with the program on the interfaces below: calls and answers carry the tag.
//!
//! The kernel that this is developed on makes no VLAN interfaces, so their part is played by
//! [`tests::vlan`]; frames have their tags inside, on real veth pairs, and curl and nginx know nothing of it.
//!
//! The program sees the tags that are in a frame, and not one that a device has taken out of it or is still to
//! put in. A veth whose sender's stack knows the tag leaves it outside for good, unless `txvlan` is off: here that
//! is the bridge's end of the pair.

use std::{net::SocketAddr, path::Path, sync::atomic::Ordering::Relaxed};

use anyhow::{Result, ensure};
use tests::{
    document::Web,
    download::{self, Download},
    silent::Silent,
    stage::{Stage, run},
    vlan::Vlan,
};
use xtask::lab::{self, LabOptions, Namespace, link};

const ID: u16 = 10;

/// Sends what goes by the gateway, and to it, through an interface in the VLAN over `eth0`. Nobody answers ARP
/// for the gateway there. For itself `eth0` still does, untagged, which is how the balancer finds its neighbours.
fn into_vlan(place: &Namespace, gateways: [std::net::IpAddr; 2], mac: [u8; 6]) -> Result<Vlan> {
    let vlan = Vlan::over(place, "eth0", ID)?;
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    for gateway in gateways {
        let device = &vlan.name;
        for command in [
            format!("neigh replace {gateway} lladdr {mac} nud permanent dev {device}"),
            format!("route replace {gateway} dev {device}"),
            format!("route replace default via {gateway} dev {device} onlink"),
        ] {
            let arguments: Vec<_> = command.split(' ').collect();
            let output = run(place, Path::new("ip"), &arguments)?;
            ensure!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(vlan)
}

fn ethtool(place: &Namespace, interface: &str, settings: &str) -> Result<()> {
    let arguments: Vec<_> = ["-K", interface].into_iter().chain(settings.split(' ')).collect();
    let output = run(place, Path::new("ethtool"), &arguments)?;
    ensure!(output.status.success(), "{interface} {settings}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn calls_and_answers_keep_their_tag() -> Result<()> {
    if !lab::possible("calls_and_answers_keep_their_tag") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, &Web::of(options).text())?;
    let Stage { lab, .. } = &stage;
    ethtool(&lab.switch, "lb", "txvlan off")?;
    let mac = |interface| link::mac(&lab.balancer, interface);
    let client = into_vlan(&lab.client, [lab.front_v4().into(), lab.front_v6().into()], mac("front")?)?;
    let backend = into_vlan(&lab.backends[0], [lab.back_v4().into(), lab.back_v6().into()], mac("back")?)?;
    stage.nginx(0)?;
    stage.start()?;
    // Frames of full length, which the tag makes longer than those without one may be.
    let content = download::write(&stage, "file", 4 << 20)?;
    for vip in Stage::VIPS {
        assert_eq!(stage.curl(vip, "/")?, "backend 1\n");
        Download::start(&stage, vip, "file", &content)?.finish(content.len())?;
    }
    // Both sides hear that a connection is cut, and nothing of that leaves the VLAN.
    stage.kill_server(0);
    let servers = [stage.lab.backend_v4(0).into(), stage.lab.backend_v6(0).into()];
    let mut connections = Vec::new();
    for (vip, server) in Stage::VIPS.into_iter().zip(servers) {
        let server = SocketAddr::new(server, 8080);
        connections.push(Silent::open(&stage.lab.client, vip, &stage.lab.backends[0], server)?);
    }
    stage.write(&Web { backends: 0, ..Web::of(options) }.text())?;
    for connection in connections {
        connection.is_reset()?;
    }
    for (place, vlan) in [("client", &client), ("backend", &backend)] {
        assert!(vlan.seen.tagged.load(Relaxed) > 100, "{place}: {:?}", vlan.seen);
        assert_eq!(vlan.seen.others.load(Relaxed), 0, "{place}: {:?}", vlan.seen);
    }
    stage.checksums_were_right()
}
