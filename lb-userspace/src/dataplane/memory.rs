//! A data plane in memory: for tests, simulation, and `lb plan`.
//!
//! It is strict where the kernel's maps are not: an operation that would leave something half-made is
//! refused, so whatever runs on it is known to keep the order that packets need.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Range,
    sync::Arc,
};

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
    under_way: UnderWay,
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

/// What packets that came before the last change may see yet, though nothing leads there any more. Until somebody
/// has waited for them ([`Op::Settle`]) nothing is written there.
#[derive(Clone, Debug, Default)]
struct UnderWay {
    /// Rings that were switched away from.
    rings: Vec<Ring>,
    /// Rule sets that were switched away from.
    rule_sets: BTreeSet<u32>,
    /// Some go by the time-outs of before.
    time_outs: bool,
    /// Some find that a slot asks its service's old ring.
    standings: bool,
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
            under_way: UnderWay::default(),
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
    fn is_whole(&self, ring: &Arc<[Slot]>, mut pages: Range<u32>) -> bool {
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
        let mut left = self.under_way.rings.iter().map(Ring::sides);
        if let Some(sides) = left.find(|sides| overlap(sides, &(first_side..last + 1))) {
            return Err(misfit(format!("packets that are under way may see sides {sides:?}")));
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
            if standing.fading && !self.under_way.rings.is_empty() {
                return Err(misfit(format!(
                    "slot {slot} would fade under packets that see the ring of before"
                )));
            }
            let former = std::mem::replace(&mut self.side(first_side, slot).standing, standing);
            self.under_way.standings |= former.asks_old_ring() && !standing.asks_old_ring();
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
        if old {
            if self.is_old_ring_asked(service)? {
                return Err(misfit(format!("the old ring of service {service} may be asked yet")));
            }
            // Its sides are the ring's in force.
            self.service(service)?.old_ring = ring;
        } else {
            let former = std::mem::replace(&mut self.service(service)?.ring, ring);
            self.under_way.rings.extend((!former.slots.is_empty()).then_some(former));
        }
        Ok(())
    }

    /// Whether a service has an old ring that a slot asks, or did for packets that are under way.
    fn is_old_ring_asked(&self, service: u32) -> Result<bool, DataplaneError> {
        let entry = self.tables.services.get(&service).filter(|entry| !entry.old_ring.slots.is_empty());
        let Some(ServiceEntry { ring, .. }) = entry else { return Ok(false) };
        let sides = self.sides(ring)?;
        let mut unsettled = ring.slots.iter().zip(sides.iter()).filter(|(slot, _)| !slot.is_settled());
        Ok(self.under_way.standings
            || !self.under_way.rings.is_empty()
            || unsettled.any(|(_, side)| side.standing.asks_old_ring()))
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
        let leads = |ring: &Ring| ring.slots.iter().any(|slot| slot.backend() == backend);
        if self.under_way.rings.iter().any(leads) {
            return true;
        }
        // Slots lead to backends of their own service only: `switch_ring`.
        let service = self.tables.backends.get(&backend).map(|entry| entry.service);
        let service = service.and_then(|index| self.tables.services.get(&index));
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
        let former = std::mem::replace(&mut self.service(service)?.firewall, firewall);
        self.under_way.rule_sets.extend(former.rule_set);
        Ok(())
    }

    fn rules_in_force(&self, set: u32) -> bool {
        self.under_way.rule_sets.contains(&set)
            || self.tables.services.values().any(|s| s.firewall.rule_set == Some(set))
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
                    self.under_way.time_outs = true;
                }
            }
            Op::CountAnew => {
                if self.under_way.time_outs {
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
                let clashes = |ring: &Ring| overlap(&ring.pages(), &pages);
                if self.under_way.rings.iter().any(clashes) {
                    return Err(misfit(format!("packets that are under way may see pages {pages:?}")));
                }
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
            Op::Settle => self.under_way = UnderWay::default(),
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

fn overlap(one: &Range<u32>, other: &Range<u32>) -> bool {
    one.start < other.end && other.start < one.end
}

fn misfit(why: String) -> DataplaneError {
    DataplaneError::Misfit(why)
}

#[cfg(test)]
mod tests;
