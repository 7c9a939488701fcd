//! Every action that can come next, and what it does. Faults are counted; whatever is only late needs no fault, because any
//! action may come later than any other.

use stateright::{Model, Property};

use crate::agent::{Outcome, outcome};
use crate::properties as broken;
use crate::view::{Seen, timings};
use crate::world::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    // --- agents ---
    Round(u8),
    Commit(u8),
    Rest(u8),
    Renew(u8),
    Publish(u8),
    Job(u8),
    JobFails(u8),
    Land,
    // --- PostgreSQL ---
    Write(u8),
    Connect(u8),
    Stream(u8),
    RowEnds(u8, u8),
    StartupTakes(u8),
    CheckpointerTakes(u8),
    WalsenderTakes(u8, u8),
    // --- time ---
    PastF(u8),
    PastD(u8),
    GuardianKills(u8),
    Silent(u8),
    Suspects(u8),
    Waited(u8),
    Stalled(u8, u8),
    Forgets(u8),
    Patience(u8),
    Overdue(u8),
    // --- faults ---
    CommitLost(u8),
    CommitLate(u8),
    RenewLost(u8),
    Crash(u8),
    AgentCrash(u8),
    HostCrash(u8),
    Pause(u8),
    Cut(u8),
    Apart(u8),
    Mute(u8),
    Misjudged(u8),
    // --- their ends ---
    AgentBack(u8),
    HostBack(u8),
    Resume(u8),
    Heal(u8),
}

/// How far is explored.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub faults: u8,
    pub writes: u8,
    pub terms: u8,
    /// Kinds of faults, as bits in the order of `FAULTS`.
    pub kinds: u16,
    /// Members that diverged are rewound so many times in all; then they stay away.
    pub rewinds: u8,
    /// Seals of earlier terms are kept, for cores that would count them.
    pub old_seals: bool,
}

pub const FAULTS: [&str; 11] =
    ["lost-reply", "late", "lost-renewal", "crash", "agent", "host", "pause", "cut", "apart", "mute", "suspicion"];

/// Weaknesses of the adapters, put in on purpose: the core cannot be blamed for them, the model has to find them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flaw {
    #[default]
    None,
    /// The position is read while the startup process still acts by the old settings.
    SealWithoutStartup,
    /// The barrier begins before every walsender has the rule.
    BarrierBeforeRows,
    /// The rule is written and believed.
    NoBarrier,
    /// A promoted server begins with an empty rule.
    PromoteCleared,
    /// PostgreSQL is not killed when its agent says so. In sync mode the seals alone have to be enough: not a violation.
    NoKill,
    /// Released waits count as success.
    CancelAcknowledges,
    /// From no rule to some without seeing a commit wait.
    PastNobody,
    /// The guardian is not armed.
    Unarmed,
}

pub const FLAWS: [(&str, Flaw); 8] = [
    ("seal-without-startup", Flaw::SealWithoutStartup),
    ("barrier-before-rows", Flaw::BarrierBeforeRows),
    ("no-barrier", Flaw::NoBarrier),
    ("promote-cleared", Flaw::PromoteCleared),
    ("past-nobody", Flaw::PastNobody),
    ("cancel-acknowledges", Flaw::CancelAcknowledges),
    ("unarmed", Flaw::Unarmed),
    ("no-kill", Flaw::NoKill),
];

pub struct Cluster {
    pub bounds: Bounds,
    pub flaw: Flaw,
    /// Does the wait of a candidate outlast the lease whatever the clocks' rates? From the core's own numbers.
    pub waits_out: bool,
    /// Is the kill over before the deadline?
    pub kills_in_time: bool,
}

impl Cluster {
    pub fn new(bounds: Bounds, flaw: Flaw) -> Cluster {
        let t = timings();
        let sent = crate::core::Moment::at(1_000_000_000_000);
        let lasts = t.deadline(sent).raw - sent.raw;
        // Slowest holder, fastest candidate: one per cent each.
        let waits_out = t.candidate_wait(t.ttl).as_nanos() * 990 >= u128::from(lasts) * 1010;
        let kills_in_time = t.kill_at(sent).plus(t.kill_budget).raw <= t.deadline(sent).raw;
        Cluster { bounds, flaw, waits_out, kills_in_time }
    }
}

// === Store ===

