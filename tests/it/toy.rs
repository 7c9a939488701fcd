//! A cluster small enough to read: the store is a value, PostgreSQL an enum, and a round is observe, decide, execute. It
//! knows what the rules have to cope with (order of events, death, silence, divergence), not what PostgreSQL has to cope
//! with; that is `tests/cluster`'s.
//!
//! With [`Toy::trouble`] set the steps of all members are done in a random order, so that plans are carried out on views that
//! are not true any more; agents freeze between two steps, jobs fail, and commits lose their answers or land later.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pgvigil::core::decide::decide;
use pgvigil::core::holding::{Ask, Holding};
use pgvigil::core::lease::{Takeover, Timings};
use pgvigil::core::lint;
use pgvigil::core::peers::{Door, Heard, Peer, Promise as Bound, Report, Tried};
use pgvigil::core::plan::{Follow, NOBODY, Plan, Step, SyncRule, parse_walreceiver_name};
use pgvigil::core::promise::{Answer as Promised, Bond, Promise, may_be_given, refuses_promise, refuses_seal};
use pgvigil::core::records::{
    ClusterRecords, Durability, Entry, Key, Keyed, LeaderState, LeaseRecord, Position, SealRecord, Tags, Transaction,
    Write,
};
use pgvigil::core::storage::{Disk, Place, Probe, Space, Storage, StoragePolicy};
use pgvigil::core::timeline::{History, HistoryEntry, Term, TimelineId};
use pgvigil::core::view::{
    DataDirectory, Durable, Exit, Guard, GuardState, JobKind, LastMessage, LeaseView, Local, LocalPostgres, Me, Memory,
    Policy, PrimaryFacts, Receiver, Replica, StandbyFacts, Store, View,
};
use pgvigil::core::{Incarnation, Lsn, MemberId, MemberName, Moment};

pub const ROUND: Duration = Duration::from_millis(100);
const SYSTEM: u64 = 7_000_000_000_000_000_001;

pub fn name(text: &str) -> MemberName {
    MemberName::new(text).unwrap()
}

pub fn policy(durability: Durability) -> Policy {
    Policy {
        timings: Timings {
            heartbeat: Duration::from_secs(1),
            ttl: Duration::from_secs(8),
            kill_budget: Duration::from_secs(1),
            renewal_timeout: Duration::from_secs(2),
        },
        durability,
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
        member_publish: Duration::from_secs(3),
        reclone: true,
        cold_start_wait: Duration::from_secs(60),
        rejoin_timeout: Duration::from_secs(60),
        storage: StoragePolicy::default(),
        takeover: Takeover::default(),
    }
}

#[derive(Clone, Debug)]
pub enum Pg {
    Down,
    Standby { timeline: u32, history: History, replayed: u64, follows: Option<Follow> },
    Primary { timeline: u32, history: History, flushed: u64, rule: String },
}

#[derive(Clone, Debug)]
pub struct Member {
    pub me: Me,
    pub memory: Memory,
    pub data: DataDirectory,
    pub pg: Pg,
    pub disk: (u32, History, u64),
    /// The lease keeper: the product's own.
    pub holding: Holding,
    pub lease: LeaseView,
    /// Until when the promise in the state file binds, as this life of the agent counts it.
    pub bound_until: Option<Moment>,
    pub standing: Option<Term>,
    /// F as the guardian knows it: outlives the agent.
    pub fence: Option<Moment>,
    pub armed: Option<Term>,
    pub agent: bool,
    pub store: bool,
    /// It lost the store in the middle of a change, for some rounds.
    cut: bool,
    /// Can WAL be streamed from and to this member?
    pub network: bool,
    /// Its walreceiver is stopped: the connection stands, nothing moves.
    pub halted: bool,
    /// Since when writes to its data do not return. What was killed meanwhile does not end.
    pub stalled: Option<Moment>,
    /// Less room than PostgreSQL needs: a start fails.
    pub full: bool,
    /// Do the other agents reach this one, and it them?
    pub port: bool,
    /// What is left of the plan that is being carried out.
    pub pending: VecDeque<Step>,
    pub exit: Option<Exit>,
    pub starts: u64,
    pub stopping: bool,
    pub exited: bool,
    /// Nothing can be written to the state file any more.
    pub state_disk_full: bool,
    pub last: Option<Plan>,
    /// What its agent answers from: the view of its last round.
    pub said: Option<View>,
    pub peers: BTreeMap<MemberName, Peer>,
    /// An agent that is not there is either silent (host lost, process stopped), or its host says so.
    pub refuses: bool,
    /// The agent answers the others, and its loop does not come round.
    pub stuck: bool,
    /// PostgreSQL is stopped too: it neither writes nor streams, and no guardian kills it.
    pub frozen: bool,
    /// Bound by a promise until then.
    pub promised: Option<Moment>,
}

#[derive(Clone)]
pub struct Toy {
    pub now: Moment,
    pub records: ClusterRecords,
    pub members: BTreeMap<MemberName, Member>,
    pub policy: Policy,
    /// (member, term) of everybody who was read-write in some round.
    pub writers: Vec<(MemberName, u32)>,
    /// The highest position on each timeline that a client was told of.
    pub acknowledged: BTreeMap<u32, u64>,
    pub trouble: Option<Random>,
    /// Questions from the first to the second do not arrive, nor answers that way.
    pub cuts: BTreeSet<(MemberName, MemberName)>,
    /// Acknowledged on a timeline at the moment when a later one was first acknowledged: its end (S1).
    closed: BTreeMap<u32, u64>,
    seq: u64,
    /// Transactions whose senders gave up, and which may still be applied.
    held: Vec<Transaction>,
}

/// SplitMix64: the whole run follows from the seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What the sender of a transaction learns.
enum Answer {
    Done(i64),
    Refused,
    Unknown,
}

