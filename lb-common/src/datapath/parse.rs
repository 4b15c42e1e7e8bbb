//! From bytes to a packet. What addresses a service and cannot be read is a named drop, never passed:
//! the host's stack would answer for us.

use super::family::Family;
use crate::{
    abi::{Address, AddressV4, Config, TCP, UDP, Vip},
    tables::Tables,
    verdict::{DropReason, PassReason, Verdict},
    wire::{
        Frame,
        eth::Link,
        ip::{Extension, Ipv4, Ipv6, protocol},
        l4::{Tcp, Udp},
        split,
    },
};

/// A TCP segment or UDP datagram.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet<V: Family> {
    /// What it is besides.
    pub shape: Shape,
    /// Source address.
    pub source: V::Address,
    /// Destination address.
    pub destination: V::Address,
    /// Source and destination port, as they lie in memory.
    pub ports: u32,
    /// Zero.
    pub reserved: u32,
}

/// What a packet is besides its addresses and ports, as one word.
///
/// In BPF it is a register, or eight aligned bytes of stack: there every access must be aligned, and the
/// compiler joins small neighbours into one. What else the datapath keeps on the stack is made of words for
/// the same reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape(u64);

/// What a [`Shape`] is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts {
    /// Where the network header begins.
    pub l3: u8,
    /// Where the transport header begins.
    pub l4: u8,
    /// Length of transport header and data.
    pub l4_length: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Control bits; zero for UDP.
    pub tcp_flags: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Only the first fragment of it.
    pub fragment: bool,
    /// There is a VLAN tag.
    pub tagged: bool,
}

impl Shape {
    /// Of these.
    #[inline(always)]
    pub const fn of(parts: Parts) -> Self {
        let Parts { l3, l4, l4_length, protocol, tcp_flags, ttl, fragment, tagged } = parts;
        Self(
            l3 as u64
                | (l4 as u64) << 8
                | (l4_length as u64) << 16
                | (protocol as u64) << 32
                | (tcp_flags as u64) << 40
                | (ttl as u64) << 48
                | (fragment as u64) << 56
                | (tagged as u64) << 57,
        )
    }

    /// The same. The verifier knows of each way through the parser where the headers are then, and would walk
    /// all that follows once for each; now it knows no more of one than of another.
    #[inline(always)]
    fn without_its_way(self, config: &Config) -> Self {
        Self(config.launder(self.0))
    }
}

impl<V: Family> Packet<V> {
    /// Where the network header begins.
    #[inline(always)]
    pub const fn l3(&self) -> u8 {
        self.shape.0 as u8
    }

    /// Where the transport header begins.
    #[inline(always)]
    pub const fn l4(&self) -> u8 {
        (self.shape.0 >> 8) as u8
    }

    /// Length of transport header and data.
    #[inline(always)]
    pub const fn l4_length(&self) -> u16 {
        (self.shape.0 >> 16) as u16
    }

    /// [`TCP`] or [`UDP`].
    #[inline(always)]
    pub const fn protocol(&self) -> u8 {
        (self.shape.0 >> 32) as u8
    }

    /// Control bits; zero for UDP.
    #[inline(always)]
    pub const fn tcp_flags(&self) -> u8 {
        (self.shape.0 >> 40) as u8
    }

    /// TTL or hop limit.
    #[inline(always)]
    pub const fn ttl(&self) -> u8 {
        (self.shape.0 >> 48) as u8
    }

    /// Whether it is only the first fragment of a packet.
    #[inline(always)]
    pub const fn fragment(&self) -> bool {
        self.shape.0 >> 56 & 1 != 0
    }

    /// Whether there is a VLAN tag.
    #[inline(always)]
    pub const fn tagged(&self) -> bool {
        self.shape.0 >> 57 & 1 != 0
    }

    /// Source port, network order.
    #[inline(always)]
    pub const fn source_port(&self) -> u16 {
        split(self.ports)[0]
    }

    /// Destination port, network order.
    #[inline(always)]
    pub const fn destination_port(&self) -> u16 {
        split(self.ports)[1]
    }

