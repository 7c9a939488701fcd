//! The whole cluster as a value of fixed size: small integers, no heap. LSNs count logged commits, time is a few flags.
//!
//! What is hidden here and in `postgres.rs` is the abstraction; what decides is `core`, the product's own source.

/// Members are a, b, c.
pub const MEMBERS: usize = 3;
/// Timelines 1..=5: four promotions.
pub const TIMELINES: usize = 6;
pub const NOBODY: u8 = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct World {
    pub store: Store,
    pub members: [Member; MEMBERS],
    /// A transaction whose sender gave up waiting, and which may still land.
    pub late: Txn,
    /// The highest position on each timeline that a client was told of.
    pub acked: [u8; TIMELINES],
    pub faults: u8,
    pub writes: u8,
    /// The property that the last step broke (`properties.rs`), 0: none.
    pub broken: u8,
}

// === The store ===

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Store {
    pub leader: Leader,
    pub claim: Claim,
    /// By number; 0 and 1 are not reserved.
    pub timelines: [Timeline; TIMELINES],
    pub seals: [Seal; MEMBERS],
    /// The incarnation that each member has published.
    pub published: [u8; MEMBERS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Office {
    #[default]
    Held,
    /// The holder collects seals.
    Electing,
    /// The winner holds the record.
    Winner,
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Leader {
    pub term: u8,
    pub holder: u8,
    pub inc: u8,
    pub office: Office,
    /// Preferred while seals are collected, `to` when released.
    pub asked: u8,
    /// The reserved timeline of the winner.
    pub wins: u8,
    /// The last published timeline.
    pub last: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Claim {
    pub primary: u8,
    pub inc: u8,
    pub k: u8,
    pub term: u8,
    pub members: Set,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Timeline {
    /// 0: not reserved.
    pub term: u8,
    pub parent: u8,
    pub switch: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Seal {
    pub term: u8,
    pub inc: u8,
    pub timeline: u8,
    pub at: u8,
}

/// Incarnations of members: three bits each, because a claim between two others may name two lives of one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Set(pub u16);

/// Lives of a member's data that are told apart.
pub const LIVES: u8 = 3;

impl Set {
    pub fn with(self, member: usize, inc: u8) -> Set {
        assert!(inc < LIVES, "beyond the bounds");
        Set(self.0 | 1 << (3 * member + usize::from(inc)))
    }

    pub fn names(self, member: usize, inc: u8) -> bool {
        self.0 >> (3 * member + usize::from(inc)) & 1 == 1
    }

    pub fn speaks_of(self, member: usize) -> bool {
        self.0 >> (3 * member) & 7 != 0
    }

    pub fn all(self) -> impl Iterator<Item = (usize, u8)> {
        (0..MEMBERS).flat_map(|m| (0..LIVES).map(move |inc| (m, inc))).filter(move |(m, inc)| self.names(*m, *inc))
    }

    pub fn len(self) -> u32 {
        self.0.count_ones()
    }
}

/// `synchronous_standby_names`; the names in it carry the term of the primary whose rule it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Rule {
    #[default]
    Unknown,
    Nobody,
    Cleared,
    Any {
        k: u8,
        members: Set,
    },
}

impl Rule {
    pub fn names(self, member: usize, inc: u8) -> bool {
        matches!(self, Rule::Any { members, .. } if members.names(member, inc))
    }
}

// === Transactions on their way ===

pub const LEADER: u8 = 1;
pub const LEASE: u8 = 2;
pub const SYNC: u8 = 4;
pub const TIMELINE: u8 = 8;
pub const SEAL: u8 = 16;

/// What a guarded write compares is kept as a flag: once a compared key has changed the transaction can do nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Txn {
    pub sender: u8,
    /// 0: none.
    pub writes: u8,
    /// What it compares: `LEADER` … as bits; seals by member from `SEAL` on.
    pub guards: u8,
    pub leader: Leader,
    pub claim: Claim,
    pub number: u8,
    pub timeline: Timeline,
    pub seal: Seal,
}

// === Members ===

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Pg {
    #[default]
    Down,
    Standby,
    Primary,
}

/// Whom a standby follows: `primary_conninfo` with the name that the walreceiver shows. Term 0: nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Upstream {
    pub term: u8,
    pub member: u8,
    pub inc: u8,
}

/// A row of pg_stat_replication, with what only the process itself knows: its own copy of the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Walsender {
    pub on: bool,
    pub inc: u8,
    pub term: u8,
    pub flushed: u8,
    /// Has reported WAL of the barrier that is under way.
    pub fresh: bool,
    pub rule: Rule,
}

/// How much of the lease is left by the holder's own clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub enum Clock {
    /// Nothing was ever renewed.
    #[default]
    None,
    Fresh,
    /// The guardian has to kill.
    PastF,
    PastD,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Lease {
    #[default]
    None,
    Claimed,
    Held,
    Lost,
}

/// The record that the keeper renews against: the present one, or one that was overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Kept {
    #[default]
    Nothing,
    Present,
    Stale,
}

/// A moment in memory, seen from a threshold: none, not long ago, long enough ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Since {
    #[default]
    Never,
    Young,
    Old,
}

