//! The fifth stage: five services behind one address, one of which fails and one of which gets a new version.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;

use super::{
    DESK, STAFF,
    balancer::Balancer,
    display::Display,
    furnish_desk,
    guests::{Account, Accounts, Door, Guests, Kind, Picture},
    start_server, write_summary,
};
use crate::lab::{Lab, LabOptions, Proc};

/// The services, in the order of the lab's backends: name, pool, and what guests ask for.
const SERVICES: [(&str, &str, &str); 5] = [
    ("shop", "web", "/"),
    ("payments", "payments", "/pay/"),
    ("catalog", "catalog", "/catalog/"),
    ("search", "search", "/search/"),
    ("books", "books", "/books/"),
];
const CATALOG: usize = 2;
const SEARCH: usize = 3;

/// Guests of each service.
const GUESTS: usize = 4;

/// How long anything may take that Lobby was asked for.
const PATIENCE: Duration = Duration::from_secs(20);

/// The one that asks far too often, apart from the others.
const GREEDY: &str = "greedy";

/// What came of it, for programs.
#[derive(Debug, Serialize)]
struct Summary {
    good: bool,
    seconds: f64,
    /// Requests that a server answered.
    answered: u64,
    /// Requests that were neither answered by a server nor told why not.
    lost: u64,
    /// Plain words while the service had no server.
    told_closed: u64,
    /// The same of services that had one: there must be none.
    told_closed_elsewhere: u64,
    /// Plain words to who asks too often.
    told_to_slow_down: u64,
    /// The same to others: there must be none.
    told_to_slow_down_elsewhere: u64,
    /// Answers of each server.
    by_server: BTreeMap<String, u64>,
}

