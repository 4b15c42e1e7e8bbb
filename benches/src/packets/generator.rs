//! The generator program, and the orders it is given.

use std::fmt;

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, ProgramArray},
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use lb_common::bench::{self, Ends, LINES, LISTED, Order, REMEMBERED, WORDS};
use lb_userspace::dataplane::kernel::GENERATOR;
use tests::packets::{Spec, flag};

use crate::scene::{self, End, Scene};

/// What becomes of packets, as the kernel has it.
const XDP_DROP: u32 = 1;
const XDP_TX: u32 = 3;

/// What the packets are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) v6: bool,
    pub(crate) udp: bool,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [
        Self { v6: false, udp: false },
        Self { v6: false, udp: true },
        Self { v6: true, udp: false },
        Self { v6: true, udp: true },
    ];

    /// A packet of the flow with the source address and port zero.
    fn frame(self, first: bool) -> Vec<u8> {
        let source = (scene::client(self.v6), 0);
        let destination = (scene::vip(self.v6), scene::PORT);
        let mut frame = self.packet(source, destination, if first { flag::SYN } else { flag::ACK });
        frame.resize(8 * WORDS, 0);
        frame
    }

    /// A packet from one end to the other; UDP has no flags. Either has as many bytes.
    pub(crate) fn packet(self, source: End, destination: End, flags: u8) -> Vec<u8> {
        let spec = if self.udp {
            Spec::udp(source, destination).with_payload(&[0; 18])
        } else {
            Spec::tcp(source, destination, flags).with_payload(&[0; 6])
        };
        spec.build()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", if self.v6 { "v6" } else { "v4" }, if self.udp { "udp" } else { "tcp" })
    }
}

/// The loaded generator.
pub(crate) struct Generator {
    ebpf: Ebpf,
    next: ProgramArray<MapData>,
    order: Array<MapData, [u64; WORDS + 2]>,
    list: Array<MapData, [u64; 2]>,
    odd: Array<MapData, [u64; 2]>,
    /// The program that generates: of frames by number, or of those listed.
    program: &'static str,
    frame: Vec<u8>,
}

impl Generator {
    pub(crate) fn new() -> Result<Self> {
        Self::load(&mut EbpfLoader::new())
    }

    /// With tables for what the program is compared with.
    pub(crate) fn with_rivals() -> Result<Self> {
        Self::load(EbpfLoader::new().map_max_entries("LINE", LINES).map_max_entries("LRU", REMEMBERED))
    }

    fn load(loader: &mut EbpfLoader<'_>) -> Result<Self> {
        let mut ebpf = loader.load(GENERATOR).context("the generator does not load")?;
        for name in ["generate", "generate_listed", "empty", "floor_v4", "floor_v6", "line_v4", "lru_v4"] {
            xdp(&mut ebpf, name)?.load().with_context(|| format!("{name} does not load"))?;
        }
        let next = ebpf.take_map("NEXT").context("no map NEXT")?.try_into()?;
        let order = ebpf.take_map("ORDER").context("no map ORDER")?.try_into()?;
        let list = ebpf.take_map("LIST").context("no map LIST")?.try_into()?;
        let odd = ebpf.take_map("ODD").context("no map ODD")?.try_into()?;
        Ok(Self { ebpf, next, order, list, odd, program: "generate", frame: vec![0; 8 * WORDS] })
    }

    /// From now on: packets of so many flows (zero: of a new one each time), one after the other or at random;
    /// SYNs if they are the first of each.
    pub(crate) fn order(&mut self, kind: Kind, flows: u64, in_order: bool, first: bool) -> Result<()> {
        self.frame = kind.frame(first);
        self.program = "generate";
        self.write_order(kind, flows, in_order)
    }

    /// From now on: packets like these, which differ in what [`Ends`] has, one after the other.
    pub(crate) fn list(&mut self, kind: Kind, frames: impl Iterator<Item = Vec<u8>>) -> Result<()> {
        let mut listed = 0;
        for mut frame in frames {
            ensure!(listed < LISTED, "more than {LISTED} packets cannot be listed");
            frame.resize(8 * WORDS, 0);
            self.list.set(listed, ends(kind, &frame)?.to_words(), 0)?;
            self.frame = frame;
            listed += 1;
        }
        self.program = "generate_listed";
        self.write_order(kind, listed.into(), true)
    }