impl World {
    /// Whatever compared one of `keys` has lost its race; a plan ends at the step that fails.
    fn changed(&mut self, keys: u8) {
        for m in &mut self.members {
            if m.txn.guards & keys != 0 {
                (m.work, m.txn) = (Work::None, Txn::default());
            }
        }
        if self.late.guards & keys != 0 {
            self.late = Txn::default();
        }
        if keys & (LEADER | LEASE) != 0 {
            for m in &mut self.members {
                (m.memory.silent, m.memory.suspects) = (false, false);
            }
        }
        if keys & LEADER != 0 {
            for m in &mut self.members {
                m.memory.waited = false;
                if m.kept == Kept::Present {
                    m.kept = Kept::Stale;
                }
            }
        }
    }

    /// Its comparisons hold. `None`: outside the bounds, or the reserved number is taken.
    fn apply(&mut self, txn: &Txn) -> Option<()> {
        // Way B waits for no clock; it compares the claim that makes clocks needless.
        let by_clock = txn.guards & SYNC == 0;
        if txn.writes & TIMELINE != 0 {
            let place = self.store.timelines.get_mut(usize::from(txn.number))?;
            if place.term > 0 {
                if txn.guards & TIMELINE != 0 {
                    return None;
                }
                self.broken = broken::TIMELINE_TWICE;
            }
            *place = txn.timeline;
        }
        let mut keys = 0;
        if txn.writes & LEADER != 0 {
            self.succeeds(&txn.leader, by_clock);
            self.store.leader = txn.leader;
            keys |= LEADER;
        }
        if txn.writes & SYNC != 0 {
            self.store.claim = txn.claim;
            keys |= SYNC;
        }
        if txn.writes & SEAL != 0 {
            self.store.seals[usize::from(txn.sender)] = txn.seal;
            keys |= SEAL << txn.sender;
        }
        self.changed(keys);
        Some(())
    }

    fn succeeds(&mut self, next: &Leader, by_clock: bool) {
        let now = self.store.leader;
        if next.term < now.term || next.term == now.term && now.office == Office::Released {
            self.broken = broken::TERM_BACK;
        }
        let holder = &self.members[usize::from(now.holder)];
        let runs = matches!(holder.clock, Clock::Fresh | Clock::PastF) && holder.lease_term == now.term;
        let taken = next.holder != now.holder && next.office == Office::Electing;
        if by_clock && taken && now.office != Office::Released && runs {
            self.broken = broken::OVERTAKEN;
        }
    }

    /// A transaction whose comparisons hold gets its answer, or does not.
    fn commit(&mut self, i: usize, answered: bool) -> Option<()> {
        let txn = self.members[i].txn;
        let Work::Commit { kill, drop } = self.members[i].work else { return None };
        self.members[i].txn = Txn::default();
        self.members[i].work = Work::None;
        self.apply(&txn)?;
        self.answered(i, &txn, answered, kill, drop);
        Some(())
    }

    fn answered(&mut self, i: usize, txn: &Txn, answered: bool, kill: bool, drop: bool) {
        let m = &mut self.members[i];
        let sync = txn.writes & SYNC != 0;
        let mine = txn.leader.holder == i as u8 && txn.leader.inc == m.inc && txn.leader.office != Office::Released;
        if answered {
            if sync {
                (m.memory.doubtful, m.memory.settled) = (false, true);
            }
            if txn.writes & LEADER != 0 && mine {
                m.keep(txn.leader.term, true);
            }
        } else {
            m.memory.doubtful |= sync;
        }
        // An unknown outcome ends the plan, but for a write of `sync`, which is remembered as doubtful.
        if (answered || sync) && (kill || drop) {
            self.members[i].work = Work::Rest { kill, drop };
        }
    }
}

impl Member {
    fn keep(&mut self, term: u8, present: bool) {
        self.kept = if present { Kept::Present } else { Kept::Stale };
        if self.lease == Lease::None || self.lease_term != term {
            self.lease = Lease::Claimed;
            self.lease_term = term;
            if self.armed == 0 {
                self.clock = Clock::None;
            }
        }
    }

    fn drop_lease(&mut self) {
        (self.lease, self.kept) = (Lease::None, Kept::Nothing);
        // The guardian counts on.
        if self.armed == 0 {
            (self.clock, self.lease_term) = (Clock::None, 0);
        }
    }

    /// Only what is on disk is known.
    fn forget(&mut self) {
        self.memory = Packed::default();
        self.drop_lease();
        (self.work, self.txn) = (Work::None, Txn::default());
    }
}

// === Agents ===

impl Cluster {
    fn outcome(&self, world: &World, i: usize) -> Outcome {
        outcome(&Seen::by(world, i), self.bounds.terms)
    }

