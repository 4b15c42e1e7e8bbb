//! Asks backends how they are: one question, one answer, no state. When to ask and what the answers
//! mean is [`crate::health`]'s.

mod http;
mod postgres;
mod role;
pub(crate) mod tls;
mod udp;
pub mod vip;

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use proxy_header::ProxyHeader;
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    sync::{Semaphore, mpsc},
};

use self::postgres::Kept;
use crate::{
    health::Observation,
    model::{BackendAddress, HealthCheck, Probe, desk::ProxyVersion},
};
pub use tls::{TlsError, check_authorities};

/// Probes that may be under way at the same time. Each takes a socket; what is over this waits, and its
/// time-out begins when its turn comes.
const AT_ONCE: usize = 512;

/// Why a probe did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// No answer in time.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The connection broke while asking.
    #[error("connection broken: {0}")]
    Broken(String),
    /// TLS did not come about.
    #[error("TLS: {0}")]
    Tls(String),
    /// An HTTP status that is not wanted.
    #[error("status {0}")]
    Status(u16),
    /// An answer that does not have what is expected.
    #[error("the answer does not have what is expected")]
    Unexpected,
    /// The server does not let us ask.
    #[error("the server refuses the check: {0}")]
    Refused(String),
    /// It answers at its own address, and not for a service's.
    #[error("no answer for {0}: it does not have that address, or does not listen there")]
    NotItsAddress(SocketAddr),
    /// The check cannot be carried out.
    #[error("{0}")]
    Impossible(String),
}

/// The answer to one probe.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer<K> {
    /// Who was asked, in the asker's words.
    pub key: K,
    /// What the answer was, or why there was none.
    pub outcome: Result<Answered, ProbeError>,
}

/// A probe that succeeded.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    /// How long the answer took.
    pub latency: Duration,
    /// Who the server says it is, where it was asked.
    pub said: Option<Observation>,
}

/// Sends out probes, not too many at once.
pub struct Prober<K> {
    slots: Arc<Semaphore>,
    answers: mpsc::UnboundedSender<Answer<K>>,
    kept: Arc<Mutex<HashMap<SocketAddr, Arc<Turn>>>>,
}

/// One probe after the other, where they tell roles: an answer that is overtaken by a later one would turn
/// a role back to what it was. Holds the connection that is kept from one to the next.
type Turn = tokio::sync::Mutex<Option<Kept>>;

impl<K: Send + 'static> Prober<K> {
    /// A prober whose answers arrive at the receiver. Unbounded, but never more than was asked.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Answer<K>>) {
        let (answers, receiver) = mpsc::unbounded_channel();
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        (Self { slots, answers, kept: Arc::default() }, receiver)
    }

    /// Starts one probe. After its own answer the backend must also answer for `vips`, each by a way to it; or
    /// why it cannot be asked.
    pub fn ask(
        &self,
        key: K,
        backend: BackendAddress,
        check: &HealthCheck,
        vips: Result<Vec<(vip::Way, SocketAddr)>, String>,
    ) {
        let slots = Arc::clone(&self.slots);
        let answers = self.answers.clone();
        let (what, timeout) = (check.probe.clone(), check.timeout);
        let target = target(backend, check);
        // Who listens elsewhere is asked as anybody would be.
        let is_own = |&target: &SocketAddr| matches!(backend, BackendAddress::Remote(_, port) if port == Some(target.port()));
        let proxy = check.proxy.filter(|_| target.as_ref().is_some_and(is_own));
        let turn = target.map(|target| self.turn(target, &check.probe));
        tokio::spawn(async move {
            let Some(target) = target else {
                let why = ProbeError::Impossible("the backend has no port; give health a port".into());
                _ = answers.send(Answer { key, outcome: Err(why) });
                return;
            };
            let turn = turn.unwrap_or_default();
            let mut kept = match &turn {
                Some(turn) => Some(turn.lock().await),
                None => None,
            };
            let mut nothing = None;
            let kept = kept.as_deref_mut().unwrap_or(&mut nothing);
            // The semaphore is never closed; if it were, there would be nothing to ask.
            let Ok(_slot) = slots.acquire_owned().await else { return };
            let mut outcome = ask((&what, proxy), target, timeout, kept).await;
            if outcome.is_ok()
                && let Err(why) = answers_for(vips, timeout).await
            {
                outcome = Err(why);
            }
            // The daemon has gone: nobody wants to know. While it is our turn, so that answers stay in order.
            _ = answers.send(Answer { key, outcome });
        });
    }

    /// The turn at a server that is asked for its role.
    fn turn(&self, target: SocketAddr, probe: &Probe) -> Option<Arc<Turn>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if !probe.tells_roles() {
            return None;
        }
        // Those of servers that are asked no more.
        kept.retain(|address, turn| *address == target || Arc::strong_count(turn) > 1 || is_fresh(turn));
        Some(Arc::clone(kept.entry(target).or_default()))
    }
}

