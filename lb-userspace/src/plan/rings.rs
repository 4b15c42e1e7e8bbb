//! Each service's ring: built, written to fresh pages, switched to by one store.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    num::NonZero,
    sync::Arc,
    thread::{Builder, available_parallelism},
};

use lb_common::abi::{NO_BACKEND, RingAt, Slot, Standing, Tick};

use super::{
    Desired, PlanError, Stage, Steps,
    backends::{Indices, takes_part},
    services::{Placed, mode},
    slots::{Rules, Turn, Write},
};
use crate::{
    dataplane::{FlowsOf, Op, Ring, ServiceEntry, SideEntry, Tables, pages_for, ticks_in},
    health::Verdict,
    maglev::{self, Member},
    model::{Backend, Scheduler, Track},
};

/// Rings of earlier plans and what they were made from, by service. Whether it remembers anything makes
/// no difference but in time.
#[derive(Clone, Debug, Default)]
pub struct Rings(HashMap<u32, (Recipe, Arc<[Slot]>)>);

impl Rings {
    /// Forgets those of other services.
    pub(super) fn keep(&mut self, services: &[Placed<'_>]) {
        let indices: HashSet<u32> = services.iter().map(|placed| placed.index).collect();
        self.0.retain(|index, _| indices.contains(index));
    }

    /// What each service's ring is to be, in their order. Those that are not remembered are built on all processors: at
    /// a start that is all of them. One that is in the tables already is not kept twice.
    fn of(&mut self, recipes: Vec<Recipe>, services: &[Placed<'_>]) -> Vec<(Recipe, Arc<[Slot]>)> {
        let remembered = recipes.into_iter().zip(services).map(|(recipe, placed)| {
            let earlier = self.0.remove(&placed.index).filter(|(earlier, _)| *earlier == recipe);
            (recipe, earlier.map(|(_, slots)| slots))
        });
        let mut rings: Vec<_> = remembered.collect();
        let of_services = rings.iter_mut().zip(services).filter(|((_, slots), _)| slots.is_none());
        let missing = of_services.map(|((recipe, slots), placed)| Missing {
            recipe,
            slots,
            there: placed.before.map(|entry| &entry.ring.slots),
        });
        let mut missing: Vec<_> = missing.collect();
        let threads = match missing.len() {
            0..FEW => 1,
            _ => available_parallelism().map_or(1, NonZero::get),
        };
        let share = missing.len().div_ceil(threads).max(1);
        let build = |missing: &mut [Missing<'_>]| missing.iter_mut().for_each(Missing::build);
        std::thread::scope(|scope| {
            let mut shares = missing.chunks_mut(share);
            let own = shares.next();
            for share in shares {
                // Where there is no thread to be had, what is missing is built below.
                _ = Builder::new().spawn_scoped(scope, move || build(share));
            }
            own.map(build);
        });
        let whole = |(recipe, slots): (Recipe, Option<Arc<[Slot]>>)| {
            let slots = slots.unwrap_or_else(|| recipe.ring());
            (recipe, slots)
        };
        rings.into_iter().map(whole).collect()
    }
}

/// A ring that is to be built.
struct Missing<'a> {
    recipe: &'a Recipe,
    slots: &'a mut Option<Arc<[Slot]>>,
    /// What the service has.
    there: Option<&'a Arc<[Slot]>>,
}

impl Missing<'_> {
    fn build(&mut self) {
        let built = self.recipe.ring();
        *self.slots = Some(self.there.filter(|there| **there == built).map_or(built, Arc::clone));
    }
}

/// Rings that are not worth a thread.
const FEW: usize = 64;

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
    fn ring(&self) -> Arc<[Slot]> {
        let positions = match self.scheduler {
            Scheduler::Maglev | Scheduler::Source => maglev::ring(&self.members, self.size),
            Scheduler::RoundRobin => maglev::turns(&self.members),
        };
        // Positions are those of members, of which each has its index.
        positions.into_iter().map(|position| Slot::settled(self.indices[position as usize])).collect()
    }
}

