//! What is looked at of a request before anything is decided by it: everything that could be understood in
//! two ways, by us and by who is behind us, is refused.

use http::{HeaderMap, Method, Version, header, request::Parts};

use super::{
    headers::{only, tokens},
    path,
    route::host_name,
    voice::Trouble,
};

/// A body longer than this is not taken.
pub const BODY_LIMIT: u64 = 1 << 30;

/// More headers than these are not taken: as many as HTTP/1.1 may have by hyper's own count, so that a server gets no more by
/// HTTP/2 than by that.
const HEADERS_MOST: usize = 100;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The host's name; empty where HTTP/1.0 names none.
    pub host: String,
    /// The host as the client wrote it, with its port.
    pub authority: String,
    /// The path, normalised.
    pub path: String,
    /// What is behind the question mark.
    pub query: Option<String>,
    /// The connection is to become a websocket.
    pub websocket: bool,
}

/// What a request asks for, or why it is refused.
///
/// # Errors
/// When it is not understood in one way only, or asks for what the desk does not do.
pub fn target(parts: &Parts) -> Result<Target, Trouble> {
    // RFC 9110 sections 9.3.6 and 9.3.8: a tunnel, and an echo of headers with their secrets.
    if parts.method == Method::CONNECT {
        return Err(Trouble::Unsupported("tunnels (CONNECT)"));
    }
    if parts.method == Method::TRACE {
        return Err(Trouble::Unsupported("traces (TRACE)"));
    }
    number(&parts.headers)?;
    framing(&parts.headers)?;
    let authority = authority(parts)?;
    let host = match authority.as_str() {
        "" => String::new(),
        named => host_name(named).ok_or(Trouble::Wrong("its Host is no name"))?,
    };
    let path = path::normalise(parts.uri.path()).map_err(|why| match why {
        path::PathError::Relative => Trouble::Wrong("its path does not begin with /"),
        path::PathError::Percent => Trouble::Wrong("a percent sign in its path has no two digits behind it"),
        path::PathError::Slash => Trouble::Wrong("its path has a backslash or an encoded slash"),
        path::PathError::Character => Trouble::Wrong("its path has a character that does not belong there"),
        path::PathError::DotParameters => Trouble::Wrong("its path has dots with parameters"),
        path::PathError::Outside => Trouble::Wrong("its path leads out of the root"),
    })?;
    let query = parts.uri.query().map(str::to_owned);
    expectations(&parts.headers)?;
    let websocket = websocket(parts)?;
    Ok(Target { host, authority, path, query, websocket })
}

/// RFC 9112 section 3.2: one `Host`, and the same as in the target where that names one too (of HTTP/2
/// `:authority`, which stands for it).
fn authority(parts: &Parts) -> Result<String, Trouble> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => Some(host.to_str().map_err(|_| Trouble::Wrong("its Host is no name"))?),
        (None, _) if parts.version == Version::HTTP_10 => None,
        // RFC 9113 section 8.3.1.
        (None, _) if parts.version == Version::HTTP_2 && parts.uri.authority().is_some() => None,
        (None, _) => return Err(Trouble::Wrong("it has no Host")),
        (Some(_), Some(_)) => return Err(Trouble::Wrong("it has more than one Host")),
    };
    let named = parts.uri.authority().map(http::uri::Authority::as_str);
    match (host, named) {
        (Some(host), Some(named)) if !host.eq_ignore_ascii_case(named) => {
            Err(Trouble::Wrong("its target names another host than its Host"))
        }
        (Some(host), _) => Ok(host.to_owned()),
        (None, Some(named)) => Ok(named.to_owned()),
        (None, None) => Ok(String::new()),
    }
}

/// Cookies that come one by one are one header (RFC 9113 section 8.2.3).
fn number(headers: &HeaderMap) -> Result<(), Trouble> {
    let more_cookies = || headers.get_all(header::COOKIE).iter().skip(1).count();
    match headers.len() > HEADERS_MOST && headers.len() - more_cookies() > HEADERS_MOST {
        true => Err(Trouble::TooMany),
        false => Ok(()),
    }
}

