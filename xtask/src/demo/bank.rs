//! A bank on a database cluster: clients that transfer money through the write port, auditors that read
//! through the read port, and what each of them was told.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tokio_postgres::Client;

use crate::lab::{Namespace, Postgres, postgres};

const ACCOUNTS: i32 = 1000;
const BALANCE: i32 = 100;
const TELLERS: u64 = 6;
const AUDITORS: u64 = 2;
/// After how long a client gives up on an answer and calls again.
const PATIENCE: Duration = Duration::from_secs(3);
/// From one try to the next, where a call is refused.
const PAUSE: Duration = Duration::from_millis(20);

/// A transfer whose COMMIT was answered.
#[derive(Clone, Debug)]
struct Paid {
    /// The address of the server that did.
    by: String,
    at: Instant,
}

/// What clients have been told.
#[derive(Default)]
struct Told {
    /// By their numbers.
    paid: Mutex<BTreeMap<i64, Paid>>,
    /// Audits that found all well, by the server that was asked.
    audits: Mutex<BTreeMap<String, u64>>,
    /// Audits that found money made or lost, or debts.
    wrong: Mutex<Vec<String>>,
    failed_reads: AtomicU64,
    closed: AtomicBool,
}

/// What came of it all.
#[derive(Clone, Debug, PartialEq)]
pub struct Account {
    /// Transfers whose COMMIT was answered.
    pub answered: usize,
    /// Addresses of the servers that answered them.
    pub by: BTreeSet<String>,
    /// Those that the primary does not have.
    pub lost: usize,
    /// Times that all was added up, and found right.
    pub audits: u64,
    /// Times that it could not be.
    pub failed_reads: u64,
    /// The longest time between two answered transfers.
    pub longest_pause: Duration,
}

/// A bank at work.
pub struct Bank {
    told: Arc<Told>,
    clients: Vec<JoinHandle<()>>,
}

/// What the bank's clients have been told so far.
#[derive(Clone)]
pub struct Figures(Arc<Told>);

impl Figures {
    /// Answered transfers and right audits, by the address of the server that was asked.
    pub fn by_server(&self) -> BTreeMap<String, [u64; 2]> {
        let mut by: BTreeMap<String, [u64; 2]> = BTreeMap::new();
        for paid in self.0.paid().values() {
            by.entry(paid.by.clone()).or_default()[0] += 1;
        }
        for (server, audits) in &*self.0.audits() {
            by.entry(server.clone()).or_default()[1] += audits;
        }
        by
    }
}

impl Bank {
    /// Opens accounts on the primary, past Lobby.
    ///
    /// # Errors
    /// When it refuses.
    pub fn found(primary: &Postgres) -> Result<()> {
        primary.sql(&format!(
            "CREATE ROLE teller LOGIN; \
             CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL); \
             CREATE TABLE transfers (id bigint PRIMARY KEY); \
             INSERT INTO accounts SELECT n, {BALANCE} FROM generate_series(1, {ACCOUNTS}) n; \
             GRANT ALL ON accounts, transfers TO teller"
        ))?;
        Ok(())
    }

    /// Begins to work, at the client's place.
    pub fn open(place: &Namespace, write: SocketAddr, read: SocketAddr) -> Self {
        let told = Arc::new(Told::default());
        let start = |number: u64, teller: bool| {
            let (place, told) = (place.clone(), Arc::clone(&told));
            std::thread::spawn(move || {
                place.enter().expect("the client's place");
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.expect("a runtime");
                match teller {
                    true => runtime.block_on(transfer(number, write, &told)),
                    false => runtime.block_on(audit(read, &told)),
                }
            })
        };
        let tellers = (0..TELLERS).map(|number| start(number, true));
        let auditors = (0..AUDITORS).map(|number| start(number, false));
        let clients = tellers.chain(auditors).collect();
        Self { told, clients }
    }

    /// Transfers whose COMMIT has been answered so far.
    pub fn paid(&self) -> usize {
        self.told.paid().len()
    }

    /// Transfers that a server answered after this moment.
    pub fn paid_since(&self, by: &str, moment: Instant) -> usize {
        self.told.paid().values().filter(|paid| paid.by == by && paid.at > moment).count()
    }

    /// What its clients have been told, for somebody who looks on.
    pub fn figures(&self) -> Figures {
        Figures(Arc::clone(&self.told))
    }

