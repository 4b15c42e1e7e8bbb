//! What daemon and desk say to each other: frames of JSON over a Unix socket, a length of four bytes before
//! each, and open sockets beside them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::pools::PoolOrder;
use crate::model::{Network, desk::Desk};

/// Largest frame: a document for tens of thousands of backends.
const FRAME_LIMIT: usize = 64 << 20;

/// Sockets that go with one frame at most (SCM_MAX_FD, linux/net/scm.h).
const FDS: usize = 253;

/// What a daemon says to a desk.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToDesk {
    /// Listen on these; the sockets come with it, in order.
    Listen(Vec<SocketAddr>),
    /// Serve so from now on; addresses of no service are listened on no more.
    Serve(Box<Orders>),
    /// Go on when the daemon is gone, once the next orders are served. Daemons that come after it call at the first socket that
    /// comes with this; the others lead to desks of before, which are to be told then that they end.
    Stay {
        /// How long their connections may take.
        milliseconds: u64,
    },
    /// Give copies of the listening sockets.
    HandOver,
    /// Take no new connections, let those that there are end, and end.
    Drain {
        /// How long they may take.
        milliseconds: u64,
        /// Connections without a request end now, rather than with their next one.
        at_once: bool,
    },
}

impl ToDesk {
    /// [`Self::Drain`], within a time.
    pub fn drain(within: Duration, at_once: bool) -> Self {
        Self::Drain { milliseconds: milliseconds(within), at_once }
    }
}

/// A time as frames have it.
pub fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What a desk says to a daemon.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromDesk {
    /// It serves these orders, by their number.
    Serving(u64),
    /// The sockets of these addresses come with it, in order; more of the same may follow.
    Sockets {
        /// Their addresses.
        addresses: Vec<SocketAddr>,
        /// There are more.
        more: bool,
    },
    /// How it goes.
    Report(Report),
    /// Keys are asked for that are not among those from these addresses.
    Wants(BTreeSet<PathBuf>),
}

/// How a desk is to serve.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Orders {
    /// Counts up with each change.
    pub number: u64,
    /// The services.
    pub services: Vec<ServiceOrder>,
    /// The pools that their routes name.
    pub pools: Vec<PoolOrder>,
    /// The files that they name, but for certificates: who is known to routes, authorities, pages.
    pub files: Files,
}

/// Files by their names, as they were when they could last be used.
pub type Files = BTreeMap<PathBuf, Secret>;

/// How a service is to be served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceOrder {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Networks that may come in; empty: all that are not denied.
    pub allow: Vec<Network>,
    /// Networks that may not; the longest prefix decides.
    pub deny: Vec<Network>,
    /// Certificates; empty: plain HTTP.
    pub certificates: Vec<Pem>,
    /// What the document says of it.
    pub desk: Desk,
}

/// A certificate and its key, as their files have them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pem {
    /// The chain.
    pub chain: String,
    /// The key.
    pub key: Secret,
}

/// A text that is never shown. It is written out in one place only: the socket to the desk.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Of this text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, for who needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// How a desk goes: sums since its start, but for what is open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Connections that are open.
    pub open: u64,
    /// Those of them that are websockets.
    #[serde(default)]
    pub websockets: u64,
    /// Those of them that are handed on as they are.
    #[serde(default)]
    pub passed: u64,
    /// Connections that were taken.
    pub connections: u64,
    /// Connections that were not let in, or ended by the desk, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Requests that were tried once more.
    pub retries: u64,
    /// Lines of the access log that nobody could write in time.
    pub lines_lost: u64,
    /// Answers.
    pub answers: Vec<Answers>,
    /// How long answers took to begin.
    #[serde(default)]
    pub latencies: Vec<Latencies>,
    /// Answers of the desk's own, by reason.
    pub troubles: BTreeMap<String, u64>,
    /// Requests that were not let in.
    #[serde(default)]
    pub denied: Vec<Denied>,
    /// How often backends got no requests for a while.
    #[serde(default)]
    pub ejections: Vec<Ejections>,
    /// The number of the orders that it served by when it counted what is under way.
    #[serde(default)]
    pub serving: u64,
    /// What is under way, of backends that have something.
    #[serde(default)]
    pub under_way: Vec<UnderWay>,
}

