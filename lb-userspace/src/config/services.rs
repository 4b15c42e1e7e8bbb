//! Services: where they listen, which pool answers, who may come in.

use std::{num::NonZeroU32, ops::Range};

use super::{
    complaint::{Places, Thing},
    read::{Fields, Node, Sink},
    roles, routes,
    settings::check_unicast,
    tls,
};
use crate::{
    maglev,
    model::{
        Forward, Listen, Network, Protocol, Scheduler, Service, Track,
        desk::{
            Action, Condition, DESK_POOL, Desk, HeaderEdits, HostPattern, Pages, PathPattern, ProxyHeader,
            Route,
        },
        guard::{Guard, Way},
    },
};

/// Most slots of a ring; more would only cost memory.
const MOST_SLOTS: u32 = 1_048_573;

pub(super) fn service(
    name: &str,
    node: &Node<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Option<Service> {
    let mut fields = node.table(sink)?;
    let listen = fields.require(sink, "listen", "\"203.0.113.10:80/tcp\"");
    let listen = listen.and_then(|node| {
        let listen: Listen = node.parsed(sink)?;
        check_unicast(listen.address, "VIP", &node.span, sink);
        places.note(Thing::Listen(name.to_owned()), node.span.clone());
        Some(listen)
    });
    if fields.has("routes") || fields.has("tls") || fields.has("passthrough") {
        return at_desk(name, fields, listen, sink, places);
    }
    let pool = fields.require(sink, "pool", "\"web\"");
    let pool = pool.and_then(|node| {
        places.note(Thing::PoolOf(name.to_owned()), node.span.clone());
        node.string(sink).map(str::to_owned)
    });
    let scheduler = fields.read(sink, "scheduler", |node, sink| node.choice(sink, &Scheduler::NAMES));
    let forward =
        fields.read(sink, "forward", |node, sink| forward(node, scheduler.unwrap_or_default(), sink));
    let kind = (forward.unwrap_or_default(), listen.map(|listen| listen.protocol));
    let track = fields.read(sink, "track", |node, sink| track(node, kind, sink));
    let sticky = fields.read(sink, "sticky", |node, sink| sticky(node, kind, sink));
    let ring_size = fields.read(sink, "ring_size", |node, sink| {
        places.note(Thing::RingSize(name.to_owned()), node.span.clone());
        ring_size(node, scheduler.unwrap_or_default(), sink)
    });
    let role = roles::role(&mut fields, forward.unwrap_or_default(), listen, sink);
    let (allow, deny) = firewall(&mut fields, listen, sink);
    const AT_DESK: &str =
        "remove it, or add routes: this service forwards packets and does not look inside connections";
    for key in ["timeouts", "access_log", "pages", "clients"] {
        if let Some(node) = fields.get(key) {
            sink.error(&node.span, format!("{key} is for services with routes"), AT_DESK);
        }
    }
    let desk = fields.read(sink, "fallback", |node, sink| {
        let one_port = matches!(listen, Some(Listen { protocol: Protocol::Tcp, port: Some(_), .. }));
        if let Some(pool) = pool.as_ref().filter(|_| one_port && role.is_none()) {
            return fallback(name, pool, node, sink, places);
        }
        let message =
            "the desk can stand in for a pool where a TCP service listens on one port, whatever the role";
        sink.error(&node.span, message, "remove fallback");
        None
    });
    of_routes(&mut fields, sink);
    fields.finish(sink);
    let datagrams = listen.is_some_and(|listen| listen.protocol == Protocol::Udp);
    let otherwise = if datagrams && sticky != Some(true) { Track::Never } else { Track::Changes };
    Some(Service {
        listen: listen?,
        pool: pool?,
        role,
        scheduler: scheduler.unwrap_or_default(),
        forward: forward.unwrap_or_default(),
        track: track.unwrap_or(otherwise),
        ring_size,
        allow,
        deny,
        desk,
    })
}

/// `"desk"`, or `{ tls, pages, timeouts, access_log }`: what the desk answers while nobody of the pool is fit. Who is there
/// already goes on by it when somebody is again.
fn fallback(
    service: &str,
    pool: &str,
    node: &Node<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Option<Desk> {
    places.note(Thing::PoolOfRoute(service.to_owned(), 0), node.span.clone());
    let mut desk = Desk { routes: vec![everything_else(pool)], ..Desk::default() };
    if !node.is_table() {
        return node.choice(sink, &[("desk", ())]).map(|()| desk);
    }
    let mut fields = node.table(sink)?;
    desk.certificates = fields
        .read(sink, "tls", |node, sink| Some(tls::certificates(service, node, sink, places)))
        .unwrap_or_default();
    desk.pages =
        fields.read(sink, "pages", |node, sink| Some(pages(service, node, sink, places))).unwrap_or_default();
    desk.timeouts = fields.read(sink, "timeouts", routes::timeouts).unwrap_or_default();
    desk.access_log = fields.read(sink, "access_log", access_log).flatten();
    fields.finish(sink);
    Some(desk)
}

/// What is said of each route, and of no service.
fn of_routes(fields: &mut Fields<'_>, sink: &mut Sink<'_>) {
    for key in ["auth", "limits"] {
        if let Some(node) = fields.get(key) {
            let remedy = "write it in the routes that it is for, such as [[services.front.routes]] with path = \"/\" for all requests";
            sink.error(&node.span, format!("{key} is for routes, not for services"), remedy);
        }
    }
}

/// A service of the reception desk: to the packet path one that is forwarded to this host.
fn at_desk(
    name: &str,
    mut fields: Fields<'_>,
    listen: Option<Listen>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Option<Service> {
    let place = places.listen(name);
    let refusal = match listen {
        Some(Listen { protocol: Protocol::Udp, .. }) => {
            Some(("routes and tls are for TCP", "write /tcp, or remove them to forward datagrams"))
        }
        Some(Listen { port: None, .. }) => {
            Some(("a service with routes or tls listens on one port", "write it instead of *: 443, or 80"))
        }
        _ => None,
    };
    sink.complaints.extend(refusal.map(|(message, remedy)| place.error(message, remedy)));
    let packets: [(&'static str, &str); 6] = [
        ("forward", "a request goes to any server by a connection of the desk's own"),
        ("scheduler", "each request goes to the server that has less to do, of two taken at random"),
        ("track", "the desk knows its connections"),
        ("sticky", "requests of a client go to any server"),
        ("ring_size", "there is no ring"),
        ("role", "requests go to any server of the pool"),
    ];
    for (key, instead) in packets {
        if let Some(node) = fields.get(key) {
            let message =
                format!("{key} is for services that forward packets, and this one has routes or tls");
            sink.error(&node.span, message, format!("remove it; {instead}"));
        }
    }
    let certificates = fields
        .read(sink, "tls", |node, sink| Some(tls::certificates(name, node, sink, places)))
        .unwrap_or_default();
    let passthrough =
        fields.read(sink, "passthrough", |node, sink| Some(passthrough(name, node, sink, places)));
    let passthrough = passthrough.unwrap_or_default();
    let clients = fields.get("clients");
    if let Some(node) = clients.as_ref().filter(|_| certificates.is_empty()) {
        let remedy = "add tls = { cert = \"front.pem\", key = \"front.key\" }, or remove it";
        sink.error(&node.span, "clients can show certificates by TLS only, and the service has none", remedy);
    }
    let asks_clients = clients.is_some();
    let clients = clients.and_then(|node| tls::clients(name, &node, sink, places));
    let mut found = match fields.get("routes") {
        Some(node) => routes::routes(name, &node, sink, places),
        None => Vec::new(),
    };
    if let Some(node) = fields.get("pool") {
        places.note(Thing::PoolOfRoute(name.to_owned(), found.len()), node.span.clone());
        found.extend(node.string(sink).map(|pool| (everything_else(pool), node.span.clone())));
    } else if !fields.has("routes") && passthrough.is_empty() {
        let remedy = "add pool = \"web\", or routes";
        sink.error(&fields.span, format!("service \"{name}\" does not say who answers its requests"), remedy);
    }
    routes::check_apart(&found, sink);
    let by_certificate = |way: &Way| matches!(way, Way::Certificate { .. });
    for (_, span) in
        found.iter().filter(|(route, _)| !asks_clients && route.guard.ways.iter().any(by_certificate))
    {
        let remedy = "add clients = { ca = \"clients-ca.pem\" } to the service";
        sink.error(span, "clients are to show certificates, and the service does not ask for them", remedy);
    }
    if certificates.is_empty() {
        let asks = |(route, _): &&(Route, Range<usize>)| !route.guard.ways.is_empty();
        for (_, span) in found.iter().filter(asks) {
            let message = "what says who one is goes in clear text: the service has no tls";
            sink.warning(
                span,
                message,
                "add tls = { cert = \"front.pem\", key = \"front.key\" } to the service",
            );
        }
    }
    let timeouts = fields.read(sink, "timeouts", routes::timeouts).unwrap_or_default();
    let access_log = fields.read(sink, "access_log", access_log).flatten();
    let pages =
        fields.read(sink, "pages", |node, sink| Some(pages(name, node, sink, places))).unwrap_or_default();
    let (allow, deny) = firewall(&mut fields, listen, sink);
    let proxies: Vec<Network> =
        networks(&mut fields, "proxies", listen, sink).into_iter().map(|(network, _)| network).collect();
    let proxy_header = fields.read(sink, "proxy_header", |node, sink| {
        let all = [("x-forwarded-for", ProxyHeader::ForwardedFor), ("forwarded", ProxyHeader::Forwarded)];
        node.choice(sink, &all)
    });
    let [proxy_protocol, proxy_host, proxy_request_id] = ["proxy_protocol", "proxy_host", "proxy_request_id"]
        .map(|key| {
            let wanted = fields.read(sink, key, |node, sink| {
                let wanted = node.boolean(sink)?;
                if wanted && proxies.is_empty() {
                    let remedy = "add proxies = [\"10.9.0.0/16\"]: from anybody else it could say anything";
                    sink.error(&node.span, format!("{key} is for proxies, and none is named"), remedy);
                }
                Some(wanted)
            });
            wanted.unwrap_or(false)
        });
    of_routes(&mut fields, sink);
    fields.finish(sink);
    let routes = found.into_iter().map(|(route, _)| route).collect();
    Some(Service {
        role: None,
        listen: listen?,
        pool: DESK_POOL.to_owned(),
        scheduler: Scheduler::Maglev,
        forward: Forward::Desk,
        track: Track::Never,
        // One backend: the fewest slots that a ring can have.
        ring_size: Some(2),
        allow,
        deny,
        desk: Some(Desk {
            certificates,
            clients,
            passthrough,
            routes,
            timeouts,
            access_log,
            proxies,
            proxy_header: proxy_header.unwrap_or_default(),
            proxy_host,
            proxy_request_id,
            proxy_protocol,
            pages,
        }),
    })
}

/// `true`, `false` or `{ one_in = 100 }`.
fn access_log(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Option<NonZeroU32>> {
    if !node.is_table() {
        return node.boolean(sink).map(|wanted| wanted.then_some(NonZeroU32::MIN));
    }
    let mut fields = node.table(sink)?;
    let one_in = fields.require(sink, "one_in", "100");
    fields.finish(sink);
    one_in?.integer(sink, 1..=1_000_000).map(NonZeroU32::new)
}

/// Pools by the names that clients ask for.
fn passthrough(
    service: &str,
    node: &Node<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Vec<(HostPattern, String)> {
    let mut passed: Vec<(HostPattern, String)> = Vec::new();
    let Some(fields) = node.table(sink) else { return passed };
    for (name, span, node) in fields.named("name") {
        let (Some(host), Some(pool)) = (routes::host_pattern(name, &span, sink), node.string(sink)) else {
            continue;
        };
        if passed.iter().any(|(other, _)| *other == host) {
            sink.error(&span, format!("{host} is handed on twice"), "keep one of the two");
        }
        places.note(Thing::Passthrough(service.to_owned(), passed.len()), span);
        passed.push((host, pool.to_owned()));
    }
    if passed.is_empty() {
        sink.error(&node.span, "passthrough names nobody", "write { \"db.example\" = \"db\" }, or remove it");
    }
    passed
}

/// Pages by status, and `default` for all others.
fn pages(service: &str, node: &Node<'_>, sink: &mut Sink<'_>, places: &mut Places) -> Pages {
    let mut pages = Pages::default();
    let Some(fields) = node.table(sink) else { return pages };
    for (name, span, node) in fields.named("page") {
        let Some(file) = node.file(sink, "\"closed.html\"") else { continue };
        places.note(Thing::FileOf(service.to_owned(), format!("page {name}")), span.clone());
        match name.parse() {
            Ok(status) if (400..=599).contains(&status) => _ = pages.by_status.insert(status, file),
            _ if name == "default" => pages.otherwise = Some(file),
            _ => {
                let remedy = "write a status from 400 to 599, such as 503, or default for all others";
                sink.error(&span, format!("there is no page for \"{name}\""), remedy);
            }
        }
    }
    pages
}

/// The route of requests that meet no other.
fn everything_else(pool: &str) -> Route {
    Route {
        condition: Condition {
            host: HostPattern::Any,
            path: PathPattern::Prefix("/".into()),
            methods: std::collections::BTreeSet::new(),
            headers: std::collections::BTreeMap::new(),
        },
        guard: Guard::default(),
        limits: Vec::new(),
        action: Action::Forward {
            pool: pool.to_owned(),
            rewrite: None,
            sticky: None,
            headers: HeaderEdits::default(),
        },
        response_headers: HeaderEdits::default(),
    }
}

pub(super) fn firewall(
    fields: &mut Fields<'_>,
    listen: Option<Listen>,
    sink: &mut Sink<'_>,
) -> (Vec<Network>, Vec<Network>) {
    let allow = networks(fields, "allow", listen, sink);
    let deny = networks(fields, "deny", listen, sink);
    for (network, span) in &deny {
        if allow.iter().any(|(other, _)| other == network) {
            let message = format!("{network} is both allowed and denied");
            sink.error(span, message, "remove one of the two; of two that overlap the longer prefix decides");
        }
    }
    let bare =
        |networks: Vec<(Network, Range<usize>)>| networks.into_iter().map(|(network, _)| network).collect();
    (bare(allow), bare(deny))
}

fn forward(node: &Node<'_>, scheduler: Scheduler, sink: &mut Sink<'_>) -> Option<Forward> {
    if let later @ ("ipip" | "gue") = node.string(sink)? {
        let message = format!("forward = \"{later}\" is not in this version of Lobby");
        let remedy = "write forward = \"nat\", which works with any backend, or \"dsr\" if the backends are on the same network and have the VIP";
        sink.error(&node.span, message, remedy);
        return None;
    }
    let forward = node.choice(sink, &[("nat", Forward::Nat), ("dsr", Forward::Dsr)])?;
    let conflict = match scheduler {
        Scheduler::RoundRobin => Some("so they cannot be given out in turn"),
        Scheduler::Source => Some("and each packet's goes by what is its own: its ports too"),
        Scheduler::Maglev => None,
    };
    if let Some(conflict) = conflict.filter(|_| forward == Forward::Dsr) {
        let message = format!("with forward = \"dsr\" connections are not kept, {conflict}");
        sink.error(&node.span, message, "write forward = \"nat\", or remove scheduler");
    }
    Some(forward)
}

type Kind = (Forward, Option<Protocol>);

fn track(node: &Node<'_>, (forward, protocol): Kind, sink: &mut Sink<'_>) -> Option<Track> {
    let track = node.choice(sink, &[("changes", Track::Changes), ("always", Track::Always)])?;
    if protocol == Some(Protocol::Udp) && track == Track::Changes {
        let remedy = "write sticky = true, or remove it: then each datagram is for itself";
        sink.error(&node.span, "of UDP, connections are kept only where the service says so", remedy);
    }
    if forward == Forward::Nat {
        let remedy = "remove it; with forward = \"nat\" every connection is tracked";
        sink.error(&node.span, "track is for services that do not translate", remedy);
    }
    Some(track)
}

fn sticky(node: &Node<'_>, (forward, protocol): Kind, sink: &mut Sink<'_>) -> Option<bool> {
    let sticky = node.boolean(sink)?;
    if forward == Forward::Nat || protocol == Some(Protocol::Tcp) {
        let remedy = "remove it; connections of this service stay with their backend anyway";
        sink.error(&node.span, "sticky is for UDP services that do not translate", remedy);
    }
    Some(sticky)
}

fn ring_size(node: &Node<'_>, scheduler: Scheduler, sink: &mut Sink<'_>) -> Option<u32> {
    let size = node.integer(sink, 2..=MOST_SLOTS)?;
    if scheduler == Scheduler::RoundRobin {
        let remedy = "remove it: a round-robin ring is as long as its weights ask for";
        sink.error(&node.span, "ring_size is not for scheduler = \"round-robin\"", remedy);
    } else if !maglev::is_prime(size) {
        let below = (2..size).rev().find(|&n| maglev::is_prime(n)).unwrap_or(2);
        let above = (size..=MOST_SLOTS).find(|&n| maglev::is_prime(n)).unwrap_or(MOST_SLOTS);
        sink.error(
            &node.span,
            format!("ring_size = {size} is not prime, so some slots could never be reached by some backends"),
            format!("write {below} or {above}"),
        );
    }
    Some(size)
}

fn networks(
    fields: &mut Fields<'_>,
    key: &'static str,
    listen: Option<Listen>,
    sink: &mut Sink<'_>,
) -> Vec<(Network, Range<usize>)> {
    let Some(node) = fields.get(key) else {
        return Vec::new();
    };
    let mut networks: Vec<(Network, Range<usize>)> = Vec::new();
    for (network, span) in node.list(sink, Node::parsed::<Network>) {
        if networks.iter().any(|(other, _)| *other == network) {
            sink.error(&span, format!("{network} is listed twice"), "remove one of the two");
            continue;
        }
        if listen.is_some_and(|listen| listen.address.is_ipv4() != network.address.is_ipv4()) {
            let message =
                format!("{network} is of the other family than the service: no client of it can come");
            sink.warning(&span, message, "remove it, or put it in a service that listens on that family");
        }
        networks.push((network, span));
    }
    if networks.is_empty()
        && key == "allow"
        && node.array(&mut Sink::new("")).is_some_and(|items| items.is_empty())
    {
        let remedy = "remove it to let everybody in, or write deny = [\"0.0.0.0/0\"] to let nobody in";
        sink.error(&node.span, "allow names nobody", remedy);
    }
    networks
}
