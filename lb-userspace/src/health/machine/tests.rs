//! The state machine by tables and by chance.

use proptest::prelude::*;

use super::*;
use crate::config::Document;

const DOCUMENT: &str = r#"
interfaces = ["eth0"]
[pools.web]
health = { tcp = true, interval = "1s", rise = 2, fall = 3 }
backends = [ { address = "10.0.0.1:80" }, { address = "10.0.0.2:80" }, { address = "10.0.0.3:80" } ]
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
"#;

fn config(text: &str) -> Config {
    Document::parse(text).unwrap_or_else(|why| panic!("{why}")).config
}

fn key(number: u8) -> Key {
    Key { pool: "web".to_owned(), backend: format!("10.0.0.{number}:80").parse().unwrap() }
}

fn at(ms: u64) -> Now {
    Now { uptime: Duration::from_millis(ms), epoch: 1000 + ms / 1000 }
}

fn started(text: &str) -> Health {
    let mut health = Health::new(1);
    health.configure(&config(text), &Verdicts::new(), at(0));
    health
}

/// All three healthy.
fn healthy(text: &str) -> Health {
    let mut health = started(text);
    for number in 1..=3 {
        health.report(&key(number), true, at(1));
    }
    assert_eq!(usable(&health), [1, 2, 3]);
    health
}

fn verdict(health: &Health, number: u8) -> Verdict {
    health.verdicts()["web"].any[&key(number).backend]
}

/// Numbers of those that get new connections.
fn usable(health: &Health) -> Vec<u8> {
    (1..=3).filter(|&number| verdict(health, number).usable).collect()
}

fn fail(health: &mut Health, number: u8, now: Now) -> Vec<Event> {
    (0..3).flat_map(|_| health.report(&key(number), false, now)).collect()
}

#[test]
fn states_follow_rise_and_fall() {
    use State::*;
    // Results, + or -, and the state after each of them; a backend starts without traffic.
    let table: [(&str, &[State]); 7] = [
        ("", &[]),
        ("+", &[Healthy]),
        ("---+", &[Starting, Starting, Unhealthy, Healthy]),
        ("----+", &[Starting, Starting, Unhealthy, Unhealthy, Healthy]),
        ("+--+---", &[Healthy, Healthy, Healthy, Healthy, Healthy, Healthy, Unhealthy]),
        ("+---+-++", &[Healthy, Healthy, Healthy, Unhealthy, Unhealthy, Unhealthy, Unhealthy, Healthy]),
        ("+---++--+", &[Healthy, Healthy, Healthy, Unhealthy, Unhealthy, Healthy, Healthy, Healthy, Healthy]),
    ];
    for (results, states) in table {
        let mut health = started(DOCUMENT);
        // Another one is healthy throughout, so that not all fail.
        health.report(&key(2), true, at(0));
        assert_eq!(health.state(&key(1)), Some(Starting));
        let mut was_healthy = false;
        for (result, &state) in results.chars().zip(states) {
            was_healthy |= state == Healthy;
            let before = health.state(&key(1));
            let events = health.report(&key(1), result == '+', at(1));
            assert_eq!(health.state(&key(1)), Some(state), "{results}");
            let usable = verdict(&health, 1).usable;
            assert_eq!(usable, state == Healthy, "{results}");
            assert_eq!(verdict(&health, 1).dead, was_healthy && state == Unhealthy);
            let transition = Event::Transition { key: key(1), from: before, to: state };
            assert_eq!(events.contains(&transition), before != Some(state));
            // And a verdict, but for who gets nothing either way.
            let others = usize::from(before != Some(Starting) || state != Unhealthy);
            assert_eq!(events.len(), if before == Some(state) { 0 } else { 1 + others }, "{events:?}");
        }
    }
}

