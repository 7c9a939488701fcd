//! Builds views for tests: `cluster().leader("a", 4).standby("b", lag(0)).sync(1, ["b"]).seen_by("b")`.
//!
//! A case shows only what matters to it: everything else has the defaults of a healthy cluster of three at `NOW`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::lease::{Takeover, Timings};
use super::lsn::Lsn;
use super::names::{Incarnation, MemberId, MemberName};
use super::plan::{Follow, Plan, Source, SyncRule, walreceiver_name};
use super::records::*;
use super::storage::{Storage, StoragePolicy};
use super::time::Moment;
use super::timeline::{History, Term, TimelineId};
use super::view::*;

/// The time of every view that is not told another: an hour after boot.
pub const NOW: Moment = Moment::at(3_600_000_000_000);
/// Where the leader's WAL ends.
pub const END: Lsn = Lsn(0x5000_0000);
pub const SYSTEM: u64 = 7_300_000_000_000_000_001;

pub fn name(text: &str) -> MemberName {
    MemberName::new(text).expect("a valid name in a test")
}

/// Incarnations are the first letter, so that they are told apart in messages.
pub fn id(text: &str) -> MemberId {
    MemberId { name: name(text), incarnation: Incarnation(u64::from(text.as_bytes()[0])) }
}

/// A standby's position: so many bytes behind the leader.
pub fn lag(bytes: u64) -> Lsn {
    Lsn(END.0 - bytes)
}

pub fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub fn policy() -> Policy {
    Policy {
        timings: Timings { heartbeat: secs(1), ttl: secs(8), kill_budget: secs(1), renewal_timeout: secs(2) },
        durability: Durability::Sync,
        k: 1,
        max_stall: secs(3),
        max_lag: 1024 * 1024,
        election_wait: Duration::from_millis(500),
        election_give_up: secs(3),
        crash_failover: true,
        crash_max_restarts: 3,
        crash_window: secs(600),
        start_timeout: secs(300),
        stop_timeout: secs(60),
        member_publish: secs(3),
        rejoin_timeout: Duration::from_secs(60),
        reclone: true,
        storage: StoragePolicy::default(),
        takeover: Takeover::default(),
        cold_start_wait: secs(60),
    }
}

/// A cluster as the store and its members would show it.
#[derive(Clone, Debug)]
pub struct Cluster {
    pub now: Moment,
    pub policy: Policy,
    pub configured: Vec<MemberName>,
    pub records: ClusterRecords,
    pub timeline: TimelineId,
    tags: BTreeMap<MemberName, Tags>,
    positions: BTreeMap<MemberName, Lsn>,
    enforced: Option<SyncRule>,
}

/// Three configured members a, b, c; no leader, nobody runs.
pub fn cluster() -> Cluster {
    Cluster {
        now: NOW,
        policy: policy(),
        configured: ["a", "b", "c"].map(name).to_vec(),
        records: ClusterRecords {
            store_id: 1,
            revision: 100,
            init: Entry::Present(Keyed { revision: 1, value: ClusterInit { system_identifier: SYSTEM } }),
            ..ClusterRecords::default()
        },
        timeline: TimelineId(1),
        tags: BTreeMap::new(),
        positions: BTreeMap::new(),
        enforced: None,
    }
}

impl Cluster {
    /// `who` holds the leader record under `term`, and its PostgreSQL is read-write.
    pub fn leader(mut self, who: &str, term: u64) -> Cluster {
        let term = Term(term);
        let last = Published { member: id(who), term, timeline: self.timeline, parent: None, switch: None };
        let leader = LeaderRecord {
            holder: id(who),
            boot_id: format!("boot-{who}"),
            term,
            state: LeaderState::Held,
            ttl_ms: 8_000,
            takeover_ms: 2_000,
            taken: None,
            lsn: None,
            last: Some(last),
        };
        self.records.leader = Entry::Present(Keyed { revision: 50, value: leader });
        self.records.lease =
            Entry::Present(Keyed { revision: 100, value: LeaseRecord { term, seq: 1, lsn: Some(END) } });
        self.positions.insert(name(who), END);
        self.record(who, Role::Primary, "running", END)
    }

    /// `who` is a standby that streams and has replayed up to `at`.
    pub fn standby(mut self, who: &str, at: Lsn) -> Cluster {
        self.positions.insert(name(who), at);
        self.record(who, Role::Standby, "streaming", at)
    }

    /// The published claim: commits wait for `k` of `members`.
    pub fn sync<const N: usize>(mut self, k: u32, members: [&str; N]) -> Cluster {
        let leader = self.records.leader().expect("name the leader first").clone();
        let members: BTreeSet<MemberId> = members.map(id).into();
        let rule = SyncRule::Any { k, members: members.clone(), term: leader.term };
        self.enforced = Some(if k == 0 { SyncRule::Cleared } else { rule });
        let claim = SyncClaim { mode: self.policy.durability, primary: leader.holder, members, k, term: leader.term };
        self.records.sync = Entry::Present(Keyed { revision: 60, value: claim });
        self
    }

    pub fn tags(mut self, who: &str, tags: Tags) -> Cluster {
        if let Some(member) = self.records.members.get_mut(&name(who)) {
            member.value.tags = tags.clone();
        }
        self.tags.insert(name(who), tags);
        self
    }

    pub fn policy(mut self, change: impl FnOnce(&mut Policy)) -> Cluster {
        change(&mut self.policy);
        self
    }

    pub fn records(mut self, change: impl FnOnce(&mut ClusterRecords)) -> Cluster {
        change(&mut self.records);
        self
    }

