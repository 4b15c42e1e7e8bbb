//! The figures: a table for people, a file for programs.

use std::collections::BTreeMap;

use benches::Spread;
use serde::Serialize;

/// All figures of one run of the benchmark. Times are nanoseconds a packet.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    empty_ns: f64,
    /// Of IPv4.
    floor_ns: f64,
    floors: BTreeMap<&'static str, f64>,
    cases: Vec<Case>,
}

/// One case, measured several times.
#[derive(Debug, Serialize)]
pub(crate) struct Case {
    name: String,
    #[serde(skip)]
    v6: bool,
    flows: u64,
    /// Median.
    total_ns: f64,
    /// What the case's own generator took with the floor behind it; `None`: the report's.
    #[serde(skip_serializing_if = "Option::is_none")]
    own_floor_ns: Option<f64>,
    over_floor_ns: f64,
    runs: usize,
    min: f64,
    max: f64,
}

impl Case {
    pub(crate) fn new(name: String, v6: bool, flows: u64, runs: usize, times: Spread) -> Self {
        let Spread { least: min, median: total_ns, greatest: max } = times;
        Self { name, v6, flows, total_ns, own_floor_ns: None, over_floor_ns: 0.0, runs, min, max }
    }

    /// The same case, above another floor.
    pub(crate) fn above(self, floor_ns: f64) -> Self {
        Self { own_floor_ns: Some(floor_ns), ..self }
    }
}

impl Report {
    pub(crate) fn new(empty_ns: f64) -> Self {
        Self { empty_ns, floor_ns: 0.0, floors: BTreeMap::new(), cases: Vec::new() }
    }

    pub(crate) fn floor(&mut self, v6: bool, floor_ns: f64) {
        self.floors.insert(if v6 { "v6" } else { "v4" }, floor_ns);
        if !v6 {
            self.floor_ns = floor_ns;
        }
    }

    pub(crate) fn print_head(&self) {
        println!(
            "nanoseconds a packet; empty program {:.0}, floor IPv4 {:.0}, IPv6 {:.0}",
            self.empty_ns, self.floors["v4"], self.floors["v6"]
        );
        println!("floor - empty, IPv4: {:.1}", self.floors["v4"] - self.empty_ns);
        println!("floor - empty, IPv6: {:.1}\n", self.floors["v6"] - self.empty_ns);
        println!(
            "{:22} {:>9} {:>7} {:>11} {:>7} {:>7}",
            "case", "flows", "total", "over floor", "min", "max"
        );
    }

    pub(crate) fn add(&mut self, mut case: Case) {
        let floor = self.floors[if case.v6 { "v6" } else { "v4" }];
        case.over_floor_ns = case.total_ns - case.own_floor_ns.unwrap_or(floor);
        println!(
            "{:22} {:>9} {:>7.0} {:>11.0} {:>7.0} {:>7.0}",
            case.name, case.flows, case.total_ns, case.over_floor_ns, case.min, case.max
        );
        self.cases.push(case);
    }
}
