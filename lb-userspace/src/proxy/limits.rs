//! How often: requests by whom they come from, and wrong answers to who one is.
//!
//! The generic cell rate algorithm (ITU-T I.371): of each key one time is kept, and what has run out takes no place.
//! Memory is bounded, which is why this is no library: where keys are more than there is room for, the new ones
//! share what is left, so that nobody comes in more often for being many.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::HeaderMap;

use crate::model::limit::{LimitBy, RateLimit};

/// Parts that are locked by themselves.
const SHARDS: usize = 16;

/// Keys that are remembered in each part.
const KEYS: usize = 4096;

/// Keys in each part that all share for whom there is no room.
const CROWDS: u64 = 64;

/// How long a part that is full stays so, before what has run out is looked for again: who comes with a new key each
/// time would otherwise have all of it gone through each time.
const FULL_FOR: Duration = Duration::from_millis(100);

/// Who has been here how often.
#[derive(Debug)]
pub struct Buckets {
    /// One more each so often.
    interval: Duration,
    /// How much sooner than by that, if nobody came for a while.
    ahead: Duration,
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    /// When each key will have made up for what it has taken (the theoretical arrival time).
    dues: HashMap<u64, Instant>,
    /// When it was found full.
    swept: Option<Instant>,
}

impl Shard {
    /// Makes room, if there is any to be made; whether there is some.
    fn has_room(&mut self, now: Instant) -> bool {
        if self.dues.len() < KEYS {
            return true;
        }
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < FULL_FOR) {
            return false;
        }
        self.dues.retain(|_, due| *due > now);
        self.swept = Some(now);
        self.dues.len() < KEYS
    }
}

impl Buckets {
    /// `count` in each `period`, and `burst` at once.
    pub fn new(count: u32, period: Duration, burst: u32) -> Self {
        let interval = period / count.max(1);
        let ahead = interval * burst.saturating_sub(1);
        Self { interval, ahead, hasher: RandomState::new(), shards: Default::default() }
    }

    /// A key of something; nothing of it is kept.
    pub fn key(&self, of: impl Hash) -> u64 {
        self.hasher.hash_one(of)
    }

    /// Takes one.
    ///
    /// # Errors
    /// There is none for so long.
    pub fn take(&self, key: u64, now: Instant) -> Result<(), Duration> {
        self.with(key, now, |due| {
            let early = due.saturating_duration_since(now);
            if early > self.ahead {
                return Err(early - self.ahead);
            }
            *due = now.max(*due) + self.interval;
            Ok(())
        })
    }

    /// Takes one whether there is any or not.
    pub fn overdraw(&self, key: u64, now: Instant) {
        self.with(key, now, |due| *due = now.max(*due) + self.interval);
    }

    /// For how long there is none.
    pub fn empty(&self, key: u64, now: Instant) -> Option<Duration> {
        self.with(key, now, |due| {
            due.saturating_duration_since(now).checked_sub(self.ahead).filter(|wait| !wait.is_zero())
        })
    }

    fn with<T>(&self, key: u64, now: Instant, act: impl FnOnce(&mut Instant) -> T) -> T {
        let shard = &self.shards[(key >> 32) as usize % SHARDS];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = shard.dues.contains_key(&key);
        let key = if is_known || shard.has_room(now) { key } else { key % CROWDS };
        act(shard.dues.entry(key).or_insert(now))
    }
}

/// What a route's limits look at.
#[derive(Clone, Copy, Debug)]
pub struct Visitor<'v> {
    /// Where it comes from.
    pub source: IpAddr,
    /// Its headers.
    pub headers: &'v HeaderMap,
    /// Who asks, once that is known.
    pub user: Option<&'v str>,
}

/// The limits of a route.
#[derive(Clone, Debug, Default)]
pub struct Limits(Vec<Arc<(RateLimit, Buckets)>>);

impl Limits {
    /// As the document says, with what has been counted by those from before that stay.
    pub fn new(rules: &[RateLimit], before: Option<&Self>) -> Self {
        let limit = |rule: &RateLimit| {
            let same = before.and_then(|before| before.0.iter().find(|other| other.0 == *rule));
            let new = || {
                let buckets = Buckets::new(rule.count, rule.period, rule.burst);
                Arc::new((rule.clone(), buckets))
            };
            same.map_or_else(new, Arc::clone)
        };
        Self(rules.iter().map(limit).collect())
    }

    /// Takes one of each limit that can be told of already, or, where `user` is known, of those that need it.
    ///
    /// # Errors
    /// One has none for so long.
    pub fn take(&self, visitor: &Visitor<'_>, now: Instant) -> Result<(), Duration> {
        for (rule, buckets) in self.0.iter().map(Arc::as_ref) {
            let key = match (&rule.by, visitor.user) {
                (LimitBy::User, Some(user)) => buckets.key(user),
                (LimitBy::User, None) | (_, Some(_)) => continue,
                (LimitBy::Route, None) => 0,
                (LimitBy::Source, None) => buckets.key(network(visitor.source)),
                (LimitBy::Header(name), None) => {
                    let values = visitor.headers.get_all(name).iter().map(http::HeaderValue::as_bytes);
                    buckets.key(values.collect::<Vec<_>>())
                }
            };
            buckets.take(key, now)?;
        }
        Ok(())
    }
}

