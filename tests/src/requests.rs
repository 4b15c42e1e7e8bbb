//! Clients of HTTP that speak byte by byte: one that says exactly what it is told, and a crowd that asks
//! again and again and keeps account of what became of each request.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};
use xtask::lab::Namespace;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An answer, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its status line and headers.
    pub head: String,
    /// Its body.
    pub body: String,
    /// Who answers will not hear another request.
    pub last: bool,
}

impl Answer {
    /// The value of a header, the first of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }
}

/// A connection that says what it is told.
pub struct Speaker {
    stream: TcpStream,
    /// What has come beyond the last answer.
    left: Vec<u8>,
}

impl Speaker {
    /// Where it calls from.
    ///
    /// # Errors
    /// When it is not connected.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// Connects from a place.
    ///
    /// # Errors
    /// When the connection is not made.
    pub fn connect(from: &Namespace, to: SocketAddr) -> Result<Self> {
        let stream = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
        Self::of(stream)
    }

    /// Connects from where this runs.
    ///
    /// # Errors
    /// When the connection is not made.
    pub fn to(address: SocketAddr) -> Result<Self> {
        Self::of(TcpStream::connect_timeout(&address, PATIENCE)?)
    }

    /// The same, from another address of loopback.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn from_source(source: IpAddr, address: SocketAddr) -> Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        socket.connect(&address.into())?;
        Self::of(socket.into())
    }

    fn of(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, left: Vec::new() })
    }

    /// Says these bytes.
    ///
    /// # Errors
    /// When the connection is closed.
    pub fn say(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next answer; `None`: the connection was closed instead, or in the middle of it.
    ///
    /// # Errors
    /// When nothing comes in time, or something that is no answer.
    pub fn hear(&mut self) -> Result<Option<Answer>> {
        let end = loop {
            if let Some(end) = self.left.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            if !self.more()? {
                return Ok(None);
            }
        };
        let head = String::from_utf8(self.left.drain(..end).collect()).context("a head that is no text")?;
        let status = head.get(9..12).and_then(|digits| digits.parse().ok());
        let status = status.with_context(|| format!("no status in {head:?}"))?;
        if status == 100 {
            return self.hear();
        }
        let lower = head.to_ascii_lowercase();
        let field = |name: &str| {
            let line = lower.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim)
        };
        let last = field("connection:") == Some("close");
        let body = match (field("content-length:"), field("transfer-encoding:")) {
            (Some(length), _) => {
                let length: usize = length.parse().context("a length")?;
                while self.left.len() < length {
                    if !self.more()? {
                        return Ok(None);
                    }
                }
                self.left.drain(..length).collect()
            }
            (None, Some("chunked")) => match self.chunks()? {
                Some(body) => body,
                None => return Ok(None),
            },
            _ if status == 204 || status == 304 => Vec::new(),
            _ => {
                while self.more()? {}
                std::mem::take(&mut self.left)
            }
        };
        Ok(Some(Answer { status, head, body: String::from_utf8_lossy(&body).into_owned(), last }))
    }

    fn chunks(&mut self) -> Result<Option<Vec<u8>>> {
        let mut body = Vec::new();
        loop {
            let Some(end) = self.left.windows(2).position(|two| two == b"\r\n") else {
                if !self.more()? {
                    return Ok(None);
                }
                continue;
            };
            let size = String::from_utf8_lossy(&self.left[..end]).into_owned();
            let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16)?;
            let whole = end + 2 + size + 2;
            while self.left.len() < whole {
                if !self.more()? {
                    return Ok(None);
                }
            }
            body.extend_from_slice(&self.left[end + 2..end + 2 + size]);
            self.left.drain(..whole);
            if size == 0 {
                return Ok(Some(body));
            }
        }
    }

    /// Whether more has come; else it was closed.
    fn more(&mut self) -> Result<bool> {
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(length) => {
                self.left.extend_from_slice(&buffer[..length]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error).context("nothing comes"),
        }
    }

    /// Waits until the connection is closed; what came before.
    ///
    /// # Errors
    /// When it stays open.
    pub fn until_closed(&mut self) -> Result<String> {
        while self.more()? {}
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.left)).into_owned())
    }
}

/// What became of a crowd's requests.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// Answered with 200.
    pub good: usize,
    /// Everything else, in words.
    pub bad: Vec<String>,
}

/// Clients that ask again and again.
pub struct Crowd {
    end: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    account: Arc<Mutex<Account>>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Crowd {
    /// So many clients at a place that ask for `path`, every second one with a new connection for each
    /// request.
    pub fn start(from: &Namespace, to: SocketAddr, path: &str, clients: usize) -> Self {
        let (end, asked, account) = <(Arc<AtomicBool>, Arc<AtomicUsize>, Arc<Mutex<Account>>)>::default();
        let client = |number: usize| {
            let (from, path) = (from.clone(), path.to_owned());
            let (end, asked, account) = (Arc::clone(&end), Arc::clone(&asked), Arc::clone(&account));
            std::thread::spawn(move || {
                from.enter()?;
                let mut kept: Option<Speaker> = None;
                while !end.load(SeqCst) {
                    let outcome = ask(to, &path, &mut kept);
                    if number.is_multiple_of(2) {
                        kept = None;
                    }
                    let mut account = account.lock().unwrap_or_else(PoisonError::into_inner);
                    match outcome {
                        Ok(answer) if answer.status == 200 => account.good += 1,
                        Ok(answer) => account.bad.push(format!("{} {}", answer.head, answer.body)),
                        Err(error) => account.bad.push(format!("{error:#}")),
                    }
                    asked.fetch_add(1, SeqCst);
                }
                Ok(())
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { end, asked, account, clients }
    }

    /// Waits until so many more requests have come to their end.
    ///
    /// # Errors
    /// When they do not.
    pub fn wait_for(&self, more: usize) -> Result<()> {
        let until = self.asked.load(SeqCst) + more;
        let begun = Instant::now();
        while self.asked.load(SeqCst) < until {
            ensure!(begun.elapsed() < PATIENCE, "the crowd hangs: {:?}", self.account);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends it; what became of all requests.
    ///
    /// # Errors
    /// When a client has failed.
    pub fn finish(self) -> Result<Account> {
        self.end.store(true, SeqCst);
        for client in self.clients {
            client.join().map_err(|_| anyhow::anyhow!("a client has panicked"))??;
        }
        Ok(self.account.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// One request, on the connection that is kept or on a new one. A connection that was closed while nothing was
/// under way is no loss: as any client does, it is made anew.
fn ask(to: SocketAddr, path: &str, kept: &mut Option<Speaker>) -> Result<Answer> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    if let Some(mut speaker) = kept.take()
        && !closed(&speaker.stream)
        && speaker.say(request.as_bytes()).is_ok()
        && let Some(answer) = speaker.hear()?
    {
        *kept = (!answer.last).then_some(speaker);
        return Ok(answer);
    }
    let stream = TcpStream::connect_timeout(&to, PATIENCE).context("connecting")?;
    let mut speaker = Speaker::of(stream)?;
    speaker.say(request.as_bytes()).context("asking")?;
    let answer = speaker.hear()?.context("the connection was cut before the answer")?;
    *kept = (!answer.last).then_some(speaker);
    Ok(answer)
}

/// Whether the other side has closed a connection.
fn closed(stream: &TcpStream) -> bool {
    let mut byte = [0];
    _ = stream.set_nonblocking(true);
    let gone = !matches!(stream.peek(&mut byte), Err(error) if error.kind() == ErrorKind::WouldBlock);
    _ = stream.set_nonblocking(false);
    gone
}
