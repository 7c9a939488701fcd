//! Beginning an election (protocol §5): the term was released, or its lease is silent for W by our own clocks (way A); or its
//! holder gives no sign of life to anybody whose seal is needed, and commits need theirs (way B).

use std::time::Duration;

use super::{Facts, cold_start, scattered, seconds};
use crate::core::election::list;
use crate::core::names::{MemberId, MemberName};
use crate::core::plan::Plan;
use crate::core::records::{
    Durability, Entry, Key, LeaderRecord, LeaderState, Operation, SyncClaim, Taken, Transaction, Write,
};
use crate::core::silence::{self, WayB};
use crate::core::time::Moment;
use crate::core::view::{DataDirectory, LocalPostgres, View};

/// How long a release by name keeps the others back, on each one's own clock.
const NAME_BINDS: Duration = Duration::from_secs(1);

pub fn rule(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    facts.records.init.value()?;
    let leader = facts.leader?;
    let (since, preferred, way) = match vacancy(&facts, &leader.value) {
        Vacancy::Occupied => return None,
        Vacancy::Until { at, why } => return hold(&facts, why, at),
        Vacancy::Open { why, preferred, way } => (why, preferred, way),
    };

    if !matches!(view.local.data, DataDirectory::Present { .. }) {
        // Nothing to stand with: the clone waits for a leader.
        return None;
    }
    if view.memory.durable.must_follow {
        // Not consistent without its leader's WAL: of no use in an election.
        return None;
    }
    let wait = |why: String| Some(Plan::new("takeover.wait", format!("{since}; {why}")).steps(facts.start_parked()));
    if view.me.tags.nofailover || view.me.tags.failover_priority == 0 {
        return wait("this member is tagged nofailover and does not stand".to_owned());
    }
    if super::storage::not_to_lead(view).is_some() {
        return wait("this member does not stand".to_owned());
    }
    let limit = view.policy.crash_max_restarts as usize;
    if view.memory.crashes.len() > limit {
        return Some(Plan::new(
            "takeover.crash_loop",
            format!(
                "{since}; PostgreSQL here ended {} times within {:?} (crash.max_restarts = {limit}): not started again until \
                 that time is over or `pgvigil restart {}` is called",
                view.memory.crashes.len(),
                view.policy.crash_window,
                facts.me().name
            ),
        ));
    }
    match &view.local.postgres {
        LocalPostgres::Standby(_) => {}
        LocalPostgres::Down => return wait("starting PostgreSQL parked".to_owned()),
        LocalPostgres::Starting { why } => return wait(format!("waiting for recovery here ({why})")),
        LocalPostgres::Primary(_) | LocalPostgres::Unknown { .. } => return None,
    }

    let Entry::Present(claim) = &facts.records.sync else {
        return wait("the key `sync` is absent or unreadable: nobody is elected on a guess (S12)".to_owned());
    };
    if let Err(why) = may_stand(&facts, &claim.value) {
        return wait(why);
    }
    let mut record = leader.value.clone();
    record.holder = facts.me().clone();
    record.boot_id = view.me.boot_id.clone();
    record.term = leader.value.term.max(view.memory.durable.highest_term).next();
    record.ttl_ms = view.policy.timings.ttl.as_millis() as u64;
    record.takeover_ms = view.policy.takeover.after.as_millis() as u64;
    record.taken = taken(&facts, &leader.value, way);
    record.lsn = facts.last_published_lsn();
    record.state = LeaderState::Electing { coordinator: facts.me().name.clone(), preferred, winner: None };
    let reason = format!("{since}: electing for term {}", record.term);
    // One transaction: the record as we saw it becomes ours (step 1). The claim is read after it, never before.
    // The lease too: a reading that is old by now must not take over from a leader that renewed since.
    let mut transaction = Transaction::when(Key::Leader, leader.revision)
        .and(Key::Lease, facts.records.lease.revision())
        .put(Write::Leader(record));
    if way == Way::B {
        // S1: the claim that makes clocks needless still stands. A leader that went over to async since acknowledges alone.
        transaction = transaction.and(Key::Sync, facts.records.sync.revision());
    }
    Some(Plan::new("takeover", reason).step(facts.commit("begin an election", transaction)))
}

