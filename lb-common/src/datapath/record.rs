//! The table of records: found, written, taken away.
//!
//! A bucket is one cache line of four ways, each a key and a value of one word; where it is full, a record
//! goes to the line beside it, which the processor has most likely fetched as well. A value is replaced by
//! compare-and-swap alone, so no CPU undoes what another has just written. Whoever takes a record away swaps
//! its value to GONE first, and only then the key: to EMPTY, or to BUSY to write another record there.
//!
//! A record within its time is never taken away for another connection, unless it is of a translated one that
//! has ended or has not got further than its SYN; else there is no room, which is counted.

use crate::{
    abi::{Config, Idle, RECORD_WAYS, Record, Records, State, Tick, Way},
    tables::Tables,
    verdict::DropReason,
};

/// The two lines that a connection's record can be in: its own, and the one beside it.
pub(super) struct Lines<'a> {
    lines: [&'a Records; 2],
    /// Number of the first.
    own: u32,
    config: &'a Config,
}

/// A record that was found.
pub(super) struct Found<'a> {
    way: &'a Way,
    pub(super) record: Record,
}

/// How readily a connection gives way to a new one.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Worth {
    /// It lives.
    Never,
    /// It has not got further than its SYN.
    HalfOpen,
    /// It has ended a moment ago.
    Ended,
    /// It has been silent for longer than it may, or is none at all.
    Over,
}

impl Worth {
    /// Of a translated connection within its time.
    #[inline(always)]
    pub(super) const fn of(state: State) -> Self {
        match state {
            State::HalfOpen => Self::HalfOpen,
            State::Closed => Self::Ended,
            State::Established | State::Datagrams => Self::Never,
        }
    }
}

impl<'a> Lines<'a> {
    /// Those of a key.
    #[inline(always)]
    pub(super) fn of<T: Tables>(tables: &'a T, key: u64, config: &'a Config) -> Option<Self> {
        let mask = config.record_mask.get();
        let own = key as u32 & mask;
        // A table has an even number of lines, but for those of tests, which have one.
        let lines = [tables.records(own)?, tables.records((own ^ 1) & mask)?];
        Some(Self { lines, own, config })
    }

    /// The record of this key.
    #[inline(always)]
    pub(super) fn find(&self, key: u64) -> Option<Found<'a>> {
        for number in 0..2 * RECORD_WAYS {
            let way = self.way(number);
            if way.key.get() == key {
                let record = Record(way.value.get());
                // It may have been given to another connection between the two.
                if record != Record::GONE && way.key.get() == key {
                    // The verifier would walk all that follows once for each way.
                    let number = self.config.launder(number as u64) as usize;
                    return Some(Found { way: self.way(number), record });
                }
            }
        }
        None
    }

    /// Writes down a connection that has no record, where there is nothing or what gives way.
    ///
    /// # Errors
    /// There is no room, or another CPU was faster.
    #[inline(always)]
    pub(super) fn insert<T: Tables>(
        &self,
        tables: &T,
        key: u64,
        record: Record,
        now: Tick,
    ) -> Result<(), DropReason> {
        let taken = tables.take_way(self.own, now.0);
        let number = (taken as usize).checked_sub(1).ok_or(DropReason::TableFull)? & (2 * RECORD_WAYS - 1);
        let way = self.way(number);
        way.value.set(record.0);
        // A swap and not a store: what follows must not be read before this is seen by others.
        tables.swap(&way.key, Record::BUSY, key);
        // Another CPU may have written the same connection down meanwhile. The first way is found first, so
        // it is the other one that goes, whoever of the two sees it. By a translated one's a packet may have been
        // sent already, and there is a flow: whoever sees it steps back, be it both.
        for other in 0..2 * RECORD_WAYS {
            if other != number && self.holds(other, key) {
                let yields = other < number || record.is_translated();
                let goes = if yields { way } else { self.way(other) };
                tables.swap(&goes.key, key, Record::EMPTY);
                if yields {
                    return Err(DropReason::Race);
                }
            }
        }
        Ok(())
    }

    /// Whether a way has this key, and its record is not just being taken away.
    #[inline(always)]
    fn holds(&self, number: usize, key: u64) -> bool {
        let way = self.way(number);
        way.key.get() == key && way.value.get() != Record::GONE.0
    }

    #[inline(always)]
    fn way(&self, number: usize) -> &'a Way {
        let [own, beside] = self.lines;
        let line = if number < RECORD_WAYS { own } else { beside };
        &line.ways[number & (RECORD_WAYS - 1)]
    }
}

