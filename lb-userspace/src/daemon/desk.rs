//! Looks after the reception desk: opens its listening sockets, starts its process and starts it again, and
//! tells it how to serve.
//!
//! The sockets are the daemon's too, so that while the desk is started again clients wait in the kernel's queue
//! and nobody is refused. A desk goes on when its daemon is gone, on whatever end; the next daemon asks it for
//! the sockets (`desk.sock` in the run directory) and starts a desk of its own with them, which lets the old one end
//! with its connections as soon as it serves.

mod predecessors;
mod process;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use socket2::{Domain, Socket, Type};
use tokio::sync::{mpsc, watch};

pub use self::process::Status;
use self::{
    predecessors::Predecessors,
    process::{Event, Supervisor},
};
use crate::{
    api::view,
    daemon::issuers::Known,
    dataplane::FlowsOf,
    health::{Key, State as HealthState, Verdict},
    model::{BackendAddress, Config, Listen},
    proxy::{
        orders::{Files, LATENCY_BOUNDS, Orders, Pem, ServiceOrder},
        pools::{BackendOrder, PoolOrder},
    },
};

/// The name of the socket by which a daemon comes to a desk that another has started.
pub const SOCKET: &str = "desk.sock";

/// How long a desk may take to answer a daemon.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long connections may take to end when another desk has taken over.
const DRAIN: Duration = Duration::from_secs(30);

/// The same when the service ends.
const DRAIN_TO_END: Duration = Duration::from_secs(10);

/// How many connections may wait for the desk to take them (the kernel's own limit is `net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// The desk, as the daemon sees it.
pub struct Desk {
    sockets: BTreeMap<SocketAddr, Arc<TcpListener>>,
    orders: Orders,
    events: mpsc::UnboundedSender<Event>,
    status: watch::Receiver<Status>,
    supervisor: tokio::task::JoinHandle<()>,
    /// Why addresses are not listened on.
    deaf: Vec<String>,
}

/// How the desk's process is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of its socket.
    pub run_dir: PathBuf,
    /// It ends with the daemon, however that ends.
    pub ephemeral: bool,
    /// Words of its command line, after its name.
    pub arguments: Vec<String>,
}

impl Desk {
    /// Takes over from a desk that runs, if one does; `issuers` hear which keys it misses.
    pub fn new(options: Options, issuers: Known) -> Self {
        let predecessors = Predecessors::call(&options.run_dir);
        let sockets = predecessors.as_ref().map(|it| it.sockets.clone()).unwrap_or_default();
        let (events, hear) = mpsc::unbounded_channel();
        let another_ends = predecessors.is_some();
        let (tell, status) = watch::channel(Status { another_ends, ..Status::default() });
        let supervisor = tokio::spawn(Supervisor::new((options, issuers), predecessors, hear, tell).run());
        Self { sockets, orders: Orders::default(), events, status, supervisor, deaf: Vec::new() }
    }

    /// Serves so from now on. New addresses are listened on when this returns, whether the desk is ready or
    /// not.
    pub fn serve(&mut self, services: Vec<ServiceOrder>, pools: Vec<PoolOrder>, files: Files) {
        let wanted: BTreeSet<SocketAddr> = services.iter().map(|service| service.listen).collect();
        let missing: Vec<_> = wanted.iter().filter(|at| !self.sockets.contains_key(at)).copied().collect();
        let mut deaf = Vec::new();
        for address in missing {
            match listen(address) {
                Ok(socket) => _ = self.sockets.insert(address, Arc::new(socket)),
                Err(error) => deaf.push(format!("the desk cannot listen on {address}: {error}")),
            }
        }
        self.deaf = deaf;
        let before = self.sockets.len();
        self.sockets.retain(|address, _| wanted.contains(address));
        let orders = Orders { number: self.orders.number, services, pools, files };
        if orders == self.orders && before == self.sockets.len() && self.orders.number > 0 {
            return;
        }
        self.orders = Orders { number: orders.number + 1, ..orders };
        let order = Event::Serve(Box::new(self.orders.clone()), self.sockets.clone());
        // The supervisor ends with this alone.
        _ = self.events.send(order);
    }

    /// How it goes.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// The same, for the API.
    pub fn shown(&self) -> view::Desk {
        let Status { pid, serving, restarts, report, .. } = self.status();
        let answers = report.answers.into_iter().map(|it| view::Answers {
            service: it.service,
            route: it.route,
            pool: it.pool,
            status: format!("{}xx", it.class),
            count: it.count,
        });
        let denied = report.denied.into_iter().map(|it| view::Denied {
            service: it.service,
            route: it.route,
            status: it.status,
            reason: it.reason,
            count: it.count,
        });
        let latencies = report.latencies.into_iter().map(|it| view::Latencies {
            service: it.service,
            route: it.route,
            pool: it.pool,
            seconds: it.microseconds as f64 / 1e6,
            up_to_seconds: LATENCY_BOUNDS.into_iter().zip(it.counts.iter().copied()).collect(),
            longer: it.counts.get(LATENCY_BOUNDS.len()).copied().unwrap_or(0),
        });
        let ejections = report.ejections.into_iter().map(|it| view::Ejections {
            pool: it.pool,
            backend: it.backend,
            count: it.count,
        });
        view::Desk {
            pid,
            up_to_date: pid.is_some() && serving == self.orders.number,
            restarts,
            listening: self.sockets.keys().map(ToString::to_string).collect(),
            open: report.open,
            websockets: report.websockets,
            passed: report.passed,
            connections: report.connections,
            refused: report.refused,
            retries: report.retries,
            troubles: report.troubles,
            lines_lost: report.lines_lost,
            ejections: ejections.collect(),
            answers: answers.collect(),
            latencies: latencies.collect(),
            denied: denied.collect(),
            // Nothing that a desk does.
            key_fetches: BTreeMap::new(),
            certificates: Vec::new(),
        }
    }

