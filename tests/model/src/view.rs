//! What one member sees, as the core's `View`; and what the core's `Memory` keeps, packed again. Nothing is decided here.
//!
//! Time: every moment is `NOW` (just observed) or lies exactly as far back as the threshold that asks for it, so that the
//! core's own comparisons decide. A silence that is not long enough is one that one of three clocks calls long enough, and
//! a deadline that has passed has passed by one clock alone (protocol §3).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
use std::time::Duration;

use crate::core::lease::{Takeover, Timings};
use crate::core::peers::{Door, Heard, HolderSeen, Peer, Promise, Report, Sealable, Sighting, Sign};
use crate::core::plan::{Follow, Source, SyncRule, walreceiver_name};
use crate::core::promise::Promises;
use crate::core::records::*;
use crate::core::storage::{Storage, StoragePolicy};
use crate::core::timeline::{History, HistoryEntry, Term, TimelineId};
use crate::core::view::{Store as CoreStore, *};
use crate::core::{Incarnation, Lsn, MemberId, MemberName, Moment};
use crate::world::Store;
use crate::world::*;

pub const NOW: Moment = Moment::at(10_000_000_000_000);
const SYSTEM: u64 = 7_000_000_000_000_000_001;
const HOUR: Duration = Duration::from_secs(3600);

// Revisions of the keys as they stand; `STALE` was overwritten.
pub const LEADER_AT: i64 = 10;
pub const LEASE_AT: i64 = 11;
pub const SYNC_AT: i64 = 12;
pub const SEAL_AT: i64 = 20;
pub const STALE: i64 = 1;
const SEQ: u64 = 5;

pub fn timings() -> Timings {
    Timings {
        heartbeat: Duration::from_secs(1),
        ttl: Duration::from_secs(8),
        kill_budget: Duration::from_secs(1),
        renewal_timeout: Duration::from_secs(2),
    }
}

/// Long-lived parts, made once.
pub struct Cast {
    pub names: [MemberName; MEMBERS],
    pub policy: Policy,
    record: MemberRecord,
}

pub fn cast() -> &'static Cast {
    static CAST: OnceLock<Cast> = OnceLock::new();
    CAST.get_or_init(|| Cast {
        names: ["a", "b", "c"].map(|n| MemberName::new(n).expect("a letter is a name")),
        policy: Policy {
            timings: timings(),
            durability: Durability::Sync,
            k: 1,
            max_stall: Duration::from_secs(3),
            max_lag: 1 << 20,
            election_wait: Duration::from_millis(500),
            election_give_up: Duration::from_secs(3),
            crash_failover: true,
            crash_max_restarts: 3,
            crash_window: Duration::from_secs(600),
            start_timeout: Duration::from_secs(300),
            stop_timeout: Duration::from_secs(30),
            member_publish: Duration::from_secs(100_000),
            rejoin_timeout: Duration::from_secs(100_000),
            // Data are rewound, never set aside: a clone is a member that is not there.
            reclone: false,
            storage: StoragePolicy::default(),
            takeover: Takeover::default(),
            cold_start_wait: Duration::from_secs(600),
        },
        record: MemberRecord {
            incarnation: Incarnation(0),
            start_counter: 1,
            boot_id: String::new(),
            data: DataSummary::Present { system_identifier: SYSTEM },
            role: Role::None,
            state: "running".to_owned(),
            timeline: None,
            received: None,
            replayed: None,
            term: Term(0),
            host: "h".to_owned(),
            port: 1,
            api_url: String::new(),
            tags: Tags::default(),
            postgres_version: 150_000,
            agent_version: String::new(),
            pending_restart: false,
            job: None,
            overtaken: None,
            endpoint: None,
            witness: true,
            promise: None,
            highest_term: Term(0),
            storage: StorageSummary::default(),
            kept: Vec::new(),
            rule: String::new(),
            reason: String::new(),
            beat: 1,
        },
    })
}

pub fn name(i: usize) -> MemberName {
    cast().names[i].clone()
}

pub fn index(name: &MemberName) -> u8 {
    cast().names.iter().position(|n| n == name).expect("a member of the model") as u8
}

