//! Name and password (RFC 7617). Passwords are kept as hashes that are slow to make, argon2 (PHC strings) or
//! bcrypt (`htpasswd -B`); a password that was right is remembered for a while, by a hash with a key that is
//! nowhere but in memory.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::HeaderValue;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::{
    Identity,
    entries::{EntryError, entries},
};

/// How long a password that was right is not hashed again.
const REMEMBERED: Duration = Duration::from_secs(300);

/// How many are remembered at most.
const REMEMBERED_MOST: usize = 4096;

/// How many passwords are hashed at a time: each takes a CPU, and argon2 some memory.
const AT_A_TIME: usize = 2;

/// How many wait for that at most.
const WAITING_MOST: usize = 64;

/// Longest pair of name and password, in base64.
const LONGEST: usize = 1024;

/// More memory for one password would let few strangers take all of it, KiB.
const MOST_MEMORY: u32 = 256 << 10;

/// Most rounds of argon2, and the greatest cost of bcrypt: beyond these one password takes seconds.
const MOST_ROUNDS: u32 = 32;
const MOST_COST: u32 = 15;

/// Who may come in with a password.
#[derive(Clone)]
pub struct Users(HashMap<String, (Arc<str>, Identity)>);

impl Users {
    /// Reads a file.
    ///
    /// # Errors
    /// What of it cannot be used.
    pub fn parse(text: &str) -> Result<Self, EntryError> {
        let mut users = HashMap::new();
        for (line, entry) in entries(text)? {
            check(entry.hash).map_err(|problem| EntryError { line, problem })?;
            let identity = Identity::known(entry.name, entry.roles);
            users.insert(entry.name.to_owned(), (entry.hash.into(), identity));
        }
        Ok(Self(users))
    }

    /// Whose name and password these are.
    pub(super) async fn find(&self, told: &Told, memory: &Memory) -> Result<Option<Identity>, Busy> {
        // Somebody who is unknown takes as long as one who is known: names cannot be found out.
        let known = self.0.get(&told.name);
        let Some((hash, _)) = known.or_else(|| self.0.values().next()) else { return Ok(None) };
        let right = memory.is_right(told, hash).await?;
        Ok(known.filter(|_| right).map(|(_, identity)| identity.clone()))
    }
}

/// Whether a hash is one that passwords can be compared with.
fn check(hash: &str) -> Result<(), &'static str> {
    if hash.starts_with("$2") {
        let parts: bcrypt::HashParts = hash.parse().map_err(|_| "the hash is not as bcrypt writes it")?;
        if parts.get_cost() > MOST_COST {
            return Err("the hash has a cost above 15: one password would take seconds");
        }
        return Ok(());
    }
    if !hash.starts_with("$argon2") {
        return Err(
            "the password is hashed in no way that is known here; make it with `lb auth hash` or `htpasswd -B`",
        );
    }
    let parsed = PasswordHash::new(hash).map_err(|_| "the hash is not as argon2 writes it")?;
    if parsed.salt.is_none() || parsed.hash.is_none() {
        return Err("the hash has no salt, or is none");
    }
    let parameters =
        argon2::Params::try_from(&parsed).map_err(|_| "the hash's parameters are not argon2's")?;
    if parameters.m_cost() > MOST_MEMORY || parameters.t_cost() > MOST_ROUNDS {
        return Err("the hash takes more than 256 MiB or 32 rounds for one password");
    }
    Ok(())
}

/// Whether a password has this hash. Takes a CPU for some tens of milliseconds.
fn matches(password: &[u8], hash: &str) -> bool {
    if hash.starts_with("$2") {
        return bcrypt::verify(password, hash).unwrap_or(false);
    }
    PasswordHash::new(hash).is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
}

/// A hash of a password, by argon2id.
///
/// # Errors
/// When there is no memory or no randomness for it.
pub fn hash(password: &str) -> Result<String, argon2::password_hash::Error> {
    Ok(Argon2::default().hash_password(password.as_bytes())?.to_string())
}

/// What a client says.
#[derive(Clone)]
pub(super) struct Told {
    name: String,
    password: Vec<u8>,
}

impl Told {
    /// Of what is behind `Basic` in the header; `None`: it cannot be understood.
    pub(super) fn of(credentials: &HeaderValue) -> Option<Self> {
        let text = super::scheme(credentials, "basic")?;
        let decoded = STANDARD.decode(text).ok().filter(|_| text.len() <= LONGEST)?;
        let colon = decoded.iter().position(|&byte| byte == b':')?;
        let name = String::from_utf8(decoded[..colon].to_vec()).ok()?;
        Some(Self { name, password: decoded[colon + 1..].to_vec() })
    }
}

/// Too many passwords wait to be hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy;

/// Passwords that were right a short while ago, and how many are being hashed now.
pub struct Memory {
    key: [u8; 32],
    right: Mutex<HashMap<[u8; 32], Instant>>,
    places: Semaphore,
    waiting: AtomicUsize,
}

impl Memory {
    /// With a key of its own.
    pub(super) fn new(key: [u8; 32]) -> Self {
        let (right, waiting) = Default::default();
        Self { key, right, places: Semaphore::new(AT_A_TIME), waiting }
    }

    /// What stands for a password and the hash that it was compared with: when that changes, it is another.
    fn mark(&self, told: &Told, hash: &str) -> [u8; 32] {
        let mut digest = Sha256::new_with_prefix(self.key);
        digest.update(Sha256::digest(hash));
        digest.update(Sha256::digest(&told.password));
        digest.finalize().into()
    }

