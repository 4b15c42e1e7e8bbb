//! A data plane in memory: for tests, simulation, and `lb plan`.
//!
//! It is strict where the kernel's maps are not: an operation that would leave something half-made is
//! refused, so whatever runs on it is known to keep the order that packets need.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use lb_common::{
    abi::{NO_BACKEND, PAGE_SLOTS, RingAt, Slot, Standing, Tick, Traffic},
    verdict,
};

use super::{
    BackendEntry, Dataplane, DataplaneError, Firewall, FlowEntry, MAX_SOURCES, Op, RecordEntry, Ring,
    ServiceEntry, SideEntry, Tables, VipEntry, cells, pages_for,
};
use crate::model::{Limits, Listen, Protocol};

/// A side that nobody has written.
const UNWRITTEN: SideEntry = SideEntry::moving(NO_BACKEND, Tick(0));

/// Tables in memory.
#[derive(Clone, Debug)]
pub struct MemoryDataplane {
    tables: Tables,
    /// The ring that was written to each page, be it in use or not, and which of its pages this is. A ring
    /// is taken from here when a service is switched to it; from then on its pages cannot be written, so it
    /// stays true.
    pages: BTreeMap<u32, (Arc<[Slot]>, u32)>,
    /// What was written to each side page, by slot.
    sides: BTreeMap<u32, BTreeMap<u32, SideEntry>>,
    /// Whether packets that saw a ring of before may still be there.
    unsettled: bool,
    /// The time, for whoever plays the part of the clock.
    pub now: Tick,
    /// Records, for whoever plays the part of the packets.
    pub written: Vec<RecordEntry>,
    /// Live flows, for whoever plays the part of the packets.
    pub live: Vec<FlowEntry>,
    /// Traffic by backend, for whoever plays the part of the packets.
    pub passed: BTreeMap<u32, Traffic>,
    /// Packets by verdict, for whoever plays the part of the packets.
    pub counted: Vec<u64>,
}

impl MemoryDataplane {
    /// Empty tables of these sizes.
    pub fn new(limits: Limits) -> Self {
        Self::from_tables(&Tables { limits, ..Tables::default() })
    }

    /// Tables that hold this already.
    pub fn from_tables(tables: &Tables) -> Self {
        let mut memory = Self {
            tables: tables.clone(),
            pages: BTreeMap::new(),
            sides: BTreeMap::new(),
            unsettled: false,
            now: Tick(1),
            written: Vec::new(),
            live: Vec::new(),
            passed: BTreeMap::new(),
            counted: vec![0; verdict::COUNTERS],
        };
        for (index, service) in &tables.services {
            for ring in [&service.ring, &service.old_ring] {
                memory.write_pages(ring.first_page, &ring.slots);
            }
            if let Some((first, sides)) = service.ring.first_side.zip(tables.sides.get(index)) {
                for (number, side) in (0..).zip(sides.iter()) {
                    *memory.side(first, number) = *side;
                }
            }
        }
        memory
    }

    /// The tables, to look at.
    pub fn held(&self) -> &Tables {
        &self.tables
    }

    /// Takes over what slots remember, as [`Dataplane::observed`] has seen it elsewhere.
    pub fn see(&mut self, sides: BTreeMap<u32, Arc<[SideEntry]>>) {
        self.tables.sides = sides;
    }

    fn write_pages(&mut self, first_page: u32, slots: &Arc<[Slot]>) {
        for number in 0..pages_for(slots.len()) {
            self.pages.insert(first_page + number, (Arc::clone(slots), number));
        }
    }

    /// Whether these pages hold that ring, from its first page on.
    fn is_whole(&self, ring: &Arc<[Slot]>, mut pages: std::ops::Range<u32>) -> bool {
        let begin = pages.start;
        pages.all(|page| {
            self.pages.get(&page).is_some_and(|(there, n)| Arc::ptr_eq(there, ring) && *n == page - begin)
        })
    }

    /// What a slot of the ring with these side pages remembers, for whoever plays the part of the packets.
    pub fn side(&mut self, first_side: u32, slot: u32) -> &mut SideEntry {
        let page = self.sides.entry(first_side + slot / PAGE_SLOTS as u32).or_default();
        page.entry(slot % PAGE_SLOTS as u32).or_insert(UNWRITTEN)
    }