/// RFC 9112 section 6.3: what says twice how long it is, is not believed at all.
fn framing(headers: &HeaderMap) -> Result<(), Trouble> {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let length = lengths.next();
    if lengths.next().is_some() {
        return Err(Trouble::Wrong("it says its length more than once"));
    }
    if length.is_some() && headers.contains_key(header::TRANSFER_ENCODING) {
        return Err(Trouble::Wrong("it says its length in two ways"));
    }
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        let chunked = coding.as_bytes().eq_ignore_ascii_case(b"chunked");
        if !chunked || codings.next().is_some() {
            return Err(Trouble::Unsupported("transfer codings other than chunked"));
        }
    }
    // Digits alone (RFC 9110 section 8.6): Rust's own numbers may have a sign.
    let digits =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok());
    let length = length.map(|length| length.to_str().ok().and_then(digits).flatten().ok_or(()));
    match length {
        Some(Ok(length)) if length > BODY_LIMIT => Err(Trouble::TooLarge),
        Some(Err(_)) => Err(Trouble::Wrong("its length is no number")),
        _ => Ok(()),
    }
}

/// RFC 9110 section 10.1.1.
fn expectations(headers: &HeaderMap) -> Result<(), Trouble> {
    let known = |value: &http::HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"100-continue");
    if headers.get_all(header::EXPECT).iter().all(known) { Ok(()) } else { Err(Trouble::Expectation) }
}

