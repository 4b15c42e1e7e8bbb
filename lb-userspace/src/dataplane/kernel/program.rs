//! The program in the kernel: loaded over new or pinned maps, led to from interfaces, taken away.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData},
    programs::{
        ProgramFd, TestRun as _, TestRunOptions, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
        xdp::{XdpLink, XdpLinkId},
    },
};
use lb_common::{
    abi::{LAYOUT_VERSION, name},
    datapath::listener::lines_for,
};

#[cfg(feature = "trace")]
use super::trace::Trace;
use super::{OpenError, live::Ran};
use crate::{daemon::plane::Notice, dataplane::MAX_SOURCES, model::Limits};

/// The object that `build.rs` made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lobby.bpf.o"));

/// The object of the packet benchmark's generator.
pub static GENERATOR: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/generator.bpf.o"));

/// A record has eight ways to be in, on two lines of four. With four ways for each flow there is no room in one
/// case of some five thousand when the table is full, and hardly ever before.
const FLOWS_PER_LINE: u32 = 1;

/// Where a program's objects are pinned.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    /// `<bpffs>/lobby`.
    base: PathBuf,
    /// `<bpffs>/lobby/layout-<version>`: the version is pinned as part of the path of everything.
    layout: PathBuf,
}

impl Pins {
    /// The pins of this version below a BPF file system, once it is clear that there are none of
    /// another version.
    pub(super) fn below(bpffs: &Path) -> Result<Self, OpenError> {
        let base = base(bpffs);
        let ours = format!("layout-{LAYOUT_VERSION}");
        for found in read_dir(&base)? {
            if found != ours {
                return Err(OpenError::OtherLayout { found: base.join(found), ours: LAYOUT_VERSION });
            }
        }
        let layout = base.join(ours);
        Ok(Self { base, layout })
    }

    /// Makes the directories.
    pub(super) fn make(&self) -> Result<(), OpenError> {
        let made = fs::create_dir_all(self.layout.join("links"));
        made.map_err(|source| OpenError::Pins { path: self.layout.clone(), source })
    }

    fn map(&self, map: &str) -> PathBuf {
        self.layout.join(map)
    }

    fn link(&self, interface: &str) -> PathBuf {
        self.layout.join("links").join(interface)
    }

    fn links(&self) -> Result<Vec<String>, OpenError> {
        read_dir(&self.layout.join("links"))
    }

    /// Removes every pin; what nobody holds open is gone then. Links first: no packet meets a program
    /// whose tables go.
    pub(super) fn remove(&self) -> io::Result<()> {
        for directory in [self.layout.join("links"), self.layout.clone()] {
            if directory.exists() {
                fs::remove_dir_all(directory)?;
            }
        }
        if self.base.exists() {
            fs::remove_dir(&self.base)?;
        }
        Ok(())
    }
}

/// Names in a directory; none if there is no directory.
fn read_dir(path: &Path) -> Result<Vec<String>, OpenError> {
    let failed = |source| OpenError::Pins { path: path.to_owned(), source };
    match fs::read_dir(path) {
        Ok(entries) => entries
            .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()).map_err(failed))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// The program and where it is led to.
#[derive(Debug)]
pub(super) struct Program {
    ebpf: Ebpf,
    pins: Option<Pins>,
    /// Links by interface: held here, and pinned too unless everything ends with this process.
    links: BTreeMap<String, (u32, XdpLinkId)>,
    /// Reads what the program says of each packet.
    #[cfg(feature = "trace")]
    _trace: Trace,
}

