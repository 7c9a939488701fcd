//! What stands in the store, as values. Key names and wire format (JSON, version, unknown fields kept) are `dcs/schema.rs`'s.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::lsn::Lsn;
use super::names::{Incarnation, MemberId, MemberName};
use super::route::EndpointPorts;
use super::timeline::{History, Term, TimelineId};

/// `init`: which cluster this is. Written once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInit {
    pub system_identifier: u64,
}

/// `leader`: who may act, under which term. Changes only with term or state; the heartbeat lives in [`LeaseRecord`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderRecord {
    /// Who renews the lease of this term: the coordinator, then the winner, then the leader.
    pub holder: MemberId,
    pub boot_id: String,
    pub term: Term,
    pub state: LeaderState,
    /// T_h of the holder in milliseconds. A candidate waits for its own W or for this one's, whichever is longer.
    pub ttl_ms: u64,
    /// After how much silence the holder expects to be overtaken where no clock is needed (`takeover.after`): its gate holds
    /// from a little before. A candidate waits for its own or for this one's, whichever is longer.
    #[serde(default)]
    pub takeover_ms: u64,
    /// Set when this term began by taking it from a silent holder before W.
    #[serde(default)]
    pub taken: Option<Taken>,
    /// While electing: the last position that the leader before had published with its heartbeat.
    #[serde(default)]
    pub lsn: Option<Lsn>,
    /// The last leader that published `held`; kept through `electing` until the next one publishes.
    pub last: Option<Published>,
}

/// From whom a term was taken on suspicion: whether it was right shows later, and decides how patient the next one is (L5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    pub from: MemberId,
    /// The term that was taken from it.
    pub term: Term,
    /// How often `takeover.after` was doubled when it was taken.
    pub doubled: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum LeaderState {
    /// A coordinator collects seals; with a winner, the winner holds the record and is being promoted.
    Electing { coordinator: MemberName, preferred: Option<MemberName>, winner: Option<Winner> },
    /// PostgreSQL of the holder is read-write.
    Held,
    /// The holder is finished and will never be leader under this term again. A name binds candidates for one second.
    Released { to: Option<MemberName>, why: String },
    /// As released, but processes of the old leader are still in uninterruptible sleep with SIGKILL pending.
    Fenced { survivors: u32 },
}

/// Whom the coordinator chose, and the timeline that was reserved for the promotion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Winner {
    pub member: MemberId,
    pub timeline: TimelineId,
    pub parent: TimelineId,
    pub switch: Lsn,
}

/// The last leader that was open for writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    pub member: MemberId,
    pub term: Term,
    pub timeline: TimelineId,
    pub parent: Option<TimelineId>,
    pub switch: Option<Lsn>,
}

/// `lease`: the holder's heartbeat. `lsn` is its flush position when PostgreSQL is read-write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    pub term: Term,
    pub seq: u64,
    pub lsn: Option<Lsn>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// Acknowledged is what `k` standbys have flushed too; goes on with fewer, after saying so in the store.
    #[default]
    Sync,
    /// As `sync`, but waits rather than going on with fewer.
    Strict,
    /// The primary's disk alone.
    Async,
}

/// `sync`: "every acknowledged commit is flushed on `primary` and on at least `k` of `members`" (C, P, M, k of protocol §0).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncClaim {
    pub mode: Durability,
    pub primary: MemberId,
    pub members: BTreeSet<MemberId>,
    pub k: u32,
    pub term: Term,
}

impl SyncClaim {
    /// C = {P} ∪ M.
    pub fn electorate(&self) -> BTreeSet<MemberId> {
        let mut all = self.members.clone();
        all.insert(self.primary.clone());
        all
    }

    /// q = |C| − k: as many seals as meet every set of members that can have released a commit.
    pub fn seals_needed(&self) -> usize {
        self.electorate().len().saturating_sub(self.k as usize)
    }
}

/// `timelines/<n>`: created once before a promotion, never deleted (S6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineReservation {
    pub term: Term,
    pub parent: TimelineId,
    pub switch: Lsn,
}

/// `membership`: who may be sealed, stand or promise, as a leader wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub term: Term,
    pub members: BTreeSet<MemberName>,
}

