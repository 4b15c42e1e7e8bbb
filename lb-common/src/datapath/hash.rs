//! The two hashes: a keyed one over what clients choose, and a plain one over what operators choose.

use super::{family::Family, parse::Packet};
use crate::abi::{Config, Multipliers};

/// Hash of a connection as the client sees it, over source address, destination address, source port,
/// destination port and protocol.
///
/// Keyed, so that nobody who lacks the key can aim connections at one bucket or backend. In the manner of Carter
/// and Wegman: first two sums of products with secret multipliers, of which the upper halves are kept. Each is
/// universal ("multilinear", Lemire and Kaser, "Strongly universal string hashing is fast", 2014, section 2), so
/// two connections have the same 64 bits with a probability of at most 2⁻⁶² (2⁻³¹ for each half, since no secret
/// number is added to the sums), whichever they are. But what is near in a sum stays near, and an attacker could
/// find out by how much: so the sums are then stirred, by shifts and multipliers that are secret too. The stirring is
/// a bijection and brings no two together. It is no proven pseudo-random function; what an attacker sees of it is
/// which backend answers.
///
/// SipHash would need three times the instructions, a third of all that a packet costs.
#[inline(always)]
pub(crate) fn of_client<V: Family>(packet: &Packet<V>, multipliers: &Multipliers) -> u64 {
    keyed(packet, packet.ports, multipliers)
}

/// The same over both addresses and the protocol alone: of all connections of a client with a service.
#[inline(always)]
pub(crate) fn of_source<V: Family>(packet: &Packet<V>, multipliers: &Multipliers) -> u64 {
    keyed(packet, 0, multipliers)
}

#[inline(always)]
fn keyed<V: Family>(packet: &Packet<V>, ports: u32, multipliers: &Multipliers) -> u64 {
    // Protocols differ in the upper half of a sum, which no product of the other words takes back.
    let (mut high, mut low) = (u64::from(packet.protocol()) << 32, 0u64);
    let mut each = multipliers.each.iter();
    let mut add = |word: u32| {
        if let Some([for_high, for_low]) = each.next() {
            high = high.wrapping_add(for_high.get().wrapping_mul(u64::from(word)));
            low = low.wrapping_add(for_low.get().wrapping_mul(u64::from(word)));
        }
    };
    V::words(packet.source, packet.destination, |word| {
        add(word as u32);
        add((word >> 32) as u32);
    });
    add(ports);
    let mut hash = high & !0xffff_ffff | low >> 32;
    for last in &multipliers.last {
        hash = (hash ^ hash >> 32).wrapping_mul(last.get());
    }
    hash ^ hash >> 32
}

/// Sets the key of the 5-tuple's hash, and the multipliers that follow from it: those are the key's
/// SipHash-1-3 (Aumasson and Bernstein, 2012) of their numbers.
pub fn set_key(config: &Config, key: [u64; 2]) {
    let mut number = 0u64;
    let mut next = || {
        let mut sip = Sip::new(key);
        sip.write(number);
        // The last word of SipHash ends with the length in bytes.
        sip.write(8 << 56);
        number += 1;
        sip.finish()
    };
    let Multipliers { last, each } = &config.multipliers;
    for cell in last {
        cell.set(next() | 1);
    }
    for cell in each.as_flattened() {
        cell.set(next());
    }
    for (cell, key) in config.hash_key.iter().zip(key) {
        cell.set(key);
    }
}

/// Where the flows of a backend are that are sent from one source. Sixteen ports are a block, side by side, since
/// they are given out one after the other and a page of memory that was just looked at is near; block `b` is number
/// `base + stride * b`, modulo the size of the table.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    base: u32,
    /// Odd, so that no two blocks meet; and hashed, so that two lanes that meet soon part again: side by side
    /// they would fill one another's next places.
    stride: u32,
}

/// Ports of a block, as a power of two.
const BLOCK: u32 = 4;

impl Lane {
    /// As one number.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        self.base as u64 | (self.stride as u64) << 32
    }

    /// The opposite of [`Lane::to_word`].
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self { base: word as u32, stride: (word >> 32) as u32 }
    }

    /// Places side by side.
    #[inline(always)]
    pub const fn at(base: u32) -> Self {
        Self { base, stride: 1 }
    }

    /// The flow of a port, in a table of `mask + 1`.
    #[inline(always)]
    pub const fn flow(self, port: u32, mask: u32) -> u32 {
        let block = self.base.wrapping_add(self.stride.wrapping_mul(port >> BLOCK));
        (block << BLOCK | port & ((1 << BLOCK) - 1)) & mask
    }
}

