//! What a document says at its top: interfaces, sizes, time-outs, sources.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use super::{
    complaint::{Places, Thing},
    read::{Fields, Node, Sink},
};
use crate::model::{Idle, Limits, PortRange, Settings};

/// Resets a second and CPU where the document does not say.
const RESETS_PER_SECOND: u32 = 1000;

/// Longest name of an interface (IFNAMSIZ less the final zero, linux/if.h).
const LONGEST_INTERFACE: usize = 15;

pub(super) fn interfaces(root: &mut Fields<'_>, sink: &mut Sink<'_>, places: &mut Places) -> Vec<String> {
    let Some(node) = root.require(sink, "interfaces", "[\"eth0\"]") else {
        return Vec::new();
    };
    let mut seen = BTreeSet::new();
    for (name, span) in node.list(sink, |item, sink| item.string(sink).map(str::to_owned)) {
        let bad = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        if name.is_empty() || name.len() > LONGEST_INTERFACE || name.contains(bad) {
            sink.error(
                &span,
                format!("\"{name}\" is no name of an interface"),
                "write a name as `ip link` shows it, such as \"eth0\"",
            );
        } else if !seen.insert(name.clone()) {
            sink.error(&span, format!("interface \"{name}\" is listed twice"), "remove one of the two");
        }
        places.note(Thing::Interface(name), span);
    }
    if seen.is_empty() {
        sink.error(
            &node.span,
            "no interface is listed",
            "name at least one by which packets come, such as [\"eth0\"]",
        );
    }
    let order = node.array(&mut Sink::new("")).unwrap_or_default();
    let order = order.iter().filter_map(|item| item.value().as_str());
    let mut left = seen.clone();
    order.filter(|name| left.remove(*name)).map(str::to_owned).collect()
}

pub(super) fn settings(root: &mut Fields<'_>, sink: &mut Sink<'_>, places: &mut Places) -> Settings {
    let limits = root.read(sink, "limits", |node, sink| Some(limits(node.table(sink)?, sink)));
    let idle = root.read(sink, "timeouts", |node, sink| Some(timeouts(node.table(sink)?, sink)));
    let sources = sources(root, sink, places);
    let ports = root.read(sink, "ports", |node, sink| {
        let ports: PortRange = node.parsed(sink)?;
        if ports.low < 1024 {
            sink.warning(
                &node.span,
                format!("ports {ports} reach below 1024, where the host's own servers listen"),
                "choose a range above 1023 and outside net.ipv4.ip_local_port_range",
            );
        }
        Some(ports)
    });
    let resets = root.read(sink, "resets_per_second", |node, sink| node.integer(sink, 0..=10_000_000));
    let metrics = root.read(sink, "metrics", |node, sink| {
        places.note(Thing::Metrics, node.span.clone());
        let text = node.string(sink)?;
        match text.parse::<SocketAddr>() {
            Ok(address) if !address.ip().is_loopback() => {
                let remedy = format!(
                    "write \"127.0.0.1:{}\" and let a proxy with authentication offer it",
                    address.port()
                );
                sink.error(&node.span, format!("metrics on {address} could be read from outside"), remedy);
                None
            }
            Ok(address) if address.port() == 0 => {
                node.refuse(sink, "name the port, such as \"127.0.0.1:9110\"");
                None
            }
            Ok(address) => Some(address),
            Err(_) => {
                node.refuse(sink, "write a loopback address and a port, such as \"127.0.0.1:9110\"");
                None
            }
        }
    });
    Settings {
        limits: limits.unwrap_or_default(),
        idle: idle.unwrap_or_default(),
        sources,
        ports: ports.unwrap_or_default(),
        resets_per_second: resets.unwrap_or(RESETS_PER_SECOND),
        metrics,
    }
}

/// Names of pools and services: they become labels of metrics and arguments of commands.
pub(super) fn check_name(name: &str, span: &Range<usize>, sink: &mut Sink<'_>) {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 63 || !name.chars().all(good) || name.starts_with('-') {
        sink.error(
            span,
            format!("\"{name}\" is no name"),
            "use 1 to 63 letters, digits, \"-\", \"_\" and \".\", not beginning with \"-\"",
        );
    }
}

