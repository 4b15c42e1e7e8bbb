//! The two data planes hold the same: whatever is planned, the kernel's tables, read back after every
//! operation, say what the tables in memory say. What is proved of plans in memory so holds in the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::IpAddr,
};

use lb_common::abi::{self, Tick};
use lb_userspace::{
    config::Document,
    dataplane::{
        Dataplane, FlowsOf, NextHop, Op, SideEntry, Tables, kernel::KernelDataplane, memory::MemoryDataplane,
    },
    health::{Verdict, Verdicts},
    maglev,
    model::{BackendAddress, Config},
    plan::{Desired, plan},
};

#[test]
fn the_kernels_tables_are_those_in_memory() {
    if !xtask::lab::possible("the_kernels_tables_are_those_in_memory") {
        return;
    }
    for seed in 0..4 {
        let dice = &mut Dice(seed * 1000);
        let first = rolled(dice);
        let mut kernel =
            KernelDataplane::open(None, first.settings.limits).unwrap_or_else(|why| panic!("{why}"));
        let mut memory = MemoryDataplane::new(first.settings.limits);
        assert_eq!(kernel.tables().unwrap(), memory.tables().unwrap(), "empty");
        let mut now = Tick(1000);
        for config in std::iter::once(first).chain((0..5).map(|_| rolled(dice)).collect::<Vec<_>>()) {
            let before = observed(&memory);
            // Sometimes long enough for slots to fade, and to settle.
            now = now.after([1, 100, 200_000][dice.below(3)]);
            let remembered = before.remembered();
            let free = before.backends.keys().copied().filter(|index| !remembered.contains(index));
            let spent = free.filter(|_| dice.below(3) == 0).collect();
            let (next_hops, sources) = ways(dice);
            let desired = Desired {
                config: &config,
                verdicts: &verdicts(&config, dice),
                next_hops: &next_hops,
                sources: &sources,
                shared_vips: &BTreeSet::from([ip("203.0.113.10")]),
                interfaces: &BTreeMap::from([(dice.below(3) as u32 + 1, [2, 0, 0, 0, 0, 7])]),
                hash_key: [dice.0, !dice.0],
                same_interface_tx: dice.below(2) == 0,
                spent: &spent,
                now,
            };
            for op in plan(&desired, &before).unwrap_or_else(|why| panic!("{why}")).ops {
                kernel.apply(&op).unwrap_or_else(|why| panic!("seed {seed}, {op:?}: {why}"));
                memory.apply(&op).unwrap_or_else(|why| panic!("seed {seed}, {op:?}: {why}"));
                assert_eq!(observed(&kernel), observed(&memory), "seed {seed}, after {op:?}");
                check_source_keys(&kernel, &memory.tables().unwrap());
            }
            // A daemon that starts now has nothing to do.
            let spent = BTreeSet::new();
            let again = plan(&Desired { spent: &spent, ..desired }, &observed(&kernel)).unwrap();
            let rest = |op: &&Op| !matches!(op, Op::SwitchOldRing { .. } | Op::Settle);
            assert_eq!(again.ops.iter().find(rest), None, "seed {seed}");
        }
    }
}

/// The tables, and what unsettled slots remember: of settled ones it means nothing.
fn observed(plane: &impl Dataplane) -> Tables {
    let mut tables = plane.tables().unwrap();
    tables.sides = plane.observed(&tables).unwrap();
    for (index, sides) in &mut tables.sides {
        let slots = tables.services[index].ring.slots.iter();
        let nothing = SideEntry::moving(0, Tick(0));
        *sides =
            slots.zip(sides.iter()).map(|(s, side)| if s.is_settled() { nothing } else { *side }).collect();
    }
    tables
}

/// Each source is found by its address, and by no other.
fn check_source_keys(kernel: &KernelDataplane, tables: &Tables) {
    let copy = kernel.copy().unwrap();
    let v4 = copy.source_keys_v4.iter().map(|(&address, &index)| (abi::mapped(address), index));
    let v6 = copy.source_keys_v6.iter().map(|(&address, &index)| (address, index));
    let keys: BTreeMap<IpAddr, u32> =
        v4.chain(v6).map(|(address, index)| (abi::ip_addr(address), index)).collect();
    for (address, index) in &keys {
        assert_eq!(tables.sources.get(index).map(|source| source.address), Some(*address));
    }
    for source in tables.sources.values() {
        assert!(keys.contains_key(&source.address), "{} leads nowhere", source.address);
    }
}

