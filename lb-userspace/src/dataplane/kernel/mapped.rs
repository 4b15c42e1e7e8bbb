//! Array maps as memory of this process: the same pages that the program reads, so that a change is one
//! store of one word.

#![expect(unsafe_code, reason = "memory shared with the kernel; the only such place in userspace")]

use std::{io, ops::Deref, os::fd::BorrowedFd, ptr::NonNull};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use lb_common::{abi, shared::Shared};

/// Types that may be seen as words shared with other CPUs.
///
/// # Safety
/// `repr(C)`, every bit pattern valid, and every field a [`Shared`] word.
pub(super) unsafe trait Words {}

macro_rules! words {
    ($($name:ty),+) => {
        // SAFETY: `repr(C)` with nothing but `Shared` words inside, see its definition.
        $(unsafe impl Words for $name {})+
    };
}
words!(
    abi::Config,
    abi::Listeners,
    abi::Service,
    abi::Page,
    abi::SidePage,
    abi::Records,
    abi::Backend,
    abi::Source,
    abi::Flow,
    Shared<u64>
);

/// The values of an array map.
#[derive(Debug)]
pub(super) struct Mapped<T: Words> {
    pointer: NonNull<T>,
    entries: usize,
}

// SAFETY: plain shared memory, all access through `Shared` words.
unsafe impl<T: Words> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T: Words> Sync for Mapped<T> {}

impl<T: Words> Mapped<T> {
    /// Maps the values of an array map made with `BPF_F_MMAPABLE` (Linux 5.5).
    pub(super) fn new(map: BorrowedFd<'_>, entries: u32) -> io::Result<Self> {
        // The kernel puts values 8 bytes apart at least.
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let entries = entries as usize;
        let length = (entries * size_of::<T>()).try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else is in its place.
        let pointer = unsafe { mmap(None, length, access, flags, map, 0) }?.cast();
        Ok(Self { pointer, entries })
    }
}

impl<T: Words> Deref for Mapped<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: mapped for as long as `self` lives, page aligned, `entries` values long; `Words` are
        // valid whatever is there, and may change at any time.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.entries) }
    }
}

impl<T: Words> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody borrows from it any more. It cannot fail then.
        let _ = unsafe { munmap(self.pointer.cast(), self.entries * size_of::<T>()) };
    }
}

/// Waits until every program that runs now has ended: an RCU grace period (membarrier(2)).
pub(super) fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: a system call on plain numbers.
    match unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
