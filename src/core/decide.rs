//! `decide(&View) -> Plan`: the ordered list of rules. The first that has something to say decides.

use super::plan::{Plan, Step};
use super::rules::{
    Facts, bootstrap, electing, follow, identity, leader, reattach, sealing, stopping, storage, superseded, takeover,
    unknown, waiting,
};
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
    ("older", unknown::older),
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
    if !gives_up && let Some(remember) = remember(view) {
        plan.steps.insert(0, remember);
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

/// The state file learns of a higher term before anything is done about it.
fn remember(view: &View) -> Option<Step> {
    let facts = Facts::of(view)?;
    let durable = &view.memory.durable;
    if durable.store_id != 0 && facts.records.store_id != durable.store_id {
        return None;
    }
    let term = facts.leader.map(|l| l.value.term).unwrap_or_default().max(durable.highest_term);
    let sync = facts.records.sync.value().map(|s| s.term).unwrap_or_default().max(durable.highest_sync_term);
    if term == durable.highest_term && sync == durable.highest_sync_term && durable.store_id != 0 {
        return None;
    }
    Some(Step::Remember {
        highest_term: term,
        highest_sync_term: sync,
        store_id: facts.records.store_id,
        store_revision: facts.records.revision.max(durable.store_revision),
    })
}