/// Writes the rings that changed, and gives back when time alone will change one.
pub(super) fn write(
    desired: &Desired<'_>,
    before: &Tables,
    services: &[Placed<'_>],
    backends: &Indices,
    rings: &mut Rings,
    steps: &mut Steps,
) -> Result<Option<Tick>, PlanError> {
    let mut room = Room::of(before);
    let mut side_pages = 0;
    let lost = Lost::of(desired, before, services, backends);
    let mut due: Option<Tick> = None;
    let recipes = services.iter().zip(backends).map(|(placed, indices)| recipe(desired, placed, indices));
    let wanted = rings.of(recipes.collect(), services);
    for (placed, (recipe, wanted)) in services.iter().zip(wanted) {
        let quiet = placed.service.quiet_time(&desired.config.settings.idle);
        let sides = before.sides.get(&placed.index);
        let next = match quiet {
            None => {
                replaced(placed, &wanted, &mut room, steps)?;
                None
            }
            Some(quiet) => {
                let always = placed.service.track == Track::Always;
                let gone = |backend: u32| lost.0.contains(&backend);
                side_pages += pages_at_worst(placed, &recipe, always);
                let rules = Rules { now: desired.now, quiet: ticks_in(quiet), always, gone: &gone };
                changed(placed, &recipe, &wanted, sides, &rules, &mut room, steps)?
            }
        };
        // After the ring: in no mode does the ring of the other mean anything.
        let mode = mode(desired, placed.service);
        if placed.before.is_some_and(|entry| entry.mode != mode) {
            steps.add(Stage::Rings, Op::SwitchMode { service: placed.index, mode });
        }
        due = sooner(due, next);
        rings.0.insert(placed.index, (recipe, wanted));
    }
    let limit = before.limits.side_pages;
    if side_pages > limit {
        // All may be needed at once, when a change must not wait: better said now than then.
        let needed = side_pages as usize;
        return Err(PlanError::Limit { what: "side pages", needed, limit, key: "limits.side_pages" });
    }
    Ok(due)
}

/// Side pages that a service may come to need at the same time.
fn pages_at_worst(placed: &Placed<'_>, recipe: &Recipe, always: bool) -> u32 {
    let now = placed.before.map_or(0, |entry| pages_for(entry.ring.slots.len()));
    let wanted = pages_for(recipe.size as usize);
    // Where slots never settle, a ring of another size is made beside the one that is.
    if always && now != wanted { now + wanted } else { now.max(wanted) }
}

fn sooner(one: Option<Tick>, other: Option<Tick>) -> Option<Tick> {
    match (one, other) {
        (Some(one), Some(other)) => Some(if one.has_reached(other) { other } else { one }),
        (one, other) => one.or(other),
    }
}

/// Backends in the tables whose connections are given up.
struct Lost(BTreeSet<u32>);

impl Lost {
    fn of(desired: &Desired<'_>, before: &Tables, services: &[Placed<'_>], backends: &Indices) -> Self {
        let mut lost: BTreeSet<u32> = before.backends.keys().copied().collect();
        for (placed, indices) in services.iter().zip(backends) {
            for ((_, verdict), index) in desired.members(placed.service).into_iter().zip(indices) {
                if verdict.flows == FlowsOf::Keep {
                    lost.remove(index);
                }
            }
        }
        Self(lost)
    }
}

/// A ring that nothing is remembered of: switched as a whole.
fn replaced(
    placed: &Placed<'_>,
    wanted: &Arc<[Slot]>,
    room: &mut Room,
    steps: &mut Steps,
) -> Result<(), PlanError> {
    // Mostly it is not only the same ring, but the same memory.
    let same = placed.before.map_or(wanted.is_empty(), |entry| {
        Arc::ptr_eq(&entry.ring.slots, wanted) || entry.ring.slots == *wanted
    });
    if !same {
        switch(placed, Arc::clone(wanted), None, room, steps)?;
    }
    forget_old_ring(placed, steps);
    Ok(())
}

