//! Certificates of the desk's services: read here, since the desk may not, and looked at before they are
//! handed on.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    config::{Complaint, Document},
    model::{Config, desk::CertificateFiles},
    proxy::{
        orders::{Pem, Secret},
        tls::{self, CertificateError},
    },
};

/// A certificate cannot be had from its files.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What they say is of no use.
    #[error("{} and {}: {source}", .files.cert.display(), .files.key.display())]
    Certificate {
        /// Which.
        files: CertificateFiles,
        /// Why.
        source: CertificateError,
    },
}

impl ReadError {
    fn remedy(&self) -> &'static str {
        match self {
            Self::File { .. } => {
                "name a PEM file that is there, by its whole path or beside the document, and that the daemon may read"
            }
            Self::Certificate { source: CertificateError::Mismatch, .. } => {
                "name the key that the certificate was made with"
            }
            Self::Certificate { .. } => {
                "name PEM files: the certificate with those between it and its authority, and its private key"
            }
        }
    }
}

/// Reads a certificate and looks whether it can be used.
///
/// # Errors
/// Why not.
pub fn read(files: &CertificateFiles) -> Result<Pem, ReadError> {
    let text = |path: &Path| {
        fs::read_to_string(path).map_err(|source| ReadError::File { path: path.to_owned(), source })
    };
    let pem = Pem { chain: text(&files.cert)?, key: Secret::new(text(&files.key)?) };
    match tls::certified(&pem) {
        Ok(_) => Ok(pem),
        Err(source) => Err(ReadError::Certificate { files: files.clone(), source }),
    }
}

/// Certificates of a document that cannot be used.
pub fn complaints(document: &Document) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (name, _, desk) in document.config.at_desk() {
        for (number, files) in desk.certificates.iter().enumerate() {
            if let Err(error) = read(files) {
                let place = document.places.certificate(name, number);
                complaints.push(place.error(error.to_string(), error.remedy()));
            }
        }
    }
    complaints
}

/// The certificates as they were when they could last be used, by their files.
#[derive(Debug, Default)]
pub struct Certificates {
    good: BTreeMap<(PathBuf, PathBuf), Pem>,
    /// Why files as they are now are not used.
    refused: Vec<String>,
}

impl Certificates {
    /// Reads the certificates of a document again. Where one cannot be used, the one from before stays.
    pub fn refresh(&mut self, config: &Config) {
        let mut good = BTreeMap::new();
        self.refused.clear();
        for files in config.at_desk().flat_map(|(_, _, desk)| &desk.certificates) {
            let key = (files.cert.clone(), files.key.clone());
            match read(files) {
                Ok(pem) => _ = good.insert(key, pem),
                Err(error) => {
                    self.refused.push(format!("a certificate is kept as it was: {error}"));
                    if let Some(before) = self.good.remove(&key) {
                        good.insert(key, before);
                    }
                }
            }
        }
        self.good = good;
    }

    /// Of these files.
    pub fn get(&self, files: &CertificateFiles) -> Option<&Pem> {
        self.good.get(&(files.cert.clone(), files.key.clone()))
    }

    /// What needs somebody's attention.
    pub fn alarms(&self) -> &[String] {
        &self.refused
    }
}

/// The files of certificates and keys that a document names.
pub fn files(config: &Config) -> impl Iterator<Item = &Path> {
    let pairs = config.at_desk().flat_map(|(_, _, desk)| &desk.certificates);
    pairs.flat_map(|files| [files.cert.as_path(), files.key.as_path()])
}
