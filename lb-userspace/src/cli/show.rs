//! What people see of the API's answers.

use std::time::Duration;

use super::table::{Cell, Table, Tone, colours, paint};
use crate::api::view::{
    Backend, Cluster, Connections, Counters, Explanation, Foreseen, ForeseenService, Pool, Service, Slots,
    Snapshot, Traffic,
};

/// The whole picture, for `lb status`.
pub(super) fn status(snapshot: &Snapshot) -> String {
    let status = &snapshot.status;
    let document = &status.document;
    let mut lines = Vec::new();
    let interfaces: Vec<_> = status
        .interfaces
        .iter()
        .map(|i| format!("{} ({}{})", i.name, i.mode, if i.up { "" } else { ", down" }))
        .collect();
    lines.push(format!(
        "lb {}, process {}, up {}",
        status.version,
        status.pid,
        duration(Duration::from_secs(status.uptime_seconds))
    ));
    lines.push(format!("document    {} (revision {})", document.path, document.revision));
    lines.push(format!("interfaces  {}", interfaces.join(", ")));
    let kept = snapshot.backends.iter().filter(|it| it.usable && it.state == "unhealthy").count();
    let kept = match kept {
        0 => String::new(),
        kept => format!(", {kept} of them unhealthy and kept in use, since all of their pool are"),
    };
    lines.push(format!("backends    {} of {} usable{kept}", status.backends_usable, status.backends));
    lines.push(format!("flows       {} of {}", status.flows, status.flow_capacity));
    for alarm in &status.alarms {
        lines.push(format!("{}  {alarm}", paint("alarm     ", Tone::Bad, colours())));
    }
    if let Some(refused) = &document.refused {
        let head = paint("refused   ", Tone::Bad, colours());
        lines.push(format!("{head}  the file as it is now is not in force:\n{refused}"));
    }
    for warning in &document.warnings {
        lines.push(format!("{}  {warning}", paint("warning   ", Tone::Odd, colours())));
    }
    if let Some(why) = &document.read_only {
        lines.push(format!("read-only   {why}"));
    }
    format!("{}\n\n{}\n{}", lines.join("\n"), services(&snapshot.services), backends(&snapshot.backends))
}

pub(super) fn services(services: &[Service]) -> String {
    let mut table = Table::new(&["SERVICE", "LISTEN", "POOL", "SCHEDULER", "USABLE", "FLOWS", "IN", "OUT"]);
    for service in services {
        table.row(vec![
            Cell::text(&service.name),
            Cell::text(&service.listen),
            Cell::text(&service.pool),
            Cell::text(&service.scheduler),
            usable(service.usable, service.backends),
            Cell::number(service.traffic.flows),
            Cell::number(bytes(service.traffic.bytes_in)),
            Cell::number(bytes(service.traffic.bytes_out)),
        ]);
    }
    table.render(colours())
}

pub(super) fn service(service: &Service, backends_of_pool: &[Backend]) -> String {
    let list = |networks: &[String], none: &str| {
        if networks.is_empty() { none.to_owned() } else { networks.join(", ") }
    };
    let slots = service.slots.as_ref().map(slots).unwrap_or_default();
    let cut = match service.cut {
        0 => String::new(),
        cut => format!("cut        {cut} connections, whose server was not to have them any more\n"),
    };
    format!(
        "service    {}\nlisten     {}\npool       {}\nscheduler  {}\nforward    {}\n{slots}allow      {}\ndeny       {}\n{cut}{}\n\n{}",
        service.name,
        service.listen,
        service.pool,
        service.scheduler,
        service.forward,
        list(&service.allow, "everybody who is not denied"),
        list(&service.deny, "nobody"),
        traffic(&service.traffic),
        backends(backends_of_pool)
    )
}

/// How far the slots of a service are, a line.
fn slots(slots: &Slots) -> String {
    let kinds = [
        (slots.settled, "settled"),
        (slots.moving, "moving"),
        (slots.fading, "fading"),
        (slots.tracked, "always tracked"),
    ];
    let there = kinds.iter().filter(|(number, _)| *number > 0);
    let parts: Vec<String> = there.map(|(number, kind)| format!("{number} {kind}")).collect();
    let since = slots.since_seconds.map(|seconds| format!(", since {seconds} s")).unwrap_or_default();
    format!("slots      {}{since}\n", if parts.is_empty() { "none".to_owned() } else { parts.join(", ") })
}