impl Program {
    /// Loads the program over pinned maps where there are any, else over new ones of these sizes.
    pub(super) fn load(limits: Limits, pins: Option<Pins>) -> Result<Self, OpenError> {
        let fresh = pins.as_ref().is_some_and(|pins| !pins.layout.exists());
        match Self::try_load(limits, pins.as_ref()) {
            #[cfg(feature = "trace")]
            Ok(mut ebpf) => Ok(Self { _trace: Trace::start(&mut ebpf)?, ebpf, pins, links: BTreeMap::new() }),
            #[cfg(not(feature = "trace"))]
            Ok(ebpf) => Ok(Self { ebpf, pins, links: BTreeMap::new() }),
            Err(error) => {
                // What was begun here and holds nothing would pass for tables at the next start.
                if let Some(pins) = pins.filter(|_| fresh)
                    && let Err(source) = pins.remove()
                {
                    return Err(OpenError::Pins { path: pins.layout, source });
                }
                Err(error)
            }
        }
    }

    fn try_load(limits: Limits, pins: Option<&Pins>) -> Result<Ebpf, OpenError> {
        let mut loader = EbpfLoader::new();
        for (map, entries) in sizes(limits) {
            loader.map_max_entries(map, entries);
        }
        if let Some(pins) = pins {
            pins.make()?;
            for map in name::ALL {
                loader.map_pin_path(map, pins.map(map));
            }
        }
        let mut ebpf = loader.load(OBJECT).map_err(OpenError::load)?;
        let program = xdp(&mut ebpf)?;
        program.load().map_err(OpenError::load)?;
        Ok(ebpf)
    }

    /// A map of the program.
    pub(super) fn take_map(&mut self, map: &'static str) -> Result<Map, OpenError> {
        self.ebpf.take_map(map).ok_or(OpenError::NoMap(map))
    }

    /// Leads the packets of exactly these interfaces (name and index) to the program.
    pub(super) fn attach(&mut self, interfaces: &BTreeMap<String, u32>) -> Result<Vec<Notice>, String> {
        self.detach_others(interfaces)?;
        let mut notices = Vec::new();
        for (interface, &index) in interfaces {
            if self.links.get(interface).is_some_and(|(attached, _)| *attached == index) {
                continue;
            }
            self.links.remove(interface);
            notices.extend(self.attach_one(interface, index)?);
        }
        Ok(notices)
    }

    /// Ends what was led here before and is not listed, by this process or one before it.
    fn detach_others(&mut self, interfaces: &BTreeMap<String, u32>) -> Result<(), String> {
        if let Some(pins) = &self.pins {
            for interface in pins.links().map_err(|error| error.to_string())? {
                if !interfaces.contains_key(&interface) {
                    let path = pins.link(&interface);
                    fs::remove_file(&path)
                        .map_err(|error| format!("{} cannot be removed: {error}", path.display()))?;
                }
            }
        }
        let gone: Vec<String> =
            self.links.keys().filter(|name| !interfaces.contains_key(*name)).cloned().collect();
        for interface in gone {
            if let Some((_, link)) = self.links.remove(&interface) {
                let program = xdp(&mut self.ebpf).map_err(|error| error.to_string())?;
                program.detach(link).map_err(|error| format!("interface {interface}: {error}"))?;
            }
        }
        Ok(())
    }

