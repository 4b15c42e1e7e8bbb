//! Connections by TLS that are handed on as they are: only the name that their client asks for is read (RFC 6066 section 3).

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::server::Acceptor;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};

use super::{tunnel::hand_on, upstream};
use crate::{
    model::desk::Desk,
    proxy::{
        access::Line,
        orders::ServiceOrder,
        pools::{Call, Pool, Ticket, Wish},
        worker::Worker,
    },
};

/// Longest that a client may say before its name is known, bytes.
const LONGEST: usize = 32 << 10;

/// How often a backend is called at most.
const ATTEMPTS: usize = 3;

/// What a client has said so far, and the name that it asks for.
pub(super) struct Hello {
    pub(super) said: Vec<u8>,
    pub(super) name: Option<String>,
}

impl Hello {
    /// Reads until the name is known, or that there is none.
    ///
    /// # Errors
    /// When it is no TLS, or the client is gone.
    pub(super) async fn hear(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut acceptor = Acceptor::default();
        let mut said = Vec::new();
        let mut piece = [0; 4 << 10];
        loop {
            let length = stream.read(&mut piece).await?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            said.extend_from_slice(&piece[..length]);
            if said.len() > LONGEST {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut unread = &piece[..length];
            while !unread.is_empty() {
                acceptor.read_tls(&mut unread)?;
                match acceptor.accept() {
                    Ok(None) => {}
                    Ok(Some(accepted)) => {
                        let name = accepted.client_hello().server_name().map(str::to_owned);
                        return Ok(Self { said, name });
                    }
                    Err((error, _)) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
                }
            }
        }
    }
}

/// Hands a connection to a backend of a pool, and on until it ends.
pub(super) async fn pass(
    worker: &Worker,
    service: &ServiceOrder,
    pool: Arc<Pool>,
    (client, called): (SocketAddr, SocketAddr),
    hello: Hello,
    stream: impl AsyncRead + AsyncWrite,
) {
    let (began, Desk { timeouts, access_log, .. }) = (Instant::now(), &service.desk);
    let log = |backend, trouble, bytes| {
        let Some(one_in) = *access_log else { return };
        let mut line = Line::passed(&service.name, client.ip(), hello.name.as_deref().unwrap_or_default());
        (line.backend, line.trouble) = (backend, trouble);
        if line.is_drawn(one_in, &worker.chance) {
            worker.shared.log.write(line, began, bytes);
        }
    };
    let Some((ticket, backend)) = reach(worker, pool, (client, called), timeouts.connect, &hello.said).await
    else {
        worker.figures.refused("no_backend");
        return log(None, Some("no_backend"), 0);
    };
    let _passed = worker.figures.passed();
    let sides = std::future::ready(Ok((stream, backend)));
    let names = ["passed_idle", "passed_cut"];
    let bytes = hand_on(sides, &ticket, timeouts.websocket, worker, names).await;
    log(Some(ticket.address), None, bytes);
}

/// A connection to a backend, which has been told what the client has said.
async fn reach(
    worker: &Worker,
    pool: Arc<Pool>,
    (client, called): (SocketAddr, SocketAddr),
    patience: Duration,
    said: &[u8],
) -> Option<(Ticket, TcpStream)> {
    let call = || Call { port: called.port(), random: worker.chance.next(), wish: Wish::Anyone };
    let (pool, first) = upstream::enter(worker, pool, call()).await.ok()?;
    let introduction = pool.transport.introduction(client, called);
    let (mut first, mut tried) = (Some(first), Vec::new());
    for _ in 0..ATTEMPTS {
        let ticket = match first.take() {
            Some(ticket) => ticket,
            None => pool.enter(call(), &tried).await.ok()?,
        };
        let connected = async {
            let mut stream = TcpStream::connect(ticket.address).await?;
            _ = stream.set_nodelay(true);
            stream.write_all(&introduction).await?;
            stream.write_all(said).await?;
            io::Result::Ok(stream)
        };
        let connected = tokio::time::timeout(patience, connected).await;
        let went_well = matches!(connected, Ok(Ok(_)));
        upstream::note(worker, &pool, &ticket, went_well);
        if let Ok(Ok(stream)) = connected {
            return Some((ticket, stream));
        }
        tried.push(ticket.address);
    }
    None
}
