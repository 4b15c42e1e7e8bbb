//! A data plane in memory: for tests, simulation, and `lb plan`.
//!
//! It is strict where the kernel's maps are not: an operation that would leave something half-made is
//! refused, so whatever runs on it is known to keep the order that packets need.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use lb_common::{
    abi::{NO_BACKEND, Traffic},
    verdict::Verdict,
};

use super::{
    BackendEntry, Dataplane, DataplaneError, Firewall, FlowEntry, MAX_SOURCES, Op, Ring, ServiceEntry,
    Tables, VipEntry, pages_for,
};
use crate::model::{Limits, Listen, Protocol};

/// Tables in memory.
#[derive(Clone, Debug)]
pub struct MemoryDataplane {
    tables: Tables,
    /// The ring that was written to each page, be it in use or not, and which of its pages this is. A ring
    /// is taken from here when a service is switched to it; from then on its pages cannot be written, so it
    /// stays true.
    pages: BTreeMap<u32, (Arc<[u32]>, u32)>,
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
            live: Vec::new(),
            passed: BTreeMap::new(),
            counted: vec![0; Verdict::COUNTERS],
        };
        for Ring { first_page, slots } in tables.services.values().map(|service| &service.ring) {
            memory.write_pages(*first_page, slots);
        }
        memory
    }

    /// The tables, to look at.
    pub fn held(&self) -> &Tables {
        &self.tables
    }

    fn write_pages(&mut self, first_page: u32, slots: &Arc<[u32]>) {
        for number in 0..pages_for(slots.len()) {
            self.pages.insert(first_page + number, (Arc::clone(slots), number));
        }
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

    fn switch_ring(&mut self, service: u32, first_page: u32, slots: u32) -> Result<(), DataplaneError> {
        let pages = first_page..first_page + pages_for(slots as usize);
        if pages.end > self.tables.limits.ring_pages {
            return Err(misfit(format!("page {} is beyond the last", pages.end)));
        }
        let written = pages.clone().zip(0..).all(|(page, number)| {
            self.pages.get(&page).is_some_and(|(ring, n)| *n == number && ring.len() == slots as usize)
        });
        let ring = match self.pages.get(&first_page) {
            _ if slots == 0 => Arc::new([]),
            Some((ring, _)) if written => Arc::clone(ring),
            _ => return Err(misfit(format!("no ring of {slots} slots was written to {pages:?}"))),
        };
        let its_own = |slot: u32| self.tables.backends.get(&slot).is_some_and(|b| b.service == service);
        // Large rings lead to few backends: each is looked up once.
        let mut seen = vec![false; self.tables.limits.backends as usize];
        let mut is_first = |slot: u32| match seen.get_mut(slot as usize) {
            Some(seen) => !std::mem::replace(seen, true),
            None => true,
        };
        let mut strange = |slot: u32| slot != NO_BACKEND && is_first(slot) && !its_own(slot);
        if let Some(slot) = ring.iter().copied().find(|slot| strange(*slot)) {
            return Err(misfit(format!("a slot of service {service} leads to backend {slot}, not its own")));
        }
        let first_page = if slots == 0 { 0 } else { first_page };
        self.service(service)?.ring = Ring { first_page, slots: ring };
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
        service.is_some_and(|service| service.ring.slots.contains(&backend))
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
            Op::SetGlobals(ref globals) => tables.globals = Some(globals.clone()),
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
                let clashes = |ring: std::ops::Range<u32>| ring.start < pages.end && pages.start < ring.end;
                let taken = tables.services.iter().find(|(_, service)| clashes(service.ring.pages()));
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
            Op::WriteService { index, listen, round_robin } => {
                below(index, tables.limits.services, "service")?;
                if tables.services.contains_key(&index) {
                    return Err(misfit(format!("service {index} is in use")));
                }
                let (ring, firewall) = (Ring::empty(), Firewall::default());
                tables.services.insert(index, ServiceEntry { listen, round_robin, ring, firewall });
            }
            Op::SwitchScheduler { service, round_robin } => self.service(service)?.round_robin = round_robin,
            Op::SwitchRing { service, first_page, slots } => self.switch_ring(service, first_page, slots)?,
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
            // Nothing happens at the same time here.
            Op::Settle => {}
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