/// Where a member's WAL ends. `replayed` judges ancestry; received bytes only break ties.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub timeline: TimelineId,
    pub replayed: Lsn,
    pub received: Lsn,
    /// Ancestors of `timeline` as the member's own history file tells them.
    pub history: History,
}

/// `seals/<name>`: no WAL from a leader of a lower term any more; the position is final. Counts for its own term only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealRecord {
    pub term: Term,
    pub incarnation: Incarnation,
    pub position: Position,
    pub tags: Tags,
}

/// What an operator says of a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tags {
    /// Never promoted by itself.
    pub nofailover: bool,
    /// Among equally advanced members the highest wins; 0 is as `nofailover`.
    pub failover_priority: u32,
    /// Not offered to readers (`/replica`).
    pub noloadbalance: bool,
    /// Never a synchronous standby.
    pub nosync: bool,
    /// Free tags, for `?tag_key=value`.
    pub custom: BTreeMap<String, String>,
}

impl Default for Tags {
    fn default() -> Self {
        Tags { nofailover: false, failover_priority: 1, noloadbalance: false, nosync: false, custom: BTreeMap::new() }
    }
}

impl Tags {
    pub fn may_lead(&self) -> bool {
        !self.nofailover && self.failover_priority > 0
    }
}

/// What a member has in its data directory, as the others need to know it (S5: nobody runs initdb while anybody has data).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum DataSummary {
    /// No data and no memory of a cluster: this member may take part in creating one.
    Fresh,
    /// Empty now, but the member remembers a cluster: to be cloned, never a reason to create one.
    Lost {
        system_identifier: u64,
    },
    Present {
        system_identifier: u64,
    },
    Unknown {
        why: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Primary,
    Standby,
    /// PostgreSQL does not run, or its role is not known.
    None,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobProgress {
    /// What runs, in the CLI's words: `initdb`, `clone from node-b`, `rewind`, …
    pub what: String,
    pub done_bytes: Option<u64>,
    pub total_bytes: Option<u64>,
}

/// `members/<name>`: what a member says of itself. Written by the member on change and at least every `member.publish` (3 s).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    pub incarnation: Incarnation,
    pub start_counter: u64,
    pub boot_id: String,
    pub data: DataSummary,
    pub role: Role,
    /// One word for tables: `running`, `starting`, `stopped`, `streaming`, `crash loop`, `cloning`, …
    pub state: String,
    pub timeline: Option<TimelineId>,
    pub received: Option<Lsn>,
    pub replayed: Option<Lsn>,
    /// The term under which it follows or leads.
    pub term: Term,
    pub host: String,
    pub port: u16,
    pub api_url: String,
    /// Where clients are let in, when this member has an endpoint.
    #[serde(default)]
    pub endpoint: Option<EndpointPorts>,
    pub tags: Tags,
    /// `server_version_num`, 0 when not known.
    pub postgres_version: u32,
    pub agent_version: String,
    pub pending_restart: bool,
    pub job: Option<JobProgress>,
    /// The last term that was taken from this member while its PostgreSQL was read-write: the suspicion was wrong.
    #[serde(default)]
    pub overtaken: Option<Term>,
    /// The last plan's rule and reason, so that any member can tell what every other waits for (L6).
    pub rule: String,
    pub reason: String,
    #[serde(default)]
    pub storage: StorageSummary,
    /// Counts up with every publication: a reader's own clock tells how old it is.
    pub beat: u64,
    /// PostgreSQL here has run since before a leader's sign of life was last seen: not a cold start.
    #[serde(default)]
    pub witness: bool,
    /// WAL that only this member had, kept for a person.
    #[serde(default)]
    pub kept: Vec<KeptWal>,
}

/// Transactions that were on this member alone when it was brought back onto the leader's line: listed and kept (S5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptWal {
    pub timeline: TimelineId,
    /// Where it left the line that the cluster went on with.
    pub left_at: Lsn,
    pub transactions: u64,
    pub directory: String,
}

/// What the others have to know of a member's disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StorageSummary {
    /// It cannot write: it must not lead.
    pub trouble: Option<String>,
    /// It has less room than `storage.min_free`: others go first.
    pub full: Option<String>,
    /// Free under the data directory.
    pub free_bytes: Option<u64>,
    /// What a copy of its data directory takes.
    pub data_bytes: Option<u64>,
}

