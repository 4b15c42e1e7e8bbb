//! The command line: words in, the daemon's answers out.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or a document with mistakes, 3 the daemon is not running. With `--json` an
//! answer on standard output and a failure on standard error ([`view::Refusal`]) are JSON.

mod args;
mod auth;
mod capture;
mod client;
mod documents;
mod edit;
mod findings;
mod reception;
mod show;
mod table;

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory, Parser};
use serde::Serialize;

use self::{
    args::{Backend, Cli, Command, Desk, Pool, Route, Service},
    client::{Client, ClientError},
};
use crate::{
    api::view::{self, Connections, Counters, Done, Snapshot},
    config::Complaint,
    daemon, log, proxy,
};

/// How a command ended, when not well.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Exit code 3 where the daemon is not running, 2 where the question is wrong or the document would be, else 1.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// Exit code 2.
    #[error("{0}")]
    Document(String),
    /// What is wrong with the document in a file. Exit code 2.
    #[error("{}", documents::mistakes(.0, .1))]
    Mistakes(PathBuf, Vec<Complaint>),
    /// Exit code 1.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
    /// Exit code 1; all has been said.
    #[error("")]
    Silent,
    /// Who reads what is printed has gone: no failure, but an end.
    #[error("")]
    Unread,
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Client(ClientError::NotRunning { .. }) => 3,
            Self::Document(_)
            | Self::Mistakes(..)
            | Self::Client(ClientError::Wrong(_) | ClientError::Document { .. }) => 2,
            Self::Client(_) | Self::Other(_) | Self::Silent => 1,
            Self::Unread => 0,
        }
    }

    /// Says it on standard error: for people, or for programs.
    fn say(&self, as_json: bool) {
        let text = self.to_string();
        if text.is_empty() {
            return;
        }
        let complaints = match self {
            Self::Mistakes(_, complaints) | Self::Client(ClientError::Document { complaints, .. }) => {
                complaints
            }
            _ => &Vec::new(),
        };
        if as_json {
            let refusal = view::Refusal { error: text, complaints: complaints.clone() };
            if let Ok(json) = serde_json::to_string_pretty(&refusal) {
                eprintln!("{json}");
            }
            return;
        }
        if let Self::Mistakes(file, complaints) = self {
            documents::tell(file, complaints);
        }
        let coloured = std::io::stderr().is_terminal() && table::wanted();
        eprintln!("{} {text}", table::paint("error:", table::Tone::Bad, coloured));
    }
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    // Clap's own way (`arg_required_else_help`) takes a variable of the environment for an argument.
    if std::env::args_os().len() < 2 {
        eprint!("{}", Cli::command().render_help());
        return ExitCode::from(2);
    }
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.say(cli.json);
            ExitCode::from(failure.code())
        }
    }
}

fn dispatch(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        Command::Run(options) => {
            log::start(options.log.log_format, &options.log.log_level)
                .map_err(|error| Failure::Document(error.to_string()))?;
            let options = daemon::Options {
                config: options.config.clone(),
                run_dir: cli.run_dir.clone(),
                bpffs: options.bpffs.clone(),
                ephemeral: options.ephemeral,
                memory: options.memory,
                desk_arguments: options.log.arguments(),
            };
            daemon::run(&options).map_err(|error| match error {
                daemon::RunError::Document(why) => Failure::Document(why),
                daemon::RunError::Other(error) => error.into(),
            })
        }
        Command::DeskProcess(log) => {
            log::start(log.log_format, &log.log_level).map_err(anyhow::Error::from)?;
            proxy::desk::run()
                .map_err(|error| anyhow::Error::from(error).context("the desk cannot start").into())
        }
        Command::Check { file, no_files } => documents::check(file, !no_files, cli.json),
        Command::Auth(command) => auth::run(command),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "lb", &mut text);
            print(&String::from_utf8_lossy(&text))
        }
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(anyhow::Error::from)?;
            runtime.block_on(converse(cli))
        }
    }
}

