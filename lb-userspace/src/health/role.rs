//! What a server of a cluster says of itself.

use std::{fmt, time::Duration};

/// What a server says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Says {
    /// It takes writes.
    Primary,
    /// It follows a primary.
    Replica,
    /// It answers, and is neither: a replica that is not fit, or a server that is starting.
    Neither,
}

impl fmt::Display for Says {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
            Self::Neither => "neither",
        })
    }
}

/// One answer of a server of a cluster, whatever it was asked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What it says it is.
    pub says: Says,
    /// The timeline it is on; every promotion begins a new one. `None`: it does not say.
    pub timeline: Option<u32>,
    /// How far it is, in bytes of its log: a primary has written so much, a replica has replayed so much.
    pub position: Option<u64>,
    /// How far it thinks itself behind.
    pub own_lag: Option<Duration>,
    /// A primary that is set to refuse writes.
    pub read_only: bool,
}

impl Observation {
    /// An answer that tells the role alone.
    pub const fn of(says: Says) -> Self {
        Self { says, timeline: None, position: None, own_lag: None, read_only: false }
    }

    /// It is a primary, and not one that is set to refuse writes.
    pub fn takes_writes(&self) -> bool {
        self.says == Says::Primary && !self.read_only
    }
}

impl fmt::Display for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.says)?;
        if self.read_only {
            f.write_str(", read-only")?;
        }
        match self.timeline {
            Some(timeline) => write!(f, " on timeline {timeline}"),
            None => Ok(()),
        }
    }
}
