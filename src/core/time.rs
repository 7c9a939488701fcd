//! Time without a wall clock: three monotonic clocks read together.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One reading of the machine's monotonic clocks, in nanoseconds. MONOTONIC is slewed by NTP, MONOTONIC_RAW stops in
/// suspend, BOOTTIME is slewed but runs through suspend: none is right alone. A holder must stop when *any* of them says
/// that its time is over, a candidate may act only when *all* of them say so (protocol §3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Moment {
    pub raw: u64,
    pub monotonic: u64,
    pub boottime: u64,
}

impl Moment {
    /// All three clocks at the same value: for tests and models.
    pub const fn at(nanoseconds: u64) -> Moment {
        Moment { raw: nanoseconds, monotonic: nanoseconds, boottime: nanoseconds }
    }

    pub fn plus(self, span: Duration) -> Moment {
        let span = nanoseconds(span);
        Moment {
            raw: self.raw.saturating_add(span),
            monotonic: self.monotonic.saturating_add(span),
            boottime: self.boottime.saturating_add(span),
        }
    }

    pub fn minus(self, span: Duration) -> Moment {
        let span = nanoseconds(span);
        Moment {
            raw: self.raw.saturating_sub(span),
            monotonic: self.monotonic.saturating_sub(span),
            boottime: self.boottime.saturating_sub(span),
        }
    }

    /// Holder's question: does any clock say that `deadline` is reached?
    pub fn any_reached(self, deadline: Moment) -> bool {
        self.raw >= deadline.raw || self.monotonic >= deadline.monotonic || self.boottime >= deadline.boottime
    }

    /// Candidate's question: do all clocks say that `deadline` is reached?
    pub fn all_reached(self, deadline: Moment) -> bool {
        self.raw >= deadline.raw && self.monotonic >= deadline.monotonic && self.boottime >= deadline.boottime
    }

    /// Time since `earlier` that every clock agrees has passed at least.
    pub fn since(self, earlier: Moment) -> Duration {
        let least = (self.raw.saturating_sub(earlier.raw))
            .min(self.monotonic.saturating_sub(earlier.monotonic))
            .min(self.boottime.saturating_sub(earlier.boottime));
        Duration::from_nanos(least)
    }

    /// Time left until `deadline` as the most impatient clock sees it; zero when reached.
    pub fn until(self, deadline: Moment) -> Duration {
        let least = (deadline.raw.saturating_sub(self.raw))
            .min(deadline.monotonic.saturating_sub(self.monotonic))
            .min(deadline.boottime.saturating_sub(self.boottime));
        Duration::from_nanos(least)
    }

    /// The later of two, clock by clock.
    pub fn latest(self, other: Moment) -> Moment {
        Moment {
            raw: self.raw.max(other.raw),
            monotonic: self.monotonic.max(other.monotonic),
            boottime: self.boottime.max(other.boottime),
        }
    }
}

fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holder_stops_at_the_first_clock_and_candidate_waits_for_the_last() {
        let deadline = Moment::at(100);
        let one_clock_there = Moment { raw: 100, monotonic: 99, boottime: 99 };
        assert!(one_clock_there.any_reached(deadline));
        assert!(!one_clock_there.all_reached(deadline));
        assert!(Moment::at(100).all_reached(deadline));
    }
}
