//! The daemon's decisions on tables in memory, with time as the tests say.

use lb_common::abi::NO_BACKEND;

use super::*;
use crate::{
    daemon::snapshot::address,
    dataplane::{ClientHop, FlowEntry, FlowState, FlowsOf},
    model::{Limits, Protocol},
    netlink::surroundings::{HostAddress, Link, Route},
    probe::ProbeError,
};

mod broken;

const DOCUMENT: &str = r#"interfaces = ["eth0"]

[pools.web]
health = { tcp = true, interval = "1s", rise = 2, fall = 2 }
backends = [
  { address = "10.0.0.11:80" },
  { address = "10.0.0.12:80" },
]

[services.shop]
listen = "10.0.0.10:80/tcp"
pool = "web"
"#;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(seconds: u64) -> Now {
    Now { uptime: Duration::from_secs(seconds), epoch: 1_700_000_000 + seconds }
}

fn key(backend: &str) -> Key {
    Key { pool: "web".into(), backend: backend.parse().unwrap() }
}

/// eth0 with 10.0.0.1/24, and neighbours .11 to .14.
fn around() -> Arc<Surroundings> {
    let eth0 =
        Link { index: 2, name: "eth0".into(), mac: Some([2, 0, 0, 0, 0, 1]), up: true, ..Link::default() };
    let host = HostAddress { address: ip("10.0.0.1"), prefix: 24, interface: 2, ours: false };
    let route = Route { interface: 2, gateway: None, source: Some(ip("10.0.0.1")), local: false };
    let backends = (11..15).map(|n| ip(&format!("10.0.0.{n}")));
    Arc::new(Surroundings {
        links: [(2, eth0)].into(),
        addresses: vec![host],
        routes: backends.clone().map(|ip| (ip, Ok(route))).collect(),
        neighbours: backends.map(|ip| ((2, ip), [2, 0, 0, 0, 1, 1])).collect(),
        ..Surroundings::default()
    })
}

fn core() -> Core<MemoryDataplane> {
    Core::new(MemoryDataplane::new(Limits::default()), "/etc/lb.toml".into(), [1, 2], 3).unwrap()
}

fn load(core: &mut Core<MemoryDataplane>, text: &str, now: Now) -> Result<(), String> {
    let document = Document::parse(text).map_err(|complaints| complaints.to_string())?;
    core.load(text, document, around(), &Host::default(), now).map_err(|error| error.to_string())?;
    core.settle().map_err(|error| error.to_string())?;
    Ok(())
}

/// A core with both backends healthy at second 1.
fn healthy() -> Core<MemoryDataplane> {
    let mut core = core();
    load(&mut core, DOCUMENT, at(0)).unwrap();
    for backend in ["10.0.0.11:80", "10.0.0.12:80"] {
        answer(&mut core, backend, true, at(1));
    }
    core
}

fn answer(core: &mut Core<MemoryDataplane>, backend: &str, good: bool, now: Now) -> bool {
    let outcome = if good {
        Ok(Answered { latency: Duration::from_millis(2), said: None })
    } else {
        Err(ProbeError::Connect("refused".into()))
    };
    let changed = core.answer(Answer { key: key(backend), outcome }, now);
    if changed {
        core.settle().unwrap();
    }
    changed
}

/// Last bytes of the addresses that new connections go to.
fn targets(core: &Core<MemoryDataplane>) -> BTreeSet<u8> {
    let tables = core.plane().tables().unwrap();
    let slots = tables.services.values().flat_map(|service| service.ring.slots.iter());
    slots
        .map(|slot| slot.backend())
        .filter(|&slot| slot != NO_BACKEND)
        .map(|slot| match tables.backends[&slot].address.unwrap() {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(_) => unreachable!(),
        })
        .collect()
}

fn index(core: &Core<MemoryDataplane>, backend: &str) -> u32 {
    let wanted: BackendAddress = backend.parse().unwrap();
    let found = core.tables().backends.iter().find(|(_, entry)| address(entry) == wanted);
    *found.unwrap().0
}

