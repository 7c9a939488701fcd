//! PostgreSQL's processes as one set that can be killed: a control group where the kernel lets us have one, the tree
//! below the guardian where not.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use nix::sys::uio::{pread, pwrite};

use super::processes::{Found, Processes};
use super::sys;

pub struct Group {
    control: Option<ControlGroup>,
    processes: Processes,
    /// Everything below this process belongs to the set; used when there is no control group.
    root: i32,
    /// Scans in a row that found nobody but the postmaster running.
    clean_scans: u32,
}

/// The postmaster as the kill needs it: its number to spare it in a scan, its descriptor to signal it.
#[derive(Clone, Copy)]
pub struct Postmaster<'a> {
    pub pid: i32,
    pub process: BorrowedFd<'a>,
}

impl Group {
    pub fn new(control: Option<ControlGroup>, root: i32) -> io::Result<Group> {
        Ok(Group { control, processes: Processes::open()?, root, clean_scans: 0 })
    }

    pub fn control(&self) -> Option<&ControlGroup> {
        self.control.as_ref()
    }

    /// After a fork: the set is now what is below another process.
    pub fn set_root(&mut self, root: i32) {
        self.root = root;
    }

    /// One step of the kill; repeated until `left` says that nobody is. No allocation, no fork, no file but the kernel's.
    pub fn kill(&mut self, postmaster: Option<Postmaster<'_>>) {
        match &self.control {
            Some(control) if control.kill().is_ok() => {
                // Also the one that was forked and is not in the group yet.
                signal(postmaster, Signal::SIGKILL);
            }
            _ => self.kill_tree(postmaster),
        }
    }

    /// A signal to the postmaster alone is no fence: backends outlive it and acknowledge. So it is stopped (it forks no
    /// more), its children are killed until two scans find none, and it comes last.
    fn kill_tree(&mut self, postmaster: Option<Postmaster<'_>>) {
        let spare = postmaster.filter(|_| self.clean_scans < 2);
        if spare.is_some() {
            signal(postmaster, Signal::SIGSTOP);
        } else {
            signal(postmaster, Signal::SIGKILL);
        }
        match self.processes.descendants(self.root, spare.map(|p| p.pid), true) {
            Ok(found) if found.running == 0 => {
                self.clean_scans += 1;
                if self.clean_scans >= 2 {
                    signal(postmaster, Signal::SIGKILL);
                }
            }
            Ok(_) => self.clean_scans = 0,
            // Blind (no descriptors left, no /proc): the postmaster at least, whose end its children notice.
            Err(_) => signal(postmaster, Signal::SIGKILL),
        }
    }

    pub fn kill_is_over(&mut self) {
        self.clean_scans = 0;
    }

    /// Who lives. An error counts as somebody: not knowing is no proof of death (S12).
    pub fn left(&mut self) -> Found {
        const UNKNOWN: Found = Found { running: 1, uninterruptible: 0 };
        match &self.control {
            Some(control) => control.left().unwrap_or(UNKNOWN),
            None => self.processes.descendants(self.root, None, false).unwrap_or(UNKNOWN),
        }
    }
}

fn signal(postmaster: Option<Postmaster<'_>>, signal: Signal) {
    if let Some(postmaster) = postmaster {
        // It can only be gone already.
        let _ = sys::pidfd_send_signal(postmaster.process, signal);
    }
}

// === The control group ===

/// A cgroup v2 directory with `cgroup.kill`, its files open since the start.
pub struct ControlGroup {
    path: PathBuf,
    kill: OwnedFd,
    procs: OwnedFd,
    events: OwnedFd,
}

impl ControlGroup {
    /// Where a control group of this name is, seen from the control group of this process.
    pub fn locate(name: &str) -> io::Result<PathBuf> {
        let mounts = fs::read_to_string("/proc/mounts")?;
        let mount = mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ');
                let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
                (kind == "cgroup2").then_some(path)
            })
            .next()
            .ok_or_else(|| io::Error::other("no cgroup2 file system is mounted"))?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .filter(|path| !path.starts_with(".."))
            .ok_or_else(|| io::Error::other("this process is in no cgroup v2 below the mount"))?;
        Ok(Path::new(mount).join(own).join(name))
    }

    pub fn create(path: &Path) -> io::Result<ControlGroup> {
        make_directory(path)?;
        ControlGroup::open(path)
    }

    pub fn open(path: &Path) -> io::Result<ControlGroup> {
        let file = |name: &str, write: bool| -> io::Result<OwnedFd> {
            let file = fs::OpenOptions::new()
                .read(!write || name == "cgroup.procs")
                .write(write)
                .custom_flags(libc::O_CLOEXEC)
                .open(path.join(name))?;
            Ok(file.into())
        };
        Ok(ControlGroup {
            kill: file("cgroup.kill", true)?,
            procs: file("cgroup.procs", true)?,
            events: file("cgroup.events", false)?,
            path: path.to_owned(),
        })
    }

    /// Moves this process into a control group of its own.
    pub fn enter(path: &Path) -> io::Result<()> {
        make_directory(path)?;
        fs::write(path.join("cgroup.procs"), "0")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn add(&self, pid: i32) -> io::Result<()> {
        let mut number = [0; 16];
        let mut rest = &mut number[..];
        write!(rest, "{pid}")?;
        let length = 16 - rest.len();
        pwrite(&self.procs, &number[..length], 0)?;
        Ok(())
    }

    pub fn kill(&self) -> io::Result<()> {
        pwrite(&self.kill, b"1", 0)?;
        Ok(())
    }

    /// Becomes readable with priority when the group becomes empty or populated.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    pub fn populated(&self) -> io::Result<bool> {
        let mut text = [0; 256];
        let length = pread(&self.events, &mut text, 0)?;
        Ok(!text[..length].windows(11).any(|w| w == b"populated 0"))
    }

    /// Members are not told apart here: all of them have SIGKILL pending once `kill` was called.
    pub fn left(&self) -> io::Result<Found> {
        if !self.populated()? {
            return Ok(Found::default());
        }
        let mut text = [0; 4096];
        let mut members = 0;
        let mut offset = 0;
        loop {
            let length = pread(&self.procs, &mut text, offset)?;
            if length == 0 {
                break;
            }
            members += text[..length].iter().filter(|b| **b == b'\n').count();
            offset += i64::try_from(length).unwrap_or(i64::MAX);
        }
        // Populated without a listed process: somebody is on the way out.
        Ok(Found { running: u32::try_from(members.max(1)).unwrap_or(u32::MAX), uninterruptible: 0 })
    }
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}
