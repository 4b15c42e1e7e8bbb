//! Translated connections: found from both sides, opened, aged, replaced.
//!
//! A connection is one [`Flow`], one cache line. From the client's side it is found through a
//! [`Bucket`], whose way holds the tag of the connection's hash and the index of the flow. From the
//! backend's side it needs no index: where the flow of a source port towards a backend is follows from
//! port, backend and source address ([`hash::Lane`]). The port is ours to choose, so where two such lanes
//! cross another port is taken; each backend has all ports of each source, and the table fills without a
//! second one beside it.
//!
//! The guard word owns a flow. Who writes a new connection into it swaps the guard to BUSY, writes the
//! rest, and stores LIVE with the next count of uses. Who reads checks the guard before and after: a
//! change in between is seen, and what was read is thrown away.
//!
//! Nothing here takes a flow away from a live connection within its idle time-out.

mod replace;

pub use self::replace::{search_ports, search_ways};
use self::replace::{worth_of_flow, worth_of_way};
use super::{Context, family::Family, hash, parse::Packet};
use crate::{
    abi::{Backend, Bucket, Config, Flow, Idle, TCP, Tick, UDP, WAYS},
    shared::Shared,
    tables::Tables,
    verdict::DropReason,
    wire::l4::Tcp,
};

/// Where a connection belongs, as its client sees it: two independent parts of its hash.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Chooses the bucket.
    pub low: u32,
    /// What to look for there; also chooses the slot of the ring.
    pub tag: u32,
}

impl Place {
    /// Which bucket.
    #[inline(always)]
    pub(crate) fn bucket(self, config: &Config) -> u32 {
        self.low & config.bucket_mask.get()
    }

    /// The whole hash.
    #[inline(always)]
    pub(crate) const fn hash(self) -> u64 {
        self.low as u64 | (self.tag as u64) << 32
    }
}

/// A flow and its backend, as they were found.
pub(crate) struct Known<'t> {
    pub(crate) flow: &'t Flow,
    /// Index of the backend.
    pub(crate) index: u32,
    pub(crate) backend: &'t Backend,
}

/// What the two sides have said so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// TCP: the handshake is not finished.
    HalfOpen,
    /// TCP: it is.
    Established,
    /// TCP: one side is done.
    Closing,
    /// TCP: both are, or one has reset.
    Closed,
    /// UDP has no phases.
    Udp,
}

impl Phase {
    /// The phase of a flow.
    #[inline(always)]
    pub fn of(flow: &Flow) -> Self {
        if flow.flags.get() & Flow::UDP != 0 {
            return Self::Udp;
        }
        let (client, backend) = (flow.client_sent.get(), flow.backend_sent.get());
        if (client | backend) & Flow::RST != 0 || client & backend & Flow::FIN != 0 {
            Self::Closed
        } else if (client | backend) & Flow::FIN != 0 {
            Self::Closing
        } else if client & backend & Flow::ACK != 0
            || (client & Flow::ACK != 0 && flow.flags.get() & Flow::LOCAL != 0)
        {
            // The backend's own ACK proves that its SYN did not answer a forged address alone. A local
            // backend's packets are not seen.
            Self::Established
        } else {
            Self::HalfOpen
        }
    }

    /// How readily a flow in this phase is given up before it expires.
    #[inline(always)]
    const fn rank(self) -> u8 {
        match self {
            Self::HalfOpen => Flow::HALF_OPEN,
            Self::Closed => Flow::CLOSED,
            Self::Established | Self::Closing | Self::Udp => 0,
        }
    }

    /// How long a flow in this phase may be idle, in ticks.
    #[inline(always)]
    pub fn idle(self, idle: &Idle) -> u32 {
        match self {
            Self::HalfOpen => idle.half_open.get(),
            Self::Established => idle.established.get(),
            Self::Closing => idle.closing.get(),
            Self::Closed => idle.closed.get(),
            Self::Udp => idle.udp.get(),
        }
    }
}

/// Where the packet's connection belongs.
#[inline(always)]
pub(crate) fn place<V: Family>(packet: &Packet<V>, config: &Config) -> Place {
    let hash = hash::of_client(packet, &config.multipliers);
    Place { low: hash as u32, tag: (hash >> 32) as u32 }
}

