//! Servers that do not even say that nobody is there: what calls them goes nowhere.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    desk::{Deed, Recorder, answer},
    document::{backend_v4, backend_v6},
    requests::{Answer, Speaker},
    stage::{Stage, run},
};
use xtask::lab::{self, LabOptions};

/// How long a connection to a server may take to come about.
const CONNECT: Duration = Duration::from_secs(1);
/// What this machine may be late. The kernel alone would try for two minutes.
const LATE: Duration = Duration::from_secs(10);

/// What the desk answers to a request, and how long that took.
fn ask(stage: &Stage, to: SocketAddr, request: &str) -> Result<(Answer, Duration)> {
    let mut speaker = Speaker::connect(&stage.lab.client, to)?;
    let began = Instant::now();
    speaker.say(request.as_bytes())?;
    let answer = speaker.hear()?.context("an answer")?;
    Ok((answer, began.elapsed()))
}

/// The first server's host drops what calls it. Where it is the only one the client hears so when the time is over; where
/// there is another, that one answers, whatever the request is: nothing of it has been sent.
#[test]
fn a_server_that_drops_calls_is_waited_for_as_long_as_it_may_take() -> Result<()> {
    if !lab::possible("a_server_that_drops_calls_is_waited_for_as_long_as_it_may_take") {
        return Ok(());
    }
    let options = LabOptions::default();
    let mut document = "interfaces = [\"front\", \"back\"]\n".to_owned();
    let families: [fn(LabOptions, usize) -> String; 2] = [backend_v4, backend_v6];
    for (number, (vip, address)) in Stage::VIPS.into_iter().zip(families).enumerate() {
        let (dropping, other) = (address(options, 0), address(options, 1));
        for (name, protocol) in [("one", "http1"), ("two", "h2")] {
            document += &format!(
                "[pools.{name}{number}]\nbackends = [ {{ address = \"{dropping}\" }} ]\nprotocol = \"{protocol}\"\n"
            );
        }
        document += &format!(
            r#"
[pools.both{number}]
backends = [ {{ address = "{dropping}" }}, {{ address = "{other}" }} ]
[services.shop{number}]
listen = "{}/tcp"
timeouts = {{ connect = "{}s" }}
[[services.shop{number}.routes]]
path = "/one"
pool = "one{number}"
[[services.shop{number}.routes]]
path = "/two"
pool = "two{number}"
[[services.shop{number}.routes]]
path = "/both"
pool = "both{number}"
sticky = {{ header = "x-user" }}
"#,
            SocketAddr::new(vip, 80),
            CONNECT.as_secs()
        );
    }
    let mut stage = Stage::without_daemon(options, &document)?;
    let rules =
        "table inet guard { chain in { type filter hook input priority 0; tcp dport 8080 counter drop; }\n}";
    let made = run(&stage.lab.backends[0], Path::new("nft"), &[rules])?;
    ensure!(made.status.success(), "nft: {}", String::from_utf8_lossy(&made.stderr));
    let listener = stage.lab.backends[1].run(|| TcpListener::bind("[::]:8080"))??;
    let recorder = Recorder::on(listener, |_| Deed::Say(answer("ok")))?;
    stage.start()?;
    for vip in Stage::VIPS {
        let to = SocketAddr::new(vip, 80);
        for path in ["/one", "/two"] {
            let get = format!("GET {path} HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\n\r\n");
            let (answer, took) = ask(&stage, to, &get)?;
            ensure!(answer.status == 502 && answer.body.contains("\"reason\":\"unreachable\""), "{answer:?}");
            assert_eq!(answer.header("retry-after"), Some("5"), "{}", answer.head);
            ensure!((CONNECT..CONNECT + LATE).contains(&took), "{vip}{path}: after {took:?}");
        }
        let mut waited = 0;
        for number in 0..12 {
            let (method, body) = if number % 2 == 0 { ("GET", "") } else { ("POST", "a body") };
            let request = format!(
                "{method} /both HTTP/1.1\r\nHost: a\r\nX-User: {number}\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let (answer, took) = ask(&stage, to, &request)?;
            assert_eq!((answer.status, answer.body.as_str()), (200, "ok"), "{vip}: {request}");
            ensure!(took < CONNECT + LATE, "{vip}: after {took:?}");
            waited += u32::from(took >= CONNECT);
            let got = recorder.take();
            assert_eq!(got.len(), 1, "{vip}: {got:?}");
            assert_eq!((got[0].line(), got[0].body.as_str()), (&*format!("{method} /both HTTP/1.1"), body));
        }
        // Some of the users are of the one that drops calls, in every run the same.
        println!("{vip}: {waited} of 12 had to wait");
        ensure!((1..12).contains(&waited), "{vip}: {waited} of 12 had to wait");
    }
    let dropped = run(&stage.lab.backends[0], Path::new("nft"), &["list", "table", "inet", "guard"])?;
    let dropped = String::from_utf8_lossy(&dropped.stdout).into_owned();
    ensure!(!dropped.contains("packets 0"), "{dropped}");
    stage.checksums_were_right()
}

/// Nobody has ever been fit: the room is closed as soon as the servers have been asked once, and with a server that is fit it
/// opens. Those that fail as often as a fit one may are unhealthy, and it is an alarm that all are.
#[test]
fn a_room_whose_servers_have_never_been_fit_is_closed() -> Result<()> {
    if !lab::possible("a_room_whose_servers_have_never_been_fit_is_closed") {
        return Ok(());
    }
    let options = LabOptions::default();
    let servers = [0, 1].map(|server| format!("{{ address = \"{}\" }}", backend_v4(options, server)));
    let document = format!(
        "interfaces = [\"front\", \"back\"]\n[pools.web]\nbackends = [ {} ]\n\
         health = {{ tcp = true, interval = \"200ms\", fall = 2 }}\n\
         [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\nroutes = [ {{ pool = \"web\" }} ]\n",
        servers.join(", ")
    );
    let mut stage = Stage::without_daemon(options, &document)?;
    stage.start()?;
    let get = "GET / HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\n\r\n";
    let status =
        |stage: &Stage| Ok::<_, anyhow::Error>(ask(stage, (Stage::VIPS[0], 80).into(), get)?.0.status);
    stage.until("a closed room", |stage| Ok(status(stage)? == 503))?;
    stage.until_states("web", &["unhealthy"; 2])?;
    assert_eq!(status(&stage)?, 503);
    let alarms = stage.json(&["status"])?["status"]["alarms"].to_string();
    assert!(alarms.contains("every backend of pool web fails its check"), "{alarms}");

    stage.nginx(1)?;
    stage.until_states("web", &["unhealthy", "healthy"])?;
    stage.until("an open room", |stage| Ok(status(stage)? == 200))?;
    assert_eq!(stage.json(&["status"])?["status"]["alarms"].to_string(), "[]");
    Ok(())
}
