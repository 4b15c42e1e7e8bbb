//! Certificates of the desk's services: read here, since the desk may not, and looked at before they are
//! handed on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use rustls::{pki_types::ServerName, sign::CertifiedKey};

use super::validity::Validity;
use crate::{
    api::view,
    config::{Complaint, Document},
    model::{
        Config, Service,
        desk::{CertificateFiles, Desk, HostPattern},
    },
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

/// How to mend one that clients do not take, or soon will not.
const RENEW: &str = "put a new one into its file, with its key; it is shown from then on, without a reload";

/// What is in the files of a certificate.
struct Found {
    pem: Pem,
    certified: CertifiedKey,
    validity: Option<Validity>,
}

/// Reads a certificate and looks whether it can be used.
fn read(files: &CertificateFiles) -> Result<Found, ReadError> {
    let text = |path: &Path| {
        fs::read_to_string(path).map_err(|source| ReadError::File { path: path.to_owned(), source })
    };
    let pem = Pem { chain: text(&files.cert)?, key: Secret::new(text(&files.key)?) };
    match tls::certified(&pem) {
        Ok(certified) => {
            let validity = tls::validity(&certified).map(|(from, until)| Validity { from, until });
            Ok(Found { pem, certified, validity })
        }
        Err(source) => Err(ReadError::Certificate { files: files.clone(), source }),
    }
}

/// Certificates of a document that cannot be used, and those that clients will not take now or soon.
pub fn complaints(document: &Document, now: u64) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (name, _, desk) in document.config.at_desk() {
        let mut shown = Vec::new();
        for (number, files) in desk.certificates.iter().enumerate() {
            let place = document.places.certificate(name, number);
            match read(files) {
                Ok(found) => {
                    let trouble = found.validity.and_then(|validity| validity.trouble(now));
                    let warning =
                        |trouble| place.warning(format!("{} {trouble}", files.cert.display()), RENEW);
                    complaints.extend(trouble.map(warning));
                    shown.push(found.certified);
                }
                Err(error) => complaints.push(place.error(error.to_string(), error.remedy())),
            }
        }
        // Of one that cannot be read nobody knows whom it is for.
        if !shown.is_empty() && shown.len() == desk.certificates.len() {
            complaints.extend(uncovered(name, desk, &shown, document));
        }
    }
    complaints
}

/// Hosts that routes of a service name and none of its certificates is for.
fn uncovered(service: &str, desk: &Desk, shown: &[CertifiedKey], document: &Document) -> Vec<Complaint> {
    let mut said = BTreeSet::new();
    let mut complaints = Vec::new();
    for (number, route) in desk.routes.iter().enumerate() {
        let HostPattern::Exact(host) = &route.condition.host else { continue };
        let Ok(name) = ServerName::try_from(host.as_str()) else { continue };
        if !shown.iter().any(|certified| tls::is_for(certified, &name)) && said.insert(host) {
            complaints.push(document.places.host_of_route(service, number).warning(
                format!("no certificate of service {service} is for {host}: its clients refuse what they are shown"),
                "name one in the service's tls that is; a wildcard one (*.shop.example) is for names of one more label",
            ));
        }
    }
    complaints
}

/// The certificates as they were when they could last be used, by their files.
#[derive(Debug, Default)]
pub struct Certificates {
    good: BTreeMap<(PathBuf, PathBuf), (Pem, Option<Validity>)>,
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
                Ok(found) => _ = good.insert(key, (found.pem, found.validity)),
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
        self.of(files).map(|(pem, _)| pem)
    }

    fn of(&self, files: &CertificateFiles) -> Option<&(Pem, Option<Validity>)> {
        self.good.get(&(files.cert.clone(), files.key.clone()))
    }

    /// Whether there is anything whose time may come.
    pub fn is_empty(&self) -> bool {
        self.good.is_empty()
    }

    /// What needs somebody's attention now.
    pub fn alarms(&self, now: u64) -> Vec<String> {
        let trouble = |((cert, _), (_, validity)): (&(PathBuf, PathBuf), &(Pem, Option<Validity>))| {
            let trouble = validity.and_then(|validity| validity.trouble(now))?;
            Some(format!("the certificate {} {trouble}; {RENEW}", cert.display()))
        };
        self.refused.iter().cloned().chain(self.good.iter().filter_map(trouble)).collect()
    }

    /// Until when those of a document hold.
    pub fn shown(&self, config: &Config, now: u64) -> Vec<view::Certificate> {
        let of_service = |(service, _, desk): (&String, &Service, &Desk)| {
            let shown = |files: &CertificateFiles| {
                let validity = self.of(files)?.1?;
                Some(view::Certificate {
                    service: service.clone(),
                    cert: files.cert.display().to_string(),
                    not_after: validity.end(),
                    not_after_seconds: validity.until,
                    days_left: validity.days_left(now),
                })
            };
            desk.certificates.iter().filter_map(shown).collect::<Vec<_>>()
        };
        config.at_desk().flat_map(of_service).collect()
    }
}

