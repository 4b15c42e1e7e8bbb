//! Lobby itself: the decision on tables in memory, and the planner, whose operations are applied one by
//! one while packets come.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    time::Duration,
};

use lb_common::{
    abi::{self, PAGE_SLOTS, Record, RingAt, Side, SidePage, Standing, Tick, Vip},
    datapath::decide,
    sim::{MemTables, SliceFrame},
    tables::Tables as _,
    verdict::{DropReason, Verdict},
};
use lb_userspace::{
    dataplane::{
        Dataplane as _, FlowsOf, NextHop, Op, SideEntry, Tables, cells, memory::MemoryDataplane, ticks_in,
    },
    health::Verdicts,
    model::{
        Config, Forward, Idle, Limits, Listen, Pool, PortRange, Protocol, Scheduler, Service, Settings, Track,
    },
    plan::{Desired, Rings, plan_again},
};

use super::{
    Balancer, MILLISECOND, SECOND,
    fault::Fault,
    fleet::{self, Fleet},
    packet::{HASH_KEY, PORT, Packet},
    scenario::Scenario,
    watch::{Spot, Watch},
};
use crate::{
    random::Random,
    world::{INGRESS, VIP},
};

const LIMITS: Limits =
    Limits { flows: 16, services: 4, backends: 24, ring_pages: 24, side_pages: 24, rules: 16 };
/// For how long silent connections are looked after.
const ESTABLISHED: Duration = Duration::from_secs(60);
/// The same for associations of UDP.
const DATAGRAMS: Duration = Duration::from_secs(30);
/// A daemon looks at its tables no more often than this.
const LOOKS_EVERY: u64 = SECOND / 2;

/// Lobby.
pub struct Lobby {
    tables: MemTables,
    mirror: MemoryDataplane,
    rings: Rings,
    /// Operations that are still to be applied.
    ops: VecDeque<Op>,
    /// Whether the servers have changed since the last plan.
    asked: bool,
    due: Option<Tick>,
    /// When the operations were planned, and which backends were in the document then.
    planned: (Tick, BTreeSet<IpAddr>),
    /// Until when there is no daemon.
    down_until: u64,
    restarts: bool,
    /// The first plan has been carried out: clients call after that.
    has_begun: bool,
    protocol: Protocol,
    track: Track,
    fault: Option<Fault>,
    random: Random,
    frame: SliceFrame,
    /// What must hold.
    pub watch: Watch,
    /// Plans that had operations.
    pub plans: u64,
    /// Times that the daemon was killed.
    pub kills: u64,
    /// Rings of another size that were switched to.
    pub resizes: u64,
}

impl Lobby {
    /// Lobby with the room of a scenario, and perhaps without a rule.
    pub fn new(scenario: &Scenario, fault: Option<Fault>, seed: u64) -> Self {
        // Two entries for a flow go with one line of four records.
        let flows = (scenario.records / 2).max(2);
        let mut tables = MemTables::new(
            LIMITS.services as usize,
            LIMITS.backends as usize,
            LIMITS.ring_pages as usize,
            flows,
        );
        let side_page = || SidePage { sides: std::array::from_fn(|_| Side::default()) };
        tables.sides.resize_with(LIMITS.side_pages as usize, side_page);
        if scenario.records == 0 {
            // As if somebody were writing everywhere for ever.
            tables.records.iter().flat_map(|line| &line.ways).for_each(|way| way.key.set(Record::BUSY));
        }
        Self {
            tables,
            mirror: MemoryDataplane::new(LIMITS),
            rings: Rings::default(),
            ops: VecDeque::new(),
            asked: false,
            due: None,
            planned: (Tick(0), BTreeSet::new()),
            down_until: 0,
            restarts: scenario.restarts,
            has_begun: false,
            protocol: if scenario.datagrams { Protocol::Udp } else { Protocol::Tcp },
            track: if scenario.always { Track::Always } else { Track::Changes },
            fault,
            random: Random::new(seed ^ 0xdae),
            frame: SliceFrame(Vec::new()),
            watch: Watch::default(),
            plans: 0,
            kills: 0,
            resizes: 0,
        }
    }

    fn plan(&mut self, fleet: &Fleet, now: Tick) {
        let mut before = self.mirror.tables().expect("tables in memory can be read");
        before.sides.clear();
        for (&index, service) in &before.services {
            if service.ring.first_side.is_some() {
                let mut sides = cells::read_sides(&self.tables, &service.ring).expect("sides are there");
                if self.fault == Some(Fault::ForgetsLosses) {
                    let forgets = |side: &SideEntry| SideEntry { lost_at: side.standing.since, ..*side };
                    sides = sides.iter().map(forgets).collect();
                }
                before.sides.insert(index, sides);
            }
        }
        let (config, verdicts) = self.document(fleet);
        let hop =
            |number| NextHop { interface: INGRESS, own_mac: [2, 0, 0, 0, 0, 1], mac: fleet::mac(number) };
        let next_hops: BTreeMap<IpAddr, NextHop> =
            (0..fleet.servers.len()).map(|number| (fleet::ip(number), hop(number))).collect();
        let desired = Desired {
            config: &config,
            verdicts: &verdicts,
            next_hops: &next_hops,
            sources: &BTreeMap::new(),
            shared_vips: &BTreeSet::new(),
            interfaces: &BTreeMap::new(),
            hash_key: HASH_KEY,
            same_interface_tx: true,
            spent: &self.spent(&before, fleet, now),
            now,
        };
        let plan = plan_again(&desired, &before, &mut self.rings).unwrap_or_else(|why| panic!("{why}"));
        self.plans += u64::from(!plan.ops.is_empty());
        self.ops = plan.ops.into();
        self.due = plan.due;
        self.planned = (now, fleet.backends().map(|(number, _)| fleet::ip(number)).collect());
        self.asked = false;
    }

