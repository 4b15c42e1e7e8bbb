//! What a document would change, before anything is done.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{NO_BACKEND, Slot};

use crate::{
    api::view::{Foreseen, ForeseenService},
    dataplane::{
        Dataplane, DataplaneError, Firewall, FlowsOf, Mode, Op, Ring, ServiceEntry, Tables,
        memory::MemoryDataplane,
    },
    model::{Listen, Scheduler},
};

/// What operations would change in tables that hold `before`. `plane` tells which connections there are.
///
/// # Errors
/// When connections cannot be read, or the operations do not fit the tables.
pub fn foresee(plane: &impl Dataplane, before: &Tables, ops: &[Op]) -> Result<Foreseen, DataplaneError> {
    let mut memory = MemoryDataplane::from_tables(before);
    for op in ops {
        memory.apply(op)?;
    }
    let after = memory.held();
    let connections = connections(plane, before)?;
    let of = |tables: &Tables| -> BTreeMap<Listen, u32> {
        tables.services.iter().map(|(&index, entry)| (entry.listen, index)).collect()
    };
    let (old, new) = (of(before), of(after));
    let listeners: BTreeSet<Listen> = old.keys().chain(new.keys()).copied().collect();
    let service = |listen: Listen| {
        let (old, new) = (old.get(&listen), new.get(&listen));
        let entry = |tables: &'_ Tables, index: Option<&u32>| {
            index.and_then(|index| tables.services.get(index)).cloned()
        };
        let (was, is) = (entry(before, old), entry(after, new));
        let own = |backend: &u32| before.backends.get(backend).is_some_and(|b| Some(&b.service) == old);
        let mine = || connections.iter().filter(|(backend, _)| own(backend));
        let goes = |backend: &u32| {
            is.is_none() || after.backends.get(backend).is_none_or(|entry| entry.flows == FlowsOf::Cut)
        };
        ForeseenService {
            service: String::new(),
            listen: listen.to_string(),
            change: change(was.as_ref(), is.as_ref()).into(),
            slots: is.as_ref().map_or(0, |entry| entry.ring.at().slots),
            slots_moved: slots_moved(was.as_ref(), is.as_ref()),
            share_moved: share_moved(was.as_ref(), is.as_ref()),
            connections: mine().map(|(_, number)| number).sum(),
            connections_reset: mine().filter(|(backend, _)| goes(backend)).map(|(_, number)| number).sum(),
        }
    };
    Ok(Foreseen {
        operations: ops.iter().map(ToString::to_string).collect(),
        services: listeners.into_iter().map(service).collect(),
        desk: Vec::new(),
        warnings: Vec::new(),
    })
}

/// Connections that are written down, by their backend.
fn connections(plane: &impl Dataplane, tables: &Tables) -> Result<BTreeMap<u32, u64>, DataplaneError> {
    let mut connections: BTreeMap<u32, u64> = BTreeMap::new();
    plane.flows(&mut |flow| {
        if tables.backends.get(&flow.backend).is_some_and(|b| b.generation == flow.generation) {
            *connections.entry(flow.backend).or_default() += 1;
        }
    })?;
    plane.records(&mut |record| *connections.entry(record.backend).or_default() += 1)?;
    Ok(connections)
}

fn change(was: Option<&ServiceEntry>, is: Option<&ServiceEntry>) -> &'static str {
    let look = |entry: &ServiceEntry| -> (Mode, Firewall, Vec<u32>) {
        (entry.mode, entry.firewall, entry.ring.slots.iter().map(|slot| slot.backend()).collect())
    };
    match (was, is) {
        (None, _) => "new",
        (_, None) => "removed",
        (Some(was), Some(is)) if look(was) == look(is) => "same",
        _ => "changed",
    }
}

/// Connections have one, before and after: with round robin they have a turn.
fn has_slots((was, is): &(&ServiceEntry, &ServiceEntry)) -> bool {
    [was, is].iter().all(|entry| entry.mode.scheduler != Scheduler::RoundRobin)
}

/// Slots that lead to another backend, of rings of the same size; all of them where it changes.
fn slots_moved(was: Option<&ServiceEntry>, is: Option<&ServiceEntry>) -> u32 {
    let Some((was, is)) = was.zip(is).filter(has_slots) else { return 0 };
    let (was, is) = (&was.ring.slots, &is.ring.slots);
    let moved = match was.len() == is.len() {
        true => was.iter().zip(is.iter()).filter(|(was, is)| was.backend() != is.backend()).count(),
        false => is.len(),
    };
    u32::try_from(moved).unwrap_or(u32::MAX)
}

/// The part of all connections whose slot leads to another backend.
fn share_moved(was: Option<&ServiceEntry>, is: Option<&ServiceEntry>) -> f64 {
    /// Places at which two rings of different sizes are compared.
    const SAMPLES: u32 = 1 << 16;
    let Some((was, is)) = was.zip(is).filter(has_slots) else { return 0.0 };
    let leads = |ring: &Ring, tag: u32| {
        ring.slots.get(ring.at().slot(tag) as usize).map_or(NO_BACKEND, |slot: &Slot| slot.backend())
    };
    if was.ring.slots.len() == is.ring.slots.len() {
        let all = is.ring.slots.len().max(1);
        return f64::from(slots_moved(Some(was), Some(is))) / all as f64;
    }
    let tags = (0..SAMPLES).map(|sample| sample << 16 | 1 << 15);
    let moved = tags.filter(|&tag| leads(&was.ring, tag) != leads(&is.ring, tag)).count();
    moved as f64 / f64::from(SAMPLES)
}
