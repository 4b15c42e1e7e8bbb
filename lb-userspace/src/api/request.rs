//! What the API asks of the daemon: messages, each with a place for the answer.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::view::{
    ConnectionFilter, Connections, Done, Explanation, Foreseen, Frames, Question, Replacement,
    RouteExplanation, RouteQuestion, Snapshot, Text,
};
use crate::config::Complaints;

/// Something that somebody wants of the daemon.
#[derive(Debug)]
pub enum Request {
    /// How everything is.
    Snapshot(Reply<Snapshot>),
    /// Some connections.
    Connections(ConnectionFilter, Reply<Connections>),
    /// What would become of a packet.
    Explain(Question, Reply<Explanation>),
    /// What would become of packets that come one after the other.
    ExplainFrames(Frames, Reply<Vec<Explanation>>),
    /// Which way a request would go at the desk.
    ExplainRoute(RouteQuestion, Reply<Vec<RouteExplanation>>),
    /// What a document with this text would change.
    Foresee(String, Reply<Foreseen>),
    /// The document's text, as it is in the file.
    Document(Reply<Text>),
    /// Change the document.
    Edit(Edits, Reply<Done>),
    /// Put another in its place.
    Replace(Replacement, Reply<Done>),
    /// Read the file again.
    Reload(Reply<Done>),
    /// Ask everybody of a pool now.
    Recheck(String, Reply<Done>),
    /// Somebody says who the primary of a pool is.
    Promote(Promotion, Reply<Done>),
    /// Take everything down and end.
    Detach(Reply<Done>),
}

/// A change of the document. Addresses are written as in the document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Change {
    /// A new service.
    AddService {
        /// Its name.
        name: String,
        /// Where it listens.
        listen: String,
        /// Its pool.
        pool: String,
        /// "maglev", "round-robin" or "source".
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scheduler: Option<String>,
        /// Networks that may come in.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        allow: Vec<String>,
        /// Networks that may not.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        deny: Vec<String>,
    },
    /// A service less.
    RemoveService {
        /// Its name.
        name: String,
    },
    /// A new pool.
    AddPool {
        /// Its name.
        name: String,
        /// Its backends.
        #[serde(default)]
        backends: Vec<String>,
        /// Check health by a TCP connection.
        #[serde(default)]
        tcp: bool,
        /// Check health by a GET of this path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        http: Option<String>,
        /// From one check to the next: "2s".
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interval: Option<String>,
    },
    /// A pool less.
    RemovePool {
        /// Its name.
        name: String,
    },
    /// A new backend.
    AddBackend {
        /// Its pool.
        pool: String,
        /// Its address.
        address: String,
        /// Its share.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        weight: Option<u16>,
    },
    /// A backend less.
    RemoveBackend {
        /// Its pool.
        pool: String,
        /// Its address.
        address: String,
    },
    /// No new connections for a backend.
    DrainBackend {
        /// Its pool.
        pool: String,
        /// Its address.
        address: String,
        /// When what is left is reset, seconds since the epoch.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline: Option<u64>,
    },
    /// A backend is used again.
    ResumeBackend {
        /// Its pool.
        pool: String,
        /// Its address.
        address: String,
    },
    /// Another share for a backend.
    WeighBackend {
        /// Its pool.
        pool: String,
        /// Its address.
        address: String,
        /// The share, 0 to 1000.
        weight: u16,
    },
    /// No connections at all for a backend.
    DisableBackend {
        /// Its pool.
        pool: String,
        /// Its address.
        address: String,
    },
}

/// Changes of the document, all or none of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Edits {
    /// The changes, in order.
    pub changes: Vec<Change>,
    /// The revision that they were thought out for; where another is in the file by now, they are
    /// refused. Without it they are applied to whatever is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// Who is said to be the primary of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promotion {
    /// The pool.
    pub pool: String,
    /// The backend, as in the document.
    pub backend: String,
}

/// Why the daemon does not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No such thing.
    #[error("{0}")]
    NotFound(String),
    /// Somebody else was faster.
    #[error("the document has changed since: it is at revision {0} now; look at it and try again")]
    Conflict(String),
    /// The document would not check.
    #[error("the document would not be right, so nothing was changed:\n{}", .complaints.of_file(file))]
    Document {
        /// The file that it was to be in.
        file: PathBuf,
        /// All that is wrong with it.
        complaints: Complaints,
    },
    /// The document is not to be written.
    #[error("{0}")]
    ReadOnly(String),
    /// The request makes no sense.
    #[error("{0}")]
    Wrong(String),
    /// It was tried and did not work.
    #[error("{0}")]
    Failed(String),
    /// The daemon is about to end.
    #[error("the daemon is about to end")]
    Stopping,
}

/// Where an answer goes.
#[derive(Debug)]
pub struct Reply<T>(oneshot::Sender<Result<T, RequestError>>);

impl<T> Reply<T> {
    /// The place, and where the answer comes out.
    pub fn new() -> (Self, oneshot::Receiver<Result<T, RequestError>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(sender), receiver)
    }

    /// Answers. Who asked may have gone by now.
    pub fn send(self, answer: Result<T, RequestError>) {
        _ = self.0.send(answer);
    }
}

/// Requests on their way to the daemon: few, since the daemon is quick.
pub fn channel() -> (mpsc::Sender<Request>, mpsc::Receiver<Request>) {
    mpsc::channel(64)
}
