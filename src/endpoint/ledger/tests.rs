use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::future::join_all;

use super::*;

fn session<'a>(name: &'a str, last: u8) -> Session<'a> {
    Session {
        certificate: None,
        router: None,
        address: Some(IpAddr::from([10, 0, 0, last])),
        user: "maas",
        database: "maasdb",
        application_name: name,
    }
}

/// Known by certificate.
fn of(name: &str) -> Session<'_> {
    Session { certificate: Some(name), ..session("", 1) }
}

fn region(id: &str) -> Consumer {
    Consumer {
        id: ConsumerId(id.into()),
        class: Class::Region,
        guaranteed: None,
        limit: None,
        addresses: Vec::new(),
        users: Vec::new(),
        application_names: Vec::new(),
    }
}

fn ledger(places: u32, consumers: &[&str]) -> Ledger {
    let ledger = Ledger::new(places, Patience::default());
    ledger.set_terms(places, consumers.iter().map(|id| region(id)).collect());
    ledger
}

async fn admit(ledger: &Ledger, name: &str) -> Result<Place, Refusal> {
    ledger.admit(&of(name), |_| ()).await
}

async fn fill(ledger: &Ledger, name: &str, many: usize) -> Vec<Place> {
    let places = join_all((0..many).map(|_| admit(ledger, name))).await;
    places.into_iter().map(Result::unwrap).collect()
}