/// Whom an address belongs to: of IPv6 a whole network.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_an_address_or_a_network_of_ipv6() {
        let of = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(of("198.51.100.7"), "198.51.100.7");
        assert_eq!(of("::ffff:198.51.100.7"), "198.51.100.7");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }

    #[test]
    fn so_many_at_once_and_then_one_each_time() {
        let buckets = Buckets::new(10, Duration::from_secs(1), 5);
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        for _ in 0..5 {
            assert_eq!(buckets.take(1, at(0)), Ok(()));
        }
        assert_eq!(buckets.take(1, at(0)), Err(Duration::from_millis(100)));
        assert_eq!(buckets.empty(1, at(40)), Some(Duration::from_millis(60)));
        assert_eq!(buckets.take(2, at(0)), Ok(()), "another key");
        assert_eq!(buckets.take(1, at(100)), Ok(()));
        assert_eq!(buckets.take(1, at(150)), Err(Duration::from_millis(50)));
        // In a long time ten a second, however it is asked for.
        let taken = (101..=100_100).filter(|&ms| buckets.take(1, at(ms)).is_ok()).count();
        assert_eq!(taken, 1000);
        assert_eq!(buckets.empty(1, at(200_000)), None);
        assert_eq!((0..10).filter(|_| buckets.take(1, at(200_000)).is_ok()).count(), 5);
    }

    #[test]
    fn what_is_taken_beyond_what_there_is_counts() {
        let buckets = Buckets::new(1, Duration::from_secs(6), 3);
        let now = Instant::now();
        for taken in 0..5u64 {
            assert_eq!(buckets.empty(7, now), (taken >= 3).then(|| Duration::from_secs(6 * (taken - 2))));
            buckets.overdraw(7, now);
        }
    }

    #[test]
    fn memory_is_bounded_and_a_crowd_gets_no_more_for_being_one() {
        let buckets = Buckets::new(1, Duration::from_secs(60), 1);
        let now = Instant::now();
        let taken = (0..1_000_000u64).filter(|n| buckets.take(buckets.key(n), now).is_ok()).count();
        let most = SHARDS * (KEYS + CROWDS as usize);
        assert!(taken <= most, "{taken}");
        let kept: usize = buckets.shards.iter().map(|shard| shard.lock().unwrap().dues.len()).sum();
        assert!(kept <= most && kept > SHARDS * KEYS / 2, "{kept}");
        // What has run out makes room.
        let later = now + Duration::from_secs(61);
        assert!((0..1000u64).all(|n| buckets.take(buckets.key((n, "later")), later).is_ok()));
    }

    #[test]
    fn each_limit_counts_by_its_own() {
        let rule = |by| RateLimit { count: 1, period: Duration::from_secs(1), burst: 2, by };
        let rules = [rule(LimitBy::Source), rule(LimitBy::Header("x-api-key".into())), rule(LimitBy::User)];
        let now = Instant::now();
        let with_key = |key: &'static str| {
            HeaderMap::from_iter([(
                http::HeaderName::from_static("x-api-key"),
                http::HeaderValue::from_static(key),
            )])
        };
        let ask = |limits: &Limits, source: &str, key: &'static str, user: Option<&str>| {
            let source = source.parse().unwrap();
            limits.take(&Visitor { source, headers: &with_key(key), user }, now).is_ok()
        };
        let limits = Limits::new(&rules, None);
        assert!((0..2).all(|_| ask(&limits, "10.0.0.1", "a", None)));
        assert!(!ask(&limits, "10.0.0.1", "b", None), "by source");
        assert!(!ask(&limits, "10.0.0.2", "a", None), "by header");
        assert!(ask(&limits, "10.0.0.3", "c", None));
        // IPv6 by the network.
        assert!(ask(&limits, "2001:db8::1", "d", None) && ask(&limits, "2001:db8::2", "e", None));
        assert!(!ask(&limits, "2001:db8::3", "f", None));
        assert!((0..2).all(|_| ask(&limits, "10.0.0.1", "a", Some("anna"))), "only who it is counts then");
        assert!(!ask(&limits, "10.0.0.1", "a", Some("anna")) && ask(&limits, "10.0.0.1", "a", Some("ben")));
        // What stays is not forgotten when the document changes.
        let after = Limits::new(&rules[2..], Some(&limits));
        assert!(!ask(&after, "10.0.0.1", "a", Some("anna")));
        assert!(ask(&Limits::new(&rules, None), "10.0.0.1", "a", Some("anna")));
    }
}
