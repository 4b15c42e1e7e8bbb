//! What only this host can tell about a document: interfaces that are not there, backends that packets
//! would reach past the program, ports that the host gives to its own connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use lb_common::abi;

use super::{certificates, credentials};
use crate::{
    config::{Complaint, Document},
    model::{BackendAddress, Config, Forward, PortRange, Probe},
    netlink::surroundings::{Link, Surroundings},
    probe::check_authorities,
};

/// What a host has that is not in its surroundings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Its own ports.
    pub ports: HostPorts,
    /// Names of the BPF programs that are loaded, by their number; empty without the rights to see them.
    pub programs: BTreeMap<u32, String>,
    /// The time of day, seconds since the epoch.
    pub now: u64,
}

impl Host {
    /// As it is now.
    pub fn read() -> Self {
        let loaded = aya::programs::loaded_programs().filter_map(Result::ok);
        let named = loaded.filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned())));
        Self { ports: HostPorts::read(), programs: named.collect(), now: epoch() }
    }
}

/// The time of day, seconds since the epoch.
pub fn epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The ports that the host gives to its own connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPorts {
    /// `net.ipv4.ip_local_port_range`, which holds for IPv6 too.
    pub range: Option<PortRange>,
    /// `net.ipv4.ip_local_reserved_ports`: left out of it.
    pub reserved: BTreeSet<u16>,
}

impl HostPorts {
    /// As they are set in this network namespace; empty where that cannot be read.
    pub fn read() -> Self {
        let sysctl = |name: &str| {
            std::fs::read_to_string(Path::new("/proc/sys/net/ipv4").join(name)).unwrap_or_default()
        };
        Self::parse(&sysctl("ip_local_port_range"), &sysctl("ip_local_reserved_ports"))
    }

    /// From the texts of the two settings.
    pub fn parse(range: &str, reserved: &str) -> Self {
        let mut ends = range.split_whitespace().map(str::parse);
        let range = match (ends.next(), ends.next()) {
            (Some(Ok(low)), Some(Ok(high))) => Some(PortRange { low, high }),
            _ => None,
        };
        let parts = reserved.trim().split(',').filter_map(|part| {
            let (low, high) = part.split_once('-').unwrap_or((part, part));
            Some(low.trim().parse::<u16>().ok()?..=high.trim().parse::<u16>().ok()?)
        });
        Self { range, reserved: parts.flatten().collect() }
    }

    /// The first and the last port of `ours` that the host may take as well.
    pub fn clash(&self, ours: PortRange) -> Option<PortRange> {
        let range = self.range?;
        let mut both = (ours.low.max(range.low)..=ours.high.min(range.high))
            .filter(|port| !self.reserved.contains(port));
        let low = both.next()?;
        Some(PortRange { low, high: both.next_back().unwrap_or(low) })
    }
}

/// The addresses whose ways a document needs to know: those of backends that packets are sent to. The way
/// to those of the desk is the kernel's affair.
pub fn targets(config: &Config) -> BTreeSet<IpAddr> {
    let of_desk = config.pools_of_desk();
    let pools = config.pools.iter().filter(|(name, _)| !of_desk.contains(name.as_str()));
    let backends = pools.flat_map(|(_, pool)| &pool.backends);
    backends.filter_map(|backend| remote(backend.address)).collect()
}

/// The address of a backend that is not this host itself.
pub fn remote(address: BackendAddress) -> Option<IpAddr> {
    match address {
        BackendAddress::Local => None,
        BackendAddress::Remote(ip, _) => Some(ip),
    }
}

/// Everything that speaks against a document on this host, and what is only odd. `around` knows the
/// ways to its [`targets`].
pub fn complaints(document: &Document, around: &Surroundings, host: &Host) -> Vec<Complaint> {
    let mut complaints = of_host(document, around, host);
    complaints.extend(of_files(document, host.now));
    complaints.sort();
    complaints.dedup();
    complaints
}

