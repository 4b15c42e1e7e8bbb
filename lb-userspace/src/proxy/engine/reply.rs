//! Answers of the desk's own, and what is written into others' heads.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, StatusCode, header};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};

use super::body::{Body, nothing};
use crate::{
    model::desk::Elsewhere,
    proxy::{auth::Answered, request::Target, voice::Trouble},
};

/// The answer to a HEAD: as long as it would be, and nothing of it (RFC 9110 section 9.3.2). Of HTTP/2 hyper does not see to
/// that.
pub(super) fn without_body(response: Response<Body>) -> Response<Body> {
    let (mut parts, body) = response.into_parts();
    if body.is_end_stream() {
        return Response::from_parts(parts, body);
    }
    if let Some(length) = body.size_hint().exact() {
        parts.headers.entry(header::CONTENT_LENGTH).or_insert(length.into());
    }
    Response::from_parts(parts, nothing())
}

/// The answer of who was asked whether somebody may come in.
pub(super) fn told(answered: &Answered) -> Response<Body> {
    let mut response = plain(answered.status, answered.body.clone());
    response.headers_mut().clone_from(&answered.headers);
    // It is for this client, now.
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// An answer that leads elsewhere.
///
/// # Errors
/// When nobody knows from where.
pub(super) fn redirect(status: u16, to: &Elsewhere, target: &Target) -> Result<Response<Body>, Trouble> {
    let here = match &target.query {
        Some(query) => format!("{}?{query}", target.path),
        None => target.path.clone(),
    };
    let location = match to {
        Elsewhere::Https if target.host.is_empty() => return Err(Trouble::Wrong("it has no Host")),
        Elsewhere::Https => format!("https://{}{here}", target.host),
        Elsewhere::Host(host) => format!("{host}{here}"),
        Elsewhere::Url(url) => url.clone(),
    };
    let mut response = plain(status, String::new());
    insert(&mut response, header::LOCATION, &location);
    Ok(response)
}

/// An answer with this body.
pub(super) fn plain(status: u16, text: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(text.into()).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

/// Only what can be a header's value is written, besides what there is of the name.
pub(super) fn append(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().append(name, value);
    }
}

/// Only what can be a header's value is written; a path that has been normalised can.
pub(super) fn insert(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}