fn connect(core: &mut Core<MemoryDataplane>, backend: &str) {
    let index = index(core, backend);
    let generation = core.tables().backends[&index].generation;
    core.plane_mut().live.push(FlowEntry {
        protocol: Protocol::Tcp,
        client: "192.0.2.1:4000".parse().unwrap(),
        called_port: 80,
        source_port: Some(10240),
        source: Some(ip("10.0.0.1")),
        backend: index,
        generation,
        state: FlowState::Established,
        cut: false,
        idle: Duration::ZERO,
        from: ClientHop { interface: 3, mac: [2, 0, 0, 0, 0, 9], vlan: None },
    });
}

/// The second backend's first success is what makes slots look after connections for the first time.
#[test]
fn a_deciding_probe_of_a_service_that_does_not_translate_is_planned_to_the_end() {
    let mut core = core();
    load(
        &mut core,
        &DOCUMENT
            .replace(":80\"", "\"")
            .replace("\"web\"\n", "\"web\"\nforward = \"dsr\"\n")
            .replace("10/tcp", "10:80/tcp")
            .replace("tcp = true", "tcp = true, port = 80"),
        at(0),
    )
    .unwrap();
    for backend in ["10.0.0.11", "10.0.0.12"] {
        assert!(answer(&mut core, backend, true, at(1)));
    }
    assert_eq!(targets(&core), [11, 12].into());
    let unsettled = |core: &Core<MemoryDataplane>| {
        let mut services = core.tables().services.values();
        services.any(|service| service.ring.slots.iter().any(|slot| !slot.is_settled()))
    };
    assert!(unsettled(&core), "slots have changed hands");
}

#[test]
fn nobody_gets_traffic_before_the_first_success_and_a_deciding_probe_changes_the_ring_at_once() {
    let mut core = core();
    load(&mut core, DOCUMENT, at(0)).unwrap();
    assert_eq!(targets(&core), [].into());
    assert!(answer(&mut core, "10.0.0.11:80", true, at(1)));
    assert_eq!(targets(&core), [11].into());
    assert!(answer(&mut core, "10.0.0.12:80", true, at(1)));
    assert_eq!(targets(&core), [11, 12].into());
    assert!(!answer(&mut core, "10.0.0.12:80", false, at(2)));
    assert_eq!(targets(&core), [11, 12].into());
    assert!(answer(&mut core, "10.0.0.12:80", false, at(3)));
    assert_eq!(targets(&core), [11].into());
    let report = core.report("web", "10.0.0.12:80".parse().unwrap()).unwrap();
    assert!(report.failure.as_ref().unwrap().contains("refused"));
    assert_eq!(report.latency, Some(Duration::from_millis(2)));
}

#[test]
fn a_new_document_changes_the_tables_and_a_bad_one_does_not() {
    let mut core = healthy();
    let before = core.plane().tables().unwrap();
    for (bad, why) in [
        (DOCUMENT.replace("pool = \"web\"", "pool = \"wbe\""), "wbe"),
        (DOCUMENT.replace("eth0", "eth9"), "eth9"),
        (format!("{DOCUMENT}x = 1\n"), "x"),
    ] {
        let error = load(&mut core, &bad, at(5)).unwrap_err();
        assert!(error.contains(why), "{error}");
        core.refuse(error);
        assert_eq!(core.plane().tables().unwrap(), before);
        assert_eq!(core.document_status().revision, revision(DOCUMENT));
        assert!(core.document_status().refused.unwrap().contains(why));
    }
    assert_eq!(core.document_status().refusals, 3);
    load(&mut core, &DOCUMENT.replace("10.0.0.10:80", "10.0.0.10:8080"), at(6)).unwrap();
    assert!(core.plane().tables().unwrap() != before);
    assert_eq!(core.document_status().refused, None);
    assert_eq!(targets(&core), [11, 12].into(), "health is not forgotten");
}

#[test]
fn a_document_that_the_tables_are_too_small_for_is_refused_before_anything_changes() {
    let limits = Limits { services: 1, ..Limits::default() };
    let mut core = Core::new(MemoryDataplane::new(limits), "/etc/lb.toml".into(), [1, 2], 3).unwrap();
    load(&mut core, DOCUMENT, at(0)).unwrap();
    let before = core.plane().tables().unwrap();
    let more = format!("{DOCUMENT}\n[services.other]\nlisten = \"10.0.0.10:81/tcp\"\npool = \"web\"\n");
    let error = load(&mut core, &more, at(1)).unwrap_err();
    assert!(error.contains("lb detach"), "{error}");
    assert_eq!(core.plane().tables().unwrap(), before);
    assert_eq!(core.loaded().unwrap().text, DOCUMENT);
    assert!(core.alarms().iter().any(|alarm| alarm.contains("limits")), "{:?}", core.alarms());
}

