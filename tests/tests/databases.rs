//! Writes to the one primary, reads from its replicas: real PostgreSQL servers, and what happens to them.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use tests::{
    accounts::{PATIENCE, READ, WRITE, bank, certificate, cluster, document, servers, session, who},
    stage::Stage,
};
use xtask::{
    demo::bank::Bank,
    lab::{
        self, LabOptions, Postgres,
        postgres::{self, psql},
    },
};

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
    let readers: BTreeSet<_> = (0..16).map(|_| who(&stage, READ)).collect::<Result<_>>()?;
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

/// Fails over to a replica, and waits for the first COMMIT there. Which one it was.
fn fail_over(servers: &mut [Postgres], bank: &Bank) -> Result<usize> {
    let (new, promoted) = postgres::fail_over(servers)?;
    let following = promoted.elapsed();
    bank.pays(1, PATIENCE)?;
    println!(
        "first COMMIT {:?} after the promotion, of which {following:?} until a replica followed",
        promoted.elapsed()
    );
    Ok(new)
}

#[test]
fn a_killed_primary_loses_nothing_that_was_answered() -> Result<()> {
    if !lab::possible("a_killed_primary_loses_nothing_that_was_answered") {
        return Ok(());
    }
    bank(|_, servers, bank| {
        servers[0].kill()?;
        fail_over(servers, bank)
    })
}

#[test]
fn a_paused_primary_that_wakes_after_a_promotion_gets_nothing_more() -> Result<()> {
    if !lab::possible("a_paused_primary_that_wakes_after_a_promotion_gets_nothing_more") {
        return Ok(());
    }
    bank(|stage, servers, bank| {
        servers[0].pause()?;
        let new = fail_over(servers, bank)?;
        servers[0].resume()?;
        stage.until("the old primary is fenced", |stage| {
            let pool = stage.json(&["pool", "show", "accounts"])?;
            Ok(pool["cluster"]["servers"][0]["fenced"] == true)
        })?;
        let before = servers[0].sql("SELECT max(id) FROM transfers")?;
        bank.pays(100, PATIENCE)?;
        assert_eq!(servers[0].sql("SELECT max(id) FROM transfers")?, before);
        // Its sessions have spoken, and were told.
        stage.until("no session is left there", |_| {
            let left = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'teller' AND state <> 'active'";
            Ok(servers[0].sql(left)? == "0")
        })?;
        Ok(new)
    })
}

#[test]
fn a_replica_started_as_a_second_primary_gets_no_writes() -> Result<()> {
    if !lab::possible("a_replica_started_as_a_second_primary_gets_no_writes") {
        return Ok(());
    }
    bank(|stage, servers, bank| {
        servers[2].stop()?;
        servers[2].forget_primary()?;
        servers[2].start()?;
        stage.until("an alarm", |stage| {
            let pool = stage.json(&["pool", "show", "accounts"])?;
            Ok(pool["cluster"]["doubt"].is_string() && pool["cluster"]["servers"][2]["fenced"] == true)
        })?;
        let before = servers[2].sql("SELECT count(*) FROM transfers")?;
        bank.pays(100, PATIENCE)?;
        assert_eq!(servers[2].sql("SELECT count(*) FROM transfers")?, before);
        assert!(stage.lb(&["status"])?.contains("says that it is the primary too"), "{}", stage.log());
        Ok(0)
    })
}

#[test]
fn a_daemon_killed_in_the_middle_of_a_failover_is_followed_by_one_that_finishes_it() -> Result<()> {
    if !lab::possible("a_daemon_killed_in_the_middle_of_a_failover_is_followed_by_one_that_finishes_it") {
        return Ok(());
    }
    bank(|stage, servers, bank| {
        servers[0].kill()?;
        stage.until("nobody", |stage| {
            Ok(stage.json(&["pool", "show", "accounts"])?["cluster"]["primary"].is_null())
        })?;
        stage.daemon.take().expect("it runs").kill()?;
        let (new, _) = postgres::fail_over(servers)?;
        // Last, or the replica would have taken from it what the new primary does not have.
        servers[0].start()?;
        // The old primary runs and thinks that it is the primary; the daemon that starts knows it as such.
        stage.start()?;
        bank.pays(1, PATIENCE)?;
        Ok(new)
    })
}

