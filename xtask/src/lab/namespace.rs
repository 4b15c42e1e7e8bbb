//! One place in a lab: a network namespace, with mounts of its own if it has to have them.

#![expect(unsafe_code, reason = "what a child does between fork and exec cannot be said otherwise")]

use std::{
    ffi::OsStr,
    fs::File,
    io,
    net::SocketAddr,
    os::{
        fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

use super::Proc;

/// How long anything in a lab may take to get ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// A network namespace, held by its file descriptor alone; gone when the last clone is, and the last
/// process inside.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    // Shared with the commands that are to run inside.
    net: Arc<OwnedFd>,
    mounts: Option<Arc<OwnedFd>>,
}

impl Namespace {
    /// A new, empty network: a loopback interface that is up, and IPv6 addresses that are usable at once.
    ///
    /// # Errors
    ///
    /// Root's rights are missing.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let net = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(OwnedFd::from(File::open("/proc/thread-self/ns/net")?))
        })?;
        Self { name: name.into(), net: Arc::new(net), mounts: None }.prepared()
    }

    /// A new network with mounts of its own: `/sys` shows this network, `/run` is empty, and
    /// `/sys/fs/bpf` is an empty bpffs, or with `bpffs` false just an empty directory.
    ///
    /// # Errors
    ///
    /// Root's rights are missing.
    pub fn with_mounts(name: impl Into<String>, bpffs: bool) -> Result<Self> {
        let (net, mounts) = on_a_thread(|| {
            // The thread's own root and working directory, without which it cannot have its own mounts.
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
            let nothing = None::<&str>;
            mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
                .context("the mounts cannot be made private")?;
            mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), nothing)
                .context("mounting /sys")?;
            if bpffs {
                mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), nothing)
                    .context("mounting /sys/fs/bpf")?;
            }
            mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
                .context("mounting /run")?;
            let net = File::open("/proc/thread-self/ns/net")?;
            let mounts = File::open("/proc/thread-self/ns/mnt")?;
            Ok((OwnedFd::from(net), OwnedFd::from(mounts)))
        })?;
        Self { name: name.into(), net: Arc::new(net), mounts: Some(Arc::new(mounts)) }.prepared()
    }

    /// One that exists, by the files that stand for it.
    ///
    /// # Errors
    ///
    /// A file cannot be opened.
    pub fn open(name: impl Into<String>, net: &Path, mounts: Option<&Path>) -> Result<Self> {
        let open = |path: &Path| {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            Ok::<_, anyhow::Error>(Arc::new(OwnedFd::from(file)))
        };
        Ok(Self { name: name.into(), net: open(net)?, mounts: mounts.map(open).transpose()? })
    }

    /// What it is called, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file descriptor that stands for the network.
    pub fn net(&self) -> BorrowedFd<'_> {
        self.net.as_fd()
    }

    /// The file descriptor that stands for the mounts, if it has its own.
    pub fn mounts(&self) -> Option<BorrowedFd<'_>> {
        self.mounts.as_ref().map(|mounts| mounts.as_fd())
    }

    /// Runs a closure on a thread inside, and waits for it. Sockets made there stay inside; a child
    /// started there dies with the thread.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered.
    ///
    /// # Panics
    ///
    /// When the closure does.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> Result<T> {
        on_a_thread(|| {
            self.enter()?;
            Ok(inside())
        })
    }

    /// Moves the calling thread inside, for good. Not for threads that others use too.
    ///
    /// # Errors
    ///
    /// Root's rights are missing.
    pub fn enter(&self) -> Result<()> {
        let fail = || format!("{} cannot be entered", self.name);
        setns(self.net.as_fd(), CloneFlags::CLONE_NEWNET).with_context(fail)?;
        if let Some(mounts) = &self.mounts {
            let directory = std::env::current_dir()?;
            unshare(CloneFlags::CLONE_FS).with_context(fail)?;
            setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS).with_context(fail)?;
            // Changing the mounts went to their root.
            nix::unistd::chdir(&directory)?;
        }
        Ok(())
    }

    /// A command that will run inside, and die with the thread that starts it; [`Proc::start`] has a
    /// thread that lives as long as the process. What is set for an `lb` outside does not hold for one inside.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_remove("LB_RUN_DIR").env_remove("LB_LOG");
        let (net, mounts) = (self.net.clone(), self.mounts.clone());
        // SAFETY: between fork and exec, only system calls are made; the file descriptors are open as long
        // as the command is there.
        unsafe {
            command.pre_exec(move || {
                enter_after_fork(net.as_raw_fd(), mounts.as_deref().map(AsRawFd::as_raw_fd))
            });
        }
        command
    }

    /// Starts a program inside, without input and output.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn spawn<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Proc> {
        let mut command = self.command(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Proc::start(command)
    }

    /// Sets a kernel parameter of the network, such as `net.ipv4.ip_forward`.
    ///
    /// # Errors
    ///
    /// There is no such parameter, or it cannot have that value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| std::fs::write(&path, value))?
            .with_context(|| format!("{path} = {value} in {}", self.name))
    }

    /// Waits until something accepts TCP connections at an address, as seen from inside.
    ///
    /// # Errors
    ///
    /// Nothing does for 20 seconds.
    pub fn wait_for_tcp(&self, address: SocketAddr) -> Result<()> {
        self.run(|| {
            let start = Instant::now();
            loop {
                match std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
                    Ok(_) => return Ok(()),
                    Err(error) if start.elapsed() > PATIENCE => {
                        bail!("nothing accepts connections at {address}, as seen from {}: {error}", self.name)
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        })?
    }

    /// How many TCP segments came in with a wrong checksum.
    ///
    /// # Errors
    ///
    /// The kernel does not tell.
    pub fn tcp_in_csum_errors(&self) -> Result<u64> {
        self.snmp("Tcp", "InCsumErrors")
    }

    /// One of the kernel's counters (RFC 4022, RFC 4113 and Linux's own), such as `Udp`, `InCsumErrors`.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn snmp(&self, protocol: &str, counter: &str) -> Result<u64> {
        let text = self.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
        snmp(&text, protocol, counter)
            .with_context(|| format!("the kernel has no counter {protocol} {counter}"))
    }

    fn prepared(self) -> Result<Self> {
        // Without waiting for others who might have the address, which takes more than a second.
        self.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        self.sysctl("net.ipv6.conf.default.disable_ipv6", "0")?;
        super::link::up(&self, "lo")?;
        Ok(self)
    }
}

