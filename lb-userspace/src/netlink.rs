//! The kernel's view of the network, by rtnetlink: links, addresses, routes and neighbours.
//!
//! [`Netlink`] asks and tells; [`surroundings::Surroundings`] is what it found, as plain data;
//! [`watch`] follows it as it changes. The sockets belong to the network namespace of the process.

mod routes;
pub mod surroundings;
pub mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Arc, PoisonError},
};

use futures::TryStreamExt;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, CacheInfo},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp, XdpAttached},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourMessage, NeighbourState,
        },
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
    },
};

use tokio::sync::Mutex;

use routes::Routes;
use surroundings::{AttachedXdp, HostAddress, Link, Mac, Route, Surroundings};

/// Marks the addresses that Lobby puts on an interface (`IFA_PROTO`, Linux 5.18); `ip address` shows it
/// as `proto 0x4c`. An 'L', of no meaning to others.
const ADDRESS_PROTOCOL: u8 = 0x4c;

/// Requests under way on a socket: thousands one after the other would take a while, all at once would overrun it.
pub const AT_ONCE: usize = 64;

/// The kernel would not do or say what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// Ways were asked for, and there is no answer.
    #[error("cannot find routes: {0}")]
    Routes(io::Error),
    /// The request failed.
    #[error("cannot {action}: {}", .source)]
    Request {
        /// What was asked: "list links".
        action: String,
        /// The kernel's answer.
        source: Box<rtnetlink::Error>,
    },
}

impl NetlinkError {
    /// The kernel's error number, positive; `None` where it gave none.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Request { source, .. } => match source.as_ref() {
                rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().abs()),
                _ => None,
            },
            Self::Socket(error) | Self::Routes(error) => error.raw_os_error(),
        }
    }
}

/// A socket to ask the kernel through. Clones share it.
#[derive(Clone)]
pub struct Netlink {
    handle: Handle,
    routes: Arc<std::sync::Mutex<Routes>>,
    /// The kernel lists one thing at a time on a socket, and says EBUSY to who asks for another.
    listing: Arc<Mutex<()>>,
}

