//! A lab for people: with names, and there until it is taken down.
//!
//! Each place is a named network namespace, `lobby-client` and so on, which `ip netns` knows too. What `up`
//! has made is written down in [`DIRECTORY`], and `down` removes that and nothing else.

use std::{
    fs,
    net::SocketAddr,
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use super::{Lab, LabOptions, Namespace, VIP, VIP_V6};

/// Times that a lab is made before it is clear that it cannot be kept.
const ATTEMPTS: usize = 20;

/// Where it is written down what is up.
pub const DIRECTORY: &str = "/run/lobby-lab";
/// Where `ip netns` looks for named network namespaces (ip-netns(8)).
const NETNS: &str = "/run/netns";

/// What is up.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    backends: usize,
    interfaces: u8,
    places: Vec<String>,
}

/// A place of a lab that is up.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Its name for `exec`.
    pub name: String,
    /// Its name for `ip netns`.
    pub namespace: String,
    /// Its addresses, each `INTERFACE ADDRESS`.
    pub addresses: Vec<String>,
    /// Ids of the processes that run there.
    pub processes: Vec<u32>,
}

/// Builds a lab and gives it names.
///
/// # Errors
///
/// One is up, or root's rights are missing.
pub fn up(options: LabOptions) -> Result<()> {
    ensure!(!is_up(), "a lab is up; `cargo xtask lab down` takes it down");
    for attempt in 1.. {
        let lab = Lab::new(options)?;
        let record = Record {
            backends: options.backends,
            interfaces: if options.two_interfaces { 2 } else { 1 },
            places: lab.places().map(|place| place.name().to_owned()).collect(),
        };
        fs::create_dir(DIRECTORY)
            .with_context(|| format!("{DIRECTORY} cannot be made: root's rights are needed"))?;
        let Err(error) = write_down(&lab, &record) else { return Ok(()) };
        // The error that is told is the first one.
        let _ = remove(&record);
        // The kernel takes a mount namespace with a lower number than the present one for one that could hold
        // itself. Numbers are given out in batches for each CPU, so a younger one may be lower: another try,
        // another number.
        let unlucky = error.root_cause().downcast_ref() == Some(&nix::Error::EINVAL);
        if !unlucky || attempt == ATTEMPTS {
            return Err(error);
        }
    }
    Ok(())
}

/// Takes down what `up` has built; the ids of processes that still run there, and keep their place alive.
///
/// # Errors
///
/// None is up, or root's rights are missing.
pub fn down() -> Result<Vec<u32>> {
    let record = record()?;
    let left = status()?.into_iter().flat_map(|place| place.processes).collect();
    remove(&record)?;
    Ok(left)
}

/// Whether a lab is up, or what is left of one.
pub fn is_up() -> bool {
    Path::new(DIRECTORY).exists()
}

/// What is up, place by place; empty: nothing.
///
/// # Errors
///
/// Root's rights are missing.
pub fn status() -> Result<Vec<Place>> {
    if !is_up() {
        return Ok(Vec::new());
    }
    record()?
        .places
        .iter()
        .map(|name| {
            let place = open(name)?;
            Ok(Place {
                name: name.clone(),
                namespace: namespace(name),
                addresses: addresses(&place)?,
                processes: processes(place.net())?,
            })
        })
        .collect()
}

