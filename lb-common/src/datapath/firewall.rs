//! Who may come in.

use super::{family::Family, parse::Packet};
use crate::{
    abi::{Action, Service},
    tables::Tables,
    verdict::DropReason,
};

/// Lets the packet by, or drops it: the longest rule that matches its source decides, else whether
/// others are denied.
#[inline(always)]
pub(crate) fn admit<V: Family, T: Tables>(
    packet: &Packet<V>,
    service: &Service,
    tables: &T,
) -> Result<(), DropReason> {
    let firewall = service.firewall.get();
    let set = (firewall >> 32) as u32;
    if set == 0 {
        return Ok(());
    }
    let otherwise = if firewall as u32 & Service::DENY_OTHERS != 0 { Action::Deny } else { Action::Allow };
    let action = rule(packet, tables, set).unwrap_or(otherwise as u32);
    if action == Action::Allow as u32 { Ok(()) } else { Err(DropReason::Denied) }
}

/// The longest rule of a set that matches the packet's source.
///
/// A function of its own also in BPF: its key is long, and the stack is everybody's.
#[inline(never)]
fn rule<V: Family, T: Tables>(packet: &Packet<V>, tables: &T, set: u32) -> Option<u32> {
    V::rule(tables, set, packet.source)
}
