//! The desk's process: listens where it is told to, serves as ordered, and goes on with its last orders when
//! the daemon is gone.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener as Socket},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    access::AccessLog,
    auth::Porter,
    chance::Chance,
    confine::confine,
    engine::{self, Connections},
    figures::Figures,
    orders::{self, Frame, FromDesk, Orders, ToDesk},
    state::State,
};

/// Connections from one source at a time: an IPv4 address, or an IPv6 network of 64 bits.
const PER_SOURCE: u32 = 4096;

/// How often the daemon hears how it goes.
const REPORT: Duration = Duration::from_secs(1);

/// How long a daemon may take to hear.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is left after the time for a drain: to write what is being written.
const LAST: Duration = Duration::from_secs(1);

/// How long connections may take to end where the desk is told by a signal, or its daemon ends for good.
const BY_ITSELF: Duration = Duration::from_secs(10);

/// What connections share.
pub(super) struct Shared {
    pub(super) state: ArcSwap<State>,
    pub(super) connections: Connections,
    pub(super) chance: Chance,
    pub(super) porter: Porter,
    pub(super) figures: Figures,
    pub(super) log: AccessLog,
    /// Tells connections to end after the answer that they are at.
    pub(super) closing: CancellationToken,
    /// Answers are to be the last of their connections.
    pub(super) draining: CancellationToken,
    sources: Mutex<HashMap<IpAddr, u32>>,
}

impl Shared {
    fn new() -> io::Result<Self> {
        Ok(Self {
            state: ArcSwap::default(),
            connections: Connections::default(),
            chance: Chance::new(),
            porter: Porter::new()?,
            figures: Figures::default(),
            log: AccessLog::to(io::stdout()),
            closing: CancellationToken::new(),
            draining: CancellationToken::new(),
            sources: Mutex::default(),
        })
    }

    /// Counts a connection of a source; `None`: it has enough.
    pub(super) fn enter(self: &Arc<Self>, source: IpAddr) -> Option<Visitor> {
        let source = network(source);
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let count = sources.entry(source).or_default();
        if *count == PER_SOURCE {
            return None;
        }
        *count += 1;
        Some(Visitor { shared: Arc::clone(self), source })
    }
}

/// A connection of a source, until this is dropped.
pub(super) struct Visitor {
    shared: Arc<Shared>,
    source: IpAddr,
}

