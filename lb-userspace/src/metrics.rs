//! Prometheus text, at `/metrics` on the document's address.
//!
//! Made anew from a [`Snapshot`] at each scrape: the counters are the data plane's own, and nothing is
//! counted twice.

use std::{collections::BTreeMap, net::SocketAddr, sync::atomic::AtomicU64};

use axum::{Router, extract::State, http::header, response::IntoResponse, routing::get};
use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, text::encode},
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::CancellationToken;

use crate::api::{
    request::{Reply, Request},
    view::{Desk, Latencies, Snapshot, Traffic},
};

type Labels = Vec<(&'static str, String)>;
type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge>;
type Fractions = Family<Labels, Gauge<f64, AtomicU64>>;

/// States of a backend: one of them is 1.
const STATES: [&str; 6] = ["starting", "healthy", "unhealthy", "draining", "drained", "disabled"];

/// Answers scrapes until `stop`.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    daemon: mpsc::Sender<Request>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new().route("/metrics", get(scrape)).with_state(daemon);
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// Listens on the document's address.
///
/// # Errors
/// When the address is taken or not this host's.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

async fn scrape(State(daemon): State<mpsc::Sender<Request>>) -> impl IntoResponse {
    use axum::http::StatusCode;
    let (reply, answer) = Reply::new();
    if daemon.send(Request::Snapshot(reply)).await.is_err() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the daemon is about to end\n").into_response();
    }
    match answer.await {
        Ok(Ok(snapshot)) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text(&snapshot)).into_response()
        }
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the daemon is about to end\n").into_response(),
    }
}

/// The text for a snapshot.
pub fn text(snapshot: &Snapshot) -> String {
    let mut registry = Registry::with_prefix("lobby");
    daemon(snapshot, &mut registry);
    verdicts(snapshot, &mut registry);
    services(snapshot, &mut registry);
    backends(snapshot, &mut registry);
    clusters(snapshot, &mut registry);
    if let Some(its) = &snapshot.desk {
        desk(its, &mut registry);
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    _ = encode(&mut text, &registry);
    text
}

fn daemon(snapshot: &Snapshot, registry: &mut Registry) {
    let status = &snapshot.status;
    registry.register("build", "Version of the daemon", Info::new(vec![("version", status.version.clone())]));

    let reloads = Counters::default();
    for (result, times) in [("in_force", status.document.reloads), ("refused", status.document.refusals)] {
        reloads.get_or_create(&vec![("result", result.into())]).inc_by(times);
    }
    registry.register("document_loads", "Documents read, by what became of them", reloads);

    let gauge = |value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        gauge
    };
    let refused = i64::from(status.document.refused.is_some());
    registry.register("document_refused", "1 while the file as it is now is not in force", gauge(refused));
    registry.register("alarms", "What needs attention now", gauge(number(status.alarms.len())));
    registry.register("flows", "Entries of the flow table in use", gauge(status.flows.into()));
    registry.register("flow_capacity", "Entries of the flow table", gauge(status.flow_capacity.into()));

    let interfaces = Gauges::default();
    for interface in &status.interfaces {
        let labels = vec![("interface", interface.name.clone()), ("mode", interface.mode.clone())];
        interfaces.get_or_create(&labels).set(interface.up.into());
    }
    registry.register(
        "interface_up",
        "1 for an interface that is up, with how the program runs there",
        interfaces,
    );
}

