//! A fixture for every verdict: what goes in, what is decided, what comes out. Each runs through the loaded
//! program and through the same decision on the host.

use std::{
    cell::Cell,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use lb_common::{
    abi::{self, Tick},
    datapath::{decide, record},
    shared::Shared,
    sim::{MemTables, SliceFrame},
    tables::Tables,
    verdict::{DropReason, Note, PassReason, ResetReason, Verdict},
};
use lb_userspace::{
    dataplane::{
        BackendEntry, FlowsOf,
        kernel::{KernelDataplane, verified_where_settled},
    },
    model::Protocol,
};
use tests::{
    both::Both,
    packets::{self, Seen, Spec, flag},
    world::{
        self, BACK_MAC, BACKEND_MAC, INGRESS, LIMITS, OTHER_INTERFACE, VIP, VIP_ALL_PORTS, VIP_SHARED,
        VIP_V6, port,
    },
};

const CLIENT: (IpAddr, u16) = (IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), 40000);
const CLIENT_V6: (IpAddr, u16) = (IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 7)), 40000);

/// Instructions that the verifier may walk through to accept the program; a million is the kernel's own
/// limit. Linux 6.18 walks 172,500, and 6.1, which knows less of what it may leave out, 246,000.
const VERIFIER_BUDGET: u32 = 200_000;

/// The same before Linux 6.6.
const OLD_VERIFIER_BUDGET: u32 = 300_000;

/// Those that packets of settled slots may need of them.
const SETTLED_BUDGET: u32 = 30_000;

/// Tables on both sides, and which verdicts were met.
struct Bench {
    both: Both,
    cut: Vec<(u32, BackendEntry)>,
    met: BTreeSet<&'static str>,
}

impl Bench {
    fn new() -> Self {
        let mut kernel = KernelDataplane::open(None, LIMITS).expect("the program loads");
        let cut = world::fill(&mut kernel).expect("the tables can be filled").cut;
        Self { both: Both::new(kernel), cut, met: BTreeSet::new() }
    }

    /// One packet: the verdict it must have, and the frame that it became.
    fn expect(&mut self, what: &str, frame: &[u8], verdict: Verdict) -> Vec<u8> {
        let (is, out) = self.both.decide(frame);
        assert_eq!(is, verdict, "{what}");
        if let Verdict::Pass(_) | Verdict::Drop(_) = verdict {
            assert_eq!(out, frame, "{what}: the packet was touched");
        }
        self.met.insert(verdict.name());
        out
    }

    /// One packet that is answered by a reset; the reset.
    fn expect_reset(&mut self, what: &str, spec: &Spec, reason: ResetReason) -> Seen {
        let (is, out) = self.both.decide(&spec.build());
        let length = u16::try_from(out.len()).expect("a short frame");
        assert_eq!(is, Verdict::Reset { reason, length }, "{what}");
        self.met.insert(reason.name());
        let seen = packets::read(&out).expect("a reset is a packet");
        assert!(seen.checksums, "{what}: {seen:?}");
        assert_eq!((seen.source, seen.destination), (spec.destination, spec.source), "{what}");
        assert_eq!((seen.macs, seen.payload.len()), ((packets::OWN_MAC, spec.mac), 0), "{what}");
        seen
    }
}

fn to(port: u16) -> (IpAddr, u16) {
    (VIP.into(), port)
}

fn to_v6(port: u16) -> (IpAddr, u16) {
    (VIP_V6.into(), port)
}

fn syn(destination: (IpAddr, u16)) -> Spec {
    Spec::tcp(if destination.0.is_ipv4() { CLIENT } else { CLIENT_V6 }, destination, flag::SYN)
}

const TO_BACKEND: Verdict = Verdict::ToBackend { interface: INGRESS };
const TO_CLIENT: Verdict = Verdict::ToClient { interface: INGRESS };