    /// The slots of the rings in force with these side pages, and whether they are settled.
    fn with_sides(&self, first_side: u32) -> impl Iterator<Item = &Ring> {
        self.tables
            .services
            .values()
            .map(|service| &service.ring)
            .filter(move |r| r.first_side == Some(first_side))
    }

    fn write_sides(&mut self, first_side: u32, sides: &[(u32, SideEntry)]) -> Result<(), DataplaneError> {
        let last = sides.iter().map(|(slot, _)| first_side + slot / PAGE_SLOTS as u32).max().unwrap_or(0);
        below(last, self.tables.limits.side_pages, "side page")?;
        let asked = |slot: u32| {
            self.with_sides(first_side)
                .any(|ring| ring.slots.get(slot as usize).is_some_and(|s| !s.is_settled()))
        };
        if let Some((slot, _)) = sides.iter().find(|(slot, _)| asked(*slot)) {
            return Err(misfit(format!("the side of slot {slot} at {first_side} is in use")));
        }
        for (slot, side) in sides {
            *self.side(first_side, *slot) = *side;
        }
        Ok(())
    }

    fn set_standings(
        &mut self,
        first_side: u32,
        standings: &[(u32, Standing)],
    ) -> Result<(), DataplaneError> {
        if self.with_sides(first_side).next().is_none() {
            return Err(misfit(format!("no ring in force has its sides at {first_side}")));
        }
        for &(slot, standing) in standings {
            // Who still sees the ring of before would take the slot's own of then for the default.
            if standing.fading && self.unsettled {
                return Err(misfit(format!(
                    "slot {slot} would fade under packets that see the ring of before"
                )));
            }
            self.side(first_side, slot).standing = standing;
        }
        Ok(())
    }

    fn service(&mut self, index: u32) -> Result<&mut ServiceEntry, DataplaneError> {
        self.tables.services.get_mut(&index).ok_or_else(|| misfit(format!("service {index} is not in use")))
    }

    /// The service that this leads to must exist, and listen there.
    fn must_lead(
        &self,
        service: u32,
        address: IpAddr,
        port: Option<u16>,
        protocol: Protocol,
    ) -> Result<(), DataplaneError> {
        let wanted = Listen { address, port, protocol };
        match self.tables.services.get(&service) {
            Some(entry) if entry.listen == wanted => Ok(()),
            Some(entry) => {
                Err(misfit(format!("service {service} listens on {}, not {wanted}", entry.listen)))
            }
            None => Err(misfit(format!("{wanted} would lead to service {service}, not in use"))),
        }
    }

    fn switch_ring(&mut self, service: u32, at: RingAt, old: bool) -> Result<(), DataplaneError> {
        self.service(service)?;
        let pages = at.first_page..at.first_page + pages_for(at.slots as usize);
        if pages.end > self.tables.limits.ring_pages {
            return Err(misfit(format!("page {} is beyond the last", pages.end)));
        }
        let slots = match self.pages.get(&at.first_page) {
            _ if at.slots == 0 => Arc::new([]),
            Some((ring, _)) if ring.len() == at.slots as usize && self.is_whole(ring, pages.clone()) => {
                Arc::clone(ring)
            }
            _ => return Err(misfit(format!("no ring of {} slots was written to {pages:?}", at.slots))),
        };
        let its_own = |slot: u32| self.tables.backends.get(&slot).is_some_and(|b| b.service == service);
        // Large rings lead to few backends: each is looked up once.
        let mut seen = vec![0_u64; (self.tables.limits.backends as usize).div_ceil(64)];
        let mut is_first = |slot: u32| match seen.get_mut(slot as usize / 64) {
            Some(seen) => {
                let before = *seen;
                *seen |= 1 << (slot % 64);
                before != *seen
            }
            None => true,
        };
        let mut strange = |slot: u32| slot != NO_BACKEND && is_first(slot) && !its_own(slot);
        if let Some(slot) = slots.iter().map(|slot| slot.backend()).find(|slot| strange(*slot)) {
            return Err(misfit(format!("a slot of service {service} leads to backend {slot}, not its own")));
        }
        if at.first_side.is_none() && !old && slots.iter().any(|slot| !slot.is_settled()) {
            return Err(misfit(format!("a slot of service {service} is not settled, and has no side")));
        }
        let first_page = if at.slots == 0 { 0 } else { at.first_page };
        let ring = Ring { first_page, first_side: at.first_side, slots };
        let entry = self.service(service)?;
        if old {
            // Its sides are the ring's in force.
            entry.old_ring = ring;
        } else {
            let switched = !entry.ring.slots.is_empty();
            entry.ring = ring;
            self.unsettled |= switched;
        }
        Ok(())
    }

