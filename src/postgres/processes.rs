//! Signals to single PostgreSQL processes that SQL cannot reach.
//!
//! pg_terminate_backend does not find auxiliary processes (a walreceiver) and is refused for a superuser's sessions. The
//! process ids that SQL shows may be those of a PID namespace, so an id is only believed when the process that it leads to
//! calls itself `postgres:` and is a child of the postmaster of this data directory. Everything else gets no signal.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// SIGINT: give up the running query.
    Cancel,
    /// SIGTERM: end.
    End,
}

/// Returns true when a signal was sent.
pub fn signal(data_dir: &Path, backend: i32, ask: Ask) -> bool {
    let Some(process) = find(data_dir, backend) else { return false };
    let signal = match ask {
        Ask::Cancel => Signal::SIGINT,
        Ask::End => Signal::SIGTERM,
    };
    kill(Pid::from_raw(process), signal).is_ok()
}

/// The process id, as this process counts, of a backend as PostgreSQL counts.
fn find(data_dir: &Path, backend: i32) -> Option<i32> {
    let postmaster = fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    let postmaster: i32 = postmaster.lines().next()?.trim().parse().ok()?;
    if is_child(backend, postmaster) && own_number(backend) == Some(backend) {
        return Some(backend);
    }
    // PostgreSQL lives in a PID namespace of its own: look for the process that has this number there.
    let all = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let all: Vec<i32> = all.filter(|pid| own_number(*pid).is_some()).collect();
    let directory = data_dir.to_str()?;
    let is_ours = |pid: &i32| own_number(*pid) == Some(postmaster) && command_line(*pid).contains(directory);
    let parent = all.iter().copied().find(is_ours)?;
    all.into_iter().find(|pid| own_number(*pid) == Some(backend) && is_child(*pid, parent))
}

fn is_child(process: i32, parent: i32) -> bool {
    status_field(process, "PPid:").and_then(|text| text.trim().parse().ok()) == Some(parent)
        && command_line(process).starts_with("postgres:")
}

/// The number that a process has in its own PID namespace.
fn own_number(process: i32) -> Option<i32> {
    status_field(process, "NSpid:")?.split_ascii_whitespace().next_back()?.parse().ok()
}

fn status_field(process: i32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(field).map(str::to_owned))
}

fn command_line(process: i32) -> String {
    let bytes = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}