#[test]
fn every_verdict_has_a_fixture() {
    if !xtask::lab::possible("every_verdict_has_a_fixture") {
        return;
    }
    let mut bench = Bench::new();
    translated(&mut bench);
    direct(&mut bench);
    passed(&mut bench);
    dropped_as_unfit(&mut bench);
    dropped_for_want(&mut bench);
    reset(&mut bench);
    used_up(&mut bench);
    bench.both.compare_tables();

    let race = DropReason::Race.name();
    let missing: Vec<_> =
        Verdict::names().filter(|name| *name != race && !bench.met.contains(name)).collect();
    assert!(missing.is_empty(), "no fixture for {missing:?}; {race} has one of its own");
}

/// What is not translated changes in nothing but the link layer, and nothing is remembered of it.
fn direct(bench: &mut Bench) {
    for (name, call) in [
        ("TCP over IPv4", syn(to(port::DIRECT)).with_payload(b"x")),
        ("in the middle of a connection", Spec::tcp(CLIENT, to(port::DIRECT), flag::ACK)),
        ("TCP over IPv6", syn(to_v6(port::DIRECT))),
        ("UDP over IPv4", Spec::udp(CLIENT, to(port::DIRECT)).with_payload(b"odd")),
        ("UDP over IPv6", Spec { no_checksum: true, ..Spec::udp(CLIENT_V6, to_v6(port::DIRECT)) }),
        ("a last hop", Spec { ttl: 1, ..syn(to(port::DIRECT)) }),
        ("options and a VLAN tag", Spec { options: 40, vlan: Some(7), ..syn(to(port::DIRECT)) }),
    ] {
        let frame = call.build();
        let out = bench.expect(name, &frame, TO_BACKEND);
        assert_eq!(out[12..], frame[12..], "{name}: more than the link layer has changed");
        assert_eq!((&out[..5], &out[6..12]), (&[2, 0, 0, 0, 8][..], &BACK_MAC[..]), "{name}");
    }
    let others =
        |way: &abi::Way| way.key.get() == abi::Record::EMPTY || abi::Record(way.value.get()).is_translated();
    assert!(bench.both.host.records.iter().all(|line| line.ways.iter().all(others)));
}

