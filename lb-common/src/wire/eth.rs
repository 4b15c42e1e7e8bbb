//! Ethernet, with at most one VLAN tag.

#![expect(unsafe_code, reason = "headers are declared to be plain bytes")]

use super::{Frame, wire};

/// Ethernet II header (IEEE 802.3 clause 3).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Eth {
    /// Destination.
    pub destination: Mac,
    /// Source.
    pub source: Mac,
    /// EtherType.
    pub ethertype: u16,
}

/// A MAC address, as it lies in a header: its first four bytes, and its last two.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Mac(u32, u16);

impl Mac {
    /// As the lower six bytes of a word.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        self.0 as u64 | (self.1 as u64) << 32
    }

    /// The one in the lower six bytes of a word.
    #[inline(always)]
    pub const fn of_word(word: u64) -> Self {
        Self(word as u32, (word >> 32) as u16)
    }
}

/// What follows the EtherType of a tagged frame (IEEE 802.1Q clause 9.6).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Vlan {
    /// Priority, drop eligible, identifier.
    pub tci: u16,
    /// EtherType of what is inside.
    pub ethertype: u16,
}

wire! { Eth = 14, Mac = 6, Vlan = 4 }

/// EtherType of IPv4, in network order.
pub const IPV4: u16 = 0x0800_u16.to_be();
/// EtherType of IPv6, in network order.
pub const IPV6: u16 = 0x86dd_u16.to_be();
/// EtherType of a VLAN tag, in network order.
pub const VLAN: u16 = 0x8100_u16.to_be();
/// Length of the header without a tag.
pub const LEN: usize = 14;

/// A frame's link layer.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Who it is for, as [`mac_to_word`].
    pub destination: u64,
    /// Who sent it, as [`mac_to_word`].
    pub source: u64,
    /// Where the network layer begins.
    pub l3: usize,
    /// VLAN identifier, network order, without priority; zero where there is no tag.
    pub vlan: u16,
    /// What is inside, as it lies in memory.
    pub ethertype: u16,
    /// Whether there is a VLAN tag.
    pub tagged: bool,
}

/// The bits of a TCI that are the identifier, in network order.
pub const VLAN_ID: u16 = 0x0fff_u16.to_be();

impl Link {
    /// Reads it; `None` if the frame is too short for one.
    #[inline(always)]
    pub fn parse(frame: &impl Frame) -> Option<Self> {
        let eth: Eth = frame.read(0)?;
        let link = Self {
            destination: eth.destination.to_word(),
            source: eth.source.to_word(),
            ethertype: eth.ethertype,
            vlan: 0,
            tagged: false,
            l3: LEN,
        };
        if link.ethertype != VLAN {
            return Some(link);
        }
        let tag: Vlan = frame.read(LEN)?;
        Some(Self {
            ethertype: tag.ethertype,
            vlan: tag.tci & VLAN_ID,
            tagged: true,
            l3: LEN + size_of::<Vlan>(),
            ..link
        })
    }

    /// Who sent it, and in which VLAN: MAC address and VLAN identifier in one word.
    #[inline(always)]
    pub const fn source_hop(&self) -> u64 {
        self.source | vlan_word(self.vlan)
    }

    /// Whether it is for a group or for all (the I/G bit, IEEE 802 clause 8.2).
    #[inline(always)]
    pub const fn is_group(&self) -> bool {
        const GROUP: u64 = mac_to_word([1, 0, 0, 0, 0, 0]);
        self.destination & GROUP != 0
    }
}

/// A MAC address as the lower six bytes of a word, in memory order.
#[inline(always)]
pub const fn mac_to_word(mac: [u8; 6]) -> u64 {
    u64::from_le_bytes([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0])
}

/// The opposite of [`mac_to_word`].
#[inline(always)]
pub const fn mac_of_word(word: u64) -> [u8; 6] {
    let [a, b, c, d, e, f, ..] = word.to_le_bytes();
    [a, b, c, d, e, f]
}

/// A VLAN identifier (network order) as the upper two bytes of such a word.
#[inline(always)]
pub const fn vlan_word(id: u16) -> u64 {
    (id as u64) << 48
}

/// The VLAN identifier in the upper two bytes of a word, network order.
#[inline(always)]
pub const fn vlan_from_word(word: u64) -> u16 {
    (word >> 48) as u16
}
