//! What tables in memory refuse.

use lb_common::abi::Action;

use super::*;
use crate::{
    dataplane::{FlowsOf, Mode, SourceEntry, SourceRun},
    model::PortRange,
};

fn listen(text: &str) -> Listen {
    text.parse().unwrap()
}

fn ring<const N: usize>(backends: [u32; N]) -> Arc<[Slot]> {
    backends.map(Slot::settled).into()
}

fn at(first_page: u32, slots: u32) -> RingAt {
    RingAt { slots, first_page, first_side: None }
}

fn backend(service: u32, generation: u32, sources: u32) -> BackendEntry {
    BackendEntry {
        service,
        address: Some([10, 0, 0, 1].into()),
        port: Some(80),
        generation,
        next_hop: None,
        sources: SourceRun { first: 0, count: sources },
        flows: FlowsOf::Keep,
        dead: false,
    }
}

/// Service 0 with a ring of its backend 0, led to by a key; service 1 for all ports, with its backend 1.
fn memory() -> MemoryDataplane {
    let limits = Limits { flows: 1024, services: 4, backends: 4, ring_pages: 4, side_pages: 4, rules: 4 };
    let mut memory = MemoryDataplane::new(limits);
    let source = SourceEntry { address: [10, 9, 0, 1].into(), ports: PortRange::default() };
    let (first, second) = (listen("203.0.113.10:80/tcp"), listen("203.0.113.11:*/udp"));
    let rules = [("10.0.0.0/8".parse().unwrap(), Action::Allow)].into();
    for op in [
        Op::WriteSource { index: 0, source },
        Op::WriteService { index: 0, listen: first, mode: Mode::default() },
        Op::WriteService { index: 1, listen: second, mode: Mode::default() },
        Op::WriteBackend { index: 0, backend: backend(0, 1, 1) },
        Op::WriteBackend { index: 1, backend: backend(1, 1, 0) },
        Op::WritePages { first_page: 0, slots: ring([0, 0, 0]) },
        Op::SwitchRing { service: 0, ring: at(0, 3) },
        Op::WriteRules { set: 1, rules },
        Op::SwitchFirewall { service: 0, firewall: Firewall { rule_set: Some(1), deny_others: true } },
        Op::SetKey { listen: first, service: 0 },
        Op::WritePages { first_page: 1, slots: ring([1]) },
    ] {
        memory.apply(&op).unwrap_or_else(|why| panic!("{op:?}: {why}"));
    }
    memory
}

#[test]
fn what_would_be_half_made_is_refused_and_nothing_changes() {
    let set = Some(2);
    let vip = VipEntry { any_tcp: Some(1), ..VipEntry::default() };
    let source = SourceEntry { address: [10, 9, 0, 1].into(), ports: PortRange::default() };
    for (op, why) in [
        (Op::SwitchRing { service: 0, ring: at(1, 1) }, "leads to backend 1, not its own"),
        (Op::SwitchRing { service: 0, ring: at(2, 1) }, "no ring of 1 slots was written"),
        (Op::SwitchRing { service: 1, ring: at(1, 2) }, "no ring of 2 slots was written"),
        (Op::SwitchRing { service: 1, ring: at(4, 1) }, "beyond the last"),
        (Op::SwitchRing { service: 3, ring: at(1, 1) }, "service 3 is not in use"),
        (Op::WritePages { first_page: 0, slots: ring([0]) }, "in use by service 0"),
        (Op::WriteSource { index: MAX_SOURCES, source }, "beyond the last"),
        (Op::RemoveSource { index: 0 }, "still named by a backend"),
        (Op::WriteBackend { index: 4, backend: backend(0, 1, 0) }, "beyond the last"),
        (Op::WriteBackend { index: 0, backend: backend(0, 2, 1) }, "reused while slots lead to it"),
        (Op::WriteBackend { index: 1, backend: backend(0, 1, 0) }, "change under its flows"),
        (Op::WriteBackend { index: 1, backend: backend(1, 0, 0) }, "has had generation 1 before"),
        (Op::WriteBackend { index: 2, backend: backend(1, 1, 2) }, "a source that is not written"),
        (Op::RemoveBackend { index: 0 }, "freed while slots lead to it"),
        (Op::WriteRules { set: 1, rules: [].into() }, "written already"),
        (Op::RemoveRules { set: 1 }, "removed while in force"),
        (
            Op::SwitchFirewall { service: 0, firewall: Firewall { rule_set: set, ..Firewall::default() } },
            "rule set Some(2) is not written",
        ),
        (
            Op::WriteService { index: 0, listen: listen("203.0.113.12:80/tcp"), mode: Mode::default() },
            "is in use",
        ),
        (Op::RemoveService { index: 0 }, "still led to"),
        (Op::SetKey { listen: listen("203.0.113.10:81/tcp"), service: 0 }, "listens on"),
        (Op::SetKey { listen: listen("203.0.113.10:80/tcp"), service: 3 }, "not in use"),
        (Op::SetKey { listen: listen("203.0.113.11:*/udp"), service: 1 }, "led by its VIP"),
        (Op::SetVip { address: [203, 0, 113, 11].into(), vip }, "listens on"),
    ] {
        let mut memory = memory();
        let before = memory.held().clone();
        let refused = memory.apply(&op).expect_err(&format!("{op:?}")).to_string();
        assert!(refused.contains(why), "{op:?}: {refused}");
        assert_eq!(*memory.held(), before, "{op:?}");
    }
}

