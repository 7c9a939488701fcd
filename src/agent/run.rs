//! THE LOOP: observe, decide, publish, lint, execute, wait. Level-triggered: after any wake-up everything is read again, so a
//! lost notification costs at most one heartbeat.
//!
//! One task, and at most one job beside it. It must never wait longer than a step's deadline: the lease keeper takes a loop
//! that does not come round for dead and stops renewing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, error, info, warn};

use super::execute::{Effect, FILE_DEADLINE, SQL_DEADLINE, STORE_DEADLINE, StepError, World};
use super::jobs::{Context, RunningJob};
use super::peer_watch::Introduction;
use super::status::{Counters, Decision, Status};
use crate::core::decide::decide;
use crate::core::plan::{Plan, Step};
use crate::core::records::{Force, Key, LeaderState, Operation, Request, Transaction, Write};
use crate::core::view::{GuardState, JobKind, LeaseView, Local, LocalPostgres, Me, Memory, Policy, Store, View};
use crate::core::{Moment, lint, silence};
use crate::ports::DcsError;

/// Changes of decision that are kept for `/v1/decisions`.
const DECISIONS_KEPT: usize = 64;
/// A failing step is tried again soon, but not in a spin.
const FAILURE_PAUSE: Duration = Duration::from_millis(200);
/// While PostgreSQL starts, recovers or a standby turns there is no event to wait for.
const WATCHFUL: Duration = Duration::from_millis(10);
/// While something is under way that the other members have to answer (seals, followers).
const ELECTION_PACE: Duration = Duration::from_millis(25);

/// Somebody asks for an operation.
pub struct Asked {
    pub id: String,
    pub what: Operation,
    pub asked_by: String,
    pub timeout: Duration,
    pub force: Option<Force>,
    pub answer: tokio::sync::oneshot::Sender<Result<Taken, NotTaken>>,
}

/// The request stands in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    New,
    Known,
}

/// Why it does not, as far as is known (S11).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotTaken {
    IdInUse,
    NothingWritten(String),
    Unknown(String),
}

/// How the loop ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// PostgreSQL is stopped.
    Stopped,
    /// PostgreSQL goes on under the guardian; another agent will take over.
    Detached,
}

/// What the process wants of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Run,
    Stop,
    Detach,
}

pub struct Agent {
    pub world: World,
    pub me: Me,
    pub policy: Policy,
    pub asked: mpsc::Receiver<Asked>,
    pub wanted: watch::Receiver<Wanted>,
    pub status: watch::Sender<Option<Arc<Status>>>,
    memory: Memory,
    job: Option<RunningJob>,
    job_ended: Arc<Notify>,
    decisions: Arc<VecDeque<Decision>>,
    decided: u64,
    counters: Counters,
    store_unknown_since: Option<Moment>,
    last: Option<(String, String)>,
}

impl Agent {
    pub fn new(
        world: World,
        me: Me,
        policy: Policy,
        asked: mpsc::Receiver<Asked>,
        wanted: watch::Receiver<Wanted>,
        status: watch::Sender<Option<Arc<Status>>>,
    ) -> Agent {
        let memory = Memory { durable: world.state().durable().clone(), ..Memory::default() };
        Agent {
            world,
            me,
            policy,
            asked,
            wanted,
            status,
            memory,
            job: None,
            job_ended: Arc::new(Notify::new()),
            decisions: Arc::default(),
            decided: 0,
            counters: Counters::default(),
            store_unknown_since: None,
            last: None,
        }
    }

