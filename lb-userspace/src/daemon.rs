//! The daemon: sole owner of the state, one event loop.
//!
//! [`core`] knows what follows from what and touches nothing; `serve` hears of everything that happens
//! and tells it; the other modules here are what they stand on. Start and end are below: a daemon that
//! ends leaves the data plane forwarding, and the next one takes it over as it is.

pub mod bpffs;
pub mod certificates;
pub mod changes;
pub mod checks;
pub mod core;
pub mod credentials;
pub mod desk;
pub mod document;
pub mod edits;
pub mod explain;
pub mod farewell;
pub mod foresee;
pub mod issuers;
pub mod lock;
pub mod plane;
mod reception;
pub mod record;
pub mod routes;
mod serve;
pub mod snapshot;
pub mod validity;
pub mod watch;
pub mod ways;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    hash::{BuildHasher, RandomState},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use lb_common::abi::name::PROGRAM;
use sd_notify::NotifyState;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use self::{
    checks::{Host, targets},
    core::Core,
    document::DocumentFile,
    farewell::Farewells,
    lock::Lock,
    plane::Plane,
    reception::Reception,
    record::{Record, RecordFile},
    serve::{Alarms, Clock, Daemon, End, Signals, located, lock_interfaces},
};
use crate::{
    addresses,
    api::{self, request, view::Done},
    config::{Complaints, Document},
    dataplane::{
        kernel::{KernelDataplane, is_pinned, pinned_links, remove_pins},
        memory::MemoryDataplane,
    },
    model::Limits,
    netlink::{
        Netlink,
        surroundings::Surroundings,
        watch::{listen, start as watch},
    },
    probe::Prober,
};

/// How the daemon is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The document.
    pub config: PathBuf,
    /// Directory of its socket and state.
    pub run_dir: PathBuf,
    /// BPF file system to pin objects in.
    pub bpffs: PathBuf,
    /// Take everything down at the end.
    pub ephemeral: bool,
    /// Forward nothing: tables in memory, to try documents, health checks and the API.
    pub memory: bool,
    /// Words of the desk's command line: how it logs.
    pub desk_arguments: Vec<String>,
}

/// The daemon cannot start, or could not end as it should.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The document has mistakes, or does not fit this host.
    #[error("{0}")]
    Document(String),
    /// Anything else.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

/// Runs the daemon until it is told to end.
///
/// # Errors
/// When it cannot start: nothing has been changed then.
pub fn run(options: &Options) -> Result<(), RunError> {
    // Two threads: one for the loop, one for probes and connections of the API meanwhile.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(async {
        if options.memory {
            start(options, |limits| {
                Ok(Opened { plane: MemoryDataplane::new(limits), adopted: false, lock: None })
            })
            .await
        } else {
            start(options, |limits| open(options, limits)).await
        }
    });
    // Only if nothing is in it.
    _ = fs::remove_dir(&options.run_dir);
    // Probes that are under way are of no use any more.
    runtime.shutdown_background();
    outcome
}

