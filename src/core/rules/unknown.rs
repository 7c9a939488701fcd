//! Who does not know does nothing that cannot be undone, and says what it does not know (S12).

use super::Facts;
use crate::core::plan::{Plan, Step};
use crate::core::records::{Entry, LeaderState};
use crate::core::view::{DataDirectory, GuardState, LocalPostgres, Store, View};

/// The store cannot be read.
pub fn store(view: &View) -> Option<Plan> {
    let Store::Unknown { why, since } = &view.store else { return None };
    let for_ = super::seconds(view.now.since(*since));
    let mut plan =
        Plan::new("store.unknown", format!("the store cannot be read for {for_} ({why}): nothing is changed"));
    // A standby that follows nobody can be started without asking anybody (S8).
    if matches!(view.local.postgres, LocalPostgres::Down)
        && matches!(view.local.data, DataDirectory::Present { .. })
        && !view.memory.durable.must_follow
        && !view.stopping
        && super::storage::not_to_start(view).is_none()
    {
        plan = plan.step(Step::Start { follow: None });
    }
    Some(plan)
}

/// The store says less than this member remembers: wiped, restored from a backup, or another one.
pub fn older(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let durable = &view.memory.durable;
    let refuse = |why: String| Some(Plan::new("store.older", why));
    if durable.store_id != 0 && facts.records.store_id != durable.store_id {
        return refuse(format!(
            "the store is another one (cluster id {:x}, remembered {:x}): nobody is elected; point etcd.endpoints at the right \
             one",
            facts.records.store_id, durable.store_id
        ));
    }
    if facts.records.revision < durable.store_revision {
        return refuse(format!(
            "the store went back to revision {} from {}: restored from a backup? Nobody is elected by it",
            facts.records.revision, durable.store_revision
        ));
    }
    let mine = facts.mine().is_some();
    match &facts.records.leader {
        Entry::Present(leader) if leader.value.term < durable.highest_term && !mine => refuse(format!(
            "the leader record has term {}, this member remembers {}: an old record is believed by nobody",
            leader.value.term, durable.highest_term
        )),
        Entry::Absent if durable.highest_term.0 > 0 => refuse(format!(
            "the leader record is gone, this member remembers term {}: waiting for the sitting leader to write it again; if \
             there is none, a person has to decide",
            durable.highest_term
        )),
        Entry::Unreadable { why, .. } => refuse(format!(
            "the leader record cannot be read ({why}): waiting for the sitting leader to write it again; if there is none, a \
             person has to mend the key"
        )),
        Entry::Present(_) | Entry::Absent => None,
    }
}

/// What is here cannot be told.
pub fn local(view: &View) -> Option<Plan> {
    if let DataDirectory::Unknown { why } = &view.local.data {
        return Some(Plan::new(
            "data.unknown",
            format!("the data directory cannot be judged ({why}): nothing is changed"),
        ));
    }
    match &view.local.postgres {
        // The guardian knows more than PostgreSQL can say: the rules of the leader go by it.
        LocalPostgres::Unknown { .. } if matches!(view.local.guard.state, GuardState::Survivors { .. }) => None,
        // An election of ours has to be given up in time; its own rule does that.
        LocalPostgres::Unknown { .. } if electing(view) => None,
        LocalPostgres::Unknown { why } => {
            Some(Plan::new("postgres.unknown", format!("PostgreSQL does not answer ({why}): nothing is changed")))
        }
        LocalPostgres::Down
        | LocalPostgres::Starting { .. }
        | LocalPostgres::Standby(_)
        | LocalPostgres::Primary(_) => None,
    }
}

fn electing(view: &View) -> bool {
    Facts::of(view).is_some_and(|f| f.mine().is_some_and(|l| matches!(l.value.state, LeaderState::Electing { .. })))
}
