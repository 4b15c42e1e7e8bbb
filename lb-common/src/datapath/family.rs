//! IPv4 and IPv6: where they differ, so that nothing else has to.

use super::parse::{Headers, ipv4, ipv6};
use crate::{
    abi::{Address, AddressV4, Config, RuleV4, RuleV6, Vip, mapped, unmapped},
    shared::Shared,
    tables::Tables,
    wire::{
        Frame,
        checksum::Sum,
        ip::{Ipv4, Ipv6},
    },
};

/// An IP version. Addresses are compared and summed as words; which words is said here.
pub trait Family: Copy + Default {
    /// An address, as words in memory order.
    type Address: Copy + PartialEq + Default;
    /// Whether it is IPv6.
    const V6: bool;

    /// Reads the headers down to the transport's. `None`: not even the addresses are there.
    fn headers(frame: &impl Frame, l3: usize, headers: &mut Headers<Self::Address>) -> Option<()>;

    /// The address as it is kept in the tables.
    fn widen(address: Self::Address) -> Address;
    /// The address, from the tables.
    fn narrow(address: &[Shared<u64>; 2]) -> Self::Address;
    /// The lowest six bits of its last byte.
    fn last_bits(address: Self::Address) -> u8;

    /// What is known of the address.
    fn vip<T: Tables>(tables: &T, address: Self::Address) -> Option<Vip>;
    /// The longest matching rule for a source.
    fn rule<T: Tables>(tables: &T, set: u32, source: Self::Address) -> Option<u32>;
    /// Index of the source with this address.
    fn source<T: Tables>(tables: &T, address: Self::Address) -> Option<u32>;
    /// Which last bytes (modulo 64) occur among the sources.
    fn source_bits(config: &Config) -> u64;

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
#[derive(Clone, Copy, Debug, Default)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, Default)]
pub struct V6;

/// TTL and hop limit of packets made here: the default of RFC 1700 and of Linux.
const TTL: u8 = 64;

/// The flag of the IPv4 header, network order.
const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();

impl Family for V4 {
    type Address = AddressV4;
    const V6: bool = false;

    #[inline(always)]
    fn headers(frame: &impl Frame, l3: usize, headers: &mut Headers<AddressV4>) -> Option<()> {
        ipv4(frame, l3, headers)
    }

    #[inline(always)]
    fn widen(address: AddressV4) -> Address {
        mapped(address)
    }

    #[inline(always)]
    fn narrow(address: &[Shared<u64>; 2]) -> AddressV4 {
        unmapped([0, address[1].get()])
    }

    #[inline(always)]
    fn last_bits(address: AddressV4) -> u8 {
        address.to_ne_bytes()[3] & 63
    }

    #[inline(always)]
    fn vip<T: Tables>(tables: &T, address: AddressV4) -> Option<Vip> {
        tables.vip_v4(address)
    }

    #[inline(always)]
    fn rule<T: Tables>(tables: &T, set: u32, source: AddressV4) -> Option<u32> {
        tables.rule_v4(&RuleV4 { set, address: source })
    }

    #[inline(always)]
    fn source<T: Tables>(tables: &T, address: AddressV4) -> Option<u32> {
        tables.source_key_v4(address)
    }

    #[inline(always)]
    fn source_bits(config: &Config) -> u64 {
        config.sources_v4.get()
    }

    #[inline(always)]
    fn words(source: AddressV4, destination: AddressV4, mut each: impl FnMut(u64)) {
        // As they follow one another in memory.
        each(u64::from(source) | u64::from(destination) << 32);
    }

    #[inline(always)]
    fn replace(sum: Sum, old: AddressV4, new: AddressV4) -> Sum {
        sum.replace_u32(old, new)
    }

    #[inline(always)]
    fn rewrite(frame: &mut impl Frame, l3: usize, source: AddressV4, destination: AddressV4) -> Option<()> {
        let ip: &mut Ipv4 = frame.at(l3)?;
        let ttl = ip.ttl.wrapping_sub(1);
        let sum = Sum::default()
            .replace_u32(ip.source, source)
            .replace_u32(ip.destination, destination)
            .replace_u16(u16::from_ne_bytes([ip.ttl, ip.protocol]), u16::from_ne_bytes([ttl, ip.protocol]));
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
        source: AddressV4,
        destination: AddressV4,
    ) -> Option<usize> {
        use crate::wire::l4::Tcp;
        let length = (Ipv4::LEN + Tcp::LEN) as u16;
        let ip: &mut Ipv4 = frame.at(l3)?;
        *ip = Ipv4 {
            version_ihl: 0x45,
            tos: 0,
            total_length: length.to_be(),
            identification: 0,
            fragment: DONT_FRAGMENT,
            ttl: TTL,
            protocol: crate::abi::TCP,
            checksum: 0,
            source,
            destination,
        };
        let mut sum = Sum::default()
            .add_u16(u16::from_ne_bytes([0x45, 0]))
            .add_u16(length.to_be())
            .add_u16(DONT_FRAGMENT)
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
    fn headers(frame: &impl Frame, l3: usize, headers: &mut Headers<Address>) -> Option<()> {
        ipv6(frame, l3, headers)
    }

    #[inline(always)]
    fn widen(address: Address) -> Address {
        address
    }

    #[inline(always)]
    fn narrow(address: &[Shared<u64>; 2]) -> Address {
        [address[0].get(), address[1].get()]
    }

    #[inline(always)]
    fn last_bits(address: Address) -> u8 {
        address[1].to_ne_bytes()[7] & 63
    }

    #[inline(always)]
    fn vip<T: Tables>(tables: &T, address: Address) -> Option<Vip> {
        tables.vip_v6(address)
    }

    #[inline(always)]
    fn rule<T: Tables>(tables: &T, set: u32, source: Address) -> Option<u32> {
        tables.rule_v6(&RuleV6 { set, address: source })
    }

    #[inline(always)]
    fn source<T: Tables>(tables: &T, address: Address) -> Option<u32> {
        tables.source_key_v6(address)
    }

    #[inline(always)]
    fn source_bits(config: &Config) -> u64 {
        config.sources_v6.get()
    }

    #[inline(always)]
    fn words([s0, s1]: Address, [d0, d1]: Address, mut each: impl FnMut(u64)) {
        each(s0);
        each(s1);
        each(d0);
        each(d1);
    }

    #[inline(always)]
    fn replace(sum: Sum, [old0, old1]: Address, [new0, new1]: Address) -> Sum {
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
            version_class_label: 0x6000_0000_u32.to_be(),
            payload_length: (Tcp::LEN as u16).to_be(),
            next_header: crate::abi::TCP,
            hop_limit: TTL,
            source,
            destination,
        };
        Some(l3 + Ipv6::LEN)
    }
}