/// The lane of a backend and a source.
///
/// Both addresses are the operator's, so this need not resist anybody; it only spreads.
#[inline(always)]
pub fn lane<V: Family>(backend: V::Address, port: u16, source: V::Address, protocol: u8, key: u64) -> Lane {
    // Multiplier of Steele and Vigna, "Computationally easy, spectrally good multipliers" (2021).
    const MULTIPLIER: u64 = 0xd134_2543_de82_ef95;
    let mut hash = key ^ with_protocol(u32::from(port), protocol);
    hash = hash.wrapping_mul(MULTIPLIER);
    V::words(backend, source, |word| {
        hash ^= hash >> 32;
        hash = (hash ^ word).wrapping_mul(MULTIPLIER);
    });
    // The last bytes of addresses are the uppermost of a word, and a product carries upwards only.
    let hash = (hash ^ (hash >> 32)).wrapping_mul(MULTIPLIER);
    let hash = (hash ^ (hash >> 32)).wrapping_mul(MULTIPLIER);
    Lane { base: (hash >> 32) as u32, stride: (hash >> 8) as u32 | 1 }
}

#[inline(always)]
fn with_protocol(ports: u32, protocol: u8) -> u64 {
    u64::from(ports) | u64::from(protocol) << 32
}

struct Sip([u64; 4]);

impl Sip {
    #[inline(always)]
    const fn new([k0, k1]: [u64; 2]) -> Self {
        Self([
            k0 ^ 0x736f_6d65_7073_6575,
            k1 ^ 0x646f_7261_6e64_6f6d,
            k0 ^ 0x6c79_6765_6e65_7261,
            k1 ^ 0x7465_6462_7974_6573,
        ])
    }

    #[inline(always)]
    const fn round(&mut self) {
        let [mut a, mut b, mut c, mut d] = self.0;
        a = a.wrapping_add(b);
        b = b.rotate_left(13) ^ a;
        a = a.rotate_left(32);
        c = c.wrapping_add(d);
        d = d.rotate_left(16) ^ c;
        a = a.wrapping_add(d);
        d = d.rotate_left(21) ^ a;
        c = c.wrapping_add(b);
        b = b.rotate_left(17) ^ c;
        c = c.rotate_left(32);
        self.0 = [a, b, c, d];
    }

    #[inline(always)]
    const fn write(&mut self, word: u64) {
        self.0[3] ^= word;
        self.round();
        self.0[0] ^= word;
    }