impl Toy {
    pub fn new(names: &[&str], durability: Durability) -> Toy {
        let configured: Vec<MemberName> = names.iter().map(|n| name(n)).collect();
        let members = configured
            .iter()
            .enumerate()
            .map(|(i, n)| {
                let id = MemberId { name: n.clone(), incarnation: Incarnation(i as u64 + 1) };
                let me = Me {
                    id,
                    boot_id: format!("boot-{n}"),
                    start_counter: 1,
                    tags: Tags::default(),
                    system_identifier: None,
                    configured: configured.clone(),
                    host: "127.0.0.1".to_owned(),
                    port: 5432 + i as u16,
                    api_url: format!("http://127.0.0.1:{}", 8008 + i),
                    endpoint: None,
                    agent_version: "0".to_owned(),
                };
                let member = Member {
                    me,
                    memory: Memory::default(),
                    data: DataDirectory::Empty,
                    pg: Pg::Down,
                    disk: (1, History::default(), 0),
                    holding: Holding::default(),
                    lease: LeaseView::None,
                    bound_until: None,
                    standing: None,
                    fence: None,
                    armed: None,
                    agent: true,
                    store: true,
                    cut: false,
                    network: true,
                    halted: false,
                    stalled: None,
                    full: false,
                    port: true,
                    pending: VecDeque::new(),
                    exit: None,
                    starts: 0,
                    stopping: false,
                    exited: false,
                    state_disk_full: false,
                    last: None,
                    said: None,
                    peers: BTreeMap::new(),
                    refuses: false,
                    stuck: false,
                    frozen: false,
                    promised: None,
                };
                (n.clone(), member)
            })
            .collect();
        let records = ClusterRecords { store_id: 7, revision: 1, ..ClusterRecords::default() };
        Toy {
            now: Moment::at(1_000_000_000_000),
            records,
            members,
            policy: policy(durability),
            writers: Vec::new(),
            acknowledged: BTreeMap::new(),
            trouble: None,
            cuts: BTreeSet::new(),
            closed: BTreeMap::new(),
            seq: 0,
            held: Vec::new(),
        }
    }

    pub fn member(&mut self, n: &str) -> &mut Member {
        self.members.get_mut(&name(n)).unwrap()
    }

    pub fn primaries(&self) -> Vec<MemberName> {
        self.members
            .iter()
            .filter(|(_, m)| matches!(m.pg, Pg::Primary { .. }) && !m.exited)
            .map(|(n, _)| n.clone())
            .collect()
    }

    /// The published leader whose PostgreSQL is read-write.
    pub fn leader(&self) -> Option<MemberName> {
        let record = self.records.leader()?;
        let open = record.state == LeaderState::Held
            && matches!(self.members[&record.holder.name].pg, Pg::Primary { .. })
            && self.members[&record.holder.name].agent;
        open.then(|| record.holder.name.clone())
    }

    pub fn streaming(&self) -> usize {
        self.members.keys().filter(|n| self.streams(n)).count()
    }

    fn streams(&self, n: &MemberName) -> bool {
        let Pg::Standby { timeline, replayed, follows: Some(follow), .. } = &self.members[n].pg else { return false };
        let upstream = &self.members[&follow.upstream.member];
        match &upstream.pg {
            _ if !self.members[n].network || !upstream.network => false,
            _ if self.members[n].frozen || upstream.frozen => false,
            Pg::Primary { timeline: up, history, .. } => {
                timeline == up || history.switch_from(TimelineId(*timeline)).is_some_and(|left| *replayed <= left.0)
            }
            // From a standby too, as far as that has come.
            Pg::Standby { timeline: up, history, replayed: there, .. } => {
                let left = history.switch_from(TimelineId(*timeline)).map(|left| left.0);
                left.or((timeline == up).then_some(*there)).is_some_and(|left| *replayed <= left)
            }
            Pg::Down => false,
        }
    }

    /// Rounds until `done`, or a panic that shows what everybody was doing.
    pub fn until(&mut self, what: &str, rounds: usize, mut done: impl FnMut(&Toy) -> bool) {
        for _ in 0..rounds {
            self.round();
            if done(self) {
                return;
            }
        }
        let doing: Vec<String> = self
            .members
            .iter()
            .map(|(n, m)| {
                let plan = m.last.as_ref().map(|p| format!("{}: {}", p.rule, p.reason)).unwrap_or_default();
                format!("{n}: {plan} | {:?} | {:?}", m.pg, m.lease)
            })
            .collect();
        panic!("not within {rounds} rounds: {what}\nleader {:?}\n{}", self.records.leader, doing.join("\n"));
    }

    pub fn round(&mut self) {
        self.now = self.now.plus(ROUND);
        self.replicate();
        self.acknowledge();
        self.land();
        self.guard();
        if self.trouble.is_some() {
            self.troubled();
        } else {
            let names: Vec<MemberName> = self.members.keys().cloned().collect();
            for n in &names {
                if self.members[n].agent && !self.members[n].exited {
                    self.keep(n);
                    self.step(n);
                }
            }
        }
        let open: Vec<MemberName> = self.primaries().into_iter().filter(|n| !self.members[n].frozen).collect();
        // In sync mode the seals bar an overtaken primary from acknowledging, and it may live on until it reads of it.
        let sync = self.records.sync.value().is_some_and(|claim| claim.mode != Durability::Async);
        assert!(sync || open.len() <= 1, "S1: two members are read-write at once: {open:?}");
        self.nothing_is_lost();
        self.the_store_says_no_more();
    }

    /// S9: what is in force at the primary is at least as strict as the published claim, seen from it.
    fn the_store_says_no_more(&self) {
        let Some(claim) = self.records.sync.value() else { return };
        let holder = self.records.leader().map(|l| &l.holder);
        for m in self.members.values() {
            let Pg::Primary { rule, .. } = &m.pg else { continue };
            if holder != Some(&m.me.id) || rule.contains(NOBODY) {
                continue;
            }
            let electorate = claim.electorate();
            let (mut strangers, mut k) = (0, 0);
            if !rule.is_empty() {
                k = rule.split_whitespace().nth(1).unwrap().parse().unwrap();
                let known = |name: &str| {
                    parse_walreceiver_name(name).is_some_and(|(id, _)| id != m.me.id && electorate.contains(&id))
                };
                strangers = rule.split('"').skip(1).step_by(2).filter(|name| !known(name)).count() as u32;
            }
            assert!(k.max(strangers) - strangers >= claim.k, "S9: `{rule}` is in force, published is {claim:?}");
        }
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.trouble.as_mut().is_some_and(|random| random.one_in(one_in))
    }