    fn write_order(&mut self, kind: Kind, flows: u64, in_order: bool) -> Result<()> {
        let mut value = [0; WORDS + 2];
        for (word, bytes) in value.iter_mut().zip(self.frame.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into()?);
        }
        let mut flags = 0;
        for (flag, set) in [(Order::V6, kind.v6), (Order::UDP, kind.udp), (Order::IN_ORDER, in_order)] {
            flags |= if set { flag } else { 0 };
        }
        value[WORDS] = flows;
        value[WORDS + 1] = u64::from(scene::FIRST_ADDRESS) | u64::from(flags) << 32;
        self.order.set(0, value, 0)?;
        Ok(())
    }

    /// Frames go to a scene's program from now on.
    pub(crate) fn lead_to(&mut self, scene: &mut Scene) -> Result<()> {
        Ok(self.next.set(0, &scene.program()?, 0)?)
    }

    /// Frames go to the floor of a family from now on.
    pub(crate) fn lead_to_floor(&mut self, v6: bool) -> Result<()> {
        self.lead_to_own(if v6 { "floor_v6" } else { "floor_v4" })
    }

    /// Frames go to another of its own programs from now on.
    pub(crate) fn lead_to_own(&mut self, name: &str) -> Result<()> {
        let program = xdp(&mut self.ebpf, name)?.fd()?.try_clone()?;
        Ok(self.next.set(0, &program, 0)?)
    }

    /// Runs the generator and what it leads to on so many packets: nanoseconds each.
    pub(crate) fn run(&mut self, packets: u32) -> Result<f64> {
        self.run_program(self.program, packets, XDP_TX)
    }

    /// The same, of packets that are dropped.
    pub(crate) fn run_dropped(&mut self, packets: u32) -> Result<f64> {
        self.run_program(self.program, packets, XDP_DROP)
    }

    /// Connections that the kernel's table has been told of so far, and how many of them it did not take.
    pub(crate) fn told(&self) -> Result<[u64; 2]> {
        Ok(self.odd.get(&0, 0)?)
    }

    /// Runs the program that does nothing.
    pub(crate) fn run_empty(&mut self, packets: u32) -> Result<f64> {
        self.run_program("empty", packets, XDP_TX)
    }

    fn run_program(&mut self, name: &str, packets: u32, action: u32) -> Result<f64> {
        let options = TestRunOptions { data_in: Some(&self.frame), repeat: packets, ..Default::default() };
        let result = xdp(&mut self.ebpf, name)?.test_run(options)?;
        ensure!(
            result.return_value == action,
            "{name}: of the last packet became {}, not {action}",
            result.return_value
        );
        // The kernel says the mean of all runs, in whole nanoseconds.
        Ok(result.duration.as_nanos() as f64)
    }
}

/// What a frame has where listed ones differ.
fn ends(kind: Kind, frame: &[u8]) -> Result<Ends> {
    let long = |at: usize| Ok::<_, anyhow::Error>(u32::from_ne_bytes(frame[at..at + 4].try_into()?));
    let short = |at: usize| Ok::<_, anyhow::Error>(u16::from_ne_bytes(frame[at..at + 2].try_into()?));
    let (address, apart, ports) = if kind.v6 {
        (bench::V6_ADDRESS, 16, bench::V6_PORTS)
    } else {
        (bench::V4_ADDRESS, 4, bench::V4_PORTS)
    };
    Ok(Ends {
        source: long(address)?,
        destination: long(address + apart)?,
        port: short(ports + 2)?,
        checksum: short(bench::checksum_at(kind.v6, kind.udp))?,
        header_checksum: short(bench::V4_CHECKSUM)?,
    })
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_every_program_of_the_benchmark() {
        if xtask::lab::possible("the_kernel_takes_every_program_of_the_benchmark") {
            Generator::new().unwrap();
        }
    }
}
