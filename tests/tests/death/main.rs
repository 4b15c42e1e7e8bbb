//! The daemon may die between any two stores: packets then find the tables as they were before the change or as
//! they are after it, for each listener, and whoever starts next brings them where a clean start would have.
//!
//! A child applies the operations of a plan to the kernel's tables and is killed at the n-th change of them
//! ([`fault`]), for every n until it comes to the end. A reader sends packets through the program all the time, on
//! a CPU of its own, and at least once round before and after each death.

#![expect(unsafe_code, reason = "a process that shares the tables with this one is forked off, and dies")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use anyhow::{Context as _, Result, bail, ensure};
use changes::{Change, DATAGRAMS, State, Step, Wanted, addresses, changes};
use lb_common::abi::{NO_BACKEND, Standing, Tick};
use lb_userspace::{
    dataplane::{
        Dataplane as _, FlowsOf, Mode, NextHop, Op, RuleSet, SideEntry, Tables, fault,
        kernel::{KernelDataplane, remove_pins},
    },
    model::Listen,
};
use nix::{
    sys::{
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};
use tests::both::stay_on;
use tests::packets::{self, Spec, flag};
use xtask::lab::{self, Namespace};

mod changes;

const BPFFS: &str = "/sys/fs/bpf";

/// What became of a packet, as far as it is promised.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// By the number of the backend; where it is the same connection still, with all its bytes.
    To(u8, Option<Vec<u8>>),
    Reset,
    /// XDP's other actions.
    Other(u32),
}

/// Runs the program on a packet; `exact`: all bytes of it matter.
fn run(plane: &mut KernelDataplane, frame: &[u8], exact: bool) -> Outcome {
    const XDP_TX: u32 = 3;
    let ran = plane.run_once(frame).unwrap_or_else(|why| panic!("{why}"));
    if ran.action != XDP_TX {
        return Outcome::Other(ran.action);
    }
    let seen = packets::read(&ran.frame).unwrap_or_else(|why| panic!("{why}: {:02x?}", ran.frame));
    if seen.tcp.is_some_and(|flags| flags & flag::RST != 0) {
        return Outcome::Reset;
    }
    assert!(seen.checksums, "{seen:?}");
    Outcome::To(seen.macs.1[5], exact.then_some(ran.frame))
}

/// A packet that is sent again and again, and what may become of it.
struct Probe {
    name: String,
    frame: Vec<u8>,
    exact: bool,
    allowed: BTreeSet<Outcome>,
    /// Its connection was promised nothing: its backend is being taken out.
    free: bool,
}

/// What a client sends first, and what it sends then.
fn packets_of(number: u32, called: (IpAddr, u16)) -> [Vec<u8>; 2] {
    let client = client(number, called.0);
    match called.1 {
        // Without translation nothing else tells two datagrams apart.
        DATAGRAMS => [b"first", b"again"].map(|said| Spec::udp(client, called).with_payload(said).build()),
        _ => [
            Spec::tcp(client, called, flag::SYN).build(),
            Spec::tcp(client, called, flag::ACK).with_payload(b"data").build(),
        ],
    }
}

/// Longer than any time that slots take, in ticks: an hour.
const LONG: u32 = (3_600_000_000_000_u64 >> Tick::SHIFT) as u32;

/// Clients of each service that have a connection, and as many that have none, each time that it is played.
const CLIENTS: u32 = 12;

/// No two are alike.
fn client(number: u32, called: IpAddr) -> (IpAddr, u16) {
    let last = 1 + (number % 20) as u8;
    let ip = match called {
        IpAddr::V4(_) => IpAddr::from([198, 51, 100, last]),
        IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0x51, 0, 0, 0, 0, last.into()]),
    };
    (ip, 20_000 + (number / 20) as u16)
}

