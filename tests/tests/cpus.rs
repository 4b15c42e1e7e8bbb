//! Two CPUs at once on one line of records, and on one flow: packets of connections whose records share a line go
//! through the program from two threads, each on a CPU of its own, again and again at the same moment.
//!
//! What would be seen of a torn write: a record becomes visible with its key, and whoever then finds the value that
//! the way held before sends the packet to that connection's backend. So ways are filled with records of connections
//! to one backend, these end and time out, and then connections of the other backend are adopted into the same ways,
//! each by both CPUs at the same moment. (With values written after keys, and not marked as gone before, this fails within
//! seconds.)

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_common::{
    abi::{RECORD_WAYS, Record, Records, RingAt, Slot, Tick},
    datapath::{decide, unsettled::SEEN_EVERY},
    sim::SliceFrame,
};
use lb_userspace::{
    dataplane::{
        BackendEntry, Dataplane as _, FlowsOf, Globals, Mode, NextHop, Op, SideEntry, SourceEntry, SourceRun,
        VipEntry,
        kernel::{KernelDataplane, remove_pins},
    },
    model::{Idle, Limits, Listen, PortRange, Protocol},
};
use tests::{
    both::stay_on,
    packets::{self, OWN_MAC, Seen, Spec, flag},
    random::Random,
    world::{INGRESS, OLD},
};
use xtask::lab::{self, Namespace};

const BPFFS: &str = "/sys/fs/bpf";
const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10));
/// Not translated; every slot moves from the first backend to the second.
const DIRECT: u16 = 80;
/// Translated, to both.
const TRANSLATED: u16 = 81;
/// As [`DIRECT`], with slots of its own: what cannot be written down makes a slot give new connections to the backend
/// before for a while.
const CROWD: u16 = 82;
/// Last byte of the backends' MAC and IP addresses.
const BEFORE: u8 = 1;
const OWN: u8 = 2;
/// A way can be had again when its connection has been closed for so many ticks.
const CLOSED: u64 = 1;
const LIMITS: Limits =
    Limits { flows: 2048, services: 4, backends: 8, ring_pages: 4, side_pages: 2, rules: 1 };
/// Slots of both rings.
const SLOTS: u32 = 11;
/// Ways of a line and the one beside it.
const WAYS: usize = 2 * RECORD_WAYS;
/// Packets of each thread, at least.
const PACKETS: u64 = 1_500_000;
/// Connections of the crowd that never end, one of each thread: their records are refreshed again and again.
const ENDLESS: usize = 2;

fn tick(count: u64) -> Duration {
    Duration::from_nanos(count << Tick::SHIFT)
}

