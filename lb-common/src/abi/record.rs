//! Records: connections whose backend is written down, sixteen bytes each.

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// UDP.
    Datagrams,
    /// TCP: a SYN was seen, and nothing after it.
    HalfOpen,
    /// TCP: more was seen.
    Established,
    /// TCP: the client has sent FIN or RST.
    Closed,
}

/// What is written down of a connection: one word, replaced as a whole, so that no reader sees half of it.
///
/// While it is half open the initial sequence number takes the place of the backend's generation and of all
/// but ten bits of the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record(pub u64);

impl Record {
    /// In place of a key: nothing is here.
    pub const EMPTY: u64 = 0;
    /// In place of a key: somebody is writing here.
    pub const BUSY: u64 = 1;

    /// Backends have indices below two to this.
    pub const BACKEND_BITS: u32 = 20;
    const BACKEND: u64 = (1 << Self::BACKEND_BITS) - 1;
    const SHORT_BITS: u32 = 10;
    const SHORT: u32 = (1 << Self::SHORT_BITS) - 1;
    /// A half-open record's time is in steps of two to this many ticks, 1.07 s.
    const STEP_BITS: u32 = 4;

    /// The key of a hash: another one for the two that mean something else.
    #[inline(always)]
    pub const fn key(hash: u64) -> u64 {
        if hash <= Self::BUSY { hash + 2 } else { hash }
    }

    /// A record of a connection that is not half open, seen `now`.
    #[inline(always)]
    pub const fn open(state: State, backend: u32, generation: u32, now: Tick) -> Self {
        Self(
            state.to_bits()
                | (backend as u64 & Self::BACKEND) << 2
                | ((generation & Self::SHORT) as u64) << 22
                | (now.0 as u64) << 32,
        )
    }

    /// A record of a connection of which a SYN with this sequence number was seen `now`.
    #[inline(always)]
    pub const fn half_open(backend: u32, sequence: u32, now: Tick) -> Self {
        Self(
            State::HalfOpen.to_bits()
                | (backend as u64 & Self::BACKEND) << 2
                | ((now.0 >> Self::STEP_BITS & Self::SHORT) as u64) << 22
                | (sequence as u64) << 32,
        )
    }

    /// How far the connection is.
    #[inline(always)]
    pub const fn state(self) -> State {
        match self.0 & 3 {
            0 => State::Datagrams,
            1 => State::HalfOpen,
            2 => State::Established,
            _ => State::Closed,
        }
    }

    /// Index of its backend.
    #[inline(always)]
    pub const fn backend(self) -> u32 {
        (self.0 >> 2 & Self::BACKEND) as u32
    }

    /// Whether it can be of the backend's use with this generation: ten bits of it are kept, and none while
    /// it is half open.
    #[inline(always)]
    pub const fn is_of(self, generation: u32) -> bool {
        matches!(self.state(), State::HalfOpen)
            || (self.0 >> 22) as u32 & Self::SHORT == generation & Self::SHORT
    }

    /// The sequence number of its SYN; means something only while it is half open.
    #[inline(always)]
    pub const fn sequence(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// For how many ticks it has not been seen, at least; of a half-open one it may be a second more.
    #[inline(always)]
    pub const fn idle(self, now: Tick) -> u32 {
        if matches!(self.state(), State::HalfOpen) {
            let then = (self.0 >> 22) as u32 & Self::SHORT;
            let steps = (now.0 >> Self::STEP_BITS).wrapping_sub(then) & Self::SHORT;
            // It was seen anywhere within its step.
            let step = (1 << Self::STEP_BITS) - 1;
            ((steps << Self::STEP_BITS) + (now.0 & step)).saturating_sub(step)
        } else {
            now.since(Tick((self.0 >> 32) as u32))
        }
    }

    /// How long it may be idle before another connection may take its place, in ticks.
    #[inline(always)]
    pub const fn span(self, span: Span) -> u32 {
        match self.state() {
            State::Datagrams => span.datagrams,
            State::HalfOpen => {
                // No longer than its short time can tell.
                const LONGEST: u32 = (Record::SHORT - 1) << Record::STEP_BITS;
                if span.half_open < LONGEST { span.half_open } else { LONGEST }
            }
            State::Established => span.established,
            State::Closed => span.closed,
        }
    }

    /// The same record, seen `now`.
    #[inline(always)]
    pub const fn seen(self, state: State, generation: u32, now: Tick) -> Self {
        Self::open(state, self.backend(), generation, now)
    }
}

impl State {
    #[inline(always)]
    const fn to_bits(self) -> u64 {
        match self {
            Self::Datagrams => 0,
            Self::HalfOpen => 1,
            Self::Established => 2,
            Self::Closed => 3,
        }
    }
}

/// How long records may be idle, in ticks.
///
/// What the client has ended is not kept for long, though the server may still be sending: while slots
/// change hands, room is worth more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// UDP.
    pub datagrams: u32,
    /// TCP, half open.
    pub half_open: u32,
    /// TCP, established.
    pub established: u32,
    /// TCP, closed.
    pub closed: u32,
}

impl Span {
    /// As the configuration says.
    #[inline(always)]
    pub fn of(idle: &Idle) -> Self {
        Self {
            datagrams: idle.udp.get(),
            half_open: idle.half_open.get(),
            established: idle.established.get(),
            closed: idle.closed.get(),
        }
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
        fn a_half_open_records_time_is_short_by_less_than_a_step(now: u32, later in 0u32..16000) {
            let idle = Record::half_open(1, 2, Tick(now)).idle(Tick(now).after(later));
            prop_assert!(idle <= later && later < idle + 16, "{idle} for {later}");
        }

        #[test]
        fn a_key_is_neither_empty_nor_busy(hash: u64) {
            prop_assert!(Record::key(hash) > Record::BUSY);
            prop_assert_eq!(Record::key(hash) == hash, hash > 1);
        }
    }
}
