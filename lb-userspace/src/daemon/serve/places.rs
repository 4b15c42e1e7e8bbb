//! Addresses of services, put where they are answered for. A task does it beside the loop: thousands take the kernel
//! seconds.

use std::{collections::BTreeSet, time::Duration};

use tokio::{task::JoinHandle, time::Instant};
use tracing::{error, info, warn};

use super::Daemon;
use crate::{
    addresses::{self, Changes, Placed},
    daemon::{plane::Plane, ways::Ways},
};

/// How long a document's coming into force waits for its addresses. Some hundreds are put in less.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long the daemon's end waits for them.
const PATIENCE_AT_THE_END: Duration = Duration::from_secs(10);

/// Addresses that are being put and taken away.
pub(in crate::daemon) struct Placing {
    /// Gives back which are there in the end.
    task: JoinHandle<BTreeSet<Placed>>,
    /// Something has changed since it was begun.
    again: bool,
}

impl Placing {
    /// Waits until it has come to its end, but not for ever.
    pub(in crate::daemon) async fn end(mut self) {
        if tokio::time::timeout(PATIENCE_AT_THE_END, &mut self.task).await.is_err() {
            warn!("addresses are not all put or taken away; the next daemon or `lb detach` sees to it");
        }
    }

    /// Ends it where it is.
    pub(in crate::daemon) async fn abort(mut self) {
        self.task.abort();
        // That it was cut short is what was wanted.
        _ = (&mut self.task).await;
    }
}

/// Which addresses are there in the end of what is under way, if it came to one. Forever, where nothing is.
pub(super) async fn placed(placing: &mut Option<Placing>) -> Option<BTreeSet<Placed>> {
    match placing {
        Some(placing) => {
            (&mut placing.task).await.inspect_err(|why| error!("cannot put addresses: {why}")).ok()
        }
        None => std::future::pending().await,
    }
}

impl<P: Plane> Daemon<P> {
    /// Begins to put the addresses that the document wants, and to take away those that it does not; says whether there
    /// is anything to wait for. Sources are there when it comes back: answers come to them as soon as packets leave.
    pub(super) async fn place_addresses(&mut self) -> bool {
        if let Some(placing) = &mut self.placing {
            placing.again = true;
            return false;
        }
        let Some((sources, changes)) = self.address_changes() else { return false };
        let mut put = self.record.addresses.clone();
        // Remembered before they are put: after a crash in between, one too many is looked for.
        let all = sources.add.iter().chain(&changes.add).chain(&changes.adopt);
        self.record.addresses.extend(all);
        if self.record.addresses != put {
            self.remember();
        }
        self.core.set_put(self.record.addresses.clone());
        addresses::apply(&sources, &mut put, &self.netlink).await;
        let netlink = self.netlink.clone();
        let task = tokio::spawn(async move {
            addresses::apply(&changes, &mut put, &netlink).await;
            put
        });
        self.placing = Some(Placing { task, again: false });
        true
    }

    /// What is to be done for sources, and for all else; `None`: nothing.
    fn address_changes(&self) -> Option<(Changes, Changes)> {
        let config = &self.core.loaded()?.document.config;
        let (wanted, put) = (Ways::addresses(config), &self.record.addresses);
        let mut changes = addresses::changes(&wanted, &config.interfaces, put, self.core.around());
        let is_source = |place: &Placed| config.settings.sources.contains(&place.1);
        let (sources, others) = std::mem::take(&mut changes.add).into_iter().partition(is_source);
        changes.add = others;
        let sources = Changes { add: sources, ..Changes::default() };
        (sources != Changes::default() || changes != Changes::default()).then_some((sources, changes))
    }

    /// Waits until all are where they should be, but not for long: with thousands it goes on beside the loop.
    pub(super) async fn wait_for_addresses(&mut self) {
        let until = Instant::now() + PATIENCE;
        while self.placing.is_some() {
            match tokio::time::timeout_at(until, placed(&mut self.placing)).await {
                Ok(put) => self.addresses_placed(put).await,
                Err(_) => return info!("addresses are still being put; this goes on"),
            }
        }
    }

    /// It has come to its end, with these addresses there.
    pub(super) async fn addresses_placed(&mut self, put: Option<BTreeSet<Placed>>) {
        let Some(Placing { again, .. }) = self.placing.take() else { return };
        if let Some(put) = put.filter(|put| *put != self.record.addresses) {
            self.record.addresses.clone_from(&put);
            self.remember();
            self.core.set_put(put);
        }
        if again {
            self.place_addresses().await;
        }
    }
}
