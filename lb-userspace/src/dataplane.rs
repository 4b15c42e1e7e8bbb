//! What the tables hold, and the operations that change them.
//!
//! [`Tables`] is plain data and the ground truth of [`crate::plan`]: at a start it is read back from
//! the pinned maps, so that a restart is the same thing as a reload. [`Dataplane`] has two
//! implementations: the kernel's maps, and [`memory`] for tests and simulation.

pub mod cells;
pub mod fault;
pub mod kernel;
pub mod memory;
mod op;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use lb_common::abi::{Action, PAGE_SLOTS, Record, RingAt, Slot, Standing, Tick, Traffic};

pub use self::op::Op;
use crate::model::{Idle, Limits, Listen, Network, PortRange, Protocol, Scheduler};

/// Number of source addresses that the tables can hold; not a matter of the document, since a few
/// give all the ports that a machine can use.
pub const MAX_SOURCES: u32 = 1 << Record::SOURCE_BITS;

/// Something that holds tables and can change them, one operation at a time.
///
/// An operation is applied whole or not at all as far as packets can see: what takes several stores
/// goes to a place that no packet is led to yet, and the one store that leads there comes last.
pub trait Dataplane {
    /// Everything the tables hold now, read back from where they are.
    ///
    /// # Errors
    /// When a table cannot be read, or contradicts itself.
    fn tables(&self) -> Result<Tables, DataplaneError>;

    /// Applies one operation.
    ///
    /// # Errors
    /// When a table cannot be written, or the operation does not fit what the tables hold. Nothing
    /// has been changed then.
    fn apply(&mut self, op: &Op) -> Result<(), DataplaneError>;

    /// Packets by verdict and note, indexed by [`lb_common::verdict::Verdict::counter`] and
    /// [`lb_common::verdict::Note::counter`], summed over all CPUs since the tables were made.
    ///
    /// # Errors
    /// When the counters cannot be read.
    fn verdicts(&self) -> Result<Vec<u64>, DataplaneError>;

    /// What passed between each backend entry in use and its clients, by its index, summed over all
    /// CPUs since the tables were made: a reused index goes on counting, so take differences.
    ///
    /// # Errors
    /// When the counters cannot be read.
    fn traffic(&self) -> Result<BTreeMap<u32, Traffic>, DataplaneError>;

    /// Shows every live flow to `visit`, in no order. Packets go on meanwhile: a flow that begins or
    /// ends during the call may be seen or not.
    ///
    /// # Errors
    /// When the flows cannot be read.
    fn flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<(), DataplaneError>;

    /// The time as packets see it.
    ///
    /// # Errors
    /// When the clock cannot be read.
    fn now(&self) -> Result<Tick, DataplaneError>;

    /// What the slots of a ring remember now, settled ones too, for which it means nothing. Packets write
    /// to it meanwhile.
    ///
    /// # Errors
    /// When the sides cannot be read.
    fn sides(&self, ring: &Ring) -> Result<Arc<[SideEntry]>, DataplaneError>;

    /// What slots remember now, for all services in `tables` that have side pages: [`Tables::sides`].
    ///
    /// # Errors
    /// When the sides cannot be read.
    fn observed(&self, tables: &Tables) -> Result<BTreeMap<u32, Arc<[SideEntry]>>, DataplaneError> {
        let unsettled = tables.services.iter().filter(|(_, service)| service.ring.first_side.is_some());
        unsettled.map(|(&index, service)| Ok((index, self.sides(&service.ring)?))).collect()
    }

    /// Shows every record that has not timed out to `visit`, in no order, as with [`Dataplane::flows`].
    ///
    /// # Errors
    /// When the records cannot be read.
    fn records(&self, visit: &mut dyn FnMut(&RecordEntry)) -> Result<(), DataplaneError>;

    /// How full the flow table is.
    ///
    /// # Errors
    /// When the flows cannot be read.
    fn fill(&self) -> Result<Fill, DataplaneError> {
        let mut live = 0;
        self.flows(&mut |_| live += 1)?;
        Ok(Fill { live, capacity: self.tables()?.limits.flows })
    }
}

/// Why a data plane could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The system refused.
    #[error("table {table} cannot be {action}: {source}")]
    System {
        /// Name of the map, as in [`lb_common::abi::name`].
        table: &'static str,
        /// What was tried: "read", "written".
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The operation does not fit the tables: a defect of the planner, or tables changed by others.
    #[error("operation refused: {0}")]
    Misfit(String),
    /// What was read back makes no sense.
    #[error("table {table} holds what Lobby never writes: {what}; `lb detach` removes the tables")]
    Corrupt {
        /// Name of the map.
        table: &'static str,
        /// What is wrong with it.
        what: String,
    },
}

