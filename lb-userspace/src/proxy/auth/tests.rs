//! Gates: who comes in, who does not, and what a backend is told.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use super::*;
use crate::{model::guard::KeyForm, proxy::orders::Secret};

fn guard(ways: Vec<Way>) -> Guard {
    let identity = [("x-user", "user"), ("x-roles", "role")];
    let identity = identity.map(|(name, claim)| (name.to_owned(), claim.to_owned())).into();
    Guard { ways, identity, ..Guard::default() }
}

fn basic() -> Way {
    Way::Basic { users: "users".into(), realm: "staff".into() }
}

fn by_key() -> Way {
    Way::Key { keys: "keys".into(), header: "x-api-key".into() }
}

const NOW: u64 = 1_800_000_000;

const SECRET: &str = "a secret that is long enough for a hash";

fn by_token() -> Way {
    let rule = TokenRule {
        issuer: BTreeSet::new(),
        audience: BTreeSet::new(),
        leeway: Duration::from_secs(30),
        user: "sub".into(),
        role: "role".into(),
    };
    Way::Jwt { keys: "secret".into(), form: KeyForm::Secret, fetch: None, rule, realm: "shop".into() }
}

/// A token of Carl's, who is a guest, as a header.
fn bearer(end: u64) -> String {
    let coded = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let claims = format!("{{\"sub\":\"carl\",\"role\":\"guest\",\"exp\":{end}}}");
    let message = format!("{}.{}", coded(b"{\"alg\":\"HS256\"}"), coded(claims.as_bytes()));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET.as_bytes());
    let signature = ring::hmac::sign(&key, message.as_bytes());
    format!("Bearer {message}.{}", coded(signature.as_ref()))
}

fn files() -> Files {
    let users = format!("anna:{}:admin,staff\nbert:{0}", bcrypt::hash("friend", 4).unwrap());
    let keys = format!("robot:{}:orders", key::hash("a key"));
    Files::from([
        ("users".into(), Secret::new(users)),
        ("keys".into(), Secret::new(keys)),
        ("secret".into(), Secret::new(SECRET.into())),
    ])
}

/// Nobody else is asked.
struct Alone;

impl Messenger for Alone {
    async fn ask(&self, _: &str, _: &str) -> Option<Answered> {
        None
    }
}

const ANNA: &str = "Basic YW5uYTpmcmllbmQ=";
const BERT: &str = "Basic YmVydDpmcmllbmQ=";
const WRONG: &str = "Basic YW5uYTplbmVteQ==";

