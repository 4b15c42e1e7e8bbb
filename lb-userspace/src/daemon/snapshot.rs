//! The state of the daemon as the API shows it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::SocketAddr,
};

use lb_common::{
    abi::{self, Standing},
    verdict,
};

use super::core::Core;
use crate::{
    api::view,
    dataplane::{BackendEntry, Dataplane, DataplaneError, FlowEntry, ServiceEntry, Tables, duration_of},
    health::{Now, Verdict},
    model::{self, Admin, BackendAddress, Config, HealthCheck, Probe},
};

/// Connections shown where nobody says how many.
const CONNECTIONS: usize = 100;
/// Connections shown at most in one answer.
const CONNECTIONS_MOST: usize = 10_000;

/// Everything but connections.
///
/// # Errors
/// When the data plane's counters cannot be read.
pub fn snapshot<D: Dataplane>(core: &Core<D>, now: Now) -> Result<view::Snapshot, DataplaneError> {
    let plane = core.plane();
    let traffic = Sums::of(core.tables(), &plane.traffic()?);
    let counted = plane.verdicts()?;
    let number = |counter: usize| counted.get(counter).copied().unwrap_or_default();
    let verdicts = verdict::Verdict::names()
        .enumerate()
        .map(|(counter, name)| view::Verdict { name: name.into(), packets: number(counter) });
    let records = verdict::Note::ALL
        .map(|note| view::Happened { name: note.name().into(), times: number(note.counter()) });
    let counters = view::Counters { verdicts: verdicts.collect(), records: records.into() };
    let fill = plane.fill()?;
    let Some(loaded) = core.loaded() else {
        return Ok(view::Snapshot {
            status: status(core, now, (0, 0, 0), (fill.live, fill.capacity)),
            services: Vec::new(),
            pools: Vec::new(),
            backends: Vec::new(),
            counters,
            desk: None,
            routes: Vec::new(),
        });
    };
    let config = &loaded.document.config;
    let backends = backends(core, config, &traffic);
    let usable = backends.iter().filter(|backend| backend.usable).count();
    let sums = (config.services.len(), usable, backends.len());
    let counts = counts(&backends);
    Ok(view::Snapshot {
        status: status(core, now, sums, (fill.live, fill.capacity)),
        services: services(core, config, &counts, &traffic)?,
        pools: pools(core, config, &counts, now),
        backends,
        counters,
        desk: None,
        routes: Vec::new(),
    })
}

/// The connections that match, sorted by service and client.
///
/// # Errors
/// When the flows cannot be read.
pub fn connections<D: Dataplane>(
    core: &Core<D>,
    filter: &view::ConnectionFilter,
) -> Result<view::Connections, DataplaneError> {
    let services =
        core.loaded().map(|loaded| loaded.document.config.services_by_listen()).unwrap_or_default();
    let tables = core.tables();
    let mut found = Vec::new();
    core.plane().flows(&mut |flow| {
        if let Some(connection) = connection(flow, tables, &services)
            && matches(&connection, filter, flow)
        {
            found.push(connection);
        }
    })?;
    found.sort_by(|a, b| (&a.service, &a.client).cmp(&(&b.service, &b.client)));
    let total = found.len() as u64;
    let limit = filter.limit.unwrap_or(CONNECTIONS).min(CONNECTIONS_MOST);
    let connections = found.into_iter().skip(filter.offset.unwrap_or(0)).take(limit).collect();
    Ok(view::Connections { connections, total })
}

fn status<D: Dataplane>(
    core: &Core<D>,
    now: Now,
    (services, backends_usable, backends): (usize, usize, usize),
    (flows, flow_capacity): (u32, u32),
) -> view::Status {
    let around = core.around();
    let listed = core.loaded().map(|loaded| loaded.document.config.interfaces.as_slice()).unwrap_or_default();
    let interfaces = listed.iter().filter_map(|name| around.link(name)).map(|link| view::Interface {
        name: link.name.clone(),
        mode: match link.xdp {
            Some(xdp) if xdp.native => "native",
            Some(_) => "generic",
            None => "none",
        }
        .into(),
        up: link.up,
        mtu: link.mtu,
    });
    view::Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime_seconds: now.uptime.as_secs(),
        document: core.document_status(),
        interfaces: interfaces.collect(),
        alarms: core.alarms(),
        services,
        backends_usable,
        backends,
        flows,
        flow_capacity,
    }
}

