//! Each row of the table of rules, on tables with one slot.

extern crate std;

use super::*;
use crate::{
    abi::{RECORD_WAYS, SidePage},
    sim::MemTables,
};

/// The backend before, the slot's own, and another that records may name.
const BEFORE: u32 = 1;
const OWN: u32 = 2;
const OTHER: u32 = 3;
/// Any connection.
const HASH: u64 = 0x1234_5678_9abc_def0;
/// When the slot changed hands.
const CHANGED: Tick = Tick(100_000);
/// When a change is not fresh any more.
const LATER: Tick = CHANGED.after(FRESH);
const ESTABLISHED: u32 = 1000;
const HALF_OPEN: u32 = 300;
const CLOSED: u32 = 150;

/// What packets are.
const SYN: u8 = Tcp::SYN;
const ACK: u8 = Tcp::ACK;
const FIN: u8 = Tcp::FIN | Tcp::ACK;
const RST: u8 = Tcp::RST;

struct World {
    tables: MemTables,
}

impl World {
    fn new(fading: bool) -> Self {
        let mut tables = MemTables::new(1, 4, 1, 2);
        tables.sides.push(SidePage { sides: core::array::from_fn(|_| Side::default()) });
        let idle = &tables.config.idle;
        idle.established.set(ESTABLISHED);
        idle.half_open.set(HALF_OPEN);
        idle.closed.set(CLOSED);
        idle.udp.set(ESTABLISHED / 2);
        for backend in &tables.backends {
            backend.flags.set(Backend::IN_USE);
            backend.generation.set(7);
        }
        let side = &tables.sides[0].sides[0];
        side.standing.set(Standing { before: BEFORE, fading, since: CHANGED }.to_word());
        side.unsettled_since.set(CHANGED);
        World { tables }
    }

    fn moving() -> Self {
        Self::new(false)
    }

    fn fading() -> Self {
        Self::new(true)
    }

    /// Where a packet of [`HASH`] goes.
    fn send(&self, flags: u8, sequence: u32, now: Tick) -> u32 {
        self.send_of(HASH, flags, sequence, now)
    }

    fn send_of(&self, hash: u64, flags: u8, sequence: u32, now: Tick) -> u32 {
        let asked = Asked { own: OWN, flags, udp: false }.to_word();
        let at = At { slot: 0, first_side: 0, service: 0 }.to_word();
        choose(&self.tables, at, hash, asked, sequence, now.0) as u32
    }

    /// The same, of a slot that is another backend's by now.
    fn send_to(&self, own: u32, flags: u8, sequence: u32, now: Tick) -> u32 {
        let asked = Asked { own, flags, udp: false }.to_word();
        let at = At { slot: 0, first_side: 0, service: 0 }.to_word();
        choose(&self.tables, at, HASH, asked, sequence, now.0) as u32
    }

    /// Where a SYN goes that has seen the slot as it was.
    fn first_having_seen(&self, word: u64, own: u32) -> u32 {
        let standing = Standing::from_word(word);
        let case = Case {
            tables: &self.tables,
            side: self.side(),
            lines: self.lines(),
            service: 0,
            asked: Asked { own, flags: SYN, udp: false },
            standing,
            before: standing.before,
            sequence: 500,
            now: LATER,
        };
        case.choose(Record::key(HASH), word)
    }

    fn datagram(&self, now: Tick) -> u32 {
        let asked = Asked { own: OWN, flags: 0, udp: true }.to_word();
        choose(&self.tables, At { slot: 0, first_side: 0, service: 0 }.to_word(), HASH, asked, 0, now.0)
            as u32
    }

    fn lines(&self) -> Lines<'_> {
        Lines::of(&self.tables, Record::key(HASH), &self.tables.config).unwrap()
    }

    fn record(&self) -> Option<Record> {
        self.lines().find(Record::key(HASH)).map(|found| found.record)
    }

    /// Writes down what the connection of [`HASH`] is.
    fn knows(self, record: Record) -> Self {
        let key = Record::key(HASH);
        assert_eq!(self.lines().insert(&self.tables, key, record, LATER), Ok(()));
        self
    }

    /// Fills both lines with live connections of others.
    fn full(self) -> Self {
        for number in 0..2 * RECORD_WAYS {
            let way = &self.tables.records[number / RECORD_WAYS].ways[number % RECORD_WAYS];
            way.key.set(1000 + number as u64);
            way.value.set(Record::open(State::Established, OTHER, 7, LATER).0);
        }
        self
    }

    fn flagged(self, backend: u32, flag: u16) -> Self {
        self.tables.backends[backend as usize].flags.set(Backend::IN_USE | flag);
        self
    }

    fn side(&self) -> &Side {
        &self.tables.sides[0].sides[0]
    }

    fn notes(&self) -> [u64; 3] {
        Note::ALL.map(|note| self.tables.verdicts.borrow()[note.counter()])
    }
}

