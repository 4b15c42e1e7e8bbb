//! The real thing: tens of thousands of TCP connections that stay where they are through everything that may
//! happen to their servers and to the daemon, while a flood of SYNs goes on.
//!
//! Six servers have connections from the beginning; two more come and go, with connections of their own. `LOBBY_SEED`
//! plays a run again, as far as it can be.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV4},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use lb_common::abi::{LAYOUT_VERSION, RECORD_WAYS, Record, name};
use tests::{
    crowd::{Crowd, Fate, all_talk},
    echo::{Echo, HEALTH_PORT, PORT},
    flood,
    random::Random,
    stage::Stage,
};
use xtask::lab::{self, LabOptions, VIP, link};

/// Idle time-out of established connections, so short that slots move, fade and settle within the test.
const QUIET: Duration = Duration::from_secs(15);
/// A connection that was silent for longer is promised nothing: a record is marked as seen once a second, and
/// the clock counts in steps.
const PATIENCE: Duration = Duration::from_secs(13);
/// Changes of the document, and of the servers' health.
const CHANGES: usize = 50;
/// Servers with connections from the beginning.
const RESIDENTS: usize = 6;
/// And those that come and go.
const GUESTS: usize = 2;
/// Connections that come while changes go on, at most at a time.
const NEWCOMERS: usize = 600;

/// What may happen to a server.
#[derive(Clone, Debug)]
struct Member {
    number: usize,
    present: bool,
    weight: u64,
    drains: bool,
    fit: bool,
}

impl Member {
    /// It is to get new connections.
    fn works(&self) -> bool {
        self.present && self.fit && !self.drains
    }

    fn is_guest(&self) -> bool {
        self.number >= RESIDENTS
    }

    fn name(&self) -> u8 {
        self.number as u8
    }
}

/// Servers, clients, and a daemon between them.
struct Scene {
    /// The last of them are the newcomers. Gone before what they talk through.
    crowds: Vec<Crowd>,
    echoes: Vec<Echo>,
    stage: Stage,
    forward: &'static str,
    fate: Arc<Fate>,
    members: Vec<Member>,
    random: Random,
    begun: Instant,
}

impl Scene {
    /// So many connections, a quarter of them over IPv6.
    fn new(forward: &'static str, connections: usize) -> Result<Self> {
        let seed = Random::seed(u64::from(std::process::id()));
        println!("LOBBY_SEED={seed}");
        let options = LabOptions { backends: RESIDENTS + GUESTS, ..LabOptions::default() };
        let stage = Stage::without_daemon(options, "")?;
        let mut echoes = Vec::new();
        for (number, place) in stage.lab.backends.iter().enumerate() {
            if forward == "dsr" {
                stage.hold_vips(number)?;
            }
            echoes.push(Echo::start(place, number as u8)?);
        }
        let member =
            |number| Member { number, present: number < RESIDENTS, weight: 1, drains: false, fit: true };
        let mut scene = Self {
            stage,
            echoes,
            forward,
            fate: Fate::new(PATIENCE),
            members: (0..RESIDENTS + GUESTS).map(member).collect(),
            crowds: Vec::new(),
            random: Random::new(seed),
            begun: Instant::now(),
        };
        scene.stage.write(&scene.document())?;
        scene.stage.start()?;
        for pool in ["web", "web6"] {
            scene.stage.until_states(pool, &["healthy"; RESIDENTS])?;
        }
        if forward == "dsr" {
            // They have come one by one, and the slots that have changed hands would have connections to remember.
            scene.all_settle()?;
        }
        scene.gather(connections)?;
        Ok(scene)
    }

