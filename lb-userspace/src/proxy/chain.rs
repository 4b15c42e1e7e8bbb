//! Where a request comes from, when it comes by proxies: whoever called is believed alone if the document names it, and so
//! on along the chain.
//!
//! Everything before the last that is no proxy of ours is written by strangers: nothing of it, be it long, unreadable
//! or in another header, may change what is found.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, header};

use super::headers::{FORWARDED_FOR, FORWARDED_PROTO};
use crate::model::{Network, desk::ProxyHeader};

/// Most proxies in a chain.
const MOST: usize = 32;

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

impl Origin {
    /// Who called asks.
    pub fn itself(peer: IpAddr) -> Self {
        Self { client: peer, tls: None, before: Vec::new() }
    }
}

/// Where a request comes from, by `peer`, who called, and the header that its proxies write.
pub fn origin(peer: IpAddr, headers: &HeaderMap, proxies: &[Network], by: ProxyHeader) -> Origin {
    let mut origin = Origin::itself(peer);
    if !Network::any(proxies, peer) {
        return origin;
    }
    let name = match by {
        ProxyHeader::ForwardedFor => FORWARDED_FOR,
        ProxyHeader::Forwarded => header::FORWARDED,
    };
    for element in from_the_last(headers, &name).take(MOST) {
        let address = match by {
            ProxyHeader::ForwardedFor => element.and_then(address),
            ProxyHeader::Forwarded => element.and_then(|element| address(parameter(element, "for")?)),
        };
        // What is no address was not written by a proxy of ours, or hides who it was.
        let Some(address) = address else { break };
        origin.client = address;
        origin.before.insert(0, address);
        if !Network::any(proxies, address) {
            break;
        }
    }
    // The one who called is the last to say how it was asked.
    let protocol = match by {
        ProxyHeader::ForwardedFor => from_the_last(headers, &FORWARDED_PROTO).next().flatten(),
        ProxyHeader::Forwarded => {
            from_the_last(headers, &name).next().flatten().and_then(|element| parameter(element, "proto"))
        }
    };
    origin.tls = protocol.and_then(|protocol| {
        let is = |word: &str| protocol.eq_ignore_ascii_case(word);
        if is("https") { Some(true) } else { is("http").then_some(false) }
    });
    origin
}

/// The elements of a list in all lines of a header, the last first; `None`: one that cannot be read.
fn from_the_last<'h>(
    headers: &'h HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = Option<&'h str>> + use<'h> {
    let lines: Vec<&[u8]> = headers.get_all(name).iter().map(http::HeaderValue::as_bytes).collect();
    lines
        .into_iter()
        .rev()
        .flat_map(|line| line.rsplit(|&byte| byte == b','))
        .map(|element| std::str::from_utf8(element).ok().map(str::trim))
}

/// An address, perhaps with a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

/// A parameter of an element of `Forwarded` (RFC 7239 section 4).
fn parameter<'e>(element: &'e str, name: &str) -> Option<&'e str> {
    let pairs = element.split(';').filter_map(|pair| pair.split_once('='));
    let mut named = pairs.filter(|(key, _)| key.trim().eq_ignore_ascii_case(name));
    Some(named.next()?.1.trim().trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn by(which: ProxyHeader, peer: &str, headers: &[(&'static str, &[u8])]) -> Origin {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap());
        }
        let proxies = ["10.9.0.0/16", "2001:db8:9::/48"].map(|network| network.parse().unwrap());
        origin(ip(peer), &map, &proxies, which)
    }

    fn of(peer: &str, headers: &[(&'static str, &[u8])]) -> Origin {
        by(ProxyHeader::ForwardedFor, peer, headers)
    }

    fn found(client: &str, tls: Option<bool>, before: &[&str]) -> Origin {
        Origin { client: ip(client), tls, before: before.iter().map(|text| ip(text)).collect() }
    }

    #[test]
    fn only_proxies_are_believed() {
        let made_up: [(_, &[u8]); 2] =
            [("x-forwarded-for", b"198.51.100.7"), ("x-forwarded-proto", b"https")];
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
            let heard = of("10.9.0.1", &[("x-forwarded-for", listed.as_bytes())]);
            assert_eq!(heard, found(client, None, before), "{listed}");
        }
    }

    /// A proxy adds to what the client has sent; what that was makes no difference.
    #[test]
    fn a_client_cannot_hide_behind_its_proxy() {
        let real = found("198.51.100.7", None, &["198.51.100.7"]);
        let forwarded = b"for=10.1.2.3;proto=https";
        let long = b"10.1.2.3, ".repeat(5000);
        for own in [&b"6.6.6.6"[..], b"\xff", b"", b",,,", b"10.9.3.3", b"\"", &long] {
            let line = [own, b", 198.51.100.7"].concat();
            assert_eq!(of("10.9.0.1", &[("x-forwarded-for", &line), ("forwarded", forwarded)]), real);
            let lines: [(_, &[u8]); 2] = [("x-forwarded-for", own), ("x-forwarded-for", b"198.51.100.7")];
            assert_eq!(of("10.9.0.1", &lines), real);
        }
        let unreadable = [("x-forwarded-for", &b"\xff"[..]), ("forwarded", forwarded)];
        assert_eq!(of("10.9.0.1", &unreadable), found("10.9.0.1", None, &[]));
        let ours = b"10.9.1.1, ".repeat(100);
        assert_eq!(of("10.9.0.1", &[("x-forwarded-for", &ours)]).before.len(), 0, "its last element is none");
        let ours = [&b"10.9.1.1, ".repeat(100)[..], b"10.9.1.1"].concat();
        assert_eq!(of("10.9.0.1", &[("x-forwarded-for", &ours)]).before.len(), MOST);
    }

    #[test]
    fn forwarded_is_believed_where_proxies_write_that() {
        let of = |headers: &[(&'static str, &[u8])]| by(ProxyHeader::Forwarded, "10.9.0.1", headers);
        let both = b"for=6.6.6.6;proto=http, For=\"[2001:db8::7]:4711\";Proto=HTTPS;by=10.9.0.1";
        assert_eq!(of(&[("forwarded", both)]), found("2001:db8::7", Some(true), &["2001:db8::7"]));
        assert_eq!(of(&[("forwarded", b"for=_hidden")]), found("10.9.0.1", None, &[]));
        assert_eq!(of(&[("x-forwarded-for", b"10.1.2.3")]), found("10.9.0.1", None, &[]));
    }
}
