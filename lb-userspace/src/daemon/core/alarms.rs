//! What needs somebody's attention.

use super::{Core, all_failed};
use crate::{
    daemon::checks,
    dataplane::Dataplane,
    model::{Admin, Pool},
};

/// How many alarms of one kind are worth reading.
const ALARMS_OF_A_KIND: usize = 10;

impl<D: Dataplane> Core<D> {
    /// What needs somebody's attention now.
    pub fn alarms(&self) -> Vec<String> {
        let mut alarms = Vec::new();
        if let Some(why) = &self.unsettled {
            alarms.push(format!("the tables are not as they should be: {why}"));
        }
        alarms.extend(self.unattached.clone());
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
        for (name, kept) in self.health.all_failed() {
            alarms.push(all_failed(name, kept.len()));
        }
        let resting = |pool: &Pool| {
            !pool.backends.is_empty() && pool.backends.iter().all(|it| it.admin != Admin::Enabled)
        };
        let used = config.services_by_pool();
        for (name, services) in used.iter().filter(|&(&name, _)| config.pools.get(name).is_some_and(resting))
        {
            let what = match services.iter().all(|(_, service)| service.has_fallback()) {
                true => "the desk answers new connections",
                false => "new connections are refused",
            };
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