pub(super) fn foreseen(foreseen: &Foreseen) -> String {
    let mut at_desk: String = foreseen.desk.iter().map(|line| format!("desk  {line}\n")).collect();
    if !at_desk.is_empty() {
        at_desk.push('\n');
    }
    if foreseen.operations.is_empty() {
        return format!("{at_desk}nothing would change in the tables\n");
    }
    let operations = foreseen.operations.iter().zip(1..).map(|(op, number)| format!("{number:>4}  {op}\n"));
    let mut table =
        Table::new(&["SERVICE", "LISTEN", "CHANGE", "SLOTS", "MOVED", "SHARE", "CONNECTIONS", "RESET"]);
    for service in &foreseen.services {
        table.row(vec![
            Cell::text(&service.service),
            Cell::text(&service.listen),
            Cell::text(&service.change),
            Cell::text(service.slots.to_string()),
            Cell::text(service.slots_moved.to_string()),
            Cell::text(format!("{:.1} %", 100.0 * service.share_moved)),
            Cell::text(service.connections.to_string()),
            Cell::text(service.connections_reset.to_string()),
        ]);
    }
    let is_empty = |service: &ForeseenService| service.change == "new" && service.slots == 0;
    let note = if foreseen.services.iter().any(is_empty) {
        "\nThe ring of a service without slots is built when the first of its servers is found fit.\n"
    } else {
        ""
    };
    format!("{at_desk}{}\n{}{note}", operations.collect::<String>(), table.render(colours()))
}

pub(super) fn explanation(explanation: &Explanation) -> String {
    let steps = explanation.steps.iter();
    steps.map(|step| format!("{:<11} {}\n", step.what, step.detail)).collect()
}

pub(super) fn explanations(explanations: &[Explanation]) -> String {
    let each = explanations.iter().zip(1..);
    each.map(|(it, number)| format!("packet {number}: {}\n{}\n", it.verdict, explanation(it))).collect()
}

pub(super) fn pools(pools: &[Pool]) -> String {
    let mut table = Table::new(&["POOL", "HEALTH", "ON UNHEALTHY", "SERVICES", "USABLE"]);
    for pool in pools {
        table.row(vec![
            Cell::text(&pool.name),
            Cell::text(&pool.health),
            Cell::text(&pool.on_unhealthy),
            Cell::text(pool.services.join(", ")),
            usable(pool.usable, pool.backends),
        ]);
    }
    table.render(colours())
}

pub(super) fn pool(pool: &Pool, its_backends: &[Backend]) -> String {
    let panic = if pool.panicking { " (all fail now: the last set stays in use)" } else { "" };
    format!(
        "pool          {}\nhealth        {}\non unhealthy  {}\npanic         {}{panic}\nservices      {}\n{}\n{}",
        pool.name,
        pool.health,
        pool.on_unhealthy,
        pool.panic,
        pool.services.join(", "),
        pool.cluster.as_ref().map(cluster).unwrap_or_default(),
        backends(its_backends)
    )
}

/// Who is what in a pool of which one server takes writes.
fn cluster(cluster: &Cluster) -> String {
    let mut table = Table::new(&["BACKEND", "ROLE", "TIMELINE", "LAG", "SINCE", "WRITES", "READS"]);
    for server in &cluster.servers {
        let role = match (&server.role, server.answers) {
            (None, _) => Cell::text("unknown").tone(Tone::Odd),
            (Some(role), false) => Cell::text(format!("was {role}, silent")).tone(Tone::Bad),
            (Some(role), true) if server.fenced => Cell::text(format!("{role}, fenced")).tone(Tone::Bad),
            (Some(role), true) if server.read_only => {
                Cell::text(format!("{role}, read-only")).tone(Tone::Odd)
            }
            (Some(role), true) => {
                Cell::text(role).tone(if role == "neither" { Tone::Odd } else { Tone::Good })
            }
        };
        let lag = match (server.lag_seconds, server.lag_bytes) {
            (None, _) => "-".to_owned(),
            (Some(seconds), None) => format!("{seconds:.1} s"),
            (Some(seconds), Some(missing)) => format!("{seconds:.1} s, {}", bytes(missing)),
        };
        let yes = |yes| Cell::text(if yes { "yes" } else { "-" });
        table.row(vec![
            Cell::text(&server.address),
            role,
            server.timeline.map_or_else(|| Cell::text("-"), Cell::number),
            Cell::number(lag),
            Cell::number(
                server.since_seconds.map_or_else(|| "-".to_owned(), |s| duration(Duration::from_secs(s))),
            ),
            yes(server.written),
            yes(server.read),
        ]);
    }
    let doubt = cluster.doubt.as_ref().map(|doubt| format!("alarm         {doubt}\n")).unwrap_or_default();
    let nobody = if cluster.holds { "nobody, clients wait" } else { "nobody" };
    format!(
        "writes go to  {}, since {}\nwhy           {}\n{doubt}\n{}",
        cluster.primary.as_deref().unwrap_or(nobody),
        duration(Duration::from_secs(cluster.since_seconds)),
        cluster.why,
        table.render(colours())
    )
}

