//! The choice of the primary: by cases, over every state of three servers, and over histories by chance.

use proptest::prelude::*;

use super::*;

const FITNESS: Fitness = Fitness { max_lag: Some(Duration::from_secs(5)), rise: 2, fall: 3 };

fn address(number: u8) -> BackendAddress {
    format!("10.0.0.{number}:5432").parse().unwrap()
}

fn primary(timeline: u32) -> Observation {
    Observation { timeline: Some(timeline), position: Some(1000), ..Observation::of(Says::Primary) }
}

fn replica(timeline: u32) -> Observation {
    Observation { timeline: Some(timeline), position: Some(1000), ..Observation::of(Says::Replica) }
}

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Three servers that nobody has asked.
fn three() -> Cluster {
    let mut cluster = Cluster::default();
    cluster.configure((1..=3).map(|number| (address(number), false)), &BTreeMap::new(), at(0));
    cluster
}

/// The first is the primary on timeline 1.
fn running() -> Cluster {
    let mut cluster = three();
    hear(&mut cluster, 1, primary(1));
    hear(&mut cluster, 2, replica(1));
    hear(&mut cluster, 3, replica(1));
    assert_eq!(cluster.primary(), Some(address(1)));
    cluster
}

fn hear(cluster: &mut Cluster, number: u8, said: Observation) -> Outcome {
    cluster.hear(address(number), said, FITNESS, at(1))
}

fn silent(cluster: &mut Cluster, number: u8, gone: bool) -> Outcome {
    cluster.miss(address(number), gone, at(1))
}

#[test]
fn nobody_is_followed_before_all_have_been_asked() {
    let mut cluster = three();
    // An old primary that answers first.
    hear(&mut cluster, 1, primary(1));
    assert_eq!(cluster.primary(), None);
    silent(&mut cluster, 3, false);
    assert_eq!(cluster.primary(), None);
    hear(&mut cluster, 2, primary(2));
    assert_eq!(cluster.primary(), Some(address(2)));
    assert_eq!(cluster.doubt(), Some(&Doubt { writer: Some(address(2)), others: vec![address(1)] }));
}

#[test]
fn who_has_never_had_a_primary_says_since_when_and_why() {
    let mut cluster = Cluster::new(at(67_000));
    cluster.configure((1..=2).map(|number| (address(number), false)), &BTreeMap::new(), at(67_000));
    let turned = |cluster: &Cluster| cluster.turned();
    let (since, why) = turned(&cluster);
    assert_eq!(since, at(67_000));
    assert_eq!(
        why,
        "not everybody has been asked yet: 10.0.0.1:5432 has not been asked; 10.0.0.2:5432 has not been asked"
    );
    hear(&mut cluster, 1, replica(1));
    silent(&mut cluster, 2, false);
    let (since, why) = turned(&cluster);
    assert_eq!(since, at(67_000), "nothing has changed");
    assert!(
        why.starts_with("nobody says that it is a primary") && why.ends_with("2:5432 does not answer"),
        "{why}"
    );
    // As it was decided, and no more.
    hear(&mut cluster, 2, primary(1));
    let decided = turned(&cluster);
    hear(&mut cluster, 1, replica(1));
    assert!(decided.0 == at(1) && decided.1.starts_with("it is the primary of the latest"), "{decided:?}");
    assert_eq!(turned(&cluster), decided);
    // One that a daemon takes over.
    let mut cluster = Cluster::new(at(0));
    cluster.configure([(address(1), false)], &BTreeMap::from([(address(1), Says::Primary)]), at(0));
    assert!(turned(&cluster).1.starts_with("it had them when the daemon began"));
}