    /// A round whose steps are done in any order.
    fn troubled(&mut self) {
        let names: Vec<MemberName> = self.members.keys().cloned().collect();
        for n in &names {
            if self.members[n].agent && !self.members[n].exited {
                if self.members[n].cut && self.chance(20) {
                    let m = self.member(n.as_str());
                    (m.cut, m.store) = (false, true);
                }
                self.keep(n);
                // A plan that was interrupted by a freeze goes on, whatever has happened since.
                if self.members[n].pending.is_empty() {
                    let plan = self.plan(n);
                    self.member(n.as_str()).pending = plan.steps.into();
                }
            }
        }
        loop {
            let able = |m: &Member| m.agent && !m.exited && !m.pending.is_empty();
            let ready: Vec<MemberName> = self.members.iter().filter(|(_, m)| able(m)).map(|(n, _)| n.clone()).collect();
            let Some(random) = self.trouble.as_mut().filter(|_| !ready.is_empty()) else { return };
            let n = &ready[random.below(ready.len() as u64) as usize];
            let Some(step) = self.member(n.as_str()).pending.pop_front() else { return };
            if !self.execute(n, &step) {
                self.member(n.as_str()).pending.clear();
            }
            self.break_in_between(n, &step);
            if self.chance(300) {
                self.member(n.as_str()).agent = false;
            }
        }
    }

    /// A change of the synchronous set is most fragile between two of its steps: agent, PostgreSQL or store may go there.
    fn break_in_between(&mut self, n: &MemberName, step: &Step) {
        let changes_the_set = match step {
            Step::Enforce { .. } => true,
            Step::Commit { transaction, .. } => transaction.write.iter().any(|w| matches!(w, Write::Sync(_))),
            _ => false,
        };
        if !changes_the_set || !self.chance(8) {
            return;
        }
        let dice = self.trouble.as_mut().map_or(0, |random| random.below(3));
        let m = self.member(n.as_str());
        match dice {
            0 => m.restart_agent(),
            1 => m.die("signal 9"),
            _ => (m.cut, m.store) = (true, false),
        }
    }

    /// What the rule in force has released by now.
    fn acknowledge(&mut self) {
        let mut told = Vec::new();
        for (n, m) in self.members.iter().filter(|(_, m)| !m.frozen) {
            let Pg::Primary { timeline, history, flushed, rule } = &m.pg else { continue };
            let at = if rule.is_empty() {
                *flushed
            } else {
                let k: usize = rule.split_whitespace().nth(1).unwrap().parse().unwrap();
                let mut has: Vec<u64> = self
                    .replicas(n)
                    .iter()
                    .filter(|r| rule.contains(&format!("\"{}\"", r.application_name)))
                    .map(|r| r.flushed.unwrap_or_default().0)
                    .collect();
                has.sort_unstable_by(|a, b| b.cmp(a));
                has.get(k - 1).copied().unwrap_or(0)
            };
            // Up to where it left its parent nothing was written on it.
            if history.0.last().is_none_or(|parted| at > parted.switch.0) {
                told.push((*timeline, at));
            }
        }
        for (timeline, at) in told.into_iter().filter(|(_, at)| *at > 0) {
            let known = self.acknowledged.entry(timeline).or_default();
            *known = at.max(*known);
        }
        // S1: once a later timeline has acknowledged something, an earlier one acknowledges nothing more.
        let last = self.acknowledged.keys().next_back().copied();
        for (timeline, at) in self.acknowledged.iter().filter(|(timeline, _)| Some(**timeline) != last) {
            let end = *self.closed.entry(*timeline).or_insert(*at);
            assert!(*at <= end, "S1: timeline {timeline} acknowledged {at} after its successor began, at {end}");
        }
    }

    /// S1, S2: whatever was acknowledged is part of the history of whoever is read-write.
    fn nothing_is_lost(&self) {
        if self.policy.durability == Durability::Async {
            return;
        }
        for (n, m) in &self.members {
            let Pg::Primary { timeline, history, .. } = &m.pg else { continue };
            // An overtaken primary has only its own past.
            for (told, at) in self.acknowledged.iter().filter(|(told, at)| *told < timeline && **at > 0) {
                let kept = history.switch_from(TimelineId(*told)).map(|lsn| lsn.0);
                assert!(
                    kept >= Some(*at),
                    "S2: {n} leads timeline {timeline} with timeline {told} up to {kept:?}, acknowledged was {at}"
                );
            }
        }
    }

    /// What was sent long ago arrives, or never does.
    fn land(&mut self) {
        if !self.held.is_empty() && self.chance(20) {
            let transaction = self.held.remove(0);
            self.commit(&transaction);
        }
    }

    /// The primary writes a little; standbys that follow get it, in trouble not always.
    fn replicate(&mut self) {
        for m in self.members.values_mut().filter(|m| !m.frozen) {
            if let (Pg::Primary { flushed, .. }, None) = (&mut m.pg, m.stalled) {
                *flushed += 10;
            }
        }
        let all = self.members.clone();
        for n in all.keys() {
            if !self.streams(n) || all[n].halted || all[n].stalled.is_some() || self.chance(3) {
                continue;
            }
            let Some(Member { pg: Pg::Standby { timeline, history, replayed, follows: Some(follow) }, .. }) =
                self.members.get_mut(n)
            else {
                continue;
            };
            if let Pg::Primary { timeline: up, history: theirs, flushed: at, .. }
            | Pg::Standby { timeline: up, history: theirs, replayed: at, .. } = &all[&follow.upstream.member].pg
            {
                (*timeline, *history, *replayed) = (*up, theirs.clone(), *at);
            }
        }
        for m in self.members.values_mut() {
            match &m.pg {
                Pg::Standby { timeline, history, replayed: at, .. }
                | Pg::Primary { timeline, history, flushed: at, .. } => {
                    m.disk = (*timeline, history.clone(), *at);
                }
                Pg::Down => {}
            }
        }
    }

    /// The guardian: at F = D - K an armed PostgreSQL dies, agent or no agent.
    fn guard(&mut self) {
        for m in self.members.values_mut() {
            if m.armed.is_some() && !m.frozen && m.fence.is_some_and(|f| self.now.any_reached(f)) {
                m.die("killed by the guardian: deadline passed");
            }
        }
    }

