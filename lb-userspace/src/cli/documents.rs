//! `lb check`, `lb plan` and `lb apply`.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::{Failure, answer_or_json, client::Client, client::ClientError, show};
use crate::{
    api::view::{Done, Foreseen, Replacement},
    config::{Complaint, Complaints, Document, Severity},
    daemon::{checks, document::DocumentFile},
    model::desk::DESK_POOL,
};

/// Checks a document and, `with_files`, what is in those that it names, without looking at this host otherwise.
pub(super) fn check(file: &Path, with_files: bool, as_json: bool) -> Result<(), Failure> {
    let (complaints, config) = match DocumentFile::new(file).parse(&read(file)?) {
        Ok(document) => {
            let of_files = if with_files { checks::of_files(&document, checks::epoch()) } else { Vec::new() };
            let mut complaints: Vec<_> = document.warnings.into_iter().chain(of_files).collect();
            complaints.sort();
            complaints.dedup();
            let is_right = complaints.iter().all(|complaint| complaint.severity == Severity::Warning);
            if is_right {
                (complaints, Some(document.config))
            } else {
                (Complaints::errors_of(complaints).0, None)
            }
        }
        Err(complaints) => (complaints.0, None),
    };
    if as_json {
        answer_or_json(true, &complaints, String::new)?;
    }
    match config {
        Some(config) if !as_json => {
            tell(file, &complaints);
            // Those that are written down: a service of the desk has one more, the desk itself.
            let pools: Vec<_> = config.pools.iter().filter(|(name, _)| *name != DESK_POOL).collect();
            let backends: usize = pools.iter().map(|(_, pool)| pool.backends.len()).sum();
            let words = format!(
                "{} is right: {}, {}, {}\n",
                file.display(),
                count(config.services.len(), "service"),
                count(pools.len(), "pool"),
                count(backends, "backend")
            );
            super::print(&words)
        }
        Some(_) => Ok(()),
        None => Err(Failure::Mistakes(file.to_owned(), complaints)),
    }
}

/// Makes a file's contents the document in force.
pub(super) async fn apply(file: &Path, client: &Client, as_json: bool) -> Result<(), Failure> {
    let done: Done = send(file, client, hyper::Method::PUT, "/v1/document").await?;
    answer_or_json(as_json, &done, || {
        let warnings: String = done.warnings.iter().map(|warning| format!("{warning}\n")).collect();
        format!("{warnings}{}\n", done.message)
    })
}

/// Says what a file's contents would change.
pub(super) async fn plan(file: &Path, client: &Client, as_json: bool) -> Result<(), Failure> {
    let foreseen: Foreseen = send(file, client, hyper::Method::POST, "/v1/plans").await?;
    if !as_json {
        tell(file, &foreseen.warnings);
    }
    answer_or_json(as_json, &foreseen, || show::foreseen(&foreseen))
}

/// Sends a document.
async fn send<T: DeserializeOwned>(
    file: &Path,
    client: &Client,
    method: hyper::Method,
    path: &str,
) -> Result<T, Failure> {
    let text = read(file)?;
    // Mistakes are said whether a daemon runs or not.
    Document::parse(&text).map_err(|complaints| Failure::Mistakes(file.to_owned(), complaints.0))?;
    let body = Replacement { text, revision: None };
    client.send(method, path, &body).await.map_err(|error| match error {
        // Said with the name of this file, rather than that of the daemon's own.
        ClientError::Document { complaints, .. } if !complaints.is_empty() => {
            Failure::Mistakes(file.to_owned(), complaints)
        }
        other => other.into(),
    })
}

/// The text of a document; `-` is standard input.
pub(super) fn read(file: &Path) -> Result<String, Failure> {
    let text = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(file)
    };
    text.map_err(|error| Failure::Document(format!("cannot read {}: {error}", file.display())))
}

/// Says what is wrong or odd about a document, each with the name of its file, on standard error.
pub(super) fn tell(file: &Path, complaints: &[Complaint]) {
    for complaint in complaints {
        eprintln!("{}", complaint.of_file(file.display()));
    }
}

/// How many there are, in words.
pub(super) fn mistakes(file: &Path, complaints: &[Complaint]) -> String {
    let errors = complaints.iter().filter(|c| c.severity == Severity::Error).count();
    format!("{} has {}", file.display(), count(errors, "mistake"))
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