fn fill(plane: &mut KernelDataplane) -> Result<()> {
    let long = Duration::from_secs(3600);
    let idle = Idle {
        half_open: long,
        established: long,
        closing: tick(CLOSED),
        closed: tick(CLOSED),
        udp: long,
        port_rest: tick(1),
    };
    plane.apply(&Op::SetGlobals(Globals {
        hash_key: [5, 6],
        idle,
        resets_per_second: 1 << 20,
        same_interface_tx: true,
    }))?;
    let ports = PortRange { low: 20000, high: 23999 };
    plane.apply(&Op::WriteSource { index: 0, source: SourceEntry { address: SOURCE, ports } })?;
    let backend = |service, last: u8| BackendEntry {
        service,
        address: Some([10, 2, 0, last].into()),
        port: (service == 1).then_some(PORT),
        generation: 1,
        next_hop: Some(NextHop { interface: INGRESS, own_mac: OWN_MAC, mac: [2, 0, 0, 1, 0, last] }),
        sources: SourceRun { first: 0, count: 1 },
        flows: FlowsOf::Keep,
        dead: false,
    };
    for (index, service, last) in
        [(0, 0, BEFORE), (1, 0, OWN), (2, 1, BEFORE), (3, 1, OWN), (4, 2, BEFORE), (5, 2, OWN)]
    {
        plane.apply(&Op::WriteBackend { index, backend: backend(service, last) })?;
    }
    let since = Tick(plane.now()?.0.saturating_sub(OLD));
    for (first_side, before) in [(0, 0), (1, 4)] {
        let sides = (0..SLOTS).map(|slot| (slot, SideEntry::moving(before, since))).collect();
        plane.apply(&Op::WriteSides { first_side, sides })?;
    }
    for (service, port, slot) in [
        (0, DIRECT, (|_| Slot::unsettled(1)) as fn(u32) -> Slot),
        (1, TRANSLATED, |number| Slot::settled(2 + number % 2)),
        (2, CROWD, |_| Slot::unsettled(5)),
    ] {
        let listen = Listen { address: VIP, port: Some(port), protocol: Protocol::Tcp };
        let mode = Mode { direct: service != 1, ..Mode::default() };
        plane.apply(&Op::WriteService { index: service, listen, mode })?;
        plane.apply(&Op::WritePages { first_page: service, slots: (0..SLOTS).map(slot).collect() })?;
        let first_side = [Some(0), None, Some(1)][service as usize];
        let ring = RingAt { slots: SLOTS, first_page: service, first_side };
        plane.apply(&Op::SwitchRing { service, ring })?;
        plane.apply(&Op::SetKey { listen, service })?;
    }
    plane.apply(&Op::SetVip { address: VIP, vip: VipEntry::default() })?;
    Ok(())
}

/// A client's packets.
struct Connection {
    client: (IpAddr, u16),
    syn: Vec<u8>,
    data: Vec<u8>,
    fin: Vec<u8>,
    reset: Vec<u8>,
}

impl Connection {
    fn new(client: (IpAddr, u16), port: u16) -> Self {
        let packet = |flags| {
            let mut spec = Spec::tcp(client, (VIP, port), flags);
            // The SYN has a number of its own.
            spec.numbers.0 += u32::from(flags & flag::SYN == 0);
            spec.build()
        };
        let [syn, data, fin, reset] =
            [flag::SYN, flag::ACK, flag::FIN | flag::ACK, flag::RST | flag::ACK].map(packet);
        Self { client, syn, data, fin, reset }
    }

    fn numbered(number: u32, port: u16) -> Self {
        Self::new(
            (Ipv4Addr::from(0xc612_0000 + number / 50_000).into(), 1024 + (number % 50_000) as u16),
            port,
        )
    }
}

/// Connections, for each pair of lines.
type Lines = Vec<Vec<Connection>>;

/// Connections to a port by the pair of lines that they are written down in: so many of each of the first pairs.
/// They are of slots with even numbers, or with odd ones: a slot that has lost a connection gives new ones to the
/// backend before for a while.
fn by_line(plane: &KernelDataplane, port: u16, pairs: usize, each: usize, odd: bool) -> Result<Lines> {
    let mut host = plane.copy()?;
    // The same rings, but the backend tells which kind of slot it was.
    let slots = plane.copy()?;
    for (service, page) in slots.pages.iter().enumerate().take(3) {
        for (number, slot) in (0..SLOTS).zip(&page.slots) {
            slot.set(Slot::settled(2 * service as u32 + number % 2).0);
        }
    }
    let now = plane.now()?;
    let mut found: Vec<Vec<Connection>> = (0..pairs).map(|_| Vec::new()).collect();
    let mut missing = pairs * each;
    for number in 0.. {
        if missing == 0 {
            break;
        }
        let connection = Connection::numbered(number, port);
        let mut frame = SliceFrame(connection.syn.clone());
        decide(&mut frame, &slots, INGRESS, now);
        if (frame.0[5] == OWN) != odd {
            continue;
        }
        decide(&mut SliceFrame(connection.syn.clone()), &host, INGRESS, now);
        let line = host.records.iter().position(|records| *records != Records::default());
        let line = line.unwrap_or_else(|| panic!("a SYN is written down"));
        host.records[line] = Records::default();
        if let Some(list) = found.get_mut(line / 2).filter(|list| list.len() < each) {
            list.push(connection);
            missing -= 1;
        }
    }
    Ok(found)
}

