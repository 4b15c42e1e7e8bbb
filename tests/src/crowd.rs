//! Crowds of clients: tens of thousands of connections that talk in turn, and notice when somebody else answers.
//!
//! A connection says its number and counts; the answer of [`crate::echo`] begins with the server's name, which must
//! be the same for as long as the connection lasts. What a connection is not promised is not held against it: one
//! whose server was taken out since it began, and one that was silent for longer than [`Fate::patience`], because
//! the machine was slow.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use xtask::lab::Namespace;

use crate::echo::{ANSWER, MESSAGE, own_descriptors};

/// How many talk at the same time: so many have said something before the first answer is read. A veth interface
/// holds 256 packets for its receiver and drops the rest.
const AT_ONCE: usize = 32;
/// How long an answer may take; packets are lost under a flood.
const ANSWERED: Duration = Duration::from_secs(30);
/// How long a newcomer waits to be let in.
const LET_IN: Duration = Duration::from_secs(1);
/// How many servers there may be.
const SERVERS: usize = 64;

/// What all crowds know of the servers.
#[derive(Debug)]
pub struct Fate {
    /// How long a connection may be silent and still be promised that it stays.
    pub patience: Duration,
    /// How often each server was taken out.
    taken_out: [AtomicU64; SERVERS],
    /// Whose connections newcomers are to end, a bit for each server.
    hang_up: AtomicU64,
    /// Newcomers come.
    open: AtomicBool,
}

impl Fate {
    /// All servers are there; nobody new comes yet.
    pub fn new(patience: Duration) -> Arc<Self> {
        Arc::new(Self {
            patience,
            taken_out: std::array::from_fn(|_| AtomicU64::new(0)),
            hang_up: AtomicU64::new(0),
            open: AtomicBool::new(false),
        })
    }

    /// A server will be taken out: its connections are promised nothing any more.
    pub fn take_out(&self, server: u8) {
        self.taken_out[usize::from(server)].fetch_add(1, SeqCst);
    }

    /// Newcomers end what they have with a server, or do so no more.
    pub fn hang_up(&self, server: u8, yes: bool) {
        let bit = 1 << server;
        if yes {
            self.hang_up.fetch_or(bit, SeqCst)
        } else {
            self.hang_up.fetch_and(!bit, SeqCst)
        };
    }

    /// Lets newcomers in, or sends all away that have come.
    pub fn open(&self, yes: bool) {
        self.open.store(yes, SeqCst);
    }
}

/// How a crowd fared.
#[derive(Debug, Default)]
pub struct Fared {
    /// Connections that talk still.
    pub talking: AtomicUsize,
    /// Those that ended though promised to stay, or were answered by another server: what happened.
    pub broken: Mutex<Vec<String>>,
    /// Those that ended after too long a silence.
    pub silent: AtomicUsize,
    /// Those that ended since their server was taken out.
    pub taken_out: AtomicUsize,
    /// Newcomers that were let in.
    pub came: AtomicUsize,
    sweeps: AtomicU64,
    stop: AtomicBool,
}

