//! `pgvigil storage-probe` (hidden): writes and fsyncs a small file again and again, and says in shared memory how far it
//! came. It may hang in the disk for ever; nobody waits for it. It ends with the agent that started it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Gid, Uid};

use super::page::{Page, Progress};
use crate::core::Moment;

/// How often the sizes of the directories are counted: for refusing a copy that has no room, nothing that is urgent.
const COUNT: Duration = Duration::from_secs(60);

struct Options {
    place: String,
    directory: PathBuf,
    every: Duration,
    user: Option<(u32, u32)>,
}

pub fn main_from_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse(args).and_then(|options| run(&options).map_err(|error| error.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("pgvigil storage-probe: {why}");
            ExitCode::from(2)
        }
    }
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Options, String> {
    let mut options =
        Options { place: String::new(), directory: PathBuf::new(), every: Duration::from_secs(1), user: None };
    let (mut uid, mut gid) = (None, None);
    let mut args = args.into_iter();
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{} needs a value", name.to_string_lossy()))?;
        let number = || value.to_string_lossy().parse::<u32>().map_err(|e| format!("{}: {e}", name.to_string_lossy()));
        match name.to_str() {
            Some("--place") => options.place = value.to_string_lossy().into_owned(),
            Some("--directory") => options.directory = PathBuf::from(&value),
            Some("--every-ms") => options.every = Duration::from_millis(u64::from(number()?)),
            Some("--uid") => uid = Some(number()?),
            Some("--gid") => gid = Some(number()?),
            _ => return Err(format!("unknown option {}", name.to_string_lossy())),
        }
    }
    options.user = uid.zip(gid);
    if !matches!(options.place.as_str(), "data" | "wal" | "state") || !options.directory.is_absolute() {
        return Err("--place data|wal|state and --directory are needed".to_owned());
    }
    Ok(options)
}

fn run(options: &Options) -> io::Result<()> {
    let agent = nix::unistd::getppid();
    // Also when it hangs: it dies as soon as the disk lets it go.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if let Some((uid, gid)) = options.user {
        nix::unistd::setgroups(&[])?;
        nix::unistd::setgid(Gid::from_raw(gid))?;
        nix::unistd::setuid(Uid::from_raw(uid))?;
        // A change of user takes the wish back.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    }
    let page = Arc::new(Page::open(io::stdin())?);
    if options.place == "data" {
        let (page, directory) = (page.clone(), options.directory.clone());
        std::thread::spawn(move || {
            loop {
                page.write_sizes(size_of(&directory, true), aside(&directory));
                std::thread::sleep(COUNT);
            }
        });
    }
    let mut progress = Progress::default();
    // Its end before the wish was heard of.
    while nix::unistd::getppid() == agent {
        progress.same_as_data = options.place == "wal" && on_one_disk(&options.directory);
        progress.began = now();
        progress.writing = !progress.same_as_data;
        page.write(&progress);
        let written =
            if progress.same_as_data { Ok(()) } else { write(&super::file(&options.place, &options.directory)) };
        progress.ended = now();
        progress.latency_us = u64::try_from(progress.ended.since(progress.began).as_micros()).unwrap_or(u64::MAX);
        progress.error = written.as_ref().err().and_then(io::Error::raw_os_error).unwrap_or(0);
        progress.failing_since = match written {
            Ok(()) => None,
            Err(_) => progress.failing_since.or(Some(progress.began)),
        };
        progress.writing = false;
        progress.space = space(&options.directory, &options.place);
        page.write(&progress);
        std::thread::sleep(options.every);
    }
    Ok(())
}

/// Opened each time: a directory that was renamed away must not be held, and one that came is found. Overwritten in place:
/// this needs no room, so a full disk is told by its free bytes and not by a failing probe.
fn write(path: &Path) -> io::Result<()> {
    let file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)?;
    file.write_all_at(&[b'\n'; 512], 0)?;
    // As PostgreSQL does with its WAL.
    file.sync_data()
}

/// Is pg_wal on the file system of the data, or not there?
fn on_one_disk(data_dir: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).ok().map(|meta| meta.dev());
    device(&data_dir.join("pg_wal")).is_none_or(|wal| Some(wal) == device(data_dir))
}

/// Free (for whoever this process is) and total bytes of the nearest directory that is there.
fn space(directory: &Path, place: &str) -> Option<(u64, u64)> {
    let directory = if place == "wal" { directory.join("pg_wal") } else { directory.to_owned() };
    let stat = directory.ancestors().find_map(|path| nix::sys::statvfs::statvfs(path).ok())?;
    let unit = stat.fragment_size();
    Some((stat.blocks_available().saturating_mul(unit), stat.blocks().saturating_mul(unit)))
}

/// As a copy would have it: without WAL, with tablespaces, other links not followed.
fn size_of(directory: &Path, top: bool) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let size = |entry: fs::DirEntry| {
        let (path, name) = (entry.path(), entry.file_name());
        if top && name == "pg_wal" {
            return 0;
        }
        let tablespace = directory.file_name().is_some_and(|name| name == "pg_tblspc");
        let meta = if tablespace { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
        match meta {
            Ok(meta) if meta.is_dir() => size_of(&path, false),
            Ok(meta) => meta.len(),
            // Gone since it was listed.
            Err(_) => 0,
        }
    };
    entries.flatten().map(size).sum()
}

/// What `postgres/set_aside.rs` renamed out of the way.
fn aside(data_dir: &Path) -> u64 {
    let (Some(parent), Some(name)) = (data_dir.parent(), data_dir.file_name()) else { return 0 };
    let prefix = format!("{}.aside-", name.to_string_lossy());
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    ours.map(|entry| size_of(&entry.path(), false)).sum()
}

fn now() -> Moment {
    let read = |clock| {
        let time = clock_gettime(clock).map(Duration::from).unwrap_or_default();
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    };
    Moment {
        raw: read(ClockId::CLOCK_MONOTONIC_RAW),
        monotonic: read(ClockId::CLOCK_MONOTONIC),
        boottime: read(ClockId::CLOCK_BOOTTIME),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_counted_without_wal_and_set_aside_directories_apart() {
        let base = tempfile::tempdir().unwrap();
        let data = base.path().join("data");
        fs::create_dir_all(data.join("base/1")).unwrap();
        fs::create_dir_all(data.join("pg_wal")).unwrap();
        fs::create_dir_all(base.path().join("data.aside-20260101T000000Z")).unwrap();
        fs::write(data.join("base/1/1259"), [0; 1000]).unwrap();
        fs::write(data.join("pg_wal/000000010000000000000001"), [0; 5000]).unwrap();
        fs::write(base.path().join("data.aside-20260101T000000Z/x"), [0; 30]).unwrap();
        assert_eq!((size_of(&data, true), aside(&data)), (1000, 30));
        assert!(on_one_disk(&data));
        assert!(space(&data.join("not/there"), "data").is_some());
    }

    #[test]
    fn it_writes_where_temporary_files_are_left_alone() {
        let base = tempfile::tempdir().unwrap();
        assert_eq!(write(&super::super::file("data", base.path())).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::create_dir(base.path().join("global")).unwrap();
        write(&super::super::file("data", base.path())).unwrap();
        write(&super::super::file("data", base.path())).unwrap();
        assert_eq!(fs::read(base.path().join("global/pgsql_tmp_pgvigil_probe")).unwrap().len(), 512);
    }
}