    fn gather(&mut self, connections: usize) -> Result<()> {
        let client = self.stage.lab.client.clone();
        let more = [IpAddr::from([10, 1, 0, 3]), IpAddr::from([10, 1, 0, 4])];
        for address in more {
            link::address(&client, "eth0", address, 24)?;
        }
        let [v4, v6] = Stage::VIPS.map(|vip| SocketAddr::new(vip, PORT));
        let first = [self.stage.lab.client_v4().into(), more[0], more[1]].map(|from| (from, v4));
        for (from, to) in first.into_iter().chain([(self.stage.lab.client_v6().into(), v6)]) {
            self.crowds.push(Crowd::start(&client, from, to, connections / 4, &self.fate));
        }
        self.crowds.iter_mut().try_for_each(Crowd::gathers)?;
        self.say(&format!("{connections} connections"));
        self.crowds.push(Crowd::newcomers(&client, vec![v4, v6], NEWCOMERS, &self.fate));
        Ok(())
    }

    fn say(&self, what: &str) {
        println!("{:7.3} {what}", self.begun.elapsed().as_secs_f64());
    }

    fn document(&self) -> String {
        let pool = |name: &str, address: &dyn Fn(usize) -> SocketAddr| {
            let list: String = self
                .members
                .iter()
                .filter(|member| member.present)
                .map(|Member { number, weight, drains, .. }| {
                    let address = address(*number);
                    // Without translation the port is the client's.
                    let address = match self.forward {
                        "dsr" => address.ip().to_string(),
                        _ => address.to_string(),
                    };
                    format!("  {{ address = \"{address}\", weight = {weight}, drain = {drains} }},\n")
                })
                .collect();
            format!(
                "[pools.{name}]\nhealth = {{ tcp = true, port = {HEALTH_PORT}, interval = \"500ms\", rise = 1, fall = 2 }}\n\
                 backends = [\n{list}]\n"
            )
        };
        let lab = &self.stage.lab;
        let v4 = |number| SocketAddr::new(lab.backend_v4(number).into(), PORT);
        let v6 = |number| SocketAddr::new(lab.backend_v6(number).into(), PORT);
        let forward = self.forward;
        format!(
            "interfaces = {:?}\n[limits]\nflows = 65536\n\
             [timeouts]\nestablished = \"{}s\"\nhalf_open = \"3s\"\nclosed = \"2s\"\nclosing = \"2s\"\nport_rest = \"5s\"\n{}{}\
             [services.shop]\nlisten = \"{}\"\npool = \"web\"\nforward = \"{forward}\"\n\
             [services.shop6]\nlisten = \"{}\"\npool = \"web6\"\nforward = \"{forward}\"\n",
            lab.interfaces(),
            QUIET.as_secs(),
            pool("web", &v4),
            pool("web6", &v6),
            format_args!("{}/tcp", SocketAddr::new(Stage::VIPS[0], PORT)),
            format_args!("{}/tcp", SocketAddr::new(Stage::VIPS[1], PORT)),
        )
    }

    /// Puts what has become of the document in force; without a daemon it waits for one.
    fn put(&self) -> Result<()> {
        if std::fs::read_to_string(self.stage.document())? == self.document() {
            return Ok(());
        }
        let revision = |stage: &Stage| -> Result<String> {
            let status = stage.json(&["status"])?;
            ensure!(status["status"]["document"]["refused"].is_null(), "{status}");
            Ok(status["status"]["document"]["revision"].as_str().context("a text")?.to_owned())
        };
        if self.stage.daemon.is_none() {
            return self.stage.write(&self.document());
        }
        let before = revision(&self.stage)?;
        self.stage.write(&self.document())?;
        self.stage.until("the document", |stage| Ok(revision(stage)? != before))
    }

