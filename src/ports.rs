//! The whole outside world on one page: the store, PostgreSQL, the fence, the other agents, the clocks.
//!
//! Adapters live in `dcs/`, `postgres/`, `fencing/`; fakes implement the same traits and pass the same contract tests.
//! Every call on the outside takes its deadline from the caller. Nothing here decides anything.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::core::names::MemberName;
use crate::core::peers::{Answer, Question, Tried};
use crate::core::plan::{Follow, PromoteOrder, SyncRule};
use crate::core::records::{ClusterRecords, KeptWal, Position, Transaction};
use crate::core::storage::Storage;
use crate::core::timeline::{History, Term, TimelineId};
use crate::core::view::{DataDirectory, Guard, LocalPostgres};
use crate::core::{Lsn, Moment};

// === The store ===

/// Errors by what the caller does about them.
#[derive(Debug, thiserror::Error)]
pub enum DcsError {
    /// A comparison failed: the view is stale, read again.
    #[error("{what}: another writer was faster")]
    Conflict { what: String },
    /// No answer in time: the write may or may not have happened (S11).
    #[error("{what}: no answer within {within:?}, the outcome is unknown")]
    Timeout { what: String, within: Duration },
    /// Nobody could be reached, nothing was done.
    #[error("{what}: store unavailable: {why}")]
    Unavailable { what: String, why: String },
    /// The store refuses us (credentials, rights, size): retrying does not help.
    #[error("{what}: refused by the store: {why}")]
    Refused { what: String, why: String },
}

#[async_trait]
pub trait Dcs: Send + Sync {
    /// Everything under the cluster's prefix in one linearizable read. Never answered from a cache.
    async fn read(&self, within: Duration) -> Result<ClusterRecords, DcsError>;

    /// One transaction; returns the revision at which it was applied.
    async fn commit(&self, transaction: &Transaction, within: Duration) -> Result<i64, DcsError>;

    /// A counter that grows when something under the prefix may have changed: a hint to read again, nothing more.
    fn changes(&self) -> watch::Receiver<u64>;

    /// A handle of its own (own connections) for the lease keeper's thread; made on that thread.
    async fn separate(&self) -> Result<Box<dyn Dcs>, DcsError>;
}

// === PostgreSQL ===

#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    #[error("{what}: no answer within {within:?}")]
    Timeout { what: String, within: Duration },
    /// PostgreSQL cannot be reached or does not accept connections.
    #[error("{what}: postgresql is not reachable: {why}")]
    Unavailable { what: String, why: String },
    /// PostgreSQL said no; the text is its own with the SQLSTATE.
    #[error("{what}: {why}")]
    Refused { what: String, why: String },
    /// A file, program or directory is not as it has to be; a person may have to act.
    #[error("{what}: {why}")]
    Broken { what: String, why: String },
}

/// How PostgreSQL is to be started: always with `standby.signal` (S8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartMode {
    /// Follows nobody: `recovery_target_timeline = current`, empty `primary_conninfo` and `restore_command`.
    Parked,
    /// Follows the leader of a term.
    Follow(Follow),
}

/// A program with everything the guardian needs to start it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// User and groups to become (uid, gid, supplementary groups); `None`: stay what we are.
    pub user: Option<(u32, u32, Vec<u32>)>,
    /// Standard output and error are appended here.
    pub log_file: PathBuf,
    pub environment: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promotion {
    pub timeline: TimelineId,
    pub parent: TimelineId,
    pub switch: Lsn,
}

/// Another member's PostgreSQL to copy from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub member: MemberName,
    pub host: String,
    pub port: u16,
}

/// Reported by long jobs; the receiver shows it.
pub type Progress = watch::Sender<(Option<u64>, Option<u64>)>;

#[async_trait]
pub trait Postgres: Send + Sync {
    /// What PostgreSQL is and says right now. Not knowing is an answer (S12), so this cannot fail.
    async fn observe(&self, guard: &Guard, within: Duration) -> LocalPostgres;