/// An alarm is raised, and nobody is in use: an outage is of those that have worked.
#[test]
fn when_nobody_has_ever_been_fit_nobody_is_kept() {
    let mut health = started(DOCUMENT);
    let mut events = Vec::new();
    for number in 1..=3 {
        assert_eq!(health.all_failed().count(), 0, "one is not known yet");
        events.extend(fail(&mut health, number, at(1000)));
    }
    let alarm = Event::AllFailed { pool: "web".to_owned(), kept: Vec::new() };
    assert_eq!(events.iter().filter(|&event| *event == alarm).count(), 1, "{events:?}");
    assert!(usable(&health).is_empty());
    // One is found good, and bad again: it is the outage's.
    health.report(&key(2), true, at(2000));
    assert_eq!((usable(&health), health.all_failed().count()), (vec![2], 0));
    fail(&mut health, 2, at(3000));
    assert_eq!((usable(&health), health.all_failed().count()), (vec![2], 1));
}

#[test]
fn what_becomes_of_connections_is_the_documents_to_say() {
    for (word, flows) in [("keep", FlowsOf::Keep), ("move", FlowsOf::Forget), ("reset", FlowsOf::Cut)] {
        let text = DOCUMENT.replace("[services", &format!("on_unhealthy = \"{word}\"\n[services"));
        let mut health = healthy(&text);
        fail(&mut health, 2, at(2));
        assert_eq!(verdict(&health, 2), Verdict { dead: true, flows, ..Verdict::RESTING });
        assert_eq!(verdict(&health, 1), Verdict::USABLE);
    }
}

#[test]
fn when_all_fail_at_once_all_stay_in_use_and_an_alarm_is_raised_once() {
    let mut health = healthy(DOCUMENT);
    let mut events = Vec::new();
    for number in 1..=3 {
        events.extend(fail(&mut health, number, at(10_000 + 500 * u64::from(number))));
    }
    let all: Vec<_> = (1..=3).map(|number| key(number).backend).collect();
    let alarm = Event::AllFailed { pool: "web".to_owned(), kept: all };
    assert_eq!(events.iter().filter(|&event| *event == alarm).count(), 1, "{events:?}");
    assert_eq!(usable(&health), [1, 2, 3]);
    assert_eq!(health.state(&key(1)), Some(State::Unhealthy));
    assert_eq!(fail(&mut health, 1, at(20_000)), []);
    assert_eq!(health.all_failed().count(), 1);

    // One comes back: from then on only it is used.
    assert_eq!(health.report(&key(2), true, at(21_000)), []);
    let events = health.report(&key(2), true, at(22_000));
    assert!(events.contains(&Event::AllFailedOver { pool: "web".to_owned() }), "{events:?}");
    assert_eq!(usable(&health), [2]);
    assert_eq!(health.all_failed().count(), 0);
}

#[test]
fn who_failed_long_before_the_last_one_does_not_come_back_with_it() {
    let mut health = healthy(DOCUMENT);
    fail(&mut health, 1, at(10_000));
    fail(&mut health, 2, at(60_000));
    fail(&mut health, 3, at(61_000));
    assert_eq!(usable(&health), [2, 3]);
}

#[test]
fn the_document_may_want_none_to_stay_in_use() {
    let mut health = healthy(&DOCUMENT.replace("[services", "panic = \"fail\"\n[services"));
    let events: Vec<_> = (1..=3).flat_map(|number| fail(&mut health, number, at(5000))).collect();
    assert!(events.contains(&Event::AllFailed { pool: "web".to_owned(), kept: vec![] }), "{events:?}");
    assert_eq!(usable(&health), [] as [u8; 0]);
}

