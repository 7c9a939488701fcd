//! Whether the holder of the leader record gives a sign of life, to this member and to enough others, and for how long it has
//! not (protocol §5, way B and its pre-vote).

use std::time::Duration;

use super::names::{MemberId, MemberName};
use super::peers::{Door, HolderSeen, Peer, Promise, Sealable, Sighting, Sign};
use super::records::{Durability, LeaderRecord, LeaderState};
use super::rules::{Facts, seconds};
use super::time::Moment;
use super::timeline::Term;
use super::view::{HolderMemory, LocalPostgres, Receiver, View};

/// An answer that is older does not vote.
const FRESH: Duration = Duration::from_millis(500);
/// A wrong suspicion makes the members more patient for so long; then its cause is gone, or the next one shows it.
const DAMPED_FOR: Duration = Duration::from_secs(600);
/// Around the moment in which a silence is long enough, and while the holder's agent has only just begun to refuse.
const QUICK: Duration = Duration::from_millis(10);
const QUICK_FOR: Duration = Duration::from_secs(3);
const WATCHFUL: Duration = Duration::from_millis(100);

/// Signs of life of the present holder that only this member's own eyes see. The error says why nothing is known (S12).
pub fn sighting(view: &View) -> Result<Sighting, String> {
    let facts = Facts::of(view).ok_or("its store cannot be read")?;
    let leader = facts.leader.ok_or("there is no leader record")?;
    let silence = view.memory.silence.filter(|s| s.leader_revision == leader.revision).ok_or("nothing was seen yet")?;
    let member = &leader.value.holder.name;
    let memory = view.memory.holder.as_ref().filter(|h| h.term == leader.value.term && h.member == *member);
    Ok(Sighting {
        member: member.clone(),
        term: silence.term,
        leader_revision: silence.leader_revision,
        seq: silence.seq,
        unchanged_ms: milliseconds(view.now.since(silence.first_seen)),
        wal: match (&view.local.postgres, memory.and_then(|h| h.wal)) {
            (LocalPostgres::Unknown { .. }, _) => Sign::Unknown,
            (_, Some((_, at))) => Sign::Heard { ms_ago: milliseconds(view.now.since(at)) },
            (_, None) => Sign::Never,
        },
        agent: agent(view, member),
        refused_ms: refused(view, member, memory).map(|since| milliseconds(view.now.since(since))),
    })
}

fn agent(view: &View, member: &MemberName) -> Sign {
    let Some(peer) = view.peers.get(member) else { return Sign::Unknown };
    match (&peer.answer, peer.agent) {
        (Some(heard), _) => Sign::Heard { ms_ago: milliseconds(view.now.since(heard.at)) },
        (None, Door::Unknown) => Sign::Unknown,
        (None, Door::Open { .. } | Door::Refuses { .. } | Door::Silent { .. }) => Sign::Never,
    }
}

/// Since when both ports refuse, if both answered in the same term: else it may be a firewall that always did.
fn refused(view: &View, member: &MemberName, memory: Option<&HolderMemory>) -> Option<Moment> {
    memory.filter(|h| h.agent_answered && h.postgres_answered)?;
    let peer = view.peers.get(member)?;
    Some(peer.agent.refuses_since()?.latest(peer.postgres.refuses_since()?))
}

impl HolderMemory {
    /// Takes in what this round saw of `member`, holder under `term` since `since`.
    pub fn observe(
        previous: Option<HolderMemory>,
        (member, term, since): (&MemberName, Term, Moment),
        postgres: &LocalPostgres,
        peer: Option<&Peer>,
        now: Moment,
    ) -> HolderMemory {
        let known = previous.filter(|h| h.member == *member && h.term == term);
        let mut holder = known.unwrap_or_else(|| HolderMemory {
            member: member.clone(),
            term,
            agent_answered: false,
            postgres_answered: false,
            wal: None,
            looked_at: None,
        });
        holder.agent_answered |= peer.and_then(|p| p.answer.as_ref()).is_some_and(|heard| heard.at.all_reached(since));
        let Some(standby) = postgres.standby() else { return holder };
        let last_look = holder.looked_at.replace(now);
        let from_it = standby.receiver == Receiver::Streaming
            && standby.follows.as_ref().is_some_and(|f| f.upstream.member == *member && f.term == term);
        let Some(message) = standby.last_message.filter(|_| from_it) else { return holder };
        holder.postgres_answered = true;
        if holder.wal.is_none_or(|(mark, _)| mark != message.mark) {
            // It came since the last look; PostgreSQL's own clock may tell when within that time, and no more: it is a
            // wall clock that may have been set.
            let at = now.minus(Duration::from_millis(message.age_ms));
            holder.wal = Some((message.mark, last_look.map_or(now, |look| at.latest(look))));
        }
        holder
    }
}

