//! The same packets through the decision on the host and through the loaded program: the same verdict, the
//! same bytes, the same tables, over sequences in which flows are opened, answered, ended, expire and are
//! replaced.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Instant,
};

use lb_common::{
    abi::{self, Flow, Tick},
    sim::MemTables,
    verdict::{DropReason, Note, ResetReason, Verdict},
};
use lb_userspace::dataplane::{Dataplane as _, FlowsOf, kernel::KernelDataplane};
use tests::{
    both::Both,
    packets::{self, Spec, flag},
    random::Random,
    world::{self, BACKEND_MAC, LIMITS, VIP, VIP_ALL_PORTS, VIP_SHARED, VIP_V6, port},
};

const PACKETS: u32 = 280_000;
/// Packets that each verdict must have at least.
const OFTEN: u64 = 500;

/// Verdicts that one CPU and whole tables cannot provoke; they have fixtures on the host.
fn is_out_of_reach(name: &str) -> bool {
    name == DropReason::Race.name()
}

/// Makes packets: of few clients to all services, and replies to flows that there are.
struct Maker {
    random: Random,
    /// Clients whose UDP flows to the same service belong into one bucket, more than it has ways.
    crowd: Vec<(IpAddr, u16)>,
    /// The same of records.
    crowd_of_records: Vec<(IpAddr, u16)>,
}

impl Maker {
    fn client(&mut self, v6: bool) -> (IpAddr, u16) {
        let random = &mut self.random;
        let port = 40000 + random.below(12) as u16;
        let address = if v6 {
            let network = random.of(&[0x51_u16, 0x51, 0x52]);
            let half = random.of(&[0_u16, 0x8000]);
            Ipv6Addr::new(0x2001, 0xdb8, network, half, 0, 0, 0, random.below(6) as u16).into()
        } else {
            let third = random.of(&[100_u8, 100, 101]);
            Ipv4Addr::new(198, 51, third, random.of(&[1, 2, 3, 4, 129, 130])).into()
        };
        (address, port)
    }

    fn called(&mut self, v6: bool) -> (IpAddr, u16) {
        let random = &mut self.random;
        let ports = [
            port::WEB,
            port::WEB,
            port::WEB,
            port::WEB,
            port::WEB,
            port::WEB,
            port::TURNS,
            port::TURNS,
            port::BY_SOURCE,
            port::EMPTY,
            port::EMPTY,
            port::EMPTY,
            port::EMPTY,
            port::HELD,
            port::LOCAL,
            port::FIREWALL,
            port::FIREWALL,
            port::CUT,
            port::CUT,
            port::CUT,
            port::UNREACHABLE,
            port::UNREACHABLE,
            port::UNREACHABLE,
            port::UNREACHABLE,
            port::UNREACHABLE,
            port::FEW_PORTS,
            port::FEW_PORTS,
            port::FEW_PORTS,
            port::FEW_PORTS,
            port::FEW_PORTS,
            port::FEW_PORTS,
            port::BROKEN,
            port::ELSEWHERE,
            port::ELSEWHERE,
            port::DIRECT,
            port::DIRECT,
            port::CHANGING,
            port::CHANGING,
            port::CHANGING,
            port::CHANGING,
            port::CHANGING,
            port::CHANGING,
            port::CHANGING,
            port::CHANGING,
            9999,
        ];
        let port = random.of(&ports);
        if v6 {
            return (VIP_V6.into(), port);
        }
        match random.below(60) {
            0..=3 => (VIP_ALL_PORTS.into(), 1000 + random.below(5) as u16),
            4..=6 => (VIP_SHARED.into(), random.of(&[port::WEB, port::WEB, 22])),
            7 => (Ipv4Addr::new(192, 0, 2, 1).into(), port),
            _ => (VIP.into(), port),
        }
    }

    fn call(&mut self) -> Spec {
        if self.random.percent(5) {
            let client = self.crowd[self.random.below(self.crowd.len() as u64) as usize];
            return Spec::udp(client, (VIP.into(), port::WEB));
        }
        if self.random.percent(10) {
            let client =
                self.crowd_of_records[self.random.below(self.crowd_of_records.len() as u64) as usize];
            let flags = self.random.of(&[flag::SYN, flag::ACK, flag::ACK, flag::FIN]);
            let spec = Spec::tcp(client, (VIP.into(), port::CHANGING), flags);
            let sequence = if flags == flag::SYN { 1000 } else { self.random.of(&[1000, 1001, 1500]) };
            return Spec { numbers: (sequence, spec.numbers.1), ..spec };
        }
        let v6 = self.random.percent(40);
        let (source, destination) = (self.client(v6), self.called(v6));
        let mut spec = if self.random.percent(65) {
            let flags = self.random.of(&[
                flag::SYN,
                flag::SYN,
                flag::SYN,
                flag::ACK,
                flag::ACK,
                flag::ACK | flag::FIN,
                flag::RST,
                flag::SYN | flag::ACK,
                0,
                flag::FIN,
            ]);
            Spec::tcp(source, destination, flags)
        } else {
            Spec::udp(source, destination)
        };
        self.vary(&mut spec);
        spec
    }

