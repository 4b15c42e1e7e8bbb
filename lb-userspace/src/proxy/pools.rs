//! Which backend of a pool gets a request: of two taken at random by their weights, the one with fewer
//! requests under way for its weight. And how many requests may be tried once more.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    chance::mix,
    orders::{Files, UnderWay},
    transport::Transport,
};
use crate::model::desk::{Crowd, Ejection, Speech};

/// A pool as the daemon sees it now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolOrder {
    /// Its name.
    pub name: String,
    /// How to speak with them.
    pub speech: Speech,
    /// How many requests each may have.
    pub crowd: Option<Crowd>,
    /// When one gets none for a while.
    pub ejection: Option<Ejection>,
    /// Its backends.
    pub backends: Vec<BackendOrder>,
}

/// A backend as the daemon sees it now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendOrder {
    /// Its address.
    pub address: IpAddr,
    /// Its port; `None`: the one that the client called.
    pub port: Option<u16>,
    /// Its share of requests.
    pub weight: u16,
    /// It gets requests.
    pub usable: bool,
    /// It gets none because it is being taken out.
    pub draining: bool,
    /// What it has does not go on: websockets to it end.
    pub cut: bool,
}

/// All pools. What is counted of a backend stays when the pools are ordered anew.
#[derive(Debug, Default)]
pub struct Pools(HashMap<String, Arc<Pool>>);

/// Backends that can stand in for one another.
#[derive(Debug)]
pub struct Pool {
    /// Its name.
    pub name: String,
    members: Vec<Member>,
    /// Sums of the weights of members that get requests, up to each.
    shares: Vec<u64>,
    /// How to speak with them.
    pub transport: Arc<Transport>,
    crowd: Option<Crowd>,
    ejection: Option<Ejection>,
    /// Another has been ordered in its place.
    superseded: CancellationToken,
    room: Arc<Room>,
    budget: Arc<Budget>,
}

/// Who waits until a backend has room.
#[derive(Debug, Default)]
struct Room {
    waiting: AtomicU64,
    freed: Notify,
}

/// A place among those who wait, until this is dropped.
struct Place<'r>(&'r Room);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Member {
    order: BackendOrder,
    /// What it is known by, to other desks too.
    mark: u64,
    under_way: Arc<AtomicU64>,
    conduct: Arc<Mutex<Conduct>>,
    cut: CancellationToken,
    /// Whether it is usable by the latest orders: whoever goes by earlier ones still is not to begin anything there.
    usable: Arc<AtomicBool>,
}

/// How well a backend answers.
#[derive(Debug, Default)]
struct Conduct {
    /// How many in a row went wrong.
    failures: u32,
    /// How often it was given a pause since it last answered well after one.
    pauses: u32,
    /// It gets no requests until then.
    until: Option<Instant>,
}

impl Conduct {
    const MOST_PAUSES: u32 = 10;

    fn is_paused(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// A request that wants a backend.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The port that its client called.
    pub port: u16,
    /// Time and chance.
    pub random: u64,
    /// Whom it would rather come to.
    pub wish: Wish,
}

/// Whom a request would rather come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Whoever has less to do, of two.
    Anyone,
    /// Always the same for this key, as long as they are fit; of those that come and go only a share moves.
    Same(u64),
    /// The one with this mark.
    Marked(u64),
}

/// A key for [`Wish::Same`], the same for all desks.
pub fn key(of: &[u8]) -> u64 {
    of.chunks(8).fold(mix(of.len() as u64), |key, chunk| {
        let number = chunk.iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        mix(key ^ mix(number))
    })
}

/// What a backend is known by.
fn mark(order: &BackendOrder) -> u64 {
    let port = order.port.map_or(String::new(), |port| port.to_string());
    key(format!("{} {port}", order.address).as_bytes())
}

impl Member {
    /// Whether it gets no requests for a while.
    fn is_paused(&self, now: Instant) -> bool {
        lock(&self.conduct).is_paused(now)
    }

