//! The clients: each makes one payment after another, each payment on a connection of its own.

use std::{
    fs::File,
    io::Write as _,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, anyhow};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet};

use super::ledger::{ClientLine, Payment};
use crate::lab::Namespace;

/// How long a customer tries to reach anybody, and then waits for the answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Before it is tried again to reach anybody.
const PAUSE: Duration = Duration::from_millis(100);

/// Clients in one place, who pay at one address.
pub struct Customers {
    shop: Arc<Shop>,
    orders: Option<tokio::sync::mpsc::UnboundedSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

/// What all customers have in common, and how many do what just now.
pub struct Shop {
    address: SocketAddr,
    ledger: Mutex<File>,
    next: AtomicU64,
    /// Customers who are there.
    pub customers: AtomicUsize,
    /// Payments that wait for their answer.
    pub waiting: AtomicUsize,
    /// Payments acknowledged.
    pub paid: AtomicUsize,
    /// Attempts that found nobody, and were made again.
    pub retried: AtomicUsize,
    /// Payments whose connection broke.
    pub broken: AtomicUsize,
    /// Payments given up.
    pub failed: AtomicUsize,
    closing: AtomicBool,
}

enum Order {
    /// So many pay once, at the same time; the rounds in which they were served.
    Once(usize, mpsc::Sender<Vec<u64>>),
    /// So many pay again and again, until the shop closes.
    Again(usize),
    /// Tells when all have been served, and opens again.
    Served(mpsc::Sender<()>),
}

impl Customers {
    /// Nobody yet, at this place.
    ///
    /// # Errors
    ///
    /// The ledger cannot be written.
    pub fn new(place: Namespace, address: SocketAddr, ledger: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(ledger);
        let shop = Arc::new(Shop {
            address,
            ledger: Mutex::new(file.with_context(|| ledger.display().to_string())?),
            next: AtomicU64::new(1),
            customers: AtomicUsize::default(),
            waiting: AtomicUsize::default(),
            paid: AtomicUsize::default(),
            retried: AtomicUsize::default(),
            broken: AtomicUsize::default(),
            failed: AtomicUsize::default(),
            closing: AtomicBool::default(),
        });
        let (orders, ordered) = tokio::sync::mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let theirs = shop.clone();
        // A thread of their own, since the sockets of a thread are made in its namespace.
        let (entered, enter) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let inside = place.enter();
            let failed = inside.is_err();
            // The other end waits for just this.
            let _ = entered.send(inside);
            if !failed {
                runtime.block_on(serve_orders(theirs, ordered));
            }
        });
        enter.recv().context("the customers' thread has ended")??;
        Ok(Self { shop, orders: Some(orders), thread: Some(thread) })
    }

    /// What they have in common.
    pub fn shop(&self) -> Arc<Shop> {
        self.shop.clone()
    }

    /// So many pay once, at the same time; waits for all answers, and gives the rounds in which they came.
    ///
    /// # Errors
    ///
    /// Not all of them were served.
    pub fn pay_once(&self, number: usize) -> Result<Vec<u64>> {
        let (answer, answered) = mpsc::channel();
        self.order(Order::Once(number, answer))?;
        let rounds = answered.recv().context("the customers' thread has ended")?;
        (rounds.len() == number)
            .then_some(rounds)
            .ok_or_else(|| anyhow!("not all of the {number} customers were served"))
    }

    /// So many come, and each pays again as soon as it has been served.
    ///
    /// # Errors
    ///
    /// Their thread has ended.
    pub fn keep_paying(&self, number: usize) -> Result<()> {
        self.order(Order::Again(number))
    }

    /// Nobody begins another payment; waits until all who are at one have been served. Then others may come.
    ///
    /// # Errors
    ///
    /// Their thread has ended.
    pub fn finish(&self) -> Result<()> {
        self.shop.closing.store(true, Relaxed);
        let (answer, answered) = mpsc::channel();
        self.order(Order::Served(answer))?;
        answered.recv().context("the customers' thread has ended")
    }

    fn order(&self, order: Order) -> Result<()> {
        let sent = self.orders.as_ref().map(|orders| orders.send(order));
        sent.and_then(Result::ok).context("the customers' thread has ended")
    }
}

