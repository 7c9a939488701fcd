//! `decide(&View) -> Plan`: the ordered list of rules. The first that has something to say decides.

use std::time::Duration;

use super::plan::{Plan, Step};
use super::promise::Lead;
use super::records::{LeaderState, SyncClaim, Write};
use super::rules::{
    Facts, bootstrap, electing, follow, identity, leader, reattach, sealing, stopping, storage, superseded, takeover,
    unknown, waiting,
};
use super::trust::Trust;
use super::view::View;
use super::{lint, publish, silence};

type Rule = fn(&View) -> Option<Plan>;

/// The order is a safety property: who must stop comes before who may wait, who may wait before who may act.
/// `tests/it/golden/rules.txt` pins it.
pub const RULES: &[(&str, Rule)] = &[
    // L1: whoever holds the term without being able to use its data says so before anything else keeps it waiting.
    ("unfit", leader::unfit),
    // S7: nothing is touched that is not ours.
    ("identity", identity::belongs),
    // S1, S4: a primary whose term is over dies, even in the middle of a job.
    ("superseded", superseded::rule),
    // L4: whoever cannot write hands over before anything waits for its disk, a job too.
    ("storage", storage::rule),
    // One long thing at a time; it sees no change of mind but the one above.
    ("job", waiting::job),
    // No guard, no start, no lease.
    ("guardian", waiting::guardian),
    // Told to stop: before anything new is begun.
    ("stopping", stopping::rule),
    // S12: not knowing.
    ("store", unknown::store),
    ("name", identity::unique),
    ("restored", identity::restored),
    ("lost", unknown::lost),
    // S10: the record is ours, so its lease is kept, whatever PostgreSQL says or does not say.
    ("lease", reattach::rule),
    ("local", unknown::local),
    // A cluster or a member that does not exist yet.
    ("create", bootstrap::create),
    ("join", bootstrap::join),
    // The record is ours: do what it says.
    ("electing", electing::rule),
    ("leader", leader::rule),
    // The record is somebody else's: give our word, take it over, or follow.
    ("sealing", sealing::rule),
    ("restart", waiting::restart),
    ("takeover", takeover::rule),
    ("follow", follow::rule),
];

/// Pure; equal views give equal plans; never fails, because not knowing is a fact with a rule.
pub fn decide(view: &View) -> Plan {
    let decided = RULES.iter().find_map(|(_, rule)| rule(view));
    let mut plan: Plan =
        decided.unwrap_or_else(|| Plan::new("idle", "nothing is to be done: no rule of the list has anything to say"));
    storage::remark(view, &mut plan);
    if let Some(at) = silence::look_again(view)
        && plan.wake.is_none_or(|wake| view.now.until(at) < view.now.until(wake))
    {
        plan.wake = Some(at);
    }
    // L1: what ends something must not wait for a state disk that may be full.
    let gives_up = plan.steps.iter().any(|step| matches!(step, Step::Kill | Step::DropLease));
    if !gives_up {
        let first = remember(view).into_iter().chain(remember_lead(view, &plan)).chain(end_promise(view));
        plan.steps.splice(0..0, first.collect::<Vec<_>>());
    }
    if !plan.rule.starts_with("identity.")
        && let Some(step) = publish::step(view, &plan)
    {
        // Telling the others comes before a job, which takes the rest of the steps with it.
        let at = plan.steps.iter().position(Step::is_job).unwrap_or(plan.steps.len());
        plan.steps.insert(at, step);
    }
    debug_assert_eq!(lint::violations(view, &plan), Vec::<String>::new(), "decide broke its own invariants");
    plan
}

/// The store's revision is taken down this often: whoever was down for longer than that sees that a backup is older.
const REVISION_TAKEN_DOWN: Duration = Duration::from_secs(10);

/// The state file learns of a higher term before anything is done about it, and what the store is.
fn remember(view: &View) -> Option<Step> {
    let facts = Facts::of(view)?;
    let durable = &view.memory.durable;
    let term = facts.leader.map(|l| l.value.term).unwrap_or_default();
    let sync = facts.records.sync.value().map(|s| s.term).unwrap_or_default();
    let (store_id, store_revision) = (facts.records.store_id, facts.records.revision);
    match facts.trust() {
        Trust::Lost { .. } => return (!durable.store_lost).then_some(Step::DistrustStore),
        Trust::MadeGood { .. } => {
            return Some(Step::AcceptStore { highest_term: term, highest_sync_term: sync, store_id, store_revision });
        }
        Trust::Right => {}
    }
    let (highest_term, highest_sync_term) = (term.max(durable.highest_term), sync.max(durable.highest_sync_term));
    let due = view.memory.remembered_at.is_none_or(|at| view.now.since(at) >= REVISION_TAKEN_DOWN);
    if (highest_term, highest_sync_term) == (durable.highest_term, durable.highest_sync_term)
        && durable.store_id != 0
        && !(due && store_revision > durable.store_revision)
    {
        return None;
    }
    let store_revision = store_revision.max(durable.store_revision);
    Some(Step::Remember { highest_term, highest_sync_term, store_id, store_revision })
}

/// A leader that says in the store that it is finished gives back what was promised to it.
fn end_promise(view: &View) -> Option<Step> {
    let facts = Facts::of(view)?;
    let bond = view.memory.bond.as_ref()?;
    let given_back = matches!(facts.trust(), Trust::Right) && bond.promise.given_back(facts.records);
    given_back.then(|| Step::EndPromise { to: bond.promise.to.clone(), term: bond.promise.term })
}

/// What a leader has to know of its term without the store: ahead of every write that changes it, and as little as is true
/// once the outcome of the last one is known.
fn remember_lead(view: &View, plan: &Plan) -> Option<Step> {
    let facts = Facts::of(view)?;
    let mine = facts.mine().filter(|l| l.value.state == LeaderState::Held)?;
    if !matches!(facts.trust(), Trust::Right) {
        return None;
    }
    let durable = &view.memory.durable;
    let known = durable.lead.as_ref().filter(|lead| lead.record.term == mine.value.term);
    // A record that was mended goes on with what was known under the term before.
    let carried = durable.lead.as_ref().filter(|lead| lead.record.holder == *facts.me() && lead.unconfirmed);
    let settled = view.memory.sync_settled && !view.memory.doubtful_sync;
    let mut claims: Vec<SyncClaim> = Vec::new();
    let mut add = |claim: &SyncClaim| {
        if !claims.contains(claim) {
            claims.push(claim.clone());
        }
    };
    facts.records.sync.value().into_iter().for_each(&mut add);
    if !settled || facts.records.sync.value().is_none() {
        known.into_iter().flat_map(|lead| &lead.claims).for_each(&mut add);
    }
    let mut membership = facts.records.membership.value().map(|m| m.members.clone()).unwrap_or_default();
    membership.extend(known.into_iter().flat_map(|lead| lead.membership.iter().cloned()));
    for write in plan.steps.iter().flat_map(Step::writes) {
        match write {
            Write::Sync(claim) => add(claim),
            Write::Membership(written) => membership.extend(written.members.iter().cloned()),
            _ => {}
        }
    }
    let mut timelines = facts.records.timelines.clone();
    timelines.extend(known.into_iter().flat_map(|lead| lead.timelines.clone()));
    let unconfirmed = known.or(carried).is_some_and(|lead| lead.unconfirmed)
        && !(view.promises.term == mine.value.term && view.promises.confirmed(facts.records.store_id));
    let lead = Lead { record: mine.value.clone(), claims, membership, timelines, unconfirmed };
    (known != Some(&lead)).then(|| Step::RememberLead { lead: Box::new(lead) })
}
