//! What one sees of the database: its servers as Lobby sees them, and what each of them does.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::{
    demo::{bank::Bank, bank::Figures, display::View},
    lab::Namespace,
};

/// What Lobby says of the servers.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Cluster {
    /// Who gets writes.
    pub(super) primary: Option<String>,
    /// In the document's order.
    pub(super) servers: Vec<Server>,
}

/// What it says of one.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Server {
    address: String,
    role: Option<String>,
    answers: bool,
    timeline: Option<u32>,
    lag_seconds: Option<f64>,
    written: bool,
    pub(super) read: bool,
    pub(super) fenced: bool,
}

impl Cluster {
    /// Asks `lb pool show`, at its place.
    pub(super) fn ask(place: &Namespace, program: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Pool {
            cluster: Cluster,
        }
        let output = place.command(program).args(["--json", "pool", "show", "accounts"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "lb pool show: {}", String::from_utf8_lossy(&output.stderr).trim());
        let pool: Pool = serde_json::from_str(&text).with_context(|| format!("lb pool show said {text}"))?;
        Ok(pool.cluster)
    }
}

/// The picture.
pub(super) struct Picture {
    place: Namespace,
    program: PathBuf,
    figures: Figures,
    before: Mutex<(Instant, BTreeMap<String, [u64; 2]>)>,
}

/// A server in the picture: what Lobby says, and transfers and reads a second.
type Seen = (Server, [u64; 2]);

impl Picture {
    pub(super) fn new(place: &Namespace, program: &Path, bank: &Bank) -> Self {
        let before = Mutex::new((Instant::now(), BTreeMap::new()));
        Self { place: place.clone(), program: program.to_owned(), figures: bank.figures(), before }
    }

    /// Each server, with what it has done a second since this was last asked.
    fn look(&self) -> Vec<Seen> {
        // A daemon that does not answer for once leaves the picture empty for once.
        let cluster = Cluster::ask(&self.place, &self.program).unwrap_or_default();
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = before.0.elapsed().as_secs_f64().max(0.001);
        let now = self.figures.by_server();
        let seen = cluster.servers.into_iter().map(|server| {
            let ip = server.address.rsplit_once(':').map_or(&*server.address, |(ip, _)| ip);
            let of = |figures: &BTreeMap<String, [u64; 2]>| figures.get(ip).copied().unwrap_or_default();
            let ([paid, read], [paid_before, read_before]) = (of(&now), of(&before.1));
            let rate = |more: u64| (more as f64 / seconds).round() as u64;
            (server, [rate(paid - paid_before), rate(read - read_before)])
        });
        let seen = seen.collect();
        *before = (Instant::now(), now);
        seen
    }
}

impl View for Picture {
    fn plain(&self, at: Duration) -> String {
        plain(at, &self.look())
    }

    fn picture(&self, colours: bool) -> Vec<String> {
        picture(&self.look(), colours)
    }

    fn wait(&self, terminal: bool) {
        std::thread::sleep(Duration::from_millis(if terminal { 500 } else { 1000 }));
    }
}

/// What a server is, in a word.
fn word(server: &Server) -> &'static str {
    match (server.answers, server.role.as_deref()) {
        (false, _) | (_, None) => "silent",
        (true, Some("primary")) if server.fenced => "fenced",
        (true, Some("primary")) => "primary",
        (true, Some("replica")) if !server.read => "too late",
        (true, Some("replica")) => "replica",
        (true, Some(_)) => "neither",
    }
}

fn plain(at: Duration, seen: &[Seen]) -> String {
    let servers = seen.iter().zip(1..).map(|((server, [paid, read]), number)| {
        format!("{number} {}, {paid} transfers/s, {read} reads/s", word(server))
    });
    format!("{:>3} s  {}", at.as_secs(), servers.collect::<Vec<_>>().join("; "))
}

fn picture(seen: &[Seen], colours: bool) -> Vec<String> {
    const WIDTH: u64 = 25;
    const FULL: u64 = 500;
    let mut lines = vec![String::new()];
    for ((server, [paid, read]), number) in seen.iter().zip(1..) {
        let colour = match word(server) {
            "primary" => "\x1b[32m",
            "replica" => "\x1b[36m",
            "too late" => "\x1b[33m",
            _ => "\x1b[31m",
        };
        let (colour, end) = if colours { (colour, "\x1b[0m") } else { ("", "") };
        let filled = (paid * WIDTH).div_ceil(FULL).min(WIDTH) as usize;
        let timeline = server.timeline.map_or_else(String::new, |timeline| format!("timeline {timeline}"));
        let lag = server.lag_seconds.map_or_else(String::new, |lag| format!("{lag:.1} s behind"));
        lines.push(format!(
            "  server {number} {:<16} {colour}{:<9}{bar:<25}{end} {paid:>4} transfers/s {read:>4} reads/s  {timeline:<11} {lag:<13} {}",
            server.address,
            word(server),
            if server.written { "← writes" } else { "" },
            bar = "█".repeat(filled),
        ));
    }
    lines.push(String::new());
    lines
}

#[cfg(test)]
mod tests {
    use super::{Server, picture, plain};
    use std::time::Duration;

    fn server(role: &str, read: bool, fenced: bool) -> Server {
        Server {
            address: "10.2.0.21:5432".into(),
            role: Some(role.into()),
            answers: true,
            timeline: Some(2),
            lag_seconds: Some(0.25),
            written: false,
            read,
            fenced,
        }
    }

    #[test]
    fn a_line_says_who_is_what_and_does_how_much() {
        let seen = [
            (server("primary", false, true), [0, 0]),
            (Server { written: true, ..server("primary", false, false) }, [250, 0]),
            (server("replica", true, false), [0, 30]),
            (server("replica", false, false), [0, 0]),
            (Server { answers: false, ..server("replica", true, false) }, [0, 0]),
        ];
        assert_eq!(
            plain(Duration::from_secs(7), &seen),
            "  7 s  1 fenced, 0 transfers/s, 0 reads/s; 2 primary, 250 transfers/s, 0 reads/s; \
             3 replica, 0 transfers/s, 30 reads/s; 4 too late, 0 transfers/s, 0 reads/s; 5 silent, 0 transfers/s, 0 reads/s"
        );
        let lines = picture(&seen, false);
        let bars: Vec<_> = lines.iter().map(|line| line.chars().filter(|c| *c == '█').count()).collect();
        assert_eq!(bars, [0, 0, 13, 0, 0, 0, 0]);
        assert!(lines[2].contains("← writes") && lines[1].contains("0.2 s behind"), "{lines:?}");
        assert!(lines.iter().all(|line| !line.contains('\x1b')));
    }
}