fn services<D: Dataplane>(
    core: &Core<D>,
    config: &Config,
    counts: &Counts<'_>,
    traffic: &Sums,
) -> Result<Vec<view::Service>, DataplaneError> {
    let indices: BTreeMap<model::Listen, u32> =
        core.tables().services.iter().map(|(&index, entry)| (entry.listen, index)).collect();
    let view = |(name, service): (&String, &model::Service)| {
        let (_, all) = counts.get(service.pool.as_str()).copied().unwrap_or_default();
        let direct = service.forward == model::Forward::Dsr;
        let index = indices.get(&service.listen).filter(|_| direct);
        Ok(view::Service {
            name: name.clone(),
            listen: service.listen.to_string(),
            pool: service.pool.clone(),
            scheduler: service.scheduler.name().into(),
            forward: service.forward.name().into(),
            allow: service.allow.iter().map(ToString::to_string).collect(),
            deny: service.deny.iter().map(ToString::to_string).collect(),
            usable: core.usable(&service.pool, service.role),
            backends: all,
            role: service.role.map(|role| role.name().to_owned()),
            track: direct.then(|| service.track.name().into()),
            slots: index.map(|index| slots(core.plane(), &core.tables().services[index])).transpose()?,
            cut: core.cuts(service.listen),
            traffic: traffic.of_service(service.listen),
        })
    };
    config.services.iter().map(view).collect()
}

/// How far the slots of a service are now.
fn slots<D: Dataplane>(plane: &D, service: &ServiceEntry) -> Result<view::Slots, DataplaneError> {
    let ring = &service.ring;
    let mut slots = view::Slots { total: ring.at().slots, ..view::Slots::default() };
    if ring.first_side.is_none() {
        slots.settled = slots.total;
        return Ok(slots);
    }
    let now = plane.now()?;
    let sides = plane.sides(ring)?;
    let mut longest = None;
    for (slot, side) in ring.slots.iter().zip(sides.iter()) {
        let Standing { before, fading, since } = side.standing;
        let counter = match (slot.is_settled(), fading) {
            (true, _) => &mut slots.settled,
            (false, false) if before == slot.backend() => &mut slots.tracked,
            (false, fading) => {
                longest = longest.max(Some(now.since(since)));
                if fading { &mut slots.fading } else { &mut slots.moving }
            }
        };
        *counter += 1;
    }
    slots.since_seconds = longest.map(|ticks| duration_of(ticks).as_secs());
    Ok(slots)
}

fn pools<D: Dataplane>(core: &Core<D>, config: &Config, counts: &Counts<'_>, now: Now) -> Vec<view::Pool> {
    let panicking: BTreeSet<&str> = core.panicking().collect();
    let users = config.services_by_pool();
    let view = |(name, pool): (&String, &model::Pool)| {
        let (usable, all) = counts.get(name.as_str()).copied().unwrap_or_default();
        let services = users.get(name.as_str()).into_iter().flatten();
        view::Pool {
            name: name.clone(),
            health: pool.health.as_ref().map_or_else(|| "none".into(), health),
            on_unhealthy: match pool.on_unhealthy {
                model::OnUnhealthy::Keep => "keep",
                model::OnUnhealthy::Move => "move",
                model::OnUnhealthy::Reset => "reset",
            }
            .into(),
            panic: match pool.panic {
                model::Panic::Keep => "keep",
                model::Panic::Fail => "fail",
            }
            .into(),
            services: services.map(|&(name, _)| name.clone()).collect(),
            usable,
            backends: all,
            panicking: panicking.contains(name.as_str()),
            cluster: core.cluster(name, now),
        }
    };
    config.pools.iter().map(view).collect()
}

fn backends<D: Dataplane>(core: &Core<D>, config: &Config, traffic: &Sums) -> Vec<view::Backend> {
    let mut views = Vec::new();
    let (of_desk, by_pool) = (config.pools_of_desk(), config.services_by_pool());
    for (name, pool) in &config.pools {
        let services = by_pool.get(name.as_str()).map(Vec::as_slice).unwrap_or_default();
        for backend in &pool.backends {
            let hop = match backend.address {
                BackendAddress::Local => None,
                // The desk connects as any program does.
                BackendAddress::Remote(..) if of_desk.contains(name.as_str()) => None,
                BackendAddress::Remote(ip, _) => Some(core.next_hop(ip)),
            };
            let (next_hop, no_next_hop) = match hop {
                Some(Ok(hop)) => {
                    (Some(format!("{} on {}", mac(hop.mac), core.around().link_name(hop.interface))), None)
                }
                Some(Err(why)) => (None, Some(why)),
                None => (None, None),
            };
            let report = core.report(name, backend.address);
            let (state, verdict) = core.state(name, backend.address);
            let mut sum = view::Traffic::default();
            for (_, service) in services {
                sum += traffic.of_backend(service.listen, backend.address);
            }
            views.push(view::Backend {
                pool: name.clone(),
                address: backend.address.to_string(),
                state: state.to_string(),
                usable: verdict.usable,
                weight: backend.weight,
                share_percent: verdict.share * 100 / Verdict::WHOLE,
                deadline: match backend.admin {
                    Admin::Drain { deadline } => deadline,
                    _ => None,
                },
                failure: report.and_then(|report| report.failure.clone()),
                latency_ms: report
                    .and_then(|report| report.latency)
                    .map(|latency| latency.as_secs_f64() * 1e3),
                next_hop,
                no_next_hop,
                traffic: sum,
                requests: None,
            });
        }
    }
    views
}