async fn start<P: Plane>(
    options: &Options,
    open: impl FnOnce(Limits) -> anyhow::Result<Opened<P>>,
) -> Result<(), RunError> {
    let clock = Clock::start();
    // Signals from the first moment on: a SIGTERM during the start ends it in order too.
    let mut signals = Signals::new().context("cannot listen to signals")?;
    let file = DocumentFile::new(&options.config);
    let path = file.path().to_owned();
    let text = file.read().map_err(|error| RunError::Document(error.to_string()))?;
    let mistakes = |complaints: Complaints| RunError::Document(located(&path, &complaints.into()));
    let document = file.parse(&text).map_err(mistakes)?;

    fs::DirBuilder::new().recursive(true).mode(0o700).create(&options.run_dir).with_context(|| {
        let hint = if nix::unistd::geteuid().is_root() { "" } else { "; try again with sudo" };
        format!("cannot make the run directory {}{hint}", options.run_dir.display())
    })?;
    let _run = Lock::run_dir(&options.run_dir).context("cannot start")?;
    raise_file_limit();
    let record_file = RecordFile::new(&options.run_dir);
    let mut record = record_file.read().context("cannot start")?;

    // Everything that can speak against the document does so before anything is touched.
    let netlink = Netlink::open().context("cannot start")?;
    let stop = CancellationToken::new();
    let ears = listen().context("cannot start")?;
    let around = netlink.survey(&targets(&document.config)).await.context("cannot start")?;
    let complaints = checks::complaints(&document, &around, &Host::read());
    if complaints.iter().any(|complaint| complaint.severity == crate::config::Severity::Error) {
        return Err(mistakes(Complaints::errors_of(complaints)));
    }

    let names = document.config.interfaces.iter().filter_map(|name| around.link(name));
    let interfaces = names.map(|link| (link.name.clone(), link.index)).collect();
    let mut locks = BTreeMap::new();
    lock_interfaces(&interfaces, &mut locks).context("cannot start")?;

    let Opened { plane, adopted, lock: pins } = open(document.config.settings.limits)?;
    if pins.is_some() {
        record.bpffs = Some(options.bpffs.clone());
        record_file.write(&record).context("cannot write the record in the run directory")?;
    }
    let random = || RandomState::new().hash_one(std::process::id());
    let mut core = Core::new(plane, path.display().to_string(), [random(), random()], random())
        .context("cannot read the tables")?;
    core.set_put(record.addresses.clone());
    let around = Arc::new(around);
    let watch = watch(netlink.clone(), ears, Arc::clone(&around), record.neighbours.clone(), stop.clone());
    let (prober, answers) = Prober::new();
    let reception = Reception::new(desk::Options {
        run_dir: options.run_dir.clone(),
        ephemeral: options.ephemeral,
        arguments: options.desk_arguments.clone(),
    });
    let (asking, requests) = request::channel();
    let mut daemon = Daemon {
        core,
        file,
        netlink,
        watch,
        record,
        record_file,
        locks,
        prober,
        answers,
        requests,
        asking: asking.clone(),
        metrics: None,
        reception,
        watched: BTreeSet::new(),
        tasks: TaskTracker::new(),
        stop: stop.clone(),
        clock,
        last_seen: text.clone(),
        named: BTreeMap::new(),
        last_census: Duration::ZERO,
        farewells: Farewells::default(),
        placing: None,
        attached: None,
        alarms: Alarms::default(),
    };
    let listener = match begin(&mut daemon, &text, document, around, &options.run_dir).await {
        Ok(listener) => listener,
        Err(error) => {
            // What was there before goes on as it was; what was made just now is taken away again.
            if !adopted && let Err(error) = take_down(&mut daemon).await {
                warn!("{error:#}");
            }
            return Err(error.into());
        }
    };
    let serving = tokio::spawn(api::serve(listener, asking, stop.clone()));
    for warning in &daemon.core.document_status().warnings {
        warn!("{warning}");
    }
    // Without systemd this does nothing; with it, a failure is only that it goes on waiting.
    _ = sd_notify::notify(&[NotifyState::Ready]);
    info!(document = %path.display(), "ready");

    let end = daemon.serve(&mut signals).await;
    _ = sd_notify::notify(&[NotifyState::Stopping]);
    let outcome = finish(&mut daemon, &end, options).await;
    if let End::Detach(reply) = end {
        let done = Done {
            message: "the data plane is down: programs, tables and addresses are gone".into(),
            ..Done::default()
        };
        reply.send(
            outcome.as_ref().map(|()| done).map_err(|e| request::RequestError::Failed(format!("{e:#}"))),
        );
    }
    // Who still waits for an answer is told that there will be none; then everybody stops.
    daemon.requests.close();
    while daemon.requests.try_recv().is_ok() {}
    stop.cancel();
    daemon.tasks.close();
    daemon.tasks.wait().await;
    _ = serving.await;
    _ = fs::remove_file(options.run_dir.join(api::SOCKET));
    Ok(outcome?)
}