    fn round(&self, w: &mut World, i: usize) -> Option<()> {
        let out = self.outcome(w, i);
        let before = w.members[i];
        let job = !matches!(before.work, Work::None);
        let now = out.at_once;
        if out.broken != 0 {
            w.broken = out.broken;
        }
        w.members[i].memory = out.memory;
        if before.must_follow && before.pg == Pg::Standby && !job {
            w.members[i].must_follow = false;
        }
        if let Some((term, sync)) = now.remember {
            (w.members[i].highest_term, w.members[i].sync_term) = (term, sync);
        }
        if let Some((term, present)) = now.keep {
            w.members[i].keep(term, present);
        }
        if now.kill {
            self.kill(w, i);
        }
        if now.drop_lease {
            w.members[i].drop_lease();
        }
        if job && !now.kill {
            // A job runs: nothing else is begun.
            return (w.members[i] != before || w.broken != 0).then_some(());
        }
        let rewinds: u8 = w.members.iter().map(|m| m.inc).sum();
        let m = &mut w.members[i];
        (m.work, m.txn) = (out.work, out.txn);
        if now.arm > 0 {
            m.armed = now.arm;
        }
        if now.new_incarnation {
            if m.inc + 1 == LIVES || rewinds == self.bounds.rewinds {
                return None;
            }
            m.inc += 1;
        }
        if now.start {
            w.start_parked(i);
        }
        if let Some(upstream) = now.follow {
            w.follow(i, upstream);
        }
        if now.begin {
            self.begin(w, i);
        }
        (w.members[i] != before || w.broken != 0).then_some(())
    }

    /// Rounds that only observe, remember or turn to a leader happen as soon as they can. A member that has not come to
    /// one yet is told apart by what follows: the renewal, the startup process, the connection.
    fn quiet_rounds(&self, before: &World, w: &mut World) {
        for i in 0..MEMBERS {
            let m = &w.members[i];
            let idle = m.thinks() && !matches!(m.work, Work::Commit { .. } | Work::Rest { .. });
            // Who sees what it saw before has done its quiet round.
            let news = || !before.members[i].thinks() || Seen::by(w, i) != Seen::by(before, i);
            if w.broken == 0 && idle && news() && self.outcome(w, i).is_quiet() {
                let _ = self.round(w, i);
            }
        }
    }

    /// What no later step can ask for is the same whatever it was.
    fn forget(&self, w: &mut World) {
        for m in &mut w.members {
            m.histories &= !((2u8 << m.timeline) - 1);
        }
        for n in 2..TIMELINES {
            if w.acked[n] <= w.store.timelines[n].switch {
                w.acked[n] = 0;
            }
        }
        if !self.bounds.old_seals {
            for seal in &mut w.store.seals {
                if seal.term < w.store.leader.term {
                    *seal = Seal::default();
                }
            }
        }
    }

    fn kill(&self, w: &mut World, i: usize) {
        let m = &w.members[i];
        let leader = &w.store.leader;
        let leads = leader.office == Office::Held && usize::from(leader.holder) == i && m.pg == Pg::Primary;
        if leads && leader.inc == m.inc && leader.term == w.term_of(i) && m.clock == Clock::Fresh && !m.cut {
            w.broken = broken::KILLED;
        }
        w.members[i].memory.enforced = Rule::Unknown;
        if self.flaw == Flaw::NoKill && w.members[i].pg == Pg::Primary {
            return;
        }
        w.die(i);
    }

    /// What a job does before anything else can happen.
    fn begin(&self, w: &mut World, i: usize) {
        match w.members[i].work {
            Work::Seal { term } => {
                let m = &mut w.members[i];
                if m.sealed_term > term {
                    (m.work, m.txn) = (Work::None, Txn::default());
                    return;
                }
                m.sealed_term = term;
                m.highest_term = m.highest_term.max(term);
                w.follow(i, Upstream::default());
            }
            Work::Promote { term, .. } => {
                let m = &mut w.members[i];
                let held = m.lease == Lease::Held && m.lease_term == term && m.clock == Clock::Fresh;
                if held {
                    m.armed = if self.flaw == Flaw::Unarmed { 0 } else { term };
                } else {
                    self.job_fails(w, i);
                }
            }
            Work::Rewind { .. } => w.die(i),
            _ => {}
        }
    }

