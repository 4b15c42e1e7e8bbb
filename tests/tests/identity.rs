//! Who somebody is by a certificate that they show, or by the word of another service: the desk's process by itself, and
//! behind the program, with what else a route may say of who comes.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener},
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::proxy::{
    auth::key,
    orders::{Pem, Secret},
    tls,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tests::{
    authority::{Authority, Issued},
    desk::{Deed, Desk, Recorder, answer, backend},
    document::{backend_v4, backend_v6},
    requests::{Answer, Speaker},
    stage::{Stage, run},
};
use xtask::lab::{self, LabOptions, link};

const ROBOTS: &str = r#"
[services.shop]
listen = "203.0.113.10:443/tcp"
tls = { cert = "front.pem", key = "front.key" }
clients = { ca = "AT/clients-ca.pem", crl = "AT/revoked.pem", required = REQUIRED }
[[services.shop.routes]]
path = "/"
pool = "web"
[[services.shop.routes]]
path = "/robots"
pool = "web"
auth = { certificate = {} }
require = { role = "robots" }
[[services.shop.routes]]
path = "/machines"
pool = "web"
auth = { certificate = { user = "dns" } }
identity = { x-machine = "user", x-serial = "serial" }
"#;

/// Files of a client.
fn write(directory: &Path, name: &str, issued: &Issued) -> Result<()> {
    std::fs::write(directory.join(format!("{name}.pem")), &issued.chain)?;
    Ok(std::fs::write(directory.join(format!("{name}.key")), &issued.key)?)
}

/// What curl has to say of a path, shown this certificate.
fn curl(directory: &Path, desk: &Desk, client: Option<&str>, path: &str, more: &[&str]) -> Result<Output> {
    let port = desk.addresses[0].port();
    let file = |name: &str| directory.join(name).display().to_string();
    let mut command = Command::new("curl");
    command.args(["-s", "-i", "-m", "20", "--cacert", &file("front-ca.pem")]);
    command.args(["--resolve", &format!("front.example:{port}:127.0.0.1")]).args(more);
    if let Some(client) = client {
        command.args(["--cert", &file(&format!("{client}.pem")), "--key", &file(&format!("{client}.key"))]);
    }
    Ok(command.arg(format!("https://front.example:{port}{path}")).output()?)
}

fn status(output: &Output) -> Result<u16> {
    ensure!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    Ok(said.split(' ').nth(1).context("a status")?.trim().parse()?)
}

/// A connection of a client that has shown a certificate.
struct Known(rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream>);

impl Known {
    fn connect(desk: &Desk, front: &Authority, shown: &Issued) -> Result<Self> {
        let chain = CertificateDer::from_pem_slice(shown.chain.as_bytes())?;
        let key = PrivateKeyDer::from_pem_slice(shown.key.as_bytes())?;
        let config =
            rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
                .with_safe_default_protocol_versions()?
                .with_root_certificates(tls::authorities(&front.pem)?)
                .with_client_auth_cert(vec![chain], key)?;
        let session = rustls::ClientConnection::new(config.into(), "front.example".try_into()?)?;
        Ok(Self(rustls::StreamOwned::new(session, std::net::TcpStream::connect(desk.addresses[0])?)))
    }

    /// The status of an answer, which is read as far as its head.
    fn ask(&mut self, path: &str) -> Result<u16> {
        self.0.write_all(format!("HEAD {path} HTTP/1.1\r\nHost: front.example\r\n\r\n").as_bytes())?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?;
        Ok(head.split(' ').nth(1).context("a status")?.parse()?)
    }
}

#[test]
fn clients_are_known_by_their_certificates() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let at = directory.path();
    let (front, clients, others) = (Authority::new()?, Authority::new()?, Authority::new()?);
    let shown = front.server("front.example")?;
    let pem = Pem { chain: shown.chain, key: Secret::new(shown.key) };
    std::fs::write(at.join("front-ca.pem"), &front.pem)?;
    std::fs::write(at.join("clients-ca.pem"), &clients.pem)?;
    write(at, "robot", &clients.client("Robot 7", &["robot-7.internal"], &["robots"])?)?;
    write(at, "person", &clients.client("Anna", &[], &["staff", "owners"])?)?;
    write(at, "stranger", &others.client("Robot 7", &["robot-7.internal"], &["robots"])?)?;
    let lost = clients.client("Robot 8", &["robot-8.internal"], &["robots"])?;
    write(at, "lost", &lost)?;
    std::fs::write(at.join("revoked.pem"), clients.revoke(&[&lost])?)?;
    let services = |required: bool| {
        ROBOTS.replace("AT", &at.display().to_string()).replace("REQUIRED", &required.to_string())
    };
    // To a HEAD as to a GET, of which the client reads the head.
    let recorder = Recorder::start(|got| match got.line().starts_with("HEAD") {
        true => Deed::Say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n".to_vec()),
        false => Deed::Say(answer("ok")),
    })?;
    let pools = [("web", vec![backend(recorder.address)])];
    let mut desk = Desk::start(&services(false), &pools, std::slice::from_ref(&pem))?;

    let nobody = curl(at, &desk, None, "/robots", &[])?;
    assert_eq!(status(&nobody)?, 401);
    let said = String::from_utf8_lossy(&nobody.stdout).to_lowercase();
    assert!(said.contains("www-authenticate: certificate realm"), "{said}");
    assert_eq!(status(&curl(at, &desk, None, "/", &[])?)?, 200, "others are not asked");
    assert_eq!(status(&curl(at, &desk, Some("person"), "/robots", &[])?)?, 403);
    recorder.take();
    for version in ["--http1.1", "--http2"] {
        let own = ["-H", "X-User: root", "-H", "X-Roles: robots", "-H", "X-Machine: none", version];
        assert_eq!(status(&curl(at, &desk, Some("robot"), "/robots", &own)?)?, 200, "{version}");
        let got = recorder.take().remove(0);
        assert_eq!((got.header("x-user"), got.header("x-roles")), (vec!["Robot 7"], vec!["robots"]));
        assert_eq!(got.header("x-machine"), Vec::<&str>::new());
        assert_eq!(status(&curl(at, &desk, Some("robot"), "/machines", &own)?)?, 200, "{version}");
        let got = recorder.take().remove(0);
        assert_eq!((got.header("x-machine"), got.header("x-user")), (vec!["robot-7.internal"], vec![]));
        assert!(got.header("x-serial")[0].contains(':'), "{got:?}");
    }
    // Known, though without a name of the kind that is asked for.
    assert_eq!(status(&curl(at, &desk, Some("person"), "/machines", &[])?)?, 200);
    assert_eq!(recorder.take()[0].header("x-machine"), Vec::<&str>::new());
    // Who shows a wrong one gets no connection, for whatever it is.
    for client in ["stranger", "lost"] {
        let refused = curl(at, &desk, Some(client), "/", &[])?;
        assert!(!refused.status.success() && recorder.take().is_empty(), "{client}: {refused:?}");
    }
    desk.report(|report| report.refused.get("tls") == Some(&2))?;

    // A connection that was begun by other rules is that of nobody.
    let mut kept = Known::connect(&desk, &front, &clients.client("Robot 7", &[], &["robots"])?)?;
    assert_eq!(kept.ask("/robots")?, 200);
    let other_rules = services(false).replace("clients-ca.pem", "others-ca.pem");
    std::fs::write(at.join("others-ca.pem"), &others.pem)?;
    let other_rules = other_rules.replace(&format!(", crl = \"{}/revoked.pem\"", at.display()), "");
    desk.serve(&other_rules, &pools, std::slice::from_ref(&pem))?;
    assert_eq!(kept.ask("/robots")?, 401);
    assert_eq!(kept.ask("/")?, 200, "others are not asked");
    desk.serve(
        &other_rules.replace("required = false", "required = true"),
        &pools,
        std::slice::from_ref(&pem),
    )?;
    assert_eq!(kept.ask("/")?, 403);

    // Where all are to show one, nobody comes in without.
    desk.serve(&services(true), &pools, std::slice::from_ref(&pem))?;
    assert!(!curl(at, &desk, None, "/", &[])?.status.success());
    assert_eq!(status(&curl(at, &desk, Some("person"), "/", &[])?)?, 200);
    // Other authorities hold for the next connection.
    std::fs::write(at.join("clients-ca.pem"), &others.pem)?;
    std::fs::write(at.join("revoked.pem"), others.revoke(&[])?)?;
    desk.serve(&services(true), &pools, &[pem])?;
    assert!(!curl(at, &desk, Some("robot"), "/robots", &[])?.status.success());
    assert_eq!(status(&curl(at, &desk, Some("stranger"), "/robots", &[])?)?, 200);
    Ok(())
}

