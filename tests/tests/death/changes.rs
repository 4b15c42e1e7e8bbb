//! The changes that are interrupted: what was there before, and what is wanted then.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::{Result, ensure};
use lb_userspace::{
    config::Document,
    dataplane::{Dataplane as _, NextHop, Op, kernel::KernelDataplane},
    health::{Verdict, Verdicts},
    model::{BackendAddress, Config, Protocol, Service},
    plan::{Desired, plan},
};
use tests::packets;

/// The port of the service over UDP.
pub(crate) const DATAGRAMS: u16 = 53;

/// Where services listen: one that does not translate, one that does, and one that does not over IPv6 and UDP.
pub(crate) fn addresses() -> [(IpAddr, u16); 3] {
    [
        ([203, 0, 113, 10].into(), 80),
        ([203, 0, 113, 11].into(), 80),
        ([0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10].into(), DATAGRAMS),
    ]
}

/// The number of a backend is the last byte of its address in either family.
fn number_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    }
}

/// What is wanted at a time.
#[derive(Clone)]
pub(crate) struct State {
    text: String,
    /// Backends that are believed dead.
    dead: &'static [u8],
}

impl State {
    /// Services that do not translate, and one that does, each with some of the backends.
    fn new(direct: &[(u8, u8)], translated: &[(u8, u8)], more: &str) -> Self {
        let list = |backends: &[(u8, u8)], address: &dyn Fn(u8) -> String| -> String {
            let line = |(number, weight): &(u8, u8)| {
                format!("  {{ address = \"{}\", weight = {weight} }},\n", address(*number))
            };
            backends.iter().map(line).collect()
        };
        let mut text = format!(
            "interfaces = [\"eth0\"]\nports = \"20000-20999\"\nresets_per_second = 1000000\n\
             [limits]\nflows = 65536\nservices = 8\nbackends = 64\nring_pages = 16\nside_pages = 16\nrules = 32\n\
             [timeouts]\nestablished = \"60s\"\nhalf_open = \"5s\"\nudp = \"60s\"\n\
             [pools.near]\nbackends = [\n{}]\n[pools.six]\nbackends = [\n{}]\n[pools.far]\nbackends = [\n{}]\n",
            list(direct, &|number| format!("10.0.0.{number}")),
            list(direct, &|number| format!("fd00::{number}")),
            list(translated, &|number| format!("10.0.0.{number}:8080")),
        );
        let size = if more.contains("ring_size") { "" } else { "ring_size = 7\n" };
        if !direct.is_empty() {
            text += &format!(
                "[services.direct]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"near\"\nforward = \"dsr\"\n{size}{more}\n"
            );
            // Rules are of one family; and datagrams stay with their server only where the document says so.
            let more = match more {
                rules if rules.contains("allow") => "sticky = true".to_owned(),
                other => format!("{other}\nsticky = true"),
            };
            text += &format!(
                "[services.six]\nlisten = \"[2001:db8:113::10]:53/udp\"\npool = \"six\"\nforward = \"dsr\"\n{size}{more}\n"
            );
        }
        if !translated.is_empty() {
            text +=
                "[services.translated]\nlisten = \"203.0.113.11:80/tcp\"\npool = \"far\"\nring_size = 7\n";
        }
        Self { text, dead: &[] }
    }

    /// No service.
    pub(crate) fn nothing() -> Self {
        Self::new(&[], &[], "")
    }

    fn with_dead(mut self, dead: &'static [u8]) -> Self {
        self.dead = dead;
        self
    }
}

/// Something that happens before the change.
pub(crate) enum Step {
    /// This is wanted, and what the plan says is done.
    Put(State),
    /// Clients begin connections.
    Connect,
    /// Each of them sends something.
    Talk,
    /// More time goes by than slots need for anything.
    LongAfter,
    /// The connections of backends that were taken out have ended.
    Spend,
}

impl Step {
    fn put(&self) -> Option<&State> {
        match self {
            Self::Put(state) => Some(state),
            _ => None,
        }
    }
}

use Step::{Connect, LongAfter, Put, Spend, Talk};

