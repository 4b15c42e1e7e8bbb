//! How long it takes from a promotion to the first write through the write port.

use std::{
    net::SocketAddr,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use tests::accounts::{PATIENCE, WRITE, cluster_in, until_roles};
use tokio_postgres::Client;
use xtask::lab::{LabOptions, Namespace, postgres};

/// From one try to the next.
const PAUSE: Duration = Duration::from_millis(1);

/// Milliseconds from a server's first word that it is the primary to the first answered INSERT through the write port.
pub(crate) struct Failovers {
    /// Where Lobby asks by itself, every second.
    pub(crate) asked: Vec<f64>,
    /// Where it is told to ask (`lb pool recheck`) as soon as the promotion is done.
    pub(crate) told: Vec<f64>,
}

/// Two servers, of which the primary is killed and the other promoted, in turns.
pub(crate) fn measure(rounds: usize) -> Result<Failovers> {
    let options = LabOptions { backends: 2, ipv6: false, ..LabOptions::default() };
    let (stage, mut servers) = cluster_in(options, "", "", &[])?;
    servers[0].sql("CREATE TABLE t (x int)")?;
    let mut failovers = Failovers { asked: Vec::new(), told: Vec::new() };
    for round in 0..2 * rounds {
        let (old, new) = (round % 2, 1 - round % 2);
        servers[old].kill()?;
        stage.until("nobody to write to", |stage| {
            Ok(stage.json(&["pool", "show", "accounts"])?["cluster"]["primary"].is_null())
        })?;
        let direct = servers[new].address();
        let says_so = until(servers[new].place(), direct, "SELECT 1 WHERE NOT pg_is_in_recovery()");
        let written = until(&stage.lab.client, WRITE, "INSERT INTO t VALUES (1) RETURNING x");
        // Not always at the same time after a question.
        thread::sleep(Duration::from_millis(u64::try_from(round)? * 370 % 1000));
        servers[new].promote()?;
        // Each server hears of as many promotions each way.
        let told = (round + round / 2) % 2 == 1;
        if told {
            stage.lb(&["pool", "recheck", "accounts"])?;
        }
        let ended = |waiting: JoinHandle<Result<Instant>>| {
            waiting.join().map_err(|_| anyhow::anyhow!("a client has panicked"))?
        };
        let (says_so, written) = (ended(says_so)?, ended(written)?);
        let taken = written.saturating_duration_since(says_so).as_secs_f64() * 1000.0;
        if told { &mut failovers.told } else { &mut failovers.asked }.push(taken);
        servers[old].copy(direct)?;
        servers[old].start()?;
        let roles = if new == 0 { ["primary", "replica"] } else { ["replica", "primary"] };
        until_roles(&stage, &roles)?;
    }
    stage.checksums_were_right()?;
    Ok(failovers)
}

/// Asks a server until the answer has a row; when that was. Calls again where there is nobody.
fn until(place: &Namespace, server: SocketAddr, sql: &'static str) -> JoinHandle<Result<Instant>> {
    let place = place.clone();
    thread::spawn(move || {
        place.enter()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let begun = Instant::now();
            let mut line = None;
            while begun.elapsed() < PATIENCE {
                match ask(&mut line, server, sql).await {
                    Ok(true) => return Ok(Instant::now()),
                    Ok(false) => {}
                    Err(_) => line = None,
                }
                tokio::time::sleep(PAUSE).await;
            }
            bail!("{server} has not done {sql:?} in {PATIENCE:?}")
        })
    })
}

async fn ask(line: &mut Option<Client>, server: SocketAddr, sql: &str) -> Result<bool> {
    let client = match line {
        Some(client) => client,
        None => line.insert(postgres::connect(&postgres::config(server, "postgres")).await?),
    };
    Ok(!client.query(sql, &[]).await?.is_empty())
}
