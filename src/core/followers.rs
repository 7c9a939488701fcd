//! Which followers acknowledge, as their leader sees them: who streams is not enough. A walreceiver that was stopped, a
//! frozen disk and a half-open connection all leave a row in state `streaming` whose flush position stands still.
//!
//! ```text
//! fine ──(does not stream, or stands still while there is more)──► stalled since it was last seen fine
//!   ▲                                                                  │ sync.max_stall
//!   └──(fine for long enough: `may_return`)── left the set ◄───────────┘
//! ```

use std::time::Duration;

use super::Lsn;
use super::names::MemberId;
use super::plan::parse_walreceiver_name;
use super::records::ClusterRecords;
use super::time::Moment;
use super::timeline::Term;
use super::view::{Left, LocalPostgres, Memory, Policy, PrimaryFacts, Progress, View};

/// The longest that a member has to be fine before it returns.
const MAX_RETURN: Duration = Duration::from_secs(60);
/// Who left the set this often within it has to be fine for longer each time.
const REMEMBERED: Duration = Duration::from_secs(600);

impl Memory {
    pub(super) fn observe_replicas(
        &mut self,
        records: &ClusterRecords,
        postgres: &LocalPostgres,
        policy: &Policy,
        now: Moment,
    ) {
        let (Some(primary), Some(claim)) = (postgres.primary(), records.sync.value()) else {
            self.stalled.clear();
            return;
        };
        self.observe_progress(primary, policy.timings.heartbeat * 2, now);
        for id in &claim.members {
            let fine_at = self.progress.get(&id.name).map(|p| p.fine_at);
            if streams(primary, id, self.term) && fine_at == Some(now) {
                self.stalled.remove(&id.name);
                continue;
            }
            // Counted from the last time that it was seen fine, which is before the first commit that waits for it. When the
            // loop did not look for long, from now: what happened meanwhile is not known.
            let looked = fine_at.filter(|at| now.since(*at) <= policy.timings.heartbeat * 2);
            let since = *self.stalled.entry(id.name.clone()).or_insert(looked.unwrap_or(now));
            if now.since(since) >= policy.max_stall {
                let left = self.left.entry(id.name.clone()).or_insert(Left { stalled: since, times: 0 });
                if left.times == 0 || left.stalled != since {
                    *left = Left { stalled: since, times: left.times + 1 };
                }
            }
        }
        self.stalled.retain(|name, _| claim.members.iter().any(|id| id.name == *name));
        self.left.retain(|_, left| now.since(left.stalled) < REMEMBERED);
    }

    fn observe_progress(&mut self, primary: &PrimaryFacts, recently: Duration, now: Moment) {
        let mut there = Vec::new();
        for replica in primary.replicas.iter().filter(|replica| replica.state == "streaming") {
            let Some((id, term)) = parse_walreceiver_name(&replica.application_name) else { continue };
            if term != self.term {
                continue;
            }
            let flushed = replica.flushed.unwrap_or_default();
            let known = self.progress.get(&id.name);
            let complete = self.end.is_none_or(|end| flushed >= end);
            let fine = complete || known.is_none_or(|p| flushed > p.flushed);
            let (fine_at, fine_since) = match known {
                // Between two rounds a few milliseconds apart nothing may have come: that ends no good run.
                Some(p) if !fine => (p.fine_at, p.fine_since.filter(|_| now.since(p.fine_at) < recently)),
                known => (now, known.and_then(|p| p.fine_since).or(Some(now))),
            };
            self.progress.insert(id.name.clone(), Progress { flushed, fine_at, fine_since });
            // Kept with the moment, not replaced: our own session can outlive the walsenders by an instant when the
            // postmaster dies, and then sees nobody.
            self.streamed.insert(id.name.clone(), (flushed, now));
            there.push(id.name);
        }
        for (name, progress) in &mut self.progress {
            if !there.contains(name) {
                progress.fine_since = None;
            }
        }
        self.end = Some(primary.flushed);
    }

    /// A member that did not acknowledge returns after it has been fine for `max_stall`, twice as long each further time:
    /// one that comes and goes would stall commits again and again.
    pub fn may_return(&self, id: &MemberId, policy: &Policy, now: Moment) -> bool {
        let Some(left) = self.left.get(&id.name) else { return true };
        let wait = policy.max_stall.saturating_mul(1 << left.times.saturating_sub(1).min(5)).min(MAX_RETURN);
        let fine_since = self.progress.get(&id.name).and_then(|p| p.fine_since);
        fine_since.is_some_and(|since| now.since(since) >= wait)
    }
}

/// Does `id` stream from here under this term? A walreceiver of another term counts for nothing.
pub fn streams(primary: &PrimaryFacts, id: &MemberId, term: Term) -> bool {
    primary.replicas.iter().any(|replica| {
        replica.state == "streaming" && parse_walreceiver_name(&replica.application_name) == Some((id.clone(), term))
    })
}

/// Streams, and has not stood still for `max_stall`.
pub fn acknowledges(view: &View, primary: &PrimaryFacts, id: &MemberId, term: Term) -> bool {
    let stands_still =
        view.memory.progress.get(&id.name).is_some_and(|p| view.now.since(p.fine_at) >= view.policy.max_stall);
    streams(primary, id, term) && !stands_still
}

/// How far `id` has flushed, by its row here.
pub fn flushed(primary: &PrimaryFacts, id: &MemberId) -> Option<Lsn> {
    let row = primary
        .replicas
        .iter()
        .find(|r| parse_walreceiver_name(&r.application_name).is_some_and(|(found, _)| found == *id));
    row.and_then(|row| row.flushed)
}
