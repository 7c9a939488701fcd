//! What a leader with a healthy primary looks after: the synchronous set, membership, slots, doubled names.

use std::collections::BTreeSet;

use super::{Facts, seconds};
use crate::core::election::list;
use crate::core::followers::{flushed, streams};
use crate::core::names::{MemberId, MemberName};
use crate::core::plan::{Plan, Step, parse_walreceiver_name};
use crate::core::promise::Promises;
use crate::core::records::{Durability, Key, Keyed, LeaderRecord, Membership, SyncClaim, Transaction, Write};
use crate::core::storage;
use crate::core::sync_set::{Transition, Wanted, next, rule_of};
use crate::core::time::Moment;
use crate::core::view::{PrimaryFacts, View};

/// A standby that is this far behind has not caught up, and would stall commits if it were waited for.
const CAUGHT_UP_BYTES: u64 = 1 << 20;

pub fn plan(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, primary: &PrimaryFacts) -> Plan {
    // A deadline that rests on promises was proved for the claim as it stands: whoever changes it waits for a renewal, which
    // the candidates of the next claim see too (protocol §7).
    if let Some(plan) = held_by_promises(facts) {
        return turned(facts, mine, primary).unwrap_or(plan);
    }
    let mut plan = doubled(primary)
        .or_else(|| membership(facts, mine))
        .or_else(|| sync(facts, mine, primary))
        .or_else(|| slots(facts, primary))
        .or_else(|| slot_bound(facts, primary))
        .unwrap_or_else(|| leading(facts, mine, primary));
    // A member that does not acknowledge leaves at its time, not at the next heartbeat.
    plan.wake = plan.wake.or_else(|| stall_ends(facts.view));
    plan
}

fn held_by_promises(facts: &Facts<'_>) -> Option<Plan> {
    let promises = &facts.view.promises;
    promises.until?;
    let unconfirmed = facts.view.memory.durable.lead.as_ref().is_some_and(|lead| lead.unconfirmed);
    let why = if unconfirmed { "until enough members have read what was made good" } else { "until renewals go on" };
    Some(Plan::new(
        "leader.promised",
        format!("{}; nothing is changed in the store {why}", words(promises, facts.now())),
    ))
}

/// After the records were written again under a new term the standbys come back under new names, and commits wait for them
/// by these: the same claim, so nothing is published.
fn turned(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, primary: &PrimaryFacts) -> Option<Plan> {
    let term = mine.value.term;
    let claim = facts.records.sync.value().filter(|claim| claim.term == term && claim.k > 0)?;
    let to = rule_of(&claim.members, claim.k, term);
    let followers = claim.members.iter().filter(|id| streams(primary, id, term)).count() as u32;
    (followers >= claim.k && primary.rule_text != to.to_string()).then(|| {
        Plan::new(
            "leader.sync_enforce",
            format!("{followers} standbys follow under term {term}: putting `{to}` into force"),
        )
        .step(Step::Enforce { from: None, to })
    })
}

/// How the term is held without renewals, in words.
pub fn words(promises: &Promises, now: Moment) -> String {
    let alone = promises.needs.iter().all(|need| need.count == 0);
    let by = if alone {
        "of nobody, because nobody else can be elected".to_owned()
    } else {
        format!("of {}", list(promises.by()))
    };
    match promises.until {
        Some(until) => {
            format!("term {} is held by promises {by}, for another {}", promises.term, seconds(now.until(until)))
        }
        None => {
            let missing = promises.missing().into_iter().map(|(name, why)| format!("{name}: {why}"));
            let missing: Vec<String> = missing.collect();
            format!("term {} waits for promises: {}", promises.term, missing.join("; "))
        }
    }
}

