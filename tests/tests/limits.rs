//! How often, and how many at once: what the desk lets through to servers, and what it says to the others.

use std::{
    net::SocketAddr,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::model::desk::Crowd;
use tests::{
    desk::{Deed, Desk, Recorder, Settings, answer, backend},
    requests::{Answer, Speaker},
};

/// The keys `one` and `two`, by the names anna and ben.
const KEYS: &str = "anna:7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed\n\
                    ben:3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3\n";

fn services(directory: &std::path::Path, calm: &str) -> String {
    let keys = directory.join("keys").display().to_string();
    let secret = directory.join("secret").display().to_string();
    format!(
        r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
{calm}
[[services.shop.routes]]
path = "/source"
pool = "web"
limits = {{ rate = "2/h", burst = 3 }}
[[services.shop.routes]]
path = "/all"
pool = "web"
limits = {{ rate = "4/h", by = "route" }}
[[services.shop.routes]]
path = "/near"
pool = "web"
allow = [ "127.2.0.9" ]
limits = {{ rate = "2/h", by = "route" }}
[[services.shop.routes]]
path = "/user"
pool = "web"
auth = {{ key = {{ keys = "{keys}" }} }}
limits = [ {{ rate = "3/h", by = "user" }}, {{ rate = "100/h" }} ]
[[services.shop.routes]]
path = "/two"
pool = "web"
auth = [ {{ jwt = {{ secret_file = "{secret}" }} }}, {{ key = {{ keys = "{keys}" }} }} ]
"#
    )
}

struct Scene {
    desk: Desk,
    recorder: Recorder,
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("keys"), KEYS)?;
        std::fs::write(directory.path().join("secret"), "a secret of more than 32 bytes, made by nobody")?;
        let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
        let services = services(directory.path(), "");
        let desk = Desk::start(&services, &[("web", vec![backend(recorder.address)])], &[])?;
        Ok(Self { desk, recorder, directory })
    }

    fn ask(&self, source: u8, path: &str, headers: &str) -> Result<Answer> {
        let mut speaker = Speaker::from_source([127, 2, 0, source].into(), self.desk.addresses[0])?;
        speaker.say(format!("GET {path} HTTP/1.1\r\nHost: a\r\n{headers}\r\n").as_bytes())?;
        speaker.hear()?.context("an answer")
    }

    /// The statuses of so many requests, one after the other.
    fn statuses(&self, number: usize, source: u8, path: &str, headers: &str) -> Result<Vec<u16>> {
        (0..number).map(|_| Ok(self.ask(source, path, headers)?.status)).collect()
    }
}

#[test]
fn who_may_not_come_in_takes_nothing_from_those_who_may() -> Result<()> {
    let scene = Scene::new()?;
    assert_eq!(scene.statuses(6, 1, "/near", "")?, [403; 6]);
    assert_eq!(scene.statuses(3, 9, "/near", "")?, [200, 200, 429]);
    Ok(())
}