    /// The lease keeper's thread: a renewal, and questions for promises where it is late.
    fn keep(&mut self, n: &MemberName) {
        let (lost, lagging) = (self.chance(10), self.chance(2));
        let now = self.now;
        self.tell_keeper(n);
        let m = self.members.get_mut(n).unwrap();
        let renews = m.holding.order().and_then(|order| Some((order.term, order.leader_revision?)));
        if let Some((term, revision)) = renews {
            if !m.store {
                m.holding.failed();
            } else if lagging {
                // Nothing is sent in this round.
            } else if self.records.leader.revision() == revision {
                self.seq += 1;
                self.records.revision += 1;
                let lsn = match &m.pg {
                    Pg::Primary { flushed, .. } => Some(Lsn(*flushed)),
                    Pg::Standby { .. } | Pg::Down => None,
                };
                let lease = LeaseRecord { term, seq: self.seq, lsn };
                self.records.lease = Entry::Present(Keyed { revision: self.records.revision, value: lease });
                if lost { m.holding.failed() } else { m.holding.renewed(now) }
            } else if !lost {
                m.holding.conflict();
            }
        }
        self.ask_for_promises(n);
        let (timings, m) = (self.policy.timings, self.members.get_mut(n).unwrap());
        m.lease = m.holding.view(&timings);
        if m.armed.is_some()
            && m.armed == m.lease.term()
            && let Some(since) = m.holding.since()
        {
            let fence = timings.kill_at(since);
            m.fence = Some(m.fence.map_or(fence, |before| before.latest(fence)));
        }
    }

    fn tell_keeper(&mut self, n: &MemberName) {
        let m = self.members.get_mut(n).unwrap();
        if let Some(lead) = m.memory.durable.lead.clone().filter(|lead| lead.record.holder == m.me.id) {
            m.holding.rests_on(&lead, m.me.system_identifier);
        }
    }

    fn ask_for_promises(&mut self, n: &MemberName) {
        let (now, timings) = (self.now, self.policy.timings);
        let Ask::Now { promise, members, .. } = self.member(n.as_str()).holding.whom_to_ask(&timings, now) else {
            return;
        };
        for other in members {
            let reached = self.reach(n, &other) && !self.chance(4);
            let answer = if reached { self.promised(&other, &promise) } else { silent("no answer") };
            // Given, and the answer is lost.
            let answer = if self.chance(4) { silent("no answer") } else { answer };
            self.member(n.as_str()).holding.answered(promise.term, other, answer, now);
        }
    }

    fn promised(&mut self, n: &MemberName, promise: &Promise) -> Promised {
        let view = self.view(n);
        let m = self.members.get_mut(n).unwrap();
        match m.promise(promise.clone(), &view) {
            Ok(()) => Promised::Granted {
                incarnation: m.me.id.incarnation,
                sent: view.now,
                highest_term: m.memory.durable.highest_term,
                store_id: m.memory.durable.trusted_store(),
            },
            Err(_) => {
                let bond = m.bond(view.now);
                match refuses_promise(&m.memory.durable, bond.as_ref(), m.standing, promise, view.now) {
                    Err(why) => Promised::Refused { why },
                    Ok(()) => silent("refused"),
                }
            }
        }
    }

    /// Do these two agents reach each other?
    fn reach(&self, one: &MemberName, other: &MemberName) -> bool {
        let cut = |from: &MemberName, to: &MemberName| self.cuts.contains(&(from.clone(), to.clone()));
        let there = |n: &MemberName| {
            let m = &self.members[n];
            m.port && m.agent && !m.exited
        };
        !cut(one, other) && !cut(other, one) && there(one) && there(other)
    }

    pub fn view(&mut self, n: &MemberName) -> View {
        let replicas = self.replicas(n);
        let (now, policy, records) = (self.now, self.policy.clone(), self.records.clone());
        let receiver = if self.streams(n) { Receiver::Streaming } else { Receiver::None };
        let m = self.members.get_mut(n).unwrap();
        m.memory.bond = m.bond(now);
        if m.memory.bond.take_if(|bond| !bond.binds(now)).is_some() {
            (m.memory.durable.promise, m.bound_until) = (None, None);
        }
        if m.store {
            m.standing = None;
        }
        let guard = match &m.pg {
            // SIGKILL waits for the disk.
            Pg::Down if m.stalled.is_some() => GuardState::Survivors { count: 1 },
            Pg::Down => GuardState::Idle { exit: m.exit.clone() },
            Pg::Standby { .. } | Pg::Primary { .. } => GuardState::Running { postmaster: 1, armed: m.armed },
        };
        let postgres = match &m.pg {
            Pg::Down if m.stalled.is_some() => LocalPostgres::Unknown { why: "killed; 1 process is left".to_owned() },
            Pg::Down => LocalPostgres::Down,
            Pg::Standby { timeline, history, replayed, follows } => LocalPostgres::Standby(StandbyFacts {
                version: 150_000,
                system_identifier: SYSTEM,
                timeline: TimelineId(*timeline),
                history: history.clone(),
                replayed: Lsn(*replayed),
                received: Some(Lsn(*replayed)),
                replay_paused: false,
                replay_delay_ms: None,
                follows: follows.clone(),
                receiver,
                last_message: (receiver == Receiver::Streaming)
                    .then_some(LastMessage { mark: now.raw / 1_000, age_ms: 0 }),
                pending_restart: false,
                slots: all_slots(&m.me),
            }),
            Pg::Primary { timeline, history, flushed, rule } => LocalPostgres::Primary(PrimaryFacts {
                version: 150_000,
                system_identifier: SYSTEM,
                timeline: TimelineId(*timeline),
                history: history.clone(),
                flushed: Lsn(*flushed),
                writable: true,
                rule_text: rule.clone(),
                replicas,
                slots: all_slots(&m.me),
                slot_bound: None,
                pending_restart: false,
                exceptions: vec![],
            }),
        };
        let local = Local {
            observed_at: now,
            data: m.data.clone(),
            postgres,
            guard: Guard { state: guard, real_time: true, control_group: true, death_covered: false },
            storage: m.storage(now),
            kept: Vec::new(),
        };
        let store = if m.store {
            Store::Known { observed_at: now, records: Box::new(records) }
        } else {
            Store::Unknown { why: "cut".to_owned(), since: now }
        };
        let peers = m.peers.clone();
        m.memory = std::mem::take(&mut m.memory).observe(&m.me, &policy, &local, &store, &peers, now);
        View {
            now,
            me: m.me.clone(),
            policy,
            local,
            store,
            lease: m.holding.view(&self.policy.timings),
            promises: m.holding.promises(&self.policy.timings),
            memory: m.memory.clone(),
            peers,
            job: None,
            stopping: m.stopping,
        }
    }