    fn write_backend(&mut self, index: u32, backend: &BackendEntry) -> Result<(), DataplaneError> {
        below(index, self.tables.limits.backends, "backend")?;
        if let Some(old) = self.tables.backends.get(&index) {
            let same =
                (old.service, old.address, old.port) == (backend.service, backend.address, backend.port);
            if old.generation != backend.generation && self.leads_to(index) {
                return Err(misfit(format!("backend {index} would be reused while slots lead to it")));
            }
            if old.generation == backend.generation && !same {
                return Err(misfit(format!("backend {index} would change under its flows")));
            }
        }
        let last = self.tables.backends.get(&index).map(|b| b.generation);
        let last = last.or_else(|| self.tables.freed.get(&index).copied()).unwrap_or(0);
        let fresh = !self.tables.backends.contains_key(&index);
        if backend.generation < last || (fresh && backend.generation == last) {
            return Err(misfit(format!("backend {index} has had generation {last} before")));
        }
        let run = backend.sources;
        if (run.first..run.first + run.count).any(|source| !self.tables.sources.contains_key(&source)) {
            return Err(misfit(format!("backend {index} names a source that is not written")));
        }
        self.tables.freed.remove(&index);
        self.tables.backends.insert(index, backend.clone());
        Ok(())
    }

    fn leads_to(&self, backend: u32) -> bool {
        // Slots lead to backends of their own service only: `switch_ring`.
        let service = self.tables.backends.get(&backend).map(|entry| entry.service);
        let service = service.and_then(|index| self.tables.services.get(&index));
        let leads = |ring: &Ring| ring.slots.iter().any(|slot| slot.backend() == backend);
        service.is_some_and(|service| leads(&service.ring) || leads(&service.old_ring))
    }

    fn remove_service(&mut self, index: u32) -> Result<(), DataplaneError> {
        self.service(index)?;
        let led = self.tables.keys.values().any(|&s| s == index)
            || self.tables.vips.values().any(|v| v.any_tcp == Some(index) || v.any_udp == Some(index));
        if led {
            return Err(misfit(format!("service {index} is still led to")));
        }
        self.tables.services.remove(&index);
        Ok(())
    }

    fn set_vip(&mut self, address: IpAddr, vip: VipEntry) -> Result<(), DataplaneError> {
        for (service, protocol) in [(vip.any_tcp, Protocol::Tcp), (vip.any_udp, Protocol::Udp)] {
            if let Some(service) = service {
                self.must_lead(service, address, None, protocol)?;
            }
        }
        self.tables.vips.insert(address, vip);
        Ok(())
    }

    fn switch_firewall(&mut self, service: u32, firewall: Firewall) -> Result<(), DataplaneError> {
        if firewall.rule_set.is_some_and(|set| set == 0 || !self.tables.rules.contains_key(&set)) {
            return Err(misfit(format!("rule set {:?} is not written", firewall.rule_set)));
        }
        self.service(service)?.firewall = firewall;
        Ok(())
    }

    fn rules_in_force(&self, set: u32) -> bool {
        self.tables.services.values().any(|s| s.firewall.rule_set == Some(set))
    }
}

impl Dataplane for MemoryDataplane {
    fn tables(&self) -> Result<Tables, DataplaneError> {
        Ok(self.tables.clone())
    }

