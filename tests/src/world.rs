//! Tables with one of everything that a packet can meet, made by the same operations that a plan is made
//! of.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use lb_common::{
    abi::{Action, Flow, NO_BACKEND, RECORD_WAYS, Records, RingAt, Slot, Standing, Tick},
    datapath::decide,
    sim::{MemTables, SliceFrame},
    verdict::Verdict,
};
use lb_userspace::{
    dataplane::{
        BackendEntry, Dataplane, DataplaneError, Firewall, FlowsOf, Globals, Mode, NextHop, Op, RuleSet,
        SideEntry, SourceEntry, SourceRun, VipEntry,
    },
    model::{Idle, Limits, Listen, Network, PortRange, Protocol, Scheduler},
};

use crate::packets::{Spec, flag};

/// MAC address that backends' packets come from. Theirs as next hops are their own, see [`backend_mac`].
pub const BACKEND_MAC: [u8; 6] = [2, 0, 0, 0, 9, 9];
/// Our MAC address towards backends.
pub const BACK_MAC: [u8; 6] = [2, 0, 0, 0, 9, 1];
/// Interface that packets come in by: loopback, as `BPF_PROG_TEST_RUN` has it.
pub const INGRESS: u32 = 1;
/// Another interface, by which some backends are reached.
pub const OTHER_INTERFACE: u32 = 2;

/// Sizes that are soon full.
pub const LIMITS: Limits =
    Limits { flows: 1024, services: 64, backends: 128, ring_pages: 64, side_pages: 16, rules: 64 };

/// VIP of most services.
pub const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// VIP with services on all ports.
pub const VIP_ALL_PORTS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
/// VIP that is the host's own address too.
pub const VIP_SHARED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 16);
/// The IPv6 VIP.
pub const VIP_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10);

/// Ports of services on [`VIP`] and, where the family is of no account, on [`VIP_V6`].
pub mod port {
    /// Maglev over three backends, TCP and UDP, both families.
    pub const WEB: u16 = 80;
    /// Round robin, TCP.
    pub const TURNS: u16 = 81;
    /// No backend, TCP and UDP.
    pub const EMPTY: u16 = 82;
    /// This host, TCP.
    pub const LOCAL: u16 = 83;
    /// 198.51.100.0/24 and 2001:db8:51::/48 allowed, 198.51.100.128/25 and 2001:db8:51:8000::/49 denied, and
    /// all others.
    pub const FIREWALL: u16 = 84;
    /// Its backend's flows can be cut ([`super::set_flows`]), TCP and UDP.
    pub const CUT: u16 = 85;
    /// No next hop, TCP.
    pub const UNREACHABLE: u16 = 86;
    /// Backends with four source ports between them, UDP.
    pub const FEW_PORTS: u16 = 87;
    /// A ring whose pages do not exist, TCP.
    pub const BROKEN: u16 = 88;
    /// Its backend is reached by another interface, TCP.
    pub const ELSEWHERE: u16 = 89;
    /// Not translated, every slot settled, TCP and UDP.
    pub const DIRECT: u16 = 90;
    /// Not translated, slots settled, moving (from another backend, from the same, from none) and fading
    /// ([`super::turn_slots`]), TCP and UDP.
    pub const CHANGING: u16 = 91;
    /// A ring that leads to another service's backend, TCP.
    pub const ASTRAY: u16 = 92;
    /// No backend, and clients are to ask again; translated over IPv4, not over IPv6. TCP.
    pub const HELD: u16 = 93;
    /// By the client's address alone, over three backends, TCP.
    pub const BY_SOURCE: u16 = 94;
}

fn by(scheduler: Scheduler) -> Mode {
    Mode { scheduler, ..Mode::default() }
}

/// Source ports of most backends.
pub const PORTS: PortRange = PortRange { low: 20000, high: 20999 };

const SOURCE_V4: u32 = 0;
const SOURCE_V6: u32 = 2;
const SOURCE_FEW: u32 = 3;

/// Address of the backends' network.
pub fn backend_v4(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 2, 0, last).into()
}

