//! What would become of a packet, and why: the same decision, on a copy of the live tables, watched while it
//! looks things up.

use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, SocketAddr},
};

use lb_common::{
    abi::{
        self, Action, Address, AddressV4, Flow, Listeners, NO_BACKEND, PAGE_SLOTS, Records, RingAt, RuleV4,
        RuleV6, Side, Slot, Source, Standing, State, TCP, Tick, Traffic, UDP, Vip,
    },
    datapath::{decide, flow, record, unsettled},
    shared::Shared,
    sim::{MemTables, SliceFrame},
    tables::Tables,
    verdict::{DropReason, Note, ResetReason, Verdict},
    wire::l4::Tcp,
};

use crate::{
    api::view::{Explanation, Question, Step},
    dataplane::{BackendEntry, FlowsOf, Tables as Held, duration_of},
    model::Scheduler,
};

/// What the words of an explanation need besides the tables themselves.
pub struct Names<'a> {
    /// What the tables are known to hold.
    pub held: &'a Held,
    /// The name of the service that listens somewhere.
    pub service: &'a dyn Fn(u32) -> String,
    /// Why nobody of a service's pool gets connections.
    pub nobody: &'a dyn Fn(u32) -> String,
    /// The name of an interface.
    pub interface: &'a dyn Fn(u32) -> String,
}

/// Says what becomes of a frame that came in by interface `ingress`. `tables` is a copy: it is changed as the
/// live ones would be.
pub fn explain(tables: &MemTables, names: &Names<'_>, frame: &[u8], ingress: u32, now: Tick) -> Explanation {
    let mut frame = SliceFrame(frame.to_vec());
    let before = frame.clone();
    let (said, seeks, used, found) = Default::default();
    let watched = Watched { tables, names, now, said, seeks, used, found };
    let verdict = decide(&mut frame, &watched, ingress, now);
    frame.settle(verdict);
    let last = watched.used.borrow_mut().take();
    if let Some(index) = last {
        watched.say("backend", backend(names, index));
    }
    if let Verdict::Reset { reason: ResetReason::UnknownFlow, .. } = verdict {
        watched.say("connection", "is not known: it has ended, timed out, or was never here".into());
    }
    if let Verdict::Reset { reason: ResetReason::NoBackend, .. } | Verdict::Drop(DropReason::NoBackend) =
        verdict
        && let Some(service) = watched.found.get()
    {
        watched.say("pool", (names.nobody)(service));
    }
    watched.say("outcome", outcome(verdict, &before, &frame, names));
    Explanation { verdict: verdict.name().into(), steps: watched.said.into_inner() }
}

/// The bytes that hexadecimal digits stand for.
///
/// # Errors
/// What is wrong with them.
pub fn bytes(hex: &str) -> Result<Vec<u8>, String> {
    let digit = |digit: u8| char::from(digit).to_digit(16);
    let byte = |pair: &[u8]| match *pair {
        [high, low] => u8::try_from(digit(high)? * 16 + digit(low)?).ok(),
        _ => None,
    };
    let bytes = hex.as_bytes().chunks(2).map(byte).collect::<Option<_>>();
    bytes.ok_or_else(|| "a frame is not an even number of hexadecimal digits".into())
}

