//! Who may come in by a route: `auth`, `require`, `identity`, `forward_credentials`, `allow`, `deny`.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::PathBuf,
    time::Duration,
};

use super::{
    complaint::{Places, Thing},
    read::{Fields, Node, Sink},
    routes::{header_name, normal, pairs},
    services::firewall,
};
use crate::{
    model::guard::{CertificateName, Fetch, Guard, KeyForm, TokenRule, Way},
    proxy::headers,
};

/// By which headers a backend is told who asks, unless the document says others: name and claim.
const TELLING: [(&str, &str); 2] = [("x-user", "user"), ("x-roles", "role")];

/// Where keys are looked for.
const KEY: &str = "x-api-key";

/// What clients are told that they are asked by.
const REALM: &str = "lobby";

/// How often keys are fetched, and for how long they hold when nothing comes any more.
const REFRESH: Duration = Duration::from_secs(300);
const LEAST_REFRESH: Duration = Duration::from_secs(10);
const KEEP: Duration = Duration::from_secs(86_400);

/// By how much clocks may differ, for tokens.
const LEEWAY: Duration = Duration::from_secs(30);

/// The same at most.
const MOST_LEEWAY: Duration = Duration::from_secs(300);

pub(super) fn guard(
    service: &str,
    number: usize,
    fields: &mut Fields<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Guard {
    let ways = fields.get("auth").map(|node| {
        let one = |node: &Node<'_>, sink: &mut Sink<'_>| way(node, sink);
        let ways = if node.is_table() {
            one(&node, sink).into_iter().map(|way| (way, node.span.clone())).collect()
        } else {
            node.list(sink, one)
        };
        if !node.is_table() && node.array(&mut Sink::new("")).is_some_and(|nodes| nodes.is_empty()) {
            let remedy = "name one, such as { basic = { users = \"staff.users\" } }, or remove auth";
            sink.error(&node.span, "auth names no way to say who one is", remedy);
        }
        twice(&ways, sink);
        ways
    });
    let asks = ways.is_some();
    let ways = ways.unwrap_or_default();
    for (at, (_, span)) in ways.iter().enumerate() {
        places.note(Thing::Way(service.to_owned(), number, at), span.clone());
    }
    for key in ["require", "identity", "forward_credentials"] {
        if let Some(node) = fields.get(key).filter(|_| !asks) {
            let message = format!("{key} is for routes that ask who one is, and this one does not");
            sink.error(
                &node.span,
                message,
                "add auth = { basic = { users = \"staff.users\" } }, or remove it",
            );
        }
    }
    let require = fields.read(sink, "require", require).unwrap_or_default();
    let identity = fields.read(sink, "identity", |node, sink| Some(identity(node, sink)));
    let default = || match asks {
        true => TELLING.map(|(name, claim)| (name.to_owned(), claim.to_owned())).into(),
        false => BTreeMap::new(),
    };
    let forward_credentials = fields.read(sink, "forward_credentials", Node::boolean).unwrap_or(false);
    let (allow, deny) = firewall(fields, None, sink);
    Guard {
        ways: ways.into_iter().map(|(way, _)| way).collect(),
        require,
        allow,
        deny,
        identity: identity.unwrap_or_else(default),
        forward_credentials,
    }
}

/// `{ basic = { users, realm } }`, `{ key = { keys, header } }` or `{ jwt = { jwks_file, … } }`.
fn way(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Way> {
    let mut fields = node.table(sink)?;
    type Read = fn(&Node<'_>, &mut Sink<'_>) -> Option<Way>;
    let kinds: [(_, Read); 5] = [
        ("basic", basic_way),
        ("key", key_way),
        ("jwt", jwt_way),
        ("certificate", certificate_way),
        ("forward", forward_way),
    ];
    let found: Vec<_> =
        kinds.into_iter().filter_map(|(name, read)| Some((fields.get(name)?, read))).collect();
    let span = fields.span.clone();
    fields.finish(sink);
    match found.as_slice() {
        [(node, read)] => read(node, sink),
        [] => {
            let remedy = "write { basic = { users = \"staff.users\" } }, { key = { keys = \"robots.keys\" } }, \
                          { jwt = { jwks_file = \"keys.json\" } }, { certificate = {} } or \
                          { forward = { pool = \"id\", path = \"/verify\" } }";
            sink.error(&span, "auth does not say how one says who one is", remedy);
            None
        }
        _ => {
            let remedy = "write a list of alternatives: auth = [{ basic = … }, { key = … }]";
            sink.error(&span, "auth asks for several things at once", remedy);
            None
        }
    }
}

/// `{ user = "dns" }`.
fn certificate_way(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Way> {
    let mut fields = node.table(sink)?;
    let user = fields.read(sink, "user", |node, sink| {
        use CertificateName::{CommonName, Dns, Email, Uri};
        node.choice(sink, &[CommonName, Dns, Email, Uri].map(|name| (name.claim(), name)))
    });
    fields.finish(sink);
    Some(Way::Certificate { user: user.unwrap_or_default() })
}

/// `{ pool = "id", path = "/verify", claims = { user = "x-auth-user" } }`.
fn forward_way(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Way> {
    let mut fields = node.table(sink)?;
    let pool = fields.require(sink, "pool", "\"id\"").and_then(|node| node.string(sink).map(str::to_owned));
    let path = fields.require(sink, "path", "\"/verify\"").and_then(|node| normal(&node, sink));
    let claims = fields.read(sink, "claims", |node, sink| Some(claims(node, sink))).unwrap_or_default();
    fields.finish(sink);
    Some(Way::Forward { pool: pool?, path: path?, claims })
}

/// Claims, each with the header that gives it.
fn claims(node: &Node<'_>, sink: &mut Sink<'_>) -> BTreeMap<String, String> {
    let Some(fields) = node.table(sink) else { return BTreeMap::new() };
    let one = |(claim, _, node): (&str, Range<usize>, Node<'_>)| {
        let header = node.string(sink).and_then(|name| header_name(name, &node.span, sink))?;
        Some((claim.to_owned(), header))
    };
    fields.named("claim").into_iter().filter_map(one).collect()
}

fn basic_way(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Way> {
    let mut fields = node.table(sink)?;
    let users =
        fields.require(sink, "users", "\"staff.users\"").and_then(|node| node.file(sink, "\"staff.users\""));
    let realm = fields.read(sink, "realm", realm);
    fields.finish(sink);
    Some(Way::Basic { users: users?, realm: realm.unwrap_or_else(|| REALM.into()) })
}

fn realm(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<String> {
    let text = node.string(sink)?;
    let fits = !text.is_empty() && text.chars().all(|c| matches!(c, ' '..='~') && c != '"' && c != '\\');
    if !fits {
        node.refuse(sink, "write some words without quotes, such as \"staff\": browsers show them");
    }
    fits.then(|| text.to_owned())
}

fn key_way(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Way> {
    let mut fields = node.table(sink)?;
    let keys =
        fields.require(sink, "keys", "\"robots.keys\"").and_then(|node| node.file(sink, "\"robots.keys\""));
    let header = fields.read(sink, "header", |node, sink| {
        let name = header_name(node.string(sink)?, &node.span, sink)?;
        if headers::is_of_framing(&name) || name == "host" {
            sink.error(&node.span, format!("{name} is no place for a key"), "write \"x-api-key\"");
            return None;
        }
        Some(name)
    });
    fields.finish(sink);
    Some(Way::Key { keys: keys?, header: header.unwrap_or_else(|| KEY.into()) })
}

fn jwt_way(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Way> {
    let mut fields = node.table(sink)?;
    let span = fields.span.clone();
    let mut files = Vec::new();
    files.extend(fields.get("jwks_url").map(|node| {
        let (address, fetch) = jwks_url(&node, sink).unzip();
        (address, KeyForm::Jwks, fetch)
    }));
    for (key, form) in
        [("jwks_file", KeyForm::Jwks), ("public_key_file", KeyForm::Pem), ("secret_file", KeyForm::Secret)]
    {
        files.extend(fields.get(key).map(|node| (node.file(sink, "\"keys.json\""), form, None)));
    }
    let issuer = fields.read(sink, "issuer", |node, sink| Some(names(node, sink))).unwrap_or_default();
    let audience = fields.read(sink, "audience", |node, sink| Some(names(node, sink))).unwrap_or_default();
    let leeway = fields.read(sink, "leeway", |node, sink| {
        let leeway = node.duration(sink)?;
        if leeway > MOST_LEEWAY {
            sink.error(&node.span, "leeway is longer than 5m", "set the clocks, and write \"30s\"");
        }
        Some(leeway)
    });
    let mut claim = |key: &'static str, default: &str| {
        let name = fields.read(sink, key, |node, sink| {
            let name = node.string(sink)?;
            if name.is_empty() {
                node.refuse(sink, "write the name of a claim; with dots, of one within another");
            }
            Some(name.to_owned())
        });
        name.unwrap_or_else(|| default.to_owned())
    };
    let (user, role) = (claim("user", "sub"), claim("role", "role"));
    let realm = fields.read(sink, "realm", realm).unwrap_or_else(|| REALM.into());
    fields.finish(sink);
    let rule = TokenRule { issuer, audience, leeway: leeway.unwrap_or(LEEWAY), user, role };
    if files.is_empty() {
        let remedy = "add jwks_url = \"https://id.example/jwks\", jwks_file = \"keys.json\", public_key_file = \"issuer.pem\" or secret_file";
        sink.error(&span, "jwt does not say by which keys tokens are known", remedy);
    }
    if files.len() > 1 {
        sink.error(&span, "jwt names several sets of keys", "keep one; a set of keys can hold them all");
    }
    let (keys, form, fetch) = files.into_iter().next()?;
    Some(Way::Jwt { keys: keys?, form, fetch, rule, realm })
}

/// An address, or `{ url, ca, refresh, keep }`.
fn jwks_url(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<(PathBuf, Fetch)> {
    let mut fetch = Fetch { ca: None, refresh: REFRESH, keep: KEEP };
    if !node.is_table() {
        return Some((address(node, sink)?, fetch));
    }
    let mut fields = node.table(sink)?;
    let url = fields.require(sink, "url", "\"https://id.example/.well-known/jwks.json\"");
    fetch.ca = fields.read(sink, "ca", |node, sink| node.file(sink, "\"id-ca.pem\""));
    fetch.refresh = fields
        .read(sink, "refresh", |node, sink| {
            let refresh = node.duration(sink)?;
            if refresh < LEAST_REFRESH {
                sink.error(
                    &node.span,
                    "refresh is shorter than 10s",
                    "write \"5m\": keys that are missed are asked for at once",
                );
            }
            Some(refresh)
        })
        .unwrap_or(REFRESH);
    fetch.keep = fields
        .read(sink, "keep", |node, sink| {
            let keep = node.duration(sink)?;
            if keep < fetch.refresh {
                sink.error(
                    &node.span,
                    "keep is shorter than refresh",
                    "write \"1d\": keys must last until they are had again",
                );
            }
            Some(keep)
        })
        .unwrap_or(KEEP.max(fetch.refresh));
    fields.finish(sink);
    Some((address(&url?, sink)?, fetch))
}

fn address(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<PathBuf> {
    let text = node.string(sink)?;
    let url = reqwest::Url::parse(text).ok().filter(reqwest::Url::has_host);
    // Addresses are shown where people look.
    let url = url.filter(|url| url.username().is_empty() && url.password().is_none());
    match url.as_ref().map(reqwest::Url::scheme) {
        Some("https") => {}
        Some("http") => {
            let remedy = "write https://, and name the authority in ca if it is your own";
            sink.warning(
                &node.span,
                "keys are fetched in clear text: whoever is between can put theirs",
                remedy,
            );
        }
        _ => {
            node.refuse(sink, "write an address such as \"https://id.example/.well-known/jwks.json\"");
            return None;
        }
    }
    Some(text.into())
}

/// A name or several.
fn names(node: &Node<'_>, sink: &mut Sink<'_>) -> BTreeSet<String> {
    let one = |node: &Node<'_>, sink: &mut Sink<'_>| {
        let name = node.string(sink)?;
        if name.is_empty() {
            node.refuse(sink, "write it as it stands in the tokens, or remove it");
        }
        Some(name.to_owned())
    };
    if node.value().is_str() {
        return one(node, sink).into_iter().collect();
    }
    if node.array(&mut Sink::new("")).is_some_and(|nodes| nodes.is_empty()) {
        node.refuse(sink, "name those that may stand in tokens, or remove it");
    }
    node.list(sink, one).into_iter().map(|(name, _)| name).collect()
}

fn twice(ways: &[(Way, Range<usize>)], sink: &mut Sink<'_>) {
    for (number, (way, span)) in ways.iter().enumerate() {
        let same = |(other, _): &(Way, _)| other.name() == way.name() && other.header() == way.header();
        if ways[..number].iter().any(same) {
            let place = way.header().map_or(String::new(), |header| format!(" in {header}"));
            let message = format!("{} is asked for{place} twice", way.name());
            sink.error(span, message, "keep one of them; all who may come in can be in one file");
        }
        if matches!(way, Way::Forward { .. }) && number + 1 < ways.len() {
            let remedy = "put it last: what it answers is what its client gets";
            sink.error(span, "forward is not the last way to say who one is", remedy);
        }
    }
}

/// Claims, each with a value or several.
fn require(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<BTreeMap<String, BTreeSet<String>>> {
    let fields = node.table(sink)?;
    let mut claims = BTreeMap::new();
    for (name, _, node) in fields.named("claim") {
        let one = |node: &Node<'_>, sink: &mut Sink<'_>| node.string(sink).map(str::to_owned);
        let values: BTreeSet<String> = match node.value().is_str() {
            true => one(&node, sink).into_iter().collect(),
            false => node.list(sink, one).into_iter().map(|(value, _)| value).collect(),
        };
        if values.is_empty() && node.array(&mut Sink::new("")).is_some_and(|nodes| nodes.is_empty()) {
            let message = format!("require names no value of {name}: nobody could come in");
            sink.error(&node.span, message, "name those that may, or remove it");
        }
        claims.insert(name.to_owned(), values);
    }
    Some(claims)
}

/// Headers, each with its claim.
fn identity(node: &Node<'_>, sink: &mut Sink<'_>) -> BTreeMap<String, String> {
    let pairs = pairs(node, sink);
    for name in pairs.keys() {
        let other = ["host", "authorization", "cookie", "content-type"].contains(&name.as_str())
            || name.starts_with("x-forwarded-")
            || headers::is_of_framing(name);
        if other {
            let message = format!("{name} says something else to a server than who asks");
            sink.error(&node.span, message, "write a name of its own, such as x-user");
        }
    }
    pairs
}
