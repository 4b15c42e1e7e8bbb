//! Documents with services of the desk: what they say, and what is wrong with them.

use std::num::NonZeroU32;

use crate::{
    config::{Complaints, Document},
    model::{
        Forward, Scheduler, Track,
        desk::{Action, DESK_POOL, Elsewhere, HostPattern, PathPattern, Sticky},
    },
};

const GOOD: &str = r#"interfaces = ["eth0"]
[pools.web]
backends = [ { address = "10.0.0.11:8080" }, { address = "[2001:db8::11]:8080" } ]
[pools.payments]
backends = [ { address = "10.0.0.12" } ]

[services.front]
listen = "203.0.113.10:443/tcp"
tls = [ { cert = "front.pem", key = "front.key" }, { cert = "/etc/other.pem", key = "other.key" } ]
pool = "web"
access_log = true
timeouts = { response = "5s" }
deny = ["192.0.2.0/24"]
[[services.front.routes]]
host = "Shop.example"
path = "/pay/"
method = "POST"
header = { X-Version = "2" }
pool = "payments"
strip_prefix = true
headers = { set = { x-door = "front" }, remove = ["cookie"] }
[[services.front.routes]]
host = "*.shop.example"
exact_path = "/old"
redirect = { to = "https://new.example", status = 302 }
[[services.front.routes]]
host = "plain.example"
respond = { status = 404, body = "no", type = "text/html" }
response_headers = { add = { x-a = "b" } }
"#;

fn complaints(from: &str, to: &str) -> Vec<String> {
    assert!(GOOD.contains(from), "{from:?} is not in the document");
    let found = match Document::parse(&GOOD.replace(from, to)) {
        Ok(document) => document.warnings,
        Err(Complaints(found)) => found,
    };
    found.into_iter().map(|c| format!("{}: {} ({})", c.line, c.message, c.remedy)).collect()
}

#[test]
fn a_service_of_the_desk_says_what_it_says() {
    let mut document = Document::parse(GOOD).unwrap_or_else(|why| panic!("{why}"));
    assert_eq!(document.warnings, []);
    document.config.resolve(std::path::Path::new("/etc/lobby"));
    let config = &document.config;
    let front = &config.services["front"];
    assert_eq!(
        (front.forward, front.scheduler, front.track),
        (Forward::Desk, Scheduler::Maglev, Track::Never)
    );
    assert_eq!((front.pool.as_str(), front.deny.len()), (DESK_POOL, 1));
    assert_eq!(config.pools[DESK_POOL].backends.len(), 1);
    assert_eq!(config.pools_of_desk(), ["payments", "web"].into());
    let desk = front.desk.as_ref().unwrap();
    let files: Vec<_> = desk.certificates.iter().flat_map(|files| [&files.cert, &files.key]).collect();
    let whole = ["/etc/lobby/front.pem", "/etc/lobby/front.key", "/etc/other.pem", "/etc/lobby/other.key"];
    assert_eq!(files, whole.map(std::path::Path::new));
    assert_eq!(desk.access_log, Some(NonZeroU32::MIN));
    assert_eq!((desk.timeouts.response.as_secs(), desk.timeouts.body.as_secs()), (5, 60));
    let written: Vec<_> =
        desk.routes.iter().map(|route| format!("{} -> {}", route.condition, route.action)).collect();
    assert_eq!(
        written,
        [
            "POST shop.example/pay/* x-version: 2 -> pool payments",
            "*.shop.example/old -> redirect 302 to https://new.example",
            "plain.example/* -> respond 404",
            "*/* -> pool web",
        ]
    );
    let [pay, old, ..] = desk.routes.as_slice() else { panic!("{:?}", desk.routes) };
    assert_eq!(pay.condition.host, HostPattern::Exact("shop.example".into()));
    assert_eq!(pay.condition.path, PathPattern::Prefix("/pay".into()));
    let Action::Forward { rewrite: Some(_), headers, .. } = &pay.action else { panic!("{pay:?}") };
    assert!(headers.set["x-door"] == "front" && headers.remove.contains("cookie"));
    let Action::Redirect { to: Elsewhere::Host(host), .. } = &old.action else { panic!("{old:?}") };
    assert_eq!(host, "https://new.example");
}

