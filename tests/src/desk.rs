//! The desk's process by itself: ordered by a test in the daemon's place, before a backend that writes down
//! what it gets, byte by byte.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use anyhow::{Context as _, Result, bail, ensure};
pub use lb_userspace::proxy::pools::BackendOrder;
use lb_userspace::{
    config::Document,
    daemon::{credentials::Credentials, desk},
    model::desk::{Crowd, Ejection, Speech},
    proxy::{
        orders::{self, FromDesk, Orders, Pem, Report, ToDesk},
        pools::PoolOrder,
    },
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use crate::stage::lb;

/// What is said of all pools.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How the desk speaks with servers.
    pub speech: Speech,
    /// How many requests each may have.
    pub crowd: Option<Crowd>,
    /// When one gets none for a while.
    pub ejection: Option<Ejection>,
    /// On one processor: what one of its workers does is seen by itself.
    pub alone: bool,
}

/// A desk's process.
pub struct Desk {
    child: Child,
    control: UnixStream,
    /// Where it listens, in the order of the document's services by name.
    pub addresses: Vec<SocketAddr>,
    number: u64,
    pool: Settings,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Desk {
    /// A desk that serves the services of a document, whatever addresses they name, on addresses of
    /// loopback, all with these certificates; `pools` are theirs by name.
    ///
    /// # Errors
    /// When it does not come to serve.
    pub fn start(services: &str, pools: &[(&str, Vec<BackendOrder>)], certificates: &[Pem]) -> Result<Self> {
        Self::with(Settings::default(), services, pools, certificates)
    }

    /// The same, with what else is said of all pools.
    ///
    /// # Errors
    /// When it does not come to serve.
    pub fn with(
        pool: Settings,
        services: &str,
        pools: &[(&str, Vec<BackendOrder>)],
        certificates: &[Pem],
    ) -> Result<Self> {
        let (here, there) = UnixStream::pair()?;
        let all = sched_getaffinity(Pid::from_raw(0))?;
        if pool.alone {
            // A process may run where the thread may that starts it.
            let first = (0..CpuSet::count()).find(|&cpu| all.is_set(cpu).unwrap_or(false));
            let mut one = CpuSet::new();
            one.set(first.context("a processor")?)?;
            sched_setaffinity(Pid::from_raw(0), &one)?;
        }
        let child = Command::new(lb())
            .args(["desk-process", "--log-level", "warn"])
            .stdin(Stdio::from(OwnedFd::from(there)))
            .stdout(Stdio::piped())
            .spawn();
        sched_setaffinity(Pid::from_raw(0), &all)?;
        let mut child = child?;
        let out = BufReader::new(child.stdout.take().context("its standard output")?);
        let (line, lines) = std::sync::mpsc::channel();
        // Ends with the desk, or with whoever wanted to read.
        std::thread::spawn(move || out.lines().map_while(Result::ok).all(|text| line.send(text).is_ok()));
        let number = services.matches("[services.").count() - services.matches(".routes]").count();
        let sockets: Result<Vec<_>, _> =
            (0..number).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect();
        let sockets = sockets?;
        let addresses: Vec<SocketAddr> =
            sockets.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
        for (socket, &address) in sockets.iter().zip(&addresses) {
            socket.set_nonblocking(true)?;
            orders::send(&here, &ToDesk::Listen(vec![address]), &[socket.as_fd()])?;
        }
        let mut desk = Self { child, control: here, addresses, number: 0, pool, lines };
        desk.serve(services, pools, certificates)?;
        Ok(desk)
    }

    /// Has it serve so from now on.
    ///
    /// # Errors
    /// When it does not.
    pub fn serve(
        &mut self,
        services: &str,
        pools: &[(&str, Vec<BackendOrder>)],
        certificates: &[Pem],
    ) -> Result<()> {
        let named: String =
            pools.iter().map(|(name, _)| format!("[pools.{name}]\nbackends = []\n")).collect();
        let mut document = Document::parse(&format!("interfaces = [\"lo\"]\n{named}{services}"))?;
        document.config.pools.values_mut().for_each(|pool| pool.speech = self.pool.speech.clone());
        let mut services = desk::services(&document.config, |_| certificates.first());
        for (service, &address) in services.iter_mut().zip(&self.addresses) {
            service.listen = address;
            service.certificates = certificates.to_vec();
        }
        let pools = pools.iter().map(|(name, backends)| PoolOrder {
            name: (*name).into(),
            speech: self.pool.speech.clone(),
            crowd: self.pool.crowd,
            ejection: self.pool.ejection,
            backends: backends.clone(),
        });
        self.number += 1;
        let mut credentials = Credentials::default();
        credentials.refresh(&document.config);
        ensure!(credentials.alarms().is_empty(), "{:?}", credentials.alarms());
        let files = credentials.files().clone();
        let orders = Orders { number: self.number, services, pools: pools.collect(), files };
        orders::send(&self.control, &ToDesk::Serve(Box::new(orders)), &[])?;
        self.until(|said| matches!(said, FromDesk::Serving(number) if *number == self.number)).map(drop)
    }

    /// What it counts, once that is so.
    ///
    /// # Errors
    /// When it does not come to be so.
    pub fn report(&self, is_so: impl Fn(&Report) -> bool) -> Result<Report> {
        match self.until(|said| matches!(said, FromDesk::Report(report) if is_so(report)))? {
            FromDesk::Report(report) => Ok(report),
            other => bail!("{other:?}"),
        }
    }

    /// The next line of its access log.
    ///
    /// # Errors
    /// When none comes.
    pub fn line(&self) -> Result<String> {
        self.lines.recv_timeout(std::time::Duration::from_secs(20)).context("a line of the access log")
    }

    fn until(&self, wanted: impl Fn(&FromDesk) -> bool) -> Result<FromDesk> {
        let patience = std::time::Duration::from_secs(20);
        let began = std::time::Instant::now();
        self.control.set_read_timeout(Some(patience))?;
        // It reports each second, whether that is what somebody waits for or not.
        while began.elapsed() < patience {
            let (said, _) = orders::receive::<FromDesk>(&self.control)?.context("the desk has ended")?;
            if wanted(&said) {
                return Ok(said);
            }
        }
        bail!("the desk does not come to say what was expected")
    }

    /// Tells it to end, as when another has taken over; its connections may take so long.
    ///
    /// # Errors
    /// When it does not hear.
    pub fn drain(&self, milliseconds: u64) -> Result<()> {
        Ok(orders::send(&self.control, &ToDesk::Drain { milliseconds, at_once: false }, &[])?)
    }

    /// What it has of memory, in KiB.
    ///
    /// # Errors
    /// When it has ended.
    pub fn memory(&self) -> Result<u64> {
        self.status("VmRSS:")
    }

    /// The same, from where on its peak is measured.
    ///
    /// # Errors
    /// When it has ended, or the kernel does not measure.
    pub fn measure_memory(&self) -> Result<u64> {
        // "Reset the peak resident set size" (proc_pid_clear_refs(5)).
        fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?;
        self.memory()
    }

    /// The most that it has had of memory since then, in KiB: the kernel keeps it, so nothing that comes and goes is missed.
    ///
    /// # Errors
    /// When it has ended.
    pub fn peak_memory(&self) -> Result<u64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("its memory")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        // Gone already is as good.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// A backend as the desk knows it.
pub fn backend(address: SocketAddr) -> BackendOrder {
    BackendOrder {
        address: address.ip(),
        port: Some(address.port()),
        weight: 1,
        usable: true,
        draining: false,
        cut: false,
    }
}

/// A request as a backend got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    /// Which connection it came by, from 0.
    pub connection: usize,
    /// The request line and headers, as they were.
    pub head: String,
    /// The body, without the marks of chunks.
    pub body: String,
    /// What comes after chunks, line by line.
    pub trailers: String,
}

impl Got {
    /// The value of a header, of each time that it is there.
    pub fn header(&self, name: &str) -> Vec<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
    }

