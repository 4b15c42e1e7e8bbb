//! What one packet costs in the kernel: `cargo xtask bench`.
//!
//! A generator program writes each frame anew and tail-calls what is measured, all inside
//! `BPF_PROG_TEST_RUN`, so no driver and no network is in the figure. Beside the program stand two others:
//! `empty` sends back what it got, and the floor writes as many bytes as translation does without looking
//! at anything. What the program costs is what it takes above the floor of its family. Two more are the floor with one
//! look into a table before it: one cache line of a large one, and the kernel's own LRU table, which other balancers
//! keep connections in.
//!
//! Every figure of the program is of packets that were all forwarded, of as many distinct flows as it says, and a sample
//! of them is checked byte by byte; else the benchmark fails.

mod generator;
mod report;
mod scene;

use anyhow::{Context as _, Result, ensure};
use benches::{Spread, write_report};
use clap::Parser;
use lb_common::bench::{LISTED, REMEMBERED};
use tests::{both::stay_on, random::Random};

use generator::{Generator, Kind};
use report::{Case, Report};
use scene::{Mode, Scene};

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
    stay_on(0).context("this thread cannot choose its CPU")?;

    let mut generator = Generator::new()?;
    let empty_ns = measure(arguments.runs, || generator.run_empty(arguments.packets))?.median;
    let mut report = Report::new(empty_ns);
    for v6 in [false, true] {
        let kind = Kind { v6, udp: false };
        generator.order(kind, arguments.flows, false, false)?;
        generator.lead_to_floor(v6)?;
        let floor = measure(arguments.runs, || generator.run(arguments.packets))?.median;
        report.floor(v6, floor);
    }
    report.print_head();
    for (program, name) in RIVALS {
        for flows in FLOWS.into_iter().filter(|&f| f <= arguments.flows && f <= u64::from(REMEMBERED) / 2) {
            if name.contains(&arguments.only) {
                report.add(rival(&arguments, program, name, flows)?);
            }
        }
        let name = format!("{name}-new");
        if name.contains(&arguments.only) {
            report.add(rival(&arguments, program, &name, 0)?);
        }
    }
    for kind in Kind::ALL {
        for (mode, name) in KNOWN {
            let name = format!("{}-{kind}-{name}", prefix(mode));
            for flows in FLOWS.into_iter().filter(|&f| f <= arguments.flows) {
                // Translation has room for four million.
                if name.contains(&arguments.only)
                    && (mode != Mode::Nat || flows <= u64::from(scene::FLOWS) / 2)
                {
                    report.add(known(&arguments, &mut generator, kind, flows, mode, name.clone())?);
                }
            }
        }
        let name = format!("nat-{kind}-answers");
        for flows in FLOWS.into_iter().filter(|&f| f <= arguments.flows && f <= u64::from(LISTED)) {
            if name.contains(&arguments.only) {
                report.add(answers(&arguments, &mut generator, kind, flows, name.clone())?);
            }
        }
        for (mode, name, new) in NEW {
            let name = format!("{}-{kind}-{name}", prefix(mode));
            // A flood is of what TCP says; UDP has none.
            if name.contains(&arguments.only) && !(kind.udp && new != New::Flows) {
                report.add(new_flows(&arguments, &mut generator, kind, mode, new, name)?);
            }
        }
    }
    write_report(&arguments.report, &report)
}

/// Numbers of flows that packets are of.
const FLOWS: [u64; 6] = [1, 1_000, 10_000, 100_000, 1_000_000, 5_000_000];

/// Cases of packets of known flows.
const KNOWN: [(Mode, &str); 4] = [
    (Mode::Settled, "settled"),
    (Mode::Moving, "moving"),
    (Mode::Tracked, "tracked"),
    (Mode::Nat, "tracked"),
];

/// Packets that are each of another flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum New {
    /// The first of each, into tables with room.
    Flows,
    /// SYNs, into tables full of half-open flows.
    Syns,
    /// ACKs of connections that nobody knows, into tables full of them, or of half-open flows where such
    /// packets leave nothing.
    Acks,
}

