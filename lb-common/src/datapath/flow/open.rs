//! A new connection: a flow is taken for it, and its record written.

use super::{
    GUARD_STATE, Phase, Place, anywhere, check, forget, is_live, key_of, kind, lane_of, record_of,
    replace::{Ports, Readiest, worth_of},
    sent, stay, told_record,
};
use crate::{
    abi::{Backend, Flow, Hop, Record},
    datapath::{Context, family::Family, hash, parse::Packet, record::Lines},
    tables::Tables,
    verdict::DropReason,
};

/// Opens a flow for the packet's connection, which came from `hop`, to a backend. What is `written` was found of
/// the connection when it turned out that there is none ([`Record::GONE`]: nothing was), and is its record then.
///
/// # Errors
/// There is no room, or another CPU was faster.
#[inline(always)]
pub(crate) fn open<V: Family, T: Tables>(
    packet: &Packet<V>,
    hop: u64,
    (index, backend): (u32, &Backend),
    (place, written): (Place, &mut Record),
    context: Context<'_, T>,
) -> Result<(), DropReason> {
    let Context { tables, config, .. } = context;
    let key = place.key();
    let mut claim = Claim { index, ..Claim::default() };
    claim_flow(packet, backend, place, &context, &mut claim)?;
    let flow = tables.flow(claim.number).ok_or(DropReason::Tables)?;

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
    flow.client_hop.set(hop);
    flow.key.set(key as u32);
    flow.source.set(claim.source as u16);
    flow.interface.set(context.ingress as u16);
    flow.client_sent.set(sent(0, packet));
    flow.backend_sent.set(0);
    let told = stay(flow, config, context.now);
    let live = key & !0xffff_ffff | freed(claim.guard) | Flow::LIVE;
    flow.guard.set(live);

    let new = Record::translated(index, backend.generation.get(), claim.source, claim.port as u16);
    let record = told_record(new, told).by(Hop::of(hop, context.ingress));
    let lines = Lines::of(tables, key, config).ok_or(DropReason::Tables)?;
    let outcome = match lines.find(key) {
        // The connection's own, from an earlier time.
        Some(found) if found.record == *written && found.replace(tables, record) => Ok(()),
        // Another CPU has just written the same connection down.
        Some(_) => Err(DropReason::Race),
        None => lines.insert(tables, key, record, context.now),
    };
    if outcome.is_err() {
        // Unless it is another connection's by now: as a half-open one's it could be had at once.
        tables.swap(&flow.guard, live, freed(live));
    }
    outcome?;
    // It could be had before there was a record, too.
    if !check(record, key, (flow, live), &context) {
        return Err(DropReason::Race);
    }
    *written = record;
    Ok(())
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
///
/// Its upper half remembers whether the last search found nothing but half-open flows, so that in a flood no more
/// than one is looked at. Of two CPUs that find so at once, both take it back: then it is found again.
#[inline(always)]
fn claim_flow<V: Family, T: Tables>(
    packet: &Packet<V>,
    backend: &Backend,
    place: Place,
    context: &Context<'_, T>,
    claim: &mut Claim,
) -> Result<(), DropReason> {
    let Context { tables, config, .. } = *context;
    let cursor = tables.advance_cursor(claim.index, 1).ok_or(DropReason::Tables)?;
    let window = if backend.flags.get() & Backend::LOCAL != 0 {
        Window::anywhere(place)
    } else {
        Window::of::<V, T>(packet, backend, cursor as u32, *context)?
    };
    claim.source = window.source;

    let Window { lane, low, high, first, .. } = window;
    let ports = Ports { low, high, first, flood: cursor & IN_FLOOD != 0 };
    let found = tables.search_ports(lane.to_word(), ports.to_word(), context.now.0);
    let Readiest { port, worth, flood, passed } = Readiest::from_word(found);
    let by = u64::from(passed) | if flood == ports.flood { 0 } else { IN_FLOOD };
    if by != 0 {
        let _ = tables.advance_cursor(claim.index, by);
    }
    if worth == 0 {
        return Err(DropReason::NoPort);
    }
    claim.number = lane.flow(u32::from(port), config.flow_mask.get());
    let flow = tables.flow(claim.number).ok_or(DropReason::Tables)?;
    let guard = flow.guard.get();
    claim.guard = busy(guard);
    claim.port = u32::from(port.to_be());
    // Judged again: another CPU may have taken it, and given it to a new connection that is half open.
    if (worth_of(flow, guard, *context) as u8) < worth || !tables.swap(&flow.guard, guard, claim.guard) {
        return Err(DropReason::Race);
    }
    // Where there was never more than a SYN, the record may stay: each packet that goes by it looks at its flow
    // and finds another's. For most of a flood that is a line less to wait for. If the connection gets further at
    // this very moment, its packet has noted so in the flow before it looks at the guard again (`check`).
    if is_live(guard) && Phase::of(flow) != Phase::HalfOpen {
        forget(key_of(flow, guard), record_of(flow), context);
    }
    Ok(())
}

/// Set in a cursor while there is a flood of half-open flows.
const IN_FLOOD: u64 = 1 << 63;

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
        let lane = lane_of(packet, backend, V::narrow(&entry.address), context.config);
        let first = low.wrapping_add((turn % ports) as u16);
        Ok(Self { lane, source, low, high, first })
    }

    /// For a flow that is not translated.
    #[inline(always)]
    const fn anywhere(place: Place) -> Self {
        Self { lane: anywhere(place), source: 0, low: 0, high: u16::MAX, first: 0 }
    }
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
