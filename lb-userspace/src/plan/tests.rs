//! The order of operations, proved on tables in memory: after every single operation the tables are
//! whole, and after the last one they say what was desired.

mod roles;
mod sizes;
mod weights;
mod world;

use lb_common::abi::{NO_BACKEND, Slot, Standing};
use proptest::prelude::*;

use self::world::{Dice, LISTENERS, NETWORKS, ROOMY, Shape, World, backend, ip, service};
use super::*;
use crate::{
    dataplane::{
        BackendEntry, Dataplane, Firewall, FlowsOf, RuleSet, ServiceEntry, SourceRun, VipEntry,
        memory::MemoryDataplane, ticks_in,
    },
    health::Verdict,
    maglev::{self, Member},
    model::*,
};

fn address_of(entry: &BackendEntry) -> BackendAddress {
    entry.address.map_or(BackendAddress::Local, |ip| BackendAddress::Remote(ip, entry.port))
}

fn shape(service: &ServiceEntry, tables: &Tables) -> Shape {
    let address = |slot: &Slot| tables.backends.get(&slot.backend()).map(address_of);
    Shape {
        slots: service.ring.slots.iter().map(address).collect(),
        rules: service.firewall.rule_set.map(|set| tables.rules[&set].clone()).unwrap_or_default(),
        deny_others: service.firewall.deny_others,
    }
}

/// Services that packets can reach.
fn led(tables: &Tables) -> Vec<u32> {
    let any = tables.vips.values().flat_map(|vip| vip.any_tcp.into_iter().chain(vip.any_udp));
    tables.keys.values().copied().chain(any).collect()
}

/// What must hold at every moment.
fn check_whole(now: &Tables, shapes: &BTreeMap<Listen, Vec<Shape>>, may_be_fenced: &BTreeSet<u32>) {
    for (listen, index) in &now.keys {
        assert_eq!(
            now.services.get(index).map(|service| service.listen),
            Some(*listen),
            "a key leads astray"
        );
    }
    for (&address, vip) in &now.vips {
        for (index, protocol) in [(vip.any_tcp, Protocol::Tcp), (vip.any_udp, Protocol::Udp)] {
            let listen = Listen { address, port: None, protocol };
            let found = index.map(|index| now.services.get(&index).map(|service| service.listen));
            assert!(found.is_none() || found == Some(Some(listen)), "a VIP leads astray");
        }
    }
    for (index, service) in &now.services {
        for slot in service.ring.slots.iter().filter(|slot| slot.backend() != NO_BACKEND) {
            let entry = now.backends.get(&slot.backend()).expect("a slot leads to a backend that is in use");
            assert_eq!(entry.service, *index, "a slot leads to another service's backend");
            let fenced = entry.flows == FlowsOf::Cut && may_be_fenced.contains(&slot.backend());
            assert!(fenced || entry.flows == FlowsOf::Keep, "a slot leads to a backend whose flows are cut");
        }
    }
    for index in led(now) {
        let service = &now.services[&index];
        let candidates = &shapes[&service.listen];
        let whole = shape(service, now);
        if service.mode.direct {
            // A ring in another size than the document's is another ring; `check_slots` looks at those.
            continue;
        }
        assert!(candidates.iter().any(|shape| shape.slots == whole.slots), "a ring is half-made");
        let firewall = |shape: &Shape| (shape.rules.clone(), shape.deny_others);
        assert!(candidates.iter().any(|shape| firewall(shape) == firewall(&whole)), "rules are half-made");
    }
    for entry in now.backends.values() {
        for index in entry.sources.first..entry.sources.first + entry.sources.count {
            assert!(now.sources.contains_key(&index), "a backend names a source that is not there");
        }
    }
}