#[test]
fn a_promotion_is_followed_on_one_answer_whatever_the_old_primary_does() {
    for (case, before) in [("answers", None), ("is silent", Some(false)), ("is gone", Some(true))] {
        let mut cluster = running();
        if let Some(gone) = before {
            silent(&mut cluster, 1, gone);
        }
        let outcome = hear(&mut cluster, 2, primary(2));
        assert_eq!(cluster.primary(), Some(address(2)), "the old primary {case}");
        assert!(outcome.turned.is_some() && outcome.urgent);
        // Back again, or still there: not believed any more.
        let outcome = hear(&mut cluster, 1, primary(1));
        assert_eq!((cluster.primary(), outcome.turned), (Some(address(2)), None));
        assert!(cluster.doubt().is_some());
        hear(&mut cluster, 1, replica(2));
        assert_eq!(cluster.doubt(), None);
    }
}

#[test]
fn a_demotion_counts_on_one_answer() {
    let mut cluster = running();
    hear(&mut cluster, 1, replica(1));
    assert_eq!((cluster.primary(), cluster.lingering()), (None, None));
}

#[test]
fn silence_keeps_the_primary_until_it_is_gone_and_then_its_connections() {
    let mut cluster = running();
    assert_eq!(silent(&mut cluster, 1, false).turned, None);
    assert_eq!(cluster.primary(), Some(address(1)));
    silent(&mut cluster, 1, true);
    assert_eq!((cluster.primary(), cluster.lingering()), (None, Some(address(1))));
    hear(&mut cluster, 1, primary(1));
    assert_eq!((cluster.primary(), cluster.lingering()), (Some(address(1)), None));
}

#[test]
fn a_primary_that_was_left_behind_is_never_followed_unless_told() {
    let mut cluster = running();
    hear(&mut cluster, 2, primary(2));
    silent(&mut cluster, 2, true);
    // The newer one has died, and the old one is all there is: what was written since is not on it.
    hear(&mut cluster, 1, primary(1));
    assert_eq!(cluster.primary(), None);
    assert_eq!(cluster.doubt(), Some(&Doubt { writer: None, others: vec![address(1)] }));
    assert!(cluster.tell(address(3), at(2)).is_err());
    cluster.tell(address(1), at(2)).unwrap();
    assert_eq!((cluster.primary(), cluster.doubt()), (Some(address(1)), None));
    hear(&mut cluster, 1, primary(1));
    assert_eq!(cluster.primary(), Some(address(1)));
    // Nobody can be told to be believed while a later one is there.
    hear(&mut cluster, 2, primary(2));
    assert_eq!(cluster.primary(), Some(address(2)));
    assert!(cluster.tell(address(1), at(2)).unwrap_err().contains("later timeline"));
}

#[test]
fn a_second_primary_on_the_same_timeline_gets_nothing() {
    let mut cluster = running();
    let outcome = hear(&mut cluster, 2, primary(1));
    assert!(outcome.doubted.is_some() && outcome.urgent && outcome.turned.is_none());
    assert_eq!(cluster.primary(), Some(address(1)));
    assert_eq!(cluster.doubt(), Some(&Doubt { writer: Some(address(1)), others: vec![address(2)] }));
    // A standing doubt is no reason to hurry again and again.
    let outcome = hear(&mut cluster, 2, primary(1));
    assert!(outcome.doubted.is_none() && !outcome.urgent);
    // Nor does it get them when the first is silent: nobody was promoted.
    silent(&mut cluster, 1, true);
    assert_eq!(cluster.primary(), None);
    // But when the first says that it is none.
    hear(&mut cluster, 1, replica(1));
    assert_eq!(cluster.primary(), Some(address(2)));
}

#[test]
fn two_promoted_to_the_same_timeline_leave_the_present_one() {
    let mut cluster = running();
    silent(&mut cluster, 1, false);
    hear(&mut cluster, 2, primary(2));
    assert_eq!(cluster.primary(), Some(address(2)));
    hear(&mut cluster, 3, primary(2));
    assert_eq!(cluster.primary(), Some(address(2)));
    assert!(cluster.doubt().is_some());
}