#[test]
fn a_drain_ends_with_its_connections_or_at_its_deadline() {
    let mut core = healthy();
    connect(&mut core, "10.0.0.11:80");
    let epoch = at(30).epoch;
    let deadline = crate::config::edit::set_admin(
        DOCUMENT,
        "web",
        "10.0.0.11:80".parse().unwrap(),
        crate::model::Admin::Drain { deadline: Some(epoch) },
    );
    load(&mut core, &deadline.unwrap(), at(10)).unwrap();
    assert_eq!(targets(&core), [12].into());
    let flows = |core: &Core<MemoryDataplane>| {
        core.plane().tables().unwrap().backends[&index(core, "10.0.0.11:80")].flows
    };
    assert_eq!(flows(&core), FlowsOf::Keep);

    assert!(core.wants_census());
    core.census(at(11), |_| 0).unwrap();
    assert_eq!(core.state("web", "10.0.0.11:80".parse().unwrap()).0, State::Draining);
    assert!(core.wait(at(29)).unwrap() <= Duration::from_secs(1));
    assert!(!core.pass_time(at(29)));
    assert!(core.pass_time(at(30)));
    core.settle().unwrap();
    assert_eq!(flows(&core), FlowsOf::Cut);
    assert_eq!(core.state("web", "10.0.0.11:80".parse().unwrap()).0, State::Drained);

    let no_deadline =
        DOCUMENT.replace("{ address = \"10.0.0.12:80\" }", "{ address = \"10.0.0.12:80\", drain = true }");
    load(&mut core, &no_deadline, at(40)).unwrap();
    connect(&mut core, "10.0.0.12:80");
    core.census(at(41), |_| 0).unwrap();
    assert_eq!(core.state("web", "10.0.0.12:80".parse().unwrap()).0, State::Draining);
    core.plane_mut().live.clear();
    core.census(at(42), |key| u64::from(key.pool == "web")).unwrap();
    assert_eq!(core.state("web", "10.0.0.12:80".parse().unwrap()).0, State::Draining, "the desk has one");
    core.census(at(42), |_| 0).unwrap();
    assert_eq!(core.state("web", "10.0.0.12:80".parse().unwrap()).0, State::Drained);
}

#[test]
fn a_backend_that_no_service_uses_is_drained_at_once() {
    let mut core = core();
    let text =
        format!("{DOCUMENT}\n[pools.spare]\nbackends = [ {{ address = \"10.0.0.13:80\", drain = true }} ]\n");
    load(&mut core, &text, at(0)).unwrap();
    assert!(core.wants_census());
    core.census(at(1), |_| 0).unwrap();
    assert_eq!(core.state("spare", "10.0.0.13:80".parse().unwrap()).0, State::Drained);
    assert!(!core.wants_census());
}

/// The host that stands in has an entry that no pool names.
#[test]
fn a_service_with_a_fallback_is_not_looked_at_again_and_again() {
    let mut core = core();
    let text = DOCUMENT
        .replace("[services.shop]", "panic = \"fail\"\n[services.shop]")
        .replace("pool = \"web\"", "pool = \"web\"\nfallback = \"desk\"");
    load(&mut core, &text, at(0)).unwrap();
    answer(&mut core, "10.0.0.11:80", true, at(1));
    answer(&mut core, "10.0.0.11:80", true, at(2));
    core.settle().unwrap();
    assert_eq!(core.tables().backends.len(), 3);
    assert!(!core.wants_census());
    // However it is come to, nothing of it is given up.
    core.census(at(3), |_| 0).unwrap();
    core.settle().unwrap();
    assert_eq!(core.tables().backends.len(), 3);
}

