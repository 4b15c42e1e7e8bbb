//! What must hold of the reception desk's rules for any bytes whatever: coverage-guided fuzzing looks for bytes for which it does
//! not (`cargo xtask fuzz`), and the test `fuzz` tries some that are random in each run of the tests.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use http::{HeaderMap, HeaderName, HeaderValue};
use lb_userspace::{
    model::{
        desk::{Action, Condition, HeaderEdits, HostPattern, PathPattern, Route},
        guard::Guard,
    },
    proxy::{
        auth::Passport,
        chain::Origin,
        headers::{self, Asker},
        path,
        route::{Asked, Found, Table, host_name, miss},
    },
};

/// A path that is taken is in a form that nobody can read in another way, and what is put in place of its beginning leaves the
/// rest as it was. `data`: a path, and behind a line's end a prefix.
pub fn path(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (asked, prefix) = text.split_once('\n').unwrap_or((&text, "/"));
    let Ok(normal) = path::normalise(asked) else { return };
    assert_eq!(path::normalise(&normal).as_ref(), Ok(&normal), "{asked:?}");
    assert!(normal.starts_with('/') && !normal.contains("//") && !normal.contains('\\'), "{asked:?}");
    assert!(normal.bytes().all(|byte| byte.is_ascii_graphic()), "{asked:?}: {normal:?}");
    for segment in normal.split('/') {
        // What some servers take off before they look.
        let bare = segment.split(';').next();
        assert!(!matches!(bare, Some("." | "..")), "{asked:?}: {normal:?}");
    }
    for hidden in ["%2F", "%5C", "%2E", "%00", "%0A", "%0D"] {
        assert!(!normal.to_ascii_uppercase().contains(hidden), "{asked:?}: {normal:?}");
    }
    let Ok(prefix) = path::normalise(prefix) else { return };
    let rewritten = path::rewrite(&normal, &prefix, "/other");
    assert_eq!(rewritten.is_some(), path::is_below(&normal, &prefix));
    let Some(rewritten) = rewritten else { return };
    let rest = rewritten.strip_prefix("/other").expect("what is put in its place");
    assert!(rest.is_empty() || rest.starts_with('/'), "{prefix:?} of {normal:?}: {rewritten:?}");
    assert_eq!(format!("{}{rest}", prefix.strip_suffix('/').unwrap_or(&prefix)), normal.as_str());
    assert_eq!(path::normalise(&rewritten).as_ref(), Ok(&rewritten), "{asked:?}");
}

/// A request goes the narrowest way that fits, in whatever order the routes stand. `data`: lines; the first is the request, the
/// others are routes.
pub fn route(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let Some(asked) = lines.next().and_then(Line::read) else { return };
    let Some(host) = host_name(asked.host) else { return };
    let Ok(path) = path::normalise(asked.path) else { return };
    let headers: HeaderMap = asked.headers().collect();
    let mut routes: Vec<Route> = Vec::new();
    for route in lines.take(16).filter_map(|line| Line::read(line)?.route()) {
        if !routes.iter().any(|other| other.condition.is_confusable(&route.condition)) {
            routes.push(route);
        }
    }
    let asked = Asked { host: &host, path: &path, method: asked.method, headers: &headers };
    let fitting = routes.iter().filter(|route| miss(&route.condition, &asked).is_none());
    let narrowest = fitting.min_by_key(|route| Reverse(route.condition.specificity()));
    let way = |routes: &[Route]| match Table::new(routes).find(&asked) {
        Found::Route(number, route) => {
            assert_eq!(routes.get(number), Some(route));
            Some(route.clone())
        }
        _ => None,
    };
    // Where two are as narrow as each other, no request fits both: they could be confused.
    assert_eq!(way(&routes).as_ref(), narrowest, "{text:?}");
    let narrowest = narrowest.cloned();
    routes.reverse();
    assert_eq!(way(&routes), narrowest, "{text:?}");
}