    /// How good it is for a key; by highest random weight (Thaler and Ravishankar, 1998), here with weights by
    /// the logarithmic method.
    fn score(&self, key: u64) -> f64 {
        // In (0, 1), never one of its ends: 53 bits are what a double holds.
        let drawn = ((mix(key ^ self.mark) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        -f64::from(self.order.weight) / drawn.ln()
    }
}

/// Why there is no backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoBackend {
    /// All are being taken out.
    Drained,
    /// None is fit.
    Unfit,
    /// Those that are fit have been tried.
    Tried,
    /// Those that are fit have all they may have.
    Full,
    /// The pool has been ordered anew while it was waited for room: the new one is to be asked.
    Superseded,
}

/// A backend, and a request that it is counted to have until this is dropped.
#[derive(Debug)]
pub struct Ticket {
    /// Where it is.
    pub address: SocketAddr,
    /// What it is known by to who wishes to come back.
    pub mark: u64,
    under_way: Arc<AtomicU64>,
    conduct: Arc<Mutex<Conduct>>,
    cut: CancellationToken,
    room: Arc<Room>,
}

impl Ticket {
    /// Comes back when what is under way for long is to end: the backend has been taken out.
    pub async fn cut(&self) {
        self.cut.cancelled().await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.under_way.fetch_sub(1, Ordering::Relaxed);
        self.room.freed.notify_one();
    }
}

impl Pools {
    /// Pools as ordered, with what was counted before.
    pub fn ordered(orders: &[PoolOrder], files: &Files, before: &Self) -> Self {
        let pool = |order: &PoolOrder| {
            let before = before.0.get(&order.name);
            (order.name.clone(), Arc::new(Pool::ordered(order, files, before.map(Arc::as_ref))))
        };
        let pools = Self(orders.iter().map(pool).collect());
        for (name, pool) in &before.0 {
            let now = pools.get(name);
            let goes_on = |member: &Member| {
                now.and_then(|pool| pool.member(&member.order)).is_some_and(|member| !member.order.cut)
            };
            pool.members.iter().filter(|member| !goes_on(member)).for_each(|member| member.cut.cancel());
        }
        pools
    }

    /// Others are in force in their place: who waits for room is to ask those, and who tries once more is not to come to a
    /// backend that is usable no more.
    pub fn supersede(&self, by: &Self) {
        for (name, pool) in &self.0 {
            // Whoever finds nobody usable is to find this, too.
            pool.superseded.cancel();
            for member in &pool.members {
                let now = by.get(name).and_then(|pool| pool.member(&member.order));
                member.usable.store(now.is_some_and(|now| now.order.usable), Ordering::Release);
            }
        }
    }

    /// What is under way with each backend that has something.
    pub fn under_way(&self) -> Vec<UnderWay> {
        let members =
            self.0.values().flat_map(|pool| pool.members.iter().map(move |member| (&pool.name, member)));
        let of = |(pool, Member { order, under_way, .. }): (&String, &Member)| UnderWay {
            pool: pool.clone(),
            address: order.address,
            port: order.port,
            count: under_way.load(Ordering::Relaxed),
        };
        members.map(of).filter(|it| it.count > 0).collect()
    }

    /// A pool by its name.
    pub fn get(&self, name: &str) -> Option<&Arc<Pool>> {
        self.0.get(name)
    }
}

impl Pool {
    fn ordered(order: &PoolOrder, files: &Files, before: Option<&Self>) -> Self {
        let member = |order: &BackendOrder| {
            let known = before.and_then(|pool| pool.member(order));
            Member {
                order: order.clone(),
                mark: mark(order),
                under_way: known.map(|m| Arc::clone(&m.under_way)).unwrap_or_default(),
                conduct: known.map(|m| Arc::clone(&m.conduct)).unwrap_or_default(),
                // One that comes back begins anew.
                cut: known.map(|m| m.cut.clone()).filter(|cut| !cut.is_cancelled()).unwrap_or_default(),
                // Earlier orders may take it away from each other; what they have taken stays taken.
                usable: known
                    .map(|m| Arc::clone(&m.usable))
                    .filter(|usable| order.usable && usable.load(Ordering::Relaxed))
                    .unwrap_or_else(|| Arc::new(order.usable.into())),
            }
        };
        let members: Vec<_> = order.backends.iter().map(member).collect();
        let shares = members.iter().scan(0, |sum, member| {
            *sum += if member.order.usable { u64::from(member.order.weight) } else { 0 };
            Some(*sum)
        });
        Self {
            shares: shares.collect(),
            transport: Transport::ordered(&order.speech, files, before.map(|pool| &pool.transport)),
            name: order.name.clone(),
            crowd: order.crowd,
            ejection: order.ejection,
            superseded: CancellationToken::new(),
            room: before.map(|pool| Arc::clone(&pool.room)).unwrap_or_default(),
            budget: before.map(|pool| Arc::clone(&pool.budget)).unwrap_or_default(),
            members,
        }
    }

