//! Where a request comes from, when it comes by proxies: whoever called is believed alone if the document names it, and so
//! on along the chain.
//!
//! Everything before the last that is no proxy of ours is written by strangers: nothing of it, be it long, unreadable
//! or in another header, may change what is found.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, header};

use super::{
    headers::{FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO, REQUEST_ID, only},
    route::host_name,
};
use crate::model::{
    Network,
    desk::{Desk, ProxyHeader},
};

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
    /// The host that they asked for, where a proxy says so.
    pub host: Option<String>,
    /// The request's number, where a proxy has given it one.
    pub id: Option<String>,
    /// Where proxies speak by `Forwarded`: what they say of this chain, element by element.
    pub elements: Option<Vec<String>>,
}

impl Origin {
    /// Who called asks.
    pub fn itself(peer: IpAddr) -> Self {
        Self { client: peer, tls: None, before: Vec::new(), host: None, id: None, elements: None }
    }
}

/// Where a request comes from, by `peer`, who called, and what the service's proxies are known to write.
pub fn origin(peer: IpAddr, headers: &HeaderMap, desk: &Desk) -> Origin {
    let (proxies, by) = (&desk.proxies, desk.proxy_header);
    let mut origin = Origin::itself(peer);
    origin.elements = (by == ProxyHeader::Forwarded).then(Vec::new);
    if !Network::any(proxies, peer) {
        return origin;
    }
    let name = match by {
        ProxyHeader::ForwardedFor => FORWARDED_FOR,
        ProxyHeader::Forwarded => header::FORWARDED,
    };
    let quotes = by == ProxyHeader::Forwarded;
    for element in from_the_last(headers, &name, quotes).take(MOST) {
        let Some(element) = element else { break };
        let address = match by {
            ProxyHeader::ForwardedFor => address(element),
            ProxyHeader::Forwarded => parameter(element, "for").and_then(address),
        };
        // What is no address was not written by a proxy of ours, or hides who it was.
        let Some(address) = address else { break };
        origin.client = address;
        origin.before.insert(0, address);
        if let Some(elements) = &mut origin.elements {
            elements.insert(0, element.to_owned());
        }
        if !Network::any(proxies, address) {
            break;
        }
    }
    // The one who called is the last to say how it was asked, and for whom.
    let last = |name| from_the_last(headers, name, quotes).next().flatten();
    let (protocol, host) = match by {
        ProxyHeader::ForwardedFor => (last(&FORWARDED_PROTO), last(&FORWARDED_HOST)),
        ProxyHeader::Forwarded => {
            let said = |key| last(&name).and_then(|element| parameter(element, key));
            (said("proto"), said("host"))
        }
    };
    // Not every proxy writes these; one that hands on what its client has sent must not be believed.
    let host = host.filter(|host| desk.proxy_host && host_name(host).is_some());
    origin.host = host.map(str::to_owned);
    let id = only(headers, &REQUEST_ID).filter(|_| desk.proxy_request_id);
    origin.id = id.and_then(|id| id.to_str().ok()).filter(|id| is_number(id)).map(str::to_owned);
    origin.tls = protocol.and_then(|protocol| {
        let is = |word: &str| protocol.eq_ignore_ascii_case(word);
        if is("https") { Some(true) } else { is("http").then_some(false) }
    });
    origin
}

/// Whether it can be a request's number: something that is no more than that, in a log and elsewhere.
fn is_number(id: &str) -> bool {
    let is_of_it = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=128).contains(&id.len()) && id.bytes().all(is_of_it)
}

/// What the desk says by `Forwarded` (RFC 7239) of who called, after what proxies have said before.
pub fn forwarded(before: &[String], peer: IpAddr, host: &str, tls: bool) -> String {
    let peer = match peer.to_canonical() {
        IpAddr::V4(peer) => peer.to_string(),
        IpAddr::V6(peer) => format!("\"[{peer}]\""),
    };
    let own = format!("for={peer};host=\"{host}\";proto={}", if tls { "https" } else { "http" });
    before.iter().map(String::as_str).chain([own.as_str()]).collect::<Vec<_>>().join(", ")
}

