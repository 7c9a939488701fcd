//! Who does not know does nothing that cannot be undone, and says what it does not know (S12).

use super::{Facts, accept, duties};
use crate::core::election::list;
use crate::core::followers::streams;
use crate::core::plan::{Plan, Step};
use crate::core::records::{Entry, LeaderState};
use crate::core::trust::Trust;
use crate::core::view::{DataDirectory, GuardState, LocalPostgres, Store, View};

/// The store cannot be read.
pub fn store(view: &View) -> Option<Plan> {
    let Store::Unknown { why, since } = &view.store else { return None };
    let for_ = super::seconds(view.now.since(*since));
    if let Some(plan) = without_store(view, &for_) {
        return Some(plan);
    }
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

/// The sitting leader goes on by promises (protocol §7), also in another life of its agent: the guardian was armed under this
/// term and has not killed, and the state file says what the term rests on.
fn without_store(view: &View, for_: &str) -> Option<Plan> {
    let GuardState::Running { armed: Some(armed), .. } = &view.local.guard.state else { return None };
    let durable = &view.memory.durable;
    if let Some(term) = view.lease.term() {
        let mut reason = format!("the store cannot be read for {for_}; {}", duties::words(&view.promises, view.now));
        if view.promises.since.is_none() {
            reason = format!("the store cannot be read for {for_}; term {term} is held by its last renewal");
        }
        if let Some(stalled) = stalled(view) {
            reason.push_str(&stalled);
        }
        if view.local.postgres.primary().is_none() {
            reason.push_str("; PostgreSQL here is not read-write, and nobody can be elected without the store");
        }
        return Some(Plan::new("store.promised", reason));
    }
    let lead = durable.lead.as_ref().filter(|lead| lead.record.holder == view.me.id)?;
    let ours = lead.record.term == *armed && durable.highest_term <= *armed && durable.sealed_term <= *armed;
    ours.then(|| {
        let reason = format!(
            "the store cannot be read for {for_}; the guardian is armed for term {armed}, which this member held when its agent \
             ended: asking for promises"
        );
        Plan::new("store.reclaim", reason).step(Step::HoldByPromises { term: *armed })
    })
}

/// Changes of `sync` wait for the store, and commits with them.
fn stalled(view: &View) -> Option<String> {
    let primary = view.local.postgres.primary()?;
    let claims = &view.memory.durable.lead.as_ref()?.claims;
    let term = view.lease.term()?;
    let short = claims
        .iter()
        .find(|claim| (claim.members.iter().filter(|id| streams(primary, id, term)).count() as u32) < claim.k)?;
    let gone = short.members.iter().filter(|id| !streams(primary, id, term)).map(|id| &id.name);
    Some(format!(
        "; commits wait for {}: that it may be missing has to be published first, which waits for the store",
        list(gone)
    ))
}

/// The store is another one, went back, or says less than this member remembers: nobody is elected by it. A leader that
/// sits makes it good (`mend.rs`).
pub fn lost(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let durable = &view.memory.durable;
    if let Trust::Lost { why } = facts.trust() {
        if let Some(plan) = accept::asked(&facts) {
            return Some(plan);
        }
        let words = accept::words(&facts);
        let mut plan = Plan::new(
            "store.lost",
            format!("the store is lost: {why}; nobody is elected by it; a leader that sits makes it good; {words}"),
        );
        plan = plan.steps(start(&facts));
        return Some(plan);
    }
    let refuse = |why: String| {
        let said = || Plan::new("store.older", format!("{why}; {}", accept::words(&facts))).steps(start(&facts));
        Some(accept::asked(&facts).unwrap_or_else(said))
    };
    let mine = facts.mine().is_some();
    match &facts.records.leader {
        Entry::Present(leader) if leader.value.term < durable.highest_term && !mine => refuse(format!(
            "the leader record has term {}, this member remembers {}: an old record is believed by nobody",
            leader.value.term, durable.highest_term
        )),
        Entry::Absent if durable.highest_term.0 > 0 => refuse(format!(
            "the leader record is gone, this member remembers term {}: waiting for the sitting leader to write it again",
            durable.highest_term
        )),
        Entry::Unreadable { why, .. } => refuse(format!(
            "the leader record cannot be read ({why}): waiting for the sitting leader to write it again"
        )),
        Entry::Present(_) | Entry::Absent => None,
    }
}

/// Parked, so that its position is there to be looked at.
fn start(facts: &Facts<'_>) -> Option<Step> {
    facts.start_parked().filter(|_| matches!(facts.view.local.data, DataDirectory::Present { .. }))
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
