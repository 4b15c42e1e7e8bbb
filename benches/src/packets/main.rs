//! What one packet costs in the kernel: `cargo xtask bench`.
//!
//! A generator program writes each frame anew and tail-calls what is measured, all inside
//! `BPF_PROG_TEST_RUN`, so no driver and no network is in the figure. Beside the program stand two others:
//! `empty` sends back what it got, and the floor writes as many bytes as translation does without looking
//! at anything. What the program costs is what it takes above the floor of its family.
//!
//! Every figure is of packets that were all forwarded, of as many distinct flows as it says, and a sample
//! of them is checked byte by byte; else the benchmark fails.

mod generator;
mod report;
mod scene;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use generator::{Generator, Kind};
use report::{Case, Report};
use scene::Scene;

/// Measures the packet path in the kernel.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only cases whose name contains this, such as `v4-tcp`.
    #[arg(long, default_value = "")]
    only: String,
    /// Times that each case is measured.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Packets of each run.
    #[arg(long, default_value_t = 1_000_000)]
    packets: u32,
    /// The largest number of flows.
    #[arg(long, default_value_t = 1_000_000)]
    flows: u64,
    /// Where the report goes.
    #[arg(long, default_value = "target/bench/report.json")]
    report: std::path::PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // One CPU: counters are per CPU, and caches are.
    let mut cpus = CpuSet::new();
    cpus.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &cpus).context("this thread cannot choose its CPU")?;

    let mut generator = Generator::new()?;
    let empty_ns = median(&mut measure(arguments.runs, || generator.run_empty(arguments.packets))?);
    let mut report = Report::new(empty_ns);
    for v6 in [false, true] {
        let kind = Kind { v6, udp: false };
        generator.order(kind, arguments.flows, false)?;
        generator.lead_to_floor(v6)?;
        let floor = median(&mut measure(arguments.runs, || generator.run(arguments.packets))?);
        report.floor(v6, floor);
    }
    report.print_head();
    for kind in Kind::ALL {
        for flows in [1, 1_000, 10_000, 100_000, 1_000_000].into_iter().filter(|&f| f <= arguments.flows) {
            let name = format!("nat-{kind}-tracked");
            if name.contains(&arguments.only) {
                report.add(tracked(&arguments, &mut generator, kind, flows, name)?);
            }
        }
        for state in ["new", "flood"] {
            let name = format!("nat-{kind}-{state}");
            // A flood is of SYNs; UDP has none.
            if name.contains(&arguments.only) && !(kind.udp && state == "flood") {
                report.add(new_flows(&arguments, &mut generator, kind, state == "flood", name)?);
            }
        }
    }
    report.write(&arguments.report)?;
    println!("\nwritten to {}", arguments.report.display());
    Ok(())
}

/// Packets at random of flows that are known.
fn tracked(
    arguments: &Arguments,
    generator: &mut Generator,
    kind: Kind,
    flows: u64,
    name: String,
) -> Result<Case> {
    let mut scene = Scene::new(kind)?;
    generator.lead_to(&mut scene)?;
    let all = u32::try_from(flows)?;
    generator.order(kind, flows, true)?;
    scene.forwarding(all, || generator.run(all))?;
    ensure!(scene.flows()? == flows, "{} flows were opened for {name}, not {flows}", scene.flows()?);
    generator.order(kind, flows, false)?;
    scene.check_sample(kind)?;
    let mut times =
        measure(arguments.runs, || scene.forwarding(arguments.packets, || generator.run(arguments.packets)))?;
    ensure!(scene.flows()? == flows, "packets of known flows opened others");
    Ok(Case::new(name, kind.v6, flows, &mut times))
}

/// A new flow with every packet: into tables with room, or over and over where half-open flows give way.
fn new_flows(
    arguments: &Arguments,
    generator: &mut Generator,
    kind: Kind,
    flood: bool,
    name: String,
) -> Result<Case> {
    let mut scene = Scene::new(kind)?;
    generator.lead_to(&mut scene)?;
    generator.order(kind, 0, true)?;
    if flood {
        // Once over, so that every place has a half-open flow.
        for _ in 0..2 * scene::FLOWS / arguments.packets + 1 {
            scene.forwarding(arguments.packets, || generator.run(arguments.packets))?;
        }
    }
    let mut times = measure(arguments.runs, || {
        if !flood {
            scene = Scene::new(kind)?;
            generator.lead_to(&mut scene)?;
        }
        scene.forwarding(arguments.packets, || generator.run(arguments.packets))
    })?;
    let flows = scene.flows()?;
    if !flood {
        ensure!(flows == u64::from(arguments.packets), "{flows} flows were opened for {name}");
    }
    Ok(Case::new(name, kind.v6, flows, &mut times))
}

/// Nanoseconds a packet, once a run, after one that warms up.
fn measure(runs: usize, mut run: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    run()?;
    (0..runs.max(1)).map(|_| run()).collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
