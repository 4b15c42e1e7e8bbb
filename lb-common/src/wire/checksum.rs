//! The internet checksum (RFC 1071), changed rather than computed anew (RFC 1624).
//!
//! The sum is the same whichever byte order the words are read in, as long as it is written back in
//! the same one (RFC 1071 section 2 (B)): so words are read as they lie in memory, and nothing is ever
//! swapped.

/// A running ones' complement sum of words in memory order.
///
/// Sixty-four bits hold more than a billion 32-bit words before the carry would be lost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds 32 bits.
    #[inline(always)]
    pub const fn add_u32(self, word: u32) -> Self {
        Self(self.0.wrapping_add(word as u64))
    }

    /// Adds 64 bits.
    #[inline(always)]
    pub const fn add_u64(self, word: u64) -> Self {
        self.add_u32(word as u32).add_u32((word >> 32) as u32)
    }

    /// Adds 16 bits.
    #[inline(always)]
    pub const fn add_u16(self, word: u16) -> Self {
        self.add_u32(word as u32)
    }

    /// Adds what another sum holds.
    #[inline(always)]
    pub const fn add(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// Counts `old` out and `new` in: the `~m + m'` of RFC 1624 equation 3.
    #[inline(always)]
    pub const fn replace_u16(self, old: u16, new: u16) -> Self {
        self.add_u16(!old).add_u16(new)
    }

    /// The same for 32 bits.
    #[inline(always)]
    pub const fn replace_u32(self, old: u32, new: u32) -> Self {
        self.add_u32(!old).add_u32(new)
    }

    /// The same for 64 bits.
    #[inline(always)]
    pub const fn replace_u64(self, old: u64, new: u64) -> Self {
        self.add_u64(!old).add_u64(new)
    }

    /// The sum in sixteen bits.
    #[inline(always)]
    const fn fold(self) -> u16 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        sum as u16
    }

    /// The checksum of what was added.
    #[inline(always)]
    pub const fn checksum(self) -> u16 {
        !self.fold()
    }

    /// The checksum that replaces `old` after the changes counted here: RFC 1624 equation 3,
    /// `HC' = ~(~HC + ~m + m')`.
    #[inline(always)]
    pub const fn update(self, old: u16) -> u16 {
        self.add_u16(!old).checksum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn checksum(bytes: &[u8]) -> u16 {
        bytes
            .chunks(2)
            .fold(Sum::default(), |sum, w| sum.add_u16(u16::from_ne_bytes([w[0], w[1]])))
            .checksum()
    }

    #[test]
    fn the_example_of_rfc_1071() {
        // RFC 1071 section 3: the sum is ddf2, so the checksum is its complement.
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            u16::from_ne_bytes([0x22, 0x0d])
        );
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // RFC 1624 section 4: a field 5555 becomes 3285 where the checksum was dd2f: the new one is 0000,
        // not ffff as equation 2 would have it.
        let sum =
            Sum::default().replace_u16(u16::from_ne_bytes([0x55, 0x55]), u16::from_ne_bytes([0x32, 0x85]));
        assert_eq!(sum.update(u16::from_ne_bytes([0xdd, 0x2f])), 0);
    }

    proptest! {
        #[test]
        fn an_update_is_the_sum_anew(mut bytes: [u8; 40], new: u64, at in 0usize..4) {
            let before = checksum(&bytes);
            let at = at * 8;
            let old = u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
            bytes[at..at + 8].copy_from_slice(&new.to_ne_bytes());
            // All zero is the one input whose sum has two forms; a real header is never that.
            prop_assume!(bytes.iter().any(|b| *b != 0) && before != 0xffff);
            prop_assert_eq!(Sum::default().replace_u64(old, new).update(before), checksum(&bytes));
        }
    }
}