/// Incarnations carry their member, so that a name never stands for another one's.
pub fn id(i: usize, inc: u8) -> MemberId {
    MemberId { name: name(i), incarnation: Incarnation((i as u64 + 1) * 16 + u64::from(inc)) }
}

pub fn inc_of(incarnation: Incarnation) -> u8 {
    (incarnation.0 & 15) as u8
}

fn ids(set: Set) -> BTreeSet<MemberId> {
    set.all().map(|(m, inc)| id(m, inc)).collect()
}

pub fn set_of<'a>(ids: impl IntoIterator<Item = &'a MemberId>) -> Set {
    ids.into_iter().fold(Set::default(), |set, id| set.with(usize::from(index(&id.name)), inc_of(id.incarnation)))
}

pub fn sync_rule(rule: Rule, term: u8) -> Option<SyncRule> {
    Some(match rule {
        Rule::Unknown => return None,
        Rule::Nobody => SyncRule::Nobody,
        Rule::Cleared => SyncRule::Cleared,
        Rule::Any { k, members } => {
            SyncRule::Any { k: u32::from(k), members: ids(members), term: Term(u64::from(term)) }
        }
    })
}

pub fn rule_of(rule: &SyncRule) -> Rule {
    match rule {
        SyncRule::Nobody => Rule::Nobody,
        SyncRule::Cleared => Rule::Cleared,
        SyncRule::Any { k, members, .. } => Rule::Any { k: *k as u8, members: set_of(members) },
    }
}

// === Records ===

pub fn leader_record(store: &Store, leader: &Leader) -> LeaderRecord {
    let last = leader.last;
    let link = store.timelines[usize::from(last)];
    let held_term = if last == 1 { 1 } else { link.term };
    LeaderRecord {
        holder: id(usize::from(leader.holder), leader.inc),
        boot_id: String::new(),
        term: Term(u64::from(leader.term)),
        state: match leader.office {
            Office::Held => LeaderState::Held,
            Office::Electing | Office::Winner => LeaderState::Electing {
                coordinator: name(usize::from(leader.holder)),
                preferred: (leader.asked != NOBODY).then(|| name(usize::from(leader.asked))),
                winner: (leader.office == Office::Winner).then(|| {
                    let link = store.timelines[usize::from(leader.wins)];
                    Winner {
                        member: id(usize::from(leader.holder), leader.inc),
                        timeline: TimelineId(u32::from(leader.wins)),
                        parent: TimelineId(u32::from(link.parent)),
                        switch: Lsn(u64::from(link.switch)),
                    }
                }),
            },
            Office::Released => LeaderState::Released {
                to: (leader.asked != NOBODY).then(|| name(usize::from(leader.asked))),
                why: String::new(),
            },
        },
        ttl_ms: 8_000,
        takeover_ms: Takeover::default().after.as_millis() as u64,
        // Only makes the next one more patient.
        taken: None,
        store_id: 7,
        lsn: None,
        last: Some(Published {
            member: id(0, 0),
            term: Term(u64::from(held_term)),
            timeline: TimelineId(u32::from(last)),
            parent: (last > 1).then(|| TimelineId(u32::from(link.parent))),
            switch: (last > 1).then(|| Lsn(u64::from(link.switch))),
        }),
    }
}

