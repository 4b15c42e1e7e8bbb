//! What the daemon needs of a data plane besides its tables: interfaces, and an end.

use std::collections::BTreeMap;

use lb_common::sim::MemTables;

use crate::dataplane::{Dataplane, memory::MemoryDataplane};

/// A data plane that packets can be led to.
pub trait Plane: Dataplane {
    /// Leads the packets of exactly these interfaces (name and index) to the program. Where it is so
    /// already, nothing happens; where it was so and the interface is not listed, it ends.
    ///
    /// # Errors
    /// In words for an operator; interfaces before the one that failed are attached.
    fn attach(&mut self, interfaces: &BTreeMap<String, u32>) -> Result<Vec<Notice>, String>;

    /// A copy of the tables as packets see them now, for looking at what becomes of one.
    ///
    /// # Errors
    /// In words for an operator.
    fn copied(&self) -> Result<MemTables, String>;

    /// Takes everything away: programs, tables, what is pinned.
    ///
    /// # Errors
    /// In words for an operator, naming what is left.
    fn take_down(&mut self) -> Result<(), String>;
}

/// Something to know about an interface that was attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Name of the interface.
    pub interface: String,
    /// The driver runs the program (native), rather than the stack (generic).
    pub native: bool,
    /// Why not natively, in words.
    pub reason: String,
}

impl Plane for MemoryDataplane {
    fn attach(&mut self, _: &BTreeMap<String, u32>) -> Result<Vec<Notice>, String> {
        Ok(Vec::new())
    }

    fn copied(&self) -> Result<MemTables, String> {
        Err("no packets come by: the daemon runs with tables in memory".into())
    }

    fn take_down(&mut self) -> Result<(), String> {
        *self = Self::new(self.tables().map_err(|error| error.to_string())?.limits);
        Ok(())
    }
}
