//! The state machine: what probes say, and what follows.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Cluster, Event, Key, Now, Observation, PoolVerdicts, Says, Schedule, State, Verdict, Verdicts,
    cluster::{Fitness, Outcome},
};
use crate::{
    dataplane::FlowsOf,
    model::{
        Admin, BackendAddress, Config, HealthCheck, OnNoPrimary, OnUnfit, OnUnhealthy, Panic, ReplicaFallback,
    },
};

/// The health of every backend of a document.
#[derive(Clone, Debug)]
pub struct Health {
    pools: BTreeMap<String, Pool>,
    verdicts: Verdicts,
    schedule: Schedule,
    /// Deadlines of drains, seconds since the epoch, and whose pool's.
    deadlines: BTreeSet<(u64, String)>,
    /// When a server's share grows, or clients have waited long enough, and whose pool's.
    turns: BTreeSet<(Duration, String)>,
}

#[derive(Clone, Debug)]
struct Pool {
    check: Option<HealthCheck>,
    on_unhealthy: OnUnhealthy,
    panic: Panic,
    replica_fallback: ReplicaFallback,
    on_unfit: OnUnfit,
    slow_start: Option<Duration>,
    on_no_primary: OnNoPrimary,
    backends: BTreeMap<BackendAddress, Backend>,
    /// All have failed: those that stay in use.
    all_failed: Option<BTreeSet<BackendAddress>>,
    /// Who is what, where the check tells.
    cluster: Option<Cluster>,
}

#[derive(Clone, Debug)]
struct Backend {
    admin: Admin,
    probed: Probed,
    /// Results in a row that speak against `probed`.
    against: u32,
    /// When `probed` last changed.
    since: Duration,
    /// Others were there before it: it may start slowly when it is first found good.
    is_new: bool,
    /// When it began to start slowly, if ever.
    started: Option<Duration>,
    /// A drain is done: no connection was left.
    empty: bool,
    /// As last announced.
    state: Option<State>,
}

/// What the probes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probed {
    Unknown,
    /// Was unknown, and has failed as often as a good one may.
    Failed,
    Good,
    Bad,
}

impl Health {
    /// Of nobody yet. The seed spreads the times of probes.
    pub fn new(seed: u64) -> Self {
        let (pools, verdicts) = (BTreeMap::new(), Verdicts::new());
        let (deadlines, turns) = (BTreeSet::new(), BTreeSet::new());
        Self { pools, verdicts, schedule: Schedule::new(seed), deadlines, turns }
    }

