//! This member holds the record of an election: collect seals, choose, be promoted, open.

use std::collections::BTreeSet;

use super::sealing::seal;
use super::{Facts, copying, seconds};
use crate::core::election::{Elected, Verdict, judge, list};
use crate::core::followers::acknowledges;
use crate::core::names::{MemberId, MemberName};
use crate::core::plan::{Plan, PromoteOrder, Step, SyncRule};
use crate::core::records::{
    Durability, HistoryRecord, Key, Keyed, LeaderRecord, LeaderState, Published, SyncClaim, TimelineReservation,
    Transaction, Winner, Write,
};
use crate::core::sync_set::rule_of;
use crate::core::view::{LocalPostgres, PrimaryFacts, View};

pub fn rule(view: &View) -> Option<Plan> {
    let facts = Facts::of(view)?;
    let mine = facts.mine()?;
    let LeaderState::Electing { preferred, winner, .. } = &mine.value.state else { return None };
    if !view.lease.valid(mine.value.term, view.now) {
        return Some(Plan::new("election.lease", format!("waiting for a renewal of term {}", mine.value.term)));
    }
    Some(match winner {
        None => collect(&facts, mine, preferred.as_ref()),
        Some(winner) if winner.member == *facts.me() => win(&facts, mine, winner),
        // The record names another winner but is still ours: only a write by hand can do that.
        Some(winner) => release(&facts, mine, format!("the record names {} as winner", winner.member.name)),
    })
}

// === Collecting seals ===

fn collect(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, preferred: Option<&MemberName>) -> Plan {
    let view = facts.view;
    let term = mine.value.term;
    if view.stopping {
        return release(facts, mine, "the coordinator was told to stop".to_owned());
    }
    let began = view.memory.election.filter(|e| e.term == term).map(|e| e.since).unwrap_or(view.now);
    let own_seal = facts
        .records
        .seals
        .get(&facts.me().name)
        .is_some_and(|s| s.value.term == term && s.value.incarnation == facts.me().incarnation);
    let give_up = began.plus(view.policy.election_give_up);
    let recovering = recovering(facts);
    // A member that cannot be sealed now (it recovers) need not hold up the others, if they are enough.
    // But for the last primary in async: it alone may have commits that nobody else has.
    let claim = facts.records.sync.value();
    let alone = claim.is_some_and(|claim| claim.mode == Durability::Async && claim.primary == *facts.me());
    let cannot_seal = !matches!(view.local.postgres, LocalPostgres::Standby(_)) && !alone;
    let others_suffice =
        cannot_seal && matches!(judge(facts.records, &mine.value, view.policy.max_lag, preferred), Verdict::Elected(_));
    if !own_seal && !others_suffice {
        let overdue = view.now.all_reached(give_up) && recovering.is_none();
        if overdue && !matches!(view.local.postgres, LocalPostgres::Starting { .. }) {
            return release(facts, mine, "this member could not be sealed in time".to_owned());
        }
        return seal(facts, term, mine.revision, &format!("electing for term {term}")).wake_at(give_up);
    }
    match judge(facts.records, &mine.value, view.policy.max_lag, preferred) {
        Verdict::Copying(copying) => {
            let what = copying::sentence(&copying);
            let moved =
                view.memory.election.filter(|e| e.term == term).and_then(|e| e.copied).map_or(began, |(_, at)| at);
            let patience = moved.plus(view.policy.election_give_up + view.policy.member_publish * 2);
            if view.now.all_reached(patience) {
                return release(facts, mine, format!("{what}, but nothing has come for a while"));
            }
            let plan = match copying.by == facts.me().name {
                true => copying::copy(facts, term, mine.revision, &copying),
                false => Plan::new("election.copying", what),
            };
            plan.rejecting(copying.rejected).wake_at(patience)
        }
        Verdict::Impossible { why } if !view.now.all_reached(give_up) => {
            Plan::new("election.impossible", why).wake_at(give_up)
        }
        Verdict::Impossible { why } => release(facts, mine, why),
        Verdict::Waiting { why, .. } => {
            if let Some(who) = recovering {
                return Plan::new("election.recovery", format!("{why}; {who} is still recovering")).wake_at(give_up);
            }
            if view.now.all_reached(give_up) {
                return release(
                    facts,
                    mine,
                    format!("not enough seals within {:?}: {why}", view.policy.election_give_up),
                );
            }
            Plan::new("election.seals", why).wake_at(give_up)
        }
        Verdict::Elected(elected) => {
            // Worth a short wait: the one that was asked for, and in async mode anybody who is there.
            let outstanding: Vec<&MemberName> = elected.outstanding.iter().filter(|n| facts.is_there(n)).collect();
            let wait = view
                .memory
                .election
                .filter(|e| e.term == term)
                .and_then(|e| e.enough_since)
                .unwrap_or(view.now)
                // What is forced loses whatever nobody there has: everybody there gets the time to say what that is.
                .plus(if facts.records.forced().is_some() {
                    view.policy.election_give_up
                } else {
                    view.policy.election_wait
                });
            if !outstanding.is_empty() && !view.now.all_reached(wait) {
                return Plan::new(
                    "election.outstanding",
                    format!("enough are sealed; giving {} a moment more", list(outstanding)),
                )
                .rejecting(elected.rejected)
                .wake_at(wait);
            }
            pass_to_winner(facts, mine, elected)
        }
    }
}

