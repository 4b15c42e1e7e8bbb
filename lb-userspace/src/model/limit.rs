//! How often requests may come by a route of the reception desk, as a document says it.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// How often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// So many, at least one.
    pub count: u32,
    /// In each such time.
    pub period: Duration,
    /// So many at once, at least one.
    pub burst: u32,
    /// For each of what.
    pub by: LimitBy,
}

/// What a limit is for each of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LimitBy {
    /// An IPv4 address, or an IPv6 network of 64 bits.
    Source,
    /// A user that is known.
    User,
    /// A value of this header; all without it are one.
    Header(String),
    /// All that come by the route together.
    Route,
}

impl fmt::Display for RateLimit {
    /// `100/s by source`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.period.as_secs() {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", self.count)?;
        match &self.by {
            LimitBy::Source => f.write_str(" by source"),
            LimitBy::User => f.write_str(" by user"),
            LimitBy::Header(name) => write!(f, " by {name}"),
            LimitBy::Route => Ok(()),
        }
    }
}
