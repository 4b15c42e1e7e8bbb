//! Where the addresses to send from are.
//!
//! A backend names its sources as a run of consecutive entries, and a flow names its source by index. So
//! an address has one index and keeps it while it can: a list that grows is continued in place. An entry
//! that no backend names any more stays, since flows may still be sent from it, until its place is
//! needed.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{Desired, PlanError, Stage, Steps};
use crate::dataplane::{MAX_SOURCES, Op, SourceEntry, SourceRun, Tables};

/// A new run begins at a multiple of this while there is room, so that it can grow in place.
const APART: usize = 32;

/// The run of each backend address, and which entries are given up.
pub(super) struct Runs {
    of: BTreeMap<IpAddr, SourceRun>,
    abandoned: BTreeSet<u32>,
}

impl Runs {
    /// The run for a backend that has this one now. What is not known stays as it is.
    pub(super) fn after(&self, address: IpAddr, now: SourceRun) -> SourceRun {
        let intact = self.abandoned.range(now.first..now.first + now.count).next().is_none();
        let stays = if intact { now } else { SourceRun::default() };
        self.of.get(&address).copied().unwrap_or(stays)
    }
}

/// Finds or makes a run for each list of sources.
pub(super) fn lay_out(desired: &Desired<'_>, before: &Tables, steps: &mut Steps) -> Result<Runs, PlanError> {
    let mut lists: Vec<&Vec<IpAddr>> = desired.sources.values().filter(|list| !list.is_empty()).collect();
    // Longer lists first: a shorter one may be part of one of them.
    lists.sort_by_key(|list| (Reverse(list.len()), *list));
    lists.dedup();

    let mut layout = Layout::of(before);
    let runs: BTreeMap<&Vec<IpAddr>, SourceRun> =
        lists.into_iter().map(|list| Ok((list, layout.run(list)?))).collect::<Result<_, PlanError>>()?;

    let ports = desired.config.settings.ports;
    let abandoned = layout.doubles();
    for &index in &abandoned {
        steps.add(Stage::Unback, Op::RemoveSource { index });
    }
    for index in layout.fixed {
        let entry = layout.entries.get(&index).map(|&address| SourceEntry { address, ports });
        if let Some(source) = entry.filter(|entry| before.sources.get(&index) != Some(entry)) {
            steps.add(Stage::Sources, Op::WriteSource { index, source });
            if before.sources.get(&index).is_some_and(|former| former.address != source.address) {
                // A connection that was sent from the former address must have a look at its flow.
                steps.add(Stage::Count, Op::CountAnew);
            }
        }
    }
    let run = |(&address, list): (&IpAddr, &Vec<IpAddr>)| Some((address, *runs.get(list)?));
    Ok(Runs { of: desired.sources.iter().filter_map(run).collect(), abandoned })
}

struct Layout {
    entries: BTreeMap<u32, IpAddr>,
    /// Entries that this plan relies on: they may not move.
    fixed: BTreeSet<u32>,
    /// Entries that some backend names, in the document or not.
    named: BTreeSet<u32>,
}

impl Layout {
    fn of(before: &Tables) -> Self {
        let runs = before.backends.values().map(|backend| backend.sources);
        Self {
            entries: before.sources.iter().map(|(&index, source)| (index, source.address)).collect(),
            fixed: BTreeSet::new(),
            named: runs.flat_map(|run| run.first..run.first + run.count).collect(),
        }
    }

    fn run(&mut self, list: &[IpAddr]) -> Result<SourceRun, PlanError> {
        let wanted: BTreeSet<IpAddr> = list.iter().copied().collect();
        let count = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
        let there: BTreeMap<u32, IpAddr> = self
            .entries
            .iter()
            .filter(|(_, ip)| wanted.contains(ip))
            .map(|(&index, &ip)| (index, ip))
            .collect();
        let (first, mut kept) = match there.keys().find_map(|&first| self.continues(first, &there, count)) {
            Some(found) => found,
            None => {
                if let Some((_, &address)) = there.iter().find(|(index, _)| self.fixed.contains(index)) {
                    return Err(PlanError::Sources { address, limit: MAX_SOURCES });
                }
                let first =
                    self.room(count).ok_or(PlanError::Sources { address: list[0], limit: MAX_SOURCES })?;
                (first, BTreeSet::new())
            }
        };
        // What is new comes behind, in the document's order.
        for &address in list {
            let next = first + u32::try_from(kept.len()).unwrap_or(u32::MAX);
            if kept.insert(address) {
                self.entries.insert(next, address);
            }
        }
        self.fixed.extend(first..first + count);
        Ok(SourceRun { first, count })
    }

    /// The addresses that stand side by side from `first` on, if they are all that are there at all and
    /// have room behind them for the rest.
    fn continues(
        &self,
        first: u32,
        there: &BTreeMap<u32, IpAddr>,
        count: u32,
    ) -> Option<(u32, BTreeSet<IpAddr>)> {
        let mut kept = BTreeSet::new();
        let stretch =
            (first..).map_while(|index| there.get(&index)).take_while(|&&ip| kept.insert(ip)).count();
        let rest = first + u32::try_from(stretch).ok()?..first + count;
        let whole = there.values().all(|ip| kept.contains(ip));
        let room = rest.end <= MAX_SOURCES && rest.into_iter().all(|index| self.is_free(index));
        (whole && room).then_some((first, kept))
    }

    /// Entries whose address stands elsewhere too, where it is needed or was found first.
    fn doubles(&self) -> BTreeSet<u32> {
        let mut seen: BTreeSet<IpAddr> =
            self.fixed.iter().filter_map(|index| self.entries.get(index).copied()).collect();
        let others = self.entries.iter().filter(|(index, _)| !self.fixed.contains(index));
        others.filter(|&(_, &address)| !seen.insert(address)).map(|(&index, _)| index).collect()
    }

    fn is_free(&self, index: u32) -> bool {
        !self.entries.contains_key(&index)
    }

    /// First of so many free entries: where the run can grow, else anywhere, else where no backend looks.
    fn room(&self, count: u32) -> Option<u32> {
        let end = MAX_SOURCES.checked_sub(count)?;
        let all = |free: &dyn Fn(u32) -> bool, from: u32, length: u32| (from..from + length).all(free);
        let free = |index| self.is_free(index);
        let unused = |index| !self.named.contains(&index) && !self.fixed.contains(&index);
        let blocks = count.next_multiple_of(APART as u32);
        (0..=end)
            .step_by(APART)
            .find(|&first| all(&free, first, blocks.min(MAX_SOURCES - first)))
            .or_else(|| (0..=end).find(|&first| all(&free, first, count)))
            .or_else(|| (0..=end).find(|&first| all(&unused, first, count)))
    }
}
