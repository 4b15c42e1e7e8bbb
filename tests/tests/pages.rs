//! What clients see where the desk has something to say itself, what a backend sees of a path, and which requests are
//! written down.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use tests::{
    desk::{Deed, Desk, Recorder, answer, backend},
    requests::{Answer, Speaker},
    stage::{Stage, lb, run},
};
use xtask::lab::{self, LabOptions};

fn get(address: SocketAddr, path: &str, accept: &str) -> Result<Answer> {
    let mut speaker = Speaker::to(address)?;
    speaker
        .say(format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\nAccept: {accept}\r\n\r\n").as_bytes())?;
    speaker.hear()?.context("an answer")
}

#[test]
fn browsers_see_the_pages_of_the_service() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = directory.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let closed = file("closed.html", "<h1>Our shop is closed</h1>{{retry_after}}|{{reason}}|{{request_id}}")?;
    let other = file("other.html", "<h1>Oh: {{title}}</h1>{{text}}")?;
    let services = format!(
        "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npages = {{ 503 = \"{closed}\", default = \"{other}\" }}\n\
         [[services.shop.routes]]\npath = \"/shop\"\npool = \"web\"\n\
         [[services.shop.routes]]\npath = \"/own\"\nrespond = {{ status = 503, body = \"own words\" }}\n"
    );
    let desk = Desk::start(&services, &[("web", Vec::new())], &[])?;
    let at = desk.addresses[0];
    let shown = get(at, "/shop", "text/html,*/*;q=0.8")?;
    assert_eq!((shown.status, shown.header("content-type")), (503, Some("text/html; charset=utf-8")));
    let id = shown.header("x-request-id").context("a number")?;
    assert_eq!(shown.body, format!("<h1>Our shop is closed</h1>5|no_backend|{id}"));
    let shown = get(at, "/", "text/html")?;
    assert_eq!(shown.status, 404);
    assert!(shown.body.starts_with("<h1>Oh: No such room</h1>Nothing is served"), "{}", shown.body);
    // Programs are told in their own way, and what the document itself says is left as it is.
    assert!(get(at, "/shop", "application/json")?.body.starts_with('{'));
    assert!(get(at, "/shop", "*/*")?.body.starts_with("This room is closed for the moment\n"));
    assert_eq!(get(at, "/own", "text/html")?.body, "own words");
    // Who asks for the head alone gets that, by HTTP/2 as well, where a body would be a mistake.
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let url = format!("http://{at}/own");
        let output =
            std::process::Command::new("curl").args(["-s", "-I", "-m", "10", version, &url]).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && said.contains("content-length: 9"), "{version}: {output:?}");
        assert!(!said.contains("own words"), "{said}");
    }
    Ok(())
}

#[test]
fn a_server_sees_the_path_that_it_knows() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let route = |condition: &str| format!("[[services.shop.routes]]\npool = \"web\"\n{condition}\n");
    let services = [
        "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\n".to_owned(),
        route("path = \"/static\"\nstrip_prefix = true"),
        route("path = \"/api\"\nrewrite = \"/v2/api\""),
        route("exact_path = \"/status\"\nrewrite = \"/healthz\""),
        route("path = \"/as/it/is\""),
    ]
    .concat();
    let desk = Desk::start(&services, &[("web", vec![backend(recorder.address)])], &[])?;
    for (asked, seen) in [
        ("/static/logo%20a.svg?v=1", "/logo%20a.svg?v=1"),
        ("/static", "/"),
        ("/api/x/../orders/?page=2", "/v2/api/orders/?page=2"),
        ("/api", "/v2/api"),
        ("/status", "/healthz"),
        ("/as/it/is/", "/as/it/is/"),
    ] {
        assert_eq!(get(desk.addresses[0], asked, "*/*")?.status, 200, "{asked}");
        assert_eq!(recorder.take()[0].line(), format!("GET {seen} HTTP/1.1"), "{asked}");
    }
    Ok(())
}

#[test]
fn of_requests_that_go_well_a_share_is_written_down() -> Result<()> {
    let recorder = Recorder::start(|got| {
        let fails = got.line().starts_with("GET /fails");
        Deed::Say(if fails { b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n".to_vec() } else { answer("ok") })
    })?;
    let services = "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\naccess_log = { one_in = 10 }\n\
                    [[services.shop.routes]]\npath = \"/none\"\npool = \"empty\"\n";
    let pools = [("web", vec![backend(recorder.address)]), ("empty", Vec::new())];
    let desk = Desk::start(services, &pools, &[])?;
    let mut speaker = Speaker::to(desk.addresses[0])?;
    let mut ask = |path: &str| -> Result<()> {
        speaker.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())?;
        speaker.hear()?.context("an answer").map(drop)
    };
    (0..1000).try_for_each(|_| ask("/well"))?;
    ask("/none")?;
    ask("/fails")?;
    let (mut well, mut none) = (0, 0);
    loop {
        let line: serde_json::Value = serde_json::from_str(&desk.line()?)?;
        match line["path"].as_str() {
            Some("/well") => {
                assert_eq!(line["one_in"], 10);
                well += 1;
            }
            Some("/none") => {
                assert_eq!((&line["one_in"], &line["trouble"]), (&1.into(), &"no_backend".into()));
                none += 1;
            }
            _ => {
                assert_eq!((&line["one_in"], &line["status"]), (&1.into(), &500.into()));
                break;
            }
        }
    }
    assert_eq!(none, 1, "what went wrong is written down");
    // Of a thousand some hundred; that it is fewer than 40 or more than 200 does not happen in a lifetime.
    assert!((40..200).contains(&well), "{well}");
    Ok(())
}

#[test]
fn a_page_that_is_none_is_refused_in_its_place() -> Result<()> {
    if !lab::possible("a_page_that_is_none_is_refused_in_its_place") {
        return Ok(());
    }
    let document = "interfaces = [\"front\", \"back\"]\n[pools.web]\nbackends = []\n\
                    [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\nroutes = [ { path = \"/x\", respond = 404 } ]\n\
                    pages = { 503 = \"closed.html\" }\n";
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, document)?;
    let page = stage.directory().join("closed.html");
    std::fs::write(&page, "closed: {{title}}\n")?;
    stage.start()?;
    let shown = |stage: &Stage| {
        let output = stage.try_curl(&["-s", "-H", "Accept: text/html", "http://203.0.113.10/"])?;
        anyhow::Ok(String::from_utf8(output.stdout)?)
    };
    assert_eq!(shown(&stage)?, "closed: This room is closed for the moment\n");
    // It changes with its file; one that is no page leaves things as they were, and says so.
    std::fs::write(&page, "{{title}}, says the shop\n")?;
    stage.until("the other page", |stage| {
        Ok(shown(stage)? == "This room is closed for the moment, says the shop\n")
    })?;
    std::fs::write(&page, "\n{{titel}}\n")?;
    stage.until("an alarm", |stage| {
        let status = stage.json(&["status"])?;
        let alarms = status["status"]["alarms"].as_array().context("a list")?;
        Ok(alarms
            .iter()
            .any(|it| it.as_str().is_some_and(|it| it.contains("line 2: nothing is known for {{titel}}"))))
    })?;
    assert_eq!(shown(&stage)?, "This room is closed for the moment, says the shop\n");
    let next = stage.directory().join("next.toml");
    std::fs::write(&next, document.replace("listen =", "# another\nlisten ="))?;
    let refused = run(&stage.lab.balancer, &lb(), &["apply", next.to_str().context("a path")?])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("9:11") && said.contains("{{titel}}"), "{said}");
    Ok(())
}