/// Two threads, and what they found wrong.
#[derive(Default)]
struct Both {
    arrived: AtomicU64,
    stop: AtomicBool,
    wrong: Mutex<Vec<String>>,
}

/// One of the threads.
struct Cpu<'a> {
    number: usize,
    plane: &'a mut KernelDataplane,
    both: &'a Both,
    meetings: u64,
    packets: u64,
}

impl Cpu<'_> {
    /// Both go on from here at the same moment.
    fn meet(&mut self) {
        self.meetings += 1;
        self.both.arrived.fetch_add(1, SeqCst);
        let mut waited = 0u32;
        while self.both.arrived.load(SeqCst) < 2 * self.meetings && !self.both.stop.load(SeqCst) {
            waited += 1;
            if waited.is_multiple_of(1 << 12) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn send(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        self.packets += 1;
        let ran = self.plane.run_once(frame).unwrap_or_else(|why| panic!("{why}"));
        (ran.action, ran.frame)
    }

    /// The last byte of the MAC address of whom a packet goes to.
    fn lead(&mut self, frame: &[u8]) -> u8 {
        const XDP_TX: u32 = 3;
        let (action, frame) = self.send(frame);
        if action == XDP_TX { frame[5] } else { 0 }
    }

    fn expect(&self, is: u8, wanted: u8, what: impl Fn() -> String) {
        if is != wanted {
            self.fail(format!("cpu {}, {}: to {is} instead of {wanted}", self.number, what()));
        }
    }
}

impl Drop for Cpu<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.both.stop.store(true, SeqCst);
        }
    }
}

