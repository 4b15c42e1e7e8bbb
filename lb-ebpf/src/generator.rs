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
        maps::{Array, PerCpuArray, ProgramArray},
        programs::XdpContext,
    };
    use lb_common::bench::{self, Order, WORDS};

    #[map]
    static ORDER: Array<Order> = Array::with_max_entries(1, BPF_F_MMAPABLE);
    #[map]
    static COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
    #[map]
    static NEXT: ProgramArray = ProgramArray::with_max_entries(1, 0);

    /// The frame as words of eight bytes, if it has so many.
    #[inline(always)]
    fn words(ctx: &XdpContext, number: usize) -> Option<*mut u64> {
        let (start, end) = (ctx.data(), ctx.data_end());
        (start + 8 * number <= end).then_some(start as *mut u64)
    }

    /// Writes the next frame and goes on to what is measured.
    #[xdp]
    pub(crate) fn generate(ctx: XdpContext) -> u32 {
        let (Some(order), Some(count)) = (ORDER.get(0), COUNT.get_ptr_mut(0)) else {
            return xdp_action::XDP_ABORTED;
        };
        let Some(frame) = words(&ctx, WORDS) else { return xdp_action::XDP_ABORTED };
        // SAFETY: this CPU's own value.
        let number = unsafe {
            *count = (*count).wrapping_add(1);
            *count
        };
        let flow = order.flow(number);
        let (address, port, checksum) = order.sender(flow);
        for (index, word) in order.template.iter().enumerate() {
            // SAFETY: within the frame, which a test run begins at a multiple of eight.
            unsafe { *frame.add(index) = word.get() };
        }
        let bytes = frame.cast::<u16>();
        let v6 = order.is_v6();
        let (address_at, ports_at, checksum_at) = if v6 {
            (bench::V6_ADDRESS, bench::V6_PORTS, order.checksum_at_v6())
        } else {
            (bench::V4_ADDRESS, bench::V4_PORTS, order.checksum_at_v4())
        };
        if ports_at > 64 || checksum_at > 76 || address_at > 64 {
            return xdp_action::XDP_ABORTED;
        }
        // SAFETY (all): offsets below the length that was checked, and even.
        unsafe {
            *bytes.add(address_at / 2) = address as u16;
            *bytes.add(address_at / 2 + 1) = (address >> 16) as u16;
            *bytes.add(ports_at / 2) = port;
            *bytes.add(checksum_at / 2) = checksum;
            if !v6 {
                *bytes.add(bench::V4_CHECKSUM / 2) = order.header_checksum(address);
            }
            NEXT.tail_call(&ctx, 0);
        }
        xdp_action::XDP_ABORTED
    }

    /// Sends every frame back as it is: what a run costs by itself.
    #[xdp]
    pub(crate) fn empty(_: XdpContext) -> u32 {
        xdp_action::XDP_TX
    }

    /// Writes as many bytes as translation does, without looking at anything, at IPv4's offsets.
    #[xdp]
    pub(crate) fn floor_v4(ctx: XdpContext) -> u32 {
        floor(&ctx, 26 / 2, 4, bench::V4_CHECKSUM / 2)
    }

    /// The same at IPv6's offsets.
    #[xdp]
    pub(crate) fn floor_v6(ctx: XdpContext) -> u32 {
        floor(&ctx, 22 / 2, 16, 20 / 2)
    }

    #[inline(always)]
    fn floor(ctx: &XdpContext, addresses: usize, length: usize, header: usize) -> u32 {
        let Some(frame) = words(ctx, WORDS) else { return xdp_action::XDP_ABORTED };
        let frame = frame.cast::<u16>();
        // SAFETY (all): constants below the length that was checked.
        unsafe {
            for index in 0..6 {
                *frame.add(index) = 0x0202;
            }
            *frame.add(header) = 0x0303;
            for index in 0..length {
                *frame.add(addresses + index) = 0x0404;
            }
            for index in 0..3 {
                *frame.add(addresses + length + index) = 0x0505;
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