#[test]
fn who_comes_too_often_is_told_when_to_come_back() -> Result<()> {
    let mut scene = Scene::new()?;
    assert_eq!(scene.statuses(5, 1, "/source/x", "")?, [200, 200, 200, 429, 429]);
    assert_eq!(scene.statuses(1, 2, "/source", "")?, [200], "another source");
    let refused = scene.ask(1, "/source", "Accept: application/json\r\n")?;
    let page: serde_json::Value = serde_json::from_str(&refused.body)?;
    let wait = page["retry_after_seconds"].as_u64().context("when")?;
    assert!((1700..=1800).contains(&wait), "one comes back each half hour: {page}");
    let header = refused.header("retry-after");
    assert_eq!(header.context("a header")?, wait.to_string(), "{}", refused.head);
    let grpc = scene.ask(1, "/source", "Content-Type: application/grpc\r\n")?;
    assert!(grpc.head.contains("grpc-status: 8"), "{}", grpc.head);
    assert_eq!(scene.statuses(4, 3, "/all", "")?, [200; 4]);
    assert_eq!(scene.statuses(1, 4, "/all", "")?, [429], "all together");
    // A document that changes something else forgets nothing; one that changes a limit begins it anew.
    let pool = [("web", vec![backend(scene.recorder.address)])];
    let calm = services(scene.directory.path(), "timeouts = { header = \"9s\" }");
    scene.desk.serve(&calm, &pool, &[])?;
    assert_eq!(scene.statuses(1, 1, "/source", "")?, [429]);
    scene.desk.serve(&calm.replace("2/h\", burst = 3", "9/h\""), &pool, &[])?;
    assert_eq!(scene.statuses(10, 1, "/source", "")?, [vec![200; 9], vec![429]].concat());
    assert_eq!(scene.statuses(1, 4, "/all", "")?, [429]);
    let report = scene.desk.report(|report| report.troubles.contains_key("too_often"))?;
    let denied = |path: &str| {
        let of = report.denied.iter().find(|denied| denied.route == path);
        of.map(|denied| (denied.status, denied.reason.as_str(), denied.count))
    };
    assert_eq!(denied("*/source/*"), Some((429, "too_often", 6)), "{:?}", report.denied);
    assert_eq!(scene.recorder.got().len(), 3 + 1 + 4 + 9, "no refused request reaches a server");
    Ok(())
}

#[test]
fn who_is_known_counts_wherever_they_call_from() -> Result<()> {
    let scene = Scene::new()?;
    let (anna, ben) = ("X-Api-Key: one\r\n", "X-Api-Key: two\r\n");
    assert_eq!(scene.statuses(2, 1, "/user", anna)?, [200; 2]);
    assert_eq!(scene.statuses(2, 2, "/user", anna)?, [200, 429]);
    assert_eq!(scene.statuses(3, 1, "/user", ben)?, [200; 3]);
    assert_eq!(scene.statuses(1, 1, "/user", ben)?, [429]);
    assert_eq!(scene.statuses(1, 1, "/user", "")?, [401], "who is not known has none to lose");
    Ok(())
}

/// Who is wrong ten times within a minute is not listened to from there for a while, right or wrong.
#[test]
fn guessing_is_slowed() -> Result<()> {
    let scene = Scene::new()?;
    assert_eq!(scene.statuses(11, 1, "/user", "X-Api-Key: guess\r\n")?, [vec![401; 10], vec![429]].concat());
    let right = scene.ask(1, "/user", "X-Api-Key: one\r\n")?;
    assert_eq!(right.status, 429, "{}", right.head);
    let wait = right.header("retry-after").context("when")?;
    assert!((1..=6).contains(&wait.parse::<u64>()?), "{wait}");
    assert_eq!(scene.statuses(1, 1, "/user", "")?, [401], "nothing was said that could be wrong");
    assert_eq!(scene.statuses(1, 2, "/user", "X-Api-Key: one\r\n")?, [200], "another source");
    let report = scene.desk.report(|report| report.troubles.contains_key("slowed"))?;
    assert_eq!((report.troubles["slowed"], report.troubles["wrong_credentials"]), (2, 10));
    // And it ends: one more each six seconds.
    std::thread::sleep(Duration::from_secs(wait.parse::<u64>()?));
    assert_eq!(scene.statuses(1, 1, "/user", "X-Api-Key: one\r\n")?, [200]);
    Ok(())
}

/// Who is known by one thing does not get to guess another.
#[test]
fn guessing_is_slowed_for_who_is_known_too() -> Result<()> {
    let scene = Scene::new()?;
    let both = "Authorization: Bearer a.b.c\r\nX-Api-Key: one\r\n";
    assert_eq!(scene.statuses(11, 1, "/two", both)?, [vec![200; 10], vec![429]].concat());
    assert_eq!(scene.statuses(12, 2, "/two", "X-Api-Key: one\r\n")?, [200; 12], "nothing of it is wrong");
    Ok(())
}

