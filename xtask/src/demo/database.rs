//! The fourth stage: a bank on a PostgreSQL cluster, and what happens to its servers meanwhile.

mod picture;

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use super::{
    balancer::Balancer,
    bank::{Account, Bank},
    display::Display,
    furnish_desk, start_server, write_summary,
};
use crate::lab::{Lab, LabOptions, Postgres, VIP, link, postgres};
use picture::{Cluster, Picture};

/// The last byte of the first database server's address in the example, and how many there are.
const FIRST: u8 = 21;
const SERVERS: usize = 3;
const PORT: u16 = 5432;
const WRITE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), PORT);
const READ: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), 5433);
/// A COMMIT is answered when a replica has it too: then a promotion loses nothing that was answered.
const SETTINGS: &[&str] = &["synchronous_standby_names=ANY 1 (b2, b3, b4)"];
/// How long anything may take that Lobby or a server was asked for.
const PATIENCE: Duration = Duration::from_secs(30);

/// What came of it, for programs.
#[derive(Debug, Serialize)]
struct Summary {
    good: bool,
    seconds: f64,
    /// Transfers whose COMMIT was answered.
    transfers: usize,
    /// Those that the primary does not have in the end.
    lost: usize,
    /// Transfers written by a server that was not the primary any more.
    written_elsewhere: usize,
    /// Times that all accounts were added up through the read port, and were right.
    reads: u64,
    /// Times that they could not be.
    read_errors: u64,
    /// The longest time between two answered transfers.
    seconds_without_writes: f64,
    /// From the moment that the promotion was done until the first transfer was answered.
    seconds_from_promotion_to_write: f64,
}

/// Tells the story; whether nothing was lost or written where it should not be.
pub(super) fn show(program: &Path, directory: &Path, json: Option<&Path>) -> Result<bool> {
    let start = Instant::now();
    // The first is the web server of the stages before.
    let lab = Lab::new(LabOptions { backends: 1 + SERVERS, ..LabOptions::default() })?;
    println!("starting three PostgreSQL servers: a primary, and two replicas that stream from it …");
    let mut servers = servers(&lab, directory)?;
    let web = (lab.backend_v4(0), 8080).into();
    let _web = start_server(&lab.backends[0], "1", web, &directory.join("server-1"), 50, 1000)?;
    furnish_desk(program, directory)?;
    let balancer = Balancer::start(&lab, program, "4-database.toml", directory)?;
    Bank::found(&servers[0])?;
    let bank = Bank::open(&lab.client, WRITE, READ);
    let told = tell(&lab, program, &balancer, &mut servers, &bank)
        .with_context(|| format!("the story stopped\n{}", balancer.last_words()));
    let told = match told {
        Ok(told) => told,
        Err(error) => {
            // Its clients end, whatever it has to say.
            drop(bank.close(&servers[0]));
            return Err(error);
        }
    };
    let Account { answered, lost, audits, failed_reads, longest_pause, .. } =
        bank.close(&servers[told.primary])?;
    let summary = Summary {
        good: lost == 0 && told.written_elsewhere == 0 && answered > 0 && audits > 0,
        seconds: start.elapsed().as_secs_f64(),
        transfers: answered,
        lost,
        written_elsewhere: told.written_elsewhere,
        reads: audits,
        read_errors: failed_reads,
        seconds_without_writes: longest_pause.as_secs_f64(),
        seconds_from_promotion_to_write: told.promotion_to_write.as_secs_f64(),
    };
    for line in in_words(&summary) {
        println!("{line}");
    }
    write_summary(json, &summary)?;
    Ok(summary.good)
}

/// What was seen on the way.
struct Told {
    /// Who is the primary in the end.
    primary: usize,
    written_elsewhere: usize,
    promotion_to_write: Duration,
}

