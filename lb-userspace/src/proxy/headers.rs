//! What of a request's and an answer's headers goes on, and what is added.

use std::{borrow::Cow, net::IpAddr};

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{self, AsHeaderName},
};

use super::{
    auth::Passport,
    chain::{self, Origin},
};
use crate::model::desk::HeaderEdits;

/// RFC 9110 section 7.6.1: of one connection alone.
const HOP_BY_HOP: [&str; 6] =
    ["connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"];

/// Headers that only the desk writes: from outside they could say anything.
const OURS: [&str; 5] = ["x-forwarded-proto", "x-forwarded-host", "x-request-id", "x-real-ip", "forwarded"];

pub(super) const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(super) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(super) const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Whether a header says where messages begin and end, or is of one connection: not to be edited.
pub fn is_of_framing(name: &str) -> bool {
    name == "content-length" || name == "trailer" || is_hop_by_hop(name)
}

fn is_hop_by_hop(name: &str) -> bool {
    HOP_BY_HOP.contains(&name) || name.starts_with("proxy-")
}

/// Takes out what is of one connection, and what `Connection` names. `TE: trailers` alone goes on, since
/// trailers do.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named = tokens(headers, &header::CONNECTION);
    let trailers = tokens(headers, &header::TE).iter().any(|token| token == "trailers");
    let doomed: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_hop_by_hop(name.as_str()) || named.iter().any(|named| named == name.as_str()))
        .cloned()
        .collect();
    for name in doomed {
        headers.remove(name);
    }
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
    }
}

/// Writes that the connection becomes a websocket: of one connection too, and here of both that there are.
pub fn become_websocket(headers: &mut HeaderMap) {
    headers.append(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

/// Makes one line of several `Cookie`s, as HTTP/2 may send them; a server of HTTP/1.1 may look at the first
/// alone (RFC 9113 section 8.2.3).
pub fn join_cookies(headers: &mut HeaderMap) {
    let mut all = headers.get_all(header::COOKIE).iter();
    if all.next().is_none() || all.next().is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    // What has come as values is one when it is put together.
    if let Ok(one) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(header::COOKIE, one);
    }
}

/// The items of a list, in all lines of a header.
pub(super) fn items<'h>(
    headers: &'h HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = &'h str> + use<'h> {
    let texts = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).map(str::trim).filter(|item| !item.is_empty())
}

/// The same in lower case.
pub(super) fn tokens(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    items(headers, name).map(str::to_ascii_lowercase).collect()
}

/// The one value of a header; of two, nobody can say which is meant.
pub(super) fn only(headers: &HeaderMap, name: impl AsHeaderName) -> Option<&HeaderValue> {
    let mut all = headers.get_all(name).iter();
    all.next().filter(|_| all.next().is_none())
}

