//! Packets, built and checked by etherparse: it knows nothing of Lobby's own headers and checksums.

use std::net::IpAddr;

use etherparse::{
    Ethernet2Header, Ipv4Header, Ipv4Options, Ipv6FlowLabel, Ipv6Header, Ipv6RawExtHeader, LinkExtHeader,
    LinkHeader, NetHeaders, PacketHeaders, PayloadSlice, SingleVlanHeader, TcpHeader, TransportHeader,
    UdpHeader, VlanId, ip_number,
};

/// MAC address of the balancer in packets made here.
pub const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// MAC address of the client's side.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A packet to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Who sends.
    pub source: (IpAddr, u16),
    /// Who is called.
    pub destination: (IpAddr, u16),
    /// MAC address of the sender.
    pub mac: [u8; 6],
    /// TCP control bits; `None`: UDP.
    pub tcp: Option<u8>,
    /// Sequence and acknowledgment numbers (TCP).
    pub numbers: (u32, u32),
    /// Payload.
    pub payload: Vec<u8>,
    /// TTL or hop limit.
    pub ttl: u8,
    /// VLAN identifier.
    pub vlan: Option<u16>,
    /// Bytes of IPv4 options, a multiple of four up to 40; or number of IPv6 extension headers, up to three.
    pub options: u8,
    /// UDP only: leave the checksum zero.
    pub no_checksum: bool,
}

/// TCP control bits.
pub mod flag {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;
}

impl Spec {
    /// A TCP packet with these control bits.
    pub fn tcp(source: (IpAddr, u16), destination: (IpAddr, u16), flags: u8) -> Self {
        Self {
            source,
            destination,
            mac: CLIENT_MAC,
            tcp: Some(flags),
            numbers: (1000, if flags & flag::ACK != 0 { 2000 } else { 0 }),
            payload: Vec::new(),
            ttl: 64,
            vlan: None,
            options: 0,
            no_checksum: false,
        }
    }

    /// A UDP packet.
    pub fn udp(source: (IpAddr, u16), destination: (IpAddr, u16)) -> Self {
        Self { tcp: None, payload: b"hello".to_vec(), ..Self::tcp(source, destination, 0) }
    }

    /// The same with another payload.
    pub fn with_payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// The frame.
    ///
    /// # Panics
    /// When the parts do not fit together: addresses of two families, too many options.
    pub fn build(&self) -> Vec<u8> {
        let mut transport = Vec::new();
        let protocol = self.write_transport(&mut transport);
        let mut frame = Vec::new();
        let ether_type = match self.destination.0 {
            IpAddr::V4(_) => etherparse::EtherType::IPV4,
            IpAddr::V6(_) => etherparse::EtherType::IPV6,
        };
        let outer = self.vlan.map_or(ether_type, |_| etherparse::EtherType::VLAN_TAGGED_FRAME);
        let ethernet = Ethernet2Header { source: self.mac, destination: OWN_MAC, ether_type: outer };
        ethernet.write(&mut frame).expect("a vector takes everything");
        if let Some(id) = self.vlan {
            let vlan_id = VlanId::try_new(id).expect("a VLAN identifier");
            let tag = SingleVlanHeader { vlan_id, ether_type, ..SingleVlanHeader::default() };
            frame.extend_from_slice(&tag.to_bytes());
        }
        self.write_network(&mut frame, protocol, transport.len());
        frame.extend_from_slice(&transport);
        frame
    }

    fn write_transport(&self, out: &mut Vec<u8>) -> etherparse::IpNumber {
        let (source, destination) = (self.source.1, self.destination.1);
        match self.tcp {
            Some(flags) => {
                let mut tcp = TcpHeader::new(source, destination, self.numbers.0, 4096);
                tcp.acknowledgment_number = self.numbers.1;
                tcp.fin = flags & flag::FIN != 0;
                tcp.syn = flags & flag::SYN != 0;
                tcp.rst = flags & flag::RST != 0;
                tcp.ack = flags & flag::ACK != 0;
                tcp.checksum = match (self.source.0, self.destination.0) {
                    (IpAddr::V4(s), IpAddr::V4(d)) => {
                        tcp.calc_checksum_ipv4_raw(s.octets(), d.octets(), &self.payload)
                    }
                    (IpAddr::V6(s), IpAddr::V6(d)) => {
                        tcp.calc_checksum_ipv6_raw(s.octets(), d.octets(), &self.payload)
                    }
                    _ => panic!("addresses of two families"),
                }
                .expect("a short payload");
                tcp.write(out).expect("a vector takes everything");
                out.extend_from_slice(&self.payload);
                ip_number::TCP
            }
            None => {
                let mut udp = match (self.source.0, self.destination.0) {
                    (IpAddr::V4(s), IpAddr::V4(d)) => {
                        let ip = Ipv4Header::new(0, 1, ip_number::UDP, s.octets(), d.octets());
                        let ip = ip.expect("no payload");
                        UdpHeader::with_ipv4_checksum(source, destination, &ip, &self.payload)
                    }
                    (IpAddr::V6(s), IpAddr::V6(d)) => {
                        let ip = Ipv6Header {
                            source: s.octets(),
                            destination: d.octets(),
                            ..Ipv6Header::default()
                        };
                        UdpHeader::with_ipv6_checksum(source, destination, &ip, &self.payload)
                    }
                    _ => panic!("addresses of two families"),
                }
                .expect("a short payload");
                if self.no_checksum {
                    udp.checksum = 0;
                }
                udp.write(out).expect("a vector takes everything");
                out.extend_from_slice(&self.payload);
                ip_number::UDP
            }
        }
    }