fn records(store: &Store) -> ClusterRecords {
    let keyed = |revision, value| Keyed { revision, value };
    let mut records = ClusterRecords { store_id: 7, revision: 1_000, ..ClusterRecords::default() };
    records.init = Entry::Present(keyed(2, ClusterInit { system_identifier: SYSTEM }));
    records.leader = Entry::Present(Keyed { revision: LEADER_AT, value: leader_record(store, &store.leader) });
    let lease = LeaseRecord { term: Term(u64::from(store.leader.term)), seq: SEQ, lsn: None };
    records.lease = Entry::Present(Keyed { revision: LEASE_AT, value: lease });
    records.sync = Entry::Present(Keyed { revision: SYNC_AT, value: claim(&store.claim) });
    let everybody = Membership { term: Term(1), members: cast().names.iter().cloned().collect() };
    records.membership = Entry::Present(Keyed { revision: 13, value: everybody });
    for (n, link) in reserved(store) {
        let reservation = TimelineReservation {
            term: Term(u64::from(link.term)),
            parent: TimelineId(u32::from(link.parent)),
            switch: Lsn(u64::from(link.switch)),
        };
        records.timelines.insert(TimelineId(n as u32), reservation);
    }
    for i in 0..MEMBERS {
        let mut record = cast().record.clone();
        record.incarnation = id(i, store.published[i]).incarnation;
        records.members.insert(name(i), Keyed { revision: 30, value: record });
        let seal = store.seals[i];
        if seal.term > 0 {
            let position = Position {
                timeline: TimelineId(u32::from(seal.timeline)),
                replayed: Lsn(u64::from(seal.at)),
                received: Lsn(u64::from(seal.at)),
                history: history(store, seal.timeline),
            };
            let value = SealRecord {
                term: Term(u64::from(seal.term)),
                incarnation: id(i, seal.inc).incarnation,
                position,
                tags: Tags::default(),
            };
            records.seals.insert(name(i), Keyed { revision: SEAL_AT + i as i64, value });
        }
    }
    records
}

pub fn claim(claim: &Claim) -> SyncClaim {
    SyncClaim {
        mode: Durability::Sync,
        primary: id(usize::from(claim.primary), claim.inc),
        members: ids(claim.members),
        k: u32::from(claim.k),
        term: Term(u64::from(claim.term)),
    }
}

fn reserved(store: &Store) -> impl Iterator<Item = (usize, Timeline)> {
    store.timelines.iter().copied().enumerate().filter(|(_, link)| link.term > 0)
}

/// As the member's own history file tells it.
fn history(store: &Store, timeline: u8) -> History {
    let mut entries = Vec::new();
    let mut at = usize::from(timeline);
    while at > 1 && store.timelines[at].term > 0 {
        let link = store.timelines[at];
        entries
            .push(HistoryEntry { timeline: TimelineId(u32::from(link.parent)), switch: Lsn(u64::from(link.switch)) });
        at = usize::from(link.parent);
    }
    entries.reverse();
    History(entries)
}

// === The view ===

/// Everything that a round of `i` can depend on: equal keys give equal plans, so a plan is made once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seen {
    pub me: u8,
    /// `None`: the store cannot be read.
    pub store: Option<Store>,
    pub inc: u8,
    pub durable: (u8, u8, u8, bool),
    pub timeline: u8,
    /// The history of the data directory when the store is not there to tell.
    pub flushed: u8,
    pub pg: Pg,
    pub follows: Upstream,
    pub streaming: bool,
    pub rule: Rule,
    pub rows: [(bool, u8, u8, u8); MEMBERS],
    pub armed: u8,
    pub clock: Clock,
    pub lease: Lease,
    pub lease_term: u8,
    pub kept: Kept,
    pub memory: Packed,
    pub rule_term: u8,
    /// Who would confirm the silence of the holder now.
    pub voters: u8,
    pub job: JobSeen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobSeen {
    None,
    Running,
}

impl Seen {
    pub fn by(world: &World, i: usize) -> Seen {
        let m = &world.members[i];
        let primary = m.pg == Pg::Primary;
        let rows = std::array::from_fn(|s| {
            let w = &m.walsenders[s];
            if primary && w.on { (true, w.inc, w.term, w.flushed) } else { (false, 0, 0, 0) }
        });
        Seen {
            me: i as u8,
            store: (!m.cut).then_some(world.store),
            inc: m.inc,
            durable: (m.highest_term, m.sealed_term, m.sync_term, m.must_follow),
            timeline: m.timeline,
            flushed: m.flushed,
            pg: m.pg,
            follows: m.conninfo,
            streaming: m.receiving,
            rule: if primary { m.rule } else { Rule::Unknown },
            rows,
            armed: m.armed,
            clock: m.clock,
            lease: m.lease,
            lease_term: m.lease_term,
            kept: m.kept,
            memory: m.memory,
            rule_term: if primary { world.term_of(i) } else { 0 },
            voters: if m.memory.suspects { world.voters(i) } else { 0 },
            job: match m.work {
                Work::None | Work::Commit { .. } | Work::Rest { .. } => JobSeen::None,
                _ => JobSeen::Running,
            },
        }
    }

