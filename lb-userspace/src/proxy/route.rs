//! Which route a request takes: the narrowest whose condition it meets, whatever the order in the document.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use super::{headers::only, path};
use crate::model::desk::{Action, Condition, HostPattern, PathPattern, Route};

/// What of a request decides its way.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its host, as [`host_name`] gives it.
    pub host: &'a str,
    /// Its path, normalised.
    pub path: &'a str,
    /// Its method.
    pub method: &'a str,
    /// Its headers.
    pub headers: &'a http::HeaderMap,
}

/// The routes of a service.
#[derive(Clone, Debug)]
pub struct Table {
    /// The narrowest first.
    order: Vec<(usize, Route)>,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Found<'t> {
    /// This way; its number in the document, from 0.
    Route(usize, &'t Route),
    /// There is a way for other methods.
    OtherMethod(BTreeSet<&'t str>),
    /// None for this path, though there is one for the host.
    NoPath,
    /// None for this host.
    NoHost,
}

/// Why a request does not meet a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Miss {
    /// Another host.
    Host,
    /// Another path.
    Path,
    /// A header is not there, or has another value.
    Header(String),
    /// Another method.
    Method,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("another host"),
            Self::Path => f.write_str("another path"),
            Self::Header(name) => write!(f, "header {name} differs"),
            Self::Method => f.write_str("another method"),
        }
    }
}

impl Table {
    /// Of these routes, no two of which can be confused.
    pub fn new(routes: &[Route]) -> Self {
        let mut order: Vec<_> = routes.iter().cloned().enumerate().collect();
        order.sort_by_key(|(_, route)| std::cmp::Reverse(route.condition.specificity()));
        Self { order }
    }

    /// The routes with their numbers in the document, the narrowest first.
    pub fn routes(&self) -> impl Iterator<Item = (usize, &Route)> {
        self.order.iter().map(|(number, route)| (*number, route))
    }

    /// The way of a request.
    pub fn find(&self, asked: &Asked<'_>) -> Found<'_> {
        let (mut host, mut methods) = (false, BTreeSet::new());
        for (number, route) in self.routes() {
            match miss(&route.condition, asked) {
                None => return Found::Route(number, route),
                Some(Miss::Host) => {}
                Some(Miss::Method) => methods.extend(route.condition.methods()),
                Some(_) => host = true,
            }
        }
        match (methods.is_empty(), host) {
            (false, _) => Found::OtherMethod(methods),
            (true, true) => Found::NoPath,
            (true, false) => Found::NoHost,
        }
    }
}

/// The path that a backend sees of a request that takes a route.
pub fn sent<'p>(route: &Route, path: &'p str) -> Cow<'p, str> {
    let Action::Forward { rewrite: Some(with), .. } = &route.action else { return path.into() };
    match &route.condition.path {
        PathPattern::Exact(_) => with.clone().into(),
        PathPattern::Prefix(prefix) => path::rewrite(path, prefix, with).map_or(path.into(), Cow::Owned),
    }
}

fn is_of(pattern: &HostPattern, host: &str) -> bool {
    match pattern {
        HostPattern::Any => true,
        HostPattern::Below(name) => {
            host.strip_suffix(name.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        }
        HostPattern::Exact(name) => host == name,
    }
}

/// The pool that a connection by TLS is handed to as it is, by the name that its client asks for: the narrowest wins.
pub fn passed<'p>(rules: &'p [(HostPattern, String)], name: &str) -> Option<&'p str> {
    let name = host_name(name)?;
    let meant = rules.iter().filter(|(pattern, _)| is_of(pattern, &name));
    meant.max_by_key(|(pattern, _)| pattern.specificity()).map(|(_, pool)| pool.as_str())
}

/// What of a condition a request does not meet; `None`: it meets all of it.
pub fn miss(condition: &Condition, asked: &Asked<'_>) -> Option<Miss> {
    if !is_of(&condition.host, asked.host) {
        return Some(Miss::Host);
    }
    let path = match &condition.path {
        PathPattern::Prefix(prefix) => path::is_below(asked.path, prefix),
        PathPattern::Exact(path) => asked.path == path,
    };
    if !path {
        return Some(Miss::Path);
    }
    // Of two values the route would go by one and the backend perhaps by the other.
    let differs = |(name, value): &(&String, &String)| {
        only(asked.headers, name.as_str()).is_none_or(|found| found.as_bytes() != value.as_bytes())
    };
    if let Some((name, _)) = condition.headers.iter().find(differs) {
        return Some(Miss::Header(name.clone()));
    }
    let method = condition.methods.is_empty() || condition.methods().any(|method| method == asked.method);
    (!method).then_some(Miss::Method)
}

