//! What becomes of packets, asked of the live tables.

use super::Daemon;
use crate::{
    api::{request::RequestError, view::Explanation},
    daemon::{
        explain::{self, Names},
        plane::Plane,
        snapshot,
    },
};

impl<P: Plane> Daemon<P> {
    /// What would become of packets that came in by the first listed interface, one after the other.
    pub(super) fn explain<T>(
        &self,
        ask: impl FnOnce(&dyn Fn(&[u8]) -> Explanation) -> T,
    ) -> Result<T, RequestError> {
        let tables = self.core.plane().copied().map_err(RequestError::Failed)?;
        let now = self.core.plane().now().map_err(|error| RequestError::Failed(error.to_string()))?;
        let around = self.core.around();
        let services = snapshot::names(&self.core);
        let held = self.core.tables();
        let service = |index: u32| match held.services.get(&index).map(|entry| entry.listen) {
            Some(listen) => {
                let name = services.get(&listen).map_or("one that is gone", String::as_str);
                format!("{name}, which listens on {listen}")
            }
            None => format!("number {index}, which is gone"),
        };
        let interface = |index: u32| around.link_name(index);
        let names = Names { held, service: &service, interface: &interface };
        let listed = self.core.loaded().and_then(|loaded| loaded.document.config.interfaces.first());
        let ingress = listed.and_then(|name| around.link(name)).map_or(0, |link| link.index);
        Ok(ask(&|frame| explain::explain(&tables, &names, frame, ingress, now)))
    }
}
