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
            // What has been lost once, where somebody else used up the memory, is asked again.
            found.extend(self.some(targets).or_else(|_| self.some(targets))?);
        }
        Ok(found)
    }

    fn some(&mut self, targets: &[IpAddr]) -> io::Result<Vec<Result<Route, i32>>> {
        let numbers = (1..=targets.len() as u32).map(|number| self.last.wrapping_add(number));
        let numbers: Vec<_> = numbers.collect();
        // No number means two questions, whatever becomes of the first: an answer may be there still when its
        // question has been given up.
        self.last = numbers.last().copied().unwrap_or(self.last);
        self.ask(targets, &numbers)?;
        numbers.into_iter().map(|number| self.answer(number)).collect()
    }

    /// Sends these questions, with these numbers.
    fn ask(&self, targets: &[IpAddr], numbers: &[u32]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for (&target, &number) in targets.iter().zip(numbers) {
            let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(question(target)));
            message.header.flags = NLM_F_REQUEST;
            message.header.sequence_number = number;
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
            // The third word of the header (netlink(7)).
            if bytes.get(8..12) != Some(&number.to_ne_bytes()) {
                continue;
            }
            let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes) else {
                return Ok(Err(libc::EBADMSG));
            };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_is_its_question_s_also_after_one_was_given_up() {
        let local: Vec<IpAddr> = (1..=100).map(|last| IpAddr::from([127, 0, 0, last])).collect();
        let mut routes = Routes::open().unwrap();
        let found = routes.to(&local).unwrap();
        assert_eq!(found.len(), local.len());
        assert!(found.iter().all(|route| route.is_ok_and(|route| route.local)), "{found:?}");
        // On no host its own: RFC 5737.
        let elsewhere = IpAddr::from([203, 0, 113, 1]);
        let numbers: Vec<u32> = (1..=3).map(|number| routes.last + number).collect();
        routes.ask(&local[..3], &numbers).unwrap();
        routes.last += 3;
        let found = routes.to(&[elsewhere, local[0], elsewhere]).unwrap();
        let is_local: Vec<_> = found.iter().map(|route| route.is_ok_and(|route| route.local)).collect();
        assert_eq!(is_local, [false, true, false], "{found:?}");
        assert_eq!(routes.to(&[]).unwrap(), []);
    }
}
