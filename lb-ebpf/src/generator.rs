//! For the packet benchmark: a generator that goes in front of the program, and what it is compared with.
//!
//! `BPF_PROG_TEST_RUN` repeats a program on the frame as the last run left it, so a translating program
//! would see its own output. The generator writes each frame anew from a template, gives it the addresses
//! of one of many flows, and tail-calls what is measured.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bpf {
    use aya_ebpf::{
        bindings::{BPF_F_MMAPABLE, xdp_action},
        macros::{map, xdp},
        maps::{Array, LruHashMap, PerCpuArray, ProgramArray},
        programs::XdpContext,
    };
    use lb_common::bench::{self, Ends, LINES, LISTED, Order, WORDS};

    #[map]
    static ORDER: Array<Order> = Array::with_max_entries(1, BPF_F_MMAPABLE);
    #[map]
    static LIST: Array<[u64; 2]> = Array::with_max_entries(LISTED, 0);
    #[map]
    static COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
    #[map]
    static NEXT: ProgramArray = ProgramArray::with_max_entries(1, 0);

    // Both as large as `lb_common::bench` says where something is compared with them.
    #[map]
    static LINE: Array<[u64; 8]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
    #[map]
    static LRU: LruHashMap<[u64; 2], u64> = LruHashMap::with_max_entries(1, 0);
    /// What was not as it is for most: connections that were not in that table, and those that could not be put there.
    #[map]
    static ODD: Array<[u64; 2]> = Array::with_max_entries(1, 0);

    /// The frame as words of eight bytes, if it has so many.
    #[inline(always)]
    fn words(ctx: &XdpContext, number: usize) -> Option<*mut u64> {
        let (start, end) = (ctx.data(), ctx.data_end());
        (start + 8 * number <= end).then_some(start as *mut u64)
    }

    /// What to generate, where, and the number of the frame.
    #[inline(always)]
    fn next(ctx: &XdpContext) -> Option<(&'static Order, *mut u64, u64)> {
        let (order, count) = (ORDER.get(0)?, COUNT.get_ptr_mut(0)?);
        let frame = words(ctx, WORDS)?;
        // SAFETY: this CPU's own value.
        let number = unsafe {
            *count = (*count).wrapping_add(1);
            *count
        };
        Some((order, frame, number))
    }

    /// Writes the transport's checksum into a frame of [`WORDS`], and goes on to what is measured.
    #[inline(always)]
    fn finish(ctx: &XdpContext, order: &Order, frame: *mut u64, checksum: u16) -> u32 {
        let checksum_at = order.checksum_at();
        if checksum_at > 76 {
            return xdp_action::XDP_ABORTED;
        }
        // SAFETY: an offset below the length that was checked, and even.
        unsafe {
            *frame.cast::<u16>().add(checksum_at / 2) = checksum;
            NEXT.tail_call(ctx, 0);
        }
        xdp_action::XDP_ABORTED
    }

    /// Writes the next frame and goes on to what is measured.
    #[xdp]
    pub(crate) fn generate(ctx: XdpContext) -> u32 {
        let Some((order, frame, number)) = next(&ctx) else { return xdp_action::XDP_ABORTED };
        let flow = order.flow(number);
        let (address, port, checksum) = order.sender(flow);
        if order.is_v6() {
            write::<{ bench::V6_ADDRESS }, { bench::V6_PORTS }>(frame, order, address, port, 0);
        } else {
            let header = order.header_checksum_change(address);
            write::<{ bench::V4_ADDRESS }, { bench::V4_PORTS }>(frame, order, address, port, header);
        }
        finish(&ctx, order, frame, checksum)
    }

    /// Writes the next of the frames that are listed and goes on to what is measured.
    #[xdp]
    pub(crate) fn generate_listed(ctx: XdpContext) -> u32 {
        let Some((order, frame, number)) = next(&ctx) else { return xdp_action::XDP_ABORTED };
        let Some(&ends) = LIST.get(order.flow(number) as u32) else { return xdp_action::XDP_ABORTED };
        for (index, word) in order.template.iter().enumerate() {
            // SAFETY: within the length that was checked.
            unsafe { *frame.add(index) = word.get() };
        }
        let (ends, halves) = (Ends::from_words(ends), frame.cast::<u16>());
        // SAFETY (all): even offsets below the length that was checked.
        unsafe {
            if order.is_v6() {
                write_ends::<{ bench::V6_ADDRESS }, 16, { bench::V6_PORTS }>(halves, ends);
            } else {
                *halves.add(bench::V4_CHECKSUM / 2) = ends.header_checksum;
                write_ends::<{ bench::V4_ADDRESS }, 4, { bench::V4_PORTS }>(halves, ends);
            }
        }
        finish(&ctx, order, frame, ends.checksum)
    }

    /// Writes both addresses, which are so many bytes apart, and the destination port.
    ///
    /// # Safety
    /// The frame must have so many bytes.
    #[inline(always)]
    unsafe fn write_ends<const ADDRESS: usize, const APART: usize, const PORTS: usize>(
        frame: *mut u16,
        ends: Ends,
    ) {
        // SAFETY (all): as the caller says.
        unsafe {
            for (at, word) in [(ADDRESS, ends.source), (ADDRESS + APART, ends.destination)] {
                *frame.add(at / 2) = word as u16;
                *frame.add(at / 2 + 1) = (word >> 16) as u16;
            }
            *frame.add(PORTS / 2 + 1) = ends.port;
        }
    }

    /// Writes the template word by word, with an address and a port where it has zeros. `before` are the two
    /// bytes in front of the address, as what they differ by.
    #[inline(always)]
    fn write<const ADDRESS: usize, const PORTS: usize>(
        frame: *mut u64,
        order: &Order,
        address: u32,
        port: u16,
        before: u16,
    ) {
        const { assert!(ADDRESS % 8 == 2 && PORTS % 2 == 0, "each within one word") };
        for (index, word) in order.template.iter().enumerate() {
            let mut word = word.get();
            if index == ADDRESS / 8 {
                word ^= u64::from(address) << 16 | u64::from(before);
            }
            if index == PORTS / 8 {
                word |= u64::from(port) << (PORTS % 8 * 8);
            }
            // SAFETY: within the frame, which a test run begins at a multiple of eight.
            unsafe { *frame.add(index) = word };
        }
    }

    /// Sends every frame back as it is: what a run costs by itself.
    #[xdp]
    pub(crate) fn empty(_: XdpContext) -> u32 {
        xdp_action::XDP_TX
    }

    /// Writes the bytes that translation does, without looking at anything: both MAC addresses, and from the
    /// IPv4 header's checksum on it, both addresses, both ports and two bytes more, as many as a checksum has.
    #[xdp]
    pub(crate) fn floor_v4(ctx: XdpContext) -> u32 {
        floor::<24, 40>(&ctx)
    }

    /// The same at IPv6's offsets, where the hop limit, in two bytes, comes before the addresses.
    #[xdp]
    pub(crate) fn floor_v6(ctx: XdpContext) -> u32 {
        floor::<20, 60>(&ctx)
    }

    /// The floor, and before it one cache line of a large table, found by the connection: what waiting for memory takes.
    /// The next frame follows from what is there, or the processor would not wait but go on with that one.
    #[xdp]
    pub(crate) fn line_v4(ctx: XdpContext) -> u32 {
        let Some([addresses, ports]) = connection(&ctx) else { return xdp_action::XDP_ABORTED };
        // Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3, section 6.4).
        let hash = (addresses << 32 | ports).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let line = LINE.get((hash >> (64 - LINES.ilog2())) as u32);
        let Some((line, count)) = line.zip(COUNT.get_ptr_mut(0)) else { return xdp_action::XDP_ABORTED };
        // SAFETY: this CPU's own value.
        unsafe { *count = (*count).wrapping_add(line[0]) };
        floor::<24, 40>(&ctx)
    }

    /// The floor, and before it the connection's entry in the kernel's own table that forgets whom it has not seen
    /// for longest (`BPF_MAP_TYPE_LRU_HASH`, Linux' `kernel/bpf/hashtab.c`), which is made where there is none.
    #[xdp]
    pub(crate) fn lru_v4(ctx: XdpContext) -> u32 {
        let Some(connection) = connection(&ctx) else { return xdp_action::XDP_ABORTED };
        // SAFETY: nothing is done with the value but to look at it once.
        let known = unsafe { LRU.get(&connection) }.copied();
        if known.is_none() {
            let is_refused = LRU.insert(&connection, &1, 0).is_err();
            let Some(odd) = ODD.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
            // SAFETY: one CPU measures.
            unsafe {
                (*odd)[0] += 1;
                (*odd)[1] += u64::from(is_refused);
            }
        }
        if known.unwrap_or(1) == 1 { floor::<24, 40>(&ctx) } else { xdp_action::XDP_ABORTED }
    }

    /// Both addresses, the source in the lower half; both ports, and a zero for the protocol. Whole words: the verifier
    /// wants them aligned on the stack.
    #[inline(always)]
    fn connection(ctx: &XdpContext) -> Option<[u64; 2]> {
        let halves = words(ctx, WORDS)?.cast::<u16>();
        let word = |at: usize| {
            // SAFETY: even constants below the length that was checked.
            unsafe { u64::from(*halves.add(at / 2)) | u64::from(*halves.add(at / 2 + 1)) << 16 }
        };
        Some([word(bench::V4_ADDRESS) | word(bench::V4_ADDRESS + 4) << 32, word(bench::V4_PORTS)])
    }

    /// Writes the first twelve bytes and those in between, in words as wide as their places allow.
    #[inline(always)]
    fn floor<const FROM: usize, const TO: usize>(ctx: &XdpContext) -> u32 {
        const { assert!(FROM % 4 == 0 && TO % 4 == 0) };
        // No two bytes alike, or the compiler makes of it a call that fills byte by byte.
        const WORD: u64 = 0x0807_0605_0403_0201;
        let Some(frame) = words(ctx, WORDS) else { return xdp_action::XDP_ABORTED };
        let halves = frame.cast::<u32>();
        // SAFETY (all): constants below the length that was checked.
        unsafe {
            *frame = WORD;
            *halves.add(2) = WORD as u32;
            if FROM % 8 == 4 {
                *halves.add(FROM / 4) = WORD as u32;
            }
            for index in FROM.div_ceil(8)..TO / 8 {
                *frame.add(index) = WORD;
            }
            if TO % 8 == 4 {
                *halves.add(TO / 4 - 1) = WORD as u32;
            }
        }
        xdp_action::XDP_TX
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