/// Runs the same on both, each on a CPU of its own; what they found wrong.
fn on_two_cpus(planes: &mut [KernelDataplane; 2], run: impl Fn(&mut Cpu<'_>) + Sync) -> Vec<String> {
    let both = Both::default();
    std::thread::scope(|scope| {
        for (number, plane) in planes.iter_mut().enumerate() {
            let (both, run) = (&both, &run);
            scope.spawn(move || {
                stay_on(number).expect("this thread may choose its CPU");
                let mut cpu = Cpu { number, plane, both, meetings: 0, packets: 0 };
                run(&mut cpu);
                println!("cpu {number}: {} packets", cpu.packets);
            });
        }
    });
    both.wrong.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Connections to the slot's own backend begin and end, so that every way of the line has held one.
fn fill_ways(cpu: &mut Cpu<'_>, line: &[Connection], [before, own]: [&AtomicU64; 2]) {
    for connection in line {
        let home = cpu.lead(&connection.syn);
        let homes = if home == OWN { own } else { before };
        homes.fetch_add(1, SeqCst);
        for packet in [&connection.data, &connection.data, &connection.fin] {
            let is = cpu.lead(packet);
            cpu.expect(is, home, || format!("{:?}, which began with a SYN", connection.client));
        }
    }
}

/// Connections of the backend before show themselves, each on both CPUs at the same moment.
fn adopt(cpu: &mut Cpu<'_>, line: &[Connection]) {
    for (number, connection) in line.iter().enumerate() {
        cpu.meet();
        for packet in [&connection.data, &connection.data] {
            let is = cpu.lead(packet);
            cpu.expect(is, BEFORE, || format!("{:?}, which was there before", connection.client));
        }
        if number % 2 == cpu.number {
            let is = cpu.lead(&connection.fin);
            cpu.expect(is, BEFORE, || format!("{:?}, which ends", connection.client));
        }
    }
}

/// How far a connection of one thread is.
#[derive(Clone, Copy)]
enum Life {
    Over,
    /// It has sent a SYN, and nothing else.
    Begins(u8),
    Goes(u8),
}

/// Connections of one thread each, more of both than the line has ways, in any order.
fn live(cpu: &mut Cpu<'_>, line: &[Connection], lives: &mut [Life], random: &mut Random) {
    let own: Vec<usize> = (0..line.len()).filter(|number| number % 2 == cpu.number).collect();
    let number = random.of(&own);
    let connection = &line[number];
    // Every third was there before, and never sends a SYN.
    let old = number.is_multiple_of(3);
    let (packet, next): (_, fn(u8) -> Life) = match lives[number] {
        Life::Over if old => (&connection.data, Life::Goes),
        Life::Over => (&connection.syn, Life::Begins),
        Life::Begins(_) if random.percent(20) => (&connection.syn, Life::Begins),
        Life::Goes(_) if number >= ENDLESS && random.percent(20) => (&connection.fin, |_| Life::Over),
        Life::Begins(_) | Life::Goes(_) => (&connection.data, Life::Goes),
    };
    let is = cpu.lead(packet);
    let home = match lives[number] {
        Life::Over if old => BEFORE,
        Life::Over if is == BEFORE => BEFORE,
        Life::Over => OWN,
        Life::Begins(home) | Life::Goes(home) => home,
    };
    cpu.expect(is, home, || format!("{:?} in the crowd", connection.client));
    lives[number] = next(home);
}

fn records(planes: &mut [KernelDataplane; 2]) -> Result<()> {
    let crowd = by_line(&planes[0], CROWD, 1, 24, false)?.remove(0);
    let lines = |each, odd| by_line(&planes[0], DIRECT, LIMITS.flows as usize / 2, each, odd);
    // Where both CPUs write a connection down at once it has two ways for a moment.
    let (to_own, of_before) = (lines(WAYS, false)?, lines(WAYS - 2, true)?);
    let (own, before) = (AtomicU64::new(0), AtomicU64::new(0));
    let begun = planes[0].now()?;
    // Records of endless connections are refreshed several times.
    let long = 4 * u64::from(SEEN_EVERY);
    let wrong = on_two_cpus(planes, |cpu| {
        let mut random = Random::new(cpu.number as u64 + 1);
        let mut lives = vec![Life::Over; crowd.len()];
        // Until what has been closed may be overwritten, which the crowd does not wait for.
        let wait = |cpu: &mut Cpu<'_>, lives: &mut [Life], random: &mut Random| {
            cpu.meet();
            let begun = Instant::now();
            while begun.elapsed() < tick(CLOSED + 2) && !cpu.both.stop.load(SeqCst) {
                for _ in 0..100 {
                    live(cpu, &crowd, lives, random);
                }
            }
        };
        let since = Instant::now();
        while (cpu.packets < PACKETS || since.elapsed() < tick(long)) && !cpu.both.stop.load(SeqCst) {
            // The crowd has the first for itself.
            to_own[1..]
                .iter()
                .skip(cpu.number)
                .step_by(2)
                .for_each(|line| fill_ways(cpu, line, [&before, &own]));
            wait(cpu, &mut lives, &mut random);
            of_before[1..].iter().for_each(|line| adopt(cpu, line));
            wait(cpu, &mut lives, &mut random);
        }
        // The other has sent as many, but for those of the crowd, and waits for nobody any more.
        cpu.both.stop.store(true, SeqCst);
    });
    ensure!(wrong.is_empty(), "{wrong:#?}");
    println!("{own:?} to the slot's own backend, {before:?} to the one before");
    // Else nobody would see whose value it is that a way holds.
    ensure!(own.load(SeqCst) > before.load(SeqCst), "too few go to the slot's own backend");
    well_formed(&planes[0].copy()?.records)?;
    refreshed(&planes[0], &crowd[..ENDLESS], begun)
}

/// What is written down of endless connections was seen of late, though they have been there all the time.
fn refreshed(plane: &KernelDataplane, endless: &[Connection], begun: Tick) -> Result<()> {
    let mut host = plane.copy()?;
    let now = plane.now()?;
    ensure!(now.since(begun) > 3 * SEEN_EVERY, "too short to tell");
    let ways = |lines: &[Records]| -> HashMap<u64, Record> {
        let used = lines.iter().flat_map(|line| &line.ways).filter(|way| way.key.get() > Record::BUSY);
        used.map(|way| (way.key.get(), Record(way.value.get()))).collect()
    };
    let there = ways(&host.records);
    let mut found = 0;
    for connection in endless {
        host.records.fill_with(Records::default);
        decide(&mut SliceFrame(connection.syn.clone()), &host, INGRESS, now);
        let key = *ways(&host.records).keys().next().context("a SYN is written down")?;
        let Some(record) = there.get(&key) else { continue };
        let idle = record.idle(now);
        ensure!(idle <= 2 * SEEN_EVERY, "{:?} was seen {idle} ticks ago: {record:?}", connection.client);
        found += 1;
    }
    ensure!(found > 0, "no endless connection is written down");
    Ok(())
}

/// No key twice, and none that somebody is still writing.
fn well_formed(records: &[Records]) -> Result<()> {
    for (pair, lines) in records.chunks(2).enumerate() {
        let ways = lines.iter().flat_map(|line| &line.ways);
        let keys: Vec<u64> = ways.map(|way| way.key.get()).filter(|key| *key != Record::EMPTY).collect();
        ensure!(!keys.contains(&Record::BUSY), "somebody is still writing to pair {pair}: {lines:?}");
        let all: HashSet<u64> = keys.iter().copied().collect();
        ensure!(all.len() == keys.len(), "a twin in pair {pair}: {lines:?}");
    }
    let used = records.iter().flat_map(|line| &line.ways).filter(|way| way.key.get() != Record::EMPTY);
    let backends = used.map(|way| Record(way.value.get()).backend()).collect::<HashSet<_>>();
    ensure!(backends.iter().all(|backend| *backend < 6), "records of backends {backends:?}");
    Ok(())
}

/// Whom a translated packet goes to, and from which port of ours; zero: to nobody.
fn translation(action: u32, frame: &[u8]) -> u64 {
    const XDP_TX: u32 = 3;
    match packets::read(frame) {
        Ok(Seen {
            destination: (IpAddr::V4(to), PORT), source, tcp: Some(flags), checksums: true, ..
        }) if action == XDP_TX && flags & flag::RST == 0 => {
            u64::from(to.octets()[3]) << 16 | u64::from(source.1)
        }
        _ => 0,
    }
}

/// Where the translated service's backends listen.
const PORT: u16 = 8080;
/// The address that translated packets are sent from.
const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 2, 0, 100));
/// Connections that last until the end of a round.
const LASTING: usize = 40;

