//! What the health checks answer, as functions of the published view: who may be sent which work.
//!
//! A balancer that asks is routing clients by the answer, so what is not known is a refusal with a reason (S12), and a
//! view that is too old speaks for nobody: a loop that hangs must not look healthy.

use std::time::Duration;

use super::lsn::Lsn;
use super::names::MemberId;
use super::plan::NOBODY;
use super::records::{LeaderRecord, LeaderState, SyncClaim, Tags};
use super::time::Moment;
use super::timeline::Term;
use super::view::{JobKind, LeaseView, LocalPostgres, PrimaryFacts, Receiver, StandbyFacts, Store, View};

/// Why the answer is yes, or why it is no.
pub type Verdict = Result<String, String>;

/// The questions, by Patroni's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    Primary,
    Leader,
    StandbyLeader,
    Replica,
    ReadOnly,
    Synchronous,
    Asynchronous,
    Quorum,
    ReadOnlySynchronous,
    ReadOnlyQuorum,
    Health,
    Liveness,
    Readiness,
}

/// Conditions on top of the question.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub lag: Option<LagLimit>,
    /// Every one of them has to be there with this value.
    pub tags: Vec<(String, String)>,
    pub replication_state: Option<ReplicationState>,
    pub mode: LagMode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LagLimit {
    Bytes(u64),
    Time(Duration),
}

/// Which end of the standby's WAL is compared with the leader's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LagMode {
    /// What queries can see.
    #[default]
    Apply,
    /// What would not be lost.
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationState {
    Streaming,
    /// Never the state of a member of ours: there is no WAL archive to recover from. Patroni knows it, so it is understood.
    InArchiveRecovery,
}

/// Answers `check` from the view published at `published`, as of `now`.
pub fn judge(check: Check, view: &View, published: Moment, now: Moment, query: &Query) -> Verdict {
    let answer = match check {
        Check::Liveness => alive(view, published, now),
        Check::StandbyLeader => Err("there are no standby clusters here".to_owned()),
        Check::Primary => primary(view, published, now),
        Check::Leader => fresh(view, published, now).and_then(|()| leads(view, now)),
        Check::Health => running(view, published, now),
        Check::Replica => replica(view, published, now, query),
        Check::ReadOnly => either(primary(view, published, now), || replica(view, published, now, query)),
        // One set, `ANY k`: whoever is in it is what Patroni calls synchronous, and what it calls quorum.
        Check::Synchronous | Check::Quorum => synchronous(view, published, now, query),
        Check::ReadOnlySynchronous | Check::ReadOnlyQuorum => {
            either(primary(view, published, now), || synchronous(view, published, now, query))
        }
        Check::Asynchronous => asynchronous(view, published, now, query),
        Check::Readiness => ready(view, published, now, query),
    }?;
    for (key, wanted) in &query.tags {
        carries(&view.me.tags, key, wanted)?;
    }
    Ok(answer)
}

// === Facts that more than the checks show ===

/// Who leads, as far as this member knows: the record says `held`, and its lease is neither silent for W nor, if it is
/// ours, over.
pub fn sitting_leader(view: &View, now: Moment) -> Option<&LeaderRecord> {
    let leader = view.store.records()?.leader()?;
    if leader.state != LeaderState::Held {
        return None;
    }
    if leader.holder == view.me.id {
        return view.lease.valid(leader.term, now).then_some(leader);
    }
    let wait = view.policy.timings.candidate_wait(Duration::from_millis(leader.ttl_ms));
    let silent = view.memory.silence.filter(|s| s.term == leader.term);
    match silent {
        Some(silence) if now.all_reached(silence.first_seen.plus(wait)) => None,
        _ => Some(leader),
    }
}

/// The furthest position that the leader is known to have reached. A lower bound: the store's is up to a heartbeat old,
/// and a standby that streams may know more.
pub fn leader_position(view: &View) -> Option<Lsn> {
    let local = match &view.local.postgres {
        LocalPostgres::Primary(primary) if view.lease.term().is_some() => Some(primary.flushed),
        LocalPostgres::Standby(standby) if standby.receiver == Receiver::Streaming => {
            standby.received.max(Some(standby.replayed))
        }
        _ => None,
    };
    let published = view.store.records().and_then(|records| {
        let lease = records.lease.value()?;
        records.leader().filter(|leader| leader.term == lease.term)?;
        lease.lsn
    });
    local.max(published)
}

/// The published claim, where it makes commits wait for somebody.
pub fn claim(view: &View) -> Option<&SyncClaim> {
    view.store.records()?.sync.value().filter(|claim| claim.k > 0)
}

/// Is this incarnation one of those whose acknowledgement a commit waits for?
pub fn counted<'a>(view: &'a View, id: &MemberId) -> Option<&'a SyncClaim> {
    claim(view).filter(|claim| claim.members.contains(id) && claim.primary != *id)
}

