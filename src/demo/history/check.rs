//! The judgement over a history: a pure function.
//!
//! A timeline stands for the term under which it was opened: each has exactly one primary, and a later term has a higher
//! one. What a client saw of an append that was never acknowledged may vanish with its primary: PostgreSQL shows a commit
//! to others before its standbys have it. Everything else that vanishes, comes twice or comes late is an anomaly.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use super::{Key, Op, Outcome, Value, What};

#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// `async`: what was acknowledged before the next primary's first acknowledgement may be lost.
    pub may_lose: bool,
}

/// Something that no correct cluster may do, with the operations that show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anomaly {
    /// Acknowledged, and not in the surviving history (S2).
    Lost { append: Op },
    /// Acknowledged under an older timeline after a newer one had acknowledged, and asked for after that, or not part of
    /// its history (S1).
    DualPrimary { older: Op, newer: Op },
    /// Two members acknowledged under one timeline (S6).
    SharedTimeline { one: Op, other: Op },
    /// A member wrote under an older timeline than it had before.
    EpochWentBack { before: Op, after: Op },
    /// One value twice in a list.
    Duplicate { key: Key, value: Value },
    /// A value that nobody appended, or whose append certainly failed.
    Phantom { key: Key, value: Value },
    /// Two lists of one key that are not of one order.
    Reordered { first: Op, second: Op },
    /// A read of a primary without a value that had been acknowledged before the read began (S4).
    StaleRead { read: Op, missing: Op },
    /// A connection, or primaries one after the other, showed less than before.
    ReadWentBack { first: Op, second: Op },
}

impl Anomaly {
    pub fn kind(&self) -> &'static str {
        match self {
            Anomaly::Lost { .. } => "lost",
            Anomaly::DualPrimary { .. } => "dual primary",
            Anomaly::SharedTimeline { .. } => "shared timeline",
            Anomaly::EpochWentBack { .. } => "epoch went back",
            Anomaly::Duplicate { .. } => "duplicate",
            Anomaly::Phantom { .. } => "phantom",
            Anomaly::Reordered { .. } => "reordered",
            Anomaly::StaleRead { .. } => "stale read",
            Anomaly::ReadWentBack { .. } => "read went back",
        }
    }

    /// Two members that acknowledge where one may.
    pub fn is_dual(&self) -> bool {
        matches!(self, Anomaly::DualPrimary { .. } | Anomaly::SharedTimeline { .. } | Anomaly::EpochWentBack { .. })
    }
}

/// What was counted on the way; also which member wrote which timeline, and when.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Summary {
    pub acknowledged: usize,
    pub failed: usize,
    pub unknown: usize,
    /// Appends of unknown outcome that are there.
    pub unknown_present: usize,
    pub reads: usize,
    /// Acknowledged and gone, where the rules allow it.
    pub lost_by_rule: usize,
    /// Values that were read, never acknowledged, and are gone: no anomaly.
    pub seen_and_gone: usize,
    /// Timeline → member, first and last acknowledgement in milliseconds.
    pub timelines: BTreeMap<u32, (String, u64, u64)>,
}

#[derive(Clone, Debug, Default)]
pub struct Verdict {
    pub anomalies: Vec<Anomaly>,
    pub summary: Summary,
}

impl Verdict {
    pub fn lost(&self) -> usize {
        self.anomalies.iter().filter(|a| matches!(a, Anomaly::Lost { .. })).count()
    }

    pub fn dual(&self) -> usize {
        self.anomalies.iter().filter(|a| a.is_dual()).count()
    }
}

/// Order of `ops` does not matter.
pub fn check(ops: &[Op], rules: Rules) -> Verdict {
    let mut appends = BTreeMap::new();
    let mut finals = BTreeMap::new();
    for op in ops {
        match &op.what {
            What::Append { value, .. } => drop(appends.insert(*value, op)),
            What::Final { key, values } if op.ok().is_some() => drop(finals.insert(*key, values.as_slice())),
            What::Read { .. } | What::Final { .. } => {}
        }
    }
    let mut court = Court { appends, finals, rules, verdict: Verdict::default() };
    court.count(ops);
    court.terms(ops);
    court.losses();
    court.lists(ops);
    court.verdict
}

struct Court<'a> {
    appends: BTreeMap<Value, &'a Op>,
    finals: BTreeMap<Key, &'a [Value]>,
    rules: Rules,
    verdict: Verdict,
}

impl<'a> Court<'a> {
    fn found(&mut self, anomaly: Anomaly) {
        self.verdict.anomalies.push(anomaly);
    }