#[test]
fn who_comes_back_or_is_new_starts_slowly() {
    let text = DOCUMENT.replace("[services", "slow_start = \"10s\"\n[services");
    let mut health = healthy(&text);
    let share = |health: &Health, number| verdict(health, number).share;
    assert_eq!([1, 2, 3].map(|number| share(&health, number)), [Verdict::WHOLE; 3], "all begin together");
    assert_eq!(health.wait(at(1)), None);

    fail(&mut health, 2, at(1000));
    assert_eq!(health.wait(at(1000)), None);
    health.report(&key(2), true, at(2000));
    health.report(&key(2), true, at(3000));
    assert_eq!((share(&health, 2), share(&health, 1)), (1, Verdict::WHOLE));
    for tenth in 1..10 {
        let due = 3000 + 1000 * u64::from(tenth);
        assert_eq!(health.wait(at(due - 1)), Some(Duration::from_millis(1)));
        assert_eq!(health.pass_time(at(due - 1)), []);
        assert_eq!(health.pass_time(at(due)), [Event::Verdicts { pool: "web".to_owned() }]);
        assert_eq!(share(&health, 2), tenth + 1);
    }
    assert_eq!((share(&health, 2), health.wait(at(12_000))), (Verdict::WHOLE, None));

    // A new one, but for those that the tables knew; one that was disabled.
    let more = text.replace("{ address = \"10.0.0.3:80\" }", "{ address = \"10.0.0.4:80\" }");
    health.configure(&config(&more), &Verdicts::new(), at(20_000));
    health.report(&key(4), true, at(21_000));
    assert_eq!(share(&health, 4), 1);
    // It fails, which ends it; it comes back, and time has passed unseen.
    fail(&mut health, 4, at(22_000));
    health.report(&key(4), true, at(23_000));
    health.report(&key(4), true, at(24_000));
    health.pass_time(at(26_500));
    assert_eq!(share(&health, 4), 3);
    let disabled = more.replace("10.0.0.1:80\"", "10.0.0.1:80\", disabled = true");
    health.configure(&config(&disabled), &Verdicts::new(), at(30_000));
    health.configure(&config(&more), &Verdicts::new(), at(31_000));
    health.report(&key(1), true, at(32_000));
    assert_eq!(share(&health, 1), 1);
    // Without the key it gets all at once.
    health.configure(&config(&more.replace("slow_start = \"10s\"", "")), &Verdicts::new(), at(33_000));
    assert_eq!(share(&health, 1), Verdict::WHOLE);
}

#[test]
fn a_drain_ends_with_the_last_connection_or_at_its_deadline() {
    let mut health = healthy(DOCUMENT);
    let draining =
        |drain: &str| config(&DOCUMENT.replace("10.0.0.2:80\"", &format!("10.0.0.2:80\", drain = {drain}")));
    health.configure(&draining("true"), &Verdicts::new(), at(2000));
    assert_eq!(health.state(&key(2)), Some(State::Draining));
    assert_eq!(verdict(&health, 2), Verdict::RESTING);
    assert_eq!(health.note_connections(&key(2), 5, at(3000)), []);
    health.note_connections(&key(2), 0, at(4000));
    assert_eq!(health.state(&key(2)), Some(State::Drained));
    assert_eq!(health.wait(at(4000)), None);

    // Resumed, it is used at once: it has been asked all the time.
    health.configure(&config(DOCUMENT), &Verdicts::new(), at(5000));
    assert_eq!(health.state(&key(2)), Some(State::Healthy));

    // 1970-01-01T00:17:00Z is second 1020.
    health.configure(&draining("1970-01-01T00:17:00Z"), &Verdicts::new(), at(6000));
    assert_eq!((health.state(&key(2)), verdict(&health, 2)), (Some(State::Draining), Verdict::RESTING));
    assert_eq!(health.wait(at(6000)), Some(Duration::from_secs(14)));
    assert_eq!(health.pass_time(at(19_999)), []);
    let events = health.pass_time(at(20_000));
    assert!(events.contains(&Event::Verdicts { pool: "web".to_owned() }), "{events:?}");
    assert_eq!(health.state(&key(2)), Some(State::Drained));
    assert_eq!(verdict(&health, 2).flows, FlowsOf::Cut);
}

