//! The desk's process: listens where it is told to, serves as ordered, and goes on with its last orders when
//! the daemon is gone.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::{SocketAddr, TcpListener as Socket},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
    time::Instant,
};
use tracing::{debug, info, warn};

use super::{
    confine::confine,
    orders::{self, Frame, FromDesk, Orders, Report, ToDesk},
    state::State,
    worker::{Shared, Workers},
};

/// How often the daemon hears how it goes.
const REPORT: Duration = Duration::from_secs(1);

/// How long a daemon may take to hear.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is left after the time for a drain: to write what is being written.
const LAST: Duration = Duration::from_secs(1);

/// How long connections may take to end where the desk is told by a signal, or its daemon ends for good.
const BY_ITSELF: Duration = Duration::from_secs(10);

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
    // It depends on files how many there may be.
    let threads = std::thread::available_parallelism()?;
    confine()?;
    let shared = Arc::new(Shared::new()?);
    let workers = Workers::start(&shared, threads)?;
    // What connections are made of is the workers' affair; here it is only heard what is to be done.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve(control, shared, workers))
}

async fn serve(control: UnixStream, shared: Arc<Shared>, workers: Workers) -> io::Result<()> {
    let (said, mut hear) = mpsc::unbounded_channel();
    let control = Arc::new(control);
    listen_to(Arc::clone(&control), true, said.clone());
    let mut desk = Desk {
        shared,
        workers,
        sockets: BTreeMap::new(),
        accepting: BTreeMap::new(),
        control: Some(control),
        stay: None,
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
    // Daemons that call from here on are not to wait for an answer.
    drop(hear);
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
            let ends = matches!(message, ToDesk::Drain { .. });
            let heard = Heard::Said(Said { message, fds, from: Arc::clone(&from), own });
            // It ends already. Who tells it to waits for that: the stream stays open until then. Anybody else is not to wait.
            if said.send(heard).is_err() && !ends {
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

/// What goes with staying.
struct Stay {
    /// At the first daemons of after call, the others lead to desks of before.
    fds: Vec<OwnedFd>,
    /// How long those may take to end.
    within: Duration,
}

struct Desk {
    shared: Arc<Shared>,
    workers: Workers,
    sockets: BTreeMap<SocketAddr, Arc<Socket>>,
    accepting: BTreeMap<SocketAddr, JoinHandle<()>>,
    control: Option<Arc<UnixStream>>,
    /// It has been told to go on when the daemon is gone, and serves nothing yet.
    stay: Option<Stay>,
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
            ToDesk::Stay { milliseconds } => {
                self.stay = Some(Stay { fds: said.fds, within: Duration::from_millis(milliseconds) });
                Ok(())
            }
            ToDesk::Serve(orders) => {
                self.serve(&orders);
                self.stay();
                orders::send(&said.from, &FromDesk::Serving(orders.number), &[])
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

    /// Goes on by itself from here on, if it is to, and lets those before end: in one breath, so that whenever the daemon dies
    /// one of both goes on, and not both.
    fn stay(&mut self) {
        let Some(Stay { fds, within }) = self.stay.take() else { return };
        self.stays = true;
        let mut fds = fds.into_iter();
        if let Some(socket) = fds.next() {
            self.await_successors(socket);
        }
        for before in fds.map(UnixStream::from) {
            if let Err(error) = orders::send(&before, &ToDesk::drain(within, false), &[]) {
                debug!("a desk of before does not hear that it is to end; it has ended: {error}");
            }
        }
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
        let state = Arc::new(state);
        self.shared.state.swap(Arc::clone(&state)).pools.supersede(&state.pools);
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
            match self.workers.accept(socket, address) {
                Ok(accepting) => {
                    self.accepting.insert(address, accepting);
                }
                Err(error) => warn!("cannot listen on {address}: {error}"),
            }
        }
    }

    fn report(&mut self) {
        self.shared.connections.sweep();
        let Some(control) = &self.control else { return };
        let state = self.shared.state.load();
        let report = FromDesk::Report(Report {
            lines_lost: self.shared.log.lost(),
            serving: state.number,
            under_way: state.pools.under_way(),
            ..self.workers.report()
        });
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
        // Who has called there meanwhile is not to wait.
        self.stay = None;
        // One of them may just have taken a connection that is not counted yet.
        self.accepting.values().for_each(JoinHandle::abort);
        let accepting = std::mem::take(&mut self.accepting);
        _ = tokio::time::timeout(LAST, join_all(accepting.into_values())).await;
        self.sockets.clear();
        self.shared.draining.cancel();
        if how.at_once {
            self.shared.closing.cancel();
        }
        info!(connections = self.workers.open(), within = ?how.within, "the desk ends");
        self.emptied(how.within).await;
        self.shared.closing.cancel();
        self.emptied(LAST).await;
        self.shared.log.flush();
        self.report();
    }

    /// Waits until there are no connections, or the time is over.
    fn emptied(&self, within: Duration) -> impl Future<Output = ()> {
        let end = Instant::now() + within;
        async move {
            while self.workers.open() > 0 && Instant::now() < end {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}
