//! What happens to the servers while connections live.

use lb_userspace::{dataplane::FlowsOf, health::Verdict};

use super::{
    SECOND,
    fleet::Fleet,
    packet::{Client, Packet},
};
use crate::random::Random;

/// What changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// Servers are added, drained, taken out when they have no connections, given other weights.
    Mixed,
    /// Servers go and come back while their slots still move, directly or by way of a third.
    Back,
    /// Weights grow and shrink step by step.
    Slowly,
    /// Health takes living servers for dead for a while.
    Blip,
    /// Servers die, are found out, and come back without their connections.
    Death,
    /// Servers are taken out of the document with all their connections, and come back.
    Removal,
    /// All of the above but resizing.
    Everything,
    /// The ring is given another size; when it rests, and takes it, other changes follow at once.
    Resize,
}

/// A run: who the clients are, what changes, and how much room there is.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// What to call it.
    pub name: &'static str,
    /// What changes.
    pub changes: Changes,
    /// Places for records, a power of two; zero: none of them can be used.
    pub records: usize,
    /// SYNs a second of clients that do not exist, now and then with the ends of a connection that does.
    pub flood: u64,
    /// Connections are written down in quiet times too.
    pub always: bool,
    /// The daemon is killed now and then, amid its operations too.
    pub restarts: bool,
    /// Percent of connections that say something every few seconds up to every half minute.
    pub half_idle: u64,
    /// Percent of connections that are silent for half of the idle time-out to nine tenths of it.
    pub idle: u64,
    /// Longest life of a connection, in seconds.
    pub longest: u64,
    /// Percent of connections that end with their client's crash; half of them are followed by another
    /// between the same ends.
    pub crashes: u64,
    /// Percent of ends that are followed by another connection between the same ends.
    pub reuse: u64,
    /// Percent of connections whose client says its last word long before its server, and hears that out.
    pub half_closed: u64,
    /// UDP, of a service that is sticky.
    pub datagrams: bool,
    /// Percent of SYNs whose answer is so late that the SYN is sent again first.
    pub late: u64,
}

impl Scenario {
    /// Ordinary clients, ample room.
    pub const fn new(name: &'static str, changes: Changes) -> Self {
        Self {
            name,
            changes,
            records: 4096,
            flood: 0,
            always: false,
            restarts: false,
            half_idle: 12,
            idle: 10,
            longest: 300,
            crashes: 8,
            reuse: 10,
            half_closed: 5,
            datagrams: false,
            late: 3,
        }
    }
}

impl Scenario {
    /// A packet of its clients.
    pub const fn packet(&self, client: Client, sequence: u32, flags: u8) -> Packet {
        match self.datagrams {
            true => Packet { client, sequence: 0, flags: 0, datagram: true },
            false => Packet { client, sequence, flags, datagram: false },
        }
    }
}

/// The scenarios that are compared.
pub const ALL: [Scenario; 18] = [
    Scenario::new("add, drain, weight", Changes::Mixed),
    Scenario::new("A to B to A, by way of C too", Changes::Back),
    Scenario::new("weights step by step", Changes::Slowly),
    Scenario::new("health blip", Changes::Blip),
    Scenario::new("real death", Changes::Death),
    Scenario::new("hard removal", Changes::Removal),
    Scenario { flood: 400, ..Scenario::new("SYN flood", Changes::Mixed) },
    Scenario { restarts: true, ..Scenario::new("daemon restarts", Changes::Mixed) },
    Scenario { restarts: true, ..Scenario::new("everything, restarts", Changes::Everything) },
    Scenario { longest: 120, ..Scenario::new("ring resized", Changes::Resize) },
    Scenario { records: 1024, ..Scenario::new("1024 records", Changes::Mixed) },
    Scenario { always: true, records: 1 << 15, ..Scenario::new("written down always", Changes::Mixed) },
    Scenario { records: 0, ..Scenario::new("no records", Changes::Mixed) },
    Scenario { crashes: 40, reuse: 50, ..Scenario::new("ports used again, crashes", Changes::Mixed) },
    Scenario { half_idle: 50, idle: 30, records: 8192, ..Scenario::new("half-idle clients", Changes::Mixed) },
    Scenario { half_closed: 80, ..Scenario::new("half-closed connections", Changes::Mixed) },
    Scenario { datagrams: true, ..Scenario::new("sticky UDP", Changes::Mixed) },
    Scenario { datagrams: true, restarts: true, ..Scenario::new("sticky UDP, restarts", Changes::Back) },
];

/// What was begun and is to be ended.
#[derive(Clone, Copy, Debug)]
enum After {
    Nothing,
    Usable(usize),
    Buried(usize),
    Risen(usize),
    Listed(usize),
}

/// Changes the servers over time.
#[derive(Debug)]
pub struct Script {
    changes: Changes,
    random: Random,
    step: u64,
    pair: [usize; 2],
    after: After,
}

const DRAINED: Verdict = Verdict::RESTING;
const DEAD: Verdict = Verdict { dead: true, flows: FlowsOf::Keep, ..Verdict::RESTING };
/// Fewest servers in use.
const FEWEST: usize = 8;
/// Sizes of rings, all prime.
const SIZES: [u32; 3] = [1021, 509, 2039];