    /// The document and what health says, as an operator would have written it.
    fn document(&self, fleet: &Fleet) -> (Config, Verdicts) {
        let mut idle = Idle {
            established: ESTABLISHED,
            udp: DATAGRAMS,
            half_open: Duration::from_secs(20),
            closed: Duration::from_secs(10),
            ..Idle::default()
        };
        if self.fault == Some(Fault::SettlesEarly) {
            idle.established = ESTABLISHED / 10;
            idle.udp = DATAGRAMS / 10;
        }
        let settings = Settings {
            limits: LIMITS,
            idle,
            sources: Vec::new(),
            ports: PortRange::default(),
            resets_per_second: 1000,
            metrics: None,
        };
        let service = Service {
            role: None,
            listen: Listen { address: VIP.into(), port: Some(PORT), protocol: self.protocol },
            pool: "web".to_owned(),
            scheduler: Scheduler::Maglev,
            forward: Forward::Dsr,
            track: self.track,
            ring_size: Some(fleet.ring_size),
            allow: Vec::new(),
            deny: Vec::new(),
            desk: None,
        };
        let backends = fleet.backends().map(|(_, backend)| backend).collect();
        let pool = Pool { backends, ..Pool::default() };
        let mut of_pool = BTreeMap::new();
        for (number, backend) in fleet.backends() {
            let mut verdict = fleet.servers[number].verdict;
            if verdict.dead && self.fault == Some(Fault::DeathForgets) {
                verdict.flows = FlowsOf::Forget;
            }
            of_pool.insert(backend.address, verdict);
        }
        let config = Config {
            interfaces: vec!["eth0".to_owned()],
            settings,
            pools: BTreeMap::from([("web".to_owned(), pool)]),
            services: BTreeMap::from([("shop".to_owned(), service)]),
        };
        (config, BTreeMap::from([("web".to_owned(), of_pool.into_iter().collect())]))
    }

    /// Backends of no document that nothing is left of.
    fn spent(&self, before: &Tables, fleet: &Fleet, now: Tick) -> BTreeSet<u32> {
        let listed: BTreeSet<IpAddr> = fleet.backends().map(|(number, _)| fleet::ip(number)).collect();
        let gone = before.backends.iter().filter(|(_, it)| it.address.is_none_or(|ip| !listed.contains(&ip)));
        let mut spent: BTreeSet<u32> = gone.map(|(&index, _)| index).collect();
        if spent.is_empty() {
            return spent;
        }
        let remembered = before.remembered();
        spent.retain(|index| !remembered.contains(index));
        let idle = &self.tables.config.idle;
        for way in self.tables.records.iter().flat_map(|line| &line.ways) {
            let record = Record(way.value.get());
            if way.key.get() > Record::BUSY && record.idle(now) < record.span(idle) {
                spent.remove(&record.backend());
            }
        }
        spent
    }

    fn apply(&mut self, op: &Op) {
        self.mirror.apply(op).unwrap_or_else(|why| panic!("{op:?}: {why}"));
        let op = &match (self.fault, op) {
            (Some(Fault::OldRecordsCount), Op::WriteSides { first_side, sides }) => {
                let ancient = |side: &SideEntry| SideEntry { unsettled_since: Tick(0), ..*side };
                let sides = sides.iter().map(|(slot, side)| (*slot, ancient(side))).collect();
                Op::WriteSides { first_side: *first_side, sides }
            }
            (Some(Fault::ForgetsLosses), Op::EndMoving { first_side, standings, .. }) => {
                Op::EndMoving { first_side: *first_side, standings: standings.clone(), quiet: 0 }
            }
            (Some(Fault::SettlesEarly), Op::SetGlobals(globals)) => {
                let mut globals = globals.clone();
                globals.idle.established = ESTABLISHED;
                globals.idle.udp = DATAGRAMS;
                Op::SetGlobals(globals)
            }
            _ => op.clone(),
        };
        match op {
            Op::SwitchOldRing { ring, .. } => self.resizes += u64::from(ring.slots > 0),
            Op::SetVip { address: IpAddr::V4(address), vip } => {
                let any = |service: Option<u32>| service.map_or(0, |index| index + 1);
                let vip = Vip { any_tcp: any(vip.any_tcp), any_udp: any(vip.any_udp), flags: 0 };
                self.tables.vips_v4.insert(abi::address_v4(address.octets()), vip);
            }
            _ => {}
        }
        let write =
            || cells::write(&self.tables, op, self.planned.0).unwrap_or_else(|why| panic!("{op:?}: {why}"));
        match op {
            Op::SetStandings { first_side, standings } | Op::EndMoving { first_side, standings, .. } => {
                let moving = self.moving(*first_side, standings);
                write();
                for (slot, before) in moving {
                    let side = &self.side(*first_side, slot).clone();
                    let quiet = if self.protocol == Protocol::Udp { DATAGRAMS } else { ESTABLISHED };
                    self.watch.fade(before, side, ticks_in(quiet), self.planned.0);
                }
            }
            _ => {
                write();
            }
        }
    }

