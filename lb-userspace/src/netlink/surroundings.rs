//! What the daemon knows of links, addresses, routes and neighbours at one moment, and what follows
//! from it. Plain data: the tests build it by hand.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::dataplane::NextHop;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Links, addresses, and the ways to the addresses that were asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Surroundings {
    /// All links, by interface index.
    pub links: BTreeMap<u32, Link>,
    /// All addresses of this host.
    pub addresses: Vec<HostAddress>,
    /// The way to each address that was asked for; an error in words where there is none.
    pub routes: BTreeMap<IpAddr, Result<Route, String>>,
    /// MAC addresses of the neighbours on those ways, by interface and address; only those that the
    /// kernel would use now.
    pub neighbours: BTreeMap<(u32, IpAddr), Mac>,
    /// Those of them that were asked for, by interface and address, and did not answer.
    pub silent: BTreeSet<(u32, IpAddr)>,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Its Ethernet address; `None` for links without.
    pub mac: Option<Mac>,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Switched on and with a carrier.
    pub up: bool,
    /// One end of a pair of virtual interfaces.
    pub veth: bool,
    /// It is a VLAN of the interface that it lies on.
    pub vlan: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// Interface that this one lies on, or its other end (veth in the same namespace).
    pub lower: Option<u32>,
    /// The XDP program that is attached.
    pub xdp: Option<AttachedXdp>,
}

/// An XDP program on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachedXdp {
    /// Program identifier.
    pub program: u32,
    /// Run by the driver (native), rather than by the stack (generic).
    pub native: bool,
}

/// An address of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostAddress {
    /// The address.
    pub address: IpAddr,
    /// Its network's prefix length.
    pub prefix: u8,
    /// Interface index.
    pub interface: u32,
    /// Put there by Lobby (`IFA_PROTO`, Linux 5.18).
    pub ours: bool,
}

/// The way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Interface index.
    pub interface: u32,
    /// Router, unless the address is on the link.
    pub gateway: Option<IpAddr>,
    /// The address that the kernel would send from.
    pub source: Option<IpAddr>,
    /// The address is the host's own.
    pub local: bool,
}

impl Route {
    /// Whose MAC address a packet to `target` carries.
    pub fn neighbour(&self, target: IpAddr) -> IpAddr {
        self.gateway.unwrap_or(target)
    }

    /// Whether the kernel knows nothing better to send from than what is good for the link alone (RFC 6724
    /// section 5, rule 2).
    pub fn lacks_source(&self) -> bool {
        match self.source {
            Some(IpAddr::V6(source)) => source.is_unicast_link_local(),
            source => source.is_none(),
        }
    }
}

/// Why there is no next hop to an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoNextHop {
    /// Not asked for yet.
    #[error("the way to {0} has not been looked up yet")]
    Unknown(IpAddr),
    /// The kernel has no route.
    #[error("no route to {0}: {1}; add one with `ip route add`")]
    NoRoute(IpAddr, String),
    /// It is this host.
    #[error("{0} is an address of this host; a backend on this host is written \"local\"")]
    Local(IpAddr),
    /// The route's interface is not there, or is no Ethernet.
    #[error("the way to {0} leaves by interface {1}, which has no Ethernet address")]
    NotEthernet(IpAddr, String),
    /// ARP or neighbour discovery has brought nothing so far, and has not been given up.
    #[error("{neighbour} is being asked for by {} on {interface}, and has not answered yet", question(.neighbour))]
    Asked {
        /// Who is asked for.
        neighbour: IpAddr,
        /// Where.
        interface: String,
    },
    /// ARP or neighbour discovery brings nothing.
    #[error("{neighbour} does not answer {} on {interface}; is it up, and in the same network?", question(.neighbour))]
    Silent {
        /// Who does not answer.
        neighbour: IpAddr,
        /// Where.
        interface: String,
    },
}

impl NoNextHop {
    /// Whether it is not known yet that there is none.
    pub fn is_pending(&self) -> bool {
        matches!(self, Self::Unknown(_) | Self::Asked { .. })
    }
}

/// How the kernel asks for a neighbour.
fn question(neighbour: &IpAddr) -> &'static str {
    if neighbour.is_ipv4() { "ARP" } else { "neighbour discovery" }
}