/// Whether a backend answers for each of these addresses, in time.
async fn answers_for(
    vips: Result<Vec<(vip::Way, SocketAddr)>, String>,
    timeout: Duration,
) -> Result<(), ProbeError> {
    for (way, address) in vips.map_err(ProbeError::Impossible)? {
        match tokio::time::timeout(timeout, vip::ask(way, address)).await {
            Ok(asked) => asked?,
            Err(_) => return Err(ProbeError::NotItsAddress(address)),
        }
    }
    Ok(())
}

/// Whether a kept connection was used lately, or may be being used.
fn is_fresh(turn: &Turn) -> bool {
    turn.try_lock().map_or(true, |kept| kept.as_ref().is_some_and(Kept::is_fresh))
}

/// Asks once, by a connection of its own.
///
/// # Errors
/// Why it counts as failed.
pub async fn probe(what: &Probe, target: SocketAddr, timeout: Duration) -> Result<Answered, ProbeError> {
    ask((what, None), target, timeout, &mut None).await
}

/// Asks once, after an introduction where one is expected. `kept`: a connection from last time, if there is one, and
/// for the next.
async fn ask(
    (what, proxy): (&Probe, Option<ProxyVersion>),
    target: SocketAddr,
    timeout: Duration,
    kept: &mut Option<Kept>,
) -> Result<Answered, ProbeError> {
    let start = Instant::now();
    let asked = async {
        match what {
            Probe::Tcp => introduced(target, proxy).await.map(|_| None),
            Probe::Http { path, host, status, body, tls, verify, ca_file } => {
                let request = http::Request { path, host: host.as_deref(), status, body: body.as_deref() };
                let stream = introduced(target, proxy).await?;
                if *tls {
                    let name = tls::server_name(host.as_deref(), target.ip())?;
                    let stream = tls::connect(stream, name, *verify, ca_file.as_deref()).await?;
                    http::get(stream, target, &request).await?;
                } else {
                    http::get(stream, target, &request).await?;
                }
                Ok(None)
            }
            Probe::Udp { send, expect } => udp::ask(target, send, expect).await.map(|()| None),
            Probe::Postgres(settings) => postgres::ask(settings, target, kept).await.map(Some),
            Probe::HttpRole { primary, replica } => role::ask(target, primary, replica).await.map(Some),
        }
    };
    match tokio::time::timeout(timeout, asked).await {
        Ok(outcome) => outcome.map(|said| Answered { latency: start.elapsed(), said }),
        Err(_) => Err(ProbeError::Timeout(timeout)),
    }
}

/// Where a backend is asked: on the check's port, else on its own.
pub fn target(backend: BackendAddress, check: &HealthCheck) -> Option<SocketAddr> {
    let (address, port) = match backend {
        BackendAddress::Local => (IpAddr::V4(Ipv4Addr::LOCALHOST), None),
        BackendAddress::Remote(address, port) => (address, port),
    };
    Some(SocketAddr::new(address, check.port.or(port)?))
}

/// A connection that begins with the PROXY protocol, if it has to: it is on nobody's behalf, which is `UNKNOWN` in
/// version 1 and `LOCAL` in version 2 (sections 2.1 and 2.2 of its specification).
async fn introduced(target: SocketAddr, proxy: Option<ProxyVersion>) -> Result<TcpStream, ProbeError> {
    let mut stream = connect(target).await?;
    if let Some(version) = proxy {
        let header = version.encode(&ProxyHeader::with_local());
        stream.write_all(&header).await.map_err(|error| ProbeError::Broken(error.to_string()))?;
    }
    Ok(stream)
}

