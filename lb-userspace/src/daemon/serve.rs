//! The event loop: the only place where the daemon's state changes. Whoever wants something sends a
//! message; whoever has finished something, too.

mod alarms;
mod explaining;
mod places;
mod roles;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, error, info, warn};

use self::places::placed;
pub(super) use self::{alarms::Alarms, places::Placing};
use super::{
    checks::{Host, epoch, targets},
    core::{Core, LoadError, SettleError},
    document::{DocumentError, DocumentFile, revision},
    edits::{edited, expect_revision},
    explain,
    farewell::Farewells,
    lock::{Lock, LockError},
    plane::Plane,
    reception::{Named, Reception},
    record::{Record, RecordFile},
    snapshot,
    watch::DocumentWatch,
};
use crate::{
    api::{
        request::{Reply, Request, RequestError},
        view::{Done, Text},
    },
    config::{Complaints, Document},
    health::{Key, Now},
    metrics,
    netlink::{Netlink, NetlinkError, surroundings::Surroundings, watch::Watch},
    probe::{Answer, Answered, Prober},
};

/// How often flows are counted while somebody waits for them to end.
const CENSUS: Duration = Duration::from_secs(1);

/// Answers to probes that one plan is made for, so that requests get their turn between them.
const ANSWERS_AT_ONCE: usize = 256;

/// How long a look at the surroundings may take before the daemon goes on without it.
const PATIENCE_TO_LOOK: Duration = Duration::from_secs(1);

/// Everything that the daemon has.
pub(super) struct Daemon<P> {
    pub(super) core: Core<P>,
    pub(super) file: DocumentFile,
    pub(super) netlink: Netlink,
    pub(super) watch: Watch,
    pub(super) record: Record,
    pub(super) record_file: RecordFile,
    /// One for each attached interface.
    pub(super) locks: BTreeMap<u32, Lock>,
    pub(super) prober: Prober<Key>,
    pub(super) answers: mpsc::UnboundedReceiver<Answer<Key>>,
    pub(super) requests: mpsc::Receiver<Request>,
    /// For tasks that ask on their own behalf: metrics.
    pub(super) asking: mpsc::Sender<Request>,
    pub(super) metrics: Option<(SocketAddr, CancellationToken)>,
    pub(super) reception: Reception,
    /// Directories in which a change of the document or of what it names shows.
    pub(super) watched: BTreeSet<PathBuf>,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
    pub(super) clock: Clock,
    /// The text of the file when it was last looked at, in force or not.
    pub(super) last_seen: String,
    /// The files that it names, and how they were then.
    pub(super) named: Named,
    pub(super) last_census: Duration,
    pub(super) farewells: Farewells,
    /// Addresses that are being put at this moment.
    pub(super) placing: Option<Placing>,
    /// The interfaces that are attached, by name; `None`: not known.
    pub(super) attached: Option<BTreeMap<String, u32>>,
    pub(super) alarms: Alarms,
}

/// How the loop ended.
#[derive(Debug)]
pub(super) enum End {
    /// By a signal.
    Told,
    /// By `lb detach`, which waits for the answer.
    Detach(Reply<Done>),
}

/// Why a document was not put in force.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReloadError {
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{0}")]
    Document(#[from] DocumentError),
    #[error("{0}")]
    Netlink(#[from] NetlinkError),
}

impl From<Complaints> for ReloadError {
    fn from(complaints: Complaints) -> Self {
        Self::Load(complaints.into())
    }
}

/// The time since the daemon started, and of day.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn now(self) -> Now {
        Now { uptime: self.0.elapsed(), epoch: epoch() }
    }
}

/// What the process is told from outside.
pub(super) struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }
}

