//! Checks that tell who is the primary, and services that want to know.

use super::{
    complaint::Places,
    read::{Fields, Node, Sink},
};
use crate::model::{
    Forward, Listen, OnNoPrimary, OnUnfit, Password, Pool, Postgres, PostgresTls, Probe, Protocol,
    ReplicaFallback, Role, Service,
};

/// `postgres = { user = "lb", database = "postgres", password_file = "/etc/lobby/lb.password", max_lag = "5s" }`.
pub(super) fn postgres(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Probe> {
    let mut fields = node.table(sink)?;
    let user = fields.require(sink, "user", "\"lb\"").and_then(|node| text(&node, sink));
    let database = fields.read(sink, "database", text);
    let env = fields.read(sink, "password_env", |node, sink| {
        let name = node.string(sink)?;
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            node.refuse(sink, "write the name of a variable, such as \"LB_POSTGRES_PASSWORD\"");
        }
        Some(name.to_owned())
    });
    let file = fields
        .read(sink, "password_file", |node, sink| text(node, sink).map(|path| (path, node.span.clone())));
    if let Some(node) = fields.get("password") {
        sink.hide(&node.span);
        sink.error(
            &node.span,
            "a password in the document would be seen by all who may read the document or ask the daemon for it",
            "write password_file = \"/etc/lobby/postgres.password\" or password_env = \"LB_POSTGRES_PASSWORD\"",
        );
    }
    let password = match (env, file) {
        (Some(_), Some((_, span))) => {
            sink.error(&span, "the password is in two places", "keep password_file or password_env");
            Password::None
        }
        (Some(name), None) => Password::Env(name),
        (None, Some((path, _))) => Password::File(path.into()),
        (None, None) => Password::None,
    };
    let tls = fields.read(sink, "tls", Node::boolean);
    let host = fields.read(sink, "host", text);
    let verify = fields.get("verify");
    let ca_file = fields.get("ca");
    for node in [&verify, &ca_file].into_iter().flatten().filter(|_| tls != Some(true)) {
        sink.error(&node.span, "there is no certificate to be verified without TLS", "add tls = true");
    }
    let verify = verify.and_then(|node| node.boolean(sink));
    let ca_file = ca_file.and_then(|node| text(&node, sink));
    let max_lag = fields.read(sink, "max_lag", Node::duration);
    fields.finish(sink);
    let tls = (tls == Some(true)).then(|| PostgresTls {
        host,
        verify: verify.unwrap_or(true),
        ca_file: ca_file.map(Into::into),
    });
    let database = database.unwrap_or_else(|| "postgres".to_owned());
    Some(Probe::Postgres(Postgres { user: user?, database, password, tls, max_lag }))
}

