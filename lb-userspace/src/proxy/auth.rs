//! Who asks, and whether they may: from a request's headers and its source to an identity, or a refusal.
//!
//! What is decided here speaks of `http` types alone. A route has a [`Gate`]; several ways to say who one is are
//! alternatives, tried in the order of the document. What the desk is shown does not go on to the backend, and
//! what tells the backend who asks comes from the desk alone.

pub mod basic;
pub mod certificate;
pub mod entries;
mod jwt;
pub mod key;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use tracing::error;

use self::{
    basic::{Memory, Told, Users},
    certificate::Certificate,
    entries::EntryError,
    jwt::TokenError,
    key::Keys,
};
use super::{
    headers,
    limits::{Buckets, network},
    orders::Files,
};
use crate::model::{
    Network,
    guard::{CertificateName, Guard, TokenRule, Way},
};

/// So often may be wrong from one source, in such a time, what is said of who one is; then nobody listens for a while.
const STRIKES: u32 = 10;
const STRIKES_IN: Duration = Duration::from_secs(60);

/// Who asks: claims, each with its values. `user` is their name, `role` what they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity(BTreeMap<String, Vec<String>>);

impl Identity {
    fn known(name: &str, roles: BTreeSet<String>) -> Self {
        let roles = roles.into_iter().collect();
        Self([("user".to_owned(), vec![name.to_owned()]), ("role".to_owned(), roles)].into())
    }

    /// The values of a claim.
    pub fn values(&self, claim: &str) -> &[String] {
        self.0.get(claim).map_or(&[], Vec::as_slice)
    }

    /// The first value of a claim.
    pub fn first(&self, claim: &str) -> Option<&str> {
        self.values(claim).first().map(String::as_str)
    }
}

/// Why somebody does not come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody said who asks.
    Missing(Challenges),
    /// What was said is not right.
    Wrong(Challenges),
    /// Known, and may not: a claim that is required is not there.
    Lacks,
    /// Nobody may, from where they call.
    Source,
    /// Another service has said so, in these words.
    Told(Box<Answered>),
    /// What was said from there was wrong too often: for so long it is not looked at.
    Slowed(Duration),
    /// Too many ask at the same time.
    Busy,
    /// What is needed to know them is not at hand.
    Unavailable,
}

/// Values of `WWW-Authenticate` (RFC 9110 section 11.6.1).
pub type Challenges = Vec<HeaderValue>;

/// What comes by a request to be judged by.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// Where it comes from.
    pub source: IpAddr,
    /// What was shown as its connection began.
    pub certificate: Option<&'a Certificate>,
    /// When it came, in seconds since the epoch.
    pub now: u64,
}

/// What another service has answered who was asked whether somebody may come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

/// Somebody who can ask other services whether the one that is asked about may come in.
pub trait Messenger {
    /// What a service of this pool answers under a path; `None`: nothing that could be used.
    fn ask(&self, pool: &str, path: &str) -> impl Future<Output = Option<Answered>> + Send;
}

/// What a backend is told of who asks, and what it is not to see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passport {
    /// Headers of the desk's own.
    pub tells: Vec<(HeaderName, HeaderValue)>,
    /// Headers of the client that do not go on.
    pub withheld: Vec<HeaderName>,
    /// Who asks, where that is known.
    pub user: Option<String>,
}

/// What all gates share.
pub struct Porter {
    memory: Memory,
    strikes: Buckets,
    /// Whose keys a token was signed with that is not among those that are known.
    wanted: Mutex<BTreeSet<PathBuf>>,
}

