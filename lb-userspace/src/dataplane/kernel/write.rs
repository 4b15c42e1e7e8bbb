//! Operations as stores and system calls.

use std::net::IpAddr;

use aya::maps::lpm_trie::Key;
use lb_common::{
    abi::{self, Action, RuleV4, RuleV6, Vip, name},
    shared::Shared,
    wire::eth::mac_to_word,
};

use super::{KernelDataplane, mapped::wait_for_programs, unwritten};
use crate::{
    dataplane::{
        Dataplane as _, DataplaneError, Op, RuleSet, SourceEntry, VipEntry,
        cells::{self, entry, put, store_words},
        fault,
    },
    model::Network,
};

impl KernelDataplane {
    pub(super) fn write(&mut self, op: &Op) -> Result<(), DataplaneError> {
        fault::point();
        if cells::write(self, op, self.now()?)? {
            return Ok(());
        }
        match *op {
            Op::SetInterface { index, mac } => {
                entry(&self.interfaces, index, "interface")?.set(mac_to_word(mac));
            }
            Op::RemoveInterface { index } => entry(&self.interfaces, index, "interface")?.set(0),
            Op::WriteSource { index, source } => self.write_source(index, source)?,
            Op::RemoveSource { index } => self.remove_source(index)?,
            Op::WriteRules { set, ref rules } => self.write_rules(set, rules)?,
            Op::RemoveRules { set } => self.remove_rules(set)?,
            Op::SetVip { address, vip } => self.set_vip(address, vip)?,
            Op::RemoveVip { address } => match abi_address(address) {
                Either::V4(address) => absent_is_fine(self.vips_v4.remove(&address), name::VIPS_V4)?,
                Either::V6(address) => absent_is_fine(self.vips_v6.remove(&address), name::VIPS_V6)?,
            },
            Op::Settle => wait_for_programs().map_err(|source| DataplaneError::System {
                table: "(all)",
                action: "settled",
                source,
            })?,
            // Written above.
            Op::SetGlobals(_)
            | Op::CountAnew
            | Op::WriteBackend { .. }
            | Op::RemoveBackend { .. }
            | Op::WritePages { .. }
            | Op::WriteSides { .. }
            | Op::SetStandings { .. }
            | Op::EndMoving { .. }
            | Op::WriteService { .. }
            | Op::SwitchMode { .. }
            | Op::SwitchRing { .. }
            | Op::SwitchOldRing { .. }
            | Op::SwitchFirewall { .. }
            | Op::RemoveService { .. }
            | Op::SetKey { .. }
            | Op::RemoveKey { .. } => {}
        }
        Ok(())
    }

    fn write_source(&mut self, index: u32, source: SourceEntry) -> Result<(), DataplaneError> {
        let cell = entry(&self.sources, index, "source")?;
        let old = (cell.port_high.get() != 0).then(|| abi::ip_addr(words(&cell.address)));
        put(&cell.port_low, source.ports.low);
        put(&cell.port_high, source.ports.high);
        store_words(&cell.address, abi::address(source.address));
        // The filter first: it must not hide a source that packets are sent from.
        self.filter_sources();
        fault::point();
        match abi_address(source.address) {
            Either::V4(address) => {
                self.source_keys_v4.insert(address, index, 0).map_err(unwritten(name::SOURCE_KEYS_V4))?;
            }
            Either::V6(address) => {
                self.source_keys_v6.insert(address, index, 0).map_err(unwritten(name::SOURCE_KEYS_V6))?;
            }
        }
        match old {
            Some(old) if old != source.address => {
                fault::point();
                self.forget_source(index, old)
            }
            _ => Ok(()),
        }
    }

    fn remove_source(&mut self, index: u32) -> Result<(), DataplaneError> {
        let cell = entry(&self.sources, index, "source")?;
        let old = abi::ip_addr(words(&cell.address));
        put(&cell.port_high, 0);
        put(&cell.port_low, 0);
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
        put(&config.sources_v4, v4);
        put(&config.sources_v6, v6);
        put(&config.port_low, low);
        put(&config.port_high, high);
    }

    fn write_rules(&mut self, set: u32, rules: &RuleSet) -> Result<(), DataplaneError> {
        for (network, action) in rules {
            fault::point();
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
            fault::point();
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