    /// Whether it asks for a new connection: SYN, and none of ACK, RST, FIN.
    #[inline(always)]
    pub const fn is_first(&self) -> bool {
        self.tcp_flags() & (Tcp::SYN | Tcp::ACK | Tcp::RST | Tcp::FIN) == Tcp::SYN
    }
}

/// What IP says of a packet.
///
/// Filled in rather than given back: with a place of its own the compiler keeps each field in a register, where
/// an `Option` of so many would be copied about in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Headers<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Protocol of the payload.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Where the payload begins.
    pub payload: usize,
    /// Its length.
    pub length: u16,
    /// It is the first fragment of several: the ports are there, the rest is not.
    pub first_fragment: bool,
    /// Why the payload cannot be read.
    pub trouble: Option<Trouble>,
}

/// What is wrong with a packet whose destination is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Shorter than it says, or than a header must be.
    Truncated,
    /// Contradicts itself.
    Malformed,
    /// Not the first fragment: no ports.
    Fragment,
    /// ICMP.
    Icmp,
    /// Another protocol.
    UnknownProtocol,
}

/// Reads a packet, or says what becomes of it.
#[inline(always)]
pub(crate) fn packet<V: Family, T: Tables>(
    frame: &impl Frame,
    link: Link,
    (tables, config): (&T, &Config),
    packet: &mut Packet<V>,
) -> Result<(), Verdict> {
    let mut ip = Headers::default();
    V::headers(frame, link.l3, &mut ip).ok_or(PassReason::NotIp)?;
    let read = match ip.trouble {
        None => transport(frame, link, &ip),
        Some(trouble) => Err(trouble),
    };
    match read {
        Ok((shape, ports)) => {
            packet.shape = shape.without_its_way(config);
            packet.source = ip.source;
            packet.destination = ip.destination;
            packet.ports = ports;
            Ok(())
        }
        Err(trouble) => Err(of_trouble(V::vip(tables, ip.destination), trouble)),
    }
}

/// What becomes of a packet that cannot be handled, given what is known of its destination.
///
/// Where the host has the address too, it keeps what no service could have been meant by: other
/// protocols, and later fragments, which do no harm there, since their first one never arrives if it
/// was for a service.
#[inline(always)]
fn of_trouble(vip: Option<Vip>, trouble: Trouble) -> Verdict {
    let Some(vip) = vip else { return PassReason::NotVip.into() };
    let shared = vip.flags & Vip::SHARED != 0;
    match trouble {
        Trouble::Icmp => PassReason::Icmp.into(),
        Trouble::UnknownProtocol | Trouble::Fragment if shared => PassReason::NoService.into(),
        Trouble::UnknownProtocol => DropReason::UnknownProtocol.into(),
        Trouble::Fragment => DropReason::Fragment.into(),
        Trouble::Truncated => DropReason::Truncated.into(),
        Trouble::Malformed => DropReason::Malformed.into(),
    }
}

/// Reads the transport's header: what the packet is, and its ports.
#[inline(always)]
fn transport<A>(frame: &impl Frame, link: Link, ip: &Headers<A>) -> Result<(Shape, u32), Trouble> {
    if ip.payload + usize::from(ip.length) > frame.len() {
        return Err(Trouble::Truncated);
    }
    let parts = Parts {
        // Within reach of the frame, or the header is not read below.
        l4: ip.payload as u8,
        l4_length: ip.length,
        l3: link.l3 as u8,
        protocol: ip.protocol,
        tcp_flags: 0,
        ttl: ip.ttl,
        fragment: ip.first_fragment,
        tagged: link.tagged,
    };
    let packet = |ports, tcp_flags| (Shape::of(Parts { tcp_flags, ..parts }), ports);
    match ip.protocol {
        TCP => {
            if usize::from(ip.length) < Tcp::LEN {
                return Err(Trouble::Truncated);
            }
            let tcp: Tcp = frame.read(ip.payload).ok_or(Trouble::Truncated)?;
            let header = u16::from(tcp.offset >> 4) * 4;
            if usize::from(header) < Tcp::LEN || header > ip.length {
                return Err(Trouble::Malformed);
            }
            Ok(packet(tcp.ports, tcp.flags))
        }
        UDP => {
            if usize::from(ip.length) < Udp::LEN {
                return Err(Trouble::Truncated);
            }
            let udp: Udp = frame.read(ip.payload).ok_or(Trouble::Truncated)?;
            // RFC 768: the length counts the header. A datagram shorter than the packet is allowed, and
            // the first of several fragments has the length of all.
            let length = u16::from_be(udp.length);
            if usize::from(length) < Udp::LEN || (length > ip.length && !ip.first_fragment) {
                return Err(Trouble::Malformed);
            }
            Ok(packet(udp.ports, 0))
        }
        protocol::ICMP | protocol::ICMPV6 => Err(Trouble::Icmp),
        _ => Err(Trouble::UnknownProtocol),
    }
}

