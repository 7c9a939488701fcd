//! Everything a decision may know, as one value. Every observed part says when it was observed; "unknown" is a variant.
//! A view is complete and serialisable: `/v1/decisions` keeps them, `pgvigil explain --replay` decides them again.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lease::{Takeover, Timings};
use super::lsn::Lsn;
use super::names::{MemberId, MemberName};
use super::peers::Peer;
use super::plan::{Follow, SyncRule};
use super::records::{ClusterRecords, Durability, KeptWal, LeaderRecord, MemberRecord, Outcome, Tags};
use super::route::EndpointPorts;
use super::storage::{Place, Storage, StoragePolicy};
use super::time::Moment;
use super::timeline::{History, Term, TimelineId};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct View {
    pub now: Moment,
    pub me: Me,
    pub policy: Policy,
    pub local: Local,
    pub store: Store,
    pub lease: LeaseView,
    pub memory: Memory,
    /// The other members, by their agents' own word and by how their ports behave.
    #[serde(default)]
    pub peers: BTreeMap<MemberName, Peer>,
    pub job: Option<Job>,
    /// The agent was told to stop (SIGTERM): hand over, then stop PostgreSQL.
    pub stopping: bool,
}

impl View {
    /// Until when clients may be served under the lease that this member holds, in sync mode: whoever takes over without
    /// waiting for clocks does so later (S4). Moved on by every renewal; `None`: no lease, or its D alone counts (async).
    pub fn gate_until(&self) -> Option<Moment> {
        let LeaseView::Held { deadline, .. } = &self.lease else { return None };
        let claimed = self.store.records().and_then(|records| records.sync.value()).map(|claim| claim.mode);
        match claimed.unwrap_or(self.policy.durability) {
            Durability::Async => None,
            Durability::Sync | Durability::Strict => {
                Some(deadline.minus(self.policy.timings.ttl).plus(self.policy.takeover.gate()))
            }
        }
    }
}

/// Who this agent is: from the configuration and the state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Me {
    pub id: MemberId,
    pub boot_id: String,
    pub start_counter: u64,
    pub tags: Tags,
    /// What the state file remembers of the cluster; `None` before the member ever belonged to one.
    pub system_identifier: Option<u64>,
    /// All members named in the configuration, this one included.
    pub configured: Vec<MemberName>,
    pub host: String,
    pub port: u16,
    pub api_url: String,
    #[serde(default)]
    pub endpoint: Option<EndpointPorts>,
    pub agent_version: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    pub timings: Timings,
    pub durability: Durability,
    /// Acknowledgements from standbys that a commit needs (k) while enough are there.
    pub k: u32,
    pub max_stall: Duration,
    /// Async: how far behind a standby may be and still be promoted.
    pub max_lag: u64,
    pub election_wait: Duration,
    pub election_give_up: Duration,
    /// Prefer a standby to a restart in place when PostgreSQL crashes.
    pub crash_failover: bool,
    pub crash_max_restarts: u32,
    pub crash_window: Duration,
    pub start_timeout: Duration,
    pub stop_timeout: Duration,
    pub member_publish: Duration,
    /// A standby that follows for so long without streaming, while its leader is well, is cloned anew.
    pub rejoin_timeout: Duration,
    /// Sets diverged data aside and clones when a rewind is not possible.
    pub reclone: bool,
    #[serde(default)]
    pub storage: StoragePolicy,
    #[serde(default)]
    pub takeover: Takeover,
    /// Async: how long the last primary is waited for when everything was off; then a person decides.
    #[serde(default)]
    pub cold_start_wait: Duration,
}

