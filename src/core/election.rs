//! Who becomes leader: seals counted against the published claim, positions compared on one line of history.
//!
//! Protocol §5 steps 3 and 4. Everybody who is not chosen is named with the reason (L6).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::lsn::Lsn;
use super::names::{MemberId, MemberName};
use super::records::{ClusterRecords, Durability, Keyed, LeaderRecord, Position, SealRecord, SyncClaim, Winner};
use super::timeline::{History, TimelineId};

const NOT_TO_LEAD: &str = "tag nofailover (or failover_priority 0)";

/// What the seals of one term amount to.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Nobody may be elected, whatever else is sealed; a person or another fact has to come.
    Impossible {
        why: String,
    },
    /// More seals are needed.
    Waiting {
        have: usize,
        need: usize,
        missing: BTreeSet<MemberName>,
        why: String,
    },
    /// Who has everything must not lead: who may copies its WAL first, and is sealed again (protocol §5 step 4).
    Copying(Copying),
    Elected(Elected),
}

/// WAL that has to go from one sealed member to another before the second can win.
#[derive(Clone, Debug, PartialEq)]
pub struct Copying {
    pub by: MemberName,
    pub from: MemberName,
    /// Where `from` is sealed.
    pub timeline: TimelineId,
    pub end: Lsn,
    pub rejected: BTreeMap<MemberName, String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Elected {
    pub winner: Winner,
    /// Seals that were counted or compared: their revisions guard the writing of the winner.
    pub counted: Vec<(MemberName, i64)>,
    pub rejected: BTreeMap<MemberName, String>,
    /// Members that could still be sealed and may matter (the preferred one, or any in async mode).
    pub outstanding: BTreeSet<MemberName>,
}

/// Where a position stands, compared in the order of the fields: first what lies on a timeline that was promoted after the
/// last published one, by term and LSN; then the LSN on the published line.
///
/// A later timeline outranks a longer old one: its winner had every commit that was acknowledged on the published line
/// (it had q seals), and clients that reach PostgreSQL directly may have been acknowledged on it between its barrier and its
/// publication. What the old primary has beyond that switch was acknowledged to nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Standing {
    beyond: Option<(u64, Lsn)>,
    on_line: Lsn,
}

/// Why a position cannot be compared or must not lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    OnLine(Standing),
    /// Left the line before its end: its WAL after `left_at` is of another history (S3).
    Diverged {
        standing: Standing,
        left_at: Lsn,
    },
    Unknown {
        why: String,
    },
}

impl Place {
    fn standing(&self) -> Option<Standing> {
        match self {
            Place::OnLine(standing) | Place::Diverged { standing, .. } => Some(*standing),
            Place::Unknown { .. } => None,
        }
    }
}

/// Puts a position on the line of `published`; `None` is a cluster that never had a leader, whose line is timeline 1.
pub fn place(position: &Position, published: Option<TimelineId>, records: &ClusterRecords) -> Place {
    let line = published.unwrap_or(TimelineId(1));
    let Some(ancestors) = History::from_reservations(line, &records.timelines) else {
        return Place::Unknown { why: format!("the history of timeline {line} is not known to the store") };
    };
    let at = position.timeline;
    if at == line {
        return Place::OnLine(Standing { beyond: None, on_line: position.replayed });
    }
    if let Some(left) = ancestors.switch_from(at) {
        let standing = Standing { beyond: None, on_line: position.replayed.min(left) };
        return if position.replayed <= left {
            Place::OnLine(standing)
        } else {
            Place::Diverged { standing, left_at: left }
        };
    }
    // A timeline that was reserved and promoted but never published, or one of another branch.
    let Some(own) = History::from_reservations(at, &records.timelines) else {
        return Place::Unknown { why: format!("timeline {at} was never reserved in this cluster") };
    };
    if let Some(left) = own.switch_from(line) {
        let term = records.timelines.get(&at).map(|r| r.term.0).unwrap_or(0);
        return Place::OnLine(Standing { on_line: left, beyond: Some((term, position.replayed)) });
    }
    // Both come from a common ancestor: find where the ways part.
    let common = own.0.iter().rev().find_map(|entry| {
        let line_left = ancestors.switch_from(entry.timeline)?;
        Some(entry.switch.min(line_left))
    });
    match common {
        Some(left_at) => Place::Diverged { standing: Standing { beyond: None, on_line: left_at }, left_at },
        None => Place::Unknown { why: format!("timeline {at} has no ancestor in common with timeline {line}") },
    }
}

