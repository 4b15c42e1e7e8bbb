//! Builds the XDP programs of `lb-ebpf` for BPF and leaves the objects where the library includes them
//! from: `lobby.bpf.o`, and `generator.bpf.o` for the benchmark, in this build's output directory.
//!
//! A cargo inside cargo, with a target directory of its own inside the outer one's profile directory,
//! so that build, clippy and docs make `core` once. Whoever runs this holds the lock of that profile, so
//! nobody else writes there. Always in release: the checks of a debug build do not pass the kernel's
//! verifier.

#[path = "../xtask/src/toolchain.rs"]
#[expect(unreachable_pub, reason = "public in xtask's library, where the file lives")]
mod toolchain;

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// Triple of little-endian BPF; all machines that Lobby runs on are little-endian.
const TARGET: &str = "bpfel-unknown-none";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            println!("cargo::error={sentence}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let workspace = directory("CARGO_MANIFEST_DIR")?.join("..");
    let output = directory("OUT_DIR")?;
    for input in ["lb-ebpf", "lb-common", "Cargo.toml", "Cargo.lock", "xtask/src/toolchain.rs"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo::rerun-if-env-changed={}", toolchain::RUSTC_VARIABLE);

    let compiler = toolchain::compiler().map_err(|missing| missing.to_string())?;
    let linker = toolchain::linker().map_err(|missing| missing.to_string())?;
    // From target/PROFILE/build/PACKAGE-HASH/out.
    let target_directory = output.ancestors().nth(3).unwrap_or(&output).join("bpf");

    let cargo =
        compiler.cargo.map_or_else(|| env::var_os("CARGO").unwrap_or_else(|| "cargo".into()), OsString::from);
    let mut command = Command::new(cargo);
    for (name, _) in env::vars_os().filter(|(name, _)| misleads(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command
        .current_dir(&workspace)
        // Building core is an unstable feature of cargo; this lets any cargo do it.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTC", &compiler.rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(&linker))
        // One module: what is called is inlined, whatever crate it comes from.
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .args(["build", "--release", "--package", "lb-ebpf", "--bins"])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&target_directory);
    if env::var_os("CARGO_FEATURE_TRACE").is_some() {
        command.args(["--features", "trace"]);
    }

    let result = command.output().map_err(|error| format!("cargo cannot be run: {error}"))?;
    if !result.status.success() {
        // On standard error it is shown whole, below the one sentence.
        eprintln!("{}", String::from_utf8_lossy(&result.stderr));
        return Err(format!(
            "the XDP programs did not build with {}; the compiler's words are below",
            compiler.rustc.display()
        ));
    }
    for program in ["lobby", "generator"] {
        let object = target_directory.join(TARGET).join("release").join(program);
        fs::copy(&object, output.join(program).with_extension("bpf.o"))
            .map_err(|error| format!("{} cannot be copied: {error}", object.display()))?;
    }
    Ok(())
}

/// The compiler's flags, as cargo wants them: with a separator that no path contains.
fn flags(linker: &Path) -> OsString {
    let mut linker_flag = OsString::from("linker=");
    linker_flag.push(linker);
    let flags = [
        OsString::from("-C"),
        linker_flag,
        // The instruction set with 32-bit arithmetic and atomic compare-and-swap; Linux 5.12 has it.
        "-Ctarget-cpu=v3".into(),
        // Maps are declared through BTF, which is made from debug information.
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        "-Ctarget-feature=+allows-misaligned-mem-access".into(),
    ];
    flags.join(std::ffi::OsStr::new("\x1f"))
}

/// Whether a variable was meant for the outer build (or for clippy), and would lead the inner one astray.
fn misleads(name: &str) -> bool {
    let about_this_build =
        ["RUSTC", "RUSTDOC", "RUSTFLAGS", "CLIPPY_", "RUSTUP_TOOLCHAIN", "MAKEFLAGS", "MFLAGS"];
    let of_cargo = name == "CARGO" || name.starts_with("CARGO_") || name.starts_with("__CARGO");
    let about_the_net = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_"];
    about_this_build.iter().any(|prefix| name.starts_with(prefix))
        || of_cargo && !about_the_net.iter().any(|prefix| name.starts_with(prefix))
}

fn directory(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{variable} is not set: this is run by cargo"))
}
