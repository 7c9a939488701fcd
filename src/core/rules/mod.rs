//! One situation per file; `decide.rs` holds their order. A rule answers `None` when it has nothing to say.

pub mod bootstrap;
pub mod cold_start;
pub mod copying;
pub mod duties;
pub mod electing;
pub mod follow;
pub mod identity;
pub mod leader;
pub mod reattach;
pub mod sealing;
pub mod stopping;
pub mod storage;
pub mod superseded;
pub mod takeover;
pub mod unknown;
pub mod waiting;

use std::time::Duration;

use super::lsn::Lsn;
use super::names::{MemberId, MemberName};
use super::plan::{Follow, Source, Step, walreceiver_name};
use super::records::{ClusterRecords, Durability, Keyed, LeaderRecord, Transaction};
use super::time::Moment;
use super::timeline::Term;
use super::view::{LocalPostgres, View};

/// A member whose record has not changed for this many publication periods counts as not there.
const ABSENT_AFTER_PERIODS: u32 = 4;

/// The store's part of a view that can be decided on.
pub struct Facts<'a> {
    pub view: &'a View,
    pub records: &'a ClusterRecords,
    pub leader: Option<&'a Keyed<LeaderRecord>>,
}

impl<'a> Facts<'a> {
    pub fn of(view: &'a View) -> Option<Facts<'a>> {
        let records = view.store.records()?;
        Some(Facts { view, records, leader: records.leader.present() })
    }

    pub fn now(&self) -> Moment {
        self.view.now
    }

    pub fn me(&self) -> &'a MemberId {
        &self.view.me.id
    }

    /// The leader record when this member, in this incarnation, holds it.
    pub fn mine(&self) -> Option<&'a Keyed<LeaderRecord>> {
        self.leader.filter(|l| l.value.holder == self.view.me.id)
    }

    /// Address of a member, from its own record.
    pub fn source(&self, member: &MemberName) -> Option<Source> {
        let record = &self.records.members.get(member)?.value;
        Some(Source { member: member.clone(), host: record.host.clone(), port: record.port })
    }

    /// How this member follows `upstream` under `term`.
    pub fn follow(&self, upstream: &MemberName, term: Term) -> Option<Follow> {
        Some(Follow {
            upstream: self.source(upstream)?,
            slot: self.me().name.slot(),
            walreceiver: walreceiver_name(self.me(), term),
            term,
        })
    }

    /// Has the member published lately, by our own clock?
    pub fn is_there(&self, member: &MemberName) -> bool {
        if *member == self.me().name {
            return true;
        }
        let patience = self.view.policy.member_publish * ABSENT_AFTER_PERIODS;
        self.view.memory.beats.get(member).is_some_and(|(_, seen)| self.now().since(*seen) < patience)
    }

    /// Has the member published *since we look*? What it left in the store before a power cut is not its word.
    pub fn speaks(&self, member: &MemberName) -> bool {
        let patience = self.view.policy.member_publish * ABSENT_AFTER_PERIODS;
        *member == self.me().name
            || self.view.memory.spoke.get(member).is_some_and(|seen| self.now().since(*seen) < patience)
    }

    /// The step that starts PostgreSQL following nobody, when it is down and may be started.
    pub fn start_parked(&self) -> Option<Step> {
        // Copied or rewound data would wait for ever for WAL that only a leader has.
        let parks = !self.view.memory.durable.must_follow && storage::not_to_start(self.view).is_none();
        (parks && matches!(self.view.local.postgres, LocalPostgres::Down)).then_some(Step::Start { follow: None })
    }

    /// The step that starts PostgreSQL parked, unless a change of leader is under way that can end without this member: a
    /// recovery that begins in that moment takes processor and disk from those who elect (several members may share a host).
    /// `since`: when the change began, as seen here.
    pub fn start_when_needed(&self, since: Moment) -> Option<Step> {
        let begun = self.now().since(since);
        if self.others_suffice() && begun < self.view.policy.election_wait {
            return None;
        }
        self.start_parked()
    }

    /// Are enough others there to elect and to acknowledge?
    fn others_suffice(&self) -> bool {
        let Some(claim) = self.records.sync.value() else { return false };
        let others = |id: &&MemberId| id.name != self.me().name && self.is_there(&id.name);
        let there = claim.electorate().iter().filter(others).count();
        claim.mode != Durability::Async && there >= claim.seals_needed().max(claim.k as usize + 1)
    }

    /// The last position that the leader of the present record published with its heartbeat: what bounds the loss in
    /// async mode. An election overwrites the heartbeat, so it is carried in the record.
    pub fn last_published_lsn(&self) -> Option<Lsn> {
        let leader = self.leader?;
        let lease = self.records.lease.value().filter(|lease| lease.term == leader.value.term);
        lease.and_then(|lease| lease.lsn).or(leader.value.lsn)
    }

    pub fn commit(&self, what: impl Into<String>, transaction: Transaction) -> Step {
        Step::Commit { what: what.into(), transaction }
    }
}

/// A wait that differs between members and elections but not between runs: two who failed together do not try together.
pub fn scattered(id: &MemberId, term: Term, most: Duration) -> Duration {
    // FNV-1a over name and term.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in id.to_string().bytes().chain(term.0.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let most_ms = u64::try_from(most.as_millis()).unwrap_or(u64::MAX).max(1);
    Duration::from_millis(hash % most_ms)
}

/// Seconds with one decimal, for sentences.
pub fn seconds(span: Duration) -> String {
    format!("{:.1} s", span.as_secs_f64())
}
