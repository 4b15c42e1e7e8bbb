//! The third stage: servers are added, drained and killed while hundreds of clients pay.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

use super::{
    balancer::Balancer,
    customers::{Customers, now_ms},
    display::{Display, Payments, Scene, Server, State},
    furnish_desk,
    ledger::{self, Judgement, Kill, ServerLedger},
    server::{Report, until_next_round},
    start_server, write_summary,
};
use crate::lab::{Lab, LabOptions, Proc, VIP};

const PER_ROUND: usize = 50;
const ROUND: Duration = Duration::from_secs(1);
const SERVERS: usize = 10;
/// The port of the examples' backends.
const PORT: u16 = 8080;
/// The pool of the examples.
const POOL: &str = "web";

/// What came of it, for programs.
#[derive(Debug, Serialize)]
struct Summary {
    good: bool,
    seconds: f64,
    /// Rounds that 100 payments took with one server.
    rounds_with_one: u64,
    /// Rounds that 100 payments took with two servers.
    rounds_with_two: u64,
    /// Rounds that 500 payments took with ten servers.
    rounds_with_ten: u64,
    /// Payments that the drained server received after its drain had come to its end.
    after_drain: usize,
    /// Seconds until Lobby sent nobody to the killed server any more.
    kill_noticed_seconds: f64,
    payments_by_server: Vec<usize>,
    #[serde(flatten)]
    judgement: Judgement,
}

/// Tells the story; whether no payment was lost or done twice.
pub(super) fn show(program: &Path, directory: &Path, json: Option<&Path>) -> Result<bool> {
    let start = Instant::now();
    let lab = Lab::new(LabOptions { backends: SERVERS, ..LabOptions::default() })?;
    let mut servers = Servers::new(&lab, directory);
    servers.start()?;
    furnish_desk(program, directory)?;
    let balancer = Balancer::start(&lab, program, "3-load-balancer.toml", directory)?;
    let client_ledger = directory.join("clients");
    let customers = Customers::new(lab.client.clone(), (VIP, 80).into(), &client_ledger)?;
    let told = tell(&lab, &balancer, &mut servers, &customers)
        .with_context(|| format!("the story stopped\n{}", balancer.last_words()));
    drop(customers);
    let told = told?;

    let judgement = servers.judge(&client_ledger, &told.kill)?;
    let summary = Summary {
        good: judgement.is_good(),
        seconds: start.elapsed().as_secs_f64(),
        rounds_with_one: told.rounds_with_one,
        rounds_with_two: told.rounds_with_two,
        rounds_with_ten: told.rounds_with_ten,
        after_drain: servers.received(told.drained)? - told.received_at_drain,
        kill_noticed_seconds: told.kill_noticed.as_secs_f64(),
        payments_by_server: servers.scene().iter().map(|server| server.total).collect(),
        judgement,
    };
    for line in in_words(&summary, told.drained, told.killed) {
        println!("{line}");
    }
    write_summary(json, &summary)?;
    Ok(summary.good)
}

/// What was seen on the way.
struct Told {
    rounds_with_one: u64,
    rounds_with_two: u64,
    rounds_with_ten: u64,
    drained: usize,
    received_at_drain: usize,
    killed: usize,
    kill: Kill,
    kill_noticed: Duration,
}

