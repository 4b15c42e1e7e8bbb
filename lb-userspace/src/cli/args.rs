//! The command line's words, as clap reads them.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;

use crate::{
    log::LogFormat,
    model::{BackendAddress, Listen, Network},
};

/// Where the daemon keeps its socket and its state, unless told otherwise.
pub(super) const RUN_DIR: &str = "/run/lobby";
/// Where BPF objects are pinned, unless told otherwise.
pub(super) const BPFFS: &str = "/sys/fs/bpf";

const EXAMPLES: &str = "\
EXAMPLES
  Try a document, then run it (root):
    lb check lb.toml
    sudo lb run --config lb.toml

  See what goes on, from another terminal:
    sudo lb status --watch
    sudo lb doctor

  Add a server to the pool `web` while clients are connected, and take one out gently:
    sudo lb backend add web 10.0.0.13:8080
    sudo lb backend drain web 10.0.0.11:8080 --deadline 5m

EXIT CODES
  0 done   1 failed   2 wrong usage, or a document with mistakes   3 the daemon is not running";

/// Lobby: a layer-4 load balancer in XDP.
///
/// `lb run` is the daemon: it reads one document, attaches the XDP program and checks the backends'
/// health. All other commands talk to it, or look at a document. Edits go into the document itself:
/// there is no second truth.
#[derive(Debug, Parser)]
#[command(name = "lb", version, after_help = EXAMPLES, max_term_width = 100, propagate_version = true)]
pub(super) struct Cli {
    /// Directory of the daemon's socket and state
    #[arg(long, global = true, value_name = "DIR", env = "LB_RUN_DIR", default_value = RUN_DIR, value_hint = ValueHint::DirPath)]
    pub run_dir: PathBuf,

