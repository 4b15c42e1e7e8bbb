//! Tokens, each with what becomes of it.

use std::time::Duration;

use ring::{
    rand::SystemRandom,
    signature::{EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair},
};
use serde_json::json;

use super::*;

const SECRET: &str = "a secret that is long enough for a hash";
const NOW: u64 = 1_800_000_000;

fn rule() -> TokenRule {
    TokenRule {
        issuer: ["https://id.example".to_owned()].into(),
        audience: ["shop".to_owned()].into(),
        leeway: Duration::from_secs(30),
        user: "sub".into(),
        role: "realm_access.roles".into(),
    }
}

fn claims() -> Value {
    json!({
        "iss": "https://id.example", "aud": ["shop", "lab"], "sub": "anna", "exp": NOW + 60, "nbf": NOW - 60,
        "realm_access": { "roles": ["admin", "staff"] }, "scope": "read write", "role": "root", "user": "root",
    })
}

fn part(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

/// Signed with the secret, whatever the header says.
fn token(head: &Value, claims: &Value) -> String {
    hashed(head, claims, SECRET)
}

fn hashed(head: &Value, claims: &Value, secret: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    signed(head, claims, |message| hmac::sign(&key, message).as_ref().to_vec())
}

fn signed(head: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let message = format!("{}.{}", part(head), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(sign(message.as_bytes()));
    format!("{message}.{signature}")
}

fn verdict(token: &str) -> Result<(), TokenError> {
    Keys::parse(KeyForm::Secret, SECRET).unwrap().verify(&rule(), token, NOW).map(drop)
}

#[test]
fn a_token_says_who_shows_it() {
    let keys = Keys::parse(KeyForm::Secret, &format!("{SECRET}\n")).unwrap();
    let known = keys.verify(&rule(), &token(&json!({ "alg": "HS256" }), &claims()), NOW).unwrap();
    // What the token itself calls user and role is not what the document does.
    assert_eq!(
        (known.values("user"), known.values("role")),
        (&["anna".into()][..], &["admin".into(), "staff".into()][..])
    );
    assert_eq!(known.values("scope"), ["read", "write"]);
}

#[test]
fn each_trick_has_its_answer() {
    let good = json!({ "alg": "HS256", "typ": "JWT" });
    let with = |key: &str, value: Value| {
        let mut claims = claims();
        match value {
            Value::Null => _ = claims.as_object_mut().unwrap().remove(key),
            value => claims[key] = value,
        }
        token(&good, &claims)
    };
    let whole = token(&good, &claims());
    let (message, signature) = whole.rsplit_once('.').unwrap();
    let other = part(&json!({ "sub": "root", "exp": NOW + 60 }));
    let head = message.split('.').next().unwrap();
    for (what, token, expected) in [
        ("a good one", whole.clone(), Ok(())),
        ("no algorithm", token(&json!({ "alg": "none" }), &claims()), Err(TokenError::Algorithm)),
        (
            "no algorithm, spelt otherwise",
            token(&json!({ "alg": "nOnE" }), &claims()),
            Err(TokenError::Algorithm),
        ),
        (
            "no algorithm, no signature",
            format!("{}.{}.", part(&json!({ "alg": "none" })), part(&claims())),
            Err(TokenError::Algorithm),
        ),
        ("no alg", token(&json!({}), &claims()), Err(TokenError::Form)),
        (
            "an algorithm of another family",
            token(&json!({ "alg": "RS256" }), &claims()),
            Err(TokenError::Algorithm),
        ),
        (
            "another hash than it was made with",
            token(&json!({ "alg": "HS384" }), &claims()),
            Err(TokenError::Signature),
        ),
        ("no signature", format!("{message}."), Err(TokenError::Signature)),
        ("a changed signature", format!("{message}.A{}", &signature[1..]), Err(TokenError::Signature)),
        (
            "other claims below the signature",
            format!("{head}.{other}.{signature}"),
            Err(TokenError::Signature),
        ),
        ("a signature with padding", format!("{whole}="), Err(TokenError::Signature)),
        ("two parts", message.into(), Err(TokenError::Form)),
        ("four parts", format!("{whole}.x"), Err(TokenError::Form)),
        ("nothing", String::new(), Err(TokenError::Form)),
        ("a head that is no JSON", format!("e30x.{}.x", part(&claims())), Err(TokenError::Form)),
        (
            "extensions",
            token(&json!({ "alg": "HS256", "crit": ["exp"] }), &claims()),
            Err(TokenError::Critical),
        ),
        (
            "a kid that is no text",
            token(&json!({ "alg": "HS256", "kid": 7 }), &claims()),
            Err(TokenError::Form),
        ),
        (
            "a key that it brings along",
            token(&json!({ "alg": "HS256", "jwk": { "kty": "oct", "k": "AA" } }), &claims()),
            Ok(()),
        ),
        ("too long", with("x", json!("x".repeat(LONGEST))), Err(TokenError::TooLong)),
        ("expired", with("exp", json!(NOW - 31)), Err(TokenError::Expired)),
        ("expired, within the leeway", with("exp", json!(NOW - 29)), Ok(())),
        ("without an end", with("exp", Value::Null), Err(TokenError::Endless)),
        ("an end that is a text", with("exp", json!("9999999999")), Err(TokenError::Endless)),
        ("not yet", with("nbf", json!(NOW + 31)), Err(TokenError::Early)),
        ("not yet, within the leeway", with("nbf", json!(NOW + 29)), Ok(())),
        ("a beginning that is a text", with("nbf", json!("0")), Err(TokenError::Form)),
        ("another issuer", with("iss", json!("https://id.example.evil")), Err(TokenError::Issuer)),
        ("no issuer", with("iss", Value::Null), Err(TokenError::Issuer)),
        ("a list of issuers", with("iss", json!(["https://id.example"])), Err(TokenError::Issuer)),
        ("another audience", with("aud", json!("lab")), Err(TokenError::Audience)),
        ("no audience", with("aud", Value::Null), Err(TokenError::Audience)),
        ("claims that are a list", token(&good, &json!([])), Err(TokenError::Form)),
    ] {
        assert_eq!(verdict(&token), expected, "{what}: {token}");
    }
}

#[test]
fn who_has_no_name_is_of_no_audience() {
    let keys = Keys::parse(KeyForm::Secret, SECRET).unwrap();
    let rule = TokenRule { audience: BTreeSet::new(), ..rule() };
    let all = token(&json!({ "alg": "HS256" }), &claims());
    assert_eq!(keys.verify(&rule, &all, NOW).map(drop), Err(TokenError::Audience));
    let mut without = claims();
    without.as_object_mut().unwrap().remove("aud");
    assert!(keys.verify(&rule, &token(&json!({ "alg": "HS256" }), &without), NOW).is_ok());
}

/// A key pair: the private key for the test, the public one in PEM form.
fn pair(algorithm: &'static rcgen::SignatureAlgorithm) -> (rcgen::KeyPair, String) {
    let pair = rcgen::KeyPair::generate_for(algorithm).unwrap();
    let public = pair.public_key_pem();
    (pair, public)
}

#[test]
fn the_key_says_which_algorithm_it_is_for() {
    let (p256, p256_public) = pair(&rcgen::PKCS_ECDSA_P256_SHA256);
    let (p384, p384_public) = pair(&rcgen::PKCS_ECDSA_P384_SHA384);
    let (ed, ed_public) = pair(&rcgen::PKCS_ED25519);
    let ec = |how: &'static EcdsaSigningAlgorithm, alg: &str, pair: &rcgen::KeyPair| {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(how, &pair.serialize_der(), &random).unwrap();
        signed(&json!({ "alg": alg }), &claims(), |message| {
            key.sign(&random, message).unwrap().as_ref().to_vec()
        })
    };
    let edwards = Ed25519KeyPair::from_pkcs8(&ed.serialize_der()).unwrap();
    let tokens = [
        ec(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, "ES256", &p256),
        ec(&signature::ECDSA_P384_SHA384_FIXED_SIGNING, "ES384", &p384),
        signed(&json!({ "alg": "EdDSA" }), &claims(), |message| edwards.sign(message).as_ref().to_vec()),
        // Confusion: the public key, which everybody knows, taken for a secret.
        hashed(&json!({ "alg": "HS256" }), &claims(), &p256_public),
    ];
    for (own, public) in [p256_public, p384_public, ed_public].iter().enumerate() {
        let keys = Keys::parse(KeyForm::Pem, public).unwrap();
        for (number, token) in tokens.iter().enumerate() {
            let verdict = keys.verify(&rule(), token, NOW).map(drop);
            let expected = if number == own { Ok(()) } else { Err(TokenError::Algorithm) };
            assert_eq!(verdict, expected, "key {own}, token {number}");
        }
        let other = pair(&rcgen::PKCS_ECDSA_P256_SHA256).1;
        let why = Keys::parse(KeyForm::Pem, &other).unwrap().verify(&rule(), &tokens[0], NOW).map(drop);
        assert_eq!(why, Err(TokenError::Signature));
    }
    assert!(Keys::parse(KeyForm::Pem, &p256.serialize_pem()).is_err(), "a private key");
}

/// RFC 7515 appendix A.2: the key's modulus, and what is signed with it.
const RSA_MODULUS: &str = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ";
const RSA_TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw";

#[test]
fn the_standards_example_is_believed_and_no_trick_with_its_key() {
    let set = |alg: Option<&str>| {
        let mut key = json!({ "kty": "RSA", "n": RSA_MODULUS, "e": "AQAB" });
        key["alg"] = alg.map_or(Value::Null, Value::from);
        Keys::parse(KeyForm::Jwks, &json!({ "keys": [key] }).to_string()).unwrap()
    };
    let rule = TokenRule { issuer: ["joe".to_owned()].into(), audience: BTreeSet::new(), ..rule() };
    let then = 1_300_819_000;
    let verdict = |keys: &Keys, token: &str| keys.verify(&rule, token, then).map(drop);
    assert_eq!(verdict(&set(None), RSA_TOKEN), Ok(()));
    assert_eq!(verdict(&set(Some("RS256")), RSA_TOKEN), Ok(()));
    assert_eq!(verdict(&set(Some("PS256")), RSA_TOKEN), Err(TokenError::Algorithm));
    assert_eq!(set(None).verify(&rule, RSA_TOKEN, NOW).map(drop), Err(TokenError::Expired));
    // Confusion: what is public of the key taken for a secret.
    let claims = json!({ "iss": "joe", "exp": then + 60 });
    let confused = hashed(&json!({ "alg": "HS256" }), &claims, RSA_MODULUS);
    assert_eq!(verdict(&set(None), &confused), Err(TokenError::Algorithm));
    // A signature of one scheme is none of another.
    let (message, signature) = RSA_TOKEN.rsplit_once('.').unwrap();
    let other =
        format!("{}.{}.{signature}", part(&json!({ "alg": "PS256" })), message.split_once('.').unwrap().1);
    assert_eq!(verdict(&set(None), &other), Err(TokenError::Signature));
}

/// A key for these tests alone, made by `openssl genpkey -algorithm RSA`: ring makes none.
const RSA: &str = include_str!("rsa-of-the-tests.pem");

#[test]
fn every_scheme_of_rsa_is_verified_as_itself_alone() {
    let pair = rcgen::KeyPair::from_pem(RSA).unwrap();
    let private = signature::RsaKeyPair::from_pkcs8(&pair.serialize_der()).unwrap();
    let schemes: [(&str, &dyn signature::RsaEncoding); 6] = [
        ("RS256", &signature::RSA_PKCS1_SHA256),
        ("RS384", &signature::RSA_PKCS1_SHA384),
        ("RS512", &signature::RSA_PKCS1_SHA512),
        ("PS256", &signature::RSA_PSS_SHA256),
        ("PS384", &signature::RSA_PSS_SHA384),
        ("PS512", &signature::RSA_PSS_SHA512),
    ];
    let keys = Keys::parse(KeyForm::Pem, &pair.public_key_pem()).unwrap();
    for (said, _) in &schemes {
        for (done, how) in &schemes {
            let token = signed(&json!({ "alg": said }), &claims(), |message| {
                let mut signature = vec![0; private.public().modulus_len()];
                private.sign(*how, &SystemRandom::new(), message, &mut signature).unwrap();
                signature
            });
            let expected = if said == done { Ok(()) } else { Err(TokenError::Signature) };
            assert_eq!(keys.verify(&rule(), &token, NOW).map(drop), expected, "{said}, signed as {done}");
        }
    }
}

#[test]
fn a_set_has_its_keys_by_name() {
    let k = URL_SAFE_NO_PAD.encode(SECRET);
    let set = json!({ "keys": [
        { "kty": "oct", "kid": "one", "alg": "HS256", "k": k },
        { "kty": "oct", "kid": "two", "alg": "HS256", "k": URL_SAFE_NO_PAD.encode("another secret that is long enough") },
        { "kty": "OKP", "kid": "x", "crv": "X25519", "x": "AA" },
        { "kty": "new", "kid": "later" },
        { "kty": "oct", "kid": "enc", "use": "enc", "k": k },
    ] });
    let keys = Keys::parse(KeyForm::Jwks, &set.to_string()).unwrap();
    let named = |kid: Option<&str>, alg: &str| {
        let mut head = json!({ "alg": alg });
        if let Some(kid) = kid {
            head["kid"] = kid.into();
        }
        keys.verify(&rule(), &token(&head, &claims()), NOW).map(drop)
    };
    assert_eq!(named(Some("one"), "HS256"), Ok(()));
    assert_eq!(named(None, "HS256"), Ok(()));
    assert_eq!(named(Some("two"), "HS256"), Err(TokenError::Signature));
    assert_eq!(named(Some("three"), "HS256"), Err(TokenError::Key));
    assert_eq!(named(Some("enc"), "HS256"), Err(TokenError::Key));
    assert_eq!(named(Some("../one"), "HS256"), Err(TokenError::Key));
    assert_eq!(named(Some("one"), "HS512"), Err(TokenError::Algorithm));
}

#[test]
fn files_that_cannot_be_used_are_refused() {
    for (form, text, word) in [
        (KeyForm::Jwks, "", "JSON"),
        (KeyForm::Jwks, "{}", "set of keys"),
        (KeyForm::Jwks, "{\"keys\":[]}", "no key"),
        (KeyForm::Jwks, "{\"keys\":[{\"kty\":\"oct\",\"k\":\"c2hvcnQ\"}]}", "no key"),
        (KeyForm::Jwks, "{\"keys\":[{\"kty\":\"RSA\",\"n\":\"ofgW\",\"e\":\"AQAB\"}]}", "no key"),
        (
            KeyForm::Jwks,
            "{\"keys\":[{\"kty\":\"RSA\",\"n\":\"ofgW\",\"e\":\"AQAB\",\"d\":\"AA\"}]}",
            "private",
        ),
        (KeyForm::Pem, SECRET, "PEM"),
        (KeyForm::Secret, "short", "32 bytes"),
        (KeyForm::Secret, "-----BEGIN PUBLIC KEY-----", "PEM"),
    ] {
        let why = Keys::parse(form, text).map(drop).unwrap_err();
        assert!(why.problem.contains(word), "{text}: {why}");
    }
}
