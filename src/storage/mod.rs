//! The agent's side of the storage probes: starts one process for each place, and reads how far each came from shared
//! memory. Nothing here touches the disks that it speaks of.
//!
//! Decisions, and why:
//! - *Processes, and the agent's*: a write that hangs in a disk cannot be called off, so it must be nobody's thread. The
//!   guardian has no business with disks. One that hangs is left alone until it returns; no second one is started beside it.
//! - *Shared memory, not a pipe*: what stands in a pipe may be old. An agent that was stopped for a while would take a write
//!   that returned long ago for one that hangs.
//! - *A probe that was stopped or gets no processor says nothing about the disk*: only one that sleeps in a write counts.
//!   One that was stopped is killed and started anew.
//!
//! One thread (`storage`) looks after the processes; it ends when the value is dropped, and ends them.

mod page;
mod probe;

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::{info, warn};

use crate::config::Config;
use crate::core::storage::{Disk, Failure, Place, Probe, Space, Storage};
use crate::ports::Disks;

use page::{Page, Progress};
pub use probe::main_from_args;

/// Between two looks at whether the processes live.
const LOOK: Duration = Duration::from_millis(500);
/// A process that cannot be started is tried again after so many looks.
const RETRY_LOOKS: u32 = 10;

pub struct ProbeProcesses {
    shared: Arc<Shared>,
}

struct Shared {
    watched: Vec<Watched>,
    ended: AtomicBool,
}

/// A place with the process that writes to it.
struct Watched {
    place: Place,
    path: PathBuf,
    arguments: Vec<String>,
    page: Page,
    child: Mutex<Option<Child>>,
}

impl ProbeProcesses {
    pub fn start(config: &Config) -> std::io::Result<ProbeProcesses> {
        // A fifth of what is a stall, at most a second: a stall that begins right after a write is seen that much later.
        let every = (config.policy.storage.stall_after / 4).min(Duration::from_secs(1));
        let data_dir = &config.postgresql.data_dir;
        let mut watched = Vec::new();
        for (place, path) in [(Place::Data, data_dir), (Place::Wal, data_dir), (Place::State, &config.state_dir)] {
            let (page, _) = Page::create()?;
            let mut arguments = vec!["storage-probe".to_owned(), "--place".to_owned(), word(place).to_owned()];
            arguments.extend(["--directory".to_owned(), path.display().to_string()]);
            arguments.extend(["--every-ms".to_owned(), every.as_millis().to_string()]);
            // PostgreSQL's user, whose files are around it.
            if place != Place::State
                && nix::unistd::geteuid().is_root()
                && let Ok(Some(user)) = nix::unistd::User::from_name(&config.postgresql.os_user)
            {
                arguments.extend(["--uid".to_owned(), user.uid.to_string(), "--gid".to_owned(), user.gid.to_string()]);
            }
            let path = if place == Place::Wal { path.join("pg_wal") } else { path.clone() };
            watched.push(Watched { place, path, arguments, page, child: Mutex::new(None) });
        }
        let shared = Arc::new(Shared { watched, ended: AtomicBool::new(false) });
        let worker = shared.clone();
        // Not awaited at the end: starting a program may hang in a disk, too.
        std::thread::Builder::new().name("storage".to_owned()).spawn(move || look_after(&worker))?;
        Ok(ProbeProcesses { shared })
    }
}

impl Disks for ProbeProcesses {
    fn look(&self) -> Storage {
        let mut storage = Storage { places: BTreeMap::new(), data_bytes: None, aside_bytes: None };
        for watched in &self.shared.watched {
            let progress = watched.page.read();
            if let Some(Progress { same_as_data: true, .. }) = progress {
                continue;
            }
            let probe = judged(watched, progress.as_ref());
            let space = progress.as_ref().and_then(|p| p.space);
            let space = space.map(|(free_bytes, total_bytes)| Space { free_bytes, total_bytes });
            if watched.place == Place::Data {
                (storage.data_bytes, storage.aside_bytes) = watched.page.sizes();
            }
            storage.places.insert(watched.place, Disk { path: watched.path.display().to_string(), probe, space });
        }
        storage
    }
}