    fn attach_one(&mut self, interface: &str, index: u32) -> Result<Option<Notice>, String> {
        if let Some(link) = self.pinned(interface, index)? {
            // One system call puts this program in the place of the one before: no packet sees neither.
            let program = xdp(&mut self.ebpf).map_err(|error| error.to_string())?;
            let id =
                program.attach_to_link(link).map_err(|error| format!("interface {interface}: {error}"))?;
            self.links.insert(interface.to_owned(), (index, id));
            return Ok(None);
        }
        let program = xdp(&mut self.ebpf).map_err(|error| error.to_string())?;
        let (id, notice) = match program.attach_to_if_index(index, XdpMode::Driver) {
            Ok(id) => (id, Notice { interface: interface.to_owned(), native: true, reason: String::new() }),
            Err(native) if is_busy(&native) => return Err(busy(interface)),
            Err(native) => match program.attach_to_if_index(index, XdpMode::Skb) {
                Ok(id) => {
                    let reason = root_cause(&native);
                    (id, Notice { interface: interface.to_owned(), native: false, reason })
                }
                Err(generic) if is_busy(&generic) => return Err(busy(interface)),
                Err(generic) => {
                    return Err(format!(
                        "the program cannot be attached to interface {interface}: natively: {}; generically: {}",
                        root_cause(&native),
                        root_cause(&generic)
                    ));
                }
            },
        };
        let id = match &self.pins {
            None => id,
            Some(pins) => {
                let failed = |error: &dyn std::fmt::Display| {
                    format!("the link of interface {interface} cannot be pinned: {error}")
                };
                let link = program.take_link(id).map_err(|error| failed(&error))?;
                let link = FdLink::try_from(link).map_err(|error| failed(&error))?;
                let pinned = link.pin(pins.link(interface)).map_err(|error| failed(&error))?;
                let link = XdpLink::try_from(FdLink::from(pinned)).map_err(|error| failed(&error))?;
                program.attach_to_link(link).map_err(|error| failed(&error))?
            }
        };
        self.links.insert(interface.to_owned(), (index, id));
        Ok(Some(notice))
    }

    /// The link that an earlier process pinned for this interface; one for another index, or of an
    /// interface that is gone, is removed.
    fn pinned(&self, interface: &str, index: u32) -> Result<Option<XdpLink>, String> {
        let Some(pins) = &self.pins else { return Ok(None) };
        let path = pins.link(interface);
        if !path.exists() {
            return Ok(None);
        }
        let failed =
            |error: &dyn std::fmt::Display| format!("the pinned link {} is no use: {error}", path.display());
        let pinned = PinnedLink::from_pin(&path).map_err(|error| failed(&error))?;
        let link = FdLink::from(pinned);
        if interface_of(&link).map_err(|error| failed(&error))? != Some(index) {
            fs::remove_file(&path).map_err(|error| failed(&error))?;
            return Ok(None);
        }
        XdpLink::try_from(link).map(Some).map_err(|error| failed(&error))
    }

    /// Runs the program on one frame.
    pub(super) fn run_once(&mut self, frame: &[u8]) -> Result<Ran, String> {
        let program = xdp(&mut self.ebpf).map_err(|error| error.to_string())?;
        let mut out = vec![0; frame.len()];
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..Default::default() };
        let result = program.test_run(options).map_err(|error| root_cause(&error))?;
        out.truncate(result.data_size_out as usize);
        Ok(Ran { action: result.return_value, frame: out })
    }

    pub(super) fn fd(&mut self) -> Result<ProgramFd, String> {
        let program = xdp(&mut self.ebpf).map_err(|error| error.to_string())?;
        let fd = program.fd().map_err(|error| root_cause(&error))?;
        fd.try_clone().map_err(|error| error.to_string())
    }

    pub(super) fn verified_instructions(&mut self) -> Result<Option<u32>, String> {
        let program = xdp(&mut self.ebpf).map_err(|error| error.to_string())?;
        program.info().map(|info| info.verified_instruction_count()).map_err(|error| root_cause(&error))
    }

    /// Takes everything away.
    pub(super) fn take_down(&mut self) -> Result<(), String> {
        self.detach_others(&BTreeMap::new())?;
        match &self.pins {
            None => Ok(()),
            Some(pins) => pins
                .remove()
                .map_err(|error| format!("pins below {} cannot be removed: {error}", pins.base.display())),
        }
    }
}

/// How many instructions the verifier walks where there is nothing but settled slots: what most packets go through.
/// `None`: the kernel does not say.
///
/// # Errors
/// When the kernel refuses the program.
pub fn verified_where_settled() -> Result<Option<u32>, OpenError> {
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTLED_ONLY", &1u8, true);
    let mut ebpf = loader.load(OBJECT).map_err(OpenError::load)?;
    let program = xdp(&mut ebpf)?;
    program.load().map_err(OpenError::load)?;
    program.info().map(|info| info.verified_instruction_count()).map_err(OpenError::load)
}