/// The value of a cookie (RFC 6265 section 4.2), the first of its name.
pub fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let texts = headers.get_all(header::COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let mut pairs = texts.flat_map(|text| text.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Who asks, and how.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// Who called: the client, or the last of the proxies before the desk.
    pub peer: IpAddr,
    /// Whether that was over TLS.
    pub peer_tls: bool,
    /// What is believed of the chain before them, and how the client asked.
    pub origin: &'a Origin,
    /// The client asked over TLS.
    pub tls: bool,
    /// The host as the client wrote it.
    pub host: &'a str,
    /// The same, where a proxy has said another.
    pub said_host: &'a str,
    /// The request's number.
    pub id: &'a str,
    /// Who they are.
    pub passport: &'a Passport,
}

/// Whether only the desk says this, be it in some of `others`.
fn is_ours(name: &str, others: &[HeaderName]) -> bool {
    let name = dashed(name);
    OURS.contains(&name.as_ref())
        || name == FORWARDED_FOR.as_str()
        || others.iter().any(|other| dashed(other.as_str()) == name)
}

/// What of a client's trailers goes on: a server that takes them for headers (RFC 9110 section 6.5.1) must not find there
/// what they could not say in headers, nor what says how long messages are, whom they are for, or who asks. `others` are
/// more names that clients have no say in.
pub fn trailers(trailers: &mut HeaderMap, others: &[HeaderName]) {
    const NEVER: [HeaderName; 3] = [header::HOST, header::AUTHORIZATION, header::COOKIE];
    let doomed = trailers.keys().filter(|name| {
        is_of_framing(name.as_str()) || NEVER.contains(name) || is_ours(name.as_str(), others)
    });
    for name in doomed.cloned().collect::<Vec<_>>() {
        trailers.remove(name);
    }
}

/// Says to a backend who asks. A client's own word on it goes no further.
pub fn forward(headers: &mut HeaderMap, asker: &Asker<'_>) {
    let ours = |name: &&HeaderName| is_ours(name.as_str(), &asker.passport.withheld);
    let doomed: Vec<HeaderName> = headers.keys().filter(ours).cloned().collect();
    for name in doomed {
        headers.remove(name);
    }
    let origin = asker.origin;
    let chain = origin.before.iter().chain([&asker.peer]).map(|address| address.to_canonical().to_string());
    let chain = chain.collect::<Vec<_>>().join(", ");
    set(headers, FORWARDED_FOR, &chain);
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(if asker.tls { "https" } else { "http" }));
    set(headers, FORWARDED_HOST, asker.said_host);
    if let Some(elements) = &origin.elements {
        let said = chain::forwarded(elements, asker.peer, asker.host, asker.peer_tls);
        set(headers, header::FORWARDED, &said);
    }
    number(headers, asker.id);
    for (name, value) in &asker.passport.tells {
        headers.insert(name, value.clone());
    }
}

/// Some servers take `_` for `-`.
fn dashed(name: &str) -> Cow<'_, str> {
    if name.contains('_') { name.replace('_', "-").into() } else { name.into() }
}

/// Names of a request that a client has no say in, by a route with these changes and for somebody with this passport.
pub fn withheld(passport: &Passport, edits: &HeaderEdits) -> Vec<HeaderName> {
    let changed = edits.remove.iter().chain(edits.set.keys());
    let changed = changed.filter_map(|name| HeaderName::try_from(name).ok());
    passport.withheld.iter().cloned().chain(changed).collect()
}

/// What a route changes.
pub fn edit(headers: &mut HeaderMap, edits: &HeaderEdits) {
    for name in &edits.remove {
        headers.remove(name.as_str());
    }
    for (name, value) in &edits.set {
        if let Ok(name) = HeaderName::try_from(name) {
            set(headers, name, value);
        }
    }
    for (name, value) in &edits.add {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            headers.append(name, value);
        }
    }
}

/// Writes the request's number, by which operator and client can speak of it.
pub fn number(headers: &mut HeaderMap, id: &str) {
    set(headers, REQUEST_ID, id);
}

