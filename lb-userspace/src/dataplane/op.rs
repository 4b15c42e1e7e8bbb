//! The changes that tables can be asked for.

use std::{fmt, net::IpAddr, sync::Arc};

use lb_common::abi::{RingAt, Slot, Standing};

use super::{BackendEntry, Firewall, Globals, Mode, RuleSet, SideEntry, SourceEntry, VipEntry};
use crate::model::Listen;

/// One change of the tables.
///
/// The order in which [`crate::plan`] gives them is safe for packets in between; a data plane applies
/// them as they come.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// What holds for all packets.
    SetGlobals(Globals),
    /// What translated connections were written down with is made to mean now, after a change of the time-outs or
    /// of a source that no packet sees any more as it was ([`Tables::recount`](super::Tables::recount)).
    CountAnew,
    /// Our MAC address on an interface.
    SetInterface {
        /// Interface index.
        index: u32,
        /// The address.
        mac: [u8; 6],
    },
    /// An interface is not ours any more.
    RemoveInterface {
        /// Interface index.
        index: u32,
    },
    /// Writes an address to send from, and leads its address here. An address that the entry had before
    /// leads nowhere, unless another entry has it.
    WriteSource {
        /// Index of the entry.
        index: u32,
        /// What it says.
        source: SourceEntry,
    },
    /// Frees an entry that no backend names. Its address leads nowhere, unless another entry has it.
    RemoveSource {
        /// Index of the entry.
        index: u32,
    },
    /// Writes an entry that no slot leads to yet, or whose new contents are good for its flows too.
    WriteBackend {
        /// Index of the entry.
        index: u32,
        /// What it says.
        backend: BackendEntry,
    },
    /// Frees an entry that no slot leads to. Its generation is remembered.
    RemoveBackend {
        /// Index of the entry.
        index: u32,
    },
    /// Writes a ring to pages that no service leads to.
    WritePages {
        /// First of the pages.
        first_page: u32,
        /// What it leads to.
        slots: Arc<[Slot]>,
    },
    /// Writes the sides of slots that are settled in every ring in force.
    WriteSides {
        /// First of the side pages.
        first_side: u32,
        /// Numbers of slots, and what they are to remember.
        sides: Arc<[(u32, SideEntry)]>,
    },
    /// Changes how far slots are that are not settled: one store each.
    SetStandings {
        /// First of the side pages.
        first_side: u32,
        /// Numbers of slots, and how far they are from now on.
        standings: Arc<[(u32, Standing)]>,
    },
    /// The same, at the end of the time of who had slots before; those that have lost a connection since the
    /// plan, or less than `quiet` ticks before it, stay as they are.
    EndMoving {
        /// First of the side pages.
        first_side: u32,
        /// Numbers of slots, and how far they are from now on, since the time of the plan.
        standings: Arc<[(u32, Standing)]>,
        /// For how many ticks nothing must have been lost.
        quiet: u32,
    },
    /// Writes a set of rules whose number is free.
    WriteRules {
        /// Number of the set.
        set: u32,
        /// All its rules.
        rules: RuleSet,
    },
    /// Removes a set of rules that no service leads to.
    RemoveRules {
        /// Number of the set.
        set: u32,
    },
    /// Makes a service that no packet is led to yet: without a ring, without a firewall.
    WriteService {
        /// Index of the entry.
        index: u32,
        /// Where it listens.
        listen: Listen,
        /// How packets get to its backends.
        mode: Mode,
    },
    /// Changes how packets get to a service's backends.
    SwitchMode {
        /// Index of the service.
        service: u32,
        /// How from now on.
        mode: Mode,
    },
    /// Leads a service to a ring that has been written: one store.
    SwitchRing {
        /// Index of the service.
        service: u32,
        /// Where the ring is; without slots: no backend.
        ring: RingAt,
    },
    /// Says which ring slots may ask for that remember [`Standing::BY_OLD_RING`].
    SwitchOldRing {
        /// Index of the service.
        service: u32,
        /// Where that ring is; without slots: nobody asks.
        ring: RingAt,
    },
    /// Leads a service to a rule set that has been written: one store.
    SwitchFirewall {
        /// Index of the service.
        service: u32,
        /// The rules that hold from now on.
        firewall: Firewall,
    },
    /// Frees a service that no packet is led to.
    RemoveService {
        /// Index of the service.
        index: u32,
    },
    /// Makes an address a VIP, or changes what its other ports lead to.
    SetVip {
        /// The address.
        address: IpAddr,
        /// What it leads to.
        vip: VipEntry,
    },
    /// An address is a VIP no more.
    RemoveVip {
        /// The address.
        address: IpAddr,
    },
    /// Leads packets to a service. Never a listener on all ports: those are led by their VIP.
    SetKey {
        /// Where it listens.
        listen: Listen,
        /// Index of the service.
        service: u32,
    },
    /// Leads packets to that service no more.
    RemoveKey {
        /// Where it listened.
        listen: Listen,
    },
    /// Waits until every packet that may have seen the tables as they were before has been handled, so
    /// that what nothing leads to any more may be changed (in the kernel: an RCU grace period).
    Settle,
}

