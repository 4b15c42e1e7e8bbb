//! The maps, and the tables they are. Each method is one map at one call site, which the kernel turns
//! into a few instructions for arrays; a map that is chosen at run time would cost a call.
//!
//! Sizes given here are placeholders, except for maps that always have the same: the daemon sets them
//! from its document before it loads the program.

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
};
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use lb_common::{
    abi::{
        Address, AddressV4, Backend, Budget, Config, Flow, INTERFACES as INTERFACE_COUNT, Listeners, Page,
        Records, RuleV4, RuleV6, Service, Side, SidePage, Slot, Source, Tick, Traffic, Vip,
    },
    datapath::{flow, record, unsettled},
    shared::Shared,
    tables::Tables,
    verdict::{COUNTERS, Note, Verdict},
};

/// Read and written by the daemon as memory.
const MAPPED: u32 = BPF_F_MMAPABLE;

/// Whether there are no sides, records, flows and answers. Always zero but for a test, which asks what the verifier
/// walks for packets of settled slots alone: it knows this number when it looks at the program, and leaves out what
/// cannot be. Only read where most packets do not come.
#[unsafe(no_mangle)]
static SETTLED_ONLY: Global<u8> = Global::new(0);

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, MAPPED);
#[map]
static LISTENERS: Array<Listeners> = Array::with_max_entries(16, MAPPED);
#[map]
static VIPS_V4: HashMap<AddressV4, Vip> = HashMap::with_max_entries(16, 0);
#[map]
static VIPS_V6: HashMap<Address, Vip> = HashMap::with_max_entries(16, 0);
#[map]
static SERVICES: Array<Service> = Array::with_max_entries(16, MAPPED);
#[map]
static RULES_V4: LpmTrie<RuleV4, u32> = LpmTrie::with_max_entries(16, 0);
#[map]
static RULES_V6: LpmTrie<RuleV6, u32> = LpmTrie::with_max_entries(16, 0);
#[map]
static PAGES: Array<Page> = Array::with_max_entries(16, MAPPED);
#[map]
static SIDES: Array<SidePage> = Array::with_max_entries(16, MAPPED);
#[map]
static RECORDS: Array<Records> = Array::with_max_entries(16, MAPPED);
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(16, MAPPED);
#[map]
static CURSORS: Array<u64> = Array::with_max_entries(16, MAPPED);
#[map]
static TURNS: Array<u64> = Array::with_max_entries(16, MAPPED);
#[map]
static SOURCE_KEYS_V4: HashMap<AddressV4, u32> = HashMap::with_max_entries(16, 0);
#[map]
static SOURCE_KEYS_V6: HashMap<Address, u32> = HashMap::with_max_entries(16, 0);
#[map]
static SOURCES: Array<Source> = Array::with_max_entries(16, MAPPED);
#[map]
static INTERFACES: Array<u64> = Array::with_max_entries(INTERFACE_COUNT, MAPPED);
#[map]
static FLOWS: Array<Flow> = Array::with_max_entries(16, MAPPED);
#[map]
static VERDICTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS as u32, 0);
#[map]
static TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(16, 0);
#[map]
static BUDGET: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);

/// A trie's key is packed; what is on the stack must be aligned.
#[repr(align(8))]
struct Aligned<T>(T);

/// The tables that are these maps.
pub(crate) struct Maps;

/// Adds to a word that other CPUs add to as well; what it was before.
#[inline(always)]
fn add(word: *mut u64, by: u64) -> u64 {
    // SAFETY: a pointer that an array map just gave out, aligned to its 8-byte values.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(word, by) }
}

/// A global function: the verifier takes it to give back any number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn search_ports(lane: u64, ports: u64, now: u32) -> u64 {
    flow::search_ports(&Maps, lane, ports, now)
}

/// A global function: the verifier takes it to give back any number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_way(line: u32, now: u32) -> u64 {
    record::take_way(&Maps, line, now)
}

