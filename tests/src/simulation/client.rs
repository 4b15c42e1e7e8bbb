//! One client's connection: when it says something, and how it ends.

use lb_common::wire::l4::Tcp;

use super::{MILLISECOND, SECOND, packet::Client, scenario::Scenario};
use crate::random::Random;

/// How far a connection is, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No answer yet.
    Calling,
    /// Established.
    Open,
    /// Ended.
    Over,
}

/// A connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its client's end.
    pub client: Client,
    /// Sequence number of its SYN.
    pub first_sequence: u32,
    /// How far it is.
    pub phase: Phase,
    /// The server whose answer came first.
    pub server: usize,
    /// The server's life at that time.
    pub life: u32,
    /// When it has nothing more to say, and then: when it has heard everything.
    pub ends: u64,
    /// Bytes sent.
    sent: u32,
    /// It has sent the last of them.
    ending: bool,
    /// It has said so, and goes on taking in what its server sends.
    half_closed: bool,
    /// Shortest and longest silence.
    silence: [u64; 2],
    random: Random,
}

/// For how long a client that has said its last word may hear nothing: less than `timeouts.closed`.
const LONGEST_PAUSE: u64 = 9 * SECOND;

/// How a connection ends.
pub struct End {
    /// What the client sends; `None`: it crashed, or there is no way to say so.
    pub flags: Option<u8>,
    /// For how long it takes in what its server sends still.
    pub hears: u64,
    /// After how long another one begins between the same ends.
    pub again: Option<u64>,
}

impl Connection {
    /// One that begins now.
    pub fn new(client: Client, seed: u64, number: u32) -> Self {
        let mut random = Random::new(lb_userspace::maglev::mix(seed ^ u64::from(number) << 20));
        Self {
            client,
            first_sequence: (random.next() >> 32) as u32,
            phase: Phase::Calling,
            server: 0,
            life: 0,
            ends: 0,
            sent: 0,
            ending: false,
            half_closed: false,
            silence: [0; 2],
            random,
        }
    }

    /// After how long a SYN that arrives is answered; `None`: the answer is lost.
    pub fn answer(&mut self, scenario: &Scenario) -> Option<u64> {
        let lost = self.random.percent(4);
        let late = self.random.percent(scenario.late);
        let (low, high) = if late { (1000, 2900) } else { (10, 90) };
        let delay = (low + self.random.below(high - low)) * MILLISECOND;
        (!lost).then_some(delay)
    }

    /// Decides what kind it is: when the handshake's last packet is sent, and when the first data.
    pub fn begin_to_speak(&mut self, scenario: &Scenario, now: u64) -> (u64, u64) {
        let kind = self.random.below(100);
        let (life, silence) = if kind < scenario.idle {
            (60 + self.random.below(scenario.longest - 60), [30_000, 54_000])
        } else if kind < scenario.idle + scenario.half_idle {
            (20 + self.random.below(scenario.longest / 2 - 20), [4_000, 30_000])
        } else {
            (1 + self.random.below(20), [50, 2_000])
        };
        self.ends = now + life * SECOND;
        // Associations of UDP are looked after for half as long.
        let unit = if scenario.datagrams { MILLISECOND / 2 } else { MILLISECOND };
        self.silence = silence.map(|milliseconds| milliseconds * unit);
        // Now and then data overtake it.
        let overtaken = self.random.percent(5);
        let (acknowledges, speaks) = if overtaken { (4, 1) } else { (0, 1 + self.random.below(200)) };
        (now + acknowledges * MILLISECOND, now + speaks * MILLISECOND)
    }

    /// The number of the next byte.
    pub fn sequence(&self) -> u32 {
        self.first_sequence.wrapping_add(1).wrapping_add(self.sent)
    }

    /// Whether it has sent data, and goes on.
    pub fn is_speaking(&self) -> bool {
        self.phase == Phase::Open && self.sent > 0 && !self.ending
    }

    /// The sequence number of the data that it sends now, and when it sends the next, or ends.
    pub fn speak(&mut self, now: u64) -> (u32, u64) {
        let sequence = self.sequence();
        self.sent = self.sent.wrapping_add(1 + self.random.below(20_000) as u32);
        let [shortest, longest] = self.silence;
        let pause = shortest + self.random.below((longest - shortest) / MILLISECOND) * MILLISECOND;
        (sequence, (now + pause).min(self.ends.max(now)))
    }

    /// How it ends.
    pub fn end(&mut self, scenario: &Scenario) -> End {
        self.ending = true;
        let how = self.random.below(100);
        let flags = if scenario.datagrams || how < scenario.crashes {
            None
        } else if how < scenario.crashes + 7 {
            Some(Tcp::RST)
        } else {
            Some(Tcp::FIN | Tcp::ACK)
        };
        let again = if flags.is_none() { 50 } else { scenario.reuse };
        let soon = self.random.percent(60);
        let after = if soon { 1 + self.random.below(30) } else { 30 + self.random.below(210) };
        let again = self.random.percent(again).then_some(after * SECOND);
        self.half_closed = self.random.percent(scenario.half_closed) && flags.is_some();
        if !self.half_closed {
            return End { flags, hears: 0, again };
        }
        let hears = (5 + self.random.below(120)) * SECOND;
        // Not before the one before is over.
        End {
            flags: Some(Tcp::FIN | Tcp::ACK),
            hears,
            again: again.map(|after| after + hears + LONGEST_PAUSE),
        }
    }

    /// How long after its FIN, or after another packet since, it sends the next, which may be its last.
    pub fn last(&mut self) -> u64 {
        let longest = if self.half_closed { LONGEST_PAUSE / MILLISECOND } else { 200 };
        (20 + self.random.below(longest - 20)) * MILLISECOND
    }
}