/// A small generator of numbers, so that a failure is replayed by its seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (maglev::mix(self.0) % bound as u64) as usize
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A document of both families, all forms of listeners, both schedulers, rules and time-outs.
fn rolled(dice: &mut Dice) -> Config {
    let mut text = format!(
        "interfaces = [\"eth0\"]\nports = \"{}\"\nresets_per_second = {}\n[timeouts]\nudp = \"{}s\"\n\
         [limits]\nflows = 1024\nservices = 32\nbackends = 400\nring_pages = 64\nside_pages = 16\nrules = 200\n",
        dice.pick(&["10240-32767", "20000-20999"]),
        dice.below(1000),
        1 + dice.below(100),
    );
    for (pool, addresses) in [
        ("four", ["10.0.0.1:80", "10.0.0.1:8080", "10.0.0.2", "10.0.0.3:80", "local"]),
        ("near", ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "local"]),
        ("near-six", ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8::4", "local"]),
        ("six", ["[2001:db8::1]:80", "[2001:db8::1]:8080", "2001:db8::2", "[2001:db8::3]:80", "local"]),
    ] {
        let _ = writeln!(text, "[pools.{pool}]\nbackends = [");
        for address in addresses {
            if dice.below(3) > 0 {
                let _ = writeln!(text, "  {{ address = \"{address}\", weight = {} }},", dice.below(4));
            }
        }
        text.push_str("]\n");
    }
    for (number, listen) in [
        "203.0.113.10:80/tcp",
        "203.0.113.10:*/tcp",
        "203.0.113.10:53/udp",
        "203.0.113.11:*/udp",
        "[2001:db8:ffff::10]:80/tcp",
        "[2001:db8:ffff::10]:*/udp",
        "[2001:db8:ffff::11]:53/udp",
        "203.0.113.12:80/tcp",
        "203.0.113.12:*/udp",
        "[2001:db8:ffff::12]:80/tcp",
        "[2001:db8:ffff::12]:53/udp",
    ]
    .into_iter()
    .enumerate()
    {
        if dice.below(3) == 0 {
            continue;
        }
        let direct = number >= 7;
        let (pool, other) = match (listen.starts_with('['), direct) {
            (true, false) => ("six", "2001:db8:7::/48"),
            (true, true) => ("near-six", "2001:db8:7::/48"),
            (false, false) => ("four", "10.0.0.0/8"),
            (false, true) => ("near", "10.0.0.0/8"),
        };
        let _ = writeln!(text, "[services.s{number}]\nlisten = \"{listen}\"\npool = \"{pool}\"");
        if direct {
            text.push_str("forward = \"dsr\"\n");
            text.push_str(dice.pick(&["", "", "track = \"always\"\n"]));
        }
        let _ = match dice.below(4) {
            0 if !direct => writeln!(text, "scheduler = \"round-robin\""),
            1 if !direct => writeln!(text, "scheduler = \"source\""),
            1 => writeln!(text, "ring_size = 1031"),
            _ => writeln!(text, "ring_size = 101"),
        };
        let _ = match dice.below(4) {
            0 => writeln!(text, "allow = [\"{other}\"]"),
            1 => writeln!(text, "deny = [\"{other}\", \"198.51.100.7\", \"::/0\"]"),
            _ => Ok(()),
        };
    }
    Document::parse(&text).unwrap_or_else(|why| panic!("{text}\n{why}")).config
}

fn verdicts(config: &Config, dice: &mut Dice) -> Verdicts {
    let mut verdict = || match dice.below(8) {
        0 => Verdict { dead: true, flows: FlowsOf::Keep, ..Verdict::RESTING },
        1 => Verdict { dead: true, flows: FlowsOf::Forget, ..Verdict::RESTING },
        2 => Verdict { flows: FlowsOf::Cut, ..Verdict::RESTING },
        3 => Verdict::RESTING,
        _ => Verdict::USABLE,
    };
    let mut verdicts = Verdicts::new();
    for (name, pool) in &config.pools {
        let of_pool: BTreeMap<BackendAddress, Verdict> =
            pool.backends.iter().map(|backend| (backend.address, verdict())).collect();
        verdicts.insert(name.clone(), of_pool.into_iter().collect());
    }
    verdicts
}

/// Next hops and sources of some of the backends.
fn ways(dice: &mut Dice) -> (BTreeMap<IpAddr, NextHop>, BTreeMap<IpAddr, Vec<IpAddr>>) {
    let (mut hops, mut sources) = (BTreeMap::new(), BTreeMap::new());
    let four =
        [vec![ip("10.9.0.1")], vec![ip("10.9.0.1"), ip("10.9.0.2")], vec![ip("10.9.0.2"), ip("10.9.0.3")]];
    let six = [vec![ip("2001:db8:9::1")], vec![ip("2001:db8:9::1"), ip("2001:db8:9::2")], vec![]];
    let (four, six) = (four[dice.below(3)].clone(), six[dice.below(3)].clone());
    for number in 1..=3 {
        for (address, list) in [(format!("10.0.0.{number}"), &four), (format!("2001:db8::{number}"), &six)] {
            if dice.below(4) > 0 {
                let mac = [2, 1, 2, 3, 4, dice.below(3) as u8];
                hops.insert(ip(&address), NextHop { interface: 2, own_mac: [2, 0, 0, 0, 0, 1], mac });
            }
            if dice.below(5) > 0 {
                sources.insert(ip(&address), list.clone());
            }
        }
    }
    (hops, sources)
}
