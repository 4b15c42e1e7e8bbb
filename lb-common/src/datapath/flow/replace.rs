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
/// When none of so many has got further than a SYN, it is a flood, and no more are looked at.
const FLOOD: u16 = 6;
/// How far each of the later ones is from the one before.
const LEAP: u32 = 61;

/// Looks for a port whose flow can be had, in a lane (as [`hash::Lane::to_word`]) among ports given as lowest,
/// highest and first to be looked at, 16 bits each. What was found: the port, how readily its flow is given
/// up (zero: none was found), and in the upper 32 bits how far the cursor is to go.
///
/// Numbers in and a number out, so that the verifier can look at it by itself (see
/// [`Tables::search_ports`]).
#[inline(always)]
pub fn search_ports<T: Tables>(tables: &T, lane: u64, ports: u64, now: u32) -> u64 {
    let Some(config) = tables.config() else { return 0 };
    let context = Context { tables, config, ingress: 0, now: Tick(now) };
    let lane = hash::Lane::from_word(lane);
    let (low, high) = (ports as u32 & 0xffff, (ports >> 16) as u32 & 0xffff);
    let (mut port, mut passed) = ((ports >> 32) as u32 & 0xffff, 0u32);
    let (mut best, mut found) = (0u64, 0u32);
    let mut flood = true;
    for probe in 0..PROBES {
        let Some(flow) = tables.flow(lane.flow(port, config.flow_mask.get())) else { return 0 };
        let worth = config.launder(u64::from(worth_of(flow, flow.guard.get(), context) as u8));
        if worth > best {
            best = worth;
            found = port;
        }
        flood = flood && worth == u64::from(Worth::HalfOpen as u8);
        if worth >= u64::from(Worth::Over as u8) || flood && probe + 1 == FLOOD {
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
    u64::from(found & 0xffff) | best << 16 | u64::from(passed) << 32
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
        let ports = 1000 << 16;
        let found = search_ports(&tables, lane.to_word(), ports, 1000);
        let (port, worth, passed) = (found as u16, found >> 16 & 0xffff, found >> 32);
        assert_eq!(worth, u64::from(Worth::Over as u8));
        assert!(port >= PROBES && u64::from(port) == passed, "{port}, {passed}");
    }
}
