//! What must outlive the daemon besides the pinned tables (which also say how the backends were): which
//! addresses it put, which neighbours it has kept resolved, and which timelines of databases it followed. One small JSON file in the run directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::addresses::Placed;

/// The file's name in the run directory.
const FILE: &str = "state.json";

/// What is remembered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Addresses that were put, and on which interface.
    pub addresses: BTreeSet<Placed>,
    /// The BPF file system in which the tables are pinned.
    pub bpffs: Option<PathBuf>,
    /// Neighbours that the kernel was told to keep resolved.
    pub neighbours: BTreeSet<(u32, IpAddr)>,
    /// Which timeline of each pool's databases was followed last.
    pub timelines: BTreeMap<String, u32>,
}

/// Where it is remembered.
#[derive(Clone, Debug)]
pub struct RecordFile {
    path: PathBuf,
}

impl RecordFile {
    /// The file of that run directory.
    pub fn new(run_dir: &Path) -> Self {
        Self { path: run_dir.join(FILE) }
    }

    /// What was remembered; nothing when there is no file.
    ///
    /// # Errors
    /// When the file cannot be read, or is not what [`RecordFile::write`] writes.
    pub fn read(&self) -> io::Result<Record> {
        match std::fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let path = self.path.display();
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{path} is damaged ({error}); remove it, then check `ip address` for addresses that Lobby put"),
                )
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            Err(error) => Err(error),
        }
    }

    /// Remembers, in one step: after a crash the file holds either this or what it held before.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        serde_json::to_writer(&mut file, record)?;
        file.flush()?;
        file.persist(&self.path)?;
        Ok(())
    }

    /// Forgets everything.
    ///
    /// # Errors
    /// When the file is there and cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_nothing_is_there_at_first() {
        let directory = tempfile::tempdir().unwrap();
        let file = RecordFile::new(directory.path());
        assert_eq!(file.read().unwrap(), Record::default());
        let record = Record {
            addresses: [(1, "203.0.113.10".parse().unwrap())].into(),
            bpffs: Some("/sys/fs/bpf".into()),
            neighbours: [(2, "2001:db8::1".parse().unwrap())].into(),
            timelines: [("accounts".to_owned(), 3)].into(),
        };
        file.write(&record).unwrap();
        assert_eq!(file.read().unwrap(), record);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!(file.read().unwrap(), Record::default());
    }

    #[test]
    fn a_damaged_file_is_an_error_that_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(FILE), "{").unwrap();
        let error = RecordFile::new(directory.path()).read().unwrap_err().to_string();
        assert!(error.contains("damaged") && error.contains("remove it"), "{error}");
    }
}
