//! A job runs: everything else waits for it, but for what `superseded` ends.

use super::Facts;
use crate::core::plan::{Plan, Step};
use crate::core::records::{LeaderState, Operation, Outcome};
use crate::core::view::{GuardState, LocalPostgres, View};

pub fn job(view: &View) -> Option<Plan> {
    let job = view.job.as_ref().filter(|job| job.result.is_none())?;
    Some(Plan::new("job", format!("{} is under way", job.what)))
}

/// Without a guardian nothing is started, promoted or renewed: no guard, no lease.
pub fn guardian(view: &View) -> Option<Plan> {
    match &view.local.guard.state {
        GuardState::Absent { why } => Some(Plan::new(
            "guardian.absent",
            format!("no guardian answers ({why}): starting one before anything else"),
        )),
        GuardState::Survivors { count } => {
            // A leader does not wait to say that it is finished: only a *start* waits for the last process.
            let holds = Facts::of(view).is_some_and(|f| {
                f.mine().is_some_and(|l| matches!(l.value.state, LeaderState::Held | LeaderState::Electing { .. }))
            });
            let why = format!("waiting for the last {count} processes of PostgreSQL to go away before it is started");
            (!holds).then(|| Plan::new("guardian.survivors", why))
        }
        GuardState::Idle { .. } | GuardState::Running { .. } => None,
    }
}

/// A restart asked for while PostgreSQL is down or given up: another try after a crash loop.
pub fn restart(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let operation = view.memory.operation.as_ref()?;
    let request = &facts.records.requests.get(&operation.id)?.value;
    let given_up = view.memory.crashes.len() > view.policy.crash_max_restarts as usize;
    let down = matches!(view.local.postgres, LocalPostgres::Down);
    // Begun: the leader stopped PostgreSQL to restart it, and the election in place answers.
    let begun = request.began.is_some();
    if !matches!(request.what, Operation::Restart { .. }) || begun || !(down || given_up) {
        return None;
    }
    let message = "earlier crashes are forgotten; PostgreSQL is started by the next decision".to_owned();
    Some(
        Plan::new("restart.again", format!("asked by {}: {message}", request.asked_by))
            .step(Step::ForgetCrashes)
            .step(Step::FinishRequest { id: request.id.clone(), outcome: Outcome::Done { message } }),
    )
}
