//! What becomes of packets, and what would become of the tables, asked of the live ones.

use std::collections::BTreeMap;

use super::Daemon;
use crate::{
    api::{
        request::RequestError,
        view::{Explanation, Foreseen},
    },
    daemon::{
        changes,
        checks::Host,
        core::Core,
        explain::{self, Names},
        plane::Plane,
    },
    dataplane::Dataplane,
    model::{BackendAddress, Config, Forward, Service},
};

/// Of how many servers it is said why they get no connections.
const REASONS: usize = 4;

impl<P: Plane> Daemon<P> {
    /// What would become of packets that came in by the first listed interface, one after the other.
    pub(super) fn explain<T>(
        &self,
        ask: impl FnOnce(&dyn Fn(&[u8]) -> Explanation) -> T,
    ) -> Result<T, RequestError> {
        let tables = self.core.plane().copied().map_err(RequestError::Failed)?;
        let now = self.core.plane().now().map_err(|error| RequestError::Failed(error.to_string()))?;
        let around = self.core.around();
        let held = self.core.tables();
        let config = self.core.loaded().map(|loaded| &loaded.document.config);
        let services = config.map(Config::services_by_listen).unwrap_or_default();
        let named = |index: u32| {
            let listen = held.services.get(&index)?.listen;
            Some((listen, services.get(&listen).copied()))
        };
        let service = |index: u32| match named(index) {
            Some((listen, Some((name, service)))) => {
                let desk = match service.forward {
                    Forward::Desk => "; the desk answers it, and `lb route explain URL` says by which route",
                    _ if service.has_fallback() => "; the desk answers while nobody of its pool is fit",
                    _ => "",
                };
                format!("{name}, which listens on {listen}{desk}")
            }
            Some((listen, None)) => format!("one that is gone, which listens on {listen}"),
            None => format!("number {index}, which is gone"),
        };
        let nobody = |index: u32| match named(index) {
            Some((_, Some((_, service)))) => nobody(&self.core, service),
            _ => "it has none any more".into(),
        };
        let interface = |index: u32| around.link_name(index);
        let names = Names { held, service: &service, nobody: &nobody, interface: &interface };
        let listed = config.and_then(|config| config.interfaces.first());
        let ingress = listed.and_then(|name| around.link(name)).map_or(0, |link| link.index);
        Ok(ask(&|frame| explain::explain(&tables, &names, frame, ingress, now)))
    }
}

/// What documents would change.
impl<P: Plane> Daemon<P> {
    pub(super) async fn foresee(&self, text: &str) -> Result<Foreseen, RequestError> {
        let prepared = self.prepare(text).await.map_err(|error| self.request_error(error))?;
        let (document, around) = prepared;
        let foreseen = self.core.foresee(&document, &around, &Host::read(), self.clock.now());
        let mut foreseen = foreseen.map_err(|error| self.request_error(error.into()))?;
        let Some(loaded) = self.core.loaded() else { return Ok(foreseen) };
        let (before, after) = (&loaded.document.config, &document.config);
        foreseen.desk = changes::at_desk(before, after);
        // As they will be called.
        let services = before.services.iter().chain(&after.services);
        let names: BTreeMap<String, &String> =
            services.map(|(name, service)| (service.listen.to_string(), name)).collect();
        for service in &mut foreseen.services {
            service.service = names.get(&service.listen).map(ToString::to_string).unwrap_or_default();
        }
        Ok(foreseen)
    }
}

/// Why none of a service's servers gets connections.
fn nobody<D: Dataplane>(core: &Core<D>, service: &Service) -> String {
    let pool = &service.pool;
    let backends = core.loaded().and_then(|loaded| loaded.document.config.pools.get(pool));
    let backends = backends.map(|pool| pool.backends.as_slice()).unwrap_or_default();
    let why = |address: BackendAddress| {
        let state = core.state(pool, address).0;
        let failure = core.report(pool, address).and_then(|report| report.failure.clone());
        let no_way = match address {
            BackendAddress::Remote(ip, _) => core.next_hop(ip).err(),
            BackendAddress::Local => None,
        };
        match failure.or(no_way) {
            Some(why) => format!("{address} is {state} ({why})"),
            None => format!("{address} is {state}"),
        }
    };
    let mut reasons: Vec<_> = backends.iter().take(REASONS).map(|backend| why(backend.address)).collect();
    if let more @ 1.. = backends.len().saturating_sub(REASONS) {
        reasons.push(format!("{more} more; see `lb backend list {pool}`"));
    }
    match (service.role, reasons.is_empty()) {
        (_, true) => format!("{pool} has no servers"),
        (None, false) => format!("of {pool} nobody is in use: {}", reasons.join("; ")),
        (Some(role), false) => {
            format!("of {pool} nobody is in use as {role}: {}; see `lb pool show {pool}`", reasons.join("; "))
        }
    }
}