    /// Something happens to somebody; a word for it.
    fn change(&mut self) -> Result<String> {
        loop {
            let number = self.random.below(self.members.len() as u64) as usize;
            let what = self.random.below(8);
            let others = self.members.iter().filter(|other| other.number != number && other.works()).count();
            let member = &mut self.members[number];
            let change = match what {
                0 if !member.present => {
                    (member.present, member.drains, member.weight) = (true, false, 1);
                    self.fate.hang_up(member.name(), false);
                    "comes"
                }
                1 if member.works() && others >= 3 => {
                    member.drains = true;
                    self.fate.hang_up(member.name(), member.is_guest());
                    "drains"
                }
                2 | 3 if member.present && member.drains => {
                    member.drains = false;
                    self.fate.hang_up(member.name(), false);
                    "resumes"
                }
                4 if member.present && member.is_guest() && (member.drains || self.random.percent(20)) => {
                    // Also with whatever connections it still has.
                    member.present = false;
                    self.fate.take_out(member.name());
                    "is taken out"
                }
                5 if member.present => {
                    member.weight = 1 + (member.weight + self.random.below(2)) % 3;
                    "has another weight"
                }
                6 if member.works() && others >= 3 && self.stage.daemon.is_some() => {
                    member.fit = false;
                    "is unfit"
                }
                7 if member.present && !member.fit && self.stage.daemon.is_some() => {
                    member.fit = true;
                    "is fit again"
                }
                _ => continue,
            };
            let (fit, present) = (member.fit, member.present);
            if matches!(what, 6 | 7) {
                self.echoes[number].set_fit(fit);
                self.until_healthy(number, fit)?;
            } else {
                if !present && !fit {
                    self.members[number].fit = true;
                    self.echoes[number].set_fit(true);
                }
                self.put()?;
            }
            return Ok(format!("server {number} {change}"));
        }
    }

    /// The daemon has noticed how a server is.
    fn until_healthy(&self, number: usize, healthy: bool) -> Result<()> {
        let address = self.stage.lab.backend_v4(number).to_string();
        self.stage.until(&format!("{address} healthy: {healthy}"), |stage| {
            let list = stage.json(&["backend", "list", "--pool", "web"])?;
            let mut list = list.as_array().context("a list")?.iter();
            let it = list.find(|it| {
                let said = it["address"].as_str().unwrap_or_default();
                said == address || said.starts_with(&format!("{address}:"))
            });
            Ok((it.context("it is listed")?["state"] != "unhealthy") == healthy)
        })
    }

    /// Through everything that may happen: changes, in the middle of them a daemon that dies and one that
    /// takes over, and meanwhile newcomers, and a flood now and then.
    fn changes(&mut self) -> Result<()> {
        self.fate.open(true);
        for change in 0..CHANGES {
            if change == CHANGES / 2 {
                self.stage.daemon.take().context("a daemon")?.kill()?;
                self.say("the daemon is killed");
                self.talk(1)?;
            }
            let what = self.change()?;
            self.say(&what);
            if change == CHANGES / 2 {
                self.talk(1)?;
                self.stage.start()?;
                self.say("another daemon");
            }
            if self.random.percent(30) {
                let number = self.random.below(3000) as u32;
                self.flood(number)?;
                self.say(&format!("flood of {number}"));
            }
            let turns = self.random.below(3);
            if turns > 0 {
                self.talk(turns)?;
            }
        }
        self.talk(2)
    }

    fn flood(&mut self, number: u32) -> Result<()> {
        flood::syns(&self.stage.lab.client, SocketAddrV4::new(VIP, PORT), number, &mut self.random)
    }

    /// Everybody talks, some turns long, and nobody has been sent elsewhere.
    fn talk(&mut self, turns: u64) -> Result<()> {
        // The newcomers may be waiting to be let in.
        let (_, old) = self.crowds.split_last_mut().context("crowds")?;
        all_talk(old, turns)?;
        self.nobody_is_broken()
    }

    fn nobody_is_broken(&self) -> Result<()> {
        for crowd in &self.crowds {
            let broken = crowd.fared().broken.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(
                broken.is_empty(),
                "{} connections broke: {:#?}",
                broken.len(),
                &broken[..broken.len().min(20)]
            );
        }
        Ok(())
    }

    /// As it was in the beginning, and the newcomers leave.
    fn restore(&mut self) -> Result<()> {
        self.fate.open(false);
        let newcomers = self.crowds.len() - 1;
        // One turn may be under way.
        all_talk(&mut self.crowds[newcomers..], 2)?;
        for number in 0..self.members.len() {
            let guest = self.members[number].is_guest();
            if guest && self.members[number].present {
                self.fate.take_out(number as u8);
            }
            self.echoes[number].set_fit(true);
            self.members[number] = Member { number, present: !guest, weight: 1, drains: false, fit: true };
        }
        self.put()?;
        for pool in ["web", "web6"] {
            self.stage.until_states(pool, &["healthy"; RESIDENTS])?;
        }
        Ok(())
    }

