//! What the daemon knows, and what follows from it: inputs change the state, [`Core::settle`] brings the
//! tables to it. No sockets, no files, no clock: time is an argument, so tests play whole days.

mod alarms;
mod census;
mod cut;
mod roles;
mod vips;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use lb_common::abi::Tick;
use tracing::{info, warn};

use super::{
    checks::{self, Host},
    document::revision,
    foresee::foresee,
    ways::Ways,
};
use crate::{
    addresses::{MANY, Placed},
    api::view,
    config::{Complaint, Complaints, Document, Severity},
    dataplane::{
        Dataplane, DataplaneError, FlowsOf, NextHop, Op, Tables, duration_of, memory::MemoryDataplane,
        ticks_in,
    },
    health::{self, Event, Health, Key, Now, State, Verdict, Verdicts},
    model::{BackendAddress, Config, HealthCheck, Listen},
    netlink::surroundings::Surroundings,
    plan::{Desired, Plan, PlanError, Rings, plan_again, plan_verdicts},
    probe::{Answer, Answered},
};

/// After how long slots are looked at again when it has failed.
const RETRY: Duration = Duration::from_secs(10);

/// A document in force.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What it says.
    pub document: Document,
    /// Its text.
    pub text: String,
    /// What is odd about it, on this host too.
    pub warnings: Vec<Complaint>,
    /// What is odd about files that it names, when they were last read.
    pub of_files: Vec<Complaint>,
    /// When it came into force, seconds since the epoch.
    pub since: u64,
}

/// What the last probe of a backend said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// How long the last success took.
    pub latency: Option<Duration>,
    /// Why the last probe failed, if it did.
    pub failure: Option<String>,
}

