//! The table of members: what each is, where its WAL ends, when it was last heard of. `/v1/status`, `/cluster` and
//! `/metrics` show it.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;

use super::millis;
use crate::core::health::{leader_position, sitting_leader};
use crate::core::names::{MemberId, MemberName};
use crate::core::plan::parse_walreceiver_name;
use crate::core::records::{ClusterRecords, JobProgress, KeptWal, LeaderState, MemberRecord, Role, SyncClaim, Tags};
use crate::core::view::{LocalPostgres, Store, View};
use crate::core::{Lsn, Moment, TimelineId};

/// What a member is to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Standing {
    Leader,
    Standby,
    /// Says that it is read-write, and does not lead.
    Unled,
    Down,
    /// Configured, but nothing was ever heard of it.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SyncStanding {
    Primary,
    /// Commits wait for it or for others of the set.
    Synchronous,
    Asynchronous,
}

#[derive(Debug, Serialize)]
pub(super) struct Member {
    pub name: MemberName,
    pub role: Standing,
    /// The member's own word: `running`, `streaming`, `cloning`, …
    pub state: String,
    /// `None`: there is no claim.
    pub sync: Option<SyncStanding>,
    pub timeline: Option<TimelineId>,
    pub received: Option<Lsn>,
    pub replayed: Option<Lsn>,
    /// Behind the leader by what it replayed, and by what it received.
    pub lag_bytes: Option<u64>,
    pub receive_lag_bytes: Option<u64>,
    pub host: Option<String>,
    pub port: Option<u16>,
    pub api_url: Option<String>,
    pub tags: Option<Tags>,
    pub postgres_version: Option<u32>,
    pub agent_version: Option<String>,
    pub pending_restart: bool,
    pub job: Option<JobProgress>,
    /// WAL that only this member had when it was brought back onto the leader's line.
    pub kept: Vec<KeptWal>,
    pub rule: Option<String>,
    pub reason: Option<String>,
    /// Since it last published something new, as seen from here.
    pub seen_ms_ago: Option<u64>,
    /// Not heard of for so long that its word is history.
    pub silent: bool,
}

/// Everybody who is configured or published something. Own facts and, on the leader, those of its walsenders are fresher
/// than what stands in the store.
pub(super) fn members(view: &View, last: Option<&View>, now: Moment) -> Vec<Member> {
    let records = records(view, last);
    let leader = match view.store {
        Store::Known { .. } => sitting_leader(view, now),
        Store::Unknown { .. } => records.and_then(|r| r.leader()).filter(|l| l.state == LeaderState::Held),
    };
    let leads = leader.map(|leader| &leader.holder.name);
    let end = leader_position(view).max(records.and_then(|r| r.lease.value()).and_then(|lease| lease.lsn));
    let claim = records.and_then(|r| r.sync.value());
    let published = records.into_iter().flat_map(|r| r.members.keys());
    let names: BTreeSet<&MemberName> = view.me.configured.iter().chain(published).collect();
    let member = |name: &MemberName| {
        let record = records.and_then(|r| r.members.get(name)).map(|keyed| &keyed.value);
        let (received, replayed) = positions(view, name, record);
        let follows = leads != Some(name);
        let lag = |at: Option<Lsn>| end.zip(at).filter(|_| follows).map(|(end, at)| at.bytes_to(end));
        let seen = seen_ago(view, name, now);
        let role = standing(view, name, record, leads);
        Member {
            state: state(record, role),
            sync: record.and_then(|record| sync_standing(claim, name, record)),
            timeline: record.and_then(|r| r.timeline),
            lag_bytes: lag(replayed),
            receive_lag_bytes: lag(received),
            received,
            replayed,
            host: record.map(|r| r.host.clone()),
            port: record.map(|r| r.port),
            api_url: record.map(|r| r.api_url.clone()),
            tags: record.map(|r| r.tags.clone()),
            postgres_version: record.map(|r| r.postgres_version).filter(|version| *version != 0),
            agent_version: record.map(|r| r.agent_version.clone()),
            pending_restart: record.is_some_and(|r| r.pending_restart),
            job: record.and_then(|r| r.job.clone()),
            kept: record.map(|r| r.kept.clone()).unwrap_or_default(),
            rule: record.map(|r| r.rule.clone()),
            reason: record.map(|r| r.reason.clone()),
            seen_ms_ago: seen.map(millis),
            silent: record.is_none() || seen.is_some_and(|seen| seen > silent_after(view)),
            role,
            name: name.clone(),
        }
    };
    names.into_iter().map(member).collect()
}

