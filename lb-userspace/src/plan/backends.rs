//! Which index each backend of each service has, and what stands there.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use super::{Desired, PlanError, Stage, Steps, services::Placed, sources::Runs};
use crate::{
    dataplane::{BackendEntry, FlowsOf, Op, SourceRun, Tables},
    health::{BackendVerdicts, Verdict},
    model::{Backend, BackendAddress, Role, Service},
};

/// For each service, in their order, the index of each backend of its pool, in the pool's order.
pub(super) type Indices = Vec<Vec<u32>>;

/// Who a backend is, within a table.
type Identity = (u32, Option<IpAddr>, Option<u16>);

/// Gives each backend its index, writes what is new or changed, and retires what is gone.
pub(super) fn assign(
    desired: &Desired<'_>,
    before: &Tables,
    services: &[Placed<'_>],
    sources: &Runs,
    steps: &mut Steps,
) -> Result<Indices, PlanError> {
    // Entries of a service that is gone are nobody's, even where another service has its index now.
    let of_living: BTreeSet<u32> =
        services.iter().filter(|placed| placed.before.is_some()).map(|placed| placed.index).collect();
    let known: HashMap<Identity, u32> = before
        .backends
        .iter()
        .filter(|(_, entry)| of_living.contains(&entry.service))
        .map(|(&index, entry)| ((entry.service, entry.address, entry.port), index))
        .collect();

    let members: Vec<_> = services.iter().map(|placed| desired.members(placed.service)).collect();
    let identity = |placed: &Placed<'_>, backend: &Backend| {
        let (address, port) = parts(backend.address);
        (placed.index, address, port)
    };
    // Those that have an index keep it; only then it is known which are left for the others.
    let mut wanted: BTreeSet<u32> = BTreeSet::new();
    for (placed, members) in services.iter().zip(&members) {
        wanted.extend(members.iter().filter_map(|(backend, _)| known.get(&identity(placed, backend))));
    }
    let mut fresh = Fresh::of(before);
    let mut indices = Vec::with_capacity(services.len());
    for (placed, of_placed) in services.iter().zip(&members) {
        let mut of_service = Vec::with_capacity(of_placed.len());
        for &(backend, verdict) in of_placed {
            let now = known
                .get(&identity(placed, backend))
                .and_then(|&index| before.backends.get_key_value(&index));
            let (index, generation) = match now {
                Some((&index, entry)) => (index, entry.generation),
                None => {
                    let found = fresh.take(before, &wanted);
                    found.ok_or_else(|| shortage(members.iter().map(Vec::len).sum(), before))?
                }
            };
            let now = now.map(|(_, entry)| entry);
            let (_, address, port) = identity(placed, backend);
            let run = now.map_or_else(SourceRun::default, |now| now.sources);
            let entry = BackendEntry {
                service: placed.index,
                address,
                port,
                generation,
                next_hop: address.and_then(|ip| desired.next_hops.get(&ip).copied()),
                sources: address.map_or_else(SourceRun::default, |ip| sources.after(ip, run)),
                flows: verdict.flows,
                dead: verdict.dead,
            };
            write(placed.service, index, now, entry, steps);
            wanted.insert(index);
            of_service.push(index);
        }
        indices.push(of_service);
    }
    retire(desired, before, &wanted, services, steps);
    Ok(indices)
}

/// Writes an entry that is new or changed.
pub(super) fn write(
    service: &Service,
    index: u32,
    now: Option<&BackendEntry>,
    entry: BackendEntry,
    steps: &mut Steps,
) {
    if now != Some(&entry) {
        let harmful = entry.flows != FlowsOf::Keep || entry.dead;
        let stage = match now {
            // Better refused than written to a server that is not the primary, so this comes before
            // anybody else gets writes.
            Some(_) if service.role == Some(Role::Primary) && entry.flows == FlowsOf::Cut => Stage::Fence,
            // What harms new flows waits until no slot leads there.
            Some(_) if harmful => Stage::Retire,
            _ => Stage::Backends,
        };
        steps.add(stage, Op::WriteBackend { index, backend: entry });
    }
}

