//! Each service's ring: built, written to fresh pages, switched to by one store.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use super::{
    Desired, PlanError, Stage, Steps,
    backends::{Indices, takes_part, verdict_on},
    services::Placed,
};
use crate::{
    dataplane::{Op, Ring, Tables, pages_for},
    maglev::{self, Member},
    model::{Backend, Scheduler},
};

/// Rings of earlier plans and what they were made from, by service. Whether it remembers anything makes
/// no difference but in time.
#[derive(Clone, Debug, Default)]
pub struct Rings(HashMap<u32, (Recipe, Arc<[u32]>)>);

impl Rings {
    /// Forgets those of other services.
    pub(super) fn keep(&mut self, services: &[Placed<'_>]) {
        let indices: HashSet<u32> = services.iter().map(|placed| placed.index).collect();
        self.0.retain(|index, _| indices.contains(index));
    }
}

/// All that a ring depends on.
#[derive(Clone, Debug, PartialEq)]
struct Recipe {
    scheduler: Scheduler,
    size: u32,
    members: Vec<Member>,
    /// The index of each member.
    indices: Vec<u32>,
}

impl Recipe {
    fn ring(&self) -> Arc<[u32]> {
        let positions = match self.scheduler {
            Scheduler::Maglev => maglev::ring(&self.members, self.size),
            Scheduler::RoundRobin => maglev::turns(&self.members),
        };
        positions.into_iter().filter_map(|position| self.indices.get(position as usize).copied()).collect()
    }
}

/// Writes the rings that changed.
pub(super) fn write(
    desired: &Desired<'_>,
    before: &Tables,
    services: &[Placed<'_>],
    backends: &Indices,
    rings: &mut Rings,
    steps: &mut Steps,
) -> Result<(), PlanError> {
    let mut pages = Pages::of(before);
    for (placed, indices) in services.iter().zip(backends) {
        let recipe = recipe(desired, placed, indices);
        let slots = match rings.0.remove(&placed.index) {
            Some((earlier, slots)) if earlier == recipe => slots,
            _ => recipe.ring(),
        };
        let round_robin = recipe.scheduler == Scheduler::RoundRobin;
        if placed.before.is_some_and(|entry| entry.round_robin != round_robin) {
            steps.add(Stage::Rings, Op::SwitchScheduler { service: placed.index, round_robin });
        }
        rings.0.insert(placed.index, (recipe, Arc::clone(&slots)));
        let empty = Ring::empty();
        let now = placed.before.map_or(&empty, |entry| &entry.ring);
        if Arc::ptr_eq(&now.slots, &slots) || now.slots == slots {
            continue;
        }
        let first_page = if slots.is_empty() { 0 } else { pages.take(pages_for(slots.len()))? };
        let size = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        if !slots.is_empty() {
            steps.add(Stage::Pages, Op::WritePages { first_page, slots });
        }
        steps.add(Stage::Rings, Op::SwitchRing { service: placed.index, first_page, slots: size });
    }
    Ok(())
}

/// What a service's ring is to be made from: all of its pool, in the document's order; who does not
/// take part has no weight.
fn recipe(desired: &Desired<'_>, placed: &Placed<'_>, indices: &[u32]) -> Recipe {
    let service = placed.service;
    let pool = desired.config.pools.get(&service.pool);
    let verdicts = desired.verdicts.get(&service.pool);
    let member = |backend: &Backend| {
        let weight = if takes_part(verdict_on(verdicts, backend)) { backend.weight } else { 0 };
        Member { address: backend.address, weight }
    };
    Recipe {
        scheduler: service.scheduler,
        size: service.ring_size.unwrap_or_else(|| maglev::size_for(indices.len())),
        members: pool.map(|pool| pool.backends.iter().map(member).collect()).unwrap_or_default(),
        indices: indices.to_vec(),
    }
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
