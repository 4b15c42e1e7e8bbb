//! What frames look like: headers as plain structs of bytes, and the one way to get at them.
//!
//! All multi-byte fields are in network byte order, as they lie in memory. Where two are only compared
//! or copied they stay so; a number is made of one only where it counts or orders something. Ports are
//! `u16` in memory order for that reason.

#![expect(unsafe_code, reason = "the marker for types that any bytes may be read as")]

pub mod checksum;
pub mod eth;
pub mod ip;
pub mod l4;

/// Types that may be laid over any bytes of a frame.
///
/// # Safety
///
/// Alignment 1, no padding, and valid whatever the bytes are.
pub unsafe trait Wire: Copy {}

// SAFETY (all): bytes are bytes.
unsafe impl Wire for u8 {}
unsafe impl<const N: usize> Wire for [u8; N] {}

/// One Ethernet frame.
pub trait Frame {
    /// Its length in bytes.
    fn len(&self) -> usize;

    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy of what lies at `offset`; `None` if it is not all there.
    fn read<T: Wire>(&self, offset: usize) -> Option<T>;

    /// What lies at `offset`, to be changed; `None` if it is not all there.
    fn at<T: Wire>(&mut self, offset: usize) -> Option<&mut T>;
}
