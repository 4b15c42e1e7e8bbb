//! What becomes of each slot of a service that does not translate, so that no connection changes hands: a
//! pure state machine, see [`lb_common::datapath::unsettled`] for what packets make of it.
//!
//! ```text
//!            another backend                    quiet for T,
//!  settled ──────────────────► moving ── or back, or before is gone ──► fading
//!     ▲                          ▲                                        │ │
//!     │                          └──────────── another backend ───────────┘ │
//!     └──────────────── nobody sent elsewhere for T ────────────────────────┘
//! ```
//!
//! A service that tracks always never settles: its slots rest as moving from a backend to itself.

use lb_common::{
    abi::{NO_BACKEND, Slot, Standing, Tick},
    datapath::unsettled::SEEN_EVERY,
};

use crate::dataplane::SideEntry;

/// What holds for all slots of a service.
pub(super) struct Rules<'a> {
    pub(super) now: Tick,
    /// For how long silent connections are looked after, in ticks.
    pub(super) quiet: u32,
    /// Connections are always written down.
    pub(super) always: bool,
    /// Whether a backend's connections are given up: it is in no document any more, or they are being cut.
    pub(super) gone: &'a dyn Fn(u32) -> bool,
}

/// A packet may mark a record as seen a second late, and ticks are read late too: so much longer a slot
/// fades, in ticks.
const SLACK: u32 = 20;
const _: () =
    assert!(SLACK > SEEN_EVERY, "no packet may be sent elsewhere by a record while its slot settles");

/// What a slot is to be, and what is to be written for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) slot: Slot,
    pub(super) write: Write,
    /// When time alone will change it, if nothing else happens.
    pub(super) due: Option<Tick>,
}

impl Turn {
    /// How far the slot is once this is written, if no packet speaks against it.
    pub(super) fn standing(&self, side: SideEntry) -> Standing {
        match self.write {
            Write::Nothing => side.standing,
            Write::Side(side) => side.standing,
            Write::Before(standing)
            | Write::After(standing)
            | Write::End(standing)
            | Write::Over(standing) => standing,
        }
    }
}

/// What is to be written to a slot's side, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Write {
    Nothing,
    /// All of it, before the ring is switched.
    Side(SideEntry),
    /// How far it is, before the ring is switched.
    Before(Standing),
    /// How far it is, once no packet can see the ring of before.
    After(Standing),
    /// The same, unless a connection has been lost by then.
    End(Standing),
    /// The same, unless one has been lost since the plan looked: a packet may have given the slot to its own
    /// backend.
    Over(Standing),
}

impl Rules<'_> {
    /// What becomes of a slot that is to lead new connections to `wanted`. `side` means something only
    /// unless the slot is settled.
    pub(super) fn turn(&self, slot: Slot, side: SideEntry, wanted: u32) -> Turn {
        let own = slot.backend();
        if slot.is_settled() {
            let nothing_to_keep = own == NO_BACKEND || (self.gone)(own);
            let always = self.always && wanted != NO_BACKEND;
            return match (always, nothing_to_keep, own == wanted) {
                (true, true, _) => self.begins_to_move(wanted, wanted),
                (true, false, _) | (false, false, false) => self.begins_to_move(own, wanted),
                (false, true, _) | (false, _, true) => self.settled(wanted),
            };
        }
        if side.standing.fading { self.fading(side, own, wanted) } else { self.moving(side, own, wanted) }
    }

    /// A slot of a ring of another size than before.
    pub(super) fn resized(&self, unsettled_since: Option<Tick>, wanted: u32) -> Turn {
        let mut side = SideEntry::moving(Standing::BY_OLD_RING, self.now);
        side.unsettled_since = unsettled_since.unwrap_or(self.now);
        self.turned(wanted, Write::Side(side), Some(self.now.after(self.quiet)))
    }

    fn begins_to_move(&self, before: u32, wanted: u32) -> Turn {
        let rests = self.always && before == wanted;
        let due = (!rests).then(|| self.now.after(self.quiet));
        self.turned(wanted, Write::Side(SideEntry::moving(before, self.now)), due)
    }

    fn moving(&self, side: SideEntry, own: u32, wanted: u32) -> Turn {
        let before = side.standing.before;
        let nobodys = before == NO_BACKEND || (before != Standing::BY_OLD_RING && (self.gone)(before));
        if nobodys || before == wanted {
            if self.always && before == wanted && before != NO_BACKEND {
                // A packet may give it to its own backend, which nobody hears of.
                return self.turned(wanted, Write::Nothing, Some(self.now.after(self.quiet)));
            }
            return self.unless_lost(self.over(wanted), Write::Over);
        }
        if before == own {
            // It rested, or a change was interrupted: this one begins now.
            let standing = Standing { since: self.now, ..side.standing };
            return self.turned(wanted, Write::Before(standing), Some(self.now.after(self.quiet)));
        }
        let since = later(side.standing.since, side.lost_at);
        if self.now.since(since) >= self.quiet {
            return self.unless_lost(self.over(wanted), Write::End);
        }
        self.turned(wanted, Write::Nothing, Some(since.after(self.quiet)))
    }

    /// The same, if no packet speaks against it. Whether it was the end shows only then.
    fn unless_lost(&self, turn: Turn, write: fn(Standing) -> Write) -> Turn {
        let Write::After(standing) = turn.write else { return turn };
        Turn { write: write(standing), due: Some(self.now.after(1)), ..turn }
    }

    /// The slot has moved: what is not written down is its own from now on.
    fn over(&self, wanted: u32) -> Turn {
        if self.always && wanted != NO_BACKEND {
            let rest = Standing { before: wanted, fading: false, since: self.now };
            return self.turned(wanted, Write::After(rest), None);
        }
        self.fades(wanted)
    }

    fn fades(&self, wanted: u32) -> Turn {
        let standing = Standing { before: NO_BACKEND, fading: true, since: self.now };
        self.turned(wanted, Write::After(standing), Some(self.now.after(self.quiet + SLACK)))
    }

    fn fading(&self, side: SideEntry, own: u32, wanted: u32) -> Turn {
        if own == NO_BACKEND || (self.gone)(own) {
            let rests = own == wanted && (wanted == NO_BACKEND || !self.always);
            return if rests { self.rest_of_fading(side, wanted) } else { self.over(wanted) };
        }
        if self.always || own != wanted {
            let standing = Standing { before: own, fading: false, since: self.now };
            let due = (own != wanted).then(|| self.now.after(self.quiet));
            return self.turned(wanted, Write::Before(standing), due);
        }
        self.rest_of_fading(side, wanted)
    }

    fn rest_of_fading(&self, side: SideEntry, wanted: u32) -> Turn {
        let since = later(side.standing.since, side.last_elsewhere);
        if self.now.since(since) >= self.quiet + SLACK {
            return self.settled(wanted);
        }
        self.turned(wanted, Write::Nothing, Some(since.after(self.quiet + SLACK)))
    }

    fn turned(&self, wanted: u32, write: Write, due: Option<Tick>) -> Turn {
        Turn { slot: Slot::unsettled(wanted), write, due }
    }

    fn settled(&self, wanted: u32) -> Turn {
        Turn { slot: Slot::settled(wanted), write: Write::Nothing, due: None }
    }
}

