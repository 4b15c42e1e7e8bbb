//! Tokens that somebody else has signed (RFC 7519), shown as `Authorization: Bearer …` (RFC 6750).
//!
//! Which algorithms a key is for is said by the key, never by the token (RFC 8725 section 3.1). Of a token's header
//! only `alg`, `kid` and `crit` mean anything: keys that it brings along or points to are not looked at.

use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse},
};
use ring::{hmac, signature};
use serde_json::{Map, Value};

use super::{Identity, entries::EntryError};
use crate::model::guard::{KeyForm, TokenRule};

/// Longest token that is looked at, bytes.
const LONGEST: usize = 8 << 10;

/// Shortest secret, bytes (RFC 7518 section 3.2, of the shortest hash).
const SHORTEST_SECRET: usize = 32;

/// Shortest modulus, bytes (RFC 7518 section 3.3).
const SHORTEST_RSA: usize = 2048 / 8;

/// Most keys that one token is tried with.
const TRIES: usize = 8;

const RSA: [Algorithm; 6] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

const HMAC: [Algorithm; 3] = [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512];

/// Why a token is not believed, in words that its owner may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TokenError {
    #[error("the token is too long")]
    TooLong,
    #[error("the token is not understood")]
    Form,
    #[error("the token asks for extensions")]
    Critical,
    #[error("the token's algorithm is not taken")]
    Algorithm,
    #[error("the token's key is not known")]
    Key,
    #[error("the token's signature is not right")]
    Signature,
    #[error("the token does not say when it ends")]
    Endless,
    #[error("the token has expired")]
    Expired,
    #[error("the token is not valid yet")]
    Early,
    #[error("the token is of another issuer")]
    Issuer,
    #[error("the token is for another audience")]
    Audience,
}

/// Keys that tokens are signed with.
#[derive(Clone)]
pub(super) struct Keys(Vec<Key>);

#[derive(Clone)]
struct Key {
    /// `None`: of a file that has no names for keys.
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

impl Keys {
    /// Reads a file.
    ///
    /// # Errors
    /// What of it cannot be used.
    pub(super) fn parse(form: KeyForm, text: &str) -> Result<Self, EntryError> {
        let keys = match form {
            KeyForm::Jwks => set(text),
            KeyForm::Pem => pem(text).map(|key| vec![key]),
            KeyForm::Secret => secret(text).map(|key| vec![key]),
        };
        keys.map(Self).map_err(|problem| EntryError { line: 0, problem })
    }

