//! What is looked at, all at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ethtool::{EthtoolAttr, EthtoolFeatureAttr};
use futures::TryStreamExt;

use crate::{
    config::Document,
    daemon::{bpffs, checks, checks::Host},
    model::{BackendAddress, Config, Probe, Protocol},
    netlink::{Netlink, NetlinkError, surroundings::Surroundings},
    probe::{
        self, ProbeError,
        vip::{self, Way},
    },
};

/// How long a backend has for its answer, and a neighbour to be found.
const PATIENCE: Duration = Duration::from_secs(2);

/// Everything that [`super::examine`] judges by.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Effective capabilities of this process, a bit each.
    pub capabilities: u64,
    /// The kernel's release: "6.1.0-40-amd64".
    pub kernel: String,
    /// The BPF file system.
    pub bpffs: Bpffs,
    /// `net.core.bpf_jit_enable`; `None`: not readable.
    pub jit: Option<u32>,
    /// Whether the kernel carries its types.
    pub btf: bool,
    /// CPUs that run without a tick (`nohz_full`), as the kernel lists them; empty: none.
    pub tickless: String,
    /// `net.ipv4.ip_forward`.
    pub ip_forward: bool,
    /// Reverse path filter of each interface, the larger of its own and that of all: 1 is strict.
    pub rp_filter: BTreeMap<String, u32>,
    /// The host's own ports, and the programs that are loaded.
    pub host: Host,
    /// Offloads that are on, by interface name; absent: cannot be seen.
    pub features: BTreeMap<String, BTreeSet<String>>,
    /// Driver of each interface that has one.
    pub drivers: BTreeMap<String, String>,
    /// Links, addresses, routes, neighbours.
    pub around: Surroundings,
    /// The document, if there is one to look at.
    pub document: Option<Document>,
    /// What became of a TCP connection to each backend that has a port and serves TCP.
    pub reached: BTreeMap<(String, BackendAddress), Result<Duration, String>>,
    /// Whether each backend of a service that does not translate answers for its address.
    pub answered: BTreeMap<(String, BackendAddress, SocketAddr), Result<(), ProbeError>>,
    /// Alarms of the daemon that runs, if the document is its own.
    pub alarms: Vec<String>,
    /// Where a data plane is pinned that no daemon looks after.
    pub left: Option<PathBuf>,
}

/// The BPF file system.
#[derive(Clone, Debug, Default)]
pub struct Bpffs {
    /// Where it should be.
    pub path: PathBuf,
    /// It is there.
    pub mounted: bool,
    /// The kernel has such a file system.
    pub known: bool,
}

impl Facts {
    /// Looks at everything. Touches nothing, except that backends see a connection from here.
    ///
    /// # Errors
    /// When the kernel does not list its links or addresses.
    pub async fn gather(document: Option<Document>, bpffs_path: &Path) -> Result<Self, NetlinkError> {
        let netlink = Netlink::open()?;
        let targets = document.as_ref().map(|d| checks::targets(&d.config)).unwrap_or_default();
        // Connecting makes the kernel look for the neighbours, too.
        let reached = reach(document.as_ref()).await;
        let mut around = netlink.survey(&targets).await?;
        around.neighbours = resolved(&netlink, &around).await?;
        // They have had all the time that one takes who is there.
        let known = &around.neighbours;
        around.silent =
            around.wanted_neighbours().into_iter().filter(|key| !known.contains_key(key)).collect();
        let answered = answer_for_vips(document.as_ref(), &around).await;
        let names: Vec<_> = around.links.values().map(|link| link.name.clone()).collect();
        let rp_filter =
            |name: &str| -> u32 { number(&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).unwrap_or(0) };
        Ok(Self {
            capabilities: capabilities(&read("/proc/self/status")),
            kernel: read("/proc/sys/kernel/osrelease"),
            bpffs: Bpffs {
                path: bpffs_path.to_owned(),
                mounted: bpffs::is_bpffs(bpffs_path),
                known: read("/proc/filesystems").split_whitespace().any(|word| word == "bpf"),
            },
            jit: number("/proc/sys/net/core/bpf_jit_enable"),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            tickless: tickless(&read("/sys/devices/system/cpu/nohz_full")),
            ip_forward: number("/proc/sys/net/ipv4/ip_forward") == Some(1),
            rp_filter: names
                .iter()
                .map(|name| (name.clone(), rp_filter(name).max(rp_filter("all"))))
                .collect(),
            host: Host::read(),
            features: features().await,
            drivers: names.iter().filter_map(|name| Some((name.clone(), driver(name)?))).collect(),
            around,
            document,
            reached,
            answered,
            alarms: Vec::new(),
            left: None,
        })
    }

    /// Interfaces of the document that are down.
    pub(super) fn down(&self) -> impl Iterator<Item = &str> {
        let listed = self.document.iter().flat_map(|document| &document.config.interfaces);
        let down = |name: &&String| self.around.link(name).is_some_and(|link| !link.up);
        listed.filter(down).map(String::as_str)
    }
}

/// The list of CPUs in `nohz_full`, which some kernels write as "(null)" where there is none.
fn tickless(text: &str) -> String {
    text.trim().trim_matches(['(', ')']).replace("null", "")
}

async fn reach(document: Option<&Document>) -> BTreeMap<(String, BackendAddress), Result<Duration, String>> {
    let asked = document.map(|document| called_by_tcp(&document.config)).unwrap_or_default().into_iter();
    let answers = asked.map(|(pool, address, target)| async move {
        let outcome = probe::probe(&Probe::Tcp, target, PATIENCE).await;
        let outcome = outcome.map(|answer| answer.latency).map_err(|error| error.to_string());
        ((pool, address), outcome)
    });
    // Not all at once: a document may have thousands.
    futures::StreamExt::collect(futures::StreamExt::buffer_unordered(futures::stream::iter(answers), 64))
        .await
}