/// What must hold at the end.
fn check_done(now: &Tables, before: &Tables, world: &World) {
    let listeners: BTreeSet<Listen> = world.config.services.values().map(|service| service.listen).collect();
    let served: BTreeSet<Listen> = now.services.values().map(|service| service.listen).collect();
    assert_eq!(served, listeners);
    let reached: BTreeSet<Listen> = led(now).iter().map(|index| now.services[index].listen).collect();
    assert_eq!(reached, listeners, "every service is reached");
    let vips: BTreeMap<IpAddr, bool> = now.vips.iter().map(|(&ip, vip)| (ip, vip.shared)).collect();
    let wanted = listeners.iter().map(|listen| (listen.address, world.shared_vips.contains(&listen.address)));
    assert_eq!(vips, wanted.collect());
    for service in world.config.services.values() {
        let (index, entry) = now.services.iter().find(|(_, entry)| entry.listen == service.listen).unwrap();
        let (is, wanted) = (shape(entry, now), world.wanted(service.listen).unwrap());
        if service.quiet_time(&world.config.settings.idle).is_some() && is.slots.len() != wanted.slots.len() {
            // It waits to be resized, or nobody takes part; the same members share it meanwhile. A ring of
            // another size may have a slot for one whose weight gets it none in the ring that is wanted.
            let members = world.members(service).into_iter().filter(|member| member.weight > 0);
            let members: BTreeSet<_> = members.map(|member| member.address).collect();
            let sharing: BTreeSet<_> = is.slots.iter().flatten().copied().collect();
            assert!(sharing.is_subset(&members), "{sharing:?} {members:?}");
            assert_eq!((&is.rules, is.deny_others), (&wanted.rules, wanted.deny_others));
        } else {
            assert_eq!(is, wanted);
        }
        assert_eq!(entry.mode, services::mode(&world.desired(), service));
        let of_service = |(_, entry): &(&u32, &BackendEntry)| entry.service == *index;
        for backend in world.backends(service) {
            let mut found =
                now.backends.iter().filter(of_service).filter(|(_, e)| address_of(e) == backend.address);
            let (place, entry) = found.next().expect("every backend has an entry");
            assert_eq!(found.count(), 0, "and only one");
            let verdict = world.verdicts[&service.pool].of(service.role).get(&backend.address).copied();
            let verdict = verdict.unwrap_or(Verdict::RESTING);
            assert_eq!((entry.flows, entry.dead), (verdict.flows, verdict.dead));
            assert_eq!(entry.next_hop, entry.address.and_then(|ip| world.next_hops.get(&ip).copied()));
            if let Some(list) =
                entry.address.and_then(|ip| world.sources.get(&ip)).filter(|list| !list.is_empty())
            {
                let run = entry.sources.first..entry.sources.first + entry.sources.count;
                let names: BTreeSet<IpAddr> = run.map(|index| now.sources[&index].address).collect();
                assert_eq!(names, list.iter().copied().collect());
            }
            // Who was there before is where it was, or flows would be lost.
            let earlier = before.services.get(index).filter(|earlier| earlier.listen == service.listen);
            if earlier.is_some() {
                let mut known = before.backends.iter().filter(of_service);
                if let Some((old, known)) = known.find(|(_, known)| address_of(known) == backend.address) {
                    assert_eq!((old, known.generation), (place, entry.generation));
                }
            }
        }
    }
    let in_document = |entry: &BackendEntry| {
        let listen = now.services.get(&entry.service).map(|service| service.listen);
        let service = world.config.services.values().find(|service| Some(service.listen) == listen);
        let mut backends = service.into_iter().flat_map(|service| world.backends(service));
        backends.any(|backend| backend.address == address_of(entry))
    };
    for entry in now.backends.values().filter(|entry| !in_document(entry)) {
        assert_eq!(entry.flows, FlowsOf::Cut, "what is gone is cut");
    }
    let in_force: BTreeSet<u32> = now.services.values().filter_map(|s| s.firewall.rule_set).collect();
    assert_eq!(now.rules.keys().copied().collect::<BTreeSet<_>>(), in_force, "no rules are left behind");
    let addresses: Vec<IpAddr> = now.sources.values().map(|source| source.address).collect();
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), addresses.len(), "a source has one index");
    assert_eq!(now.interfaces, world.interfaces);
}

/// What the tables hold, with what slots remember.
fn observed(memory: &MemoryDataplane) -> Tables {
    let mut tables = memory.tables().unwrap();
    tables.sides = memory.observed(&tables).unwrap();
    tables
}