/// The files of certificates and keys that a document names.
pub fn files(config: &Config) -> impl Iterator<Item = &Path> {
    let pairs = config.at_desk().flat_map(|(_, _, desk)| &desk.certificates);
    pairs.flat_map(|files| [files.cert.as_path(), files.key.as_path()])
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;
    use crate::{config::Severity, daemon::document::DocumentFile};

    const DAY: u64 = 24 * 3600;

    /// 2026-12-01T00:00:00Z.
    const END: u64 = 1_796_083_200;

    /// Writes a certificate for names that holds for November 2026.
    fn write(directory: &Path, name: &str, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2026, 11, 1), date_time_ymd(2026, 12, 1));
        let key = KeyPair::generate().unwrap();
        fs::write(directory.join(format!("{name}.pem")), params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(directory.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn document(directory: &Path) -> Document {
        let text = r#"interfaces = ["eth0"]
[services.shop]
listen = "10.0.0.10:443/tcp"
tls = [
  { cert = "shop.pem", key = "shop.key" },
  { cert = "all.pem", key = "all.key" },
]
routes = [
  { host = "*.anything.example", respond = 200 },
  { host = "shop.example", respond = 200 },
  { host = "a.all.example", respond = 200 },
  { host = "b.a.all.example", respond = 200 },
  { host = "b.a.all.example", path = "/b", respond = 200 },
]
"#;
        DocumentFile::new(&directory.join("lb.toml")).parse(text).unwrap()
    }

    #[test]
    fn what_clients_will_not_take_is_a_warning_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "shop", &["shop.example"]);
        write(directory.path(), "all", &["*.all.example"]);
        let document = document(directory.path());
        let found = |now| -> Vec<(usize, String)> {
            let found = complaints(&document, now);
            assert!(found.iter().all(|it| it.severity == Severity::Warning && !it.remedy.is_empty()));
            let mut found: Vec<_> = found.into_iter().map(|it| (it.line, it.message)).collect();
            found.sort();
            found
        };
        // A wildcard is for one label; a host that two routes name is one.
        let quiet = found(END - 20 * DAY);
        assert_eq!(quiet.len(), 1, "{quiet:?}");
        assert!(quiet[0].0 == 12 && quiet[0].1.contains("is for b.a.all.example"), "{quiet:?}");
        for (now, words) in [
            (END - 40 * DAY, "shop.pem is not valid before 2026-11-01T00:00:00Z"),
            (END - 13 * DAY, "shop.pem runs out on 2026-12-01T00:00:00Z"),
            (END + 1, "shop.pem has expired, on 2026-12-01T00:00:00Z"),
        ] {
            let found = found(now);
            assert_eq!(found.iter().map(|it| it.0).collect::<Vec<_>>(), [5, 6, 12], "{found:?}");
            assert!(found[0].1.contains(words), "{found:?}");
        }
        // With one that nobody can read, it would be idle to say whom they are for.
        fs::remove_file(directory.path().join("all.pem")).unwrap();
        let broken = complaints(&document, END - 20 * DAY);
        assert!(matches!(&broken[..], [it] if it.severity == Severity::Error && it.line == 6), "{broken:?}");
    }

    #[test]
    fn alarms_and_what_is_shown_go_with_the_time() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "shop", &["shop.example"]);
        write(directory.path(), "all", &["*.all.example"]);
        let config = document(directory.path()).config;
        let mut certificates = Certificates::default();
        certificates.refresh(&config);
        assert_eq!(certificates.alarms(END - 20 * DAY), [""; 0]);
        let alarms = certificates.alarms(END - 13 * DAY);
        assert!(alarms.len() == 2 && alarms[1].contains("shop.pem runs out on 2026-12-01"), "{alarms:?}");
        // The words stay as they are until there is something new to say.
        assert_eq!(alarms, certificates.alarms(END));
        assert!(certificates.alarms(END + 1)[1].contains("shop.pem has expired"));
        let shown = certificates.shown(&config, END - 13 * DAY);
        let ends: Vec<_> = shown
            .iter()
            .map(|it| (&*it.service, &*it.not_after, it.not_after_seconds, it.days_left))
            .collect();
        assert_eq!(ends, [("shop", "2026-12-01T00:00:00Z", END, 13); 2]);
        assert!(shown[0].cert.ends_with("/shop.pem"), "{shown:?}");
    }
}
