//! Servers of which one takes writes: who is what in a database cluster, and how that is asked.

use std::{fmt, path::PathBuf, time::Duration};

/// Which of a pool's backends a service wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The one that takes writes.
    Primary,
    /// Those that follow it and are fit to be read from.
    Replica,
}

impl Role {
    /// As the document writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Who is read from when no replica is fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplicaFallback {
    /// The primary.
    #[default]
    Primary,
    /// Nobody.
    None,
}

/// What becomes of clients that want the primary while there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNoPrimary {
    /// They are refused at once.
    #[default]
    Reset,
    /// They get no answer, and so ask again, until there has been none for this long.
    Hold(Duration),
}

/// What becomes of the connections of readers to a server that is not fit to be read from any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUnfit {
    /// They stay: to end queries for a short lag is the opposite mistake.
    #[default]
    Keep,
    /// They are reset.
    Cut,
}

/// How a PostgreSQL server is asked who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postgres {
    /// Who asks.
    pub user: String,
    /// In which database.
    pub database: String,
    /// Where the password is.
    pub password: Password,
    /// `None`: in clear (a password is not sent in clear where the server wants SCRAM).
    pub tls: Option<PostgresTls>,
    /// How far behind a replica may be and still be read from; `None`: as far as it likes.
    pub max_lag: Option<Duration>,
}

/// TLS to a PostgreSQL server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresTls {
    /// The name to verify; `None`: the address.
    pub host: Option<String>,
    /// Whether the certificate is verified.
    pub verify: bool,
    /// PEM file of the authorities to verify against instead of the system's.
    pub ca_file: Option<PathBuf>,
}

/// Where a password is. The password itself is read when it is needed and kept nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Password {
    /// There is none.
    None,
    /// In this variable of the daemon's environment.
    Env(String),
    /// In this file, alone; white space at its end does not belong to it.
    File(PathBuf),
}
