//! One arm per step, no decisions. The first failing step ends the plan; the next round sees the new facts.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tracing::{error, info};

use super::lease_keeper::LeaseKeeper;
use super::peer_watch::PeerWatch;
use super::state_file::{StateError, StateFile};
use crate::core::Moment;
use crate::core::plan::{Follow, Step};
use crate::core::records::{ClusterRecords, Key, LeaderState, MemberRecord, Outcome, Transaction, Write};
use crate::core::timeline::Term;
use crate::core::view::LeaseView;
use crate::ports::{Clock, Dcs, DcsError, Disks, Fence, FenceError, Postgres, PostgresError, StartMode};

/// Deadlines of short steps. Each is far below the time after which the keeper takes the loop for dead.
pub const STORE_DEADLINE: Duration = Duration::from_millis(1500);
pub const SQL_DEADLINE: Duration = Duration::from_millis(1500);
/// Reading a few small files, which are nearly always in memory.
pub const FILE_DEADLINE: Duration = Duration::from_millis(1000);
pub const KILL_DEADLINE: Duration = Duration::from_millis(1000);
/// Finished requests that are kept for people to read.
const REQUESTS_KEPT: usize = 20;

/// The outside world, shared by the loop and its jobs.
#[derive(Clone)]
pub struct World {
    pub dcs: Arc<dyn Dcs>,
    pub postgres: Arc<dyn Postgres>,
    pub fence: Arc<dyn Fence>,
    pub disks: Arc<dyn Disks>,
    pub clock: Arc<dyn Clock>,
    pub keeper: Arc<LeaseKeeper>,
    pub peers: Arc<PeerWatch>,
    pub state: Arc<Mutex<StateFile>>,
    /// K: how long before the lease's deadline the guardian kills.
    pub kill_budget: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Store(#[from] DcsError),
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    #[error(transparent)]
    Fence(#[from] FenceError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{0}")]
    Other(String),
}

/// What a step leaves for the memory of the loop.
#[derive(Clone, Debug)]
pub enum Effect {
    Kept {
        leader_revision: i64,
    },
    Dropped,
    Published {
        at: Moment,
        record: Box<MemberRecord>,
    },
    SyncWritten,
    SyncDoubtful,
    CrashesForgotten,
    Started {
        follow: Option<Follow>,
    },
    /// PostgreSQL was killed: whatever a job does with it is over.
    Killed,
    Exit,
}

impl World {
    pub fn state(&self) -> std::sync::MutexGuard<'_, StateFile> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Executes a step that is not a job. `records` are those that the plan was made from.
    pub async fn execute(&self, step: &Step, records: Option<&ClusterRecords>) -> Result<Vec<Effect>, StepError> {
        match step {
            Step::Remember { highest_term, highest_sync_term, store_id, store_revision } => {
                self.state().remember(*highest_term, *highest_sync_term, *store_id, *store_revision)?;
            }
            Step::Join { system_identifier } => self.state().join(*system_identifier)?,
            Step::NewIncarnation { copied } => self.state().begin_incarnation(*copied)?,
            Step::Arm { term } => self.arm(*term).await?,
            Step::ForgetCrashes => return Ok(vec![Effect::CrashesForgotten]),
            Step::KeepLease { term, leader_revision } => {
                self.keeper.keep(*term, *leader_revision);
                return Ok(vec![Effect::Kept { leader_revision: *leader_revision }]);
            }
            Step::DropLease => {
                self.keeper.drop_lease();
                return Ok(vec![Effect::Dropped]);
            }
            Step::Kill => {
                self.shut_gate();
                let killed = self.fence.kill(KILL_DEADLINE).await?;
                if !killed.was_down {
                    info!(survivors = killed.survivors, "postgresql killed");
                }
                return Ok(vec![Effect::Killed]);
            }
            Step::Disarm => self.fence.disarm().await?,
            Step::Commit { what, transaction } => return self.commit(what, transaction).await,
            Step::Start { follow } => {
                let mode = match follow {
                    None => StartMode::Parked,
                    Some(follow) => StartMode::Follow(follow.clone()),
                };
                let launch = self.postgres.prepare_start(&mode).await?;
                // What was armed for a dead PostgreSQL must not kill the one that follows nobody.
                self.fence.disarm().await?;
                self.fence.start(&launch).await?;
                return Ok(vec![Effect::Started { follow: follow.clone() }]);
            }
            Step::Follow { follow } => self.postgres.follow(Some(follow), SQL_DEADLINE).await?,
            Step::EndWalsenders { names } => self.postgres.end_walsenders(names, SQL_DEADLINE).await?,
            Step::KeepSlots { members } => self.postgres.keep_slots(members, SQL_DEADLINE).await?,
            Step::Reload => self.postgres.reload().await?,
            Step::SetAside { why } => {
                self.still_led_as_planned(records).await?;
                let place = self.postgres.set_aside(why).await?;
                info!(why, place = %place.display(), "data directory set aside");
            }
            Step::FinishRequest { id, outcome } => return self.finish_request(id, outcome, records).await,
            Step::Exit => return Ok(vec![Effect::Exit]),
            Step::Seal { .. }
            | Step::Promote { .. }
            | Step::Enforce { .. }
            | Step::Bootstrap
            | Step::Clone { .. }
            | Step::Rewind { .. }
            | Step::HandOver { .. }
            | Step::RestartInPlace { .. }
            | Step::Stop { .. } => {
                return Err(StepError::Other(format!("{step:?} is a job and cannot be done within a round")));
            }
        }
        Ok(Vec::new())
    }

    /// Before the kill, and before anybody else may be told that this term is over: nothing more reaches a client (S4).
    pub fn shut_gate(&self) {
        if let (Some(term), Some(page)) = (self.keeper.view().term(), self.fence.page()) {
            page.shut(term);
        }
    }

    /// The guardian kills at F of `term` from now on; only for a lease that is held.
    pub async fn arm(&self, term: Term) -> Result<(), StepError> {
        match self.keeper.view() {
            LeaseView::Held { term: held, deadline } if held == term => {
                Ok(self.fence.arm(term, deadline.minus(self.kill_budget)).await?)
            }
            other => Err(StepError::Other(format!("the lease of term {term} is not held: {other:?}"))),
        }
    }

    pub async fn commit(&self, what: &str, transaction: &Transaction) -> Result<Vec<Effect>, StepError> {
        let mut transaction = transaction.clone();
        for write in &mut transaction.write {
            // Stamped here because decisions know no wall clock.
            if let Write::History(record) = write {
                record.at_unix_ms = self.clock.unix_ms();
            }
        }
        let at = self.clock.now();
        let gives_up = |write: &Write| matches!(write, Write::Leader(l) if l.holder == self.state().id() && !keeps_lease(&l.state));
        if transaction.write.iter().any(gives_up) {
            self.shut_gate();
        }
        let writes_sync = transaction.write.iter().any(|w| matches!(w, Write::Sync(_)));
        match self.dcs.commit(&transaction, STORE_DEADLINE).await {
            Ok(revision) => {
                let mut effects = Vec::new();
                if writes_sync {
                    effects.push(Effect::SyncWritten);
                }
                for write in transaction.write {
                    match write {
                        Write::Member(_, record) => effects.push(Effect::Published { at, record }),
                        Write::Leader(record) if record.holder == self.state().id() && keeps_lease(&record.state) => {
                            // The record is ours and new: renewed from now on, without a round in between.
                            self.keeper.keep(record.term, revision);
                            effects.push(Effect::Kept { leader_revision: revision });
                        }
                        _ => {}
                    }
                }
                Ok(effects)
            }
            Err(DcsError::Timeout { within, .. }) if writes_sync => {
                error!(what, ?within, "a write of `sync` has an unknown outcome");
                Ok(vec![Effect::SyncDoubtful])
            }
            Err(error) => Err(error.into()),
        }
    }

    /// S5: the leader whose copy makes ours dispensable is still the one that the plan was made for. A stop may have taken
    /// long since.
    async fn still_led_as_planned(&self, planned: Option<&ClusterRecords>) -> Result<(), StepError> {
        let now = self.dcs.read(STORE_DEADLINE).await?;
        if planned.map(|records| records.leader.revision()) == Some(now.leader.revision()) {
            return Ok(());
        }
        Err(StepError::Other("the leader changed meanwhile: the data stay where they are".to_owned()))
    }

    async fn finish_request(
        &self,
        id: &str,
        outcome: &Outcome,
        records: Option<&ClusterRecords>,
    ) -> Result<Vec<Effect>, StepError> {
        let Some(request) = records.and_then(|r| r.requests.get(id)) else {
            return Err(StepError::Other(format!("request {id} is not in the store any more")));
        };
        let mut finished = request.value.clone();
        finished.outcome = Some(outcome.clone());
        let mut transaction =
            Transaction::when(Key::Request(id.to_owned()), request.revision).put(Write::Request(finished));
        for old in finished_requests(records) {
            transaction = transaction.put(Write::Delete(Key::Request(old)));
        }
        info!(request = id, ?outcome, "request finished");
        self.commit("finish a request", &transaction).await
    }
}

fn keeps_lease(state: &LeaderState) -> bool {
    match state {
        LeaderState::Held | LeaderState::Electing { .. } => true,
        LeaderState::Released { .. } | LeaderState::Fenced { .. } => false,
    }
}

/// The oldest finished requests beyond those that are kept.
fn finished_requests(records: Option<&ClusterRecords>) -> Vec<String> {
    let Some(records) = records else { return Vec::new() };
    let mut finished: Vec<(u64, &String)> = records
        .requests
        .iter()
        .filter(|(_, r)| r.value.outcome.is_some())
        .map(|(id, r)| (r.value.at_unix_ms, id))
        .collect();
    finished.sort();
    let excess = finished.len().saturating_sub(REQUESTS_KEPT);
    finished.into_iter().take(excess).map(|(_, id)| id.clone()).collect()
}