/// Who does not take their answers loses them, and their places with a server that has only so many.
#[test]
fn who_does_not_read_does_not_hold_a_server() -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let service = "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n\
                   timeouts = { body = \"1s\" }\n\
                   [[services.shop.routes]]\npath = \"/x\"\nrespond = 404\n";
    let crowd = Crowd { limit: 3, queue: 0, wait: Duration::from_millis(1) };
    let settings = Settings { crowd: Some(crowd), ..Settings::default() };
    let desk = Desk::with(settings, service, &[("web", vec![backend(recorder.address)])], &[])?;
    let ask = || -> Result<u16> {
        let mut speaker = Speaker::to(desk.addresses[0])?;
        speaker.say(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
        Ok(speaker.hear()?.context("an answer")?.status)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let held = runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(desk.addresses[0]).await?;
        // Nobody can send it a byte of a body.
        let (client, connection) =
            h2::client::Builder::new().initial_window_size(0).handshake::<_, bytes::Bytes>(stream).await?;
        tokio::spawn(connection);
        let mut answers = Vec::new();
        for _ in 0..3 {
            let mut client = client.clone().ready().await?;
            let request = http::Request::get("http://shop.example/").body(())?;
            let (answer, _) = client.send_request(request, true)?;
            answers.push(answer.await?);
        }
        anyhow::Ok((client, answers))
    })?;
    assert_eq!(ask()?, 503, "all places are taken");
    let began = std::time::Instant::now();
    while ask()? != 200 {
        ensure!(began.elapsed() < Duration::from_secs(20), "the places stay taken");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Two of the three places were free; the third is found free as well.
    assert_eq!((0..20).map(|_| ask()).collect::<Result<Vec<_>>>()?, [200; 20]);
    drop(held);
    Ok(())
}

/// A server that answers when it is let.
#[derive(Default)]
struct Gate {
    state: Mutex<(usize, usize, usize)>,
    moved: Condvar,
}

impl Gate {
    /// Waits to be let; keeps account of how many wait at once at most.
    fn wait(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        state.1 = state.1.max(state.0);
        self.moved.notify_all();
        while state.2 == 0 {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.2 -= 1;
        state.0 -= 1;
    }

    fn let_go(&self, number: usize) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).2 += number;
        self.moved.notify_all();
    }

    fn until_waiting(&self, number: usize) -> Result<()> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = self.moved.wait_timeout_while(state, Duration::from_secs(20), |state| state.0 < number);
        let (state, _) = enough.map_err(|_| anyhow::anyhow!("poisoned"))?;
        ensure!(state.0 >= number, "{} of {number}", state.0);
        Ok(())
    }
}

/// A service whose requests all go to one pool.
const SIMPLE: &str = "[services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n\
                      [[services.shop.routes]]\npath = \"/x\"\nrespond = 404\n";

/// A server that answers when its gate lets a request go.
fn held(gate: &Arc<Gate>, words: &'static str) -> Result<Recorder> {
    let gate = Arc::clone(gate);
    Recorder::start(move |_| {
        gate.wait();
        Deed::Say(answer(words))
    })
}

