//! The control API: HTTP and JSON on a Unix socket that only its owner may use.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/snapshot` | everything below but connections, at one moment ([`view::Snapshot`]) |
//! | `GET /v1/status` | [`view::Status`] |
//! | `GET /v1/services`, `/v1/services/NAME` | [`view::Service`] |
//! | `GET /v1/pools`, `/v1/pools/NAME` | [`view::Pool`] |
//! | `GET /v1/backends?pool=NAME` | [`view::Backend`] |
//! | `GET /v1/connections?service=&backend=&client=&limit=&offset=` | [`view::Connections`] |
//! | `GET /v1/counters` | [`view::Counters`] |
//! | `GET /v1/desk` | [`view::Desk`], or `null` |
//! | `GET /v1/routes` | [`view::Route`] |
//! | `POST /v1/routes/explanations` | [`view::RouteQuestion`] to [`view::RouteExplanation`] |
//! | `GET /v1/document` | [`view::Text`] |
//! | `PUT /v1/document` | [`view::Replacement`] to [`view::Done`] |
//! | `POST /v1/edits` | [`request::Edits`] to [`view::Done`] |
//! | `POST /v1/pools/NAME/recheck` | everybody of the pool is asked now ([`view::Done`]) |
//! | `POST /v1/pools/NAME/promote/ADDRESS` | that one is the primary, if it says so too ([`view::Done`]) |
//! | `POST /v1/reload` | [`view::Done`] |
//! | `POST /v1/detach` | [`view::Done`] |
//!
//! A refusal is a status of 400 and above with a [`view::Refusal`]: 404 where there is no such thing,
//! 409 where the document has changed since the revision that was named, 422 where the document would
//! not check.

pub mod request;
pub mod view;

use std::{
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
};

use axum::{
    Json, Router,
    extract::{self, Query, State, rejection::JsonRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Deserialize;
use tokio::{net::UnixListener, sync::mpsc};
use tokio_util::sync::CancellationToken;

use request::{Edits, Promotion, Reply, Request, RequestError};
use view::{ConnectionFilter, Connections, Done, Refusal, Replacement, Snapshot, Text};

use crate::config::nearest;

/// The socket's name in the run directory.
pub const SOCKET: &str = "lb.sock";

/// The largest request: a document for tens of thousands of backends.
const BODY_LIMIT: usize = 16 << 20;

/// Listens on the run directory's socket, mode 0600 from the first moment on. One that a dead daemon
/// left is replaced: whoever calls this holds the lock of the run directory.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(run_dir: &Path) -> io::Result<UnixListener> {
    let path = run_dir.join(SOCKET);
    match std::fs::symlink_metadata(&path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(&path)?,
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is there and is no socket; move it away", path.display()),
            ));
        }
        Err(_) => {}
    }
    // Made under another name that nobody knows, so that nobody can connect before the mode is set.
    let fresh = run_dir.join(format!(".{SOCKET}.{}", std::process::id()));
    _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, &path)?;
    Ok(listener)
}