/// Where packets of a slot go that are of connections that nobody has written down: `None` is nowhere.
fn default_of(tables: &Tables, index: u32, slot: usize) -> Option<u32> {
    let service = &tables.services[&index];
    let word = service.ring.slots[slot];
    let standing = (!word.is_settled()).then(|| tables.sides[&index][slot].standing);
    let backend = match standing {
        Some(Standing { fading: false, before, .. }) => before,
        _ => word.backend(),
    };
    (backend != NO_BACKEND).then_some(backend)
}

/// No operation leads a connection of a living backend elsewhere: a slot's default changes only when its
/// time has come, or nobody is left there.
fn check_slots(before: &Tables, after: &Tables, world: &World) {
    for service in world.config.services.values() {
        let Some(quiet) = service.quiet_time(&world.config.settings.idle) else { continue };
        let index = |tables: &Tables| {
            let mut all = tables.services.iter();
            // Turns that were left under the mode of before are nobody's slots.
            let has_slots =
                |entry: &ServiceEntry| entry.mode.direct && maglev::is_prime(entry.ring.at().slots);
            all.find(|(_, entry)| entry.listen == service.listen && has_slots(entry)).map(|(&index, _)| index)
        };
        let Some((index, _)) = index(before).zip(index(after)).filter(|(one, other)| one == other) else {
            continue;
        };
        let lives = |backend: &u32| {
            let address = before.backends.get(backend).map(address_of);
            let pool = &world.config.pools[&service.pool];
            let kept = |a| {
                world.verdicts[&service.pool]
                    .of(service.role)
                    .get(&a)
                    .is_none_or(|v| v.flows == FlowsOf::Keep)
            };
            address.is_some_and(|a| pool.backends.iter().any(|b| b.address == a) && kept(a))
        };
        let (was, is) = (&before.services[&index].ring, &after.services[&index].ring);
        if was.slots.len() != is.slots.len() {
            let all = || after.sides[&index].iter().map(|side| side.standing);
            assert!(was.slots.is_empty() || all().all(|standing| standing.before == Standing::BY_OLD_RING));
            assert!(was.slots.is_empty() || after.services[&index].old_ring.slots == was.slots);
            continue;
        }
        for slot in 0..is.slots.len() {
            let (old, new) = (default_of(before, index, slot), default_of(after, index, slot));
            if old != new && old.as_ref().is_some_and(lives) {
                let side = before.sides[&index][slot];
                let quiet = ticks_in(quiet);
                assert!(
                    world.now.since(side.standing.since) >= quiet,
                    "slot {slot} of {index}: {old:?} {new:?}"
                );
                assert!(world.now.since(side.lost_at) >= quiet, "slot {slot} of {index} lost one of late");
            }
            if !was.slots[slot].is_settled() && is.slots[slot].is_settled() {
                let side = before.sides[&index][slot];
                let elsewhere = world.now.since(side.last_elsewhere) >= ticks_in(quiet);
                let nobody = !old.as_ref().is_some_and(lives);
                assert!(elsewhere || nobody, "slot {slot} of {index} settles too early");
            }
        }
    }
}

/// Packets are sent elsewhere, and some connections cannot be written down.
fn packets(memory: &mut MemoryDataplane, dice: &mut Dice, now: Tick) {
    let rings: Vec<_> = observed(memory).services.values().map(|service| service.ring.clone()).collect();
    for (ring, first) in rings.iter().filter_map(|ring| Some((ring, ring.first_side?))) {
        for slot in 0..ring.at().slots {
            match dice.below(40) {
                0 => memory.side(first, slot).last_elsewhere = now,
                1 => memory.side(first, slot).lost_at = now,
                _ => {}
            }
        }
    }
}

