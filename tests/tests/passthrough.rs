//! Connections by TLS that the desk hands on as they are, by the name that their client asks for.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::proxy::{
    orders::{Pem, Secret},
    tls,
};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use tests::{
    authority::Authority,
    desk::{Deed, Desk, Recorder, answer, backend},
};

fn pem(authority: &Authority, name: &str) -> Result<Pem> {
    let issued = authority.server(name)?;
    Ok(Pem { chain: issued.chain, key: Secret::new(issued.key) })
}

/// A server of TLS that says again what it hears; of which one connection after the other is served.
fn echo(pem: &Pem) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let config = tls::server(std::slice::from_ref(pem), None)?.context("TLS")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let Ok(session) = ServerConnection::new(Arc::clone(&config)) else { return };
            let mut stream = StreamOwned::new(session, stream);
            let mut piece = [0; 1024];
            // A client that does not like the certificate is gone at once.
            while let Ok(length @ 1..) = stream.read(&mut piece) {
                if stream.write_all(&piece[..length]).and_then(|()| stream.flush()).is_err() {
                    break;
                }
            }
        }
    });
    Ok(address)
}

/// What is there says byte by byte, so that nothing is known before all of it has come.
struct Slowly(TcpStream);

impl Read for Slowly {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Slowly {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let piece = bytes.len().min(7);
        self.0.write(&bytes[..piece])
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Connects, asks for a name, and says something; the answer.
fn say(to: SocketAddr, authority: &Authority, name: &str, words: &str, length: usize) -> Result<String> {
    let config = tls::client(tls::authorities(&authority.pem)?, false)?;
    let session = ClientConnection::new(Arc::new(config), name.to_owned().try_into()?)?;
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let mut stream = StreamOwned::new(session, Slowly(stream));
    stream.write_all(words.as_bytes())?;
    stream.flush()?;
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    Ok(String::from_utf8(answer)?)
}

#[test]
fn who_asks_for_a_name_is_handed_on_to_its_pool() -> Result<()> {
    let (front, theirs) = (Authority::new()?, Authority::new()?);
    let db = echo(&pem(&theirs, "db.example")?)?;
    let tenants = echo(&pem(&theirs, "a.tenants.example")?)?;
    let web = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let services = r#"
[services.front]
listen = "203.0.113.10:443/tcp"
tls = { cert = "front.pem", key = "front.key" }
pool = "web"
access_log = true
timeouts = { header = "5s", connect = "2s", response = "5s", body = "5s", websocket = "30s" }
passthrough = { "db.example" = "db", "*.tenants.example" = "tenants", "gone.example" = "gone" }
"#;
    let gone = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let pools = |dead: SocketAddr| {
        [
            ("web", vec![backend(web.address)]),
            ("db", vec![backend(dead), backend(db)]),
            ("tenants", vec![backend(tenants)]),
            ("gone", vec![backend(gone)]),
        ]
    };
    let certificates = [pem(&front, "front.example")?];
    let mut desk = Desk::start(services, &pools(gone), &certificates)?;
    let at = desk.addresses[0];
    // Whoever of the pool is there has it; the certificate is the server's own.
    for words in ["hello", "once more"] {
        assert_eq!(say(at, &theirs, "DB.example", words, words.len())?, words);
    }
    assert_eq!(say(at, &theirs, "a.tenants.example", "hello", 5)?, "hello");
    ensure!(say(at, &front, "db.example", "hello", 5).is_err(), "the desk shows its own");
    // All others are the desk's.
    let get = "GET / HTTP/1.1\r\nHost: front.example\r\n\r\n";
    assert_eq!(say(at, &front, "front.example", get, 15)?, "HTTP/1.1 200 OK");
    ensure!(say(at, &theirs, "gone.example", "hello", 5).is_err(), "nobody is there");
    let mut plain = TcpStream::connect(at)?;
    plain.write_all(get.as_bytes())?;
    assert_eq!(plain.read_to_end(&mut Vec::new()).unwrap_or(0), 0, "no TLS, no answer");
    let report = desk.report(|report| report.refused.contains_key("tls"))?;
    assert_eq!(report.refused.get("no_backend"), Some(&1), "{:?}", report.refused);
    // Each has its line, when it has ended.
    let mut lines = Vec::new();
    for _ in 0..6 {
        let line: serde_json::Value = serde_json::from_str(&desk.line()?)?;
        assert_eq!((&line["service"], &line["tls"]), (&"front".into(), &true.into()), "{line}");
        lines.push(line);
    }
    let of = |name: &str| {
        let host =
            |line: &&serde_json::Value| line["host"].as_str().is_some_and(|it| it.eq_ignore_ascii_case(name));
        lines.iter().filter(host).collect::<Vec<_>>()
    };
    assert_eq!((of("db.example").len(), of("front.example").len()), (3, 1), "{lines:?}");
    for line in of("db.example") {
        assert_eq!((&line["protocol"], &line["backend"]), (&"TLS".into(), &db.to_string().into()));
        ensure!(line["bytes"].as_u64() > Some(500), "a certificate at least: {line}");
        ensure!(line["trouble"].is_null(), "{line}");
    }
    let [line] = of("gone.example")[..] else { panic!("{lines:?}") };
    assert_eq!((&line["trouble"], &line["bytes"]), (&"no_backend".into(), &0.into()));
    ensure!(line["backend"].is_null(), "{line}");

    // Without certificates of its own the desk has nothing to say to other names.
    let only = services.replace("tls = { cert = \"front.pem\", key = \"front.key\" }\npool = \"web\"\n", "");
    desk.serve(&only, &pools(db), &[])?;
    assert_eq!(say(at, &theirs, "db.example", "hello", 5)?, "hello");
    ensure!(say(at, &front, "front.example", get, 15).is_err(), "nobody of that name");
    desk.report(|report| report.refused.get("unknown_name") == Some(&1))?;

    // It ends with its server.
    let config = tls::client(tls::authorities(&theirs.pem)?, false)?;
    let session = ClientConnection::new(Arc::new(config), "db.example".try_into()?)?;
    let mut long = StreamOwned::new(session, TcpStream::connect(at)?);
    long.write_all(b"hello")?;
    long.read_exact(&mut [0; 5])?;
    let report = desk.report(|report| report.passed == 1)?;
    assert_eq!(report.websockets, 0);
    let mut pools = pools(db);
    pools[1].1.clear();
    desk.serve(&only, &pools, &[])?;
    assert!(!matches!(long.read(&mut [0; 5]), Ok(1..)), "it goes on");
    desk.report(|report| report.passed == 0 && report.refused.get("passed_cut") == Some(&1))?;
    Ok(())
}
