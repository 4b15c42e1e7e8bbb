//! The maps: their keys, values, names and sizes. Written by the daemon, read by the program.
//!
//! What an interface between two programs must promise is kept here by the compiler: no implicit
//! padding, sizes asserted below, network byte order in byte arrays, everything else native integers.
//! A change of anything on this page needs a new [`LAYOUT_VERSION`].
//!
//! Small tables that are looked up by what a packet says are hash maps or tries; they lead to an
//! index. Everything that has an index is an array that the daemon maps into its memory, so that a
//! change is one store of one word ([`Shared`]).

mod listener;
pub mod name;
mod record;
mod ring;
mod tick;

pub use self::{
    listener::{Called, LISTENER_CELLS, Listener, Listeners},
    record::{Hop, RECORD_WAYS, Record, Records, State, Way},
    ring::{NO_BACKEND, PAGE_SLOTS, Page, RingAt, Side, SidePage, Slot, Standing},
    tick::{Clock, Tick},
};
use crate::shared::Shared;

/// Version of the layout of all maps. Pinned beside them; a daemon that finds another one refuses to
/// touch anything.
pub const LAYOUT_VERSION: u32 = 4;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// An IPv4 address, in memory order: `u32::from_ne_bytes` of its bytes.
pub type AddressV4 = u32;

/// An IPv6 address, its two halves in memory order. Where there is room for either family, an IPv4
/// address is an IPv4-mapped one (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2).
///
/// Words and not bytes, in keys too: a BPF stack wants them aligned.
pub type Address = [u64; 2];

/// The words of an IPv4 address.
#[inline(always)]
pub const fn address_v4(bytes: [u8; 4]) -> AddressV4 {
    u32::from_ne_bytes(bytes)
}

/// The words of an IPv6 address.
#[inline(always)]
pub const fn address_v6(b: [u8; 16]) -> Address {
    [
        u64::from_ne_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
        u64::from_ne_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]),
    ]
}

/// What precedes an IPv4 address in the lower half of its IPv4-mapped form.
const MAPPED: [u8; 4] = [0, 0, 0xff, 0xff];

/// An IPv4 address where there is room for either family.
#[inline(always)]
pub const fn mapped(address: AddressV4) -> Address {
    let [m, a] = [MAPPED, address.to_ne_bytes()];
    [0, u64::from_ne_bytes([m[0], m[1], m[2], m[3], a[0], a[1], a[2], a[3]])]
}

/// The IPv4 address in an IPv4-mapped one.
#[inline(always)]
pub const fn unmapped(address: Address) -> AddressV4 {
    let b = address[1].to_ne_bytes();
    u32::from_ne_bytes([b[4], b[5], b[6], b[7]])
}

/// An address of either family, from its words.
pub const fn ip_addr(address: Address) -> core::net::IpAddr {
    let [h, l] = [address[0].to_ne_bytes(), address[1].to_ne_bytes()];
    let v6 = core::net::Ipv6Addr::from_octets([
        h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7],
    ]);
    match v6.to_ipv4_mapped() {
        Some(v4) => core::net::IpAddr::V4(v4),
        None => core::net::IpAddr::V6(v6),
    }
}

/// The words of an address of either family.
pub const fn address(ip: core::net::IpAddr) -> Address {
    match ip {
        core::net::IpAddr::V4(v4) => mapped(address_v4(v4.octets())),
        core::net::IpAddr::V6(v6) => address_v6(v6.octets()),
    }
}

/// What holds for all packets.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// What the 5-tuple's hash is made with; see [`crate::datapath::hash::set_key`].
    pub multipliers: Multipliers,
    /// The key of that hash: random per cluster, so that nobody can aim at a bucket or a backend.
    pub hash_key: [Shared<u64>; 2],
    /// Which last bytes (modulo 64) occur among the IPv4 [`Source`] addresses: a bit each. Most packets
    /// that are no replies are told by this and `ports`, without a lookup.
    pub sources_v4: Shared<u64>,
    /// The same for IPv6.
    pub sources_v6: Shared<u64>,
    /// Number of [`Flow`]s, less one; the number is a power of two.
    pub flow_mask: Shared<u32>,
    /// Number of lines of [`Records`], less one; the number is a power of two.
    pub record_mask: Shared<u32>,
    /// Number of lines of [`Listeners`], less one; the number is a power of two.
    pub listener_mask: Shared<u32>,
    /// Zero.
    pub reserved: Shared<u32>,
    /// Lowest port of any source.
    pub port_low: Shared<u16>,
    /// Highest port of any source.
    pub port_high: Shared<u16>,
    /// [`Config::SAME_INTERFACE_TX`].
    pub flags: Shared<u32>,
    /// Idle time-outs, in ticks.
    pub idle: Idle,
    /// Resets that each CPU may send in a second.
    pub resets_per_second: Shared<u32>,
    /// Ticks for which a flow's port is left alone after it has ended and expired, while there is another
    /// port (a backend's TIME_WAIT, RFC 9293 section 3.6.1, lasts 60 s on Linux).
    pub port_rest: Shared<u32>,
    /// Zero; see [`Config::launder`].
    pub zero: Shared<u64>,
}

