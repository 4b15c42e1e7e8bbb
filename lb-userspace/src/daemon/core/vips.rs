//! Which addresses of services a backend must answer for.

use std::net::SocketAddr;

use super::Core;
use crate::{
    daemon::checks::remote,
    dataplane::Dataplane,
    health::Key,
    model::{HealthCheck, Via},
    probe::vip::Way,
};

impl<D: Dataplane> Core<D> {
    /// The addresses of services that a backend must answer for, and the way to it.
    ///
    /// # Errors
    /// There is no way, in words for an operator.
    pub fn vips(&self, key: &Key, check: &HealthCheck) -> Result<Vec<(Way, SocketAddr)>, String> {
        let (Via::Vip, Some(ip), Some(loaded)) = (check.via, remote(key.backend), self.loaded()) else {
            return Ok(Vec::new());
        };
        let hop = self.next_hop(ip)?;
        let source = self.ways.sources.get(&ip).and_then(|sources| sources.first());
        let source = *source.ok_or_else(|| format!("there is no address to call {ip} from"))?;
        let vips = loaded.document.config.direct_vips(&key.pool);
        Ok(vips
            .filter(|vip| vip.is_ipv4() == source.is_ipv4())
            .map(|vip| (Way { hop, source }, vip))
            .collect())
    }
}
