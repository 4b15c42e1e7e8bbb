//! Those who serve connections: one thread for each processor, each with a share of the connections from their first
//! byte to their last. What a request takes happens in one thread: waking another costs more than most requests do, and what
//! belongs to one is fought over by nobody.

use std::{
    collections::HashMap,
    io,
    net::{self, IpAddr, SocketAddr},
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, Handle},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    access::AccessLog,
    auth::Porter,
    chance::Chance,
    engine::{self, Connections},
    figures::Figures,
    limits::network,
    orders::Report,
    pools::Pool,
    state::State,
};

/// Connections from one source at a time: an IPv4 address, or an IPv6 network of 64 bits.
const PER_SOURCE: u32 = 4096;

/// How often connections to backends are looked through for those that nobody needs.
const SWEEP: Duration = Duration::from_secs(1);

/// What all share.
pub(super) struct Shared {
    pub(super) state: ArcSwap<State>,
    pub(super) porter: Porter,
    pub(super) log: AccessLog,
    /// Those to backends that have only so many requests: of what few they take, none is to rest with one worker while
    /// another waits.
    pub(super) connections: Connections,
    /// Tells connections to end after the answer that they are at.
    pub(super) closing: CancellationToken,
    /// Answers are to be the last of their connections.
    pub(super) draining: CancellationToken,
    sources: Mutex<HashMap<IpAddr, u32>>,
}

impl Shared {
    /// Without orders yet.
    ///
    /// # Errors
    /// Without chance.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            state: ArcSwap::default(),
            porter: Porter::new()?,
            log: AccessLog::to(io::stdout()),
            connections: Connections::default(),
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

/// One of them.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    connections: Connections,
    pub(super) chance: Chance,
    pub(super) figures: Arc<Figures>,
    /// The same as [`Shared::closing`] and [`Shared::draining`]; each connection waits for them.
    pub(super) closing: CancellationToken,
    pub(super) draining: CancellationToken,
    runtime: Handle,
}

impl Worker {
    fn start(shared: Arc<Shared>) -> io::Result<Arc<Self>> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let worker = Arc::new(Self {
            closing: shared.closing.child_token(),
            draining: shared.draining.child_token(),
            shared,
            connections: Connections::default(),
            chance: Chance::new(),
            figures: Arc::default(),
            runtime: runtime.handle().clone(),
        });
        let sweeping = Arc::clone(&worker);
        let serve = async move {
            let mut tick = tokio::time::interval(SWEEP);
            loop {
                tick.tick().await;
                sweeping.connections.sweep();
            }
        };
        // It ends with the process, or the process with it.
        thread::Builder::new().name("worker".into()).spawn(move || {
            let _indispensable = Indispensable;
            runtime.block_on(serve);
        })?;
        Ok(worker)
    }

    /// The connections to the backends of a pool.
    pub(super) fn connections(&self, pool: &Pool) -> &Connections {
        if pool.is_limited() { &self.shared.connections } else { &self.connections }
    }
}

/// Ends the process where a worker ends: connections would be given to it and answered by nobody; the daemon starts
/// another desk.
struct Indispensable;

impl Drop for Indispensable {
    fn drop(&mut self) {
        std::process::abort();
    }
}

/// All of them.
#[derive(Clone)]
pub(super) struct Workers {
    all: Arc<[Arc<Worker>]>,
    /// Counts the sockets that they take connections from, each by one of them in turn.
    accepting: Arc<AtomicUsize>,
}

impl Workers {
    /// So many.
    ///
    /// # Errors
    /// When a thread cannot be had.
    pub(super) fn start(shared: &Arc<Shared>, number: NonZeroUsize) -> io::Result<Self> {
        let workers = (0..number.get()).map(|_| Worker::start(Arc::clone(shared)));
        Ok(Self { all: workers.collect::<io::Result<_>>()?, accepting: Arc::default() })
    }

    /// Takes connections until aborted.
    ///
    /// # Errors
    /// When the socket is none that can be waited for.
    pub(super) fn accept(&self, socket: &net::TcpListener, called: SocketAddr) -> io::Result<JoinHandle<()>> {
        let turn = self.accepting.fetch_add(1, Ordering::Relaxed) % self.all.len().max(1);
        let worker = self.all.get(turn).ok_or(io::ErrorKind::NotFound)?;
        let _inside = worker.runtime.enter();
        let listener = TcpListener::from_std(socket.try_clone()?)?;
        let (workers, worker) = (self.clone(), Arc::clone(worker));
        Ok(worker.clone().runtime.spawn(async move {
            loop {
                // Another's runtime is to wait for it from now on.
                match listener.accept().await.and_then(|(stream, client)| Ok((stream.into_std()?, client))) {
                    Ok((stream, client)) => workers.visit(&worker, stream, client, called),
                    Err(error) => {
                        // Most likely there are too many open files: some will be closed.
                        warn!("cannot take a connection to {called}: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }))
    }

    /// Gives a connection that one of them has taken to who has least to do.
    fn visit(&self, by: &Worker, stream: net::TcpStream, client: SocketAddr, called: SocketAddr) {
        let Some(service) = by.shared.state.load().service(called) else { return };
        if !service.admits(client.ip()) {
            by.figures.refused("firewall");
            return;
        }
        // A proxy brings the connections of many.
        let visitor = (!service.is_proxy(client.ip())).then(|| by.shared.enter(client.ip()));
        if let Some(None) = visitor {
            by.figures.refused("too_many_of_source");
            return;
        }
        let Some(worker) = self.calmest() else { return };
        let (open, server) = (worker.figures.taken(), Arc::clone(worker));
        worker.runtime.spawn(async move {
            let _until_it_ends = (open, visitor);
            match TcpStream::from_std(stream) {
                Ok(stream) => engine::serve(server, called, stream, client).await,
                Err(error) => warn!("cannot serve a connection to {called}: {error}"),
            }
        });
    }

    /// Who has fewest connections.
    fn calmest(&self) -> Option<&Arc<Worker>> {
        self.all.iter().min_by_key(|worker| worker.figures.open())
    }

    /// Connections that are open.
    pub(super) fn open(&self) -> u64 {
        self.all.iter().map(|worker| worker.figures.open()).sum()
    }

    /// What they have counted.
    pub(super) fn report(&self) -> Report {
        Figures::report(self.all.iter().map(|worker| worker.figures.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
