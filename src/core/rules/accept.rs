//! The store is lost and no leader sits: a person says whose data are the cluster from now on (protocol §7), with the
//! position before their eyes. What others may have beyond it is lost, so nothing of this happens by itself.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Facts, mend, takeover};
use crate::core::plan::{Plan, Step};
use crate::core::records::{
    ClusterInit, Key, LeaderRecord, LeaderState, Membership, Operation, Outcome, Published, Request, Role, SyncClaim,
    Transaction, Write,
};
use crate::core::view::StandbyFacts;

/// How a person asks for it, for the reasons of a member that could be chosen.
pub fn words(facts: &Facts<'_>) -> String {
    match facts.view.local.postgres.standby() {
        Some(standby) => format!(
            "without one a person decides: `pgvigil accept-store {} --position {}@{}` for the data here",
            facts.me().name,
            standby.timeline,
            standby.replayed
        ),
        None => "without one a person decides: `pgvigil accept-store`, and `pgvigil explain` shows every position"
            .to_owned(),
    }
}

/// Nothing is lost: said to whoever asked.
pub fn not_needed(request: &Request) -> Plan {
    let message = "the store is believed: there is nothing to accept".to_owned();
    finish(request, Outcome::Refused { message: message.clone() }, message)
}

pub fn asked(facts: &Facts<'_>) -> Option<Plan> {
    let operation = facts.view.memory.operation.as_ref()?;
    let request = &facts.records.requests.get(&operation.id)?.value;
    let Operation::AcceptStore { timeline, position, .. } = &request.what else { return None };
    let refuse = |why: String| Some(finish(request, Outcome::Refused { message: why.clone() }, why));
    let Some(standby) = facts.view.local.postgres.standby() else {
        return refuse("PostgreSQL here does not run as a standby: its position is not known".to_owned());
    };
    if (standby.timeline, standby.replayed) != (*timeline, *position) {
        return refuse(format!(
            "this member stands at {}@{}, asked for was {timeline}@{position}: look again, then ask with what it has",
            standby.timeline, standby.replayed
        ));
    }
    if let Some(why) = somebody_sits(facts) {
        return refuse(why);
    }
    let ours = facts.view.me.system_identifier;
    if facts.records.init.value().is_some_and(|init| ours != Some(init.system_identifier)) {
        return refuse("the store holds another cluster".to_owned());
    }
    Some(accept(facts, request, standby))
}

/// Signs that a leader is there after all: it makes the store good by itself, and forcing past it would make two.
fn somebody_sits(facts: &Facts<'_>) -> Option<String> {
    let view = facts.view;
    if let Some(bond) = &view.memory.bond {
        return Some(format!("this member is bound by its promise to {}", bond.promise.to.name));
    }
    for (name, member) in facts.records.members.iter().filter(|(name, _)| **name != facts.me().name) {
        if facts.is_there(name) && member.value.role == Role::Primary {
            return Some(format!("{name} says that it is read-write: it makes the store good by itself"));
        }
        if facts.is_there(name) && takeover::is_bound(facts, name) {
            return Some(format!("{name} is bound by a promise to a leader that sits somewhere"));
        }
    }
    let record = facts.leader.map(|leader| &leader.value);
    let lives = record.filter(|r| matches!(r.state, LeaderState::Held | LeaderState::Electing { .. }))?;
    let wait = view.policy.timings.candidate_wait(Duration::from_millis(lives.ttl_ms));
    let silent = view.memory.silence.is_some_and(|s| view.now.all_reached(s.first_seen.plus(wait)));
    (!silent).then(|| format!("{} is not silent for {wait:?} yet: ask again then", lives.holder.name))
}

/// Everything again as of this member, released to it: the election that follows is its own, C = {it}.
fn accept(facts: &Facts<'_>, request: &Request, standby: &StandbyFacts) -> Plan {
    let view = facts.view;
    let records = facts.records;
    let remembered = records.members.values().map(|m| m.value.highest_term).max().unwrap_or_default();
    let said = records.leader().map(|l| l.term).unwrap_or_default();
    let term = view.memory.durable.highest_term.max(remembered).max(said).next();
    let left = standby.history.0.last();
    let why = format!("accepted by {} at {}@{}", request.asked_by, standby.timeline, standby.replayed);
    let record = LeaderRecord {
        holder: facts.me().clone(),
        boot_id: view.me.boot_id.clone(),
        term,
        state: LeaderState::Released { to: Some(facts.me().name.clone()), why: why.clone() },
        ttl_ms: view.policy.timings.ttl.as_millis() as u64,
        takeover_ms: view.policy.takeover.after.as_millis() as u64,
        taken: None,
        lsn: None,
        last: Some(Published {
            member: facts.me().clone(),
            term: view.memory.durable.highest_term,
            timeline: standby.timeline,
            parent: left.map(|entry| entry.timeline),
            switch: left.map(|entry| entry.switch),
        }),
        store_id: records.store_id,
    };
    let claim =
        SyncClaim { mode: view.policy.durability, primary: facts.me().clone(), members: BTreeSet::new(), k: 0, term };
    let members = view.me.configured.iter().cloned().collect();
    let mut transaction = Transaction::when(Key::Leader, records.leader.revision())
        .and(Key::Lease, records.lease.revision())
        .and(Key::Sync, records.sync.revision())
        .and(Key::Membership, records.membership.revision())
        .put(Write::Leader(record))
        .put(Write::Sync(claim))
        .put(Write::Membership(Membership { term, members }));
    if let Some(system_identifier) = view.me.system_identifier {
        transaction =
            transaction.and(Key::Init, records.init.revision()).put(Write::Init(ClusterInit { system_identifier }));
    }
    let transaction = mend::timelines_again(facts, transaction);
    let message =
        format!("{} is the cluster from term {term} on; what others have beyond it is set aside", facts.me().name);
    Plan::new("store.accept", format!("{why}: writing everything again as term {term}"))
        .step(facts.commit("accept the store", transaction))
        .step(Step::AcceptStore {
            highest_term: term,
            highest_sync_term: term,
            store_id: records.store_id,
            store_revision: records.revision,
        })
        .step(Step::FinishRequest { id: request.id.clone(), outcome: Outcome::Done { message } })
}

fn finish(request: &Request, outcome: Outcome, why: String) -> Plan {
    Plan::new("store.request", why).step(Step::FinishRequest { id: request.id.clone(), outcome })
}
