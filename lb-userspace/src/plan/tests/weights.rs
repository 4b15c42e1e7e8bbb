//! Which slots are whose, as weights and health say.

use super::{world::*, *};

#[test]
fn a_share_is_a_share_of_the_weight() {
    let mut memory = MemoryDataplane::new(ROOMY);
    let mut world = World::with_backends(3);
    applied(&mut memory, &world);
    let slots_of_last = |tables: &Tables| {
        let ring = &tables.services[&0].ring.slots;
        (ring.iter().filter(|slot| slot.backend() == 2).count() as f64, ring.len() as f64)
    };
    let last = world.config.pools["web"].backends[2].address;
    for share in [1, 5, Verdict::WHOLE] {
        let verdict = Verdict { share, ..Verdict::USABLE };
        world.verdicts.get_mut("web").unwrap().any.insert(last, verdict);
        let (own, all) = slots_of_last(&applied(&mut memory, &world));
        let wanted = f64::from(share) / f64::from(2 * Verdict::WHOLE + share);
        assert!((own / all - wanted).abs() < 2.0 / all, "{own} of {all} for {share} tenths");
    }
}
