//! What the endpoint counts: sums, and how many of something there are now (given back when dropped).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::core::endpoint::Report;

#[derive(Debug, Default)]
pub struct Counters {
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    pub cancels: AtomicU64,
    /// Answers that waited for a barrier, and those whose outcome stayed unknown.
    pub doubtful: AtomicU64,
    pub unknown: AtomicU64,
    /// Sessions ended because the gate was shut.
    pub cut: AtomicU64,
    gauges: [AtomicU64; GAUGES],
}

const GAUGES: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gauge {
    Connections = 0,
    /// Waiting for a primary or for a place.
    Waiting = 1,
    Sessions = 2,
    Readers = 3,
    /// Sessions that have named synchronous_commit in their SQL.
    SettingNamed = 4,
}

pub struct Held {
    counters: Arc<Counters>,
    which: Gauge,
}

impl Counters {
    pub fn one(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub fn hold(self: &Arc<Counters>, which: Gauge) -> Held {
        self.gauges[which as usize].fetch_add(1, Ordering::Relaxed);
        Held { counters: self.clone(), which }
    }

    pub fn now(&self, which: Gauge) -> u64 {
        self.gauges[which as usize].load(Ordering::Relaxed)
    }

    pub fn report(&self) -> Report {
        let sum = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Report {
            connections: self.now(Gauge::Connections),
            waiting: self.now(Gauge::Waiting),
            sessions: self.now(Gauge::Sessions),
            readers: self.now(Gauge::Readers),
            setting_named: self.now(Gauge::SettingNamed),
            accepted: sum(&self.accepted),
            refused: sum(&self.refused),
            cancels: sum(&self.cancels),
            doubtful: sum(&self.doubtful),
            unknown: sum(&self.unknown),
            cut: sum(&self.cut),
            ..Report::default()
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.counters.gauges[self.which as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_goes_down_when_it_is_dropped() {
        let counters = Arc::new(Counters::default());
        let held = counters.hold(Gauge::Sessions);
        assert_eq!(counters.report().sessions, 1);
        drop(held);
        assert_eq!(counters.report().sessions, 0);
    }
}