fn clusters(snapshot: &Snapshot, registry: &mut Registry) {
    let (roles, lags, written) = (Gauges::default(), Gauges::default(), Gauges::default());
    let (changes, doubts) = (Counters::default(), Gauges::default());
    for pool in &snapshot.pools {
        let Some(cluster) = &pool.cluster else { continue };
        let of_pool = vec![("pool", pool.name.clone())];
        changes.get_or_create(&of_pool).inc_by(cluster.changes);
        doubts.get_or_create(&of_pool).set(cluster.doubt.is_some().into());
        for server in &cluster.servers {
            let labels = vec![("pool", pool.name.clone()), ("backend", server.address.clone())];
            written.get_or_create(&labels).set(server.written.into());
            if let Some(seconds) = server.lag_seconds {
                lags.get_or_create(&labels).set((seconds * 1e3) as i64);
            }
            let role = server.role.clone().filter(|_| server.answers).unwrap_or_else(|| "unknown".into());
            roles.get_or_create(&[labels, vec![("role", role)]].concat()).set(1);
        }
    }
    registry.register("server_role", "1 for the role that a server of a cluster says it has", roles);
    registry.register("server_written", "1 for the server that gets new connections which write", written);
    registry.register("replica_lag_milliseconds", "For how long what the primary wrote is missing", lags);
    registry.register("primary_changes", "How often writes have gone elsewhere", changes);
    registry.register("split_brain", "1 while it is in doubt who of a pool is the primary", doubts);
}

fn verdicts(snapshot: &Snapshot, registry: &mut Registry) {
    let packets = Counters::default();
    for verdict in &snapshot.counters.verdicts {
        packets.get_or_create(&vec![("verdict", verdict.name.clone())]).inc_by(verdict.packets);
    }
    registry.register("packets", "Packets, by what became of them", packets);
    let records = Counters::default();
    for record in &snapshot.counters.records {
        records.get_or_create(&vec![("event", record.name.clone())]).inc_by(record.times);
    }
    registry.register("records", "Connections written down, or not, while their slots change hands", records);
}

fn services(snapshot: &Snapshot, registry: &mut Registry) {
    let usable = Gauges::default();
    for service in &snapshot.services {
        let labels = vec![("service", service.name.clone()), ("pool", service.pool.clone())];
        usable.get_or_create(&labels).set(number(service.usable));
    }
    registry.register("service_usable_backends", "Backends that get new connections", usable);
    let cut = Counters::default();
    for service in &snapshot.services {
        cut.get_or_create(&vec![("service", service.name.clone())]).inc_by(service.cut);
    }
    let help = "Connections ended since their server was not to have them any more";
    registry.register("service_cut_connections", help, cut);
    let slots = Gauges::default();
    for service in &snapshot.services {
        let Some(its) = &service.slots else { continue };
        let states = [
            ("settled", its.settled),
            ("moving", its.moving),
            ("fading", its.fading),
            ("tracked", its.tracked),
        ];
        for (state, number) in states {
            let labels = vec![("service", service.name.clone()), ("state", state.into())];
            slots.get_or_create(&labels).set(number.into());
        }
    }
    registry.register("service_slots", "Slots of the service's ring, by how far they are", slots);
    let all = snapshot.services.iter().map(|s| (vec![("service", s.name.clone())], s.traffic));
    traffic("service", all, registry);
}

