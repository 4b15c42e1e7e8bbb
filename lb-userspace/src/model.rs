//! The desired state, checked: what a document means once nothing in it can be nonsense.
//!
//! [`crate::config`] makes it from a document; [`crate::plan`] turns it into tables. Nothing here knows
//! about files, sockets or kernels.

pub mod desk;
pub mod guard;
mod health;
pub mod limit;
mod network;
mod roles;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use desk::Desk;
pub use health::{HealthCheck, Probe, Via};
pub use network::{Network, NetworkError};
pub use roles::{OnNoPrimary, OnUnfit, Password, Postgres, PostgresTls, ReplicaFallback, Role};

/// A whole document.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Interfaces that the program is attached to; not empty, no duplicates.
    pub interfaces: Vec<String>,
    /// What holds for all services.
    pub settings: Settings,
    /// Pools by name.
    pub pools: BTreeMap<String, Pool>,
    /// Services by name. No two listen on the same address, port and protocol.
    pub services: BTreeMap<String, Service>,
}

impl Config {
    /// The services that the reception desk answers.
    pub fn at_desk(&self) -> impl Iterator<Item = (&String, &Service, &Desk)> {
        self.services.iter().filter_map(|(name, service)| Some((name, service, service.desk.as_ref()?)))
    }

    /// The services and their names, by where they listen.
    pub fn services_by_listen(&self) -> BTreeMap<Listen, (&String, &Service)> {
        self.services.iter().map(|(name, service)| (service.listen, (name, service))).collect()
    }

    /// The services of each pool and their names, in the order of these: for who looks at many pools.
    pub fn services_by_pool(&self) -> BTreeMap<&str, Vec<(&String, &Service)>> {
        let mut by_pool: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (name, service) in &self.services {
            by_pool.entry(service.pool.as_str()).or_default().push((name, service));
        }
        by_pool
    }

    /// The backends of a service: its pool's, in the document's order, and this host if it stands in for them.
    pub fn backends_of(&self, service: &Service) -> impl Iterator<Item = &Backend> {
        let pool = self.pools.get(&service.pool).into_iter().flat_map(|pool| &pool.backends);
        pool.chain(service.has_fallback().then_some(&Backend::THIS_HOST))
    }

    /// Where those services of a pool listen whose backends need their addresses, for TCP on one port.
    pub fn direct_vips(&self, pool: &str) -> impl Iterator<Item = SocketAddr> {
        let direct = move |service: &&Service| service.pool == pool && service.forward == Forward::Dsr;
        self.services.values().filter(direct).filter_map(|service| {
            let Listen { address, port, protocol } = service.listen;
            Some(SocketAddr::new(address, port.filter(|_| protocol == Protocol::Tcp)?))
        })
    }

    /// Makes paths of the desk's files whole, which are beside the document.
    pub fn resolve(&mut self, directory: &std::path::Path) {
        for tls in self.pools.values_mut().filter_map(|pool| pool.speech.tls.as_mut()) {
            tls.ca = directory.join(&tls.ca);
        }
        let desks = self.services.values_mut().filter_map(|service| service.desk.as_mut());
        for desk in desks {
            for files in &mut desk.certificates {
                files.cert = directory.join(&files.cert);
                files.key = directory.join(&files.key);
            }
            if let Some(clients) = &mut desk.clients {
                clients.ca = directory.join(&clients.ca);
                clients.crl = clients.crl.take().map(|crl| directory.join(crl));
            }
            for page in desk.pages.files_mut() {
                *page = directory.join(&*page);
            }
            for way in desk.routes.iter_mut().flat_map(|route| &mut route.guard.ways) {
                for file in way.files_mut() {
                    *file = directory.join(&*file);
                }
            }
        }
    }

    /// The pools that only the desk connects to: their packets are the host's own.
    pub fn pools_of_desk(&self) -> BTreeSet<&str> {
        let mut pools: BTreeSet<&str> = self.at_desk().flat_map(|(_, _, desk)| desk.pools()).collect();
        if !pools.is_empty() {
            self.services.values().for_each(|service| _ = pools.remove(service.pool.as_str()));
        }
        pools
    }
}

/// What holds for all services.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Sizes of the tables; fixed when they are made.
    pub limits: Limits,
    /// Idle time-outs of flows.
    pub idle: Idle,
    /// Addresses to send translated packets from; empty: the host's own, by its routes.
    pub sources: Vec<IpAddr>,
    /// Ports of those addresses that are ours.
    pub ports: PortRange,
    /// Resets a second, for each CPU.
    pub resets_per_second: u32,
    /// Where Prometheus may ask; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
}

/// A range of ports, both ends included, low ≤ high, low ≥ 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// Lowest.
    pub low: u16,
    /// Highest.
    pub high: u16,
}

impl Default for PortRange {
    /// Below the ports that Linux gives to the host's own connections (32768 to 60999).
    fn default() -> Self {
        Self { low: 10240, high: 32767 }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.low, self.high)
    }
}

