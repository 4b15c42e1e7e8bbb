//! What becomes of a flow: when it begins anew, whom its answers go to, and when nobody knows it any more.
//! Each packet runs through the loaded program and through the same decision on the host.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use lb_common::{
    abi::{Backend, Flow, Record, State, Tick, Traffic},
    datapath::decide,
    sim::{MemTables, SliceFrame},
    verdict::{DropReason, PassReason, ResetReason, Verdict},
};
use lb_userspace::dataplane::{BackendEntry, Dataplane as _, FlowsOf, Op, kernel::KernelDataplane};
use tests::{
    both::Both,
    packets::{self, CLIENT_MAC, Seen, Spec, flag},
    world::{self, BACK_MAC, BACKEND_MAC, INGRESS, LIMITS, OTHER_INTERFACE, VIP, port},
};

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
const TO_BACKEND: Verdict = Verdict::ToBackend { interface: INGRESS };
const TO_CLIENT: Verdict = Verdict::ToClient { interface: INGRESS };

/// Where a packet's UDP checksum is, over IPv4 without options.
const UDP_CHECKSUM: usize = 14 + 20 + 6;

/// The program and the host's copy.
struct Stand {
    both: Both,
    /// Backends that may be changed, those of [`port::CUT`] among them; no other is called here.
    backends: Vec<(u32, BackendEntry)>,
}

impl Stand {
    fn new() -> Self {
        let mut kernel = KernelDataplane::open(None, LIMITS).expect("the program loads");
        let backends = world::fill(&mut kernel).expect("the tables can be filled").cut;
        Self { both: Both::new(kernel), backends }
    }

    /// One packet that is forwarded.
    fn send(&mut self, spec: &Spec, verdict: Verdict) -> Seen {
        let (is, out) = self.both.decide(&spec.build());
        assert_eq!(is, verdict, "{spec:?}");
        let seen = packets::read(&out).expect("still a packet");
        assert!(seen.checksums, "{seen:?}");
        seen
    }

    /// A TCP packet of a client to the one backend of a service.
    fn call(&mut self, client_port: u16, flags: u8) -> Seen {
        self.send(&Spec::tcp((CLIENT, client_port), (VIP.into(), port::CUT), flags), TO_BACKEND)
    }

    /// That backend's answer to what it got.
    fn answer(&mut self, got: &Seen, flags: u8) -> Seen {
        self.send(&answer(got, flags), TO_CLIENT)
    }

    /// A connection, from its handshake on; the first packet as the backend saw it.
    fn connect(&mut self, client_port: u16) -> Seen {
        let first = self.call(client_port, flag::SYN);
        self.answer(&first, flag::SYN | flag::ACK);
        self.call(client_port, flag::ACK);
        first
    }

    fn write(&mut self, change: impl Fn(&BackendEntry) -> BackendEntry) {
        for (index, entry) in &self.backends {
            let op = Op::WriteBackend { index: *index, backend: change(entry) };
            self.both.kernel.apply(&op).expect("backends can be written");
        }
        self.both.align();
    }
}

fn answer(got: &Seen, flags: u8) -> Spec {
    Spec { mac: BACKEND_MAC, ..Spec::tcp(got.destination, got.source, flags) }
}

#[test]
fn a_connection_begins_anew_after_its_end_and_not_before() {
    if !xtask::lab::possible("a_connection_begins_anew_after_its_end_and_not_before") {
        return;
    }
    let mut stand = Stand::new();
    let first = stand.connect(40000);
    assert_eq!(stand.call(40000, flag::SYN).source, first.source, "it is established");
    stand.call(40000, flag::FIN | flag::ACK);
    assert_eq!(stand.call(40000, flag::SYN).source, first.source, "one side is not done");
    stand.answer(&first, flag::FIN | flag::ACK);
    assert_ne!(stand.call(40000, flag::SYN).source, first.source, "both are done");

    for from_client in [true, false] {
        let client_port = 40001 + u16::from(from_client);
        let first = stand.connect(client_port);
        if from_client {
            stand.call(client_port, flag::RST | flag::ACK);
        } else {
            stand.answer(&first, flag::RST | flag::ACK);
        }
        assert_ne!(stand.call(client_port, flag::SYN).source, first.source, "a reset ends both sides");
    }
    stand.both.compare_tables();
}