    /// Who shows a token. `now` is in seconds since the epoch.
    pub(super) fn verify(&self, rule: &TokenRule, token: &str, now: u64) -> Result<Identity, TokenError> {
        if token.len() > LONGEST {
            return Err(TokenError::TooLong);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(TokenError::Form)?;
        let (head, payload) = message.split_once('.').ok_or(TokenError::Form)?;
        if payload.contains('.') {
            return Err(TokenError::Form);
        }
        let head = object(head)?;
        if head.contains_key("crit") {
            return Err(TokenError::Critical);
        }
        let algorithm = head.get("alg").and_then(Value::as_str).ok_or(TokenError::Form)?;
        let algorithm: Algorithm = algorithm.parse().map_err(|_| TokenError::Algorithm)?;
        let id = match head.get("kid") {
            None => None,
            Some(Value::String(id)) => Some(id),
            Some(_) => return Err(TokenError::Form),
        };
        let named = |key: &&Key| key.id.is_none() || id.is_none() || key.id.as_ref() == id;
        let known: Vec<&Key> = self.0.iter().filter(named).collect();
        if known.is_empty() {
            return Err(TokenError::Key);
        }
        let fitting = known.into_iter().filter(|key| key.algorithms.contains(&algorithm)).take(TRIES);
        let fitting: Vec<&Key> = fitting.collect();
        if fitting.is_empty() {
            return Err(TokenError::Algorithm);
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Signature)?;
        let signed = |key: &&Key| key.signed(algorithm, message.as_bytes(), &signature);
        if !fitting.iter().any(signed) {
            return Err(TokenError::Signature);
        }
        // Nothing of it has been believed before.
        let claims = object(payload)?;
        check(&claims, rule, now)?;
        Ok(identity(&claims, rule))
    }
}

impl Key {
    /// Whether a message is signed with it, by what the rest of the desk has its cryptography from.
    fn signed(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        let bytes = match self.key.kind() {
            DecodingKeyKind::SecretOrDer(bytes) => bytes,
            DecodingKeyKind::RsaModulusExponent { n, e } => {
                let public = signature::RsaPublicKeyComponents { n: number(n), e: number(e) };
                return rsa(algorithm).is_some_and(|it| public.verify(it, message, signature).is_ok());
            }
        };
        let hash = match algorithm {
            Algorithm::HS256 => Some(hmac::HMAC_SHA256),
            Algorithm::HS384 => Some(hmac::HMAC_SHA384),
            Algorithm::HS512 => Some(hmac::HMAC_SHA512),
            _ => None,
        };
        if let Some(hash) = hash {
            return hmac::verify(&hmac::Key::new(hash, bytes), message, signature).is_ok();
        }
        let how: &'static dyn signature::VerificationAlgorithm = match algorithm {
            Algorithm::ES256 => &signature::ECDSA_P256_SHA256_FIXED,
            Algorithm::ES384 => &signature::ECDSA_P384_SHA384_FIXED,
            Algorithm::EdDSA => &signature::ED25519,
            other => match rsa(other) {
                Some(how) => how,
                None => return false,
            },
        };
        signature::UnparsedPublicKey::new(how, bytes).verify(message, signature).is_ok()
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static signature::RsaParameters> {
    Some(match algorithm {
        Algorithm::RS256 => &signature::RSA_PKCS1_2048_8192_SHA256,
        Algorithm::RS384 => &signature::RSA_PKCS1_2048_8192_SHA384,
        Algorithm::RS512 => &signature::RSA_PKCS1_2048_8192_SHA512,
        Algorithm::PS256 => &signature::RSA_PSS_2048_8192_SHA256,
        Algorithm::PS384 => &signature::RSA_PSS_2048_8192_SHA384,
        Algorithm::PS512 => &signature::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}

/// Some issuers write a number with zeros before it, which none should have (RFC 7518 section 2).
fn number(bytes: &[u8]) -> &[u8] {
    &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..]
}

/// A part of a token.
fn object(part: &str) -> Result<Map<String, Value>, TokenError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Form)?;
    serde_json::from_slice(&bytes).map_err(|_| TokenError::Form)
}

/// RFC 7519 section 4.1.
fn check(claims: &Map<String, Value>, rule: &TokenRule, now: u64) -> Result<(), TokenError> {
    let leeway = rule.leeway.as_secs_f64();
    // Seconds with fractions are far below where whole numbers would be lost.
    let now = now as f64;
    let end = claims.get("exp").and_then(Value::as_f64).ok_or(TokenError::Endless)?;
    if now >= end + leeway {
        return Err(TokenError::Expired);
    }
    if let Some(begin) = claims.get("nbf") {
        let begin = begin.as_f64().ok_or(TokenError::Form)?;
        if begin > now + leeway {
            return Err(TokenError::Early);
        }
    }
    let issuer = claims.get("iss").and_then(Value::as_str);
    if !rule.issuer.is_empty() && !issuer.is_some_and(|issuer| rule.issuer.contains(issuer)) {
        return Err(TokenError::Issuer);
    }
    // Who is not of the audience must not take it, whether they have a name for themselves or not.
    let audience = claims.get("aud").map(values).unwrap_or_default();
    let meant = audience.iter().any(|name| rule.audience.contains(name));
    if !meant && (claims.contains_key("aud") || !rule.audience.is_empty()) {
        return Err(TokenError::Audience);
    }
    Ok(())
}

fn identity(claims: &Map<String, Value>, rule: &TokenRule) -> Identity {
    let mut known: Vec<(String, Vec<String>)> =
        claims.iter().map(|(name, value)| (name.clone(), spread(name, value))).collect();
    for (name, path) in [("user", &rule.user), ("role", &rule.role)] {
        let found = find(claims, path).map(|value| spread(path, value));
        known.retain(|(other, _)| other != name);
        known.push((name.to_owned(), found.unwrap_or_default()));
    }
    Identity(known.into_iter().collect())
}

/// A claim by its name, or by a path with dots: `realm_access.roles`.
fn find<'v>(claims: &'v Map<String, Value>, path: &str) -> Option<&'v Value> {
    if let Some(value) = claims.get(path) {
        return Some(value);
    }
    let (first, rest) = path.split_once('.')?;
    find(claims.get(first)?.as_object()?, rest)
}

/// The values of a claim; those of `scope` stand in one text (RFC 8693 section 4.2).
fn spread(name: &str, value: &Value) -> Vec<String> {
    match value {
        Value::String(text) if name == "scope" => text.split_whitespace().map(str::to_owned).collect(),
        other => values(other),
    }
}

