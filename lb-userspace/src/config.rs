//! From the text of a document to a checked [`Config`].
//!
//! The document is TOML. It is refused whole when anything in it is wrong, with every mistake that can
//! be found at once, each with its place and how to mend it. What only the kernel can tell (an interface
//! that is not there, a route) is the daemon's to check; [`Places`] says where to point.

mod check;
mod complaint;
pub mod edit;
mod guard;
mod limit;
mod pools;
mod read;
mod roles;
mod routes;
mod services;
mod settings;
mod tls;

use std::collections::BTreeMap;

use toml::de::DeTable;

pub use self::complaint::{Complaint, Complaints, Place, Places, Severity};
pub(crate) use self::read::nearest;
use self::{
    complaint::Thing,
    read::{Fields, Node, Sink},
};
use crate::model::{Config, Forward, desk::DESK_POOL};

/// A document that checks.
#[derive(Clone, Debug)]
pub struct Document {
    /// What it says.
    pub config: Config,
    /// Where it says it.
    pub places: Places,
    /// What is odd about it, in the order of its lines.
    pub warnings: Vec<Complaint>,
}

impl Document {
    /// Reads and checks a document.
    ///
    /// # Errors
    /// Everything that is wrong with it, in the order of its lines; its warnings too.
    pub fn parse(text: &str) -> Result<Self, Complaints> {
        let mut sink = Sink::new(text);
        let (root, mistakes) = DeTable::parse_recoverable(text);
        for mistake in &mistakes {
            let span = mistake.span().unwrap_or(0..0);
            sink.error(&span, mistake.message(), "write it as TOML (https://toml.io) says");
        }
        // What was recovered of a broken document says little about what was meant.
        if !mistakes.is_empty() {
            return Err(in_order(sink.complaints));
        }
        let mut places = sink.places();
        let root = Fields::new(root.get_ref(), 0..0, "the document".to_owned());
        let config = document(root, &mut sink, &mut places);
        let complaints = in_order(sink.into_complaints());
        if complaints.0.iter().any(|complaint| complaint.severity == Severity::Error) {
            return Err(Complaints::errors_of(complaints.0));
        }
        Ok(Self { config, places, warnings: complaints.0 })
    }
}

fn document(mut root: Fields<'_>, sink: &mut Sink<'_>, places: &mut Places) -> Config {
    let interfaces = settings::interfaces(&mut root, sink, places);
    let settings = settings::settings(&mut root, sink, places);

    let mut pools = BTreeMap::new();
    if let Some(named) = root.read(sink, "pools", Node::table) {
        for (name, span, node) in named.named("pool") {
            settings::check_name(name, &span, sink);
            places.note(Thing::Pool(name.to_owned()), span);
            if let Some(pool) = pools::pool(name, &node, sink, places) {
                pools.insert(name.to_owned(), pool);
            }
        }
    }

    let mut services = BTreeMap::new();
    if let Some(named) = root.read(sink, "services", Node::table) {
        for (name, span, node) in named.named("service") {
            settings::check_name(name, &span, sink);
            if let Some(service) = services::service(name, &node, sink, places) {
                services.insert(name.to_owned(), service);
            }
        }
    }
    root.finish(sink);

    if services.values().any(|service| service.forward == Forward::Desk) {
        pools.insert(DESK_POOL.to_owned(), pools::desk());
    }
    let config = Config { interfaces, settings, pools, services };
    check::whole(&config, places, sink);
    config
}

