//! Websockets through the desk: a real client, a real server, and what can go wrong between them.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::proxy::orders::{Pem, Secret};
use tests::{
    desk::{Deed, Desk, HASTY, Recorder, answer, backend},
    requests::Speaker,
    stage::Stage,
};
use tungstenite::{
    Bytes, Error, HandshakeError, Message, WebSocket,
    client::IntoClientRequest as _,
    handshake::server::{ErrorResponse, Request, Response},
};
use xtask::lab::{self, LabOptions};

/// A server that says again what it hears, and refuses who asks for `/closed`.
struct Echo {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<Request>>>,
}

impl Echo {
    fn start() -> Result<Self> {
        Self::on(TcpListener::bind("127.0.0.1:0")?)
    }

    fn on(listener: TcpListener) -> Result<Self> {
        let address = listener.local_addr()?;
        let heads = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&heads);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let list = Arc::clone(&list);
                // Clients may go as they like.
                std::thread::spawn(move || stream.map(|stream| echo(stream, &list)));
            }
        });
        Ok(Self { address, heads })
    }

    fn heads(&self) -> Vec<Request> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[expect(clippy::result_large_err, reason = "what refuses is a whole answer, as tungstenite has it")]
fn echo(stream: TcpStream, heads: &Mutex<Vec<Request>>) -> Result<(), Error> {
    let look = |request: &Request, mut response: Response| {
        heads.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
        if request.uri().path() == "/closed" {
            let mut refusal = ErrorResponse::new(Some("not for you".into()));
            *refusal.status_mut() = http::StatusCode::FORBIDDEN;
            refusal.headers_mut().insert("content-length", http::HeaderValue::from_static("11"));
            return Err(refusal);
        }
        let wanted = request.headers().get("sec-websocket-protocol").cloned();
        if let Some(wanted) = wanted {
            response.headers_mut().insert("sec-websocket-protocol", wanted);
        }
        Ok(response)
    };
    let Ok(mut socket) = tungstenite::accept_hdr(stream, look) else { return Ok(()) };
    loop {
        match socket.read()? {
            Message::Close(_) => {
                // Says goodbye, and waits for the connection's end.
                while socket.read().is_ok() {}
                return Ok(());
            }
            said @ (Message::Text(_) | Message::Binary(_)) => socket.send(said)?,
            _ => socket.flush()?,
        }
    }
}

const SERVICE: &str = r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
access_log = true
timeouts = { header = "2s", connect = "2s", response = "2s", body = "2s", websocket = "20s" }
[[services.shop.routes]]
path = "/admin"
respond = 403
"#;

fn call(to: SocketAddr, path: &str) -> Result<WebSocket<TcpStream>> {
    ask_for_one(TcpStream::connect(to)?, path)
}

fn ask_for_one(stream: TcpStream, path: &str) -> Result<WebSocket<TcpStream>> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut request = format!("ws://shop.example{path}").into_client_request()?;
    request.headers_mut().insert("sec-websocket-protocol", "chat".parse()?);
    request.headers_mut().insert("x-forwarded-proto", "made-up".parse()?);
    let (socket, response) = tungstenite::client(request, stream).map_err(|error| match error {
        HandshakeError::Failure(error) => error,
        HandshakeError::Interrupted(_) => Error::ConnectionClosed,
    })?;
    ensure!(response.headers()["sec-websocket-protocol"] == "chat", "{response:?}");
    ensure!(response.headers().contains_key("x-request-id"), "{response:?}");
    Ok(socket)
}

fn says_again<S: std::io::Read + std::io::Write>(socket: &mut WebSocket<S>, said: &Message) -> Result<()> {
    socket.send(said.clone())?;
    let heard = socket.read()?;
    ensure!(heard == *said, "another message, of {} bytes", heard.len());
    Ok(())
}

