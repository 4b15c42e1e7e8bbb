//! Each service's ring: built, written to fresh pages, switched to by one store.

use std::collections::{BTreeMap, HashMap};

use super::{
    Desired, PlanError, Stage, Steps,
    backends::{Indices, takes_part, verdict_on},
    services::Placed,
};
use crate::{
    dataplane::{Op, Ring, Tables, pages_for},
    maglev::{self, Member},
    model::Scheduler,
};

/// Writes the rings that changed.
pub(super) fn write(
    desired: &Desired<'_>,
    before: &Tables,
    services: &[Placed<'_>],
    backends: &Indices,
    steps: &mut Steps,
) -> Result<(), PlanError> {
    let mut pages = Pages::of(before);
    // Services of one pool have the same ring but for the indices.
    let mut rings: HashMap<(&str, Scheduler, u32), Vec<u32>> = HashMap::new();
    for (placed, indices) in services.iter().zip(backends) {
        let service = placed.service;
        let size = service.ring_size.unwrap_or_else(|| maglev::size_for(indices.len()));
        let ring = rings.entry((&service.pool, service.scheduler, size)).or_insert_with(|| {
            let members = members(desired, &service.pool);
            match service.scheduler {
                Scheduler::Maglev => maglev::ring(&members, size),
                Scheduler::RoundRobin => maglev::turns(&members),
            }
        });
        let slots = ring.iter().filter_map(|&position| indices.get(position as usize).copied());
        let empty = Ring::empty();
        let now = placed.before.map_or(&empty, |entry| &entry.ring);
        let round_robin = service.scheduler == Scheduler::RoundRobin;
        if placed.before.is_some_and(|entry| entry.round_robin != round_robin) {
            steps.add(Stage::Rings, Op::SwitchScheduler { service: placed.index, round_robin });
        }
        if now.slots.iter().copied().eq(slots.clone()) {
            continue;
        }
        let slots: std::sync::Arc<[u32]> = slots.collect();
        let first_page = if slots.is_empty() { 0 } else { pages.take(pages_for(slots.len()))? };
        let size = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        if !slots.is_empty() {
            steps.add(Stage::Pages, Op::WritePages { first_page, slots });
        }
        steps.add(Stage::Rings, Op::SwitchRing { service: placed.index, first_page, slots: size });
    }
    Ok(())
}

/// Who takes part in a pool's rings, and with what weight: all of the pool, in its order.
fn members(desired: &Desired<'_>, pool: &str) -> Vec<Member> {
    let backends = desired.config.pools.get(pool).map(|pool| pool.backends.as_slice()).unwrap_or_default();
    let member = |backend| {
        let weight = if takes_part(verdict_on(desired, pool, backend)) { backend.weight } else { 0 };
        Member { address: backend.address, weight }
    };
    backends.iter().map(member).collect()
}

/// Which pages are taken.
struct Pages {
    taken: Vec<bool>,
    in_use: usize,
    /// Before which page there is no room for so many in a row: pages are only taken, so it stays true.
    full_until: BTreeMap<u32, usize>,
}

impl Pages {
    fn of(before: &Tables) -> Self {
        let mut pages = Self {
            taken: vec![false; before.limits.ring_pages as usize],
            in_use: 0,
            full_until: BTreeMap::new(),
        };
        for page in before.services.values().flat_map(|service| service.ring.pages()) {
            if let Some(taken) = pages.taken.get_mut(page as usize) {
                *taken = true;
                pages.in_use += 1;
            }
        }
        pages
    }

    /// The first of so many free pages side by side.
    fn take(&mut self, count: u32) -> Result<u32, PlanError> {
        let length = count as usize;
        let from = self.full_until.get(&count).copied().unwrap_or(0);
        let (mut first, mut at) = (from, from);
        while at < self.taken.len() && at - first < length {
            if self.taken[at] {
                first = at + 1;
            }
            at += 1;
        }
        self.in_use += length;
        if at - first < length {
            let limit = u32::try_from(self.taken.len()).unwrap_or(u32::MAX);
            return Err(if self.in_use > self.taken.len() {
                PlanError::Limit {
                    what: "pages of rings",
                    needed: self.in_use,
                    limit,
                    key: "limits.ring_pages",
                }
            } else {
                PlanError::Scattered { pages: count }
            });
        }
        self.taken[first..at].fill(true);
        self.full_until.insert(count, at);
        Ok(u32::try_from(first).unwrap_or(u32::MAX))
    }
}