impl Config {
    /// The same value, of which the verifier no longer knows what it may be: it would follow each value of it
    /// through all that comes after, such as the rest of a loop.
    #[inline(always)]
    pub fn launder(&self, value: u64) -> u64 {
        value ^ self.zero.get()
    }

    /// A packet that leaves by the interface it came from is sent by XDP_TX. Not on veth, where that
    /// needs a program on the peer.
    pub const SAME_INTERFACE_TX: u32 = 1;
    /// A daemon has written the configuration; before, the tables are new.
    pub const WRITTEN: u32 = 2;
}

/// The multipliers of the 5-tuple's hash, which follow from its key. Those that IPv4 needs are one cache line.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Multipliers {
    /// For the last steps; odd.
    pub last: [Shared<u64>; 2],
    /// Two for each 32 bits of what is hashed: both addresses and both ports.
    pub each: [[Shared<u64>; 2]; 9],
}

/// Idle time-outs of flows, in ticks.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Idle {
    /// TCP, SYN seen, handshake not finished.
    pub half_open: Shared<u32>,
    /// TCP, established. RFC 5382 section 5 wants at least 2 h 4 min.
    pub established: Shared<u32>,
    /// TCP, one side has sent FIN.
    pub closing: Shared<u32>,
    /// TCP, both sides have sent FIN, or one RST.
    pub closed: Shared<u32>,
    /// UDP. RFC 4787 section 4.3 wants at least 2 min.
    pub udp: Shared<u32>,
    /// How many ticks are a step, as a power of two, for a translated connection in each [`State`]: a byte
    /// each. Follows from the others, see [`Idle::set_steps`].
    pub steps: Shared<u32>,
}

/// An address that some service listens on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vip {
    /// Index plus one of the [`Service`] for all TCP ports without one of their own; zero: none.
    pub any_tcp: u32,
    /// The same for UDP.
    pub any_udp: u32,
    /// [`Vip::SHARED`].
    pub flags: u32,
}

impl Vip {
    /// The address is the host's own as well: what is not for a service is the host's to handle.
    pub const SHARED: u32 = 1;
}

/// A service: one address, port (or all) and protocol.
#[repr(C, align(64))]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Service {
    /// A [`RingAt`]. One store switches it.
    pub ring: Shared<u64>,
    /// The firewall: rule set (zero: none) in the upper 32 bits, [`Service::DENY_OTHERS`] in the lower.
    pub firewall: Shared<u64>,
    /// [`Service::ROUND_ROBIN`], [`Service::ALL_PORTS`], [`Service::IN_USE`], [`Service::DIRECT`],
    /// [`Service::HOLDS`], [`Service::BY_SOURCE`].
    pub flags: Shared<u32>,
    /// [`TCP`] or [`UDP`].
    pub protocol: Shared<u8>,
    /// Zero.
    pub reserved: Shared<u8>,
    /// Port, network order; zero for all.
    pub port: Shared<u16>,
    /// Address, two halves in memory order.
    pub address: [Shared<u64>; 2],
    /// The [`RingAt`] of before, while the number of slots is being changed; else zero.
    pub old_ring: Shared<u64>,
    /// Zero.
    pub spare: [Shared<u64>; 2],
}