impl Netlink {
    /// Opens a socket in this thread's network namespace; the connection is driven by a task of its own.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle, routes: Arc::new(Routes::open()?.into()), listing: Arc::default() })
    }

    /// Everything that matters for the ways to `targets`.
    ///
    /// # Errors
    /// When the kernel does not list links, addresses or neighbours. A target without a route is no
    /// error here, but an entry of [`Surroundings::routes`].
    pub async fn survey(&self, targets: &BTreeSet<IpAddr>) -> Result<Surroundings, NetlinkError> {
        self.survey_by(self.ways(targets.iter().copied().collect()).await?).await
    }

    /// The way to each target, or why there is none.
    async fn ways(
        &self,
        targets: Vec<IpAddr>,
    ) -> Result<BTreeMap<IpAddr, Result<Route, String>>, NetlinkError> {
        let routes = Arc::clone(&self.routes);
        let asked = tokio::task::spawn_blocking(move || {
            let found = routes.lock().unwrap_or_else(PoisonError::into_inner).to(&targets)?;
            let in_words = |code| io::Error::from_raw_os_error(code).to_string();
            Ok(targets.into_iter().zip(found.into_iter().map(|found| found.map_err(in_words))).collect())
        });
        asked.await.unwrap_or_else(|ended| Err(io::Error::other(ended))).map_err(NetlinkError::Routes)
    }

    /// The same as [`Netlink::survey`] after addresses have been put that the host does not send from while it
    /// has others (`add_address`): ways stay as they were, but for those without a proper source.
    ///
    /// # Errors
    /// When the kernel does not list links, addresses or neighbours.
    pub async fn survey_again(&self, before: &Surroundings) -> Result<Surroundings, NetlinkError> {
        let mut routes = before.routes.clone();
        let without = routes.iter().filter(|(_, route)| route.as_ref().is_ok_and(Route::lacks_source));
        let without = without.map(|(&target, _)| target).collect();
        routes.extend(self.ways(without).await?);
        self.survey_by(routes).await
    }

    async fn survey_by(
        &self,
        routes: BTreeMap<IpAddr, Result<Route, String>>,
    ) -> Result<Surroundings, NetlinkError> {
        let mut found = Surroundings {
            links: self.links().await?.into_iter().map(|link| (link.index, link)).collect(),
            addresses: self.addresses().await?,
            routes,
            ..Surroundings::default()
        };
        self.see_neighbours(&mut found).await?;
        Ok(found)
    }

    /// All links of the namespace.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let _turn = self.listing.lock().await;
        let links: Vec<_> =
            self.handle.link().get().execute().try_collect().await.map_err(failed("list links"))?;
        Ok(links.iter().map(link).collect())
    }

    /// All addresses of the namespace.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub async fn addresses(&self) -> Result<Vec<HostAddress>, NetlinkError> {
        let _turn = self.listing.lock().await;
        let found: Vec<_> =
            self.handle.address().get().execute().try_collect().await.map_err(failed("list addresses"))?;
        Ok(found.iter().filter_map(host_address).collect())
    }

    /// MAC addresses of those neighbours that the kernel would use now, among `wanted`.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub async fn neighbours(
        &self,
        wanted: &BTreeSet<(u32, IpAddr)>,
    ) -> Result<BTreeMap<(u32, IpAddr), Mac>, NetlinkError> {
        Ok(self.asked_neighbours(wanted).await?.0)
    }

    /// Finds out what is known of the neighbours that the routes of these surroundings lead through.
    async fn see_neighbours(&self, around: &mut Surroundings) -> Result<(), NetlinkError> {
        (around.neighbours, around.silent) = self.asked_neighbours(&around.wanted_neighbours()).await?;
        Ok(())
    }

    /// Those that the kernel would use now, and those that it has asked for in vain.
    async fn asked_neighbours(
        &self,
        wanted: &BTreeSet<(u32, IpAddr)>,
    ) -> Result<(BTreeMap<(u32, IpAddr), Mac>, BTreeSet<(u32, IpAddr)>), NetlinkError> {
        if wanted.is_empty() {
            return Ok((BTreeMap::new(), BTreeSet::new()));
        }
        let _turn = self.listing.lock().await;
        let found: Vec<_> = self
            .handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("list neighbours"))?;
        let known = found.iter().filter_map(neighbour).filter(|(key, _)| wanted.contains(key)).collect();
        let silent = found.iter().filter(|message| message.header.state == NeighbourState::Failed);
        Ok((known, silent.filter_map(neighbour_key).filter(|key| wanted.contains(key)).collect()))
    }

    /// Asks the kernel to find out a neighbour's MAC address now and to keep it known
    /// (`NTF_EXT_MANAGED`, Linux 5.16). It is asked again by the kernel before it gets old.
    ///
    /// # Errors
    /// When the kernel refuses: an older one, or an interface that is down.
    pub async fn keep_resolved(&self, interface: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let mut request =
            self.handle.neighbours().add(interface, address).state(NeighbourState::None).replace();
        request.message_mut().attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        request.execute().await.map_err(failed(&format!("keep the neighbour {address} resolved")))
    }

    /// Ends [`Netlink::keep_resolved`]: the neighbour becomes an ordinary one again.
    ///
    /// # Errors
    /// When the kernel refuses. A neighbour that is not there is no error.
    pub async fn release(&self, interface: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let wanted = [(interface, address)].into();
        let known = self.neighbours(&wanted).await?.into_values().next();
        let done = match known {
            Some(mac) => {
                let request = self.handle.neighbours().add(interface, address).state(NeighbourState::Stale);
                request.link_layer_address(&mac).replace().execute().await
            }
            None => {
                let mut request = self.handle.neighbours().add(interface, address);
                let message = std::mem::take(request.message_mut());
                self.handle.neighbours().del(message).execute().await
            }
        };
        match done.map_err(failed(&format!("release the neighbour {address}"))) {
            Err(error) if error.errno() == Some(libc::ENOENT) || error.errno() == Some(libc::ENODEV) => {
                Ok(())
            }
            other => other,
        }
    }

    /// Puts an address on an interface, marked as ours: /32 or /128, never a source for connections of
    /// the host's own (IPv6: `preferred_lft 0`), without duplicate address detection.
    ///
    /// # Errors
    /// When the kernel refuses, for instance because the address is there already (`EEXIST`).
    pub async fn add_address(&self, interface: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(interface, address, bits(address));
        let attributes = &mut request.message_mut().attributes;
        attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL)));
        if address.is_ipv6() {
            let mut lifetime = CacheInfo::default();
            lifetime.ifa_valid = u32::MAX;
            attributes.push(AddressAttribute::CacheInfo(lifetime));
            attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
        }
        request.execute().await.map_err(failed(&format!("add the address {address}")))
    }

    /// Takes an address off an interface.
    ///
    /// # Errors
    /// When the kernel refuses. An address that is not there is no error.
    pub async fn remove_address(&self, interface: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.index = interface;
        message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.prefix_len = bits(address);
        message.attributes.push(AddressAttribute::Local(address));
        message.attributes.push(AddressAttribute::Address(address));
        let done = self.handle.address().del(message).execute().await;
        match done.map_err(failed(&format!("remove the address {address}"))) {
            Err(error) if matches!(error.errno(), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(()),
            other => other,
        }
    }
}