/// The same, but for what is in files that the document names.
pub fn of_host(document: &Document, around: &Surroundings, host: &Host) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    interfaces(document, around, host, &mut complaints);
    // Without its interfaces, nothing can be said of ways.
    if complaints.is_empty() {
        backends(document, around, &mut complaints);
        vips(document, around, &mut complaints);
    }
    clashes(document, around, &host.ports, &mut complaints);
    authorities(document, &mut complaints);
    complaints.sort();
    complaints.dedup();
    complaints
}

/// What speaks against the files that a document names, and what is odd about them at this time of day.
pub fn of_files(document: &Document, now: u64) -> Vec<Complaint> {
    let mut complaints = certificates::complaints(document, now);
    complaints.extend(credentials::complaints(document));
    complaints
}

fn interfaces(document: &Document, around: &Surroundings, host: &Host, complaints: &mut Vec<Complaint>) {
    for name in &document.config.interfaces {
        let place = document.places.interface(name);
        let there: Vec<_> =
            around.links.values().filter(|link| link.mac.is_some()).map(|link| link.name.as_str()).collect();
        let choice = format!("this host has: {}", there.join(", "));
        match around.link(name) {
            None => complaints.push(place.error(format!("there is no interface {name:?}"), choice)),
            Some(link) if link.mac.is_none() => {
                complaints.push(place.error(format!("interface {name:?} is no Ethernet"), choice));
            }
            Some(link) if foreign(link, host).is_some() => {
                let program = foreign(link, host).unwrap_or_default();
                complaints.push(place.error(
                    format!("another XDP program, {program:?}, is on interface {name:?}"),
                    format!("an interface runs one; if nobody needs that one: `ip link set {name} xdp off`"),
                ));
            }
            Some(link) if !link.up => complaints.push(
                place
                    .warning(down(name), format!("`ip link set {name} up`; nothing is forwarded until then")),
            ),
            Some(_) => {}
        }
    }
}

/// That an interface is down, in words.
pub fn down(name: &str) -> String {
    format!("interface {name} is down")
}

/// Name of the program on a link, as far as it can be seen.
pub fn program<'h>(link: &Link, host: &'h Host) -> Option<&'h str> {
    host.programs.get(&link.xdp?.program).map(String::as_str)
}

/// The same, if it is certainly none of Lobby's.
fn foreign<'h>(link: &Link, host: &'h Host) -> Option<&'h str> {
    program(link, host).filter(|&name| name != abi::name::PROGRAM)
}

fn backends(document: &Document, around: &Surroundings, complaints: &mut Vec<Complaint>) {
    let config = &document.config;
    let (of_desk, by_pool) = (config.pools_of_desk(), config.services_by_pool());
    for (name, pool) in config.pools.iter().filter(|(name, _)| !of_desk.contains(name.as_str())) {
        let services = by_pool.get(name.as_str()).into_iter().flatten();
        let direct = services.map(|(_, service)| service).find(|service| service.forward == Forward::Dsr);
        for backend in &pool.backends {
            let Some(ip) = remote(backend.address) else { continue };
            let place = document.places.backend(name, backend.address);
            match around.routes.get(&ip) {
                Some(Ok(route)) if route.local => complaints.push(place.error(
                    format!("{ip} is an address of this host"),
                    "write \"local\" for a server on this host",
                )),
                Some(Ok(route)) => {
                    let leaves = around.link_name(route.interface);
                    if !config.interfaces.contains(&leaves) {
                        complaints.push(place.error(
                            format!("packets to {ip} leave by {leaves}, which is not listed: its replies would pass by the program"),
                            format!("add \"{leaves}\" to interfaces, or give {ip} a route by {}", config.interfaces.join(" or ")),
                        ));
                    }
                    if let Some((router, service)) = route.gateway.zip(direct) {
                        complaints.push(place.error(
                            format!("{ip} is behind router {router}, which would send packets to {} back here instead: forward = \"dsr\" changes no addresses", service.listen.address),
                            "use forward = \"nat\", or a backend on a network that this host is on itself",
                        ));
                    }
                }
                Some(Err(why)) => complaints.push(place.warning(
                    format!("there is no route to {ip} ({why})"),
                    "it gets no traffic until there is one: `ip route add`",
                )),
                None => {}
            }
        }
    }
}

