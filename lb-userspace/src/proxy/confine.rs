//! Gives up what the desk does not need before it reads a byte of a stranger: another user, no capabilities,
//! no way to get any.

use std::io;

use nix::unistd::{Gid, Uid, User, setgroups, setresgid, setresuid};

/// The desk's own user, where the system has one; else [`NOBODY`].
const USER: &str = "lobby";

/// The user whom nothing belongs to, on every Linux.
const NOBODY: u32 = 65534;

/// Becomes a user without rights. To be called before there is a second thread: each has its own.
///
/// # Errors
/// When some right cannot be given up; then it is not to go on.
pub fn confine() -> io::Result<()> {
    nix::sys::prctl::set_no_new_privs()?;
    if Uid::effective().is_root() {
        let (user, group) = match User::from_name(USER) {
            Ok(Some(user)) if !user.uid.is_root() => (user.uid, user.gid),
            _ => (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY)),
        };
        setgroups(&[])?;
        setresgid(group, group, group)?;
        setresuid(user, user, user)?;
    }
    // A daemon that is not root but has capabilities hands them down as they are.
    use caps::CapSet;
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(io::Error::other)?;
    }
    Ok(())
}
