//! A cluster that does not exist yet, and a member that has no data yet.
//!
//! S5: initdb only where the store knows no cluster and *every* configured member says that it has neither data nor memory.
//! Wiped etcd, a wiped directory or an empty member list are never a reason.

use std::time::Duration;

use super::Facts;
use crate::core::election::list;
use crate::core::names::MemberName;
use crate::core::plan::{Plan, Source, Step};
use crate::core::records::{
    ClusterInit, DataSummary, Entry, Key, LeaderRecord, LeaderState, Membership, SyncClaim, Transaction, Write,
};
use crate::core::timeline::Term;
use crate::core::view::{DataDirectory, View};

pub fn create(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    match &facts.records.init {
        Entry::Present(_) => return None,
        Entry::Unreadable { why, .. } => {
            return Some(Plan::new(
                "bootstrap.unreadable",
                format!(
                    "the key `init` cannot be read ({why}): which cluster this is is not known; a person has to mend it"
                ),
            ));
        }
        Entry::Absent => {}
    }
    if let Some(mine) = facts.mine()
        && matches!(mine.value.state, LeaderState::Electing { .. })
    {
        return Some(carry_on(&facts, mine.revision, &mine.value));
    }
    if view.me.system_identifier.is_some() {
        return Some(Plan::new(
            "bootstrap.lost_init",
            "the store knows no cluster, this member does: etcd was wiped or is the wrong one; nothing is created and \
             nothing is deleted, a person has to decide",
        ));
    }
    match &view.local.data {
        DataDirectory::Empty => {}
        DataDirectory::Unfinished { what } => {
            return Some(
                Plan::new("bootstrap.unfinished", format!("an unfinished {what} is in the data directory: set aside"))
                    .step(Step::SetAside { why: format!("unfinished {what}") }),
            );
        }
        DataDirectory::Present { .. } | DataDirectory::Foreign { .. } | DataDirectory::Unknown { .. } => return None,
    }
    if let Some(wait) = waiting_for_members(&facts) {
        return Some(wait);
    }
    if !view.me.tags.may_lead() {
        // L1: its data would be the only ones, and nobody could ever be elected from them.
        return Some(Plan::new(
            "bootstrap.not_to_lead",
            "no cluster is in the store; this member must not lead (nofailover or failover_priority 0), so one without such a \
             tag has to create it",
        ));
    }
    let compare = match facts.leader {
        None => 0,
        Some(leader) => {
            // Somebody creates the cluster; only its silence for W lets another one try.
            let ttl = Duration::from_millis(leader.value.ttl_ms);
            let until = view.memory.silence.map(|s| s.first_seen.plus(view.policy.timings.candidate_wait(ttl)));
            let released = matches!(leader.value.state, LeaderState::Released { .. });
            match until {
                Some(until) if !released && !facts.now().all_reached(until) => {
                    return Some(
                        Plan::new("bootstrap.wait", format!("{} creates the cluster", leader.value.holder.name))
                            .wake_at(until),
                    );
                }
                Some(_) => leader.revision,
                None => return None,
            }
        }
    };
    if let Some(after) = view.memory.retry_after
        && !view.now.any_reached(after)
    {
        return Some(Plan::new("bootstrap.retry", "creating the cluster failed, trying again soon").wake_at(after));
    }
    let term = facts.leader.map(|l| l.value.term).unwrap_or_default().max(view.memory.durable.highest_term).next();
    let record = LeaderRecord {
        holder: facts.me().clone(),
        boot_id: view.me.boot_id.clone(),
        term,
        state: LeaderState::Electing { coordinator: facts.me().name.clone(), preferred: None, winner: None },
        ttl_ms: view.policy.timings.ttl.as_millis() as u64,
        takeover_ms: view.policy.takeover.after.as_millis() as u64,
        taken: None,
        lsn: None,
        last: None,
        store_id: facts.records.store_id,
    };
    Some(
        Plan::new("bootstrap.claim", "no cluster is in the store and every configured member is empty: creating it")
            .step(
                facts.commit(
                    "claim the creation of the cluster",
                    Transaction::when(Key::Leader, compare)
                        .and(Key::Lease, facts.records.lease.revision())
                        .and(Key::Init, 0)
                        .put(Write::Leader(record)),
                ),
            ),
    )
}

/// `None` when every configured member is known to be empty and without memory.
fn waiting_for_members(facts: &Facts<'_>) -> Option<Plan> {
    let mut absent: Vec<&MemberName> = Vec::new();
    for name in &facts.view.me.configured {
        if *name == facts.me().name {
            continue;
        }
        match facts.records.members.get(name).map(|m| &m.value.data) {
            Some(DataSummary::Fresh) if facts.is_there(name) => {}
            Some(DataSummary::Fresh) | None => absent.push(name),
            Some(other) => {
                return Some(Plan::new(
                    "bootstrap.has_data",
                    format!(
                        "{name} is not empty ({other:?}): no new cluster is created while any member has data or remembers a \
                         cluster (S5)"
                    ),
                ));
            }
        }
    }
    if absent.is_empty() {
        return None;
    }
    Some(Plan::new(
        "bootstrap.members",
        format!(
            "no cluster is in the store; waiting for {} to say that there is no data either, before one is created",
            list(absent.iter().copied())
        ),
    ))
}

