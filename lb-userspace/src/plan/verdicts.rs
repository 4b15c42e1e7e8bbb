//! The plan when nothing but verdicts has changed: the same operations, found by looking at a few services.
//!
//! Probes say something new all the time, and a plan of everything looks at every backend of every service.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    Desired, Plan, PlanError, Rings, Steps,
    backends::{self, Indices, parts},
    rings,
    services::Placed,
};
use crate::{
    dataplane::{BackendEntry, Tables},
    model::{Listen, Service},
};

/// The same as [`super::plan_again`], and the same result, provided that its last plan was applied and that
/// nothing is desired otherwise since then but the verdicts on these pools. `None`: it is not so. What only
/// the time brings about for services of other pools is left, and `due` says nothing of them.
///
/// # Errors
/// As [`super::plan`].
pub fn plan_verdicts(
    desired: &Desired<'_>,
    before: &Tables,
    pools: &BTreeSet<String>,
    rings: &mut Rings,
) -> Result<Option<Plan>, PlanError> {
    let mut steps = Steps::default();
    let Some(services) = placed(desired, before, pools) else { return Ok(None) };
    let Some(indices) = assign(desired, before, &services, &mut steps) else { return Ok(None) };
    let due = rings::write(desired, before, &services, &indices, rings, &mut steps)?;
    Ok(Some(Plan { ops: steps.in_order(before), due }))
}

/// The services of these pools.
fn placed<'a>(
    desired: &Desired<'a>,
    before: &'a Tables,
    pools: &BTreeSet<String>,
) -> Option<Vec<Placed<'a>>> {
    let of_pools = desired.config.services.values().filter(|service| pools.contains(&service.pool));
    let services: Vec<&Service> = of_pools.collect();
    let listeners: BTreeSet<Listen> = services.iter().map(|service| service.listen).collect();
    let there = before.services.iter().filter(|(_, entry)| listeners.contains(&entry.listen));
    let there: BTreeMap<Listen, _> = there.map(|(&index, entry)| (entry.listen, (index, entry))).collect();
    let place = |service: &'a Service| {
        let &(index, entry) = there.get(&service.listen)?;
        Some(Placed { service, index, before: Some(entry) })
    };
    services.into_iter().map(place).collect()
}

/// Writes what the verdicts say into the entries that there are.
fn assign(
    desired: &Desired<'_>,
    before: &Tables,
    services: &[Placed<'_>],
    steps: &mut Steps,
) -> Option<Indices> {
    let wanted: BTreeSet<u32> = services.iter().map(|placed| placed.index).collect();
    let entries = before.backends.iter().filter(|(_, entry)| wanted.contains(&entry.service));
    let entries: HashMap<_, _> =
        entries.map(|(&index, entry)| ((entry.service, entry.address, entry.port), (index, entry))).collect();
    let mut of_services = Vec::with_capacity(services.len());
    for placed in services {
        desired.config.pools.get(&placed.service.pool)?;
        let members = desired.members(placed.service);
        let mut of_service = Vec::with_capacity(members.len());
        for (backend, verdict) in members {
            let (address, port) = parts(backend.address);
            let &(index, now) = entries.get(&(placed.index, address, port))?;
            let entry = BackendEntry { flows: verdict.flows, dead: verdict.dead, ..now.clone() };
            backends::write(placed.service, index, Some(now), entry, steps);
            of_service.push(index);
        }
        of_services.push(of_service);
    }
    Some(of_services)
}