    /// `Memory::observe`, then the whole view.
    pub fn view(&self) -> View {
        let i = usize::from(self.me);
        let policy = cast().policy.clone();
        let me = Me {
            id: id(i, self.inc),
            boot_id: String::new(),
            start_counter: 1,
            tags: Tags::default(),
            system_identifier: Some(SYSTEM),
            configured: cast().names.to_vec(),
            host: "h".to_owned(),
            port: 1,
            api_url: String::new(),
            agent_version: String::new(),
            endpoint: None,
        };
        let running =
            GuardState::Running { postmaster: 1, armed: (self.armed > 0).then(|| Term(u64::from(self.armed))) };
        let state = if self.pg == Pg::Down { GuardState::Idle { exit: None } } else { running };
        let local = Local {
            observed_at: NOW,
            data: DataDirectory::Present {
                system_identifier: SYSTEM,
                checkpoint_timeline: TimelineId(u32::from(self.timeline)),
                version: 15,
                cleanly_stopped: false,
            },
            postgres: self.postgres(),
            guard: Guard { state, real_time: true, control_group: true, death_covered: true },
            storage: Storage::default(),
            kept: Vec::new(),
        };
        let store = match &self.store {
            Some(store) => CoreStore::Known { observed_at: NOW, records: Box::new(records(store)) },
            None => CoreStore::Unknown { why: "cut".to_owned(), since: NOW },
        };
        let peers = self.peers();
        let memory = self.unpack_memory().observe(&me, &policy, &local, &store, &peers, NOW);
        let job = match self.job {
            JobSeen::None => None,
            JobSeen::Running => {
                Some(Job { what: JobKind::Stop, since: NOW, done_bytes: None, total_bytes: None, result: None })
            }
        };
        View {
            now: NOW,
            me,
            policy,
            local,
            store,
            lease: self.lease_view(),
            promises: Promises::default(),
            memory,
            peers,
            job,
            stopping: false,
        }
    }

    fn postgres(&self) -> LocalPostgres {
        let slots: BTreeMap<String, Option<Lsn>> =
            (0..MEMBERS).filter(|m| *m != usize::from(self.me)).map(|m| (name(m).slot(), None)).collect();
        let at = Lsn(u64::from(self.flushed));
        let history = self.store.map(|s| history(&s, self.timeline)).unwrap_or_default();
        match self.pg {
            Pg::Down => LocalPostgres::Down,
            Pg::Standby => LocalPostgres::Standby(StandbyFacts {
                version: 150_000,
                system_identifier: SYSTEM,
                timeline: TimelineId(u32::from(self.timeline)),
                history,
                replayed: at,
                received: Some(at),
                replay_paused: false,
                replay_delay_ms: None,
                follows: follow(usize::from(self.me), self.follows),
                receiver: if self.streaming { Receiver::Streaming } else { Receiver::None },
                last_message: None,
                pending_restart: false,
                slots,
            }),
            Pg::Primary => LocalPostgres::Primary(PrimaryFacts {
                slot_bound: None,
                version: 150_000,
                system_identifier: SYSTEM,
                timeline: TimelineId(u32::from(self.timeline)),
                history,
                flushed: at,
                writable: true,
                rule_text: sync_rule(self.rule, self.rule_term).map(|r| r.to_string()).unwrap_or_default(),
                replicas: (0..MEMBERS).filter_map(|s| self.replica(s)).collect(),
                slots,
                pending_restart: false,
                exceptions: Vec::new(),
            }),
        }
    }

    fn replica(&self, s: usize) -> Option<Replica> {
        let (on, inc, term, flushed) = self.rows[s];
        on.then(|| Replica {
            pid: 1,
            application_name: walreceiver_name(&id(s, inc), Term(u64::from(term))),
            state: "streaming".to_owned(),
            flushed: Some(Lsn(u64::from(flushed))),
            replayed: Some(Lsn(u64::from(flushed))),
            sync_priority: 1,
            reply_age_ms: Some(0),
        })
    }

