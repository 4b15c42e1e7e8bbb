//! What a document would change at the reception desk, in words: how services are served, where their routes lead, and who is in
//! the pools. What is in the files that it names is not compared.

use std::{collections::BTreeMap, fmt::Display};

use crate::model::{
    Admin, Backend, Config, Pool, Service,
    desk::{Desk, Route},
};

/// All that is different, in the order in which a reader looks for it.
pub fn at_desk(before: &Config, after: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    changes("service", served(before), served(after), &mut lines, |(was, its), (is, new)| {
        named([
            ("where it listens", was.listen != is.listen),
            ("sources", (&was.allow, &was.deny) != (&is.allow, &is.deny)),
            ("certificates", its.certificates != new.certificates),
            ("certificates of clients", its.clients != new.clients),
            ("names that are handed on", its.passthrough != new.passthrough),
            ("time-outs", its.timeouts != new.timeouts),
            ("access log", its.access_log != new.access_log),
            ("pages", its.pages != new.pages),
            ("proxies before it", of_proxies(its) != of_proxies(new)),
        ])
    });
    changes("route", routes(before), routes(after), &mut lines, |was: &Route, is: &Route| {
        let (old, new) = (was.action.to_string(), is.action.to_string());
        let mut what = if old == new { Vec::new() } else { vec![turned(old, new)] };
        what.extend(named([
            ("what becomes of a request on its way", what.is_empty() && was.action != is.action),
            ("who may come in", was.guard != is.guard),
            ("how often requests may come", was.limits != is.limits),
            ("headers of answers", was.response_headers != is.response_headers),
        ]));
        what
    });
    changes("pool", used(before), used(after), &mut lines, |was: &Pool, is: &Pool| {
        let mut what = Vec::new();
        changes("", by_address(was), by_address(is), &mut what, |was: &Backend, is: &Backend| {
            let mut what = Vec::new();
            if was.weight != is.weight {
                what.push(format!("weight {}", turned(was.weight, is.weight)));
            }
            if was.admin != is.admin {
                what.push(turned(admin(was.admin), admin(is.admin)));
            }
            what
        });
        let others = |pool: &Pool| Pool { backends: Vec::new(), health: None, ..pool.clone() };
        what.extend(named([
            ("its health check", was.health != is.health),
            ("its other settings", others(was) != others(is)),
        ]));
        what
    });
    lines
}

fn served(config: &Config) -> BTreeMap<&str, (&Service, &Desk)> {
    config.at_desk().map(|(name, service, desk)| (name.as_str(), (service, desk))).collect()
}

fn routes(config: &Config) -> BTreeMap<String, &Route> {
    let routes = config.at_desk().flat_map(|(name, _, desk)| desk.routes.iter().map(move |it| (name, it)));
    routes.map(|(name, route)| (format!("{} of {name}", route.condition), route)).collect()
}

/// The pools that the desk has to do with.
fn used(config: &Config) -> BTreeMap<&str, &Pool> {
    let names = config.at_desk().flat_map(|(_, _, desk)| desk.pools());
    names.filter_map(|name| Some((name, config.pools.get(name)?))).collect()
}

fn by_address(pool: &Pool) -> BTreeMap<String, &Backend> {
    pool.backends.iter().map(|backend| (backend.address.to_string(), backend)).collect()
}

/// Only what is said of proxies.
fn of_proxies(desk: &Desk) -> Desk {
    Desk {
        proxies: desk.proxies.clone(),
        proxy_header: desk.proxy_header,
        proxy_host: desk.proxy_host,
        proxy_request_id: desk.proxy_request_id,
        proxy_protocol: desk.proxy_protocol,
        ..Desk::default()
    }
}

