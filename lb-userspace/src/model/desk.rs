//! What the reception desk does for a service: its certificates, and which request goes where.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    num::NonZeroU32,
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Network,
    guard::{Guard, Way},
    limit::RateLimit,
};

/// The pool that services of the desk are forwarded to: this host itself. No document can name it so.
pub const DESK_POOL: &str = "(desk)";

/// A service that the desk answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Desk {
    /// Certificates with their keys; empty: plain HTTP.
    pub certificates: Vec<CertificateFiles>,
    /// What its clients may show in turn; `None`: they are asked for nothing.
    pub clients: Option<Clients>,
    /// Connections by TLS that are handed to a pool as they are, by the name that their client asks for; a name is there once.
    pub passthrough: Vec<(HostPattern, String)>,
    /// Where requests go; no two that cannot be told apart.
    pub routes: Vec<Route>,
    /// How long things may take.
    pub timeouts: DeskTimeouts,
    /// One in so many requests has a line on standard output, and each that went wrong; `None`: none has.
    pub access_log: Option<NonZeroU32>,
    /// Proxies before it, which are believed when they say who asks.
    pub proxies: Vec<Network>,
    /// The header that they say it in.
    pub proxy_header: ProxyHeader,
    /// They also say for which host a request is, each of them whatever its client has sent.
    pub proxy_host: bool,
    /// And give it a number.
    pub proxy_request_id: bool,
    /// They say so before anything else, by the PROXY protocol.
    pub proxy_protocol: bool,
    /// Pages for what the desk itself has to say.
    pub pages: Pages,
}

impl Desk {
    /// The pools that it needs.
    pub fn pools(&self) -> impl Iterator<Item = &str> {
        let passed = self.passthrough.iter().map(|(_, pool)| pool.as_str());
        self.routes.iter().flat_map(Route::pools).chain(passed)
    }
}

/// Files of pages by which browsers are told that something is wrong, instead of the desk's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// By the status of the answer.
    pub by_status: BTreeMap<u16, PathBuf>,
    /// For all others.
    pub otherwise: Option<PathBuf>,
}

impl Pages {
    /// The files, by what they are for: `page 503`, `page default`.
    pub fn files(&self) -> impl Iterator<Item = (String, &PathBuf)> {
        let by_status = self.by_status.iter().map(|(status, file)| (format!("page {status}"), file));
        by_status.chain(self.otherwise.iter().map(|file| ("page default".to_owned(), file)))
    }

    /// The same, to be changed.
    pub fn files_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        self.by_status.values_mut().chain(&mut self.otherwise)
    }
}

/// Certificates of clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clients {
    /// PEM file of the authorities that may have signed them.
    pub ca: PathBuf,
    /// PEM file of those that have been revoked.
    pub crl: Option<PathBuf>,
    /// There is no connection without.
    pub required: bool,
}

/// In which header proxies say who asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProxyHeader {
    /// `X-Forwarded-For`, and `X-Forwarded-Proto`.
    #[default]
    ForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
}

/// Files of a certificate, in PEM form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateFiles {
    /// The certificate, and those between it and its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// How many requests of the desk may be under way with each server of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crowd {
    /// So many with each, at least one.
    pub limit: u32,
    /// So many may wait for room, in the whole pool.
    pub queue: u32,
    /// So long at most.
    pub wait: Duration,
}

/// How the desk speaks with the servers of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speech {
    /// HTTP/2, which the servers are known to speak (RFC 9113 section 3.3); else HTTP/1.1.
    pub http2: bool,
    /// Over TLS; `None`: in clear text.
    pub tls: Option<ServerTls>,
    /// A connection begins with who its client is, by the PROXY protocol; then it is for one request alone.
    pub proxy: Option<ProxyVersion>,
}

/// How the PROXY protocol is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProxyVersion {
    /// As a line of text.
    V1,
    /// As bytes.
    V2,
}