#[test]
fn without_timelines_the_present_one_stays_until_it_is_none_or_gone() {
    let claim = Observation::of(Says::Primary);
    for gone in [false, true] {
        let mut cluster = three();
        hear(&mut cluster, 1, claim);
        hear(&mut cluster, 2, Observation::of(Says::Replica));
        hear(&mut cluster, 3, Observation::of(Says::Neither));
        assert_eq!(cluster.primary(), Some(address(1)));
        hear(&mut cluster, 2, claim);
        assert_eq!(cluster.primary(), Some(address(1)));
        silent(&mut cluster, 1, false);
        assert_eq!(cluster.primary(), Some(address(1)));
        match gone {
            true => silent(&mut cluster, 1, true),
            false => hear(&mut cluster, 1, Observation::of(Says::Neither)),
        };
        assert_eq!((cluster.primary(), cluster.doubt()), (Some(address(2)), None));
    }
}

#[test]
fn a_primary_that_refuses_writes_gets_none_and_keeps_its_connections() {
    let mut cluster = running();
    hear(&mut cluster, 1, Observation { read_only: true, ..primary(1) });
    assert_eq!((cluster.primary(), cluster.lingering()), (None, Some(address(1))));
}

#[test]
fn after_a_restart_the_one_before_goes_on_until_all_have_been_asked() {
    let remembered = BTreeMap::from([(address(1), Says::Primary), (address(2), Says::Replica)]);
    let start = || {
        let mut cluster = Cluster::default();
        cluster.configure((1..=3).map(|number| (address(number), false)), &remembered, at(0));
        assert_eq!(cluster.primary(), Some(address(1)));
        assert!(cluster.is_fit(address(2)) && !cluster.is_fit(address(3)));
        cluster
    };
    let mut cluster = start();
    hear(&mut cluster, 2, primary(2));
    assert_eq!(cluster.primary(), Some(address(1)), "not all have been asked");
    hear(&mut cluster, 3, replica(1));
    hear(&mut cluster, 1, primary(1));
    assert_eq!(cluster.primary(), Some(address(2)));
    // It says itself that it is none: nothing to wait for.
    let mut cluster = start();
    hear(&mut cluster, 1, replica(2));
    assert_eq!(cluster.primary(), None);
    // The old one comes back alone, and the timeline that was followed is known.
    let mut cluster = start();
    cluster.remember_timeline(3);
    silent(&mut cluster, 1, true);
    silent(&mut cluster, 3, true);
    hear(&mut cluster, 2, primary(2));
    assert_eq!(cluster.primary(), None);
}

#[test]
fn who_is_disabled_is_not_followed() {
    let mut cluster = running();
    let outcome =
        cluster.configure((1..=3).map(|number| (address(number), number == 1)), &BTreeMap::new(), at(2));
    assert!(outcome.turned.is_some());
    assert_eq!(cluster.primary(), None);
    hear(&mut cluster, 2, primary(1));
    assert_eq!(cluster.primary(), Some(address(2)), "the operator has taken the other one out");
}

#[test]
fn lag_is_the_time_for_which_what_the_primary_wrote_is_missing() {
    let mut cluster = running();
    let at_position = |position| Observation { position: Some(position), ..primary(1) };
    for second in 1..=10 {
        let said = at_position(1000 + second * 100);
        cluster.hear(address(1), said, FITNESS, Duration::from_secs(second));
    }
    let lag = |cluster: &mut Cluster, position, second| {
        let said = Observation { position: Some(position), ..replica(1) };
        cluster.hear(address(2), said, FITNESS, Duration::from_secs(second));
        let lag = cluster.lag(address(2), Duration::from_secs(second));
        (lag.bytes.unwrap(), lag.time.unwrap().as_secs())
    };
    assert_eq!(lag(&mut cluster, 2000, 10), (0, 0));
    assert_eq!(lag(&mut cluster, 2500, 11), (0, 0), "ahead of what the primary said last");
    assert_eq!(lag(&mut cluster, 1950, 11), (50, 1));
    assert_eq!(lag(&mut cluster, 1500, 11), (500, 5));
    // A quiet primary: nothing is missing, however long ago its last write was.
    assert_eq!(lag(&mut cluster, 2000, 500), (0, 0));
}