impl Drop for Customers {
    fn drop(&mut self) {
        self.shop.closing.store(true, Relaxed);
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // What it has failed at is in the ledger, or missing there.
            let _ = thread.join();
        }
    }
}

async fn serve_orders(shop: Arc<Shop>, mut ordered: tokio::sync::mpsc::UnboundedReceiver<Order>) {
    let mut staying = JoinSet::new();
    while let Some(order) = ordered.recv().await {
        match order {
            Order::Once(number, answer) => {
                shop.customers.store(number, Relaxed);
                let mut all: JoinSet<_> = (0..number).map(|_| pay(shop.clone())).collect();
                staying.spawn(async move {
                    let mut rounds = Vec::new();
                    while let Some(round) = all.join_next().await {
                        rounds.extend(round.ok().flatten());
                    }
                    // Nobody may be interested any more.
                    let _ = answer.send(rounds);
                });
            }
            Order::Again(number) => {
                shop.customers.store(number, Relaxed);
                for _ in 0..number {
                    let shop = shop.clone();
                    staying.spawn(async move {
                        while !shop.closing.load(Relaxed) {
                            pay(shop.clone()).await;
                        }
                    });
                }
            }
            Order::Served(answer) => {
                while staying.join_next().await.is_some() {}
                shop.closing.store(false, Relaxed);
                shop.customers.store(0, Relaxed);
                // Nobody may be interested any more.
                let _ = answer.send(());
            }
        }
    }
    staying.join_all().await;
}

/// One payment, from its number to its line in the ledger; the round in which it was done.
async fn pay(shop: Arc<Shop>) -> Option<u64> {
    let payment = shop.next.fetch_add(1, Relaxed);
    shop.waiting.fetch_add(1, Relaxed);
    let outcome = attempt(&shop, payment).await;
    shop.waiting.fetch_sub(1, Relaxed);
    let (line, counter) = match outcome {
        Outcome::Done(_) => (ClientLine::Acknowledged(payment), &shop.paid),
        Outcome::Broken => (ClientLine::Broken(payment, now_ms()), &shop.broken),
        Outcome::Nobody => (ClientLine::Failed(payment), &shop.failed),
    };
    shop.write(line);
    counter.fetch_add(1, Relaxed);
    match outcome {
        Outcome::Done(round) => Some(round),
        Outcome::Broken | Outcome::Nobody => None,
    }
}

enum Outcome {
    /// Acknowledged, in this round.
    Done(u64),
    /// Sent, and the connection broke.
    Broken,
    /// Nobody could be reached, or no sensible answer came.
    Nobody,
}

/// Tries until a connection stands; from then on there is no second try, since a server may have it.
async fn attempt(shop: &Shop, payment: Payment) -> Outcome {
    let start = Instant::now();
    let stream = loop {
        match tokio::time::timeout(Duration::from_secs(3), TcpStream::connect(shop.address)).await {
            Ok(Ok(stream)) => break stream,
            Ok(Err(_)) | Err(_) if start.elapsed() > PATIENCE => return Outcome::Nobody,
            Ok(Err(_)) | Err(_) => {
                shop.write(ClientLine::Retried(payment));
                shop.retried.fetch_add(1, Relaxed);
                tokio::time::sleep(PAUSE).await;
            }
        }
    };
    match tokio::time::timeout(PATIENCE, converse(stream, shop.address, payment)).await {
        Ok(Ok(Some(round))) => Outcome::Done(round),
        Ok(Ok(None)) | Err(_) => Outcome::Nobody,
        Ok(Err(_)) => Outcome::Broken,
    }
}

/// The round that the server says, or nothing if it says something else.
async fn converse(stream: TcpStream, address: SocketAddr, payment: Payment) -> hyper::Result<Option<u64>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let Ok(request) = Request::post(format!("/pay/{payment}"))
        .header("host", address.to_string())
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
    else {
        return Ok(None);
    };
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Ok(None);
    }
    let body = response.into_body().collect().await?.to_bytes();
    Ok(std::str::from_utf8(&body).ok().and_then(|round| round.parse().ok()))
}

impl Shop {
    fn write(&self, line: ClientLine) {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        // A line that cannot be written is missed by the comparison, which then finds payments that no client
        // made: the demo fails, as it should.
        let _ = ledger.write_all(format!("{line}\n").as_bytes());
    }
}

/// Milliseconds since the epoch.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
