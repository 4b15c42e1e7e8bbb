//! Which backend of a pool gets a request: of two taken at random by their weights, the one with fewer
//! requests under way for its weight. And how many requests may be tried once more.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{orders::Files, transport::Transport};
use crate::model::desk::{Crowd, Speech};

/// A pool as the daemon sees it now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolOrder {
    /// Its name.
    pub name: String,
    /// How to speak with them.
    pub speech: Speech,
    /// How many requests each may have.
    pub crowd: Option<Crowd>,
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
    members: Vec<Member>,
    /// Sums of the weights of members that get requests, up to each.
    shares: Vec<u64>,
    /// How to speak with them.
    pub transport: Arc<Transport>,
    crowd: Option<Crowd>,
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
    under_way: Arc<AtomicU64>,
    cut: CancellationToken,
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
}

/// A backend, and a request that it is counted to have until this is dropped.
#[derive(Debug)]
pub struct Ticket {
    /// Where it is.
    pub address: SocketAddr,
    under_way: Arc<AtomicU64>,
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
                under_way: known.map(|m| Arc::clone(&m.under_way)).unwrap_or_default(),
                // One that comes back begins anew.
                cut: known.map(|m| m.cut.clone()).filter(|cut| !cut.is_cancelled()).unwrap_or_default(),
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
            crowd: order.crowd,
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
    /// Why there is none; [`NoBackend::Full`] when none has room in time, or too many wait already.
    pub async fn enter(&self, port: u16, tried: &[SocketAddr], random: u64) -> Result<Ticket, NoBackend> {
        let first = self.choose(port, tried, random);
        let (Err(NoBackend::Full), Some(crowd)) = (&first, self.crowd) else { return first };
        let before = self.room.waiting.fetch_add(1, Ordering::Relaxed);
        let _place = Place(&self.room);
        if before >= u64::from(crowd.queue) {
            return first;
        }
        let mut over = pin!(tokio::time::sleep(crowd.wait));
        loop {
            // What is freed from here on is noticed, though nobody waits for it yet.
            let mut freed = pin!(self.room.freed.notified());
            freed.as_mut().enable();
            match self.choose(port, tried, random) {
                Err(NoBackend::Full) => {}
                other => return other,
            }
            tokio::select! {
                () = freed => {}
                () = over.as_mut() => return Err(NoBackend::Full),
            }
        }
    }

    /// A backend for a request to `port`, none of those that have been `tried`. Time and chance are in
    /// `random`.
    ///
    /// # Errors
    /// Why there is none.
    pub fn choose(&self, port: u16, tried: &[SocketAddr], random: u64) -> Result<Ticket, NoBackend> {
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
        let fresh = |number: &usize| untried(number) && has_room(&self.members[*number]);
        // Where chance names only those that have been tried, whoever is left.
        let fit = |&n: &usize| self.members[n].order.usable && self.members[n].order.weight > 0;
        let left = || (0..self.members.len()).filter(fit).find(fresh);
        let none = || match (0..self.members.len()).filter(fit).any(|n| untried(&n)) {
            true => NoBackend::Full,
            false => NoBackend::Tried,
        };
        let load = |&number: &usize| {
            let member = &self.members[number];
            (member.under_way.load(Ordering::Relaxed) + 1) * 1000 / u64::from(member.order.weight).max(1)
        };
        let number = pair.into_iter().filter(fresh).min_by_key(load).or_else(left).ok_or_else(none)?;
        let member = &self.members[number];
        // Somebody else may have taken the last of its room meanwhile.
        let one_more = |count| (count < limit).then_some(count + 1);
        let taken = member.under_way.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        taken.map_err(|_| NoBackend::Full)?;
        Ok(Ticket {
            address: address(member),
            under_way: Arc::clone(&member.under_way),
            cut: member.cut.clone(),
            room: Arc::clone(&self.room),
        })
    }

    /// What may be tried once more.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }
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
mod tests {
    use std::time::Duration;

    use super::*;

    fn order(backends: &[(u8, u16, bool)]) -> Vec<PoolOrder> {
        let backend = |&(last, weight, usable): &(u8, u16, bool)| BackendOrder {
            address: [10, 0, 0, last].into(),
            port: (last != 9).then_some(8080),
            weight,
            usable,
            draining: false,
            cut: false,
        };
        vec![PoolOrder {
            name: "web".into(),
            speech: Speech::default(),
            crowd: None,
            backends: backends.iter().map(backend).collect(),
        }]
    }

