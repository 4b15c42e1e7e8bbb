//! What a database costs through Lobby's ports, beside the same server without it: `cargo xtask bench --database`.
//!
//! One PostgreSQL server, and pgbench, which calls it in turn through a port of Lobby's (mode `nat`; the read port falls
//! back to the primary) and by its own address. Both cross the same veth pairs, with checksums computed in full: by its
//! own address the balancer's kernel routes the packets, and Lobby's program lets them by. Runs are short, many, and
//! alternate, and which is first too, so what disturbs the machine disturbs both; each ratio is of two runs side by
//! side.
//!
//! And how long it takes from a promotion to the first write through the write port.

mod failover;

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use benches::{Spread, write_report};
use clap::Parser;
use serde::Serialize;
use tests::{
    accounts::{READ, WRITE, cluster_in},
    stage::Stage,
};
use xtask::lab::{LabOptions, postgres};

/// Measures a database through Lobby beside the same without it.
#[derive(Debug, Parser)]
struct Arguments {
    /// How often each case is run each way.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Seconds of one run.
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// Rows of pgbench's tables, in 100,000 accounts.
    #[arg(long, default_value_t = 5)]
    scale: u32,
    /// Promotions, each way of hearing of one.
    #[arg(long, default_value_t = 8)]
    failovers: usize,
    /// Only cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Where the report goes.
    #[arg(long, default_value = "target/bench/database.json")]
    report: PathBuf,
}

/// What is run, through which port.
struct Case {
    name: &'static str,
    port: SocketAddr,
    arguments: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case { name: "select-only, 1 client", port: READ, arguments: &["-b", "select-only", "-c", "1"] },
    Case {
        name: "select-only, 8 clients",
        port: READ,
        arguments: &["-b", "select-only", "-c", "8", "-j", "2"],
    },
    Case { name: "tpcb-like, 1 client", port: WRITE, arguments: &["-b", "tpcb-like", "-c", "1"] },
    Case { name: "tpcb-like, 8 clients", port: WRITE, arguments: &["-b", "tpcb-like", "-c", "8", "-j", "2"] },
    Case {
        name: "select-only, each by a new connection",
        port: READ,
        arguments: &["-b", "select-only", "-c", "1", "-C"],
    },
];

/// What pgbench said of one run.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    /// Transactions a second.
    tps: f64,
    /// How long one took on average, milliseconds.
    latency_ms: f64,
}

/// The figures of one case.
#[derive(Debug, Serialize)]
struct Figures {
    case: &'static str,
    direct_tps: Spread,
    lobby_tps: Spread,
    /// Lobby's transactions a second as a multiple of the others', run by run.
    tps_ratio: Spread,
    /// Lobby's latency as a multiple of the other, run by run.
    latency_ratio: Spread,
    /// First without Lobby, then with it.
    runs: Vec<[Run; 2]>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = LabOptions { backends: 1, ipv6: false, ..LabOptions::default() };
    let (stage, servers) = cluster_in(options, "", "", &["max_connections=50"])?;
    let direct = servers[0].address();
    pgbench(&stage, direct, &["--initialize", "--quiet", "--scale", &arguments.scale.to_string()])?;

    let wanted = |case: &&Case| arguments.only.as_ref().is_none_or(|only| case.name.contains(only.as_str()));
    let cases: Vec<&Case> = CASES.iter().filter(wanted).collect();
    println!("{:38} {:>10} {:>10}   {:>22} {:>22}", "", "direct", "Lobby", "Lobby ÷ direct: tps", "latency");
    let seconds = arguments.seconds.to_string();
    let mut report = Vec::new();
    for case in cases {
        let run = |server: SocketAddr, seconds: &str| -> Result<Run> {
            let arguments = [case.arguments, &["--no-vacuum", "--time", seconds]].concat();
            read(&pgbench(&stage, server, &arguments)?)
        };
        // The first fill caches.
        for server in [direct, case.port] {
            run(server, "1")?;
        }
        let mut runs = Vec::new();
        for round in 0..arguments.rounds.max(1) {
            runs.push(if round % 2 == 0 {
                [run(direct, &seconds)?, run(case.port, &seconds)?]
            } else {
                let lobby = run(case.port, &seconds)?;
                [run(direct, &seconds)?, lobby]
            });
        }
        let spread = |each: &dyn Fn(&[Run; 2]) -> f64| Spread::of(runs.iter().map(each)).context("no runs");
        let ratio = |what: fn(&Run) -> f64| spread(&|[direct, lobby]| what(lobby) / what(direct));
        let figures = Figures {
            case: case.name,
            direct_tps: spread(&|[direct, _]| direct.tps)?,
            lobby_tps: spread(&|[_, lobby]| lobby.tps)?,
            tps_ratio: ratio(|run| run.tps)?,
            latency_ratio: ratio(|run| run.latency_ms)?,
            runs,
        };
        let shown = |Spread { least, median, greatest }| format!("{median:.3} ({least:.2}–{greatest:.2})");
        println!(
            "{:38} {:>10.0} {:>10.0}   {:>22} {:>22}",
            figures.case,
            figures.direct_tps.median,
            figures.lobby_tps.median,
            shown(figures.tps_ratio),
            shown(figures.latency_ratio),
        );
        report.push(figures);
    }
    stage.checksums_were_right()?;
    drop(stage);
    let failovers = failover::measure(arguments.failovers)?;
    println!("\nmilliseconds from a server's word that it is the primary to the first write:");
    let mut times = serde_json::Map::new();
    for (name, times_ms) in [("asked every second", failovers.asked), ("told", failovers.told)] {
        if let Some(Spread { least, median, greatest }) = Spread::of(times_ms.iter().copied()) {
            println!("{name:38} {median:>10.0}   ({least:.0}–{greatest:.0})");
        }
        times.insert(name.to_owned(), times_ms.into());
    }
    let report = serde_json::json!({ "failovers_ms": times, "rounds": arguments.rounds, "seconds": arguments.seconds, "figures": report });
    write_report(&arguments.report, &report)
}

/// Runs pgbench at the client's place; what it printed.
fn pgbench(stage: &Stage, server: SocketAddr, arguments: &[&str]) -> Result<String> {
    let mut command = stage.lab.client.command(postgres::programs()?.join("pgbench"));
    command.args(["--host", &server.ip().to_string(), "--port", &server.port().to_string()]);
    let output = command.args(["--username", "postgres"]).args(arguments).arg("postgres").output()?;
    ensure!(output.status.success(), "pgbench: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The two figures in pgbench's summary.
fn read(summary: &str) -> Result<Run> {
    let figure = |name: &str| -> Result<f64> {
        let line = summary.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        word.and_then(|word| word.parse().ok()).with_context(|| format!("no {name:?} in: {summary}"))
    };
    ensure!(figure("number of failed transactions: ")? == 0.0, "some have failed: {summary}");
    Ok(Run { tps: figure("tps = ")?, latency_ms: figure("latency average = ")? })
}
