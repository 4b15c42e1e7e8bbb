//! Counting the flows of backends that somebody waits for: they drain, or are gone from the document.

use std::collections::{BTreeMap, BTreeSet};

use super::Core;
use crate::{
    daemon::snapshot::address,
    dataplane::{BackendEntry, Dataplane, DataplaneError},
    health::{Key, Now, State},
    model::{BackendAddress, Listen},
};

impl<D: Dataplane> Core<D> {
    /// Whether [`Core::census`] could change anything: a backend drains, or is gone from the document.
    pub fn wants_census(&self) -> bool {
        self.wants_census
    }

    pub(super) fn is_census_wanted(&self) -> bool {
        // When the tables are as desired, every backend of the document has its entry.
        let gone = match self.unsettled {
            None => self.tables().backends.len() > self.entries(),
            Some(_) => !self.gone().is_empty(),
        };
        gone || self.health.states().any(|(_, _, state)| state == State::Draining)
    }

    /// Counts the flows and records of each backend, and slots that look after connections of it; says whether the tables
    /// must change. What one that drains has besides, of the desk, is said by `at_desk`.
    ///
    /// # Errors
    /// When the flows cannot be read.
    pub fn census(&mut self, now: Now, at_desk: impl Fn(&Key) -> u64) -> Result<bool, DataplaneError> {
        let backends = &self.mirror.held().backends;
        let mut flows: BTreeMap<u32, u64> = BTreeMap::new();
        self.plane.flows(&mut |flow| {
            if backends.get(&flow.backend).is_some_and(|b| b.generation == flow.generation) {
                *flows.entry(flow.backend).or_default() += 1;
            }
        })?;
        self.plane.records(&mut |record| *flows.entry(record.backend).or_default() += 1)?;
        self.mirror.see(self.plane.observed(self.mirror.held())?);
        for backend in self.tables().remembered() {
            // Nobody knows how many there still are.
            *flows.entry(backend).or_default() += 1;
        }
        self.spent = self.gone().into_iter().filter(|index| !flows.contains_key(index)).collect();
        if !self.spent.is_empty() {
            self.turned = None;
        }
        // A backend that no service uses has none.
        let draining = self.health.states().filter(|(_, _, state)| *state == State::Draining);
        let mut left: BTreeMap<Key, u64> = draining
            .map(|(pool, backend, _)| Key { pool: pool.to_owned(), backend })
            .map(|key| {
                let requests = at_desk(&key);
                (key, requests)
            })
            .collect();
        let pools = self.pools_of_services();
        for (index, entry) in &self.tables().backends {
            if let Some(&pool) = pools.get(&entry.service) {
                let key = Key { pool: pool.to_owned(), backend: address(entry) };
                *left.entry(key).or_default() += flows.get(index).copied().unwrap_or(0);
            }
        }
        let mut changed = !self.spent.is_empty();
        for (key, flows) in left {
            let events = self.health.note_connections(&key, flows, now);
            changed |= self.hear(events);
        }
        self.wants_census = self.is_census_wanted();
        Ok(changed)
    }

    /// Backend entries that the document asks for.
    fn entries(&self) -> usize {
        let Some(loaded) = &self.loaded else { return 0 };
        let config = &loaded.document.config;
        config.services.values().map(|service| config.backends_of(service).count()).sum()
    }

    /// Indices of backends in the tables that the document does not have.
    fn gone(&self) -> BTreeSet<u32> {
        let config = self.loaded.iter().map(|loaded| &loaded.document.config);
        let services =
            config.flat_map(|config| config.services.values().map(move |service| (config, service)));
        let there: BTreeSet<(Listen, BackendAddress)> = services
            .flat_map(|(config, service)| {
                config.backends_of(service).map(|backend| (service.listen, backend.address))
            })
            .collect();
        let known = |entry: &BackendEntry| {
            let service = self.tables().services.get(&entry.service);
            service.is_some_and(|service| there.contains(&(service.listen, address(entry))))
        };
        self.tables().backends.iter().filter(|(_, entry)| !known(entry)).map(|(&index, _)| index).collect()
    }

    /// The pool of each service in the tables that the document has too, by the service's index.
    fn pools_of_services(&self) -> BTreeMap<u32, &str> {
        let services = self.loaded.as_ref().map(|loaded| &loaded.document.config.services);
        let pools: BTreeMap<_, _> = services
            .into_iter()
            .flatten()
            .map(|(_, service)| (service.listen, service.pool.as_str()))
            .collect();
        let tables = self.tables().services.iter();
        tables.filter_map(|(&index, entry)| Some((index, *pools.get(&entry.listen)?))).collect()
    }
}
