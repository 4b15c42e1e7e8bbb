//! The machine's file system: programs and the libraries they need, as the kernel unpacks it
//! (initramfs, in cpio's format "newc", Linux's Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// An archive in the making.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<PathBuf>,
}

impl Archive {
    /// Puts a program at a place, and its libraries where it looks for them.
    pub(super) fn program(&mut self, place: &str, program: &Path) -> Result<()> {
        self.file(Path::new(place), program)?;
        let output = Command::new("ldd").arg(program).output().context("ldd cannot be run")?;
        ensure!(output.status.success(), "ldd {}: {}", program.display(), output.status);
        for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
            self.file(&library, &library)?;
        }
        Ok(())
    }

    /// The archive, with the entry that ends it.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn file(&mut self, place: &Path, source: &Path) -> Result<()> {
        let place: PathBuf = place.components().filter(|part| *part != Component::RootDir).collect();
        let parents: Vec<_> = place.ancestors().skip(1).filter(|path| *path != Path::new("")).collect();
        for directory in parents.into_iter().rev() {
            if self.names.insert(directory.to_owned()) {
                self.entry(&directory.to_string_lossy(), 0o040_755, &[]);
            }
        }
        if self.names.insert(place.clone()) {
            let content = fs::read(source).with_context(|| source.display().to_string())?;
            self.entry(&place.to_string_lossy(), 0o100_755, &content);
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        // Inode, mode, user, group, links, time, size, four numbers of devices, length of the name, checksum.
        let number = self.names.len() as u32;
        let fields = [number, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The paths in what ldd(1) prints: `libc.so.6 => /lib/… (0x…)`, or for the loader the path alone.
fn libraries(listing: &str) -> Vec<PathBuf> {
    listing.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::{Archive, libraries};

    #[test]
    fn libraries_are_the_paths_that_ldd_tells() {
        let listing =
            "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so.2 (0x3)\n";
        assert_eq!(libraries(listing), ["/lib/libc.so.6", "/lib64/ld.so.2"].map(std::path::PathBuf::from));
    }

    #[test]
    fn entries_begin_at_multiples_of_four() {
        let mut archive = Archive::default();
        archive.entry("a", 0o100_755, b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[110..117], b"a\x0012345");
        assert_eq!(&bytes[120..126], b"070701");
    }
}