/// TLS alone, or routes alone, make a service one of the desk.
#[test]
fn the_least_that_makes_a_service_of_the_desk() {
    let parsed = |service: &str| {
        let text = format!(
            "interfaces = [\"eth0\"]\n[pools.web]\nbackends = []\n[services.s]\nlisten = \"203.0.113.10:80/tcp\"\n{service}"
        );
        Document::parse(&text).map(|document| document.config.services["s"].clone())
    };
    let tls = parsed("pool = \"web\"\ntls = { cert = \"a\", key = \"b\" }").unwrap();
    assert_eq!(tls.desk.unwrap().routes[0].pool(), Some("web"));
    let routes = parsed("routes = [{ redirect = \"https\" }, { path = \"/x\", pool = \"web\" }]").unwrap();
    assert!(routes.desk.unwrap().certificates.is_empty());
    assert!(parsed("pool = \"web\"").unwrap().desk.is_none());
}

#[test]
fn each_mistake_is_shown_in_its_place_with_a_remedy() {
    let cases = [
        ("/tcp", "/udp", "8: routes and tls are for TCP (write /tcp, or remove them to forward datagrams)"),
        (
            ":443/tcp",
            ":*/tcp",
            "8: a service with routes or tls listens on one port (write it instead of *: 443, or 80)",
        ),
        (
            "access_log = true",
            "forward = \"nat\"",
            "11: forward is for services that forward packets, and this one has routes or tls (remove it; a request goes to any server by a connection of the desk's own)",
        ),
        (
            "access_log = true",
            "scheduler = \"maglev\"",
            "11: scheduler is for services that forward packets, and this one has routes or tls (remove it; each request goes to the server that has less to do, of two taken at random)",
        ),
        (
            "access_log = true",
            "track = \"always\"",
            "11: track is for services that forward packets, and this one has routes or tls (remove it; the desk knows its connections)",
        ),
        (
            "access_log = true",
            "ring_size = 101",
            "11: ring_size is for services that forward packets, and this one has routes or tls (remove it; there is no ring)",
        ),
        (
            "access_log = true",
            "auth = {}",
            "11: auth is for routes, not for services (write it in the routes that it is for, such as [[services.front.routes]] with path = \"/\" for all requests)",
        ),
        (
            "access_log = true",
            "limits = {}",
            "11: limits is for routes, not for services (write it in the routes that it is for, such as [[services.front.routes]] with path = \"/\" for all requests)",
        ),
        (
            "strip_prefix = true",
            "auth = {}",
            "20: auth does not say how one says who one is (write { basic = { users = \"staff.users\" } }, { key = { keys = \"robots.keys\" } }, { jwt = { jwks_file = \"keys.json\" } }, { certificate = {} } or { forward = { pool = \"id\", path = \"/verify\" } })",
        ),
        (
            "strip_prefix = true",
            "auth = []",
            "20: auth names no way to say who one is (name one, such as { basic = { users = \"staff.users\" } }, or remove auth)",
        ),
        (
            "strip_prefix = true",
            "auth = { basic = {}, key = {} }",
            "20: auth asks for several things at once (write a list of alternatives: auth = [{ basic = … }, { key = … }])",
        ),
        (
            "strip_prefix = true",
            "auth = { basic = {} }",
            "20: basic has no users (add users = \"staff.users\")",
        ),
        (
            "strip_prefix = true",
            "auth = { basic = { users = \"a\", realm = \"a\\\"b\" } }",
            "20: realm \"a\"b\" is not understood (write some words without quotes, such as \"staff\": browsers show them)",
        ),
        (
            "strip_prefix = true",
            "auth = { key = { keys = \"a\", header = \"Connection\" } }",
            "20: connection is no place for a key (write \"x-api-key\")",
        ),
        (
            "strip_prefix = true",
            "auth = [{ basic = { users = \"a\" } }, { basic = { users = \"b\" } }]",
            "20: basic is asked for in authorization twice (keep one of them; all who may come in can be in one file)",
        ),
        ("strip_prefix = true", "auth = { forward = {} }", "20: forward has no pool (add pool = \"id\")"),
        (
            "strip_prefix = true",
            "auth = { jwt = { issuer = \"https://id.example\" } }",
            "20: jwt does not say by which keys tokens are known (add jwks_url = \"https://id.example/jwks\", jwks_file = \"keys.json\", public_key_file = \"issuer.pem\" or secret_file)",
        ),
        (
            "strip_prefix = true",
            "auth = { jwt = { jwks_file = \"a\", secret_file = \"b\" } }",
            "20: jwt names several sets of keys (keep one; a set of keys can hold them all)",
        ),
        (
            "strip_prefix = true",
            "auth = { jwt = { jwks_file = \"a\", leeway = \"1h\" } }",
            "20: leeway is longer than 5m (set the clocks, and write \"30s\")",
        ),
        (
            "strip_prefix = true",
            "auth = { jwt = { jwks_file = \"a\", audience = [] } }",
            "20: audience is not understood (name those that may stand in tokens, or remove it)",
        ),
        (
            "strip_prefix = true",
            "auth = { jwt = { jwks_file = \"a\", isuer = \"b\" } }",
            "20: jwt has no key isuer (did you mean \"issuer\"?)",
        ),
        (
            "strip_prefix = true",
            "require = { role = \"admin\" }",
            "20: require is for routes that ask who one is, and this one does not (add auth = { basic = { users = \"staff.users\" } }, or remove it)",
        ),
        (
            "strip_prefix = true",
            "auth = { basic = { users = \"a\" } }\nrequire = { role = [] }",
            "21: require names no value of role: nobody could come in (name those that may, or remove it)",
        ),
        (
            "strip_prefix = true",
            "auth = { basic = { users = \"a\" } }\nidentity = { host = \"user\" }",
            "21: host says something else to a server than who asks (write a name of its own, such as x-user)",
        ),
        (
            "strip_prefix = true",
            "allow = [\"10.0.0.0/8\"]\ndeny = [\"10.0.0.0/8\"]",
            "21: 10.0.0.0/8 is both allowed and denied (remove one of the two; of two that overlap the longer prefix decides)",
        ),
        (
            "pool = \"payments\"",
            "pool = \"paymets\"",
            "19: there is no pool \"paymets\" (did you mean \"payments\"?)",
        ),
        ("pool = \"web\"", "pool = \"wbe\"", "10: there is no pool \"wbe\" (did you mean \"web\"?)"),
        (
            "pool = \"payments\"",
            "pool = \"(desk)\"",
            "19: the desk cannot tell where backend local of pool \"(desk)\" listens (write an address of this host with the port there: \"10.0.0.1:8080\")",
        ),
        (
            "host = \"Shop.example\"",
            "host = \"*\"",
            "15: host \"*\" is not understood (remove it: without host a route is for all)",
        ),
        (
            "host = \"Shop.example\"",
            "host = \"shop.example:443\"",
            "15: host \"shop.example:443\" is not understood (write \"shop.example\": routes do not depend on the port)",
        ),
        (
            "host = \"Shop.example\"",
            "host = \"shop/x\"",
            "15: host \"shop/x\" is not understood (write a name such as \"shop.example\", or \"*.shop.example\" for all below it)",
        ),
        (
            "path = \"/pay/\"",
            "path = \"/a/../pay\"",
            "16: path \"/a/../pay\" is not understood (write \"/pay\", as paths are brought into one form first)",
        ),
        (
            "path = \"/pay/\"",
            "path = \"pay\"",
            "16: path \"pay\" is not understood (the path does not begin with /; write a path such as \"/pay\")",
        ),
        (
            "exact_path = \"/old\"",
            "exact_path = \"/old\"\npath = \"/old\"",
            "24: the route has both path and exact_path (keep path for it and all below it, or exact_path for it alone)",
        ),
        (
            "method = \"POST\"",
            "method = \"post\"",
            "17: method \"post\" is not understood (write a method in capitals, such as \"GET\")",
        ),
        (
            "header = { X-Version = \"2\" }",
            "header = { \"x y\" = \"2\" }",
            "18: \"x y\" is no name of a header (write a name such as \"x-version\")",
        ),
        (
            "x-door = \"front\"",
            "content-length = \"1\"",
            "21: content-length belongs to the connection, and the desk writes it itself (leave it out)",
        ),
        (
            "remove = [\"cookie\"]",
            "remove = [\"Connection\"]",
            "21: connection belongs to the connection, and the desk writes it itself (leave it out)",
        ),
        (
            "strip_prefix = true",
            "redirect = \"https\"",
            "14: the route has pool and redirect at once (write one of pool = \"web\", redirect = \"https\", respond = { status = 404 })",
        ),
        (
            "status = 302",
            "status = 300",
            "25: status is not understood (write 308 (for good) or 307 (for now); 301, 302 and 303 may turn a POST into a GET)",
        ),
        (
            "https://new.example",
            "new.example",
            "25: to \"new.example\" is not understood (write \"https\", a host such as \"https://shop.example\", or a whole address)",
        ),
        (
            "type = \"text/html\"",
            "type = \"html\"",
            "28: type \"html\" is not understood (write a media type, such as \"text/html; charset=utf-8\")",
        ),
        ("status = 404", "status = 99", "28: status is out of range (write a whole number from 200 to 599)"),
        (
            "exact_path = \"/old\"\nredirect",
            "exact_path = \"/old\"\nstrip_prefix = true\nredirect",
            "25: strip_prefix is for what a backend gets, and this route has none (remove it, or name a pool)",
        ),
        (
            "strip_prefix = true",
            "strip_prefix = true\nrewrite = \"/v2\"",
            "21: the route has both strip_prefix and rewrite (keep rewrite alone; strip_prefix = true is the same as rewrite = \"/\")",
        ),
        (
            "strip_prefix = true",
            "rewrite = \"v2\"",
            "20: rewrite \"v2\" is not understood (the path does not begin with /; write a path such as \"/pay\")",
        ),
        (
            "access_log = true",
            "access_log = { one_in = 0 }",
            "11: one_in is out of range (write a whole number from 1 to 1000000)",
        ),
        (
            "access_log = true",
            "pages = { 503 = \"\" }",
            "11: page \"503\" \"\" is not understood (write the name of a file, which is beside the document, or a whole path: \"closed.html\")",
        ),
        (
            "access_log = true",
            "pages = { 200 = \"closed.html\" }",
            "11: there is no page for \"200\" (write a status from 400 to 599, such as 503, or default for all others)",
        ),
        (
            "cert = \"/etc/other.pem\"",
            "cert = \"front.pem\"",
            "9: front.pem is listed twice (remove one of the two)",
        ),
        (", key = \"front.key\"", "", "9: tls has no key (add key = \"front.key\")"),
        (
            "key = \"front.key\"",
            "key = \"front.key\", client_ca = \"x\"",
            "9: client_ca is not in this version of Lobby (write clients = { ca = \"clients-ca.pem\" } in the service)",
        ),
        (
            "strip_prefix = true",
            "auth = { certificate = {} }",
            "14: clients are to show certificates, and the service does not ask for them (add clients = { ca = \"clients-ca.pem\" } to the service)",
        ),
        (
            "strip_prefix = true",
            "auth = { jwt = { jwks_url = \"https://id.example:844380/jwks\" } }",
            "20: jwks_url \"https://id.example:844380/jwks\" is not understood (write an address such as \"https://id.example/.well-known/jwks.json\")",
        ),
        (
            "strip_prefix = true",
            "auth = { jwt = { jwks_url = { url = \"https://id.example\", refresh = \"1s\" } } }",
            "20: refresh is shorter than 10s (write \"5m\": keys that are missed are asked for at once)",
        ),
        (
            "strip_prefix = true",
            "auth = { jwt = { jwks_url = { url = \"https://id.example\", keep = \"1m\" } } }",
            "20: keep is shorter than refresh (write \"1d\": keys must last until they are had again)",
        ),
        (
            "strip_prefix = true\n",
            "auth = { jwt = { jwks_url = \"https://id.example\" } }\n[[services.front.routes]]\nrespond = 404\npath = \"/x\"\nauth = { jwt = { jwks_url = { url = \"https://id.example\", ca = \"ca.pem\" } } }\n",
            "24: https://id.example is fetched in another way elsewhere (write the same ca, refresh and keep wherever it is named)",
        ),
        ("access_log = true", "clients = {}", "11: clients has no ca (add ca = \"clients-ca.pem\")"),
        (
            "strip_prefix = true",
            "auth = { certificate = { user = \"name\" } }",
            "20: user cannot be \"name\" (choose one of \"common_name\", \"dns\", \"email\", \"uri\")",
        ),
        (
            "strip_prefix = true",
            "auth = { forward = { pool = \"web\", path = \"verify\" } }",
            "20: path \"verify\" is not understood (the path does not begin with /; write a path such as \"/pay\")",
        ),
        (
            "strip_prefix = true",
            "auth = { forward = { pool = \"wbe\", path = \"/verify\" } }",
            "20: there is no pool \"wbe\" (did you mean \"web\"?)",
        ),
        (
            "strip_prefix = true",
            "auth = [{ forward = { pool = \"web\", path = \"/verify\" } }, { key = { keys = \"k\" } }]",
            "20: forward is not the last way to say who one is (put it last: what it answers is what its client gets)",
        ),
    ];
    for (from, to, expected) in cases {
        let shown = complaints(from, to);
        assert!(shown.iter().any(|shown| shown == expected), "{from} -> {to}:\n{}", shown.join("\n"));
        assert!(shown.len() <= 2, "{from} -> {to}:\n{}", shown.join("\n"));
    }
}