/// The flow of a client's packet.
#[inline(always)]
pub(crate) fn of_client<'t, V: Family, T: Tables>(
    packet: &Packet<V>,
    service: u32,
    place: Place,
    context: Context<'t, T>,
) -> Option<Known<'t>> {
    let bucket = context.tables.bucket(place.bucket(context.config))?;
    let (_, way) = find(bucket, place.tag)?;
    let flow = flow_of_way(way, context.tables)?;
    let guard = flow.guard.get();
    if !is_live(guard) || tag_of(guard) != place.tag || !is_of_client(packet, flow) {
        return None;
    }
    let index = flow.backend[0].get();
    let backend = context.tables.backend(index)?;
    let stays = backend.flags.get() & Backend::FORGET == 0;
    let same = backend.generation.get() == flow.backend[1].get() && backend.service.get() == service;
    (stays && same && flow.guard.get() == guard).then_some(Known { flow, index, backend })
}

/// Whether a packet's destination, address and port, may be a source of ours: that it is none is told
/// without a look-up.
#[inline(always)]
pub(crate) fn may_be_of_backend<V: Family>(packet: &Packet<V>, config: &Config) -> bool {
    let port = u16::from_be(packet.destination_port());
    let bit = V::source_bits(config) >> V::last_bits(packet.destination);
    bit & 1 != 0 && port >= config.port_low.get() && port <= config.port_high.get() && !packet.fragment()
}

/// The flow of a backend's packet: one look-up, of its place.
#[inline(always)]
pub(crate) fn of_backend<'t, V: Family, T: Tables>(
    packet: &Packet<V>,
    context: Context<'t, T>,
) -> Option<Known<'t>> {
    let Context { tables, config, .. } = context;
    let port = u16::from_be(packet.destination_port());
    let source = V::source(tables, packet.destination)?;
    let lane = hash::lane::<V>(
        packet.source,
        packet.source_port(),
        packet.destination,
        packet.protocol(),
        config.hash_key[0].get(),
    );
    let flow = tables.flow(lane.flow(u32::from(port), config.flow_mask.get()))?;
    let guard = flow.guard.get();
    if !is_live(guard)
        || flow.ports[2].get() != packet.destination_port()
        || flow.source.get() != source
        || flow.flags.get() & (Flow::UDP | Flow::V6 | Flow::LOCAL) != kind(packet)
    {
        return None;
    }
    let index = flow.backend[0].get();
    let backend = tables.backend(index)?;
    let called = flow.ports[1].get();
    let stays = backend.flags.get() & Backend::FORGET == 0;
    let same = backend.generation.get() == flow.backend[1].get()
        && V::narrow(&backend.address) == packet.source
        && port_of(backend, called) == packet.source_port();
    (stays && same && flow.guard.get() == guard).then_some(Known { flow, index, backend })
}

/// Whether a client's packet begins another connection in the place of the one that is known: a SYN,
/// after that one has ended; or a SYN sent again, while the backend that did not answer is believed
/// dead.
#[inline(always)]
pub(crate) fn starts_anew<V: Family, T>(
    packet: &Packet<V>,
    known: &Known<'_>,
    context: Context<'_, T>,
) -> bool {
    if packet.protocol() == UDP {
        // An association that has timed out may find another backend, as if it had been forgotten.
        return context.now.has_reached(known.flow.expires.get());
    }
    packet.is_first()
        && match Phase::of(known.flow) {
            Phase::Closed => true,
            // One that nothing was sent by yet has been opened for this very packet.
            Phase::HalfOpen => {
                known.backend.flags.get() & Backend::DEAD != 0 && known.flow.client_sent.get() != 0
            }
            Phase::Established | Phase::Closing | Phase::Udp => false,
        }
}

/// The port that a backend is called on by a client that called `called`. Network order.
#[inline(always)]
pub(crate) fn port_of(backend: &Backend, called: u16) -> u16 {
    match backend.port.get() {
        0 => called,
        port => port,
    }
}