/// Why a document is not put in force.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It has mistakes, or does not fit this host.
    #[error("{0}")]
    Complaints(#[from] Complaints),
    /// It does not fit the tables.
    #[error("{0}")]
    Plan(#[from] SettleError),
}

/// Why the tables could not be brought to what is desired.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// They are too small.
    #[error("{0}")]
    Plan(#[from] PlanError),
    /// They refuse.
    #[error("{0}")]
    Dataplane(#[from] DataplaneError),
}

/// A document that nothing speaks against.
struct Considered {
    /// What is only odd about it on this host.
    complaints: Vec<Complaint>,
    of_files: Vec<Complaint>,
    /// The rings that it would have, which are not to be built twice.
    rings: Rings,
    plan: Plan,
}

/// The state.
pub struct Core<D> {
    plane: D,
    /// What the data plane holds, without asking it: changed as it is changed.
    mirror: MemoryDataplane,
    /// The rings of the last plan.
    rings: Rings,
    /// Pools on which verdicts have changed since the tables were as desired, if that is all that has.
    turned: Option<BTreeSet<String>>,
    hash_key: [u64; 2],
    path: String,
    loaded: Option<Loaded>,
    refused: Option<String>,
    doubted: bool,
    /// Why the file cannot be read, while that is so.
    unreadable: Option<String>,
    read_only: Option<String>,
    health: Health,
    reports: BTreeMap<Key, Report>,
    around: Arc<Surroundings>,
    /// What `around` means for the document.
    ways: Ways,
    /// Addresses that were put; those are not the host's own.
    put: BTreeSet<Placed>,
    spent: BTreeSet<u32>,
    reloads: u64,
    refusals: u64,
    /// The last attempt to settle did not succeed.
    unsettled: Option<String>,
    /// What was applied last was not a whole plan, as far as anybody knows: packets may see what it left.
    broken_off: bool,
    /// An interface of the document is not attached.
    unattached: Option<String>,
    /// Somebody waits for flows to end; found out whenever tables or health change.
    wants_census: bool,
    /// When slots are to be looked at again, though nothing happens.
    due: Option<Tick>,
    /// Backends in the tables whose connections have been cut, and may not know.
    cut: BTreeSet<u32>,
    /// Connections cut, by where their service listens.
    cuts: BTreeMap<Listen, u64>,
}

impl<D: Dataplane> Core<D> {
    /// Takes over a data plane as it is. `hash_key` is used unless the tables have one already.
    ///
    /// # Errors
    /// When the tables cannot be read.
    pub fn new(plane: D, path: String, hash_key: [u64; 2], seed: u64) -> Result<Self, DataplaneError> {
        let tables = plane.tables()?;
        let cut = tables.backends.iter().filter(|(_, entry)| entry.flows == FlowsOf::Cut);
        Ok(Self {
            cut: cut.map(|(&index, _)| index).collect(),
            cuts: BTreeMap::new(),
            hash_key: tables.globals.as_ref().map_or(hash_key, |globals| globals.hash_key),
            mirror: MemoryDataplane::from_tables(&tables),
            rings: Rings::default(),
            turned: None,
            plane,
            path,
            loaded: None,
            refused: None,
            doubted: false,
            unreadable: None,
            read_only: None,
            health: Health::new(seed),
            reports: BTreeMap::new(),
            around: Arc::default(),
            ways: Ways::default(),
            put: BTreeSet::new(),
            spent: BTreeSet::new(),
            reloads: 0,
            refusals: 0,
            unsettled: None,
            broken_off: true,
            unattached: None,
            wants_census: false,
            due: None,
        })
    }
}

impl<D: Dataplane> Core<D> {
    /// The data plane.
    pub fn plane(&self) -> &D {
        &self.plane
    }

    /// The data plane, for what is not operations on tables: attaching, taking down.
    pub fn plane_mut(&mut self) -> &mut D {
        &mut self.plane
    }

    /// What the data plane holds.
    pub fn tables(&self) -> &Tables {
        self.mirror.held()
    }

    /// The document in force.
    pub fn loaded(&self) -> Option<&Loaded> {
        self.loaded.as_ref()
    }

    /// The surroundings.
    pub fn around(&self) -> &Surroundings {
        &self.around
    }

    /// Puts a document in force, if it fits this host and the tables too; else changes nothing. `around`
    /// knows the ways to its backends.
    ///
    /// # Errors
    /// What speaks against it.
    pub fn load(
        &mut self,
        text: &str,
        document: Document,
        around: Arc<Surroundings>,
        host: &Host,
        now: Now,
    ) -> Result<(), LoadError> {
        let considered = self.considered(&document, &around, host, now)?;
        self.rings = considered.rings;
        let mut warnings = document.warnings.clone();
        warnings.extend(considered.complaints);
        let of_files = considered.of_files;
        let loaded = Loaded { document, text: text.to_owned(), warnings, of_files, since: now.epoch };
        let config = &loaded.document.config;
        tell(&self.health.configure(config, &self.remembered(config), now), &self.reports);
        self.turned = None;
        let there = |key: &Key| {
            let pool = config.pools.get(&key.pool);
            pool.is_some_and(|pool| pool.backends.iter().any(|backend| backend.address == key.backend))
        };
        self.reports.retain(|key, _| there(key));
        self.ways = Ways::of(config, &self.put, &around);
        self.around = around;
        self.loaded = Some(loaded);
        self.refused = None;
        self.reloads += 1;
        Ok(())
    }

    /// Whether [`Core::load`] would accept a document.
    ///
    /// # Errors
    /// What speaks against it.
    pub fn consider(
        &self,
        document: &Document,
        around: &Surroundings,
        host: &Host,
        now: Now,
    ) -> Result<(), LoadError> {
        self.considered(document, around, host, now).map(drop)
    }

    /// What [`Core::load`] and [`Core::settle`] would change.
    ///
    /// # Errors
    /// What speaks against the document, or that connections cannot be read.
    pub fn foresee(
        &self,
        document: &Document,
        around: &Surroundings,
        host: &Host,
        now: Now,
    ) -> Result<view::Foreseen, LoadError> {
        let considered = self.considered(document, around, host, now)?;
        let foreseen = foresee(&self.plane, self.tables(), &considered.plan.ops);
        let warnings = document.warnings.iter().cloned().chain(considered.complaints);
        let warnings = warnings.chain(considered.of_files).collect();
        Ok(view::Foreseen { warnings, ..foreseen.map_err(SettleError::from)? })
    }

    fn considered(
        &self,
        document: &Document,
        around: &Surroundings,
        host: &Host,
        now: Now,
    ) -> Result<Considered, LoadError> {
        let complaints = checks::of_host(document, around, host);
        let of_files = checks::of_files(document, host.now);
        if complaints.iter().chain(&of_files).any(|complaint| complaint.severity == Severity::Error) {
            return Err(Complaints::errors_of([complaints, of_files].concat()).into());
        }
        let mut health = self.health.clone();
        health.configure(&document.config, &self.remembered(&document.config), now);
        let ways = Ways::of(&document.config, &self.put, around);
        let mut rings = self.rings.clone();
        let now = self.plane.now().map_err(SettleError::from)?;
        let desired = desired(&document.config, &health, &ways, self.hash_key, &self.spent, now);
        let plan = plan_again(&desired, self.tables(), &mut rings).map_err(SettleError::from)?;
        Ok(Considered { complaints, of_files, rings, plan })
    }

    /// At a start, health is as the tables say it was.
    fn remembered(&self, config: &Config) -> Verdicts {
        match self.loaded {
            None => health::remembered(config, self.tables()),
            Some(_) => Verdicts::new(),
        }
    }

    /// Remembers why the file as it is now is not in force.
    pub fn refuse(&mut self, why: String) {
        self.refused = Some(why);
        self.refusals += 1;
    }

    /// Why the file as it is now is not in force, if it is not.
    pub fn refused(&self) -> Option<&String> {
        self.refused.as_ref()
    }

    /// Remembers what is odd about files that the document names, which have been read again.
    pub fn set_of_files(&mut self, found: Vec<Complaint>) {
        let Some(loaded) = &mut self.loaded else { return };
        loaded.of_files = found;
    }

    /// Remembers whether edits can be written.
    pub fn set_read_only(&mut self, why: Option<String>) {
        self.read_only = why;
    }

    /// Remembers whether an interface of the document is not attached, and why.
    pub fn set_unattached(&mut self, why: Option<String>) {
        self.unattached = why;
    }

    /// Why an interface of the document is not attached.
    pub fn unattached(&self) -> Option<&str> {
        self.unattached.as_deref()
    }

    /// The surroundings have changed.
    pub fn set_around(&mut self, around: Arc<Surroundings>) {
        self.around = around;
        self.find_ways();
    }

    fn find_ways(&mut self) {
        let ways = self.loaded.as_ref().map(|l| Ways::of(&l.document.config, &self.put, &self.around));
        let ways = ways.unwrap_or_default();
        // Most that happens in a network is nothing to these services, and plans for all of them take long.
        if ways != self.ways {
            self.ways = ways;
            self.turned = None;
        }
    }

    /// The addresses that were put are these now.
    pub fn set_put(&mut self, put: BTreeSet<Placed>) {
        self.put = put;
        self.find_ways();
    }

    /// Takes in the answer to a probe; says whether the tables, or what the desk knows, must change.
    pub fn answer(&mut self, answer: Answer<Key>, now: Now) -> bool {
        let Answer { key, outcome } = answer;
        let events = match &outcome {
            Ok(Answered { said: Some(said), .. }) => self.health.observe(&key, *said, now),
            outcome => self.health.report(&key, outcome.is_ok(), now),
        };
        let report = self.reports.entry(key).or_default();
        match outcome {
            Ok(Answered { latency, .. }) => *report = Report { latency: Some(latency), failure: None },
            Err(error) => report.failure = Some(error.to_string()),
        }
        self.hear(events)
    }

    /// Tells what happened to backends; says whether anybody is to go by it.
    fn hear(&mut self, events: Vec<Event>) -> bool {
        let mut changed = false;
        tell(&events, &self.reports);
        for event in events {
            match event {
                Event::Verdicts { pool } => {
                    changed = true;
                    self.turned.iter_mut().for_each(|pools| _ = pools.insert(pool.clone()));
                }
                // The desk goes on with servers of whom nothing is known.
                Event::Transition { from: Some(State::Starting), .. } => changed = true,
                Event::Doubt { doubt, .. } => self.doubted |= doubt.is_some(),
                _ => {}
            }
        }
        changed
    }

    /// The probes that are due; each is to be sent once.
    pub fn take_due(&mut self, now: Now) -> Vec<(Key, HealthCheck)> {
        self.health.take_due(now)
    }

    /// Time has passed: deadlines of drains may have, and shares may grow. Says whether the tables must change.
    pub fn pass_time(&mut self, now: Now) -> bool {
        let events = self.health.pass_time(now);
        self.hear(events)
    }

    /// How long until there is something to do without an input: a tick exact where slots are due.
    pub fn wait(&self, now: Now) -> Option<Duration> {
        let probe = self.health.next_probe().map(|due| due.saturating_sub(now.uptime));
        let due = self.due.map(|due| self.plane.now().map_or(RETRY, |tick| duration_of(due.since(tick))));
        probe.into_iter().chain(self.health.wait(now)).chain(due).min()
    }

    /// Whether slots are to be looked at by now: [`Core::settle`] does.
    pub fn is_due(&self) -> bool {
        let now = self.plane.now();
        self.due.zip(now.ok()).is_some_and(|(due, now)| now.has_reached(due))
    }
}

impl<D: Dataplane> Core<D> {
    /// Brings the tables to what is desired; gives back the number of operations.
    ///
    /// # Errors
    /// When the tables are too small, or refuse. What was applied stays; the next call goes on from there.
    pub fn settle(&mut self) -> Result<usize, SettleError> {
        let outcome = self.try_settle();
        self.unsettled = outcome.as_ref().err().map(ToString::to_string);
        self.wants_census = self.is_census_wanted();
        outcome
    }

    fn try_settle(&mut self) -> Result<usize, SettleError> {
        let Some(loaded) = &self.loaded else { return Ok(0) };
        let (due, is_due) = (self.due, self.is_due());
        // If it fails it is tried again, not at once.
        self.due = self.plane.now().ok().map(|now| now.after(ticks_in(RETRY)));
        self.mirror.see(self.plane.observed(self.mirror.held())?);
        let turned = self.turned.take();
        let config = &loaded.document.config;
        let now = self.plane.now()?;
        let desired = desired(config, &self.health, &self.ways, self.hash_key, &self.spent, now);
        // When slots are due, anybody's may be.
        let short = match &turned {
            Some(pools) if !is_due => plan_verdicts(&desired, self.mirror.held(), pools, &mut self.rings)?,
            _ => None,
        };
        let plan = match short {
            // What is due of the other pools stays so.
            Some(plan) => {
                Plan { due: due.into_iter().chain(plan.due).min_by_key(|due| due.since(now)), ..plan }
            }
            None => plan_again(&desired, self.mirror.held(), &mut self.rings)?,
        };
        if self.broken_off && !plan.ops.is_empty() {
            // Pages that it has freed are not written before packets have left them.
            self.plane.apply(&Op::Settle)?;
            self.broken_off = false;
        }
        for op in &plan.ops {
            self.cut.extend(cut::by(op, self.mirror.held()));
            if let Err(error) = self.plane.apply(op).and_then(|()| self.mirror.apply(op)) {
                self.broken_off = true;
                // What they hold now is what they say themselves.
                self.mirror = MemoryDataplane::from_tables(&self.plane.tables()?);
                return Err(error.into());
            }
        }
        // Slots change with the time too; a plan for verdicts alone leaves those of others for when they are due.
        debug_assert!(
            turned.is_none()
                || self.mirror.held().services.values().any(|service| service.ring.first_side.is_some())
                || plan_again(&desired, self.mirror.held(), &mut self.rings).is_ok_and(|p| p.ops.is_empty()),
            "a plan for {turned:?} alone has left something to do"
        );
        self.due = plan.due;
        self.spent.retain(|index| !plan.ops.contains(&Op::RemoveBackend { index: *index }));
        self.turned = self.spent.is_empty().then(BTreeSet::new);
        Ok(plan.ops.len())
    }
}

impl<D: Dataplane> Core<D> {
    /// The way to a backend's address, or why there is none.
    ///
    /// # Errors
    /// In words for an operator.
    pub fn next_hop(&self, target: IpAddr) -> Result<NextHop, String> {
        match self.ways.next_hops.get(&target) {
            Some(&hop) => Ok(hop),
            None => Err(self
                .ways
                .none
                .get(&target)
                .cloned()
                .unwrap_or_else(|| format!("nobody asked for {target}"))),
        }
    }

    /// What the last probe of a backend said.
    pub fn report(&self, pool: &str, backend: BackendAddress) -> Option<&Report> {
        self.reports.get(&Key { pool: pool.to_owned(), backend })
    }

    /// Whether nobody can say yet how a backend is: it has not failed as often as a good one may.
    pub fn is_unknown(&self, pool: &str, backend: BackendAddress) -> bool {
        self.state(pool, backend).0 == State::Starting
    }

    /// How a backend is, and what is to be done with it.
    pub fn state(&self, pool: &str, backend: BackendAddress) -> (State, Verdict) {
        let verdict = self.health.verdicts().get(pool).and_then(|pool| pool.any.get(&backend));
        let state = self.health.state(&Key { pool: pool.to_owned(), backend }).unwrap_or(State::Starting);
        (state, verdict.copied().unwrap_or(Verdict::RESTING))
    }

    /// The document, for the API.
    pub fn document_status(&self) -> view::Document {
        let loaded = self.loaded.as_ref();
        let warnings = loaded.into_iter().flat_map(|loaded| loaded.warnings.iter().chain(&loaded.of_files));
        view::Document {
            path: self.path.clone(),
            revision: loaded.map(|loaded| revision(&loaded.text)).unwrap_or_default(),
            read_only: self.read_only.clone(),
            since: loaded.map_or(0, |loaded| loaded.since),
            warnings: warnings.map(|complaint| complaint.of_file(&self.path)).collect(),
            refused: self.refused.clone(),
            reloads: self.reloads,
            refusals: self.refusals,
        }
    }
}

/// What the tables should say.
fn desired<'a>(
    config: &'a Config,
    health: &'a Health,
    ways: &'a Ways,
    hash_key: [u64; 2],
    spent: &'a BTreeSet<u32>,
    now: Tick,
) -> Desired<'a> {
    Desired {
        config,
        verdicts: health.verdicts(),
        next_hops: &ways.next_hops,
        sources: &ways.sources,
        shared_vips: &ways.shared_vips,
        interfaces: &ways.interfaces,
        hash_key,
        same_interface_tx: !ways.veth,
        spent,
        now,
    }
}

