//! What operations write to arrays, and what slots remember there: once, for whoever holds the arrays.
//!
//! Two do: [`super::kernel`], whose arrays are the program's own, and [`MemTables`], on which the same
//! decision runs in tests and simulation. What else leads to indices (addresses, rules) is kept in
//! maps, which each has of its own kind.

use std::sync::Arc;

use lb_common::{
    abi::{
        self, Backend, Called, Config, Listeners, NO_BACKEND, PAGE_SLOTS, Page, Records, Service, Side,
        SidePage, Slot, Standing, Tick,
    },
    datapath::{hash, listener},
    shared::Shared,
    sim::MemTables,
    wire::eth::mac_to_word,
};

use super::{
    BackendEntry, DataplaneError, Firewall, FlowsOf, Globals, Mode, Op, Ring, SideEntry, fault, ticks_in,
};
use crate::model::{Idle, Listen, Scheduler};

/// The arrays that operations write to.
pub trait Cells {
    /// What holds for all packets.
    fn config(&self) -> &Config;
    /// By line.
    fn listeners(&self) -> &[Listeners];
    /// By index.
    fn services(&self) -> &[Service];
    /// By index.
    fn pages(&self) -> &[Page];
    /// By index.
    fn sides(&self) -> &[SidePage];
    /// By index.
    fn backends(&self) -> &[Backend];
    /// By line.
    fn records(&self) -> &[Records];
}

impl Cells for MemTables {
    fn config(&self) -> &Config {
        &self.config
    }
    fn listeners(&self) -> &[Listeners] {
        &self.listeners
    }
    fn services(&self) -> &[Service] {
        &self.services
    }
    fn pages(&self) -> &[Page] {
        &self.pages
    }
    fn sides(&self) -> &[SidePage] {
        &self.sides
    }
    fn backends(&self) -> &[Backend] {
        &self.backends
    }
    fn records(&self) -> &[Records] {
        &self.records
    }
}

/// Applies an operation if it is one on these arrays; `false`: it is not, and nothing was done.
///
/// # Errors
/// When the operation names what is beyond an array's last entry.
pub fn write(cells: &impl Cells, op: &Op, now: Tick) -> Result<bool, DataplaneError> {
    let service = |index| entry(cells.services(), index, "service");
    let backend_at = |index| entry(cells.backends(), index, "backend");
    match *op {
        Op::SetGlobals(ref globals) => set_globals(cells, globals, now),
        Op::CountAnew => cells.config().idle.count_anew(cells.records().iter(), now),
        Op::WriteBackend { index, ref backend } => write_backend(backend_at(index)?, backend),
        Op::RemoveBackend { index } => backend_at(index)?.flags.set(0),
        Op::WritePages { first_page, ref slots } => write_pages(cells.pages(), first_page, slots)?,
        Op::WriteSides { first_side, ref sides } => {
            for (slot, entry) in sides.iter() {
                write_side(side(cells, first_side, *slot)?, entry);
            }
        }
        Op::SetStandings { first_side, ref standings } => {
            for (slot, standing) in standings.iter() {
                put(&side(cells, first_side, *slot)?.standing, standing.to_word());
            }
        }
        Op::EndMoving { first_side, ref standings, quiet } => {
            for (slot, standing) in standings.iter() {
                let side = side(cells, first_side, *slot)?;
                // A connection may have been lost since the plan looked: its next packet must find the
                // slot moving still.
                if standing.since.since(side.lost_at.get()) >= quiet {
                    put(&side.standing, standing.to_word());
                }
            }
        }
        Op::WriteService { index, listen, mode } => write_service(service(index)?, listen, mode),
        Op::SwitchMode { service: index, mode } => {
            let flags = &service(index)?.flags;
            flags.set(with_mode(flags.get(), mode));
        }
        Op::SwitchRing { service: index, ring } => service(index)?.ring.set(ring.to_word()),
        Op::SwitchOldRing { service: index, ring } => service(index)?.old_ring.set(ring.to_word()),
        Op::SwitchFirewall { service: index, firewall: Firewall { rule_set, deny_others } } => {
            let word = u64::from(rule_set.unwrap_or(0)) << 32 | u64::from(deny_others);
            service(index)?.firewall.set(word);
        }
        Op::RemoveService { index } => service(index)?.flags.set(0),
        Op::SetKey { listen, service } => {
            if !listener::set(cells.listeners(), called(listen), service) {
                let limit =
                    "too many listeners have come together in the table; a larger `limits.services` parts";
                return Err(DataplaneError::Misfit(format!("no room for {listen}: {limit} them")));
            }
        }
        Op::RemoveKey { listen } => listener::remove(cells.listeners(), called(listen)),
        _ => return Ok(false),
    }
    Ok(true)
}