impl<P: Plane> Daemon<P> {
    /// Runs until told to end.
    pub(super) async fn serve(&mut self, signals: &mut Signals) -> End {
        let mut file_watch = DocumentWatch::new(&self.watched);
        loop {
            if *file_watch.directories() != self.watched {
                file_watch = DocumentWatch::new(&self.watched);
                // What has happened in between.
                self.file_changed().await;
            }
            let now = self.clock.now();
            let census =
                self.core.wants_census().then(|| (self.last_census + CENSUS).saturating_sub(now.uptime));
            let farewell = self.farewells.next_due().map(|due| due.saturating_sub(now.uptime));
            let alarms = self.alarms.wait(now.uptime, self.reception.has_certificates());
            let wait = self.core.wait(now).into_iter().chain(census).chain(farewell).chain(alarms).min();
            let timer = tokio::time::sleep(wait.unwrap_or(Duration::from_secs(3600)));
            tokio::select! {
                _ = signals.terminate.recv() => return End::Told,
                _ = signals.interrupt.recv() => return End::Told,
                _ = signals.hangup.recv() => {
                    info!("SIGHUP: reading the document again");
                    _ = self.reload().await;
                }
                Some(request) = self.requests.recv() => {
                    if let Some(end) = self.answer(request).await {
                        return end;
                    }
                }
                Some(answer) = self.answers.recv() => self.probed(answer),
                Ok(()) = self.watch.surroundings.changed() => self.surroundings_changed().await,
                Ok(()) = self.watch.kept.changed() => {
                    self.record.neighbours = self.watch.kept.borrow_and_update().clone();
                    self.remember();
                }
                () = file_watch.changed() => self.file_changed().await,
                put = placed(&mut self.placing) => {
                    self.addresses_placed(put).await;
                    self.settle();
                }
                () = self.reception.issuers.changed() => self.serve_at_desk(),
                () = timer => {}
            }
            self.on_time();
        }
    }

    /// What is due by now: probes, deadlines, counting flows.
    fn on_time(&mut self) {
        let now = self.clock.now();
        for (key, check) in self.core.take_due(now) {
            let backend = key.backend;
            let vips = self.core.vips(&key, &check);
            self.prober.ask(key, backend, &check, vips);
        }
        let mut changed = self.core.pass_time(now) | self.core.is_due();
        if self.core.wants_census() && now.uptime >= self.last_census + CENSUS {
            self.last_census = now.uptime;
            match self.census(now) {
                Ok(more) => changed |= more,
                Err(error) => warn!("cannot count connections: {error}"),
            }
        }
        if changed {
            self.settle();
        }
        self.farewells.call(&self.core, now.uptime);
        self.tell_alarms(now);
    }

    /// Takes in an answer, and others that are there by now: one plan for all of them.
    fn probed(&mut self, first: Answer<Key>) {
        let now = self.clock.now();
        let mut changed = false;
        let rest: Vec<_> =
            std::iter::from_fn(|| self.answers.try_recv().ok()).take(ANSWERS_AT_ONCE).collect();
        for answer in std::iter::once(first).chain(rest) {
            let shown = match &answer.outcome {
                Ok(Answered { latency, said }) => {
                    let said = said.map_or_else(String::new, |said| format!(", {said}"));
                    format!("{:.1} ms{said}", latency.as_secs_f64() * 1e3)
                }
                Err(error) => error.to_string(),
            };
            debug!(pool = answer.key.pool, backend = %answer.key.backend, "probe: {shown}");
            changed |= self.core.answer(answer, now);
        }
        if changed {
            self.remember_timelines();
            self.settle();
        }
    }

    /// Brings the desk and the tables up to date. What fails is an alarm, and tried again with the next change.
    fn settle(&mut self) {
        // First: where packets are led, somebody listens.
        self.serve_at_desk();
        match self.core.settle() {
            Ok(0) => {}
            Ok(operations) => debug!(operations, "tables changed"),
            Err(error) => debug!("the tables cannot be changed: {error}"),
        }
        self.farewells.begin(&mut self.core, self.clock.now().uptime);
    }

    async fn surroundings_changed(&mut self) {
        let around = Arc::clone(&self.watch.surroundings.borrow_and_update());
        self.core.set_around(around);
        self.place_addresses().await;
        self.settle();
        self.attach().await;
    }

