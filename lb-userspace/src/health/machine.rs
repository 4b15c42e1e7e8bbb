//! The state machine: what probes say, and what follows.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Event, Key, Now, PoolVerdicts, Schedule, State, Verdict, Verdicts};
use crate::{
    dataplane::FlowsOf,
    model::{Admin, BackendAddress, Config, HealthCheck, OnUnhealthy, Panic},
};

/// The health of every backend of a document.
#[derive(Clone, Debug)]
pub struct Health {
    pools: BTreeMap<String, Pool>,
    verdicts: Verdicts,
    schedule: Schedule,
    /// Deadlines of drains, seconds since the epoch, and whose pool's: all that time alone changes.
    deadlines: BTreeSet<(u64, String)>,
}

#[derive(Clone, Debug)]
struct Pool {
    check: Option<HealthCheck>,
    on_unhealthy: OnUnhealthy,
    panic: Panic,
    backends: BTreeMap<BackendAddress, Backend>,
    /// All have failed: those that stay in use.
    all_failed: Option<BTreeSet<BackendAddress>>,
}

#[derive(Clone, Debug)]
struct Backend {
    admin: Admin,
    probed: Probed,
    /// Results in a row that speak against `probed`.
    against: u32,
    /// When `probed` last changed.
    since: Duration,
    /// A drain is done: no connection was left.
    empty: bool,
    /// As last announced.
    state: Option<State>,
}

/// What the probes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probed {
    Unknown,
    Good,
    Bad,
}

impl Health {
    /// Of nobody yet. The seed spreads the times of probes.
    pub fn new(seed: u64) -> Self {
        let (pools, verdicts) = (BTreeMap::new(), Verdicts::new());
        Self { pools, verdicts, schedule: Schedule::new(seed), deadlines: BTreeSet::new() }
    }

    /// Takes over a document. Who is known stays as it is; who is new counts as what `remembered` says
    /// (see [`super::remembered`]), else starts without traffic until its first success. A backend
    /// without a health check is healthy.
    pub fn configure(&mut self, config: &Config, remembered: &Verdicts, now: Now) -> Vec<Event> {
        let mut before = std::mem::take(&mut self.pools);
        for (name, pool) in &config.pools {
            let mut old = before.remove(name);
            let unchecked = old.as_ref().is_some_and(|old| old.check.is_none());
            let backends = pool.backends.iter().map(|backend| {
                let known = old.as_mut().and_then(|old| old.backends.remove(&backend.address));
                let earlier = remembered.get(name).and_then(|pool| pool.get(&backend.address));
                let state = match known {
                    Some(known) => known.taken_over(backend.admin, unchecked && pool.health.is_some()),
                    None => Backend::new(backend.admin, earlier, now),
                };
                (backend.address, state)
            });
            let pool = Pool {
                check: pool.health.clone(),
                on_unhealthy: pool.on_unhealthy,
                panic: pool.panic,
                backends: backends.collect(),
                // Who must not stay in use any more is let go at once.
                all_failed: old.and_then(|old| old.all_failed).map(|kept| match pool.panic {
                    Panic::Keep => kept,
                    Panic::Fail => BTreeSet::new(),
                }),
            };
            self.pools.insert(name.clone(), pool);
        }
        self.verdicts.retain(|name, _| self.pools.contains_key(name));
        let probed = self.pools.iter().flat_map(|(name, pool)| pool.probed(name));
        self.schedule.set(probed, now.uptime);
        let deadlines = self.pools.iter().flat_map(|(name, pool)| {
            pool.deadlines().map(|deadline| (deadline, name.clone())).collect::<Vec<_>>()
        });
        self.deadlines = deadlines.collect();
        let names: Vec<String> = self.pools.keys().cloned().collect();
        names.iter().flat_map(|name| self.refresh(name, now)).collect()
    }

    /// The result of a probe. Of who is not known any more, nothing follows.
    pub fn report(&mut self, key: &Key, success: bool, now: Now) -> Vec<Event> {
        let Some(pool) = self.pools.get_mut(&key.pool) else { return Vec::new() };
        let Some((check, backend)) = pool.check.as_ref().zip(pool.backends.get_mut(&key.backend)) else {
            return Vec::new();
        };
        // Most say what is known: thousands of them a second must cost nothing.
        if backend.admin == Admin::Disabled || !backend.hear(success, check, now.uptime) {
            return Vec::new();
        }
        self.refresh(&key.pool, now)
    }