    /// The same backend, as it is known here.
    fn member(&self, order: &BackendOrder) -> Option<&Member> {
        let same =
            |member: &&Member| (member.order.address, member.order.port) == (order.address, order.port);
        self.members.iter().find(same)
    }

    /// A backend for a request, as [`Self::choose`] has it, once one has room.
    ///
    /// # Errors
    /// Why there is none; [`NoBackend::Full`] when none has room in time, or too many wait already;
    /// [`NoBackend::Superseded`] when the pool is another meanwhile.
    pub async fn enter(&self, call: Call, tried: &[SocketAddr]) -> Result<Ticket, NoBackend> {
        let first = self.choose(call, tried);
        let (Err(NoBackend::Full), Some(crowd)) = (&first, self.crowd) else { return first };
        let before = self.room.waiting.fetch_add(1, Ordering::Relaxed);
        let _place = Place(&self.room);
        if before >= u64::from(crowd.queue) {
            return first;
        }
        let mut over = pin!(tokio::time::sleep(crowd.wait));
        let mut woken = false;
        loop {
            // What is freed from here on is noticed, though nobody waits for it yet.
            let mut freed = pin!(self.room.freed.notified());
            freed.as_mut().enable();
            match self.choose(call, tried) {
                // What was freed may be of use to another, who has tried others.
                Err(NoBackend::Full) if woken && !tried.is_empty() => self.room.freed.notify_one(),
                Err(NoBackend::Full) => {}
                other => return other,
            }
            tokio::select! {
                () = freed => woken = true,
                () = self.superseded.cancelled() => return Err(NoBackend::Superseded),
                () = over.as_mut() => return Err(NoBackend::Full),
            }
        }
    }

    /// A backend for a request, none of those that have been `tried`.
    ///
    /// # Errors
    /// Why there is none.
    pub fn choose(&self, call: Call, tried: &[SocketAddr]) -> Result<Ticket, NoBackend> {
        let Call { port, random, wish } = call;
        let total = self.shares.last().copied().unwrap_or(0);
        if total == 0 {
            let drained = !self.members.is_empty() && self.members.iter().all(|m| m.order.draining);
            return Err(if drained { NoBackend::Drained } else { NoBackend::Unfit });
        }
        let address =
            |member: &Member| SocketAddr::new(member.order.address, member.order.port.unwrap_or(port));
        let drawn = |random: u32| {
            let point = (u64::from(random) * total) >> 32;
            self.shares.partition_point(|&share| share <= point)
        };
        let pair = [(random >> 32) as u32, random as u32].map(drawn);
        let limit = self.crowd.map_or(u64::MAX, |crowd| crowd.limit.into());
        let has_room = |member: &Member| member.under_way.load(Ordering::Relaxed) < limit;
        let untried = |&number: &usize| !tried.contains(&address(&self.members[number]));
        // Where all that are left have a pause, none has: somebody has to answer.
        let now = self.ejection.map(|_| Instant::now());
        let is_paused = |number: usize| now.is_some_and(|now| self.members[number].is_paused(now));
        let heeds =
            now.is_some() && (0..self.members.len()).any(|n| self.is_fit(n) && untried(&n) && !is_paused(n));
        let rests = |number: usize| heeds && is_paused(number);
        let fit = |&n: &usize| self.is_fit(n);
        let fresh = |number: &usize| {
            fit(number) && untried(number) && !rests(*number) && has_room(&self.members[*number])
        };
        let candidates = || (0..self.members.len()).filter(fresh);
        let wished = match wish {
            Wish::Anyone => None,
            Wish::Marked(mark) => candidates().find(|&number| self.members[number].mark == mark),
            Wish::Same(key) => {
                let score = |&number: &usize| self.members[number].score(key);
                candidates().max_by(|a, b| score(a).total_cmp(&score(b)))
            }
        };
        let none = || match (0..self.members.len()).filter(fit).any(|n| untried(&n)) {
            true => NoBackend::Full,
            false if self.superseded.is_cancelled() => NoBackend::Superseded,
            false => NoBackend::Tried,
        };
        let load = |&number: &usize| {
            let member = &self.members[number];
            (member.under_way.load(Ordering::Relaxed) + 1) * 1000 / u64::from(member.order.weight).max(1)
        };
        let of_two = || pair.into_iter().filter(fresh).min_by_key(load);
        // Where chance names only those that are not to be asked, whoever of the others has least to do.
        let left = || candidates().min_by_key(load);
        let number = wished.or_else(of_two).or_else(left).ok_or_else(none)?;
        let member = &self.members[number];
        // Somebody else may have taken the last of its room meanwhile.
        let one_more = |count| (count < limit).then_some(count + 1);
        let taken = member.under_way.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        taken.map_err(|_| NoBackend::Full)?;
        Ok(Ticket {
            address: address(member),
            under_way: Arc::clone(&member.under_way),
            conduct: Arc::clone(&member.conduct),
            mark: member.mark,
            cut: member.cut.clone(),
            room: Arc::clone(&self.room),
        })
    }

