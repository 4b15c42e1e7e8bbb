//! Records: connections that are written down, sixteen bytes each. Of one that is not translated the record
//! says the backend; of one that is, also the address and port that its packets are sent from.

use super::{Idle, Tick};
use crate::shared::Shared;

/// Ways of a bucket of [`Records`].
pub const RECORD_WAYS: usize = 4;

/// One cache line of records.
#[repr(C, align(64))]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Records {
    /// The ways.
    pub ways: [Way; RECORD_WAYS],
}

/// A place for one record.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Way {
    /// The 64-bit keyed hash of the connection; [`Record::EMPTY`] or [`Record::BUSY`].
    pub key: Shared<u64>,
    /// A [`Record`].
    pub value: Shared<u64>,
}

/// How far a connection is, as far as its client's packets tell.
///
/// Of a translated connection both sides' packets tell: then it is half open until both have answered the other,
/// and closed when both have sent FIN, or one RST.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// UDP.
    Datagrams = 0,
    /// TCP: a SYN was seen, and nothing after it.
    HalfOpen = 1,
    /// TCP: more was seen.
    Established = 2,
    /// TCP: the client has sent FIN or RST.
    Closed = 3,
}

/// What is written down of a connection: one word, replaced as a whole, so that no reader sees half of it.
///
/// | | 0..2 | 2 | 3..23 | 23..32 | 32..64 |
/// |---|---|---|---|---|---|
/// | open | state | 0 | backend | generation | when it was seen |
/// | half open | state | 0 | backend | when, in steps | the initial sequence number |
///
/// | | 0..2 | 2 | 3..23 | 23..27 | 27..43 | 43..51 | 51..58 | 58..64 |
/// |---|---|---|---|---|---|---|---|---|
/// | translated | state | 1 | backend | generation | port | source | when, in steps | client's hop |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record(pub u64);

impl Record {
    /// In place of a key: nothing is here.
    pub const EMPTY: u64 = 0;
    /// In place of a key: somebody is writing here.
    pub const BUSY: u64 = 1;

    /// In place of a value: whoever wrote this is taking the record away.
    pub const GONE: Self = Self(u64::MAX);

    /// Backends have indices below two to this.
    pub const BACKEND_BITS: u32 = 20;
    const BACKEND_AT: u32 = 3;
    const BACKEND: u64 = (1 << Self::BACKEND_BITS) - 1;
    const TRANSLATED: u64 = 1 << 2;
    const SHORT_AT: u32 = Self::BACKEND_AT + Self::BACKEND_BITS;
    const SHORT_BITS: u32 = 9;
    const SHORT: u32 = (1 << Self::SHORT_BITS) - 1;
    /// A half-open record's time is in steps of two to this many ticks, 1.07 s.
    const STEP_BITS: u32 = 4;

    /// Fewer bits of the generation than elsewhere: a record of an earlier use would have to outlive sixteen
    /// uses of the entry, and the backend it leads to then does not know the connection either.
    const GENERATION: u32 = 0xf;
    const PORT_AT: u32 = Self::SHORT_AT + 4;
    const SOURCE_AT: u32 = Self::PORT_AT + 16;
    const SEEN_AT: u32 = Self::SOURCE_AT + Self::SOURCE_BITS;
    /// Sources have indices below two to this.
    pub const SOURCE_BITS: u32 = 8;
    const TIME_BITS: u32 = 7;
    const TIME: u32 = (1 << Self::TIME_BITS) - 1;

    /// The key of a hash: another one for the two that mean something else.
    #[inline(always)]
    pub const fn key(hash: u64) -> u64 {
        if hash <= Self::BUSY { hash + 2 } else { hash }
    }

    /// A record of a connection that is not half open, seen `now`.
    #[inline(always)]
    pub const fn open(state: State, backend: u32, generation: u32, now: Tick) -> Self {
        Self(
            state as u64
                | (backend as u64 & Self::BACKEND) << Self::BACKEND_AT
                | ((generation & Self::SHORT) as u64) << Self::SHORT_AT
                | (now.0 as u64) << 32,
        )
    }

    /// A record of a connection of which a SYN with this sequence number was seen `now`.
    #[inline(always)]
    pub const fn half_open(backend: u32, sequence: u32, now: Tick) -> Self {
        Self(
            State::HalfOpen as u64
                | (backend as u64 & Self::BACKEND) << Self::BACKEND_AT
                | ((now.0 >> Self::STEP_BITS & Self::SHORT) as u64) << Self::SHORT_AT
                | (sequence as u64) << 32,
        )
    }