#[test]
fn a_route_says_who_may_come_in() {
    let ways = "auth = [{ basic = { users = \"staff\", realm = \"the staff\" } }, { key = { keys = \"/k\", header = \"X-Key\" } }]\n\
                require = { role = [\"admin\", \"staff\"], user = \"anna\" }\nallow = [\"10.0.0.0/8\"]";
    let mut document = Document::parse(&GOOD.replace("strip_prefix = true", ways)).unwrap();
    assert_eq!(document.warnings, []);
    document.config.resolve(std::path::Path::new("/etc/lobby"));
    let guard = &document.config.services["front"].desk.as_ref().unwrap().routes[0].guard;
    assert_eq!(guard.to_string(), "basic or key, role admin or staff, user anna, from 10.0.0.0/8");
    let files: Vec<_> =
        guard.ways.iter().map(|way| (way.file().unwrap().to_str().unwrap(), way.header().unwrap())).collect();
    assert_eq!(files, [("/etc/lobby/staff", "authorization"), ("/k", "x-key")]);
    let told: Vec<_> = guard.identity.iter().map(|(name, claim)| (name.as_str(), claim.as_str())).collect();
    assert_eq!(told, [("x-roles", "role"), ("x-user", "user")]);
    // Passwords in clear text are warned of.
    let plain = GOOD.replace("strip_prefix = true", "auth = { basic = { users = \"staff\" } }");
    let plain = plain.lines().filter(|line| !line.starts_with("tls")).collect::<Vec<_>>().join("\n");
    let warnings = Document::parse(&plain).unwrap().warnings;
    assert!(warnings.len() == 1 && warnings[0].message.contains("clear text"), "{warnings:?}");
}