/// Opens a flow for the packet's connection, which came from `hop`, to a backend.
#[inline(always)]
pub(crate) fn open<V: Family, T: Tables>(
    packet: &Packet<V>,
    hop: u64,
    (index, backend): (u32, &Backend),
    place: Place,
    context: Context<'_, T>,
) -> Result<(), DropReason> {
    let bucket = context.tables.bucket(place.bucket(context.config)).ok_or(DropReason::Tables)?;
    let mut way = Way::default();
    room(packet, place, &context, &mut way)?;
    let mut claim = Claim { index, ..Claim::default() };
    claim_flow(packet, backend, place, &context, &mut claim)?;
    let flow = context.tables.flow(claim.number).ok_or(DropReason::Tables)?;

    let [client0, client1] = V::widen(packet.source);
    flow.client[0].set(client0);
    flow.client[1].set(client1);
    flow.ports[0].set(packet.source_port());
    flow.ports[1].set(packet.destination_port());
    flow.ports[2].set(claim.port as u16);
    let local = if backend.flags.get() & Backend::LOCAL != 0 { Flow::LOCAL } else { 0 };
    let tagged = if packet.tagged() { Flow::TAGGED } else { 0 };
    flow.flags.set(kind(packet) | local | tagged);
    flow.backend[0].set(index);
    flow.backend[1].set(backend.generation.get());
    flow.source.set(claim.source);
    flow.interface.set(context.ingress);
    flow.client_hop.set(hop);
    flow.client_sent.set(0);
    flow.backend_sent.set(0);
    stay(flow, context.config, context.now);
    let live = u64::from(place.tag) << 32 | freed(claim.guard) | Flow::LIVE;
    flow.guard.set(live);

    let entry = u64::from(place.tag) << 32 | u64::from(claim.number + 1);
    let number = context.config.launder(way.number as u64) as usize;
    let cell = &bucket.ways[number & (WAYS - 1)];
    if !context.tables.swap(cell, way.holds, entry) {
        flow.guard.set(freed(live));
        return Err(DropReason::Race);
    }
    // Another CPU may have opened the same connection in another way of the bucket meanwhile. Whoever
    // sees the other steps back; if both do, the client's next SYN finds the place empty.
    for other in &bucket.ways {
        let other = other.get();
        if (other >> 32) as u32 == place.tag && other != 0 && other != entry {
            context.tables.swap(cell, entry, 0);
            flow.guard.set(freed(live));
            return Err(DropReason::Race);
        }
    }
    Ok(())
}

/// Notes a client's packet in its flow.
#[inline(always)]
pub(crate) fn seen_from_client<V: Family, T>(
    packet: &Packet<V>,
    hop: u64,
    flow: &Flow,
    context: Context<'_, T>,
) {
    store(&flow.client_sent, sent(flow.client_sent.get(), packet));
    stay(flow, context.config, context.now);
    // The way back is the way by which the client's packets come: it follows them when it changes.
    store(&flow.client_hop, hop);
    store(&flow.interface, context.ingress);
}

/// Notes a backend's packet in its flow.
#[inline(always)]
pub(crate) fn seen_from_backend<V: Family, T>(packet: &Packet<V>, flow: &Flow, context: Context<'_, T>) {
    store(&flow.backend_sent, sent(flow.backend_sent.get(), packet));
    stay(flow, context.config, context.now);
}

/// Sets anew how long the flow may be idle.
#[inline(always)]
fn stay(flow: &Flow, config: &Config, now: Tick) {
    let phase = Phase::of(flow);
    store(&flow.expires, now.after(phase.idle(&config.idle)));
    store(&flow.rank, phase.rank());
}

/// Marks a flow as ended by us.
#[inline(always)]
pub(crate) fn end<T>(flow: &Flow, context: Context<'_, T>) {
    store(&flow.client_sent, flow.client_sent.get() | Flow::RST);
    store(&flow.backend_sent, flow.backend_sent.get() | Flow::RST);
    stay(flow, context.config, context.now);
}

