//! An interface in a VLAN, where the kernel need not be able to make one (`CONFIG_VLAN_8021Q`).
//!
//! What the kernel does not do, a thread does: an interface `eth0.10` (TAP) whose frames leave by `eth0` with
//! a tag written into them (IEEE 802.1Q clause 9), and that gets what comes in by `eth0` with that tag. All
//! else is real: the stack and the programs above, the veth pair, and the tag in the frame on its way.

#![expect(
    unsafe_code,
    reason = "TAP's ioctl, and the control message that has a received tag, are C structures"
)]

use std::{
    fs::File,
    io::{self, PipeWriter, Read as _, Write as _},
    mem,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use xtask::lab::{Namespace, link};

/// Where the tag goes: after both addresses.
const TAG_AT: usize = 12;
/// What is not the tag's identifier in its second word.
const PRIORITY: u16 = 0xf000;

/// What came in by the interface below.
#[derive(Debug, Default)]
pub struct Seen {
    /// IP packets with this VLAN's tag.
    pub tagged: AtomicUsize,
    /// TCP over IP without a tag, or with another.
    pub others: AtomicUsize,
}

/// An interface in a VLAN; gone when dropped.
pub struct Vlan {
    /// What came in below.
    pub seen: Arc<Seen>,
    /// Its name.
    pub name: String,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Vlan {
    /// Makes one over an interface, with the same MAC address; it is up.
    ///
    /// # Errors
    /// When the kernel has no TAP, or a name is taken.
    pub fn over(place: &Namespace, below: &str, id: u16) -> Result<Self> {
        let name = format!("{below}.{id}");
        let index = link::index(place, below)?;
        let (tap, wire) = place.run(|| -> Result<_> { Ok((tap(&name)?, wire(index)?)) })??;
        link::set_mac(place, &name, link::mac(place, below)?)?;
        link::up(place, &name)?;
        let (stopped, stop) = io::pipe()?;
        let seen = Arc::new(Seen::default());
        let carrier = Carrier { tap, wire, id, seen: seen.clone() };
        let thread = std::thread::spawn(move || carrier.carry(&stopped));
        Ok(Self { seen, name, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Vlan {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("{} had stopped before", self.name);
        }
    }
}

/// Both ends of what the thread carries.
struct Carrier {
    tap: File,
    wire: OwnedFd,
    id: u16,
    seen: Arc<Seen>,
}

impl Carrier {
    fn carry(mut self, stopped: &io::PipeReader) {
        let mut frame = vec![0; 4096];
        loop {
            let mut sources = [self.tap.as_fd(), self.wire.as_fd(), stopped.as_fd()]
                .map(|source| PollFd::new(source, PollFlags::POLLIN));
            poll(&mut sources, PollTimeout::NONE).expect("descriptors that are open");
            let [out, back, end] = sources.map(|source| source.any() == Some(true));
            if end {
                return;
            }
            if out {
                let length = self.tap.read(&mut frame).expect("a frame from the stack");
                let tag = [0x8100_u16.to_be_bytes(), self.id.to_be_bytes()].concat();
                let tagged = [&frame[..TAG_AT], &tag, &frame[TAG_AT..length]].concat();
                // What the wire has no room for is lost, as on any.
                _ = send(&self.wire, &tagged);
            }
            if back
                && let Some((length, tag)) = receive(&self.wire, &mut frame).expect("a frame from the wire")
            {
                self.deliver(&frame[..length], tag);
            }
        }
    }

    fn deliver(&mut self, frame: &[u8], tag: Option<u16>) {
        let ours = tag.is_some_and(|tag| tag & !PRIORITY == self.id);
        // EtherType, and the protocol in either header.
        let tcp = match frame.get(12..14) {
            Some([0x08, 0x00]) => frame.get(23) == Some(&6),
            Some([0x86, 0xdd]) => frame.get(20) == Some(&6),
            _ => false,
        };
        if ours {
            self.seen.tagged.fetch_add(1, Relaxed);
            self.tap.write_all(frame).expect("the stack takes a frame");
        } else if tcp {
            self.seen.others.fetch_add(1, Relaxed);
        }
    }
}

/// A TAP interface in this thread's namespace, which ends with the file.
fn tap(name: &str) -> Result<File> {
    ensure!(name.len() < libc::IFNAMSIZ, "{name} is too long for an interface");
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    // SAFETY: all zeroes is a valid `ifreq`; the kernel reads and writes one.
    let made = unsafe {
        let mut request: libc::ifreq = mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request)
    };
    ensure!(made == 0, "{name}: {}", io::Error::last_os_error());
    Ok(file)
}

/// A socket for all frames of an interface, which tells their tags.
fn wire(index: u32) -> Result<OwnedFd> {
    let everything = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: `socket` gives a descriptor or -1, which is looked at; the kernel reads an address and a number of
    // the sizes that are told.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        ensure!(socket >= 0, "a packet socket: {}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = everything;
        address.sll_ifindex = index.cast_signed();
        let (fd, on) = (socket.as_raw_fd(), 1i32);
        let length = size_of_val(&address) as u32;
        ensure!(
            libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, (&raw const on).cast(), 4) == 0
                && libc::bind(fd, (&raw const address).cast(), length) == 0,
            "a packet socket: {}",
            io::Error::last_os_error()
        );
        Ok(socket)
    }
}

fn send(wire: &OwnedFd, frame: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads the frame.
    let sent = unsafe { libc::send(wire.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The next frame that came in, and its tag, which the kernel has taken out of it; `None` for what goes out.
fn receive(wire: &OwnedFd, frame: &mut [u8]) -> io::Result<Option<(usize, Option<u16>)>> {
    // SAFETY: the kernel writes into buffers of the sizes that are told, and the control messages are walked
    // as cmsg(3) says; the structure is read from where the kernel put it, aligned or not.
    unsafe {
        let mut address: libc::sockaddr_ll = mem::zeroed();
        let mut control = [0u64; 16];
        let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_name = (&raw mut address).cast();
        message.msg_namelen = size_of_val(&address) as u32;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let length = libc::recvmsg(wire.as_raw_fd(), &raw mut message, 0);
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        if address.sll_pkttype == libc::PACKET_OUTGOING {
            return Ok(None);
        }
        let mut tag = None;
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while let Some(found) = header.as_ref() {
            if (found.cmsg_level, found.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
                let data: libc::tpacket_auxdata =
                    libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned();
                if data.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                    tag = Some(data.tp_vlan_tci);
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
        Ok(Some((length, tag)))
    }
}
