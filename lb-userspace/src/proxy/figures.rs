//! What the desk counts.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    orders::{Answers, Denied, Ejections, LATENCY_BOUNDS, Latencies, Report},
    state::Called,
};

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Figures {
    open: AtomicU64,
    connections: AtomicU64,
    retries: AtomicU64,
    websockets: AtomicU64,
    passed: AtomicU64,
    named: Mutex<Named>,
}

#[derive(Debug, Default)]
struct Named {
    refused: BTreeMap<&'static str, u64>,
    troubles: BTreeMap<&'static str, u64>,
    /// By service, route and pool: looked up for each request, so without a key to be made.
    routes: BTreeMap<String, BTreeMap<String, BTreeMap<String, OfRoute>>>,
    denied: BTreeMap<(String, String, u16, &'static str), u64>,
    ejected: BTreeMap<(String, SocketAddr), u64>,
}

/// What a route has answered.
#[derive(Clone, Debug, Default)]
struct OfRoute {
    /// By the first digit of the status.
    classes: [u64; 6],
    /// By how long it took, see [`LATENCY_BOUNDS`]; the last is for what took longer.
    latencies: [u64; LATENCY_BOUNDS.len() + 1],
    microseconds: u64,
}

impl Named {
    fn add(&mut self, other: &Self) {
        for (reason, count) in &other.refused {
            *self.refused.entry(reason).or_default() += count;
        }
        for (reason, count) in &other.troubles {
            *self.troubles.entry(reason).or_default() += count;
        }
        for (service, routes) in &other.routes {
            let mine = self.routes.entry(service.clone()).or_default();
            for (route, pools) in routes {
                let mine = mine.entry(route.clone()).or_default();
                pools.iter().for_each(|(pool, of)| mine.entry(pool.clone()).or_default().add(of));
            }
        }
        for (key, count) in &other.denied {
            *self.denied.entry(key.clone()).or_default() += count;
        }
        for (key, count) in &other.ejected {
            *self.ejected.entry(key.clone()).or_default() += count;
        }
    }
}

/// What there is of a name, which is written down only the first time.
fn entry<'m, V: Default>(map: &'m mut BTreeMap<String, V>, name: &str) -> Option<&'m mut V> {
    if !map.contains_key(name) {
        map.insert(name.to_owned(), V::default());
    }
    map.get_mut(name)
}

impl OfRoute {
    fn add(&mut self, other: &Self) {
        self.classes.iter_mut().zip(other.classes).for_each(|(mine, more)| *mine += more);
        self.latencies.iter_mut().zip(other.latencies).for_each(|(mine, more)| *mine += more);
        self.microseconds += other.microseconds;
    }
}

/// A connection that was taken, open until this is dropped.
pub struct Taken(Arc<Figures>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Something that is open until this is dropped.
pub struct Open<'f>(&'f AtomicU64);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Figures {
    /// A connection was taken.
    pub fn taken(self: &Arc<Self>) -> Taken {
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        Taken(Arc::clone(self))
    }

