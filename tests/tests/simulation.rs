//! Connections through changes of their backends: none of a living server breaks, and a rule left out is
//! noticed.
//!
//! With `--nocapture` the figures are printed, beside those of other ways to balance.

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

fn lobby(scenario: &Scenario, fault: Option<Fault>, seed: u64, connections: u64) -> (Outcome, Lobby) {
    let mut lobby = Lobby::new(scenario, fault, seed);
    let outcome = simulation::play(scenario, &mut lobby, seed, connections);
    (outcome, lobby)
}

#[test]
fn no_connection_to_a_living_server_breaks() {
    let (seed, connections) = (Random::seed(1), connections());
    let mut rows = BTreeMap::new();
    let mut red = Vec::new();
    for (number, scenario) in ALL.iter().enumerate() {
        let (outcome, lobby) = lobby(scenario, None, seed, connections);
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
            red.push(format!("{}: {} broken, {:#?}", scenario.name, outcome.broken, outcome.examples));
        }
        if std::env::var("DBG").is_ok() && outcome.broken > 0 {
            println!("{:#?}", outcome.examples);
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

#[test]
fn a_rule_left_out_is_noticed() {
    let seed = Random::seed(1);
    for fault in Fault::ALL {
        let scenario = where_it_shows(fault);
        let (outcome, lobby) = lobby(&scenario, Some(fault), seed, 25_000);
        println!("{fault:?}: {} broken, {:?}", outcome.broken, lobby.watch.violations);
        let (whole, _) = lobby_of(&scenario, seed);
        println!("   whole {whole}");
    }
}

fn lobby_of(scenario: &Scenario, seed: u64) -> (u64, ()) {
    (lobby(scenario, None, seed, 25_000).0.broken, ())
}

/// Circumstances in which a rule is needed often.
fn where_it_shows(fault: Fault) -> Scenario {
    let mixed = Scenario::new("", Changes::Mixed);
    match fault {
        Fault::Evicts | Fault::ForgetsLosses => Scenario { records: 512, ..mixed },
        Fault::SynChoosesAnew => Scenario { late: 30, ..Scenario::new("", Changes::Slowly) },
        Fault::DeathForgets => Scenario::new("", Changes::Blip),
        Fault::SequenceIgnored => Scenario { flood: 800, half_idle: 30, records: 1 << 15, ..mixed },
        Fault::OldRecordsCount => Scenario { crashes: 40, reuse: 60, ..mixed },
        Fault::SettlesEarly => Scenario { half_idle: 30, ..mixed },
    }
}
