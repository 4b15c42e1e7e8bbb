//! Both sides of a connection that is cut hear of it, though they say nothing themselves.
//!
//! The program answers each packet of such a connection with a reset, but who waits for an answer sends none. So each
//! side is sent a SYN as if it were the other's. In the middle of a connection an acknowledgment is the answer to
//! that, whatever its sequence number (the "challenge ACK" of RFC 5961 section 4, RFC 9293 section 3.10.7.4), and
//! that is a packet which the program resets, by the numbers that are in it. So nobody has to know them, nothing
//! of it is on the way of packets. Firewalls that follow connections let such a SYN by where the connection came in; where it
//! went out it is invalid to them (Linux' `nf_conntrack_proto_tcp`), and a client's must allow it.
//!
//! A call that is lost is made again. Who has heard takes the next one for a new connection: a client answers it with a reset,
//! which is dropped, and a server with a SYN-ACK, which is reset.

use std::{collections::BTreeMap, io, net::SocketAddr, time::Duration};

use etherparse::TcpHeader;
use socket2::{Domain, Socket, Type};
use tracing::warn;

use super::core::Core;
use crate::{
    dataplane::{Dataplane, FlowEntry, NextHop},
    packet,
};

/// From one try to the next. Linux answers one such call of a connection in half a second
/// (`tcp_invalid_ratelimit`); the later ones are for servers that could not be reached.
const PAUSES: [Duration; 7] = [
    Duration::from_millis(600),
    Duration::from_millis(1500),
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(30),
    Duration::from_secs(60),
    Duration::from_secs(120),
];

/// Connections at once; what is due besides waits for the loop's next turn.
const AT_ONCE: usize = 256;

/// A SYN to one side of a connection, as if it were the other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The way there.
    pub hop: NextHop,
    /// The VLAN that it is in.
    pub vlan: Option<u16>,
    /// Whose it seems to be.
    pub from: SocketAddr,
    /// Whom it is for.
    pub to: SocketAddr,
}

impl Call {
    /// The Ethernet frame.
    ///
    /// # Errors
    /// When the addresses are of two families.
    pub fn frame(&self) -> io::Result<Vec<u8>> {
        let tcp = TcpHeader { syn: true, window_size: 1024, ..TcpHeader::default() };
        let packet = packet::segment(self.from, self.to, tcp)?;
        // IEEE 802.1Q clause 9: the tag, if there is one, before the EtherType of what is inside.
        let tag = self.vlan.map(|id| [0x8100_u16.to_be_bytes(), id.to_be_bytes()].concat());
        let ethertype = packet::protocol(self.to.ip()).to_be_bytes();
        let tag = tag.unwrap_or_default();
        Ok([&self.hop.mac[..], &self.hop.own_mac, &tag, &ethertype, &packet].concat())
    }
}

/// Connections that are cut, until both sides should have heard.
#[derive(Default)]
pub struct Farewells {
    /// By when their next try is due, and a number that makes this unique.
    waiting: BTreeMap<(Duration, u64), (FlowEntry, usize)>,
    numbered: u64,
    socket: Option<Socket>,
}

impl Farewells {
    /// Takes up the connections that have been cut just now. Each asks for two resets, so they take turns that leave a
    /// third of those that may be sent to others.
    pub fn begin<D: Dataplane>(&mut self, core: &mut Core<D>, now: Duration) {
        let flows = match core.take_cut() {
            Ok(flows) => flows,
            Err(error) => return warn!("cannot look for connections that are cut: {error}"),
        };
        let each = Duration::from_secs(3) / core.resets_per_second().max(1);
        for (number, flow) in (0u32..).zip(flows) {
            self.wait(now + each.saturating_mul(number), flow, 0);
        }
    }

    fn wait(&mut self, due: Duration, flow: FlowEntry, tries: usize) {
        self.numbered += 1;
        self.waiting.insert((due, self.numbered), (flow, tries));
    }

    /// When the next is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.waiting.keys().next().map(|(due, _)| *due)
    }

    /// Calls who is due.
    pub fn call<D: Dataplane>(&mut self, core: &Core<D>, now: Duration) {
        for call in self.take_due(core, now) {
            if let Err(error) = self.send(&call) {
                // The next try may have more luck.
                warn!(to = %call.to, "a side of a connection that is cut cannot be told: {error}");
                return;
            }
        }
    }

    fn take_due<D: Dataplane>(&mut self, core: &Core<D>, now: Duration) -> Vec<Call> {
        let mut calls = Vec::new();
        for _ in 0..AT_ONCE {
            let Some(first) = self.waiting.first_entry().filter(|first| first.key().0 <= now) else { break };
            let (flow, tries) = first.remove();
            if !core.is_cut(&flow) {
                continue;
            }
            calls.extend(core.calls(&flow));
            if let Some(pause) = PAUSES.get(tries) {
                self.wait(now + *pause, flow, tries + 1);
            }
        }
        calls
    }

    fn send(&mut self, call: &Call) -> io::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => {
                // Of no protocol: it sees nothing.
                let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
                socket.set_nonblocking(true)?;
                self.socket.insert(socket)
            }
        };
        let to = packet::neighbour(call.hop.interface, call.hop.mac, call.to.ip());
        socket.send_to(&call.frame()?, &to)?;
        Ok(())
    }
}
