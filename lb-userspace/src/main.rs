//! The command `lb`.

use std::process::ExitCode;

/// A request at the reception desk takes and gives back memory some hundred times, mostly on the same thread: less than
/// glibc's costs that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    lb_userspace::cli::run()
}
