//! Requests that belong together come to the same server, as long as it is fit.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use tests::{
    desk::{BackendOrder, Deed, Desk, Recorder, answer, backend},
    requests::{Answer, Speaker},
};

const SERVICE: &str = r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
[[services.shop.routes]]
path = "/cookie"
pool = "web"
sticky = { cookie = "lobby" }
[[services.shop.routes]]
path = "/header"
pool = "web"
sticky = { header = "x-user" }
[[services.shop.routes]]
path = "/source"
pool = "web"
sticky = "source"
"#;

struct Scene {
    desk: Desk,
    servers: Vec<Recorder>,
}

impl Scene {
    fn new() -> Result<Self> {
        let servers: Result<Vec<_>> =
            (0..5).map(|number| Recorder::start(move |_| Deed::Say(answer(&number.to_string())))).collect();
        let servers = servers?;
        let backends = servers.iter().map(|server| backend(server.address)).collect();
        Ok(Self { desk: Desk::start(SERVICE, &[("web", backends)], &[])?, servers })
    }

    fn ask(&self, source: u8, path: &str, headers: &str) -> Result<Answer> {
        let mut speaker = Speaker::from_source([127, 5, 0, source].into(), self.desk.addresses[0])?;
        speaker.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{headers}\r\n").as_bytes())?;
        speaker.hear()?.context("an answer")
    }

    /// All but one of the servers are fit.
    fn without(&mut self, unfit: usize) -> Result<()> {
        let order = |(number, server): (usize, &Recorder)| BackendOrder {
            usable: number != unfit,
            ..backend(server.address)
        };
        let backends = self.servers.iter().enumerate().map(order).collect();
        self.desk.serve(SERVICE, &[("web", backends)], &[])
    }
}

/// What is set by an answer.
fn cookie(answer: &Answer) -> Option<&str> {
    answer.header("set-cookie")
}

#[test]
fn a_cookie_brings_a_client_back() -> Result<()> {
    let mut scene = Scene::new()?;
    let first = scene.ask(1, "/cookie", "")?;
    let set = cookie(&first).context("a cookie")?.to_owned();
    let (pair, rest) = set.split_once(';').context("attributes")?;
    assert_eq!(rest, " Path=/; HttpOnly; SameSite=Lax");
    assert!(!pair.contains("127"), "no address is told: {pair}");
    for _ in 0..20 {
        let again = scene.ask(2, "/cookie", &format!("Cookie: a=b; {pair}; c=d\r\n"))?;
        assert_eq!((again.body.as_str(), cookie(&again)), (first.body.as_str(), None));
    }
    let others: Result<BTreeSet<_>> = (0..60).map(|_| Ok(scene.ask(1, "/cookie", "")?.body)).collect();
    assert_eq!(others?.len(), 5, "who has no cookie goes to anybody");
    // Its server is not fit: another one, and the cookie of that.
    scene.without(first.body.parse()?)?;
    let moved = scene.ask(1, "/cookie", &format!("Cookie: {pair}\r\n"))?;
    assert_ne!(moved.body, first.body);
    let set = cookie(&moved).context("another cookie")?;
    assert_ne!(set.split_once(';').context("attributes")?.0, pair);
    for wrong in ["lobby=", "lobby=zz", "lobby=ffffffffffffffffff", "lobby=0000000000000000"] {
        let heard = scene.ask(1, "/cookie", &format!("Cookie: {wrong}\r\n"))?;
        assert_eq!((heard.status, cookie(&heard).is_some()), (200, true), "{wrong}");
    }
    Ok(())
}

#[test]
fn a_header_and_a_source_name_a_server_and_few_move() -> Result<()> {
    let mut scene = Scene::new()?;
    let of = |scene: &Scene, user: usize| -> Result<String> {
        Ok(scene.ask(1, "/header", &format!("X-User: user {user}\r\n"))?.body)
    };
    let before: Result<Vec<_>> = (0..60).map(|user| of(&scene, user)).collect();
    let before = before?;
    assert_eq!(before.iter().collect::<BTreeSet<_>>().len(), 5);
    let again: Result<Vec<_>> = (0..60).map(|user| of(&scene, user)).collect();
    assert_eq!(again?, before);
    let sources: Result<Vec<_>> = (1..60).map(|n| Ok(scene.ask(n, "/source", "")?.body)).collect();
    let sources = sources?;
    assert_eq!(sources.iter().collect::<BTreeSet<_>>().len(), 5);
    let again: Result<Vec<_>> =
        (1..60).map(|n| Ok(scene.ask(n, "/source", "X-User: other\r\n")?.body)).collect();
    assert_eq!(again?, sources);
    scene.without(2)?;
    for (user, server) in before.iter().enumerate() {
        let now = of(&scene, user)?;
        assert_eq!(now == *server, server != "2", "user {user} was with {server}, and is with {now}");
    }
    // Another desk, with the same servers, knows the same.
    let backends = scene.servers.iter().map(|server| backend(server.address)).collect();
    scene.desk = Desk::start(SERVICE, &[("web", backends)], &[])?;
    let again: Result<Vec<_>> = (0..60).map(|user| of(&scene, user)).collect();
    assert_eq!(again?, before);
    Ok(())
}