#[test]
fn routes_that_cannot_be_told_apart_are_refused_with_both_lines() {
    let shown = complaints("host = \"plain.example\"", "exact_path = \"/old\"\nhost = \"*.Shop.example\"");
    assert_eq!(
        shown,
        [
            "26: *.shop.example/old cannot be told apart from the route on line 22, *.shop.example/old: a request may meet both, and neither is narrower (give one of them another host, path, method or header, or remove it)"
        ]
    );
    // The pool of the service is a route like any other.
    let shown = complaints("host = \"plain.example\"\n", "");
    assert!(
        shown.len() == 1 && shown[0].starts_with("10: */* cannot be told apart from the route on line 26"),
        "{shown:?}"
    );
}

#[test]
fn what_is_for_the_desk_alone_is_refused_elsewhere() {
    let text = "interfaces = [\"eth0\"]\n[pools.web]\nbackends = []\n[services.s]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\naccess_log = true\n";
    let why = Document::parse(text).unwrap_err().to_string();
    assert!(why.contains("access_log is for services with routes"), "{why}");
}

#[test]
fn connections_are_handed_on_by_name() {
    let document = |service: &str| {
        format!(
            "interfaces = [\"eth0\"]\n[pools.db]\nbackends = [ {{ address = \"10.0.0.11:5432\" }} ]\n\
             [services.shop]\nlisten = \"203.0.113.10:443/tcp\"\n{service}\n"
        )
    };
    let good =
        Document::parse(&document("passthrough = { \"DB.example\" = \"db\", \"*.db.example\" = \"db\" }"))
            .unwrap();
    assert_eq!(good.warnings, []);
    let desk = good.config.services["shop"].desk.as_ref().unwrap();
    let hosts: Vec<_> = desk.passthrough.iter().map(|(host, _)| host.to_string()).collect();
    assert_eq!(hosts, ["*.db.example", "db.example"]);
    for (service, wanted) in [
        ("passthrough = { \"db.example\" = \"bd\" }", "there is no pool \"bd\" (did you mean \"db\"?)"),
        ("passthrough = {}", "passthrough names nobody"),
        ("passthrough = { \"db.example:443\" = \"db\" }", "write \"db.example\""),
        (
            "passthrough = { \"db.example\" = \"db\", \"DB.example\" = \"db\" }",
            "db.example is handed on twice",
        ),
    ] {
        let refused = Document::parse(&document(service)).unwrap_err();
        let said = refused
            .0
            .iter()
            .map(|it| format!("{} ({})", it.message, it.remedy))
            .collect::<Vec<_>>()
            .join("\n");
        assert!(said.contains(wanted), "{service}: {said}");
    }
}

