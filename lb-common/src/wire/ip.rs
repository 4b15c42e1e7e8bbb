//! IPv4 and IPv6 headers.

#![expect(unsafe_code, reason = "headers are declared to be plain bytes")]

use super::wire;
use crate::abi::{Address, AddressV4};

/// IPv4 header without options (RFC 791 section 3.1).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Ipv4 {
    /// Version (4) and header length in 32-bit words.
    pub version_ihl: u8,
    /// Type of service.
    pub tos: u8,
    /// Length of header and data.
    pub total_length: u16,
    /// Identification.
    pub identification: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the data.
    pub protocol: u8,
    /// Checksum of the header.
    pub checksum: u16,
    /// Source address.
    pub source: AddressV4,
    /// Destination address.
    pub destination: AddressV4,
}

impl Ipv4 {
    /// Length without options.
    pub const LEN: usize = 20;
    /// In `fragment`, as a number: more fragments, or an offset other than zero.
    pub const FRAGMENTED: u16 = 0x3fff;
    /// In `fragment`, as a number: the offset.
    pub const FRAGMENT_OFFSET: u16 = 0x1fff;
}

/// IPv6 header (RFC 8200 section 3).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6 {
    /// Version (6), traffic class, flow label.
    pub version_class_label: u32,
    /// Length of what follows this header.
    pub payload_length: u16,
    /// Protocol of what follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
}

impl Ipv6 {
    /// Length without extension headers.
    pub const LEN: usize = 40;
}

/// The beginning that extension headers share (RFC 8200 section 4.3 and on).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Extension {
    /// Protocol of what follows.
    pub next_header: u8,
    /// Length in 8-byte units, not counting the first.
    pub length: u8,
    /// Depends on the header: for a routing header its type and segments left.
    pub data: [u8; 6],
}

wire! { Ipv4 = 20, Ipv6 = 40, Extension = 8 }

/// Protocol numbers (IANA) that matter here, beside TCP and UDP.
pub mod protocol {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// Routing header.
    pub const ROUTING: u8 = 43;
    /// Fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// Destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
}