/// Addresses of the backends of the service on all ports of [`VIP_ALL_PORTS`].
pub fn on_all_ports(protocol: Protocol) -> [IpAddr; 2] {
    match protocol {
        Protocol::Tcp => [15, 16],
        Protocol::Udp => [17, 18],
    }
    .map(backend_v4)
}

/// Address of the backends' network.
pub fn backend_v6(last: u16) -> IpAddr {
    Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, last).into()
}

/// The way to a backend.
pub fn next_hop(interface: u32, backend: IpAddr) -> NextHop {
    NextHop { interface, own_mac: BACK_MAC, mac: backend_mac(backend) }
}

/// MAC address of a backend's next hop, by which packets tell whose they are.
pub fn backend_mac(backend: IpAddr) -> [u8; 6] {
    let last = match backend {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    };
    [2, 0, 0, 0, 8, last]
}

/// Whether it is that of some backend's next hop.
pub fn is_backend_mac(mac: [u8; 6]) -> bool {
    mac[..5] == [2, 0, 0, 0, 8]
}

/// What of the tables may be changed while packets come.
pub struct World {
    /// Backends whose flows may be cut: those of the services on [`port::CUT`], and the last of each on
    /// [`port::CHANGING`].
    pub cut: Vec<(u32, BackendEntry)>,
    /// Of each service on [`port::CHANGING`], the index of its first backend.
    pub changing: Vec<u32>,
}

