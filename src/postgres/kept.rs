//! WAL and transactions that only this member had: kept and listed before a rewind takes them out of its data (S5).

use std::fs;
use std::path::Path;

use crate::core::Lsn;
use crate::core::records::KeptWal;
use crate::core::timeline::{History, TimelineId};
use crate::ports::PostgresError;

use super::LocalServer;
use super::controldata::ControlFile;
use super::files::{self, broken};
use super::layout::{history_name, names_in, segment_number, segment_timeline};
use super::programs::Run;
use super::set_aside::{size_of, utc};

const LIST: &str = "transactions.txt";
const REPORT: &str = "report.json";

pub async fn keep(
    server: &LocalServer,
    control: &ControlFile,
    own: TimelineId,
    own_history: &History,
    (parted_on, parted_at): (TimelineId, Lsn),
) -> Result<String, PostgresError> {
    let layout = &server.layout;
    let what = "keep the WAL that only this member has";
    // WAL on our line from the divergence on: the common timeline itself, and ours that came after it.
    let mut line: Vec<TimelineId> = own_history.0.iter().map(|e| e.timeline).filter(|t| *t >= parted_on).collect();
    line.push(own);
    let segment_size = u64::from(control.wal_segment_size);
    let first = parted_at.0.checked_div(segment_size).unwrap_or(0);
    let wal_dir = layout.wal_dir();
    let names = names_in(&wal_dir).map_err(|e| broken(what, format!("list {}: {e}", wal_dir.display())))?;
    let names: Vec<String> = names
        .into_iter()
        .filter(|name| segment_timeline(name).is_some_and(|t| line.contains(&t)))
        .filter(|name| segment_number(name, segment_size).is_some_and(|n| n >= first))
        .collect();

    // Reported once: an attempt before this one kept the same, and nothing was written here since.
    let known = |kept: &KeptWal| (kept.timeline, kept.left_at) == (own, parted_at);
    if let Some(kept) = reports(&layout.diverged).into_iter().find(known) {
        return Ok(sentence(&kept));
    }
    let directory = layout.diverged.join(utc());
    server.owner.directory(&directory)?;
    let budget = server.config.postgresql.set_aside_budget.saturating_sub(size_of(&layout.diverged));
    let mut used = 0;
    let mut beyond = 0;
    for name in &names {
        used += segment_size;
        if used > budget {
            beyond += 1;
            continue;
        }
        copy(&wal_dir.join(name), &directory.join(name), what)?;
    }
    for timeline in line.iter().filter(|t| layout.history_file(**t).exists()) {
        copy(&layout.history_file(*timeline), &directory.join(history_name(*timeline)), what)?;
    }
    let report = directory.join(LIST);
    let count = list_transactions(server, &line, (own_history, parted_at), &report).await?;
    files::sync_parent(&report)?;
    if beyond > 0 {
        tracing::warn!(
            segments = beyond, directory = %directory.display(),
            "not all WAL that only this member had is kept: postgresql.set_aside_budget is used up"
        );
    }
    // Last: without it the directory is not whole, and the next attempt begins another one.
    let directory = directory.display().to_string();
    let kept = KeptWal { timeline: own, left_at: parted_at, transactions: count as u64, directory };
    let text = serde_json::to_string_pretty(&kept).map_err(|e| broken(what, e))?;
    let path = report.with_file_name(REPORT);
    server.owner.write(&path, &text, true)?;
    files::sync_parent(&path)?;
    Ok(sentence(&kept))
}

fn sentence(kept: &KeptWal) -> String {
    format!("{} transactions were only here, listed in {}/{LIST}", kept.transactions, kept.directory)
}

/// What is kept, oldest first; a person who has looked at it removes the directory.
pub fn reports(diverged: &Path) -> Vec<KeptWal> {
    let Ok(mut names) = names_in(diverged) else { return Vec::new() };
    names.sort_unstable();
    let read = |name: String| serde_json::from_slice(&fs::read(diverged.join(name).join(REPORT)).ok()?).ok();
    names.into_iter().filter_map(read).collect()
}

fn copy(from: &Path, to: &Path, what: &str) -> Result<(), PostgresError> {
    let copied = fs::copy(from, to).and_then(|_| fs::File::open(to)?.sync_all());
    copied.map_err(|e| broken(what, format!("copy {} to {}: {e}", from.display(), to.display())))
}

/// pg_waldump reads each timeline of the line by itself and ends with an error where the WAL ends, so its status says
/// nothing; what it printed until then is the list.
async fn list_transactions(
    server: &LocalServer,
    line: &[TimelineId],
    (own_history, parted_at): (&History, Lsn),
    report: &Path,
) -> Result<usize, PostgresError> {
    let what = "list the transactions that only this member has";
    let program = server.program("pg_waldump")?;
    let mut text = String::new();
    let mut from = parted_at;
    for timeline in line {
        let mut arguments = vec![
            "--path".to_owned(),
            server.layout.wal_dir().display().to_string(),
            "--timeline".to_owned(),
            timeline.to_string(),
            "--start".to_owned(),
            from.to_string(),
            "--rmgr=Transaction".to_owned(),
        ];
        let end = own_history.switch_from(*timeline);
        if let Some(end) = end.filter(|end| *end > from) {
            arguments.extend(["--end".to_owned(), end.to_string()]);
        }
        if end.is_none_or(|end| end > from) {
            let run = Run { what, program: program.clone(), arguments, input: None, owner: &server.owner };
            text.push_str(&run.finish(|_| ()).await?.output);
            text.push('\n');
        }
        from = end.unwrap_or(from).max(parted_at);
    }
    let count = text.lines().filter(|line| line.contains("COMMIT")).count();
    server.owner.write(report, &text, true)?;
    Ok(count)
}