enum Vacancy {
    /// Somebody leads or elects, as far as we know.
    Occupied,
    Until {
        at: Moment,
        why: String,
    },
    Open {
        why: String,
        preferred: Option<MemberName>,
        way: Way,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    A,
    B,
}

/// Could the record be taken from its holder now?
pub fn is_open(facts: &Facts<'_>, record: &LeaderRecord) -> bool {
    matches!(vacancy(facts, record), Vacancy::Open { .. })
}

/// What the new record says of how it began. A change that has not ended yet keeps the suspicion that it began with.
fn taken(facts: &Facts<'_>, record: &LeaderRecord, way: Way) -> Option<Taken> {
    let published = record.last.as_ref().is_some_and(|last| last.term == record.term);
    let now = || Taken { from: record.holder.clone(), term: record.term, doubled: silence::doubled(facts, record) };
    record.taken.clone().filter(|_| !published).or_else(|| (way == Way::B).then(now))
}

fn vacancy(facts: &Facts<'_>, record: &LeaderRecord) -> Vacancy {
    let view = facts.view;
    let term = record.term;
    match &record.state {
        LeaderState::Released { to, why } => {
            let seen = view.memory.releases.map(|r| r.first_seen).unwrap_or(view.now);
            let said = format!("term {term} was released by {} ({why})", record.holder.name);
            let asked = asked_for(facts).or_else(|| to.clone());
            let mut not_before = seen;
            if to.as_ref().is_some_and(|to| *to != facts.me().name) {
                not_before = seen.plus(NAME_BINDS);
            } else if to.is_none() && record.holder == *facts.me() {
                // We gave up or crashed ourselves: the others first, and never in step with them.
                not_before =
                    seen.plus(Duration::from_millis(300) + scattered(facts.me(), term, Duration::from_secs(2)));
            }
            if view.now.all_reached(not_before) {
                Vacancy::Open { why: said, preferred: asked, way: Way::A }
            } else {
                Vacancy::Until { at: not_before, why: format!("{said}; {} goes first", name_or_others(to.as_ref())) }
            }
        }
        LeaderState::Fenced { survivors } => Vacancy::Open {
            why: format!("{} is fenced with {survivors} processes left in uninterruptible I/O", record.holder.name),
            preferred: asked_for(facts),
            way: Way::A,
        },
        LeaderState::Held | LeaderState::Electing { .. } => {
            let Some(silence) = view.memory.silence else { return Vacancy::Occupied };
            let patience = view.policy.timings.candidate_wait(Duration::from_millis(record.ttl_ms));
            let at = silence.first_seen.plus(patience);
            let silent = view.now.since(silence.first_seen);
            if view.now.all_reached(at) {
                let why = format!("{} is silent for {} under term {term}", record.holder.name, seconds(silent));
                return Vacancy::Open { why, preferred: asked_for(facts), way: Way::A };
            }
            // A person says that its host is off: nothing is left to be waited for, unless it renews.
            let off = facts.records.forced().is_some_and(|force| force.off.contains(&record.holder.name));
            if off && silent >= view.policy.timings.heartbeat * 2 {
                let why =
                    format!("{} is off by a person's word and silent for {}", record.holder.name, seconds(silent));
                return Vacancy::Open { why, preferred: asked_for(facts), way: Way::A };
            }
            match silence::way_b(facts) {
                // Without clocks nothing but enough seals says that the old leader acknowledges no more: force wants W.
                WayB::Open { .. } if facts.records.forced().is_some() => Vacancy::Occupied,
                WayB::Open { why } => {
                    let why = format!("{why} under term {term}");
                    Vacancy::Open { why, preferred: asked_for(facts), way: Way::B }
                }
                WayB::Heard | WayB::Until(_) | WayB::Barred { .. } => Vacancy::Occupied,
            }
        }
    }
}

fn name_or_others(to: Option<&MemberName>) -> String {
    to.map(ToString::to_string).unwrap_or_else(|| "any other member".to_owned())
}

/// While somebody else goes first there is one thing to do: be ready.
fn hold(facts: &Facts<'_>, why: String, at: Moment) -> Option<Plan> {
    let mut plan = Plan::new("takeover.hold", why).wake_at(at);
    if matches!(facts.view.local.data, DataDirectory::Present { .. }) {
        let since = facts.view.memory.releases.map(|r| r.first_seen).unwrap_or(facts.now());
        plan = plan.steps(facts.start_when_needed(since));
    }
    Some(plan)
}

/// Whom a person asked for, while nobody leads.
fn asked_for(facts: &Facts<'_>) -> Option<MemberName> {
    facts.records.requests.values().filter(|r| r.value.outcome.is_none()).find_map(|r| match &r.value.what {
        Operation::Switchover { to } | Operation::Failover { to } => to.clone(),
        Operation::Restart { .. } | Operation::Reinit { .. } => None,
    })
}

/// Pre-vote (step 0): an election that cannot end well is not begun. The error names whom it waits for.
fn may_stand(facts: &Facts<'_>, claim: &SyncClaim) -> Result<(), String> {
    let view = facts.view;
    if claim.term < view.memory.durable.highest_sync_term {
        return Err(format!(
            "the key `sync` is of term {}, this member remembers term {}: an old claim is believed by nobody",
            claim.term, view.memory.durable.highest_sync_term
        ));
    }
    if claim.mode == Durability::Async {
        return cold_start::may_stand(facts, claim);
    }
    if facts.records.forced().is_some() {
        return Ok(());
    }
    let electorate = claim.electorate();
    if !electorate.contains(facts.me()) && !stands_in(facts, claim) {
        return Err(if claim.k == 0 {
            format!(
                "commits were acknowledged from the disk of {} alone: only it may lead again without a person",
                claim.primary.name
            )
        } else {
            format!(
                "this member (incarnation {}) is not among those who have every acknowledged commit ({})",
                facts.me().incarnation,
                list(electorate.iter().map(|id| &id.name))
            )
        });
    }
    let need = claim.seals_needed();
    let is_there = |id: &MemberId| {
        let incarnation = facts.records.members.get(&id.name).map(|m| m.value.incarnation);
        id == facts.me() || facts.speaks(&id.name) && incarnation == Some(id.incarnation)
    };
    let there: Vec<&MemberName> = electorate.iter().filter(|id| is_there(id)).map(|id| &id.name).collect();
    if there.len() < need {
        let missing = electorate.iter().filter(|id| !is_there(id)).map(|id| &id.name);
        return Err(format!(
            "{need} of {} must be there to know every acknowledged commit, {} are; waiting for {}",
            list(electorate.iter().map(|id| &id.name)),
            there.len(),
            list(missing)
        ));
    }
    Ok(())
}

/// Whoever has every acknowledged commit is there and must not lead: this member may elect, and copies from them first.
fn stands_in(facts: &Facts<'_>, claim: &SyncClaim) -> bool {
    let there: Vec<_> = claim
        .electorate()
        .into_iter()
        .filter(|id| facts.speaks(&id.name))
        .filter_map(|id| facts.records.members.get(&id.name).filter(|m| m.value.incarnation == id.incarnation))
        .collect();
    let member = facts.records.membership.value().is_some_and(|m| m.members.contains(&facts.me().name));
    member && there.len() >= claim.seals_needed() && there.iter().all(|m| !m.value.tags.may_lead())
}