    /// A record of a translated connection, of which nothing is said yet as to when it was seen: its packets
    /// are sent from this port (network order) of this source.
    #[inline(always)]
    pub const fn translated(backend: u32, generation: u32, source: u32, port: u16) -> Self {
        Self(
            Self::TRANSLATED
                | (backend as u64 & Self::BACKEND) << Self::BACKEND_AT
                | ((generation & Self::GENERATION) as u64) << Self::SHORT_AT
                | (port as u64) << Self::PORT_AT
                | (source as u64 & ((1 << Self::SOURCE_BITS) - 1)) << Self::SOURCE_AT,
        )
    }

    /// A translated connection's record in this state, seen at this time (in steps of that state).
    #[inline(always)]
    pub const fn told(self, state: State, time: u32) -> Self {
        let rest = self.0 & !(3 | (Self::TIME as u64) << Self::SEEN_AT);
        Self(rest | state as u64 | ((time & Self::TIME) as u64) << Self::SEEN_AT)
    }

    /// The same record, of a connection whose client's packets come by this hop.
    #[inline(always)]
    pub const fn by(self, hop: Hop) -> Self {
        const HOP_AT: u32 = Record::SEEN_AT + Record::TIME_BITS;
        Self(self.0 & ((1 << HOP_AT) - 1) | (hop.0 as u64) << HOP_AT)
    }

    /// Whether the connection is translated.
    #[inline(always)]
    pub const fn is_translated(self) -> bool {
        self.0 & Self::TRANSLATED != 0
    }

    /// Whether it is translated, and to the same backend from the same source and port as another.
    #[inline(always)]
    pub const fn names_flow_of(self, other: Self) -> bool {
        const NAMES: u64 = ((1 << Record::SEEN_AT) - 1) & !3;
        self.is_translated() && (self.0 ^ other.0) & NAMES == 0
    }

    /// The port that a translated connection's packets are sent from, network order.
    #[inline(always)]
    pub const fn port(self) -> u16 {
        (self.0 >> Self::PORT_AT) as u16
    }

    /// Index of the source that a translated connection's packets are sent from.
    #[inline(always)]
    pub const fn source(self) -> u32 {
        (self.0 >> Self::SOURCE_AT) as u32 & ((1 << Self::SOURCE_BITS) - 1)
    }

    /// How far the connection is.
    #[inline(always)]
    pub const fn state(self) -> State {
        State::of_bits(self.0)
    }

    /// Index of its backend.
    #[inline(always)]
    pub const fn backend(self) -> u32 {
        (self.0 >> Self::BACKEND_AT & Self::BACKEND) as u32
    }

    /// Whether it can be of the backend's use with this generation: nine bits of it are kept, and none while
    /// it is half open; of a translated connection always four.
    #[inline(always)]
    pub const fn is_of(self, generation: u32) -> bool {
        let differs = (self.0 >> Self::SHORT_AT) as u32 ^ generation;
        if self.is_translated() {
            differs & Self::GENERATION == 0
        } else {
            matches!(self.state(), State::HalfOpen) || differs & Self::SHORT == 0
        }
    }

