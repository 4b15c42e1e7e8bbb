//! `lb explain` and the loaded program agree, packet by packet, on the same tables.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use lb_common::verdict::Verdict;
use lb_userspace::{
    api::view::Question,
    daemon::explain::{Names, explain, frame},
    dataplane::{Tables, kernel::KernelDataplane},
};
use tests::{
    both::{Both, steady_tick},
    packets::{Spec, flag},
    world::{self, INGRESS, LIMITS, VIP, VIP_ALL_PORTS, VIP_SHARED, VIP_V6, port},
};

/// Ports of services of every kind, and one of none.
const PORTS: [u16; 15] = [
    port::WEB,
    port::CUT,
    port::FEW_PORTS,
    port::ELSEWHERE,
    port::BROKEN,
    port::ASTRAY,
    port::CHANGING,
    port::EMPTY,
    port::HELD,
    port::LOCAL,
    port::FIREWALL,
    port::UNREACHABLE,
    port::DIRECT,
    22,
    9,
];

#[test]
fn an_explanation_names_the_verdict_that_the_program_gives() {
    if !xtask::lab::possible("an_explanation_names_the_verdict_that_the_program_gives") {
        return;
    }
    let mut kernel = KernelDataplane::open(None, LIMITS).expect("the program loads");
    let world = world::fill(&mut kernel).expect("the tables can be filled");
    world::turn_slots(&mut kernel, &world, steady_tick()).expect("slots can be turned");
    // The tables hold a ring that leads nowhere, which the daemon would not read: names are guessed instead.
    let held = Tables::default();
    let mut both = Both::new(kernel);
    let names = Names {
        held: &held,
        service: &|index| format!("service {index}"),
        nobody: &|index| format!("nobody of service {index}"),
        interface: &|index| format!("interface {index}"),
    };
    let (mut seen, mut backends, mut asked) = (BTreeSet::new(), BTreeSet::new(), 0);
    let nobodys = IpAddr::from([192, 0, 2, 1]);
    let vips = [VIP.into(), VIP_ALL_PORTS.into(), VIP_SHARED.into(), VIP_V6.into(), nobodys];
    let clients = |vip: IpAddr| {
        let address = if vip.is_ipv4() { "198.51.100.7" } else { "2001:db8:51::7" };
        (0..4).map(move |n| (vip, SocketAddr::new(address.parse().expect("an address"), 40_000 + n)))
    };
    for (vip, client) in vips.into_iter().flat_map(clients) {
        for port in PORTS {
            let called = SocketAddr::new(vip, port);
            let ends = ((client.ip(), client.port()), (called.ip(), called.port()));
            let kinds = [
                ("tcp", "syn", Spec::tcp(ends.0, ends.1, flag::SYN)),
                ("tcp", "ack", Spec::tcp(ends.0, ends.1, flag::ACK)),
                ("tcp", "fin", Spec::tcp(ends.0, ends.1, flag::FIN | flag::ACK)),
                ("tcp", "rst", Spec::tcp(ends.0, ends.1, flag::RST)),
                ("udp", "syn", Spec::udp(ends.0, ends.1)),
            ];
            for (protocol, flags, spec) in kinds {
                let question = Question {
                    client: client.to_string(),
                    called: called.to_string(),
                    protocol: protocol.into(),
                    flags: flags.into(),
                    sequence: spec.numbers.0,
                };
                // First what it would be; then it is, and the tables go on with it.
                let before = both.kernel.copy().expect("tables can be read");
                before.budget.set(both.host.budget.get());
                let asked_for = frame(&question).expect("a question");
                let said = explain(&before, &names, &asked_for, INGRESS, steady_tick());
                let (is, out) = both.decide(&spec.build());
                assert_eq!(said.verdict, is.name(), "{question:?}: {:?}", said.steps);
                if let Verdict::ToBackend { .. } = is {
                    let mac = out[..6].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
                    let outcome = said.steps.last().map(|step| step.detail.as_str()).unwrap_or_default();
                    assert!(outcome.contains(&mac), "{question:?}: {mac}, {:?}", said.steps);
                    backends.insert(mac);
                }
                assert!(said.steps.last().is_some_and(|step| step.what == "outcome"), "{:?}", said.steps);
                seen.insert(said.verdict);
                asked += 1;
            }
        }
    }
    println!("{asked} packets, {} verdicts: {seen:?}", seen.len());
    assert!(seen.len() >= 10 && backends.len() >= 6, "{seen:?} {backends:?}");
}