    fn is_fit(&self, number: usize) -> bool {
        let member = &self.members[number];
        member.order.usable && member.order.weight > 0 && member.usable.load(Ordering::Acquire)
    }

    /// Notes how a request went; where its backend gets none for a while from now on, for how long. Never more than half
    /// of those that are fit have a pause: what is wrong with most of them is not theirs alone.
    pub fn note(&self, ticket: &Ticket, went_well: bool) -> Option<Duration> {
        let Ejection { after, pause } = self.ejection?;
        let now = Instant::now();
        let fit = (0..self.members.len()).filter(|&n| self.is_fit(n)).count();
        let paused = self.members.iter().filter(|member| member.is_paused(now)).count();
        let mut conduct = lock(&ticket.conduct);
        if went_well {
            // What was under way when it got its pause says nothing of now.
            if !conduct.is_paused(now) {
                *conduct = Conduct::default();
            }
            return None;
        }
        conduct.failures = conduct.failures.saturating_add(1);
        if conduct.failures < after || conduct.is_paused(now) || 2 * (paused + 1) > fit {
            return None;
        }
        conduct.failures = 0;
        conduct.pauses = (conduct.pauses + 1).min(Conduct::MOST_PAUSES);
        let pause = pause * conduct.pauses;
        conduct.until = Some(now + pause);
        Some(pause)
    }

    /// Whether each backend has only so many requests.
    pub fn is_limited(&self) -> bool {
        self.crowd.is_some()
    }

    /// What may be tried once more.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }
}

fn lock(conduct: &Mutex<Conduct>) -> MutexGuard<'_, Conduct> {
    conduct.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many requests may be tried once more: one for every five that come, so that retries never double what
/// a pool in trouble has to bear.
#[derive(Debug)]
pub struct Budget(AtomicI64);

impl Default for Budget {
    fn default() -> Self {
        Self(AtomicI64::new(Self::AT_FIRST))
    }
}

impl Budget {
    const RETRY: i64 = 5;
    const AT_FIRST: i64 = 10 * Self::RETRY;
    const MOST: i64 = 100 * Self::RETRY;

    /// A request has come.
    pub fn earn(&self) {
        if self.0.load(Ordering::Relaxed) < Self::MOST {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether one may be tried once more; it is counted.
    pub fn spend(&self) -> bool {
        let enough = |now: i64| (now >= Self::RETRY).then_some(now - Self::RETRY);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enough).is_ok()
    }
}

#[cfg(test)]
mod tests;
