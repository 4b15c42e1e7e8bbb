//! Packets of clients: IPv4, TCP or UDP without a word in it.

use std::{hash::Hasher as _, sync::LazyLock};

use lb_common::{abi, wire::l4::Tcp};
use siphasher::sip::SipHasher13;

use crate::world::VIP;

/// Port of the service.
pub const PORT: u16 = 80;
/// Key of the hash that chooses slots.
pub const HASH_KEY: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];

/// A client's address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client(pub u32, pub u16);

/// A packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// Who sends it.
    pub client: Client,
    /// TCP's sequence number.
    pub sequence: u32,
    /// TCP's control bits.
    pub flags: u8,
    /// It is a datagram, without number and bits.
    pub datagram: bool,
}

impl Packet {
    /// Whether it asks for a new connection.
    pub fn is_syn(&self) -> bool {
        self.flags == Tcp::SYN
    }

    fn protocol(&self) -> u8 {
        if self.datagram { abi::UDP } else { abi::TCP }
    }

    /// The hash of its connection, by another implementation than the program's: sums of products with
    /// multipliers, the upper half of each, then the two last multipliers.
    pub fn hash(&self) -> u64 {
        static MULTIPLIERS: LazyLock<[u64; 8]> = LazyLock::new(|| {
            std::array::from_fn(|number| {
                let mut hasher = SipHasher13::new_with_keys(HASH_KEY[0], HASH_KEY[1]);
                hasher.write(&(number as u64).to_le_bytes());
                hasher.finish() | u64::from(number < 2)
            })
        });
        let [first, second, multipliers @ ..] = *MULTIPLIERS;
        let [p0, p1] = self.client.1.to_be_bytes();
        let [q0, q1] = PORT.to_be_bytes();
        let words = [self.client.0.to_be_bytes(), VIP.octets(), [p0, p1, q0, q1]];
        let sum = |of: usize, begin: u128| {
            let products = words.iter().zip(multipliers.chunks(2));
            let sum = products.fold(begin, |sum, (word, pair)| {
                sum + u128::from(u32::from_le_bytes(*word)) * u128::from(pair[of])
            });
            (sum >> 32) as u32
        };
        let both = u64::from(sum(0, u128::from(self.protocol()) << 32)) << 32 | u64::from(sum(1, 0));
        let stirred = [first, second].into_iter().fold(both, |hash, multiplier| {
            let product = u128::from(hash ^ (hash >> 32)) * u128::from(multiplier);
            product as u64
        });
        stirred ^ (stirred >> 32)
    }

    /// Writes it over a frame. Checksums are zero: a packet that is not translated is not looked at so
    /// closely.
    pub fn write(&self, frame: &mut Vec<u8>) {
        frame.clear();
        frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00]);
        let length = if self.datagram { 28 } else { 40 };
        frame.extend([0x45, 0, 0, length, 0, 0, 0x40, 0, 64, self.protocol(), 0, 0]);
        frame.extend(self.client.0.to_be_bytes());
        frame.extend(VIP.octets());
        frame.extend(self.client.1.to_be_bytes());
        frame.extend(PORT.to_be_bytes());
        if self.datagram {
            frame.extend([0, 8, 0, 0]);
            return;
        }
        frame.extend(self.sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, self.flags, 0x20, 0, 0, 0, 0, 0]);
    }
}
