//! Pools: their backends and how their health is found out.

use std::time::Duration;

use toml::de::DeValue;

use super::{
    complaint::{Places, Thing},
    read::{Fields, Node, Sink},
    roles,
    settings::check_unicast,
    tls,
};
use crate::model::{
    Admin, Backend, BackendAddress, HealthCheck, OnUnhealthy, Panic, Pool, Probe, Via,
    desk::{Crowd, Ejection},
};

const INTERVAL: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(1);
const RISE: u32 = 2;
const FALL: u32 = 3;
const JITTER: f64 = 0.1;

/// Requests of a pool that may wait for room, and how long, unless the document says otherwise.
const QUEUE: u32 = 100;
const WAIT: Duration = Duration::from_secs(1);

/// For how long a server that does not answer well gets no requests.
const PAUSE: Duration = Duration::from_secs(10);

pub(super) fn pool(name: &str, node: &Node<'_>, sink: &mut Sink<'_>, places: &mut Places) -> Option<Pool> {
    let mut fields = node.table(sink)?;
    let health = fields.read(sink, "health", health);
    let backends = match fields.get("backends") {
        Some(node) => backends(name, &node, sink, places),
        None => Vec::new(),
    };
    let on_unhealthy = fields.read(sink, "on_unhealthy", |node, sink| {
        node.choice(
            sink,
            &[("keep", OnUnhealthy::Keep), ("move", OnUnhealthy::Move), ("reset", OnUnhealthy::Reset)],
        )
    });
    let panic = fields
        .read(sink, "panic", |node, sink| node.choice(sink, &[("keep", Panic::Keep), ("fail", Panic::Fail)]));
    let slow_start = fields.get("slow_start");
    if let Some(node) = slow_start.as_ref().filter(|_| health.is_none()) {
        let problem = format!(
            "pool \"{name}\" starts slowly, and has no health check to tell when a server comes back"
        );
        sink.error(&node.span, problem, "add health = { tcp = true }, or remove slow_start");
    }
    let slow_start = slow_start.and_then(|node| node.duration(sink));
    let tells = health.as_ref().is_none_or(|health| health.probe.tells_roles());
    let (replica_fallback, on_unfit, on_no_primary) = roles::wishes(&mut fields, tells, sink);
    let crowd = fields.read(sink, "requests", |node, sink| {
        places.note(Thing::Crowd(name.to_owned()), node.span.clone());
        crowd(node, sink)
    });
    let ejection = fields.read(sink, "eject", |node, sink| {
        places.note(Thing::Ejection(name.to_owned()), node.span.clone());
        ejection(node, sink)
    });
    let (speech, speech_at) = tls::speech(&mut fields, sink);
    if let Some(span) = speech_at {
        places.note(Thing::Speech(name.to_owned()), span);
    }
    let health = health.map(|health| HealthCheck { proxy: speech.proxy, ..health });
    fields.later(&[(
        "fallback",
        "remove it; when all backends fail, panic = \"keep\" keeps the last set in use",
    )]);
    fields.finish(sink);

    if let Some(HealthCheck { port: None, .. }) = &health {
        let portless = |b: &&Backend| !matches!(b.address, BackendAddress::Remote(_, Some(_)));
        if let Some(backend) = backends.iter().find(portless) {
            let place = places.backend(name, backend.address);
            sink.complaints.push(place.error(
                format!("backend {} has no port that its health check could ask on", backend.address),
                "add port = 8080 (or whichever it is) to the pool's health",
            ));
        }
    }
    Some(Pool {
        health,
        backends,
        on_unhealthy: on_unhealthy.unwrap_or_default(),
        panic: panic.unwrap_or_default(),
        slow_start,
        replica_fallback,
        on_unfit,
        on_no_primary,
        speech,
        crowd,
        ejection,
    })
}

