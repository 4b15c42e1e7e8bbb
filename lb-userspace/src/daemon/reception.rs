//! What the daemon's loop does for the reception desk: orders, certificates, and how it goes.

use tracing::warn;

use super::{certificates, desk, plane::Plane, serve::Daemon, snapshot};
use crate::{api::view, dataplane::DataplaneError};

impl<P: Plane> Daemon<P> {
    /// Tells the desk how to serve.
    pub(super) fn serve_at_desk(&mut self) {
        let Some((desk, loaded)) = self.desk.as_mut().zip(self.core.loaded()) else { return };
        let config = &loaded.document.config;
        let services = desk::services(config, |files| self.certificates.get(files));
        let pools = desk::pools(config, |pool, backend| self.core.state(pool, backend));
        desk.serve(services, pools);
    }

    /// Reads certificates again, and has the desk show what is new.
    pub(super) fn refresh_certificates(&mut self) {
        let Some(loaded) = self.core.loaded() else { return };
        let before = self.certificates.alarms().to_vec();
        self.certificates.refresh(&loaded.document.config);
        let alarms = self.certificates.alarms();
        alarms.iter().filter(|alarm| !before.contains(alarm)).for_each(|alarm| warn!("{alarm}"));
        self.serve_at_desk();
    }

    /// Finds out in which directories a change of the document or of what it names shows.
    pub(super) fn watch_files(&mut self) {
        self.watched = self.file.directories();
        if let Some(loaded) = self.core.loaded() {
            self.watched.extend(certificates::directories(&loaded.document.config));
        }
    }

    /// How everything is.
    pub(super) fn snapshot(&self) -> Result<view::Snapshot, DataplaneError> {
        let mut snapshot = snapshot::snapshot(&self.core, self.clock.now())?;
        let alarms = &mut snapshot.status.alarms;
        alarms.extend(self.desk.iter().flat_map(desk::Desk::alarms));
        alarms.extend_from_slice(self.certificates.alarms());
        Ok(snapshot)
    }
}