    /// A reply to a random flow of the table, or near one; `None` if the place that was looked at is empty.
    fn reply(&mut self, host: &MemTables) -> Option<Spec> {
        let start = self.random.below(u64::from(LIMITS.flows)) as usize;
        let flow = host
            .flows
            .iter()
            .cycle()
            .skip(start)
            .take(64)
            .find(|flow| flow.guard.get() & 3 == Flow::LIVE && flow.flags.get() & Flow::LOCAL == 0)?;
        let flags = flow.flags.get();
        let backend = &host.backends[flow.backend[0].get() as usize];
        let source = &host.sources[flow.source.get() as usize];
        let address =
            |words: &[lb_common::shared::Shared<u64>; 2]| abi::ip_addr([words[0].get(), words[1].get()]);
        let port = |raw: u16| u16::from_be(raw);
        let backend_port = if backend.port.get() == 0 { flow.ports[1].get() } else { backend.port.get() };
        let mut from = (address(&backend.address), port(backend_port));
        let mut to = (address(&source.address), port(flow.ports[2].get()));
        match self.random.below(60) {
            0 => from.1 ^= 1,
            1 => to.1 ^= 1,
            _ => {}
        }
        if from.0.is_ipv4() != to.0.is_ipv4() {
            return None;
        }
        let mut spec = if flags & Flow::UDP != 0 {
            Spec::udp(from, to)
        } else {
            let flags = self.random.of(&[
                flag::SYN | flag::ACK,
                flag::SYN | flag::ACK,
                flag::ACK,
                flag::ACK,
                flag::ACK | flag::FIN,
                flag::RST,
            ]);
            Spec::tcp(from, to, flags)
        };
        spec.mac = BACKEND_MAC;
        self.vary(&mut spec);
        if self.random.percent(70) {
            spec.vlan = (flow.flags.get() & Flow::TAGGED != 0).then_some(200);
        }
        Some(spec)
    }

    fn vary(&mut self, spec: &mut Spec) {
        let random = &mut self.random;
        // Now and then what follows a SYN's number, so that a handshake comes to its end.
        let sequence = random.next() as u32;
        let sequence = random.of(&[sequence, 1000, 1000, 1001, 1001 + sequence % 3000]);
        spec.numbers = (sequence, if spec.tcp.is_some_and(|f| f & flag::ACK != 0) { 7 } else { 0 });
        let length = random.below(60) as usize;
        spec.payload = (0..length).map(|_| random.next() as u8).collect();
        if random.percent(10) {
            spec.vlan = Some(100 + random.below(3) as u16);
        }
        if random.percent(10) {
            spec.options =
                if spec.source.0.is_ipv4() { 4 * random.below(11) as u8 } else { random.below(4) as u8 };
        }
        if random.percent(3) {
            spec.ttl = random.below(3) as u8;
        }
        spec.no_checksum = random.percent(20);
    }

    /// Damages a frame.
    fn spoil(&mut self, frame: &mut Vec<u8>) {
        let random = &mut self.random;
        let l3 = if frame[12..14] == [0x81, 0] { 18 } else { 14 };
        match random.below(12) {
            0 => frame.truncate(14 + random.below(frame.len() as u64 - 13) as usize),
            // The network header: version, lengths, fragment bits, protocol.
            1 | 2 if frame.len() > l3 + 10 => {
                let at = l3 + random.below(10) as usize;
                frame[at] = random.next() as u8;
            }
            3 if frame.len() > l3 + 10 && frame[l3] >> 4 == 4 => {
                // The first fragment, or a later one.
                frame[l3 + 6] = random.of(&[0x20, 0x20, 0x00]);
                frame[l3 + 7] = random.of(&[0x00, 0x00, 0x10]);
            }
            4 | 9 | 10 if frame.len() > l3 + 10 => {
                let protocol = random.of(&[1_u8, 58, 1, 58, 47, 132, 44, 43, 0, 60]);
                let at = if frame[l3] >> 4 == 4 { l3 + 9 } else { l3 + 6 };
                frame[at] = protocol;
            }
            5 => frame[0] |= 1,
            6 => {
                frame[12] = random.next() as u8;
                frame[13] = random.next() as u8;
            }
            7 | 8 if frame.len() > l3 + 33 => {
                // Version or header length; data offset of TCP, or a part of the length of UDP.
                let udp = frame[l3 + 9] == abi::UDP;
                let at = random.of(&[l3, l3 + if udp { 24 } else { 32 }]);
                frame[at] = random.of(&[0x41, 0x35, 0x10, 0xf0]);
            }
            _ => {
                let at = random.below(frame.len() as u64) as usize;
                frame[at] ^= 1 << random.below(8);
            }
        }
    }
}