#[test]
fn answers_go_by_the_way_that_the_clients_packets_come() {
    if !xtask::lab::possible("answers_go_by_the_way_that_the_clients_packets_come") {
        return;
    }
    let mut stand = Stand::new();
    let first = stand.connect(40000);
    assert_eq!(stand.answer(&first, flag::ACK).macs.1, CLIENT_MAC);
    let other = [2, 0, 0, 0, 0, 0x77];
    let data = Spec::tcp((CLIENT, 40000), (VIP.into(), port::CUT), flag::ACK);
    stand.send(&Spec { mac: other, ..data }, TO_BACKEND);
    assert_eq!(stand.answer(&first, flag::ACK).macs.1, other, "another router brings them now");
}

#[test]
fn answers_leave_with_the_mac_of_the_interface_that_they_leave_by() {
    if !xtask::lab::possible("answers_leave_with_the_mac_of_the_interface_that_they_leave_by") {
        return;
    }
    // A test run comes in by the loopback interface, so on the host alone.
    let host = Stand::new().both.host;
    let decide = |spec: &Spec, ingress| {
        let mut frame = SliceFrame(spec.build());
        let verdict = decide(&mut frame, &host, ingress, Tick(1000));
        (verdict, packets::read(&frame.0).expect("still a packet"))
    };
    let call = Spec::tcp((CLIENT, 40000), (VIP.into(), port::CUT), flag::SYN);
    let (_, first) = decide(&call, OTHER_INTERFACE);
    let (verdict, seen) = decide(&answer(&first, flag::SYN | flag::ACK), INGRESS);
    assert_eq!(verdict, Verdict::ToClient { interface: OTHER_INTERFACE });
    assert_eq!(seen.macs, (BACK_MAC, CLIENT_MAC));
}

#[test]
fn flows_of_an_earlier_use_of_the_backend_are_unknown_to_both_sides() {
    if !xtask::lab::possible("flows_of_an_earlier_use_of_the_backend_are_unknown_to_both_sides") {
        return;
    }
    let mut stand = Stand::new();
    let forgotten = |entry: &BackendEntry| BackendEntry { flows: FlowsOf::Forget, ..entry.clone() };
    let reused = |entry: &BackendEntry| BackendEntry { generation: entry.generation + 1, ..entry.clone() };
    for (client_port, change) in
        [(40000, &forgotten as &dyn Fn(&BackendEntry) -> BackendEntry), (40001, &reused)]
    {
        stand.write(Clone::clone);
        let first = stand.connect(client_port);
        stand.write(change);
        let (is, _) = stand.both.decide(&answer(&first, flag::ACK).build());
        assert_eq!(is, PassReason::NotVip.into(), "the backend's side");
        let data = Spec::tcp((CLIENT, client_port), (VIP.into(), port::CUT), flag::ACK);
        let (is, _) = stand.both.decide(&data.build());
        let unknown = matches!(is, Verdict::Reset { reason: ResetReason::UnknownFlow, .. });
        assert!(unknown, "the client's side: {is:?}");
    }
}

#[test]
fn packets_and_new_flows_are_counted() {
    if !xtask::lab::possible("packets_and_new_flows_are_counted") {
        return;
    }
    let mut stand = Stand::new();
    let counted = |stand: &Stand| -> Traffic {
        let traffic = stand.both.kernel.traffic().expect("counters can be read");
        stand.backends.iter().filter_map(|(index, _)| traffic.get(index)).fold(
            Traffic::default(),
            |sum, t| Traffic {
                packets_in: sum.packets_in + t.packets_in,
                packets_out: sum.packets_out + t.packets_out,
                flows: sum.flows + t.flows,
                ..sum
            },
        )
    };
    let before = counted(&stand);
    stand.connect(40000);
    let after = counted(&stand);
    let steps = (
        after.packets_in - before.packets_in,
        after.packets_out - before.packets_out,
        after.flows - before.flows,
    );
    assert_eq!(steps, (2, 1, 1));
}

