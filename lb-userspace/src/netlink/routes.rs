//! Ways to many addresses at once. The kernel answers about a route within the call that asks, so questions go out by
//! the dozen, and nobody has to be woken for an answer.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{RouteNetlinkMessage, route::RouteMessage},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use super::{bits, route, surroundings::Route};

/// Questions in one call. Their answers have to fit the socket's buffer, with up to a page for each.
const AT_ONCE: usize = 32;

/// Enough for an answer.
const ANSWER_BYTES: usize = 8192;

/// A socket on which nobody else asks.
pub(super) struct Routes {
    socket: Socket,
    /// Number of the last question.
    last: u32,
}

impl Routes {
    /// Opens it in this thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, last: 0 })
    }

    /// The way to each of these, in their order, or the kernel's error number, positive. Keeps its thread busy: 100,000 take a
    /// few tenths of a second.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or does not answer.
    pub(super) fn to(&mut self, targets: &[IpAddr]) -> io::Result<Vec<Result<Route, i32>>> {
        let mut found = Vec::with_capacity(targets.len());
        for targets in targets.chunks(AT_ONCE) {
            self.ask(targets)?;
            for number in (1..=targets.len() as u32).map(|back| self.last.wrapping_add(back)) {
                found.push(self.answer(number)?);
            }
            self.last = self.last.wrapping_add(targets.len() as u32);
        }
        Ok(found)
    }

    /// Sends these questions, with the numbers behind the last.
    fn ask(&self, targets: &[IpAddr]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for (&target, back) in targets.iter().zip(1..) {
            let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(question(target)));
            message.header.flags = NLM_F_REQUEST;
            message.header.sequence_number = self.last.wrapping_add(back);
            message.finalize();
            let begin = bytes.len();
            // The next begins at a multiple of four (netlink(7), NLMSG_ALIGN).
            bytes.resize(begin + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut bytes[begin..]);
        }
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    /// The answer with that number; earlier ones are of nobody any more.
    fn answer(&self, number: u32) -> io::Result<Result<Route, i32>> {
        let mut bytes = Vec::with_capacity(ANSWER_BYTES);
        loop {
            bytes.clear();
            // It is there already, or has been lost.
            self.socket.recv(&mut bytes, libc::MSG_DONTWAIT)?;
            let message =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).map_err(io::Error::other)?;
            if message.header.sequence_number != number {
                continue;
            }
            let nowhere = Err(libc::ENETUNREACH);
            return Ok(match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message)) => {
                    route(&message).map_or(nowhere, Ok)
                }
                NetlinkPayload::Error(error) => Err(error.raw_code().abs()),
                _ => nowhere,
            });
        }
    }
}

fn question(target: IpAddr) -> RouteMessage {
    match target {
        IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(ip, bits(target)).build(),
        IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(ip, bits(target)).build(),
    }
}
