//! What becomes of a packet. Every way out of [`crate::datapath::decide`] is named here, has a counter,
//! and a fixture that provokes it.

/// What happened to a connection's record. Counted beside the verdict of the packet that did it.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Note {
    /// A new connection was written down.
    Recorded,
    /// An older one was, since its slot is about to be another backend's.
    Adopted,
    /// There was no room to write one down.
    Refused,
}

impl Note {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 3] = [Self::Recorded, Self::Adopted, Self::Refused];

    /// The index of its counter, behind those of verdicts.
    #[inline(always)]
    pub const fn counter(self) -> usize {
        Verdict::COUNTERS + self as usize
    }

    /// The name in counters, metrics and answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Recorded => "record_new",
            Self::Adopted => "record_adopted",
            Self::Refused => "record_refused",
        }
    }
}

/// Number of counters: of verdicts, then of notes.
pub const COUNTERS: usize = Verdict::COUNTERS + Note::ALL.len();

/// What the program does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Out by this interface, to a backend, as the service's mode says.
    ToBackend {
        /// Interface index.
        interface: u32,
    },
    /// A backend's packet translated back, out by this interface, to the client.
    ToClient {
        /// Interface index.
        interface: u32,
    },
    /// The frame has been made into a TCP reset, of this many bytes, for who sent it: out by the
    /// interface it came from.
    Reset {
        /// Why.
        reason: ResetReason,
        /// Length of the frame now, in bytes; what lies behind is to be cut off.
        length: u16,
    },
    /// To the host's own stack, untouched.
    Pass(PassReason),
    /// Nowhere.
    Drop(DropReason),
}

macro_rules! reasons {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$meta])*
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// All of them, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name in counters, metrics and answers.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }
    };
}

reasons! {
    /// Why a connection is reset.
    ResetReason {
        /// A SYN, and no backend is usable.
        NoBackend = "reset_no_backend",
        /// In the middle of a connection that is not known: ended, timed out, or never ours.
        UnknownFlow = "reset_unknown_flow",
        /// The backend's connections are being cut, because of how it was taken out.
        Cut = "reset_cut",
    }
}

reasons! {
    /// Why a packet is the host's to handle.
    PassReason {
        /// Neither IPv4 nor IPv6 (ARP and the like), or too short to tell.
        NotIp = "pass_not_ip",
        /// To a group or to all.
        NotUnicast = "pass_not_unicast",
        /// To an address of no service.
        NotVip = "pass_not_vip",
        /// To a service's address, on a port of no service; or, where the host has the address too, of a
        /// protocol of no service.
        NoService = "pass_no_service",
        /// ICMP to a service's address: the host answers echo, and needs neighbour discovery.
        Icmp = "pass_icmp",
        /// The backend is this host itself.
        Local = "pass_local",
    }
}

reasons! {
    /// Why a packet is dropped.
    DropReason {
        /// To a service's address, and cut short.
        Truncated = "drop_truncated",
        /// To a service's address, with a header that contradicts itself.
        Malformed = "drop_malformed",
        /// To a service's address, in fragments.
        Fragment = "drop_fragment",
        /// To a service's address, of a protocol that no service has.
        UnknownProtocol = "drop_unknown_protocol",
        /// The service's firewall says no.
        Denied = "drop_denied",
        /// No backend is usable: UDP, or TCP where clients are to ask again rather than be refused.
        NoBackend = "drop_no_backend",
        /// A reset was due, but this second's share is used up.
        ResetLimit = "drop_reset_limit",
        /// A reset for a connection that is not known: nothing answers a reset.
        StrayReset = "drop_stray_reset",
        /// All ways of the flow's bucket hold live connections.
        TableFull = "drop_table_full",
        /// No free source port in reach.
        NoPort = "drop_no_port",
        /// Two CPUs met the same new connection at once, and this one stepped back.
        Race = "drop_race",
        /// The backend, or the client, has no next hop.
        NoNextHop = "drop_no_next_hop",
        /// TTL or hop limit used up.
        TtlExceeded = "drop_ttl_exceeded",
        /// A reply that should carry a VLAN tag and does not, or the other way round.
        Vlan = "drop_vlan",
        /// The tables contradict one another; a defect of ours, never of a packet.
        Tables = "drop_tables",
    }
}

impl Verdict {
    const RESETS: usize = 2;
    const PASSES: usize = Self::RESETS + ResetReason::ALL.len();
    const DROPS: usize = Self::PASSES + PassReason::ALL.len();
    /// Number of counters.
    pub const COUNTERS: usize = Self::DROPS + DropReason::ALL.len();

    /// The index of its counter.
    #[inline(always)]
    pub const fn counter(self) -> usize {
        match self {
            Self::ToBackend { .. } => 0,
            Self::ToClient { .. } => 1,
            Self::Reset { reason, .. } => Self::RESETS + reason as usize,
            Self::Pass(reason) => Self::PASSES + reason as usize,
            Self::Drop(reason) => Self::DROPS + reason as usize,
        }
    }

    /// Its name in counters, metrics and answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ToBackend { .. } => "to_backend",
            Self::ToClient { .. } => "to_client",
            Self::Reset { reason, .. } => reason.name(),
            Self::Pass(reason) => reason.name(),
            Self::Drop(reason) => reason.name(),
        }
    }

    /// The names of all counters, by index.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ["to_backend", "to_client"]
            .into_iter()
            .chain(ResetReason::ALL.iter().map(|r| r.name()))
            .chain(PassReason::ALL.iter().map(|r| r.name()))
            .chain(DropReason::ALL.iter().map(|r| r.name()))
    }
}

impl From<PassReason> for Verdict {
    #[inline(always)]
    fn from(reason: PassReason) -> Self {
        Self::Pass(reason)
    }
}

impl From<DropReason> for Verdict {
    #[inline(always)]
    fn from(reason: DropReason) -> Self {
        Self::Drop(reason)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::{collections::BTreeSet, vec::Vec};

    #[test]
    fn each_verdict_has_a_counter_and_a_name_of_its_own() {
        let mut all = std::vec![Verdict::ToBackend { interface: 1 }, Verdict::ToClient { interface: 1 }];
        all.extend(ResetReason::ALL.iter().map(|&reason| Verdict::Reset { reason, length: 54 }));
        all.extend(PassReason::ALL.iter().map(|&r| Verdict::Pass(r)));
        all.extend(DropReason::ALL.iter().map(|&r| Verdict::Drop(r)));
        assert_eq!(
            all.iter().map(|v| v.counter()).collect::<Vec<_>>(),
            (0..Verdict::COUNTERS).collect::<Vec<_>>()
        );
        let names: Vec<_> = Verdict::names().collect();
        assert_eq!(all.iter().map(|v| v.name()).collect::<Vec<_>>(), names);
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), Verdict::COUNTERS);
    }
}