#[test]
fn all_sources_are_used_and_a_port_rests_while_another_has_rested() {
    if !xtask::lab::possible("all_sources_are_used_and_a_port_rests_while_another_has_rested") {
        return;
    }
    // With time as the test says, so on the host alone.
    let host = Stand::new().both.host;
    let send = |port: u16, client_port: u16, flags: u8, tick: u32| {
        let call = Spec::tcp((CLIENT, client_port), (VIP.into(), port), flags);
        let mut frame = SliceFrame(call.build());
        assert_eq!(decide(&mut frame, &host, INGRESS, Tick(tick)), TO_BACKEND);
        packets::read(&frame.0).expect("still a packet").source
    };
    // One source after the other, each with all its ports.
    let ports = world::PORTS.high - world::PORTS.low + 1;
    let sources: BTreeSet<IpAddr> =
        (0..=ports).map(|n| send(port::CUT, 10_000 + n, flag::SYN, 1000 + 5 * u32::from(n)).0).collect();
    assert_eq!(sources.len(), 2);

    // Four ports; all but the first rest by tick 20,004, the first ends later.
    let given: Vec<u16> = (0..4).map(|n| send(port::FEW_PORTS, 40000 + n, flag::SYN, 20_000).1).collect();
    for n in 1..4 {
        send(port::FEW_PORTS, 40000 + n, flag::RST, 20_000);
    }
    send(port::FEW_PORTS, 40000, flag::RST, 20_003);
    assert_eq!(send(port::FEW_PORTS, 40004, flag::SYN, 20_006).1, given[1], "{given:?}");
}

#[test]
fn an_association_that_has_timed_out_begins_anew() {
    if !xtask::lab::possible("an_association_that_has_timed_out_begins_anew") {
        return;
    }
    let host = Stand::new().both.host;
    let send = |tick: u32| {
        let mut frame = SliceFrame(Spec::udp((CLIENT, 40000), (VIP.into(), port::WEB)).build());
        assert_eq!(decide(&mut frame, &host, INGRESS, Tick(tick)), TO_BACKEND);
        packets::read(&frame.0).expect("still a packet").source
    };
    // Six ticks is how long one may be idle here, and a step is one.
    let first = send(1000);
    assert_eq!(send(1006), first);
    assert_ne!(send(1013), first);
}

/// The host's copy, and time as the test says.
struct Host(MemTables);

impl Host {
    fn new() -> Self {
        Self(Stand::new().both.host)
    }

    fn send(&self, spec: &Spec, tick: u32) -> (Verdict, Option<Seen>) {
        let mut frame = SliceFrame(spec.build());
        let verdict = decide(&mut frame, &self.0, INGRESS, Tick(tick));
        (verdict, packets::read(&frame.0).ok())
    }

    /// A packet of the one client to the one backend of [`port::CUT`], as the backend gets it.
    fn call(&self, flags: u8, tick: u32) -> Seen {
        let (verdict, seen) = self.send(&Spec::tcp((CLIENT, 40000), (VIP.into(), port::CUT), flags), tick);
        assert_eq!(verdict, TO_BACKEND);
        seen.expect("still a packet")
    }

    fn answer(&self, got: &Seen, flags: u8, tick: u32) {
        assert_eq!(self.send(&answer(got, flags), tick).0, TO_CLIENT);
    }

    /// The only flow that there is.
    fn flow(&self) -> &Flow {
        let mut live = self.0.flows.iter().filter(|flow| flow.guard.get() & 3 == Flow::LIVE);
        let flow = live.next().expect("a flow");
        assert!(live.next().is_none(), "one flow");
        flow
    }

    fn records(&self) -> Vec<Record> {
        let ways = self.0.records.iter().flat_map(|line| &line.ways);
        ways.filter(|way| way.key.get() > Record::BUSY).map(|way| Record(way.value.get())).collect()
    }
}

