//! The lease in numbers: T_h, K, W, and who may act until when (protocol §3).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::records::ClusterRecords;
use super::time::Moment;
use super::view::Silence;

/// Largest difference of two machines' clock rates that is covered, in parts per thousand. Crystals are within 0.2;
/// ten leaves fifty times that.
const RATE_ERROR_PER_MILLE: u64 = 10;
const LOOP_PATIENCE_HEARTBEATS: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// H: period of renewals.
    pub heartbeat: Duration,
    /// T_h: how long the holder may act after the sending of a renewal that succeeded.
    pub ttl: Duration,
    /// K: how long before the holder's deadline the guardian begins to kill.
    pub kill_budget: Duration,
    /// Deadline of one renewal; two have to fit.
    pub renewal_timeout: Duration,
}

/// After how much silence a term may be taken without waiting for clocks (protocol §5, way B).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeover {
    /// No heartbeat, no message of its walsender, no answer of its agent.
    pub after: Duration,
    /// The same, when both ports of an address that answered in this term refuse connections.
    pub after_refused: Duration,
}

impl Default for Takeover {
    /// 2 s: two heartbeats may be lost or late, and an agent that is restarted is back. 0.3 s: whoever refuses connections is
    /// not slow but gone; the rest is for a host that is only just coming up or down.
    fn default() -> Takeover {
        Takeover { after: Duration::from_secs(2), after_refused: Duration::from_millis(300) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTimings {
    #[error(
        "takeover.after = {after:?} is too short: takeover.after >= 2 * lease.heartbeat must hold, and 2 * {heartbeat:?} = \
         {needed:?}, so one late renewal would look like silence; raise takeover.after or lower lease.heartbeat"
    )]
    TakeoverTooShort { after: Duration, heartbeat: Duration, needed: Duration },
    #[error(
        "takeover.after = {after:?} is too long: takeover.after <= W must hold, and lease.ttl = {ttl:?} makes W {wait:?}, after \
         which a silent leader is replaced anyway; lower takeover.after to {wait:?} or less"
    )]
    TakeoverTooLong { after: Duration, ttl: Duration, wait: Duration },
    #[error(
        "takeover.after_refused = {after_refused:?} is more than takeover.after = {after:?}: whoever refuses connections would \
         be waited for longer than whoever is silent; lower takeover.after_refused"
    )]
    RefusedTooLong { after_refused: Duration, after: Duration },
    #[error(
        "lease.ttl = {ttl:?} is too short: lease.ttl >= lease.kill_budget + 2 * lease.renewal_timeout + lease.heartbeat \
         must hold, and {kill_budget:?} + 2 * {renewal_timeout:?} + {heartbeat:?} = {needed:?}; raise lease.ttl to at least \
         {needed:?} or lower the others"
    )]
    TtlTooShort {
        ttl: Duration,
        kill_budget: Duration,
        renewal_timeout: Duration,
        heartbeat: Duration,
        needed: Duration,
    },
    #[error("{field} = {value:?} is outside {least:?} to {most:?}")]
    OutOfRange { field: &'static str, value: Duration, least: Duration, most: Duration },
}

impl Timings {
    /// Refuses settings under which two holders could overlap or a single lost renewal would end a term.
    pub fn validate(&self) -> Result<(), InvalidTimings> {
        let range = |field, value, least: Duration, most: Duration| {
            if value < least || value > most {
                Err(InvalidTimings::OutOfRange { field, value, least, most })
            } else {
                Ok(())
            }
        };
        range("lease.heartbeat", self.heartbeat, Duration::from_millis(100), Duration::from_secs(30))?;
        range("lease.ttl", self.ttl, Duration::from_secs(1), Duration::from_secs(300))?;
        range("lease.kill_budget", self.kill_budget, Duration::from_millis(50), Duration::from_secs(30))?;
        range("lease.renewal_timeout", self.renewal_timeout, Duration::from_millis(50), Duration::from_secs(60))?;
        let needed = self.kill_budget + 2 * self.renewal_timeout + self.heartbeat;
        if self.ttl < needed {
            return Err(InvalidTimings::TtlTooShort {
                ttl: self.ttl,
                kill_budget: self.kill_budget,
                renewal_timeout: self.renewal_timeout,
                heartbeat: self.heartbeat,
                needed,
            });
        }
        Ok(())
    }

    /// A decision loop that has not come round for so long is taken for dead: its lease is not renewed, its agent's answers
    /// are none. Every step in the loop has a deadline below this.
    pub fn loop_patience(&self) -> Duration {
        (self.heartbeat * LOOP_PATIENCE_HEARTBEATS).max(Duration::from_secs(3))
    }

    /// D: the holder's deadline, counted from before the renewal was sent.
    pub fn deadline(&self, sent: Moment) -> Moment {
        sent.plus(self.ttl)
    }

    /// F = D − K: when the guardian kills.
    pub fn kill_at(&self, sent: Moment) -> Moment {
        self.deadline(sent).minus(self.kill_budget)
    }

    /// W ≥ T_h · (1 + ρ)/(1 − ρ): how long a candidate waits on its own clocks. `holder_ttl` is what the holder's record
    /// says; whoever runs with other settings is waited for by the longer of both.
    pub fn candidate_wait(&self, holder_ttl: Duration) -> Duration {
        let ttl = self.ttl.max(holder_ttl);
        let nanoseconds = ttl.as_nanos() * u128::from(1000 + RATE_ERROR_PER_MILLE);
        let per = u128::from(1000 - RATE_ERROR_PER_MILLE);
        Duration::from_nanos(u64::try_from(nanoseconds.div_ceil(per)).unwrap_or(u64::MAX))
    }
}

