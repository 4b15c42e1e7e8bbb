//! Where a request comes from, when it comes by proxies: whoever called is believed alone if the document names it, and so
//! on along the chain.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, header};

use super::headers::{FORWARDED_FOR, FORWARDED_PROTO, tokens};
use crate::model::Network;

/// Longest list of forwarders that is believed to be one.
const LONGEST: usize = 1024;

/// Where a request comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Who asks: the last in the chain that is no proxy of ours.
    pub client: IpAddr,
    /// Whether they asked over TLS, where a proxy says so.
    pub tls: Option<bool>,
    /// The chain from them to whoever called, without the latter; empty: they called themselves.
    pub before: Vec<IpAddr>,
}

/// Where a request comes from, by `peer`, who called, and the headers.
pub fn origin(peer: IpAddr, headers: &HeaderMap, proxies: &[Network]) -> Origin {
    let mut origin = Origin { client: peer, tls: None, before: Vec::new() };
    if !Network::any(proxies, peer) {
        return origin;
    }
    let length: usize = [FORWARDED_FOR, header::FORWARDED.as_str()]
        .iter()
        .flat_map(|name| headers.get_all(*name))
        .map(|value| value.as_bytes().len())
        .sum();
    if length > LONGEST {
        return origin;
    }
    let forwarded = tokens(headers, header::FORWARDED);
    let listed = tokens(headers, HeaderName::from_static(FORWARDED_FOR));
    let (addresses, protocols): (Vec<Option<IpAddr>>, Vec<String>) = match listed.is_empty() {
        false => (
            listed.iter().map(|text| address(text)).collect(),
            tokens(headers, HeaderName::from_static(FORWARDED_PROTO)),
        ),
        true => {
            let of = |name: &'static str| forwarded.iter().map(move |element| parameter(element, name));
            (of("for").map(|text| address(&text?)).collect(), of("proto").flatten().collect())
        }
    };
    for address in addresses.into_iter().rev() {
        // What is no address was not written by a proxy of ours, or hides who it was.
        let Some(address) = address else { break };
        origin.client = address;
        origin.before.insert(0, address);
        if !Network::any(proxies, address) {
            break;
        }
    }
    origin.tls = match protocols.last().map(String::as_str) {
        Some("https") => Some(true),
        Some("http") => Some(false),
        _ => None,
    };
    origin
}

/// An address, perhaps with a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

/// A parameter of an element of `Forwarded` (RFC 7239 section 4).
fn parameter(element: &str, name: &str) -> Option<String> {
    let pairs = element.split(';').filter_map(|pair| pair.split_once('='));
    let value = pairs.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name)?.1;
    Some(value.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn of(peer: &str, headers: &[(&'static str, &str)]) -> Origin {
        let pairs = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
        let mut map = HeaderMap::new();
        pairs.for_each(|(name, value)| _ = map.append(name, value));
        let proxies = ["10.9.0.0/16", "2001:db8:9::/48"].map(|network| network.parse().unwrap());
        origin(ip(peer), &map, &proxies)
    }

    fn found(client: &str, tls: Option<bool>, before: &[&str]) -> Origin {
        Origin { client: ip(client), tls, before: before.iter().map(|text| ip(text)).collect() }
    }

    #[test]
    fn only_proxies_are_believed() {
        let made_up = [
            ("x-forwarded-for", "198.51.100.7"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=198.51.100.7"),
        ];
        assert_eq!(of("203.0.113.5", &made_up), found("203.0.113.5", None, &[]));
        assert_eq!(of("10.9.0.1", &made_up), found("198.51.100.7", Some(true), &["198.51.100.7"]));
        assert_eq!(of("::ffff:10.9.0.1", &made_up[..1]), found("198.51.100.7", None, &["198.51.100.7"]));
        assert_eq!(of("10.9.0.1", &[]), found("10.9.0.1", None, &[]));
    }

    #[test]
    fn the_last_that_is_no_proxy_asks_whatever_stands_before_it() {
        for (listed, client, before) in [
            ("6.6.6.6, 198.51.100.7", "198.51.100.7", &["198.51.100.7"][..]),
            ("6.6.6.6, 198.51.100.7, 10.9.1.1", "198.51.100.7", &["198.51.100.7", "10.9.1.1"]),
            (
                "198.51.100.7, 2001:db8:9::1, 10.9.1.1",
                "198.51.100.7",
                &["198.51.100.7", "2001:db8:9::1", "10.9.1.1"],
            ),
            // All are ours: the first of them asks by itself.
            ("10.9.2.2, 10.9.1.1", "10.9.2.2", &["10.9.2.2", "10.9.1.1"]),
            // Somebody hides: who handed it on stands for them.
            ("198.51.100.7, unknown, 10.9.1.1", "10.9.1.1", &["10.9.1.1"]),
            ("198.51.100.7, unknown", "10.9.0.1", &[]),
            ("198.51.100.7:4711", "198.51.100.7", &["198.51.100.7"]),
            ("[2001:db8::7]:4711", "2001:db8::7", &["2001:db8::7"]),
            ("[2001:db8::7]", "2001:db8::7", &["2001:db8::7"]),
            ("::ffff:198.51.100.7", "198.51.100.7", &["198.51.100.7"]),
        ] {
            assert_eq!(
                of("10.9.0.1", &[("x-forwarded-for", listed)]),
                found(client, None, before),
                "{listed}"
            );
        }
        let twice = [("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "198.51.100.7, 10.9.1.1")];
        assert_eq!(of("10.9.0.1", &twice).client, ip("198.51.100.7"));
        let long = vec!["198.51.100.7"; 100].join(", ");
        assert_eq!(of("10.9.0.1", &[("x-forwarded-for", &long)]), found("10.9.0.1", None, &[]));
    }

    #[test]
    fn forwarded_is_understood_where_it_stands_alone() {
        let both = "for=6.6.6.6;proto=http, For=\"[2001:db8::7]:4711\";proto=https;by=10.9.0.1";
        assert_eq!(
            of("10.9.0.1", &[("forwarded", both)]),
            found("2001:db8::7", Some(true), &["2001:db8::7"])
        );
        assert_eq!(of("10.9.0.1", &[("forwarded", "for=_hidden")]), found("10.9.0.1", None, &[]));
        let two = [("forwarded", "for=6.6.6.6"), ("x-forwarded-for", "198.51.100.7")];
        assert_eq!(of("10.9.0.1", &two).client, ip("198.51.100.7"));
    }
}