fn later(one: Tick, other: Tick) -> Tick {
    if one.has_reached(other) { one } else { other }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Tick = Tick(10_000);
    const QUIET: u32 = 1000;
    const A: u32 = 0;
    const B: u32 = 1;
    const C: u32 = 2;
    const LOST: u32 = 9;

    fn rules(now: Tick) -> Rules<'static> {
        Rules { now, quiet: QUIET, always: false, gone: &|backend| backend == LOST }
    }

    fn always(now: Tick) -> Rules<'static> {
        Rules { always: true, ..rules(now) }
    }

    fn unsettled(turn: Turn) -> (u32, Write) {
        assert!(!turn.slot.is_settled(), "{turn:?}");
        (turn.slot.backend(), turn.write)
    }

    fn moving(before: u32) -> SideEntry {
        SideEntry::moving(before, NOW)
    }

    fn fading() -> SideEntry {
        let standing = Standing { before: NO_BACKEND, fading: true, since: NOW };
        SideEntry { standing, ..moving(NO_BACKEND) }
    }

    const FADES: fn(Tick) -> Write =
        |since| Write::After(Standing { before: NO_BACKEND, fading: true, since });
    const OVER: fn(Tick) -> Write = |since| Write::Over(Standing { before: NO_BACKEND, fading: true, since });
    const ENDS: fn(Tick) -> Write = |since| Write::End(Standing { before: NO_BACKEND, fading: true, since });

    #[test]
    fn a_settled_slot_moves_when_another_backend_has_it() {
        let turn = rules(NOW).turn(Slot::settled(A), moving(C), B);
        assert_eq!(unsettled(turn), (B, Write::Side(moving(A))));
        assert_eq!(turn.due, Some(NOW.after(QUIET)));
        let stays = rules(NOW).turn(Slot::settled(A), moving(C), A);
        assert_eq!(stays, Turn { slot: Slot::settled(A), write: Write::Nothing, due: None });
    }

    #[test]
    fn nobodys_connections_are_not_looked_after() {
        for own in [NO_BACKEND, LOST] {
            let turn = rules(NOW).turn(Slot::settled(own), moving(C), B);
            assert_eq!(turn, Turn { slot: Slot::settled(B), write: Write::Nothing, due: None });
        }
        let turn = rules(NOW).turn(Slot::unsettled(B), moving(LOST), B);
        assert_eq!((unsettled(turn), turn.due), ((B, OVER(NOW)), Some(NOW.after(1))));
    }

    #[test]
    fn the_last_backend_leaves_slowly_too() {
        let turn = rules(NOW).turn(Slot::settled(A), moving(C), NO_BACKEND);
        assert_eq!(unsettled(turn), (NO_BACKEND, Write::Side(moving(A))));
    }

    #[test]
    fn a_moving_slot_given_to_a_third_goes_on_moving_by_the_same_clock() {
        let later = NOW.after(QUIET / 2);
        let turn = rules(later).turn(Slot::unsettled(B), moving(A), C);
        assert_eq!(unsettled(turn), (C, Write::Nothing));
        assert_eq!(turn.due, Some(NOW.after(QUIET)));
    }

    #[test]
    fn a_slot_that_comes_back_fades() {
        let later = NOW.after(7);
        assert_eq!(unsettled(rules(later).turn(Slot::unsettled(B), moving(A), A)), (A, OVER(later)));
    }

    #[test]
    fn a_slot_that_a_packet_gave_to_its_own_backend_moves_from_there() {
        let later = NOW.after(7);
        let turn = rules(later).turn(Slot::unsettled(B), moving(B), C);
        let Write::Before(standing) = turn.write else { panic!("{turn:?}") };
        assert_eq!((turn.slot.backend(), standing.before), (C, B));
        assert_eq!(unsettled(rules(later).turn(Slot::unsettled(B), moving(B), B)), (B, OVER(later)));
    }

    #[test]
    fn a_loss_makes_it_move_for_longer() {
        let end = NOW.after(QUIET);
        let turn = rules(end).turn(Slot::unsettled(B), moving(A), B);
        assert_eq!((unsettled(turn), turn.due), ((B, ENDS(end)), Some(end.after(1))));
        let early = NOW.after(QUIET - 1);
        assert_eq!(unsettled(rules(early).turn(Slot::unsettled(B), moving(A), B)).1, Write::Nothing);
        let side = SideEntry { lost_at: NOW.after(5), ..moving(A) };
        let turn = rules(end).turn(Slot::unsettled(B), side, B);
        assert_eq!((turn.write, turn.due), (Write::Nothing, Some(NOW.after(QUIET + 5))));
    }

    #[test]
    fn a_fading_slot_settles_when_nobody_was_sent_elsewhere() {
        let end = NOW.after(QUIET + SLACK);
        assert_eq!(rules(end).turn(Slot::unsettled(B), fading(), B).slot, Slot::settled(B));
        let side = SideEntry { last_elsewhere: NOW.after(1), ..fading() };
        let turn = rules(end).turn(Slot::unsettled(B), side, B);
        assert_eq!((turn.slot, turn.due), (Slot::unsettled(B), Some(end.after(1))));
    }

    #[test]
    fn a_fading_slot_that_changes_hands_moves_again_and_keeps_its_history() {
        let later = NOW.after(3);
        let turn = rules(later).turn(Slot::unsettled(B), fading(), C);
        let standing = Standing { before: B, fading: false, since: later };
        assert_eq!(unsettled(turn), (C, Write::Before(standing)));
        let turn = rules(later).turn(Slot::unsettled(LOST), fading(), C);
        assert_eq!(unsettled(turn), (C, FADES(later)));
    }

    #[test]
    fn an_interrupted_change_begins_anew() {
        // The side was written, and the ring never switched.
        let later = NOW.after(QUIET * 2);
        let turn = rules(later).turn(Slot::unsettled(A), moving(A), B);
        let standing = Standing { since: later, ..moving(A).standing };
        assert_eq!(unsettled(turn), (B, Write::Before(standing)));
    }

    #[test]
    fn a_tracked_slot_rests_and_never_settles() {
        let turn = always(NOW).turn(Slot::settled(A), moving(C), A);
        assert_eq!((unsettled(turn), turn.due), ((A, Write::Side(moving(A))), None));
        let late = NOW.after(QUIET * 9);
        let turn = always(late).turn(Slot::unsettled(A), moving(A), A);
        assert_eq!((unsettled(turn), turn.due), ((A, Write::Nothing), Some(late.after(QUIET))));
        // It moves from where it rested, and then rests there.
        let (_, write) = unsettled(always(late).turn(Slot::unsettled(A), moving(A), B));
        let Write::Before(standing) = write else { panic!("{write:?}") };
        assert_eq!(standing, Standing { before: A, fading: false, since: late });
        let end = late.after(QUIET);
        let side = SideEntry { standing, ..moving(A) };
        let rest = Standing { before: B, fading: false, since: end };
        assert_eq!(unsettled(always(end).turn(Slot::unsettled(B), side, B)), (B, Write::End(rest)));
    }

    #[test]
    fn a_slot_that_is_tracked_no_more_fades() {
        let late = NOW.after(QUIET * 9);
        assert_eq!(unsettled(rules(late).turn(Slot::unsettled(A), moving(A), A)), (A, OVER(late)));
    }

    #[test]
    fn a_resized_ring_asks_the_old_one() {
        let turn = rules(NOW).resized(None, B);
        assert_eq!(unsettled(turn), (B, Write::Side(moving(Standing::BY_OLD_RING))));
        let end = NOW.after(QUIET);
        let side = moving(Standing::BY_OLD_RING);
        assert_eq!(unsettled(rules(end).turn(Slot::unsettled(B), side, B)), (B, ENDS(end)));
    }
}
