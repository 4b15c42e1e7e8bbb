//! Two CPUs on one translated connection, the second at a moment that is chosen ([`Meeting`]).

use std::net::{IpAddr, Ipv4Addr};

use lb_common::{
    abi::{Backend, Flow, NO_BACKEND, Record, State, Tick, Way},
    datapath::{decide, record},
    sim::{MemTables, SliceFrame},
    tables::Tables,
    verdict::{DropReason, ResetReason, Verdict},
};
use lb_userspace::dataplane::kernel::KernelDataplane;
use tests::{
    both::Both,
    meeting::Meeting,
    packets::{self, Seen, Spec, flag},
    world::{self, INGRESS, LIMITS, VIP, port},
};

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
const TO_BACKEND: Verdict = Verdict::ToBackend { interface: INGRESS };
const UNKNOWN: ResetReason = ResetReason::UnknownFlow;

/// The tables, but where there are no rights to load the program, which they are copied from.
fn tables(test: &str) -> Option<MemTables> {
    xtask::lab::possible(test).then(|| {
        let mut kernel = KernelDataplane::open(None, LIMITS).expect("the program loads");
        world::fill(&mut kernel).expect("the tables can be filled");
        Both::new(kernel).host
    })
}

/// A packet of the client, and how it arrives.
fn call(tables: &impl Tables, flags: u8) -> (Verdict, Option<Seen>) {
    call_to(tables, (40000, port::CUT), flags)
}

/// The same between ports.
fn call_to(tables: &impl Tables, (from, to): (u16, u16), flags: u8) -> (Verdict, Option<Seen>) {
    let mut frame = SliceFrame(Spec::tcp((CLIENT, from), (VIP.into(), to), flags).build());
    let verdict = decide(&mut frame, tables, INGRESS, Tick(1000));
    (verdict, packets::read(&frame.0).ok())
}

fn ways(tables: &MemTables) -> impl Iterator<Item = &Way> {
    tables.records.iter().flat_map(|line| &line.ways)
}

fn records(tables: &MemTables) -> Vec<Record> {
    let used = ways(tables).filter(|way| way.key.get() > Record::BUSY);
    used.map(|way| Record(way.value.get())).collect()
}

fn flow(tables: &MemTables) -> &Flow {
    tables.flows.iter().find(|flow| flow.guard.get() & 3 == Flow::LIVE).expect("a flow")
}

#[test]
fn of_two_equal_first_packets_one_opens_a_connection_whenever_they_meet() {
    // The swaps of the first: its flow is taken, a way is taken, the record is shown.
    for at in 0..3 {
        let Some(tables) = tables("of_two_equal_first_packets_one_opens_a_connection_whenever_they_meet")
        else {
            return;
        };
        let meeting = Meeting::new(&tables, at, || {
            let (verdict, _) = call(&tables, flag::SYN);
            assert_eq!(verdict, TO_BACKEND, "the other, at {at}");
        });
        assert_eq!(call(&meeting, flag::SYN).0, DropReason::Race.into(), "at {at}");
        assert!(meeting.happened());
        let live = flow(&tables);
        let record = records(&tables);
        assert!(record.len() == 1 && record[0].port() == live.ports[2].get(), "at {at}: {record:?}");
        let sent = call(&tables, flag::ACK).1.expect("still a packet").source.1;
        assert_eq!(sent, u16::from_be(record[0].port()), "at {at}: by the port of the one that was sent");
        assert_eq!(tables.flows.iter().filter(|flow| flow.guard.get() & 3 != 0).count(), 1, "at {at}");
    }
}

#[test]
fn a_flow_that_another_cpu_took_while_there_was_no_room_stays_with_it() {
    let Some(tables) = tables("a_flow_that_another_cpu_took_while_there_was_no_room_stays_with_it") else {
        return;
    };
    const THEIRS: u64 = 7 << 32 | 400 | Flow::LIVE;
    let meeting = Meeting::new(&tables, 1, || {
        flow(&tables).guard.set(THEIRS);
        ways(&tables).for_each(|way| way.key.set(Record::BUSY));
    });
    assert_eq!(call(&meeting, flag::SYN).0, DropReason::TableFull.into());
    assert!(meeting.happened());
    assert_eq!(flow(&tables).guard.get(), THEIRS);
}

