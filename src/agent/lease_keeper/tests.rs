//! The keeper's task under paused time, with the store in memory, a clock that stands until it is moved, and a page that
//! remembers what was written to it.

use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::*;
use crate::core::names::ClusterName;
use crate::core::records::ClusterRecords;
use crate::dcs::memory::{Fault, MemoryDcs, MemoryStore};

const TERM: Term = Term(4);

fn timings() -> Timings {
    Timings {
        heartbeat: Duration::from_secs(1),
        ttl: Duration::from_secs(8),
        kill_budget: Duration::from_secs(1),
        renewal_timeout: Duration::from_secs(2),
    }
}

/// Stands until it is moved.
struct Standing(Mutex<Moment>);

impl Standing {
    fn pass(&self, span: Duration) {
        let mut now = lock(&self.0);
        *now = now.plus(span);
    }
}

impl Clock for Standing {
    fn now(&self) -> Moment {
        *lock(&self.0)
    }

    fn unix_ms(&self) -> u64 {
        1_000
    }
}

/// The guardian's page; the guardian is alive at the time of the clock unless it was stopped.
struct FakePage {
    clock: Arc<Standing>,
    stopped: AtomicBool,
    alive: Mutex<Moment>,
    written: Mutex<Vec<(Term, Moment)>>,
    holds: Mutex<Vec<(Term, Moment)>>,
}

impl DeadlinePage for FakePage {
    fn extend(&self, term: Term, deadline: Moment) {
        lock(&self.written).push((term, deadline));
    }

    fn hold_from(&self, term: Term, at: Moment) {
        lock(&self.holds).push((term, at));
    }

    fn guardian_alive_at(&self) -> Moment {
        if !self.stopped.load(Ordering::Relaxed) {
            *lock(&self.alive) = self.clock.now();
        }
        *lock(&self.alive)
    }
}

/// The store in memory, seen over a way on which time passes and messages wait.
#[derive(Clone)]
struct Slow {
    inner: MemoryDcs,
    clock: Arc<Standing>,
    /// Passes on the clock between sending and answer.
    takes: Arc<Mutex<Duration>>,
    /// The answer of a commit waits for one of these.
    answers: Arc<Semaphore>,
}

#[async_trait]
impl Dcs for Slow {
    async fn read(&self, within: Duration) -> Result<ClusterRecords, DcsError> {
        self.inner.read(within).await
    }

    async fn commit(&self, transaction: &Transaction, within: Duration) -> Result<i64, DcsError> {
        let answer = self.inner.commit(transaction, within).await;
        self.clock.pass(*lock(&self.takes));
        self.answers.acquire().await.expect("never closed").forget();
        answer
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes()
    }

    async fn separate(&self) -> Result<Box<dyn Dcs>, DcsError> {
        Ok(Box::new(self.clone()))
    }
}

struct Bench {
    keeper: LeaseKeeper,
    store: MemoryStore,
    dcs: Slow,
    clock: Arc<Standing>,
    page: Arc<FakePage>,
    /// Revision of the leader record.
    revision: i64,
}

/// A keeper that runs and was told nothing yet; the loop and the guardian are alive.
fn bench() -> Bench {
    let clock = Arc::new(Standing(Mutex::new(Moment::at(1_000_000_000_000))));
    let store = MemoryStore::new(7);
    let inner = store.agent(&ClusterName::new("maas").unwrap());
    let revision = store.put("/pgvigil/maas/leader", "{}");
    let dcs = Slow {
        inner,
        clock: clock.clone(),
        takes: Arc::new(Mutex::new(Duration::ZERO)),
        answers: Arc::new(Semaphore::new(1_000_000)),
    };
    let (keeper, task) = LeaseKeeper::new(Arc::new(dcs.clone()), clock.clone(), timings());
    let page = Arc::new(FakePage {
        clock: clock.clone(),
        stopped: AtomicBool::new(false),
        alive: Mutex::new(clock.now()),
        written: Mutex::default(),
        holds: Mutex::default(),
    });
    keeper.use_page(Some(page.clone()));
    tokio::spawn(task.run());
    Bench { keeper, store, dcs, clock, page, revision }
}