fn vips(document: &Document, around: &Surroundings, complaints: &mut Vec<Complaint>) {
    let config = &document.config;
    let mut said = BTreeSet::new();
    for (name, service) in &config.services {
        let address = service.listen.address;
        // Services of the same address need not be warned of each.
        if said.insert(address)
            && !around.is_on_link(address, &config.interfaces)
            && !around.is_hosts_own(address)
        {
            complaints.push(document.places.listen(name).warning(
                format!("{address} is in no network of {}", config.interfaces.join(" or ")),
                "only clients whose router sends it here can reach it; give that router a route, or choose an address of the network",
            ));
        }
    }
}

fn clashes(document: &Document, around: &Surroundings, ports: &HostPorts, complaints: &mut Vec<Complaint>) {
    let settings = &document.config.settings;
    let Some(clash) = ports.clash(settings.ports) else { return };
    // Addresses that only Lobby uses cannot clash with anything.
    let places: Vec<_> = if settings.sources.is_empty() {
        document.config.interfaces.first().map(|name| document.places.interface(name)).into_iter().collect()
    } else {
        let shared = settings.sources.iter().filter(|&&source| around.is_hosts_own(source));
        shared.map(|&source| document.places.source(source)).collect()
    };
    for place in places {
        complaints.push(place.error(
            format!(
                "the ports for translated connections, {}, overlap those that this host gives to its own: {clash}",
                settings.ports
            ),
            format!(
                "`sysctl -w net.ipv4.ip_local_reserved_ports={}`, or choose other ports, or source addresses that the host does not use",
                settings.ports
            ),
        ));
    }
}

