//! Random numbers from a seed, so that a failure can be played again.

/// A generator (xorshift64*; Vigna, "An experimental exploration of Marsaglia's xorshift generators").
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of this seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The seed that `LOBBY_SEED` says, or `otherwise`.
    ///
    /// # Panics
    /// When it says something else than a number.
    pub fn seed(otherwise: u64) -> u64 {
        std::env::var("LOBBY_SEED").map_or(otherwise, |seed| seed.parse().expect("LOBBY_SEED is a number"))
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub const fn below(&mut self, limit: u64) -> u64 {
        (((self.next() >> 32) * limit) >> 32) % limit
    }

    /// Whether something happens that does so in `percent` of cases.
    pub const fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}
