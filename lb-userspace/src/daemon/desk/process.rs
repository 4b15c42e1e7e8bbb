//! The desk's process: started, told, listened to, and started again when it ends.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixStream, process::ExitStatusExt},
    },
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use tokio::{
    process::{Child, Command},
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tracing::{error, info, warn};

use super::{
    DRAIN, DRAIN_TO_END, Options, PATIENCE, SOCKET,
    predecessors::{self, Predecessors},
};
use crate::{
    daemon::issuers::Known,
    proxy::orders::{self, FromDesk, Orders, Report, ToDesk},
};

/// How long to wait before a desk is started again that has ended soon after its start: the first time not at
/// all, then twice as long each time.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(10);

/// After which time it counts as well again.
const SOON: Duration = Duration::from_secs(10);

/// A desk says every second what it counts; after so many seconds without a word it hangs. Longer than one that is
/// ended by a signal takes for its last connections, of which it says nothing.
const SILENCE: u32 = 15;

type Sockets = BTreeMap<SocketAddr, Arc<TcpListener>>;

/// What is asked of the supervisor.
#[derive(Debug)]
pub(super) enum Event {
    /// Serve so, on these sockets.
    Serve(Box<Orders>, Sockets),
    /// Let the desk go on by itself.
    Leave,
    /// End it when its connections have ended.
    Close,
}

/// How it goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Its process, while there is one.
    pub pid: Option<u32>,
    /// The number of the orders that it serves.
    pub serving: u64,
    /// How often it was started again after an end of its own.
    pub restarts: u64,
    /// What it counts, and what those before it have counted.
    pub report: Report,
    /// What is wrong with it.
    pub alarm: Option<String>,
    /// A desk of before has connections still.
    pub another_ends: bool,
}

pub(super) struct Supervisor {
    options: Options,
    issuers: Known,
    predecessors: Option<Predecessors>,
    events: mpsc::UnboundedReceiver<Event>,
    status: watch::Sender<Status>,
    orders: Option<(Box<Orders>, Sockets)>,
    /// What ended desks have counted.
    before: Report,
}

/// A desk's process and the ways to it.
struct Running {
    child: Child,
    /// To the thread that writes, which may have to wait.
    write: std::sync::mpsc::Sender<(ToDesk, Vec<OwnedFd>)>,
    writer: std::thread::JoinHandle<io::Result<()>>,
    hear: mpsc::UnboundedReceiver<FromDesk>,
    since: Instant,
    /// It has said that it serves, and stays.
    confirmed: bool,
}

/// How the daemon ends, while there is no desk.
enum Asked {
    ToLeave,
    ToClose,
}

/// Why a desk is looked after no more.
enum End {
    Left,
    Closed,
    Died(io::Result<ExitStatus>, Instant),
}

impl Supervisor {
    pub(super) fn new(
        (options, issuers): (Options, Known),
        predecessors: Option<Predecessors>,
        events: mpsc::UnboundedReceiver<Event>,
        status: watch::Sender<Status>,
    ) -> Self {
        Self { options, issuers, predecessors, events, status, orders: None, before: Report::default() }
    }

    pub(super) async fn run(mut self) {
        let mut backoff = Duration::ZERO;
        loop {
            // There is no desk as long as there is nothing for it to do.
            while !self.has_something_to_do() {
                if self.orders.is_some() {
                    self.let_predecessors_end(DRAIN_TO_END, true);
                }
                match self.events.recv().await {
                    Some(Event::Serve(orders, sockets)) => self.orders = Some((orders, sockets)),
                    Some(Event::Close) => {
                        self.let_predecessors_end(DRAIN_TO_END, true);
                        return;
                    }
                    Some(Event::Leave) | None => return,
                }
            }
            let end = match self.start() {
                Ok(running) => self.look_after(running).await,
                Err(error) => End::Died(Err(error), Instant::now()),
            };
            let (how, since) = match end {
                End::Left => return,
                End::Closed if self.events.is_closed() => return,
                End::Closed => continue,
                End::Died(how, since) => (how, since),
            };
            if since.elapsed() > SOON {
                backoff = Duration::ZERO;
            }
            let why = match how {
                Ok(status) => match status.signal() {
                    Some(signal) => format!("it was ended by signal {signal}"),
                    None => status.to_string(),
                },
                Err(error) => error.to_string(),
            };
            error!("the desk has ended ({why}); it is started again");
            self.ended(1, Some(format!("the desk has ended ({why}) and is being started again")));
            match self.wait(backoff).await {
                None => backoff = (backoff * 2).clamp(BACKOFF, BACKOFF_MOST),
                Some(Asked::ToLeave) if self.has_something_to_do() => {
                    // There is to be one that goes on by itself.
                    match self.start() {
                        Ok(running) => running.leave().await,
                        Err(error) => error!("there is no desk any more: {error}"),
                    }
                    return;
                }
                Some(Asked::ToLeave | Asked::ToClose) => {
                    self.let_predecessors_end(DRAIN_TO_END, true);
                    self.forget_names();
                    return;
                }
            }
        }
    }