/// The answer of a backend on a translated connection.
fn answer(translation: u64) -> Vec<u8> {
    let backend = ([10, 2, 0, (translation >> 16) as u8].into(), PORT);
    Spec::tcp(backend, (SOURCE, translation as u16), flag::ACK).build()
}

impl Cpu<'_> {
    fn translate(&mut self, frame: &[u8]) -> u64 {
        let (action, frame) = self.send(frame);
        translation(action, &frame)
    }

    fn fail(&self, what: String) {
        // What follows the first is of no account: nobody waits for the other any more.
        if !self.both.stop.swap(true, SeqCst) {
            self.both.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(what);
        }
    }

    /// The client's packets on this CPU, the backend's on the other, at the same moment: each arrives, as ever.
    fn talks(&mut self, connection: &Connection, translation: u64, client: usize) {
        for _ in 0..2 {
            if self.number == client {
                let is = self.translate(&connection.data);
                if is != translation {
                    self.fail(format!("{:?}: {is:x} instead of {translation:x}", connection.client));
                }
            } else {
                let (action, frame) = self.send(&answer(translation));
                let seen = packets::read(&frame);
                if !seen.as_ref().is_ok_and(|seen| seen.destination == connection.client && seen.checksums) {
                    self.fail(format!("an answer to {:?}: action {action}, {seen:?}", connection.client));
                }
            }
        }
    }
}

