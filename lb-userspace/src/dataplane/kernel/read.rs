//! The tables read back: what a new daemon adopts.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use lb_common::{
    abi::{
        self, Backend, Called, Config, Flow, NO_BACKEND, PAGE_SLOTS, Record, RingAt, Service, Slot, Tick,
        Vip, name,
    },
    datapath::{flow::Phase, listener},
    wire::eth::{mac_of_word, vlan_from_word},
};
use nix::time::{ClockId, clock_gettime};

use super::{
    KernelDataplane, unread,
    write::{SET_BITS, action, words},
};
use crate::{
    dataplane::{
        BackendEntry, ClientHop, DataplaneError, Firewall, FlowEntry, FlowState, FlowsOf, Globals, Mode,
        NextHop, RecordEntry, Ring, RuleSet, ServiceEntry, SourceEntry, SourceRun, Tables, VipEntry,
        duration_of,
    },
    model::{Idle, Listen, Network, PortRange, Protocol, Scheduler},
};

impl KernelDataplane {
    pub(super) fn read_tables(&self) -> Result<Tables, DataplaneError> {
        let globals = self.read_globals();
        let recount = globals.is_some() && !self.config().idle.is_counted();
        let mut tables = Tables { limits: self.limits, globals, recount, ..Tables::default() };
        for (index, service) in (0..).zip(self.services.iter()) {
            if service.flags.get() & Service::IN_USE != 0 {
                tables.services.insert(index, self.read_service(service)?);
            }
        }
        for cell in self.listeners.iter().flat_map(|line| &line.cells) {
            if let Some((called, service)) = listener::read(cell) {
                tables.keys.insert(listen(called)?, service);
            }
        }
        for entry in self.vips_v4.iter() {
            let (address, vip) = entry.map_err(unread(name::VIPS_V4))?;
            tables.vips.insert(abi::ip_addr(abi::mapped(address)), read_vip(vip));
        }
        for entry in self.vips_v6.iter() {
            let (address, vip) = entry.map_err(unread(name::VIPS_V6))?;
            tables.vips.insert(abi::ip_addr(address), read_vip(vip));
        }
        for (index, backend) in (0..).zip(self.backends.iter()) {
            if backend.flags.get() & Backend::IN_USE != 0 {
                tables.backends.insert(index, read_backend(backend));
            } else if backend.generation.get() != 0 {
                tables.freed.insert(index, backend.generation.get());
            }
        }
        for (index, source) in (0..).zip(self.sources.iter()) {
            if source.port_high.get() != 0 {
                let ports = PortRange { low: source.port_low.get(), high: source.port_high.get() };
                let address = abi::ip_addr(words(&source.address));
                tables.sources.insert(index, SourceEntry { address, ports });
            }
        }
        for (index, word) in (0..).zip(self.interfaces.iter()) {
            if word.get() != 0 {
                tables.interfaces.insert(index, mac_of_word(word.get()));
            }
        }
        tables.rules = self.read_rules()?;
        Ok(tables)
    }

    /// All rules, by set.
    pub(super) fn read_rules(&self) -> Result<BTreeMap<u32, RuleSet>, DataplaneError> {
        let mut sets: BTreeMap<u32, RuleSet> = BTreeMap::new();
        let mut add = |set, prefix: u32, address, value| -> Result<(), DataplaneError> {
            let prefix = u8::try_from(prefix.saturating_sub(SET_BITS)).unwrap_or(u8::MAX);
            sets.entry(set).or_default().insert(Network { address, prefix }, action(value)?);
            Ok(())
        };
        for key in self.rules_v4.keys() {
            let key = key.map_err(unread(name::RULES_V4))?;
            let (prefix, data) = (key.prefix_len(), key.data());
            let value = self.rules_v4.get(&key, 0).map_err(unread(name::RULES_V4))?;
            add(data.set, prefix, abi::ip_addr(abi::mapped(data.address)), value)?;
        }
        for key in self.rules_v6.keys() {
            let key = key.map_err(unread(name::RULES_V6))?;
            let (prefix, data) = (key.prefix_len(), key.data());
            let value = self.rules_v6.get(&key, 0).map_err(unread(name::RULES_V6))?;
            add(data.set, prefix, abi::ip_addr(data.address), value)?;
        }
        Ok(sets)
    }