#[test]
fn a_record_does_not_outlive_its_flow_whatever_is_said_meanwhile() {
    const TEST: &str = "a_record_does_not_outlive_its_flow_whatever_is_said_meanwhile";
    const THEIRS: u64 = 7 << 32 | 400 | Flow::BUSY;
    // While a packet of the client is noted, whoever takes the flow has looked for the record already.
    let Some(seen) = tables(TEST) else { return };
    assert_eq!(call(&seen, flag::SYN).0, TO_BACKEND);
    let meeting = Meeting::new(&seen, 0, || flow(&seen).guard.set(THEIRS));
    call(&meeting, flag::RST);
    assert!(meeting.happened());
    assert_eq!(records(&seen), []);
    // While a new connection is written down.
    let Some(opened) = tables(TEST) else { return };
    let meeting = Meeting::new(&opened, 2, || flow(&opened).guard.set(THEIRS));
    assert_eq!(call(&meeting, flag::SYN).0, DropReason::Race.into());
    assert!(meeting.happened());
    assert_eq!(records(&opened), []);
    // While an answer is noted.
    let Some(answered) = tables(TEST) else { return };
    let first = call(&answered, flag::SYN).1.expect("still a packet");
    let meeting = Meeting::new(&answered, 0, || flow(&answered).guard.set(THEIRS));
    let answer = Spec { mac: world::BACKEND_MAC, ..Spec::tcp(first.destination, first.source, flag::RST) };
    decide(&mut SliceFrame(answer.build()), &meeting, INGRESS, Tick(1000));
    assert!(meeting.happened());
    assert_eq!(records(&answered), []);
}

#[test]
fn a_way_that_changed_hands_while_it_was_taken_is_not_lost() {
    let Some(tables) = tables("a_way_that_changed_hands_while_it_was_taken_is_not_lost") else { return };
    assert_eq!(call(&tables, flag::SYN).0, TO_BACKEND);
    let line = tables.records.iter().position(|line| line.ways.iter().any(|way| way.key.get() != 0));
    let line = line.expect("a record");
    let pair = || [line, line ^ 1].into_iter().flat_map(|line| &tables.records[line].ways);
    let way = pair().find(|way| way.key.get() != 0).expect("a record");
    let (key, value) = (way.key.get(), way.value.get());
    pair().filter(|way| way.key.get() == 0).for_each(|way| way.key.set(Record::BUSY));
    // Another connection, of which the same is said.
    let meeting = Meeting::new(&tables, 0, || way.key.set(key + 1));
    assert_eq!(record::take_way(&meeting, line as u32, 1000), 0);
    assert!(meeting.happened());
    assert_eq!((way.key.get(), way.value.get()), (key + 1, value));
}

#[test]
fn a_connection_is_gone_with_its_backends_entry() {
    const TEST: &str = "a_connection_is_gone_with_its_backends_entry";
    for part in 0..3 {
        let Some(tables) = tables(TEST) else { return };
        assert_eq!(call(&tables, flag::SYN).0, TO_BACKEND);
        let flow = flow(&tables);
        let backend = &tables.backends[flow.backend[0].get() as usize];
        match part {
            0 => {
                backend.flags.set(backend.flags.get() & !Backend::IN_USE);
                tables.pages.iter().flat_map(|page| &page.slots).for_each(|slot| slot.set(NO_BACKEND));
            }
            // Uses of the entry that the record cannot tell apart.
            1 => backend.generation.set(backend.generation.get() + 16),
            _ => flow.backend[0].set(flow.backend[0].get() + 1),
        }
        let (verdict, _) = call(&tables, flag::ACK);
        assert!(matches!(verdict, Verdict::Reset { reason: UNKNOWN, .. }), "{part}: {verdict:?}");
    }
}

/// A packet of a client of [`port::FEW_PORTS`], which has four.
fn call_few(tables: &impl Tables, client_port: u16, flags: u8) -> (Verdict, Option<Seen>) {
    call_to(tables, (client_port, port::FEW_PORTS), flags)
}

/// Four connections that are half open, and whose backends have answered.
fn call_four(tables: &MemTables) {
    for client_port in 40000..40004 {
        let (verdict, first) = call_few(tables, client_port, flag::SYN);
        assert_eq!(verdict, TO_BACKEND);
        let first = first.expect("still a packet");
        let flags = flag::SYN | flag::ACK;
        let answer = Spec { mac: world::BACKEND_MAC, ..Spec::tcp(first.destination, first.source, flags) };
        decide(&mut SliceFrame(answer.build()), tables, INGRESS, Tick(1000));
    }
}

/// The states of the records that name the flow of a port.
fn states(tables: &MemTables, port: u16) -> Vec<State> {
    let of_it = records(tables).into_iter().filter(|record| record.port() == port.to_be());
    of_it.map(Record::state).collect()
}

#[test]
fn one_that_is_established_while_its_flow_is_taken_leaves_no_record_behind() {
    const TEST: &str = "one_that_is_established_while_its_flow_is_taken_leaves_no_record_behind";
    let Some(former) = tables(TEST) else { return };
    call_four(&former);
    // Another CPU takes one for a fifth connection; at that moment the clients' last packets of the handshakes come.
    let meeting = Meeting::new(&former, 0, || {
        for client_port in 40000..40004 {
            assert_eq!(call_few(&former, client_port, flag::ACK).0, TO_BACKEND);
        }
    });
    let (verdict, fifth) = call_few(&meeting, 50000, flag::SYN);
    assert_eq!(verdict, TO_BACKEND);
    assert!(meeting.happened());
    let taken = fifth.expect("still a packet").source.1;
    assert_eq!(states(&former, taken), [State::HalfOpen], "the fifth's");
}