fn translated(bench: &mut Bench) {
    for (name, call) in [
        ("TCP over IPv4", syn(to(port::WEB)).with_payload(b"x")),
        ("TCP over IPv6", syn(to_v6(port::WEB))),
        ("UDP over IPv4", Spec::udp(CLIENT, to(port::WEB)).with_payload(b"odd")),
        ("UDP over IPv6", Spec::udp(CLIENT_V6, to_v6(port::WEB))),
        ("UDP without a checksum", Spec { no_checksum: true, ..Spec::udp((CLIENT.0, 40001), to(port::WEB)) }),
        ("IPv4 options", Spec { options: 40, ..syn(to(port::TURNS)) }),
        ("IPv6 extension headers", Spec { options: 3, ..syn(to_v6(port::TURNS)) }),
        ("a VLAN tag", Spec { vlan: Some(7), ..syn(to(port::FIREWALL)) }),
    ] {
        let out = bench.expect(name, &call.build(), TO_BACKEND);
        let seen = packets::read(&out).expect("still a packet");
        assert!(seen.checksums, "{name}: {seen:?}");
        let backend = world::backend_mac(seen.destination.0);
        assert_eq!(seen.macs, (BACK_MAC, backend), "{name}");
        assert_eq!(
            (seen.ttl, seen.tcp, &seen.payload, seen.vlan),
            (63, call.tcp, &call.payload, call.vlan),
            "{name}"
        );
        assert_eq!(seen.destination.1, 8080, "{name}: the backend's port");
        assert!((world::PORTS.low..=world::PORTS.high).contains(&seen.source.1), "{name}: {seen:?}");

        // The backend answers, and the client sees the service.
        let mut answer = match call.tcp {
            Some(_) => Spec::tcp(seen.destination, seen.source, flag::SYN | flag::ACK),
            None => Spec { no_checksum: call.no_checksum, ..Spec::udp(seen.destination, seen.source) },
        };
        answer.mac = BACKEND_MAC;
        answer.vlan = call.vlan.map(|_| 9);
        let mut frame = answer.build();
        if answer.vlan.is_some() {
            // The priority (IEEE 802.1Q clause 9.6) is the sender's to choose.
            frame[14] |= PRIORITY;
        }
        let out = bench.expect(name, &frame, TO_CLIENT);
        assert!(answer.vlan.is_none() || out[14] & 0xe0 == PRIORITY, "{name}: the tag's priority");
        let seen = packets::read(&out).expect("still a packet");
        assert!(seen.checksums, "{name}: {seen:?}");
        assert_eq!((seen.source, seen.destination), (call.destination, call.source), "{name}");
        assert_eq!(seen.macs, (packets::OWN_MAC, call.mac), "{name}: by the way the client came");
        assert_eq!((seen.ttl, seen.vlan, &seen.payload), (63, call.vlan, &answer.payload), "{name}");
        if call.vlan.is_some() {
            answer.vlan = None;
            bench.expect("an answer without the tag", &answer.build(), DropReason::Vlan.into());
        }
    }
    let all_ports = (VIP_ALL_PORTS.into(), 1234);
    for (call, protocol) in
        [(syn(all_ports), Protocol::Tcp), (Spec::udp((CLIENT.0, 40002), all_ports), Protocol::Udp)]
    {
        let out = bench.expect("all ports", &call.build(), TO_BACKEND);
        let (address, port) = packets::read(&out).expect("a packet").destination;
        assert_eq!(port, 1234, "the port stays");
        assert!(world::on_all_ports(protocol).contains(&address), "{protocol:?} to {address}");
    }
    bench.expect(
        "another interface",
        &syn(to(port::ELSEWHERE)).build(),
        Verdict::ToBackend { interface: OTHER_INTERFACE },
    );

    // One goes left, two goes right: the backends of a round-robin service take turns.
    let backends: Vec<IpAddr> = (0..6)
        .map(|client| {
            let call = Spec::tcp((CLIENT.0, 41000 + client), to(port::TURNS), flag::SYN);
            let out = bench.expect("a turn", &call.build(), TO_BACKEND);
            packets::read(&out).expect("a packet").destination.0
        })
        .collect();
    assert_eq!(backends[..3], backends[3..]);
    assert_eq!(backends.iter().collect::<BTreeSet<_>>().len(), 3);

    // All connections of a client go to one backend, those of many clients to all.
    let mut backend_of = |client: IpAddr, client_port| {
        let call = Spec::tcp((client, client_port), to(port::BY_SOURCE), flag::SYN);
        let out = bench.expect("by source", &call.build(), TO_BACKEND);
        packets::read(&out).expect("a packet").destination.0
    };
    let of_clients = (1..=20).map(|last| {
        let client = IpAddr::from(Ipv4Addr::new(198, 51, 100, last));
        let one = backend_of(client, 41000);
        assert!((41001..41010).all(|client_port| backend_of(client, client_port) == one), "{client}");
        one
    });
    assert_eq!(of_clients.collect::<BTreeSet<_>>().len(), 3);
}

fn passed(bench: &mut Bench) {
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = syn(to(port::WEB)).build();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    bench.expect("ARP", &with(12, &[8, 6]), PassReason::NotIp.into());
    bench.expect("a group", &with(0, &[0xff; 6]), PassReason::NotUnicast.into());
    bench.expect(
        "another host",
        &syn((Ipv4Addr::new(192, 0, 2, 1).into(), 80)).build(),
        PassReason::NotVip.into(),
    );
    bench.expect("a port without a service", &syn(to(22)).build(), PassReason::NoService.into());
    bench.expect("ICMP", &with(14 + 9, &[1]), PassReason::Icmp.into());
    bench.expect("this host", &syn(to(port::LOCAL)).build(), PassReason::Local.into());
    // Older than Lobby: nothing is known of it, and this host may know.
    let old = Spec::tcp((CLIENT.0, 45000), to(port::LOCAL), flag::ACK);
    bench.expect("in the middle, to this host", &old.build(), PassReason::Local.into());
    let mut gre = syn((VIP_SHARED.into(), 80)).build();
    gre[14 + 9] = 47;
    bench.expect("GRE to the host's own address", &gre, PassReason::NoService.into());
}

