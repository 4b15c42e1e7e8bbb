//! Moments at which a test lets this process die: between two changes of the tables that packets see.
//!
//! Only in builds with debug assertions; in others a point is nothing at all.

/// Where [`die_after`] is told to a daemon: the number of points that it still passes.
pub const VARIABLE: &str = "LOBBY_DIE_AFTER";

#[cfg(debug_assertions)]
mod counting {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering::SeqCst},
    };

    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };

    pub(super) static LEFT: LazyLock<AtomicU64> = LazyLock::new(|| {
        let told = std::env::var(super::VARIABLE).ok().and_then(|text| text.parse().ok());
        AtomicU64::new(told.unwrap_or(u64::MAX))
    });

    pub(super) fn point() {
        if LEFT.load(SeqCst) != u64::MAX && LEFT.fetch_sub(1, SeqCst) == 0 {
            // As `kill -9` does it; nothing of this process runs any more.
            while kill(Pid::this(), Signal::SIGKILL).is_ok() {}
        }
    }
}

/// This process passes so many points, and dies at the next; in a build without debug assertions it lives.
pub fn die_after(points: u64) {
    #[cfg(debug_assertions)]
    counting::LEFT.store(points, std::sync::atomic::Ordering::SeqCst);
    #[cfg(not(debug_assertions))]
    let _ = points;
}

/// One of the moments.
#[inline(always)]
pub(super) fn point() {
    #[cfg(debug_assertions)]
    counting::point();
}