fn open(backend: u32, now: Tick) -> Record {
    Record::open(State::Established, backend, 7, now)
}

#[test]
fn a_new_connection_goes_to_the_slots_own_backend_and_is_written_down() {
    let world = World::moving();
    assert_eq!(world.send(SYN, 500, LATER), OWN);
    assert_eq!(world.record(), Some(Record::half_open(OWN, 500, LATER)));
    assert_eq!(world.side().last_elsewhere.get(), Tick(0));
    // Its first packet makes it an open one.
    assert_eq!(world.send(ACK, 501, LATER.after(1)), OWN);
    assert_eq!(world.record(), Some(open(OWN, LATER.after(1))));
    assert_eq!(world.notes(), [1, 0, 0]);
}

#[test]
fn while_the_change_is_fresh_it_may_be_a_syn_that_is_sent_again() {
    let early = CHANGED.after(FRESH - 1);
    let world = World::moving();
    assert_eq!(world.send(SYN, 500, early), BEFORE);
    assert_eq!(world.record(), Some(Record::half_open(BEFORE, 500, early)));
    assert_eq!(world.side().last_elsewhere.get(), early);
    // Not to one that is dead.
    assert_eq!(World::moving().flagged(BEFORE, Backend::DEAD).send(SYN, 500, early), OWN);
}

#[test]
fn a_syn_without_room_stays_where_it_would_have_gone() {
    let world = World::moving().full();
    assert_eq!(world.send(SYN, 500, LATER), BEFORE);
    assert_eq!((world.record(), world.notes()), (None, [0, 0, 1]));
    assert!(!Standing::from_word(world.side().standing.get()).fading);
    assert_eq!(world.side().lost_at.get(), LATER, "or it would fade before the next packet");
}

#[test]
fn a_syn_that_is_sent_again_and_finds_room_goes_where_it_went_without() {
    for (age, goes_to) in [(1, BEFORE), (FRESH - 1, BEFORE), (FRESH, OWN)] {
        let world = World::moving().full();
        assert_eq!(world.send(SYN, 500, LATER), BEFORE);
        world.tables.records[0].ways[0].key.set(Record::EMPTY);
        let again = LATER.after(age);
        assert_eq!(world.send(SYN, 500, again), goes_to, "after {age}");
        assert_eq!(world.record(), Some(Record::half_open(goes_to, 500, again)));
    }
}

#[test]
fn with_no_room_and_nobody_alive_before_the_slot_moves_from_its_own_backend() {
    let world = World::moving().full().flagged(BEFORE, Backend::DEAD);
    assert_eq!(world.send(SYN, 500, LATER), OWN);
    let standing = Standing { before: OWN, fading: false, since: LATER };
    assert_eq!(Standing::from_word(world.side().standing.get()), standing);
    assert_eq!(world.side().lost_at.get(), LATER, "or a plan from before could let it fade");
    // The ring is switched to a third backend by a plan that had looked before.
    assert_eq!(world.send_to(OTHER, ACK, 501, LATER), OWN);
    assert_eq!(world.send_to(OTHER, SYN, 500, LATER), OWN);
}

#[test]
fn whoever_says_first_whose_such_a_slot_is_is_followed() {
    let world = World::moving().full().flagged(BEFORE, Backend::DEAD);
    let seen = world.side().standing.get();
    // Two packets have seen the same, one of them the ring of before.
    assert_eq!(world.first_having_seen(seen, OWN), OWN);
    assert_eq!(world.first_having_seen(seen, OTHER), OWN);
    world.side().standing.set(Standing { before: NO_BACKEND, fading: true, since: LATER }.to_word());
    assert_eq!(world.first_having_seen(seen, OTHER), OTHER);
}

