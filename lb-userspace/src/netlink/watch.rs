//! Follows the surroundings: a task that hears what changes in the kernel, looks again, and publishes
//! the result. It also has the kernel keep the neighbours resolved that packets go through.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use futures::{StreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::SocketAddr,
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{Netlink, NetlinkError, host_address, leads_here, neighbour, surroundings::Surroundings};

/// Changes come in flocks (a link that comes up brings addresses, routes, neighbours): how long to
/// gather them before looking.
const GATHER: Duration = Duration::from_millis(5);

/// When it is looked again, where that has failed.
const RETRY: Duration = Duration::from_secs(1);

/// What is kept of the surroundings of a set of addresses.
pub struct Watch {
    /// The addresses whose ways are wanted.
    pub targets: watch::Sender<BTreeSet<IpAddr>>,
    /// The surroundings now.
    pub surroundings: watch::Receiver<Arc<Surroundings>>,
    /// The neighbours that the kernel was told to keep resolved.
    pub kept: watch::Receiver<BTreeSet<(u32, IpAddr)>>,
    /// The task.
    pub follower: JoinHandle<()>,
}

/// A socket on which the kernel says what changes. Opened before the first look, so that nothing falls
/// between the two.
pub struct Ears(UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>);

/// Opens [`Ears`]; they hear from now on.
///
/// # Errors
/// When there is no socket.
pub fn listen() -> Result<Ears, NetlinkError> {
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ])?;
    tokio::spawn(connection);
    Ok(Ears(messages))
}

/// Starts a task that follows the ways that a first look has found, until `stop`. `kept` are the neighbours
/// that an earlier process told the kernel to keep resolved.
pub fn start(
    netlink: Netlink,
    ears: Ears,
    first_look: Arc<Surroundings>,
    kept: BTreeSet<(u32, IpAddr)>,
    stop: CancellationToken,
) -> Watch {
    let (targets_in, targets_out) = watch::channel(first_look.routes.keys().copied().collect());
    let (surroundings_in, surroundings_out) = watch::channel(first_look);
    let (kept_in, kept_out) = watch::channel(kept);
    let follower = Follower { netlink, targets: targets_out, surroundings: surroundings_in, kept: kept_in };
    let known = surroundings_out.clone();
    let changes = ears.0.map(move |(message, _)| Changed::of(&message, &known.borrow()));
    let follower = tokio::spawn(follower.run(changes, stop));
    Watch { targets: targets_in, surroundings: surroundings_out, kept: kept_out, follower }
}

/// How much must be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Changed {
    Nothing,
    Neighbours,
    /// Links, addresses and neighbours, but no way that has a source.
    Links,
    Everything,
}

impl Changed {
    fn of(message: &NetlinkMessage<RouteNetlinkMessage>, known: &Surroundings) -> Self {
        match &message.payload {
            // Most say only that a neighbour is still where it was: every few seconds, for each of them.
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message))
                if neighbour(message).is_some_and(|(key, mac)| known.neighbours.get(&key) == Some(&mac)) =>
            {
                Self::Nothing
            }
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewNeighbour(_) | RouteNetlinkMessage::DelNeighbour(_),
            ) => Self::Neighbours,
            // The daemon's own work, and what the kernel makes of it: thousands of times at a start.
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message))
                if host_address(message)
                    .is_some_and(|it| it.ours && !known.routes.contains_key(&it.address)) =>
            {
                Self::Links
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message))
                if leads_here(message).is_some_and(|address| !known.routes.contains_key(&address)) =>
            {
                Self::Nothing
            }
            NetlinkPayload::InnerMessage(_) | NetlinkPayload::Overrun(_) => Self::Everything,
            _ => Self::Nothing,
        }
    }

    /// Who asks anew for the same addresses means what is not announced.
    fn of_targets(targets: &BTreeSet<IpAddr>, known: &Surroundings) -> Self {
        if targets.iter().eq(known.routes.keys()) { Self::Links } else { Self::Everything }
    }
}

struct Follower {
    netlink: Netlink,
    targets: watch::Receiver<BTreeSet<IpAddr>>,
    surroundings: watch::Sender<Arc<Surroundings>>,
    kept: watch::Sender<BTreeSet<(u32, IpAddr)>>,
}

impl Follower {
    async fn run(mut self, messages: impl futures::Stream<Item = Changed>, stop: CancellationToken) {
        let mut messages = std::pin::pin!(messages);
        self.keep_neighbours().await;
        // What has changed and could not be looked at.
        let mut left = Changed::Nothing;
        loop {
            let mut changed = tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY), if left != Changed::Nothing => left,
                targets = self.targets.changed() => {
                    if targets.is_err() {
                        return;
                    }
                    Changed::of_targets(&self.targets.borrow_and_update(), &self.surroundings.borrow())
                }
                message = messages.next() => match message {
                    Some(changed) => changed,
                    None => return warn!("the kernel's netlink messages have ended; next hops are no longer followed"),
                },
            };
            changed = changed.max(left);
            if changed == Changed::Nothing {
                continue;
            }
            let enough = tokio::time::sleep(GATHER);
            let mut enough = std::pin::pin!(enough);
            loop {
                tokio::select! {
                    () = &mut enough => break,
                    message = messages.next() => match message {
                        Some(more) => changed = changed.max(more),
                        None => break,
                    },
                }
            }
            left = match self.look(changed).await {
                Ok(()) => Changed::Nothing,
                Err(error) => {
                    warn!("cannot see what changed in the network: {error}; it is tried again");
                    changed
                }
            };
        }
    }

    async fn look(&mut self, changed: Changed) -> Result<(), NetlinkError> {
        let before = Arc::clone(&self.surroundings.borrow());
        let mut now = match changed {
            Changed::Nothing => return Ok(()),
            Changed::Neighbours => {
                let mut now = Surroundings::clone(&before);
                self.netlink.see_neighbours(&mut now).await?;
                now
            }
            Changed::Links => self.netlink.survey_again(&before).await?,
            Changed::Everything => {
                let targets = self.targets.borrow_and_update().clone();
                self.netlink.survey(&targets).await?
            }
        };
        now.remember_silence(&before);
        if now != *before {
            debug!(?changed, "the surroundings have changed");
            self.surroundings.send_replace(Arc::new(now));
            self.keep_neighbours().await;
        }
        Ok(())
    }

    /// Tells the kernel which neighbours to keep resolved, and which no longer.
    async fn keep_neighbours(&self) {
        let wanted = self.surroundings.borrow().wanted_neighbours();
        let kept = self.kept.borrow().clone();
        // Each is noted at once: whoever ends this task must know all that is to be released.
        for &(interface, address) in wanted.difference(&kept) {
            match self.netlink.keep_resolved(interface, address).await {
                Ok(()) => self.kept.send_modify(|kept| _ = kept.insert((interface, address))),
                Err(error) => warn!("{error}; its packets wait until something else makes the kernel ask"),
            }
        }
        for &(interface, address) in kept.difference(&wanted) {
            match self.netlink.release(interface, address).await {
                Ok(()) => self.kept.send_modify(|kept| _ = kept.remove(&(interface, address))),
                Err(error) => warn!("{error}"),
            }
        }
    }
}
