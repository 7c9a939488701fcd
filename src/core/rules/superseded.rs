//! A primary whose term is over is killed at once, whatever else goes on (S1, S4).

use super::{Facts, mend};
use crate::core::plan::{Plan, Step};
use crate::core::records::{Entry, LeaderState};
use crate::core::trust::Trust;
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
    if let Some(higher) = view.promises.higher_term().filter(|_| view.lease.term() == Some(view.promises.term)) {
        return kill(format!(
            "term {} is over: asked for its promise, a member answered that it knows term {higher}",
            view.promises.term
        ));
    }
    let facts = Facts::of(view)?;
    let known = view.memory.durable.highest_term;
    if let Trust::Lost { why } = facts.trust()
        && facts.leader.is_none_or(|l| l.value.term <= known || l.value.holder == *facts.me())
    {
        return Some(mend::store(&facts, &why));
    }
    match &facts.records.leader {
        Entry::Absent | Entry::Unreadable { .. } => Some(mend::record(&facts)),
        // A record of a lower term than ours, an own one too, is an old one that came back: mended by the holder, believed
        // by nobody.
        Entry::Present(record) if known > record.value.term => Some(mend::record(&facts)),
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
            LeaderState::Held => mend::init(&facts),
        },
    }
}