impl Drop for Visitor {
    fn drop(&mut self) {
        let mut sources = self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

/// Whom an address belongs to: of IPv6 a whole network.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// Something that a daemon says, and where to answer.
struct Said {
    message: ToDesk,
    fds: Vec<OwnedFd>,
    from: Arc<UnixStream>,
    /// Our own daemon, not one that comes after it.
    own: bool,
}

/// Runs the desk until it is told to end. Standard input is the socket to the daemon.
///
/// # Errors
/// When it cannot start.
pub fn run() -> io::Result<()> {
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    control.set_write_timeout(Some(PATIENCE))?;
    confine()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(serve(control));
    runtime.shutdown_background();
    outcome
}

async fn serve(control: UnixStream) -> io::Result<()> {
    let (said, mut hear) = mpsc::unbounded_channel();
    let control = Arc::new(control);
    listen_to(Arc::clone(&control), true, said.clone());
    let mut desk = Desk {
        shared: Arc::new(Shared::new()?),
        sockets: BTreeMap::new(),
        accepting: BTreeMap::new(),
        control: Some(control),
        stays: false,
        said,
    };
    // What a terminal sends to all that run in it is for the daemon.
    let mut terminate = signal(SignalKind::terminate())?;
    let (mut interrupt, mut hangup) = (signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?);
    let mut report = tokio::time::interval(REPORT);
    let drain = loop {
        tokio::select! {
            said = hear.recv() => match said {
                Some(Heard::Said(said)) => if let Some(drain) = desk.hear(said) { break drain },
                Some(Heard::Gone { own: true }) => {
                    desk.control = None;
                    if !desk.stays {
                        break Drain { within: BY_ITSELF, at_once: true };
                    }
                    warn!("the daemon is gone; the desk goes on with what it knows");
                }
                Some(Heard::Gone { own: false }) | None => {}
            },
            _ = report.tick() => desk.report(),
            _ = terminate.recv() => break Drain { within: BY_ITSELF, at_once: true },
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    };
    desk.drain(drain).await;
    Ok(())
}

enum Heard {
    Said(Said),
    Gone { own: bool },
}

/// Reads what a daemon says, in a thread of its own: sockets that come with it are not tokio's affair.
fn listen_to(from: Arc<UnixStream>, own: bool, said: mpsc::UnboundedSender<Heard>) {
    std::thread::spawn(move || {
        while let Ok(Some((message, fds))) = orders::receive(&from) {
            let heard = Heard::Said(Said { message, fds, from: Arc::clone(&from), own });
            if said.send(heard).is_err() {
                return;
            }
        }
        _ = said.send(Heard::Gone { own });
    });
}

/// How to end.
#[derive(Clone, Copy, Debug)]
struct Drain {
    within: Duration,
    /// Connections without a request end now, rather than with their next one.
    at_once: bool,
}

struct Desk {
    shared: Arc<Shared>,
    sockets: BTreeMap<SocketAddr, Arc<Socket>>,
    accepting: BTreeMap<SocketAddr, JoinHandle<()>>,
    control: Option<Arc<UnixStream>>,
    /// Goes on when the daemon is gone.
    stays: bool,
    said: mpsc::UnboundedSender<Heard>,
}

impl Desk {
    /// Does what it is told; gives back how to end, if so.
    fn hear(&mut self, said: Said) -> Option<Drain> {
        let answer = match said.message {
            ToDesk::Listen(addresses) => {
                let sockets = addresses.into_iter().zip(said.fds);
                self.sockets.extend(sockets.map(|(at, socket)| (at, Arc::new(Socket::from(socket)))));
                Ok(())
            }
            ToDesk::Successors => {
                if let Some(socket) = said.fds.into_iter().next() {
                    self.await_successors(socket);
                }
                Ok(())
            }
            ToDesk::Serve(orders) => {
                self.serve(&orders);
                orders::send(&said.from, &FromDesk::Serving(orders.number), &[])
            }
            ToDesk::Stay => {
                self.stays = true;
                Ok(())
            }
            ToDesk::HandOver => orders::send_sockets(&said.from, &self.sockets, |addresses, more| {
                Frame::FromDesk(FromDesk::Sockets { addresses, more })
            }),
            ToDesk::Drain { milliseconds, at_once } => {
                return Some(Drain { within: Duration::from_millis(milliseconds), at_once });
            }
        };
        if let Err(error) = answer {
            debug!(own = said.own, "the daemon does not hear: {error}");
        }
        None
    }

    /// Daemons that come after ours call here.
    fn await_successors(&self, socket: OwnedFd) {
        let said = self.said.clone();
        let listener = std::os::unix::net::UnixListener::from(socket);
        std::thread::spawn(move || {
            // The daemon has made it so that nobody waits in vain.
            _ = listener.set_nonblocking(false);
            while let Ok((stream, _)) = listener.accept() {
                _ = stream.set_write_timeout(Some(PATIENCE));
                listen_to(Arc::new(stream), false, said.clone());
            }
        });
    }

    fn serve(&mut self, orders: &Orders) {
        let state = State::ordered(orders, &self.shared.state.load());
        let wanted: Vec<SocketAddr> = state.addresses().collect();
        self.shared.state.swap(Arc::new(state)).pools.supersede();
        self.sockets.retain(|address, _| wanted.contains(address));
        self.accepting.retain(|address, task| {
            let stays = wanted.contains(address);
            if !stays {
                task.abort();
            }
            stays
        });
        for (&address, socket) in &self.sockets {
            if self.accepting.contains_key(&address) {
                continue;
            }
            let listener = socket.try_clone().and_then(TcpListener::from_std);
            match listener {
                Ok(listener) => {
                    let accepting = tokio::spawn(accept(Arc::clone(&self.shared), listener, address));
                    self.accepting.insert(address, accepting);
                }
                Err(error) => warn!("cannot listen on {address}: {error}"),
            }
        }
    }

    fn report(&mut self) {
        self.shared.connections.sweep();
        let Some(control) = &self.control else { return };
        let report = FromDesk::Report(self.shared.figures.report(self.shared.log.lost()));
        let wanted = self.shared.porter.wanted();
        let wants = (!wanted.is_empty()).then_some(FromDesk::Wants(wanted));
        let sent = wants.into_iter().chain([report]).try_for_each(|said| orders::send(control, &said, &[]));
        if let Err(error) = sent {
            // Half of it may have gone out: nothing that follows would be understood.
            debug!("the daemon does not hear: {error}");
            self.control = None;
        }
    }

    /// Lets connections end, and ends.
    async fn drain(mut self, how: Drain) {
        self.accepting.values().for_each(JoinHandle::abort);
        self.accepting.clear();
        self.sockets.clear();
        self.shared.draining.cancel();
        if how.at_once {
            self.shared.closing.cancel();
        }
        info!(connections = self.shared.figures.open(), within = ?how.within, "the desk ends");
        self.emptied(how.within).await;
        self.shared.closing.cancel();
        self.emptied(LAST).await;
        self.report();
    }

    /// Waits until there are no connections, or the time is over.
    fn emptied(&self, within: Duration) -> impl Future<Output = ()> {
        let end = Instant::now() + within;
        async move {
            while self.shared.figures.open() > 0 && Instant::now() < end {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// Takes connections until aborted.
async fn accept(shared: Arc<Shared>, listener: TcpListener, called: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, client)) => visit(&shared, stream, client, called),
            Err(error) => {
                // Most likely there are too many open files: some will be closed.
                warn!("cannot take a connection to {called}: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn visit(shared: &Arc<Shared>, stream: TcpStream, client: SocketAddr, called: SocketAddr) {
    let Some(service) = shared.state.load().service(called) else { return };
    if !service.admits(client.ip()) {
        shared.figures.refused("firewall");
        return;
    }
    // A proxy brings the connections of many.
    let visitor = (!service.is_proxy(client.ip())).then(|| shared.enter(client.ip()));
    if let Some(None) = visitor {
        shared.figures.refused("too_many_of_source");
        return;
    }
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let _visitor = visitor;
        let _open = shared.figures.taken();
        engine::serve(Arc::clone(&shared), called, stream, client).await;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_an_address_or_a_network_of_ipv6() {
        let of = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(of("198.51.100.7"), "198.51.100.7");
        assert_eq!(of("::ffff:198.51.100.7"), "198.51.100.7");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }

    #[test]
    fn a_source_has_only_so_many_connections() {
        let shared = Arc::new(Shared::new().unwrap());
        let source = "198.51.100.7".parse().unwrap();
        let mut visitors: Vec<_> = (0..PER_SOURCE).map(|_| shared.enter(source).unwrap()).collect();
        assert!(shared.enter(source).is_none());
        assert!(shared.enter("198.51.100.8".parse().unwrap()).is_some());
        visitors.pop();
        assert!(shared.enter(source).is_some());
        visitors.clear();
        assert!(shared.sources.lock().unwrap().is_empty());
    }
}