    /// Leads the packets of the document's interfaces, those that are there, to the program.
    /// What fails is an alarm, and tried again with the next change of the network.
    async fn attach(&mut self) {
        let before = self.attached.clone();
        let failure = self.try_attach().err();
        if self.attached != before {
            self.look_again().await;
        }
        self.core.set_unattached(failure);
    }

    /// Has the surroundings looked at once more: a program that is attached by a BPF link is announced to
    /// nobody. What the loop is told of them besides, it hears later.
    async fn look_again(&mut self) {
        let mut surroundings = self.watch.surroundings.clone();
        surroundings.mark_unchanged();
        self.watch.targets.send_modify(|_| {});
        if tokio::time::timeout(PATIENCE_TO_LOOK, surroundings.changed()).await.is_ok() {
            let around = Arc::clone(&surroundings.borrow());
            self.core.set_around(around);
        }
    }

    fn try_attach(&mut self) -> Result<(), String> {
        let Some(loaded) = self.core.loaded() else { return Ok(()) };
        let names = loaded.document.config.interfaces.iter();
        let there = names.filter_map(|name| self.core.around().link(name));
        let wanted: BTreeMap<String, u32> = there.map(|link| (link.name.clone(), link.index)).collect();
        if self.attached.as_ref() == Some(&wanted) {
            return Ok(());
        }
        lock_interfaces(&wanted, &mut self.locks).map_err(|error| error.to_string())?;
        let attached = self.core.plane_mut().attach(&wanted);
        self.attached = attached.is_ok().then(|| wanted.clone());
        self.locks.retain(|index, _| wanted.values().any(|wanted| wanted == index));
        for notice in attached? {
            if notice.native {
                info!(interface = notice.interface, "attached, native");
            } else {
                warn!(
                    interface = notice.interface,
                    "attached in generic mode, which is several times slower: {}; `lb doctor` says more",
                    notice.reason
                );
            }
        }
        Ok(())
    }

    fn remember(&self) {
        if let Err(error) = self.record_file.write(&self.record) {
            error!(
                "cannot write the record in the run directory: {error}; after a restart, addresses may be left behind"
            );
        }
    }
}

/// Documents.
impl<P: Plane> Daemon<P> {
    /// The file may have changed.
    async fn file_changed(&mut self) {
        self.refresh_certificates();
        let read = self.file.read();
        let was_away = self.core.set_unreadable(read.as_ref().err().map(|why| self.file.unreadable(why)));
        match read {
            // Where a reload has met none, it was refused for that.
            Ok(text) if text == self.last_seen && !was_away => self.try_again().await,
            Ok(_) => {
                info!("the document has changed");
                _ = self.reload().await;
            }
            // An alarm.
            Err(error) => debug!("{error}"),
        }
        self.core.set_read_only(self.file.writable().err().map(|error| error.to_string()));
    }

    /// Tries a document that is refused once more if what it names is different by now.
    async fn try_again(&mut self) {
        if self.core.refused().is_none() {
            return;
        }
        let before = std::mem::take(&mut self.named);
        self.watch_files();
        if self.named != before {
            info!("what the document names has changed");
            _ = self.reload().await;
        }
    }

    /// Reads the file and puts it in force; what is wrong is logged and shown in `lb status`.
    async fn reload(&mut self) -> Result<(), ReloadError> {
        let outcome = match self.file.read() {
            Ok(text) => {
                self.last_seen.clone_from(&text);
                self.core.set_unreadable(None);
                self.load(&text).await
            }
            Err(error) => {
                self.core.set_unreadable(Some(self.file.unreadable(&error)));
                Err(error.into())
            }
        };
        match &outcome {
            Ok(()) => info!("the document is in force"),
            Err(error) => {
                let text = located(self.file.path(), error);
                error!("the document is refused, the one before stays in force:\n{text}");
                self.core.refuse(text);
                self.watch_files();
            }
        }
        outcome
    }

