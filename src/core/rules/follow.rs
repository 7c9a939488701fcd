//! Another member leads, or was chosen: follow it, after judging our own history against its (protocol §8, rejoin).

use std::time::Duration;

use super::{Facts, accept, bootstrap, duties, seconds};
use crate::core::Lsn;
use crate::core::memory::retry_delay;
use crate::core::names::MemberName;
use crate::core::outlook::outlook;
use crate::core::plan::{Plan, Step};
use crate::core::records::{Durability, LeaderRecord, LeaderState, Operation, Outcome};
use crate::core::silence::{WayB, way_b};
use crate::core::storage::aside_within_budget;
use crate::core::time::Moment;
use crate::core::timeline::{History, Term, TimelineId};
use crate::core::view::{DataDirectory, LocalPostgres, Receiver, StandbyFacts, View};

/// So many attempts at rejoining, then a person is asked.
const REJOIN_ATTEMPTS: u32 = 3;
/// How long the leader may take to drop who did not stream for `sync.max_stall`.
const LEAVING: Duration = Duration::from_secs(2);

pub fn rule(view: &View) -> Option<Plan> {
    let mut plan = follow_leader(view)?;
    // L6: silent for long enough, and yet it is followed: say why.
    if let WayB::Barred { why } = way_b(&Facts::of(view)?) {
        plan.reason.push_str(&format!("; {why}"));
    }
    Some(plan)
}

fn follow_leader(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    facts.records.init.value()?;
    if !matches!(view.local.data, DataDirectory::Present { .. }) {
        return None;
    }
    let Some(leader) = facts.leader else {
        return Some(Plan::new("follow.no_leader", "no leader has ever been there").steps(facts.start_parked()));
    };
    let Some((upstream, timeline, switch)) = upstream(&leader.value) else {
        return Some(
            Plan::new("follow.wait", format!("waiting for a leader of term {}", leader.value.term))
                .steps(facts.start_parked()),
        );
    };
    if upstream == facts.me().name {
        return Some(Plan::new("follow.wait", "this member's own term; waiting for it to be settled"));
    }
    if let Some(plan) = asked(&facts, &leader.value) {
        return Some(plan);
    }
    let failures = view.memory.crashes.len();
    let plan = match &view.local.postgres {
        LocalPostgres::Down if leader.value.state != LeaderState::Held && !view.memory.durable.must_follow => {
            // Not in the way of a promotion that does without us.
            let since = view.memory.term_since.unwrap_or(view.now);
            Plan::new("follow.wait", format!("{upstream} is being promoted"))
                .steps(facts.start_when_needed(since))
                .wake_at(since.plus(view.policy.election_wait))
        }
        LocalPostgres::Down => start(&facts, failures, &upstream, leader.value.term),
        LocalPostgres::Starting { why } => starting(&facts, why, &upstream, leader.value.term),
        LocalPostgres::Standby(standby) => follow(&facts, &leader.value, standby, upstream, timeline, switch),
        LocalPostgres::Primary(_) | LocalPostgres::Unknown { .. } => {
            Plan::new("follow.wait", "PostgreSQL here is not a standby")
        }
    };
    Some(match silence(&facts, &leader.value) {
        Some(silence) => Plan { reason: format!("{}; {silence}", plan.reason), ..plan },
        None => plan,
    })
}

/// L6: whom the cluster waits for is named as soon as its leader is missed, not when its lease is over.
fn silence(facts: &Facts<'_>, leader: &LeaderRecord) -> Option<String> {
    let timings = &facts.view.policy.timings;
    let silent = facts.now().since(facts.view.memory.silence?.first_seen);
    if silent < timings.heartbeat * 3 / 2 || leader.state != LeaderState::Held {
        return None;
    }
    let wait = timings.candidate_wait(Duration::from_millis(leader.ttl_ms));
    let says = outlook(facts.view).says;
    Some(format!("{} is silent for {} of {}: {says}", leader.holder.name, seconds(silent), seconds(wait)))
}

/// Parent timeline, and where it was left.
type Switch = (TimelineId, Lsn);

