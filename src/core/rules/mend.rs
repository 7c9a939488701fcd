//! The store lost what it said, or became another one: the sitting leader says it again (protocol §7). Its own primary runs
//! under a deadline that only it can move, so nobody knows better than it does; everybody else waits.

use std::collections::BTreeSet;

use super::Facts;
use crate::core::election::list;
use crate::core::plan::{Plan, Step};
use crate::core::records::{
    ClusterInit, Key, LeaderRecord, LeaderState, Membership, SyncClaim, TimelineReservation, Transaction, Write,
};
use crate::core::timeline::Term;
use crate::core::view::{GuardState, LeaseView, LocalPostgres};

/// Key `leader` was deleted, overwritten with garbage or rolled back in the right store: written again before D.
pub fn record(facts: &Facts<'_>) -> Plan {
    let held = match standing(facts) {
        Ok(held) => held,
        Err(why) => return over(format!("the leader record is gone and {why}")),
    };
    let term = next_term(facts, &held);
    let reason = format!(
        "the leader record was deleted, overwritten or rolled back while this member leads under term {}: writing it again as \
         term {term}",
        held.term
    );
    let transaction = again(facts, &held, term);
    Plan::new("leader.mend", reason).step(facts.commit("write the leader record again", transaction))
}

/// The whole store is lost. Only where nobody else can be elected is its leader the one who knows.
pub fn store(facts: &Facts<'_>, why: &str) -> Plan {
    let held = match standing(facts) {
        Ok(held) => held,
        Err(not) => return over(format!("the store is lost ({why}), and {not}")),
    };
    let hold = Step::HoldByPromises { term: held.term };
    let promises = &facts.view.promises;
    let promised = facts.view.memory.durable.lead.is_some()
        && promises.term == held.term
        && promises.until.is_some_and(|until| !facts.now().any_reached(until));
    if !promised {
        let missing: Vec<String> = promises.missing().iter().map(|(name, why)| format!("{name}: {why}")).collect();
        let waits = if missing.is_empty() { "asking for them".to_owned() } else { missing.join("; ") };
        return Plan::new(
            "leader.store_lost",
            format!(
                "the store is lost: {why}; this member leads under term {} and makes it good as soon as enough members promise \
                 that nobody else can: {waits}",
                held.term
            ),
        )
        .step(hold);
    }
    let term = next_term(facts, &held);
    let reason = format!(
        "the store is lost: {why}; this member leads under term {} by promises of {}: writing everything again as term {term}",
        held.term,
        list(promises.by())
    );
    let mut lead = facts.view.memory.durable.lead.clone();
    if let Some(lead) = lead.as_mut() {
        lead.unconfirmed = true;
    }
    let transaction = everything(facts, &held, term);
    Plan::new("leader.mend_store", reason)
        .step(hold)
        .steps(lead.map(|lead| Step::RememberLead { lead: Box::new(lead) }))
        .step(facts.commit("write everything again", transaction))
}

/// Key `init` is gone while we lead: nothing else depends on it but that no other cluster is created here.
pub fn init(facts: &Facts<'_>) -> Option<Plan> {
    let mine = facts.mine().filter(|l| l.value.state == LeaderState::Held)?;
    let system_identifier = facts.view.me.system_identifier?;
    let transaction = Transaction::when(Key::Leader, mine.revision)
        .and(Key::Init, facts.records.init.revision())
        .put(Write::Init(ClusterInit { system_identifier }));
    (facts.records.init.value().is_none() && facts.view.lease.valid(mine.value.term, facts.now())).then(|| {
        Plan::new("leader.mend_init", "the key `init` is gone or unreadable while this member leads: writing it again")
            .step(facts.commit("write `init` again", transaction))
    })
}

/// Our record, if we still are who it says: the guardian has not been told to kill, and will not before this is done.
fn standing(facts: &Facts<'_>) -> Result<LeaderRecord, String> {
    let view = facts.view;
    let armed = match &view.local.guard.state {
        GuardState::Running { armed, .. } => *armed,
        GuardState::Absent { .. } | GuardState::Idle { .. } | GuardState::Survivors { .. } => None,
    };
    let held = view.memory.held.as_ref().filter(|held| held.state == LeaderState::Held);
    let (term, deadline) = match &view.lease {
        LeaseView::Held { term, deadline } => (*term, Some(*deadline)),
        LeaseView::Lost { term, deadline } => (*term, *deadline),
        // No renewal was confirmed since the agent started or since the record was last written: then the guardian's word
        // counts. It was armed under this term, and while PostgreSQL runs, F has not passed.
        LeaseView::Claimed { .. } | LeaseView::None => {
            let held = held.filter(|held| armed.is_some() && view.memory.durable.highest_term <= held.term);
            return held.cloned().ok_or_else(|| "this member holds no lease".to_owned());
        }
    };
    let kill_at = deadline.map(|d| d.minus(view.policy.timings.kill_budget));
    match (kill_at, held.filter(|held| held.term == term)) {
        (Some(kill_at), Some(held)) if !view.now.any_reached(kill_at) => Ok(held.clone()),
        _ => Err("the lease is nearly over".to_owned()),
    }
}

