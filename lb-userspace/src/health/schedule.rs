//! When to probe whom: each backend at a time of its own within the interval, so that thousands make a
//! steady trickle and no burst.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash, Hasher},
    time::Duration,
};

use super::Key;
use crate::maglev::{hash_of, mix};

/// First probes are this far apart on average, so that a few backends are known at once and thousands
/// do not come as a burst.
const FIRST_APART: Duration = Duration::from_millis(1);

/// Who is to be probed when.
#[derive(Clone, Debug)]
pub struct Schedule {
    seed: u64,
    timings: BTreeMap<Key, Timing>,
    due: BTreeSet<(Duration, Key)>,
}

#[derive(Clone, Debug, PartialEq)]
struct Timing {
    interval: Duration,
    /// Part of the interval by which each probe may be early or late.
    jitter: f64,
    /// The next probe.
    next: Duration,
    /// Probes so far.
    round: u64,
}

impl Schedule {
    /// A schedule for nobody. Machines with different seeds probe at different times.
    pub fn new(seed: u64) -> Self {
        Self { seed, timings: BTreeMap::new(), due: BTreeSet::new() }
    }

    /// Probes these from now on, each with its interval and jitter (part of the interval). Who was there
    /// with the same interval keeps its times; who is new is probed first within the interval, or
    /// sooner when there are few.
    pub fn set(&mut self, wanted: impl IntoIterator<Item = (Key, Duration, f64)>, now: Duration) {
        let before = std::mem::take(&mut self.timings);
        let mut new = Vec::new();
        for (key, interval, jitter) in wanted {
            match before.get(&key) {
                Some(timing) if timing.interval == interval => {
                    self.timings.insert(key, Timing { jitter, ..timing.clone() });
                }
                _ => new.push((key, interval, jitter)),
            }
        }
        let within = FIRST_APART.saturating_mul(u32::try_from(new.len()).unwrap_or(u32::MAX));
        for (key, interval, jitter) in new {
            let next = now + within.min(interval).mul_f64(fraction(self.hash(&key)));
            self.timings.insert(key, Timing { interval, jitter, next, round: 0 });
        }
        self.due = self.timings.iter().map(|(key, timing)| (timing.next, key.clone())).collect();
    }

    /// When the next probe is due.
    pub fn next(&self) -> Option<Duration> {
        self.due.first().map(|(time, _)| *time)
    }

    /// Who is due by `now`; each is given its next time.
    pub fn take_due(&mut self, now: Duration) -> Vec<Key> {
        let mut taken = Vec::new();
        while self.due.first().is_some_and(|(time, _)| *time <= now) {
            let Some((_, key)) = self.due.pop_first() else { break };
            let hash = self.hash(&key);
            if let Some(timing) = self.timings.get_mut(&key) {
                timing.round += 1;
                timing.next = timing.after(now, hash);
                self.due.insert((timing.next, key.clone()));
                taken.push(key);
            }
        }
        taken
    }

    /// Probes everybody of a pool now; what follows keeps its times.
    pub fn hasten(&mut self, pool: &str, now: Duration) {
        for (key, timing) in
            self.timings.iter_mut().filter(|(key, timing)| key.pool == pool && timing.next > now)
        {
            self.due.remove(&(timing.next, key.clone()));
            timing.next = now;
            self.due.insert((now, key.clone()));
        }
    }

    fn hash(&self, key: &Key) -> u64 {
        let mut name = Mixed(self.seed);
        key.pool.hash(&mut name);
        hash_of(key.backend, name.0)
    }
}

impl Timing {
    /// The time of the next probe: the backend's own moment of the interval, give or take the jitter.
    /// Moments are counted from zero, so that a probe that was late does not push all that follow.
    fn after(&self, now: Duration, hash: u64) -> Duration {
        let moment = self.interval.mul_f64(fraction(hash));
        let intervals = (now.saturating_sub(moment).as_nanos() / self.interval.as_nanos().max(1)) as u64;
        let base = moment.as_nanos() as u64 + (intervals + 1) * self.interval.as_nanos() as u64;
        // The moment of this interval may have been taken early: then this is the next one.
        let early = Duration::from_nanos(base) < now + self.interval.mul_f64(self.jitter);
        let base = Duration::from_nanos(base) + if early { self.interval } else { Duration::ZERO };
        let shift = self.interval.mul_f64(self.jitter * fraction(mix(hash ^ self.round)) * 2.0);
        (base + shift).saturating_sub(self.interval.mul_f64(self.jitter))
    }
}

