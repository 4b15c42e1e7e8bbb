//! Rings of another size.

use super::{world::*, *};

/// Slots that are tracked always never settle; one whose change is over is at rest as soon as a plan has said so.
#[test]
fn a_ring_waits_for_its_slots_to_rest_and_then_for_nothing_else() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = World::with_backends(2);
    let tracked = |size| Service {
        forward: Forward::Dsr,
        track: Track::Always,
        ring_size: Some(size),
        ..service(LISTENERS[0], "web")
    };
    world.config.services.insert("shop".into(), tracked(7));
    applied(&mut memory, &world);
    let second = world.config.pools["web"].backends[1].address;
    let quiet = world.config.services["shop"].quiet_time(&world.config.settings.idle).unwrap();
    let length = |memory: &MemoryDataplane| memory.held().services[&0].ring.slots.len();
    let old_length = |memory: &MemoryDataplane| memory.held().services[&0].old_ring.slots.len();

    // Its slots move, and cannot be resized meanwhile.
    world.verdicts.get_mut("web").unwrap().any.insert(second, Verdict::RESTING);
    applied(&mut memory, &world);
    world.config.services.insert("shop".into(), tracked(11));
    let moves = apply(&mut memory, &world, usize::MAX);
    assert_eq!((length(&memory), moves.due), (7, Some(world.now.after(ticks_in(quiet)))));

    world.now = world.now.after(ticks_in(quiet));
    let over = apply(&mut memory, &world, usize::MAX);
    assert_eq!((length(&memory), over.due), (7, Some(world.now.after(1))), "all rest");
    world.now = world.now.after(1);
    apply(&mut memory, &world, usize::MAX);
    assert_eq!((length(&memory), old_length(&memory)), (11, 7));

    // And again: the old ring is given up before the next one takes its place.
    world.config.services.insert("shop".into(), tracked(13));
    apply(&mut memory, &world, usize::MAX);
    assert_eq!((length(&memory), old_length(&memory)), (11, 7), "its slots ask");
    world.now = world.now.after(ticks_in(quiet));
    let sizes: Vec<_> = (0..3)
        .map(|_| {
            apply(&mut memory, &world, usize::MAX);
            world.now = world.now.after(1);
            (length(&memory), old_length(&memory))
        })
        .collect();
    assert_eq!(sizes, [(11, 7), (11, 0), (13, 11)]);
}

/// Four turns, or one: no ring of a service that does not translate has so many slots.
#[test]
fn whoever_dies_while_a_service_turns_to_translation_leaves_no_ring_for_who_turns_back() {
    for backends in [1u32, 4] {
        let mut memory = MemoryDataplane::new(ROOMY);
        let mut world = World::with_backends(backends);
        let direct = Service { forward: Forward::Dsr, ring_size: Some(7), ..service(LISTENERS[0], "web") };
        let in_turn = Service { scheduler: Scheduler::RoundRobin, ..service(LISTENERS[0], "web") };
        world.config.services.insert("shop".into(), direct.clone());
        applied(&mut memory, &world);
        world.config.services.insert("shop".into(), in_turn);
        let ops = plan(&world.desired(), &observed(&memory)).unwrap().ops;
        let turns = ops.iter().position(|op| matches!(op, Op::SwitchMode { .. })).unwrap();
        apply(&mut memory, &world, turns);
        memory.apply(&Op::Settle).unwrap();
        let left = &memory.held().services[&0];
        assert_eq!((left.mode.direct, left.ring.slots.len()), (true, backends as usize));
        world.config.services.insert("shop".into(), direct);
        applied(&mut memory, &world);
        assert_eq!(
            shape(&memory.held().services[&0], memory.held()),
            world.wanted(LISTENERS[0].parse().unwrap()).unwrap()
        );
    }
}

#[test]
fn a_small_ring_goes_where_a_large_one_had_no_room() {
    let mut memory = MemoryDataplane::new(Limits { ring_pages: 6, ..ROOMY });
    let mut world = World::with_backends(2);
    world.config.services.get_mut("shop").unwrap().ring_size = Some(101);
    applied(&mut memory, &world);
    // Its second ring is beside the first, whose page is free then.
    let drained = world.config.pools["web"].backends[1].address;
    world.verdicts.get_mut("web").unwrap().any.insert(drained, Verdict::RESTING);
    applied(&mut memory, &world);
    world.config.services.insert("large".to_owned(), service(LISTENERS[1], "web"));
    let small = Service { ring_size: Some(101), ..service(LISTENERS[4], "web") };
    world.config.services.insert("small".to_owned(), small);
    let pages: Vec<u32> =
        applied(&mut memory, &world).services.values().map(|service| service.ring.first_page).collect();
    assert_eq!(pages, [1, 2, 0]);
}
