//! The machine's clocks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use crate::core::Moment;
use crate::ports::Clock;

#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Moment {
        // A clock that cannot be read has reached every deadline: a holder stops, and a candidate still waits for the
        // other two. Linux has all three since 2.6.39.
        let read = |clock| {
            clock_gettime(clock)
                .ok()
                .and_then(|time| u64::try_from(Duration::from(time).as_nanos()).ok())
                .unwrap_or(u64::MAX)
        };
        Moment {
            raw: read(ClockId::CLOCK_MONOTONIC_RAW),
            monotonic: read(ClockId::CLOCK_MONOTONIC),
            boottime: read(ClockId::CLOCK_BOOTTIME),
        }
    }

    #[allow(clippy::disallowed_methods, reason = "this is the Clock port; the value is for people only")]
    fn unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_clocks_go_forward_and_none_is_the_wall_clock() {
        let before = SystemClock.now();
        std::thread::sleep(Duration::from_millis(2));
        let after = SystemClock.now();
        assert!(after.since(before) >= Duration::from_millis(1));
        assert!(after.boottime / 1_000_000 < SystemClock.unix_ms());
    }
}
