//! What must hold between the parts of a document.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    complaint::{Place, Places},
    read::{Sink, suggest},
    roles,
};
use crate::model::{
    Backend, BackendAddress, Config, Forward, Panic, Pool, Service, Via,
    desk::{DESK_POOL, Speech},
};

pub(super) fn whole(config: &Config, places: &Places, sink: &mut Sink<'_>) {
    let vips: BTreeSet<IpAddr> = config.services.values().map(|service| service.listen.address).collect();
    let mut listeners = BTreeMap::new();
    for (name, service) in &config.services {
        if let Some(other) = listeners.insert(service.listen, name) {
            let message = format!("services \"{other}\" and \"{name}\" both listen on {}", service.listen);
            let remedy = "give one of them another address, port or protocol";
            sink.complaints.push(places.listen(name).error(message, remedy));
        }
        source_clash(name, config, service, places, sink);
        match config.pools.get(&service.pool) {
            Some(pool) => {
                fits(name, service, pool, places, sink);
                if service.has_fallback() && pool.panic == Panic::Keep {
                    let message = format!(
                        "fallback is for when nobody of pool \"{}\" is fit, and its last servers stay in use then",
                        service.pool
                    );
                    let remedy = format!("add panic = \"fail\" to [pools.{}]", service.pool);
                    sink.complaints.push(places.pool_of_route(name, 0).error(message, remedy));
                }
                roles::fits(name, service, pool, places, sink);
            }
            None => no_pool(config, &service.pool, places, &places.pool_of(name), sink),
        }
    }
    for (name, _, desk) in config.at_desk() {
        let routes = desk.routes.iter().enumerate().flat_map(|(number, route)| {
            let answers = route.pool().map(|pool| (pool, places.pool_of_route(name, number)));
            let ways = route.guard.ways.iter().enumerate();
            let asked = ways.filter_map(move |(at, way)| Some((way.pool()?, places.way(name, number, at))));
            answers.into_iter().chain(asked)
        });
        let passed = desk.passthrough.iter().enumerate();
        let passed = passed.map(|(number, (_, pool))| (pool.as_str(), places.passthrough(name, number)));
        for (pool, place) in routes.chain(passed) {
            match config.pools.get(pool) {
                Some(found) => at_desk(pool, found, &place, sink),
                None => no_pool(config, pool, places, &place, sink),
            }
        }
    }
    same_fetch(config, places, sink);
    let of_desk: BTreeSet<&str> = config.at_desk().flat_map(|(_, _, desk)| desk.pools()).collect();
    let forwards = |service: &&Service| service.forward != Forward::Desk;
    let forwarded = config.services.values().filter(forwards);
    let forwarded: BTreeSet<&str> = forwarded.map(|service| service.pool.as_str()).collect();
    let of_services = config.services.values().map(|service| service.pool.as_str());
    let used: BTreeSet<&str> = of_services.chain(of_desk.iter().copied()).collect();
    for (name, pool) in &config.pools {
        if pool.speech.proxy.is_some() && forwarded.contains(name.as_str()) {
            let message = format!(
                "servers of pool \"{name}\" hear whose a connection is from the desk alone, and packets are forwarded to them too"
            );
            let remedy = "remove proxy_protocol, or use a pool of its own for the desk";
            sink.complaints.push(places.speech(name).error(message, remedy));
        }
        for backend in &pool.backends {
            not_a_vip(name, backend, &vips, places, sink);
        }
        if pool.health.as_ref().is_some_and(|health| health.via == Via::Vip)
            && config.direct_vips(name).next().is_none()
        {
            let message = format!("via = \"vip\", but no service gives pool \"{name}\" a VIP to answer for");
            let remedy = "remove it; it is for pools of TCP services with forward = \"dsr\" on one port";
            sink.complaints.push(places.pool(name).error(message, remedy));
        }
        if !of_desk.contains(name.as_str()) {
            not_of_desk(name, pool, places, sink);
        }
        if !used.contains(name.as_str()) {
            let message = format!("no service uses pool \"{name}\"");
            sink.complaints.push(places.pool(name).warning(message, "name it in a service, or remove it"));
        }
    }
}

fn no_pool(config: &Config, pool: &str, places: &Places, place: &Place<'_>, sink: &mut Sink<'_>) {
    // It may be there and broken, and complained about already.
    if places.has_pool(pool) {
        return;
    }
    let named = config.pools.keys().map(String::as_str).filter(|&name| name != DESK_POOL);
    let remedy = match named.clone().next() {
        None => format!("add [pools.{pool}]"),
        Some(_) => suggest(pool, named),
    };
    sink.complaints.push(place.error(format!("there is no pool \"{pool}\""), remedy));
}

/// What a pool says for the desk is of no use where packets are forwarded as they are.
fn not_of_desk(name: &str, pool: &Pool, places: &Places, sink: &mut Sink<'_>) {
    let said = [
        (pool.speech != Speech::default(), places.speech(name), "protocol, tls and proxy_protocol"),
        (pool.crowd.is_some(), places.crowd(name), "requests"),
        (pool.ejection.is_some(), places.ejection(name), "eject"),
    ];
    for (_, place, keys) in said.into_iter().filter(|(is_said, ..)| *is_said) {
        let message =
            format!("no service with routes uses pool \"{name}\", and packets are forwarded as they are");
        let remedy = format!("remove {keys}, or name the pool in a service with routes");
        sink.complaints.push(place.warning(message, remedy));
    }
}

