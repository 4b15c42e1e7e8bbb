//! A connection through Lobby on which both sides wait for the other to say something.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use xtask::lab::Namespace;

/// Longer than anything here takes. Nothing but Lobby ends a connection before that.
const PATIENCE: Duration = Duration::from_secs(20);

/// Both ends of it.
pub struct Silent {
    client: TcpStream,
    server: TcpStream,
}

impl Silent {
    /// Has a client call port 80 of an address, of which the only server is at `backend`.
    ///
    /// # Errors
    /// When there is no connection, or what is said on it does not arrive.
    pub fn open(client: &Namespace, vip: IpAddr, server: &Namespace, backend: SocketAddr) -> Result<Self> {
        let listener = server.run(|| bind(backend))??;
        let client = client.run(|| TcpStream::connect(SocketAddr::new(vip, 80)))??;
        let (server, _) = listener.accept()?;
        for (mut one, mut other) in [(&client, &server), (&server, &client)] {
            other.set_read_timeout(Some(PATIENCE))?;
            one.write_all(b"?")?;
            let mut heard = [0];
            other.read_exact(&mut heard)?;
            ensure!(heard == *b"?", "{heard:?}");
        }
        Ok(Self { client, server })
    }

    /// The client says something: whether it is reset, and the server does not hear it. Who has been told already
    /// cannot say anything.
    ///
    /// # Errors
    /// When neither comes about, or both.
    pub fn is_cut(mut self) -> Result<bool> {
        match self.client.write_all(b"!") {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(true),
            other => other?,
        }
        self.server.set_read_timeout(Some(Duration::from_millis(500)))?;
        match self.server.read(&mut [0]) {
            Ok(1) => return Ok(false),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            other => bail!("the server has heard {other:?}"),
        }
        match self.client.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(true),
            other => bail!("the server has heard nothing, and the client {other:?}"),
        }
    }

    /// Waits until both sides have been reset.
    ///
    /// # Errors
    /// When one is not, or hears something else.
    pub fn is_reset(mut self) -> Result<()> {
        for (name, side) in [("the client", &mut self.client), ("the server", &mut self.server)] {
            match side.read(&mut [0; 64]) {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                other => bail!("{name} has heard {other:?}"),
            }
        }
        Ok(())
    }
}

/// Listens, once whoever was killed there has let go of the address.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let begun = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}