/// Fills empty tables. Time-outs are short enough to pass within a test.
///
/// # Errors
/// When the tables cannot be written.
pub fn fill(plane: &mut impl Dataplane) -> Result<World, DataplaneError> {
    set_globals(plane, 100_000)?;
    plane.apply(&Op::SetInterface { index: OTHER_INTERFACE, mac: BACK_MAC })?;
    let sources = [
        (SOURCE_V4, IpAddr::from([10, 2, 0, 1]), PORTS),
        (SOURCE_V4 + 1, IpAddr::from([10, 2, 0, 2]), PORTS),
        (SOURCE_V6, backend_v6(1), PORTS),
        (SOURCE_FEW, IpAddr::from([10, 2, 0, 3]), PortRange { low: 20000, high: 20003 }),
    ];
    for (index, address, ports) in sources {
        plane.apply(&Op::WriteSource { index, source: SourceEntry { address, ports } })?;
    }
    let mut rules = RuleSet::new();
    for (text, prefix, action) in [
        ("198.51.100.0", 24, Action::Allow),
        ("198.51.100.128", 25, Action::Deny),
        ("2001:db8:51::", 48, Action::Allow),
        ("2001:db8:51:8000::", 49, Action::Deny),
    ] {
        let address = text.parse().expect("an address");
        rules.insert(Network { address, prefix }, action);
    }
    plane.apply(&Op::WriteRules { set: 1, rules })?;

    let mut cut = Vec::new();
    let mut changing = Vec::new();
    let mut builder = Builder { plane, services: 0, backends: 0, pages: 0 };
    let (v4, v6) = (IpAddr::from(VIP), IpAddr::from(VIP_V6));
    let three_v4: Vec<_> = (11..14).map(|last| remote(backend_v4(last), Some(8080))).collect();
    let three_v6: Vec<_> = (11..14).map(|last| remote(backend_v6(last), Some(8080))).collect();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for (vip, three) in [(v4, &three_v4), (v6, &three_v6)] {
            builder.service(listen(vip, port::WEB, protocol), three)?;
            builder.service(listen(vip, port::EMPTY, protocol), &[])?;
            let direct: Vec<_> = three.iter().map(|b| BackendEntry { port: None, ..b.clone() }).collect();
            builder.direct(listen(vip, port::DIRECT, protocol), &direct, None)?;
            let first = builder.backends;
            let service =
                builder.direct(listen(vip, port::CHANGING, protocol), &direct, Some(changing.len()))?;
            cut.push((first + 2, BackendEntry { service, ..direct[2].clone() }));
            changing.push(first);
            let firewall = builder.service(listen(vip, port::FIREWALL, protocol), three)?;
            let rules = Firewall { rule_set: Some(1), deny_others: true };
            builder.plane.apply(&Op::SwitchFirewall { service: firewall, firewall: rules })?;
            let index = builder.backends;
            let service = builder.service(listen(vip, port::CUT, protocol), &three[..1])?;
            cut.push((index, BackendEntry { service, ..three[0].clone() }));
        }
        let few = BackendEntry {
            sources: SourceRun { first: SOURCE_FEW, count: 1 },
            ..remote(backend_v4(20), Some(5353))
        };
        builder.service(listen(v4, port::FEW_PORTS, protocol), &[few])?;
        let all = Listen { address: VIP_ALL_PORTS.into(), port: None, protocol };
        builder.service(all, &on_all_ports(protocol).map(|address| remote(address, None)))?;
        builder.service(listen(VIP_SHARED.into(), port::WEB, protocol), &three_v4)?;
    }
    for (vip, three) in [(v4, &three_v4), (v6, &three_v6)] {
        let turns = builder.service(listen(vip, port::TURNS, Protocol::Tcp), three)?;
        builder.plane.apply(&Op::SwitchMode { service: turns, mode: by(Scheduler::RoundRobin) })?;
        let alike = builder.service(listen(vip, port::BY_SOURCE, Protocol::Tcp), three)?;
        builder.plane.apply(&Op::SwitchMode { service: alike, mode: by(Scheduler::Source) })?;
        let held = builder.service(listen(vip, port::HELD, Protocol::Tcp), &[])?;
        let mode = Mode { holds: true, direct: vip == v6, ..Mode::default() };
        builder.plane.apply(&Op::SwitchMode { service: held, mode })?;
        let local = BackendEntry { address: None, port: None, next_hop: None, ..three[0].clone() };
        builder.service(listen(vip, port::LOCAL, Protocol::Tcp), &[local])?;
        let unreachable = BackendEntry { next_hop: None, ..three[0].clone() };
        builder.service(listen(vip, port::UNREACHABLE, Protocol::Tcp), &[unreachable])?;
        let hop = three[0].address.map(|address| next_hop(OTHER_INTERFACE, address));
        let elsewhere = BackendEntry { next_hop: hop, ..three[0].clone() };
        builder.service(listen(vip, port::ELSEWHERE, Protocol::Tcp), &[elsewhere])?;
        let broken = builder.service(listen(vip, port::BROKEN, Protocol::Tcp), &[])?;
        builder.plane.apply(&Op::SwitchRing {
            service: broken,
            ring: RingAt { slots: 100, first_page: 1 << 19, first_side: None },
        })?;
        let astray = builder.service(listen(vip, port::ASTRAY, Protocol::Tcp), &[])?;
        let first_page = builder.pages;
        builder.pages += 1;
        // The first backend is the first service's.
        builder.plane.apply(&Op::WritePages { first_page, slots: [Slot::settled(0)].into() })?;
        let ring = RingAt { slots: 1, first_page, first_side: None };
        builder.plane.apply(&Op::SwitchRing { service: astray, ring })?;
    }
    for (address, shared) in [(v4, false), (v6, false), (VIP_SHARED.into(), true)] {
        builder.plane.apply(&Op::SetVip { address, vip: VipEntry { shared, ..VipEntry::default() } })?;
    }
    let world = World { cut, changing };
    let since = Tick(plane.now()?.0.saturating_sub(OLD));
    turn_slots(plane, &world, since)?;
    Ok(world)
}

/// Ticks after which a change is not fresh any more.
pub const OLD: u32 = 100;

/// Gives the slots of the services on [`port::CHANGING`] standings that began `since`.
///
/// # Errors
/// When the tables cannot be written.
pub fn turn_slots(plane: &mut impl Dataplane, world: &World, since: Tick) -> Result<(), DataplaneError> {
    for (number, &first) in world.changing.iter().enumerate() {
        let standing = |slot: u32| {
            let (before, fading) = match slot % 5 {
                2 => (first + slot % 3, false),
                3 => (NO_BACKEND, true),
                4 => (NO_BACKEND, false),
                _ => (first + (slot + 1) % 3, false),
            };
            (slot, Standing { before, fading, since })
        };
        let standings = (0..CHANGING_SLOTS).filter(|slot| slot % 5 != 0).map(standing).collect();
        plane.apply(&Op::SetStandings { first_side: number as u32, standings })?;
    }
    Ok(())
}

