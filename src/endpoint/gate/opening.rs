//! May this session's bytes pass now? Asked before every write; the answer costs a few loads and three clock readings.
//!
//! ```text
//!            F of our term not reached on any clock, nobody has shut it
//!   Pass ◄──────────────────────────────────────────────────────────────► Hold   past the softer deadline of sync mode
//!     └──────────────► Shut (for good) ◄─────────────────────────────────────┘
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::guardian::now;
use crate::guardian::page::{GateWord, Page};
use crate::guardian::wire::Clocks;

/// While somebody waits for the end of a hold nothing else tells of it.
const LOOK: Duration = Duration::from_millis(1);
/// A page whose writer was stopped in the middle of a word.
const STUCK: Duration = Duration::from_millis(10);
/// The page of the agent before counts until its last F; more than two are never of use.
const PAGES: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    /// Not now: a renewal or a promise opens it again.
    Hold,
    /// Never again.
    Shut,
}

pub struct Opening {
    way: Way,
    shut: AtomicBool,
    /// Counts what waiting sessions have to look at.
    phase: watch::Sender<u64>,
    /// A session waits for the end of a hold.
    held: Notify,
}

/// Where sessions of this opening go.
enum Way {
    /// To the primary here, under this term: the deadline page rules.
    Primary { term: u64, pages: RwLock<Vec<Arc<Page>>> },
    /// To another member's gate, which knows its own deadline; or to the standby here, which has none.
    Other,
}

impl Opening {
    pub fn primary(term: u64, pages: Vec<Arc<Page>>) -> Opening {
        Opening::new(Way::Primary { term, pages: RwLock::new(pages) })
    }

    pub fn other() -> Opening {
        Opening::new(Way::Other)
    }

    fn new(way: Way) -> Opening {
        Opening { way, shut: AtomicBool::new(false), phase: watch::Sender::new(0), held: Notify::new() }
    }

    /// Changes when a session has to look again.
    pub fn phase(&self) -> watch::Receiver<u64> {
        self.phase.subscribe()
    }

    pub fn shut(&self) {
        self.shut.store(true, Ordering::Release);
        self.wake();
    }