// === How long is long enough ===

/// What a candidate waits for, of one leader record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    pub after: Duration,
    pub after_refused: Duration,
}

impl Patience {
    pub fn of(facts: &Facts<'_>, record: &LeaderRecord) -> Patience {
        let policy = &facts.view.policy;
        let longest = policy.timings.candidate_wait(Duration::from_millis(record.ttl_ms));
        // S4: the holder's gate goes by what the holder wrote.
        let after = policy.takeover.after.max(Duration::from_millis(record.takeover_ms));
        let after = after.saturating_mul(1 << doubled(facts, record).min(16)).min(longest);
        Patience { after, after_refused: policy.takeover.after_refused }
    }
}

/// How often `takeover.after` is doubled for the holder of `record`: once more than for the one before it, if that one's term
/// was taken on suspicion and it turned out to be alive (L5). Never for one that refuses connections, released, or is silent
/// for W.
pub fn doubled(facts: &Facts<'_>, record: &LeaderRecord) -> u32 {
    let Some(taken) = &record.taken else { return 0 };
    let since = facts.view.memory.term_since.unwrap_or(facts.now());
    let wrong = facts.records.members.get(&taken.from.name).is_some_and(|m| m.value.overtaken == Some(taken.term));
    if wrong && !facts.now().all_reached(since.plus(DAMPED_FOR)) { taken.doubled + 1 } else { 0 }
}

impl Sighting {
    /// Since how many milliseconds no sign of life has come at all; `None`: some sign was not listened for.
    fn silent_ms(&self) -> Option<u64> {
        let ago = |sign| match sign {
            Sign::Unknown => None,
            Sign::Never => Some(u64::MAX),
            Sign::Heard { ms_ago } => Some(ms_ago),
        };
        Some(self.unchanged_ms.min(ago(self.wal)?).min(ago(self.agent)?))
    }

    /// Is that long enough? The error says how much longer it has to last; `None`: it is not known to be silent at all.
    fn quiet(&self, patience: &Patience) -> Result<String, Option<Duration>> {
        let silent = Duration::from_millis(self.silent_ms().ok_or(None)?);
        let refused = self.refused_ms.map(|ms| Duration::from_millis(ms).min(silent));
        if let Some(refused) = refused.filter(|refused| *refused >= patience.after_refused) {
            return Ok(format!("{} refuses connections on both ports for {}", self.member, seconds(refused)));
        }
        if silent >= patience.after {
            return Ok(format!("{} gives no sign of life for {}", self.member, seconds(silent)));
        }
        let left = patience.after - silent;
        Err(Some(refused.map_or(left, |refused| left.min(patience.after_refused - refused))))
    }
}

// === Pre-vote ===

/// Where way B stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WayB {
    /// The holder lives as far as this member can tell, or is this member.
    Heard,
    /// No sign of life since a moment ago; long enough at this moment.
    Until(Moment),
    /// Silent for long enough, and yet nothing changes.
    Barred { why: String },
    /// Enough members see the same silence, are bound by nothing, and can be sealed.
    Open { why: String },
}

pub fn way_b(facts: &Facts<'_>) -> WayB {
    let view = facts.view;
    let Some(leader) = facts.leader else { return WayB::Heard };
    let leads = matches!(leader.value.state, LeaderState::Held | LeaderState::Electing { .. });
    if !leads || leader.value.holder == *facts.me() {
        return WayB::Heard;
    }
    let Ok(own) = sighting(view) else { return WayB::Heard };
    let patience = Patience::of(facts, &leader.value);
    let seen = match own.quiet(&patience) {
        Ok(seen) => seen,
        Err(Some(left)) => return WayB::Until(view.now.plus(left)),
        Err(None) => return WayB::Heard,
    };
    let barred = |why: String| WayB::Barred { why: format!("{seen}; {why}") };
    let Some(claim) = facts.records.sync.value() else {
        return barred("the key `sync` is absent or unreadable: nobody is elected on a guess (S12)".to_owned());
    };
    if claim.mode == Durability::Async {
        // Its clients need nobody's acknowledgement: only its own deadline ends them.
        let wait = view.policy.timings.candidate_wait(Duration::from_millis(leader.value.ttl_ms));
        return barred(format!(
            "durability is async, so it may still acknowledge commits until its lease has run out: waiting {}",
            seconds(wait)
        ));
    }
    let need = claim.seals_needed();
    let mut against = Vec::new();
    let mut votes = 0;
    for id in claim.electorate().iter().filter(|id| **id != leader.value.holder) {
        let vote = if id == facts.me() {
            consents(&Promise::of(view), &Sealable::of(view))
        } else {
            vote(view.peers.get(&id.name), id, &own, &patience, view.now)
        };
        match vote {
            Ok(()) => votes += 1,
            Err(why) => against.push(format!("{}: {why}", id.name)),
        }
    }
    if votes < need {
        return barred(format!(
            "{need} members must see it so and be free to elect, {votes} are ({})",
            against.join("; ")
        ));
    }
    WayB::Open { why: seen }
}