fn judged(watched: &Watched, progress: Option<&Progress>) -> Probe {
    let unknown = |why: &str| Probe::Unknown { why: why.to_owned() };
    let Some(progress) = progress else { return unknown("it has not written yet") };
    let pid = lock(&watched.child).as_ref().map(Child::id);
    if progress.writing {
        return match pid.and_then(process_state) {
            Some('D' | 'S') => Probe::Waiting { since: progress.began },
            Some('T' | 't') => unknown("its process is stopped"),
            Some(_) => unknown("its process waits for a processor"),
            None => unknown("its process is gone"),
        };
    }
    match (progress.error, progress.failing_since) {
        (0, _) | (_, None) => Probe::Works { at: progress.ended, latency_ms: progress.latency_us / 1000 },
        (error, Some(since)) => {
            let failure = failure(error);
            let why = std::io::Error::from_raw_os_error(error).to_string();
            match failure {
                // A directory that is not there, or that nobody may write to, is no word about its disk.
                Failure::Other => Probe::Unknown { why },
                Failure::Io | Failure::ReadOnly | Failure::Full => Probe::Failed { since, failure, why },
            }
        }
    }
}

fn failure(error: i32) -> Failure {
    match error {
        libc::EIO | libc::ENXIO | libc::ENODEV | libc::EREMOTEIO | libc::ESTALE => Failure::Io,
        libc::EROFS => Failure::ReadOnly,
        libc::ENOSPC | libc::EDQUOT => Failure::Full,
        _ => Failure::Other,
    }
}

fn word(place: Place) -> &'static str {
    match place {
        Place::Data => "data",
        Place::Wal => "wal",
        Place::State => "state",
    }
}

/// `R`, `S`, `D`, `T`, `Z`, … from the kernel, not from a disk.
fn process_state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, a parenthesis too.
    stat.rsplit_once(") ")?.1.chars().next()
}

// === The processes ===

fn look_after(shared: &Shared) {
    let mut wait = vec![0; shared.watched.len()];
    while !shared.ended.load(Ordering::Acquire) {
        for (watched, wait) in shared.watched.iter().zip(&mut wait) {
            if *wait > 0 {
                *wait -= 1;
            } else if !lives(watched)
                && let Err(error) = spawn(shared, watched)
            {
                warn!(%error, place = word(watched.place), "start the storage probe");
                *wait = RETRY_LOOKS;
            }
        }
        std::thread::park_timeout(LOOK);
    }
}

/// Whether its process is there; one that was stopped is killed, its successor starts when it is gone.
fn lives(watched: &Watched) -> bool {
    let mut child = lock(&watched.child);
    let Some(process) = child.as_mut() else { return false };
    if let Ok(Some(how)) = process.try_wait() {
        info!(%how, place = word(watched.place), "the storage probe ended");
        *child = None;
        return false;
    }
    if matches!(process_state(process.id()), Some('T' | 't')) {
        // It can only be gone already.
        let _ = process.kill();
    }
    true
}

fn spawn(shared: &Shared, watched: &Watched) -> std::io::Result<()> {
    watched.page.forget();
    let mut command = Command::new("/proc/self/exe");
    command.arg0("pgvigil").args(&watched.arguments).env_clear().current_dir("/");
    // The page is its standard input: a descriptor that every process has.
    command.stdin(Stdio::from(watched.page.file()?)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = command.spawn()?;
    let mut child = lock(&watched.child);
    if shared.ended.load(Ordering::Acquire) {
        let _ = process.kill();
    }
    *child = Some(process);
    Ok(())
}

impl Drop for ProbeProcesses {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        for watched in &self.shared.watched {
            if let Some(process) = lock(&watched.child).as_mut() {
                // One that hangs dies when its disk lets it go; nobody waits for it.
                let _ = process.kill();
                if process_state(process.id()) != Some('D') {
                    let _ = process.wait();
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was held left a whole value: it is only assigned.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Never a file that PostgreSQL, pg_basebackup, pg_checksums or pg_rewind copy, read or complain of: names that begin so are
/// temporary files to all of them.
const FILE: &str = "pgsql_tmp_pgvigil_probe";

fn file(place: &str, directory: &Path) -> PathBuf {
    match place {
        "wal" => directory.join("pg_wal").join(FILE),
        "data" => directory.join("global").join(FILE),
        _ => directory.join("probe"),
    }
}
