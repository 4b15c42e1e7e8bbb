//! The table of records: found, written, replaced.
//!
//! A bucket is one cache line of four ways, each a key and a value of one word; where it is full, a record
//! goes to the line beside it, which the processor has most likely fetched as well. Whoever writes a new
//! record swaps the key to BUSY, writes the value, and swaps the key to its own; a value is replaced by
//! compare-and-swap alone, so no CPU undoes what another has just written. A record within its time is
//! never taken away for another connection: then there is no room, which is counted, and the rules in
//! [`super::unsettled`] say what becomes of the connection.

use crate::{
    abi::{Config, RECORD_WAYS, Record, Records, Span, Tick, Way},
    tables::Tables,
};

/// The two lines that a connection's record can be in: its own, and the one beside it.
pub(super) struct Lines<'a>([&'a Records; 2]);

/// A record that was found.
pub(super) struct Found<'a> {
    way: &'a Way,
    pub(super) record: Record,
}

impl<'a> Lines<'a> {
    /// Those of a hash.
    #[inline(always)]
    pub(super) fn of<T: Tables>(tables: &'a T, hash: u64, mask: u32) -> Option<Self> {
        let own = hash as u32 & mask;
        // A table has an even number of lines, but for those of tests, which have one.
        Some(Self([tables.records(own)?, tables.records((own ^ 1) & mask)?]))
    }

    /// The record of this key.
    #[inline(always)]
    pub(super) fn find(&self, key: u64) -> Option<Found<'a>> {
        for line in self.0 {
            for way in &line.ways {
                if way.key.get() == key {
                    let record = Record(way.value.get());
                    // It may have been given to another connection between the two.
                    if way.key.get() == key {
                        return Some(Found { way, record });
                    }
                }
            }
        }
        None
    }

    /// Writes down a connection that has no record. `false`: there is no room, or another CPU was faster.
    #[inline(always)]
    pub(super) fn insert<T: Tables>(
        &self,
        tables: &T,
        key: u64,
        record: Record,
        (config, now): (&Config, Tick),
    ) -> bool {
        let Some(number) = self.room(tables, Span::of(&config.idle), now) else { return false };
        // The verifier would walk what follows once for each way.
        let number = config.launder(number as u64) as usize;
        let way = self.way(number);
        way.value.set(record.0);
        // A swap and not a store: what follows must not be read before this is seen by others.
        tables.swap(&way.key, Record::BUSY, key);
        // Another CPU may have written the same connection down meanwhile. The first way is found first, so
        // it is the other one that goes, whoever of the two sees it.
        for other in 0..2 * RECORD_WAYS {
            if other != number && self.way(other).key.get() == key {
                let goes = if other < number { way } else { self.way(other) };
                tables.swap(&goes.key, key, Record::EMPTY);
                if other < number {
                    return false;
                }
            }
        }
        true
    }

    #[inline(always)]
    fn way(&self, number: usize) -> &'a Way {
        let [own, beside] = self.0;
        let line = if number < RECORD_WAYS { own } else { beside };
        &line.ways[number & (RECORD_WAYS - 1)]
    }

    /// Takes a way that is empty, or else whose record has timed out; its key is BUSY then.
    #[inline(always)]
    fn room<T: Tables>(&self, tables: &T, span: Span, now: Tick) -> Option<usize> {
        for number in 0..2 * RECORD_WAYS {
            let way = self.way(number);
            if way.key.get() == Record::EMPTY && tables.swap(&way.key, Record::EMPTY, Record::BUSY) {
                return Some(number);
            }
        }
        for number in 0..2 * RECORD_WAYS {
            let way = self.way(number);
            let key = way.key.get();
            if key > Record::BUSY
                && is_over(Record(way.value.get()), span, now)
                && tables.swap(&way.key, key, Record::BUSY)
            {
                // Its connection may have spoken up at the last moment.
                if is_over(Record(way.value.get()), span, now) {
                    return Some(number);
                }
                tables.swap(&way.key, Record::BUSY, key);
            }
        }
        None
    }
}

impl Found<'_> {
    /// Says something else of the connection, unless another CPU has just done so.
    #[inline(always)]
    pub(super) fn replace<T: Tables>(&self, tables: &T, record: Record) -> bool {
        tables.swap(&self.way.value, self.record.0, record.0)
    }

    /// Forgets the connection.
    #[inline(always)]
    pub(super) fn remove<T: Tables>(&self, tables: &T, key: u64) {
        tables.swap(&self.way.key, key, Record::EMPTY);
    }
}

#[inline(always)]
fn is_over(record: Record, span: Span, now: Tick) -> bool {
    record.idle(now) >= record.span(span)
}
