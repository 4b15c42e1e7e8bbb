//! What an operator, or a script that is called on a promotion, asks of a pool of which one server takes
//! writes.

use super::Daemon;
use crate::{
    api::{
        request::{Promotion, RequestError},
        view::Done,
    },
    daemon::plane::Plane,
    health::Key,
};

impl<P: Plane> Daemon<P> {
    /// Asks everybody of a pool now.
    pub(super) fn recheck(&mut self, pool: &str) -> Result<Done, RequestError> {
        self.knows(pool)?;
        if !self.core.recheck(pool, self.clock.now()) {
            return Err(RequestError::Wrong(format!("pool {pool:?} has no health check, or nobody to ask")));
        }
        Ok(Done { message: format!("everybody of pool {pool:?} is being asked"), ..Done::default() })
    }

    /// Follows the server that somebody says is the primary.
    pub(super) fn promote(&mut self, said: &Promotion) -> Result<Done, RequestError> {
        self.knows(&said.pool)?;
        let backend = said.backend.parse();
        let backend = backend.map_err(|why| RequestError::Wrong(format!("{}: {why}", said.backend)))?;
        let key = Key { pool: said.pool.clone(), backend };
        let changed = self.core.promote(&key, self.clock.now()).map_err(RequestError::Wrong)?;
        self.remember_timelines();
        if changed {
            self.settle();
        }
        Ok(Done { message: format!("writes of pool {:?} go to {backend}", said.pool), ..Done::default() })
    }

    /// Writes down which timelines are followed, before anybody is led to a new one: a daemon that starts
    /// again must know an old primary for what it is.
    pub(super) fn remember_timelines(&mut self) {
        let timelines = self.core.timelines();
        if timelines != self.record.timelines {
            self.record.timelines = timelines;
            self.remember();
        }
    }

    fn knows(&self, pool: &str) -> Result<(), RequestError> {
        let pools = self.core.loaded().map(|loaded| &loaded.document.config.pools);
        match pools {
            Some(pools) if pools.contains_key(pool) => Ok(()),
            _ => Err(RequestError::NotFound(format!("there is no pool {pool:?}; see `lb pool list`"))),
        }
    }
}
