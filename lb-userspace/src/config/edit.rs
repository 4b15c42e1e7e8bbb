//! Edits of a document's text: one change each, comments and order kept.
//!
//! Every edit takes the text and gives a new one, which parses and checks; where the result would not,
//! the edit is refused and says why, and the text stays as it was.

mod backends;

pub(crate) use self::backends::datetime;

use toml_edit::{DocumentMut, Item, Table, TableLike, Value, value};

use super::{Complaints, Document, read::suggest};
use crate::model::{Admin, BackendAddress};

/// A service to be added, as the document writes it.
#[derive(Clone, Debug, Default)]
pub struct NewService {
    /// Where it listens: `203.0.113.10:80/tcp`.
    pub listen: String,
    /// Its pool.
    pub pool: String,
    /// `maglev`, `round-robin` or `source`; `None`: not written.
    pub scheduler: Option<String>,
    /// Networks that may come in.
    pub allow: Vec<String>,
    /// Networks that may not.
    pub deny: Vec<String>,
}

/// A pool to be added, as the document writes it.
#[derive(Clone, Debug, Default)]
pub struct NewPool {
    /// Addresses of its backends.
    pub backends: Vec<String>,
    /// How its health is found out; `None`: not at all.
    pub health: Option<NewHealth>,
}

/// A health check to be added, as the document writes it.
#[derive(Clone, Debug, Default)]
pub struct NewHealth {
    /// Path of an HTTP check; `None`: a TCP check.
    pub http: Option<String>,
    /// From one probe to the next: `2s`; `None`: not written.
    pub interval: Option<String>,
}

/// Why an edit was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// What is to be changed is not there.
    #[error("there is no {what}; {hint}")]
    NotThere {
        /// What it is called.
        what: String,
        /// What there is instead.
        hint: String,
    },
    /// What is to be added is there already.
    #[error("there is a {0} already")]
    AlreadyThere(String),
    /// The part of the document is written in a form that edits cannot handle.
    #[error("{0} is written in a way that cannot be edited; change it by hand")]
    Form(String),
    /// What would be removed is needed.
    #[error("{what} is used by {by}; change that first")]
    InUse {
        /// What would be removed.
        what: String,
        /// What needs it.
        by: String,
    },
    /// The document would not check any more, or did not before.
    #[error("the document would not be right, so it stays as it was:\n{0}")]
    Refused(Complaints),
}

/// Adds a service.
///
/// # Errors
/// When there is one of that name, or the document would not check.
pub fn add_service(text: &str, name: &str, service: &NewService) -> Result<String, EditError> {
    edit(text, |document| {
        let services = section(document, "services")?;
        if services.contains_key(name) {
            return Err(EditError::AlreadyThere(format!("service \"{name}\"")));
        }
        let mut table = Table::new();
        table.insert("listen", value(&service.listen));
        table.insert("pool", value(&service.pool));
        if let Some(scheduler) = &service.scheduler {
            table.insert("scheduler", value(scheduler));
        }
        for (key, networks) in [("allow", &service.allow), ("deny", &service.deny)] {
            if !networks.is_empty() {
                table.insert(key, value(networks.iter().collect::<toml_edit::Array>()));
            }
        }
        insert(services, name, table);
        Ok(())
    })
}

/// Removes a service.
///
/// # Errors
/// When there is none of that name.
pub fn remove_service(text: &str, name: &str) -> Result<String, EditError> {
    edit(text, |document| {
        let services = section(document, "services")?;
        services.remove(name).map(drop).ok_or_else(|| not_there("service", name, services))
    })
}

/// Leads a service to another pool.
///
/// # Errors
/// When there is no such service, or the document would not check.
pub fn set_service_pool(text: &str, name: &str, pool: &str) -> Result<String, EditError> {
    edit(text, |document| {
        let service = the(document, "services", "service", name)?;
        set(service, "pool", pool.into());
        Ok(())
    })
}

/// Adds a pool.
///
/// # Errors
/// When there is one of that name, or the document would not check.
pub fn add_pool(text: &str, name: &str, pool: &NewPool) -> Result<String, EditError> {
    edit(text, |document| {
        let pools = section(document, "pools")?;
        if pools.contains_key(name) {
            return Err(EditError::AlreadyThere(format!("pool \"{name}\"")));
        }
        let mut table = Table::new();
        if let Some(health) = &pool.health {
            let mut check = toml_edit::InlineTable::new();
            match &health.http {
                Some(path) => check.insert("http", path.into()),
                None => check.insert("tcp", true.into()),
            };
            if let Some(interval) = &health.interval {
                check.insert("interval", interval.into());
            }
            table.insert("health", value(check));
        }
        table.insert("backends", value(backends::list(&pool.backends)));
        insert(pools, name, table);
        Ok(())
    })
}