fn backends(snapshot: &Snapshot, registry: &mut Registry) {
    let states = Gauges::default();
    let usable = Gauges::default();
    let latency = Fractions::default();
    let requests = Gauges::default();
    for backend in &snapshot.backends {
        let labels = || vec![("pool", backend.pool.clone()), ("backend", backend.address.clone())];
        for state in STATES {
            let mut labels = labels();
            labels.push(("state", state.into()));
            states.get_or_create(&labels).set((backend.state == state).into());
        }
        usable.get_or_create(&labels()).set(backend.usable.into());
        if let Some(milliseconds) = backend.latency_ms {
            latency.get_or_create(&labels()).set(milliseconds / 1e3);
        }
        if let Some(count) = backend.requests {
            requests.get_or_create(&labels()).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
    registry.register("backend_state", "1 for the state that the backend is in", states);
    registry.register("backend_usable", "1 for a backend that gets new connections", usable);
    registry.register("backend_requests", "Requests that the desk has with a backend", requests);
    let help = "How long the last successful probe took";
    registry.register_with_unit("backend_probe_latency", help, Unit::Seconds, latency);
    let labels =
        |b: &crate::api::view::Backend| vec![("pool", b.pool.clone()), ("backend", b.address.clone())];
    traffic("backend", snapshot.backends.iter().map(|b| (labels(b), b.traffic)), registry);
}

/// What others have counted.
#[derive(Debug)]
struct Histograms(Vec<Latencies>);

impl EncodeMetric for Histograms {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        for its in &self.0 {
            let labels = vec![
                ("service", its.service.clone()),
                ("route", its.route.clone()),
                ("pool", its.pool.clone()),
            ];
            let mut buckets = its.up_to_seconds.clone();
            buckets.push((f64::INFINITY, its.longer));
            let count = buckets.iter().map(|(_, count)| count).sum();
            let mut one = encoder.encode_family(&labels)?;
            one.encode_histogram::<NoLabels>(its.seconds, count, &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// Labels of examples, of which there are none.
type NoLabels = Vec<(String, String)>;

fn desk(desk: &Desk, registry: &mut Registry) {
    let requests = Counters::default();
    for answers in &desk.answers {
        let labels = vec![
            ("service", answers.service.clone()),
            ("route", answers.route.clone()),
            ("pool", answers.pool.clone()),
            ("status", answers.status.clone()),
        ];
        requests.get_or_create(&labels).inc_by(answers.count);
    }
    registry.register("desk_requests", "Requests answered, by route, its pool and class of status", requests);
    let help = "How long answers took to begin, by route and its pool";
    registry.register_with_unit("desk_answer", help, Unit::Seconds, Histograms(desk.latencies.clone()));
    let by = |label: &'static str, counts: &BTreeMap<String, u64>| {
        let counters = Counters::default();
        for (value, &count) in counts {
            counters.get_or_create(&vec![(label, value.clone())]).inc_by(count);
        }
        counters
    };
    let troubles = by("reason", &desk.troubles);
    registry.register("desk_troubles", "Requests that the desk had to answer itself, by reason", troubles);
    let denied = Counters::default();
    for its in &desk.denied {
        let labels = vec![
            ("service", its.service.clone()),
            ("route", its.route.clone()),
            ("status", its.status.to_string()),
            ("reason", its.reason.clone()),
        ];
        denied.get_or_create(&labels).inc_by(its.count);
    }
    registry.register("desk_denied", "Requests that were not let in, by route and reason", denied);
    let ejections = Counters::default();
    for its in &desk.ejections {
        let labels = vec![("pool", its.pool.clone()), ("backend", its.backend.clone())];
        ejections.get_or_create(&labels).inc_by(its.count);
    }
    registry.register(
        "desk_ejections",
        "How often backends that did not answer well got no requests for a while",
        ejections,
    );
    let ends = Gauges::default();
    for its in &desk.certificates {
        let labels = vec![("service", its.service.clone()), ("cert", its.cert.clone())];
        ends.get_or_create(&labels).set(i64::try_from(its.not_after_seconds).unwrap_or(i64::MAX));
    }
    let help = "Until when a certificate holds, since the epoch";
    registry.register_with_unit("desk_certificate_not_after", help, Unit::Seconds, ends);
    let fetches = by("outcome", &desk.key_fetches);
    registry.register("desk_key_fetches", "How often keys of tokens were fetched, by outcome", fetches);
    let refused = by("reason", &desk.refused);
    registry.register(
        "desk_refused_connections",
        "Connections that were not let in or ended by the desk, by reason",
        refused,
    );
    let counts = [
        ("desk_connections", "Connections taken", desk.connections),
        ("desk_retries", "Requests tried once more", desk.retries),
        ("desk_restarts", "Ends of the desk that were not asked for", desk.restarts),
        ("desk_log_lines_lost", "Lines of the access log that nobody took in time", desk.lines_lost),
    ];
    for (name, help, count) in counts {
        let counter = Counter::<u64>::default();
        counter.inc_by(count);
        registry.register(name, help, counter);
    }
    for (name, help, count) in [
        ("desk_open_connections", "Connections that are open", desk.open),
        ("desk_websockets", "Connections that are websockets", desk.websockets),
        ("desk_passed_connections", "Connections that are handed on as they are, by name", desk.passed),
    ] {
        let open = Gauge::<i64>::default();
        open.set(i64::try_from(count).unwrap_or(i64::MAX));
        registry.register(name, help, open);
    }
    let up = Gauge::<i64>::default();
    up.set(desk.pid.is_some().into());
    registry.register("desk_up", "1 while the desk's process runs", up);
}

fn traffic(what: &str, all: impl Iterator<Item = (Labels, Traffic)>, registry: &mut Registry) {
    let (packets, bytes, flows) = (Counters::default(), Counters::default(), Counters::default());
    for (labels, traffic) in all {
        for (direction, its_packets, its_bytes) in
            [("in", traffic.packets_in, traffic.bytes_in), ("out", traffic.packets_out, traffic.bytes_out)]
        {
            let mut labels = labels.clone();
            labels.push(("direction", direction.into()));
            packets.get_or_create(&labels).inc_by(its_packets);
            bytes.get_or_create(&labels).inc_by(its_bytes);
        }
        flows.get_or_create(&labels).inc_by(traffic.flows);
    }
    registry.register(
        format!("{what}_packets"),
        "Packets forwarded: in to backends, out to clients",
        packets,
    );
    let help = "Bytes forwarded, whole frames: in to backends, out to clients";
    registry.register(format!("{what}_traffic_bytes"), help, bytes);
    registry.register(format!("{what}_new_flows"), "New flows", flows);
}

fn number(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        let traffic =
            r#"{"packets_in": 11, "bytes_in": 22, "packets_out": 33, "bytes_out": 44, "flows": 55}"#;
        let json = format!(
            r#"{{
            "status": {{"version": "1.2.3", "pid": 1, "uptime_seconds": 5, "interfaces": [
                {{"name": "eth0", "mode": "native", "up": true, "mtu": 1500}}], "alarms": ["a", "b"],
                "services": 1, "backends_usable": 1, "backends": 1, "flows": 7, "flow_capacity": 1024,
                "document": {{"path": "/lb.toml", "revision": "r", "read_only": null, "since": 1,
                    "warnings": [], "refused": "bad", "reloads": 3, "refusals": 2}}}},
            "services": [{{"name": "shop", "listen": "203.0.113.10:80/tcp", "pool": "web", "scheduler": "maglev",
                "forward": "dsr", "track": "changes", "allow": [], "deny": [], "usable": 1, "backends": 1, "cut": 6,
                "slots": {{"total": 13, "settled": 10, "moving": 2, "fading": 1, "tracked": 0, "since_seconds": 5}},
                "traffic": {traffic}}}],
            "pools": [],
            "backends": [{{"pool": "web", "address": "10.0.0.11:80", "state": "healthy", "usable": true,
                "weight": 1, "share_percent": 100, "deadline": null, "failure": null, "latency_ms": 2.5, "next_hop": null,
                "no_next_hop": null, "traffic": {traffic}, "requests": 3}}],
            "counters": {{"verdicts": [{{"name": "to_backend", "packets": 9}}, {{"name": "drop_no_port", "packets": 4}}],
                "records": [{{"name": "record_adopted", "times": 8}}]}},
            "desk": {{"pid": 7, "up_to_date": true, "restarts": 1, "listening": [], "open": 2, "websockets": 1, "passed": 5, "connections": 12,
                "refused": {{"firewall": 3}}, "retries": 4, "troubles": {{"slow": 5}}, "lines_lost": 6,
                "answers": [{{"service": "front", "route": "*/*", "pool": "web", "status": "2xx", "count": 10}}],
                "latencies": [{{"service": "front", "route": "*/*", "pool": "web", "seconds": 12.5, "up_to_seconds": [[0.25, 1], [0.5, 2]], "longer": 1}}],
                "denied": [{{"service": "front", "route": "*/*", "status": 401, "reason": "no_credentials", "count": 8}}],
                "ejections": [{{"pool": "web", "backend": "10.0.0.11:80", "count": 3}}],
                "key_fetches": {{"success": 13, "failure": 14}}}}
        }}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn every_figure_has_its_line() {
        let text = text(&snapshot());
        for line in [
            "lobby_build_info{version=\"1.2.3\"} 1",
            "lobby_document_loads_total{result=\"in_force\"} 3",
            "lobby_document_loads_total{result=\"refused\"} 2",
            "lobby_document_refused 1",
            "lobby_alarms 2",
            "lobby_flows 7",
            "lobby_flow_capacity 1024",
            "lobby_interface_up{interface=\"eth0\",mode=\"native\"} 1",
            "lobby_packets_total{verdict=\"to_backend\"} 9",
            "lobby_packets_total{verdict=\"drop_no_port\"} 4",
            "lobby_records_total{event=\"record_adopted\"} 8",
            "lobby_service_slots{service=\"shop\",state=\"settled\"} 10",
            "lobby_service_slots{service=\"shop\",state=\"moving\"} 2",
            "lobby_service_slots{service=\"shop\",state=\"fading\"} 1",
            "lobby_service_cut_connections_total{service=\"shop\"} 6",
            "lobby_service_usable_backends{service=\"shop\",pool=\"web\"} 1",
            "lobby_service_packets_total{service=\"shop\",direction=\"in\"} 11",
            "lobby_backend_state{pool=\"web\",backend=\"10.0.0.11:80\",state=\"healthy\"} 1",
            "lobby_backend_state{pool=\"web\",backend=\"10.0.0.11:80\",state=\"draining\"} 0",
            "lobby_backend_probe_latency_seconds{pool=\"web\",backend=\"10.0.0.11:80\"} 0.0025",
            "lobby_backend_traffic_bytes_total{pool=\"web\",backend=\"10.0.0.11:80\",direction=\"out\"} 44",
            "lobby_backend_requests{pool=\"web\",backend=\"10.0.0.11:80\"} 3",
            "lobby_backend_new_flows_total{pool=\"web\",backend=\"10.0.0.11:80\"} 55",
            "lobby_desk_requests_total{service=\"front\",route=\"*/*\",pool=\"web\",status=\"2xx\"} 10",
            "lobby_desk_denied_total{service=\"front\",route=\"*/*\",status=\"401\",reason=\"no_credentials\"} 8",
            "lobby_desk_answer_seconds_bucket{le=\"0.5\",service=\"front\",route=\"*/*\",pool=\"web\"} 3",
            "lobby_desk_answer_seconds_bucket{le=\"+Inf\",service=\"front\",route=\"*/*\",pool=\"web\"} 4",
            "lobby_desk_answer_seconds_count{service=\"front\",route=\"*/*\",pool=\"web\"} 4",
            "lobby_desk_answer_seconds_sum{service=\"front\",route=\"*/*\",pool=\"web\"} 12.5",
            "lobby_desk_ejections_total{pool=\"web\",backend=\"10.0.0.11:80\"} 3",
            "lobby_desk_key_fetches_total{outcome=\"success\"} 13",
            "lobby_desk_key_fetches_total{outcome=\"failure\"} 14",
            "lobby_desk_troubles_total{reason=\"slow\"} 5",
            "lobby_desk_refused_connections_total{reason=\"firewall\"} 3",
            "lobby_desk_connections_total 12",
            "lobby_desk_retries_total 4",
            "lobby_desk_restarts_total 1",
            "lobby_desk_log_lines_lost_total 6",
            "lobby_desk_open_connections 2",
            "lobby_desk_websockets 1",
            "lobby_desk_passed_connections 5",
            "lobby_desk_up 1",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