/// What is left of a plan: at most one commit or job, and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Work {
    #[default]
    None,
    /// `then_kill`, `then_drop`: the steps behind it.
    Commit {
        kill: bool,
        drop: bool,
    },
    /// The steps behind a commit that was applied.
    Rest {
        kill: bool,
        drop: bool,
    },
    /// Promise on disk, settings emptied; waits until PostgreSQL has taken it.
    Seal {
        term: u8,
    },
    /// The guardian is armed.
    Promote {
        term: u8,
        number: u8,
        parent: u8,
        switch: u8,
    },
    Enforce {
        phase: Phase,
        through_nobody: bool,
        to: Rule,
    },
    Rewind {
        from: u8,
    },
    /// Copied data become a standby only with WAL of the member that they follow.
    StartFollowing {
        upstream: Upstream,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Decided, nothing is written yet.
    Decided,
    /// The rule that names nobody is written: a commit of ours is to be seen waiting, every walsender to have it.
    Nobody,
    /// The rule is written: walsenders outside it are to lose their vote.
    Written,
    /// The barrier commit waits.
    Barrier,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Member {
    // --- the machine and its network ---
    pub host_down: bool,
    pub paused: bool,
    /// The store cannot be reached.
    pub cut: bool,
    /// Nothing passes between its PostgreSQL and the others'.
    pub apart: bool,
    /// WAL arrives here, what it reports does not arrive there.
    pub mute: bool,

    // --- state file ---
    pub inc: u8,
    pub highest_term: u8,
    pub sealed_term: u8,
    pub sync_term: u8,
    pub must_follow: bool,

    // --- data directory ---
    pub timeline: u8,
    pub flushed: u8,
    /// History files on disk, by number.
    pub histories: u8,

    // --- PostgreSQL ---
    pub pg: Pg,
    /// What a new connection shows.
    pub conninfo: Upstream,
    /// What the startup process and its walreceiver act by.
    pub acts_by: Upstream,
    pub receiving: bool,
    pub rule: Rule,
    /// Backends wait for standbys: set by the checkpointer alone.
    pub flag: bool,
    pub checkpointer_lags: bool,
    pub walsenders: [Walsender; MEMBERS],

    // --- guardian ---
    pub armed: u8,
    pub clock: Clock,

    // --- agent ---
    pub agent_down: bool,
    pub lease: Lease,
    pub lease_term: u8,
    pub kept: Kept,
    pub memory: Packed,
    pub work: Work,
    pub txn: Txn,
}

/// The agent's memory (`core::view::Memory`), as far as it decides anything here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Packed {
    pub term: u8,
    /// The present lease has been silent for W.
    pub silent: bool,
    /// Its holder has given no sign of life for `takeover.after`.
    pub suspects: bool,
    /// The present release was seen long enough ago.
    pub waited: bool,
    /// Bits of members that have not streamed for `max_stall`.
    pub stalled: u8,
    /// Bits of members that streamed from here lately.
    pub streamed: u8,
    pub enforced: Rule,
    pub doubtful: bool,
    pub settled: bool,
    pub promotion_failed: bool,
    pub promoted: Since,
    pub election: Since,
    pub enough: Since,
    pub rejoin_failed: bool,
}

