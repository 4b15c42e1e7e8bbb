//! Which service a packet calls: an exact match of address, port and protocol.
//!
//! The table is an array of lines. A listener stands in the line that its hash says, or where that is full in the
//! one beside it; there is always room, but for one chance in thirty thousand where all services of the
//! limit are there ([`lines_for`]). One look at memory where the kernel's hash map takes a call and three.
//!
//! The daemon alone writes. It may give a cell to another listener while a packet is looking at it: the cell's
//! guard, with its count of uses, is therefore read before and after.

use crate::{
    abi::{Called, Listener, Listeners},
    tables::Tables,
};

/// How many lines a table for so many services has. With a sixteenth of all cells taken, two neighbouring lines
/// (eight cells, half a listener on average) overflow once in 3·10⁸ times.
pub const fn lines_for(services: u32) -> u32 {
    services.saturating_mul(4).next_power_of_two()
}

/// The line that a listener belongs to, before the mask.
#[inline(always)]
const fn line(called: Called) -> u32 {
    // Multipliers of Steele and Vigna, "Computationally easy, spectrally good multipliers" (2021). Operators choose
    // what is hashed here, so nobody need be kept from aiming.
    const ADDRESS: u64 = 0xd134_2543_de82_ef95;
    const PORT: u64 = 0xaef1_7502_108e_f2d9;
    let [high, low] = called.address;
    let address = high.wrapping_mul(ADDRESS) ^ low;
    // The last bytes of addresses are the uppermost of a word, and a product carries upwards only.
    let folded = address ^ address >> 32;
    let port = (called.port_and_protocol() as u64).wrapping_mul(PORT);
    (folded.wrapping_add(port).wrapping_mul(ADDRESS) >> 40) as u32
}

/// Index of the service that listens there.
#[inline(always)]
pub(crate) fn find<T: Tables>(tables: &T, called: Called, mask: u32) -> Option<u32> {
    let home = line(called) & mask;
    for number in [home, home ^ 1] {
        for cell in &tables.listeners(number)?.cells {
            let guard = cell.guard.get();
            if is_of(cell, guard, called) {
                let service = cell.service.get();
                if cell.guard.get() == guard {
                    return Some(service);
                }
            }
        }
    }
    None
}

/// Whether a cell with this guard is the listener's.
#[inline(always)]
fn is_of(cell: &Listener, guard: u64, called: Called) -> bool {
    guard as u32 == called.port_and_protocol()
        && cell.address[0].get() == called.address[0]
        && cell.address[1].get() == called.address[1]
}

/// Leads packets to a service: one store decides. `false`: there is no room.
#[must_use]
pub fn set(lines: &[Listeners], called: Called, service: u32) -> bool {
    if let Some(cell) = own_cell(lines, called) {
        cell.service.set(service);
        return true;
    }
    let Some(cell) = cells(lines, called).find(|cell| cell.guard.get() as u32 == 0) else { return false };
    for (word, half) in cell.address.iter().zip(called.address) {
        word.set(half);
    }
    cell.service.set(service);
    let uses = (cell.guard.get() >> 32) + 1;
    cell.guard.set(uses << 32 | u64::from(called.port_and_protocol()));
    true
}

/// Leads packets there no more.
pub fn remove(lines: &[Listeners], called: Called) {
    if let Some(cell) = own_cell(lines, called) {
        cell.guard.set(cell.guard.get() >> 32 << 32);
    }
}

/// The listener of a cell, and its service.
pub fn read(cell: &Listener) -> Option<(Called, u32)> {
    let guard = cell.guard.get() as u32;
    let address = [cell.address[0].get(), cell.address[1].get()];
    let called = Called { address, port: guard as u16, protocol: (guard >> 16) as u8 };
    (guard != 0).then(|| (called, cell.service.get()))
}

/// The cells that a listener may stand in.
fn cells(lines: &[Listeners], called: Called) -> impl Iterator<Item = &Listener> {
    let home = line(called) as usize & lines.len().wrapping_sub(1);
    [home, home ^ 1].into_iter().filter_map(|number| lines.get(number)).flat_map(|line| &line.cells)
}

