//! The access log: a line of JSON for each request, on standard output.
//!
//! Of a request only what is listed here is written down: no query, which may hold what is secret, and no
//! header but `User-Agent`.

use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, SyncSender, TrySendError, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use http::{Version, header, request::Parts};
use serde::Serialize;

use super::chance::Chance;

/// Lines that wait to be written; beyond that they are lost, and counted: a reader that does not read holds
/// up nobody.
const WAITING: usize = 8192;

/// How long lines are gathered before they are written together: who has a line for each request would have the desk
/// woken, and the kernel called, for each otherwise.
const GATHERED: Duration = Duration::from_millis(10);

/// Most that is written at once, bytes, unless a line alone is longer: another desk that takes over writes to the same pipe, and
/// what is longer may be torn (PIPE_BUF, pipe(7)).
const AT_ONCE: usize = 4 << 10;

/// How long a desk that ends waits until its lines are written.
const LAST: Duration = Duration::from_secs(1);

/// A request and its answer.
#[derive(Debug, Serialize)]
pub struct Line {
    /// When it came, seconds since the epoch.
    time: f64,
    /// The service.
    service: String,
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
    bytes: u64,
    /// From the request's head to the answer's last byte.
    duration_ms: f64,
    /// Who answered; `None`: the desk.
    pub backend: Option<SocketAddr>,
    /// Why the desk did.
    pub trouble: Option<&'static str>,
    /// It stands for so many: of those that went well perhaps not all have a line.
    one_in: u32,
    user_agent: Option<String>,
    request_id: String,
}

impl Line {
    /// Of a request that has just come to a service.
    pub fn of(parts: &Parts, service: &str, client: IpAddr, tls: bool, id: &str) -> Self {
        let text = |name| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let host = text(header::HOST).or_else(|| parts.uri.authority().map(http::uri::Authority::as_str));
        Self {
            protocol: match parts.version {
                Version::HTTP_2 => "HTTP/2",
                Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            },
            method: parts.method.to_string(),
            path: parts.uri.path().to_owned(),
            user_agent: text(header::USER_AGENT).map(str::to_owned),
            request_id: id.to_owned(),
            ..Self::begun(service, client, tls, host.unwrap_or_default())
        }
    }

    /// Of a connection that is handed on as it is, by the name that its client asks for.
    pub fn passed(service: &str, client: IpAddr, name: &str) -> Self {
        Self { protocol: "TLS", ..Self::begun(service, client, true, name) }
    }

    fn begun(service: &str, client: IpAddr, tls: bool, host: &str) -> Self {
        Self {
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            service: service.to_owned(),
            route: String::new(),
            client: client.to_canonical(),
            tls,
            protocol: "",
            method: String::new(),
            host: host.to_owned(),
            path: String::new(),
            status: 0,
            bytes: 0,
            duration_ms: 0.0,
            backend: None,
            trouble: None,
            one_in: 1,
            user_agent: None,
            request_id: String::new(),
        }
    }

    /// Whether it is written, by chance, where of all that went well one in so many is: what went wrong is written down
    /// whole.
    pub fn is_drawn(&mut self, one_in: NonZeroU32, chance: &Chance) -> bool {
        self.one_in = if self.trouble.is_none() && self.status < 500 { one_in.get() } else { 1 };
        self.one_in == 1 || chance.next().is_multiple_of(self.one_in.into())
    }
}

/// Where lines go.
#[derive(Clone, Debug)]
pub struct AccessLog {
    lines: SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Entry {
    Line(String),
    /// All lines before it are to be written now, and then this told.
    Flush(Sender<()>),
}

impl AccessLog {
    /// To `out`, by a thread of its own.
    pub fn to(mut out: impl Write + Send + 'static) -> Self {
        let (lines, waiting) = sync_channel(WAITING);
        thread::spawn(move || {
            let mut text = String::new();
            let mut write = |text: &mut String| {
                // An error: nobody reads any more; the desk goes on.
                _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                text.clear();
            };
            while let Ok(first) = waiting.recv() {
                for entry in std::iter::once(first).chain(waiting.try_iter()) {
                    match entry {
                        Entry::Line(line) => {
                            if text.len() + line.len() > AT_ONCE {
                                write(&mut text);
                            }
                            text.push_str(&line);
                        }
                        Entry::Flush(tell) => {
                            write(&mut text);
                            // It may have given up waiting.
                            _ = tell.send(());
                        }
                    }
                }
                write(&mut text);
                thread::sleep(GATHERED);
            }
        });
        Self { lines, lost: Arc::default() }
    }

    /// Waits until all lines so far are written, but not for long.
    pub fn flush(&self) {
        let (began, (tell, told)) = (Instant::now(), channel());
        let mut flush = Entry::Flush(tell);
        while let Err(TrySendError::Full(again)) = self.lines.try_send(flush) {
            if began.elapsed() > LAST {
                return;
            }
            flush = again;
            thread::sleep(GATHERED);
        }
        // An error: the time is over.
        _ = told.recv_timeout(LAST);
    }

    /// Writes a line, soon, of what began then and has had so many bytes for an answer.
    pub fn write(&self, mut line: Line, began: Instant, bytes: u64) {
        line.bytes = bytes;
        line.duration_ms = began.elapsed().as_secs_f64() * 1e3;
        let Ok(mut text) = serde_json::to_string(&line) else { return };
        text.push('\n');
        if self.lines.try_send(Entry::Line(text)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines that were lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Mutex};

    use super::*;

    /// Keeps each piece that is written by itself.
    #[derive(Clone, Default)]
    struct Pieces(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Pieces {
        fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().push(piece.to_vec());
            Ok(piece.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_together_and_none_is_left_at_the_end() {
        let pieces = Pieces::default();
        let log = AccessLog::to(pieces.clone());
        let (parts, ()) = http::Request::get("/a").body(()).unwrap().into_parts();
        for id in 0..1000 {
            let line = Line::of(&parts, "shop", IpAddr::from([198, 51, 100, 7]), false, &id.to_string());
            log.write(line, Instant::now(), 0);
        }
        log.flush();
        let pieces = pieces.0.lock().unwrap();
        let lines: Vec<serde_json::Value> = pieces
            .concat()
            .split(|&b| b == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect();
        assert_eq!(lines.len(), 1000);
        let ids: Vec<&str> = lines.iter().filter_map(|line| line["request_id"].as_str()).collect();
        assert_eq!(ids, (0..1000).map(|id| id.to_string()).collect::<Vec<_>>());
        assert!(pieces.len() < 300, "{} pieces", pieces.len());
        assert!(pieces.iter().all(|piece| piece.len() <= 4096 && piece.ends_with(b"\n")));
        assert_eq!(log.lost(), 0);
    }
}
