//! The abstract PostgreSQL. What it has to know, because every one of these was once the difference between acknowledged and
//! lost: a reload reaches the startup process, the checkpointer and each walsender at different times; walsenders are counted
//! by the name that they show; the flag that makes backends wait is apart from the setting; a promotion takes the first
//! number without a history file; killed is killed whole; and what was stopped goes on where it was before it looks at a clock.

use crate::world::*;

impl World {
    // === Replication ===

    /// Can `s` stream from the primary that its startup process knows?
    pub fn can_connect(&self, s: usize) -> bool {
        let m = &self.members[s];
        let p = usize::from(m.acts_by.member);
        let up = &self.members[p];
        let known = m.timeline == up.timeline
            || self.switch_from(up.timeline, m.timeline).is_some_and(|left| m.flushed <= left);
        m.moves()
            && m.pg == Pg::Standby
            && !m.receiving
            && m.acts_by.term > 0
            && p != s
            && !m.apart
            && up.serves()
            && !up.apart
            && known
    }

    pub fn connect(&mut self, s: usize) {
        let upstream = self.members[s].acts_by;
        let p = usize::from(upstream.member);
        let number = self.members[p].timeline;
        let histories = self.members[p].histories | 1 << number;
        // A new walsender reads the file as it is now. The slot admits one, so an old one of the same name has ended.
        let rule = self.members[p].rule;
        self.members[p].walsenders[s] =
            Walsender { on: true, inc: upstream.inc, term: upstream.term, flushed: 0, fresh: false, rule };
        let m = &mut self.members[s];
        m.receiving = true;
        m.histories |= histories;
    }

    /// Is the walsender of `s` at `p` still connected to somebody?
    pub fn alive(&self, p: usize, s: usize) -> bool {
        let (row, m) = (&self.members[p].walsenders[s], &self.members[s]);
        m.pg == Pg::Standby
            && m.receiving
            && usize::from(m.acts_by.member) == p
            && (m.acts_by.term, m.acts_by.inc) == (row.term, row.inc)
            && m.moves()
            && !m.apart
            && !self.members[p].apart
    }

    pub fn can_stream(&self, s: usize) -> bool {
        let m = &self.members[s];
        if !(m.receiving && m.acts_by.term > 0) {
            return false;
        }
        let p = usize::from(m.acts_by.member);
        let up = &self.members[p];
        let row = &up.walsenders[s];
        if !(up.serves() && row.on && self.alive(p, s)) {
            return false;
        }
        let news = (m.timeline, m.flushed) != (up.timeline, up.flushed);
        let barrier = matches!(up.work, Work::Enforce { phase: Phase::Barrier, .. });
        news || !m.mute && (row.flushed != m.flushed || barrier && !row.fresh)
    }

    /// WAL arrives and is flushed, and the answer goes back.
    pub fn stream(&mut self, s: usize) {
        let p = usize::from(self.members[s].acts_by.member);
        let (timeline, flushed) = (self.members[p].timeline, self.members[p].flushed);
        let barrier = matches!(self.members[p].work, Work::Enforce { phase: Phase::Barrier, .. });
        let m = &mut self.members[s];
        (m.timeline, m.flushed) = (timeline, flushed);
        if !m.mute {
            let row = &mut self.members[p].walsenders[s];
            row.flushed = flushed;
            row.fresh = barrier;
        }
    }

    // === The rule ===

    /// The setting in the file, and the signal to read it.
    pub fn write_rule(&mut self, p: usize, rule: Rule) {
        let m = &mut self.members[p];
        m.rule = rule;
        m.checkpointer_lags = m.flag != (rule != Rule::Cleared);
    }

    /// Does this walsender give its standby a vote, by its own copy of the rule?
    pub fn votes(&self, p: usize, s: usize) -> bool {
        let row = &self.members[p].walsenders[s];
        row.on && row.term == self.term_of(p) && row.rule.names(s, row.inc)
    }

    /// Up to where commits are released at `p`; `fresh`: by reports of what was written since the barrier began.
    pub fn released(&self, p: usize, fresh: bool) -> Option<u8> {
        let m = &self.members[p];
        if !m.flag {
            return Some(m.flushed);
        }
        let mut reported: Vec<u8> = Vec::new();
        for s in (0..MEMBERS).filter(|s| self.votes(p, *s)) {
            if !fresh || m.walsenders[s].fresh {
                reported.push(m.walsenders[s].flushed);
            }
        }
        reported.sort_unstable_by(|x, y| y.cmp(x));
        // Whoever has a vote looks whether, by its own k, enough have reported.
        let releasing = (0..MEMBERS).filter(|s| self.votes(p, *s)).filter_map(|s| match m.walsenders[s].rule {
            Rule::Any { k, .. } if k > 0 => reported.get(usize::from(k) - 1).copied(),
            _ => None,
        });
        releasing.max()
    }

    /// Clients hear of what is released, at once.
    pub fn acknowledge(&mut self) {
        for p in 0..MEMBERS {
            if self.members[p].serves()
                && let Some(at) = self.released(p, false)
            {
                let known = &mut self.acked[usize::from(self.members[p].timeline)];
                *known = at.max(*known);
            }
        }
    }

    // === Life and death ===

    /// The whole control group at once: nothing is left that could acknowledge.
    pub fn die(&mut self, i: usize) {
        let m = &mut self.members[i];
        m.pg = Pg::Down;
        (m.conninfo, m.acts_by, m.receiving) = Default::default();
        (m.rule, m.flag, m.checkpointer_lags) = Default::default();
        m.walsenders = Default::default();
        m.armed = 0;
        if m.lease == Lease::None {
            (m.clock, m.lease_term) = (Clock::None, 0);
        }
        for s in 0..MEMBERS {
            let other = &mut self.members[s];
            if other.receiving && usize::from(other.acts_by.member) == i {
                other.receiving = false;
            }
        }
    }

    /// Parked: with `standby.signal`, the rule that names nobody, and so with the flag.
    pub fn start_parked(&mut self, i: usize) {
        let m = &mut self.members[i];
        if m.pg == Pg::Down {
            (m.pg, m.rule, m.flag, m.armed) = (Pg::Standby, Rule::Nobody, true, 0);
            // What was planted and not used is removed.
            m.histories = 0;
        }
    }

    /// `pg_promote`: the first number that no history file speaks of.
    pub fn promoted_number(&self, i: usize) -> u8 {
        let m = &self.members[i];
        let mut number = m.timeline + 1;
        while number < 7 && m.histories >> number & 1 == 1 {
            number += 1;
        }
        number
    }

    /// What makes no difference to anybody when it comes late happens at once: a startup process without a receiver and
    /// without a way to get one back, a checkpointer that stops waiting (acknowledging early is the worse case).
    pub fn quiet_processes(&mut self) {
        for s in 0..MEMBERS {
            let m = &self.members[s];
            if m.pg == Pg::Standby && m.acts_by != m.conninfo && m.moves() && !m.receiving && !self.can_connect(s) {
                self.startup_takes(s);
            }
            let m = &mut self.members[s];
            if m.checkpointer_lags && m.rule == Rule::Cleared && m.moves() {
                (m.flag, m.checkpointer_lags) = (false, false);
            }
        }
    }

    /// Where the startup process learns whom to follow: an old receiver ends with it.
    pub fn startup_takes(&mut self, s: usize) {
        let m = &mut self.members[s];
        (m.acts_by, m.receiving) = (m.conninfo, false);
    }
}