/// The bytes of the packet that is asked about; checksums are of no account to the decision.
///
/// # Errors
/// What is wrong with the question.
pub fn frame(question: &Question) -> Result<Vec<u8>, String> {
    let (client, called) = (socket(&question.client)?, socket(&question.called)?);
    let flags = match question.flags.as_str() {
        "syn" => Tcp::SYN,
        "ack" => Tcp::ACK,
        "fin" => Tcp::FIN | Tcp::ACK,
        "rst" => Tcp::RST,
        other => return Err(format!("{other:?} is none of syn, ack, fin, rst")),
    };
    let (number, mut transport) = match question.protocol.as_str() {
        "tcp" => {
            let mut header = vec![0; Tcp::LEN];
            header[4..8].copy_from_slice(&question.sequence.to_be_bytes());
            header[12] = 5 << 4;
            header[13] = flags;
            (TCP, header)
        }
        "udp" => (UDP, vec![0, 0, 0, 0, 0, 8, 0, 0]),
        other => return Err(format!("{other:?} is neither tcp nor udp")),
    };
    transport[..2].copy_from_slice(&client.port().to_be_bytes());
    transport[2..4].copy_from_slice(&called.port().to_be_bytes());
    // Locally administered addresses that belong to nobody.
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let length = u16::try_from(transport.len()).unwrap_or(u16::MAX);
    match (client.ip(), called.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((length + 20).to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, number, 0, 0]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([number, 64]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        _ => return Err(format!("{client} and {called} are of different families")),
    }
    frame.extend(transport);
    Ok(frame)
}

fn socket(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text:?} is no address and port; write 198.51.100.7:40000, or [2001:db8::7]:40000")
    })
}

/// Tables that tell what is asked of them.
struct Watched<'a> {
    tables: &'a MemTables,
    names: &'a Names<'a>,
    now: Tick,
    said: RefCell<Vec<Step>>,
    /// Whether the table of listeners was asked, and no service has been found yet.
    seeks: Cell<bool>,
    /// The backend that was looked up last.
    used: RefCell<Option<u32>>,
    /// The service that was.
    found: Cell<Option<u32>>,
}

impl Watched<'_> {
    fn say(&self, what: &str, detail: String) {
        self.said.borrow_mut().push(Step { what: what.into(), detail });
    }

    fn say_vip(&self, vip: Option<Vip>) {
        if self.seeks.get() {
            self.say("service", "none listens on exactly that address and port".into());
        }
        self.say(
            "address",
            match vip {
                None => "no service has that address".into(),
                Some(vip) => {
                    let all = |word: u32, protocol: &str| match word.checked_sub(1) {
                        Some(index) => {
                            format!(", all other {protocol} ports lead to {}", (self.names.service)(index))
                        }
                        None => String::new(),
                    };
                    let shared = if vip.flags & Vip::SHARED != 0 { ", which the host has too" } else { "" };
                    format!("a service's{shared}{}{}", all(vip.any_tcp, "TCP"), all(vip.any_udp, "UDP"))
                }
            },
        );
    }

    fn say_rule(&self, action: Option<u32>) {
        let words = match action {
            Some(action) if action == Action::Allow as u32 => "the longest rule for this source allows it",
            Some(_) => "the longest rule for this source denies it",
            None => "no rule is for this source",
        };
        self.say("firewall", words.into());
    }

    /// What is written down of a connection.
    fn say_record(&self, hash: u64) {
        let found = unsettled::recorded(self.tables, hash);
        self.say(
            "record",
            match found {
                None => "the connection is not written down".into(),
                Some(record) => {
                    let state = match record.state() {
                        State::Datagrams => "datagrams",
                        State::HalfOpen => "half open",
                        State::Established => "established",
                        State::Closed => "closed",
                    };
                    let idle = duration_of(record.idle(self.now));
                    format!("{state}, to {}, last seen {idle:.0?} ago", address(self.names, record.backend()))
                }
            },
        );
    }
}

fn address(names: &Names<'_>, index: u32) -> String {
    match names.held.backends.get(&index) {
        _ if index == NO_BACKEND => "nobody".into(),
        None => format!("backend {index}, which is gone"),
        Some(BackendEntry { address: None, .. }) => "this host".into(),
        Some(BackendEntry { address: Some(ip), port: Some(port), .. }) => {
            SocketAddr::new(*ip, *port).to_string()
        }
        Some(BackendEntry { address: Some(ip), .. }) => ip.to_string(),
    }
}

fn backend(names: &Names<'_>, index: u32) -> String {
    let mut words = address(names, index);
    if let Some(entry) = names.held.backends.get(&index) {
        words += match entry.flows {
            FlowsOf::Keep => "",
            FlowsOf::Forget => "; its connections are forgotten",
            FlowsOf::Cut => "; its connections are being cut",
        };
        words += if entry.dead { "; believed dead" } else { "" };
        match entry.next_hop {
            Some(hop) => {
                let mac = super::snapshot::mac(hop.mac);
                words += &format!("; next hop {mac} on {}", (names.interface)(hop.interface));
            }
            None if entry.address.is_some() => words += "; no next hop is known",
            None => {}
        }
    }
    words
}

