//! Another build takes over: its program is put in the place of the one before by one system call, under traffic,
//! over the same tables; its desk takes requests over; a build with tables of another layout touches nothing; and a
//! daemon that dies in the middle of a change is followed by one that comes to its end.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{PoisonError, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_common::abi::LAYOUT_VERSION;
use nix::sys::signal::Signal;
use tests::{
    crowd::{Crowd, Fate, all_talk},
    document::Web,
    download::{self, Download},
    echo::{Echo, PORT},
    requests,
    stage::{Stage, lb, run},
};
use xtask::lab::{self, LabOptions};

/// Connections, half of them of each mode.
const CONNECTIONS: usize = 400;
/// Backends of each pool.
const BACKENDS: usize = 2;
/// Starts of a daemon that takes over, one way and the other.
const TIMES: usize = 4;

/// Servers on all backends, a service of each mode, and connections that talk all the time.
struct Scene {
    crowds: Vec<Crowd>,
    _echoes: Vec<Echo>,
    stage: Stage,
}

/// The first so many backends in a pool for each mode, and a service of each with `lines`; then `rest`.
fn document(stage: &Stage, backends: usize, lines: &str, rest: &str) -> String {
    let mut document = format!("interfaces = {:?}\n", stage.lab.interfaces());
    for (vip, port, forward) in [("203.0.113.10", "", "dsr"), ("203.0.113.11", ":80", "nat")] {
        let list = (0..backends).map(|n| format!("{{ address = \"{}{port}\" }}", stage.lab.backend_v4(n)));
        let backends = list.collect::<Vec<_>>().join(", ");
        document += &format!(
            "[pools.{forward}]\nbackends = [{backends}]\n[services.{forward}]\n\
             listen = \"{vip}:{PORT}/tcp\"\npool = \"{forward}\"\nforward = \"{forward}\"\n{lines}"
        );
    }
    document + rest
}

impl Scene {
    fn new() -> Result<Self> {
        Self::with(0, "")
    }

    /// So many more backends, which are in no document yet, and services with these lines.
    fn with(more: usize, lines: &str) -> Result<Self> {
        let options = LabOptions { backends: BACKENDS + more, ..LabOptions::default() };
        let mut stage = Stage::without_daemon(options, "")?;
        let mut echoes = Vec::new();
        for (number, place) in stage.lab.backends.iter().enumerate() {
            stage.hold_vips(number)?;
            echoes.push(Echo::start(place, number as u8)?);
        }
        let document = document(&stage, BACKENDS, lines, "");
        stage.write(&document)?;
        stage.start()?;
        let fate = Fate::new(Duration::MAX);
        let from = stage.lab.client_v4().into();
        let vips = [[203, 0, 113, 10], [203, 0, 113, 11]].map(|vip| SocketAddr::from((vip, PORT)));
        let client = stage.lab.client.clone();
        let mut crowds: Vec<_> =
            vips.iter().map(|&vip| Crowd::start(&client, from, vip, CONNECTIONS / 2, &fate)).collect();
        crowds.iter_mut().try_for_each(Crowd::gathers)?;
        Ok(Self { crowds, _echoes: echoes, stage })
    }

    /// Everybody still talks, with whom they did.
    fn all_talk(&mut self) -> Result<()> {
        all_talk(&mut self.crowds, 2)?;
        for crowd in &self.crowds {
            let broken = crowd.fared().broken.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(broken.is_empty(), "{broken:#?}\n{}", self.stage.diagnosis());
            assert_eq!(crowd.fared().talking.load(SeqCst), CONNECTIONS / 2);
        }
        Ok(())
    }

