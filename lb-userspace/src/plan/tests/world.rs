//! Desired states, by hand and by chance.

use std::net::Ipv4Addr;

use super::*;
use crate::model::desk::Desk;

/// A small generator of numbers, so that a failure is replayed by its seed.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (maglev::mix(self.0) % bound as u64) as usize
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(super) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

/// Everything that [`Desired`] borrows.
pub(super) struct World {
    pub(super) config: Config,
    pub(super) verdicts: Verdicts,
    pub(super) next_hops: BTreeMap<IpAddr, NextHop>,
    pub(super) sources: BTreeMap<IpAddr, Vec<IpAddr>>,
    pub(super) shared_vips: BTreeSet<IpAddr>,
    pub(super) interfaces: BTreeMap<u32, [u8; 6]>,
    pub(super) spent: BTreeSet<u32>,
    pub(super) now: Tick,
}

pub(super) const LISTENERS: [&str; 8] = [
    "203.0.113.10:80/tcp",
    "203.0.113.10:443/tcp",
    "203.0.113.10:*/tcp",
    "203.0.113.10:53/udp",
    "203.0.113.11:80/tcp",
    "203.0.113.11:*/udp",
    "[2001:db8::1]:80/tcp",
    "[2001:db8::1]:*/tcp",
];
pub(super) const NETWORKS: [&str; 6] =
    ["10.0.0.0/8", "10.1.0.0/16", "192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0", "198.51.100.7/32"];
