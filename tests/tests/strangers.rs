//! More of what strangers may send to the desk: headers that would be others than they seem, more of everything than is
//! taken, and what does not come, or comes slowly.

use std::{net::SocketAddr, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::{
    model::desk::Ejection,
    proxy::orders::{Pem, Secret},
};
use tests::{
    desk::{Deed, Desk, HASTY, Recorder, Settings, answer, backend},
    requests::Speaker,
    vector::{
        Fate::{self, Cut, Refused, Seen},
        Vector, play,
    },
};

const GET: Fate = Seen(&[("GET / HTTP/1.1", "")]);

const HEADERS: &[Vector<'_>] = &[
    ("a name with a space", b"GET / HTTP/1.1\r\nHost: a\r\nX Y: b\r\n\r\n", Refused(400)),
    ("a name with a control character", b"GET / HTTP/1.1\r\nHost: a\r\nX\x01: b\r\n\r\n", Refused(400)),
    ("a name with a zero", b"GET / HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n", Refused(400)),
    ("a name beyond ASCII", b"GET / HTTP/1.1\r\nHost: a\r\nX\xc3\xa9: b\r\n\r\n", Refused(400)),
    ("a name in brackets", b"GET / HTTP/1.1\r\nHost: a\r\n(X): b\r\n\r\n", Refused(400)),
    ("no name", b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", Refused(400)),
    ("no colon", b"GET / HTTP/1.1\r\nHost: a\r\nX-User root\r\n\r\n", Refused(400)),
    ("a line that begins with a tab", b"GET / HTTP/1.1\r\nHost: a\r\n\tX: b\r\n\r\n", Refused(400)),
    ("a line before the first header", b"GET / HTTP/1.1\r\n X: b\r\nHost: a\r\n\r\n", Refused(400)),
    ("a value with an escape", b"GET / HTTP/1.1\r\nHost: a\r\nX: \x1b[2J\r\n\r\n", Refused(400)),
    ("a value with a delete", b"GET / HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n", Refused(400)),
    ("a line's end in the target", b"GET /x\nX-User: root HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("a return in the target", b"GET /x\rX-User: root HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("a tab in the target", b"GET /x\tHTTP/1.1 HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("a host with a line's end in it", b"GET / HTTP/1.1\r\nHost: a%0d%0aX: b\r\n\r\n", Refused(400)),
    (
        "a line's end in the query, encoded",
        b"GET /?a=%0d%0aX-User:%20root HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        Seen(&[("GET /?a=%0d%0aX-User:%20root HTTP/1.1", "")]),
    ),
    ("the host, of this connection alone", b"GET / HTTP/1.1\r\nHost: a\r\nConnection: host, close\r\n\r\n", GET),
    (
        "the length, of this connection alone",
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: content-length, close\r\nContent-Length: 25\r\n\r\nGET /x HTTP/1.1\r\nHost:b\r\n",
        Seen(&[("POST / HTTP/1.1", "GET /x HTTP/1.1\r\nHost:b\r\n")]),
    ),
    (
        "the coding, of this connection alone",
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: transfer-encoding, close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        Seen(&[("POST / HTTP/1.1", "abc")]),
    ),
    ("bytes of another alphabet", b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: \xff\xe9\r\n\r\n", GET),
];

#[test]
fn headers_are_what_they_seem() -> Result<()> {
    play(HEADERS)
}

#[test]
fn what_is_too_large_is_refused() -> Result<()> {
    let get = |rest: &str| format!("GET / HTTP/1.1\r\nHost: a\r\n{rest}\r\n").into_bytes();
    let post = |rest: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{rest}").into_bytes();
    let chunks = |rest: &str| post(&format!("Transfer-Encoding: chunked\r\n\r\n{rest}"));
    let long = |length: usize| "x".repeat(length);
    let many = |number: usize| (0..number).map(|n| format!("X-{n}: 1\r\n")).collect::<String>();
    let cut = |body| Cut(400, "POST / HTTP/1.1", body);
    let all: Vec<(&str, Vec<u8>, Fate)> = vec![
        ("a method", format!("{} / HTTP/1.1\r\nHost: a\r\n\r\n", long(70_000)).into(), Refused(431)),
        ("a target", format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", long(70_000)).into(), Refused(431)),
        ("a target without an end", format!("GET /{}", long(140_000)).into(), Refused(431)),
        ("a value", get(&format!("X: {}\r\n", long(70_000))), Refused(431)),
        ("a name", get(&format!("{}: 1\r\n", long(70_000))), Refused(431)),
        ("headers", get(&many(200)), Refused(431)),
        ("all headers together", get(&format!("X: {}\r\n", long(800)).repeat(90)), Refused(431)),
        ("a cookie", get(&format!("Cookie: a={}\r\n", long(70_000))), Refused(431)),
        ("a host", format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", long(300)).into(), Refused(400)),
        ("a body that is announced", post("Content-Length: 1073741825\r\n\r\n"), Refused(413)),
        ("a length of all bits", post("Content-Length: 18446744073709551615\r\n\r\n"), Refused(431)),
        ("a chunk's size", chunks("3\r\nabc\r\n10000000000000000\r\n"), cut("3\r\nabc\r\n")),
        ("a chunk's extension", chunks(&format!("3\r\nabc\r\n1;{}\r\n", long(20_000))), cut("3\r\nabc\r\n")),
        ("trailers", chunks(&format!("3\r\nabc\r\n0\r\n{}\r\n", many(2000))), cut("3\r\nabc\r\n")),
    ];
    let all: Vec<Vector<'_>> =
        all.iter().map(|(name, bytes, fate)| (*name, bytes.as_slice(), *fate)).collect();
    play(&all)
}

#[test]
fn heads_without_an_end_take_no_more_memory_than_they_may() -> Result<()> {
    const CLIENTS: u64 = 200;
    // Long enough for all of them to be there.
    let patient = HASTY.replace("header = \"2s\"", "header = \"60s\"");
    let desk = Desk::start(&patient, &[("web", Vec::new())], &[])?;
    let before = desk.memory()?;
    let begun = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(60_000));
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut speaker = Speaker::to(desk.addresses[0])?;
        speaker.say(begun.as_bytes())?;
        clients.push(speaker);
    }
    desk.report(|report| report.open == CLIENTS)?;
    let mut held = 0;
    for _ in 0..200 {
        thread::sleep(Duration::from_millis(50));
        held = desk.memory()?.saturating_sub(before);
        if held > CLIENTS * 55 {
            break;
        }
    }
    println!("{held} kB for {CLIENTS} heads of 60 kB");
    // Twice the largest head each: a buffer grows by doubling.
    ensure!((CLIENTS * 55..CLIENTS * 128 + 8192).contains(&held), "{held} kB");
    drop(clients);
    desk.report(|report| report.open == 0)?;
    Ok(())
}

/// What a slow client does: says this, then again and again that, with a pause of so many milliseconds; what it hears; and by
/// what name that is counted.
struct Slow {
    name: &'static str,
    service: usize,
    begins: &'static [u8],
    drips: &'static [u8],
    hears: Option<u16>,
    counted: &'static str,
}

impl Slow {
    fn play(&self, address: SocketAddr) -> Result<()> {
        let mut speaker = Speaker::to(address)?;
        speaker.say(self.begins)?;
        // A minute, if nobody ends it.
        let mut drops = self.drips.iter().cycle().take(if self.drips.is_empty() { 0 } else { 600 });
        let is_cut = drops.any(|&byte| {
            thread::sleep(Duration::from_millis(100));
            speaker.say(&[byte]).is_err()
        });
        ensure!(is_cut || self.drips.is_empty(), "{}: it goes on for ever", self.name);
        if !is_cut {
            let heard = speaker.hear()?.map(|answer| answer.status);
            ensure!(heard == self.hears, "{}: {heard:?}", self.name);
        }
        Ok(())
    }
}

#[test]
fn who_is_slow_is_not_waited_for() -> Result<()> {
    let slow =
        |name, service, begins, drips, hears, counted| Slow { name, service, begins, drips, hears, counted };
    // [0] plain, [1] by TLS, [2] behind a proxy that says who asks.
    let all: [Slow; 16] = [
        slow("nothing", 0, b"", b"", None, "head_slow"),
        slow("half a line", 0, b"GET /", b"", None, "head_slow"),
        slow("a line", 0, b"GET / HTTP/1.1\r\n", b"", None, "head_slow"),
        slow("half a header", 0, b"GET / HTTP/1.1\r\nHost: a\r\nX-", b"", None, "head_slow"),
        slow("a line in drops", 0, b"GET /", b"x", None, "head_slow"),
        slow("a header in drops", 0, b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"y", None, "head_slow"),
        slow("headers in drops", 0, b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: 1\r\n", None, "head_slow"),
        slow(
            "a body's beginning",
            0,
            b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc",
            b"",
            Some(408),
            "",
        ),
        slow(
            "a body in drops",
            0,
            b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n",
            b"a",
            Some(408),
            "",
        ),
        slow(
            "chunks in drops",
            0,
            b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"1\r\na\r\n",
            Some(408),
            "",
        ),
        slow("no body", 0, b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", b"", Some(408), ""),
        slow(
            "half a chunk's size",
            0,
            b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1",
            b"",
            Some(408),
            "",
        ),
        slow(
            "no trailers",
            0,
            b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
            b"",
            Some(408),
            "",
        ),
        slow("no handshake", 1, b"", b"", None, "tls_slow"),
        slow("a handshake in drops", 1, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"\0", None, "tls_slow"),
        slow("half of who asks", 2, b"PROXY TCP4 127.0", b"", None, "proxy_header"),
    ];
    let hasty = |name: &str, port: u16, more: &str| {
        let service = HASTY.replace("services.shop", &format!("services.{name}"));
        service.replace(":80/tcp\"\n", &format!(":{port}/tcp\"\n{more}"))
    };
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let web = [("web", vec![backend(recorder.address)])];
    let proxied = hasty("c", 82, "proxies = [\"127.0.0.0/8\"]\nproxy_protocol = true\n");
    let plain = Desk::start(&format!("{}{proxied}", hasty("a", 80, "")), &web, &[])?;
    let made = rcgen::generate_simple_self_signed(["shop.example".to_owned()])?;
    let pem = Pem { chain: made.cert.pem(), key: Secret::new(made.signing_key.serialize_pem()) };
    let files = tempfile::tempdir()?;
    let (cert, key) = (files.path().join("cert.pem"), files.path().join("key.pem"));
    let by_tls = format!("tls = {{ cert = \"{}\", key = \"{}\" }}\n", cert.display(), key.display());
    let by_tls = Desk::start(&hasty("b", 443, &by_tls), &web, &[pem])?;
    let addresses = [plain.addresses[0], by_tls.addresses[0], plain.addresses[1]];
    let outcomes: Vec<Result<()>> = thread::scope(|scope| {
        let begun: Vec<_> = all.iter().map(|it| scope.spawn(|| it.play(addresses[it.service]))).collect();
        begun.into_iter().map(|it| it.join().expect("it does not panic")).collect()
    });
    outcomes.into_iter().collect::<Result<()>>()?;
    for desk in [&plain, &by_tls] {
        let is_here = |it: &&Slow| !it.counted.is_empty() && (it.service == 1) == std::ptr::eq(desk, &by_tls);
        let wanted = tests::desk::count(all.iter().filter(is_here).map(|it| it.counted.to_owned()));
        desk.report(|report| {
            wanted.iter().all(|(reason, &times)| report.refused.get(reason) == Some(&(times as u64)))
        })?;
    }
    let stalled = all.iter().filter(|it| it.hears == Some(408)).count() as u64;
    plain.report(|report| report.troubles.get("stalled") == Some(&stalled))?;
    // Of bodies that did not come, the backend had what came, and none whole.
    ensure!(recorder.take().is_empty(), "a request came whole");
    Ok(())
}

/// A body that rests again and again, for longer than it may in all, and of which enough comes in between.
#[test]
fn a_body_that_comes_slowly_comes() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let patience = HASTY.replace("body = \"1s\"", "body = \"3s\"");
    ensure!(patience != HASTY, "{HASTY}");
    let desk = Desk::start(&patience, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut speaker = Speaker::to(desk.addresses[0])?;
    let piece = [b'a'; 1500];
    let length = 12 * piece.len();
    speaker.say(format!("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n").as_bytes())?;
    for _ in 0..12 {
        thread::sleep(Duration::from_millis(400));
        speaker.say(&piece)?;
    }
    ensure!(speaker.hear()?.is_some_and(|answer| answer.status == 200));
    let got = recorder.take();
    ensure!(got.len() == 1 && got[0].body.len() == length, "{}", got.len());
    Ok(())
}

/// Trailers go on, but for those that would say who asks, or what only headers say.
#[test]
fn in_trailers_a_client_speaks_for_nobody_else_either() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let routes = "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\n[[services.shop.routes]]\npath = \"/\"\npool = \"web\"\n\
                  headers = { set = { x-tenant = \"a\" }, remove = [\"x-internal\"] }\n\
                  [[services.shop.routes]]\npath = \"/closed\"\npool = \"web\"\n\
                  auth = { forward = { pool = \"web\", path = \"/auth\" } }\nidentity = { \"X-User\" = \"user\" }\n";
    let desk = Desk::start(routes, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut speaker = Speaker::to(desk.addresses[0])?;
    speaker.say(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, X-User, X-Forwarded-For, Host, Content-Length, X-Tenant, X-Internal\r\n\r\n\
          3\r\nabc\r\n0\r\nX-Sum: 7\r\nX-User: root\r\nX-Forwarded-For: 127.0.0.9\r\nHost: b\r\nContent-Length: 9\r\n\
          X-Tenant: b\r\nX-Internal: 1\r\n\r\n",
    )?;
    assert_eq!(speaker.hear()?.context("an answer")?.status, 200);
    let got = recorder.take().pop().context("a request")?;
    assert_eq!(
        (got.body.as_str(), got.trailers.to_lowercase().as_str()),
        ("abc", "x-sum: 7\r\n"),
        "{}",
        got.head
    );
    Ok(())
}

/// A server that does not answer is the one that is slow, though its client may have more to say; and is not taken out of use
/// for that, or anybody could do so.
#[test]
fn a_server_that_hangs_is_slow_while_its_client_may_have_more_to_say() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Nothing)?;
    let service = HASTY.replace("body = \"1s\"", "body = \"1h\"");
    let settings = Settings {
        ejection: Some(Ejection { after: 1, pause: Duration::from_secs(60) }),
        ..Settings::default()
    };
    let both = vec![backend(recorder.address), backend(recorder.address)];
    let desk = Desk::with(settings, &service, &[("web", both)], &[])?;
    let ask = |head: &str| -> Result<u16> {
        let mut speaker = Speaker::to(desk.addresses[0])?;
        speaker.say(format!("POST / HTTP/1.1\r\nHost: a\r\n{head}").as_bytes())?;
        Ok(speaker.hear()?.context("an answer")?.status)
    };
    assert_eq!(ask("Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")?, 504);
    let report = desk.report(|report| report.troubles.get("slow") == Some(&1))?;
    assert_eq!(report.ejections, []);
    // Whoever has said all waits for the server alone.
    assert_eq!(ask("Content-Length: 3\r\n\r\nabc")?, 504);
    desk.report(|report| !report.ejections.is_empty())?;
    Ok(())
}