/// Logs what happened to backends, and why where a probe has said so. Of many new ones, as a great document has them,
/// no more than the number.
fn tell(events: &[Event], reports: &BTreeMap<Key, Report>) {
    let mut new: BTreeMap<State, usize> = BTreeMap::new();
    for event in events {
        if let Event::Transition { from: None, to, .. } = event {
            *new.entry(*to).or_default() += 1;
        }
    }
    new.retain(|_, number| *number > MANY);
    new.iter().for_each(|(now, backends)| info!(backends, before = "new", %now, "backends"));
    for event in events {
        match event {
            Event::Transition { from: None, to, .. } if new.contains_key(to) => {}
            Event::Transition { key, from, to } => {
                let before = from.map_or_else(|| "new".to_owned(), |state| state.to_string());
                match reports.get(key).and_then(|report| report.failure.as_ref()) {
                    Some(why) if *to == State::Unhealthy => {
                        warn!(pool = key.pool, backend = %key.backend, before, now = %to, why, "backend");
                    }
                    _ => info!(pool = key.pool, backend = %key.backend, before, now = %to, "backend"),
                }
            }
            Event::Role { key, from, said } => {
                let before = from.map_or_else(|| "unknown".to_owned(), |says| says.to_string());
                info!(pool = key.pool, backend = %key.backend, before, now = %said, "role");
            }
            Event::Primary { pool, from, to, why } => {
                let name = |address: &Option<BackendAddress>| {
                    address.map_or_else(|| "nobody".to_owned(), |address| address.to_string())
                };
                match to {
                    Some(_) => info!(pool, before = name(from), now = name(to), "writes: {why}"),
                    None => warn!(pool, before = name(from), now = name(to), "writes: {why}"),
                }
            }
            // Alarms, and told as such.
            Event::AllFailed { .. } | Event::AllFailedOver { .. } | Event::Doubt { .. } => {}
            Event::Verdicts { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests;