async fn admitted(guard: &Guard, headers: &[(&'static str, &str)]) -> Result<Passport, Refusal> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, value.parse().unwrap());
    }
    let caller =
        Caller { headers: &map, source: "198.51.100.7".parse().unwrap(), certificate: None, now: NOW };
    Gate::new(guard, &files()).admit(&caller, &Porter::new().unwrap(), &Alone).await
}

/// The headers that a backend is told by, or in a word why there are none.
async fn told(guard: &Guard, headers: &[(&'static str, &str)]) -> String {
    match admitted(guard, headers).await {
        Ok(passport) => {
            let told =
                passport.tells.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap()));
            told.collect::<Vec<_>>().join(" ")
        }
        Err(refusal) => format!("{refusal:?}").chars().take_while(|c| c.is_alphanumeric()).collect(),
    }
}

#[tokio::test]
async fn one_of_several_ways_is_enough() {
    let both = guard(vec![basic(), by_key()]);
    for (headers, expected) in [
        (&[("authorization", ANNA)][..], "x-roles=admin,staff x-user=anna"),
        (&[("authorization", BERT)], "x-user=bert"),
        (&[("x-api-key", "a key")], "x-roles=orders x-user=robot"),
        (&[("authorization", WRONG), ("x-api-key", "a key")], "x-roles=orders x-user=robot"),
        (&[("authorization", ANNA), ("x-api-key", "none")], "x-roles=admin,staff x-user=anna"),
        (&[], "Missing"),
        (&[("authorization", "Bearer x")], "Missing"),
        (&[("authorization", WRONG)], "Wrong"),
        (&[("authorization", "Basic !")], "Wrong"),
        (&[("x-api-key", "none")], "Wrong"),
        // Of two nobody can say which is meant.
        (&[("authorization", ANNA), ("authorization", BERT)], "Missing"),
        (&[("x-api-key", "a key"), ("x-api-key", "a key")], "Missing"),
    ] {
        assert_eq!(told(&both, headers).await, expected, "{headers:?}");
    }
    // What is no way of this route lets nobody in.
    assert_eq!(told(&guard(vec![by_key()]), &[("authorization", ANNA)]).await, "Missing");
    assert_eq!(told(&guard(vec![basic()]), &[("x-api-key", "a key")]).await, "Missing");
}

#[tokio::test]
async fn who_is_known_may_still_lack_something() {
    let require = |pairs: &[(&str, &[&str])]| {
        let mut guard = guard(vec![basic(), by_key()]);
        guard.require = pairs
            .iter()
            .map(|(claim, values)| ((*claim).to_owned(), values.iter().map(|&it| it.to_owned()).collect()))
            .collect();
        guard
    };
    let anna = &[("authorization", ANNA)];
    for (guard, expected) in [
        (require(&[("role", &["admin"])]), "x-roles=admin,staff x-user=anna"),
        (require(&[("role", &["other", "staff"])]), "x-roles=admin,staff x-user=anna"),
        (require(&[("role", &["staff"]), ("user", &["anna"])]), "x-roles=admin,staff x-user=anna"),
        (require(&[("role", &["staff"]), ("user", &["bert"])]), "Lacks"),
        (require(&[("role", &["other"])]), "Lacks"),
        (require(&[("mail", &["anna"])]), "Lacks"),
    ] {
        assert_eq!(told(&guard, anna).await, expected, "{guard}");
    }
}

#[tokio::test]
async fn a_source_is_looked_at_first() {
    let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let mut guard = guard(vec![basic()]);
    guard.deny = networks(&["198.51.100.0/24"]);
    assert_eq!(told(&guard, &[("authorization", ANNA)]).await, "Source");
    guard.allow = networks(&["198.51.100.7/32"]);
    assert_eq!(told(&guard, &[("authorization", BERT)]).await, "x-user=bert");
    assert_eq!(told(&guard, &[]).await, "Missing");
    // A route may ask nothing but where one comes from.
    guard.ways.clear();
    assert_eq!(told(&guard, &[]).await, "");
}

#[tokio::test]
async fn what_was_shown_does_not_go_on() {
    let mut both = guard(vec![basic(), by_key()]);
    let anna = &[("authorization", ANNA)];
    assert_eq!(admitted(&both, anna).await.unwrap().withheld, ["authorization", "x-api-key"]);
    both.forward_credentials = true;
    assert_eq!(admitted(&both, anna).await.unwrap().withheld, [""; 0]);
}

#[tokio::test]
async fn a_refusal_says_what_could_be_shown() {
    let both = guard(vec![basic(), by_key()]);
    let Err(Refusal::Missing(challenges)) = admitted(&both, &[]).await else { panic!("let in") };
    assert_eq!(challenges, ["Basic realm=\"staff\", charset=\"UTF-8\"", "ApiKey header=\"x-api-key\""]);
}

#[tokio::test]
async fn a_token_is_one_of_the_ways() {
    let (good, old) = (bearer(NOW + 60), bearer(NOW - 60));
    let lower = good.replacen("Bearer", "bearer", 1);
    let guard = guard(vec![basic(), by_token()]);
    for (headers, expected) in [
        (&[("authorization", good.as_str())][..], "x-roles=guest x-user=carl"),
        (&[("authorization", &lower)], "x-roles=guest x-user=carl"),
        (&[("authorization", ANNA)], "x-roles=admin,staff x-user=anna"),
        (&[("authorization", &old)], "Wrong"),
        (&[("authorization", WRONG)], "Wrong"),
        (&[("authorization", &good), ("authorization", &good)], "Missing"),
        (&[("authorization", &good), ("authorization", ANNA)], "Missing"),
        (&[("authorization", &good["Bearer ".len()..])], "Missing"),
    ] {
        assert_eq!(told(&guard, headers).await, expected, "{headers:?}");
    }
    let basic = "Basic realm=\"staff\", charset=\"UTF-8\"";
    let Err(Refusal::Missing(challenges)) = admitted(&guard, &[]).await else { panic!("let in") };
    assert_eq!(challenges, [basic, "Bearer realm=\"shop\""]);
    let Err(Refusal::Wrong(challenges)) = admitted(&guard, &[("authorization", &old)]).await else {
        panic!("let in")
    };
    let bearer =
        "Bearer realm=\"shop\", error=\"invalid_token\", error_description=\"the token has expired\"";
    assert_eq!(challenges, [basic, bearer]);
}

#[tokio::test]
async fn nobody_comes_in_by_a_file_that_is_not_there() {
    let nowhere = Way::Basic { users: "nowhere".into(), realm: "staff".into() };
    let caller = &[("authorization", ANNA)];
    assert_eq!(told(&guard(vec![nowhere.clone()]), caller).await, "Unavailable");
    assert_eq!(told(&guard(vec![nowhere, by_key()]), caller).await, "Missing");
}

#[tokio::test]
async fn a_value_with_a_comma_cannot_pass_for_two() {
    let identity = Identity([("group".to_owned(), vec!["a,admin".to_owned(), "b".to_owned()])].into());
    assert_eq!(identity.values("group").len(), 2);
    let users = format!("a,b:{}", bcrypt::hash("friend", 4).unwrap());
    let files = Files::from([("users".into(), Secret::new(users))]);
    let mut map = HeaderMap::new();
    map.append("authorization", "Basic YSxiOmZyaWVuZA==".parse().unwrap());
    let caller =
        Caller { headers: &map, source: "198.51.100.7".parse().unwrap(), certificate: None, now: NOW };
    let gate = Gate::new(&guard(vec![basic()]), &files);
    assert_eq!(gate.admit(&caller, &Porter::new().unwrap(), &Alone).await.unwrap().tells, []);
}

/// Another service that answers so.
struct Answers(u16, HeaderMap);

impl Messenger for Answers {
    async fn ask(&self, pool: &str, path: &str) -> Option<Answered> {
        assert_eq!((pool, path), ("id", "/verify"));
        Some(Answered { status: self.0, headers: self.1.clone(), body: Bytes::new() })
    }
}

#[tokio::test]
async fn another_service_says_who_comes_in() {
    let claims = [("user", "x-auth-user"), ("role", "x-auth-roles")];
    let claims = claims.map(|(claim, header)| (claim.to_owned(), header.to_owned())).into();
    let forward = Way::Forward { pool: "id".into(), path: "/verify".into(), claims };
    let headers = HeaderMap::new();
    let caller =
        Caller { headers: &headers, source: "198.51.100.7".parse().unwrap(), certificate: None, now: NOW };
    let porter = Porter::new().unwrap();
    let mut said = HeaderMap::new();
    said.append("x-auth-user", "anna".parse().unwrap());
    said.append("x-auth-roles", "staff, admin".parse().unwrap());
    said.append("x-auth-roles", "owner".parse().unwrap());
    let mut guard = guard(vec![forward]);
    guard.require = [("role".to_owned(), ["owner".to_owned()].into())].into();
    let gate = Gate::new(&guard, &Files::new());
    let passport = gate.admit(&caller, &porter, &Answers(204, said.clone())).await.unwrap();
    assert_eq!(passport.user.as_deref(), Some("anna"));
    assert_eq!(passport.tells[0].1, "staff,admin,owner");
    assert_eq!(gate.admit(&caller, &porter, &Answers(200, HeaderMap::new())).await, Err(Refusal::Lacks));
    for status in [401, 403, 302, 307] {
        let found = gate.admit(&caller, &porter, &Answers(status, said.clone())).await;
        assert!(matches!(found, Err(Refusal::Told(answered)) if answered.status == status), "{status}");
    }
    for status in [304, 404, 429, 500, 503] {
        let found = gate.admit(&caller, &porter, &Answers(status, said.clone())).await;
        assert_eq!(found, Err(Refusal::Unavailable), "{status}");
    }
    assert_eq!(gate.admit(&caller, &porter, &Alone).await, Err(Refusal::Unavailable));
}

/// Whom another service does not know may not guess what the desk knows itself.
#[tokio::test]
async fn guessing_is_slowed_before_another_service_too() {
    let forward = Way::Forward { pool: "id".into(), path: "/verify".into(), claims: BTreeMap::new() };
    let mut headers = HeaderMap::new();
    headers.insert("authorization", WRONG.parse().unwrap());
    let caller =
        Caller { headers: &headers, source: "198.51.100.7".parse().unwrap(), certificate: None, now: NOW };
    let gate = Gate::new(&guard(vec![basic(), forward]), &files());
    for status in [401, 500] {
        let porter = Porter::new().unwrap();
        for _ in 0..STRIKES {
            let found = gate.admit(&caller, &porter, &Answers(status, HeaderMap::new())).await;
            assert!(matches!(found, Err(Refusal::Told(_) | Refusal::Unavailable)), "{found:?}");
        }
        let found = gate.admit(&caller, &porter, &Answers(status, HeaderMap::new())).await;
        assert!(matches!(found, Err(Refusal::Slowed(_))), "{status}: {found:?}");
    }
}

/// A token is not wrong for want of keys.
#[tokio::test]
async fn without_keys_a_token_is_neither_right_nor_wrong() {
    let Way::Jwt { rule, realm, .. } = by_token() else { panic!() };
    let fetch = Some(crate::model::guard::Fetch {
        ca: None,
        refresh: Duration::from_secs(60),
        keep: Duration::from_secs(60),
    });
    let fetched = Way::Jwt { keys: "https://id.example/".into(), form: KeyForm::Jwks, fetch, rule, realm };
    let token = bearer(NOW + 60);
    let shown = [("authorization", token.as_str())];
    for ways in [vec![fetched.clone()], vec![basic(), fetched.clone()]] {
        assert_eq!(admitted(&guard(ways), &shown).await, Err(Refusal::Unavailable));
    }
    assert!(matches!(admitted(&guard(vec![basic(), fetched]), &[]).await, Err(Refusal::Missing(_))));
}