fn failed(action: &str) -> impl FnOnce(rtnetlink::Error) -> NetlinkError {
    let action = action.to_owned();
    move |source| NetlinkError::Request { action, source: Box::new(source) }
}

fn link(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        up: flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        loopback: flags.contains(LinkFlags::Loopback),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) if !link.loopback => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(lower) => link.lower = Some(*lower),
            LinkAttribute::LinkInfo(infos) => {
                let is = |kind| infos.contains(&LinkInfo::Kind(kind));
                (link.veth, link.vlan) = (is(InfoKind::Veth), is(InfoKind::Vlan));
            }
            LinkAttribute::Xdp(xdp) => link.xdp = attached_xdp(xdp),
            _ => {}
        }
    }
    link
}

fn attached_xdp(attributes: &[LinkXdp]) -> Option<AttachedXdp> {
    let program = attributes.iter().find_map(|a| match a {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::HwProgId(id) | LinkXdp::SkbProgId(id) => {
            Some(*id)
        }
        _ => None,
    })?;
    let generic = attributes.iter().any(|a| matches!(a, LinkXdp::Attached(XdpAttached::SocketBuffer)));
    Some(AttachedXdp { program, native: !generic })
}

fn host_address(message: &AddressMessage) -> Option<HostAddress> {
    // IFA_LOCAL is the host's address; on point-to-point links IFA_ADDRESS is the peer's.
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    let ours = message
        .attributes
        .iter()
        .any(|a| matches!(a, AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL))));
    Some(HostAddress { address, prefix: message.header.prefix_len, interface: message.header.index, ours })
}

fn route(message: &RouteMessage) -> Option<Route> {
    let mut interface = None;
    let mut gateway = None;
    let mut source = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => source = ip(address),
            _ => {}
        }
    }
    let local = message.header.kind == RouteType::Local;
    Some(Route { interface: interface?, gateway, source, local })
}

/// The one address that a route leads to this host itself, if it is such a route.
fn leads_here(message: &RouteMessage) -> Option<IpAddr> {
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    })?;
    let one = message.header.destination_prefix_length == bits(destination);
    (one && message.header.kind == RouteType::Local).then_some(destination)
}

/// The prefix length that means one address alone.
fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), Mac)> {
    let usable = !matches!(
        message.header.state,
        NeighbourState::None | NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::Noarp
    );
    if !usable {
        return None;
    }
    let mac = message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::LinkLayerAddress(bytes) => Mac::try_from(bytes.as_slice()).ok(),
        _ => None,
    })?;
    Some((neighbour_key(message)?, mac))
}

fn neighbour_key(message: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    let address = message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::from(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::from(*ip)),
        _ => None,
    })?;
    Some((message.header.ifindex, address))
}