/// An address of one host: what nobody can send to or from is refused.
pub(super) fn check_unicast(address: IpAddr, what: &str, span: &Range<usize>, sink: &mut Sink<'_>) -> bool {
    let wrong = match address {
        IpAddr::V4(v4) if v4.is_unspecified() => "stands for every address",
        IpAddr::V4(v4) if v4.is_broadcast() => "is the broadcast address",
        IpAddr::V6(v6) if v6.is_unspecified() => "stands for every address",
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => "is an IPv4 address in disguise",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            "is link-local and means nothing without its interface"
        }
        _ if address.is_multicast() => "is a group's",
        _ if address.is_loopback() => "never leaves a host",
        _ => return true,
    };
    let remedy = match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            format!("write {}", v6.to_ipv4_mapped().unwrap_or(std::net::Ipv4Addr::UNSPECIFIED))
        }
        _ => "write the address of one host, such as 203.0.113.10 or 2001:db8::10".to_owned(),
    };
    sink.error(span, format!("{what} {address} {wrong}"), remedy);
    false
}

fn limits(mut fields: Fields<'_>, sink: &mut Sink<'_>) -> Limits {
    let default = Limits::default();
    let flows = fields.read(sink, "flows", |node, sink| {
        let flows = node.integer(sink, 1024..=1 << 28)?;
        if !flows.is_power_of_two() {
            let (below, above) = (flows.next_power_of_two() / 2, flows.next_power_of_two());
            sink.error(
                &node.span,
                format!("flows = {flows} is not a power of two"),
                format!("write {below} or {above}; a flow takes 128 bytes of memory"),
            );
        }
        Some(flows)
    });
    let services = fields.read(sink, "services", |node, sink| node.integer(sink, 1..=1 << 20));
    let backends = fields.read(sink, "backends", |node, sink| node.integer(sink, 1..=(1 << 20) - 1));
    let ring_pages = fields.read(sink, "ring_pages", |node, sink| node.integer(sink, 1..=1 << 20));
    let side_pages = fields.read(sink, "side_pages", |node, sink| node.integer(sink, 1..=(1 << 20) - 2));
    let rules = fields.read(sink, "rules", |node, sink| node.integer(sink, 1..=1 << 24));
    fields.finish(sink);
    Limits {
        flows: flows.unwrap_or(default.flows),
        services: services.unwrap_or(default.services),
        backends: backends.unwrap_or(default.backends),
        ring_pages: ring_pages.unwrap_or(default.ring_pages),
        side_pages: side_pages.unwrap_or(default.side_pages),
        rules: rules.unwrap_or(default.rules),
    }
}

fn timeouts(mut fields: Fields<'_>, sink: &mut Sink<'_>) -> Idle {
    let mut idle = Idle::default();
    for (key, time) in [
        ("half_open", &mut idle.half_open),
        ("established", &mut idle.established),
        ("closing", &mut idle.closing),
        ("closed", &mut idle.closed),
        ("udp", &mut idle.udp),
        ("port_rest", &mut idle.port_rest),
    ] {
        if let Some(said) = fields.read(sink, key, Node::duration) {
            *time = said;
        }
    }
    fields.finish(sink);
    idle
}

fn sources(root: &mut Fields<'_>, sink: &mut Sink<'_>, places: &mut Places) -> Vec<IpAddr> {
    let Some(node) = root.get("sources") else {
        return Vec::new();
    };
    let mut sources = Vec::new();
    for (address, span) in node.list(sink, |item, sink| {
        let text = item.string(sink)?;
        text.parse::<IpAddr>()
            .map_err(|_| item.refuse(sink, "write an address of this host, such as \"10.0.0.5\""))
            .ok()
    }) {
        check_unicast(address, "source", &span, sink);
        if sources.contains(&address) {
            sink.error(&span, format!("source {address} is listed twice"), "remove one of the two");
            continue;
        }
        places.note(Thing::Source(address), span);
        sources.push(address);
    }
    sources
}
