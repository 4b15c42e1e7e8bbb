//! Another build takes over: its program is put in the place of the one before by one system call, under traffic,
//! over the same tables; and a build with tables of another layout touches nothing.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{PoisonError, atomic::Ordering::SeqCst},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_common::abi::LAYOUT_VERSION;
use tests::{
    crowd::{Crowd, Fate, all_talk},
    echo::{Echo, PORT},
    stage::{Stage, run},
};
use xtask::lab::{self, LabOptions};

/// Connections, half of them of each mode.
const CONNECTIONS: usize = 400;
/// Starts of a daemon that takes over, one way and the other.
const TIMES: usize = 4;

/// Servers on all backends, a service of each mode, and connections that talk all the time.
struct Scene {
    crowds: Vec<Crowd>,
    _echoes: Vec<Echo>,
    stage: Stage,
}

impl Scene {
    fn new() -> Result<Self> {
        let mut stage = Stage::without_daemon(LabOptions::default(), "")?;
        let mut echoes = Vec::new();
        for (number, place) in stage.lab.backends.iter().enumerate() {
            stage.hold_vips(number)?;
            echoes.push(Echo::start(place, number as u8)?);
        }
        let [direct, translated] = [("", "dsr"), (":80", "nat")].map(|(port, forward)| {
            let list = (0..2).map(|n| format!("{{ address = \"{}{port}\" }}", stage.lab.backend_v4(n)));
            (list.collect::<Vec<_>>().join(", "), forward)
        });
        let mut document = format!("interfaces = {:?}\n", stage.lab.interfaces());
        for (vip, (backends, forward)) in ["203.0.113.10", "203.0.113.11"].iter().zip([direct, translated]) {
            document += &format!(
                "[pools.{forward}]\nbackends = [{backends}]\n\
                 [services.{forward}]\nlisten = \"{vip}:{PORT}/tcp\"\npool = \"{forward}\"\nforward = \"{forward}\"\n"
            );
        }
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

    /// Packets that went to backends, since the tables were made.
    fn forwarded(&self) -> Result<u64> {
        let counters = self.stage.json(&["counters"])?;
        let mut verdicts = counters["verdicts"].as_array().context("counters")?.iter();
        let it = verdicts.find(|verdict| verdict["name"] == "to_backend").context("a counter")?;
        it["packets"].as_u64().context("a number")
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
        let (before, forwarded) = (scene.programs()?, scene.forwarded()?);
        let mut daemon = scene.stage.daemon.take().context("a daemon")?;
        if time % 2 == 0 {
            daemon.kill()?;
        } else {
            daemon.signal(nix::sys::signal::Signal::SIGTERM)?;
            daemon.wait()?;
        }
        scene.stage.start()?;
        scene.all_talk()?;
        for ((program_before, link_before), (program, link)) in before.iter().zip(scene.programs()?) {
            assert_ne!(*program_before, program, "the program is the new one's");
            assert_eq!(*link_before, link, "and its link the old one's");
        }
        assert!(scene.forwarded()? > forwarded, "it goes on counting where the other has ended");
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
    scene.stage.lab.balancer.run(|| std::fs::rename(&ours, &other))??;
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
    scene.stage.lab.balancer.run(|| std::fs::rename(&other, &ours))??;
    assert_eq!(scene.programs()?, programs);
    scene.stage.start()?;
    scene.all_talk()
}