    fn pools(backends: &[(u8, u16, bool)]) -> Pools {
        Pools::ordered(&order(backends), &Files::new(), &Pools::default())
    }

    /// Numbers that are as if drawn (splitmix64).
    fn numbers() -> impl Iterator<Item = u64> {
        (1u64..).map(crate::proxy::chance::mix)
    }

    fn count(pools: &Pools, times: usize, held: &mut Vec<Ticket>) -> HashMap<SocketAddr, usize> {
        let mut counts = HashMap::new();
        for random in numbers().take(times) {
            let ticket = pools.get("web").unwrap().choose(80, &[], random).unwrap();
            *counts.entry(ticket.address).or_default() += 1;
            held.push(ticket);
        }
        counts
    }

    #[test]
    fn requests_under_way_are_spread_by_weight() {
        let pools = pools(&[(1, 1, true), (2, 2, true), (3, 1, false), (4, 0, true)]);
        let mut held = Vec::new();
        let counts = count(&pools, 3000, &mut held);
        assert_eq!(counts.len(), 2, "{counts:?}");
        let of = |last: u8| counts[&SocketAddr::from(([10, 0, 0, last], 8080))];
        assert!((980..=1020).contains(&of(1)) && (1980..=2020).contains(&of(2)), "{counts:?}");
    }

    #[test]
    fn who_has_much_to_do_gets_less() {
        let pools = pools(&[(1, 1, true), (2, 1, true)]);
        let busy: SocketAddr = ([10, 0, 0, 1], 8080).into();
        let pool = pools.get("web").unwrap();
        let burden: Vec<_> =
            (0..100).map(|_| pool.choose(80, &[([10, 0, 0, 2], 8080).into()], 0).unwrap()).collect();
        assert!(burden.iter().all(|ticket| ticket.address == busy));
        let mut taken = 0;
        for random in numbers().take(1000) {
            taken += usize::from(pool.choose(80, &[], random).unwrap().address == busy);
        }
        // Only where chance names it twice.
        assert!((150..350).contains(&taken), "{taken}");
        drop(burden);
        let mut taken = 0;
        for random in numbers().take(1000) {
            taken += usize::from(pool.choose(80, &[], random).unwrap().address == busy);
        }
        assert!(taken > 400, "{taken}");
    }

    #[test]
    fn counts_outlive_orders() {
        let before = pools(&[(1, 1, true), (2, 1, true)]);
        let mut held = Vec::new();
        count(&before, 100, &mut held);
        let after = Pools::ordered(&order(&[(1, 1, true), (3, 1, true)]), &Files::new(), &before);
        let under_way = |last: u8| {
            let pool = after.get("web").unwrap();
            let is = |m: &&Member| m.order.address == IpAddr::from([10, 0, 0, last]);
            pool.members.iter().find(is).unwrap().under_way.load(Ordering::Relaxed)
        };
        assert!(under_way(1) > 0 && under_way(3) == 0);
        held.clear();
        assert_eq!(under_way(1), 0);
    }

