//! Tables on which another CPU comes between: at a compare-and-swap that is chosen, before it is made.

use std::cell::{Cell, RefCell};

use lb_common::{
    abi::{
        Address, AddressV4, Backend, Config, Flow, Listeners, Records, RuleV4, RuleV6, Service, Side, Slot,
        Source, Tick, Traffic, Vip,
    },
    datapath::{flow, record, unsettled},
    shared::Shared,
    sim::MemTables,
    tables::Tables,
    verdict::{Note, Verdict},
};

/// The tables as one CPU sees them.
pub struct Meeting<'a> {
    tables: &'a MemTables,
    /// Swaps until the other comes.
    left: Cell<u32>,
    other: RefCell<Option<Box<dyn FnOnce() + 'a>>>,
}

impl<'a> Meeting<'a> {
    /// Before the swap with this number, from zero, the other CPU does this.
    pub fn new(tables: &'a MemTables, at: u32, other: impl FnOnce() + 'a) -> Self {
        Self { tables, left: Cell::new(at), other: RefCell::new(Some(Box::new(other))) }
    }

    /// Whether the other has come.
    pub fn happened(&self) -> bool {
        self.other.borrow().is_none()
    }
}

impl Tables for Meeting<'_> {
    fn config(&self) -> Option<&Config> {
        self.tables.config()
    }
    fn listeners(&self, line: u32) -> Option<&Listeners> {
        self.tables.listeners(line)
    }
    fn vip_v4(&self, address: AddressV4) -> Option<Vip> {
        self.tables.vip_v4(address)
    }
    fn vip_v6(&self, address: Address) -> Option<Vip> {
        self.tables.vip_v6(address)
    }
    fn service(&self, index: u32) -> Option<&Service> {
        self.tables.service(index)
    }
    fn rule_v4(&self, source: &RuleV4) -> Option<u32> {
        self.tables.rule_v4(source)
    }
    fn rule_v6(&self, source: &RuleV6) -> Option<u32> {
        self.tables.rule_v6(source)
    }
    fn slot(&self, page: u32, slot: usize) -> Option<Slot> {
        self.tables.slot(page, slot)
    }
    fn side(&self, page: u32, slot: usize) -> Option<&Side> {
        self.tables.side(page, slot)
    }
    fn records(&self, line: u32) -> Option<&Records> {
        self.tables.records(line)
    }
    fn backend(&self, index: u32) -> Option<&Backend> {
        self.tables.backend(index)
    }
    fn advance_cursor(&self, backend: u32, by: u64) -> Option<u64> {
        self.tables.advance_cursor(backend, by)
    }
    fn take_turn(&self, service: u32) -> Option<u64> {
        self.tables.take_turn(service)
    }
    fn source_key_v4(&self, address: AddressV4) -> Option<u32> {
        self.tables.source_key_v4(address)
    }
    fn source_key_v6(&self, address: Address) -> Option<u32> {
        self.tables.source_key_v6(address)
    }
    fn source(&self, index: u32) -> Option<&Source> {
        self.tables.source(index)
    }
    fn interface_mac(&self, interface: u32) -> Option<u64> {
        self.tables.interface_mac(interface)
    }
    fn flow(&self, index: u32) -> Option<&Flow> {
        self.tables.flow(index)
    }
    fn swap(&self, word: &Shared<u64>, old: u64, new: u64) -> bool {
        let left = self.left.get();
        self.left.set(left.wrapping_sub(1));
        if left == 0
            && let Some(other) = self.other.take()
        {
            other();
        }
        self.tables.swap(word, old, new)
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
        self.tables.spend_reset(now, per_second)
    }
    fn count(&self, verdict: Verdict) {
        self.tables.count(verdict);
    }
    fn note(&self, note: Note) {
        self.tables.note(note);
    }
    fn count_traffic(&self, backend: u32, more: Traffic) {
        self.tables.count_traffic(backend, more);
    }
}
