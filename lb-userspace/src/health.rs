//! Which backends are usable: the state machine of health, and when to probe.
//!
//! Pure: probe results and time come in; transitions, changed verdicts and alarms go out. Probing itself
//! is done elsewhere.
//!
//! Health never breaks what works: a backend that turns unhealthy gets no new connections and keeps its
//! own, and when all of a pool fail at once the last usable set stays in use and an alarm is raised.

mod cluster;
mod machine;
mod role;
mod schedule;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

pub use self::{
    cluster::{Cluster, Doubt, Lag},
    machine::Health,
    role::{Observation, Says},
    schedule::Schedule,
};
use crate::{
    dataplane::{BackendEntry, FlowsOf, Tables},
    model::{BackendAddress, Config, Role},
};

/// Verdicts on every backend of every pool, by the pool's name.
pub type Verdicts = BTreeMap<String, PoolVerdicts>;

/// Verdicts on the backends of one pool: for services that take any, and for those that want a role. Who
/// takes writes is no matter of opinion, so what is right for one is wrong for the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolVerdicts {
    /// For services that take any.
    pub any: BackendVerdicts,
    /// For services that want the primary; empty where nobody knows roles.
    pub primary: BackendVerdicts,
    /// For services that want replicas; empty where nobody knows roles.
    pub replica: BackendVerdicts,
    /// Clients that want the primary while there is none are to wait, rather than be told so.
    pub holds: bool,
}

/// Verdicts on backends.
pub type BackendVerdicts = BTreeMap<BackendAddress, Verdict>;

impl PoolVerdicts {
    /// Those for a service that wants this role.
    pub const fn of(&self, role: Option<Role>) -> &BackendVerdicts {
        match role {
            None => &self.any,
            Some(Role::Primary) => &self.primary,
            Some(Role::Replica) => &self.replica,
        }
    }

    fn of_mut(&mut self, role: Option<Role>) -> &mut BackendVerdicts {
        match role {
            None => &mut self.any,
            Some(Role::Primary) => &mut self.primary,
            Some(Role::Replica) => &mut self.replica,
        }
    }

    /// What is said of a backend for any service.
    fn on(&self, backend: BackendAddress) -> impl Iterator<Item = &Verdict> {
        [&self.any, &self.primary, &self.replica].into_iter().filter_map(move |of_role| of_role.get(&backend))
    }
}

impl FromIterator<(BackendAddress, Verdict)> for PoolVerdicts {
    /// Where nobody knows roles.
    fn from_iter<I: IntoIterator<Item = (BackendAddress, Verdict)>>(verdicts: I) -> Self {
        Self { any: verdicts.into_iter().collect(), ..Self::default() }
    }
}

/// What is to be done with a backend now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// It gets new connections.
    pub usable: bool,
    /// It is believed dead: a handshake without an answer may go elsewhere.
    pub dead: bool,
    /// What becomes of its connections.
    pub flows: FlowsOf,
    /// Tenths of its weight that count: fewer than [`Verdict::WHOLE`] while it starts slowly.
    pub share: u16,
}

impl Verdict {
    /// All of the weight.
    pub const WHOLE: u16 = 10;

    /// It gets new connections.
    pub const USABLE: Self = Self { usable: true, dead: false, flows: FlowsOf::Keep, share: Self::WHOLE };
    /// It gets no new connections and keeps those it has.
    pub const RESTING: Self = Self { usable: false, ..Self::USABLE };

    /// A backend's weight as it counts now, in tenths.
    pub const fn weigh(self, weight: u16) -> u16 {
        weight.saturating_mul(self.share)
    }
}

/// How a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Not one probe has succeeded yet: no traffic.
    Starting,
    /// In use.
    Healthy,
    /// Its probes fail.
    Unhealthy,
    /// No new connections, by the operator's wish; those it has may end.
    Draining,
    /// Drained: its connections have ended, or the deadline has passed.
    Drained,
    /// Taken out by the operator; its connections are reset.
    Disabled,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Disabled => "disabled",
        })
    }
}

/// The time, as both clocks tell it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Since the daemon started, by a clock that nobody sets.
    pub uptime: Duration,
    /// Seconds since 1970-01-01T00:00:00Z, for deadlines that last over restarts.
    pub epoch: u64,
}

/// A backend of a pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The pool's name.
    pub pool: String,
    /// Which of its backends.
    pub backend: BackendAddress,
}

/// What came of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A backend is in another state.
    Transition {
        /// Which one.
        key: Key,
        /// The state before; `None`: it was not there.
        from: Option<State>,
        /// The state now.
        to: State,
    },
    /// The verdicts on a pool have changed: time for a plan.
    Verdicts {
        /// The pool.
        pool: String,
    },
    /// All backends of a pool fail. Raised once, until it is over.
    AllFailed {
        /// The pool.
        pool: String,
        /// Those that stay in use nevertheless; none where the document says `panic = "fail"`.
        kept: Vec<BackendAddress>,
    },
    /// Not all backends of a pool fail any more.
    AllFailedOver {
        /// The pool.
        pool: String,
    },
    /// A server says otherwise of its role than before.
    Role {
        /// Which one.
        key: Key,
        /// What it was; `None`: nobody had asked.
        from: Option<Says>,
        /// All that it said.
        said: Observation,
    },
    /// Writes go elsewhere.
    Primary {
        /// The pool.
        pool: String,
        /// Who had them; `None`: nobody.
        from: Option<BackendAddress>,
        /// Who has them; `None`: nobody.
        to: Option<BackendAddress>,
        /// The whole decision.
        why: String,
    },
    /// More than one says that it is the primary; `None`: not any more.
    Doubt {
        /// The pool.
        pool: String,
        /// Who.
        doubt: Option<Doubt>,
    },
}

/// What was known of the document's backends before a restart, from the tables: unknown health is as
/// before. Backends that have no entry are left out.
pub fn remembered(config: &Config, tables: &Tables) -> Verdicts {
    let by_listen: BTreeMap<_, _> =
        tables.services.iter().map(|(&index, entry)| (entry.listen, index)).collect();
    let mut by_service: BTreeMap<u32, Vec<(u32, &BackendEntry)>> = BTreeMap::new();
    for (&index, entry) in &tables.backends {
        by_service.entry(entry.service).or_default().push((index, entry));
    }
    let mut verdicts = Verdicts::new();
    for service in config.services.values() {
        let Some((index, pool)) = by_listen.get(&service.listen).zip(config.pools.get(&service.pool)) else {
            continue;
        };
        let led: BTreeSet<u32> = tables
            .services
            .get(index)
            .map(|entry| entry.ring.slots.iter().map(|slot| slot.backend()).collect())
            .unwrap_or_default();
        let of_pool = verdicts.entry(service.pool.clone()).or_default().of_mut(service.role);
        let entries: BTreeMap<_, _> = by_service
            .get(index)
            .into_iter()
            .flatten()
            .map(|&(number, entry)| ((entry.address, entry.port), (number, entry)))
            .collect();
        for backend in &pool.backends {
            let identity = match backend.address {
                BackendAddress::Local => (None, None),
                BackendAddress::Remote(ip, port) => (Some(ip), port),
            };
            if let Some((number, entry)) = entries.get(&identity) {
                let usable = led.contains(number);
                let verdict = Verdict { usable, dead: entry.dead, flows: entry.flows, ..Verdict::USABLE };
                of_pool.entry(backend.address).or_insert(verdict);
            }
        }
    }
    verdicts
}
