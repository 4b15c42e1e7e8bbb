//! Translated connections: found from both sides, opened, aged, replaced.
//!
//! A connection has one line for each side. Its client's packets find its *record*, by the hash of the
//! 5-tuple: it says the backend, and the source and port that packets are sent from. Its backend's packets find
//! its *flow*, which says the client; they need no search, since where the flow of a source port towards a backend
//! is follows from port, backend and source address ([`hash::Lane`]). The port is ours to choose, so where two
//! such lanes cross another port is taken; each backend has all ports of each source, and the table fills without
//! a second one beside it.
//!
//! What both sides' packets have said so far stands in the flow. A client's packet looks at it only when it can
//! change something: a SYN, FIN or RST; any, while the handshake is not finished or after the end; the first one
//! that comes by another hop; and one in each step of time ([`Idle::set_steps`]). A backend's packet tells the
//! record once in a step too, and when the state changes. So each line knows, to a step, when the connection was
//! last alive, and either can be given away without a look at the other.
//!
//! The guard word owns a flow. Who writes a new connection into it swaps the guard to BUSY, takes the record of
//! the former one away (but where that never got further than its SYN), writes the rest, and stores LIVE with the next
//! count of uses; only then the new record is written. Whoever looks a flow up checks the guard; whoever writes a record
//! that names it, once more after that (`check`). So none is left that names another connection's flow, but for
//! half-open ones, by which nobody goes without a look at the flow.
//!
//! Nothing here takes a flow away from a live connection within its idle time-out.

mod open;
mod replace;

pub(crate) use self::open::open;
pub use self::replace::{Ports, Readiest, search_ports};
use super::{
    Context,
    family::Family,
    hash,
    parse::Packet,
    record::{Found, Lines},
};
use crate::{
    abi::{Backend, Config, Flow, Hop, Idle, Record, State, TCP, Tick, UDP},
    shared::Shared,
    tables::Tables,
    wire::l4::Tcp,
};

/// Where a connection belongs, as its client sees it: two independent parts of its hash.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Chooses the line of the record.
    pub low: u32,
    /// Chooses the slot of the ring.
    pub tag: u32,
}

impl Place {
    /// The whole hash.
    #[inline(always)]
    pub(crate) const fn hash(self) -> u64 {
        self.low as u64 | (self.tag as u64) << 32
    }

    /// What the record is found by.
    #[inline(always)]
    const fn key(self) -> u64 {
        Record::key(self.hash())
    }
}

/// A connection as its client's packets find it.
pub(crate) struct Known<'t> {
    /// What is written down of it.
    pub(crate) record: Record,
    /// Index of the backend.
    pub(crate) index: u32,
    pub(crate) backend: &'t Backend,
}

/// A connection as its backend's packets find it.
pub(crate) struct Answered<'t> {
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

    /// What the record says of it.
    #[inline(always)]
    const fn state(self) -> State {
        match self {
            Self::HalfOpen => State::HalfOpen,
            Self::Established | Self::Closing => State::Established,
            Self::Closed => State::Closed,
            Self::Udp => State::Datagrams,
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

    /// For how long a flow in this phase is kept after it has been looked at, in ticks: there may be packets
    /// after that in the same step which do not.
    #[inline(always)]
    pub fn kept(self, idle: &Idle) -> u32 {
        let step = match self.state() {
            State::HalfOpen | State::Closed => 0,
            state => 1 << state.step(idle.steps.get()),
        };
        self.idle(idle) + step
    }
}

/// Where the packet's connection belongs.
#[inline(always)]
pub(crate) fn place<V: Family>(packet: &Packet<V>, config: &Config) -> Place {
    let hash = hash::of_client(packet, &config.multipliers);
    Place { low: hash as u32, tag: (hash >> 32) as u32 }
}

/// What is written down of the connection of a client's packet.
#[inline(always)]
pub(super) fn written<'t, T: Tables>(place: Place, context: Context<'t, T>) -> Option<Found<'t>> {
    let key = place.key();
    Lines::of(context.tables, key, context.config)?.find(key)
}

/// The connection of a client's packet, if what is written down still means something to the service.
#[inline(always)]
pub(super) fn of_client<'t, T: Tables>(
    record: Record,
    service: u32,
    context: Context<'t, T>,
) -> Option<Known<'t>> {
    let index = record.backend();
    let backend = context.tables.backend(index)?;
    let stays = stays(backend);
    let same = record.is_of(backend.generation.get()) && backend.service.get() == service;
    (record.is_translated() && stays && same).then_some(Known { record, index, backend })
}

impl Known<'_> {
    /// Whether a packet that came from `hop` says nothing new: what the record says is all that it needs.
    #[inline(always)]
    pub(crate) fn is_told_by<V: Family, T>(
        &self,
        packet: &Packet<V>,
        hop: u64,
        context: &Context<'_, T>,
    ) -> bool {
        let record = self.record;
        let state = record.state();
        let lasts = matches!(state, State::Established | State::Datagrams);
        let turns = packet.tcp_flags() & (Tcp::SYN | Tcp::FIN | Tcp::RST) != 0;
        let cut = self.backend.flags.get() & Backend::CUT != 0;
        let time = state.time(context.now, context.config.idle.steps.get());
        let same = record.told(state, time).by(Hop::of(hop, context.ingress)) == record;
        lasts && !turns && !cut && same
    }
}

