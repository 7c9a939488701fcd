//! SIGTERM: a standby stops, a leader hands over first (its part is in `leader.rs`).

use super::Facts;
use crate::core::plan::{Plan, Step};
use crate::core::records::{Keyed, LeaderRecord, LeaderState};
use crate::core::view::{LocalPostgres, View};

pub fn rule(view: &View) -> Option<Plan> {
    if !view.stopping {
        return None;
    }
    // Whoever holds the term hands it over or releases it before it ends: the others need not wait for silence.
    let holds = Facts::of(view).is_some_and(|f| {
        let acts = |l: &Keyed<LeaderRecord>| matches!(l.value.state, LeaderState::Held | LeaderState::Electing { .. });
        f.records.init.value().is_some() && f.mine().is_some_and(acts) && view.lease.term().is_some()
    });
    match &view.local.postgres {
        LocalPostgres::Primary(_) | LocalPostgres::Down | LocalPostgres::Standby(_) if holds => None,
        LocalPostgres::Down => {
            Some(Plan::new("stopping", "PostgreSQL is stopped, the agent ends").step(Step::DropLease).step(Step::Exit))
        }
        LocalPostgres::Primary(_)
        | LocalPostgres::Standby(_)
        | LocalPostgres::Starting { .. }
        | LocalPostgres::Unknown { .. } => Some(
            Plan::new("stopping", "told to stop: PostgreSQL is stopped orderly")
                .step(Step::Stop { timeout: view.policy.stop_timeout }),
        ),
    }
}