#[test]
fn a_ring_of_several_pages_is_switched_to_as_it_was_written() {
    let mut memory = memory();
    let slots: Arc<[Slot]> = std::iter::repeat_n(Slot::settled(1), 2 * PAGE_SLOTS + 1).collect();
    let size = slots.len() as u32;
    memory.apply(&Op::WritePages { first_page: 1, slots: Arc::clone(&slots) }).unwrap();
    memory.apply(&Op::SwitchRing { service: 1, ring: at(1, size) }).unwrap();
    assert_eq!(memory.held().services[&1].ring, Ring { first_page: 1, first_side: None, slots });
    // Written over in the middle, it is a ring no more.
    let mut memory = self::memory();
    let slots: Arc<[Slot]> = std::iter::repeat_n(Slot::settled(1), 2 * PAGE_SLOTS + 1).collect();
    memory.apply(&Op::WritePages { first_page: 1, slots }).unwrap();
    memory.apply(&Op::WritePages { first_page: 2, slots: ring([1]) }).unwrap();
    assert!(memory.apply(&Op::SwitchRing { service: 1, ring: at(1, size) }).is_err());
}

/// Service 0 leaves its ring on page 0 and its rule set 1.
fn left() -> MemoryDataplane {
    let mut memory = memory();
    let rules = [("10.0.0.0/8".parse().unwrap(), Action::Deny)].into();
    for op in [
        Op::WritePages { first_page: 2, slots: ring([NO_BACKEND]) },
        Op::SwitchRing { service: 0, ring: at(2, 1) },
        Op::WriteRules { set: 2, rules },
        Op::SwitchFirewall { service: 0, firewall: Firewall { rule_set: Some(2), deny_others: true } },
    ] {
        memory.apply(&op).unwrap_or_else(|why| panic!("{op:?}: {why}"));
    }
    memory
}

#[test]
fn what_packets_may_still_see_is_not_touched_before_somebody_has_waited_for_them() {
    for (op, why) in [
        (Op::WritePages { first_page: 0, slots: ring([0]) }, "may see pages 0..1"),
        (Op::RemoveBackend { index: 0 }, "freed while slots lead to it"),
        (Op::WriteBackend { index: 0, backend: backend(0, 2, 1) }, "reused while slots lead to it"),
        (Op::RemoveRules { set: 1 }, "removed while in force"),
    ] {
        let mut memory = left();
        let before = memory.held().clone();
        let refused = memory.apply(&op).expect_err(&format!("{op:?}")).to_string();
        assert!(refused.contains(why), "{op:?}: {refused}");
        assert_eq!(*memory.held(), before, "{op:?}");
        memory.apply(&Op::Settle).unwrap();
        memory.apply(&op).unwrap_or_else(|why| panic!("{op:?}: {why}"));
    }
}

#[test]
fn an_old_ring_stays_while_it_is_asked_and_its_sides_while_they_are_seen() {
    let mut memory = memory();
    let moving: Arc<[Slot]> = [Slot::unsettled(0)].into();
    let asks = SideEntry::moving(Standing::BY_OLD_RING, Tick(1));
    let settled = Standing { before: 0, ..asks.standing };
    let old = Op::SwitchOldRing { service: 0, ring: RingAt::default() };
    for op in [
        Op::WriteSides { first_side: 0, sides: [(0, asks)].into() },
        Op::WritePages { first_page: 2, slots: moving },
        Op::SwitchOldRing { service: 0, ring: at(0, 3) },
        Op::SwitchRing { service: 0, ring: RingAt { slots: 1, first_page: 2, first_side: Some(0) } },
        Op::Settle,
    ] {
        memory.apply(&op).unwrap_or_else(|why| panic!("{op:?}: {why}"));
    }
    let refused = |memory: &mut MemoryDataplane, op: &Op, why: &str| {
        let refused = memory.apply(op).expect_err(why).to_string();
        assert!(refused.contains(why), "{op:?}: {refused}");
    };
    refused(&mut memory, &old, "may be asked yet");
    memory.apply(&Op::SetStandings { first_side: 0, standings: [(0, settled)].into() }).unwrap();
    // Some came before it ceased to ask.
    refused(&mut memory, &old, "may be asked yet");
    memory.apply(&Op::Settle).unwrap();
    memory.apply(&old).unwrap();
    memory.apply(&Op::WritePages { first_page: 3, slots: ring([0]) }).unwrap();
    memory.apply(&Op::SwitchRing { service: 0, ring: at(3, 1) }).unwrap();
    let sides = Op::WriteSides { first_side: 0, sides: [(0, asks)].into() };
    refused(&mut memory, &sides, "may see sides 0..1");
    memory.apply(&Op::Settle).unwrap();
    memory.apply(&sides).unwrap();
}
