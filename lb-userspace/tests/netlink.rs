//! Netlink in network namespaces of the tests' own. They need root's rights, and are
//! skipped, by name, without.

#[path = "support/namespace.rs"]
mod namespace;

use std::{collections::BTreeSet, net::IpAddr, process::Command, sync::Arc, time::Duration};

use lb_userspace::{
    addresses,
    netlink::{
        Netlink,
        surroundings::{NoNextHop, Surroundings},
        watch,
    },
};
use namespace::{Peer, ip};
use tokio_util::sync::CancellationToken;

/// Runs `test` on a runtime in a namespace.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(&Peer) -> F + Send + 'static) {
    namespace::in_namespace(move |peer| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), test(peer)).await.unwrap() });
    });
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn until(watch: &mut watch::Watch, what: impl Fn(&Surroundings) -> bool) -> Arc<Surroundings> {
    Arc::clone(&*watch.surroundings.wait_for(|s| what(s)).await.unwrap())
}

#[test]
fn a_next_hop_is_resolved_and_followed() {
    in_namespace(|_| async {
        let netlink = Netlink::open().unwrap();
        let targets: BTreeSet<_> =
            [address("10.7.0.2"), address("2001:db8:7::2"), address("192.0.2.9")].into();
        let stop = CancellationToken::new();
        let ears = watch::listen().unwrap();
        let first = Arc::new(netlink.survey(&targets).await.unwrap());
        let mut watch = watch::start(netlink.clone(), ears, first, BTreeSet::new(), stop.clone());

        // Nobody sends anything: the kernel asks because it was told to keep them resolved.
        let s = until(&mut watch, |s| s.neighbours.len() == 2).await;
        let hop = s.next_hop(address("10.7.0.2")).unwrap();
        assert_eq!(hop.mac, [2, 0, 0, 0, 0, 2]);
        assert_eq!(Some(hop.own_mac), s.link("lb0").unwrap().mac);
        assert_eq!(s.next_hop(address("2001:db8:7::2")).unwrap(), hop);
        assert_eq!(s.source(address("10.7.0.2")), Some(address("10.7.0.1")));
        assert_eq!(s.source(address("2001:db8:7::2")), Some(address("2001:db8:7::1")));
        assert!(matches!(s.next_hop(address("192.0.2.9")), Err(NoNextHop::NoRoute(..))));
        assert!(s.link("lb0").unwrap().veth);

        // A route appears.
        ip("route add 192.0.2.0/24 via 10.7.0.2");
        let s = until(&mut watch, |s| s.next_hop(address("192.0.2.9")).is_ok()).await;
        assert_eq!(s.next_hop(address("192.0.2.9")).unwrap(), hop);

        // The neighbour gets another MAC address.
        ip("neigh change 10.7.0.2 lladdr 02:00:00:00:00:03 dev lb0 nud reachable");
        until(&mut watch, |s| s.next_hop(address("10.7.0.2")).is_ok_and(|hop| hop.mac == [2, 0, 0, 0, 0, 3]))
            .await;

        // Targets that are no longer wanted are no longer kept.
        assert_eq!(watch.kept.borrow().len(), 2);
        watch.targets.send_replace([address("10.7.0.2")].into());
        watch.kept.wait_for(|kept| kept.len() == 1).await.unwrap();
        watch.targets.send_replace(BTreeSet::new());
        watch.kept.wait_for(BTreeSet::is_empty).await.unwrap();
        let shown = Command::new("ip").args(["neigh", "show"]).output().unwrap();
        assert!(!String::from_utf8_lossy(&shown.stdout).contains("managed"));
        stop.cancel();
    });
}

/// What the kernel is still asking for is another thing than what it has asked for in vain.
#[test]
fn who_does_not_answer_is_told_from_who_has_had_no_time_to() {
    in_namespace(|_| async {
        let netlink = Netlink::open().unwrap();
        let target = address("10.7.0.9");
        let ears = watch::listen().unwrap();
        let first = netlink.survey(&[target].into()).await.unwrap();
        assert!(matches!(first.next_hop(target), Err(NoNextHop::Asked { .. })));
        let stop = CancellationToken::new();
        let mut watch = watch::start(netlink.clone(), ears, Arc::new(first), BTreeSet::new(), stop.clone());
        until(&mut watch, |s| matches!(s.next_hop(target), Err(NoNextHop::Silent { .. }))).await;
        stop.cancel();
    });
}

