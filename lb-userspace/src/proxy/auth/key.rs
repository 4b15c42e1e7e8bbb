//! API keys: a text in a header, kept as its SHA-256. That is enough for keys that were made by chance, and
//! they are asked for with each request.

use http::HeaderValue;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq as _;

use super::{
    Identity,
    entries::{EntryError, entries},
};

/// Longest key that is looked at.
const LONGEST: usize = 512;

/// Keys that are shorter could be found from their hashes.
pub const SHORTEST: usize = 20;

/// Which keys are known, and whose they are.
#[derive(Clone)]
pub struct Keys(Vec<([u8; 32], Identity)>);

impl Keys {
    /// Reads a file.
    ///
    /// # Errors
    /// What of it cannot be used.
    pub fn parse(text: &str) -> Result<Self, EntryError> {
        let mut keys: Vec<([u8; 32], Identity)> = Vec::new();
        for (line, entry) in entries(text)? {
            let wrong = |problem| EntryError { line, problem };
            let hash = digest(entry.hash).ok_or(wrong(
                "behind the name is no SHA-256 in hexadecimal; make it with `lb auth hash --key`",
            ))?;
            if keys.iter().any(|(other, _)| *other == hash) {
                return Err(wrong("the same key is there before"));
            }
            keys.push((hash, Identity::known(entry.name, entry.roles)));
        }
        Ok(Self(keys))
    }

    /// Whose key this is. How long it takes says nothing of the keys that are known.
    pub(super) fn find(&self, key: &HeaderValue) -> Option<&Identity> {
        if key.len() > LONGEST {
            return None;
        }
        let hash: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let mut found = None;
        for (known, identity) in &self.0 {
            if bool::from(known.ct_eq(&hash)) {
                found = Some(identity);
            }
        }
        found
    }
}

fn digest(hexadecimal: &str) -> Option<[u8; 32]> {
    let nibble = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes = hexadecimal.as_bytes();
    let mut digest = [0; 32];
    if bytes.len() != 2 * digest.len() {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(bytes.chunks(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(digest)
}

/// A key as it is kept.
pub fn hash(key: &str) -> String {
    Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_its_hash() {
        // RFC 6234 section 8.5, test 1.
        assert_eq!(hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let keys = Keys::parse(&format!("shop:{}:orders\nlab:{}\n", hash("one"), hash("two"))).unwrap();
        let whose =
            |key: &str| keys.find(&HeaderValue::from_str(key).unwrap()).and_then(|it| it.first("user"));
        assert_eq!((whose("one"), whose("two")), (Some("shop"), Some("lab")));
        for wrong in ["", "three", "ONE", &hash("one"), &"x".repeat(10_000)] {
            assert_eq!(whose(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn files_that_cannot_be_used_are_refused() {
        for (text, line) in [
            (String::new(), 0),
            ("shop:one".to_owned(), 1),
            (format!("shop:{}", &hash("one")[1..]), 1),
            (format!("shop:{}g", &hash("one")[1..]), 1),
            (format!("shop:{0}\nlab:{0}", hash("one")), 2),
        ] {
            assert_eq!(Keys::parse(&text).map(drop).unwrap_err().line, line, "{text}");
        }
    }
}
