//! What the desk counts.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::orders::{Answers, Denied, Report};

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Figures {
    open: AtomicU64,
    connections: AtomicU64,
    retries: AtomicU64,
    websockets: AtomicU64,
    named: Mutex<Named>,
}

#[derive(Debug, Default)]
struct Named {
    refused: BTreeMap<&'static str, u64>,
    troubles: BTreeMap<&'static str, u64>,
    answers: BTreeMap<(String, String, u16), u64>,
    denied: BTreeMap<(String, String, u16, &'static str), u64>,
}

/// Something that is open until this is dropped.
pub struct Open<'f>(&'f AtomicU64);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Figures {
    /// A connection was taken.
    pub fn taken(&self) -> Open<'_> {
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        Open(&self.open)
    }

    /// A connection became a websocket.
    pub fn websocket(&self) -> Open<'_> {
        self.websockets.fetch_add(1, Ordering::Relaxed);
        Open(&self.websockets)
    }

    /// Connections that are open.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// A connection was not let in, or is ended by the desk.
    pub fn refused(&self, reason: &'static str) {
        *self.named().refused.entry(reason).or_default() += 1;
    }

    /// A request was tried once more.
    pub fn retried(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    /// The desk has answered itself.
    pub fn trouble(&self, reason: &'static str) {
        *self.named().troubles.entry(reason).or_default() += 1;
    }

    /// A request was not let in by a route.
    pub fn denied(&self, service: &str, route: &str, status: u16, reason: &'static str) {
        let key = (service.to_owned(), route.to_owned(), status, reason);
        *self.named().denied.entry(key).or_default() += 1;
    }

    /// A request was answered.
    pub fn answer(&self, service: &str, route: &str, status: u16) {
        let key = (service.to_owned(), route.to_owned(), status / 100);
        *self.named().answers.entry(key).or_default() += 1;
    }

    fn named(&self) -> std::sync::MutexGuard<'_, Named> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub fn report(&self, lines_lost: u64) -> Report {
        let named = self.named();
        let owned = |counts: &BTreeMap<&'static str, u64>| {
            counts.iter().map(|(&reason, &count)| (reason.to_owned(), count)).collect()
        };
        let answers = named.answers.iter().map(|((service, route, class), &count)| Answers {
            service: service.clone(),
            route: route.clone(),
            class: *class,
            count,
        });
        let denied = named.denied.iter().map(|((service, route, status, reason), &count)| Denied {
            service: service.clone(),
            route: route.clone(),
            status: *status,
            reason: (*reason).to_owned(),
            count,
        });
        Report {
            open: self.open(),
            websockets: self.websockets.load(Ordering::Relaxed),
            connections: self.connections.load(Ordering::Relaxed),
            refused: owned(&named.refused),
            retries: self.retries.load(Ordering::Relaxed),
            lines_lost,
            answers: answers.collect(),
            troubles: owned(&named.troubles),
            denied: denied.collect(),
        }
    }
}
