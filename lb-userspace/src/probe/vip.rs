//! Whether a backend answers for a service's address, as in direct server return it must: a SYN to that address,
//! sent by way of the backend, and the SYN-ACK that comes back.
//!
//! A connection of the host's own would never reach the backend, since the address is this host's as well, and
//! what comes back from there would be taken for a forgery ("martian"). So the packets are sent and seen below the
//! host's stack, by a packet socket (packet(7)) that a filter lets see this one connection only.

#![expect(unsafe_code, reason = "who registers a socket must promise to keep it open")]

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher as _,
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use etherparse::{IpHeaders, TcpHeader};
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};

use super::ProbeError;
use crate::{dataplane::NextHop, packet};

/// The way by which a backend is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Its next hop, which is itself.
    pub hop: NextHop,
    /// The address of ours that it is called from.
    pub source: IpAddr,
}

/// From one SYN to the next.
const AGAIN: Duration = Duration::from_millis(300);
const WINDOW: u16 = 1024;

/// Waits until the backend at the end of this way has answered for `vip`.
///
/// # Errors
/// It refuses, or packets cannot be sent. Silence has to be ended by the caller.
pub async fn ask(way: Way, vip: SocketAddr) -> Result<(), ProbeError> {
    let failed =
        |error: io::Error| ProbeError::Impossible(format!("cannot ask below the host's stack: {error}"));
    let connection = Connection::new(way, vip).map_err(failed)?;
    let asked = connection.ask().await.map_err(failed)?;
    if asked { Ok(()) } else { Err(ProbeError::Connect(format!("it refuses connections to {vip}"))) }
}

/// One connection attempt.
struct Connection {
    /// Never listens nor connects: holds the port, so that nobody else on this host uses it.
    _holder: Socket,
    wire: AsyncFd<Socket>,
    to: SockAddr,
    from: SocketAddr,
    vip: SocketAddr,
    sequence: u32,
}

impl Connection {
    fn new(way: Way, vip: SocketAddr) -> io::Result<Self> {
        let holder = Socket::new(Domain::for_address(vip), Type::STREAM, Some(Protocol::TCP))?;
        holder.bind(&SocketAddr::new(way.source, 0).into())?;
        let from = holder.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;

        // Without a protocol it sees nothing until it is bound, and by then it has its filter.
        let wire = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
        wire.set_nonblocking(true)?;
        wire.attach_filter(&filter(vip, from))?;
        let to = packet::neighbour(way.hop.interface, way.hop.mac, vip.ip());
        wire.bind(&to)?;
        let sequence = RandomState::new().hash_one(from) as u32;
        // SAFETY: a socket has one descriptor, and keeps it until it is dropped.
        let wire = unsafe { AsyncFd::register(wire) }?;
        Ok(Self { _holder: holder, wire, to, from, vip, sequence })
    }

    /// Whether the connection is accepted.
    async fn ask(&self) -> io::Result<bool> {
        loop {
            self.send(|tcp| {
                tcp.syn = true;
                tcp.sequence_number = self.sequence;
            })?;
            if let Ok(answer) = tokio::time::timeout(AGAIN, self.answer()).await {
                return answer;
            }
        }
    }

    async fn answer(&self) -> io::Result<bool> {
        let expected = self.sequence.wrapping_add(1);
        let mut buffer = [0; 2048];
        loop {
            let length = self.wire.async_io(Interest::READABLE, |mut wire| wire.read(&mut buffer)).await?;
            let Some(tcp) = transport(&buffer[..length]) else { continue };
            if !tcp.ack || tcp.acknowledgment_number != expected {
                continue;
            }
            if tcp.rst {
                return Ok(false);
            }
            if tcp.syn {
                // It need not wait for a third packet that will never come.
                self.send(|tcp| {
                    tcp.rst = true;
                    tcp.sequence_number = expected;
                })?;
                return Ok(true);
            }
        }
    }

    /// Sends a segment without data.
    fn send(&self, say: impl FnOnce(&mut TcpHeader)) -> io::Result<()> {
        let mut tcp = TcpHeader { window_size: WINDOW, ..TcpHeader::default() };
        say(&mut tcp);
        let packet = packet::segment(self.from, self.vip, tcp)?;
        self.wire.get_ref().send_to(&packet, &self.to)?;
        Ok(())
    }
}

/// The segment's header, of what may be anything.
fn transport(packet: &[u8]) -> Option<TcpHeader> {
    let (_, payload) = IpHeaders::from_slice(packet).ok()?;
    let (tcp, _) = TcpHeader::from_slice(payload.payload).ok()?;
    Some(tcp)
}

/// Lets TCP segments from `vip` to `ours` pass, and nothing else (classic BPF, over what follows the link layer).
fn filter(vip: SocketAddr, ours: SocketAddr) -> Vec<SockFilter> {
    let (words, protocol): (Vec<(u32, u32)>, u32) = match (vip.ip(), ours.ip()) {
        (IpAddr::V4(vip), IpAddr::V4(ours)) => (vec![(12, vip.into()), (16, ours.into())], 9),
        (vip, ours) => {
            let octets = |ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let both = [octets(vip), octets(ours)].concat();
            let words = both.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
            ((8..).step_by(4).zip(words).collect(), 6)
        }
    };
    let code = |code: u32| code as u16;
    let load = |size: u32, at: u32| SockFilter::new(code(libc::BPF_LD | size | libc::BPF_ABS), 0, 0, at);
    // What is to be looked at, and what it must be.
    let mut checks = vec![(load(libc::BPF_B, protocol), u32::from(lb_common::abi::TCP))];
    checks.extend(words.into_iter().map(|(at, word)| (load(libc::BPF_W, at), word)));
    let indexed = |at: u32| SockFilter::new(code(libc::BPF_LD | libc::BPF_H | libc::BPF_IND), 0, 0, at);
    checks.push((indexed(0), vip.port().into()));
    checks.push((indexed(2), ours.port().into()));
    // The index register is where the segment begins.
    let start = if vip.is_ipv4() {
        SockFilter::new(code(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH), 0, 0, 0)
    } else {
        SockFilter::new(code(libc::BPF_LDX | libc::BPF_IMM), 0, 0, 40)
    };
    let mut program = vec![start];
    let mut left = checks.len();
    for (look, value) in checks {
        left -= 1;
        program.push(look);
        // Over the remaining checks, two instructions each, and over what lets it pass.
        let no = (2 * left + 1) as u8;
        program.push(SockFilter::new(code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K), 0, no, value));
    }
    for length in [u32::MAX, 0] {
        program.push(SockFilter::new(code(libc::BPF_RET | libc::BPF_K), 0, 0, length));
    }
    program
}
