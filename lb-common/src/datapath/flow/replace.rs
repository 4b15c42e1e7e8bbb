//! Which flow gives way to a new connection: how readily each does, and the two searches for the readiest.
//!
//! Never one of a live connection within its idle time-out.

use super::{Context, GUARD_STATE, flow_of_way, is_live, tag_of};
use crate::{
    abi::{Flow, Tick},
    datapath::hash,
    tables::Tables,
};

/// Ports that are looked at before a new connection is refused.
const PROBES: u16 = 16;
/// How far each of the later ones is from the one before.
const LEAP: u32 = 61;

/// How readily a way is given up: the highest first, zero never. What is stale or has expired comes before
/// what has ended, and that before what is half open; among these, the first to expire.
#[inline(always)]
pub(super) fn worth_of_way<T: Tables>(way: u64, context: Context<'_, T>) -> u64 {
    /// No time-out is longer than this many ticks, two years.
    const LONGEST: u32 = u32::MAX >> 2;
    let Some(flow) = flow_of_way(way, context.tables) else { return STALE };
    let guard = flow.guard.get();
    if !is_live(guard) || tag_of(guard) != (way >> 32) as u32 {
        // The flow has another connection by now, or none; or it is just being given one.
        return if guard & GUARD_STATE == Flow::BUSY { 0 } else { STALE };
    }
    let expires = flow.expires.get();
    if context.now.has_reached(expires) {
        return STALE;
    }
    let rank = u64::from(flow.rank.get());
    if rank == 0 { 0 } else { rank << 32 | u64::from(LONGEST.saturating_sub(expires.since(context.now))) }
}

/// Of a way whose flow is gone, or may go.
pub(super) const STALE: u64 = (Flow::CLOSED as u64 + 1) << 32;

/// The way of a bucket that is given up first: its number plus one, or zero for none.
///
/// Numbers in and a number out, so that the verifier can look at it by itself (see
/// [`Tables::search_ways`]).
#[inline(always)]
pub fn search_ways<T: Tables>(tables: &T, bucket: u32, now: u32) -> u64 {
    let (Some(bucket), Some(config)) = (tables.bucket(bucket), tables.config()) else { return 0 };
    let context = Context { tables, config, ingress: 0, now: Tick(now) };
    let (mut best, mut found) = (0u64, 0u64);
    for (number, way) in bucket.ways.iter().enumerate() {
        let worth = config.launder(worth_of_way(way.get(), context));
        if worth > best {
            best = worth;
            found = number as u64 + 1;
        }
    }
    found
}

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
    for probe in 0..PROBES {
        let Some(flow) = tables.flow(lane.flow(port, config.flow_mask.get())) else { return 0 };
        let worth = config.launder(u64::from(worth_of_flow(flow, flow.guard.get(), context)));
        if worth > best {
            best = worth;
            found = port;
        }
        if worth >= u64::from(FREE) {
            break;
        }
        // Two lanes can run beside each other by chance; a leap leaves the other one behind.
        let step = if probe < PROBES / 2 { 1 } else { LEAP };
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

/// A flow that nobody has, or whose port has rested.
const FREE: u8 = Flow::CLOSED + 1;

/// How readily a flow is given to another connection: the highest first, zero never.
#[inline(always)]
pub(super) fn worth_of_flow<T>(flow: &Flow, guard: u64, context: Context<'_, T>) -> u8 {
    if guard & GUARD_STATE == Flow::BUSY {
        return 0;
    }
    let rank = flow.rank.get();
    // Only what has ended rests: the upper bit of the rank.
    let rest = u32::from(rank >> 1) * context.config.port_rest.get();
    if !is_live(guard) || context.now.has_reached(flow.expires.get().after(rest)) { FREE } else { rank }
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
        assert_eq!(worth, u64::from(FREE));
        assert!(port >= PROBES && u64::from(port) == passed, "{port}, {passed}");
    }
}
