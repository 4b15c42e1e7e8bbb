//! Connections that are cut, and what makes both their sides hear of it ([`crate::daemon::farewell`]).

use std::net::SocketAddr;

use tracing::info;

use super::Core;
use crate::{
    daemon::{farewell::Call, snapshot::address},
    dataplane::{
        BackendEntry, Dataplane, DataplaneError, FlowEntry, FlowState, FlowsOf, NextHop, Op, Tables,
    },
    model::{Listen, Protocol},
};

/// The backend whose connections went on so far, and end with this operation on the tables.
pub(super) fn by(op: &Op, before: &Tables) -> Option<u32> {
    let Op::WriteBackend { index, backend } = op else { return None };
    let went_on = before
        .backends
        .get(index)
        .is_some_and(|before| before.generation == backend.generation && before.flows != FlowsOf::Cut);
    let translated = before.services.get(&backend.service).is_some_and(|service| !service.mode.direct);
    (went_on && translated && backend.flows == FlowsOf::Cut).then_some(*index)
}

impl<D: Dataplane> Core<D> {
    /// The connections of backends that were cut since this was last called; they are counted.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn take_cut(&mut self) -> Result<Vec<FlowEntry>, DataplaneError> {
        let cut = std::mem::take(&mut self.cut);
        let mut found = Vec::new();
        if cut.is_empty() {
            return Ok(found);
        }
        let tables = self.mirror.held();
        self.plane.flows(&mut |flow| {
            // Who has spoken since has been told already, and the other side has not.
            let concerned = flow.protocol == Protocol::Tcp && (flow.state != FlowState::Closed || flow.cut);
            if cut.contains(&flow.backend) && concerned && self.cut_entry(flow).is_some() {
                found.push(*flow);
            }
        })?;
        for index in cut {
            let Some(entry) = tables.backends.get(&index) else { continue };
            let Some(service) = tables.services.get(&entry.service) else { continue };
            let number = found.iter().filter(|flow| flow.backend == index).count();
            if number > 0 {
                *self.cuts.entry(service.listen).or_default() += number as u64;
                info!(service = %service.listen, backend = %address(entry), connections = number, "cut");
            }
        }
        Ok(found)
    }

    /// How many connections of a service have been cut since the daemon started.
    pub fn cuts(&self, listen: Listen) -> u64 {
        self.cuts.get(&listen).copied().unwrap_or_default()
    }

    /// Resets that each CPU may send in a second.
    pub fn resets_per_second(&self) -> u32 {
        self.tables().globals.as_ref().map_or(0, |globals| globals.resets_per_second)
    }

    /// Whether a connection is one that is cut.
    pub fn is_cut(&self, flow: &FlowEntry) -> bool {
        self.cut_entry(flow).is_some()
    }

    /// The calls that tell both sides of a connection that it is cut, of those that can be reached; none if it is
    /// not cut any more.
    pub fn calls(&self, flow: &FlowEntry) -> Vec<Call> {
        let Some(entry) = self.cut_entry(flow) else { return Vec::new() };
        let tables = self.tables();
        let vlan = flow.from.vlan;
        let listen = tables.services.get(&entry.service).map(|service| service.listen);
        let own_mac = tables.interfaces.get(&flow.from.interface);
        let to_client = listen.zip(own_mac).map(|(listen, &own_mac)| Call {
            hop: NextHop { interface: flow.from.interface, own_mac, mac: flow.from.mac },
            vlan,
            from: SocketAddr::new(listen.address, flow.called_port),
            to: flow.client,
        });
        // This host's own side is not seen by the program, and needs no call.
        let source = flow.source.zip(flow.source_port);
        let to_backend =
            entry.address.zip(entry.next_hop).zip(source).map(|((ip, hop), (source, port))| Call {
                hop,
                // Its packets carry the client's tag on.
                vlan,
                from: SocketAddr::new(source, port),
                to: SocketAddr::new(ip, entry.port.unwrap_or(flow.called_port)),
            });
        to_client.into_iter().chain(to_backend).collect()
    }

    /// The entry of a flow's backend, if its flows are cut.
    fn cut_entry(&self, flow: &FlowEntry) -> Option<&BackendEntry> {
        let entry = self.mirror.held().backends.get(&flow.backend)?;
        (entry.generation == flow.generation && entry.flows == FlowsOf::Cut).then_some(entry)
    }
}
