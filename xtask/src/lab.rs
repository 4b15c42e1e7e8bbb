//! Lab.

/// Names the file that tests which were skipped write their names to.
pub const SKIPPED_VARIABLE: &str = "LOBBY_SKIPPED_TESTS";
