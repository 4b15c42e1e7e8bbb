//! Child processes that do not outlive who started them.

use std::{
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, ExitStatus},
    sync::{LazyLock, Mutex, mpsc},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// A running program. Dropped, it is killed and waited for, with the children it has in its process group.
#[derive(Debug)]
pub struct Proc {
    child: Child,
}

impl Proc {
    /// Starts a command from a thread that lives as long as this process: a child of
    /// [`super::Namespace::command`] dies with the thread that started it.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(mut command: Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        // A process group of its own, so that what it starts in turn can be ended with it.
        command.process_group(0);
        let (answer, answered) = mpsc::channel();
        let spawner = SPAWNER.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        spawner.send((command, answer)).context("the thread that starts programs has ended")?;
        let child = answered.recv().context("the thread that starts programs has ended")?;
        Ok(Self { child: child.with_context(|| format!("{name} cannot be started"))? })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its pipes, where the command asked for some.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal to it alone.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        nix::sys::signal::kill(self.pid(), signal).with_context(|| format!("process {}", self.id()))
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// It has been waited for elsewhere.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Kills it, as `kill -9` does, and waits for its end.
    ///
    /// # Errors
    ///
    /// It had ended by itself before.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let status = self.child.wait()?;
        anyhow::ensure!(
            status.signal() == Some(libc::SIGKILL),
            "process {} had ended before: {status}",
            self.id()
        );
        Ok(())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // Already gone is as good. The group, since a server's workers survive their master.
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

type Request = (Command, mpsc::Sender<std::io::Result<Child>>);

static SPAWNER: LazyLock<Mutex<mpsc::Sender<Request>>> = LazyLock::new(|| {
    let (requests, requested) = mpsc::channel::<Request>();
    std::thread::spawn(move || {
        for (mut command, answer) in requested {
            // Nobody waits any more only if the asking thread is gone; then the child is dropped.
            let _ = answer.send(command.spawn());
        }
    });
    Mutex::new(requests)
});
