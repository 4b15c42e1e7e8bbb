//! Connections that are cut: both sides hear of it, though neither says anything.

use anyhow::Result;
use tests::{document::Web, silent::Silent, stage::Stage};
use xtask::lab::{self, LabOptions};

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
