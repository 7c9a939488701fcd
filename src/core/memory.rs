//! What one round leaves behind for the next: silences, releases, beats, crashes, who has stalled since when.
//!
//! All of it is derived from observations; forgetting it (a restart of the agent) is always safe and only makes the member
//! wait longer. What must not be forgotten is [`Durable`](super::view::Durable), written by the step `Remember`.

use std::collections::BTreeMap;
use std::time::Duration;

use super::election::{Verdict, judge};
use super::names::MemberName;
use super::peers::Peer;
use super::plan::SyncRule;
use super::records::{ClusterRecords, LeaderState, Operation, Outcome};
use super::time::Moment;
use super::timeline::Term;
use super::view::{
    ElectionMemory, Exit, GuardState, HolderMemory, JobKind, Local, LocalPostgres, Me, Memory, OperationMemory, Policy,
    Receiver, SeenRelease, Silence, Store,
};

/// How an end of PostgreSQL begins that the guardian brought about: no crash of PostgreSQL's.
pub const KILLED_BY_GUARDIAN: &str = "killed by the guardian";

/// The first wait after a failed attempt at something long; doubled by each further failure up to a minute.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

impl Memory {
    /// Takes in what this round observed.
    pub fn observe(
        mut self,
        me: &Me,
        policy: &Policy,
        local: &Local,
        store: &Store,
        peers: &BTreeMap<MemberName, Peer>,
        now: Moment,
    ) -> Memory {
        self.observe_exit(&local.guard.state, policy, now);
        self.observe_storage(&local.storage, policy.storage.stall_after, now);
        self.witness &= local.postgres != LocalPostgres::Down;
        if let Store::Known { observed_at, records } = store {
            self.observe_records(records, me, policy, &local.postgres, *observed_at);
            self.observe_holder(records, me, &local.postgres, peers, now);
            self.observe_replicas(records, &local.postgres, policy, now);
            self.observe_promotion(records, me, &local.postgres, now);
        }
        let streaming = local.postgres.standby().is_some_and(|s| s.receiver == Receiver::Streaming);
        let follows = local.postgres.standby().is_some_and(|s| s.follows.is_some());
        self.not_streaming = match (follows, streaming) {
            (true, false) => self.not_streaming.or(Some(now)),
            _ => None,
        };
        if streaming {
            self.rejoin_failures = 0;
            self.copies = 0;
        }
        self.round = Some(now);
        self
    }

    fn observe_exit(&mut self, state: &GuardState, policy: &Policy, now: Moment) {
        self.crashes.retain(|(_, at)| now.since(*at) < policy.crash_window);
        let GuardState::Idle { exit: Some(Exit { how, orderly: false, start_number }) } = state else {
            return;
        };
        let counted = self.crashes.iter().any(|(number, _)| number == start_number) || self.last_exit == *start_number;
        if !counted && !how.starts_with(KILLED_BY_GUARDIAN) {
            self.crashes.push((*start_number, now));
        }
        self.last_exit = *start_number;
    }

    fn observe_records(
        &mut self,
        records: &ClusterRecords,
        me: &Me,
        policy: &Policy,
        postgres: &LocalPostgres,
        observed_at: Moment,
    ) {
        let silent = self.silence;
        self.silence = Silence::observe(self.silence, records, observed_at);
        // Somebody leads or elects just now, and PostgreSQL runs here: what it has is not older than the cluster's end.
        self.witness |= silent.is_some() && silent != self.silence && *postgres != LocalPostgres::Down;
        let leader = records.leader.present();
        self.releases = leader
            .filter(|l| matches!(l.value.state, LeaderState::Released { .. } | LeaderState::Fenced { .. }))
            .map(|l| match self.releases {
                Some(seen) if seen.leader_revision == l.revision => seen,
                _ => SeenRelease { leader_revision: l.revision, first_seen: observed_at },
            });
        if let Some(leader) = leader {
            if leader.value.term != self.term {
                self.begin_term(leader.value.term);
                self.term_since = Some(observed_at);
            }
            if leader.value.term < self.durable.highest_term {
                // An old record came back; ours is kept, to be written again.
            } else if leader.value.holder != me.id {
                self.held = None;
            } else if leader.value.state == LeaderState::Held {
                self.held = Some(leader.value.clone());
            }
        }
        self.observe_election(records, me, policy, postgres, observed_at);
        for (name, record) in &records.members {
            let beat = record.value.beat;
            match self.beats.get(name) {
                Some((known, _)) if *known == beat => {}
                known => {
                    if known.is_some() {
                        self.spoke.insert(name.clone(), observed_at);
                    }
                    self.beats.insert(name.clone(), (beat, observed_at));
                }
            }
        }
        self.beats.retain(|name, _| records.members.contains_key(name));
        self.spoke.retain(|name, _| records.members.contains_key(name));
        self.observe_requests(records, me, observed_at);
    }

    fn observe_holder(
        &mut self,
        records: &ClusterRecords,
        me: &Me,
        postgres: &LocalPostgres,
        peers: &BTreeMap<MemberName, Peer>,
        now: Moment,
    ) {
        let Some(leader) = records.leader() else { return };
        // It reads that its term was taken on suspicion, and is as alive as can be.
        if let Some(taken) = leader.taken.as_ref().filter(|taken| taken.from == me.id && postgres.primary().is_some()) {
            self.overtaken = self.overtaken.max(Some(taken.term));
        }
        let who = (&leader.holder.name, leader.term, self.term_since.unwrap_or(now));
        self.holder = Some(HolderMemory::observe(self.holder.take(), who, postgres, peers.get(who.0), now));
    }

