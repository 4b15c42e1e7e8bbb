//! Which index each service has, and what leads there.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Desired, PlanError, Stage, Steps};
use crate::{
    dataplane::{Mode, Op, ServiceEntry, Tables, VipEntry},
    model::{Forward, Listen, Protocol, Role, Service},
};

/// A service of the document and its place in the tables.
pub(super) struct Placed<'a> {
    pub(super) service: &'a Service,
    pub(super) index: u32,
    /// As it is in the tables; `None`: new.
    pub(super) before: Option<&'a ServiceEntry>,
}

/// How packets of a service get to its backends.
pub(super) fn mode(desired: &Desired<'_>, service: &Service) -> Mode {
    Mode {
        scheduler: service.scheduler,
        direct: service.forward != Forward::Nat,
        holds: service.role == Some(Role::Primary)
            && desired.verdicts.get(&service.pool).is_some_and(|pool| pool.holds),
    }
}

/// Gives each service its index: the one it has, else a free one.
///
/// An index is not free as long as a backend entry names it, since flows of that entry would then be
/// taken for the new service's; when no other is left, such entries are freed first.
pub(super) fn assign<'a>(
    desired: &Desired<'a>,
    before: &'a Tables,
    steps: &mut Steps,
) -> Result<Vec<Placed<'a>>, PlanError> {
    let config = desired.config;
    let known: HashMap<Listen, u32> =
        before.services.iter().map(|(&index, entry)| (entry.listen, index)).collect();
    let named: BTreeSet<u32> = before.backends.values().map(|backend| backend.service).collect();
    let limit = before.limits.services;
    let mut free = (0..limit).filter(|index| !before.services.contains_key(index) && !named.contains(index));
    let mut spare = (0..limit).filter(|index| !before.services.contains_key(index) && named.contains(index));

    let mut placed = Vec::with_capacity(config.services.len());
    for service in config.services.values() {
        if let Some(&index) = known.get(&service.listen) {
            placed.push(Placed { service, index, before: before.services.get(&index) });
            continue;
        }
        let Some(index) = free.next().or_else(|| spare.next()) else {
            let new = config.services.values().filter(|service| !known.contains_key(&service.listen)).count();
            let needed = before.services.len() + new;
            return Err(PlanError::Limit { what: "services", needed, limit, key: "limits.services" });
        };
        for (&backend, _) in before.backends.iter().filter(|(_, entry)| entry.service == index) {
            steps.add(Stage::Clear, Op::RemoveBackend { index: backend });
        }
        let op = Op::WriteService { index, listen: service.listen, mode: mode(desired, service) };
        steps.add(Stage::Services, op);
        placed.push(Placed { service, index, before: None });
    }
    Ok(placed)
}

/// Leads packets to the services of the document, and to no others.
pub(super) fn lead(desired: &Desired<'_>, before: &Tables, services: &[Placed<'_>], steps: &mut Steps) {
    let mut vips: BTreeMap<_, VipEntry> = BTreeMap::new();
    let mut keys = BTreeMap::new();
    for placed in services {
        let listen = placed.service.listen;
        let vip = vips.entry(listen.address).or_default();
        vip.shared = desired.shared_vips.contains(&listen.address);
        match (listen.port, listen.protocol) {
            (Some(_), _) => {
                keys.insert(listen, placed.index);
            }
            (None, Protocol::Tcp) => vip.any_tcp = Some(placed.index),
            (None, Protocol::Udp) => vip.any_udp = Some(placed.index),
        }
    }
    for (&address, &vip) in vips.iter().filter(|&(address, vip)| before.vips.get(address) != Some(vip)) {
        steps.add(Stage::Vips, Op::SetVip { address, vip });
    }
    for (&listen, &service) in keys.iter().filter(|&(listen, index)| before.keys.get(listen) != Some(index)) {
        steps.add(Stage::Keys, Op::SetKey { listen, service });
    }
    for &listen in before.keys.keys().filter(|listen| !keys.contains_key(listen)) {
        steps.add(Stage::Unkey, Op::RemoveKey { listen });
    }
    for &address in before.vips.keys().filter(|address| !vips.contains_key(address)) {
        steps.add(Stage::Unvip, Op::RemoveVip { address });
    }
    let wanted: BTreeSet<u32> = services.iter().map(|placed| placed.index).collect();
    for &index in before.services.keys().filter(|index| !wanted.contains(index)) {
        steps.add(Stage::Unserve, Op::RemoveService { index });
    }
}
