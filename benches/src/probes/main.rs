//! How soon a probe takes effect: `cargo xtask bench --control`.
//!
//! The daemon as it is, with thousands of backends, its tables in the kernel. A backend's server answers one
//! probe with status 500 instead of 200, which decides; the clock runs from just before it sends that answer
//! until the ring that packets are led by has no slot of this backend any more. In between lie the network,
//! the daemon's waking up among all the other probes, the plan, the new ring's pages and the store that
//! switches to it.

mod server;

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use benches::{Spread, write_report};
use clap::Parser;
use lb_common::abi::Slot;
use lb_userspace::{
    dataplane::{Dataplane as _, Tables, kernel::KernelDataplane},
    model::Limits,
};
use serde::Serialize;
use tests::stage::Stage;
use xtask::lab::{LabOptions, VIP};

use server::Servers;

/// Measures how soon a probe takes effect.
#[derive(Debug, Parser)]
struct Arguments {
    /// Backends of the one large service.
    #[arg(long, default_value_t = 1000)]
    large: u16,
    /// Small services.
    #[arg(long, default_value_t = 800)]
    services: u16,
    /// Backends of each small service.
    #[arg(long, default_value_t = 5)]
    each: u16,
    /// How often each backend is probed.
    #[arg(long, default_value = "2s")]
    interval: String,
    /// Probes that decide, for each kind of service.
    #[arg(long, default_value_t = 25)]
    times: u16,
    /// Where the report goes.
    #[arg(long, default_value = "target/bench/probes.json")]
    report: PathBuf,
}

/// The port of the first backend; the others have the next ones.
const FIRST_PORT: u16 = 10_000;
/// The time that nothing may exceed, or something is broken.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at the ring: what a figure may be too large by.
const BETWEEN_LOOKS: Duration = Duration::from_micros(200);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let backends = arguments.large + arguments.services * arguments.each;
    let options = LabOptions { backends: 1, ipv6: false, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    stage.write(&document(&arguments, stage.lab.backend_v4(0)))?;
    let servers = Servers::start(&stage.lab.backends[0], FIRST_PORT..FIRST_PORT + backends)?;
    stage.start()?;
    let daemon = stage.daemon.as_ref().context("a daemon has been started")?.id();
    let pins = PathBuf::from(format!("/proc/{daemon}/root/sys/fs/bpf"));
    let plane = KernelDataplane::open(Some(&pins), Limits::default())?;
    until_usable(&stage, u64::from(backends))?;
    let tables = plane.tables()?;

    let mut report = Vec::new();
    // In steps that are prime to the numbers of backends, so that no two deciding probes are neighbours.
    let large = (0..arguments.times).map(|i| FIRST_PORT + i.wrapping_mul(37) % arguments.large.max(1));
    let small = backends - arguments.large;
    let of_small =
        (0..arguments.times).map(|i| FIRST_PORT + arguments.large + i.wrapping_mul(143) % small.max(1));
    println!("from a deciding probe's answer to the ring, {backends} backends, milliseconds");
    println!("{:42} {:>7} {:>7} {:>7}", "", "min", "median", "max");
    if arguments.large > 0 {
        let name = format!("in a service of {}", arguments.large);
        report.push(measure(name, &plane, &tables, &servers, large)?);
    }
    if small > 0 {
        let name = format!("in one of {} services of {}", arguments.services, arguments.each);
        report.push(measure(name, &plane, &tables, &servers, of_small)?);
    }
    write_report(&arguments.report, &serde_json::json!({ "backends": backends, "cases": report }))
}

/// Waits until all backends are in use.
fn until_usable(stage: &Stage, backends: u64) -> Result<()> {
    let begun = Instant::now();
    loop {
        let usable = stage.json(&["status"])?["status"]["backends_usable"].as_u64();
        if usable == Some(backends) {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "{usable:?} of {backends} backends are in use:\n{}", stage.log());
        thread::sleep(Duration::from_millis(500));
    }
}

/// The figures of one kind of service, milliseconds.
#[derive(Debug, Serialize)]
struct Case {
    name: String,
    probes: usize,
    min_ms: f64,
    median_ms: f64,
    max_ms: f64,
}

/// Has backends with these ports fail, one after the other.
fn measure(
    name: String,
    plane: &KernelDataplane,
    tables: &Tables,
    servers: &Servers,
    ports: impl Iterator<Item = u16>,
) -> Result<Case> {
    let mut times = Vec::new();
    for port in ports {
        let entry = tables.backends.iter().find(|(_, entry)| entry.port == Some(port));
        let (index, entry) = entry.with_context(|| format!("no entry has port {port}"))?;
        let uses = |plane: &KernelDataplane| -> Result<bool> {
            Ok(plane.ring(entry.service)?.slots.contains(&Slot::settled(*index)))
        };
        ensure!(uses(plane)?, "the backend with port {port} is not in use");
        let begun = Instant::now();
        let answered = servers.fail_once(port, PATIENCE)?;
        while uses(plane)? {
            ensure!(begun.elapsed() < PATIENCE, "the backend with port {port} stays in use");
            thread::sleep(BETWEEN_LOOKS);
        }
        times.push(answered.elapsed().as_secs_f64() * 1e3);
    }
    let probes = times.len();
    let Spread { least, median, greatest } = Spread::of(times).unwrap_or_default();
    let case = Case { name, probes, min_ms: least, median_ms: median, max_ms: greatest };
    println!("{:42} {:>7.1} {:>7.1} {:>7.1}", case.name, case.min_ms, case.median_ms, case.max_ms);
    Ok(case)
}

/// One large service and many small ones, of backends that are all at one address.
fn document(arguments: &Arguments, address: std::net::Ipv4Addr) -> String {
    let mut text = String::from("interfaces = [\"front\", \"back\"]\n");
    let mut port = FIRST_PORT;
    let sizes = std::iter::once(arguments.large).chain((0..arguments.services).map(|_| arguments.each));
    for (number, size) in (0u16..).zip(sizes).filter(|(_, size)| *size > 0) {
        let backends: String =
            (port..port + size).map(|port| format!("{{ address = \"{address}:{port}\" }}, ")).collect();
        text += &format!(
            "[pools.p{number}]\nhealth = {{ http = \"/\", interval = \"{}\", rise = 1, fall = 1 }}\n\
             backends = [{backends}]\n\
             [services.s{number}]\nlisten = \"{VIP}:{}/tcp\"\npool = \"p{number}\"\n",
            arguments.interval,
            1000 + number
        );
        port += size;
    }
    text
}
