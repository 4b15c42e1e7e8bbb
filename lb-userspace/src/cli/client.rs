//! The command line's side of the API: one request on one connection to the daemon's socket.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::args::BPFFS;
use crate::{
    api::{SOCKET, view::Refusal},
    config::Complaint,
    daemon,
};

/// A request did not get what it wanted.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// Nobody listens.
    #[error("no lb daemon is running: nobody listens on {}; {}", .socket.display(), without_daemon(.left.as_deref()))]
    NotRunning {
        /// Where.
        socket: PathBuf,
        /// Where a data plane is pinned that the last one has left.
        left: Option<PathBuf>,
    },
    /// The socket is not for us.
    #[error("may not talk to the daemon on {}: permission denied; try again with sudo", .0.display())]
    Denied(PathBuf),
    /// The daemon says no, and why.
    #[error("{0}")]
    Refused(String),
    /// The daemon says that the request makes no sense.
    #[error("{0}")]
    Wrong(String),
    /// The daemon says no because the document would have mistakes.
    #[error("{error}")]
    Document {
        /// In words.
        error: String,
        /// Each by itself.
        complaints: Vec<Complaint>,
    },
    /// The conversation failed.
    #[error("the daemon on {} does not answer as it should: {why}; see its log", .socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        why: String,
    },
}

fn without_daemon(left: Option<&Path>) -> String {
    match left {
        None => "start one: `lb run --config FILE`".to_owned(),
        Some(bpffs) => format!(
            "packets are forwarded as the last one left it (pinned in {}), and nobody checks health: `lb run --config FILE` takes it over, `lb detach` takes it down",
            bpffs.display()
        ),
    }
}

/// Talks to the daemon of one run directory.
#[derive(Clone, Debug)]
pub(super) struct Client {
    run_dir: PathBuf,
    socket: PathBuf,
}

impl Client {
    /// A client for the daemon with that run directory.
    pub(super) fn new(run_dir: &Path) -> Self {
        Self { run_dir: run_dir.to_owned(), socket: run_dir.join(SOCKET) }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// When there is no daemon, or it refuses.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// Asks that something be done.
    ///
    /// # Errors
    /// When there is no daemon, or it refuses.
    pub(super) async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(error))?;
        self.request(method, path, body.into()).await
    }

    /// Where a data plane is pinned that no daemon looks after: where the last one of the run directory did, else in the
    /// `usual` BPF file system.
    pub(super) fn left(&self, usual: &Path) -> Option<PathBuf> {
        daemon::left(&self.run_dir, usual)
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning { socket: self.socket.clone(), left: self.left(BPFFS.as_ref()) }
            }
            std::io::ErrorKind::PermissionDenied => ClientError::Denied(self.socket.clone()),
            _ => self.broken(error),
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(error))?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "lb")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(error))?;
        let response = sender.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| self.broken(error))?.to_bytes();
        connection.abort();
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.broken(error));
        }
        let Refusal { error, complaints } = serde_json::from_slice(&body).unwrap_or_else(|_| Refusal {
            error: String::from_utf8_lossy(&body).into_owned(),
            complaints: Vec::new(),
        });
        Err(match status {
            StatusCode::UNPROCESSABLE_ENTITY => ClientError::Document { error, complaints },
            StatusCode::BAD_REQUEST => ClientError::Wrong(error),
            _ => ClientError::Refused(error),
        })
    }

    #[expect(clippy::needless_pass_by_value, reason = "for map_err")]
    fn broken(&self, why: impl ToString) -> ClientError {
        ClientError::Broken { socket: self.socket.clone(), why: why.to_string() }
    }
}