/// A member publishes at least every `member_publish`; two may be lost, and a lease is never given up sooner.
fn silent_after(view: &View) -> Duration {
    (view.policy.member_publish * 3).max(view.policy.timings.ttl)
}

fn seen_ago(view: &View, name: &MemberName, now: Moment) -> Option<Duration> {
    if *name == view.me.id.name {
        return Some(now.since(view.now));
    }
    view.memory.beats.get(name).map(|(_, at)| now.since(*at))
}

fn positions(view: &View, name: &MemberName, record: Option<&MemberRecord>) -> (Option<Lsn>, Option<Lsn>) {
    if *name == view.me.id.name {
        return match &view.local.postgres {
            LocalPostgres::Primary(facts) => (Some(facts.flushed), Some(facts.flushed)),
            LocalPostgres::Standby(facts) => (facts.received.max(Some(facts.replayed)), Some(facts.replayed)),
            LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => {
                (record.and_then(|r| r.received), record.and_then(|r| r.replayed))
            }
        };
    }
    // A row of an earlier life of the member says nothing about this one.
    let is = |id: MemberId| id.name == *name && record.is_none_or(|r| r.incarnation == id.incarnation);
    let mut rows = view.local.postgres.primary().into_iter().flat_map(|facts| &facts.replicas);
    let row = rows.rfind(|row| parse_walreceiver_name(&row.application_name).is_some_and(|(id, _)| is(id)));
    (
        row.and_then(|row| row.flushed).max(record.and_then(|r| r.received)),
        row.and_then(|row| row.replayed).max(record.and_then(|r| r.replayed)),
    )
}

fn standing(view: &View, name: &MemberName, record: Option<&MemberRecord>, leads: Option<&MemberName>) -> Standing {
    let role = if *name == view.me.id.name {
        match &view.local.postgres {
            LocalPostgres::Primary(_) => Some(Role::Primary),
            LocalPostgres::Standby(_) => Some(Role::Standby),
            LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => Some(Role::None),
        }
    } else {
        record.map(|record| record.role)
    };
    match role {
        _ if leads == Some(name) => Standing::Leader,
        Some(Role::Primary) => Standing::Unled,
        Some(Role::Standby) => Standing::Standby,
        Some(Role::None) => Standing::Down,
        None => Standing::Unknown,
    }
}

fn state(record: Option<&MemberRecord>, role: Standing) -> String {
    match (record, role) {
        (Some(record), _) => record.state.clone(),
        (None, Standing::Unknown) => "never heard of".to_owned(),
        (None, _) => "not published yet".to_owned(),
    }
}

fn sync_standing(claim: Option<&SyncClaim>, name: &MemberName, record: &MemberRecord) -> Option<SyncStanding> {
    let claim = claim?;
    let is = |id: &MemberId| id.name == *name && id.incarnation == record.incarnation;
    Some(if is(&claim.primary) {
        SyncStanding::Primary
    } else if claim.k > 0 && claim.members.iter().any(is) {
        SyncStanding::Synchronous
    } else {
        SyncStanding::Asynchronous
    })
}

/// What the store says now, or what it said last.
pub(super) fn records<'a>(view: &'a View, last: Option<&'a View>) -> Option<&'a ClusterRecords> {
    view.store.records().or_else(|| last.and_then(|view| view.store.records()))
}