impl ProxyVersion {
    /// A header, as a connection begins with it.
    pub fn encode(self, header: &proxy_header::ProxyHeader<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let written = match self {
            Self::V1 => header.encode_v1(&mut bytes),
            Self::V2 => header.encode_v2(&mut bytes),
        };
        // Addresses can always be written, and that there are none.
        debug_assert!(written.is_ok(), "{written:?}");
        bytes
    }
}

/// When a server that does not answer well gets no requests for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ejection {
    /// So many in a row went wrong.
    pub after: u32,
    /// For so long; twice, three times as long and so on when it happens again, to ten times at most.
    pub pause: Duration,
}

/// Whom the desk believes to be a server of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerTls {
    /// The name that its certificate is for.
    pub host: String,
    /// PEM file of the authorities that may have signed it.
    pub ca: PathBuf,
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeskTimeouts {
    /// TLS handshake; and a request's headers, from the moment that the connection is ready for them. So it
    /// is also how long a connection may rest between requests.
    pub header: Duration,
    /// A connection to a backend.
    pub connect: Duration,
    /// From a request's last byte to the first of the backend's answer.
    pub response: Duration,
    /// Without a byte of a body, in either direction.
    pub body: Duration,
    /// Without a byte of a websocket, in both directions.
    pub websocket: Duration,
}

impl Default for DeskTimeouts {
    fn default() -> Self {
        Self {
            header: Duration::from_secs(30),
            connect: Duration::from_secs(2),
            response: Duration::from_secs(60),
            body: Duration::from_secs(60),
            websocket: Duration::from_secs(3600),
        }
    }
}

/// Which requests, and what becomes of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// Which.
    pub condition: Condition,
    /// Who may come in.
    pub guard: Guard,
    /// How often requests may come.
    pub limits: Vec<RateLimit>,
    /// What becomes of them.
    pub action: Action,
    /// What is changed in the answer.
    pub response_headers: HeaderEdits,
}

/// What a request must be like for a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Its host.
    pub host: HostPattern,
    /// Its path.
    pub path: PathPattern,
    /// Its method, where GET stands for HEAD too ([`Condition::methods`]); empty: any.
    pub methods: BTreeSet<String>,
    /// Headers with exactly these values; names in lower case.
    pub headers: BTreeMap<String, String>,
}

/// Which hosts. Names are in lower case, without a final dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum HostPattern {
    /// All.
    Any,
    /// All names below this one: for `*.shop.example` it is `shop.example`.
    Below(String),
    /// This one.
    Exact(String),
}

/// Which paths; normalised.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PathPattern {
    /// This one and those below it: `/pay`, `/pay/` and `/pay/now`, not `/payments`.
    Prefix(String),
    /// This one alone.
    Exact(String),
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// A backend answers.
    Forward {
        /// Name of its pool.
        pool: String,
        /// What the backend sees in place of the route's path; `None`: the path as it is.
        rewrite: Option<String>,
        /// Which requests come to the same backend; `None`: each goes to whoever has less to do.
        sticky: Option<Sticky>,
        /// What is changed in the request.
        headers: HeaderEdits,
    },
    /// The client is sent elsewhere.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        status: u16,
        /// Where to.
        to: Elsewhere,
    },
    /// The desk answers.
    Respond {
        /// 200 to 599.
        status: u16,
        /// The body, perhaps empty.
        body: String,
        /// Its media type.
        content_type: String,
    },
}

/// Which requests come to the same backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sticky {
    /// Those from one IPv4 address, or one IPv6 network of 64 bits.
    Source,
    /// Those with one value of this header.
    Header(String),
    /// Those with this cookie, which the desk sets.
    Cookie(String),
}

/// Where a client is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Elsewhere {
    /// The same by HTTPS.
    Https,
    /// The same path of another host: scheme and host, such as `https://shop.example`.
    Host(String),
    /// One address.
    Url(String),
}

