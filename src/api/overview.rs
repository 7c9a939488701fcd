//! `/v1/status`: the whole cluster as this member sees it, for the command line and the demo.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::error::ApiError;
use super::members::{Member, Standing, members, records};
use super::requests::Report;
use super::{App, decisions, millis, node};
use crate::agent::status::{Counters, Status};
use crate::core::health::{leader_position, seconds, sitting_leader};
use crate::core::names::MemberName;
use crate::core::outlook::outlook;
use crate::core::plan::parse_walreceiver_name;
use crate::core::records::{ClusterRecords, Durability, LeaderState, SyncClaim};
use crate::core::storage::{Disk, Place, Probe, full, no_memory, trouble};
use crate::core::view::{GuardState, Job, LeaseView, LocalPostgres, Receiver, Store, View};
use crate::core::{Lsn, Moment, Term, TimelineId};

/// Grows when a field changes its meaning or goes away; new fields do not count.
const VERSION: u32 = 1;

#[derive(Debug, Serialize)]
struct Overview {
    version: u32,
    cluster: String,
    /// Who says all this.
    member: MemberName,
    agent_version: String,
    published_ms_ago: u64,
    leader: Leader,
    durability: DurabilityNow,
    store: StoreNow,
    members: Vec<Member>,
    decision: DecisionNow,
    local: LocalNow,
    requests: Vec<Report>,
    /// One sentence each; empty when all is well.
    warnings: Vec<String>,
    counters: Counters,
}

#[derive(Debug, Serialize)]
struct Leader {
    member: Option<MemberName>,
    term: Option<Term>,
    /// `held`, `electing`, `released`, `fenced`, `silent`, `none`, `unknown`.
    state: &'static str,
    message: String,
    /// Of our own lease; another leader's is known only by its heartbeats.
    lease_remaining_ms: Option<u64>,
    /// Of the time in which clients may be served under it: shorter, because silence is believed before the lease is over.
    gate_remaining_ms: Option<u64>,
    /// Since the leader's last sign of life was seen here.
    silent_ms: Option<u64>,
    timeline: Option<TimelineId>,
    position: Option<Lsn>,
}

#[derive(Debug, Serialize)]
struct DurabilityNow {
    mode: Durability,
    /// Acknowledgements that the settings want.
    wanted_k: u32,
    /// Acknowledgements that a commit waits for, as published.
    k: Option<u32>,
    members: BTreeSet<MemberName>,
    /// `synchronous_standby_names` of the rule that a barrier confirmed, where we lead.
    enforced: Option<String>,
    /// Weaker than the settings want.
    degraded: bool,
    /// Commits wait now for somebody who does not stream.
    stalled: bool,
    message: String,
}

#[derive(Debug, Serialize)]
struct StoreNow {
    readable: bool,
    why: Option<String>,
    read_ms_ago: u64,
    revision: Option<i64>,
    /// Age of the reading that `members`, `leader` and `requests` show, when the store is not readable now.
    showing_ms_ago: Option<u64>,
}

