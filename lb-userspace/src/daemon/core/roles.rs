//! Who is what in pools of which one server takes writes.

use std::collections::BTreeMap;

use super::Core;
use crate::{
    api::view,
    dataplane::Dataplane,
    health::{Key, Now, Says},
    model::{BackendAddress, Role},
};

impl<D: Dataplane> Core<D> {
    /// Asks everybody of a pool at once; says whether there is somebody to ask.
    pub fn recheck(&mut self, pool: &str, now: Now) -> bool {
        self.health.recheck(pool, now)
    }

    /// An operator says who the primary is; says whether the tables must change.
    ///
    /// # Errors
    /// Why it is not followed.
    pub fn promote(&mut self, key: &Key, now: Now) -> Result<bool, String> {
        let events = self.health.promote(key, now)?;
        Ok(self.hear(events))
    }

    /// Backends of a pool that get new connections of services that want this role.
    pub fn usable(&self, pool: &str, role: Option<Role>) -> usize {
        let verdicts = self.health.verdicts().get(pool).map(|pool| pool.of(role));
        verdicts.map_or(0, |verdicts| verdicts.values().filter(|verdict| verdict.usable).count())
    }

    /// The timeline that was followed last in each pool, to be remembered over a restart.
    pub fn timelines(&self) -> BTreeMap<String, u32> {
        let pools = self.loaded.iter().flat_map(|loaded| loaded.document.config.pools.keys());
        let followed = |name: &String| Some((name.clone(), self.health.cluster(name)?.followed().1?));
        pools.filter_map(followed).collect()
    }

    /// Remembers timelines from before a restart.
    pub fn remember_timelines(&mut self, timelines: &BTreeMap<String, u32>) {
        for (pool, &timeline) in timelines {
            self.health.remember_timeline(pool, timeline);
        }
    }

    /// Who is what in a pool; `None` where its check does not tell.
    pub fn cluster(&self, pool: &str, now: Now) -> Option<view::Cluster> {
        let cluster = self.health.cluster(pool)?;
        let backends = &self.loaded.as_ref()?.document.config.pools.get(pool)?.backends;
        let ago = |since: std::time::Duration| now.uptime.saturating_sub(since).as_secs();
        let verdicts = self.health.verdicts().get(pool);
        let usable = |role, address: BackendAddress| {
            let verdict = verdicts.and_then(|pool| pool.of(Some(role)).get(&address));
            verdict.is_some_and(|verdict| verdict.usable)
        };
        let servers = backends.iter().map(|backend| {
            let said = cluster.says(backend.address);
            let lag = cluster.lag(backend.address, now.uptime);
            view::Server {
                address: backend.address.to_string(),
                role: said.map(|(said, _)| said.says.to_string()),
                answers: cluster.answers(backend.address),
                read_only: said.is_some_and(|(said, _)| said.read_only),
                timeline: said.and_then(|(said, _)| said.timeline),
                lag_bytes: lag.bytes,
                lag_seconds: lag.time.map(|time| time.as_secs_f64()),
                since_seconds: said.map(|(_, since)| ago(since)),
                written: usable(Role::Primary, backend.address),
                read: usable(Role::Replica, backend.address),
                fenced: said.is_some_and(|(said, _)| said.says == Says::Primary)
                    && cluster.primary().is_some_and(|primary| primary != backend.address),
            }
        });
        let (since, why) = cluster.turned();
        Some(view::Cluster {
            primary: cluster.primary().map(|primary| primary.to_string()),
            timeline: cluster.followed().1,
            since_seconds: ago(since),
            changes: cluster.changes(),
            holds: cluster.primary().is_none() && verdicts.is_some_and(|pool| pool.holds),
            why,
            doubt: cluster.doubt().map(ToString::to_string),
            servers: servers.collect(),
        })
    }
}
