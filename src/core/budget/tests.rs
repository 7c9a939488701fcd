use proptest::prelude::*;

use super::*;

fn id(name: &str) -> ConsumerId {
    ConsumerId(name.to_owned())
}

fn share(guaranteed: u32) -> Share {
    Share { guaranteed, limit: None }
}

fn book(places: u32, shares: &[(&str, Share)]) -> Book {
    let mut book = Book::new(places);
    let shares: Vec<_> = shares.iter().map(|(name, share)| (id(name), *share)).collect();
    book.set_terms(places, &shares);
    book
}

/// So many arrive; how many come in at once.
fn arrive(book: &mut Book, name: &str, many: usize) -> usize {
    for _ in 0..many {
        book.arrive(&id(name)).unwrap();
    }
    book.grant(usize::MAX).len()
}

fn used(book: &Book, name: &str) -> u32 {
    book.numbers(&id(name)).used
}

#[test]
fn the_rule_of_maas() {
    assert_eq!([0, 1, 2, 3, 4, 10].map(maas_max_connections), [100, 100, 100, 140, 180, 420]);
    assert_eq!(Capacity { max_connections: 100, reserved: 3, agent: 4 }.places(), 93);
    assert_eq!(Capacity { max_connections: 5, reserved: 3, agent: 4 }.places(), 0);
    assert!(Capacity { max_connections: 100, reserved: 3, agent: 4 }.places() >= 2 * PER_REGION);
}

#[test]
fn more_is_never_promised_than_there_is() {
    let granted = promises(93, [40, 40, 40, 40]).iter().map(|p| (p.granted, p.pending)).collect::<Vec<_>>();
    assert_eq!(granted, [(40, 0), (40, 0), (13, 27), (0, 40)]);
}

#[test]
fn a_region_finds_its_guaranteed_places_whatever_another_takes() {
    let mut book = book(93, &[("a", share(40)), ("b", share(40))]);
    assert_eq!(arrive(&mut book, "a", 400), 53, "40 of its own and 13 that nobody was promised");
    assert_eq!(arrive(&mut book, "b", 40), 40);
    assert_eq!(arrive(&mut book, "b", 1), 0);
    assert_eq!((book.used(), book.waiting()), (93, 348));
}

#[test]
fn a_few_places_are_promised_to_nobody() {
    let mut book = book(93, &[("a", share(40)), ("b", share(40)), ("c", share(40))]);
    let c = book.standings()[2].promise;
    assert_eq!(c, Promise { granted: 8, pending: 32 });
    assert_eq!(arrive(&mut book, "a", 100), 45);
    assert_eq!(arrive(&mut book, "psql", 1), 0, "who has least of what is over gets the next one");
    book.release(&id("a"));
    assert_eq!(book.grant(9)[0].0, id("psql"));
}

#[test]
fn what_is_over_goes_to_who_has_least_of_it() {
    let mut book = book(13, &[("a", share(4)), ("b", share(4)), ("c", share(0))]);
    for name in ["a", "b", "c"] {
        for _ in 0..20 {
            book.arrive(&id(name)).unwrap();
        }
    }
    book.grant(usize::MAX);
    assert_eq!(["a", "b", "c"].map(|name| used(&book, name)), [6, 6, 1], "5 over 8: the first of each in turn");
    // A place that comes back goes to who has least over its guarantee, not to who waits longest.
    book.release(&id("c"));
    let next: Vec<_> = book.grant(usize::MAX).into_iter().map(|(id, _)| id.0).collect();
    assert_eq!(next, ["c"]);
}

#[test]
fn within_a_consumer_it_goes_by_arrival() {
    let mut book = book(1, &[]);
    let first = book.arrive(&id("a")).unwrap();
    let second = book.arrive(&id("a")).unwrap();
    let third = book.arrive(&id("a")).unwrap();
    assert_eq!(book.grant(9), [(id("a"), first)]);
    assert!(book.cancel(&id("a"), second));
    assert!(!book.cancel(&id("a"), first), "it has a place");
    book.release(&id("a"));
    assert_eq!(book.grant(9), [(id("a"), third)]);
}