/// Tells the story; whether every request was answered, or told why not.
pub(super) fn show(program: &Path, directory: &Path, json: Option<&Path>) -> Result<bool> {
    let start = Instant::now();
    let lab = Lab::new(LabOptions { backends: SERVICES.len(), ..LabOptions::default() })?;
    let server = |service: usize, port: u16, name: &str| -> Result<Proc> {
        let listen = SocketAddr::new(lab.backend_v4(service).into(), port);
        start_server(&lab.backends[service], name, listen, &directory.join(name), 50, 1000)
    };
    let mut servers = BTreeMap::new();
    for (number, (name, ..)) in SERVICES.iter().enumerate() {
        for (port, one) in [(8080, 1), (8081, 2)] {
            servers.insert((number, port), server(number, port, &format!("{name}-{one}"))?);
        }
    }
    let authority = furnish_desk(program, directory)?;
    let balancer = Balancer::start(&lab, program, "5-microservices.toml", directory)?;
    balancer.wait_for("all servers", |backends| {
        let ours = |pool: &str| SERVICES.iter().any(|(_, of, _)| *of == pool);
        backends.iter().filter(|it| it.usable && ours(&it.pool)).count() == 2 * SERVICES.len()
    })?;
    println!(
        "Lobby runs with examples/5-microservices.toml; its desk answers on {} for five services of two servers each.\n\
         The database of stage 4 is not started here.\n",
        DESK.0
    );

    let accounts = Accounts::default();
    let kinds: Vec<_> =
        SERVICES.iter().map(|(name, _, path)| (kind(name, path, "calm", 10), GUESTS)).collect();
    let door = Door::new(SocketAddr::new(DESK.0.into(), 443), DESK.1, &authority)?;
    let guests = Guests::come(lab.client.clone(), &door, &kinds, &accounts)?;
    let display = Display::new(Picture::of(&accounts));
    let rest = |seconds| std::thread::sleep(Duration::from_secs(seconds));
    let all_get_answers = |names: &[&str]| -> Result<()> {
        let before: Vec<u64> = names.iter().map(|name| guests.account(name).answers()).collect();
        let began = Instant::now();
        while names.iter().zip(&before).any(|(name, before)| guests.account(name).answers() < before + 50) {
            ensure!(began.elapsed() < PATIENCE, "waited in vain for answers of {}", names.join(", "));
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    let names = SERVICES.map(|(name, ..)| name);
    display.say("Twenty guests ask five services behind one address. The books are for the staff alone, and a guest may search 60 times a second.");
    all_get_answers(&names)?;
    rest(2);

    display.say("Both servers of search are killed. Its guests are told so; the others do not notice.");
    for port in [8080, 8081] {
        servers.remove(&(SEARCH, port));
    }
    let began = Instant::now();
    while guests.account("search").closed < 50 {
        ensure!(began.elapsed() < PATIENCE, "nobody is told that search is closed");
        std::thread::sleep(Duration::from_millis(20));
    }
    all_get_answers(&[names[0], names[1], names[2], names[4]])?;
    rest(2);
    display.say("They are back.");
    for (port, name) in [(8080, "search-1"), (8081, "search-2")] {
        servers.insert((SEARCH, port), server(SEARCH, port, name)?);
    }
    all_get_answers(&names)?;
    rest(1);

    display.say("A new version of catalog: its servers are added, the old ones are drained, then stopped.");
    let place = lab.backend_v4(CATALOG);
    for (port, name) in [(8082, "catalog-v2-1"), (8083, "catalog-v2-2")] {
        servers.insert((CATALOG, port), server(CATALOG, port, name)?);
        balancer.command(&["backend", "add", "catalog", &format!("{place}:{port}")])?;
    }
    balancer.wait_for("the new version", |backends| {
        let new =
            |it: &&super::balancer::Backend| it.address.ends_with(":8082") || it.address.ends_with(":8083");
        backends.iter().filter(new).filter(|it| it.usable).count() == 2
    })?;
    for port in [8080, 8081] {
        let old = format!("{place}:{port}");
        balancer.command(&["backend", "drain", "catalog", &old])?;
        // What is under way with it is answered within a round.
        rest(2);
        servers.remove(&(CATALOG, port));
        balancer.command(&["backend", "remove", "catalog", &old])?;
    }
    all_get_answers(&names)?;

    display.say("One guest searches as fast as it can. It is slowed down, and nobody else.");
    let greedy = kind(GREEDY, SERVICES[SEARCH].2, "greedy", 0);
    let greedy = Guests::come(lab.client.clone(), &door, &[(greedy, 1)], &accounts)?;
    let began = Instant::now();
    while greedy.account(GREEDY).slowed < 50 {
        ensure!(began.elapsed() < PATIENCE, "nobody slows down who asks too often");
        std::thread::sleep(Duration::from_millis(20));
    }
    all_get_answers(&names)?;
    rest(1);
    let greedy_account = {
        let account = greedy.account(GREEDY);
        drop(greedy);
        account
    };
    ensure!(greedy_account.answers() > 0, "who asks too often gets nothing at all");
    display.say("The guests go.");
    drop(display);
    drop(guests);
    // The desk says each second what it has counted.
    std::thread::sleep(Duration::from_millis(1200));
    println!("\n$ lb route list\n{}", balancer.command(&["route", "list"])?);
    println!("$ lb desk status\n{}", balancer.command(&["desk", "status"])?);

    let accounts = accounts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let summary = summary(&accounts, start.elapsed());
    for line in in_words(&summary, &accounts) {
        println!("{line}");
    }
    write_summary(json, &summary)?;
    Ok(summary.good)
}

/// A kind of guest of a service; `rest_ms`: between requests.
fn kind(name: &'static str, path: &'static str, guest: &str, rest_ms: u64) -> Kind {
    let mut headers = vec![("x-guest", format!("{guest} {name}"))];
    if path.starts_with("/books") {
        headers.push((
            "authorization",
            format!("Basic {}", STANDARD.encode(format!("{}:{}", STAFF.0, STAFF.1))),
        ));
    }
    // The search is asked more slowly than its limit.
    let rest_ms = if name == "search" { 100 } else { rest_ms };
    // "Hello from server catalog-1 at 10.2.0.12:8080."
    Kind { name, path, headers, greeting: "Hello from server ", rest: Duration::from_millis(rest_ms) }
}

fn summary(accounts: &BTreeMap<&'static str, Account>, took: Duration) -> Summary {
    let sum = |of: &dyn Fn(&Account) -> u64| accounts.values().map(of).sum::<u64>();
    let of = |name: &str| accounts.get(name).cloned().unwrap_or_default();
    let (lost, closed, slowed) = (sum(&|it| it.lost), sum(&|it| it.closed), sum(&|it| it.slowed));
    let closed_elsewhere = closed - of("search").closed - of(GREEDY).closed;
    let slowed_elsewhere = slowed - of(GREEDY).slowed;
    let mut by_server = BTreeMap::new();
    for (server, answers) in accounts.values().flat_map(|account| &account.answered) {
        *by_server.entry(server.clone()).or_default() += answers;
    }
    Summary {
        good: lost == 0 && closed_elsewhere == 0 && slowed_elsewhere == 0 && by_server.len() == 12,
        seconds: took.as_secs_f64(),
        answered: sum(&Account::answers),
        lost,
        told_closed: closed,
        told_closed_elsewhere: closed_elsewhere,
        told_to_slow_down: slowed,
        told_to_slow_down_elsewhere: slowed_elsewhere,
        by_server,
    }
}

fn in_words(summary: &Summary, accounts: &BTreeMap<&'static str, Account>) -> Vec<String> {
    let mut lines = vec![
        format!("{:>6} requests answered, by what the guests were told:", summary.answered),
        format!("  {:>6} lost", summary.lost),
        format!("{:>6} were told that search is closed, while it had no server", summary.told_closed),
        format!("  {:>6} were told so of other services", summary.told_closed_elsewhere),
        format!(
            "{:>6} were told to slow down, all to the one that asked too often",
            summary.told_to_slow_down
        ),
        format!("  {:>6} of others", summary.told_to_slow_down_elsewhere),
        format!("{:>6} servers answered. All took {:.0} s.", summary.by_server.len(), summary.seconds),
    ];
    lines.extend(accounts.iter().filter_map(|(name, account)| {
        Some(format!("{name}: the last that was lost: {}", account.last_loss.as_ref()?))
    }));
    lines.push(match summary.good {
        true => "Every request was answered, or told in plain words why not.".into(),
        false => "NOT GOOD: see above.".into(),
    });
    lines
}
