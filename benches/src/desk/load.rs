//! Load by h2load, and what one run of it showed.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use tests::stage::{self, Stage};

use crate::proxies::{HOST, Proxies};

/// What is asked for, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    path: &'static str,
    pub(crate) tls: bool,
    protocol: Protocol,
    connections: Connections,
    pub(crate) requests: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2 { streams: usize },
}

#[derive(Clone, Copy, Debug)]
enum Connections {
    /// So many, each for its share of the requests.
    Kept(usize),
    /// One for each request, so many begun in a second.
    New { each_second: usize },
}

/// What is measured.
pub(crate) const CASES: &[Case] = &[
    Case::new("h1, one client", "/1k", Protocol::Http1, Connections::Kept(1), 5_000),
    Case::new("h1, 1 KB", "/1k", Protocol::Http1, Connections::Kept(50), 40_000),
    Case::new("h1, 64 KB", "/64k", Protocol::Http1, Connections::Kept(50), 15_000),
    Case::new("TLS 1.3, h1, 1 KB", "/1k", Protocol::Http1, Connections::Kept(50), 40_000).with_tls(),
    Case::new("TLS 1.3, h1, 64 KB", "/64k", Protocol::Http1, Connections::Kept(50), 15_000).with_tls(),
    Case::new("TLS 1.3 handshake", "/1k", Protocol::Http1, Connections::New { each_second: 400 }, 2_000)
        .with_tls(),
    Case::new("h2, 1 KB", "/1k", Protocol::Http2 { streams: 10 }, Connections::Kept(10), 40_000).with_tls(),
];

impl Case {
    const fn new(
        name: &'static str,
        path: &'static str,
        protocol: Protocol,
        connections: Connections,
        requests: usize,
    ) -> Self {
        Self { name, path, tls: false, protocol, connections, requests }
    }

    const fn with_tls(self) -> Self {
        Self { tls: true, ..self }
    }

    /// The same with another number of requests.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rough number"
    )]
    pub(crate) fn scaled(&self, by: f64) -> Self {
        Self { requests: ((self.requests as f64 * by) as usize).max(100), ..*self }
    }
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Processor time of the proxy for a request, microseconds.
    pub(crate) cpu_us: Option<f64>,
    /// How long a request took, microseconds; without the handshake.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// Calls a proxy. All requests must be answered with 200, by the protocol that the case is about.
pub(crate) fn run(stage: &Stage, proxies: &Proxies, proxy: &str, case: &Case) -> Result<Sample> {
    let log = stage.directory().join("requests.log");
    let target = proxies.address(proxy, case.tls);
    let url = format!("{}://{HOST}{}", if case.tls { "https" } else { "http" }, case.path);
    let requests = case.requests.to_string();
    let mut arguments = vec![format!("--log-file={}", log.display()), format!("--connect-to={target}")];
    arguments.extend(["-n".into(), requests.clone()]);
    match case.connections {
        Connections::Kept(number) => arguments.extend(["-c".into(), number.to_string()]),
        Connections::New { each_second } => {
            let each_period = (each_second / 10).to_string();
            let period = "--rate-period=100ms".into();
            arguments.extend(["-c".into(), requests, "-r".into(), each_period, period]);
        }
    }
    match case.protocol {
        Protocol::Http1 => arguments.push("--h1".into()),
        Protocol::Http2 { streams } => arguments.extend(["-m".into(), streams.to_string()]),
    }
    arguments.push(url);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();

    // It appends.
    if log.exists() {
        fs::remove_file(&log)?;
    }
    let before = proxies.cpu_time(proxy)?;
    let output = stage::run(&stage.lab.client, Path::new("h2load"), &arguments)?;
    let spent = proxies.cpu_time(proxy)?.zip(before).map(|(after, before)| after.saturating_sub(before));
    let said = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "h2load {arguments:?}: {said}{error}");
    if case.tls {
        let wanted = if case.protocol == Protocol::Http1 { "http/1.1" } else { "h2" };
        ensure!(said.contains(&format!("Application protocol: {wanted}")), "{proxy}: {said}");
        ensure!(said.contains("TLS Protocol: TLSv1.3"), "{proxy}: {said}");
    }

    let mut times = Vec::new();
    for line in fs::read_to_string(&log).context("h2load's log")?.lines() {
        // When it began, the status, and how long it took, in microseconds (h2load(1)).
        let fields: Vec<&str> = line.split('\t').collect();
        ensure!(fields.get(1) == Some(&"200"), "{proxy} answered {line:?}");
        let time: u32 = fields.get(2).context("three fields")?.parse()?;
        times.push(f64::from(time));
    }
    ensure!(times.len() == case.requests, "{proxy}: {} answers of {}: {said}", times.len(), case.requests);
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "a number of requests is small")]
    let cpu_us = spent.map(|spent| spent.as_secs_f64() * 1e6 / case.requests as f64);
    Ok(Sample { cpu_us, p50_us: at(50), p99_us: at(99) })
}