/// Applies up to `most` operations, checking after each.
fn apply(memory: &mut MemoryDataplane, world: &World, most: usize) -> Plan {
    let before = observed(memory);
    let mut last = before.clone();
    let plan = plan(&world.desired(), &before).unwrap_or_else(|why| panic!("{why}"));
    // A service that packets reach looks as it did, or as it is to look.
    let mut shapes: BTreeMap<Listen, Vec<Shape>> = BTreeMap::new();
    for service in before.services.values() {
        shapes.entry(service.listen).or_default().push(shape(service, &before));
    }
    for service in world.config.services.values() {
        shapes.entry(service.listen).or_default().extend(world.wanted(service.listen));
    }
    // Where writes go, refusing comes before leading elsewhere; a plan may have been interrupted in between.
    let writes = |entry: &BackendEntry| {
        let listen = before.services.get(&entry.service).map(|service| service.listen);
        let mut services = world.config.services.values();
        services.any(|service| Some(service.listen) == listen && service.role == Some(Role::Primary))
    };
    let fenced = before.backends.iter().filter(|(_, entry)| entry.flows == FlowsOf::Cut || writes(entry));
    let may_be_fenced = fenced.map(|(&index, _)| index).collect();
    for op in plan.ops.iter().take(most) {
        memory.apply(op).unwrap_or_else(|why| panic!("{op:?}: {why}"));
        let now = observed(memory);
        check_whole(&now, &shapes, &may_be_fenced);
        check_slots(&last, &now, world);
        last = now;
    }
    plan
}

/// What waited for slots to come to rest is done by the plans after.
fn come_to_rest(memory: &mut MemoryDataplane, world: &World) {
    let rests = (0..10).any(|_| apply(memory, world, usize::MAX).ops.is_empty());
    assert!(rests, "it comes to an end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn every_operation_leaves_the_tables_whole(seed: u64, steps in 1usize..7) {
        let dice = &mut Dice(seed);
        let mut memory = MemoryDataplane::new(ROOMY);
        let mut rings = Rings::default();
        for _ in 0..steps {
            let before = observed(&memory);
            let world = World::rolled(dice, &before);
            let first = apply(&mut memory, &world, usize::MAX);
            let after = observed(&memory);
            check_done(&after, &before, &world);
            // Only what is spent may go on being freed.
            // What is remembered of rings makes no difference.
            let fresh = plan(&world.desired(), &before).unwrap();
            let known = plan_again(&world.desired(), &before, &mut rings).unwrap();
            prop_assert_eq!(fresh, known);
            let now = world.now;
            let again = plan(&World { spent: BTreeSet::new(), ..world }.desired(), &after).unwrap();
            // A ring that slots have just ceased to ask for is given up by the next plan, not by the same.
            let rest = |op: &&Op| !matches!(op, Op::SwitchOldRing { .. } | Op::Settle);
            // And one that waited for its slots to come to rest is resized by the next.
            if first.due.is_none_or(|due| !now.after(1).has_reached(due)) {
                prop_assert_eq!(again.ops.iter().find(rest), None, "a second plan is empty");
            }
            packets(&mut memory, dice, now);
            prop_assert!(first.ops.len() < 2000);
        }
    }

    /// Verdicts on some pools turn, some of them together, and nothing else changes.
    #[test]
    fn a_plan_for_verdicts_alone_is_the_whole_plan(seed: u64) {
        let dice = &mut Dice(seed);
        let mut memory = MemoryDataplane::new(ROOMY);
        let mut world = World::empty();
        for _ in 0..3 {
            world = World::rolled(dice, &observed(&memory));
            apply(&mut memory, &world, usize::MAX);
        }
        world.spent.clear();
        come_to_rest(&mut memory, &world);
        let mut rings = Rings::default();
        for _ in 0..4 {
            let mut turned = BTreeSet::new();
            for (pool, verdicts) in &mut world.verdicts {
                for verdict in verdicts.any.values_mut() {
                    if dice.chance(70) {
                        continue;
                    }
                    let flows = dice.pick(&[FlowsOf::Keep, FlowsOf::Keep, FlowsOf::Forget, FlowsOf::Cut]);
                    let usable = dice.chance(60);
                    let (dead, share) = (!usable && dice.chance(50), dice.pick(&[1, 5, 10, 10]));
                    *verdict = Verdict { usable, dead, flows, share };
                    turned.insert(pool.clone());
                }
                verdicts.primary.clone_from(&verdicts.any);
            }
            let before = observed(&memory);
            let short = plan_verdicts(&world.desired(), &before, &turned, &mut rings).unwrap();
            let whole = apply(&mut memory, &world, usize::MAX);
            prop_assert_eq!(short.map(|plan| plan.ops), Some(whole.ops));
            // What is due with the next tick, of pools that do not turn then, is for a whole plan.
            come_to_rest(&mut memory, &world);
        }
    }

    /// The daemon dies after any operation; the next one goes on from what it finds.
    #[test]
    fn a_plan_may_be_interrupted_anywhere(seed: u64) {
        let dice = &mut Dice(seed);
        let mut memory = MemoryDataplane::new(ROOMY);
        for _ in 0..6 {
            let world = World::rolled(dice, &observed(&memory));
            apply(&mut memory, &world, dice.below(60));
            packets(&mut memory, dice, world.now);
            // Whoever goes on waits first, as `Core::settle` does.
            memory.apply(&Op::Settle).unwrap();
        }
        let before = observed(&memory);
        let world = World::rolled(dice, &before);
        apply(&mut memory, &world, usize::MAX);
        check_done(&memory.tables().unwrap(), &before, &world);
    }

    /// With little room there is a plan or a sentence, and never a half-applied one.
    #[test]
    fn with_little_room_there_is_a_plan_or_a_reason(seed: u64) {
        let dice = &mut Dice(seed);
        let tight = Limits { flows: 1024, services: 5, backends: 24, ring_pages: 14, side_pages: 12, rules: 8 };
        let mut memory = MemoryDataplane::new(tight);
        for _ in 0..12 {
            let before = observed(&memory);
            let world = World::rolled(dice, &before);
            match plan(&world.desired(), &before) {
                Ok(_) => {
                    apply(&mut memory, &world, usize::MAX);
                    check_done(&memory.tables().unwrap(), &before, &world);
                }
                Err(why) => prop_assert!(why.to_string().contains("limits."), "{}", why),
            }
        }
    }
}