/// A command that will run at a place, known as `b1` or as `lobby-b1`.
///
/// # Errors
///
/// No lab is up, or it has no such place.
pub fn command(place: &str, program: &str) -> Result<Command> {
    let places = record()?.places;
    let name = place.strip_prefix("lobby-").unwrap_or(place);
    if !places.iter().any(|place| place == name) {
        bail!("the lab has no place {place}; it has {}", places.join(", "));
    }
    let mut command = open(name)?.command(program);
    // What is set here is meant for the program there.
    command.envs(["LB_RUN_DIR", "LB_LOG"].iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    Ok(command)
}

/// A document for the balancer of a lab: port 80 of its addresses leads to port 80 of all backends.
pub fn document(options: LabOptions) -> String {
    let interfaces = if options.two_interfaces { "\"front\", \"back\"" } else { "\"front\"" };
    let backends = |address: &dyn Fn(usize) -> SocketAddr| -> String {
        (0..options.backends).map(|it| format!("  {{ address = \"{}\" }},\n", address(it))).collect()
    };
    format!(
        "# For the lab that is up: `cargo xtask lab status` tells its places.\n\
         interfaces = [{interfaces}]\n\n\
         [pools.web]\nhealth = {{ http = \"/\", interval = \"1s\" }}\nbackends = [\n{}]\n\n\
         [pools.web6]\nhealth = {{ http = \"/\", interval = \"1s\" }}\nbackends = [\n{}]\n\n\
         [services.shop]\nlisten = \"{VIP}:80/tcp\"\npool = \"web\"\n\n\
         [services.shop6]\nlisten = \"[{VIP_V6}]:80/tcp\"\npool = \"web6\"\n",
        backends(&|it| SocketAddr::new(options.backend_v4(it).into(), 80)),
        backends(&|it| SocketAddr::new(options.backend_v6(it).into(), 80)),
    )
}

fn record() -> Result<Record> {
    let path = Path::new(DIRECTORY).join("lab.json");
    ensure!(Path::new(DIRECTORY).exists(), "no lab is up; `cargo xtask lab up` builds one");
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

fn write_down(lab: &Lab, record: &Record) -> Result<()> {
    let nothing = None::<&str>;
    mount(Some("tmpfs"), DIRECTORY, Some("tmpfs"), MsFlags::empty(), Some("mode=700")).context(DIRECTORY)?;
    // A mount namespace can only be kept where its mounts do not spread.
    mount(nothing, DIRECTORY, nothing, MsFlags::MS_PRIVATE, nothing).context(DIRECTORY)?;
    fs::write(Path::new(DIRECTORY).join("lab.json"), serde_json::to_vec_pretty(record)?)?;
    fs::create_dir_all(NETNS)?;
    for place in lab.places() {
        keep(place.net(), &net_file(place.name()))?;
        if let Some(mounts) = place.mounts() {
            keep(mounts, &mount_file(place.name()))?;
        }
    }
    Ok(())
}

/// Gives a namespace a name in the file system, which keeps it alive.
fn keep(namespace: BorrowedFd<'_>, file: &Path) -> Result<()> {
    let fail = || file.display().to_string();
    fs::File::create_new(file).with_context(fail)?;
    let from = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    let kept = mount(Some(from.as_str()), file, None::<&str>, MsFlags::MS_BIND, None::<&str>);
    if kept.is_err() {
        // A file that nothing is mounted on would be in the way of whoever clears up.
        fs::remove_file(file).with_context(fail)?;
    }
    kept.with_context(fail)
}

fn remove(record: &Record) -> Result<()> {
    for place in &record.places {
        for file in [net_file(place), mount_file(place)] {
            if file.exists() {
                umount2(&file, MntFlags::MNT_DETACH).with_context(|| file.display().to_string())?;
                fs::remove_file(&file)?;
            }
        }
    }
    umount2(DIRECTORY, MntFlags::MNT_DETACH).context(DIRECTORY)?;
    fs::remove_dir(DIRECTORY)?;
    Ok(())
}

fn open(place: &str) -> Result<Namespace> {
    let mounts = mount_file(place);
    Namespace::open(place, &net_file(place), mounts.exists().then_some(&*mounts))
}

fn addresses(place: &Namespace) -> Result<Vec<String>> {
    let all = place.run(|| nix::ifaddrs::getifaddrs().map(Vec::from_iter))??;
    Ok(all
        .into_iter()
        .filter(|interface| interface.interface_name != "lo")
        .filter_map(|interface| {
            let address = interface.address?;
            let ip = address
                .as_sockaddr_in()
                .map(|v4| v4.ip().to_string())
                .or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().to_string()))?;
            // Each interface has one of those by itself.
            (!ip.starts_with("fe80:")).then(|| format!("{} {ip}", interface.interface_name))
        })
        .collect())
}

/// The processes in a network namespace.
fn processes(net: BorrowedFd<'_>) -> Result<Vec<u32>> {
    let identity = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    let wanted = identity(&fs::metadata(format!("/proc/self/fd/{}", net.as_raw_fd()))?);
    let ids =
        fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // Some end while they are being looked at.
    Ok(ids
        .filter(|id| fs::metadata(format!("/proc/{id}/ns/net")).is_ok_and(|found| identity(&found) == wanted))
        .collect())
}

fn namespace(place: &str) -> String {
    format!("lobby-{place}")
}

fn net_file(place: &str) -> PathBuf {
    Path::new(NETNS).join(namespace(place))
}

fn mount_file(place: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{place}.mounts"))
}
