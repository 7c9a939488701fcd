//! What is to be done, complete, with its reason. The executor makes no choice; it stops at the first step that fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lsn::Lsn;
use super::names::{MemberId, MemberName};
use super::promise::Lead;
use super::records::{Outcome, TimelineReservation, Transaction, Write};
use super::time::Moment;
use super::timeline::{Term, TimelineId};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub rule: String,
    /// One sentence with the facts that decided: log line, API answer, metric label, golden file.
    pub reason: String,
    pub steps: Vec<Step>,
    /// Members that were looked at and not chosen, with the reason.
    pub rejected: BTreeMap<MemberName, String>,
    /// Latest time of the next decision; events come earlier.
    pub wake: Option<Moment>,
}

impl Plan {
    pub fn new(rule: &str, reason: impl Into<String>) -> Plan {
        Plan { rule: rule.to_owned(), reason: reason.into(), steps: Vec::new(), rejected: BTreeMap::new(), wake: None }
    }

    pub fn step(mut self, step: Step) -> Plan {
        self.steps.push(step);
        self
    }

    pub fn steps(mut self, steps: impl IntoIterator<Item = Step>) -> Plan {
        self.steps.extend(steps);
        self
    }

    pub fn wake_at(mut self, at: Moment) -> Plan {
        self.wake = Some(at);
        self
    }

    pub fn rejecting(mut self, rejected: BTreeMap<MemberName, String>) -> Plan {
        self.rejected = rejected;
        self
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// fsync these into the state file before anything that follows.
    Remember {
        highest_term: Term,
        highest_sync_term: Term,
        store_id: u64,
        store_revision: i64,
    },
    /// fsync that the store is another one or went back.
    DistrustStore,
    /// fsync that a lost store was made good by a leader of this term.
    AcceptStore {
        highest_term: Term,
        highest_sync_term: Term,
        store_id: u64,
        store_revision: i64,
    },
    /// fsync what the term rests on, ahead of what changes it; the keeper asks for promises by it.
    RememberLead {
        lead: Box<Lead>,
    },
    /// A promise of ours was given back by the leader that has it.
    EndPromise {
        to: MemberId,
        term: Term,
    },
    /// The state file learns which cluster this member belongs to.
    Join {
        system_identifier: u64,
    },
    /// A new incarnation begins (before a clone or rewind).
    /// Another life of the data directory begins; `copied`: its data come from another member and need its WAL.
    NewIncarnation {
        copied: bool,
    },
    /// A person asked for another try after a crash loop.
    ForgetCrashes,

    // --- lease and fence ---
    /// The keeper renews this record from now on; the guardian is armed with each deadline.
    KeepLease {
        term: Term,
        leader_revision: i64,
    },
    DropLease,
    /// The term that the guardian is armed for goes on by promises alone: the store is away or is not to be believed.
    HoldByPromises {
        term: Term,
    },
    /// The guardian counts the deadlines of this term from now on.
    Arm {
        term: Term,
    },
    /// Kill the whole control group, whatever it does.
    Kill,
    Disarm,

    // --- store ---
    /// A guarded write. Conflict is not an error: the next round reads again.
    Commit {
        what: String,
        transaction: Transaction,
    },

    // --- PostgreSQL, short ---
    Start {
        follow: Option<Follow>,
    },
    Follow {
        follow: Follow,
    },
    EndWalsenders {
        names: Vec<String>,
    },
    KeepSlots {
        members: Vec<(MemberName, Option<Lsn>)>,
    },
    Reload,

    // --- jobs: at most one runs ---
    Seal {
        term: Term,
        leader_revision: i64,
    },
    Promote {
        order: PromoteOrder,
    },
    Enforce {
        from: Option<SyncRule>,
        to: SyncRule,
    },
    Bootstrap,
    SetAside {
        why: String,
    },
    Clone {
        from: Source,
    },
    Rewind {
        from: Source,
        timeline: TimelineId,
    },
    HandOver {
        order: HandOver,
    },
    RestartInPlace {
        timeout: Duration,
    },
    /// Stop PostgreSQL orderly (standbys).
    Stop {
        timeout: Duration,
    },

    // --- the rest ---
    FinishRequest {
        id: String,
        outcome: Outcome,
    },
    /// PostgreSQL is stopped and nothing is owed: the agent may end.
    Exit,
}

impl Step {
    /// What this step writes into the store by itself.
    pub fn writes(&self) -> impl Iterator<Item = &Write> {
        match self {
            Step::Commit { transaction, .. } => transaction.write.iter(),
            _ => [].iter(),
        }
    }

