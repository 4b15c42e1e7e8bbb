//! Words of memory that several CPUs, and the daemon, read and write at the same time.
//!
//! Map values live in memory that no borrow checker sees: two CPUs may handle packets of one flow at
//! once, and the daemon has the same pages mapped. Everything in such a value is therefore a
//! [`Shared`] word, read and written as a whole and in program order. What must change together with
//! something else is either in the same word, or guarded by one (see [`crate::datapath::flow`]).

#![expect(unsafe_code, reason = "volatile access to memory that others write; the only such place")]

use core::cell::UnsafeCell;

/// One naturally aligned word (at most 8 bytes) of memory shared between CPUs.
///
/// Loads and stores are single instructions on every 64-bit machine that runs BPF, so a reader sees
/// the value before or the value after, never a mixture. Volatile, so that the compiler keeps their
/// order; x86 keeps the order of loads and of stores too. Read-modify-write goes through
/// [`crate::tables::Tables::swap`], since BPF needs its own instruction for it.
#[repr(transparent)]
pub struct Shared<T: Copy>(UnsafeCell<T>);

// SAFETY: all access goes through `get` and `set`, each one load or store of a whole machine word.
unsafe impl<T: Copy + Send> Sync for Shared<T> {}

impl<T: Copy> Shared<T> {
    /// A word with this value.
    pub const fn new(value: T) -> Self {
        const { assert!(size_of::<T>() <= 8 && align_of::<T>() == size_of::<T>()) };
        Self(UnsafeCell::new(value))
    }

    /// The value now.
    #[inline(always)]
    pub fn get(&self) -> T {
        // SAFETY: valid and aligned by construction; one whole word.
        unsafe { self.0.get().read_volatile() }
    }

    /// Replaces the value.
    #[inline(always)]
    pub fn set(&self, value: T) {
        // SAFETY: valid and aligned by construction; one whole word.
        unsafe { self.0.get().write_volatile(value) }
    }

    /// Where the word is, for the compare-and-swap of [`crate::tables::Tables`].
    #[inline(always)]
    pub const fn as_ptr(&self) -> *mut T {
        self.0.get()
    }
}

#[cfg(any(test, feature = "user", feature = "sim"))]
impl Shared<u64> {
    /// Replaces `old` by `new`, on the host, as one step that no CPU can come between; `false`: it was
    /// something else.
    pub fn swap(&self, old: u64, new: u64) -> bool {
        use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
        // SAFETY: valid and aligned by construction, and whatever else touches the word does so as a whole.
        let word = unsafe { AtomicU64::from_ptr(self.as_ptr()) };
        word.compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }
}

impl<T: Copy + Default> Default for Shared<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: Copy> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(UnsafeCell::new(self.get()))
    }
}

impl<T: Copy + core::fmt::Debug> core::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.get().fmt(f)
    }
}

impl<T: Copy + PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}