/// We claimed the creation: initdb, then say so in the store; the first election does the rest.
fn carry_on(facts: &Facts<'_>, revision: i64, record: &LeaderRecord) -> Plan {
    let view = facts.view;
    let term = record.term;
    if view.lease.term() != Some(term) {
        return Plan::new("bootstrap.lease", format!("creating the cluster under term {term}"))
            .step(Step::KeepLease { term, leader_revision: revision });
    }
    if !view.lease.valid(term, view.now) {
        return Plan::new("bootstrap.lease", format!("waiting for the first renewal of term {term}"));
    }
    match (&view.local.data, view.me.system_identifier) {
        (DataDirectory::Empty, None) => {
            Plan::new("bootstrap.initdb", "creating the data directory").step(Step::Bootstrap)
        }
        (DataDirectory::Present { system_identifier, .. }, Some(known)) if *system_identifier == known => {
            Plan::new("bootstrap.publish", format!("the cluster is {known}: saying so in the store"))
                .step(facts.commit("publish the new cluster", publish(facts, revision, term, known)))
        }
        (DataDirectory::Unfinished { what }, None) => {
            Plan::new("bootstrap.unfinished", format!("an unfinished {what} is in the data directory: set aside"))
                .step(Step::SetAside { why: format!("unfinished {what}") })
        }
        (data, memory) => Plan::new(
            "bootstrap.stuck",
            format!("cannot create the cluster: the data directory is {data:?}, the state file remembers {memory:?}"),
        ),
    }
}

fn publish(facts: &Facts<'_>, revision: i64, term: Term, system_identifier: u64) -> Transaction {
    let view = facts.view;
    Transaction::when(Key::Leader, revision)
        .and(Key::Init, 0)
        .and(Key::Sync, facts.records.sync.revision())
        .and(Key::Membership, facts.records.membership.revision())
        .put(Write::Init(ClusterInit { system_identifier }))
        .put(Write::Membership(Membership { term, members: view.me.configured.iter().cloned().collect() }))
        .put(Write::Sync(SyncClaim {
            mode: view.policy.durability,
            primary: facts.me().clone(),
            members: Default::default(),
            k: 0,
            term,
        }))
}

/// No data here, but a cluster in the store: copy it from the best member.
pub fn join(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    facts.records.init.value()?;
    let why = match &view.local.data {
        DataDirectory::Empty => None,
        DataDirectory::Unfinished { what } => Some(format!("unfinished {what}")),
        DataDirectory::Present { .. } | DataDirectory::Foreign { .. } | DataDirectory::Unknown { .. } => return None,
    };
    Some(clone_plan(&facts, why, "this member has no data"))
}

/// Sets aside what is there (S5: only while a leader holds a full copy), begins a new incarnation, clones.
pub fn clone_plan(facts: &Facts<'_>, set_aside: Option<String>, because: &str) -> Plan {
    let view = facts.view;
    let leader = facts.leader.filter(|l| l.value.state == LeaderState::Held && l.value.holder != *facts.me());
    let Some(leader) = leader else {
        return Plan::new("clone.wait", format!("{because}; waiting for a leader to copy from"));
    };
    let alive = view.memory.silence.is_some_and(|s| view.now.since(s.first_seen) < view.policy.timings.ttl);
    if !alive {
        return Plan::new("clone.wait", format!("{because}; the leader {} is silent", leader.value.holder.name));
    }
    if let Some(after) = view.memory.retry_after
        && !view.now.any_reached(after)
    {
        return Plan::new("clone.retry", format!("{because}; the last attempt failed, trying again soon"))
            .wake_at(after);
    }
    let Some(from) = best_source(facts, &leader.value.holder.name) else {
        return Plan::new(
            "clone.wait",
            format!("{because}; the address of {} is not known yet", leader.value.holder.name),
        );
    };
    if let Err(why) = super::storage::room_for_copy(facts) {
        return Plan::new("clone.no_room", format!("{because}; not copied: {why}"));
    }
    let reason = format!("{because}: copying from {}", from.member);
    let mut plan = Plan::new("clone", reason);
    if let Some(why) = set_aside {
        plan = plan.step(Step::SetAside { why });
    }
    if let Some(init) = facts.records.init.value() {
        plan = plan.step(Step::Join { system_identifier: init.system_identifier });
    }
    plan.step(Step::NewIncarnation { copied: true }).step(Step::Clone { from })
}

/// A standby that streams and is not busy spares the leader; else the leader.
fn best_source(facts: &Facts<'_>, leader: &MemberName) -> Option<Source> {
    let standby = facts
        .records
        .members
        .iter()
        .filter(|(name, m)| {
            **name != facts.me().name
                && *name != leader
                && facts.is_there(name)
                && m.value.state == "streaming"
                && m.value.job.is_none()
        })
        .map(|(name, _)| name)
        .next();
    facts.source(standby.unwrap_or(leader)).or_else(|| facts.source(leader))
}
