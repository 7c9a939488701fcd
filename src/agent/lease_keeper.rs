//! The lease keeper: a thread of its own, with its own runtime and its own connections to the store, that nothing else can
//! block. It renews the record it was told to keep, counts D from before each sending, and moves the guardian's deadline.
//!
//! It renews only while the decision loop and the guardian prove to be alive (protocol §3). An unknown answer extends
//! nothing. One task; a panic in it ends the process, and the guardian fences.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::core::lease::Timings;
use crate::core::records::{Key, LeaseRecord, Transaction, Write};
use crate::core::timeline::Term;
use crate::core::view::LeaseView;
use crate::core::{Lsn, Moment};
use crate::ports::{Clock, Dcs, DcsError, DeadlinePage};

/// After a failed renewal the next try follows at once, but not in a spin.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// A loop that has not come round for so long is taken for dead. Every step in it has a deadline below this.
const LOOP_PATIENCE_HEARTBEATS: u32 = 5;
const GUARDIAN_PATIENCE: Duration = Duration::from_secs(2);

/// What is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Order {
    term: Term,
    leader_revision: i64,
}

type Page = Option<Arc<dyn DeadlinePage>>;

/// Shared between the loop and the keeper's thread.
pub struct LeaseKeeper {
    orders: watch::Sender<Option<Order>>,
    lease: watch::Receiver<LeaseView>,
    shared: Arc<Shared>,
}

struct Shared {
    loop_alive: Mutex<Moment>,
    page: Mutex<Page>,
    flushed: AtomicU64,
    renewals: AtomicU64,
    failures: AtomicU64,
}