/// A member of the claim that reports crash recovery: worth waiting for.
fn recovering(facts: &Facts<'_>) -> Option<MemberName> {
    let claim = facts.records.sync.value()?;
    let starting = |id: &MemberId| {
        if id.name == facts.me().name {
            return matches!(facts.view.local.postgres, LocalPostgres::Starting { .. });
        }
        facts.is_there(&id.name) && facts.records.members.get(&id.name).is_some_and(|m| m.value.state == "starting")
    };
    claim.electorate().iter().find(|id| starting(id)).map(|id| id.name.clone())
}

fn pass_to_winner(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, elected: Elected) -> Plan {
    let Elected { winner, counted, rejected, .. } = elected;
    let mut record = mine.value.clone();
    record.holder = winner.member.clone();
    if let LeaderState::Electing { winner: place, .. } = &mut record.state {
        *place = Some(winner.clone());
    }
    let reservation = TimelineReservation { term: record.term, parent: winner.parent, switch: winner.switch };
    // S6: the number is reserved once, in the same transaction; S3: every seal that was counted still stands in it.
    let mut transaction = Transaction::when(Key::Leader, mine.revision).and(Key::Timeline(winner.timeline), 0);
    for (name, revision) in counted {
        transaction = transaction.and(Key::Seal(name), revision);
    }
    transaction = transaction.put(Write::Leader(record)).put(Write::Timeline(winner.timeline, reservation));
    let reason = format!(
        "{} has everything up to {} of timeline {} and wins term {}",
        winner.member.name, winner.switch, winner.parent, mine.value.term
    );
    let mut plan = Plan::new("election.winner", reason).rejecting(rejected);
    if winner.member != *facts.me() {
        // The record is not ours any more once this is written.
        plan = plan.step(Step::DropLease);
    }
    plan.step(facts.commit("pass the record to the winner", transaction))
}

/// Ends an election of ours without a leader.
fn release(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, why: String) -> Plan {
    let mut record = mine.value.clone();
    record.state = LeaderState::Released { to: None, why: why.clone() };
    Plan::new("election.given_up", why)
        .step(
            facts.commit(
                "give the election up",
                Transaction::when(Key::Leader, mine.revision).put(Write::Leader(record)),
            ),
        )
        .step(Step::DropLease)
}

// === Winning ===

fn win(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, winner: &Winner) -> Plan {
    let view = facts.view;
    let term = mine.value.term;
    if view.stopping && view.local.postgres.primary().is_none() {
        return release(facts, mine, "the winner was told to stop".to_owned());
    }
    match &view.local.postgres {
        LocalPostgres::Standby(standby) => {
            // S3: the position that was reported and elected is still the one that is here.
            if standby.replayed != winner.switch || standby.timeline != winner.parent {
                return release(
                    facts,
                    mine,
                    format!(
                        "elected at {} of timeline {}, but stands at {} of timeline {}",
                        winner.switch, winner.parent, standby.replayed, standby.timeline
                    ),
                );
            }
            if view.memory.durable.sealed_term != term {
                return release(facts, mine, format!("not sealed for term {term} any more"));
            }
            if view.memory.promotion_failed == Some(term) {
                return release(facts, mine, "the promotion failed".to_owned());
            }
            let order = PromoteOrder {
                term,
                timeline: winner.timeline,
                parent: winner.parent,
                switch: winner.switch,
                between: facts
                    .records
                    .timelines
                    .iter()
                    .filter(|(n, _)| **n > winner.parent && **n < winner.timeline)
                    .map(|(n, r)| (*n, *r))
                    .collect(),
            };
            Plan::new("election.promote", format!("elected for term {term}: promoting to timeline {}", winner.timeline))
                .step(Step::Promote { order })
        }
        LocalPostgres::Primary(primary) => open(facts, mine, winner, primary),
        LocalPostgres::Down => release(facts, mine, "PostgreSQL ended before it was promoted".to_owned()),
        LocalPostgres::Starting { why } | LocalPostgres::Unknown { why } => {
            let since = view.memory.election.filter(|e| e.term == term).map(|e| e.since).unwrap_or(view.now);
            let patience = since.plus(view.policy.election_give_up * 3);
            if view.now.all_reached(patience) {
                let mut plan = release(facts, mine, format!("elected, but PostgreSQL does not answer ({why})"));
                plan.steps.insert(0, Step::Kill);
                return plan;
            }
            Plan::new("election.wait", format!("elected for term {term}; PostgreSQL does not answer yet ({why})"))
                .wake_at(patience)
        }
    }
}

