//! Packets from a capture file, such as `tcpdump -w` writes.

use std::{fs::File, io::BufReader, path::Path};

use pcap_file::{DataLink, pcap::PcapReader};

use super::Failure;
use crate::api::view::Frames;

/// The first frames of a file, at most `limit`. What a capture has cut off is filled up with zeros: no decision
/// looks that far, but a packet must be as long as it says.
pub(super) fn frames(path: &Path, limit: usize) -> Result<Frames, Failure> {
    let wrong = |why: String| Failure::Document(format!("{}: {why}", path.display()));
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let mut reader = PcapReader::new(BufReader::new(file)).map_err(|error| {
        wrong(format!("no pcap file: {error}; a pcapng file is made into one by `editcap -F pcap`"))
    })?;
    let link = reader.header().datalink;
    if link != DataLink::ETHERNET {
        let how = "capture on one interface of Ethernet, not on `any`";
        return Err(wrong(format!("frames of {link:?}, and the program sees Ethernet's: {how}")));
    }
    let mut frames = Vec::new();
    while let Some(packet) = reader.next_packet().filter(|_| frames.len() < limit) {
        let packet = packet.map_err(|error| wrong(format!("packet {}: {error}", frames.len() + 1)))?;
        let cut = (packet.orig_len as usize).saturating_sub(packet.data.len()).min(LONGEST);
        let bytes = packet.data.iter().copied().chain(std::iter::repeat_n(0, cut));
        frames.push(bytes.map(|byte| format!("{byte:02x}")).collect());
    }
    Ok(Frames { frames })
}

/// No frame is longer, and a file may say anything.
const LONGEST: usize = 1 << 16;