impl Surroundings {
    /// Who was silent `before`, and is not known now, still is: the kernel asks for it again and again, and does not say
    /// meanwhile that it has done so in vain.
    pub fn remember_silence(&mut self, before: &Self) {
        let wanted = self.wanted_neighbours();
        let still =
            before.silent.iter().filter(|key| wanted.contains(key) && !self.neighbours.contains_key(key));
        self.silent.extend(still);
    }

    /// The neighbours that the routes lead through.
    pub fn wanted_neighbours(&self) -> BTreeSet<(u32, IpAddr)> {
        let routes = self.routes.iter().filter_map(|(&target, route)| Some((target, route.as_ref().ok()?)));
        let remote = routes.filter(|(_, route)| !route.local);
        remote.map(|(target, route)| (route.interface, route.neighbour(target))).collect()
    }

    /// The link of that name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    /// Name of the link with that index; the number where there is none.
    pub fn link_name(&self, index: u32) -> String {
        self.links.get(&index).map_or_else(|| format!("#{index}"), |link| link.name.clone())
    }

    /// Where a packet to `target` goes next.
    ///
    /// # Errors
    /// Why that is not known, in words for an operator.
    pub fn next_hop(&self, target: IpAddr) -> Result<NextHop, NoNextHop> {
        let route = match self.routes.get(&target) {
            None => return Err(NoNextHop::Unknown(target)),
            Some(Err(why)) => return Err(NoNextHop::NoRoute(target, why.clone())),
            Some(Ok(route)) if route.local => return Err(NoNextHop::Local(target)),
            Some(Ok(route)) => route,
        };
        let own_mac = self
            .links
            .get(&route.interface)
            .and_then(|link| link.mac)
            .ok_or_else(|| NoNextHop::NotEthernet(target, self.link_name(route.interface)))?;
        let neighbour = route.neighbour(target);
        match self.neighbours.get(&(route.interface, neighbour)) {
            Some(&mac) => Ok(NextHop { interface: route.interface, own_mac, mac }),
            None => {
                let interface = self.link_name(route.interface);
                Err(match self.silent.contains(&(route.interface, neighbour)) {
                    true => NoNextHop::Silent { neighbour, interface },
                    false => NoNextHop::Asked { neighbour, interface },
                })
            }
        }
    }

    /// The address that this host would send from to `target`.
    pub fn source(&self, target: IpAddr) -> Option<IpAddr> {
        self.routes.get(&target)?.as_ref().ok()?.source
    }

    /// Whether the host has this address for reasons of its own.
    pub fn is_hosts_own(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|a| a.address == address && !a.ours)
    }

    /// Whether a network of one of these links contains the address, so that neighbours there may ask
    /// for it.
    pub fn is_on_link(&self, address: IpAddr, interfaces: &[String]) -> bool {
        self.addresses.iter().any(|host| {
            !host.ours
                && self.links.get(&host.interface).is_some_and(|link| interfaces.contains(&link.name))
                && contains(host.address, host.prefix, address)
        })
    }
}