    /// What the agent's watch over the others does between two rounds: everybody is asked.
    fn ask_the_others(&mut self, n: &MemberName) {
        let now = self.now;
        let others: Vec<MemberName> = self.members.keys().filter(|other| *other != n).cloned().collect();
        for other in others {
            let way = |from: &MemberName, to: &MemberName| !self.cuts.contains(&(from.clone(), to.clone()));
            let reached = way(n, &other) && way(&other, n) && self.members[n].port && self.members[&other].port;
            let lost = self.chance(10);
            let m = &self.members[&other];
            let report =
                m.said.as_ref().filter(|_| reached && !lost && (m.agent || m.stuck) && !m.exited).map(|said| {
                    let mut report = Report::of(said, said.now, now);
                    if let Some(left) = m.promised.map(|until| now.until(until)).filter(|left| !left.is_zero()) {
                        let to = said.store.records().and_then(|r| r.leader()).unwrap().holder.clone();
                        report.promise = Bound::Bound { to, term: said.memory.term, left_ms: left.as_millis() as u64 };
                    }
                    report
                });
            let patience = self.policy.timings.loop_patience();
            let report = report.filter(|report| Duration::from_millis(report.loop_age_ms) <= patience);
            let refuses = reached && !m.agent && m.refuses;
            let (tried, postgres) = match (&report, refuses, &m.pg) {
                (Some(_), ..) => (Tried::Opened, None),
                (None, true, Pg::Down) => (Tried::Refused, Some(Tried::Refused)),
                (None, true, _) => (Tried::Refused, Some(Tried::Opened)),
                (None, false, _) => (Tried::Silent, None),
            };
            let from = m.me.id.clone();
            let peer = self.members.get_mut(n).unwrap().peers.entry(other).or_default();
            peer.asked_at = Some(now);
            peer.agent = peer.agent.after(tried, now);
            peer.postgres = postgres.map_or(Door::Unknown, |tried| peer.postgres.after(tried, now));
            if let Some(report) = report {
                peer.answer = Some(Heard { asked_at: now, at: now, from, report });
            }
        }
    }

    fn replicas(&self, upstream: &MemberName) -> Vec<Replica> {
        self.members
            .keys()
            .filter(|n| self.streams(n))
            .filter_map(|n| match &self.members[n].pg {
                Pg::Standby { follows: Some(f), replayed, .. } if f.upstream.member == *upstream => Some(Replica {
                    pid: 1,
                    application_name: f.walreceiver.clone(),
                    state: "streaming".to_owned(),
                    flushed: Some(Lsn(*replayed)),
                    replayed: Some(Lsn(*replayed)),
                    sync_priority: 1,
                    reply_age_ms: Some(0),
                }),
                _ => None,
            })
            .collect()
    }

    fn step(&mut self, n: &MemberName) {
        let plan = self.plan(n);
        for step in &plan.steps {
            if !self.execute(n, step) {
                break;
            }
        }
    }

    fn plan(&mut self, n: &MemberName) -> Plan {
        self.ask_the_others(n);
        let view = self.view(n);
        self.member(n.as_str()).said = Some(view.clone());
        let plan = decide(&view);
        let violations = lint::violations(&view, &plan);
        assert!(violations.is_empty(), "{n}: {}: {violations:?}", plan.rule);
        // A view is what an incident is replayed from: it survives the way through JSON.
        if self.trouble.is_none() {
            let text = serde_json::to_string(&view).unwrap();
            assert_eq!(decide(&serde_json::from_str::<View>(&text).unwrap()), plan, "equal views give equal plans");
        }
        if std::env::var_os("TOY_TRACE").is_some() && self.members[n].last.as_ref().map(|p| &p.rule) != Some(&plan.rule)
        {
            eprintln!("{} {n} {}: {}", self.now.raw / 1_000_000, plan.rule, plan.reason);
        }
        self.members.get_mut(n).unwrap().last = Some(plan.clone());
        plan
    }

    /// Sends a transaction as the agent does, with what the answer leaves in its memory. False: the plan ends here.
    fn send(&mut self, n: &MemberName, transaction: &Transaction) -> bool {
        let now = self.now;
        let m = self.members.get_mut(n).unwrap();
        for write in &transaction.write {
            if let Write::Leader(record) = write
                && matches!(record.state, LeaderState::Electing { winner: None, .. })
                && record.holder == m.me.id
            {
                let bond = m.bond(now);
                if refuses_seal(&m.memory.durable, bond.as_ref(), record.term, now).is_err() {
                    return false;
                }
                m.standing = Some(record.term);
            }
        }
        let answer = match (self.members[n].store, self.chance(15)) {
            (false, _) => Answer::Refused,
            (true, false) => self.commit(transaction).map_or(Answer::Refused, Answer::Done),
            (true, true) if self.chance(2) => {
                self.commit(transaction);
                Answer::Unknown
            }
            (true, true) => {
                if self.chance(2) {
                    self.held.push(transaction.clone());
                }
                Answer::Unknown
            }
        };
        let writes_sync = transaction.write.iter().any(|w| matches!(w, Write::Sync(_)));
        let m = self.members.get_mut(n).unwrap();
        let revision = match answer {
            Answer::Done(revision) => revision,
            Answer::Refused => return false,
            Answer::Unknown => {
                m.memory.doubtful_sync |= writes_sync;
                return writes_sync;
            }
        };
        if writes_sync {
            m.memory.doubtful_sync = false;
        }
        for write in &transaction.write {
            match write {
                Write::Sync(_) => (m.memory.doubtful_sync, m.memory.sync_settled) = (false, true),
                Write::Member(_, record) => m.memory.published = Some((now, (**record).clone())),
                Write::Leader(record)
                    if record.holder == m.me.id
                        && matches!(record.state, LeaderState::Held | LeaderState::Electing { .. }) =>
                {
                    if record.state == LeaderState::Held {
                        m.memory.held = Some(record.clone());
                    }
                    m.keep_lease(record.term, revision, Some(now), record.state == LeaderState::Held);
                }
                _ => {}
            }
        }
        true
    }

