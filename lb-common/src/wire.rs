//! What frames look like: headers as plain structs of bytes, and the one way to get at them.
//!
//! All multi-byte fields are in network byte order, as they lie in memory. Where two are only compared
//! or copied they stay so; a number is made of one only where it counts or orders something.

#![expect(unsafe_code, reason = "the marker for types that any bytes may be read as")]

// Words are cut and joined by shifts.
const _: () = assert!(cfg!(target_endian = "little"), "Lobby is for little-endian machines");

pub mod checksum;
pub mod eth;
pub mod ip;
pub mod l4;

/// Types that may be laid over any bytes of a frame, at an even offset.
///
/// A frame begins at an even address, and every header in it at an even offset. More is not certain: an IP
/// header lies at two modulo four. So headers are packed to two bytes, and their fields are as wide as the
/// numbers they hold: the kernel lets BPF read packets in whole words at any address wherever the processor can
/// (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`, which 64-bit x86 and ARM have), and the linker is told so.
///
/// # Safety
///
/// Alignment of at most 2, no padding, and valid whatever the bytes are.
pub unsafe trait Wire: Copy {}

// SAFETY: an array has no padding of its own.
unsafe impl<T: Wire, const N: usize> Wire for [T; N] {}
// SAFETY: a number is valid whatever the bytes are.
unsafe impl Wire for u8 {}
// SAFETY: a number is valid whatever the bytes are.
unsafe impl Wire for u16 {}

/// Declares headers to be [`Wire`], each with its length, so that padding is noticed.
macro_rules! wire {
    ($($name:ty = $length:literal),+ $(,)?) => {$(
        const _: () = assert!(size_of::<$name>() == $length && align_of::<$name>() <= 2);
        // SAFETY: made of bytes and 16-bit words only; no padding, as the length says.
        unsafe impl $crate::wire::Wire for $name {}
    )+};
}
pub(crate) use wire;

/// Two 16-bit words as one of 32 bits, all in memory order.
#[inline(always)]
pub const fn join([first, second]: [u16; 2]) -> u32 {
    first as u32 | (second as u32) << 16
}

/// The opposite of [`join`].
#[inline(always)]
pub const fn split(word: u32) -> [u16; 2] {
    [word as u16, (word >> 16) as u16]
}

/// How far from the beginning of a frame a header may begin. A variable offset must have a bound that
/// the verifier sees, and a byte is one.
pub const REACH: usize = u8::MAX as usize;

/// One Ethernet frame.
pub trait Frame {
    /// Its length in bytes.
    fn len(&self) -> usize;

    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy of what lies at `offset`, which is even and at most [`REACH`]; `None` if it is not all there.
    fn read<T: Wire>(&self, offset: usize) -> Option<T>;

    /// What lies at `offset`, which is even and at most
    /// [`REACH`], to be changed; `None` if it is not all there.
    fn at<T: Wire>(&mut self, offset: usize) -> Option<&mut T>;
}