/// SYNs of clients who have no connection yet; what would become of them after a clean start with one of these
/// documents may become of them.
fn first_packets(round: u32, clean: &mut [KernelDataplane], last: &Wanted) -> Vec<Probe> {
    let mut probes = Vec::new();
    for (service, called) in addresses().into_iter().enumerate() {
        for number in (2 * round) * CLIENTS..(2 * round + 1) * CLIENTS {
            let [frame, _] = packets_of(number, called);
            let mut allowed: BTreeSet<_> = clean.iter_mut().map(|plane| run(plane, &frame, false)).collect();
            let leaves =
                |outcome: &Outcome| matches!(outcome, Outcome::To(to, _) if !last.has(called.0, *to));
            if allowed.iter().any(leaves) {
                // It is sent again and again: what it has begun is reset with its backend.
                allowed.insert(Outcome::Reset);
            }
            probes.push(Probe {
                name: format!("first packet {number} of service {service}"),
                allowed,
                frame,
                exact: false,
                free: false,
            });
        }
    }
    probes
}

/// Tables after a clean start with a document.
fn clean(state: &State) -> Result<KernelDataplane> {
    let wanted = Wanted::of(state);
    let mut plane = KernelDataplane::open(None, wanted.config.settings.limits)?;
    wanted.apply(&mut plane)?;
    Ok(plane)
}

/// Its mode, the addresses that its slots lead to, its rules, and whether others are denied.
type ServiceShape = (Mode, Vec<Option<IpAddr>>, RuleSet, bool);
/// Where its service listens, its address and port, and the way there.
type BackendShape = (Listen, Option<IpAddr>, Option<u16>, Option<NextHop>);

/// What tables say, without the numbers that things have in them.
#[derive(Debug, PartialEq)]
struct Shape {
    services: BTreeMap<Listen, ServiceShape>,
    backends: BTreeSet<BackendShape>,
    keys: BTreeSet<Listen>,
    vips: BTreeSet<IpAddr>,
    sources: BTreeSet<IpAddr>,
    rest: String,
}

impl Shape {
    fn of(tables: &Tables) -> Self {
        let listen = |service: &u32| tables.services[service].listen;
        let backend = |index: u32| tables.backends.get(&index).and_then(|entry| entry.address);
        let services = tables.services.values().map(|entry| {
            let ring = entry.ring.slots.iter().map(|slot| {
                assert!(slot.backend() == NO_BACKEND || tables.backends.contains_key(&slot.backend()));
                backend(slot.backend())
            });
            let rules = entry.firewall.rule_set.map(|set| tables.rules[&set].clone());
            (
                entry.listen,
                (entry.mode, ring.collect(), rules.unwrap_or_default(), entry.firewall.deny_others),
            )
        });
        // Those that are being taken out stay until their connections have ended.
        let there = tables.backends.values().filter(|entry| entry.flows == FlowsOf::Keep);
        for (key, service) in &tables.keys {
            assert_eq!(*key, listen(service), "a listener leads astray");
        }
        Self {
            services: services.collect(),
            backends: there.map(|e| (listen(&e.service), e.address, e.port, e.next_hop)).collect(),
            keys: tables.keys.keys().copied().collect(),
            vips: tables.vips.keys().copied().collect(),
            sources: tables.sources.values().map(|source| source.address).collect(),
            rest: format!("{:?} {:?} {:?}", tables.globals, tables.recount, tables.interfaces),
        }
    }
}

/// Sends packets all the time.
#[derive(Default)]
struct Reader {
    probes: Mutex<Vec<Probe>>,
    /// Somebody wants to change them.
    wanted: AtomicBool,
    rounds: AtomicU64,
    wrong: Mutex<Vec<String>>,
    stop: AtomicBool,
}

impl Reader {
    fn read(&self, plane: &mut KernelDataplane) {
        while !self.stop.load(SeqCst) {
            if self.wanted.load(SeqCst) {
                std::thread::yield_now();
                continue;
            }
            let probes = self.probes.lock().unwrap_or_else(PoisonError::into_inner);
            for probe in probes.iter().filter(|probe| !probe.free) {
                let outcome = run(plane, &probe.frame, probe.exact);
                if !probe.allowed.contains(&outcome) {
                    let what = format!("{}: {outcome:?}, allowed {:?}", probe.name, probe.allowed);
                    self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(what);
                }
            }
            drop(probes);
            self.rounds.fetch_add(1, SeqCst);
        }
    }