    /// How many connections a backend has: a drain without any is done.
    pub fn note_connections(&mut self, key: &Key, connections: u64, now: Now) -> Vec<Event> {
        let backend = self.pools.get_mut(&key.pool).and_then(|pool| pool.backends.get_mut(&key.backend));
        match backend {
            Some(backend) => backend.empty = connections == 0,
            None => return Vec::new(),
        }
        self.refresh(&key.pool, now)
    }

    /// Time has passed: deadlines of drains may have.
    pub fn pass_time(&mut self, now: Now) -> Vec<Event> {
        let mut events = Vec::new();
        while self.deadlines.first().is_some_and(|(deadline, _)| *deadline <= now.epoch) {
            let Some((_, name)) = self.deadlines.pop_first() else { break };
            events.extend(self.refresh(&name, now));
        }
        events
    }

    /// The next deadline of a drain, seconds since the epoch: the time for [`Health::pass_time`].
    pub fn next_deadline(&self, now: Now) -> Option<u64> {
        self.deadlines.iter().map(|(deadline, _)| *deadline).find(|deadline| *deadline > now.epoch)
    }

    /// When the next probe is due.
    pub fn next_probe(&self) -> Option<Duration> {
        self.schedule.next()
    }

    /// Whom to probe by now, and how. Each is asked once; its next time is set.
    pub fn take_due(&mut self, now: Now) -> Vec<(Key, HealthCheck)> {
        let due = self.schedule.take_due(now.uptime);
        let check = |key: Key| {
            let check = self.pools.get(&key.pool)?.check.clone()?;
            Some((key, check))
        };
        due.into_iter().filter_map(check).collect()
    }

    /// What is to be done with every backend, for [`crate::plan`].
    pub fn verdicts(&self) -> &Verdicts {
        &self.verdicts
    }

    /// How a backend is.
    pub fn state(&self, key: &Key) -> Option<State> {
        self.pools.get(&key.pool)?.backends.get(&key.backend)?.state
    }

    /// All backends and how they are.
    pub fn states(&self) -> impl Iterator<Item = (&str, BackendAddress, State)> {
        self.pools.iter().flat_map(|(name, pool)| {
            let backends = pool.backends.iter();
            backends.filter_map(move |(&address, backend)| Some((name.as_str(), address, backend.state?)))
        })
    }

    /// Pools of which all backends fail, and those that stay in use nevertheless.
    pub fn all_failed(&self) -> impl Iterator<Item = (&str, &BTreeSet<BackendAddress>)> {
        self.pools.iter().filter_map(|(name, pool)| Some((name.as_str(), pool.all_failed.as_ref()?)))
    }

    /// Recomputes what follows for a pool; announces what is different.
    fn refresh(&mut self, name: &str, now: Now) -> Vec<Event> {
        let Some(pool) = self.pools.get_mut(name) else { return Vec::new() };
        let mut events = Vec::new();
        let failed_before = pool.all_failed.is_some();
        pool.see_whether_all_failed(now.uptime);
        match &pool.all_failed {
            Some(kept) if !failed_before => {
                events.push(Event::AllFailed { pool: name.to_owned(), kept: kept.iter().copied().collect() });
            }
            None if failed_before => events.push(Event::AllFailedOver { pool: name.to_owned() }),
            _ => {}
        }
        let checked = pool.check.is_some();
        for (&address, backend) in &mut pool.backends {
            let state = backend.state_at(checked, now.epoch);
            if backend.state != Some(state) {
                let key = Key { pool: name.to_owned(), backend: address };
                events.push(Event::Transition { key, from: backend.state, to: state });
                backend.state = Some(state);
            }
        }
        let verdicts: PoolVerdicts = pool
            .backends
            .iter()
            .map(|(&address, backend)| (address, pool.verdict(address, backend, now)))
            .collect();
        if self.verdicts.get(name) != Some(&verdicts) {
            self.verdicts.insert(name.to_owned(), verdicts);
            events.push(Event::Verdicts { pool: name.to_owned() });
        }
        events
    }
}

impl Pool {
    /// Who is probed. Not who is disabled: its server may be under repair.
    fn probed(&self, name: &str) -> Vec<(Key, Duration, f64)> {
        let Some(check) = &self.check else { return Vec::new() };
        let backends = self.backends.iter().filter(|(_, backend)| backend.admin != Admin::Disabled);
        let key = |address| Key { pool: name.to_owned(), backend: address };
        backends.map(|(&address, _)| (key(address), check.interval, check.jitter)).collect()
    }

    fn deadlines(&self) -> impl Iterator<Item = u64> {
        self.backends.values().filter_map(|backend| match backend.admin {
            Admin::Drain { deadline } => deadline,
            Admin::Enabled | Admin::Disabled => None,
        })
    }