/// The daemon's own addresses are no reason to look at ways again, but for one that has no source.
#[test]
fn a_host_without_addresses_sends_from_the_first_that_is_put() {
    in_namespace(|_| async {
        ip("address flush dev lb0");
        ip("route add 10.7.0.0/24 dev lb0");
        let netlink = Netlink::open().unwrap();
        let target = address("10.7.0.2");
        let ears = watch::listen().unwrap();
        let first = Arc::new(netlink.survey(&[target].into()).await.unwrap());
        assert_eq!(first.source(target), None);
        let stop = CancellationToken::new();
        let mut watch = watch::start(netlink.clone(), ears, first, BTreeSet::new(), stop.clone());
        netlink.add_address(1, address("203.0.113.10")).await.unwrap();
        until(&mut watch, |s| s.source(target) == Some(address("203.0.113.10"))).await;
        netlink.add_address(1, address("203.0.113.11")).await.unwrap();
        let s = until(&mut watch, |s| s.addresses.iter().filter(|it| it.ours).count() == 2).await;
        assert_eq!(s.source(target), Some(address("203.0.113.10")));
        stop.cancel();
    });
}

#[test]
fn addresses_are_put_and_taken_away_again_and_nothing_else_is() {
    in_namespace(|_| async {
        let netlink = Netlink::open().unwrap();
        let none = BTreeSet::new();
        let before = netlink.survey(&none).await.unwrap();
        let interfaces = ["lb0".to_owned()];
        let wanted: BTreeSet<_> =
            [address("203.0.113.10"), address("2001:db8::10"), address("10.7.0.1")].into();
        let mut put = BTreeSet::new();
        let changes = addresses::changes(&wanted, &interfaces, &put, &before);
        addresses::apply(&changes, &mut put, &netlink).await;
        let with = netlink.survey(&none).await.unwrap();
        assert_eq!(put.len(), 2);
        assert_eq!(addresses::shared(&wanted, &put, &with), [address("10.7.0.1")].into());
        assert_eq!(with.addresses.iter().filter(|a| a.ours).count(), 2, "{:?}", with.addresses);
        assert_eq!(addresses::changes(&wanted, &interfaces, &put, &with), addresses::Changes::default());
        // The host never sends from the IPv6 address, and it is usable at once.
        let shown = Command::new("ip").args(["-6", "address", "show", "dev", "lb0"]).output().unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        let line = shown.lines().find(|line| line.contains("2001:db8::10/128")).unwrap();
        assert!(line.contains("deprecated") && !line.contains("tentative"), "{line}");

        // A new process that remembers nothing does not put them again: it knows them by their mark.
        let changes = addresses::changes(&wanted, &interfaces, &BTreeSet::new(), &with);
        assert_eq!((changes.add.len(), &changes.adopt), (0, &put));
        let changes = addresses::changes(&none, &interfaces, &put, &with);
        addresses::apply(&changes, &mut put, &netlink).await;
        assert!(put.is_empty());
        // Link-local addresses come and go by themselves.
        let of = |s: &Surroundings| -> Vec<_> {
            let link_local = |ip: IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            s.addresses.iter().filter(|a| !link_local(a.address)).cloned().collect()
        };
        assert_eq!(of(&netlink.survey(&none).await.unwrap()), of(&before));
    });
}

#[test]
fn many_may_look_at_once() {
    in_namespace(|_| async {
        let netlink = Netlink::open().unwrap();
        let none = BTreeSet::new();
        let looks = (0..50).map(|_| netlink.survey(&none));
        for found in futures::future::join_all(looks).await {
            assert!(found.unwrap().link("lb0").is_some());
        }
    });
}
