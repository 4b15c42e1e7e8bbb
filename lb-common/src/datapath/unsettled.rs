//! A packet of a slot that has changed hands: which backend its connection belongs to.
//!
//! While a slot is **moving**, a connection that is not written down is still the backend's *before*, and
//! is written down as soon as it shows itself (adopted); new connections go to the slot's own backend if
//! they can be written down, else where they would have gone before. After a quiet time the slot is
//! **fading**: what is not written down is the slot's own, and nothing new is written down. When nobody was
//! sent elsewhere for as long again, the daemon **settles** the slot, and its packets are not looked up
//! any more.
//!
//! | slot | packet | record | goes to | writes |
//! |---|---|---|---|---|
//! | any | SYN | open, its backend lives | the record's | seen; half open: the new sequence number |
//! | moving | SYN | none, or over | before, if the change or a loss is fresh and it lives; else the slot's | half open |
//! | moving | SYN | there is no room | before; if that is dead, the slot's | a loss; if dead: *before* is the slot's own |
//! | fading | SYN | none, or over | the slot's | removes the record |
//! | any | other | valid, not half open | the record's | seen; FIN, RST: closed |
//! | any | other | half open, its first | the record's | established |
//! | any | other | half open, another's | default | moving: a loss |
//! | moving | data, FIN | none | before | adopts; no room: a loss |
//! | moving | datagram | none | before, if it lives; else the slot's | adopts |
//! | moving | RST | none | before | |
//! | fading | other | none | the slot's | |
//!
//! The default is *before* while moving, and the slot's own backend while fading. A record is valid if it
//! was seen since the slot was last settled, and its backend is not gone; while fading, and of UDP, no longer ago
//! than that quiet time. A loss is remembered with its
//! time: the slot must go on moving for as long as that connection may live. A SYN that stays with *before*
//! for want of room is one too, else the slot could fade before the connection's next packet.
//!
//! Where *before* is dead and there is no room, the slot becomes one that moves from its own backend. Were it to
//! fade, it would name nobody, and if the daemon gave it to a third backend at that moment, what went to its own
//! would be the third's.

use super::{
    Context,
    family::Family,
    flow::Place,
    parse::Packet,
    record::{Found, Lines},
};
use crate::{
    abi::{Backend, NO_BACKEND, PAGE_SLOTS, Record, RingAt, Side, Standing, State, Tick, UDP},
    shared::Shared,
    tables::Tables,
    verdict::{DropReason, Note, Verdict},
    wire::{Frame, l4::Tcp},
};

/// Where a packet's slot is, as one word: the slot's number, its first side page, and its service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) slot: u32,
    pub(crate) first_side: u32,
    pub(crate) service: u32,
}

impl At {
    #[inline(always)]
    pub(crate) const fn to_word(self) -> u64 {
        self.slot as u64
            | (self.first_side as u64) << RingAt::SLOT_BITS
            | (self.service as u64) << (RingAt::SLOT_BITS + RingAt::PAGE_BITS)
    }

    #[inline(always)]
    const fn from_word(word: u64) -> Self {
        Self {
            slot: (word & ((1 << RingAt::SLOT_BITS) - 1)) as u32,
            first_side: (word >> RingAt::SLOT_BITS) as u32 & ((1 << RingAt::PAGE_BITS) - 1),
            service: (word >> (RingAt::SLOT_BITS + RingAt::PAGE_BITS)) as u32,
        }
    }
}

/// What a packet is, and whose its slot is, as one word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// Index of the slot's own backend, or [`NO_BACKEND`].
    pub(crate) own: u32,
    /// Control bits of TCP.
    pub(crate) flags: u8,
    pub(crate) udp: bool,
}

impl Asked {
    #[inline(always)]
    pub(crate) const fn to_word(self) -> u64 {
        self.own as u64 | (self.flags as u64) << 32 | (self.udp as u64) << 40
    }

    #[inline(always)]
    const fn from_word(word: u64) -> Self {
        Self { own: word as u32, flags: (word >> 32) as u8, udp: word >> 40 & 1 != 0 }
    }

    #[inline(always)]
    const fn is_syn(self) -> bool {
        self.flags & (Tcp::SYN | Tcp::ACK | Tcp::RST | Tcp::FIN) == Tcp::SYN
    }

