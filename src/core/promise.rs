//! Promises (protocol §7): how the sitting leader goes on without the store, and what that asks of the others.
//!
//! An election above the leader's term needs q = |C| − k seals. It is impossible while fewer than q members of C are free,
//! so the leader and k incarnations of M are enough: the set that a commit needs anyway. This holds whatever the store says
//! or does not say, because who has sealed a higher term refuses to promise.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::names::{Incarnation, MemberId, MemberName};
use super::records::{ClusterRecords, Durability, LeaderRecord, LeaderState, SyncClaim, TimelineReservation};
use super::time::Moment;
use super::timeline::{Term, TimelineId};
use super::view::{Durable, View};

/// The longest lease that may be configured.
const LONGEST_TTL: Duration = Duration::from_secs(300);

// === Who promises ===

/// A member's durable word to the leader of `term`: no part in a higher one until its own clocks have run for so long. In one
/// file, under one fsync, with the seals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    pub to: MemberId,
    pub term: Term,
    pub length_ms: u64,
}

impl Promise {
    pub fn length(&self) -> Duration {
        Duration::from_millis(self.length_ms)
    }

    /// Does the holder itself say in the store that it is finished with the term it was given for?
    pub fn given_back(&self, records: &ClusterRecords) -> bool {
        let Some(record) = records.leader() else { return false };
        match &record.state {
            LeaderState::Released { .. } | LeaderState::Fenced { .. } => {
                record.holder == self.to && record.term >= self.term
            }
            // An election in place: it has killed its PostgreSQL before.
            LeaderState::Electing { coordinator, .. } => *coordinator == self.to.name && record.term > self.term,
            LeaderState::Held => false,
        }
    }
}

/// A promise as the process that gave it counts it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bond {
    pub promise: Promise,
    pub until: Moment,
}

impl Bond {
    /// Another promise to a lower term, or to somebody else under the same one.
    fn bars(&self, other: &Promise) -> bool {
        self.promise.term > other.term || self.promise.term == other.term && self.promise.to != other.to
    }

    fn denies(&self, now: Moment) -> Denied {
        Denied::Bound {
            to: self.promise.to.name.clone(),
            term: self.promise.term,
            for_ms: u64::try_from(now.until(self.until).as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Until *all* clocks say that it has ended, as a candidate waits.
    pub fn binds(&self, now: Moment) -> bool {
        !now.all_reached(self.until)
    }
}

/// Is the asker who this member takes for the leader? Whoever reaches the agent port can ask; only the leader of the highest
/// term known here is answered, so that nobody else can keep this member out of elections.
pub fn may_be_given(promise: &Promise, from: &MemberId, view: &View) -> Result<(), String> {
    if promise.to != *from {
        return Err(format!("{} asks for a promise to {}", from.name, promise.to.name));
    }
    let longest = view.policy.timings.candidate_wait(LONGEST_TTL);
    if promise.length() > longest {
        return Err(format!("{} ms is longer than any lease ({longest:?})", promise.length_ms));
    }
    let known = view.memory.durable.highest_term;
    let holder = view.memory.holder.as_ref();
    let is_holder = holder.is_none_or(|holder| holder.term < known || holder.member == from.name);
    if !is_holder && promise.term >= known {
        let holder = holder.map(|h| h.member.to_string()).unwrap_or_default();
        return Err(format!("term {known} is {holder}'s as far as is known here"));
    }
    // A term that only its holder knows yet: it wrote the record again.
    let own_next = promise.term > known && holder.is_some_and(|h| h.member == from.name && h.term == known);
    if promise.term > known && !own_next {
        return Err(format!("term {} is not known here, the highest is {known}", promise.term));
    }
    Ok(())
}

/// Promise and seal are one variable: what stands in the place of the one refuses the other.
pub fn refuses_seal(durable: &Durable, bond: Option<&Bond>, term: Term, now: Moment) -> Result<(), Denied> {
    if durable.sealed_term > term {
        return Err(Denied::HigherTerm { term: durable.sealed_term });
    }
    match bond {
        Some(bond) if bond.promise.term < term && bond.binds(now) => Err(bond.denies(now)),
        _ => Ok(()),
    }
}

/// Once a higher term is sealed, known or stood for, that leader's time is over.
pub fn refuses_promise(
    durable: &Durable,
    bond: Option<&Bond>,
    standing: Option<Term>,
    promise: &Promise,
    now: Moment,
) -> Result<(), Denied> {
    let known = durable.sealed_term.max(durable.highest_term);
    if known > promise.term {
        return Err(Denied::HigherTerm { term: known });
    }
    if let Some(term) = standing.filter(|standing| *standing > promise.term) {
        return Err(Denied::Standing { term });
    }
    match bond {
        Some(bond) if bond.binds(now) && bond.bars(promise) => Err(bond.denies(now)),
        _ => Ok(()),
    }
}

/// Why a member does not give its word, or cannot take it back yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Denied {
    /// A higher term is known here: the asker's is over.
    HigherTerm { term: Term },
    /// This member is about to claim a higher term in the store; whether it can, shows in a moment.
    Standing { term: Term },
    /// The word is given to somebody else.
    Bound { to: MemberName, term: Term, for_ms: u64 },
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Denied::HigherTerm { term } => write!(f, "term {term} is known here"),
            Denied::Standing { term } => write!(f, "about to stand for term {term}"),
            Denied::Bound { to, term, for_ms } => {
                write!(f, "promised {to} (term {term}) to take no part in a higher term for another {for_ms} ms")
            }
        }
    }
}

