//! Asks another service whether a request may come in.

use http::{HeaderName, Method, header, request::Parts};
use http_body_util::{BodyExt as _, Limited};

use super::{
    Case, Visit,
    body::{Upload, nothing},
    outgoing, upstream,
};
use crate::{
    model::desk::HeaderEdits,
    proxy::{
        auth::{Answered, Messenger, Passport},
        headers::{self, Asker},
        pools::Wish,
        request::Target,
        state::Service,
    },
};

/// Longest answer that is handed on, bytes.
const LONGEST: usize = 256 << 10;

/// Headers that are of the request's own body, or would have the answer be of another kind.
const OF_THE_REQUEST: [HeaderName; 11] = [
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::ACCEPT_ENCODING,
    header::RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
    header::IF_RANGE,
    header::TE,
];

/// Whether a header could say what is asked for, to one kind of service or another: that is for the desk to say.
fn tells_what(name: &HeaderName) -> bool {
    // Some servers take `_` for `-`.
    let name = name.as_str().replace('_', "-");
    name.starts_with("x-forwarded-") || name.starts_with("x-original-") || name.starts_with("x-rewrite-")
}

/// A request, about which others can be asked.
pub(super) struct Inquiry<'a> {
    pub(super) visit: &'a Visit,
    pub(super) service: &'a Service,
    pub(super) parts: &'a Parts,
    pub(super) target: &'a Target,
    pub(super) case: &'a Case,
}

impl Messenger for Inquiry<'_> {
    async fn ask(&self, pool: &str, path: &str) -> Option<Answered> {
        let worker = &self.visit.worker;
        let state = worker.shared.state.load_full();
        let pool = state.pools.get(pool)?;
        let timeouts = &self.service.order.desk.timeouts;
        let passport = Passport { withheld: self.service.telling().to_vec(), ..Passport::default() };
        // Whoever decides is told by what the route was found.
        let asker = self.visit.asker(self.target, self.case, &passport);
        let asker = Asker { said_host: asker.host, ..asker };
        let parts = outgoing(self.request(), path, None, &asker, &self.asked_for()).ok()?;
        let upload = Upload::default();
        let sent = upstream::send(
            worker,
            pool,
            self.visit.behalf(self.case, Wish::Anyone),
            timeouts,
            (parts, nothing()),
            &upload,
        );
        let (response, _hold) = sent.await.ok()?;
        let (mut parts, body) = response.into_parts();
        let body = tokio::time::timeout(timeouts.response, Limited::new(body, LONGEST).collect());
        let body = body.await.ok()?.ok()?.to_bytes();
        headers::remove_hop_by_hop(&mut parts.headers);
        for own in [header::CONNECTION, header::CONTENT_LENGTH, header::TRAILER] {
            parts.headers.remove(own);
        }
        Some(Answered { status: parts.status.as_u16(), headers: parts.headers, body })
    }
}

impl Inquiry<'_> {
    /// The request, as far as it says who asks.
    fn request(&self) -> Parts {
        let mut parts = http::Request::new(()).into_parts().0;
        parts.method = Method::GET;
        parts.headers.clone_from(&self.parts.headers);
        for name in OF_THE_REQUEST {
            parts.headers.remove(name);
        }
        let tells: Vec<_> = parts.headers.keys().filter(|name| tells_what(name)).cloned().collect();
        for name in tells {
            parts.headers.remove(name);
        }
        parts
    }

    /// What it was for.
    fn asked_for(&self) -> HeaderEdits {
        let Target { path, query, .. } = self.target;
        let whole = query.as_ref().map_or_else(|| path.clone(), |query| format!("{path}?{query}"));
        let set = [("x-forwarded-method", self.parts.method.to_string()), ("x-forwarded-uri", whole)];
        HeaderEdits {
            set: set.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            ..HeaderEdits::default()
        }
    }
}
