//! The control plane's heavy work: rings, plans, documents.

#![expect(missing_docs, reason = "criterion's macro makes a public function")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use lb_common::abi::Tick;
use lb_userspace::{
    config::Document,
    dataplane::{Dataplane, NextHop, Tables, memory::MemoryDataplane},
    health::{Verdict, Verdicts},
    maglev::{self, Member},
    model::{BackendAddress, Config},
    plan::{Desired, Plan, Rings, plan_again},
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
    let document = Document::parse(&text(1, 1000)).unwrap_or_else(|why| panic!("{why}"));
    let world = World::of(document.config);
    let before = world.applied();
    let mut changed = world.clone();
    if let Some(verdict) = changed.verdicts.values_mut().next().and_then(|pool| pool.values_mut().nth(500)) {
        *verdict = Verdict::RESTING;
    }
    criterion.bench_function("plan of one drain among 1000 backends", |bencher| {
        bencher.iter(|| changed.plan(black_box(&before)));
    });
    criterion.bench_function("plan of no change among 1000 backends", |bencher| {
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
    if let Some(verdict) = changed.verdicts.values_mut().nth(5000).and_then(|pool| pool.values_mut().next()) {
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
        let _ = writeln!(text, "[pools.p{service}]\nhealth = {{ tcp = true }}\nbackends = [");
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

criterion_group!(benches, rings, plans, documents);
criterion_main!(benches);