    /// A connection became a websocket.
    pub fn websocket(&self) -> Open<'_> {
        self.websockets.fetch_add(1, Ordering::Relaxed);
        Open(&self.websockets)
    }

    /// A connection is handed on as it is.
    pub fn passed(&self) -> Open<'_> {
        self.passed.fetch_add(1, Ordering::Relaxed);
        Open(&self.passed)
    }

    /// Connections that are open.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// A connection was not let in, or is ended by the desk.
    pub fn refused(&self, reason: &'static str) {
        *self.named().refused.entry(reason).or_default() += 1;
    }

    /// A request was tried once more.
    pub fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// A backend that does not answer well gets no requests for a while.
    pub fn ejected(&self, pool: &str, backend: SocketAddr) {
        *self.named().ejected.entry((pool.to_owned(), backend)).or_default() += 1;
    }

    /// The desk has answered itself.
    pub fn trouble(&self, reason: &'static str) {
        *self.named().troubles.entry(reason).or_default() += 1;
    }

    /// A request was not let in by a route.
    pub fn denied(&self, service: &str, route: &str, status: u16, reason: &'static str) {
        let key = (service.to_owned(), route.to_owned(), status, reason);
        *self.named().denied.entry(key).or_default() += 1;
    }

    /// A request was answered; the head of its answer took so long.
    pub fn answer(&self, service: &str, called: &Called, status: u16, took: Duration) {
        let mut named = self.named();
        let of = entry(&mut named.routes, service)
            .and_then(|routes| entry(routes, &called.route))
            .and_then(|pools| entry(pools, &called.pool));
        let Some(of) = of else { return };
        if let Some(count) = of.classes.get_mut(usize::from(status / 100)) {
            *count += 1;
        }
        let slot = LATENCY_BOUNDS.partition_point(|&bound| bound < took.as_secs_f64());
        of.latencies[slot] += 1;
        of.microseconds += u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    }

    fn named(&self) -> std::sync::MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What several have counted together.
    pub fn report<'f>(all: impl IntoIterator<Item = &'f Self>) -> Report {
        let mut named = Named::default();
        let mut sums = Report::default();
        for figures in all {
            named.add(&figures.named());
            sums.open += figures.open();
            sums.websockets += figures.websockets.load(Ordering::Relaxed);
            sums.passed += figures.passed.load(Ordering::Relaxed);
            sums.connections += figures.connections.load(Ordering::Relaxed);
            sums.retries += figures.retries.load(Ordering::Relaxed);
        }
        let owned = |counts: &BTreeMap<&'static str, u64>| {
            counts.iter().map(|(&reason, &count)| (reason.to_owned(), count)).collect()
        };
        let routes = || {
            named.routes.iter().flat_map(|(service, routes)| {
                routes.iter().flat_map(move |(route, pools)| {
                    pools.iter().map(move |(pool, of)| (service, route, pool, of))
                })
            })
        };
        let answers = routes().flat_map(|(service, route, pool, of)| {
            let given = (0u16..).zip(of.classes).filter(|(_, count)| *count > 0);
            given.map(|(class, count)| Answers {
                service: service.clone(),
                route: route.clone(),
                pool: pool.clone(),
                class,
                count,
            })
        });
        let latencies = routes().map(|(service, route, pool, of)| Latencies {
            service: service.clone(),
            route: route.clone(),
            pool: pool.clone(),
            counts: of.latencies.to_vec(),
            microseconds: of.microseconds,
        });
        let denied = named.denied.iter().map(|((service, route, status, reason), &count)| Denied {
            service: service.clone(),
            route: route.clone(),
            status: *status,
            reason: (*reason).to_owned(),
            count,
        });
        let ejections = named.ejected.iter().map(|((pool, backend), &count)| Ejections {
            pool: pool.clone(),
            backend: backend.to_string(),
            count,
        });
        Report {
            refused: owned(&named.refused),
            ejections: ejections.collect(),
            answers: answers.collect(),
            latencies: latencies.collect(),
            troubles: owned(&named.troubles),
            denied: denied.collect(),
            ..sums
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_route_and_by_how_long_they_took() {
        // Of two that count, and are reported together.
        let all = [Figures::default(), Figures::default()];
        let answers =
            [("/a/*", 200, 0), ("/a/*", 204, 1), ("/a/*", 503, 2), ("/a/*", 200, 60_000), ("/b/*", 101, 7)];
        for (figures, (route, status, ms)) in all.iter().cycle().zip(answers) {
            let called = Called { route: route.into(), pool: "web".into() };
            figures.answer("shop", &called, status, Duration::from_millis(ms));
            figures.refused("tls");
            figures.retried();
        }
        let report = Figures::report(&all);
        assert_eq!((report.refused.get("tls"), report.retries), (Some(&5), 5));
        let answers = report.answers.iter().map(|it| (it.route.as_str(), it.class, it.count));
        assert_eq!(answers.collect::<Vec<_>>(), [("/a/*", 2, 3), ("/a/*", 5, 1), ("/b/*", 1, 1)]);
        assert!(report.answers.iter().all(|it| it.pool == "web"));
        let [a, b] = report.latencies.as_slice() else { panic!("{:?}", report.latencies) };
        // A bound is part of what it bounds, as Prometheus has it.
        assert_eq!((a.counts[0], a.counts[1], a.counts[LATENCY_BOUNDS.len()]), (2, 1, 1), "{a:?}");
        assert_eq!((a.counts.iter().sum::<u64>(), a.microseconds), (4, 60_003_000));
        let slot = LATENCY_BOUNDS.iter().position(|bound| *bound >= 0.007).unwrap();
        assert_eq!((b.counts[slot], b.microseconds), (1, 7000));
        let mut now = Figures::report(&all);
        now.add(&report);
        assert_eq!((now.latencies[0].counts[0], now.latencies[0].microseconds), (4, 120_006_000));
        let mut fresh = Report::default();
        fresh.add(&report);
        assert_eq!(fresh.latencies, report.latencies);
    }
}
