//! What the API says and the command line shows: plain data, the same types on both sides.

mod desk;

use serde::{Deserialize, Serialize};

use crate::config::Complaint;
pub use desk::{
    Answers, Certificate, Considered, Denied, Desk, Ejections, Latencies, Route, RouteExplanation,
    RouteQuestion,
};

/// Everything but connections, at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The daemon and its document.
    pub status: Status,
    /// Services, by name.
    pub services: Vec<Service>,
    /// Pools, by name.
    pub pools: Vec<Pool>,
    /// Backends, by pool, in the document's order.
    pub backends: Vec<Backend>,
    /// Counters.
    pub counters: Counters,
    /// The reception desk; `null` where no service asks for it.
    #[serde(default)]
    pub desk: Option<Desk>,
    /// Its routes, by service, the narrowest first.
    #[serde(default)]
    pub routes: Vec<Route>,
}

/// The daemon and its document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// The document.
    pub document: Document,
    /// Interfaces that the program is attached to.
    pub interfaces: Vec<Interface>,
    /// What needs somebody's attention now.
    pub alarms: Vec<String>,
    /// Number of services.
    pub services: usize,
    /// Backends that get new connections.
    pub backends_usable: usize,
    /// Backends.
    pub backends: usize,
    /// Flows in the table now.
    pub flows: u32,
    /// Flows that fit.
    pub flow_capacity: u32,
}

/// The document in force, and what became of the last attempt to change it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document {
    /// Its file.
    pub path: String,
    /// Name of exactly the text in force.
    pub revision: String,
    /// Why edits are refused; `null` where they are not.
    pub read_only: Option<String>,
    /// When it came into force, seconds since the epoch.
    pub since: u64,
    /// What is odd about it.
    pub warnings: Vec<String>,
    /// What is wrong with the file as it is now; the document in force is an older one then.
    pub refused: Option<String>,
    /// Times that a document came into force.
    pub reloads: u64,
    /// Times that one was refused.
    pub refusals: u64,
}

/// An interface that the program is attached to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// "native", "generic" or "none".
    pub mode: String,
    /// Up, with a carrier.
    pub up: bool,
    /// Largest IP packet, bytes.
    pub mtu: u32,
}

/// A service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Where it listens.
    pub listen: String,
    /// Its pool.
    pub pool: String,
    /// How a backend is chosen.
    pub scheduler: String,
    /// How packets get there.
    pub forward: String,
    /// Networks that may come in; empty: all.
    pub allow: Vec<String>,
    /// Networks that may not.
    pub deny: Vec<String>,
    /// Backends that get new connections.
    pub usable: usize,
    /// Backends of its pool.
    pub backends: usize,
    /// Which of them it wants: "primary" or "replica"; `null`: any.
    pub role: Option<String>,
    /// When connections are written down: "changes", "always" or "never"; `null` where all are.
    pub track: Option<String>,
    /// How far the slots of its ring are; `null` where nothing is remembered of them.
    pub slots: Option<Slots>,
    /// Connections that were cut since the daemon started: their server was not to have them any more.
    #[serde(default)]
    pub cut: u64,
    /// What passed.
    pub traffic: Traffic,
}

/// How far the slots of a ring are whose connections are not all written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// All of them.
    pub total: u32,
    /// Nothing is looked up of their connections.
    pub settled: u32,
    /// They have changed hands: connections from before are written down as they show themselves.
    pub moving: u32,
    /// They have, and a quiet time has passed: only what is written down goes elsewhere.
    pub fading: u32,
    /// Every connection is written down, and none goes elsewhere.
    pub tracked: u32,
    /// Seconds since a slot that is moving or fading began to; the longest.
    pub since_seconds: Option<u64>,
}

/// A pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pool {
    /// Name.
    pub name: String,
    /// Its health check in words; "none".
    pub health: String,
    /// What becomes of an unhealthy backend's connections.
    pub on_unhealthy: String,
    /// What happens when all fail at once.
    pub panic: String,
    /// Services that use it.
    pub services: Vec<String>,
    /// Backends that get new connections.
    pub usable: usize,
    /// Backends.
    pub backends: usize,
    /// All of its backends fail, and the last set is kept in use.
    pub panicking: bool,
    /// Who is what, where its health check tells; else `null`.
    pub cluster: Option<Cluster>,
}

/// Servers of which one takes writes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cluster {
    /// Who gets new connections that write; `null`: nobody.
    pub primary: Option<String>,
    /// The timeline that is followed, or was last.
    pub timeline: Option<u32>,
    /// Seconds since that last changed.
    pub since_seconds: u64,
    /// How often it has changed since the daemon started.
    pub changes: u64,
    /// Clients that call while nobody gets writes have to wait, rather than be refused.
    #[serde(default)]
    pub holds: bool,
    /// The whole decision.
    pub why: String,
    /// What speaks against there being one primary.
    pub doubt: Option<String>,
    /// Each server, in the document's order.
    pub servers: Vec<Server>,
}

/// What a server of a cluster says of itself, and what follows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Server {
    /// Its address.
    pub address: String,
    /// "primary", "replica" or "neither", by its last answer; `null`: it has never answered.
    pub role: Option<String>,
    /// It has answered when it was last asked; else its role is what it said before.
    pub answers: bool,
    /// A primary that is set to refuse writes.
    pub read_only: bool,
    /// The timeline that it is on.
    pub timeline: Option<u32>,
    /// Bytes of the primary's log that it has not replayed.
    pub lag_bytes: Option<u64>,
    /// For how long what the primary wrote has been missing.
    pub lag_seconds: Option<f64>,
    /// Seconds since it last changed its role.
    pub since_seconds: Option<u64>,
    /// It gets new connections that write.
    pub written: bool,
    /// It gets new connections that read.
    pub read: bool,
    /// It says that it is the primary, and gets nothing, since another one is.
    pub fenced: bool,
}