/// The value of a tag as `?tag_KEY=` compares it.
pub fn tag(tags: &Tags, key: &str) -> Option<String> {
    match key {
        "nofailover" => Some(tags.nofailover.to_string()),
        "failover_priority" => Some(tags.failover_priority.to_string()),
        "noloadbalance" => Some(tags.noloadbalance.to_string()),
        "nosync" => Some(tags.nosync.to_string()),
        _ => tags.custom.get(key).cloned(),
    }
}

// === The checks ===

/// How old a published round may be. T_h: the lease keeper renews only while the loop proves to be alive, so a leader
/// whose loop hangs longer than this is no leader any more; for standbys the same bound avoids a second setting.
fn fresh(view: &View, published: Moment, now: Moment) -> Result<(), String> {
    let limit = view.policy.timings.ttl;
    for (what, at) in [("its last round", published), ("its last look at PostgreSQL", view.local.observed_at)] {
        if now.any_reached(at.plus(limit)) {
            return Err(format!(
                "the agent hangs: {what} was {} ago, and {} is the limit",
                seconds(now.since(at)),
                seconds(limit)
            ));
        }
    }
    Ok(())
}

fn alive(view: &View, published: Moment, now: Moment) -> Verdict {
    // Twice as long for who has no lease to lose: a supervisor restarts the agent on a no.
    let factor = if matches!(view.lease, LeaseView::Held { .. }) { 1 } else { 2 };
    let limit = view.policy.timings.ttl * factor;
    let age = seconds(now.since(published));
    if now.any_reached(published.plus(limit)) {
        return Err(format!("the agent's last round was {age} ago, and {} is the limit", seconds(limit)));
    }
    Ok(format!("the agent's last round was {age} ago"))
}

/// Holds the leader record under the term of a lease that no clock has seen the end of.
fn leads(view: &View, now: Moment) -> Verdict {
    let LeaseView::Held { term, deadline } = &view.lease else {
        return Err("this member holds no lease".to_owned());
    };
    if !view.lease.valid(*term, now) {
        return Err(format!("the lease of term {term} is over"));
    }
    let remaining = seconds(now.until(*deadline));
    let yes = || Ok(format!("leader of term {term}, {remaining} of the lease left"));
    match &view.store {
        Store::Known { records, .. } => match records.leader() {
            Some(record) if record.term == *term && record.holder == view.me.id => match &record.state {
                LeaderState::Held => yes(),
                LeaderState::Electing { .. } => Err(format!("being promoted under term {term}, not yet open")),
                LeaderState::Released { why, .. } => Err(format!("term {term} is released: {why}")),
                LeaderState::Fenced { .. } => Err(format!("term {term} is fenced")),
            },
            Some(record) if record.term >= *term => {
                Err(format!("{} leads under term {}", record.holder.name, record.term))
            }
            // Deleted, unreadable, or from an older term: the sitting leader rewrites it before its lease ends, and until
            // then the lease is what counts (protocol §7).
            _ => in_force(view, *term).and_then(|()| yes()),
        },
        Store::Unknown { .. } => in_force(view, *term).and_then(|()| yes()),
    }
}

/// Without the record at hand: does PostgreSQL itself show that the promotion is over?
fn in_force(view: &View, term: Term) -> Result<(), String> {
    let promoting =
        view.job.as_ref().is_some_and(|job| matches!(job.what, JobKind::Promote { .. }) && job.result.is_none());
    let nobody = view.local.postgres.primary().is_some_and(|primary| primary.rule_text.contains(NOBODY));
    if promoting || nobody {
        return Err(format!(
            "the store is not readable, and the promotion under term {term} is not known to be complete"
        ));
    }
    Ok(())
}

fn primary(view: &View, published: Moment, now: Moment) -> Verdict {
    fresh(view, published, now)?;
    let why = leads(view, now)?;
    let facts: &PrimaryFacts = match &view.local.postgres {
        LocalPostgres::Primary(facts) => facts,
        other => return Err(format!("{why}, but PostgreSQL {}", describe(other))),
    };
    if !facts.writable {
        return Err(format!("{why}, but PostgreSQL is read-only (default_transaction_read_only)"));
    }
    Ok(why)
}

fn running(view: &View, published: Moment, now: Moment) -> Verdict {
    fresh(view, published, now)?;
    let postgres = &view.local.postgres;
    match postgres {
        LocalPostgres::Primary(_) | LocalPostgres::Standby(_) => Ok(format!("PostgreSQL {}", describe(postgres))),
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => {
            Err(format!("PostgreSQL {}", describe(postgres)))
        }
    }
}

fn standby(view: &View, published: Moment, now: Moment) -> Result<&StandbyFacts, String> {
    fresh(view, published, now)?;
    view.local.postgres.standby().ok_or_else(|| format!("PostgreSQL {}", describe(&view.local.postgres)))
}