/// The commands that talk to the daemon.
async fn converse(cli: &Cli) -> Result<(), Failure> {
    let client = Client::new(&cli.run_dir);
    match &cli.command {
        Command::Apply { file } => documents::apply(file, &client, cli.json).await,
        Command::Plan { file } => documents::plan(file, &client, cli.json).await,
        Command::Reload => done(cli, &client.send(hyper::Method::POST, "/v1/reload", &()).await?),
        Command::Detach { bpffs } => match client.send(hyper::Method::POST, "/v1/detach", &()).await {
            Err(ClientError::NotRunning { .. }) => {
                let message = daemon::detach(&cli.run_dir, bpffs.as_deref(), args::BPFFS.as_ref()).await?;
                done(cli, &Done { message, ..Done::default() })
            }
            answer => done(cli, &answer?),
        },
        Command::Status { watch } => status(cli, &client, *watch).await,
        Command::Service(Service::List) => {
            let services: Vec<view::Service> = client.get("/v1/services").await?;
            answer(cli, &services, || show::services(&services))
        }
        Command::Service(Service::Show { name }) => {
            let service: view::Service = client.get(&format!("/v1/services/{}", quoted(name))).await?;
            let backends = backends_of(&client, &service.pool).await?;
            let all = WithBackends { of: &service, backend_list: &backends };
            answer(cli, &all, || show::service(&service, &backends))
        }
        Command::Pool(Pool::List) => {
            let pools: Vec<view::Pool> = client.get("/v1/pools").await?;
            answer(cli, &pools, || show::pools(&pools))
        }
        Command::Pool(Pool::Show { name }) => {
            let pool: view::Pool = client.get(&format!("/v1/pools/{}", quoted(name))).await?;
            let backends = backends_of(&client, name).await?;
            let all = WithBackends { of: &pool, backend_list: &backends };
            answer(cli, &all, || show::pool(&pool, &backends))
        }
        Command::Backend(Backend::List { pool }) => {
            let backends: Vec<view::Backend> = match pool {
                // Tells a pool that is not there from one without backends.
                Some(name) => {
                    client.get::<view::Pool>(&format!("/v1/pools/{}", quoted(name))).await?;
                    backends_of(&client, name).await?
                }
                None => client.get("/v1/backends").await?,
            };
            answer(cli, &backends, || show::backends(&backends))
        }
        Command::Pool(Pool::Recheck { name }) => {
            let path = format!("/v1/pools/{}/recheck", quoted(name));
            done(cli, &client.send(hyper::Method::POST, &path, &()).await?)
        }
        Command::Pool(Pool::Promote { pool, backend }) => {
            let path = format!("/v1/pools/{}/promote/{}", quoted(pool), quoted(&backend.to_string()));
            done(cli, &client.send(hyper::Method::POST, &path, &()).await?)
        }
        Command::Route(Route::List) => {
            let routes: Vec<view::Route> = client.get("/v1/routes").await?;
            answer(cli, &routes, || reception::routes(&routes))
        }
        Command::Route(Route::Explain { url, method, headers, config }) => {
            let (url, method, headers) = (url.clone(), method.clone(), headers.clone());
            let question = view::RouteQuestion { url, method, headers };
            let found = reception::explain(&question, config.as_deref(), &client).await?;
            answer(cli, &found, || reception::explanations(&found))
        }
        Command::Desk(Desk::Status) => {
            let desk: Option<view::Desk> = client.get("/v1/desk").await?;
            answer(cli, &desk, || reception::desk(desk.as_ref()))
        }
        Command::Service(_) | Command::Pool(_) | Command::Backend(_) => {
            let edits = edit::edits(&cli.command);
            done(cli, &client.send(hyper::Method::POST, "/v1/edits", &edits).await?)
        }
        Command::Connections(filter) => {
            let connections: Connections = client.get(&edit::connections_path(filter)).await?;
            answer(cli, &connections, || show::connections(&connections))
        }
        Command::Explain { pcap: Some(file), limit, .. } => {
            let frames = capture::frames(file, usize::from(*limit))?;
            let path = "/v1/explanations/frames";
            let found: Vec<view::Explanation> = client.send(hyper::Method::POST, path, &frames).await?;
            answer(cli, &found, || show::explanations(&found))
        }
        Command::Explain { client: from, called, flags, sequence, .. } => {
            let (Some(from), Some((called, port))) = (from, called.and_then(|it| Some((it, it.port?))))
            else {
                let why = "name the port that is called: lb explain 198.51.100.7:40000 203.0.113.10:80/tcp";
                return Err(Failure::Document(why.into()));
            };
            let question = view::Question {
                client: from.to_string(),
                called: std::net::SocketAddr::new(called.address, port).to_string(),
                protocol: called.protocol.to_string(),
                flags: flags.clone(),
                sequence: *sequence,
            };
            let path = "/v1/explanations";
            let found: view::Explanation = client.send(hyper::Method::POST, path, &question).await?;
            answer(cli, &found, || show::explanation(&found))
        }
        Command::Counters { all } => {
            let counters: Counters = client.get("/v1/counters").await?;
            answer(cli, &counters, || show::counters(&counters, *all))
        }
        Command::Doctor { config, bpffs } => {
            findings::doctor(config.as_deref(), bpffs, &client, cli.json).await
        }
        Command::Run(_)
        | Command::DeskProcess(_)
        | Command::Check { .. }
        | Command::Auth(_)
        | Command::Completions { .. } => Ok(()),
    }
}