    /// What a job does when what it waits for is there. `None`: it is not.
    fn job(&self, w: &mut World, i: usize) -> Option<()> {
        let m = w.members[i];
        match m.work {
            Work::Seal { term } => {
                let taken = m.acts_by == m.conninfo && !m.receiving || self.flaw == Flaw::SealWithoutStartup;
                if m.pg != Pg::Standby || !taken {
                    return None;
                }
                let m = &mut w.members[i];
                m.txn.seal = Seal { term, inc: m.inc, timeline: m.timeline, at: m.flushed };
                m.work = Work::Commit { kill: false, drop: false };
            }
            Work::Promote { term, number, parent, switch } => {
                if m.pg != Pg::Standby {
                    return None;
                }
                if m.must_follow || m.sealed_term != term {
                    w.broken = broken::UNGUARDED;
                }
                for between in m.timeline + 1..number {
                    w.members[i].histories |= 1 << between;
                }
                let became = (w.promoted_number(i), m.timeline, m.flushed);
                if became != (number, parent, switch) {
                    w.die(i);
                    self.job_fails(w, i);
                    return Some(());
                }
                let cleared = self.flaw == Flaw::PromoteCleared;
                let m = &mut w.members[i];
                (m.pg, m.timeline) = (Pg::Primary, number);
                m.histories |= 1 << number;
                (m.conninfo, m.acts_by, m.receiving) = Default::default();
                (m.rule, m.flag) = (Rule::Nobody, !cleared);
                m.walsenders = Default::default();
                m.memory.promoted = Since::Young;
                m.memory.enforced = Rule::Nobody;
                m.work = Work::None;
            }
            Work::Enforce { phase, through_nobody, to } => {
                if m.pg != Pg::Primary {
                    return None;
                }
                self.enforce(w, i, phase, through_nobody, to)?;
            }
            Work::Rewind { from } => {
                let source = w.members[usize::from(from)];
                if !source.serves() || source.apart || m.apart {
                    return None;
                }
                let m = &mut w.members[i];
                (m.timeline, m.flushed, m.must_follow) = (source.timeline, source.flushed, true);
                m.histories = source.histories | 1 << source.timeline;
                m.work = Work::None;
            }
            Work::StartFollowing { upstream } => {
                let up = w.members[usize::from(upstream.member)];
                if !up.serves() || up.apart || m.apart || up.timeline != m.timeline {
                    return None;
                }
                w.start_parked(i);
                w.follow(i, upstream);
                let m = &mut w.members[i];
                m.flushed = m.flushed.max(up.flushed);
                m.work = Work::None;
            }
            Work::None | Work::Commit { .. } | Work::Rest { .. } => return None,
        }
        Some(())
    }

    /// `postgres/enforce.rs`, one wait after another.
    fn enforce(&self, w: &mut World, p: usize, phase: Phase, through_nobody: bool, to: Rule) -> Option<()> {
        let early = self.flaw == Flaw::BarrierBeforeRows;
        let voting: Vec<usize> = (0..MEMBERS).filter(|s| w.votes(p, *s)).collect();
        let next = match (phase, to) {
            (Phase::Decided, _) if through_nobody && self.flaw != Flaw::PastNobody => {
                w.write_rule(p, Rule::Nobody);
                Some(Phase::Nobody)
            }
            (Phase::Decided, _) => {
                w.write_rule(p, to);
                matches!(to, Rule::Any { .. }).then_some(Phase::Written)
            }
            (Phase::Nobody, _) => {
                // A commit of ours is seen waiting, and nobody has a vote any more.
                if !w.members[p].flag || !voting.is_empty() && !early {
                    return None;
                }
                w.write_rule(p, to);
                matches!(to, Rule::Any { .. }).then_some(Phase::Written)
            }
            (Phase::Written, Rule::Any { .. }) => {
                let row = |s: usize| w.members[p].walsenders[s].inc;
                if !early && voting.iter().any(|s| !to.names(*s, row(*s))) {
                    return None;
                }
                for row in &mut w.members[p].walsenders {
                    row.fresh = false;
                }
                (self.flaw != Flaw::NoBarrier).then_some(Phase::Barrier)
            }
            (Phase::Written, _) => None,
            (Phase::Barrier, _) => {
                w.released(p, true)?;
                None
            }
        };
        let m = &mut w.members[p];
        match next {
            Some(phase) => m.work = Work::Enforce { phase, through_nobody, to },
            None => {
                m.work = Work::None;
                m.memory.enforced = to;
                for row in &mut m.walsenders {
                    row.fresh = false;
                }
            }
        }
        Some(())
    }

