//! One GET on a connection of its own, no redirects followed.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Collected, Empty, Limited};
use hyper::{client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::ProbeError;

/// How much of an answer is looked through for what the body must contain.
const BODY_LIMIT: usize = 64 * 1024;

/// What is asked and what is wanted.
pub(super) struct Request<'a> {
    pub(super) path: &'a str,
    pub(super) host: Option<&'a str>,
    pub(super) status: &'a [(u16, u16)],
    pub(super) body: Option<&'a str>,
}

pub(super) async fn get<S>(stream: S, target: SocketAddr, wanted: &Request<'_>) -> Result<(), ProbeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let connection = tokio::spawn(connection);
    let outcome = exchange(&mut sender, target, wanted).await;
    // Whatever else the server would send is not wanted.
    connection.abort();
    outcome
}

async fn exchange(
    sender: &mut http1::SendRequest<Empty<Bytes>>,
    target: SocketAddr,
    wanted: &Request<'_>,
) -> Result<(), ProbeError> {
    let host = wanted.host.map_or_else(|| target.to_string(), ToOwned::to_owned);
    let mut response = sender.send_request(request(wanted.path, host)?).await.map_err(broken)?;
    let status = response.status().as_u16();
    if !wanted.status.iter().any(|&(low, high)| (low..=high).contains(&status)) {
        return Err(ProbeError::Status(status));
    }
    let Some(text) = wanted.body else { return Ok(()) };
    let mut seen = Vec::new();
    while let Some(frame) = response.body_mut().frame().await {
        if let Some(data) = frame.map_err(broken)?.data_ref() {
            seen.extend_from_slice(&data[..data.len().min(BODY_LIMIT - seen.len())]);
        }
        if contains(&seen, text.as_bytes()) {
            return Ok(());
        }
        if seen.len() == BODY_LIMIT {
            break;
        }
    }
    Err(ProbeError::Unexpected)
}

/// Status and body, whatever they are; of the body no more than is ever looked at.
pub(super) async fn fetch<S>(stream: S, target: SocketAddr, path: &str) -> Result<(u16, Bytes), ProbeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let connection = tokio::spawn(connection);
    let fetched = async {
        let response = sender.send_request(request(path, target.to_string())?).await.map_err(broken)?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), BODY_LIMIT).collect().await;
        Ok((status, body.map(Collected::to_bytes).unwrap_or_default()))
    };
    let outcome = fetched.await;
    connection.abort();
    outcome
}

fn request(path: &str, host: String) -> Result<hyper::Request<Empty<Bytes>>, ProbeError> {
    hyper::Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, concat!("lobby/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::new())
        .map_err(|error| ProbeError::Impossible(format!("the request cannot be made: {error}")))
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    text.is_empty() || bytes.windows(text.len()).any(|window| window == text)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn broken(error: hyper::Error) -> ProbeError {
    ProbeError::Broken(error.to_string())
}