/// A ring whose slots look after the connections of those who had them before.
fn changed(
    placed: &Placed<'_>,
    recipe: &Recipe,
    wanted: &Arc<[Slot]>,
    sides: Option<&Arc<[SideEntry]>>,
    rules: &Rules<'_>,
    room: &mut Room,
    steps: &mut Steps,
) -> Result<Option<Tick>, PlanError> {
    let empty = Ring::empty();
    // What was translated before is no connection of these slots; nor is a round of turns a ring of them, which
    // whoever died while the service was turning to translation has left under the mode of before.
    let is_own = |entry: &&ServiceEntry| {
        entry.mode.direct && u32::try_from(entry.ring.slots.len()).is_ok_and(maglev::is_prime)
    };
    let direct = placed.before.filter(is_own);
    let now = direct.map_or(&empty, |entry| &entry.ring);
    let nothing = SideEntry::moving(NO_BACKEND, rules.now);
    let side = |slot: usize| sides.and_then(|sides| sides.get(slot)).copied().unwrap_or(nothing);
    let at_rest = |slot: Slot, standing: Standing| {
        slot.is_settled() || (rules.always && !standing.fading && standing.before == slot.backend())
    };
    let begins = now.slots.is_empty();
    // Nobody takes part: the slots stay, for the connections that they have.
    let nobody = || now.slots.iter().map(|_| Slot::settled(NO_BACKEND)).collect();
    let resizes = !begins && !wanted.is_empty() && wanted.len() != now.slots.len();
    // A ring of yet another size takes the place of the old one, which packets may be asking until a plan has
    // waited and given it up.
    let keeps_old = placed.before.is_some_and(|entry| !entry.old_ring.slots.is_empty());
    let may_resize = resizes
        && !keeps_old
        && (0..).zip(now.slots.iter()).all(|(n, slot)| at_rest(*slot, side(n).standing));
    let kept_size;
    let wanted = if wanted.is_empty() {
        kept_size = nobody();
        &kept_size
    } else if resizes && !may_resize {
        // Not before all slots are at rest: until then the new backends share the ring as it is.
        let size = u32::try_from(now.slots.len()).unwrap_or(u32::MAX);
        kept_size = Recipe { size, ..recipe.clone() }.ring();
        &kept_size
    } else {
        wanted
    };

    let turns: Vec<Turn> = if may_resize {
        let known = now.slots.iter().enumerate().filter(|(_, slot)| !slot.is_settled());
        let since = known.map(|(number, _)| side(number).unsettled_since);
        let since = since.reduce(|one, other| if one.has_reached(other) { other } else { one });
        wanted.iter().map(|slot| rules.resized(since, slot.backend())).collect()
    } else {
        let slot = |number: usize| now.slots.get(number).copied().unwrap_or(Slot::settled(NO_BACKEND));
        let turn =
            |(number, wanted): (usize, &Slot)| rules.turn(slot(number), side(number), wanted.backend());
        wanted.iter().enumerate().map(turn).collect()
    };

    let slots: Arc<[Slot]> = match turns.iter().map(|turn| turn.slot).eq(wanted.iter().copied()) {
        // At rest it is the same memory.
        true => Arc::clone(wanted),
        false => turns.iter().map(|turn| turn.slot).collect(),
    };
    let unsettled = slots.iter().any(|slot| !slot.is_settled());
    let first_side = match now.first_side {
        Some(first) if unsettled && !may_resize => Some(first),
        _ if unsettled => Some(room.sides.take(pages_for(slots.len()))?),
        _ => None,
    };
    write_sides(first_side, &turns, rules.quiet, steps);
    let mut due = turns.iter().fold(None, |due, turn| sooner(due, turn.due));
    if resizes && !may_resize && (0..).zip(&turns).all(|(n, turn)| at_rest(turn.slot, turn.standing(side(n))))
    {
        // All are at rest with this plan.
        due = Some(rules.now.after(1));
    }
    if may_resize {
        steps.add(Stage::Sides, Op::SwitchOldRing { service: placed.index, ring: now.at() });
    } else if keeps_old {
        let asks =
            |(number, slot): (usize, &Slot)| !slot.is_settled() && side(number).standing.asks_old_ring();
        if now.slots.iter().enumerate().any(asks) {
            // Those that this plan lets fade may be asking at this moment.
            due = due.or(Some(rules.now.after(1)));
        } else {
            forget_old_ring(placed, steps);
        }
    }
    let there = placed.before.map_or(&empty, |entry| &entry.ring);
    if there.slots != slots || there.first_side != first_side {
        switch(placed, slots, first_side, room, steps)?;
    }
    Ok(due)
}

fn forget_old_ring(placed: &Placed<'_>, steps: &mut Steps) {
    if placed.before.is_some_and(|entry| !entry.old_ring.slots.is_empty()) {
        let ring = RingAt::default();
        steps.add(Stage::Fade, Op::SwitchOldRing { service: placed.index, ring });
    }
}