/// The name in a `Host` header or an authority: in lower case, without port and final dot; an IPv6 address
/// keeps its brackets. `None` where there is no such name.
pub fn host_name(authority: &str) -> Option<String> {
    let (name, port) = match authority.strip_prefix('[').and_then(|rest| rest.find(']')) {
        Some(end) => authority.split_at(end + 2),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    // RFC 3986 section 3.2.3: the port may be empty.
    let port = port.is_empty()
        || port.strip_prefix(':').is_some_and(|digits| {
            digits.bytes().all(|b| b.is_ascii_digit()) && (digits.is_empty() || digits.parse::<u16>().is_ok())
        });
    let inner = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let valid = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => is_name(name.strip_suffix('.').unwrap_or(name)),
    };
    (port && valid).then(|| name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase())
}

/// Labels of letters, digits, `-` and `_`, with dots between them.
pub fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::desk::HeaderEdits;
    use proptest::prelude::*;

    fn route(host: &str, path: &str, methods: &[&str], headers: &[(&str, &str)]) -> Route {
        let host = match host.strip_prefix("*") {
            Some("") => HostPattern::Any,
            Some(below) => HostPattern::Below(below[1..].into()),
            None => HostPattern::Exact(host.into()),
        };
        let path = match path.strip_prefix('=') {
            Some(exact) => PathPattern::Exact(exact.into()),
            None => PathPattern::Prefix(path.into()),
        };
        Route {
            condition: Condition {
                host,
                path,
                methods: methods.iter().map(|&method| method.into()).collect(),
                headers: headers.iter().map(|&(name, value)| (name.into(), value.into())).collect(),
            },
            guard: crate::model::guard::Guard::default(),
            limits: Vec::new(),
            action: Action::Respond { status: 200, body: String::new(), content_type: String::new() },
            response_headers: HeaderEdits::default(),
        }
    }

    fn found<'t>(table: &'t Table, method: &str, url: &str, headers: &[(&str, &str)]) -> Found<'t> {
        let (host, path) = url.split_at(url.find('/').unwrap());
        let mut map = http::HeaderMap::new();
        for (name, value) in headers {
            map.append(http::HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        table.find(&Asked { host, path, method, headers: &map })
    }

    #[test]
    fn the_narrowest_wins() {
        let table = Table::new(&[
            route("*", "/", &[], &[]),
            route("*.example", "/", &[], &[]),
            route("*.shop.example", "/", &[], &[]),
            route("shop.example", "/", &[], &[]),
            route("shop.example", "/pay", &[], &[]),
            route("shop.example", "/pay/now", &[], &[]),
            route("shop.example", "=/pay", &[], &[]),
            route("shop.example", "/pay", &["POST"], &[]),
            route("shop.example", "/pay", &["POST"], &[("x-version", "2")]),
            route("shop.example", "/pay", &[], &[("x-version", "2")]),
        ]);
        for (method, url, headers, number) in [
            ("GET", "other.test/", &[][..], 0),
            ("GET", "other.example/", &[], 1),
            ("GET", "a.b.shop.example/", &[], 2),
            ("GET", "shop.example/payments", &[], 3),
            ("GET", "shop.example/pay/later", &[], 4),
            ("GET", "shop.example/pay/now/x", &[], 5),
            ("POST", "shop.example/pay", &[], 6),
            ("POST", "shop.example/pay/x", &[], 7),
            ("POST", "shop.example/pay/x", &[("x-version", "2")], 8),
            ("POST", "shop.example/pay/x", &[("x-version", "1")], 7),
            ("GET", "shop.example/pay/x", &[("x-version", "2")], 9),
        ] {
            match found(&table, method, url, headers) {
                Found::Route(way, _) => assert_eq!(way, number, "{method} {url} {headers:?}"),
                other => panic!("{method} {url}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_has_no_way_is_told_apart() {
        let table = Table::new(&[
            route("shop.example", "/pay", &["POST", "PUT"], &[]),
            route("shop.example", "/beta", &[], &[("x-beta", "1")]),
        ]);
        assert_eq!(found(&table, "GET", "shop.example/pay", &[]), Found::OtherMethod(["POST", "PUT"].into()));
        // What may be had by GET, may be by HEAD; not the other way round.
        let table_of = |method| Table::new(&[route("shop.example", "/pay", &[method], &[])]);
        assert!(matches!(found(&table_of("GET"), "HEAD", "shop.example/pay", &[]), Found::Route(0, _)));
        let both = Table::new(&[route("a", "/", &["GET"], &[]), route("a", "/", &["HEAD"], &[])]);
        assert!(matches!(found(&both, "HEAD", "a/", &[]), Found::Route(1, _)));
        assert!(matches!(found(&both, "GET", "a/", &[]), Found::Route(0, _)));
        let only = table_of("HEAD");
        assert_eq!(found(&only, "GET", "shop.example/pay", &[]), Found::OtherMethod(["HEAD"].into()));
        let get = table_of("GET");
        assert_eq!(found(&get, "PUT", "shop.example/pay", &[]), Found::OtherMethod(["GET", "HEAD"].into()));
        assert_eq!(found(&table, "GET", "shop.example/", &[]), Found::NoPath);
        assert_eq!(found(&table, "GET", "shop.example/beta", &[]), Found::NoPath);
        assert!(matches!(found(&table, "GET", "shop.example/beta", &[("x-beta", "1")]), Found::Route(1, _)));
        // Of two values nobody can say which is meant.
        let twice = [("x-beta", "1"), ("x-beta", "2")];
        assert_eq!(found(&table, "GET", "shop.example/beta", &twice), Found::NoPath);
        assert_eq!(found(&table, "GET", "other.example/pay", &[]), Found::NoHost);
        // A name is not below itself, nor below a name that it only ends with.
        let below = Table::new(&[route("*.shop.example", "/", &[], &[])]);
        for host in ["shop.example/", "myshop.example/", ".shop.example/"] {
            assert_eq!(found(&below, "GET", host, &[]), Found::NoHost, "{host}");
        }
    }

    #[test]
    fn routes_that_some_request_meets_alike_can_be_confused() {
        let confusable = |one: Route, other: Route| one.condition.is_confusable(&other.condition);
        assert!(confusable(route("a", "/", &[], &[]), route("a", "/", &[], &[])));
        assert!(!confusable(route("a", "/", &[], &[]), route("a", "=/", &[], &[])));
        assert!(!confusable(route("a", "/", &[], &[]), route("b", "/", &[], &[])));
        assert!(!confusable(route("a", "/", &["GET"], &[]), route("a", "/", &[], &[])));
        assert!(confusable(route("a", "/", &["GET", "PUT"], &[]), route("a", "/", &["GET", "POST"], &[])));
        assert!(!confusable(route("a", "/", &["PUT"], &[]), route("a", "/", &["POST"], &[])));
        assert!(!confusable(route("a", "/", &["GET"], &[]), route("a", "/", &["HEAD"], &[])));
        assert!(!confusable(route("a", "/", &[], &[("x", "1")]), route("a", "/", &[], &[("x", "2")])));
        assert!(confusable(route("a", "/", &[], &[("x", "1")]), route("a", "/", &[], &[("y", "1")])));
    }

    #[test]
    fn hosts_are_names_without_port() {
        for (authority, name) in [
            ("Shop.Example", Some("shop.example")),
            ("shop.example.", Some("shop.example")),
            ("shop.example:8443", Some("shop.example")),
            ("shop.example:", Some("shop.example")),
            ("203.0.113.10:80", Some("203.0.113.10")),
            ("[2001:db8::10]:443", Some("[2001:db8::10]")),
            ("[2001:db8::10]", Some("[2001:db8::10]")),
            ("", None),
            (".", None),
            ("shop..example", None),
            ("shop.example:80:90", None),
            ("shop.example:x", None),
            ("shop.example:70000", None),
            ("user@shop.example", None),
            ("shop.example/x", None),
            ("shop example", None),
            ("[2001:db8::10", None),
            ("[shop]", None),
            ("2001:db8::10", None),
        ] {
            assert_eq!(host_name(authority).as_deref(), name, "{authority}");
        }
    }

    fn any_route() -> impl Strategy<Value = Route> {
        let host = prop::sample::select(vec!["*", "*.b", "*.a.b", "a.b", "c.a.b"]);
        let path = prop::sample::select(vec!["/", "/x", "/x/y", "=/x", "=/"]);
        let methods = prop::sample::select(vec![&[][..], &["GET"], &["GET", "POST"]]);
        let headers = prop::sample::select(vec![&[][..], &[("h", "1")], &[("h", "2")], &[("i", "1")]]);
        (host, path, methods, headers)
            .prop_map(|(host, path, methods, headers)| route(host, path, methods, headers))
    }

    proptest! {
        /// The way is the same in whatever order the routes stand, and is as narrow as any that fits.
        #[test]
        fn the_order_makes_no_difference(
            routes in prop::collection::vec(any_route(), 1..12),
            host in prop::sample::select(vec!["b", "a.b", "c.a.b", "d.a.b", "z"]),
            path in prop::sample::select(vec!["/", "/x", "/x/", "/x/y/z", "/xy"]),
            method in prop::sample::select(vec!["GET", "POST", "PUT"]),
            header in prop::sample::select(vec!["", "1", "2"]),
        ) {
            let mut apart: Vec<Route> = Vec::new();
            for route in routes {
                if !apart.iter().any(|other| other.condition.is_confusable(&route.condition)) {
                    apart.push(route);
                }
            }
            let mut headers = http::HeaderMap::new();
            if !header.is_empty() {
                headers.insert("h", header.parse().unwrap());
            }
            let asked = Asked { host, path, method, headers: &headers };
            let way = |table: &Table| match table.find(&asked) {
                Found::Route(_, route) => Some(route.condition.clone()),
                _ => None,
            };
            let first = way(&Table::new(&apart));
            let fitting: Vec<_> = apart.iter().filter(|route| miss(&route.condition, &asked).is_none()).collect();
            prop_assert_eq!(first.is_some(), !fitting.is_empty());
            if let Some(first) = &first {
                prop_assert!(fitting.iter().all(|route| route.condition.specificity() <= first.specificity()));
            }
            apart.reverse();
            prop_assert_eq!(way(&Table::new(&apart)), first);
        }
    }
}
