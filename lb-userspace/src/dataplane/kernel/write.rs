//! Operations as stores and system calls.

use std::net::IpAddr;

use aya::maps::lpm_trie::Key;
use lb_common::{
    abi::{
        self, Action, Backend, Config, NO_BACKEND, PAGE_SLOTS, RuleV4, RuleV6, Service, ServiceKeyV4,
        ServiceKeyV6, Side, Slot, Vip, name,
    },
    shared::Shared,
    wire::eth::{mac_of_word, mac_to_word},
};

use super::{KernelDataplane, mapped::wait_for_programs, unwritten};
use crate::{
    dataplane::{
        BackendEntry, DataplaneError, Firewall, FlowsOf, Globals, Mode, Op, RuleSet, SideEntry, SourceEntry,
        VipEntry, ticks_in,
    },
    model::{Listen, Network},
};

/// A key of either family.
pub(super) enum EitherKey {
    V4(ServiceKeyV4),
    V6(ServiceKeyV6),
}

impl KernelDataplane {
    pub(super) fn write(&mut self, op: &Op) -> Result<(), DataplaneError> {
        match *op {
            Op::SetGlobals(ref globals) => self.set_globals(globals),
            Op::SetInterface { index, mac } => {
                entry(&self.interfaces, index, "interface")?.set(mac_to_word(mac));
            }
            Op::RemoveInterface { index } => entry(&self.interfaces, index, "interface")?.set(0),
            Op::WriteSource { index, source } => self.write_source(index, source)?,
            Op::RemoveSource { index } => self.remove_source(index)?,
            Op::WriteBackend { index, ref backend } => {
                write_backend(entry(&self.backends, index, "backend")?, backend);
            }
            Op::RemoveBackend { index } => entry(&self.backends, index, "backend")?.flags.set(0),
            Op::WritePages { first_page, ref slots } => self.write_pages(first_page, slots)?,
            Op::WriteRules { set, ref rules } => self.write_rules(set, rules)?,
            Op::RemoveRules { set } => self.remove_rules(set)?,
            Op::WriteSides { first_side, ref sides } => {
                for (slot, entry) in sides.iter() {
                    write_side(self.side(first_side, *slot)?, entry);
                }
            }
            Op::SetStandings { first_side, ref standings } => {
                for (slot, standing) in standings.iter() {
                    self.side(first_side, *slot)?.standing.set(standing.to_word());
                }
            }
            Op::WriteService { index, listen, mode } => {
                write_service(entry(&self.services, index, "service")?, listen, mode);
            }
            Op::SwitchMode { service, mode } => {
                let flags = &entry(&self.services, service, "service")?.flags;
                flags.set(with_mode(flags.get(), mode));
            }
            Op::SwitchRing { service, ring } => {
                entry(&self.services, service, "service")?.ring.set(ring.to_word());
            }
            Op::SwitchOldRing { service, ring } => {
                entry(&self.services, service, "service")?.old_ring.set(ring.to_word());
            }
            Op::SwitchFirewall { service, firewall: Firewall { rule_set, deny_others } } => {
                let word = u64::from(rule_set.unwrap_or(0)) << 32 | u64::from(deny_others);
                entry(&self.services, service, "service")?.firewall.set(word);
            }
            Op::RemoveService { index } => entry(&self.services, index, "service")?.flags.set(0),
            Op::SetVip { address, vip } => self.set_vip(address, vip)?,
            Op::RemoveVip { address } => match abi_address(address) {
                Either::V4(address) => absent_is_fine(self.vips_v4.remove(&address), name::VIPS_V4)?,
                Either::V6(address) => absent_is_fine(self.vips_v6.remove(&address), name::VIPS_V6)?,
            },
            Op::SetKey { listen, service } => match key(listen) {
                EitherKey::V4(key) => {
                    self.service_keys_v4.insert(key, service, 0).map_err(unwritten(name::SERVICE_KEYS_V4))?;
                }
                EitherKey::V6(key) => {
                    self.service_keys_v6.insert(key, service, 0).map_err(unwritten(name::SERVICE_KEYS_V6))?;
                }
            },
            Op::RemoveKey { listen } => match key(listen) {
                EitherKey::V4(key) => {
                    absent_is_fine(self.service_keys_v4.remove(&key), name::SERVICE_KEYS_V4)?;
                }
                EitherKey::V6(key) => {
                    absent_is_fine(self.service_keys_v6.remove(&key), name::SERVICE_KEYS_V6)?;
                }
            },
            Op::Settle => wait_for_programs().map_err(|source| DataplaneError::System {
                table: "(all)",
                action: "settled",
                source,
            })?,
        }
        Ok(())
    }

