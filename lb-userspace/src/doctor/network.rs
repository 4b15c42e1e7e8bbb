//! Interfaces, the host's own settings that touch them, and backends.

use std::net::SocketAddr;

use super::{Facts, Finding, Verdict};
use crate::{
    config::{Document, Severity},
    daemon::checks,
    model::BackendAddress,
    netlink::surroundings::Link,
    probe::ProbeError,
};

/// The largest MTU of an interface whose peer, or driver, runs a plain XDP program natively: a page of
/// 4096 bytes, less headroom (256), the kernel's trailer (320) and an Ethernet header (14).
const LARGEST_NATIVE_MTU: u32 = 3506;

/// Offloads that leave a checksum to be filled in later: what a veth peer sends then arrives unfinished.
const TX_CHECKSUM: [&str; 3] = ["tx-checksum-ip-generic", "tx-checksum-ipv4", "tx-checksum-ipv6"];

pub(super) fn examine(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(document) = &facts.document else {
        findings.push(Finding::bad(
            Verdict::Note,
            "document",
            "none to look at, so interfaces and backends were not",
            "`lb doctor --config FILE`, or start the daemon first",
        ));
        return findings;
    };
    findings.extend(complaints(document, facts));
    for name in &document.config.interfaces {
        if let Some(link) = facts.around.link(name) {
            findings.extend(interface(link, facts));
        }
    }
    findings.push(forwarding(facts));
    for name in &document.config.interfaces {
        findings.extend(rp_filter(name, document, facts));
    }
    findings.extend(backends(document, facts));
    findings
}

/// What the daemon too would say about the document.
fn complaints(document: &Document, facts: &Facts) -> Vec<Finding> {
    let mut found = checks::complaints(document, &facts.around, &facts.host);
    // The interface itself says so, and that it hinders.
    found.retain(|complaint| !facts.down().any(|name| complaint.message == checks::down(name)));
    if found.is_empty() {
        return vec![Finding::good("document", "fits this host")];
    }
    let judge = |severity| if severity == Severity::Error { Verdict::Problem } else { Verdict::Warning };
    found
        .into_iter()
        .map(|c| Finding::bad(judge(c.severity), format!("document line {}", c.line), c.message, c.remedy))
        .collect()
}

fn interface(link: &Link, facts: &Facts) -> Vec<Finding> {
    let subject = format!("interface {}", link.name);
    let mut findings = Vec::new();
    if !link.up {
        findings.push(Finding::bad(
            Verdict::Problem,
            &subject,
            "is down: nothing is forwarded by it",
            format!(
                "`ip link set {} up`; where it is switched on, its cable or its other end is not",
                link.name
            ),
        ));
    }
    match link.xdp {
        Some(xdp) if xdp.native => {
            findings.push(Finding::good(&subject, "XDP runs in the driver (native)"));
        }
        Some(_) => {
            let driver = facts.drivers.get(&link.name).map_or("its driver", String::as_str);
            findings.push(Finding::bad(
                Verdict::Warning,
                &subject,
                format!("the program runs in the stack (generic), several times slower: {driver} would not run it natively"),
                format!(
                    "MTU of at most {LARGEST_NATIVE_MTU} (now {}), `ethtool -K {} lro off`, then start the daemon again; else another driver",
                    link.mtu, link.name
                ),
            ));
        }
        None => findings.push(Finding::bad(
            Verdict::Note,
            &subject,
            "no program is attached",
            "`lb run` attaches it",
        )),
    }
    if link.mtu > LARGEST_NATIVE_MTU {
        findings.push(Finding::bad(
            if link.veth { Verdict::Problem } else { Verdict::Warning },
            &subject,
            format!("an MTU of {} is too large for a plain native program", link.mtu),
            format!("`ip link set {} mtu 1500` on both ends, before the daemon starts", link.name),
        ));
    }
    if link.veth {
        findings.extend(peer(link, &subject, facts));
    } else if has_vlans(link, facts) && is_on(&link.name, "rx-vlan-hw-parse", facts) {
        findings.push(Finding::bad(
            Verdict::Problem,
            &subject,
            "its driver takes VLAN tags out of frames before the program sees them: what Lobby sends back has none",
            format!("`ethtool -K {} rxvlan off`", link.name),
        ));
    }
    findings
}

/// Whether there are VLANs on an interface.
fn has_vlans(link: &Link, facts: &Facts) -> bool {
    facts.around.links.values().any(|other| other.vlan && other.lower == Some(link.index))
}

/// Whether an interface has an offload, as far as it can be seen.
fn is_on(interface: &str, offload: &str, facts: &Facts) -> bool {
    facts.features.get(interface).is_some_and(|on| on.contains(offload))
}