/// Slots of each service on [`port::CHANGING`]: of each kind one that leads to each backend.
pub const CHANGING_SLOTS: u32 = 15;

/// Writes what holds for all packets.
///
/// # Errors
/// When the tables cannot be written.
pub fn set_globals(plane: &mut impl Dataplane, resets_per_second: u32) -> Result<(), DataplaneError> {
    let tick = |count: u64| Duration::from_nanos(count << Tick::SHIFT);
    let idle = Idle {
        half_open: tick(4),
        established: tick(12),
        closing: tick(6),
        closed: tick(2),
        udp: tick(6),
        port_rest: tick(2),
    };
    plane.apply(&Op::SetGlobals(Globals {
        hash_key: [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908],
        idle,
        resets_per_second,
        same_interface_tx: true,
    }))
}

/// Changes what becomes of the flows of the backends that [`fill`] gave back, and whether they are
/// believed dead.
///
/// # Errors
/// When the tables cannot be written.
pub fn set_flows(
    plane: &mut impl Dataplane,
    backends: &[(u32, BackendEntry)],
    flows: FlowsOf,
    dead: bool,
) -> Result<(), DataplaneError> {
    for (index, backend) in backends {
        plane.apply(&Op::WriteBackend {
            index: *index,
            backend: BackendEntry { flows, dead, ..backend.clone() },
        })?;
    }
    Ok(())
}

/// Clients whose UDP flows to [`VIP`], [`port::WEB`], are written down in the same two lines of records, more
/// than there are ways.
///
/// # Panics
/// When there are none, which the size of the tables makes impossible.
pub fn crowd(mut tables: MemTables) -> Vec<(IpAddr, u16)> {
    crowded(4 * RECORD_WAYS, |client| {
        tables.flows.fill_with(Flow::default);
        tables.records.fill_with(Records::default);
        let mut frame = SliceFrame(Spec::udp(client, (VIP.into(), port::WEB)).build());
        let verdict = decide(&mut frame, &tables, INGRESS, Tick(1000));
        assert_eq!(verdict, Verdict::ToBackend { interface: INGRESS });
        occupied(&tables)
    })
}

/// Clients whose connections to [`VIP`], [`port::CHANGING`], are written down in the same two lines of
/// records, more than there are ways.
///
/// # Panics
/// When there are none, which the size of the tables makes impossible.
pub fn crowd_of_records(mut tables: MemTables, now: Tick) -> Vec<(IpAddr, u16)> {
    crowded(4 * RECORD_WAYS, |client| {
        tables.records.fill_with(Records::default);
        let spec = Spec::tcp(client, (VIP.into(), port::CHANGING), flag::SYN);
        decide(&mut SliceFrame(spec.build()), &tables, INGRESS, now);
        occupied(&tables)
    })
}

/// Which two lines have the only record that there is.
fn occupied(tables: &MemTables) -> Option<usize> {
    let line = tables.records.iter().position(|records| *records != Records::default());
    line.map(|line| line / 2)
}

/// More than so many clients that belong into one place, each found by trying it alone; some have none.
fn crowded(number: usize, mut place: impl FnMut((IpAddr, u16)) -> Option<usize>) -> Vec<(IpAddr, u16)> {
    let mut found: BTreeMap<usize, Vec<(IpAddr, u16)>> = BTreeMap::new();
    for client_port in 1024..u16::MAX {
        let client = (IpAddr::from([198, 51, 100, 77]), client_port);
        let Some(place) = place(client) else { continue };
        let clients = found.entry(place).or_default();
        clients.push(client);
        if clients.len() > number {
            return clients.clone();
        }
    }
    panic!("no place is crowded")
}