    /// The sequence number of its SYN; means something only while it is half open.
    #[inline(always)]
    pub const fn sequence(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// For how many ticks it has not been seen, at least; of a half-open one it may be a second more. Means
    /// something only if it is not translated.
    #[inline(always)]
    pub const fn idle(self, now: Tick) -> u32 {
        if matches!(self.state(), State::HalfOpen) {
            let then = (self.0 >> Self::SHORT_AT) as u32 & Self::SHORT;
            let steps = (now.0 >> Self::STEP_BITS).wrapping_sub(then) & Self::SHORT;
            // It was seen anywhere within its step.
            let step = (1 << Self::STEP_BITS) - 1;
            // Another CPU's clock may have been in the next one already.
            let steps = if steps == Self::SHORT { 0 } else { steps };
            ((steps << Self::STEP_BITS) + (now.0 & step)).saturating_sub(step)
        } else {
            now.since(Tick((self.0 >> 32) as u32))
        }
    }

    /// For how many steps a translated connection has not been seen, modulo 128; none if that was in the next
    /// one, which another CPU's clock may have been in already.
    #[inline(always)]
    pub const fn steps_idle(self, now: Tick, steps: u32) -> u32 {
        let then = (self.0 >> Self::SEEN_AT) as u32;
        let idle = self.state().time(now, steps).wrapping_sub(then) & Self::TIME;
        if idle == Self::TIME { 0 } else { idle }
    }

    /// How long it may be idle before another connection may take its place, in ticks. Means something only if
    /// it is not translated.
    ///
    /// What the client has ended is not kept for long, though the server may still be sending: while slots
    /// change hands, room is worth more.
    #[inline(always)]
    pub fn span(self, idle: &Idle) -> u32 {
        // No longer than a half-open one's short time can tell.
        const LONGEST: u32 = (Record::SHORT - 2) << Record::STEP_BITS;
        let span = self.state().span(idle);
        if matches!(self.state(), State::HalfOpen) && span > LONGEST { LONGEST } else { span }
    }

    /// The same record, seen `now`.
    #[inline(always)]
    pub const fn seen(self, state: State, generation: u32, now: Tick) -> Self {
        Self::open(state, self.backend(), generation, now)
    }
}

impl State {
    /// The state that the lower two bits say.
    #[inline(always)]
    pub const fn of_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Datagrams,
            1 => Self::HalfOpen,
            2 => Self::Established,
            _ => Self::Closed,
        }
    }

    /// How long a connection in this state may be idle, in ticks.
    #[inline(always)]
    pub fn span(self, idle: &Idle) -> u32 {
        match self {
            Self::Datagrams => idle.udp.get(),
            Self::HalfOpen => idle.half_open.get(),
            Self::Established => idle.established.get(),
            Self::Closed => idle.closed.get(),
        }
    }

    /// How many ticks are a step in this state, as a power of two; `steps` is [`Idle::steps`].
    #[inline(always)]
    pub const fn step(self, steps: u32) -> u32 {
        steps >> (8 * self as u32) & 31
    }

    /// The time in steps of this state.
    #[inline(always)]
    pub const fn time(self, now: Tick, steps: u32) -> u32 {
        now.0 >> self.step(steps) & Record::TIME
    }
}

impl Idle {
    /// In [`Idle::steps`]: the lengths are being changed, and no record of a translated connection can be said to
    /// have been silent for too long.
    pub const CHANGING: u32 = 1 << 31;

    /// The length of the steps in which translated connections say when they were seen: as short as seven bits
    /// allow that must count twice the idle time-out.
    #[cfg(any(test, feature = "user", feature = "sim"))]
    pub fn needed_steps(&self) -> u32 {
        let states = [State::Datagrams, State::HalfOpen, State::Established, State::Closed];
        states.into_iter().fold(0, |steps, state| {
            let (all, span) = (u64::from(Record::TIME) + 1, u64::from(state.span(self)));
            let step = (0..31).find(|step| all << step >= 2 * span).unwrap_or(31);
            steps | step << (8 * state as u32)
        })
    }

    /// Whether records count in the steps that these time-outs need.
    #[cfg(any(test, feature = "user", feature = "sim"))]
    pub fn is_counted(&self) -> bool {
        self.steps.get() == self.needed_steps()
    }

    /// Sets the length of the steps to what the time-outs need. If that changes it, it goes on changing, and
    /// nothing is over, until [`Idle::count_anew`].
    #[cfg(any(test, feature = "user", feature = "sim"))]
    pub fn set_steps(&self) {
        if !self.is_counted() {
            self.steps.set(self.needed_steps() | Self::CHANGING);
        }
    }

    /// Makes what records of translated connections say mean now, and ends the change of the steps: none is over
    /// before its time, some last longer. The next packet of each client has a look at its flow, as if it came by
    /// another hop: the flow, too, was told when it ends by the time-outs of before.
    ///
    /// Nobody may be left who tells the time by the steps of before (an RCU grace period after
    /// [`Idle::set_steps`]). Done again after half of it, it comes to the same.
    #[cfg(any(test, feature = "user", feature = "sim"))]
    pub fn count_anew<'a>(&self, records: impl Iterator<Item = &'a Records>, now: Tick) {
        let steps = self.needed_steps();
        for way in records.flat_map(|line| &line.ways) {
            let (key, record) = (way.key.get(), Record(way.value.get()));
            if key > Record::BUSY && record.is_translated() && record != Record::GONE {
                let state = record.state();
                // Who comes between has looked at the flow just now.
                way.value.swap(record.0, record.told(state, state.time(now, steps)).by(Hop::NOBODY).0);
            }
        }
        self.steps.set(steps);
    }
}

/// By whom a client's packets come, as six bits: enough to notice most changes. Of two hops one in 63 pairs
/// looks alike; then the flow learns of the change in the next step of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop(u8);