// === Who asks ===

/// What the leader has to know of its term when nobody can be asked: written ahead of what it changes in the store, so that
/// it is never less than what stands there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lead {
    pub record: LeaderRecord,
    /// Every claim that may stand in the store: more than one while the outcome of a write is not known.
    pub claims: Vec<SyncClaim>,
    pub membership: BTreeSet<MemberName>,
    pub timelines: BTreeMap<TimelineId, TimelineReservation>,
    /// We made a lost store good: until those who have to promise have read it there, its renewals prove nothing, because
    /// they may still read another one.
    #[serde(default)]
    pub unconfirmed: bool,
}

/// So many of these have to promise. `None`: whatever incarnation it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Need {
    pub from: BTreeMap<MemberName, Option<Incarnation>>,
    pub count: usize,
}

impl Lead {
    /// What makes an election above this term impossible, for every claim that may stand.
    pub fn needs(&self) -> Vec<Need> {
        let me = &self.record.holder;
        let of = |claim: &SyncClaim| match claim.mode {
            Durability::Sync | Durability::Strict => {
                let electorate = claim.electorate();
                let from: BTreeMap<_, _> = electorate
                    .iter()
                    .filter(|id| *id != me)
                    .map(|id| (id.name.clone(), Some(id.incarnation)))
                    .collect();
                // k + 1 of C refuse; this member is one of them when it is in C.
                let count = (claim.k as usize + 1).saturating_sub(usize::from(electorate.contains(me)));
                Need { from, count }
            }
            // Anybody may be elected, so everybody has to promise.
            Durability::Async => {
                let from: BTreeMap<_, _> =
                    self.membership.iter().filter(|name| **name != me.name).map(|name| (name.clone(), None)).collect();
                Need { count: from.len(), from }
            }
        };
        self.claims.iter().map(of).collect()
    }
}

/// What a member answered last, and to a question that was sent when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Answer {
    Granted {
        incarnation: Incarnation,
        sent: Moment,
        /// Highest term and store that the member remembers.
        highest_term: Term,
        store_id: u64,
    },
    Refused {
        why: Denied,
    },
    /// No answer; what it granted before still counts from when that was asked.
    Silent {
        why: String,
        granted: Option<(Incarnation, Moment)>,
    },
}

impl Answer {
    /// This answer after the one before: silence takes back nothing.
    pub fn after(self, before: Option<Answer>) -> Answer {
        match self {
            Answer::Silent { why, granted: None } => {
                Answer::Silent { why, granted: before.and_then(|before| before.granted()) }
            }
            other => other,
        }
    }

    fn granted(&self) -> Option<(Incarnation, Moment)> {
        match self {
            Answer::Granted { incarnation, sent, .. } => Some((*incarnation, *sent)),
            Answer::Silent { granted, .. } => *granted,
            // It cannot take back what it gave; but it is asked again, and says why it refuses.
            Answer::Refused { .. } => None,
        }
    }
}