    /// What is in the data directory. Reads small files only; a disk that does not give them in time makes it unknown.
    async fn data_directory(&self, within: Duration) -> DataDirectory;

    /// What earlier rewinds kept of WAL that only this member had.
    async fn kept(&self) -> Vec<KeptWal> {
        Vec::new()
    }

    /// Writes configuration, `standby.signal` and hba for the given start, removes planted history files that were not
    /// used, checks that nothing would end recovery by itself, and says what the guardian has to start.
    async fn prepare_start(&self, mode: &StartMode) -> Result<Launch, PostgresError>;

    /// Sets or clears whom the running standby follows, and returns when a new connection shows it.
    async fn follow(&self, follow: Option<&Follow>, within: Duration) -> Result<(), PostgresError>;

    /// The procedure of protocol §5 step 2 after the promise is on disk. The position is final when this returns.
    async fn seal(&self, within: Duration) -> Result<Position, PostgresError>;

    /// Plants history files, promotes under the rule that names nobody, waits until PostgreSQL is read-write, puts
    /// `standby.signal` back, and reads which timeline it became. The caller compares with the reservation.
    async fn promote(&self, order: &PromoteOrder, within: Duration) -> Result<Promotion, PostgresError>;

    /// Puts a rule into force, in the order of protocol §4 (file, reload, every walsender, barrier), coming from `from`;
    /// `None`: from an unknown rule, so nothing is presumed. Returns when the barrier has returned.
    async fn enforce(&self, from: Option<&SyncRule>, to: &SyncRule, within: Duration) -> Result<(), PostgresError>;

    /// Ends every walsender whose name is in the list, or which doubles a name.
    async fn end_walsenders(&self, names: &[String], within: Duration) -> Result<(), PostgresError>;

    /// Makes the slots of `members` exist here, drops slots of ours that belong to nobody; on a standby moves them on to
    /// what each member is known to have (`at`).
    async fn keep_slots(&self, members: &[(MemberName, Option<Lsn>)], within: Duration) -> Result<(), PostgresError>;

    async fn checkpoint(&self, within: Duration) -> Result<(), PostgresError>;

    /// End of the shutdown checkpoint record of a cleanly stopped cluster, from the control file; `None`: not cleanly stopped.
    async fn shutdown_position(&self) -> Result<Option<Lsn>, PostgresError>;

    /// Where another member's WAL is flushed to, asked of its PostgreSQL.
    async fn position_of(&self, source: &Source, within: Duration) -> Result<Lsn, PostgresError>;

    /// Re-reads configuration files (SIGHUP after writing them).
    async fn reload(&self) -> Result<(), PostgresError>;

    // --- jobs: long, run aside, cancelled by dropping ---

    /// initdb with checksums, roles, first configuration. Refuses a directory that is not empty. Returns the system identifier.
    async fn bootstrap(&self) -> Result<u64, PostgresError>;

    /// pg_basebackup into the (empty) data directory.
    async fn clone_from(&self, source: &Source, progress: Progress) -> Result<(), PostgresError>;

    /// pg_rewind against `source`; keeps diverging WAL and lists its transactions first.
    async fn rewind(
        &self,
        source: &Source,
        leader_history: &History,
        timeline: TimelineId,
    ) -> Result<String, PostgresError>;

    /// Renames the data directory to one beside it (never deletes: S5), keeping the newest within the disk budget.
    /// Returns where it is now.
    async fn set_aside(&self, why: &str) -> Result<PathBuf, PostgresError>;
}

// === The fence ===

#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    #[error("{what}: guardian unreachable: {why}")]
    Unavailable { what: String, why: String },
    #[error("{what}: refused by the guardian: {why}")]
    Refused { what: String, why: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGINT: fast shutdown with a checkpoint.
    Fast,
    /// SIGHUP.
    Reload,
}

