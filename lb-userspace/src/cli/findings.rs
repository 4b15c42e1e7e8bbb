//! `lb doctor`.

use std::path::{Path, PathBuf};

use super::{
    Failure, answer_or_json,
    client::{Client, ClientError},
    documents,
    table::{Tone, colours, paint},
};
use crate::{
    api::view::{Status, Text},
    daemon::document::DocumentFile,
    doctor::{self, Facts, Finding, Verdict},
};

/// Examines this host for a document: the named one, else the running daemon's, else none.
pub(super) async fn doctor(
    config: Option<&Path>,
    bpffs: &Path,
    client: &Client,
    as_json: bool,
) -> Result<(), Failure> {
    let status = client.get::<Status>("/v1/status").await;
    let left = match &status {
        Err(ClientError::NotRunning { .. }) => client.left(bpffs),
        _ => None,
    };
    let (path, text, alarms) = match (config, status) {
        (Some(file), _) => (file.to_owned(), Some(documents::read(file)?), Vec::new()),
        (None, Ok(status)) => {
            let document: Text = client.get("/v1/document").await?;
            (status.document.path.into(), Some(document.text), status.alarms)
        }
        (None, Err(ClientError::NotRunning { .. })) => (PathBuf::new(), None, Vec::new()),
        (None, Err(error)) => return Err(error.into()),
    };
    let document = text.map(|text| DocumentFile::new(&path).parse(&text)).transpose();
    let document = document.map_err(|complaints| Failure::Mistakes(path, complaints.0))?;
    let facts = Facts::gather(document, bpffs).await.map_err(anyhow::Error::from)?;
    let facts = Facts { alarms, left, ..facts };
    let findings = doctor::examine(&facts);
    answer_or_json(as_json, &findings, || words(&findings))?;
    if findings.iter().any(|finding| finding.verdict == Verdict::Problem) {
        Err(Failure::Silent)
    } else {
        Ok(())
    }
}

fn words(findings: &[Finding]) -> String {
    let colours = colours();
    let mut text = String::new();
    for finding in findings {
        let (mark, tone) = match finding.verdict {
            Verdict::Good => ("ok      ", Tone::Good),
            Verdict::Note => ("note    ", Tone::Faint),
            Verdict::Warning => ("warning ", Tone::Odd),
            Verdict::Problem => ("PROBLEM ", Tone::Bad),
        };
        text.push_str(&format!("{} {}: {}\n", paint(mark, tone, colours), finding.subject, finding.message));
        if !finding.remedy.is_empty() {
            text.push_str(&format!("           → {}\n", finding.remedy));
        }
    }
    let problems = findings.iter().filter(|finding| finding.verdict == Verdict::Problem).count();
    text.push_str(&match problems {
        0 => "nothing hinders Lobby here\n".to_owned(),
        1 => "1 problem\n".to_owned(),
        n => format!("{n} problems\n"),
    });
    text
}