/// How the leader holds its term by promises, for the view.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promises {
    pub term: Term,
    /// Since when promises are asked for; `None`: renewals are in time, nobody is asked.
    pub since: Option<Moment>,
    /// D by promises, while it is later than what renewals give.
    pub until: Option<Moment>,
    pub needs: Vec<Need>,
    pub answers: BTreeMap<MemberName, Answer>,
}

impl Promises {
    /// The sending from which the term is held: for each need the `count`-th best, and of these the earliest. Clock by
    /// clock; with nothing needed it is `now`.
    pub fn held_since(&self, now: Moment) -> Option<Moment> {
        if self.needs.is_empty() {
            // Nothing is known of the claim: nothing is proved by anybody (S12).
            return None;
        }
        let mut since = now;
        for need in &self.needs {
            let sent: Vec<Moment> = self.granted(need).map(|(_, sent)| sent).collect();
            if sent.len() < need.count {
                return None;
            }
            if need.count > 0 {
                let nth = |of: fn(&Moment) -> u64| {
                    let mut values: Vec<u64> = sent.iter().map(of).collect();
                    values.sort_unstable_by(|a, b| b.cmp(a));
                    values[need.count - 1]
                };
                since = Moment {
                    raw: since.raw.min(nth(|m| m.raw)),
                    monotonic: since.monotonic.min(nth(|m| m.monotonic)),
                    boottime: since.boottime.min(nth(|m| m.boottime)),
                };
            }
        }
        Some(since)
    }