/// The text is no range of ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ports are written \"10240-32767\": the lowest, not 0, and the highest")]
pub struct PortRangeError;

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (low, high) = text.split_once('-').ok_or(PortRangeError)?;
        let port = |text: &str| text.trim().parse::<u16>().map_err(|_| PortRangeError);
        let (low, high) = (port(low)?, port(high)?);
        if low == 0 || high < low { Err(PortRangeError) } else { Ok(Self { low, high }) }
    }
}

/// Sizes of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Flows at the same time; a power of two, at least 1024.
    pub flows: u32,
    /// Services.
    pub services: u32,
    /// Backends, counted once for each service they serve.
    pub backends: u32,
    /// Pages of rings (4 KiB each): a ring takes one for each 1024 slots, and as much again while it changes.
    pub ring_pages: u32,
    /// Pages of what slots remember (24 KiB each): a ring of a service that does not translate takes as many
    /// as it has pages while some slot of it is not settled.
    pub side_pages: u32,
    /// Firewall rules, for each family.
    pub rules: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 1 << 18,
            services: 4096,
            backends: 16384,
            ring_pages: 8192,
            side_pages: 1024,
            rules: 16384,
        }
    }
}

/// Idle time-outs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idle {
    /// TCP, handshake not finished.
    pub half_open: Duration,
    /// TCP, established.
    pub established: Duration,
    /// TCP, one side has said it is done.
    pub closing: Duration,
    /// TCP, both have, or one has reset.
    pub closed: Duration,
    /// UDP.
    pub udp: Duration,
    /// How long a port rests after use, where others are free.
    pub port_rest: Duration,
}

impl Default for Idle {
    fn default() -> Self {
        Self {
            half_open: Duration::from_secs(20),
            // RFC 5382 section 5: not below 2 h 4 min.
            established: Duration::from_secs(7440),
            closing: Duration::from_secs(240),
            closed: Duration::from_secs(10),
            // RFC 4787 section 4.3: not below 2 min.
            udp: Duration::from_secs(180),
            port_rest: Duration::from_secs(60),
        }
    }
}

/// Backends that can stand in for one another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pool {
    /// How their health is found out; `None`: they count as healthy.
    pub health: Option<HealthCheck>,
    /// The backends; no two have the same address.
    pub backends: Vec<Backend>,
    /// What becomes of an unhealthy backend's connections.
    pub on_unhealthy: OnUnhealthy,
    /// What to do when all fail at once.
    pub panic: Panic,
    /// Who is read from when no replica is fit.
    pub replica_fallback: ReplicaFallback,
    /// What becomes of readers' connections to a server that is not fit any more.
    pub on_unfit: OnUnfit,
    /// For how long a server that has come back, or is new among others, gets less than its share; it grows in ten
    /// steps. `None`: it gets all of it at once.
    pub slow_start: Option<Duration>,
    /// What becomes of clients that want the primary while there is none.
    pub on_no_primary: OnNoPrimary,
    /// How the desk speaks with them.
    pub speech: desk::Speech,
    /// How many requests of the desk may be under way with each; `None`: as many as come.
    pub crowd: Option<desk::Crowd>,
    /// When the desk sends none to a server that does not answer well; `None`: it always does.
    pub ejection: Option<desk::Ejection>,
}

/// What becomes of the connections of a backend that turned unhealthy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUnhealthy {
    /// They stay, in case it is only a blip.
    #[default]
    Keep,
    /// They are forgotten: UDP goes elsewhere, a TCP client is reset when it next sends and calls again.
    Move,
    /// They are reset.
    Reset,
}

/// What to do when every backend of a pool is unhealthy at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Panic {
    /// The last set that was usable stays in use, and an alarm is raised: more likely the check is wrong.
    #[default]
    Keep,
    /// None is used.
    Fail,
}

/// A server.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// Where it is.
    pub address: BackendAddress,
    /// Share of new connections, against the others' of its pool; 0 to 1000. Zero: no new connections.
    pub weight: u16,
    /// What the operator wants of it.
    pub admin: Admin,
}

impl Backend {
    /// This host itself.
    pub const THIS_HOST: Self = Self { address: BackendAddress::Local, weight: 1, admin: Admin::Enabled };
}

/// Where a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendAddress {
    /// This host itself.
    Local,
    /// Address, and port unless it is the one that the client called.
    Remote(IpAddr, Option<u16>),
}

impl fmt::Display for BackendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Remote(ip, Some(port)) => SocketAddr::new(*ip, *port).fmt(f),
            Self::Remote(ip, None) => ip.fmt(f),
        }
    }
}

/// The text is no backend address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a backend is written \"10.0.0.11:8080\", \"[2001:db8::11]:8080\", an address alone, or \"local\"; ports end at 65535, and names of hosts are not resolved"
)]
pub struct BackendAddressError;

impl FromStr for BackendAddress {
    type Err = BackendAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "local" {
            return Ok(Self::Local);
        }
        if let Ok(socket) = text.parse::<SocketAddr>() {
            return if socket.port() == 0 {
                Err(BackendAddressError)
            } else {
                Ok(Self::Remote(socket.ip(), Some(socket.port())))
            };
        }
        text.parse::<IpAddr>().map(|ip| Self::Remote(ip, None)).map_err(|_| BackendAddressError)
    }
}

