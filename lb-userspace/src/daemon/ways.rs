//! What the plan needs to know of the network, from the surroundings.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::checks::targets;
use crate::{
    addresses::{self, Placed},
    dataplane::NextHop,
    model::Config,
    netlink::surroundings::Surroundings,
};

/// Ways to backends, and by what they leave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ways {
    /// The way to each backend's address, where there is one.
    pub next_hops: BTreeMap<IpAddr, NextHop>,
    /// Why there is none.
    pub none: BTreeMap<IpAddr, String>,
    /// Those of them of which that may only be so because it has not been found out yet.
    pub pending: BTreeSet<IpAddr>,
    /// Addresses to send from, for each backend's address.
    pub sources: BTreeMap<IpAddr, Vec<IpAddr>>,
    /// Our MAC address on each listed interface.
    pub interfaces: BTreeMap<u32, [u8; 6]>,
    /// Some listed interface is one end of a veth pair.
    pub veth: bool,
    /// VIPs that the host has by itself.
    pub shared_vips: BTreeSet<IpAddr>,
}

impl Ways {
    /// The ways for a document. The addresses that were `put` are not the host's own.
    pub fn of(config: &Config, put: &BTreeSet<Placed>, around: &Surroundings) -> Self {
        let vips = config.services.values().map(|service| service.listen.address).collect();
        let listed: Vec<_> = config.interfaces.iter().filter_map(|name| around.link(name)).collect();
        let mut ways = Self {
            interfaces: listed.iter().filter_map(|link| Some((link.index, link.mac?))).collect(),
            veth: listed.iter().any(|link| link.veth),
            shared_vips: addresses::shared(&vips, put, around),
            ..Self::default()
        };
        for target in targets(config) {
            match around.next_hop(target) {
                Ok(hop) if ways.interfaces.contains_key(&hop.interface) => {
                    ways.next_hops.insert(target, hop);
                }
                Ok(hop) => {
                    let leaves = around.link_name(hop.interface);
                    ways.none.insert(
                        target,
                        format!("packets to {target} leave by {leaves} now, which is not listed: its replies would pass by the program"),
                    );
                }
                Err(why) => {
                    if why.is_pending() {
                        ways.pending.insert(target);
                    }
                    ways.none.insert(target, why.to_string());
                }
            }
            let own = config.settings.sources.iter().copied().filter(|s| s.is_ipv4() == target.is_ipv4());
            let own: Vec<_> = own.collect();
            let sources = if own.is_empty() { around.source(target).into_iter().collect() } else { own };
            if !sources.is_empty() {
                ways.sources.insert(target, sources);
            }
        }
        ways
    }

    /// The addresses that must be there for a document: its VIPs and its own sources.
    pub fn addresses(config: &Config) -> BTreeSet<IpAddr> {
        let vips = config.services.values().map(|service| service.listen.address);
        vips.chain(config.settings.sources.iter().copied()).collect()
    }
}
