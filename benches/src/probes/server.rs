//! Thousands of servers in one thread: each has a port, and is well unless it is told to fail.

use std::{
    net::Ipv4Addr,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use xtask::lab::Namespace;

/// Nobody's port.
const NOBODY: u16 = 0;

/// The servers; they end with the process.
pub(crate) struct Servers {
    /// Whose next answer is a failure.
    failing: Arc<AtomicU16>,
    /// When a failure was answered.
    failed: mpsc::Receiver<Instant>,
}

impl Servers {
    /// Starts one for each port, all at one place.
    pub(crate) fn start(place: &Namespace, ports: Range<u16>) -> Result<Self> {
        let failing = Arc::new(AtomicU16::new(NOBODY));
        let (tell, failed) = mpsc::channel();
        let (ready, started) = mpsc::channel();
        let (place, told) = (place.clone(), Arc::clone(&failing));
        thread::spawn(move || {
            let serve = || -> Result<()> {
                place.enter()?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(async {
                    for port in ports {
                        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await?;
                        tokio::spawn(listen(listener, port, Arc::clone(&told), tell.clone()));
                    }
                    // Who started them may have given up.
                    _ = ready.send(Ok(()));
                    std::future::pending().await
                })
            };
            if let Err(error) = serve() {
                _ = ready.send(Err(error));
            }
        });
        started.recv().context("the servers have ended")??;
        Ok(Self { failing, failed })
    }

    /// Has the server with this port fail the next time that it is asked; gives back when it answered so.
    pub(crate) fn fail_once(&self, port: u16, patience: Duration) -> Result<Instant> {
        self.failing.store(port, Ordering::SeqCst);
        self.failed.recv_timeout(patience).with_context(|| format!("nobody probes port {port}"))
    }
}

async fn listen(listener: TcpListener, port: u16, failing: Arc<AtomicU16>, tell: mpsc::Sender<Instant>) {
    loop {
        // A connection that is gone again is no reason to end.
        let Ok((stream, _)) = listener.accept().await else { continue };
        tokio::spawn(answer(stream, port, Arc::clone(&failing), tell.clone()));
    }
}

/// Reads a request and answers it; a client that breaks off gets none.
async fn answer(mut stream: TcpStream, port: u16, failing: Arc<AtomicU16>, tell: mpsc::Sender<Instant>) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_buf(&mut request).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    let fails = failing.compare_exchange(port, NOBODY, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    let status = if fails { "500 Internal Server Error" } else { "200 OK" };
    let response = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let now = Instant::now();
    _ = stream.write_all(response.as_bytes()).await;
    if fails {
        // Who asked for it may have lost patience.
        _ = tell.send(now);
    }
}