#[test]
fn messages_of_any_size_go_both_ways() -> Result<()> {
    let echo = Echo::start()?;
    let desk = Desk::start(SERVICE, &[("web", vec![backend(echo.address)])], &[])?;
    let mut socket = call(desk.addresses[0], "/room/..//room?token=hidden")?;
    for size in [0, 1, 125, 126, 65_535, 65_536, 3_000_000] {
        says_again(&mut socket, &Message::Binary(Bytes::from(vec![0xA5; size])))?;
    }
    says_again(&mut socket, &Message::text("good day"))?;
    socket.send(Message::Ping(Bytes::from_static(b"there?")))?;
    assert_eq!(socket.read()?, Message::Pong(Bytes::from_static(b"there?")));
    let report = desk.report(|report| report.websockets == 1)?;
    assert_eq!((report.open, report.answers[0].class, report.answers[0].count), (1, 1, 1), "{report:?}");
    let heads = echo.heads();
    let head = heads.first().context("a request")?;
    assert_eq!(head.uri(), "/room?token=hidden", "the path is normalised here too");
    for (name, value) in [
        ("host", "shop.example"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-proto", "http"),
        ("sec-websocket-version", "13"),
        ("upgrade", "websocket"),
        ("connection", "upgrade"),
    ] {
        assert_eq!(head.headers()[name], value, "{name}");
    }
    // Each says goodbye, then the connection ends, and only then its line is written.
    socket.close(None)?;
    while socket.read().is_ok() {}
    let line = desk.line()?;
    let said: serde_json::Value = serde_json::from_str(&line)?;
    assert_eq!((&said["status"], &said["path"]), (&101.into(), &"/room".into()), "{line}");
    assert!(said["bytes"].as_u64().is_some_and(|bytes| bytes > 3_131_000), "{line}");
    assert_eq!(said["backend"], echo.address.to_string(), "{line}");
    assert!(!line.contains("hidden"), "{line}");
    desk.report(|report| report.websockets == 0 && report.open == 0)?;
    Ok(())
}

#[test]
fn a_server_may_say_no() -> Result<()> {
    let echo = Echo::start()?;
    let desk = Desk::start(SERVICE, &[("web", vec![backend(echo.address)])], &[])?;
    let refused = call(desk.addresses[0], "/closed").err().context("refused")?;
    match refused.downcast_ref::<Error>() {
        Some(Error::Http(response)) => assert_eq!(response.status(), 403),
        other => anyhow::bail!("{other:?}: {refused}"),
    }
    Ok(())
}

/// Over TLS, and by HTTP/1.1 though the desk would rather speak HTTP/2.
#[test]
fn websockets_go_through_tls() -> Result<()> {
    let made = rcgen::generate_simple_self_signed(["shop.example".to_owned()])?;
    let pem = Pem { chain: made.cert.pem(), key: Secret::new(made.signing_key.serialize_pem()) };
    let echo = Echo::start()?;
    let desk = Desk::start(SERVICE, &[("web", vec![backend(echo.address)])], &[pem])?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tls = rustls::ClientConnection::new(Arc::new(config), "shop.example".try_into()?)?;
    let stream = rustls::StreamOwned::new(tls, TcpStream::connect(desk.addresses[0])?);
    let (mut socket, _) =
        tungstenite::client("wss://shop.example/", stream).map_err(|error| anyhow::anyhow!("{error}"))?;
    for size in [5, 200_000] {
        says_again(&mut socket, &Message::Binary(Bytes::from(vec![1; size])))?;
    }
    let heads = echo.heads();
    assert_eq!(heads[0].headers()["x-forwarded-proto"], "https");
    Ok(())
}

/// Who asks for a websocket: one that has all of it, so that each vector lacks one thing.
const ASKED: [&str; 4] = [
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
];

/// What asks for a websocket in a way that two could understand differently reaches no server, and what comes behind
/// it is no request.
#[test]
fn what_is_no_websocket_is_not_taken_for_one() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let desk = Desk::start(HASTY, &[("web", vec![backend(recorder.address)])], &[])?;
    let smuggled = "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n";
    let get = "GET / HTTP/1.1";
    for (name, line, instead, status) in [
        ("a method with a body", "POST / HTTP/1.1", &[][..], 400),
        ("HTTP/1.0", "GET / HTTP/1.0", &[], 400),
        ("no Connection", get, &[(1, "X-A: b")], 400),
        ("another Connection", get, &[(1, "Connection: keep-alive")], 400),
        ("no version", get, &[(2, "X-A: b")], 400),
        ("two versions", get, &[(2, "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Version: 8")], 400),
        ("an unknown version", get, &[(2, "Sec-WebSocket-Version: 1337")], 426),
        ("no key", get, &[(3, "X-A: b")], 400),
        ("a short key", get, &[(3, "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==")], 400),
        ("two keys", get, &[(3, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Key: x")], 400),
        ("a body", get, &[(0, "Upgrade: websocket\r\nContent-Length: 33")], 400),
        ("a body in chunks", get, &[(0, "Upgrade: websocket\r\nTransfer-Encoding: chunked")], 400),
        ("a path that leads out", "GET /../../x HTTP/1.1", &[], 400),
        ("a refused path", "GET /admin HTTP/1.1", &[], 403),
    ] {
        let mut headers = ASKED;
        instead.iter().for_each(|&(at, header): &(usize, &str)| headers[at] = header);
        let mut speaker = Speaker::to(desk.addresses[0])?;
        speaker.say(format!("{line}\r\nHost: a\r\n{}\r\n\r\n{smuggled}", headers.join("\r\n")).as_bytes())?;
        let heard = speaker.hear()?.with_context(|| name.to_owned())?;
        assert_eq!(heard.status, status, "{name}: {}", heard.head);
        if status == 426 {
            assert!(heard.head.to_lowercase().contains("sec-websocket-version: 13"), "{}", heard.head);
        }
        assert_eq!(recorder.take(), [], "{name}");
    }
    Ok(())
}

/// A server that switches without having been asked, or to something else: nothing of what it says then is an answer
/// to anybody, and nothing more of the client's reaches it.
#[test]
fn a_server_that_switches_unasked_is_cut_off() -> Result<()> {
    let later = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged";
    for (asked, to) in [("", "websocket"), (&*ASKED.join("\r\n"), "h2c"), (&*ASKED.join("\r\n"), "")] {
        let head = match to {
            "" => String::new(),
            to => format!("Upgrade: {to}\r\nConnection: Upgrade\r\n"),
        };
        let said = format!("HTTP/1.1 101 Switching Protocols\r\n{head}\r\n{later}");
        let recorder = Recorder::start(move |_| Deed::Say(said.clone().into_bytes()))?;
        let desk = Desk::start(HASTY, &[("web", vec![backend(recorder.address)])], &[])?;
        let mut speaker = Speaker::to(desk.addresses[0])?;
        let asked = if asked.is_empty() { "X-A: b" } else { asked };
        speaker.say(format!("GET / HTTP/1.1\r\nHost: a\r\n{asked}\r\n\r\n").as_bytes())?;
        let heard = speaker.hear()?.context("an answer")?;
        assert_eq!(heard.status, 502, "{to}: {}", heard.head);
        assert!(!heard.body.contains("forged"), "{}", heard.body);
        let mut next = Speaker::to(desk.addresses[0])?;
        next.say(b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")?;
        next.hear()?.context("an answer")?;
        let connections: Vec<_> = recorder.got().iter().map(|got| got.connection).collect();
        ensure!(connections.first() != connections.last(), "the connection was used again: {connections:?}");
    }
    Ok(())
}

/// The connection's end, once something has ended it.
fn until_ended(socket: &mut WebSocket<TcpStream>) -> Result<Duration> {
    let began = Instant::now();
    match socket.read() {
        Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
            anyhow::bail!("it goes on: {error}")
        }
        Err(_) => Ok(began.elapsed()),
        Ok(said) => anyhow::bail!("{said:?}"),
    }
}

#[test]
fn a_websocket_goes_on_until_its_server_is_taken_out() -> Result<()> {
    let (echo, other) = (Echo::start()?, Echo::start()?);
    let both = || vec![backend(echo.address), backend(other.address)];
    let mut desk = Desk::start(SERVICE, &[("web", both())], &[])?;
    let calls: Result<Vec<_>> = (0..20).map(|_| call(desk.addresses[0], "/")).collect();
    let mut calls = calls?;
    let served = echo.heads().len();
    assert!((1..20).contains(&served), "{served} of 20 to one of two");
    // Documents change, servers fail and are drained: it goes on.
    let mut drained = both();
    drained[0].usable = false;
    drained[0].draining = true;
    for changed in [both(), drained.clone()] {
        desk.serve(&SERVICE.replace("20s", "30s"), &[("web", changed)], &[])?;
        calls.iter_mut().try_for_each(|socket| says_again(socket, &Message::text("still here")))?;
    }
    drained[0].cut = true;
    desk.serve(SERVICE, &[("web", drained)], &[])?;
    let served_now = 20 - served as u64;
    let report = desk.report(|report| report.websockets == served_now)?;
    assert_eq!(report.refused["websocket_cut"], served as u64);
    let mut living = 0;
    for mut socket in calls {
        if says_again(&mut socket, &Message::text("still here")).is_ok() {
            living += 1;
        }
    }
    assert_eq!(living, 20 - served);
    Ok(())
}

#[test]
fn a_websocket_that_rests_ends() -> Result<()> {
    let echo = Echo::start()?;
    let service = SERVICE.replace("websocket = \"20s\"", "websocket = \"500ms\"");
    let desk = Desk::start(&service, &[("web", vec![backend(echo.address)])], &[])?;
    let mut socket = call(desk.addresses[0], "/")?;
    says_again(&mut socket, &Message::text("good day"))?;
    until_ended(&mut socket)?;
    let report = desk.report(|report| report.refused.contains_key("websocket_idle"))?;
    assert_eq!((report.websockets, report.refused["websocket_idle"]), (0, 1));
    Ok(())
}

/// Who does not read for a while has it all in the end: how long a websocket may rest is its own.
#[test]
fn a_client_that_pauses_keeps_its_websocket() -> Result<()> {
    let echo = Echo::start()?;
    let desk = Desk::start(SERVICE, &[("web", vec![backend(echo.address)])], &[])?;
    let mut socket = call(desk.addresses[0], "/")?;
    // More than the kernel keeps for who does not read, and for longer than a body may rest.
    let said = Message::Binary(Bytes::from(vec![0xA5; 15 << 20]));
    socket.send(said.clone())?;
    std::thread::sleep(Duration::from_secs(4));
    let heard = socket.read()?;
    ensure!(heard == said, "another message, of {} bytes", heard.len());
    says_again(&mut socket, &Message::text("good day"))
}

/// A desk that another takes over from lets websockets go on as long as it may, and then ends.
#[test]
fn a_desk_that_ends_lets_websockets_go_on_for_a_while() -> Result<()> {
    let echo = Echo::start()?;
    let desk = Desk::start(SERVICE, &[("web", vec![backend(echo.address)])], &[])?;
    let (mut leaves, mut stays) = (call(desk.addresses[0], "/")?, call(desk.addresses[0], "/")?);
    let told = Instant::now();
    desk.drain(2_000)?;
    for _ in 0..5 {
        says_again(&mut leaves, &Message::text("still here"))?;
        says_again(&mut stays, &Message::text("still here"))?;
    }
    leaves.close(None)?;
    while leaves.read().is_ok() {}
    until_ended(&mut stays)?;
    ensure!(told.elapsed() >= Duration::from_millis(1_900), "it ended after {:?}", told.elapsed());
    Ok(())
}

/// Behind the packet path, over both families; and the desk that another takes over from goes on serving them.
#[test]
fn websockets_outlive_a_daemon_and_its_desk() -> Result<()> {
    if !lab::possible("websockets_outlive_a_daemon_and_its_desk") {
        return Ok(());
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    let servers: [SocketAddr; 2] =
        [(stage.lab.backend_v4(0), 8080).into(), (stage.lab.backend_v6(0), 8080).into()];
    let mut document = "interfaces = [\"front\", \"back\"]\n".to_owned();
    let mut echoes = Vec::new();
    for ((number, server), vip) in (0..).zip(servers).zip(Stage::VIPS) {
        let listener = stage.lab.backends[0].run(|| TcpListener::bind(server))??;
        echoes.push(Echo::on(listener)?);
        let listen = SocketAddr::new(vip, 80);
        document += &format!(
            "[pools.web{number}]\nbackends = [{{ address = \"{server}\" }}]\n\
             [services.shop{number}]\nlisten = \"{listen}/tcp\"\npool = \"web{number}\"\n\
             [[services.shop{number}.routes]]\npath = \"/admin\"\nrespond = 403\n"
        );
    }
    stage.write(&document)?;
    stage.start()?;
    let mut sockets = Vec::new();
    for vip in Stage::VIPS {
        for _ in 0..5 {
            let stream = stage.lab.client.run(|| TcpStream::connect(SocketAddr::new(vip, 80)))??;
            sockets.push(ask_for_one(stream, "/room")?);
        }
    }
    let said = Message::Binary(Bytes::from(vec![0xA5; 100_000]));
    sockets.iter_mut().try_for_each(|socket| says_again(socket, &said))?;
    let clients = [stage.lab.client_v4().to_string(), stage.lab.client_v6().to_string()];
    for (echo, client) in echoes.iter().zip(&clients) {
        let heads = echo.heads();
        ensure!(
            heads.len() == 5 && heads.iter().all(|head| head.headers()["x-forwarded-for"] == *client),
            "{heads:?}"
        );
    }
    let former = stage.desk(None)?;
    // Kept: its desk would be killed with it.
    let mut before = stage.daemon.take().context("a daemon")?;
    before.kill()?;
    sockets.iter_mut().try_for_each(|socket| says_again(socket, &said))?;
    stage.start()?;
    stage.until("the former desk ends", |stage| Ok(stage.log().contains("the desk ends")))?;
    for _ in 0..3 {
        sockets.iter_mut().try_for_each(|socket| says_again(socket, &said))?;
    }
    assert!(stage.desks()?.contains(&former) && stage.desks()?.len() == 2, "{}", stage.log());
    // By the other one, which is there alone when they have said goodbye.
    let stream = stage.lab.client.run(|| TcpStream::connect(SocketAddr::new(Stage::VIPS[0], 80)))??;
    says_again(&mut ask_for_one(stream, "/room")?, &said)?;
    for mut socket in sockets {
        socket.close(None)?;
        while socket.read().is_ok() {}
    }
    stage.desk(Some(former))?;
    stage.checksums_were_right()
}