/// Runs a closure on a thread of its own, whose namespaces it may change.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// What a child does before it becomes its program.
fn enter_after_fork(net: RawFd, mounts: Option<RawFd>) -> io::Result<()> {
    let check = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: system calls on numbers and on a buffer of the size that is told.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        check(libc::setns(net, libc::CLONE_NEWNET))?;
        if let Some(mounts) = mounts {
            let mut directory = [0u8; libc::PATH_MAX as usize];
            let known = !libc::getcwd(directory.as_mut_ptr().cast(), directory.len()).is_null();
            check(libc::setns(mounts, libc::CLONE_NEWNS))?;
            if known {
                check(libc::chdir(directory.as_ptr().cast()))?;
            }
        }
    }
    Ok(())
}

/// Reads a counter from `/proc/net/snmp`: for each protocol a line of names, then a line of numbers.
fn snmp(text: &str, protocol: &str, counter: &str) -> Option<u64> {
    let prefix = format!("{protocol}:");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(&prefix));
    let column = lines.next()?.split_whitespace().position(|name| name == counter)?;
    lines.next()?.split_whitespace().nth(column)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::snmp;

    #[test]
    fn counters_are_read_by_their_names() {
        let text = "Tcp: InSegs InCsumErrors\nTcp: 7 3\nUdp: InDatagrams\nUdp: 9\nUdpLite: InDatagrams\nUdpLite: 1\n";
        assert_eq!(snmp(text, "Tcp", "InCsumErrors"), Some(3));
        assert_eq!(snmp(text, "Udp", "InDatagrams"), Some(9));
        assert_eq!(snmp(text, "Udp", "InCsumErrors"), None);
    }
}