// === What is here ===

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Local {
    pub observed_at: Moment,
    pub data: DataDirectory,
    pub postgres: LocalPostgres,
    pub guard: Guard,
    #[serde(default)]
    pub storage: Storage,
    /// What earlier rejoins kept of WAL that only this member had.
    #[serde(default)]
    pub kept: Vec<KeptWal>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum DataDirectory {
    /// Missing or empty.
    Empty,
    Present {
        system_identifier: u64,
        /// Timeline of the last checkpoint in the control file.
        checkpoint_timeline: TimelineId,
        /// PostgreSQL's major version from PG_VERSION.
        version: u32,
        cleanly_stopped: bool,
    },
    /// A job of ours was interrupted in it (initdb, clone, rewind): it is not a database.
    Unfinished {
        what: String,
    },
    /// Something else is in it: refused, nothing is touched (S7).
    Foreign {
        why: String,
    },
    Unknown {
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum LocalPostgres {
    /// The guardian says that no process of it is left.
    Down,
    /// Processes run, no connection is accepted yet.
    Starting {
        why: String,
    },
    Standby(StandbyFacts),
    Primary(PrimaryFacts),
    Unknown {
        why: String,
    },
}

impl LocalPostgres {
    pub fn standby(&self) -> Option<&StandbyFacts> {
        match self {
            LocalPostgres::Standby(facts) => Some(facts),
            _ => None,
        }
    }

    pub fn primary(&self) -> Option<&PrimaryFacts> {
        match self {
            LocalPostgres::Primary(facts) => Some(facts),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StandbyFacts {
    /// Version of the running server (`server_version_num`).
    pub version: u32,
    pub system_identifier: u64,
    /// Timeline being replayed, its ancestors, and how far.
    pub timeline: TimelineId,
    pub history: History,
    pub replayed: Lsn,
    pub received: Option<Lsn>,
    pub replay_paused: bool,
    /// Milliseconds since the last replayed commit; `None`: none replayed yet.
    pub replay_delay_ms: Option<u64>,
    /// What the running server has for primary_conninfo, as a `Follow`; `None`: parked.
    pub follows: Option<Follow>,
    pub receiver: Receiver,
    /// The receiver's last message from its walsender; `None`: it does not stream.
    #[serde(default)]
    pub last_message: Option<LastMessage>,
    pub pending_restart: bool,
    pub slots: BTreeMap<String, Option<Lsn>>,
}

/// When a walreceiver last heard something, by the wall clock of its host. Only that `mark` changes is a fact; the age is
/// believed no further than from one look to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastMessage {
    pub mark: u64,
    pub age_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Receiver {
    None,
    Connecting,
    Streaming,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrimaryFacts {
    pub version: u32,
    pub system_identifier: u64,
    pub timeline: TimelineId,
    pub history: History,
    pub flushed: Lsn,
    /// False when default_transaction_read_only is on.
    pub writable: bool,
    /// `synchronous_standby_names` as the server shows it.
    pub rule_text: String,
    pub replicas: Vec<Replica>,
    /// Where each keeps WAL from; `None`: it keeps none any more (its WAL was removed, or it never had any).
    pub slots: BTreeMap<String, Option<Lsn>>,
    /// `max_slot_wal_keep_size` in bytes; `None`: unlimited, or not known.
    #[serde(default)]
    pub slot_bound: Option<u64>,
    pub pending_restart: bool,
    /// Settings that weaken durability behind our back, one sentence each.
    pub exceptions: Vec<String>,
}

/// A row of pg_stat_replication.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replica {
    pub pid: i32,
    pub application_name: String,
    pub state: String,
    pub flushed: Option<Lsn>,
    pub replayed: Option<Lsn>,
    pub sync_priority: i32,
    /// Milliseconds since its last reply.
    pub reply_age_ms: Option<u64>,
}

/// What the guardian says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    pub state: GuardState,
    /// Real-time priority, cgroup.kill, guardian's own death covered: shown, and K follows from the first.
    pub real_time: bool,
    pub control_group: bool,
    pub death_covered: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum GuardState {
    /// No guardian answers: nothing may be promoted, no lease may be renewed.
    Absent {
        why: String,
    },
    /// No process of PostgreSQL is left. `exit` tells how the last one ended, when one did.
    Idle {
        exit: Option<Exit>,
    },
    /// Killed, but processes in uninterruptible sleep are left; a start has to wait.
    Survivors {
        count: u32,
    },
    Running {
        postmaster: i32,
        armed: Option<Term>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// `exit code 1`, `signal 9`, `killed by the guardian: deadline of term 4 passed`, …
    pub how: String,
    /// The postmaster ended by itself with status 0: an orderly shutdown.
    pub orderly: bool,
    /// Counts the starts of PostgreSQL under this guardian, so that each end is seen once.
    pub start_number: u64,
}

// === What the store says ===

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Store {
    Known {
        observed_at: Moment,
        records: Box<ClusterRecords>,
    },
    /// Not readable now. The last reading is kept for showing, never for deciding.
    Unknown {
        why: String,
        since: Moment,
    },
}

impl Store {
    pub fn records(&self) -> Option<&ClusterRecords> {
        match self {
            Store::Known { records, .. } => Some(records),
            Store::Unknown { .. } => None,
        }
    }
}

/// The lease keeper's word.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum LeaseView {
    #[default]
    None,
    /// Told to keep this term; no renewal has succeeded yet.
    Claimed { term: Term },
    /// `deadline` is D, counted from before the last successful renewal was sent.
    Held { term: Term, deadline: Moment },
    /// A renewal found another record. `deadline` is what was left of the last renewal that succeeded.
    Lost { term: Term, deadline: Option<Moment> },
}

impl LeaseView {
    pub fn term(&self) -> Option<Term> {
        match self {
            LeaseView::None => None,
            LeaseView::Claimed { term } | LeaseView::Held { term, .. } | LeaseView::Lost { term, .. } => Some(*term),
        }
    }

    /// Holds `term`, and no clock has reached D.
    pub fn valid(&self, term: Term, now: Moment) -> bool {
        matches!(self, LeaseView::Held { term: held, deadline } if *held == term && !now.any_reached(*deadline))
    }
}

// === What is remembered ===

/// Kept between rounds. `durable` is in the state file (fsync before anybody hears of it); the rest dies with the agent,
/// and forgetting it is always safe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    pub durable: Durable,
    /// The term that the per-term parts below belong to.
    pub term: Term,
    /// When that term was first seen here.
    pub term_since: Option<Moment>,
    pub silence: Option<Silence>,
    /// Signs of life of the holder of the leader record that this member saw with its own eyes.
    #[serde(default)]
    pub holder: Option<HolderMemory>,
    pub releases: Option<SeenRelease>,
    /// Since when each member of the published set has not acknowledged, as this leader saw it.
    pub stalled: BTreeMap<MemberName, Moment>,
    /// How far each follower of this leader has acknowledged.
    #[serde(default)]
    pub progress: BTreeMap<MemberName, Progress>,
    /// Where this leader's WAL ended when PostgreSQL was last seen.
    #[serde(default)]
    pub end: Option<Lsn>,
    /// Members that left the set because they did not acknowledge: what they have to show before they return.
    #[serde(default)]
    pub left: BTreeMap<MemberName, Left>,
    /// When the loop came round before.
    #[serde(default)]
    pub round: Option<Moment>,
    /// Places whose write has not returned or fails: when it began by the probe's word, and since when it counts here.
    #[serde(default)]
    pub storage: BTreeMap<Place, (Moment, Moment)>,
    /// Standbys that streamed from here when PostgreSQL was last seen as a primary, and how far each had flushed.
    pub streamed: BTreeMap<MemberName, (Lsn, Moment)>,
    /// Beats of the other members and when each was last seen to change.
    pub beats: BTreeMap<MemberName, (u64, Moment)>,
    /// When each other member's record was last seen to *change*: a record that only stands there may be of the past.
    #[serde(default)]
    pub spoke: BTreeMap<MemberName, Moment>,
    /// PostgreSQL here has run since before a leader's sign of life was last seen.
    #[serde(default)]
    pub witness: bool,
    /// The rule that a barrier confirmed under the present term; `None`: unknown.
    pub enforced: Option<SyncRule>,
    /// A write of `sync` whose outcome is unknown: enough for both claims is enforced until a later write succeeds.
    pub doubtful_sync: bool,
    /// A write of `sync` of ours has succeeded under this term since the agent started. Until then one of an earlier life
    /// may still land, so nothing is enforced by the claim as read.
    pub sync_settled: bool,
    /// Revision of the leader record that the lease keeper renews against.
    pub kept_revision: Option<i64>,
    /// A promotion of this term was tried and failed.
    pub promotion_failed: Option<Term>,
    /// Our own election of this term, and when it began.
    pub election: Option<ElectionMemory>,
    /// The last term that was taken from this member while its PostgreSQL was read-write.
    #[serde(default)]
    pub overtaken: Option<Term>,
    /// When this member became a promoted winner, per term.
    pub promoted: Option<(Term, Moment)>,
    /// Crashes of PostgreSQL within the window, by start number.
    pub crashes: Vec<(u64, Moment)>,
    /// Whom PostgreSQL was last started to follow.
    pub started: Option<Follow>,
    pub rejoin_failures: u32,
    /// Copies that were made since this member last streamed: each sets the one before aside.
    #[serde(default)]
    pub copies: u32,
    /// Nothing of this kind is tried again before.
    pub retry_after: Option<Moment>,
    /// Operations being worked on here.
    pub operation: Option<OperationMemory>,
    /// A hand-over under this term stopped PostgreSQL and was put back: it is started again here.
    pub in_place: Option<Term>,
    /// Start number of the last end of PostgreSQL that was taken in.
    pub last_exit: u64,
    /// Phases of the present change of leader in milliseconds since its first, for the history record.
    pub phases: BTreeMap<String, u64>,
    pub phase_zero: Option<Moment>,
    /// Our own `held` record while we lead: what to write again when somebody destroys it.
    pub held: Option<LeaderRecord>,
    /// When our own member record was last written, and what it said.
    pub published: Option<(Moment, MemberRecord)>,
    /// Since when this standby has followed without streaming.
    pub not_streaming: Option<Moment>,
}

/// How a follower acknowledges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub flushed: Lsn,
    /// When it was last seen to have all there was to have, or more than before.
    pub fine_at: Moment,
    /// Since when that was so each time; `None`: it is not so now.
    pub fine_since: Option<Moment>,
}

/// A member that left the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Since when it had not acknowledged then.
    pub stalled: Moment,
    /// How often within the last ten minutes.
    pub times: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Durable {
    /// Highest term seen in the store: a store that says less is not believed.
    pub highest_term: Term,
    /// Highest term sealed: no WAL from a leader of a lower one is taken any more.
    pub sealed_term: Term,
    pub highest_sync_term: Term,
    pub store_id: u64,
    pub store_revision: i64,
    /// The data were copied or rewound from another member and have not been consistent since: they need WAL that only a
    /// leader has, so PostgreSQL is started following one, never parked.
    pub must_follow: bool,
}

/// Since when the store shows the same lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silence {
    pub term: Term,
    pub leader_revision: i64,
    pub seq: u64,
    pub first_seen: Moment,
}

/// What this member saw of one holder in one term.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HolderMemory {
    pub member: MemberName,
    pub term: Term,
    /// Its agent answered, its PostgreSQL streamed to this member: only then do refusals mean anything.
    pub agent_answered: bool,
    pub postgres_answered: bool,
    /// Mark of the last message from its walsender, and when that came.
    pub wal: Option<(u64, Moment)>,
    /// When this member's own PostgreSQL was last looked at.
    pub looked_at: Option<Moment>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenRelease {
    pub leader_revision: i64,
    pub first_seen: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ElectionMemory {
    pub term: Term,
    pub since: Moment,
    /// When as many seals as needed were first there.
    pub enough_since: Option<Moment>,
    /// How far a member that copies WAL from another has come, and since when.
    #[serde(default)]
    pub copied: Option<(Lsn, Moment)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationMemory {
    pub id: String,
    pub phase: String,
    pub since: Moment,
    pub outcome: Option<Outcome>,
}

// === What runs ===

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub what: JobKind,
    pub since: Moment,
    pub done_bytes: Option<u64>,
    pub total_bytes: Option<u64>,
    /// `None` while it runs.
    pub result: Option<Result<String, String>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum JobKind {
    Bootstrap,
    Clone {
        from: MemberName,
    },
    Rewind {
        from: MemberName,
    },
    /// Stop cleanly, verify, release: the middle of a switchover or of an orderly stop.
    HandOver {
        to: Option<MemberName>,
    },
    Restart,
    Stop,
    Seal {
        term: Term,
    },
    Promote {
        term: Term,
    },
    Enforce {
        to: SyncRule,
    },
}

impl fmt::Display for JobKind {
    /// For people: what is under way.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JobKind::Bootstrap => f.write_str("initdb"),
            JobKind::Clone { from } => write!(f, "clone from {from}"),
            JobKind::Rewind { from } => write!(f, "rewind against {from}"),
            JobKind::HandOver { to: Some(to) } => write!(f, "hand over to {to}"),
            JobKind::HandOver { to: None } => f.write_str("hand over"),
            JobKind::Restart => f.write_str("restart"),
            JobKind::Stop => f.write_str("stop"),
            JobKind::Seal { term } => write!(f, "seal for term {term}"),
            JobKind::Promote { term } => write!(f, "promote under term {term}"),
            JobKind::Enforce { to: SyncRule::Cleared } => f.write_str("let commits wait for nobody"),
            JobKind::Enforce { to } => write!(f, "enforce {to}"),
        }
    }
}