/// Serves until `stop`, then finishes what is under way.
///
/// # Errors
/// When the socket fails.
pub async fn serve(
    listener: UnixListener,
    daemon: mpsc::Sender<Request>,
    stop: CancellationToken,
) -> io::Result<()> {
    axum::serve(listener, router(daemon)).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// The routes; `daemon` answers.
pub fn router(daemon: mpsc::Sender<Request>) -> Router {
    Router::new()
        .route(
            "/v1/snapshot",
            get(|State(d): Daemon| async move { Ok::<_, Refused>(Json(snapshot(&d).await?)) }),
        )
        .route(
            "/v1/status",
            get(|State(d): Daemon| async move { Ok::<_, Refused>(Json(snapshot(&d).await?.status)) }),
        )
        .route(
            "/v1/services",
            get(|State(d): Daemon| async move { Ok::<_, Refused>(Json(snapshot(&d).await?.services)) }),
        )
        .route("/v1/services/{name}", get(service))
        .route(
            "/v1/pools",
            get(|State(d): Daemon| async move { Ok::<_, Refused>(Json(snapshot(&d).await?.pools)) }),
        )
        .route("/v1/pools/{name}", get(pool))
        .route("/v1/pools/{name}/recheck", post(recheck))
        .route("/v1/pools/{name}/promote/{address}", post(promote))
        .route("/v1/backends", get(backends))
        .route("/v1/connections", get(connections))
        .route(
            "/v1/counters",
            get(|State(d): Daemon| async move { Ok::<_, Refused>(Json(snapshot(&d).await?.counters)) }),
        )
        .route("/v1/explanations", post(explain))
        .route("/v1/explanations/frames", post(explain_frames))
        .route(
            "/v1/desk",
            get(|State(d): Daemon| async move { Ok::<_, Refused>(Json(snapshot(&d).await?.desk)) }),
        )
        .route(
            "/v1/routes",
            get(|State(d): Daemon| async move { Ok::<_, Refused>(Json(snapshot(&d).await?.routes)) }),
        )
        .route("/v1/routes/explanations", post(explain_route))
        .route("/v1/plans", post(foresee))
        .route("/v1/document", get(document).put(replace))
        .route("/v1/edits", post(edit))
        .route("/v1/reload", post(|State(d): Daemon| async move { done(&d, Request::Reload).await }))
        .route("/v1/detach", post(|State(d): Daemon| async move { done(&d, Request::Detach).await }))
        .fallback(|| async {
            Refused::new(StatusCode::NOT_FOUND, "there is no such thing; see `lb --help`".into())
        })
        .layer(extract::DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(daemon)
}

type Daemon = State<mpsc::Sender<Request>>;

/// An answer that says no.
struct Refused(StatusCode, Refusal);

impl Refused {
    fn new(status: StatusCode, error: String) -> Self {
        Self(status, Refusal { error, complaints: Vec::new() })
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<RequestError> for Refused {
    fn from(error: RequestError) -> Self {
        let status = match &error {
            RequestError::NotFound(_) => StatusCode::NOT_FOUND,
            RequestError::Conflict(_) => StatusCode::CONFLICT,
            RequestError::Document { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            RequestError::ReadOnly(_) => StatusCode::FORBIDDEN,
            RequestError::Wrong(_) => StatusCode::BAD_REQUEST,
            RequestError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            RequestError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        let text = error.to_string();
        match error {
            RequestError::Document { complaints, .. } => {
                Self(status, Refusal { error: text, complaints: complaints.0 })
            }
            _ => Self::new(status, text),
        }
    }
}

impl From<JsonRejection> for Refused {
    fn from(rejection: JsonRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

async fn ask<T>(
    daemon: &mpsc::Sender<Request>,
    request: impl FnOnce(Reply<T>) -> Request,
) -> Result<T, Refused> {
    let (reply, answer) = Reply::new();
    daemon.send(request(reply)).await.map_err(|_| RequestError::Stopping)?;
    Ok(answer.await.map_err(|_| RequestError::Stopping)??)
}

async fn snapshot(daemon: &mpsc::Sender<Request>) -> Result<Snapshot, Refused> {
    ask(daemon, Request::Snapshot).await
}

async fn done(
    daemon: &mpsc::Sender<Request>,
    request: impl FnOnce(Reply<Done>) -> Request,
) -> Result<Json<Done>, Refused> {
    Ok(Json(ask(daemon, request).await?))
}

/// There is none of that name: which was meant, or what shows all.
fn missing<'n>(kind: &str, name: &str, all: impl Iterator<Item = &'n str>) -> Refused {
    let near = match nearest(name, all) {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("see `lb {kind} list`"),
    };
    RequestError::NotFound(format!("there is no {kind} {name:?}; {near}")).into()
}

fn no_service(name: &str, services: &[view::Service]) -> Refused {
    missing("service", name, services.iter().map(|service| service.name.as_str()))
}

async fn service(
    State(daemon): Daemon,
    extract::Path(name): extract::Path<String>,
) -> Result<Json<view::Service>, Refused> {
    let mut services = snapshot(&daemon).await?.services;
    match services.iter().position(|service| service.name == name) {
        Some(at) => Ok(Json(services.swap_remove(at))),
        None => Err(no_service(&name, &services)),
    }
}

async fn pool(
    State(daemon): Daemon,
    extract::Path(name): extract::Path<String>,
) -> Result<Json<view::Pool>, Refused> {
    let mut pools = snapshot(&daemon).await?.pools;
    match pools.iter().position(|pool| pool.name == name) {
        Some(at) => Ok(Json(pools.swap_remove(at))),
        None => Err(missing("pool", &name, pools.iter().map(|pool| pool.name.as_str()))),
    }
}

async fn recheck(
    State(daemon): Daemon,
    extract::Path(name): extract::Path<String>,
) -> Result<Json<Done>, Refused> {
    done(&daemon, |reply| Request::Recheck(name, reply)).await
}

async fn promote(
    State(daemon): Daemon,
    extract::Path((pool, backend)): extract::Path<(String, String)>,
) -> Result<Json<Done>, Refused> {
    done(&daemon, |reply| Request::Promote(Promotion { pool, backend }, reply)).await
}

/// Which backends are wanted.
#[derive(Deserialize)]
struct BackendFilter {
    pool: Option<String>,
}

async fn backends(
    State(daemon): Daemon,
    Query(filter): Query<BackendFilter>,
) -> Result<Json<Vec<view::Backend>>, Refused> {
    let mut found = snapshot(&daemon).await?.backends;
    found.retain(|backend| filter.pool.as_ref().is_none_or(|pool| *pool == backend.pool));
    Ok(Json(found))
}

async fn connections(
    State(daemon): Daemon,
    Query(filter): Query<ConnectionFilter>,
) -> Result<Json<Connections>, Refused> {
    if let Some(name) = &filter.service {
        let services = snapshot(&daemon).await?.services;
        if !services.iter().any(|service| service.name == *name) {
            return Err(no_service(name, &services));
        }
    }
    Ok(Json(ask(&daemon, |reply| Request::Connections(filter, reply)).await?))
}

async fn explain(
    State(daemon): Daemon,
    body: Result<Json<view::Question>, JsonRejection>,
) -> Result<Json<view::Explanation>, Refused> {
    let Json(question) = body?;
    Ok(Json(ask(&daemon, |reply| Request::Explain(question, reply)).await?))
}

async fn explain_frames(
    State(daemon): Daemon,
    body: Result<Json<view::Frames>, JsonRejection>,
) -> Result<Json<Vec<view::Explanation>>, Refused> {
    let Json(frames) = body?;
    Ok(Json(ask(&daemon, |reply| Request::ExplainFrames(frames, reply)).await?))
}

async fn explain_route(
    State(daemon): Daemon,
    body: Result<Json<view::RouteQuestion>, JsonRejection>,
) -> Result<Json<Vec<view::RouteExplanation>>, Refused> {
    let Json(question) = body?;
    Ok(Json(ask(&daemon, |reply| Request::ExplainRoute(question, reply)).await?))
}

async fn foresee(
    State(daemon): Daemon,
    body: Result<Json<Replacement>, JsonRejection>,
) -> Result<Json<view::Foreseen>, Refused> {
    let Json(replacement) = body?;
    Ok(Json(ask(&daemon, |reply| Request::Foresee(replacement.text, reply)).await?))
}

async fn document(State(daemon): Daemon) -> Result<Json<Text>, Refused> {
    Ok(Json(ask(&daemon, Request::Document).await?))
}

async fn replace(
    State(daemon): Daemon,
    body: Result<Json<Replacement>, JsonRejection>,
) -> Result<Json<Done>, Refused> {
    let Json(replacement) = body?;
    done(&daemon, |reply| Request::Replace(replacement, reply)).await
}

async fn edit(
    State(daemon): Daemon,
    body: Result<Json<Edits>, JsonRejection>,
) -> Result<Json<Done>, Refused> {
    let Json(edits) = body?;
    done(&daemon, |reply| Request::Edit(edits, reply)).await
}
