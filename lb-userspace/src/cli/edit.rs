//! From the command line's words to changes of the document.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::ValueEnum as _;

use super::{
    args::{Backend, Command, Connections, OneBackend, Pool, Service},
    quoted,
};
use crate::api::request::{Change, Edits};

/// The changes that a command asks for; none for a command that asks for none.
pub(super) fn edits(command: &Command) -> Edits {
    let changes = match command {
        Command::Service(service) => self::service(service),
        Command::Pool(pool) => self::pool(pool),
        Command::Backend(backend) => self::backend(backend),
        _ => None,
    };
    Edits { changes: changes.into_iter().collect(), revision: None }
}

/// Where the wanted connections are found.
pub(super) fn connections_path(filter: &Connections) -> String {
    let mut path = format!("/v1/connections?limit={}&offset={}", filter.limit, filter.offset);
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            path.push_str(&format!("&{name}={}", quoted(&value)));
        }
    };
    add("service", filter.service.clone());
    add("backend", filter.backend.map(|backend| backend.to_string()));
    add("client", filter.client.map(|client| client.to_string()));
    path
}

fn service(command: &Service) -> Option<Change> {
    match command {
        Service::List | Service::Show { .. } => None,
        Service::Add { name, listen, pool, scheduler, allow, deny } => Some(Change::AddService {
            name: name.clone(),
            listen: listen.to_string(),
            pool: pool.clone(),
            // Called as in documents.
            scheduler: scheduler
                .and_then(|scheduler| scheduler.to_possible_value())
                .map(|value| value.get_name().to_owned()),
            allow: allow.iter().map(ToString::to_string).collect(),
            deny: deny.iter().map(ToString::to_string).collect(),
        }),
        Service::Remove { name } => Some(Change::RemoveService { name: name.clone() }),
    }
}

fn pool(command: &Pool) -> Option<Change> {
    match command {
        Pool::List | Pool::Show { .. } | Pool::Recheck { .. } | Pool::Promote { .. } => None,
        Pool::Add { name, backend, tcp, http, interval } => Some(Change::AddPool {
            name: name.clone(),
            backends: backend.iter().map(ToString::to_string).collect(),
            tcp: *tcp,
            http: http.clone(),
            interval: interval.map(|interval| format!("{}ms", interval.as_millis())),
        }),
        Pool::Remove { name } => Some(Change::RemovePool { name: name.clone() }),
    }
}

fn backend(command: &Backend) -> Option<Change> {
    let of = |backend: &OneBackend| (backend.pool.clone(), backend.address.to_string());
    Some(match command {
        Backend::List { .. } => return None,
        Backend::Add { backend, weight } => {
            let (pool, address) = of(backend);
            Change::AddBackend { pool, address, weight: *weight }
        }
        Backend::Remove(backend) => {
            let (pool, address) = of(backend);
            Change::RemoveBackend { pool, address }
        }
        Backend::Drain { backend, deadline } => {
            let (pool, address) = of(backend);
            Change::DrainBackend { pool, address, deadline: deadline.map(from_now) }
        }
        Backend::Resume(backend) => {
            let (pool, address) = of(backend);
            Change::ResumeBackend { pool, address }
        }
        Backend::Weight { backend, weight } => {
            let (pool, address) = of(backend);
            Change::WeighBackend { pool, address, weight: *weight }
        }
        Backend::Disable(backend) => {
            let (pool, address) = of(backend);
            Change::DisableBackend { pool, address }
        }
    })
}

/// Seconds since the epoch, so long from now: a deadline lasts over a restart of the daemon.
fn from_now(time: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let end = now.saturating_add(time);
    // Up to the next whole second: never shorter than asked.
    end.as_secs() + u64::from(end.subsec_nanos() > 0)
}