/// A change, and what came before.
pub(crate) struct Change {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<Step>,
    pub(crate) last: State,
    /// What the operations of its plan are for.
    about: fn(&Op) -> bool,
}

impl Change {
    /// To what is wanted now.
    fn to(name: &'static str, steps: Vec<Step>, last: State) -> Self {
        Self { name, steps, last, about: |_| true }
    }

    /// From the one to the other, with connections that began before.
    fn from_to(name: &'static str, first: State, last: State) -> Self {
        Self::to(name, vec![Put(first), Connect], last)
    }

    /// With time alone: the same is wanted still.
    fn in_time(name: &'static str, steps: Vec<Step>, about: fn(&Op) -> bool) -> Self {
        let last = steps.iter().filter_map(Step::put).next_back().cloned().unwrap_or_else(State::nothing);
        Self { name, steps, last, about }
    }

    /// All that is wanted one after the other.
    pub(crate) fn states(&self) -> impl Iterator<Item = &State> {
        self.steps.iter().filter_map(Step::put).chain([&self.last])
    }

    /// Whether it is what the change is for.
    pub(crate) fn is_about(&self, op: &Op) -> bool {
        (self.about)(op)
    }
}

const ALL: [(u8, u8); 3] = [(1, 1), (2, 1), (3, 1)];
const MORE: [(u8, u8); 4] = [(1, 1), (2, 1), (3, 1), (4, 1)];

/// All that may be interrupted.
pub(crate) fn changes() -> Vec<Change> {
    let base = || State::new(&ALL, &ALL, "");
    let grown = || State::new(&MORE, &MORE, "");
    let shrunk = || State::new(&ALL[1..], &ALL[1..], "");
    let resized = || State::new(&ALL, &ALL, "ring_size = 11");
    let slow = base().text.replace("\"60s\"", "\"600s\"");
    let weighed = State::new(&[(1, 1), (2, 3), (3, 0)], &[(1, 3), (2, 1), (3, 0)], "");
    let tracked = State::new(&ALL, &ALL, "track = \"always\"");
    let ruled = State::new(&ALL, &ALL, "allow = [\"198.51.100.0/28\", \"192.0.2.0/24\"]");
    vec![
        Change::from_to("a start", State::nothing(), base()),
        Change::from_to("a backend more", base(), grown()),
        Change::from_to("a backend less", base(), shrunk()),
        Change::from_to("other weights", base(), weighed),
        Change::from_to("a ring of another size", base(), resized()),
        Change::to(
            "slots that move already",
            vec![Put(base()), Connect, Put(State::new(&MORE, &ALL, ""))],
            State::new(&MORE[1..], &ALL[..2], ""),
        ),
        Change::to("and back again", vec![Put(base()), Connect, Put(grown())], base()),
        Change::from_to("connections written down always", base(), tracked),
        Change::from_to("rules", base(), ruled),
        Change::from_to("other time-outs", base(), State { text: slow, dead: &[] }),
        Change::from_to("a second service", State::new(&[], &ALL, ""), base()),
        Change::from_to("a service less", base(), State::new(&ALL, &[], "")),
        Change::from_to("the end", base(), State::nothing()),
        Change::from_to("a death", base(), base().with_dead(&[2])),
        Change::to("and a recovery", vec![Put(base()), Connect, Put(base().with_dead(&[2])), Talk], base()),
        Change::in_time(
            "the end of moving",
            vec![Put(base()), Connect, Put(grown()), Talk, LongAfter],
            |op| matches!(op, Op::EndMoving { .. }),
        ),
        Change::in_time(
            "the end of fading",
            vec![Put(base()), Put(grown()), LongAfter, Put(grown()), LongAfter, Connect],
            |op| matches!(op, Op::SwitchRing { ring, .. } if ring.first_side.is_none()),
        ),
        Change::in_time(
            "the end of an old ring",
            vec![Put(base()), Connect, Put(resized()), Talk, LongAfter, Put(resized())],
            |op| matches!(op, Op::SwitchOldRing { ring, .. } if ring.slots == 0),
        ),
        Change::in_time(
            "the end of a backend",
            vec![Put(base()), Connect, Put(shrunk()), Talk, Spend],
            |op| matches!(op, Op::RemoveBackend { .. }),
        ),
    ]
}

