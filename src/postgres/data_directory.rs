//! What is in PGDATA, and the marker that says that it is not a database yet (or no more).

use std::io::ErrorKind;
use std::path::Path;

use crate::core::view::DataDirectory;
use crate::ports::PostgresError;

use super::controldata::ControlFile;
use super::files::{self, broken, is_empty_directory};
use super::layout::Layout;
use super::settings::SUPPORTED;

/// `programs`: major version of the installed programs, `None` when not known.
pub fn look(layout: &Layout, programs: Option<u32>) -> DataDirectory {
    let data_dir = &layout.data_dir;
    match is_empty_directory(data_dir) {
        Ok(true) => return DataDirectory::Empty,
        Ok(false) => {}
        Err(e) if e.kind() == ErrorKind::NotADirectory => {
            return DataDirectory::Foreign { why: format!("{} is not a directory", data_dir.display()) };
        }
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            return DataDirectory::Foreign { why: format!("no right to read {}", data_dir.display()) };
        }
        Err(e) => return DataDirectory::Unknown { why: format!("list {}: {e}", data_dir.display()) },
    }
    match files::read_if_there(&layout.unfinished) {
        Ok(None) => {}
        Ok(Some(what)) => return DataDirectory::Unfinished { what: what.trim().to_owned() },
        Err(e) => return DataDirectory::Unknown { why: e.to_string() },
    }
    let version = match version(data_dir) {
        Ok(Some(version)) => version,
        Ok(None) => {
            let why = format!("{} is not empty and has no PG_VERSION: not a data directory", data_dir.display());
            return DataDirectory::Foreign { why };
        }
        Err(e) => return DataDirectory::Unknown { why: e.to_string() },
    };
    if !SUPPORTED.contains(&version) {
        let (oldest, newest) = (SUPPORTED.start(), SUPPORTED.end());
        let why = format!("{} is of postgresql {version}; {oldest} to {newest} are supported", data_dir.display());
        return DataDirectory::Foreign { why };
    }
    if let Some(programs) = programs.filter(|programs| *programs != version) {
        let why = format!(
            "{} is of postgresql {version}, the programs are of {programs}: set postgresql.bin_dir",
            data_dir.display()
        );
        return DataDirectory::Foreign { why };
    }
    match ControlFile::read(data_dir) {
        Ok(control) => DataDirectory::Present {
            system_identifier: control.system_identifier,
            checkpoint_timeline: control.checkpoint_timeline,
            version,
            cleanly_stopped: control.state.cleanly_stopped(),
        },
        Err(why) => DataDirectory::Unknown { why },
    }
}

/// Major version from PG_VERSION; `None`: there is no such file.
pub fn version(data_dir: &Path) -> Result<Option<u32>, PostgresError> {
    let path = data_dir.join("PG_VERSION");
    let Some(text) = files::read_if_there(&path)? else { return Ok(None) };
    let version = text.trim().parse();
    version.map(Some).map_err(|_| broken(&format!("read {}", path.display()), format!("`{}`", text.trim())))
}

/// Refuses a directory that is not empty: jobs that fill one never write over anything (S5).
pub fn require_empty(layout: &Layout, what: &str) -> Result<(), PostgresError> {
    match is_empty_directory(&layout.data_dir) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let why = format!("{} is not empty; it is set aside first, never written over", layout.data_dir.display());
            Err(broken(what, why))
        }
        Err(e) => Err(broken(what, format!("list {}: {e}", layout.data_dir.display()))),
    }
}

/// From here until [`finished`] the directory is no database, whatever happens to this process.
pub fn begin(layout: &Layout, job: &str) -> Result<(), PostgresError> {
    let what = format!("write {}", layout.unfinished.display());
    let mut file = std::fs::File::create(&layout.unfinished).map_err(|e| broken(&what, e))?;
    std::io::Write::write_all(&mut file, job.as_bytes()).map_err(|e| broken(&what, e))?;
    file.sync_all().map_err(|e| broken(&what, e))?;
    files::sync_parent(&layout.unfinished)
}

pub fn finished(layout: &Layout) -> Result<(), PostgresError> {
    files::remove(&layout.unfinished)
}