#[test]
fn a_syn_follows_an_open_record_while_its_backend_lives() {
    for fading in [false, true] {
        let world = World::new(fading).knows(open(OTHER, LATER));
        assert_eq!(world.send(SYN, 500, LATER), OTHER, "fading {fading}");
        assert_eq!(world.record(), Some(open(OTHER, LATER)));
        for gone in [Backend::DEAD, Backend::CUT, Backend::FORGET] {
            let world = World::new(fading).knows(open(OTHER, LATER)).flagged(OTHER, gone);
            assert_eq!(world.send(SYN, 500, LATER), OWN, "fading {fading}, flag {gone}");
            let written = (!fading).then(|| Record::half_open(OWN, 500, LATER));
            assert_eq!(world.record(), written, "fading {fading}, flag {gone}");
        }
    }
}

#[test]
fn a_syn_sent_again_brings_its_new_sequence_number() {
    let world = World::moving().knows(Record::half_open(OTHER, 400, LATER));
    assert_eq!(world.send(SYN, 500, LATER.after(16)), OTHER);
    assert_eq!(world.record(), Some(Record::half_open(OTHER, 500, LATER.after(16))));
}

#[test]
fn a_syn_after_the_end_chooses_anew() {
    let closed = Record::open(State::Closed, OTHER, 7, LATER);
    let world = World::moving().knows(closed);
    assert_eq!(world.send(SYN, 500, LATER), OWN);
    assert_eq!(world.record(), Some(Record::half_open(OWN, 500, LATER)));
    let world = World::fading().knows(closed);
    assert_eq!((world.send(SYN, 500, LATER), world.record()), (OWN, None));
}

#[test]
fn a_fading_slot_writes_nothing_new_down() {
    let world = World::fading();
    for flags in [SYN, ACK, FIN, RST] {
        assert_eq!(world.send(flags, 500, LATER), OWN);
        assert_eq!((world.record(), world.side().last_elsewhere.get()), (None, Tick(0)));
    }
}

#[test]
fn an_open_connection_goes_on_where_it_is() {
    for fading in [false, true] {
        let later = LATER.after(SEEN_EVERY);
        let world = World::new(fading).knows(open(OTHER, LATER));
        assert_eq!(world.send(ACK, 9, later), OTHER);
        assert_eq!(world.record(), Some(open(OTHER, later)));
        assert_eq!(world.side().last_elsewhere.get(), later);
        // Dead or not: it may be a blip.
        let world = World::new(fading).knows(open(OTHER, LATER)).flagged(OTHER, Backend::DEAD);
        assert_eq!(world.send(ACK, 9, later), OTHER);
        for flags in [FIN, RST] {
            let world = World::new(fading).knows(open(OTHER, LATER));
            assert_eq!(world.send(flags, 9, LATER), OTHER);
            assert_eq!(world.record(), Some(Record::open(State::Closed, OTHER, 7, LATER)));
            // And what comes after the end goes there as well.
            assert_eq!(world.send(ACK, 9, LATER), OTHER);
        }
    }
}

#[test]
fn data_may_overtake_the_end_of_the_handshake_and_other_data_may_not() {
    let half_open = || World::moving().knows(Record::half_open(OWN, 500, LATER));
    for (sequence, goes_to) in
        [(501, OWN), (500 + FIRST_REACH, OWN), (501 + FIRST_REACH, BEFORE), (500, BEFORE)]
    {
        let world = half_open();
        assert_eq!(world.send(ACK, sequence, LATER.after(3)), goes_to, "sequence number {sequence}");
        let lost = if goes_to == BEFORE { LATER.after(3) } else { Tick(0) };
        assert_eq!(world.side().lost_at.get(), lost);
    }
    let fading = World::fading().knows(Record::half_open(OTHER, 500, LATER));
    assert_eq!((fading.send(ACK, 9000000, LATER), fading.side().lost_at.get()), (OWN, Tick(0)));
}

#[test]
fn a_connection_from_before_is_adopted() {
    for (flags, state) in [(ACK, State::Established), (FIN, State::Closed)] {
        let world = World::moving();
        assert_eq!(world.send(flags, 9, LATER), BEFORE);
        assert_eq!(world.record(), Some(Record::open(state, BEFORE, 7, LATER)));
        assert_eq!((world.side().last_elsewhere.get(), world.notes()), (LATER, [0, 1, 0]));
    }
    let world = World::moving();
    assert_eq!((world.send(RST, 9, LATER), world.record()), (BEFORE, None));
}