/// Everything that a plan is made from, but for the tables.
pub(crate) struct Wanted {
    pub(crate) config: Config,
    verdicts: Verdicts,
    next_hops: BTreeMap<IpAddr, NextHop>,
    sources: BTreeMap<IpAddr, Vec<IpAddr>>,
    dead: &'static [u8],
}

impl Wanted {
    pub(crate) fn of(State { text, dead }: &State) -> Self {
        let config = Document::parse(text).unwrap_or_else(|why| panic!("{text}\n{why}")).config;
        let verdict = |address| match address {
            BackendAddress::Remote(ip, _) if dead.contains(&number_of(ip)) => {
                Verdict { dead: true, ..Verdict::RESTING }
            }
            _ => Verdict::USABLE,
        };
        let health = config.pools.iter().map(|(name, pool)| {
            let backends = pool.backends.iter();
            (name.clone(), backends.map(|backend| (backend.address, verdict(backend.address))).collect())
        });
        let backends = (1..=4).flat_map(|number: u8| {
            [IpAddr::from([10, 0, 0, number]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, number.into()])]
        });
        let hop = |last| NextHop { interface: 1, own_mac: packets::OWN_MAC, mac: [2, 0, 0, 1, 0, last] };
        Self {
            verdicts: health.collect(),
            next_hops: backends.clone().map(|address| (address, hop(number_of(address)))).collect(),
            sources: backends
                .filter(IpAddr::is_ipv4)
                .map(|address| (address, vec![IpAddr::from([10, 0, 0, 100])]))
                .collect(),
            config,
            dead,
        }
    }

    /// What is to be done to the tables as they are.
    pub(crate) fn plan(&self, plane: &KernelDataplane, spent: &BTreeSet<u32>) -> Result<Vec<Op>> {
        let mut tables = plane.tables()?;
        tables.sides = plane.observed(&tables)?;
        let desired = Desired {
            config: &self.config,
            verdicts: &self.verdicts,
            next_hops: &self.next_hops,
            sources: &self.sources,
            shared_vips: &BTreeSet::new(),
            interfaces: &BTreeMap::from([(1, packets::OWN_MAC)]),
            hash_key: [3, 4],
            same_interface_tx: true,
            spent,
            now: plane.now()?,
        };
        Ok(plan(&desired, &tables)?.ops)
    }

    /// Plans, and does it.
    pub(crate) fn apply(&self, plane: &mut KernelDataplane) -> Result<()> {
        // As whoever goes on does.
        plane.apply(&Op::Settle)?;
        for op in self.plan(plane, &BTreeSet::new())? {
            plane.apply(&op)?;
        }
        Ok(())
    }

    /// The same, and again with what only the next plan may do: give up an old ring, then make a ring of another size.
    pub(crate) fn bring_about(&self, plane: &mut KernelDataplane) -> Result<()> {
        for _ in 0..3 {
            self.apply(plane)?;
        }
        ensure!(self.plan(plane, &BTreeSet::new())?.is_empty(), "it comes to no end");
        Ok(())
    }

    fn service(&self, vip: IpAddr) -> Option<&Service> {
        self.config.services.values().find(|service| service.listen.address == vip)
    }

    /// Whether the service of an address has a backend.
    pub(crate) fn has(&self, vip: IpAddr, backend: u8) -> bool {
        let pool = self.service(vip).and_then(|service| self.config.pools.get(&service.pool));
        let mut backends = pool.into_iter().flat_map(|pool| &pool.backends);
        backends.any(|it| matches!(it.address, BackendAddress::Remote(ip, _) if number_of(ip) == backend))
    }

    /// Whether a connection that the service of an address has with a backend is promised to stay. Of a dead one's,
    /// datagrams are taken for new ones.
    pub(crate) fn keeps(&self, vip: IpAddr, backend: u8) -> bool {
        let denies = self.service(vip).is_some_and(|service| !service.allow.is_empty());
        let datagrams = self.service(vip).is_some_and(|service| service.listen.protocol == Protocol::Udp);
        self.has(vip, backend) && !denies && !(datagrams && self.dead.contains(&backend))
    }
}
