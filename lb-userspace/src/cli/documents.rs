//! `lb check`, `lb plan` and `lb apply`.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::{Failure, answer_or_json, client::Client, client::ClientError, show};
use crate::{
    api::view::{Done, Foreseen, Replacement},
    config::{Complaint, Document},
    model::desk::DESK_POOL,
};

/// Checks a document without looking at this host.
pub(super) fn check(file: &Path, as_json: bool) -> Result<(), Failure> {
    let text = read(file)?;
    let (complaints, document) = match Document::parse(&text) {
        Ok(document) => (document.warnings.clone(), Some(document)),
        Err(complaints) => (complaints.0, None),
    };
    if as_json {
        answer_or_json(true, &complaints, String::new)?;
    } else {
        for complaint in &complaints {
            eprintln!("{}:{complaint}", file.display());
        }
    }
    match document {
        Some(document) if !as_json => {
            let config = &document.config;
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
        None => Err(Failure::Document(mistakes(file, &complaints))),
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
    answer_or_json(as_json, &foreseen, || show::foreseen(&foreseen))
}

/// Sends a document that has no mistakes.
async fn send<T: DeserializeOwned>(
    file: &Path,
    client: &Client,
    method: hyper::Method,
    path: &str,
) -> Result<T, Failure> {
    let text = read(file)?;
    // Said here with the name of this file, rather than by the daemon with that of its own.
    if let Err(complaints) = Document::parse(&text) {
        for complaint in &complaints.0 {
            eprintln!("{}:{complaint}", file.display());
        }
        return Err(Failure::Document(mistakes(file, &complaints.0)));
    }
    let body = Replacement { text, revision: None };
    match client.send(method, path, &body).await {
        Err(ClientError::Document(why)) => Err(Failure::Document(why)),
        other => Ok(other?),
    }
}

/// The text of a document.
pub(super) fn read(file: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(file)
        .map_err(|error| Failure::Document(format!("cannot read {}: {error}", file.display())))
}

fn mistakes(file: &Path, complaints: &[Complaint]) -> String {
    let errors = complaints.iter().filter(|c| c.severity == crate::config::Severity::Error).count();
    format!("{} has {}", file.display(), count(errors, "mistake"))
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
