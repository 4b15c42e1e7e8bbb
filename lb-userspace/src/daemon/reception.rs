//! What the daemon's loop does for the reception desk: orders, certificates, and how it goes.

use tracing::warn;

use super::{certificates, credentials, desk, plane::Plane, routes, serve::Daemon, snapshot};
use crate::{
    api::{request::RequestError, view},
    dataplane::DataplaneError,
};

impl<P: Plane> Daemon<P> {
    /// Tells the desk how to serve.
    pub(super) fn serve_at_desk(&mut self) {
        let Some((desk, loaded)) = self.desk.as_mut().zip(self.core.loaded()) else { return };
        let config = &loaded.document.config;
        let services = desk::services(config, |files| self.certificates.get(files));
        let pools = desk::pools(config, |pool, backend| self.core.state(pool, backend));
        desk.serve(services, pools, self.credentials.files().clone());
    }

    /// Reads certificates, and who is known, again, and has the desk go by what is new.
    pub(super) fn refresh_certificates(&mut self) {
        let Some(loaded) = self.core.loaded() else { return };
        let before = [self.certificates.alarms(), self.credentials.alarms()].concat();
        self.certificates.refresh(&loaded.document.config);
        self.credentials.refresh(&loaded.document.config);
        let alarms = self.certificates.alarms().iter().chain(self.credentials.alarms());
        alarms.filter(|alarm| !before.contains(alarm)).for_each(|alarm| warn!("{alarm}"));
        self.serve_at_desk();
    }

    /// Finds out in which directories a change of the document or of what it names shows.
    pub(super) fn watch_files(&mut self) {
        self.watched = self.file.directories();
        if let Some(loaded) = self.core.loaded() {
            self.watched.extend(certificates::directories(&loaded.document.config));
            self.watched.extend(credentials::directories(&loaded.document.config));
        }
    }

    /// How everything is.
    pub(super) fn snapshot(&self) -> Result<view::Snapshot, DataplaneError> {
        let mut snapshot = snapshot::snapshot(&self.core, self.clock.now())?;
        let alarms = &mut snapshot.status.alarms;
        alarms.extend(self.desk.iter().flat_map(desk::Desk::alarms));
        alarms.extend_from_slice(self.certificates.alarms());
        alarms.extend_from_slice(self.credentials.alarms());
        if let Some((desk, loaded)) = self.desk.as_ref().zip(self.core.loaded()) {
            let config = &loaded.document.config;
            let shown = desk.shown();
            let usable = |pool: &str| {
                snapshot.backends.iter().filter(|backend| backend.pool == pool && backend.usable).count()
            };
            let answers = |service: &str, route: &str| {
                let of_route = shown.answers.iter().filter(|it| it.service == service && it.route == route);
                of_route.map(|it| it.count).sum()
            };
            snapshot.routes = routes::list(config, usable, answers);
            snapshot.desk = config.at_desk().next().map(|_| shown);
        }
        Ok(snapshot)
    }

    /// Which way a request would go.
    pub(super) fn explain_route(
        &self,
        question: &view::RouteQuestion,
    ) -> Result<Vec<view::RouteExplanation>, RequestError> {
        let loaded = self.core.loaded().ok_or(RequestError::Stopping)?;
        routes::explain(&loaded.document.config, question).map_err(RequestError::Wrong)
    }
}