/// What a side has sent, with this packet. A side that goes on after its RST did not mean it, or did not
/// send it.
#[inline(always)]
fn sent<V: Family>(before: u8, packet: &Packet<V>) -> u8 {
    let flags = packet.tcp_flags();
    let bit = |flag: u8, bit: u8| if flags & flag != 0 { bit } else { 0 };
    let now = bit(Tcp::SYN, Flow::SYN) | bit(Tcp::ACK, Flow::ACK) | bit(Tcp::FIN, Flow::FIN);
    (before & !Flow::RST) | now | bit(Tcp::RST, Flow::RST)
}

/// Writes only what changed: a store makes the other CPUs fetch the line again.
#[inline(always)]
fn store<T: Copy + PartialEq>(word: &Shared<T>, value: T) {
    if word.get() != value {
        word.set(value);
    }
}

#[inline(always)]
fn kind<V: Family>(packet: &Packet<V>) -> u16 {
    let udp = if packet.protocol() == UDP { Flow::UDP } else { 0 };
    udp | if V::V6 { Flow::V6 } else { 0 }
}

#[inline(always)]
fn is_of_client<V: Family>(packet: &Packet<V>, flow: &Flow) -> bool {
    let [client0, client1] = V::widen(packet.source);
    flow.client[0].get() == client0
        && flow.client[1].get() == client1
        && flow.ports[0].get() == packet.source_port()
        && flow.ports[1].get() == packet.destination_port()
        && flow.flags.get() & (Flow::UDP | Flow::V6) == kind(packet)
}

const GUARD_STATE: u64 = 3;

#[inline(always)]
const fn is_live(guard: u64) -> bool {
    guard & GUARD_STATE == Flow::LIVE
}

#[inline(always)]
const fn tag_of(guard: u64) -> u32 {
    (guard >> 32) as u32
}

/// The guard of the next use of a flow, being written. The count stands above the two bits of state.
#[inline(always)]
const fn busy(guard: u64) -> u64 {
    ((guard & 0xffff_ffff & !GUARD_STATE) + 4) & 0xffff_ffff | Flow::BUSY
}

/// The guard of a flow that is free again.
#[inline(always)]
const fn freed(guard: u64) -> u64 {
    guard & 0xffff_ffff & !GUARD_STATE
}

/// The first way with this tag: its number and value.
#[inline(always)]
fn find(bucket: &Bucket, tag: u32) -> Option<(usize, u64)> {
    for (number, way) in bucket.ways.iter().enumerate() {
        let way = way.get();
        if (way >> 32) as u32 == tag && way != 0 {
            return Some((number, way));
        }
    }
    None
}

#[inline(always)]
fn flow_of_way<T: Tables>(way: u64, tables: &T) -> Option<&Flow> {
    tables.flow((way as u32).wrapping_sub(1))
}

/// A way of a bucket.
#[derive(Default)]
struct Way {
    number: usize,
    /// What it holds, as it was judged.
    holds: u64,
}

/// Finds a way for a new connection.
#[inline(never)]
fn room<V: Family, T: Tables>(
    packet: &Packet<V>,
    place: Place,
    context: &Context<'_, T>,
    found: &mut Way,
) -> Result<(), DropReason> {
    let bucket = context.tables.bucket(place.bucket(context.config)).ok_or(DropReason::Tables)?;
    if let Some((number, holds)) = find(bucket, place.tag) {
        // The connection's own way, from an earlier time; or, once in 500 million, that of another with
        // the same tag, which must not be taken for it.
        let its_own = flow_of_way(holds, context.tables).is_some_and(|flow| is_of_client(packet, flow));
        *found = Way { number, holds };
        let free = its_own || worth_of_way(holds, *context) >= u64::from(Flow::CLOSED) << 32;
        return if free { Ok(()) } else { Err(DropReason::TableFull) };
    }
    for (number, way) in bucket.ways.iter().enumerate() {
        if way.get() == 0 {
            *found = Way { number, holds: 0 };
            return Ok(());
        }
    }
    let best = context.tables.search_ways(place.bucket(context.config), context.now.0);
    let number = (best as usize).checked_sub(1).ok_or(DropReason::TableFull)? & (WAYS - 1);
    let holds = bucket.ways[number].get();
    *found = Way { number, holds };
    // Judged again: it may hold another by now.
    if worth_of_way(holds, *context) == 0 { Err(DropReason::Race) } else { Ok(()) }
}