#[test]
fn a_clients_packet_that_says_nothing_new_does_not_look_at_the_flow() {
    if !xtask::lab::possible("a_clients_packet_that_says_nothing_new_does_not_look_at_the_flow") {
        return;
    }
    let host = Host::new();
    let first = host.call(flag::SYN, 1000);
    host.answer(&first, flag::SYN | flag::ACK, 1000);
    host.call(flag::ACK, 1000);
    assert_eq!(host.records()[0].state(), State::Established);
    let flow = host.flow();
    // As if it were anybody's: who looks finds no connection.
    let guard = flow.guard.get();
    flow.guard.set(guard ^ Flow::LIVE);
    assert_eq!(host.call(flag::ACK, 1000).source, first.source);
    flow.guard.set(guard);
    // In the next step, which is a tick here, it says that the connection lives.
    let expires = flow.expires.get();
    assert_eq!(host.call(flag::ACK, 1001).source, first.source);
    assert_eq!(flow.expires.get(), expires.after(1));
}

#[test]
fn longer_time_outs_hold_for_whoever_is_connected_already() {
    if !xtask::lab::possible("longer_time_outs_hold_for_whoever_is_connected_already") {
        return;
    }
    let host = Host::new();
    let first = host.call(flag::SYN, 1000);
    host.answer(&first, flag::SYN | flag::ACK, 1000);
    host.call(flag::ACK, 1000);
    let idle = &host.0.config.idle;
    idle.established.set(12_000);
    idle.set_steps();
    idle.count_anew(host.0.records.iter(), Tick(1001));
    // In the same step still, which is now 256 ticks long.
    assert_eq!(host.call(flag::ACK, 1002).source, first.source);
    assert_eq!(host.flow().expires.get(), Tick(1002 + 12_000 + 256));
}

#[test]
fn an_answer_tells_the_record_that_the_connection_lives_and_what_becomes_of_it() {
    if !xtask::lab::possible("an_answer_tells_the_record_that_the_connection_lives_and_what_becomes_of_it") {
        return;
    }
    let host = Host::new();
    let first = host.call(flag::SYN, 1000);
    assert_eq!(host.records()[0].state(), State::HalfOpen);
    host.answer(&first, flag::SYN | flag::ACK, 1000);
    host.call(flag::ACK, 1000);
    let before = host.records()[0];
    host.answer(&first, flag::ACK, 1003);
    let steps = host.0.config.idle.steps.get();
    let told = host.records()[0];
    assert_eq!((before.steps_idle(Tick(1003), steps), told.steps_idle(Tick(1003), steps)), (3, 0));
    assert_eq!(told.told(State::Established, 0), before.told(State::Established, 0), "and nothing else");
    host.answer(&first, flag::RST, 1003);
    assert_eq!(host.records()[0].state(), State::Closed);
    // A client that goes on knows better; and so it does after that.
    host.call(flag::ACK, 1003);
    assert_eq!(host.records()[0].state(), State::Closed, "its backend has to say so");
    host.answer(&first, flag::ACK, 1003);
    assert_eq!(host.records()[0].state(), State::Established);
}

#[test]
fn a_flow_given_to_another_connection_is_not_the_former_ones_any_more() {
    if !xtask::lab::possible("a_flow_given_to_another_connection_is_not_the_former_ones_any_more") {
        return;
    }
    let host = Host::new();
    let send = |client_port: u16, tick: u32| {
        host.send(&Spec::udp((CLIENT, client_port), (VIP.into(), port::FEW_PORTS)), tick)
    };
    // Four ports, and six ticks (and a step) until an association is over.
    let ports = |first: u16, tick: u32| -> Vec<u16> {
        (first..first + 4).map(|n| send(n, tick)).map(|(_, seen)| seen.expect("a packet").source.1).collect()
    };
    let (mut before, mut after) = (ports(40000, 1000), ports(50000, 1010));
    before.sort_unstable();
    after.sort_unstable();
    assert_eq!(before, after);
    assert_eq!(host.records().len(), 4, "those of the former ones are gone");
    for client_port in 40000..40004 {
        assert_eq!(send(client_port, 1010).0, DropReason::NoPort.into(), "{client_port}");
    }
    assert_eq!(host.records().len(), 4);
}