#[test]
fn one_that_cannot_be_adopted_is_a_loss() {
    let world = World::moving().full();
    assert_eq!(world.send(ACK, 9, LATER), BEFORE);
    assert_eq!((world.side().lost_at.get(), world.notes()), (LATER, [0, 0, 1]));
}

#[test]
fn a_record_from_before_the_slot_was_settled_does_not_count() {
    let stale = Tick(CHANGED.0 - 1);
    let world = World::moving().knows(open(OTHER, stale));
    assert_eq!(world.send(ACK, 9, LATER), BEFORE);
    assert_eq!(world.record(), Some(open(BEFORE, LATER)));
    assert_eq!(World::fading().knows(open(OTHER, stale)).send(ACK, 9, LATER), OWN);
    assert_eq!(World::moving().knows(open(OTHER, CHANGED)).send(ACK, 9, LATER), OTHER);
}

#[test]
fn while_a_slot_fades_a_record_means_nothing_after_its_time() {
    let span = |udp| if udp { ESTABLISHED / 2 } else { ESTABLISHED };
    for (udp, state, flags) in
        [(false, State::Established, ACK), (false, State::Established, SYN), (true, State::Datagrams, 0)]
    {
        for (age, goes_to) in [(span(udp) + SEEN_EVERY - 1, OTHER), (span(udp) + SEEN_EVERY, OWN)] {
            let record = Record::open(state, OTHER, 7, LATER);
            let send = |world: &World, now| if udp { world.datagram(now) } else { world.send(flags, 9, now) };
            let world = World::fading().knows(record);
            assert_eq!(send(&world, LATER.after(age)), goes_to, "{state:?}, {flags:#x}, after {age}");
            // While it moves, it is better than no word of a connection, and UDP has begun anew.
            let world = World::moving().knows(record);
            let goes_to = if udp && goes_to == OWN { BEFORE } else { OTHER };
            assert_eq!(send(&world, LATER.after(age)), goes_to, "{state:?}, {flags:#x}, after {age}");
        }
    }
}

#[test]
fn a_record_from_when_the_service_translated_does_not_count() {
    // Of the same backend, and seen for ever, were it read as another's.
    let record = Record::translated(OTHER, 7, 0xff, 0xffff).told(State::Established, 0x7f);
    let world = World::new(true).knows(record);
    assert_eq!(world.send(ACK, 501, LATER), OWN);
    assert_eq!(world.send(SYN, 500, LATER), OWN);
}

#[test]
fn a_record_of_a_backend_that_is_gone_does_not_count() {
    for gone in [0, Backend::IN_USE | Backend::FORGET] {
        let world = World::moving().knows(open(OTHER, LATER));
        world.tables.backends[OTHER as usize].flags.set(gone);
        assert_eq!(world.send(ACK, 9, LATER), BEFORE);
    }
    let world = World::moving().knows(open(OTHER, LATER));
    world.tables.backends[OTHER as usize].generation.set(8);
    assert_eq!(world.send(ACK, 9, LATER), BEFORE);
}

#[test]
fn only_what_has_timed_out_gives_way() {
    let spans =
        [(State::Established, ESTABLISHED), (State::Closed, CLOSED), (State::Datagrams, ESTABLISHED / 2)];
    for (state, span) in spans {
        for (age, fits) in [(span - 1, false), (span, true)] {
            let world = World::moving().full();
            let now = LATER.after(age);
            world.tables.records[1].ways[2].value.set(Record::open(state, OTHER, 7, LATER).0);
            for way in world.tables.records.iter().flat_map(|line| &line.ways) {
                if Record(way.value.get()).state() == State::Established && state != State::Established {
                    way.value.set(open(OTHER, now).0);
                }
            }
            assert_eq!(world.send(SYN, 1, now), if fits { OWN } else { BEFORE }, "{state:?} after {age}");
        }
    }
}

#[test]
fn of_translated_connections_one_that_is_half_open_gives_way() {
    for (state, fits) in [(State::Established, false), (State::HalfOpen, true), (State::Closed, true)] {
        let world = World::moving().full();
        let time = state.time(LATER, world.tables.config.idle.steps.get());
        let record = Record::translated(OTHER, 7, 1, 1000).told(state, time);
        world.tables.records[1].ways[2].value.set(record.0);
        assert_eq!(world.send(SYN, 1, LATER), if fits { OWN } else { BEFORE }, "{state:?}");
    }
}

