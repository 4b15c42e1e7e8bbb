//! A table refuses in the middle of a plan, and it is tried again at once.

use super::*;
use crate::dataplane::{RecordEntry, Ring, SideEntry};

/// Tables that refuse one operation.
struct Breaking {
    inner: MemoryDataplane,
    /// Operations until then.
    left: usize,
}

impl Dataplane for Breaking {
    fn tables(&self) -> Result<Tables, DataplaneError> {
        self.inner.tables()
    }

    fn apply(&mut self, op: &Op) -> Result<(), DataplaneError> {
        let left = self.left;
        self.left = left.wrapping_sub(1);
        if left == 0 { Err(DataplaneError::Misfit("not now".into())) } else { self.inner.apply(op) }
    }

    fn verdicts(&self) -> Result<Vec<u64>, DataplaneError> {
        self.inner.verdicts()
    }

    fn traffic(&self) -> Result<BTreeMap<u32, lb_common::abi::Traffic>, DataplaneError> {
        self.inner.traffic()
    }

    fn flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<(), DataplaneError> {
        self.inner.flows(visit)
    }

    fn now(&self) -> Result<Tick, DataplaneError> {
        self.inner.now()
    }

    fn sides(&self, ring: &Ring) -> Result<Arc<[SideEntry]>, DataplaneError> {
        self.inner.sides(ring)
    }

    fn records(&self, visit: &mut dyn FnMut(&RecordEntry)) -> Result<(), DataplaneError> {
        self.inner.records(visit)
    }
}

/// Services before it have been switched to their new rings by then, and the plan that is made next takes the
/// pages of those that they had.
#[test]
fn what_a_broken_plan_has_freed_is_not_written_before_packets_have_left_it() {
    let text = |weight: u32| {
        let services: String = (20..24)
            .map(|n| format!("[services.s{n}]\nlisten = \"10.0.0.{n}:80/tcp\"\npool = \"web\"\n"))
            .collect();
        DOCUMENT
            .split("[services")
            .next()
            .unwrap()
            .replace("health =", "# ")
            .replace("\"10.0.0.12:80\" }", &format!("\"10.0.0.12:80\", weight = {weight} }}"))
            + &services
    };
    let load = |core: &mut Core<Breaking>, weight| {
        let document = Document::parse(&text(weight)).unwrap();
        core.load(&text(weight), document, around(), &Host::default(), at(1)).unwrap();
    };
    let mut broken = 0;
    for point in 0..100 {
        let inner = MemoryDataplane::new(Limits { ring_pages: 32, ..Limits::default() });
        let breaking = Breaking { inner, left: usize::MAX };
        let mut core = Core::new(breaking, "/etc/lb.toml".into(), [1, 2], 3).unwrap();
        load(&mut core, 1);
        core.settle().unwrap();
        load(&mut core, 3);
        core.plane.left = point;
        let outcome = core.settle();
        core.plane.left = usize::MAX;
        // Another change, at once.
        load(&mut core, 2);
        core.settle().unwrap();
        if outcome.is_ok() {
            break;
        }
        broken += 1;
    }
    assert!((8..100).contains(&broken), "{broken} points");
}
