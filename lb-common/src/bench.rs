//! What the packet benchmark tells its generator, and the arithmetic that both do.

use crate::{shared::Shared, wire::checksum::Sum};

/// Words of eight bytes in a template: enough for IPv6 and TCP.
pub const WORDS: usize = 10;

/// Where the IPv4 source address is; the destination's is beside it.
pub const V4_ADDRESS: usize = 26;
/// Where the IPv4 header's checksum is.
pub const V4_CHECKSUM: usize = 24;
/// Where the source port is after IPv4.
pub const V4_PORTS: usize = 34;
/// Where the last four bytes of an IPv6 source address are; the destination's are sixteen bytes on.
pub const V6_ADDRESS: usize = 34;
/// Where the source port is after IPv6.
pub const V6_PORTS: usize = 54;

/// Where the transport's checksum is.
#[inline(always)]
pub const fn checksum_at(v6: bool, udp: bool) -> usize {
    let ports = if v6 { V6_PORTS } else { V4_PORTS };
    ports + if udp { 6 } else { 16 }
}

/// Ports of a client address that flows are counted by.
const PORTS: u64 = 1 << 14;
/// The first of them.
const FIRST_PORT: u16 = 1024;

/// Most frames that can be listed, see [`Ends`].
pub const LISTED: u32 = 1 << 20;

/// Lines of the table that packets are compared with which look at one cache line and nothing else: as many as records
/// have there.
pub const LINES: u32 = 1 << 22;

/// Connections that the kernel's own table has room for, with which it is compared as well.
pub const REMEMBERED: u32 = 1 << 22;

/// What differs between listed frames, whose ends do not follow from a number: as the bytes stand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// The last four bytes of the source address.
    pub source: u32,
    /// The last four bytes of the destination address.
    pub destination: u32,
    /// The destination port.
    pub port: u16,
    /// The transport's checksum.
    pub checksum: u16,
    /// The IPv4 header's checksum; means nothing in IPv6.
    pub header_checksum: u16,
}

impl Ends {
    /// As an array map has it.
    #[inline(always)]
    pub const fn to_words(self) -> [u64; 2] {
        [
            self.source as u64 | (self.destination as u64) << 32,
            self.port as u64 | (self.checksum as u64) << 16 | (self.header_checksum as u64) << 32,
        ]
    }

    /// From there.
    #[inline(always)]
    pub const fn from_words([addresses, rest]: [u64; 2]) -> Self {
        Self {
            source: addresses as u32,
            destination: (addresses >> 32) as u32,
            port: rest as u16,
            checksum: (rest >> 16) as u16,
            header_checksum: (rest >> 32) as u16,
        }
    }
}

/// What to generate. The template's source address (its last four bytes), source port and the checksums
/// that cover them are zero, or rather: the checksums are right for zero.
#[repr(C)]
pub struct Order {
    /// The frame.
    pub template: [Shared<u64>; WORDS],
    /// Number of flows; a frame's is drawn at random. Zero: a new one for each frame.
    pub flows: Shared<u64>,
    /// The first four bytes that are counted up from.
    pub first_address: Shared<u32>,
    /// [`Order::V6`], [`Order::UDP`], [`Order::IN_ORDER`].
    pub flags: Shared<u32>,
}

impl Order {
    /// IPv6.
    pub const V6: u32 = 1;
    /// UDP.
    pub const UDP: u32 = 2;
    /// Flows one after the other instead of at random.
    pub const IN_ORDER: u32 = 4;

    /// Whether it is IPv6.
    #[inline(always)]
    pub fn is_v6(&self) -> bool {
        self.flags.get() & Self::V6 != 0
    }

    /// Whether it is UDP.
    #[inline(always)]
    pub fn is_udp(&self) -> bool {
        self.flags.get() & Self::UDP != 0
    }

    /// The flow of the frame with this number.
    #[inline(always)]
    pub fn flow(&self, number: u64) -> u64 {
        let flows = self.flows.get();
        if flows == 0 {
            return number;
        }
        if self.flags.get() & Self::IN_ORDER != 0 {
            return number % flows;
        }
        // Multiplier of Steele and Vigna (2021); the upper half is the random one.
        let mixed = number.wrapping_mul(0xd134_2543_de82_ef95);
        let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0xd134_2543_de82_ef95) >> 32;
        (mixed * flows) >> 32
    }

    /// Who sends a flow: the last four bytes of the address and the port, network order, and the
    /// transport's checksum with them.
    #[inline(always)]
    pub fn sender(&self, flow: u64) -> (u32, u16, u16) {
        let address = self.first_address.get().wrapping_add((flow / PORTS) as u32).to_be();
        let port = (FIRST_PORT + (flow % PORTS) as u16).to_be();
        let checksum =
            Sum::default().replace_u32(0, address).replace_u16(0, port).update(self.base_checksum());
        (address, port, checksum)
    }

    /// What the IPv4 header's checksum with this source address differs from the template's by.
    #[inline(always)]
    pub fn header_checksum_change(&self, address: u32) -> u16 {
        let template = self.word(V4_CHECKSUM);
        template ^ Sum::default().replace_u32(0, address).update(template)
    }

    /// Where the transport's checksum is.
    #[inline(always)]
    pub fn checksum_at(&self) -> usize {
        checksum_at(self.is_v6(), self.is_udp())
    }

    #[inline(always)]
    fn base_checksum(&self) -> u16 {
        match (self.is_v6(), self.is_udp()) {
            (false, false) => self.word(const { checksum_at(false, false) }),
            (false, true) => self.word(const { checksum_at(false, true) }),
            (true, false) => self.word(const { checksum_at(true, false) }),
            (true, true) => self.word(const { checksum_at(true, true) }),
        }
    }

    /// Two bytes of the template, at an even offset.
    #[inline(always)]
    fn word(&self, offset: usize) -> u16 {
        (self.template[offset / 8].get() >> (offset % 8 * 8)) as u16
    }
}