/// Takes a way of a line, or of the one beside it, for a new record: one that is empty, else the one whose
/// record gives way most readily (its [`Worth`]), but for those that live; among these, the one that has been silent for
/// longest. Its number plus one, and its key is BUSY then; zero: there is none.
///
/// Numbers in and a number out, so that the verifier can look at it by itself (see
/// [`Tables::take_way`]).
#[inline(always)]
pub fn take_way<T: Tables>(tables: &T, line: u32, now: u32) -> u64 {
    let Some(config) = tables.config() else { return 0 };
    let Some(lines) = Lines::of(tables, u64::from(line), config) else { return 0 };
    for number in 0..2 * RECORD_WAYS {
        let way = lines.way(number);
        if way.key.get() == Record::EMPTY && tables.swap(&way.key, Record::EMPTY, Record::BUSY) {
            return number as u64 + 1;
        }
    }
    let (mut best, mut found) = (0u64, 0u64);
    for number in 0..2 * RECORD_WAYS {
        let way = lines.way(number);
        let key = way.key.get();
        if key > Record::BUSY {
            // Of those that are alike a key decides, which is as good as chance: the first of them would be the one that
            // was written last, and again the next time.
            let worth = worth(Record(way.value.get()), config, Tick(now)) << CHANCE | key >> (64 - CHANCE);
            let worth = config.launder(worth);
            if worth > best {
                best = worth;
                found = number as u64 + 1;
            }
        }
    }
    let Some(number) = (found as usize).checked_sub(1) else { return 0 };
    let way = lines.way(number & (2 * RECORD_WAYS - 1));
    let (key, value) = (way.key.get(), way.value.get());
    // Judged again: its connection may have spoken up, or another CPU has just written a new one there, which is
    // half open and not what was found.
    let worth = worth(Record(value), config, Tick(now)) >> 32;
    let gives_way = key > Record::BUSY && worth >= best >> (32 + CHANCE) && worth >= Worth::HalfOpen as u64;
    if !gives_way || !tables.swap(&way.value, value, Record::GONE.0) {
        return 0;
    }
    if tables.swap(&way.key, key, Record::BUSY) {
        return found;
    }
    // The way was given to another connection between the two looks, whose record this is then.
    tables.swap(&way.value, Record::GONE.0, value);
    0
}

/// Bits of a key that decide between records which give way alike.
const CHANCE: u32 = 8;

impl Found<'_> {
    /// Says something else of the connection, unless another CPU has just done so.
    #[inline(always)]
    pub(super) fn replace<T: Tables>(&self, tables: &T, record: Record) -> bool {
        tables.swap(&self.way.value, self.record.0, record.0)
    }

    /// Forgets the connection, unless another CPU has just said something of it.
    #[inline(always)]
    pub(super) fn remove<T: Tables>(&self, tables: &T, key: u64) {
        if self.replace(tables, Record::GONE) {
            tables.swap(&self.way.key, key, Record::EMPTY);
        }
    }
}

