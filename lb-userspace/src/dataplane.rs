//! The tables as the daemon sees them: a copy of what they hold, and the operations that change them.
//!
//! [`Tables`] is plain data and the ground truth of [`crate::plan`]: at a start it is read back from
//! the pinned maps, so that a restart is the same thing as a reload. [`Dataplane`] has two
//! implementations: the kernel's maps, and memory for tests and simulation.

use std::{collections::BTreeMap, net::IpAddr};

use crate::model::{Idle, Limits, Listen, Network, PortRange};

/// What the tables hold, without what packets put there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// Sizes, as the maps were made.
    pub limits: Limits,
    /// What holds for all packets.
    pub globals: Option<Globals>,
    /// Services by index.
    pub services: BTreeMap<u32, ServiceEntry>,
    /// Which service's index each listener leads to.
    pub keys: BTreeMap<Listen, u32>,
    /// Addresses with services, and whether the host has them too.
    pub vips: BTreeMap<IpAddr, VipEntry>,
    /// Backends by index.
    pub backends: BTreeMap<u32, BackendEntry>,
    /// Source addresses by index.
    pub sources: BTreeMap<u32, SourceEntry>,
    /// Rules by set.
    pub rules: BTreeMap<u32, RuleSet>,
}

/// What holds for all packets.
#[derive(Clone, Debug, PartialEq)]
pub struct Globals {
    /// Key of the hash.
    pub hash_key: [u64; 2],
    /// Idle time-outs.
    pub idle: Idle,
    /// Resets a second and CPU.
    pub resets_per_second: u32,
    /// Whether XDP_TX may be used (not on veth).
    pub same_interface_tx: bool,
}

/// A service in the tables.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceEntry {
    /// Where it listens.
    pub listen: Listen,
    /// Slots are taken in turn.
    pub round_robin: bool,
    /// First page of its ring.
    pub first_page: u32,
    /// Its ring: backend indices, or [`lb_common::abi::NO_BACKEND`].
    pub ring: Vec<u32>,
    /// Its rule set; zero: none.
    pub rule_set: u32,
    /// Sources that no rule names are denied.
    pub deny_others: bool,
}

/// An address with services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipEntry {
    /// Service for all other TCP ports.
    pub any_tcp: Option<u32>,
    /// Service for all other UDP ports.
    pub any_udp: Option<u32>,
    /// The host has the address too.
    pub shared: bool,
}

/// A backend of one service, in the tables.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendEntry {
    /// Index of its service.
    pub service: u32,
    /// Its address; `None`: this host.
    pub address: Option<IpAddr>,
    /// Its port; `None`: the one that the client called.
    pub port: Option<u16>,
    /// Count of the uses of this index.
    pub generation: u32,
    /// The way there; `None`: not known now.
    pub next_hop: Option<NextHop>,
    /// First and number of its sources.
    pub sources: (u32, u32),
    /// What becomes of the flows it has.
    pub flows: FlowsOf,
}

/// What becomes of the flows of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlowsOf {
    /// They go on.
    #[default]
    Keep,
    /// They are reset.
    Cut,
    /// They are forgotten.
    Forget,
}

/// The way to a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextHop {
    /// Interface index.
    pub interface: u32,
    /// Our MAC address there.
    pub own_mac: [u8; 6],
    /// The neighbour's.
    pub mac: [u8; 6],
}

/// An address to send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceEntry {
    /// The address.
    pub address: IpAddr,
    /// Its ports.
    pub ports: PortRange,
}

/// The firewall of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet {
    /// What may come in.
    pub allow: Vec<Network>,
    /// What may not.
    pub deny: Vec<Network>,
}