fn dropped_as_unfit(bench: &mut Bench) {
    let whole = syn(to(port::WEB)).build();
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = whole.clone();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    bench.expect("half a TCP header", &whole[..14 + 20 + 10], DropReason::Truncated.into());
    bench.expect("longer than the frame", &with(14 + 2, &[1, 0]), DropReason::Truncated.into());
    bench.expect("header length 4", &with(14, &[0x44]), DropReason::Malformed.into());
    bench.expect("data offset beyond the end", &with(14 + 20 + 12, &[0xf0]), DropReason::Malformed.into());
    bench.expect("the first fragment", &with(14 + 6, &[0x20, 0]), DropReason::Fragment.into());
    bench.expect("a later fragment", &with(14 + 6, &[0, 9]), DropReason::Fragment.into());
    // Of its bytes none is a port, whatever they look like.
    let mut later = with(14 + 6, &[0, 9]);
    later[14 + 20 + 2..14 + 20 + 4].copy_from_slice(&22u16.to_be_bytes());
    bench.expect("a later fragment that looks like ssh", &later, DropReason::Fragment.into());
    bench.expect("SCTP", &with(14 + 9, &[132]), DropReason::UnknownProtocol.into());
    let mut datagram = Spec::udp(CLIENT, to(port::WEB)).build();
    datagram[14 + 20 + 4..14 + 20 + 6].copy_from_slice(&[1, 0]);
    bench.expect("a datagram longer than its packet", &datagram, DropReason::Malformed.into());
    // RFC 8200 section 4.4: with segments left, the destination is but a stop on the way.
    let mut source_routed = Spec { options: 3, ..syn(to_v6(port::WEB)) }.build();
    source_routed[14 + 40 + 16 + 3] = 1;
    bench.expect("on its way elsewhere", &source_routed, DropReason::UnknownProtocol.into());
    let last_hop = Spec { ttl: 1, ..syn(to(port::WEB)) };
    bench.expect("TTL 1", &last_hop.build(), DropReason::TtlExceeded.into());
    let stranger =
        |source: &str| Spec::tcp((source.parse().expect("an address"), 1), to(port::FIREWALL), flag::SYN);
    bench.expect("a neighbour that is allowed", &stranger("198.51.100.1").build(), TO_BACKEND);
    bench.expect("a longer prefix denies", &stranger("198.51.100.129").build(), DropReason::Denied.into());
    bench.expect("no rule, others denied", &stranger("192.0.2.1").build(), DropReason::Denied.into());
    let stray = Spec::tcp((CLIENT.0, 46000), to(port::WEB), flag::RST);
    bench.expect("a reset of nothing", &stray.build(), DropReason::StrayReset.into());
}

fn dropped_for_want(bench: &mut Bench) {
    bench.expect("no next hop", &syn(to(port::UNREACHABLE)).build(), DropReason::NoNextHop.into());
    bench.expect(
        "UDP, no backend",
        &Spec::udp(CLIENT, to(port::EMPTY)).build(),
        DropReason::NoBackend.into(),
    );
    // Each try is for nobody, and none is told so; who is in the middle of a connection is.
    for (name, held) in [("held back", to(port::HELD)), ("held back, IPv6", to_v6(port::HELD))] {
        bench.expect(name, &syn(held).build(), DropReason::NoBackend.into());
        bench.expect(name, &syn(held).build(), DropReason::NoBackend.into());
        let middle = Spec::tcp(syn(held).source, held, flag::ACK);
        bench.expect_reset(name, &middle, ResetReason::UnknownFlow);
    }
    bench.expect("a ring without pages", &syn(to(port::BROKEN)).build(), DropReason::Tables.into());
    bench.expect("another's backend", &syn(to(port::ASTRAY)).build(), DropReason::Tables.into());
    // Four ports: four associations, and no fifth.
    for client in 0..4 {
        let call = Spec::udp((CLIENT.0, 42000 + client), to(port::FEW_PORTS));
        bench.expect("one of four ports", &call.build(), TO_BACKEND);
    }
    let fifth = Spec::udp((CLIENT.0, 42004), to(port::FEW_PORTS));
    bench.expect("no port left", &fifth.build(), DropReason::NoPort.into());
}