impl Bench {
    /// Some of tokio's (paused) time: the keeper's timers and deadlines run out in it, the clock stands.
    async fn wait(&self, span: Duration) {
        tokio::time::sleep(span).await;
    }

    async fn held(&self) -> Moment {
        self.keeper.keep(TERM, self.revision);
        self.wait(Duration::from_millis(10)).await;
        match self.keeper.view() {
            LeaseView::Held { term: TERM, deadline } => deadline,
            other => panic!("not held: {other:?}"),
        }
    }

    fn lease(&self) -> Option<Vec<u8>> {
        self.store.value("/pgvigil/maas/lease")
    }

    fn written(&self) -> Vec<(Term, Moment)> {
        lock(&self.page.written).clone()
    }

    /// Nothing more is sent from now on.
    async fn sends_nothing(&self) {
        let (lease, written, view) = (self.lease(), self.written(), self.keeper.view());
        self.wait(Duration::from_secs(10)).await;
        assert_eq!((self.lease(), self.written(), self.keeper.view()), (lease, written, view));
    }
}

#[tokio::test(start_paused = true)]
async fn the_deadline_counts_from_before_the_sending() {
    let bench = bench();
    *lock(&bench.dcs.takes) = Duration::from_millis(300);
    let sent = bench.clock.now();
    assert_eq!(bench.held().await, sent.plus(Duration::from_secs(8)));
    assert_eq!(bench.written(), [(TERM, sent.plus(Duration::from_secs(7)))], "F is K before D");
    assert_eq!(
        *lock(&bench.page.holds),
        bench.written(),
        "nobody takes over before D: the gate need not hold before F"
    );
}

