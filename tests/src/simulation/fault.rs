//! Rules left out, in the harness and not in the product: each must make the simulation turn red, or it
//! would not notice their loss.

use lb_common::{
    abi::{Record, State, Tick},
    wire::l4::Tcp,
};

use super::{packet::Packet, watch::Spot};
use crate::random::Random;

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A record is taken away for another connection where there is no room.
    Evicts,
    /// That a connection could not be written down is not remembered.
    ForgetsLosses,
    /// A SYN does not follow the record of an open connection.
    SynChoosesAnew,
    /// A backend that is believed dead loses its connections.
    DeathForgets,
    /// Whoever sends a packet is taken for whose SYN was written down.
    SequenceIgnored,
    /// Records from before the slot was last settled count.
    OldRecordsCount,
    /// Whoever has said the last word is forgotten.
    EndForgets,
    /// Slots fade and settle long before silent connections have spoken.
    SettlesEarly,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Evicts,
        Self::ForgetsLosses,
        Self::SynChoosesAnew,
        Self::DeathForgets,
        Self::SequenceIgnored,
        Self::OldRecordsCount,
        Self::EndForgets,
        Self::SettlesEarly,
    ];

    /// What it does to the records just before a packet of an unsettled slot.
    pub(super) fn strike(self, packet: &Packet, spot: &Spot<'_>, now: Tick, random: &mut Random) {
        let own = spot.own();
        match (self, own) {
            (Self::Evicts, None) if spot.is_full(now) => {
                spot.way(random.below(8) as usize).key.set(Record::EMPTY);
            }
            (Self::SynChoosesAnew, Some(way)) if packet.is_syn() => way.key.set(Record::EMPTY),
            (Self::EndForgets, Some(way)) if Record(way.value.get()).state() == State::Closed => {
                way.key.set(Record::EMPTY);
            }
            (Self::SequenceIgnored, Some(way)) if packet.flags & Tcp::SYN == 0 => {
                let record = Record(way.value.get());
                if record.state() == State::HalfOpen {
                    let expected = packet.sequence.wrapping_sub(1);
                    way.value.set(record.0 & u64::from(u32::MAX) | u64::from(expected) << 32);
                }
            }
            _ => {}
        }
    }
}
