//! Alarms as they begin and end: each is logged here, once, and nowhere else. But for the end of the desk's process, which
//! may be over before anybody looks: that is told by who looks after it.

use std::{collections::BTreeSet, time::Duration};

use tracing::{info, warn};

use super::Daemon;
use crate::{
    daemon::{desk::Desk, plane::Plane},
    health::Now,
};

/// How long they are not looked at again where much happens: to gather them takes long with ten thousand services.
const PAUSE: Duration = Duration::from_secs(1);

/// After how long they are, though nothing happens, where time alone brings some.
const SELDOM: Duration = Duration::from_secs(60);

/// The alarms that have been told of.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Alarms {
    raised: BTreeSet<String>,
    /// When they were looked at, in time since the start.
    looked: Option<Duration>,
    /// Something has happened since.
    stale: bool,
}

impl Alarms {
    /// Something may have happened: whether they are to be looked at now, which is not so if they just were.
    fn is_due(&mut self, now: Duration) -> bool {
        self.stale = self.looked.is_some_and(|looked| now < looked + PAUSE);
        if !self.stale {
            self.looked = Some(now);
        }
        !self.stale
    }

    /// How long until they are to be looked at though nothing happens; `with_time`: time alone may bring some.
    pub(super) fn wait(&self, now: Duration, with_time: bool) -> Option<Duration> {
        let pause = if self.stale { PAUSE } else { with_time.then_some(SELDOM)? };
        Some((self.looked? + pause).saturating_sub(now))
    }

    /// Takes in those that are raised now; gives back what has begun and what is over.
    fn see(&mut self, now: impl IntoIterator<Item = String>) -> (Vec<String>, Vec<String>) {
        let before = std::mem::replace(&mut self.raised, now.into_iter().collect());
        let begun = self.raised.difference(&before).cloned().collect();
        (begun, before.difference(&self.raised).cloned().collect())
    }
}

impl<P: Plane> Daemon<P> {
    /// What of the desk needs somebody's attention, and is told here when it begins.
    pub(in crate::daemon) fn alarms_of_desk(&self, now: Now) -> Vec<String> {
        let mut alarms: Vec<_> = self.reception.desk.iter().flat_map(Desk::deaf).cloned().collect();
        alarms.extend(self.reception.alarms_of_files(now.epoch));
        alarms.extend(self.reception.issuers.alarms());
        alarms
    }

    /// All that needs somebody's attention, but for the end of the desk's process.
    pub(super) fn all_alarms(&self, now: Now) -> Vec<String> {
        self.core.alarms().into_iter().chain(self.alarms_of_desk(now)).collect()
    }

    /// Tells of alarms that have begun, or are over. To be called whenever something may have happened.
    pub(super) fn tell_alarms(&mut self, now: Now) {
        let doubted = self.core.take_doubted();
        if !self.alarms.is_due(now.uptime) && !doubted {
            return;
        }
        let (begun, over) = self.alarms.see(self.all_alarms(now));
        begun.iter().for_each(|alarm| warn!("alarm: {alarm}"));
        over.iter().for_each(|alarm| info!("over: {alarm}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_told_when_it_begins_and_when_it_is_over() {
        let mut alarms = Alarms::default();
        let mut see = |now: &[&str]| alarms.see(now.iter().map(|&alarm| alarm.to_owned()));
        let told = |begun: &[&str], over: &[&str]| {
            let owned = |all: &[&str]| all.iter().map(|&alarm| alarm.to_owned()).collect::<Vec<_>>();
            (owned(begun), owned(over))
        };
        assert_eq!(see(&[]), told(&[], &[]));
        assert_eq!(see(&["a", "b", "a"]), told(&["a", "b"], &[]));
        assert_eq!(see(&["b", "a"]), told(&[], &[]));
        assert_eq!(see(&["b", "c"]), told(&["c"], &["a"]));
        assert_eq!(see(&[]), told(&[], &["b", "c"]));
        assert_eq!(see(&["a"]), told(&["a"], &[]));
    }

    #[test]
    fn much_that_happens_is_looked_at_once_a_while_and_its_last_is_not_missed() {
        let at = Duration::from_millis;
        let mut alarms = Alarms::default();
        assert_eq!(alarms.wait(at(0), true), None);
        assert!(alarms.is_due(at(5000)));
        // Nothing else to be woken for, or the certificates' time.
        assert_eq!(alarms.wait(at(5000), false), None);
        assert_eq!(alarms.wait(at(5000), true), Some(SELDOM));
        assert!(!alarms.is_due(at(5100)) && !alarms.is_due(at(5999)));
        assert_eq!(alarms.wait(at(5999), false), Some(at(1)));
        assert!(alarms.is_due(at(6000)));
        assert_eq!(alarms.wait(at(6000), false), None);
        assert_eq!(alarms.wait(at(66_500), true), Some(at(0)));
    }
}