/// A second row of the same name would vote twice (protocol §4).
fn doubled(primary: &PrimaryFacts) -> Option<Plan> {
    let mut seen = BTreeSet::new();
    let doubled: Vec<String> = primary
        .replicas
        .iter()
        .filter(|r| parse_walreceiver_name(&r.application_name).is_some())
        .filter(|r| !seen.insert(r.application_name.clone()))
        .map(|r| r.application_name.clone())
        .collect();
    if doubled.is_empty() {
        return None;
    }
    Some(
        Plan::new("leader.doubled", format!("two walsenders are called {}: ending them", doubled.join(", ")))
            .step(Step::EndWalsenders { names: doubled }),
    )
}

/// Newcomers may be sealed, stand or promise only after a leader wrote them down.
fn membership(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>) -> Option<Plan> {
    let present = facts.records.membership.value();
    let mut members = present.map(|m| m.members.clone()).unwrap_or_default();
    let before = members.clone();
    members.insert(facts.me().name.clone());
    // Whoever is configured here and has registered; a name that nobody configured stays outside.
    members.extend(facts.view.me.configured.iter().filter(|name| facts.records.members.contains_key(name)).cloned());
    if members == before {
        return None;
    }
    let added: Vec<&MemberName> = members.difference(&before).collect();
    let reason = format!("{} joined the membership", list(added));
    Some(
        Plan::new("leader.membership", reason).step(
            facts.commit(
                "write the membership",
                Transaction::when(Key::Leader, mine.revision)
                    .and(Key::Membership, facts.records.membership.revision())
                    .put(Write::Membership(Membership { term: mine.value.term, members })),
            ),
        ),
    )
}

/// Which standbys commits should wait for, and how many of them.
pub fn wanted(facts: &Facts<'_>, claim: &SyncClaim, primary: &PrimaryFacts) -> Wanted {
    let view = facts.view;
    let term = view.memory.term;
    if view.policy.durability == Durability::Async {
        return Wanted { mode: Durability::Async, members: BTreeSet::new(), k: 0 };
    }
    let allowed = facts.records.membership.value().map(|m| &m.members);
    let mut members: BTreeSet<MemberId> = BTreeSet::new();
    for (name, record) in &facts.records.members {
        if *name == facts.me().name || record.value.tags.nosync || allowed.is_none_or(|a| !a.contains(name)) {
            continue;
        }
        let id = MemberId { name: name.clone(), incarnation: record.value.incarnation };
        if claim.members.contains(&id) {
            if !stalled_for_long(view, name) {
                members.insert(id);
            }
        } else if streams(primary, &id, term)
            && caught_up(primary, &id)
            && view.memory.may_return(&id, &view.policy, view.now)
        {
            members.insert(id);
        }
    }
    // A member without room or with a failing disk is about to stop acknowledging: it goes while others are enough.
    let able =
        |id: &MemberId| facts.records.members.get(&id.name).is_some_and(|m| m.value.storage.hindrance().is_none());
    if members.iter().filter(|id| able(id)).count() as u32 >= view.policy.k {
        members.retain(able);
    }
    let enough = (members.len() as u32).min(view.policy.k);
    let mode = view.policy.durability;
    // L3: a removal ends with a barrier, for which those who stay have to acknowledge. While they do not, it would only
    // keep the next change waiting: within `sync.max_stall` they do again, or go as well.
    let acknowledge = members.iter().filter(|id| !view.memory.stalled.contains_key(&id.name)).count() as u32;
    if acknowledge < enough && claim.members.iter().any(|id| !members.contains(id)) {
        members.extend(claim.members.iter().cloned());
        return Wanted { mode, members, k: claim.k };
    }
    if mode == Durability::Strict && enough < view.policy.k.min(claim.k.max(1)) && claim.k > 0 {
        // Strict waits: the claim stays as it is until enough are back.
        let mut kept = claim.members.clone();
        kept.extend(members);
        return Wanted { mode, members: kept, k: claim.k };
    }
    if enough == 0 {
        members.clear();
    }
    Wanted { mode, members, k: enough }
}

fn caught_up(primary: &PrimaryFacts, id: &MemberId) -> bool {
    flushed(primary, id).is_some_and(|at| at.bytes_to(primary.flushed) <= CAUGHT_UP_BYTES)
}

