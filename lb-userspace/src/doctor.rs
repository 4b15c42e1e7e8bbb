//! Finds what hinders Lobby on this host, names it, and says how to mend it.
//!
//! [`facts`] looks, once, at everything; what the facts mean is decided by pure functions that tests
//! feed by hand.

mod daemon;
pub mod facts;
mod host;
mod network;

use serde::{Deserialize, Serialize};

pub use facts::Facts;

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What: "rights", "interface eth0", "backend 10.0.0.11:8080".
    pub subject: String,
    /// How it is.
    pub verdict: Verdict,
    /// In words.
    pub message: String,
    /// How to mend it; empty where nothing is wrong.
    pub remedy: String,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Cannot be seen from here; what to look at elsewhere.
    Note,
    /// Works, but not as well as it could.
    Warning,
    /// Hinders.
    Problem,
}

impl Finding {
    fn good(subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            verdict: Verdict::Good,
            message: message.into(),
            remedy: String::new(),
        }
    }

    fn bad(
        verdict: Verdict,
        subject: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { subject: subject.into(), verdict, message: message.into(), remedy: remedy.into() }
    }
}

/// What the facts mean, host first, then interfaces, then backends, then what the daemon itself finds.
pub fn examine(facts: &Facts) -> Vec<Finding> {
    let mut findings = host::examine(facts);
    findings.extend(network::examine(facts));
    findings.extend(daemon::examine(facts, &findings));
    findings
}