/// Applies it all and returns the tables.
fn applied(memory: &mut MemoryDataplane, world: &World) -> Tables {
    apply(memory, world, usize::MAX);
    memory.tables().unwrap()
}

#[test]
fn a_first_plan_goes_from_the_ground_up() {
    let mut world = World::with_backends(1);
    world.sources.insert(ip("10.0.0.1"), vec![ip("10.9.0.1")]);
    let plan = plan(&world.desired(), &Tables { limits: ROOMY, ..Tables::default() }).unwrap();
    let names: Vec<String> =
        plan.ops.iter().map(|op| format!("{op:?}").split([' ', '(']).next().unwrap().to_owned()).collect();
    assert_eq!(
        names,
        [
            "SetGlobals",
            "SetInterface",
            "WriteSource",
            "WriteBackend",
            "WritePages",
            "WriteService",
            "SwitchRing",
            "SetVip",
            "SetKey"
        ]
    );
}

#[test]
fn other_time_outs_are_counted_by_when_nobody_goes_by_the_former_ones() {
    let mut world = World::with_backends(1);
    let mut memory = MemoryDataplane::new(ROOMY);
    applied(&mut memory, &world);
    world.config.settings.idle.established *= 2;
    for (done, left) in [(0, 3), (1, 3), (2, 3), (3, 0)] {
        let mut memory = memory.clone();
        let ops = apply(&mut memory, &world, done).ops;
        assert!(matches!(ops.as_slice(), [Op::SetGlobals(_), Op::Settle, Op::CountAnew]), "{ops:?}");
        // Whoever died in between: the next one does it all.
        assert_eq!(apply(&mut memory, &world, usize::MAX).ops.len(), left, "after {done}");
        assert!(!memory.held().recount);
    }
}

