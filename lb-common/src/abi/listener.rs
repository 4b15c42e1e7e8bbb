//! Listeners: where services are called, and which service it is.

use super::Address;
use crate::shared::Shared;

/// Cells of a line of listeners.
pub const LISTENER_CELLS: usize = 4;

/// A line of the table of listeners; see [`crate::datapath::listener`].
#[repr(C, align(64))]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listeners {
    /// The cells.
    pub cells: [Listener; LISTENER_CELLS],
}

/// A place for one listener.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listener {
    /// Address, two halves in memory order.
    pub address: [Shared<u64>; 2],
    /// [`Called::port_and_protocol`] in the lower half, zero: nothing is here; a count of the uses of this
    /// place in the upper. Written last when a listener is written, and first when it is removed.
    pub guard: Shared<u64>,
    /// Index of the [`super::Service`].
    pub service: Shared<u32>,
    /// Zero.
    pub reserved: Shared<u32>,
}

/// What a packet calls, or a service listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Called {
    /// The address; an IPv4 address as an IPv4-mapped one.
    pub address: Address,
    /// The port, network order.
    pub port: u16,
    /// [`super::TCP`] or [`super::UDP`].
    pub protocol: u8,
}

impl Called {
    /// Port and protocol as one number; not zero, since no protocol here is.
    #[inline(always)]
    pub const fn port_and_protocol(self) -> u32 {
        self.port as u32 | (self.protocol as u32) << 16
    }
}
