//! The servers behind a balancer: how they really are, and what the operator and health say of them.

use std::net::{IpAddr, Ipv4Addr};

use lb_userspace::{
    dataplane::FlowsOf,
    health::Verdict,
    maglev::Member,
    model::{Admin, Backend, BackendAddress},
};

/// A server.
#[derive(Clone, Debug)]
pub struct Server {
    /// It answers.
    pub alive: bool,
    /// Counts its deaths and removals: connections of an earlier life are nobody's.
    pub life: u32,
    /// It is in the document.
    pub listed: bool,
    /// Its weight there.
    pub weight: u16,
    /// What health says.
    pub verdict: Verdict,
    /// Established connections that are its own.
    pub connections: u32,
}

/// All servers, and the size of the ring.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// The servers.
    pub servers: Vec<Server>,
    /// Slots of the ring.
    pub ring_size: u32,
}

impl Fleet {
    /// So many servers in use, and some more that are not in the document.
    pub fn new(listed: usize, others: usize, ring_size: u32) -> Self {
        let server = |number| Server {
            alive: true,
            life: 0,
            listed: number < listed,
            weight: 10,
            verdict: Verdict::USABLE,
            connections: 0,
        };
        Self { servers: (0..listed + others).map(server).collect(), ring_size }
    }

    /// Whether a server gets new connections.
    pub fn is_in_use(&self, server: usize) -> bool {
        let Server { listed, weight, verdict, .. } = self.servers[server];
        listed && weight > 0 && verdict.usable && verdict.flows == FlowsOf::Keep
    }

    /// How many get new connections.
    pub fn in_use(&self) -> usize {
        (0..self.servers.len()).filter(|&server| self.is_in_use(server)).count()
    }

    /// Whether connections of this life of a server could go on.
    pub fn holds(&self, server: usize, life: u32) -> bool {
        let it = &self.servers[server];
        it.alive && it.listed && it.life == life
    }

    /// All servers as members of a ring; those that do not take part have no weight.
    pub fn members(&self, takes_part: impl Fn(usize) -> bool) -> Vec<Member> {
        let weight = |number: usize| if takes_part(number) { self.servers[number].weight } else { 0 };
        (0..self.servers.len())
            .map(|number| Member { address: address(number), weight: weight(number) })
            .collect()
    }

    /// Those in the document, as it lists them.
    pub fn backends(&self) -> impl Iterator<Item = (usize, Backend)> {
        let listed = self.servers.iter().enumerate().filter(|(_, server)| server.listed);
        listed.map(|(number, server)| {
            let backend = Backend { address: address(number), weight: server.weight, admin: Admin::Enabled };
            (number, backend)
        })
    }
}

/// A server's address.
pub fn ip(server: usize) -> IpAddr {
    Ipv4Addr::from(0x0a02_0001 + server as u32).into()
}

/// The same, as a pool names it.
pub fn address(server: usize) -> BackendAddress {
    BackendAddress::Remote(ip(server), None)
}

/// A server's MAC address.
pub fn mac(server: usize) -> [u8; 6] {
    [2, 0, 0, 0, 9, server as u8]
}