#[test]
fn a_drain_changes_the_ring_and_nothing_of_the_backend() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = World::with_backends(3);
    let before = applied(&mut memory, &world);
    let drained = world.config.pools["web"].backends[1].address;
    world.verdicts.get_mut("web").unwrap().any.insert(drained, Verdict::RESTING);
    let ops = apply(&mut memory, &world, usize::MAX).ops;
    assert!(matches!(ops.as_slice(), [Op::WritePages { .. }, Op::SwitchRing { .. }, Op::Settle]), "{ops:?}");
    let after = memory.tables().unwrap();
    assert_eq!(after.backends, before.backends);
    assert!(!after.services[&0].ring.slots.contains(&Slot::settled(1)));
    assert_ne!(after.services[&0].ring.first_page, before.services[&0].ring.first_page);
}

#[test]
fn a_removed_backend_is_cut_then_freed_then_reused_with_another_generation() {
    let mut memory = MemoryDataplane::new(Limits { backends: 2, ..ROOMY });
    let mut world = World::with_backends(2);
    applied(&mut memory, &world);
    let gone = world.config.pools.get_mut("web").unwrap().backends.remove(0);
    let cut = applied(&mut memory, &world);
    assert_eq!((cut.backends[&0].flows, cut.backends[&0].generation), (FlowsOf::Cut, 1));

    let mut freed = memory.clone();
    world.spent.insert(0);
    let tables = applied(&mut freed, &world);
    assert_eq!(tables.freed, BTreeMap::from([(0, 1)]));
    world.spent.clear();
    world.config.pools.get_mut("web").unwrap().backends.push(backend(ip("10.0.0.77"), 1));
    world.all_healthy();
    let reused = applied(&mut freed, &world);
    assert_eq!((reused.backends[&0].address, reused.backends[&0].generation), (Some(ip("10.0.0.77")), 2));
    assert_eq!(reused.freed, BTreeMap::new());

    // Where nothing else is left, the retired entry is taken as it is.
    let taken = applied(&mut memory, &world);
    assert_eq!((taken.backends[&0].address, taken.backends[&0].generation), (Some(ip("10.0.0.77")), 2));

    // Who comes back in time keeps what it has.
    let mut memory = MemoryDataplane::from_tables(&cut);
    world.config.pools.get_mut("web").unwrap().backends[1] = gone;
    world.all_healthy();
    let back = applied(&mut memory, &world);
    assert_eq!((back.backends[&0].flows, back.backends[&0].generation), (FlowsOf::Keep, 1));
}

#[test]
fn limits_are_named_with_the_key_that_raises_them() {
    let reason = |world: &World, limits: Limits| {
        plan(&world.desired(), &Tables { limits, ..Tables::default() }).unwrap_err().to_string()
    };
    let mut world = World::with_backends(3);
    world.config.services.insert("other".to_owned(), service(LISTENERS[1], "web"));
    world.config.services.get_mut("shop").unwrap().deny =
        NETWORKS.iter().map(|network| network.parse().unwrap()).collect();
    let cases = [
        (Limits { services: 1, ..ROOMY }, "2 services are needed", "tables hold 1; raise limits.services"),
        (Limits { backends: 5, ..ROOMY }, "6 backends are needed", "tables hold 5; raise limits.backends"),
        (Limits { ring_pages: 7, ..ROOMY }, "8 pages of rings are needed", "hold 7; raise limits.ring_pages"),
        (Limits { rules: 4, ..ROOMY }, "5 firewall rules of one family are", "hold 4; raise limits.rules"),
    ];
    for (limits, needed, raise) in cases {
        let why = reason(&world, limits);
        assert!(why.contains(needed) && why.contains(raise), "{why}");
    }
}