/// What the slots of a ring remember now.
///
/// # Errors
/// When the ring has side pages beyond the last.
pub fn read_sides(cells: &impl Cells, ring: &Ring) -> Result<Arc<[SideEntry]>, DataplaneError> {
    let first = ring.first_side.unwrap_or_default();
    let read = |slot| {
        let side = side(cells, first, slot)?;
        Ok(SideEntry {
            standing: Standing::from_word(side.standing.get()),
            unsettled_since: side.unsettled_since.get(),
            last_elsewhere: side.last_elsewhere.get(),
            lost_at: side.lost_at.get(),
        })
    };
    (0..ring.at().slots).map(read).collect()
}

/// What a slot of the ring with these side pages remembers.
fn side(cells: &impl Cells, first_side: u32, slot: u32) -> Result<&Side, DataplaneError> {
    let page = entry(cells.sides(), first_side + slot / PAGE_SLOTS as u32, "side page")?;
    Ok(&page.sides[slot as usize % PAGE_SLOTS])
}

fn set_globals(cells: &impl Cells, globals: &Globals, now: Tick) {
    let config = cells.config();
    let Globals { hash_key, idle, resets_per_second, same_interface_tx } = globals;
    hash::set_key(config, *hash_key);
    write_time_outs(&config.idle, idle);
    fault::point();
    if config.flags.get() & Config::WRITTEN == 0 {
        // There are no records yet.
        config.idle.count_anew([].iter(), now);
    } else {
        config.idle.set_steps();
    }
    fault::point();
    put(&config.port_rest, ticks_in(idle.port_rest));
    put(&config.resets_per_second, *resets_per_second);
    put(&config.flags, with(config.flags.get(), Config::SAME_INTERFACE_TX, *same_interface_tx));
    put(&config.flags, config.flags.get() | Config::WRITTEN);
}

fn write_time_outs(cell: &abi::Idle, idle: &Idle) {
    put(&cell.half_open, ticks_in(idle.half_open));
    put(&cell.established, ticks_in(idle.established));
    put(&cell.closing, ticks_in(idle.closing));
    put(&cell.closed, ticks_in(idle.closed));
    put(&cell.udp, ticks_in(idle.udp));
}

/// The length of the steps that these time-outs need ([`abi::Idle::needed_steps`]).
pub(super) fn steps(idle: &Idle) -> u32 {
    let cell = abi::Idle::default();
    write_time_outs(&cell, idle);
    cell.needed_steps()
}

fn write_pages(pages: &[Page], first_page: u32, slots: &[Slot]) -> Result<(), DataplaneError> {
    for (page, slots) in (first_page..).zip(slots.chunks(PAGE_SLOTS)) {
        let page = entry(pages, page, "page")?;
        fault::point();
        let filled = slots.iter().copied().chain(std::iter::repeat(Slot::settled(NO_BACKEND)));
        for (cell, slot) in page.slots.iter().zip(filled) {
            cell.set(slot.0);
        }
    }
    Ok(())
}