    /// The other agents, as far as they matter: a holder that gives no sign of life, and who says so too (way B). Otherwise
    /// nobody was asked, which is no silence.
    fn peers(&self) -> BTreeMap<MemberName, Peer> {
        let mut peers = BTreeMap::new();
        let Some(store) = self.store.filter(|_| self.memory.suspects) else { return peers };
        let holder = usize::from(store.leader.holder);
        let gone = Door::Silent { since: NOW.minus(HOUR) };
        peers.insert(name(holder), Peer { asked_at: Some(NOW), agent: gone, postgres: gone, answer: None });
        for voter in (0..MEMBERS).filter(|v| self.voters >> v & 1 == 1) {
            let sighting = Sighting {
                member: name(holder),
                term: Term(u64::from(store.leader.term)),
                leader_revision: LEADER_AT,
                seq: SEQ,
                unchanged_ms: 3_600_000,
                wal: Sign::Never,
                agent: Sign::Never,
                refused_ms: None,
            };
            let report = Report {
                boot_id: String::new(),
                highest_term: Term(0),
                sealed_term: Term(0),
                holder: HolderSeen::Seen(sighting),
                promise: Promise::Free,
                sealable: Sealable::Yes,
                loop_age_ms: 0,
            };
            let heard = Heard { from: id(voter, store.published[voter]), asked_at: NOW, at: NOW, report };
            let open = Door::Open { at: NOW };
            peers.insert(name(voter), Peer { asked_at: Some(NOW), agent: open, postgres: open, answer: Some(heard) });
        }
        peers
    }

    fn lease_view(&self) -> LeaseView {
        let term = Term(u64::from(self.lease_term));
        let later = NOW.plus(Duration::from_secs(1));
        let deadline = match self.clock {
            Clock::None => None,
            Clock::Fresh => Some(NOW.plus(Duration::from_secs(4))),
            Clock::PastF => Some(NOW.plus(Duration::from_millis(500))),
            // One clock of three says so.
            Clock::PastD => Some(Moment { raw: NOW.raw, ..later }),
        };
        match self.lease {
            Lease::None => LeaseView::None,
            Lease::Claimed => LeaseView::Claimed { term },
            Lease::Lost => LeaseView::Lost { term, deadline },
            Lease::Held => match deadline {
                Some(deadline) => LeaseView::Held { term, deadline },
                None => LeaseView::Claimed { term },
            },
        }
    }

