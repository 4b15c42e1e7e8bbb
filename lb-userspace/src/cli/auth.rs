//! `lb auth`: lines for the files that say who is known to the desk.

use std::io::{IsTerminal, Read};

use super::{Failure, args::Auth, print};
use crate::proxy::auth::{basic, key};

/// Prints a line; the secret comes on standard input and is seen nowhere.
pub(super) fn run(command: &Auth) -> Result<(), Failure> {
    let Auth::Hash { name, key: is_key, role } = command;
    if name.is_empty()
        || name.contains([':', '\n'])
        || role.iter().any(|role| role.contains([':', ',', '\n']))
    {
        return Err(Failure::Document("a name has no colon in it, a role neither that nor a comma".into()));
    }
    if std::io::stdin().is_terminal() {
        let how =
            "the secret is read from standard input, so that it is not seen: lb auth hash anna < password";
        return Err(Failure::Document(how.into()));
    }
    let mut secret = String::new();
    std::io::stdin().read_to_string(&mut secret).map_err(anyhow::Error::from)?;
    let secret = secret.trim_end_matches(['\r', '\n']);
    if secret.is_empty() || secret.contains(char::is_control) {
        return Err(Failure::Document("standard input has no secret of one line".into()));
    }
    let hash = if *is_key {
        if secret.len() < key::SHORTEST {
            let how = "a key that short could be found from its hash; make one of 20 characters or more by chance: openssl rand -hex 20";
            return Err(Failure::Document(how.into()));
        }
        key::hash(secret)
    } else {
        basic::hash(secret).map_err(|error| anyhow::anyhow!("cannot hash it: {error}"))?
    };
    let roles = if role.is_empty() { String::new() } else { format!(":{}", role.join(",")) };
    print(&format!("{name}:{hash}{roles}\n"))
}
