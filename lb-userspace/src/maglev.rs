//! Rings: which slot leads to which backend.
//!
//! [`ring()`] is Maglev (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer",
//! NSDI 2016, section 3.4) with weights: each backend walks the slots in an order of its own and takes
//! the next free one when it is its turn. Turns come as often as the weight says, and each backend stops
//! at its share, so every share is exact to a slot. Orders come from the backends' addresses alone: the
//! same document gives the same ring on every machine, in whatever order it lists the backends.
//!
//! [`turns`] is the ring of a round-robin service: its slots are taken one after the other.

use std::{cmp::Reverse, net::IpAddr};

use crate::model::BackendAddress;

/// Slots of a ring of up to [`FEW`] backends: Maglev wants about a hundred for each.
pub const SMALL: u32 = 4093;
/// Slots of a ring of more backends.
pub const LARGE: u32 = 65521;
/// Most backends of a [`SMALL`] ring.
pub const FEW: usize = 40;

/// A backend that takes part in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// What its order of slots comes from.
    pub address: BackendAddress,
    /// Its share, against the others'.
    pub weight: u16,
}

/// Size of the ring for a pool of so many backends. All backends count, usable or not, so that health
/// does not change it.
pub fn size_for(backends: usize) -> u32 {
    if backends <= FEW { SMALL } else { LARGE }
}

/// For each slot, the position in `members` of the backend it leads to; empty when nobody has weight.
///
/// `size` must be prime, else some slots may be out of some backends' reach, and the last free one may never be
/// found; the document is checked for it.
pub fn ring(members: &[Member], size: u32) -> Vec<u32> {
    debug_assert!(is_prime(size), "{size} slots are out of reach of one another");
    let mut walkers = walkers(members, size);
    if walkers.is_empty() || size < 2 {
        return Vec::new();
    }
    const FREE: u32 = u32::MAX;
    let mut slots = vec![FREE; size as usize];
    let heaviest = walkers.iter().map(|walker| walker.weight).max().unwrap_or(1);

    // Who takes a slot in which round: the heaviest one each round, the others as their weight allows.
    let round_of =
        |walker: &Walker| (u64::from(walker.taken + 1) * heaviest).div_ceil(walker.weight) as usize;
    let mut calendar = Calendar::of(walkers.len());
    for (number, walker) in walkers.iter().enumerate().filter(|(_, walker)| walker.quota > 0) {
        calendar.enter(round_of(walker), number);
    }
    let mut round = 0;
    while let Some(line) = calendar.rounds.get(round) {
        let mut next = line.map(|(first, _)| first);
        while let Some(number) = next {
            next = calendar.behind[number].take();
            let walker = &mut walkers[number];
            while slots[walker.cursor as usize] != FREE {
                walker.step(size);
            }
            slots[walker.cursor as usize] = walker.position;
            walker.taken += 1;
            if walker.taken < walker.quota {
                calendar.enter(round_of(walker), number);
            }
        }
        round += 1;
    }
    slots
}

/// Who has a turn in which round, each in one to come: a line for each round, by who stands behind whom.
struct Calendar {
    /// The first and the last of each round's line.
    rounds: Vec<Option<(usize, usize)>>,
    behind: Vec<Option<usize>>,
}

impl Calendar {
    fn of(walkers: usize) -> Self {
        Self { rounds: Vec::new(), behind: vec![None; walkers] }
    }

    fn enter(&mut self, round: usize, number: usize) {
        if self.rounds.len() <= round {
            self.rounds.resize(round + 1, None);
        }
        let line = &mut self.rounds[round];
        *line = match *line {
            None => Some((number, number)),
            Some((first, last)) => {
                self.behind[last] = Some(number);
                Some((first, number))
            }
        };
    }
}

/// The positions in `members` in the order of their turns, each as often as its weight says and as
/// evenly spread as can be; at most [`LARGE`] turns, for which great weights are rounded.
pub fn turns(members: &[Member]) -> Vec<u32> {
    let weights = members.iter().map(|member| u64::from(member.weight));
    let divisor = weights.clone().fold(0, gcd).max(1);
    let sum = weights.clone().sum::<u64>() / divisor;
    let scaled = |weight: u64| match weight / divisor {
        weight if sum <= u64::from(LARGE) || weight == 0 => weight,
        weight => (weight * u64::from(LARGE) / sum).max(1),
    };
    let mut turns: Vec<(u64, u64, u32)> = Vec::new();
    for (position, weight) in (0..).zip(weights.map(scaled)) {
        turns.extend((0..weight).map(|turn| (2 * turn + 1, weight, position)));
    }
    // Turn k of n stands in the middle of the k-th n-th of the round: compare (2k+1)/2n as fractions.
    turns.sort_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1)).then(a.2.cmp(&b.2)));
    turns.into_iter().map(|(_, _, position)| position).collect()
}