#[test]
fn a_client_that_calls_while_there_is_no_primary_waits_for_the_next_one() -> Result<()> {
    if !lab::possible("a_client_that_calls_while_there_is_no_primary_waits_for_the_next_one") {
        return Ok(());
    }
    let (stage, mut servers) = cluster("on_no_primary = { hold = \"1h\" }", &[])?;
    let waits = |wanted: bool| {
        move |stage: &Stage| {
            let cluster = &stage.json(&["pool", "show", "accounts"])?["cluster"];
            Ok(cluster["primary"].is_null() && cluster["holds"] == wanted)
        }
    };
    servers[0].kill()?;
    stage.until("nobody, and clients wait", waits(true))?;
    assert!(stage.lb(&["pool", "show", "accounts"])?.contains("nobody, clients wait"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let place = stage.lab.client.clone();
    let caller = std::thread::spawn(move || -> Result<String> {
        let call =
            async { anyhow::Ok(session().await?.query_one("SELECT host(inet_server_addr())", &[]).await?) };
        Ok(place.run(|| runtime.block_on(call))??.get(0))
    });
    stage.until("a call without an answer", |stage| {
        let output = stage.lab.client.command("ss").args(["-Htn", "state", "syn-sent"]).output()?;
        Ok(!output.stdout.is_empty())
    })?;
    ensure!(!caller.is_finished(), "it was answered");
    servers[1].promote()?;
    let answer = caller.join().map_err(|_| anyhow::anyhow!("the caller has panicked"))?;
    assert_eq!(answer?, "10.2.0.11");

    // For a time.
    let text = std::fs::read_to_string(stage.document())?;
    stage.write(&text.replace("1h", "2s"))?;
    servers[1].kill()?;
    stage.until("nobody, and clients wait no more", waits(false))?;
    let refused = psql(&stage.lab.client, WRITE, "postgres", "SELECT 1").expect_err("nobody is there");
    assert!(refused.to_string().contains("refused"), "{refused:#}");
    stage.checksums_were_right()
}

#[test]
fn who_cannot_be_asked_has_no_role_and_says_why() -> Result<()> {
    if !lab::possible("who_cannot_be_asked_has_no_role_and_says_why") {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, &document(options, ", max_lag = \"5s\"", ""))?;
    let servers = servers(&stage, &[])?;
    // Without the password that its rule asks for; a web server; nobody at all.
    drop(servers);
    let address = |i: usize| SocketAddr::new(stage.lab.backend_v4(i).into(), 5432);
    let directory = stage.directory().to_owned();
    std::fs::remove_dir_all(directory.join("postgres-b1"))?;
    let place = stage.lab.backends[0].clone();
    let server = Postgres::primary(&place, address(0), &directory, &["host all lb all scram-sha-256"], &[])?;
    server.sql("CREATE ROLE lb LOGIN PASSWORD 'let me look'")?;
    let web = stage.lab.backends[1].clone();
    stage.nginx_at(&web, 5432, "2")?;
    web.wait_for_tcp(SocketAddr::new(stage.lab.backend_v4(1).into(), 5432))?;
    stage.start()?;
    stage.until("reasons", |stage| {
        let backends = stage.json(&["backend", "list", "--pool", "accounts"])?;
        let failure = |number: usize| backends[number]["failure"].as_str().unwrap_or_default().to_owned();
        Ok(failure(0).contains("password") && !failure(1).is_empty() && failure(2).contains("connect"))
    })?;
    let pool = stage.json(&["pool", "show", "accounts"])?;
    for number in 0..3 {
        let server = &pool["cluster"]["servers"][number];
        assert!(
            server["role"].is_null() && server["written"] == false && server["read"] == false,
            "{server}"
        );
    }
    assert!(psql(&stage.lab.client, WRITE, "postgres", "SELECT 1").is_err());
    Ok(())
}

#[test]
fn who_is_asked_by_tls_shows_the_right_certificate_and_hears_a_password_from_the_environment() -> Result<()> {
    if !lab::possible(
        "who_is_asked_by_tls_shows_the_right_certificate_and_hears_a_password_from_the_environment",
    ) {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    let (trusted, right) = certificate(&stage, "db.example")?;
    let (_, other) = certificate(&stage, "another.example")?;
    let secret = "told to the daemon alone";
    let server = |number: usize, tls: &[String]| -> Result<Postgres> {
        let place = &stage.lab.backends[number];
        let address = SocketAddr::new(stage.lab.backend_v4(number).into(), 5432);
        let mut settings = vec!["log_connections=on"];
        settings.extend(tls.iter().map(String::as_str));
        let rules = ["hostssl all lb all scram-sha-256", "hostnossl all lb all trust"];
        let server = Postgres::primary(place, address, stage.directory(), &rules, &settings)?;
        server.sql(&format!("CREATE ROLE lb LOGIN PASSWORD '{secret}'"))?;
        Ok(server)
    };
    // The last would let anybody in who does not insist.
    let servers = [server(0, &right)?, server(1, &other)?, server(2, &[])?];
    let check = |host: &str| {
        let keys =
            format!(", password_env = \"LB_PASSWORD\", tls = true, host = \"{host}\", ca = \"{trusted}\"");
        document(options, &keys, "")
    };
    stage.write(&check("db.example"))?;
    stage.start_where(&[("LB_PASSWORD", secret)])?;
    let failures = |stage: &Stage, wanted: [&str; 3]| -> Result<()> {
        stage.until(&format!("{wanted:?}"), |stage| {
            let backends = stage.json(&["backend", "list", "--pool", "accounts"])?;
            Ok((0..3).zip(wanted).all(|(number, wanted): (usize, _)| {
                let failure = &backends[number]["failure"];
                if wanted.is_empty() {
                    failure.is_null()
                } else {
                    failure.as_str().is_some_and(|said| said.contains(wanted))
                }
            }))
        })
    };
    failures(&stage, ["", "certificate", "TLS"])?;
    stage.until("a primary", |stage| {
        Ok(stage.json(&["pool", "show", "accounts"])?["cluster"]["primary"] == "10.2.0.10:5432")
    })?;
    let pool = stage.json(&["pool", "show", "accounts"])?;
    let roles = [0, 1, 2].map(|number| pool["cluster"]["servers"][number]["role"].as_str());
    assert_eq!(roles, [Some("primary"), None, None], "{pool}");
    assert_eq!(who(&stage, WRITE)?, "10.2.0.10");
    let log = servers[0].log();
    assert!(
        log.contains("connection authorized: user=lb database=postgres application_name=lobby SSL enabled (protocol=TLSv1.3"),
        "{log}"
    );
    assert!(!servers[2].log().contains("user=lb"), "in clear text: {}", servers[2].log());
    // The name is looked at as well as who has signed it.
    stage.write(&check("yet.another.example"))?;
    failures(&stage, ["certificate", "certificate", "TLS"])?;
    // A daemon that was told something else.
    stage.write(&check("db.example"))?;
    drop(stage.daemon.take());
    stage.start_where(&[("LB_PASSWORD", "something else")])?;
    failures(&stage, ["password authentication failed", "certificate", "TLS"])?;
    let said =
        [stage.log(), stage.lb(&["pool", "show", "accounts"])?, stage.lb(&["doctor"]).unwrap_or_default()];
    for said in said {
        assert!(!said.contains(secret) && !said.contains("something else"), "the password is shown: {said}");
    }
    Ok(())
}

#[test]
fn readers_of_a_replica_that_is_late_stay_or_are_cut_as_the_document_says() -> Result<()> {
    if !lab::possible("readers_of_a_replica_that_is_late_stay_or_are_cut_as_the_document_says") {
        return Ok(());
    }
    for (pool, stays) in [("", true), ("on_unfit = \"keep\"", true), ("on_unfit = \"cut\"", false)] {
        let (stage, servers) = cluster(pool, &[])?;
        servers[0].sql("CREATE TABLE t (x int)")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let inside = |future| stage.lab.client.run(|| runtime.block_on(future))?;
        // One with each of the replicas.
        let mut readers = Vec::new();
        for replica in ["10.2.0.11", "10.2.0.12"] {
            readers.push(inside(reader(replica))?);
        }
        servers[2].sql("SELECT pg_wal_replay_pause()")?;
        stage.within(PATIENCE, "a replica that is late", |stage| {
            // Something to be late with.
            servers[0].sql("INSERT INTO t VALUES (1)")?;
            let pool = stage.json(&["pool", "show", "accounts"])?;
            Ok(pool["cluster"]["servers"][2]["read"] == false)
        })?;
        let asks = |number: usize| {
            let reader = &readers[number];
            let answer = async { tokio::time::timeout(PATIENCE, reader.simple_query("SELECT 7")).await };
            stage.lab.client.run(|| runtime.block_on(answer))
        };
        let fit = asks(0)??;
        ensure!(fit.is_ok(), "{pool}: who reads from the fit one has heard {fit:?}");
        let late = asks(1)??;
        ensure!(late.is_ok() == stays, "{pool}: who reads from the late one has heard {late:?}");
        if let Err(error) = late {
            println!("heard: {error:?}");
        }
        let cut = stage.json(&["service", "show", "accounts-read"])?["cut"].clone();
        assert_eq!(cut, u64::from(!stays), "{pool}");
        for _ in 0..6 {
            assert_eq!(who(&stage, READ)?, "10.2.0.11", "{pool}");
        }
        stage.checksums_were_right()?;
    }
    Ok(())
}

/// A session through the read port with this replica, from where the caller is.
async fn reader(replica: &str) -> Result<tokio_postgres::Client> {
    for _ in 0..64 {
        let session = postgres::connect(postgres::config(READ, "postgres").keepalives(false)).await?;
        let row = session.query_one("SELECT host(inet_server_addr())", &[]).await?;
        if row.get::<_, String>(0) == replica {
            return Ok(session);
        }
    }
    bail!("64 calls, and none came to {replica}")
}

#[test]
fn sessions_with_an_old_primary_are_cut_from_both_sides() -> Result<()> {
    if !lab::possible("sessions_with_an_old_primary_are_cut_from_both_sides") {
        return Ok(());
    }
    let (stage, servers) = cluster("", &[])?;
    servers[0].sql("CREATE TABLE t (x int)")?;
    let speaks = async {
        let talking = session().await?;
        talking.batch_execute("INSERT INTO t VALUES (1)").await?;
        // Another waits for an answer, which its server has no leave to give yet.
        let holding = "SELECT pg_advisory_lock(7)";
        let (holder, waiting) = (session().await?, session().await?);
        holder.batch_execute(holding).await?;
        let answer = waiting.batch_execute(holding);
        tokio::pin!(answer);
        let locked =
            |server: &Postgres| server.sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'");
        while locked(&servers[0])? != "2" {
            ensure!(tokio::time::timeout(TURN, &mut answer).await.is_err(), "it did not wait");
        }

        // The old one is alive, and does not know.
        servers[1].promote()?;
        stage.until("the new primary", |stage| {
            Ok(stage.json(&["pool", "show", "accounts"])?["cluster"]["primary"] == "10.2.0.11:5432")
        })?;
        ensure!(
            talking.batch_execute("INSERT INTO t VALUES (2)").await.is_err(),
            "written to the old primary"
        );
        ensure!(servers[0].sql("SELECT x FROM t")? == "1", "written to the old primary");
        // Its answer does not arrive, and it is told so.
        let release =
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted";
        servers[0].sql(release)?;
        stage.until("both sessions end there", |_| Ok(locked(&servers[0])? == "0"))?;
        let answered = tokio::time::timeout(PATIENCE, &mut answer).await;
        ensure!(matches!(answered, Ok(Err(_))), "the one that waits has heard {answered:?}");
        Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    stage.lab.client.run(|| runtime.block_on(speaks))??;
    stage.checksums_were_right()
}

#[test]
fn silent_sessions_with_an_old_primary_hear_that_they_are_cut() -> Result<()> {
    if !lab::possible("silent_sessions_with_an_old_primary_hear_that_they_are_cut") {
        return Ok(());
    }
    let (stage, servers) = cluster("", &[])?;
    servers[0].sql("CREATE TABLE t (x int)")?;
    servers[0].sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")?;
    servers[0].sql("SELECT pg_reload_conf()")?;
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                    AND client_addr = '10.2.0.1' AND application_name <> 'lobby'";
    let speaks = async {
        let (idle, paying) = (session().await?, session().await?);
        // Its COMMIT waits for a replica that there is not.
        let commit = tokio::spawn(async move { paying.batch_execute("INSERT INTO t VALUES (1)").await });
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        while servers[0].sql(waits)? != "1" {
            tokio::time::sleep(TURN).await;
        }
        ensure!(servers[0].sql(sessions)? == "2", "sessions through the write port");
        servers[1].promote()?;
        let promoted = Instant::now();
        let heard = tokio::time::timeout(PATIENCE, commit).await;
        ensure!(heard.as_ref().is_ok_and(|heard| matches!(heard, Ok(Err(_)))), "the payer: {heard:?}");
        while !idle.is_closed() {
            ensure!(promoted.elapsed() < PATIENCE, "the idle client has heard nothing\n{}", stage.log());
            tokio::time::sleep(TURN).await;
        }
        println!("both clients had heard {:?} after the promotion", promoted.elapsed());
        Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    stage.lab.client.run(|| runtime.block_on(speaks))??;
    // A server does not look at its client while it waits for a replica; but its kernel has heard.
    stage.until("the idle session has ended, and no connection is left", |stage| {
        let output = stage.lab.backends[0].command("ss").args(["-Htn", "dst 10.2.0.1"]).output()?;
        let left = String::from_utf8_lossy(&output.stdout).into_owned();
        // The daemon's own is from a port above Lobby's.
        let own = |line: &str| line.rsplit(':').next().and_then(|port| port.trim().parse().ok());
        let through = left.lines().filter_map(own).filter(|port: &u16| *port < 32_768).count();
        Ok(servers[0].sql(sessions)? == "1" && through == 0)
    })?;
    let service = stage.json(&["service", "show", "accounts-write"])?;
    ensure!(service.to_string().contains("\"cut\":2"), "{service}");
    stage.checksums_were_right()
}

/// For what is not expected to happen.
const TURN: Duration = Duration::from_millis(100);
