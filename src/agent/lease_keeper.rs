//! The lease keeper: a thread of its own, with its own runtime and its own connections, that nothing else can block. It renews
//! the record it was told to keep, counts D from before each sending, and moves the guardian's deadline. As soon as a renewal
//! is late, its second task asks the other members for promises (`promise_asker.rs`), which move the same deadline. What
//! counts for how long is `core::holding`'s.
//!
//! Both do so only while the decision loop and the guardian prove to be alive (protocol §3). An unknown answer extends
//! nothing. Two tasks; a panic in one of them ends the process, and the guardian fences.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tracing::{debug, info, warn};

use super::promise_asker::Asker;
use crate::core::holding::{Ask, Holding, Order};
use crate::core::lease::Timings;
use crate::core::names::ClusterName;
use crate::core::promise::{Answer, Lead, Promises};
use crate::core::records::{Key, LeaseRecord, Transaction, Write};
use crate::core::timeline::Term;
use crate::core::view::LeaseView;
use crate::core::{Lsn, MemberName, Moment};
use crate::ports::{Clock, Dcs, DcsError, DeadlinePage, Peers};

/// After a failed renewal the next try follows at once, but not in a spin.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
const GUARDIAN_PATIENCE: Duration = Duration::from_secs(2);

type Page = Option<Arc<dyn DeadlinePage>>;

/// Shared between the loop and the keeper's thread.
pub struct LeaseKeeper {
    orders: watch::Sender<Option<Order>>,
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) timings: Timings,
    held: Mutex<Held>,
    lease: watch::Sender<LeaseView>,
    /// Grows when promises suffice for the first time, or a higher term is heard of: the loop may be waiting for it.
    news: watch::Sender<u64>,
    /// A renewal failed, or what is to be asked changed.
    pub(super) ask: Notify,
    loop_alive: Mutex<Moment>,
    page: Mutex<Page>,
    hold_after: Mutex<Option<Duration>>,
    flushed: AtomicU64,
    renewals: AtomicU64,
    failures: AtomicU64,
}

#[derive(Default)]
struct Held {
    holding: Holding,
    /// What the page was told last.
    told: Option<(Term, Moment)>,
}