fn over(why: String) -> Plan {
    Plan::new("superseded", why).step(Step::Kill).step(Step::DropLease)
}

fn next_term(facts: &Facts<'_>, held: &LeaderRecord) -> Term {
    facts.view.memory.durable.highest_term.max(held.term).next()
}

/// The record again, and what else is missing of the four keys without which nothing goes on.
fn again(facts: &Facts<'_>, held: &LeaderRecord, term: Term) -> Transaction {
    let records = facts.records;
    let mut transaction = leader(facts, held, term);
    if records.init.value().is_none() {
        transaction = init_again(facts, transaction);
    }
    if records.membership.value().is_none() {
        transaction = membership_again(facts, transaction, term);
    }
    if records.sync.value().is_none_or(|claim| claim.term > held.term || claim.primary != held.holder) {
        transaction = sync_again(facts, transaction, term);
    }
    timelines_again(facts, transaction)
}

/// A lost store's records are of the past: none of them is believed.
fn everything(facts: &Facts<'_>, held: &LeaderRecord, term: Term) -> Transaction {
    let transaction = init_again(facts, leader(facts, held, term));
    let transaction = sync_again(facts, membership_again(facts, transaction, term), term);
    timelines_again(facts, transaction)
}

fn leader(facts: &Facts<'_>, held: &LeaderRecord, term: Term) -> Transaction {
    let mut record = held.clone();
    record.term = term;
    record.store_id = facts.records.store_id;
    Transaction::when(Key::Leader, facts.records.leader.revision()).put(Write::Leader(record))
}

fn init_again(facts: &Facts<'_>, transaction: Transaction) -> Transaction {
    match facts.view.me.system_identifier {
        Some(system_identifier) => transaction
            .and(Key::Init, facts.records.init.revision())
            .put(Write::Init(ClusterInit { system_identifier })),
        None => transaction,
    }
}

fn membership_again(facts: &Facts<'_>, transaction: Transaction, term: Term) -> Transaction {
    let mut members = facts.view.memory.durable.lead.as_ref().map(|l| l.membership.clone()).unwrap_or_default();
    members.insert(facts.me().name.clone());
    transaction
        .and(Key::Membership, facts.records.membership.revision())
        .put(Write::Membership(Membership { term, members }))
}

/// The claim as it was known to stand. Where that is not known: the weakest there is, which is true whatever is in force
/// (S9), and strengthened by the next rounds.
fn sync_again(facts: &Facts<'_>, transaction: Transaction, term: Term) -> Transaction {
    let lead = facts.view.memory.durable.lead.as_ref();
    let known = lead.filter(|lead| lead.claims.len() == 1).and_then(|lead| lead.claims.first());
    let mut claim = known.cloned().unwrap_or(SyncClaim {
        mode: facts.view.policy.durability,
        primary: facts.me().clone(),
        members: BTreeSet::new(),
        k: 0,
        term,
    });
    claim.term = term;
    transaction.and(Key::Sync, facts.records.sync.revision()).put(Write::Sync(claim))
}

/// S6: numbers that were reserved stay reserved. What only PostgreSQL's own history knows is taken from there.
pub fn timelines_again(facts: &Facts<'_>, mut transaction: Transaction) -> Transaction {
    let mut known = facts.view.memory.durable.lead.as_ref().map(|l| l.timelines.clone()).unwrap_or_default();
    let own = match &facts.view.local.postgres {
        LocalPostgres::Primary(primary) => Some((primary.timeline, &primary.history)),
        LocalPostgres::Standby(standby) => Some((standby.timeline, &standby.history)),
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => None,
    };
    if let Some((timeline, history)) = own {
        let mut child = timeline;
        for entry in history.0.iter().rev() {
            let reservation =
                TimelineReservation { term: Term::default(), parent: entry.timeline, switch: entry.switch };
            known.entry(child).or_insert(reservation);
            child = entry.timeline;
        }
    }
    // The newest: a transaction has its limits, and nobody is promoted to an old number.
    for (number, reservation) in known.into_iter().rev().take(64) {
        let unreadable = facts.records.unreadable.contains_key(&format!("timelines/{number}"));
        if !facts.records.timelines.contains_key(&number) && !unreadable {
            transaction = transaction.and(Key::Timeline(number), 0).put(Write::Timeline(number, reservation));
        }
    }
    transaction
}