    fn set_globals(&self, globals: &Globals) {
        let config = self.config();
        let Globals { hash_key, idle, resets_per_second, same_interface_tx } = globals;
        for (word, key) in config.hash_key.iter().zip(hash_key) {
            word.set(*key);
        }
        config.idle.half_open.set(ticks_in(idle.half_open));
        config.idle.established.set(ticks_in(idle.established));
        config.idle.closing.set(ticks_in(idle.closing));
        config.idle.closed.set(ticks_in(idle.closed));
        config.idle.udp.set(ticks_in(idle.udp));
        config.port_rest.set(ticks_in(idle.port_rest));
        config.resets_per_second.set(*resets_per_second);
        config.flags.set(with(config.flags.get(), Config::SAME_INTERFACE_TX, *same_interface_tx));
        config.flags.set(config.flags.get() | Config::WRITTEN);
    }

    fn write_source(&mut self, index: u32, source: SourceEntry) -> Result<(), DataplaneError> {
        let cell = entry(&self.sources, index, "source")?;
        let old = (cell.port_high.get() != 0).then(|| abi::ip_addr(words(&cell.address)));
        cell.port_low.set(source.ports.low);
        cell.port_high.set(source.ports.high);
        store_words(&cell.address, abi::address(source.address));
        // The filter first: it must not hide a source that packets are sent from.
        self.filter_sources();
        match abi_address(source.address) {
            Either::V4(address) => {
                self.source_keys_v4.insert(address, index, 0).map_err(unwritten(name::SOURCE_KEYS_V4))?;
            }
            Either::V6(address) => {
                self.source_keys_v6.insert(address, index, 0).map_err(unwritten(name::SOURCE_KEYS_V6))?;
            }
        }
        match old {
            Some(old) if old != source.address => self.forget_source(index, old),
            _ => Ok(()),
        }
    }

    fn remove_source(&mut self, index: u32) -> Result<(), DataplaneError> {
        let cell = entry(&self.sources, index, "source")?;
        let old = abi::ip_addr(words(&cell.address));
        cell.port_high.set(0);
        cell.port_low.set(0);
        self.forget_source(index, old)?;
        self.filter_sources();
        Ok(())
    }

    /// Removes the key of an address that led to this entry.
    fn forget_source(&mut self, index: u32, address: IpAddr) -> Result<(), DataplaneError> {
        match abi_address(address) {
            Either::V4(address) => match self.source_keys_v4.get(&address, 0) {
                Ok(found) if found == index => {
                    absent_is_fine(self.source_keys_v4.remove(&address), name::SOURCE_KEYS_V4)
                }
                _ => Ok(()),
            },
            Either::V6(address) => match self.source_keys_v6.get(&address, 0) {
                Ok(found) if found == index => {
                    absent_is_fine(self.source_keys_v6.remove(&address), name::SOURCE_KEYS_V6)
                }
                _ => Ok(()),
            },
        }
    }

    /// Writes what tells most packets that they are no replies: which last bytes and which ports occur.
    fn filter_sources(&self) {
        let (mut v4, mut v6, mut low, mut high) = (0u64, 0u64, u16::MAX, 0u16);
        for source in self.sources.iter().filter(|source| source.port_high.get() != 0) {
            let (bits, last) = match abi::ip_addr(words(&source.address)) {
                IpAddr::V4(address) => (&mut v4, address.octets()[3]),
                IpAddr::V6(address) => (&mut v6, address.octets()[15]),
            };
            *bits |= 1 << (last & 63);
            low = low.min(source.port_low.get());
            high = high.max(source.port_high.get());
        }
        let config = self.config();
        config.sources_v4.set(v4);
        config.sources_v6.set(v6);
        config.port_low.set(low);
        config.port_high.set(high);
    }