/// Whether a number is prime.
pub fn is_prime(number: u32) -> bool {
    let candidates = (2..).take_while(|&divisor| u64::from(divisor).pow(2) <= u64::from(number));
    number >= 2 && candidates.into_iter().all(|divisor: u32| !number.is_multiple_of(divisor))
}

/// A number that depends on an address, and on nothing else, for ever.
pub fn hash_of(address: BackendAddress, seed: u64) -> u64 {
    let words = match address {
        BackendAddress::Local => [0, 0, 1 << 32],
        BackendAddress::Remote(ip, port) => {
            let bits = match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
                IpAddr::V6(v6) => v6.to_bits(),
            };
            [(bits >> 64) as u64, bits as u64, port.map_or(2 << 32, u64::from)]
        }
    };
    words.into_iter().fold(mix(seed), |hash, word| mix(hash ^ word))
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
/// OOPSLA 2014): every bit of the input reaches every bit of the output.
pub fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A backend on its way through the slots.
struct Walker {
    position: u32,
    weight: u64,
    /// Decides among equals, so that nothing depends on the document's order.
    rank: u64,
    /// The slot it comes to next.
    cursor: u32,
    /// From one slot to the next.
    skip: u32,
    quota: u32,
    taken: u32,
}

impl Walker {
    fn step(&mut self, size: u32) {
        // `skip` is below the size, so one subtraction is the remainder.
        let next = u64::from(self.cursor) + u64::from(self.skip);
        let size = u64::from(size);
        self.cursor = (if next >= size { next - size } else { next }) as u32;
    }
}