fn sync(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, primary: &PrimaryFacts) -> Option<Plan> {
    let view = facts.view;
    let term = mine.value.term;
    let Some(claim) = facts.records.sync.present() else {
        // Deleted by hand or overwritten: what PostgreSQL enforces is unknown to the others; the sitting leader says it
        // again, as weak as can be, so that it is true whatever is in force.
        let claim = SyncClaim {
            mode: view.policy.durability,
            primary: facts.me().clone(),
            members: BTreeSet::new(),
            k: 0,
            term,
        };
        return Some(
            Plan::new("leader.sync_lost", "the key `sync` is gone or unreadable: writing it again").step(
                facts.commit(
                    "write the claim again",
                    Transaction::when(Key::Leader, mine.revision)
                        .and(Key::Sync, facts.records.sync.revision())
                        .put(Write::Sync(claim)),
                ),
            ),
        );
    };
    if view.memory.doubtful_sync || !view.memory.sync_settled {
        // S9: a lost write may still land. Only a later write that compares the revision rules it out.
        return Some(
            Plan::new("leader.sync_doubt", "a write of `sync` may still be on its way: settling the claim").step(
                facts.commit(
                    "write the claim again",
                    Transaction::when(Key::Leader, mine.revision)
                        .and(Key::Sync, claim.revision)
                        .put(Write::Sync(claim.value.clone())),
                ),
            ),
        );
    }
    let published_rule = rule_of(&claim.value.members, claim.value.k, claim.value.term);
    let shown = primary.rule_text.as_str();
    // What a barrier confirmed and PostgreSQL still shows. After a restart of the agent: the published rule was confirmed
    // before it was published, or is weaker than what was in force; if PostgreSQL shows exactly it, it stands.
    let in_force = match &view.memory.enforced {
        Some(rule) if rule.to_string() == shown => Some(rule.clone()),
        _ if published_rule.to_string() == shown => Some(published_rule.clone()),
        _ => None,
    };
    let Some(in_force) = in_force else {
        if let Some(fewer) = fewer(facts, &claim.value) {
            // Whatever is in force satisfies the claim, and so a lower k of the same members. Enforcing the claim as it
            // stands would wait for ever for those who do not acknowledge.
            let reason = format!("{}: publishing it before the rule is settled", describe(&fewer));
            return Some(Plan::new("leader.sync_fewer", reason).step(publish(facts, mine, claim.revision, fewer)));
        }
        let to = rule_of(&claim.value.members, claim.value.k, term);
        return Some(
            Plan::new(
                "leader.sync_unknown",
                format!("PostgreSQL shows synchronous_standby_names = `{shown}`, which this leader did not confirm: enforcing `{to}`"),
            )
            .step(Step::Enforce { from: None, to }),
        );
    };
    let wanted = wanted(facts, &claim.value, primary);
    match next(&claim.value, &in_force, &wanted, facts.me(), term) {
        Transition::Settled => None,
        Transition::Publish(claim_next) => {
            let reason = format!("{}: publishing it first", describe(&claim_next));
            Some(Plan::new("leader.sync_publish", reason).step(publish(facts, mine, claim.revision, claim_next)))
        }
        Transition::Enforce(rule) => {
            let reason = format!("putting `{rule}` into force");
            Some(Plan::new("leader.sync_enforce", reason).step(Step::Enforce { from: Some(in_force), to: rule }))
        }
    }
}

fn publish(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, revision: i64, claim: SyncClaim) -> Step {
    let transaction = Transaction::when(Key::Leader, mine.revision).and(Key::Sync, revision).put(Write::Sync(claim));
    facts.commit("publish the claim", transaction)
}

/// The claim with as many acknowledgements as can come now, when it asks for more. `strict` waits.
fn fewer(facts: &Facts<'_>, claim: &SyncClaim) -> Option<SyncClaim> {
    let view = facts.view;
    let acknowledging = claim.members.iter().filter(|id| !stalled_for_long(view, &id.name)).count() as u32;
    if acknowledging >= claim.k || claim.mode == Durability::Strict {
        return None;
    }
    let mut fewer = SyncClaim { k: acknowledging, ..claim.clone() };
    if fewer.k == 0 {
        fewer.members.clear();
    }
    Some(fewer)
}

