//! What tests of the API need: a published status, and a clock that stands where they put it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::agent::status::{Counters, Decision, Status};
use crate::core::Moment;
use crate::core::plan::Plan;
use crate::core::testing::NOW;
use crate::core::view::View;
use crate::ports::Clock;

pub const UNIX_MS: u64 = 1_790_000_000_000;

/// Published at the view's own time, with one decision in the ring.
pub fn published(view: View, plan: Plan) -> Arc<Status> {
    let gate_until = view.gate_until();
    let (at, view, plan) = (view.now, Arc::new(view), Arc::new(plan));
    let decision = Decision { number: 1, at_unix_ms: UNIX_MS, view: view.clone(), plan: plan.clone() };
    let decisions = Arc::new(VecDeque::from([decision]));
    Arc::new(Status { at, view, plan, gate_until, decisions, counters: Counters { rounds: 5, ..Counters::default() } })
}

/// Stands at [`NOW`] until told to move.
#[derive(Debug)]
pub struct StandingClock(Mutex<Moment>);

impl Default for StandingClock {
    fn default() -> Self {
        StandingClock(Mutex::new(NOW))
    }
}

impl StandingClock {
    pub fn advance(&self, span: Duration) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now = now.plus(span);
    }
}

impl Clock for StandingClock {
    fn now(&self) -> Moment {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unix_ms(&self) -> u64 {
        UNIX_MS + u64::try_from(self.now().since(NOW).as_millis()).unwrap_or(u64::MAX)
    }
}