    #[tokio::test]
    async fn who_is_taken_out_ends_what_it_has() {
        use futures::FutureExt as _;
        let now = |ticket: &Ticket| ticket.cut().now_or_never().is_some();
        let all = [(1, 1, true), (2, 1, true), (3, 1, true)];
        let first = pools(&all);
        let mut held = Vec::new();
        count(&first, 100, &mut held);
        let cut_of = |held: &[Ticket], last: u8| {
            let of: Vec<bool> =
                held.iter().filter(|t| t.address.ip() == IpAddr::from([10, 0, 0, last])).map(now).collect();
            assert!(of.len() > 3 && of.iter().all(|cut| *cut == of[0]), "{last}: {of:?}");
            of[0]
        };
        // Unfit, and away altogether; the third one is as it was.
        let mut orders = order(&all[..1]);
        orders[0].backends[0].cut = true;
        orders[0].backends.extend(order(&all)[0].backends[2..].iter().cloned());
        let second = Pools::ordered(&orders, &Files::new(), &first);
        assert_eq!([1, 2, 3].map(|last| cut_of(&held, last)), [true, true, false]);
        // What comes after it is back goes on.
        let third = Pools::ordered(&order(&all), &Files::new(), &second);
        let mut later = Vec::new();
        count(&third, 100, &mut later);
        assert_eq!([1, 2, 3].map(|last| cut_of(&later, last)), [false; 3]);
        assert_eq!([1, 2, 3].map(|last| cut_of(&held, last)), [true, true, false]);
        Pools::ordered(&[], &Files::new(), &third);
        assert_eq!([1, 2, 3].map(|last| cut_of(&later, last)), [true; 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn each_has_only_so_many_and_some_wait() {
        let mut orders = order(&[(1, 1, true), (2, 1, true)]);
        orders[0].crowd = Some(Crowd { limit: 3, queue: 2, wait: Duration::from_secs(1) });
        let pools = Pools::ordered(&orders, &Files::new(), &Pools::default());
        let pool = Arc::clone(pools.get("web").unwrap());
        let mut random = numbers();
        let mut held: Vec<_> =
            (0..6).map(|_| pool.choose(80, &[], random.next().unwrap()).unwrap()).collect();
        let of = |held: &[Ticket], last: u8| {
            held.iter().filter(|ticket| ticket.address.ip() == IpAddr::from([10, 0, 0, last])).count()
        };
        assert_eq!((of(&held, 1), of(&held, 2)), (3, 3));
        let began = tokio::time::Instant::now();
        assert_eq!(pool.enter(80, &[], 7).await.unwrap_err(), NoBackend::Full);
        assert_eq!(began.elapsed(), Duration::from_secs(1));
        // Of three who wait one is too many; the two others get what is given back, one after the other.
        let wait = || {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move { pool.enter(80, &[], 7).await })
        };
        let (first, second) = (wait(), wait());
        tokio::task::yield_now().await;
        let began = tokio::time::Instant::now();
        assert_eq!(pool.enter(80, &[], 7).await.unwrap_err(), NoBackend::Full);
        assert_eq!(began.elapsed(), Duration::ZERO);
        let freed = held.pop().unwrap().address;
        let first = first.await.unwrap().unwrap();
        assert_eq!(first.address, freed);
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        // Orders that come meanwhile change nothing of that.
        let after = Pools::ordered(&orders, &Files::new(), &pools);
        drop(first);
        let second = second.await.unwrap().unwrap();
        let all = [1, 2].map(|last| SocketAddr::from(([10, 0, 0, last], 8080)));
        assert_eq!(after.get("web").unwrap().choose(80, &[], 7).unwrap_err(), NoBackend::Full);
        assert_eq!(pool.choose(80, &all, 7).unwrap_err(), NoBackend::Tried);
        drop((second, held));
        assert!((0..6).all(|_| pool.choose(80, &[], 7).map(std::mem::forget).is_ok()));
    }

    #[test]
    fn nobody_is_tried_twice_and_reasons_are_told() {
        let two = pools(&[(1, 1, true), (9, 1, true)]);
        let pool = two.get("web").unwrap();
        let first = pool.choose(443, &[], 7).unwrap().address;
        let second = pool.choose(443, &[first], 7).unwrap().address;
        assert_ne!(first, second);
        assert!(
            [first, second].contains(&([10, 0, 0, 9], 443).into()),
            "the client's port, where none is named"
        );
        assert_eq!(pool.choose(443, &[first, second], 7).unwrap_err(), NoBackend::Tried);
        assert_eq!(pools(&[]).get("web").unwrap().choose(80, &[], 7).unwrap_err(), NoBackend::Unfit);
        let mut orders = order(&[(1, 1, false)]);
        orders[0].backends[0].draining = true;
        let drained = Pools::ordered(&orders, &Files::new(), &Pools::default());
        assert_eq!(drained.get("web").unwrap().choose(80, &[], 7).unwrap_err(), NoBackend::Drained);
    }

    #[test]
    fn a_fifth_may_be_tried_again() {
        let budget = Budget::default();
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 10);
        (0..50).for_each(|_| budget.earn());
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 10);
        (0..100_000).for_each(|_| budget.earn());
        assert_eq!((0..1000).filter(|_| budget.spend()).count(), 100);
    }
}