/// The other end of a veth pair: seen if it is in this namespace, else described.
fn peer(link: &Link, subject: &str, facts: &Facts) -> Vec<Finding> {
    let other = link.lower.and_then(|index| facts.around.links.get(&index)).filter(|other| {
        // The index alone may be another namespace's, even our own number there.
        other.veth && other.lower == Some(link.index) && other.index != link.index
    });
    let Some(other) = other else {
        return vec![Finding::bad(
            Verdict::Note,
            subject,
            "its other end is in another namespace and cannot be seen from here",
            "there, as root: `ethtool -K PEER tx off` (else its packets arrive with unfinished checksums) and `ethtool -K PEER gro on` (else what Lobby sends it vanishes)",
        )];
    };
    let mut findings = Vec::new();
    if let Some(on) = facts.features.get(&other.name) {
        if TX_CHECKSUM.iter().any(|name| on.contains(*name)) {
            findings.push(Finding::bad(
                Verdict::Problem,
                subject,
                format!("its other end, {}, leaves checksums unfinished: translated packets are discarded by who gets them", other.name),
                format!("`ethtool -K {} tx off`", other.name),
            ));
        }
        if has_vlans(link, facts) && on.contains("tx-vlan-hw-insert") {
            findings.push(Finding::bad(
                Verdict::Problem,
                subject,
                format!(
                    "its other end, {}, leaves VLAN tags outside of frames, where the program does not see them: what Lobby sends back has none",
                    other.name
                ),
                format!("`ethtool -K {} txvlan off`", other.name),
            ));
        }
        if !on.contains("rx-gro") && other.xdp.is_none() {
            findings.push(Finding::bad(
                Verdict::Problem,
                subject,
                format!(
                    "its other end, {}, has neither GRO nor an XDP program: what Lobby sends it vanishes",
                    other.name
                ),
                format!("`ethtool -K {} gro on`", other.name),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::good(subject, format!("its other end, {}, is set as it must be", other.name)));
    }
    findings
}

fn forwarding(facts: &Facts) -> Finding {
    // nat is translated both ways by the program; the stack forwards nothing.
    let message = if facts.ip_forward {
        "the stack forwards packets that are not Lobby's"
    } else {
        "the stack forwards nothing; nat does not need it, since the program sends packets out itself"
    };
    Finding::good("ip_forward", message)
}

fn rp_filter(name: &str, document: &Document, facts: &Facts) -> Option<Finding> {
    let strict = facts.rp_filter.get(name).is_some_and(|&value| value == 1);
    let several = document.config.interfaces.len() > 1;
    (strict && several).then(|| {
        Finding::bad(
            Verdict::Warning,
            format!("interface {name}"),
            "strict reverse path filter: packets for the host itself, such as answers to health checks and clients of `local` backends, are dropped when their way back is by another interface",
            format!("`sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{name}.rp_filter=2`"),
        )
    })
}

fn backends(document: &Document, facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let of_desk = document.config.pools_of_desk();
    for (pool, contents) in &document.config.pools {
        for backend in &contents.backends {
            let BackendAddress::Remote(ip, _) = backend.address else { continue };
            let subject = format!("backend {} of {pool}", backend.address);
            let before = findings.len();
            // The desk connects as any program does: the connection that was tried says whether it can.
            if !of_desk.contains(pool.as_str())
                && let Err(why) = facts.around.next_hop(ip)
            {
                findings.push(Finding::bad(
                    Verdict::Problem,
                    &subject,
                    why.to_string(),
                    format!(
                        "`ip route get {ip}` and `ip neigh` show what the kernel knows; ping it from here"
                    ),
                ));
            }
            if let Some(Err(why)) = facts.reached.get(&(pool.clone(), backend.address)) {
                findings.push(Finding::bad(
                    Verdict::Problem,
                    &subject,
                    format!("unreachable from here: {why}"),
                    "is the server running, does it listen on that address, does a firewall let this host in?",
                ));
            }
            for ((_, _, vip), outcome) in
                facts.answered.iter().filter(|((p, address, _), _)| p == pool && *address == backend.address)
            {
                findings.extend(answers_for(*vip, outcome, &subject));
            }
            if findings.len() == before {
                findings.push(Finding::good(&subject, "reachable"));
            }
        }
    }
    findings
}

/// What it means that a backend does not answer for a service's address.
fn answers_for(vip: SocketAddr, outcome: &Result<(), ProbeError>, subject: &str) -> Option<Finding> {
    let (ip, length) = (vip.ip(), if vip.is_ipv4() { 32 } else { 128 });
    match outcome {
        Ok(()) => None,
        Err(ProbeError::NotItsAddress(_)) => Some(Finding::bad(
            Verdict::Problem,
            subject,
            format!("does not answer for {vip}, as forward = \"dsr\" needs"),
            format!(
                "on that server: `ip addr add {ip}/{length} dev lo`, and let nobody ask for it there (arp_ignore=1, arp_announce=2); see \"Direct server return\" in the README"
            ),
        )),
        Err(ProbeError::Connect(_)) => Some(Finding::bad(
            Verdict::Problem,
            subject,
            format!("has {ip}, but nothing listens on port {} there", vip.port()),
            "let the server listen on that address too, or on all",
        )),
        Err(why) => Some(Finding::bad(
            Verdict::Note,
            subject,
            format!("could not be asked for {vip}: {why}"),
            "run doctor as root",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::surroundings::{AttachedXdp, Route, Surroundings};
    use std::net::IpAddr;

    fn document() -> Document {
        let text = r#"interfaces = ["eth0"]
[pools.web]
backends = [ { address = "10.0.0.11:8080" } ]
[services.shop]
listen = "10.0.0.10:80/tcp"
pool = "web"
"#;
        Document::parse(text).unwrap()
    }

    /// A host where all is well.
    fn facts() -> Facts {
        let ip: IpAddr = "10.0.0.11".parse().unwrap();
        let native = AttachedXdp { program: 7, native: true };
        let eth0 = Link {
            index: 2,
            name: "eth0".into(),
            mac: Some([2; 6]),
            mtu: 1500,
            up: true,
            xdp: Some(native),
            ..Link::default()
        };
        let route = Route { interface: 2, gateway: None, source: None, local: false };
        let host = crate::netlink::surroundings::HostAddress {
            address: "10.0.0.1".parse().unwrap(),
            prefix: 24,
            interface: 2,
            ours: false,
        };
        Facts {
            around: Surroundings {
                links: [(2, eth0)].into(),
                addresses: vec![host],
                routes: [(ip, Ok(route))].into(),
                neighbours: [((2, ip), [2; 6])].into(),
                ..Surroundings::default()
            },
            document: Some(document()),
            ..Facts::default()
        }
    }

    fn wrong(facts: &Facts) -> Vec<Finding> {
        examine(facts).into_iter().filter(|finding| finding.verdict != Verdict::Good).collect()
    }

    fn only(facts: &Facts) -> Finding {
        let mut all = wrong(facts);
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    #[test]
    fn a_backend_of_the_desk_needs_no_next_hop() {
        let mut facts = facts();
        let text = r#"interfaces = ["eth0"]
[pools.web]
backends = [ { address = "10.0.0.12:8080" } ]
[services.shop]
listen = "10.0.0.10:80/tcp"
routes = [{ pool = "web" }]
"#;
        facts.document = Some(Document::parse(text).unwrap());
        assert_eq!(wrong(&facts), []);
        // Whether it takes a connection is asked all the same.
        let key = ("web".to_owned(), "10.0.0.12:8080".parse().unwrap());
        facts.reached.insert(key, Err("connection refused".into()));
        assert_eq!(only(&facts).subject, "backend 10.0.0.12:8080 of web");
    }

    /// eth0 becomes one end of a veth pair in this namespace.
    fn with_peer(xdp: Option<AttachedXdp>, features: &[&str]) -> Facts {
        let mut facts = facts();
        let eth0 = facts.around.links.get_mut(&2).unwrap();
        (eth0.veth, eth0.lower) = (true, Some(3));
        let other =
            Link { index: 3, name: "peer0".into(), veth: true, lower: Some(2), xdp, ..Link::default() };
        facts.around.links.insert(3, other);
        facts.features.insert("peer0".into(), features.iter().map(|&f| f.into()).collect());
        facts
    }

    #[test]
    fn a_host_where_all_is_well_has_nothing_wrong() {
        assert_eq!(wrong(&facts()), []);
        assert_eq!(wrong(&with_peer(None, &["rx-gro"])), []);
    }

    #[test]
    fn a_backend_without_a_neighbour_is_a_problem() {
        let mut facts = facts();
        facts.around.silent = std::mem::take(&mut facts.around.neighbours).into_keys().collect();
        let finding = only(&facts);
        assert_eq!(finding.verdict, Verdict::Problem);
        assert!(finding.message.contains("ARP"), "{finding:?}");
    }

    #[test]
    fn a_backend_that_refuses_connections_is_a_problem() {
        let mut facts = facts();
        let key = ("web".to_owned(), "10.0.0.11:8080".parse().unwrap());
        facts.reached.insert(key, Err("connection refused".into()));
        let finding = only(&facts);
        assert_eq!(
            (finding.verdict, finding.subject.as_str()),
            (Verdict::Problem, "backend 10.0.0.11:8080 of web")
        );
    }

    #[test]
    fn a_backend_that_does_not_answer_for_the_vip_is_a_problem() {
        let vip = "10.0.0.10:80".parse().unwrap();
        let asked = |outcome| {
            let mut facts = facts();
            facts.answered.insert(("web".to_owned(), "10.0.0.11:8080".parse().unwrap(), vip), outcome);
            wrong(&facts)
        };
        assert_eq!(asked(Ok(())), []);
        let silent = asked(Err(ProbeError::NotItsAddress(vip)));
        assert!(
            matches!(&silent[..], [finding] if finding.remedy.contains("ip addr add 10.0.0.10/32 dev lo"))
        );
        let refuses = asked(Err(ProbeError::Connect("refused".into())));
        assert!(matches!(&refuses[..], [finding] if finding.message.contains("port 80")), "{refuses:?}");
    }

    #[test]
    fn a_foreign_program_is_named() {
        let mut facts = facts();
        facts.host.programs.insert(7, "lobby".into());
        assert_eq!(wrong(&facts), []);
        facts.host.programs.insert(7, "katran".into());
        let finding = only(&facts);
        assert_eq!(finding.verdict, Verdict::Problem);
        assert!(finding.message.contains("katran"), "{finding:?}");
    }

    #[test]
    fn generic_mode_and_large_frames_are_named() {
        let mut facts = facts();
        let eth0 = facts.around.links.get_mut(&2).unwrap();
        eth0.xdp = Some(AttachedXdp { program: 7, native: false });
        assert!(only(&facts).message.contains("generic"));
        let eth0 = facts.around.links.get_mut(&2).unwrap();
        eth0.xdp = Some(AttachedXdp { program: 7, native: true });
        eth0.mtu = 3507;
        assert_eq!(only(&facts).verdict, Verdict::Warning);
        facts.around.links.get_mut(&2).unwrap().mtu = 3506;
        assert_eq!(wrong(&facts), []);
    }

    #[test]
    fn a_peer_with_checksum_offload_or_without_napi_is_a_problem() {
        let finding = only(&with_peer(None, &["rx-gro", "tx-checksum-ip-generic"]));
        assert!(finding.remedy.contains("ethtool -K peer0 tx off"), "{finding:?}");
        let finding = only(&with_peer(None, &[]));
        assert!(finding.remedy.contains("gro on"), "{finding:?}");
        let native = AttachedXdp { program: 9, native: true };
        assert_eq!(wrong(&with_peer(Some(native), &[])), []);
    }

    #[test]
    fn tags_that_the_program_would_not_see_are_a_problem_where_there_are_vlans() {
        let vlan = Link { index: 5, name: "eth0.10".into(), vlan: true, lower: Some(2), ..Link::default() };
        let mut facts = facts();
        facts.features.insert("eth0".into(), ["rx-vlan-hw-parse".into()].into());
        assert_eq!(wrong(&facts), []);
        facts.around.links.insert(5, vlan.clone());
        assert!(only(&facts).remedy.contains("ethtool -K eth0 rxvlan off"));

        let mut facts = with_peer(None, &["rx-gro", "tx-vlan-hw-insert"]);
        facts.features.insert("eth0".into(), ["rx-vlan-hw-parse".into()].into());
        assert_eq!(wrong(&facts), []);
        facts.around.links.insert(5, vlan);
        assert!(only(&facts).remedy.contains("ethtool -K peer0 txvlan off"));
    }

    #[test]
    fn a_peer_elsewhere_is_described() {
        let mut facts = facts();
        let eth0 = facts.around.links.get_mut(&2).unwrap();
        (eth0.veth, eth0.lower) = (true, Some(2));
        let finding = only(&facts);
        assert_eq!(finding.verdict, Verdict::Note);
        assert!(finding.remedy.contains("tx off") && finding.remedy.contains("gro on"));
        // An interface here that happens to have the peer's number, and is another pair's end.
        let mut facts = with_peer(None, &[]);
        facts.around.links.get_mut(&3).unwrap().lower = Some(9);
        assert_eq!(only(&facts).verdict, Verdict::Note);
    }

    #[test]
    fn port_clashes_come_from_the_documents_check() {
        let mut facts = facts();
        facts.host.ports = checks::HostPorts::parse("10000 20000", "");
        assert_eq!(only(&facts).verdict, Verdict::Problem);
    }

    #[test]
    fn a_strict_reverse_path_filter_matters_with_several_interfaces() {
        let mut facts = facts();
        facts.rp_filter.insert("eth0".into(), 1);
        assert_eq!(wrong(&facts), []);
        let text = "interfaces = [\"eth0\", \"eth1\"]\n[pools.web]\nbackends = [ { address = \"10.0.0.11:8080\" } ]\n[services.shop]\nlisten = \"10.0.0.10:80/tcp\"\npool = \"web\"\n";
        facts.document = Some(Document::parse(text).unwrap());
        let eth1 = Link { index: 4, name: "eth1".into(), ..facts.around.links[&2].clone() };
        facts.around.links.insert(4, eth1);
        assert!(only(&facts).message.contains("reverse path"));
    }
}