/// What the operator wants of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admin {
    /// Use it.
    #[default]
    Enabled,
    /// No new connections; those it has may end by themselves, until `deadline` (seconds since the
    /// epoch), when they are reset.
    Drain {
        /// `None`: for as long as they like.
        deadline: Option<u64>,
    },
    /// No connections at all; those it has are reset.
    Disabled,
}

/// An address to be reached at, and the pool that answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Where it listens.
    pub listen: Listen,
    /// Name of its pool; it exists.
    pub pool: String,
    /// Which of the pool's backends; `None`: any. The pool's health check tells roles, then.
    pub role: Option<Role>,
    /// How a backend is chosen.
    pub scheduler: Scheduler,
    /// How packets get there.
    pub forward: Forward,
    /// How long connections are remembered.
    pub track: Track,
    /// Slots of the ring, prime; `None`: by the number of backends.
    pub ring_size: Option<u32>,
    /// Networks that may come in; empty: all that are not denied.
    pub allow: Vec<Network>,
    /// Networks that may not. The longest prefix decides; no network is in both.
    pub deny: Vec<Network>,
    /// What the reception desk does with it: all, with [`Forward::Desk`] and [`desk::DESK_POOL`]; otherwise what comes while
    /// nobody of its pool is fit.
    pub desk: Option<Desk>,
}

impl Service {
    /// Whether the desk answers while nobody of its pool is fit.
    pub fn has_fallback(&self) -> bool {
        self.desk.is_some() && self.forward != Forward::Desk
    }
}

/// Address, port and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Listen {
    /// The VIP.
    pub address: IpAddr,
    /// The port; `None`: all that no other service of the address and protocol has.
    pub port: Option<u16>,
    /// TCP or UDP.
    pub protocol: Protocol,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (address, Some(port)) => write!(f, "{}/{}", SocketAddr::new(address, port), self.protocol),
            (IpAddr::V4(address), None) => write!(f, "{address}:*/{}", self.protocol),
            (IpAddr::V6(address), None) => write!(f, "[{address}]:*/{}", self.protocol),
        }
    }
}

/// The text is no listener.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a listener is written \"203.0.113.10:80/tcp\", \"[2001:db8::1]:53/udp\", or with * for all ports: \"203.0.113.10:*/tcp\"; ports end at 65535"
)]
pub struct ListenError;

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (place, protocol) = text.rsplit_once('/').ok_or(ListenError)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(ListenError),
        };
        let (address, port) = place.rsplit_once(':').ok_or(ListenError)?;
        let address = match address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(v6) => IpAddr::V6(v6.parse().map_err(|_| ListenError)?),
            None => IpAddr::V4(address.parse().map_err(|_| ListenError)?),
        };
        let port = match port {
            "*" => None,
            number => Some(number.parse().ok().filter(|&port: &u16| port != 0).ok_or(ListenError)?),
        };
        Ok(Self { address, port, protocol })
    }
}

/// Transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its number in IP headers.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => lb_common::abi::TCP,
            Self::Udp => lb_common::abi::UDP,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// How a backend is chosen for a new connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scheduler {
    /// By the hash of client and service on a Maglev ring: few change hands when backends come and go.
    #[default]
    Maglev,
    /// One after the other, by weight.
    RoundRobin,
    /// As [`Scheduler::Maglev`], by the client's address alone: all its connections go to one backend.
    Source,
}

impl Scheduler {
    /// All, by what they are called in documents.
    pub const NAMES: [(&str, Self); 3] = [
        (Self::Maglev.name(), Self::Maglev),
        (Self::RoundRobin.name(), Self::RoundRobin),
        (Self::Source.name(), Self::Source),
    ];

    /// What it is called in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Maglev => "maglev",
            Self::RoundRobin => "round-robin",
            Self::Source => "source",
        }
    }
}

/// How packets get to the backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forward {
    /// Addresses and ports translated, both ways: any backend, as it is.
    #[default]
    Nat,
    /// Direct server return: only the link layer changes, the backend has the VIP and answers the client
    /// itself.
    Dsr,
    /// Up to this host's own reception desk.
    Desk,
}

impl Forward {
    /// As the document writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Dsr => "dsr",
            Self::Desk => "desk",
        }
    }
}

/// When a connection of a service that does not translate is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Track {
    /// While backends change, so that it stays with its own.
    #[default]
    Changes,
    /// Always.
    Always,
    /// Never (UDP: each datagram is for itself).
    Never,
}

impl Track {
    /// As the document writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Changes => "changes",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

impl Service {
    /// For how long slots that change hands look after silent connections; `None`: there is nothing to look
    /// after.
    pub fn quiet_time(&self, idle: &Idle) -> Option<Duration> {
        match (self.forward, self.track, self.listen.protocol) {
            (Forward::Nat | Forward::Desk, _, _) | (_, Track::Never, _) => None,
            (_, _, Protocol::Tcp) => Some(idle.established),
            (_, _, Protocol::Udp) => Some(idle.udp),
        }
    }
}

#[cfg(test)]
mod tests;
