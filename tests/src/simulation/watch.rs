//! What must hold at every packet and every operation, whatever connections come to it.

use std::collections::BTreeMap;

use lb_common::{
    abi::{Backend, Record, Records, RingAt, Side, Slot, Standing, Tick, Way},
    sim::MemTables,
    tables::Tables as _,
};

use super::packet::Packet;

/// Where a packet's connection is in the tables.
pub(super) struct Spot<'a> {
    tables: &'a MemTables,
    key: u64,
    lines: [&'a Records; 2],
    /// Its slot.
    pub(super) slot: Slot,
    side: Option<&'a Side>,
    hash: u64,
}

/// The same as it was before the packet.
pub(super) struct Earlier {
    ways: [(u64, Record); 8],
    side: Option<Side>,
    /// Who had the slot before.
    before: u32,
}

impl<'a> Spot<'a> {
    /// That of a packet; `None`: its service has no ring.
    pub(super) fn of(tables: &'a MemTables, packet: &Packet) -> Option<Self> {
        let hash = packet.hash();
        let ring = RingAt::from_word(tables.services.first()?.ring.get());
        let slot = (ring.slots > 0).then(|| ring.slot((hash >> 32) as u32))?;
        let (page, place) = (slot / 1024, slot as usize % 1024);
        let mask = tables.config.record_mask.get();
        let line = hash as u32 & mask;
        Some(Self {
            tables,
            key: Record::key(hash),
            lines: [tables.records(line)?, tables.records((line ^ 1) & mask)?],
            slot: tables.slot(ring.first_page + page, place)?,
            side: ring.first_side.and_then(|first| tables.side(first + page, place)),
            hash,
        })
    }

    /// One of eight ways.
    pub(super) fn way(&self, number: usize) -> &'a Way {
        &self.lines[number / 4].ways[number % 4]
    }

    fn ways(&self) -> impl Iterator<Item = &'a Way> {
        (0..8).map(|number| self.way(number))
    }

    /// Where its own record is.
    pub(super) fn own(&self) -> Option<&'a Way> {
        self.ways().find(|way| way.key.get() == self.key)
    }

    /// Whether no way can be had.
    pub(super) fn is_full(&self, now: Tick) -> bool {
        self.ways().all(|way| {
            way.key.get() != Record::EMPTY && !self.is_over(way.key.get(), Record(way.value.get()), now)
        })
    }

    fn is_over(&self, key: u64, record: Record, now: Tick) -> bool {
        let idle = &self.tables.config.idle;
        key > Record::BUSY && record.idle(now) >= record.span(idle)
    }

    /// Whether a backend can be given new connections.
    fn lives(&self, backend: u32) -> bool {
        const GONE: u16 = Backend::DEAD | Backend::CUT | Backend::FORGET;
        self.tables
            .backends
            .get(backend as usize)
            .is_some_and(|it| it.flags.get() & (Backend::IN_USE | GONE) == Backend::IN_USE)
    }

    /// How it is now.
    pub(super) fn remember(&self) -> Earlier {
        let way = |number| (self.way(number).key.get(), Record(self.way(number).value.get()));
        let standing = self.side.map(|side| Standing::from_word(side.standing.get()));
        let before = match standing.map(|standing| standing.before) {
            Some(Standing::BY_OLD_RING) => {
                let old = RingAt::from_word(self.tables.services[0].old_ring.get());
                let slot = old.slot((self.hash >> 32) as u32);
                let slot = self.tables.slot(old.first_page + slot / 1024, slot as usize % 1024);
                slot.map_or(lb_common::abi::NO_BACKEND, Slot::backend)
            }
            before => before.unwrap_or(lb_common::abi::NO_BACKEND),
        };
        Earlier { ways: std::array::from_fn(way), side: self.side.cloned(), before }
    }
}

/// Counts what must never be.
#[derive(Debug, Default)]
pub struct Watch {
    /// How often, by what.
    pub violations: BTreeMap<&'static str, u64>,
}

impl Watch {
    fn never(&mut self, what: &'static str, happened: bool) {
        if happened {
            *self.violations.entry(what).or_default() += 1;
        }
    }

    /// After a packet that went to the backend of this index.
    pub(super) fn packet(
        &mut self,
        packet: &Packet,
        spot: &Spot<'_>,
        earlier: &Earlier,
        goes_to: Option<u32>,
        now: Tick,
    ) {
        let ways = || spot.ways().map(|way| (way.key.get(), Record(way.value.get()))).zip(earlier.ways);
        if spot.slot.is_settled() {
            self.never("a settled slot's packet touched a record", ways().any(|(now, then)| now != then));
            self.never("a settled slot's packet touched a side", spot.side != earlier.side.as_ref());
            return;
        }
        let (Some(side), Some(was)) = (spot.side, &earlier.side) else {
            self.never("an unsettled slot has no side", true);
            return;
        };
        let standing = Standing::from_word(was.standing.get());
        for ((key, record), (old_key, old_record)) in ways() {
            let own = old_key == spot.key;
            let taken = old_key > Record::BUSY && !own && (key, record) != (old_key, old_record);
            self.never(
                "a record within its time was taken away",
                taken && !spot.is_over(old_key, old_record, now),
            );
            let removed = own && key != old_key;
            let may_be = standing.fading && (packet.is_syn() || spot.is_over(old_key, old_record, now));
            self.never("a record within its time was removed by no SYN", removed && !may_be);
        }
        let own = earlier.ways.iter().find(|(key, _)| *key == spot.key);
        if packet.is_syn() && !standing.fading && goes_to != Some(earlier.before) {
            let stored = spot.own().is_some_and(|way| Some(Record(way.value.get()).backend()) == goes_to);
            self.never(
                "a SYN left the default and was not written down",
                !stored && spot.lives(earlier.before),
            );
        }
        if let Some((_, record)) = own {
            let old = record.idle(now) > now.since(was.unsettled_since.get());
            let elsewhere = record.backend() != earlier.before && record.backend() != spot.slot.backend();
            self.never("an old record counted", old && elsewhere && goes_to == Some(record.backend()));
        }
        let fades = !standing.fading && Standing::from_word(side.standing.get()).fading;
        self.never("a packet ended a living backend's time", fades && spot.lives(earlier.before));
    }

    /// After an operation on a slot that was moving from the backend of this index, which is in the document still.
    pub(super) fn fade(&mut self, before: u32, side: &Side, quiet: u32, now: Tick) {
        let standing = Standing::from_word(side.standing.get());
        let moves = !standing.fading && standing.before == before;
        let lost = now.since(side.lost_at.get()) < quiet;
        self.never("a slot faded soon after a loss", !moves && lost);
    }
}