#[tokio::test(start_paused = true)]
async fn a_place_comes_back_when_it_is_dropped() {
    let ledger = ledger(2, &[]);
    let places = fill(&ledger, "a", 2).await;
    assert_eq!(ledger.sums(), (2, 2));
    let began = Instant::now();
    let (third, ()) = tokio::join!(admit(&ledger, "b"), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(places);
    });
    assert_eq!(began.elapsed(), Duration::from_secs(1));
    assert_eq!(third.unwrap().consumer().0, "b");
    assert_eq!(ledger.sums(), (0, 2));
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_is_told_so_and_at_the_end_with_the_numbers() {
    let ledger = ledger(93, &["a", "b"]);
    let _places = fill(&ledger, "a", 53).await;
    let began = Instant::now();
    let mut noticed = None;
    let refusal =
        ledger.admit(&of("a"), |numbers| noticed = Some((began.elapsed(), numbers.clone()))).await.unwrap_err();
    let (after, numbers) = noticed.unwrap();
    assert_eq!((after, numbers.used, numbers.waiting), (Duration::from_secs(2), 53, 1));
    assert_eq!(began.elapsed(), Duration::from_secs(15));
    assert_eq!((refusal.sqlstate, refusal.message.as_str()), ("53300", "too many connections for \"a\""));
    assert_eq!(
        refusal.detail.unwrap(),
        "used 53, guaranteed 40, no limit, waiting 1; 53 of 93 places in use by all; waited 15.0 s"
    );
    assert!(refusal.hint.unwrap().contains("num_workers"));
    // Meanwhile the other region finds all that it was promised.
    fill(&ledger, "b", 40).await;
    assert_eq!(began.elapsed(), Duration::from_secs(15), "without waiting");
    assert_eq!(ledger.standings()[0].refused, 1);
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_one_region_does_not_delay_the_other() {
    let ledger = ledger(93, &["a", "b"]);
    let storm = tokio::spawn({
        let ledger = ledger.clone();
        async move { join_all((0..400).map(|_| admit(&ledger, "a"))).await }
    });
    tokio::task::yield_now().await;
    let began = Instant::now();
    let places = fill(&ledger, "b", 40).await;
    assert_eq!(began.elapsed(), Duration::ZERO);
    let refused = storm.await.unwrap().iter().filter(|r| r.is_err()).count();
    assert_eq!((refused, began.elapsed()), (347, Duration::from_secs(15)));
    drop(places);
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_the_queue_holds_nobody_up() {
    let ledger = ledger(1, &[]);
    let place = admit(&ledger, "a").await.unwrap();
    let impatient = tokio::spawn({
        let ledger = ledger.clone();
        async move { admit(&ledger, "b").await.map(drop) }
    });
    let patient = tokio::spawn({
        let ledger = ledger.clone();
        async move { admit(&ledger, "b").await.map(drop) }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    impatient.abort();
    let _ = impatient.await;
    drop(place);
    patient.await.unwrap().unwrap();
    assert_eq!(ledger.sums().0, 0);
}

/// Granted, and dropped before it was looked at: the place is in the channel.
#[tokio::test(start_paused = true)]
async fn a_place_on_its_way_to_nobody_comes_back() {
    let ledger = ledger(1, &[]);
    let place = admit(&ledger, "a").await.unwrap();
    let who = of("b");
    let mut waiting = Box::pin(ledger.admit(&who, |_| ()));
    assert!(futures_util::poll!(&mut waiting).is_pending());
    drop(place);
    assert_eq!(ledger.sums().0, 1, "it is on its way");
    drop(waiting);
    assert_eq!(ledger.sums().0, 0);
    assert!(admit(&ledger, "c").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn after_an_opening_backends_are_opened_at_a_bounded_rate() {
    let ledger = ledger(400, &["a", "b"]);
    let settling = tokio::spawn({
        let ledger = ledger.clone();
        async move { ledger.settle().await }
    });
    tokio::task::yield_now().await;
    let began = Instant::now();
    let inside = Arc::new(AtomicU32::new(0));
    let storm = tokio::spawn({
        let (ledger, inside) = (ledger.clone(), inside.clone());
        async move {
            let enter = async |name| {
                let place = admit(&ledger, name).await.unwrap();
                inside.fetch_add(1, Ordering::SeqCst);
                place
            };
            join_all((0..300).map(|n| enter(if n % 2 == 0 { "a" } else { "b" }))).await
        }
    });
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(inside.load(Ordering::SeqCst), 50);
    tokio::time::sleep(Duration::from_millis(499)).await;
    let half = inside.load(Ordering::SeqCst);
    assert!((165..=176).contains(&half), "{half} after half a second");
    let places = storm.await.unwrap();
    let took = began.elapsed();
    assert!((Duration::from_millis(990)..Duration::from_millis(1050)).contains(&took), "{took:?}");
    settling.await.unwrap();
    drop(places);
    let began = Instant::now();
    fill(&ledger, "a", 300).await;
    assert_eq!(began.elapsed(), Duration::ZERO, "settled");
}

#[tokio::test(start_paused = true)]
async fn regions_that_name_themselves_are_promised_places_after_those_that_are_registered() {
    let ledger = ledger(93, &["registered"]);
    let name = |n: usize| format!("maas-regiond-r{n}");
    let mut places = Vec::new();
    for n in 0..20 {
        let name = name(n);
        places.push(ledger.admit(&session(&name, 100 + n as u8), |_| ()).await);
    }
    let standings = ledger.standings();
    let promised =
        |id: &str| standings.iter().find(|s| s.consumer.0 == id).map(|s| (s.promise.granted, s.promise.pending));
    assert_eq!(promised("registered"), Some((40, 0)));
    assert_eq!(promised("region:r0"), Some((40, 0)));
    assert_eq!(promised("region:r1"), Some((8, 32)), "pending until max_connections is raised");
    assert_eq!(promised("region:r2"), Some((0, 40)));
    let inside = places.iter().filter(|place| place.is_ok()).count();
    assert_eq!(inside, 2 + 5, "those who were promised something, and five of the others");
    let promising = standings.iter().filter(|s| s.promise.granted + s.promise.pending > 0).count();
    assert!(promising <= 1 + MOST_UNREGISTERED, "{promising}");
}

/// 10⁵ comings and goings of all kinds, on several threads: at the end every place is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_ledger_is_exact_after_a_hundred_thousand_sessions() {
    const TASKS: u64 = 40;
    const CYCLES: u64 = 2_500;
    let patience =
        Patience { notice: Duration::from_millis(1), deadline: Duration::from_millis(3), ..Patience::default() };
    let ledger = Ledger::new(20, patience);
    ledger.set_terms(20, ["a", "b"].map(|id| Consumer { guaranteed: Some(6), ..region(id) }).to_vec());
    let outcomes: Arc<[AtomicU32; 3]> = Arc::default();
    let mut tasks = Vec::new();
    for task in 0..TASKS {
        let (ledger, outcomes) = (ledger.clone(), outcomes.clone());
        tasks.push(tokio::spawn(async move {
            let mut seed = task * 7919 + 1;
            for _ in 0..CYCLES {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let random = (seed >> 33) as usize;
                let name = ["a", "b", "c", "d"][random % 4];
                let who = of(name);
                let admit = ledger.admit(&who, |_| ());
                // Some are dropped while they wait, some just after they were let in.
                let impatient = tokio::time::timeout(Duration::from_micros((random % 400) as u64), admit);
                let outcome = if random.is_multiple_of(3) {
                    impatient.await.ok()
                } else {
                    Some(ledger.admit(&who, |_| ()).await)
                };
                let (used, places) = ledger.sums();
                assert!(used <= places, "{used} of {places}");
                match outcome {
                    Some(Ok(place)) => {
                        outcomes[0].fetch_add(1, Ordering::Relaxed);
                        if random.is_multiple_of(5) {
                            tokio::task::yield_now().await;
                        }
                        drop(place);
                    }
                    Some(Err(_)) => drop(outcomes[1].fetch_add(1, Ordering::Relaxed)),
                    None => drop(outcomes[2].fetch_add(1, Ordering::Relaxed)),
                }
            }
        }));
    }
    join_all(tasks).await.into_iter().for_each(Result::unwrap);
    let outcomes = outcomes.each_ref().map(|n| n.load(Ordering::Relaxed));
    assert_eq!(outcomes.iter().sum::<u32>() as u64, TASKS * CYCLES);
    assert!(outcomes[0] > 1000 && outcomes[2] > 100, "in, refused, gone: {outcomes:?}");
    assert_eq!(ledger.sums(), (0, 20));
    assert!(ledger.standings().iter().all(|s| (s.used, s.waiting) == (0, 0)), "{:?}", ledger.standings());
    assert!(ledger.shared.lock().waiting.is_empty());
    fill(&ledger, "d", 8).await;
}