    /// Jobs run aside and show in the next view; everything else is done within the round.
    pub fn is_job(&self) -> bool {
        matches!(
            self,
            Step::Seal { .. }
                | Step::Promote { .. }
                | Step::Enforce { .. }
                | Step::Bootstrap
                | Step::Clone { .. }
                | Step::Rewind { .. }
                | Step::HandOver { .. }
                | Step::RestartInPlace { .. }
                | Step::Stop { .. }
        )
    }
}

/// A member to copy or stream from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub member: MemberName,
    pub host: String,
    pub port: u16,
}

/// Whom a standby follows, under which term: the walreceiver's name carries the term, so that an acknowledgement of a
/// receiver set up under another term counts for nothing (protocol §4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Follow {
    pub upstream: Source,
    pub slot: String,
    pub walreceiver: String,
    pub term: Term,
}

/// `<member>_<incarnation>_<term>`
pub fn walreceiver_name(id: &MemberId, term: Term) -> String {
    format!("{id}_{term}")
}

/// Reads a walreceiver's name back; `None` for names that are not ours.
pub fn parse_walreceiver_name(name: &str) -> Option<(MemberId, Term)> {
    let mut parts = name.split('_');
    let member = parts.next()?.parse().ok()?;
    let incarnation = parts.next()?.parse().ok()?;
    let term = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some((MemberId { name: member, incarnation }, Term(term)))
}

/// What PostgreSQL is to enforce.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum SyncRule {
    /// `ANY 1 (pgvigil_nobody)`: waits for somebody who never comes. Every member of a sync cluster starts with it.
    Nobody,
    /// `ANY k (members)` under a term.
    Any { k: u32, members: BTreeSet<MemberId>, term: Term },
    /// Empty: only where k = 0 is published, or in async mode.
    Cleared,
}

pub const NOBODY: &str = "pgvigil_nobody";

impl fmt::Display for SyncRule {
    /// The value of `synchronous_standby_names`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SyncRule::Nobody => write!(f, "ANY 1 (\"{NOBODY}\")"),
            SyncRule::Cleared => Ok(()),
            SyncRule::Any { k, members, term } => {
                write!(f, "ANY {k} (")?;
                for (i, id) in members.iter().enumerate() {
                    let comma = if i == 0 { "" } else { ", " };
                    write!(f, "{comma}\"{}\"", walreceiver_name(id, *term))?;
                }
                f.write_str(")")
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromoteOrder {
    pub term: Term,
    /// The reserved number; what PostgreSQL becomes must equal it, else it is killed.
    pub timeline: TimelineId,
    pub parent: TimelineId,
    pub switch: Lsn,
    /// True history of every number between the present one and the reserved one (no gap stops a follower).
    pub between: BTreeMap<TimelineId, TimelineReservation>,
}

/// The middle of a switchover: checkpoint, fast stop with a deadline, verification on the target, release by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    pub term: Term,
    pub leader_revision: i64,
    pub to: Option<Source>,
    /// Written when PostgreSQL is down and the target has everything.
    pub release: Transaction,
    pub checkpoint_timeout: Duration,
    pub stop_timeout: Duration,
    /// The request that is answered by it.
    pub request: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::names::Incarnation;

    #[test]
    fn walreceiver_names_read_back() {
        let id = MemberId { name: MemberName::new("node-a").unwrap(), incarnation: Incarnation(0xab) };
        let name = walreceiver_name(&id, Term(7));
        assert_eq!(name, "node-a_00000000000000ab_7");
        assert_eq!(parse_walreceiver_name(&name), Some((id, Term(7))));
        for foreign in ["pgvigil_clone", "node-a", "node-a_ab_7", "node-a_00000000000000ab_7_x", "walreceiver"] {
            assert_eq!(parse_walreceiver_name(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn the_rule_is_written_as_postgresql_reads_it() {
        let id = MemberId { name: MemberName::new("b").unwrap(), incarnation: Incarnation(1) };
        let rule = SyncRule::Any { k: 1, members: BTreeSet::from([id]), term: Term(3) };
        assert_eq!(rule.to_string(), "ANY 1 (\"b_0000000000000001_3\")");
        assert_eq!(SyncRule::Nobody.to_string(), "ANY 1 (\"pgvigil_nobody\")");
        assert_eq!(SyncRule::Cleared.to_string(), "");
    }
}
