//! Puts service addresses where ARP and neighbour discovery answer for them, and takes away only what
//! it put.
//!
//! IPv4 goes on `lo` as /32: Linux answers ARP for it on every interface. Neighbour discovery does not
//! answer for `lo` (RFC 4861 section 7.2.4 speaks of addresses of the receiving interface), so IPv6 goes
//! on the first listed interface as /128, deprecated from the start so that the host never sends from it.
//! An address that the host has by itself is shared with it and left alone.

use std::{collections::BTreeSet, net::IpAddr};

use futures::StreamExt;
use tracing::{info, warn};

use crate::netlink::{
    AT_ONCE, Netlink,
    surroundings::{HostAddress, Surroundings},
};

/// An address on an interface, by its index.
pub type Placed = (u32, IpAddr);

/// What is to be done so that wanted addresses are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Addresses to put, and where.
    pub add: BTreeSet<Placed>,
    /// Addresses that are there already and marked as Lobby's, of which nothing was remembered: from now
    /// on they are.
    pub adopt: BTreeSet<Placed>,
    /// Addresses to take away: put before, and no longer wanted.
    pub remove: BTreeSet<Placed>,
}

/// What to put and to take away. `put` is what was put before, by this daemon or the one before it. A
/// mark alone is no reason to take an address away: another daemon, for other interfaces, may have put it.
pub fn changes(
    wanted: &BTreeSet<IpAddr>,
    interfaces: &[String],
    put: &BTreeSet<Placed>,
    surroundings: &Surroundings,
) -> Changes {
    let loopback = surroundings.links.values().find(|link| link.loopback).map(|link| link.index);
    let first = interfaces.iter().find_map(|name| surroundings.link(name)).map(|link| link.index);
    let found = |of_lobby: fn(&HostAddress, &BTreeSet<Placed>) -> bool| -> BTreeSet<Placed> {
        let addresses = surroundings.addresses.iter().filter(|a| of_lobby(a, put));
        addresses.map(|a| (a.interface, a.address)).collect()
    };
    let own = hosts_own(put, surroundings);
    let remembered = found(|a, put| put.contains(&(a.interface, a.address)));
    let marked = found(|a, put| a.ours && !put.contains(&(a.interface, a.address)));
    let desired: BTreeSet<Placed> = wanted
        .iter()
        .filter(|address| !own.contains(address))
        .filter_map(|&address| Some((if address.is_ipv4() { loopback? } else { first? }, address)))
        .collect();
    Changes {
        add: desired
            .iter()
            .filter(|place| !remembered.contains(place) && !marked.contains(place))
            .copied()
            .collect(),
        adopt: desired.intersection(&marked).copied().collect(),
        remove: remembered.difference(&desired).copied().collect(),
    }
}

/// The wanted addresses that the host has by itself.
pub fn shared(
    wanted: &BTreeSet<IpAddr>,
    put: &BTreeSet<Placed>,
    surroundings: &Surroundings,
) -> BTreeSet<IpAddr> {
    wanted.intersection(&hosts_own(put, surroundings)).copied().collect()
}

/// So many at once are counted in the log rather than named one by one.
pub const MANY: usize = 100;

/// Carries out the changes and keeps `put` true. What fails is logged and tried again with the next
/// change of the network; packets to an address that a router sends here do not need it.
pub async fn apply(changes: &Changes, put: &mut BTreeSet<Placed>, netlink: &Netlink) {
    put.extend(&changes.adopt);
    let (many, before) = (changes.add.len() > MANY, put.len());
    let adding = changes.add.clone().into_iter().map(|(interface, address)| async move {
        ((interface, address), netlink.add_address(interface, address).await)
    });
    let mut added = futures::stream::iter(adding).buffer_unordered(AT_ONCE);
    while let Some((place, outcome)) = added.next().await {
        match outcome {
            Ok(()) => {
                if !many {
                    info!(address = %place.1, "address put");
                }
                put.insert(place);
            }
            // The surroundings are those of a moment ago.
            Err(error) if error.errno() == Some(libc::EEXIST) && put.contains(&place) => {}
            Err(error) => warn!("{error}; neighbours will not find it"),
        }
    }
    if many {
        info!(addresses = put.len() - before, "addresses put");
    }
    for &(interface, address) in &changes.remove {
        match netlink.remove_address(interface, address).await {
            Ok(()) => {
                info!(%address, "address taken away");
                put.remove(&(interface, address));
            }
            Err(error) => warn!("{error}"),
        }
    }
}

fn hosts_own(put: &BTreeSet<Placed>, surroundings: &Surroundings) -> BTreeSet<IpAddr> {
    let own = |a: &&HostAddress| !a.ours && !put.contains(&(a.interface, a.address));
    surroundings.addresses.iter().filter(own).map(|a| a.address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::surroundings::Link;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn surroundings(addresses: &[(u32, &str, bool)]) -> Surroundings {
        let link =
            |index, name: &str| Link { index, name: name.into(), loopback: name == "lo", ..Link::default() };
        Surroundings {
            links: [(1, link(1, "lo")), (2, link(2, "eth0")), (3, link(3, "eth1"))].into(),
            addresses: addresses
                .iter()
                .map(|&(interface, address, ours)| HostAddress {
                    address: ip(address),
                    prefix: 24,
                    interface,
                    ours,
                })
                .collect(),
            ..Surroundings::default()
        }
    }

    fn listed() -> Vec<String> {
        vec!["eth0".into(), "eth1".into()]
    }

    #[test]
    fn ipv4_goes_on_lo_and_ipv6_on_the_first_listed_interface() {
        let wanted = [ip("203.0.113.10"), ip("2001:db8::10")].into();
        let changes = changes(&wanted, &listed(), &BTreeSet::new(), &surroundings(&[]));
        assert_eq!(changes.add, [(1, ip("203.0.113.10")), (2, ip("2001:db8::10"))].into());
        assert!(changes.remove.is_empty());
    }

    #[test]
    fn an_address_that_the_host_has_is_shared_and_never_taken_away() {
        let found = surroundings(&[(2, "10.0.0.2", false)]);
        let wanted = [ip("10.0.0.2")].into();
        assert_eq!(changes(&wanted, &listed(), &BTreeSet::new(), &found), Changes::default());
        assert_eq!(shared(&wanted, &BTreeSet::new(), &found), wanted);
        assert_eq!(changes(&BTreeSet::new(), &listed(), &BTreeSet::new(), &found), Changes::default());
    }

    #[test]
    fn only_what_is_remembered_is_taken_away() {
        let found =
            surroundings(&[(1, "203.0.113.10", true), (1, "203.0.113.11", false), (2, "10.0.0.2", false)]);
        let put = [(1, ip("203.0.113.11"))].into();
        let changes = changes(&BTreeSet::new(), &listed(), &put, &found);
        assert_eq!(changes, Changes { remove: put, ..Changes::default() });
    }

    #[test]
    fn what_is_there_is_not_put_again_but_remembered() {
        let found = surroundings(&[(1, "203.0.113.10", true)]);
        let wanted = [ip("203.0.113.10")].into();
        let place: BTreeSet<_> = [(1, ip("203.0.113.10"))].into();
        let unknown = changes(&wanted, &listed(), &BTreeSet::new(), &found);
        assert_eq!(unknown, Changes { adopt: place.clone(), ..Changes::default() });
        assert_eq!(changes(&wanted, &listed(), &place, &found), Changes::default());
        assert!(shared(&wanted, &BTreeSet::new(), &found).is_empty());
    }
}