/// What the tables hold, without what packets put there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// Sizes, as the maps were made.
    pub limits: Limits,
    /// What holds for all packets; `None` until first written.
    pub globals: Option<Globals>,
    /// The time-outs have changed, and what translated connections were written down with may mean the former
    /// ones.
    pub recount: bool,
    /// Services by index.
    pub services: BTreeMap<u32, ServiceEntry>,
    /// Which service's index each listener leads to. Listeners on all ports are in `vips`, not here.
    pub keys: BTreeMap<Listen, u32>,
    /// Addresses with services, and whether the host has them too.
    pub vips: BTreeMap<IpAddr, VipEntry>,
    /// Backends by index.
    pub backends: BTreeMap<u32, BackendEntry>,
    /// Backend indices that were used before and are free now, with the generation of their last use.
    pub freed: BTreeMap<u32, u32>,
    /// Source addresses by index.
    pub sources: BTreeMap<u32, SourceEntry>,
    /// What the slots of each ring with side pages remember, by the index of the service, as it was when
    /// somebody last looked ([`Dataplane::observed`]): packets write to it too.
    pub sides: BTreeMap<u32, Arc<[SideEntry]>>,
    /// Rule sets by number, from 1. A set that is being filled or emptied may be here in part.
    pub rules: BTreeMap<u32, RuleSet>,
    /// Our MAC address on each interface, by interface index.
    pub interfaces: BTreeMap<u32, [u8; 6]>,
}

impl Tables {
    /// Indices of backends that some slot still sends connections to which are written down nowhere: those
    /// that it leads to, and those that had it before.
    pub fn remembered(&self) -> BTreeSet<u32> {
        let mut remembered = BTreeSet::new();
        for (index, service) in self.services.iter().filter(|(_, service)| service.mode.direct) {
            remembered.extend(service.ring.slots.iter().map(|slot| slot.backend()));
            remembered.extend(service.old_ring.slots.iter().map(|slot| slot.backend()));
            let sides = self.sides.get(index).map(Arc::as_ref).unwrap_or_default();
            let unsettled = service.ring.slots.iter().zip(sides).filter(|(slot, _)| !slot.is_settled());
            let moving = unsettled.map(|(_, side)| side.standing).filter(|standing| !standing.fading);
            remembered.extend(moving.map(|standing| standing.before));
        }
        remembered
    }
}

/// What holds for all packets.
#[derive(Clone, Debug, PartialEq)]
pub struct Globals {
    /// Key of the hash.
    pub hash_key: [u64; 2],
    /// Idle time-outs, rounded down to ticks as the tables hold them ([`Globals::in_ticks`]).
    pub idle: Idle,
    /// Resets a second and CPU.
    pub resets_per_second: u32,
    /// Whether XDP_TX may be used (not on veth).
    pub same_interface_tx: bool,
}

impl Globals {
    /// The same, with every time rounded down to what a whole number of ticks (67.1 ms) can say, so
    /// that what is read back equals what was written.
    pub fn in_ticks(mut self) -> Self {
        let idle = &mut self.idle;
        for time in [
            &mut idle.half_open,
            &mut idle.established,
            &mut idle.closing,
            &mut idle.closed,
            &mut idle.udp,
            &mut idle.port_rest,
        ] {
            *time = duration_of(ticks_in(*time));
        }
        self
    }
}

/// Ticks in a duration, as the tables hold it; at least one.
pub fn ticks_in(duration: Duration) -> u32 {
    let ticks = duration.as_nanos() >> Tick::SHIFT;
    u32::try_from(ticks).unwrap_or(u32::MAX).clamp(1, u32::MAX / 4)
}

/// The duration of so many ticks.
pub fn duration_of(ticks: u32) -> Duration {
    Duration::from_nanos(u64::from(ticks) << Tick::SHIFT)
}

/// A service in the tables.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceEntry {
    /// Where it listens.
    pub listen: Listen,
    /// How packets get to its backends.
    pub mode: Mode,
    /// Its ring.
    pub ring: Ring,
    /// The ring of another size that it had before, as long as some slot asks for it; else empty.
    pub old_ring: Ring,
    /// Its firewall.
    pub firewall: Firewall,
}

impl ServiceEntry {
    /// A service that leads nowhere yet.
    pub fn new(listen: Listen, mode: Mode) -> Self {
        let [ring, old_ring] = [Ring::empty(), Ring::empty()];
        Self { listen, mode, ring, old_ring, firewall: Firewall::default() }
    }
}

/// How packets of a service get to its backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mode {
    /// Which slot a new connection takes.
    pub scheduler: Scheduler,
    /// Packets are not translated.
    pub direct: bool,
    /// While no backend is usable, new connections get no answer instead of a reset.
    pub holds: bool,
}

/// A ring and where it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Ring {
    /// First of its pages, which are consecutive.
    pub first_page: u32,
    /// First of its side pages, as many; `None`: every slot is settled.
    pub first_side: Option<u32>,
    /// The slots. Empty: no backend, no pages.
    pub slots: Arc<[Slot]>,
}

impl Ring {
    /// A ring without slots.
    pub fn empty() -> Self {
        Self { first_page: 0, first_side: None, slots: Arc::new([]) }
    }

    /// The pages that it takes.
    pub fn pages(&self) -> Range<u32> {
        self.first_page..self.first_page + pages_for(self.slots.len())
    }