/// Whom to follow, its timeline, and where it left the one before; a winner is followed before it has published.
fn upstream(record: &LeaderRecord) -> Option<(MemberName, TimelineId, Option<Switch>)> {
    match &record.state {
        LeaderState::Held => {
            let last = record.last.as_ref()?;
            Some((record.holder.name.clone(), last.timeline, last.parent.zip(last.switch)))
        }
        LeaderState::Electing { winner: Some(winner), .. } => {
            Some((winner.member.name.clone(), winner.timeline, Some((winner.parent, winner.switch))))
        }
        LeaderState::Electing { winner: None, .. } | LeaderState::Released { .. } | LeaderState::Fenced { .. } => None,
    }
}

/// Data that were copied or rewound reach consistency only by the leader's WAL; when that leader is gone, by the next one's.
fn starting(facts: &Facts<'_>, why: &str, upstream: &MemberName, term: Term) -> Plan {
    let wanted = facts.follow(upstream, term);
    let started = &facts.view.memory.started;
    if facts.view.memory.durable.must_follow && wanted.is_some() && *started != wanted {
        return Plan::new(
            "follow.restart",
            format!("not consistent yet and its leader is gone: starting it after {upstream}"),
        )
        .step(Step::Stop { timeout: facts.view.policy.stop_timeout });
    }
    Plan::new("follow.starting", format!("PostgreSQL is starting ({why})"))
}

fn start(facts: &Facts<'_>, failures: usize, upstream: &MemberName, term: Term) -> Plan {
    let view = facts.view;
    if super::storage::not_to_start(view).is_some() {
        return Plan::new("follow.stalled", "PostgreSQL is not started on a disk that takes no writes");
    }
    if crate::core::storage::full(view).is_some() {
        // The reason says what is missing (`storage::remark`). Started again and again it would only fail the same way.
        return Plan::new(
            "follow.full",
            "PostgreSQL is not started on a full disk; it starts by itself when there is room",
        );
    }
    let limit = view.policy.crash_max_restarts as usize;
    if failures > limit {
        return Plan::new(
            "follow.crash_loop",
            format!(
                "PostgreSQL ended {failures} times within {:?} (crash.max_restarts = {limit}): not started again until that \
                 time is over or `pgvigil restart {}` is called; see PostgreSQL's log",
                view.policy.crash_window,
                facts.me().name
            ),
        );
    }
    if let Some((_, last)) = view.memory.crashes.last() {
        let at = last.plus(retry_delay(failures as u32));
        if failures > 2 && !view.now.any_reached(at) {
            return Plan::new(
                "follow.restart_wait",
                format!("PostgreSQL ended {failures} times; starting it again soon"),
            )
            .wake_at(at);
        }
    }
    if view.memory.durable.must_follow {
        if failures > 1 {
            return reclone(facts, format!("copied data do not start after {upstream} ({failures} attempts)"));
        }
        return match facts.follow(upstream, term) {
            Some(follow) => Plan::new(
                "follow.start_following",
                format!("copied from another member: starting PostgreSQL after {upstream}"),
            )
            .step(Step::Start { follow: Some(follow) }),
            None => Plan::new("follow.address", format!("the address of {upstream} is not known yet")),
        };
    }
    // Always parked first: a position before recovery is not a position, and only the end of our own WAL tells whether it
    // lies on the leader's history.
    Plan::new("follow.start", "starting PostgreSQL parked to learn where its WAL ends").steps(facts.start_parked())
}