impl Service {
    /// Slots are taken in turn instead of by hash.
    pub const ROUND_ROBIN: u32 = 1;
    /// Every port of the address; the backend's port is the client's unless the backend names one.
    pub const ALL_PORTS: u32 = 2;
    /// The entry means something.
    pub const IN_USE: u32 = 4;
    /// Packets are not translated: the backend has the service's address, and answers the client itself.
    pub const DIRECT: u32 = 8;
    /// While no backend is usable, new connections get no answer instead of a reset: clients ask again.
    pub const HOLDS: u32 = 16;
    /// Slots are taken by the client's address alone: all its connections go to one backend.
    pub const BY_SOURCE: u32 = 32;
    /// Sources that no rule matches are denied.
    pub const DENY_OTHERS: u32 = 1;
}

/// What a firewall rule says.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The packet goes on.
    Allow = 1,
    /// The packet is dropped.
    Deny = 2,
}

/// Data of the trie's key for IPv4; the prefix counts the 32 bits of `set` too.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleV4 {
    /// Rule set, from 1.
    pub set: u32,
    /// Source network.
    pub address: AddressV4,
}

/// Data of the trie's key for IPv6; the prefix counts the 32 bits of `set` too.
#[repr(C, packed(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleV6 {
    /// Rule set, from 1.
    pub set: u32,
    /// Source network.
    pub address: Address,
}

/// Interface indices that the program can send by are below this.
pub const INTERFACES: u32 = 1 << 16;

/// A backend of one service.
#[repr(C, align(64))]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Backend {
    /// Address, two halves in memory order.
    pub address: [Shared<u64>; 2],
    /// Port, network order; zero: the port that the client used.
    pub port: Shared<u16>,
    /// [`Backend::LOCAL`] and its fellows.
    pub flags: Shared<u16>,
    /// Counts the uses of this entry: a flow of another generation is none of this backend's.
    pub generation: Shared<u32>,
    /// MAC address of the next hop in the lower six bytes (memory order), VLAN identifier in network
    /// order in the upper two (zero: leave the tag as it is).
    pub next_hop: Shared<u64>,
    /// MAC address of our own interface, as in `next_hop`; upper two bytes zero.
    pub own_mac: Shared<u64>,
    /// Interface by which packets leave.
    pub interface: Shared<u32>,
    /// Index of the [`Service`].
    pub service: Shared<u32>,
    /// Where the [`Source`]s are that its flows are sent from: first in the upper 32 bits, number in
    /// the lower.
    pub sources: Shared<u64>,
    /// Zero.
    pub spare: Shared<u64>,
}

impl Backend {
    /// The entry means something.
    pub const IN_USE: u16 = 1;
    /// This host itself: packets are passed.
    pub const LOCAL: u16 = 2;
    /// There is a next hop.
    pub const REACHABLE: u16 = 4;
    /// Its flows are cut: each packet of either side is answered by a reset.
    pub const CUT: u16 = 8;
    /// Its flows are forgotten: the next packet finds another backend (UDP), or a reset (TCP).
    pub const FORGET: u16 = 16;
    /// It is believed dead: a SYN that is sent again, unanswered so far, chooses anew.
    pub const DEAD: u16 = 32;
}

/// An address that translated packets are sent from, with the ports that are ours there.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Source {
    /// Address, two halves in memory order.
    pub address: [Shared<u64>; 2],
    /// Lowest port.
    pub port_low: Shared<u16>,
    /// Highest port.
    pub port_high: Shared<u16>,
    /// Zero.
    pub reserved: Shared<u32>,
    /// Zero.
    pub spare: Shared<u64>,
}

/// A translated connection, as its backend sees it: one cache line. It is found directly, since its index
/// follows from backend, source address and port (see [`crate::datapath::flow`]). From the client's side the
/// connection is found by its [`Record`].
#[repr(C, align(64))]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Flow {
    /// The guard of all other fields: the upper half of the record's key in the upper 32 bits; below,
    /// [`Flow::LIVE`] or [`Flow::BUSY`] (or zero: free) in two bits, and a count of the uses of this entry in
    /// thirty.
    pub guard: Shared<u64>,
    /// The client's address, two halves in memory order.
    pub client: [Shared<u64>; 2],
    /// The client's port, the port it called, and the port it is translated to, all network order.
    pub ports: [Shared<u16>; 3],
    /// [`Flow::UDP`], [`Flow::LOCAL`], [`Flow::V6`], [`Flow::TAGGED`].
    pub flags: Shared<u16>,
    /// Index and generation of the [`Backend`].
    pub backend: [Shared<u32>; 2],
    /// MAC address from which the client's packets come in the lower six bytes (memory order), VLAN
    /// identifier (network order) in the upper two.
    pub client_hop: Shared<u64>,
    /// The lower half of the record's key.
    pub key: Shared<u32>,
    /// When it has been idle for as long as it may.
    pub expires: Shared<Tick>,
    /// Index of the [`Source`].
    pub source: Shared<u16>,
    /// Interface by which the client's packets come, and replies leave; below [`INTERFACES`].
    pub interface: Shared<u16>,
    /// What its record was last told: the [`State`], above a time in steps of that state.
    pub told: Shared<u16>,
    /// What the client has sent: [`Flow::SYN`] and its fellows.
    pub client_sent: Shared<u8>,
    /// What the backend has sent. Written by packets of that side only.
    pub backend_sent: Shared<u8>,
}