    fn execute(&mut self, n: &MemberName, step: &Step) -> bool {
        let now = self.now;
        if let Step::Commit { transaction, .. } = step {
            return self.send(n, transaction);
        }
        if let Step::HandOver { order } = step {
            // What is still under way arrives before PostgreSQL has stopped, unless there is no way.
            let trouble = self.trouble.take();
            self.replicate();
            self.acknowledge();
            let acts = |n: &MemberName| {
                let m = &self.members[n];
                !m.halted && !m.frozen && m.stalled.is_none()
            };
            let there = order.to.as_ref().is_none_or(|to| self.streams(&to.member) && acts(&to.member));
            self.trouble = trouble;
            let m = self.members.get_mut(n).unwrap();
            m.die_as("stopped", true);
            let job = JobKind::HandOver { to: order.to.as_ref().map(|to| to.member.clone()) };
            if !there || !self.send(n, &order.release) {
                assert!(self.trouble.is_some(), "the release of a hand-over");
                let m = self.members.get_mut(n).unwrap();
                m.memory.in_place = Some(order.term);
                m.ended(job, Err("put back"), now);
                return false;
            }
            let m = self.members.get_mut(n).unwrap();
            m.drop_lease();
            m.ended(job, Ok(()), now);
            return true;
        }
        if let Step::FinishRequest { id, outcome } = step {
            let mut request = self.records.requests[id].value.clone();
            request.outcome = Some(outcome.clone());
            return self.members[n].store
                && self.commit(&Transaction::default().put(Write::Request(request))).is_some();
        }
        if step.is_job() && self.chance(12) {
            self.members.get_mut(n).unwrap().fails(step, now);
            return false;
        }
        let all = self.members.clone();
        let passes = match step {
            Step::Enforce { to: SyncRule::Any { k, members, .. }, .. } => self.barrier(n, *k, members),
            _ => true,
        };
        let m = self.members.get_mut(n).unwrap();
        if m.state_disk_full && matches!(step, Step::Remember { .. } | Step::Seal { .. }) {
            return false;
        }
        match step {
            Step::Remember { highest_term, highest_sync_term, store_id, store_revision } => {
                m.memory.durable = Durable {
                    highest_term: *highest_term,
                    highest_sync_term: *highest_sync_term,
                    store_id: *store_id,
                    store_revision: *store_revision,
                    ..m.memory.durable.clone()
                };
                m.memory.remembered_at = Some(now);
            }
            Step::Join { system_identifier } => m.me.system_identifier = Some(*system_identifier),
            Step::NewIncarnation { copied } => {
                m.me.id.incarnation = Incarnation(m.me.id.incarnation.0 + 100);
                m.memory.durable.must_follow |= *copied;
            }
            Step::ForgetCrashes => m.memory.crashes.clear(),
            Step::KeepLease { term, leader_revision } => m.keep_lease(*term, *leader_revision, None, false),
            Step::HoldByPromises { term } => m.holding.hold_by_promises(*term),
            Step::RememberLead { lead } => m.memory.durable.lead = Some((**lead).clone()),
            Step::DistrustStore => m.memory.durable.store_lost = true,
            Step::AcceptStore { highest_term, highest_sync_term, store_id, store_revision } => {
                let durable = &mut m.memory.durable;
                durable.highest_term = durable.highest_term.max(*highest_term);
                durable.highest_sync_term = durable.highest_sync_term.max(*highest_sync_term);
                (durable.store_id, durable.store_revision, durable.store_lost) = (*store_id, *store_revision, false);
                m.memory.store_seen = Some((*store_id, *store_revision));
            }
            Step::EndPromise { to, term } => {
                if m.memory.durable.promise.as_ref().is_some_and(|p| p.to == *to && p.term == *term) {
                    (m.memory.durable.promise, m.bound_until) = (None, None);
                }
            }
            Step::DropLease => {
                m.drop_lease();
            }
            Step::Kill => {
                m.die("killed by the guardian: asked");
                m.memory.enforced = None;
            }
            Step::Disarm => m.armed = None,
            Step::Arm { term } => m.armed = Some(*term),
            Step::Start { follow } => {
                assert!(m.stalled.is_none(), "started on a disk that hangs, or beside what is left");
                if m.full {
                    m.starts += 1;
                    m.exit = Some(Exit { how: "exit code 1".to_owned(), orderly: false, start_number: m.starts });
                    return true;
                }
                assert!(
                    follow.is_some() || !m.memory.durable.must_follow,
                    "copied data never become consistent parked"
                );
                m.armed = None;
                m.starts += 1;
                m.memory.started = follow.clone();
                m.memory.durable.must_follow = false;
                let (timeline, history, at) = m.disk.clone();
                m.pg = Pg::Standby { timeline, history, replayed: at, follows: follow.clone() };
            }
            Step::Follow { follow } => {
                if let Pg::Standby { follows, .. } = &mut m.pg {
                    *follows = Some(follow.clone());
                }
            }
            Step::Seal { term, leader_revision } => {
                let bond = m.bond(now);
                if refuses_seal(&m.memory.durable, bond.as_ref(), *term, now).is_err() {
                    return false;
                }
                m.memory.durable.sealed_term = *term;
                // Its walreceiver hangs in the disk and does not end.
                if m.stalled.is_some() || m.halted {
                    return false;
                }
                m.memory.durable.highest_term = m.memory.durable.highest_term.max(*term);
                m.memory.durable.promise = m.memory.durable.promise.take().filter(|promise| promise.term >= *term);
                let Pg::Standby { timeline, history, replayed, follows } = &mut m.pg else { return false };
                *follows = None;
                let position = Position {
                    timeline: TimelineId(*timeline),
                    replayed: Lsn(*replayed),
                    received: Lsn(*replayed),
                    history: history.clone(),
                };
                let seal =
                    SealRecord { term: *term, incarnation: m.me.id.incarnation, position, tags: m.me.tags.clone() };
                let transaction = Transaction::when(Key::Leader, *leader_revision).put(Write::Seal(n.clone(), seal));
                return self.send(n, &transaction);
            }
            Step::Promote { order } => {
                let Pg::Standby { timeline, history, replayed, .. } = &m.pg else { return false };
                let reserved = (order.parent.0, order.switch.0) == (*timeline, *replayed) && m.stalled.is_none();
                let deadline = match m.holding.view(&self.policy.timings) {
                    LeaseView::Held { term, deadline } if term == order.term && reserved => deadline,
                    _ => {
                        m.fails(step, now);
                        return false;
                    }
                };
                let mut history = history.clone();
                history.0.push(HistoryEntry { timeline: TimelineId(*timeline), switch: Lsn(*replayed) });
                (m.armed, m.fence) = (Some(order.term), Some(deadline.minus(self.policy.timings.kill_budget)));
                if m.fence.is_some_and(|f| now.any_reached(f)) {
                    // The guardian refuses to arm for a time that is over.
                    m.armed = None;
                    m.fails(step, now);
                    return false;
                }
                self.writers.push((n.clone(), order.timeline.0));
                m.pg = Pg::Primary {
                    timeline: order.timeline.0,
                    history,
                    flushed: *replayed,
                    rule: SyncRule::Nobody.to_string(),
                };
                m.ended(JobKind::Promote { term: order.term }, Ok(()), now);
            }
            Step::Enforce { to, .. } => {
                if let Pg::Primary { rule, .. } = &mut m.pg {
                    *rule = to.to_string();
                }
                // The barrier returns when enough of the new set acknowledge it; the file is written anyway.
                if !passes {
                    m.ended(JobKind::Enforce { to: to.clone() }, Err("the barrier did not return"), now);
                    return false;
                }
                m.ended(JobKind::Enforce { to: to.clone() }, Ok(()), now);
            }
            Step::Bootstrap => {
                m.me.system_identifier = Some(SYSTEM);
                m.disk = (1, History::default(), 1000);
                m.data = present(1);
            }
            Step::SetAside { .. } => m.data = DataDirectory::Empty,
            Step::Clone { from } => {
                let source = &all[&from.member];
                if matches!(source.pg, Pg::Down) || !source.network || !m.network {
                    m.fails(step, now);
                    return false;
                }
                assert!(matches!(m.data, DataDirectory::Empty), "S5: a clone over {:?}", m.data);
                m.disk = source.disk.clone();
                m.data = present(m.disk.0);
                m.ended(JobKind::Clone { from: from.member.clone() }, Ok(()), now);
            }
            Step::Rewind { from, .. } => {
                m.die_as("stopped", true);
                let source = &all[&from.member];
                if matches!(source.pg, Pg::Down) || !source.network || !m.network {
                    m.fails(step, now);
                    return false;
                }
                m.ended(JobKind::Rewind { from: from.member.clone() }, Ok(()), now);
                m.disk = source.disk.clone();
                m.pg = Pg::Down;
                m.memory.durable.must_follow = true;
            }
            Step::RestartInPlace { .. } | Step::Stop { .. } => m.die_as("stopped", true),
            Step::Exit => m.exited = true,
            Step::EndWalsenders { .. } | Step::KeepSlots { .. } | Step::Reload => {}
            Step::Commit { .. } | Step::HandOver { .. } | Step::FinishRequest { .. } => unreachable!("done above"),
        }
        true
    }