    /// Entries in use, by index.
    pub(super) fn backends_in_use(&self) -> impl Iterator<Item = (u32, &Backend)> {
        (0..).zip(self.backends.iter()).filter(|(_, backend)| backend.flags.get() & Backend::IN_USE != 0)
    }

    pub(super) fn visit_records(&self, visit: &mut dyn FnMut(&RecordEntry)) -> Result<(), DataplaneError> {
        let now = clock(name::RECORDS)?;
        let idle = &self.config().idle;
        for way in self.records.iter().flat_map(|bucket| &bucket.ways) {
            let (key, record) = (way.key.get(), Record(way.value.get()));
            // Who has a translated connection is known by its flow.
            let counts = key > Record::BUSY && !record.is_translated();
            if counts && record.idle(now) < record.span(idle) {
                visit(&RecordEntry { backend: record.backend() });
            }
        }
        Ok(())
    }

    pub(super) fn visit_flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<(), DataplaneError> {
        let now = clock(name::FLOWS)?;
        for flow in self.flows.iter() {
            if let Some(entry) = self.read_flow(flow, now) {
                visit(&entry);
            }
        }
        Ok(())
    }

    /// A flow, if it is live and stays so while it is read.
    fn read_flow(&self, flow: &Flow, now: Tick) -> Option<FlowEntry> {
        let guard = flow.guard.get();
        if guard & 3 != Flow::LIVE || now.has_reached(flow.expires.get()) {
            return None;
        }
        let flags = flow.flags.get();
        let phase = Phase::of(flow);
        let local = flags & Flow::LOCAL != 0;
        let port = |index: usize| u16::from_be(flow.ports[index].get());
        let left = flow.expires.get().since(now);
        let hop = flow.client_hop.get();
        let source =
            self.sources.get(usize::from(flow.source.get())).map(|s| abi::ip_addr(words(&s.address)));
        let entry = FlowEntry {
            protocol: if flags & Flow::UDP != 0 { Protocol::Udp } else { Protocol::Tcp },
            client: SocketAddr::new(abi::ip_addr(words(&flow.client)), port(0)),
            called_port: port(1),
            source_port: (!local).then(|| port(2)),
            source: source.filter(|_| !local),
            backend: flow.backend[0].get(),
            generation: flow.backend[1].get(),
            state: match phase {
                Phase::HalfOpen => FlowState::HalfOpen,
                Phase::Established => FlowState::Established,
                Phase::Closing => FlowState::Closing,
                Phase::Closed => FlowState::Closed,
                Phase::Udp => FlowState::Udp,
            },
            cut: flow.client_sent.get() & flow.backend_sent.get() & Flow::RST != 0,
            idle: duration_of(phase.kept(&self.config().idle).saturating_sub(left)),
            from: ClientHop {
                interface: flow.interface.get().into(),
                mac: mac_of_word(hop),
                vlan: (flags & Flow::TAGGED != 0).then(|| u16::from_be(vlan_from_word(hop))),
            },
        };
        (flow.guard.get() == guard).then_some(entry)
    }

    fn read_globals(&self) -> Option<Globals> {
        let config = self.config();
        let flags = config.flags.get();
        let time = duration_of;
        (flags & Config::WRITTEN != 0).then(|| Globals {
            hash_key: [config.hash_key[0].get(), config.hash_key[1].get()],
            idle: Idle {
                half_open: time(config.idle.half_open.get()),
                established: time(config.idle.established.get()),
                closing: time(config.idle.closing.get()),
                closed: time(config.idle.closed.get()),
                udp: time(config.idle.udp.get()),
                port_rest: time(config.port_rest.get()),
            },
            resets_per_second: config.resets_per_second.get(),
            same_interface_tx: flags & Config::SAME_INTERFACE_TX != 0,
        })
    }