async fn connect(target: SocketAddr) -> Result<TcpStream, ProbeError> {
    let stream = TcpStream::connect(target).await.map_err(|error| ProbeError::Connect(error.to_string()))?;
    stream.set_nodelay(true).map_err(|error| ProbeError::Connect(error.to_string()))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Via;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, UdpSocket},
    };

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(100);

    fn http(path: &str, status: &[(u16, u16)], body: Option<&str>) -> Probe {
        Probe::Http {
            path: path.into(),
            host: Some("shop.example".into()),
            status: status.to_vec(),
            body: body.map(Into::into),
            tls: false,
            verify: true,
            ca_file: None,
        }
    }

    /// A server that answers each connection with `answer` and gives back what it was sent first.
    async fn server(answer: &'static str) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap();
                _ = sender.send(String::from_utf8_lossy(&request[..length]).into_owned());
                _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        (address, receiver)
    }

    #[tokio::test]
    async fn tcp_succeeds_where_somebody_listens_and_fails_where_nobody_does() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert!(probe(&Probe::Tcp, address, LONG).await.is_ok());
        drop(listener);
        assert!(matches!(probe(&Probe::Tcp, address, LONG).await, Err(ProbeError::Connect(_))));
    }

    #[tokio::test]
    async fn http_asks_for_path_and_host_and_judges_status_and_body() {
        let (address, mut requests) = server("HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nI am ok").await;
        assert!(probe(&http("/healthz?a=b", &[(200, 299)], None), address, LONG).await.is_ok());
        let request = requests.recv().await.unwrap();
        assert!(request.starts_with("GET /healthz?a=b HTTP/1.1\r\n"), "{request}");
        assert!(request.to_lowercase().contains("\r\nhost: shop.example\r\n"), "{request}");
        assert!(probe(&http("/", &[(200, 299)], Some("am ok")), address, LONG).await.is_ok());
        let missing = probe(&http("/", &[(200, 299)], Some("never")), address, LONG).await;
        assert_eq!(missing, Err(ProbeError::Unexpected));
        let other = probe(&http("/", &[(201, 204), (300, 399)], None), address, LONG).await;
        assert_eq!(other, Err(ProbeError::Status(200)));
    }

    #[tokio::test]
    async fn who_expects_the_proxy_protocol_hears_that_it_is_for_nobody() {
        let (address, mut requests) = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let local = "\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
        for (version, introduction) in [(ProxyVersion::V1, "PROXY UNKNOWN\r\n"), (ProxyVersion::V2, local)] {
            let what = http("/", &[(200, 299)], None);
            assert!(ask((&what, Some(version)), address, LONG, &mut None).await.is_ok());
            let heard = requests.recv().await.unwrap();
            assert!(heard.starts_with(introduction), "{heard:?}");
            assert!(ask((&Probe::Tcp, Some(version)), address, LONG, &mut None).await.is_ok());
            assert_eq!(requests.recv().await.unwrap(), introduction);
        }
    }

    #[tokio::test]
    async fn http_does_not_wait_for_a_body_that_nobody_asked_about() {
        let (address, _requests) = server("HTTP/1.1 200 OK\r\ncontent-length: 700000\r\n\r\nbegin").await;
        assert!(probe(&http("/", &[(200, 299)], None), address, LONG).await.is_ok());
    }

    #[tokio::test]
    async fn http_that_is_no_http_fails() {
        let (address, _requests) = server("SSH-2.0-OpenSSH_9.2\r\n").await;
        let outcome = probe(&http("/", &[(200, 299)], None), address, LONG).await;
        assert!(matches!(outcome, Err(ProbeError::Broken(_))), "{outcome:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_time_out() {
        // Connections are taken by the kernel; nobody ever answers. The runtime's clock stands still, and
        // leaps to the next time-out when nothing else is left to do.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let begun = tokio::time::Instant::now();
        let outcome = probe(&http("/", &[(200, 299)], None), listener.local_addr().unwrap(), SHORT).await;
        assert_eq!(outcome, Err(ProbeError::Timeout(SHORT)));
        assert!((SHORT..SHORT * 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn udp_wants_the_beginning_of_the_answer() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let answer = [b"pong ", &buffer[..length]].concat();
                _ = socket.send_to(&answer, from).await;
            }
        });
        let udp = |expect: &[u8]| Probe::Udp { send: b"ping".to_vec(), expect: expect.to_vec() };
        assert!(probe(&udp(b"pong p"), address, LONG).await.is_ok());
        assert!(probe(&udp(b""), address, LONG).await.is_ok());
        assert_eq!(probe(&udp(b"ping"), address, LONG).await, Err(ProbeError::Unexpected));
    }

    #[tokio::test]
    async fn udp_to_a_closed_port_fails_at_once() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        drop(socket);
        let outcome = probe(&Probe::Udp { send: b"x".to_vec(), expect: vec![] }, address, LONG).await;
        assert!(matches!(outcome, Err(ProbeError::Broken(_))), "{outcome:?}");
    }

    #[tokio::test]
    async fn answers_come_back_with_their_keys() {
        let (address, _requests) = server("HTTP/1.1 503 Busy\r\n\r\n").await;
        let check = HealthCheck {
            via: Via::Backend,
            probe: http("/", &[(200, 299)], None),
            interval: LONG,
            timeout: LONG,
            rise: 1,
            fall: 1,
            jitter: 0.0,
            port: Some(address.port()),
            proxy: None,
        };
        let (prober, mut answers) = Prober::new();
        prober.ask(7, BackendAddress::Local, &check, Ok(vec![]));
        let answer = answers.recv().await.unwrap();
        assert_eq!(answer, Answer { key: 7, outcome: Err(ProbeError::Status(503)) });
        prober.ask(
            8,
            BackendAddress::Remote(address.ip(), None),
            &HealthCheck { port: None, ..check },
            Ok(vec![]),
        );
        let answer = answers.recv().await.unwrap();
        assert!(matches!(answer, Answer { key: 8, outcome: Err(ProbeError::Impossible(_)) }));
    }
}