    fn has_something_to_do(&self) -> bool {
        self.orders.as_ref().is_some_and(|(orders, _)| !orders.services.is_empty())
    }

    /// Waits before a new start, taking in what is asked; gives back how it is to be the last, if so.
    async fn wait(&mut self, how_long: Duration) -> Option<Asked> {
        let until = Instant::now() + how_long;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return None,
                event = self.events.recv() => match event {
                    Some(Event::Serve(orders, sockets)) => self.orders = Some((orders, sockets)),
                    Some(Event::Leave) | None => return Some(Asked::ToLeave),
                    Some(Event::Close) => return Some(Asked::ToClose),
                },
            }
        }
    }

    fn let_predecessors_end(&mut self, within: Duration, at_once: bool) {
        if let Some(predecessors) = &self.predecessors {
            predecessors.drain(within, at_once);
        }
        self.see_predecessors_end(within);
    }

    /// They have been told to.
    fn see_predecessors_end(&mut self, within: Duration) {
        if let Some(predecessors) = self.predecessors.take() {
            let status = self.status.clone();
            // Nobody waits for this thread, not even the daemon's end.
            std::thread::spawn(move || {
                predecessors.wait(within + PATIENCE);
                status.send_modify(|status| status.another_ends = false);
            });
        }
    }

    fn socket(&self) -> PathBuf {
        self.options.run_dir.join(SOCKET)
    }

    fn fresh_socket(&self) -> PathBuf {
        predecessors::fresh(&self.options.run_dir)
    }

    /// Starts a process and tells it all it has to know.
    fn start(&self) -> io::Result<Running> {
        let (here, there) = UnixStream::pair()?;
        here.set_write_timeout(Some(PATIENCE))?;
        // The very program that runs, also where another has been put in its place since.
        let child = Command::new("/proc/self/exe")
            .arg0("lb")
            .arg("desk-process")
            .args(&self.options.arguments)
            .stdin(Stdio::from(OwnedFd::from(there)))
            .current_dir("/")
            .spawn()?;
        let control = Arc::new(here);
        let (write, to_write) = std::sync::mpsc::channel::<(ToDesk, Vec<OwnedFd>)>();
        let stream = Arc::clone(&control);
        let writer = std::thread::spawn(move || {
            for (message, fds) in to_write {
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                if let Err(error) = orders::send(&stream, &message, &fds) {
                    // It ends, and that is noticed elsewhere; or it hangs, and is better ended.
                    _ = stream.shutdown(std::net::Shutdown::Both);
                    return Err(error);
                }
            }
            Ok(())
        });
        let (said, hear) = mpsc::unbounded_channel();
        let reader = Arc::clone(&control);
        std::thread::spawn(move || {
            while let Ok(Some((message, _))) = orders::receive(&reader) {
                if said.send(message).is_err() {
                    return;
                }
            }
        });
        let running = Running { child, write, writer, hear, since: Instant::now(), confirmed: false };
        if !self.options.ephemeral {
            // Before its orders: by the time that it serves it knows that it is to stay.
            let mut fds = vec![self.successors()?.into()];
            if let Some(predecessors) = &self.predecessors {
                fds.extend(predecessors.ways()?);
            }
            running.tell(ToDesk::Stay { milliseconds: orders::milliseconds(DRAIN) }, fds);
        }
        if let Some((orders, sockets)) = &self.orders {
            running.serve(orders, sockets, &Sockets::new())?;
        }
        Ok(running)
    }

    /// A socket for daemons that come after this one, under a name of its own.
    fn successors(&self) -> io::Result<std::os::unix::net::UnixListener> {
        let fresh = self.fresh_socket();
        _ = std::fs::remove_file(&fresh);
        let listener = std::os::unix::net::UnixListener::bind(&fresh)?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Until it ends, or is to.
    async fn look_after(&mut self, mut running: Running) -> End {
        self.status.send_modify(|status| status.pid = running.child.id());
        // Counted in beats, not by the clock: a daemon that has itself been halted does not blame the desk.
        let mut beat = tokio::time::interval(Duration::from_secs(1));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = 0;
        loop {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(Event::Serve(orders, sockets)) => {
                        if orders.services.is_empty() {
                            self.orders = Some((orders, sockets));
                            self.close(running).await;
                            return End::Closed;
                        }
                        let before = self.orders.replace((orders, sockets)).map(|(_, sockets)| sockets);
                        if let Some((orders, sockets)) = &self.orders
                            && let Err(error) = running.serve(orders, sockets, &before.unwrap_or_default())
                        {
                            warn!("the desk cannot be told how to serve: {error}");
                        }
                    }
                    Some(Event::Leave) | None => {
                        running.leave().await;
                        return End::Left;
                    }
                    Some(Event::Close) => {
                        self.let_predecessors_end(DRAIN_TO_END, true);
                        self.close(running).await;
                        self.events.close();
                        return End::Closed;
                    }
                },
                Some(said) = running.hear.recv() => {
                    silent = 0;
                    self.heard(said, &mut running);
                }
                _ = beat.tick() => {
                    silent += 1;
                    if silent == SILENCE {
                        error!(pid = running.child.id(), "the desk hangs: not a word for {SILENCE} seconds");
                        if let Err(error) = running.child.start_kill() {
                            warn!("it cannot be ended: {error}");
                        }
                    }
                }
                how = running.child.wait() => return End::Died(how, running.since),
            }
        }
    }

    fn heard(&mut self, said: FromDesk, running: &mut Running) {
        match said {
            FromDesk::Serving(number) => {
                if !running.confirmed {
                    running.confirmed = true;
                    info!(pid = running.child.id(), "the desk serves");
                    if self.options.ephemeral {
                        self.let_predecessors_end(DRAIN, false);
                    } else {
                        if let Err(error) = std::fs::rename(self.fresh_socket(), self.socket()) {
                            warn!("the desk keeps the name {}: {error}", self.fresh_socket().display());
                        }
                        self.see_predecessors_end(DRAIN);
                    }
                }
                self.status.send_modify(|status| {
                    status.serving = number;
                    status.alarm = None;
                });
            }
            FromDesk::Report(mut report) => {
                report.add(&self.before);
                self.status.send_modify(|status| status.report = report);
            }
            FromDesk::Wants(addresses) => self.issuers.hurry(&addresses),
            FromDesk::Sockets { .. } => {}
        }
    }

    /// Ends a process when its connections have ended.
    async fn close(&mut self, mut running: Running) {
        running.tell(ToDesk::drain(DRAIN_TO_END, true), Vec::new());
        if tokio::time::timeout(DRAIN_TO_END + PATIENCE, running.child.wait()).await.is_err() {
            warn!("the desk does not end by itself");
            _ = running.child.kill().await;
        }
        self.forget_names();
        self.ended(0, None);
    }

    /// Nobody is to be called by them any more.
    fn forget_names(&self) {
        for name in [self.socket(), self.fresh_socket()] {
            _ = std::fs::remove_file(name);
        }
    }

    /// There is no process any more, and what it has counted is kept.
    fn ended(&mut self, restarts: u64, alarm: Option<String>) {
        self.status.send_modify(|status| {
            self.before = std::mem::take(&mut status.report);
            self.before.open = 0;
            self.before.under_way.clear();
            *status = Status {
                restarts: status.restarts + restarts,
                report: self.before.clone(),
                alarm,
                another_ends: status.another_ends,
                ..Status::default()
            };
        });
    }
}

impl Running {
    fn tell(&self, message: ToDesk, fds: Vec<OwnedFd>) {
        // The writer has ended: so does the desk, and that is noticed.
        _ = self.write.send((message, fds));
    }

    /// Lets it go on by itself, when all has been written that it is to know: with half of an order it would go on with
    /// the one before, or end if it has none.
    async fn leave(self) {
        let Self { write, writer, .. } = self;
        drop(write);
        if !matches!(tokio::task::spawn_blocking(|| writer.join()).await, Ok(Ok(Ok(())))) {
            warn!("the desk has not heard its last orders");
        }
    }

    /// Sends the sockets that it does not have yet, and the orders.
    fn serve(&self, orders: &Orders, sockets: &Sockets, before: &Sockets) -> io::Result<()> {
        let has = |address: &SocketAddr, socket: &Arc<TcpListener>| {
            before.get(address).is_some_and(|before| Arc::ptr_eq(before, socket))
        };
        for (&address, socket) in sockets.iter().filter(|(address, socket)| !has(address, socket)) {
            self.tell(ToDesk::Listen(vec![address]), vec![socket.try_clone()?.into()]);
        }
        self.tell(ToDesk::Serve(Box::new(orders.clone())), Vec::new());
        Ok(())
    }
}
