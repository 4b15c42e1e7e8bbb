//! The tables as the packet path sees them: one method per operation.
//!
//! Two implementations: the BPF maps (lb-ebpf), where each method is one map at one call site, so that
//! the kernel can inline the look-up; and memory ([`crate::sim::MemTables`]), for everything that runs
//! on the host. What is shared between CPUs is handed out as references to [`Shared`] words, so that
//! the algorithms on them stand in [`crate::datapath`] once.

use crate::{
    abi::{
        Address, AddressV4, Backend, Config, Flow, Listeners, Records, RuleV4, RuleV6, Service, Side, Slot,
        Source, Tick, Traffic, Vip,
    },
    shared::Shared,
    verdict::{Note, Verdict},
};

/// Everything that a decision reads and writes besides the frame.
pub trait Tables {
    /// What holds for all packets.
    fn config(&self) -> Option<&Config>;

    /// A line of listeners.
    fn listeners(&self, line: u32) -> Option<&Listeners>;
    /// What is known of a service's address.
    fn vip_v4(&self, address: AddressV4) -> Option<Vip>;
    /// What is known of a service's address.
    fn vip_v6(&self, address: Address) -> Option<Vip>;
    /// A service.
    fn service(&self, index: u32) -> Option<&Service>;

    /// The [`crate::abi::Action`] of the longest matching rule.
    fn rule_v4(&self, source: &RuleV4) -> Option<u32>;
    /// The [`crate::abi::Action`] of the longest matching rule.
    fn rule_v6(&self, source: &RuleV6) -> Option<u32>;

    /// A slot of a page of a ring.
    fn slot(&self, page: u32, slot: usize) -> Option<Slot>;
    /// The side of a slot, on a page of sides.
    fn side(&self, page: u32, slot: usize) -> Option<&Side>;
    /// A line of records.
    fn records(&self, line: u32) -> Option<&Records>;
    /// A backend.
    fn backend(&self, index: u32) -> Option<&Backend>;
    /// Moves a backend's port cursor on; what it was before.
    fn advance_cursor(&self, backend: u32, by: u64) -> Option<u64>;
    /// Takes a turn of a round-robin service; how many were taken before.
    fn take_turn(&self, service: u32) -> Option<u64>;

    /// Index of the source with this address.
    fn source_key_v4(&self, address: AddressV4) -> Option<u32>;
    /// Index of the source with this address.
    fn source_key_v6(&self, address: Address) -> Option<u32>;
    /// A source.
    fn source(&self, index: u32) -> Option<&Source>;
    /// Our MAC address on an interface, see [`crate::abi::name::INTERFACES`]; zero: none.
    fn interface_mac(&self, interface: u32) -> Option<u64>;

    /// A flow.
    fn flow(&self, index: u32) -> Option<&Flow>;
    /// Writes `new` if the word is `old` still, as one step that no other CPU can come between.
    fn swap(&self, word: &Shared<u64>, old: u64, new: u64) -> bool;

    /// [`crate::datapath::flow::search_ports`] on these tables. In BPF a global function, which the verifier
    /// looks at once, whatever its callers know of its arguments; inlined, the loop would be walked again for
    /// each way that leads there, and Linux 6.1 would give up.
    fn search_ports(&self, lane: u64, ports: u64, now: u32) -> u64;
    /// [`crate::datapath::record::take_way`] on these tables; a global function for the same reason.
    fn take_way(&self, line: u32, now: u32) -> u64;

    /// [`crate::datapath::unsettled::choose`] on these tables; a global function for the same reason.
    fn choose_unsettled(&self, at: u64, hash: u64, asked: u64, sequence: u32, now: u32) -> u64;

    /// Takes one of this second's resets.
    fn spend_reset(&self, now: Tick, per_second: u32) -> bool;
    /// Counts a verdict.
    fn count(&self, verdict: Verdict);
    /// Counts what happened to a record.
    fn note(&self, note: Note);
    /// Counts what went to or came from a backend.
    fn count_traffic(&self, backend: u32, more: Traffic);
}
