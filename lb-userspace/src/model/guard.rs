//! Who may come in by a route of the reception desk, as a document says it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::Network;

/// What is asked of who comes by a route; by default nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guard {
    /// How to say who one is; one of them is enough. Empty: nobody is asked.
    pub ways: Vec<Way>,
    /// What must be true of them: for each of these claims, one of these values.
    pub require: BTreeMap<String, BTreeSet<String>>,
    /// Networks that may come in; empty: all that are not denied.
    pub allow: Vec<Network>,
    /// Networks that may not; the longest prefix decides.
    pub deny: Vec<Network>,
    /// Headers by which a backend is told who asks, with the claim that each has. Names are in lower case.
    pub identity: BTreeMap<String, String>,
    /// The backend gets what the desk was shown, too.
    pub forward_credentials: bool,
}

/// How to say who one is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// Name and password (RFC 7617).
    Basic {
        /// Who is known: lines of `name:hash` or `name:hash:roles`.
        users: PathBuf,
        /// What the browser says it asks for.
        realm: String,
    },
    /// A key in a header.
    Key {
        /// Which are known: lines of `name:sha256` or `name:sha256:roles`.
        keys: PathBuf,
        /// The header, in lower case.
        header: String,
    },
    /// A token that somebody else has signed (RFC 7519), as `Authorization: Bearer`.
    Jwt {
        /// The keys that it may be signed with: a file, or the address that `fetch` is of.
        keys: PathBuf,
        /// What is there.
        form: KeyForm,
        /// How keys are fetched that are in no file.
        fetch: Option<Fetch>,
        /// What else must be true of it.
        rule: TokenRule,
        /// What a client is told that it asks for.
        realm: String,
    },
    /// A certificate that the service's authorities have signed, shown as the connection began.
    Certificate {
        /// What of it says who somebody is.
        user: CertificateName,
    },
    /// Another service knows.
    Forward {
        /// Name of its pool.
        pool: String,
        /// What it is asked for.
        path: String,
        /// Headers of its answer by the claims that they give. Names are in lower case.
        claims: BTreeMap<String, String>,
    },
}

/// How an issuer's keys are fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// PEM file of the authorities that vouch for the issuer; `None`: those that the system trusts.
    pub ca: Option<PathBuf>,
    /// How often.
    pub refresh: Duration,
    /// For how long keys hold when nothing comes any more.
    pub keep: Duration,
}

/// What of a certificate says who somebody is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CertificateName {
    /// The common name of its subject.
    #[default]
    CommonName,
    /// The first name of DNS.
    Dns,
    /// The first address of mail.
    Email,
    /// The first URI.
    Uri,
}

impl CertificateName {
    /// What it is called in documents, and as a claim.
    pub const fn claim(self) -> &'static str {
        match self {
            Self::CommonName => "common_name",
            Self::Dns => "dns",
            Self::Email => "email",
            Self::Uri => "uri",
        }
    }
}

/// What a file of keys for tokens is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyForm {
    /// A set of keys (RFC 7517 section 5).
    Jwks,
    /// One public key in PEM form.
    Pem,
    /// A secret that both sides know.
    Secret,
}

/// What must be true of a token besides its signature, and what is read from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRule {
    /// Who may have made it; empty: whoever has the key.
    pub issuer: BTreeSet<String>,
    /// For whom it may be; empty: only for nobody in particular.
    pub audience: BTreeSet<String>,
    /// By how much clocks may differ.
    pub leeway: Duration,
    /// The claim that says who somebody is; with dots: a claim within another.
    pub user: String,
    /// The claim that says what somebody is.
    pub role: String,
}

impl Way {
    /// What says who is known, if something does: a file, or an address.
    pub fn source(&self) -> Option<&Path> {
        match self {
            Self::Basic { users: from, .. } | Self::Key { keys: from, .. } | Self::Jwt { keys: from, .. } => {
                Some(from)
            }
            Self::Certificate { .. } | Self::Forward { .. } => None,
        }
    }

    /// The file that says who is known, if one does.
    pub fn file(&self) -> Option<&Path> {
        self.source().filter(|_| self.fetch().is_none())
    }

    /// How what says who is known is fetched, if it is.
    pub fn fetch(&self) -> Option<&Fetch> {
        match self {
            Self::Jwt { fetch, .. } => fetch.as_ref(),
            _ => None,
        }
    }

    /// The files that it names, to be changed.
    pub fn files_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let (file, ca) = match self {
            Self::Jwt { fetch: Some(fetch), .. } => (None, fetch.ca.as_mut()),
            Self::Basic { users: file, .. } | Self::Key { keys: file, .. } | Self::Jwt { keys: file, .. } => {
                (Some(file), None)
            }
            Self::Certificate { .. } | Self::Forward { .. } => (None, None),
        };
        file.into_iter().chain(ca)
    }

    /// What it is called in documents.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Basic { .. } => "basic",
            Self::Key { .. } => "key",
            Self::Jwt { .. } => "jwt",
            Self::Certificate { .. } => "certificate",
            Self::Forward { .. } => "forward",
        }
    }

    /// The header that what is shown for it may stand in.
    pub fn shown_in(&self) -> Option<&str> {
        match self {
            // By cookies too, perhaps; those may be the backend's.
            Self::Forward { .. } => Some("authorization"),
            other => other.header(),
        }
    }

    /// The pool of the service that is asked, if one is.
    pub fn pool(&self) -> Option<&str> {
        if let Self::Forward { pool, .. } = self { Some(pool) } else { None }
    }

    /// Headers that whoever is asked tells in who somebody is.
    pub fn told_in(&self) -> impl Iterator<Item = &String> {
        let claims = if let Self::Forward { claims, .. } = self { Some(claims) } else { None };
        claims.into_iter().flat_map(BTreeMap::values)
    }

    /// The header that it looks at, if it is one.
    pub fn header(&self) -> Option<&str> {
        match self {
            Self::Basic { .. } | Self::Jwt { .. } => Some("authorization"),
            Self::Key { header, .. } => Some(header),
            Self::Certificate { .. } | Self::Forward { .. } => None,
        }
    }
}

impl fmt::Display for Way {
    /// `basic`, `jwt of https://id.example for shop`, `forward to id/verify`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if let Self::Forward { pool, path, .. } = self {
            return write!(f, " to {pool}{path}");
        }
        let Self::Jwt { rule, .. } = self else { return Ok(()) };
        for (word, names) in [("of", &rule.issuer), ("for", &rule.audience)] {
            if !names.is_empty() {
                write!(f, " {word} {}", names.iter().map(String::as_str).collect::<Vec<_>>().join(" and "))?;
            }
        }
        Ok(())
    }
}

impl Guard {
    /// Whether it asks for anything.
    pub fn is_open(&self) -> bool {
        self.ways.is_empty() && self.allow.is_empty() && self.deny.is_empty()
    }
}

impl fmt::Display for Guard {
    /// `basic or key, role admin or staff, from 10.0.0.0/8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list =
            |networks: &[Network]| networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let mut parts = Vec::new();
        if !self.ways.is_empty() {
            parts.push(self.ways.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "));
        }
        for (claim, values) in &self.require {
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            parts.push(format!("{claim} {}", values.join(" or ")));
        }
        if !self.allow.is_empty() {
            parts.push(format!("from {}", list(&self.allow)));
        }
        if !self.deny.is_empty() {
            parts.push(format!("not from {}", list(&self.deny)));
        }
        f.write_str(&parts.join(", "))
    }
}
