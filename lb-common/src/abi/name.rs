//! Names of the maps: the same as those of the statics in lb-ebpf (a test compares them).

/// [`super::Config`], one.
pub const CONFIG: &str = "CONFIG";
/// Array of [`super::Listeners`]: where services are called.
pub const LISTENERS: &str = "LISTENERS";
/// IPv4 address to [`super::Vip`].
pub const VIPS_V4: &str = "VIPS_V4";
/// IPv6 address to [`super::Vip`].
pub const VIPS_V6: &str = "VIPS_V6";
/// Array of [`super::Service`].
pub const SERVICES: &str = "SERVICES";
/// Trie of [`super::RuleV4`] to [`super::Action`].
pub const RULES_V4: &str = "RULES_V4";
/// Trie of [`super::RuleV6`] to [`super::Action`].
pub const RULES_V6: &str = "RULES_V6";
/// Array of [`super::Page`].
pub const PAGES: &str = "PAGES";
/// Array of [`super::SidePage`].
pub const SIDES: &str = "SIDES";
/// Array of [`super::Records`]: connections whose backend is written down.
pub const RECORDS: &str = "RECORDS";
/// Array of [`super::Backend`].
pub const BACKENDS: &str = "BACKENDS";
/// Array of u64: where each backend's search for a free port goes on.
pub const CURSORS: &str = "CURSORS";
/// Array of u64: whose turn it is in each round-robin service.
pub const TURNS: &str = "TURNS";
/// IPv4 address to the index of a [`super::Source`].
pub const SOURCE_KEYS_V4: &str = "SOURCE_KEYS_V4";
/// IPv6 address to the index of a [`super::Source`].
pub const SOURCE_KEYS_V6: &str = "SOURCE_KEYS_V6";
/// Array of [`super::Source`].
pub const SOURCES: &str = "SOURCES";
/// Array of u64 by interface index: our MAC address there, in the lower six bytes (memory order).
pub const INTERFACES: &str = "INTERFACES";
/// Array of [`super::Flow`].
pub const FLOWS: &str = "FLOWS";
/// Per-CPU array of u64, by [`crate::verdict::Verdict::counter`] and [`crate::verdict::Note::counter`].
pub const VERDICTS: &str = "VERDICTS";
/// Per-CPU array of [`super::Traffic`], by backend.
pub const TRAFFIC: &str = "TRAFFIC";
/// Per-CPU array of [`super::Budget`], one: resets left in this second.
pub const BUDGET: &str = "BUDGET";

/// All of them.
pub const ALL: [&str; 21] = [
    CONFIG,
    LISTENERS,
    VIPS_V4,
    VIPS_V6,
    SERVICES,
    RULES_V4,
    RULES_V6,
    PAGES,
    SIDES,
    RECORDS,
    BACKENDS,
    CURSORS,
    TURNS,
    SOURCE_KEYS_V4,
    SOURCE_KEYS_V6,
    SOURCES,
    INTERFACES,
    FLOWS,
    VERDICTS,
    TRAFFIC,
    BUDGET,
];
/// Name of the XDP program.
pub const PROGRAM: &str = "lobby";
