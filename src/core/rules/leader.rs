//! This member holds the term and published itself: keep PostgreSQL read-write, or say that it is not.

use std::cmp::Reverse;
use std::time::Duration;

use super::{Facts, duties};
use crate::core::election::list;
use crate::core::names::MemberName;
use crate::core::plan::{HandOver, Plan, Step};
use crate::core::records::{
    Durability, Key, Keyed, LeaderRecord, LeaderState, Operation, Outcome, Request, Transaction, Write,
};
use crate::core::time::Moment;
use crate::core::timeline::Term;
use crate::core::view::{DataDirectory, GuardState, LocalPostgres, PrimaryFacts, View};

/// A standby that streamed from here within this time can take over at once.
const READY_WITHIN: Duration = Duration::from_secs(4);

/// This member holds the term, PostgreSQL is gone, and so are its data (wiped, unmounted, unreadable, foreign): somebody
/// else has to lead. Without this the lease would be renewed for ever by a member that can do nothing with it.
pub fn unfit(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    facts.records.init.value()?;
    let mine = facts.mine().filter(|l| matches!(l.value.state, LeaderState::Held | LeaderState::Electing { .. }))?;
    let gone = matches!(view.local.guard.state, GuardState::Idle { .. } | GuardState::Survivors { .. });
    if !gone || matches!(view.local.data, DataDirectory::Present { .. }) {
        return None;
    }
    let mut record = mine.value.clone();
    let why = format!("PostgreSQL is gone and its data cannot be used ({:?})", view.local.data);
    record.state = LeaderState::Released { to: None, why: why.clone() };
    let transaction = Transaction::when(Key::Leader, mine.revision).put(Write::Leader(record));
    Some(
        Plan::new("leader.unfit", why)
            .step(Step::Kill)
            .step(facts.commit("release the term", transaction))
            .step(Step::DropLease),
    )
}

pub fn rule(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let mine = facts.mine().filter(|l| l.value.state == LeaderState::Held)?;
    let term = mine.value.term;
    if !view.lease.valid(term, view.now) {
        return Some(Plan::new("leader.lease", format!("waiting for a renewal of term {term}")));
    }
    if let (LocalPostgres::Primary(_), GuardState::Running { armed, .. }) =
        (&view.local.postgres, &view.local.guard.state)
        && *armed != Some(term)
    {
        // A record that was written again has another term: the guardian must count its deadlines, not the old term's.
        return Some(Plan::new("leader.arm", format!("arming the guardian for term {term}")).step(Step::Arm { term }));
    }
    Some(match &view.local.postgres {
        LocalPostgres::Primary(primary) => primary_plan(&facts, mine, primary),
        LocalPostgres::Down => crashed(&facts, mine, "PostgreSQL ended"),
        LocalPostgres::Standby(_) => crashed(&facts, mine, "PostgreSQL runs as a standby"),
        LocalPostgres::Starting { why } => crashed_or_wait(&facts, mine, why),
        LocalPostgres::Unknown { .. } if matches!(view.local.guard.state, GuardState::Survivors { .. }) => {
            crashed(&facts, mine, "PostgreSQL is dying")
        }
        LocalPostgres::Unknown { why } => Plan::new(
            "leader.unknown",
            format!("leading term {term}; PostgreSQL does not answer ({why}): nothing is changed"),
        ),
    })
}

fn primary_plan(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, primary: &PrimaryFacts) -> Plan {
    let view = facts.view;
    if view.stopping {
        let to = best_standby(facts, primary, None).ok();
        let reason = match &to {
            Some(to) => format!("told to stop: handing over to {to}"),
            None => "told to stop: no standby can take over, PostgreSQL is stopped".to_owned(),
        };
        return Plan::new("leader.stopping", reason)
            .step(Step::HandOver { order: hand_over(facts, mine, to.as_ref(), "the leader was told to stop", None) });
    }
    if let Some(plan) = asked(facts, mine, primary) {
        return plan;
    }
    duties::plan(facts, mine, primary)
}

// === When PostgreSQL is gone under a held term ===

fn crashed_or_wait(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, why: &str) -> Plan {
    let armed = matches!(facts.view.local.guard.state, GuardState::Running { armed: Some(_), .. });
    if armed {
        return Plan::new("leader.starting", format!("PostgreSQL does not accept connections ({why})"));
    }
    crashed(facts, mine, &format!("PostgreSQL is only starting ({why})"))
}