/// A hash as a number from 0 up to, not including, 1.
fn fraction(hash: u64) -> f64 {
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

/// Hashes text the same way on every machine and in every version.
struct Mixed(u64);

impl Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = mix(self.0 ^ u64::from(byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::BackendAddress;

    fn key(number: u32) -> Key {
        let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number);
        Key { pool: "web".to_owned(), backend: BackendAddress::Remote(ip.into(), Some(80)) }
    }

    /// Runs a schedule as a daemon would: sleeps until the next is due, takes what is.
    fn run(schedule: &mut Schedule, from: Duration, until: Duration) -> Vec<(Duration, Key)> {
        let mut log = Vec::new();
        let mut now = from;
        while let Some(next) = schedule.next().filter(|next| *next < until) {
            assert!(next >= now || log.is_empty(), "the next probe is never in the past");
            now = next;
            let taken = schedule.take_due(now);
            assert!(!taken.is_empty());
            log.extend(taken.into_iter().map(|key| (now, key)));
        }
        log
    }

    #[test]
    fn thousands_of_backends_make_no_burst() {
        let interval = Duration::from_secs(2);
        for jitter in [0.0, 0.1, 0.5] {
            let mut schedule = Schedule::new(7);
            schedule.set((0..5000).map(|number| (key(number), interval, jitter)), Duration::ZERO);
            let log = run(&mut schedule, Duration::ZERO, Duration::from_secs(20));
            // 25 are due in 10 ms on average; the worst of 2000 such times, were it pure chance, has
            // about 45. The first interval may have twice as many, since each new one is probed early.
            let mut windows = vec![0; 2000];
            for (time, _) in &log {
                windows[(time.as_millis() / 10) as usize] += 1;
            }
            assert!(windows[..400].iter().all(|&count| count < 110), "{:?}", windows[..400].iter().max());
            assert!(windows[400..].iter().all(|&count| count < 60), "{:?}", windows[400..].iter().max());
        }
    }

    #[test]
    fn a_few_are_probed_at_once() {
        let mut schedule = Schedule::new(1);
        let start = Duration::from_secs(100);
        schedule.set((0..3).map(|number| (key(number), Duration::from_secs(60), 0.1)), start);
        let first = run(&mut schedule, start, start + Duration::from_millis(3));
        assert_eq!(first.len(), 3);
    }

    #[test]
    fn other_seeds_give_other_times() {
        let next = |seed| {
            let mut schedule = Schedule::new(seed);
            schedule.set((0..50).map(|number| (key(number), Duration::from_secs(1), 0.0)), Duration::ZERO);
            schedule.next()
        };
        assert_eq!(next(1), next(1));
        assert_ne!(next(1), next(2));
    }

    proptest! {
        #[test]
        fn probes_come_once_an_interval_give_or_take_the_jitter(
            seed: u64, interval_ms in 10u64..5000, jitter in 0.0f64..=0.5, late_ms in 0u64..2000,
        ) {
            let interval = Duration::from_millis(interval_ms);
            let mut schedule = Schedule::new(seed);
            let start = Duration::from_secs(3);
            schedule.set([(key(1), interval, jitter)], start);
            let log = run(&mut schedule, start, start + interval * 20);
            prop_assert!((17..=22).contains(&log.len()), "{} probes in 20 intervals", log.len());
            for pair in log.windows(2).skip(1) {
                let gap = (pair[1].0 - pair[0].0).as_secs_f64() / interval.as_secs_f64();
                prop_assert!((1.0 - 2.0 * jitter - 1e-6..=2.0 + 2.0 * jitter).contains(&gap), "{gap} intervals");
            }
            // Somebody who was held up does not catch up with a burst.
            let late = log.last().map_or(start, |last| last.0) + interval * 3 + Duration::from_millis(late_ms);
            prop_assert_eq!(schedule.take_due(late).len(), 1);
            prop_assert!(schedule.next().is_some_and(|next| next >= late));
        }
    }

    #[test]
    fn who_stays_keeps_its_time_and_who_goes_is_not_asked() {
        let mut schedule = Schedule::new(1);
        let second = Duration::from_secs(1);
        schedule.set((0..10).map(|number| (key(number), second, 0.0)), Duration::ZERO);
        run(&mut schedule, Duration::ZERO, second * 3);
        let mut other = schedule.clone();
        other.set((0..20).filter(|number| *number != 5).map(|number| (key(number), second, 0.0)), second * 3);
        let log = run(&mut other, second * 3, second * 5);
        let old = run(&mut schedule, second * 3, second * 5);
        let of = |log: &[(Duration, Key)], number| -> Vec<Duration> {
            log.iter().filter(|(_, asked)| *asked == key(number)).map(|(time, _)| *time).collect()
        };
        assert_eq!(of(&log, 3), of(&old, 3));
        assert_eq!(of(&log, 3).len(), 2);
        assert!(of(&log, 5).is_empty());
        assert!(!of(&log, 15).is_empty());
    }
}
