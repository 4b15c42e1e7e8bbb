//! Time, in steps that four bytes can count.

/// Time as the program sees it: nanoseconds since boot shifted right by [`Tick::SHIFT`], so one tick
/// is 67.1 ms and 32 bits last nine years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Tick(pub u32);

/// Something that knows the time. Asked only when it is needed: in BPF asking is a call, and most packets
/// need no time.
pub trait Clock: Copy {
    /// The time.
    fn now(self) -> Tick;
}

/// A time that has been asked for already.
impl Clock for Tick {
    #[inline(always)]
    fn now(self) -> Tick {
        self
    }
}

impl Tick {
    /// Bits of a nanosecond clock below a tick.
    pub const SHIFT: u32 = 26;

    /// The tick of a time in nanoseconds since boot.
    #[inline(always)]
    pub const fn from_ns(ns: u64) -> Self {
        Self((ns >> Self::SHIFT) as u32)
    }

    /// Ticks from `earlier` to `self`; 0 when `earlier` is later (another CPU's clock ran ahead).
    #[inline(always)]
    pub const fn since(self, earlier: Self) -> u32 {
        let ticks = self.0.wrapping_sub(earlier.0);
        if ticks > u32::MAX / 2 { 0 } else { ticks }
    }

    /// The tick that comes `ticks` later.
    #[inline(always)]
    pub const fn after(self, ticks: u32) -> Self {
        Self(self.0.wrapping_add(ticks))
    }

    /// Whether it is `time` or later.
    #[inline(always)]
    pub const fn has_reached(self, time: Self) -> bool {
        // Half of all ticks, four years, lie ahead of any.
        (self.0.wrapping_sub(time.0) as i32) >= 0
    }

    /// How many whole ticks a duration in milliseconds takes, at least one.
    pub const fn in_ms(ms: u64) -> u32 {
        let ticks = (ms * 1_000_000) >> Self::SHIFT;
        if ticks == 0 {
            1
        } else if ticks > (u32::MAX / 4) as u64 {
            u32::MAX / 4
        } else {
            ticks as u32
        }
    }
}
