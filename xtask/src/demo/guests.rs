//! Guests of several services behind one address: each asks one of them again and again, on a connection that it keeps,
//! and takes account of what it is told. They speak TLS, and trust one certificate.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};

use super::display::View;
use crate::lab::Namespace;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What guests of a service were told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Answers of a server, by its name.
    pub answered: BTreeMap<String, u64>,
    /// Plain words that the room is closed, or that nobody opens it.
    pub closed: u64,
    /// Plain words that they ask too often.
    pub slowed: u64,
    /// Everything else: broken connections, other answers.
    pub lost: u64,
    /// The last of those.
    pub last_loss: Option<String>,
}

impl Account {
    /// Answers of servers.
    pub fn answers(&self) -> u64 {
        self.answered.values().sum()
    }
}

/// A kind of guest: what it asks, how often, and where it is written down.
#[derive(Clone, Debug)]
pub struct Kind {
    /// Its name in the accounts.
    pub name: &'static str,
    /// The path that it asks for.
    pub path: &'static str,
    /// Headers besides.
    pub headers: Vec<(&'static str, String)>,
    /// What answers of servers begin with, before the server's name.
    pub greeting: &'static str,
    /// How long it rests between an answer and the next request.
    pub rest: Duration,
}

/// Where guests come in, and by what they know that they are right.
#[derive(Clone)]
pub struct Door {
    address: SocketAddr,
    name: &'static str,
    tls: TlsConnector,
}

impl Door {
    /// By TLS to a name at an address, with this certificate.
    ///
    /// # Errors
    ///
    /// The certificate cannot be used.
    pub fn new(address: SocketAddr, name: &'static str, certificate: &Path) -> Result<Self> {
        let mut trusted = RootCertStore::empty();
        trusted.add(CertificateDer::from_pem_file(certificate)?)?;
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(trusted)
            .with_no_client_auth();
        Ok(Self { address, name, tls: TlsConnector::from(Arc::new(config)) })
    }
}

/// Accounts, by the names of kinds.
pub type Accounts = Arc<Mutex<BTreeMap<&'static str, Account>>>;

/// Guests in one place, until dropped.
pub struct Guests {
    accounts: Accounts,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Guests {
    /// So many of each kind.
    ///
    /// # Errors
    ///
    /// The place cannot be entered.
    pub fn come(place: Namespace, door: &Door, kinds: &[(Kind, usize)], accounts: &Accounts) -> Result<Self> {
        let (accounts, closing) = (accounts.clone(), Arc::new(AtomicBool::new(false)));
        let (theirs, over, kinds, door) = (accounts.clone(), closing.clone(), kinds.to_vec(), door.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // A thread of their own, since the sockets of a thread are made in its namespace.
        let (entered, enter) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let inside = place.enter();
            let failed = inside.is_err();
            // The other end waits for just this.
            let _ = entered.send(inside);
            if failed {
                return;
            }
            runtime.block_on(async {
                let guest = |kind: &Kind| {
                    tokio::spawn(ask_again(kind.clone(), door.clone(), theirs.clone(), over.clone()))
                };
                let all: Vec<_> = kinds
                    .iter()
                    .flat_map(|(kind, number)| (0..*number).map(|_| guest(kind)).collect::<Vec<_>>())
                    .collect();
                futures::future::join_all(all).await;
            });
        });
        enter.recv().context("the guests' thread has ended")??;
        Ok(Self { accounts, closing, thread: Some(thread) })
    }

    /// What they were told up to now.
    pub fn account(&self, name: &str) -> Account {
        let accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.get(name).cloned().unwrap_or_default()
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        self.closing.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // What they were told is in the accounts, or missing there.
            let _ = thread.join();
        }
    }
}

