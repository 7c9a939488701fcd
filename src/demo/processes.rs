//! Processes of a cluster: started with a log of their own, found by the cluster's base directory, ended by their ids.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use super::{DemoError, Host};

/// How often the process table is read while waiting for processes that are not our children; they send us no event.
const LOOK: Duration = Duration::from_millis(10);

/// A child with its log. Not killed when dropped: `Cluster` ends everything by the base directory.
pub struct Process {
    pub name: String,
    child: Child,
}

impl Process {
    /// Its own process group: Ctrl-C in the terminal is for the demo, which then ends everything in order.
    pub fn spawn(
        name: &str,
        host: &Host,
        program: &Path,
        arguments: &[OsString],
        directory: &Path,
        log: &Path,
    ) -> Result<Process, DemoError> {
        let what = || format!("start {name}");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .map_err(|error| DemoError::failed(what(), format!("{}: {error}", log.display())))?;
        let errors = log.try_clone().map_err(|error| DemoError::failed(what(), error))?;
        let (first, rest) = host.command(program, arguments);
        let child = Command::new(first)
            .args(rest)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(|error| DemoError::failed(what(), format!("{}: {error}", program.display())))?;
        Ok(Process { name: name.to_owned(), child })
    }

    /// `None` once it has ended and was waited for.
    pub fn pid(&self) -> Option<i32> {
        self.child.id().and_then(|id| i32::try_from(id).ok())
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            send(pid, signal);
        }
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<String> {
        self.child.try_wait().ok().flatten().map(|status| status.to_string())
    }

    /// True when it ended in time.
    pub async fn wait(&mut self, within: Duration) -> bool {
        tokio::time::timeout(within, self.child.wait()).await.is_ok()
    }
}

/// A process that is gone already is what was wanted.
pub fn send(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Every process but this one whose working directory or an argument lies under `directory`. Zombies are not listed.
pub fn under(directory: &Path) -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own && belongs(*pid, directory))
        .collect()
}

fn belongs(pid: i32, directory: &Path) -> bool {
    let works_there = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(directory));
    let named = || {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).any(|argument| names(argument, directory.as_os_str().as_bytes()))
    };
    (works_there || named()) && !is_zombie(pid)
}

/// `/base/x`, `--option=/base/x`, but not `/base-of-another`.
fn names(argument: &[u8], directory: &[u8]) -> bool {
    let path = argument.iter().position(|byte| *byte == b'/').map_or(&[][..], |at| &argument[at..]);
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // "pid (name) state …"; the name may hold anything, a parenthesis too.
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// Kills what lies under `directory`, again and again, until nothing is left or the time is over; how many are left then.
pub async fn kill_under(directory: &Path, within: Duration) -> usize {
    let begun = Instant::now();
    loop {
        let left = kill_once(directory);
        if left == 0 || begun.elapsed() > within {
            return left;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// One round, for `Drop`: returns how many were found.
pub fn kill_once(directory: &Path) -> usize {
    let found = under(directory);
    for pid in &found {
        send(*pid, Signal::SIGKILL);
    }
    found.len()
}

/// Waits until no process lies under `directory`; false when the time is over first.
pub async fn gone(directory: &Path, within: Duration) -> bool {
    let begun = Instant::now();
    while !under(directory).is_empty() {
        if begun.elapsed() > within {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}

/// The postmaster of a data directory, by its own file; `None` when it does not run.
pub fn postmaster(data_dir: &Path) -> Option<i32> {
    let text = fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
    let pid: i32 = text.lines().next()?.trim().parse().ok()?;
    // The file outlives a killed postmaster, and its number may be somebody else's by now.
    let ours = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data_dir);
    (ours && !is_zombie(pid)).then_some(pid)
}

/// Takes away the (empty) control group that a guardian made below our own; there may be none.
pub fn remove_control_group(name: &str) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (path, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then(|| path.to_owned())
    });
    let below = own.lines().find_map(|line| line.strip_prefix("0::/"));
    if let (Some(mount), Some(below)) = (mount, below) {
        let _ = fs::remove_dir(Path::new(&mount).join(below).join(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_directory_belong_to_it() {
        for (argument, expected) in [
            ("/tmp/base/a/pgvigil.toml", true),
            ("--data-dir=/tmp/base", true),
            ("/tmp/base-2/a", false),
            ("/var/tmp/base/a", false),
            ("base", false),
            ("", false),
        ] {
            assert_eq!(names(argument.as_bytes(), b"/tmp/base"), expected, "{argument}");
        }
    }

    #[tokio::test]
    async fn processes_are_found_and_ended_by_their_directory() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let sleep = |name: &str| {
            Process::spawn(name, &Host::default(), Path::new("sleep"), &["1000".into()], directory.path(), &log)
                .unwrap()
        };
        let mut first = sleep("first");
        let pid = first.pid().unwrap();
        assert_eq!(under(directory.path()), [pid]);
        assert_eq!(kill_under(directory.path(), Duration::from_secs(5)).await, 0);
        assert!(first.wait(Duration::from_secs(5)).await);
        assert_eq!(first.pid(), None);
    }
}