    pub fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Acquire)
    }

    /// A new agent brought its own page; the one before still counts until its last deadline.
    pub fn add_page(&self, page: &Arc<Page>) {
        if let Way::Primary { pages, .. } = &self.way {
            let mut pages = pages.write().unwrap_or_else(PoisonError::into_inner);
            if pages.iter().any(|known| Arc::ptr_eq(known, page)) {
                return;
            }
            pages.push(page.clone());
            let surplus = pages.len().saturating_sub(PAGES);
            pages.drain(..surplus);
        }
        self.wake();
    }

    pub fn verdict(&self) -> Verdict {
        if self.is_shut() {
            return Verdict::Shut;
        }
        let verdict = match self.read() {
            None => return Verdict::Pass,
            Some(read) => read.verdict(now()),
        };
        if verdict == Verdict::Hold {
            self.held.notify_one();
        }
        verdict
    }

    fn read(&self) -> Option<Reading> {
        let Way::Primary { term, pages } = &self.way else { return None };
        let pages = pages.read().unwrap_or_else(PoisonError::into_inner);
        let mut reading = Reading::default();
        for page in pages.iter() {
            match page.deadline() {
                Some(deadline) if deadline.term == *term => {
                    reading.deadline = Some(latest(reading.deadline, deadline.at));
                }
                // The guardian counts for a later term: ours is over.
                Some(deadline) if deadline.term > *term => reading.over = true,
                Some(_) => {}
                None if page.is_new() => {}
                // Written just now, or by somebody who was stopped: not known at this moment.
                None => reading.unreadable = true,
            }
            match page.gate() {
                Some(GateWord::Shut { term: shut }) if shut >= *term => reading.over = true,
                Some(GateWord::HoldFrom { term: of, at }) if of == *term => {
                    reading.hold_from = Some(latest(reading.hold_from, at));
                }
                _ => {}
            }
        }
        Some(reading)
    }

    fn wake(&self) {
        self.phase.send_modify(|count| *count += 1);
    }

    /// Ends sessions that wait for nothing when the deadline comes, and wakes those that wait when a hold is over.
    /// Returns when it is shut. Run once for each opening of a primary; cancel-safe.
    pub async fn watch(&self) {
        let mut phase = self.phase();
        while !self.is_shut() {
            let Some(reading) = self.read() else { return };
            match reading.verdict(now()) {
                Verdict::Shut => self.shut(),
                Verdict::Hold => {
                    tokio::time::sleep(LOOK).await;
                    if self.verdict() != Verdict::Hold {
                        self.wake();
                    }
                }
                Verdict::Pass => {
                    // Not further than the softer deadline: a session that is held is woken from here.
                    let next = reading.next().map_or(STUCK, |at| Duration::from_nanos(now().until(at)));
                    // notified() keeps a permit for a session that was held just before; changed() tells of new pages.
                    tokio::select! {
                        () = tokio::time::sleep(next) => {}
                        () = self.held.notified() => self.wake_when_open().await,
                        _ = phase.changed() => {}
                    }
                }
            }
        }
    }

    /// A session found a hold that is over by now, or was seen by it alone.
    async fn wake_when_open(&self) {
        while self.read().is_some_and(|reading| reading.verdict(now()) == Verdict::Hold) {
            tokio::time::sleep(LOOK).await;
        }
        self.wake();
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Reading {
    deadline: Option<Clocks>,
    hold_from: Option<Clocks>,
    over: bool,
    unreadable: bool,
}

impl Reading {
    fn verdict(&self, now: Clocks) -> Verdict {
        match self.deadline {
            _ if self.over => Verdict::Shut,
            Some(deadline) if !now.any_reached(deadline) => match self.hold_from {
                Some(hold_from) if now.any_reached(hold_from) => Verdict::Hold,
                _ => Verdict::Pass,
            },
            // Unknown is not open, and not the end either: the next reading tells.
            _ if self.unreadable => Verdict::Hold,
            _ => Verdict::Shut,
        }
    }

    fn next(&self) -> Option<Clocks> {
        let deadline = self.deadline?;
        Some(match self.hold_from {
            Some(hold) if hold.within(deadline) => hold,
            _ => deadline,
        })
    }
}

fn latest(known: Option<Clocks>, other: Clocks) -> Clocks {
    let Some(known) = known else { return other };
    Clocks {
        raw: known.raw.max(other.raw),
        monotonic: known.monotonic.max(other.monotonic),
        boottime: known.boottime.max(other.boottime),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guardian::page::Deadline;

    const SECOND: u64 = 1_000_000_000;

    fn page(nonce: u64) -> Arc<Page> {
        Arc::new(Page::create(nonce).unwrap().0)
    }

    fn extend(page: &Page, term: u64, nanoseconds: u64) {
        page.write_deadline(Deadline { term, at: now().plus(nanoseconds) });
    }

    #[test]
    fn open_under_a_deadline_of_its_own_term_only() {
        let page = page(1);
        let opening = Opening::primary(4, vec![page.clone()]);
        extend(&page, 4, 10 * SECOND);
        assert_eq!(opening.verdict(), Verdict::Pass);
        extend(&page, 3, 10 * SECOND);
        assert_eq!(opening.verdict(), Verdict::Shut, "nobody keeps the lease of term 4 any more");
        extend(&page, 5, 10 * SECOND);
        assert_eq!(opening.verdict(), Verdict::Shut);
    }

    #[test]
    fn shut_when_any_clock_has_reached_the_deadline() {
        let page = page(1);
        let opening = Opening::primary(4, vec![page.clone()]);
        assert_eq!(Opening::primary(4, vec![]).verdict(), Verdict::Shut, "no page, no deadline");
        let mut at = now().plus(10 * SECOND);
        at.boottime = now().boottime;
        page.write_deadline(Deadline { term: 4, at });
        assert_eq!(opening.verdict(), Verdict::Shut);
    }

    #[test]
    fn held_past_the_softer_deadline_and_open_again_when_it_moves() {
        let page = page(1);
        let opening = Opening::primary(4, vec![page.clone()]);
        extend(&page, 4, 10 * SECOND);
        page.write_gate(GateWord::HoldFrom { term: 4, at: now() });
        assert_eq!(opening.verdict(), Verdict::Hold);
        page.write_gate(GateWord::HoldFrom { term: 4, at: now().plus(SECOND) });
        assert_eq!(opening.verdict(), Verdict::Pass);
        page.write_gate(GateWord::HoldFrom { term: 3, at: now() });
        assert_eq!(opening.verdict(), Verdict::Pass, "a word of another term");
    }

    #[test]
    fn the_agents_word_shuts_at_once() {
        let page = page(1);
        let opening = Opening::primary(4, vec![page.clone()]);
        extend(&page, 4, 10 * SECOND);
        page.write_gate(GateWord::Shut { term: 3 });
        assert_eq!(opening.verdict(), Verdict::Pass);
        page.write_gate(GateWord::Shut { term: 4 });
        assert_eq!(opening.verdict(), Verdict::Shut);
    }

    #[test]
    fn the_last_word_of_a_dead_agent_counts_beside_the_next_ones_page() {
        let (old, new) = (page(1), page(2));
        let opening = Opening::primary(4, vec![old.clone()]);
        extend(&old, 4, 10 * SECOND);
        opening.add_page(&new);
        assert_eq!(opening.verdict(), Verdict::Pass, "the new agent has not renewed yet");
        extend(&old, 4, 0);
        assert_eq!(opening.verdict(), Verdict::Shut, "nor did it before the last deadline");
        extend(&new, 4, 20 * SECOND);
        assert_eq!(opening.verdict(), Verdict::Pass);
    }

    #[tokio::test]
    async fn sessions_are_woken_at_the_deadline_and_at_the_end_of_a_hold() {
        let page = page(1);
        let opening = Arc::new(Opening::primary(4, vec![page.clone()]));
        extend(&page, 4, SECOND / 10);
        page.write_gate(GateWord::HoldFrom { term: 4, at: now() });
        let mut phase = opening.phase();
        let watching = tokio::spawn({
            let opening = opening.clone();
            async move { opening.watch().await }
        });
        assert_eq!(opening.verdict(), Verdict::Hold);
        page.write_gate(GateWord::HoldFrom { term: 4, at: now().plus(SECOND) });
        phase.changed().await.unwrap();
        assert_eq!(opening.verdict(), Verdict::Pass);
        watching.await.unwrap();
        assert!(opening.is_shut());
        assert!(phase.has_changed().unwrap());
    }
}