    fn count(&mut self, ops: &[Op]) {
        let summary = &mut self.verdict.summary;
        for op in ops {
            match (&op.what, &op.outcome) {
                (What::Append { .. }, Outcome::Ok { .. }) => summary.acknowledged += 1,
                (What::Append { .. }, Outcome::Failed { .. }) => summary.failed += 1,
                (What::Append { key, value }, Outcome::Unknown { .. }) => {
                    summary.unknown += 1;
                    let there = self.finals.get(key).is_some_and(|list| list.contains(value));
                    summary.unknown_present += usize::from(there);
                }
                (What::Read { .. }, Outcome::Ok { .. }) => summary.reads += 1,
                (What::Read { .. } | What::Final { .. }, _) => {}
            }
        }
    }

    /// `None`: the key was not read at the end.
    fn survived(&self, append: &Op) -> Option<bool> {
        let What::Append { key, value } = &append.what else { return None };
        self.finals.get(key).map(|list| list.contains(value))
    }

    // === Who acknowledged when ===

    fn terms(&mut self, ops: &'a [Op]) {
        let mut acknowledged: Vec<(&Op, u32, u64)> = ops
            .iter()
            .filter(|op| matches!(op.what, What::Append { .. }))
            .filter_map(|op| Some((op, op.ok()??, op.completed?)))
            .collect();
        acknowledged.sort_by_key(|(_, _, completed)| *completed);
        let mut first: BTreeMap<u32, &Op> = BTreeMap::new();
        let mut latest: BTreeMap<&str, (&Op, u32)> = BTreeMap::new();
        let mut shared = BTreeSet::new();
        for (op, timeline, completed) in &acknowledged {
            let ms = completed / 1_000_000;
            let line = self.verdict.summary.timelines.entry(*timeline).or_insert((op.member.clone(), ms, ms));
            line.2 = ms;
            let opened = *first.entry(*timeline).or_insert(op);
            if opened.member != op.member && shared.insert(*timeline) {
                self.found(Anomaly::SharedTimeline { one: opened.clone(), other: (*op).clone() });
            }
            let before = latest.entry(&op.member).or_insert((op, *timeline));
            let back =
                (*timeline < before.1 && op.invoked > before.0.completed.unwrap_or(u64::MAX)).then_some(before.0);
            if *timeline >= before.1 {
                *before = (op, *timeline);
            }
            if let Some(before) = back {
                self.found(Anomaly::EpochWentBack { before: before.clone(), after: (*op).clone() });
            }
            // `acknowledged` is in the order of completion, so whoever is in `first` had acknowledged before.
            for newer in first.range(timeline + 1..).map(|(_, newer)| *newer).collect::<Vec<_>>() {
                let asked_after = op.invoked > newer.completed.unwrap_or(u64::MAX);
                if (asked_after || self.survived(op) == Some(false)) && newer.member != op.member {
                    self.found(Anomaly::DualPrimary { older: (*op).clone(), newer: newer.clone() });
                    break;
                }
            }
        }
    }

    fn losses(&mut self) {
        let lost: Vec<&Op> =
            self.appends.values().filter(|op| op.ok().is_some() && self.survived(op) == Some(false)).copied().collect();
        if self.rules.may_lose {
            self.verdict.summary.lost_by_rule = lost.len();
            return;
        }
        for append in lost {
            self.found(Anomaly::Lost { append: append.clone() });
        }
    }

    // === What was read ===

    fn lists(&mut self, ops: &'a [Op]) {
        let mut by_key: BTreeMap<Key, Vec<&Op>> = BTreeMap::new();
        for op in ops.iter().filter(|op| op.ok().is_some()) {
            by_key.entry(op.key()).or_default().push(op);
        }
        let mut gone = BTreeSet::new();
        for (key, mut ops) in by_key {
            ops.sort_by_key(|op| op.invoked);
            self.contents(key, &ops);
            self.order(&ops);
            for (index, second) in ops.iter().enumerate() {
                for first in &ops[..index] {
                    self.pair(first, second, &mut gone);
                }
            }
        }
        self.verdict.summary.seen_and_gone = gone.len();
    }

    fn contents(&mut self, key: Key, ops: &[&Op]) {
        let mut reported = BTreeSet::new();
        for list in ops.iter().filter_map(|op| list(op)) {
            let mut seen = BTreeSet::new();
            for value in list {
                if !seen.insert(*value) && reported.insert(*value) {
                    self.found(Anomaly::Duplicate { key, value: *value });
                }
                let appended = self.appends.get(value);
                let ours = appended.is_some_and(|op| op.key() == key && !matches!(op.outcome, Outcome::Failed { .. }));
                if !ours && reported.insert(*value) {
                    self.found(Anomaly::Phantom { key, value: *value });
                }
            }
        }
    }

