//! What must hold in every state (docs/INVARIANTS.md), as conditions on the value of the whole cluster.

use crate::world::*;

/// An acknowledged commit is missing in the history of a later term (S1, S2).
pub const LOST: u8 = 1;
/// PostgreSQL releases commits with less than the store says (S9).
pub const WEAK: u8 = 2;
/// A timeline number was reserved twice (S6).
pub const TIMELINE_TWICE: u8 = 3;
/// Read-write without a guarded term, or a promotion of somebody who may not (S3, S8).
pub const UNGUARDED: u8 = 4;
/// Overtaken although its lease ran on (S1, without seals).
pub const OVERTAKEN: u8 = 5;
/// A healthy primary was killed by its own agent (S10, L3).
pub const KILLED: u8 = 6;
/// A plan that breaks the executable invariants (`core/lint.rs`).
pub const LINT: u8 = 7;
/// A term was taken back, or a timeline is open under two members (S1).
pub const TERM_BACK: u8 = 8;

pub fn text(code: u8) -> &'static str {
    match code {
        LOST => "S1, S2: an acknowledged commit is not in the history of a later term",
        WEAK => "S9: PostgreSQL releases commits with less than the store says",
        TIMELINE_TWICE => "S6: a timeline number is used twice",
        UNGUARDED => "S3, S8: read-write without the guardian, or promoted without a seal",
        OVERTAKEN => "S1: a leader was overtaken while its lease ran",
        KILLED => "S10: a healthy primary was killed by its own agent",
        LINT => "lint: a plan breaks an invariant",
        TERM_BACK => "S1: a term was given twice or taken back",
        _ => "no property",
    }
}

impl World {
    pub fn check(&mut self) {
        if self.broken == 0 {
            self.broken = self.lost().or_else(|| self.weak()).or_else(|| self.unguarded()).unwrap_or(0);
        }
    }

    fn term_of_timeline(&self, number: usize) -> u8 {
        if number == 1 { 1 } else { self.store.timelines[number].term }
    }

    /// S1, S2, S3: every commit that was acknowledged under a lower term is in the history of whoever is read-write, and of
    /// every timeline on which anything was acknowledged.
    fn lost(&self) -> Option<u8> {
        for later in 1..TIMELINES {
            let link = self.store.timelines[later];
            let open = self.members.iter().any(|m| m.pg == Pg::Primary && usize::from(m.timeline) == later);
            let told = later > 1 && self.acked[later] > link.switch;
            if !open && !told {
                continue;
            }
            for earlier in (1..TIMELINES).filter(|t| self.acked[*t] > 0) {
                if self.term_of_timeline(earlier) >= self.term_of_timeline(later) {
                    continue;
                }
                let kept = self.switch_from(later as u8, earlier as u8);
                // What was acknowledged before its own fork point is told again by its ancestors.
                let own = self.acked[earlier] > self.store.timelines[earlier].switch;
                if own && kept < Some(self.acked[earlier]) {
                    return Some(LOST);
                }
            }
        }
        None
    }

    /// S9, for the holder of the record while it is read-write under its term.
    fn weak(&self) -> Option<u8> {
        let leader = &self.store.leader;
        let p = usize::from(leader.holder);
        let m = &self.members[p];
        let leads = m.pg == Pg::Primary && matches!(leader.office, Office::Held | Office::Winner);
        if !leads || self.term_of(p) != leader.term {
            return None;
        }
        let claim = &self.store.claim;
        let counts = |s: usize, inc: u8| {
            s != p && (claim.members.names(s, inc) || (usize::from(claim.primary), claim.inc) == (s, inc))
        };
        if !m.flag && claim.k > 0 {
            return Some(WEAK);
        }
        // What walsenders that come from now on will go by.
        let file = match m.rule {
            Rule::Nobody | Rule::Unknown => true,
            Rule::Cleared => claim.k == 0,
            Rule::Any { k, members } => {
                let strangers = members.all().filter(|(s, inc)| !counts(*s, *inc)).count() as u8;
                k.saturating_sub(strangers) >= claim.k
            }
        };
        let voting = || (0..MEMBERS).filter(|s| self.votes(p, *s));
        let strangers = voting().filter(|s| !counts(*s, m.walsenders[*s].inc)).count() as u8;
        let copies = voting().all(|s| match m.walsenders[s].rule {
            Rule::Any { k, .. } => k.saturating_sub(strangers) >= claim.k,
            _ => true,
        });
        (!file || !copies).then_some(WEAK)
    }

    /// S8: who is read-write has a guardian that counts its term's deadlines, and nobody shares its timeline.
    fn unguarded(&self) -> Option<u8> {
        for (i, m) in self.members.iter().enumerate().filter(|(_, m)| m.pg == Pg::Primary) {
            if m.armed != self.term_of(i) || m.clock == Clock::None {
                return Some(UNGUARDED);
            }
            let shares = |o: &Member| o.pg == Pg::Primary && o.timeline == m.timeline;
            if self.members.iter().filter(|o| shares(o)).count() > 1 {
                return Some(TIMELINE_TWICE);
            }
        }
        None
    }
}
