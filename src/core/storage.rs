//! What is known of the file systems under a member's data without touching them, and what follows from it (L4).
//!
//! A process of its own writes and fsyncs beside the WAL (`storage/probe.rs`); here is what its progress means. Two things
//! are told apart: *trouble* (a write does not return, or fails), which a leader cannot lead with, and *full*, with which it
//! leads on as long as PostgreSQL does.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::time::Moment;
use super::view::{Memory, View};

/// Where a member writes. `Wal` only where pg_wal is on another file system than the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    Data,
    Wal,
    State,
}

impl Place {
    /// PostgreSQL cannot commit without it. The state file is only needed for what an agent promises.
    fn holds_data(self) -> bool {
        match self {
            Place::Data | Place::Wal => true,
            Place::State => false,
        }
    }
}

/// Empty: nothing is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Storage {
    pub places: BTreeMap<Place, Disk>,
    /// Size of the data directory without its WAL, as a copy of it would have; counted now and then.
    pub data_bytes: Option<u64>,
    /// Size of the data directories that were set aside beside it.
    pub aside_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    pub path: String,
    pub probe: Probe,
    pub space: Option<Space>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    pub free_bytes: u64,
    pub total_bytes: u64,
}

/// How far the probe came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Probe {
    /// It does not run, was stopped, or has not written yet: no word about the disk (S12).
    Unknown { why: String },
    /// Its last write was on disk then, and took so long.
    Works { at: Moment, latency_ms: u64 },
    /// A write that began then has not returned.
    Waiting { since: Moment },
    /// No write has succeeded since then.
    Failed { since: Moment, failure: Failure, why: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// EIO and its like: what was written may be lost.
    Io,
    ReadOnly,
    /// ENOSPC, EDQUOT.
    Full,
    /// Nothing that says something about the disk (rights, a missing directory).
    Other,
}

/// Settings of `[storage]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoragePolicy {
    /// A write that does not return for so long is a stall.
    pub stall_after: Duration,
    /// With less than this PostgreSQL is not started and nobody hands over to this member.
    pub min_free: u64,
    /// Set-aside data directories may take this much.
    pub set_aside_budget: u64,
    /// Bound the WAL that slots keep by the free space; false: the operator set a bound.
    pub bound_slots: bool,
}

impl Default for StoragePolicy {
    fn default() -> StoragePolicy {
        StoragePolicy {
            // Probe period (1 s) + this + one round of the loop at its worst (1.5 s) + an election (1 s) = 7.5 s: within
            // the 8 s that protocol §9 gives to a stall as a client sees it. Halved it would take a slow checkpoint for a
            // stall, doubled it would miss the bound.
            stall_after: Duration::from_secs(4),
            min_free: 64 << 20,
            set_aside_budget: 20 << 30,
            bound_slots: true,
        }
    }
}

/// Why a member cannot lead with its disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Trouble {
    pub place: Place,
    path: String,
    lasts: Duration,
    /// `None`: stalled.
    failure: Option<String>,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lasts = self.lasts.as_secs_f64();
        match &self.failure {
            None => write!(f, "the disk under {} is stalled: a write has not returned for {lasts:.1} s", self.path),
            Some(why) => write!(f, "nothing can be written to {} for {lasts:.1} s: {why}", self.path),
        }
    }
}

/// The disk under the data stalls or fails for longer than `stall_after`. A disk that is merely full is no trouble here:
/// PostgreSQL goes on as long as it has WAL to reuse, and says itself when it cannot.
pub fn trouble(view: &View) -> Option<Trouble> {
    worst(view, |place, failure| place.holds_data() && failure != Some(Failure::Full))
}

/// The state directory takes no writes: nothing can be promised or sealed.
pub fn no_memory(view: &View) -> Option<Trouble> {
    worst(view, |place, _| place == Place::State)
}

fn worst(view: &View, counts: impl Fn(Place, Option<Failure>) -> bool) -> Option<Trouble> {
    let limit = view.policy.storage.stall_after;
    let troubles = view.local.storage.places.iter().filter_map(|(place, disk)| {
        let (failure, why) = match &disk.probe {
            Probe::Waiting { .. } => (None, None),
            Probe::Failed { failure, why, .. } if *failure != Failure::Other => (Some(*failure), Some(why.clone())),
            Probe::Unknown { .. } | Probe::Works { .. } | Probe::Failed { .. } => return None,
        };
        let (_, since) = view.memory.storage.get(place)?;
        let lasts = view.now.since(*since);
        let is = counts(*place, failure) && lasts >= limit;
        is.then(|| Trouble { place: *place, path: disk.path.clone(), lasts, failure: why })
    });
    troubles.max_by_key(|trouble| trouble.lasts)
}

/// When a write that is under way now will be a stall: the loop looks again then.
pub fn stalls_at(view: &View) -> Option<Moment> {
    let under_way = view.local.storage.places.iter().filter(|(place, disk)| {
        place.holds_data() && matches!(disk.probe, Probe::Waiting { .. } | Probe::Failed { .. })
    });
    let since = under_way.filter_map(|(place, _)| view.memory.storage.get(place)).map(|(_, since)| *since);
    let at = since.map(|since| since.plus(view.policy.storage.stall_after)).min_by_key(|at| at.boottime)?;
    (!view.now.all_reached(at)).then_some(at)
}