#[test]
fn the_desk_can_stand_in_for_a_pool() {
    let document = |pool: &str, service: &str| {
        format!(
            "interfaces = [\"eth0\"]\n[pools.web]\nbackends = [ {{ address = \"10.0.0.11:80\" }} ]\n{pool}\n\
             [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n{service}\n"
        )
    };
    let text = document("panic = \"fail\"", "fallback = { pages = { 503 = \"closed.html\" } }");
    let good = Document::parse(&text).unwrap();
    assert_eq!(good.warnings, []);
    let service = &good.config.services["shop"];
    assert!(service.has_fallback() && service.forward == Forward::Nat);
    let desk = service.desk.as_ref().unwrap();
    assert_eq!(desk.routes.iter().map(|route| route.pool()).collect::<Vec<_>>(), [Some("web")]);
    assert!(!Document::parse(&document("", "")).unwrap().config.services["shop"].has_fallback());
    for (pool, service, wanted) in [
        ("", "fallback = \"desk\"", "add panic = \"fail\" to [pools.web]"),
        ("panic = \"fail\"", "fallback = \"moon\"", "cannot be \"moon\""),
        ("panic = \"fail\"", "fallback = { routes = [] }", "has no key routes"),
    ] {
        let refused = Document::parse(&document(pool, service)).unwrap_err().to_string();
        assert!(refused.contains(wanted), "{service}: {refused}");
    }
    let datagrams = document("panic = \"fail\"", "fallback = \"desk\"").replace("/tcp", "/udp");
    assert!(
        Document::parse(&datagrams).unwrap_err().to_string().contains("a TCP service listens on one port")
    );
}