    /// What a connection is after this packet, if it was `before`.
    #[inline(always)]
    const fn state(self, before: State) -> State {
        if self.udp {
            State::Datagrams
        } else if self.flags & (Tcp::FIN | Tcp::RST) != 0 || matches!(before, State::Closed) {
            State::Closed
        } else {
            State::Established
        }
    }
}

/// The backend of a packet, or [`NO_BACKEND`].
#[inline(always)]
pub(crate) fn backend<V: Family, T: Tables>(
    frame: &impl Frame,
    packet: &Packet<V>,
    at: At,
    own: u32,
    place: Place,
    context: &Context<'_, T>,
) -> Result<u32, Verdict> {
    let udp = packet.protocol() == UDP;
    let mut sequence = 0;
    if !udp {
        let tcp: Tcp = frame.read(usize::from(packet.l4())).ok_or(DropReason::Tables)?;
        sequence = u32::from_be(tcp.sequence);
    }
    let asked = Asked { own, flags: packet.tcp_flags(), udp }.to_word();
    let now = context.now.0;
    Ok(context.tables.choose_unsettled(at.to_word(), place.hash(), asked, sequence, now) as u32)
}

/// A change younger than this many ticks is fresh: the SYN may be one that was sent before it and is sent
/// again, and its first answer may still arrive (RFC 6298 section 2: 1 s, then 2 s more).
const FRESH: u32 = Tick::in_ms(3200);

/// A record is marked as seen once in so many ticks, 1.07 s: less often than it is, so that its line is not
/// written with every packet.
pub const SEEN_EVERY: u32 = 16;

/// How much later than the SYN's own the sequence number of a first packet may be: data that overtook the
/// handshake's last packet.
const FIRST_REACH: u32 = 1 << 17;

/// The index of the backend that a packet of an unsettled slot goes to, or [`NO_BACKEND`]. `at` and `asked`
/// are an `At` and an `Asked`; `sequence` is TCP's.
///
/// Numbers in and a number out, so that the verifier can look at it by itself (see
/// [`Tables::choose_unsettled`]).
#[inline(always)]
pub fn choose<T: Tables>(tables: &T, at: u64, hash: u64, asked: u64, sequence: u32, now: u32) -> u64 {
    let (at, asked, now) = (At::from_word(at), Asked::from_word(asked), Tick(now));
    let own = asked.own;
    let page = at.first_side + at.slot / PAGE_SLOTS as u32;
    let (Some(config), Some(side)) = (tables.config(), tables.side(page, at.slot as usize % PAGE_SLOTS))
    else {
        return u64::from(NO_BACKEND);
    };
    let key = Record::key(hash);
    let Some(lines) = Lines::of(tables, key, config) else {
        return u64::from(NO_BACKEND);
    };
    let word = side.standing.get();
    let standing = Standing::from_word(word);
    let before = match standing.before {
        Standing::BY_OLD_RING => by_old_ring(tables, at.service, hash),
        before => before,
    };
    let case = Case { tables, side, lines, service: at.service, asked, standing, before, sequence, now };
    let chosen = case.choose(key, word);
    if chosen != own {
        store(&side.last_elsewhere, now);
    }
    u64::from(chosen)
}

/// What is written down of the connection with this hash.
pub fn recorded<T: Tables>(tables: &T, hash: u64) -> Option<Record> {
    let key = Record::key(hash);
    Lines::of(tables, key, tables.config()?)?.find(key).map(|found| found.record)
}

/// The backend of the connection's slot in the ring of the size before.
#[inline(always)]
fn by_old_ring<T: Tables>(tables: &T, service: u32, hash: u64) -> u32 {
    let Some(service) = tables.service(service) else { return NO_BACKEND };
    let ring = RingAt::from_word(service.old_ring.get());
    let slot = ring.slot((hash >> 32) as u32);
    let page = ring.first_page + slot / PAGE_SLOTS as u32;
    match tables.slot(page, slot as usize % PAGE_SLOTS) {
        Some(slot) if ring.slots != 0 => slot.backend(),
        _ => NO_BACKEND,
    }
}

