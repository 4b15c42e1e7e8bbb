//! Gets what a build and the tests need, and takes what is already there.
//!
//! Each thing has several ways to be had, which are tried in order. What cannot be had is said in one
//! sentence. When nothing is missing, nothing is run but a look around.

mod apt;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{lab::postgres, toolchain};

/// A program that tests or people in the lab use.
struct Tool {
    program: &'static str,
    /// Name of the package that brings it, with Debian and its kin.
    package: &'static str,
    use_: &'static str,
}

const TOOLS: &[Tool] = &[
    Tool { program: "ip", package: "iproute2", use_: "looking at networks in the tests" },
    Tool { program: "ethtool", package: "ethtool", use_: "looking at offloads in the tests" },
    Tool { program: "curl", package: "curl", use_: "the tests and the demo" },
    Tool { program: "nginx", package: "nginx", use_: "the tests" },
    Tool { program: "iperf3", package: "iperf3", use_: "the tests" },
    Tool { program: "tcpdump", package: "tcpdump", use_: "looking at packets in the lab" },
    Tool { program: "nft", package: "nftables", use_: "firewalls in the tests" },
    Tool { program: SERVER, package: "postgresql", use_: "the tests of databases, and the demo of one" },
    Tool { program: GRPC, package: GRPC, use_: "the tests of the reception desk" },
    Tool { program: "javac", package: "default-jdk-headless", use_: "the tests of databases" },
    Tool { program: JDBC, package: "libpostgresql-jdbc-java", use_: "the tests of databases" },
    Tool { program: "openssl", package: "openssl", use_: "looking at certificates in the tests" },
];

/// Debian's is not on `PATH`.
const SERVER: &str = "postgres";

/// What a script in Python uses, no program: a server and a client of gRPC as many have them.
const GRPC: &str = "python3-grpcio";

/// What a program in Java uses, none itself.
pub const JDBC: &str = "/usr/share/java/postgresql.jar";

impl Tool {
    fn place(&self) -> Option<PathBuf> {
        if self.program == SERVER {
            return postgres::programs().ok().map(|programs| programs.join(SERVER));
        }
        if self.program == GRPC {
            return Some(PathBuf::from("/usr/lib/python3/dist-packages/grpc")).filter(|place| place.is_dir());
        }
        if self.program == JDBC {
            return Some(PathBuf::from(JDBC)).filter(|place| place.is_file());
        }
        toolchain::on_path(self.program)
    }
}

/// For `cargo xtask kernel` alone.
const EMULATOR: Tool = Tool {
    program: "qemu-system-x86_64",
    package: "qemu-system-x86",
    use_: "running tests on another kernel",
};

/// For `cargo xtask bench --desk` alone.
const RIVALS: &[Tool] = &[
    Tool { program: "haproxy", package: "haproxy", use_: "the benchmark of the reception desk" },
    Tool { program: "h2load", package: "nghttp2-client", use_: "the benchmark of the reception desk" },
];

/// For `cargo xtask fuzz` alone.
const FUZZER: Tool = Tool { program: "c++", package: "g++", use_: "building libFuzzer" };

/// Version of bpf-linker that is installed where there is none.
const LINKER_VERSION: &str = "0.13.0";
/// Versions of LLVM that it can be built with.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Gets all that the build and the tests need.
///
/// # Errors
///
/// Something cannot be had; what, and how to get it, has been printed.
pub fn everything() -> Result<()> {
    let mut missing = Vec::new();
    missing.extend(build().err());
    missing.extend(tools(&TOOLS.iter().collect::<Vec<_>>()));
    if missing.is_empty() {
        return Ok(());
    }
    for sentence in &missing {
        eprintln!("setup: {sentence:#}");
    }
    bail!("{} of what Lobby needs could not be had; see above", count(missing.len(), "thing"))
}

/// Gets all that the build needs.
///
/// # Errors
///
/// What cannot be had, and how to get it.
pub fn build() -> Result<()> {
    let compiler = compiler()?;
    linker(&compiler)
}

