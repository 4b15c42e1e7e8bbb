//! Files that say who is known: a line for each, `name:hash` or `name:hash:role,role`; lines that are empty or
//! begin with `#` say nothing.

use std::collections::BTreeSet;

/// Somebody who is known.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Entry<'t> {
    pub(super) name: &'t str,
    pub(super) hash: &'t str,
    pub(super) roles: BTreeSet<String>,
}

/// A file is not as it should be. No text of the file is said, since it may be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", if *.line == 0 { String::new() } else { format!("line {line}: ") })]
pub struct EntryError {
    /// Which line, from 1; 0: none in particular.
    pub line: usize,
    /// What is wrong.
    pub problem: &'static str,
}

/// All entries, each with its line's number.
pub(super) fn entries(text: &str) -> Result<Vec<(usize, Entry<'_>)>, EntryError> {
    let mut found = Vec::new();
    let mut names = BTreeSet::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |problem| EntryError { line: number + 1, problem };
        let mut parts = line.splitn(3, ':').map(str::trim);
        let (name, hash) = parts.next().zip(parts.next()).ok_or(wrong("there is no colon behind a name"))?;
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(wrong("there is no name"));
        }
        if !names.insert(name) {
            return Err(wrong("the name is there before"));
        }
        let roles = parts.next().unwrap_or_default().split(',').map(str::trim);
        let roles = roles.filter(|role| !role.is_empty()).map(str::to_owned).collect();
        found.push((number + 1, Entry { name, hash, roles }));
    }
    if found.is_empty() { Err(EntryError { line: 0, problem: "nobody is in it" }) } else { Ok(found) }
}
