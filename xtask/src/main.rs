//! `cargo xtask`: what one does with Lobby's source.

use std::process::ExitCode;

use std::os::unix::process::CommandExt as _;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use xtask::{
    bench, check, demo, fuzz, kernel,
    lab::{LabOptions, named},
    root, setup,
};

/// What one does with Lobby's source
///
/// Each command gets what it needs by itself, and asks through sudo where it needs root's rights.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  cargo xtask demo                    a hundred clients pay, then five hundred: watch it
  cargo xtask demo 1                  the first stage: one server behind Lobby, and a curl
  cargo xtask demo 2                  the second: the same server behind the reception desk
  cargo xtask demo 4                  the fourth: a database whose primary is killed
  cargo xtask demo 5                  the fifth: five services behind one address
  cargo xtask test                    all tests
  cargo xtask fuzz path --seconds 600 look for paths that can be read in two ways
  cargo xtask lab up --backends 3     a network to play in
  cargo xtask lab exec lb -- ip addr  a command at the balancer's place in it";

#[derive(Subcommand)]
enum Command {
    /// Get what a build and the tests need
    Setup {
        /// Then tell where everything is
        #[arg(long)]
        report: bool,
    },
    /// Show what Lobby does, on real servers and clients
    #[command(after_help = DEMO_EXAMPLES)]
    Demo(demo::DemoOptions),
    /// The demo's payment server
    #[command(hide = true)]
    PaymentServer(demo::server::ServerOptions),
    /// Run all tests
    Test(check::TestOptions),
    /// Check everything that must hold before a change goes in: format, lints, docs, demos, README, tests
    Ci,
    /// Run the tests of the packet path on Debian's Linux 6.1, in QEMU
    Kernel(kernel::KernelOptions),
    /// What the kernel in QEMU starts
    #[command(hide = true)]
    KernelGuest,
    /// Look for bytes that break a rule of the reception desk
    Fuzz(fuzz::FuzzOptions),
    /// A network of namespaces to play in: client, balancer, backends
    #[command(subcommand, after_help = LAB_EXAMPLES)]
    Lab(Lab),
    /// Measure the packet path in the kernel
    Bench {
        /// Instead, measure the daemon's own work: rings, plans, documents, how soon a probe takes
        /// effect, how long a start takes
        #[arg(long, conflicts_with = "desk")]
        control: bool,
        /// Instead, measure the reception desk beside nginx and HAProxy
        #[arg(long)]
        desk: bool,
        /// Instead, measure a PostgreSQL server through Lobby's ports beside the same without Lobby
        #[arg(long, conflicts_with_all = ["control", "desk"])]
        database: bool,
        /// For the benchmark itself; `-- --help` tells them
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

const LAB_EXAMPLES: &str = "Examples:
  cargo xtask lab up --backends 3
  cargo xtask lab exec b1 -- nginx -g 'daemon off;' &
  cargo xtask lab exec lb -- target/release/lb run --config target/lab.toml &
  cargo xtask lab exec client -- curl http://203.0.113.10/
  cargo xtask lab exec lb -- target/release/lb status
  cargo xtask lab down";

const DEMO_EXAMPLES: &str = "Examples:
  cargo xtask demo                     servers come and go while hundreds of clients pay
  cargo xtask demo --json result.json  and what came of it, for programs
  cargo xtask demo 1                   one server behind Lobby, and a curl
  cargo xtask demo 2                   the same behind the reception desk: TLS, routes, a closed room
  cargo xtask demo 4                   a bank on a PostgreSQL cluster whose primary is killed
  cargo xtask demo 5                   five services behind one address: one fails, one gets a new version

The exit code is 0 only if no payment was lost or done twice, by the ledgers of clients and servers;
those on their way to the server that is killed are counted, and excused. With the database: only if no
answered transfer was lost, and none was written to a server that was not the primary.";

#[derive(Subcommand)]
enum Lab {
    /// Build it
    Up {
        /// Number of backends: b1, b2, …
        #[arg(long, default_value_t = 2)]
        backends: usize,
        /// Interfaces of the balancer: 2 for front and back, 1 for front alone
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=2))]
        interfaces: u8,
    },
    /// Take it down
    Down,
    /// Run a command at one of its places: client, lb, switch, b1, b2, …
    Exec {
        /// Where
        place: String,
        /// What
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Tell what is up
    Status {
        /// For programs
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Setup { report } => {
            setup::everything()?;
            if report {
                setup::report();
            }
        }
        Command::Demo(options) => return demo::run(&options),
        Command::PaymentServer(options) => demo::server::serve(options)?,
        Command::Test(options) => drop(check::test(&options)?),
        Command::Ci => check::ci()?,
        Command::Kernel(options) => kernel::run(&options)?,
        Command::Fuzz(options) => fuzz::run(&options)?,
        Command::KernelGuest => kernel::guest::run()?,
        Command::Lab(_) if !root::is_root() => {
            return root::myself("for network namespaces", &std::env::args_os().skip(1).collect::<Vec<_>>());
        }
        Command::Lab(lab) => self::lab(lab)?,
        Command::Bench { control: true, .. } => bench::control()?,
        Command::Bench { database: true, arguments, .. } => bench::database(&arguments)?,
        Command::Bench { desk: true, arguments, .. } => bench::desk(&arguments)?,
        Command::Bench { arguments, .. } => bench::packets(&arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn lab(lab: Lab) -> anyhow::Result<()> {
    match lab {
        Lab::Up { backends, interfaces } => {
            let options = LabOptions { backends, two_interfaces: interfaces == 2, ..LabOptions::default() };
            named::up(options)?;
            show(&named::status()?);
            let document = xtask::target_directory().join("lab.toml");
            std::fs::write(&document, named::document(options))
                .with_context(|| format!("{} cannot be written", document.display()))?;
            println!("\na document for lb: {}", document.display());
        }
        Lab::Down if !named::is_up() => println!("no lab is up"),
        Lab::Down => {
            let left = named::down()?;
            if !left.is_empty() {
                println!("still running where the lab was, and keeping their part of it: processes {left:?}");
            }
        }
        Lab::Exec { place, command } => {
            let (program, arguments) = command.split_first().context("which command?")?;
            // Becomes that program, and so comes back only if it cannot.
            let error = named::command(&place, program)?.args(arguments).exec();
            return Err(error).with_context(|| format!("{program} cannot be run"));
        }
        Lab::Status { json: true } => println!("{}", serde_json::to_string_pretty(&named::status()?)?),
        Lab::Status { json: false } => show(&named::status()?),
    }
    Ok(())
}

fn show(places: &[named::Place]) {
    if places.is_empty() {
        println!("no lab is up; `cargo xtask lab up` builds one");
        return;
    }
    println!("{:<8} {:<14} {:<44} PROCESSES", "PLACE", "NAMESPACE", "ADDRESSES");
    for place in places {
        let processes: Vec<_> = place.processes.iter().map(u32::to_string).collect();
        println!(
            "{:<8} {:<14} {:<44} {}",
            place.name,
            place.namespace,
            place.addresses.join(", "),
            processes.join(" ")
        );
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn arguments_are_consistent() {
        super::Arguments::command().debug_assert();
    }
}
