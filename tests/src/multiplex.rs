//! A server of HTTP/2 by the library `h2`, in clear text or over TLS, that does with each request what a test says.

use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, Request, Response};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    runtime::Runtime,
};
use tokio_rustls::TlsAcceptor;

/// A request and the way to answer it.
pub struct Exchange {
    /// Which connection it came by, from 0.
    pub connection: usize,
    /// The request.
    pub request: Request<RecvStream>,
    /// The answer.
    pub respond: SendResponse<Bytes>,
}

/// What a request's head was.
#[derive(Clone, Debug)]
pub struct Head {
    /// Which connection it came by, from 0.
    pub connection: usize,
    /// Method, and the whole address with `:scheme` and `:authority`.
    pub line: String,
    /// The headers.
    pub headers: HeaderMap,
}

type Deed = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// The server.
pub struct Multiplex {
    /// Where it listens.
    pub address: SocketAddr,
    heads: Arc<Mutex<Vec<Head>>>,
    connections: Arc<AtomicUsize>,
    runtime: Option<Runtime>,
}

impl Multiplex {
    /// One that does so with each request; `streams`: how many at once on a connection.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start<F, D>(tls: Option<Arc<rustls::ServerConfig>>, streams: u32, deed: D) -> Result<Self>
    where
        F: Future<Output = Result<()>> + Send + 'static,
        D: Fn(Exchange) -> F + Send + Sync + 'static,
    {
        Self::at((std::net::Ipv4Addr::LOCALHOST, 0).into(), tls, streams, deed)
    }

    /// The same, at a place.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn at<F, D>(
        at: SocketAddr,
        tls: Option<Arc<rustls::ServerConfig>>,
        streams: u32,
        deed: D,
    ) -> Result<Self>
    where
        F: Future<Output = Result<()>> + Send + 'static,
        D: Fn(Exchange) -> F + Send + Sync + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind(at))?;
        let address = listener.local_addr()?;
        let heads = Arc::new(Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicUsize::new(0));
        let (list, count) = (Arc::clone(&heads), Arc::clone(&connections));
        let deed: Arc<dyn Fn(Exchange) -> Deed + Send + Sync> = Arc::new(move |it| Box::pin(deed(it)));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, list, deed) = (tls.clone(), Arc::clone(&list), Arc::clone(&deed));
                let number = count.fetch_add(1, Ordering::Relaxed);
                // How a connection ends is what the test looks at from the other side.
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, number, streams, list, deed).await,
                        Some(tls) => {
                            let stream = TlsAcceptor::from(tls).accept(stream).await?;
                            serve(stream, number, streams, list, deed).await
                        }
                    }
                });
            }
        });
        Ok(Self { address, heads, connections, runtime: Some(runtime) })
    }

    /// The requests that have come.
    pub fn heads(&self) -> Vec<Head> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many connections were made.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Multiplex {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    connection: usize,
    streams: u32,
    heads: Arc<Mutex<Vec<Head>>>,
    deed: Arc<dyn Fn(Exchange) -> Deed + Send + Sync>,
) -> Result<()> {
    let mut all = h2::server::Builder::new().max_concurrent_streams(streams).handshake(stream).await?;
    while let Some(accepted) = all.accept().await {
        let (request, respond) = accepted?;
        let line = format!("{} {}", request.method(), request.uri());
        let head = Head { connection, line, headers: request.headers().clone() };
        heads.lock().unwrap_or_else(PoisonError::into_inner).push(head);
        tokio::spawn(deed(Exchange { connection, request, respond }));
    }
    Ok(())
}

/// All of a body, and the trailers behind it.
///
/// # Errors
/// When it breaks off.
pub async fn whole(body: &mut RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>)> {
    let mut bytes = Vec::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        bytes.extend_from_slice(&part);
    }
    Ok((bytes, body.trailers().await?))
}

/// Answers with this body.
///
/// # Errors
/// When it cannot be sent.
pub fn answer(respond: &mut SendResponse<Bytes>, body: impl Into<Bytes>) -> Result<()> {
    let mut sender = respond.send_response(Response::new(()), false)?;
    sender.send_data(body.into(), true).context("the body")
}