    fn write_network(&self, out: &mut Vec<u8>, protocol: etherparse::IpNumber, length: usize) {
        match (self.source.0, self.destination.0) {
            (IpAddr::V4(s), IpAddr::V4(d)) => {
                let length = u16::try_from(length).expect("a short payload");
                let mut ip =
                    Ipv4Header::new(length, self.ttl, protocol, s.octets(), d.octets()).expect("fits");
                // No operation (RFC 791 section 3.1), as often as asked.
                ip.options =
                    Ipv4Options::try_from(vec![1; usize::from(self.options)].as_slice()).expect("fits");
                ip.set_payload_len(usize::from(length)).expect("fits");
                ip.header_checksum = ip.calc_header_checksum();
                ip.write(out).expect("a vector takes everything");
            }
            (IpAddr::V6(s), IpAddr::V6(d)) => {
                // In the order that RFC 8200 section 4.1 recommends.
                let all = [
                    ip_number::IPV6_HEADER_HOP_BY_HOP,
                    ip_number::IPV6_DESTINATION_OPTIONS,
                    ip_number::IPV6_ROUTE_HEADER,
                ];
                let extensions = usize::from(self.options);
                let mut chain = all[..extensions].to_vec();
                chain.push(protocol);
                let next_header = chain[0];
                let ip = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: u16::try_from(length + 8 * extensions).expect("a short payload"),
                    next_header,
                    hop_limit: self.ttl,
                    source: s.octets(),
                    destination: d.octets(),
                };
                ip.write(out).expect("a vector takes everything");
                for &next in &chain[1..] {
                    // PadN over the whole header (RFC 8200 section 4.2); as a routing header, of a type that
                    // is not known, without segments left.
                    let option = Ipv6RawExtHeader::new_raw(next, &[1, 0, 0, 0, 0, 0]).expect("eight bytes");
                    option.write(out).expect("a vector takes everything");
                }
            }
            _ => panic!("addresses of two families"),
        }
    }
}

/// A frame as etherparse sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Source and destination MAC address.
    pub macs: ([u8; 6], [u8; 6]),
    /// VLAN identifier.
    pub vlan: Option<u16>,
    /// Source address and port.
    pub source: (IpAddr, u16),
    /// Destination address and port.
    pub destination: (IpAddr, u16),
    /// TTL or hop limit.
    pub ttl: u8,
    /// Control bits; `None`: UDP.
    pub tcp: Option<u8>,
    /// Sequence and acknowledgment numbers; zero for UDP.
    pub numbers: (u32, u32),
    /// Payload.
    pub payload: Vec<u8>,
    /// All checksums are right, or absent where they may be.
    pub checksums: bool,
}

/// Reads a frame.
///
/// # Errors
/// In words, when it is not TCP or UDP over IP.
pub fn read(frame: &[u8]) -> Result<Seen, String> {
    let headers = PacketHeaders::from_ethernet_slice(frame).map_err(|error| error.to_string())?;
    let Some(LinkHeader::Ethernet2(ethernet)) = &headers.link else { return Err("no Ethernet".into()) };
    let vlan = headers.link_exts.iter().find_map(|ext| match ext {
        LinkExtHeader::Vlan(tag) => Some(tag.vlan_id.value()),
        LinkExtHeader::Macsec(_) => None,
    });
    let payload = match headers.payload {
        PayloadSlice::Tcp(payload) | PayloadSlice::Udp(payload) => payload,
        other => return Err(format!("no transport payload: {other:?}")),
    };
    let (source, destination, ttl, ip_right) = match headers.net.as_ref() {
        Some(NetHeaders::Ipv4(ip, _)) => (
            IpAddr::from(ip.source),
            IpAddr::from(ip.destination),
            ip.time_to_live,
            ip.calc_header_checksum() == ip.header_checksum,
        ),
        Some(NetHeaders::Ipv6(ip, _)) => {
            (IpAddr::from(ip.source), IpAddr::from(ip.destination), ip.hop_limit, true)
        }
        _ => return Err("no IP".into()),
    };
    let net = headers.net.as_ref();
    let (ports, tcp, numbers, right) = match &headers.transport {
        Some(TransportHeader::Tcp(tcp)) => {
            let bits =
                [(tcp.fin, flag::FIN), (tcp.syn, flag::SYN), (tcp.rst, flag::RST), (tcp.ack, flag::ACK)];
            let flags = bits.iter().filter(|(set, _)| *set).fold(0, |flags, (_, flag)| flags | flag);
            let sum = match net {
                Some(NetHeaders::Ipv4(ip, _)) => tcp.calc_checksum_ipv4(ip, payload),
                Some(NetHeaders::Ipv6(ip, _)) => tcp.calc_checksum_ipv6(ip, payload),
                _ => return Err("no IP".into()),
            };
            let right = sum.map_err(|error| error.to_string())? == tcp.checksum;
            let numbers = (tcp.sequence_number, tcp.acknowledgment_number);
            ((tcp.source_port, tcp.destination_port), Some(flags), numbers, right)
        }
        Some(TransportHeader::Udp(udp)) => {
            let sum = match net {
                Some(NetHeaders::Ipv4(ip, _)) => udp.calc_checksum_ipv4(ip, payload),
                Some(NetHeaders::Ipv6(ip, _)) => udp.calc_checksum_ipv6(ip, payload),
                _ => return Err("no IP".into()),
            };
            let right = udp.checksum == 0 || sum.map_err(|error| error.to_string())? == udp.checksum;
            ((udp.source_port, udp.destination_port), None, (0, 0), right)
        }
        other => return Err(format!("not TCP or UDP: {other:?}")),
    };
    Ok(Seen {
        macs: (ethernet.source, ethernet.destination),
        vlan,
        source: (source, ports.0),
        destination: (destination, ports.1),
        ttl,
        tcp,
        numbers,
        payload: payload.to_vec(),
        checksums: ip_right && right,
    })
}
