//! Long downloads by curl, as slow as a test wants them, and looked at byte by byte.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr},
    os::unix::process::ExitStatusExt as _,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::Proc;

use crate::{random::Random, stage::Stage};

/// What is read at once. A pause follows, so that packets keep flowing while something else goes on.
const CHUNK: usize = 64 << 10;

/// How long the rest of a file may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A download that is under way. It stops where it may not read on, with its connection open.
pub struct Download {
    curl: Proc,
    /// The backend that sends, counted from 0.
    pub backend: usize,
    position: Arc<AtomicUsize>,
    limit: Arc<AtomicUsize>,
    /// What was wrong with the bytes.
    reader: JoinHandle<Result<()>>,
}

/// Writes a file for downloads, of so many bytes that are alike nowhere.
///
/// # Errors
/// When it cannot be written.
pub fn write(stage: &Stage, name: &str, bytes: usize) -> Result<Arc<Vec<u8>>> {
    let mut random = Random::new(1);
    let content: Vec<u8> = (0..bytes / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    std::fs::write(stage.directory().join(name), &content)?;
    Ok(Arc::new(content))
}

impl Download {
    /// Starts one, and waits for its first bytes.
    ///
    /// # Errors
    /// When none arrive.
    pub fn start(stage: &Stage, vip: IpAddr, name: &str, content: &Arc<Vec<u8>>) -> Result<Self> {
        let url = format!("http://{}/{name}", SocketAddr::new(vip, 80));
        let mut command = stage.lab.client.command("curl");
        // Headers come before the body, in the same pipe. Nobody's patience ends but the test's.
        command.args([
            "--silent",
            "--show-error",
            "--globoff",
            "--no-buffer",
            "--include",
            "--connect-timeout",
            "10",
            &url,
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut curl = Proc::start(command)?;
        let mut from = curl.child().stdout.take().context("a pipe")?;
        let mut header = Vec::new();
        while !header.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            ensure!(from.read(&mut byte)? == 1, "curl {url} got no answer");
            header.push(byte[0]);
        }
        let header = String::from_utf8(header)?;
        // The desk writes names in small letters.
        let mut lines = header.lines().filter_map(|line| line.split_once(": "));
        let number = lines.find(|(name, _)| name.eq_ignore_ascii_case("backend")).map(|(_, value)| value);
        let number: usize = number.with_context(|| header.clone())?.trim().parse()?;

        let (position, limit) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(CHUNK)));
        let (content, at, allowed) = (content.clone(), position.clone(), limit.clone());
        let reader = std::thread::spawn(move || {
            let mut chunk = vec![0; CHUNK];
            loop {
                let position = at.load(SeqCst);
                let limit = allowed.load(SeqCst);
                if position < limit {
                    // One byte more than there should be is asked for too, to see the end.
                    let length = from.read(&mut chunk[..CHUNK.min(limit - position)])?;
                    if length == 0 {
                        return Ok(());
                    }
                    let expected = content.get(position..position + length);
                    ensure!(expected == Some(&chunk[..length]), "other bytes from {position} on");
                    at.store(position + length, SeqCst);
                }
                if limit != usize::MAX {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        });
        let download = Self { curl, backend: number - 1, position, limit, reader };
        stage.until("the first bytes of a download", |_| Ok(download.position() > 0))?;
        Ok(download)
    }

    /// How many bytes have arrived, and were right.
    pub fn position(&self) -> usize {
        self.position.load(SeqCst)
    }

    /// Lets it read so much more than it was allowed until now.
    pub fn allow(&self, bytes: usize) {
        self.limit.fetch_add(bytes, SeqCst);
    }

    /// Waits until it has read all that it may.
    ///
    /// # Errors
    /// When it does not come so far, with what curl said.
    pub fn arrives(&mut self, stage: &Stage) -> Result<()> {
        let limit = self.limit.load(SeqCst);
        let outcome = stage.until("the next bytes of a download", |_| {
            Ok(self.position() >= limit || self.reader.is_finished())
        });
        outcome.with_context(|| format!("at byte {} of backend {}", self.position(), self.backend))?;
        ensure!(self.position() >= limit, "ended at byte {}: {}", self.position(), self.ended()?);
        Ok(())
    }

    /// Reads the rest: every byte is right, and curl says so.
    ///
    /// # Errors
    /// When anything is not.
    pub fn finish(mut self, bytes: usize) -> Result<()> {
        self.limit.store(usize::MAX, SeqCst);
        let curl = self.ended()?;
        // What curl has written last may not have been read when it ends.
        self.reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        let read = self.position.load(SeqCst);
        ensure!(curl == "exit 0: " && read == bytes, "{read} of {bytes} bytes, {curl}");
        Ok(())
    }

    /// Reads on until curl gives up, and how it did: `exit 56: curl: (56) Recv failure: …`.
    ///
    /// # Errors
    /// When it cannot be found out.
    pub fn ended(&mut self) -> Result<String> {
        self.limit.store(usize::MAX, SeqCst);
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.curl.child().try_wait()? {
                break status;
            }
            ensure!(begun.elapsed() < PATIENCE, "curl hangs at byte {}", self.position());
            std::thread::sleep(Duration::from_millis(10));
        };
        let mut error = String::new();
        if let Some(mut pipe) = self.curl.child().stderr.take() {
            pipe.read_to_string(&mut error)?;
        }
        Ok(match status.code() {
            Some(code) => format!("exit {code}: {}", error.trim()),
            None => format!("signal {:?}", status.signal()),
        })
    }
}