/// The cell of a listener, if it is there.
fn own_cell(lines: &[Listeners], called: Called) -> Option<&Listener> {
    cells(lines, called).find(|cell| is_of(cell, cell.guard.get(), called))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::{
        abi::{TCP, UDP, address_v6, mapped},
        sim::MemTables,
    };
    use proptest::prelude::*;
    use std::{collections::HashMap, vec::Vec};

    /// Listeners of which many are alike in all but one place.
    fn called() -> impl Strategy<Value = Called> {
        let v4 = (0u8..4, 0u8..4).prop_map(|(c, d)| mapped(u32::from_ne_bytes([10, 0, c, d])));
        let v6 = (0u8..4, 0u8..4).prop_map(|(a, p)| {
            let mut address = [0; 16];
            (address[0], address[15]) = (a, p);
            address_v6(address)
        });
        (prop_oneof![v4, v6], 1u16..4, prop_oneof![Just(TCP), Just(UDP)])
            .prop_map(|(address, port, protocol)| Called { address, port: port.to_be(), protocol })
    }

    fn find(tables: &MemTables, called: Called) -> Option<u32> {
        super::find(tables, called, tables.listeners.len() as u32 - 1)
    }

    proptest! {
        #[test]
        fn finds_what_was_set_and_not_removed(
            changes in proptest::collection::vec((called(), proptest::option::of(0u32..99)), 1..200),
        ) {
            // With 96 listeners of one family and 96 of the other, and room for 128 services.
            let mut tables = MemTables::new(0, 0, 0, 1);
            tables.listeners = (0..lines_for(128)).map(|_| Listeners::default()).collect();
            let mut model = HashMap::new();
            for (called, service) in changes {
                match service {
                    Some(service) => {
                        prop_assert!(set(&tables.listeners, called, service));
                        model.insert((called.address, called.port, called.protocol), service);
                    }
                    None => {
                        remove(&tables.listeners, called);
                        model.remove(&(called.address, called.port, called.protocol));
                    }
                }
                let key = (called.address, called.port, called.protocol);
                prop_assert_eq!(find(&tables, called), model.get(&key).copied());
            }
            for (&(address, port, protocol), &service) in &model {
                prop_assert_eq!(find(&tables, Called { address, port, protocol }), Some(service));
            }
            let cells = tables.listeners.iter().flat_map(|line| &line.cells);
            prop_assert_eq!(cells.filter_map(read).count(), model.len());
        }
    }

    /// As many listeners as there are services, of the kind that operators have: addresses in a row, few ports.
    fn in_a_row(services: u32) -> impl Iterator<Item = Called> {
        (0..services).map(|number| {
            let [_, _, c, d] = (number / 4).to_be_bytes();
            let port = [80u16, 443, 8080, 5432][number as usize % 4];
            let address = mapped(u32::from_ne_bytes([203, 0, c, d]));
            Called { address, port: port.to_be(), protocol: TCP }
        })
    }

    #[test]
    fn there_is_room_for_all_services_of_the_limit() {
        for services in [1, 3, 16, 100, 4096, 65_536] {
            let lines: Vec<_> = (0..lines_for(services)).map(|_| Listeners::default()).collect();
            for (called, number) in in_a_row(services).zip(0..) {
                assert!(set(&lines, called, number), "{number} of {services}");
            }
        }
    }

    #[test]
    fn lines_that_are_full_lead_each_to_its_own_and_take_no_more() {
        let mut tables = MemTables::new(0, 0, 0, 1);
        tables.listeners = (0..2).map(|_| Listeners::default()).collect();
        // All with the same line, and each with a twin of the other protocol.
        let twins = |called| [called, Called { protocol: UDP, ..called }];
        let at_home = |called: &Called| twins(*called).iter().all(|twin| line(*twin).is_multiple_of(2));
        let listeners: Vec<_> = in_a_row(99).filter(at_home).take(5).flat_map(twins).collect();
        for (&called, number) in listeners[..8].iter().zip(0..) {
            assert!(set(&tables.listeners, called, number));
        }
        let before = tables.listeners.clone();
        assert!(!set(&tables.listeners, listeners[8], 8));
        assert!(tables.listeners == before);
        let found: Vec<_> = listeners.iter().map(|&called| find(&tables, called)).collect();
        assert!(found.into_iter().eq((0..8).map(Some).chain([None, None])));
    }

    #[test]
    fn each_use_of_a_cell_is_told_from_the_one_before() {
        let (old, new) = (in_a_row(1).next().unwrap(), in_a_row(2).nth(1).unwrap());
        let lines = [Listeners::default()];
        assert!(set(&lines, old, 1));
        let cell = &lines[0].cells[0];
        let seen = cell.guard.get();
        remove(&lines, old);
        assert!(set(&lines, new, 2));
        assert!(std::ptr::eq(cell, own_cell(&lines, new).unwrap()));
        remove(&lines, new);
        assert!(set(&lines, old, 3));
        // The same listener in the same place, and yet a reader of before sees that it is another use.
        assert_ne!(cell.guard.get(), seen);
        assert_eq!(cell.guard.get() as u32, seen as u32);
    }
}
