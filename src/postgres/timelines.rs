//! History files: reading, writing before a promotion, and keeping foreign ones out of recovery's way.

use std::collections::BTreeMap;

use crate::core::Lsn;
use crate::core::records::TimelineReservation;
use crate::core::timeline::{History, HistoryEntry, TimelineId};
use crate::ports::PostgresError;

use super::controldata::ControlFile;
use super::files::{self, Owner, broken};
use super::layout::{Layout, history_name, names_in, segment_timeline};

/// Reads PostgreSQL's format: `parent <tab> switch <tab> reason` by line; `#` begins a comment.
pub fn parse(text: &str) -> Result<History, String> {
    let mut entries = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut fields = line.split_ascii_whitespace();
        let timeline = fields.next().and_then(|f| f.parse().ok()).map(TimelineId);
        let switch = fields.next().and_then(|f| f.parse().ok());
        let (Some(timeline), Some(switch)) = (timeline, switch) else {
            return Err(format!("`{line}` is not a line of a history file"));
        };
        entries.push(HistoryEntry { timeline, switch });
    }
    Ok(History(entries))
}

pub fn render(history: &History, reason: &str) -> String {
    let lines = history.0.iter().map(|entry| format!("{}\t{}\t{reason}\n", entry.timeline, entry.switch));
    lines.collect()
}

/// The ancestors of `timeline` as the file in pg_wal tells them. Timeline 1 has none and no file.
pub fn history(layout: &Layout, timeline: TimelineId) -> Result<History, PostgresError> {
    if timeline <= TimelineId(1) {
        return Ok(History::default());
    }
    let path = layout.history_file(timeline);
    let what = format!("read history of timeline {timeline} from {}", path.display());
    let text = files::read_if_there(&path)?;
    // S12: a missing file is not "no ancestors".
    let text = text.ok_or_else(|| broken(&what, "no such file; its ancestors are not known"))?;
    parse(&text).map_err(|why| broken(&what, why))
}

/// The newest timeline of this directory's own line: the highest number that has WAL here and descends from the control
/// file's timeline.
///
/// The control file alone is not enough. A standby that follows a switch keeps the old number in it until its next
/// restartpoint; killed before that and started with `recovery_target_timeline = current`, it would come back without the
/// WAL that it had flushed and acknowledged on the new timeline (S2).
pub fn newest_own(layout: &Layout, control: &ControlFile) -> Result<TimelineId, PostgresError> {
    let wal_dir = layout.wal_dir();
    let names = names_in(&wal_dir).map_err(|e| broken(&format!("list {}", wal_dir.display()), e))?;
    let base = control.checkpoint_timeline;
    let mut newest = base.max(control.min_recovery_timeline);
    for timeline in names.iter().filter_map(|name| segment_timeline(name)) {
        if timeline <= newest {
            continue;
        }
        let Ok(ancestors) = history(layout, timeline) else { continue };
        if ancestors.switch_from(base).is_some_and(|switch| switch >= control.redo) {
            newest = timeline;
        }
    }
    Ok(newest)
}

/// True when every number from the control file's timeline up to `newest` has its history file: then `latest`, which
/// stops looking at the first gap, finds `newest`.
pub fn contiguous(layout: &Layout, control: &ControlFile, newest: TimelineId) -> bool {
    let base = control.checkpoint_timeline.max(control.min_recovery_timeline);
    (base.0 + 1..=newest.0).all(|number| layout.history_file(TimelineId(number)).exists())
}

/// Moves history files of numbers above `newest` out of pg_wal. They are of timelines that this directory is not on (a
/// leader's that it learned of, one planted): recovery would take the highest for its target and end with "requested
/// timeline is not a child of this server's history". Whoever is followed later hands them over again.
pub fn move_foreign(layout: &Layout, owner: &Owner, newest: TimelineId) -> Result<Vec<TimelineId>, PostgresError> {
    let wal_dir = layout.wal_dir();
    let names = names_in(&wal_dir).map_err(|e| broken(&format!("list {}", wal_dir.display()), e))?;
    let mut moved = Vec::new();
    for timeline in names.iter().filter_map(|name| history_number(name)).filter(|number| *number > newest) {
        owner.directory(&layout.histories)?;
        let from = layout.history_file(timeline);
        let to = layout.histories.join(history_name(timeline));
        let what = format!("move {} to {}", from.display(), to.display());
        // Copied, not renamed: the state directory is on another disk where there is one.
        std::fs::copy(&from, &to).map_err(|e| broken(&what, e))?;
        files::remove(&from)?;
        moved.push(timeline);
    }
    Ok(moved)
}

fn history_number(file_name: &str) -> Option<TimelineId> {
    let number = file_name.strip_suffix(".history")?;
    (number.len() == 8).then(|| u32::from_str_radix(number, 16).ok().map(TimelineId)).flatten()
}

// === Planting ===

