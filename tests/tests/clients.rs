//! Clients of a database as they are: libpq and JDBC with several hosts, TLS that is the server's own, much data, sessions that
//! say nothing for long, and calls to cancel.

use std::{
    fs::{self, File},
    future::poll_fn,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    process::{ChildStdin, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    accounts::{PATIENCE, READ, WRITE, certificate, cluster, document, until_roles},
    stage::Stage,
};
use tokio_postgres::{AsyncMessage, CancelToken, Client, NoTls};
use xtask::{
    lab::{
        self, LabOptions, Postgres, Proc,
        postgres::{self, psql},
    },
    setup::JDBC,
};

/// Runs SQL by psql at the client's place, with these parameters of libpq.
fn libpq(stage: &Stage, parameters: &str, sql: &str) -> Result<Output> {
    let mut command = stage.lab.client.command(postgres::programs()?.join("psql"));
    command.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--set", "ON_ERROR_STOP=1"]);
    command.args(["--dbname", &format!("dbname=postgres {parameters}"), "--command", sql]);
    Ok(command.stdin(Stdio::null()).env_remove("PGPASSWORD").output()?)
}

/// What it printed.
fn said(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn a_client_that_knows_several_hosts_finds_the_role_that_it_wants() -> Result<()> {
    if !lab::possible("a_client_that_knows_several_hosts_finds_the_role_that_it_wants") {
        return Ok(());
    }
    let (stage, mut servers) = cluster("", &[])?;
    let vip = WRITE.ip();
    let find = |ports: &str, wants: &str| {
        let hosts = vec![vip.to_string(); ports.split(',').count()].join(",");
        let parameters =
            format!("host={hosts} port={ports} user=postgres connect_timeout=3 target_session_attrs={wants}");
        said(&libpq(&stage, &parameters, "SELECT host(inet_server_addr()), inet_server_port()")?)
    };
    let replicas = ["10.2.0.11|5432", "10.2.0.12|5432"];
    // Whichever comes first; nobody listens on 5439 of the address.
    assert_eq!(find("5433,5432", "read-write")?, "10.2.0.10|5432");
    assert_eq!(find("5439,5433,5432", "primary")?, "10.2.0.10|5432");
    for wants in ["read-only", "standby", "prefer-standby"] {
        let found = find("5432,5433", wants)?;
        assert!(replicas.contains(&found.as_str()), "{wants}: {found}");
    }
    assert!(find("5432", "standby").is_err(), "the write port has no replica");
    servers[0].kill()?;
    servers[1].promote()?;
    stage.within(PATIENCE, "the new primary", |_| {
        Ok(find("5433,5432", "read-write").is_ok_and(|found| found == replicas[0]))
    })?;
    stage.checksums_were_right()
}

/// PostgreSQL's JDBC driver at the client's place, called by a program of Java as it is written.
struct Jdbc {
    _program: Proc,
    urls: ChildStdin,
    answers: mpsc::Receiver<String>,
}

impl Jdbc {
    fn start(stage: &Stage) -> Result<Self> {
        let program = stage.directory().join("Hosts.java");
        fs::write(&program, include_str!("../src/Hosts.java"))?;
        let mut command = stage.lab.client.command("java");
        command.args(["-cp", JDBC]).arg(program).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = Proc::start(command)?;
        let child = program.child();
        let urls = child.stdin.take().context("no standard input")?;
        let lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
        let (answer, answers) = mpsc::channel();
        // Ends with the program, or with whoever wanted to hear.
        std::thread::spawn(move || lines.map_while(Result::ok).all(|line| answer.send(line).is_ok()));
        Ok(Self { _program: program, urls, answers })
    }

    /// Which server it gets to by these ports, where it looks for one of this kind; or what it says instead.
    fn find(&mut self, ports: &str, wants: &str) -> Result<String> {
        let hosts: Vec<_> = ports.split(',').map(|port| format!("{}:{port}", WRITE.ip())).collect();
        // What it has found out about a host it believes for no time at all; a server that says nothing is not waited for.
        writeln!(
            self.urls,
            "jdbc:postgresql://{}/postgres?user=postgres&targetServerType={wants}&connectTimeout=3&loginTimeout=10\
             &socketTimeout=10&hostRecheckSeconds=0",
            hosts.join(",")
        )?;
        // Java is started before the first one.
        self.answers.recv_timeout(2 * PATIENCE).context("it says nothing, or has ended")
    }
}

#[test]
fn jdbc_with_several_hosts_finds_the_kind_of_server_that_it_wants() -> Result<()> {
    if !lab::possible("jdbc_with_several_hosts_finds_the_kind_of_server_that_it_wants") {
        return Ok(());
    }
    let (stage, mut servers) = cluster("", &[])?;
    let mut jdbc = Jdbc::start(&stage)?;
    let replicas = ["10.2.0.11 5432", "10.2.0.12 5432"];
    // Whichever comes first; nobody listens on 5439 of the address.
    assert_eq!(jdbc.find("5433,5432", "primary")?, "10.2.0.10 5432");
    assert_eq!(jdbc.find("5439,5433,5432", "primary")?, "10.2.0.10 5432");
    for wants in ["secondary", "preferSecondary"] {
        let found = jdbc.find("5432,5433", wants)?;
        assert!(replicas.contains(&found.as_str()), "{wants}: {found}");
    }
    let refused = jdbc.find("5432", "secondary")?;
    assert!(refused.contains("Could not find a server with specified targetServerType"), "{refused}");
    servers[0].kill()?;
    let (new, _) = postgres::fail_over(&mut servers)?;
    // The driver has seen others in their places.
    for (ports, wants, server) in [("5433,5432", "primary", new), ("5432,5433", "secondary", 3 - new)] {
        stage.within(PATIENCE, wants, |_| Ok(jdbc.find(ports, wants)? == replicas[server - 1]))?;
    }
    stage.checksums_were_right()
}

#[test]
fn the_servers_own_tls_goes_through_untouched() -> Result<()> {
    if !lab::possible("the_servers_own_tls_goes_through_untouched") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    let (cert, tls) = certificate(&stage, "db.example")?;
    let tls = tls.each_ref().map(String::as_str);
    let address = SocketAddr::new(stage.lab.backend_v4(0).into(), 5432);
    let rules = ["hostssl all teller all scram-sha-256", "hostnossl all teller all reject"];
    let server = Postgres::primary(&stage.lab.backends[0], address, stage.directory(), &rules, &tls)?;
    server.sql("CREATE ROLE lb LOGIN; CREATE ROLE teller LOGIN PASSWORD 'of my own'")?;
    stage.write(&document(options, "", ""))?;
    stage.start()?;
    until_roles(&stage, &["primary"])?;
    // The client takes this certificate alone, for this name alone, and proves its password by a hash of what
    // it saw of the certificate (SCRAM-SHA-256-PLUS): nobody can stand between the two.
    let call = |name: &str, more: &str| {
        let parameters = format!(
            "host={name} hostaddr={} port={} user=teller password='of my own' connect_timeout=3 {more}",
            WRITE.ip(),
            WRITE.port()
        );
        libpq(&stage, &parameters, "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    };
    let verified = format!("sslmode=verify-full sslrootcert={cert} channel_binding=require");
    assert_eq!(said(&call("db.example", &verified)?)?, "t|TLSv1.3");
    let refused = |output: Output, why: &str| {
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(why), "{error}");
    };
    refused(call("another.example", &verified)?, "does not match host name");
    refused(call("db.example", "sslmode=disable")?, "rejects connection");
    stage.checksums_were_right()
}

#[test]
fn a_large_table_is_copied_in_and_out_as_it_is() -> Result<()> {
    if !lab::possible("a_large_table_is_copied_in_and_out_as_it_is") {
        return Ok(());
    }
    const ROWS: usize = 400_000;
    let (stage, servers) = cluster("", &[])?;
    servers[0].sql("CREATE TABLE large (id int, text text)")?;
    let (into, out) = (stage.directory().join("into"), stage.directory().join("out"));
    let row =
        |number: usize| format!("{number}\t{:032x}\n", (number as u128).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let text: String = (0..ROWS).map(row).collect();
    fs::write(&into, &text)?;
    let at = |server: SocketAddr| format!("host={} port={} user=postgres", server.ip(), server.port());
    said(&libpq(&stage, &at(WRITE), &format!("\\copy large FROM '{}'", into.display()))?)?;
    assert_eq!(servers[0].sql("SELECT count(*), sum(id::bigint) FROM large")?, {
        format!("{ROWS}|{}", ROWS * (ROWS - 1) / 2)
    });
    let count = "SELECT count(*) FROM large";
    stage.within(PATIENCE, "all rows at the replicas", |_| {
        let there = |server: &Postgres| anyhow::Ok(server.sql(count)? == ROWS.to_string());
        Ok(there(&servers[1])? && there(&servers[2])?)
    })?;
    for port in [WRITE, READ] {
        let order = format!("\\copy (SELECT * FROM large ORDER BY id) TO '{}'", out.display());
        said(&libpq(&stage, &at(port), &order)?)?;
        ensure!(fs::read_to_string(&out)? == text, "what came out of {port} is not what went in");
        File::create(&out)?;
    }
    stage.checksums_were_right()
}

/// A session, and what it is notified of. `keepalive`: its TCP asks after so long whether the other is there.
async fn listener(keepalive: Option<Duration>) -> Result<(Client, mpsc::Receiver<String>)> {
    let mut config = postgres::config(WRITE, "postgres");
    config.keepalives(keepalive.is_some());
    if let Some(idle) = keepalive {
        config.keepalives_idle(idle).keepalives_interval(idle);
    }
    let (client, mut connection) = config.connect(NoTls).await?;
    let (tell, told) = mpsc::channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(notification) = message
                && tell.send(notification.payload().to_owned()).is_err()
            {
                return;
            }
        }
    });
    client.batch_execute("LISTEN calls").await?;
    Ok((client, told))
}

#[test]
fn a_session_that_only_listens_is_not_forgotten_while_its_tcp_asks_whether_the_other_is_there() -> Result<()>
{
    if !lab::possible(
        "a_session_that_only_listens_is_not_forgotten_while_its_tcp_asks_whether_the_other_is_there",
    ) {
        return Ok(());
    }
    let (stage, servers) = cluster("", &[])?;
    // As two hours and four minutes are to the two hours after which TCP asks where nobody says otherwise.
    let text = fs::read_to_string(stage.document())?;
    stage.write(&format!("{text}[timeouts]\nestablished = \"4s\"\n"))?;
    stage.until("the document", Stage::nothing_to_do)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    // Sockets that are made at the client's place stay there, whoever reads them.
    let place = stage.lab.client.clone();
    let (asking, _silent) = place.run(|| {
        runtime.block_on(async {
            anyhow::Ok((listener(Some(Duration::from_secs(1))).await?, listener(None).await?))
        })
    })??;
    let connections = |stage: &Stage| -> Result<Vec<String>> {
        let list = stage.json(&["connections", "--service", "accounts-write"])?;
        let list = list["connections"].as_array().cloned().unwrap_or_default();
        let of = |connection: &serde_json::Value| {
            assert_eq!(connection["backend"], "10.2.0.10:5432", "{connection}");
            assert_eq!(connection["state"], "established", "{connection}");
            connection["client"].as_str().unwrap_or_default().to_owned()
        };
        Ok(list.iter().map(of).collect())
    };
    let both = connections(&stage)?;
    assert_eq!(both.len(), 2, "{both:?}");
    // The one that began later and lets nobody ask is past its time; the other is older.
    stage.within(PATIENCE, "a session that is forgotten", |stage| Ok(connections(stage)?.len() == 1))?;
    servers[0].sql("NOTIFY calls, 'wake up'")?;
    assert_eq!(asking.1.recv_timeout(PATIENCE).context("the one that asks has heard nothing")?, "wake up");
    let answer = runtime.block_on(asking.0.query_one("SELECT 7", &[]))?;
    assert_eq!(answer.get::<_, i32>(0), 7);
    stage.checksums_were_right()
}

/// A session through a port with a query that takes an hour, which tells when it ends; and what cancels it.
async fn sleeper(port: SocketAddr) -> Result<(CancelToken, tokio::task::JoinHandle<String>)> {
    let client = postgres::connect(&postgres::config(port, "postgres")).await?;
    let token = client.cancel_token();
    let query = async move {
        let ended = client.batch_execute("SELECT pg_sleep(3600)").await;
        ended.err().map_or_else(|| "it has slept".to_owned(), |error| format!("{error:?}"))
    };
    Ok((token, tokio::spawn(query)))
}

#[test]
fn a_query_is_cancelled_through_either_port_for_certain_where_clients_stay_with_one_replica() -> Result<()> {
    if !lab::possible(
        "a_query_is_cancelled_through_either_port_for_certain_where_clients_stay_with_one_replica",
    ) {
        return Ok(());
    }
    let (stage, servers) = cluster("", &[])?;
    let sleeps = |server: &Postgres| {
        server.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'")
    };
    let cancels = async {
        let (token, ended) = sleeper(WRITE).await?;
        while sleeps(&servers[0])? != "1" {
            tokio::time::sleep(TURN).await;
        }
        token.cancel_query(NoTls).await?;
        let why = tokio::time::timeout(PATIENCE, ended).await??;
        ensure!(why.contains("canceling statement due to user request"), "{why}");

        // A cancel request is a connection of its own: the other replica knows nothing of the query, and says nothing.
        let (token, ended) = sleeper(READ).await?;
        let (begun, mut tries) = (Instant::now(), 0);
        while !ended.is_finished() {
            ensure!(begun.elapsed() < PATIENCE, "not cancelled by {tries} requests");
            token.cancel_query(NoTls).await?;
            tries += 1;
            tokio::time::sleep(TURN).await;
        }
        let why = ended.await?;
        ensure!(why.contains("canceling statement due to user request"), "{why}");
        println!("cancelled by {tries} requests, of which each reached one of two replicas");

        // Where a client stays with one replica, its first one does.
        let text = fs::read_to_string(stage.document())?;
        stage.write(&text.replace("role = \"replica\"", "role = \"replica\"\nscheduler = \"source\""))?;
        stage.until("the other scheduler", |stage| {
            let services = stage.json(&["service", "list"])?;
            let services = services.as_array().context("services")?.iter();
            Ok(services.filter(|service| service["scheduler"] == "source").count() == 1)
        })?;
        for _ in 0..6 {
            let (token, ended) = sleeper(READ).await?;
            while sleeps(&servers[1])? != "1" && sleeps(&servers[2])? != "1" {
                tokio::time::sleep(TURN).await;
            }
            token.cancel_query(NoTls).await?;
            let why =
                tokio::time::timeout(PATIENCE, ended).await.context("not cancelled by one request")??;
            ensure!(why.contains("canceling statement due to user request"), "{why}");
        }
        Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    stage.lab.client.run(|| runtime.block_on(cancels))??;
    stage.checksums_were_right()
}

/// From one look to the next.
const TURN: Duration = Duration::from_millis(100);

/// Reads by `nat` and by `dsr`, over both families: a replica answers, also with more than fits a window.
#[test]
fn reads_go_by_every_mode_over_both_families() -> Result<()> {
    if !lab::possible("reads_go_by_every_mode_over_both_families") {
        return Ok(());
    }
    for vip in Stage::VIPS {
        let options = LabOptions { backends: 2, ..LabOptions::default() };
        let mut stage = Stage::without_daemon(options, "")?;
        let address = |i: usize| match vip {
            IpAddr::V4(_) => SocketAddr::new(stage.lab.backend_v4(i).into(), 5432),
            IpAddr::V6(_) => SocketAddr::new(stage.lab.backend_v6(i).into(), 5432),
        };
        // With `dsr` a server is called by the VIP.
        let everywhere = ["listen_addresses=*"];
        let (place, directory) = (|i: usize| &stage.lab.backends[i], stage.directory());
        let primary = Postgres::primary(place(0), address(0), directory, &[], &everywhere)?;
        primary.sql("CREATE ROLE lb LOGIN")?;
        let _replica = Postgres::replica(place(1), address(1), directory, address(0), &everywhere)?;
        stage.hold_vips(1)?;
        let port = |port| SocketAddr::new(vip, port);
        let (write, read, direct) = (port(5434), port(5433), port(5432));
        stage.write(&format!(
            "interfaces = [\"front\", \"back\"]\n[pools.accounts]\n\
             health = {{ postgres = {{ user = \"lb\", database = \"postgres\" }}, interval = \"1s\" }}\n\
             backends = [{{ address = \"{}\" }}, {{ address = \"{}\" }}]\n\
             [services.write]\nlisten = \"{write}/tcp\"\npool = \"accounts\"\nrole = \"primary\"\n\
             [services.read]\nlisten = \"{read}/tcp\"\npool = \"accounts\"\nrole = \"replica\"\n\
             [services.direct]\nlisten = \"{direct}/tcp\"\npool = \"accounts\"\nrole = \"replica\"\n\
             forward = \"dsr\"\n",
            address(0),
            address(1)
        ))?;
        stage.start()?;
        until_roles(&stage, &["primary", "replica"])?;
        let ask = |port, sql: &str| psql(&stage.lab.client, port, "postgres", sql);
        for (port, is_replica) in [(write, "f"), (read, "t"), (direct, "t")] {
            stage.until(&format!("an answer on {port}"), |_| Ok(ask(port, "SELECT 1").is_ok()))?;
            assert_eq!(ask(port, "SELECT pg_is_in_recovery()")?, is_replica, "{port}");
            let much = ask(port, "SELECT repeat('x', 1000) FROM generate_series(1, 20000)")?;
            assert_eq!(much.len(), 20000 * 1001 - 1, "{port}");
        }
        assert!(ask(direct, "CREATE TABLE t (x int)").is_err(), "written to a replica");
    }
    Ok(())
}