    /// When nobody is left, those stay in use that turned bad together with the last one: an outage is
    /// seen at each backend at its own time, up to an interval, its jitter and a time-out apart.
    fn see_whether_all_failed(&mut self, now: Duration) {
        let enabled = || self.backends.iter().filter(|(_, backend)| backend.admin == Admin::Enabled);
        let all = self.check.is_some()
            && enabled().all(|(_, backend)| backend.probed != Probed::Good)
            && enabled().any(|(_, backend)| backend.probed == Probed::Bad);
        if !all {
            self.all_failed = None;
        } else if self.all_failed.is_none() {
            let window =
                self.check.as_ref().map_or(Duration::ZERO, |check| check.interval * 2 + check.timeout);
            let together = enabled().filter(|(_, backend)| {
                self.panic == Panic::Keep
                    && backend.probed == Probed::Bad
                    && now - backend.since.min(now) <= window
            });
            self.all_failed = Some(together.map(|(&address, _)| address).collect());
        }
    }

    fn verdict(&self, address: BackendAddress, backend: &Backend, now: Now) -> Verdict {
        let cut = Verdict { flows: FlowsOf::Cut, ..Verdict::RESTING };
        let kept = self.all_failed.as_ref().is_some_and(|kept| kept.contains(&address));
        match (backend.admin, backend.probed) {
            (Admin::Disabled, _) => cut,
            (Admin::Drain { deadline: Some(deadline) }, _) if deadline <= now.epoch => cut,
            (Admin::Drain { .. }, _) => Verdict::RESTING,
            (Admin::Enabled, _) if self.check.is_none() || kept => Verdict::USABLE,
            (Admin::Enabled, Probed::Good) => Verdict::USABLE,
            (Admin::Enabled, Probed::Unknown) => Verdict::RESTING,
            (Admin::Enabled, Probed::Bad) => Verdict {
                dead: true,
                flows: match self.on_unhealthy {
                    OnUnhealthy::Keep => FlowsOf::Keep,
                    OnUnhealthy::Move => FlowsOf::Forget,
                    OnUnhealthy::Reset => FlowsOf::Cut,
                },
                ..Verdict::RESTING
            },
        }
    }
}

impl Backend {
    fn new(admin: Admin, earlier: Option<&Verdict>, now: Now) -> Self {
        let probed = match earlier {
            Some(Verdict { usable: true, .. }) => Probed::Good,
            Some(Verdict { dead: true, .. }) => Probed::Bad,
            _ => Probed::Unknown,
        };
        Self { admin, probed, against: 0, since: now.uptime, empty: false, state: None }
    }

    /// With what the operator wants now. `checked_now`: a health check has been added, and what worked
    /// without one goes on working until it fails.
    fn taken_over(mut self, admin: Admin, checked_now: bool) -> Self {
        if checked_now {
            self.probed = Probed::Good;
        }
        if self.admin == Admin::Disabled && admin != Admin::Disabled {
            // Nobody has asked it meanwhile.
            self.probed = Probed::Unknown;
        }
        if !matches!((self.admin, admin), (Admin::Drain { .. }, Admin::Drain { .. })) {
            self.empty = false;
        }
        self.admin = admin;
        self
    }

    /// Takes in a result; says whether what the probes say has turned.
    fn hear(&mut self, success: bool, check: &HealthCheck, now: Duration) -> bool {
        if (self.probed == Probed::Good) == success {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let (needed, turned) = match self.probed {
            // One success is enough for a start; a failure changes nothing.
            Probed::Unknown => (1, Probed::Good),
            Probed::Bad => (check.rise, Probed::Good),
            Probed::Good => (check.fall, Probed::Bad),
        };
        if self.against < needed {
            return false;
        }
        self.probed = turned;
        self.against = 0;
        self.since = now;
        true
    }

    fn state_at(&self, checked: bool, epoch: u64) -> State {
        match (self.admin, self.probed) {
            (Admin::Disabled, _) => State::Disabled,
            (Admin::Drain { deadline: Some(deadline) }, _) if deadline <= epoch => State::Drained,
            (Admin::Drain { .. }, _) if self.empty => State::Drained,
            (Admin::Drain { .. }, _) => State::Draining,
            (Admin::Enabled, _) if !checked => State::Healthy,
            (Admin::Enabled, Probed::Good) => State::Healthy,
            (Admin::Enabled, Probed::Unknown) => State::Starting,
            (Admin::Enabled, Probed::Bad) => State::Unhealthy,
        }
    }
}

#[cfg(test)]
mod tests;