/// A file system of this member with less than `storage.min_free`, in words: what PostgreSQL could not go on with.
pub fn full(view: &View) -> Option<String> {
    let least = view.policy.storage.min_free;
    let places = view.local.storage.places.iter().filter(|(place, _)| place.holds_data());
    let known = places.filter_map(|(_, disk)| Some((disk.space?.free_bytes, disk)));
    let (free, disk) = known.filter(|(free, _)| *free < least).min_by_key(|(free, _)| *free)?;
    let aside = match view.local.storage.aside_bytes {
        Some(bytes) if bytes > 0 => format!("; data directories set aside beside it hold {}", megabytes(bytes)),
        _ => String::new(),
    };
    Some(format!(
        "only {} are free under {} (storage.min_free is {}): free at least {} there or make the file system larger, and \
         never remove anything from pg_wal{aside}",
        megabytes(free),
        disk.path,
        megabytes(least),
        megabytes(least - free),
    ))
}

/// Free space for a copy of `bytes` beside what is here. The error says what is missing.
pub fn room_for(view: &View, bytes: u64) -> Result<(), String> {
    let Some(disk) = view.local.storage.places.get(&Place::Data) else { return Ok(()) };
    let Some(space) = disk.space else { return Ok(()) };
    let needed = bytes.saturating_add(view.policy.storage.min_free);
    if space.free_bytes >= needed {
        return Ok(());
    }
    Err(format!(
        "a copy needs {} and only {} are free under {}: free {} there",
        megabytes(needed),
        megabytes(space.free_bytes),
        disk.path,
        megabytes(needed - space.free_bytes)
    ))
}

/// What would be set aside stays within `rejoin.set_aside_budget` together with what is there already. Nothing is ever
/// deleted for it (S5): a person looks what of it is still needed.
pub fn aside_within_budget(view: &View) -> Result<(), String> {
    let storage = &view.local.storage;
    let (Some(data), Some(aside)) = (storage.data_bytes, storage.aside_bytes) else { return Ok(()) };
    let budget = view.policy.storage.set_aside_budget;
    // The first one is always set aside: it may be the only copy of what only this member had.
    if aside == 0 || aside.saturating_add(data) <= budget {
        return Ok(());
    }
    Err(format!(
        "setting {} aside as well would take {}, rejoin.set_aside_budget is {}: look into set_aside.log in state_dir, and \
         remove by hand what is not needed any more",
        megabytes(data),
        megabytes(aside + data),
        megabytes(budget)
    ))
}

pub fn megabytes(bytes: u64) -> String {
    if bytes >= 10 << 30 { format!("{} GB", bytes >> 30) } else { format!("{} MB", bytes >> 20) }
}

/// The bound on WAL that slots keep: half of what is free, as a power of two so that it does not move with every segment.
/// While slots keep more, less is free and the bound shrinks: together they never take more than a third of what was free.
pub fn slot_bound(free_bytes: u64) -> u64 {
    /// Below the segments that PostgreSQL keeps anyway (wal_keep_size) a bound means nothing.
    const LEAST: u64 = 128 << 20;
    let half = (free_bytes / 2).max(LEAST);
    1 << half.ilog2()
}

impl Storage {
    /// Free bytes on the file system of the WAL.
    pub fn wal_free(&self) -> Option<u64> {
        let disk = self.places.get(&Place::Wal).or_else(|| self.places.get(&Place::Data))?;
        disk.space.map(|space| space.free_bytes)
    }
}

impl Memory {
    /// Since when each place gives no sign of a finished write, counted only while this loop came round: after a pause of
    /// the whole machine a write that is still under way proves nothing about the disk.
    pub(super) fn observe_storage(&mut self, storage: &Storage, limit: Duration, now: Moment) {
        let paused = self.round.is_none_or(|last| now.since(last) >= limit);
        let known = std::mem::take(&mut self.storage);
        for (place, disk) in &storage.places {
            let (Probe::Waiting { since: began } | Probe::Failed { since: began, .. }) = &disk.probe else { continue };
            let since = match known.get(place) {
                Some((same, since)) if same == began && !paused => *since,
                Some(_) | None if paused => now,
                Some(_) | None => *began,
            };
            self.storage.insert(*place, (*began, since));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_never_take_more_than_half_of_what_is_free() {
        for (free, bound) in [(0, 128 << 20), (1 << 30, 512 << 20), (100 << 30, 32 << 30), (3 << 30, 1 << 30)] {
            assert_eq!(slot_bound(free), bound, "{free}");
        }
    }

    #[test]
    fn a_pause_of_the_whole_machine_is_no_stall() {
        let limit = Duration::from_secs(4);
        let began = Moment::at(100_000_000_000);
        let disk = Disk { path: "/x".to_owned(), probe: Probe::Waiting { since: began }, space: None };
        let storage = Storage { places: BTreeMap::from([(Place::Data, disk)]), ..Storage::default() };
        let since = |memory: &mut Memory, last: Duration, now: Duration| {
            memory.round = Some(began.plus(last));
            memory.observe_storage(&storage, limit, began.plus(now));
            began.plus(now).since(memory.storage[&Place::Data].1)
        };
        let s = Duration::from_secs;
        let mut memory = Memory::default();
        assert_eq!(since(&mut memory, s(0), s(1)), s(1), "counted from its beginning");
        assert_eq!(since(&mut memory, s(3), s(5)), s(5));
        assert_eq!(since(&mut memory, s(5), s(35)), s(0), "nobody looked for half a minute");
        assert_eq!(since(&mut memory, s(35), s(36)), s(1), "and then it counts again");
    }
}