/// Writes what slots are to remember: before the ring is switched what new rings need, afterwards what old
/// ones must not see.
fn write_sides(first_side: Option<u32>, turns: &[Turn], quiet: u32, steps: &mut Steps) {
    let Some(first_side) = first_side else { return };
    let (mut sides, mut earlier, mut later) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ends, mut overs) = (Vec::new(), Vec::new());
    for (number, turn) in (0..).zip(turns) {
        match turn.write {
            Write::Nothing => {}
            Write::Side(side) => sides.push((number, side)),
            Write::Before(standing) => earlier.push((number, standing)),
            Write::After(standing) => later.push((number, standing)),
            Write::End(standing) => ends.push((number, standing)),
            Write::Over(standing) => overs.push((number, standing)),
        }
    }
    if !sides.is_empty() {
        steps.add(Stage::Sides, Op::WriteSides { first_side, sides: sides.into() });
    }
    for (stage, standings) in [(Stage::Sides, earlier), (Stage::Fade, later)] {
        if !standings.is_empty() {
            steps.add(stage, Op::SetStandings { first_side, standings: standings.into() });
        }
    }
    // Of a loss in the tick of the plan nobody knows whether the plan has seen it.
    for (standings, quiet) in [(ends, quiet), (overs, 1)] {
        if !standings.is_empty() {
            steps.add(Stage::Fade, Op::EndMoving { first_side, standings: standings.into(), quiet });
        }
    }
}

/// Writes a ring to a fresh place and leads the service there.
fn switch(
    placed: &Placed<'_>,
    slots: Arc<[Slot]>,
    first_side: Option<u32>,
    room: &mut Room,
    steps: &mut Steps,
) -> Result<(), PlanError> {
    let first_page = if slots.is_empty() { 0 } else { room.pages.take(pages_for(slots.len()))? };
    let ring = Ring { first_page, first_side, slots };
    let at = ring.at();
    if at.slots > 0 {
        steps.add(Stage::Pages, Op::WritePages { first_page, slots: ring.slots });
    }
    steps.add(Stage::Rings, Op::SwitchRing { service: placed.index, ring: at });
    Ok(())
}

/// What a service's ring is to be made from: all of its pool, in the document's order; who does not
/// take part has no weight.
fn recipe(desired: &Desired<'_>, placed: &Placed<'_>, indices: &[u32]) -> Recipe {
    let service = placed.service;
    let member = |(backend, verdict): (&Backend, Verdict)| {
        // Rings depend on how weights compare alone, so all may be in tenths.
        let weight = if takes_part(verdict) { verdict.weigh(backend.weight) } else { 0 };
        Member { address: backend.address, weight }
    };
    Recipe {
        scheduler: service.scheduler,
        size: service.ring_size.unwrap_or_else(|| maglev::size_for(indices.len())),
        members: desired.members(service).into_iter().map(member).collect(),
        indices: indices.to_vec(),
    }
}

/// Which pages are taken.
struct Room {
    pages: Pages,
    sides: Pages,
}

impl Room {
    fn of(before: &Tables) -> Self {
        let limits = &before.limits;
        let mut room = Self {
            pages: Pages::new(limits.ring_pages, "pages of rings", "limits.ring_pages"),
            sides: Pages::new(limits.side_pages, "side pages", "limits.side_pages"),
        };
        for service in before.services.values() {
            room.pages.mark(service.ring.pages().chain(service.old_ring.pages()));
            room.sides.mark(service.ring.sides());
        }
        room
    }
}

/// Pages of one kind.
struct Pages {
    what: &'static str,
    key: &'static str,
    taken: Vec<bool>,
    in_use: usize,
    /// Before which page there is no room for so many in a row: pages are only taken, so it stays true.
    full_until: BTreeMap<u32, usize>,
}

impl Pages {
    fn new(count: u32, what: &'static str, key: &'static str) -> Self {
        Self { what, key, taken: vec![false; count as usize], in_use: 0, full_until: BTreeMap::new() }
    }

    fn mark(&mut self, pages: impl Iterator<Item = u32>) {
        for page in pages {
            if let Some(taken) = self.taken.get_mut(page as usize) {
                *taken = true;
                self.in_use += 1;
            }
        }
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
            let (what, key) = (self.what, self.key);
            return Err(if self.in_use > self.taken.len() {
                PlanError::Limit { what, needed: self.in_use, limit, key }
            } else {
                PlanError::Scattered { what, pages: count, key }
            });
        }
        self.taken[first..at].fill(true);
        self.full_until.insert(count, at);
        Ok(u32::try_from(first).unwrap_or(u32::MAX))
    }
}