    /// The side pages that it takes.
    pub fn sides(&self) -> Range<u32> {
        self.first_side.map_or(0..0, |first| first..first + pages_for(self.slots.len()))
    }

    /// Where it is.
    pub fn at(&self) -> RingAt {
        let slots = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        RingAt { slots, first_page: self.first_page, first_side: self.first_side }
    }
}

/// What a slot that has changed hands remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideEntry {
    /// Who had it before, and how far it is.
    pub standing: Standing,
    /// No record of before this counts.
    pub unsettled_since: Tick,
    /// When a packet last went to another backend than the slot's.
    pub last_elsewhere: Tick,
    /// When a connection could last not be written down.
    pub lost_at: Tick,
}

impl SideEntry {
    /// Of a slot that was `before`'s and begins to move.
    pub const fn moving(before: u32, now: Tick) -> Self {
        let standing = Standing { before, fading: false, since: now };
        // Nothing is lost yet; what is lost in this tick can be told from it.
        let lost_at = Tick(now.0.wrapping_sub(1));
        Self { standing, unsettled_since: now, last_elsewhere: now, lost_at }
    }
}

/// A connection that is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordEntry {
    /// Index of its backend.
    pub backend: u32,
}

/// Pages that a ring of so many slots takes.
pub fn pages_for(slots: usize) -> u32 {
    u32::try_from(slots.div_ceil(PAGE_SLOTS)).unwrap_or(u32::MAX)
}

/// Which rules hold for a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Its rule set; `None`: no rules.
    pub rule_set: Option<u32>,
    /// Sources that no rule names are denied.
    pub deny_others: bool,
}

/// The rules of a set. The longest prefix decides.
pub type RuleSet = BTreeMap<Network, Action>;

/// An address with services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipEntry {
    /// Service for all other TCP ports.
    pub any_tcp: Option<u32>,
    /// Service for all other UDP ports.
    pub any_udp: Option<u32>,
    /// The host has the address too.
    pub shared: bool,
}

/// A backend of one service, in the tables.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendEntry {
    /// Index of its service.
    pub service: u32,
    /// Its address; `None`: this host.
    pub address: Option<IpAddr>,
    /// Its port; `None`: the one that the client called.
    pub port: Option<u16>,
    /// Count of the uses of this index, from 1.
    pub generation: u32,
    /// The way there; `None`: not known now.
    pub next_hop: Option<NextHop>,
    /// Its sources.
    pub sources: SourceRun,
    /// What becomes of the flows it has.
    pub flows: FlowsOf,
    /// It is believed dead: a SYN that is sent again, unanswered so far, chooses anew.
    pub dead: bool,
}

/// Consecutive entries among the sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceRun {
    /// Index of the first.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// What becomes of the flows of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowsOf {
    /// They go on.
    #[default]
    Keep,
    /// They are forgotten: UDP finds another backend, TCP a reset.
    Forget,
    /// They are reset.
    Cut,
}

/// The way to a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextHop {
    /// Interface index.
    pub interface: u32,
    /// Our MAC address there.
    pub own_mac: [u8; 6],
    /// The neighbour's.
    pub mac: [u8; 6],
}

/// An address to send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceEntry {
    /// The address.
    pub address: IpAddr,
    /// Its ports.
    pub ports: PortRange,
}

/// A live flow, as `lb connections` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEntry {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Who called.
    pub client: SocketAddr,
    /// The port that was called; the address is that of the backend's service.
    pub called_port: u16,
    /// Port that the client's is translated to; `None`: to this host itself, not translated.
    pub source_port: Option<u16>,
    /// Address that the client's is translated to; `None`: not translated.
    pub source: Option<IpAddr>,
    /// Index of the backend.
    pub backend: u32,
    /// Generation of the backend when the flow began; another than the entry's now: the flow is void.
    pub generation: u32,
    /// How far it is.
    pub state: FlowState,
    /// The program has ended it: it has answered one side with a reset, of which the other need not know.
    pub cut: bool,
    /// Since the last packet; a tick (67 ms) exact.
    pub idle: Duration,
    /// By which hop the client's packets come.
    pub from: ClientHop,
}

/// Who brings a client's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientHop {
    /// Index of the interface that they come in by.
    pub interface: u32,
    /// The neighbour's MAC address.
    pub mac: [u8; 6],
    /// The VLAN that they are in, if they carry a tag.
    pub vlan: Option<u16>,
}

/// How far a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowState {
    /// TCP, handshake not finished.
    HalfOpen,
    /// TCP, established.
    Established,
    /// TCP, one side has said it is done.
    Closing,
    /// TCP, both have, or one has reset.
    Closed,
    /// UDP.
    Udp,
}

impl fmt::Display for FlowState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HalfOpen => "half-open",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Udp => "udp",
        })
    }
}

/// How full the flow table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Flows that are live now.
    pub live: u32,
    /// Flows that fit.
    pub capacity: u32,
}
