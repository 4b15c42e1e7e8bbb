//! A thread with a network namespace of its own, joined to a peer in another.

use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, unshare};

/// Runs `test` in a thread with a new network namespace: `lb0` (10.7.0.1/24, 2001:db8:7::1/64) is joined
/// to `peer`, which lives in a namespace of its own and has the .2 and ::2, MAC 02:00:00:00:00:02.
/// Processes that the test starts are in the namespace too. Without root's rights it is skipped, and said so.
pub(super) fn in_namespace(test: impl FnOnce(&Peer) + Send + 'static) {
    // The test runner names its threads after the tests.
    if !xtask::lab::possible(std::thread::current().name().unwrap_or("a test in a namespace")) {
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        // Holds the peer's namespace open until it is dropped.
        let holder = Command::new("unshare").args(["--net", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
        let peer = Peer { holder };
        ip("link set lo up");
        ip("link add lb0 type veth peer name peer");
        // The holder leaves our namespace some time after its start.
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        while std::fs::read_link(format!("/proc/{}/ns/net", peer.holder.id())).unwrap() == own {
            std::thread::yield_now();
        }
        ip(&format!("link set peer netns {}", peer.holder.id()));
        ip("address add 10.7.0.1/24 dev lb0");
        ip("address add 2001:db8:7::1/64 dev lb0 nodad");
        ip("link set lb0 up");
        peer.ip("link set lo up");
        peer.ip("link set peer address 02:00:00:00:00:02");
        peer.ip("address add 10.7.0.2/24 dev peer");
        peer.ip("address add 2001:db8:7::2/64 dev peer nodad");
        peer.ip("link set peer up");
        test(&peer);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The other end.
pub(super) struct Peer {
    holder: Child,
}

impl Peer {
    /// Runs `ip` there.
    pub(super) fn ip(&self, arguments: &str) {
        run(self.command("ip").args(arguments.split(' ')));
    }

    /// A command that runs there.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "-t", &self.holder.id().to_string(), program]);
        command
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        _ = self.holder.wait();
    }
}

/// Runs `ip` here.
pub(super) fn ip(arguments: &str) {
    run(Command::new("ip").args(arguments.split(' ')));
}

/// Runs a command, which must succeed.
pub(super) fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}