impl LeaseKeeper {
    /// Starts the thread. `dcs` and `peers` only make the keeper's own handles, on its own runtime.
    pub fn start(
        dcs: Arc<dyn Dcs>,
        peers: Arc<dyn Peers>,
        cluster: ClusterName,
        clock: Arc<dyn Clock>,
        timings: Timings,
    ) -> std::io::Result<LeaseKeeper> {
        let (keeper, renewer, asker) = LeaseKeeper::new(dcs, peers, cluster, clock, timings);
        std::thread::Builder::new().name("lease-keeper".to_owned()).spawn(move || {
            super::priority::raise();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => runtime.block_on(async {
                    tokio::join!(renewer.run(), asker.run());
                }),
                Err(error) => {
                    // Without a keeper this process must not look alive: the guardian fences at F.
                    tracing::error!(%error, "the lease keeper's runtime cannot be made");
                    std::process::abort();
                }
            }
        })?;
        Ok(keeper)
    }

    fn new(
        dcs: Arc<dyn Dcs>,
        peers: Arc<dyn Peers>,
        cluster: ClusterName,
        clock: Arc<dyn Clock>,
        timings: Timings,
    ) -> (LeaseKeeper, Renewer, Asker) {
        let (orders, orders_rx) = watch::channel(None);
        let shared = Arc::new(Shared {
            loop_alive: Mutex::new(clock.now()),
            clock,
            timings,
            held: Mutex::default(),
            lease: watch::Sender::new(LeaseView::None),
            news: watch::Sender::new(0),
            ask: Notify::new(),
            page: Mutex::new(None),
            hold_after: Mutex::new(None),
            flushed: AtomicU64::new(0),
            renewals: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        });
        let renewer = Renewer { dcs, orders: orders_rx, shared: shared.clone() };
        let asker = Asker { peers, cluster, shared: shared.clone() };
        (LeaseKeeper { orders, shared }, renewer, asker)
    }

    /// Renews `lease` against this revision of `leader` from now on.
    pub fn keep(&self, term: Term, leader_revision: i64) {
        self.order(|holding| holding.keep(term, leader_revision, None, false));
    }

    /// The same, for a record that became ours by a write that was sent at `sent`.
    pub fn keep_written(&self, term: Term, leader_revision: i64, sent: Moment, goes_on: bool) {
        self.order(|holding| holding.keep(term, leader_revision, Some(sent), goes_on));
    }

    /// The term goes on by promises alone until it is kept against a record again.
    pub fn hold_by_promises(&self, term: Term) {
        self.order(|holding| holding.hold_by_promises(term));
    }

    /// On what the term that is being kept rests, as the state file has it.
    pub fn rests_on(&self, lead: &Lead, system_identifier: Option<u64>) {
        self.order(|holding| holding.rests_on(lead, system_identifier));
    }

    pub fn drop_lease(&self) {
        self.order(|holding| *holding = Holding::default());
    }

    fn order(&self, change: impl FnOnce(&mut Holding)) {
        let mut held = lock(&self.shared.held);
        change(&mut held.holding);
        let order = held.holding.order();
        self.shared.publish(&mut held);
        drop(held);
        self.orders.send_if_modified(|present| std::mem::replace(present, order) != order);
        self.shared.ask.notify_one();
    }

    pub fn view(&self) -> LeaseView {
        self.shared.lease.borrow().clone()
    }

    pub fn promises(&self) -> Promises {
        lock(&self.shared.held).holding.promises(&self.shared.timings)
    }

    pub fn changes(&self) -> watch::Receiver<LeaseView> {
        self.shared.lease.subscribe()
    }

    pub fn news(&self) -> watch::Receiver<u64> {
        self.shared.news.subscribe()
    }

    /// The decision loop came round.
    pub fn loop_is_alive(&self, now: Moment) {
        *lock(&self.shared.loop_alive) = now;
    }

    pub fn use_page(&self, page: Page) {
        *lock(&self.shared.page) = page;
        // A page of another attachment has not heard of any deadline yet.
        lock(&self.shared.held).told = None;
    }

    /// In sync mode somebody may take over before the lease has run out: the gate passes nothing for longer than this after
    /// the sending of a renewal. `None`: until the guardian kills.
    pub fn hold_after(&self, span: Option<Duration>) {
        *lock(&self.shared.hold_after) = span;
    }

    /// The primary's flush position, published with the next heartbeat; 0: none.
    pub fn flushed(&self, lsn: Option<Lsn>) {
        self.shared.flushed.store(lsn.map(|l| l.0).unwrap_or(0), Ordering::Relaxed);
    }

    /// Renewals that succeeded and that failed since the start.
    pub fn counts(&self) -> (u64, u64) {
        (self.shared.renewals.load(Ordering::Relaxed), self.shared.failures.load(Ordering::Relaxed))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded values are plain data: a panic elsewhere leaves them whole.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Shared {
    /// Tells the guardian how long PostgreSQL may run, and the loop what is new.
    fn publish(&self, held: &mut Held) {
        let view = held.holding.view(&self.timings);
        if let (Some(term), Some(since)) = (view.term(), held.holding.since())
            && held.told != Some((term, since))
            && let Some(page) = lock(&self.page).as_ref()
        {
            page.extend(term, self.timings.kill_at(since));
            // What may be served moves on with the same word, renewal or promise.
            let hold_after = *lock(&self.hold_after);
            page.hold_from(term, hold_after.map_or(self.timings.kill_at(since), |span| since.plus(span)));
            held.told = Some((term, since));
        }
        self.lease.send_if_modified(|present| {
            let changed = *present != view;
            *present = view;
            changed
        });
    }

    fn may_act(&self, now: Moment) -> Result<(), &'static str> {
        if now.since(*lock(&self.loop_alive)) > self.timings.loop_patience() {
            return Err("the decision loop does not come round");
        }
        match lock(&self.page).as_ref() {
            None => Err("no guardian is attached"),
            Some(page) if now.since(page.guardian_alive_at()) > GUARDIAN_PATIENCE => {
                Err("the guardian gives no sign of life")
            }
            Some(_) => Ok(()),
        }
    }

    /// Who is to be asked for promises now: nobody for a loop or with a guardian that is not alive.
    pub(super) fn whom_to_ask(&self) -> Ask {
        let now = self.clock.now();
        let mut held = lock(&self.held);
        // Looked at before anything is counted: a leader that needs nobody holds by asking nobody.
        if let Err(why) = self.may_act(now) {
            debug!(why, "no promises are asked for");
            return Ask::At(now.plus(RETRY_PAUSE));
        }
        let asked_before = held.holding.promises(&self.timings).since;
        let enough_before = held.holding.enough(now);
        let ask = held.holding.whom_to_ask(&self.timings, now);
        match (&ask, asked_before) {
            (Ask::Now { promise, .. }, None) => info!(term = %promise.term, "renewals are late: asking for promises"),
            (Ask::At(_), Some(_)) => info!("renewals go on: nobody is asked for promises any more"),
            _ => {}
        }
        self.publish(&mut held);
        if held.holding.enough(now) != enough_before {
            self.tell_loop();
        }
        ask
    }

    /// Takes in an answer to a question about `term`.
    pub(super) fn answered(&self, term: Term, member: MemberName, answer: Answer) {
        let now = self.clock.now();
        let mut held = lock(&self.held);
        let before = (held.holding.enough(now), held.holding.promises(&self.timings).higher_term());
        held.holding.answered(term, member, answer, now);
        let after = (held.holding.enough(now), held.holding.promises(&self.timings).higher_term());
        if let (None, Some(higher)) = (before.1, after.1) {
            warn!(%term, %higher, "a member knows a higher term");
        }
        self.publish(&mut held);
        if before != after {
            self.tell_loop();
        }
    }

    fn tell_loop(&self) {
        self.news.send_modify(|n| *n += 1);
    }

    /// How soon to ask again after a round that began at `began`: a heartbeat after it, or soon while too few have promised.
    pub(super) fn pause_after(&self, began: Moment) -> Duration {
        let now = self.clock.now();
        let left = self.timings.heartbeat.saturating_sub(now.since(began));
        if lock(&self.held).holding.enough(now) { left } else { left.min(RETRY_PAUSE) }
    }
}