/// Connections from one address, on a thread of their own.
pub struct Crowd {
    fared: Arc<Fared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Crowd {
    /// Begins so many connections from an address of the place; [`Crowd::gathers`] waits for them.
    pub fn start(place: &Namespace, from: IpAddr, to: SocketAddr, number: usize, fate: &Arc<Fate>) -> Self {
        let mut begun = false;
        Self::prepared(place, fate, move |talks, fate, _| {
            if !std::mem::replace(&mut begun, true) {
                for number in 0..number {
                    let stream =
                        call(from, to).with_context(|| format!("connection {number} from {from}"))?;
                    talks.push(Talk::new(stream, number as u32, fate)?);
                }
            }
            Ok(())
        })
    }

    /// Waits until all have talked for the first time.
    ///
    /// # Errors
    /// When one has not begun.
    pub fn gathers(&mut self) -> Result<()> {
        self.wait(0)
    }

    /// Begins connections one after the other for as long as [`Fate::open`] says so, at most so many at a time.
    pub fn newcomers(place: &Namespace, to: Vec<SocketAddr>, most: usize, fate: &Arc<Fate>) -> Self {
        let mut count = 0;
        Self::prepared(place, fate, move |talks, fate, fared| {
            if !fate.open.load(SeqCst) {
                talks.clear();
                std::thread::sleep(Duration::from_millis(5));
            }
            let away = fate.hang_up.load(SeqCst);
            talks.retain(|talk| away >> talk.server & 1 == 0);
            for _ in 0..10 {
                if !fate.open.load(SeqCst) || talks.len() >= most {
                    break;
                }
                count += 1;
                // Under a flood not everybody is let in.
                let Ok(stream) = TcpStream::connect_timeout(&to[count % to.len()], LET_IN) else { continue };
                if let Ok(talk) = Talk::new(stream, count as u32, fate) {
                    talks.push(talk);
                    fared.came.fetch_add(1, SeqCst);
                }
            }
            Ok(())
        })
    }

    fn prepared(
        place: &Namespace,
        fate: &Arc<Fate>,
        mut between: impl FnMut(&mut Vec<Talk>, &Fate, &Fared) -> Result<()> + Send + 'static,
    ) -> Self {
        let (place, fate) = (place.clone(), fate.clone());
        let fared = Arc::new(Fared::default());
        let told = fared.clone();
        let (ready, begun) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            place.enter()?;
            own_descriptors()?;
            ready.send(())?;
            let mut talks = Vec::new();
            while !told.stop.load(SeqCst) {
                between(&mut talks, &fate, &told)?;
                sweep(&mut talks, &fate, &told);
                told.talking.store(talks.len(), SeqCst);
                told.sweeps.fetch_add(1, SeqCst);
            }
            Ok(())
        });
        // If it has failed, whoever waits for it is told.
        _ = begun.recv();
        Self { fared, thread: Some(thread) }
    }

    /// How it fared up to now.
    pub fn fared(&self) -> &Fared {
        &self.fared
    }

    /// Turns of talking that are over.
    pub fn sweeps(&self) -> u64 {
        self.fared.sweeps.load(SeqCst)
    }

    /// Waits until more turns than so many are over.
    ///
    /// # Errors
    /// When it has failed, or takes minutes.
    pub fn wait(&mut self, sweeps: u64) -> Result<()> {
        let begun = Instant::now();
        while self.sweeps() <= sweeps {
            if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
                let ended = self.thread.take().map(JoinHandle::join);
                ended.context("ended before")?.map_err(|_| anyhow::anyhow!("a crowd has panicked"))??;
            }
            ensure!(begun.elapsed() < Duration::from_secs(120), "nobody talks any more");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.fared.stop.store(true, SeqCst);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Waits until everybody in all these crowds has talked at least so many times from now on.
///
/// # Errors
/// When they do not.
pub fn all_talk(crowds: &mut [Crowd], times: u64) -> Result<()> {
    // The turn that is under way may have begun before.
    let now: Vec<u64> = crowds.iter().map(Crowd::sweeps).collect();
    crowds.iter_mut().zip(now).try_for_each(|(crowd, now)| crowd.wait(now + times))
}

/// A connection.
struct Talk {
    stream: TcpStream,
    number: u32,
    count: u32,
    server: u8,
    /// When it last said something.
    said: Instant,
    /// For how long it was silent at most.
    silent: Duration,
    /// How often its server had been taken out when it began.
    taken_out: u64,
}

impl Talk {
    fn new(stream: TcpStream, number: u32, fate: &Fate) -> Result<Self> {
        stream.set_read_timeout(Some(ANSWERED))?;
        stream.set_nodelay(true)?;
        let (said, silent) = (Instant::now(), Duration::ZERO);
        // Who answers is not known yet, and may be taken out this moment.
        let before: Vec<u64> = fate.taken_out.iter().map(|count| count.load(SeqCst)).collect();
        let mut talk = Self { stream, number, count: 0, server: 0, said, silent, taken_out: 0 };
        talk.say()?;
        talk.server = talk.hear()?;
        talk.taken_out = before[usize::from(talk.server)];
        Ok(talk)
    }

    fn message(&self) -> [u8; MESSAGE] {
        (u64::from(self.number) << 32 | u64::from(self.count)).to_be_bytes()
    }

    fn say(&mut self) -> std::io::Result<()> {
        self.count += 1;
        self.stream.write_all(&self.message())
    }

    /// The name of who answers.
    fn hear(&mut self) -> Result<u8> {
        let mut answer = [0; ANSWER];
        self.stream.read_exact(&mut answer)?;
        ensure!(answer[1..] == self.message(), "{answer:?} answers {:?}", self.message());
        ensure!(usize::from(answer[0]) < SERVERS, "no server is called {}", answer[0]);
        Ok(answer[0])
    }
}

/// Everybody talks once; who cannot is gone afterwards.
fn sweep(talks: &mut Vec<Talk>, fate: &Fate, fared: &Fared) {
    let mut ended = Vec::new();
    for (chunk, some) in talks.chunks_mut(AT_ONCE).enumerate() {
        let begun = Instant::now();
        let said: Vec<_> = some.iter_mut().map(Talk::say).collect();
        for ((number, talk), said) in some.iter_mut().enumerate().zip(said) {
            let heard = said.map_err(Into::into).and_then(|()| talk.hear());
            talk.silent = talk.silent.max(talk.said.elapsed());
            talk.said = begun;
            let wrong = match heard {
                Ok(server) if server == talk.server => continue,
                Ok(server) => format!("server {server} answers"),
                Err(error) => format!("{error:#}"),
            };
            ended.push(chunk * AT_ONCE + number);
            let taken_out = fate.taken_out[usize::from(talk.server)].load(SeqCst) != talk.taken_out;
            if taken_out {
                fared.taken_out.fetch_add(1, SeqCst);
            } else if talk.silent > fate.patience {
                fared.silent.fetch_add(1, SeqCst);
            } else {
                let client = talk.stream.local_addr();
                let what = format!("{client:?} with server {}, said {}: {wrong}", talk.server, talk.count);
                fared.broken.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(what);
            }
        }
    }
    for index in ended.into_iter().rev() {
        talks.swap_remove(index);
    }
}

/// Connects from an address; the kernel chooses a port that is free towards whom is called.
fn call(from: IpAddr, to: SocketAddr) -> Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(from, 0)))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(socket))
}
