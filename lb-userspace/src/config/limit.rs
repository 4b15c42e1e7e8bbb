//! `limits` of a route: how often requests may come.

use std::time::Duration;

use super::{
    read::{Fields, Node, Sink},
    routes::header_name,
};
use crate::model::limit::{LimitBy, RateLimit};

/// The limits of a route; `asks`: it asks who one is.
pub(super) fn limits(fields: &mut Fields<'_>, asks: bool, sink: &mut Sink<'_>) -> Vec<RateLimit> {
    let Some(node) = fields.get("limits") else { return Vec::new() };
    let one = |node: &Node<'_>, sink: &mut Sink<'_>| limit(node, asks, sink);
    if node.is_table() {
        return one(&node, sink).into_iter().collect();
    }
    if node.array(&mut Sink::new("")).is_some_and(|nodes| nodes.is_empty()) {
        sink.error(&node.span, "limits names no limit", "write { rate = \"100/s\" }, or remove it");
    }
    let found = node.list(sink, one);
    for (number, (limit, span)) in found.iter().enumerate() {
        if found[..number].iter().any(|(other, _)| other.by == limit.by && other.period == limit.period) {
            sink.error(span, "there is a limit by the same in the same time already", "keep one of them");
        }
    }
    found.into_iter().map(|(limit, _)| limit).collect()
}

/// `{ rate = "100/s", burst = 200, by = "source" }`.
fn limit(node: &Node<'_>, asks: bool, sink: &mut Sink<'_>) -> Option<RateLimit> {
    let mut fields = node.table(sink)?;
    let rate = fields.require(sink, "rate", "\"100/s\"").and_then(|node| rate(&node, sink));
    let burst = fields.read(sink, "burst", |node, sink| node.integer(sink, 1..=1_000_000));
    let by = fields.read(sink, "by", |node, sink| by(node, asks, sink));
    fields.finish(sink);
    let (count, period) = rate?;
    Some(RateLimit { count, period, burst: burst.unwrap_or(count), by: by.unwrap_or(LimitBy::Source) })
}

fn rate(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<(u32, Duration)> {
    let text = node.string(sink)?;
    let read = || {
        let (count, unit) = text.split_once('/')?;
        let seconds = match unit.trim() {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return None,
        };
        let count = count.trim().parse::<u32>().ok().filter(|count| (1..=1_000_000).contains(count))?;
        Some((count, Duration::from_secs(seconds)))
    };
    let rate = read();
    if rate.is_none() {
        node.refuse(sink, "write how many in which time: \"100/s\", \"30/m\", \"5000/h\"");
    }
    rate
}

fn by(node: &Node<'_>, asks: bool, sink: &mut Sink<'_>) -> Option<LimitBy> {
    if node.is_table() {
        let mut fields = node.table(sink)?;
        let header = fields.require(sink, "header", "\"x-api-key\"");
        fields.finish(sink);
        let header = header?;
        return header_name(header.string(sink)?, &header.span, sink).map(LimitBy::Header);
    }
    let all = [("source", &LimitBy::Source), ("user", &LimitBy::User), ("route", &LimitBy::Route)];
    let by = node.choice(sink, &all)?;
    if *by == LimitBy::User && !asks {
        let remedy = "add auth = { basic = { users = \"staff.users\" } }, or write by = \"source\"";
        sink.error(&node.span, "nobody knows the user here: the route does not ask who one is", remedy);
    }
    Some(by.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Document;

    fn document(route: &str) -> String {
        format!(
            "interfaces = [\"eth0\"]\n[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\n\
             routes = [ {{ respond = 404, {route} }} ]\n"
        )
    }

    #[test]
    fn limits_are_read_as_they_are_written() {
        let of = |route: &str| {
            let document = Document::parse(&document(route)).unwrap();
            let (_, _, desk) = document.config.at_desk().next().unwrap();
            desk.routes[0].limits.clone()
        };
        let limit =
            |count, seconds, burst, by| RateLimit { count, period: Duration::from_secs(seconds), burst, by };
        assert_eq!(of("limits = { rate = \"100/s\" }"), [limit(100, 1, 100, LimitBy::Source)]);
        assert_eq!(
            of("limits = [ { rate = \"30/m\", burst = 5, by = \"route\" }, \
                { rate = \"9/h\", by = { header = \"X-Api-Key\" } }, { rate = \"2/s\", by = \"user\" } ], \
                auth = { basic = { users = \"u\" } }"),
            [
                limit(30, 60, 5, LimitBy::Route),
                limit(9, 3600, 9, LimitBy::Header("x-api-key".into())),
                limit(2, 1, 2, LimitBy::User)
            ]
        );
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for (limits, wanted) in [
            ("[]", "limits names no limit"),
            ("{ burst = 5 }", "rate"),
            ("{ rate = \"100\" }", "write how many in which time"),
            ("{ rate = \"0/s\" }", "write how many in which time"),
            ("{ rate = \"5/d\" }", "write how many in which time"),
            ("{ rate = \"5/s\", burst = 0 }", "burst"),
            ("[ { rate = \"5/s\" }, { rate = \"9/s\" } ]", "already"),
            ("{ rate = \"5/s\", by = \"moon\" }", "cannot be \"moon\""),
            ("{ rate = \"5/s\", by = \"user\" }", "does not ask who one is"),
            ("{ rate = \"5/s\", by = { header = \"a b\" } }", "no name of a header"),
        ] {
            let refused = Document::parse(&document(&format!("limits = {limits}"))).unwrap_err();
            assert!(refused.to_string().contains(wanted), "{limits}: {refused}");
        }
    }
}
