//! From a packet to its service, and from a service to a backend for a new connection.

use super::{family::Family, flow::Place, hash, listener, parse::Packet};
use crate::{
    abi::{Backend, Called, Config, NO_BACKEND, PAGE_SLOTS, RingAt, Service, Slot, TCP},
    tables::Tables,
    verdict::{DropReason, PassReason, Verdict},
};

/// The service that the packet is for: the one on its port, else the one on all ports of the address.
#[inline(always)]
pub(crate) fn service<'t, V: Family, T: Tables>(
    packet: &Packet<V>,
    (tables, config): (&'t T, &Config),
) -> Result<(u32, &'t Service), Verdict> {
    let called = Called {
        address: V::widen(packet.destination),
        port: packet.destination_port(),
        protocol: packet.protocol(),
    };
    let index = match listener::find(tables, called, config.listener_mask.get()) {
        Some(index) => index,
        None => on_all_ports(packet, tables)?,
    };
    let service = tables.service(index).ok_or(DropReason::Tables)?;
    Ok((index, service))
}

/// A function of its own also in BPF: mostly for packets that are not ours.
#[inline(never)]
fn on_all_ports<V: Family, T: Tables>(packet: &Packet<V>, tables: &T) -> Result<u32, Verdict> {
    let vip = V::vip(tables, packet.destination).ok_or(PassReason::NotVip)?;
    let any = if packet.protocol() == TCP { vip.any_tcp } else { vip.any_udp };
    any.checked_sub(1).ok_or(PassReason::NoService.into())
}

/// The backend for a new connection; `None` if there is none.
///
/// A ring of a round-robin service holds its backends in the order of their turns.
#[inline(always)]
pub(crate) fn backend<'t, V: Family, T: Tables>(
    packet: &Packet<V>,
    (index, service): (u32, &Service),
    place: Place,
    (tables, config): (&'t T, &Config),
) -> Result<Option<(u32, &'t Backend)>, DropReason> {
    let ring = RingAt::from_word(service.ring.get());
    if ring.slots == 0 {
        return Ok(None);
    }
    let flags = service.flags.get();
    let number = if flags & Service::ROUND_ROBIN != 0 {
        (tables.take_turn(index).ok_or(DropReason::Tables)? % u64::from(ring.slots)) as u32
    } else if flags & Service::BY_SOURCE != 0 {
        ring.slot((hash::of_source(packet, &config.multipliers) >> 32) as u32)
    } else {
        ring.slot(place.tag)
    };
    let backend = slot(ring, number, tables)?.backend();
    entry(index, backend, tables)
}

/// The slot of a ring with this number.
#[inline(always)]
pub(crate) fn slot<T: Tables>(ring: RingAt, number: u32, tables: &T) -> Result<Slot, DropReason> {
    let page = ring.first_page + number / PAGE_SLOTS as u32;
    tables.slot(page, number as usize % PAGE_SLOTS).ok_or(DropReason::Tables)
}

/// The entry of a backend that a slot of the service `index` leads to; `None` if it leads nowhere.
#[inline(always)]
pub(crate) fn entry<T: Tables>(
    index: u32,
    backend: u32,
    tables: &T,
) -> Result<Option<(u32, &Backend)>, DropReason> {
    if backend == NO_BACKEND {
        return Ok(None);
    }
    let entry = tables.backend(backend).ok_or(DropReason::Tables)?;
    if entry.service.get() != index || entry.flags.get() & Backend::IN_USE == 0 {
        return Err(DropReason::Tables);
    }
    Ok(Some((backend, entry)))
}