fn contains(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    fn equal(a: u128, b: u128, bits: u32, prefix: u8) -> bool {
        let host_bits = bits.saturating_sub(u32::from(prefix));
        a.checked_shr(host_bits).unwrap_or(0) == b.checked_shr(host_bits).unwrap_or(0)
    }
    match (network, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => equal(u32::from(a).into(), u32::from(b).into(), 32, prefix),
        (IpAddr::V6(a), IpAddr::V6(b)) => equal(a.into(), b.into(), 128, prefix),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surroundings() -> Surroundings {
        let link = Link { index: 2, name: "eth0".into(), mac: Some([2, 0, 0, 0, 0, 1]), ..Link::default() };
        let route =
            Route { interface: 2, gateway: Some(ip("10.0.0.1")), source: Some(ip("10.0.0.2")), local: false };
        Surroundings {
            links: [(2, link), (3, Link { index: 3, name: "tun0".into(), ..Link::default() })].into(),
            addresses: vec![
                HostAddress { address: ip("10.0.0.2"), prefix: 24, interface: 2, ours: false },
                HostAddress { address: ip("203.0.113.10"), prefix: 32, interface: 1, ours: true },
            ],
            routes: [
                (ip("192.0.2.1"), Ok(route)),
                (ip("10.0.0.7"), Ok(Route { gateway: None, ..route })),
                (ip("10.0.0.2"), Ok(Route { local: true, ..route })),
                (ip("10.9.0.1"), Ok(Route { interface: 3, ..route })),
                (ip("10.8.0.1"), Err("Network is unreachable".into())),
            ]
            .into(),
            neighbours: [((2, ip("10.0.0.1")), [2, 0, 0, 0, 0, 9])].into(),
            silent: BTreeSet::new(),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_next_hop_is_the_gateways_mac() {
        let hop = NextHop { interface: 2, own_mac: [2, 0, 0, 0, 0, 1], mac: [2, 0, 0, 0, 0, 9] };
        assert_eq!(surroundings().next_hop(ip("192.0.2.1")), Ok(hop));
        assert_eq!(surroundings().source(ip("192.0.2.1")), Some(ip("10.0.0.2")));
    }

    #[test]
    fn each_reason_for_no_next_hop_is_named() {
        let mut s = surroundings();
        s.silent.insert((2, ip("10.0.0.7")));
        let why = |text: &str| s.next_hop(ip(text)).unwrap_err();
        assert_eq!(
            why("10.0.0.7"),
            NoNextHop::Silent { neighbour: ip("10.0.0.7"), interface: "eth0".into() }
        );
        assert!(why("10.0.0.7").to_string().contains("ARP on eth0"));
        assert_eq!(why("10.0.0.2"), NoNextHop::Local(ip("10.0.0.2")));
        assert_eq!(why("10.9.0.1"), NoNextHop::NotEthernet(ip("10.9.0.1"), "tun0".into()));
        assert!(matches!(why("10.8.0.1"), NoNextHop::NoRoute(..)));
        assert_eq!(why("10.7.0.1"), NoNextHop::Unknown(ip("10.7.0.1")));
    }

    #[test]
    fn on_link_is_by_prefix_and_own_addresses_do_not_count_as_the_hosts() {
        let s = surroundings();
        let listed = ["eth0".to_owned()];
        assert!(s.is_on_link(ip("10.0.0.200"), &listed));
        assert!(!s.is_on_link(ip("10.0.1.200"), &listed));
        assert!(!s.is_on_link(ip("10.0.0.200"), &["tun0".to_owned()]));
        let ours = HostAddress { address: ip("203.0.113.10"), prefix: 24, interface: 2, ours: true };
        let with_ours = Surroundings { addresses: vec![ours], ..s.clone() };
        assert!(!with_ours.is_on_link(ip("203.0.113.77"), &listed));
        assert!(s.is_hosts_own(ip("10.0.0.2")));
        assert!(!s.is_hosts_own(ip("203.0.113.10")));
    }

    #[test]
    fn who_has_not_been_asked_to_the_end_is_not_said_to_be_silent() {
        let mut s = surroundings();
        let why = |s: &Surroundings| s.next_hop(ip("10.0.0.7")).unwrap_err();
        assert!(why(&s).is_pending(), "{}", why(&s));
        s.silent.insert((2, ip("10.0.0.7")));
        assert!(!why(&s).is_pending() && why(&s).to_string().contains("does not answer ARP on eth0"));
        // The kernel asks again, in vain.
        let mut next = surroundings();
        next.remember_silence(&s);
        assert_eq!(why(&next), why(&s));
        // It is there; and then it is not asked for any more.
        let mut there = surroundings();
        there.neighbours.insert((2, ip("10.0.0.7")), [2; 6]);
        there.remember_silence(&next);
        assert!(there.silent.is_empty() && there.next_hop(ip("10.0.0.7")).is_ok());
        let mut unwanted = surroundings();
        unwanted.routes.remove(&ip("10.0.0.7"));
        unwanted.remember_silence(&next);
        assert!(unwanted.silent.is_empty());
    }

    #[test]
    fn prefixes_of_all_lengths_match() {
        assert!(contains(ip("0.0.0.0"), 0, ip("255.255.255.255")));
        assert!(contains(ip("::"), 0, ip("ffff::")));
        assert!(contains(ip("2001:db8::1"), 64, ip("2001:db8::ffff")));
        assert!(!contains(ip("2001:db8::1"), 128, ip("2001:db8::2")));
        assert!(!contains(ip("10.0.0.1"), 8, ip("2001:db8::2")));
        assert!(contains(ip("10.0.0.1"), 29, ip("10.0.0.7")));
        assert!(!contains(ip("10.0.0.1"), 29, ip("10.0.0.8")));
    }
}