/// What a kill achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Killed {
    /// Nothing was running.
    pub was_down: bool,
    /// Processes in uninterruptible sleep with SIGKILL pending: they run no instruction of their own any more.
    pub survivors: u32,
}

/// The guardian's page: written without a system call, so the lease keeper can do it at any time.
pub trait DeadlinePage: Send + Sync {
    /// F for the armed term. Only grows; the guardian ignores values beyond now + T_h.
    fn extend(&self, term: Term, deadline: Moment);
    /// The gate passes nothing from `at` on, until a later word of the same term. Fakes without a gate leave it.
    fn hold_from(&self, _term: Term, _at: Moment) {}
    /// The gate passes nothing of this term or an older one any more, from before its next write to a client on.
    fn shut(&self, _term: Term) {}
    /// When the guardian last said that it is alive.
    fn guardian_alive_at(&self) -> Moment;
}

#[async_trait]
pub trait Fence: Send + Sync {
    /// Starts the guardian if none runs, attaches to it, and takes the page. Called at start and after its death.
    async fn attach(&self) -> Result<(), FenceError>;
    /// What the guardian says: is PostgreSQL running, how did it end, what is armed.
    async fn status(&self) -> Guard;
    /// From now on PostgreSQL dies at the page's deadline of this term.
    async fn arm(&self, term: Term, deadline: Moment) -> Result<(), FenceError>;
    /// Only accepted when PostgreSQL is dead or was never armed.
    async fn disarm(&self) -> Result<(), FenceError>;
    async fn start(&self, launch: &Launch) -> Result<(), FenceError>;
    async fn signal(&self, signal: StopSignal) -> Result<(), FenceError>;
    /// Kills the whole control group and waits at most `within` for it to be empty.
    async fn kill(&self, within: Duration) -> Result<Killed, FenceError>;
    fn page(&self) -> Option<std::sync::Arc<dyn DeadlinePage>>;
    /// Grows when PostgreSQL started or ended, or the guardian went away.
    fn changes(&self) -> watch::Receiver<u64>;
    /// Ends the guardian; refused while PostgreSQL runs.
    async fn dismiss(&self) -> Result<(), FenceError>;
}

// === Disks ===

/// How far the storage probes came. Never touches a disk and never waits.
pub trait Disks: Send + Sync {
    fn look(&self) -> Storage;
}

// === The other agents ===

/// Errors by what they tell of the other member.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Its host answers, and nobody listens on the agent port.
    #[error("{member}: connection refused")]
    Refused { member: MemberName },
    /// No answer in time, or no way to it.
    #[error("{member}: no answer: {why}")]
    Silent { member: MemberName, why: String },
    /// Something answered that is not this member of this cluster, or would not answer us.
    #[error("{member}: {why}")]
    Foreign { member: MemberName, why: String },
}

/// The way to the agents of the other members. Connections are kept open; every call has its deadline.
#[async_trait]
pub trait Peers: Send + Sync {
    /// One question, one answer. That the answer is from this member of this cluster has been checked.
    async fn ask(&self, member: &MemberName, question: &Question, within: Duration) -> Result<Answer, PeerError>;

    /// Tries PostgreSQL's port of the member: connects and goes away.
    async fn knock(&self, member: &MemberName, within: Duration) -> Tried;

    /// Returns when the kept connection to the member's agent has ended; at once when there is none.
    async fn parted(&self, member: &MemberName);

    /// A handle of its own (own connections) for a thread that nothing may block.
    fn separate(&self) -> Box<dyn Peers>;
}

/// What this agent answers to the others. Called on the API's thread: must not wait for PostgreSQL, store or loop.
#[async_trait]
pub trait Answering: Send + Sync {
    /// `None`: there is nothing to say yet, which is no sign of life.
    async fn answer(&self, question: Question) -> Option<Answer>;
}

// === Clocks ===

pub trait Clock: Send + Sync {
    fn now(&self) -> Moment;
    /// Milliseconds since 1970: for people only.
    fn unix_ms(&self) -> u64;
}