    fn side(&self, first_side: u32, slot: u32) -> &Side {
        let page = first_side + slot / PAGE_SLOTS as u32;
        self.tables.side(page, slot as usize % PAGE_SLOTS).expect("a side")
    }

    /// Those of these slots that move from a backend that was still in the document when this was planned, and
    /// is another than their own; and that backend.
    fn moving(&self, first_side: u32, standings: &[(u32, Standing)]) -> Vec<(u32, u32)> {
        let ring = RingAt::from_word(self.tables.services[0].ring.get());
        let leaves = |&(slot, _): &(u32, Standing)| {
            let page = ring.first_page + slot / PAGE_SLOTS as u32;
            let own = self.tables.slot(page, slot as usize % PAGE_SLOTS)?.backend();
            let Standing { before, fading, .. } =
                Standing::from_word(self.side(first_side, slot).standing.get());
            let entry = self.tables.backends.get(before as usize)?;
            let address = abi::ip_addr([entry.address[0].get(), entry.address[1].get()]);
            (!fading && before != own && self.planned.1.contains(&address)).then_some((slot, before))
        };
        standings.iter().filter_map(leaves).collect()
    }

    /// The server that a backend entry is.
    fn index_of(&self, server: usize) -> Option<u32> {
        let address = abi::address(fleet::ip(server));
        let is = |backend: &abi::Backend| {
            backend.flags.get() & abi::Backend::IN_USE != 0
                && [backend.address[0].get(), backend.address[1].get()] == address
                && backend.flags.get() & abi::Backend::CUT == 0
        };
        self.tables.backends.iter().position(is).map(|index| index as u32)
    }
}

impl Balancer for Lobby {
    fn forward(&mut self, packet: &Packet, now: u64) -> Option<usize> {
        let now = Tick::from_ns(now);
        packet.write(&mut self.frame.0);
        let spot = Spot::of(&self.tables, packet);
        let earlier = spot.as_ref().map(Spot::remember);
        // What a fault does is the packet's doing, to whoever watches.
        if let (Some(fault), Some(spot)) = (self.fault, &spot)
            && !spot.slot.is_settled()
        {
            fault.strike(packet, spot, now, &mut self.random);
        }
        let verdict = decide(&mut self.frame, &self.tables, INGRESS, now);
        let server = match verdict {
            Verdict::ToBackend { .. } => Some(usize::from(self.frame.0[5])),
            // Of a backend that is gone.
            Verdict::Reset { .. } | Verdict::Drop(DropReason::StrayReset) => None,
            other => panic!("{other:?} of a client's packet"),
        };
        if let Some((spot, earlier)) = spot.zip(earlier) {
            let goes_to = server.and_then(|server| self.index_of(server));
            self.watch.packet(packet, &spot, &earlier, goes_to, now);
        }
        server
    }

    fn change(&mut self, _: &Fleet, now: u64) -> Option<u64> {
        self.asked = true;
        Some(now.max(self.down_until))
    }

    fn work(&mut self, fleet: &Fleet, now: u64) -> Option<u64> {
        let tick = Tick::from_ns(now);
        if now < self.down_until {
            return Some(self.down_until);
        }
        if let Some(op) = self.ops.pop_front() {
            self.apply(&op);
        } else if self.asked || self.due.is_some_and(|due| tick.has_reached(due)) {
            self.plan(fleet, tick);
        }
        self.has_begun |= self.ops.is_empty() && !self.asked;
        if self.restarts && self.has_begun && self.random.percent(3) {
            // Whoever comes next knows what the tables say, and nothing else.
            self.kills += 1;
            self.ops.clear();
            // As `Core::settle` does before whatever comes next.
            self.apply(&Op::Settle);
            self.rings = Rings::default();
            self.asked = true;
            self.down_until = now + self.random.below(20) * SECOND;
            return Some(self.down_until.max(now + MILLISECOND));
        }
        if !self.ops.is_empty() || self.asked {
            return Some(now + (2 + self.random.below(30)) * MILLISECOND);
        }
        let due = self.due?;
        Some((u64::from(due.0) << Tick::SHIFT).max(now + LOOKS_EVERY))
    }
}