    /// How many of both services' slots are not settled.
    fn unsettled(&self) -> Result<u64> {
        ["shop", "shop6"].iter().try_fold(0, |sum, name| {
            let slots = &self.stage.json(&["service", "show", name])?["slots"];
            let number = |what: &str| slots[what].as_u64().context("a number");
            Ok(sum + number("total")? - number("settled")?)
        })
    }

    /// Waits until all slots are settled.
    fn all_settle(&self) -> Result<()> {
        // Moving, then fading.
        self.stage.within(6 * QUIET, "all slots settle", |_| {
            self.nobody_is_broken()?;
            Ok(self.unsettled()? == 0)
        })
    }

    /// All that is written down of connections: ways of the table in use, whatever became of them, and how
    /// often anything was written or refused.
    fn census(&self) -> Result<(usize, String)> {
        let pin = format!("/sys/fs/bpf/lobby/layout-{LAYOUT_VERSION}/{}", name::RECORDS);
        let ways = self.stage.lab.balancer.run(|| -> Result<usize> {
            let map = Map::Array(MapData::from_pin(pin)?);
            let map: Array<_, [u64; 2 * RECORD_WAYS]> = map.try_into()?;
            map.iter().try_fold(0, |sum, line| {
                let keys = line?.into_iter().step_by(2);
                Ok(sum + keys.filter(|key| *key > Record::BUSY).count())
            })
        })??;
        Ok((ways, self.stage.json(&["counters"])?["records"].to_string()))
    }

    /// While everything is settled, a flood leaves no trace in the tables.
    fn flood_leaves_no_trace(&mut self) -> Result<()> {
        assert_eq!(self.unsettled()?, 0, "before the flood");
        let before = self.census()?;
        self.talk(1)?;
        self.flood(30_000)?;
        self.talk(1)?;
        assert_eq!(self.census()?, before, "the flood has left a trace");
        assert_eq!(self.unsettled()?, 0, "after the flood");
        self.say(&format!("a flood of 30000 has left no trace: {before:?}"));
        Ok(())
    }

    /// Nobody broke, and of those from the beginning at least so many are still there to tell.
    fn verdict(&mut self, at_least: usize) -> Result<()> {
        self.talk(1)?;
        let (newcomers, old) = self.crowds.split_last().context("crowds")?;
        let sum = |of: fn(&Crowd) -> usize| old.iter().map(of).sum::<usize>();
        let talking = sum(|crowd| crowd.fared().talking.load(SeqCst));
        let silent = sum(|crowd| crowd.fared().silent.load(SeqCst));
        let taken_out = sum(|crowd| crowd.fared().taken_out.load(SeqCst));
        let came = newcomers.fared().came.load(SeqCst);
        self.say(&format!("{talking} talk still, {silent} were silent for too long; {came} newcomers"));
        assert_eq!(taken_out, 0, "nobody of the beginning was at a guest");
        ensure!(talking >= at_least, "this machine is too slow: {silent} were silent for {PATIENCE:?}");
        ensure!(came > 100, "only {came} newcomers");
        self.stage.checksums_were_right()
    }
}

/// One at a time: a machine has no room for more.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn tens_of_thousands_of_connections_stay_where_they_are() -> Result<()> {
    if !lab::possible("tens_of_thousands_of_connections_stay_where_they_are") {
        return Ok(());
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scene = Scene::new("dsr", 24_000)?;
    scene.flood_leaves_no_trace()?;
    scene.changes()?;
    scene.restore()?;
    scene.say("restored");
    scene.all_settle()?;
    scene.say("all settled");
    scene.flood_leaves_no_trace()?;
    scene.verdict(20_000)
}

#[test]
fn thousands_of_translated_connections_stay_where_they_are() -> Result<()> {
    if !lab::possible("thousands_of_translated_connections_stay_where_they_are") {
        return Ok(());
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scene = Scene::new("nat", 5_000)?;
    scene.changes()?;
    scene.restore()?;
    scene.verdict(4_500)
}
