//! Connections through changes of their backends: none of a living server breaks, and a rule left out is
//! noticed.
//!
//! With `--nocapture` the figures are printed, beside those of other ways to balance. `LOBBY_SCENARIO` picks
//! those whose name contains it.

use std::collections::BTreeMap;

use tests::{
    random::Random,
    simulation::{
        self, Outcome,
        fault::Fault,
        lobby::Lobby,
        rivals::{Keeps, Rival},
        scenario::{ALL, Changes, Scenario},
    },
};

/// Connections of a run.
fn connections() -> u64 {
    std::env::var("LOBBY_CONNECTIONS").map_or(25_000, |n| n.parse().expect("LOBBY_CONNECTIONS is a number"))
}

fn run_lobby(scenario: &Scenario, fault: Option<Fault>, seed: u64, connections: u64) -> (Outcome, Lobby) {
    let mut lobby = Lobby::new(scenario, fault, seed);
    let outcome = simulation::play(scenario, &mut lobby, seed, connections);
    (outcome, lobby)
}

#[test]
fn no_connection_to_a_living_server_breaks() {
    let (seed, connections) = (Random::seed(1), connections());
    let mut rows = BTreeMap::new();
    let mut red = Vec::new();
    let picked = std::env::var("LOBBY_SCENARIO").unwrap_or_default();
    for (number, scenario) in ALL.iter().enumerate().filter(|(_, it)| it.name.contains(&picked)) {
        let (outcome, lobby) = run_lobby(scenario, None, seed, connections);
        let rival = |keeps| simulation::play(scenario, &mut Rival::new(keeps), seed, connections).broken;
        let [alone, lru, jet] =
            [Keeps::Nothing, Keeps::All(scenario.records), Keeps::Endangered(scenario.records)].map(rival);
        rows.insert((number, scenario.name), [outcome.begun, outcome.broken, alone, lru, jet]);
        println!(
            "{}: {} packets, {} changes, {} plans, {} kills, {} resizes, {} bereft, {:?}",
            scenario.name,
            outcome.packets,
            outcome.changes,
            lobby.plans,
            lobby.kills,
            lobby.resizes,
            outcome.bereft,
            lobby.watch.violations,
        );
        if outcome.broken > allowed(scenario, connections) || !lobby.watch.violations.is_empty() {
            red.push(format!("{}: {outcome:#?}, {:?}", scenario.name, lobby.watch.violations));
        }
        assert!(outcome.established > connections * 99 / 100, "{}: {outcome:?}", scenario.name);
        assert!(lobby.plans > 20 && (lobby.kills > 5) == scenario.restarts, "{}", scenario.name);
        assert_eq!(lobby.resizes > 0, scenario.changes == Changes::Resize, "{}", scenario.name);
    }
    println!("{}", simulation::table(&rows));
    assert!(red.is_empty(), "seed {seed}: {}", red.join("\n"));
}

/// Where a living backend is believed dead, a SYN that is sent again chooses anew, and its first answer may
/// arrive all the same: a few in a hundred thousand.
fn allowed(scenario: &Scenario, connections: u64) -> u64 {
    match scenario.changes {
        Changes::Blip | Changes::Everything => 1 + connections / 50_000,
        _ => 0,
    }
}

/// What is found can be found again, by whoever looks into it.
#[test]
fn a_run_is_played_again_by_its_seed() {
    let scenario = Scenario { restarts: true, ..Scenario::new("again", Changes::Everything) };
    let of = |seed| run_lobby(&scenario, None, seed, 2000);
    let [(one, lobby), (same, again), (other, _)] =
        [Random::seed(1), Random::seed(1), Random::seed(1) + 1].map(of);
    assert_eq!((&one, lobby.plans, lobby.kills), (&same, again.plans, again.kills));
    assert_ne!(one, other);
}

#[test]
fn a_rule_left_out_is_noticed() {
    let seed = Random::seed(1);
    let of_connections = Fault::ALL.map(|fault| (fault, where_it_shows(fault)));
    let of_datagrams = (
        Fault::SettlesEarly,
        (Scenario { datagrams: true, half_idle: 30, ..Scenario::new("datagrams", Changes::Mixed) }, 15_000),
    );
    for (fault, (scenario, connections)) in of_connections.into_iter().chain([of_datagrams]) {
        let [(without, lobby), (with, _)] =
            [Some(fault), None].map(|fault| run_lobby(&scenario, fault, seed, connections));
        println!(
            "{fault:?}: {} broken, {:?}; with the rule {}",
            without.broken, lobby.watch.violations, with.broken
        );
        for must in never(fault) {
            assert!(lobby.watch.violations.contains_key(must), "seed {seed}: {fault:?}: {must} goes unseen");
        }
        let red = without.broken > 2 * with.broken + 2;
        assert!(red, "seed {seed}: {fault:?} goes unnoticed: {without:?}");
    }
}

/// What whoever watches must see of it.
fn never(fault: Fault) -> &'static [&'static str] {
    match fault {
        Fault::Evicts => &["a record within its time was taken away"],
        Fault::EndForgets => &["a record within its time was removed by no SYN"],
        Fault::ForgetsLosses | Fault::SettlesEarly => &["a slot faded soon after a loss"],
        _ => &[],
    }
}

/// Circumstances in which a rule is needed often.
fn where_it_shows(fault: Fault) -> (Scenario, u64) {
    let mixed = Scenario::new("mixed", Changes::Mixed);
    match fault {
        Fault::Evicts | Fault::ForgetsLosses => (Scenario { records: 512, ..mixed }, 15_000),
        Fault::SynChoosesAnew => (Scenario { late: 60, ..Scenario::new("slowly", Changes::Slowly) }, 40_000),
        Fault::DeathForgets => (Scenario::new("blip", Changes::Blip), 15_000),
        Fault::SequenceIgnored => (Scenario { flood: 800, half_idle: 30, records: 1 << 15, ..mixed }, 15_000),
        Fault::OldRecordsCount => (Scenario { crashes: 50, reuse: 95, longest: 80, ..mixed }, 60_000),
        Fault::EndForgets => (Scenario { half_closed: 80, ..mixed }, 15_000),
        Fault::SettlesEarly => (Scenario { half_idle: 30, ..mixed }, 15_000),
    }
}
