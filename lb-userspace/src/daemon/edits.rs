//! Changes that the API asks for, made on the document's text.

use std::path::Path;

use super::document::revision;
use crate::{
    api::request::{Change, Edits, RequestError},
    config::edit::{self, EditError, NewHealth, NewPool, NewService},
    model::{Admin, BackendAddress},
};

/// The text of `file` with the changes, all of them.
///
/// # Errors
/// When the text is at another revision than the changes are for, or one of them cannot be made.
pub fn edited(file: &Path, text: &str, edits: &Edits) -> Result<String, RequestError> {
    expect_revision(text, edits.revision.as_deref())?;
    edits.changes.iter().try_fold(text.to_owned(), |text, change| made(file, &text, change))
}

/// Nothing, when the text is at that revision, or none is named.
///
/// # Errors
/// When it is at another.
pub fn expect_revision(text: &str, expected: Option<&str>) -> Result<(), RequestError> {
    let now = revision(text);
    match expected {
        Some(expected) if expected != now => Err(RequestError::Conflict(now)),
        _ => Ok(()),
    }
}

fn made(file: &Path, text: &str, change: &Change) -> Result<String, RequestError> {
    let after = match change.clone() {
        Change::AddService { name, listen, pool, scheduler, allow, deny } => {
            edit::add_service(text, &name, &NewService { listen, pool, scheduler, allow, deny })
        }
        Change::RemoveService { name } => edit::remove_service(text, &name),
        Change::AddPool { name, backends, tcp, http, interval } => {
            let health = (tcp || http.is_some()).then_some(NewHealth { http, interval });
            edit::add_pool(text, &name, &NewPool { backends, health })
        }
        Change::RemovePool { name } => edit::remove_pool(text, &name),
        Change::AddBackend { pool, address, weight } => {
            edit::add_backend(text, &pool, parsed(&address)?, weight)
        }
        Change::RemoveBackend { pool, address } => edit::remove_backend(text, &pool, parsed(&address)?),
        Change::DrainBackend { pool, address, deadline } => {
            edit::set_admin(text, &pool, parsed(&address)?, Admin::Drain { deadline })
        }
        Change::ResumeBackend { pool, address } => {
            edit::set_admin(text, &pool, parsed(&address)?, Admin::Enabled)
        }
        Change::WeighBackend { pool, address, weight } => {
            edit::set_weight(text, &pool, parsed(&address)?, weight)
        }
        Change::DisableBackend { pool, address } => {
            edit::set_admin(text, &pool, parsed(&address)?, Admin::Disabled)
        }
    };
    after.map_err(|error| match error {
        EditError::NotThere { .. } => RequestError::NotFound(error.to_string()),
        EditError::Refused(complaints) => RequestError::Document { file: file.to_owned(), complaints },
        EditError::AlreadyThere(_) | EditError::Form(_) | EditError::InUse { .. } => {
            RequestError::Failed(error.to_string())
        }
    })
}

fn parsed(address: &str) -> Result<BackendAddress, RequestError> {
    address.parse().map_err(|error| RequestError::Failed(format!("{address:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "lb.toml";
    const TEXT: &str = "interfaces = [\"eth0\"]\n[pools.web]\nbackends = [ { address = \"10.0.0.11:80\" } ] # ours\n[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n";

    fn add(address: &str, revision: Option<String>) -> Edits {
        let change = Change::AddBackend { pool: "web".into(), address: address.into(), weight: None };
        Edits { changes: vec![change], revision }
    }

    #[test]
    fn of_two_edits_on_one_revision_the_second_is_refused_and_none_is_lost() {
        let first = edited(FILE.as_ref(), TEXT, &add("10.0.0.12:80", Some(revision(TEXT)))).unwrap();
        let second = edited(FILE.as_ref(), &first, &add("10.0.0.13:80", Some(revision(TEXT))));
        assert_eq!(second, Err(RequestError::Conflict(revision(&first))));
        // Thought out anew, or without a revision, it is made on top of the first.
        for at in [Some(revision(&first)), None] {
            let both = edited(FILE.as_ref(), &first, &add("10.0.0.13:80", at)).unwrap();
            assert!(
                both.contains("10.0.0.12:80") && both.contains("10.0.0.13:80") && both.contains("# ours")
            );
        }
    }

    #[test]
    fn changes_are_made_all_or_none() {
        let mut edits = add("10.0.0.12:80", None);
        edits.changes.push(Change::RemovePool { name: "none".into() });
        assert!(matches!(edited(FILE.as_ref(), TEXT, &edits), Err(RequestError::NotFound(_))));
    }

    #[test]
    fn each_change_reaches_the_text() {
        let of = |pool: &str| (pool.to_owned(), "10.0.0.11:80".to_owned());
        let changed = |change: Change| {
            edited(FILE.as_ref(), TEXT, &Edits { changes: vec![change], revision: None }).unwrap()
        };
        let (pool, address) = of("web");
        let text = changed(Change::WeighBackend { pool, address, weight: 7 });
        assert!(text.contains("weight = 7"), "{text}");
        let (pool, address) = of("web");
        let text = changed(Change::DrainBackend { pool, address, deadline: Some(1_800_000_000) });
        assert!(text.contains("drain = 2027-01-15T08:00:00Z"), "{text}");
        let (pool, address) = of("web");
        let text = changed(Change::DisableBackend { pool, address });
        assert!(text.contains("disabled = true"), "{text}");
        let text = changed(Change::AddPool {
            name: "db".into(),
            backends: vec!["10.0.0.21:5432".into()],
            tcp: true,
            http: None,
            interval: Some("2s".into()),
        });
        assert!(text.contains("[pools.db]") && text.contains("tcp = true"), "{text}");
    }

    #[test]
    fn a_change_that_would_not_check_says_why() {
        let change = Change::AddService {
            name: "other".into(),
            listen: "203.0.113.10:80/tcp".into(),
            pool: "web".into(),
            scheduler: None,
            allow: vec![],
            deny: vec![],
        };
        let refused =
            edited(FILE.as_ref(), TEXT, &Edits { changes: vec![change], revision: None }).unwrap_err();
        assert!(
            matches!(refused, RequestError::Document { .. }) && refused.to_string().contains("shop"),
            "{refused}"
        );
    }
}