/// Writes the true history of each number between `own` and `reserved`, so that PostgreSQL, which takes the first number
/// without a file, takes the reserved one (S6). Nothing is invented: a missing reservation is an error.
pub fn plant(
    layout: &Layout,
    owner: &Owner,
    own: TimelineId,
    reserved: TimelineId,
    between: &BTreeMap<TimelineId, TimelineReservation>,
) -> Result<Vec<TimelineId>, PostgresError> {
    let what = format!("plant history files between timelines {own} and {reserved}");
    if reserved <= own {
        return Err(broken(&what, "the reserved number is not above the present one"));
    }
    if layout.history_file(reserved).exists() {
        let why = format!("{} exists already: postgresql would take a later number", history_name(reserved));
        return Err(broken(&what, why));
    }
    let own_history = history(layout, own)?;
    let mut known = BTreeMap::from([(own, own_history.clone())]);
    let mut missing = Vec::new();
    for number in (own.0 + 1..reserved.0).map(TimelineId) {
        let reservation = between.get(&number);
        let reservation = reservation.ok_or_else(|| broken(&what, format!("timeline {number} has no reservation")))?;
        let mut ancestors = ancestors_of(layout, reservation.parent, &known, &own_history)?;
        ancestors.0.push(HistoryEntry { timeline: reservation.parent, switch: reservation.switch });
        let path = layout.history_file(number);
        match files::read_if_there(&path)? {
            None => missing.push((number, ancestors.clone())),
            Some(text) if parse(&text).is_ok_and(|there| there == ancestors) => {}
            Some(_) => {
                let why = format!("{} says something else than the reservation of the store", path.display());
                return Err(broken(&what, why));
            }
        }
        known.insert(number, ancestors);
    }
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    // The list is on disk before the first file: after a crash the next start finds what to take away.
    let list: String = missing.iter().map(|(number, _)| format!("{number}\n")).collect();
    owner.write(&layout.planted, &list, true)?;
    for (number, ancestors) in &missing {
        owner.write(&layout.history_file(*number), &render(ancestors, "reserved, see pgvigil"), true)?;
    }
    Ok(missing.into_iter().map(|(number, _)| number).collect())
}

fn ancestors_of(
    layout: &Layout,
    timeline: TimelineId,
    known: &BTreeMap<TimelineId, History>,
    own: &History,
) -> Result<History, PostgresError> {
    if let Some(history) = known.get(&timeline) {
        return Ok(history.clone());
    }
    if let Some(at) = own.0.iter().position(|entry| entry.timeline == timeline) {
        return Ok(History(own.0[..at].to_vec()));
    }
    history(layout, timeline)
}

/// After a promotion: the planted files are part of the line's numbering now.
pub fn keep_planted(layout: &Layout) -> Result<(), PostgresError> {
    files::remove(&layout.planted)
}

/// Before a start: takes away what was planted for a promotion that did not happen.
pub fn remove_unused(layout: &Layout, newest: TimelineId) -> Result<Vec<TimelineId>, PostgresError> {
    let Some(list) = files::read_if_there(&layout.planted)? else { return Ok(Vec::new()) };
    let mut removed = Vec::new();
    for number in list.lines().filter_map(|line| line.trim().parse().ok()).map(TimelineId) {
        // Below the newest own timeline it was used: a gap there would stop every follower.
        if number > newest {
            files::remove(&layout.history_file(number))?;
            removed.push(number);
        }
    }
    files::remove(&layout.planted)?;
    Ok(removed)
}

/// Where two lines part: the last common timeline and the position at which the first of them leaves it. `None`: the
/// first one's history is a part of the second's, as far as the histories tell.
pub fn divergence(
    (mine, my_history): (TimelineId, &History),
    (theirs, their_history): (TimelineId, &History),
) -> Option<(TimelineId, Lsn)> {
    let full = |history: &History, tip: TimelineId| {
        let mut line: Vec<(TimelineId, Option<Lsn>)> = history.0.iter().map(|e| (e.timeline, Some(e.switch))).collect();
        line.push((tip, None));
        line
    };
    let (mine, theirs) = (full(my_history, mine), full(their_history, theirs));
    let mut last = None;
    for ((my_timeline, my_end), (their_timeline, their_end)) in mine.iter().zip(&theirs) {
        if my_timeline != their_timeline {
            break;
        }
        last = match (my_end, their_end) {
            (None, None) => return None,
            (Some(end), None) | (None, Some(end)) => Some((*my_timeline, *end)),
            (Some(a), Some(b)) => Some((*my_timeline, *a.min(b))),
        };
        if my_end != their_end {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(entries: &[(u32, u64)]) -> History {
        History(entries.iter().map(|(t, l)| HistoryEntry { timeline: TimelineId(*t), switch: Lsn(*l) }).collect())
    }

    #[test]
    fn history_files_read_back() {
        let known = history(&[(1, 0x0300_0000), (2, 0x1_0000_0010)]);
        assert_eq!(parse(&render(&known, "no reason")), Ok(known));
        assert_eq!(parse("# comment\n\n"), Ok(History::default()));
        assert!(parse("1 nonsense").is_err());
    }

    #[test]
    fn lines_part_where_the_first_leaves() {
        let check = |mine: (u32, &[(u32, u64)]), theirs: (u32, &[(u32, u64)]), expect: Option<(u32, u64)>| {
            let (my_history, their_history) = (history(mine.1), history(theirs.1));
            let found = divergence((TimelineId(mine.0), &my_history), (TimelineId(theirs.0), &their_history));
            assert_eq!(found, expect.map(|(t, l)| (TimelineId(t), Lsn(l))), "{mine:?} {theirs:?}");
        };
        check((1, &[]), (1, &[]), None);
        check((1, &[]), (2, &[(1, 100)]), Some((1, 100)));
        check((2, &[(1, 80)]), (3, &[(1, 100)]), Some((1, 80)));
        check((3, &[(1, 100), (2, 150)]), (4, &[(1, 100), (2, 140)]), Some((2, 140)));
        check((2, &[(1, 100)]), (2, &[(1, 100)]), None);
    }
}
