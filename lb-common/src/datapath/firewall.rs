//! Who may come in.

use super::{family::Family, parse::Packet};
use crate::{
    abi::{Action, Service},
    tables::Tables,
    verdict::{DropReason, Verdict},
};

/// Lets the packet by, or drops it: the longest rule that matches its source decides, else whether
/// others are denied.
#[inline(always)]
pub(crate) fn admit<V: Family, T: Tables>(
    packet: &Packet<V>,
    service: &Service,
    tables: &T,
) -> Result<(), Verdict> {
    let firewall = service.firewall.get();
    let set = (firewall >> 32) as u32;
    if set == 0 {
        return Ok(());
    }
    let denied = match V::rule(tables, set, packet.source) {
        Some(action) => action != Action::Allow as u32,
        None => firewall as u32 & Service::DENY_OTHERS != 0,
    };
    if denied { Err(DropReason::Denied.into()) } else { Ok(()) }
}