/// Promoted: is it what was reserved, who follows, which rule, then say so.
fn open(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, winner: &Winner, primary: &PrimaryFacts) -> Plan {
    let view = facts.view;
    let term = mine.value.term;
    let parted = primary.history.0.last().map(|e| (e.timeline, e.switch));
    if primary.timeline != winner.timeline || parted != Some((winner.parent, winner.switch)) {
        return Plan::new(
            "election.mismatch",
            format!(
                "PostgreSQL became timeline {} leaving {parted:?}, reserved was timeline {} leaving ({}, {}): killed (S6)",
                primary.timeline, winner.timeline, winner.parent, winner.switch
            ),
        )
        .step(Step::Kill)
        .step(Step::DropLease);
    }
    let Some(claim) = facts.records.sync.present() else {
        return Plan::new("election.no_claim", "the key `sync` is gone: not opened (S12)")
            .step(Step::Kill)
            .step(Step::DropLease);
    };
    let electorate = claim.value.electorate();
    let others: BTreeSet<MemberId> = electorate.into_iter().filter(|id| id != facts.me()).collect();
    // C and k are symmetric in who is primary: the same claim, seen from the winner (protocol §5 step 5).
    let target = rule_of(&others, claim.value.k, term);
    if view.memory.enforced.as_ref() == Some(&target) {
        return publish(facts, mine, winner, claim, others);
    }
    // One that streams and stands still would only let the barrier fail again and again.
    let followers = others.iter().filter(|id| acknowledges(view, primary, id, term)).count() as u32;
    if followers >= claim.value.k {
        let from = view.memory.enforced.clone().or(Some(SyncRule::Nobody));
        return Plan::new(
            "election.open",
            format!("{followers} of {} needed standbys follow: putting `{target}` into force", claim.value.k),
        )
        .step(Step::Enforce { from, to: target });
    }
    let promoted_at = view.memory.promoted.filter(|(t, _)| *t == term).map(|(_, at)| at).unwrap_or(view.now);
    let patience = promoted_at.plus(view.policy.election_wait);
    let waiting = format!("{followers} of {} needed standbys follow the new primary", claim.value.k);
    if !view.now.all_reached(patience) {
        return Plan::new("election.followers", waiting).wake_at(patience);
    }
    if claim.value.mode == Durability::Strict {
        return Plan::new("election.strict", format!("{waiting}; durability is strict, so it waits for them"));
    }
    // S9: the store says it first. Nothing was acknowledged in this term yet, so the winner alone has all there is.
    let mut fewer = claim.value.clone();
    fewer.k = followers;
    if followers == 0 {
        fewer = SyncClaim { mode: fewer.mode, primary: facts.me().clone(), members: Default::default(), k: 0, term };
    }
    Plan::new(
        "election.fewer",
        format!("{waiting} after {}: publishing that {followers} are enough", seconds(view.now.since(promoted_at))),
    )
    .step(facts.commit(
        "lower the claim",
        Transaction::when(Key::Leader, mine.revision).and(Key::Sync, claim.revision).put(Write::Sync(fewer)),
    ))
}

fn publish(
    facts: &Facts<'_>,
    mine: &Keyed<LeaderRecord>,
    winner: &Winner,
    claim: &Keyed<SyncClaim>,
    others: BTreeSet<MemberId>,
) -> Plan {
    let view = facts.view;
    let term = mine.value.term;
    let mut record = mine.value.clone();
    record.state = LeaderState::Held;
    record.boot_id = view.me.boot_id.clone();
    record.ttl_ms = view.policy.timings.ttl.as_millis() as u64;
    record.takeover_ms = view.policy.takeover.after.as_millis() as u64;
    record.last = Some(Published {
        member: facts.me().clone(),
        term,
        timeline: winner.timeline,
        parent: Some(winner.parent),
        switch: Some(winner.switch),
    });
    let sync = SyncClaim {
        mode: claim.value.mode,
        primary: facts.me().clone(),
        members: if claim.value.k == 0 { Default::default() } else { others },
        k: claim.value.k,
        term,
    };
    let history = HistoryRecord {
        term,
        leader: facts.me().name.clone(),
        timeline: winner.timeline,
        switch: Some(winner.switch),
        reason: describe_change(&mine.value, facts.records.forced().is_some()),
        at_unix_ms: 0,
        phases_ms: view.memory.phases.clone(),
    };
    Plan::new("election.publish", format!("timeline {} is open under term {term}", winner.timeline)).step(
        facts.commit(
            "publish the new leader",
            Transaction::when(Key::Leader, mine.revision)
                .and(Key::Sync, claim.revision)
                .put(Write::Leader(record))
                .put(Write::Sync(sync))
                .put(Write::History(history)),
        ),
    )
}

fn describe_change(record: &LeaderRecord, forced: bool) -> String {
    match &record.last {
        Some(last) if forced => format!("after {} (term {}), forced by a person", last.member.name, last.term),
        None => "cluster created".to_owned(),
        Some(last) => format!("after {} (term {})", last.member.name, last.term),
    }
}
