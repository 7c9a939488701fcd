//! Whether the holder of the leader record gives a sign of life to this member, and for how long it has not (protocol §5, B).

use std::time::Duration;

use super::names::MemberName;
use super::peers::{Door, Peer, Sighting, Sign};
use super::rules::Facts;
use super::time::Moment;
use super::timeline::Term;
use super::view::{HolderMemory, LocalPostgres, Receiver, View};

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

pub fn milliseconds(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
