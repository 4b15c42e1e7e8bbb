//! What needs somebody's attention.

use super::Core;
use crate::{
    daemon::checks,
    dataplane::Dataplane,
    model::{Admin, Pool, Service},
};

/// How many alarms of one kind are worth reading.
const ALARMS_OF_A_KIND: usize = 10;

impl<D: Dataplane> Core<D> {
    /// Remembers whether the file cannot be read, and why; says whether that was so before.
    pub fn set_unreadable(&mut self, why: Option<String>) -> bool {
        std::mem::replace(&mut self.unreadable, why).is_some()
    }

    /// Whether it has been in doubt who is the primary of a pool, since this was asked last: that may be over soon.
    pub fn take_doubted(&mut self) -> bool {
        std::mem::take(&mut self.doubted)
    }

    /// Pools of which all backends fail, and the last set is kept in use.
    pub fn panicking(&self) -> impl Iterator<Item = &str> {
        self.health.all_failed().filter(|(_, kept)| !kept.is_empty()).map(|(name, _)| name)
    }

    /// What needs somebody's attention now.
    pub fn alarms(&self) -> Vec<String> {
        let mut alarms = Vec::new();
        if let Some(why) = &self.unsettled {
            alarms.push(format!("the tables are not as they should be: {why}"));
        }
        alarms.extend(self.unattached.clone());
        alarms.extend(self.unreadable.clone());
        let Some(loaded) = &self.loaded else { return alarms };
        let config = &loaded.document.config;
        if config.settings.limits != self.tables().limits {
            alarms.push(
                "the document's limits are not those that the tables were made with; they hold after `lb detach` and a new start".into(),
            );
        }
        for name in &config.interfaces {
            match self.around.link(name) {
                None => alarms.push(format!("interface {name} is gone")),
                Some(link) if !link.up => alarms.push(checks::down(name)),
                Some(_) => {}
            }
        }
        for (name, doubt) in self.health.doubts() {
            alarms.push(format!("pool {name}: {doubt}"));
        }
        let (used, of_desk) = (config.services_by_pool(), config.pools_of_desk());
        for (name, kept) in self.health.all_failed() {
            let so = match (kept.len(), used.get(name)) {
                (0, Some(services)) => without_servers(services).to_owned(),
                (0, None) if of_desk.contains(name) => "the desk says so to who asks for it".to_owned(),
                (0, None) => "no service uses it".to_owned(),
                (n, _) => format!("the last {n} that worked stay in use"),
            };
            alarms.push(format!("every backend of pool {name} fails its check; {so}"));
        }
        let resting = |pool: &Pool| {
            !pool.backends.is_empty() && pool.backends.iter().all(|it| it.admin != Admin::Enabled)
        };
        for (name, services) in used.iter().filter(|&(&name, _)| config.pools.get(name).is_some_and(resting))
        {
            let what = without_servers(services);
            alarms.push(format!(
                "every backend of pool {name} is drained or disabled; {what}, and `lb backend resume` ends that"
            ));
        }
        // That the kernel is still asking is nothing to be alarmed at.
        let none = self.ways.none.iter().filter(|&(target, _)| !self.ways.pending.contains(target));
        let mut none = none.map(|(_, why)| why);
        alarms.extend(none.by_ref().take(ALARMS_OF_A_KIND).cloned());
        if let Some(more) = Some(none.count()).filter(|more| *more > 0) {
            alarms.push(format!("{more} more backends have no next hop; `lb backend list` shows all"));
        }
        alarms
    }
}

/// What becomes of who calls these services of a pool while nobody of it is in use.
fn without_servers(services: &[(&String, &Service)]) -> &'static str {
    let answered = services.iter().filter(|(_, service)| service.has_fallback()).count();
    match services.len() {
        all if answered == all => "the desk answers new connections",
        _ if answered > 0 => "new connections are refused, but for services that the desk stands in for",
        _ => "new connections are refused",
    }
}