/// Removes a pool that no service uses.
///
/// # Errors
/// When there is none of that name, or a service uses it.
pub fn remove_pool(text: &str, name: &str) -> Result<String, EditError> {
    let before = Document::parse(text).map_err(EditError::Refused)?;
    if let Some((service, _)) = before.config.services.iter().find(|(_, service)| service.pool == name) {
        return Err(EditError::InUse {
            what: format!("pool \"{name}\""),
            by: format!("service \"{service}\""),
        });
    }
    edit(text, |document| {
        let pools = section(document, "pools")?;
        pools.remove(name).map(drop).ok_or_else(|| not_there("pool", name, pools))
    })
}

/// Adds a backend to a pool, behind the others. A weight of `None` is not written and counts as 1.
///
/// # Errors
/// When there is no such pool, the backend is there already, or the document would not check.
pub fn add_backend(
    text: &str,
    pool: &str,
    address: BackendAddress,
    weight: Option<u16>,
) -> Result<String, EditError> {
    edit(text, |document| backends::add(the_pool(document, pool)?, pool, address, weight))
}

/// Removes a backend. Its connections are reset.
///
/// # Errors
/// When it is not there.
pub fn remove_backend(text: &str, pool: &str, address: BackendAddress) -> Result<String, EditError> {
    edit(text, |document| backends::remove(the_pool(document, pool)?, pool, address))
}

/// Changes what the operator wants of a backend: use it, drain it, take it out.
///
/// # Errors
/// When it is not there.
pub fn set_admin(text: &str, pool: &str, address: BackendAddress, admin: Admin) -> Result<String, EditError> {
    edit(text, |document| {
        backends::change(the_pool(document, pool)?, pool, address, |backend| {
            backend.remove("drain");
            backend.remove("disabled");
            match admin {
                Admin::Enabled => {}
                Admin::Drain { deadline: None } => set(backend, "drain", true.into()),
                Admin::Drain { deadline: Some(deadline) } => {
                    set(backend, "drain", datetime(deadline).into());
                }
                Admin::Disabled => set(backend, "disabled", true.into()),
            }
        })
    })
}

/// Changes a backend's weight.
///
/// # Errors
/// When it is not there, or the document would not check.
pub fn set_weight(text: &str, pool: &str, address: BackendAddress, weight: u16) -> Result<String, EditError> {
    edit(text, |document| {
        backends::change(the_pool(document, pool)?, pool, address, |backend| {
            set(backend, "weight", i64::from(weight).into());
        })
    })
}

/// Does it, and makes sure of the result.
fn edit(
    text: &str,
    change: impl FnOnce(&mut DocumentMut) -> Result<(), EditError>,
) -> Result<String, EditError> {
    Document::parse(text).map_err(EditError::Refused)?;
    let mut document: DocumentMut = text.parse().map_err(|_| EditError::Form("the document".to_owned()))?;
    change(&mut document)?;
    let after = document.to_string();
    Document::parse(&after).map_err(EditError::Refused)?;
    Ok(after)
}

/// `[services]` or `[pools]`, made where it is missing.
fn section<'d>(document: &'d mut DocumentMut, name: &str) -> Result<&'d mut dyn TableLike, EditError> {
    let section = document.entry(name).or_insert_with(|| {
        let mut table = Table::new();
        // Only [services.NAME] is written, not the bare [services].
        table.set_implicit(true);
        Item::Table(table)
    });
    section.as_table_like_mut().ok_or_else(|| EditError::Form(name.to_owned()))
}

fn the_pool<'d>(document: &'d mut DocumentMut, name: &str) -> Result<&'d mut dyn TableLike, EditError> {
    the(document, "pools", "pool", name)
}

/// The table of this name in a section.
fn the<'d>(
    document: &'d mut DocumentMut,
    within: &str,
    kind: &str,
    name: &str,
) -> Result<&'d mut dyn TableLike, EditError> {
    let section = section(document, within)?;
    if section.get(name).is_none() {
        return Err(not_there(kind, name, section));
    }
    let found = section.get_mut(name).and_then(Item::as_table_like_mut);
    found.ok_or_else(|| EditError::Form(format!("{kind} \"{name}\"")))
}

/// Something that a section does not have; what it has instead is named.
fn not_there(kind: &str, name: &str, section: &dyn TableLike) -> EditError {
    let names: Vec<&str> = section.iter().map(|(name, _)| name).collect();
    let hint =
        if names.is_empty() { format!("there are no {kind}s") } else { suggest(name, names.into_iter()) };
    EditError::NotThere { what: format!("{kind} \"{name}\""), hint }
}

/// As a table of its own, `[services.NAME]`, unless its section is an inline table.
fn insert(section: &mut dyn TableLike, name: &str, mut table: Table) {
    table.decor_mut().set_prefix("\n");
    section.insert(name, Item::Table(table));
}

/// Sets a key, keeping the spaces and comments around the value that was there.
fn set(table: &mut dyn TableLike, key: &str, mut new: Value) {
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            *new.decor_mut() = old.decor().clone();
            *old = new;
        }
        None => {
            table.insert(key, Item::Value(new));
        }
    }
}

#[cfg(test)]
mod tests;