    fn job_fails(&self, w: &mut World, i: usize) {
        match w.members[i].work {
            Work::Promote { .. } => {
                w.die(i);
                w.members[i].memory.promotion_failed = true;
            }
            Work::Enforce { .. } => w.members[i].memory.enforced = Rule::Unknown,
            Work::Rewind { .. } => w.members[i].memory.rejoin_failed = true,
            _ => {}
        }
        let m = &mut w.members[i];
        (m.work, m.txn) = (Work::None, Txn::default());
        for row in &mut m.walsenders {
            row.fresh = false;
        }
    }

    /// May the job give up (its deadline passes, or PostgreSQL has gone from under it)?
    fn may_fail(&self, w: &World, i: usize) -> bool {
        let m = &w.members[i];
        match m.work {
            Work::Seal { .. } => m.pg != Pg::Standby,
            Work::Promote { .. } => m.pg != Pg::Standby,
            Work::Enforce { .. } => {
                m.pg != Pg::Primary || (0..MEMBERS).any(|s| s != i && !(m.walsenders[s].on && w.alive(i, s)))
            }
            Work::Rewind { from } | Work::StartFollowing { upstream: Upstream { member: from, .. } } => {
                let source = &w.members[usize::from(from)];
                !source.serves() || source.apart || m.apart || source.timeline != m.timeline
            }
            Work::None | Work::Commit { .. } | Work::Rest { .. } => false,
        }
    }
}

impl World {
    fn follow(&mut self, i: usize, upstream: Upstream) {
        let m = &mut self.members[i];
        if m.pg != Pg::Standby {
            return;
        }
        m.conninfo = upstream;
        // Who follows nobody has nothing to lag with.
        if m.acts_by.term == 0 && !m.receiving {
            m.acts_by = upstream;
        }
    }

    fn renew(&mut self, i: usize, answered: bool) {
        match self.members[i].kept {
            Kept::Present => {
                self.changed(LEASE);
                if answered {
                    let m = &mut self.members[i];
                    (m.lease, m.clock) = (Lease::Held, Clock::Fresh);
                }
            }
            Kept::Stale => self.members[i].lease = Lease::Lost,
            Kept::Nothing => {}
        }
    }
}

// === What can come next ===

impl Model for Cluster {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::healthy()]
    }

    fn actions(&self, w: &World, actions: &mut Vec<Action>) {
        if w.broken != 0 {
            return;
        }
        for i in 0..MEMBERS {
            self.of_agent(w, i, actions);
            self.of_postgresql(w, i, actions);
            self.of_time(w, i, actions);
            self.of_faults(w, i, actions);
        }
        if w.late.writes != 0 {
            actions.push(Action::Land);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut w = *world;
        self.act(&mut w, action)?;
        w.acknowledge();
        w.check();
        w.quiet_processes();
        self.quiet_rounds(world, &mut w);
        w.quiet_processes();
        w.acknowledge();
        w.check();
        self.forget(&mut w);
        (w != *world).then_some(w)
    }

    fn properties(&self) -> Vec<Property<Cluster>> {
        vec![
            Property::always(broken::text(broken::LOST), |_, w: &World| w.broken != broken::LOST),
            Property::always(broken::text(broken::WEAK), |_, w: &World| w.broken != broken::WEAK),
            Property::always(broken::text(broken::TIMELINE_TWICE), |_, w: &World| w.broken != broken::TIMELINE_TWICE),
            Property::always(broken::text(broken::UNGUARDED), |_, w: &World| w.broken != broken::UNGUARDED),
            Property::always(broken::text(broken::OVERTAKEN), |_, w: &World| w.broken != broken::OVERTAKEN),
            Property::always(broken::text(broken::KILLED), |_, w: &World| w.broken != broken::KILLED),
            Property::always(broken::text(broken::LINT), |_, w: &World| w.broken != broken::LINT),
            Property::always(broken::text(broken::TERM_BACK), |_, w: &World| w.broken != broken::TERM_BACK),
            Property::sometimes("a change of leader", |_, w: &World| changes(w) >= 1),
            Property::sometimes("two changes of leader", |_, w: &World| changes(w) >= 2),
            Property::sometimes("a degrade to no standby", |_, w: &World| w.store.claim.k == 0),
            Property::sometimes("a standby taken out", |_, w: &World| {
                w.store.claim.k == 1 && w.store.claim.members.len() == 1
            }),
            Property::sometimes("a rewind", |_, w: &World| w.members.iter().any(|m| m.inc > 0 && m.pg == Pg::Standby)),
            Property::sometimes("a restart in place", |_, w: &World| {
                let l = w.store.leader;
                l.office == Office::Held && l.term > 1 && w.term_of(usize::from(l.holder)) == l.term && l.holder == 0
            }),
            Property::sometimes("a stopped primary acknowledges after its deadline", |_, w: &World| {
                w.members.iter().any(|m| m.serves() && m.clock == Clock::PastD)
            }),
            Property::sometimes("a reserved timeline is not the next number", |_, w: &World| {
                (1..TIMELINES).any(|n| w.store.timelines[n].term > 0 && w.store.timelines[n].parent + 1 < n as u8)
            }),
            Property::sometimes("a leader that lives is overtaken on suspicion", |_, w: &World| {
                let living = |m: &Member| m.serves() && m.clock == Clock::Fresh;
                w.members.iter().enumerate().any(|(i, m)| living(m) && w.store.leader.term > w.term_of(i))
            }),
            Property::sometimes("a doubtful claim", |_, w: &World| w.members.iter().any(|m| m.memory.doubtful)),
            Property::sometimes("whole again after a change", |_, w: &World| {
                changes(w) >= 1
                    && w.store.claim.members.len() == 2
                    && w.members.iter().filter(|m| m.receiving).count() == 2
            }),
        ]
    }

    fn format_action(&self, action: &Action) -> String {
        format!("{action:?}")
    }
}

