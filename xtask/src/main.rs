//! `cargo xtask`: what one does with Lobby's source.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::{bench, check, setup};

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
  cargo xtask test                    all tests
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
    /// Run all tests
    Test(check::TestOptions),
    /// Check everything that must hold before a change goes in: format, lints, docs, tests
    Ci,
    /// Measure the packet path in the kernel
    Bench {
        /// For the benchmark itself; `-- --help` tells them
        #[arg(last = true)]
        arguments: Vec<String>,
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
        Command::Test(options) => drop(check::test(&options)?),
        Command::Ci => check::ci()?,
        Command::Bench { arguments } => bench::run(&arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn arguments_are_consistent() {
        super::Arguments::command().debug_assert();
    }
}