#[test]
fn a_list_of_sources_grows_in_place_and_what_is_unknown_stays() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = World::with_backends(2);
    let both = [ip("10.0.0.1"), ip("10.0.0.2")];
    world.sources = both.iter().map(|&address| (address, vec![ip("10.9.0.1"), ip("10.9.0.2")])).collect();
    let before = applied(&mut memory, &world);
    assert_eq!(before.backends[&0].sources, SourceRun { first: 0, count: 2 });

    world.sources = both
        .iter()
        .map(|&address| (address, ["10.9.0.3", "10.9.0.1", "10.9.0.2"].map(ip).to_vec()))
        .collect();
    let grown = applied(&mut memory, &world);
    assert_eq!(grown.backends[&1].sources, SourceRun { first: 0, count: 3 });
    assert_eq!((grown.sources[&0].address, grown.sources[&2].address), (ip("10.9.0.1"), ip("10.9.0.3")));

    world.sources.clear();
    assert_eq!(applied(&mut memory, &world), grown);

    // One out of the middle: the others move together, and the old places are left.
    world.sources =
        both.iter().map(|&address| (address, ["10.9.0.1", "10.9.0.3"].map(ip).to_vec())).collect();
    let moved = applied(&mut memory, &world);
    let run = moved.backends[&0].sources;
    assert_eq!(run.count, 2);
    assert_eq!(moved.sources.values().filter(|source| source.address == ip("10.9.0.1")).count(), 1);
    assert_eq!(applied(&mut memory, &world), moved);

    world.config.settings.ports = PortRange { low: 20000, high: 20999 };
    let ports = applied(&mut memory, &world);
    assert_eq!(ports.sources[&run.first].ports.low, 20000);
    assert_eq!(ports.backends, moved.backends);
}

#[test]
fn a_list_of_sources_does_not_grow_over_another() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = World::with_backends(2);
    world.sources.insert(ip("10.0.0.1"), ["10.9.0.1", "10.9.0.2"].map(ip).to_vec());
    world.sources.insert(ip("10.0.0.2"), vec![ip("10.9.0.1")]);
    let before = applied(&mut memory, &world);
    assert_eq!(before.backends[&1].sources, SourceRun { first: 0, count: 1 });
    world.sources.insert(ip("10.0.0.2"), ["10.9.0.1", "10.9.0.3"].map(ip).to_vec());
    let why = plan(&world.desired(), &before).unwrap_err();
    assert!(matches!(why, PlanError::Sources { .. }), "{why}");
}

#[test]
fn two_groups_that_share_a_source_out_of_order_are_refused() {
    let mut world = World::with_backends(2);
    world.sources.insert(ip("10.0.0.1"), ["10.9.0.1", "10.9.0.2", "10.9.0.3"].map(ip).to_vec());
    world.sources.insert(ip("10.0.0.2"), ["10.9.0.1", "10.9.0.3"].map(ip).to_vec());
    let why = plan(&world.desired(), &Tables { limits: ROOMY, ..Tables::default() }).unwrap_err();
    assert!(matches!(why, PlanError::Sources { .. }), "{why}");
    // A part of a group that stands side by side is fine.
    world.sources.insert(ip("10.0.0.2"), ["10.9.0.2", "10.9.0.3"].map(ip).to_vec());
    let tables = applied(&mut MemoryDataplane::new(ROOMY), &world);
    assert_eq!(tables.backends[&1].sources, SourceRun { first: 1, count: 2 });
}

#[test]
fn services_with_the_same_rules_share_a_set() {
    let mut world = World::with_backends(1);
    world.config.services.get_mut("shop").unwrap().allow = vec!["10.0.0.0/8".parse().unwrap()];
    let mut other = service(LISTENERS[1], "web");
    other.allow = vec!["10.0.0.0/8".parse().unwrap()];
    world.config.services.insert("other".to_owned(), other);
    let tables = applied(&mut MemoryDataplane::new(ROOMY), &world);
    assert_eq!(tables.rules.len(), 1);
    let expected = Firewall { rule_set: Some(1), deny_others: true };
    assert!(tables.services.values().all(|service| service.firewall == expected));
}

#[test]
fn a_vip_that_loses_its_last_service_is_a_vip_no_more() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = World::with_backends(1);
    world.config.services.insert("all".to_owned(), service("203.0.113.10:*/udp", "web"));
    world.config.services.insert("other".to_owned(), service("203.0.113.11:80/tcp", "web"));
    let tables = applied(&mut memory, &world);
    assert_eq!(tables.vips[&ip("203.0.113.10")].any_udp, Some(0));
    world.config.services.remove("all");
    world.config.services.remove("other");
    let tables = applied(&mut memory, &world);
    assert_eq!(tables.vips, BTreeMap::from([(ip("203.0.113.10"), VipEntry::default())]));
    assert_eq!(tables.services.len(), 1);
}