fn crashed(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, what: &str) -> Plan {
    let view = facts.view;
    let term = mine.value.term;
    let release = |to: Option<MemberName>, why: String| {
        let mut record = mine.value.clone();
        record.state = LeaderState::Released { to, why: why.clone() };
        let transaction = Transaction::when(Key::Leader, mine.revision).put(Write::Leader(record));
        let say = facts.commit("release the term", transaction);
        // In sync mode the seals prove that nothing more is acknowledged, so nobody has to wait for the last process to
        // go. In async mode its end is the proof, and comes first.
        let sync = facts.records.sync.value().is_some_and(|claim| claim.mode != Durability::Async);
        let order = if sync { [say, Step::Kill] } else { [Step::Kill, say] };
        Plan::new("leader.crash_release", why).steps(order).step(Step::DropLease)
    };
    let looping = view.memory.crashes.len() > view.policy.crash_max_restarts as usize;
    let ready = ready_standby(facts);
    match ready {
        Some(to)
            if (view.policy.crash_failover || looping || view.stopping)
                && (view.memory.in_place != Some(term) || view.stopping) =>
        {
            let why = format!("{what} under term {term}; {to} takes over");
            release(Some(to), why)
        }
        // A hand-over that stopped PostgreSQL and could not go on is put back where it was.
        _ if view.memory.in_place == Some(term) && !view.stopping => in_place(facts, mine, term, what),
        _ if view.stopping => release(None, format!("{what}, and the agent was told to stop")),
        _ if looping => release(
            None,
            format!(
                "{what} {} times within {:?}: not started again (crash.max_restarts = {}); find the cause in PostgreSQL's log, \
                 then `pgvigil restart {}`",
                view.memory.crashes.len(),
                view.policy.crash_window,
                view.policy.crash_max_restarts,
                facts.me().name
            ),
        ),
        _ => in_place(facts, mine, term, what),
    }
}

/// A restart in place is an election like any other (protocol §3): next term, own seal, promotion.
fn in_place(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, term: Term, what: &str) -> Plan {
    let me = &facts.me().name;
    let mut record = mine.value.clone();
    record.term = term.next();
    record.lsn = facts.last_published_lsn();
    record.state = LeaderState::Electing { coordinator: me.clone(), preferred: Some(me.clone()), winner: None };
    Plan::new("leader.restart_in_place", format!("{what} under term {term}: electing again from here"))
        .step(Step::Kill)
        .step(facts.commit(
            "begin an election in place",
            Transaction::when(Key::Leader, mine.revision).put(Write::Leader(record)),
        ))
}

/// A standby that streamed when PostgreSQL was last seen here, and whose agent speaks. Its seal judges its position.
pub fn ready_standby(facts: &Facts<'_>) -> Option<MemberName> {
    let view = facts.view;
    let claim = facts.records.sync.value()?;
    let ready = |name: &MemberName, last_seen: Moment| {
        let record = facts.records.members.get(name).map(|m| &m.value);
        *name != facts.me().name
            && record.is_some_and(|record| record.tags.may_lead() && record.storage.hindrance().is_none())
            && facts.is_there(name)
            && view.now.since(last_seen) < READY_WITHIN
            && (claim.mode == Durability::Async || claim.members.iter().any(|id| id.name == *name))
    };
    view.memory
        .streamed
        .iter()
        .filter(|(name, (_, last_seen))| ready(name, *last_seen))
        .max_by_key(|(name, (flushed, _))| {
            let priority = facts.records.members.get(*name).map(|m| m.value.tags.failover_priority);
            (priority, *flushed, Reverse((*name).clone()))
        })
        .map(|(name, _)| name.clone())
}

// === What people ask for ===

fn asked(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, primary: &PrimaryFacts) -> Option<Plan> {
    let operation = facts.view.memory.operation.as_ref()?;
    let request = &facts.records.requests.get(&operation.id)?.value;
    let finish = |outcome: Outcome, why: String| {
        Some(Plan::new("leader.request", why).step(Step::FinishRequest { id: request.id.clone(), outcome }))
    };
    if let Some(outcome) = &operation.outcome {
        return finish(
            outcome.clone(),
            format!("the request of {} could not be carried out: {outcome:?}", request.asked_by),
        );
    }
    if request.began.is_some_and(|began| began < mine.value.term) {
        let me = &facts.me().name;
        let message = format!("{me} leads term {} on timeline {}", mine.value.term, primary.timeline);
        return match &request.what {
            Operation::Switchover { to: Some(to) } | Operation::Failover { to: Some(to) } if to != me => {
                let message = format!("{to} did not take over; {message}");
                finish(Outcome::PutBack { message: message.clone() }, message)
            }
            _ => finish(Outcome::Done { message: message.clone() }, message),
        };
    }
    match &request.what {
        Operation::Switchover { to } | Operation::Failover { to } => {
            if to.as_ref() == Some(&facts.me().name) {
                let message = format!("{} leads already", facts.me().name);
                return finish(Outcome::Refused { message: message.clone() }, message);
            }
            match best_standby(facts, primary, to.as_ref()) {
                Ok(to) => Some(
                    Plan::new("leader.switchover", format!("asked by {}: handing over to {to}", request.asked_by))
                        .step(Step::HandOver { order: hand_over(facts, mine, Some(&to), "switchover", Some(request)) }),
                ),
                Err(why) => finish(Outcome::Refused { message: why.clone() }, format!("switchover refused: {why}")),
            }
        }
        Operation::Restart { .. } => Some(
            Plan::new("leader.restart", format!("asked by {}: restarting PostgreSQL in place", request.asked_by)).step(
                Step::HandOver { order: hand_over(facts, mine, Some(&facts.me().name), "restart", Some(request)) },
            ),
        ),
        Operation::Reinit { .. } => {
            let message = format!("{} leads: only a standby can be cloned anew; switch over first", facts.me().name);
            finish(Outcome::Refused { message: message.clone() }, message)
        }
    }
}