/// Counts the seals of `leader.term` and chooses. `enough_for_all` is false while it is still worth waiting for those who
/// are outstanding; the caller decides by its clock.
pub fn judge(records: &ClusterRecords, leader: &LeaderRecord, max_lag: u64, preferred: Option<&MemberName>) -> Verdict {
    let Some(claim) = records.sync.value() else {
        // S12: absent or unreadable is unknown, and unknown is never a licence.
        return Verdict::Impossible {
            why: "the key `sync` is absent or unreadable: which commits were acknowledged where is not known".into(),
        };
    };
    let seals: BTreeMap<&MemberName, &Keyed<SealRecord>> =
        records.seals.iter().filter(|(_, seal)| seal.value.term == leader.term).collect();
    match claim.mode {
        Durability::Sync | Durability::Strict => judge_sync(records, leader, claim, &seals, preferred),
        Durability::Async => judge_async(records, leader, claim, &seals, max_lag, preferred),
    }
}

fn judge_sync(
    records: &ClusterRecords,
    leader: &LeaderRecord,
    claim: &SyncClaim,
    seals: &BTreeMap<&MemberName, &Keyed<SealRecord>>,
    preferred: Option<&MemberName>,
) -> Verdict {
    let electorate = claim.electorate();
    let need = claim.seals_needed();
    // S2: a seal counts with the incarnation that the claim names, and with no other.
    let sealed: BTreeSet<&MemberId> = electorate
        .iter()
        .filter(|id| {
            seals.get(&id.name).is_some_and(|seal| {
                seal.value.incarnation == id.incarnation && !went_back(records, &id.name, &seal.value)
            })
        })
        .collect();
    let missing: BTreeSet<MemberName> =
        electorate.iter().filter(|id| !sealed.contains(id)).map(|id| id.name.clone()).collect();
    if sealed.len() < need && records.forced().is_some() {
        return forced(records, leader, seals, preferred);
    }
    if sealed.len() < need {
        let by = match claim.k {
            0 => format!("{} alone", claim.primary.name),
            k => format!("{} with {k} of {}", claim.primary.name, list(claim.members.iter().map(|m| &m.name))),
        };
        let mut why = format!(
            "{} of {need} needed seals: commits may have been acknowledged by {by}; waiting for {}",
            sealed.len(),
            list(missing.iter()),
        );
        for name in &missing {
            if let Some(seal) = seals.get(name) {
                why.push_str(&format!(
                    "; {name} is sealed as incarnation {}, which the claim does not name",
                    seal.value.incarnation
                ));
            }
        }
        return Verdict::Waiting { have: sealed.len(), need, missing, why };
    }
    let candidates = sealed.iter().map(|id| (*id).clone()).collect();
    let outstanding = missing.iter().filter(|name| Some(*name) == preferred).cloned().collect();
    choose(records, leader, seals, candidates, preferred, outstanding, BTreeMap::new())
}

/// A person goes past the claim: the best of all who can be sealed, whatever is lost.
fn forced(
    records: &ClusterRecords,
    leader: &LeaderRecord,
    seals: &BTreeMap<&MemberName, &Keyed<SealRecord>>,
    preferred: Option<&MemberName>,
) -> Verdict {
    let members = records.membership.value().map(|m| m.members.clone()).unwrap_or_default();
    let candidates = seals
        .iter()
        .filter(|(name, _)| members.contains(**name))
        .map(|(name, seal)| MemberId { name: (*name).clone(), incarnation: seal.value.incarnation })
        .collect();
    let missing = members.iter().filter(|name| !seals.contains_key(name)).cloned().collect();
    choose(records, leader, seals, candidates, preferred, missing, BTreeMap::new())
}

/// A final position behind the one that the same incarnation published itself: its disk is one of the past (a snapshot
/// was brought back). What it promised then proves nothing for what it acknowledged since.
fn went_back(records: &ClusterRecords, name: &MemberName, seal: &SealRecord) -> bool {
    records
        .members
        .get(name)
        .is_some_and(|m| m.value.incarnation == seal.incarnation && m.value.replayed > Some(seal.position.replayed))
}