fn reset(bench: &mut Bench) {
    let call = syn(to(port::EMPTY)).with_payload(b"early");
    let seen = bench.expect_reset("no backend", &call, ResetReason::NoBackend);
    // RFC 9293 section 3.10.7.1: no ACK, so the sequence number is zero, and SYN and data are acknowledged.
    assert_eq!((seen.tcp, seen.numbers), (Some(flag::RST | flag::ACK), (0, 1000 + 1 + 5)));
    let call = syn(to_v6(port::EMPTY));
    let seen = bench.expect_reset("no backend, IPv6", &call, ResetReason::NoBackend);
    assert_eq!((seen.tcp, seen.numbers), (Some(flag::RST | flag::ACK), (0, 1001)));

    let middle =
        Spec { options: 8, ..Spec::tcp((CLIENT.0, 47000), to(port::WEB), flag::ACK).with_payload(b"hello") };
    let seen = bench.expect_reset("in the middle of nothing", &middle, ResetReason::UnknownFlow);
    assert_eq!((seen.tcp, seen.numbers), (Some(flag::RST), (2000, 0)));

    let call = Spec::tcp((CLIENT.0, 48000), to(port::CUT), flag::SYN);
    let out = bench.expect("before the cut", &call.build(), TO_BACKEND);
    let translated = packets::read(&out).expect("a packet");
    world::set_flows(&mut bench.both.kernel, &bench.cut, FlowsOf::Cut, false)
        .expect("backends can be written");
    bench.both.align();
    let data = Spec::tcp(call.source, call.destination, flag::ACK);
    bench.expect_reset("cut, from the client", &data, ResetReason::Cut);
    let answer = Spec { mac: BACKEND_MAC, ..Spec::tcp(translated.destination, translated.source, flag::ACK) };
    bench.expect_reset("cut, from the backend", &answer, ResetReason::Cut);
    world::set_flows(&mut bench.both.kernel, &bench.cut, FlowsOf::Keep, false)
        .expect("backends can be written");
    bench.both.align();

    // A SYN sent again goes where the first went, unless that backend is believed dead.
    let again = Spec::tcp((CLIENT.0, 48001), to(port::CUT), flag::SYN);
    let first = packets::read(&bench.expect("a SYN", &again.build(), TO_BACKEND)).expect("a packet");
    let second = packets::read(&bench.expect("the same SYN", &again.build(), TO_BACKEND)).expect("a packet");
    assert_eq!(first, second);
    world::set_flows(&mut bench.both.kernel, &bench.cut, FlowsOf::Keep, true)
        .expect("backends can be written");
    bench.both.align();
    let third =
        packets::read(&bench.expect("its backend is dead", &again.build(), TO_BACKEND)).expect("a packet");
    assert_ne!(first.source, third.source, "it chose anew");
}

fn used_up(bench: &mut Bench) {
    world::set_globals(&mut bench.both.kernel, 1).expect("the configuration can be written");
    bench.both.align();
    let call = syn(to(port::EMPTY)).build();
    // What is left of the former budget goes first, at most this second's.
    let limit = Verdict::from(DropReason::ResetLimit);
    let met = (0..200_000).any(|_| bench.both.run(&call).is_some_and(|(verdict, _)| verdict == limit));
    assert!(met, "the budget is never used up");
    bench.met.insert(limit.name());

    // More UDP associations than one bucket has ways, before any of them expires: again where time runs away.
    let full = Verdict::from(DropReason::TableFull);
    let crowd = world::crowd(bench.both.kernel.copy().expect("tables can be read"));
    let met = (0..20).any(|_| {
        crowd.iter().any(|&client| {
            let call = Spec::udp(client, to(port::WEB)).build();
            bench.both.run(&call).is_some_and(|(verdict, _)| verdict == full)
        })
    });
    assert!(met, "no bucket is ever full");
    bench.met.insert(full.name());
}