    /// A commit of the primary's own under the new rule: k of `named` have everything up to it when it returns.
    fn barrier(&mut self, n: &MemberName, k: u32, named: &BTreeSet<MemberId>) -> bool {
        let Pg::Primary { timeline, history, flushed, .. } = self.members[n].pg.clone() else { return false };
        let follows = |id: &&MemberId| {
            let m = &self.members[&id.name];
            let here = matches!(&m.pg, Pg::Standby { follows: Some(f), .. } if f.upstream.member == *n
                && parse_walreceiver_name(&f.walreceiver).is_some_and(|(known, _)| known == **id));
            here && m.me.id == **id && !m.halted && !m.frozen && m.stalled.is_none() && self.streams(&id.name)
        };
        let mut able: Vec<MemberName> = named.iter().filter(follows).map(|id| id.name.clone()).collect();
        if self.members[n].stalled.is_some() || able.len() < k as usize {
            return false;
        }
        if self.chance(2) {
            able.reverse();
        }
        for name in able.iter().take(k as usize) {
            let m = self.member(name.as_str());
            if let Pg::Standby { timeline: at, history: theirs, replayed, .. } = &mut m.pg {
                (*at, *theirs, *replayed) = (timeline, history.clone(), flushed);
            }
        }
        true
    }

    pub fn commit(&mut self, transaction: &Transaction) -> Option<i64> {
        let holds = transaction.compare.iter().all(|c| self.revision(&c.key) == c.revision);
        if !holds {
            return None;
        }
        self.records.revision += 1;
        let revision = self.records.revision;
        for write in transaction.write.iter().cloned() {
            let r = &mut self.records;
            match write {
                Write::Init(value) => r.init = Entry::Present(Keyed { revision, value }),
                Write::Leader(value) => r.leader = Entry::Present(Keyed { revision, value }),
                Write::Lease(value) => r.lease = Entry::Present(Keyed { revision, value }),
                Write::Sync(value) => r.sync = Entry::Present(Keyed { revision, value }),
                Write::Membership(value) => r.membership = Entry::Present(Keyed { revision, value }),
                Write::Timeline(n, value) => {
                    assert!(r.timelines.insert(n, value).is_none(), "S6: timeline {n} was reserved twice");
                }
                Write::Member(n, value) => {
                    r.members.insert(n, Keyed { revision, value: *value });
                }
                Write::Seal(n, value) => {
                    r.seals.insert(n, Keyed { revision, value });
                }
                Write::Request(value) => {
                    r.requests.insert(value.id.clone(), Keyed { revision, value });
                }
                Write::History(value) => {
                    r.history.insert(value.term, value);
                }
                Write::Delete(Key::Request(id)) => {
                    r.requests.remove(&id);
                }
                Write::Delete(key) => panic!("nobody deletes {key:?}"),
            }
        }
        Some(revision)
    }