#[test]
fn who_is_disabled_is_cut_and_not_asked_and_starts_anew() {
    let mut health = healthy(DOCUMENT);
    (0..2).for_each(|_| _ = health.report(&key(2), false, at(1500)));
    let disabled = config(&DOCUMENT.replace("10.0.0.2:80\"", "10.0.0.2:80\", disabled = true"));
    health.configure(&disabled, &Verdicts::new(), at(2000));
    assert_eq!(verdict(&health, 2), Verdict { flows: FlowsOf::Cut, ..Verdict::RESTING });
    assert_eq!(health.report(&key(2), true, at(3000)), []);
    let asked: BTreeSet<Key> =
        (0..100).flat_map(|n| health.take_due(at(3000 + n * 100))).map(|(key, _)| key).collect();
    assert_eq!(asked, BTreeSet::from([key(1), key(3)]));
    health.configure(&config(DOCUMENT), &Verdicts::new(), at(20_000));
    assert_eq!((health.state(&key(2)), verdict(&health, 2)), (Some(State::Starting), Verdict::RESTING));
    // What it failed before does not count.
    for state in [State::Starting, State::Starting, State::Unhealthy] {
        health.report(&key(2), false, at(20_000));
        assert_eq!(health.state(&key(2)), Some(state));
    }
}

#[test]
fn without_a_check_all_are_healthy_and_a_new_check_changes_nothing_at_first() {
    let unchecked = DOCUMENT.replace("health = { tcp = true, interval = \"1s\", rise = 2, fall = 3 }\n", "");
    let mut health = started(&unchecked);
    assert_eq!(usable(&health), [1, 2, 3]);
    assert_eq!(health.next_probe(), None);
    health.configure(&config(DOCUMENT), &Verdicts::new(), at(1000));
    assert_eq!(usable(&health), [1, 2, 3]);
    assert!(health.next_probe().is_some());
    fail(&mut health, 1, at(2000));
    assert_eq!(usable(&health), [2, 3]);
}

#[test]
fn after_a_restart_all_is_as_before() {
    let dead = Verdict { dead: true, flows: FlowsOf::Keep, ..Verdict::RESTING };
    let pool = [(key(1).backend, Verdict::USABLE), (key(2).backend, dead)];
    let remembered = Verdicts::from([("web".to_owned(), pool.into_iter().collect())]);
    let mut health = Health::new(9);
    health.configure(&config(DOCUMENT), &remembered, at(0));
    let states: Vec<State> = health.states().map(|(_, _, state)| state).collect();
    assert_eq!(states, [State::Healthy, State::Unhealthy, State::Starting]);
    assert_eq!(usable(&health), [1]);
    // What is remembered is of no account for those who are known by now.
    fail(&mut health, 1, at(1000));
    health.configure(&config(DOCUMENT), &remembered, at(1000));
    assert_eq!(health.state(&key(1)), Some(State::Unhealthy));
}

#[test]
fn what_is_remembered_is_what_the_tables_say() {
    use crate::dataplane::{Dataplane, Tables, memory::MemoryDataplane};
    use crate::plan::{Desired, plan};
    let config = config(DOCUMENT);
    let dead = Verdict { dead: true, flows: FlowsOf::Forget, ..Verdict::RESTING };
    let pool =
        [(key(1).backend, Verdict::USABLE), (key(2).backend, dead), (key(3).backend, Verdict::RESTING)];
    let verdicts = Verdicts::from([("web".to_owned(), pool.into_iter().collect())]);
    let desired = Desired {
        config: &config,
        verdicts: &verdicts,
        next_hops: &BTreeMap::new(),
        sources: &BTreeMap::new(),
        shared_vips: &BTreeSet::new(),
        interfaces: &BTreeMap::new(),
        hash_key: [0; 2],
        same_interface_tx: false,
        spent: &BTreeSet::new(),
        now: lb_common::abi::Tick(1),
    };
    let mut memory = MemoryDataplane::new(config.settings.limits);
    let before = Tables { limits: config.settings.limits, ..Tables::default() };
    for op in plan(&desired, &before).unwrap().ops {
        memory.apply(&op).unwrap();
    }
    assert_eq!(super::super::remembered(&config, &memory.tables().unwrap()), verdicts);
}

