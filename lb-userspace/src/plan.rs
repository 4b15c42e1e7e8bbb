//! From the desired state and the tables as they are to the operations in between: a pure function.
//!
//! A restart is the same thing as a reload: compute, compare with what is pinned, apply the difference.
//! The order of the operations (`Stage`) is such that no packet ever sees a half-made table: sources
//! before backends before rings before services before what leads to them; removal the other way round. A
//! ring and a rule set are written to a fresh place and switched to by one store. Stopped anywhere, the
//! tables are whole, and the next plan goes on from there.

mod backends;
mod rings;
mod rules;
mod services;
mod slots;
mod sources;
#[cfg(test)]
mod tests;
mod verdicts;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use lb_common::abi::Tick;

use self::backends::{takes_part, verdict_on};
pub use self::{rings::Rings, verdicts::plan_verdicts};
use crate::{
    dataplane::{Globals, NextHop, Op, Tables},
    health::{Verdict, Verdicts},
    model::{Backend, Config, Service},
};

/// Everything that the tables should say.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired<'a> {
    /// The document.
    pub config: &'a Config,
    /// Which backends are usable. A backend that is not named gets no new connections and keeps those
    /// it has.
    pub verdicts: &'a Verdicts,
    /// The way to each backend's address; absent: not known now.
    pub next_hops: &'a BTreeMap<IpAddr, NextHop>,
    /// Addresses to send from, for each backend's address, in order and of its family. Absent or empty:
    /// not known now; what was known before stays.
    pub sources: &'a BTreeMap<IpAddr, Vec<IpAddr>>,
    /// VIPs that are the host's own addresses too: what is for no service there is the host's.
    pub shared_vips: &'a BTreeSet<IpAddr>,
    /// Our MAC address on each interface that the program is attached to, by interface index.
    pub interfaces: &'a BTreeMap<u32, [u8; 6]>,
    /// Key of the hash that chooses slots; must never change while there are flows.
    pub hash_key: [u64; 2],
    /// Whether XDP_TX may be used (not on veth).
    pub same_interface_tx: bool,
    /// Indices of backend entries that are no longer in the document, and of which neither a flow nor a
    /// record is left.
    pub spent: &'a BTreeSet<u32>,
    /// The time as packets see it.
    pub now: Tick,
}

impl<'a> Desired<'a> {
    /// The backends of a service, in the document's order, with what health says of each for the role that it wants. The
    /// last of a service with a fallback is this host, which takes part while nobody else does.
    fn members(&self, service: &Service) -> Vec<(&'a Backend, Verdict)> {
        let verdicts = self.verdicts.get(&service.pool).map(|pool| pool.of(service.role));
        let judged = |backend: &'a Backend| (backend, verdict_on(verdicts, backend));
        let mut members: Vec<_> = self.config.backends_of(service).map(judged).collect();
        if let Some(((_, this_host), others)) = members.split_last_mut().filter(|_| service.has_fallback()) {
            let alone = !others.iter().any(|&(backend, verdict)| takes_part(verdict) && backend.weight > 0);
            *this_host = Verdict { usable: alone, ..Verdict::USABLE };
        }
        members
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The operations, in the order to apply them in.
    pub ops: Vec<Op>,
    /// When there will be something to do even if nothing changes but the time.
    pub due: Option<Tick>,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A table would have to hold more than it can.
    #[error(
        "{needed} {what} are needed, counting those that are still being taken out, but the tables hold {limit}; raise {key} in the document, then run `lb detach` and start again: sizes are fixed when the tables are made"
    )]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        needed: usize,
        /// How many there can be.
        limit: u32,
        /// The document's key.
        key: &'static str,
    },
    /// Enough pages are free for a ring, but not side by side.
    #[error(
        "a ring needs {pages} {what} side by side, and the free ones are scattered; raise {key} in the document, then run `lb detach` and start again: sizes are fixed when the tables are made"
    )]
    Scattered {
        /// What there is too little of in a row.
        what: &'static str,
        /// The document's key.
        key: &'static str,
        /// How many the ring takes.
        pages: u32,
    },
    /// Source addresses cannot be laid out so that each backend's stand side by side.
    #[error(
        "the addresses to send from do not fit: source {address} is needed in two different groups, or more than {limit} are in use; write one list of sources in the document"
    )]
    Sources {
        /// One that does not fit.
        address: IpAddr,
        /// How many there can be.
        limit: u32,
    },
}

/// The operations that turn `before` into what is desired; none when it is so already.
///
/// # Errors
/// When the tables are too small. Sizes are those of `before`; the document's matter only when tables
/// are made.
pub fn plan(desired: &Desired<'_>, before: &Tables) -> Result<Plan, PlanError> {
    plan_again(desired, before, &mut Rings::default())
}