    fn granted<'a>(&'a self, need: &'a Need) -> impl Iterator<Item = (&'a MemberName, Moment)> {
        need.from.iter().filter_map(|(name, incarnation)| {
            let (found, sent) = self.answers.get(name)?.granted()?;
            incarnation.is_none_or(|wanted| wanted == found).then_some((name, sent))
        })
    }

    /// The highest term that somebody refused with: ours is over.
    pub fn higher_term(&self) -> Option<Term> {
        let terms = self.answers.values().filter_map(|answer| match answer {
            Answer::Refused { why: Denied::HigherTerm { term } } if *term > self.term => Some(*term),
            _ => None,
        });
        terms.max()
    }

    /// Have as many as have to promise read the record of our term in this store?
    pub fn confirmed(&self, store_id: u64) -> bool {
        let knows = |name: &MemberName, incarnation: &Option<Incarnation>| match self.answers.get(name) {
            Some(Answer::Granted { incarnation: found, highest_term, store_id: theirs, .. }) => {
                incarnation.is_none_or(|wanted| wanted == *found) && *highest_term >= self.term && *theirs == store_id
            }
            _ => false,
        };
        !self.needs.is_empty()
            && self.needs.iter().all(|need| need.from.iter().filter(|(n, i)| knows(n, i)).count() >= need.count)
    }

    /// Who promised, for people.
    pub fn by(&self) -> BTreeSet<&MemberName> {
        self.needs.iter().flat_map(|need| self.granted(need)).map(|(name, _)| name).collect()
    }

    /// Who was asked and has not promised, with the reason.
    pub fn missing(&self) -> BTreeMap<&MemberName, String> {
        let by = self.by();
        let asked = self.needs.iter().flat_map(|need| need.from.keys()).filter(|name| !by.contains(name));
        asked
            .map(|name| {
                let why = match self.answers.get(name) {
                    None => "not asked yet".to_owned(),
                    Some(Answer::Granted { .. }) => "another incarnation than the claim names".to_owned(),
                    Some(Answer::Refused { why }) => why.to_string(),
                    Some(Answer::Silent { why, .. }) => why.clone(),
                };
                (name, why)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::testing::{id, name};

    fn claim(mode: Durability, k: u32, members: &[&str]) -> SyncClaim {
        SyncClaim { mode, primary: id("a"), members: members.iter().map(|m| id(m)).collect(), k, term: Term(5) }
    }

    fn lead(claims: Vec<SyncClaim>) -> Lead {
        let record = LeaderRecord {
            holder: id("a"),
            boot_id: "boot".to_owned(),
            term: Term(5),
            state: LeaderState::Held,
            ttl_ms: 8_000,
            takeover_ms: 2_000,
            taken: None,
            lsn: None,
            last: None,
            store_id: 1,
        };
        let membership = ["a", "b", "c", "d"].map(name).into();
        Lead { record, claims, membership, timelines: BTreeMap::new(), unconfirmed: false }
    }

    fn promises(lead: &Lead, granted: &[(&str, u64)]) -> Promises {
        let answers = granted
            .iter()
            .map(|(who, sent)| {
                let incarnation = id(who).incarnation;
                let sent = Moment::at(*sent);
                (name(who), Answer::Granted { incarnation, sent, highest_term: Term(5), store_id: 1 })
            })
            .collect();
        Promises { term: Term(5), since: Some(Moment::at(0)), until: None, needs: lead.needs(), answers }
    }

    const NOW: Moment = Moment::at(1_000);

    /// Brute force over |C| <= 5: with the leader and the needed ones out, fewer than q are left, and with one less they are
    /// not.
    #[test]
    fn who_is_needed_makes_an_election_impossible_and_nobody_less_does() {
        let all = ["b", "c", "d", "e"];
        for bits in 0..16u32 {
            let members: Vec<&str> = (0..4).filter(|i| bits & (1 << i) != 0).map(|i| all[i]).collect();
            for k in u32::from(!members.is_empty())..=members.len() as u32 {
                let claim = claim(Durability::Sync, k, &members);
                let need = &lead(vec![claim.clone()]).needs()[0];
                let free = |promised: usize| claim.electorate().len() - 1 - promised;
                assert!(free(need.count) < claim.seals_needed(), "{members:?} {k}");
                if need.count > 0 {
                    assert!(free(need.count - 1) >= claim.seals_needed(), "{members:?} {k}");
                }
                assert_eq!(need.count, k as usize, "exactly what a commit needs");
            }
        }
    }

    #[test]
    fn the_deadline_counts_from_the_last_needed_of_the_best_questions() {
        let two = lead(vec![claim(Durability::Sync, 1, &["b", "c"])]);
        assert_eq!(promises(&two, &[("b", 100), ("c", 700)]).held_since(NOW), Some(Moment::at(700)));
        assert_eq!(promises(&two, &[]).held_since(NOW), None);
        let both = lead(vec![claim(Durability::Sync, 2, &["b", "c"])]);
        assert_eq!(promises(&both, &[("b", 100), ("c", 700)]).held_since(NOW), Some(Moment::at(100)));
        assert_eq!(promises(&both, &[("c", 700)]).held_since(NOW), None);
    }

    #[test]
    fn a_leader_alone_needs_nobody_and_one_that_knows_no_claim_has_nothing() {
        assert_eq!(promises(&lead(vec![claim(Durability::Sync, 0, &[])]), &[]).held_since(NOW), Some(NOW));
        assert_eq!(promises(&lead(vec![]), &[("b", 100)]).held_since(NOW), None);
    }

    #[test]
    fn in_async_everybody_in_the_membership_is_needed() {
        let lead = lead(vec![claim(Durability::Async, 0, &[])]);
        assert_eq!(promises(&lead, &[("b", 100), ("c", 700)]).held_since(NOW), None, "d is a member too");
        assert_eq!(promises(&lead, &[("b", 100), ("c", 700), ("d", 300)]).held_since(NOW), Some(Moment::at(100)));
    }

    #[test]
    fn while_a_write_of_the_claim_is_in_doubt_both_claims_have_to_be_blocked() {
        let doubt = lead(vec![claim(Durability::Sync, 1, &["b"]), claim(Durability::Sync, 1, &["c"])]);
        assert_eq!(promises(&doubt, &[("b", 500)]).held_since(NOW), None);
        assert_eq!(promises(&doubt, &[("b", 500), ("c", 400)]).held_since(NOW), Some(Moment::at(400)));
    }

    #[test]
    fn a_promise_counts_with_the_incarnation_that_the_claim_names() {
        let lead = lead(vec![claim(Durability::Sync, 1, &["b"])]);
        let mut promises = promises(&lead, &[("b", 500)]);
        if let Some(Answer::Granted { incarnation, .. }) = promises.answers.get_mut(&name("b")) {
            *incarnation = Incarnation(99);
        }
        assert_eq!(promises.held_since(NOW), None);
        assert!(promises.missing()[&name("b")].contains("incarnation"));
    }
}