const ASKS_ELSEWHERE: &str = r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
timeouts = { header = "5s", connect = "2s", response = "1s", body = "2s" }
[[services.shop.routes]]
path = "/"
pool = "web"
auth = [ { key = { keys = "AT/keys" } }, { forward = { pool = "id", path = "/verify", claims = { user = "x-auth-user", role = "X-Auth-Roles" } } } ]
[[services.shop.routes]]
path = "/owners"
pool = "web"
auth = { forward = { pool = "id", path = "/verify", claims = { user = "x-auth-user", role = "x-auth-roles" } } }
require = { role = "owner" }
"#;

const KEY: &str = "5e0f8a9d1b7c4f6e2d3a";

fn ask(desk: &Desk, request: &str, body: &str) -> Result<Answer> {
    let mut speaker = Speaker::to(desk.addresses[0])?;
    speaker.say(format!("{request}\r\nHost: shop.example\r\n\r\n{body}").as_bytes())?;
    speaker.hear()?.context("an answer")
}

/// A service that knows people by their cookies.
fn knows(cookie: &str) -> Vec<u8> {
    let say = |status: &str, headers: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    match cookie {
        "s=anna" => say("204 No Content", "X-Auth-User: anna\r\nX-Auth-Roles: staff, admin\r\n", ""),
        "s=olga" => say("200 OK", "X-Auth-User: olga\r\nX-Auth-Roles: owner\r\n", "welcome"),
        "s=bert" => say("403 Forbidden", "Content-Type: application/json\r\n", "{\"banned\":true}"),
        "s=odd" => say("304 Not Modified", "", ""),
        "s=ill" => say("500 Oh", "", "oh"),
        "s=long" => say("401 No", "", &"a".repeat(300_000)),
        _ => say(
            "302 Found",
            "Location: https://id.example/login\r\nSet-Cookie: next=1\r\nConnection: x-own\r\nX-Own: 1\r\n",
            "",
        ),
    }
}

