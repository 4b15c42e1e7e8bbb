//! The program and a copy of its tables on the host, side by side, packet by packet.

use std::time::Duration;

use lb_common::{
    abi::Tick,
    datapath::decide,
    sim::{MemTables, SliceFrame},
    verdict::Verdict,
};
use lb_userspace::dataplane::{Dataplane as _, kernel::KernelDataplane};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::world::INGRESS;

/// The program and the host's copy.
pub struct Both {
    /// The program and its tables.
    pub kernel: KernelDataplane,
    /// The copy.
    pub host: MemTables,
    counted: Vec<u64>,
    /// Packets during which the tick changed: nobody can say which one the program saw.
    pub unclear: u32,
}

/// Keeps this thread on a CPU.
///
/// # Errors
/// When there is none of that number.
pub fn stay_on(cpu: usize) -> nix::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)
}

impl Both {
    /// Takes a copy of the tables. From now on this thread stays on one CPU: counters and budgets are per CPU.
    ///
    /// # Panics
    /// When the tables cannot be read.
    pub fn new(kernel: KernelDataplane) -> Self {
        stay_on(0).expect("a first CPU");
        let host = kernel.copy().expect("tables can be read");
        let counted = kernel.verdicts().expect("counters can be read");
        Self { kernel, host, counted, unclear: 0 }
    }

    /// The host begins anew from what the kernel has.
    ///
    /// # Panics
    /// When the tables cannot be read.
    pub fn align(&mut self) {
        let budget = self.host.budget.get();
        self.host = self.kernel.copy().expect("tables can be read");
        self.host.budget.set(budget);
    }

    /// Runs both; the verdict and the frame afterwards, if they can be compared.
    ///
    /// # Panics
    /// When they differ in verdict, action or bytes.
    pub fn run(&mut self, frame: &[u8]) -> Option<(Verdict, Vec<u8>)> {
        let now = steady_tick();
        let ran = self.kernel.run_once(frame).expect("the program can be run");
        let clear = Tick::from_ns(nanoseconds()) == now;
        let counted = self.kernel.verdicts().expect("counters can be read");
        let before = std::mem::replace(&mut self.counted, counted);
        if !clear {
            self.unclear += 1;
            self.align();
            return None;
        }
        let mut mine = SliceFrame(frame.to_vec());
        let counted = self.host.verdicts.borrow().clone();
        let verdict = decide(&mut mine, &self.host, INGRESS, now);
        mine.settle(verdict);

        let steps: Vec<u64> = self.counted.iter().zip(&before).map(|(now, before)| now - before).collect();
        let expected: Vec<u64> =
            self.host.verdicts.borrow().iter().zip(&counted).map(|(now, before)| now - before).collect();
        assert_eq!((expected[verdict.counter()], expected[..Verdict::COUNTERS].iter().sum::<u64>()), (1, 1));
        assert_eq!(steps, expected, "the host says {verdict:?} of {frame:02x?}");
        assert_eq!(ran.action, action(verdict), "{verdict:?} of {frame:02x?}");
        assert_eq!(ran.frame, mine.0, "{verdict:?} of {frame:02x?}");
        Some((verdict, mine.0))
    }

    /// Runs both on a packet again and again until they can be compared, which is at once but for the turn
    /// of a tick.
    ///
    /// # Panics
    /// When they differ, or never can be compared.
    pub fn decide(&mut self, frame: &[u8]) -> (Verdict, Vec<u8>) {
        (0..100).find_map(|_| self.run(frame)).expect("ticks do not change all the time")
    }

    /// Compares what packets change in the tables.
    ///
    /// # Panics
    /// When they differ.
    pub fn compare_tables(&self) {
        let kernel = self.kernel.copy().expect("tables can be read");
        alike("flow", &kernel.flows, &self.host.flows);
        alike("records", &kernel.records, &self.host.records);
        alike("sides", &kernel.sides, &self.host.sides);
        assert_eq!(kernel.cursors, self.host.cursors);
        assert_eq!(kernel.turns, self.host.turns);
    }
}

fn alike<T: PartialEq + std::fmt::Debug>(table: &str, theirs: &[T], mine: &[T]) {
    for (index, (theirs, mine)) in theirs.iter().zip(mine).enumerate() {
        assert!(theirs == mine, "{table} {index}: the kernel has {theirs:?}, the host {mine:?}");
    }
}

/// What XDP is told of a verdict, on the interface that [`INGRESS`] is (`enum xdp_action`).
fn action(verdict: Verdict) -> u32 {
    const XDP_DROP: u32 = 1;
    const XDP_PASS: u32 = 2;
    const XDP_TX: u32 = 3;
    const XDP_REDIRECT: u32 = 4;
    match verdict {
        Verdict::ToBackend { interface } | Verdict::ToClient { interface } if interface != INGRESS => {
            XDP_REDIRECT
        }
        Verdict::ToBackend { .. } | Verdict::ToClient { .. } | Verdict::Reset { .. } => XDP_TX,
        Verdict::Pass(_) => XDP_PASS,
        Verdict::Drop(_) => XDP_DROP,
    }
}

/// The clock that the program reads.
fn nanoseconds() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("a clock that Linux has");
    u64::try_from(Duration::from(now).as_nanos()).expect("less than 500 years")
}

/// The tick, at a moment from which it lasts for ten milliseconds at least.
pub fn steady_tick() -> Tick {
    loop {
        let now = nanoseconds();
        let left = (1 << Tick::SHIFT) - (now & ((1 << Tick::SHIFT) - 1));
        if left > 10_000_000 {
            return Tick::from_ns(now);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
