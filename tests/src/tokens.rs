//! Who somebody says they are: passwords and tokens, as clients show them.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};

/// Name and password, as a header.
pub fn basic(pair: &str) -> String {
    format!("Authorization: Basic {}\r\n", STANDARD.encode(pair))
}

/// A token with these claims, signed with a secret.
pub fn token(secret: &str, head: &str, claims: &str) -> String {
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let message = format!("{}.{}", part(head.as_bytes()), part(claims.as_bytes()));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
    format!("{message}.{}", part(ring::hmac::sign(&key, message.as_bytes()).as_ref()))
}

/// A set with one key, a secret by its name.
pub fn key_set(name: &str, secret: &str) -> String {
    let key = URL_SAFE_NO_PAD.encode(secret);
    format!("{{\"keys\":[{{\"kty\":\"oct\",\"alg\":\"HS256\",\"kid\":\"{name}\",\"k\":\"{key}\"}}]}}")
}

/// The head of a token.
pub const HEAD: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// Claims of somebody who is let in until some seconds from now.
///
/// # Errors
/// When the clock is before 1970.
pub fn claims(role: &str, audience: &str, seconds: i64) -> Result<String> {
    let end = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().saturating_add_signed(seconds);
    Ok(format!(
        r#"{{"iss":"https://id.example","aud":"{audience}","sub":"dora","role":"{role}","exp":{end}}}"#
    ))
}