/// Cases of a new flow with every packet.
const NEW: [(Mode, &str, New); 12] = [
    (Mode::Settled, "new", New::Flows),
    (Mode::Settled, "flood", New::Syns),
    (Mode::Settled, "ack-flood", New::Acks),
    (Mode::Moving, "moving-new", New::Flows),
    (Mode::Moving, "moving-flood", New::Syns),
    (Mode::Moving, "moving-ack-flood", New::Acks),
    (Mode::Tracked, "tracked-new", New::Flows),
    (Mode::Tracked, "tracked-flood", New::Syns),
    (Mode::Tracked, "tracked-ack-flood", New::Acks),
    (Mode::Nat, "new", New::Flows),
    (Mode::Nat, "flood", New::Syns),
    (Mode::Nat, "ack-flood", New::Acks),
];

/// What the program is compared with: programs of the generator's.
const RIVALS: [(&str, &str); 2] = [("line_v4", "line-v4-tcp"), (LRU, "lru-v4-tcp")];
const LRU: &str = "lru_v4";

/// Packets at random of so many flows, which it has seen; or of a new one each time, with a table that is full.
fn rival(arguments: &Arguments, program: &str, name: &str, flows: u64) -> Result<Case> {
    let mut generator = Generator::with_rivals()?;
    let kind = Kind { v6: false, udp: false };
    generator.lead_to_own(program)?;
    generator.order(kind, flows, true, false)?;
    generator.run(if flows > 0 { u32::try_from(flows)? } else { REMEMBERED + REMEMBERED / 8 })?;
    generator.order(kind, flows, false, false)?;
    let [before, _] = generator.told()?;
    let times = measure(arguments.runs, || generator.run(arguments.packets))?;
    let [after, refused] = generator.told()?;
    let new = if program == LRU && flows == 0 {
        (arguments.runs.max(1) as u64 + 1) * u64::from(arguments.packets)
    } else {
        0
    };
    ensure!(
        refused == 0 && after - before == new,
        "{name}: {refused} refused, {} new, not {new}",
        after - before
    );
    Ok(Case::new(name.to_owned(), kind.v6, flows, arguments.runs, times))
}

fn prefix(mode: Mode) -> &'static str {
    if mode == Mode::Nat { "nat" } else { "dsr" }
}

/// Packets at random of flows that are known.
fn known(
    arguments: &Arguments,
    generator: &mut Generator,
    kind: Kind,
    flows: u64,
    mode: Mode,
    name: String,
) -> Result<Case> {
    let mut scene = begun(generator, kind, flows, mode)?;
    let remembered = if mode == Mode::Settled { 0 } else { flows };
    let opened = scene.flows()?;
    // A table with ways has no room for a few where many come together by chance; more often when it is a third full.
    let lost = remembered / if flows > u64::from(scene::FLOWS) { 1_000 } else { 100_000 };
    ensure!(
        opened <= remembered && remembered - opened <= lost,
        "{opened} flows were opened for {name}, not {flows}"
    );
    ensure!(flows < 1000 || scene.backends()? == usize::from(scene::BACKENDS), "the flows of {name} are few");
    generator.order(kind, flows, false, false)?;
    scene.check_sample(kind)?;
    let times =
        measure(arguments.runs, || scene.forwarding(arguments.packets, || generator.run(arguments.packets)))?;
    ensure!(scene.flows()? == opened, "packets of known flows opened others");
    Ok(Case::new(name, kind.v6, flows, arguments.runs, times))
}