impl LeaseKeeper {
    /// Starts the thread. `dcs` only makes the keeper's own handle, on its own runtime.
    pub fn start(dcs: Arc<dyn Dcs>, clock: Arc<dyn Clock>, timings: Timings) -> std::io::Result<LeaseKeeper> {
        let (keeper, task) = LeaseKeeper::new(dcs, clock, timings);
        std::thread::Builder::new().name("lease-keeper".to_owned()).spawn(move || {
            super::priority::raise();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => runtime.block_on(task.run()),
                Err(error) => {
                    // Without a keeper this process must not look alive: the guardian fences at F.
                    tracing::error!(%error, "the lease keeper's runtime cannot be made");
                    std::process::abort();
                }
            }
        })?;
        Ok(keeper)
    }

    fn new(dcs: Arc<dyn Dcs>, clock: Arc<dyn Clock>, timings: Timings) -> (LeaseKeeper, Task) {
        let (orders, orders_rx) = watch::channel(None);
        let (lease_tx, lease) = watch::channel(LeaseView::None);
        let shared = Arc::new(Shared {
            loop_alive: Mutex::new(clock.now()),
            page: Mutex::new(None),
            flushed: AtomicU64::new(0),
            renewals: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        });
        let task = Task { dcs, clock, timings, orders: orders_rx, lease: lease_tx, shared: shared.clone() };
        (LeaseKeeper { orders, lease, shared }, task)
    }

    /// Renews `lease` against this revision of `leader` from now on.
    pub fn keep(&self, term: Term, leader_revision: i64) {
        self.orders.send_replace(Some(Order { term, leader_revision }));
    }

    pub fn drop_lease(&self) {
        self.orders.send_replace(None);
    }

    pub fn view(&self) -> LeaseView {
        self.lease.borrow().clone()
    }

    pub fn changes(&self) -> watch::Receiver<LeaseView> {
        self.lease.clone()
    }

    /// The decision loop came round.
    pub fn loop_is_alive(&self, now: Moment) {
        *lock(&self.shared.loop_alive) = now;
    }

    pub fn use_page(&self, page: Page) {
        *lock(&self.shared.page) = page;
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The guarded values are plain data: a panic elsewhere leaves them whole.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Task {
    dcs: Arc<dyn Dcs>,
    clock: Arc<dyn Clock>,
    timings: Timings,
    orders: watch::Receiver<Option<Order>>,
    lease: watch::Sender<LeaseView>,
    shared: Arc<Shared>,
}

impl Task {
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
        let mut seq = self.clock.unix_ms();
        loop {
            let order = *self.orders.borrow_and_update();
            let Some(order) = order else {
                self.publish(LeaseView::None);
                if self.orders.changed().await.is_err() {
                    return;
                }
                continue;
            };
            if self.lease.borrow().term() != Some(order.term) {
                self.publish(LeaseView::Claimed { term: order.term });
            }
            seq += 1;
            let pause = self.renew(store.as_ref(), order, seq).await;
            tokio::select! {
                // changed() is cancel-safe; a new order is taken up at once.
                changed = self.orders.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One renewal; returns how long to wait before the next.
    async fn renew(&self, store: &dyn Dcs, order: Order, seq: u64) -> Duration {
        let sent = self.clock.now();
        if let Err(why) = self.may_renew(sent) {
            warn!(term = %order.term, why, "lease not renewed");
            self.shared.failures.fetch_add(1, Ordering::Relaxed);
            return RETRY_PAUSE;
        }
        let lsn = match self.shared.flushed.load(Ordering::Relaxed) {
            0 => None,
            lsn => Some(Lsn(lsn)),
        };
        let transaction = Transaction::when(Key::Leader, order.leader_revision).put(Write::Lease(LeaseRecord {
            term: order.term,
            seq,
            lsn,
        }));
        let answer = store.commit(&transaction, self.timings.renewal_timeout).await;
        // Held until the end: an order that was given meanwhile is not answered with the outcome of the one before (a lease
        // that was dropped would come back for a moment, one kept against a new revision would seem lost).
        let orders = self.orders.borrow();
        if *orders != Some(order) {
            return Duration::ZERO;
        }
        match answer {
            Ok(_) => {
                // Counted from before the sending (protocol §3).
                let deadline = self.timings.deadline(sent);
                if let Some(page) = lock(&self.shared.page).as_ref() {
                    page.extend(order.term, self.timings.kill_at(sent));
                    page.hold_from(order.term, self.timings.hold_at(sent));
                }
                self.publish(LeaseView::Held { term: order.term, deadline });
                self.shared.renewals.fetch_add(1, Ordering::Relaxed);
                debug!(term = %order.term, seq, "lease renewed");
                self.timings.heartbeat.saturating_sub(self.clock.now().since(sent))
            }
            Err(DcsError::Conflict { .. }) => {
                let deadline = match &*self.lease.borrow() {
                    LeaseView::Held { term, deadline } if *term == order.term => Some(*deadline),
                    LeaseView::Lost { term, deadline } if *term == order.term => *deadline,
                    _ => None,
                };
                if !matches!(&*self.lease.borrow(), LeaseView::Lost { .. }) {
                    info!(term = %order.term, "lease lost: the leader record changed");
                }
                self.publish(LeaseView::Lost { term: order.term, deadline });
                self.shared.failures.fetch_add(1, Ordering::Relaxed);
                self.timings.heartbeat
            }
            Err(error) => {
                self.shared.failures.fetch_add(1, Ordering::Relaxed);
                warn!(term = %order.term, %error, "renew lease");
                RETRY_PAUSE
            }
        }
    }

    fn may_renew(&self, now: Moment) -> Result<(), &'static str> {
        let patience = (self.timings.heartbeat * LOOP_PATIENCE_HEARTBEATS).max(Duration::from_secs(3));
        if now.since(*lock(&self.shared.loop_alive)) > patience {
            return Err("the decision loop does not come round");
        }
        match lock(&self.shared.page).as_ref() {
            None => Err("no guardian is attached"),
            Some(page) if now.since(page.guardian_alive_at()) > GUARDIAN_PATIENCE => {
                Err("the guardian gives no sign of life")
            }
            Some(_) => Ok(()),
        }
    }

    /// Tells the loop only what is new.
    fn publish(&self, view: LeaseView) {
        self.lease.send_if_modified(|present| {
            let changed = *present != view;
            *present = view;
            changed
        });
    }
}

#[cfg(test)]
mod tests;
