//! Keys of tokens that are had from their issuers: fetched again and again, sooner when a token asks for one that is not
//! among them, and kept for a while when nothing comes.
//!
//! The daemon fetches, not the desk, which knows nothing of names and of nobody's authorities. What has come is handed to it as files are. An
//! issuer that cannot be reached is a reason against a new document, and none against one that is in force: then it is an alarm.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use reqwest::redirect;
use tokio::{sync::Notify, task::JoinHandle, time::Instant};
use tracing::{debug, info};

use crate::{
    config::{Complaints, Document},
    model::{
        Config,
        guard::{Fetch, Way},
    },
    probe,
    proxy::{
        auth,
        orders::{Files, Secret},
        tls,
    },
};

/// How long an issuer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Longest set of keys, bytes.
const LONGEST: usize = 1 << 20;

/// How soon an issuer is asked again when a token wants another key, at the soonest.
const LEAST: Duration = Duration::from_secs(10);

/// How soon one is asked again that has not answered: the first time so, then twice as long each time.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// What is known of issuers.
#[derive(Clone, Default)]
pub struct Known(Arc<Shared>);

#[derive(Default)]
struct Shared {
    issuers: Mutex<BTreeMap<PathBuf, Issuer>>,
    changed: Notify,
    /// How often keys were had, and how often none were, from whomever.
    had: AtomicU64,
    missed: AtomicU64,
}

#[derive(Default)]
struct Issuer {
    /// The keys, when they came, and how.
    keys: Option<(Secret, Instant, Fetch)>,
    /// Why the last that was tried did not succeed.
    problem: Option<String>,
    wanted: Arc<Notify>,
}

/// Issuers, and who looks after their keys.
#[derive(Default)]
pub struct Issuers {
    known: Known,
    tasks: BTreeMap<PathBuf, (Fetch, Task)>,
}

struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Known {
    fn issuers(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Issuer>> {
        self.0.issuers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody wants keys that are not among those from there.
    pub fn hurry(&self, addresses: &BTreeSet<PathBuf>) {
        let issuers = self.issuers();
        addresses
            .iter()
            .filter_map(|address| issuers.get(address))
            .for_each(|issuer| issuer.wanted.notify_one());
    }

    /// Fetches keys, and counts what comes of it.
    async fn fetch(&self, address: &Path, way: &Way, fetch: &Fetch) -> Result<Secret, String> {
        let outcome = read(address, way, fetch).await;
        let count = if outcome.is_ok() { &self.0.had } else { &self.0.missed };
        count.fetch_add(1, Ordering::Relaxed);
        outcome
    }

    /// Notes what an attempt has brought; says whether that is new.
    fn note(&self, address: &Path, fetch: &Fetch, outcome: Result<Secret, String>) -> bool {
        let mut issuers = self.issuers();
        let issuer = issuers.entry(address.to_owned()).or_default();
        match outcome {
            Ok(text) => {
                let is_new = issuer.keys.as_ref().is_none_or(|(before, ..)| *before != text);
                issuer.keys = Some((text, Instant::now(), fetch.clone()));
                is_new | issuer.problem.take().is_some()
            }
            Err(problem) => {
                let is_new = issuer.problem.as_ref() != Some(&problem);
                issuer.problem = Some(problem);
                is_new
            }
        }
    }

    /// Fetches again and again.
    async fn look_after(self, address: PathBuf, way: Way, fetch: Fetch) {
        let wanted = Arc::clone(&self.issuers().entry(address.clone()).or_default().wanted);
        let mut retry = RETRY;
        // What somebody has fetched to see whether it can be is as good.
        let known = self.issuers()[&address]
            .keys
            .as_ref()
            .filter(|(.., how)| *how == fetch)
            .map(|(_, since, _)| *since);
        let mut wait = known.map_or(Duration::ZERO, |since| fetch.refresh.saturating_sub(since.elapsed()));
        loop {
            let asked = Instant::now();
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = wanted.notified() => tokio::time::sleep_until(asked + LEAST.min(wait)).await,
            }
            let outcome = self.fetch(&address, &way, &fetch).await;
            wait = if outcome.is_ok() { fetch.refresh } else { retry.min(fetch.refresh) };
            retry = if outcome.is_ok() { RETRY } else { (retry * 2).min(RETRY_MOST) };
            let said = outcome.as_ref().map(|_| ()).map_err(Clone::clone);
            if self.note(&address, &fetch, outcome) {
                match said {
                    Ok(()) => info!("new keys from {}", address.display()),
                    // An alarm, and told as such.
                    Err(problem) => debug!("no keys from {}: {problem}", address.display()),
                }
            }
            // Even where nothing has come: what was there may have become too old.
            self.0.changed.notify_one();
        }
    }
}

impl Issuers {
    /// What is known of them.
    pub fn known(&self) -> &Known {
        &self.known
    }

    /// Comes back when there may be other keys.
    pub async fn changed(&self) {
        self.known.0.changed.notified().await;
    }

    /// Looks after those of a document, and no others.
    pub fn follow(&mut self, config: &Config) {
        let wanted: BTreeMap<&Path, (&Way, &Fetch)> = issuers(config).collect();
        self.tasks.retain(|address, (fetch, _)| {
            wanted.get(address.as_path()).is_some_and(|(_, wanted)| *wanted == fetch)
        });
        for (&address, &(way, fetch)) in &wanted {
            if !self.tasks.contains_key(address) {
                self.known.issuers().entry(address.to_owned()).or_default();
                let task = self.known.clone().look_after(address.to_owned(), way.clone(), fetch.clone());
                self.tasks.insert(address.to_owned(), (fetch.clone(), Task(tokio::spawn(task))));
            }
        }
        self.known.issuers().retain(|address, _| wanted.contains_key(address.as_path()));
    }

    /// Keys that hold, by their addresses.
    pub fn keys(&self) -> Files {
        let holding = |(address, issuer): (&PathBuf, &Issuer)| {
            let (text, since, _) = issuer.keys.as_ref()?;
            let keep = self.tasks.get(address).map(|(fetch, _)| fetch.keep)?;
            (since.elapsed() < keep).then(|| (address.clone(), text.clone()))
        };
        self.known.issuers().iter().filter_map(holding).collect()
    }

    /// How often keys were fetched, by outcome.
    pub fn fetches(&self) -> BTreeMap<String, u64> {
        let Shared { had, missed, .. } = &*self.known.0;
        let count = |(outcome, count): (&str, &AtomicU64)| (outcome.into(), count.load(Ordering::Relaxed));
        [("success", had), ("failure", missed)].map(count).into()
    }

    /// What needs somebody's attention.
    pub fn alarms(&self) -> Vec<String> {
        let holding = self.keys();
        let alarm = |(address, issuer): (&PathBuf, &Issuer)| {
            let problem = issuer.problem.as_ref()?;
            let so = match holding.contains_key(address) {
                true => "those from before still hold",
                false => "there are none that hold, and nobody comes in by them",
            };
            Some(format!("no keys from {}: {problem}; {so}", address.display()))
        };
        self.known.issuers().iter().filter_map(alarm).collect()
    }

    /// The issuers of a document that are not asked so yet; `None`: there are none.
    pub fn first(&self, document: &Document) -> Option<First> {
        let is_known = |address: &Path, fetch: &Fetch| {
            let looked_after = self.tasks.get(address).is_some_and(|(how, _)| how == fetch);
            // Asked a moment ago, for this very document.
            let just_had = |issuer: &Issuer| {
                issuer.keys.as_ref().is_some_and(|(_, since, how)| how == fetch && since.elapsed() < LEAST)
            };
            looked_after || self.known.issuers().get(address).is_some_and(just_had)
        };
        let issuers: Vec<_> = issuers(&document.config)
            .filter(|(address, (_, fetch))| !is_known(address, fetch))
            .map(|(address, (way, fetch))| (address.to_owned(), way.clone(), fetch.clone()))
            .collect();
        if issuers.is_empty() {
            return None;
        }
        Some(First { known: self.known.clone(), document: document.clone(), issuers })
    }
}

/// Issuers that are asked for the first time.
pub struct First {
    known: Known,
    document: Document,
    issuers: Vec<(PathBuf, Way, Fetch)>,
}

impl First {
    /// Asks all of them.
    ///
    /// # Errors
    /// Which of them have no keys.
    pub async fn run(self) -> Result<(), Complaints> {
        let Self { known, document, issuers } = &self;
        let asked = issuers.iter().map(|(address, way, fetch)| async move {
            let outcome = known.fetch(address, way, fetch).await;
            (address, fetch, outcome)
        });
        let mut complaints = Vec::new();
        for (address, fetch, outcome) in futures::future::join_all(asked).await {
            match outcome {
                Ok(text) => _ = known.note(address, fetch, Ok(text)),
                Err(problem) => complaints.extend(places(document, address).map(|place| {
                    let message = format!("no keys from {}: {problem}", address.display());
                    place.error(message, "name an address that this host can reach and that gives a set of keys, as the issuer's jwks_uri does")
                })),
            }
        }
        if complaints.is_empty() { Ok(()) } else { Err(Complaints(complaints)) }
    }
}

/// Where a document names an address.
fn places<'d>(document: &'d Document, address: &'d Path) -> impl Iterator<Item = crate::config::Place<'d>> {
    document.config.at_desk().flat_map(move |(name, _, desk)| {
        desk.routes.iter().enumerate().flat_map(move |(number, route)| {
            let ways = route.guard.ways.iter().enumerate();
            let there = ways.filter(move |(_, way)| way.fetch().is_some() && way.source() == Some(address));
            there.map(move |(at, _)| document.places.way(name, number, at))
        })
    })
}

/// The issuers of a document, by their addresses.
fn issuers(config: &Config) -> impl Iterator<Item = (&Path, (&Way, &Fetch))> {
    let routes = config.at_desk().flat_map(|(_, _, desk)| &desk.routes);
    let ways = routes.flat_map(|route| &route.guard.ways);
    ways.filter_map(|way| Some((way.source()?, (way, way.fetch()?))))
}

/// Fetches a set of keys, and looks whether it is one.
async fn read(address: &Path, way: &Way, fetch: &Fetch) -> Result<Secret, String> {
    let text = get(address, fetch.ca.as_deref()).await?;
    auth::check(way, &text).map_err(|why| why.to_string())?;
    Ok(Secret::new(text))
}

async fn get(address: &Path, ca: Option<&Path>) -> Result<String, String> {
    let address = address.to_str().unwrap_or_default();
    let roots = probe::tls::authorities(ca).map_err(|error| error.to_string())?;
    let tls = tls::client(roots, false).map_err(|error| error.to_string())?;
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .https_only(address.starts_with("https:"))
        .redirect(redirect::Policy::limited(3))
        .timeout(PATIENCE)
        .user_agent(concat!("lobby/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| said(&error))?;
    let response = client.get(address).send().await.map_err(|error| said(&error))?;
    let mut response = response.error_for_status().map_err(|error| said(&error))?;
    let mut text = Vec::new();
    while let Some(part) = response.chunk().await.map_err(|error| said(&error))? {
        text.extend_from_slice(&part);
        if text.len() > LONGEST {
            return Err("the answer is longer than 1 MiB".into());
        }
    }
    String::from_utf8(text).map_err(|_| "the answer is no text".into())
}

/// What went wrong, down to what caused it, without the address, which stands before it already.
fn said(error: &reqwest::Error) -> String {
    if let Some(status) = error.status() {
        return format!("it answers {status}");
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: &str = "http://127.0.0.1:1/jwks";

    fn document() -> Document {
        let text = format!(
            "interfaces = [\"eth0\"]\n[services.s]\nlisten = \"203.0.113.10:80/tcp\"\n\
             routes = [ {{ respond = 404, auth = {{ jwt = {{ jwks_url = {{ url = \"{ADDRESS}\", refresh = \"1m\", keep = \"2m\" }} }} }} }} ]\n"
        );
        Document::parse(&text).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn keys_hold_for_a_while_when_nothing_comes() {
        let mut issuers = Issuers::default();
        let (text, address) = (Secret::new("{}".into()), Path::new(ADDRESS));
        assert!(issuers.first(&document()).is_some());
        issuers.follow(&document().config);
        assert!(issuers.first(&document()).is_none(), "one that is in force hinders nothing");
        assert!(issuers.keys().is_empty());
        let config = document().config;
        let (_, (_, fetch)) = super::issuers(&config).next().unwrap();
        let note = |outcome: Result<Secret, &str>| {
            issuers.known.note(address, fetch, outcome.map_err(str::to_owned))
        };
        assert!(note(Ok(text.clone())), "new keys");
        assert!(!note(Ok(text.clone())), "the same");
        assert_eq!(issuers.keys(), Files::from([(address.to_owned(), text)]));
        assert_eq!(issuers.alarms(), Vec::<String>::new());
        assert!(note(Err("it is away")));
        assert!(!note(Err("it is away")));
        assert!(issuers.alarms()[0].ends_with("it is away; those from before still hold"));
        tokio::time::advance(Duration::from_secs(121)).await;
        assert!(issuers.keys().is_empty());
        assert!(issuers.alarms()[0].ends_with("there are none that hold, and nobody comes in by them"));
        issuers.follow(&Document::parse("interfaces = [\"eth0\"]\n").unwrap().config);
        assert!(issuers.known.issuers().is_empty() && issuers.tasks.is_empty());
    }
}