    /// Answer in JSON, for programs; failures too, on standard error
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon
    Run(Run),
    /// The reception desk, as the daemon starts it
    #[command(hide = true)]
    DeskProcess(Log),
    /// Say whether a document is right, and what is wrong with it where
    #[command(
        after_help = "EXAMPLES\n  lb check examples/3-load-balancer.toml\n  lb check --no-files lb.toml      # where its certificates and keys are not\n\nInterfaces and the ways to servers are looked at only by the daemon and by `lb doctor --config FILE`."
    )]
    Check {
        /// The document; - for standard input
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Do not look at the files that it names: certificates, keys, users, pages
        #[arg(long)]
        no_files: bool,
    },
    /// Make a file's contents the document in force
    #[command(
        after_help = "EXAMPLES\n  lb apply new.toml\n\nThe daemon checks it, writes it to the file that it was started with, and puts it in force;\nor refuses it whole and changes nothing."
    )]
    Apply {
        /// The new document; - for standard input
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Say what a file's contents would change, were they put in force now; nothing is done
    #[command(
        after_help = "EXAMPLES\n  lb plan new.toml\n\nTells the operations in order, and of each service the share of slots and connections that move."
    )]
    Plan {
        /// The new document; - for standard input
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Read the document again, as SIGHUP does; an edit of the file is noticed without it
    Reload,
    /// Stop the daemon, if one runs, and take the data plane down: programs, tables, addresses
    #[command(
        after_help = "EXAMPLES\n  lb detach\n\nA daemon that was just stopped (SIGTERM) leaves the data plane forwarding; this ends that."
    )]
    Detach {
        /// Where the objects are pinned; otherwise where the last daemon of this run directory did
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        bpffs: Option<PathBuf>,
    },
    /// Show the daemon, its services and backends
    Status {
        /// Again every second, until interrupted
        #[arg(long, short)]
        watch: bool,
    },
    /// Services: the addresses that clients call
    #[command(subcommand)]
    Service(Service),
    /// Pools: backends that can stand in for one another
    #[command(subcommand)]
    Pool(Pool),
    /// Backends: the servers
    #[command(subcommand)]
    Backend(Backend),
    /// Routes of the reception desk: which requests go where
    #[command(subcommand)]
    Route(Route),
    /// The reception desk: the process that answers requests
    #[command(subcommand)]
    Desk(Desk),
    /// Who is known to the reception desk
    #[command(subcommand)]
    Auth(Auth),
    /// List connections of services that translate (nat); of others only hashes are known
    #[command(
        after_help = "EXAMPLES\n  lb connections --service shop --limit 20\n  lb connections --backend 10.0.0.11:8080"
    )]
    Connections(Connections),
    /// Say what would become of a packet now, step by step, and why
    #[command(
        after_help = "EXAMPLES\n  lb explain 198.51.100.7:40000 203.0.113.10:80/tcp\n  lb explain 198.51.100.7:40000 203.0.113.10:80/tcp --flags ack\n  lb explain --pcap shop.pcap     (as `tcpdump -i eth0 -w shop.pcap` wrote it)\n\nThe packet path's own decision is run on a copy of the live tables: nothing is sent or changed. Packets of a\nfile come one after the other, and each finds the copy as those before have left it."
    )]
    Explain {
        /// Who sends it: address and port
        #[arg(required_unless_present = "pcap", conflicts_with = "pcap", value_parser = client)]
        client: Option<std::net::SocketAddr>,
        /// Whom: address, port and protocol
        #[arg(required_unless_present = "pcap", conflicts_with = "pcap")]
        called: Option<Listen>,
        /// Of TCP: a connection's first packet, one in its middle, or its end
        #[arg(long, value_parser = ["syn", "ack", "fin", "rst"], default_value = "syn", conflicts_with = "pcap")]
        flags: String,
        /// Of TCP: its sequence number, by which the packet after a SYN is known
        #[arg(long, value_name = "NUMBER", default_value_t = 0, conflicts_with = "pcap")]
        sequence: u32,
        /// Packets of this capture file instead
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        pcap: Option<PathBuf>,
        /// At most so many of them
        #[arg(long, value_name = "NUMBER", default_value_t = 100, requires = "pcap", value_parser = clap::value_parser!(u16).range(1..=500))]
        limit: u16,
    },
    /// Show how many packets met which fate
    #[command(
        after_help = "EXAMPLES\n  lb counters --all\n\nEach way out of the program has a name: to_backend, to_client, reset_…, pass_…, drop_…."
    )]
    Counters {
        /// Those at zero too
        #[arg(long)]
        all: bool,
    },
    /// Find what hinders Lobby on this host, and say how to mend it
    #[command(
        after_help = "EXAMPLES\n  sudo lb doctor\n  sudo lb doctor --config lb.toml     (before the first start)\n\nExit code 1 if there is any problem."
    )]
    Doctor {
        /// Look at this document; without it, at the running daemon's
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        config: Option<PathBuf>,
        /// Where the objects are pinned
        #[arg(long, value_name = "DIR", default_value = BPFFS, value_hint = ValueHint::DirPath)]
        bpffs: PathBuf,
    },
    /// Print completions for a shell
    #[command(
        after_help = "EXAMPLES\n  lb completions bash > /etc/bash_completion.d/lb\n  lb completions zsh > \"${fpath[1]}/_lb\""
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
EXAMPLES
  sudo lb run --config /etc/lobby/lb.toml
  sudo lb run --config lb.toml --ephemeral      (leaves no trace when it ends)

SIGHUP, an edit of the file, or `lb apply` bring a new document into force; a bad one changes nothing.
SIGTERM ends the daemon and leaves the data plane forwarding; a new daemon takes it over without a
lost packet. `lb detach` takes it down.")]
pub(super) struct Run {
    /// The document
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: PathBuf,
    /// Take everything down at the end
    #[arg(long)]
    pub ephemeral: bool,
    /// BPF file system to pin objects in; mounted if it is none
    #[arg(long, value_name = "DIR", default_value = BPFFS, value_hint = ValueHint::DirPath)]
    pub bpffs: PathBuf,
    /// Forward nothing: tables in memory, to try documents, health checks and the API
    #[arg(long, hide = true)]
    pub memory: bool,
    #[command(flatten)]
    pub log: Log,
}