/// The backends with a port that are called by TCP: by clients whose packets are forwarded, or by the desk.
fn called_by_tcp(config: &Config) -> Vec<(String, BackendAddress, SocketAddr)> {
    let forwarded = config.services.values().filter(|service| service.listen.protocol == Protocol::Tcp);
    let forwarded = forwarded.map(|service| service.pool.as_str());
    let called: BTreeSet<&str> =
        config.at_desk().flat_map(|(_, _, desk)| desk.pools()).chain(forwarded).collect();
    let pools = config.pools.iter().filter(|(name, _)| called.contains(name.as_str()));
    let of_pool = pools.flat_map(|(name, pool)| {
        pool.backends.iter().filter_map(move |backend| match backend.address {
            BackendAddress::Remote(ip, Some(port)) => {
                Some((name.clone(), backend.address, SocketAddr::new(ip, port)))
            }
            _ => None,
        })
    });
    of_pool.collect()
}

/// Asks each backend for the addresses that it needs, where there is a way to it.
async fn answer_for_vips(
    document: Option<&Document>,
    around: &Surroundings,
) -> BTreeMap<(String, BackendAddress, SocketAddr), Result<(), ProbeError>> {
    let Some(document) = document else { return BTreeMap::new() };
    let config = &document.config;
    let asked = config.pools.iter().flat_map(|(name, pool)| {
        let ways = pool.backends.iter().filter_map(|backend| {
            let ip = checks::remote(backend.address)?;
            let way = Way { hop: around.next_hop(ip).ok()?, source: around.source(ip)? };
            Some((backend.address, way))
        });
        ways.flat_map(move |(address, way)| {
            config.direct_vips(name).map(move |vip| ((name.clone(), address, vip), way))
        })
    });
    let answers = asked.map(|(key, way)| async move {
        let silent = Err(ProbeError::NotItsAddress(key.2));
        let outcome = tokio::time::timeout(PATIENCE, vip::ask(way, key.2)).await.unwrap_or(silent);
        (key, outcome)
    });
    futures::StreamExt::collect(futures::StreamExt::buffer_unordered(futures::stream::iter(answers), 64))
        .await
}

/// The neighbours on the ways to backends. Those that nobody has asked for yet are asked for by sending
/// them something: an empty datagram to the discard port (RFC 863).
async fn resolved(
    netlink: &Netlink,
    around: &Surroundings,
) -> Result<BTreeMap<(u32, IpAddr), crate::netlink::surroundings::Mac>, NetlinkError> {
    let wanted = around.wanted_neighbours();
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let known = netlink.neighbours(&wanted).await?;
        let missing: Vec<_> = wanted.iter().filter(|key| !known.contains_key(key)).collect();
        if missing.is_empty() || tokio::time::Instant::now() >= end {
            return Ok(known);
        }
        for (_, address) in missing {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            if let Ok(socket) = tokio::net::UdpSocket::bind(any).await {
                // Whether it arrives does not matter.
                _ = socket.send_to(&[], SocketAddr::new(*address, 9)).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn features() -> BTreeMap<String, BTreeSet<String>> {
    let mut found = BTreeMap::new();
    let Ok((connection, mut handle, _)) = ethtool::new_connection() else { return found };
    let connection = tokio::spawn(connection);
    let Ok(answers) = handle.feature().get(None).execute().await else { return found };
    let mut answers = std::pin::pin!(answers);
    while let Ok(Some(message)) = answers.try_next().await {
        let mut name = None;
        let mut on = BTreeSet::new();
        for attribute in message.payload.nlas {
            match attribute {
                EthtoolAttr::Feature(EthtoolFeatureAttr::Header(header)) => {
                    name = header.into_iter().find_map(|part| match part {
                        ethtool::EthtoolHeader::DevName(name) => Some(name),
                        _ => None,
                    });
                }
                EthtoolAttr::Feature(EthtoolFeatureAttr::Active(bits)) => {
                    on = bits.into_iter().filter(|bit| bit.value).map(|bit| bit.name).collect();
                }
                _ => {}
            }
        }
        if let Some(name) = name {
            found.insert(name, on);
        }
    }
    connection.abort();
    found
}

fn driver(interface: &str) -> Option<String> {
    let link = fs::read_link(format!("/sys/class/net/{interface}/device/driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// From the line `CapEff:` of a process's status.
fn capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn number(path: &str) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_effective_line() {
        let status = "Name:\tlb\nCapPrm:\t0000000000000001\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n";
        assert_eq!(capabilities(status), 0x1ff_ffff_ffff);
        assert_eq!(capabilities(""), 0);
    }

    #[test]
    fn backends_are_called_by_tcp_whoever_calls_them_so() {
        let text = r#"interfaces = ["eth0"]
[pools.forwarded]
backends = [{ address = "10.0.0.11:8080" }]
[pools.names]
backends = [{ address = "10.0.0.12:53" }]
[pools.requests]
backends = [{ address = "10.0.0.13:8080" }]
[services.shop]
listen = "10.0.0.10:80/tcp"
pool = "forwarded"
[services.dns]
listen = "10.0.0.10:53/udp"
pool = "names"
[services.desk]
listen = "10.0.0.10:81/tcp"
routes = [{ pool = "requests" }]
"#;
        let called = called_by_tcp(&Document::parse(text).unwrap().config);
        let pools: Vec<_> = called.iter().map(|(pool, ..)| pool.as_str()).collect();
        assert_eq!(pools, ["forwarded", "requests"]);
        assert_eq!(called[1].2, "10.0.0.13:8080".parse().unwrap());
    }
}