    /// What a slot of the ring with these side pages remembers.
    pub(super) fn side(&self, first_side: u32, slot: u32) -> Result<&Side, DataplaneError> {
        let page = entry(&self.sides, first_side + slot / PAGE_SLOTS as u32, "side page")?;
        Ok(&page.sides[slot as usize % PAGE_SLOTS])
    }

    fn write_pages(&self, first_page: u32, slots: &[Slot]) -> Result<(), DataplaneError> {
        for (page, slots) in (first_page..).zip(slots.chunks(PAGE_SLOTS)) {
            let page = entry(&self.pages, page, "page")?;
            let filled = slots.iter().copied().chain(std::iter::repeat(Slot::settled(NO_BACKEND)));
            for (cell, slot) in page.slots.iter().zip(filled) {
                cell.set(slot.0);
            }
        }
        Ok(())
    }

    fn write_rules(&mut self, set: u32, rules: &RuleSet) -> Result<(), DataplaneError> {
        for (network, action) in rules {
            match network.address {
                IpAddr::V4(_) => self
                    .rules_v4
                    .insert(&rule_v4(set, *network), *action as u32, 0)
                    .map_err(unwritten(name::RULES_V4)),
                IpAddr::V6(_) => self
                    .rules_v6
                    .insert(&rule_v6(set, *network), *action as u32, 0)
                    .map_err(unwritten(name::RULES_V6)),
            }?;
        }
        Ok(())
    }

    fn remove_rules(&mut self, set: u32) -> Result<(), DataplaneError> {
        for network in self.read_rules()?.remove(&set).unwrap_or_default().keys() {
            match network.address {
                IpAddr::V4(_) => {
                    self.rules_v4.remove(&rule_v4(set, *network)).map_err(unwritten(name::RULES_V4))
                }
                IpAddr::V6(_) => {
                    self.rules_v6.remove(&rule_v6(set, *network)).map_err(unwritten(name::RULES_V6))
                }
            }?;
        }
        Ok(())
    }

    fn set_vip(&mut self, address: IpAddr, vip: VipEntry) -> Result<(), DataplaneError> {
        let plus_one = |service: Option<u32>| service.map_or(0, |index| index + 1);
        let vip = Vip {
            any_tcp: plus_one(vip.any_tcp),
            any_udp: plus_one(vip.any_udp),
            flags: if vip.shared { Vip::SHARED } else { 0 },
        };
        match abi_address(address) {
            Either::V4(address) => self.vips_v4.insert(address, vip, 0).map_err(unwritten(name::VIPS_V4)),
            Either::V6(address) => self.vips_v6.insert(address, vip, 0).map_err(unwritten(name::VIPS_V6)),
        }
    }
}

/// Writes an entry. What makes it valid comes last if it was not in use, and what makes its flows void
/// first if it is another backend's now.
fn write_backend(cell: &Backend, backend: &BackendEntry) {
    if cell.generation.get() != backend.generation {
        cell.flags.set(0);
        cell.generation.set(backend.generation);
    }
    let mut flags = Backend::IN_USE;
    flags = with16(flags, Backend::LOCAL, backend.address.is_none());
    flags = with16(flags, Backend::REACHABLE, backend.next_hop.is_some());
    flags = with16(flags, Backend::CUT, backend.flows == FlowsOf::Cut);
    flags = with16(flags, Backend::FORGET, backend.flows == FlowsOf::Forget);
    flags = with16(flags, Backend::DEAD, backend.dead);
    store_words(&cell.address, backend.address.map_or([0; 2], abi::address));
    cell.port.set(backend.port.unwrap_or(0).to_be());
    cell.service.set(backend.service);
    cell.sources.set(u64::from(backend.sources.first) << 32 | u64::from(backend.sources.count));
    if let Some(hop) = backend.next_hop {
        cell.own_mac.set(mac_to_word(hop.own_mac));
        cell.next_hop.set(mac_to_word(hop.mac));
        cell.interface.set(hop.interface);
    }
    cell.flags.set(flags);
}

/// Writes what a slot remembers, which no packet asks for yet.
fn write_side(cell: &Side, side: &SideEntry) {
    cell.unsettled_since.set(side.unsettled_since);
    cell.last_elsewhere.set(side.last_elsewhere);
    cell.lost_at.set(side.lost_at);
    cell.standing.set(side.standing.to_word());
}

