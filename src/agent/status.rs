//! What the agent publishes after every round: the view that it decided on and the plan. REST, CLI and metrics read nothing else.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::Serialize;

use crate::core::Moment;
use crate::core::plan::Plan;
use crate::core::view::View;

/// Published through a `tokio::sync::watch<Arc<Status>>`.
#[derive(Clone, Debug)]
pub struct Status {
    /// When the round ended; readers compare with their clock: a loop that hangs must not look healthy.
    pub at: Moment,
    pub view: Arc<View>,
    pub plan: Arc<Plan>,
    /// The endpoint's gate holds from here on, unless a later status says more ([`View::gate_until`]).
    pub gate_until: Option<Moment>,
    /// Changes of decision, newest last, bounded.
    pub decisions: Arc<VecDeque<Decision>>,
    pub counters: Counters,
}

/// A change of decision with everything that led to it.
#[derive(Clone, Debug, Serialize)]
pub struct Decision {
    pub number: u64,
    /// Wall-clock milliseconds since 1970, for people.
    pub at_unix_ms: u64,
    pub view: Arc<View>,
    pub plan: Arc<Plan>,
}

/// Sums since the agent started; metrics show them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    pub rounds: u64,
    pub decision_changes: u64,
    pub step_failures: u64,
    pub store_errors: u64,
    pub postgres_errors: u64,
    pub renewals: u64,
    pub renewal_failures: u64,
    pub promotions: u64,
    pub kills: u64,
}
