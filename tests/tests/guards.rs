//! Who comes in by a route of the desk, who does not, and what a backend is told: the desk's process by itself,
//! and behind the program with curl.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU8, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    desk::{Deed, Desk, Recorder, answer, backend},
    requests::{Answer, Speaker},
    stage::{Stage, lb, run},
    tokens::{HEAD, basic, claims, token},
};
use xtask::lab::{self, LabOptions};

const PASSWORD: &str = "open sesame";
const KEY: &str = "5e0f8a9d1b7c4f6e2d3a";

/// What the issuer of tokens and the desk have in common.
const SHARED: &str = "c0ffee5e0f8a9d1b7c4f6e2d3a90817263545362718";

/// The same, later.
const ANOTHER: &str = "decaf90817263545362718c0ffee5e0f8a9d1b7c4f6e2d3a";

/// A line that `lb auth hash` prints for a secret.
fn line(arguments: &[&str], secret: &str) -> Result<String> {
    let mut child = Command::new(lb())
        .args(["auth", "hash"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("standard input")?.write_all(secret.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "lb auth hash {arguments:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Files of users and keys, by `lb auth hash` and in the form of `htpasswd -B`.
fn write_files(directory: &Path) -> Result<()> {
    let anna = line(&["anna", "--role", "admin", "--role", "staff"], &format!("{PASSWORD}\n"))?;
    // "friend", as the C library's crypt() has it, and `htpasswd -B` with it.
    let bert = "bert:$2y$05$KHlfFQ5WJ2Og4y3RMRV8QeMA6ftN2aqOyikjXhlTbdJYRYQanYsN6\n";
    std::fs::write(directory.join("staff.users"), anna + bert)?;
    std::fs::write(directory.join("robots.keys"), line(&["robot", "--key", "--role", "orders"], KEY)?)?;
    std::fs::write(directory.join("issuer.secret"), format!("{SHARED}\n"))?;
    Ok(())
}

/// Routes of a service: all below /staff and /orders ask, /open does not.
fn routes(service: &str, directory: &Path) -> String {
    let at = directory.display();
    format!(
        r#"
[[services.{service}.routes]]
path = "/staff"
auth = {{ basic = {{ users = "{at}/staff.users", realm = "the staff" }} }}
pool = "web"
[[services.{service}.routes]]
path = "/staff/books"
auth = {{ basic = {{ users = "{at}/staff.users", realm = "the staff" }} }}
require = {{ role = "admin" }}
identity = {{ x-remote-user = "user" }}
pool = "web"
[[services.{service}.routes]]
path = "/orders"
auth = [
  {{ basic = {{ users = "{at}/staff.users", realm = "the staff" }} }},
  {{ key = {{ keys = "{at}/robots.keys" }} }},
]
forward_credentials = true
pool = "web"
[[services.{service}.routes]]
path = "/elsewhere"
allow = ["192.0.2.0/24"]
pool = "web"
[[services.{service}.routes]]
path = "/pay"
auth = {{ jwt = {{ secret_file = "{at}/issuer.secret", issuer = "https://id.example", audience = "shop" }} }}
require = {{ role = "customer" }}
pool = "web"
"#
    )
}

struct Scene {
    desk: Desk,
    recorder: Recorder,
    /// Each asks from an address of its own: who is wrong too often from one is not listened to.
    asked: AtomicU8,
    _directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        write_files(directory.path())?;
        let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
        let services = format!(
            "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n{}",
            routes("shop", directory.path())
        );
        let desk = Desk::start(&services, &[("web", vec![backend(recorder.address)])], &[])?;
        Ok(Self { desk, recorder, asked: 1.into(), _directory: directory })
    }

    fn ask(&self, path: &str, headers: &str) -> Result<Answer> {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        let mut speaker = Speaker::from_source([127, 1, 0, number].into(), self.desk.addresses[0])?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{headers}\r\n");
        speaker.say(request.as_bytes())?;
        speaker.hear()?.context("an answer")
    }
}

#[test]
fn who_is_not_known_does_not_come_in() -> Result<()> {
    let scene = Scene::new()?;
    let (anna, bert) = (basic(&format!("anna:{PASSWORD}")), basic("bert:friend"));
    let key = format!("X-Api-Key: {KEY}\r\n");
    for (path, headers, status) in [
        ("/", String::new(), 200),
        ("/staff", String::new(), 401),
        ("/staff", anna.clone(), 200),
        ("/staff", anna.clone(), 200),
        ("/staff", bert.clone(), 200),
        ("/staff", basic("anna:friend"), 401),
        ("/staff", basic("carl:friend"), 401),
        ("/staff", basic(&format!("anna:{PASSWORD}x")), 401),
        ("/staff", basic("anna:"), 401),
        ("/staff", "Authorization: Basic \r\n".into(), 401),
        ("/staff", "Authorization: Basic !!!!\r\n".into(), 401),
        ("/staff", format!("{anna}{anna}"), 401),
        ("/staff", key.clone(), 401),
        // What is below asks for more; however the path is written.
        ("/staff/books", bert.clone(), 403),
        ("/staff/books", anna.clone(), 200),
        ("/staff/books", String::new(), 401),
        ("/open/../staff/books", bert.clone(), 403),
        ("/staff/%62ooks/", bert.clone(), 403),
        ("//staff//books", bert.clone(), 403),
        ("/staff/./books;x", bert.clone(), 200),
        ("/staff%2fbooks", bert.clone(), 400),
        ("/orders", key.clone(), 200),
        ("/orders", bert.clone(), 200),
        ("/orders", "X-Api-Key: x\r\n".into(), 401),
        ("/orders", format!("{}{key}", basic("anna:wrong")), 200),
        ("/elsewhere", anna.clone(), 403),
    ] {
        scene.recorder.take();
        let answer = scene.ask(path, &headers)?;
        assert_eq!(answer.status, status, "{path} {headers}: {}", answer.body);
        assert_eq!(scene.recorder.take().len(), usize::from(status == 200), "{path} {headers}");
        let challenged = answer.head.to_lowercase().contains("www-authenticate: basic realm=\"the staff\"");
        assert_eq!(challenged, status == 401, "{path}: {}", answer.head);
    }
    let report = scene.desk.report(|report| report.denied.iter().any(|it| it.reason == "source"))?;
    let denied = |status, reason: &str| -> u64 {
        let its = report.denied.iter().filter(|it| it.status == status && it.reason == reason);
        its.map(|it| it.count).sum()
    };
    assert_eq!((denied(403, "not_allowed"), denied(403, "source")), (4, 1));
    // Two headers of one name are none, nor is a scheme with nothing behind it; a key is nothing where a password is
    // asked for.
    assert_eq!((denied(401, "no_credentials"), denied(401, "wrong_credentials")), (5, 6));
    assert!(report.denied.iter().all(|it| it.service == "shop" && it.route.starts_with("*/")));
    Ok(())
}

#[test]
fn a_backend_is_told_who_asks_by_the_desk_alone() -> Result<()> {
    let scene = Scene::new()?;
    let anna = basic(&format!("anna:{PASSWORD}"));
    let lies =
        "X-User: root\r\nX_User: root\r\nX-Roles: admin\r\nX-Remote-User: root\r\nX-REMOTE_USER: root\r\n";
    // A client that has the headers taken out by the connection's own rules does not get rid of them either.
    let hops = "Connection: x-user, x-roles, x-remote-user\r\n";
    let bert = basic("bert:friend");
    for (path, headers, told) in [
        ("/", lies.to_owned(), &[][..]),
        ("/staff", format!("{anna}{lies}"), &["x-roles: admin,staff", "x-user: anna"]),
        ("/staff", format!("{anna}{lies}{hops}"), &["x-roles: admin,staff", "x-user: anna"]),
        ("/staff", format!("{bert}{lies}"), &["x-user: bert"]),
        ("/staff/books", format!("{anna}{lies}"), &["x-remote-user: anna"]),
        ("/orders", format!("X-Api-Key: {KEY}\r\n{lies}"), &["x-roles: orders", "x-user: robot"]),
    ] {
        scene.recorder.take();
        assert_eq!(scene.ask(path, &headers)?.status, 200, "{path} {headers}");
        let got = scene.recorder.take().pop().context("a request")?;
        let lines = got.head.lines().map(str::to_lowercase);
        let mut seen: Vec<_> = lines.filter(|line| line.contains("user") || line.contains("roles")).collect();
        seen.sort();
        assert_eq!(seen, told, "{path}");
        // What the desk was shown goes on where that is asked for, and nowhere else.
        let shown = ["authorization", "x-api-key"].iter().any(|name| !got.header(name).is_empty());
        assert_eq!(shown, path == "/orders", "{path}: {}", got.head);
    }
    // What is for the server behind an open route is none of the desk's affair.
    scene.ask("/", &anna)?;
    assert_eq!(scene.recorder.take().pop().context("a request")?.header("authorization").len(), 1);
    Ok(())
}

#[test]
fn a_token_is_believed_by_its_signature_alone() -> Result<()> {
    let scene = Scene::new()?;
    let good = token(SHARED, HEAD, &claims("customer", "shop", 3600)?);
    let header = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let unsigned = token("", r#"{"alg":"none"}"#, &claims("customer", "shop", 3600)?);
    let unsigned = &unsigned[..=unsigned.rfind('.').context("a signature")?];
    let guest = token(SHARED, HEAD, &claims("guest", "shop", 3600)?);
    // The head and signature of one, the claims of another.
    let (mut parts, others) = (good.split('.').collect::<Vec<_>>(), guest.split('.').collect::<Vec<_>>());
    parts[1] = others[1];
    let mixed = parts.join(".");
    for (what, headers, status, why) in [
        ("a good one", header(&good), 200, ""),
        ("nothing", String::new(), 401, "bearer realm=\"lobby\"\r"),
        ("a password", basic("bert:friend"), 401, "bearer realm=\"lobby\"\r"),
        ("two", format!("{0}{0}", header(&good)), 401, "bearer realm=\"lobby\"\r"),
        ("a guest", header(&guest), 403, ""),
        ("not signed", header(unsigned), 401, "the token's algorithm is not taken"),
        ("changed", header(&mixed), 401, "the token's signature is not right"),
        (
            "another's signature",
            header(&token("another's", HEAD, &claims("customer", "shop", 3600)?)),
            401,
            "the token's signature is not right",
        ),
        (
            "signed with what would be another's key",
            header(&token(SHARED, r#"{"alg":"RS256"}"#, &claims("customer", "shop", 3600)?)),
            401,
            "the token's algorithm is not taken",
        ),
        (
            "not signed, in capitals",
            header(&token(SHARED, r#"{"alg":"NONE"}"#, &claims("customer", "shop", 3600)?)),
            401,
            "error=\"invalid_token\"",
        ),
        (
            "of no algorithm",
            header(&token(SHARED, r#"{"typ":"JWT"}"#, &claims("customer", "shop", 3600)?)),
            401,
            "error=\"invalid_token\"",
        ),
        ("without its signature", header(&good[..=good.rfind('.').context("parts")?]), 401, "is not right"),
        ("cut short", header(&good[..good.len() - 2]), 401, "error=\"invalid_token\""),
        ("with a part more", header(&format!("{good}.{}", "e30")), 401, "error=\"invalid_token\""),
        ("padded", header(&format!("{good}=")), 401, "error=\"invalid_token\""),
        (
            "critical",
            header(&token(
                SHARED,
                r#"{"alg":"HS256","crit":["x"],"x":1}"#,
                &claims("customer", "shop", 3600)?,
            )),
            401,
            "error=\"invalid_token\"",
        ),
        (
            "without an end",
            header(&token(SHARED, HEAD, &claims("customer", "shop", 3600)?.replace("\"exp\"", "\"ex\""))),
            401,
            "error=\"invalid_token\"",
        ),
        (
            "of another issuer",
            header(&token(
                SHARED,
                HEAD,
                &claims("customer", "shop", 3600)?.replace("id.example", "evil.example"),
            )),
            401,
            "error=\"invalid_token\"",
        ),
        (
            "not yet",
            header(&token(
                SHARED,
                HEAD,
                &claims("customer", "shop", 3600)?.replace("{", "{\"nbf\":99999999999,"),
            )),
            401,
            "error=\"invalid_token\"",
        ),
        (
            "old",
            header(&token(SHARED, HEAD, &claims("customer", "shop", -3600)?)),
            401,
            "error=\"invalid_token\", error_description=\"the token has expired\"",
        ),
        (
            "for somebody else",
            header(&token(SHARED, HEAD, &claims("customer", "lab", 3600)?)),
            401,
            "the token is for another audience",
        ),
    ] {
        scene.recorder.take();
        let answer = scene.ask("/pay", &headers)?;
        assert_eq!(answer.status, status, "{what}: {}", answer.body);
        let head = format!("{}\r\n", answer.head).to_lowercase();
        assert!(head.contains(why), "{what}: {head}");
        assert_eq!(head.contains("www-authenticate: bearer"), status == 401, "{what}: {head}");
        let got = scene.recorder.take();
        assert_eq!(got.len(), usize::from(status == 200), "{what}");
        if let Some(got) = got.first() {
            assert_eq!((got.header("x-user"), got.header("x-roles")), (vec!["dora"], vec!["customer"]));
            assert!(got.header("authorization").is_empty(), "{}", got.head);
        }
    }
    Ok(())
}

/// The same behind the program, with curl; files that change, and files that cannot be used.
#[test]
fn curl_is_asked_who_it_is() -> Result<()> {
    if !lab::possible("curl_is_asked_who_it_is") {
        return Ok(());
    }
    let options = LabOptions::default();
    let document = |log: &str| {
        format!(
            "interfaces = [\"front\", \"back\"]\nmetrics = \"127.0.0.1:9100\"\n[pools.web]\nbackends = [{{ address = \"{}\" }}]\n\
             [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n{log}{}",
            tests::document::backend_v4(options, 0),
            // Files are beside the document.
            routes("shop", Path::new("/")).replace("\"//", "\"")
        )
    };
    let mut stage = Stage::without_daemon(options, "")?;
    write_files(stage.directory())?;
    stage.write(&document("access_log = true\n"))?;
    stage.nginx(0)?;
    stage.start()?;
    let url = "http://203.0.113.10/staff/page";
    std::fs::create_dir_all(stage.directory().join("staff"))?;
    std::fs::write(stage.directory().join("staff/page"), "a page\n")?;
    // Each from another address, so that what is tried until it is right is not too often wrong from one.
    let all = ["route", "add", "local", "10.1.0.128/25", "dev", "lo"];
    ensure!(run(&stage.lab.client, Path::new("ip"), &all)?.status.success(), "more addresses");
    let asked = AtomicU8::new(0);
    let curl = |stage: &Stage, arguments: &[&str]| -> Result<String> {
        let source = format!("10.1.0.{}", 128 + asked.fetch_add(1, Ordering::Relaxed) % 126);
        let output = stage.try_curl(&[&["--interface", &source], arguments].concat())?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let user = format!("anna:{PASSWORD}");
    assert_eq!(curl(&stage, &["--user", &user, url])?, "a page\n");
    let refused = curl(&stage, &["--include", "-H", "Accept: application/json", url])?;
    assert!(
        refused.starts_with("HTTP/1.1 401 ") && refused.contains("\"reason\":\"no_credentials\""),
        "{refused}"
    );
    let refused = curl(&stage, &["--include", "-H", "Accept: text/html", "--user", "anna:x", url])?;
    assert!(refused.contains("<h1>That is not known here</h1>"), "{refused}");

    // Who is taken out of the file does not come in any more, whatever is remembered; who is new does.
    let path = stage.directory().join("staff.users");
    let before = std::fs::read_to_string(&path)?;
    std::fs::write(&path, line(&["carl"], "friend")?)?;
    stage.until("carl comes in", |stage| Ok(curl(stage, &["--user", "carl:friend", url])? == "a page\n"))?;
    assert!(curl(&stage, &["--include", "--user", &user, url])?.starts_with("HTTP/1.1 401 "));

    // A file that cannot be used changes nothing, raises an alarm, and says nothing of what is in it.
    std::fs::write(&path, "carl:hunter2\n")?;
    stage.until("an alarm", |stage| {
        Ok(stage.json(&["status"])?.to_string().contains("staff.users, line 1"))
    })?;
    assert_eq!(curl(&stage, &["--user", "carl:friend", url])?, "a page\n");
    let document = stage.document().display().to_string();
    let output = run(&stage.lab.balancer, &lb(), &["apply", &document])?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && complaint.contains("lb auth hash"), "{complaint}");
    std::fs::write(&path, before)?;
    stage.until("anna comes in again", |stage| Ok(curl(stage, &["--user", &user, url])? == "a page\n"))?;

    // So it is with what tokens are signed with.
    let pay = "http://203.0.113.10/pay";
    std::fs::write(stage.directory().join("pay"), "thanks\n")?;
    let claims = claims("customer", "shop", 3600)?;
    let [old, new] = [SHARED, ANOTHER].map(|secret| token(secret, HEAD, &claims));
    let bearer = |token: &str| format!("Authorization: Bearer {token}");
    assert_eq!(curl(&stage, &["-H", &bearer(&old), pay])?, "thanks\n");
    std::fs::write(stage.directory().join("issuer.secret"), ANOTHER)?;
    stage.until("the new token is taken", |stage| {
        Ok(curl(stage, &["-H", &bearer(&new), pay])? == "thanks\n")
    })?;
    let refused = curl(&stage, &["--include", "-H", &bearer(&old), pay])?;
    assert!(refused.contains("error_description=\"the token's signature is not right\""), "{refused}");

    let listed = stage.json(&["route", "list"])?.to_string();
    assert!(listed.contains("\"asks\":\"basic, role admin\""), "{listed}");
    let words = stage.lb(&["explain", "198.51.100.7:40000", "203.0.113.10:80/tcp"])?;
    assert!(words.contains("the desk answers it, and `lb route explain URL` says by which route"), "{words}");
    let explained = stage.json(&["route", "explain", "http://203.0.113.10/orders"])?.to_string();
    assert!(explained.contains("\"asks\":\"basic or key\""), "{explained}");
    let paid = stage.json(&["route", "explain", pay])?.to_string();
    assert!(paid.contains("\"asks\":\"jwt of https://id.example for shop, role customer\""), "{paid}");
    let metrics = stage.metrics()?;
    let wanted = "lobby_desk_denied_total{service=\"shop\",route=\"*/staff/*\",status=\"401\",reason=\"wrong_credentials\"}";
    assert!(metrics.contains(wanted), "{metrics}");

    // No secret is anywhere that people look.
    let hashes =
        std::fs::read_to_string(&path)? + &std::fs::read_to_string(stage.directory().join("robots.keys"))?;
    let mut secrets = vec![PASSWORD.to_owned(), KEY.to_owned(), "hunter2".to_owned(), "friend".to_owned()];
    secrets.extend([SHARED.to_owned(), ANOTHER.to_owned(), old, new]);
    secrets.push(basic(&user).trim_end().rsplit(' ').next().context("base64")?.to_owned());
    secrets.extend(hashes.lines().filter_map(|line| line.split(':').nth(1).map(str::to_owned)));
    let status = stage.json(&["status"])?.to_string() + &stage.json(&["desk", "status"])?.to_string();
    let everything = [stage.log(), listed, explained, status, complaint, metrics].concat();
    assert!(everything.contains("\"path\":\"/staff/page\""), "the access log is not in it");
    for secret in secrets {
        assert!(!everything.contains(&secret), "{secret} is seen");
    }
    Ok(())
}
