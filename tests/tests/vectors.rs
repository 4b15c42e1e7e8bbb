//! Bytes that strangers may send to the desk: what they are answered, and what of them a backend gets to see.
//!
//! Nothing of a vector may reach a backend out of its frame: the backend takes it apart by its own rules, and writes down
//! every byte, also of what does not come whole.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tests::{
    desk::{Deed, Desk, HASTY, Recorder, answer, backend},
    requests::Speaker,
    vector::{
        Fate::{Closed, Cut, Refused, Seen},
        Vector, play,
    },
};

/// RFC 9112 section 6.3: of both lengths chunks hold, and the connection ends; the backend is told one.
const SMUGGLING: &[Vector<'_>] = &[
    (
        "both lengths, chunked last",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
        Seen(&[("POST / HTTP/1.1", "")]),
    ),
    (
        "both lengths, chunked first",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n",
        Seen(&[("POST / HTTP/1.1", "")]),
    ),
    (
        "a body in chunks where there seldom is one",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        Seen(&[("GET / HTTP/1.1", "abc")]),
    ),
    (
        "two lengths",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        Refused(400),
    ),
    (
        "two lengths, the same",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\nConnection: close\r\n\r\na",
        Seen(&[("POST / HTTP/1.1", "a")]),
    ),
    ("a list of lengths", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\nab", Refused(400)),
    ("a length with a sign", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na", Refused(400)),
    ("a length below nothing", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\na", Refused(400)),
    ("a length in hexadecimal", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\na", Refused(400)),
    (
        "a length beyond numbers",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551617\r\n\r\na",
        Refused(400),
    ),
    (
        "a coding that is not chunked",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        Refused(400),
    ),
    (
        "chunked, then another coding",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        Refused(400),
    ),
    (
        "two codings in two lines",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        Refused(400),
    ),
    (
        "a space before the colon",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        Refused(400),
    ),
    ("a folded line", b"POST / HTTP/1.1\r\nHost: a\r\nX: b\r\n Content-Length: 1\r\n\r\na", Refused(400)),
    ("a return in a value", b"GET / HTTP/1.1\r\nHost: a\r\nX: b\rContent-Length: 9\r\n\r\n", Refused(400)),
    ("a zero in a value", b"GET / HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n", Refused(400)),
    (
        "a chunk's size with a sign",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n",
        Refused(400),
    ),
    (
        "a chunk's size beyond numbers",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\na\r\n0\r\n\r\n",
        Refused(400),
    ),
    (
        "a chunk without its end",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab0\r\n\r\n",
        Cut(400, "POST / HTTP/1.1", "1\r\na\r\n"),
    ),
    (
        "a length, and a request behind it",
        b"POST /one HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nGET /GET /two HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        Seen(&[("POST /one HTTP/1.1", "GET /"), ("GET /two HTTP/1.1", "")]),
    ),
    (
        "chunks, and a request behind them",
        b"POST /one HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET /two HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        Seen(&[("POST /one HTTP/1.1", "abc"), ("GET /two HTTP/1.1", "")]),
    ),
    (
        "a chunk with an extension",
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3;x=\"y\"\r\nabc\r\n0\r\n\r\n",
        Seen(&[("POST / HTTP/1.1", "abc")]),
    ),
    (
        "chunked in capitals",
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        Seen(&[("POST / HTTP/1.1", "abc")]),
    ),
    (
        "a GET with a body",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
        Seen(&[("GET / HTTP/1.1", "abc")]),
    ),
];

const REQUESTS: &[Vector<'_>] = &[
    ("no host", b"GET / HTTP/1.1\r\n\r\n", Refused(400)),
    ("two hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", Refused(400)),
    ("the same host twice", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", Refused(400)),
    ("a host with a path", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", Refused(400)),
    ("a host with a user", b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", Refused(400)),
    ("an empty host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", Seen(&[("GET / HTTP/1.1", "")])),
    ("a target for another host", b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    (
        "a target for this host",
        b"GET http://A/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        Seen(&[("GET /x HTTP/1.1", "")]),
    ),
    ("a tunnel", b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", Refused(501)),
    ("a trace", b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", Refused(501)),
    (
        "a websocket without a key",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
        Refused(400),
    ),
    (
        "HTTP/2 by upgrade",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        Seen(&[("GET / HTTP/1.1", "")]),
    ),
    ("HTTP/2 at once", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Closed),
    ("another version", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", Refused(400)),
    ("no version", b"GET /\r\n\r\n", Refused(400)),
    ("no HTTP", b"\x16\x03\x01\x02\0\x01\0", Refused(400)),
    (
        "an expectation",
        b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\nContent-Length: 0\r\n\r\n",
        Refused(417),
    ),
    ("more than is taken", b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", Refused(413)),
    ("headers that do not come", b"GET / HTTP/1.1\r\nHost: a\r\nX-", Closed),
    ("nothing at all", b"", Closed),
    ("a body that does not come", b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", Cut(408, "PUT / HTTP/1.1", "abc")),
];

const PATHS: &[Vector<'_>] = &[
    ("an encoded slash", b"GET /x/..%2fadmin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("an encoded backslash", b"GET /x/..%5cadmin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("a backslash", b"GET /x\\..\\admin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("dots", b"GET /x/../admin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(403)),
    ("encoded dots", b"GET /x/%2e%2E/admin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(403)),
    ("an encoded letter", b"GET /%61dmin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(403)),
    ("two slashes", b"GET //admin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(403)),
    ("a dot", b"GET /./admin/./x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(403)),
    ("dots with a parameter", b"GET /x/..;/admin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("out of the root", b"GET /../admin HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("a zero", b"GET /admin%00 HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("the end of a line", b"GET /x%0d%0aX:%20y HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    ("a percent sign alone", b"GET /x% HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    (
        "encoded twice",
        b"GET /x/%252e%252e/admin HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        Seen(&[("GET /x/%252e%252e/admin HTTP/1.1", "")]),
    ),
    (
        "the query is the backend's",
        b"GET /x/./y?/../admin=%2f HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        Seen(&[("GET /x/y?/../admin=%2f HTTP/1.1", "")]),
    ),
];

#[test]
fn nothing_is_smuggled() -> Result<()> {
    play(SMUGGLING)
}

#[test]
fn odd_requests_have_their_status() -> Result<()> {
    play(REQUESTS)
}

#[test]
fn paths_have_one_meaning() -> Result<()> {
    play(PATHS)
}

/// What is of one connection does not go on, in either direction; who asks is told by the desk alone.
#[test]
fn headers_are_filtered_both_ways() -> Result<()> {
    let recorder = Recorder::start(|_| {
        Deed::Say(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x-private\r\nX-Private: 1\r\nKeep-Alive: timeout=9\r\n\
              Proxy-Authenticate: Basic\r\nX-Kept: 1\r\nServer: it\r\n\r\nok"
                .to_vec(),
        )
    })?;
    let routes = "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\n[[services.shop.routes]]\npool = \"web\"\n\
                  headers = { set = { x-door = \"front\" }, remove = [\"cookie\"] }\n\
                  response_headers = { set = { x-frame-options = \"deny\" }, remove = [\"server\"] }\n";
    let desk = Desk::start(routes, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut speaker = Speaker::to(desk.addresses[0])?;
    speaker.say(
        b"GET / HTTP/1.1\r\nHost: Shop.example:80\r\nConnection: x-mine, keep-alive\r\nX-Mine: 1\r\nTE: gzip\r\n\
          Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\nX-Forwarded-For: 192.0.2.1\r\n\
          X-Forwarded-Proto: https\r\nX_Forwarded_Host: evil\r\nX-Request-Id: mine\r\nCookie: a\r\nAccept: */*\r\n\r\n",
    )?;
    let answer = speaker.hear()?.context("an answer")?;
    let got = recorder.got();
    let got = got.first().context("a request")?;
    for gone in [
        "x-mine",
        "te",
        "proxy-connection",
        "proxy-authorization",
        "connection",
        "x_forwarded_host",
        "cookie",
    ] {
        assert_eq!(got.header(gone), Vec::<&str>::new(), "{}", got.head);
    }
    assert_eq!(got.header("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(got.header("x-forwarded-proto"), ["http"]);
    assert_eq!(got.header("x-forwarded-host"), ["Shop.example:80"]);
    assert_eq!(got.header("host"), ["Shop.example:80"]);
    assert_eq!(got.header("x-door"), ["front"]);
    assert_eq!(got.header("accept"), ["*/*"]);
    let id = got.header("x-request-id").concat();
    assert!(id.len() == 16 && answer.head.contains(&id), "{id} {}", answer.head);
    let head = answer.head.to_ascii_lowercase();
    for gone in ["x-private", "keep-alive", "proxy-authenticate", "connection:", "server:"] {
        assert!(!head.contains(gone), "{head}");
    }
    assert!(head.contains("x-kept: 1") && head.contains("x-frame-options: deny"), "{head}");
    Ok(())
}

/// A server that closes a kept connection at the very moment of a request: what may be sent twice is, and what
/// may not is answered with 502, never sent again.
#[test]
fn the_stale_connection_race_loses_nothing_that_is_safe() -> Result<()> {
    // Every second request of a connection is met by its end.
    let counts = std::sync::Mutex::new(std::collections::BTreeMap::<usize, usize>::new());
    let recorder = Recorder::start(move |got| {
        let mut counts = counts.lock().unwrap();
        let count = counts.entry(got.connection).or_default();
        *count += 1;
        if *count == 1 { Deed::Say(answer("ok")) } else { Deed::SayAndClose(Vec::new()) }
    })?;
    let desk = Desk::start(HASTY, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut speaker = Speaker::to(desk.addresses[0])?;
    let mut statuses = Vec::new();
    for _ in 0..40 {
        speaker.say(b"GET /safe HTTP/1.1\r\nHost: a\r\n\r\n")?;
        statuses.push(speaker.hear()?.context("an answer")?.status);
    }
    assert_eq!(tests::desk::count(statuses), [(200, 40)].into());
    assert!(recorder.take().len() > 40, "no connection was kept, so nothing has been shown");
    let mut bad = 0;
    for _ in 0..20 {
        speaker.say(b"POST /once HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")?;
        bad += usize::from(speaker.hear()?.context("an answer")?.status == 502);
    }
    let once = recorder.take().len();
    assert!(once == 20 && bad > 0, "{once} requests of 20 reached the server, {bad} answered with 502");
    Ok(())
}

/// An answer that breaks off is cut, never completed with something else.
#[test]
fn an_answer_that_breaks_off_is_cut() -> Result<()> {
    let half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of it".to_vec();
    let recorder = Recorder::start(move |got| match got.line() {
        "GET /cut HTTP/1.1" => Deed::SayAndClose(half.clone()),
        "GET /halt HTTP/1.1" => Deed::Say(half.clone()),
        "GET /silent HTTP/1.1" => Deed::Nothing,
        _ => Deed::SayAndClose(b"SSH-2.0-OpenSSH\r\n".to_vec()),
    })?;
    let desk = Desk::start(HASTY, &[("web", vec![backend(recorder.address)])], &[])?;
    for path in ["/cut", "/halt"] {
        let mut speaker = Speaker::to(desk.addresses[0])?;
        speaker.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())?;
        let all = speaker.until_closed()?;
        assert!(all.starts_with("HTTP/1.1 200") && all.ends_with("half of it"), "{path}: {all}");
    }
    for (path, status) in [("/silent", 504), ("/garbage", 502)] {
        let mut speaker = Speaker::to(desk.addresses[0])?;
        speaker
            .say(format!("GET {path} HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\n\r\n").as_bytes())?;
        let answer = speaker.hear()?.context("an answer")?;
        assert_eq!(answer.status, status, "{path}: {}", answer.body);
        let page: serde_json::Value = serde_json::from_str(&answer.body)?;
        assert_eq!(page["status"], status);
    }
    Ok(())
}

/// A slow drip of headers ends after its whole time, however steady it is.
#[test]
fn a_drip_of_headers_ends() -> Result<()> {
    let desk = Desk::start(HASTY, &[("web", Vec::new())], &[])?;
    let mut speaker = Speaker::to(desk.addresses[0])?;
    speaker.say(b"GET / HTTP/1.1\r\nHost: a\r\n")?;
    // Long before a minute, with a header every tenth of a second.
    let ended = (0..600).any(|number| {
        std::thread::sleep(Duration::from_millis(100));
        speaker.say(format!("X-{number}: 1\r\n").as_bytes()).is_err()
    });
    assert!(ended);
    Ok(())
}

/// A closed room says so, and when to come back; a room whose servers are being taken out says that.
#[test]
fn a_closed_room_is_told_in_plain_words() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let mut desk = Desk::start(HASTY, &[("web", Vec::new())], &[])?;
    let ask = |desk: &Desk, path: &str, accept: &str| -> Result<_> {
        let mut speaker = Speaker::to(desk.addresses[0])?;
        speaker.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\n\r\n").as_bytes())?;
        speaker.hear()?.context("an answer")
    };
    let html = ask(&desk, "/", "text/html,*/*;q=0.8")?;
    assert_eq!(html.status, 503);
    assert!(
        html.head.to_lowercase().contains("retry-after: 5") && html.head.contains("text/html"),
        "{}",
        html.head
    );
    assert!(html.body.contains("<h1>This room is closed for the moment</h1>"), "{}", html.body);
    let unfit =
        |usable, draining| vec![tests::desk::BackendOrder { usable, draining, ..backend(recorder.address) }];
    desk.serve(HASTY, &[("web", unfit(false, true))], &[])?;
    assert!(ask(&desk, "/", "*/*")?.body.contains("being taken out of service"));
    desk.serve(HASTY, &[("web", unfit(true, false))], &[])?;
    assert_eq!(ask(&desk, "/", "*/*")?.body, "ok");
    // Where nobody listens: the last of what was tried.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    desk.serve(HASTY, &[("web", vec![backend(nobody)])], &[])?;
    assert_eq!(ask(&desk, "/", "*/*")?.status, 502);
    let report = desk.report(|report| report.troubles.contains_key("unreachable"))?;
    assert_eq!((report.troubles["no_backend"], report.troubles["drained"]), (1, 1));
    // A server that is there takes over for one that is not, whatever the request.
    desk.serve(HASTY, &[("web", vec![backend(nobody), backend(recorder.address)])], &[])?;
    // No more than there is a budget for, should chance begin with the wrong one each time.
    for _ in 0..10 {
        assert_eq!(ask(&desk, "/", "*/*")?.body, "ok");
    }
    Ok(())
}

/// Each request is one line of JSON; what may be secret is in none of them.
#[test]
fn the_access_log_holds_no_secrets() -> Result<()> {
    let recorder = Recorder::start(|_| {
        Deed::Say(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nSet-Cookie: s=hidden\r\n\r\nhidden!".to_vec())
    })?;
    let services = HASTY.replacen("pool = \"web\"\n", "pool = \"web\"\naccess_log = true\n", 1);
    let desk = Desk::start(&services, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut speaker = Speaker::to(desk.addresses[0])?;
    let requests: [(&str, u16, Option<String>); 3] = [
        ("POST /pay?token=hidden", 200, Some(recorder.address.to_string())),
        ("GET /admin?token=hidden", 403, None),
        ("GET http://shop.example/x?hidden", 200, Some(recorder.address.to_string())),
    ];
    for (line, status, backend) in requests {
        let body = if line.starts_with("POST") { "Content-Length: 6\r\n\r\nhidden" } else { "\r\n" };
        let head = "Host: shop.example\r\nUser-Agent: \"quoted\"\r\nAuthorization: Bearer hidden\r\n\
                    Cookie: a=hidden\r\nX-Api-Key: hidden\r\nReferer: http://a/?hidden\r\n";
        speaker.say(format!("{line} HTTP/1.1\r\n{head}{body}").as_bytes())?;
        assert_eq!(speaker.hear()?.context("an answer")?.status, status, "{line}");
        let text = desk.line()?;
        assert!(!text.contains("hidden"), "{text}");
        let said: serde_json::Value = serde_json::from_str(&text)?;
        assert_eq!(said["status"], status, "{text}");
        assert_eq!(said["backend"], serde_json::json!(backend), "{text}");
        assert_eq!(
            (&said["host"], &said["user_agent"]),
            (&"shop.example".into(), &"\"quoted\"".into()),
            "{text}"
        );
        assert!(said["request_id"].as_str().is_some_and(|id| id.len() == 16), "{text}");
    }
    Ok(())
}