/// Everything that the rules look at.
struct Case<'a, T> {
    tables: &'a T,
    side: &'a Side,
    lines: Lines<'a>,
    /// Index of the service.
    service: u32,
    asked: Asked,
    standing: Standing,
    /// Index of the backend before, or [`NO_BACKEND`].
    before: u32,
    sequence: u32,
    now: Tick,
}

impl<T: Tables> Case<'_, T> {
    #[inline(always)]
    fn choose(&self, key: u64, standing_word: u64) -> u32 {
        let found = self.lines.find(key);
        if self.asked.is_syn() {
            return self.first(key, found.as_ref(), standing_word);
        }
        if let Some(found) = &found
            && let Some(backend) = self.backend_of(found.record)
        {
            if found.record.state() != State::HalfOpen || self.is_its_first(found.record) {
                self.see(found, backend);
                return found.record.backend();
            }
            // Another connection between the same ends, older than that SYN: the record is not its own.
            if !self.standing.fading {
                store(&self.side.lost_at, self.now);
            }
            return self.default();
        }
        if self.standing.fading {
            if let Some(found) = &found
                && self.is_past(found.record)
            {
                // With other time-outs it could count again, for a connection that has gone elsewhere by now.
                found.remove(self.tables, key);
            }
            return self.default();
        }
        if self.asked.flags & Tcp::RST != 0 {
            return self.default();
        }
        if self.asked.udp && !self.lives(self.before) {
            // Datagrams have no beginning that would tell a new client from one that was there before.
            self.adopt(key, found.as_ref(), self.asked.own);
            return self.asked.own;
        }
        self.adopt(key, found.as_ref(), self.before);
        self.before
    }

    /// A SYN.
    #[inline(always)]
    fn first(&self, key: u64, found: Option<&Found<'_>>, standing_word: u64) -> u32 {
        if let Some(found) = found
            && found.record.state() != State::Closed
            && let Some(entry) = self.backend_of(found.record)
            && lives(entry)
        {
            let backend = found.record.backend();
            if found.record.state() == State::HalfOpen {
                found.replace(self.tables, Record::half_open(backend, self.sequence, self.now));
            } else {
                self.see(found, entry);
            }
            return backend;
        }
        let own = self.asked.own;
        if self.standing.fading {
            if let Some(found) = found {
                found.remove(self.tables, key);
            }
            return own;
        }
        // A SYN that found no room a moment ago went to the backend before, whose answer may be under way.
        let recently = |then| self.now.since(then) < FRESH;
        let fresh = recently(self.standing.since) || recently(self.side.lost_at.get());
        let goes_to = if fresh && self.lives(self.before) { self.before } else { own };
        if goes_to == NO_BACKEND {
            return own;
        }
        let record = Record::half_open(goes_to, self.sequence, self.now);
        if self.write(key, found, record) {
            self.tables.note(Note::Recorded);
            return goes_to;
        }
        if let Some(twin) = self.lines.find(key)
            && self.lives(twin.record.backend())
        {
            // Another CPU has just written the same connection down.
            return twin.record.backend();
        }
        self.tables.note(Note::Refused);
        if self.lives(self.before) {
            // Its next packet must find the slot moving still.
            store(&self.side.lost_at, self.now);
            return self.before;
        }
        if self.standing.before == Standing::BY_OLD_RING {
            // The slot has others' connections as well, whose backends may live.
            return own;
        }
        if self.standing.before == own {
            return own;
        }
        // Nobody is left whom the slot would have to go on moving for, and this connection is its own backend's
        // though it is not written down. First the loss: a plan that ends the moving has not seen this.
        store(&self.side.lost_at, self.now);
        let moving = Standing { before: own, fading: false, since: self.now };
        if self.tables.swap(&self.side.standing, standing_word, moving.to_word()) {
            return own;
        }
        // Somebody was faster, perhaps with the ring of before: the connection is whose its next packet will be.
        let standing = Standing::from_word(self.side.standing.get());
        if standing.fading { own } else { standing.before }
    }

    /// Writes down that a connection is a backend's.
    #[inline(always)]
    fn adopt(&self, key: u64, found: Option<&Found<'_>>, backend: u32) {
        let generation = match self.tables.backend(backend) {
            Some(backend) => backend.generation.get(),
            // Nobody's.
            None => return,
        };
        let state = self.asked.state(State::Established);
        if self.write(key, found, Record::open(state, backend, generation, self.now)) {
            self.tables.note(Note::Adopted);
        } else if self.lines.find(key).is_none() {
            self.tables.note(Note::Refused);
            store(&self.side.lost_at, self.now);
        }
    }

    /// Writes a record: over the connection's own from an earlier time, else where there is room.
    #[inline(always)]
    fn write(&self, key: u64, found: Option<&Found<'_>>, record: Record) -> bool {
        match found {
            Some(found) => found.replace(self.tables, record),
            None => self.lines.insert(self.tables, key, record, self.now).is_ok(),
        }
    }

    /// Marks a record as seen, if that is not so already.
    #[inline(always)]
    fn see(&self, found: &Found<'_>, backend: &Backend) {
        let record = found.record;
        let state = match backend.flags.get() & Backend::CUT {
            0 => self.asked.state(record.state()),
            // This packet is answered by a reset, and nothing comes after it.
            _ => State::Closed,
        };
        if state != record.state() || record.idle(self.now) >= SEEN_EVERY {
            found.replace(self.tables, record.seen(state, backend.generation.get(), self.now));
        }
    }

    /// Where a connection goes that is not written down.
    #[inline(always)]
    fn default(&self) -> u32 {
        if self.standing.fading { self.asked.own } else { self.before }
    }

    /// The backend of a record that still means something. Of one whose connections are cut only TCP's do:
    /// they can be told.
    #[inline(always)]
    fn backend_of(&self, record: Record) -> Option<&Backend> {
        let since = self.side.unsettled_since.get();
        // A translated one is from a time when the service translated.
        if record.is_translated() || record.idle(self.now) > self.now.since(since) {
            return None;
        }
        // Of UDP nobody says that he begins anew: one who did so while the slot faded is its own backend's.
        if (self.standing.fading || self.asked.udp) && self.is_past(record) {
            return None;
        }
        let backend = self.tables.backend(record.backend())?;
        let gone = Backend::FORGET | if self.asked.udp { Backend::CUT } else { 0 };
        let stays = backend.flags.get() & (Backend::IN_USE | gone) == Backend::IN_USE;
        let its_own = backend.service.get() == self.service && record.is_of(backend.generation.get());
        (stays && its_own).then_some(backend)
    }

    /// Whether nobody waits for a connection any more that was last seen then. The daemon settles a slot a little
    /// later than this after the last packet that was sent elsewhere, and may be doing so: whoever began anew
    /// between these ends would lose its backend with its next packet.
    #[inline(always)]
    fn is_past(&self, record: Record) -> bool {
        let Some(config) = self.tables.config() else { return false };
        let idle = if self.asked.udp {
            config.idle.udp.get()
        } else if record.state() == State::HalfOpen {
            // Its short time cannot tell as much as that of an open connection.
            record.span(&config.idle)
        } else {
            config.idle.established.get()
        };
        record.idle(self.now) >= idle.saturating_add(SEEN_EVERY)
    }

    /// Whether a backend can be given a new connection.
    #[inline(always)]
    fn lives(&self, backend: u32) -> bool {
        self.tables.backend(backend).is_some_and(lives)
    }

    /// Whether the packet can be of the connection whose SYN is written down.
    #[inline(always)]
    fn is_its_first(&self, record: Record) -> bool {
        self.sequence.wrapping_sub(record.sequence()).wrapping_sub(1) < FIRST_REACH
    }
}

/// Whether a backend can be given a new connection.
#[inline(always)]
fn lives(backend: &Backend) -> bool {
    const GONE: u16 = Backend::DEAD | Backend::CUT | Backend::FORGET;
    backend.flags.get() & (Backend::IN_USE | GONE) == Backend::IN_USE
}

/// Writes only what changed: a store makes the other CPUs fetch the line again.
#[inline(always)]
fn store(word: &Shared<Tick>, now: Tick) {
    if word.get() != now {
        word.set(now);
    }
}

#[cfg(test)]
mod tests;
