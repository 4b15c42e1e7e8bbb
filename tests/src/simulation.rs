//! Connections that live through changes of their backends, and how many of them break.
//!
//! The decision is the program's own, and so is the planner; clients, servers and time are played. A
//! connection is **broken** if a packet of it, once it is established, does not reach its own server while
//! that lives and is in the document: its own is the one whose answer to the SYN the client took first.
//!
//! A run is played again by its seed (`LOBBY_SEED`). The number of connections is small enough for every
//! day; `LOBBY_CONNECTIONS=250000` is for a thorough run. What clients do depends on the seed and on the
//! answers that they get, on nothing else, so that other ways to balance ([`rivals`]) are measured by the
//! same clients.
//!
//! Each packet is watched ([`watch`]): what must hold of records and slots holds, whatever becomes of the
//! connection. And the simulation itself is tested: with a rule left out ([`fault`]) connections break.
//!
//! What is known to break is not played, but for health that takes the living for dead: connections silent
//! for longer than the idle time-out, and SYNs with the ends of a connection in its handshake or at its end.

pub mod client;
pub mod fault;
pub mod fleet;
pub mod lobby;
pub mod packet;
pub mod rivals;
pub mod scenario;
pub mod watch;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use lb_common::wire::l4::Tcp;

use self::{
    client::{Connection, Phase},
    fleet::Fleet,
    packet::{Client, Packet},
    scenario::{FIRST, Scenario, Script},
};
use crate::random::Random;

/// A second of the time that is played, in nanoseconds.
pub const SECOND: u64 = 1_000_000_000;
/// A millisecond.
pub const MILLISECOND: u64 = 1_000_000;
/// New connections a second, beside those between ends that are used again.
const PER_SECOND: u64 = 60;
/// When the time begins: not at zero, where everything would seem to have happened just now.
const BEGIN: u64 = 1000 * SECOND;

/// What sends packets to servers.
pub trait Balancer {
    /// The server that a packet goes to; `None`: to none.
    fn forward(&mut self, packet: &Packet, now: u64) -> Option<usize>;
    /// Servers are to be used otherwise from now on. When there is work to do: at once is `now`.
    fn change(&mut self, fleet: &Fleet, now: u64) -> Option<u64>;
    /// Does the next bit of its work, and says when the one after it is due.
    fn work(&mut self, fleet: &Fleet, now: u64) -> Option<u64>;
}

/// What became of the connections of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Connections that clients began.
    pub begun: u64,
    /// Those that got an answer.
    pub established: u64,
    /// Those that were broken although their server lived.
    pub broken: u64,
    /// Those that ended with their server.
    pub bereft: u64,
    /// Packets of clients.
    pub packets: u64,
    /// Changes of the servers.
    pub changes: u64,
    /// For the first broken connections, when, and what happened.
    pub examples: Vec<String>,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A new client calls.
    Arrive,
    /// A client calls for the n-th time.
    Call(u32, u8),
    /// A server's answer reaches the client.
    Answer { connection: u32, server: u8, life: u32 },
    /// The last packet of the handshake.
    Acknowledge(u32),
    /// A client says something.
    Speak(u32),
    /// What a client sends after its FIN.
    Last(u32),
    /// Another connection between the same ends.
    Again(u32),
    /// Servers change.
    Change,
    /// The balancer works.
    Work,
    /// A SYN of nobody.
    Flood,
}

/// Plays so many connections of a scenario.
pub fn play(scenario: &Scenario, balancer: &mut impl Balancer, seed: u64, connections: u64) -> Outcome {
    let mut fleet = Fleet::new(12, 4, 1021);
    let work = balancer.change(&fleet, BEGIN);
    let mut play = Play {
        scenario: *scenario,
        seed,
        connections,
        outcome: Outcome::default(),
        random: Random::new(seed),
        events: BinaryHeap::new(),
        count: 0,
        now: BEGIN,
        work_at: None,
        clients: Vec::new(),
        living: 0,
    };
    play.plan_work(work);
    // The tables are ready before the first client calls.
    play.at(BEGIN + 5 * SECOND, Event::Arrive);
    play.at(BEGIN + FIRST, Event::Change);
    if scenario.flood > 0 {
        play.at(BEGIN + FIRST, Event::Flood);
    }
    let mut script = Script::new(scenario.changes, seed);
    while let Some(Reverse((now, _, event))) = play.events.pop() {
        play.now = now;
        if play.outcome.begun >= connections && play.living == 0 {
            break;
        }
        play.happen(event, balancer, &mut fleet, &mut script);
    }
    play.outcome
}

