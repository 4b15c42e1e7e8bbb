//! What a packet meets: the whole decision, once, for BPF and for the host.
//!
//! From the ground up:
//!
//! - [`wire`]: what frames look like. [`shared`]: words that several CPUs use at once.
//! - [`abi`]: the maps. [`verdict`]: what can become of a packet.
//! - [`tables`]: the maps as operations, so that they can also be memory.
//! - [`datapath`]: the decision.
//! - `sim` (feature): frames and tables in memory.
//!
//! Architecture invariant: nothing here knows whether it runs in the kernel. There is no `cfg` in the
//! datapath, no allocation, no panic, no formatting.

#![no_std]
#![deny(unsafe_code)]

pub mod abi;
pub mod bench;
pub mod datapath;
pub mod shared;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod tables;
pub mod verdict;
pub mod wire;