struct Renewer {
    dcs: Arc<dyn Dcs>,
    orders: watch::Receiver<Option<Order>>,
    shared: Arc<Shared>,
}

impl Renewer {
    async fn run(mut self) {
        let store = loop {
            match self.dcs.separate().await {
                Ok(store) => break store,
                Err(error) => {
                    warn!(%error, "lease keeper: open its own connections");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        };
        // Only has to differ from what this member wrote before under the same term.
        let mut seq = self.shared.clock.unix_ms();
        loop {
            let order = *self.orders.borrow_and_update();
            let revision = order.and_then(|order| order.leader_revision);
            let (Some(order), Some(revision)) = (order, revision) else {
                if self.orders.changed().await.is_err() {
                    return;
                }
                continue;
            };
            seq += 1;
            let pause = self.renew(store.as_ref(), order, revision, seq).await;
            tokio::select! {
                // changed() is cancel-safe; a new order is taken up at once.
                changed = self.orders.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One renewal; returns how long to wait before the next.
    async fn renew(&self, store: &dyn Dcs, order: Order, leader_revision: i64, seq: u64) -> Duration {
        let shared = &self.shared;
        let sent = shared.clock.now();
        if let Err(why) = shared.may_act(sent) {
            warn!(term = %order.term, why, "lease not renewed");
            shared.failures.fetch_add(1, Ordering::Relaxed);
            return RETRY_PAUSE;
        }
        let lsn = match shared.flushed.load(Ordering::Relaxed) {
            0 => None,
            lsn => Some(Lsn(lsn)),
        };
        let transaction = Transaction::when(Key::Leader, leader_revision).put(Write::Lease(LeaseRecord {
            term: order.term,
            seq,
            lsn,
        }));
        let answer = store.commit(&transaction, shared.timings.renewal_timeout).await;
        // Held until the end: an order that was given meanwhile is not answered with the outcome of the one before (a lease
        // that was dropped would come back for a moment, one kept against a new revision would seem lost).
        let mut held = lock(&shared.held);
        if held.holding.order() != Some(order) {
            return Duration::ZERO;
        }
        let counter = if answer.is_ok() { &shared.renewals } else { &shared.failures };
        counter.fetch_add(1, Ordering::Relaxed);
        let pause = match answer {
            Ok(_) => {
                held.holding.renewed(sent);
                debug!(term = %order.term, seq, "lease renewed");
                shared.timings.heartbeat.saturating_sub(shared.clock.now().since(sent))
            }
            Err(DcsError::Conflict { .. }) => {
                if held.holding.conflict() {
                    info!(term = %order.term, "lease lost: the leader record changed");
                }
                shared.timings.heartbeat
            }
            Err(error) => {
                warn!(term = %order.term, %error, "renew lease");
                held.holding.failed();
                RETRY_PAUSE
            }
        };
        shared.publish(&mut held);
        shared.ask.notify_one();
        pause
    }
}

#[cfg(test)]
mod tests;