fn tell(
    lab: &Lab,
    program: &Path,
    balancer: &Balancer<'_>,
    servers: &mut [Postgres],
    bank: &Bank,
) -> Result<Told> {
    let display = Display::new(Picture::new(&lab.balancer, program, bank));
    let until = |what: &str, wanted: &dyn Fn(&Cluster) -> bool| -> Result<()> {
        let start = Instant::now();
        loop {
            let cluster = Cluster::ask(&lab.balancer, program)?;
            if wanted(&cluster) {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "waited in vain for this: {what}: {cluster:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    display.say(
        "Six tellers transfer money through the write port, two auditors add all up through the read port.",
    );
    bank.pays(300, PATIENCE)?;
    std::thread::sleep(Duration::from_secs(2));

    display.say("A replica stops replaying. Over 5 s behind it is not read from any more.");
    servers[2].sql("SELECT pg_wal_replay_pause()")?;
    until("a replica too far behind", &|cluster| !cluster.servers[2].read)?;
    display.say("It goes on, and is read from again.");
    servers[2].sql("SELECT pg_wal_replay_resume()")?;
    until("a replica that is fit again", &|cluster| cluster.servers[2].read)?;

    display.say("The primary is killed.");
    servers[0].kill()?;
    until("nobody to write to", &|cluster| cluster.primary.is_none())?;
    display.say("Nobody is the primary: writes are refused, reads go on. The replica with more of the log is promoted.");
    let (new, promoted) = postgres::fail_over(servers)?;
    let address = servers[new].address();
    bank.pays(1, PATIENCE)?;
    let promotion_to_write = promoted.elapsed();
    display.say(&format!(
        "Writes go to {address}. The first transfer was answered {:.1} s after the promotion, and the other replica follows.",
        promotion_to_write.as_secs_f64()
    ));
    bank.pays(300, PATIENCE)?;

    display.say("The old primary comes back, and thinks that it is the primary still.");
    servers[0].start()?;
    let returned = Instant::now();
    let transfers =
        |server: &Postgres| -> Result<usize> { Ok(server.sql("SELECT count(*) FROM transfers")?.parse()?) };
    let before = transfers(&servers[0])?;
    until("an old primary that is fenced", &|cluster| cluster.servers[0].fenced)?;
    bank.pays(300, PATIENCE)?;
    let old = servers[0].address().ip().to_string();
    let written_elsewhere = transfers(&servers[0])? - before + bank.paid_since(&old, returned);
    display
        .say(&format!("Lobby raises an alarm, and it got {written_elsewhere} of the 300 transfers since."));

    display.say("It is made a replica of the new primary.");
    servers[0].stop()?;
    servers[0].copy(address)?;
    servers[0].start()?;
    until("three servers in their roles", &|cluster| {
        cluster.servers.iter().filter(|server| server.read).count() == 2
    })?;
    bank.pays(300, PATIENCE)?;
    for place in lab.places() {
        let errors = place.tcp_in_csum_errors()?;
        ensure!(errors == 0, "{} got {errors} TCP segments with a wrong checksum", place.name());
    }
    display.say("The bank closes.");
    drop(display);
    println!("\n$ lb pool show accounts\n{}", balancer.command(&["pool", "show", "accounts"])?);
    Ok(Told { primary: new, written_elsewhere, promotion_to_write })
}

/// The primary and its replicas, where the example has them.
fn servers(lab: &Lab, directory: &Path) -> Result<Vec<Postgres>> {
    let mut servers: Vec<Postgres> = Vec::new();
    for (place, last) in lab.backends.iter().skip(1).zip(FIRST..) {
        let ip = [10, 2, 0, last].into();
        link::address(place, "eth0", ip, 24)?;
        let address = SocketAddr::new(ip, PORT);
        let server = match servers.first() {
            None => Postgres::primary(place, address, directory, &[], SETTINGS)?,
            Some(primary) => Postgres::replica(place, address, directory, primary.address(), SETTINGS)?,
        };
        servers.push(server);
    }
    servers[0].sql("CREATE ROLE lb LOGIN")?;
    Ok(servers)
}

fn in_words(summary: &Summary) -> Vec<String> {
    vec![
        format!("{:>6} transfers answered, by what the bank's clients were told:", summary.transfers),
        format!("  {:>6} lost: answered, and not in the primary's tables", summary.lost),
        format!("  {:>6} written by a server that was not the primary", summary.written_elsewhere),
        format!("{:>6} times all accounts were added up, and no cent was missing", summary.reads),
        format!("  {:>6} times that failed, since the server ended", summary.read_errors),
        format!(
            "{:.1} s without writes, of which {:.1} s after the promotion. All took {:.0} s.",
            summary.seconds_without_writes, summary.seconds_from_promotion_to_write, summary.seconds
        ),
        if summary.good {
            "Nothing that was answered was lost, and nothing was written elsewhere.".into()
        } else {
            "NOT GOOD: see above.".into()
        },
    ]
}
