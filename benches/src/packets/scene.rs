//! The program with tables for the benchmark: one service, 64 backends.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use lb_common::{
    abi::{RingAt, Slot, Tick},
    verdict::{DropReason, Verdict},
};
use lb_userspace::{
    dataplane::{
        self, BackendEntry, Dataplane as _, FlowsOf, Globals, NextHop, Op, SideEntry, SourceEntry, SourceRun,
        VipEntry, kernel::KernelDataplane,
    },
    maglev,
    model::{Idle, Limits, Listen, PortRange, Protocol},
};
use tests::packets::{self, Seen, Spec, flag};

use crate::generator::Kind;

/// Flows that the table holds: 256 MiB of them.
pub(crate) const FLOWS: u32 = 1 << 22;
/// The service's port.
pub(crate) const PORT: u16 = 80;
/// The last four bytes of the first client's address.
pub(crate) const FIRST_ADDRESS: u32 = 0x0a00_0001;

/// Backends.
pub(crate) const BACKENDS: u16 = 64;
const SOURCES: u16 = 8;
/// An address and a port.
pub(crate) type End = (IpAddr, u16);
/// Interface that packets come in by and leave by: loopback, as a test run has it.
const INTERFACE: u32 = 1;
/// Verdict counter of packets to backends.
const FORWARDED: usize = Verdict::ToBackend { interface: 0 }.counter();
const ANSWERED: usize = Verdict::ToClient { interface: 0 }.counter();
/// No resets are sent here.
const REFUSED: usize = Verdict::Drop(DropReason::ResetLimit).counter();

/// The service's address.
pub(crate) fn vip(v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10).into()
    } else {
        Ipv4Addr::new(203, 0, 113, 10).into()
    }
}

/// A client's address whose last four bytes are zero.
pub(crate) fn client(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 0).into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

fn inside(v6: bool, last: u16) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, last).into()
    } else {
        let [high, low] = last.to_be_bytes();
        Ipv4Addr::new(10, 2, high, low).into()
    }
}

/// How packets of the service get to its backends, and what is remembered of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Translated.
    Nat,
    /// Not translated, nothing remembered.
    Settled,
    /// Not translated, every slot has changed hands.
    Moving,
    /// Not translated, everything remembered.
    Tracked,
}

/// The loaded program and its tables.
pub(crate) struct Scene {
    plane: KernelDataplane,
    mode: Mode,
}

impl Scene {
    pub(crate) fn new(kind: Kind, mode: Mode) -> Result<Self> {
        let limits =
            Limits { flows: FLOWS, services: 16, backends: 128, ring_pages: 64, side_pages: 64, rules: 16 };
        let mut plane = KernelDataplane::open(None, limits)?;
        let long = Duration::from_secs(3600);
        let idle = Idle { half_open: long, udp: long, ..Idle::default() };
        let hash_key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let globals = Globals { hash_key, idle, resets_per_second: 0, same_interface_tx: true };
        plane.apply(&Op::SetGlobals(globals))?;
        for source in 0..SOURCES {
            let ports = PortRange { low: 1024, high: u16::MAX };
            let source_entry = SourceEntry { address: inside(kind.v6, 1 + source), ports };
            plane.apply(&Op::WriteSource { index: u32::from(source), source: source_entry })?;
        }
        let protocol = if kind.udp { Protocol::Udp } else { Protocol::Tcp };
        let listen = Listen { address: vip(kind.v6), port: Some(PORT), protocol };
        plane.apply(&Op::WriteService {
            index: 0,
            listen,
            mode: dataplane::Mode { direct: mode != Mode::Nat, ..Default::default() },
        })?;
        for backend in 0..BACKENDS {
            let address = inside(kind.v6, 256 + backend);
            let hop = NextHop { interface: INTERFACE, own_mac: [2, 0, 0, 0, 9, 1], mac: [2, 0, 0, 0, 9, 9] };
            let entry = BackendEntry {
                service: 0,
                address: Some(address),
                port: Some(8080),
                generation: 1,
                next_hop: Some(hop),
                sources: SourceRun { first: 0, count: u32::from(SOURCES) },
                flows: FlowsOf::Keep,
                dead: false,
            };
            plane.apply(&Op::WriteBackend { index: u32::from(backend), backend: entry })?;
        }
        let backend = |slot: u32| slot % u32::from(BACKENDS);
        let settled = matches!(mode, Mode::Nat | Mode::Settled);
        let slot =
            |number| if settled { Slot::settled(backend(number)) } else { Slot::unsettled(backend(number)) };
        let slots: Arc<[Slot]> = (0..maglev::LARGE).map(slot).collect();
        plane.apply(&Op::WritePages { first_page: 0, slots })?;
        if !settled {
            // Long enough ago for every record to count.
            let since = Tick(plane.now()?.0 / 2);
            let before = |slot| if mode == Mode::Moving { backend(slot + 1) } else { backend(slot) };
            let side = |slot| (slot, SideEntry::moving(before(slot), since));
            let sides = (0..maglev::LARGE).map(side).collect();
            plane.apply(&Op::WriteSides { first_side: 0, sides })?;
        }
        let first_side = (!settled).then_some(0);
        let ring = RingAt { slots: maglev::LARGE, first_page: 0, first_side };
        plane.apply(&Op::SwitchRing { service: 0, ring })?;
        plane.apply(&Op::SetVip { address: vip(kind.v6), vip: VipEntry::default() })?;
        plane.apply(&Op::SetKey { listen, service: 0 })?;
        Ok(Self { plane, mode })
    }