fn follow(
    facts: &Facts<'_>,
    record: &LeaderRecord,
    standby: &StandbyFacts,
    upstream: MemberName,
    timeline: TimelineId,
    switch: Option<Switch>,
) -> Plan {
    let view = facts.view;
    if record.term < view.memory.durable.sealed_term {
        return Plan::new(
            "follow.sealed",
            format!(
                "sealed for term {}: a leader of term {} is not followed",
                view.memory.durable.sealed_term, record.term
            ),
        );
    }
    let Some(mut history) = switch
        .and_then(|(parent, switch)| {
            let mut older = History::from_reservations(parent, &facts.records.timelines)?;
            older.0.push(crate::core::timeline::HistoryEntry { timeline: parent, switch });
            Some(older)
        })
        .or_else(|| History::from_reservations(timeline, &facts.records.timelines))
    else {
        return Plan::new(
            "follow.history",
            format!("the history of timeline {timeline} is not known to the store (S12)"),
        );
    };
    history.0.retain(|e| e.timeline < timeline);
    if standby.timeline != timeline {
        match history.switch_from(standby.timeline) {
            Some(left) if standby.replayed <= left => {}
            Some(left) => {
                return diverged(
                    facts,
                    record,
                    timeline,
                    format!(
                        "{} bytes of WAL after {left} of timeline {} are of another history than {upstream}'s timeline {timeline}",
                        left.bytes_to(standby.replayed),
                        standby.timeline
                    ),
                );
            }
            None => {
                return diverged(
                    facts,
                    record,
                    timeline,
                    format!("timeline {} is not an ancestor of {upstream}'s timeline {timeline}", standby.timeline),
                );
            }
        }
    }
    let Some(wanted) = facts.follow(&upstream, record.term) else {
        return Plan::new("follow.address", format!("the address of {upstream} is not known yet"));
    };
    if standby.follows.as_ref() != Some(&wanted) {
        return Plan::new("follow.turn", format!("following {upstream} under term {}", record.term))
            .step(Step::Follow { follow: wanted });
    }
    if let Some(since) = view.memory.not_streaming
        && view.now.since(since) >= view.policy.rejoin_timeout
        && record.state == LeaderState::Held
        && view.policy.reclone
    {
        let because = format!(
            "followed {upstream} for {} without streaming (its WAL may be gone there)",
            seconds(view.now.since(since))
        );
        return reclone(facts, because);
    }
    let doing = match standby.receiver {
        Receiver::Streaming => "streaming",
        Receiver::Connecting => "connecting",
        Receiver::None => "waiting to connect",
    };
    let mut plan = Plan::new("follow", format!("{doing} from {upstream} under term {}", record.term));
    if let Some(step) = slots(facts, standby) {
        plan = plan.step(step);
    }
    plan
}

/// A standby keeps slots for the others too, so that it can be followed the moment it is promoted.
fn slots(facts: &Facts<'_>, standby: &StandbyFacts) -> Option<Step> {
    let members = duties::slot_members(facts);
    let missing = members.iter().any(|(name, _)| !standby.slots.contains_key(&name.slot()));
    let foreign = standby
        .slots
        .keys()
        .any(|slot| slot.starts_with("pgvigil_") && members.iter().all(|(name, _)| name.slot() != *slot));
    // Moved on only by leaps: every move is a write of a small file.
    let behind = members.iter().any(|(name, at)| {
        let kept = standby.slots.get(&name.slot()).copied().flatten();
        at.zip(kept).is_some_and(|(at, kept)| kept.bytes_to(at.min(standby.replayed)) > 16 << 20)
    });
    (missing || foreign || behind).then_some(Step::KeepSlots { members })
}

fn diverged(facts: &Facts<'_>, record: &LeaderRecord, timeline: TimelineId, why: String) -> Plan {
    let view = facts.view;
    if record.state != LeaderState::Held {
        return Plan::new("follow.diverged", format!("{why}; waiting for the new leader to be settled"));
    }
    if crate::core::storage::full(view).is_some() {
        // Both need room, and failing at it would cost the data that are here.
        return Plan::new("follow.full", format!("{why}; neither rewound nor cloned on a full disk"));
    }
    if let Some(after) = view.memory.retry_after
        && !view.now.any_reached(after)
    {
        return Plan::new("follow.retry", format!("{why}; trying again soon")).wake_at(after);
    }
    if let Some(until) = leaves_by(facts) {
        return Plan::new("follow.leaving", format!("{why}; not rewound while elections still count on these data"))
            .wake_at(until);
    }
    match view.memory.rejoin_failures {
        0 => match facts.source(&record.holder.name) {
            Some(from) => Plan::new("follow.rewind", format!("{why}: rewinding; the WAL that differs is kept"))
                .step(Step::NewIncarnation { copied: false })
                .step(Step::Rewind { from, timeline }),
            None => Plan::new("follow.address", format!("the address of {} is not known yet", record.holder.name)),
        },
        1 if view.policy.reclone => reclone(facts, format!("{why}, and could not be rewound")),
        failures if failures < REJOIN_ATTEMPTS && view.policy.reclone => reclone(facts, why),
        failures => Plan::new(
            "follow.ask",
            format!(
                "{why}; {failures} attempts failed, nothing more is tried: look at the log, then `pgvigil reinit {}`",
                facts.me().name
            ),
        ),
    }
}