    /// Numbers of the program on each interface, as the kernel gives them out, and of its link.
    fn programs(&self) -> Result<Vec<(u64, u64)>> {
        self.stage
            .lab
            .interfaces()
            .iter()
            .map(|interface| {
                let arguments = ["-details", "-json", "link", "show", interface];
                let output = run(&self.stage.lab.balancer, Path::new("ip"), &arguments)?;
                let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
                let program = json[0]["xdp"]["prog"]["id"].as_u64();
                let pin = format!("/sys/fs/bpf/lobby/layout-{LAYOUT_VERSION}/links/{interface}");
                let link = self.stage.lab.balancer.run(|| -> Result<u64> {
                    let link = aya::programs::links::PinnedLink::from_pin(pin)?;
                    Ok(aya::programs::links::FdLink::from(link).info()?.id().into())
                })??;
                Ok((program.with_context(|| format!("no program on {interface}: {json}"))?, link))
            })
            .collect()
    }

    /// The document changes under a daemon that dies so many points later, if there are so many; then another
    /// starts. Says whether the first died.
    fn dies_in(&mut self, points: u64, document: &str) -> Result<bool> {
        let died = self.stage.dies_in(points, document)?;
        self.all_talk()?;
        self.stage.start()?;
        ensure!(self.stage.nothing_to_do()?, "after {points}: {}", self.stage.diagnosis());
        self.all_talk()?;
        Ok(died)
    }
}

/// A packet that met no program would reach the balancer's own stack, which has the address and would answer with a
/// reset: so whoever talks still has lost nothing.
#[test]
fn a_program_is_replaced_by_link_update_under_traffic() -> Result<()> {
    if !lab::possible("a_program_is_replaced_by_link_update_under_traffic") {
        return Ok(());
    }
    let mut scene = Scene::new()?;
    scene.all_talk()?;
    for time in 0..TIMES {
        let (before, forwarded) = (scene.programs()?, scene.stage.packets("to_backend")?);
        let mut daemon = scene.stage.daemon.take().context("a daemon")?;
        if time % 2 == 0 {
            daemon.kill()?;
        } else {
            daemon.signal(Signal::SIGTERM)?;
            daemon.wait()?;
        }
        scene.stage.start()?;
        scene.all_talk()?;
        for ((program_before, link_before), (program, link)) in before.iter().zip(scene.programs()?) {
            assert_ne!(*program_before, program, "the program is the new one's");
            assert_eq!(*link_before, link, "and its link the old one's");
        }
        assert!(
            scene.stage.packets("to_backend")? > forwarded,
            "it goes on counting where the other has ended"
        );
    }
    scene.stage.checksums_were_right()
}

#[test]
fn a_build_with_another_layout_touches_nothing() -> Result<()> {
    if !lab::possible("a_build_with_another_layout_touches_nothing") {
        return Ok(());
    }
    let mut scene = Scene::new()?;
    scene.stage.daemon.take().context("a daemon")?.kill()?;
    let programs = scene.programs()?;
    let pinned = |version: u32| PathBuf::from(format!("/sys/fs/bpf/lobby/layout-{version}"));
    let (ours, other) = (pinned(LAYOUT_VERSION), pinned(LAYOUT_VERSION + 1));
    // What a build with another layout would find is what this one finds under another number.
    scene.stage.lab.balancer.run(|| fs::rename(&ours, &other))??;
    let traces = scene.stage.traces()?;
    let refused = scene.stage.start().expect_err("it starts over another's tables").to_string();
    scene.stage.daemon = None;
    assert!(refused.contains("another layout") && refused.contains("nothing was touched"), "{refused}");
    assert!(refused.contains(&format!("layout-{}", LAYOUT_VERSION + 1)), "{refused}");
    // But for the file by which daemons see one another, which the dead one has left.
    let changed = scene.stage.changed_since(&traces)?;
    assert!(changed.iter().all(|line| line == "gone: /run/lobby/lock"), "{changed:?}");
    scene.all_talk()?;
    // The build that made them goes on with them.
    scene.stage.lab.balancer.run(|| fs::rename(&other, &ours))??;
    assert_eq!(scene.programs()?, programs);
    scene.stage.start()?;
    scene.all_talk()
}

