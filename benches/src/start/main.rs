//! How long a start takes with a great document, and how much memory: `cargo xtask bench --control`.
//!
//! The daemon as it is, its tables in the kernel, in a lab whose backends all lie behind one router. No health
//! checks: what is measured is what stands between the command and forwarding, not how soon servers answer. A
//! first start makes everything; a second one, after the first has ended as by `kill`, takes over what it finds.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use benches::write_report;
use clap::Parser;
use nix::sys::signal::Signal;
use serde::Serialize;
use tests::stage::Stage;
use xtask::lab::LabOptions;

/// Measures how long a start takes.
#[derive(Debug, Parser)]
struct Arguments {
    /// Services, each with a pool of its own.
    #[arg(long, default_value_t = 10_000)]
    services: u32,
    /// Backends of each.
    #[arg(long, default_value_t = 10)]
    each: u32,
    /// Services that listen at the same address, on different ports; given several times, each is measured.
    #[arg(long, default_values_t = [1, 100], value_parser = clap::value_parser!(u32).range(1..=60_000))]
    ports: Vec<u32>,
    /// Where the report goes.
    #[arg(long, default_value = "target/bench/start.json")]
    report: PathBuf,
}

/// The time that nothing may exceed, or something is broken.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between two looks at the daemon: what a time may be too large by.
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// The figures of one document.
#[derive(Debug, Serialize)]
struct Case {
    services: u32,
    backends: u32,
    addresses: u32,
    first: Start,
    second: Start,
    /// `lb status`, once all is there.
    status_seconds: f64,
}

/// The figures of one start.
#[derive(Debug, Serialize)]
struct Start {
    /// Until it forwards by the document, and says so.
    ready_seconds: f64,
    /// Until every address is where it is answered for.
    placed_seconds: f64,
    /// The most memory that was the daemon's at any one time, the tables that it shares with the kernel included.
    peak_mib: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("{:34} {:>8} {:>8} {:>9}", "seconds until", "ready", "placed", "peak, MiB");
    let mut cases = Vec::new();
    for &ports in &arguments.ports {
        cases.push(measure(&arguments, ports)?);
    }
    write_report(&arguments.report, &cases)
}

fn measure(arguments: &Arguments, ports: u32) -> Result<Case> {
    let options = LabOptions { backends: 1, ipv6: false, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    let router = stage.lab.backend_v4(0).to_string();
    let route = ["route", "add", "10.128.0.0/9", "via", &router, "dev", "back"];
    let added = stage.lab.balancer.command("ip").args(route).status().context("ip cannot be run")?;
    ensure!(added.success(), "there is no route to the backends");
    stage.write(&document(arguments, ports))?;

    let addresses = arguments.services.div_ceil(ports);
    let name = |which| format!("{which} start, {} services at {addresses}", arguments.services);
    let first = start(&mut stage, addresses, &name("first"))?;
    let begun = Instant::now();
    let status = stage.json(&["status"])?;
    let status_seconds = begun.elapsed().as_secs_f64();
    println!("{:34} {status_seconds:>8.2}", "`lb status`");
    let told = status["status"]["services"].as_u64();
    ensure!(told == Some(u64::from(arguments.services)), "lb status counts {told:?} services");
    let daemon = stage.daemon.as_mut().context("a daemon has been started")?;
    daemon.signal(Signal::SIGTERM)?;
    daemon.wait()?;
    let second = start(&mut stage, addresses, &name("second"))?;
    let backends = arguments.services * arguments.each;
    Ok(Case { services: arguments.services, backends, addresses, first, second, status_seconds })
}

/// Starts the daemon and waits until it is ready, and then until all addresses are put.
fn start(stage: &mut Stage, addresses: u32, name: &str) -> Result<Start> {
    let log = stage.directory().join(name.replace([' ', ','], "-"));
    let file = fs::File::create(&log)?;
    let mut command = stage.lab.balancer.command(tests::stage::lb());
    command.args(["run", "--log-format", "json", "--config"]).arg(stage.document());
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let begun = Instant::now();
    stage.daemon = Some(xtask::lab::Proc::start(command)?);
    let until = |stage: &mut Stage, done: &dyn Fn(&Stage) -> Result<bool>| -> Result<f64> {
        while !done(stage)? {
            let daemon = stage.daemon.as_mut().context("a daemon has been started")?;
            let ended = daemon.child().try_wait()?;
            if ended.is_some() || begun.elapsed() > PATIENCE {
                bail!("lb run does not get there ({ended:?}):\n{}", fs::read_to_string(&log)?);
            }
            thread::sleep(BETWEEN_LOOKS);
        }
        Ok(begun.elapsed().as_secs_f64())
    };
    let ready_seconds = until(stage, &|_| Ok(fs::read_to_string(&log)?.contains("\"ready\"")))?;
    let placed_seconds = until(stage, &|stage| Ok(stage.addresses_on_lo()?.len() == addresses as usize))?;
    let daemon = stage.daemon.as_ref().context("a daemon has been started")?.id();
    let peak_mib = peak_mib(daemon)?;
    println!("{name:34} {ready_seconds:>8.2} {placed_seconds:>8.2} {peak_mib:>9.0}");
    Ok(Start { ready_seconds, placed_seconds, peak_mib })
}

/// The greatest resident set of a process so far, in MiB (proc(5), `VmHWM`).
fn peak_mib(process: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse().context("VmHWM is no number")?;
    Ok(kib / 1024.0)
}

/// Services at addresses from 203.0.0.0 on, of backends from 10.128.0.1 on.
fn document(arguments: &Arguments, ports: u32) -> String {
    let (services, backends) = (arguments.services, arguments.services * arguments.each);
    let mut text = format!(
        "interfaces = [\"front\", \"back\"]\n[limits]\nservices = {}\nbackends = {}\nring_pages = {}\n",
        services.next_power_of_two(),
        backends.next_power_of_two(),
        services.next_power_of_two() * 4,
    );
    for service in 0..services {
        let backend = |number: u32| Ipv4Addr::from(0x0a80_0001 + service * arguments.each + number);
        let list: String = (0..arguments.each)
            .map(|number| format!("  {{ address = \"{}:8080\" }},\n", backend(number)))
            .collect();
        let vip = Ipv4Addr::from(0xcb00_0000 + service / ports);
        text += &format!(
            "[pools.p{service}]\nbackends = [\n{list}]\n[services.s{service}]\nlisten = \"{vip}:{}/tcp\"\npool = \"p{service}\"\n",
            1000 + service % ports,
        );
    }
    text
}
