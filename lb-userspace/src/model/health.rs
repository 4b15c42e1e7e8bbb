//! How the health of a pool's backends is found out.

use std::time::Duration;

use super::{Postgres, desk::ProxyVersion};

/// How a backend's health is found out.
#[derive(Clone, Debug, PartialEq)]
pub struct HealthCheck {
    /// What is asked.
    pub probe: Probe,
    /// From one probe to the next; each is moved by up to `jitter` of it.
    pub interval: Duration,
    /// A probe that has not succeeded by then has failed.
    pub timeout: Duration,
    /// Successes in a row that make an unhealthy backend healthy.
    pub rise: u32,
    /// Failures in a row that make a healthy backend unhealthy.
    pub fall: u32,
    /// Part of the interval, 0 to 0.5.
    pub jitter: f64,
    /// Port to ask on; `None`: the backend's own.
    pub port: Option<u16>,
    /// Whether it must also answer for the addresses of services.
    pub via: Via,
    /// A connection to the backend's own port begins with the PROXY protocol, since whoever listens there expects it.
    pub proxy: Option<ProxyVersion>,
}

/// Where a backend must answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Via {
    /// At its own address.
    #[default]
    Backend,
    /// There, and to a SYN to the VIP of each service that does not translate.
    Vip,
}

/// What a health check asks.
#[derive(Clone, Debug, PartialEq)]
pub enum Probe {
    /// Whether a connection can be made.
    Tcp,
    /// A GET, over TLS if `tls`.
    Http {
        /// Path and query.
        path: String,
        /// `Host`, and for TLS the name to verify; `None`: the address.
        host: Option<String>,
        /// Statuses that count as success, as ranges with both ends.
        status: Vec<(u16, u16)>,
        /// What the body must contain.
        body: Option<String>,
        /// HTTPS.
        tls: bool,
        /// Whether the certificate is verified (HTTPS only).
        verify: bool,
        /// PEM file of the authorities to verify against instead of the system's.
        ca_file: Option<std::path::PathBuf>,
    },
    /// A datagram, and what the answer must begin with.
    Udp {
        /// What is sent.
        send: Vec<u8>,
        /// What the answer must begin with; empty: any answer.
        expect: Vec<u8>,
    },
    /// A PostgreSQL server: whether it takes writes, and how far behind it is.
    Postgres(Postgres),
    /// Paths that answer 200 on the server that is the primary, and on replicas that are fit.
    HttpRole {
        /// Path and query that the primary answers.
        primary: String,
        /// Path and query that replicas answer.
        replica: String,
    },
}

impl Probe {
    /// Whether the answers say which server is the primary.
    pub const fn tells_roles(&self) -> bool {
        matches!(self, Self::Postgres(_) | Self::HttpRole { .. })
    }

    /// How far behind a replica may be; `None`: the check does not say, or sees to it itself.
    pub const fn max_lag(&self) -> Option<Duration> {
        match self {
            Self::Postgres(postgres) => postgres.max_lag,
            _ => None,
        }
    }
}