/// What a client writes in headers speaks for nobody but itself, ends with its connection where it says so, and all else
/// goes on as it was. `data`: lines with a colon.
pub fn headers(data: &[u8]) {
    let mut all = HeaderMap::new();
    for line in data.split(|&byte| byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            all.append(name, value);
        }
    }
    let before = all.clone();
    headers::remove_hop_by_hop(&mut all);
    let passport = Passport {
        tells: vec![(HeaderName::from_static("x-user"), HeaderValue::from_static("anna"))],
        withheld: ["x-user", "x-role"].map(HeaderName::from_static).into(),
        user: None,
    };
    let peer = [198, 51, 100, 7].into();
    let origin = Origin::itself(peer);
    let asker = Asker {
        peer,
        peer_tls: true,
        origin: &origin,
        tls: true,
        host: "shop.example",
        said_host: "shop.example",
        id: "7",
        passport: &passport,
    };
    headers::forward(&mut all, &asker);

    let named = before.get_all("connection").iter().filter_map(|value| value.to_str().ok());
    let named: BTreeSet<String> =
        named.flat_map(|list| list.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect();
    let ours = BTreeMap::from([
        ("x-forwarded-for", "198.51.100.7"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "shop.example"),
        ("x-request-id", "7"),
        ("x-user", "anna"),
    ]);
    for (name, value) in &ours {
        let values: Vec<&HeaderValue> = all.get_all(*name).iter().collect();
        assert_eq!(values, [value], "{name}");
    }
    let of_the_desk = |name: &str| {
        let dashed = name.replace('_', "-");
        ours.contains_key(dashed.as_str()) || ["x-role", "x-real-ip", "forwarded"].contains(&dashed.as_str())
    };
    for name in all.keys() {
        let is_hop = ["keep-alive", "transfer-encoding", "upgrade"].contains(&name.as_str())
            || name.as_str().starts_with("proxy-");
        assert!(!is_hop, "{name} goes on");
        // That trailers are understood is said anew, to the next.
        let is_said_anew = ["te", "connection"].contains(&name.as_str());
        if is_said_anew {
            assert_eq!(all["te"], "trailers");
            assert_eq!(all["connection"], "te");
        } else if !ours.contains_key(name.as_str()) {
            assert!(!named.contains(name.as_str()), "{name} is of one connection, and goes on");
            assert!(!of_the_desk(name.as_str()), "{name} goes on");
        }
    }
    let is_of_one =
        |name: &str| headers::is_of_framing(name) && !["content-length", "trailer"].contains(&name);
    for name in before.keys().map(HeaderName::as_str) {
        if !is_of_one(name) && !named.contains(name) && !of_the_desk(name) {
            let [was, is] = [&before, &all].map(|all| all.get_all(name).iter().collect::<Vec<_>>());
            assert_eq!(was, is, "{name}");
        }
    }
}

/// `METHOD host/path name: value name: value`; of a route `-` stands for any method, `*` for any host, `*.` before a host for
/// all below it, `=` before a path for that alone.
struct Line<'l> {
    method: &'l str,
    host: &'l str,
    path: &'l str,
    rest: Vec<&'l str>,
}

impl<'l> Line<'l> {
    fn read(line: &'l str) -> Option<Self> {
        let mut words = line.split(' ');
        let (method, place) = (words.next()?, words.next()?);
        let (host, path) = place.split_at(place.find(['/', '='])?);
        Some(Self { method, host, path, rest: words.collect() })
    }

    fn headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        self.rest.chunks_exact(2).take(4).filter_map(|pair| {
            let name = HeaderName::try_from(pair[0].strip_suffix(':')?).ok()?;
            Some((name, HeaderValue::from_str(pair[1]).ok()?))
        })
    }

    fn route(&self) -> Option<Route> {
        let host = match (self.host, self.host.strip_prefix("*.")) {
            ("*", _) => HostPattern::Any,
            (_, Some(below)) => HostPattern::Below(host_name(below)?),
            (name, None) => HostPattern::Exact(host_name(name)?),
        };
        let path = match self.path.strip_prefix('=') {
            Some(path) => PathPattern::Exact(path::normalise(path).ok()?),
            None => {
                let path = path::normalise(self.path).ok()?;
                // As documents have it: only the root ends with a slash.
                PathPattern::Prefix(
                    path.strip_suffix('/').filter(|it| !it.is_empty()).unwrap_or(&path).into(),
                )
            }
        };
        let methods = match self.method {
            "-" => BTreeSet::new(),
            methods => methods.split(',').map(str::to_owned).collect(),
        };
        let headers = self
            .headers()
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned())));
        Some(Route {
            condition: Condition { host, path, methods, headers: headers.collect() },
            guard: Guard::default(),
            limits: Vec::new(),
            action: Action::Respond { status: 200, body: String::new(), content_type: String::new() },
            response_headers: HeaderEdits::default(),
        })
    }
}
