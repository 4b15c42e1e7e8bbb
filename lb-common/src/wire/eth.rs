//! Ethernet, with at most one VLAN tag.

#![expect(unsafe_code, reason = "headers are declared to be plain bytes")]

use super::{Frame, join4, split4, wire};

/// Ethernet II header (IEEE 802.3 clause 3).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Eth {
    /// Destination.
    pub destination: [u16; 3],
    /// Source.
    pub source: [u16; 3],
    /// EtherType.
    pub ethertype: u16,
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

wire! { Eth = 14, Vlan = 4 }

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
            destination: mac_word(eth.destination),
            source: mac_word(eth.source),
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
    u64::from_ne_bytes([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0])
}

/// A MAC address of a header as the lower six bytes of a word, in memory order.
#[inline(always)]
pub const fn mac_word([a, b, c]: [u16; 3]) -> u64 {
    join4([a, b, c, 0])
}

/// The MAC address in the lower six bytes of a word, for a header.
#[inline(always)]
pub const fn mac_of_word(word: u64) -> [u16; 3] {
    let [a, b, c, _] = split4(word);
    [a, b, c]
}

/// A VLAN identifier (network order) as the upper two bytes of such a word.
#[inline(always)]
pub const fn vlan_word(id: u16) -> u64 {
    join4([0, 0, 0, id])
}

/// The VLAN identifier in the upper two bytes of a word, network order.
#[inline(always)]
pub const fn vlan_from_word(word: u64) -> u16 {
    let [_, _, _, id] = split4(word);
    id
}