/// `{ after = 5, pause = "10s" }`.
fn ejection(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Ejection> {
    let mut fields = node.table(sink)?;
    let after = fields.require(sink, "after", "5").and_then(|node| node.integer(sink, 1..=1000));
    let pause = fields.read(sink, "pause", Node::duration);
    fields.finish(sink);
    Some(Ejection { after: after?, pause: pause.unwrap_or(PAUSE) })
}

/// `{ limit = 100, queue = 50, wait = "1s" }`.
fn crowd(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Crowd> {
    let mut fields = node.table(sink)?;
    let limit = fields.require(sink, "limit", "100").and_then(|node| node.integer(sink, 1..=1_000_000));
    let queue = fields.read(sink, "queue", |node, sink| node.integer(sink, 0..=1_000_000));
    let wait = fields.read(sink, "wait", Node::duration);
    fields.finish(sink);
    Some(Crowd { limit: limit?, queue: queue.unwrap_or(QUEUE), wait: wait.unwrap_or(WAIT) })
}

/// The pool of the reception desk: this host itself.
pub(super) fn desk() -> Pool {
    Pool {
        health: None,
        backends: vec![Backend::THIS_HOST],
        on_unhealthy: OnUnhealthy::Keep,
        panic: Panic::Keep,
        ..Pool::default()
    }
}

fn backends(pool: &str, node: &Node<'_>, sink: &mut Sink<'_>, places: &mut Places) -> Vec<Backend> {
    let mut backends: Vec<Backend> = Vec::new();
    for item in node.array(sink).unwrap_or_default() {
        let Some(mut fields) = item.table(sink) else { continue };
        let address = fields.require(sink, "address", "\"10.0.0.11:8080\"");
        let weight = fields.read(sink, "weight", |node, sink| node.integer(sink, 0..=1000));
        let admin = admin(&mut fields, sink);
        fields.finish(sink);

        let Some(place) = address else { continue };
        let Some(address) = place.parsed::<BackendAddress>(sink) else { continue };
        if let BackendAddress::Remote(ip, _) = address {
            if ip.is_loopback() {
                sink.error(
                    &place.span,
                    format!("backend {ip} never leaves a host"),
                    "write address = \"local\" for a server on this host, which must listen on the service's own address",
                );
            } else {
                check_unicast(ip, "backend", &place.span, sink);
            }
        }
        if backends.iter().any(|other| other.address == address) {
            sink.error(
                &place.span,
                format!("backend {address} is in pool \"{pool}\" twice"),
                "remove one of the two; for a greater share say weight = 2",
            );
            continue;
        }
        places.note(Thing::Backend(pool.to_owned(), address), place.span.clone());
        let weight = weight.and_then(|weight| u16::try_from(weight).ok()).unwrap_or(1);
        backends.push(Backend { address, weight, admin });
    }
    backends
}

fn admin(fields: &mut Fields<'_>, sink: &mut Sink<'_>) -> Admin {
    let drain = fields.read(sink, "drain", |node, sink| {
        Some(match node.value() {
            DeValue::Boolean(wanted) => wanted.then_some(Admin::Drain { deadline: None }),
            DeValue::Datetime(when) => match seconds_since_epoch(when) {
                Some(deadline) => Some(Admin::Drain { deadline: Some(deadline) }),
                None => {
                    node.refuse(sink, "write date, time and offset from UTC: 2026-11-30T18:00:00Z");
                    None
                }
            },
            _ => {
                let wanted =
                    "true, or when its last connections are reset: 2026-11-30T18:00:00Z (without quotes)";
                return node.wrong_type(sink, wanted);
            }
        })
    });
    let disabled = fields.read(sink, "disabled", |node, sink| Some((node.boolean(sink)?, node.span.clone())));
    match (drain.flatten(), disabled) {
        (Some(_), Some((true, span))) => {
            sink.error(
                &span,
                "a backend cannot be both draining and disabled",
                "remove drain to reset its connections now, or disabled to let them end",
            );
            Admin::Disabled
        }
        (_, Some((true, _))) => Admin::Disabled,
        (Some(drain), _) => drain,
        (None, _) => Admin::Enabled,
    }
}

fn health(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<HealthCheck> {
    let mut fields = node.table(sink)?;
    let probe = probe(&mut fields, sink);
    let interval = fields.read(sink, "interval", Node::duration).unwrap_or(INTERVAL);
    let timeout = fields.get("timeout");
    let timeout = match timeout {
        None => TIMEOUT.min(interval),
        Some(node) => {
            let timeout = node.duration(sink).unwrap_or(TIMEOUT.min(interval));
            if timeout > interval {
                sink.error(
                    &node.span,
                    format!(
                        "timeout {timeout:?} is longer than the interval, {interval:?}: probes would pile up"
                    ),
                    format!("write timeout = \"{}ms\" or less, or a longer interval", interval.as_millis()),
                );
            }
            timeout
        }
    };
    let rise = fields.read(sink, "rise", |node, sink| node.integer(sink, 1..=1000));
    let fall = fields.read(sink, "fall", |node, sink| node.integer(sink, 1..=1000));
    let jitter = fields.read(sink, "jitter", |node, sink| node.fraction(sink, 0.0..=0.5));
    let port = fields.read(sink, "port", |node, sink| node.integer(sink, 1..=65535));
    let via = fields
        .read(sink, "via", |node, sink| node.choice(sink, &[("backend", Via::Backend), ("vip", Via::Vip)]));
    let span = fields.span.clone();
    fields.finish(sink);
    if interval < Duration::from_millis(10) {
        sink.error(
            &span,
            format!("an interval of {interval:?} is a flood"),
            "write interval = \"10ms\" or more",
        );
    }
    Some(HealthCheck {
        probe: probe?,
        interval,
        timeout,
        rise: rise.unwrap_or(RISE),
        fall: fall.unwrap_or(FALL),
        jitter: jitter.unwrap_or(JITTER),
        port: port.and_then(|port| u16::try_from(port).ok()),
        via: via.unwrap_or_default(),
        proxy: None,
    })
}

fn probe(fields: &mut Fields<'_>, sink: &mut Sink<'_>) -> Option<Probe> {
    let tcp = fields.read(sink, "tcp", |node, sink| match node.boolean(sink)? {
        true => Some(Probe::Tcp),
        false => {
            node.refuse(sink, "write tcp = true, or another kind of check: http, https, udp");
            None
        }
    });
    let http = fields.get("http");
    let https = fields.get("https");
    let udp = fields.read(sink, "udp", |node, sink| {
        let mut inner = node.table(sink)?;
        let send = inner.require(sink, "send", "\"ping\"").and_then(|node| bytes(&node, sink));
        let expect = inner.read(sink, "expect", bytes);
        inner.finish(sink);
        Some(Probe::Udp { send: send?, expect: expect.unwrap_or_default() })
    });
    let http = match (&http, &https) {
        (Some(node), _) => http_probe(fields, node, false, sink),
        (None, Some(node)) => http_probe(fields, node, true, sink),
        (None, None) => None,
    };
    let postgres = fields.read(sink, "postgres", roles::postgres);
    let http_role = fields.read(sink, "http_role", roles::http_role);
    let kinds: Vec<_> = ["tcp", "http", "https", "udp", "postgres", "http_role"]
        .into_iter()
        .filter(|kind| fields.has(kind))
        .collect();
    match kinds.as_slice() {
        [_] => tcp.or(http).or(udp).or(postgres).or(http_role),
        [] => {
            let remedy = "add one of tcp = true, http = \"/healthz\", https = \"/healthz\", udp = { send = \"ping\" }, postgres = { user = \"lb\" }";
            sink.error(&fields.span, "the health check does not say what to ask", remedy);
            None
        }
        _ => {
            let message = format!("the health check asks {} at once", kinds.join(" and "));
            sink.error(&fields.span, message, "keep one of them");
            None
        }
    }
}

fn http_probe(fields: &mut Fields<'_>, node: &Node<'_>, tls: bool, sink: &mut Sink<'_>) -> Option<Probe> {
    let path = roles::path(node, sink);
    let host = fields.read(sink, "host", |node, sink| {
        let host = node.string(sink)?;
        if host.is_empty() || !host.chars().all(|c| c.is_ascii_graphic() && c != '/') {
            node.refuse(sink, "write a host name, such as \"shop.example\"");
        }
        Some(host.to_owned())
    });
    let status = fields.read(sink, "status", statuses).unwrap_or_else(|| vec![(200, 399)]);
    let body = fields.read(sink, "body", |node, sink| node.string(sink).map(str::to_owned));
    let (mut verify, mut ca_file) = (None, None);
    if tls {
        verify = fields.read(sink, "verify", Node::boolean);
        ca_file = fields.read(sink, "ca", |node, sink| node.string(sink).map(Into::into));
    }
    Some(Probe::Http { path: path?, host, status, body, tls, verify: tls && verify.unwrap_or(true), ca_file })
}

fn statuses(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Vec<(u16, u16)>> {
    if let DeValue::Integer(_) = node.value() {
        let status = u16::try_from(node.integer(sink, 100..=599)?).ok()?;
        return Some(vec![(status, status)]);
    }
    let read = |part: &str| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (low, high) = (low.trim().parse::<u16>().ok()?, high.trim().parse::<u16>().ok()?);
        (100 <= low && low <= high && high <= 599).then_some((low, high))
    };
    let ranges = node.string(sink)?.split(',').map(read).collect::<Option<Vec<_>>>();
    if ranges.is_none() {
        node.refuse(sink, "write statuses from 100 to 599: \"200\", \"200-399\", \"200,204,301-302\"");
    }
    ranges
}

/// A text, or `{ hex = "00ff" }` for bytes that are none.
fn bytes(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<Vec<u8>> {
    if !node.is_table() {
        return node.string(sink).map(|text| text.as_bytes().to_vec());
    }
    let mut fields = node.table(sink)?;
    let hex = fields.require(sink, "hex", "\"00ff\"");
    fields.finish(sink);
    let hex = hex?;
    let digits = hex.string(sink)?;
    let pair = |at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    let bytes = (0..digits.len()).step_by(2).map(pair).collect::<Option<Vec<_>>>();
    if bytes.is_none() {
        hex.refuse(sink, "write two hexadecimal digits for each byte, such as \"00ff\"");
    }
    bytes
}

/// Seconds from 1970-01-01T00:00:00Z; `None` without date, time or offset, or before that.
fn seconds_since_epoch(when: &toml::value::Datetime) -> Option<u64> {
    let (date, time, offset) = (when.date?, when.time?, when.offset?);
    let offset_minutes = match offset {
        toml::value::Offset::Z => 0,
        toml::value::Offset::Custom { minutes } => i64::from(minutes),
    };
    // Days from the civil calendar, counting years from March so that a leap day comes last.
    let (year, month, day) = (i64::from(date.year), i64::from(date.month), i64::from(date.day));
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = 365 * year + year / 4 - year / 100 + year / 400 + day_of_year - 719_468;
    let minutes = days * 1440 + i64::from(time.hour) * 60 + i64::from(time.minute) - offset_minutes;
    u64::try_from(minutes * 60 + i64::from(time.second.unwrap_or(0))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_count_from_the_epoch() {
        let seconds = |text: &str| seconds_since_epoch(&text.parse().unwrap());
        assert_eq!(seconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(seconds("2000-02-29T12:00:00Z"), Some(951_825_600));
        assert_eq!(seconds("2026-11-30T18:00:00Z"), Some(1_796_061_600));
        assert_eq!(seconds("2026-11-30T19:30:00+01:30"), Some(1_796_061_600));
        assert_eq!(seconds("2026-11-30T18:00:00"), None);
        assert_eq!(seconds("2026-11-30"), None);
        assert_eq!(seconds("1969-12-31T23:59:59Z"), None);
    }
}