    #[inline(always)]
    const fn finish(mut self) -> u64 {
        self.0[2] ^= 0xff;
        self.round();
        self.round();
        self.round();
        self.0[0] ^ self.0[1] ^ self.0[2] ^ self.0[3]
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::{
        abi::{address_v4, address_v6},
        datapath::{
            family::{V4, V6},
            parse::{Parts, Shape},
        },
        wire::join,
    };
    use core::hash::Hasher;
    use proptest::prelude::*;
    use siphasher::sip::SipHasher13;
    use std::{collections::BTreeSet, vec::Vec};

    fn packet<V: Family>(source: V::Address, destination: V::Address, ports: [u16; 2]) -> Packet<V> {
        let shape = Shape::of(Parts { protocol: 6, ..Parts::default() });
        Packet { shape, source, destination, ports: join(ports), reserved: 0 }
    }

    fn multipliers(key: [u64; 2]) -> Multipliers {
        let config = Config::default();
        set_key(&config, key);
        config.multipliers
    }

    proptest! {
        #[test]
        fn multipliers_are_siphash_1_3_of_their_numbers(key: [u64; 2]) {
            let Multipliers { last, each } = multipliers(key);
            let cells = last.iter().chain(each.as_flattened());
            for (number, cell) in (0u64..).zip(cells) {
                let mut hasher = SipHasher13::new_with_keys(key[0], key[1]);
                hasher.write(&number.to_le_bytes());
                let odd = if number < 2 { 1 } else { 0 };
                prop_assert_eq!(cell.get(), hasher.finish() | odd);
            }
        }

        #[test]
        fn sums_of_products_then_stirring(key: [u64; 2], s6: [u8; 16], d6: [u8; 16], ports: [u16; 2]) {
            let Multipliers { last, each } = multipliers(key);
            let bytes = [&s6[..], &d6, &ports[0].to_le_bytes(), &ports[1].to_le_bytes()].concat();
            let words = bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
            let (mut high, mut low) = (6u128 << 32, 0u128);
            for (word, [a, b]) in words.zip(&each) {
                high += u128::from(a.get()) * u128::from(word);
                low += u128::from(b.get()) * u128::from(word);
            }
            let upper = |sum: u128| (sum as u64) >> 32;
            let mut hash = upper(high) << 32 | upper(low);
            for multiplier in last {
                hash = (hash ^ (hash >> 32)).wrapping_mul(multiplier.get());
            }
            let packet = packet::<V6>(address_v6(s6), address_v6(d6), ports);
            prop_assert_eq!(of_client(&packet, &multipliers(key)), hash ^ (hash >> 32));
        }
    }

    /// The hashes of all connections that differ from one another by little: consecutive addresses and ports.
    fn neighbours(key: [u64; 2]) -> Vec<u64> {
        let multipliers = multipliers(key);
        let clients = (0..64u16).flat_map(|address| (0..256u16).map(move |port| (address, port)));
        clients
            .map(|(address, port)| {
                let source = address_v4([10, 0, 0, address as u8]);
                let ports = [(30_000 + port).to_be(), 80u16.to_be()];
                of_client(&packet::<V4>(source, address_v4([203, 0, 113, 10]), ports), &multipliers)
            })
            .collect()
    }

    #[test]
    fn neighbours_are_spread_evenly() {
        // 16,384 connections over 64 places of 256 each: chi-squared has 63 degrees of freedom, and exceeds
        // 130 once in a million times. Of the upper bits, which choose a slot, and of the lower, which choose a
        // bucket.
        for key in 0..64 {
            let hashes = neighbours([key, !key]);
            for shift in [58, 32, 26, 0] {
                let mut places = [0i64; 64];
                for hash in &hashes {
                    places[(hash >> shift) as usize % 64] += 1;
                }
                let chi = places.iter().map(|number| (number - 256).pow(2)).sum::<i64>() / 256;
                assert!(chi < 130, "{chi} with key {key}, bits from {shift}");
            }
        }
    }

    #[test]
    fn each_bit_of_a_connection_changes_half_of_the_hash() {
        // 8 keys, 96 bits of input, 64 of output, 1,024 connections: the share of changes has a standard
        // deviation of 0.0156.
        for key in 0..8 {
            let multipliers = multipliers([key, 7]);
            let hash = |word: u128| {
                let [source, destination, ports] =
                    [word as u32, (word >> 32) as u32, (word >> 64) as u32].map(crate::wire::split);
                let address = |halves| join(halves);
                of_client(&packet::<V4>(address(source), address(destination), ports), &multipliers)
            };
            for bit in 0..96 {
                let mut changes = [0u32; 64];
                for number in 0..1024u128 {
                    let word = number * 0x0001_0002_0003_0005_0007_000b;
                    let changed = hash(word) ^ hash(word ^ 1 << bit);
                    for (place, count) in changes.iter_mut().enumerate() {
                        *count += (changed >> place) as u32 & 1;
                    }
                }
                for (place, count) in changes.iter().enumerate() {
                    assert!((400..624).contains(count), "{count} of bit {bit} in {place}, key {key}");
                }
            }
        }
    }

    #[test]
    fn lanes_of_neighbours_are_spread() {
        // 256 bases over 4,096 places: about 8 are met twice if they are random. In the upper bits of a
        // base as in the lower ones, since a table's size is a mask.
        for low in [true, false] {
            for of_source in [true, false] {
                let mut seen = BTreeSet::new();
                for last in 0..=255u8 {
                    let backend = address_v4([10, 0, 0, if of_source { 1 } else { last }]);
                    let source = address_v4([10, 0, 1, if of_source { last } else { 1 }]);
                    let base = lane::<V4>(backend, 80u16.to_be(), source, 6, 7).base;
                    seen.insert(if low { base & 0xfff } else { base >> 20 });
                }
                assert!(seen.len() > 235, "{} with low {low}, of_source {of_source}", seen.len());
            }
        }
    }

    #[test]
    fn lanes_that_meet_part_again() {
        // 64 backends with 64 blocks of ports each in 2^16 places for blocks: at random 4,096 blocks would meet 124
        // others.
        let mut seen = BTreeSet::new();
        let blocks = || (1024..1088).map(|block| block << BLOCK);
        let source = address_v4([10, 0, 1, 1]);
        for last in 0..64u8 {
            let backend = address_v4([10, 0, 0, last]);
            let lane = lane::<V4>(backend, 80u16.to_be(), source, 6, 7);
            seen.extend(blocks().map(|port| lane.flow(port, 0xf_ffff)));
        }
        assert!(seen.len() > 4096 - 170, "{}", seen.len());
        // Whichever two meet at all, they do not run beside one another.
        let lanes: Vec<BTreeSet<u32>> = (0..=255u8)
            .map(|last| {
                let lane = lane::<V4>(address_v4([10, 0, 0, last]), 80u16.to_be(), source, 6, 7);
                blocks().map(|port| lane.flow(port, 0xf_ffff)).collect()
            })
            .collect();
        let pairs =
            lanes.iter().enumerate().flat_map(|(n, one)| lanes[..n].iter().map(move |other| (one, other)));
        let shared = pairs.map(|(one, other)| one.intersection(other).count()).max();
        assert!(shared.is_some_and(|shared| shared <= 16), "{shared:?} of 64");
    }
}
