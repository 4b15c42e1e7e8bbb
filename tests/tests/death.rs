//! The daemon may die between any two stores: packets then find the tables as they were before the change or as
//! they are after it, for each listener, and whoever starts next brings them where a clean start would have.
//!
//! A child applies the operations of a plan to the kernel's tables and is killed at the n-th change of them
//! ([`fault`]), for every n until it comes to the end. A reader sends packets through the program all the time, on
//! whatever CPU is free, and at least once round before and after each death.

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
use lb_common::abi::NO_BACKEND;
use lb_userspace::{
    config::Document,
    dataplane::{
        Dataplane as _, FlowsOf, Mode, NextHop, Op, RuleSet, Tables, fault,
        kernel::{KernelDataplane, remove_pins},
    },
    health::{Verdict, Verdicts},
    model::{BackendAddress, Config, Listen, Service},
    plan::{Desired, plan},
};
use nix::{
    sys::{
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};
use tests::packets::{self, Spec, flag};
use xtask::lab::{self, Namespace};

const BPFFS: &str = "/sys/fs/bpf";

/// One service that does not translate and one that does, each with some of the backends.
fn document(direct: &[(u8, u8)], translated: &[(u8, u8)], more: &str) -> String {
    let list = |backends: &[(u8, u8)], port: &str| -> String {
        let line = |(last, weight): &(u8, u8)| {
            format!("  {{ address = \"10.0.0.{last}{port}\", weight = {weight} }},\n")
        };
        backends.iter().map(line).collect()
    };
    let mut text = format!(
        "interfaces = [\"eth0\"]\nports = \"20000-20999\"\nresets_per_second = 1000000\n\
         [limits]\nflows = 65536\nservices = 8\nbackends = 64\nring_pages = 16\nside_pages = 16\nrules = 32\n\
         [timeouts]\nestablished = \"60s\"\nhalf_open = \"5s\"\n[pools.near]\nbackends = [\n{}]\n[pools.far]\nbackends = [\n{}]\n",
        list(direct, ""),
        list(translated, ":8080"),
    );
    for (backends, lines) in [
        (direct, "[services.direct]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"near\"\nforward = \"dsr\"\n"),
        (
            translated,
            "[services.translated]\nlisten = \"203.0.113.11:80/tcp\"\npool = \"far\"\nring_size = 11\n",
        ),
    ] {
        if !backends.is_empty() {
            text += lines;
            let size = if more.contains("ring_size") { "" } else { "ring_size = 11\n" };
            if lines.contains("dsr") {
                text += size;
                text += more;
                text += "\n";
            }
        }
    }
    text
}

const ALL: [(u8, u8); 3] = [(1, 1), (2, 1), (3, 1)];

/// Documents one after the other: the last of them is the change that is interrupted.
fn changes() -> Vec<(&'static str, Vec<String>)> {
    let base = || document(&ALL, &ALL, "");
    let more = [(1, 1), (2, 1), (3, 1), (4, 1)];
    let nothing = document(&[], &[], "");
    vec![
        ("a start", vec![nothing.clone(), base()]),
        ("a backend more", vec![base(), document(&more, &more, "")]),
        ("a backend less", vec![base(), document(&ALL[1..], &ALL[1..], "")]),
        ("other weights", vec![base(), document(&[(1, 1), (2, 3), (3, 0)], &[(1, 3), (2, 1), (3, 0)], "")]),
        ("a ring of another size", vec![base(), document(&ALL, &ALL, "ring_size = 31")]),
        (
            "slots that move already",
            vec![base(), document(&more, &ALL, ""), document(&more[1..], &ALL[..2], "")],
        ),
        ("and back again", vec![base(), document(&more, &ALL, ""), base()]),
        ("connections written down always", vec![base(), document(&ALL, &ALL, "track = \"always\"")]),
        ("rules", vec![base(), document(&ALL, &ALL, "allow = [\"198.51.100.0/28\", \"192.0.2.0/24\"]")]),
        ("other time-outs", vec![base(), base().replace("\"60s\"", "\"600s\"")]),
        ("a second service", vec![document(&[], &ALL, ""), base()]),
        ("a service less", vec![base(), document(&ALL, &[], "")]),
        ("the end", vec![base(), nothing]),
    ]
}

/// Everything that a plan is made from, but for the tables.
struct Wanted {
    config: Config,
    verdicts: Verdicts,
    next_hops: BTreeMap<IpAddr, NextHop>,
    sources: BTreeMap<IpAddr, Vec<IpAddr>>,
}

impl Wanted {
    fn of(text: &str) -> Self {
        let config = Document::parse(text).unwrap_or_else(|why| panic!("{text}\n{why}")).config;
        let healthy = config.pools.iter().map(|(name, pool)| {
            (name.clone(), pool.backends.iter().map(|backend| (backend.address, Verdict::USABLE)).collect())
        });
        let backends = (1..=4).map(|last| (IpAddr::from([10, 0, 0, last]), last));
        let hop = |last| NextHop { interface: 1, own_mac: packets::OWN_MAC, mac: [2, 0, 0, 1, 0, last] };
        Self {
            verdicts: healthy.collect(),
            next_hops: backends.clone().map(|(address, last)| (address, hop(last))).collect(),
            sources: backends.map(|(address, _)| (address, vec![IpAddr::from([10, 0, 0, 100])])).collect(),
            config,
        }
    }

    /// What is to be done to the tables as they are.
    fn plan(&self, plane: &KernelDataplane, spent: &BTreeSet<u32>) -> Result<Vec<Op>> {
        let mut tables = plane.tables()?;
        tables.sides = plane.observed(&tables)?;
        let desired = Desired {
            config: &self.config,
            verdicts: &self.verdicts,
            next_hops: &self.next_hops,
            sources: &self.sources,
            shared_vips: &BTreeSet::new(),
            interfaces: &BTreeMap::from([(1, packets::OWN_MAC)]),
            hash_key: [3, 4],
            same_interface_tx: true,
            spent,
            now: plane.now()?,
        };
        Ok(plan(&desired, &tables)?.ops)
    }

    fn service(&self, vip: IpAddr) -> Option<&Service> {
        self.config.services.values().find(|service| service.listen.address == vip)
    }

    /// Whether the service of an address has a backend.
    fn has(&self, vip: IpAddr, backend: u8) -> bool {
        let pool = self.service(vip).and_then(|service| self.config.pools.get(&service.pool));
        let mut backends = pool.into_iter().flat_map(|pool| &pool.backends);
        let address = IpAddr::from([10, 0, 0, backend]);
        backends.any(|it| matches!(it.address, BackendAddress::Remote(ip, _) if ip == address))
    }

    /// Whether it denies some clients.
    fn denies(&self, vip: IpAddr) -> bool {
        self.service(vip).is_some_and(|service| !service.allow.is_empty())
    }

    fn apply(&self, plane: &mut KernelDataplane) -> Result<()> {
        // As whoever goes on does.
        plane.apply(&Op::Settle)?;
        for op in self.plan(plane, &BTreeSet::new())? {
            plane.apply(&op)?;
        }
        Ok(())
    }
}

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

fn addresses() -> [(IpAddr, u16); 2] {
    [([203, 0, 113, 10].into(), 80), ([203, 0, 113, 11].into(), 80)]
}

/// Clients of each service that have a connection, and as many that have none, each time that it is played.
const CLIENTS: u32 = 12;

/// No two are alike.
fn client(number: u32) -> (IpAddr, u16) {
    ([198, 51, 100, 1 + (number % 20) as u8].into(), 20_000 + (number / 20) as u16)
}

/// SYNs of clients who have no connection yet; what would become of them after a clean start with one of these
/// documents may become of them.
fn first_packets(round: u32, clean: &mut [KernelDataplane], last: &Wanted) -> Vec<Probe> {
    let mut probes = Vec::new();
    for (service, called) in addresses().into_iter().enumerate() {
        for number in (2 * round) * CLIENTS..(2 * round + 1) * CLIENTS {
            let frame = Spec::tcp(client(number), called, flag::SYN).build();
            let mut allowed: BTreeSet<_> = clean.iter_mut().map(|plane| run(plane, &frame, false)).collect();
            let leaves =
                |outcome: &Outcome| matches!(outcome, Outcome::To(to, _) if !last.has(called.0, *to));
            if allowed.iter().any(leaves) {
                // The SYN is sent again and again: what it has begun is reset with its backend.
                allowed.insert(Outcome::Reset);
            }
            probes.push(Probe {
                name: format!("SYN {number} of service {service}"),
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
fn clean(text: &str) -> Result<KernelDataplane> {
    let wanted = Wanted::of(text);
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

/// Empties the tables, and brings them to where the change begins; with connections that began with the first
/// of the documents.
fn prepare(plane: &mut KernelDataplane, documents: &[Wanted], round: u32) -> Result<Vec<Probe>> {
    let nothing = Wanted::of(&document(&[], &[], ""));
    nothing.apply(plane)?;
    let spent = plane.tables()?.backends.keys().copied().collect();
    for op in nothing.plan(plane, &spent)? {
        plane.apply(&op)?;
    }
    let (last, before) = documents.split_last().context("a change")?;
    let mut probes = Vec::new();
    for (earlier, wanted) in before.iter().enumerate() {
        wanted.apply(plane)?;
        if earlier > 0 {
            continue;
        }
        for (service, called) in addresses().into_iter().enumerate() {
            for number in (2 * round + 1) * CLIENTS..(2 * round + 2) * CLIENTS {
                let syn = Spec::tcp(client(number), called, flag::SYN).build();
                let data = Spec::tcp(client(number), called, flag::ACK).with_payload(b"data").build();
                if !matches!(run(plane, &syn, true), Outcome::To(..)) {
                    continue;
                }
                let Outcome::To(backend, bytes) = run(plane, &data, true) else { bail!("no connection") };
                let stays = |wanted: &Wanted| wanted.has(called.0, backend) && !wanted.denies(called.0);
                probes.push(Probe {
                    name: format!("connection {number} of service {service}, to backend {backend}"),
                    frame: data,
                    exact: true,
                    allowed: [Outcome::To(backend, bytes)].into(),
                    free: ![last].into_iter().chain(before).all(stays),
                });
            }
        }
    }
    Ok(probes)
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
    let limits = Wanted::of(&document(&[], &[], "")).config.settings.limits;
    let open = || KernelDataplane::open(Some(Path::new(BPFFS)), limits);
    let mut plane = open()?;
    let mut eyes = open()?;
    let reader = Reader::default();
    let outcome = std::thread::scope(|scope| {
        let _stop = Stop(&reader);
        scope.spawn(|| {
            let _stop = Stop(&reader);
            reader.read(&mut eyes);
        });
        let mut round = 0;
        for (name, documents) in changes() {
            let mut cleans: Vec<_> = documents.iter().map(|text| clean(text)).collect::<Result<_>>()?;
            let shape = Shape::of(&cleans.last().context("a change")?.tables()?);
            let wanted: Vec<Wanted> = documents.iter().map(|text| Wanted::of(text)).collect();
            let last = wanted.last().context("a change")?;
            let mut point = 0;
            loop {
                let when = format!("{name}, death at point {point}");
                let mut probes = reader.pause();
                round += 1;
                *probes = prepare(&mut plane, &wanted, round)?;
                probes.extend(first_packets(round, &mut cleans, last));
                drop(probes);
                reader.go_on();
                reader.round(&format!("before {when}"))?;
                let ops = last.plan(&plane, &BTreeSet::new())?;
                let done = interrupted(&mut plane, &ops, point)?;
                reader.round(&format!("after {when}"))?;
                if point == 2 {
                    // As a daemon that starts does it.
                    plane = open()?;
                }
                last.apply(&mut plane)?;
                reader.round(&format!("restarted after {when}"))?;
                assert_eq!(Shape::of(&plane.tables()?), shape, "{when}");
                if done {
                    break;
                }
                point += 1;
            }
            ensure!(point > 2, "{name}: only {point} points");
            println!("{name}: died at each of {point} points");
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