/// Whether the connection is to become a websocket (RFC 6455 section 4.2.1). Any other upgrade is one that a
/// client can do without, and left out (RFC 9110 section 7.8).
fn websocket(parts: &Parts) -> Result<bool, Trouble> {
    let headers = &parts.headers;
    let lists = |name, wanted: &str| tokens(headers, &name).iter().any(|token| token == wanted);
    if !lists(header::UPGRADE, "websocket") {
        return Ok(false);
    }
    let one = |name| only(headers, &name).and_then(|value| value.to_str().ok());
    if parts.method != Method::GET || parts.version != Version::HTTP_11 {
        return Err(Trouble::Wrong("a websocket begins with a GET of HTTP/1.1"));
    }
    if !lists(header::CONNECTION, "upgrade") {
        return Err(Trouble::Wrong("it asks for a websocket without Connection: upgrade"));
    }
    // What came after the head would be a body to one and frames to another.
    if headers.contains_key(header::TRANSFER_ENCODING)
        || headers.get(header::CONTENT_LENGTH).is_some_and(|length| length != "0")
    {
        return Err(Trouble::Wrong("it asks for a websocket and has a body"));
    }
    match one(header::SEC_WEBSOCKET_VERSION) {
        Some("13") => {}
        Some(_) => return Err(Trouble::WebsocketVersion),
        None => return Err(Trouble::Wrong("it does not say one version of its websocket")),
    }
    // 16 bytes in base64.
    let is_key = |key: &str| {
        let digits = key.strip_suffix("==").unwrap_or_default();
        digits.len() == 22 && digits.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/')
    };
    if !one(header::SEC_WEBSOCKET_KEY).is_some_and(is_key) {
        return Err(Trouble::Wrong("the key of its websocket is none"));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Target, Trouble> {
        let mut request = http::Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        target(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn a_request_is_for_one_host_and_one_path() {
        let found = asked("GET", "/a/%2e%2e/b?x=/../y", &[("host", "Shop.Example:8443")]).unwrap();
        assert_eq!(
            found,
            Target {
                host: "shop.example".into(),
                authority: "Shop.Example:8443".into(),
                path: "/b".into(),
                query: Some("x=/../y".into()),
                websocket: false,
            }
        );
        let found = asked("GET", "http://shop.example/b", &[("host", "SHOP.example")]).unwrap();
        assert_eq!((found.host.as_str(), found.path.as_str()), ("shop.example", "/b"));
    }

    #[test]
    fn of_http2_the_authority_stands_for_the_host() {
        let asked = |uri: &str, headers: &[(&str, &str)]| {
            let mut request = http::Request::builder().uri(uri).version(Version::HTTP_2);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            target(&request.body(()).unwrap().into_parts().0).map(|target| target.authority)
        };
        assert_eq!(asked("https://shop.example/", &[]), Ok("shop.example".into()));
        assert_eq!(asked("/", &[("host", "shop.example")]), Ok("shop.example".into()));
        assert!(matches!(asked("/", &[]), Err(Trouble::Wrong(_))));
        assert!(matches!(
            asked("https://shop.example/", &[("host", "other.example")]),
            Err(Trouble::Wrong(_))
        ));
    }

    #[test]
    fn what_could_be_understood_in_two_ways_is_refused() {
        let host = ("host", "shop.example");
        for (method, uri, headers) in [
            ("GET", "/", &[][..]),
            ("GET", "/", &[host, host]),
            ("GET", "/", &[host, ("host", "other.example")]),
            ("GET", "/", &[("host", "shop.example/x")]),
            ("GET", "/", &[("host", "user@shop.example")]),
            ("GET", "http://other.example/", &[host]),
            ("GET", "http://user@shop.example/", &[host]),
            ("GET", "*", &[host]),
            ("POST", "/", &[host, ("content-length", "1"), ("content-length", "1")]),
            ("POST", "/", &[host, ("content-length", "1"), ("transfer-encoding", "chunked")]),
            ("POST", "/", &[host, ("content-length", "+1")]),
            ("GET", "/x/..%2fadmin", &[host]),
        ] {
            let found = asked(method, uri, headers);
            assert!(matches!(found, Err(Trouble::Wrong(_))), "{method} {uri} {headers:?}: {found:?}");
        }
    }

    #[test]
    fn what_is_not_done_here_is_said() {
        let host = ("host", "shop.example");
        let unsupported = |found| matches!(found, Err(Trouble::Unsupported(_)));
        assert!(unsupported(asked("CONNECT", "shop.example:443", &[host])));
        assert!(unsupported(asked("TRACE", "/", &[host])));
        assert!(unsupported(asked("POST", "/", &[host, ("transfer-encoding", "gzip, chunked")])));
        assert_eq!(asked("POST", "/", &[host, ("content-length", "2000000000")]), Err(Trouble::TooLarge));
        let with = |name, times| [vec![host], vec![(name, "1"); times]].concat();
        assert!(asked("GET", "/", &with("x", 99)).is_ok() && asked("GET", "/", &with("cookie", 500)).is_ok());
        assert_eq!(asked("GET", "/", &with("x", 100)), Err(Trouble::TooMany));
        assert_eq!(asked("PUT", "/", &[host, ("expect", "200-ok")]), Err(Trouble::Expectation));
        assert!(asked("PUT", "/", &[host, ("expect", "100-Continue")]).is_ok());
        // HTTP/2 is not for those who ask so; they get HTTP/1.1.
        assert!(
            asked("GET", "/", &[host, ("upgrade", "h2c"), ("http2-settings", "AAMAAABkAARAAAAAAAIAAAAA")])
                .is_ok()
        );
    }

    #[test]
    fn a_websocket_is_asked_for_in_one_way() {
        let good = [
            ("host", "shop.example"),
            ("upgrade", "foo, WebSocket"),
            ("connection", "keep-alive, Upgrade"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        assert_eq!(asked("GET", "/", &good).map(|target| target.websocket), Ok(true));
        let mut empty = good.to_vec();
        empty.push(("content-length", "0"));
        assert_eq!(asked("GET", "/", &empty).map(|target| target.websocket), Ok(true));
        assert!(matches!(asked("POST", "/", &good), Err(Trouble::Wrong(_))));
        let with = |name: &'static str, value: Option<&'static str>| {
            let mut headers: Vec<_> = good.iter().copied().filter(|(other, _)| *other != name).collect();
            headers.extend(value.map(|value| (name, value)));
            asked("GET", "/", &headers)
        };
        assert_eq!(with("upgrade", Some("h2c")).map(|target| target.websocket), Ok(false));
        assert_eq!(with("sec-websocket-version", Some("8")), Err(Trouble::WebsocketVersion));
        for (name, value) in [
            ("connection", None),
            ("connection", Some("close")),
            ("content-length", Some("5")),
            ("transfer-encoding", Some("chunked")),
            ("sec-websocket-version", None),
            ("sec-websocket-key", None),
            ("sec-websocket-key", Some("dGhlIHNhbXBsZSBub25jZQ")),
            ("sec-websocket-key", Some("dGhlIHNhbXBsZSBub25jZ-==")),
        ] {
            assert!(matches!(with(name, value), Err(Trouble::Wrong(_))), "{name}: {value:?}");
        }
        let mut twice = good.to_vec();
        twice.push(good[4]);
        assert!(matches!(asked("GET", "/", &twice), Err(Trouble::Wrong(_))));
    }
}