/// Notes a client's packet in the connection's flow, and tells the record; that is given back.
/// [`Record::GONE`]: there is no such connection any more, or the packet begins another one in its place.
#[inline(never)]
pub(crate) fn visit<V: Family, T: Tables>(
    packet: &Packet<V>,
    (service, place): (u32, Place),
    hop: u64,
    context: &Context<'_, T>,
) -> Record {
    let Some(found) = written(place, *context) else { return Record::GONE };
    let Some(known) = of_client(found.record, service, *context) else { return Record::GONE };
    let Some((flow, guard)) = flow_of(packet, place, &known, context) else { return Record::GONE };
    if starts_anew(packet, flow, known.backend, context) {
        return Record::GONE;
    }
    let told = if known.backend.flags.get() & Backend::CUT != 0 {
        mark_ended(flow, context)
    } else {
        seen_from_client(packet, hop, flow, *context)
    };
    let record = told_record(known.record, told).by(Hop::of(hop, context.ingress));
    if record != known.record {
        found.replace(context.tables, record);
    }
    check(record, place.key(), (flow, guard), context);
    record
}

/// The flow of a connection that its client has, and its guard.
#[inline(always)]
fn flow_of<'t, V: Family, T: Tables>(
    packet: &Packet<V>,
    place: Place,
    known: &Known<'_>,
    context: &Context<'t, T>,
) -> Option<(&'t Flow, u64)> {
    let Context { tables, config, .. } = *context;
    let record = known.record;
    let port = u32::from(u16::from_be(record.port()));
    let lane = if known.backend.flags.get() & Backend::LOCAL != 0 {
        anywhere(place)
    } else {
        let source = tables.source(record.source())?;
        lane_of(packet, known.backend, V::narrow(&source.address), config)
    };
    let flow = tables.flow(lane.flow(port, config.flow_mask.get()))?;
    let guard = flow.guard.get();
    let same = is_live(guard)
        && key_of(flow, guard) == place.key()
        && names(record, flow)
        && flow.backend[1].get() == known.backend.generation.get()
        && is_of_client(packet, flow);
    same.then_some((flow, guard))
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
) -> Option<Answered<'t>> {
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
        || u32::from(flow.source.get()) != source
        || flow.flags.get() & (Flow::UDP | Flow::V6 | Flow::LOCAL) != kind(packet)
    {
        return None;
    }
    let index = flow.backend[0].get();
    let backend = tables.backend(index)?;
    let called = flow.ports[1].get();
    let stays = stays(backend);
    let same = backend.generation.get() == flow.backend[1].get()
        && V::narrow(&backend.address) == packet.source
        && port_of(backend, called) == packet.source_port();
    (stays && same && flow.guard.get() == guard).then_some(Answered { flow, index, backend })
}

/// Whether a client's packet begins another connection in the place of the one that is known: a SYN,
/// after that one has ended; or a SYN sent again, while the backend that did not answer is believed
/// dead.
#[inline(always)]
fn starts_anew<V: Family, T>(
    packet: &Packet<V>,
    flow: &Flow,
    backend: &Backend,
    context: &Context<'_, T>,
) -> bool {
    if packet.protocol() == UDP {
        // An association that has timed out may find another backend, as if it had been forgotten.
        return context.now.has_reached(flow.expires.get());
    }
    packet.is_first()
        && match Phase::of(flow) {
            Phase::Closed => true,
            Phase::HalfOpen => backend.flags.get() & Backend::DEAD != 0,
            Phase::Established | Phase::Closing | Phase::Udp => false,
        }
}

/// Whether a backend still has its connections.
#[inline(always)]
fn stays(backend: &Backend) -> bool {
    backend.flags.get() & (Backend::IN_USE | Backend::FORGET) == Backend::IN_USE
}

/// The port that a backend is called on by a client that called `called`. Network order.
#[inline(always)]
pub(crate) fn port_of(backend: &Backend, called: u16) -> u16 {
    match backend.port.get() {
        0 => called,
        port => port,
    }
}

/// Whether a record with the key of a flow's is its own, and not that of a later connection between the same
/// ends.
#[inline(always)]
fn names(record: Record, flow: &Flow) -> bool {
    record.names_flow_of(record_of(flow))
}

/// What a flow's record says of how it is sent.
#[inline(always)]
fn record_of(flow: &Flow) -> Record {
    let [index, generation] = &flow.backend;
    let source = u32::from(flow.source.get());
    Record::translated(index.get(), generation.get(), source, flow.ports[2].get())
}

