//! Servers that say who they are, each for tens of thousands of connections.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::Ipv6Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use mio::{
    Events, Interest, Poll, Token,
    net::{TcpListener, TcpStream},
};
use nix::sched::{CloneFlags, unshare};
use xtask::lab::Namespace;

/// Where they listen, on all addresses.
pub const PORT: u16 = 80;
/// Where a health check may connect, while the server says that it is fit.
pub const HEALTH_PORT: u16 = 81;

/// Bytes of a message from a client, which it chooses as it likes.
pub const MESSAGE: usize = 8;
/// Bytes of the answer: the server's name, then the message.
pub const ANSWER: usize = MESSAGE + 1;

/// A server, on a thread of its own; ends when dropped.
pub struct Echo {
    fit: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Echo {
    /// Starts one of this name, fit, and waits until it listens.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(place: &Namespace, name: u8) -> Result<Self> {
        let (fit, stop) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let inside = (place.clone(), fit.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let (place, fit, stop) = inside;
            place.enter()?;
            own_descriptors()?;
            serve(name, &fit, &stop)
        });
        for port in [PORT, HEALTH_PORT] {
            place.wait_for_tcp(([127, 0, 0, 1], port).into())?;
        }
        Ok(Self { fit, stop, thread: Some(thread) })
    }

    /// Says whether health checks succeed from now on; what is connected is served all the same.
    pub fn set_fit(&self, fit: bool) {
        self.fit.store(fit, SeqCst);
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("a server has failed: {error:#}");
        }
    }
}

/// From now on this thread has descriptors of its own, and so a limit of its own on their number. It keeps copies of
/// those that were open: nobody should have pipes open at this moment whose end somebody waits for, so whoever
/// starts such a thread waits for this.
///
/// # Errors
/// When the kernel refuses.
pub fn own_descriptors() -> Result<()> {
    unshare(CloneFlags::CLONE_FILES).context("no descriptors of a thread's own")
}

fn serve(name: u8, fit: &AtomicBool, stop: &AtomicBool) -> Result<()> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    let calls = listen(&poll, CALLS, PORT)?;
    let mut probes = None;
    let mut connections = Connections::default();
    while !stop.load(SeqCst) {
        match (fit.load(SeqCst), &probes) {
            (true, None) => probes = Some(listen(&poll, PROBES, HEALTH_PORT)?),
            (false, Some(_)) => probes = None,
            _ => {}
        }
        match poll.poll(&mut events, Some(Duration::from_millis(20))) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        for event in &events {
            match event.token() {
                CALLS => {
                    while let Some(connection) = next(&calls)? {
                        connections.add(&poll, connection)?;
                    }
                }
                PROBES => while probes.as_ref().map(next).transpose()?.flatten().is_some() {},
                Token(number) => connections.answer(name, number),
            }
        }
    }
    Ok(())
}

const CALLS: Token = Token(usize::MAX);
const PROBES: Token = Token(usize::MAX - 1);

/// A listener for both families.
fn listen(poll: &Poll, token: Token, port: u16) -> Result<TcpListener> {
    let address = (Ipv6Addr::UNSPECIFIED, port).into();
    let mut listener = TcpListener::bind(address).with_context(|| format!("port {port}"))?;
    poll.registry().register(&mut listener, token, Interest::READABLE)?;
    Ok(listener)
}

fn next(listener: &TcpListener) -> Result<Option<TcpStream>> {
    match listener.accept() {
        Ok((connection, _)) => Ok(Some(connection)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Clients, each with its number.
#[derive(Default)]
struct Connections {
    all: Vec<Option<TcpStream>>,
    free: Vec<usize>,
}

impl Connections {
    fn add(&mut self, poll: &Poll, mut connection: TcpStream) -> Result<()> {
        connection.set_nodelay(true)?;
        let number = self.free.pop().unwrap_or(self.all.len());
        poll.registry().register(&mut connection, Token(number), Interest::READABLE)?;
        if number == self.all.len() {
            self.all.push(None);
        }
        self.all[number] = Some(connection);
        Ok(())
    }

    /// Answers what a client has said, until there is no more.
    fn answer(&mut self, name: u8, number: usize) {
        let Some(connection) = &mut self.all[number] else { return };
        let mut bytes = [0; 16 * MESSAGE];
        let ended = loop {
            match connection.read(&mut bytes) {
                Ok(0) => break true,
                // A client waits for its answer before it goes on, and a message so short comes whole.
                Ok(length) => {
                    let mut messages = bytes[..length].chunks(MESSAGE);
                    if messages.any(|message| connection.write_all(&[&[name], message].concat()).is_err()) {
                        break true;
                    }
                }
                Err(error) => break error.kind() != ErrorKind::WouldBlock,
            }
        };
        if ended {
            self.all[number] = None;
            self.free.push(number);
        }
    }
}
