//! The two hashes: a keyed one over what clients choose, and a plain one over what operators choose.

use super::{family::Family, parse::Packet};

/// Hash of a connection as the client sees it: SipHash-1-3 (Aumasson and Bernstein, 2012) over source
/// address, destination address, source port, destination port and protocol, 13 or 37 bytes.
///
/// Keyed, so that nobody who lacks the key can aim connections at one bucket or backend.
#[inline(never)]
pub(crate) fn of_client<V: Family>(packet: &Packet<V>, key: u64, second_key: u64) -> u64 {
    let mut sip = Sip::new([key, second_key]);
    V::words(packet.source, packet.destination, |word| sip.write(word));
    let length: u64 = if V::V6 { 37 } else { 13 };
    sip.write(with_protocol(packet.ports, packet.protocol) | length << 56);
    sip.finish()
}

/// Where the flows of a backend are that are sent from one source: that of port `p` is number
/// `base + stride * p`, modulo the size of the table.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    base: u32,
    /// Odd, so that no two ports meet; and hashed, so that two lanes that meet soon part again: side by side
    /// they would fill one another's next places.
    stride: u32,
}

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
        self.base.wrapping_add(self.stride.wrapping_mul(port)) & mask
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
        datapath::family::{V4, V6},
        wire::join,
    };
    use core::hash::Hasher;
    use proptest::prelude::*;
    use siphasher::sip::SipHasher13;

    fn packet<V: Family>(source: V::Address, destination: V::Address, ports: [u16; 2]) -> Packet<V> {
        Packet {
            source,
            destination,
            ports: join(ports),
            l4: 0,
            l4_length: 0,
            l3: 0,
            protocol: 6,
            tcp_flags: 0,
            ttl: 1,
            fragment: false,
            tagged: false,
        }
    }

    fn reference(key: [u64; 2], parts: &[&[u8]]) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(key[0], key[1]);
        hasher.write(&parts.concat());
        hasher.finish()
    }

    proptest! {
        #[test]
        fn is_siphash_1_3(key: [u64; 2], s4: [u8; 4], d4: [u8; 4], s6: [u8; 16], d6: [u8; 16], ports: [u16; 2]) {
            let [sp, dp] = [ports[0].to_ne_bytes(), ports[1].to_ne_bytes()];
            prop_assert_eq!(
                of_client(&packet::<V4>(address_v4(s4), address_v4(d4), ports), key[0], key[1]),
                reference(key, &[&s4, &d4, &sp, &dp, &[6]])
            );
            prop_assert_eq!(
                of_client(&packet::<V6>(address_v6(s6), address_v6(d6), ports), key[0], key[1]),
                reference(key, &[&s6, &d6, &sp, &dp, &[6]])
            );
        }
    }

    #[test]
    fn lanes_of_neighbours_are_spread() {
        // 256 bases over 4,096 places: about 8 are met twice if they are random. In the upper bits of a
        // base as in the lower ones, since a table's size is a mask.
        for low in [true, false] {
            for of_source in [true, false] {
                let mut seen = std::collections::BTreeSet::new();
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
        // 64 backends with 64 ports each in 2^16 places: at random 4,096 flows would meet 124 others.
        let mut seen = std::collections::BTreeSet::new();
        for last in 0..64u8 {
            let (backend, source) = (address_v4([10, 0, 0, last]), address_v4([10, 0, 1, 1]));
            let lane = lane::<V4>(backend, 80u16.to_be(), source, 6, 7);
            seen.extend((1024..1088).map(|port| lane.flow(port, 0xffff)));
        }
        assert!(seen.len() > 4096 - 170, "{}", seen.len());
    }
}