/// Tells the record what its flow says.
#[inline(never)]
fn tell<T: Tables>(flow: &Flow, context: &Context<'_, T>) {
    let guard = flow.guard.get();
    let key = key_of(flow, guard);
    let Some(lines) = Lines::of(context.tables, key, context.config) else { return };
    if is_live(guard)
        && let Some(found) = lines.find(key)
        && names(found.record, flow)
    {
        let record = told_record(found.record, flow.told.get());
        found.replace(context.tables, record);
        check(record, key, (flow, guard), context);
    }
}

/// Takes a record away that was just written, if its flow is another connection's by now; whether it is not.
///
/// Whoever takes a flow away changes its guard, and then takes its record away as it finds it, unless the flow says
/// then that it was half open. So one of the two sees the other, whatever is written between.
#[inline(always)]
fn check<T: Tables>(record: Record, key: u64, (flow, guard): (&Flow, u64), context: &Context<'_, T>) -> bool {
    let stands = flow.guard.get() == guard;
    if !stands {
        forget(key, record, context);
    }
    stands
}

/// Takes a record away if it names the same flow as this one.
#[inline(never)]
fn forget<T: Tables>(key: u64, record: Record, context: &Context<'_, T>) {
    let Some(lines) = Lines::of(context.tables, key, context.config) else { return };
    if let Some(found) = lines.find(key)
        && found.record.names_flow_of(record)
    {
        found.remove(context.tables, key);
    }
}

/// What the record is to say, from [`Flow::told`].
#[inline(always)]
const fn told_record(record: Record, told: u16) -> Record {
    record.told(State::of_bits((told >> TOLD_TIME_BITS) as u64), told as u32)
}

const TOLD_TIME_BITS: u32 = 8;

/// The key of the record of a flow with this guard.
#[inline(always)]
fn key_of(flow: &Flow, guard: u64) -> u64 {
    guard & !0xffff_ffff | u64::from(flow.key.get())
}

/// Notes a client's packet in its flow; what its record is to say.
#[inline(always)]
fn seen_from_client<V: Family, T>(packet: &Packet<V>, hop: u64, flow: &Flow, context: Context<'_, T>) -> u16 {
    note(&flow.client_sent, packet);
    // The way back is the way by which the client's packets come: it follows them when it changes.
    store(&flow.client_hop, hop);
    store(&flow.interface, context.ingress as u16);
    stay(flow, context.config, context.now)
}

/// Notes a backend's packet in its flow, and tells the record what is new.
#[inline(always)]
pub(crate) fn seen_from_backend<V: Family, T: Tables>(
    packet: &Packet<V>,
    flow: &Flow,
    context: &Context<'_, T>,
) {
    note(&flow.backend_sent, packet);
    let before = flow.told.get();
    if stay(flow, context.config, context.now) != before {
        tell(flow, context);
    }
}

/// Sets anew how long the flow may be idle, and what its record is to say; that is given back.
#[inline(always)]
fn stay(flow: &Flow, config: &Config, now: Tick) -> u16 {
    let phase = Phase::of(flow);
    let state = phase.state();
    store(&flow.expires, now.after(phase.kept(&config.idle)));
    let time = state.time(now, config.idle.steps.get());
    let told = (state as u16) << TOLD_TIME_BITS | time as u16;
    store(&flow.told, told);
    // The verifier would go on once for each state.
    config.launder(told.into()) as u16
}

/// Marks a flow as ended by us, and tells the record.
#[inline(always)]
pub(crate) fn end<T: Tables>(flow: &Flow, context: &Context<'_, T>) {
    mark_ended(flow, context);
    tell(flow, context);
}

#[inline(always)]
fn mark_ended<T>(flow: &Flow, context: &Context<'_, T>) -> u16 {
    store(&flow.client_sent, flow.client_sent.get() | Flow::RST);
    store(&flow.backend_sent, flow.backend_sent.get() | Flow::RST);
    stay(flow, context.config, context.now)
}

/// Notes what a side has sent. Looked at once only: of two packets that are noted at the same time none undoes what the
/// other has said for the first time, unless it has something new to say itself.
#[inline(always)]
fn note<V: Family>(said: &Shared<u8>, packet: &Packet<V>) {
    let before = said.get();
    let now = sent(before, packet);
    if now != before {
        said.set(now);
    }
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

/// Where the flows are of a client's packet that are sent from a source to a backend.
#[inline(always)]
fn lane_of<V: Family>(
    packet: &Packet<V>,
    backend: &Backend,
    source: V::Address,
    config: &Config,
) -> hash::Lane {
    let port = port_of(backend, packet.destination_port());
    let backend = V::narrow(&backend.address);
    hash::lane::<V>(backend, port, source, packet.protocol(), config.hash_key[0].get())
}

/// For a flow that is not translated any place will do.
#[inline(always)]
const fn anywhere(place: Place) -> hash::Lane {
    hash::Lane::at(place.tag)
}

// TCP is what is not UDP everywhere above.
const _: () = assert!(TCP != UDP);
