//! Rings: which slot of a service leads to which backend, and what a slot remembers after it has changed
//! hands.
//!
//! A slot is **settled** or not. A packet of a settled slot goes where the slot says, and nothing is looked
//! up. A slot that is not has a [`Side`], which tells who had it before; see [`crate::datapath::unsettled`].

use super::Tick;
use crate::shared::Shared;

/// Slots of one page of rings.
pub const PAGE_SLOTS: usize = 1024;

/// A slot without a backend.
pub const NO_BACKEND: u32 = u32::MAX >> 1;

/// A page of a ring: [`Slot`]s.
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Page {
    /// The slots.
    pub slots: [Shared<u32>; PAGE_SLOTS],
}

/// One slot of a ring, as it stands there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub u32);

impl Slot {
    const UNSETTLED: u32 = 1 << 31;

    /// A slot that leads to the backend of this index, or to [`NO_BACKEND`].
    #[inline(always)]
    pub const fn settled(backend: u32) -> Self {
        Self(backend)
    }

    /// A slot that has changed hands of late, and leads new connections to this backend.
    #[inline(always)]
    pub const fn unsettled(backend: u32) -> Self {
        Self(backend | Self::UNSETTLED)
    }

    /// Whether nothing else need be looked at.
    #[inline(always)]
    pub const fn is_settled(self) -> bool {
        self.0 & Self::UNSETTLED == 0
    }

    /// Index of the backend that new connections are for, or [`NO_BACKEND`].
    #[inline(always)]
    pub const fn backend(self) -> u32 {
        self.0 & !Self::UNSETTLED
    }
}

/// Where a ring is: one word, so that one store switches a service to another ring, with all that belongs
/// to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAt {
    /// Number of slots, below 2²⁴. Zero: no ring, no backend.
    pub slots: u32,
    /// First of its [`Page`]s, below 2²⁰.
    pub first_page: u32,
    /// First of its [`SidePage`]s, below 2²⁰ - 1; `None`: every slot is settled.
    pub first_side: Option<u32>,
}

impl RingAt {
    /// Bits of the number of slots.
    pub const SLOT_BITS: u32 = 24;
    /// Bits of the number of a page.
    pub const PAGE_BITS: u32 = 20;

    /// As it is kept: slots in the lowest bits, then the first page, then the first side page plus one.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        let side = match self.first_side {
            Some(first) => first as u64 + 1,
            None => 0,
        };
        self.slots as u64
            | (self.first_page as u64) << Self::SLOT_BITS
            | side << (Self::SLOT_BITS + Self::PAGE_BITS)
    }

    /// The opposite of [`RingAt::to_word`].
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        const PAGE: u64 = (1 << RingAt::PAGE_BITS) - 1;
        let side = (word >> (Self::SLOT_BITS + Self::PAGE_BITS)) as u32;
        Self {
            slots: (word & ((1 << Self::SLOT_BITS) - 1)) as u32,
            first_page: (word >> Self::SLOT_BITS & PAGE) as u32,
            first_side: if side == 0 { None } else { Some(side - 1) },
        }
    }

    /// The slot that a connection belongs to, by the upper half of its hash.
    #[inline(always)]
    pub const fn slot(self, tag: u32) -> u32 {
        // Multiply and shift: even over any number of slots, without a division (Lemire, "Fast random
        // integer generation in an interval", 2019).
        ((tag as u64 * self.slots as u64) >> 32) as u32
    }
}

/// What a slot that is not settled remembers. Not in the ring: rings are switched, and a packet that still
/// sees the one before must write to the same place.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Side {
    /// A [`Standing`], written by the daemon; packets only ever end a phase, by compare-and-swap.
    pub standing: Shared<u64>,
    /// No record of before this counts: while the slot was settled, nobody kept them true.
    pub unsettled_since: Shared<Tick>,
    /// When a packet was last sent to another backend than the slot's. Written by packets.
    pub last_elsewhere: Shared<Tick>,
    /// When a connection could last not be written down. Written by packets.
    pub lost_at: Shared<Tick>,
    /// Zero.
    pub reserved: Shared<u32>,
}

/// How far a slot is that has changed hands: who had it before, whether connections that are not written
/// down are still that backend's, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The backend before, [`NO_BACKEND`], or [`Standing::BY_OLD_RING`].
    pub before: u32,
    /// Whether the slot fades: what is not written down is the slot's own by now. Else it is moving.
    pub fading: bool,
    /// When the slot began to move, or to fade.
    pub since: Tick,
}

impl Standing {
    /// In place of a backend: the one of the connection's slot in [`super::Service::old_ring`].
    pub const BY_OLD_RING: u32 = NO_BACKEND - 1;

    const FADING: u32 = 1 << 31;

    /// Whether connections that are not written down go where the old ring says.
    #[inline(always)]
    pub const fn asks_old_ring(self) -> bool {
        !self.fading && self.before == Self::BY_OLD_RING
    }

    /// As it is kept: all that changes together in one word.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        let fading = if self.fading { Self::FADING } else { 0 };
        (self.before | fading) as u64 | (self.since.0 as u64) << 32
    }

    /// The opposite of [`Standing::to_word`].
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        let low = word as u32;
        Self {
            before: low & !Self::FADING,
            fading: low & Self::FADING != 0,
            since: Tick((word >> 32) as u32),
        }
    }
}

/// The sides of as many slots as a [`Page`] has.
#[repr(C)]
#[derive(Clone, Debug, PartialEq)]
pub struct SidePage {
    /// One for each slot.
    pub sides: [Side; PAGE_SLOTS],
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_say_what_was_put_in(
            slots in 0u32..1 << 24, page in 0u32..1 << 20, side in proptest::option::of(0u32..(1 << 20) - 1),
            before in 0..=NO_BACKEND, fading: bool, since: u32,
        ) {
            let ring = RingAt { slots, first_page: page, first_side: side };
            prop_assert_eq!(RingAt::from_word(ring.to_word()), ring);
            let standing = Standing { before, fading, since: Tick(since) };
            prop_assert_eq!(Standing::from_word(standing.to_word()), standing);
            prop_assert_eq!(Slot::unsettled(before).backend(), before);
            prop_assert!(!Slot::unsettled(before).is_settled() && Slot::settled(before).is_settled());
        }

        #[test]
        fn every_tag_has_a_slot(slots in 1u32..1 << 24, tag: u32) {
            let ring = RingAt { slots, ..RingAt::default() };
            prop_assert!(ring.slot(tag) < slots);
        }
    }
}