#[derive(Debug, Args)]
pub(super) struct Log {
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Which log lines: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", env = "LB_LOG", default_value = "info")]
    pub log_level: String,
}

impl Log {
    /// The words that say the same to another process.
    pub(super) fn arguments(&self) -> Vec<String> {
        let format = self.log_format.to_possible_value();
        let format = format.as_ref().map_or("text", clap::builder::PossibleValue::get_name);
        vec![format!("--log-format={format}"), format!("--log-level={}", self.log_level)]
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Route {
    /// All routes, the narrowest of each service first
    List,
    /// Say which route a request would take, and why
    #[command(
        after_help = "EXAMPLES\n  lb route explain https://shop.example/pay\n  lb route explain http://203.0.113.10/pay --method POST --header 'x-version: 2'\n  lb route explain https://shop.example/pay --config new.toml     (no daemon is asked)"
    )]
    Explain {
        /// Its address, with scheme and host
        url: String,
        /// Its method
        #[arg(long, default_value = "GET")]
        method: String,
        /// A header of it; may be said again
        #[arg(long = "header", value_name = "NAME: VALUE", value_parser = header)]
        headers: Vec<(String, String)>,
        /// By this document, rather than the running daemon's
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        config: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Desk {
    /// How it goes: its process, connections, answers
    Status,
}

fn client(text: &str) -> Result<std::net::SocketAddr, &'static str> {
    text.parse().map_err(|_| "write address and port, such as 198.51.100.7:40000 or [2001:db8::7]:40000")
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("write a name, a colon and a value: \"x-version: 2\"")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

#[derive(Debug, Subcommand)]
pub(super) enum Auth {
    /// Print a line for a file of users or keys, with the hash of the secret on standard input
    #[command(
        after_help = "EXAMPLES\n  lb auth hash anna --role admin < password >> staff.users\n  openssl rand -hex 20 | tee key | lb auth hash robot --key >> robots.keys"
    )]
    Hash {
        /// Whose it is
        name: String,
        /// It is a key made by chance, not a password: SHA-256 is enough
        #[arg(long)]
        key: bool,
        /// What they are; once for each
        #[arg(long, value_name = "ROLE")]
        role: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Service {
    /// All services
    List,
    /// One service and its backends
    Show {
        /// Its name
        name: String,
    },
    /// Add one to the document
    #[command(
        after_help = "EXAMPLES\n  lb service add shop --listen 203.0.113.10:80/tcp --pool web\n  lb service add dns --listen 203.0.113.10:53/udp --pool resolvers --allow 10.0.0.0/8\n  lb service add all --listen '203.0.113.11:*/tcp' --pool web     (all ports)"
    )]
    Add {
        /// Its name
        name: String,
        /// Address, port and protocol to listen on
        #[arg(long, value_name = "ADDRESS:PORT/PROTOCOL")]
        listen: Listen,
        /// The pool that answers
        #[arg(long)]
        pool: String,
        /// How a backend is chosen
        #[arg(long, value_enum)]
        scheduler: Option<Scheduler>,
        /// Only these networks may come in
        #[arg(long, value_name = "NETWORK")]
        allow: Vec<Network>,
        /// These networks may not
        #[arg(long, value_name = "NETWORK")]
        deny: Vec<Network>,
    },
    /// Remove one from the document
    Remove {
        /// Its name
        name: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Scheduler {
    /// By the hash of the connection: few change hands when backends come and go
    Maglev,
    /// One after the other
    RoundRobin,
    /// By the client's address alone: all its connections go to one backend
    Source,
}

#[derive(Debug, Subcommand)]
pub(super) enum Pool {
    /// All pools
    List,
    /// One pool and its backends
    Show {
        /// Its name
        name: String,
    },
    /// Add one to the document
    #[command(
        after_help = "EXAMPLES\n  lb pool add web --backend 10.0.0.11:8080 --backend 10.0.0.12:8080 --http /healthz\n  lb pool add db --backend 10.0.0.21:5432 --tcp --interval 2s"
    )]
    Add {
        /// Its name
        name: String,
        /// A server: address and port, an address alone, or `local`
        #[arg(long, value_name = "ADDRESS")]
        backend: Vec<BackendAddress>,
        /// Check health by a TCP connection
        #[arg(long, group = "check")]
        tcp: bool,
        /// Check health by a GET of this path
        #[arg(long, value_name = "PATH", group = "check")]
        http: Option<String>,
        /// From one check to the next
        #[arg(long, value_name = "TIME", value_parser = duration, requires = "check")]
        interval: Option<Duration>,
    },
    /// Remove one from the document
    Remove {
        /// Its name
        name: String,
    },
    /// Ask all its servers now who they are, rather than when it is their turn
    #[command(
        after_help = "EXAMPLES\n  lb pool recheck accounts\n  curl --unix-socket /run/lobby/lb.sock -X POST http://lb/v1/pools/accounts/recheck\n\nThe second does the same, from a script that is called on a promotion."
    )]
    Recheck {
        /// Its name
        name: String,
    },
    /// Say which of its servers is the primary, where that cannot be told
    #[command(
        after_help = "EXAMPLES\n  lb pool promote accounts 10.0.0.22:5432\n\nIt promotes nothing: the server must say itself that it is the primary. Needed where Lobby does not follow\none by itself: an old primary that is the only one left, or two on the same timeline."
    )]
    Promote {
        /// The pool
        pool: String,
        /// The server, as the document has it
        backend: BackendAddress,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Backend {
    /// All backends
    List {
        /// Only those of this pool
        #[arg(long)]
        pool: Option<String>,
    },
    /// Add one to a pool
    #[command(
        after_help = "EXAMPLES\n  lb backend add web 10.0.0.13:8080\n  lb backend add web 10.0.0.14:8080 --weight 2"
    )]
    Add {
        #[command(flatten)]
        backend: OneBackend,
        /// Its share of new connections, 0 to 1000
        #[arg(long, value_parser = clap::value_parser!(u16).range(0..=1000))]
        weight: Option<u16>,
    },
    /// Remove one from the document at once: its connections are reset. `drain` is the gentle way
    Remove(OneBackend),
    /// Give it no new connections; those it has may end
    #[command(
        after_help = "EXAMPLES\n  lb backend drain web 10.0.0.11:8080\n  lb backend drain web 10.0.0.11:8080 --deadline 5m    (what is left after five minutes is reset)"
    )]
    Drain {
        #[command(flatten)]
        backend: OneBackend,
        /// Reset what is left after this time
        #[arg(long, value_name = "TIME", value_parser = duration)]
        deadline: Option<Duration>,
    },
    /// Use it again, after `drain` or `disable`
    Resume(OneBackend),
    /// Change its share of new connections
    Weight {
        #[command(flatten)]
        backend: OneBackend,
        /// The share, 0 to 1000, against the others' of the pool; 0: no new connections
        #[arg(value_parser = clap::value_parser!(u16).range(0..=1000))]
        weight: u16,
    },
    /// Take it out at once: its connections are reset, but it stays in the document
    Disable(OneBackend),
}

/// A backend of a pool.
#[derive(Clone, Debug, Args)]
pub(super) struct OneBackend {
    /// Its pool
    pub pool: String,
    /// Its address, as in the document
    pub address: BackendAddress,
}

#[derive(Debug, Args)]
pub(super) struct Connections {
    /// Only of this service
    #[arg(long)]
    pub service: Option<String>,
    /// Only to this backend
    #[arg(long)]
    pub backend: Option<BackendAddress>,
    /// Only from this client
    #[arg(long)]
    pub client: Option<IpAddr>,
    /// At most so many
    #[arg(long, default_value_t = 100)]
    pub limit: usize,
    /// Leave out so many of the first
    #[arg(long, default_value_t = 0)]
    pub offset: usize,
}

/// Reads "500ms", "30s", "5m" or "2h".
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a time is written \"500ms\", \"30s\", \"5m\" or \"2h\"".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let milliseconds = match &text[digits..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_words_do_not_contradict_one_another() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_read_with_their_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for text in ["30", "s", "", "1d", "-1s", "99999999999999999999s", "9999999999999999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
