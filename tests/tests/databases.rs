//! Writes to the one primary, reads from its replicas: real PostgreSQL servers, and what happens to them.

use std::net::SocketAddr;

use anyhow::Result;
use tests::stage::Stage;
use xtask::lab::{self, LabOptions, Postgres, VIP, postgres::psql};

const WRITE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), 5432);
const READ: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), 5433);

/// The document: `check` are more keys of the PostgreSQL check, `pool` more of the pool.
fn document(lab: LabOptions, check: &str, pool: &str) -> String {
    let network = if lab.two_interfaces { 2 } else { 1 };
    let backends: Vec<_> =
        (0..lab.backends).map(|i| format!("{{ address = \"10.{network}.0.{}:5432\" }}", 10 + i)).collect();
    format!(
        "interfaces = [\"front\", \"back\"]\n\
         [pools.accounts]\n\
         health = {{ postgres = {{ user = \"lb\", database = \"postgres\"{check} }}, interval = \"1s\", rise = 2, fall = 3 }}\n\
         {pool}\n\
         backends = [ {} ]\n\
         [services.accounts-write]\nlisten = \"{WRITE}/tcp\"\npool = \"accounts\"\nrole = \"primary\"\n\
         [services.accounts-read]\nlisten = \"{READ}/tcp\"\npool = \"accounts\"\nrole = \"replica\"\n",
        backends.join(", ")
    )
}

/// A stage with a primary and replicas that stream from it, all seen by the daemon. The user that asks may
/// do nothing but connect.
fn cluster(pool: &str, settings: &[&str]) -> Result<(Stage, Vec<Postgres>)> {
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    let servers = servers(&stage, settings)?;
    let password = stage.directory().join("lb.password");
    let check = format!(", password_file = \"{}\", max_lag = \"5s\"", password.display());
    stage.write(&document(options, &check, pool))?;
    stage.start()?;
    until_roles(&stage, &["primary", "replica", "replica"])?;
    Ok((stage, servers))
}

fn servers(stage: &Stage, settings: &[&str]) -> Result<Vec<Postgres>> {
    let address = |i: usize| SocketAddr::new(stage.lab.backend_v4(i).into(), 5432);
    let place = |i: usize| &stage.lab.backends[i];
    let rules = ["host all lb all scram-sha-256"];
    let mut servers = vec![Postgres::primary(place(0), address(0), stage.directory(), &rules, settings)?];
    servers[0].sql("CREATE ROLE lb LOGIN PASSWORD 'let me look'")?;
    std::fs::write(stage.directory().join("lb.password"), "let me look\n")?;
    for i in 1..stage.lab.backends.len() {
        servers.push(Postgres::replica(place(i), address(i), stage.directory(), address(0), settings)?);
    }
    Ok(servers)
}

/// Waits until `lb pool show` names these roles, in the document's order.
fn until_roles(stage: &Stage, roles: &[&str]) -> Result<()> {
    stage.until(&format!("{roles:?}"), |stage| {
        let pool = stage.json(&["pool", "show", "accounts"])?;
        let servers = pool["cluster"]["servers"].as_array().cloned().unwrap_or_default();
        Ok(servers.iter().map(|server| server["role"].as_str()).eq(roles.iter().copied().map(Some)))
    })
}

/// Which server answers on a port: its address.
fn who(stage: &Stage, port: SocketAddr) -> Result<String> {
    psql(&stage.lab.client, port, "postgres", "SELECT host(inet_server_addr())")
}

#[test]
fn writes_follow_a_promotion_and_never_go_back() -> Result<()> {
    if !lab::possible("writes_follow_a_promotion_and_never_go_back") {
        return Ok(());
    }
    let (stage, mut servers) = cluster("", &[])?;
    servers[0].sql("CREATE TABLE t (x int)")?;
    let write = |x| psql(&stage.lab.client, WRITE, "postgres", &format!("INSERT INTO t VALUES ({x})"));
    write(1)?;
    assert_eq!(who(&stage, WRITE)?, "10.2.0.10");
    let readers: std::collections::BTreeSet<_> = (0..16).map(|_| who(&stage, READ)).collect::<Result<_>>()?;
    assert_eq!(readers.into_iter().collect::<Vec<_>>(), ["10.2.0.11", "10.2.0.12"]);

    servers[0].kill()?;
    // Nobody says that it is the primary: clients are told at once.
    stage.until("a refusal", |_| Ok(write(2).is_err_and(|error| error.to_string().contains("refused"))))?;
    servers[1].promote()?;
    stage.until("a write", |_| Ok(write(3).is_ok()))?;
    assert_eq!(who(&stage, WRITE)?, "10.2.0.11");

    // The old one comes back and thinks that it is the primary still.
    servers[0].start()?;
    stage.until("an alarm", |stage| {
        let pool = stage.json(&["pool", "show", "accounts"])?;
        Ok(pool["cluster"]["servers"][0]["fenced"] == true && pool["cluster"]["doubt"].is_string())
    })?;
    for _ in 0..10 {
        assert_eq!(who(&stage, WRITE)?, "10.2.0.11");
    }
    // Even when it is the only one left.
    servers[1].kill()?;
    stage.until("a refusal", |_| Ok(write(4).is_err()))?;
    stage.until("nobody", |stage| {
        Ok(stage.json(&["pool", "show", "accounts"])?["cluster"]["primary"].is_null())
    })?;
    assert!(write(5).is_err());
    assert_eq!(servers[0].sql("SELECT x FROM t")?, "1", "what was written to the old primary");
    // Unless somebody says so.
    stage.lb(&["pool", "promote", "accounts", "10.2.0.10:5432"])?;
    write(6)?;
    assert_eq!(servers[0].sql("SELECT x FROM t ORDER BY x")?, "1\n6");
    stage.checksums_were_right()
}