    fn apply(&mut self, op: &Op) -> Result<(), DataplaneError> {
        let tables = &mut self.tables;
        match *op {
            Op::SetGlobals(ref globals) => {
                let former = tables.globals.replace(globals.clone());
                if former.is_some_and(|former| cells::steps(&former.idle) != cells::steps(&globals.idle)) {
                    tables.recount = true;
                    self.unsettled = true;
                }
            }
            Op::CountAnew => {
                if self.unsettled {
                    return Err(misfit("some packets may still go by the time-outs of before".into()));
                }
                tables.recount = false;
            }
            Op::SetInterface { index, mac } => {
                tables.interfaces.insert(index, mac);
            }
            Op::RemoveInterface { index } => {
                tables.interfaces.remove(&index);
            }
            Op::WriteSource { index, source } => {
                below(index, MAX_SOURCES, "source")?;
                tables.sources.insert(index, source);
            }
            Op::RemoveSource { index } => {
                let named =
                    |b: &BackendEntry| (b.sources.first..b.sources.first + b.sources.count).contains(&index);
                if tables.backends.values().any(named) {
                    return Err(misfit(format!("source {index} is still named by a backend")));
                }
                tables.sources.remove(&index);
            }
            Op::WriteBackend { index, ref backend } => self.write_backend(index, backend)?,
            Op::RemoveBackend { index } => {
                if self.leads_to(index) {
                    return Err(misfit(format!("backend {index} would be freed while slots lead to it")));
                }
                if let Some(gone) = self.tables.backends.remove(&index) {
                    self.tables.freed.insert(index, gone.generation);
                }
            }
            Op::WritePages { first_page, ref slots } => {
                let pages = first_page..first_page + pages_for(slots.len());
                let clashes = |ring: &Ring| {
                    let taken = ring.pages();
                    taken.start < pages.end && pages.start < taken.end
                };
                let mut services = tables.services.iter();
                let taken =
                    services.find(|(_, service)| clashes(&service.ring) || clashes(&service.old_ring));
                if let Some((service, _)) = taken {
                    return Err(misfit(format!("pages {pages:?} are in use by service {service}")));
                }
                self.write_pages(first_page, slots);
            }
            Op::WriteRules { set, ref rules } => {
                // A trie takes rules one by one: what is there already would stay.
                if tables.rules.contains_key(&set) {
                    return Err(misfit(format!("rule set {set} is written already")));
                }
                tables.rules.insert(set, rules.clone());
            }
            Op::RemoveRules { set } => {
                if self.rules_in_force(set) {
                    return Err(misfit(format!("rule set {set} would be removed while in force")));
                }
                self.tables.rules.remove(&set);
            }
            Op::WriteSides { first_side, ref sides } => self.write_sides(first_side, sides)?,
            Op::SetStandings { first_side, ref standings } => self.set_standings(first_side, standings)?,
            Op::EndMoving { first_side, ref standings, quiet } => {
                let quiet_ones = standings.iter().filter(|(slot, standing)| {
                    standing.since.since(self.side(first_side, *slot).lost_at) >= quiet
                });
                let standings: Vec<(u32, Standing)> = quiet_ones.copied().collect();
                self.set_standings(first_side, &standings)?;
            }
            Op::WriteService { index, listen, mode } => {
                below(index, tables.limits.services, "service")?;
                if tables.services.contains_key(&index) {
                    return Err(misfit(format!("service {index} is in use")));
                }
                tables.services.insert(index, ServiceEntry::new(listen, mode));
            }
            Op::SwitchMode { service, mode } => self.service(service)?.mode = mode,
            Op::SwitchRing { service, ring } => self.switch_ring(service, ring, false)?,
            Op::SwitchOldRing { service, ring } => self.switch_ring(service, ring, true)?,
            Op::SwitchFirewall { service, firewall } => self.switch_firewall(service, firewall)?,
            Op::RemoveService { index } => self.remove_service(index)?,
            Op::SetVip { address, vip } => self.set_vip(address, vip)?,
            Op::RemoveVip { address } => {
                tables.vips.remove(&address);
            }
            Op::SetKey { listen, service } => {
                if listen.port.is_none() {
                    return Err(misfit(format!("{listen} is led by its VIP, not by a key")));
                }
                self.must_lead(service, listen.address, listen.port, listen.protocol)?;
                self.tables.keys.insert(listen, service);
            }
            Op::RemoveKey { listen } => {
                tables.keys.remove(&listen);
            }
            // Nothing happens at the same time here; but it is noted that somebody waited.
            Op::Settle => self.unsettled = false,
        }
        Ok(())
    }

