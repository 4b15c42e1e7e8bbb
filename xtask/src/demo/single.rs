//! The first stage: one server behind Lobby.

use std::path::Path;

use anyhow::Result;

use super::{balancer::Balancer, start_server};
use crate::lab::{Lab, LabOptions, VIP};

/// The port that the example's backend listens on.
const PORT: u16 = 8080;

/// Shows a request going through; whether the right server answered.
pub(super) fn show(program: &Path, directory: &Path) -> Result<bool> {
    let lab = Lab::new(LabOptions { backends: 1, ..LabOptions::default() })?;
    let address = (lab.backend_v4(0), PORT).into();
    let _server = start_server(&lab.backends[0], "1", address, &directory.join("server-1"), 50, 1000)?;
    println!("a server       {address}, which is all there was so far");
    let balancer = Balancer::start(&lab, program, "1-single-server.toml", directory)?;
    balancer
        .wait_for("the server to be reachable", |backends| backends.iter().any(|backend| backend.usable))?;
    println!("Lobby          runs with examples/1-single-server.toml:");
    for line in std::fs::read_to_string(directory.join("lb.toml"))?.lines() {
        println!("               {line}");
    }
    println!("a client       {}, on another network, calls the service:\n", lab.client_v4());

    let url = format!("http://{VIP}/");
    println!("$ curl {url}");
    let output =
        lab.client.command("curl").args(["--silent", "--show-error", "--max-time", "5", &url]).output()?;
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{answer}{}", String::from_utf8_lossy(&output.stderr));

    println!("\n$ lb status");
    print!("{}", balancer.command(&["status"])?);
    println!("\n$ lb counters");
    print!("{}", balancer.command(&["counters"])?);

    let good =
        output.status.success() && answer.contains("server 1") && answer.contains(&address.to_string());
    if good {
        println!("\nThe answer came from the server, by way of Lobby. `cargo xtask demo` goes on from here.");
    } else {
        println!("\nThe server's answer did not come.\n{}", balancer.last_words());
    }
    Ok(good)
}