/// Priority five, in the first byte of a tag.
const PRIORITY: u8 = 5 << 5;

/// Memory in which another CPU is always quicker at one kind of swap.
struct Contended<'a> {
    tables: &'a MemTables,
    /// Swaps that still succeed.
    calm: Cell<u32>,
    /// Instead of failing then, the other CPU has once written the same connection down in this way of the line.
    twin: Cell<Option<usize>>,
    /// And is slow after that.
    lenient: bool,
}

macro_rules! through {
    ($($method:ident($($argument:ident: $type:ty),*) -> $result:ty;)+) => {
        $(fn $method(&self, $($argument: $type),*) -> $result { self.tables.$method($($argument),*) })+
    };
}

impl Tables for Contended<'_> {
    through! {
        config() -> Option<&abi::Config>;
        listeners(line: u32) -> Option<&abi::Listeners>;
        vip_v4(address: abi::AddressV4) -> Option<abi::Vip>;
        vip_v6(address: abi::Address) -> Option<abi::Vip>;
        service(index: u32) -> Option<&abi::Service>;
        rule_v4(rule: &abi::RuleV4) -> Option<u32>;
        rule_v6(rule: &abi::RuleV6) -> Option<u32>;
        slot(page: u32, slot: usize) -> Option<abi::Slot>;
        side(page: u32, slot: usize) -> Option<&abi::Side>;
        records(line: u32) -> Option<&abi::Records>;
        choose_unsettled(at: u64, hash: u64, asked: u64, sequence: u32, now: u32) -> u64;
        note(note: Note) -> ();
        backend(index: u32) -> Option<&abi::Backend>;
        advance_cursor(backend: u32, by: u64) -> Option<u64>;
        take_turn(service: u32) -> Option<u64>;
        source_key_v4(address: abi::AddressV4) -> Option<u32>;
        source_key_v6(address: abi::Address) -> Option<u32>;
        source(index: u32) -> Option<&abi::Source>;
        interface_mac(interface: u32) -> Option<u64>;
        flow(index: u32) -> Option<&abi::Flow>;
        search_ports(lane: u64, ports: u64, now: u32) -> u64;
        spend_reset(now: Tick, per_second: u32) -> bool;
        count(verdict: Verdict) -> ();
        count_traffic(backend: u32, more: abi::Traffic) -> ();
    }

    fn take_way(&self, line: u32, now: u32) -> u64 {
        record::take_way(self, line, now)
    }

    fn swap(&self, word: &Shared<u64>, old: u64, new: u64) -> bool {
        match self.calm.get().checked_sub(1) {
            Some(left) => {
                self.calm.set(left);
                self.tables.swap(word, old, new)
            }
            None => match self.twin.take() {
                // Nobody else wants a flow that is given back.
                None => (self.lenient || new & 3 == 0) && self.tables.swap(word, old, new),
                Some(theirs) => {
                    let done = self.tables.swap(word, old, new);
                    for line in &self.tables.records {
                        if let Some(ours) = line.ways.iter().find(|way| way.key.get() == new) {
                            // With another port.
                            line.ways[theirs].value.set(ours.value.get() ^ 1 << 30);
                            line.ways[theirs].key.set(new);
                        }
                    }
                    done
                }
            },
        }
    }
}

/// The tables in memory, filled.
fn host() -> MemTables {
    let mut kernel = KernelDataplane::open(None, LIMITS).expect("the program loads");
    world::fill(&mut kernel).expect("the tables can be filled");
    kernel.copy().expect("tables can be read")
}