struct Play {
    scenario: Scenario,
    seed: u64,
    connections: u64,
    outcome: Outcome,
    random: Random,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    count: u64,
    now: u64,
    work_at: Option<u64>,
    clients: Vec<Connection>,
    /// Connections that have not ended.
    living: u64,
}

impl Play {
    fn at(&mut self, time: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((time, self.count, event)));
    }

    fn plan_work(&mut self, time: Option<u64>) {
        if let Some(time) = time
            && self.work_at.is_none_or(|at| time < at)
        {
            self.work_at = Some(time);
            self.at(time, Event::Work);
        }
    }

    fn happen(&mut self, event: Event, balancer: &mut impl Balancer, fleet: &mut Fleet, script: &mut Script) {
        match event {
            Event::Arrive => {
                if self.outcome.begun < self.connections {
                    let number = self.clients.len() as u32;
                    let client = Client(0x0b00_0000 + number / 50_000, 1024 + (number % 50_000) as u16);
                    self.begin(client);
                    let gap = self.random.below(2 * SECOND / PER_SECOND);
                    self.at(self.now + gap, Event::Arrive);
                }
            }
            Event::Call(connection, attempt) => self.call(connection, attempt, balancer, fleet),
            Event::Answer { connection, server, life } => {
                let it = &mut self.clients[connection as usize];
                if it.phase == Phase::Calling && fleet.holds(server.into(), life) {
                    it.phase = Phase::Open;
                    (it.server, it.life) = (server.into(), life);
                    fleet.servers[it.server].connections += 1;
                    self.outcome.established += 1;
                    let (acknowledges, speaks) = it.begin_to_speak(&self.scenario, self.now);
                    if !self.scenario.datagrams {
                        self.at(acknowledges, Event::Acknowledge(connection));
                    }
                    self.at(speaks, Event::Speak(connection));
                }
            }
            Event::Acknowledge(connection) => {
                let sequence = self.clients[connection as usize].first_sequence.wrapping_add(1);
                self.send(connection, Tcp::ACK, sequence, balancer, fleet);
            }
            Event::Speak(connection) => self.speak(connection, balancer, fleet),
            Event::Last(connection) => {
                let sequence = self.clients[connection as usize].sequence();
                self.send(connection, Tcp::ACK, sequence, balancer, fleet);
                self.last(connection, fleet);
            }
            Event::Again(connection) => {
                if self.outcome.begun < self.connections {
                    self.begin(self.clients[connection as usize].client);
                }
            }
            Event::Change => {
                let wait = script.act(fleet);
                self.outcome.changes += 1;
                let work = balancer.change(fleet, self.now);
                self.plan_work(work);
                self.at(self.now + wait * SECOND, Event::Change);
            }
            Event::Work => {
                if self.work_at == Some(self.now) {
                    self.work_at = None;
                    let next = balancer.work(fleet, self.now);
                    self.plan_work(next);
                }
            }
            Event::Flood => {
                self.flood(balancer);
                if self.outcome.begun < self.connections {
                    self.at(self.now + SECOND / self.scenario.flood, Event::Flood);
                }
            }
        }
    }

    /// A client calls from there.
    fn begin(&mut self, client: Client) {
        let number = self.clients.len() as u32;
        self.outcome.begun += 1;
        self.living += 1;
        self.clients.push(Connection::new(client, self.seed, number));
        self.at(self.now, Event::Call(number, 0));
    }

    fn call(&mut self, connection: u32, attempt: u8, balancer: &mut impl Balancer, fleet: &Fleet) {
        let it = &mut self.clients[connection as usize];
        if it.phase != Phase::Calling {
            return;
        }
        // RFC 6298 section 2: sent again after 1 s, 2 s more, 4 s more.
        const WAITS: [u64; 4] = [1, 2, 4, 8];
        let Some(&wait) = WAITS.get(usize::from(attempt)) else {
            it.phase = Phase::Over;
            self.living -= 1;
            return;
        };
        let packet = self.scenario.packet(it.client, it.first_sequence, Tcp::SYN);
        // Drawn in any case, so that what comes later does not hang on where this one goes.
        let answer = it.answer(&self.scenario);
        self.outcome.packets += 1;
        let server = balancer.forward(&packet, self.now);
        self.at(self.now + wait * SECOND, Event::Call(connection, attempt + 1));
        if let Some((server, delay)) = server.zip(answer)
            && fleet.servers[server].alive
        {
            let life = fleet.servers[server].life;
            self.at(self.now + delay, Event::Answer { connection, server: server as u8, life });
        }
    }

    fn speak(&mut self, connection: u32, balancer: &mut impl Balancer, fleet: &mut Fleet) {
        let it = &mut self.clients[connection as usize];
        if it.phase != Phase::Open {
            return;
        }
        if self.now >= it.ends {
            let end = it.end(&self.scenario);
            let sequence = it.sequence();
            if let Some(again) = end.again {
                self.at(self.now + again, Event::Again(connection));
            }
            match end.flags {
                Some(flags) => {
                    self.send(connection, flags, sequence, balancer, fleet);
                    if flags & Tcp::RST != 0 {
                        self.over(connection, fleet);
                    } else {
                        self.clients[connection as usize].ends = self.now + end.hears;
                        let rest = self.clients[connection as usize].last();
                        self.at(self.now + rest, Event::Last(connection));
                    }
                }
                None => self.over(connection, fleet),
            }
            return;
        }
        let (sequence, next) = it.speak(self.now);
        self.send(connection, Tcp::ACK, sequence, balancer, fleet);
        self.at(next, Event::Speak(connection));
    }

    /// Sends a packet of an established connection, and looks where it goes.
    fn send(
        &mut self,
        connection: u32,
        flags: u8,
        sequence: u32,
        balancer: &mut impl Balancer,
        fleet: &mut Fleet,
    ) {
        let it = &self.clients[connection as usize];
        if it.phase != Phase::Open {
            return;
        }
        let packet = self.scenario.packet(it.client, sequence, flags);
        self.outcome.packets += 1;
        let server = balancer.forward(&packet, self.now);
        let it = &self.clients[connection as usize];
        if !fleet.holds(it.server, it.life) {
            self.outcome.bereft += 1;
            self.over(connection, fleet);
        } else if server != Some(it.server) {
            self.outcome.broken += 1;
            if self.outcome.examples.len() < 10 {
                let example = format!(
                    "{:.3} s: {it:?} sent {flags:#04x} to {server:?}",
                    (self.now - BEGIN) as f64 / SECOND as f64
                );
                self.outcome.examples.push(example);
            }
            self.over(connection, fleet);
        }
    }

    /// After a packet that may have been the last one.
    fn last(&mut self, connection: u32, fleet: &mut Fleet) {
        let it = &mut self.clients[connection as usize];
        if it.phase == Phase::Open && self.now < it.ends {
            let rest = it.last();
            self.at(self.now + rest, Event::Last(connection));
        } else {
            self.over(connection, fleet);
        }
    }

    fn over(&mut self, connection: u32, fleet: &mut Fleet) {
        let it = &mut self.clients[connection as usize];
        if it.phase == Phase::Open {
            fleet.servers[it.server].connections -= 1;
            self.living -= 1;
            it.phase = Phase::Over;
        }
    }

    /// A SYN of nobody; two in a hundred have the ends of a connection that is neither in its handshake nor
    /// at its end: there, whoever knows its ends can lead its next packet astray, which is a known limit.
    fn flood(&mut self, balancer: &mut impl Balancer) {
        let recent = self.clients.len().saturating_sub(1 + self.random.below(3000) as usize);
        // Drawn in any case, so that the same numbers come next.
        let (aimed, sequence) = (self.random.percent(2), (self.random.next() >> 32) as u32);
        let nobody =
            Client(0xc612_0000 + self.random.below(1 << 17) as u32, 1024 + self.random.below(60_000) as u16);
        let met = self.clients.get(recent).filter(|client| client.is_speaking());
        let client = match met {
            Some(met) if aimed => met.client,
            _ => nobody,
        };
        balancer.forward(&self.scenario.packet(client, sequence, Tcp::SYN), self.now);
    }
}

/// Figures of several runs, by scenario and balancer, as a table.
pub fn table(rows: &BTreeMap<(usize, &'static str), [u64; 5]>) -> String {
    let mut text = String::from(
        "| scenario | connections | Lobby | ring alone | LRU | JET |\n|---|---|---|---|---|---|\n",
    );
    for ((_, name), [begun, lobby, alone, lru, jet]) in rows {
        text += &format!("| {name} | {begun} | {lobby} | {alone} | {lru} | {jet} |\n");
    }
    text
}
