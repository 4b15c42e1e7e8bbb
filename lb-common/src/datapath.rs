//! The decision: what becomes of one packet.
//!
//! ```text
//! frame ─► parse ─► a backend's reply? ── yes ─► translate back ──────────────► client
//!                        │ no
//!                     service ─► firewall ─► not translated? ─ yes ─► slot ─► settled? ─ no ─► record, rules
//!                        │            │           │ no                          │ yes             │
//!                       host        drop          │                             └──── forward ◄───┘
//!                                            flow known? ── yes ─► translate ─► backend
//!                                                 │ no
//!                                            select a backend, claim a port ──► backend
//! ```
//!
//! Look-ups for a packet of a known connection, beside `CONFIG`: to the backend LISTENERS, SERVICES, RECORDS,
//! BACKENDS, SOURCES, and now and then FLOWS; back to the client SOURCE_KEYS, FLOWS, BACKENDS, SERVICES (and
//! INTERFACES, where it leaves by another one), and now and then RECORDS. For a packet that is not translated:
//! LISTENERS, SERVICES, PAGES, BACKENDS, and where its slot is unsettled SIDES, RECORDS, and BACKENDS once
//! more. All but the KEYS are arrays, which cost a bounds check and a cache line; RECORDS and FLOWS are the only
//! ones that grow with traffic.

pub mod family;
pub mod firewall;
pub mod flow;
pub mod hash;
pub mod listener;
pub mod parse;
pub mod record;
pub mod reset;
pub mod rewrite;
pub mod select;
pub mod unsettled;

use crate::{
    abi::{Backend, Clock, Config, NO_BACKEND, Record, RingAt, Service, TCP, Tick, Traffic},
    tables::Tables,
    verdict::{DropReason, PassReason, ResetReason, Verdict},
    wire::{Frame, eth, eth::Link, l4::Tcp},
};
use family::{Family, V4, V6};
use flow::{Answered, Known};
use parse::Packet;
use unsettled::At;

/// What is the same for the whole of one decision, before anybody has asked for the time.
struct Setting<'a, T, C> {
    /// Of no particular time.
    context: Context<'a, T>,
    clock: C,
}

impl<'a, T, C: Clock> Setting<'a, T, C> {
    /// The same, now. Always in the same place: each would be one of its own on the stack.
    #[inline(always)]
    fn now(&mut self) -> &Context<'a, T> {
        self.context.now = self.clock.now();
        &self.context
    }
}

/// What is the same for the whole of one decision.
#[repr(C)]
pub(crate) struct Context<'a, T> {
    pub(crate) tables: &'a T,
    pub(crate) config: &'a Config,
    /// Interface the frame came in by.
    pub(crate) ingress: u32,
    pub(crate) now: Tick,
}

/// What a packet asks for: its service, and where its connection belongs.
struct Call<'a> {
    /// Index of the service.
    index: u32,
    service: &'a Service,
    place: flow::Place,
    /// What is written down of its connection, as far as that has been looked up; [`Record::GONE`]: nothing.
    written: Record,
}

impl<T> Clone for Context<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Context<'_, T> {}

/// Decides what becomes of `frame`, which came in by interface `ingress`, and changes it accordingly.
///
/// The verdict is counted, and the tables are changed as it demands.
#[inline(always)]
pub fn decide<T: Tables>(frame: &mut impl Frame, tables: &T, ingress: u32, clock: impl Clock) -> Verdict {
    let verdict = match Link::parse(frame) {
        None => PassReason::NotIp.into(),
        Some(link) if link.is_group() => PassReason::NotUnicast.into(),
        Some(link) => match link.ethertype {
            eth::IPV4 => route::<V4, _, _>(frame, link, tables, ingress, clock),
            eth::IPV6 => route::<V6, _, _>(frame, link, tables, ingress, clock),
            _ => PassReason::NotIp.into(),
        },
    };
    tables.count(verdict);
    verdict
}

/// The pipeline, for one family.
#[inline(always)]
fn route<V: Family, T: Tables, C: Clock>(
    frame: &mut impl Frame,
    link: Link,
    tables: &T,
    ingress: u32,
    clock: C,
) -> Verdict {
    let Some(config) = tables.config() else { return DropReason::Tables.into() };
    let context = Context { tables, config, ingress, now: Tick::default() };
    verdict(|| steps::<V, T, C>(frame, link, &mut Setting { context, clock }))
}

/// The verdict of steps, whether they went to the end or left early.
#[inline(always)]
fn verdict(steps: impl FnOnce() -> Result<Verdict, Verdict>) -> Verdict {
    match steps() {
        Ok(verdict) | Err(verdict) => verdict,
    }
}