fn authorities(document: &Document, complaints: &mut Vec<Complaint>) {
    for (name, pool) in &document.config.pools {
        let Some(Probe::Http { tls: true, verify: true, ca_file: Some(path), .. }) =
            pool.health.as_ref().map(|health| &health.probe)
        else {
            continue;
        };
        if let Err(error) = check_authorities(path) {
            complaints.push(document.places.pool(name).error(
                format!("the health check's ca_file cannot be used: {error}"),
                "name a readable PEM file",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Severity,
        netlink::surroundings::{AttachedXdp, HostAddress, Route},
    };

    const DOCUMENT: &str = r#"interfaces = ["eth0"]

[pools.web]
backends = [
  { address = "10.0.0.11:8080" },
]

[services.shop]
listen = "10.0.0.10:80/tcp"
pool = "web"
"#;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn around() -> Surroundings {
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            mac: Some([2; 6]),
            up: true,
            ..Link::default()
        };
        let route = Route { interface: 2, gateway: None, source: Some(ip("10.0.0.1")), local: false };
        Surroundings {
            links: [(2, link(2, "eth0")), (3, link(3, "eth1"))].into(),
            addresses: vec![HostAddress { address: ip("10.0.0.1"), prefix: 24, interface: 2, ours: false }],
            routes: [(ip("10.0.0.11"), Ok(route))].into(),
            ..Surroundings::default()
        }
    }

    fn check(text: &str, around: &Surroundings, ports: &HostPorts) -> Vec<(Severity, usize, String)> {
        let document = Document::parse(text).unwrap();
        let host = Host {
            ports: ports.clone(),
            programs: [(7, "katran".into()), (8, "lobby".into())].into(),
            now: 0,
        };
        let found = complaints(&document, around, &host);
        found.into_iter().map(|c| (c.severity, c.line, c.message)).collect()
    }

    fn only(text: &str, around: &Surroundings, ports: &HostPorts) -> (Severity, usize, String) {
        let mut all = check(text, around, ports);
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    #[test]
    fn a_document_that_fits_the_host_has_no_complaints() {
        assert_eq!(check(DOCUMENT, &around(), &HostPorts::parse("32768\t60999", "")), []);
    }

    #[test]
    fn a_missing_interface_is_refused() {
        let (severity, line, message) =
            only(&DOCUMENT.replace("eth0", "eth9"), &around(), &HostPorts::default());
        assert_eq!((severity, line), (Severity::Error, 1));
        assert!(message.contains("eth9"), "{message}");
    }

    #[test]
    fn an_interface_with_a_foreign_program_is_refused_and_the_program_named() {
        let mut around = around();
        let mut attach = |program| {
            let eth0 = around.links.get_mut(&2).unwrap();
            eth0.xdp = Some(AttachedXdp { program, native: true });
            check(DOCUMENT, &around, &HostPorts::default())
        };
        assert!(matches!(&attach(7)[..], [(Severity::Error, 1, message)] if message.contains("katran")));
        // Ours, from an earlier daemon; and one that these rights do not let us see.
        assert_eq!(attach(8), []);
        assert_eq!(attach(9), []);
    }

    #[test]
    fn a_backend_by_another_interface_is_refused_at_its_line() {
        let mut around = around();
        around
            .routes
            .insert(ip("10.0.0.11"), Ok(Route { interface: 3, gateway: None, source: None, local: false }));
        let (severity, line, message) = only(DOCUMENT, &around, &HostPorts::default());
        assert_eq!((severity, line), (Severity::Error, 5));
        assert!(message.contains("eth1"), "{message}");
    }

    #[test]
    fn a_router_on_the_way_is_refused_where_addresses_stay_as_they_are() {
        let mut around = around();
        let gateway = Some(ip("10.0.0.254"));
        let route = Route { interface: 2, gateway, source: None, local: false };
        around.routes.insert(ip("10.0.0.11"), Ok(route));
        assert_eq!(check(DOCUMENT, &around, &HostPorts::default()), []);
        let direct = DOCUMENT.replace(":8080", "") + "forward = \"dsr\"\n";
        let (severity, line, message) = only(&direct, &around, &HostPorts::default());
        assert_eq!((severity, line), (Severity::Error, 5));
        assert!(message.contains("10.0.0.254"), "{message}");
    }

    #[test]
    fn a_backend_on_this_host_is_to_be_called_local() {
        let mut around = around();
        around
            .routes
            .insert(ip("10.0.0.11"), Ok(Route { interface: 2, gateway: None, source: None, local: true }));
        let (severity, _, message) = only(DOCUMENT, &around, &HostPorts::default());
        assert_eq!(severity, Severity::Error);
        assert!(message.contains("this host"), "{message}");
    }

    #[test]
    fn a_backend_without_a_route_and_a_vip_in_no_network_are_warnings() {
        let mut around = around();
        around.routes.insert(ip("10.0.0.11"), Err("Network is unreachable".into()));
        assert_eq!(only(DOCUMENT, &around, &HostPorts::default()).0, Severity::Warning);
        let elsewhere = DOCUMENT.replace("10.0.0.10", "203.0.113.10");
        let (severity, line, _) = only(&elsewhere, &self::around(), &HostPorts::default());
        assert_eq!((severity, line), (Severity::Warning, 9));
    }

    #[test]
    fn ports_that_the_host_uses_too_are_refused_unless_reserved_or_on_another_address() {
        let clash = HostPorts::parse("20000 60999", "");
        let (severity, _, message) = only(DOCUMENT, &around(), &clash);
        assert_eq!(severity, Severity::Error);
        assert!(message.contains("20000-32767"), "{message}");
        assert_eq!(check(DOCUMENT, &around(), &HostPorts::parse("20000 60999", "10240-32767")), []);
        assert_eq!(check(DOCUMENT, &around(), &HostPorts::parse("20000 60999", "1,20000-32766,32767\n")), []);
    }

    #[test]
    fn clashes_are_found_to_the_port() {
        let ours = PortRange { low: 100, high: 200 };
        let clash = |range, reserved| HostPorts::parse(range, reserved).clash(ours);
        assert_eq!(clash("201 300", ""), None);
        assert_eq!(clash("200 300", ""), Some(PortRange { low: 200, high: 200 }));
        assert_eq!(clash("150 300", "150-199"), Some(PortRange { low: 200, high: 200 }));
        assert_eq!(clash("1 300", ""), Some(ours));
        assert_eq!(clash("", ""), None);
    }
}
