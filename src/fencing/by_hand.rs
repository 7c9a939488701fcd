//! Killing PostgreSQL without the guardian's help: when it is dead, stopped or hung and the agent's order stands.
//! Blocking, so called on a thread for such work; everything ends by its deadline.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::guardian::is_dead;
use crate::guardian::wire::Status;
use crate::guardian::{ControlGroup, Processes, lock_file};
use crate::ports::Killed;

/// Between two looks at what is left.
const STEP: Duration = Duration::from_millis(2);

/// By the control group: needs nobody's help.
pub(super) fn kill_group(path: &Path, within: Duration) -> io::Result<Killed> {
    let group = match ControlGroup::open(path) {
        Ok(group) => group,
        // Removed by the guardian's second after its last kill, or never made: then nothing was started in it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Killed { was_down: true, survivors: 0 }),
        Err(error) => return Err(error),
    };
    let was_down = !group.populated()?;
    let begin = Instant::now();
    group.kill()?;
    loop {
        let survivors = group.left()?.all();
        if survivors == 0 || begin.elapsed() >= within {
            return Ok(Killed { was_down, survivors });
        }
        std::thread::sleep(STEP);
    }
}

/// Members of the group that are neither gone nor in uninterruptible sleep, by the kernel's word alone.
pub(super) fn running_in(path: &Path) -> io::Result<u32> {
    let members = match std::fs::read_to_string(path.join("cgroup.procs")) {
        Ok(members) => members,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let runs = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold anything, a parenthesis too.
        let (_, rest) = stat.rsplit_once(") ")?;
        Some(!rest.starts_with(['D', 'Z', 'X']))
    };
    Ok(members.lines().filter(|pid| runs(pid) == Some(true)).count() as u32)
}

/// Without a control group: everything below a guardian that lives but does not answer; below a dead one its second has
/// killed when it gives the lock back.
pub(super) fn kill_tree(
    socket: &Path,
    guardian: Option<&OwnedFd>,
    known: Option<&Status>,
    within: Duration,
) -> io::Result<Killed> {
    let begin = Instant::now();
    let Some(known) = known else {
        return Err(io::Error::other(
            "no guardian was ever attached, and there is no control group to find processes by",
        ));
    };
    let mut processes = Processes::open()?;
    let was_down = known.postmaster == 0 && known.survivors == 0;
    let mut clean = 0;
    loop {
        let survivors = match guardian {
            Some(process) if !is_dead(process) => processes.descendants(known.guardian, None, true)?.all(),
            _ if !known.death_covered => {
                return Err(io::Error::other("the guardian and its second are dead, and there is no control group"));
            }
            _ => u32::from(!lock_is_free(socket)?),
        };
        clean = if survivors == 0 { clean + 1 } else { 0 };
        if clean == 2 || begin.elapsed() >= within {
            return Ok(Killed { was_down, survivors });
        }
        std::thread::sleep(STEP);
    }
}

/// The guardian died while PostgreSQL may run. If its second lives, that kills and holds the lock; a new guardian holds
/// it too, and has killed what it found. Only when nobody holds it the agent does it, and holds it meanwhile.
pub(super) fn kill_orphans(socket: &Path, group: Option<&Path>) -> io::Result<()> {
    let Some(group) = group else { return Ok(()) };
    let file = File::options().append(true).open(lock_file(socket))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(_held) => ControlGroup::open(group)?.kill(),
        Err(_) => Ok(()),
    }
}

fn lock_is_free(socket: &Path) -> io::Result<bool> {
    let file = File::options().append(true).open(lock_file(socket))?;
    Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok())
}