/// A global function: the verifier takes it to give back any number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn choose_unsettled(at: u64, hash: u64, asked: u64, sequence: u32, now: u32) -> u64 {
    unsettled::choose(&Maps, at, hash, asked, sequence, now)
}

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn listeners(&self, line: u32) -> Option<&Listeners> {
        LISTENERS.get(line)
    }

    #[inline(always)]
    fn vip_v4(&self, address: AddressV4) -> Option<Vip> {
        // SAFETY: copied at once; each field means something without the others.
        unsafe { VIPS_V4.get(address) }.copied()
    }

    #[inline(always)]
    fn vip_v6(&self, address: Address) -> Option<Vip> {
        // SAFETY: copied at once; each field means something without the others.
        unsafe { VIPS_V6.get(address) }.copied()
    }

    #[inline(always)]
    fn service(&self, index: u32) -> Option<&Service> {
        SERVICES.get(index)
    }

    #[inline(always)]
    fn rule_v4(&self, source: &RuleV4) -> Option<u32> {
        let key = Aligned(Key::new(8 * size_of::<RuleV4>() as u32, *source));
        RULES_V4.get(&key.0).copied()
    }

    #[inline(always)]
    fn rule_v6(&self, source: &RuleV6) -> Option<u32> {
        let key = Aligned(Key::new(8 * size_of::<RuleV6>() as u32, *source));
        RULES_V6.get(&key.0).copied()
    }

    #[inline(always)]
    fn slot(&self, page: u32, slot: usize) -> Option<Slot> {
        Some(Slot(PAGES.get(page)?.slots.get(slot)?.get()))
    }

    #[inline(always)]
    fn side(&self, page: u32, slot: usize) -> Option<&Side> {
        if SETTLED_ONLY.load() != 0 {
            return None;
        }
        SIDES.get(page)?.sides.get(slot)
    }

    #[inline(always)]
    fn records(&self, line: u32) -> Option<&Records> {
        if SETTLED_ONLY.load() != 0 {
            return None;
        }
        RECORDS.get(line)
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<&Backend> {
        BACKENDS.get(index)
    }

    #[inline(always)]
    fn advance_cursor(&self, backend: u32, by: u64) -> Option<u64> {
        CURSORS.get_ptr_mut(backend).map(|word| add(word, by))
    }

    #[inline(always)]
    fn take_turn(&self, service: u32) -> Option<u64> {
        TURNS.get_ptr_mut(service).map(|word| add(word, 1))
    }

    #[inline(always)]
    fn source_key_v4(&self, address: AddressV4) -> Option<u32> {
        // SAFETY: a plain number, copied at once.
        unsafe { SOURCE_KEYS_V4.get(address) }.copied()
    }

    #[inline(always)]
    fn source_key_v6(&self, address: Address) -> Option<u32> {
        // SAFETY: a plain number, copied at once.
        unsafe { SOURCE_KEYS_V6.get(address) }.copied()
    }

    #[inline(always)]
    fn source(&self, index: u32) -> Option<&Source> {
        SOURCES.get(index)
    }

    #[inline(always)]
    fn interface_mac(&self, interface: u32) -> Option<u64> {
        INTERFACES.get(interface).copied()
    }

    #[inline(always)]
    fn flow(&self, index: u32) -> Option<&Flow> {
        if SETTLED_ONLY.load() != 0 {
            return None;
        }
        FLOWS.get(index)
    }

    #[inline(always)]
    fn swap(&self, word: &Shared<u64>, old: u64, new: u64) -> bool {
        // SAFETY: the word is one of a map's value, aligned; the instruction is atomic.
        unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                word.as_ptr(),
                old,
                new,
            )
        }
        .1
    }

    #[inline(always)]
    fn search_ports(&self, lane: u64, ports: u64, now: u32) -> u64 {
        search_ports(lane, ports, now)
    }

    #[inline(always)]
    fn take_way(&self, line: u32, now: u32) -> u64 {
        take_way(line, now)
    }

    #[inline(always)]
    fn choose_unsettled(&self, at: u64, hash: u64, asked: u64, sequence: u32, now: u32) -> u64 {
        choose_unsettled(at, hash, asked, sequence, now)
    }

    #[inline(always)]
    fn spend_reset(&self, now: Tick, per_second: u32) -> bool {
        if SETTLED_ONLY.load() != 0 {
            return false;
        }
        // SAFETY: this CPU's own value, and XDP programs do not interrupt one another.
        BUDGET.get_ptr_mut(0).is_some_and(|budget| unsafe { (*budget).spend(now, per_second) })
    }

    #[inline(always)]
    fn count(&self, verdict: Verdict) {
        if let Some(counter) = VERDICTS.get_ptr_mut(verdict.counter() as u32) {
            // SAFETY: this CPU's own value.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn note(&self, note: Note) {
        if let Some(counter) = VERDICTS.get_ptr_mut(note.counter() as u32) {
            // SAFETY: this CPU's own value.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn count_traffic(&self, backend: u32, more: Traffic) {
        if let Some(traffic) = TRAFFIC.get_ptr_mut(backend) {
            // SAFETY: this CPU's own value.
            unsafe { *traffic += more };
        }
    }
}
