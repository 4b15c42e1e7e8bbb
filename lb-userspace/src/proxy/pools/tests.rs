//! Whom requests come to, and how many at once.

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
        ejection: None,
        backends: backends.iter().map(backend).collect(),
    }]
}

fn pools(backends: &[(u8, u16, bool)]) -> Pools {
    Pools::ordered(&order(backends), &Files::new(), &Pools::default())
}

fn call(port: u16, random: u64) -> Call {
    Call { port, random, wish: Wish::Anyone }
}

/// Numbers that are as if drawn (splitmix64).
fn numbers() -> impl Iterator<Item = u64> {
    (1u64..).map(mix)
}

fn count(pools: &Pools, times: usize, held: &mut Vec<Ticket>) -> HashMap<SocketAddr, usize> {
    let mut counts = HashMap::new();
    for random in numbers().take(times) {
        let ticket = pools.get("web").unwrap().choose(call(80, random), &[]).unwrap();
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
        (0..100).map(|_| pool.choose(call(80, 0), &[([10, 0, 0, 2], 8080).into()]).unwrap()).collect();
    assert!(burden.iter().all(|ticket| ticket.address == busy));
    let mut taken = 0;
    for random in numbers().take(1000) {
        taken += usize::from(pool.choose(call(80, random), &[]).unwrap().address == busy);
    }
    // Only where chance names it twice.
    assert!((150..350).contains(&taken), "{taken}");
    drop(burden);
    let mut taken = 0;
    for random in numbers().take(1000) {
        taken += usize::from(pool.choose(call(80, random), &[]).unwrap().address == busy);
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
        (0..6).map(|_| pool.choose(call(80, random.next().unwrap()), &[]).unwrap()).collect();
    let of = |held: &[Ticket], last: u8| {
        held.iter().filter(|ticket| ticket.address.ip() == IpAddr::from([10, 0, 0, last])).count()
    };
    assert_eq!((of(&held, 1), of(&held, 2)), (3, 3));
    let began = Instant::now();
    assert_eq!(pool.enter(call(80, 7), &[]).await.unwrap_err(), NoBackend::Full);
    assert_eq!(began.elapsed(), Duration::from_secs(1));
    // Of three who wait one is too many; the two others get what is given back, one after the other.
    let wait = || {
        let pool = Arc::clone(&pool);
        tokio::spawn(async move { pool.enter(call(80, 7), &[]).await })
    };
    let (first, second) = (wait(), wait());
    tokio::task::yield_now().await;
    let began = Instant::now();
    assert_eq!(pool.enter(call(80, 7), &[]).await.unwrap_err(), NoBackend::Full);
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
    assert_eq!(after.get("web").unwrap().choose(call(80, 7), &[]).unwrap_err(), NoBackend::Full);
    assert_eq!(pool.choose(call(80, 7), &all).unwrap_err(), NoBackend::Tried);
    drop((second, held));
    assert!((0..6).all(|_| pool.choose(call(80, 7), &[]).map(std::mem::forget).is_ok()));
}

#[test]
fn who_asks_the_same_comes_to_the_same() {
    let backends: Vec<_> = (1..=10).map(|last| (last, 1, true)).collect();
    let all = pools(&backends);
    let of = |pools: &Pools, wish| {
        let call = Call { port: 80, random: 7, wish };
        pools.get("web").unwrap().choose(call, &[]).unwrap().address
    };
    let keys: Vec<u64> = (0..10_000u64).map(|n| key(n.to_string().as_bytes())).collect();
    let before: Vec<_> = keys.iter().map(|&key| of(&all, Wish::Same(key))).collect();
    let mut counts: HashMap<SocketAddr, usize> = HashMap::new();
    before.iter().for_each(|address| *counts.entry(*address).or_default() += 1);
    assert!(counts.len() == 10 && counts.values().all(|n| (850..1150).contains(n)), "{counts:?}");
    // Without one of them its own alone go elsewhere, and come back with it.
    let mut fewer = backends.clone();
    fewer[3].2 = false;
    let without = pools(&fewer);
    let after: Vec<_> = keys.iter().map(|&key| of(&without, Wish::Same(key))).collect();
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    assert_eq!(moved, counts[&SocketAddr::from(([10, 0, 0, 4], 8080))]);
    // A weight is a share.
    let mut heavier = backends.clone();
    heavier[0].1 = 10;
    let heavier = pools(&heavier);
    let first = SocketAddr::from(([10, 0, 0, 1], 8080));
    let share = keys.iter().filter(|&&key| of(&heavier, Wish::Same(key)) == first).count();
    assert!((4900..5650).contains(&share), "{share} of 10000 rather than 10 of 19");
}

#[test]
fn who_is_marked_comes_back_while_they_are_fit() {
    let two = pools(&[(1, 1, true), (2, 1, true)]);
    let pool = two.get("web").unwrap();
    let as_marked = |mark, tried: &[SocketAddr], random| {
        pool.choose(Call { port: 80, random, wish: Wish::Marked(mark) }, tried).unwrap()
    };
    let mark = pool.choose(call(80, 7), &[]).unwrap();
    for random in numbers().take(100) {
        assert_eq!(as_marked(mark.mark, &[], random).address, mark.address);
        assert_ne!(as_marked(mark.mark, &[mark.address], random).address, mark.address);
    }
    let unknown: std::collections::HashSet<_> =
        numbers().take(100).map(|random| as_marked(1, &[], random).address).collect();
    assert_eq!(unknown.len(), 2, "a mark of nobody means anybody");
    // Another desk marks alike.
    let again = pools(&[(2, 5, true), (1, 1, true)]);
    let call = Call { port: 80, random: 3, wish: Wish::Marked(mark.mark) };
    assert_eq!(again.get("web").unwrap().choose(call, &[]).unwrap().address, mark.address);
}

#[test]
fn nobody_is_tried_twice_and_reasons_are_told() {
    let two = pools(&[(1, 1, true), (9, 1, true)]);
    let pool = two.get("web").unwrap();
    let first = pool.choose(call(443, 7), &[]).unwrap().address;
    let second = pool.choose(call(443, 7), &[first]).unwrap().address;
    assert_ne!(first, second);
    assert!([first, second].contains(&([10, 0, 0, 9], 443).into()), "the client's port, where none is named");
    assert_eq!(pool.choose(call(443, 7), &[first, second]).unwrap_err(), NoBackend::Tried);
    assert_eq!(pools(&[]).get("web").unwrap().choose(call(80, 7), &[]).unwrap_err(), NoBackend::Unfit);
    let mut orders = order(&[(1, 1, false)]);
    orders[0].backends[0].draining = true;
    let drained = Pools::ordered(&orders, &Files::new(), &Pools::default());
    assert_eq!(drained.get("web").unwrap().choose(call(80, 7), &[]).unwrap_err(), NoBackend::Drained);
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

#[tokio::test(start_paused = true)]
async fn who_fails_again_and_again_gets_a_pause_but_never_more_than_half() {
    let mut orders = order(&[(1, 1, true), (2, 1, true), (3, 1, true), (4, 1, false)]);
    orders[0].ejection = Some(Ejection { after: 3, pause: Duration::from_secs(10) });
    let pools = Pools::ordered(&orders, &Files::new(), &Pools::default());
    let pool = pools.get("web").unwrap();
    let of = |last: u8| -> SocketAddr { ([10, 0, 0, last], 8080).into() };
    let ticket = |last: u8| {
        let others: Vec<_> = (1..=3).filter(|&other| other != last).map(of).collect();
        pool.choose(call(80, 0), &others).unwrap()
    };
    let served = || {
        let taken = numbers().take(200).map(|random| pool.choose(call(80, random), &[]).unwrap().address);
        taken.collect::<std::collections::BTreeSet<_>>()
    };
    let (first, second) = (ticket(1), ticket(2));
    assert_eq!([false, false, true, false, false].map(|well| pool.note(&first, well)), [None; 5]);
    assert_eq!(served().len(), 3);
    assert_eq!(pool.note(&first, false), Some(Duration::from_secs(10)));
    assert_eq!(served(), [of(2), of(3)].into());
    // It is counted in what comes after, too; where all others have been tried it is asked.
    let pools = Pools::ordered(&orders, &Files::new(), &pools);
    let again = |tried: &[SocketAddr]| pools.get("web").unwrap().choose(call(80, 0), tried).unwrap().address;
    assert_eq!((again(&[of(2)]), again(&[of(3)]), again(&[of(2), of(3)])), (of(3), of(2), of(1)));
    // A second of three would be more than half.
    assert_eq!([(); 4].map(|()| pool.note(&second, false)), [None; 4]);
    // Whom it is waited for is not asked for by anybody else meanwhile; what was under way before does not count.
    assert_eq!(pool.note(&first, true), None);
    assert_eq!(served(), [of(2), of(3)].into());
    tokio::time::advance(Duration::from_secs(10)).await;
    assert_eq!(served().len(), 3);
    assert_eq!(
        [false; 3].map(|well| pool.note(&first, well))[2],
        Some(Duration::from_secs(20)),
        "twice as long"
    );
    tokio::time::advance(Duration::from_secs(20)).await;
    assert_eq!(pool.note(&first, true), None);
    assert_eq!(
        [false; 3].map(|well| pool.note(&first, well))[2],
        Some(Duration::from_secs(10)),
        "all is well again"
    );
    // Where only such are left, they are asked all the same.
    let mut orders = orders.clone();
    orders[0].backends.retain(|backend| SocketAddr::new(backend.address, 8080) == of(1));
    let alone = Pools::ordered(&orders, &Files::new(), &pools);
    assert_eq!(alone.get("web").unwrap().choose(call(80, 0), &[]).unwrap().address, of(1));
}

#[test]
fn who_goes_by_earlier_orders_does_not_come_to_who_is_usable_no_more() {
    let [one, two] = [1, 2].map(|last| SocketAddr::from(([10, 0, 0, last], 8080)));
    let chosen = |pools: &Pools, tried: &[SocketAddr]| -> Vec<Result<SocketAddr, NoBackend>> {
        let pool = pools.get("web").unwrap();
        numbers().take(50).map(|random| pool.choose(call(80, random), tried).map(|it| it.address)).collect()
    };
    let next = |backends: &[(u8, u16, bool)], before: &Pools| {
        Pools::ordered(&order(backends), &Files::new(), before)
    };
    let first = pools(&[(1, 1, true), (2, 1, true)]);
    let second = next(&[(1, 1, false), (2, 1, true)], &first);
    assert!(chosen(&first, &[]).contains(&Ok(one)), "the second is not in force yet");
    first.supersede(&second);
    assert_eq!(chosen(&first, &[]), [Ok(two); 50]);
    assert_eq!(chosen(&first, &[two]), [Err(NoBackend::Superseded); 50], "and not that all have been tried");
    assert_eq!(chosen(&second, &[]), [Ok(two); 50]);
    // It comes back for who goes by the third, at once and for ever.
    let third = next(&[(1, 1, true), (2, 1, false)], &second);
    assert_eq!(chosen(&third, &[]), [Ok(one); 50]);
    second.supersede(&third);
    assert_eq!(chosen(&third, &[]), [Ok(one); 50]);
    assert_eq!(chosen(&second, &[]), [Err(NoBackend::Superseded); 50]);
    // One that is taken out of the document is none, either.
    third.supersede(&next(&[(2, 1, true)], &third));
    assert_eq!(chosen(&third, &[]), [Err(NoBackend::Superseded); 50]);
}
