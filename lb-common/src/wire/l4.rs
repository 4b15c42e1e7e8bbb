//! TCP and UDP.

#![expect(unsafe_code, reason = "headers are declared to be plain bytes")]

use super::wire;

/// TCP header without options (RFC 9293 section 3.1).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Tcp {
    /// Source and destination port.
    pub ports: u32,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Data offset in 32-bit words, in the upper four bits.
    pub offset: u8,
    /// Control bits.
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Checksum.
    pub checksum: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

impl Tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgment field is significant.
    pub const ACK: u8 = 0x10;
    /// Length in bytes without options.
    pub const LEN: usize = 20;
}

/// UDP header (RFC 768).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    /// Source and destination port.
    pub ports: u32,
    /// Length of header and data.
    pub length: u16,
    /// Checksum; zero: none.
    pub checksum: u16,
}

impl Udp {
    /// Length in bytes.
    pub const LEN: usize = 8;
}

wire! { Tcp = 20, Udp = 8 }