#[test]
fn another_service_says_who_may_come_in() -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("keys"), format!("robot:{}\n", key::hash(KEY)))?;
    let id = Recorder::start(|got| match got.header("cookie").first() {
        Some(&"s=silent") => Deed::Nothing,
        cookie => Deed::Say(knows(cookie.copied().unwrap_or_default())),
    })?;
    let web = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let services = ASKS_ELSEWHERE.replace("AT", &directory.path().display().to_string());
    let pools = |id: &Recorder| [("web", vec![backend(web.address)]), ("id", vec![backend(id.address)])];
    let mut desk = Desk::start(&services, &pools(&id), &[])?;

    // Who is not known is sent where they can become so.
    let sent = ask(&desk, "GET /a HTTP/1.1", "")?;
    assert_eq!((sent.status, sent.header("location")), (302, Some("https://id.example/login")));
    assert_eq!((sent.header("set-cookie"), sent.header("x-own")), (Some("next=1"), None));
    assert!(sent.header("x-request-id").is_some() && web.take().is_empty());
    // What is asked, and of whom.
    id.take();
    let post = "POST /pay/../cart?x=1 HTTP/1.1\r\nCookie: s=anna\r\nX-User: root\r\nX-Forwarded-Uri: /else\r\n\
                X_Forwarded_Uri: /else\r\nX-Original-URL: /else\r\nX-Rewrite-URL: /else\r\nX-Auth-User: root\r\n\
                X-Forwarded-For: 6.6.6.6\r\nIf-None-Match: a\r\nRange: bytes=0-1\r\nContent-Type: text/plain\r\n\
                Content-Length: 5";
    assert_eq!(ask(&desk, post, "hello")?.status, 200);
    let asked = id.take().remove(0);
    assert_eq!((asked.line(), asked.body.as_str()), ("GET /verify HTTP/1.1", ""));
    for (name, wanted) in [
        ("cookie", &["s=anna"][..]),
        ("host", &["shop.example"]),
        ("x-forwarded-method", &["POST"]),
        ("x-forwarded-uri", &["/cart?x=1"]),
        ("x-forwarded-for", &["127.0.0.1"]),
        ("x-forwarded-proto", &["http"]),
        ("x-user", &[]),
        ("x-auth-user", &[]),
        ("x_forwarded_uri", &[]),
        ("x-original-url", &[]),
        ("x-rewrite-url", &[]),
        ("if-none-match", &[]),
        ("range", &[]),
        ("content-type", &[]),
        ("content-length", &[]),
    ] {
        assert_eq!(asked.header(name), wanted, "{name}");
    }
    let got = web.take().remove(0);
    assert_eq!((got.line(), got.body.as_str()), ("POST /cart?x=1 HTTP/1.1", "hello"));
    assert_eq!((got.header("x-user"), got.header("x-roles")), (vec!["anna"], vec!["staff,admin"]));
    assert_eq!(got.header("cookie"), ["s=anna"], "what a backend may need too");
    assert_eq!(got.header("x-auth-user"), Vec::<&str>::new(), "what only the other service may tell");

    let with =
        |cookie: &str| format!("GET /owners HTTP/1.1\r\nAccept: application/json\r\nCookie: s={cookie}");
    assert_eq!(ask(&desk, &with("olga"), "")?.status, 200);
    assert_eq!(web.take()[0].header("x-user"), ["olga"]);
    assert!(ask(&desk, &with("anna"), "")?.body.contains("not_allowed"), "known, and no owner");
    let banned = ask(&desk, &with("bert"), "")?;
    assert_eq!((banned.status, banned.body.as_str()), (403, "{\"banned\":true}"));
    // What is no answer lets nobody in.
    for cookie in ["odd", "ill", "long", "silent"] {
        let answer = ask(&desk, &with(cookie), "")?;
        assert!(answer.status == 503 && answer.body.contains("auth_unavailable"), "{cookie}: {answer:?}");
    }
    let grpc = format!("{}\r\nContent-Type: application/grpc", with("bert"));
    let grpc = ask(&desk, &grpc, "")?;
    assert_eq!((grpc.status, grpc.header("grpc-status"), grpc.body.as_str()), (200, Some("7"), ""));
    assert!(web.take().is_empty());
    // Who is known already is not asked after; a wrong key does not hinder whom the other service knows.
    id.take();
    assert_eq!(ask(&desk, &format!("GET / HTTP/1.1\r\nX-Api-Key: {KEY}"), "")?.status, 200);
    assert_eq!((web.take()[0].header("x-user"), id.take().len()), (vec!["robot"], 0));
    let wrong = "GET / HTTP/1.1\r\nX-Api-Key: wrong\r\nCookie: s=olga";
    assert_eq!(ask(&desk, wrong, "")?.status, 200);
    assert_eq!(web.take()[0].header("x-user"), ["olga"]);
    // Nobody is there.
    desk.serve(&services, &[("web", vec![backend(web.address)]), ("id", Vec::new())], &[])?;
    assert_eq!(ask(&desk, &with("olga"), "")?.status, 503);
    assert!(web.take().is_empty());
    Ok(())
}

