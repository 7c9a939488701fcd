//! By what the term is held, and until when: the lease keeper's state as a value. Renewals and promises move the same
//! deadline; each is counted from before it was sent, and the later one counts (protocol §3, §7).

use super::lease::Timings;
use super::names::{MemberId, MemberName};
use super::promise::{Answer, Lead, Promise, Promises};
use super::time::Moment;
use super::timeline::Term;
use super::view::LeaseView;

/// What is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    pub term: Term,
    /// `None`: the store is away or is not believed, there is nothing to renew against.
    pub leader_revision: Option<i64>,
    /// Renewals prove nothing: only promises move the deadline.
    pub promises_only: bool,
}

/// Whom promises are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rests {
    pub holder: MemberId,
    pub system_identifier: Option<u64>,
    pub unconfirmed: bool,
}

/// What is to be asked next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Nobody,
    /// Nothing is late before this.
    At(Moment),
    Now {
        promise: Promise,
        system_identifier: Option<u64>,
        members: Vec<MemberName>,
    },
}

#[derive(Clone, Debug, Default)]
pub struct Holding {
    order: Option<Order>,
    /// Sending of the last renewal that succeeded, or of the write that made the record ours.
    renewed: Option<Moment>,
    /// The last renewal failed.
    failing: bool,
    /// A renewal found another record.
    lost: bool,
    rests: Option<Rests>,
    promises: Promises,
    /// The sending that the promises held from at best. Never goes back: what was promised stands.
    promised: Option<Moment>,
}

impl Holding {
    // === What the loop orders ===

    /// Renews against this revision of `leader` from now on. `sent`: the record became ours by a write that was sent then,
    /// which is as good as a renewal. `goes_on`: it was ours before under a lower term, and what was promised for that bars
    /// every higher one too.
    pub fn keep(&mut self, term: Term, leader_revision: i64, sent: Option<Moment>, goes_on: bool) {
        let before = self.order.filter(|order| order.term == term || goes_on);
        if before.is_none() {
            *self = Holding::default();
        }
        self.promises.term = term;
        (self.lost, self.failing) = (false, false);
        // In a store that others may not have read yet a write proves as little as a renewal.
        if !self.unconfirmed() {
            self.renewed = later(self.renewed, sent);
        }
        self.order = Some(Order { term, leader_revision: Some(leader_revision), promises_only: false });
    }

    /// The term goes on by promises alone until it is kept against a record again.
    pub fn hold_by_promises(&mut self, term: Term) {
        let before = self.order.filter(|order| order.term == term);
        if before.is_none() {
            *self = Holding::default();
            self.promises.term = term;
        }
        let leader_revision = before.and_then(|order| order.leader_revision);
        self.order = Some(Order { term, leader_revision, promises_only: true });
    }

    /// On what the term that is being kept rests, as the state file has it.
    pub fn rests_on(&mut self, lead: &Lead, system_identifier: Option<u64>) {
        if self.order.is_none_or(|order| order.term != lead.record.term) {
            return;
        }
        let needs = lead.needs();
        if self.promises.needs != needs {
            // What was proved for another claim proves nothing for this one. The guardian's page does not go back: no claim
            // is changed while the deadline rests on promises.
            self.promises.needs = needs;
            self.promised = None;
        }
        let holder = lead.record.holder.clone();
        self.rests = Some(Rests { holder, system_identifier, unconfirmed: lead.unconfirmed });
    }

    // === What comes back ===

    pub fn order(&self) -> Option<Order> {
        self.order
    }

    /// A renewal that was sent at `sent` succeeded.
    pub fn renewed(&mut self, sent: Moment) {
        (self.failing, self.lost) = (false, false);
        let counts = self.order.is_some_and(|order| !order.promises_only) && !self.unconfirmed();
        if counts {
            self.renewed = later(self.renewed, Some(sent));
        }
    }

