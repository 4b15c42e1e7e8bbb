//! The control plane's heavy work: rings, plans, documents.

#![expect(missing_docs, reason = "criterion's macro makes a public function")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use lb_common::abi::Tick;
use lb_userspace::{
    config::Document,
    daemon::{checks::Host, core::Core},
    dataplane::{Dataplane, NextHop, Tables, memory::MemoryDataplane},
    health::{Key, Now, Verdict, Verdicts},
    maglev::{self, Member},
    model::{BackendAddress, Config},
    netlink::surroundings::{HostAddress, Link, Route, Surroundings},
    plan::{Desired, Plan, Rings, plan_again},
    probe::{Answer, Answered, ProbeError},
};

fn rings(criterion: &mut Criterion) {
    for count in [10, 1000] {
        let members: Vec<Member> = (0..count)
            .map(|number| Member { address: BackendAddress::Remote(address(number), Some(8080)), weight: 1 })
            .collect();
        let size = maglev::size_for(members.len());
        criterion.bench_function(&format!("ring of {count} backends, {size} slots"), |bencher| {
            bencher.iter(|| maglev::ring(black_box(&members), size));
        });
    }
}

fn plans(criterion: &mut Criterion) {
    let translating = text(1, 1000);
    // Slots that change hands are written down one by one there.
    let direct = translating.replace(":8080\"", "\"") + "forward = \"dsr\"\n";
    for (name, text) in [("", translating), (", mode dsr", direct)] {
        plans_of(criterion, name, &text);
    }
}

fn plans_of(criterion: &mut Criterion, name: &str, text: &str) {
    let document = Document::parse(text).unwrap_or_else(|why| panic!("{why}"));
    let world = World::of(document.config);
    let before = world.applied();
    let mut changed = world.clone();
    if let Some(verdict) =
        changed.verdicts.values_mut().next().and_then(|pool| pool.any.values_mut().nth(500))
    {
        *verdict = Verdict::RESTING;
    }
    criterion.bench_function(&format!("plan of one drain among 1000 backends{name}"), |bencher| {
        bencher.iter(|| changed.plan(black_box(&before)));
    });
    criterion.bench_function(&format!("plan of no change among 1000 backends{name}"), |bencher| {
        bencher.iter(|| world.plan(black_box(&before)));
    });
}