    fn right(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 32], Instant>> {
        self.right.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn is_right(&self, told: &Told, hash: &Arc<str>) -> Result<bool, Busy> {
        let mark = self.mark(told, hash);
        if self.right().get(&mark).is_some_and(|since| since.elapsed() < REMEMBERED) {
            return Ok(true);
        }
        let waits = Waiting::new(&self.waiting).ok_or(Busy)?;
        let place = self.places.acquire().await.map_err(|_| Busy)?;
        let (password, hash) = (told.password.clone(), Arc::clone(hash));
        let right = tokio::task::spawn_blocking(move || matches(&password, &hash)).await.unwrap_or(false);
        drop((place, waits));
        if right {
            let mut known = self.right();
            if known.len() >= REMEMBERED_MOST {
                known.retain(|_, since| since.elapsed() < REMEMBERED);
            }
            if known.len() >= REMEMBERED_MOST {
                known.clear();
            }
            known.insert(mark, Instant::now());
        }
        Ok(right)
    }
}

/// A place among those that wait, until dropped.
struct Waiting<'m>(&'m AtomicUsize);

impl<'m> Waiting<'m> {
    fn new(waiting: &'m AtomicUsize) -> Option<Self> {
        let free = |count: usize| (count < WAITING_MOST).then_some(count + 1);
        waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok().map(|_| Self(waiting))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Option<Told> {
        Told::of(&HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(text))).unwrap())
    }

    #[tokio::test]
    async fn a_password_is_compared_with_either_kind_of_hash() {
        let text = format!(
            "# staff\nanna:{}:admin, staff\n\nbert:{}\n",
            hash("open sesame").unwrap(),
            bcrypt::hash("friend", 4).unwrap()
        );
        let users = Users::parse(&text).unwrap();
        let memory = Memory::new([7; 32]);
        for (pair, who) in [
            ("anna:open sesame", Some("anna")),
            ("anna:open sesame", Some("anna")),
            ("anna:Open sesame", None),
            ("anna:", None),
            ("bert:friend", Some("bert")),
            ("bert:open sesame", None),
            ("carl:open sesame", None),
            ("carl:friend", None),
            (":friend", None),
        ] {
            let found = users.find(&told(pair).unwrap(), &memory).await.unwrap();
            assert_eq!(found.as_ref().and_then(|found| found.first("user")), who, "{pair}");
        }
        let anna = users.find(&told("anna:open sesame").unwrap(), &memory).await.unwrap().unwrap();
        assert_eq!(anna.values("role"), ["admin", "staff"]);
        // Only what was right is remembered, and nothing that could be read.
        assert_eq!(memory.right().len(), 2);
    }

    #[tokio::test]
    async fn a_password_is_forgotten_when_its_hash_changes() {
        let memory = Memory::new([7; 32]);
        let users = |password| Users::parse(&format!("anna:{}", bcrypt::hash(password, 4).unwrap())).unwrap();
        let said = told("anna:old").unwrap();
        assert!(users("old").find(&said, &memory).await.unwrap().is_some());
        assert!(users("new").find(&said, &memory).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn only_so_many_wait() {
        let memory = Memory::new([7; 32]);
        memory.waiting.store(WAITING_MOST, Ordering::Relaxed);
        let users = Users::parse(&format!("anna:{}", bcrypt::hash("x", 4).unwrap())).unwrap();
        assert_eq!(users.find(&told("anna:x").unwrap(), &memory).await.err(), Some(Busy));
        memory.waiting.store(0, Ordering::Relaxed);
        assert!(users.find(&told("anna:x").unwrap(), &memory).await.unwrap().is_some());
        assert_eq!(memory.waiting.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_no_pair_is_not_understood() {
        let of = |text: &str| Told::of(&HeaderValue::from_str(text).unwrap()).is_some();
        assert!(of("Basic YTpi") && of("basic  YTpi"));
        for wrong in
            ["Basic", "Basic ", "Basic YTp", "Basic YQ==", "Bearer YTpi", "BasicYTpi", "Basic YTpi YTpi"]
        {
            assert!(!of(wrong), "{wrong}");
        }
        assert!(told(&format!("a:{}", "b".repeat(LONGEST))).is_none());
    }

    #[test]
    fn files_that_cannot_be_used_are_refused_without_showing_them() {
        let good = bcrypt::hash("x", 4).unwrap();
        for (text, line, word) in [
            (String::new(), 0, "nobody"),
            ("# only words".into(), 0, "nobody"),
            ("anna".into(), 1, "colon"),
            (format!(":{good}"), 1, "no name"),
            (format!("a:{good}\n\na:{good}"), 3, "before"),
            ("anna:hunter2".into(), 1, "lb auth hash"),
            ("anna:{SHA}2jmj7l5rSw0yVb/vlWAYkK/YBwk=".into(), 1, "lb auth hash"),
            ("anna:$apr1$7Q2hJ6Z1$Zb2CZkPZ0mC4mS1nV6iPE0".into(), 1, "lb auth hash"),
            ("anna:$2y$05$short".into(), 1, "bcrypt"),
            (format!("anna:{}", good.replacen("$04$", "$20$", 1)), 1, "cost"),
            ("anna:$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ".into(), 1, "no salt"),
            (format!("anna:{}", hash("x").unwrap().replacen("m=19456", "m=4194304", 1)), 1, "256 MiB"),
        ] {
            let error = Users::parse(&text).map(drop).unwrap_err();
            assert!(error.line == line && error.problem.contains(word), "{text}: {error}");
            assert!(!error.to_string().contains("hunter2"));
        }
    }
}