/// Published leaders after the first.
fn changes(w: &World) -> usize {
    let mut at = w.store.leader.last;
    let mut count = 0;
    while at > 1 {
        count += 1;
        at = w.store.timelines[usize::from(at)].parent;
    }
    count
}

impl Cluster {
    fn of_agent(&self, w: &World, i: usize, actions: &mut Vec<Action>) {
        let m = &w.members[i];
        let n = i as u8;
        if !m.thinks() {
            return;
        }
        match m.work {
            Work::Commit { .. } => {
                actions.push(Action::Commit(n));
                if self.fault(w, 0) && !m.cut {
                    actions.push(Action::CommitLost(n));
                }
                if self.fault(w, 1) && !m.cut && w.late.writes == 0 {
                    actions.push(Action::CommitLate(n));
                }
            }
            Work::Rest { .. } => actions.push(Action::Rest(n)),
            Work::None => actions.push(Action::Round(n)),
            _ => {
                actions.push(Action::Round(n));
                actions.push(Action::Job(n));
                if self.may_fail(w, i) {
                    actions.push(Action::JobFails(n));
                }
            }
        }
        if !m.cut {
            if m.kept != Kept::Nothing {
                actions.push(Action::Renew(n));
                if self.fault(w, 2) && m.kept == Kept::Present {
                    actions.push(Action::RenewLost(n));
                }
            }
            if w.store.published[i] != m.inc {
                actions.push(Action::Publish(n));
            }
        }
    }

    fn of_postgresql(&self, w: &World, i: usize, actions: &mut Vec<Action>) {
        let m = &w.members[i];
        let n = i as u8;
        if !m.moves() {
            return;
        }
        match m.pg {
            Pg::Down => {}
            Pg::Standby => {
                if m.acts_by != m.conninfo {
                    actions.push(Action::StartupTakes(n));
                }
                if w.can_connect(i) {
                    actions.push(Action::Connect(n));
                }
                if w.can_stream(i) {
                    actions.push(Action::Stream(n));
                }
            }
            Pg::Primary => {
                if w.writes < self.bounds.writes {
                    actions.push(Action::Write(n));
                }
                if m.checkpointer_lags {
                    actions.push(Action::CheckpointerTakes(n));
                }
                for s in (0..MEMBERS).filter(|s| m.walsenders[*s].on) {
                    if m.walsenders[s].rule != m.rule {
                        actions.push(Action::WalsenderTakes(n, s as u8));
                    }
                    // Whether it ends is seen by the leader's agent alone; as long as it stands it may still count.
                    if !w.alive(i, s) && usize::from(w.store.leader.holder) == i {
                        actions.push(Action::RowEnds(n, s as u8));
                    }
                }
            }
        }
    }

