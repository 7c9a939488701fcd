//! Finds and kills processes by their ancestry, from `/proc`, without allocating: what the guardian uses where it can
//! have no control group.
//!
//! PostgreSQL's processes are the guardian's descendants and stay so: an orphan comes to the nearest subreaper, which the
//! guardian is. A scan is not atomic, so a clean result counts only when it is seen twice, and the postmaster (who
//! forks) is stopped first and killed last.

use std::ffi::CStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek, read};

use super::sys;

/// Ancestors that are looked at: PostgreSQL's tree is three deep, a shell in an archive command a few more.
const MAX_DEPTH: usize = 64;

pub struct Processes {
    directory: OwnedFd,
    entries: Box<[u8; 8192]>,
}

/// Living processes that a scan found (zombies do not live).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub running: u32,
    /// In uninterruptible sleep: SIGKILL waits for them, and they run no instruction of their own before it.
    pub uninterruptible: u32,
}

impl Found {
    pub fn all(self) -> u32 {
        self.running + self.uninterruptible
    }
}

struct Stat {
    state: u8,
    parent: i32,
}

impl Processes {
    pub fn open() -> io::Result<Processes> {
        let directory = open(c"/proc", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Processes { directory, entries: Box::new([0; 8192]) })
    }

    /// Counts the living descendants of `root` (itself left out) but for `spare`, and kills them if told so.
    pub fn descendants(&mut self, root: i32, spare: Option<i32>, kill: bool) -> io::Result<Found> {
        let mut found = Found::default();
        lseek(&self.directory, 0, Whence::SeekSet)?;
        loop {
            let length = sys::read_directory(self.directory.as_fd(), &mut self.entries[..])?;
            if length == 0 {
                return Ok(found);
            }
            let mut at = 0;
            while let Some((pid, next)) = entry(&self.entries[..length], at) {
                at = next;
                if let Some(pid) = pid
                    && pid != root
                    && Some(pid) != spare
                {
                    self.look_at(pid, root, kill, &mut found);
                }
            }
        }
    }

    fn look_at(&self, pid: i32, root: i32, kill: bool, found: &mut Found) {
        let Some(state) = self.descends(pid, root) else { return };
        match state {
            b'Z' | b'X' => return,
            b'D' => found.uninterruptible += 1,
            _ => found.running += 1,
        }
        // The number may belong to another process by now: hold on to the process, look again, then signal that one.
        if kill
            && let Ok(process) = sys::pidfd_open(pid)
            && self.descends(pid, root).is_some()
        {
            let _ = sys::pidfd_send_signal(process.as_fd(), Signal::SIGKILL);
        }
    }

    /// The state of `pid` if `root` is among its ancestors.
    fn descends(&self, pid: i32, root: i32) -> Option<u8> {
        let stat = self.stat(pid)?;
        let mut parent = stat.parent;
        for _ in 0..MAX_DEPTH {
            if parent == root {
                return Some(stat.state);
            }
            if parent <= 1 {
                return None;
            }
            parent = self.stat(parent)?.parent;
        }
        None
    }

    fn stat(&self, pid: i32) -> Option<Stat> {
        let mut name = [0; 24];
        write!(&mut name[..], "{pid}/stat\0").ok()?;
        let name = CStr::from_bytes_until_nul(&name).ok()?;
        let file = openat(&self.directory, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
        let mut text = [0; 256];
        let length = read(&file, &mut text).ok()?;
        parse_stat(&text[..length])
    }
}

/// `pid (any text, parentheses too) S ppid …`
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let end_of_name = text.iter().rposition(|b| *b == b')')?;
    let mut fields = text[end_of_name + 1..].split(|b| *b == b' ').filter(|f| !f.is_empty());
    let state = *fields.next()?.first()?;
    let parent = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    Some(Stat { state, parent })
}

/// The process number of the entry at `at` (`None` for other names) and where the next entry begins.
fn entry(entries: &[u8], at: usize) -> Option<(Option<i32>, usize)> {
    // struct linux_dirent64: inode 8 bytes, offset 8, length of the entry 2, type 1, name up to a zero byte.
    let length = usize::from(u16::from_ne_bytes(entries.get(at + 16..at + 18)?.try_into().ok()?));
    let name = CStr::from_bytes_until_nul(entries.get(at + 19..at + length)?).ok()?;
    Some((name.to_str().ok().and_then(|name| name.parse().ok()), at + length))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_hides_nothing() {
        let stat = parse_stat(b"42 (a) S 9 (b c) D 17 42 42 0").unwrap();
        assert_eq!((stat.state, stat.parent), (b'D', 17));
        assert!(parse_stat(b"42 (cut").is_none());
    }

    #[test]
    fn finds_children_and_grandchildren_but_not_itself_or_the_spared_one() {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "sleep 60 & echo; wait"]).stdout(std::process::Stdio::piped());
        let mut shell = command.spawn().unwrap();
        // The line comes after the shell forked.
        shell.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = i32::try_from(shell.id()).unwrap();
        let mut processes = Processes::open().unwrap();
        assert_eq!(processes.descendants(pid, None, false).unwrap().all(), 1);
        assert!(processes.descendants(std::process::id() as i32, Some(pid), false).unwrap().all() >= 1);
        processes.descendants(pid, None, true).unwrap();
        shell.wait().unwrap();
    }
}