/// Does another member see the same silence of the same holder, and could it be sealed?
fn vote(peer: Option<&Peer>, id: &MemberId, own: &Sighting, patience: &Patience, now: Moment) -> Result<(), String> {
    let heard = peer.and_then(|peer| peer.answer.as_ref()).ok_or("its agent has not answered")?;
    // Only what it said just now: a sign of life may have reached it since.
    if now.any_reached(heard.asked_at.plus(FRESH)) {
        return Err(format!("its agent has not answered for {}", seconds(now.since(heard.at))));
    }
    if heard.from != *id {
        return Err(format!(
            "it answers as incarnation {}, the claim names {}",
            heard.from.incarnation, id.incarnation
        ));
    }
    let seen = match &heard.report.holder {
        HolderSeen::Seen(seen) => seen,
        HolderSeen::Unknown { why } => return Err(format!("it does not know the leader: {why}")),
    };
    let key = |s: &Sighting| (s.member.clone(), s.term, s.leader_revision, s.seq);
    if key(seen) != key(own) {
        return Err(format!("it sees {} with heartbeat {} of term {}", seen.member, seen.seq, seen.term));
    }
    seen.quiet(patience).map_err(|_| format!("it hears {}", own.member))?;
    consents(&heard.report.promise, &heard.report.sealable)
}

fn consents(promise: &Promise, sealable: &Sealable) -> Result<(), String> {
    match promise {
        Promise::Free => {}
        Promise::Unknown => return Err("it does not say whether it is bound by a promise".to_owned()),
        Promise::Bound { to, term, left_ms } => {
            let left = seconds(Duration::from_millis(*left_ms));
            return Err(format!("it has promised {} to take no part in a term above {term} for {left}", to.name));
        }
    }
    match sealable {
        Sealable::Yes => Ok(()),
        Sealable::Unknown => Err("it is not known whether it can be sealed".to_owned()),
        Sealable::No { why } => Err(why.clone()),
    }
}

// === When to look, how often to ask ===

/// When the next look at a holder that may be silent is due.
pub fn look_again(view: &View) -> Option<Moment> {
    match way_b(&Facts::of(view)?) {
        WayB::Heard | WayB::Open { .. } => None,
        WayB::Until(at) => Some(at),
        WayB::Barred { .. } => Some(view.now.plus(pace(view))),
    }
}

/// How often the other agents are to be asked: each heartbeat, and quickly while the holder is silent.
pub fn pace(view: &View) -> Duration {
    let calm = view.policy.timings.heartbeat;
    let holds = Facts::of(view).is_some_and(|facts| facts.mine().is_some());
    let Some(seen) = sighting(view).ok().filter(|_| !holds) else { return calm };
    let door = view.peers.get(&seen.member).map(|peer| peer.agent);
    let refuses = door.and_then(Door::refuses_since);
    let wait = view.policy.timings.candidate_wait(view.policy.timings.ttl);
    if Duration::from_millis(seen.unchanged_ms) > wait + QUICK_FOR {
        // The lease is over: what is waited for now does not come within milliseconds.
        return calm;
    }
    // Just before and after the moment that decides, everybody wants everybody's word at once.
    let patience = Facts::of(view).and_then(|facts| Some(Patience::of(&facts, facts.records.leader()?)));
    let near = patience.is_some_and(|patience| match seen.quiet(&patience) {
        Ok(_) => Duration::from_millis(seen.silent_ms().unwrap_or(u64::MAX)) < patience.after + QUICK_FOR,
        Err(left) => left.is_some_and(|left| left < WATCHFUL),
    });
    if near || refuses.is_some_and(|since| view.now.since(since) < patience.map_or(QUICK_FOR, |p| p.after_refused)) {
        return calm.min(QUICK);
    }
    let silent = seen.silent_ms().is_some_and(|ms| Duration::from_millis(ms) >= calm * 3 / 2);
    if silent || refuses.is_some() || matches!(door, Some(Door::Silent { .. })) { calm.min(WATCHFUL) } else { calm }
}

pub fn milliseconds(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