fn in_order(mut complaints: Vec<Complaint>) -> Complaints {
    complaints.sort();
    complaints.dedup();
    Complaints(complaints)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{
        Admin, Backend, BackendAddress, Forward, HealthCheck, Panic, Probe, Scheduler, Track,
    };

    const GOOD: &str = r#"
interfaces = ["eth0", "eth1"]
sources = ["10.0.0.5"]
ports = "20000-29999"
resets_per_second = 50
metrics = "127.0.0.1:9110"

[limits]
flows = 4096

[timeouts]
half_open = "5s"
established = "2h 4m"

[pools.web]
health = { http = "/healthz", host = "shop.example", status = "200,301-302", interval = "1s", rise = 1, fall = 4 }
panic = "fail"
backends = [
  { address = "10.0.0.11:8080" },
  { address = "10.0.0.12:8080", weight = 2, drain = true },
  { address = "10.0.0.13:8080", drain = 2026-11-30T18:00:00Z },
  { address = "10.0.0.14:8080", disabled = true },
]

[pools.dns]
health = { udp = { send = { hex = "00ff" }, expect = "ok" }, port = 53 }
[[pools.dns.backends]]
address = "2001:db8::53"

[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
scheduler = "round-robin"
allow = ["10.0.0.0/8"]
deny = ["10.9.0.0/16"]

[services.names]
listen = "[2001:db8::1]:*/udp"
pool = "dns"
ring_size = 101
"#;

    /// The complaints about `GOOD` with one text replaced by another, as `line:column message (remedy)`.
    fn complaints(from: &str, to: &str) -> Vec<String> {
        assert!(GOOD.contains(from), "{from:?} is not in the document");
        let text = GOOD.replace(from, to);
        let found = match Document::parse(&text) {
            Ok(document) => document.warnings,
            Err(Complaints(found)) => found,
        };
        let mut shown = Vec::new();
        for c in found {
            assert_eq!(text.lines().nth(c.line - 1).map(str::trim_end), Some(c.excerpt.as_str()));
            let pointed: String = c.excerpt.chars().skip(c.column - 1).take(c.width).collect();
            shown.push(format!("{} at {pointed}: {} ({})", c.severity, c.message, c.remedy));
        }
        shown
    }

    #[test]
    fn a_document_says_what_it_says() {
        let document = Document::parse(GOOD).unwrap_or_else(|why| panic!("{why}"));
        assert_eq!(document.warnings, []);
        let config = document.config;
        assert_eq!(config.interfaces, ["eth0", "eth1"]);
        assert_eq!(config.settings.limits.flows, 4096);
        assert_eq!(config.settings.limits.services, 4096);
        assert_eq!(config.settings.idle.half_open, Duration::from_secs(5));
        assert_eq!(config.settings.idle.established, Duration::from_secs(7440));
        assert_eq!(config.settings.idle.udp, Duration::from_secs(180));
        assert_eq!(config.settings.ports.to_string(), "20000-29999");
        let web = &config.pools["web"];
        assert_eq!(web.panic, Panic::Fail);
        let backend = |text: &str, weight, admin| Backend { address: text.parse().unwrap(), weight, admin };
        assert_eq!(
            web.backends,
            [
                backend("10.0.0.11:8080", 1, Admin::Enabled),
                backend("10.0.0.12:8080", 2, Admin::Drain { deadline: None }),
                backend("10.0.0.13:8080", 1, Admin::Drain { deadline: Some(1_796_061_600) }),
                backend("10.0.0.14:8080", 1, Admin::Disabled),
            ]
        );
        let Some(HealthCheck {
            probe: Probe::Http { status, tls, .. }, interval, timeout, rise, fall, ..
        }) = &web.health
        else {
            panic!("{:?}", web.health)
        };
        assert_eq!((status.as_slice(), *tls), ([(200, 200), (301, 302)].as_slice(), false));
        assert_eq!(
            (*interval, *timeout, *rise, *fall),
            (Duration::from_secs(1), Duration::from_secs(1), 1, 4)
        );
        let dns = &config.pools["dns"];
        assert_eq!(dns.backends[0].address, BackendAddress::Remote("2001:db8::53".parse().unwrap(), None));
        let probe = dns.health.as_ref().map(|health| health.probe.clone());
        assert_eq!(probe, Some(Probe::Udp { send: vec![0, 255], expect: b"ok".to_vec() }));
        let shop = &config.services["shop"];
        assert_eq!(shop.scheduler, Scheduler::RoundRobin);
        assert_eq!((shop.allow.len(), shop.deny.len()), (1, 1));
        assert_eq!(config.services["names"].ring_size, Some(101));
        assert_eq!(config.services["names"].listen.port, None);
    }

    #[test]
    fn what_is_not_translated_keeps_its_port_and_has_no_turns() {
        const DIRECT: &str = r#"interfaces = ["eth0"]
[pools.web]
backends = [{ address = "10.0.0.11:80" }, { address = "10.0.0.12" }]
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
forward = "dsr"
track = "always"
[services.names]
listen = "203.0.113.10:53/udp"
pool = "names"
forward = "dsr"
sticky = true
[pools.names]
backends = [{ address = "10.0.0.21" }]
"#;
        let document = Document::parse(DIRECT).unwrap();
        let service = |name: &str| document.config.services[name].clone();
        assert_eq!((service("shop").forward, service("shop").track), (Forward::Dsr, Track::Always));
        assert_eq!(service("names").track, Track::Changes);
        let track = |text: &str, with: &str| {
            Document::parse(&DIRECT.replace(text, with)).unwrap().config.services["names"].track
        };
        assert_eq!(track("sticky = true\n", ""), Track::Never);

        let wrong =
            |text: &str, with: &str| Document::parse(&DIRECT.replace(text, with)).unwrap_err().to_string();
        let other_port = wrong("10.0.0.11:80", "10.0.0.11:8080");
        assert!(other_port.contains("write \"10.0.0.11:80\""), "{other_port}");
        let all_ports = wrong("203.0.113.10:80/tcp", "203.0.113.10:*/tcp");
        assert!(all_ports.contains("write \"10.0.0.11\", without a port"), "{all_ports}");
        let turns = wrong("track = \"always\"", "scheduler = \"round-robin\"");
        assert!(turns.contains("cannot be given out in turn"), "{turns}");
        let alike = wrong("track = \"always\"", "scheduler = \"source\"");
        assert!(alike.contains("its ports too"), "{alike}");
    }

    #[test]
    fn each_mistake_is_shown_in_its_place_with_a_remedy() {
        // What is replaced, by what, and the one complaint that follows.
        let cases = [
            (
                "panic =",
                "pannic =",
                r#"error at pannic: pool "web" has no key pannic (did you mean "panic"?)"#,
            ),
            (
                "[limits]",
                "[limit]",
                r#"error at limit: the document has no key limit (did you mean "limits"?)"#,
            ),
            (
                "fall = 4",
                "fall = 4, via = \"vip\"",
                r#"error at web: via = "vip", but no service gives pool "web" a VIP to answer for (remove it; it is for pools of TCP services with forward = "dsr" on one port)"#,
            ),
            ("fall = 4", "falls = 4", r#"error at falls: health has no key falls (did you mean "fall"?)"#),
            (
                "\"eth1\"",
                "\"eth0\"",
                r#"error at "eth0": interface "eth0" is listed twice (remove one of the two)"#,
            ),
            (
                "[\"eth0\", \"eth1\"]",
                "[]",
                r#"error at []: no interface is listed (name at least one by which packets come, such as ["eth0"])"#,
            ),
            (
                "flows = 4096",
                "flows = 5000",
                "error at 5000: flows = 5000 is not a power of two (write 4096 or 8192; a flow takes 128 bytes of memory)",
            ),
            (
                "flows = 4096",
                "flows = \"4096\"",
                "error at \"4096\": flows is a string (write a whole number from 1024 to 268435456)",
            ),
            ("\"5s\"", "5", r#"error at 5: half_open has no unit (say the unit: "5s" or "5ms")"#),
            (
                "\"5s\"",
                "\"0s\"",
                r#"error at "0s": half_open "0s" is not understood (zero would mean at once; write how long, such as "1s")"#,
            ),
            (
                "127.0.0.1:9110",
                "0.0.0.0:9110",
                r#"error at "0.0.0.0:9110": metrics on 0.0.0.0:9110 could be read from outside (write "127.0.0.1:9110" and let a proxy with authentication offer it)"#,
            ),
            (
                "20000-29999",
                "29999-20000",
                r#"error at "29999-20000": ports "29999-20000" is not understood (ports are written "10240-32767": the lowest, not 0, and the highest)"#,
            ),
            (
                "pool = \"web\"",
                "pool = \"wbe\"",
                r#"error at "wbe": there is no pool "wbe" (did you mean "web"?)"#,
            ),
            (
                "[2001:db8::1]:*/udp",
                "203.0.113.11:*/udp",
                r#"error at "dns": an IPv4 service cannot be forwarded to backend 2001:db8::53 of pool "dns" (use a pool whose backends all have IPv4 addresses)"#,
            ),
            (
                "10.0.0.12:8080",
                "10.0.0.11:8080",
                r#"error at "10.0.0.11:8080": backend 10.0.0.11:8080 is in pool "web" twice (remove one of the two; for a greater share say weight = 2)"#,
            ),
            (
                "10.0.0.12:8080",
                "203.0.113.10:8080",
                r#"error at "203.0.113.10:8080": backend 203.0.113.10:8080 has the address of a service: packets would go in circles (write the server's own address, or address = "local" for a server on this host)"#,
            ),
            (
                "10.0.0.12:8080",
                "127.0.0.1:8080",
                r#"error at "127.0.0.1:8080": backend 127.0.0.1 never leaves a host (write address = "local" for a server on this host, which must listen on the service's own address)"#,
            ),
            (
                "10.0.0.12:8080",
                "10.0.0.12",
                r#"error at "10.0.0.12": backend 10.0.0.12 has no port that its health check could ask on (add port = 8080 (or whichever it is) to the pool's health)"#,
            ),
            (
                "10.0.0.12:8080",
                "web2:8080",
                r#"error at "web2:8080": address "web2:8080" is not understood (a backend is written "10.0.0.11:8080", "[2001:db8::11]:8080", an address alone, or "local"; ports end at 65535, and names of hosts are not resolved)"#,
            ),
            (
                "weight = 2",
                "weight = 1001",
                "error at 1001: weight is out of range (write a whole number from 0 to 1000)",
            ),
            (
                "drain = true",
                "drain = true, disabled = true",
                "error at true: a backend cannot be both draining and disabled (remove drain to reset its connections now, or disabled to let them end)",
            ),
            (
                "2026-11-30T18:00:00Z",
                "2026-11-30T18:00:00",
                "error at 2026-11-30T18:00:00: drain is not understood (write date, time and offset from UTC: 2026-11-30T18:00:00Z)",
            ),
            (
                "interval = \"1s\"",
                "timeout = \"3s\"",
                r#"error at "3s": timeout 3s is longer than the interval, 2s: probes would pile up (write timeout = "2000ms" or less, or a longer interval)"#,
            ),
            (
                "http = \"/healthz\"",
                "http = \"/healthz\", tcp = true",
                r#"error at { http = "/healthz", tcp = true, host = "shop.example", status = "200,301-302", interval = "1s", rise = 1, fall = 4 }: the health check asks tcp and http at once (keep one of them)"#,
            ),
            (
                "\"200,301-302\"",
                "\"2xx\"",
                r#"error at "2xx": status "2xx" is not understood (write statuses from 100 to 599: "200", "200-399", "200,204,301-302")"#,
            ),
            (
                "\"00ff\"",
                "\"0xff\"",
                r#"error at "0xff": hex "0xff" is not understood (write two hexadecimal digits for each byte, such as "00ff")"#,
            ),
            (
                "203.0.113.10:80/tcp",
                "0.0.0.0:80/tcp",
                r#"error at "0.0.0.0:80/tcp": VIP 0.0.0.0 stands for every address (write the address of one host, such as 203.0.113.10 or 2001:db8::10)"#,
            ),
            (
                "203.0.113.10:80/tcp",
                "224.0.0.1:80/tcp",
                r#"error at "224.0.0.1:80/tcp": VIP 224.0.0.1 is a group's (write the address of one host, such as 203.0.113.10 or 2001:db8::10)"#,
            ),
            (
                "203.0.113.10:80/tcp",
                "127.0.0.1:80/tcp",
                r#"error at "127.0.0.1:80/tcp": VIP 127.0.0.1 never leaves a host (write the address of one host, such as 203.0.113.10 or 2001:db8::10)"#,
            ),
            (
                "203.0.113.10:80/tcp",
                "10.0.0.5:20000/tcp",
                r#"error at "10.0.0.5:20000/tcp": 10.0.0.5:20000/tcp is a source too, and its ports 20000-29999 are for replies (use another address as source, or choose ports that no service listens on)"#,
            ),
            (
                "203.0.113.10:80/tcp",
                "203.0.113.10:80",
                r#"error at "203.0.113.10:80": listen "203.0.113.10:80" is not understood (a listener is written "203.0.113.10:80/tcp", "[2001:db8::1]:53/udp", or with * for all ports: "203.0.113.10:*/tcp"; ports end at 65535)"#,
            ),
            (
                "10.9.0.0/16",
                "10.9.1.0/16",
                r#"error at "10.9.1.0/16": deny "10.9.1.0/16" is not understood (the address has bits set beyond its prefix; the network is "10.9.0.0/16")"#,
            ),
            (
                "10.9.0.0/16",
                "10.0.0.0/8",
                r#"error at "10.0.0.0/8": 10.0.0.0/8 is both allowed and denied (remove one of the two; of two that overlap the longer prefix decides)"#,
            ),
            (
                "10.9.0.0/16",
                "2001:db8::/32",
                r#"warning at "2001:db8::/32": 2001:db8::/32 is of the other family than the service: no client of it can come (remove it, or put it in a service that listens on that family)"#,
            ),
            (
                "ring_size = 101",
                "ring_size = 100",
                "error at 100: ring_size = 100 is not prime, so some slots could never be reached by some backends (write 97 or 101)",
            ),
            (
                "scheduler = \"round-robin\"",
                "scheduler = \"roundrobin\"",
                r#"error at "roundrobin": scheduler cannot be "roundrobin" (did you mean "round-robin"?)"#,
            ),
            (
                "scheduler = \"round-robin\"",
                "forward = \"ipip\"",
                r#"error at "ipip": forward = "ipip" is not in this version of Lobby (write forward = "nat", which works with any backend, or "dsr" if the backends are on the same network and have the VIP)"#,
            ),
            (
                "scheduler = \"round-robin\"",
                "track = \"always\"",
                r#"error at "always": track is for services that do not translate (remove it; with forward = "nat" every connection is tracked)"#,
            ),
            (
                "scheduler = \"round-robin\"",
                "sticky = true",
                r#"error at true: sticky is for UDP services that do not translate (remove it; connections of this service stay with their backend anyway)"#,
            ),
            (
                "scheduler = \"round-robin\"",
                "role = \"primary\"",
                r#"error at "web": service "shop" wants the primary of pool "web", whose health check does not tell who that is (give the pool health = { postgres = { user = "lb" } } or health = { http_role = { primary = "/primary", replica = "/replica" }, port = 8008 })"#,
            ),
            (
                "scheduler = \"round-robin\"",
                "fence = \"none\"",
                r#"error at "none": fence is for services with role = "primary" that do not translate (remove it; connections to a server that is not the primary any more are cut)"#,
            ),
            (
                "scheduler = \"round-robin\"",
                "ring_size = 2",
                r#"error at 2: ring_size = 2 has no slot for each of the pool's 4 backends (write a prime of about 400, a hundred slots for each)"#,
            ),
            (
                "listen = \"203.0.113.10:80/tcp\"\n",
                "",
                r#"error at shop: service "shop" has no listen (add listen = "203.0.113.10:80/tcp")"#,
            ),
            (
                "health = { udp = { send = { hex = \"00ff\" }, expect = \"ok\" }, port = 53 }",
                "slow_start = \"10s\"",
                r#"error at "10s": pool "dns" starts slowly, and has no health check to tell when a server comes back (add health = { tcp = true }, or remove slow_start)"#,
            ),
            (
                "[services.shop]",
                "[services.\"my shop\"]",
                r#"error at "my shop": "my shop" is no name (use 1 to 63 letters, digits, "-", "_" and ".", not beginning with "-")"#,
            ),
            (
                "pool = \"dns\"",
                "pool = \"web\"",
                r#"error at "web": an IPv6 service cannot be forwarded to backend 10.0.0.11:8080 of pool "web" (use a pool whose backends all have IPv6 addresses)"#,
            ),
        ];
        for (from, to, expected) in cases {
            let shown = complaints(from, to);
            assert!(shown.iter().any(|shown| shown == expected), "{from} -> {to}:\n{}", shown.join("\n"));
            // No mistake hides behind a crowd of others: at most what follows from it is shown too.
            assert!(shown.len() <= 2, "{from} -> {to}:\n{}", shown.join("\n"));
        }
    }

    #[test]
    fn services_cannot_listen_in_the_same_place() {
        let shown = complaints(
            "[services.names]\nlisten = \"[2001:db8::1]:*/udp\"\npool = \"dns\"\nring_size = 101",
            "[services.shop2]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"",
        );
        assert!(
            shown
                .iter()
                .any(|c| c.contains("services \"shop\" and \"shop2\" both listen on 203.0.113.10:80/tcp")),
            "{shown:?}"
        );
    }

    #[test]
    fn all_mistakes_are_shown_at_once_in_the_order_of_lines() {
        let text = GOOD
            .replace("flows = 4096", "flows = 1")
            .replace("weight = 2", "weight = -1")
            .replace("pool = \"web\"", "pool = \"wbe\"")
            .replace("\"dns\"", "\"dsn\"")
            .replace("ring_size = 101", "ring_size = 100");
        let Err(Complaints(found)) = Document::parse(&text) else { panic!("accepted") };
        let errors: Vec<_> = found.iter().filter(|c| c.severity == Severity::Error).map(|c| c.line).collect();
        assert_eq!(errors, [9, 20, 32, 39, 40]);
    }

    #[test]
    fn what_is_no_toml_is_shown_in_its_place() {
        let Err(Complaints(found)) = Document::parse("interfaces = [\"eth0\"\n[pools.web\nx = 1\nx = 2\n")
        else {
            panic!("accepted")
        };
        assert!(!found.is_empty());
        assert!(found.iter().all(|c| c.line >= 1 && !c.message.is_empty()));
        // What was meant is not guessed at.
        assert!(found.iter().all(|c| c.remedy.contains("toml.io")), "{found:?}");
        let Err(Complaints(found)) = Document::parse("interfaces = [\"eth0\"]\ninterfaces = []\n") else {
            panic!("accepted")
        };
        assert_eq!((found[0].line, found[0].message.as_str()), (2, "duplicate key"));
    }

    #[test]
    fn an_empty_document_lacks_only_interfaces() {
        let Err(Complaints(found)) = Document::parse("") else { panic!("accepted") };
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].message, "the document has no interfaces");
        assert!(Document::parse("interfaces = [\"eth0\"]").is_ok());
    }

    #[test]
    fn places_can_be_found_again() {
        let document = Document::parse(GOOD).unwrap();
        let line = |place: Place<'_>| place.error("", "").line;
        assert_eq!(line(document.places.interface("eth1")), 2);
        assert_eq!(line(document.places.source("10.0.0.5".parse().unwrap())), 3);
        assert_eq!(line(document.places.metrics()), 6);
        assert_eq!(line(document.places.backend("web", "10.0.0.13:8080".parse().unwrap())), 21);
        assert_eq!(line(document.places.listen("names")), 38);
        assert_eq!(line(document.places.pool("dns")), 25);
    }

    proptest::proptest! {
        /// Whatever is typed, the answer is a document or complaints, never a crash.
        #[test]
        fn no_text_crashes(cut in 0usize..1400, insert in "[ \\[\\]{}=\",\\.0-9a-zé\n-]{0,12}", drop in 0usize..40) {
            let cut = (0..=cut.min(GOOD.len())).rev().find(|&at| GOOD.is_char_boundary(at)).unwrap();
            let text = format!("{}{insert}{}", &GOOD[..cut], GOOD.get(cut + drop..).unwrap_or(""));
            if let Err(why) = Document::parse(&text) {
                proptest::prop_assert!(why.0.iter().any(|c| c.severity == Severity::Error));
                let _ = why.to_string();
            }
        }
    }
}