/// Only what can be a header is written; checked documents and parsed requests hold nothing else.
fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            map.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        map
    }

    fn lines(map: &HeaderMap) -> Vec<String> {
        let mut lines: Vec<_> =
            map.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        lines
    }

    #[test]
    fn what_is_of_one_connection_does_not_go_on() {
        let mut headers = map(&[
            ("connection", "keep-alive, X-Private"),
            ("connection", "close"),
            ("keep-alive", "timeout=5"),
            ("x-private", "1"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic eDp5"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("trailer", "x-sum"),
            ("accept", "*/*"),
        ]);
        remove_hop_by_hop(&mut headers);
        assert_eq!(lines(&headers), ["accept: */*", "trailer: x-sum"]);
        let mut headers = map(&[("te", "gzip;q=0.5, Trailers")]);
        remove_hop_by_hop(&mut headers);
        assert_eq!(lines(&headers), ["connection: te", "te: trailers"]);
    }

    #[test]
    fn cookies_are_one_line() {
        let mut headers = map(&[("cookie", "a=1; b=2"), ("accept", "*/*"), ("cookie", "c=3")]);
        join_cookies(&mut headers);
        assert_eq!(lines(&headers), ["accept: */*", "cookie: a=1; b=2; c=3"]);
        let mut headers = map(&[("cookie", "a=1")]);
        join_cookies(&mut headers);
        assert_eq!(lines(&headers), ["cookie: a=1"]);
    }

    #[test]
    fn a_client_cannot_speak_for_the_desk() {
        let mut headers = map(&[
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-for", "192.0.2.2, 192.0.2.3"),
            ("x-forwarded-proto", "gopher"),
            ("x_forwarded_proto", "gopher"),
            ("x_forwarded_for", "127.0.0.1"),
            ("x-forwarded-host", "evil.example"),
            ("x-request-id", "mine"),
            ("x-real-ip", "127.0.0.1"),
            ("forwarded", "for=127.0.0.1"),
            ("x-user", "root"),
            ("x_user", "root"),
            ("x-roles", "admin"),
            ("x_api_key", "a key"),
        ]);
        let peer = "::ffff:198.51.100.7".parse().unwrap();
        let passport = Passport {
            tells: vec![(HeaderName::from_static("x-user"), HeaderValue::from_static("anna"))],
            withheld: ["x-user", "x-roles", "x-api-key"].map(HeaderName::from_static).into(),
            user: None,
        };
        let passport = &passport;
        let origin = &Origin::itself(peer);
        let asker = Asker {
            peer,
            peer_tls: true,
            origin,
            tls: true,
            host: "shop.example:8443",
            said_host: "shop.example:8443",
            id: "7",
            passport,
        };
        forward(&mut headers, &asker);
        assert_eq!(
            lines(&headers),
            [
                "x-forwarded-for: 198.51.100.7",
                "x-forwarded-host: shop.example:8443",
                "x-forwarded-proto: https",
                "x-request-id: 7",
                "x-user: anna",
            ]
        );
        // What proxies say of it, who are believed, is another matter.
        let before = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let elements = Some(vec!["for=192.0.2.1".to_owned()]);
        let origin = &Origin { before, elements, ..origin.clone() };
        forward(&mut headers, &Asker { origin, said_host: "shop.example", ..asker });
        assert_eq!(headers["x-forwarded-for"], "192.0.2.1, 2001:db8::1, 198.51.100.7");
        assert_eq!(headers["x-forwarded-host"], "shop.example");
        let said = "for=192.0.2.1, for=198.51.100.7;host=\"shop.example:8443\";proto=https";
        assert_eq!(headers["forwarded"], said);
    }

    #[test]
    fn nor_in_trailers() {
        let mut headers = map(&[
            ("x-sum", "7"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x_request_id", "mine"),
            ("x-user", "root"),
            ("x_user", "root"),
            ("content-length", "5"),
            ("transfer-encoding", "chunked"),
            ("connection", "close"),
            ("host", "other.example"),
            ("authorization", "Basic eDp5"),
            ("cookie", "a=1"),
        ]);
        trailers(&mut headers, &[HeaderName::from_static("x-user")]);
        assert_eq!(lines(&headers), ["x-sum: 7"]);
    }

    #[test]
    fn edits_take_out_then_set_then_add() {
        let mut headers = map(&[("server", "x"), ("x-a", "1"), ("x-a", "2"), ("x-b", "1")]);
        let pair = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
        edit(
            &mut headers,
            &HeaderEdits {
                remove: ["server".to_owned()].into(),
                set: pair("x-a", "3"),
                add: pair("x-b", "2"),
            },
        );
        assert_eq!(lines(&headers), ["x-a: 3", "x-b: 1", "x-b: 2"]);
    }

    proptest! {
        /// Nothing that `Connection` names and nothing of one connection is left, whatever is sent.
        #[test]
        fn nothing_of_one_connection_is_left(
            names in prop::collection::vec("(te|upgrade|keep-alive|proxy-[a-c]|x-[a-c]|transfer-encoding)", 0..8),
            named in prop::collection::vec("(X-[a-cA-C]|close|, )", 0..4),
        ) {
            let mut headers = HeaderMap::new();
            for name in &names {
                headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("1"));
            }
            headers.append("connection", named.join(",").parse().unwrap());
            remove_hop_by_hop(&mut headers);
            for name in headers.keys() {
                prop_assert!(!is_hop_by_hop(name.as_str()), "{}", name);
                prop_assert!(!named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str())), "{}", name);
            }
        }
    }
}
