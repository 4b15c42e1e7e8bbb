//! The entry point, and what a verdict means to XDP.

use aya_ebpf::{bindings::xdp_action, helpers, macros::xdp, programs::XdpContext};
use lb_common::{
    abi::{Clock, Config, Tick},
    datapath,
    tables::Tables as _,
    verdict::Verdict,
};

use crate::{frame::PacketFrame, maps::Maps};

/// The kernel's own clock.
#[derive(Clone, Copy)]
struct KernelClock;

impl Clock for KernelClock {
    #[inline(always)]
    fn now(self) -> Tick {
        // SAFETY: a helper without arguments; coarse (up to 7 ms late) is enough for ticks of 67 ms.
        Tick::from_ns(unsafe { helpers::generated::bpf_ktime_get_coarse_ns() })
    }
}

/// The program.
#[xdp]
pub(crate) fn lobby(ctx: XdpContext) -> u32 {
    let mut frame = PacketFrame::new(&ctx);
    let ingress = ctx.ingress_ifindex() as u32;
    let verdict = datapath::decide(&mut frame, &Maps, ingress, KernelClock);
    #[cfg(feature = "trace")]
    aya_log_ebpf::info!(&ctx, "interface {}: {}", ingress, verdict.name());
    match verdict {
        Verdict::ToBackend { interface } | Verdict::ToClient { interface } => send(interface, ingress),
        Verdict::Reset { length, .. } => {
            let excess = (frame.length() as i32).wrapping_sub(i32::from(length));
            // SAFETY: a helper on our own context; the frame is not used after it.
            if excess > 0 && unsafe { helpers::generated::bpf_xdp_adjust_tail(ctx.ctx, -excess) } != 0 {
                return xdp_action::XDP_DROP;
            }
            send(ingress, ingress)
        }
        Verdict::Pass(_) => xdp_action::XDP_PASS,
        Verdict::Drop(_) => xdp_action::XDP_DROP,
    }
}

/// Sends the frame out by an interface.
#[inline(always)]
fn send(interface: u32, ingress: u32) -> u32 {
    let tx = Maps.config().is_some_and(|config| config.flags.get() & Config::SAME_INTERFACE_TX != 0);
    if tx && interface == ingress {
        return xdp_action::XDP_TX;
    }
    // SAFETY: a helper on plain numbers.
    unsafe { helpers::generated::bpf_redirect(interface, 0) as u32 }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing above panics: the verifier would not load a loop without an end.
    loop {}
}

/// Some helpers are for programs under a licence compatible with the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