fn listen(address: IpAddr, port: u16, protocol: Protocol) -> Listen {
    Listen { address, port: Some(port), protocol }
}

fn remote(address: IpAddr, port: Option<u16>) -> BackendEntry {
    let sources = match address {
        IpAddr::V4(_) => SourceRun { first: SOURCE_V4, count: 2 },
        IpAddr::V6(_) => SourceRun { first: SOURCE_V6, count: 1 },
    };
    BackendEntry {
        service: 0,
        address: Some(address),
        port,
        generation: 1,
        next_hop: Some(next_hop(INGRESS, address)),
        sources,
        flows: FlowsOf::Keep,
        dead: false,
    }
}

/// Gives out indices.
struct Builder<'a, D> {
    plane: &'a mut D,
    services: u32,
    backends: u32,
    pages: u32,
}

impl<D: Dataplane> Builder<'_, D> {
    /// Makes a service of these backends that does not translate; with side pages, most slots are unsettled.
    fn direct(
        &mut self,
        listen: Listen,
        backends: &[BackendEntry],
        side: Option<usize>,
    ) -> Result<u32, DataplaneError> {
        let first = self.backends;
        let service = self.service(listen, backends)?;
        self.plane.apply(&Op::SwitchMode { service, mode: Mode { direct: true, ..Mode::default() } })?;
        if let Some(side) = side {
            let first_side = side as u32;
            let leads = |slot: u32| match slot {
                slot if slot.is_multiple_of(5) => Slot::settled(first + slot % 3),
                slot => Slot::unsettled(first + slot % 3),
            };
            let side = |slot| (slot, SideEntry::moving(NO_BACKEND, Tick(0)));
            let first_page = self.pages;
            self.pages += 1;
            self.plane
                .apply(&Op::WriteSides { first_side, sides: (0..CHANGING_SLOTS).map(side).collect() })?;
            let slots = (0..CHANGING_SLOTS).map(leads).collect();
            self.plane.apply(&Op::WritePages { first_page, slots })?;
            let ring = RingAt { slots: CHANGING_SLOTS, first_page, first_side: Some(first_side) };
            self.plane.apply(&Op::SwitchRing { service, ring })?;
        }
        Ok(service)
    }

    /// Makes a service of these backends; its index.
    fn service(&mut self, listen: Listen, backends: &[BackendEntry]) -> Result<u32, DataplaneError> {
        let service = self.services;
        self.services += 1;
        self.plane.apply(&Op::WriteService { index: service, listen, mode: Mode::default() })?;
        let first = self.backends;
        for backend in backends {
            let backend = BackendEntry { service, ..backend.clone() };
            self.plane.apply(&Op::WriteBackend { index: self.backends, backend })?;
            self.backends += 1;
        }
        let mut slots: Vec<u32> = (first..self.backends).cycle().take(backends.len() * 5).collect();
        if slots.is_empty() {
            // Both ways of having no backend: no slots, or slots without one.
            slots = if service.is_multiple_of(2) { Vec::new() } else { vec![NO_BACKEND; 7] };
        }
        let first_page = self.pages;
        self.pages += 1;
        let count = u32::try_from(slots.len()).expect("few slots");
        if count > 0 {
            let slots = slots.into_iter().map(Slot::settled).collect();
            self.plane.apply(&Op::WritePages { first_page, slots })?;
        }
        let ring = RingAt { slots: count, first_page, first_side: None };
        self.plane.apply(&Op::SwitchRing { service, ring })?;
        match listen.port {
            Some(_) => self.plane.apply(&Op::SetKey { listen, service })?,
            None => {
                let vip = match listen.protocol {
                    Protocol::Tcp => VipEntry { any_tcp: Some(service), ..VipEntry::default() },
                    // The TCP service of the address was made before.
                    Protocol::Udp => {
                        let before = self.plane.tables()?.vips.get(&listen.address).copied();
                        VipEntry { any_udp: Some(service), ..before.unwrap_or_default() }
                    }
                };
                self.plane.apply(&Op::SetVip { address: listen.address, vip })?;
            }
        }
        Ok(service)
    }
}