/// What curl at the lab's client hears on a path of the service at `vip`.
fn hears(stage: &Stage, vip: IpAddr, path: &str, more: &[&str]) -> Result<Answer> {
    let at = SocketAddr::new(vip, 443).to_string();
    let resolved = format!("front.example:443:{}", at.trim_end_matches(":443"));
    let authority = stage.directory().join("front-ca.pem").display().to_string();
    let url = format!("https://front.example{path}");
    let all = ["--include", "--max-time", "20", "--cacert", &authority, "--resolve", &resolved, &url];
    let output = stage.try_curl(&[&all, more].concat())?;
    let status = status(&output)?;
    let said = String::from_utf8(output.stdout)?;
    let (head, body) = said.split_once("\r\n\r\n").context("a head")?;
    Ok(Answer { status, head: head.into(), body: body.into(), last: false })
}

/// Behind the program, over both families: by a certificate, by another service's word, back to the same server, and not too
/// often.
#[test]
fn who_comes_behind_the_program_is_known_too() -> Result<()> {
    if !lab::possible("who_comes_behind_the_program_is_known_too") {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    let at = stage.directory();
    let (front, clients) = (Authority::new()?, Authority::new()?);
    let shown = front.server("front.example")?;
    for (name, text) in [
        ("front.pem", &shown.chain),
        ("front.key", &shown.key),
        ("front-ca.pem", &front.pem),
        ("clients-ca.pem", &clients.pem),
    ] {
        std::fs::write(at.join(name), text)?;
    }
    write(at, "robot", &clients.client("Robot 7", &[], &["robots"])?)?;
    write(at, "person", &clients.client("Anna", &[], &["staff"])?)?;
    let listen = |backend: usize| -> Result<TcpListener> {
        Ok(stage.lab.backends[backend].run(|| TcpListener::bind("[::]:8080"))??)
    };
    let servers = [0, 1].map(|number| -> Result<Recorder> {
        Recorder::on(listen(number)?, move |_| Deed::Say(answer(&number.to_string())))
    });
    let servers: Vec<_> = servers.into_iter().collect::<Result<_>>()?;
    // Beside its own cookie it is shown the desk's.
    let id = Recorder::on(listen(2)?, |got| {
        let cookie = got.header("cookie").concat();
        Deed::Say(knows(cookie.split(';').next().unwrap_or_default()))
    })?;
    let mut document = "interfaces = [\"front\", \"back\"]\n".to_owned();
    let families: [fn(LabOptions, usize) -> String; 2] = [backend_v4, backend_v6];
    for (number, (vip, address)) in Stage::VIPS.into_iter().zip(families).enumerate() {
        let [first, second, third] = [0, 1, 2].map(|backend| address(options, backend));
        let listen = SocketAddr::new(vip, 443);
        document += &format!(
            r#"
[pools.web{number}]
backends = [ {{ address = "{first}" }}, {{ address = "{second}" }} ]
[pools.id{number}]
backends = [ {{ address = "{third}" }} ]
[services.shop{number}]
listen = "{listen}/tcp"
tls = {{ cert = "front.pem", key = "front.key" }}
clients = {{ ca = "clients-ca.pem" }}
[[services.shop{number}.routes]]
path = "/robots"
pool = "web{number}"
auth = {{ certificate = {{}} }}
require = {{ role = "robots" }}
[[services.shop{number}.routes]]
path = "/members"
pool = "web{number}"
auth = {{ forward = {{ pool = "id{number}", path = "/verify", claims = {{ user = "x-auth-user" }} }} }}
sticky = {{ cookie = "room" }}
[[services.shop{number}.routes]]
path = "/search"
pool = "web{number}"
limits = {{ rate = "2/h", burst = 3 }}
"#
        );
    }
    stage.write(&document)?;
    // More sources: of IPv6 two in one network, which is behind the client.
    let others: [&[IpAddr]; 2] = [&["10.1.0.200".parse()?], &["fd00:9::7".parse()?, "fd00:9::8".parse()?]];
    for (addresses, prefix) in others.into_iter().zip([32, 128]) {
        addresses.iter().try_for_each(|&address| link::address(&stage.lab.client, "lo", address, prefix))?;
    }
    let via = ["-6", "route", "add", "fd00:9::/64", "via", &stage.lab.client_v6().to_string()];
    ensure!(run(&stage.lab.balancer, Path::new("ip"), &via)?.status.success(), "no way to the client");
    stage.start()?;
    let own: [IpAddr; 2] = [stage.lab.client_v4().into(), stage.lab.client_v6().into()];
    let at = stage.directory();
    let got = || servers.iter().flat_map(Recorder::take).collect::<Vec<_>>();
    for ((vip, own), others) in Stage::VIPS.into_iter().zip(own).zip(others) {
        let before = stage.packets("pass_local")?;
        let hears = |path: &str, more: &[&str]| hears(&stage, vip, path, more);
        // By a certificate.
        let shows = |client: &str| -> Result<Answer> {
            let file = |name: &str| at.join(format!("{client}.{name}")).display().to_string();
            hears("/robots", &["--cert", &file("pem"), "--key", &file("key"), "-H", "X-User: root"])
        };
        assert_eq!((hears("/robots", &[])?.status, shows("person")?.status), (401, 403), "{vip}");
        assert_eq!(got(), [], "{vip}");
        assert_eq!(shows("robot")?.status, 200, "{vip}");
        let seen = got().pop().context("a request")?;
        assert_eq!((seen.header("x-user"), seen.header("x-roles")), (vec!["Robot 7"], vec!["robots"]));
        assert_eq!(seen.header("x-forwarded-for"), [own.to_string()]);
        // By another service's word.
        let sent = hears("/members", &[])?;
        assert_eq!((sent.status, sent.header("location")), (302, Some("https://id.example/login")), "{vip}");
        assert_eq!(got(), [], "{vip}");
        id.take();
        let first = hears("/members", &["-H", "Cookie: s=anna"])?;
        assert_eq!(first.status, 200, "{vip}: {}", first.body);
        let asked = id.take().pop().context("a question")?;
        assert_eq!(
            (asked.line(), asked.header("x-forwarded-uri")),
            ("GET /verify HTTP/1.1", vec!["/members"])
        );
        assert_eq!(asked.header("x-forwarded-for"), [own.to_string()]);
        assert_eq!(got().pop().context("a request")?.header("x-user"), ["anna"]);
        // Back to the same server.
        let set = first.header("set-cookie").context("a cookie")?.to_owned();
        let (pair, rest) = set.split_once(';').context("attributes")?;
        ensure!(pair.starts_with("room=") && rest.contains("Secure"), "{set}");
        let both = format!("Cookie: s=anna; {pair}");
        for _ in 0..10 {
            let again = hears("/members", &["-H", &both])?;
            assert_eq!(
                (again.body.as_str(), again.header("set-cookie")),
                (first.body.as_str(), None),
                "{vip}"
            );
        }
        let all: Result<BTreeSet<_>> =
            (0..30).map(|_| Ok(hears("/members", &["-H", "Cookie: s=anna"])?.body)).collect();
        assert_eq!(all?.len(), 2, "{vip}: who has no cookie goes to anybody");
        // Not too often, from one source.
        let from = |source: IpAddr| hears("/search", &["--interface", &source.to_string()]);
        let statuses: Result<Vec<_>> = (0..5).map(|_| Ok(from(own)?.status)).collect();
        assert_eq!(statuses?, [200, 200, 200, 429, 429], "{vip}");
        let refused = from(own)?;
        let wait: u64 = refused.header("retry-after").context("when to come back")?.parse()?;
        ensure!((1700..=1800).contains(&wait), "{vip}: one comes back each half hour: {}", refused.head);
        got();
        for round in 0..3 {
            let source = others[round % others.len()];
            assert_eq!(from(source)?.status, 200, "{vip}: {source} is another source");
            let seen = got().pop().context("a request")?;
            assert_eq!(seen.header("x-forwarded-for"), [source.to_string()]);
        }
        for &source in others {
            assert_eq!(from(source)?.status, 429, "{vip}: {source}");
        }
        assert_eq!(got(), [], "{vip}");
        ensure!(stage.packets("pass_local")? > before, "{vip}: packets do not come by the program");
    }
    stage.checksums_were_right()
}