/// A scene in which all flows have begun, and TCP's handshakes are over.
fn begun(generator: &mut Generator, kind: Kind, flows: u64, mode: Mode) -> Result<Scene> {
    let mut scene = Scene::new(kind, mode)?;
    generator.lead_to(&mut scene)?;
    let all = u32::try_from(flows)?;
    generator.order(kind, flows, true, mode == Mode::Nat)?;
    scene.forwarding(all, || generator.run(all))?;
    if mode == Mode::Nat && !kind.udp {
        scene.answer_all()?;
        // So many half-open ones at once are a flood, and a few have given way; now they begin again, and fewer.
        for _ in 0..3 {
            scene.forwarding(all, || generator.run(all))?;
            scene.answer_all()?;
        }
        generator.order(kind, flows, true, false)?;
        scene.forwarding(all, || generator.run(all))?;
    }
    Ok(scene)
}

/// Backends' packets of translated flows, each once in a round of no order.
fn answers(
    arguments: &Arguments,
    generator: &mut Generator,
    kind: Kind,
    flows: u64,
    name: String,
) -> Result<Case> {
    let mut scene = begun(generator, kind, flows, Mode::Nat)?;
    let mut frames = scene.answers(kind)?;
    ensure!(frames.len() as u64 >= flows - flows / 100_000, "{} of {flows} flows were opened", frames.len());
    scene.check_answer(&frames[0])?;
    // In no order, and then one after the other: the generator's own list is read ahead, and only the program waits.
    let mut random = Random::new(1);
    for last in (1..frames.len()).rev() {
        frames.swap(last, random.below(last as u64 + 1) as usize);
    }
    generator.list(kind, frames.into_iter())?;
    generator.lead_to_floor(kind.v6)?;
    let floor = measure(arguments.runs, || generator.run(arguments.packets))?.median;
    generator.lead_to(&mut scene)?;
    let times =
        measure(arguments.runs, || scene.answering(arguments.packets, || generator.run(arguments.packets)))?;
    Ok(Case::new(name, kind.v6, flows, arguments.runs, times).above(floor))
}

/// A new flow with every packet.
fn new_flows(
    arguments: &Arguments,
    generator: &mut Generator,
    kind: Kind,
    mode: Mode,
    new: New,
    name: String,
) -> Result<Case> {
    let mut scene = Scene::new(kind, mode)?;
    generator.lead_to(&mut scene)?;
    // Translation knows nothing of a connection of which it has seen no SYN.
    let refused = new == New::Acks && mode == Mode::Nat;
    generator.order(kind, 0, false, new != New::Acks || refused)?;
    if new != New::Flows && mode != Mode::Settled {
        // Until every place has a half-open flow, or as many as find room have been written down.
        for _ in 0..3 * scene::FLOWS / arguments.packets + 1 {
            scene.forwarding(arguments.packets, || generator.run(arguments.packets))?;
        }
    }
    if refused {
        generator.order(kind, 0, false, false)?;
    }
    let times = measure(arguments.runs, || {
        if new == New::Flows {
            scene = Scene::new(kind, mode)?;
            generator.lead_to(&mut scene)?;
        }
        if refused {
            return scene.refusing(arguments.packets, || generator.run_dropped(arguments.packets));
        }
        scene.forwarding(arguments.packets, || generator.run(arguments.packets))
    })?;
    let flows = scene.flows()?;
    if new == New::Flows {
        let opened = if mode == Mode::Settled { 0 } else { u64::from(arguments.packets) };
        // Of records, a bucket may be full by chance; what has no room stays where its slot was.
        let refused = if mode == Mode::Nat { 0 } else { opened / 1000 };
        ensure!(
            opened - refused - opened / 100_000 <= flows && flows <= opened,
            "{flows} flows were opened for {name}"
        );
    }
    Ok(Case::new(name, kind.v6, flows, arguments.runs, times))
}

/// Nanoseconds a packet in so many runs, after one that warms up.
fn measure(runs: usize, mut run: impl FnMut() -> Result<f64>) -> Result<Spread> {
    run()?;
    let times: Vec<f64> = (0..runs.max(1)).map(|_| run()).collect::<Result<_>>()?;
    Spread::of(times).context("no runs")
}