/// The same as [`plan`], and the same result, but rings that `rings` remembers are not built again: with
/// thousands of services most of a plan's time.
///
/// # Errors
/// As [`plan`].
pub fn plan_again(desired: &Desired<'_>, before: &Tables, rings: &mut Rings) -> Result<Plan, PlanError> {
    let mut steps = Steps::default();
    everywhere(desired, before, &mut steps);
    let services = services::assign(desired, before, &mut steps)?;
    let sources = sources::lay_out(desired, before, &mut steps)?;
    let backends = backends::assign(desired, before, &services, &sources, &mut steps)?;
    rules::write(&services, before, &mut steps)?;
    rings.keep(&services);
    let due = rings::write(desired, before, &services, &backends, rings, &mut steps)?;
    services::lead(desired, before, &services, &mut steps);
    Ok(Plan { ops: steps.in_order(before), due })
}

/// When an operation's turn comes. Read from the top, each stage finds what it relies on in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// What an interrupted plan left behind, and what stands in the way of an index, goes. Nothing
    /// leads there.
    Clear,
    /// What holds for all packets.
    Everywhere,
    /// Sources, before the backends that name them.
    Sources,
    /// Connections that write to a server which is not the primary any more are cut.
    Fence,
    /// No packet sees it as it was: from here on nothing is written there.
    Fenced,
    /// Backends, before the slots that lead to them.
    Backends,
    /// Rule sets, in fresh places.
    Rules,
    /// What slots remember, before the rings that make them ask.
    Sides,
    /// Rings, in fresh places.
    Pages,
    /// New services, which nothing leads to yet.
    Services,
    /// Each service turns to its firewall.
    Firewalls,
    /// Each service turns to its ring.
    Rings,
    /// Addresses lead to services on all ports, or not any more.
    Vips,
    /// Listeners lead to services.
    Keys,
    /// Listeners lead to services no more.
    Unkey,
    /// Addresses are VIPs no more.
    Unvip,
    /// Nothing leads to these services.
    Unserve,
    /// Packets that saw what was before have gone.
    Settle,
    /// No packet counts by the time-outs of before.
    Count,
    /// Slots fade: no packet sees them as they were led before.
    Fade,
    /// No slot leads to these backends: now their flows may be cut.
    Retire,
    /// Nothing leads to these backends, and no flow names them.
    Unback,
    /// Nothing leads to these rule sets.
    Unrule,
    /// No backend sends by these interfaces.
    Uninterface,
}

/// The operations so far, each with its stage.
#[derive(Default)]
struct Steps {
    ops: Vec<(Stage, Op)>,
}

impl Steps {
    fn add(&mut self, stage: Stage, op: Op) {
        self.ops.push((stage, op));
    }

    fn in_order(mut self, before: &Tables) -> Vec<Op> {
        // The pages of a ring that was switched away from may be written by the next plan.
        let leaves_pages = |op: &Op| match op {
            Op::SwitchRing { service, .. } => {
                before.services.get(service).is_some_and(|service| !service.ring.slots.is_empty())
            }
            _ => false,
        };
        if self
            .ops
            .iter()
            .any(|(stage, op)| *stage > Stage::Settle || *stage == Stage::Unserve || leaves_pages(op))
        {
            self.add(Stage::Settle, Op::Settle);
        }
        if self.ops.iter().any(|(stage, _)| *stage == Stage::Fence) {
            self.add(Stage::Fenced, Op::Settle);
        }
        // Stable: within a stage the order of adding stays.
        self.ops.sort_by_key(|(stage, _)| *stage);
        self.ops.dedup_by(|next, op| (&next.1, &op.1) == (&Op::CountAnew, &Op::CountAnew));
        self.ops.into_iter().map(|(_, op)| op).collect()
    }
}

fn everywhere(desired: &Desired<'_>, before: &Tables, steps: &mut Steps) {
    let settings = &desired.config.settings;
    let globals = Globals {
        hash_key: desired.hash_key,
        idle: settings.idle,
        resets_per_second: settings.resets_per_second,
        same_interface_tx: desired.same_interface_tx,
    }
    .in_ticks();
    let (idle, known) = (globals.idle, before.globals.as_ref());
    if known != Some(&globals) || before.recount {
        steps.add(Stage::Everywhere, Op::SetGlobals(globals));
    }
    if before.recount || known.is_some_and(|known| known.idle != idle) {
        steps.add(Stage::Count, Op::CountAnew);
    }
    for (&index, &mac) in desired.interfaces {
        if before.interfaces.get(&index) != Some(&mac) {
            steps.add(Stage::Everywhere, Op::SetInterface { index, mac });
        }
    }
    for &index in before.interfaces.keys() {
        if !desired.interfaces.contains_key(&index) {
            steps.add(Stage::Uninterface, Op::RemoveInterface { index });
        }
    }
}