    pub async fn run(mut self) -> End {
        let mut store_changes = self.world.dcs.changes();
        let mut fence_changes = self.world.fence.changes();
        let mut lease_changes = self.world.keeper.changes();
        let mut peer_changes = self.world.peers.changes();
        loop {
            // Marked before observing: what changes while we look wakes us again.
            store_changes.mark_unchanged();
            fence_changes.mark_unchanged();
            lease_changes.mark_unchanged();
            peer_changes.mark_unchanged();
            if *self.wanted.borrow_and_update() == Wanted::Detach {
                info!("the agent ends, PostgreSQL goes on under the guardian");
                return End::Detached;
            }
            let view = Arc::new(self.observe().await);
            let plan = Arc::new(decide(&view));
            self.world.peers.pace(silence::pace(&view));
            self.publish(&view, &plan);
            let pause = match self.execute(&view, &plan).await {
                Ok(true) => return End::Stopped,
                Ok(false) => self.pause(&view, &plan),
                Err(pause) => pause,
            };
            tokio::select! {
                // All arms are cancel-safe: they only tell that something is to be looked at.
                _ = store_changes.changed() => {}
                _ = fence_changes.changed() => {}
                _ = peer_changes.changed() => {}
                () = lease_moved(&mut lease_changes, &view.lease) => {}
                () = self.job_ended.notified() => {}
                _ = self.wanted.changed() => {}
                asked = self.asked.recv() => if let Some(asked) = asked { self.take_request(asked, &view).await },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    // === Observe ===

    async fn observe(&mut self) -> View {
        self.world.keeper.loop_is_alive(self.world.clock.now());
        self.take_job_result();
        let guard = self.attached_guard().await;
        let (store, postgres, data, kept) = tokio::join!(
            self.world.dcs.read(STORE_DEADLINE),
            self.world.postgres.observe(&guard, SQL_DEADLINE),
            self.world.postgres.data_directory(FILE_DEADLINE),
            self.world.postgres.kept(),
        );
        let now = self.world.clock.now();
        self.world.keeper.loop_is_alive(now);
        let store = match store {
            Ok(records) => {
                self.store_unknown_since = None;
                Store::Known { observed_at: now, records: Box::new(records) }
            }
            Err(error) => {
                self.counters.store_errors += 1;
                let since = *self.store_unknown_since.get_or_insert(now);
                Store::Unknown { why: error.to_string(), since }
            }
        };
        if matches!(postgres, LocalPostgres::Unknown { .. }) {
            self.counters.postgres_errors += 1;
        }
        self.world.keeper.flushed(postgres.primary().map(|p| p.flushed));
        let postgres_is_standby = postgres.standby().is_some();
        let storage = self.world.disks.look();
        let local = Local { observed_at: now, data, postgres, guard, storage, kept };
        // Not while a job may be about to stop it: a rewind has set the mark and not begun yet.
        if postgres_is_standby
            && self.job.is_none()
            && let Err(error) = self.world.state().is_consistent()
        {
            warn!(%error, "remember that the data are consistent");
        }
        {
            let state = self.world.state();
            self.me.id = state.id();
            self.me.system_identifier = state.system_identifier();
            self.memory.durable = state.durable().clone();
        }
        self.world
            .peers
            .introduce(Introduction { id: self.me.id.clone(), system_identifier: self.me.system_identifier });
        let peers = self.world.peers.known();
        self.memory = std::mem::take(&mut self.memory).observe(&self.me, &self.policy, &local, &store, &peers, now);
        let view = View {
            now,
            me: self.me.clone(),
            policy: self.policy.clone(),
            local,
            store,
            lease: self.world.keeper.view(),
            memory: self.memory.clone(),
            peers,
            job: self.job.as_ref().map(RunningJob::view),
            stopping: *self.wanted.borrow() == Wanted::Stop,
        };
        // Who takes over goes by the published claim, which may change under a held lease.
        if matches!(view.lease, LeaseView::Held { .. }) {
            self.world.keeper.hold_after(view.gate_until().map(|_| self.policy.takeover.gate()));
        }
        view
    }

    /// The guardian's word; a missing guardian is started again.
    async fn attached_guard(&mut self) -> crate::core::view::Guard {
        let guard = self.world.fence.status().await;
        if !matches!(guard.state, GuardState::Absent { .. }) {
            return guard;
        }
        if let Err(error) = self.world.fence.attach().await {
            warn!(%error, "attach to the guardian");
        }
        self.world.keeper.use_page(self.world.fence.page());
        self.world.fence.status().await
    }

    fn take_job_result(&mut self) {
        let Some(ended) = self.job.as_mut().and_then(RunningJob::ended) else { return };
        let Some(job) = self.job.take() else { return };
        let now = self.world.clock.now();
        let took_ms = now.since(job.since()).as_millis() as u64;
        match &ended.result {
            Ok(message) => info!(job = %job.what(), took_ms, message, "job done"),
            Err(error) => {
                self.counters.step_failures += 1;
                warn!(job = %job.what(), took_ms, error, "job failed");
            }
        }
        if ended.result.is_ok() && matches!(job.what(), JobKind::Promote { .. }) {
            self.counters.promotions += 1;
        }
        self.memory = std::mem::take(&mut self.memory).job_ended(job.what(), &ended.result, now);
        self.memory.in_place = ended.put_back.or(self.memory.in_place);
        self.remember(ended.effects);
    }

    // === Publish ===

    fn publish(&mut self, view: &Arc<View>, plan: &Arc<Plan>) {
        self.counters.rounds += 1;
        (self.counters.renewals, self.counters.renewal_failures) = self.world.keeper.counts();
        let decision = (plan.rule.clone(), plan.reason.clone());
        if self.last.as_ref().map(|(rule, _)| rule) != Some(&plan.rule) || self.is_new(plan) {
            self.decided += 1;
            self.counters.decision_changes += 1;
            let rejected: Vec<String> = plan.rejected.iter().map(|(name, why)| format!("{name}: {why}")).collect();
            info!(
                rule = %plan.rule,
                reason = %plan.reason,
                rejected = %rejected.join("; "),
                term = %view.memory.term,
                "decision changed"
            );
            let decisions = Arc::make_mut(&mut self.decisions);
            decisions.push_back(Decision {
                number: self.decided,
                at_unix_ms: self.world.clock.unix_ms(),
                view: view.clone(),
                plan: plan.clone(),
            });
            if decisions.len() > DECISIONS_KEPT {
                decisions.pop_front();
            }
        }
        self.last = Some(decision);
        self.status.send_replace(Some(Arc::new(Status {
            at: view.now,
            view: view.clone(),
            plan: plan.clone(),
            gate_until: view.gate_until(),
            decisions: self.decisions.clone(),
            counters: self.counters,
        })));
    }

    /// The same rule with another reason is news, but for numbers that only count on (ages, positions).
    fn is_new(&self, plan: &Plan) -> bool {
        let words = |text: &str| -> String { text.chars().filter(|c| !c.is_ascii_digit() && *c != '.').collect() };
        self.last.as_ref().is_none_or(|(_, reason)| words(reason) != words(&plan.reason))
    }

    // === Execute ===

    /// True: the agent may end. The error is how long to wait before the next round.
    async fn execute(&mut self, view: &View, plan: &Plan) -> Result<bool, Duration> {
        let violations = lint::violations(view, plan);
        if !violations.is_empty() {
            error!(rule = %plan.rule, violations = %violations.join("; "), "a plan breaks an invariant and is not carried out");
            return Err(self.policy.timings.heartbeat);
        }
        let records = view.store.records();
        for (i, step) in plan.steps.iter().enumerate() {
            if step.is_job() {
                if self.job.is_none() {
                    self.start_job(plan.steps[i..].to_vec(), view);
                }
                return Ok(false);
            }
            debug!(?step, "step");
            if matches!(step, Step::Kill) {
                // Whatever a job does with PostgreSQL, the kill comes first.
                if let Some(job) = self.job.take() {
                    job.cancel();
                }
                self.counters.kills += 1;
            }
            match self.world.execute(step, records).await {
                Ok(effects) => {
                    if self.remember(effects) {
                        return Ok(true);
                    }
                }
                Err(StepError::Store(DcsError::Conflict { what })) => {
                    debug!(what, "another writer was faster: reading again");
                    return Err(Duration::from_millis(1));
                }
                Err(error) => {
                    self.counters.step_failures += 1;
                    warn!(rule = %plan.rule, %error, "a step failed; the rest of the plan waits for new facts");
                    return Err(FAILURE_PAUSE);
                }
            }
        }
        Ok(false)
    }

    fn start_job(&mut self, steps: Vec<Step>, view: &View) {
        let context = Context { records: view.store.records().cloned(), tags: view.me.tags.clone() };
        let now = self.world.clock.now();
        self.job = RunningJob::start(self.world.clone(), steps, context, now, self.job_ended.clone());
    }

    /// Takes in what steps left; true when the agent may end.
    fn remember(&mut self, effects: Vec<Effect>) -> bool {
        let mut exit = false;
        for effect in effects {
            match effect {
                Effect::Kept { leader_revision } => self.memory.kept_revision = Some(leader_revision),
                Effect::Dropped => self.memory.kept_revision = None,
                Effect::Published { at, record } => self.memory.published = Some((at, *record)),
                Effect::SyncWritten => (self.memory.doubtful_sync, self.memory.sync_settled) = (false, true),
                Effect::SyncDoubtful => self.memory.doubtful_sync = true,
                Effect::Started { follow } => self.memory.started = follow,
                Effect::CrashesForgotten => self.memory.crashes.clear(),
                Effect::Killed => self.memory.enforced = None,
                Effect::Exit => exit = true,
            }
        }
        exit
    }

    // === Wait ===

    /// How long to wait at most when nothing happens.
    fn pause(&self, view: &View, plan: &Plan) -> Duration {
        let mut pause = self.policy.timings.heartbeat;
        if let Some(wake) = plan.wake {
            pause = pause.min(view.now.until(wake)).max(Duration::from_millis(1));
        }
        // Steps were taken: look at what came of them.
        let acted = plan.steps.iter().any(|s| !s.is_job() && !matches!(s, Step::Commit { .. } | Step::Remember { .. }));
        if acted || matches!(view.local.postgres, LocalPostgres::Starting { .. }) {
            pause = pause.min(WATCHFUL);
        }
        let electing = view
            .store
            .records()
            .and_then(|r| r.leader())
            .is_some_and(|l| matches!(l.state, LeaderState::Electing { .. }));
        if electing {
            pause = pause.min(ELECTION_PACE);
        }
        pause
    }

    // === Requests ===

    async fn take_request(&mut self, asked: Asked, view: &View) {
        let answer = self.write_request(&asked, view).await;
        // The asker may have gone away; the request stands all the same.
        let _ = asked.answer.send(answer);
    }

    async fn write_request(&mut self, asked: &Asked, view: &View) -> Result<Taken, NotTaken> {
        let Some(records) = view.store.records() else {
            return Err(NotTaken::NothingWritten("the store cannot be read now".to_owned()));
        };
        if let Some(known) = records.requests.get(&asked.id) {
            return if known.value.what == asked.what { Ok(Taken::Known) } else { Err(NotTaken::IdInUse) };
        }
        // A leader that is missed is as good as none: whoever comes after it has fulfilled the request.
        let silent = view.memory.silence.map(|silence| view.now.since(silence.first_seen)).unwrap_or_default();
        let missed = silent >= self.policy.timings.heartbeat * 2;
        let began = asked.what.begun_when_asked(records.leader(), missed || asked.force.is_some());
        let request = Request {
            id: asked.id.clone(),
            what: asked.what.clone(),
            asked_by: asked.asked_by.clone(),
            at_unix_ms: self.world.clock.unix_ms(),
            timeout_ms: asked.timeout.as_millis() as u64,
            began,
            outcome: None,
            force: asked.force.clone(),
        };
        let transaction = Transaction::when(Key::Request(asked.id.clone()), 0).put(Write::Request(request));
        match self.world.dcs.commit(&transaction, STORE_DEADLINE).await {
            Ok(_) => Ok(Taken::New),
            // Somebody wrote the same id since we read; the next round shows what.
            Err(DcsError::Conflict { .. }) => Ok(Taken::Known),
            Err(error @ DcsError::Timeout { .. }) => Err(NotTaken::Unknown(error.to_string())),
            Err(error) => Err(NotTaken::NothingWritten(error.to_string())),
        }
    }
}

/// Waits until the lease is of another kind (held, lost, none) than the one decided on: renewals alone are no news.
async fn lease_moved(lease: &mut watch::Receiver<LeaseView>, decided_on: &LeaseView) {
    let kind = |lease: &LeaseView| (std::mem::discriminant(lease), lease.term());
    // An error means that the keeper's thread ended, which ends the process anyway; wait for the timer then.
    if lease.wait_for(|now| kind(now) != kind(decided_on)).await.is_err() {
        std::future::pending::<()>().await;
    }
}