/// Whether a backend gets new connections.
pub(super) fn takes_part(verdict: Verdict) -> bool {
    verdict.usable && verdict.flows == FlowsOf::Keep
}

/// What health says of a backend.
pub(super) fn verdict_on(verdicts: Option<&BackendVerdicts>, backend: &Backend) -> Verdict {
    let verdict = verdicts.and_then(|verdicts| verdicts.get(&backend.address));
    verdict.copied().unwrap_or(Verdict::RESTING)
}

/// The flows of backends that are gone are cut; entries without flows are freed.
fn retire(
    desired: &Desired<'_>,
    before: &Tables,
    wanted: &BTreeSet<u32>,
    services: &[Placed<'_>],
    steps: &mut Steps,
) {
    let new_services: BTreeSet<u32> =
        services.iter().filter(|placed| placed.before.is_none()).map(|placed| placed.index).collect();
    for (&index, entry) in &before.backends {
        // Those named by the index of a new service have been freed to make room for it.
        if wanted.contains(&index) || new_services.contains(&entry.service) {
            continue;
        }
        let retired =
            BackendEntry { sources: SourceRun::default(), flows: FlowsOf::Cut, dead: false, ..entry.clone() };
        if *entry != retired {
            let writes = |placed: &&Placed<'_>| {
                placed.index == entry.service && placed.service.role == Some(Role::Primary)
            };
            let stage =
                if services.iter().any(|placed| writes(&placed)) { Stage::Fence } else { Stage::Retire };
            steps.add(stage, Op::WriteBackend { index, backend: retired });
        } else if desired.spent.contains(&index) {
            steps.add(Stage::Unback, Op::RemoveBackend { index });
        }
    }
}

/// Indices for new entries.
struct Fresh {
    next: u32,
    freed: Vec<(u32, u32)>,
    /// Retired entries, for when nothing else is left; found out only then.
    retired: Option<Vec<(u32, u32)>>,
}

impl Fresh {
    fn of(before: &Tables) -> Self {
        let freed = before.freed.iter().rev().map(|(&index, &generation)| (index, generation)).collect();
        Self { next: 0, freed, retired: None }
    }

    /// An index and the generation of its next use: one that was never used, else one that is free
    /// again, else one that is not `wanted` and whose flows have been cut already.
    fn take(&mut self, before: &Tables, wanted: &BTreeSet<u32>) -> Option<(u32, u32)> {
        while self.next < before.limits.backends {
            let index = self.next;
            self.next += 1;
            if !before.backends.contains_key(&index) && !before.freed.contains_key(&index) {
                return Some((index, 1));
            }
        }
        let used =
            self.freed.pop().or_else(|| self.retired.get_or_insert_with(|| retired(before, wanted)).pop());
        // Zero would mean never used.
        used.map(|(index, generation)| (index, generation.wrapping_add(1).max(1)))
    }
}

/// Entries of no document that no slot leads to.
fn retired(before: &Tables, wanted: &BTreeSet<u32>) -> Vec<(u32, u32)> {
    let rings = before.services.values().flat_map(|service| [&service.ring, &service.old_ring]);
    let led: BTreeSet<u32> = rings.flat_map(|ring| ring.slots.iter().map(|slot| slot.backend())).collect();
    let gone = before.backends.iter().rev().filter(|(index, entry)| {
        entry.flows == FlowsOf::Cut && !wanted.contains(index) && !led.contains(index)
    });
    gone.map(|(&index, entry)| (index, entry.generation)).collect()
}

fn shortage(in_document: usize, before: &Tables) -> PlanError {
    let limit = before.limits.backends;
    PlanError::Limit {
        what: "backends",
        needed: in_document.max(limit as usize + 1),
        limit,
        key: "limits.backends",
    }
}

pub(super) fn parts(address: BackendAddress) -> (Option<IpAddr>, Option<u16>) {
    match address {
        BackendAddress::Local => (None, None),
        BackendAddress::Remote(ip, port) => (Some(ip), port),
    }
}
