//! Which flow gives way to a new connection: how readily each does, and the search for the readiest.
//!
//! Never one of a live connection within its idle time-out.

use super::{Context, GUARD_STATE, TOLD_TIME_BITS, is_live};
use crate::{
    abi::{Flow, State, Tick},
    datapath::{hash, record::Worth},
    tables::Tables,
};

/// Ports that are looked at before a new connection is refused.
const PROBES: u16 = 16;
/// So many of them are side by side.
const NEAR: u16 = 2;
/// When none of so many has got further than a SYN, it is a flood, and no more are looked at. They are of ten blocks
/// ([`hash::Lane`]): those of one are likely to be alike, as another lane has left them.
const FLOOD: u16 = 12;
/// So many are looked at while there is one: then the next port's flow is the oldest, as good as any.
const FLOODED: u16 = 1;
/// How far each of the later ones is from the one before.
const LEAP: u32 = 61;

/// Where a search among ports begins: as one word, since in BPF it is an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The lowest.
    pub low: u16,
    /// The highest.
    pub high: u16,
    /// The first that is looked at.
    pub first: u16,
    /// Whether the last search found nothing but half-open flows.
    pub flood: bool,
}

impl Ports {
    /// As one number.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        self.low as u64 | (self.high as u64) << 16 | (self.first as u64) << 32 | (self.flood as u64) << 48
    }

    /// The opposite of [`Ports::to_word`].
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self {
            low: word as u16,
            high: (word >> 16) as u16,
            first: (word >> 32) as u16,
            flood: word >> 48 & 1 != 0,
        }
    }
}

/// What a search among ports found: as one word, since in BPF it is a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiest {
    /// The port.
    pub port: u16,
    /// How readily its flow is given up; zero: none was found.
    pub worth: u8,
    /// Whether all that were looked at are half open.
    pub flood: bool,
    /// How far the cursor is to go.
    pub passed: u32,
}

impl Readiest {
    /// As one number.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        self.port as u64 | (self.worth as u64) << 16 | (self.flood as u64) << 24 | (self.passed as u64) << 32
    }

    /// The opposite of [`Readiest::to_word`].
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self {
            port: word as u16,
            worth: (word >> 16) as u8,
            flood: word >> 24 & 1 != 0,
            passed: (word >> 32) as u32,
        }
    }
}

/// Looks for a port whose flow can be had, in a lane (as [`hash::Lane::to_word`]) among [`Ports`]: [`Readiest`].
///
/// Numbers in and a number out, so that the verifier can look at it by itself (see
/// [`Tables::search_ports`]).
#[inline(always)]
pub fn search_ports<T: Tables>(tables: &T, lane: u64, ports: u64, now: u32) -> u64 {
    let Some(config) = tables.config() else { return 0 };
    let context = Context { tables, config, ingress: 0, now: Tick(now) };
    let lane = hash::Lane::from_word(lane);
    let ports = Ports::from_word(ports);
    let (low, high) = (u32::from(ports.low), u32::from(ports.high));
    let (mut port, mut passed) = (u32::from(ports.first), 0u32);
    let (mut best, mut found) = (0u64, 0u32);
    let (mut flood, enough) = (true, if ports.flood { FLOODED } else { FLOOD });
    for probe in 0..PROBES {
        let Some(flow) = tables.flow(lane.flow(port, config.flow_mask.get())) else { return 0 };
        let worth = config.launder(u64::from(worth_of(flow, flow.guard.get(), context) as u8));
        if worth > best {
            best = worth;
            found = port;
        }
        flood = flood && worth == u64::from(Worth::HalfOpen as u8);
        if worth >= u64::from(Worth::Over as u8) || flood && probe + 1 == enough {
            break;
        }
        // Two lanes can run beside each other by chance; a leap leaves the other one behind.
        let step = if probe < NEAR { 1 } else { LEAP };
        passed += step;
        port += step;
        if port > high {
            // Round again; a lane may be shorter than a leap.
            port = low + (port - high - 1);
            port = if port > high { low } else { port };
        }
    }
    // What is half open everywhere is taken in turn.
    let passed = if flood { 0 } else { passed };
    Readiest { port: found as u16, worth: best as u8, flood, passed }.to_word()
}

/// How readily a flow is given to another connection.
#[inline(always)]
pub(super) fn worth_of<T>(flow: &Flow, guard: u64, context: Context<'_, T>) -> Worth {
    if guard & GUARD_STATE == Flow::BUSY {
        return Worth::Never;
    }
    let worth = Worth::of(State::of_bits(u64::from(flow.told.get() >> TOLD_TIME_BITS)));
    // What has ended rests, while there is another port.
    let rest = if worth == Worth::Ended { context.config.port_rest.get() } else { 0 };
    if !is_live(guard) || context.now.has_reached(flow.expires.get().after(rest)) {
        Worth::Over
    } else {
        worth
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::MemTables;

    #[test]
    fn a_search_leaps_over_a_lane_that_runs_beside() {
        let tables = MemTables::new(0, 0, 0, 4096);
        let lane = hash::Lane::at(0);
        // More live flows in a row than are looked at, as of another lane beside this one.
        for port in 0..u32::from(PROBES) {
            let flow = &tables.flows[lane.flow(port, tables.config.flow_mask.get()) as usize];
            flow.expires.set(Tick(5000));
            flow.guard.set(Flow::LIVE);
        }
        let ports = Ports { low: 0, high: 1000, first: 0, flood: false };
        let found = search_ports(&tables, lane.to_word(), ports.to_word(), 1000);
        let Readiest { port, worth, flood, passed } = Readiest::from_word(found);
        assert_eq!(worth, Worth::Over as u8);
        assert!(port >= PROBES && u32::from(port) == passed && !flood, "{port}, {passed}");
    }

    #[test]
    fn in_a_flood_the_oldest_half_open_flow_is_taken_until_there_is_another() {
        let tables = MemTables::new(0, 0, 0, 4096);
        let lane = hash::Lane::at(0);
        let flow = |port: u32| &tables.flows[lane.flow(port, tables.config.flow_mask.get()) as usize];
        for port in 0..1000 {
            flow(port).told.set((State::HalfOpen as u16) << TOLD_TIME_BITS);
            flow(port).expires.set(Tick(5000));
            flow(port).guard.set(Flow::LIVE);
        }
        let search = |first: u16, flood: bool| {
            let ports = Ports { low: 0, high: 1000, first, flood };
            Readiest::from_word(search_ports(&tables, lane.to_word(), ports.to_word(), 1000))
        };
        let half_open = Worth::HalfOpen as u8;
        let oldest = |port| Readiest { port, worth: half_open, flood: true, passed: 0 };
        assert_eq!((search(10, false), search(11, true)), (oldest(10), oldest(11)));
        // A free one further on is found unless it is known for a flood; then only where the search begins.
        flow(14).guard.set(0);
        assert_eq!(search(12, true), oldest(12));
        let free = |port, passed| Readiest { port, worth: Worth::Over as u8, flood: false, passed };
        assert_eq!((search(12, false), search(14, true)), (free(14, 2), free(14, 0)));
        // A live one is passed, and then it is looked at as many as ever.
        flow(13).told.set((State::Established as u16) << TOLD_TIME_BITS);
        assert_eq!(search(13, true), free(14, 1));
    }
}
