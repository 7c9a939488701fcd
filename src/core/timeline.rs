//! Terms and timelines: the cluster's count of leaders, and PostgreSQL's count of histories.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::lsn::Lsn;
use super::records::TimelineReservation;

/// The fencing token: +1 by compare-and-set at every change of leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Term(pub u64);

impl Term {
    pub fn next(self) -> Term {
        Term(self.0 + 1)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// PostgreSQL's timeline number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(pub u32);

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One line of a history file: `timeline` was left at `switch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HistoryEntry {
    pub timeline: TimelineId,
    pub switch: Lsn,
}

/// The ancestors of a timeline, oldest first, each with the position where it was left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct History(pub Vec<HistoryEntry>);

impl History {
    /// The ancestors of `timeline` as the reserved timelines of the store tell them; `None` when a link is missing
    /// (unknown is not "no ancestors": S12). The first timeline of a cluster has none and no reservation.
    pub fn from_reservations(
        timeline: TimelineId,
        reservations: &BTreeMap<TimelineId, TimelineReservation>,
    ) -> Option<History> {
        let mut entries = Vec::new();
        let mut at = timeline;
        while let Some(reservation) = reservations.get(&at) {
            // A parent is always an older number; anything else is a damaged record.
            if reservation.parent >= at {
                return None;
            }
            entries.push(HistoryEntry { timeline: reservation.parent, switch: reservation.switch });
            at = reservation.parent;
        }
        if at != TimelineId(1) {
            return None;
        }
        entries.reverse();
        Some(History(entries))
    }

    /// Where this history leaves `timeline`, if `timeline` is among the ancestors.
    pub fn switch_from(&self, timeline: TimelineId) -> Option<Lsn> {
        self.0.iter().find(|e| e.timeline == timeline).map(|e| e.switch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::timeline::Term;

    fn reserve(parent: u32, switch: u64) -> TimelineReservation {
        TimelineReservation { term: Term(1), parent: TimelineId(parent), switch: Lsn(switch) }
    }

    #[test]
    fn history_follows_the_reservations_down_to_the_first_timeline() {
        let reservations = BTreeMap::from([(TimelineId(2), reserve(1, 100)), (TimelineId(4), reserve(2, 200))]);
        let history = History::from_reservations(TimelineId(4), &reservations).unwrap();
        assert_eq!(history.switch_from(TimelineId(1)), Some(Lsn(100)));
        assert_eq!(history.switch_from(TimelineId(2)), Some(Lsn(200)));
        assert_eq!(history.switch_from(TimelineId(3)), None);
        assert_eq!(History::from_reservations(TimelineId(1), &reservations), Some(History::default()));
    }

    #[test]
    fn a_missing_or_damaged_link_is_unknown() {
        let reservations = BTreeMap::from([(TimelineId(4), reserve(3, 200))]);
        assert_eq!(History::from_reservations(TimelineId(4), &reservations), None);
        let circle = BTreeMap::from([(TimelineId(4), reserve(4, 200))]);
        assert_eq!(History::from_reservations(TimelineId(4), &circle), None);
    }
}
