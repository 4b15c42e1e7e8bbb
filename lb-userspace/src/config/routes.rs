//! Routes of a service: which requests, and what becomes of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    str::FromStr,
};

use super::{
    complaint::{Places, Thing},
    guard::guard,
    limit::limits,
    read::{Fields, Node, Sink},
};
use crate::{
    model::desk::{
        Action, Condition, DeskTimeouts, Elsewhere, HeaderEdits, HostPattern, PathPattern, Route, Sticky,
    },
    proxy::{
        headers, path,
        route::{host_name, is_name},
    },
};

/// Where a client is sent by default: for good, and with the same method (RFC 9110 section 15.4.9).
const REDIRECT: u16 = 308;

/// The routes of a service, with their places.
pub(super) fn routes(
    service: &str,
    node: &Node<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Vec<(Route, Range<usize>)> {
    let mut routes = Vec::new();
    for node in node.array(sink).unwrap_or_default() {
        // A table made by [[…]] spans its head alone or all of it; its first line is what is meant.
        let span = node.span.clone();
        if let Some(route) = route(service, routes.len(), &node, sink, places) {
            routes.push((route, span));
        }
    }
    if routes.is_empty() && node.array(&mut Sink::new("")).is_some_and(|nodes| nodes.is_empty()) {
        sink.error(&node.span, "routes names no route", "add { path = \"/\", pool = \"web\" }");
    }
    routes
}

fn route(
    service: &str,
    number: usize,
    node: &Node<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Option<Route> {
    let mut fields = node.table(sink)?;
    let host = fields.read(sink, "host", |node, sink| {
        places.note(Thing::HostOfRoute(service.to_owned(), number), node.span.clone());
        host(node, sink)
    });
    let host = host.unwrap_or(HostPattern::Any);
    let path = paths(&mut fields, sink);
    let methods = fields.read(sink, "method", methods).unwrap_or_default();
    let headers = fields.read(sink, "header", |node, sink| Some(pairs(node, sink))).unwrap_or_default();
    let condition = Condition { host, path: path?, methods, headers };
    let action = action(&mut fields, &condition, sink, |span| {
        places.note(Thing::PoolOfRoute(service.to_owned(), number), span);
    });
    let guard = guard(service, number, &mut fields, sink, places);
    let limits = limits(&mut fields, !guard.ways.is_empty(), sink);
    let response_headers = fields.read(sink, "response_headers", edits).unwrap_or_default();
    fields.later(&[("timeouts", "write it in the service, where it holds for all routes")]);
    fields.finish(sink);
    Some(Route { condition, guard, limits, action: action?, response_headers })
}

/// A name, or `*.` and a name.
fn host(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<HostPattern> {
    let text = node.string(sink)?;
    if text == "*" {
        node.refuse(sink, "remove it: without host a route is for all");
        return None;
    }
    host_pattern(text, &node.span, sink)
}

/// What hosts a text means.
pub(super) fn host_pattern(text: &str, span: &Range<usize>, sink: &mut Sink<'_>) -> Option<HostPattern> {
    let mut refuse = |remedy: String| sink.error(span, format!("host \"{text}\" is not understood"), remedy);
    if let Some(below) = text.strip_prefix("*.") {
        if is_name(below) {
            return Some(HostPattern::Below(below.to_ascii_lowercase()));
        }
    } else if let Some(name) = host_name(text) {
        if name.len() == text.strip_suffix('.').unwrap_or(text).len() {
            return Some(HostPattern::Exact(name));
        }
        refuse(format!("write \"{name}\": routes do not depend on the port"));
        return None;
    }
    refuse("write a name such as \"shop.example\", or \"*.shop.example\" for all below it".to_owned());
    None
}

fn paths(fields: &mut Fields<'_>, sink: &mut Sink<'_>) -> Option<PathPattern> {
    let both = fields.has("path") && fields.has("exact_path");
    let prefix = fields.get("path");
    let exact = fields.get("exact_path");
    if let (true, Some(node)) = (both, &exact) {
        let remedy = "keep path for it and all below it, or exact_path for it alone";
        sink.error(&node.span, "the route has both path and exact_path", remedy);
    }
    match (prefix, exact) {
        (_, Some(node)) => normal(&node, sink).map(PathPattern::Exact),
        (Some(node), None) => {
            let path = normal(&node, sink)?;
            // "/pay/" and "/pay" mean the same, and are to be one.
            let bare = path.strip_suffix('/').filter(|bare| !bare.is_empty()).map(str::to_owned);
            Some(PathPattern::Prefix(bare.unwrap_or(path)))
        }
        (None, None) => Some(PathPattern::Prefix("/".into())),
    }
}

/// A path, which has to be written as all paths are read.
pub(super) fn normal(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<String> {
    let text = node.string(sink)?;
    match path::normalise(text) {
        Ok(normal) if normal == text => Some(normal),
        Ok(normal) => {
            node.refuse(sink, format!("write \"{normal}\", as paths are brought into one form first"));
            None
        }
        Err(why) => {
            node.refuse(sink, format!("{why}; write a path such as \"/pay\""));
            None
        }
    }
}

/// One method or a list of them.
fn methods(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<BTreeSet<String>> {
    let one = |node: &Node<'_>, sink: &mut Sink<'_>| {
        let text = node.string(sink)?;
        let fits = http::Method::from_str(text).is_ok() && !text.chars().any(|c| c.is_ascii_lowercase());
        if !fits {
            node.refuse(sink, "write a method in capitals, such as \"GET\"");
        }
        fits.then(|| text.to_owned())
    };
    if node.value().is_str() {
        return Some(BTreeSet::from([one(node, sink)?]));
    }
    let methods: BTreeSet<String> = node.list(sink, one).into_iter().map(|(method, _)| method).collect();
    Some(methods)
}

/// Names of headers and their values.
pub(super) fn pairs(node: &Node<'_>, sink: &mut Sink<'_>) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    let Some(fields) = node.table(sink) else { return pairs };
    for (name, span, node) in fields.named("header") {
        let known = header_name(name, &span, sink);
        let Some(value) = node.string(sink) else { continue };
        if http::HeaderValue::from_str(value).is_err() {
            node.refuse(sink, "write a value without control characters");
        } else if let Some(name) = known {
            pairs.insert(name, value.to_owned());
        }
    }
    pairs
}

pub(super) fn header_name(name: &str, span: &Range<usize>, sink: &mut Sink<'_>) -> Option<String> {
    let Ok(parsed) = http::HeaderName::from_str(name) else {
        sink.error(span, format!("\"{name}\" is no name of a header"), "write a name such as \"x-version\"");
        return None;
    };
    Some(parsed.as_str().to_owned())
}

fn edits(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<HeaderEdits> {
    let mut fields = node.table(sink)?;
    let set = fields.read(sink, "set", |node, sink| Some(pairs(node, sink))).unwrap_or_default();
    let add = fields.read(sink, "add", |node, sink| Some(pairs(node, sink))).unwrap_or_default();
    let remove = fields.get("remove").map(|node| {
        let read = |node: &Node<'_>, sink: &mut Sink<'_>| {
            let name = node.string(sink)?;
            header_name(name, &node.span, sink)
        };
        node.list(sink, read).into_iter().map(|(name, _)| name).collect::<BTreeSet<String>>()
    });
    let span = fields.span.clone();
    fields.finish(sink);
    let remove = remove.unwrap_or_default();
    for name in set.keys().chain(add.keys()).chain(&remove) {
        if headers::is_of_framing(name) {
            let message = format!("{name} belongs to the connection, and the desk writes it itself");
            sink.error(&span, message, "leave it out");
        }
    }
    Some(HeaderEdits { remove, set, add })
}

/// One of `pool`, `redirect`, `respond`.
fn action(
    fields: &mut Fields<'_>,
    condition: &Condition,
    sink: &mut Sink<'_>,
    pool_at: impl FnOnce(Range<usize>),
) -> Option<Action> {
    let kinds: Vec<_> = ["pool", "redirect", "respond"].into_iter().filter(|kind| fields.has(kind)).collect();
    let (pool, redirect, respond) = (fields.get("pool"), fields.get("redirect"), fields.get("respond"));
    let (strip, rewrite) = (fields.get("strip_prefix"), fields.get("rewrite"));
    let headers = fields.get("headers");
    let sticky = fields.get("sticky");
    if kinds.len() != 1 {
        let message = match kinds.as_slice() {
            [] => "the route does not say what becomes of its requests".to_owned(),
            several => format!("the route has {} at once", several.join(" and ")),
        };
        let remedy = "write one of pool = \"web\", redirect = \"https\", respond = { status = 404 }";
        sink.error(&fields.span, message, remedy);
        return None;
    }
    let Some(pool) = pool else {
        for node in [strip, rewrite, headers, sticky].into_iter().flatten() {
            let message = format!("{} is for what a backend gets, and this route has none", node.name());
            sink.error(&node.span, message, "remove it, or name a pool");
        }
        let redirect = redirect.and_then(|node| self::redirect(&node, sink));
        return redirect.or(respond.and_then(|node| self::respond(&node, sink)));
    };
    pool_at(pool.span.clone());
    if let (Some(_), Some(node)) = (&strip, &rewrite) {
        let remedy = "keep rewrite alone; strip_prefix = true is the same as rewrite = \"/\"";
        sink.error(&node.span, "the route has both strip_prefix and rewrite", remedy);
    }
    let strip = strip.and_then(|node| {
        let strip = node.boolean(sink)?;
        if strip && matches!(condition.path, PathPattern::Exact(_)) {
            let message = "there is nothing below an exact path";
            sink.error(&node.span, message, "write path instead of exact_path, or remove strip_prefix");
        }
        strip.then(|| "/".to_owned())
    });
    Some(Action::Forward {
        pool: pool.string(sink)?.to_owned(),
        rewrite: rewrite.and_then(|node| normal(&node, sink)).or(strip),
        sticky: sticky.and_then(|node| self::sticky(&node, sink)),
        headers: headers.and_then(|node| edits(&node, sink)).unwrap_or_default(),
    })
}

/// `"source"`, `{ header = "x-user" }` or `{ cookie = "lobby" }`.
fn sticky(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Sticky> {
    if !node.is_table() {
        return node.choice(sink, &[("source", &Sticky::Source)]).cloned();
    }
    let mut fields = node.table(sink)?;
    let (header, cookie) = (fields.get("header"), fields.get("cookie"));
    let span = fields.span.clone();
    fields.finish(sink);
    match (header, cookie) {
        (Some(node), None) => header_name(node.string(sink)?, &node.span, sink).map(Sticky::Header),
        (None, Some(node)) => {
            let name = node.string(sink)?;
            // RFC 6265 section 4.1.1: a token, as names of headers are.
            let fits = http::HeaderName::from_str(name).is_ok();
            if !fits {
                node.refuse(sink, "write a name for the cookie, such as \"lobby\"");
            }
            fits.then(|| Sticky::Cookie(name.to_owned()))
        }
        _ => {
            let remedy = "write one of \"source\", { header = \"x-user\" }, { cookie = \"lobby\" }";
            sink.error(&span, "sticky does not say by what", remedy);
            None
        }
    }
}

/// `"https"`, an address, or `{ to, status }`.
fn redirect(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Action> {
    if !node.is_table() {
        return Some(Action::Redirect { status: REDIRECT, to: elsewhere(node, sink)? });
    }
    let mut fields = node.table(sink)?;
    let to = fields.require(sink, "to", "\"https\"");
    let status = fields.read(sink, "status", |node, sink| {
        let status = node.integer(sink, 300..=399)?;
        let known = [301, 302, 303, 307, 308].contains(&status);
        if !known {
            node.refuse(
                sink,
                "write 308 (for good) or 307 (for now); 301, 302 and 303 may turn a POST into a GET",
            );
        }
        u16::try_from(status).ok().filter(|_| known)
    });
    fields.finish(sink);
    Some(Action::Redirect { status: status.unwrap_or(REDIRECT), to: elsewhere(&to?, sink)? })
}

fn elsewhere(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Elsewhere> {
    let text = node.string(sink)?;
    if text == "https" {
        return Some(Elsewhere::Https);
    }
    let uri = http::Uri::from_str(text).ok().filter(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.authority().is_some_and(|authority| host_name(authority.as_str()).is_some())
    });
    let Some(uri) = uri else {
        node.refuse(sink, "write \"https\", a host such as \"https://shop.example\", or a whole address");
        return None;
    };
    // "https://shop.example" and "https://shop.example/" are the same to a Uri, not to who wrote them.
    let host_alone = uri.path_and_query().is_none_or(|path| path.as_str() == "/") && !text.ends_with('/');
    Some(if host_alone { Elsewhere::Host(text.to_owned()) } else { Elsewhere::Url(text.to_owned()) })
}

/// A status, or `{ status, body, type }`.
fn respond(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Action> {
    let status = |node: &Node<'_>, sink: &mut Sink<'_>| u16::try_from(node.integer(sink, 200..=599)?).ok();
    const TEXT: &str = "text/plain; charset=utf-8";
    if !node.is_table() {
        return Some(Action::Respond {
            status: status(node, sink)?,
            body: String::new(),
            content_type: TEXT.into(),
        });
    }
    let mut fields = node.table(sink)?;
    let code = fields.read(sink, "status", status).unwrap_or(200);
    let body = fields.read(sink, "body", |node, sink| node.string(sink).map(str::to_owned));
    let content_type = fields.read(sink, "type", |node, sink| {
        let text = node.string(sink)?;
        if http::HeaderValue::from_str(text).is_err() || !text.contains('/') {
            node.refuse(sink, "write a media type, such as \"text/html; charset=utf-8\"");
        }
        Some(text.to_owned())
    });
    fields.finish(sink);
    Some(Action::Respond {
        status: code,
        body: body.unwrap_or_default(),
        content_type: content_type.unwrap_or_else(|| TEXT.into()),
    })
}

/// How long things may take at the desk.
pub(super) fn timeouts(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<DeskTimeouts> {
    let mut fields = node.table(sink)?;
    let otherwise = DeskTimeouts::default();
    let mut read = |key, or| fields.read(sink, key, Node::duration).unwrap_or(or);
    let timeouts = DeskTimeouts {
        header: read("header", otherwise.header),
        connect: read("connect", otherwise.connect),
        response: read("response", otherwise.response),
        body: read("body", otherwise.body),
        websocket: read("websocket", otherwise.websocket),
    };
    fields.finish(sink);
    Some(timeouts)
}

/// Routes that some request meets alike are refused, each pair with both lines.
pub(super) fn check_apart(routes: &[(Route, Range<usize>)], sink: &mut Sink<'_>) {
    for (number, (route, span)) in routes.iter().enumerate() {
        let before =
            routes[..number].iter().find(|(other, _)| other.condition.is_confusable(&route.condition));
        if let Some((other, other_span)) = before {
            let line = sink.line(other_span);
            let message = format!(
                "{} cannot be told apart from the route on line {line}, {}: a request may meet both, and neither is narrower",
                route.condition, other.condition
            );
            sink.error(span, message, "give one of them another host, path, method or header, or remove it");
        }
    }
}

#[cfg(test)]
mod tests;