/// How readily a record gives way: a [`Worth`] in the upper 32 bits, below it for how long it has been silent.
#[inline(always)]
fn worth(record: Record, config: &Config, now: Tick) -> u64 {
    const OVER: u64 = (Worth::Over as u64) << 32;
    if record == Record::GONE {
        return 0;
    }
    if !record.is_translated() {
        return if record.idle(now) >= record.span(&config.idle) { OVER } else { 0 };
    }
    let (state, steps) = (record.state(), config.idle.steps.get());
    let idle = record.steps_idle(now, steps);
    // It is told once in a step, and its last packet may have come at the end of that.
    if idle > (state.span(&config.idle) >> state.step(steps)) + 1 && steps & Idle::CHANGING == 0 {
        return OVER;
    }
    u64::from(Worth::of(state) as u8) << 32 | u64::from(idle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{abi::Hop, sim::MemTables};

    const NOW: Tick = Tick(100_000);
    const KEY: u64 = 4096;

    /// Two lines of records; connections may be idle for 1000 ticks, half open for 100, ended for 10.
    fn tables() -> MemTables {
        let tables = MemTables::new(0, 0, 0, 2);
        tables.config.idle.established.set(1000);
        tables.config.idle.half_open.set(100);
        tables.config.idle.closed.set(10);
        tables.config.idle.count_anew(tables.records.iter(), NOW);
        tables
    }

    fn translated(tables: &MemTables, state: State, idle: u32) -> Record {
        let time = state.time(Tick(NOW.0 - idle), tables.config.idle.steps.get());
        Record::translated(1, 1, 1, 1000).told(state, time).by(Hop::of(1, 1))
    }

    /// Fills all ways with records of others.
    fn fill(tables: &MemTables, record: impl Fn(usize) -> Record) {
        for (number, way) in tables.records.iter().flat_map(|line| &line.ways).enumerate() {
            way.key.set(100 + number as u64);
            way.value.set(record(number).0);
        }
    }

    fn taken(tables: &MemTables) -> Option<usize> {
        (take_way(tables, 0, NOW.0) as usize).checked_sub(1)
    }

    #[test]
    fn what_is_over_gives_way_first_then_what_has_ended_then_the_oldest_half_open() {
        let alive = |tables: &MemTables| translated(tables, State::Established, 999);
        for (yields, worth) in [
            ((State::Established, 1100), Worth::Over),
            ((State::HalfOpen, 110), Worth::Over),
            ((State::Closed, 13), Worth::Over),
            ((State::Closed, 1), Worth::Ended),
            ((State::HalfOpen, 90), Worth::HalfOpen),
        ] {
            let tables = tables();
            let (state, idle) = yields;
            fill(&tables, |number| match number {
                6 => translated(&tables, state, idle),
                3 if worth > Worth::HalfOpen => translated(&tables, State::HalfOpen, 90),
                2 if worth > Worth::Ended => translated(&tables, State::Closed, 1),
                4 => translated(&tables, State::HalfOpen, 5),
                _ => alive(&tables),
            });
            assert_eq!(taken(&tables), Some(6), "{yields:?}");
            assert_eq!(tables.records[1].ways[2].key.get(), Record::BUSY);
            // The same place is not given out twice.
            assert_ne!(taken(&tables), Some(6), "{yields:?}");
        }
    }

    #[test]
    fn of_those_that_are_alike_not_always_the_first_gives_way() {
        for chosen in [0, 3, 5] {
            let tables = tables();
            fill(&tables, |_| translated(&tables, State::HalfOpen, 5));
            let way = &tables.records[chosen / RECORD_WAYS].ways[chosen % RECORD_WAYS];
            way.key.set(way.key.get() | 1 << 60);
            assert_eq!(taken(&tables), Some(chosen));
        }
    }

    #[test]
    fn nothing_of_a_live_connection_gives_way() {
        let tables = tables();
        fill(&tables, |number| match number {
            0 => translated(&tables, State::Established, 1000),
            1 => translated(&tables, State::Datagrams, 0),
            // Of services that do not translate, whatever they say within their time.
            2 => Record::half_open(1, 1, NOW),
            3 => Record::open(State::Closed, 1, 1, NOW),
            _ => Record::open(State::Established, 1, 1, Tick(NOW.0 - 999)),
        });
        assert_eq!(taken(&tables), None);
        tables.records[1].ways[3].value.set(Record::open(State::Established, 1, 1, Tick(NOW.0 - 1000)).0);
        assert_eq!(taken(&tables), Some(7));
    }

    #[test]
    fn a_change_of_the_time_outs_makes_nobody_silent_for_too_long() {
        let tables = tables();
        fill(&tables, |_| translated(&tables, State::Established, 900));
        for established in [70_000, 500, u32::MAX / 4, 1000] {
            tables.config.idle.established.set(established);
            tables.config.idle.set_steps();
            assert_eq!(taken(&tables), None, "{established}, not yet counted anew");
            tables.config.idle.count_anew(tables.records.iter(), NOW);
            assert_eq!(taken(&tables), None, "{established}");
        }
        // While it is being changed nobody is either.
        let steps = tables.config.idle.steps.get();
        fill(&tables, |_| translated(&tables, State::Established, 90 << State::Established.step(steps)));
        tables.config.idle.steps.set(steps | Idle::CHANGING);
        assert_eq!(taken(&tables), None);
        tables.config.idle.steps.set(steps);
        assert!(taken(&tables).is_some());
    }

    #[test]
    fn a_record_that_is_being_taken_away_is_not_found_and_does_not_come_back() {
        let tables = tables();
        let lines = Lines::of(&tables, KEY, &tables.config).unwrap();
        let record = translated(&tables, State::Established, 0);
        lines.insert(&tables, KEY, record, NOW).unwrap();
        let found = lines.find(KEY).unwrap();
        let way = found.way;
        way.value.set(Record::GONE.0);
        assert!(lines.find(KEY).is_none());
        assert!(!found.replace(&tables, record), "another CPU is taking it away");
        // The connection may come again meanwhile.
        lines.insert(&tables, KEY, record, NOW).unwrap();
        assert!(lines.find(KEY).is_some_and(|found| !core::ptr::eq(found.way, way)));
    }

    #[test]
    fn what_was_said_of_a_connection_meanwhile_is_not_removed() {
        let tables = tables();
        let lines = Lines::of(&tables, KEY, &tables.config).unwrap();
        let record = translated(&tables, State::HalfOpen, 0);
        lines.insert(&tables, KEY, record, NOW).unwrap();
        let earlier = lines.find(KEY).unwrap();
        let later = translated(&tables, State::Established, 0);
        assert!(lines.find(KEY).unwrap().replace(&tables, later));
        earlier.remove(&tables, KEY);
        assert_eq!(lines.find(KEY).map(|found| found.record), Some(later));
        lines.find(KEY).unwrap().remove(&tables, KEY);
        assert!(lines.find(KEY).is_none());
        assert!(tables.records.iter().flat_map(|line| &line.ways).all(|way| way.key.get() == 0));
    }
}