fn write_service(cell: &Service, listen: Listen, mode: Mode) {
    cell.flags.set(0);
    cell.ring.set(0);
    cell.old_ring.set(0);
    cell.firewall.set(0);
    store_words(&cell.address, abi::address(listen.address));
    cell.port.set(listen.port.unwrap_or(0).to_be());
    cell.protocol.set(listen.protocol.number());
    let flags = with_mode(Service::IN_USE, mode);
    cell.flags.set(with(flags, Service::ALL_PORTS, listen.port.is_none()));
}

fn with_mode(flags: u32, mode: Mode) -> u32 {
    with(with(flags, Service::ROUND_ROBIN, mode.round_robin), Service::DIRECT, mode.direct)
}

/// A listener as a key.
pub(super) fn key(listen: Listen) -> EitherKey {
    let port = listen.port.unwrap_or(0).to_be();
    let protocol = listen.protocol.number();
    match abi_address(listen.address) {
        Either::V4(address) => EitherKey::V4(ServiceKeyV4 { address, port, protocol, reserved: 0 }),
        Either::V6(address) => EitherKey::V6(ServiceKeyV6 { address, port, protocol, reserved: 0, spare: 0 }),
    }
}

enum Either {
    V4(abi::AddressV4),
    V6(abi::Address),
}

fn abi_address(address: IpAddr) -> Either {
    match address {
        IpAddr::V4(address) => Either::V4(abi::address_v4(address.octets())),
        IpAddr::V6(address) => Either::V6(abi::address_v6(address.octets())),
    }
}

/// Bits of a trie's prefix that are the set's number.
pub(super) const SET_BITS: u32 = u32::BITS;

fn rule_v4(set: u32, network: Network) -> Key<RuleV4> {
    let address = match network.address {
        IpAddr::V4(address) => abi::address_v4(address.octets()),
        IpAddr::V6(_) => 0,
    };
    Key::new(SET_BITS + u32::from(network.prefix), RuleV4 { set, address })
}

fn rule_v6(set: u32, network: Network) -> Key<RuleV6> {
    let address = match network.address {
        IpAddr::V6(address) => abi::address_v6(address.octets()),
        IpAddr::V4(_) => [0; 2],
    };
    Key::new(SET_BITS + u32::from(network.prefix), RuleV6 { set, address })
}

/// Both words of an address.
pub(super) fn words(cells: &[Shared<u64>; 2]) -> abi::Address {
    [cells[0].get(), cells[1].get()]
}

fn store_words(cells: &[Shared<u64>; 2], address: abi::Address) {
    cells[0].set(address[0]);
    cells[1].set(address[1]);
}

/// A MAC address from its word.
pub(super) fn mac(word: u64) -> [u8; 6] {
    let [a, b, c] = mac_of_word(word).map(u16::to_ne_bytes);
    [a[0], a[1], b[0], b[1], c[0], c[1]]
}

fn with(flags: u32, flag: u32, set: bool) -> u32 {
    if set { flags | flag } else { flags & !flag }
}

fn with16(flags: u16, flag: u16, set: bool) -> u16 {
    if set { flags | flag } else { flags & !flag }
}

pub(super) fn entry<'a, T>(table: &'a [T], index: u32, what: &str) -> Result<&'a T, DataplaneError> {
    table
        .get(index as usize)
        .ok_or_else(|| DataplaneError::Misfit(format!("{what} {index} is beyond the last, {}", table.len())))
}

/// Removing what is not there has succeeded.
fn absent_is_fine(
    removed: Result<(), aya::maps::MapError>,
    table: &'static str,
) -> Result<(), DataplaneError> {
    match removed.map_err(unwritten(table)) {
        Err(DataplaneError::System { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

/// The action that a trie's value stands for.
pub(super) fn action(value: u32) -> Result<Action, DataplaneError> {
    match value {
        v if v == Action::Allow as u32 => Ok(Action::Allow),
        v if v == Action::Deny as u32 => Ok(Action::Deny),
        v => Err(DataplaneError::Corrupt { table: name::RULES_V4, what: format!("action {v}") }),
    }
}