#[test]
fn both_lines_are_used_and_no_connection_is_lost_between_them() {
    let world = World::moving();
    // The same line for all, and another key for each.
    let hashes = (0..2 * RECORD_WAYS as u64).map(|number| HASH ^ (number + 1) << 40);
    for hash in hashes.clone() {
        assert_eq!(world.send_of(hash, SYN, 1, LATER), OWN);
    }
    for hash in hashes {
        assert_eq!(world.send_of(hash, ACK, 2, LATER), OWN);
    }
    assert_eq!(world.send(SYN, 1, LATER), BEFORE);
    assert_eq!(world.notes(), [2 * RECORD_WAYS as u64, 0, 1]);
}

#[test]
fn datagrams_are_adopted_and_go_on() {
    let world = World::moving();
    assert_eq!(world.datagram(LATER), BEFORE);
    assert_eq!(world.record(), Some(Record::open(State::Datagrams, BEFORE, 7, LATER)));
    world.side().standing.set(Standing { before: BEFORE, fading: true, since: LATER }.to_word());
    assert_eq!(world.datagram(LATER), BEFORE);
    assert_eq!(World::fading().datagram(LATER), OWN);
}

#[test]
fn a_resized_ring_asks_the_old_one() {
    let world = World::moving();
    world
        .side()
        .standing
        .set(Standing { before: Standing::BY_OLD_RING, fading: false, since: CHANGED }.to_word());
    for (slot, backend) in world.tables.pages[0].slots.iter().zip([OTHER, BEFORE, OWN, OTHER]) {
        slot.set(backend);
    }
    let old = RingAt { slots: 4, first_page: 0, first_side: None };
    world.tables.services[0].old_ring.set(old.to_word());
    for (hash, backend) in [(1 << 62, BEFORE), (0, OTHER), (u64::MAX, OTHER)] {
        assert_eq!(world.send_of(hash, ACK, 9, LATER), backend);
    }
}

#[test]
fn nobody_before_is_nobody() {
    let world = World::moving();
    world.side().standing.set(Standing { before: NO_BACKEND, fading: false, since: CHANGED }.to_word());
    assert_eq!(world.send(SYN, 1, CHANGED), OWN);
    let world = World::moving();
    world.side().standing.set(Standing { before: NO_BACKEND, fading: false, since: CHANGED }.to_word());
    assert_eq!((world.send(ACK, 1, CHANGED), world.record()), (NO_BACKEND, None));
}

#[test]
fn datagrams_do_not_follow_who_cannot_answer() {
    for gone in [Backend::DEAD, Backend::CUT, Backend::FORGET] {
        let world = World::moving().flagged(BEFORE, gone);
        assert_eq!(world.datagram(LATER), OWN, "flag {gone}");
        assert_eq!(world.record(), Some(Record::open(State::Datagrams, OWN, 7, LATER)));
    }
    let known = Record::open(State::Datagrams, OTHER, 7, LATER);
    assert_eq!(World::moving().knows(known).flagged(OTHER, Backend::CUT).datagram(LATER), BEFORE);
    // Believed dead, it may be a blip: who is there stays.
    assert_eq!(World::moving().knows(known).flagged(OTHER, Backend::DEAD).datagram(LATER), OTHER);
}

#[test]
fn a_connection_that_is_cut_is_over() {
    let world = World::moving().knows(open(OTHER, LATER)).flagged(OTHER, Backend::CUT);
    assert_eq!(world.send(ACK, 9, LATER), OTHER);
    assert_eq!(world.record(), Some(Record::open(State::Closed, OTHER, 7, LATER)));
}

#[test]
fn a_record_of_another_services_backend_does_not_count() {
    let world = World::moving().knows(Record::half_open(OTHER, 500, LATER));
    world.tables.backends[OTHER as usize].service.set(1);
    assert_eq!(world.send(SYN, 500, LATER), OWN);
}

#[test]
fn with_a_ring_of_another_size_before_the_slot_does_not_fade_for_one_dead_backend() {
    let world = World::moving().full().flagged(BEFORE, Backend::DEAD);
    let standing = Standing { before: Standing::BY_OLD_RING, fading: false, since: CHANGED };
    world.side().standing.set(standing.to_word());
    world.tables.pages[0].slots[0].set(BEFORE);
    let old = RingAt { slots: 1, first_page: 0, first_side: None };
    world.tables.services[0].old_ring.set(old.to_word());
    assert_eq!(world.send(SYN, 500, LATER), OWN);
    assert_eq!(Standing::from_word(world.side().standing.get()), standing);
}