fn tell(
    lab: &Lab,
    balancer: &Balancer<'_>,
    servers: &mut Servers<'_>,
    customers: &Customers,
) -> Result<Told> {
    let usable = |number: usize| {
        balancer.wait_for(&format!("{number} healthy servers"), |backends| {
            backends.iter().filter(|backend| backend.pool == POOL && backend.usable).count() == number
        })
    };
    usable(1)?;
    servers.set(0, State::Serving);
    let (scene, shop) = (servers.scene.clone(), customers.shop());
    let display = Display::new(Payments { scene, shop, per_round: PER_ROUND, round: ROUND });
    display.say(&format!(
        "A server takes {PER_ROUND} payments a round, a round is {} s; the rest waits for the next.",
        ROUND.as_secs()
    ));
    display.say("100 customers come to pay. There is one server.");
    let rounds_with_one = rounds(customers, 100)?;
    display.say(&format!("It took {}.", in_rounds(rounds_with_one)));

    display.say(&format!("$ lb backend add {POOL} {}", servers.address(1)));
    servers.start()?;
    balancer.command(&["backend", "add", POOL, &servers.address(1)])?;
    usable(2)?;
    servers.set(1, State::Serving);
    display.say("100 customers come again. There are two servers.");
    let rounds_with_two = rounds(customers, 100)?;
    display.say(&format!("It took {}.", in_rounds(rounds_with_two)));

    display.say("500 customers come, and each pays again as soon as it has been served. Who waits keeps its server; those that are added take who comes.");
    customers.keep_paying(500)?;
    std::thread::sleep(2 * ROUND);
    for added in 2..SERVERS {
        servers.start()?;
        display.say(&format!("$ lb backend add {POOL} {}", servers.address(added)));
        balancer.command(&["backend", "add", POOL, &servers.address(added)])?;
    }
    usable(SERVERS)?;
    (2..SERVERS).for_each(|added| servers.set(added, State::Serving));
    // Long enough to see the new ones take their share of those who come again.
    std::thread::sleep(3 * ROUND);
    customers.finish()?;
    display.say("500 customers come at once. There are ten servers.");
    let rounds_with_ten = rounds(customers, 500)?;
    display.say(&format!("It took {}.", in_rounds(rounds_with_ten)));

    display.say("500 customers come, and each pays again as soon as it has been served.");
    customers.keep_paying(500)?;
    std::thread::sleep(2 * ROUND);
    let drained = 1;
    display.say(&format!("$ lb backend drain {POOL} {}", servers.address(drained)));
    balancer.command(&["backend", "drain", POOL, &servers.address(drained)])?;
    servers.set(drained, State::Draining);
    servers.wait_until("the drained server has nothing left to do", |servers| {
        servers[drained].last == Report { round: servers[drained].last.round, ..Report::default() }
    })?;
    let received_at_drain = servers.received(drained)?;
    display.say("It finished what it had, and gets nothing new.");
    std::thread::sleep(ROUND);

    let killed = 2;
    // In the middle of a round, when many wait for it.
    std::thread::sleep(until_next_round(ROUND) + ROUND / 2);
    display.say(&format!("Server {} is killed.", killed + 1));
    let kill = servers.kill(killed)?;
    let moment = Instant::now();
    let address = servers.address(killed);
    balancer.wait_for("the killed server to be found out", |backends| {
        backends.iter().any(|backend| backend.address == address && !backend.usable)
    })?;
    let kill_noticed = moment.elapsed();
    display.say(&format!(
        "Lobby noticed after {:.1} s, and sends nobody there any more.",
        kill_noticed.as_secs_f64()
    ));
    std::thread::sleep(3 * ROUND);
    for place in lab.places() {
        let errors = place.tcp_in_csum_errors()?;
        ensure!(errors == 0, "{} got {errors} TCP segments with a wrong checksum", place.name());
    }
    display.say("The shop closes: those who are waiting are served.");
    customers.finish()?;
    Ok(Told {
        rounds_with_one,
        rounds_with_two,
        rounds_with_ten,
        drained,
        received_at_drain,
        killed,
        kill,
        kill_noticed,
    })
}

fn in_rounds(number: u64) -> String {
    format!("{number} round{}", if number == 1 { "" } else { "s" })
}

/// Lets so many pay at the beginning of a round; how many rounds it takes to serve them.
fn rounds(customers: &Customers, number: usize) -> Result<u64> {
    std::thread::sleep(until_next_round(ROUND) + ROUND / 20);
    let served = customers.pay_once(number)?;
    let (first, last) = (served.iter().min(), served.iter().max());
    Ok(last.zip(first).map_or(0, |(last, first)| last - first + 1))
}

/// The payment servers, in the order in which they come.
struct Servers<'a> {
    lab: &'a Lab,
    directory: PathBuf,
    running: Vec<Proc>,
    scene: Scene,
}

impl<'a> Servers<'a> {
    fn new(lab: &'a Lab, directory: &Path) -> Self {
        Self { lab, directory: directory.to_owned(), running: Vec::new(), scene: Scene::default() }
    }