    /// Puts a text in force.
    async fn load(&mut self, text: &str) -> Result<(), ReloadError> {
        let (document, around) = self.prepare(text).await?;
        Ok(self.put_in_force(text, document, around).await?)
    }

    /// Puts what a text says in force. `around` knows the ways to what it names.
    pub(super) async fn put_in_force(
        &mut self,
        text: &str,
        document: Document,
        around: Arc<Surroundings>,
    ) -> Result<(), LoadError> {
        self.core.load(text, document, around, &Host::read(), self.clock.now())?;
        self.in_force().await;
        Ok(())
    }

    /// Parses a text and looks at the ways to what it names.
    async fn prepare(&self, text: &str) -> Result<(Document, Arc<Surroundings>), ReloadError> {
        let document = self.file.parse(text)?;
        let mut around = self.netlink.survey(&targets(&document.config)).await?;
        around.remember_silence(self.core.around());
        Ok((document, Arc::new(around)))
    }

    /// A document has come into force: everything follows it.
    async fn in_force(&mut self) {
        if let Some(loaded) = self.core.loaded() {
            let targets: BTreeSet<IpAddr> = targets(&loaded.document.config);
            self.watch.targets.send_if_modified(|before| {
                let changed = *before != targets;
                *before = targets;
                changed
            });
        }
        self.core.set_read_only(self.file.writable().err().map(|error| error.to_string()));
        self.watch_files();
        self.refresh_certificates();
        let waits = self.place_addresses().await;
        self.settle();
        self.attach().await;
        self.serve_metrics().await;
        self.on_time();
        if waits {
            self.wait_for_addresses().await;
        }
    }

    /// Serves metrics where the document says.
    async fn serve_metrics(&mut self) {
        let wanted = self.core.loaded().and_then(|loaded| loaded.document.config.settings.metrics);
        if self.metrics.as_ref().map(|(address, _)| *address) == wanted {
            return;
        }
        if let Some((_, stop)) = self.metrics.take() {
            stop.cancel();
        }
        let Some(address) = wanted else { return };
        match metrics::listen(address).await {
            Ok(listener) => {
                let stop = self.stop.child_token();
                self.metrics = Some((address, stop.clone()));
                let asking = self.asking.clone();
                self.tasks.spawn(async move {
                    if let Err(error) = metrics::serve(listener, asking, stop).await {
                        error!("metrics on {address} have ended: {error}");
                    }
                });
                info!("metrics on http://{address}/metrics");
            }
            Err(error) => error!("no metrics: cannot listen on {address}: {error}"),
        }
    }
}

/// Requests.
impl<P: Plane> Daemon<P> {
    async fn answer(&mut self, request: Request) -> Option<End> {
        let failed = |error: crate::dataplane::DataplaneError| RequestError::Failed(error.to_string());
        match self.first_fetch(request)? {
            Request::Snapshot(reply) => {
                reply.send(self.snapshot().map_err(failed));
            }
            Request::Connections(filter, reply) => {
                reply.send(snapshot::connections(&self.core, &filter).map_err(failed));
            }
            Request::Explain(question, reply) => {
                let frame = explain::frame(&question).map_err(RequestError::Wrong);
                reply.send(frame.and_then(|frame| self.explain(|of| of(&frame))));
            }
            Request::ExplainFrames(asked, reply) => {
                let frames: Result<Vec<_>, _> = asked.frames.iter().map(|hex| explain::bytes(hex)).collect();
                let frames = frames.map_err(RequestError::Wrong);
                let all = |frames: Vec<Vec<u8>>| self.explain(|of| frames.iter().map(|it| of(it)).collect());
                reply.send(frames.and_then(all));
            }
            Request::ExplainRoute(question, reply) => reply.send(self.explain_route(&question)),
            Request::Foresee(text, reply) => reply.send(self.foresee(&text).await),
            Request::Document(reply) => reply.send(self.text()),
            Request::Edit(edits, reply) => {
                let outcome = match self.file.read().map_err(refused) {
                    Ok(text) => match edited(self.file.path(), &text, &edits) {
                        Ok(after) => self.write(&after).await,
                        Err(error) => Err(error),
                    },
                    Err(error) => Err(error),
                };
                reply.send(outcome);
            }
            Request::Replace(replacement, reply) => {
                let expected = replacement.revision.as_deref();
                let current = self.file.read().map_err(refused);
                let outcome = match current.and_then(|text| expect_revision(&text, expected)) {
                    Ok(()) => self.write(&replacement.text).await,
                    Err(error) => Err(error),
                };
                reply.send(outcome);
            }
            Request::Reload(reply) => {
                let outcome = self.reload().await.map_err(|error| self.request_error(error));
                reply.send(outcome.map(|()| self.done()));
            }
            Request::Recheck(pool, reply) => reply.send(self.recheck(&pool)),
            Request::Promote(promotion, reply) => reply.send(self.promote(&promotion)),
            Request::Detach(reply) => return Some(End::Detach(reply)),
        }
        None
    }