    fn read_service(&self, service: &Service) -> Result<ServiceEntry, DataplaneError> {
        let flags = service.flags.get();
        let firewall = service.firewall.get();
        let ring = |word| self.read_ring(RingAt::from_word(word));
        let port = u16::from_be(service.port.get());
        let listen = Listen {
            address: abi::ip_addr(words(&service.address)),
            port: (flags & Service::ALL_PORTS == 0).then_some(port),
            protocol: protocol(service.protocol.get(), name::SERVICES)?,
        };
        Ok(ServiceEntry {
            listen,
            mode: Mode {
                scheduler: match () {
                    () if flags & Service::ROUND_ROBIN != 0 => Scheduler::RoundRobin,
                    () if flags & Service::BY_SOURCE != 0 => Scheduler::Source,
                    () => Scheduler::Maglev,
                },
                direct: flags & Service::DIRECT != 0,
                holds: flags & Service::HOLDS != 0,
            },
            ring: ring(service.ring.get())?,
            old_ring: ring(service.old_ring.get())?,
            firewall: Firewall {
                rule_set: Some((firewall >> 32) as u32).filter(|set| *set != 0),
                deny_others: firewall as u32 & Service::DENY_OTHERS != 0,
            },
        })
    }

    pub(super) fn read_ring(&self, at: RingAt) -> Result<Ring, DataplaneError> {
        if at.slots == 0 {
            return Ok(Ring::empty());
        }
        let RingAt { slots: size, first_page, first_side } = at;
        let pages = (size as usize).div_ceil(PAGE_SLOTS);
        let end = first_page as usize + pages;
        let corrupt = |table, what| DataplaneError::Corrupt { table, what };
        let beyond = || corrupt(name::SERVICES, format!("a ring of {size} slots on page {first_page}"));
        let pages_of_slots = self.pages.get(first_page as usize..end).ok_or_else(beyond)?;
        if first_side.is_some_and(|first| first as usize + pages > self.sides.len()) {
            return Err(corrupt(name::SERVICES, format!("side pages {first_side:?}")));
        }
        let slots = pages_of_slots.iter().flat_map(|page| page.slots.iter().map(|slot| Slot(slot.get())));
        let slots: Arc<[Slot]> = slots.take(size as usize).collect();
        let leads =
            |slot: &&Slot| slot.backend() == NO_BACKEND || (slot.backend() as usize) < self.backends.len();
        match slots.iter().find(|slot| !leads(slot)) {
            Some(slot) => Err(corrupt(name::PAGES, format!("backend {}", slot.backend()))),
            None => Ok(Ring { first_page, first_side, slots }),
        }
    }
}

fn read_vip(vip: Vip) -> VipEntry {
    VipEntry {
        any_tcp: vip.any_tcp.checked_sub(1),
        any_udp: vip.any_udp.checked_sub(1),
        shared: vip.flags & Vip::SHARED != 0,
    }
}

fn read_backend(backend: &Backend) -> BackendEntry {
    let flags = backend.flags.get();
    let sources = backend.sources.get();
    let port = u16::from_be(backend.port.get());
    BackendEntry {
        service: backend.service.get(),
        address: (flags & Backend::LOCAL == 0).then(|| abi::ip_addr(words(&backend.address))),
        port: (port != 0).then_some(port),
        generation: backend.generation.get(),
        next_hop: (flags & Backend::REACHABLE != 0).then(|| NextHop {
            interface: backend.interface.get(),
            own_mac: mac_of_word(backend.own_mac.get()),
            mac: mac_of_word(backend.next_hop.get()),
        }),
        sources: SourceRun { first: (sources >> 32) as u32, count: sources as u32 },
        flows: if flags & Backend::CUT != 0 {
            FlowsOf::Cut
        } else if flags & Backend::FORGET != 0 {
            FlowsOf::Forget
        } else {
            FlowsOf::Keep
        },
        dead: flags & Backend::DEAD != 0,
    }
}

fn listen(called: Called) -> Result<Listen, DataplaneError> {
    let address = abi::ip_addr(called.address);
    let protocol = protocol(called.protocol, name::LISTENERS)?;
    Ok(Listen { address, port: Some(u16::from_be(called.port)), protocol })
}

fn protocol(number: u8, table: &'static str) -> Result<Protocol, DataplaneError> {
    match number {
        abi::TCP => Ok(Protocol::Tcp),
        abi::UDP => Ok(Protocol::Udp),
        other => Err(DataplaneError::Corrupt { table, what: format!("protocol {other}") }),
    }
}

/// The time as the program sees it.
pub(super) fn clock(table: &'static str) -> Result<Tick, DataplaneError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_err(|error| DataplaneError::System {
        table,
        action: "read",
        source: error.into(),
    })?;
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec()).unwrap_or(0);
    Ok(Tick::from_ns(seconds * 1_000_000_000 + nanoseconds))
}