    /// Method and path.
    pub fn line(&self) -> &str {
        self.head.lines().next().unwrap_or_default()
    }
}

/// What a backend does with a request.
#[derive(Clone, Debug)]
pub enum Deed {
    /// Says this, and waits for the next one.
    Say(Vec<u8>),
    /// Says this, and closes.
    SayAndClose(Vec<u8>),
    /// Says nothing, and waits.
    Nothing,
}

/// A backend that writes down what it gets.
pub struct Recorder {
    /// Where it listens.
    pub address: SocketAddr,
    got: Arc<Mutex<Vec<Got>>>,
    /// What has come beyond the last whole request of connections that have ended.
    torn: Arc<Mutex<Vec<String>>>,
    open: Arc<AtomicUsize>,
}

/// A service with little patience, and a path that it refuses.
pub const HASTY: &str = r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
timeouts = { header = "2s", connect = "2s", response = "1s", body = "1s" }
[[services.shop.routes]]
path = "/admin"
respond = 403
"#;

/// An answer with this body.
pub fn answer(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

impl Recorder {
    /// One on loopback that does with each request what `deed` says.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(deed: impl Fn(&Got) -> Deed + Send + Sync + 'static) -> Result<Self> {
        Self::on(TcpListener::bind((IpAddr::from(Ipv4Addr::LOCALHOST), 0))?, deed)
    }

    /// One that takes connections from here.
    ///
    /// # Errors
    /// When it has no address.
    pub fn on(listener: TcpListener, deed: impl Fn(&Got) -> Deed + Send + Sync + 'static) -> Result<Self> {
        let address = listener.local_addr()?;
        let got = Arc::new(Mutex::new(Vec::new()));
        let torn = Arc::new(Mutex::new(Vec::new()));
        let (list, rests, deed) = (Arc::clone(&got), Arc::clone(&torn), Arc::new(deed));
        let open = Arc::new(AtomicUsize::new(0));
        let here = Arc::clone(&open);
        std::thread::spawn(move || {
            for (connection, stream) in listener.incoming().enumerate() {
                let Ok(stream) = stream else { return };
                let (list, rests, deed) = (Arc::clone(&list), Arc::clone(&rests), Arc::clone(&deed));
                let here = Arc::clone(&here);
                here.fetch_add(1, SeqCst);
                std::thread::spawn(move || {
                    let mut rest = Vec::new();
                    // The desk may close whenever it likes.
                    _ = record(&stream, connection, &list, deed.as_ref(), &mut rest);
                    if !rest.is_empty() {
                        let rest = String::from_utf8_lossy(&rest).into_owned();
                        rests.lock().unwrap_or_else(PoisonError::into_inner).push(rest);
                    }
                    here.fetch_sub(1, SeqCst);
                });
            }
        });
        Ok(Self { address, got, torn, open })
    }

    /// What it has got.
    pub fn got(&self) -> Vec<Got> {
        self.got.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same, and forgets it.
    pub fn take(&self) -> Vec<Got> {
        std::mem::take(&mut self.got.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether all connections that it had have ended.
    pub fn is_left(&self) -> bool {
        self.open.load(SeqCst) == 0
    }

    /// Every byte that has come beyond whole requests, by connections that have ended; and forgets it.
    pub fn take_torn(&self) -> Vec<String> {
        std::mem::take(&mut self.torn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lines and bodies of what it has got, which it forgets; and whether they are these.
    pub fn take_just(&self, wanted: &[(&str, &str)]) -> (bool, Vec<(String, String)>) {
        let seen: Vec<_> = self.take().into_iter().map(|got| (got.line().to_owned(), got.body)).collect();
        (seen.iter().map(|(line, body)| (line.as_str(), body.as_str())).eq(wanted.iter().copied()), seen)
    }
}

fn record(
    stream: &TcpStream,
    connection: usize,
    list: &Mutex<Vec<Got>>,
    deed: &dyn Fn(&Got) -> Deed,
    left: &mut Vec<u8>,
) -> std::io::Result<()> {
    let (mut reader, mut writer) = (stream, stream);
    let mut more = |left: &mut Vec<u8>| {
        let mut buffer = [0; 16 << 10];
        let length = reader.read(&mut buffer)?;
        left.extend_from_slice(&buffer[..length]);
        if length == 0 { Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)) } else { Ok(()) }
    };
    let find = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|window| window == what);
    loop {
        let end = loop {
            match find(left, b"\r\n\r\n") {
                Some(end) => break end + 4,
                None => more(left)?,
            }
        };
        let head = String::from_utf8_lossy(&left[..end]).into_owned();
        let mut got = Got { connection, head, body: String::new(), trailers: String::new() };
        // How far the request goes; it is taken off when it is whole.
        let (mut body, mut at) = (Vec::new(), end);
        let length = got.header("content-length").first().and_then(|length| length.parse::<usize>().ok());
        if let Some(length) = length {
            while left.len() < at + length {
                more(left)?;
            }
            body.extend_from_slice(&left[at..at + length]);
            at += length;
        } else if !got.header("transfer-encoding").is_empty() {
            loop {
                let line = loop {
                    match find(&left[at..], b"\r\n") {
                        Some(end) => break end,
                        None => more(left)?,
                    }
                };
                let size = usize::from_str_radix(String::from_utf8_lossy(&left[at..at + line]).trim(), 16);
                let size = size.map_err(std::io::Error::other)?;
                at += line + 2;
                if size == 0 {
                    // RFC 9112 section 7.1.2: trailers, and an empty line.
                    let trailers = loop {
                        match find(&left[at - 2..], b"\r\n\r\n") {
                            Some(end) => break end,
                            None => more(left)?,
                        }
                    };
                    got.trailers = String::from_utf8_lossy(&left[at..at + trailers]).into_owned();
                    at += trailers + 2;
                    break;
                }
                while left.len() < at + size + 2 {
                    more(left)?;
                }
                body.extend_from_slice(&left[at..at + size]);
                at += size + 2;
            }
        }
        left.drain(..at);
        got.body = String::from_utf8_lossy(&body).into_owned();
        list.lock().unwrap_or_else(PoisonError::into_inner).push(got.clone());
        match deed(&got) {
            Deed::Say(bytes) => writer.write_all(&bytes)?,
            Deed::SayAndClose(bytes) => {
                writer.write_all(&bytes)?;
                return Ok(());
            }
            Deed::Nothing => {}
        }
    }
}

/// Counts by what.
pub fn count<T: Ord>(all: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    all.into_iter().for_each(|one| *counts.entry(one).or_default() += 1);
    counts
}
