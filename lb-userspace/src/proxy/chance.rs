//! Numbers as if drawn, for choices that nobody gains from guessing, and for the numbers of requests.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

/// A sequence of numbers; each worker has one.
#[derive(Debug)]
pub struct Chance(AtomicU64);

impl Chance {
    /// A sequence of its own.
    pub fn new() -> Self {
        Self(AtomicU64::new(RandomState::new().hash_one(std::process::id())))
    }

    /// The next number.
    pub fn next(&self) -> u64 {
        // The odd number nearest to 2^64 / φ, as splitmix64 has it: the sequence comes by every number once.
        mix(self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed))
    }
}

impl Default for Chance {
    fn default() -> Self {
        Self::new()
    }
}

/// Spreads a number's bits (splitmix64).
pub fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
