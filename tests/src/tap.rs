//! What goes over an interface, as tcpdump has written it.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    net::IpAddr,
    path::PathBuf,
    process::{ChildStderr, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use pcap_file::pcap::PcapReader;
use xtask::lab::{Namespace, Proc};

use crate::{
    packets::{self, Seen},
    stage::Stage,
};

/// A capture that is under way.
#[derive(Debug)]
pub struct Tap {
    tcpdump: Proc,
    said: BufReader<ChildStderr>,
    file: PathBuf,
}

impl Tap {
    /// Captures the TCP segments of the place's `eth0` from now on that are from or to a host.
    ///
    /// # Errors
    /// tcpdump is not installed, or does not start.
    pub fn on(stage: &Stage, place: &Namespace, host: IpAddr) -> Result<Self> {
        let file = stage.directory().join(format!("{}.pcap", place.name()));
        let mut command = place.command("tcpdump");
        command.args(["-i", "eth0", "-Z", "root", "--immediate-mode", "-U", "-B", "32768", "-w"]);
        command.arg(&file).args(["tcp", "and", "host", &host.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut tcpdump = Proc::start(command)?;
        let said = tcpdump.child().stderr.take().context("nothing is heard of tcpdump")?;
        let (mut said, mut line) = (BufReader::new(said), String::new());
        said.read_line(&mut line)?;
        ensure!(line.contains("listening on"), "tcpdump: {line}");
        Ok(Self { tcpdump, said, file })
    }

    /// Ends the capture: the segments, in their order.
    ///
    /// # Errors
    /// The capture cannot be read, or lacks something.
    pub fn end(mut self) -> Result<Vec<Seen>> {
        // What the kernel has not handed over yet is lost otherwise.
        std::thread::sleep(Duration::from_millis(200));
        self.tcpdump.signal(Signal::SIGINT)?;
        self.tcpdump.wait()?;
        let mut said = String::new();
        self.said.read_to_string(&mut said)?;
        ensure!(said.contains("\n0 packets dropped by kernel"), "tcpdump: {said}");
        let mut reader = PcapReader::new(BufReader::new(File::open(&self.file)?))?;
        let mut seen = Vec::new();
        while let Some(packet) = reader.next_packet() {
            let packet = packet?;
            ensure!(packet.data.len() == packet.orig_len as usize, "a segment was cut off");
            seen.push(packets::read(&packet.data).map_err(|error| anyhow::anyhow!(error))?);
        }
        Ok(seen)
    }
}
