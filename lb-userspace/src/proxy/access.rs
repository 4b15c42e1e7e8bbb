//! The access log: a line of JSON for each request, on standard output.
//!
//! Of a request only what is listed here is written down: no query, which may hold what is secret, and no
//! header but `User-Agent`.

use std::{
    io::Write,
    net::IpAddr,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use http::{Version, header, request::Parts};
use serde::Serialize;

/// Lines that wait to be written; beyond that they are lost, and counted: a reader that does not read holds
/// up nobody.
const WAITING: usize = 4096;

/// A request and its answer.
#[derive(Debug, Serialize)]
pub struct Line {
    /// When it came, seconds since the epoch.
    time: f64,
    /// The service; empty: it has gone.
    pub service: String,
    /// The route, as its condition is written; empty: none.
    pub route: String,
    client: IpAddr,
    tls: bool,
    protocol: &'static str,
    method: String,
    host: String,
    /// Normalised where it could be.
    pub path: String,
    /// The answer's status.
    pub status: u16,
    /// Bytes of the answer's body.
    pub bytes: u64,
    /// From the request's head to the answer's last byte.
    pub duration_ms: f64,
    /// Who answered; `None`: the desk.
    pub backend: Option<String>,
    /// Why the desk did.
    pub trouble: Option<&'static str>,
    /// It stands for so many: of those that went well perhaps not all have a line.
    one_in: u32,
    user_agent: Option<String>,
    request_id: String,
}

impl Line {
    /// Of a request that has just come.
    pub fn of(parts: &Parts, client: IpAddr, tls: bool, id: &str) -> Self {
        let text = |name| parts.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Self {
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            service: String::new(),
            route: String::new(),
            client: client.to_canonical(),
            tls,
            protocol: match parts.version {
                Version::HTTP_2 => "HTTP/2",
                Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            },
            method: parts.method.to_string(),
            host: text(header::HOST)
                .or_else(|| parts.uri.authority().map(ToString::to_string))
                .unwrap_or_default(),
            path: parts.uri.path().to_owned(),
            status: 0,
            bytes: 0,
            duration_ms: 0.0,
            backend: None,
            trouble: None,
            one_in: 1,
            user_agent: text(header::USER_AGENT),
            request_id: id.to_owned(),
        }
    }

    /// Of how many such requests one is to have a line, where of all that went well it is `one_in`: what went wrong is
    /// written down whole.
    pub fn share(&mut self, one_in: NonZeroU32) -> u32 {
        self.one_in = if self.trouble.is_none() && self.status < 500 { one_in.get() } else { 1 };
        self.one_in
    }
}

/// Where lines go.
#[derive(Clone, Debug)]
pub struct AccessLog {
    lines: SyncSender<String>,
    lost: Arc<AtomicU64>,
}

impl AccessLog {
    /// To `out`, by a thread of its own.
    pub fn to(mut out: impl Write + Send + 'static) -> Self {
        let (lines, waiting) = sync_channel::<String>(WAITING);
        std::thread::spawn(move || {
            for line in waiting {
                // Nobody reads any more; the desk goes on.
                _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
            }
        });
        Self { lines, lost: Arc::default() }
    }

    /// Writes a line, soon.
    pub fn write(&self, line: &Line) {
        let Ok(mut text) = serde_json::to_string(line) else { return };
        text.push('\n');
        if self.lines.try_send(text).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines that were lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