#[test]
fn the_entry_of_a_removed_backend_is_freed_once_its_last_flow_is_gone() {
    let mut core = healthy();
    connect(&mut core, "10.0.0.11:80");
    let gone = index(&core, "10.0.0.11:80");
    let without = DOCUMENT.replace("  { address = \"10.0.0.11:80\" },\n", "");
    load(&mut core, &without, at(5)).unwrap();
    assert_eq!(targets(&core), [12].into());
    assert!(core.wants_census());
    core.census(at(6), |_| 0).unwrap();
    core.settle().unwrap();
    assert_eq!(core.plane().tables().unwrap().backends[&gone].flows, FlowsOf::Cut);
    // One of an earlier use of the entry is void and does not count.
    core.plane_mut().live.iter_mut().for_each(|flow| flow.generation -= 1);
    assert!(core.census(at(7), |_| 0).unwrap());
    core.settle().unwrap();
    assert!(!core.plane().tables().unwrap().backends.contains_key(&gone));
    assert!(!core.wants_census());
}

#[test]
fn a_new_daemon_finds_everything_as_it_was() {
    let mut first = healthy();
    answer(&mut first, "10.0.0.12:80", false, at(2));
    answer(&mut first, "10.0.0.12:80", false, at(3));
    let before = first.plane().tables().unwrap();
    let plane = first.plane().clone();
    // Another key is offered; the one in the tables stays, else connections would move.
    let mut second = Core::new(plane, "/etc/lb.toml".into(), [8, 9], 10).unwrap();
    load(&mut second, DOCUMENT, at(0)).unwrap();
    assert_eq!(second.plane().tables().unwrap(), before);
    assert_eq!(second.state("web", "10.0.0.11:80".parse().unwrap()), (State::Healthy, Verdict::USABLE));
    assert_eq!(
        second.state("web", "10.0.0.12:80".parse().unwrap()),
        (State::Unhealthy, Verdict { dead: true, ..Verdict::RESTING })
    );
}

#[test]
fn a_neighbour_with_another_mac_reaches_the_tables_and_one_that_is_lost_is_an_alarm() {
    let mut core = healthy();
    let mut changed = Surroundings::clone(&around());
    changed.neighbours.insert((2, ip("10.0.0.11")), [2, 0, 0, 0, 9, 9]);
    changed.neighbours.remove(&(2, ip("10.0.0.12")));
    core.set_around(Arc::new(changed.clone()));
    core.settle().unwrap();
    // Somebody asks for it, and it has had no time to answer.
    assert_eq!(core.alarms(), [""; 0]);
    assert!(core.next_hop(ip("10.0.0.12")).unwrap_err().contains("is being asked for by ARP"));
    changed.silent.insert((2, ip("10.0.0.12")));
    core.set_around(Arc::new(changed));
    core.settle().unwrap();
    let tables = core.plane().tables().unwrap();
    let hop = tables.backends[&index(&core, "10.0.0.11:80")].next_hop.unwrap();
    assert_eq!(hop, NextHop { interface: 2, own_mac: [2, 0, 0, 0, 0, 1], mac: [2, 0, 0, 0, 9, 9] });
    assert_eq!(tables.backends[&index(&core, "10.0.0.12:80")].next_hop, None);
    assert!(core.alarms().iter().any(|alarm| alarm.contains("10.0.0.12")), "{:?}", core.alarms());
}

#[test]
fn a_way_by_an_interface_that_is_not_listed_is_no_way() {
    let mut core = healthy();
    let mut changed = Surroundings::clone(&around());
    let eth1 = Link { index: 3, name: "eth1".into(), mac: Some([2; 6]), up: true, ..Link::default() };
    changed.links.insert(3, eth1);
    changed
        .routes
        .insert(ip("10.0.0.11"), Ok(Route { interface: 3, gateway: None, source: None, local: false }));
    changed.neighbours.insert((3, ip("10.0.0.11")), [2, 0, 0, 0, 1, 1]);
    core.set_around(Arc::new(changed));
    assert!(core.next_hop(ip("10.0.0.11")).unwrap_err().contains("eth1"));
    core.settle().unwrap();
    let tables = core.plane().tables().unwrap();
    assert_eq!(tables.backends[&index(&core, "10.0.0.11:80")].next_hop, None);
}