/// The elements of a list in all lines of a header, the last first; `None`: one that cannot be read. With `quotes`, what
/// stands between quotation marks is of one element, whatever it is.
fn from_the_last<'h>(
    headers: &'h HeaderMap,
    name: &HeaderName,
    quotes: bool,
) -> impl Iterator<Item = Option<&'h str>> + use<'h> {
    let lines: Vec<&[u8]> = headers.get_all(name).iter().map(http::HeaderValue::as_bytes).collect();
    lines.into_iter().rev().flat_map(move |line| pieces(line, b',', quotes)).map(move |element| {
        let marks = || (0..element.len()).filter(|&at| is_mark(element, at)).count();
        let is_whole = !quotes || marks().is_multiple_of(2);
        std::str::from_utf8(element).ok().map(str::trim).filter(|_| is_whole)
    })
}

/// Whether there is a quotation mark that does not stand for itself (RFC 9110 section 5.6.4).
fn is_mark(text: &[u8], at: usize) -> bool {
    let slashes = || text[..at].iter().rev().take_while(|&&byte| byte == b'\\').count();
    text[at] == b'"' && slashes().is_multiple_of(2)
}

/// The pieces of a text between separators, the last first: so none is read otherwise for what stands before it, which
/// anybody may have written. `quotes`: but for separators between quotation marks.
fn pieces(text: &[u8], separator: u8, quotes: bool) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let mut inside = false;
        let found = (0..text.len()).rev().find(|&at| {
            inside ^= quotes && is_mark(text, at);
            text[at] == separator && !inside
        });
        rest = found.map(|at| &text[..at]);
        Some(found.map_or(text, |at| &text[at + 1..]))
    })
}

/// An address, perhaps with a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

