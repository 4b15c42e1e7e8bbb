//! Looking at the live tables with the program's own eyes: a copy that the same decision runs on here, and
//! a run of the program itself on one frame.

use lb_common::{
    abi::{self, INTERFACES, RingAt, name},
    shared::Shared,
    sim::MemTables,
};

use super::{KernelDataplane, mapped::Mapped, unread};
use crate::dataplane::{DataplaneError, Ring, cells::entry};

impl KernelDataplane {
    /// A copy of the tables, flows and cursors included, that [`lb_common::datapath::decide`] can run on.
    /// Counters begin at zero.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub fn copy(&self) -> Result<MemTables, DataplaneError> {
        let mut copy = MemTables::new(0, 0, 0, 1);
        copy.config = self.config().clone();
        copy.listeners = self.listeners.to_vec();
        copy.services = self.services.to_vec();
        copy.pages = self.pages.to_vec();
        copy.sides = self.sides.to_vec();
        copy.records = self.records.to_vec();
        copy.backends = self.backends.to_vec();
        copy.sources = self.sources.to_vec();
        copy.flows = self.flows.to_vec();
        copy.cursors = numbers(&self.cursors);
        copy.turns = numbers(&self.turns);
        copy.interfaces = (0..INTERFACES)
            .zip(self.interfaces.iter())
            .map(|(i, mac)| (i, mac.get()))
            .filter(|(_, m)| *m != 0)
            .collect();
        copy.traffic.replace(vec![abi::Traffic::default(); self.backends.len()]);
        macro_rules! pairs {
            ($map:expr, $name:expr) => {
                $map.iter().collect::<Result<_, _>>().map_err(unread($name))?
            };
        }
        copy.vips_v4 = pairs!(self.vips_v4, name::VIPS_V4);
        copy.vips_v6 = pairs!(self.vips_v6, name::VIPS_V6);
        copy.source_keys_v4 = pairs!(self.source_keys_v4, name::SOURCE_KEYS_V4);
        copy.source_keys_v6 = pairs!(self.source_keys_v6, name::SOURCE_KEYS_V6);
        for (set, rules) in self.read_rules()? {
            for (network, action) in rules {
                let prefix = u32::from(network.prefix);
                match network.address {
                    std::net::IpAddr::V4(address) => {
                        let address = abi::address_v4(address.octets());
                        copy.rules_v4.insert((prefix, abi::RuleV4 { set, address }), action);
                    }
                    std::net::IpAddr::V6(address) => {
                        let address = abi::address_v6(address.octets());
                        copy.rules_v6.insert((prefix, abi::RuleV6 { set, address }), action);
                    }
                }
            }
        }
        Ok(copy)
    }

    /// A service's ring as packets find it now.
    ///
    /// # Errors
    /// When there is no such service, or its ring makes no sense.
    pub fn ring(&self, service: u32) -> Result<Ring, DataplaneError> {
        let word = entry(&self.services, service, "service")?.ring.get();
        self.read_ring(RingAt::from_word(word))
    }

    /// Runs the program on one frame, as if it came in by the loopback interface. What it does to the
    /// tables is done; the frame goes nowhere.
    ///
    /// # Errors
    /// When the kernel refuses, as it does a frame shorter than an Ethernet header.
    pub fn run_once(&mut self, frame: &[u8]) -> Result<Ran, String> {
        self.program.run_once(frame)
    }

    /// The loaded program, to be tail-called by the packet benchmark's generator ([`super::GENERATOR`]).
    ///
    /// # Errors
    /// When no more descriptors can be had.
    pub fn program_fd(&mut self) -> Result<aya::programs::ProgramFd, String> {
        self.program.fd()
    }

    /// How many instructions the verifier walked through to accept the program, if the kernel says it
    /// (Linux 5.16).
    ///
    /// # Errors
    /// When the kernel does not give out anything about the program.
    pub fn verified_instructions(&mut self) -> Result<Option<u32>, String> {
        self.program.verified_instructions()
    }
}

/// What the program did with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// The XDP action, as in `enum xdp_action`.
    pub action: u32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

fn numbers(words: &Mapped<Shared<u64>>) -> Vec<std::cell::Cell<u64>> {
    words.iter().map(|word| std::cell::Cell::new(word.get())).collect()
}
