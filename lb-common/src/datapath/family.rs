//! IPv4 and IPv6: where they differ, so that nothing else has to.

use super::parse::{Headers, Odd, ipv4, ipv6};
use crate::{
    abi::{Address, RuleV4, RuleV6, ServiceKeyV4, ServiceKeyV6, Vip},
    shared::Shared,
    tables::Tables,
    wire::{
        Frame,
        checksum::Sum,
        ip::{Ipv4, Ipv6},
    },
};

/// An IP version. Addresses are compared and summed as words; which words is said here.
pub trait Family: Copy {
    /// An address as it stands in a header.
    type Address: Copy + PartialEq;
    /// Whether it is IPv6.
    const V6: bool;

    /// Reads the headers down to the transport's, which begins at the returned offset.
    fn headers(frame: &impl Frame, l3: usize) -> Result<Headers<Self::Address>, Odd<Self::Address>>;

    /// The address as it is kept in the tables.
    fn widen(address: Self::Address) -> [u64; 2];
    /// The address, from the tables.
    fn narrow(address: &[Shared<u64>; 2]) -> Self::Address;
    /// Its last byte.
    fn last_byte(address: Self::Address) -> u8;

    /// Index of the service on exactly this address, port and protocol.
    fn service<T: Tables>(tables: &T, address: Self::Address, port: u16, protocol: u8) -> Option<u32>;
    /// What is known of the address.
    fn vip<T: Tables>(tables: &T, address: Self::Address) -> Option<Vip>;
    /// The longest matching rule for a source.
    fn rule<T: Tables>(tables: &T, set: u32, source: Self::Address) -> Option<u32>;
    /// Index of the source with this address.
    fn source<T: Tables>(tables: &T, address: Self::Address) -> Option<u32>;
    /// Which last bytes (modulo 64) occur among the sources.
    fn source_bits(config: &crate::abi::Config) -> u64;

    /// Feeds both addresses to a function of words, in the order in which they stand in a header.
    fn words(source: Self::Address, destination: Self::Address, each: impl FnMut(u64));
    /// Counts one address out of a checksum and another one in.
    fn replace(sum: Sum, old: Self::Address, new: Self::Address) -> Sum;
    /// Writes addresses, and counts TTL or hop limit down by one. `None`: the header is not there.
    fn rewrite(
        frame: &mut impl Frame,
        l3: usize,
        source: Self::Address,
        destination: Self::Address,
    ) -> Option<()>;
    /// Writes a header for TCP without options from scratch, and where it ends. `None`: no room.
    fn write_header(
        frame: &mut impl Frame,
        l3: usize,
        source: Self::Address,
        destination: Self::Address,
    ) -> Option<usize>;
}

/// IPv4.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

/// TTL and hop limit of packets made here: the default of RFC 1700 and of Linux.
const TTL: u8 = 64;

/// The upper half of an IPv4-mapped address is zero; this is what precedes the address in the lower.
const MAPPED: [u8; 4] = [0, 0, 0xff, 0xff];

impl Family for V4 {
    type Address = [u8; 4];
    const V6: bool = false;

    #[inline(always)]
    fn headers(frame: &impl Frame, l3: usize) -> Result<Headers<[u8; 4]>, Odd<[u8; 4]>> {
        ipv4(frame, l3)
    }

    #[inline(always)]
    fn widen(a: [u8; 4]) -> [u64; 2] {
        let [m0, m1, m2, m3] = MAPPED;
        [0, u64::from_ne_bytes([m0, m1, m2, m3, a[0], a[1], a[2], a[3]])]
    }

    #[inline(always)]
    fn narrow(address: &[Shared<u64>; 2]) -> [u8; 4] {
        let b = address[1].get().to_ne_bytes();
        [b[4], b[5], b[6], b[7]]
    }

    #[inline(always)]
    fn last_byte(address: [u8; 4]) -> u8 {
        address[3]
    }

    #[inline(always)]
    fn service<T: Tables>(tables: &T, address: [u8; 4], port: u16, protocol: u8) -> Option<u32> {
        tables.service_key_v4(&ServiceKeyV4 { address, port: port.to_ne_bytes(), protocol, reserved: 0 })
    }

    #[inline(always)]
    fn vip<T: Tables>(tables: &T, address: [u8; 4]) -> Option<Vip> {
        tables.vip_v4(&address)
    }

    #[inline(always)]
    fn rule<T: Tables>(tables: &T, set: u32, source: [u8; 4]) -> Option<u32> {
        tables.rule_v4(&RuleV4 { set, address: source })
    }

    #[inline(always)]
    fn source<T: Tables>(tables: &T, address: [u8; 4]) -> Option<u32> {
        tables.source_key_v4(&address)
    }

    #[inline(always)]
    fn source_bits(config: &crate::abi::Config) -> u64 {
        config.sources_v4.get()
    }

    #[inline(always)]
    fn words(s: [u8; 4], d: [u8; 4], mut each: impl FnMut(u64)) {
        each(u64::from_ne_bytes([s[0], s[1], s[2], s[3], d[0], d[1], d[2], d[3]]));
    }

