//! Where everything is: PGDATA, and what pgvigil keeps for PostgreSQL beside it.
//!
//! ```text
//!   <state_dir>/postgresql/           of the operating system user, mode 0700
//!     postgresql.conf  pgvigil.dynamic.conf  pg_hba.conf  pg_ident.conf  passfile
//!     log/                            PostgreSQL's own log, and startup.log (standard error before the collector runs)
//!     histories/                      history files of foreign timelines, moved out of the way
//!     planted                         numbers of history files written for a promotion that is not finished
//!   <state_dir>/unfinished            a job is under way in PGDATA: it is not a database
//!   <state_dir>/diverged/<time>/      WAL that only this member had, before a rewind
//! ```

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::core::timeline::TimelineId;

#[derive(Clone, Debug)]
pub struct Layout {
    pub data_dir: PathBuf,
    pub directory: PathBuf,
    pub main_file: PathBuf,
    pub dynamic_file: PathBuf,
    pub hba_file: PathBuf,
    pub ident_file: PathBuf,
    pub passfile: PathBuf,
    pub log_dir: PathBuf,
    pub histories: PathBuf,
    pub planted: PathBuf,
    pub unfinished: PathBuf,
    pub diverged: PathBuf,
    pub set_aside_log: PathBuf,
}

impl Layout {
    pub fn new(config: &Config) -> Layout {
        let directory = config.state_dir.join("postgresql");
        Layout {
            data_dir: config.postgresql.data_dir.clone(),
            main_file: directory.join("postgresql.conf"),
            dynamic_file: directory.join("pgvigil.dynamic.conf"),
            hba_file: directory.join("pg_hba.conf"),
            ident_file: directory.join("pg_ident.conf"),
            passfile: directory.join("passfile"),
            log_dir: directory.join("log"),
            histories: directory.join("histories"),
            planted: directory.join("planted"),
            unfinished: config.state_dir.join("unfinished"),
            diverged: config.state_dir.join("diverged"),
            set_aside_log: config.state_dir.join("set_aside.log"),
            directory,
        }
    }

    pub fn wal_dir(&self) -> PathBuf {
        self.data_dir.join("pg_wal")
    }

    pub fn history_file(&self, timeline: TimelineId) -> PathBuf {
        self.wal_dir().join(history_name(timeline))
    }

    pub fn standby_signal(&self) -> PathBuf {
        self.data_dir.join("standby.signal")
    }

    pub fn auto_conf(&self) -> PathBuf {
        self.data_dir.join("postgresql.auto.conf")
    }
}

pub fn history_name(timeline: TimelineId) -> String {
    format!("{:08X}.history", timeline.0)
}

/// The timeline of a WAL segment's file name (`000000010000000000000003`, also `.partial`).
pub fn segment_timeline(file_name: &str) -> Option<TimelineId> {
    let name = file_name.strip_suffix(".partial").unwrap_or(file_name);
    if name.len() != 24 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u32::from_str_radix(&name[..8], 16).ok().map(TimelineId)
}

/// The number of a segment within its timeline.
pub fn segment_number(file_name: &str, segment_size: u64) -> Option<u64> {
    segment_timeline(file_name)?;
    let high = u64::from_str_radix(&file_name[8..16], 16).ok()?;
    let low = u64::from_str_radix(&file_name[16..24], 16).ok()?;
    let per_file = (1u64 << 32).checked_div(segment_size)?;
    Some(high * per_file + low)
}

pub fn names_in(directory: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_names_are_read() {
        assert_eq!(segment_timeline("000000020000000100000003"), Some(TimelineId(2)));
        assert_eq!(segment_number("000000020000000100000003", 16 << 20), Some(0x103));
        assert_eq!(segment_timeline("00000002.history"), None);
        assert_eq!(segment_timeline("000000020000000100000003.partial"), Some(TimelineId(2)));
    }
}