/// Every step either gives the next one what it needs, or a verdict.
#[inline(always)]
fn steps<V: Family, T: Tables, C: Clock>(
    frame: &mut impl Frame,
    link: Link,
    setting: &mut Setting<'_, T, C>,
) -> Result<Verdict, Verdict> {
    let Context { tables, config, .. } = setting.context;
    let mut packet = Packet::<V>::default();
    parse::packet(frame, link, (tables, config), &mut packet)?;

    if flow::may_be_of_backend(&packet, config)
        && let Some(verdict) = reply(frame, &packet, setting.now())
    {
        return Ok(verdict);
    }

    let (index, service) = select::service(&packet, (tables, config))?;
    firewall::admit(&packet, service, tables)?;
    if packet.fragment() {
        return Err(DropReason::Fragment.into());
    }
    // The verifier would walk all that follows once with this record, and once with any.
    let written = Record(config.launder(Record::GONE.0));
    let mut call = Call { index, service, place: flow::place(&packet, config), written };
    if service.flags.get() & Service::DIRECT != 0 {
        return lead(frame, &packet, &call, setting);
    }
    if packet.ttl() <= 1 {
        return Err(DropReason::TtlExceeded.into());
    }
    let context = setting.now();
    if let Some(verdict) = continue_to_backend(frame, &packet, &mut call, context) {
        return Ok(verdict);
    }
    if let Some(verdict) = arrive(frame, &packet, &mut call, context) {
        return Ok(verdict);
    }
    Ok(set_out(frame, &packet, &call, context))
}

/// A packet of a service that does not translate: it goes where its slot says, and unless that has changed
/// hands of late nothing is looked up of its connection, and nothing kept.
#[inline(always)]
fn lead<V: Family, T: Tables, C: Clock>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    call: &Call<'_>,
    setting: &mut Setting<'_, T, C>,
) -> Result<Verdict, Verdict> {
    let tables = setting.context.tables;
    let ring = RingAt::from_word(call.service.ring.get());
    let mut index = NO_BACKEND;
    if ring.slots != 0 {
        let number = ring.slot(call.place.tag);
        let slot = select::slot(ring, number, tables)?;
        index = slot.backend();
        if let Some(first_side) = ring.first_side
            && !slot.is_settled()
        {
            let at = At { slot: number, first_side, service: call.index };
            index = unsettled::backend(frame, packet, at, index, call.place, setting.now())?;
        }
    }
    let Some((index, backend)) = select::entry(call.index, index, tables)? else {
        return Err(if packet.is_first() {
            turn_away(frame, packet, call.service, setting.now())
        } else {
            refuse(frame, packet, ResetReason::UnknownFlow, setting.now())
        });
    };
    let flags = backend.flags.get();
    if flags & Backend::CUT != 0 {
        return Err(refuse(frame, packet, ResetReason::Cut, setting.now()));
    }
    let bytes = frame.len() as u64;
    let flows = u64::from(packet.is_first());
    if flags & Backend::LOCAL == 0 {
        if flags & Backend::REACHABLE == 0 {
            return Err(DropReason::NoNextHop.into());
        }
        rewrite::forward(frame, packet, backend).ok_or(DropReason::Tables)?;
    }
    tables.count_traffic(index, Traffic { packets_in: 1, bytes_in: bytes, flows, ..Traffic::default() });
    if flags & Backend::LOCAL != 0 {
        return Err(PassReason::Local.into());
    }
    Ok(Verdict::ToBackend { interface: backend.interface.get() })
}

/// A packet of a flow that is not known; `None` if it is known now.
///
/// A function of its own also in BPF, as are the other turnings off the way of most packets: there a stack is
/// 512 bytes for all that call one another, a call takes five arguments of a word each, and a result must be
/// a word too.
#[inline(never)]
fn arrive<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    call: &mut Call<'_>,
    context: &Context<'_, T>,
) -> Option<Verdict> {
    welcome(frame, packet, call, *context).err()
}

#[inline(always)]
fn welcome<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    call: &mut Call<'_>,
    context: Context<'_, T>,
) -> Result<(), Verdict> {
    let place = call.place;
    if packet.protocol() == TCP && !packet.is_first() {
        return Err(verdict(|| stray(frame, packet, call, context)));
    }
    let Some((index, backend)) =
        select::backend(packet, (call.index, call.service), place, (context.tables, context.config))?
    else {
        return Err(turn_away(frame, packet, call.service, &context));
    };
    let link = Link::parse(frame).ok_or(DropReason::Tables)?;
    flow::open(packet, link.source_hop(), (index, backend), (place, &mut call.written), context)?;
    count_new(index, context.tables);
    Ok(())
}

/// A client's packet of a translated service; `None` if its connection is not known.
#[inline(never)]
fn continue_to_backend<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    call: &mut Call<'_>,
    context: &Context<'_, T>,
) -> Option<Verdict> {
    call.written = flow::written(call.place, *context)?.record;
    let known = flow::of_client(call.written, call.index, *context)?;
    let hop = Link::parse(frame)?.source_hop();
    if !known.is_told_by(packet, hop, context) {
        let written = flow::visit(packet, (call.index, call.place), hop, context);
        // The verifier would go on once for each way out of that.
        let written = Record(context.config.launder(written.0));
        if !written.names_flow_of(known.record) {
            // Unless another CPU has just begun the connection anew.
            return (written != Record::GONE).then_some(DropReason::Race.into());
        }
    }
    Some(verdict(|| to_backend(frame, packet, &known, *context)))
}