/// Gets one of the programs that tests use.
///
/// # Errors
///
/// It cannot be had; how to get it.
pub fn program(name: &str) -> Result<()> {
    let wanted: Vec<_> = TOOLS.iter().filter(|tool| tool.program == name).collect();
    all(&wanted)
}

/// Gets what another kernel runs in.
///
/// # Errors
///
/// It cannot be had; how to get it.
pub fn emulator() -> Result<()> {
    all(&[&EMULATOR])
}

/// Gets what libFuzzer is built with.
///
/// # Errors
///
/// It cannot be had; how to get it.
pub fn fuzzer() -> Result<()> {
    all(&[&FUZZER])
}

/// Gets what the reception desk is measured beside, and by.
///
/// # Errors
///
/// It cannot be had; how to get it.
pub fn rivals() -> Result<()> {
    all(&RIVALS.iter().collect::<Vec<_>>())
}

/// Gets some; the first that cannot be had is the error.
fn all(wanted: &[&Tool]) -> Result<()> {
    tools(wanted).into_iter().next().map_or(Ok(()), Err)
}

/// The names of all packages that begin so, a line each.
///
/// # Errors
///
/// This is another kind of system, or its lists of packages cannot be had.
pub fn packages(prefix: &str) -> Result<String> {
    apt::names(prefix)
}

/// Fetches a package and unpacks it into a directory, without installing it.
///
/// # Errors
///
/// It cannot be had.
pub fn unpack(package: &str, directory: &Path) -> Result<()> {
    apt::unpack(package, directory)
}

/// Prints what is there, a line each.
pub fn report() {
    match toolchain::compiler() {
        Ok(compiler) => println!("compiler for BPF   {}", compiler.rustc.display()),
        Err(missing) => println!("compiler for BPF   missing: {missing}"),
    }
    match toolchain::linker() {
        Ok(linker) => println!("linker for BPF     {}", linker.display()),
        Err(missing) => println!("linker for BPF     missing: {missing}"),
    }
    for tool in TOOLS {
        let place = tool.place().map_or_else(|| "missing".into(), |path| path.display().to_string());
        println!("{:<18} {place}", tool.program);
    }
}

/// "1 thing", "2 things".
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn compiler() -> Result<toolchain::Compiler> {
    let missing = match toolchain::compiler() {
        Ok(compiler) => return Ok(compiler),
        Err(missing) => missing,
    };
    if std::env::var_os(toolchain::RUSTC_VARIABLE).is_some() {
        // Said by name what to use: nothing else will do.
        return Err(missing.into());
    }
    if let Some(rustup) = toolchain::on_path("rustup").or_else(|| in_cargo_home("rustup")) {
        say("the sources of core, which BPF is compiled from: rustup component add rust-src");
        if run(Command::new(rustup).args(["component", "add", "rust-src"])).is_ok()
            && let Ok(compiler) = toolchain::compiler()
        {
            return Ok(compiler);
        }
        say("not to be had that way");
    }
    for packages in [["rustc-web", "rust-web-src"], ["rustc", "rust-src"]] {
        if apt::has(&packages) && apt::install(&packages, "a Rust compiler with the sources of core").is_ok()
        {
            if let Ok(compiler) = toolchain::compiler() {
                return Ok(compiler);
            }
            say("that one is too old");
        }
    }
    Err(missing.into())
}

