//! From bytes to a packet. What addresses a service and cannot be read is a named drop, never passed:
//! the host's stack would answer for us.

use super::family::Family;
use crate::{
    abi::{Address, AddressV4, TCP, UDP, Vip},
    tables::Tables,
    verdict::{DropReason, PassReason, Verdict},
    wire::{
        Frame,
        eth::Link,
        ip::{Extension, Ipv4, Ipv6, protocol},
        join, join4,
        l4::{Tcp, Udp},
        split,
    },
};

/// A TCP segment or UDP datagram.
///
/// On a BPF stack every access must be aligned, and the compiler joins neighbours into one: so fields
/// stand where any pair of them is aligned. The same goes for what else the datapath keeps there.
///
/// As long as a multiple of eight: it is cleared by words then, not byte by byte.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet<V: Family> {
    /// Source address.
    pub source: V::Address,
    /// Destination address.
    pub destination: V::Address,
    /// Source and destination port, as they lie in memory.
    pub ports: u32,
    /// Length of transport header and data.
    pub l4_length: u16,
    /// Where the network header begins.
    pub l3: u8,
    /// Where the transport header begins.
    pub l4: u8,
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

impl<V: Family> Packet<V> {
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
        self.tcp_flags & (Tcp::SYN | Tcp::ACK | Tcp::RST | Tcp::FIN) == Tcp::SYN
    }
}

/// What IP says of a packet.
#[derive(Clone, Copy, Debug)]
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
#[inline(never)]
pub(crate) fn packet<V: Family, T: Tables>(
    frame: &impl Frame,
    tables: &T,
    packet: &mut Packet<V>,
) -> Result<(), Verdict> {
    let link = Link::parse(frame).ok_or(PassReason::NotIp)?;
    let ip = V::headers(frame, link.l3).ok_or(PassReason::NotIp)?;
    let read = match ip.trouble {
        None => transport(frame, link, ip),
        Some(trouble) => Err(trouble),
    };
    match read {
        Ok(read) => *packet = forget_the_way(read, tables),
        Err(trouble) => return Err(of_trouble(V::vip(tables, ip.destination), trouble)),
    }
    Ok(())
}

/// The same packet. The verifier knows of each way through the parser where the headers are then, and
/// would walk all that follows once for each; now it knows no more of one than of another.
#[inline(always)]
fn forget_the_way<V: Family>(packet: Packet<V>, tables: &impl Tables) -> Packet<V> {
    let Packet { l3, l4, l4_length, protocol, tcp_flags, fragment, tagged, .. } = packet;
    let shape = tables.launder(
        u64::from(l3)
            | u64::from(protocol) << 8
            | u64::from(l4_length) << 16
            | u64::from(l4) << 32
            | u64::from(tcp_flags) << 40
            | u64::from(fragment) << 48
            | u64::from(tagged) << 49,
    );
    Packet {
        l3: shape as u8,
        protocol: (shape >> 8) as u8,
        l4_length: (shape >> 16) as u16,
        l4: (shape >> 32) as u8,
        tcp_flags: (shape >> 40) as u8,
        fragment: shape >> 48 & 1 != 0,
        tagged: shape >> 49 & 1 != 0,
        ..packet
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

/// Reads the transport's header.
#[inline(always)]
fn transport<V: Family>(
    frame: &impl Frame,
    link: Link,
    ip: Headers<V::Address>,
) -> Result<Packet<V>, Trouble> {
    if ip.payload + usize::from(ip.length) > frame.len() {
        return Err(Trouble::Truncated);
    }
    let packet = Packet {
        source: ip.source,
        destination: ip.destination,
        ports: 0,
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
            Ok(Packet { ports: join([tcp.source, tcp.destination]), tcp_flags: tcp.flags, ..packet })
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
            Ok(Packet { ports: join([udp.source, udp.destination]), ..packet })
        }
        protocol::ICMP | protocol::ICMPV6 => Err(Trouble::Icmp),
        _ => Err(Trouble::UnknownProtocol),
    }
}

/// Reads an IPv4 header (RFC 791), options skipped. `None`: not even the addresses are there.
#[inline(always)]
pub(crate) fn ipv4(frame: &impl Frame, l3: usize) -> Option<Headers<AddressV4>> {
    let ip: Ipv4 = frame.read(l3)?;
    let header = usize::from(ip.version_ihl & 0x0f) * 4;
    let total = u16::from_be(ip.total_length);
    let fragment = u16::from_be(ip.fragment);
    let trouble = if ip.version_ihl >> 4 != 4 || header < Ipv4::LEN || usize::from(total) < header {
        Some(Trouble::Malformed)
    } else if fragment & Ipv4::FRAGMENT_OFFSET != 0 {
        Some(Trouble::Fragment)
    } else {
        None
    };
    Some(Headers {
        source: join(ip.source),
        destination: join(ip.destination),
        protocol: ip.protocol,
        ttl: ip.ttl,
        payload: l3 + header,
        length: total.wrapping_sub(header as u16),
        first_fragment: fragment & Ipv4::FRAGMENTED != 0,
        trouble,
    })
}

#[inline(always)]
const fn address_v6([a, b, c, d, e, f, g, h]: [u16; 8]) -> Address {
    [join4([a, b, c, d]), join4([e, f, g, h])]
}

/// Extension headers that are followed before a packet counts as hostile: there are but three kinds that
/// may be skipped, and RFC 8200 section 4.1 lets one of them stand twice.
const EXTENSIONS: usize = 4;

/// Reads an IPv6 header (RFC 8200) and the extension headers that may be skipped. `None`: not even the
/// addresses are there.
#[inline(always)]
pub(crate) fn ipv6(frame: &impl Frame, l3: usize) -> Option<Headers<Address>> {
    let ip: Ipv6 = frame.read(l3)?;
    let mut headers = Headers {
        source: address_v6(ip.source),
        destination: address_v6(ip.destination),
        protocol: ip.next_header,
        ttl: ip.hop_limit,
        payload: l3 + Ipv6::LEN,
        length: u16::from_be(ip.payload_length),
        first_fragment: false,
        trouble: None,
    };
    if u16::from_be(ip.version_class_label[0]) >> 12 != 6 {
        headers.trouble = Some(Trouble::Malformed);
        return Some(headers);
    }
    for _ in 0..EXTENSIONS {
        match headers.protocol {
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {}
            protocol::FRAGMENT => {
                // Even an atomic fragment (RFC 6946): to be handled with the others.
                headers.trouble = Some(Trouble::Fragment);
                break;
            }
            _ => break,
        }
        let Some(extension) = frame.read::<Extension>(headers.payload) else {
            headers.trouble = Some(Trouble::Truncated);
            break;
        };
        // Segments left: the packet is on its way elsewhere (RFC 8200 section 4.4).
        if headers.protocol == protocol::ROUTING && extension.data[1] != 0 {
            headers.trouble = Some(Trouble::UnknownProtocol);
            break;
        }
        let size = (u16::from(extension.length) + 1) * 8;
        if size > headers.length {
            headers.trouble = Some(Trouble::Truncated);
            break;
        }
        headers.protocol = extension.next_header;
        headers.payload += usize::from(size);
        headers.length -= size;
    }
    Some(headers)
}