/// Those with weight, in an order of their own, with their quotas.
fn walkers(members: &[Member], size: u32) -> Vec<Walker> {
    let sum: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
    let slots = u64::from(size);
    let mut walkers: Vec<Walker> = (0..)
        .zip(members)
        .filter(|(_, member)| member.weight > 0 && size >= 2)
        .map(|(position, member)| Walker {
            position,
            weight: u64::from(member.weight),
            rank: hash_of(member.address, 1),
            cursor: (hash_of(member.address, 2) % slots) as u32,
            skip: (hash_of(member.address, 3) % (slots - 1)) as u32 + 1,
            quota: (slots * u64::from(member.weight) / sum) as u32,
            taken: 0,
        })
        .collect();
    // What the rounding down left over goes to those who lost most by it.
    let given: u64 = walkers.iter().map(|walker| u64::from(walker.quota)).sum();
    walkers.sort_by_key(|walker| (Reverse(slots * walker.weight % sum), walker.rank));
    for walker in walkers.iter_mut().take((slots - given) as usize) {
        walker.quota += 1;
    }
    walkers
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn member(number: u32, weight: u16) -> Member {
        let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number);
        Member { address: BackendAddress::Remote(ip.into(), Some(8080)), weight }
    }

    fn equal(count: u32) -> Vec<Member> {
        (0..count).map(|number| member(number, 1)).collect()
    }

    /// The address each slot leads to.
    fn addresses(members: &[Member], size: u32) -> Vec<BackendAddress> {
        ring(members, size).into_iter().map(|position| members[position as usize].address).collect()
    }

    /// The part of the ring that moved though shares did not ask for it: all slots that changed hands,
    /// less those that somebody had to gain.
    fn disruption(before: &[Member], after: &[Member], size: u32) -> f64 {
        let (old, new) = (addresses(before, size), addresses(after, size));
        let mut gains = BTreeMap::new();
        let mut changed = 0;
        for (old, new) in old.iter().zip(&new) {
            changed += i64::from(old != new);
            *gains.entry(new).or_insert(0i64) += 1;
            *gains.entry(old).or_insert(0i64) -= 1;
        }
        let gained: i64 = gains.into_values().filter(|&gain| gain > 0).sum();
        (changed - gained) as f64 / f64::from(size)
    }

    fn check_shares(members: &[Member], size: u32) {
        let ring = ring(members, size);
        let sum: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
        if sum == 0 {
            assert!(ring.is_empty());
            return;
        }
        assert_eq!(ring.len(), size as usize);
        let mut counts = vec![0u64; members.len()];
        for position in ring {
            counts[position as usize] += 1;
        }
        for (member, count) in members.iter().zip(counts) {
            let share = u64::from(size) * u64::from(member.weight);
            assert!(share / sum <= count && count <= share.div_ceil(sum), "{member:?} has {count} of {size}");
        }
    }

    proptest! {
        #[test]
        fn each_backend_has_its_share_to_a_slot(
            weights in prop::collection::vec(0u16..=1000, 0..60),
            size in prop::sample::select(vec![2u32, 7, 101, SMALL]),
        ) {
            let members: Vec<_> = (0..).zip(weights).map(|(number, weight)| member(number, weight)).collect();
            check_shares(&members, size);
        }

        #[test]
        fn the_order_in_the_document_does_not_matter(
            members in Just((0u32..30).map(|n| member(n, (n % 4) as u16)).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let sorted: Vec<_> = (0u32..30).map(|n| member(n, (n % 4) as u16)).collect();
            prop_assert_eq!(addresses(&members, SMALL), addresses(&sorted, SMALL));
        }

        #[test]
        fn turns_are_as_many_as_weights_and_evenly_spread(weights in prop::collection::vec(0u16..=9, 1..12)) {
            let members: Vec<_> = (0..).zip(&weights).map(|(number, &weight)| member(number, weight)).collect();
            let turns = turns(&members);
            let divisor = weights.iter().fold(0, |a, &b| gcd(a, u64::from(b))).max(1);
            let total = turns.len();
            for (position, &weight) in (0u32..).zip(&weights) {
                let at: Vec<_> = (0..total).filter(|&turn| turns[turn] == position).collect();
                prop_assert_eq!(at.len() as u64, u64::from(weight) / divisor);
                // After every turn nobody is further ahead or behind its share than one turn for each rival.
                for upto in 0..=total {
                    let had = at.iter().filter(|&&turn| turn < upto).count() as f64;
                    let due = upto as f64 * at.len() as f64 / total.max(1) as f64;
                    prop_assert!((had - due).abs() <= members.len() as f64 / 2.0 + 1.0, "{turns:?}");
                }
            }
        }
    }

    #[test]
    fn large_rings_are_even_too() {
        check_shares(&equal(1000), LARGE);
        let uneven: Vec<_> = (0..500).map(|number| member(number, (number % 1000 + 1) as u16)).collect();
        check_shares(&uneven, LARGE);
    }

    /// The very slots, so that a change of the algorithm, which would move every connection of every
    /// user once, cannot come in unnoticed.
    #[test]
    fn the_same_document_gives_the_same_ring_everywhere() {
        let members = [member(1, 1), member(2, 2), member(3, 1)];
        assert_eq!(ring(&members, 13), PINNED);
        let v6 = BackendAddress::Remote("2001:db8::1".parse().unwrap(), None);
        assert_eq!(hash_of(v6, 1), PINNED_V6);
        assert_eq!(hash_of(BackendAddress::Local, 1), PINNED_LOCAL);
    }
    const PINNED: [u32; 13] = [1, 2, 1, 0, 1, 2, 1, 2, 1, 1, 1, 0, 0];
    const PINNED_V6: u64 = 0x2624_6b4b_1c65_8cb2;
    const PINNED_LOCAL: u64 = 0x5df9_bdf1_07b8_cf5d;

    /// Measured, worst of ten backends tried, in hundredths of the ring, beyond what the shares ask for:
    ///
    /// | slots | backends | one added | one removed | weight one more |
    /// |---|---|---|---|---|
    /// | 4093 | 10 | 1.7 | 1.3 | 1.2 |
    /// | 4093 | 40 | 2.3 | 2.3 | 2.1 |
    /// | 65521 | 100 | 0.6 | 0.6 | 0.6 |
    /// | 65521 | 1000 | 0.6 | 0.6 | 0.7 |
    /// | 4093 | 40, weights 1 to 3 | 2.1 | 2.3 | 2.0 |
    #[test]
    fn few_slots_move_without_need() {
        let uneven = |count| (0..count).map(|number| member(number, (number % 3 + 1) as u16)).collect();
        for (size, before, bound) in [
            (SMALL, equal(10), 0.03),
            (SMALL, equal(40), 0.03),
            (LARGE, equal(100), 0.01),
            (LARGE, equal(1000), 0.01),
            (SMALL, uneven(40), 0.03),
        ] {
            let count = before.len() as u32;
            for victim in (0..count).step_by(count as usize / 10) {
                let mut added = before.clone();
                added.push(member(count + victim, 1));
                let mut removed = before.clone();
                removed.remove(victim as usize);
                let mut reweighted = before.clone();
                reweighted[victim as usize].weight += 1;
                for (what, after) in [("add", added), ("remove", removed), ("reweight", reweighted)] {
                    let moved = disruption(&before, &after, size);
                    assert!(moved <= bound, "{what} {victim} of {count} in {size}: {moved}");
                }
            }
        }
    }

    #[test]
    fn equal_backends_take_turns_in_the_order_of_the_document() {
        assert_eq!(turns(&equal(3)), [0, 1, 2]);
        assert_eq!(turns(&[member(1, 10), member(2, 20), member(3, 0)]), [1, 0, 1]);
        assert_eq!(turns(&[member(1, 5), member(2, 1), member(3, 1)]), [0, 0, 0, 1, 2, 0, 0]);
        assert!(turns(&[]).is_empty());
        let many: Vec<_> = (0..300).map(|number| member(number, 1000 - (number % 7) as u16)).collect();
        assert!(turns(&many).len() <= LARGE as usize);
    }

    #[test]
    fn primes_are_prime() {
        assert!(is_prime(SMALL) && is_prime(LARGE) && is_prime(2) && is_prime(101));
        assert!(![0, 1, 4, 100, 4095, 65535].into_iter().any(is_prime));
    }
}
