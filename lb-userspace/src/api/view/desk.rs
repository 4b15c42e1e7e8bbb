//! The reception desk and its routes, as the API shows them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The desk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Desk {
    /// Its process; `null` while there is none.
    pub pid: Option<u32>,
    /// It serves the document in force.
    pub up_to_date: bool,
    /// How often it was started again after an end of its own.
    pub restarts: u64,
    /// Where it listens.
    pub listening: Vec<String>,
    /// Connections that are open.
    pub open: u64,
    /// Those of them that are websockets.
    #[serde(default)]
    pub websockets: u64,
    /// Those of them that are handed on as they are, by the name that their client asks for.
    #[serde(default)]
    pub passed: u64,
    /// Connections that were taken.
    pub connections: u64,
    /// Connections that were not let in, or ended by the desk, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Requests that were tried once more.
    pub retries: u64,
    /// Answers of the desk's own for want of another, by reason.
    pub troubles: BTreeMap<String, u64>,
    /// Lines of the access log that nobody took in time.
    pub lines_lost: u64,
    /// Answers by service, route and class of status.
    pub answers: Vec<Answers>,
    /// How long answers took to begin, by route.
    #[serde(default)]
    pub latencies: Vec<Latencies>,
    /// Requests that were not let in.
    #[serde(default)]
    pub denied: Vec<Denied>,
    /// How often backends that did not answer well got no requests for a while.
    #[serde(default)]
    pub ejections: Vec<Ejections>,
    /// How often the daemon has fetched keys of tokens for it, by outcome.
    #[serde(default)]
    pub key_fetches: BTreeMap<String, u64>,
    /// The certificates that it shows.
    #[serde(default)]
    pub certificates: Vec<Certificate>,
}

/// A certificate of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The service.
    pub service: String,
    /// Its file.
    pub cert: String,
    /// Until when it holds (RFC 3339).
    pub not_after: String,
    /// The same, in seconds since the epoch.
    pub not_after_seconds: u64,
    /// Whole days until then; negative when it has expired.
    pub days_left: i64,
}

/// How often a backend that did not answer well got no requests for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ejections {
    /// Its pool.
    pub pool: String,
    /// Its address.
    pub backend: String,
    /// How often.
    pub count: u64,
}

/// How long answers of a route took to begin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// The service.
    pub service: String,
    /// The route; empty where none was taken.
    pub route: String,
    /// The pool that it leads to; empty where the desk answers by itself.
    #[serde(default)]
    pub pool: String,
    /// All of them together.
    pub seconds: f64,
    /// How many took up to so many seconds, and more than the bound before.
    pub up_to_seconds: Vec<(f64, u64)>,
    /// How many took longer.
    pub longer: u64,
}

/// Requests that a route did not let in, for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denied {
    /// The service.
    pub service: String,
    /// The route.
    pub route: String,
    /// What they were answered.
    pub status: u16,
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// Answers of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// The service.
    pub service: String,
    /// The route; empty where none was taken.
    pub route: String,
    /// The pool that it leads to; empty where the desk answers by itself.
    #[serde(default)]
    pub pool: String,
    /// "2xx" and so on.
    pub status: String,
    /// How many.
    pub count: u64,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Its service.
    pub service: String,
    /// Where that listens.
    pub listen: String,
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Which requests: methods, host, path, headers.
    pub route: String,
    /// What it asks of who comes; empty: nothing.
    #[serde(default)]
    pub asks: String,
    /// What becomes of them.
    pub action: String,
    /// Backends of its pool that get requests; `null` where it has none.
    pub usable: Option<usize>,
    /// Answers so far.
    pub answers: u64,
}

/// Which way would this request go?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteQuestion {
    /// Its address, with scheme and host.
    pub url: String,
    /// Its method.
    pub method: String,
    /// Its headers.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
}

/// Which way a request would go at a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteExplanation {
    /// The service.
    pub service: String,
    /// Where it listens.
    pub listen: String,
    /// The host that decides; `null` where the request is refused before.
    pub host: Option<String>,
    /// The path that decides, normalised.
    pub path: Option<String>,
    /// What becomes of it.
    pub outcome: String,
    /// What the route asks of who comes; empty: nothing.
    #[serde(default)]
    pub asks: String,
    /// What the backend gets for a path, if one answers.
    pub sent: Option<String>,
    /// All routes, the narrowest first, each with what becomes of it.
    pub routes: Vec<Considered>,
}

/// A route that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered {
    /// Which requests.
    pub route: String,
    /// What becomes of them.
    pub action: String,
    /// "taken", "met, but a narrower one is", or what it wants otherwise.
    pub verdict: String,
}