/// A line for each that is new, gone, or different.
fn changes<K: Ord + Display, V>(
    kind: &str,
    mut before: BTreeMap<K, V>,
    after: BTreeMap<K, V>,
    lines: &mut Vec<String>,
    differs: impl Fn(V, V) -> Vec<String>,
) {
    let kind = if kind.is_empty() { String::new() } else { format!("{kind} ") };
    for (name, is) in after {
        match before.remove(&name) {
            None => lines.push(format!("add {kind}{name}")),
            Some(was) => {
                let what = differs(was, is);
                if !what.is_empty() {
                    lines.push(format!("change {kind}{name}: {}", what.join(", ")));
                }
            }
        }
    }
    lines.extend(before.into_keys().map(|name| format!("remove {kind}{name}")));
}

fn named<const N: usize>(all: [(&str, bool); N]) -> Vec<String> {
    all.into_iter().filter(|(_, is)| *is).map(|(name, _)| name.to_owned()).collect()
}

fn turned(was: impl Display, is: impl Display) -> String {
    format!("{was}, now {is}")
}

fn admin(admin: Admin) -> &'static str {
    match admin {
        Admin::Enabled => "enabled",
        Admin::Drain { .. } => "drained",
        Admin::Disabled => "disabled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Document;

    const BEFORE: &str = r#"interfaces = ["eth0"]
[pools.web]
backends = [ { address = "10.0.0.11:80" }, { address = "10.0.0.12:80" } ]
[pools.pay]
backends = [ { address = "10.0.0.21:80" } ]
[services.shop]
listen = "203.0.113.10:80/tcp"
routes = [ { path = "/pay", pool = "pay" }, { path = "/old", respond = 410 }, { pool = "web" } ]
[services.tcp]
listen = "203.0.113.10:81/tcp"
pool = "web"
"#;

    fn changed(turns: &[(&str, &str)]) -> Vec<String> {
        let mut after = BEFORE.to_owned();
        for (from, to) in turns {
            assert!(after.contains(from), "{from}");
            after = after.replacen(from, to, 1);
        }
        let config = |text: &str| Document::parse(text).unwrap().config;
        at_desk(&config(BEFORE), &config(&after))
    }

    #[test]
    fn what_is_different_at_the_desk_is_named() {
        type Turns<'t> = &'t [(&'t str, &'t str)];
        let table: [(Turns<'_>, &[&str]); 9] = [
            (&[], &[]),
            // No affair of the desk.
            (&[("10:81/tcp", "10:82/tcp")], &[]),
            (&[("10:80/tcp", "11:80/tcp")], &["change service shop: where it listens"]),
            (
                &[("routes = [", "timeouts = { body = \"5s\" }\naccess_log = true\nroutes = [")],
                &["change service shop: time-outs, access log"],
            ),
            (
                &[
                    ("respond = 410", "pool = \"pay\""),
                    ("{ path = \"/pay\", pool = \"pay\" }", "{ path = \"/bill\", pool = \"pay\" }"),
                ],
                &[
                    "add route */bill/* of shop",
                    "change route */old/* of shop: respond 410, now pool pay",
                    "remove route */pay/* of shop",
                ],
            ),
            (
                &[("path = \"/pay\"", "allow = [\"10.0.0.0/8\"], path = \"/pay\"")],
                &["change route */pay/* of shop: who may come in"],
            ),
            (
                &[
                    ("\"10.0.0.12:80\"", "\"10.0.0.13:80\", weight = 3"),
                    ("10.0.0.11:80\"", "10.0.0.11:80\", drain = true"),
                ],
                &[
                    "change pool web: change 10.0.0.11:80: enabled, now drained, add 10.0.0.13:80, remove 10.0.0.12:80",
                ],
            ),
            (
                &[("[pools.pay]", "[pools.pay]\nhealth = { tcp = true }\nprotocol = \"h2\"")],
                &["change pool pay: its health check, its other settings"],
            ),
            (
                &[(
                    "[services.tcp]",
                    "[services.more]\nlisten = \"203.0.113.10:82/tcp\"\nroutes = [ { pool = \"pay\" } ]\n[services.tcp]",
                )],
                &["add service more", "add route */* of more"],
            ),
        ];
        for (turns, lines) in table {
            assert_eq!(changed(turns), lines, "{turns:?}");
        }
    }
}