#[derive(Debug, Serialize)]
struct DecisionNow {
    rule: String,
    reason: String,
    steps: Vec<String>,
    rejected: BTreeMap<MemberName, String>,
    wake_in_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
struct LocalNow {
    /// `primary`, `standby`, `starting`, `down`, `unknown`.
    postgres: &'static str,
    why: Option<String>,
    guardian: String,
    job: Option<JobNow>,
    stopping: bool,
    storage: BTreeMap<Place, DiskNow>,
}

/// A file system that this member writes to.
#[derive(Debug, Serialize)]
struct DiskNow {
    path: String,
    /// `works`, `waiting` (a write has not returned), `failed`, `unknown`.
    probe: &'static str,
    why: Option<String>,
    latency_ms: Option<u64>,
    /// Since when a write has not returned, or every write failed.
    for_ms: Option<u64>,
    free_bytes: Option<u64>,
    total_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct JobNow {
    what: String,
    running_ms: u64,
    done_bytes: Option<u64>,
    total_bytes: Option<u64>,
    /// `None` while it runs.
    result: Option<Result<String, String>>,
}

pub(super) async fn get(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    let last = app.last_reading();
    let now = app.now();
    let overview = overview(app.cluster.as_str(), &status, last.as_deref(), now);
    Ok(Json(overview).into_response())
}

fn overview(cluster: &str, status: &Status, last: Option<&View>, now: Moment) -> Overview {
    let view = &*status.view;
    let members = members(view, last, now);
    let records = records(view, last);
    let leader = leader(view, records, now);
    let durability = durability(view, records);
    let warnings = warnings(status, &members, &leader, &durability, now);
    let working = view.memory.operation.as_ref();
    let phase = |id: &str| working.filter(|operation| operation.id == id).map(|operation| operation.phase.clone());
    let requests = records.into_iter().flat_map(|r| r.requests.values());
    Overview {
        version: VERSION,
        cluster: cluster.to_owned(),
        member: view.me.id.name.clone(),
        agent_version: view.me.agent_version.clone(),
        published_ms_ago: millis(now.since(status.at)),
        store: store(view, last, now),
        members,
        decision: DecisionNow {
            rule: status.plan.rule.clone(),
            reason: status.plan.reason.clone(),
            steps: status.plan.steps.iter().map(decisions::step_name).collect(),
            rejected: status.plan.rejected.clone(),
            wake_in_ms: decisions::wake_in_ms(&status.plan, now),
        },
        local: local(view, now),
        requests: requests.map(|keyed| Report::of(&keyed.value, phase(&keyed.value.id))).collect(),
        warnings,
        counters: status.counters,
        leader,
        durability,
    }
}

// === Leader ===

fn leader(view: &View, records: Option<&ClusterRecords>, now: Moment) -> Leader {
    let lease_remaining_ms = match &view.lease {
        LeaseView::Held { deadline, .. } => Some(millis(now.until(*deadline))),
        LeaseView::None | LeaseView::Claimed { .. } | LeaseView::Lost { .. } => None,
    };
    let record = records.and_then(|r| r.leader());
    let silent = view.memory.silence.map(|silence| now.since(silence.first_seen));
    let (state, message) = match record {
        None if records.is_none() => ("unknown", "the store was never readable".to_owned()),
        None => ("none", "the store has no readable leader record".to_owned()),
        Some(record) => leader_state(view, record, silent, now),
    };
    let published = record.and_then(|r| r.last.as_ref()).filter(|p| record.is_some_and(|r| r.term == p.term));
    Leader {
        member: record.filter(|_| matches!(state, "held" | "electing")).map(|r| r.holder.name.clone()),
        term: record.map(|r| r.term),
        state,
        message,
        lease_remaining_ms,
        gate_remaining_ms: view.gate_until().map(|gate| millis(now.until(gate))),
        silent_ms: record.filter(|r| r.holder != view.me.id).and(silent).map(millis),
        timeline: published.map(|p| p.timeline),
        position: leader_position(view),
    }
}

fn leader_state(
    view: &View,
    record: &crate::core::records::LeaderRecord,
    silent: Option<Duration>,
    now: Moment,
) -> (&'static str, String) {
    let (who, term) = (&record.holder.name, record.term);
    match &record.state {
        LeaderState::Held if view.store.records().is_some() && sitting_leader(view, now).is_none() => {
            let silent = silent.map(|span| format!(" for {}", seconds(span))).unwrap_or_default();
            ("silent", format!("{who} held term {term} and has shown no sign of life{silent}"))
        }
        LeaderState::Held => ("held", format!("{who} leads under term {term}")),
        LeaderState::Electing { coordinator, winner: None, .. } => {
            ("electing", format!("{coordinator} collects seals for term {term}"))
        }
        LeaderState::Electing { winner: Some(winner), .. } => {
            ("electing", format!("{} is being promoted under term {term}", winner.member.name))
        }
        LeaderState::Released { to: Some(to), why } => {
            ("released", format!("{who} released term {term} to {to}: {why}"))
        }
        LeaderState::Released { to: None, why } => ("released", format!("{who} released term {term}: {why}")),
        LeaderState::Fenced { survivors } => {
            ("fenced", format!("{who} is fenced under term {term}; {survivors} processes have not ended yet"))
        }
    }
}

// === Durability ===

fn durability(view: &View, records: Option<&ClusterRecords>) -> DurabilityNow {
    let (policy, wanted_k) = (&view.policy, wanted_k(view));
    let claim = records.and_then(|r| r.sync.value());
    let streaming = claim.and_then(|claim| streaming(view, claim));
    let stalled = claim.zip(streaming).is_some_and(|(claim, streaming)| streaming < claim.k);
    let degraded = claim.map_or(wanted_k > 0, |claim| claim.k < wanted_k);
    DurabilityNow {
        mode: policy.durability,
        wanted_k,
        k: claim.map(|claim| claim.k),
        members: claim.map(|claim| crate::core::records::names(&claim.members)).unwrap_or_default(),
        enforced: view.memory.enforced.as_ref().map(ToString::to_string),
        degraded,
        stalled,
        message: durability_message(policy.durability, wanted_k, claim, streaming.filter(|_| stalled)),
    }
}

/// Acknowledgements that the settings want; nobody can wait for more standbys than there are.
pub(super) fn wanted_k(view: &View) -> u32 {
    let others = u32::try_from(view.me.configured.len().saturating_sub(1)).unwrap_or(u32::MAX);
    if view.policy.durability == Durability::Async { 0 } else { view.policy.k.min(others) }
}

/// How many of the set stream from here; `None` where we do not lead.
fn streaming(view: &View, claim: &SyncClaim) -> Option<u32> {
    let facts = view.local.postgres.primary()?;
    let streams = |id: &&crate::core::MemberId| {
        facts.replicas.iter().any(|row| {
            row.state == "streaming"
                && parse_walreceiver_name(&row.application_name).is_some_and(|(name, _)| name == **id)
        })
    };
    u32::try_from(claim.members.iter().filter(streams).count()).ok()
}

fn durability_message(mode: Durability, wanted: u32, claim: Option<&SyncClaim>, short: Option<u32>) -> String {
    let Some(claim) = claim else {
        return match mode {
            Durability::Async => "commits are acknowledged when they are on the leader's disk alone".to_owned(),
            Durability::Sync | Durability::Strict => {
                "no set is published, so nobody is elected by itself and no durability is claimed".to_owned()
            }
        };
    };
    let (k, n) = (claim.k, claim.members.len());
    match (k, short) {
        (0, _) if wanted == 0 => "commits are acknowledged when they are on the leader's disk alone".to_owned(),
        (0, _) => format!(
            "commits wait for no standby, {wanted} are wanted: if the leader's disk is lost now, commits are lost"
        ),
        (_, Some(streaming)) => {
            format!("commits wait: {k} of {n} standbys have to acknowledge, and only {streaming} of them stream")
        }
        (_, None) if k < wanted => format!("commits wait for {k} of {n} standbys, {wanted} are wanted"),
        (_, None) => format!("every acknowledged commit is on the leader and at least {k} of {n} standbys"),
    }
}

// === Here ===

fn store(view: &View, last: Option<&View>, now: Moment) -> StoreNow {
    let read_ms_ago = millis(now.since(node::store_seen_at(&view.store)));
    match &view.store {
        Store::Known { records, .. } => {
            StoreNow { readable: true, why: None, read_ms_ago, revision: Some(records.revision), showing_ms_ago: None }
        }
        Store::Unknown { why, .. } => StoreNow {
            readable: false,
            why: Some(why.clone()),
            read_ms_ago,
            revision: None,
            showing_ms_ago: last.map(|view| millis(now.since(node::store_seen_at(&view.store)))),
        },
    }
}

fn local(view: &View, now: Moment) -> LocalNow {
    let (postgres, why) = match &view.local.postgres {
        LocalPostgres::Primary(_) => ("primary", None),
        LocalPostgres::Standby(facts) => {
            let why = match facts.receiver {
                Receiver::Streaming => None,
                Receiver::Connecting => Some("the walreceiver is connecting".to_owned()),
                Receiver::None => Some("no walreceiver runs".to_owned()),
            };
            ("standby", why)
        }
        LocalPostgres::Starting { why } => ("starting", Some(why.clone())),
        LocalPostgres::Unknown { why } => ("unknown", Some(why.clone())),
        LocalPostgres::Down => ("down", None),
    };
    LocalNow {
        postgres,
        why,
        guardian: guardian(view),
        job: view.job.as_ref().map(|job| job_now(job, now)),
        stopping: view.stopping,
        storage: view.local.storage.places.iter().map(|(place, disk)| (*place, disk_now(disk, now))).collect(),
    }
}

fn disk_now(disk: &Disk, now: Moment) -> DiskNow {
    let (probe, why, latency_ms, since) = match &disk.probe {
        Probe::Unknown { why } => ("unknown", Some(why.clone()), None, None),
        Probe::Works { latency_ms, .. } => ("works", None, Some(*latency_ms), None),
        Probe::Waiting { since } => ("waiting", None, None, Some(*since)),
        Probe::Failed { since, why, .. } => ("failed", Some(why.clone()), None, Some(*since)),
    };
    DiskNow {
        path: disk.path.clone(),
        probe,
        why,
        latency_ms,
        for_ms: since.map(|since| millis(now.since(since))),
        free_bytes: disk.space.map(|space| space.free_bytes),
        total_bytes: disk.space.map(|space| space.total_bytes),
    }
}

fn guardian(view: &View) -> String {
    match &view.local.guard.state {
        GuardState::Absent { why } => format!("absent: {why}"),
        GuardState::Idle { exit: None } => "idle".to_owned(),
        GuardState::Idle { exit: Some(exit) } => format!("idle; PostgreSQL ended: {}", exit.how),
        GuardState::Survivors { count } => format!("{count} killed processes have not ended yet"),
        GuardState::Running { postmaster, armed: None } => format!("watches postmaster {postmaster}"),
        GuardState::Running { postmaster, armed: Some(term) } => {
            format!("watches postmaster {postmaster}, armed for term {term}")
        }
    }
}

fn job_now(job: &Job, now: Moment) -> JobNow {
    JobNow {
        what: job.what.to_string(),
        running_ms: millis(now.since(job.since)),
        done_bytes: job.done_bytes,
        total_bytes: job.total_bytes,
        result: job.result.clone(),
    }
}

// === Warnings ===

fn warnings(
    status: &Status,
    members: &[Member],
    leader: &Leader,
    durability: &DurabilityNow,
    now: Moment,
) -> Vec<String> {
    let view = &*status.view;
    let mut warnings = Vec::new();
    let age = now.since(status.at);
    if age > view.policy.timings.ttl {
        warnings.push(format!("the agent of {} hangs: its last round was {} ago", view.me.id.name, seconds(age)));
    }
    if let Store::Unknown { why, .. } = &view.store {
        warnings.push(format!("the store is not readable, what is shown of the others is old: {why}"));
    }
    if leader.state != "held" {
        warnings.push(leader.message.clone());
        if !matches!(leader.state, "electing" | "unknown") {
            // L6: whom it waits for, and what a person can do about it.
            let outlook = outlook(view);
            warnings.push(outlook.says);
            warnings.extend(outlook.forced.map(|forced| forced.says));
        }
    }
    if durability.degraded || durability.stalled {
        warnings.push(durability.message.clone());
    }
    for member in members {
        match (member.silent, member.seen_ms_ago) {
            (true, Some(ms)) => {
                warnings.push(format!(
                    "{} has not been heard of for {}",
                    member.name,
                    seconds(Duration::from_millis(ms))
                ));
            }
            (true, None) => warnings.push(format!("{} has not been heard of", member.name)),
            (false, _) if member.pending_restart => {
                warnings.push(format!("{}: settings wait for a restart of PostgreSQL", member.name));
            }
            (false, _) if member.role == Standing::Unled => {
                warnings.push(format!("{} says that it is read-write, but does not lead", member.name));
            }
            (false, _) => {}
        }
        for kept in member.kept.iter().filter(|kept| kept.transactions > 0) {
            warnings.push(format!(
                "{} had {} transactions that the cluster went on without (timeline {} after {}): listed and kept in {}; remove \
                 that directory when nothing in it is needed",
                member.name, kept.transactions, kept.timeline, kept.left_at, kept.directory
            ));
        }
    }
    warnings.extend(disk_warnings(view));
    warnings.extend(local_warnings(view));
    warnings
}

/// Of all members: whoever has trouble with its disk may not be able to say so itself for long.
fn disk_warnings(view: &View) -> Vec<String> {
    let own = trouble(view).or_else(|| no_memory(view)).map(|trouble| trouble.to_string()).or_else(|| full(view));
    let own = own.map(|why| format!("{}: {why}", view.me.id.name));
    let others = view.store.records().into_iter().flat_map(|records| &records.members);
    let others = others.filter(|(name, _)| **name != view.me.id.name);
    let said = others.filter_map(|(name, m)| m.value.storage.hindrance().map(|why| format!("{name}: {why}")));
    own.into_iter().chain(said).collect()
}

fn local_warnings(view: &View) -> Vec<String> {
    let mut warnings = Vec::new();
    let (guard, name) = (&view.local.guard, &view.me.id.name);
    if let GuardState::Absent { why } = &guard.state {
        warnings.push(format!("{name}: no guardian answers, so nothing can be promoted here: {why}"));
    } else {
        if !guard.death_covered {
            warnings.push(format!("{name}: PostgreSQL would outlive its guardian's death"));
        }
        if !guard.control_group {
            warnings.push(format!("{name}: the guardian has no control group, so killing takes longer"));
        }
        if !guard.real_time {
            warnings.push(format!("{name}: the guardian has no real-time priority, so it may be late under load"));
        }
    }
    if let Some(facts) = view.local.postgres.primary() {
        warnings.extend(facts.exceptions.iter().map(|exception| format!("{name}: {exception}")));
    }
    if view.memory.doubtful_sync {
        warnings.push(
            "the outcome of a change of the synchronous set is unknown; enough for both sets is enforced".to_owned(),
        );
    }
    if view.memory.rejoin_failures > 0 {
        warnings.push(format!("{name}: rejoining has failed {} times", view.memory.rejoin_failures));
    }
    if let Some(records) = view.store.records() {
        warnings
            .extend(records.unreadable.iter().map(|(key, why)| format!("the store's {key} is not readable: {why}")));
    }
    warnings
}

#[cfg(test)]
mod tests;