fn judge_async(
    records: &ClusterRecords,
    leader: &LeaderRecord,
    claim: &SyncClaim,
    seals: &BTreeMap<&MemberName, &Keyed<SealRecord>>,
    max_lag: u64,
    preferred: Option<&MemberName>,
) -> Verdict {
    let members: BTreeSet<MemberName> = match records.membership.value() {
        Some(membership) => membership.members.clone(),
        None => BTreeSet::from([claim.primary.name.clone()]),
    };
    let mut rejected = BTreeMap::new();
    let mut candidates = BTreeSet::new();
    // The last position that the leader published with its heartbeat bounds the loss (S2, async).
    let published = leader.lsn;
    for (name, seal) in seals {
        if !members.contains(*name) {
            rejected.insert((*name).clone(), "not in the membership that a leader wrote".to_owned());
            continue;
        }
        let behind = published.map(|lsn| seal.value.position.replayed.bytes_to(lsn)).unwrap_or(0);
        if behind > max_lag && records.forced().is_none() {
            rejected.insert((*name).clone(), format!("{behind} bytes behind, election.max_lag is {max_lag}"));
            continue;
        }
        if !seal.value.tags.may_lead() {
            rejected.insert((*name).clone(), NOT_TO_LEAD.to_owned());
            continue;
        }
        candidates.insert(MemberId { name: (*name).clone(), incarnation: seal.value.incarnation });
    }
    let missing: BTreeSet<MemberName> = members.iter().filter(|name| !seals.contains_key(name)).cloned().collect();
    if candidates.is_empty() {
        let why = match rejected.iter().next() {
            Some(_) => rejected.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; "),
            None => format!("no member is sealed yet; waiting for {}", list(missing.iter())),
        };
        return Verdict::Waiting { have: 0, need: 1, missing, why };
    }
    choose(records, leader, seals, candidates, preferred, missing, rejected)
}