/// Writes an entry. What makes it valid comes last if it was not in use, and what makes its flows void
/// first if it is another backend's now.
fn write_backend(cell: &Backend, backend: &BackendEntry) {
    if cell.generation.get() != backend.generation {
        put(&cell.flags, 0);
        put(&cell.generation, backend.generation);
    }
    let mut flags = Backend::IN_USE;
    flags = with16(flags, Backend::LOCAL, backend.address.is_none());
    flags = with16(flags, Backend::REACHABLE, backend.next_hop.is_some());
    flags = with16(flags, Backend::CUT, backend.flows == FlowsOf::Cut);
    flags = with16(flags, Backend::FORGET, backend.flows == FlowsOf::Forget);
    flags = with16(flags, Backend::DEAD, backend.dead);
    store_words(&cell.address, backend.address.map_or([0; 2], abi::address));
    put(&cell.port, backend.port.unwrap_or(0).to_be());
    put(&cell.service, backend.service);
    put(&cell.sources, u64::from(backend.sources.first) << 32 | u64::from(backend.sources.count));
    if let Some(hop) = backend.next_hop {
        put(&cell.own_mac, mac_to_word(hop.own_mac));
        put(&cell.next_hop, mac_to_word(hop.mac));
        put(&cell.interface, hop.interface);
    }
    put(&cell.flags, flags);
}

/// Writes what a slot remembers, which no packet asks for yet.
fn write_side(cell: &Side, side: &SideEntry) {
    put(&cell.unsettled_since, side.unsettled_since);
    put(&cell.last_elsewhere, side.last_elsewhere);
    put(&cell.lost_at, side.lost_at);
    put(&cell.standing, side.standing.to_word());
}

fn write_service(cell: &Service, listen: Listen, mode: Mode) {
    put(&cell.flags, 0);
    put(&cell.ring, 0);
    put(&cell.old_ring, 0);
    put(&cell.firewall, 0);
    store_words(&cell.address, abi::address(listen.address));
    put(&cell.port, listen.port.unwrap_or(0).to_be());
    put(&cell.protocol, listen.protocol.number());
    let flags = with_mode(Service::IN_USE, mode);
    put(&cell.flags, with(flags, Service::ALL_PORTS, listen.port.is_none()));
}

/// A listener as packets ask for it.
fn called(listen: Listen) -> Called {
    Called {
        address: abi::address(listen.address),
        port: listen.port.unwrap_or(0).to_be(),
        protocol: listen.protocol.number(),
    }
}

fn with_mode(flags: u32, mode: Mode) -> u32 {
    let Mode { scheduler, direct, holds } = mode;
    let said = [
        (Service::ROUND_ROBIN, scheduler == Scheduler::RoundRobin),
        (Service::BY_SOURCE, scheduler == Scheduler::Source),
        (Service::DIRECT, direct),
        (Service::HOLDS, holds),
    ];
    said.into_iter().fold(flags, |flags, (flag, set)| with(flags, flag, set))
}

pub(super) fn store_words(cells: &[Shared<u64>; 2], address: abi::Address) {
    put(&cells[0], address[0]);
    put(&cells[1], address[1]);
}

/// Stores a word that packets read.
pub(super) fn put<T: Copy>(cell: &Shared<T>, value: T) {
    fault::point();
    cell.set(value);
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

#[cfg(test)]
mod tests {
    use lb_common::abi::Tick;

    use super::*;

    #[test]
    fn a_slot_that_has_lost_a_connection_since_the_plan_goes_on_moving() {
        const QUIET: u32 = 1000;
        const PLANNED: Tick = Tick(10_000);
        let mut tables = MemTables::new(0, 0, 0, 1);
        tables.sides.push(SidePage { sides: std::array::from_fn(|_| Side::default()) });
        let fades = Standing { before: NO_BACKEND, fading: true, since: PLANNED };
        let moves = Standing { before: 1, fading: false, since: Tick(1) };
        let lost = [Tick(1), Tick(9000), Tick(9001), PLANNED, PLANNED.after(3)];
        for (side, lost_at) in tables.sides[0].sides.iter().zip(lost) {
            write_side(side, &SideEntry { lost_at, ..SideEntry::moving(1, Tick(1)) });
        }
        let standings = (0..5).map(|slot| (slot, fades)).collect();
        write(&tables, &Op::EndMoving { first_side: 0, standings, quiet: QUIET }, Tick(0)).unwrap();
        let now = tables.sides[0].sides.iter().map(|side| Standing::from_word(side.standing.get()));
        assert!(now.take(5).eq([fades, fades, moves, moves, moves]));
    }
}