#[test]
fn host_and_kernel_decide_alike() {
    if !xtask::lab::possible("host_and_kernel_decide_alike") {
        return;
    }
    let seed = Random::seed(20_261_123);
    println!("seed {seed}");

    let mut kernel = KernelDataplane::open(None, LIMITS).expect("the program loads");
    let world = world::fill(&mut kernel).expect("the tables can be filled");
    let mut both = Both::new(kernel);
    let crowd = world::crowd(both.kernel.copy().expect("tables can be read"));
    let now = both.kernel.now().expect("there is a clock");
    let crowd_of_records = world::crowd_of_records(both.kernel.copy().expect("tables can be read"), now);
    let mut maker = Maker { random: Random::new(seed), crowd, crowd_of_records };
    let mut tally: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut compared, mut rewritten) = (0_u64, 0_u64);

    let began = Instant::now();
    for number in 0..PACKETS {
        if number % 500 == 0 {
            both.compare_tables();
            let flows = maker.random.of(&[FlowsOf::Keep, FlowsOf::Cut, FlowsOf::Forget, FlowsOf::Keep]);
            let dead = maker.random.percent(30);
            world::set_flows(&mut both.kernel, &world.cut, flows, dead).expect("backends can be written");
            // Slots of changes that are fresh, or not.
            let now = both.kernel.now().expect("there is a clock");
            let since = Tick(now.0.saturating_sub(maker.random.of(&[0, 1, 40, world::OLD])));
            world::turn_slots(&mut both.kernel, &world, since).expect("sides can be written");
            // Enough for all, or hardly any. What is left of a second's is used up first, so it is for two seconds each time.
            let resets = if matches!(began.elapsed().as_secs() % 5, 1 | 2) { 3 } else { 100_000 };
            world::set_globals(&mut both.kernel, resets).expect("the configuration can be written");
            both.align();
        }
        let reply = if maker.random.percent(70) { maker.reply(&both.host) } else { None };
        let spec = reply.unwrap_or_else(|| maker.call());
        let mut frame = spec.build();
        let spoiled = maker.random.percent(13);
        if spoiled {
            maker.spoil(&mut frame);
        }
        let Some((verdict, out)) = both.run(&frame) else { continue };
        compared += 1;
        *tally.entry(verdict.name()).or_default() += 1;
        if let Verdict::ToBackend { .. } | Verdict::ToClient { .. } | Verdict::Reset { .. } = verdict {
            rewritten += 1;
            if !spoiled {
                check(&spec, verdict, &out);
            }
        }
    }
    both.compare_tables();
    let counted = both.kernel.verdicts().expect("counters can be read");
    let notes = Note::ALL.map(|note| (note.name(), counted[note.counter()]));
    println!("{notes:?}");
    assert!(notes.iter().all(|(_, times)| *times >= OFTEN), "met less than {OFTEN} times: {notes:?}");
    println!("{compared} packets alike, {} unclear, {rewritten} rewritten: {tally:#?}", both.unclear);
    assert!(compared >= 100_000, "{compared} packets compared");
    assert!(rewritten * 100 >= compared * 60, "{rewritten} of {compared} reached a rewrite");
    let seldom: Vec<_> = Verdict::names()
        .filter(|name| !is_out_of_reach(name) && tally.get(name).copied().unwrap_or(0) < OFTEN)
        .map(|name| (name, tally.get(name).copied().unwrap_or(0)))
        .collect();
    assert!(seldom.is_empty(), "met less than {OFTEN} times: {seldom:?}");
}

/// An independent look at what became of an undamaged packet.
fn check(spec: &Spec, verdict: Verdict, out: &[u8]) {
    let seen = packets::read(out).expect("a packet like the one before");
    assert!(seen.checksums, "{spec:?} became {seen:?}");
    match verdict {
        Verdict::ToBackend { .. } if matches!(spec.destination.1, port::DIRECT | port::CHANGING) => {
            assert_eq!((seen.payload, seen.tcp, seen.ttl), (spec.payload.clone(), spec.tcp, spec.ttl));
            assert_eq!((seen.source, seen.destination), (spec.source, spec.destination));
            assert!(seen.macs.0 == world::BACK_MAC && world::is_backend_mac(seen.macs.1), "{:?}", seen.macs);
        }
        Verdict::ToBackend { .. } => {
            assert_eq!((seen.payload, seen.tcp, seen.ttl), (spec.payload.clone(), spec.tcp, spec.ttl - 1));
            assert!(seen.macs.0 == world::BACK_MAC && world::is_backend_mac(seen.macs.1), "{:?}", seen.macs);
            assert!((world::PORTS.low..=world::PORTS.high).contains(&seen.source.1));
        }
        Verdict::ToClient { .. } => {
            assert_eq!((seen.payload, seen.tcp, seen.ttl), (spec.payload.clone(), spec.tcp, spec.ttl - 1));
        }
        Verdict::Reset { reason, .. } => {
            assert!(seen.tcp.is_some_and(|flags| flags & flag::RST != 0), "{seen:?}");
            assert_eq!((seen.source, seen.destination), (spec.destination, spec.source));
            if reason == ResetReason::NoBackend {
                // RFC 9293 section 3.10.7.1: without ACK, the sequence number is zero and SYN counts.
                let length = u32::try_from(spec.payload.len()).expect("short") + 1;
                assert_eq!(seen.numbers, (0, spec.numbers.0.wrapping_add(length)));
            }
        }
        Verdict::Pass(_) | Verdict::Drop(_) => {}
    }
}