#[test]
fn lag_is_measured_by_the_primary_of_now() {
    let mut cluster = running();
    hear(&mut cluster, 1, Observation { position: Some(5000), ..primary(1) });
    // It had written more than anybody got.
    hear(&mut cluster, 2, Observation { position: Some(4000), ..primary(2) });
    cluster.hear(address(3), Observation { position: Some(4000), ..replica(2) }, FITNESS, at(60_000));
    let lag = cluster.lag(address(3), at(60_000));
    assert_eq!((lag.bytes, lag.time), (Some(0), Some(Duration::ZERO)));
}

#[test]
fn a_short_lag_changes_nothing_and_a_long_one_does() {
    let mut cluster = running();
    cluster.hear(address(1), Observation { position: Some(5000), ..primary(1) }, FITNESS, at(0));
    let mut behind = |position, ms| {
        let said = Observation { position: Some(position), ..replica(1) };
        let outcome = cluster.hear(address(2), said, FITNESS, at(ms));
        assert_eq!(cluster.primary(), Some(address(1)));
        (outcome.fitness, cluster.is_fit(address(2)))
    };
    assert_eq!(behind(4000, 5_000), (false, true));
    assert_eq!(behind(4000, 6_000), (false, true));
    assert_eq!(behind(4000, 7_000), (false, true));
    assert_eq!(behind(5000, 8_000), (false, true), "there again: counting begins anew");
    assert_eq!(behind(4000, 9_000), (false, true));
    assert_eq!(behind(4000, 10_000), (false, true));
    assert_eq!(behind(4000, 11_000), (true, false));
    assert_eq!(behind(5000, 12_000), (false, false));
    assert_eq!(behind(5000, 13_000), (true, true));
}

/// All that may be known of a server.
fn servers() -> Vec<Server> {
    let sayings = [
        None,
        Some(primary(1)),
        Some(primary(2)),
        Some(primary(3)),
        Some(Observation::of(Says::Primary)),
        Some(Observation { read_only: true, ..primary(2) }),
        Some(replica(2)),
    ];
    let mut all = vec![
        Server { presumed: Some(Says::Primary), ..Server::default() },
        Server { disabled: true, ..Server::default() },
    ];
    for last in sayings {
        for heard in [Heard::Nothing, Heard::Answer, Heard::Silence, Heard::Gone] {
            if (heard == Heard::Nothing) <= last.is_none() && (heard == Heard::Answer) <= last.is_some() {
                all.push(Server { last, heard, ..Server::default() });
            }
        }
    }
    all
}

/// What must hold of every decision, said once more in other words.
fn check(cluster: &Cluster) {
    let choice = cluster.choose();
    let claims = |(_, server): &(&BackendAddress, &Server)| {
        server.claims() && server.last.is_some_and(|l| !l.read_only)
    };
    let claimants: Vec<_> = cluster.servers.iter().filter(claims).collect();
    let present = cluster.present.and_then(|address| Some((address, cluster.servers.get(&address)?)));
    let stands = present.is_some_and(|(_, server)| server.stands());
    if let Some(chosen) = choice.primary {
        let server = &cluster.servers[&chosen];
        assert!(!server.disabled);
        if Some(chosen) == cluster.present {
            assert!(stands, "{cluster:?}");
        } else {
            assert!(server.claims() && cluster.started, "{cluster:?}");
            for (other, rival) in &claimants {
                assert!(
                    **other == chosen || rival.timeline() < server.timeline() || rival.timeline().is_none()
                );
            }
            assert!(server.timeline().is_none() || server.timeline() >= cluster.timeline, "an old primary");
            if let Some((_, before)) = present.filter(|_| stands) {
                assert!(server.timeline() > before.timeline() && server.timeline() > cluster.timeline);
                assert!(before.timeline().or(cluster.timeline).is_some(), "{cluster:?}");
            }
        }
    } else {
        assert!(!stands, "who stands is left without writes: {cluster:?}");
        let alone = claimants.len() == 1 && cluster.started;
        if alone && claimants[0].1.timeline() > cluster.timeline {
            panic!("one alone claims, on a later timeline, and is not followed: {cluster:?}");
        }
    }
    // Whoever claims and is not chosen is told of, once all have been asked.
    let left = claimants.iter().any(|(address, _)| Some(**address) != choice.primary);
    assert_eq!(choice.doubt.is_some(), left && cluster.started, "{cluster:?}");
    // Whose connections may stay: nobody's that has said it is not the primary.
    if let Some(lingers) = cluster.lingering() {
        assert!(cluster.servers[&lingers].says().is_none_or(|says| says == Says::Primary));
    }
}