    /// Nothing is sent until the guard is dropped and [`Reader::go_on`] called.
    fn pause(&self) -> MutexGuard<'_, Vec<Probe>> {
        self.wanted.store(true, SeqCst);
        self.probes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn go_on(&self) {
        self.wanted.store(false, SeqCst);
    }

    /// Every packet has been sent at least once since now, and all was well.
    fn round(&self, when: &str) -> Result<()> {
        let now = self.rounds.load(SeqCst);
        // The round that is under way has begun before.
        while self.rounds.load(SeqCst) < now + 2 {
            ensure!(!self.stop.load(SeqCst), "{when}: nobody reads");
            std::thread::yield_now();
        }
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(wrong.is_empty(), "{when}: {:#?}", &wrong[..wrong.len().min(10)]);
        Ok(())
    }
}

/// Stops the reader, whatever happens.
struct Stop<'a>(&'a Reader);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, SeqCst);
    }
}

/// Tables that a change is made to, and the connections that are there.
struct Scene<'a> {
    plane: &'a mut KernelDataplane,
    round: u32,
    probes: Vec<Probe>,
    /// Backends without connections.
    spent: BTreeSet<u32>,
}

impl Scene<'_> {
    /// Empties the tables, and brings them to where the change begins.
    fn prepare(&mut self, change: &Change) -> Result<()> {
        let nothing = Wanted::of(&State::nothing());
        nothing.apply(self.plane)?;
        let all = self.plane.tables()?.backends.keys().copied().collect();
        for op in nothing.plan(self.plane, &all)? {
            self.plane.apply(&op)?;
        }
        for step in &change.steps {
            match step {
                Step::Put(state) => Wanted::of(state).apply(self.plane)?,
                Step::Connect => self.connect(change)?,
                Step::Talk => self.talk()?,
                Step::LongAfter => self.long_after()?,
                Step::Spend => {
                    let backends = self.plane.tables()?.backends;
                    let gone = backends.into_iter().filter(|(_, entry)| entry.flows != FlowsOf::Keep);
                    self.spent = gone.map(|(index, _)| index).collect();
                    ensure!(!self.spent.is_empty(), "nobody has left");
                }
            }
        }
        Ok(())
    }

    /// Clients begin connections.
    fn connect(&mut self, change: &Change) -> Result<()> {
        let states: Vec<Wanted> = change.states().map(Wanted::of).collect();
        for (service, called) in addresses().into_iter().enumerate() {
            for number in (2 * self.round + 1) * CLIENTS..(2 * self.round + 2) * CLIENTS {
                let [first, data] = packets_of(number, called);
                if !matches!(run(self.plane, &first, true), Outcome::To(..)) {
                    continue;
                }
                let Outcome::To(backend, bytes) = run(self.plane, &data, true) else {
                    bail!("no connection")
                };
                let keeps = |wanted: &Wanted| wanted.keeps(called.0, backend);
                self.probes.push(Probe {
                    name: format!("connection {number} of service {service}, to backend {backend}"),
                    frame: data,
                    exact: true,
                    allowed: [Outcome::To(backend, bytes)].into(),
                    free: !states.iter().all(keeps),
                });
            }
        }
        Ok(())
    }

    /// All connections show themselves.
    fn talk(&mut self) -> Result<()> {
        for probe in self.probes.iter().filter(|probe| !probe.free) {
            let outcome = run(self.plane, &probe.frame, probe.exact);
            ensure!(probe.allowed.contains(&outcome), "{}: {outcome:?}", probe.name);
        }
        Ok(())
    }

    /// All that slots remember was long ago.
    fn long_after(&mut self) -> Result<()> {
        let tables = self.plane.tables()?;
        let then = Tick(self.plane.now()?.0.wrapping_sub(LONG));
        let mut aged = 0;
        for (service, sides) in self.plane.observed(&tables)? {
            let Some(first_side) = tables.services[&service].ring.first_side else { continue };
            let old = |side: &SideEntry| SideEntry {
                standing: Standing { since: then, ..side.standing },
                unsettled_since: then,
                last_elsewhere: then,
                lost_at: then,
            };
            let sides: Vec<_> = (0..).zip(sides.iter().map(old)).collect();
            aged += sides.len();
            self.plane.apply(&Op::WriteSides { first_side, sides: sides.into() })?;
        }
        ensure!(aged > 0, "no slot remembers anything");
        Ok(())
    }
}