/// Requests of a backend that are under way, and what was made of some: websockets, connections that are handed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderWay {
    /// Its pool.
    pub pool: String,
    /// Where it is.
    pub address: IpAddr,
    /// On which port; `None`: on that which was called.
    pub port: Option<u16>,
    /// How many.
    pub count: u64,
}

/// How often a backend that did not answer well got no requests for a while.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ejections {
    /// Its pool.
    pub pool: String,
    /// Its address.
    pub backend: String,
    /// How often.
    pub count: u64,
}

/// What the time until an answer begins is counted by, in seconds: up to each of these.
pub const LATENCY_BOUNDS: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// How long answers of a route took to begin.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Latencies {
    /// The service.
    pub service: String,
    /// The route, as its condition is written; empty: none.
    pub route: String,
    /// The pool that it leads to; empty: the desk answers by itself.
    #[serde(default)]
    pub pool: String,
    /// How many, by [`LATENCY_BOUNDS`]; the last: longer.
    pub counts: Vec<u64>,
    /// All of them together.
    pub microseconds: u64,
}

/// Requests that were not let in for one reason.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Denied {
    /// The service.
    pub service: String,
    /// The route, as its condition is written.
    pub route: String,
    /// What they were answered.
    pub status: u16,
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// Answers of one kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Answers {
    /// The service.
    pub service: String,
    /// The route, as its condition is written; empty: none.
    pub route: String,
    /// The pool that it leads to; empty: the desk answers by itself.
    #[serde(default)]
    pub pool: String,
    /// First digit of the status.
    pub class: u16,
    /// How many.
    pub count: u64,
}

impl Report {
    /// Adds what a desk before has counted.
    pub fn add(&mut self, before: &Self) {
        self.connections += before.connections;
        self.retries += before.retries;
        self.lines_lost += before.lines_lost;
        for (mine, others) in [(&mut self.refused, &before.refused), (&mut self.troubles, &before.troubles)] {
            for (reason, count) in others {
                *mine.entry(reason.clone()).or_default() += count;
            }
        }
        for other in &before.answers {
            let same = |mine: &&mut Answers| {
                (&mine.service, &mine.route, &mine.pool, mine.class)
                    == (&other.service, &other.route, &other.pool, other.class)
            };
            match self.answers.iter_mut().find(same) {
                Some(mine) => mine.count += other.count,
                None => self.answers.push(other.clone()),
            }
        }
        self.answers.sort();
        for other in &before.latencies {
            let same = |mine: &&mut Latencies| {
                (&mine.service, &mine.route, &mine.pool) == (&other.service, &other.route, &other.pool)
            };
            match self.latencies.iter_mut().find(same) {
                Some(mine) => {
                    mine.counts.iter_mut().zip(&other.counts).for_each(|(mine, count)| *mine += count);
                    mine.microseconds += other.microseconds;
                }
                None => self.latencies.push(other.clone()),
            }
        }
        self.latencies.sort();
        for other in &before.denied {
            let same = |mine: &&mut Denied| **mine == Denied { count: mine.count, ..other.clone() };
            match self.denied.iter_mut().find(same) {
                Some(mine) => mine.count += other.count,
                None => self.denied.push(other.clone()),
            }
        }
        self.denied.sort();
        for other in &before.ejections {
            let same = |mine: &&mut Ejections| (&mine.pool, &mine.backend) == (&other.pool, &other.backend);
            match self.ejections.iter_mut().find(same) {
                Some(mine) => mine.count += other.count,
                None => self.ejections.push(other.clone()),
            }
        }
        self.ejections.sort();
    }
}

/// Sends a frame, and sockets with it.
///
/// # Errors
/// When the other side is gone.
pub fn send(stream: &UnixStream, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidData)?.to_be_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The sockets go with the first byte; what of the rest does not fit at once follows.
    let sent = sendmsg(stream, &[IoSlice::new(&length)], &mut beside, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(&length[sent..])?;
    stream.write_all(&body)
}

