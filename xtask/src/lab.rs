//! Networks made of namespaces: a client, the balancer and backends, joined by veth pairs.
//!
//! ```text
//! two interfaces                                   one interface
//!
//! client ── front [balancer] back ── switch ─┬ b1   client ─────────────┐
//!                                            ├ b2   [balancer] front ── switch ─┬ b1
//!                                            └ b3                               └ b2
//! ```
//!
//! | place | two interfaces | one interface |
//! |---|---|---|
//! | client, `eth0` | 10.1.0.2/24, fd00:1::2/64 | the same |
//! | balancer, `front` | 10.1.0.1/24, fd00:1::1/64 | the same |
//! | balancer, `back` | 10.2.0.1/24, fd00:2::1/64 | – |
//! | backend i (from 0), `eth0` | 10.2.0.(10+i)/24, fd00:2::(10+i)/64 | 10.1.0.(10+i)/24, fd00:1::(10+i)/64 |
//!
//! Client and backends have their default route by the balancer. The service's address, [`VIP`], is
//! nowhere yet: to put it where it is answered is Lobby's task.
//!
//! The namespaces have no names and are held by file descriptors alone: whatever happens to the process,
//! nothing is left behind, and any number of labs can exist side by side. The balancer has its own
//! mounts besides: a `/run` and a `/sys/fs/bpf` of its own. For people there is [`named`].
//!
//! What veth needs for XDP, and does not say that it needs (all set here):
//!
//! - the receiver of frames that XDP sends must have NAPI, which generic receive offload brings,
//! - transmit checksum offload must be off, else packets without checksums reach the program,
//! - an MTU of no more than 3506 bytes for a program in native mode.

pub mod link;
pub mod named;
mod namespace;
pub mod postgres;
mod process;
mod topology;

pub use namespace::Namespace;
pub use postgres::Postgres;
pub use process::Proc;
pub use topology::{Lab, LabOptions, VIP, VIP_V6};

/// Names the file that tests which were skipped write their names to.
pub const SKIPPED_VARIABLE: &str = "LOBBY_SKIPPED_TESTS";

/// Whether a lab can be made here. A test that gets `false` returns at once: it has been noted as skipped,
/// by this name.
///
/// # Panics
///
/// When it cannot, and `CI` is `true`: there, what is not tested is not known to work.
pub fn possible(test: &str) -> bool {
    use std::io::Write as _;
    let Err(error) = Namespace::new("probe") else { return true };
    let reason = format!("{test}: no network namespaces without root's rights ({error:#})");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{reason}");
    // Not by eprintln, which the test runner keeps to itself.
    let _ = writeln!(std::io::stderr(), "skipped: {reason}");
    if let Some(list) = std::env::var_os(SKIPPED_VARIABLE) {
        let file = std::fs::File::options().append(true).create(true).open(list);
        // The line above has told it already.
        let _ = file.and_then(|mut file| writeln!(file, "{reason}"));
    }
    false
}