    /// The program, to be called.
    pub(crate) fn program(&mut self) -> Result<aya::programs::ProgramFd> {
        self.plane.program_fd().map_err(|error| anyhow!(error))
    }

    /// Connections that are remembered.
    pub(crate) fn flows(&self) -> Result<u64> {
        if self.mode == Mode::Nat {
            return Ok(u64::from(self.plane.fill()?.live));
        }
        let mut records = 0;
        self.plane.records(&mut |_| records += 1)?;
        Ok(records)
    }

    /// A packet of each translated connection's backend to its client: from it, to where.
    fn backwards(&self) -> Result<Vec<(End, End)>> {
        let mut found = Vec::new();
        self.plane.flows(&mut |flow| {
            if let (Some(source), Some(port)) = (flow.source, flow.source_port) {
                found.push((flow.backend, (source, port)));
            }
        })?;
        let ends = found
            .into_iter()
            .map(|(backend, to)| Ok(((inside(to.0.is_ipv6(), 256 + u16::try_from(backend)?), 8080), to)));
        ends.collect()
    }

    /// A backend's packet in each translated connection, as frames.
    pub(crate) fn answers(&self, kind: Kind) -> Result<Vec<Vec<u8>>> {
        Ok(self.backwards()?.into_iter().map(|(from, to)| kind.packet(from, to, flag::ACK)).collect())
    }

    /// Lets backends answer the SYNs of all translated connections that are known.
    pub(crate) fn answer_all(&mut self) -> Result<()> {
        let answers = self.backwards()?;
        let (number, before) = (answers.len() as u64, self.plane.verdicts()?[ANSWERED]);
        for (from, to) in answers {
            let answer = Spec::tcp(from, to, flag::SYN | flag::ACK);
            self.plane.run_once(&answer.build()).map_err(|error| anyhow!(error))?;
        }
        let forwarded = self.plane.verdicts()?[ANSWERED] - before;
        ensure!(forwarded == number, "{forwarded} of {number} answers were forwarded");
        Ok(())
    }

    /// Backends that have been sent something.
    pub(crate) fn backends(&self) -> Result<usize> {
        Ok(self.plane.traffic()?.values().filter(|traffic| traffic.packets_in > 0).count())
    }

    /// Does something that sends so many packets, and fails unless each has gone to a backend.
    pub(crate) fn forwarding(&self, packets: u32, run: impl FnOnce() -> Result<f64>) -> Result<f64> {
        self.all_become(FORWARDED, packets, run)
    }

    /// The same, unless each has gone to a client.
    pub(crate) fn answering(&self, packets: u32, run: impl FnOnce() -> Result<f64>) -> Result<f64> {
        self.all_become(ANSWERED, packets, run)
    }

    /// The same, unless none was of a connection that is known.
    pub(crate) fn refusing(&self, packets: u32, run: impl FnOnce() -> Result<f64>) -> Result<f64> {
        self.all_become(REFUSED, packets, run)
    }

    fn all_become(&self, what: usize, packets: u32, run: impl FnOnce() -> Result<f64>) -> Result<f64> {
        let before = self.plane.verdicts()?;
        let time = run()?;
        let after = self.plane.verdicts()?;
        let sent = after[what] - before[what];
        if sent != u64::from(packets) {
            let names = Verdict::names().zip(before.iter().zip(&after));
            let became: Vec<_> =
                names.filter(|(_, (b, a))| a > b).map(|(name, (b, a))| format!("{name} {}", a - b)).collect();
            anyhow::bail!("of {packets} packets {sent} went where they should: {became:?}");
        }
        Ok(time)
    }

    /// Sends a backend's packet by itself and reads what becomes of it.
    pub(crate) fn check_answer(&mut self, frame: &[u8]) -> Result<()> {
        let seen = self.sample(frame)?;
        let service = (vip(seen.source.0.is_ipv6()), PORT);
        ensure!(seen.source == service && seen.ttl == 63, "the sample: {seen:?}");
        Ok(())
    }

    /// What becomes of one packet.
    fn sample(&mut self, frame: &[u8]) -> Result<Seen> {
        let ran = self.plane.run_once(frame).map_err(|error| anyhow!(error))?;
        let seen =
            packets::read(&ran.frame).map_err(|error| anyhow!(error)).context("the sample is unreadable")?;
        ensure!(seen.checksums, "the sample's checksums are wrong: {seen:?}");
        Ok(seen)
    }

    /// Sends a few packets of known flows by themselves and reads what becomes of them.
    pub(crate) fn check_sample(&mut self, kind: Kind) -> Result<()> {
        let source = match client(kind.v6) {
            IpAddr::V4(_) => IpAddr::from(FIRST_ADDRESS.to_be_bytes()),
            IpAddr::V6(address) => {
                let mut octets = address.octets();
                octets[12..].copy_from_slice(&FIRST_ADDRESS.to_be_bytes());
                IpAddr::from(octets)
            }
        };
        let destination = (vip(kind.v6), PORT);
        let from = (source, 1024);
        let spec =
            if kind.udp { Spec::udp(from, destination) } else { Spec::tcp(from, destination, flag::ACK) };
        let seen = self.sample(&spec.build())?;
        let (port, ttl) = if self.mode == Mode::Nat { (8080, 63) } else { (PORT, 64) };
        ensure!(
            seen.destination.1 == port && seen.ttl == ttl && seen.payload == spec.payload,
            "the sample: {seen:?}"
        );
        Ok(())
    }
}
