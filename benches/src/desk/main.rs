//! What a request costs at the reception desk, beside nginx and HAProxy: `cargo xtask bench --desk`.
//!
//! All three run on the balancer of one lab, behind the same interface with Lobby's program on it, before the same
//! backend (nginx with files), and forward with the same headers. h2load calls them in turn, round after round, with a
//! fixed number of requests; so what disturbs the machine disturbs all of them. What counts is the processor
//! time of the proxy's processes for a request, and how long a request took. Only ratios of one run mean something.

mod load;
mod proxies;

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use benches::{Spread, write_report};
use clap::Parser;
use serde::Serialize;
use tests::stage::Stage;
use xtask::lab::LabOptions;

use load::{Case, Sample};
use proxies::Proxies;

/// Measures the reception desk beside nginx and HAProxy.
#[derive(Debug, Parser)]
struct Arguments {
    /// How often each case is run with each proxy.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Requests of a round, as a share of the usual number.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Only cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Where the report goes.
    #[arg(long, default_value = "target/bench/desk.json")]
    report: PathBuf,
}

/// The figures of one proxy in one case.
#[derive(Debug, Serialize)]
struct Figures {
    case: &'static str,
    proxy: &'static str,
    requests: usize,
    /// Processor time of all its processes for a request, microseconds, median of the rounds; nothing for the
    /// backend itself, without a proxy.
    cpu_us: Option<f64>,
    cpu_us_min: Option<f64>,
    cpu_us_max: Option<f64>,
    /// How long a request took, microseconds, median of the rounds' medians and 99th percentiles.
    p50_us: f64,
    p99_us: f64,
    /// The same as a multiple of nginx', median of the rounds' ratios.
    cpu_of_nginx: Option<f64>,
    p50_of_nginx: Option<f64>,
    p99_of_nginx: Option<f64>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = LabOptions { backends: 1, ipv6: false, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    for (name, size) in [("1k", 1 << 10), ("64k", 64 << 10)] {
        fs::write(stage.directory().join(name), vec![b'x'; size])?;
    }
    stage.nginx(0)?;
    let proxies = Proxies::start(&mut stage)?;

    let cases: Vec<Case> = load::CASES
        .iter()
        .filter(|case| arguments.only.as_ref().is_none_or(|only| case.name.contains(only.as_str())))
        .map(|case| case.scaled(arguments.scale))
        .collect();
    ensure!(!cases.is_empty(), "no case is called so");
    println!(
        "{:22} {:8} {:>8} {:>17} {:>8} {:>8}   {:>13} {:>5} {:>5}",
        "", "", "CPU µs", "", "p50 µs", "p99 µs", "of nginx: CPU", "p50", "p99"
    );
    let mut report = Vec::new();
    for case in &cases {
        let names = proxies.of(case);
        // The first requests make connections to the backend, and fill caches.
        for name in &names {
            load::run(&stage, &proxies, name, &case.scaled(0.1))?;
        }
        let mut rounds: Vec<Vec<Sample>> = names.iter().map(|_| Vec::new()).collect();
        for _ in 0..arguments.rounds.max(1) {
            for (name, samples) in names.iter().zip(&mut rounds) {
                samples.push(load::run(&stage, &proxies, name, case)?);
            }
        }
        let nginx = names.iter().position(|name| *name == "nginx").context("nginx is always there")?;
        for (name, samples) in names.iter().zip(&rounds) {
            let figures = figures(case, name, samples, &rounds[nginx]);
            print(&figures);
            report.push(figures);
        }
    }
    let report = serde_json::json!({ "rounds": arguments.rounds, "figures": report });
    write_report(&arguments.report, &report)
}

fn figures(case: &Case, proxy: &'static str, samples: &[Sample], nginx: &[Sample]) -> Figures {
    let of = |what: fn(&Sample) -> Option<f64>| Spread::of(samples.iter().filter_map(what));
    let ratio = |what: fn(&Sample) -> Option<f64>| {
        let both = samples.iter().zip(nginx);
        let all = both.filter_map(|(here, there)| Some(what(here)? / what(there)?));
        Spread::of(all).map(|spread| spread.median)
    };
    let cpu = of(|sample| sample.cpu_us);
    Figures {
        case: case.name,
        proxy,
        requests: case.requests,
        cpu_us: cpu.map(|cpu| cpu.median),
        cpu_us_min: cpu.map(|cpu| cpu.least),
        cpu_us_max: cpu.map(|cpu| cpu.greatest),
        p50_us: of(|sample| Some(sample.p50_us)).unwrap_or_default().median,
        p99_us: of(|sample| Some(sample.p99_us)).unwrap_or_default().median,
        cpu_of_nginx: ratio(|sample| sample.cpu_us),
        p50_of_nginx: ratio(|sample| Some(sample.p50_us)),
        p99_of_nginx: ratio(|sample| Some(sample.p99_us)),
    }
}

fn print(figures: &Figures) {
    let number = |value: Option<f64>, digits: usize| {
        value.map(|value| format!("{value:.digits$}")).unwrap_or_default()
    };
    let spread = match (figures.cpu_us_min, figures.cpu_us_max) {
        (Some(min), Some(max)) => format!("({min:.1}–{max:.1})"),
        _ => String::new(),
    };
    println!(
        "{:22} {:8} {:>8} {:>17} {:>8.0} {:>8.0}   {:>13} {:>5} {:>5}",
        figures.case,
        figures.proxy,
        number(figures.cpu_us, 1),
        spread,
        figures.p50_us,
        figures.p99_us,
        number(figures.cpu_of_nginx, 2),
        number(figures.p50_of_nginx, 2),
        number(figures.p99_of_nginx, 2),
    );
}