fn outcome(verdict: Verdict, before: &SliceFrame, after: &SliceFrame, names: &Names<'_>) -> String {
    let sent = |interface| {
        let changed =
            if before.0.get(14..) == after.0.get(14..) { "unchanged but for" } else { "translated, with" };
        // What is sent out has a whole head.
        let to = super::snapshot::mac(after.0.first_chunk().copied().unwrap_or_default());
        format!("sent out by {} to {to}, {changed} its MAC addresses", (names.interface)(interface))
    };
    let words = match verdict {
        Verdict::ToBackend { interface } | Verdict::ToClient { interface } => match ends(&after.0) {
            Some((source, destination)) => format!("{}: {source} to {destination}", sent(interface)),
            None => sent(interface),
        },
        Verdict::Reset { .. } => "answered by a reset".into(),
        Verdict::Pass(_) => "left to the host's own stack".into(),
        Verdict::Drop(_) => "dropped".into(),
    };
    format!("{}: {words}", verdict.name())
}

/// Source and destination of a frame of the usual form.
fn ends(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let port = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?));
    // Of other forms (a tag, options, extension headers) the ports would be elsewhere.
    Some(if frame.get(12..15)? == [8, 0, 0x45] {
        (SocketAddr::new(v4(26)?, port(34)?), SocketAddr::new(v4(30)?, port(36)?))
    } else if frame.get(12..14)? == [0x86, 0xdd] && matches!(*frame.get(20)?, TCP | UDP) {
        (SocketAddr::new(v6(22)?, port(54)?), SocketAddr::new(v6(38)?, port(56)?))
    } else {
        return None;
    })
}