/// A flow taken for a new connection, being written.
#[derive(Default)]
struct Claim {
    /// Index of the backend.
    index: u32,
    /// Index of the flow.
    number: u32,
    /// Its guard now.
    guard: u64,
    /// Index of the source.
    source: u32,
    /// Port there, network order.
    port: u32,
}

/// Takes a flow, and with it a port of one of the backend's sources.
///
/// The cursor of the backend goes round all ports of one source after the other, so that the port that was
/// given out longest ago comes first: the backend has had the most time to forget it. What is free or has
/// rested is taken at once; of what has only just ended, and then of half-open flows, the first met is the
/// oldest. The cursor moves past what was not free, else it would fall behind ever further.
#[inline(always)]
fn claim_flow<V: Family, T: Tables>(
    packet: &Packet<V>,
    backend: &Backend,
    place: Place,
    context: &Context<'_, T>,
    claim: &mut Claim,
) -> Result<(), DropReason> {
    let Context { tables, config, .. } = *context;
    let turn = tables.advance_cursor(claim.index, 1).ok_or(DropReason::Tables)? as u32;
    let window = if backend.flags.get() & Backend::LOCAL != 0 {
        Window::anywhere(place)
    } else {
        Window::of::<V, T>(packet, backend, turn, *context)?
    };
    claim.source = window.source;

    let Window { lane, low, high, first, .. } = window;
    let ports = u64::from(low) | u64::from(high) << 16 | u64::from(first) << 32;
    let found = tables.search_ports(lane.to_word(), ports, context.now.0);
    let (port, worth, passed) = (found as u16, (found >> 16) as u16, found >> 32);
    if passed > 0 {
        let _ = tables.advance_cursor(claim.index, passed);
    }
    if worth == 0 {
        return Err(DropReason::NoPort);
    }
    claim.number = lane.flow(u32::from(port), config.flow_mask.get());
    let flow = tables.flow(claim.number).ok_or(DropReason::Tables)?;
    let guard = flow.guard.get();
    claim.guard = busy(guard);
    claim.port = u32::from(port.to_be());
    // Judged again: another CPU may have taken it.
    if worth_of_flow(flow, guard, *context) == 0 || !tables.swap(&flow.guard, guard, claim.guard) {
        return Err(DropReason::Race);
    }
    Ok(())
}

/// The flows among which one is chosen: those of the ports of one source.
struct Window {
    lane: hash::Lane,
    source: u32,
    low: u16,
    high: u16,
    /// Where the search begins.
    first: u16,
}

impl Window {
    #[inline(always)]
    fn of<V: Family, T: Tables>(
        packet: &Packet<V>,
        backend: &Backend,
        turn: u32,
        context: Context<'_, T>,
    ) -> Result<Self, DropReason> {
        let sources = backend.sources.get();
        let (first, number) = ((sources >> 32) as u32, sources as u32);
        if number == 0 {
            return Err(DropReason::NoPort);
        }
        let entry = context.tables.source(first).ok_or(DropReason::Tables)?;
        // All sources of a backend have the same ports.
        let (low, high) = (entry.port_low.get(), entry.port_high.get());
        let ports = u32::from(high.wrapping_sub(low)) + 1;
        let source = first + turn / ports % number;
        let entry = context.tables.source(source).ok_or(DropReason::Tables)?;
        let lane = hash::lane::<V>(
            V::narrow(&backend.address),
            port_of(backend, packet.destination_port()),
            V::narrow(&entry.address),
            packet.protocol(),
            context.config.hash_key[0].get(),
        );
        let first = low.wrapping_add((turn % ports) as u16);
        Ok(Self { lane, source, low, high, first })
    }

    /// For a flow that is not translated any place will do.
    #[inline(always)]
    const fn anywhere(place: Place) -> Self {
        Self { lane: hash::Lane::at(place.tag), source: 0, low: 0, high: u16::MAX, first: 0 }
    }
}

// TCP is what is not UDP everywhere above.
const _: () = assert!(TCP != UDP);