/// L1: a member leaves the published set before its data are given up (protocol §4). Until then an election needs them, and
/// two that are rewound at once could make one impossible. `None`: it has left, cannot leave, or was waited for long enough.
fn leaves_by(facts: &Facts<'_>) -> Option<Moment> {
    let view = facts.view;
    let claim = facts.records.sync.value().filter(|claim| claim.mode != Durability::Async)?;
    let named = claim.members.contains(facts.me()) && claim.members.len() > claim.k as usize;
    // The leader drops who does not stream within `sync.max_stall`.
    let until = view.memory.term_since?.plus(view.policy.max_stall + LEAVING);
    (named && !view.now.any_reached(until)).then_some(until)
}

/// S5: nothing is set aside for the sake of a leader that has not renewed lately.
fn leader_speaks(facts: &Facts<'_>) -> bool {
    let view = facts.view;
    view.memory.silence.is_some_and(|s| view.now.since(s.first_seen) < view.policy.timings.heartbeat * 3)
}

fn reclone(facts: &Facts<'_>, because: String) -> Plan {
    if !leader_speaks(facts) {
        return Plan::new(
            "follow.leader_silent",
            format!("{because}; the leader is silent, so the data stay where they are"),
        );
    }
    let memory = &facts.view.memory;
    if memory.rejoin_failures >= REJOIN_ATTEMPTS || memory.copies >= REJOIN_ATTEMPTS {
        return Plan::new(
            "follow.ask",
            format!(
                "{because}; {} attempts failed, nothing more is tried: look at the log, then `pgvigil reinit {}`",
                memory.rejoin_failures.max(memory.copies),
                facts.me().name
            ),
        );
    }
    if let Err(why) = room(facts) {
        return Plan::new("follow.no_room", format!("{because}; not cloned anew: {why}"));
    }
    let running = !matches!(facts.view.local.postgres, LocalPostgres::Down);
    if running {
        return Plan::new("follow.reclone", format!("{because}: stopping PostgreSQL to set its data aside"))
            .step(Step::Stop { timeout: facts.view.policy.stop_timeout })
            .step(Step::SetAside { why: because });
    }
    bootstrap::clone_plan(facts, Some(because.clone()), &because)
}

/// Room for a copy of the leader's data beside ours, which stay (S5), and for ours within the budget.
fn room(facts: &Facts<'_>) -> Result<(), String> {
    aside_within_budget(facts.view)?;
    super::storage::room_for_copy(facts)
}

fn asked(facts: &Facts<'_>, record: &LeaderRecord) -> Option<Plan> {
    let operation = facts.view.memory.operation.as_ref()?;
    let request = &facts.records.requests.get(&operation.id)?.value;
    if let Some(outcome) = &operation.outcome {
        let why = format!("the request of {} could not be carried out: {outcome:?}", request.asked_by);
        let finish = Step::FinishRequest { id: request.id.clone(), outcome: outcome.clone() };
        return Some(Plan::new("follow.request", why).step(finish));
    }
    match &request.what {
        Operation::Restart { .. } => Some(
            Plan::new("follow.restart", format!("asked by {}: restarting PostgreSQL", request.asked_by))
                .step(Step::RestartInPlace { timeout: facts.view.policy.stop_timeout })
                .step(Step::FinishRequest {
                    id: request.id.clone(),
                    outcome: Outcome::Done { message: "PostgreSQL is restarted".to_owned() },
                }),
        ),
        Operation::Reinit { .. } if record.state == LeaderState::Held && leader_speaks(facts) => {
            if let Err(why) = room(facts) {
                let outcome = Outcome::Refused { message: why.clone() };
                let finish = Step::FinishRequest { id: request.id.clone(), outcome };
                return Some(Plan::new("follow.request", format!("reinit refused: {why}")).step(finish));
            }
            let why = format!("asked by {}", request.asked_by);
            let mut plan = Plan::new("follow.reinit", format!("{why}: setting the data aside and cloning anew"));
            if !matches!(facts.view.local.postgres, LocalPostgres::Down) {
                plan = plan.step(Step::Stop { timeout: facts.view.policy.stop_timeout });
            }
            // Answered first: a restart of the agent in between must not repeat it on the new data.
            let message = "the data are being set aside and cloned anew".to_owned();
            plan = plan.step(Step::FinishRequest { id: request.id.clone(), outcome: Outcome::Done { message } });
            Some(plan.step(Step::SetAside { why }))
        }
        Operation::AcceptStore { .. } => Some(accept::not_needed(request)),
        Operation::Reinit { .. } | Operation::Switchover { .. } | Operation::Failover { .. } => None,
    }
}