fn values(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Number(number) => vec![number.to_string()],
        Value::Bool(truth) => vec![truth.to_string()],
        Value::Array(items) => items.iter().filter(|item| !item.is_array()).flat_map(values).collect(),
        Value::Null | Value::Object(_) => Vec::new(),
    }
}

/// RFC 7517 section 5: what of a set is not understood, or not for signatures, is left out.
fn set(text: &str) -> Result<Vec<Key>, &'static str> {
    let set: Value = serde_json::from_str(text).map_err(|_| "it is no JSON")?;
    let keys =
        set.get("keys").and_then(Value::as_array).ok_or("it is no set of keys: { \"keys\": [ … ] }")?;
    let mut names = BTreeSet::new();
    let mut found = Vec::new();
    for key in keys {
        if key.get("d").is_some() {
            return Err("a private key is in it; the desk is to have the public ones alone");
        }
        let Ok(jwk) = serde_json::from_value::<Jwk>(key.clone()) else { continue };
        let Some(algorithms) = algorithms(&jwk) else { continue };
        let Ok(key) = DecodingKey::from_jwk(&jwk) else { continue };
        let id = jwk.common.key_id.clone().unwrap_or_default();
        if !names.insert((id.clone(), format!("{algorithms:?}"))) {
            return Err("two keys of it have the same kid, or none");
        }
        found.push(Key { id: Some(id), algorithms, key });
    }
    if found.is_empty() { Err("no key of it is for signatures that are understood here") } else { Ok(found) }
}

/// What a key is for; `None`: for nothing here.
fn algorithms(jwk: &Jwk) -> Option<Vec<Algorithm>> {
    if jwk.common.public_key_use.as_ref().is_some_and(|it| *it != PublicKeyUse::Signature) {
        return None;
    }
    let could = match &jwk.algorithm {
        AlgorithmParameters::RSA(key) if key.n.len() * 3 / 4 >= SHORTEST_RSA => RSA.to_vec(),
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => vec![Algorithm::ES256],
            EllipticCurve::P384 => vec![Algorithm::ES384],
            _ => return None,
        },
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            vec![Algorithm::EdDSA]
        }
        AlgorithmParameters::OctetKey(key) if key.value.len() * 3 / 4 >= SHORTEST_SECRET => HMAC.to_vec(),
        _ => return None,
    };
    match jwk.common.key_algorithm {
        None => Some(could),
        Some(only) => {
            let only = Algorithm::try_from(only).ok()?;
            could.contains(&only).then(|| vec![only])
        }
    }
}

fn pem(text: &str) -> Result<Key, &'static str> {
    if text.contains("PRIVATE KEY") {
        return Err("it is a private key; the desk is to have the public one alone: openssl pkey -pubout");
    }
    let bytes = text.as_bytes();
    let key = |algorithms: &[Algorithm], key| Key { id: None, algorithms: algorithms.to_vec(), key };
    if let Ok(found) = DecodingKey::from_rsa_pem(bytes) {
        // The modulus is nearly all of it.
        if found.try_get_as_bytes().map_or(0, <[u8]>::len) < SHORTEST_RSA {
            return Err("it is an RSA key of less than 2048 bits");
        }
        return Ok(key(&RSA, found));
    }
    if let Ok(found) = DecodingKey::from_ec_pem(bytes) {
        // An uncompressed point: a byte, and two numbers as long as the curve's.
        let length = found.try_get_as_bytes().map_or(0, <[u8]>::len);
        return match length {
            65 => Ok(key(&[Algorithm::ES256], found)),
            97 => Ok(key(&[Algorithm::ES384], found)),
            _ => Err("its curve is neither P-256 nor P-384"),
        };
    }
    match DecodingKey::from_ed_pem(bytes) {
        Ok(found) => Ok(key(&[Algorithm::EdDSA], found)),
        Err(_) => Err("there is no public key in PEM form in it"),
    }
}

fn secret(text: &str) -> Result<Key, &'static str> {
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.contains("-----BEGIN") {
        return Err(
            "it is a key in PEM form; a secret that both sides know is something else: write public_key_file",
        );
    }
    if secret.len() < SHORTEST_SECRET {
        return Err("a secret shorter than 32 bytes could be found from a token");
    }
    Ok(Key { id: None, algorithms: HMAC.to_vec(), key: DecodingKey::from_secret(secret.as_bytes()) })
}

#[cfg(test)]
mod tests;