    /// Waits until so many more transfers have been paid.
    ///
    /// # Errors
    /// When that takes longer than `patience`.
    pub fn pays(&self, more: usize, patience: Duration) -> Result<Duration> {
        let (begun, before) = (Instant::now(), self.paid());
        while self.paid() < before + more {
            ensure!(
                begun.elapsed() < patience,
                "{} of {more} transfers in {patience:?}",
                self.paid() - before
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(begun.elapsed())
    }

    /// Ends work, and compares what clients were told with what the primary has.
    ///
    /// # Errors
    /// When money was made or lost, or an auditor saw so.
    pub fn close(self, primary: &Postgres) -> Result<Account> {
        self.told.closed.store(true, Relaxed);
        for client in self.clients {
            client.join().map_err(|_| anyhow::anyhow!("a client of the bank has panicked"))?;
        }
        let wrong = self.told.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(wrong.is_empty(), "auditors saw {wrong:?}");
        let audits = self.told.audits().values().sum();
        ensure!(audits > 0, "nobody could read");
        let state = primary.sql("SELECT sum(balance), min(balance) >= 0 FROM accounts")?;
        ensure!(state == format!("{}|t", ACCOUNTS * BALANCE), "the bank has {state}");
        let there: BTreeSet<i64> =
            primary.sql("SELECT id FROM transfers")?.lines().filter_map(|line| line.parse().ok()).collect();
        let paid = self.told.paid();
        let mut times: Vec<Instant> = paid.values().map(|paid| paid.at).collect();
        times.sort_unstable();
        let pauses = times.windows(2).map(|pair| pair[1] - pair[0]);
        Ok(Account {
            answered: paid.len(),
            by: paid.values().map(|paid| paid.by.clone()).collect(),
            lost: paid.keys().filter(|id| !there.contains(id)).count(),
            audits,
            failed_reads: self.told.failed_reads.load(Relaxed),
            longest_pause: pauses.max().unwrap_or_default(),
        })
    }
}

impl Told {
    fn paid(&self) -> MutexGuard<'_, BTreeMap<i64, Paid>> {
        self.paid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn audits(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.audits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection, and which server is at its other end.
async fn call(server: SocketAddr) -> Result<(Client, String)> {
    let client = postgres::connect(&postgres::config(server, "teller")).await?;
    let row = client.query_one("SELECT host(inet_server_addr())", &[]).await?;
    Ok((client, row.get(0)))
}

/// Moves money until the bank closes.
async fn transfer(number: u64, server: SocketAddr, told: &Told) {
    let mut line = None;
    for turn in 0.. {
        if told.closed.load(Relaxed) {
            return;
        }
        // Never the same again, whether the one before was paid or not.
        let id = i64::try_from(number * 1_000_000_000 + turn).unwrap_or_default();
        let outcome = tokio::time::timeout(PATIENCE, async {
            if line.is_none() {
                line = Some(call(server).await?);
            }
            let Some((client, at)) = &mut line else { return Ok(()) };
            let transaction = client.transaction().await?;
            let pick =
                |salt: u64| i32::try_from((turn * 7919 + number * 104_729 + salt) % 1000).unwrap_or(0) + 1;
            let (from, to, amount) = (pick(0), pick(turn % 13 + 1), 1 + pick(3) % 90);
            let taken = transaction
                .execute(
                    "UPDATE accounts SET balance = balance - $1 WHERE id = $2 AND balance >= $1",
                    &[&amount, &from],
                )
                .await?;
            if taken == 1 {
                transaction
                    .execute("UPDATE accounts SET balance = balance + $1 WHERE id = $2", &[&amount, &to])
                    .await?;
                transaction.execute("INSERT INTO transfers VALUES ($1)", &[&id]).await?;
            }
            transaction.commit().await?;
            if taken == 1 {
                told.paid().insert(id, Paid { by: at.clone(), at: Instant::now() });
            }
            anyhow::Ok(())
        });
        if !matches!(outcome.await, Ok(Ok(()))) {
            line = None;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Adds everything up until the bank closes, by a new connection each time.
async fn audit(server: SocketAddr, told: &Told) {
    while !told.closed.load(Relaxed) {
        let outcome = tokio::time::timeout(PATIENCE, async {
            let (client, at) = call(server).await?;
            let row = client.query_one("SELECT sum(balance), min(balance) FROM accounts", &[]).await?;
            anyhow::Ok((at, row.get::<_, i64>(0), row.get::<_, i32>(1)))
        });
        match outcome.await {
            Ok(Ok((at, sum, least))) if sum == i64::from(ACCOUNTS * BALANCE) && least >= 0 => {
                *told.audits().entry(at).or_default() += 1;
            }
            Ok(Ok(odd)) => told.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{odd:?}")),
            _ => _ = told.failed_reads.fetch_add(1, Relaxed),
        }
        tokio::time::sleep(PAUSE).await;
    }
}