impl StorageSummary {
    /// Why somebody else should lead rather than this member.
    pub fn hindrance(&self) -> Option<&String> {
        self.trouble.as_ref().or(self.full.as_ref())
    }
}

/// `history/<term>`: who became leader, when, why, how long each phase took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRecord {
    pub term: Term,
    pub leader: MemberName,
    pub timeline: TimelineId,
    pub switch: Option<Lsn>,
    pub reason: String,
    /// Wall-clock milliseconds since 1970: for people only, never for a decision.
    pub at_unix_ms: u64,
    /// Milliseconds from the sealing to each later phase, as the winner saw them.
    pub phases_ms: BTreeMap<String, u64>,
}

/// `requests/<id>`: what somebody asked for, who works on it, what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub id: String,
    pub what: Operation,
    pub asked_by: String,
    pub at_unix_ms: u64,
    /// How long the operation may take before it is put back, milliseconds on the worker's clock.
    pub timeout_ms: u64,
    /// The term under which the work began (or under which it was asked for while nobody led): a leader of a later term
    /// finds it done.
    pub began: Option<Term>,
    pub outcome: Option<Outcome>,
    /// A failover that goes past what the store claims: a person has seen what is lost and takes it upon himself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<Force>,
}

/// What a person said who forces a failover.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Force {
    /// Term of the last published leader when it was asked for: good for this vacancy and for no later one.
    pub last_term: Term,
    /// Hosts that are off by his word, typed name by name.
    pub off: BTreeSet<MemberName>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Operation {
    /// Hand over from a living leader; `to` absent: the best standby.
    Switchover { to: Option<MemberName> },
    /// Elect a new leader although the old one is not there.
    Failover { to: Option<MemberName> },
    /// Restart PostgreSQL of one member.
    Restart { member: MemberName },
    /// Set the data of a standby aside and clone it again.
    Reinit { member: MemberName },
}

impl Operation {
    /// What a request begins with: asked for while nobody leads, a change of leader is fulfilled by any later leader.
    /// Nothing else is: a restart that ends a crash loop still has to be done. `missed`: the holder shows no sign of life.
    pub fn begun_when_asked(&self, leader: Option<&LeaderRecord>, missed: bool) -> Option<Term> {
        match self {
            Operation::Switchover { .. } | Operation::Failover { .. } => {
                let leader = leader.filter(|l| missed || l.state != LeaderState::Held)?;
                // The one who is being elected has fulfilled it, under this very term.
                let elected = matches!(leader.state, LeaderState::Electing { .. });
                Some(Term(leader.term.0.saturating_sub(u64::from(elected))))
            }
            Operation::Restart { .. } | Operation::Reinit { .. } => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Outcome {
    Done {
        message: String,
    },
    Refused {
        message: String,
    },
    /// Begun, not finished in time, and everything put back.
    PutBack {
        message: String,
    },
    /// Begun; what came of it is not known (S11).
    Unknown {
        message: String,
    },
}

/// A record with the revision at which it was last written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyed<T> {
    pub revision: i64,
    pub value: T,
}

/// A key as one read found it. Absent and unreadable are facts of their own, never a default (S12).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry<T> {
    #[default]
    Absent,
    Unreadable {
        revision: i64,
        why: String,
    },
    Present(Keyed<T>),
}

impl<T> Entry<T> {
    pub fn present(&self) -> Option<&Keyed<T>> {
        match self {
            Entry::Present(keyed) => Some(keyed),
            Entry::Absent | Entry::Unreadable { .. } => None,
        }
    }

    pub fn value(&self) -> Option<&T> {
        self.present().map(|keyed| &keyed.value)
    }

