//! The packet: all access to it, and nothing else.

use aya_ebpf::programs::XdpContext;
use lb_common::wire::{Frame, REACH, Wire};

/// A frame in the driver's buffer.
///
/// `data` and `data_end` are read once: the verifier does arithmetic on the pointers it has seen
/// compared, not on ones that are fetched again.
pub(crate) struct PacketFrame {
    start: usize,
    end: usize,
}

impl PacketFrame {
    #[inline(always)]
    pub(crate) fn new(ctx: &XdpContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }

    /// Its length in bytes. Behind a veil: the compiler would subtract the halves of the pointers where
    /// it needs but half of the length, which the verifier forbids.
    #[inline(always)]
    pub(crate) fn length(&self) -> usize {
        core::hint::black_box(self.end - self.start)
    }

    /// The only place where an offset becomes a pointer: bounded first, then compared with the end.
    #[inline(always)]
    fn pointer<T: Wire>(&self, offset: usize) -> Option<*mut T> {
        if offset > REACH || self.start + offset + size_of::<T>() > self.end {
            return None;
        }
        Some((self.start + offset) as *mut T)
    }
}

impl Frame for PacketFrame {
    #[inline(always)]
    fn len(&self) -> usize {
        self.length()
    }

    #[inline(always)]
    fn read<T: Wire>(&self, offset: usize) -> Option<T> {
        // SAFETY: within the packet, and `Wire` types are valid for any bytes, and at even offsets aligned.
        self.pointer::<T>(offset).map(|pointer| unsafe { *pointer })
    }

    #[inline(always)]
    fn at<T: Wire>(&mut self, offset: usize) -> Option<&mut T> {
        // SAFETY: as in `read`; the frame is borrowed for as long as the reference lives.
        self.pointer::<T>(offset).map(|pointer| unsafe { &mut *pointer })
    }
}