/// Reads an IPv4 header (RFC 791), options skipped. `None`: not even the addresses are there.
#[inline(always)]
pub(crate) fn ipv4(frame: &impl Frame, l3: usize, headers: &mut Headers<AddressV4>) -> Option<()> {
    let ip: Ipv4 = frame.read(l3)?;
    let header = usize::from(ip.version_ihl & 0x0f) * 4;
    let total = u16::from_be(ip.total_length);
    let fragment = u16::from_be(ip.fragment);
    if ip.version_ihl >> 4 != 4 || header < Ipv4::LEN || usize::from(total) < header {
        headers.trouble = Some(Trouble::Malformed);
    } else if fragment & Ipv4::FRAGMENT_OFFSET != 0 {
        headers.trouble = Some(Trouble::Fragment);
    }
    headers.source = ip.source;
    headers.destination = ip.destination;
    headers.protocol = ip.protocol;
    headers.ttl = ip.ttl;
    headers.payload = l3 + header;
    headers.length = total.wrapping_sub(header as u16);
    headers.first_fragment = fragment & Ipv4::FRAGMENTED != 0;
    Some(())
}

/// Extension headers that are followed before a packet counts as hostile: there are but three kinds that
/// may be skipped, and RFC 8200 section 4.1 lets one of them stand twice.
const EXTENSIONS: usize = 4;

/// Reads an IPv6 header (RFC 8200) and the extension headers that may be skipped. `None`: not even the
/// addresses are there.
#[inline(always)]
pub(crate) fn ipv6(frame: &impl Frame, l3: usize, headers: &mut Headers<Address>) -> Option<()> {
    let ip: Ipv6 = frame.read(l3)?;
    headers.source = ip.source;
    headers.destination = ip.destination;
    headers.ttl = ip.hop_limit;
    let mut rest =
        Rest { payload: l3 + Ipv6::LEN, length: u16::from_be(ip.payload_length), protocol: ip.next_header };
    if u32::from_be(ip.version_class_label) >> 28 != 6 {
        headers.trouble = Some(Trouble::Malformed);
    } else if !matches!(rest.protocol, TCP | UDP | protocol::ICMPV6) {
        headers.trouble = skip_extensions(frame, &mut rest);
    }
    headers.payload = rest.payload;
    headers.length = rest.length;
    headers.protocol = rest.protocol;
    Some(())
}

/// What is left of an IPv6 packet behind the headers that have been read.
#[repr(C)]
struct Rest {
    /// Where it begins.
    payload: usize,
    length: u16,
    /// What it begins with.
    protocol: u8,
}

/// Goes past the extension headers that may be skipped.
///
/// A function of its own also in BPF: few packets have them.
#[inline(never)]
fn skip_extensions(frame: &impl Frame, rest: &mut Rest) -> Option<Trouble> {
    for _ in 0..EXTENSIONS {
        match rest.protocol {
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {}
            // Even an atomic fragment (RFC 6946): to be handled with the others.
            protocol::FRAGMENT => return Some(Trouble::Fragment),
            _ => break,
        }
        let Some(extension) = frame.read::<Extension>(rest.payload) else {
            return Some(Trouble::Truncated);
        };
        // Segments left: the packet is on its way elsewhere (RFC 8200 section 4.4).
        if rest.protocol == protocol::ROUTING && extension.data[1] != 0 {
            return Some(Trouble::UnknownProtocol);
        }
        let size = (u16::from(extension.length) + 1) * 8;
        if size > rest.length {
            return Some(Trouble::Truncated);
        }
        rest.protocol = extension.next_header;
        rest.payload += usize::from(size);
        rest.length -= size;
    }
    None
}
