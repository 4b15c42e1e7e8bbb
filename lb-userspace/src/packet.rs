//! What is sent and seen below the host's own stack: packet sockets (packet(7)), and TCP segments for them.

#![expect(unsafe_code, reason = "an address of the link layer is only known as bytes")]

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use etherparse::{PacketBuilder, TcpHeader};
use socket2::{SockAddr, SockAddrStorage};

const HOPS: u8 = 64;

/// A neighbour, and the interface by which it is reached. A socket that is bound to it sees what comes in by that
/// interface, of the protocol that packets to `ip` have.
pub fn neighbour(interface: u32, mac: [u8; 6], ip: IpAddr) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the storage is as large as any socket address, and zeroed; a `sockaddr_ll` is valid of any bytes.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol(ip).to_be();
    address.sll_ifindex = interface as i32;
    address.sll_halen = mac.len() as u8;
    address.sll_addr[..mac.len()].copy_from_slice(&mac);
    // SAFETY: a `sockaddr_ll` has just been written there.
    unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) }
}

/// The EtherType of packets to an address.
pub fn protocol(ip: IpAddr) -> u16 {
    (if ip.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 }) as u16
}

/// An IP packet with a segment without data; the ports in `tcp` do not matter.
///
/// # Errors
/// When the addresses are of two families.
pub fn segment(from: SocketAddr, to: SocketAddr, tcp: TcpHeader) -> io::Result<Vec<u8>> {
    let tcp = TcpHeader { source_port: from.port(), destination_port: to.port(), ..tcp };
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), HOPS),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), HOPS),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let mut packet = Vec::new();
    ip.tcp_header(tcp).write(&mut packet, &[]).map_err(io::Error::other)?;
    Ok(packet)
}