#[test]
fn over_every_state_of_three_servers_nobody_gets_writes_that_might_not_be_the_primary() {
    let servers = servers();
    let mut states = 0;
    for first in &servers {
        for second in &servers {
            for third in &servers {
                for present in [None, Some(1)] {
                    for timeline in [None, Some(1), Some(2), Some(3)] {
                        for started in [false, true] {
                            let all = [first, second, third];
                            let named =
                                all.iter().zip(1..).map(|(server, n)| (address(n), (*server).clone()));
                            check(&Cluster {
                                servers: named.collect(),
                                present: present.map(address),
                                timeline,
                                started,
                                ..Cluster::default()
                            });
                            states += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(states > 100_000, "{states}");
}

/// What happens to a real cluster, and what Lobby hears of it.
#[derive(Clone, Copy, Debug)]
enum Happens {
    /// The others' log ends here, and this one begins a new timeline.
    Promoted(u8),
    /// It follows the latest primary.
    Follows(u8),
    /// Lobby asks.
    Asked(u8),
    /// Lobby asks, and gets no answer.
    Missed(u8, bool),
    /// The daemon starts again.
    Restarted,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        1 => (1..=3u8).prop_map(Happens::Promoted),
        1 => (1..=3u8).prop_map(Happens::Follows),
        6 => (1..=3u8).prop_map(Happens::Asked),
        2 => (1..=3u8, any::<bool>()).prop_map(|(number, gone)| Happens::Missed(number, gone)),
        1 => Just(Happens::Restarted),
    ]
}

proptest! {
    #[test]
    fn over_any_history_writes_never_go_back_in_time(history in proptest::collection::vec(happens(), 1..200)) {
        let mut cluster = running();
        let mut real = [primary(1), replica(1), replica(1)];
        let (mut newest, mut followed) = (1, 1);
        for event in history {
            match event {
                Happens::Promoted(number) => {
                    newest += 1;
                    real[usize::from(number) - 1] = primary(newest);
                }
                Happens::Follows(number) => {
                    let leads = real[usize::from(number) - 1] == primary(newest);
                    if !leads {
                        real[usize::from(number) - 1] = replica(newest);
                    }
                }
                Happens::Asked(number) => _ = hear(&mut cluster, number, real[usize::from(number) - 1]),
                Happens::Missed(number, gone) => _ = silent(&mut cluster, number, gone),
                Happens::Restarted => {
                    let (_, timeline) = cluster.followed();
                    let remembered: BTreeMap<_, _> =
                        cluster.primary().map(|primary| (primary, Says::Primary)).into_iter().collect();
                    cluster = three();
                    cluster.configure([], &BTreeMap::new(), at(0));
                    cluster.configure((1..=3).map(|n| (address(n), false)), &remembered, at(0));
                    timeline.into_iter().for_each(|timeline| cluster.remember_timeline(timeline));
                }
            }
            check(&cluster);
            let (_, timeline) = cluster.followed();
            prop_assert!(timeline >= Some(followed), "back from {followed} to {timeline:?}");
            followed = timeline.unwrap();
            // Who has just said that it is no primary has the writes no more.
            if let (Happens::Asked(number), Some(chosen)) = (event, cluster.primary()) {
                prop_assert!(chosen != address(number) || real[usize::from(number) - 1].takes_writes());
            }
        }
        // Once everybody has been asked, the one on the latest timeline has them.
        for number in 1..=3 {
            hear(&mut cluster, number, real[usize::from(number) - 1]);
        }
        let latest = (1..=3).find(|&number| real[usize::from(number) - 1] == primary(newest));
        prop_assert_eq!(cluster.primary(), latest.map(address));
    }
}
