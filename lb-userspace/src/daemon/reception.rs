//! What the daemon's loop does for the reception desk: orders, certificates, and how it goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{
    certificates::{self, Certificates},
    credentials::{self, Credentials},
    desk::{self, Desk},
    issuers::Issuers,
    plane::Plane,
    routes,
    serve::Daemon,
    snapshot,
};
use crate::{
    api::{
        request::{Request, RequestError},
        view,
    },
    config::{Document, Severity},
    dataplane::DataplaneError,
    health::Now,
    model::{Config, Probe},
};

/// How long issuers may take to answer before a daemon begins without them.
const PATIENCE_AT_START: Duration = Duration::from_secs(2);

/// The desk, and what it is handed that the daemon reads or fetches for it.
pub(super) struct Reception {
    /// Until the end.
    pub(super) desk: Option<Desk>,
    certificates: Certificates,
    credentials: Credentials,
    pub(super) issuers: Issuers,
}

impl Reception {
    pub(super) fn new(options: desk::Options) -> Self {
        let issuers = Issuers::default();
        Self {
            desk: Some(Desk::new(options, issuers.known().clone())),
            certificates: Certificates::default(),
            credentials: Credentials::default(),
            issuers,
        }
    }

    /// Whether there is something whose time may come.
    pub(super) fn has_certificates(&self) -> bool {
        !self.certificates.is_empty()
    }

    /// What needs somebody's attention of files that the daemon reads for it.
    pub(super) fn alarms_of_files(&self, now: u64) -> Vec<String> {
        let mut alarms = self.certificates.alarms(now);
        alarms.extend_from_slice(self.credentials.alarms());
        alarms
    }
}

/// Files that a document names, and how each is: when it was written, and how long it is; `None`: it is not there.
pub(super) type Named = BTreeMap<PathBuf, Option<(SystemTime, u64)>>;

/// Those of a document that it is refused for, where they cannot be used.
fn named(config: &Config) -> Named {
    let checks = config.pools.values().filter_map(|pool| pool.health.as_ref());
    let authorities = checks.filter_map(|check| match &check.probe {
        Probe::Http { ca_file, .. } => ca_file.clone(),
        _ => None,
    });
    let files = certificates::files(config).chain(credentials::files(config)).map(Path::to_owned);
    let how = |path: PathBuf| {
        let found = fs::metadata(&path).ok();
        (path, found.and_then(|found| Some((found.modified().ok()?, found.len()))))
    };
    files.chain(authorities).map(how).collect()
}

/// The directories in which a change of files shows: of themselves, and of what they are links to; of those that are not there
/// yet, the nearest above.
fn directories<'n>(named: impl IntoIterator<Item = &'n PathBuf>) -> BTreeSet<PathBuf> {
    let both = named.into_iter().flat_map(|path| [Some(path.clone()), fs::canonicalize(path).ok()]);
    let nearest = |path: PathBuf| path.ancestors().skip(1).find(|it| it.is_dir()).map(Path::to_owned);
    both.flatten().filter_map(nearest).collect()
}

impl<P: Plane> Daemon<P> {
    /// Tells the desk how to serve.
    pub(super) fn serve_at_desk(&mut self) {
        let Some((desk, loaded)) = self.reception.desk.as_mut().zip(self.core.loaded()) else { return };
        let config = &loaded.document.config;
        let services = desk::services(config, |files| self.reception.certificates.get(files));
        let state = |pool: &str, backend| self.core.state(pool, backend);
        let pools = desk::pools(config, state, |pool, backend| self.core.is_unknown(pool, backend));
        let mut files = self.reception.credentials.files().clone();
        files.extend(self.reception.issuers.keys());
        desk.serve(services, pools, files);
    }

    /// Counts the connections of backends that somebody waits for, those of the desk with them.
    pub(super) fn census(&mut self, now: Now) -> Result<bool, DataplaneError> {
        let desk = self.reception.desk.as_ref();
        self.core.census(now, |key| desk.map_or(0, |desk| desk.under_way(key)))
    }