    /// Since when we coordinate, and since when enough are sealed.
    fn observe_election(
        &mut self,
        records: &ClusterRecords,
        me: &Me,
        policy: &Policy,
        postgres: &LocalPostgres,
        now: Moment,
    ) {
        let Some(leader) = records.leader().filter(|l| l.holder == me.id) else {
            self.election = None;
            return;
        };
        let known = self.election.filter(|e| e.term == leader.term);
        let LeaderState::Electing { preferred, winner, .. } = &leader.state else { return };
        if winner.is_some() {
            let since = known.map(|e| e.since).unwrap_or(now);
            self.election = Some(ElectionMemory { term: leader.term, since, enough_since: Some(since), copied: None });
            return;
        }
        let verdict = judge(records, leader, policy.max_lag, preferred.as_ref());
        let enough = matches!(verdict, Verdict::Elected(_));
        let enough_since = known.and_then(|e| e.enough_since).or(enough.then_some(now));
        let at = match &verdict {
            Verdict::Copying(copying) if copying.by == me.id.name => postgres.standby().map(|s| s.replayed),
            Verdict::Copying(copying) => records.members.get(&copying.by).and_then(|m| m.value.replayed),
            Verdict::Elected(_) | Verdict::Waiting { .. } | Verdict::Impossible { .. } => None,
        };
        let before = known.and_then(|e| e.copied);
        let copied = match (at, before) {
            (Some(at), Some((before, since))) if at == before => Some((before, since)),
            (Some(at), _) => Some((at, now)),
            // A verdict between two seals of the same copy.
            (None, before) => before,
        };
        let since = known.map(|e| e.since).unwrap_or(now);
        self.election = Some(ElectionMemory { term: leader.term, since, enough_since, copied });
    }

    /// Everything that belongs to one term only.
    fn begin_term(&mut self, term: Term) {
        self.term = term;
        self.enforced = None;
        self.doubtful_sync = false;
        self.sync_settled = false;
        self.stalled.clear();
        self.streamed.clear();
        self.progress.clear();
        self.left.clear();
        self.end = None;
        self.election = None;
        self.promoted = None;
        self.promotion_failed = None;
        self.phases.clear();
        self.phase_zero = None;
    }

    /// A promotion that an earlier life of this agent carried out: patience with followers begins when it is first seen.
    fn observe_promotion(&mut self, records: &ClusterRecords, me: &Me, postgres: &LocalPostgres, now: Moment) {
        let Some(leader) = records.leader() else { return };
        let mine = matches!(&leader.state, LeaderState::Electing { winner: Some(w), .. } if w.member == me.id);
        if mine && postgres.primary().is_some() {
            self.promoted.get_or_insert((leader.term, now));
        }
    }

    /// The oldest open request that concerns this member, and since when it is known here.
    fn observe_requests(&mut self, records: &ClusterRecords, me: &Me, now: Moment) {
        let leads = records.leader().is_some_and(|l| l.holder == me.id);
        let mine = |what: &Operation| match what {
            Operation::Switchover { .. } | Operation::Failover { .. } => leads,
            Operation::Restart { member } | Operation::Reinit { member } => *member == me.id.name,
        };
        let next = records
            .requests
            .values()
            .filter(|r| r.value.outcome.is_none() && mine(&r.value.what))
            .min_by_key(|r| (r.value.at_unix_ms, r.value.id.clone()));
        self.operation = next.map(|request| match self.operation.take() {
            Some(known) if known.id == request.value.id => known,
            _ => OperationMemory {
                id: request.value.id.clone(),
                phase: "accepted".to_owned(),
                since: now,
                outcome: None,
            },
        });
    }

    /// Takes in how a job ended.
    pub fn job_ended(mut self, what: &JobKind, result: &Result<String, String>, now: Moment) -> Memory {
        let succeeded = result.is_ok();
        match what {
            JobKind::Enforce { to } => self.enforced = succeeded.then(|| to.clone()),
            JobKind::Promote { term } if succeeded => {
                self.promoted = Some((*term, now));
                // The promotion runs under the rule that names nobody (protocol §5 step 5).
                self.enforced = Some(SyncRule::Nobody);
                self.phase("promoted", now);
            }
            JobKind::Seal { .. } if succeeded => self.phase("sealed", now),
            JobKind::Clone { .. } | JobKind::Rewind { .. } if succeeded => {
                self.retry_after = None;
                // Crashes of what was there before say nothing about these data.
                self.crashes.clear();
                self.copies += u32::from(matches!(what, JobKind::Clone { .. }));
            }
            JobKind::Clone { .. } | JobKind::Rewind { .. } | JobKind::Bootstrap => {
                if !succeeded {
                    self.rejoin_failures += 1;
                    self.retry_after = Some(now.plus(retry_delay(self.rejoin_failures)));
                }
            }
            JobKind::Promote { term } => self.promotion_failed = Some(*term),
            JobKind::HandOver { .. } | JobKind::Restart => {
                // Said to whoever asked by the next round (S11).
                if let (Err(why), Some(operation)) = (result, self.operation.as_mut()) {
                    operation.outcome = Some(Outcome::PutBack { message: why.clone() });
                }
            }
            JobKind::Seal { .. } | JobKind::Stop => {}
        }
        self
    }

    /// Notes when a phase of the present change of leader was reached, in milliseconds since its first phase.
    pub fn phase(&mut self, name: &str, now: Moment) {
        let zero = *self.phase_zero.get_or_insert(now);
        let ms = u64::try_from(now.since(zero).as_millis()).unwrap_or(u64::MAX);
        self.phases.entry(name.to_owned()).or_insert(ms);
    }
}

/// 2, 4, 8 … seconds, at most a minute.
pub fn retry_delay(failures: u32) -> Duration {
    FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(5)).min(LONGEST_RETRY)
}
