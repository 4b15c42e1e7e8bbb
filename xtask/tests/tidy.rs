//! How the house is kept, as far as a machine can see it.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Longest file, in lines. Tables of test cases, in a file of their own called `tests.rs`, may be longer.
const LONGEST: usize = 600;

/// The files that may have unsafe code; each is about one thing that cannot be said otherwise.
const UNSAFE: [&str; 15] = [
    // What the daemon shares with the program, byte by byte.
    "lb-common/src/abi.rs",
    "lb-common/src/shared.rs",
    // What a header is, and packets in memory.
    "lb-common/src/wire.rs",
    "lb-common/src/sim.rs",
    // Packets, maps and the kernel's helpers.
    "lb-ebpf/src/frame.rs",
    "lb-ebpf/src/generator.rs",
    "lb-ebpf/src/maps.rs",
    "lb-ebpf/src/program.rs",
    // The maps in the daemon's memory.
    "lb-userspace/src/dataplane/kernel/mapped.rs",
    // Addresses of the link layer, which sockets know as bytes; a socket that must stay open.
    "lb-userspace/src/packet.rs",
    "lb-userspace/src/probe/vip.rs",
    // A process that is to die.
    "tests/tests/death/main.rs",
    // A TAP interface, and tags of received frames.
    "tests/src/vlan.rs",
    // Between fork and exec; ethtool's ioctl.
    "xtask/src/lab/namespace.rs",
    "xtask/src/lab/link.rs",
];

/// All source files, with their paths from the workspace.
fn sources() -> Vec<(String, String)> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            let hidden = entry.file_name().unwrap().to_string_lossy().starts_with('.');
            if entry.is_dir() && !hidden && !entry.ends_with("target") {
                walk(&entry, found);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                found.push(entry);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&xtask::workspace(), &mut paths);
    let files: Vec<_> = paths
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(xtask::workspace()).unwrap().display().to_string();
            (name, fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(files.len() > 50, "the walk found only {} files", files.len());
    files
}

/// Fails with the names of the files that a rule does not hold for.
fn hold(rule: &str, mut breaks: impl FnMut(&str, &str) -> bool) {
    let broken: Vec<_> =
        sources().into_iter().filter(|(name, text)| breaks(name, text)).map(|(name, _)| name).collect();
    assert!(broken.is_empty(), "{rule}: {}", broken.join(", "));
}

/// A line that is code, not a comment.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.starts_with("//"))
}

#[test]
fn each_file_says_what_it_is_about() {
    hold("begins with no module documentation", |_, text| !text.starts_with("//! "));
}

#[test]
fn no_file_is_too_long() {
    hold(&format!("more than {LONGEST} lines"), |name, text| {
        text.lines().count() > LONGEST && !name.ends_with("/tests.rs")
    });
}

#[test]
fn modules_are_named_after_themselves() {
    hold("a module `foo` is in foo.rs", |name, _| name.ends_with("/mod.rs"));
}

#[test]
fn unsafe_code_is_where_it_belongs() {
    hold("unsafe code outside the files that may have it", |name, text| {
        // Written so that this file does not break its own rule.
        let keyword = ["uns", "afe "].concat();
        !UNSAFE.contains(&name)
            && code(text).any(|line| {
                line.contains(&format!("{keyword}{{"))
                    || line.contains(&format!("{keyword}fn"))
                    || line.contains(&format!("{keyword}impl"))
            })
    });
    for name in UNSAFE {
        assert!(
            xtask::workspace().join(name).exists(),
            "{name} is gone, and so should be its place in the list"
        );
    }
}

#[test]
fn lints_are_expected_to_fire_and_never_just_allowed() {
    let attribute = ["[al", "low("].concat();
    hold("use expect, with a reason", |_, text| code(text).any(|line| line.contains(&attribute)));
}

#[test]
fn the_decision_is_the_same_program_wherever_it_runs() {
    hold("the decision has conditional compilation", |name, text| {
        name.starts_with("lb-common/src/datapath")
            && code(text).any(|line| line.contains("cfg(") && line != "#[cfg(test)]")
    });
}