/// A client that has asked, and has not read yet.
fn asking(address: SocketAddr) -> Result<Speaker> {
    let mut speaker = Speaker::to(address)?;
    speaker.say(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
    Ok(speaker)
}

/// A server gets only so many requests at once; some wait, and beyond that they are told so at once.
#[test]
fn a_server_has_only_so_many_requests_and_some_wait() -> Result<()> {
    let gate = Arc::new(Gate::default());
    let recorder = held(&gate, "ok")?;
    let crowd = Crowd { limit: 4, queue: 3, wait: Duration::from_secs(20) };
    let settings = Settings { crowd: Some(crowd), ..Settings::default() };
    let desk = Desk::with(settings, SIMPLE, &[("web", vec![backend(recorder.address)])], &[])?;
    let ask = || asking(desk.addresses[0]);
    let mut first = (0..4).map(|_| ask()).collect::<Result<Vec<_>>>()?;
    gate.until_waiting(4)?;
    // Of eight more three wait, and the others are refused though nobody is let go yet.
    let more = (0..8).map(|_| ask()).collect::<Result<Vec<_>>>()?;
    let (sender, answers) = std::sync::mpsc::channel();
    for mut speaker in more {
        let sender = sender.clone();
        std::thread::spawn(move || sender.send(speaker.hear()));
    }
    let mut refused = 0;
    for _ in 0..5 {
        let answer = answers.recv_timeout(Duration::from_secs(20))??.context("an answer")?;
        assert_eq!(answer.status, 503);
        assert!(answer.body.contains("Too many are before you"), "{}", answer.body);
        refused += 1;
    }
    gate.let_go(7);
    for _ in 0..3 {
        assert_eq!(answers.recv_timeout(Duration::from_secs(20))??.context("an answer")?.status, 200);
    }
    for speaker in &mut first {
        assert_eq!(speaker.hear()?.context("an answer")?.status, 200);
    }
    let most = gate.state.lock().unwrap_or_else(PoisonError::into_inner).1;
    assert_eq!((refused, most), (5, 4), "requests at once at the server");
    let report = desk.report(|report| report.troubles.contains_key("full"))?;
    assert_eq!(report.troubles["full"], 5);
    Ok(())
}

/// Who waits for room has it with a server that comes meanwhile; and who waits for a pool that is closed hears of it.
#[test]
fn who_waits_sees_what_becomes_of_the_pool() -> Result<()> {
    let gate = Arc::new(Gate::default());
    let busy = held(&gate, "busy")?;
    let idle = Recorder::start(|_| Deed::Say(answer("idle")))?;
    let crowd = Crowd { limit: 1, queue: 5, wait: Duration::from_secs(60) };
    let settings = Settings { crowd: Some(crowd), ..Settings::default() };
    let mut desk = Desk::with(settings, SIMPLE, &[("web", vec![backend(busy.address)])], &[])?;
    let address = desk.addresses[0];
    let ask = || asking(address);
    let mut first = ask()?;
    gate.until_waiting(1)?;
    let mut second = ask()?;
    // It waits: there is nothing to be seen of that but that no answer comes.
    std::thread::sleep(Duration::from_millis(200));
    desk.serve(SIMPLE, &[("web", vec![backend(busy.address), backend(idle.address)])], &[])?;
    assert_eq!(second.hear()?.context("an answer")?.body, "idle");
    desk.serve(SIMPLE, &[("web", vec![backend(busy.address)])], &[])?;
    let mut third = ask()?;
    std::thread::sleep(Duration::from_millis(200));
    desk.serve(SIMPLE, &[("web", Vec::new())], &[])?;
    assert_eq!(third.hear()?.context("an answer")?.status, 503);
    gate.let_go(1);
    assert_eq!(first.hear()?.context("an answer")?.body, "busy");
    Ok(())
}

/// A server that speaks with one at a time would have the second wait for as long as the connection of the first is kept.
#[test]
fn of_a_server_with_few_places_none_rests_while_another_waits() -> Result<()> {
    let server = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let crowd = Crowd { limit: 1, queue: 5, wait: Duration::from_secs(60) };
    let settings = Settings { crowd: Some(crowd), ..Settings::default() };
    let desk = Desk::with(settings, SIMPLE, &[("web", vec![backend(server.address)])], &[])?;
    // Each is of the worker that has fewest: there are as many for each.
    let mut speakers = (0..8).map(|_| Speaker::to(desk.addresses[0])).collect::<Result<Vec<_>>>()?;
    for speaker in &mut speakers {
        speaker.say(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
        assert_eq!(speaker.hear()?.context("an answer")?.status, 200);
    }
    let by: Vec<usize> = server.got().iter().map(|got| got.connection).collect();
    assert_eq!(by, [0; 8]);
    Ok(())
}
