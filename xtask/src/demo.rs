//! Shows what Lobby does, on real servers and clients in a lab, stage by stage.
//!
//! What is shown is judged by what clients and servers themselves have written down, see [`ledger`].

pub mod balancer;
pub mod bank;
pub mod customers;
mod database;
pub mod display;
pub mod guests;
pub mod ledger;
mod microservices;
pub mod payments;
mod reverse;
pub mod server;
mod single;

use std::{
    ffi::OsString,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    lab::{Namespace, Proc},
    root, setup,
};

/// Who belongs to the staff in the examples, and their password.
const STAFF: (&str, &str) = ("anna", "open sesame");

/// Where the reception desk of the examples answers, and the name that its certificate is for.
const DESK: (Ipv4Addr, &str) = (Ipv4Addr::new(203, 0, 113, 11), "shop.example");

/// What is shown, and how.
#[derive(clap::Args, Clone, Debug)]
pub struct DemoOptions {
    /// The stage: 1 for a single server, 2 for one behind the reception desk, 3 for servers that come and go under load,
    /// 4 for a database whose primary is killed, 5 for five services behind one address
    #[arg(default_value_t = 3, value_parser = stage)]
    pub stage: u8,
    /// Write what came of it to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Keep ledgers, document and log, and tell where they are
    #[arg(long)]
    pub keep: bool,
    /// `lb` is built
    #[arg(long, hide = true)]
    built: bool,
}

/// Builds Lobby and shows a stage.
///
/// # Errors
///
/// Something could not be had or did not build, or the story could not be told to its end.
pub fn run(options: &DemoOptions) -> Result<ExitCode> {
    if !options.built {
        setup::build()?;
        setup::program(if options.stage == 4 { "postgres" } else { "curl" })?;
        println!("building Lobby …");
        let build = crate::cargo().args(["build", "--release", "--package", "lb-userspace"]).status()?;
        if !build.success() {
            bail!("Lobby did not build");
        }
    }
    if !root::is_root() {
        let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        if !options.built {
            arguments.push("--built".into());
        }
        return root::myself("for network namespaces and XDP programs", &arguments);
    }
    let directory = tempfile::Builder::new().prefix("lobby-demo-").tempdir()?;
    let program = crate::target_directory().join("release/lb");
    let good = match options.stage {
        1 => single::show(&program, directory.path()),
        2 => reverse::show(&program, directory.path()),
        5 => microservices::show(&program, directory.path(), options.json.as_deref()),
        4 => database::show(&program, directory.path(), options.json.as_deref()),
        _ => payments::show(&program, directory.path(), options.json.as_deref()),
    };
    if options.keep || !matches!(good, Ok(true)) {
        println!("ledgers, document and log are in {}", directory.keep().display());
    }
    Ok(if good? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes what came of a stage to a file, if it is wanted.
fn write_summary(json: Option<&Path>, summary: &impl serde::Serialize) -> Result<()> {
    let Some(file) = json else { return Ok(()) };
    std::fs::write(file, serde_json::to_string_pretty(summary)?).with_context(|| file.display().to_string())
}

fn stage(text: &str) -> Result<u8, String> {
    match text {
        "1" => Ok(1),
        "2" => Ok(2),
        "3" => Ok(3),
        "4" => Ok(4),
        "5" => Ok(5),
        _ => Err("there are stages 1 (a single server), 2 (behind the reception desk), 3 (servers that come and go), 4 (a database) and 5 (five services behind one address)".into()),
    }
}

/// Starts a payment server at a place; its reports come out of its standard output.
///
/// # Errors
///
/// It does not start.
pub fn start_server(
    place: &Namespace,
    name: &str,
    listen: SocketAddr,
    ledger: &Path,
    per_round: usize,
    round_ms: u128,
) -> Result<Proc> {
    let mut command = place.command(std::env::current_exe()?);
    command.args(["payment-server", "--name", name, "--listen", &listen.to_string()]);
    command.args(["--per-round", &per_round.to_string(), "--round-ms", &round_ms.to_string()]);
    command.arg("--ledger").arg(ledger);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let server = Proc::start(command)?;
    place.wait_for_tcp(listen)?;
    Ok(server)
}

/// Writes what the examples from the second on name beside them: a certificate with its key, and the staff. Gives
/// back the certificate, which clients are to trust.
fn furnish_desk(program: &Path, directory: &Path) -> Result<PathBuf> {
    let made =
        rcgen::generate_simple_self_signed([DESK.1.to_owned()]).context("a certificate cannot be made")?;
    let certificate = directory.join(format!("{}.pem", DESK.1));
    std::fs::write(certificate.with_extension("key"), made.signing_key.serialize_pem())?;
    std::fs::write(&certificate, made.cert.pem())?;
    std::fs::write(directory.join("staff.users"), staff_line(program)?)?;
    Ok(certificate)
}

/// Their line in the desk's file of users, by `lb auth hash`.
fn staff_line(program: &Path) -> Result<String> {
    let mut command = std::process::Command::new(program);
    let mut child =
        command.args(["auth", "hash", STAFF.0]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().context("standard input")?.write_all(STAFF.1.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "lb auth hash does not print a line");
    Ok(String::from_utf8(output.stdout)?)
}