#[test]
fn whoever_speaks_for_others_is_named() {
    let document = |proxies: &str| {
        format!(
            "interfaces = [\"eth0\"]\n[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\n{proxies}\n\
             routes = [ {{ respond = 404 }} ]\n"
        )
    };
    let good = Document::parse(&document("proxies = [\"10.9.0.0/16\"]\nproxy_protocol = true")).unwrap();
    let (_, _, desk) = good.config.at_desk().next().unwrap();
    assert_eq!((desk.proxies.as_slice(), desk.proxy_protocol), (&["10.9.0.0/16".parse().unwrap()][..], true));
    for (proxies, wanted) in [
        ("proxy_protocol = true", "none is named"),
        ("proxies = [\"10.9.0.1/16\"]", "10.9.0.0/16"),
        ("proxies = [\"10.9.0.0/16\"]\nproxy_protocol = \"v2\"", "proxy_protocol"),
    ] {
        let refused = Document::parse(&document(proxies)).unwrap_err().to_string();
        assert!(refused.contains(wanted), "{proxies}: {refused}");
    }
}

#[test]
fn what_makes_requests_stick_is_read_as_it_is_written() {
    let document = |route: &str| {
        let pool = "[pools.web]\nbackends = [ { address = \"10.0.0.11:80\" } ]\n";
        format!(
            "interfaces = [\"eth0\"]\n{pool}[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\n\
             routes = [ {{ {route} }} ]\n"
        )
    };
    for (sticky, wanted) in [
        ("\"source\"", Sticky::Source),
        ("{ header = \"X-User\" }", Sticky::Header("x-user".into())),
        ("{ cookie = \"Lobby\" }", Sticky::Cookie("Lobby".into())),
    ] {
        let document = Document::parse(&document(&format!("pool = \"web\", sticky = {sticky}"))).unwrap();
        let (_, _, desk) = document.config.at_desk().next().unwrap();
        let Action::Forward { sticky, .. } = &desk.routes[0].action else { panic!("{desk:?}") };
        assert_eq!(sticky.as_ref(), Some(&wanted));
    }
    for (route, wanted) in [
        ("pool = \"web\", sticky = true", "sticky"),
        ("pool = \"web\", sticky = \"moon\"", "cannot be \"moon\""),
        ("pool = \"web\", sticky = {}", "does not say by what"),
        ("pool = \"web\", sticky = { header = \"a\", cookie = \"b\" }", "does not say by what"),
        ("pool = \"web\", sticky = { cookie = \"a;b\" }", "a name for the cookie"),
        ("respond = 404, sticky = \"source\"", "and this route has none"),
    ] {
        let refused = Document::parse(&document(route)).unwrap_err().to_string();
        assert!(refused.contains(wanted), "{route}: {refused}");
    }
}