    fn of_time(&self, w: &World, i: usize, actions: &mut Vec<Action>) {
        let m = &w.members[i];
        let n = i as u8;
        let leader = &w.store.leader;
        let late = m.may_be_late() || m.kept != Kept::Present;
        let kill_due = m.armed > 0 && m.clock >= Clock::PastF && m.pg != Pg::Down && m.moves();
        if kill_due {
            actions.push(Action::GuardianKills(n));
        }
        match m.clock {
            Clock::Fresh if late => actions.push(Action::PastF(n)),
            // K is the time for the kill: it is over before D, but for who was stopped with everything else.
            Clock::PastF if late && !(kill_due && self.kills_in_time) => actions.push(Action::PastD(n)),
            _ => {}
        }
        if !m.thinks() || m.cut {
            return;
        }
        let holder = &w.members[usize::from(leader.holder)];
        let waits = matches!(leader.office, Office::Held | Office::Electing | Office::Winner);
        let ran_out = matches!(holder.clock, Clock::None | Clock::PastD) || holder.lease_term != leader.term;
        let over = holder.may_be_late() && (ran_out || !self.waits_out);
        if waits && over && !m.memory.silent && usize::from(leader.holder) != i && m.memory.term == leader.term {
            actions.push(Action::Silent(n));
        }
        let holds = usize::from(leader.holder) == i;
        if waits && !holds && !m.memory.silent && !m.memory.suspects && m.memory.term == leader.term {
            if w.hears_nothing(i, usize::from(leader.holder)) {
                actions.push(Action::Suspects(n));
            } else if self.fault(w, 10) {
                actions.push(Action::Misjudged(n));
            }
        }
        let bound = leader.asked != NOBODY && leader.asked != n || leader.asked == NOBODY && leader.holder == n;
        if leader.office == Office::Released && bound && !m.memory.waited && m.memory.term == leader.term {
            actions.push(Action::Waited(n));
        }
        if m.pg == Pg::Primary {
            for s in (0..MEMBERS).filter(|s| *s != i && m.memory.stalled >> s & 1 == 0) {
                let other = &w.members[s];
                let away = !other.moves() || other.apart || other.mute || other.pg == Pg::Down || m.apart;
                if away && !m.walsenders[s].on && w.store.claim.members.speaks_of(s) {
                    actions.push(Action::Stalled(n, s as u8));
                }
            }
        } else if m.memory.streamed != 0 && usize::from(leader.holder) == i {
            actions.push(Action::Forgets(n));
        }
        let faulty = (0..MEMBERS)
            .any(|s| s != i && (w.members[s].may_be_late() || w.members[s].apart || w.members[s].mute))
            || m.apart
            || m.mute;
        if leader.holder == n && leader.office == Office::Winner && m.memory.promoted == Since::Young && faulty {
            actions.push(Action::Patience(n));
        }
        if leader.holder == n && leader.office == Office::Electing && m.memory.election == Since::Young && faulty {
            actions.push(Action::Overdue(n));
        }
    }

    fn fault(&self, w: &World, kind: u8) -> bool {
        w.faults < self.bounds.faults && self.bounds.kinds >> kind & 1 == 1
    }

    fn of_faults(&self, w: &World, i: usize, actions: &mut Vec<Action>) {
        let m = &w.members[i];
        let n = i as u8;
        if m.host_down {
            actions.push(Action::HostBack(n));
            return;
        }
        if m.paused {
            actions.push(Action::Resume(n));
            return;
        }
        if m.agent_down {
            actions.push(Action::AgentBack(n));
        }
        if m.cut || m.apart || m.mute {
            actions.push(Action::Heal(n));
        }
        let faults = [
            (3, m.pg != Pg::Down, Action::Crash(n)),
            (4, !m.agent_down, Action::AgentCrash(n)),
            (5, true, Action::HostCrash(n)),
            (6, true, Action::Pause(n)),
            (7, !m.cut, Action::Cut(n)),
            (8, !m.apart, Action::Apart(n)),
            (9, !m.mute && !m.apart, Action::Mute(n)),
        ];
        for (kind, can, action) in faults {
            if can && self.fault(w, kind) {
                actions.push(action);
            }
        }
    }