    /// All lists of a key are of one order, where they hold the same values.
    fn order(&mut self, ops: &[&Op]) {
        let Some(longest) = ops
            .iter()
            .filter(|op| list(op).is_some())
            .max_by_key(|op| (matches!(op.what, What::Final { .. }), list(op).map_or(0, <[Value]>::len)))
        else {
            return;
        };
        let place: BTreeMap<Value, usize> =
            list(longest).into_iter().flatten().enumerate().map(|(index, value)| (*value, index)).collect();
        for op in ops {
            let places: Vec<usize> = list(op).into_iter().flatten().filter_map(|v| place.get(v).copied()).collect();
            if places.windows(2).any(|pair| pair[0] > pair[1]) {
                self.found(Anomaly::Reordered { first: (*op).clone(), second: (*longest).clone() });
                return;
            }
        }
    }

    /// `first` was asked before `second`.
    fn pair(&mut self, first: &Op, second: &Op, gone: &mut BTreeSet<Value>) {
        let (Some(later), Some(done)) = (list(second), first.completed) else { return };
        if matches!(second.what, What::Final { .. }) || done >= second.invoked {
            if matches!(second.what, What::Final { .. }) {
                gone.extend(list(first).into_iter().flatten().filter(|value| !later.contains(value)));
            }
            return;
        }
        let on_primary = |op: &Op| op.ok().flatten().is_some();
        match &first.what {
            What::Append { value, .. } if on_primary(second) && !later.contains(value) => {
                // What is lost by rule is missing in every later read, of primaries of later timelines.
                let lawful = self.rules.may_lose && second.ok().flatten() > first.ok().flatten();
                if !lawful {
                    self.found(Anomaly::StaleRead { read: second.clone(), missing: first.clone() });
                }
            }
            What::Read { values, .. } => {
                let one_line = first.session == second.session || (on_primary(first) && on_primary(second));
                // Never acknowledged, and its primary is gone: others saw it too early, that is all.
                let vanished = |value: &Value| {
                    let acknowledged = self.appends.get(value).is_some_and(|op| {
                        op.ok().is_some() && !self.rules.may_lose && op.completed.is_some_and(|at| at < second.invoked)
                    });
                    !acknowledged && second.ok().flatten() > first.ok().flatten()
                };
                let missing: Vec<&Value> = values.iter().filter(|value| !later.contains(value)).collect();
                if one_line && missing.iter().any(|value| !vanished(value)) {
                    self.found(Anomaly::ReadWentBack { first: first.clone(), second: second.clone() });
                }
            }
            What::Append { .. } | What::Final { .. } => {}
        }
    }
}

fn list(op: &Op) -> Option<&[Value]> {
    match &op.what {
        What::Read { values, .. } | What::Final { values, .. } => Some(values),
        What::Append { .. } => None,
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |at: u64| at / 1_000_000;
        match &self.what {
            What::Append { key, value } => write!(f, "append of {value} to {key}")?,
            What::Read { key, values } => write!(f, "read of {key} ({} values)", values.len())?,
            What::Final { key, values } => write!(f, "last read of {key} ({} values)", values.len())?,
        }
        write!(f, " by client {} at {}, asked at {} ms", self.client, self.member, ms(self.invoked))?;
        match (&self.outcome, self.completed) {
            (Outcome::Ok { timeline: Some(timeline) }, Some(at)) => {
                write!(f, ", answered at {} ms on timeline {timeline}", ms(at))
            }
            (Outcome::Ok { .. }, Some(at)) => write!(f, ", answered at {} ms by a standby", ms(at)),
            (Outcome::Failed { why }, _) => write!(f, ", failed: {why}"),
            (Outcome::Unknown { why }, _) => write!(f, ", outcome unknown: {why}"),
            (Outcome::Ok { .. }, None) => f.write_str(", never answered"),
        }
    }
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Anomaly::Lost { append } => write!(f, "acknowledged and lost: {append}"),
            Anomaly::DualPrimary { older, newer } => {
                write!(f, "acknowledged by an older primary ({older}) after a newer one had ({newer})")
            }
            Anomaly::SharedTimeline { one, other } => write!(f, "two members on one timeline: {one}; {other}"),
            Anomaly::EpochWentBack { before, after } => write!(f, "a member went back: {before}; then {after}"),
            Anomaly::Duplicate { key, value } => write!(f, "{value} is twice in {key}"),
            Anomaly::Phantom { key, value } => write!(f, "{value} in {key} was never appended, or its append failed"),
            Anomaly::Reordered { first, second } => write!(f, "two orders: {first}; {second}"),
            Anomaly::StaleRead { read, missing } => write!(f, "stale: {read}, without {missing}"),
            Anomaly::ReadWentBack { first, second } => write!(f, "less than before: {first}; then {second}"),
        }
    }
}