fn replica(view: &View, published: Moment, now: Moment, query: &Query) -> Verdict {
    let facts = standby(view, published, now)?;
    if view.me.tags.noloadbalance {
        return Err("tagged noloadbalance".to_owned());
    }
    match query.replication_state {
        None => {}
        Some(ReplicationState::Streaming) if facts.receiver == Receiver::Streaming => {}
        Some(ReplicationState::Streaming) => return Err(format!("not streaming: {}", receiver(facts))),
        Some(ReplicationState::InArchiveRecovery) => {
            return Err(format!("not in archive recovery: {}", receiver(facts)));
        }
    }
    match query.lag {
        None => Ok(format!("standby on timeline {}, {}", facts.timeline, receiver(facts))),
        Some(limit) => within(view, facts, limit, query.mode),
    }
}

fn synchronous(view: &View, published: Moment, now: Moment, query: &Query) -> Verdict {
    let why = replica(view, published, now, query)?;
    if let Store::Unknown { why, .. } = &view.store {
        return Err(format!("the store is not readable, so the synchronous set is not known: {why}"));
    }
    match counted(view, &view.me.id) {
        Some(claim) => Ok(format!("{why}; one of {} of whom commits wait for {}", claim.members.len(), claim.k)),
        None => Err("not in the synchronous set".to_owned()),
    }
}

fn asynchronous(view: &View, published: Moment, now: Moment, query: &Query) -> Verdict {
    let why = replica(view, published, now, query)?;
    if let Store::Unknown { why, .. } = &view.store {
        return Err(format!("the store is not readable, so the synchronous set is not known: {why}"));
    }
    match counted(view, &view.me.id) {
        Some(_) => Err("in the synchronous set".to_owned()),
        None => Ok(why),
    }
}

fn ready(view: &View, published: Moment, now: Moment, query: &Query) -> Verdict {
    let no = match primary(view, published, now) {
        Ok(why) => return Ok(why),
        Err(why) => why,
    };
    // A PostgreSQL that is read-write has only one way to be ready: being the leader's.
    if view.local.postgres.primary().is_some() {
        return Err(no);
    }
    let facts = standby(view, published, now)?;
    if facts.receiver != Receiver::Streaming {
        return Err(format!("not streaming: {}", receiver(facts)));
    }
    within(view, facts, query.lag.unwrap_or(LagLimit::Bytes(view.policy.max_lag)), query.mode)
}

// === Parts ===

fn either(first: Verdict, second: impl FnOnce() -> Verdict) -> Verdict {
    first.or_else(|no| second().map_err(|also_no| if no == also_no { no } else { format!("{no}; {also_no}") }))
}

fn within(view: &View, facts: &StandbyFacts, limit: LagLimit, mode: LagMode) -> Verdict {
    let leader = leader_position(view);
    let here = match mode {
        LagMode::Apply => facts.replayed,
        LagMode::Write => facts.replayed.max(facts.received.unwrap_or_default()),
    };
    match limit {
        LagLimit::Bytes(limit) => {
            let leader = leader.ok_or("the leader's position is not known, so neither is the lag")?;
            let lag = here.bytes_to(leader);
            if lag > limit {
                Err(format!("{lag} bytes behind, {limit} allowed"))
            } else {
                Ok(format!("{lag} bytes behind"))
            }
        }
        LagLimit::Time(limit) => {
            // Everything there is has been replayed: an idle leader is not a lagging standby.
            if leader.is_some_and(|leader| here >= leader) {
                return Ok("nothing behind".to_owned());
            }
            let delay = facts.replay_delay_ms.ok_or("nothing was replayed yet, so the lag is not known")?;
            let delay = Duration::from_millis(delay);
            if delay > limit {
                Err(format!("{} behind, {} allowed", seconds(delay), seconds(limit)))
            } else {
                Ok(format!("{} behind", seconds(delay)))
            }
        }
    }
}

fn carries(tags: &Tags, key: &str, wanted: &str) -> Result<(), String> {
    match tag(tags, key) {
        Some(value) if value == wanted => Ok(()),
        Some(value) => Err(format!("tag {key} is `{value}`, not `{wanted}`")),
        None => Err(format!("there is no tag {key}")),
    }
}

fn describe(postgres: &LocalPostgres) -> String {
    match postgres {
        LocalPostgres::Down => "does not run".to_owned(),
        LocalPostgres::Starting { why } => format!("accepts no connections yet: {why}"),
        LocalPostgres::Standby(facts) => format!("is a standby on timeline {}", facts.timeline),
        LocalPostgres::Primary(facts) => format!("is read-write on timeline {}", facts.timeline),
        LocalPostgres::Unknown { why } => format!("is in an unknown state: {why}"),
    }
}

fn receiver(facts: &StandbyFacts) -> &'static str {
    match facts.receiver {
        Receiver::Streaming => "streaming",
        Receiver::Connecting => "its walreceiver is connecting",
        Receiver::None => "no walreceiver runs",
    }
}

/// For sentences: tenths of a second are as much as anybody reads.
pub fn seconds(span: Duration) -> String {
    format!("{:.1} s", span.as_secs_f64())
}

#[cfg(test)]
mod tests;