#[test]
fn what_else_has_changed_is_not_forgotten_over_a_probe() {
    let mut core = healthy();
    let mut changed = Surroundings::clone(&around());
    changed.neighbours.insert((2, ip("10.0.0.12")), [2, 0, 0, 0, 9, 9]);
    core.set_around(Arc::new(changed));
    answer(&mut core, "10.0.0.11:80", false, at(2));
    answer(&mut core, "10.0.0.11:80", false, at(3));
    let hop = core.tables().backends[&index(&core, "10.0.0.12:80")].next_hop;
    assert_eq!((targets(&core), hop.map(|hop| hop.mac)), ([12].into(), Some([2, 0, 0, 0, 9, 9])));
    // An address that turns out to be the host's own makes its VIP shared with it.
    core.set_put([(1, ip("10.0.0.10"))].into());
    let mut changed = Surroundings::clone(core.around());
    changed.addresses.push(HostAddress { address: ip("10.0.0.10"), prefix: 32, interface: 1, ours: false });
    core.set_around(Arc::new(changed));
    core.settle().unwrap();
    assert!(!core.tables().vips[&ip("10.0.0.10")].shared);
    core.set_put(BTreeSet::new());
    core.settle().unwrap();
    assert!(core.tables().vips[&ip("10.0.0.10")].shared);
}

#[test]
fn when_all_fail_the_last_set_stays_in_use_and_an_alarm_is_raised() {
    let mut core = healthy();
    for backend in ["10.0.0.11:80", "10.0.0.12:80"] {
        answer(&mut core, backend, false, at(2));
        answer(&mut core, backend, false, at(3));
    }
    assert!(core.panicking().eq(["web"]));
    assert_eq!(targets(&core), [11, 12].into());
    assert!(core.alarms().iter().any(|alarm| alarm.contains("web")), "{:?}", core.alarms());
}

#[test]
fn the_alarm_that_all_fail_says_what_becomes_of_who_calls() {
    let refused = DOCUMENT.replace("[pools.web]\n", "[pools.web]\npanic = \"fail\"\n");
    let stands_in = format!("{refused}fallback = \"desk\"\n");
    let mixed = format!("{stands_in}[services.other]\nlisten = \"10.0.0.10:81/tcp\"\npool = \"web\"\n");
    let of_desk = refused.replace("pool = \"web\"", "routes = [{ pool = \"web\" }]");
    let unused = refused.replace("pool = \"web\"", "pool = \"other\"") + "[pools.other]\nbackends = []\n";
    for (document, so) in [
        (DOCUMENT, "; the last 2 that worked stay in use"),
        (&refused, "; new connections are refused"),
        (&stands_in, "; the desk answers new connections"),
        (&mixed, "; new connections are refused, but for services that the desk stands in for"),
        (&of_desk, "; the desk says so to who asks for it"),
        (&unused, "; no service uses it"),
    ] {
        let mut core = core();
        load(&mut core, document, at(0)).unwrap();
        for (good, second) in [(true, 1), (false, 2), (false, 3)] {
            for backend in ["10.0.0.11:80", "10.0.0.12:80"] {
                answer(&mut core, backend, good, at(second));
            }
        }
        assert_eq!(core.alarms(), [format!("every backend of pool web fails its check{so}")], "{document}");
    }
}

#[test]
fn a_pool_that_is_drained_to_the_last_raises_an_alarm() {
    let mut core = healthy();
    let one = DOCUMENT.replace("11:80\" }", "11:80\", drain = true }");
    load(&mut core, &one, at(2)).unwrap();
    assert!(core.alarms().is_empty(), "{:?}", core.alarms());
    load(&mut core, &one.replace("12:80\" }", "12:80\", disabled = true }"), at(3)).unwrap();
    assert!(core.alarms().iter().any(|alarm| alarm.contains("every backend of pool web is drained")));
}

#[test]
fn probes_are_asked_for_at_their_time_and_not_twice() {
    let mut core = core();
    load(&mut core, DOCUMENT, at(0)).unwrap();
    let asked: BTreeSet<_> = core.take_due(at(1)).into_iter().map(|(key, _)| key).collect();
    assert_eq!(asked, [key("10.0.0.11:80"), key("10.0.0.12:80")].into());
    assert!(core.take_due(at(1)).is_empty());
    assert!(core.wait(at(1)).unwrap() <= Duration::from_secs(2));
}