    /// The revision to compare with when writing; 0 is "must not exist".
    pub fn revision(&self) -> i64 {
        match self {
            Entry::Absent => 0,
            Entry::Unreadable { revision, .. } => *revision,
            Entry::Present(keyed) => keyed.revision,
        }
    }
}

/// Everything under the cluster's prefix, from one linearizable read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecords {
    /// Identity of the store itself (etcd's cluster id) and its revision at the read.
    pub store_id: u64,
    pub revision: i64,
    pub init: Entry<ClusterInit>,
    pub leader: Entry<LeaderRecord>,
    pub lease: Entry<LeaseRecord>,
    pub sync: Entry<SyncClaim>,
    pub membership: Entry<Membership>,
    pub timelines: BTreeMap<TimelineId, TimelineReservation>,
    pub members: BTreeMap<MemberName, Keyed<MemberRecord>>,
    pub seals: BTreeMap<MemberName, Keyed<SealRecord>>,
    pub requests: BTreeMap<String, Keyed<Request>>,
    pub history: BTreeMap<Term, HistoryRecord>,
    /// Keys that could not be read, with the reason: shown, never guessed at.
    pub unreadable: BTreeMap<String, String>,
}

impl ClusterRecords {
    pub fn leader(&self) -> Option<&LeaderRecord> {
        self.leader.value()
    }

    /// What a person forces while nobody leads. Where the change began on suspicion the old leader's lease may not be over:
    /// then only with his word that its host is off.
    pub fn forced(&self) -> Option<&Force> {
        let leader = self.leader()?;
        let last = leader.last.as_ref().map(|last| last.term).unwrap_or_default();
        self.requests
            .values()
            .filter(|r| r.value.outcome.is_none() && matches!(r.value.what, Operation::Failover { .. }))
            .filter_map(|r| r.value.force.as_ref())
            .find(|force| force.last_term == last)
            .filter(|force| leader.taken.as_ref().is_none_or(|taken| force.off.contains(&taken.from.name)))
    }

    /// The highest timeline number that anybody reserved or published.
    pub fn highest_timeline(&self) -> TimelineId {
        let reserved = self.timelines.keys().next_back().copied().unwrap_or(TimelineId(1));
        let published = self.leader().and_then(|l| l.last.as_ref()).map(|p| p.timeline).unwrap_or(TimelineId(1));
        reserved.max(published)
    }
}

/// A key of the store; the name is made by `dcs/schema.rs`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    Init,
    Leader,
    Lease,
    Sync,
    Membership,
    Timeline(TimelineId),
    Member(MemberName),
    Seal(MemberName),
    Request(String),
    History(Term),
}

/// A value to be written under a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Write {
    Init(ClusterInit),
    Leader(LeaderRecord),
    Lease(LeaseRecord),
    Sync(SyncClaim),
    Membership(Membership),
    Timeline(TimelineId, TimelineReservation),
    Member(MemberName, Box<MemberRecord>),
    Seal(MemberName, SealRecord),
    Request(Request),
    History(HistoryRecord),
    Delete(Key),
}

impl Write {
    pub fn key(&self) -> Key {
        match self {
            Write::Init(_) => Key::Init,
            Write::Leader(_) => Key::Leader,
            Write::Lease(_) => Key::Lease,
            Write::Sync(_) => Key::Sync,
            Write::Membership(_) => Key::Membership,
            Write::Timeline(number, _) => Key::Timeline(*number),
            Write::Member(name, _) => Key::Member(name.clone()),
            Write::Seal(name, _) => Key::Seal(name.clone()),
            Write::Request(request) => Key::Request(request.id.clone()),
            Write::History(record) => Key::History(record.term),
            Write::Delete(key) => key.clone(),
        }
    }
}

/// "The key still has this modification revision"; 0: it does not exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    pub key: Key,
    pub revision: i64,
}

/// All comparisons hold, then all writes happen, at one revision; or nothing happens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transaction {
    pub compare: Vec<Compare>,
    pub write: Vec<Write>,
}

impl Transaction {
    pub fn when(key: Key, revision: i64) -> Transaction {
        Transaction { compare: vec![Compare { key, revision }], write: Vec::new() }
    }

    pub fn and(mut self, key: Key, revision: i64) -> Transaction {
        self.compare.push(Compare { key, revision });
        self
    }

    pub fn put(mut self, write: Write) -> Transaction {
        self.write.push(write);
        self
    }
}

pub fn names<'a>(ids: impl IntoIterator<Item = &'a MemberId>) -> BTreeSet<MemberName> {
    ids.into_iter().map(|id| id.name.clone()).collect()
}
