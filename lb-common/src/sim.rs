//! Frames and tables in memory: what the decision runs on wherever it does not run in the kernel.

#![expect(unsafe_code, reason = "a frame is bytes; a table is shared words")]

extern crate std;

use crate::{
    abi::{
        Action, Address, AddressV4, Backend, Budget, Config, Flow, Listeners, PAGE_SLOTS, Page, Records,
        RuleV4, RuleV6, Service, Side, SidePage, Slot, Source, Tick, Traffic, Vip, address_v4, address_v6,
    },
    datapath::{flow, listener, record, unsettled},
    shared::Shared,
    tables::Tables,
    verdict::{COUNTERS, Note, Verdict},
    wire::{Frame, REACH, Wire},
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    vec::Vec,
};

/// A frame in memory. What a verdict cuts off is cut by [`SliceFrame::settle`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceFrame(pub Vec<u8>);

impl SliceFrame {
    /// Cuts off what the verdict says.
    pub fn settle(&mut self, verdict: Verdict) {
        if let Verdict::Reset { length, .. } = verdict {
            self.0.truncate(usize::from(length));
        }
    }
}

impl Frame for SliceFrame {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read<T: Wire>(&self, offset: usize) -> Option<T> {
        if offset > REACH {
            return None;
        }
        let bytes = self.0.get(offset..offset + size_of::<T>())?;
        // SAFETY: `Wire` types are valid for any bytes, and these are as many as it has.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn at<T: Wire>(&mut self, offset: usize) -> Option<&mut T> {
        if offset > REACH {
            return None;
        }
        let bytes = self.0.get_mut(offset..offset + size_of::<T>())?;
        let pointer = bytes.as_mut_ptr().cast::<T>();
        assert!(pointer.is_aligned(), "a header at odd offset {offset}");
        // SAFETY: `Wire` types are valid for any bytes; aligned, as asserted; the borrow is kept.
        Some(unsafe { &mut *pointer })
    }
}

/// All tables in memory, for one thread.
#[derive(Debug, Default)]
pub struct MemTables {
    /// What holds for all packets.
    pub config: Config,
    /// By line.
    pub listeners: Vec<Listeners>,
    /// By address.
    pub vips_v4: BTreeMap<AddressV4, Vip>,
    /// By address.
    pub vips_v6: BTreeMap<Address, Vip>,
    /// By index.
    pub services: Vec<Service>,
    /// Prefix length (without the set) and rule, to action.
    pub rules_v4: BTreeMap<(u32, RuleV4), Action>,
    /// Prefix length (without the set) and rule, to action.
    pub rules_v6: BTreeMap<(u32, RuleV6), Action>,
    /// By index.
    pub pages: Vec<Page>,
    /// By index.
    pub sides: Vec<SidePage>,
    /// By index.
    pub records: Vec<Records>,
    /// By index.
    pub backends: Vec<Backend>,
    /// By backend.
    pub cursors: Vec<Cell<u64>>,
    /// By service.
    pub turns: Vec<Cell<u64>>,
    /// By address.
    pub source_keys_v4: BTreeMap<AddressV4, u32>,
    /// By address.
    pub source_keys_v6: BTreeMap<Address, u32>,
    /// By index.
    pub sources: Vec<Source>,
    /// By interface index.
    pub interfaces: BTreeMap<u32, u64>,
    /// By index.
    pub flows: Vec<Flow>,
    /// By counter.
    pub verdicts: RefCell<Vec<u64>>,
    /// By backend.
    pub traffic: RefCell<Vec<Traffic>>,
    /// Resets left.
    pub budget: Cell<Budget>,
}

impl MemTables {
    /// Empty tables of these sizes; `flows` is a power of two, and there are as many lines of records.
    pub fn new(services: usize, backends: usize, pages: usize, flows: usize) -> Self {
        assert!(flows.is_power_of_two());
        let lines = listener::lines_for(services as u32);
        let config = Config::default();
        config.listener_mask.set(lines - 1);
        config.flow_mask.set(flows as u32 - 1);
        config.record_mask.set(flows as u32 - 1);
        fn filled<T>(number: usize, make: impl FnMut() -> T) -> Vec<T> {
            core::iter::repeat_with(make).take(number).collect()
        }
        Self {
            config,
            listeners: filled(lines as usize, Listeners::default),
            services: filled(services, Service::default),
            pages: filled(pages, || Page {
                slots: [const { Shared::new(crate::abi::NO_BACKEND) }; PAGE_SLOTS],
            }),
            backends: filled(backends, Backend::default),
            cursors: filled(backends, Cell::default),
            turns: filled(services, Cell::default),
            sources: filled(256, Source::default),
            records: filled(flows, Records::default),
            flows: filled(flows, Flow::default),
            verdicts: RefCell::new(std::vec![0; COUNTERS]),
            traffic: RefCell::new(std::vec![Traffic::default(); backends]),
            ..Self::default()
        }
    }
}