/// Usable backends of each pool, and all.
type Counts<'b> = BTreeMap<&'b str, (usize, usize)>;

fn counts(backends: &[view::Backend]) -> Counts<'_> {
    let mut counts = Counts::new();
    for backend in backends {
        let (usable, all) = counts.entry(&backend.pool).or_default();
        *usable += usize::from(backend.usable);
        *all += 1;
    }
    counts
}

/// A health check in words: "http /healthz every 1s".
fn health(check: &HealthCheck) -> String {
    let mut words = match &check.probe {
        Probe::Tcp => "tcp".to_owned(),
        Probe::Http { path, tls, .. } => format!("{} {path}", if *tls { "https" } else { "http" }),
        Probe::Udp { .. } => "udp".to_owned(),
        Probe::Postgres(postgres) => format!("postgres as {}", postgres.user),
        Probe::HttpRole { primary, replica } => format!("http {primary} and {replica}"),
    };
    if let Some(port) = check.port {
        // Writing to a string cannot fail.
        _ = write!(words, " on port {port}");
    }
    _ = write!(words, " every {:?}, rise {}, fall {}", check.interval, check.rise, check.fall);
    words
}

/// "02:00:00:00:00:01".
pub(super) fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Traffic by service and by backend of a service.
struct Sums {
    services: BTreeMap<model::Listen, view::Traffic>,
    backends: BTreeMap<(model::Listen, BackendAddress), view::Traffic>,
}

impl Sums {
    fn of(tables: &Tables, traffic: &BTreeMap<u32, abi::Traffic>) -> Self {
        let mut sums = Self { services: BTreeMap::new(), backends: BTreeMap::new() };
        for (index, entry) in &tables.backends {
            let Some(service) = tables.services.get(&entry.service) else { continue };
            let Some(passed) = traffic.get(index) else { continue };
            let passed = view::Traffic {
                packets_in: passed.packets_in,
                bytes_in: passed.bytes_in,
                packets_out: passed.packets_out,
                bytes_out: passed.bytes_out,
                flows: passed.flows,
            };
            *sums.services.entry(service.listen).or_default() += passed;
            *sums.backends.entry((service.listen, address(entry))).or_default() += passed;
        }
        sums
    }

    fn of_service(&self, listen: model::Listen) -> view::Traffic {
        self.services.get(&listen).copied().unwrap_or_default()
    }

    fn of_backend(&self, listen: model::Listen, backend: BackendAddress) -> view::Traffic {
        self.backends.get(&(listen, backend)).copied().unwrap_or_default()
    }
}

/// The address of a backend in the tables, as the document writes it.
pub(super) fn address(entry: &BackendEntry) -> BackendAddress {
    entry.address.map_or(BackendAddress::Local, |ip| BackendAddress::Remote(ip, entry.port))
}

fn connection(
    flow: &FlowEntry,
    tables: &Tables,
    services: &BTreeMap<model::Listen, (&String, &model::Service)>,
) -> Option<view::Connection> {
    let backend = tables.backends.get(&flow.backend).filter(|entry| entry.generation == flow.generation)?;
    let listen = tables.services.get(&backend.service)?.listen;
    let target = match backend.address {
        None => "local".to_owned(),
        Some(ip) => SocketAddr::new(ip, backend.port.unwrap_or(flow.called_port)).to_string(),
    };
    Some(view::Connection {
        service: services.get(&listen).map_or_else(|| listen.to_string(), |(name, _)| name.to_string()),
        protocol: flow.protocol.to_string(),
        client: flow.client.to_string(),
        called: SocketAddr::new(listen.address, flow.called_port).to_string(),
        source: flow.source.zip(flow.source_port).map(|(ip, port)| SocketAddr::new(ip, port).to_string()),
        backend: target,
        state: flow.state.to_string(),
        idle_ms: u64::try_from(flow.idle.as_millis()).unwrap_or(u64::MAX),
    })
}

fn matches(connection: &view::Connection, filter: &view::ConnectionFilter, flow: &FlowEntry) -> bool {
    filter.service.as_ref().is_none_or(|service| *service == connection.service)
        && filter.backend.as_ref().is_none_or(|backend| *backend == connection.backend)
        && filter.client.as_ref().is_none_or(|client| *client == flow.client.ip().to_string())
}
