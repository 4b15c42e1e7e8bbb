//! Websockets (RFC 6455): once both sides have agreed, bytes are handed on as they are, until one of them ends it,
//! nothing has come for too long, or whoever serves it is to end.

use std::{
    future::Future,
    io,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use hyper::upgrade::OnUpgrade;
use hyper_util::{rt::TokioIo, server::conn::auto};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};

use super::converse::Client;
use crate::proxy::{access::Line, pools::Ticket, worker::Worker};

/// What is read at once. Most messages are far shorter, and each websocket has two of it.
const PIECE: usize = 8 << 10;

/// How long the other side may go on when one has said that it is at its end: there is nothing left to agree on.
const PARTING: Duration = Duration::from_secs(5);

/// A connection that becomes a websocket, and the one to the backend.
pub(super) struct Tunnel {
    pub(super) client: OnUpgrade,
    pub(super) backend: OnUpgrade,
    /// The backend is busy with it until it has ended.
    pub(super) ticket: Ticket,
    /// How long nothing may come from either side.
    pub(super) patience: Duration,
    /// Its line, and when it was asked for.
    pub(super) line: Option<(Line, std::time::Instant)>,
}

impl Tunnel {
    /// Hands on until it ends; `S` is what the client's connection came by.
    pub(super) async fn carry<S>(self, worker: &Worker)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Self { client, backend, ticket, patience, line } = self;
        let sides = async {
            // An error: one of them has gone before it became one.
            let (client, backend) =
                tokio::try_join!(client, backend).map_err(|error| io::Error::other(error.to_string()))?;
            let Ok(parts) = auto::upgrade::downcast::<Client<S>>(client) else {
                return Err(io::Error::other("the client's connection is not what was served"));
            };
            let mut client = parts.io.into_inner();
            // From now on it is `patience` that counts: of who pauses, the other side may be heard for hours.
            client.as_mut().set_write_timeout_pinned(None);
            Ok((begun_with(parts.read_buf, client), TokioIo::new(backend)))
        };
        let open = worker.figures.websocket();
        let bytes = hand_on(sides, &ticket, patience, worker, ["websocket_idle", "websocket_cut"]).await;
        drop(open);
        if let Some((line, began)) = line {
            worker.shared.log.write(line, began, bytes);
        }
    }
}

/// A connection of which so much has been read already, as if it had not.
pub(super) fn begun_with<S>(
    said: impl AsRef<[u8]> + Unpin + Send + 'static,
    stream: S,
) -> impl AsyncRead + AsyncWrite + Send + Unpin + 'static
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (from, to) = tokio::io::split(stream);
    tokio::io::join(io::Cursor::new(said).chain(from), to)
}

/// Hands on between two sides, once they are there, until one ends it, nothing has come for so long, or the backend or the desk
/// is to end; the first two of these are counted by these names. Gives the bytes that the first side got.
pub(super) async fn hand_on<C, B>(
    sides: impl Future<Output = io::Result<(C, B)>>,
    ticket: &Ticket,
    patience: Duration,
    worker: &Worker,
    [idle, cut]: [&'static str; 2],
) -> u64
where
    C: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (up, down) = (Carried::new(), Carried::new());
    let both = async {
        let (client, backend) = sides.await?;
        let (from_client, to_client) = tokio::io::split(client);
        let (from_backend, to_backend) = tokio::io::split(backend);
        let (up, down) = (up.carry(from_client, to_backend), down.carry(from_backend, to_client));
        let (mut up, mut down) = (pin!(up), pin!(down));
        // When the time of the other direction is over, it is cut.
        tokio::select! {
            ended = up.as_mut() => {
                ended?;
                tokio::time::timeout(PARTING, down).await.unwrap_or(Ok(()))
            }
            ended = down.as_mut() => {
                ended?;
                tokio::time::timeout(PARTING, up).await.unwrap_or(Ok(()))
            }
        }
    };
    tokio::select! {
        // How it ends is the affair of those at its ends.
        _ = pin!(both) => {}
        () = rest([&up, &down], patience) => worker.figures.refused(idle),
        () = ticket.cut() => worker.figures.refused(cut),
        () = worker.closing.cancelled() => {}
    }
    down.bytes.load(Ordering::Relaxed)
}

/// What has been handed on in one direction.
struct Carried {
    began: Instant,
    bytes: AtomicU64,
    /// When the last of it came, milliseconds after the beginning.
    last: AtomicU64,
}

impl Carried {
    fn new() -> Self {
        Self { began: Instant::now(), bytes: AtomicU64::new(0), last: AtomicU64::new(0) }
    }

    /// Hands on to the end, and says that it has come to it.
    async fn carry(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            let length = from.read(&mut piece).await?;
            if length == 0 {
                return to.shutdown().await;
            }
            to.write_all(&piece[..length]).await?;
            // TLS keeps what it has not been told to send.
            to.flush().await?;
            self.bytes.fetch_add(length as u64, Ordering::Relaxed);
            let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.last.store(now, Ordering::Relaxed);
        }
    }

    fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }
}

/// Comes back when nothing has come in any direction for so long.
async fn rest(directions: [&Carried; 2], patience: Duration) {
    loop {
        let last = directions.iter().map(|direction| direction.last()).max();
        let until = last.unwrap_or_else(Instant::now) + patience;
        if until <= Instant::now() {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn it_rests_when_nothing_comes_in_either_direction() {
        let (up, down) = (Carried::new(), Carried::new());
        let began = Instant::now();
        let (mut client, there) = tokio::io::duplex(64);
        let say = async {
            for _ in 0..5 {
                tokio::time::sleep(PATIENCE * 2 / 3).await;
                client.write_all(b"still here").await.unwrap();
            }
            client
        };
        let carried = async {
            // Never ends by itself: who says it stays open.
            _ = down.carry(there, tokio::io::sink()).await;
        };
        tokio::select! {
            () = rest([&up, &down], PATIENCE) => {}
            _ = async { tokio::join!(async { let _open = say.await; std::future::pending::<()>().await }, carried) } => {}
        }
        assert_eq!(began.elapsed().as_secs(), (PATIENCE * 2 / 3 * 5 + PATIENCE).as_secs());
        assert_eq!((up.bytes.into_inner(), down.bytes.into_inner()), (0, 50));
    }
}
