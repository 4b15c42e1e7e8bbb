//! Answering a TCP segment with a reset, so that a client knows at once.

use super::{Context, family::Family, parse::Packet};
use crate::{
    abi::TCP,
    tables::Tables,
    verdict::{DropReason, ResetReason, Verdict},
    wire::{Frame, checksum::Sum, eth::Eth, l4::Tcp},
};

/// Makes the frame into a reset for its sender (RFC 9293 section 3.10.7.1), within this second's
/// budget.
///
/// A function of its own also in BPF: few packets come here, and their stack must not be everybody's.
#[inline(never)]
pub(crate) fn answer<V: Family, T: Tables>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    reason: ResetReason,
    context: &Context<'_, T>,
) -> Verdict {
    if packet.tcp_flags() & Tcp::RST != 0 {
        return DropReason::StrayReset.into();
    }
    if !context.tables.spend_reset(context.now, context.config.resets_per_second.get()) {
        return DropReason::ResetLimit.into();
    }
    match write(frame, packet) {
        Some(end) => Verdict::Reset { reason, length: end as u16 },
        None => DropReason::Tables.into(),
    }
}

/// Where the frame ends now; `None`: a header is gone, which cannot be after it has been read.
#[inline(always)]
fn write<V: Family>(frame: &mut impl Frame, packet: &Packet<V>) -> Option<usize> {
    let asked: Tcp = frame.read(usize::from(packet.l4()))?;
    let (sequence, acknowledgment, flags) = if asked.flags & Tcp::ACK != 0 {
        (asked.acknowledgment, 0, Tcp::RST)
    } else {
        let data = packet.l4_length() - u16::from(asked.offset >> 4) * 4;
        let counted =
            u32::from(data) + u32::from(asked.flags & Tcp::SYN != 0) + u32::from(asked.flags & Tcp::FIN != 0);
        let next = u32::from_be(asked.sequence).wrapping_add(counted);
        (0, next.to_be(), Tcp::RST | Tcp::ACK)
    };
    let eth: &mut Eth = frame.at(0)?;
    (eth.destination, eth.source) = (eth.source, eth.destination);
    // Options and extension headers are left out, so TCP may begin earlier than it did.
    let l4 = V::write_header(frame, usize::from(packet.l3()), packet.destination, packet.source)?;
    let tcp: &mut Tcp = frame.at(l4)?;
    let header = Tcp {
        // Source and destination in each other's place.
        ports: asked.ports.rotate_left(16),
        sequence,
        acknowledgment,
        offset: ((Tcp::LEN / 4) as u8) << 4,
        flags,
        window: 0,
        checksum: 0,
        urgent: 0,
    };
    let mut sum = Sum::default()
        .add_u32(asked.ports)
        .add_u32(sequence)
        .add_u32(acknowledgment)
        .add_u16(u16::from_ne_bytes([header.offset, flags]))
        // The pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1).
        .add_u16((Tcp::LEN as u16).to_be())
        .add_u16(u16::from(TCP).to_be());
    V::words(packet.source, packet.destination, |word| sum = sum.add_u64(word));
    *tcp = Tcp { checksum: sum.checksum(), ..header };
    Some(l4 + Tcp::LEN)
}