#[test]
fn reports_on_strangers_change_nothing() {
    let mut health = healthy(DOCUMENT);
    let stranger = Key { pool: "none".to_owned(), ..key(1) };
    assert_eq!(health.report(&stranger, false, at(1)), []);
    assert_eq!(health.report(&key(9), false, at(1)), []);
    assert_eq!(health.note_connections(&stranger, 0, at(1)), []);
}

proptest! {
    /// Any history: what must always hold.
    #[test]
    fn health_never_breaks_what_works(history in prop::collection::vec((1u8..=3, any::<bool>(), 0u64..3000), 1..200)) {
        let mut health = started(DOCUMENT);
        let (mut now, mut ever) = (0, BTreeSet::new());
        let mut told: BTreeMap<Key, State> = health.states().map(|(_, backend, state)| {
            (Key { pool: "web".to_owned(), backend }, state)
        }).collect();
        for (number, success, wait) in history {
            now += wait;
            if success {
                ever.insert(number);
            }
            let before = health.verdicts().clone();
            let events = health.report(&key(number), success, at(now));
            for event in &events {
                if let Event::Transition { key, from, to } = event {
                    prop_assert_eq!(told.insert(key.clone(), *to), *from);
                }
            }
            let changed = events.contains(&Event::Verdicts { pool: "web".to_owned() });
            prop_assert_eq!(changed, before != *health.verdicts(), "a change is always told, and only a change");
            // Nobody gets traffic before its first success; once there was one, somebody always does.
            let usable = usable(&health);
            prop_assert!(usable.iter().all(|number| ever.contains(number)));
            prop_assert_eq!(usable.is_empty(), ever.is_empty());
            // Connections are kept, whatever happens.
            prop_assert!(health.verdicts()["web"].any.values().all(|verdict| verdict.flows == FlowsOf::Keep));
            prop_assert!(health.verdicts()["web"].any.values().all(|verdict| !(verdict.usable && verdict.dead)));
        }
        for (_, backend, state) in health.states() {
            prop_assert_eq!(told[&Key { pool: "web".to_owned(), backend }], state);
        }
    }
}

const DATABASE: &str = r#"
interfaces = ["eth0"]
[pools.web]
health = { postgres = { user = "lb", max_lag = "5s" }, interval = "1s", rise = 2, fall = 3 }
backends = [ { address = "10.0.0.1:80" }, { address = "10.0.0.2:80" }, { address = "10.0.0.3:80" } ]
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
role = "primary"
"#;

/// What follows for the three backends where writes go, and where reads go: + for usable, x for cut, - for
/// neither.
fn roles(health: &Health) -> [String; 2] {
    let verdicts = &health.verdicts()["web"];
    [&verdicts.primary, &verdicts.replica].map(|verdicts| {
        let sign = |verdict: &Verdict| match (verdict.usable, verdict.flows) {
            (true, FlowsOf::Keep) => '+',
            (_, FlowsOf::Cut) => 'x',
            _ => '-',
        };
        (1..=3).map(|number| sign(&verdicts[&key(number).backend])).collect()
    })
}

/// The first is the primary, the others follow it.
fn cluster(text: &str) -> Health {
    let mut health = started(text);
    assert_eq!(roles(&health), ["---", "---"]);
    for (number, says) in [(1, Says::Primary), (2, Says::Replica), (3, Says::Replica)] {
        health.observe(&key(number), said(says, 1), at(1));
    }
    assert_eq!(roles(&health), ["+xx", "-++"]);
    health
}

fn said(says: Says, timeline: u32) -> Observation {
    Observation { timeline: Some(timeline), position: Some(100), ..Observation::of(says) }
}

#[test]
fn a_pool_that_comes_later_has_had_nobody_since_then_and_its_clients_wait_from_then_on() {
    let text = DATABASE.replace("[pools.web]", "[pools.web]\non_no_primary = { hold = \"30s\" }");
    let mut health = Health::new(1);
    health.configure(&config(&text), &Verdicts::new(), at(67_000));
    assert_eq!(health.cluster("web").unwrap().since(), at(67_000).uptime);
    assert!(health.verdicts()["web"].holds);
    health.pass_time(at(97_000));
    assert!(!health.verdicts()["web"].holds);
}