    fn revision(&self, key: &Key) -> i64 {
        let r = &self.records;
        match key {
            Key::Init => r.init.revision(),
            Key::Leader => r.leader.revision(),
            Key::Lease => r.lease.revision(),
            Key::Sync => r.sync.revision(),
            Key::Membership => r.membership.revision(),
            Key::Timeline(n) => i64::from(r.timelines.contains_key(n)),
            Key::Member(n) => r.members.get(n).map(|k| k.revision).unwrap_or(0),
            Key::Seal(n) => r.seals.get(n).map(|k| k.revision).unwrap_or(0),
            Key::Request(id) => r.requests.get(id).map(|k| k.revision).unwrap_or(0),
            Key::History(term) => i64::from(r.history.contains_key(term)),
        }
    }
}

fn silent(why: &str) -> Promised {
    Promised::Silent { why: why.to_owned(), granted: None }
}

impl Member {
    pub fn die(&mut self, how: &str) {
        self.die_as(how, false);
    }

    pub fn die_as(&mut self, how: &str, orderly: bool) {
        if !matches!(self.pg, Pg::Down) {
            if let Pg::Standby { timeline, history, replayed: at, .. }
            | Pg::Primary { timeline, history, flushed: at, .. } = &self.pg
            {
                self.disk = (*timeline, history.clone(), *at);
            }
            self.pg = Pg::Down;
            self.exit = Some(Exit { how: how.to_owned(), orderly, start_number: self.starts });
        }
        (self.armed, self.fence) = (None, None);
    }

    fn storage(&self, now: Moment) -> Storage {
        let probe = match self.stalled {
            Some(since) => Probe::Waiting { since },
            None => Probe::Works { at: now, latency_ms: 1 },
        };
        let free_bytes = if self.full { 1 << 20 } else { 100 << 30 };
        let space = Some(Space { free_bytes, total_bytes: 200 << 30 });
        let disk = Disk { path: "/data".to_owned(), probe, space };
        Storage { places: BTreeMap::from([(Place::Data, disk)]), ..Storage::default() }
    }

    fn keep_lease(&mut self, term: Term, revision: i64, sent: Option<Moment>, goes_on: bool) {
        self.holding.keep(term, revision, sent, goes_on);
        self.memory.kept_revision = Some(revision);
    }

    fn drop_lease(&mut self) {
        (self.holding, self.lease, self.memory.kept_revision) = (Holding::default(), LeaseView::None, None);
    }

    /// As the state file counts it.
    fn bond(&mut self, now: Moment) -> Option<Bond> {
        let promise = self.memory.durable.promise.clone()?;
        let until = *self.bound_until.get_or_insert_with(|| now.plus(promise.length()));
        Some(Bond { promise, until })
    }

    /// The agent's answer to a question on the agent port.
    fn promise(&mut self, promise: Promise, view: &View) -> Result<(), String> {
        let now = view.now;
        may_be_given(&promise, &promise.to, view)?;
        let bond = self.bond(now);
        refuses_promise(&self.memory.durable, bond.as_ref(), self.standing, &promise, now)
            .map_err(|d| format!("{d:?}"))?;
        let until = now.plus(promise.length());
        self.bound_until = Some(self.bound_until.map_or(until, |before| before.latest(until)));
        self.memory.durable.promise = Some(promise);
        Ok(())
    }

    fn ended(&mut self, what: JobKind, result: Result<(), &str>, now: Moment) {
        let result = result.map(|()| String::new()).map_err(str::to_owned);
        self.memory = std::mem::take(&mut self.memory).job_ended(&what, &result, now);
    }

    /// A job that does not get to its end, with what it leaves behind.
    fn fails(&mut self, step: &Step, now: Moment) {
        let what = match step {
            Step::Promote { order } => {
                self.die("killed by the guardian: the promotion failed");
                JobKind::Promote { term: order.term }
            }
            Step::Enforce { to, .. } => JobKind::Enforce { to: to.clone() },
            Step::Clone { from } => {
                self.data = DataDirectory::Unfinished { what: "clone".to_owned() };
                JobKind::Clone { from: from.member.clone() }
            }
            Step::Rewind { from, .. } => {
                self.die_as("stopped", true);
                self.data = DataDirectory::Unfinished { what: "rewind".to_owned() };
                JobKind::Rewind { from: from.member.clone() }
            }
            Step::Seal { term, .. } => JobKind::Seal { term: *term },
            Step::Bootstrap => JobKind::Bootstrap,
            Step::RestartInPlace { .. } => JobKind::Restart,
            _ => JobKind::Stop,
        };
        self.ended(what, Err("failed"), now);
    }

    /// The agent's process starts anew: only what is on disk is known.
    pub fn restart_agent(&mut self) {
        let durable = self.memory.durable.clone();
        let held =
            durable.lead.as_ref().filter(|lead| lead.record.holder == self.me.id).map(|lead| lead.record.clone());
        self.memory = Memory { durable, held, ..Memory::default() };
        (self.holding, self.lease) = (Holding::default(), LeaseView::None);
        // A stored promise runs its whole length again.
        (self.bound_until, self.standing) = (None, None);
        (self.peers, self.said, self.refuses, self.frozen) = (BTreeMap::new(), None, false, false);
        self.pending.clear();
        self.agent = true;
        self.me.start_counter += 1;
    }
}

fn present(timeline: u32) -> DataDirectory {
    DataDirectory::Present {
        system_identifier: SYSTEM,
        checkpoint_timeline: TimelineId(timeline),
        version: 15,
        cleanly_stopped: true,
    }
}

fn all_slots(me: &Me) -> BTreeMap<String, Option<Lsn>> {
    me.configured.iter().filter(|n| **n != me.id.name).map(|n| (n.slot(), Some(Lsn(1)))).collect()
}
