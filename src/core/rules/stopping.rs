//! SIGTERM: a standby stops, a leader hands over first (its part is in `leader.rs`).

use super::Facts;
use crate::core::plan::{Plan, Step};
use crate::core::view::{LocalPostgres, View};

pub fn rule(view: &View) -> Option<Plan> {
    if !view.stopping {
        return None;
    }
    let leads = Facts::of(view).is_some_and(|f| f.mine().is_some() && view.lease.term().is_some());
    match &view.local.postgres {
        LocalPostgres::Primary(_) if leads => None,
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