    /// Takes over a document. Who is known stays as it is; who is new counts as what `remembered` says
    /// (see [`super::remembered`]), else starts without traffic until its first success. A backend
    /// without a health check is healthy.
    pub fn configure(&mut self, config: &Config, remembered: &Verdicts, now: Now) -> Vec<Event> {
        let mut before = std::mem::take(&mut self.pools);
        let mut events = Vec::new();
        for (name, pool) in &config.pools {
            let mut old = before.remove(name);
            let unchecked = old.as_ref().is_some_and(|old| old.check.is_none());
            let is_new = old.is_some();
            let backends = pool.backends.iter().map(|backend| {
                let known = old.as_mut().and_then(|old| old.backends.remove(&backend.address));
                let earlier = remembered.get(name).into_iter().flat_map(|pool| pool.on(backend.address));
                let state = match known {
                    Some(known) => known.taken_over(backend.admin, unchecked && pool.health.is_some()),
                    None => {
                        let earlier: Vec<_> = earlier.copied().collect();
                        Backend { is_new, ..Backend::new(backend.admin, &earlier, now) }
                    }
                };
                (backend.address, state)
            });
            let backends = backends.collect();
            let tells = pool.health.as_ref().is_some_and(|check| check.probe.tells_roles());
            let known = old.as_mut().and_then(|old| old.cluster.take());
            let mut cluster = tells.then(|| known.unwrap_or_else(|| Cluster::new(now.uptime)));
            if let Some(cluster) = &mut cluster {
                let servers = pool.backends.iter().map(|b| (b.address, b.admin == Admin::Disabled));
                let roles = remembered.get(name).map(roles).unwrap_or_default();
                let outcome = cluster.configure(servers, &roles, now.uptime);
                events.extend(told(name, None, outcome));
            }
            let pool = Pool {
                check: pool.health.clone(),
                on_unhealthy: pool.on_unhealthy,
                panic: pool.panic,
                replica_fallback: pool.replica_fallback,
                on_unfit: pool.on_unfit,
                slow_start: pool.slow_start,
                on_no_primary: pool.on_no_primary,
                backends,
                cluster,
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
        events.extend(names.iter().flat_map(|name| self.refresh(name, now)));
        events
    }

    /// The result of a probe that tells no role. Of who is not known any more, nothing follows.
    pub fn report(&mut self, key: &Key, success: bool, now: Now) -> Vec<Event> {
        self.hear(key, success, None, now)
    }

    /// A server has said who it is. Liveness asks for several answers; a role counts from the first.
    pub fn observe(&mut self, key: &Key, said: Observation, now: Now) -> Vec<Event> {
        self.hear(key, true, Some(said), now)
    }

    fn hear(&mut self, key: &Key, success: bool, said: Option<Observation>, now: Now) -> Vec<Event> {
        let Some(pool) = self.pools.get_mut(&key.pool) else { return Vec::new() };
        let Some((check, backend)) = pool.check.as_ref().zip(pool.backends.get_mut(&key.backend)) else {
            return Vec::new();
        };
        if backend.admin == Admin::Disabled {
            return Vec::new();
        }
        let turned = backend.hear(success, check, now.uptime);
        let outcome = pool.cluster.as_mut().map(|cluster| match said {
            Some(said) => {
                let fitness = Fitness { max_lag: check.probe.max_lag(), rise: check.rise, fall: check.fall };
                cluster.hear(key.backend, said, fitness, now.uptime)
            }
            None => cluster.miss(key.backend, backend.probed != Probed::Good, now.uptime),
        });
        // Most say what is known: thousands of them a second must cost nothing.
        let outcome = outcome.unwrap_or_default();
        if !turned && !outcome.changes() && !outcome.urgent {
            return Vec::new();
        }
        let mut events = told(&key.pool, Some((key, said)), outcome.clone());
        if outcome.urgent {
            self.schedule.hasten(&key.pool, now.uptime);
        }
        events.extend(self.refresh(&key.pool, now));
        events
    }

    /// Asks everybody of a pool now; says whether there is such a pool and somebody to ask.
    pub fn recheck(&mut self, pool: &str, now: Now) -> bool {
        self.schedule.hasten(pool, now.uptime);
        self.pools.get(pool).is_some_and(|pool| pool.check.is_some() && !pool.backends.is_empty())
    }

    /// An operator says who the primary of a pool is.
    ///
    /// # Errors
    /// Why it is not followed.
    pub fn promote(&mut self, key: &Key, now: Now) -> Result<Vec<Event>, String> {
        let pool = self.pools.get_mut(&key.pool);
        let pool = pool.ok_or_else(|| format!("there is no pool \"{}\"", key.pool))?;
        let cluster = pool.cluster.as_mut();
        let cluster = cluster.ok_or_else(|| {
            format!("the health check of pool \"{}\" does not tell who is the primary", key.pool)
        })?;
        let outcome = cluster.tell(key.backend, now.uptime)?;
        let mut events = told(&key.pool, Some((key, None)), outcome);
        self.schedule.hasten(&key.pool, now.uptime);
        events.extend(self.refresh(&key.pool, now));
        Ok(events)
    }

    /// What is known of who is what in a pool, where its check tells.
    pub fn cluster(&self, pool: &str) -> Option<&Cluster> {
        self.pools.get(pool)?.cluster.as_ref()
    }

    /// Those of which more than one server says that it is the primary, or nobody can tell.
    pub fn doubts(&self) -> impl Iterator<Item = (&str, &super::Doubt)> {
        self.pools.iter().filter_map(|(name, pool)| Some((name.as_str(), pool.cluster.as_ref()?.doubt()?)))
    }

    /// Remembers from before a restart which timeline of a pool was followed.
    pub fn remember_timeline(&mut self, pool: &str, timeline: u32) {
        if let Some(cluster) = self.pools.get_mut(pool).and_then(|pool| pool.cluster.as_mut()) {
            cluster.remember_timeline(timeline);
        }
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

    /// Time has passed: deadlines may have, and shares may grow.
    pub fn pass_time(&mut self, now: Now) -> Vec<Event> {
        let mut events = Vec::new();
        while self.deadlines.first().is_some_and(|(deadline, _)| *deadline <= now.epoch) {
            let Some((_, name)) = self.deadlines.pop_first() else { break };
            events.extend(self.refresh(&name, now));
        }
        while self.turns.first().is_some_and(|(due, _)| *due <= now.uptime) {
            let Some((_, name)) = self.turns.pop_first() else { break };
            events.extend(self.refresh(&name, now));
        }
        events
    }

    /// How long until [`Health::pass_time`] has something to do.
    pub fn wait(&self, now: Now) -> Option<Duration> {
        let deadline =
            self.deadlines.first().map(|(at, _)| Duration::from_secs(at.saturating_sub(now.epoch)));
        let turn = self.turns.first().map(|(due, _)| due.saturating_sub(now.uptime));
        deadline.into_iter().chain(turn).min()
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
        for due in pool.next_growth(now).into_iter().chain(pool.holds_until(now.uptime)) {
            self.turns.insert((due, name.to_owned()));
        }
        let verdicts = pool.verdicts(now);
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

    /// When the share of one of them grows next.
    fn next_growth(&self, now: Now) -> Option<Duration> {
        let slow = self.slow_start?;
        self.backends.values().flat_map(|backend| backend.growths(slow)).filter(|due| *due > now.uptime).min()
    }

    /// When nobody is left, those stay in use that turned bad together with the last one: an outage is
    /// seen at each backend at its own time, up to an interval, its jitter and a time-out apart.
    fn see_whether_all_failed(&mut self, now: Duration) {
        let enabled = || self.backends.iter().filter(|(_, backend)| backend.admin == Admin::Enabled);
        let all = self.check.is_some()
            && enabled().all(|(_, backend)| backend.probed != Probed::Good)
            && (enabled().any(|(_, backend)| backend.probed == Probed::Bad)
                || enabled().count() > 0 && enabled().all(|(_, backend)| backend.probed == Probed::Failed));
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

    fn verdicts(&self, now: Now) -> PoolVerdicts {
        let each = |verdict: &dyn Fn(BackendAddress, &Backend) -> Verdict| {
            self.backends.iter().map(|(&address, backend)| (address, verdict(address, backend))).collect()
        };
        let any = each(&|address, backend| self.verdict(address, backend, now));
        let Some(cluster) = &self.cluster else { return PoolVerdicts { any, ..PoolVerdicts::default() } };
        let primary = each(&|address, backend| self.to_write(cluster, address, backend, now));
        let fit = |address: BackendAddress, backend: &Backend| {
            let verdict = self.verdict(address, backend, now);
            Verdict { usable: verdict.usable && cluster.is_fit(address), ..verdict }
        };
        let somebody = self.backends.iter().any(|(&address, backend)| fit(address, backend).usable);
        let instead = match self.replica_fallback {
            ReplicaFallback::Primary if !somebody => cluster.primary(),
            _ => None,
        };
        let replica = each(&|address, backend| {
            let verdict = fit(address, backend);
            if instead == Some(address) {
                return self.verdict(address, backend, now);
            }
            // What is read from the primary is never old.
            let unfit = cluster.primary() != Some(address)
                && !verdict.usable
                && verdict.flows == FlowsOf::Keep
                && backend.admin == Admin::Enabled;
            match self.on_unfit {
                OnUnfit::Cut if unfit && backend.probed == Probed::Good => {
                    Verdict { flows: FlowsOf::Cut, ..verdict }
                }
                _ => verdict,
            }
        });
        let holds = match self.on_no_primary {
            OnNoPrimary::Reset => false,
            // While there is a primary too: no client meets an empty ring and is refused.
            OnNoPrimary::Hold(_) => cluster.primary().is_some() || self.holds_until(now.uptime).is_some(),
        };
        PoolVerdicts { any, primary, replica, holds }
    }

    /// Until when clients that want the primary are to wait; `None`: there is one, or they are not to wait now.
    fn holds_until(&self, now: Duration) -> Option<Duration> {
        let OnNoPrimary::Hold(longest) = self.on_no_primary else { return None };
        let cluster = self.cluster.as_ref().filter(|cluster| cluster.primary().is_none())?;
        Some(cluster.since() + longest).filter(|until| *until > now)
    }

    /// What is to be done with a backend where writes go. Liveness has no say: whether it is the primary is
    /// all, and that all others fail makes nobody one.
    fn to_write(&self, cluster: &Cluster, address: BackendAddress, backend: &Backend, now: Now) -> Verdict {
        let cut = Verdict { flows: FlowsOf::Cut, ..Verdict::RESTING };
        let primary = cluster.primary() == Some(address);
        match backend.admin {
            Admin::Disabled => cut,
            Admin::Drain { deadline: Some(deadline) } if deadline <= now.epoch => cut,
            // Nobody has had any writes yet, as far as is known: nobody has connections to be cut.
            _ if !cluster.is_led() => Verdict::RESTING,
            Admin::Enabled if primary => Verdict::USABLE,
            _ if primary || cluster.lingering() == Some(address) => Verdict::RESTING,
            _ => cut,
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
            (Admin::Enabled, Probed::Good) => {
                Verdict { share: backend.share(self.slow_start, now.uptime), ..Verdict::USABLE }
            }
            // A daemon that starts anew is not to take it for one of those that were good.
            (Admin::Enabled, Probed::Unknown | Probed::Failed) => Verdict::RESTING,
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
    /// `earlier`: what was said of it before a restart, for each kind of service.
    fn new(admin: Admin, earlier: &[Verdict], now: Now) -> Self {
        let probed = if earlier.iter().any(|verdict| verdict.usable) {
            Probed::Good
        } else if earlier.iter().any(|verdict| verdict.dead) {
            Probed::Bad
        } else {
            Probed::Unknown
        };
        let since = now.uptime;
        Self { admin, probed, against: 0, since, is_new: false, started: None, empty: false, state: None }
    }

    /// With what the operator wants now. `checked_now`: a health check has been added, and what worked
    /// without one goes on working until it fails.
    fn taken_over(mut self, admin: Admin, checked_now: bool) -> Self {
        if checked_now {
            self.probed = Probed::Good;
            self.against = 0;
        }
        if self.admin == Admin::Disabled && admin != Admin::Disabled {
            // Nobody has asked it meanwhile.
            self.probed = Probed::Unknown;
            self.against = 0;
            self.is_new = true;
        }
        if !matches!((self.admin, admin), (Admin::Drain { .. }, Admin::Drain { .. })) {
            self.empty = false;
        }
        self.admin = admin;
        self
    }

    /// Takes in a result; says whether what the probes say has turned.
    fn hear(&mut self, success: bool, check: &HealthCheck, now: Duration) -> bool {
        let (needed, turned) = match (self.probed, success) {
            (Probed::Good, true) | (Probed::Failed | Probed::Bad, false) => {
                self.against = 0;
                return false;
            }
            // One success is enough for a start.
            (Probed::Unknown | Probed::Failed, true) => (1, Probed::Good),
            (Probed::Unknown, false) => (check.fall, Probed::Failed),
            (Probed::Bad, true) => (check.rise, Probed::Good),
            (Probed::Good, false) => (check.fall, Probed::Bad),
        };
        self.against += 1;
        if self.against < needed {
            return false;
        }
        if turned == Probed::Good {
            self.started = (self.probed == Probed::Bad || self.is_new).then_some(now);
        }
        self.probed = turned;
        self.against = 0;
        self.since = now;
        true
    }

    /// Tenths of its weight that count: one at first, and one more with each tenth of the time.
    fn share(&self, slow_start: Option<Duration>, now: Duration) -> u16 {
        let to_come = slow_start.map_or(0, |slow| self.growths(slow).filter(|due| *due > now).count());
        Verdict::WHOLE - u16::try_from(to_come).unwrap_or_default()
    }

    /// When its share grows by a tenth, if it started slowly.
    fn growths(&self, slow: Duration) -> impl Iterator<Item = Duration> {
        let growth = move |started| {
            (1..Verdict::WHOLE).map(move |step| started + slow * u32::from(step) / u32::from(Verdict::WHOLE))
        };
        self.started.into_iter().flat_map(growth)
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
            (Admin::Enabled, Probed::Failed | Probed::Bad) => State::Unhealthy,
        }
    }
}

/// Who was what before a restart, as far as the rings tell: whoever had the writes, and whoever was read
/// from.
fn roles(remembered: &PoolVerdicts) -> BTreeMap<BackendAddress, Says> {
    let usable = |verdicts: &super::BackendVerdicts, says| {
        let usable = verdicts.iter().filter(|(_, verdict)| verdict.usable);
        usable.map(move |(&address, _)| (address, says)).collect::<Vec<_>>()
    };
    let replicas = usable(&remembered.replica, Says::Replica);
    // The primary may have been read from too, instead of replicas.
    replicas.into_iter().chain(usable(&remembered.primary, Says::Primary)).collect()
}

/// What came of an answer, for whoever is told.
fn told(pool: &str, answer: Option<(&Key, Option<Observation>)>, outcome: Outcome) -> Vec<Event> {
    let mut events = Vec::new();
    if let (Some((from, _)), Some((key, Some(said)))) = (outcome.role, answer) {
        events.push(Event::Role { key: key.clone(), from, said });
    }
    if let Some((from, to, why)) = outcome.turned {
        events.push(Event::Primary { pool: pool.to_owned(), from, to, why });
    }
    if let Some(doubt) = outcome.doubted {
        events.push(Event::Doubt { pool: pool.to_owned(), doubt });
    }
    events
}

#[cfg(test)]
mod tests;