/// Every check of a planned change of leader (protocol §8); the reason names what is missing.
pub fn best_standby(
    facts: &Facts<'_>,
    primary: &PrimaryFacts,
    wanted: Option<&MemberName>,
) -> Result<MemberName, String> {
    let term = facts.view.memory.term;
    let claim = facts.records.sync.value().ok_or("the key `sync` cannot be read")?;
    let mut refused = Vec::new();
    let mut best: Option<(u32, crate::core::Lsn, Reverse<MemberName>)> = None;
    for (name, member) in &facts.records.members {
        if *name == facts.me().name || wanted.is_some_and(|w| w != name) {
            continue;
        }
        let mut no = |why: String| refused.push(format!("{name}: {why}"));
        let id = crate::core::names::MemberId { name: name.clone(), incarnation: member.value.incarnation };
        let row = primary
            .replicas
            .iter()
            .find(|r| crate::core::plan::parse_walreceiver_name(&r.application_name) == Some((id.clone(), term)));
        let Some(row) = row else {
            no("does not follow this leader".to_owned());
            continue;
        };
        let flushed = row.flushed.unwrap_or_default();
        let lag = flushed.bytes_to(primary.flushed);
        if row.state != "streaming" {
            no(format!("is catching up ({})", row.state));
        } else if !member.value.tags.may_lead() {
            no("has the tag nofailover (or failover_priority 0)".to_owned());
        } else if !facts.is_there(name) {
            no("its agent does not speak".to_owned());
        } else if let Some(why) = member.value.storage.hindrance() {
            no(why.clone());
        } else if claim.mode != Durability::Async && !claim.members.contains(&id) {
            no("is not in the synchronous set".to_owned());
        } else if lag > facts.view.policy.max_lag {
            no(format!("is {lag} bytes behind, election.max_lag is {}", facts.view.policy.max_lag));
        } else {
            let place = (member.value.tags.failover_priority, flushed, Reverse(name.clone()));
            if best.as_ref().is_none_or(|b| place > *b) {
                best = Some(place);
            }
        }
    }
    match (best, wanted) {
        (Some((_, _, Reverse(name))), _) => Ok(name),
        (None, Some(wanted)) if refused.is_empty() => {
            Err(format!("{wanted} is not a member of this cluster; members are {}", list(facts.records.members.keys())))
        }
        (None, _) if refused.is_empty() => Err("there is no other member".to_owned()),
        (None, _) => Err(refused.join("; ")),
    }
}

fn hand_over(
    facts: &Facts<'_>,
    mine: &Keyed<LeaderRecord>,
    to: Option<&MemberName>,
    why: &str,
    request: Option<&Request>,
) -> HandOver {
    let view = facts.view;
    let mut record = mine.value.clone();
    record.state = LeaderState::Released { to: to.cloned(), why: why.to_owned() };
    let target = to.filter(|to| **to != facts.me().name);
    let mut release = Transaction::when(Key::Leader, mine.revision).put(Write::Leader(record));
    if let Some(request) = request {
        // The next leader finds in it that the work was begun, and for whom.
        let mut begun = request.clone();
        begun.began = Some(mine.value.term);
        if let Operation::Switchover { to: asked } | Operation::Failover { to: asked } = &mut begun.what {
            *asked = to.cloned();
        }
        release = release.put(Write::Request(begun));
    }
    HandOver {
        term: mine.value.term,
        leader_revision: mine.revision,
        to: target.and_then(|to| facts.source(to)),
        release,
        checkpoint_timeout: view.policy.stop_timeout,
        stop_timeout: view.policy.stop_timeout,
        request: request.map(|r| r.id.clone()),
    }
}