    /// A renewal found another record. True: that is news.
    pub fn conflict(&mut self) -> bool {
        !std::mem::replace(&mut self.lost, true)
    }

    /// A renewal has no answer, or a refusal.
    pub fn failed(&mut self) {
        self.failing = true;
    }

    /// Who is to be asked for promises now: as soon as a renewal has failed, or is not confirmed a quarter of a heartbeat
    /// after it was due (the gate of the endpoint waits for two seconds in all).
    pub fn whom_to_ask(&mut self, timings: &Timings, now: Moment) -> Ask {
        let (Some(order), Some(rests)) = (self.order, self.rests.clone()) else { return Ask::Nobody };
        let only = order.promises_only || rests.unconfirmed;
        if self.lost && !only || self.promises.higher_term().is_some() {
            // Somebody else's record stands there: it is for the loop to say what that means.
            return Ask::Nobody;
        }
        let due = self.renewed.map(|sent| sent.plus(timings.heartbeat * 5 / 4));
        let late = only || self.failing || due.is_some_and(|due| now.any_reached(due));
        if !late {
            if self.promises.since.take().is_some() {
                self.promises.answers.clear();
            }
            return due.map_or(Ask::Nobody, Ask::At);
        }
        self.promises.since.get_or_insert(now);
        // A leader that needs nobody holds from now on.
        self.count(now);
        let mut members: Vec<MemberName> = self.promises.needs.iter().flat_map(|n| n.from.keys().cloned()).collect();
        members.sort();
        members.dedup();
        // W, rounded up: as long as candidates wait for a lease of this length.
        let length = timings.candidate_wait(timings.ttl).as_nanos().div_ceil(1_000_000);
        let length_ms = u64::try_from(length).unwrap_or(u64::MAX);
        let promise = Promise { to: rests.holder, term: order.term, length_ms };
        Ask::Now { promise, system_identifier: rests.system_identifier, members }
    }

    /// Takes in an answer to a question about `term`.
    pub fn answered(&mut self, term: Term, member: MemberName, answer: Answer, now: Moment) {
        if self.order.is_none_or(|order| order.term != term) {
            return;
        }
        let before = self.promises.answers.remove(&member);
        self.promises.answers.insert(member, answer.after(before));
        // A holder that learns of a higher term asks no more and counts no more.
        if self.promises.higher_term().is_none() {
            self.count(now);
        }
    }

    fn count(&mut self, now: Moment) {
        self.promised = later(self.promised, self.promises.held_since(now));
    }

    // === What it amounts to ===

    /// Have enough promised by now?
    pub fn enough(&self, now: Moment) -> bool {
        self.promises.held_since(now).is_some()
    }

    fn unconfirmed(&self) -> bool {
        self.rests.as_ref().is_some_and(|rests| rests.unconfirmed)
    }

    /// The sending from which the term is held.
    pub fn since(&self) -> Option<Moment> {
        later(self.renewed, self.promised)
    }

    pub fn view(&self, timings: &Timings) -> LeaseView {
        let Some(Order { term, .. }) = self.order else { return LeaseView::None };
        let deadline = self.since().map(|at| timings.deadline(at));
        match (deadline, self.lost) {
            (deadline, true) => LeaseView::Lost { term, deadline },
            (Some(deadline), false) => LeaseView::Held { term, deadline },
            (None, false) => LeaseView::Claimed { term },
        }
    }

    pub fn promises(&self, timings: &Timings) -> Promises {
        let mut promises = self.promises.clone();
        let by_promises = self.promised.filter(|promised| later(self.renewed, Some(*promised)) != self.renewed);
        promises.until = by_promises.map(|at| timings.deadline(at));
        promises
    }
}

/// Two sendings of one machine: all its clocks agree which was later.
fn later(one: Option<Moment>, other: Option<Moment>) -> Option<Moment> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.latest(other)),
        (one, other) => one.or(other),
    }
}
