//! A database cluster behind Lobby: servers, a document with a write port and a read port, and questions to both.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{PermissionsExt as _, chown},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::User;
use xtask::{
    demo::bank::Bank,
    lab::{
        LabOptions, Postgres, VIP,
        postgres::{self, psql},
    },
};

use crate::stage::Stage;

/// The write port.
pub const WRITE: SocketAddr = SocketAddr::new(IpAddr::V4(VIP), 5432);
/// The read port.
pub const READ: SocketAddr = SocketAddr::new(IpAddr::V4(VIP), 5433);

/// The document: `check` are more keys of the PostgreSQL check, `pool` more of the pool.
pub fn document(lab: LabOptions, check: &str, pool: &str) -> String {
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
///
/// # Errors
/// When servers or the daemon do not start.
pub fn cluster(pool: &str, settings: &[&str]) -> Result<(Stage, Vec<Postgres>)> {
    cluster_in(LabOptions { backends: 3, ..LabOptions::default() }, ", max_lag = \"5s\"", pool, settings)
}

/// The same in another lab, a server for each of its backends; `check` are more keys of the PostgreSQL check.
///
/// # Errors
/// As [`cluster`].
pub fn cluster_in(
    lab: LabOptions,
    check: &str,
    pool: &str,
    settings: &[&str],
) -> Result<(Stage, Vec<Postgres>)> {
    let mut stage = Stage::without_daemon(lab, "")?;
    let servers = servers(&stage, settings)?;
    let password = stage.directory().join("lb.password");
    let check = format!(", password_file = \"{}\"{check}", password.display());
    stage.write(&document(lab, &check, pool))?;
    stage.start()?;
    let roles: Vec<_> = (0..servers.len()).map(|i| if i == 0 { "primary" } else { "replica" }).collect();
    until_roles(&stage, &roles)?;
    Ok((stage, servers))
}

/// Just the servers, and the password of the user that asks, in a file.
///
/// # Errors
/// When they do not start.
pub fn servers(stage: &Stage, settings: &[&str]) -> Result<Vec<Postgres>> {
    let address = |i: usize| SocketAddr::new(stage.lab.backend_v4(i).into(), 5432);
    let place = |i: usize| &stage.lab.backends[i];
    let rules = ["host all lb all scram-sha-256"];
    let mut servers = vec![Postgres::primary(place(0), address(0), stage.directory(), &rules, settings)?];
    servers[0].sql("CREATE ROLE lb LOGIN PASSWORD 'let me look'")?;
    fs::write(stage.directory().join("lb.password"), "let me look\n")?;
    for i in 1..stage.lab.backends.len() {
        servers.push(Postgres::replica(place(i), address(i), stage.directory(), address(0), settings)?);
    }
    Ok(servers)
}

/// A certificate of a server's own for this name, which stands for itself: its file, and what a server needs to show it.
///
/// # Errors
/// When it cannot be made.
pub fn certificate(stage: &Stage, name: &str) -> Result<(String, [String; 3])> {
    let made = rcgen::generate_simple_self_signed([name.to_owned()])?;
    let cert = stage.directory().join(format!("{name}.pem"));
    let key = stage.directory().join(format!("{name}.key"));
    fs::write(&cert, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;
    fs::set_permissions(&cert, fs::Permissions::from_mode(0o644))?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let user = User::from_name("postgres")?.context("there is no user postgres")?;
    chown(&key, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    let cert = cert.display().to_string();
    let settings =
        ["ssl=on".to_owned(), format!("ssl_cert_file={cert}"), format!("ssl_key_file={}", key.display())];
    Ok((cert, settings))
}

/// Waits until `lb pool show` names these roles, in the document's order.
///
/// # Errors
/// When it does not come to that.
pub fn until_roles(stage: &Stage, roles: &[&str]) -> Result<()> {
    stage.until(&format!("{roles:?}"), |stage| {
        let pool = stage.json(&["pool", "show", "accounts"])?;
        let servers = pool["cluster"]["servers"].as_array().cloned().unwrap_or_default();
        Ok(servers.iter().map(|server| server["role"].as_str()).eq(roles.iter().copied().map(Some)))
    })
}

/// Which server answers on a port: its address.
///
/// # Errors
/// When nobody does.
pub fn who(stage: &Stage, port: SocketAddr) -> Result<String> {
    psql(&stage.lab.client, port, "postgres", "SELECT host(inet_server_addr())")
}

/// A connection through the write port, from where the caller is.
///
/// # Errors
/// When there is none.
pub async fn session() -> Result<tokio_postgres::Client> {
    postgres::connect(postgres::config(WRITE, "postgres").keepalives(false)).await
}

/// Every COMMIT is answered only when a replica has it too.
pub const SYNCHRONOUS: &[&str] = &["synchronous_standby_names=ANY 1 (b1, b2, b3)"];
/// More than anything here takes, on a machine with other things to do.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The bank at work on a cluster that loses nothing, with something happening to it meanwhile, which tells
/// who is the primary then. Nothing that was answered may be missing there.
///
/// # Errors
/// When something of that is not so.
pub fn bank(fault: impl FnOnce(&mut Stage, &mut [Postgres], &Bank) -> Result<usize>) -> Result<()> {
    let (mut stage, mut servers) = cluster("", SYNCHRONOUS)?;
    Bank::found(&servers[0])?;
    let bank = Bank::open(&stage.lab.client, WRITE, READ);
    bank.pays(100, PATIENCE)?;
    let primary = fault(&mut stage, &mut servers, &bank)?;
    bank.pays(100, PATIENCE)?;
    let account = bank.close(&servers[primary])?;
    println!("{account:?}");
    ensure!(account.lost == 0, "answered, and not there: {}\n{}", account.lost, stage.log());
    let of = |number: usize| stage.lab.backend_v4(number).to_string();
    ensure!(account.by == BTreeSet::from([of(0), of(primary)]), "who answered COMMITs: {:?}", account.by);
    stage.checksums_were_right()
}
