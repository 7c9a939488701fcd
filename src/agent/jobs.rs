//! What takes longer than a round: one at a time, run aside, seen in the next view. A job takes the rest of its plan with it:
//! the steps after it are done when it has succeeded, and not at all when it has failed.
//!
//! A job is cancelled by dropping it (a kill ends whatever is done with PostgreSQL).

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::execute::{Effect, FILE_DEADLINE, KILL_DEADLINE, StepError, World};
use crate::core::plan::{HandOver, PromoteOrder, Source, Step, SyncRule};
use crate::core::records::{ClusterRecords, Key, SealRecord, Tags, Transaction, Write};
use crate::core::timeline::{History, Term, TimelineId};
use crate::core::view::{DataDirectory, GuardState, Job, JobKind};
use crate::core::{Lsn, Moment};
use crate::ports::{Fence, StartMode, StopSignal};

const SEAL_DEADLINE: Duration = Duration::from_secs(3);
const PROMOTE_DEADLINE: Duration = Duration::from_secs(10);
/// A barrier that does not return for so long is given up and decided anew (the standby may be gone).
const ENFORCE_DEADLINE: Duration = Duration::from_secs(3);
const VERIFY_DEADLINE: Duration = Duration::from_secs(2);

/// A job that runs or has ended.
pub struct RunningJob {
    what: JobKind,
    since: Moment,
    progress: watch::Receiver<(Option<u64>, Option<u64>)>,
    outcome: Arc<Mutex<Option<Ended>>>,
    task: JoinHandle<()>,
}

/// How a job ended, with what its steps left for the memory.
pub struct Ended {
    pub result: Result<String, String>,
    pub effects: Vec<Effect>,
    /// A hand-over that stopped PostgreSQL and could not go on.
    pub put_back: Option<Term>,
}

/// What a job needs to know beyond its step.
pub struct Context {
    pub records: Option<ClusterRecords>,
    pub tags: Tags,
}

impl RunningJob {
    /// Starts the first of `steps`, which is a job, and what follows it. `wake` is told when it has ended.
    pub fn start(
        world: World,
        steps: Vec<Step>,
        context: Context,
        now: Moment,
        wake: Arc<tokio::sync::Notify>,
    ) -> Option<RunningJob> {
        let what = kind(steps.first()?)?;
        let (progress_tx, progress) = watch::channel((None, None));
        let outcome = Arc::new(Mutex::new(None));
        let place = outcome.clone();
        let task = tokio::spawn(async move {
            let mut ended = Ended { result: Ok(String::new()), effects: Vec::new(), put_back: None };
            for step in &steps {
                let done = if step.is_job() {
                    run(&world, step, &context, &progress_tx, &mut ended).await
                } else {
                    world.execute(step, context.records.as_ref()).await.map(|effects| {
                        ended.effects.extend(effects);
                        String::new()
                    })
                };
                match done {
                    Ok(message) if message.is_empty() => {}
                    Ok(message) => ended.result = Ok(message),
                    Err(error) => {
                        ended.result = Err(error.to_string());
                        break;
                    }
                }
            }
            *place.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(ended);
            wake.notify_one();
        });
        Some(RunningJob { what, since: now, progress, outcome, task })
    }

    pub fn what(&self) -> &JobKind {
        &self.what
    }

    pub fn since(&self) -> Moment {
        self.since
    }

    pub fn view(&self) -> Job {
        let (done_bytes, total_bytes) = *self.progress.borrow();
        Job { what: self.what.clone(), since: self.since, done_bytes, total_bytes, result: None }
    }

    /// Takes how it ended; `None` while it runs. A job whose task died without a word has failed.
    pub fn ended(&mut self) -> Option<Ended> {
        let ended = self.outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        match ended {
            Some(ended) => Some(ended),
            None if self.task.is_finished() => Some(Ended {
                result: Err("the job ended without a result".to_owned()),
                effects: Vec::new(),
                put_back: None,
            }),
            None => None,
        }
    }

    pub fn cancel(self) {
        self.task.abort();
    }
}