/// The most advanced of `candidates` on the published line; priority, preference and name break ties only (S3).
fn choose(
    records: &ClusterRecords,
    leader: &LeaderRecord,
    seals: &BTreeMap<&MemberName, &Keyed<SealRecord>>,
    candidates: BTreeSet<MemberId>,
    preferred: Option<&MemberName>,
    outstanding: BTreeSet<MemberName>,
    mut rejected: BTreeMap<MemberName, String>,
) -> Verdict {
    let published = leader.last.as_ref().map(|last| last.timeline);
    let places: BTreeMap<&MemberId, (Place, &SealRecord)> = candidates
        .iter()
        .filter_map(|id| {
            seals.get(&id.name).map(|seal| (id, (place(&seal.value.position, published, records), &seal.value)))
        })
        .collect();
    let Some(best) = places.values().filter_map(|(place, _)| place.standing()).max() else {
        let why = places.iter().map(|(id, (place, _))| format!("{}: {place:?}", id.name)).collect::<Vec<_>>();
        return Verdict::Impossible { why: format!("no sealed position can be compared: {}", why.join("; ")) };
    };

    let disks = |id: &MemberId| {
        let record = records.members.get(&id.name).filter(|m| m.value.incarnation == id.incarnation);
        record.map(|m| &m.value.storage)
    };
    let mut eligible: Vec<(&MemberId, &SealRecord)> = Vec::new();
    for (id, (place, seal)) in &places {
        match place {
            Place::Unknown { why } => {
                rejected.insert(id.name.clone(), format!("position unknown: {why}"));
            }
            Place::Diverged { left_at, .. } => {
                rejected.insert(id.name.clone(), format!("diverged: left the published history at {left_at}"));
            }
            Place::OnLine(standing) if *standing < best => {
                rejected.insert(
                    id.name.clone(),
                    format!("behind: at {} of timeline {}", seal.position.replayed, seal.position.timeline),
                );
            }
            Place::OnLine(_) if !seal.tags.may_lead() => {
                rejected.insert(id.name.clone(), NOT_TO_LEAD.to_owned());
            }
            Place::OnLine(_) if disks(id).is_some_and(|disks| disks.trouble.is_some()) => {
                let why = disks(id).and_then(|disks| disks.trouble.clone()).unwrap_or_default();
                rejected.insert(id.name.clone(), why);
            }
            Place::OnLine(_) => eligible.push((*id, seal)),
        }
    }
    eligible.sort_by_key(|(id, seal)| {
        // Among equals whoever has room goes first, whatever its priority: a full disk ends the next term as it ended this.
        let full = disks(id).is_some_and(|disks| disks.full.is_some());
        (full, Reverse(Some(&id.name) == preferred), Reverse(seal.tags.failover_priority), id.name.clone())
    });
    let full = places.iter().find(|(_, (place, _))| *place == Place::OnLine(best)).map(|(id, (_, seal))| (*id, *seal));
    let mut counted: BTreeMap<&MemberName, i64> =
        candidates.iter().filter_map(|id| seals.get(&id.name).map(|seal| (&id.name, seal.revision))).collect();
    let stand_in;
    if eligible.is_empty()
        && let Some((from, full)) = full
        && let Some((by, seal)) = closest_to(records, seals, full, preferred)
    {
        let Position { timeline, replayed: end, .. } = full.position;
        if (seal.value.position.timeline, seal.value.position.replayed) != (timeline, end) {
            return Verdict::Copying(Copying { by: by.clone(), from: from.name.clone(), timeline, end, rejected });
        }
        // It has copied everything: its own seal is one of those that must still stand.
        rejected.remove(by);
        counted.insert(by, seal.revision);
        stand_in = MemberId { name: by.clone(), incarnation: seal.value.incarnation };
        eligible.push((&stand_in, &seal.value));
    }
    let Some((winner, seal)) = eligible.first() else {
        return Verdict::Impossible {
            why: format!(
                "no member that has everything may lead: {}",
                rejected.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; ")
            ),
        };
    };
    for (id, other) in &eligible[1..] {
        let why = if let Some(full) = disks(id).and_then(|disks| disks.full.as_ref()) {
            format!("as advanced, but {full}")
        } else if Some(&winner.name) == preferred {
            format!("as advanced, but {} was asked for", winner.name)
        } else if other.tags.failover_priority < seal.tags.failover_priority {
            format!(
                "as advanced, but failover_priority {} is below {} of {}",
                other.tags.failover_priority, seal.tags.failover_priority, winner.name
            )
        } else {
            format!("as advanced, but {} comes first by name", winner.name)
        };
        rejected.insert(id.name.clone(), why);
    }
    let highest = seals.values().map(|s| s.value.position.timeline).max().unwrap_or_default();
    let timeline = TimelineId(records.highest_timeline().max(highest).0 + 1);
    Verdict::Elected(Elected {
        winner: Winner {
            member: (*winner).clone(),
            timeline,
            parent: seal.position.timeline,
            switch: seal.position.replayed,
        },
        counted: counted.into_iter().map(|(name, revision)| (name.clone(), revision)).collect(),
        rejected,
        outstanding,
    })
}

/// Who may lead and can come to where `from` is by taking its WAL: the one with the least to copy. It need not be in the
/// claim: with all of `from`'s WAL it has every acknowledged commit, whatever it had before.
fn closest_to<'a>(
    records: &ClusterRecords,
    seals: &BTreeMap<&'a MemberName, &'a Keyed<SealRecord>>,
    full: &SealRecord,
    preferred: Option<&MemberName>,
) -> Option<(&'a MemberName, &'a Keyed<SealRecord>)> {
    let members = &records.membership.value()?.members;
    seals
        .iter()
        .filter(|(name, seal)| {
            members.contains(**name) && seal.value.tags.may_lead() && leads_to(&seal.value.position, &full.position)
        })
        .min_by_key(|(name, seal)| {
            let Position { timeline, replayed, .. } = seal.value.position;
            let tags = &seal.value.tags;
            (Reverse((timeline, replayed)), Reverse(Some(**name) == preferred), Reverse(tags.failover_priority), **name)
        })
        .map(|(name, seal)| (*name, *seal))
}

/// Is `behind` a point of the history that ends at `ahead`? (S3: nothing is copied over WAL of another history.)
fn leads_to(behind: &Position, ahead: &Position) -> bool {
    let left = if behind.timeline == ahead.timeline {
        Some(ahead.replayed)
    } else {
        ahead.history.switch_from(behind.timeline)
    };
    left.is_some_and(|left| behind.replayed <= left)
}

/// Names in one phrase.
pub fn list<'a>(names: impl IntoIterator<Item = &'a MemberName>) -> String {
    let names: Vec<&str> = names.into_iter().map(MemberName::as_str).collect();
    match names.as_slice() {
        [] => "nobody".to_owned(),
        [one] => (*one).to_owned(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}