    fn record(mut self, who: &str, role: Role, state: &str, at: Lsn) -> Cluster {
        let id = id(who);
        let term = self.records.leader().map(|l| l.term).unwrap_or_default();
        let record = MemberRecord {
            incarnation: id.incarnation,
            start_counter: 1,
            boot_id: format!("boot-{who}"),
            data: DataSummary::Present { system_identifier: SYSTEM },
            role,
            state: state.to_owned(),
            timeline: Some(self.timeline),
            received: Some(at),
            replayed: Some(at),
            term,
            host: format!("{who}.example"),
            port: 5432,
            api_url: format!("http://{who}.example:8008"),
            endpoint: None,
            tags: Tags::default(),
            postgres_version: 150018,
            agent_version: "0.1.0".to_owned(),
            pending_restart: false,
            job: None,
            overtaken: None,
            rule: "follower".to_owned(),
            reason: "follows the leader".to_owned(),
            storage: StorageSummary::default(),
            beat: 7,
            witness: true,
            kept: Vec::new(),
        };
        self.records.members.insert(id.name, Keyed { revision: 90, value: record });
        self
    }

    /// The view of `who`'s agent, everything observed just now.
    pub fn seen_by(&self, who: &str) -> View {
        let me = id(who);
        let leader = self.records.leader().filter(|l| l.state == LeaderState::Held);
        let leads = leader.filter(|l| l.holder == me);
        let postgres = match (leads, self.positions.get(&me.name)) {
            (Some(leader), _) => LocalPostgres::Primary(self.primary_facts(leader)),
            (None, Some(at)) => LocalPostgres::Standby(self.standby_facts(&me, leader, *at)),
            (None, None) => LocalPostgres::Down,
        };
        let state = match postgres {
            LocalPostgres::Down => GuardState::Idle { exit: None },
            _ => GuardState::Running { postmaster: 4711, armed: leads.map(|l| l.term) },
        };
        View {
            now: self.now,
            me: Me {
                id: me.clone(),
                boot_id: format!("boot-{who}"),
                start_counter: 1,
                tags: self.tags.get(&me.name).cloned().unwrap_or_default(),
                system_identifier: Some(SYSTEM),
                configured: self.configured.clone(),
                host: format!("{who}.example"),
                port: 5432,
                api_url: format!("http://{who}.example:8008"),
                endpoint: None,
                agent_version: "0.1.0".to_owned(),
            },
            policy: self.policy.clone(),
            local: Local {
                observed_at: self.now,
                data: DataDirectory::Present {
                    system_identifier: SYSTEM,
                    checkpoint_timeline: self.timeline,
                    version: 15,
                    cleanly_stopped: false,
                },
                postgres,
                guard: Guard { state, real_time: true, control_group: true, death_covered: true },
                storage: Storage::default(),
                kept: Vec::new(),
            },
            store: Store::Known { observed_at: self.now, records: Box::new(self.records.clone()) },
            lease: match leads {
                Some(leader) => LeaseView::Held { term: leader.term, deadline: self.now.plus(self.policy.timings.ttl) },
                None => LeaseView::None,
            },
            memory: self.memory(leads.is_some()),
            peers: BTreeMap::new(),
            job: None,
            stopping: false,
        }
    }

    fn memory(&self, leads: bool) -> Memory {
        let term = self.records.leader().map(|l| l.term).unwrap_or_default();
        Memory {
            durable: Durable {
                highest_term: term,
                highest_sync_term: term,
                store_id: 1,
                store_revision: 100,
                ..Durable::default()
            },
            silence: Silence::observe(None, &self.records, self.now),
            beats: self.records.members.iter().map(|(n, m)| (n.clone(), (m.value.beat, self.now))).collect(),
            spoke: self.records.members.keys().map(|n| (n.clone(), self.now)).collect(),
            witness: true,
            enforced: if leads { self.enforced.clone() } else { None },
            ..Memory::default()
        }
    }

    fn primary_facts(&self, leader: &LeaderRecord) -> PrimaryFacts {
        let standbys = self.positions.iter().filter(|(n, _)| **n != leader.holder.name);
        let replicas = standbys.map(|(n, at)| Replica {
            pid: 1000,
            application_name: walreceiver_name(&id(n.as_str()), leader.term),
            state: "streaming".to_owned(),
            flushed: Some(*at),
            replayed: Some(*at),
            sync_priority: 1,
            reply_age_ms: Some(10),
        });
        PrimaryFacts {
            version: 150018,
            system_identifier: SYSTEM,
            timeline: self.timeline,
            history: History::default(),
            flushed: END,
            writable: true,
            rule_text: self.enforced.as_ref().map(ToString::to_string).unwrap_or_default(),
            replicas: replicas.collect(),
            slots: BTreeMap::new(),
            slot_bound: None,
            pending_restart: false,
            exceptions: Vec::new(),
        }
    }

    fn standby_facts(&self, me: &MemberId, leader: Option<&LeaderRecord>, at: Lsn) -> StandbyFacts {
        StandbyFacts {
            version: 150018,
            system_identifier: SYSTEM,
            timeline: self.timeline,
            history: History::default(),
            replayed: at,
            received: Some(at),
            replay_paused: false,
            replay_delay_ms: Some(0),
            follows: leader.map(|leader| Follow {
                upstream: Source {
                    member: leader.holder.name.clone(),
                    host: format!("{}.example", leader.holder.name),
                    port: 5432,
                },
                slot: me.name.slot(),
                walreceiver: walreceiver_name(me, leader.term),
                term: leader.term,
            }),
            receiver: if leader.is_some() { Receiver::Streaming } else { Receiver::None },
            last_message: leader.map(|_| LastMessage { mark: 1, age_ms: 0 }),
            pending_restart: false,
            slots: BTreeMap::new(),
        }
    }
}

/// A plan that does nothing, for whoever shows plans.
pub fn idle() -> Plan {
    Plan::new("follower", "follows the leader")
}
