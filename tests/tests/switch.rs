//! A switch of primaries as both sides' wires, and the old primary's log and WAL, tell it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    accounts::{PATIENCE, WRITE, cluster, session},
    packets::{Seen, flag},
    tap::Tap,
};
use xtask::lab::{
    self, Postgres,
    postgres::{self, psql},
};

/// Sessions that write without a pause.
const TALKERS: usize = 6;
/// From one of their statements to the next, so that captures have time to be written.
const PAUSE: Duration = Duration::from_millis(1);
/// For what comes about by itself.
const TURN: Duration = Duration::from_millis(50);

#[test]
fn from_a_switch_on_not_a_byte_passes_between_clients_and_the_old_primary() -> Result<()> {
    if !lab::possible("from_a_switch_on_not_a_byte_passes_between_clients_and_the_old_primary") {
        return Ok(());
    }
    let (stage, servers) = cluster("", &["log_statement=all"])?;
    let [old, new] = [&servers[0], &servers[1]];
    old.sql("CREATE TABLE t (said text)")?;
    // Each COMMIT waits for a replica that there is not, but where a session says otherwise.
    old.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")?;
    old.sql("SELECT pg_reload_conf()")?;
    let lobby = IpAddr::from(stage.lab.back_v4());
    let taps =
        [Tap::on(&stage, &stage.lab.client, WRITE.ip())?, Tap::on(&stage, &stage.lab.backends[0], lobby)?];
    let begun = position(old)?;
    let answered = Arc::new(AtomicU64::new(0));

    let speaks = async {
        let idle = session().await?;
        let paying = session().await?;
        let commit =
            tokio::spawn(async move { paying.batch_execute("INSERT INTO t VALUES ('blocked')").await });
        let mut talkers = Vec::new();
        for _ in 0..TALKERS {
            talkers.push(tokio::spawn(talk(session().await?, Arc::clone(&answered))));
        }
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        while old.sql(waits)? != "1" || answered.load(Ordering::Relaxed) < 100 {
            tokio::time::sleep(TURN).await;
        }
        new.promote()?;
        for talker in talkers {
            let error = tokio::time::timeout(PATIENCE, talker).await.context("a talker goes on")??;
            println!("a talker has heard: {error}");
        }
        let heard = tokio::time::timeout(PATIENCE, commit).await;
        ensure!(matches!(heard, Ok(Ok(Err(_)))), "who waited for COMMIT: {heard:?}");
        ensure!(idle.batch_execute("INSERT INTO t VALUES ('after')").await.is_err(), "the idle one wrote");
        Ok(())
    };
    // Its threads are where they are made.
    let speaks = move || -> Result<()> {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(speaks)
    };
    stage.lab.client.run(speaks)??;
    stage.until("the new primary", |stage| {
        Ok(stage.json(&["pool", "show", "accounts"])?["cluster"]["primary"] == "10.2.0.11:5432")
    })?;
    // What was on its way into the old one has arrived.
    let busy = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                AND state = 'active' AND wait_event IS DISTINCT FROM 'SyncRep' AND pid <> pg_backend_pid()";
    stage.until("nobody works there", |_| Ok(old.sql(busy)? == "0"))?;
    let switched = position(old)?;
    // Clients call again and write, and the old one's COMMIT ends, of which its client must not hear.
    for number in 0..50 {
        let statement = format!("INSERT INTO t VALUES ('after {number}')");
        psql(&stage.lab.client, WRITE, "postgres", &statement)?;
    }
    old.sql("ALTER SYSTEM SET synchronous_standby_names = ''")?;
    old.sql("SELECT pg_reload_conf()")?;
    stage.until("the COMMIT has ended there", |_| {
        Ok(old.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")? == "0")
    })?;
    let ended = position(old)?;
    let [at_client, at_server] = taps.map(Tap::end);

    // The server's own books. What was answered is there, and of each talker at most one more.
    let (before, after) = (commits(old, &begun, &switched)?, commits(old, &switched, &ended)?);
    let answered = answered.load(Ordering::Relaxed);
    println!("{answered} answered, {before} transactions before the switch, {after} after it");
    // The one that is blocked has written its own, too.
    ensure!((answered..=answered + TALKERS as u64 + 1).contains(&before), "{before} of {answered}");
    ensure!(after == 0, "{after} transactions were written to the old primary after the switch");
    let said = "INSERT INTO t VALUES ('after";
    ensure!(!old.log().contains(said), "the old primary was told: {}", old.log());
    ensure!(new.log().matches(said).count() == 50, "the new primary was not told");

    // The wires: who has been reset hears and is told no more.
    let old_address = (stage.lab.backend_v4(0).into(), 5432);
    let mut clients = ends(&at_client?, |seen| seen.destination == (WRITE.ip(), WRITE.port()));
    let at_server = at_server?;
    let mut at_old = ends(&at_server, |seen| seen.source == old_address);
    clients.retain(|end| end.reset);
    // A port above those of Lobby's is the daemon's own, which goes on asking.
    at_old.retain(|end| end.reset && end.port < 32_768);
    for ends in [&clients, &at_old] {
        ensure!(ends.len() == TALKERS + 2, "of {} connections were cut: {ends:?}", TALKERS + 2);
        for end in ends {
            ensure!(end.after == 0 && end.got > 0, "after a reset: {end:?}");
        }
    }
    let sum = |ends: &[End], bytes: fn(&End) -> u64| ends.iter().map(bytes).sum::<u64>();
    let lost = [(&clients, &at_old), (&at_old, &clients)]
        .map(|(from, to)| sum(from, |end| end.sent).checked_sub(sum(to, |end| end.got)));
    println!("bytes that did not pass: {lost:?}, to the server and from it");
    ensure!(lost.iter().all(Option::is_some), "more has come than was sent: {clients:?} {at_old:?}");
    stage.checksums_were_right()
}

/// Writes without a pause, and counts what is answered, until it is told that it cannot go on: what it hears.
async fn talk(session: tokio_postgres::Client, answered: Arc<AtomicU64>) -> tokio_postgres::Error {
    if let Err(error) = session.batch_execute("SET synchronous_commit = local").await {
        return error;
    }
    loop {
        match session.batch_execute("INSERT INTO t VALUES ('before')").await {
            Ok(()) => answered.fetch_add(1, Ordering::Relaxed),
            Err(error) => return error,
        };
        tokio::time::sleep(PAUSE).await;
    }
}

/// Where a server's WAL ends, with a record there that is no transaction's.
fn position(server: &Postgres) -> Result<String> {
    let at = server.sql("SELECT pg_logical_emit_message(false, 'here', repeat('.', 64))")?;
    server.sql("SELECT pg_logical_emit_message(false, 'flushed', '.'), pg_switch_wal()")?;
    Ok(at)
}

/// Transactions that were committed between two places of its WAL.
fn commits(server: &Postgres, from: &str, to: &str) -> Result<u64> {
    let mut command = Command::new(postgres::programs()?.join("pg_waldump"));
    command.arg("--path").arg(server.data().join("pg_wal")).args(["--rmgr", "Transaction"]);
    let output = command.args(["--start", from, "--end", to]).output()?;
    ensure!(output.status.success(), "pg_waldump: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.matches("desc: COMMIT").count() as u64)
}

/// One side of a connection, as its own wire tells it.
#[derive(Debug, Default)]
struct End {
    /// Port of the other side, as this one knows it.
    port: u16,
    /// Bytes that it has sent, however often.
    sent: u64,
    /// Bytes that it got.
    got: u64,
    /// Whether it was reset.
    reset: bool,
    /// Bytes that it got after that.
    after: u64,
}

/// The connections of one side, whose segments a capture has: what is sent from there goes `out`.
fn ends(capture: &[Seen], out: impl Fn(&Seen) -> bool) -> Vec<End> {
    let mut ends: BTreeMap<_, End> = BTreeMap::new();
    for seen in capture {
        let bytes = seen.payload.len() as u64;
        let out = out(seen);
        let (own, other) =
            if out { (seen.source, seen.destination) } else { (seen.destination, seen.source) };
        let end = ends.entry((own, other)).or_insert_with(|| End { port: other.1, ..End::default() });
        if out {
            end.sent += bytes;
            continue;
        }
        end.got += bytes;
        end.after += if end.reset { bytes } else { 0 };
        end.reset |= seen.tcp.is_some_and(|flags| flags & flag::RST != 0);
    }
    ends.into_values().collect()
}
