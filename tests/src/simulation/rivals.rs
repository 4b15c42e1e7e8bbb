//! Other ways to keep connections, for comparison on the same traces. All choose by the same rings.

use std::collections::{HashMap, VecDeque};

use lb_common::abi::RingAt;
use lb_userspace::maglev;

use super::{Balancer, fleet::Fleet, packet::Packet};

/// What a rival writes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// Nothing: the ring decides.
    Nothing,
    /// Every connection, in so many entries; the one that was used least recently makes room.
    All(usize),
    /// Those that the addition of a server could lead elsewhere, in the same kind of table (Mendelson et
    /// al., "Load Balancing with JET: Just Enough Tracking for Connection Consistency", CoNEXT 2020).
    Endangered(usize),
}

/// A balancer of this kind.
#[derive(Debug)]
pub struct Rival {
    keeps: Keeps,
    ring: Vec<u32>,
    /// The ring if all servers took part.
    horizon: Vec<u32>,
    /// Servers that are believed to answer.
    fit: Vec<bool>,
    /// Server and last use by connection.
    table: HashMap<u64, (usize, u64)>,
    /// Uses in their order; those that are not a connection's last mean nothing.
    uses: VecDeque<(u64, u64)>,
    clock: u64,
}

impl Rival {
    /// One that has seen nothing yet.
    pub fn new(keeps: Keeps) -> Self {
        Self {
            keeps,
            ring: Vec::new(),
            horizon: Vec::new(),
            fit: Vec::new(),
            table: HashMap::new(),
            uses: VecDeque::new(),
            clock: 0,
        }
    }

    fn keep(&mut self, key: u64, server: usize, entries: usize) {
        self.clock += 1;
        self.table.insert(key, (server, self.clock));
        self.uses.push_back((key, self.clock));
        if self.uses.len() > 16 * entries {
            let table = &self.table;
            self.uses.retain(|(key, used)| table.get(key).is_some_and(|(_, last)| last == used));
        }
        while self.table.len() > entries {
            let Some((key, used)) = self.uses.pop_front() else { return };
            if self.table.get(&key).is_some_and(|&(_, last)| last == used) {
                self.table.remove(&key);
            }
        }
    }
}

impl Balancer for Rival {
    fn forward(&mut self, packet: &Packet, _: u64) -> Option<usize> {
        let hash = packet.hash();
        let slot = |ring: &[u32]| {
            let at = RingAt { slots: ring.len() as u32, ..RingAt::default() };
            ring.get(at.slot((hash >> 32) as u32) as usize).copied()
        };
        let chosen = slot(&self.ring)? as usize;
        let (entries, endangered) = match self.keeps {
            Keeps::Nothing => return Some(chosen),
            Keeps::All(entries) => (entries, true),
            Keeps::Endangered(entries) => (entries, slot(&self.horizon) != Some(chosen as u32)),
        };
        let known = self.table.get(&hash).map(|&(server, _)| server).filter(|&server| self.fit[server]);
        let server = known.unwrap_or(chosen);
        if known.is_some() || endangered {
            self.keep(hash, server, entries);
        }
        Some(server)
    }

    fn change(&mut self, fleet: &Fleet, _: u64) -> Option<u64> {
        self.ring = maglev::ring(&fleet.members(|server| fleet.is_in_use(server)), fleet.ring_size);
        self.horizon = maglev::ring(&fleet.members(|_| true), fleet.ring_size);
        self.fit = fleet.servers.iter().map(|server| server.listed && !server.verdict.dead).collect();
        None
    }

    fn work(&mut self, _: &Fleet, _: u64) -> Option<u64> {
        None
    }
}
