//! Asks a PostgreSQL server who it is, in its own protocol.
//!
//! One connection is kept for each server, since a new one for each probe costs the server a process. A
//! kept one must not tell less than a new one would: it is renewed every few seconds, so that a server which
//! takes no connections any more is found out, and it is dropped as soon as anything goes wrong with it.
//!
//! Rights: any user that may connect to the database. `pg_monitor` only makes a replica's timeline known
//! sooner.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_postgres::{
    Client, Config,
    config::{ChannelBinding, SslMode},
    tls::{ChannelBinding as Binding, NoTls, TlsConnect, TlsStream as Secured},
};

use super::{ProbeError, connect, tls};
use crate::{
    health::{Observation, Says},
    model::{Password, Postgres, PostgresTls},
};

/// A connection is renewed when it is this old.
const RENEWED_AFTER: Duration = Duration::from_secs(10);

/// One question for everything, so that the answers belong together. Positions are counted in bytes from
/// the beginning of the log (pg_lsn). On a primary the timeline is in the name of the file that is being
/// written: the control file shows the old one for seconds after a promotion. Who is set to be read-only by the
/// settings of this user or session says nothing of the server.
const QUESTION: &str = "
SELECT pg_is_in_recovery(),
  CASE WHEN pg_is_in_recovery() THEN
    coalesce((SELECT received_tli::int8 FROM pg_stat_wal_receiver), (SELECT timeline_id::int8 FROM pg_control_checkpoint()))
  ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int8 END,
  pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, '0/0')::float8,
  CASE WHEN NOT pg_is_in_recovery() OR pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
  ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END::float8,
  coalesce((SELECT setting = 'on' AND source NOT IN ('user', 'database user', 'client', 'session')
    FROM pg_settings WHERE name = 'default_transaction_read_only'), false)";

/// A connection that is kept for the next probe.
pub(super) struct Kept {
    client: Client,
    settings: Postgres,
    since: Instant,
    driver: JoinHandle<()>,
}

impl Kept {
    /// Whether it may be used once more.
    pub(super) fn is_fresh(&self) -> bool {
        self.since.elapsed() < RENEWED_AFTER && !self.client.is_closed()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Asks who a server is. When this is given up half-way, nothing is kept.
pub(super) async fn ask(
    settings: &Postgres,
    target: SocketAddr,
    kept: &mut Option<Kept>,
) -> Result<Observation, ProbeError> {
    // Taken out while it is in use: whatever happens to it then, it is not used again.
    let earlier = kept.take().filter(|kept| kept.is_fresh() && kept.settings == *settings);
    if let Some(earlier) = earlier {
        match question(&earlier.client).await {
            Ok(said) => {
                *kept = Some(earlier);
                return Ok(said);
            }
            // The server may have been restarted: that the old connection broke is no answer.
            Err(ProbeError::Broken(_)) => {}
            Err(error) => return Err(error),
        }
    }
    let new = open(settings, target).await?;
    let said = question(&new.client).await?;
    *kept = Some(new);
    Ok(said)
}

async fn question(client: &Client) -> Result<Observation, ProbeError> {
    let row = client.query_one(QUESTION, &[]).await.map_err(|error| told(&error))?;
    let odd = |_| ProbeError::Unexpected;
    let in_recovery: bool = row.try_get(0).map_err(odd)?;
    let timeline: Option<i64> = row.try_get(1).map_err(odd)?;
    let position: Option<f64> = row.try_get(2).map_err(odd)?;
    let lag: Option<f64> = row.try_get(3).map_err(odd)?;
    let read_only: bool = row.try_get(4).map_err(odd)?;
    Ok(Observation {
        says: if in_recovery { Says::Replica } else { Says::Primary },
        timeline: timeline.and_then(|timeline| u32::try_from(timeline).ok()).filter(|timeline| *timeline > 0),
        position: position.map(|position| position as u64),
        own_lag: lag
            .filter(|_| in_recovery)
            .map(|lag| Duration::try_from_secs_f64(lag.max(0.0)).unwrap_or(Duration::MAX)),
        read_only: read_only && !in_recovery,
    })
}

async fn open(settings: &Postgres, target: SocketAddr) -> Result<Kept, ProbeError> {
    let mut config = Config::new();
    config
        .user(&settings.user)
        .dbname(&settings.database)
        .application_name("lobby")
        .channel_binding(ChannelBinding::Disable)
        // A replica that is told to cancel queries must not be kept from it by ours.
        .options("-c statement_timeout=10s");
    if let Some(password) = password(&settings.password)? {
        config.password(password);
    }
    let stream = connect(target).await?;
    let (client, driver) = match &settings.tls {
        None => {
            config.ssl_mode(SslMode::Disable);
            let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|e| told(&e))?;
            (client, tokio::spawn(async move { _ = connection.await }))
        }
        Some(tls) => {
            config.ssl_mode(SslMode::Require);
            let connector = Connector::new(tls, target)?;
            let (client, connection) = config.connect_raw(stream, connector).await.map_err(|e| told(&e))?;
            (client, tokio::spawn(async move { _ = connection.await }))
        }
    };
    Ok(Kept { client, settings: settings.clone(), since: Instant::now(), driver })
}

/// The password, from where the document says that it is. It is in no error.
fn password(place: &Password) -> Result<Option<String>, ProbeError> {
    match place {
        Password::None => Ok(None),
        Password::Env(name) => match std::env::var(name) {
            Ok(password) => Ok(Some(password)),
            Err(_) => Err(ProbeError::Impossible(format!(
                "the daemon's environment has no variable {name} with the password"
            ))),
        },
        Password::File(path) => match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(error) => Err(ProbeError::Impossible(format!(
                "cannot read the password from {}: {error}",
                path.display()
            ))),
        },
    }
}

/// What the server, or the way to it, says is wrong.
fn told(error: &tokio_postgres::Error) -> ProbeError {
    if let Some(said) = error.as_db_error() {
        let text = format!("{} ({})", said.message(), said.code().code());
        // Class 57P is an operator's doing: the server is shutting down, or starting.
        return match said.code().code() {
            code if code.starts_with("57P") && code != "57P03" => ProbeError::Broken(text),
            _ => ProbeError::Refused(text),
        };
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    ProbeError::Broken(text)
}

/// Makes a connection secure, with the same settings as HTTPS checks.
struct Connector<'a> {
    settings: &'a PostgresTls,
    name: ServerName<'static>,
}

impl<'a> Connector<'a> {
    fn new(settings: &'a PostgresTls, target: SocketAddr) -> Result<Self, ProbeError> {
        Ok(Self { settings, name: tls::server_name(settings.host.as_deref(), target.ip())? })
    }
}

impl<'a> TlsConnect<TcpStream> for Connector<'a> {
    type Stream = Stream;
    type Error = io::Error;
    type Future = BoxFuture<'a, io::Result<Stream>>;

    fn connect(self, stream: TcpStream) -> Self::Future {
        Box::pin(async move {
            let Self { settings, name } = self;
            let stream = tls::connect(stream, name, settings.verify, settings.ca_file.as_deref()).await;
            stream.map(Stream).map_err(io::Error::other)
        })
    }
}

/// A secured connection. No channel binding: the certificate is what is trusted.
struct Stream(tokio_rustls::client::TlsStream<TcpStream>);

impl Secured for Stream {
    fn channel_binding(&self) -> Binding {
        Binding::none()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