    fn unpack_memory(&self) -> Memory {
        let p = &self.memory;
        let term = Term(u64::from(p.term));
        let patience = timings().candidate_wait(timings().ttl);
        let moment = |since: Since| match since {
            Since::Never => None,
            Since::Young => Some(NOW),
            Since::Old => Some(NOW.minus(HOUR)),
        };
        let bits = |bits: u8| (0..MEMBERS).filter(move |m| bits >> m & 1 == 1);
        let mut memory = Memory {
            durable: Durable {
                highest_term: Term(u64::from(self.durable.0)),
                sealed_term: Term(u64::from(self.durable.1)),
                highest_sync_term: Term(u64::from(self.durable.2)),
                store_id: 7,
                store_revision: 1,
                must_follow: self.durable.3,
                ..Durable::default()
            },
            term,
            // A start that waits for others is a start that comes later: it is left to the schedule.
            term_since: Some(NOW.minus(HOUR)),
            stalled: bits(p.stalled).map(|m| (name(m), NOW.minus(HOUR))).collect(),
            streamed: bits(p.streamed).map(|m| (name(m), (Lsn(0), NOW))).collect(),
            // Everybody speaks, as far as the others know: who does not is one whom the schedule passes over.
            beats: cast().names.iter().map(|n| (n.clone(), (1, NOW))).collect(),
            spoke: cast().names.iter().map(|n| (n.clone(), NOW)).collect(),
            witness: true,
            enforced: sync_rule(p.enforced, p.term),
            doubtful_sync: p.doubtful,
            sync_settled: p.settled,
            kept_revision: match self.kept {
                Kept::Nothing => None,
                Kept::Present => Some(LEADER_AT),
                Kept::Stale => Some(STALE),
            },
            promotion_failed: p.promotion_failed.then_some(term),
            promoted: moment(p.promoted).map(|at| (term, at)),
            election: moment(p.election).map(|since| ElectionMemory {
                term,
                since,
                enough_since: moment(p.enough),
                copied: None,
            }),
            rejoin_failures: u32::from(p.rejoin_failed) * 3,
            published: Some((NOW, cast().record.clone())),
            ..Memory::default()
        };
        if let Some(store) = &self.store {
            let long_ago = NOW.minus(patience);
            let suspicious = NOW.minus(Takeover::default().after);
            let first_seen = match (p.silent, p.suspects) {
                (true, _) => long_ago,
                (false, true) => Moment { raw: long_ago.raw, ..suspicious },
                (false, false) => Moment { raw: long_ago.raw, ..NOW },
            };
            memory.silence = Some(Silence {
                term: Term(u64::from(store.leader.term)),
                leader_revision: LEADER_AT,
                seq: SEQ,
                first_seen,
                renewed: true,
            });
            if p.waited {
                memory.releases = Some(SeenRelease { leader_revision: LEADER_AT, first_seen: NOW.minus(HOUR) });
            }
        }
        memory
    }

    /// What is left of a memory after a round.
    pub fn pack_memory(&self, memory: &Memory) -> Packed {
        let since = |at: Option<Moment>| match at {
            None => Since::Never,
            Some(at) if at == NOW => Since::Young,
            Some(_) => Since::Old,
        };
        let bit = |n: &MemberName| 1u8 << index(n);
        let old = |(_, at): &(&MemberName, &Moment)| **at != NOW;
        let packed = Packed {
            term: memory.term.0 as u8,
            silent: self.memory.silent,
            suspects: self.memory.suspects,
            waited: self.memory.waited,
            stalled: memory.stalled.iter().filter(old).map(|(n, _)| bit(n)).sum(),
            streamed: memory.streamed.keys().map(bit).sum(),
            enforced: memory.enforced.as_ref().map(rule_of).unwrap_or_default(),
            doubtful: memory.doubtful_sync,
            settled: memory.sync_settled,
            promotion_failed: memory.promotion_failed == Some(memory.term),
            promoted: since(memory.promoted.filter(|(t, _)| *t == memory.term).map(|(_, at)| at)),
            election: since(memory.election.map(|e| e.since)),
            enough: since(memory.election.and_then(|e| e.enough_since)),
            rejoin_failed: memory.rejoin_failures > 0,
        };
        self.relevant(packed)
    }

    /// Without what nobody asks for before it is set anew: states that differ in nothing else are one.
    fn relevant(&self, mut packed: Packed) -> Packed {
        let office = self.store.map(|s| s.leader.office);
        let holds = self.store.is_none_or(|s| s.leader.holder == self.me);
        if office.is_some_and(|o| o != Office::Electing) {
            // How long seals have been collected.
            (packed.election, packed.enough) = Default::default();
        }
        if office.is_some_and(|o| o != Office::Winner) {
            // How long followers have been waited for.
            packed.promoted = Since::Never;
        }
        if !holds {
            // Begins anew with every term.
            packed.streamed = 0;
        }
        if self.pg != Pg::Primary {
            // A primary is one by a promotion, which begins anew.
            (packed.enforced, packed.doubtful, packed.settled) = Default::default();
        }
        packed
    }
}

pub fn follow(me: usize, upstream: Upstream) -> Option<Follow> {
    (upstream.term > 0).then(|| {
        let term = Term(u64::from(upstream.term));
        Follow {
            upstream: Source { member: name(usize::from(upstream.member)), host: "h".to_owned(), port: 1 },
            slot: name(me).slot(),
            walreceiver: walreceiver_name(&id(me, upstream.inc), term),
            term,
        }
    })
}