    /// Requests that a backend has of the desk. There may be one as long as a desk of before has not ended, which says nothing
    /// any more, or ours has not said so since it was last told how to serve.
    pub fn under_way(&self, key: &Key) -> u64 {
        let BackendAddress::Remote(address, port) = key.backend else { return 0 };
        if !self.orders.pools.iter().any(|pool| pool.name == key.pool) {
            return 0;
        }
        let Status { pid, report, another_ends, .. } = &*self.status.borrow();
        if *another_ends || pid.is_some() && report.serving != self.orders.number {
            return 1;
        }
        let its = report.under_way.iter().filter(|it| it.pool == key.pool);
        its.filter(|it| (it.address, it.port) == (address, port)).map(|it| it.count).sum()
    }

    /// Requests that the desk has with each backend of its pools, by pool and address; those that have none are left out.
    pub fn requests(&self) -> BTreeMap<(String, BackendAddress), u64> {
        let mut requests = BTreeMap::new();
        for it in &self.status.borrow().report.under_way {
            let backend = BackendAddress::Remote(it.address, it.port);
            *requests.entry((it.pool.clone(), backend)).or_default() += it.count;
        }
        requests
    }

    /// Why addresses are not listened on.
    pub fn deaf(&self) -> &[String] {
        &self.deaf
    }

    /// What is wrong with its process.
    pub fn alarm(&self) -> Option<String> {
        self.status.borrow().alarm.clone()
    }

    /// Lets the desk go on by itself.
    pub async fn leave(self) {
        self.end(Event::Leave).await;
    }

    /// Ends the desk, when its connections have.
    pub async fn close(self) {
        self.end(Event::Close).await;
    }

    async fn end(self, how: Event) {
        _ = self.events.send(how);
        _ = self.supervisor.await;
    }
}

/// A listening socket, whether its address is there yet or not. Nobody else can listen there as long as it
/// is open.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Where a service of the desk listens.
fn address(listen: &Listen) -> Option<SocketAddr> {
    Some(SocketAddr::new(listen.address, listen.port?))
}

/// The services of a document, as the desk is to serve them. One whose certificates cannot be had is left
/// out: nothing of it goes in clear text.
pub fn services<'p>(
    config: &Config,
    certificate: impl Fn(&crate::model::desk::CertificateFiles) -> Option<&'p Pem>,
) -> Vec<ServiceOrder> {
    let order = |(name, service, desk): (&String, &crate::model::Service, &crate::model::desk::Desk)| {
        let certificates = desk.certificates.iter().map(|files| certificate(files).cloned());
        Some(ServiceOrder {
            name: name.clone(),
            listen: address(&service.listen)?,
            allow: service.allow.clone(),
            deny: service.deny.clone(),
            certificates: certificates.collect::<Option<_>>()?,
            desk: desk.clone(),
        })
    };
    config.at_desk().filter_map(order).collect()
}

/// The pools that the desk's routes name; `state` says how a backend is and what is to be done with it, `is_unknown`
/// whether nothing is known of it yet.
///
/// Where nobody of a pool is usable, those of whom nothing is known are taken for fit: a daemon that takes over finds in
/// no table how they were, and the room of before must not close until they have been asked.
pub fn pools(
    config: &Config,
    state: impl Fn(&str, BackendAddress) -> (HealthState, Verdict),
    is_unknown: impl Fn(&str, BackendAddress) -> bool,
) -> Vec<PoolOrder> {
    let names: BTreeSet<&str> = config.at_desk().flat_map(|(_, _, desk)| desk.pools()).collect();
    let order = |name: &str| {
        let pool = config.pools.get(name)?;
        let nobody = !pool.backends.iter().any(|backend| state(name, backend.address).1.usable);
        let backends = pool.backends.iter().filter_map(|backend| {
            let BackendAddress::Remote(address, port) = backend.address else { return None };
            let (state, verdict) = state(name, backend.address);
            let draining = matches!(state, HealthState::Draining | HealthState::Drained);
            let weight = verdict.weigh(backend.weight);
            let usable = verdict.usable || nobody && is_unknown(name, backend.address);
            let cut = verdict.flows != FlowsOf::Keep;
            Some(BackendOrder { address, port, weight, usable, draining, cut })
        });
        let (speech, crowd, ejection) = (pool.speech.clone(), pool.crowd, pool.ejection);
        Some(PoolOrder { name: name.to_owned(), speech, crowd, ejection, backends: backends.collect() })
    };
    names.into_iter().filter_map(order).collect()
}

/// Ends a desk that no daemon looks after; says whether there was one.
pub fn close_left(run_dir: &Path) -> bool {
    let found = Predecessors::call(run_dir);
    if let Some(left) = &found {
        left.drain(DRAIN_TO_END, true);
        left.wait(DRAIN_TO_END + PATIENCE);
    }
    _ = std::fs::remove_file(run_dir.join(SOCKET));
    found.is_some()
}
