//! Which way a request takes through a desk that runs: by host, path, method and header, and what becomes of it there.

use anyhow::{Context as _, Result};
use tests::{
    desk::{Deed, Desk, Recorder, answer, backend},
    requests::{Answer, Speaker},
};

const SERVICE: &str = r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
[[services.shop.routes]]
host = "shop.example"
pool = "web"
response_headers = { set = { strict-transport-security = "max-age=31536000" } }
[[services.shop.routes]]
host = "*.shop.example"
pool = "web"
headers = { set = { x-way = "wild" } }
[[services.shop.routes]]
host = "shop.example"
path = "/api"
method = ["GET", "POST"]
pool = "web"
strip_prefix = true
headers = { set = { x-way = "api" } }
[[services.shop.routes]]
host = "shop.example"
path = "/api"
method = ["GET"]
header = { x-beta = "1" }
pool = "web"
rewrite = "/beta"
headers = { set = { x-way = "beta" } }
[[services.shop.routes]]
host = "shop.example"
exact_path = "/api/exact"
pool = "web"
headers = { set = { x-way = "exact" } }
[[services.shop.routes]]
host = "api.example"
method = ["GET", "POST"]
pool = "web"
[[services.shop.routes]]
host = "shop.example"
path = "/safe"
redirect = "https"
[[services.shop.routes]]
host = "shop.example"
path = "/moved"
redirect = { to = "https://www.example", status = 301 }
[[services.shop.routes]]
host = "shop.example"
path = "/gone"
redirect = "https://other.example/here?x=1"
[[services.shop.routes]]
host = "shop.example"
path = "/tea"
respond = { status = 418, body = "a teapot", type = "text/plain" }
response_headers = { set = { strict-transport-security = "max-age=1" } }
"#;

struct Scene {
    desk: Desk,
    recorder: Recorder,
}

impl Scene {
    fn ask(&self, line: &str, host: &str, more: &str) -> Result<Answer> {
        let mut speaker = Speaker::to(self.desk.addresses[0])?;
        speaker.say(format!("{line} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n").as_bytes())?;
        speaker.hear()?.context("an answer")
    }
}

fn scene() -> Result<Scene> {
    let recorder = Recorder::start(|_| {
        Deed::Say(
            String::from_utf8_lossy(&answer("ok")).replacen("\r\n", "\r\nServer: it\r\n", 1).into_bytes(),
        )
    })?;
    let desk = Desk::start(SERVICE, &[("web", vec![backend(recorder.address)])], &[])?;
    Ok(Scene { desk, recorder })
}

#[test]
fn the_narrowest_route_is_taken() -> Result<()> {
    let scene = scene()?;
    for (line, host, more, sent, way) in [
        ("GET /x", "shop.example", "", "GET /x HTTP/1.1", ""),
        ("GET /x", "SHOP.example:8080", "", "GET /x HTTP/1.1", ""),
        ("GET /x", "a.shop.example", "", "GET /x HTTP/1.1", "wild"),
        ("GET /x", "a.b.shop.example", "", "GET /x HTTP/1.1", "wild"),
        ("GET /apis", "shop.example", "", "GET /apis HTTP/1.1", ""),
        ("GET /api", "shop.example", "", "GET / HTTP/1.1", "api"),
        ("GET /api/a?b=c", "shop.example", "", "GET /a?b=c HTTP/1.1", "api"),
        ("GET /api/a", "shop.example", "X-Beta: 1\r\n", "GET /beta/a HTTP/1.1", "beta"),
        ("GET /api/a", "shop.example", "X-Beta: 2\r\n", "GET /a HTTP/1.1", "api"),
        ("GET /api/exact", "shop.example", "X-Beta: 1\r\n", "GET /api/exact HTTP/1.1", "exact"),
        ("DELETE /api/exact", "shop.example", "", "DELETE /api/exact HTTP/1.1", "exact"),
    ] {
        let answer = scene.ask(line, host, more)?;
        assert_eq!(answer.status, 200, "{line} {host} {more}: {}", answer.body);
        let got = scene.recorder.take().pop().context("a request")?;
        assert_eq!((got.line(), got.header("x-way").concat().as_str()), (sent, way), "{line} {host} {more}");
        let is_strict = answer.header("strict-transport-security") == Some("max-age=31536000");
        assert_eq!(is_strict, way.is_empty(), "{line} {host}: {}", answer.head);
    }
    Ok(())
}

#[test]
fn what_takes_no_route_or_leads_elsewhere_is_answered_at_the_desk() -> Result<()> {
    let scene = scene()?;
    for (line, host, status, name, value) in [
        ("GET /x", "other.example", 404, "", ""),
        ("GET /x", "xshop.example", 404, "", ""),
        ("PUT /a", "api.example", 405, "allow", "GET, HEAD, POST"),
        ("GET /safe/a?b=c", "shop.example:80", 308, "location", "https://shop.example/safe/a?b=c"),
        ("GET /moved/a?b=c", "shop.example", 301, "location", "https://www.example/moved/a?b=c"),
        ("GET /gone/a", "shop.example", 308, "location", "https://other.example/here?x=1"),
        ("GET /tea", "shop.example", 418, "strict-transport-security", "max-age=1"),
        ("GET /tea", "shop.example", 418, "content-type", "text/plain"),
    ] {
        let answer = scene.ask(line, host, "")?;
        assert_eq!(answer.status, status, "{line} {host}: {}", answer.body);
        if !name.is_empty() {
            assert_eq!(answer.header(name), Some(value), "{line} {host}: {}", answer.head);
        }
        assert_eq!(scene.recorder.take(), [], "{line} {host}");
    }
    Ok(())
}
