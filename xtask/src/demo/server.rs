//! The payment server: takes so many payments a round, the rest waits for the next.
//!
//! A process of its own, so that it can be killed for real.

use std::{
    collections::VecDeque,
    fs::File,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::ledger::{Payment, ServerLine};

/// How a payment server is started; see [`super::start_server`].
#[derive(clap::Args, Clone, Debug)]
pub struct ServerOptions {
    /// Where it listens
    #[arg(long)]
    pub listen: SocketAddr,
    /// Its name
    #[arg(long)]
    pub name: String,
    /// The file it writes its ledger to
    #[arg(long)]
    pub ledger: PathBuf,
    /// Payments it takes in a round
    #[arg(long)]
    pub per_round: usize,
    /// Length of a round, milliseconds
    #[arg(long)]
    pub round_ms: u64,
}

/// What a server prints after each round, as a line of JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rounds are counted from the epoch, so they are the same for all servers.
    pub round: u64,
    /// Payments done in this round.
    pub paid: usize,
    /// Payments that wait for the next.
    pub waiting: usize,
}

/// Runs a payment server until it is killed.
///
/// # Errors
///
/// It cannot listen, or not write its ledger.
pub fn serve(options: ServerOptions) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let ledger = File::options().create(true).append(true).open(&options.ledger);
        let ledger = ledger.with_context(|| options.ledger.display().to_string())?;
        let listener = tokio::net::TcpListener::bind(options.listen)
            .await
            .with_context(|| format!("listening on {}", options.listen))?;
        let desk = Arc::new(Desk { options, ledger, queue: Mutex::default() });
        let router = Router::new()
            .route("/", get(|State(desk): State<Arc<Desk>>| async move { desk.greeting() }))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/pay/{payment}", post(pay))
            .with_state(desk.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        desk.rounds().await
    })
}

struct Desk {
    options: ServerOptions,
    ledger: File,
    queue: Mutex<VecDeque<(Payment, oneshot::Sender<u64>)>>,
}

impl Desk {
    fn greeting(&self) -> String {
        format!("Hello from server {} at {}.\n", self.options.name, self.options.listen)
    }

    /// Takes payments, round after round.
    async fn rounds(&self) -> Result<()> {
        let length = Duration::from_millis(self.options.round_ms);
        loop {
            tokio::time::sleep(until_next_round(length)).await;
            let report = self.round(round_now(length))?;
            println!("{}", serde_json::to_string(&report)?);
        }
    }

    fn round(&self, round: u64) -> Result<Report> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = queue.len().min(self.options.per_round);
        for (payment, answer) in queue.drain(..turn) {
            self.write(ServerLine::Paid(payment))?;
            // A client that has gone will find it in the ledger.
            let _ = answer.send(round);
        }
        Ok(Report { round, paid: turn, waiting: queue.len() })
    }

    /// One system call a line: what is written is in the file, however the process ends.
    fn write(&self, line: ServerLine) -> std::io::Result<()> {
        (&self.ledger).write_all(format!("{line}\n").as_bytes())
    }
}

async fn pay(State(desk): State<Arc<Desk>>, Path(payment): Path<Payment>) -> Result<String, StatusCode> {
    let (answer, answered) = oneshot::channel();
    {
        let mut queue = desk.queue.lock().unwrap_or_else(PoisonError::into_inner);
        desk.write(ServerLine::Received(payment)).map_err(|_| StatusCode::INSUFFICIENT_STORAGE)?;
        queue.push_back((payment, answer));
    }
    let round = answered.await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(format!("{round}"))
}

/// Which round it is.
pub fn round_now(length: Duration) -> u64 {
    let rounds = since_epoch().as_millis() / length.as_millis().max(1);
    u64::try_from(rounds).unwrap_or(u64::MAX)
}

/// Time until the next round begins.
pub fn until_next_round(length: Duration) -> Duration {
    let length = length.as_nanos().max(1);
    let left = length - since_epoch().as_nanos() % length;
    Duration::from_nanos(u64::try_from(left).unwrap_or_default())
}

fn since_epoch() -> Duration {
    // A clock before 1970 makes it round 0 for ever; nothing worse.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