/// `http_role = { primary = "/primary", replica = "/replica?lag=5MB" }`.
pub(super) fn http_role(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Probe> {
    let mut fields = node.table(sink)?;
    let primary = fields.require(sink, "primary", "\"/primary\"").and_then(|node| path(&node, sink));
    let replica = fields.require(sink, "replica", "\"/replica\"").and_then(|node| path(&node, sink));
    fields.finish(sink);
    Some(Probe::HttpRole { primary: primary?, replica: replica? })
}

/// A path, with its query.
pub(super) fn path(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<String> {
    let path = node.string(sink)?;
    // RFC 9112 section 3.2.1: origin-form, without anything that would end the request line.
    if !path.starts_with('/') || !path.chars().all(|c| c.is_ascii_graphic()) {
        node.refuse(sink, "write a path that begins with / and has no spaces, such as \"/healthz\"");
    }
    Some(path.to_owned())
}

fn text(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<String> {
    let text = node.string(sink)?;
    if text.is_empty() || text.contains('\0') {
        node.refuse(sink, "write a name");
    }
    Some(text.to_owned())
}

/// What a pool wants where nobody has the role that is asked for. `tells`: its check tells roles, as far as it
/// can be read.
pub(super) fn wishes(
    fields: &mut Fields<'_>,
    tells: bool,
    sink: &mut Sink<'_>,
) -> (ReplicaFallback, OnUnfit, OnNoPrimary) {
    for key in ["replica_fallback", "on_unfit", "on_no_primary"] {
        if let Some(node) = fields.get(key).filter(|_| !tells) {
            let message = format!("{key} is for pools whose health check tells who is the primary");
            sink.error(&node.span, message, "remove it, or write health = { postgres = { user = \"lb\" } }");
        }
    }
    let fallback = fields.read(sink, "replica_fallback", |node, sink| {
        node.choice(sink, &[("primary", ReplicaFallback::Primary), ("none", ReplicaFallback::None)])
    });
    let unfit = fields.read(sink, "on_unfit", |node, sink| {
        node.choice(sink, &[("keep", OnUnfit::Keep), ("cut", OnUnfit::Cut)])
    });
    let no_primary = fields.read(sink, "on_no_primary", |node, sink| {
        if !node.is_table() {
            return node.choice(sink, &[("reset", OnNoPrimary::Reset)]);
        }
        let mut fields = node.table(sink)?;
        let longest = fields.require(sink, "hold", "\"10s\"").and_then(|node| node.duration(sink));
        fields.finish(sink);
        longest.map(OnNoPrimary::Hold)
    });
    (fallback.unwrap_or_default(), unfit.unwrap_or_default(), no_primary.unwrap_or_default())
}

/// Which of the pool's backends a service wants.
pub(super) fn role(
    fields: &mut Fields<'_>,
    forward: Forward,
    listen: Option<Listen>,
    sink: &mut Sink<'_>,
) -> Option<Role> {
    let node = fields.get("role");
    let role = node
        .as_ref()
        .and_then(|node| node.choice(sink, &[("primary", Role::Primary), ("replica", Role::Replica)]));
    let fence = fields.get("fence");
    let unfenced = fence.as_ref().and_then(|node| node.choice(sink, &[("none", ())])).is_some();
    if let Some(node) = &node {
        if listen.is_some_and(|listen| listen.protocol == Protocol::Udp) {
            sink.error(&node.span, "roles are for TCP services", "remove role, or listen on tcp");
        }
        if role == Some(Role::Primary) && forward != Forward::Nat && !unfenced {
            sink.error(
                &node.span,
                "with this way of forwarding, answers of a server that is not the primary any more pass by Lobby, which cannot cut its connections",
                "write forward = \"nat\", or fence = \"none\" if something else fences the old primary",
            );
        }
    }
    if let Some(fence) = &fence
        && !(role == Some(Role::Primary) && forward != Forward::Nat)
    {
        let remedy = "remove it; connections to a server that is not the primary any more are cut";
        sink.error(
            &fence.span,
            "fence is for services with role = \"primary\" that do not translate",
            remedy,
        );
    }
    role
}

/// A service that wants a role needs a pool whose check tells it.
pub(super) fn fits(name: &str, service: &Service, pool: &Pool, places: &Places, sink: &mut Sink<'_>) {
    let Some(role) = service.role else { return };
    if !pool.health.as_ref().is_some_and(|health| health.probe.tells_roles()) {
        let message = format!(
            "service \"{name}\" wants the {role} of pool \"{}\", whose health check does not tell who that is",
            service.pool
        );
        let remedy = "give the pool health = { postgres = { user = \"lb\" } } or health = { http_role = { primary = \"/primary\", replica = \"/replica\" }, port = 8008 }";
        sink.complaints.push(places.pool_of(name).error(message, remedy));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Document;

    const DOCUMENT: &str = r#"
interfaces = ["eth0"]
[pools.accounts]
health = { postgres = { user = "lb", password_file = "/etc/lb.password", max_lag = "5s" } }
backends = [ { address = "10.0.0.21:5432" }, { address = "10.0.0.22:5432" } ]
[services.accounts-write]
listen = "203.0.113.20:5432/tcp"
pool = "accounts"
role = "primary"
"#;

    /// What is said of the document with something in it replaced.
    fn said(from: &str, to: &str) -> String {
        assert!(DOCUMENT.contains(from), "{from}");
        match Document::parse(&DOCUMENT.replace(from, to)) {
            Ok(document) => format!("{:?}", document.warnings),
            Err(complaints) => complaints.to_string(),
        }
    }

    #[test]
    fn a_database_is_read_as_it_is_written() {
        let document = Document::parse(DOCUMENT).unwrap();
        let wanted = Probe::Postgres(Postgres {
            user: "lb".into(),
            database: "postgres".into(),
            password: Password::File("/etc/lb.password".into()),
            tls: None,
            max_lag: Some(Duration::from_secs(5)),
        });
        assert_eq!(document.config.pools["accounts"].health.as_ref().unwrap().probe, wanted);
        assert_eq!(document.config.services["accounts-write"].role, Some(Role::Primary));
        assert_eq!(document.config.pools["accounts"].on_no_primary, OnNoPrimary::Reset);
        let held = DOCUMENT.replace("backends", "on_no_primary = { hold = \"10s\" }\nbackends");
        let hold = OnNoPrimary::Hold(Duration::from_secs(10));
        assert_eq!(Document::parse(&held).unwrap().config.pools["accounts"].on_no_primary, hold);
    }

    #[test]
    fn mistakes_that_would_write_to_the_wrong_server_or_tell_a_secret_are_refused() {
        let cases = [
            ("password_file = \"/etc/lb.password\"", "password = \"secret\"", "a password in the document"),
            ("max_lag", "password_env = \"P\", max_lag", "in two places"),
            ("max_lag", "verify = false, max_lag", "without TLS"),
            (
                "postgres = { user = \"lb\", password_file = \"/etc/lb.password\", max_lag = \"5s\" }",
                "tcp = true",
                "does not tell who that is",
            ),
            ("5432/tcp", "5432/udp", "roles are for TCP"),
            (
                "role = \"primary\"",
                "role = \"primary\"\nforward = \"dsr\"",
                "which cannot cut its connections",
            ),
            ("role = \"primary\"", "role = \"replica\"\nfence = \"none\"", "fence is for"),
            ("role = \"primary\"", "role = \"primary\"\nfence = \"none\"", "fence is for"),
            ("role = \"primary\"", "role = \"master\"", "choose one of"),
            ("backends", "on_no_primary = \"wait\"\nbackends", "cannot be \"wait\""),
            ("backends", "on_no_primary = { hold = 10 }\nbackends", "has no unit"),
            ("backends", "on_no_primary = { wait = \"10s\" }\nbackends", "hold"),
            (
                "postgres = { user = \"lb\", password_file = \"/etc/lb.password\", max_lag = \"5s\" }",
                "tcp = true }\non_no_primary = { hold = \"10s\" }\non_unfit = \"cut\"\nrest = {",
                "on_no_primary is for pools whose health check tells",
            ),
        ];
        for (from, to, wanted) in cases {
            let said = said(from, to);
            assert!(said.contains(wanted), "{from} -> {to}: {said}");
            assert!(!said.contains("secret"), "{said}");
        }
        assert_eq!(
            said("role = \"primary\"", "role = \"primary\"\nforward = \"dsr\"\nfence = \"none\""),
            "[]"
        );
        assert_eq!(said("role = \"primary\"", "role = \"replica\"\nforward = \"dsr\""), "[]");
    }
}