/// A parameter of an element of `Forwarded` (RFC 7239 section 4).
fn parameter<'e>(element: &'e str, name: &str) -> Option<&'e str> {
    let texts = pieces(element.as_bytes(), b';', true).filter_map(|pair| std::str::from_utf8(pair).ok());
    let pairs = texts.filter_map(|pair| pair.split_once('='));
    let mut named = pairs.filter(|(key, _)| key.trim().eq_ignore_ascii_case(name));
    // Twice, it would say two things.
    let value = named.next().filter(|_| named.next().is_none())?.1;
    Some(value.trim().trim_matches('"'))
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
        let proxies = ["10.9.0.0/16", "2001:db8:9::/48"].map(|network| network.parse().unwrap()).into();
        let desk = Desk {
            proxies,
            proxy_header: which,
            proxy_host: true,
            proxy_request_id: true,
            ..Desk::default()
        };
        let found = origin(ip(peer), &map, &desk);
        // What is not known to be a proxy's word is not taken for it.
        let less = origin(ip(peer), &map, &Desk { proxy_host: false, proxy_request_id: false, ..desk });
        assert_eq!(less, Origin { host: None, id: None, ..found.clone() });
        found
    }

    fn of(peer: &str, headers: &[(&'static str, &[u8])]) -> Origin {
        by(ProxyHeader::ForwardedFor, peer, headers)
    }

    fn found(client: &str, tls: Option<bool>, before: &[&str]) -> Origin {
        Origin { tls, before: before.iter().map(|text| ip(text)).collect(), ..Origin::itself(ip(client)) }
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
        let of = |headers: &[(&'static str, &[u8])]| {
            let origin = by(ProxyHeader::Forwarded, "10.9.0.1", headers);
            assert_eq!(origin.elements.as_ref().map(Vec::len), Some(origin.before.len()));
            Origin { elements: None, ..origin }
        };
        let both = b"for=6.6.6.6;proto=http, For=\"[2001:db8::7]:4711\";Proto=HTTPS;by=10.9.0.1";
        assert_eq!(of(&[("forwarded", both)]), found("2001:db8::7", Some(true), &["2001:db8::7"]));
        assert_eq!(of(&[("forwarded", b"for=_hidden")]), found("10.9.0.1", None, &[]));
        assert_eq!(of(&[("x-forwarded-for", b"10.1.2.3")]), found("10.9.0.1", None, &[]));
    }

    #[test]
    fn a_proxy_says_for_which_host_and_by_which_number() {
        let headers: [(_, &[u8]); 3] = [
            ("x-forwarded-host", b"evil.example, Shop.example:8443"),
            ("x-forwarded-for", b"198.51.100.7"),
            ("x-request-id", b"7f-3_a.b"),
        ];
        let origin = of("10.9.0.1", &headers);
        assert_eq!(origin.host.as_deref(), Some("Shop.example:8443"));
        assert_eq!((origin.id.as_deref(), origin.elements), (Some("7f-3_a.b"), None));
        assert_eq!(of("203.0.113.5", &headers), Origin::itself(ip("203.0.113.5")), "a stranger");
        for odd in [&b"a/b"[..], b"u@a", b"\xff", b"a b"] {
            assert_eq!(of("10.9.0.1", &[("x-forwarded-host", odd)]).host, None, "{odd:?}");
        }
        let long = b"1".repeat(129);
        for odd in [&b"a b"[..], b"", b"a\tb", b"\xff", b"{}", &long] {
            assert_eq!(of("10.9.0.1", &[("x-request-id", odd)]).id, None, "{odd:?}");
        }
        let twice: [(_, &[u8]); 2] = [("x-request-id", b"1"), ("x-request-id", b"2")];
        assert_eq!(of("10.9.0.1", &twice).id, None);
    }

    #[test]
    fn what_stands_between_quotation_marks_is_no_other_element() {
        let of =
            |said: &'static str| by(ProxyHeader::Forwarded, "10.9.0.1", &[("forwarded", said.as_bytes())]);
        for said in [
            "for=198.51.100.7;host=\"a,for=10.9.1.1\";proto=https",
            "host=\"a,for=10.9.1.1\";for=198.51.100.7;proto=https",
            "host=\"a;for=10.9.1.1\";for=198.51.100.7;proto=https",
            "host=\"\\\",for=10.9.1.1\";for=198.51.100.7;proto=https",
            "for=10.1.1.1;host=\", for=198.51.100.7;proto=https",
        ] {
            let found = of(said);
            assert_eq!((found.client, found.tls), (ip("198.51.100.7"), Some(true)), "{said}");
        }
        for unreadable in ["for=198.51.100.7;host=\"a", "for=10.9.1.1;for=198.51.100.7", "for=\"198.51.100.7"]
        {
            let found = of(unreadable);
            assert_eq!((found.client, found.before.len()), (ip("10.9.0.1"), 0), "{unreadable}");
        }
    }

    #[test]
    fn who_speaks_by_forwarded_is_answered_for_likewise() {
        let said =
            b"for=6.6.6.6;proto=http, for=198.51.100.7;host=shop.example;proto=https, for=10.9.1.1;secret=_x";
        let origin = by(ProxyHeader::Forwarded, "10.9.0.1", &[("forwarded", said)]);
        assert_eq!((origin.host, origin.tls), (None, None), "the last says neither");
        let elements = origin.elements.unwrap();
        assert_eq!(
            forwarded(&elements, ip("::ffff:10.9.0.1"), "a:80", false),
            "for=198.51.100.7;host=shop.example;proto=https, for=10.9.1.1;secret=_x, for=10.9.0.1;host=\"a:80\";proto=http"
        );
        assert_eq!(
            forwarded(&[], ip("2001:db8::7"), "a", true),
            "for=\"[2001:db8::7]\";host=\"a\";proto=https"
        );
        let stranger = by(ProxyHeader::Forwarded, "203.0.113.5", &[("forwarded", said)]);
        assert_eq!(stranger.elements, Some(Vec::new()));
    }
}