/// A pool that the desk connects to.
fn at_desk(name: &str, pool: &Pool, place: &Place<'_>, sink: &mut Sink<'_>) {
    if pool.backends.iter().any(|backend| backend.address == BackendAddress::Local) {
        let message = format!("the desk cannot tell where backend local of pool \"{name}\" listens");
        sink.complaints.push(
            place.error(message, "write an address of this host with the port there: \"10.0.0.1:8080\""),
        );
    }
}

/// A service and its pool.
fn fits(name: &str, service: &Service, pool: &Pool, places: &Places, sink: &mut Sink<'_>) {
    let family = |v4| if v4 { "IPv4" } else { "IPv6" };
    let v4 = service.listen.address.is_ipv4();
    let other_family = pool.backends.iter().find(|backend| match backend.address {
        BackendAddress::Remote(ip, _) => ip.is_ipv4() != v4,
        BackendAddress::Local => false,
    });
    if let Some(backend) = other_family {
        let message = format!(
            "an {} service cannot be forwarded to backend {} of pool \"{}\"",
            family(v4),
            backend.address,
            service.pool
        );
        let remedy = format!("use a pool whose backends all have {} addresses", family(v4));
        sink.complaints.push(places.pool_of(name).error(message, remedy));
    }
    if service.forward == Forward::Dsr {
        keeps_port(service, pool, places, sink);
    }
    let number = pool.backends.len();
    if let Some(size) = service.ring_size.filter(|&size| (size as usize) < number) {
        let message = format!("ring_size = {size} has no slot for each of the pool's {number} backends");
        let remedy = format!("write a prime of about {}, a hundred slots for each", 100 * number);
        sink.complaints.push(places.ring_size(name).error(message, remedy));
    }
    if pool.backends.is_empty() {
        let message = format!("pool \"{}\" has no backends: clients of \"{name}\" are refused", service.pool);
        let remedy = "add backends = [ { address = \"10.0.0.11:8080\" } ] to the pool";
        sink.complaints.push(places.pool_of(name).warning(message, remedy));
    }
}

/// What is not translated arrives on the port that was called.
fn keeps_port(service: &Service, pool: &Pool, places: &Places, sink: &mut Sink<'_>) {
    for backend in &pool.backends {
        let BackendAddress::Remote(ip, Some(port)) = backend.address else { continue };
        if service.listen.port != Some(port) {
            let message = format!(
                "backend {} cannot be reached on port {port} with forward = \"dsr\", which leaves the port of {} as it is",
                backend.address, service.listen
            );
            let remedy = match service.listen.port {
                Some(port) => format!("write \"{}\"", std::net::SocketAddr::new(ip, port)),
                None => format!("write \"{ip}\", without a port"),
            };
            sink.complaints.push(places.backend(&service.pool, backend.address).error(message, remedy));
        }
    }
}

/// A backend whose address is a VIP would be sent its own packets.
fn not_a_vip(pool: &str, backend: &Backend, vips: &BTreeSet<IpAddr>, places: &Places, sink: &mut Sink<'_>) {
    let BackendAddress::Remote(ip, _) = backend.address else { return };
    if vips.contains(&ip) {
        let message =
            format!("backend {} has the address of a service: packets would go in circles", backend.address);
        let remedy = "write the server's own address, or address = \"local\" for a server on this host";
        sink.complaints.push(places.backend(pool, backend.address).error(message, remedy));
    }
}

/// A reply to a source address must not look like a request to a service.
fn source_clash(name: &str, config: &Config, service: &Service, places: &Places, sink: &mut Sink<'_>) {
    let ports = config.settings.ports;
    if !config.settings.sources.contains(&service.listen.address) {
        return;
    }
    if service.listen.port.is_none_or(|port| (ports.low..=ports.high).contains(&port)) {
        let message = format!("{} is a source too, and its ports {ports} are for replies", service.listen);
        let remedy = "use another address as source, or choose ports that no service listens on";
        sink.complaints.push(places.listen(name).error(message, remedy));
    }
}

/// One address is fetched in one way.
fn same_fetch(config: &Config, places: &Places, sink: &mut Sink<'_>) {
    let mut fetched = BTreeMap::new();
    for (name, _, desk) in config.at_desk() {
        for (number, route) in desk.routes.iter().enumerate() {
            for (at, way) in route.guard.ways.iter().enumerate() {
                let Some((address, fetch)) = way.source().zip(way.fetch()) else { continue };
                if *fetched.entry(address).or_insert(fetch) != fetch {
                    let message = format!("{} is fetched in another way elsewhere", address.display());
                    let remedy = "write the same ca, refresh and keep wherever it is named";
                    sink.complaints.push(places.way(name, number, at).error(message, remedy));
                }
            }
        }
    }
}