/// A daemon that runs on one document is killed while it turns to another, between two changes of the tables, sooner
/// and later; the next one brings them to the document's state, and everybody talks all the time with whom they did.
#[test]
fn a_daemon_that_dies_in_a_change_is_followed_by_one_that_ends_it() -> Result<()> {
    if !lab::possible("a_daemon_that_dies_in_a_change_is_followed_by_one_that_ends_it") {
        return Ok(());
    }
    let mut scene = Scene::with(1, "ring_size = 31\n")?;
    // A backend, rules and a service more; then less.
    let forth = document(
        &scene.stage,
        BACKENDS + 1,
        "ring_size = 31\nallow = [\"10.1.0.0/16\", \"192.0.2.0/24\"]\n",
        "[services.more]\nlisten = \"203.0.113.12:80/tcp\"\npool = \"nat\"\n",
    );
    let back = document(&scene.stage, BACKENDS, "ring_size = 31\n", "");
    let mut deaths = [0, 0];
    // Closer together where the change begins; a change has hundreds of points.
    for points in std::iter::successors(Some(0), |points| Some(points + points / 3 + 1)) {
        let before = deaths;
        for (change, deaths) in [&forth, &back].into_iter().zip(&mut deaths) {
            *deaths += u32::from(scene.dies_in(points, change)?);
        }
        if deaths == before {
            break;
        }
    }
    println!("{} deaths on the way forth, {} back", deaths[0], deaths[1]);
    assert!(deaths.iter().all(|&deaths| deaths > 10), "{deaths:?}: not in the middle of anything");
    scene.stage.checksums_were_right()
}

/// For how long downloads go on beside the other build: a desk that ended at once would be gone after a second.
const DRAINED_FOR: Duration = Duration::from_secs(3);
/// What is read of a download at a time.
const STEP: usize = 128 << 10;
/// All of it: far more than the kernel keeps for who does not read, and would still hand over when its sender is gone.
const FILE: usize = 48 << 20;

/// Servers behind a desk whose daemon is not started yet.
fn behind_a_desk() -> Result<Stage> {
    let options = LabOptions::default();
    let document =
        Web { service: "routes = [ { path = \"/admin\", respond = 403 } ]", ..Web::of(options) }.text();
    let mut stage = Stage::without_daemon(options, &document)?;
    (0..2).try_for_each(|backend| stage.nginx(backend))?;
    Ok(stage)
}

/// A program is put in the place of the one that runs, twice: the desk is the new one's, and no request is refused or cut
/// meanwhile; what the desk before has under way it brings to its end.
#[test]
fn the_desk_of_another_build_takes_over() -> Result<()> {
    if !lab::possible("the_desk_of_another_build_takes_over") {
        return Ok(());
    }
    let mut stage = behind_a_desk()?;
    let content = download::write(&stage, "file", FILE)?;
    // Each build differs by what stands behind its end, where nothing reads it.
    let program = stage.directory().join("lb");
    let install = |number: u8| -> Result<u64> {
        let draft = program.with_extension("new");
        fs::copy(lb(), &draft)?;
        fs::File::options().append(true).open(&draft)?.write_all(&vec![number; 1000])?;
        fs::rename(&draft, &program)?;
        Ok(fs::metadata(&program)?.ino())
    };
    let runs = |pid: u32| -> Result<u64> { Ok(fs::metadata(format!("/proc/{pid}/exe"))?.ino()) };
    let mut build = install(0)?;
    stage.start_build(&program)?;
    let mut desk = stage.desk(None)?;
    assert_eq!(runs(desk)?, build);
    let mut ended = Vec::new();
    let crowds =
        Stage::VIPS.map(|vip| requests::Crowd::start(&stage.lab.client, SocketAddr::new(vip, 80), "/", 3));
    for (number, signal) in [(1, Signal::SIGKILL), (2, Signal::SIGTERM)] {
        let mut downloads: Vec<_> = Stage::VIPS
            .iter()
            .map(|&vip| Download::start(&stage, vip, "file", &content))
            .collect::<Result<_>>()?;
        let other = install(number)?;
        assert_ne!(other, build);
        let mut daemon = stage.daemon.take().context("a daemon")?;
        daemon.signal(signal)?;
        daemon.wait()?;
        crowds.iter().try_for_each(|crowd| crowd.wait_for(50))?;
        stage.start_build(&program)?;
        // Both are there as long as the one before has something under way.
        let mut next = None;
        stage.until("the other build's desk", |stage| {
            next = stage.desks()?.into_iter().find(|&pid| pid != desk);
            Ok(next.is_some())
        })?;
        let next = next.context("a desk")?;
        assert_eq!((runs(next)?, runs(desk)?), (other, build), "which programs they run");
        let began = Instant::now();
        while began.elapsed() < DRAINED_FOR {
            crowds.iter().try_for_each(|crowd| crowd.wait_for(20))?;
            for download in &mut downloads {
                download.allow(STEP);
                download.arrives(&stage)?;
            }
        }
        assert!(stage.desks()?.contains(&desk), "who has something under way has ended:\n{}", stage.log());
        downloads.into_iter().try_for_each(|download| download.finish(FILE))?;
        assert_eq!(stage.desk(Some(desk))?, next);
        crowds.iter().try_for_each(|crowd| crowd.wait_for(100))?;
        // Kept: desks would be killed with it.
        ended.push(daemon);
        (desk, build) = (next, other);
    }
    for crowd in crowds {
        let account = crowd.finish()?;
        assert_eq!(account.bad, Vec::<String>::new(), "{}", stage.log());
        println!("{} requests", account.good);
    }
    stage.checksums_were_right()
}