/// Whether something is pinned, of any layout.
pub fn is_pinned(bpffs: &Path) -> bool {
    base(bpffs).exists()
}

fn base(bpffs: &Path) -> PathBuf {
    bpffs.join("lobby")
}

/// The interfaces whose links are pinned, of any layout.
pub fn pinned_links(bpffs: &Path) -> BTreeSet<String> {
    let entries = |directory: &Path| fs::read_dir(directory).into_iter().flatten().flatten();
    let links = entries(&base(bpffs)).flat_map(|layout| entries(&layout.path().join("links")));
    links.filter_map(|link| link.file_name().into_string().ok()).collect()
}

/// Removes what is pinned, of any layout, without loading anything.
pub fn remove_pins(bpffs: &Path) -> io::Result<bool> {
    let base = base(bpffs);
    if !is_pinned(bpffs) {
        return Ok(false);
    }
    for layout in fs::read_dir(&base)? {
        let links = layout?.path().join("links");
        if links.exists() {
            fs::remove_dir_all(links)?;
        }
    }
    fs::remove_dir_all(&base)?;
    Ok(true)
}

fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp, OpenError> {
    let program = ebpf.program_mut(name::PROGRAM).ok_or(OpenError::NoMap(name::PROGRAM))?;
    program.try_into().map_err(OpenError::load)
}

/// The interface that a link leads packets from: the kernel says it of the descriptor, which aya does not
/// give out, so it is found by the link's number among those of this process.
fn interface_of(link: &FdLink) -> io::Result<Option<u32>> {
    let id = link.info().map_err(io::Error::other)?.id();
    let value = |text: &str, name: &str| -> Option<u32> {
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
    };
    for descriptor in fs::read_dir("/proc/self/fdinfo")? {
        // One may have been closed since it was listed.
        let Ok(text) = fs::read_to_string(descriptor?.path()) else { continue };
        if value(&text, "link_id:") == Some(id) {
            return Ok(value(&text, "ifindex:"));
        }
    }
    Ok(None)
}

fn is_busy(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return matches!(io.raw_os_error(), Some(libc::EBUSY | libc::EEXIST));
        }
        cause = error.source();
    }
    false
}

fn busy(interface: &str) -> String {
    format!(
        "an XDP program is on interface {interface} that these tables know nothing of; `ip -details link show \
         {interface}` names it. If it is \"lobby\", its tables are pinned elsewhere: start with the `--bpffs` that \
         they were made with, or take them down with `lb detach --bpffs DIR`. Else `ip link set {interface} xdp off` \
         removes it if nobody needs it"
    )
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}

/// Entries of each map whose size is the document's.
fn sizes(limits: Limits) -> [(&'static str, u32); 17] {
    let Limits { flows, services, backends, ring_pages, side_pages, rules } = limits;
    [
        (name::LISTENERS, lines_for(services)),
        (name::VIPS_V4, services),
        (name::VIPS_V6, services),
        (name::SERVICES, services),
        (name::TURNS, services),
        (name::RULES_V4, rules),
        (name::RULES_V6, rules),
        (name::PAGES, ring_pages),
        (name::SIDES, side_pages),
        (name::BACKENDS, backends),
        (name::CURSORS, backends),
        (name::TRAFFIC, backends),
        (name::SOURCE_KEYS_V4, MAX_SOURCES),
        (name::SOURCE_KEYS_V6, MAX_SOURCES),
        (name::SOURCES, MAX_SOURCES),
        (name::RECORDS, flows / FLOWS_PER_LINE),
        (name::FLOWS, flows),
    ]
}

/// Entries of a map as it is.
pub(super) fn entries(map: &MapData) -> Result<u32, OpenError> {
    map.info().map(|info| info.max_entries()).map_err(OpenError::load)
}
