//! The store says that this member holds the term, the keeper does not keep it: after a restart of the agent (S10), after a
//! claim that succeeded, after the record passed to us as the winner.

use super::Facts;
use crate::core::plan::{Plan, Step};
use crate::core::records::LeaderState;
use crate::core::view::{LeaseView, View};

pub fn rule(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let mine = facts.mine()?;
    let term = mine.value.term;
    let what = match &mine.value.state {
        LeaderState::Held => "leads",
        LeaderState::Electing { .. } => "holds the election",
        LeaderState::Released { .. } | LeaderState::Fenced { .. } => return None,
    };
    let keep =
        |why: String| Some(Plan::new("lease.keep", why).step(Step::KeepLease { term, leader_revision: mine.revision }));
    match &view.lease {
        LeaseView::None => keep(format!("this member {what} under term {term}: renewing its lease")),
        LeaseView::Claimed { term: kept } if *kept == term && view.memory.kept_revision == Some(mine.revision) => {
            Some(Plan::new("lease.wait", format!("waiting for the first renewal of term {term}")))
        }
        LeaseView::Held { term: kept, .. } if *kept == term && view.memory.kept_revision == Some(mine.revision) => None,
        // The record changed under our own hand (a winner was written, it was mended): the keeper learns the new revision.
        LeaseView::Claimed { .. } | LeaseView::Held { .. } | LeaseView::Lost { .. } => {
            keep(format!("this member {what} under term {term}: renewing against its present record"))
        }
    }
}
