//! Interfaces, addresses and routes of a lab, by netlink and ethtool.

#![expect(unsafe_code, reason = "ethtool's ioctl takes a pointer within a union")]

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::address::AddressHeaderFlags,
};

use super::Namespace;

/// What an interface does to packets on behalf of the stack (`linux/ethtool.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Leaves the transmit checksum to the hardware, of which veth has none.
    TxChecksum,
    /// Leaves segmentation of TCP to the hardware.
    Segmentation,
    /// Leaves segmentation to the last moment.
    GenericSegmentation,
    /// Joins received packets; on veth this also gives the interface NAPI.
    GenericReceive,
}

/// Makes a veth pair: `a_name` in `a`, `b_name` in `b`; both up, with an MTU of 1500 bytes and the offloads
/// that XDP on veth needs (see [`super`]).
///
/// # Errors
///
/// A name is taken.
pub fn veth(a: &Namespace, a_name: &str, b: &Namespace, b_name: &str) -> Result<()> {
    const ON_THE_WAY: &str = "on-the-way";
    let there = b.net().as_raw_fd();
    let joining = || format!("joining {a_name} of {} with {b_name} of {}", a.name(), b.name());
    let pair = LinkVeth::new(a_name, ON_THE_WAY).build();
    netlink(a, async |handle| handle.link().add(pair).execute().await).with_context(joining)?;
    change(a, ON_THE_WAY, |link| link.name(b_name).setns_by_fd(there)).with_context(joining)?;
    up(a, a_name)?;
    up(b, b_name)?;
    for (place, name) in [(a, a_name), (b, b_name)] {
        offload(place, name, Offload::TxChecksum, false)?;
        // Only on an interface that is up does this make its peer one that XDP can redirect to
        // (`veth_set_features` in Linux's drivers/net/veth.c).
        offload(place, name, Offload::GenericReceive, true)?;
    }
    Ok(())
}

/// Makes a bridge that forwards at once, and is up.
///
/// # Errors
///
/// The name is taken.
pub fn bridge(place: &Namespace, name: &str) -> Result<()> {
    netlink(place, async |handle| {
        handle.link().add(LinkBridge::new(name).mcast_snooping(false).up().build()).execute().await
    })
    .with_context(|| format!("bridge {name} in {}", place.name()))
}

/// Puts an interface into a bridge.
///
/// # Errors
///
/// There is no such interface or bridge.
pub fn into_bridge(place: &Namespace, name: &str, bridge: &str) -> Result<()> {
    let bridge = index(place, bridge)?;
    change(place, name, |link| link.controller(bridge))
}

/// Brings an interface up.
///
/// # Errors
///
/// There is no such interface.
pub fn up(place: &Namespace, name: &str) -> Result<()> {
    change(place, name, LinkMessageBuilder::up)
}

/// Takes an interface down.
///
/// # Errors
///
/// There is no such interface.
pub fn down(place: &Namespace, name: &str) -> Result<()> {
    change(place, name, LinkMessageBuilder::down)
}

/// Gives an interface another MAC address, and says so to nobody.
///
/// # Errors
///
/// There is no such interface.
pub fn set_mac(place: &Namespace, name: &str, mac: [u8; 6]) -> Result<()> {
    change(place, name, |link| link.address(mac.to_vec()))
}

/// Sets the largest packet of an interface, in bytes.
///
/// # Errors
///
/// There is no such interface, or it cannot.
pub fn set_mtu(place: &Namespace, name: &str, mtu: u32) -> Result<()> {
    change(place, name, |link| link.mtu(mtu))
}

/// Gives an interface an address.
///
/// # Errors
///
/// There is no such interface, or it has the address.
pub fn address(place: &Namespace, name: &str, address: IpAddr, prefix: u8) -> Result<()> {
    let index = index(place, name)?;
    netlink(place, async |handle| {
        let mut request = handle.address().add(index, address, prefix);
        // Without it an address of IPv6 is tentative until the kernel comes to it, also where nobody else is asked, and
        // nothing can be bound to it meanwhile (RFC 4862 section 5.4).
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        request.execute().await
    })
    .with_context(|| format!("address {address}/{prefix} of {name} in {}", place.name()))
}

/// Sends all packets that no other route is for to a gateway.
///
/// # Errors
///
/// The gateway is on no network of this place.
pub fn default_route(place: &Namespace, gateway: IpAddr) -> Result<()> {
    netlink(place, async |handle| {
        let route = match gateway {
            IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build(),
            IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).build(),
        };
        handle.route().add(route).execute().await
    })
    .with_context(|| format!("default route by {gateway} in {}", place.name()))
}

/// Switches an offload of an interface.
///
/// # Errors
///
/// There is no such interface, or it cannot.
pub fn offload(place: &Namespace, name: &str, offload: Offload, on: bool) -> Result<()> {
    // ETHTOOL_STXCSUM, _STSO, _SGSO, _SGRO
    let command = match offload {
        Offload::TxChecksum => 0x17,
        Offload::Segmentation => 0x1f,
        Offload::GenericSegmentation => 0x24,
        Offload::GenericReceive => 0x2c,
    };
    place
        .run(|| ethtool(name, command, on.into()))?
        .with_context(|| format!("{offload:?} of {name} in {}", place.name()))
}

/// The index of an interface.
///
/// # Errors
///
/// There is no such interface.
pub fn index(place: &Namespace, name: &str) -> Result<u32> {
    place
        .run(|| nix::net::if_::if_nametoindex(name))?
        .with_context(|| format!("there is no interface {name} in {}", place.name()))
}

/// The MAC address of an interface.
///
/// # Errors
///
/// There is no such interface.
pub fn mac(place: &Namespace, name: &str) -> Result<[u8; 6]> {
    use rtnetlink::packet_route::link::LinkAttribute;
    let message = netlink(place, async |handle| {
        handle.link().get().match_name(name.to_owned()).execute().try_next().await
    })?;
    message
        .into_iter()
        .flat_map(|message| message.attributes)
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => bytes.try_into().ok(),
            _ => None,
        })
        .with_context(|| format!("{name} in {} has no MAC address", place.name()))
}

fn change(
    place: &Namespace,
    name: &str,
    what: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec> + Send,
) -> Result<()> {
    let message = what(LinkUnspec::new_with_index(index(place, name)?)).build();
    netlink(place, async |handle| handle.link().set(message).execute().await)
        .with_context(|| format!("changing {name} in {}", place.name()))
}

/// Speaks netlink inside a namespace: on a thread of its own, since a socket belongs to the namespace of the
/// thread that made it.
fn netlink<T: Send, F>(place: &Namespace, speak: impl FnOnce(Handle) -> F + Send) -> Result<T>
where
    F: Future<Output = Result<T, rtnetlink::Error>>,
{
    place.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            Ok(speak(handle).await?)
        })
    })?
}

/// One of ethtool's older requests, that set a single value.
fn ethtool(name: &str, command: u32, data: u32) -> io::Result<()> {
    /// `struct ethtool_value` of `linux/ethtool.h`.
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const SIOCETHTOOL: libc::Ioctl = 0x8946;

    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut value = Value { command, data };
    // SAFETY: all zeroes is a valid `ifreq`; `socket` gives a file descriptor or -1, which is looked at; the
    // kernel reads name and value, which live until it returns.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(socket);
        if libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