impl Porter {
    /// Who remembers nobody yet.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn new() -> std::io::Result<Self> {
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(std::io::Error::other)?;
        let strikes = Buckets::new(STRIKES, STRIKES_IN, STRIKES);
        Ok(Self { memory: Memory::new(key), strikes, wanted: Mutex::default() })
    }

    /// Addresses at which there may be keys that somebody has asked for, since this was last asked.
    pub fn wanted(&self) -> BTreeSet<PathBuf> {
        std::mem::take(&mut self.wanted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a route asks of those who come by it.
pub struct Gate {
    guard: Guard,
    ways: Vec<Known>,
    withheld: Vec<HeaderName>,
}

/// Who is known by a way.
enum Known {
    Users(Users),
    Keys(Keys, HeaderName),
    /// Who shows a token by one of these keys; from where more are had, if they are.
    Tokens(jwt::Keys, TokenRule, Option<PathBuf>),
    /// Who shows a certificate.
    Certified(CertificateName),
    /// Who is known to another service: its pool, the path, and which header gives which claim.
    Elsewhere(String, String, BTreeMap<String, HeaderName>),
    /// Its file could not be used; nobody comes in by it.
    Nobody,
    /// Who shows a token by keys that are not there yet.
    Unfetched,
}

impl Gate {
    /// Of a route; `files` are those that it names.
    pub fn new(guard: &Guard, files: &Files) -> Self {
        let known = |way: &Way| {
            let text = way.source().and_then(|source| files.get(source));
            if way.fetch().is_some() && text.is_none() {
                // They have not come yet, or not for too long; the daemon says so.
                return Known::Unfetched;
            }
            known(way, text.map_or("", |text| text.expose())).unwrap_or_else(|why| {
                // The daemon has tried it; if it is unfit all the same, nobody comes in.
                error!("{} cannot be used: {why}", way.source().unwrap_or(Path::new(way.name())).display());
                Known::Nobody
            })
        };
        let shown: BTreeSet<&str> = match guard.forward_credentials {
            true => BTreeSet::new(),
            false => guard.ways.iter().filter_map(Way::shown_in).collect(),
        };
        let withheld = shown.into_iter().filter_map(|name| HeaderName::try_from(name).ok());
        Self {
            ways: guard.ways.iter().map(known).collect(),
            withheld: withheld.collect(),
            guard: guard.clone(),
        }
    }

    /// Whether anybody may come in from there at all.
    ///
    /// # Errors
    /// When nobody may.
    pub fn lets_in(&self, source: IpAddr) -> Result<(), Refusal> {
        let admits = Network::admits(&self.guard.allow, &self.guard.deny, source);
        if admits { Ok(()) } else { Err(Refusal::Source) }
    }

    /// Whether they may come in, and as whom; who is not asked is nobody.
    ///
    /// # Errors
    /// Why not.
    pub async fn admit(
        &self,
        caller: &Caller<'_>,
        porter: &Porter,
        messenger: &impl Messenger,
    ) -> Result<Passport, Refusal> {
        self.lets_in(caller.source)?;
        let mut passport = Passport { tells: Vec::new(), withheld: self.withheld.clone(), user: None };
        if self.ways.is_empty() {
            return Ok(passport);
        }
        let (key, now) = (porter.strikes.key(network(caller.source)), Instant::now());
        if let Some(wait) = porter.strikes.empty(key, now).filter(|_| self.shows(caller)) {
            return Err(Refusal::Slowed(wait));
        }
        let mut is_wrong = false;
        let found = self.identify(caller, porter, messenger, &mut is_wrong).await;
        // Who is known by something else, or whoever is asked besides, may not guess either.
        if is_wrong {
            porter.strikes.overdraw(key, now);
        }
        let identity = found?;
        let has = |(claim, wanted): (&String, &BTreeSet<String>)| {
            identity.values(claim).iter().any(|value| wanted.contains(value))
        };
        if !self.guard.require.iter().all(has) {
            return Err(Refusal::Lacks);
        }
        let tell = |(name, claim): (&String, &String)| {
            // With a comma in it one value would be two to who reads the list.
            let values = identity.values(claim).iter().filter(|value| !value.contains(','));
            let value = values.map(String::as_str).collect::<Vec<_>>().join(",");
            let value = HeaderValue::from_bytes(value.as_bytes()).ok().filter(|value| !value.is_empty());
            Some((HeaderName::try_from(name).ok()?, value?))
        };
        // Known without a name: all such are one.
        passport.user = Some(identity.first("user").unwrap_or_default().to_owned());
        passport.tells = self.guard.identity.iter().filter_map(tell).collect();
        Ok(passport)
    }

    /// Whether anything is shown that could be right or wrong.
    fn shows(&self, caller: &Caller<'_>) -> bool {
        self.guard.ways.iter().filter_map(Way::header).any(|name| caller.headers.contains_key(name))
    }

    /// Who it is; says too whether anything was shown that was wrong.
    async fn identify(
        &self,
        caller: &Caller<'_>,
        porter: &Porter,
        messenger: &impl Messenger,
        is_wrong: &mut bool,
    ) -> Result<Identity, Refusal> {
        let (mut shown, mut usable, mut unanswered) = (false, false, false);
        let mut problem = None;
        for way in &self.ways {
            let found = match way {
                Known::Nobody => continue,
                Known::Unfetched => {
                    unanswered |= bearer(caller.headers).is_some();
                    continue;
                }
                Known::Users(users) => {
                    usable = true;
                    let Some(given) = headers::only(caller.headers, &header::AUTHORIZATION) else { continue };
                    if scheme(given, "basic").is_none() {
                        continue;
                    }
                    match Told::of(given) {
                        Some(told) => {
                            users.find(&told, &porter.memory).await.map_err(|basic::Busy| Refusal::Busy)?
                        }
                        None => None,
                    }
                }
                Known::Keys(keys, name) => {
                    usable = true;
                    let Some(given) = headers::only(caller.headers, name) else { continue };
                    keys.find(given).cloned()
                }
                Known::Tokens(keys, rule, more) => {
                    usable = true;
                    let Some(token) = bearer(caller.headers) else { continue };
                    let found = keys.verify(rule, token, caller.now);
                    if let (Err(why @ TokenError::Key), Some(more)) = (&found, more) {
                        porter.wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(more.clone());
                        // It may be right, and known soon; nobody finds out a signature like this.
                        (shown, problem) = (true, Some(*why));
                        continue;
                    }
                    found.map_err(|why| problem = Some(why)).ok()
                }
                Known::Certified(user) => {
                    usable = true;
                    // One that has run out shows nobody any more; nobody begins with a wrong one.
                    let shown = caller.certificate.and_then(|shown| shown.identity(*user, caller.now));
                    let Some(identity) = shown else { continue };
                    Some(identity)
                }
                Known::Elsewhere(pool, path, claims) => {
                    let answered = messenger.ask(pool, path).await.ok_or(Refusal::Unavailable)?;
                    return match answered.status {
                        200..=299 => Ok(told(&answered.headers, claims)),
                        401 | 403 | 301..=303 | 307 | 308 => Err(Refusal::Told(Box::new(answered))),
                        _ => Err(Refusal::Unavailable),
                    };
                }
            };
            if let Some(identity) = found {
                return Ok(identity);
            }
            (shown, *is_wrong) = (true, true);
        }
        Err(match (usable && !unanswered, shown) {
            (false, _) => Refusal::Unavailable,
            (true, true) => Refusal::Wrong(self.challenges(problem)),
            (true, false) => Refusal::Missing(self.challenges(None)),
        })
    }

    /// What could be shown. A key in a header has no scheme of its own in the register; one that no client knows
    /// says at least to people what is asked for. Who showed a token is told what is wrong with it (RFC 6750
    /// section 3).
    fn challenges(&self, problem: Option<TokenError>) -> Challenges {
        let of = |way: &Way| match way {
            Way::Basic { realm, .. } => format!("Basic realm=\"{realm}\", charset=\"UTF-8\""),
            Way::Key { header, .. } => format!("ApiKey header=\"{header}\""),
            Way::Certificate { .. } => "Certificate realm=\"lobby\"".to_owned(),
            // It says so itself.
            Way::Forward { .. } => String::new(),
            Way::Jwt { realm, .. } => match problem {
                None => format!("Bearer realm=\"{realm}\""),
                Some(why) => {
                    format!("Bearer realm=\"{realm}\", error=\"invalid_token\", error_description=\"{why}\"")
                }
            },
        };
        let challenges = self.guard.ways.iter().map(of).filter(|challenge| !challenge.is_empty());
        challenges.filter_map(|challenge| HeaderValue::try_from(challenge).ok()).collect()
    }
}

/// Who is known by a way, by the text of its file.
fn known(way: &Way, text: &str) -> Result<Known, EntryError> {
    Ok(match way {
        Way::Basic { .. } => Known::Users(Users::parse(text)?),
        Way::Key { header, .. } => {
            let problem = "its header has no name";
            let name = HeaderName::try_from(header).map_err(|_| EntryError { line: 0, problem })?;
            Known::Keys(Keys::parse(text)?, name)
        }
        Way::Jwt { keys, form, fetch, rule, .. } => {
            let more = fetch.as_ref().map(|_| keys.clone());
            Known::Tokens(jwt::Keys::parse(*form, text)?, rule.clone(), more)
        }
        Way::Certificate { user } => Known::Certified(*user),
        Way::Forward { pool, path, claims } => {
            let claims =
                claims.iter().filter_map(|(claim, header)| Some((claim.clone(), header.try_into().ok()?)));
            Known::Elsewhere(pool.clone(), path.clone(), claims.collect())
        }
    })
}

/// Who somebody is, as another service says it in its answer: lists, each in a header.
fn told(headers: &HeaderMap, claims: &BTreeMap<String, HeaderName>) -> Identity {
    let values = |name| headers::items(headers, name).map(str::to_owned).collect();
    Identity(claims.iter().map(|(claim, name)| (claim.clone(), values(name))).collect())
}

/// Whether a file says who is known by a way.
///
/// # Errors
/// Why not.
pub fn check(way: &Way, text: &str) -> Result<(), EntryError> {
    known(way, text).map(drop)
}

/// The token that is shown (RFC 6750 section 2.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    scheme(headers::only(headers, &header::AUTHORIZATION)?, "bearer")
}

/// What is behind the name of a scheme, which may be written in any case (RFC 9110 section 11.1).
fn scheme<'h>(credentials: &'h HeaderValue, name: &str) -> Option<&'h str> {
    let (scheme, rest) = credentials.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case(name).then_some(rest.trim())
}

#[cfg(test)]
mod tests;