#[test]
fn the_snapshot_shows_backends_traffic_and_connections() {
    let mut core = healthy();
    connect(&mut core, "10.0.0.12:80");
    let index = index(&core, "10.0.0.12:80");
    let traffic =
        lb_common::abi::Traffic { packets_in: 5, bytes_in: 500, packets_out: 4, bytes_out: 400, flows: 1 };
    core.plane_mut().passed.insert(index, traffic);
    let snapshot = super::super::snapshot::snapshot(&core, at(9)).unwrap();
    assert_eq!(snapshot.status.flows, 1);
    assert_eq!(snapshot.status.backends_usable, 2);
    assert_eq!(snapshot.backends[1].traffic.bytes_out, 400);
    assert_eq!(snapshot.services[0].traffic.packets_in, 5);
    assert_eq!(snapshot.backends[0].traffic, view::Traffic::default());
    assert_eq!(snapshot.backends[0].next_hop.as_deref(), Some("02:00:00:00:01:01 on eth0"));

    let all = view::ConnectionFilter::default();
    let found = super::super::snapshot::connections(&core, &all).unwrap();
    assert_eq!(found.total, 1);
    let connection = &found.connections[0];
    assert_eq!((connection.service.as_str(), connection.client.as_str()), ("shop", "192.0.2.1:4000"));
    assert_eq!((connection.called.as_str(), connection.backend.as_str()), ("10.0.0.10:80", "10.0.0.12:80"));
    let other = view::ConnectionFilter { backend: Some("10.0.0.11:80".into()), ..all };
    assert_eq!(super::super::snapshot::connections(&core, &other).unwrap().total, 0);
}

#[test]
fn whose_connection_is_cut_is_called_from_both_sides_in_its_vlan() {
    let mut core = healthy();
    connect(&mut core, "10.0.0.12:80");
    core.plane_mut().live[0].from = ClientHop { interface: 2, mac: [2, 0, 0, 0, 0, 9], vlan: Some(0x123) };
    assert!(core.take_cut().unwrap().is_empty(), "its backend is there");
    // One that has ended by itself, and one whose client has spoken just now and has been told: its server has not.
    let open = core.plane_mut().live[0];
    core.plane_mut().live[0] = FlowEntry { state: FlowState::Closed, cut: true, ..open };
    core.plane_mut().live.push(FlowEntry { state: FlowState::Closed, source_port: Some(10241), ..open });
    let without = DOCUMENT.replace("  { address = \"10.0.0.12:80\" },\n", "");
    load(&mut core, &without, at(5)).unwrap();
    let [flow] = core.take_cut().unwrap()[..] else { panic!("it is cut") };
    assert!(core.take_cut().unwrap().is_empty(), "nobody is told twice that it has been");
    assert_eq!(core.cuts("10.0.0.10:80/tcp".parse().unwrap()), 1);
    // A daemon that takes over does not know who has been told.
    let mut next = Core::new(core.plane().clone(), "/etc/lb.toml".into(), [1, 2], 3).unwrap();
    assert_eq!(next.take_cut().unwrap(), [flow]);
    let said: Vec<_> = core
        .calls(&flow)
        .iter()
        .map(|call| {
            let frame = call.frame().unwrap();
            let parsed = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
            let tcp = parsed.transport.unwrap().tcp().unwrap();
            assert!(tcp.syn && !tcp.ack && !tcp.rst, "{tcp:?}");
            let etherparse::LinkExtHeader::Vlan(tag) = &parsed.link_exts[0] else { panic!("{frame:?}") };
            assert_eq!(tag.vlan_id.value(), 0x123);
            (frame[..6].to_vec(), call.from.to_string(), call.to.to_string())
        })
        .collect();
    let call = |mac: [u8; 6], from: &str, to: &str| (mac.to_vec(), from.to_owned(), to.to_owned());
    assert_eq!(
        said,
        [
            call([2, 0, 0, 0, 0, 9], "10.0.0.10:80", "192.0.2.1:4000"),
            call([2, 0, 0, 0, 1, 1], "10.0.0.1:10240", "10.0.0.12:80")
        ]
    );
    load(&mut core, DOCUMENT, at(6)).unwrap();
    assert!(core.calls(&flow).is_empty(), "it is not cut any more");
}