    /// Reads certificates, and who is known, again, and has the desk go by what is new.
    pub(super) fn refresh_certificates(&mut self) {
        let Some(loaded) = self.core.loaded() else { return };
        self.reception.certificates.refresh(&loaded.document.config);
        self.reception.credentials.refresh(&loaded.document.config);
        self.reception.issuers.follow(&loaded.document.config);
        // What cannot be used now is an alarm: what is in force has what was there before.
        let mut odd = certificates::complaints(&loaded.document, self.clock.now().epoch);
        odd.retain(|complaint| complaint.severity == Severity::Warning);
        self.core.set_of_files(odd);
        self.serve_at_desk();
    }

    /// Finds out in which directories a change of the document or of what it names shows; of what it names if it is refused,
    /// too.
    pub(super) fn watch_files(&mut self) {
        self.watched = self.file.directories();
        if let Some(loaded) = self.core.loaded() {
            self.watched.extend(directories(named(&loaded.document.config).keys()));
        }
        let refused = self.core.refused().and_then(|_| self.file.parse(&self.last_seen).ok());
        self.named = refused.map(|document| named(&document.config)).unwrap_or_default();
        self.watched.extend(directories(self.named.keys()));
    }

    /// How everything is.
    pub(super) fn snapshot(&self) -> Result<view::Snapshot, DataplaneError> {
        let now = self.clock.now();
        let mut snapshot = snapshot::snapshot(&self.core, now)?;
        let alarms = &mut snapshot.status.alarms;
        alarms.extend(self.reception.desk.iter().filter_map(Desk::alarm));
        alarms.extend(self.alarms_of_desk(now));
        if let Some((desk, loaded)) = self.reception.desk.as_ref().zip(self.core.loaded()) {
            let config = &loaded.document.config;
            let key_fetches = self.reception.issuers.fetches();
            let certificates = self.reception.certificates.shown(config, now.epoch);
            let shown = view::Desk { key_fetches, certificates, ..desk.shown() };
            let (of_desk, requests) = (config.pools_of_desk(), desk.requests());
            for backend in &mut snapshot.backends {
                if of_desk.contains(backend.pool.as_str())
                    && let Ok(address) = backend.address.parse()
                {
                    let of = requests.get(&(backend.pool.clone(), address));
                    backend.requests = Some(of.copied().unwrap_or_default());
                }
            }
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

    /// Asks issuers of tokens before anything is served, so that a desk which takes over from another knows their keys too; one
    /// that does not answer holds up nothing for long.
    pub(super) async fn fetch_at_start(&self, document: &Document) {
        if let Some(first) = self.reception.issuers.first(document) {
            // What is wrong is said by who looks after them.
            _ = tokio::time::timeout(PATIENCE_AT_START, first.run()).await;
        }
    }

    /// Where a request brings a document with issuers of tokens that nothing is known of, they are asked first, by a task of
    /// its own, and the request comes again when they have answered; any other is given back.
    pub(super) fn first_fetch(&self, request: Request) -> Option<Request> {
        let text = match &request {
            Request::Foresee(text, _) => text,
            Request::Replace(replacement, _) => &replacement.text,
            _ => return Some(request),
        };
        // What is wrong with it is said by who looks at it next.
        let document = self.file.parse(text).ok();
        let Some(first) = document.and_then(|document| self.reception.issuers.first(&document)) else {
            return Some(request);
        };
        let (asking, file) = (self.asking.clone(), self.file.path().to_owned());
        self.tasks.spawn(async move {
            let Err(complaints) = first.run().await else {
                // When the daemon ends meanwhile nobody answers, as with all requests.
                _ = asking.send(request).await;
                return;
            };
            let refused = RequestError::Document { file, complaints };
            match request {
                Request::Foresee(_, reply) => reply.send(Err(refused)),
                Request::Replace(_, reply) => reply.send(Err(refused)),
                _ => {}
            }
        });
        None
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