/// A backend of a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Backend {
    /// Its pool.
    pub pool: String,
    /// Its address.
    pub address: String,
    /// "starting", "healthy", "unhealthy", "draining", "drained" or "disabled".
    pub state: String,
    /// It gets new connections.
    pub usable: bool,
    /// Its share.
    pub weight: u16,
    /// How much of that counts while it starts slowly; else 100.
    pub share_percent: u16,
    /// When a drain ends by force, seconds since the epoch.
    pub deadline: Option<u64>,
    /// What its last probe said, if it failed.
    pub failure: Option<String>,
    /// How long its last successful probe took, milliseconds.
    pub latency_ms: Option<f64>,
    /// The way there: "02:00:00:00:00:02 on eth0".
    pub next_hop: Option<String>,
    /// Why there is no way.
    pub no_next_hop: Option<String>,
    /// What passed, in all its services.
    pub traffic: Traffic,
    /// Requests that the desk has with it, among them websockets and connections that are handed on; `null` where it has none of the
    /// desk.
    #[serde(default)]
    pub requests: Option<u64>,
}

/// What passed between backends and their clients, since the tables were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets to backends.
    pub packets_in: u64,
    /// Bytes to backends.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// New flows.
    pub flows: u64,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.packets_in += other.packets_in;
        self.bytes_in += other.bytes_in;
        self.packets_out += other.packets_out;
        self.bytes_out += other.bytes_out;
        self.flows += other.flows;
    }
}

/// Packets by what became of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Name and number, in the order of the program's counters.
    pub verdicts: Vec<Verdict>,
    /// What happened to records of connections, and how often; the packets that did it are among the verdicts.
    pub records: Vec<Happened>,
}

/// One kind of event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Happened {
    /// Its name.
    pub name: String,
    /// How often.
    pub times: u64,
}

/// One counter.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// Its name.
    pub name: String,
    /// Packets.
    pub packets: u64,
}

/// Some of the connections.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Connections {
    /// They.
    pub connections: Vec<Connection>,
    /// How many there are that match, shown or not.
    pub total: u64,
}

/// A connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connection {
    /// Its service.
    pub service: String,
    /// "tcp" or "udp".
    pub protocol: String,
    /// Who called.
    pub client: String,
    /// What was called.
    pub called: String,
    /// What the backend sees as its peer; `null`: the client itself.
    pub source: Option<String>,
    /// Who answers.
    pub backend: String,
    /// "half-open", "established", "closing", "closed" or "udp".
    pub state: String,
    /// Milliseconds since the last packet.
    pub idle_ms: u64,
}

/// Which connections are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionFilter {
    /// Only of this service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Only to this backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Only from this client address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// At most so many; 100 where not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Leaves out so many of the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<usize>,
}

/// What a document would change, were it put in force now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Foreseen {
    /// What would be done, in order, in words.
    pub operations: Vec<String>,
    /// Services of before and after, by where they listen.
    pub services: Vec<ForeseenService>,
    /// What would change at the desk, in words.
    #[serde(default)]
    pub desk: Vec<String>,
    /// What is odd about the document.
    #[serde(default)]
    pub warnings: Vec<Complaint>,
}

/// What would become of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForeseenService {
    /// Its name; where that changes, the later one.
    #[serde(default)]
    pub service: String,
    /// Where it listens.
    pub listen: String,
    /// "new", "removed", "changed" or "same": its ring, its mode and its firewall.
    pub change: String,
    /// Slots of its ring afterwards.
    pub slots: u32,
    /// Those that would lead new connections to another backend than now.
    pub slots_moved: u32,
    /// The part of new connections that would, 0 to 1; also where the ring changes its size. Nothing of round robin, where
    /// connections have no slot.
    pub share_moved: f64,
    /// Connections that are written down now.
    pub connections: u64,
    /// Those of them that would be reset, since their backend goes.
    pub connections_reset: u64,
}

/// A packet that somebody asks about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Who sends it: address and port.
    pub client: String,
    /// Whom: address and port.
    pub called: String,
    /// "tcp" or "udp".
    pub protocol: String,
    /// Of TCP: "syn", "ack", "fin" or "rst".
    pub flags: String,
    /// Of TCP: its sequence number.
    #[serde(default)]
    pub sequence: u32,
}

/// Packets that somebody asks about, one after the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frames {
    /// Ethernet frames, in hexadecimal.
    pub frames: Vec<String>,
}

/// What becomes of a packet, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// As the counters name it.
    pub verdict: String,
    /// What was looked at, in order.
    pub steps: Vec<Step>,
}

/// One look, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// At what: "service", "firewall", "slot" and so on.
    pub what: String,
    /// In words.
    pub detail: String,
}

/// The document's text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Text {
    /// The text.
    pub text: String,
    /// Its revision.
    pub revision: String,
}

/// A new document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Replacement {
    /// Its text.
    pub text: String,
    /// The revision that it is to replace; where another is in the file by now, it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// What a change did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// The revision in force now.
    pub revision: String,
    /// In words.
    pub message: String,
    /// What is odd about the document.
    pub warnings: Vec<String>,
}

/// Why a request was refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// In words, with the remedy.
    pub error: String,
    /// What is wrong with a document, each by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub complaints: Vec<Complaint>,
}