#[test]
fn a_role_turns_on_one_answer_and_liveness_on_several() {
    let mut health = cluster(DATABASE);
    // Silence: nothing at first, then no new writes, and connections stay.
    health.report(&key(1), false, at(2));
    health.report(&key(1), false, at(3));
    assert_eq!(roles(&health), ["+xx", "-++"]);
    health.report(&key(1), false, at(4));
    assert_eq!(roles(&health), ["-xx", "-++"]);
    // A promotion: the old one's connections are cut.
    let events = health.observe(&key(2), said(Says::Primary, 2), at(5));
    assert_eq!(roles(&health), ["x+x", "--+"]);
    let told = events.iter().find_map(|event| match event {
        Event::Primary { to, why, .. } => Some((*to, why.as_str())),
        _ => None,
    });
    let (to, why) = told.expect("that writes go elsewhere is told");
    assert_eq!(to, Some(key(2).backend));
    assert!(why.contains("10.0.0.1:80 does not answer, said primary on timeline 1"), "{why}");
    // It comes back as what it was.
    health.observe(&key(1), said(Says::Primary, 1), at(6));
    assert_eq!(roles(&health), ["x+x", "--+"]);
    assert_eq!(health.doubts().count(), 1);
}

#[test]
fn without_a_fit_replica_reads_go_to_the_primary_unless_told_not_to() {
    for (more, reads) in [("", "+--"), ("replica_fallback = \"none\"", "---"), ("on_unfit = \"cut\"", "+--")]
    {
        let text = DATABASE.replace("[services", &format!("{more}\n[services"));
        let mut health = cluster(&text);
        health.observe(&key(2), Observation::of(Says::Neither), at(2));
        assert_eq!(roles(&health)[1], if more.contains("cut") { "-x+" } else { "--+" });
        for ms in 3..=5 {
            health.report(&key(3), false, at(ms));
        }
        let reads = if more.contains("cut") { "+x-" } else { reads };
        assert_eq!(roles(&health)[1], reads, "{more}");
    }
}

#[test]
fn who_may_not_be_written_to_is_the_operators_word_too() {
    let mut health = cluster(DATABASE);
    let with = |extra: &str| config(&DATABASE.replace("10.0.0.1:80\"", &format!("10.0.0.1:80\", {extra}")));
    health.configure(&with("drain = true"), &Verdicts::new(), at(2));
    assert_eq!(roles(&health)[0], "-xx");
    health.configure(&with("disabled = true"), &Verdicts::new(), at(3));
    assert_eq!(roles(&health)[0], "xxx");
}

#[test]
fn clients_wait_for_a_primary_for_as_long_as_the_document_says() {
    let text = DATABASE.replace("[services", "on_no_primary = { hold = \"10s\" }\n[services");
    let mut health = cluster(&text);
    let holds = |health: &Health| health.verdicts()["web"].holds;
    // From before on, so that nobody is refused in between.
    assert!(holds(&health));
    health.observe(&key(1), said(Says::Replica, 1), at(2_500));
    assert_eq!(roles(&health)[0], "xxx");
    assert!(holds(&health));
    // Ten seconds after 2.5, and not before.
    for ms in [3_000, 12_499] {
        assert_eq!(health.pass_time(at(ms)), []);
    }
    assert!(holds(&health));
    assert_eq!(health.wait(at(12_499)), Some(Duration::from_millis(1)));
    assert_eq!(health.pass_time(at(12_500)), [Event::Verdicts { pool: "web".to_owned() }]);
    assert!(!holds(&health) && health.wait(at(12_500)).is_none());
    // The next time anew.
    health.observe(&key(2), said(Says::Primary, 2), at(20_000));
    assert!(holds(&health) && roles(&health)[0] == "x+x");
    // What the document says now holds now.
    health.configure(&config(DATABASE), &Verdicts::new(), at(21_000));
    assert!(!holds(&health));
}