/// The first packet of a connection that has just been opened.
#[inline(never)]
fn set_out<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    call: &Call<'_>,
    context: &Context<'_, T>,
) -> Verdict {
    verdict(|| {
        let known = flow::of_client(call.written, call.index, *context).ok_or(DropReason::Race)?;
        to_backend(frame, packet, &known, *context)
    })
}

/// A packet of a connection that is known, from the client.
#[inline(always)]
fn to_backend<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    known: &Known<'_>,
    context: Context<'_, T>,
) -> Result<Verdict, Verdict> {
    let backend = known.backend;
    let flags = backend.flags.get();
    if flags & Backend::CUT != 0 {
        return Err(refuse(frame, packet, ResetReason::Cut, &context));
    }
    if flags & Backend::LOCAL == 0 && flags & Backend::REACHABLE == 0 {
        return Err(DropReason::NoNextHop.into());
    }
    let bytes = frame.len() as u64;
    context
        .tables
        .count_traffic(known.index, Traffic { packets_in: 1, bytes_in: bytes, ..Traffic::default() });
    if flags & Backend::LOCAL != 0 {
        return Err(PassReason::Local.into());
    }
    let source = context.tables.source(known.record.source()).ok_or(DropReason::Tables)?;
    rewrite::to_backend(frame, packet, known.record.port(), backend, source).ok_or(DropReason::Tables)?;
    Ok(Verdict::ToBackend { interface: backend.interface.get() })
}

/// A backend's packet; `None` if its flow is not known.
#[inline(never)]
fn reply<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    context: &Context<'_, T>,
) -> Option<Verdict> {
    let known = flow::of_backend(packet, *context)?;
    Some(verdict(|| to_client(frame, packet, &known, *context)))
}

/// A packet of a flow that is known, from the backend.
#[inline(always)]
fn to_client<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    known: &Answered<'_>,
    context: Context<'_, T>,
) -> Result<Verdict, Verdict> {
    if known.backend.flags.get() & Backend::CUT != 0 {
        flow::end(known.flow, &context);
        return Err(refuse(frame, packet, ResetReason::Cut, &context));
    }
    if packet.ttl() <= 1 {
        return Err(DropReason::TtlExceeded.into());
    }
    let service = context.tables.service(known.backend.service.get()).ok_or(DropReason::Tables)?;
    let interface = u32::from(known.flow.interface.get());
    let own_mac = if interface == context.ingress {
        Link::parse(frame).ok_or(DropReason::Tables)?.destination
    } else {
        context.tables.interface_mac(interface).filter(|mac| *mac != 0).ok_or(DropReason::NoNextHop)?
    };
    let bytes = frame.len() as u64;
    rewrite::to_client(frame, packet, known.flow, service, own_mac)?;
    flow::seen_from_backend(packet, known.flow, &context);
    context
        .tables
        .count_traffic(known.index, Traffic { packets_out: 1, bytes_out: bytes, ..Traffic::default() });
    Ok(Verdict::ToClient { interface })
}

/// A new connection, and no backend for it.
#[inline(always)]
fn turn_away<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    service: &Service,
    context: &Context<'_, T>,
) -> Verdict {
    if service.flags.get() & Service::HOLDS != 0 {
        return DropReason::NoBackend.into();
    }
    refuse(frame, packet, ResetReason::NoBackend, context)
}

/// A packet that nobody is to have: TCP is told why, UDP has no way to tell.
#[inline(always)]
fn refuse<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    reason: ResetReason,
    context: &Context<'_, T>,
) -> Verdict {
    if packet.protocol() == TCP {
        reset::answer(frame, packet, reason, context)
    } else {
        DropReason::NoBackend.into()
    }
}

/// In the middle of a TCP connection that is not known. Where the service's backend is this host, the
/// connection may be older than Lobby: its own stack knows best.
#[inline(always)]
fn stray<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    call: &Call<'_>,
    context: Context<'_, T>,
) -> Result<Verdict, Verdict> {
    if call.service.flags.get() & Service::ROUND_ROBIN == 0
        && let Some((_, backend)) =
            select::backend(packet, (call.index, call.service), call.place, (context.tables, context.config))?
        && backend.flags.get() & Backend::LOCAL != 0
    {
        return Err(PassReason::Local.into());
    }
    if packet.tcp_flags() & Tcp::RST != 0 {
        return Err(DropReason::StrayReset.into());
    }
    Ok(reset::answer(frame, packet, ResetReason::UnknownFlow, &context))
}

#[inline(always)]
fn count_new<T: Tables>(backend: u32, tables: &T) {
    tables.count_traffic(backend, Traffic { flows: 1, ..Traffic::default() });
}