/// A data plane, whether an earlier daemon made it, and the lock of what is pinned.
struct Opened<P> {
    plane: P,
    adopted: bool,
    lock: Option<Lock>,
}

/// Puts the document in force for the first time, and listens.
async fn begin<P: Plane>(
    daemon: &mut Daemon<P>,
    text: &str,
    document: Document,
    around: Arc<Surroundings>,
    run_dir: &Path,
) -> anyhow::Result<tokio::net::UnixListener> {
    daemon.fetch_at_start(&document).await;
    let begun = daemon.put_in_force(text, document, around).await;
    begun.map_err(|error| anyhow::anyhow!(located(daemon.file.path(), &error.into())))?;
    daemon.core.remember_timelines(&daemon.record.timelines);
    if let Some(why) = daemon.core.unattached() {
        anyhow::bail!("{why}");
    }
    api::listen(run_dir).with_context(|| format!("cannot listen in {}", run_dir.display()))
}

/// Leaves everything as it is, or takes it down.
async fn finish<P: Plane>(daemon: &mut Daemon<P>, end: &End, options: &Options) -> anyhow::Result<()> {
    if !options.ephemeral && matches!(end, End::Told) {
        if let Some(placing) = daemon.placing.take() {
            placing.end().await;
        }
        if let Some(desk) = daemon.reception.desk.take() {
            desk.leave().await;
        }
        warn!(
            "ending; the data plane goes on forwarding as it is, and nobody checks health or follows next hops now: `lb run` takes it over, `lb detach` takes it down"
        );
        return Ok(());
    }
    take_down(daemon).await?;
    info!("the data plane is down");
    Ok(())
}

/// Takes down everything that this daemon looks after.
async fn take_down<P: Plane>(daemon: &mut Daemon<P>) -> anyhow::Result<()> {
    // While packets still come: what is under way at the desk may end.
    if let Some(desk) = daemon.reception.desk.take() {
        desk.close().await;
    }
    // Nobody may put addresses and keep neighbours while they are being taken away and released.
    if let Some(placing) = daemon.placing.take() {
        placing.abort().await;
    }
    daemon.watch.follower.abort();
    _ = (&mut daemon.watch.follower).await;
    let down = daemon.core.plane_mut().take_down().map_err(|why| anyhow::anyhow!(why));
    let record = Record { neighbours: daemon.watch.kept.borrow().clone(), ..daemon.record.clone() };
    let cleaned = clean(&daemon.netlink, record, &daemon.record_file).await;
    down.context("the data plane is not down")?;
    cleaned?;
    Ok(())
}

/// Takes a data plane down that no daemon looks after; says what was done.
///
/// # Errors
/// When something of it cannot be removed, a daemon looks after it, or it is pinned in another BPF file system
/// than `bpffs`: where none is named, the one that is remembered in the run directory, else `usual`.
pub async fn detach(run_dir: &Path, bpffs: Option<&Path>, usual: &Path) -> anyhow::Result<String> {
    let run = if run_dir.is_dir() { Some(Lock::run_dir(run_dir)?) } else { None };
    let record_file = RecordFile::new(run_dir);
    let record = record_file.read()?;
    let remembered = record.bpffs.clone();
    let bpffs = bpffs.or(remembered.as_deref()).unwrap_or(usual);
    let _pins = if bpffs.is_dir() { Some(Lock::pins(bpffs)?) } else { None };
    let netlink = Netlink::open()?;
    if !is_pinned(bpffs) {
        let forwarding = left_on(&netlink, |_| true).await?;
        anyhow::ensure!(
            forwarding.is_empty(),
            "a program of Lobby without a daemon goes on forwarding on {}, and {} holds nothing that it is led by: its tables are pinned in another BPF file system, which `--bpffs` names, or its daemon ran in another mount namespace (`nsenter --mount`, `ip netns exec`); nothing was touched",
            forwarding.join(" and "),
            bpffs.display()
        );
    }
    let left = {
        let run_dir = run_dir.to_owned();
        tokio::task::spawn_blocking(move || desk::close_left(&run_dir)).await?
    };
    let pinned = pinned_links(bpffs);
    let plane = remove_pins(bpffs)
        .with_context(|| format!("cannot remove what is pinned below {}", bpffs.display()))?;
    // The kernel takes links away some time after their pins; who is told that all is gone counts on it.
    let forwarding = left_on(&netlink, |interface| pinned.contains(interface)).await;
    let placed = clean(&netlink, record, &record_file).await?;
    _ = fs::remove_file(run_dir.join(api::SOCKET));
    drop(run);
    _ = fs::remove_dir(run_dir);
    let forwarding = forwarding?;
    anyhow::ensure!(
        forwarding.is_empty(),
        "all that was pinned is removed, and a program of Lobby goes on forwarding on {}: another process holds it",
        forwarding.join(" and ")
    );
    Ok(match (plane, placed) {
        (false, 0) if !left => "there is nothing to take down".to_owned(),
        _ => "the data plane is down: programs, tables and addresses are gone".to_owned(),
    })
}