async fn ask_again(kind: Kind, door: Door, accounts: Accounts, closing: Arc<AtomicBool>) {
    let mut kept = None;
    while !closing.load(Relaxed) {
        let told = tokio::time::timeout(PATIENCE, ask(&kind, &door, &mut kept)).await;
        let told = told.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer in time")));
        {
            let mut accounts = accounts.lock().unwrap_or_else(PoisonError::into_inner);
            let account = accounts.entry(kind.name).or_default();
            match told {
                Ok((StatusCode::OK, server)) => *account.answered.entry(server).or_default() += 1,
                // At first the servers are just not there; then health checks have noticed it.
                Ok((StatusCode::BAD_GATEWAY, said)) if said.contains("unreachable") => account.closed += 1,
                Ok((StatusCode::SERVICE_UNAVAILABLE, said)) if said.contains("no_backend") => {
                    account.closed += 1;
                }
                Ok((StatusCode::TOO_MANY_REQUESTS, _)) => account.slowed += 1,
                Ok((status, said)) => {
                    account.lost += 1;
                    account.last_loss = Some(format!("{status}: {said}"));
                }
                Err(error) => {
                    kept = None;
                    account.lost += 1;
                    account.last_loss = Some(format!("{error:#}"));
                }
            }
        }
        tokio::time::sleep(kind.rest).await;
    }
}

type Kept = Option<SendRequest<Empty<Bytes>>>;

/// The status, and of an answer with 200 the name of who gives it, else what it says.
async fn ask(kind: &Kind, door: &Door, kept: &mut Kept) -> Result<(StatusCode, String)> {
    let mut sender = match kept.take().filter(|sender| !sender.is_closed()) {
        Some(sender) => sender,
        None => {
            let stream = TcpStream::connect(door.address).await?;
            let stream = door.tls.connect(ServerName::try_from(door.name)?, stream).await?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            sender
        }
    };
    let mut request = Request::get(kind.path).header("host", door.name).header("accept", "application/json");
    for (name, value) in &kind.headers {
        request = request.header(*name, value);
    }
    let response = sender.send_request(request.body(Empty::new())?).await?;
    let status = response.status();
    let said = response.into_body().collect().await?.to_bytes();
    let said = String::from_utf8_lossy(&said).into_owned();
    *kept = Some(sender);
    let name = said.strip_prefix(kind.greeting).and_then(|rest| rest.split_whitespace().next());
    match (status, name) {
        (StatusCode::OK, Some(name)) => Ok((status, name.to_owned())),
        (StatusCode::OK, None) => anyhow::bail!("an answer of nobody: {said}"),
        _ => Ok((status, said)),
    }
}

/// What one sees of them: answers a second of each service, and what else they are told.
pub struct Picture {
    accounts: Accounts,
    before: Mutex<BTreeMap<&'static str, Account>>,
}

impl Picture {
    /// Of these accounts.
    pub fn of(accounts: &Accounts) -> Self {
        Self { accounts: accounts.clone(), before: Mutex::default() }
    }

    /// Name, answers since this was last asked, and what else was said since.
    fn look(&self) -> Vec<(&'static str, u64, &'static str)> {
        let now = self.accounts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = now.iter().map(|(name, account)| {
            let earlier = before.get(name).cloned().unwrap_or_default();
            let word = match account {
                it if it.lost > earlier.lost => "LOST",
                it if it.closed > earlier.closed => "closed",
                it if it.slowed > earlier.slowed => "slowed",
                _ => "",
            };
            (*name, account.answers() - earlier.answers(), word)
        });
        let seen = seen.collect();
        *before = now;
        seen
    }
}

/// How often the picture is drawn.
const FRAME: Duration = Duration::from_secs(1);

impl View for Picture {
    fn plain(&self, at: Duration) -> String {
        let services = self.look().into_iter().map(|(name, answers, word)| match word {
            "" => format!("{name} {answers}/s"),
            word => format!("{name} {answers}/s {word}"),
        });
        format!("{:>3} s  {}", at.as_secs(), services.collect::<Vec<_>>().join("   "))
    }

    fn picture(&self, colours: bool) -> Vec<String> {
        let (red, plain) = if colours { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
        let line = |(name, answers, word): (&str, u64, &str)| {
            let bar = "█".repeat(usize::try_from(answers / 10).unwrap_or_default().min(50));
            format!("  {name:<9} {answers:>5}/s  {bar} {red}{word}{plain}")
        };
        self.look().into_iter().map(line).collect()
    }

    fn wait(&self, _: bool) {
        std::thread::sleep(FRAME);
    }
}
