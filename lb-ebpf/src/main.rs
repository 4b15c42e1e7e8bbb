//! Lobby's XDP program: the decision of [`lb_common`] over BPF maps, and its verdict as an XDP action.
//!
//! Nothing is decided here. [`frame`] is how packets are reached, [`maps`] are the tables.
//!
//! On the host this is an empty program, so that `cargo check` and editors can look at the whole
//! workspace; the real one is built by `lb-userspace/build.rs`.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(internal_features, reason = "BPF has compare-and-swap, core does not offer it")
)]

#[cfg(target_arch = "bpf")]
mod frame;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod program;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
