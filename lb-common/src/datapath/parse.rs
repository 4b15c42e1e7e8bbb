//! From bytes to a packet. What addresses a service and cannot be read is a named drop, never passed:
//! the host's stack would answer for us.

use super::family::Family;
use crate::{
    abi::{TCP, UDP, Vip},
    tables::Tables,
    verdict::{DropReason, PassReason, Verdict},
    wire::{
        Frame,
        eth::Link,
        ip::{Extension, Ipv4, Ipv6, protocol},
        l4::{Tcp, Udp},
    },
};

/// A TCP segment or UDP datagram. Ports are in network order.
#[derive(Clone, Copy, Debug)]
pub struct Packet<V: Family> {
    /// Link layer.
    pub link: Link,
    /// Where the transport header begins.
    pub l4: usize,
    /// Length of transport header and data.
    pub l4_length: u16,
    /// Source address.
    pub source: V::Address,
    /// Destination address.
    pub destination: V::Address,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Control bits; zero for UDP.
    pub tcp_flags: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Only the first fragment of it.
    pub fragment: bool,
}

impl<V: Family> Packet<V> {
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
}

/// A packet that cannot be handled.
#[derive(Clone, Copy, Debug)]
pub enum Odd<A> {
    /// Not even its destination is known.
    Unreadable,
    /// For this destination, if a service has it; else it is not ours.
    To(A, Trouble),
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
    tables: &T,
) -> Result<Packet<V>, Verdict> {
    match read::<V>(frame, link) {
        Ok(packet) => Ok(packet),
        Err(Odd::Unreadable) => Err(PassReason::NotIp.into()),
        Err(Odd::To(destination, trouble)) => Err(of_trouble(V::vip(tables, destination), trouble)),
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

#[inline(always)]
fn read<V: Family>(frame: &impl Frame, link: Link) -> Result<Packet<V>, Odd<V::Address>> {
    let ip = V::headers(frame, link.l3)?;
    let odd = |trouble| Odd::To(ip.destination, trouble);
    let truncated = || odd(Trouble::Truncated);
    if ip.payload + ip.length as usize > frame.len() {
        return Err(truncated());
    }
    let packet = Packet {
        link,
        l4: ip.payload,
        l4_length: ip.length,
        source: ip.source,
        destination: ip.destination,
        source_port: 0,
        destination_port: 0,
        protocol: ip.protocol,
        tcp_flags: 0,
        ttl: ip.ttl,
        fragment: ip.first_fragment,
    };
    match ip.protocol {
        TCP => {
            if (ip.length as usize) < Tcp::LEN {
                return Err(truncated());
            }
            let tcp: Tcp = frame.read(ip.payload).ok_or_else(truncated)?;
            let header = ((tcp.offset >> 4) as u16) * 4;
            if (header as usize) < Tcp::LEN || header > ip.length {
                return Err(odd(Trouble::Malformed));
            }
            Ok(Packet {
                source_port: u16::from_ne_bytes(tcp.source),
                destination_port: u16::from_ne_bytes(tcp.destination),
                tcp_flags: tcp.flags,
                ..packet
            })
        }
        UDP => {
            if (ip.length as usize) < Udp::LEN {
                return Err(truncated());
            }
            let udp: Udp = frame.read(ip.payload).ok_or_else(truncated)?;
            // RFC 768: the length counts the header. A shorter datagram than the packet is allowed.
            let length = u16::from_be_bytes(udp.length);
            // The first of several fragments has the length of all.
            if (length as usize) < Udp::LEN || (length > ip.length && !ip.first_fragment) {
                return Err(odd(Trouble::Malformed));
            }
            Ok(Packet {
                source_port: u16::from_ne_bytes(udp.source),
                destination_port: u16::from_ne_bytes(udp.destination),
                ..packet
            })
        }
        protocol::ICMP | protocol::ICMPV6 => Err(odd(Trouble::Icmp)),
        _ => Err(odd(Trouble::UnknownProtocol)),
    }
}

/// Reads an IPv4 header (RFC 791), options skipped.
#[inline(always)]
pub(crate) fn ipv4(frame: &impl Frame, l3: usize) -> Result<Headers<[u8; 4]>, Odd<[u8; 4]>> {
    let ip: Ipv4 = frame.read(l3).ok_or(Odd::Unreadable)?;
    let odd = |trouble| Odd::To(ip.destination, trouble);
    let header = ((ip.version_ihl & 0x0f) as usize) * 4;
    let total = u16::from_be_bytes(ip.total_length);
    if ip.version_ihl >> 4 != 4 || header < Ipv4::LEN || (total as usize) < header {
        return Err(odd(Trouble::Malformed));
    }
    let fragment = u16::from_be_bytes(ip.fragment);
    if fragment & Ipv4::FRAGMENT_OFFSET != 0 {
        return Err(odd(Trouble::Fragment));
    }
    Ok(Headers {
        source: ip.source,
        destination: ip.destination,
        protocol: ip.protocol,
        ttl: ip.ttl,
        payload: l3 + header,
        length: total - header as u16,
        first_fragment: fragment & Ipv4::FRAGMENTED != 0,
    })
}

/// Extension headers that are followed before a packet counts as hostile. RFC 8200 section 4.1 lets a
/// reasonable one have four that may be skipped.
const EXTENSIONS: usize = 4;

/// Reads an IPv6 header (RFC 8200) and the extension headers that may be skipped.
#[inline(always)]
pub(crate) fn ipv6(frame: &impl Frame, l3: usize) -> Result<Headers<[u8; 16]>, Odd<[u8; 16]>> {
    let ip: Ipv6 = frame.read(l3).ok_or(Odd::Unreadable)?;
    let odd = |trouble| Odd::To(ip.destination, trouble);
    if ip.version_class_label[0] >> 4 != 6 {
        return Err(odd(Trouble::Malformed));
    }
    let mut next = ip.next_header;
    let mut payload = l3 + Ipv6::LEN;
    let mut length = u16::from_be_bytes(ip.payload_length);
    for _ in 0..EXTENSIONS {
        match next {
            protocol::HOP_BY_HOP | protocol::DESTINATION_OPTIONS | protocol::ROUTING => {}
            // Even an atomic fragment (RFC 6946): to be handled with the others.
            protocol::FRAGMENT => return Err(odd(Trouble::Fragment)),
            _ => break,
        }
        let extension: Extension = frame.read(payload).ok_or(odd(Trouble::Truncated))?;
        // Segments left: the packet is on its way elsewhere (RFC 8200 section 4.4).
        if next == protocol::ROUTING && extension.data[1] != 0 {
            return Err(odd(Trouble::UnknownProtocol));
        }
        let size = (extension.length as u16 + 1) * 8;
        if size > length {
            return Err(odd(Trouble::Truncated));
        }
        next = extension.next_header;
        payload += size as usize;
        length -= size;
    }
    Ok(Headers {
        source: ip.source,
        destination: ip.destination,
        protocol: next,
        ttl: ip.hop_limit,
        payload,
        length,
        first_fragment: false,
    })
}
