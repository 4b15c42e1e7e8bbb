//! Files that say who is known to the desk, by whose word it believes servers, and what its pages look like: read here,
//! since the desk may not, and looked at before they are handed on. Nothing of what is in them is said anywhere.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    config::{Complaint, Document, Place},
    model::{
        Config,
        desk::{Clients, Desk},
        guard::{KeyForm, Way},
    },
    proxy::{
        auth::{self, entries::EntryError},
        orders::{Files, Secret},
        page::{Page, PageError},
        tls::{self, CertificateError, ClientRules},
    },
};

/// A file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be read.
    #[error("{} cannot be read: {source}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What it says is of no use.
    #[error("{}, {source}", .path.display())]
    Entry {
        /// Which.
        path: PathBuf,
        /// Where in it, and why.
        source: EntryError,
    },
    /// It has no authorities.
    #[error("{}: {source}", .path.display())]
    Authority {
        /// Which.
        path: PathBuf,
        /// Why.
        source: CertificateError,
    },
    /// It is no page.
    #[error("{}: {source}", .path.display())]
    Page {
        /// Which.
        path: PathBuf,
        /// Why.
        source: PageError,
    },
}

/// A file that is wanted, and what for.
#[derive(Clone, Copy)]
enum Wanted<'c> {
    Way(&'c Way, &'c Path),
    Authority(&'c Path),
    Revoked(&'c Path, &'c Clients),
    Page(&'c Path),
}

impl ReadError {
    fn remedy(&self, wanted: Wanted<'_>) -> &'static str {
        match self {
            Self::File { .. } => {
                "name a file that is there, by its whole path or beside the document, and that the daemon may read"
            }
            Self::Entry { .. } | Self::Authority { .. } | Self::Page { .. } => match wanted {
                Wanted::Revoked(..) => {
                    "name a PEM file with the lists of who has been revoked, whole and in version 2, for each authority in ca, from BEGIN X509 CRL to END"
                }
                Wanted::Page(_) => {
                    "write HTML with {{title}}, {{text}}, {{status}}, {{reason}}, {{retry_after}} and {{request_id}} where they belong"
                }
                Wanted::Authority(_) => {
                    "name a PEM file with the certificate of who signs them, or, for servers, the one of all that the system trusts, such as /etc/ssl/certs/ca-certificates.crt"
                }
                Wanted::Way(Way::Jwt { form: KeyForm::Jwks, .. }, _) => {
                    "put the issuer's set of public keys there, as its jwks_uri gives it"
                }
                Wanted::Way(Way::Jwt { form: KeyForm::Pem, .. }, _) => {
                    "put the issuer's public key there, RSA, P-256, P-384 or Ed25519, from BEGIN PUBLIC KEY to END"
                }
                Wanted::Way(Way::Jwt { form: KeyForm::Secret, .. }, _) => {
                    "put a secret made by chance there, such as `openssl rand -base64 48` prints, and tell the issuer"
                }
                Wanted::Way(..) => {
                    "write a line for each, name:hash or name:hash:role,role; `lb auth hash` prints one"
                }
            },
        }
    }
}

impl<'c> Wanted<'c> {
    fn of(way: &'c Way) -> impl Iterator<Item = Self> {
        let ca = way.fetch().and_then(|fetch| fetch.ca.as_deref()).map(Self::Authority);
        way.file().map(|file| Self::Way(way, file)).into_iter().chain(ca)
    }

    fn path(self) -> &'c Path {
        match self {
            Self::Way(_, path) | Self::Authority(path) | Self::Revoked(path, _) | Self::Page(path) => path,
        }
    }

    /// Reads it and looks whether it can be used.
    fn read(self) -> Result<Secret, ReadError> {
        let path = || self.path().to_owned();
        let text =
            fs::read_to_string(self.path()).map_err(|source| ReadError::File { path: path(), source })?;
        match self {
            Self::Way(way, _) => {
                auth::check(way, &text).map_err(|source| ReadError::Entry { path: path(), source })?;
            }
            Self::Authority(_) => {
                tls::authorities(&text).map_err(|source| ReadError::Authority { path: path(), source })?;
            }
            Self::Revoked(_, clients) => {
                let wrong = |source| ReadError::Authority { path: path(), source };
                let lists = Some(Secret::new(text.clone()));
                // That one cannot be read is said of itself.
                match fs::read_to_string(&clients.ca).map(Secret::new) {
                    Ok(authorities) if tls::authorities(authorities.expose()).is_ok() => {
                        let rules = ClientRules { authorities, revoked: lists, required: true };
                        rules.check().map_err(wrong)?;
                    }
                    _ => _ = tls::revoked(&text).map_err(wrong)?,
                }
            }
            Self::Page(_) => {
                Page::parse(&text).map_err(|source| ReadError::Page { path: path(), source })?;
            }
        }
        Ok(Secret::new(text))
    }
}

/// Files of a document that cannot be used.
pub fn complaints(document: &Document) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let mut look = |wanted: Wanted<'_>, place: Place<'_>| {
        if let Err(error) = wanted.read() {
            complaints.push(place.error(error.to_string(), error.remedy(wanted)));
        }
    };
    for (name, _, desk) in document.config.at_desk() {
        for (purpose, page) in desk.pages.files() {
            look(Wanted::Page(page), document.places.file_of(name, &purpose));
        }
        for wanted in of_clients(desk) {
            let purpose = if matches!(wanted, Wanted::Revoked(..)) { "crl" } else { "ca" };
            look(wanted, document.places.file_of(name, purpose));
        }
        for (number, route) in desk.routes.iter().enumerate() {
            for (at, way) in route.guard.ways.iter().enumerate() {
                for wanted in Wanted::of(way) {
                    look(wanted, document.places.way(name, number, at));
                }
            }
        }
    }
    for (name, ca) in servers(&document.config) {
        look(Wanted::Authority(ca), document.places.speech(name));
    }
    complaints
}