#[tokio::test(start_paused = true)]
async fn the_gate_holds_before_somebody_may_have_taken_over() {
    let bench = bench();
    bench.keeper.hold_after(Some(Duration::from_millis(1_960)));
    let sent = bench.clock.now();
    bench.held().await;
    assert_eq!(*lock(&bench.page.holds), [(TERM, sent.plus(Duration::from_millis(1_960)))]);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_answer_extends_nothing() {
    for fault in [Fault::LoseReply, Fault::Hang, Fault::Hold, Fault::Fail] {
        let bench = bench();
        let deadline = bench.held().await;
        let (written, lease) = (bench.written(), bench.lease());
        bench.clock.pass(Duration::from_secs(1));
        bench.keeper.loop_is_alive(bench.clock.now());
        bench.dcs.inner.next(fault, 1_000);
        bench.wait(Duration::from_secs(5)).await;
        assert_eq!(bench.keeper.view(), LeaseView::Held { term: TERM, deadline }, "{fault:?}");
        assert_eq!(bench.written(), written, "{fault:?}");
        assert_eq!(bench.lease() != lease, fault == Fault::LoseReply, "the store may know better, the keeper does not");
        assert!(bench.keeper.counts().1 > 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_changed_record_is_a_lost_lease_with_what_was_left_of_it() {
    let bench = bench();
    let deadline = bench.held().await;
    let written = bench.written();
    bench.store.put("/pgvigil/maas/leader", "{}");
    let lease = bench.lease();
    bench.wait(Duration::from_secs(3)).await;
    assert_eq!(bench.keeper.view(), LeaseView::Lost { term: TERM, deadline: Some(deadline) });
    assert_eq!((bench.written(), bench.lease()), (written, lease), "nothing is extended after the loss");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_never_held_is_lost_without_a_deadline() {
    let bench = bench();
    bench.keeper.keep(TERM, bench.revision + 1);
    bench.wait(Duration::from_millis(10)).await;
    assert_eq!(bench.keeper.view(), LeaseView::Lost { term: TERM, deadline: None });
}

#[tokio::test(start_paused = true)]
async fn nothing_is_renewed_for_a_loop_that_does_not_come_round() {
    let bench = bench();
    bench.held().await;
    bench.clock.pass(Duration::from_secs(6));
    bench.sends_nothing().await;
    bench.keeper.loop_is_alive(bench.clock.now());
    let before = bench.written().len();
    bench.wait(Duration::from_secs(2)).await;
    assert!(bench.written().len() > before, "it goes on when the loop does");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_renewed_without_a_living_guardian() {
    let bench = bench();
    bench.held().await;
    bench.page.stopped.store(true, Ordering::Relaxed);
    bench.clock.pass(Duration::from_millis(2_500));
    bench.keeper.loop_is_alive(bench.clock.now());
    bench.sends_nothing().await;
    bench.keeper.use_page(None);
    bench.sends_nothing().await;
}

#[tokio::test(start_paused = true)]
async fn no_guardian_no_lease() {
    let bench = bench();
    bench.keeper.use_page(None);
    bench.keeper.keep(TERM, bench.revision);
    bench.wait(Duration::from_millis(10)).await;
    bench.sends_nothing().await;
    assert_eq!(bench.lease(), None);
    assert_eq!(bench.keeper.view(), LeaseView::Claimed { term: TERM });
}

/// Everything that the keeper ever says, from now on.
fn listen(bench: &Bench) -> Arc<Mutex<Vec<LeaseView>>> {
    let said = Arc::new(Mutex::new(Vec::new()));
    let (place, mut changes) = (said.clone(), bench.keeper.changes());
    changes.mark_unchanged();
    tokio::spawn(async move {
        while changes.changed().await.is_ok() {
            lock(&place).push(changes.borrow_and_update().clone());
        }
    });
    said
}

#[tokio::test(start_paused = true)]
async fn the_outcome_of_a_replaced_order_is_not_published() {
    let bench = bench();
    bench.held().await;
    let said = listen(&bench);
    let written = bench.written();
    // The renewal is applied, its answer is under way; meanwhile the lease is dropped.
    bench.dcs.answers.forget_permits(1_000_000);
    bench.wait(Duration::from_secs(2)).await;
    bench.keeper.drop_lease();
    bench.clock.pass(Duration::from_secs(1));
    bench.dcs.answers.add_permits(1_000);
    bench.wait(Duration::from_secs(2)).await;
    assert_eq!(*lock(&said), [LeaseView::None]);
    assert_eq!(bench.written(), written);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_against_the_record_before_ours_does_not_lose_the_new_one() {
    let bench = bench();
    bench.held().await;
    let said = listen(&bench);
    bench.dcs.answers.forget_permits(1_000_000);
    // Our own write changes the record, the renewal under way finds it changed, and the new order is there before its answer.
    let revision = bench.store.put("/pgvigil/maas/leader", "{}");
    bench.wait(Duration::from_secs(2)).await;
    bench.keeper.keep(TERM, revision);
    bench.dcs.answers.add_permits(1_000);
    bench.wait(Duration::from_secs(3)).await;
    let said = lock(&said).clone();
    assert!(said.iter().all(|view| matches!(view, LeaseView::Held { .. })), "{said:?}");
}

#[tokio::test(start_paused = true)]
async fn a_new_term_begins_with_no_deadline() {
    let bench = bench();
    bench.held().await;
    let said = listen(&bench);
    bench.clock.pass(Duration::from_secs(1));
    bench.keeper.loop_is_alive(bench.clock.now());
    bench.keeper.keep(Term(5), bench.revision);
    bench.wait(Duration::from_millis(10)).await;
    let deadline = bench.clock.now().plus(Duration::from_secs(8));
    let last = lock(&said).last().cloned();
    assert_eq!(last, Some(LeaseView::Held { term: Term(5), deadline }));
    assert!(lock(&said).iter().all(|view| view.term() == Some(Term(5))));
}
