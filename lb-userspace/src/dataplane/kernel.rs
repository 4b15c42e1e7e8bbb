//! The data plane in the kernel: the maps of lb-ebpf, pinned so that they outlive the daemon.
//!
//! Arrays are mapped into memory (`mapped`) and changed by single stores; hash maps and tries, which
//! only lead to indices, are changed by system calls, each of which is atomic for packets.

mod live;
mod mapped;
mod program;
mod read;
#[cfg(feature = "trace")]
mod trace;
mod write;

use std::{
    collections::BTreeMap,
    error::Error,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};
use lb_common::{
    abi::{self, Address, AddressV4, RuleV4, RuleV6, Traffic, Vip, name},
    shared::Shared,
    sim::MemTables,
    verdict::COUNTERS,
};

use self::{
    mapped::{Mapped, Words},
    program::{Pins, Program},
};
use super::{
    Dataplane, DataplaneError, FlowEntry, Op, RecordEntry, Ring, SideEntry, Tables,
    cells::{self, Cells},
};
use crate::{
    daemon::plane::{Notice, Plane},
    model::Limits,
};

pub use self::{
    live::Ran,
    program::{GENERATOR, is_pinned, pinned_links, remove_pins, verified_where_settled},
};

/// Why the data plane could not be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel refuses the program or a map.
    #[error("the kernel does not take the program: {0}; `lb doctor` names what it lacks")]
    Load(String),
    /// The process may not.
    #[error(
        "{0}: this needs root's rights, or the capabilities CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW and CAP_PERFMON; run it with sudo"
    )]
    Rights(String),
    /// The object lacks something: another build.
    #[error("the built-in object has no {0}: a build of mixed versions")]
    NoMap(&'static str),
    /// Tables of another version are pinned.
    #[error(
        "{} holds tables of another layout than {ours}, which this build has; nothing was touched. Start the build \
         that made them, or take them down with its `lb detach`, which ends their connections", .found.display()
    )]
    OtherLayout {
        /// What was found.
        found: PathBuf,
        /// The version of this build.
        ours: u32,
    },
    /// The pins cannot be read or written.
    #[error("{} cannot be used for pinning: {source}", .path.display())]
    Pins {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A map cannot be mapped into memory.
    #[error("table {table} cannot be mapped into memory: {source}")]
    Memory {
        /// Which.
        table: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl OpenError {
    /// The whole chain of causes in one sentence.
    fn load(error: impl Error) -> Self {
        let mut text = error.to_string();
        let mut denied = false;
        let mut cause = error.source();
        while let Some(error) = cause {
            let errno = error.downcast_ref().and_then(io::Error::raw_os_error);
            denied |= errno == Some(libc::EPERM);
            let next = error.to_string();
            if !text.contains(&next) {
                text = format!("{text}: {next}");
            }
            cause = error.source();
        }
        if denied { Self::Rights(text) } else { Self::Load(text) }
    }
}

/// The data plane in the kernel.
pub struct KernelDataplane {
    program: Program,
    limits: Limits,
    config: Mapped<abi::Config>,
    listeners: Mapped<abi::Listeners>,
    services: Mapped<abi::Service>,
    pages: Mapped<abi::Page>,
    sides: Mapped<abi::SidePage>,
    records: Mapped<abi::Records>,
    backends: Mapped<abi::Backend>,
    sources: Mapped<abi::Source>,
    interfaces: Mapped<Shared<u64>>,
    flows: Mapped<abi::Flow>,
    cursors: Mapped<Shared<u64>>,
    turns: Mapped<Shared<u64>>,
    vips_v4: HashMap<MapData, AddressV4, Vip>,
    vips_v6: HashMap<MapData, Address, Vip>,
    source_keys_v4: HashMap<MapData, AddressV4, u32>,
    source_keys_v6: HashMap<MapData, Address, u32>,
    rules_v4: LpmTrie<MapData, RuleV4, u32>,
    rules_v6: LpmTrie<MapData, RuleV6, u32>,
    verdicts: PerCpuArray<MapData, u64>,
    traffic: PerCpuArray<MapData, Traffic>,
}

impl KernelDataplane {
    /// Adopts what is pinned below `bpffs`, or makes it: new tables have the sizes of `limits`, pinned
    /// ones keep theirs. Without `bpffs` nothing is pinned, and all ends with this process.
    ///
    /// Packets are not led anywhere yet, see [`Plane::attach`]; an earlier daemon's program goes on
    /// until then.
    ///
    /// # Errors
    /// When the kernel refuses, or tables of another layout are pinned; nothing is changed then.
    pub fn open(bpffs: Option<&Path>, limits: Limits) -> Result<Self, OpenError> {
        let pins = bpffs.map(Pins::below).transpose()?;
        let mut program = Program::load(limits, pins)?;
        let (config, _) = memory(&mut program, name::CONFIG)?;
        let (listeners, line_count) = memory(&mut program, name::LISTENERS)?;
        let (services, service_count) = memory(&mut program, name::SERVICES)?;
        let (pages, ring_pages) = memory(&mut program, name::PAGES)?;
        let (sides, side_pages) = memory(&mut program, name::SIDES)?;
        let (records, record_lines) = memory(&mut program, name::RECORDS)?;
        let (backends, backend_count) = memory(&mut program, name::BACKENDS)?;
        let (sources, _) = memory(&mut program, name::SOURCES)?;
        let (interfaces, _) = memory(&mut program, name::INTERFACES)?;
        let (flows, flow_count) = memory(&mut program, name::FLOWS)?;
        let (cursors, _) = memory(&mut program, name::CURSORS)?;
        let (turns, _) = memory(&mut program, name::TURNS)?;
        let rules = program.take_map(name::RULES_V4)?;
        let rule_count = match &rules {
            Map::LpmTrie(map) => program::entries(map)?,
            _ => return Err(OpenError::NoMap(name::RULES_V4)),
        };
        let limits = Limits {
            flows: flow_count,
            services: service_count,
            backends: backend_count,
            ring_pages,
            side_pages,
            rules: rule_count,
        };
        let plane = Self {
            limits,
            config,
            listeners,
            services,
            pages,
            sides,
            records,
            backends,
            sources,
            interfaces,
            flows,
            cursors,
            turns,
            vips_v4: typed(&mut program, name::VIPS_V4)?,
            vips_v6: typed(&mut program, name::VIPS_V6)?,
            source_keys_v4: typed(&mut program, name::SOURCE_KEYS_V4)?,
            source_keys_v6: typed(&mut program, name::SOURCE_KEYS_V6)?,
            rules_v4: rules.try_into().map_err(OpenError::load)?,
            rules_v6: typed(&mut program, name::RULES_V6)?,
            verdicts: typed(&mut program, name::VERDICTS)?,
            traffic: typed(&mut program, name::TRAFFIC)?,
            program,
        };
        let config = plane.config();
        config.listener_mask.set(line_count - 1);
        config.flow_mask.set(flow_count - 1);
        config.record_mask.set(record_lines - 1);
        Ok(plane)
    }

    fn config(&self) -> &abi::Config {
        &self.config[0]
    }
}

impl Cells for KernelDataplane {
    fn config(&self) -> &abi::Config {
        self.config()
    }
    fn listeners(&self) -> &[abi::Listeners] {
        &self.listeners
    }
    fn services(&self) -> &[abi::Service] {
        &self.services
    }
    fn pages(&self) -> &[abi::Page] {
        &self.pages
    }
    fn sides(&self) -> &[abi::SidePage] {
        &self.sides
    }
    fn backends(&self) -> &[abi::Backend] {
        &self.backends
    }
    fn records(&self) -> &[abi::Records] {
        &self.records
    }
}

impl Dataplane for KernelDataplane {
    fn tables(&self) -> Result<Tables, DataplaneError> {
        self.read_tables()
    }

    fn apply(&mut self, op: &Op) -> Result<(), DataplaneError> {
        self.write(op)
    }

    fn verdicts(&self) -> Result<Vec<u64>, DataplaneError> {
        (0..COUNTERS as u32)
            .map(|index| Ok(self.verdicts.get(&index, 0).map_err(unread(name::VERDICTS))?.iter().sum()))
            .collect()
    }

    fn traffic(&self) -> Result<BTreeMap<u32, Traffic>, DataplaneError> {
        self.backends_in_use()
            .map(|(index, _)| {
                let mut sum = Traffic::default();
                for cpu in self.traffic.get(&index, 0).map_err(unread(name::TRAFFIC))?.iter() {
                    sum += *cpu;
                }
                Ok((index, sum))
            })
            .collect()
    }

    fn now(&self) -> Result<abi::Tick, DataplaneError> {
        read::clock("(clock)")
    }

    fn sides(&self, ring: &Ring) -> Result<Arc<[SideEntry]>, DataplaneError> {
        cells::read_sides(self, ring)
    }

    fn records(&self, visit: &mut dyn FnMut(&RecordEntry)) -> Result<(), DataplaneError> {
        self.visit_records(visit)
    }

    fn flows(&self, visit: &mut dyn FnMut(&FlowEntry)) -> Result<(), DataplaneError> {
        self.visit_flows(visit)
    }
}

impl Plane for KernelDataplane {
    fn attach(&mut self, interfaces: &BTreeMap<String, u32>) -> Result<Vec<Notice>, String> {
        self.program.attach(interfaces)
    }

    fn copied(&self) -> Result<MemTables, String> {
        self.copy().map_err(|error| error.to_string())
    }

    fn take_down(&mut self) -> Result<(), String> {
        self.program.take_down()
    }
}

/// An array map as memory, and its number of entries.
fn memory<T: Words>(program: &mut Program, table: &'static str) -> Result<(Mapped<T>, u32), OpenError> {
    let map = data(program.take_map(table)?)?;
    let entries = program::entries(&map)?;
    let mapped =
        Mapped::new(map.fd().as_fd(), entries).map_err(|source| OpenError::Memory { table, source })?;
    Ok((mapped, entries))
}

fn data(map: Map) -> Result<MapData, OpenError> {
    match map {
        Map::Array(map) => Ok(map),
        _ => Err(OpenError::NoMap("array map")),
    }
}

fn typed<T: TryFrom<Map, Error = MapError>>(
    program: &mut Program,
    table: &'static str,
) -> Result<T, OpenError> {
    program.take_map(table)?.try_into().map_err(OpenError::load)
}

/// An error while reading a table.
fn unread(table: &'static str) -> impl Fn(MapError) -> DataplaneError {
    move |error| failed(table, "read", error)
}

/// An error while writing a table.
fn unwritten(table: &'static str) -> impl Fn(MapError) -> DataplaneError {
    move |error| failed(table, "written", error)
}

fn failed(table: &'static str, action: &'static str, error: MapError) -> DataplaneError {
    let source = match error {
        MapError::SyscallError(error) => error.io_error,
        other => io::Error::other(other),
    };
    DataplaneError::System { table, action, source }
}