fn linker(compiler: &toolchain::Compiler) -> Result<()> {
    let Err(missing) = toolchain::linker() else { return Ok(()) };
    if let Some(binstall) = toolchain::on_path("cargo-binstall").or_else(|| in_cargo_home("cargo-binstall")) {
        say("bpf-linker, ready-made: cargo binstall");
        if run(Command::new(binstall).args(["--no-confirm", "bpf-linker"])).is_ok()
            && toolchain::linker().is_ok()
        {
            return Ok(());
        }
        say("not to be had that way");
    }
    let llvm = llvm_of(&compiler.rustc)?;
    if !LINKER_LLVM.contains(&llvm) {
        bail!(
            "{missing}, but not for LLVM {llvm}, which {} has; install bpf-linker by hand",
            compiler.rustc.display()
        );
    }
    let prefix = llvm_prefix(llvm).with_context(|| {
        format!(
            "bpf-linker is missing, and LLVM {llvm} to build it with; install LLVM {llvm} with its headers, set \
             LLVM_PREFIX to where it is and run this again, or put a ready-made bpf-linker on PATH"
        )
    })?;
    say(&format!("bpf-linker: cargo install, with LLVM {llvm}; takes a minute or two"));
    let feature = format!("llvm-{llvm}");
    run(crate::cargo()
        .env("LLVM_PREFIX", &prefix)
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"])
        .args(["--no-default-features", "--features", &feature]))?;
    toolchain::linker()?;
    Ok(())
}

/// Major version of the LLVM in a compiler: the linker must read what it writes.
fn llvm_of(rustc: &Path) -> Result<u32> {
    let output = Command::new(rustc)
        .arg("-vV")
        .output()
        .with_context(|| format!("{} does not run", rustc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_llvm(&text).with_context(|| format!("{} does not tell its LLVM version", rustc.display()))
}

fn parse_llvm(version: &str) -> Option<u32> {
    version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.parse().ok()
}

fn llvm_prefix(llvm: u32) -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("LLVM_PREFIX") {
        return Ok(named.into());
    }
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    // The headers' package brings llvm-config; polly is what that LLVM is linked with.
    let complete = || prefix.join("bin/llvm-config").exists() && prefix.join("lib/libPolly.a").exists();
    if !complete() {
        let packages = [
            format!("llvm-{llvm}-dev"),
            format!("libpolly-{llvm}-dev"),
            "zlib1g-dev".into(),
            "libzstd-dev".into(),
        ];
        apt::install(&packages.each_ref().map(String::as_str), "LLVM, to build bpf-linker with")?;
    }
    Ok(prefix)
}

/// Gets tools; what could not be had.
fn tools(wanted: &[&Tool]) -> Vec<anyhow::Error> {
    let absent = || wanted.iter().filter(|tool| tool.place().is_none());
    if absent().next().is_none() {
        return Vec::new();
    }
    let packages: Vec<_> = absent().map(|tool| tool.package).collect();
    if apt::install(&packages, "programs that the tests use").is_err() {
        // One by one, so that one that cannot be had does not keep the others away.
        for tool in absent() {
            // What is still missing is told below.
            let _ = apt::install(&[tool.package], tool.use_);
        }
    }
    absent()
        .map(|tool| {
            anyhow::anyhow!(
                "{} is missing, for {}; install it with your system's package manager (Debian's package is called {})",
                tool.program,
                tool.use_,
                tool.package
            )
        })
        .collect()
}

fn in_cargo_home(program: &str) -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))?;
    Some(home.join("bin").join(program)).filter(|path| path.is_file())
}

fn say(what: &str) {
    eprintln!("setup: {what}");
}

/// Runs a command whose progress is for the person at the terminal.
fn run(command: &mut Command) -> Result<()> {
    // Standard output belongs to what comes after the set-up.
    command.stdout(std::io::stderr());
    let status =
        command.status().with_context(|| format!("{} cannot be run", command.get_program().display()))?;
    if !status.success() {
        bail!("{} failed ({status})", command.get_program().display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{count, parse_llvm};

    #[test]
    fn the_llvm_version_is_read_from_the_compilers_words() {
        assert_eq!(parse_llvm("rustc 1.95.0\nrelease: 1.95.0\nLLVM version: 22.1.2\n"), Some(22));
        assert_eq!(parse_llvm("rustc 1.95.0\n"), None);
    }

    #[test]
    fn counts_agree_with_their_nouns() {
        assert_eq!(count(1, "thing"), "1 thing");
        assert_eq!(count(0, "thing"), "0 things");
    }
}