/// Changes to headers, in this order. Names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderEdits {
    /// These are taken out.
    pub remove: BTreeSet<String>,
    /// These have this value, and no other.
    pub set: BTreeMap<String, String>,
    /// These are there besides.
    pub add: BTreeMap<String, String>,
}

impl Route {
    /// What it asks of who comes by it: `basic or key, role admin, at most 100/s by source`.
    pub fn asks(&self) -> String {
        let limits = self.limits.iter().map(|limit| format!("at most {limit}"));
        let guard = Some(self.guard.to_string()).filter(|guard| !guard.is_empty());
        guard.into_iter().chain(limits).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Below(name) => write!(f, "*.{name}"),
            Self::Exact(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefix(path) if path == "/" => f.write_str("/*"),
            Self::Prefix(path) => write!(f, "{path}/*"),
            Self::Exact(path) => f.write_str(path),
        }
    }
}

impl fmt::Display for Condition {
    /// `GET,HEAD shop.example/pay/* x-version: 2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.methods.is_empty() {
            let methods: Vec<&str> = self.methods.iter().map(String::as_str).collect();
            write!(f, "{} ", methods.join(","))?;
        }
        write!(f, "{}{}", self.host, self.path)?;
        self.headers.iter().try_for_each(|(name, value)| write!(f, " {name}: {value}"))
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward { pool, .. } => write!(f, "pool {pool}"),
            Self::Redirect { status, to } => match to {
                Elsewhere::Https => write!(f, "redirect {status} to https"),
                Elsewhere::Host(to) | Elsewhere::Url(to) => write!(f, "redirect {status} to {to}"),
            },
            Self::Respond { status, .. } => write!(f, "respond {status}"),
        }
    }
}

impl Route {
    /// The pools that it needs: the one that answers, and those that say who may come in.
    pub fn pools(&self) -> impl Iterator<Item = &str> {
        self.pool().into_iter().chain(self.guard.ways.iter().filter_map(Way::pool))
    }

    /// The pool that answers, if one does.
    pub fn pool(&self) -> Option<&str> {
        match &self.action {
            Action::Forward { pool, .. } => Some(pool),
            _ => None,
        }
    }
}

impl HostPattern {
    /// How narrow it is: of two that a name meets, the greater one wins.
    pub fn specificity(&self) -> impl Ord + use<> {
        match self {
            Self::Any => (0, 0),
            Self::Below(name) => (1, name.len()),
            Self::Exact(_) => (2, 0),
        }
    }
}

impl Condition {
    /// How narrow it is: of two that a request meets, the greater one wins.
    pub fn specificity(&self) -> impl Ord + use<> {
        let path = match &self.path {
            PathPattern::Prefix(path) => (0, path.len()),
            PathPattern::Exact(_) => (1, 0),
        };
        // Who names HEAD means it, before who means it by GET.
        let head = self.methods.contains("HEAD");
        (self.host.specificity(), path, !self.methods.is_empty(), self.headers.len(), head)
    }

    /// The methods that it is for, where not all: of what may be had by GET, the head may be (RFC 9110 section 9.3.2).
    pub fn methods(&self) -> impl Iterator<Item = &str> {
        let head = self.methods.contains("GET").then_some("HEAD");
        self.methods
            .iter()
            .map(String::as_str)
            .filter(move |&method| method != "HEAD" || head.is_none())
            .chain(head)
    }

    /// Whether some request meets both, and neither is narrower.
    pub fn is_confusable(&self, other: &Self) -> bool {
        let methods = self.methods.is_empty() && other.methods.is_empty()
            || self.methods.intersection(&other.methods).next().is_some();
        let contradict =
            |(name, value): (&String, &String)| other.headers.get(name).is_some_and(|others| others != value);
        self.host == other.host
            && self.path == other.path
            && methods
            && self.headers.len() == other.headers.len()
            && !self.headers.iter().any(contradict)
    }
}
