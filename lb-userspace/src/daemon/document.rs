//! The document's file: read whole, written in one step, and compared by its revision.

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::config::{Complaints, Document};

/// The file that the document is in.
#[derive(Clone, Debug)]
pub struct DocumentFile {
    path: PathBuf,
}

/// The document cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not readable.
    #[error("cannot read the document {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not to be written.
    #[error("the document {} is read-only: {why}; change it where it comes from, and the daemon follows", .path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
        /// What makes it so.
        why: String,
    },
    /// Not writable.
    #[error("cannot write the document {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl DocumentFile {
    /// The file at that path, made absolute, since the daemon may change its working directory.
    pub fn new(path: &Path) -> Self {
        Self { path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()) }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directories in which a change of the document shows: its own, and that of what it is a
    /// symbolic link to.
    pub fn directories(&self) -> BTreeSet<PathBuf> {
        let parent = |path: &Path| path.parent().map(Path::to_owned);
        let target = fs::canonicalize(&self.path).ok();
        parent(&self.path).into_iter().chain(target.as_deref().and_then(parent)).collect()
    }

    /// What a text means in this file's place: files that it names are beside it.
    ///
    /// # Errors
    /// When it has mistakes.
    pub fn parse(&self, text: &str) -> Result<Document, Complaints> {
        let mut document = Document::parse(text)?;
        document.config.resolve(self.path.parent().unwrap_or(Path::new("/")));
        Ok(document)
    }

    /// The whole text.
    ///
    /// # Errors
    /// When it cannot be read, or is not UTF-8.
    pub fn read(&self) -> Result<String, DocumentError> {
        fs::read_to_string(&self.path)
            .map_err(|source| DocumentError::Read { path: self.path.clone(), source })
    }

    /// What it means that it could not be read, in words for an operator.
    pub fn unreadable(&self, why: &DocumentError) -> String {
        let path = self.path.display();
        match why {
            DocumentError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                format!(
                    "the document {path} is gone; what is in force stays until it is back, and a new start would fail"
                )
            }
            why => format!("{why}; what is in force stays, and a new start would fail"),
        }
    }

    /// Whether edits can be written.
    ///
    /// # Errors
    /// What hinders them.
    pub fn writable(&self) -> Result<(), DocumentError> {
        let target = self.target();
        let read_only = |why: String| DocumentError::ReadOnly { path: self.path.clone(), why };
        let metadata = fs::metadata(&target)
            .map_err(|source| DocumentError::Read { path: self.path.clone(), source })?;
        // Root may write what nobody may; the mode says what is meant.
        if metadata.mode() & 0o222 == 0 {
            return Err(read_only(format!("its mode is {:04o}", metadata.mode() & 0o7777)));
        }
        let directory = target.parent().unwrap_or(Path::new("/"));
        nix::unistd::access(directory, nix::unistd::AccessFlags::W_OK)
            .map_err(|error| read_only(format!("{}: {}", directory.display(), error.desc())))
    }

    /// Replaces the text in one step, keeping mode and owner: a reader sees the text before or the text
    /// after, and so does whoever comes after a crash.
    ///
    /// # Errors
    /// When the document is read-only, or cannot be written.
    pub fn write(&self, text: &str) -> Result<(), DocumentError> {
        self.writable()?;
        let target = self.target();
        self.replace(&target, text).map_err(|source| DocumentError::Write { path: self.path.clone(), source })
    }

    fn replace(&self, target: &Path, text: &str) -> io::Result<()> {
        let directory = target.parent().unwrap_or(Path::new("/"));
        let before = fs::metadata(target)?;
        let mut file = tempfile::Builder::new().prefix(".lb-").suffix(".toml").tempfile_in(directory)?;
        file.write_all(text.as_bytes())?;
        std::os::unix::fs::fchown(file.as_file(), Some(before.uid()), Some(before.gid()))?;
        file.as_file().set_permissions(Permissions::from_mode(before.mode() & 0o7777))?;
        file.as_file().sync_all()?;
        file.persist(target)?;
        // The new name lasts once its directory does.
        fs::File::open(directory)?.sync_all()
    }

    /// What is really written: the end of a chain of symbolic links.
    fn target(&self) -> PathBuf {
        fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone())
    }
}

/// A name for exactly this text. An edit that says which revision it was made on cannot undo another.
pub fn revision(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(directory: &Path, mode: u32) -> DocumentFile {
        let path = directory.join("lb.toml");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        DocumentFile::new(&path)
    }

    #[test]
    fn writing_keeps_the_mode_and_leaves_nothing_beside() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path(), 0o640);
        file.write("after").unwrap();
        assert_eq!(file.read().unwrap(), "after");
        assert_eq!(fs::metadata(file.path()).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_symbolic_link_stays_one() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let target = file(elsewhere.path(), 0o644);
        let link = directory.path().join("link.toml");
        std::os::unix::fs::symlink(target.path(), &link).unwrap();
        let document = DocumentFile::new(&link);
        assert_eq!(document.directories().len(), 2);
        document.write("after").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(target.read().unwrap(), "after");
    }

    #[test]
    fn a_document_without_write_permission_refuses_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path(), 0o444);
        let error = file.write("after").unwrap_err().to_string();
        assert!(error.contains("read-only") && error.contains("0444"), "{error}");
        assert_eq!(file.read().unwrap(), "before");
    }

    #[test]
    fn revisions_differ_with_the_text() {
        assert_eq!(revision("a"), revision("a"));
        assert_ne!(revision("a"), revision("a "));
    }
}