/// How often daemons are killed one after the other, before one may live.
const ROUNDS: u32 = 8;
/// What they are killed after, and how long after it at most.
const MOMENTS: [(Sign, Duration); 5] = [
    (Sign::Start, Duration::from_millis(200)),
    (Sign::Process, Duration::from_millis(50)),
    (Sign::Serves, Duration::from_millis(5)),
    (Sign::Process, Duration::from_millis(100)),
    (Sign::Serves, Duration::ZERO),
];

/// What is seen of a daemon that takes over.
#[derive(Clone, Copy)]
enum Sign {
    /// It is there.
    Start,
    /// Its desk's process is.
    Process,
    /// It has been told that its desk serves.
    Serves,
}

/// A daemon that takes over may be killed at any moment: somebody serves, the desk of before or the new one, and in the end one
/// desk is left, since each can be found.
#[test]
fn a_daemon_that_dies_in_the_hand_over_leaves_somebody_who_serves() -> Result<()> {
    if !lab::possible("a_daemon_that_dies_in_the_hand_over_leaves_somebody_who_serves") {
        return Ok(());
    }
    let mut stage = behind_a_desk()?;
    stage.start()?;
    let mut desk = stage.desk(None)?;
    let crowds =
        Stage::VIPS.map(|vip| requests::Crowd::start(&stage.lab.client, SocketAddr::new(vip, 80), "/", 2));
    // Kept: desks would be killed with them.
    let mut dead = vec![stage.daemon.take().context("a daemon")?];
    dead[0].kill()?;
    let serving = |stage: &Stage| stage.log().matches("the desk serves").count();
    let mut told = 0;
    for round in 0..ROUNDS {
        for (sign, latest) in MOMENTS {
            let before = serving(&stage);
            stage.start_only()?;
            let begun = Instant::now();
            // Of its own: those of before may end meanwhile.
            let known = stage.desks()?;
            let mut seen = matches!(sign, Sign::Start);
            while !seen {
                ensure!(begun.elapsed() < Duration::from_secs(20), "no desk:\n{}", stage.log());
                seen = match sign {
                    Sign::Process => stage.desks()?.iter().any(|pid| !known.contains(pid)),
                    _ => serving(&stage) > before,
                };
            }
            std::thread::sleep(latest * round / ROUNDS);
            let mut daemon = stage.daemon.take().context("a daemon")?;
            daemon.kill()?;
            dead.push(daemon);
            told += serving(&stage) - before;
            crowds.iter().try_for_each(|crowd| crowd.wait_for(30))?;
        }
        stage.start()?;
        desk = stage.desk(Some(desk))?;
        let mut daemon = stage.daemon.take().context("a daemon")?;
        daemon.kill()?;
        dead.push(daemon);
    }
    println!("{} deaths, {told} of them after the new desk served", dead.len());
    for crowd in crowds {
        let account = crowd.finish()?;
        assert_eq!(account.bad, Vec::<String>::new(), "{}", stage.log());
        println!("{} requests", account.good);
    }
    Ok(())
}