impl Script {
    /// The changes of a scenario.
    pub fn new(changes: Changes, seed: u64) -> Self {
        Self { changes, random: Random::new(seed ^ 0x5eed), step: 0, pair: [0, 1], after: After::Nothing }
    }

    /// Does the next change, and says after how many seconds the one after it follows.
    pub fn act(&mut self, fleet: &mut Fleet) -> u64 {
        if let Some(rest) = self.go_on(fleet) {
            return rest;
        }
        self.step += 1;
        let all = [Changes::Mixed, Changes::Blip, Changes::Death, Changes::Removal, Changes::Mixed];
        match self.changes {
            Changes::Everything => {
                let changes = self.random.of(&all);
                self.change(changes, fleet)
            }
            changes => self.change(changes, fleet),
        }
    }

    /// Ends what was begun.
    fn go_on(&mut self, fleet: &mut Fleet) -> Option<u64> {
        match std::mem::replace(&mut self.after, After::Nothing) {
            After::Nothing => return None,
            After::Usable(server) => {
                fleet.servers[server].verdict = Verdict::USABLE;
                return Some(10);
            }
            After::Buried(server) => {
                fleet.servers[server].verdict = DEAD;
                self.after = After::Risen(server);
                return Some(8 + self.random.below(10));
            }
            After::Risen(server) => {
                fleet.servers[server].alive = true;
                self.after = After::Usable(server);
                return Some(3);
            }
            After::Listed(server) => {
                fleet.servers[server].listed = true;
                fleet.servers[server].verdict = Verdict::USABLE;
            }
        }
        Some(12)
    }

    fn change(&mut self, changes: Changes, fleet: &mut Fleet) -> u64 {
        match changes {
            Changes::Mixed | Changes::Everything => self.mixed(fleet),
            Changes::Back => return self.back(fleet),
            Changes::Slowly => {
                // One shrinks to a tenth and grows again; then another.
                let server = (self.step / 18) as usize % 12;
                let step = self.step % 18;
                fleet.servers[server].weight = if step < 9 { 9 - step } else { step - 7 } as u16;
                return 5 + self.random.below(10);
            }
            Changes::Blip => {
                if let Some(server) = self.one_in_use(fleet) {
                    fleet.servers[server].verdict = DEAD;
                    self.after = After::Usable(server);
                    return 2 + self.random.below(14);
                }
            }
            Changes::Death => {
                if let Some(server) = self.one_in_use(fleet) {
                    fleet.servers[server].alive = false;
                    fleet.servers[server].life += 1;
                    self.after = After::Buried(server);
                    return 1 + self.random.below(4);
                }
            }
            Changes::Removal => {
                if let Some(server) = self.one_in_use(fleet) {
                    fleet.servers[server].listed = false;
                    fleet.servers[server].life += 1;
                    self.after = After::Listed(server);
                    return 5 + self.random.below(30);
                }
            }
            Changes::Resize => return self.resize(fleet),
        }
        25
    }

    fn one_in_use(&mut self, fleet: &Fleet) -> Option<usize> {
        let servers: Vec<usize> =
            (0..fleet.servers.len()).filter(|&server| fleet.is_in_use(server)).collect();
        (servers.len() > FEWEST).then(|| self.random.of(&servers))
    }

    fn mixed(&mut self, fleet: &mut Fleet) {
        let server = self.random.below(fleet.servers.len() as u64) as usize;
        let spare = fleet.in_use() > FEWEST;
        let it = &mut fleet.servers[server];
        if !it.listed {
            it.listed = true;
            it.verdict = Verdict::USABLE;
        } else if it.verdict != Verdict::USABLE {
            if it.connections == 0 && self.random.percent(50) {
                it.listed = false;
                it.life += 1;
            } else {
                it.verdict = Verdict::USABLE;
            }
        } else if spare && self.random.percent(60) {
            it.verdict = DRAINED;
        } else {
            it.weight = self.random.of(&[1, 3, 5, 10, 10, 20]);
        }
    }

    fn back(&mut self, fleet: &mut Fleet) -> u64 {
        let [a, b] = self.pair;
        let mut set = |server: usize, verdict| fleet.servers[server].verdict = verdict;
        match self.step % 6 {
            1 => {
                let a = self.random.below(12) as usize;
                self.pair = [a, (a + 1 + self.random.below(11) as usize) % 12];
                set(a, DRAINED);
            }
            2 => set(a, Verdict::USABLE),
            3 => set(a, DRAINED),
            4 => set(b, DRAINED),
            5 => set(a, Verdict::USABLE),
            _ => set(b, Verdict::USABLE),
        }
        self.random.of(&[4, 25, 25, 25])
    }

    /// A ring takes another size only when all its slots rest.
    fn resize(&mut self, fleet: &mut Fleet) -> u64 {
        match self.step % 8 {
            1 => {
                fleet.ring_size = SIZES[(self.step / 8 + 1) as usize % SIZES.len()];
                5
            }
            // Not many live for so long, and it rests by then.
            2 => {
                self.mixed(fleet);
                320
            }
            _ => {
                self.mixed(fleet);
                20
            }
        }
    }
}

/// When the first change comes.
pub const FIRST: u64 = 30 * SECOND;
