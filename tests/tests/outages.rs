//! Databases of which a part cannot be reached, does not answer, or is late: who reads and writes where then.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Result, ensure};
use serde_json::Value;
use tests::{
    accounts::{PATIENCE, READ, SYNCHRONOUS, WRITE, bank, cluster, document, session, who},
    stage::{Stage, run},
};
use xtask::{
    demo::bank::Bank,
    lab::{
        self, LabOptions, Namespace, Postgres,
        postgres::{self, psql},
    },
};

/// What Lobby says of the cluster.
fn seen(stage: &Stage) -> Result<Value> {
    Ok(stage.json(&["pool", "show", "accounts"])?["cluster"].take())
}

fn until(stage: &Stage, what: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
    stage.within(PATIENCE, what, |stage| Ok(holds(&seen(stage)?)))
}

/// Lets a server's packets to an address get nowhere, or lets them go again.
fn cut_off(from: &Namespace, to: &[Ipv4Addr], off: bool) -> Result<()> {
    for address in to {
        let route = format!("route {} blackhole {address}/32", if off { "add" } else { "del" });
        let output = run(from, Path::new("ip"), &route.split(' ').collect::<Vec<_>>())?;
        ensure!(output.status.success(), "ip {route}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[test]
fn readers_pass_by_a_replica_that_is_late_paused_or_dead() -> Result<()> {
    if !lab::possible("readers_pass_by_a_replica_that_is_late_paused_or_dead") {
        return Ok(());
    }
    let (stage, mut servers) = cluster("", &[])?;
    servers[0].sql("CREATE TABLE t (x int)")?;
    let readers = |stage: &Stage| -> Result<Vec<String>> {
        let readers: BTreeSet<_> = (0..12).map(|_| who(stage, READ)).collect::<Result<_>>()?;
        Ok(readers.into_iter().collect())
    };
    let read = |number: usize, wanted: bool| {
        let servers = &servers;
        move |cluster: &Value| {
            // Something to be late with.
            let written = servers[0].sql("INSERT INTO t VALUES (1)").is_ok();
            written && cluster["servers"][number]["read"] == wanted
        }
    };
    servers[2].sql("SELECT pg_wal_replay_pause()")?;
    until(&stage, "a replica that is late", read(2, false))?;
    assert_eq!(readers(&stage)?, ["10.2.0.11"]);
    servers[2].sql("SELECT pg_wal_replay_resume()")?;
    until(&stage, "a replica that is fit again", read(2, true))?;

    servers[2].pause()?;
    until(&stage, "a replica that does not answer", read(2, false))?;
    assert_eq!(readers(&stage)?, ["10.2.0.11"]);
    servers[2].resume()?;
    until(&stage, "a replica that answers again", read(2, true))?;
    assert_eq!(readers(&stage)?, ["10.2.0.11", "10.2.0.12"]);

    for replica in [1, 2] {
        servers[replica].kill()?;
    }
    until(&stage, "nobody but the primary", |cluster| {
        cluster["servers"][0]["read"] == true && cluster["servers"][1]["read"] == false
    })?;
    stage.within(PATIENCE, "readers at the primary", |stage| {
        Ok(readers(stage).is_ok_and(|readers| readers == ["10.2.0.10"]))
    })?;
    assert_eq!(seen(&stage)?["changes"], 1, "writes went to one server all the time\n{}", stage.log());
    stage.checksums_were_right()
}

#[test]
fn who_is_silent_or_refuses_has_no_role_and_says_why() -> Result<()> {
    if !lab::possible("who_is_silent_or_refuses_has_no_role_and_says_why") {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    let password = stage.directory().join("lb.password");
    std::fs::write(&password, "let me look")?;
    let check = format!(", password_file = \"{}\"", password.display());
    stage.write(&document(options, &check, ""))?;
    let address = |i: usize| SocketAddr::new(stage.lab.backend_v4(i).into(), 5432);
    let server = |i: usize| {
        let rules = ["host all lb all scram-sha-256"];
        Postgres::primary(&stage.lab.backends[i], address(i), stage.directory(), &rules, &[])
    };
    let (wrong, closed) = (server(0)?, server(1)?);
    wrong.sql("CREATE ROLE lb LOGIN PASSWORD 'another'")?;
    closed.sql(
        "CREATE ROLE lb LOGIN PASSWORD 'let me look'; REVOKE CONNECT ON DATABASE postgres FROM PUBLIC",
    )?;
    // The kernel accepts for it, and nobody ever says anything.
    let _silent = stage.lab.backends[2].run(|| TcpListener::bind(address(2)))??;
    stage.start()?;
    stage.within(PATIENCE, "reasons", |stage| {
        let backends = stage.json(&["backend", "list", "--pool", "accounts"])?;
        let says = |number: usize, wanted: &str| {
            backends[number]["failure"].as_str().is_some_and(|failure| failure.contains(wanted))
        };
        Ok(says(0, "password authentication failed") && says(1, "permission denied") && says(2, "no answer"))
    })?;
    let shown = stage.lb(&["pool", "show", "accounts"])?;
    assert!(!shown.contains("let me look") && !stage.log().contains("let me look"), "the password is shown");
    let cluster = seen(&stage)?;
    for number in 0..3 {
        let server = &cluster["servers"][number];
        assert!(
            server["role"].is_null() && server["written"] == false && server["read"] == false,
            "{server}"
        );
    }
    assert!(cluster["primary"].is_null(), "{cluster}");
    Ok(())
}

#[test]
fn a_primary_that_only_lobby_cannot_reach_keeps_its_sessions_and_nobody_takes_its_place() -> Result<()> {
    if !lab::possible("a_primary_that_only_lobby_cannot_reach_keeps_its_sessions_and_nobody_takes_its_place")
    {
        return Ok(());
    }
    bank(|stage, servers, _| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let idle = stage.lab.client.run(|| runtime.block_on(session()))??;
        let balancer = [stage.lab.back_v4()];
        cut_off(servers[0].place(), &balancer, true)?;
        until(stage, "nobody to write to", |cluster| cluster["primary"].is_null())?;
        ensure!(psql(&stage.lab.client, WRITE, "postgres", "SELECT 1").is_err(), "written to somebody");
        cut_off(servers[0].place(), &balancer, false)?;
        until(stage, "the same one again", |cluster| cluster["primary"] == "10.2.0.10:5432")?;
        let answer = stage.lab.client.run(|| runtime.block_on(idle.query_one("SELECT 7", &[])))??;
        assert_eq!(answer.get::<_, i32>(0), 7);
        Ok(0)
    })
}

#[test]
fn a_primary_whose_replicas_are_cut_off_stays_the_primary() -> Result<()> {
    if !lab::possible("a_primary_whose_replicas_are_cut_off_stays_the_primary") {
        return Ok(());
    }
    bank(|stage, servers, bank| {
        let replicas = [stage.lab.backend_v4(1), stage.lab.backend_v4(2)];
        cut_off(servers[0].place(), &replicas, true)?;
        until(stage, "replicas that are late", |cluster| {
            // Something to be late with, and no COMMIT that would wait for them.
            let late = servers[0].sql("SELECT pg_logical_emit_message(false, 'late', 'x')").is_ok();
            late && cluster["servers"][1]["read"] == false && cluster["servers"][2]["read"] == false
        })?;
        let paid = bank.paid();
        assert_eq!(seen(stage)?["primary"], "10.2.0.10:5432");
        cut_off(servers[0].place(), &replicas, false)?;
        bank.pays(1, PATIENCE)?;
        println!("{paid} transfers before");
        assert_eq!(seen(stage)?["changes"], 1);
        Ok(0)
    })
}

#[test]
fn what_an_asynchronous_replica_did_not_have_is_counted_as_lost() -> Result<()> {
    if !lab::possible("what_an_asynchronous_replica_did_not_have_is_counted_as_lost") {
        return Ok(());
    }
    let (stage, mut servers) = cluster("", &[])?;
    Bank::found(&servers[0])?;
    let bank = Bank::open(&stage.lab.client, WRITE, READ);
    bank.pays(50, PATIENCE)?;
    cut_off(servers[0].place(), &[stage.lab.backend_v4(1), stage.lab.backend_v4(2)], true)?;
    // Those that were under way.
    bank.pays(12, PATIENCE)?;
    bank.pays(50, PATIENCE)?;
    servers[0].kill()?;
    servers[1].promote()?;
    bank.pays(50, PATIENCE)?;
    let account = bank.close(&servers[1])?;
    println!("{account:?}");
    assert!((50..=account.answered - 50).contains(&account.lost), "{account:?}");
    stage.checksums_were_right()
}

/// A client that calls the write port to pay 90 out of the account, if there is as much; whether that was done, and
/// answered.
fn pay(client: &Namespace) -> Result<bool> {
    let payment = async {
        let mut session = session().await?;
        let transaction = session.transaction().await?;
        let row = transaction.query_one("SELECT balance FROM account FOR UPDATE", &[]).await?;
        if row.get::<_, i32>(0) < 90 {
            return Ok(false);
        }
        transaction.execute("UPDATE account SET balance = balance - 90", &[]).await?;
        transaction.commit().await?;
        Ok(true)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // An answer that never comes is none.
    client.run(|| runtime.block_on(async { tokio::time::timeout(PATIENCE, payment).await }))??
}

#[test]
fn of_two_payments_of_90_from_an_account_with_100_one_is_made() -> Result<()> {
    if !lab::possible("of_two_payments_of_90_from_an_account_with_100_one_is_made") {
        return Ok(());
    }
    let (stage, mut servers) = cluster("", SYNCHRONOUS)?;
    servers[0].sql("CREATE TABLE account (balance int); INSERT INTO account VALUES (100)")?;
    let primary_is = |number: usize| {
        let address = format!("10.2.0.1{number}:5432");
        until(&stage, &format!("{address} as primary"), |cluster| cluster["primary"] == address)
    };

    // The first is answered, then its server dies.
    assert!(pay(&stage.lab.client)?, "the first was not made");
    servers[0].kill()?;
    let (new, _) = postgres::fail_over(&mut servers)?;
    primary_is(new)?;
    assert!(!pay(&stage.lab.client)?, "a second was made after the server of the first died");

    // The first waits for the answer to its COMMIT, which a replica would have to have, when another becomes the primary.
    let other = 3 - new;
    servers[new].sql("UPDATE account SET balance = 100")?;
    stage.within(PATIENCE, "the same at the replica", |_| {
        Ok(servers[other].sql("SELECT balance FROM account")? == "100")
    })?;
    cut_off(servers[new].place(), &[stage.lab.backend_v4(other)], true)?;
    let client = stage.lab.client.clone();
    let first = thread::spawn(move || pay(&client));
    stage.within(PATIENCE, "a payment that waits", |_| {
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        Ok(servers[new].sql(waits)? == "1")
    })?;
    servers[other].promote()?;
    let address = servers[other].address();
    servers[0].copy(address)?;
    servers[0].start()?;
    primary_is(other)?;
    let told = first.join().expect("it does not panic");
    let told = told.expect_err("the first was answered by a server that is not the primary");
    println!("the first was told: {told:#}");
    assert!(pay(&stage.lab.client)?, "the second was not made, though the first was not");
    assert!(!pay(&stage.lab.client)?, "a third was made");
    assert_eq!(servers[other].sql("SELECT balance FROM account")?, "10");
    stage.checksums_were_right()
}

/// A server as its manager knows it: "primary" or "replica", and the timeline.
type Known = Arc<Mutex<(&'static str, u32)>>;

/// Answers on port 5432 with its name, and on 8008 as Patroni's REST API does. For as long as the test runs.
fn managed(place: &Namespace, ip: Ipv4Addr, known: &Known) -> Result<()> {
    let listen = |port: u16| place.run(|| TcpListener::bind((ip, port)));
    let (database, api) = (listen(5432)??, listen(8008)??);
    let name = ip.to_string();
    thread::spawn(move || {
        for mut client in database.incoming().flatten() {
            // Who does not wait for it need not have it.
            _ = client.write_all(name.as_bytes());
        }
    });
    let known = Arc::clone(known);
    thread::spawn(move || {
        for mut client in api.incoming().flatten() {
            let mut asked = [0; 1024];
            let length = client.read(&mut asked).unwrap_or(0);
            let asked = String::from_utf8_lossy(&asked[..length]).into_owned();
            let (role, timeline) = *known.lock().expect("nobody panics with it");
            let fits = asked.starts_with(&format!("GET /{role}"));
            let status = if fits { "200 OK" } else { "503 Service Unavailable" };
            let body = format!("{{\"role\": \"{role}\", \"timeline\": {timeline}}}");
            _ = client.write_all(
                format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                )
                .as_bytes(),
            );
        }
    });
    Ok(())
}

#[test]
fn a_manager_that_tells_roles_by_http_is_followed_at_once_when_it_calls() -> Result<()> {
    if !lab::possible("a_manager_that_tells_roles_by_http_is_followed_at_once_when_it_calls") {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    // So long that it is asked again only if somebody says so.
    let check = "health = { http_role = { primary = \"/primary\", replica = \"/replica?lag=5MB\" }, port = 8008, interval = \"1h\", timeout = \"2s\" }\n";
    let document = document(options, "", "");
    let lines = document.lines().map(|line| if line.starts_with("health") { check } else { line });
    stage.write(&lines.collect::<Vec<_>>().join("\n"))?;
    let managers: Vec<Known> =
        (0..3).map(|i| Arc::new(Mutex::new((if i == 0 { "primary" } else { "replica" }, 1)))).collect();
    for (i, known) in managers.iter().enumerate() {
        managed(&stage.lab.backends[i], stage.lab.backend_v4(i), known)?;
    }
    let say = |number: usize, role, timeline| {
        *managers[number].lock().expect("nobody panics with it") = (role, timeline);
    };
    // As a callback on_role_change does.
    let call = |stage: &Stage| {
        let hook = "--fail --silent --show-error --unix-socket /run/lobby/lb.sock -X POST http://lb/v1/pools/accounts/recheck";
        let output = run(&stage.lab.balancer, Path::new("curl"), &hook.split(' ').collect::<Vec<_>>())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    stage.start()?;
    let answers = |port: SocketAddr| -> Result<String> {
        let mut server = stage.lab.client.run(|| TcpStream::connect(port))??;
        let mut name = String::new();
        server.read_to_string(&mut name)?;
        Ok(name)
    };
    until(&stage, "a primary and two replicas", |cluster| {
        cluster["primary"] == "10.2.0.10:5432"
            && cluster["servers"][1]["read"] == true
            && cluster["servers"][2]["read"] == true
    })?;
    assert_eq!(answers(WRITE)?, "10.2.0.10");
    assert_ne!(answers(READ)?, "10.2.0.10");

    // The first is not told of it.
    say(1, "primary", 2);
    call(&stage)?;
    until(&stage, "the promoted one", |cluster| {
        cluster["primary"] == "10.2.0.11:5432" && cluster["servers"][0]["fenced"] == true
    })?;
    assert_eq!(answers(WRITE)?, "10.2.0.11");
    assert_eq!(answers(READ)?, "10.2.0.12");

    say(0, "replica", 2);
    say(1, "none", 2);
    call(&stage)?;
    until(&stage, "nobody", |cluster| {
        cluster["primary"].is_null() && cluster["servers"][1]["role"] == "neither"
    })?;
    assert!(answers(WRITE).is_err(), "written to a server that is neither");
    Ok(())
}
