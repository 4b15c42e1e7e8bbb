//! Which backends are usable: the state machine of health, and when to probe.
//!
//! Pure: probe results and time come in; transitions, changed verdicts and alarms go out. Who does the
//! probing is [`crate`]'s `probe`.
//!
//! Health never breaks what works: a backend that turns unhealthy gets no new connections and keeps its
//! own, and when all of a pool fail at once the last usable set stays in use and an alarm is raised.

use std::{collections::BTreeMap, fmt};

use crate::{dataplane::FlowsOf, model::BackendAddress};

/// Verdicts on every backend of every pool, by the pool's name.
pub type Verdicts = BTreeMap<String, PoolVerdicts>;

/// Verdicts on the backends of one pool.
pub type PoolVerdicts = BTreeMap<BackendAddress, Verdict>;

/// What is to be done with a backend now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// It gets new connections.
    pub usable: bool,
    /// It is believed dead: a handshake without an answer may go elsewhere.
    pub dead: bool,
    /// What becomes of its connections.
    pub flows: FlowsOf,
}

impl Verdict {
    /// It gets new connections.
    pub const USABLE: Self = Self { usable: true, dead: false, flows: FlowsOf::Keep };
    /// It gets no new connections and keeps those it has.
    pub const RESTING: Self = Self { usable: false, dead: false, flows: FlowsOf::Keep };
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