    fn verdicts(&self) -> Result<Vec<u64>, DataplaneError> {
        Ok(self.counted.clone())
    }

    fn traffic(&self) -> Result<BTreeMap<u32, Traffic>, DataplaneError> {
        let of = |&index: &u32| (index, self.passed.get(&index).copied().unwrap_or_default());
        Ok(self.tables.backends.keys().map(of).collect())
    }

    fn now(&self) -> Result<Tick, DataplaneError> {
        Ok(self.now)
    }

    fn sides(&self, ring: &Ring) -> Result<Arc<[SideEntry]>, DataplaneError> {
        let first = ring.first_side.unwrap_or_default();
        let pages = (first..).map(|page| self.sides.get(&page)).take(pages_for(ring.slots.len()) as usize);
        let pages: Vec<_> = pages.collect();
        let side = |slot: u32| {
            let page = pages.get(slot as usize / PAGE_SLOTS).copied().flatten();
            page.and_then(|page| page.get(&(slot % PAGE_SLOTS as u32))).copied().unwrap_or(UNWRITTEN)
        };
        Ok((0..ring.at().slots).map(side).collect())
    }

    fn records(&self, visit: &mut dyn FnMut(&RecordEntry)) -> Result<(), DataplaneError> {
        self.written.iter().for_each(visit);
        Ok(())
    }

    fn flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<(), DataplaneError> {
        self.live.iter().for_each(visit);
        Ok(())
    }
}

fn below(index: u32, limit: u32, what: &str) -> Result<(), DataplaneError> {
    if index < limit { Ok(()) } else { Err(misfit(format!("{what} {index} is beyond the last, {limit}"))) }
}

fn misfit(why: String) -> DataplaneError {
    DataplaneError::Misfit(why)
}

#[cfg(test)]
mod tests {
    use lb_common::abi::Action;

    use super::*;
    use crate::{
        dataplane::{FlowsOf, Mode, SourceEntry, SourceRun},
        model::PortRange,
    };

    fn listen(text: &str) -> Listen {
        text.parse().unwrap()
    }

    fn ring<const N: usize>(backends: [u32; N]) -> Arc<[Slot]> {
        backends.map(Slot::settled).into()
    }

    fn at(first_page: u32, slots: u32) -> RingAt {
        RingAt { slots, first_page, first_side: None }
    }

    fn backend(service: u32, generation: u32, sources: u32) -> BackendEntry {
        BackendEntry {
            service,
            address: Some([10, 0, 0, 1].into()),
            port: Some(80),
            generation,
            next_hop: None,
            sources: SourceRun { first: 0, count: sources },
            flows: FlowsOf::Keep,
            dead: false,
        }
    }

    /// Service 0 with a ring of its backend 0, led to by a key; service 1 for all ports, with its backend 1.
    fn memory() -> MemoryDataplane {
        let limits = Limits { flows: 1024, services: 4, backends: 4, ring_pages: 4, side_pages: 4, rules: 4 };
        let mut memory = MemoryDataplane::new(limits);
        let source = SourceEntry { address: [10, 9, 0, 1].into(), ports: PortRange::default() };
        let (first, second) = (listen("203.0.113.10:80/tcp"), listen("203.0.113.11:*/udp"));
        let rules = [("10.0.0.0/8".parse().unwrap(), Action::Allow)].into();
        for op in [
            Op::WriteSource { index: 0, source },
            Op::WriteService { index: 0, listen: first, mode: Mode::default() },
            Op::WriteService { index: 1, listen: second, mode: Mode::default() },
            Op::WriteBackend { index: 0, backend: backend(0, 1, 1) },
            Op::WriteBackend { index: 1, backend: backend(1, 1, 0) },
            Op::WritePages { first_page: 0, slots: ring([0, 0, 0]) },
            Op::SwitchRing { service: 0, ring: at(0, 3) },
            Op::WriteRules { set: 1, rules },
            Op::SwitchFirewall { service: 0, firewall: Firewall { rule_set: Some(1), deny_others: true } },
            Op::SetKey { listen: first, service: 0 },
            Op::WritePages { first_page: 1, slots: ring([1]) },
        ] {
            memory.apply(&op).unwrap_or_else(|why| panic!("{op:?}: {why}"));
        }
        memory
    }

