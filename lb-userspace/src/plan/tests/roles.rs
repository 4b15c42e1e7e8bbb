//! Services of which one backend takes writes: nobody gets any before the one before is cut.

use super::{world::*, *};
use crate::{health::PoolVerdicts, model::Role};

/// Two backends, of which `primary` has the writes.
fn led_by(primary: usize) -> World {
    let mut world = World::with_backends(2);
    world.config.services.get_mut("shop").unwrap().role = Some(Role::Primary);
    lead(&mut world, primary);
    world
}

fn lead(world: &mut World, primary: usize) {
    let cut = Verdict { flows: FlowsOf::Cut, ..Verdict::RESTING };
    let verdict = |number| if number == primary { Verdict::USABLE } else { cut };
    let backends = world.config.pools["web"].backends.iter().enumerate();
    let primary = backends.map(|(number, backend)| (backend.address, verdict(number))).collect();
    world.verdicts.insert("web".to_owned(), PoolVerdicts { primary, ..PoolVerdicts::default() });
}

/// Every order of operations that is right has the old one cut, and no packet that has not seen it, before
/// anything leads to the new one.
fn check_order(ops: &[Op], old: u32, new: u32) {
    let position = |wanted: &dyn Fn(&Op) -> bool| ops.iter().position(wanted);
    let cut = position(
        &|op| matches!(op, Op::WriteBackend { index, backend } if *index == old && backend.flows == FlowsOf::Cut),
    );
    let opened = position(
        &|op| matches!(op, Op::WriteBackend { index, backend } if *index == new && backend.flows == FlowsOf::Keep),
    );
    let switched = position(&|op| matches!(op, Op::SwitchRing { .. }));
    let settled = position(&|op| matches!(op, Op::Settle));
    assert!(cut.is_some() && cut < settled, "{ops:?}");
    assert!(settled < opened && opened < switched, "{ops:?}");
}

#[test]
fn the_old_primary_is_cut_before_the_new_one_gets_a_connection() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = led_by(0);
    let before = applied(&mut memory, &world);
    assert!(before.services[&0].ring.slots.iter().all(|slot| slot.backend() == 0));
    lead(&mut world, 1);
    let mut short = memory.clone();
    let ops = apply(&mut memory, &world, usize::MAX).ops;
    check_order(&ops, 0, 1);
    // The same where only verdicts are looked at, which is how a probe's answer takes effect.
    let pools = BTreeSet::from(["web".to_owned()]);
    let plan = plan_verdicts(&world.desired(), &short.tables().unwrap(), &pools, &mut Rings::default());
    let plan = plan.unwrap().expect("nothing but verdicts has changed");
    check_order(&plan.ops, 0, 1);
    for op in &plan.ops {
        short.apply(op).unwrap();
    }
    assert_eq!(short.tables().unwrap(), memory.tables().unwrap());
    assert!(short.tables().unwrap().services[&0].ring.slots.iter().all(|slot| slot.backend() == 1));
}

#[test]
fn an_old_primary_that_is_taken_out_of_the_document_is_cut_first_too() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = led_by(0);
    applied(&mut memory, &world);
    world.config.pools.get_mut("web").unwrap().backends.remove(0);
    lead(&mut world, 0);
    let ops = apply(&mut memory, &world, usize::MAX).ops;
    check_order(&ops, 0, 1);
}

#[test]
fn without_a_primary_nothing_is_led_anywhere() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = led_by(0);
    applied(&mut memory, &world);
    // It is silent: nobody gets new connections, and those that there are stay.
    let silent = world.config.pools["web"].backends[0].address;
    world.verdicts.get_mut("web").unwrap().primary.insert(silent, Verdict::RESTING);
    let tables = applied(&mut memory, &world);
    assert!(tables.services[&0].ring.slots.is_empty());
    assert_eq!(tables.backends[&0].flows, FlowsOf::Keep);
    // It says that it is none: what there is goes too.
    lead(&mut world, usize::MAX);
    let ops = apply(&mut memory, &world, usize::MAX).ops;
    assert!(matches!(ops.as_slice(), [Op::WriteBackend { index: 0, .. }, Op::Settle]), "{ops:?}");
}

#[test]
fn while_clients_are_to_wait_there_is_no_moment_at_which_they_are_refused() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = led_by(0);
    world.verdicts.get_mut("web").unwrap().holds = true;
    let tables = applied(&mut memory, &world);
    assert!(tables.services[&0].mode.holds, "while there is a primary too");
    let silent = world.config.pools["web"].backends[0].address;
    world.verdicts.get_mut("web").unwrap().primary.insert(silent, Verdict::RESTING);
    let tables = applied(&mut memory, &world);
    assert!(tables.services[&0].ring.slots.is_empty() && tables.services[&0].mode.holds);
    // The time is over: they are told.
    world.verdicts.get_mut("web").unwrap().holds = false;
    let mut short = memory.clone();
    let ops = apply(&mut memory, &world, usize::MAX).ops;
    let refuses = |op: &Op| matches!(op, Op::SwitchMode { service: 0, mode } if !mode.holds);
    assert!(matches!(ops.as_slice(), [op] if refuses(op)), "{ops:?}");
    let pools = BTreeSet::from(["web".to_owned()]);
    let plan = plan_verdicts(&world.desired(), &short.tables().unwrap(), &pools, &mut Rings::default());
    assert_eq!(plan.unwrap().expect("nothing but verdicts has changed").ops, ops);
    short.apply(&ops[0]).unwrap();
    assert!(!short.tables().unwrap().services[&0].mode.holds);
    // Those that do not ask for the primary are refused at once, as ever.
    world.verdicts.get_mut("web").unwrap().holds = true;
    world.config.services.get_mut("shop").unwrap().role = Some(Role::Replica);
    assert!(!applied(&mut memory, &world).services[&0].mode.holds);
}