    fn act(&self, w: &mut World, action: Action) -> Option<()> {
        let at = |n: u8| usize::from(n);
        match action {
            Action::Round(n) => self.round(w, at(n))?,
            Action::Commit(n) if w.members[at(n)].cut => {
                (w.members[at(n)].work, w.members[at(n)].txn) = (Work::None, Txn::default());
            }
            Action::Commit(n) => w.commit(at(n), true)?,
            Action::CommitLost(n) => {
                w.faults += 1;
                w.commit(at(n), false)?;
            }
            Action::CommitLate(n) => {
                w.faults += 1;
                let txn = w.members[at(n)].txn;
                let Work::Commit { kill, drop } = w.members[at(n)].work else { return None };
                (w.members[at(n)].work, w.members[at(n)].txn) = (Work::None, Txn::default());
                w.late = txn;
                w.answered(at(n), &txn, false, kill, drop);
            }
            Action::Land => {
                let txn = std::mem::take(&mut w.late);
                w.apply(&txn)?;
            }
            Action::Rest(n) => {
                let Work::Rest { kill, drop } = w.members[at(n)].work else { return None };
                w.members[at(n)].work = Work::None;
                if kill {
                    self.kill(w, at(n));
                }
                if drop {
                    w.members[at(n)].drop_lease();
                }
            }
            Action::Renew(n) => w.renew(at(n), true),
            Action::RenewLost(n) => {
                w.faults += 1;
                w.renew(at(n), false);
            }
            Action::Publish(n) => w.store.published[at(n)] = w.members[at(n)].inc,
            Action::Job(n) => self.job(w, at(n))?,
            Action::JobFails(n) => self.job_fails(w, at(n)),
            Action::Write(n) => {
                w.writes += 1;
                w.members[at(n)].flushed += 1;
                if self.flaw == Flaw::CancelAcknowledges {
                    let m = w.members[at(n)];
                    w.acked[at(m.timeline)] = m.flushed;
                }
            }
            Action::Connect(n) => {
                w.connect(at(n));
                w.stream(at(n));
            }
            Action::Stream(n) => w.stream(at(n)),
            Action::RowEnds(p, s) => {
                w.members[at(p)].walsenders[at(s)] = Walsender::default();
                // Its other end has nobody any more.
                if w.members[at(s)].acts_by.member == p {
                    w.members[at(s)].receiving = false;
                }
            }
            Action::StartupTakes(n) => w.startup_takes(at(n)),
            Action::CheckpointerTakes(n) => {
                let m = &mut w.members[at(n)];
                (m.flag, m.checkpointer_lags) = (m.rule != Rule::Cleared, false);
            }
            Action::WalsenderTakes(p, s) => {
                w.members[at(p)].walsenders[at(s)].rule = w.members[at(p)].rule;
            }
            Action::PastF(n) => {
                w.members[at(n)].clock = Clock::PastF;
                // Whoever is not stopped is killed by his guardian then, and nothing happens in between.
                if w.members[at(n)].moves() && w.members[at(n)].armed > 0 {
                    w.die(at(n));
                }
            }
            Action::PastD(n) => w.members[at(n)].clock = Clock::PastD,
            Action::GuardianKills(n) => w.die(at(n)),
            Action::Silent(n) => w.members[at(n)].memory.silent = true,
            Action::Suspects(n) => w.members[at(n)].memory.suspects = true,
            Action::Misjudged(n) => {
                w.faults += 1;
                w.members[at(n)].memory.suspects = true;
            }
            Action::Waited(n) => w.members[at(n)].memory.waited = true,
            Action::Stalled(n, s) => w.members[at(n)].memory.stalled |= 1 << s,
            Action::Forgets(n) => w.members[at(n)].memory.streamed = 0,
            Action::Patience(n) => w.members[at(n)].memory.promoted = Since::Old,
            Action::Overdue(n) => w.members[at(n)].memory.election = Since::Old,
            Action::Crash(n) => {
                w.faults += 1;
                w.die(at(n));
            }
            Action::AgentCrash(n) => {
                w.faults += 1;
                w.members[at(n)].agent_down = true;
                w.members[at(n)].forget();
            }
            Action::HostCrash(n) => {
                w.faults += 1;
                w.die(at(n));
                let m = &mut w.members[at(n)];
                m.host_down = true;
                m.forget();
                (m.armed, m.clock, m.lease_term) = (0, Clock::None, 0);
            }
            Action::Pause(n) => {
                w.faults += 1;
                w.members[at(n)].paused = true;
            }
            Action::Cut(n) => {
                w.faults += 1;
                w.members[at(n)].cut = true;
            }
            Action::Apart(n) => {
                w.faults += 1;
                w.members[at(n)].apart = true;
            }
            Action::Mute(n) => {
                w.faults += 1;
                w.members[at(n)].mute = true;
            }
            Action::AgentBack(n) => w.members[at(n)].agent_down = false,
            Action::HostBack(n) => w.members[at(n)].host_down = false,
            Action::Resume(n) => w.members[at(n)].paused = false,
            Action::Heal(n) => {
                let m = &mut w.members[at(n)];
                (m.cut, m.apart, m.mute) = (false, false, false);
            }
        }
        Some(())
    }
}
