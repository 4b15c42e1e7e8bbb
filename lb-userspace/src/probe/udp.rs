//! One datagram there and one back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::UdpSocket;

use super::ProbeError;

/// The largest payload of a UDP datagram over IPv4.
const LARGEST: usize = 65507;

pub(super) async fn ask(target: SocketAddr, send: &[u8], expect: &[u8]) -> Result<(), ProbeError> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let connect = |error: std::io::Error| ProbeError::Connect(error.to_string());
    let broken = |error: std::io::Error| ProbeError::Broken(error.to_string());
    let socket = UdpSocket::bind((any, 0)).await.map_err(connect)?;
    // Connected, so that only the target's datagrams come in, and ICMP errors are reported.
    socket.connect(target).await.map_err(connect)?;
    socket.send(send).await.map_err(broken)?;
    let mut answer = vec![0; LARGEST];
    let length = socket.recv(&mut answer).await.map_err(broken)?;
    if answer[..length].starts_with(expect) { Ok(()) } else { Err(ProbeError::Unexpected) }
}
