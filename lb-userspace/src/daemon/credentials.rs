//! Files that say who is known to the desk: read here, since the desk may not, and looked at before they are
//! handed on. Nothing of what is in them is said anywhere.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    config::{Complaint, Document},
    model::{
        Config,
        guard::{KeyForm, Way},
    },
    proxy::{
        auth::{self, entries::EntryError},
        orders::{Files, Secret},
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
}

impl ReadError {
    fn remedy(&self, way: &Way) -> &'static str {
        match self {
            Self::File { .. } => {
                "name a file that is there, by its whole path or beside the document, and that the daemon may read"
            }
            Self::Entry { .. } => match way {
                Way::Jwt { form: KeyForm::Jwks, .. } => {
                    "put the issuer's set of public keys there, as its jwks_uri gives it"
                }
                Way::Jwt { form: KeyForm::Pem, .. } => {
                    "put the issuer's public key there, RSA, P-256, P-384 or Ed25519, from BEGIN PUBLIC KEY to END"
                }
                Way::Jwt { form: KeyForm::Secret, .. } => {
                    "put a secret made by chance there, such as `openssl rand -base64 48` prints, and tell the issuer"
                }
                Way::Basic { .. } | Way::Key { .. } => {
                    "write a line for each, name:hash or name:hash:role,role; `lb auth hash` prints one"
                }
            },
        }
    }
}

/// Reads the file of a way.
fn read(way: &Way) -> Result<Secret, ReadError> {
    let path = || way.file().to_owned();
    let text = fs::read_to_string(way.file()).map_err(|source| ReadError::File { path: path(), source })?;
    auth::check(way, &text).map_err(|source| ReadError::Entry { path: path(), source })?;
    Ok(Secret::new(text))
}

/// Files of a document that cannot be used.
pub fn complaints(document: &Document) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (name, _, desk) in document.config.at_desk() {
        for (number, route) in desk.routes.iter().enumerate() {
            for (at, way) in route.guard.ways.iter().enumerate() {
                if let Err(error) = read(way) {
                    let place = document.places.way(name, number, at);
                    complaints.push(place.error(error.to_string(), error.remedy(way)));
                }
            }
        }
    }
    complaints
}

fn ways(config: &Config) -> impl Iterator<Item = &Way> {
    config.at_desk().flat_map(|(_, _, desk)| &desk.routes).flat_map(|route| &route.guard.ways)
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
        for way in ways(config) {
            let path = way.file().to_owned();
            match read(way) {
                Ok(text) => _ = good.insert(path, text),
                Err(error) => {
                    refused.insert(format!("who is known to the desk is kept as it was: {error}"));
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

/// The directories in which a change of them shows: of the files, and of what they are links to.
pub fn directories(config: &Config) -> BTreeSet<PathBuf> {
    let both = ways(config).flat_map(|way| [Some(way.file().to_owned()), fs::canonicalize(way.file()).ok()]);
    both.flatten().filter_map(|path| path.parent().map(Path::to_owned)).collect()
}
