//! Renaming a data directory out of the way. Nothing is ever deleted here (S5).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::ports::PostgresError;

use super::LocalServer;
use super::data_directory;
use super::files::{self, beside, broken};

pub fn set_aside(server: &LocalServer, why: &str) -> Result<PathBuf, PostgresError> {
    let layout = &server.layout;
    let data_dir = &layout.data_dir;
    let target = free_name(data_dir);
    let what = format!("set {} aside as {}", data_dir.display(), target.display());
    fs::rename(data_dir, &target).map_err(|e| match e.raw_os_error() {
        // A mount point cannot be renamed.
        Some(16 | 18) => broken(&what, "it is a mount point: use a directory below it as postgresql.data_dir"),
        _ => broken(&what, e),
    })?;
    files::sync_parent(data_dir)?;
    // Whatever was unfinished is there now, under a name that nothing starts.
    data_directory::finished(layout)?;
    files::remove(&layout.planted)?;
    note(server, &target, why)?;
    name_what_is_beyond_the_budget(server);
    Ok(target)
}

/// Why each directory was set aside, for the person who has to decide what becomes of it.
fn note(server: &LocalServer, target: &Path, why: &str) -> Result<(), PostgresError> {
    let path = &server.layout.set_aside_log;
    let what = format!("write {}", path.display());
    let mut log = fs::OpenOptions::new().create(true).append(true).open(path).map_err(|e| broken(&what, e))?;
    writeln!(log, "{} {}: {why}", utc(), target.display()).map_err(|e| broken(&what, e))
}

fn free_name(data_dir: &Path) -> PathBuf {
    let plain = beside(data_dir, &format!(".aside-{}", utc()));
    if !plain.exists() {
        return plain;
    }
    let numbered = |n: u32| beside(&plain, &format!("-{n}"));
    (2..u32::MAX).map(numbered).find(|path| !path.exists()).unwrap_or(plain)
}

/// The newest stay within the budget; the others are named, with their size: deleting is a person's decision.
fn name_what_is_beyond_the_budget(server: &LocalServer) {
    let budget = server.config.postgresql.set_aside_budget;
    let mut used = 0;
    for directory in set_aside_directories(&server.layout.data_dir) {
        let size = size_of(&directory);
        used += size;
        if used > budget {
            tracing::error!(
                directory = %directory.display(), size_bytes = size, budget_bytes = budget,
                "set-aside data directories take more than postgresql.set_aside_budget: \
                 look whether anything in this one is still needed, then remove it by hand"
            );
        }
    }
}

/// Newest first: the time is in the name.
fn set_aside_directories(data_dir: &Path) -> Vec<PathBuf> {
    let (Some(parent), Some(name)) = (data_dir.parent(), data_dir.file_name().and_then(|n| n.to_str())) else {
        return Vec::new();
    };
    let prefix = format!("{name}.aside-");
    let mut names = super::layout::names_in(parent).unwrap_or_default();
    names.retain(|name| name.starts_with(&prefix));
    names.sort_unstable_by(|a, b| b.cmp(a));
    names.into_iter().map(|name| parent.join(name)).collect()
}

pub fn size_of(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    if !meta.is_dir() {
        return meta.len();
    }
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries.flatten().map(|entry| size_of(&entry.path())).sum()
}

/// `20261120T134522Z`, for names of files: people read it, nothing decides by it.
pub fn utc() -> String {
    #[allow(clippy::disallowed_methods, reason = "part of a name for people; nothing is decided by it")]
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(i64::try_from(days).unwrap_or(0));
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Days since 1970 to a date of the Gregorian calendar (Hinnant's algorithm).
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (days, date) in [(0, (1970, 1, 1)), (11_016, (2000, 2, 29)), (20_777, (2026, 11, 20))] {
            assert_eq!(civil(days), date);
        }
    }
}