/// Waits for a frame, and the sockets that came with it; `None`: the other side is gone.
///
/// # Errors
/// When what comes is no frame.
pub fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut into = [IoSliceMut::new(&mut length)];
        match recvmsg(stream, &mut into, &mut beside, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => break other?.bytes,
        }
    };
    if got == 0 {
        return Ok(None);
    }
    let mut fds = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(sockets) = message {
            fds.extend(sockets);
        }
    }
    let mut stream = stream;
    stream.read_exact(&mut length[got..])?;
    let length = u32::from_be_bytes(length) as usize;
    if length > FRAME_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the frame is too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(Some((serde_json::from_slice(&body)?, fds)))
}

/// Sends listening sockets, as many frames as it takes.
///
/// # Errors
/// When the other side is gone.
pub fn send_sockets<S: AsFd>(
    stream: &UnixStream,
    sockets: &BTreeMap<SocketAddr, S>,
    frame: impl Fn(Vec<SocketAddr>, bool) -> Frame,
) -> io::Result<()> {
    let all: Vec<_> = sockets.iter().collect();
    let mut parts = all.chunks(FDS).peekable();
    if parts.peek().is_none() {
        return send_frame(stream, &frame(Vec::new(), false), &[]);
    }
    while let Some(part) = parts.next() {
        let fds: Vec<_> = part.iter().map(|(_, socket)| socket.as_fd()).collect();
        let addresses = part.iter().map(|(address, _)| **address).collect();
        send_frame(stream, &frame(addresses, parts.peek().is_some()), &fds)?;
    }
    Ok(())
}

/// A frame in either direction.
pub enum Frame {
    /// From a daemon.
    ToDesk(ToDesk),
    /// From a desk.
    FromDesk(FromDesk),
}

fn send_frame(stream: &UnixStream, frame: &Frame, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    match frame {
        Frame::ToDesk(message) => send(stream, message, fds),
        Frame::FromDesk(message) => send(stream, message, fds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_sockets_arrive_together() {
        let (here, there) = UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let sockets = BTreeMap::from([(address, listener)]);
        send_sockets(&here, &sockets, |addresses, _| Frame::ToDesk(ToDesk::Listen(addresses))).unwrap();
        send(&here, &ToDesk::HandOver, &[]).unwrap();
        drop(here);
        let (message, mut fds) = receive::<ToDesk>(&there).unwrap().unwrap();
        assert!(matches!(message, ToDesk::Listen(addresses) if addresses == [address]));
        let socket = std::net::TcpListener::from(fds.pop().unwrap());
        assert_eq!(socket.local_addr().unwrap(), address);
        let (message, fds) = receive::<ToDesk>(&there).unwrap().unwrap();
        assert!(matches!(message, ToDesk::HandOver) && fds.is_empty());
        assert!(receive::<ToDesk>(&there).unwrap().is_none());
    }

    #[test]
    fn what_is_no_frame_is_an_error_and_no_memory() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(&u32::MAX.to_be_bytes()).unwrap();
        assert!(receive::<ToDesk>(&there).is_err());
    }

    #[test]
    fn a_key_is_never_shown() {
        let pem = Pem { chain: "chain".into(), key: Secret::new("-----BEGIN".into()) };
        assert_eq!(format!("{pem:?}"), "Pem { chain: \"chain\", key: (secret) }");
    }

    #[test]
    fn sums_go_on_after_a_crash() {
        let answers = |route: &str, count| Answers {
            service: "s".into(),
            route: route.into(),
            pool: "p".into(),
            class: 2,
            count,
        };
        let denied = |route: &str, count| Denied {
            service: "s".into(),
            route: route.into(),
            status: 401,
            reason: "no_credentials".into(),
            count,
        };
        let mut now = Report {
            open: 1,
            connections: 2,
            answers: vec![answers("a", 3)],
            denied: vec![denied("a", 1)],
            ..Report::default()
        };
        let before = Report {
            open: 9,
            connections: 5,
            answers: vec![answers("a", 4), answers("b", 1)],
            troubles: [("slow".to_owned(), 2)].into(),
            denied: vec![denied("a", 2), denied("b", 1)],
            ..Report::default()
        };
        now.add(&before);
        assert_eq!((now.open, now.connections), (1, 7));
        assert_eq!(now.answers, [answers("a", 7), answers("b", 1)]);
        assert_eq!(now.troubles["slow"], 2);
        assert_eq!(now.denied, [denied("a", 3), denied("b", 1)]);
    }
}