    /// Starts the next one.
    fn start(&mut self) -> Result<()> {
        let index = self.running.len();
        let name = (index + 1).to_string();
        let listen = (self.lab.backend_v4(index), PORT).into();
        let place = &self.lab.backends[index];
        let mut server =
            start_server(place, &name, listen, &self.ledger(index), PER_ROUND, ROUND.as_millis())?;
        let reports = server.child().stdout.take().context("the server has no output")?;
        self.running.push(server);
        let state = State::Joining;
        self.scene().push(Server {
            name,
            address: listen.to_string(),
            state,
            last: Report::default(),
            total: 0,
        });
        let scene = self.scene.clone();
        std::thread::spawn(move || listen_to(reports, &scene, index));
        Ok(())
    }

    /// Kills one, as `kill -9` does.
    fn kill(&mut self, index: usize) -> Result<Kill> {
        let at_ms = now_ms();
        self.running[index].kill()?;
        self.set(index, State::Dead);
        Ok(Kill { server: self.name(index), at_ms })
    }

    fn set(&self, index: usize, state: State) {
        self.scene()[index].state = state;
    }

    /// Waits until the last round of all was as wanted.
    fn wait_until(&self, what: &str, wanted: impl Fn(&[Server]) -> bool) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            // When all have told about the round.
            std::thread::sleep(until_next_round(ROUND) + ROUND / 4);
            if wanted(&self.scene()) {
                return Ok(());
            }
        }
        bail!("waited in vain for this: {what}")
    }

    fn judge(&self, client_ledger: &Path, kill: &Kill) -> Result<Judgement> {
        let client = ledger::read(&fs::read_to_string(client_ledger)?);
        let servers = (0..self.running.len())
            .map(|index| {
                Ok(ServerLedger {
                    server: self.name(index),
                    lines: ledger::read(&fs::read_to_string(self.ledger(index))?),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(ledger::compare(&client, &servers, std::slice::from_ref(kill)))
    }

    /// Payments that a server has received so far.
    fn received(&self, index: usize) -> Result<usize> {
        let text = fs::read_to_string(self.ledger(index))?;
        Ok(text.lines().filter(|line| line.starts_with("received ")).count())
    }

    fn ledger(&self, index: usize) -> PathBuf {
        self.directory.join(format!("server-{}", index + 1))
    }

    fn name(&self, index: usize) -> String {
        (index + 1).to_string()
    }

    fn address(&self, index: usize) -> String {
        format!("{}:{PORT}", self.lab.backend_v4(index))
    }

    fn scene(&self) -> std::sync::MutexGuard<'_, Vec<Server>> {
        self.scene.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings a server's reports into the picture, until it ends.
fn listen_to(reports: impl std::io::Read, scene: &Arc<Mutex<Vec<Server>>>, index: usize) {
    for line in BufReader::new(reports).lines().map_while(Result::ok) {
        if let Ok(report) = serde_json::from_str::<Report>(&line) {
            let mut scene = scene.lock().unwrap_or_else(PoisonError::into_inner);
            scene[index].last = report;
            scene[index].total += report.paid;
        }
    }
    let mut scene = scene.lock().unwrap_or_else(PoisonError::into_inner);
    scene[index].last = Report::default();
}

fn in_words(summary: &Summary, drained: usize, killed: usize) -> Vec<String> {
    let Judgement { payments, acknowledged, in_flight, in_flight_done, retries, lost, double, unknown } =
        &summary.judgement;
    vec![
        String::new(),
        format!("{payments} payments, by the ledgers of clients and servers:"),
        format!("  {acknowledged:>6} done once, and acknowledged"),
        format!(
            "  {in_flight:>6} on their way to server {} when it was killed ({in_flight_done} of them done, unanswered)",
            killed + 1
        ),
        format!("  {:>6} lost", lost.len()),
        format!("  {:>6} done twice", double.len()),
        format!("  {:>6} done that nobody asked for", unknown.len()),
        format!(
            "  {retries:>6} times nobody answered a call, before the kill was noticed, and it was tried again"
        ),
        format!(
            "100 payments took {} with one server, {} with two; 500 took {} with ten.",
            in_rounds(summary.rounds_with_one),
            in_rounds(summary.rounds_with_two),
            in_rounds(summary.rounds_with_ten)
        ),
        format!(
            "Server {} received {} payments after it had been drained. All took {:.0} s.",
            drained + 1,
            summary.after_drain,
            summary.seconds
        ),
        if summary.good {
            "No payment was lost or done twice.".into()
        } else {
            "NOT GOOD: see above.".into()
        },
    ]
}