/// Applies operations in a process of its own, which dies at this point; whether it got to the end.
fn interrupted(plane: &mut KernelDataplane, ops: &[Op], point: u64) -> Result<bool> {
    // SAFETY: the child has this thread alone; it writes to maps, which it shares with us, and ends without
    // running anything of what else there is here.
    match unsafe { fork() }? {
        ForkResult::Child => {
            fault::die_after(point);
            let done = ops.iter().try_for_each(|op| plane.apply(op)).is_ok();
            // SAFETY: a system call that does not return.
            unsafe { nix::libc::_exit(if done { 0 } else { 1 }) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => Ok(false),
            WaitStatus::Exited(_, 0) => Ok(true),
            other => bail!("the child ended otherwise: {other:?}"),
        },
    }
}

fn play(place: &Namespace) -> Result<()> {
    place.enter()?;
    let limits = Wanted::of(&State::nothing()).config.settings.limits;
    let open = || KernelDataplane::open(Some(Path::new(BPFFS)), limits);
    let mut plane = open()?;
    let mut eyes = open()?;
    let reader = Reader::default();
    let cpus = std::thread::available_parallelism()?.get();
    let outcome = std::thread::scope(|scope| {
        let _stop = Stop(&reader);
        scope.spawn(|| {
            let _stop = Stop(&reader);
            stay_on(1 % cpus).expect("a CPU to read on");
            reader.read(&mut eyes);
        });
        stay_on(0)?;
        let mut round = 0;
        for change in changes() {
            let mut cleans: Vec<_> = change.states().map(clean).collect::<Result<_>>()?;
            let shape = Shape::of(&cleans.last().context("a change")?.tables()?);
            let last = Wanted::of(&change.last);
            let mut point = 0;
            loop {
                let when = format!("{}, death at point {point}", change.name);
                let mut probes = reader.pause();
                round += 1;
                let mut scene =
                    Scene { plane: &mut plane, round, probes: Vec::new(), spent: BTreeSet::new() };
                scene.prepare(&change)?;
                let Scene { spent, probes: connections, .. } = scene;
                *probes = connections;
                probes.extend(first_packets(round, &mut cleans, &last));
                drop(probes);
                reader.go_on();
                reader.round(&format!("before {when}"))?;
                let ops = last.plan(&plane, &spent)?;
                ensure!(ops.iter().any(|op| change.is_about(op)), "{}: {ops:?}", change.name);
                let done = interrupted(&mut plane, &ops, point)?;
                reader.round(&format!("after {when}"))?;
                if point == 2 {
                    // As a daemon that starts does it.
                    plane = open()?;
                }
                last.bring_about(&mut plane)?;
                reader.round(&format!("restarted after {when}"))?;
                assert_eq!(Shape::of(&plane.tables()?), shape, "{when}");
                if done {
                    break;
                }
                point += 1;
            }
            ensure!(point > 0, "{}: nobody died", change.name);
            println!("{}: died at each of {point} points", change.name);
        }
        Ok(())
    });
    outcome?;
    drop(plane);
    remove_pins(Path::new(BPFFS))?;
    Ok(())
}

#[test]
fn whoever_dies_at_any_store_leaves_whole_tables() -> Result<()> {
    if !lab::possible("whoever_dies_at_any_store_leaves_whole_tables") {
        return Ok(());
    }
    if !cfg!(debug_assertions) {
        // Nobody dies in such a build.
        return Ok(());
    }
    let place = Namespace::with_mounts("death", true)?;
    let played = std::thread::scope(|scope| scope.spawn(|| play(&place)).join());
    played.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