/// A service or a pool with its servers, as they are shown together.
#[derive(Serialize)]
struct WithBackends<'a, T> {
    #[serde(flatten)]
    of: &'a T,
    backend_list: &'a [view::Backend],
}

async fn backends_of(client: &Client, pool: &str) -> Result<Vec<view::Backend>, ClientError> {
    client.get(&format!("/v1/backends?pool={}", quoted(pool))).await
}

async fn status(cli: &Cli, client: &Client, watch: bool) -> Result<(), Failure> {
    loop {
        let snapshot: Snapshot = client.get("/v1/snapshot").await?;
        if watch && std::io::stdout().is_terminal() && !cli.json {
            // Home, and clear to the end of the screen.
            print("\x1b[H\x1b[2J")?;
        }
        answer(cli, &snapshot, || show::status(&snapshot))?;
        if !watch {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

fn done(cli: &Cli, done: &Done) -> Result<(), Failure> {
    answer(cli, done, || {
        let warnings: String = done.warnings.iter().map(|warning| format!("{warning}\n")).collect();
        format!("{warnings}{}\n", done.message)
    })
}

fn answer(cli: &Cli, value: &impl Serialize, words: impl FnOnce() -> String) -> Result<(), Failure> {
    answer_or_json(cli.json, value, words)
}

/// One answer: for programs or for people.
fn answer_or_json(
    as_json: bool,
    value: &impl Serialize,
    words: impl FnOnce() -> String,
) -> Result<(), Failure> {
    let text = if as_json {
        serde_json::to_string_pretty(value).map_err(anyhow::Error::from)? + "\n"
    } else {
        words()
    };
    print(&text)
}

/// Prints; a reader that has gone (`lb … | head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Failure::Unread),
        other => Ok(other.map_err(anyhow::Error::from)?),
    }
}

/// A text as part of a URL (RFC 3986 section 2.3: what is not unreserved is quoted).
fn quoted(text: &str) -> String {
    let mut quoted = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => quoted.push(byte.into()),
            _ => quoted.push_str(&format!("%{byte:02X}")),
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_in_urls() {
        assert_eq!(quoted("web-1.a_b~"), "web-1.a_b~");
        assert_eq!(quoted("a b/ü?"), "a%20b%2F%C3%BC%3F");
    }
}