impl Flow {
    /// In `guard`: being written.
    pub const BUSY: u64 = 1;
    /// In `guard`: valid.
    pub const LIVE: u64 = 2;

    /// UDP, else TCP.
    pub const UDP: u16 = 1;
    /// To this host itself; not translated.
    pub const LOCAL: u16 = 2;
    /// IPv6.
    pub const V6: u16 = 4;
    /// The client's packets carry a VLAN tag.
    pub const TAGGED: u16 = 8;

    /// That side has sent SYN.
    pub const SYN: u8 = 1;
    /// That side has acknowledged the other's SYN.
    pub const ACK: u8 = 2;
    /// That side has sent FIN.
    pub const FIN: u8 = 4;
    /// That side has sent RST, and nothing after it.
    pub const RST: u8 = 8;
}

/// What passed between one backend and its clients, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets to the backend.
    pub packets_in: u64,
    /// Bytes of Ethernet frames to the backend.
    pub bytes_in: u64,
    /// Packets from the backend.
    pub packets_out: u64,
    /// Bytes of Ethernet frames from the backend.
    pub bytes_out: u64,
    /// New flows.
    pub flows: u64,
}

impl core::ops::AddAssign for Traffic {
    #[inline(always)]
    fn add_assign(&mut self, other: Self) {
        self.packets_in = self.packets_in.wrapping_add(other.packets_in);
        self.bytes_in = self.bytes_in.wrapping_add(other.bytes_in);
        self.packets_out = self.packets_out.wrapping_add(other.packets_out);
        self.bytes_out = self.bytes_out.wrapping_add(other.bytes_out);
        self.flows = self.flows.wrapping_add(other.flows);
    }
}

/// Resets left, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// The second (in ticks) that `left` is for.
    pub since: u32,
    /// How many may still be sent.
    pub left: u32,
}

impl Budget {
    /// Ticks in a second, rounded down so that the budget is never tighter than it says.
    const SECOND: u32 = (1_000_000_000u64 >> Tick::SHIFT) as u32;

    /// Takes one, unless this second's are used up.
    #[inline(always)]
    pub fn spend(&mut self, now: Tick, per_second: u32) -> bool {
        if now.since(Tick(self.since)) >= Self::SECOND || self.since == 0 {
            self.since = now.0;
            self.left = per_second;
        }
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        true
    }
}

const _: () = {
    assert!(size_of::<Config>() == 256);
    assert!(size_of::<Listeners>() == 128);
    assert!(size_of::<Vip>() == 12);
    assert!(size_of::<Service>() == 64);
    assert!(size_of::<RuleV4>() == 8);
    assert!(size_of::<RuleV6>() == 20);
    assert!(size_of::<Page>() == 4096);
    assert!(size_of::<Side>() == 24);
    assert!(size_of::<SidePage>() == 24 * 1024);
    assert!(size_of::<Records>() == 64);
    assert!(size_of::<Backend>() == 64);
    assert!(size_of::<Source>() == 32);
    assert!(size_of::<Flow>() == 64);
    assert!(size_of::<Traffic>() == 40);
    assert!(size_of::<Budget>() == 8);
};

#[cfg(feature = "user")]
mod pod {
    #![expect(unsafe_code, reason = "aya asks for it of every map type")]
    use super::*;
    macro_rules! pod {
        ($($name:ty),+) => {
            // SAFETY: `repr(C)`, no padding (sizes asserted above), every bit pattern valid.
            $(unsafe impl aya::Pod for $name {})+
        };
    }
    pod!(Vip, RuleV4, RuleV6, Traffic, Budget);
}