fn documents(criterion: &mut Criterion) {
    let text = text(10_000, 10);
    let mut group = criterion.benchmark_group("10,000 services of 10 backends");
    group.sample_size(10);
    group.bench_function("parse and check", |bencher| bencher.iter(|| Document::parse(black_box(&text))));
    let document = Document::parse(&text).unwrap_or_else(|why| panic!("{why}"));
    let world = World::of(document.config);
    let empty = Tables { limits: world.config.settings.limits, ..Tables::default() };
    group.bench_function("first plan", |bencher| {
        bencher.iter_batched(|| (), |()| world.plan(black_box(&empty)), BatchSize::PerIteration);
    });
    let before = world.applied();
    let mut changed = world.clone();
    if let Some(verdict) =
        changed.verdicts.values_mut().nth(5000).and_then(|pool| pool.any.values_mut().next())
    {
        *verdict = Verdict::RESTING;
    }
    group.bench_function("plan of one drain", |bencher| bencher.iter(|| changed.plan(black_box(&before))));
    group.bench_function("plan of one drain, rings remembered", |bencher| {
        let mut rings = Rings::default();
        world.plan_again(&before, &mut rings);
        bencher.iter_batched_ref(
            || rings.clone(),
            |rings| changed.plan_again(black_box(&before), rings),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// All that the daemon's loop does for a deciding probe, with tables in memory.
fn deciding_probes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("deciding probe, applied");
    group.sample_size(10);
    for (services, backends) in [(1, 1000), (100, 50), (10_000, 10)] {
        let mut daemon = Daemon::of(&text(services, backends));
        let (pool, backend) = (format!("p{}", services / 2), address(services / 2 * backends + 1));
        let key = Key { pool, backend: BackendAddress::Remote(backend, Some(8080)) };
        let mut good = true;
        group.bench_function(format!("{services} services of {backends} backends"), |bencher| {
            bencher.iter(|| {
                good = !good;
                daemon.hear(&key, good);
            });
        });
    }
    group.finish();
}

/// The daemon's state, with a network around it in which everything is near.
struct Daemon {
    core: Core<MemoryDataplane>,
    now: Now,
}

/// What a healthy backend answers.
const GOOD: Answered = Answered { latency: Duration::ZERO, said: None };

impl Daemon {
    /// All healthy.
    fn of(text: &str) -> Self {
        let document = Document::parse(text).unwrap_or_else(|why| panic!("{why}"));
        let config = document.config.clone();
        let memory = MemoryDataplane::new(config.settings.limits);
        let core = Core::new(memory, "lb.toml".into(), [1, 2], 3).unwrap_or_else(|why| panic!("{why}"));
        let mut daemon = Self { core, now: Now { uptime: Duration::from_secs(1), epoch: 1_700_000_000 } };
        let put = config.services.values().map(|service| (1, service.listen.address)).collect();
        daemon.core.set_put(put);
        let around = Arc::new(surroundings(&config));
        let loaded = daemon.core.load(text, document, around, &Host::default(), daemon.now);
        loaded.unwrap_or_else(|why| panic!("{why}"));
        for (name, pool) in &config.pools {
            for backend in &pool.backends {
                let key = Key { pool: name.clone(), backend: backend.address };
                daemon.core.answer(Answer { key, outcome: Ok(GOOD) }, daemon.now);
            }
        }
        daemon.core.settle().unwrap_or_else(|why| panic!("{why}"));
        daemon
    }

    /// A probe says that a backend has turned.
    fn hear(&mut self, key: &Key, good: bool) {
        let outcome = if good { Ok(GOOD) } else { Err(ProbeError::Status(500)) };
        assert!(self.core.answer(Answer { key: key.clone(), outcome }, self.now));
        let operations = self.core.settle().unwrap_or_else(|why| panic!("{why}"));
        assert!(operations > 0);
        self.core.pass_time(self.now);
        black_box(self.core.wait(self.now));
    }
}

/// One interface, every backend a neighbour, every VIP put on `lo`.
fn surroundings(config: &Config) -> Surroundings {
    let link = |index, name: &str| Link { index, name: name.into(), up: true, ..Link::default() };
    let eth0 = Link { mac: Some([2; 6]), ..link(2, "eth0") };
    let lo = Link { loopback: true, ..link(1, "lo") };
    let own = HostAddress { address: address(0), prefix: 8, interface: 2, ours: false };
    let vips = config.services.values().map(|service| service.listen.address);
    let vips = vips.map(|address| HostAddress { address, prefix: 32, interface: 1, ours: true });
    let backends = config.pools.values().flat_map(|pool| &pool.backends);
    let backends: Vec<IpAddr> = backends
        .filter_map(|backend| match backend.address {
            BackendAddress::Remote(ip, _) => Some(ip),
            BackendAddress::Local => None,
        })
        .collect();
    let route = Route { interface: 2, gateway: None, source: Some(address(0)), local: false };
    Surroundings {
        links: [(1, lo), (2, eth0)].into(),
        addresses: std::iter::once(own).chain(vips).collect(),
        routes: backends.iter().map(|&ip| (ip, Ok(route))).collect(),
        neighbours: backends.iter().map(|&ip| ((2, ip), [4; 6])).collect(),
        ..Surroundings::default()
    }
}

/// Everything that a plan is made from.
#[derive(Clone)]
struct World {
    config: Config,
    verdicts: Verdicts,
    next_hops: BTreeMap<IpAddr, NextHop>,
    sources: BTreeMap<IpAddr, Vec<IpAddr>>,
}

impl World {
    /// All healthy, all with a next hop.
    fn of(config: Config) -> Self {
        let healthy = config.pools.iter().map(|(name, pool)| {
            (name.clone(), pool.backends.iter().map(|backend| (backend.address, Verdict::USABLE)).collect())
        });
        let addresses = config.pools.values().flat_map(|pool| &pool.backends);
        let addresses: Vec<IpAddr> = addresses
            .filter_map(|backend| match backend.address {
                BackendAddress::Remote(ip, _) => Some(ip),
                BackendAddress::Local => None,
            })
            .collect();
        let hop = NextHop { interface: 2, own_mac: [2; 6], mac: [4; 6] };
        Self {
            verdicts: healthy.collect(),
            next_hops: addresses.iter().map(|&ip| (ip, hop)).collect(),
            sources: addresses.iter().map(|&ip| (ip, vec![address(0)])).collect(),
            config,
        }
    }

    fn plan(&self, before: &Tables) -> Plan {
        self.plan_again(before, &mut Rings::default())
    }

    fn plan_again(&self, before: &Tables, rings: &mut Rings) -> Plan {
        let desired = Desired {
            config: &self.config,
            verdicts: &self.verdicts,
            next_hops: &self.next_hops,
            sources: &self.sources,
            shared_vips: &BTreeSet::new(),
            interfaces: &BTreeMap::from([(2, [2; 6])]),
            hash_key: [1, 2],
            same_interface_tx: true,
            spent: &BTreeSet::new(),
            now: Tick(1),
        };
        plan_again(&desired, before, rings).unwrap_or_else(|why| panic!("{why}"))
    }

    /// The tables after the first plan.
    fn applied(&self) -> Tables {
        let mut memory = MemoryDataplane::new(self.config.settings.limits);
        let empty = memory.tables().unwrap_or_else(|why| panic!("{why}"));
        for op in self.plan(&empty).ops {
            memory.apply(&op).unwrap_or_else(|why| panic!("{why}"));
        }
        memory.tables().unwrap_or_else(|why| panic!("{why}"))
    }
}

/// A document of so many services, each with a pool of its own.
fn text(services: u32, backends: u32) -> String {
    let mut text = String::from(
        "interfaces = [\"eth0\"]\n[limits]\nservices = 16384\nbackends = 262144\nring_pages = 131072\n",
    );
    for service in 0..services {
        let _ =
            writeln!(text, "[pools.p{service}]\nhealth = {{ tcp = true, rise = 1, fall = 1 }}\nbackends = [");
        for backend in 0..backends {
            let _ =
                writeln!(text, "  {{ address = \"{}:8080\" }},", address(service * backends + backend + 1));
        }
        let vip = Ipv4Addr::from(0xcb00_0000 + service);
        let _ = writeln!(text, "]\n[services.s{service}]\nlisten = \"{vip}:80/tcp\"\npool = \"p{service}\"");
    }
    text
}

fn address(number: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number))
}

criterion_group!(benches, rings, plans, documents, deciding_probes);
criterion_main!(benches);
