//! A primary whose term is over is killed at once, whatever else goes on (S1, S4).

use super::Facts;
use crate::core::plan::{Plan, Step};
use crate::core::records::{Entry, LeaderState};
use crate::core::view::{GuardState, LeaseView, LocalPostgres, View};

pub fn rule(view: &View) -> Option<Plan> {
    let armed = match &view.local.guard.state {
        GuardState::Running { armed, .. } => *armed,
        GuardState::Absent { .. } | GuardState::Idle { .. } | GuardState::Survivors { .. } => None,
    };
    let primary = matches!(view.local.postgres, LocalPostgres::Primary(_));
    if !primary && armed.is_none() {
        return None;
    }
    let kill = |why: String| Some(Plan::new("superseded", why).step(Step::Kill).step(Step::DropLease));

    if let LeaseView::Held { term, deadline } = &view.lease
        && view.now.any_reached(*deadline)
    {
        return kill(format!("the lease of term {term} ran out: no renewal succeeded in time"));
    }
    let facts = Facts::of(view)?;
    match &facts.records.leader {
        Entry::Absent | Entry::Unreadable { .. } => mend(&facts),
        // A record of a lower term than ours, an own one too, is an old one that came back: mended by the holder, believed
        // by nobody.
        Entry::Present(record) if view.memory.durable.highest_term > record.value.term => mend(&facts),
        Entry::Present(record) if record.value.holder != *facts.me() => {
            kill(format!("{} holds term {} now", record.value.holder.name, record.value.term))
        }
        Entry::Present(record) => match &record.value.state {
            LeaderState::Released { .. } | LeaderState::Fenced { .. } => {
                kill(format!("term {} is released: nothing runs under it any more", record.value.term))
            }
            LeaderState::Electing { winner: Some(winner), .. } if winner.member == *facts.me() => None,
            LeaderState::Electing { .. } => {
                kill(format!("term {} is an election in which this member must be sealed first", record.value.term))
            }
            LeaderState::Held => None,
        },
    }
}

/// The record was deleted, overwritten with garbage or rolled back: the sitting leader writes it again before D
/// (protocol §7); for everybody else it is the beginning of a silence.
fn mend(facts: &Facts<'_>) -> Option<Plan> {
    let view = facts.view;
    let (term, deadline) = match &view.lease {
        LeaseView::Held { term, deadline } => (*term, Some(*deadline)),
        LeaseView::Lost { term, deadline } => (*term, *deadline),
        LeaseView::None | LeaseView::Claimed { .. } => {
            return Some(
                Plan::new("superseded", "the leader record is gone and this member holds no lease")
                    .step(Step::Kill)
                    .step(Step::DropLease),
            );
        }
    };
    let kill_at = deadline.map(|d| d.minus(view.policy.timings.kill_budget));
    let record = view.memory.held.as_ref().filter(|held| held.term == term);
    match (kill_at, record) {
        (Some(kill_at), Some(held)) if !view.now.any_reached(kill_at) => {
            let mut record = held.clone();
            record.term = view.memory.durable.highest_term.max(term).next();
            let revision = facts.records.leader.revision();
            let transaction = crate::core::records::Transaction::when(crate::core::records::Key::Leader, revision)
                .put(crate::core::records::Write::Leader(record.clone()));
            Some(
                Plan::new(
                    "leader.mend",
                    format!(
                        "the leader record was deleted, overwritten or rolled back while this member leads under term {term}: \
                         writing it again as term {}",
                        record.term
                    ),
                )
                .step(facts.commit("write the leader record again", transaction)),
            )
        }
        _ => Some(
            Plan::new("superseded", "the leader record is gone and the lease is nearly over")
                .step(Step::Kill)
                .step(Step::DropLease),
        ),
    }
}