/// The longest prefix of `address` for which there is a rule.
fn longest<const N: usize, K: Ord>(
    rules: &BTreeMap<(u32, K), Action>,
    address: [u8; N],
    key: impl Fn([u8; N]) -> K,
) -> Option<u32> {
    (0..=N as u32 * 8).rev().find_map(|prefix| {
        let mut network = [0; N];
        for (bit, byte) in network.iter_mut().enumerate().map(|(i, b)| (i as u32 * 8, b)) {
            let kept = prefix.saturating_sub(bit).min(8);
            *byte = address[bit as usize / 8] & !(0xffu16 >> kept) as u8;
        }
        rules.get(&(prefix, key(network))).map(|action| *action as u32)
    })
}

fn add(cell: &Cell<u64>, by: u64) -> u64 {
    cell.replace(cell.get().wrapping_add(by))
}

impl Tables for MemTables {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn listeners(&self, line: u32) -> Option<&Listeners> {
        self.listeners.get(line as usize)
    }
    fn vip_v4(&self, address: AddressV4) -> Option<Vip> {
        self.vips_v4.get(&address).copied()
    }
    fn vip_v6(&self, address: Address) -> Option<Vip> {
        self.vips_v6.get(&address).copied()
    }
    fn service(&self, index: u32) -> Option<&Service> {
        self.services.get(index as usize)
    }
    fn rule_v4(&self, rule: &RuleV4) -> Option<u32> {
        let bytes = rule.address.to_ne_bytes();
        longest(&self.rules_v4, bytes, |b| RuleV4 { set: rule.set, address: address_v4(b) })
    }
    fn rule_v6(&self, rule: &RuleV6) -> Option<u32> {
        let [high, low] = rule.address;
        let (high, low) = (high.to_ne_bytes(), low.to_ne_bytes());
        let bytes = core::array::from_fn(|i| if i < 8 { high[i] } else { low[i - 8] });
        longest::<16, _>(&self.rules_v6, bytes, |b| RuleV6 { set: rule.set, address: address_v6(b) })
    }
    fn slot(&self, page: u32, slot: usize) -> Option<Slot> {
        Some(Slot(self.pages.get(page as usize)?.slots.get(slot)?.get()))
    }
    fn side(&self, page: u32, slot: usize) -> Option<&Side> {
        self.sides.get(page as usize)?.sides.get(slot)
    }
    fn records(&self, line: u32) -> Option<&Records> {
        self.records.get(line as usize)
    }
    fn backend(&self, index: u32) -> Option<&Backend> {
        self.backends.get(index as usize)
    }
    fn advance_cursor(&self, backend: u32, by: u64) -> Option<u64> {
        self.cursors.get(backend as usize).map(|cell| add(cell, by))
    }
    fn take_turn(&self, service: u32) -> Option<u64> {
        self.turns.get(service as usize).map(|cell| add(cell, 1))
    }
    fn source_key_v4(&self, address: AddressV4) -> Option<u32> {
        self.source_keys_v4.get(&address).copied()
    }
    fn source_key_v6(&self, address: Address) -> Option<u32> {
        self.source_keys_v6.get(&address).copied()
    }
    fn source(&self, index: u32) -> Option<&Source> {
        self.sources.get(index as usize)
    }
    fn interface_mac(&self, interface: u32) -> Option<u64> {
        self.interfaces.get(&interface).copied()
    }
    fn flow(&self, index: u32) -> Option<&Flow> {
        self.flows.get(index as usize)
    }
    fn swap(&self, word: &Shared<u64>, old: u64, new: u64) -> bool {
        let same = word.get() == old;
        if same {
            word.set(new);
        }
        same
    }
    fn search_ports(&self, lane: u64, ports: u64, now: u32) -> u64 {
        flow::search_ports(self, lane, ports, now)
    }
    fn take_way(&self, line: u32, now: u32) -> u64 {
        record::take_way(self, line, now)
    }
    fn choose_unsettled(&self, at: u64, hash: u64, asked: u64, sequence: u32, now: u32) -> u64 {
        unsettled::choose(self, at, hash, asked, sequence, now)
    }
    fn spend_reset(&self, now: Tick, per_second: u32) -> bool {
        let mut budget = self.budget.get();
        let spent = budget.spend(now, per_second);
        self.budget.set(budget);
        spent
    }
    fn count(&self, verdict: Verdict) {
        if let Some(counter) = self.verdicts.borrow_mut().get_mut(verdict.counter()) {
            *counter += 1;
        }
    }
    fn note(&self, note: Note) {
        if let Some(counter) = self.verdicts.borrow_mut().get_mut(note.counter()) {
            *counter += 1;
        }
    }
    fn count_traffic(&self, backend: u32, more: Traffic) {
        if let Some(traffic) = self.traffic.borrow_mut().get_mut(backend as usize) {
            *traffic += more;
        }
    }
}