    #[inline(always)]
    fn replace(sum: Sum, old: [u8; 4], new: [u8; 4]) -> Sum {
        sum.replace_u32(u32::from_ne_bytes(old), u32::from_ne_bytes(new))
    }

    #[inline(always)]
    fn rewrite(frame: &mut impl Frame, l3: usize, source: [u8; 4], destination: [u8; 4]) -> Option<()> {
        let ip: &mut Ipv4 = frame.at(l3)?;
        let ttl = ip.ttl.wrapping_sub(1);
        let sum =
            Self::replace(Self::replace(Sum::default(), ip.source, source), ip.destination, destination)
                .replace_u16(
                    u16::from_ne_bytes([ip.ttl, ip.protocol]),
                    u16::from_ne_bytes([ttl, ip.protocol]),
                );
        ip.checksum = sum.update(ip.checksum);
        ip.ttl = ttl;
        ip.source = source;
        ip.destination = destination;
        Some(())
    }

    #[inline(always)]
    fn write_header(
        frame: &mut impl Frame,
        l3: usize,
        source: [u8; 4],
        destination: [u8; 4],
    ) -> Option<usize> {
        use crate::wire::l4::Tcp;
        let length = (Ipv4::LEN + Tcp::LEN) as u16;
        let ip: &mut Ipv4 = frame.at(l3)?;
        *ip = Ipv4 {
            version_ihl: 0x45,
            tos: 0,
            total_length: length.to_be_bytes(),
            identification: [0; 2],
            fragment: [0x40, 0],
            ttl: TTL,
            protocol: crate::abi::TCP,
            checksum: [0; 2],
            source,
            destination,
        };
        let mut sum = Sum::default()
            .add_u16(u16::from_ne_bytes([0x45, 0]))
            .add_u16(length.to_be())
            .add_u16(u16::from_ne_bytes([0x40, 0]))
            .add_u16(u16::from_ne_bytes([TTL, crate::abi::TCP]));
        Self::words(source, destination, |word| sum = sum.add_u64(word));
        ip.checksum = sum.checksum();
        Some(l3 + Ipv4::LEN)
    }
}

impl Family for V6 {
    type Address = Address;
    const V6: bool = true;

    #[inline(always)]
    fn headers(frame: &impl Frame, l3: usize) -> Result<Headers<Address>, Odd<Address>> {
        ipv6(frame, l3)
    }

    #[inline(always)]
    fn widen(a: Address) -> [u64; 2] {
        [
            u64::from_ne_bytes([a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]]),
            u64::from_ne_bytes([a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]]),
        ]
    }

    #[inline(always)]
    fn narrow(address: &[Shared<u64>; 2]) -> Address {
        let [h, l] = [address[0].get().to_ne_bytes(), address[1].get().to_ne_bytes()];
        [h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7]]
    }

    #[inline(always)]
    fn last_byte(address: Address) -> u8 {
        address[15]
    }

    #[inline(always)]
    fn service<T: Tables>(tables: &T, address: Address, port: u16, protocol: u8) -> Option<u32> {
        tables.service_key_v6(&ServiceKeyV6 { address, port: port.to_ne_bytes(), protocol, reserved: 0 })
    }

    #[inline(always)]
    fn vip<T: Tables>(tables: &T, address: Address) -> Option<Vip> {
        tables.vip_v6(&address)
    }

    #[inline(always)]
    fn rule<T: Tables>(tables: &T, set: u32, source: Address) -> Option<u32> {
        tables.rule_v6(&RuleV6 { set, address: source })
    }

    #[inline(always)]
    fn source<T: Tables>(tables: &T, address: Address) -> Option<u32> {
        tables.source_key_v6(&address)
    }

    #[inline(always)]
    fn source_bits(config: &crate::abi::Config) -> u64 {
        config.sources_v6.get()
    }

    #[inline(always)]
    fn words(source: Address, destination: Address, mut each: impl FnMut(u64)) {
        let [s0, s1] = Self::widen(source);
        let [d0, d1] = Self::widen(destination);
        each(s0);
        each(s1);
        each(d0);
        each(d1);
    }

    #[inline(always)]
    fn replace(sum: Sum, old: Address, new: Address) -> Sum {
        let [old0, old1] = Self::widen(old);
        let [new0, new1] = Self::widen(new);
        sum.replace_u64(old0, new0).replace_u64(old1, new1)
    }

    #[inline(always)]
    fn rewrite(frame: &mut impl Frame, l3: usize, source: Address, destination: Address) -> Option<()> {
        let ip: &mut Ipv6 = frame.at(l3)?;
        ip.hop_limit = ip.hop_limit.wrapping_sub(1);
        ip.source = source;
        ip.destination = destination;
        Some(())
    }

    #[inline(always)]
    fn write_header(
        frame: &mut impl Frame,
        l3: usize,
        source: Address,
        destination: Address,
    ) -> Option<usize> {
        use crate::wire::l4::Tcp;
        let ip: &mut Ipv6 = frame.at(l3)?;
        *ip = Ipv6 {
            version_class_label: [0x60, 0, 0, 0],
            payload_length: (Tcp::LEN as u16).to_be_bytes(),
            next_header: crate::abi::TCP,
            hop_limit: TTL,
            source,
            destination,
        };
        Some(l3 + Ipv6::LEN)
    }
}
