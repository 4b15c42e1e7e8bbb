//! Ethernet, with at most one VLAN tag.

#![expect(unsafe_code, reason = "headers are declared to be plain bytes")]

use super::{Frame, Wire};

/// Ethernet II header (IEEE 802.3 clause 3).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Eth {
    /// Destination.
    pub destination: [u8; 6],
    /// Source.
    pub source: [u8; 6],
    /// EtherType.
    pub ethertype: [u8; 2],
}

/// What follows the EtherType of a tagged frame (IEEE 802.1Q clause 9.6).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Vlan {
    /// Priority, drop eligible, identifier.
    pub tci: [u8; 2],
    /// EtherType of what is inside.
    pub ethertype: [u8; 2],
}

// SAFETY (both): arrays of bytes.
unsafe impl Wire for Eth {}
unsafe impl Wire for Vlan {}

/// EtherType of IPv4.
pub const IPV4: [u8; 2] = [0x08, 0x00];
/// EtherType of IPv6.
pub const IPV6: [u8; 2] = [0x86, 0xdd];
/// EtherType of a VLAN tag.
pub const VLAN: [u8; 2] = [0x81, 0x00];
/// Length of the header without a tag.
pub const LEN: usize = 14;

/// A frame's link layer.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Who it is for.
    pub destination: [u8; 6],
    /// Who sent it.
    pub source: [u8; 6],
    /// What is inside.
    pub ethertype: [u8; 2],
    /// VLAN identifier, network order, without priority; `None`: no tag.
    pub vlan: Option<u16>,
    /// Where the network layer begins.
    pub l3: usize,
}

/// The bits of a TCI that are the identifier, in network order.
pub const VLAN_ID: u16 = 0x0fff_u16.to_be();

impl Link {
    /// Reads it; `None` if the frame is too short for one.
    #[inline(always)]
    pub fn parse(frame: &impl Frame) -> Option<Self> {
        let eth: Eth = frame.read(0)?;
        let link = Self {
            destination: eth.destination,
            source: eth.source,
            ethertype: eth.ethertype,
            vlan: None,
            l3: LEN,
        };
        if eth.ethertype != VLAN {
            return Some(link);
        }
        let tag: Vlan = frame.read(LEN)?;
        let id = u16::from_ne_bytes(tag.tci) & VLAN_ID;
        Some(Self { ethertype: tag.ethertype, vlan: Some(id), l3: LEN + size_of::<Vlan>(), ..link })
    }

    /// Whether it is for a group or for all (the I/G bit, IEEE 802 clause 8.2).
    #[inline(always)]
    pub const fn is_group(&self) -> bool {
        self.destination[0] & 1 != 0
    }
}

/// A MAC address as the lower six bytes of a word, in memory order.
#[inline(always)]
pub const fn mac_to_word(mac: [u8; 6]) -> u64 {
    u64::from_ne_bytes([mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0])
}

/// The MAC address in the lower six bytes of a word.
#[inline(always)]
pub const fn mac_from_word(word: u64) -> [u8; 6] {
    let b = word.to_ne_bytes();
    [b[0], b[1], b[2], b[3], b[4], b[5]]
}
