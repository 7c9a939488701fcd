//! What a member says of itself in the store, and when.

use super::plan::{Plan, Step};
use super::records::{
    DataSummary, JobProgress, Key, LeaderState, MemberRecord, Role, StorageSummary, Transaction, Write,
};
use super::rules::Facts;
use super::storage::{Place, full, no_memory, trouble};
use super::time::Moment;
use super::view::{DataDirectory, GuardState, JobKind, LocalPostgres, Receiver, View};

/// Publishes on every change that others act on, and at least every `member.publish`.
pub fn step(view: &View, plan: &Plan) -> Option<Step> {
    let facts = Facts::of(view)?;
    // In the middle of a change of leader every millisecond counts and nobody reads it.
    let changing = facts.records.init.value().is_some()
        && facts.leader.is_some_and(|l| !matches!(l.value.state, LeaderState::Held));
    let recent = |at: &Moment| view.now.since(*at) < view.policy.member_publish;
    if changing && view.memory.published.as_ref().is_some_and(|(at, _)| recent(at)) {
        return None;
    }
    let mut record = record(view, plan);
    let due = match &view.memory.published {
        None => true,
        Some((at, before)) => view.now.since(*at) >= view.policy.member_publish || changed(before, &record),
    };
    if !due {
        return None;
    }
    let stored = facts.records.members.get(&facts.me().name);
    // What this incarnation once had it has for good: a disk of the past is told from the present by it (election.rs).
    if let Some(stored) = stored.filter(|stored| stored.value.incarnation == record.incarnation) {
        record.replayed = record.replayed.max(stored.value.replayed);
    }
    // Outlives a restart of the agent: the next suspicion is judged by it.
    record.overtaken = record.overtaken.max(stored.and_then(|stored| stored.value.overtaken));
    let known = view.memory.published.as_ref().map(|(_, r)| r.beat).unwrap_or(0);
    record.beat = stored.map(|r| r.value.beat).unwrap_or(0).max(known) + 1;
    let revision = stored.map(|r| r.revision).unwrap_or(0);
    let name = facts.me().name.clone();
    Some(Step::Commit {
        what: "publish this member".to_owned(),
        transaction: Transaction::when(Key::Member(name.clone()), revision).put(Write::Member(name, Box::new(record))),
    })
}

/// A receiver that comes and goes is told with the next regular publication: when a primary dies, its standbys have more
/// urgent things to write.
fn settled(state: &str) -> String {
    if state == "streaming" { "running".to_owned() } else { state.to_owned() }
}

/// Positions and sentences alone are not worth a write of their own.
fn changed(before: &MemberRecord, now: &MemberRecord) -> bool {
    let relevant = |r: &MemberRecord| {
        (
            (r.incarnation, r.start_counter, r.data.clone(), r.role, settled(&r.state)),
            (r.timeline, r.term, r.host.clone(), r.port, r.endpoint, r.tags.clone()),
            (
                r.pending_restart,
                r.job.as_ref().map(|j| j.what.clone()),
                r.overtaken.max(before.overtaken),
                r.kept.clone(),
            ),
            (r.storage.trouble.is_some(), r.storage.full.is_some()),
        )
    };
    relevant(before) != relevant(now)
}

pub fn record(view: &View, plan: &Plan) -> MemberRecord {
    let me = &view.me;
    let (role, timeline, received, replayed, version, pending_restart) = match &view.local.postgres {
        LocalPostgres::Primary(p) => {
            (Role::Primary, Some(p.timeline), Some(p.flushed), Some(p.flushed), p.version, p.pending_restart)
        }
        LocalPostgres::Standby(s) => {
            let received = s.received.map(|r| r.max(s.replayed)).or(Some(s.replayed));
            (Role::Standby, Some(s.timeline), received, Some(s.replayed), s.version, s.pending_restart)
        }
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => {
            let version = match &view.local.data {
                DataDirectory::Present { version, .. } => version * 10_000,
                _ => 0,
            };
            (Role::None, None, None, None, version, false)
        }
    };
    MemberRecord {
        incarnation: me.id.incarnation,
        start_counter: me.start_counter,
        boot_id: me.boot_id.clone(),
        data: data(view),
        role,
        state: state(view, plan),
        timeline,
        received,
        replayed,
        term: view.memory.term,
        host: me.host.clone(),
        port: me.port,
        api_url: me.api_url.clone(),
        endpoint: me.endpoint,
        tags: me.tags.clone(),
        postgres_version: version,
        agent_version: me.agent_version.clone(),
        pending_restart,
        job: job(view),
        overtaken: view.memory.overtaken,
        rule: plan.rule.clone(),
        reason: plan.reason.clone(),
        storage: storage(view),
        beat: 0,
        witness: view.memory.witness,
        kept: view.local.kept.clone(),
    }
}

fn storage(view: &View) -> StorageSummary {
    let free = view.local.storage.places.get(&Place::Data).and_then(|disk| disk.space);
    StorageSummary {
        trouble: trouble(view).or_else(|| no_memory(view)).map(|trouble| trouble.to_string()),
        full: full(view),
        free_bytes: free.map(|space| space.free_bytes),
        data_bytes: view.local.storage.data_bytes,
    }
}

fn data(view: &View) -> DataSummary {
    match (&view.local.data, view.me.system_identifier) {
        (DataDirectory::Present { system_identifier, .. }, _) => {
            DataSummary::Present { system_identifier: *system_identifier }
        }
        (DataDirectory::Empty, None) => DataSummary::Fresh,
        (DataDirectory::Empty, Some(system_identifier)) => DataSummary::Lost { system_identifier },
        (DataDirectory::Unfinished { what }, _) => DataSummary::Unknown { why: format!("unfinished {what}") },
        (DataDirectory::Foreign { why } | DataDirectory::Unknown { why }, _) => {
            DataSummary::Unknown { why: why.clone() }
        }
    }
}

fn state(view: &View, plan: &Plan) -> String {
    if let Some(job) = view.job.as_ref().filter(|j| j.result.is_none())
        && let Some(word) = job_word(&job.what)
    {
        return word.to_owned();
    }
    if plan.rule.ends_with("crash_loop") {
        return "crash loop".to_owned();
    }
    match &view.local.postgres {
        LocalPostgres::Primary(_) => "running",
        LocalPostgres::Standby(s) if s.receiver == Receiver::Streaming => "streaming",
        LocalPostgres::Standby(_) => "running",
        LocalPostgres::Starting { .. } => "starting",
        LocalPostgres::Down if matches!(view.local.guard.state, GuardState::Survivors { .. }) => "dying",
        LocalPostgres::Down => "stopped",
        LocalPostgres::Unknown { .. } => "unknown",
    }
    .to_owned()
}

fn job_word(what: &JobKind) -> Option<&'static str> {
    match what {
        JobKind::Bootstrap => Some("initializing"),
        JobKind::Clone { .. } => Some("cloning"),
        JobKind::Rewind { .. } => Some("rewinding"),
        JobKind::Restart => Some("restarting"),
        JobKind::Stop => Some("stopping"),
        // Short: not worth a state of their own, and not a write in the middle of a failover.
        JobKind::HandOver { .. } | JobKind::Seal { .. } | JobKind::Promote { .. } | JobKind::Enforce { .. } => None,
    }
}

fn job(view: &View) -> Option<JobProgress> {
    let job = view.job.as_ref().filter(|j| j.result.is_none())?;
    job_word(&job.what)?;
    Some(JobProgress { what: job.what.to_string(), done_bytes: job.done_bytes, total_bytes: job.total_bytes })
}