impl Tables for Watched<'_> {
    fn config(&self) -> Option<&abi::Config> {
        self.tables.config()
    }
    fn listeners(&self, line: u32) -> Option<&Listeners> {
        self.seeks.set(true);
        self.tables.listeners(line)
    }
    fn vip_v4(&self, address: AddressV4) -> Option<Vip> {
        let vip = self.tables.vip_v4(address);
        self.say_vip(vip);
        vip
    }
    fn vip_v6(&self, address: Address) -> Option<Vip> {
        let vip = self.tables.vip_v6(address);
        self.say_vip(vip);
        vip
    }
    fn service(&self, index: u32) -> Option<&abi::Service> {
        if self.seeks.take() {
            self.say("service", (self.names.service)(index));
        }
        self.found.set(Some(index));
        self.tables.service(index)
    }
    fn rule_v4(&self, source: &RuleV4) -> Option<u32> {
        let action = self.tables.rule_v4(source);
        self.say_rule(action);
        action
    }
    fn rule_v6(&self, source: &RuleV6) -> Option<u32> {
        let action = self.tables.rule_v6(source);
        self.say_rule(action);
        action
    }
    fn slot(&self, page: u32, slot: usize) -> Option<Slot> {
        let found = self.tables.slot(page, slot)?;
        // Which ring of which service the page is of.
        let services = self.names.held.services.values();
        let mut rings = services.flat_map(|entry| [(&entry.ring, entry), (&entry.old_ring, entry)]);
        let found_in = rings.find(|(ring, _)| ring.pages().contains(&page));
        let RingAt { slots, first_page, .. } = found_in.map(|(ring, _)| ring.at()).unwrap_or_default();
        let number = (page - first_page) as usize * PAGE_SLOTS + slot;
        let settled = if found.is_settled() { "" } else { ", not settled" };
        let of_source = found_in.is_some_and(|(_, entry)| entry.mode.scheduler == Scheduler::Source);
        let alike = if of_source { ", as of all connections from this address" } else { "" };
        let to = address(self.names, found.backend());
        self.say("slot", format!("{number} of {slots}{settled}{alike}, leads to {to}"));
        Some(found)
    }
    fn side(&self, page: u32, slot: usize) -> Option<&Side> {
        let side = self.tables.side(page, slot)?;
        let Standing { before, fading, since } = Standing::from_word(side.standing.get());
        let ago = duration_of(self.now.since(since));
        let before = match before {
            Standing::BY_OLD_RING => "the backend in the ring of the size before".into(),
            before => address(self.names, before),
        };
        self.say(
            "phase",
            if fading {
                format!("fading for {ago:.0?}: what is not written down is the slot's own")
            } else {
                format!("moving for {ago:.0?}: what is not written down belongs to {before}")
            },
        );
        Some(side)
    }
    fn records(&self, line: u32) -> Option<&Records> {
        self.tables.records(line)
    }
    fn backend(&self, index: u32) -> Option<&abi::Backend> {
        *self.used.borrow_mut() = Some(index);
        self.tables.backend(index)
    }
    fn advance_cursor(&self, backend: u32, by: u64) -> Option<u64> {
        self.tables.advance_cursor(backend, by)
    }
    fn take_turn(&self, service: u32) -> Option<u64> {
        let turn = self.tables.take_turn(service)?;
        self.say("scheduler", "round robin: the next in turn".into());
        Some(turn)
    }
    fn source_key_v4(&self, address: AddressV4) -> Option<u32> {
        self.tables.source_key_v4(address)
    }
    fn source_key_v6(&self, address: Address) -> Option<u32> {
        self.tables.source_key_v6(address)
    }
    fn source(&self, index: u32) -> Option<&Source> {
        self.tables.source(index)
    }
    fn interface_mac(&self, interface: u32) -> Option<u64> {
        self.tables.interface_mac(interface)
    }
    fn flow(&self, index: u32) -> Option<&Flow> {
        self.tables.flow(index)
    }
    fn swap(&self, word: &Shared<u64>, old: u64, new: u64) -> bool {
        self.tables.swap(word, old, new)
    }
    fn search_ports(&self, lane: u64, ports: u64, now: u32) -> u64 {
        flow::search_ports(self, lane, ports, now)
    }
    fn take_way(&self, line: u32, now: u32) -> u64 {
        record::take_way(self, line, now)
    }
    fn choose_unsettled(&self, at: u64, hash: u64, asked: u64, sequence: u32, now: u32) -> u64 {
        self.say_record(hash);
        let chosen = unsettled::choose(self, at, hash, asked, sequence, now);
        if chosen as u32 == NO_BACKEND {
            // Who was looked at is not who it is.
            self.used.borrow_mut().take();
        }
        chosen
    }
    fn spend_reset(&self, now: Tick, per_second: u32) -> bool {
        self.tables.spend_reset(now, per_second)
    }
    fn count(&self, _: Verdict) {}
    fn note(&self, note: Note) {
        self.say(
            "record",
            match note {
                Note::Recorded => "the connection is written down".into(),
                Note::Adopted => {
                    "the connection is adopted: written down as its slot's backend's before".into()
                }
                Note::Refused => "there is no room to write it down".into(),
            },
        );
    }
    fn count_traffic(&self, backend: u32, more: Traffic) {
        let known = self.names.held.backends.get(&backend);
        let translated = known.and_then(|entry| self.names.held.services.get(&entry.service));
        if translated.is_some_and(|service| !service.mode.direct) && more.packets_out == 0 {
            let words =
                if more.flows > 0 { "new: a backend and a port are chosen for it" } else { "under way" };
            let said = self.said.borrow().iter().any(|step| step.what == "connection");
            if !said {
                self.say("connection", words.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits_are_bytes_or_are_refused() {
        assert_eq!(bytes("00fF7a").unwrap(), [0, 0xff, 0x7a]);
        assert!(bytes("").unwrap().is_empty());
        for wrong in ["0", "0g", "+1", "0x00", "é0"] {
            assert!(bytes(wrong).unwrap_err().contains("hexadecimal"), "{wrong}");
        }
    }
}
