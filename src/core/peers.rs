//! What agents say to each other on the agent port, and what this one knows of the others by it.
//!
//! The messages are the wire format: JSON with a version, durations in milliseconds of the speaker's own clocks, fields that
//! are not known ignored, a kind that is not known answered as refused. No wall-clock time, no moment of another machine.

use serde::{Deserialize, Serialize};

use super::names::{ClusterName, MemberId, MemberName};
use super::time::Moment;
use super::timeline::Term;
use super::view::{DataDirectory, GuardState, LocalPostgres, View};
use super::{promise, silence};

/// Of the messages. Raised when an older reader would misunderstand a newer writer, not when a field is added.
pub const VERSION: u32 = 1;
/// Where agents answer each other, on the port of their API.
pub const PATH: &str = "/v1/peer";

// === Messages ===

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    pub version: u32,
    pub cluster: ClusterName,
    /// `None`: whoever asks does not belong to a cluster yet.
    pub system_identifier: Option<u64>,
    pub from: MemberId,
    pub asks: Asks,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Asks {
    /// How are you, and what do you see?
    Report,
    /// Will you take no part in a term above mine? Only the sitting leader asks, and only while its renewals are late.
    Promise(promise::Promise),
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub version: u32,
    pub cluster: ClusterName,
    pub system_identifier: Option<u64>,
    pub from: MemberId,
    pub says: Says,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Says {
    Report(Box<Report>),
    /// On disk, from when this was answered on.
    Promised {
        highest_term: Term,
        store_id: u64,
    },
    NotPromised {
        why: promise::Denied,
    },
    Refused {
        why: String,
    },
    /// Of a newer version.
    #[serde(other)]
    Unknown,
}

/// A member's own word on itself and on the holder of the leader record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub boot_id: String,
    pub highest_term: Term,
    pub sealed_term: Term,
    pub holder: HolderSeen,
    #[serde(default)]
    pub promise: Promise,
    #[serde(default)]
    pub sealable: Sealable,
    /// Since the last round of its decision loop: an agent whose loop is stuck does not answer, it echoes.
    pub loop_age_ms: u64,
}

/// What a member sees of whoever holds the leader record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum HolderSeen {
    Unknown { why: String },
    Seen(Sighting),
}

/// One holder, in one term, with one heartbeat: since when each sign of its life has been missing here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    pub member: MemberName,
    pub term: Term,
    pub leader_revision: i64,
    pub seq: u64,
    /// For how long this seq has been the last one.
    pub unchanged_ms: u64,
    /// Messages from its walsender to this member's walreceiver.
    pub wal: Sign,
    /// Answers of its agent to this member.
    pub agent: Sign,
    /// For how long both of its ports, which answered this member in the same term, have refused connections.
    pub refused_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Sign {
    /// Nobody has listened: no silence either (S12).
    Unknown,
    /// Listened, and nothing came under this term.
    Never,
    Heard {
        ms_ago: u64,
    },
}

/// Whether a member has given its word to take no part in a higher term.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Promise {
    /// Counts as bound (S12).
    #[default]
    Unknown,
    Free,
    Bound {
        to: MemberId,
        term: Term,
        left_ms: u64,
    },
}

/// Whether a member could be sealed now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Sealable {
    #[default]
    Unknown,
    Yes,
    No {
        why: String,
    },
}

impl Report {
    /// What the published view says of its member as of `now`; `published` is when its round ended.
    pub fn of(view: &View, published: Moment, now: Moment) -> Report {
        let durable = &view.memory.durable;
        Report {
            boot_id: view.me.boot_id.clone(),
            highest_term: durable.highest_term,
            sealed_term: durable.sealed_term,
            holder: match silence::sighting(view) {
                Ok(sighting) => HolderSeen::Seen(sighting),
                Err(why) => HolderSeen::Unknown { why },
            },
            promise: Promise::of(view),
            sealable: Sealable::of(view),
            loop_age_ms: silence::milliseconds(now.since(published)),
        }
    }
}

impl Promise {
    /// This member's own: bound until its own clocks say that it is not, or the leader gives it back.
    pub fn of(view: &View) -> Promise {
        let bond = view.memory.bond.as_ref().filter(|bond| bond.binds(view.now));
        let given_back = |bond: &&promise::Bond| view.store.records().is_some_and(|r| bond.promise.given_back(r));
        match bond.filter(|bond| !given_back(bond)) {
            None => Promise::Free,
            Some(bond) => Promise::Bound {
                to: bond.promise.to.clone(),
                term: bond.promise.term,
                left_ms: silence::milliseconds(view.now.until(bond.until)),
            },
        }
    }
}

impl Sealable {
    pub fn of(view: &View) -> Sealable {
        let no = |why: &str| Sealable::No { why: why.to_owned() };
        if !matches!(view.local.data, DataDirectory::Present { .. }) {
            return no("it has no data");
        }
        if view.memory.durable.must_follow {
            return no("its data are a copy that is not consistent yet");
        }
        if let GuardState::Absent { why } = &view.local.guard.state {
            return Sealable::No { why: format!("its guardian is away ({why})") };
        }
        match &view.local.postgres {
            LocalPostgres::Standby(_) => Sealable::Yes,
            LocalPostgres::Primary(_) => no("its PostgreSQL is read-write"),
            LocalPostgres::Down => no("its PostgreSQL is down"),
            LocalPostgres::Starting { why } => Sealable::No { why: format!("its PostgreSQL is starting ({why})") },
            LocalPostgres::Unknown { .. } => Sealable::Unknown,
        }
    }
}

// === What is known of another member ===

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// When the last question was sent.
    pub asked_at: Option<Moment>,
    pub answer: Option<Heard>,
    pub agent: Door,
    /// PostgreSQL's port: looked at only while the agent's refuses.
    pub postgres: Door,
}

/// The last answer of an agent whose loop comes round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Heard {
    /// When the question was sent that it answers: what it says was true after this.
    pub asked_at: Moment,
    /// When it came: the last sign of life.
    pub at: Moment,
    pub from: MemberId,
    pub report: Report,
}

/// A port of another member, by this member's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Door {
    /// Nobody has tried.
    #[default]
    Unknown,
    Open {
        at: Moment,
    },
    /// The host answers that nobody listens there.
    Refuses {
        since: Moment,
    },
    /// Nothing comes back in time, or nothing that makes sense.
    Silent {
        since: Moment,
    },
}

impl Door {
    /// The door after one more try at it.
    pub fn after(self, tried: Tried, at: Moment) -> Door {
        match (tried, self) {
            (Tried::Opened, _) => Door::Open { at },
            (Tried::Refused, Door::Refuses { .. }) | (Tried::Silent, Door::Silent { .. }) => self,
            (Tried::Refused, _) => Door::Refuses { since: at },
            (Tried::Silent, _) => Door::Silent { since: at },
        }
    }

    pub fn refuses_since(self) -> Option<Moment> {
        match self {
            Door::Refuses { since } => Some(since),
            Door::Unknown | Door::Open { .. } | Door::Silent { .. } => None,
        }
    }
}

/// What one try at a port came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    Opened,
    Refused,
    Silent,
}

#[cfg(test)]
mod tests;