#[test]
fn a_limit_holds_although_places_are_free() {
    let mut book = book(100, &[("a", Share { guaranteed: 40, limit: Some(10) })]);
    assert_eq!(arrive(&mut book, "a", 50), 10);
    assert_eq!(arrive(&mut book, "b", 100), 90, "what a may not have is not promised to it");
}

#[test]
fn new_terms_take_no_place_away() {
    let mut book = book(10, &[]);
    assert_eq!(arrive(&mut book, "guest", 10), 10);
    book.set_terms(10, &[(id("a"), share(8))]);
    assert_eq!(arrive(&mut book, "a", 3), 0, "all places are in use");
    for _ in 0..3 {
        book.release(&id("guest"));
    }
    arrive(&mut book, "guest", 5);
    assert_eq!((used(&book, "a"), used(&book, "guest")), (3, 7), "the promised ones first");
    book.set_terms(4, &[(id("a"), share(8))]);
    assert_eq!(book.numbers(&id("a")).guaranteed, 4);
    assert_eq!(arrive(&mut book, "a", 1), 0);
}

#[test]
fn a_refusal_has_the_numbers_that_decided() {
    let mut book = book(2, &[("a", Share { guaranteed: 1, limit: Some(2) })]);
    arrive(&mut book, "b", 1);
    arrive(&mut book, "a", 1);
    let ticket = book.arrive(&id("a")).unwrap();
    let numbers = book.give_up(&id("a"), ticket).unwrap();
    let expected =
        Numbers { consumer: id("a"), used: 1, guaranteed: 1, limit: Some(2), waiting: 1, used_by_all: 2, places: 2 };
    assert_eq!(numbers, expected);
    assert_eq!(book.waiting(), 0);
    let standing = book.standings().into_iter().find(|s| s.consumer == id("a")).unwrap();
    assert_eq!((standing.refused, standing.high_water), (1, 1));
}

#[test]
fn a_queue_has_an_end() {
    let mut book = book(0, &[]);
    for _ in 0..MOST_WAITING {
        book.arrive(&id("a")).unwrap();
    }
    assert!(matches!(book.arrive(&id("a")), Err(Refusal::QueueFull(numbers)) if numbers.waiting == 1000));
    assert!(book.arrive(&id("b")).is_ok(), "each has a queue of its own");
}

#[test]
fn the_nameless_leave_nothing_behind() {
    let mut book = book(10, &[("a", share(4))]);
    for n in 0..100 {
        let guest = id(&format!("guest {n}"));
        book.arrive(&guest).unwrap();
        book.grant(9);
        book.release(&guest);
    }
    assert_eq!(book.standings().len(), 1);
}

#[test]
fn a_damper_lets_so_many_through_at_once_and_then_so_many_a_second() {
    let mut damper = Damper::new(200, 50, 0);
    assert_eq!(damper.ready(0), 50);
    damper.take(50);
    assert_eq!((damper.ready(0), damper.ready(4), damper.ready(5), damper.ready(105)), (0, 0, 1, 21));
    damper.take(21);
    assert_eq!(damper.ready(60_000), 50, "never more than a burst");
    assert_eq!(damper.ready(0), 50, "a clock that goes back adds nothing");
}

/// After a failover everybody is back at once: one by one from each, the oldest of each first.
#[test]
fn a_storm_is_served_fairly() {
    let mut book = book(93, &[("a", share(40)), ("b", share(40))]);
    for _ in 0..40 {
        book.arrive(&id("a")).unwrap();
    }
    for _ in 0..10 {
        book.arrive(&id("b")).unwrap();
    }
    let served: Vec<_> = book.grant(20).into_iter().map(|(id, _)| id.0).collect();
    assert_eq!(served.iter().filter(|name| *name == "b").count(), 10, "{served:?}");
}

#[derive(Clone, Debug)]
enum Act {
    Arrive(usize),
    Leave(usize),
    Cancel(usize),
    GiveUp(usize),
    Terms(u32, [u32; 3], Option<u32>),
    Grant(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0..5usize).prop_map(Act::Arrive),
        6 => any::<usize>().prop_map(Act::Leave),
        2 => any::<usize>().prop_map(Act::Cancel),
        1 => any::<usize>().prop_map(Act::GiveUp),
        1 => (0..30u32, any::<[u8; 3]>(), proptest::option::of(0..10u32))
            .prop_map(|(places, shares, limit)| Act::Terms(places, shares.map(|s| u32::from(s % 15)), limit)),
        6 => (0..4usize).prop_map(Act::Grant),
    ]
}