pub(super) fn backends(backends: &[Backend]) -> String {
    let mut table = Table::new(&[
        "POOL", "BACKEND", "STATE", "WEIGHT", "FLOWS", "REQUESTS", "IN", "OUT", "PROBE", "NEXT HOP",
    ]);
    for backend in backends {
        let tone = match backend.state.as_str() {
            "healthy" => Tone::Good,
            "unhealthy" => Tone::Bad,
            "starting" | "draining" => Tone::Odd,
            _ => Tone::Plain,
        };
        let probe = match (&backend.failure, backend.latency_ms) {
            (Some(failure), _) => Cell::text(failure).tone(Tone::Bad),
            (None, Some(latency)) => Cell::text(format!("{latency:.1} ms")),
            (None, None) => Cell::text("-"),
        };
        let hop = match (&backend.next_hop, &backend.no_next_hop) {
            (Some(hop), _) => Cell::text(hop),
            (None, Some(why)) => Cell::text(why).tone(Tone::Bad),
            (None, None) => Cell::text("-"),
        };
        table.row(vec![
            Cell::text(&backend.pool),
            Cell::text(&backend.address),
            Cell::text(&backend.state).tone(tone),
            match backend.share_percent {
                100 => Cell::number(backend.weight),
                percent => Cell::number(format!("{percent} % of {}", backend.weight)).tone(Tone::Odd),
            },
            Cell::number(backend.traffic.flows),
            backend.requests.map_or_else(|| Cell::text("-"), Cell::number),
            Cell::number(bytes(backend.traffic.bytes_in)),
            Cell::number(bytes(backend.traffic.bytes_out)),
            probe,
            hop,
        ]);
    }
    table.render(colours())
}

pub(super) fn connections(found: &Connections) -> String {
    let mut table =
        Table::new(&["SERVICE", "PROTO", "CLIENT", "CALLED", "SOURCE", "BACKEND", "STATE", "IDLE"]);
    for connection in &found.connections {
        table.row(vec![
            Cell::text(&connection.service),
            Cell::text(&connection.protocol),
            Cell::text(&connection.client),
            Cell::text(&connection.called),
            Cell::text(connection.source.as_deref().unwrap_or("-")),
            Cell::text(&connection.backend),
            Cell::text(&connection.state),
            Cell::number(duration(Duration::from_millis(connection.idle_ms))),
        ]);
    }
    let shown = found.connections.len() as u64;
    let rest = if shown < found.total {
        format!("{shown} of {} shown; --limit and --offset show others\n", found.total)
    } else {
        String::new()
    };
    table.render(colours()) + &rest
}

pub(super) fn counters(counters: &Counters, all: bool) -> String {
    let mut table = Table::new(&["VERDICT", "PACKETS"]);
    for verdict in counters.verdicts.iter().filter(|verdict| all || verdict.packets > 0) {
        let tone = if verdict.name.starts_with("drop_") { Tone::Odd } else { Tone::Plain };
        table.row(vec![Cell::text(&verdict.name).tone(tone), Cell::number(verdict.packets)]);
    }
    let mut records = Table::new(&["RECORDS", "TIMES"]);
    let happened = || counters.records.iter().filter(|record| all || record.times > 0);
    for record in happened() {
        records.row(vec![Cell::text(&record.name), Cell::number(record.times)]);
    }
    let records = if happened().next().is_some() { records.render(colours()) } else { String::new() };
    table.render(colours()) + &records
}

fn traffic(traffic: &Traffic) -> String {
    format!(
        "traffic    {} new flows; {} packets ({}) in, {} packets ({}) out",
        traffic.flows,
        traffic.packets_in,
        bytes(traffic.bytes_in),
        traffic.packets_out,
        bytes(traffic.bytes_out)
    )
}

fn usable(usable: usize, all: usize) -> Cell {
    let tone = match usable {
        _ if usable == all => Tone::Good,
        0 => Tone::Bad,
        _ => Tone::Odd,
    };
    Cell::text(format!("{usable}/{all}")).tone(tone)
}

/// Bytes with a binary unit, three digits.
fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut rest = bytes as f64;
    while rest >= 1000.0 && unit + 1 < UNITS.len() {
        rest /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{rest:.1} {}", UNITS[unit]) }
}

/// A duration in its two largest units.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        let sizes = [0, 999, 1000, 1024, 1 << 20, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "999 B", "1.0 KiB", "1.0 KiB", "1.0 MiB", "16384.0 PiB"]);
        let times = [0.25, 59.0, 61.0, 3661.0, 90061.0].map(|s| duration(Duration::from_secs_f64(s)));
        assert_eq!(times, ["250 ms", "59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]);
    }
}