fn flows(planes: &mut [KernelDataplane; 2]) -> Result<()> {
    let opened = [AtomicU64::new(0), AtomicU64::new(0)];
    let wrong = on_two_cpus(planes, |cpu| {
        let mut number = 0;
        while cpu.packets < PACKETS / 5 && !cpu.both.stop.load(SeqCst) {
            let mut lasting = Vec::new();
            let mut ports = HashSet::new();
            for turn in 0..10 * LASTING {
                number += 2;
                let two = [0, 1].map(|cpu| Connection::numbered((number + cpu) % 20_000, TRANSLATED));
                // Each opens one: of flows, of ports and of ways both want the next.
                cpu.meet();
                // Who comes second may have to try again.
                let syn = &two[cpu.number].syn;
                let mine = (0..100).map(|_| cpu.translate(syn)).find(|translation| *translation != 0);
                opened[cpu.number].store(mine.unwrap_or(0), SeqCst);
                cpu.meet();
                let all = [&opened[0], &opened[1]].map(|opened| opened.load(SeqCst));
                for (client, (connection, translation)) in two.into_iter().zip(all).enumerate() {
                    if !ports.insert(translation) || translation == 0 {
                        cpu.fail(format!("{translation:x} stands for {:?} and another", connection.client));
                    }
                    cpu.meet();
                    cpu.talks(&connection, translation, client);
                    cpu.meet();
                    if turn.is_multiple_of(10) {
                        lasting.push((connection, translation));
                    } else {
                        ports.remove(&translation);
                        if turn % 2 == cpu.number {
                            cpu.send(&connection.reset);
                        }
                    }
                }
            }
            for (turn, (connection, translation)) in lasting.iter().enumerate() {
                cpu.talks(connection, *translation, turn % 2);
            }
            cpu.meet();
            for (connection, _) in lasting.iter().skip(cpu.number).step_by(2) {
                cpu.send(&connection.reset);
            }
        }
        cpu.both.stop.store(true, SeqCst);
    });
    ensure!(wrong.is_empty(), "{:#?}", &wrong[..wrong.len().min(10)]);
    well_formed(&planes[0].copy()?.records)
}

fn play(place: &Namespace, part: fn(&mut [KernelDataplane; 2]) -> Result<()>) -> Result<()> {
    place.enter()?;
    let open = || KernelDataplane::open(Some(Path::new(BPFFS)), LIMITS);
    // The program twice, over the same tables.
    let mut planes = [open()?, open()?];
    fill(&mut planes[0])?;
    let played = part(&mut planes);
    drop(planes);
    remove_pins(Path::new(BPFFS))?;
    played
}

fn in_a_place(test: &str, part: fn(&mut [KernelDataplane; 2]) -> Result<()>) -> Result<()> {
    if !lab::possible(test) {
        return Ok(());
    }
    ensure!(std::thread::available_parallelism()?.get() > 1, "this takes two CPUs");
    let place = Namespace::with_mounts("cpus", true)?;
    let played = std::thread::scope(|scope| scope.spawn(|| play(&place, part)).join());
    played.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn two_cpus_on_one_line_of_records_lose_nothing() -> Result<()> {
    in_a_place("two_cpus_on_one_line_of_records_lose_nothing", records)
}

#[test]
fn two_cpus_on_one_translated_connection_agree() -> Result<()> {
    in_a_place("two_cpus_on_one_translated_connection_agree", flows)
}