/// Routes of a desk's document: more than the kernel keeps for a desk that does not listen.
const ROUTES: usize = 1000;

/// A service that answers `/answer` so, and has many routes more.
fn much(status: u16) -> String {
    let more: String =
        (0..ROUTES).map(|n| format!("  {{ path = \"/more/{n}\", respond = 403 }},\n")).collect();
    let routes = format!("routes = [\n  {{ path = \"/answer\", respond = {status} }},\n{more}]");
    Web { service: &routes, ..Web::of(LabOptions::default()) }.text()
}

/// The status of an answer to `/answer`.
fn status(stage: &Stage) -> Result<String> {
    let url = format!("http://{}/answer", Stage::VIPS[0]);
    let output =
        stage.try_curl(&["-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20", &url])?;
    Ok(String::from_utf8(output.stdout)?)
}

/// The daemon is told to end while its desk does not listen, and later while it is to be started again: each time there is a
/// desk afterwards, which serves the last document.
#[test]
fn a_daemon_that_is_told_to_end_leaves_a_desk_that_knows_its_last_orders() -> Result<()> {
    if !lab::possible("a_daemon_that_is_told_to_end_leaves_a_desk_that_knows_its_last_orders") {
        return Ok(());
    }
    let mut stage = Stage::without_daemon(LabOptions::default(), &much(403))?;
    stage.start()?;
    let desk = stage.desk(None)?;
    stage.until("the first answer", |stage| Ok(status(stage)? == "403"))?;
    let ends = |stage: &mut Stage, meanwhile: &dyn Fn() -> Result<()>| -> Result<_> {
        let mut daemon = stage.daemon.take().context("a daemon")?;
        daemon.signal(Signal::SIGTERM)?;
        meanwhile()?;
        ensure!(daemon.wait()?.success(), "{}", stage.log());
        Ok(daemon)
    };
    let signal = |desk: u32, signal| -> Result<()> {
        Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(desk.try_into()?), signal)?)
    };

    signal(desk, Signal::SIGSTOP)?;
    stage.write(&much(410))?;
    stage.until("the new document", |stage| {
        Ok(stage.json(&["desk", "status"])?["up_to_date"] == false && stage.nothing_to_do()?)
    })?;
    // Kept: desks would be killed with it.
    let _one = ends(&mut stage, &|| {
        std::thread::sleep(Duration::from_millis(500));
        signal(desk, Signal::SIGCONT)
    })?;
    // Its words are with the kernel; they are still to be read.
    stage.until("the last document", |stage| Ok(status(stage)? == "410"))?;

    stage.write(&much(404))?;
    stage.start()?;
    stage.until("the new document", |stage| Ok(status(stage)? == "404"))?;
    let other = stage.directory().join("other.toml");
    fs::write(&other, much(410))?;
    let plan = stage.lb(&["plan", other.to_str().context("a path")?])?;
    let line =
        |service: &str| format!("desk  change route */answer/* of {service}: respond 404, now respond 410\n");
    let nothing = "nothing would change in the tables\n";
    assert_eq!(plan, format!("{}{}\n{nothing}", line("shop"), line("shop6")));

    let mut desk = stage.desk(Some(desk))?;
    // Each time it is longer until it is started again.
    for deaths in 1..=6 {
        signal(desk, Signal::SIGKILL)?;
        stage.until("its end", |stage| Ok(stage.log().matches("it is started again").count() == deaths))?;
        if deaths < 6 {
            desk = stage.desk(Some(desk))?;
        }
    }
    ensure!(stage.desks()?.is_empty(), "it has been started again already");
    let _two = ends(&mut stage, &|| Ok(()))?;
    stage.until("a desk", |stage| Ok(status(stage)? == "404"))?;
    Ok(())
}