/// Ways that records are in.
fn written(host: &MemTables) -> Vec<(usize, u64)> {
    let ways = host.records.iter().flat_map(|line| (0..).zip(&line.ways));
    ways.map(|(number, way)| (number, way.key.get())).filter(|(_, key)| *key > abi::Record::BUSY).collect()
}

fn live_flows(host: &MemTables) -> usize {
    host.flows.iter().filter(|flow| flow.guard.get() & 3 != 0).count()
}

#[test]
fn of_two_that_open_the_same_connection_the_one_that_sees_it_steps_back() {
    if !xtask::lab::possible("of_two_that_open_the_same_connection_the_one_that_sees_it_steps_back") {
        return;
    }
    for (ours, theirs) in [(0, 1), (1, 0)] {
        let host = host();
        if theirs < ours {
            // The other CPU is just writing there.
            for line in &host.records {
                line.ways[theirs].key.set(abi::Record::BUSY);
            }
        }
        // A flow is taken by a first swap, a way by a second, and the record is valid with the third.
        let contended =
            Contended { tables: &host, calm: Cell::new(2), twin: Cell::new(Some(theirs)), lenient: true };
        let mut frame = SliceFrame(syn(to(port::WEB)).build());
        let verdict = decide(&mut frame, &contended, INGRESS, Tick(1000));
        let left = written(&host);
        assert_eq!((left.len(), left[0].0), (1, theirs), "{left:?}");
        assert_eq!((verdict, live_flows(&host)), (DropReason::Race.into(), 0));
        assert_eq!(frame.0, syn(to(port::WEB)).build());
    }
}

#[test]
fn who_loses_a_race_leaves_nothing_behind() {
    if !xtask::lab::possible("who_loses_a_race_leaves_nothing_behind") {
        return;
    }
    let host = host();
    // A flow is taken by a first swap, a way by a second.
    for (calm, verdict) in [(0, DropReason::Race), (1, DropReason::TableFull)] {
        let contended =
            Contended { tables: &host, calm: Cell::new(calm), twin: Cell::new(None), lenient: false };
        let mut frame = SliceFrame(syn(to(port::WEB)).build());
        assert_eq!(decide(&mut frame, &contended, INGRESS, Tick(1000)), verdict.into(), "after {calm} swaps");
        assert_eq!(frame.0, syn(to(port::WEB)).build());
        assert_eq!((live_flows(&host), written(&host)), (0, vec![]), "after {calm} swaps");
    }
    // Nobody comes between: the client's next SYN finds its place.
    let mut frame = SliceFrame(syn(to(port::WEB)).build());
    assert_eq!(decide(&mut frame, &host, INGRESS, Tick(1000)), TO_BACKEND);
}

#[test]
fn the_verifier_has_little_to_walk() {
    if !xtask::lab::possible("the_verifier_has_little_to_walk") {
        return;
    }
    let mut kernel = KernelDataplane::open(None, LIMITS).expect("the program loads");
    let walked = kernel.verified_instructions().expect("the kernel tells about the program");
    println!("verified instructions: {walked:?}");
    let budget = if is_old() { OLD_VERIFIER_BUDGET } else { VERIFIER_BUDGET };
    within(walked, budget);
}

/// Whether the kernel is older than 6.6.
fn is_old() -> bool {
    let name = nix::sys::utsname::uname().expect("the kernel has a name");
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version < (6, 6)
}

#[test]
fn the_path_of_most_packets_is_short() {
    if !xtask::lab::possible("the_path_of_most_packets_is_short") {
        return;
    }
    let walked = verified_where_settled().expect("the kernel tells about the program");
    println!("verified instructions where all is settled: {walked:?}");
    within(walked, SETTLED_BUDGET);
}

/// Kernels before 5.16 do not count.
fn within(walked: Option<u32>, budget: u32) {
    match walked {
        Some(walked) => assert!((1..=budget).contains(&walked), "{walked} of {budget}"),
        None => assert!(std::env::var_os("CI").is_none(), "this kernel does not count what it has verified"),
    }
}