impl InvalidTimings {
    /// The setting that its sentence begins with.
    pub fn field(&self) -> &'static str {
        match self {
            InvalidTimings::TtlTooShort { .. } => "lease.ttl",
            InvalidTimings::TakeoverTooShort { .. } | InvalidTimings::TakeoverTooLong { .. } => "takeover.after",
            InvalidTimings::RefusedTooLong { .. } => "takeover.after_refused",
            InvalidTimings::OutOfRange { field, .. } => field,
        }
    }
}

impl Takeover {
    /// Refuses settings under which a healthy leader would be overtaken, or nobody ever.
    pub fn validate(&self, timings: &Timings) -> Result<(), InvalidTimings> {
        let Takeover { after, after_refused } = *self;
        let needed = 2 * timings.heartbeat;
        if after < needed {
            return Err(InvalidTimings::TakeoverTooShort { after, heartbeat: timings.heartbeat, needed });
        }
        let wait = timings.candidate_wait(timings.ttl);
        if after > wait {
            return Err(InvalidTimings::TakeoverTooLong { after, ttl: timings.ttl, wait });
        }
        if after_refused > after {
            return Err(InvalidTimings::RefusedTooLong { after_refused, after });
        }
        Ok(())
    }

    /// For how long after the sending of a renewal the gate may let anything pass: takeover.after · (1 − ρ)/(1 + ρ). Whoever
    /// takes over counts `after` from when it saw that renewal, which is later (S4).
    pub fn gate(&self) -> Duration {
        let nanoseconds = self.after.as_nanos() * u128::from(1000 - RATE_ERROR_PER_MILLE);
        let per = u128::from(1000 + RATE_ERROR_PER_MILLE);
        Duration::from_nanos(u64::try_from(nanoseconds / per).unwrap_or(u64::MAX))
    }
}

impl Silence {
    /// The silence as this reading continues it: the same lease goes on being silent, anything else starts anew.
    pub fn observe(previous: Option<Silence>, records: &ClusterRecords, observed_at: Moment) -> Option<Silence> {
        let leader = records.leader.present()?;
        let seq = match records.lease.value() {
            Some(lease) if lease.term == leader.value.term => lease.seq,
            // Not renewed yet, unreadable or of another term: the record's own revision is the sign of life.
            _ => 0,
        };
        let (term, leader_revision) = (leader.value.term, leader.revision);
        let now = Silence { term, leader_revision, seq, first_seen: observed_at, renewed: false };
        match previous.filter(|p| (p.term, p.leader_revision) == (term, leader_revision)) {
            Some(p) if p.seq == seq => Some(p),
            Some(_) => Some(Silence { renewed: true, ..now }),
            None => Some(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Timings {
        Timings {
            heartbeat: Duration::from_secs(1),
            ttl: Duration::from_secs(8),
            kill_budget: Duration::from_secs(1),
            renewal_timeout: Duration::from_secs(2),
        }
    }

    #[test]
    fn candidate_outwaits_every_holder_whatever_the_clock_rates() {
        for ttl_ms in [1_000, 3_000, 8_000, 24_000] {
            let timings = Timings { ttl: Duration::from_millis(ttl_ms), ..defaults() };
            let wait = timings.candidate_wait(timings.ttl).as_secs_f64();
            // Slowest holder, fastest candidate: W/(1+ρ) >= T_h/(1−ρ) in true time.
            assert!(wait / 1.01 >= timings.ttl.as_secs_f64() / 0.99);
        }
        assert!(defaults().candidate_wait(Duration::from_secs(8)) <= Duration::from_millis(8_200));
    }

    #[test]
    fn candidate_waits_by_the_longer_of_both_settings() {
        assert!(defaults().candidate_wait(Duration::from_secs(20)) > Duration::from_secs(20));
    }

    #[test]
    fn the_gate_is_shut_before_anybody_takes_over_whatever_the_clock_rates() {
        for ms in [200, 2_000, 60_000] {
            let takeover = Takeover { after: Duration::from_millis(ms), ..Takeover::default() };
            // Slowest holder, fastest candidate.
            assert!(takeover.gate().as_secs_f64() / 0.99 <= takeover.after.as_secs_f64() / 1.01);
        }
        assert!(Takeover::default().gate() > Duration::from_millis(1_950));
    }

    #[test]
    fn takeover_settings_are_refused_with_the_inequality() {
        let check = |after, refused| {
            let takeover =
                Takeover { after: Duration::from_millis(after), after_refused: Duration::from_millis(refused) };
            takeover.validate(&defaults()).map_err(|error| error.to_string())
        };
        assert_eq!(check(2_000, 300), Ok(()));
        assert!(check(1_900, 300).unwrap_err().contains("2 * 1s = 2s"));
        assert!(check(8_200, 300).unwrap_err().contains("makes W 8.1"));
        assert!(check(2_000, 2_001).unwrap_err().contains("after_refused = 2.001s is more than takeover.after = 2s"));
    }

    #[test]
    fn guardian_fires_before_the_deadline() {
        let sent = Moment::at(5_000_000_000);
        assert_eq!(defaults().deadline(sent), Moment::at(13_000_000_000));
        assert_eq!(defaults().kill_at(sent), Moment::at(12_000_000_000));
    }

    #[test]
    fn settings_that_leave_no_second_try_are_refused_with_the_inequality() {
        let timings = Timings { ttl: Duration::from_secs(5), ..defaults() };
        let message = timings.validate().unwrap_err().to_string();
        assert!(message.contains("1s + 2 * 2s + 1s = 6s"), "{message}");
        assert!(defaults().validate().is_ok());
    }
}