impl Drop for RunningJob {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn kind(step: &Step) -> Option<JobKind> {
    Some(match step {
        Step::Seal { term, .. } => JobKind::Seal { term: *term },
        Step::Promote { order } => JobKind::Promote { term: order.term },
        Step::Enforce { to, .. } => JobKind::Enforce { to: to.clone() },
        Step::Bootstrap => JobKind::Bootstrap,
        Step::Clone { from } => JobKind::Clone { from: from.member.clone() },
        Step::Rewind { from, .. } => JobKind::Rewind { from: from.member.clone() },
        Step::HandOver { order } => JobKind::HandOver { to: order.to.as_ref().map(|s| s.member.clone()) },
        Step::RestartInPlace { .. } => JobKind::Restart,
        Step::Stop { .. } => JobKind::Stop,
        _ => return None,
    })
}

async fn run(
    world: &World,
    step: &Step,
    context: &Context,
    progress: &watch::Sender<(Option<u64>, Option<u64>)>,
    ended: &mut Ended,
) -> Result<String, StepError> {
    match step {
        Step::Seal { term, leader_revision } => seal(world, *term, *leader_revision, context).await,
        Step::Promote { order } => promote(world, order).await,
        Step::Enforce { from, to } => enforce(world, from.as_ref(), to).await,
        Step::Bootstrap => {
            let system_identifier = world.postgres.bootstrap().await?;
            world.state().join(system_identifier)?;
            Ok(format!("created cluster {system_identifier}"))
        }
        Step::Clone { from } => {
            world.postgres.as_ref().clone_from(&source(from), progress.clone()).await?;
            Ok(format!("cloned from {}", from.member))
        }
        Step::Rewind { from, timeline } => {
            stop(world, Duration::from_secs(60)).await?;
            let reservations = context.records.as_ref().map(|r| &r.timelines);
            let history = reservations
                .and_then(|r| History::from_reservations(*timeline, r))
                .ok_or_else(|| StepError::Other(format!("the history of timeline {timeline} is not known")))?;
            rewind(world, from, &history, *timeline).await
        }
        Step::HandOver { order } => {
            let before = ended.effects.len();
            let result = hand_over(world, order, ended).await;
            if result.is_err() && ended.effects.len() == before && is_down(world.fence.as_ref()).await {
                ended.put_back = Some(order.term);
            }
            result
        }
        Step::RestartInPlace { timeout } => {
            stop(world, *timeout).await?;
            start_parked(world).await?;
            ended.effects.push(Effect::CrashesForgotten);
            Ok("restarted".to_owned())
        }
        Step::Stop { timeout } => {
            stop(world, *timeout).await?;
            Ok("stopped".to_owned())
        }
        other => Err(StepError::Other(format!("{other:?} is not a job"))),
    }
}

/// Rewound data need the leader's WAL to become consistent; data that a failed attempt did not touch do not.
async fn rewind(world: &World, from: &Source, history: &History, timeline: TimelineId) -> Result<String, StepError> {
    world.state().must_follow(true)?;
    let rewound = world.postgres.rewind(&source(from), history, timeline).await;
    if rewound.is_err() && matches!(world.postgres.data_directory(FILE_DEADLINE).await, DataDirectory::Present { .. }) {
        world.state().must_follow(false)?;
    }
    Ok(rewound?)
}

fn source(from: &Source) -> crate::ports::Source {
    crate::ports::Source { member: from.member.clone(), host: from.host.clone(), port: from.port }
}

/// The member's word on disk, then PostgreSQL's silence, then the position in the store (protocol §5 step 2).
async fn seal(world: &World, term: Term, leader_revision: i64, context: &Context) -> Result<String, StepError> {
    if !world.state().seal(term)? {
        return Err(StepError::Other(format!("a higher term than {term} is sealed already")));
    }
    let position = world.postgres.seal(SEAL_DEADLINE).await?;
    let id = world.state().id();
    let message = format!("sealed for term {term} at {} of timeline {}", position.replayed, position.timeline);
    let record = SealRecord { term, incarnation: id.incarnation, position, tags: context.tags.clone() };
    let transaction = Transaction::when(Key::Leader, leader_revision).put(Write::Seal(id.name, record));
    world.commit("publish the seal", &transaction).await?;
    Ok(message)
}

/// The guardian is armed before PostgreSQL may write, and PostgreSQL is killed if it is not what was reserved.
async fn promote(world: &World, order: &PromoteOrder) -> Result<String, StepError> {
    world.arm(order.term).await?;
    let promoted = match world.postgres.promote(order, PROMOTE_DEADLINE).await {
        Ok(promoted) => promoted,
        Err(error) => {
            // Half promoted is not a state to leave behind.
            warn!(%error, "promotion failed: killing postgresql");
            world.fence.kill(KILL_DEADLINE).await?;
            return Err(error.into());
        }
    };
    let reserved = (order.timeline, order.parent, order.switch);
    if (promoted.timeline, promoted.parent, promoted.switch) != reserved {
        world.fence.kill(KILL_DEADLINE).await?;
        return Err(StepError::Other(format!("promoted to {promoted:?}, reserved was {reserved:?}: killed (S6)")));
    }
    Ok(format!("promoted to timeline {}", promoted.timeline))
}

async fn enforce(world: &World, from: Option<&SyncRule>, to: &SyncRule) -> Result<String, StepError> {
    world.postgres.enforce(from, to, ENFORCE_DEADLINE).await?;
    Ok(format!("`{to}` is in force"))
}

/// Checkpoint, fast stop, verification, release (protocol §8). Until the stop a failure leaves everything as it was.
async fn hand_over(world: &World, order: &HandOver, ended: &mut Ended) -> Result<String, StepError> {
    world.postgres.checkpoint(order.checkpoint_timeout).await?;
    let stopped = stop(world, order.stop_timeout).await;
    if let Err(error) = stopped {
        warn!(%error, "postgresql did not stop in time: killing it");
        world.fence.kill(KILL_DEADLINE).await?;
    }
    if let Some(target) = &order.to {
        let end = world.postgres.shutdown_position().await?;
        match end {
            Some(end) => verify(world, &source(target), end).await?,
            None => {
                return Err(StepError::Other("postgresql was not shut down cleanly: put back where it was".to_owned()));
            }
        }
    }
    ended.effects.extend(world.commit("release the term", &order.release).await?);
    world.keeper.drop_lease();
    ended.effects.push(Effect::Dropped);
    Ok(match &order.to {
        Some(to) => format!("handed over to {}", to.member),
        None => "released".to_owned(),
    })
}

/// The target has flushed the shutdown checkpoint record: nothing of ours is missing there.
async fn verify(world: &World, target: &crate::ports::Source, end: Lsn) -> Result<(), StepError> {
    let began = world.clock.now();
    let mut last = String::new();
    while world.clock.now().since(began) < VERIFY_DEADLINE {
        match world.postgres.position_of(target, VERIFY_DEADLINE).await {
            Ok(position) if position >= end => return Ok(()),
            Ok(position) => last = format!("it has {position}"),
            Err(error) => last = error.to_string(),
        }
        // PostgreSQL offers no event for another server's position.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Err(StepError::Other(format!("{} does not have everything up to {end}: {last}", target.member)))
}

async fn is_down(fence: &dyn Fence) -> bool {
    matches!(fence.status().await.state, GuardState::Idle { .. })
}

/// A fast shutdown, awaited.
async fn stop(world: &World, timeout: Duration) -> Result<(), StepError> {
    let mut changes = world.fence.changes();
    if is_down(world.fence.as_ref()).await {
        return Ok(());
    }
    info!("stopping postgresql (fast)");
    world.fence.signal(StopSignal::Fast).await?;
    let waited = tokio::time::timeout(timeout, async {
        while !is_down(world.fence.as_ref()).await {
            if changes.changed().await.is_err() {
                return;
            }
        }
    })
    .await;
    waited.map_err(|_| StepError::Other(format!("postgresql did not stop within {timeout:?}")))
}

async fn start_parked(world: &World) -> Result<(), StepError> {
    let launch = world.postgres.prepare_start(&StartMode::Parked).await?;
    world.fence.disarm().await?;
    world.fence.start(&launch).await?;
    Ok(())
}