fn stalled_for_long(view: &View, name: &MemberName) -> bool {
    view.memory.stalled.get(name).is_some_and(|since| view.now.since(*since) >= view.policy.max_stall)
}

/// When the next member of the set will have been silent for too long.
fn stall_ends(view: &View) -> Option<Moment> {
    let ends = view.memory.stalled.values().map(|since| since.plus(view.policy.max_stall));
    ends.filter(|at| !view.now.all_reached(*at)).min_by_key(|at| at.boottime)
}

/// What an acknowledged commit is worth, in words.
pub fn describe(claim: &SyncClaim) -> String {
    let members = list(claim.members.iter().map(|m| &m.name));
    match (claim.mode, claim.k) {
        (Durability::Async, _) => {
            "commits are acknowledged from the primary's disk alone (durability async)".to_owned()
        }
        (_, 0) => "no standby is there: commits are acknowledged from the primary's disk alone".to_owned(),
        (_, k) => format!("every acknowledged commit is on {k} of {members} too"),
    }
}

/// A slot for every member on every member, so that nobody's WAL is recycled before it has it.
fn slots(facts: &Facts<'_>, primary: &PrimaryFacts) -> Option<Plan> {
    let members = slot_members(facts);
    let present: BTreeSet<&String> = primary.slots.keys().collect();
    let wanted: BTreeSet<String> = members.iter().map(|(name, _)| name.slot()).collect();
    // A slot that has lost its WAL keeps nothing: it is made anew, and its member cloned when it asks in vain.
    let lost: Vec<&String> = wanted.iter().filter(|slot| primary.slots.get(*slot) == Some(&None)).collect();
    if let [slot, ..] = lost.as_slice() {
        let reason = format!("slot {slot} has lost its WAL (its member stayed away for too long): making it anew");
        return Some(Plan::new("leader.slot_lost", reason).step(Step::KeepSlots { members }));
    }
    if wanted.iter().all(|slot| present.contains(slot))
        && present.iter().all(|slot| !slot.starts_with("pgvigil_") || wanted.contains(*slot))
    {
        return None;
    }
    Some(
        Plan::new("leader.slots", "making the replication slots match the membership")
            .step(Step::KeepSlots { members }),
    )
}

/// What slots keep is bounded by the free disk: a member that stays away must not fill the disk of the one that works.
fn slot_bound(facts: &Facts<'_>, primary: &PrimaryFacts) -> Option<Plan> {
    let view = facts.view;
    let wanted = storage::slot_bound(view.local.storage.wal_free().filter(|_| view.policy.storage.bound_slots)?);
    // Moved by leaps only: it stands in a file that is written anew.
    let present = primary.slot_bound?;
    if present / 4 < wanted && wanted < present.saturating_mul(4) {
        return None;
    }
    let reason = format!(
        "slots may keep {} of WAL, and the free disk allows {}: writing that",
        storage::megabytes(present),
        storage::megabytes(wanted)
    );
    Some(Plan::new("leader.slot_bound", reason).step(Step::Reload))
}

/// The members whose slots this one keeps, with what each is known to have.
pub fn slot_members(facts: &Facts<'_>) -> Vec<(MemberName, Option<crate::core::Lsn>)> {
    let Some(membership) = facts.records.membership.value() else { return Vec::new() };
    membership
        .members
        .iter()
        .filter(|name| **name != facts.me().name)
        .map(|name| (name.clone(), facts.records.members.get(name).and_then(|m| m.value.replayed)))
        .collect()
}

fn leading(facts: &Facts<'_>, mine: &Keyed<LeaderRecord>, primary: &PrimaryFacts) -> Plan {
    let durability = facts.records.sync.value().map(describe).unwrap_or_default();
    Plan::new("leader", format!("leads term {} on timeline {}; {durability}", mine.value.term, primary.timeline))
}