/// In words, without what would fill pages: for a person who wants to know what is about to be done.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetGlobals(_) => f.write_str("write what holds for all packets"),
            Self::CountAnew => f.write_str("count the times of translated connections by the new time-outs"),
            Self::SetInterface { index, .. } => write!(f, "write our MAC address on interface {index}"),
            Self::RemoveInterface { index } => write!(f, "forget our MAC address on interface {index}"),
            Self::WriteSource { index, source } => {
                write!(f, "write source {index}: {}, ports {}", source.address, source.ports)
            }
            Self::RemoveSource { index } => write!(f, "free source {index}"),
            Self::WriteBackend { index, backend } => {
                write!(f, "write backend {index} of service {}: ", backend.service)?;
                match backend.address {
                    Some(address) => write!(f, "{address}")?,
                    None => f.write_str("this host")?,
                }
                match backend.flows {
                    super::FlowsOf::Keep => Ok(()),
                    super::FlowsOf::Forget => f.write_str(", its connections are forgotten"),
                    super::FlowsOf::Cut => f.write_str(", its connections are cut"),
                }
            }
            Self::RemoveBackend { index } => write!(f, "free backend {index}"),
            Self::WritePages { first_page, slots } => {
                write!(f, "write a ring of {} slots to page {first_page} and on", slots.len())
            }
            Self::WriteSides { first_side, sides } => {
                write!(
                    f,
                    "{} slots of side page {first_side} and on begin to remember who had them",
                    sides.len()
                )
            }
            Self::SetStandings { first_side, standings } | Self::EndMoving { first_side, standings, .. } => {
                let fading = standings.iter().filter(|(_, standing)| standing.fading).count();
                let moving = standings.len() - fading;
                write!(f, "of side page {first_side} and on, {moving} slots move and {fading} fade")
            }
            Self::WriteRules { set, rules } => write!(f, "write rule set {set}, {} rules", rules.len()),
            Self::RemoveRules { set } => write!(f, "free rule set {set}"),
            Self::WriteService { index, listen, .. } => write!(f, "write service {index}: {listen}"),
            Self::SwitchMode { service, .. } => write!(f, "switch the mode of service {service}"),
            Self::SwitchRing { service, ring } => {
                write!(f, "switch service {service} to the ring on page {}", ring.first_page)
            }
            Self::SwitchOldRing { service, ring } if ring.slots == 0 => {
                write!(f, "service {service} gives up its ring of another size")
            }
            Self::SwitchOldRing { service, ring } => {
                write!(f, "service {service} keeps the ring on page {} to ask", ring.first_page)
            }
            Self::SwitchFirewall { service, .. } => write!(f, "switch the firewall of service {service}"),
            Self::RemoveService { index } => write!(f, "free service {index}"),
            Self::SetVip { address, .. } => write!(f, "lead packets to {address}"),
            Self::RemoveVip { address } => write!(f, "lead packets to {address} no more"),
            Self::SetKey { listen, service } => write!(f, "lead {listen} to service {service}"),
            Self::RemoveKey { listen } => write!(f, "lead {listen} nowhere"),
            Self::Settle => f.write_str("wait until no packet sees what was before"),
        }
    }
}