impl Hop {
    /// No packet comes by it.
    pub const NOBODY: Self = Self(0);

    /// Of the word that [`Flow::client_hop`](super::Flow::client_hop) is, and the interface.
    #[inline(always)]
    pub const fn of(hop: u64, interface: u32) -> Self {
        // Of the golden ratio, as in Fibonacci hashing (Knuth, volume 3, section 6.4).
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        let six = ((hop ^ (interface as u64) << 20).wrapping_mul(SPREAD) >> 58) as u8;
        if six == Self::NOBODY.0 { Self(1) } else { Self(six) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_say_what_was_put_in(backend in 0u32..1 << 20, generation: u32, sequence: u32, now: u32) {
            for state in [State::Datagrams, State::Established, State::Closed] {
                let record = Record::open(state, backend, generation, Tick(now));
                prop_assert_eq!((record.state(), record.backend()), (state, backend));
                prop_assert!(record.is_of(generation) && !record.is_of(generation ^ 1));
                prop_assert_eq!(record.idle(Tick(now).after(77)), 77);
            }
            let record = Record::half_open(backend, sequence, Tick(now));
            prop_assert_eq!((record.state(), record.backend()), (State::HalfOpen, backend));
            prop_assert_eq!(record.sequence(), sequence);
        }

        #[test]
        fn a_half_open_records_time_is_short_by_less_than_a_step(now: u32, later in 0u32..8000) {
            let idle = Record::half_open(1, 2, Tick(now)).idle(Tick(now).after(later));
            prop_assert!(idle <= later && later < idle + 16, "{idle} for {later}");
        }

        #[test]
        fn what_was_seen_by_a_clock_that_is_ahead_was_seen_now(now in 1000u32.., steps in 0u32..1 << 24) {
            let steps = steps & 0x0f0f_0f0f;
            prop_assert_eq!(Record::half_open(1, 2, Tick(now).after(1)).idle(Tick(now)), 0);
            for state in [State::Datagrams, State::HalfOpen, State::Established, State::Closed] {
                let seen = Record::translated(1, 2, 3, 4).told(state, state.time(Tick(now).after(1), steps));
                prop_assert_eq!(seen.steps_idle(Tick(now), steps), 0);
            }
        }

        #[test]
        fn a_translated_record_says_what_was_put_in(
            backend in 0u32..(1 << 20) - 1,
            generation: u32,
            source in 0u32..256,
            port: u16,
            now in 0u32..1 << 31,
            steps in 0u32..1 << 24,
        ) {
            let steps = steps & 0x0f0f_0f0f;
            let hop = Hop::of(u64::from(generation), now);
            let new = Record::translated(backend, generation, source, port);
            for state in [State::Datagrams, State::HalfOpen, State::Established, State::Closed] {
                let record = new.told(State::Closed, 77).by(hop).told(state, state.time(Tick(now), steps));
                prop_assert_eq!((record.state(), record.backend()), (state, backend));
                prop_assert_eq!((record.source(), record.port()), (source, port));
                prop_assert!(record.is_translated() && record != Record::GONE);
                prop_assert!(record.is_of(generation) && !record.is_of(generation ^ 8));
                let later = Tick(now).after(5 << state.step(steps));
                prop_assert_eq!(record.steps_idle(later, steps), 5);
                prop_assert_eq!(record.by(hop), record);
            }
        }

        #[test]
        fn steps_can_count_twice_the_time_out(udp: u32, half_open in 0u32..1000, established: u32) {
            let idle = Idle::default();
            idle.udp.set(udp >> 2);
            idle.half_open.set(half_open);
            idle.established.set(established >> 2);
            idle.set_steps();
            prop_assert!(!idle.is_counted() && idle.steps.get() & Idle::CHANGING != 0);
            idle.count_anew([].iter(), Tick(0));
            prop_assert!(idle.is_counted());
            let steps = idle.steps.get();
            for state in [State::Datagrams, State::HalfOpen, State::Established] {
                let span = state.span(&idle);
                let all = 128u64 << state.step(steps);
                prop_assert!(all >= 2 * u64::from(span) && (all < 4 * u64::from(span) || all == 128));
            }
        }

        #[test]
        fn a_key_is_neither_empty_nor_busy(hash: u64) {
            prop_assert!(Record::key(hash) > Record::BUSY);
            prop_assert_eq!(Record::key(hash) == hash, hash > 1);
        }
    }
}
