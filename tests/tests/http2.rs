//! HTTP/2 at the desk: frames that strangers may send, and what of them a backend gets to see; floods; and real
//! clients behind the program.

use std::{
    io::Write as _,
    net::IpAddr,
    path::Path,
    process::Output,
    time::{Duration, Instant},
};

use Outcome::{Ended, Reset, Status};
use anyhow::{Context as _, Result, ensure};
use tests::{
    desk::{Deed, Desk, HASTY, Recorder, answer, backend},
    document::backend_v4,
    frames::{END_STREAM, Frames, Outcome, fields, frame, kind, request},
    stage::{Stage, run},
};
use xtask::lab::{self, LabOptions};

/// Category, name, frames after the first settings, what becomes of stream 1, and what the backend sees: lines
/// and bodies.
type Vector = (&'static str, &'static str, Vec<u8>, Outcome, &'static [(&'static str, &'static str)]);

const GET: [(&str, &str); 4] = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")];
const POST: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a")];

/// A GET with more headers.
fn with(more: &[(&str, &str)]) -> Vec<u8> {
    request(1, END_STREAM, &[&GET, more].concat())
}

/// Headers, and a body in one piece.
fn with_body(head: &[(&str, &str)], more: &[(&str, &str)], body: &str) -> Vec<u8> {
    [request(1, 0, &[head, more].concat()), frame(kind::DATA, END_STREAM, 1, body.as_bytes())].concat()
}

/// A GET of a path.
fn path(path: &str) -> Vec<u8> {
    request(1, END_STREAM, &[(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "a")])
}

fn heads() -> Vec<Vector> {
    let only = |all: &[(&str, &str)]| request(1, END_STREAM, all);
    let is = "pseudo-headers";
    vec![
        (is, "as it should be", only(&GET), Status(200), &[("GET / HTTP/1.1", "")]),
        (is, "no path", only(&[GET[0], GET[1], GET[3]]), Reset, &[]),
        (is, "an empty path", path(""), Reset, &[]),
        (is, "no method", only(&GET[1..]), Reset, &[]),
        (is, "no scheme", only(&[GET[0], GET[2], GET[3]]), Reset, &[]),
        (is, "two paths", only(&[GET[0], GET[1], GET[2], GET[2], GET[3]]), Reset, &[]),
        (is, "two methods", only(&[GET[0], GET[0], GET[1], GET[2], GET[3]]), Reset, &[]),
        (is, "an unknown one", only(&[GET[0], GET[1], GET[2], GET[3], (":door", "1")]), Ended, &[]),
        (is, "that of an answer", only(&[GET[0], GET[1], GET[2], GET[3], (":status", "200")]), Reset, &[]),
        (is, "behind a header", only(&[GET[0], GET[1], GET[2], ("x", "1"), GET[3]]), Reset, &[]),
        (is, "no host at all", only(&GET[..3]), Status(400), &[]),
        (
            is,
            "a Host instead",
            only(&[GET[0], GET[1], GET[2], ("host", "a")]),
            Status(200),
            &[("GET / HTTP/1.1", "")],
        ),
        (is, "a Host besides", with(&[("host", "b")]), Status(400), &[]),
        (is, "two Hosts besides", with(&[("host", "a"), ("host", "a")]), Status(400), &[]),
        (is, "a user", only(&[GET[0], GET[1], GET[2], (":authority", "u@a")]), Status(400), &[]),
        (is, "an authority with a path", only(&[GET[0], GET[1], GET[2], (":authority", "a/b")]), Reset, &[]),
        (is, "a tunnel", only(&[(":method", "CONNECT"), (":authority", "a:443")]), Status(501), &[]),
        (
            is,
            "a tunnel of another protocol",
            only(&[(":method", "CONNECT"), (":protocol", "websocket"), GET[1], GET[2], GET[3]]),
            Reset,
            &[],
        ),
        (is, "a trace", only(&[(":method", "TRACE"), GET[1], GET[2], GET[3]]), Status(501), &[]),
    ]
}

fn headers() -> Vec<Vector> {
    let is = "headers";
    vec![
        (is, "a name in capitals", with(&[("X-Door", "1")]), Ended, &[]),
        (is, "connection", with(&[("connection", "close")]), Reset, &[]),
        (is, "keep-alive", with(&[("keep-alive", "timeout=5")]), Reset, &[]),
        (is, "proxy-connection", with(&[("proxy-connection", "close")]), Reset, &[]),
        (is, "upgrade", with(&[("upgrade", "websocket")]), Reset, &[]),
        (
            is,
            "transfer-encoding",
            with_body(&POST, &[("transfer-encoding", "chunked")], "0\r\n\r\n"),
            Reset,
            &[],
        ),
        (is, "te", with(&[("te", "gzip")]), Reset, &[]),
        (is, "te: trailers", with(&[("te", "trailers")]), Status(200), &[("GET / HTTP/1.1", "")]),
        (is, "the end of a line in a value", with(&[("x", "1\r\ny: 2")]), Ended, &[]),
        (is, "a return in a value", with(&[("x", "1\ry: 2")]), Ended, &[]),
        (is, "a zero in a value", with(&[("x", "1\0")]), Ended, &[]),
        (is, "the end of a line in a name", with(&[("x: 1\r\ny", "2")]), Ended, &[]),
        (is, "a space in a name", with(&[("x ", "1")]), Ended, &[]),
        (is, "a colon in a name", with(&[("x:y", "1")]), Ended, &[]),
        (is, "an empty name", with(&[("", "1")]), Ended, &[]),
        (is, "more than a hundred", with(&[("x", "1"); 101]), Status(431), &[]),
        (is, "cookies one by one", with(&[("cookie", "a=1"); 200]), Status(200), &[("GET / HTTP/1.1", "")]),
    ]
}

fn lengths() -> Vec<Vector> {
    let is = "lengths, and what becomes of them in HTTP/1.1";
    let post = |more: &[(&str, &str)], body: &str| with_body(&POST, more, body);
    let twice = [("content-length", "3"), ("content-length", "3")];
    let late = [request(1, 0, &POST), request(1, END_STREAM, &[(":path", "/admin")])].concat();
    vec![
        (
            is,
            "the right one",
            post(&[("content-length", "3")], "abc"),
            Status(200),
            &[("POST / HTTP/1.1", "abc")],
        ),
        (is, "none", post(&[], "abc"), Status(200), &[("POST / HTTP/1.1", "abc")]),
        (is, "none, of a GET", with_body(&GET, &[], "abc"), Status(200), &[("GET / HTTP/1.1", "abc")]),
        (
            is,
            "less than there is",
            post(&[("content-length", "1")], "abcGET /x HTTP/1.1\r\n\r\n"),
            Reset,
            &[],
        ),
        (is, "more than there is", post(&[("content-length", "9")], "abc"), Reset, &[]),
        (
            is,
            "nothing, and something",
            post(&[("content-length", "0")], "GET /x HTTP/1.1\r\n\r\n"),
            Reset,
            &[],
        ),
        (
            is,
            "something, and nothing",
            request(1, END_STREAM, &[&POST[..], &[("content-length", "9")]].concat()),
            Reset,
            &[],
        ),
        (is, "with a sign", post(&[("content-length", "+3")], "abc"), Reset, &[]),
        (is, "two of them", post(&twice, "abc"), Status(400), &[]),
        (is, "too much", post(&[("content-length", "99999999999")], ""), Reset, &[]),
        (
            is,
            "a chunk in the body",
            post(&[], "0\r\n\r\nGET /x HTTP/1.1\r\n\r\n"),
            Status(200),
            &[("POST / HTTP/1.1", "0\r\n\r\nGET /x HTTP/1.1\r\n\r\n")],
        ),
        // What stands behind a body is no head: it goes nowhere.
        (is, "another path behind the body", late, Status(200), &[("POST / HTTP/1.1", "")]),
    ]
}

fn paths() -> Vec<Vector> {
    let is = "paths and methods";
    let method = |method: &str| request(1, END_STREAM, &[(":method", method), GET[1], GET[2], GET[3]]);
    vec![
        (is, "dots", path("/x/../admin"), Status(403), &[]),
        (is, "encoded dots", path("/x/%2e%2E/admin"), Status(403), &[]),
        (is, "an encoded slash", path("/x/..%2fadmin"), Status(400), &[]),
        (is, "a backslash", path("/x\\..\\admin"), Status(400), &[]),
        (is, "an encoded letter", path("/%61dmin"), Status(403), &[]),
        (is, "two slashes", path("//admin"), Status(403), &[]),
        (is, "out of the root", path("/../admin"), Status(400), &[]),
        (is, "without a slash", path("admin"), Reset, &[]),
        (is, "a star", path("*"), Status(400), &[]),
        (is, "a whole address", path("http://b/admin"), Reset, &[]),
        (is, "a space", path("/x y"), Reset, &[]),
        (is, "another request", path("/x HTTP/1.1\r\nHost: b\r\n\r\nGET /admin"), Reset, &[]),
        (is, "a fragment", path("/x#/../admin"), Status(200), &[("GET /x HTTP/1.1", "")]),
        (
            is,
            "another request in the method",
            method("GET /admin HTTP/1.1\r\nHost: b\r\n\r\nGET"),
            Ended,
            &[],
        ),
        (is, "a space in the method", method("GET /x"), Ended, &[]),
    ]
}

/// Nothing of a vector reaches a backend out of its frame: the backend writes down every byte, and takes it
/// apart by the rules of HTTP/1.1.
fn play(vectors: Vec<Vector>) -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let desk = Desk::start(HASTY, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut wrong = Vec::new();
    for (category, name, bytes, expected, wanted) in vectors {
        let mut frames = Frames::to(desk.addresses[0])?;
        _ = frames.say(&bytes);
        let outcome = frames.outcome(1).with_context(|| name.to_string())?;
        // What was asked before an answer has been seen by then. Headers that cannot even be read end the
        // connection, since nobody knows what the next ones refer to.
        _ = frames.say(&request(5, END_STREAM, &[GET[0], GET[1], (":path", "/admin"), GET[3]]));
        let still = frames.outcome(5)?;
        let goes_on = if expected == Ended { Ended } else { Status(403) };
        let (fits, seen) = recorder.take_just(wanted);
        if outcome != expected || !fits || still != goes_on {
            wrong.push(format!(
                "{category}, {name}: {outcome:?} rather than {expected:?}, then {still:?}; the backend saw {seen:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn pseudo_headers_say_one_thing() -> Result<()> {
    play(heads())
}

#[test]
fn what_http1_would_read_otherwise_does_not_come_in() -> Result<()> {
    play(headers())
}

#[test]
fn lengths_are_those_of_the_frames() -> Result<()> {
    play(lengths())
}

#[test]
fn paths_have_one_meaning_in_http2() -> Result<()> {
    play(paths())
}

/// What a backend of HTTP/1.1 is told of a request by HTTP/2, and the access log.
#[test]
fn a_request_by_http2_is_one_by_http1_to_the_backend() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let services = HASTY.replacen("pool = \"web\"\n", "pool = \"web\"\naccess_log = true\n", 1);
    let desk = Desk::start(&services, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut frames = Frames::to(desk.addresses[0])?;
    let more = [
        ("cookie", "a=1"),
        ("x-forwarded-proto", "https"),
        ("cookie", "b=2"),
        ("te", "trailers"),
        ("x-forwarded-for", "192.0.2.1"),
    ];
    let head =
        [(":method", "GET"), (":scheme", "https"), (":path", "/x?y"), (":authority", "Shop.example:80")];
    frames.say(&request(1, END_STREAM, &[&head[..], &more].concat()))?;
    assert_eq!(frames.outcome(1)?, Status(200));
    let got = recorder.take().pop().context("a request")?;
    assert_eq!(got.line(), "GET /x?y HTTP/1.1");
    assert_eq!(got.header("host"), ["Shop.example:80"]);
    assert_eq!(got.header("cookie"), ["a=1; b=2"]);
    assert_eq!(got.header("te"), ["trailers"]);
    assert_eq!(got.header("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(got.header("x-forwarded-proto"), ["http"]);
    assert_eq!(got.header("x-forwarded-host"), ["Shop.example:80"]);
    let line: serde_json::Value = serde_json::from_str(&desk.line()?)?;
    assert_eq!((&line["protocol"], &line["host"]), (&"HTTP/2".into(), &"Shop.example:80".into()), "{line}");
    Ok(())
}

/// Floods end with their connection, or cost no memory; others are served meanwhile, and the backend sees only so much of them.
#[test]
fn floods_end_or_cost_nothing() -> Result<()> {
    let recorder = Recorder::start(|got| match got.line() {
        "GET /silent HTTP/1.1" => Deed::Nothing,
        _ => Deed::Say(answer("ok")),
    })?;
    let services = HASTY.replacen("response = \"1s\"", "response = \"20s\"", 1);
    let desk = Desk::start(&services, &[("web", vec![backend(recorder.address)])], &[])?;
    let silent = [GET[0], GET[1], (":path", "/silent"), GET[3]];
    let repeated = |one: &[u8], times: usize| one.repeat(times);
    let streams = |count: u32| (0..count).map(|number| 2 * number + 1);
    let cancel = |stream| frame(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]);
    let resets: Vec<u8> =
        streams(5000).flat_map(|at| [request(at, END_STREAM, &silent), cancel(at)].concat()).collect();
    let open = request(1, 0, &POST);
    let unfinished = frame(kind::HEADERS, END_STREAM, 1, &fields(&GET));
    let more = frame(kind::CONTINUATION, 0, 1, &fields(&[("x", &"y".repeat(1000))]));
    let large: Vec<(&str, &str)> = vec![("x", "y"); 3000];
    let setting = frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]);
    let wide = frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]);
    // Name, bytes, what becomes of stream 1, where anything does at once.
    let floods: Vec<(&str, Vec<u8>, Option<Outcome>)> = vec![
        ("requests given up at once", resets, Some(Ended)),
        ("headers without end", [unfinished.clone(), repeated(&more, 5000)].concat(), Some(Ended)),
        ("headers that stop", unfinished, Some(Ended)),
        (
            "headers one byte at a time",
            [frame(kind::HEADERS, 0, 1, b""), repeated(&frame(kind::CONTINUATION, 0, 1, b""), 50_000)]
                .concat(),
            Some(Ended),
        ),
        // RFC 9113 section 10.5.1, RFC 6585 section 5.
        ("too many headers", request(1, END_STREAM, &[&GET[..], &large].concat()), Some(Status(431))),
        ("settings", repeated(&setting, 200_000), None),
        ("pings", repeated(&frame(kind::PING, 0, 0, b"lobbyist"), 200_000), None),
        (
            "empty pieces of a body",
            [open.clone(), repeated(&frame(kind::DATA, 0, 1, b""), 200_000)].concat(),
            None,
        ),
        ("small pieces of a body", [open, repeated(&frame(kind::DATA, 0, 1, b"x"), 100_000)].concat(), None),
        ("a window beyond numbers", repeated(&wide, 3), Some(Ended)),
        ("mistakes", streams(5000).flat_map(|at| request(at, END_STREAM, &GET[1..])).collect(), Some(Ended)),
        ("frames of no known kind", repeated(&frame(0xbb, 0, 0, &[7; 100]), 100_000), None),
    ];
    let mut wrong = Vec::new();
    for (name, bytes, becomes) in floods {
        recorder.take();
        let before = desk.measure_memory()?;
        let mut frames = Frames::to(desk.addresses[0])?;
        let mut voice = frames.voice()?;
        let flood = std::thread::spawn(move || {
            // It may be cut off.
            _ = voice.write_all(&bytes);
        });
        if becomes == Some(Ended) {
            let all = frames.until_closed().with_context(|| name.to_owned())?;
            ensure!(all.len() < 20_000, "{name}: {} frames", all.len());
            flood.join().map_err(|_| anyhow::anyhow!("{name}"))?;
        } else {
            let mut other = Frames::to(desk.addresses[0])?;
            other.say(&request(1, END_STREAM, &GET))?;
            assert_eq!(other.outcome(1)?, Status(200), "{name}");
            if let Some(becomes) = becomes {
                assert_eq!(frames.outcome(1)?, becomes, "{name}");
                frames.say(&request(3, END_STREAM, &GET))?;
                assert_eq!(frames.outcome(3)?, Status(200), "{name}: the connection goes on");
            }
            // Answers are read by nobody: what is not read must not be piled up either. The desk may stop hearing then.
            let began = Instant::now();
            while !flood.is_finished() && began.elapsed() < Duration::from_secs(2) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let grown = desk.peak_memory()?.saturating_sub(before);
        let seen = recorder.take().len();
        println!("{name}: at most {grown} KiB more, the backend saw {seen}");
        if grown > 32 << 10 || seen > 400 {
            wrong.push(format!("{name}: {grown} KiB more, the backend saw {seen}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Those that a backend has already are counted by nobody but us.
    recorder.take();
    let mut frames = Frames::to(desk.addresses[0])?;
    let mut begun = 0;
    for at in streams(1000) {
        if frames.say(&request(at, END_STREAM, &silent)).is_err() {
            break;
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while recorder.got().len() <= begun && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if recorder.got().len() <= begun || frames.say(&cancel(at)).is_err() {
            break;
        }
        begun += 1;
    }
    assert!((100..200).contains(&begun), "{begun} requests were begun and given up");
    frames.until_closed()?;
    desk.report(|report| report.refused.get("resets") == Some(&1))?;
    // More at the same time than may be are refused, one by one, and the connection goes on.
    let mut frames = Frames::to(desk.addresses[0])?;
    streams(150).try_for_each(|at| frames.say(&request(at, END_STREAM, &silent)))?;
    assert_eq!(frames.outcome(299)?, Reset);
    Ok(())
}

/// A client that says nothing, and one that has nothing more to say.
#[test]
fn connections_that_rest_are_ended() -> Result<()> {
    let desk = Desk::start(HASTY, &[("web", Vec::new())], &[])?;
    assert_eq!(Frames::silent(desk.addresses[0])?.until_closed()?, []);
    let mut begun = Frames::silent(desk.addresses[0])?;
    begun.say(b"PRI * HT")?;
    assert_eq!(begun.until_closed()?, []);
    let mut frames = Frames::to(desk.addresses[0])?;
    frames.say(&request(1, END_STREAM, &GET))?;
    assert_eq!(frames.outcome(1)?, Status(503));
    let last = frames.until_closed()?;
    assert!(last.iter().any(|frame| frame.kind == kind::GOAWAY), "{last:?}");
    Ok(())
}

/// Where another desk takes over, clients are told to go there with what comes next; what is under way is answered.
#[test]
fn a_desk_that_ends_says_so_and_answers_what_is_under_way() -> Result<()> {
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let told = std::sync::Mutex::new(told);
    let recorder = Recorder::start(move |_| {
        _ = told.lock().map(|told| told.recv());
        Deed::Say(answer("ok"))
    })?;
    let services = HASTY.replacen("response = \"1s\"", "response = \"20s\"", 1);
    let desk = Desk::start(&services, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut frames = Frames::to(desk.addresses[0])?;
    frames.say(&request(1, END_STREAM, &GET))?;
    while recorder.got().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    desk.drain(20_000)?;
    loop {
        let heard = frames.hear()?.context("the connection is cut")?;
        match heard.kind {
            kind::GOAWAY => break,
            kind::HEADERS => anyhow::bail!("an answer before its time"),
            _ => {}
        }
    }
    tell.send(())?;
    assert_eq!(frames.outcome(1)?, Status(200));
    Ok(())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// curl, nghttp and h2load through the program to nginx, by TLS and in clear text, over IPv4 and IPv6; and a load
/// through changes of the document.
#[test]
fn real_clients_speak_http2() -> Result<()> {
    if !lab::possible("real_clients_speak_http2") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, ..LabOptions::default() };
    let service = |name: &str, listen: &str, tls: &str, word: &str| {
        format!(
            "[services.{name}]\nlisten = \"{listen}\"\npool = \"web\"\n{tls}[[services.{name}.routes]]\n\
             path = \"/hello\"\nrespond = {{ body = \"{word}\\n\" }}\n"
        )
    };
    let tls = "tls = { cert = \"one.pem\", key = \"one.key\" }\n";
    let document = |word: &str| {
        format!(
            "interfaces = [\"front\", \"back\"]\n[pools.web]\nbackends = [ {{ address = \"{}\" }}, {{ address = \"{}\" }} ]\n{}{}{}",
            backend_v4(options, 0),
            backend_v4(options, 1),
            service("a", "203.0.113.10:443/tcp", tls, word),
            service("b", "[2001:db8:113::10]:443/tcp", tls, word),
            service("c", "203.0.113.10:80/tcp", "", word),
        )
    };
    let mut stage = Stage::without_daemon(options, &document("good day"))?;
    let made = rcgen::generate_simple_self_signed(["one.example".to_owned()])?;
    std::fs::write(stage.directory().join("one.key"), made.signing_key.serialize_pem())?;
    std::fs::write(stage.directory().join("one.pem"), made.cert.pem())?;
    (0..2).try_for_each(|backend| stage.nginx(backend))?;
    stage.start()?;
    let version = ["--write-out", "HTTP/%{http_version} %{http_code}"];
    let ca = stage.directory().join("one.pem").display().to_string();
    for vip in Stage::VIPS {
        let resolve = match vip {
            IpAddr::V4(vip) => format!("one.example:443:{vip}"),
            IpAddr::V6(vip) => format!("one.example:443:[{vip}]"),
        };
        let ask = |how: &[&str], path: &str| -> Result<String> {
            let url = format!("https://one.example{path}");
            let same = ["--resolve", &resolve, "--cacert", &ca, &url];
            Ok(text(&stage.try_curl(&[how, &version, &same].concat())?))
        };
        assert_eq!(ask(&["--http2"], "/hello")?, "good day\nHTTP/2 200", "{vip}");
        assert_eq!(ask(&["--http1.1"], "/hello")?, "good day\nHTTP/1.1 200", "{vip}");
        let answer = ask(&["--http2"], "/")?;
        assert!(answer.starts_with("backend ") && answer.ends_with("HTTP/2 200"), "{answer}");
        let refused = ask(&["--http2", "--request", "TRACE"], "/")?;
        assert!(refused.contains("This door does not do") && refused.ends_with("HTTP/2 501"), "{refused}");
    }
    let plain = ["http://203.0.113.10/hello"];
    let prior = stage.try_curl(&[&["--http2-prior-knowledge"][..], &version, &plain].concat())?;
    assert_eq!(text(&prior), "good day\nHTTP/2 200");
    let upgrade = stage.try_curl(&[&["--http2"][..], &version, &plain].concat())?;
    assert_eq!(text(&upgrade), "good day\nHTTP/1.1 200");
    let loaded = |stage: &Stage| -> Result<std::thread::JoinHandle<Result<Output>>> {
        let client = stage.lab.client.clone();
        Ok(std::thread::spawn(move || {
            let load = ["-D", "6", "-c", "4", "-m", "4", "https://203.0.113.10/"];
            run(&client, Path::new("h2load"), &load)
        }))
    };
    let load = loaded(&stage)?;
    for number in 0..4 {
        let word = format!("number {number}");
        stage.write(&document(&word))?;
        stage.until(&word, |stage| Ok(stage.curl(Stage::VIPS[0], "/hello")? == format!("{word}\n")))?;
    }
    let said = text(&load.join().map_err(|_| anyhow::anyhow!("h2load"))??);
    assert!(said.contains("Application protocol: h2"), "{said}");
    assert!(said.contains(" 0 failed, 0 errored"), "{said}\n{}", stage.log());
    Ok(())
}
