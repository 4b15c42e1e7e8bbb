//! Translation: addresses, ports, checksums, TTL, link layer.

use super::{family::Family, flow::port_of, parse::Packet};
use crate::{
    abi::{Backend, Flow, Service, Source, UDP},
    verdict::{DropReason, Verdict},
    wire::{
        Frame,
        checksum::Sum,
        eth::{self, Eth, Mac, Vlan, vlan_from_word},
        join,
        l4::{Tcp, Udp},
    },
};

/// Makes a client's packet one from a port (network order) of a source of ours to the backend. `None`: a header is gone, which
/// cannot be after it has been read.
#[inline(always)]
pub(crate) fn to_backend<V: Family>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    port: u16,
    backend: &Backend,
    source: &Source,
) -> Option<()> {
    forward(frame, packet, backend)?;
    let addresses = [V::narrow(&source.address), V::narrow(&backend.address)];
    translate(frame, packet, addresses, [port, port_of(backend, packet.destination_port())])
}

/// Leads a packet to the backend as it is: only the link layer changes. `None` as in [`to_backend`].
#[inline(always)]
pub(crate) fn forward<V: Family>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    backend: &Backend,
) -> Option<()> {
    let next_hop = backend.next_hop.get();
    write_link(frame, next_hop, backend.own_mac.get())?;
    if packet.tagged() && vlan_from_word(next_hop) != 0 {
        write_vlan(frame, vlan_from_word(next_hop))?;
    }
    Some(())
}

/// Makes a backend's packet one from the service to the client.
#[inline(always)]
pub(crate) fn to_client<V: Family>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    flow: &Flow,
    service: &Service,
    own_mac: u64,
) -> Result<(), Verdict> {
    let hop = flow.client_hop.get();
    if packet.tagged() != (flow.flags.get() & Flow::TAGGED != 0) {
        return Err(DropReason::Vlan.into());
    }
    let addresses = [V::narrow(&service.address), V::narrow(&flow.client)];
    let ports = [flow.ports[1].get(), flow.ports[0].get()];
    let mut write = || {
        write_link(frame, hop, own_mac)?;
        if packet.tagged() {
            write_vlan(frame, vlan_from_word(hop))?;
        }
        translate(frame, packet, addresses, ports)
    };
    write().ok_or(DropReason::Tables.into())
}

/// Writes addresses (source, destination) and ports (likewise, network order), TTL and checksums.
#[inline(always)]
fn translate<V: Family>(
    frame: &mut impl Frame,
    packet: &Packet<V>,
    [source, destination]: [V::Address; 2],
    ports: [u16; 2],
) -> Option<()> {
    let ports = join(ports);
    V::rewrite(frame, usize::from(packet.l3()), source, destination)?;
    // The transport's checksum covers the addresses too (RFC 9293 section 3.1, RFC 768).
    let sum = V::replace(Sum::default(), packet.source, source);
    let sum = V::replace(sum, packet.destination, destination).replace_u32(packet.ports, ports);
    if packet.protocol() == UDP {
        let udp: &mut Udp = frame.at(usize::from(packet.l4()))?;
        udp.ports = ports;
        // RFC 768: zero means that there is none, and a sum of zero is sent as ffff.
        if udp.checksum != 0 {
            let checksum = sum.update(udp.checksum);
            udp.checksum = if checksum == 0 { 0xffff } else { checksum };
        }
    } else {
        let tcp: &mut Tcp = frame.at(usize::from(packet.l4()))?;
        tcp.ports = ports;
        tcp.checksum = sum.update(tcp.checksum);
    }
    Some(())
}

#[inline(always)]
fn write_link(frame: &mut impl Frame, to: u64, from: u64) -> Option<()> {
    let eth: &mut Eth = frame.at(0)?;
    eth.destination = Mac::of_word(to);
    eth.source = Mac::of_word(from);
    Some(())
}

/// Writes a VLAN identifier, and leaves the priority.
#[inline(always)]
fn write_vlan(frame: &mut impl Frame, id: u16) -> Option<()> {
    let tag: &mut Vlan = frame.at(eth::LEN)?;
    tag.tci = tag.tci & !eth::VLAN_ID | id & eth::VLAN_ID;
    Some(())
}