pub(super) const ROOMY: Limits =
    Limits { flows: 1024, services: 32, backends: 400, ring_pages: 128, side_pages: 64, rules: 200 };

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl World {
    pub(super) fn empty() -> Self {
        let settings = Settings {
            limits: ROOMY,
            idle: Idle::default(),
            sources: Vec::new(),
            ports: PortRange::default(),
            resets_per_second: 1000,
            metrics: None,
        };
        let interfaces = vec!["eth0".to_owned()];
        World {
            config: Config { interfaces, settings, pools: BTreeMap::new(), services: BTreeMap::new() },
            verdicts: Verdicts::new(),
            next_hops: BTreeMap::new(),
            sources: BTreeMap::new(),
            shared_vips: BTreeSet::new(),
            interfaces: BTreeMap::from([(2, [2; 6])]),
            spent: BTreeSet::new(),
            now: Tick(1),
        }
    }

    /// One service on port 80 with so many healthy backends.
    pub(super) fn with_backends(count: u32) -> Self {
        let mut world = Self::empty();
        let backends = (1..=count).map(|n| backend(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)), 1)).collect();
        world.config.pools.insert("web".to_owned(), pool(backends));
        world.config.services.insert("shop".to_owned(), service(LISTENERS[0], "web"));
        world.all_healthy();
        world
    }

    pub(super) fn all_healthy(&mut self) {
        for (name, pool) in &self.config.pools {
            let healthy = pool.backends.iter().map(|backend| (backend.address, Verdict::USABLE));
            self.verdicts.insert(name.clone(), healthy.collect());
        }
    }

    pub(super) fn rolled(dice: &mut Dice, before: &Tables) -> Self {
        let mut world = Self::empty();
        for name in ["a", "b", "c"].into_iter().take(dice.below(4)) {
            let mut backends: Vec<Backend> = Vec::new();
            for _ in 0..dice.below(7) {
                let ip = ip(&format!("10.0.0.{}", 1 + dice.below(8)));
                let address = match dice.below(8) {
                    0 => BackendAddress::Local,
                    1 => BackendAddress::Remote(ip, None),
                    _ => BackendAddress::Remote(ip, Some(dice.pick(&[80, 8080]))),
                };
                if backends.iter().all(|other| other.address != address) {
                    backends.push(Backend {
                        address,
                        weight: dice.pick(&[0, 1, 1, 3]),
                        admin: Admin::Enabled,
                    });
                }
            }
            let verdicts = world.verdicts.entry(name.to_owned()).or_default();
            for backend in &backends {
                if dice.chance(90) {
                    let flows = dice.pick(&[
                        FlowsOf::Keep,
                        FlowsOf::Keep,
                        FlowsOf::Keep,
                        FlowsOf::Forget,
                        FlowsOf::Cut,
                    ]);
                    let usable = dice.chance(70);
                    let (dead, share) = (!usable && dice.chance(50), dice.pick(&[1, 5, 10, 10]));
                    verdicts.any.insert(backend.address, Verdict { usable, dead, flows, share });
                }
            }
            verdicts.primary.clone_from(&verdicts.any);
            verdicts.holds = dice.chance(50);
            world.config.pools.insert(name.to_owned(), pool(backends));
        }
        let pools: Vec<String> = world.config.pools.keys().cloned().collect();
        for (number, listen) in LISTENERS.into_iter().enumerate() {
            if pools.is_empty() || dice.chance(40) {
                continue;
            }
            let mut service = service(listen, &dice.pick(&pools));
            if dice.chance(30) {
                service.scheduler = Scheduler::RoundRobin;
            } else {
                service.scheduler = dice.pick(&[Scheduler::Maglev, Scheduler::Source]);
                service.ring_size = Some(dice.pick(&[7, 7, 101, 101, 101, 1031]));
                service.forward = dice.pick(&[Forward::Nat, Forward::Dsr, Forward::Dsr]);
                service.track = dice.pick(&[Track::Changes, Track::Changes, Track::Always, Track::Never]);
            }
            service.role = dice.chance(20).then_some(Role::Primary);
            let backends = &world.config.pools[&service.pool].backends;
            let is_alone = backends.iter().all(|backend| backend.address != BackendAddress::Local);
            service.desk = (is_alone && dice.chance(25)).then(Desk::default);
            for network in NETWORKS {
                match dice.below(6) {
                    0 => service.allow.push(network.parse().unwrap()),
                    1 => service.deny.push(network.parse().unwrap()),
                    _ => {}
                }
            }
            world.config.services.insert(format!("s{number}"), service);
        }
        let lists = [vec![], vec![ip("10.9.0.1")], vec![ip("10.9.0.1"), ip("10.9.0.2")]];
        let list = match dice.below(6) {
            0 => vec![ip("10.9.0.3"), ip("10.9.0.1")],
            1 => vec![ip("10.9.0.2"), ip("10.9.0.4"), ip("10.9.0.1")],
            _ => dice.pick(&lists),
        };
        for last in 1..=8u8 {
            let address = ip(&format!("10.0.0.{last}"));
            if dice.chance(80) {
                let hop = NextHop { interface: 2, own_mac: [2; 6], mac: [dice.below(3) as u8; 6] };
                world.next_hops.insert(address, hop);
            }
            if dice.chance(90) {
                world.sources.insert(address, list.clone());
            }
        }
        if dice.chance(50) {
            world.shared_vips.insert(ip("203.0.113.10"));
        }
        if dice.chance(20) {
            world.interfaces.insert(3, [3; 6]);
        }
        // Time passes, sometimes for long enough.
        let last = before.services.keys().filter_map(|index| before.sides.get(index));
        let last = last.flat_map(|sides| sides.iter().map(|side| side.standing.since.0)).max().unwrap_or(1);
        let quiet = ticks_in(world.config.settings.idle.established);
        world.now = Tick(last + dice.pick(&[0, 1, quiet / 2, quiet, quiet + 50]));
        world.spent = {
            let remembered = before.remembered();
            let free = before.backends.keys().copied().filter(|index| !remembered.contains(index));
            free.filter(|_| dice.chance(30)).collect()
        };
        world
    }

    pub(super) fn desired(&self) -> Desired<'_> {
        Desired {
            config: &self.config,
            verdicts: &self.verdicts,
            next_hops: &self.next_hops,
            sources: &self.sources,
            shared_vips: &self.shared_vips,
            interfaces: &self.interfaces,
            hash_key: [1, 2],
            same_interface_tx: true,
            spent: &self.spent,
            now: self.now,
        }
    }

    /// What the service listening there should have: backend addresses by slot, rules, others denied.
    pub(super) fn wanted(&self, listen: Listen) -> Option<Shape> {
        let service = self.config.services.values().find(|service| service.listen == listen)?;
        let members = self.members(service);
        let positions = match service.scheduler {
            Scheduler::Maglev | Scheduler::Source => {
                maglev::ring(&members, service.ring_size.unwrap_or(maglev::size_for(members.len())))
            }
            Scheduler::RoundRobin => maglev::turns(&members),
        };
        let mut rules = RuleSet::new();
        rules.extend(service.allow.iter().map(|&network| (network, lb_common::abi::Action::Allow)));
        rules.extend(service.deny.iter().map(|&network| (network, lb_common::abi::Action::Deny)));
        Some(Shape {
            slots: positions.into_iter().map(|position| Some(members[position as usize].address)).collect(),
            rules,
            deny_others: !service.allow.is_empty(),
        })
    }

    /// Who shares the service's ring, and with which weight.
    pub(super) fn members(&self, service: &Service) -> Vec<Member> {
        let pool = &self.config.pools[&service.pool];
        let verdict =
            |backend: &Backend| self.verdicts[&service.pool].of(service.role).get(&backend.address).copied();
        let member = |backend: &Backend| {
            let on = verdict(backend).is_some_and(|verdict| verdict.usable && verdict.flows == FlowsOf::Keep);
            let share = verdict(backend).map_or(0, |verdict| verdict.share);
            Member { address: backend.address, weight: if on { backend.weight * share } else { 0 } }
        };
        let mut members: Vec<Member> = pool.backends.iter().map(member).collect();
        if service.has_fallback() {
            let alone = members.iter().all(|member| member.weight == 0);
            members.push(Member { address: BackendAddress::Local, weight: if alone { 10 } else { 0 } });
        }
        members
    }

    /// The backends of a service, this host among them if it stands in.
    pub(super) fn backends(&self, service: &Service) -> Vec<Backend> {
        let this_host = service.has_fallback().then_some(Backend::THIS_HOST);
        self.config.pools[&service.pool].backends.iter().cloned().chain(this_host).collect()
    }
}

pub(super) fn backend(ip: IpAddr, weight: u16) -> Backend {
    Backend { address: BackendAddress::Remote(ip, Some(8080)), weight, admin: Admin::Enabled }
}

pub(super) fn pool(backends: Vec<Backend>) -> Pool {
    Pool { backends, ..Pool::default() }
}

pub(super) fn service(listen: &str, pool: &str) -> Service {
    Service {
        role: None,
        listen: listen.parse().unwrap(),
        pool: pool.to_owned(),
        scheduler: Scheduler::Maglev,
        forward: Forward::Nat,
        track: Track::Changes,
        ring_size: None,
        allow: Vec::new(),
        deny: Vec::new(),
        desk: None,
    }
}

/// What a service looks like to packets.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) slots: Vec<Option<BackendAddress>>,
    pub(super) rules: RuleSet,
    pub(super) deny_others: bool,
}