    fn text(&self) -> Result<Text, RequestError> {
        let text = self.file.read().map_err(refused)?;
        Ok(Text { revision: revision(&text), text })
    }

    /// Writes a new text to the file and puts it in force, or neither.
    async fn write(&mut self, text: &str) -> Result<Done, RequestError> {
        let checked = self.prepare(text).await.map_err(|error| self.request_error(error))?;
        let (document, around) = checked;
        let (host, now) = (Host::read(), self.clock.now());
        let alarms = self.all_alarms(now);
        let considered = self.core.consider(&document, &around, &host, now);
        considered.map_err(|error| self.request_error(error.into()))?;
        self.file.write(text).map_err(refused)?;
        self.last_seen = text.to_owned();
        self.core
            .load(text, document, around, &host, now)
            .map_err(|error| self.request_error(error.into()))?;
        info!(revision = revision(text), "the document is in force");
        self.in_force().await;
        let mut done = self.done();
        let of_files = self.core.loaded().map(|loaded| loaded.of_files.as_slice()).unwrap_or_default();
        // What a warning says in its place is not said again.
        let is_said = |alarm: &String| of_files.iter().any(|warning| alarm.contains(&warning.message));
        let new = |alarm: &String| !alarms.contains(alarm) && !is_said(alarm);
        done.warnings.extend(self.all_alarms(now).into_iter().filter(new));
        Ok(done)
    }

    fn done(&self) -> Done {
        let status = self.core.document_status();
        let message = format!("in force: {} at revision {}", status.path, status.revision);
        Done { revision: status.revision, message, warnings: status.warnings }
    }

    fn request_error(&self, error: ReloadError) -> RequestError {
        match error {
            ReloadError::Load(LoadError::Complaints(complaints)) => {
                RequestError::Document { file: self.file.path().to_owned(), complaints }
            }
            other => RequestError::Failed(other.to_string()),
        }
    }
}

/// Locks interfaces (name and index) that are not locked yet.
pub(super) fn lock_interfaces(
    wanted: &BTreeMap<String, u32>,
    locks: &mut BTreeMap<u32, Lock>,
) -> Result<(), LockError> {
    for (name, &index) in wanted {
        if let Entry::Vacant(place) = locks.entry(index) {
            place.insert(Lock::interface(name, index)?);
        }
    }
    Ok(())
}

/// An error of the document with the file's name before each complaint.
pub(super) fn located(path: &std::path::Path, error: &ReloadError) -> String {
    match error {
        ReloadError::Load(LoadError::Complaints(complaints)) => complaints.of_file(path),
        other => other.to_string(),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn refused(error: DocumentError) -> RequestError {
    match error {
        DocumentError::ReadOnly { .. } => RequestError::ReadOnly(error.to_string()),
        DocumentError::Read { .. } | DocumentError::Write { .. } => RequestError::Failed(error.to_string()),
    }
}

impl From<SettleError> for RequestError {
    fn from(error: SettleError) -> Self {
        Self::Failed(error.to_string())
    }
}
