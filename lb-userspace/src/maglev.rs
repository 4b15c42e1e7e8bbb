//! Rings.

/// Whether a number is prime.
pub fn is_prime(number: u32) -> bool {
    number >= 2
        && (2..)
            .take_while(|divisor| u64::from(*divisor) * u64::from(*divisor) <= u64::from(number))
            .all(|divisor| !number.is_multiple_of(divisor))
}