/// Where a data plane is pinned that no daemon looks after, as far as this process may see: in the BPF file system that is
/// remembered in the run directory, else in the `usual` one.
pub fn left(run_dir: &Path, usual: &Path) -> Option<PathBuf> {
    let remembered = RecordFile::new(run_dir).read().ok().and_then(|record| record.bpffs);
    let bpffs = remembered.unwrap_or_else(|| usual.to_owned());
    (is_pinned(&bpffs) && !Lock::is_pins_taken(&bpffs)).then_some(bpffs)
}

/// How long the kernel may take to let go of what is pinned no more.
const PATIENCE_TO_LET_GO: Duration = Duration::from_secs(5);

/// Interfaces among some on which a program of Lobby is that no daemon looks after, and stays.
async fn left_on(netlink: &Netlink, is_one: impl Fn(&str) -> bool) -> anyhow::Result<Vec<String>> {
    let begun = Instant::now();
    loop {
        let (links, host) = (netlink.links().await?, Host::read());
        let ours = links.iter().filter(|link| is_one(&link.name));
        let ours = ours.filter(|link| checks::program(link, &host) == Some(PROGRAM));
        let left = ours.filter(|link| Lock::interface(&link.name, link.index).is_ok());
        let left: Vec<_> = left.map(|link| link.name.clone()).collect();
        if left.is_empty() || begun.elapsed() > PATIENCE_TO_LET_GO {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Takes away the addresses that were put, here or by a daemon that is gone, and lets go of neighbours;
/// gives back how many there were.
async fn clean(netlink: &Netlink, mut record: Record, file: &RecordFile) -> anyhow::Result<usize> {
    let around = netlink.survey(&BTreeSet::new()).await?;
    let changes = addresses::changes(&BTreeSet::new(), &[], &record.addresses, &around);
    let found = changes.remove.len() + record.neighbours.len();
    addresses::apply(&changes, &mut record.addresses, netlink).await;
    for (interface, address) in record.neighbours {
        if let Err(error) = netlink.release(interface, address).await {
            warn!("{error}");
        }
    }
    file.remove().context("cannot remove the record in the run directory")?;
    Ok(found)
}

/// As many sockets as the hard limit allows: thousands of backends are probed.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        warn!("cannot raise the limit of open files: {error}");
    }
}

/// The data plane in the kernel: what an earlier daemon pinned, else a new one. One that is to end with
/// this process is not pinned, so that not even a crash leaves it behind.
fn open(options: &Options, limits: Limits) -> anyhow::Result<Opened<KernelDataplane>> {
    let adopted = is_pinned(&options.bpffs);
    if options.ephemeral && !adopted {
        return Ok(Opened { plane: KernelDataplane::open(None, limits)?, adopted, lock: None });
    }
    if bpffs::ensure(&options.bpffs)? {
        info!(path = %options.bpffs.display(), "mounted a BPF file system");
    }
    let lock = Lock::pins(&options.bpffs).context("cannot start")?;
    Ok(Opened { plane: KernelDataplane::open(Some(&options.bpffs), limits)?, adopted, lock: Some(lock) })
}