proptest! {
    /// Against a second account kept by hand: exact at every step, within the places, and nobody waits for nothing.
    #[test]
    fn the_book_is_exact(acts in prop::collection::vec(act(), 0..400)) {
        const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
        let mut book = Book::new(10);
        let mut inside: Vec<ConsumerId> = Vec::new();
        let mut waiting: Vec<(ConsumerId, Ticket)> = Vec::new();
        let mut shrunk = false;
        let mut limit_c = None;
        for act in acts {
            match act {
                Act::Arrive(who) => {
                    let ticket = book.arrive(&id(NAMES[who])).unwrap();
                    waiting.push((id(NAMES[who]), ticket));
                }
                Act::Leave(which) if !inside.is_empty() => {
                    let who = inside.swap_remove(which % inside.len());
                    book.release(&who);
                }
                Act::Cancel(which) if !waiting.is_empty() => {
                    let (who, ticket) = waiting.swap_remove(which % waiting.len());
                    prop_assert!(book.cancel(&who, ticket));
                    prop_assert!(!book.cancel(&who, ticket));
                }
                Act::GiveUp(which) if !waiting.is_empty() => {
                    let (who, ticket) = waiting.swap_remove(which % waiting.len());
                    prop_assert!(book.give_up(&who, ticket).is_some());
                    prop_assert!(book.give_up(&who, ticket).is_none());
                }
                Act::Terms(places, [a, b, c], limit) => {
                    book.set_terms(places, &[
                        (id("a"), share(a)),
                        (id("b"), share(b)),
                        (id("c"), Share { guaranteed: c, limit }),
                    ]);
                    limit_c = limit;
                    shrunk = true;
                }
                Act::Grant(most) => {
                    let before = book.used();
                    let granted = book.grant(most);
                    prop_assert!(granted.len() <= most);
                    prop_assert!(granted.is_empty() || book.used() <= book.places(), "{} of {}", book.used(), book.places());
                    prop_assert_eq!(book.used() as usize, before as usize + granted.len());
                    for (who, ticket) in granted {
                        let at = waiting.iter().position(|one| *one == (who.clone(), ticket));
                        prop_assert!(at.is_some(), "{who} was not waiting");
                        waiting.remove(at.unwrap());
                        let earlier = waiting.iter().any(|(other, t)| *other == who && *t < ticket);
                        prop_assert!(!earlier, "{who}: somebody came earlier");
                        inside.push(who);
                    }
                }
                Act::Leave(_) | Act::Cancel(_) | Act::GiveUp(_) => {}
            }
            prop_assert_eq!(book.used() as usize, inside.len());
            prop_assert_eq!(book.waiting(), waiting.len());
            let standings = book.standings();
            let promised: u32 = standings.iter().map(|s| s.promise.granted).sum();
            prop_assert!(promised <= book.places());
            for standing in &standings {
                let here = inside.iter().filter(|who| **who == standing.consumer).count();
                prop_assert_eq!(standing.used as usize, here);
            }
            let mut after = book.clone();
            after.grant(usize::MAX);
            let c = after.numbers(&id("c"));
            prop_assert!(limit_c.is_none_or(|limit| c.used <= limit.max(book.numbers(&id("c")).used)));
            // Nobody who is under his guarantee, or could have a place that nobody was promised, is left waiting.
            let burst: u32 = after.standings().iter().map(|s| s.used.saturating_sub(s.promise.granted)).sum();
            for s in after.standings().iter().filter(|s| s.waiting > 0) {
                let limited = s.limit.is_some_and(|limit| s.used >= limit);
                let full = after.used() >= after.places();
                let no_burst = s.used >= s.promise.granted && burst >= after.places() - promised;
                prop_assert!(limited || full || no_burst, "{s:?}");
                if !shrunk {
                    prop_assert!(s.used >= s.promise.granted, "kept waiting under its guarantee: {s:?}");
                }
            }
        }
    }
}
