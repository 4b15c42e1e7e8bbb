//! Addresses of services, put where they are answered for. A task does it beside the loop: thousands take the kernel
//! seconds.

use std::{collections::BTreeSet, time::Duration};

use tokio::task::JoinHandle;
use tracing::{error, info};

use super::Daemon;
use crate::{
    addresses::{self, Changes, Placed},
    daemon::{plane::Plane, ways::Ways},
};

/// How long a document's coming into force waits for its addresses. Some hundreds are put in less.
const PATIENCE: Duration = Duration::from_secs(1);

/// Addresses that are being put and taken away.
pub(in crate::daemon) struct Placing {
    /// Gives back which are there in the end.
    task: JoinHandle<BTreeSet<Placed>>,
    /// Something has changed since it was begun.
    again: bool,
}

impl Placing {
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
    /// Begins to put the addresses that the document wants, and to take away those that it does not.
    pub(super) fn place_addresses(&mut self) {
        if let Some(placing) = &mut self.placing {
            placing.again = true;
            return;
        }
        let Some(loaded) = self.core.loaded() else { return };
        let config = &loaded.document.config;
        let mut put = self.record.addresses.clone();
        let changes =
            addresses::changes(&Ways::addresses(config), &config.interfaces, &put, self.core.around());
        if changes == Changes::default() {
            return;
        }
        // Remembered before they are put: after a crash in between, one too many is looked for.
        self.record.addresses.extend(changes.add.iter().chain(&changes.adopt));
        if self.record.addresses != put {
            self.remember();
        }
        self.core.set_put(self.record.addresses.clone());
        let netlink = self.netlink.clone();
        let task = tokio::spawn(async move {
            addresses::apply(&changes, &mut put, &netlink).await;
            put
        });
        self.placing = Some(Placing { task, again: false });
    }

    /// Waits until all are where they should be, but not for long: with thousands it goes on beside the loop.
    pub(super) async fn wait_for_addresses(&mut self) {
        let all = async {
            while self.placing.is_some() {
                let put = placed(&mut self.placing).await;
                self.addresses_placed(put);
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            info!("addresses are still being put; this goes on");
        }
    }

    /// It has come to its end, with these addresses there.
    pub(super) fn addresses_placed(&mut self, put: Option<BTreeSet<Placed>>) {
        let Some(Placing { again, .. }) = self.placing.take() else { return };
        if let Some(put) = put.filter(|put| *put != self.record.addresses) {
            self.record.addresses.clone_from(&put);
            self.remember();
            self.core.set_put(put);
        }
        if again {
            self.place_addresses();
        }
    }
}