impl Member {
    /// Do its processes run?
    pub fn moves(&self) -> bool {
        !self.host_down && !self.paused
    }

    /// Can its agent do anything at all?
    pub fn thinks(&self) -> bool {
        self.moves() && !self.agent_down
    }

    /// Nobody's fault but a fault's: does it come to act or renew for the time of a lease?
    pub fn may_be_late(&self) -> bool {
        !self.thinks() || self.cut
    }

    pub fn serves(&self) -> bool {
        self.moves() && self.pg == Pg::Primary
    }
}

impl World {
    /// Members that can answer and be sealed, besides the holder and `i`.
    pub fn voters(&self, i: usize) -> u8 {
        let holder = usize::from(self.store.leader.holder);
        let votes = |v: &usize| {
            let m = &self.members[*v];
            *v != i && *v != holder && m.thinks() && !m.cut && !m.apart && m.pg == Pg::Standby
        };
        (0..MEMBERS).filter(votes).map(|v| 1 << v).sum()
    }

    /// Does `i` get no sign of life of `h`: no renewal, no WAL, no answer of its agent?
    pub fn hears_nothing(&self, i: usize, h: usize) -> bool {
        let (m, holder) = (&self.members[i], &self.members[h]);
        let apart = m.apart || holder.apart;
        let no_wal = !holder.moves() || holder.pg == Pg::Down || apart;
        holder.may_be_late() && no_wal && (!holder.thinks() || apart)
    }

    /// The term under which `p` was promoted: it is in the names of its rule.
    pub fn term_of(&self, p: usize) -> u8 {
        let number = usize::from(self.members[p].timeline);
        if number == 1 { 1 } else { self.store.timelines[number].term }
    }

    /// Where the history of `timeline` leaves `ancestor`.
    pub fn switch_from(&self, timeline: u8, ancestor: u8) -> Option<u8> {
        let mut at = timeline;
        while at > 1 {
            let link = self.store.timelines[usize::from(at)];
            if link.parent == ancestor {
                return Some(link.switch);
            }
            if link.parent == 0 || link.parent >= at {
                return None;
            }
            at = link.parent;
        }
        None
    }

    /// A healthy cluster: a leads term 1 on timeline 1, b and c stream, one acknowledgement is awaited.
    pub fn healthy() -> World {
        let set = Set::default().with(1, 0).with(2, 0);
        let rule = Rule::Any { k: 1, members: set };
        let mut world = World::default();
        world.store.leader = Leader { term: 1, asked: NOBODY, last: 1, ..Leader::default() };
        world.store.claim = Claim { primary: 0, inc: 0, k: 1, term: 1, members: set };
        for m in &mut world.members {
            m.highest_term = 1;
            m.sync_term = 1;
            m.sealed_term = 1;
            m.timeline = 1;
            m.flushed = 1;
            m.pg = Pg::Standby;
            m.rule = Rule::Nobody;
            m.flag = true;
            m.conninfo = Upstream { term: 1, member: 0, inc: 0 };
            m.acts_by = m.conninfo;
            m.receiving = true;
            m.memory.term = 1;
        }
        let a = &mut world.members[0];
        (a.pg, a.conninfo, a.acts_by, a.receiving) = (Pg::Primary, Upstream::default(), Upstream::default(), false);
        (a.rule, a.armed, a.clock) = (rule, 1, Clock::Fresh);
        (a.lease, a.lease_term, a.kept) = (Lease::Held, 1, Kept::Present);
        a.memory.enforced = rule;
        a.memory.settled = true;
        a.memory.streamed = 0b110;
        for i in [1, 2] {
            a.walsenders[i] = Walsender { on: true, inc: 0, term: 1, flushed: 1, fresh: false, rule };
        }
        world.acked[1] = 1;
        world
    }
}