#[test]
fn a_half_open_flow_that_was_given_to_another_connection_is_not_the_former_ones_any_more() {
    let name = "a_half_open_flow_that_was_given_to_another_connection_is_not_the_former_ones_any_more";
    if !xtask::lab::possible(name) {
        return;
    }
    let host = Host::new();
    let send = |client_port: u16, flags: u8| {
        host.send(&Spec::tcp((CLIENT, client_port), (VIP.into(), port::FEW_PORTS), flags), 1000)
    };
    let call = |client_port: u16, flags: u8| {
        let (verdict, seen) = send(client_port, flags);
        assert_eq!(verdict, TO_BACKEND, "{client_port}");
        seen.expect("still a packet")
    };
    let first: Vec<_> = (40000..40004).map(|client_port| call(client_port, flag::SYN)).collect();
    let taken = call(50000, flag::SYN);
    let former =
        40000 + first.iter().position(|seen| seen.source == taken.source).expect("one of the four") as u16;
    // What was written down of it is there still, and means nothing.
    assert_eq!(host.records().len(), 5);
    let unknown = |verdict| matches!(verdict, Verdict::Reset { reason: ResetReason::UnknownFlow, .. });
    assert!(unknown(send(former, flag::ACK).0));
    let established = host.records().iter().filter(|record| record.state() != State::HalfOpen).count();
    assert_eq!(established, 0);
    // It may begin anew, and has one record then.
    host.answer(&taken, flag::SYN | flag::ACK, 1000);
    call(50000, flag::ACK);
    let again = call(former, flag::SYN);
    assert_ne!(again.source, taken.source, "who is established keeps its flow");
    assert_eq!(host.records().len(), 5);
    assert_eq!(call(50000, flag::ACK).source, taken.source);
    assert_eq!(call(former, flag::SYN).source, again.source);
}

#[test]
fn a_connection_that_has_begun_anew_keeps_its_record_when_its_former_flow_is_given_away() {
    let name = "a_connection_that_has_begun_anew_keeps_its_record_when_its_former_flow_is_given_away";
    if !xtask::lab::possible(name) {
        return;
    }
    let host = Host::new();
    let port_of = |client_port: u16, tick: u32| {
        let call = Spec::udp((CLIENT, client_port), (VIP.into(), port::FEW_PORTS));
        host.send(&call, tick).1.expect("a packet").source.1
    };
    let former = port_of(40000, 1000);
    let now = port_of(40000, 1010);
    let others: BTreeSet<u16> = (50000..50003).map(|client_port| port_of(client_port, 1010)).collect();
    assert!(others.contains(&former) && !others.contains(&now), "{former}, {now}, {others:?}");
    assert_eq!(port_of(40000, 1010), now);
}

#[test]
fn a_connection_that_is_cut_has_ended() {
    if !xtask::lab::possible("a_connection_that_is_cut_has_ended") {
        return;
    }
    let host = Host::new();
    let first = host.call(flag::SYN, 1000);
    host.answer(&first, flag::SYN | flag::ACK, 1000);
    host.call(flag::ACK, 1000);
    let backend = &host.0.backends[host.records()[0].backend() as usize];
    backend.flags.set(backend.flags.get() | Backend::CUT);
    let data = Spec::tcp((CLIENT, 40000), (VIP.into(), port::CUT), flag::ACK);
    let cut = Verdict::Reset { reason: ResetReason::Cut, length: 54 };
    assert_eq!(host.send(&data, 1000).0, cut);
    assert_eq!(host.records()[0].state(), State::Closed);
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_ffff() {
    if !xtask::lab::possible("a_udp_checksum_of_zero_is_sent_as_ffff") {
        return;
    }
    let mut stand = Stand::new();
    let call = Spec::udp((CLIENT, 40000), (VIP.into(), port::WEB));
    let (is, out) = stand.both.decide(&call.clone().with_payload(&[0, 0]).build());
    assert_eq!(is, TO_BACKEND);
    // The checksum is the complement of the sum of all else: added to it, it makes all ones of it, whose
    // complement is zero (RFC 768: that would say that there is none).
    let (is, out) = stand.both.decide(&call.with_payload(&out[UDP_CHECKSUM..UDP_CHECKSUM + 2]).build());
    assert_eq!((is, &out[UDP_CHECKSUM..UDP_CHECKSUM + 2]), (TO_BACKEND, &[0xff, 0xff][..]));
    assert!(packets::read(&out).is_ok_and(|seen| seen.checksums));
}
