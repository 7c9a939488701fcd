//! Why there is no failover now, and what would come of one: condition by condition, counted as an election counts
//! ([`judge`]), over what the members have published.
//!
//! A forecast for people: an election goes by seals, not by publications, which are up to `member.publish` old.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::election::{Verdict, judge, list};
use super::lsn::Lsn;
use super::names::MemberName;
use super::records::{
    ClusterRecords, DataSummary, Durability, Entry, Force, Keyed, LeaderState, MemberRecord, Operation, Position,
    Request, Role, SealRecord, SyncClaim,
};
use super::rules::{Facts, cold_start, seconds};
use super::timeline::{History, Term};
use super::view::{LocalPostgres, View};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outlook {
    /// Who would lead if the leader were gone now; while nobody leads, who will.
    pub winner: Option<MemberName>,
    /// Who is missing for that.
    pub waits_for: BTreeSet<MemberName>,
    pub says: String,
    /// What a change of leader needs, in the order in which it is asked.
    pub conditions: Vec<Condition>,
    /// What each member could bring to an election, or what stands against it.
    pub members: BTreeMap<MemberName, String>,
    /// What a person would bring about who goes past the claim; only while nobody can be elected without one.
    pub forced: Option<Forced>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    pub what: String,
    pub met: bool,
    pub says: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forced {
    pub winner: MemberName,
    /// Behind the last position that the last leader published; what it wrote in one heartbeat comes on top.
    pub behind_bytes: Option<u64>,
    pub says: String,
}

pub fn outlook(view: &View) -> Outlook {
    let Some(facts) = Facts::of(view) else {
        let says = "the store cannot be read: nobody is elected".to_owned();
        let conditions = vec![Condition::new("store", false, says.clone())];
        return Outlook { says, conditions, ..Outlook::default() };
    };
    let Some(leader) = facts.leader else {
        let says = "there is no readable leader record: nobody is elected by it".to_owned();
        let conditions = vec![Condition::new("leader record", false, says.clone())];
        return Outlook { says, conditions, ..Outlook::default() };
    };
    let gone = gone(&facts);
    let mut members: BTreeMap<MemberName, String> = BTreeMap::new();
    let mut seals: BTreeMap<MemberName, SealRecord> = BTreeMap::new();
    let next = leader.value.term.max(view.memory.durable.highest_term).next();
    for (name, record) in &facts.records.members {
        if gone.as_ref() == Some(name) {
            members.insert(name.clone(), "is the leader that would be replaced".to_owned());
            continue;
        }
        match position(&facts, name, &record.value) {
            Ok(position) => {
                let tags = &record.value.tags;
                let forbidden = if tags.may_lead() { "" } else { ", and must not lead (nofailover or priority 0)" };
                let says =
                    format!("can be sealed, at {} of timeline {}{forbidden}", position.replayed, position.timeline);
                members.insert(name.clone(), says);
                let (incarnation, tags) = (record.value.incarnation, tags.clone());
                seals.insert(name.clone(), SealRecord { term: next, incarnation, position, tags });
            }
            Err(why) => {
                members.insert(name.clone(), why);
            }
        }
    }
    let records = hypothetical(facts.records, next, &seals);
    let mut conditions = vec![lease(&facts), claim(&facts)];
    let cold = match facts.records.sync.value() {
        // Who leads or elects itself is not waited for by anybody.
        Some(claim) if claim.mode == Durability::Async && gone.as_ref() != Some(facts.me()).map(|id| &id.name) => {
            cold_start::may_stand(&facts, claim).err().map(|why| (why, claim.primary.name.clone()))
        }
        Some(_) | None => None,
    };
    let mut outlook = match cold {
        Some((why, last)) => {
            conditions.push(Condition::new("last primary", false, why.clone()));
            Outlook { waits_for: BTreeSet::from([last]), says: why, ..Outlook::default() }
        }
        None => verdict(&facts, &records, &mut members),
    };
    let met = outlook.winner.is_some();
    let sealable = match seals.len() {
        0 => "nobody can be sealed".to_owned(),
        _ => format!("{} can be sealed", list(seals.keys())),
    };
    conditions.push(Condition::new("members", met, sealable));
    if !met {
        outlook.forced = forced(&facts, records);
    }
    Outlook { conditions, members, ..outlook }
}

impl Condition {
    fn new(what: &str, met: bool, says: String) -> Condition {
        Condition { what: what.to_owned(), met, says }
    }
}

impl Outlook {
    /// As `pgvigil explain` shows it.
    pub fn lines(&self) -> String {
        let mut text = format!("failover: {}\n", self.says);
        for condition in &self.conditions {
            let met = if condition.met { "met" } else { "not met" };
            text.push_str(&format!("  {} ({met}): {}\n", condition.what, condition.says));
        }
        for (member, says) in &self.members {
            text.push_str(&format!("  {member}: {says}\n"));
        }
        if let Some(forced) = &self.forced {
            text.push_str(&format!("  by force: {}\n", forced.says));
        }
        text
    }
}

/// The leader, unless it is known to be parked: then it can be sealed like the others.
fn gone(facts: &Facts<'_>) -> Option<MemberName> {
    let leader = &facts.leader?.value;
    if leader.state != LeaderState::Held {
        return None;
    }
    let name = &leader.holder.name;
    let parked = if *name == facts.me().name {
        facts.view.local.postgres.standby().is_some()
    } else {
        facts.speaks(name) && facts.records.members.get(name).is_some_and(|m| m.value.role == Role::Standby)
    };
    (!parked).then(|| name.clone())
}

/// Where the member would be sealed, as far as it is known; or why not.
fn position(facts: &Facts<'_>, name: &MemberName, record: &MemberRecord) -> Result<Position, String> {
    // Shorter than what keeps an election from beginning: a forecast may doubt sooner.
    let patience = facts.view.policy.member_publish * 2;
    let spoke = facts.view.memory.spoke.get(name).is_some_and(|spoke| facts.now().since(*spoke) < patience);
    if *name != facts.me().name && !spoke {
        return Err("has not been heard of lately".to_owned());
    }
    if !matches!(record.data, DataSummary::Present { .. }) {
        return Err(format!("has no data to seal ({:?})", record.data));
    }
    if let Some(job) = &record.job {
        return Err(format!("is busy ({})", job.what));
    }
    let (timeline, replayed) = match &facts.view.local.postgres {
        LocalPostgres::Standby(standby) if *name == facts.me().name => (Some(standby.timeline), Some(standby.replayed)),
        _ => (record.timeline, record.replayed),
    };
    let (Some(timeline), Some(published)) = (timeline, replayed) else {
        return Err(format!("is {}: its position is not known yet", record.state));
    };
    // Who streams is as far as who streams besides, however old its publication is.
    let streaming = |m: &MemberRecord| m.state == "streaming" && m.timeline == Some(timeline);
    let furthest = facts.records.members.iter().filter(|(name, m)| facts.speaks(name) && streaming(&m.value));
    let replayed = match furthest.filter_map(|(_, m)| m.value.replayed).max() {
        Some(furthest) if streaming(record) => furthest.max(published),
        _ => published,
    };
    let history = History::from_reservations(timeline, &facts.records.timelines).unwrap_or_default();
    Ok(Position { timeline, replayed, received: replayed, history })
}

/// The store as it would be if everybody who can were sealed now.
fn hypothetical(records: &ClusterRecords, term: Term, seals: &BTreeMap<MemberName, SealRecord>) -> ClusterRecords {
    let mut records = records.clone();
    if let Entry::Present(leader) = &mut records.leader {
        let coordinator = leader.value.holder.name.clone();
        leader.value.term = term;
        leader.value.lsn = records.lease.value().and_then(|lease| lease.lsn).or(leader.value.lsn);
        leader.value.state = LeaderState::Electing { coordinator, preferred: None, winner: None };
    }
    records.seals = seals.iter().map(|(n, seal)| (n.clone(), Keyed { revision: 0, value: seal.clone() })).collect();
    for (name, seal) in seals {
        if let Some(member) = records.members.get_mut(name) {
            member.value.replayed = Some(seal.position.replayed);
        }
    }
    records
}

fn lease(facts: &Facts<'_>) -> Condition {
    let view = facts.view;
    let condition = |met, says| Condition::new("leader gone", met, says);
    let Some(leader) = facts.leader.map(|l| &l.value) else { return condition(false, "no leader record".to_owned()) };
    let (who, term) = (&leader.holder.name, leader.term);
    match &leader.state {
        LeaderState::Released { why, .. } => condition(true, format!("{who} released term {term} ({why})")),
        LeaderState::Fenced { .. } => condition(true, format!("{who} is fenced under term {term}")),
        LeaderState::Held | LeaderState::Electing { .. } => {
            let what = if leader.state == LeaderState::Held { "leads" } else { "holds an election" };
            if leader.holder == *facts.me() && view.lease.valid(term, view.now) {
                return condition(false, format!("this member {what} and renews its lease of term {term}"));
            }
            let wait = view.policy.timings.candidate_wait(Duration::from_millis(leader.ttl_ms));
            let silent = view.memory.silence.map(|s| view.now.since(s.first_seen)).unwrap_or_default();
            let over = view.memory.silence.is_some_and(|s| view.now.all_reached(s.first_seen.plus(wait)));
            let says = if silent < view.policy.timings.heartbeat * 2 {
                format!(
                    "{who} {what} under term {term} and renews; an election begins when it releases the term or is silent for {}",
                    seconds(wait)
                )
            } else {
                format!("{who} {what} under term {term} and is silent for {} of {}", seconds(silent), seconds(wait))
            };
            condition(over, says)
        }
    }
}

fn claim(facts: &Facts<'_>) -> Condition {
    let condition = |met, says| Condition::new("claim", met, says);
    let Some(claim) = facts.records.sync.value() else {
        let says = "the key `sync` is absent or unreadable: who has every acknowledged commit is not known";
        return condition(false, says.to_owned());
    };
    let remembered = facts.view.memory.durable.highest_sync_term;
    if claim.term < remembered {
        return condition(false, format!("`sync` is of term {}, term {remembered} is remembered", claim.term));
    }
    condition(true, claimed(claim))
}

fn claimed(claim: &SyncClaim) -> String {
    let primary = &claim.primary.name;
    match (claim.mode, claim.k) {
        (Durability::Async, _) => format!("async: only {primary} is known to have every commit (term {})", claim.term),
        (_, 0) => format!("commits were acknowledged from the disk of {primary} alone (term {})", claim.term),
        (_, k) => format!(
            "every acknowledged commit is on {primary} and {k} of {} (term {}): {} of {} must be sealed",
            list(claim.members.iter().map(|id| &id.name)),
            claim.term,
            claim.seals_needed(),
            list(claim.electorate().iter().map(|id| &id.name)),
        ),
    }
}

fn verdict(facts: &Facts<'_>, records: &ClusterRecords, members: &mut BTreeMap<MemberName, String>) -> Outlook {
    let Some(leader) = records.leader() else { return Outlook::default() };
    match judge(records, leader, facts.view.policy.max_lag, None) {
        Verdict::Elected(elected) => {
            for (name, why) in elected.rejected {
                members.insert(name, format!("would not be chosen: {why}"));
            }
            let winner = elected.winner;
            let says = format!(
                "{} would lead: it has everything, up to {} of timeline {}",
                winner.member.name, winner.switch, winner.parent
            );
            Outlook { winner: Some(winner.member.name), says, ..Outlook::default() }
        }
        Verdict::Copying(copying) => {
            let says = format!(
                "{} would lead, after copying from {}, which has everything and must not lead",
                copying.by, copying.from
            );
            Outlook { winner: Some(copying.by), says, ..Outlook::default() }
        }
        Verdict::Waiting { missing, why, .. } => {
            Outlook { waits_for: missing, says: format!("nobody could lead: {why}"), ..Outlook::default() }
        }
        Verdict::Impossible { why } => Outlook { says: format!("nobody could lead: {why}"), ..Outlook::default() },
    }
}

/// The same counting with a person's word for it.
fn forced(facts: &Facts<'_>, mut records: ClusterRecords) -> Option<Forced> {
    let leader = records.leader()?.clone();
    let last = leader.last.as_ref()?;
    let request = Request {
        id: "outlook".to_owned(),
        what: Operation::Failover { to: None },
        asked_by: String::new(),
        at_unix_ms: 0,
        timeout_ms: 0,
        began: None,
        outcome: None,
        force: Some(Force { last_term: last.term, off: leader.taken.iter().map(|t| t.from.name.clone()).collect() }),
    };
    records.requests.insert(request.id.clone(), Keyed { revision: 0, value: request });
    let Verdict::Elected(elected) = judge(&records, &leader, facts.view.policy.max_lag, None) else { return None };
    let winner = elected.winner;
    let published: Option<Lsn> = leader.lsn;
    let name = &winner.member.name;
    let held = &last.member.name;
    let says = format!(
        "`pgvigil failover --force` would make {name} the leader; it {}, and what {held} wrote in a heartbeat comes on top: \
         that is lost. It may be told that {held} is off (`--off {held}`); else the lease is waited for, and a leader that is \
         cut off and lives by the promises of others is not bound by it",
        cold_start::behind(winner.switch, published, held)
    );
    Some(Forced { behind_bytes: published.map(|end| winner.switch.bytes_to(end)), says, winner: name.clone() })
}