/// The pools whose servers are spoken with over TLS, with who vouches for them.
fn servers(config: &Config) -> impl Iterator<Item = (&String, &Path)> {
    config.pools.iter().filter_map(|(name, pool)| Some((name, pool.speech.tls.as_ref()?.ca.as_path())))
}

/// Who vouches for the clients of a service, and whom no more.
fn of_clients(desk: &Desk) -> impl Iterator<Item = Wanted<'_>> {
    desk.clients.iter().flat_map(|clients| {
        let lists = clients.crl.as_deref().map(|crl| Wanted::Revoked(crl, clients));
        [Wanted::Authority(&clients.ca)].into_iter().chain(lists)
    })
}

fn all(config: &Config) -> impl Iterator<Item = Wanted<'_>> {
    let desks = || config.at_desk().map(|(_, _, desk)| desk);
    let ways = desks().flat_map(|desk| &desk.routes).flat_map(|route| &route.guard.ways).flat_map(Wanted::of);
    let pages = desks().flat_map(|desk| desk.pages.files()).map(|(_, path)| Wanted::Page(path));
    let clients = desks().flat_map(of_clients);
    ways.chain(pages).chain(clients).chain(servers(config).map(|(_, ca)| Wanted::Authority(ca)))
}

/// The files as they were when they could last be used.
#[derive(Debug, Default)]
pub struct Credentials {
    good: Files,
    /// Why files as they are now are not used.
    refused: Vec<String>,
}

impl Credentials {
    /// Reads the files of a document again. Where one cannot be used, the one from before stays.
    pub fn refresh(&mut self, config: &Config) {
        let mut good = Files::new();
        let mut refused = BTreeSet::new();
        for wanted in all(config) {
            let path = wanted.path().to_owned();
            match wanted.read() {
                Ok(text) => _ = good.insert(path, text),
                Err(error) => {
                    refused.insert(format!("a file that the desk goes by is kept as it was: {error}"));
                    if let Some(before) = self.good.remove(&path) {
                        good.insert(path, before);
                    }
                }
            }
        }
        self.good = good;
        self.refused = refused.into_iter().collect();
    }

    /// All of them.
    pub fn files(&self) -> &Files {
        &self.good
    }

    /// What needs somebody's attention.
    pub fn alarms(&self) -> &[String] {
        &self.refused
    }
}

/// The files of them that a document names.
pub fn files(config: &Config) -> impl Iterator<Item = &Path> {
    all(config).map(Wanted::path)
}