    #[test]
    fn what_would_be_half_made_is_refused_and_nothing_changes() {
        let set = Some(2);
        let vip = VipEntry { any_tcp: Some(1), ..VipEntry::default() };
        let source = SourceEntry { address: [10, 9, 0, 1].into(), ports: PortRange::default() };
        for (op, why) in [
            (Op::SwitchRing { service: 0, ring: at(1, 1) }, "leads to backend 1, not its own"),
            (Op::SwitchRing { service: 0, ring: at(2, 1) }, "no ring of 1 slots was written"),
            (Op::SwitchRing { service: 1, ring: at(1, 2) }, "no ring of 2 slots was written"),
            (Op::SwitchRing { service: 1, ring: at(4, 1) }, "beyond the last"),
            (Op::SwitchRing { service: 3, ring: at(1, 1) }, "service 3 is not in use"),
            (Op::WritePages { first_page: 0, slots: ring([0]) }, "in use by service 0"),
            (Op::WriteSource { index: MAX_SOURCES, source }, "beyond the last"),
            (Op::RemoveSource { index: 0 }, "still named by a backend"),
            (Op::WriteBackend { index: 4, backend: backend(0, 1, 0) }, "beyond the last"),
            (Op::WriteBackend { index: 0, backend: backend(0, 2, 1) }, "reused while slots lead to it"),
            (Op::WriteBackend { index: 1, backend: backend(0, 1, 0) }, "change under its flows"),
            (Op::WriteBackend { index: 1, backend: backend(1, 0, 0) }, "has had generation 1 before"),
            (Op::WriteBackend { index: 2, backend: backend(1, 1, 2) }, "a source that is not written"),
            (Op::RemoveBackend { index: 0 }, "freed while slots lead to it"),
            (Op::WriteRules { set: 1, rules: [].into() }, "written already"),
            (Op::RemoveRules { set: 1 }, "removed while in force"),
            (
                Op::SwitchFirewall {
                    service: 0,
                    firewall: Firewall { rule_set: set, ..Firewall::default() },
                },
                "rule set Some(2) is not written",
            ),
            (
                Op::WriteService { index: 0, listen: listen("203.0.113.12:80/tcp"), mode: Mode::default() },
                "is in use",
            ),
            (Op::RemoveService { index: 0 }, "still led to"),
            (Op::SetKey { listen: listen("203.0.113.10:81/tcp"), service: 0 }, "listens on"),
            (Op::SetKey { listen: listen("203.0.113.10:80/tcp"), service: 3 }, "not in use"),
            (Op::SetKey { listen: listen("203.0.113.11:*/udp"), service: 1 }, "led by its VIP"),
            (Op::SetVip { address: [203, 0, 113, 11].into(), vip }, "listens on"),
        ] {
            let mut memory = memory();
            let before = memory.held().clone();
            let refused = memory.apply(&op).expect_err(&format!("{op:?}")).to_string();
            assert!(refused.contains(why), "{op:?}: {refused}");
            assert_eq!(*memory.held(), before, "{op:?}");
        }
    }

    #[test]
    fn a_ring_of_several_pages_is_switched_to_as_it_was_written() {
        let mut memory = memory();
        let slots: Arc<[Slot]> = std::iter::repeat_n(Slot::settled(1), 2 * PAGE_SLOTS + 1).collect();
        let size = slots.len() as u32;
        memory.apply(&Op::WritePages { first_page: 1, slots: Arc::clone(&slots) }).unwrap();
        memory.apply(&Op::SwitchRing { service: 1, ring: at(1, size) }).unwrap();
        assert_eq!(memory.held().services[&1].ring, Ring { first_page: 1, first_side: None, slots });
        // Written over in the middle, it is a ring no more.
        let mut memory = self::memory();
        let slots: Arc<[Slot]> = std::iter::repeat_n(Slot::settled(1), 2 * PAGE_SLOTS + 1).collect();
        memory.apply(&Op::WritePages { first_page: 1, slots }).unwrap();
        memory.apply(&Op::WritePages { first_page: 2, slots: ring([1]) }).unwrap();
        assert!(memory.apply(&Op::SwitchRing { service: 1, ring: at(1, size) }).is_err());
    }
}
