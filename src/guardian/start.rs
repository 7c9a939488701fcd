//! From the agent's spawn to a guardian that listens, and the second process behind it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
use nix::unistd::{chdir, dup2_stderr, dup2_stdout, pipe2, setsid};

use super::Options;
use super::group::{ControlGroup, Group};
use super::run::{Guardian, State, log};
use super::sys;

/// Exit code of the launcher when another guardian (or the second of a dead one) holds the lock.
pub const ALREADY_RUNNING: u8 = 3;

/// How long the second process kills before it leaves the rest (uninterruptible sleep) to the next guardian.
const LAST_KILL: Duration = Duration::from_secs(5);

/// The log starts anew when it is larger than this: it holds a few lines per start of PostgreSQL.
const MAX_LOG: u64 = 1 << 20;

/// Whoever holds this lock owns the group: the guardian and its second together, from before the group is made until
/// both are gone.
pub fn lock_file(socket: &Path) -> PathBuf {
    beside(socket, ".lock")
}

pub fn beside(socket: &Path, ending: &str) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

pub fn start(options: &Options) -> ExitCode {
    sys::close_inherited();
    match launch(options) {
        Ok(code) => code,
        Err((step, error)) => {
            eprintln!("{step}: {error}");
            ExitCode::FAILURE
        }
    }
}

type Step = (&'static str, io::Error);

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Step {
    move |error| (step, error.into())
}

/// The launcher forks the second process and waits for its word.
fn launch(options: &Options) -> Result<ExitCode, Step> {
    let (ready, ready_end) = pipe2(OFlag::O_CLOEXEC).map_err(at("make a pipe"))?;
    match sys::fork().map_err(at("fork"))? {
        sys::Fork::Parent(_) => {
            drop(ready_end);
            let mut word = [1];
            // Without a word both are gone; the reason is on standard error already.
            let _ = File::from(ready).read_exact(&mut word);
            Ok(ExitCode::from(word[0]))
        }
        sys::Fork::Child => {
            drop(ready);
            second(options, ready_end)
        }
    }
}

/// Sets everything up, forks the guardian, and stays behind it.
fn second(options: &Options, ready: OwnedFd) -> Result<ExitCode, Step> {
    setsid().map_err(at("setsid"))?;
    chdir("/").map_err(at("chdir"))?;
    // Blocked, not ignored: the guardian reads them, the second never sees them, PostgreSQL gets them back.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        signals.add(signal);
    }
    signals.thread_set_mask().map_err(at("block signals"))?;

    let lock = open_private(&lock_file(&options.socket)).map_err(at("open the lock file"))?;
    let _lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => {
            let _ = File::from(ready).write_all(&[ALREADY_RUNNING]);
            return Ok(ExitCode::from(ALREADY_RUNNING));
        }
        Err((_, error)) => return Err(("lock", error.into())),
    };

    let mut warnings = Vec::new();
    let oom_score = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_else(|_| "0".into());
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        warnings.push(format!("not protected from the out-of-memory killer: {error}"));
    }
    let control = options.control_group.as_deref().and_then(|name| match control_group(name) {
        Ok(control) => Some(control),
        Err(error) => {
            warnings.push(format!("no control group, killing by process tree: {error}"));
            None
        }
    });
    // Orphans of PostgreSQL come to the guardian, and when that is dead, here.
    prctl::set_child_subreaper(true).map_err(at("become subreaper"))?;
    let group = Group::new(control, own_pid()).map_err(at("open /proc"))?;
    let log_file = open_log(&options.log).map_err(at("open the log"))?;

    match sys::fork().map_err(at("fork"))? {
        sys::Fork::Child => {
            let code =
                guardian(options, group, ready, log_file, warnings, oom_score).unwrap_or_else(|(step, error)| {
                    eprintln!("{step}: {error}");
                    1
                });
            // Not by returning: that would give the lock back, which is the second's until it has looked at the group.
            std::process::exit(code)
        }
        sys::Fork::Parent(_) => {
            drop(ready);
            redirect(&log_file).map_err(at("redirect the log"))?;
            let _ = prctl::set_name(c"pgvigil-second");
            let _ = protect(options.priority);
            stay_behind(group);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Waits for the guardian's end, whatever it is, and kills what is left.
fn stay_behind(mut group: Group) {
    // The guardian is the only child so far; after its end its children become ours and are collected too.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    while sys::reap().is_none() {
        let _ = signals.wait();
    }
    if group.left().all() == 0 {
        remove_control_groups(&group);
        return;
    }
    log(format_args!("the guardian is dead: killing postgresql"));
    let begin = std::time::Instant::now();
    // Twice: a process whose parent dies during a scan may be in neither place for a moment.
    let mut clean = 0;
    while clean < 2 && begin.elapsed() < LAST_KILL {
        group.kill(None);
        std::thread::sleep(Duration::from_millis(1));
        while sys::reap().is_some() {}
        clean = if group.left().all() == 0 { clean + 1 } else { 0 };
    }
    log(format_args!("killed; {} processes are left", group.left().all()));
    remove_control_groups(&group);
}

/// Leaves nothing behind but what could not be killed; the next guardian finds that by the group's name.
fn remove_control_groups(group: &Group) {
    let Some(path) = group.control().map(ControlGroup::path) else { return };
    let _ = std::fs::remove_dir(path);
    if let Some(parent) = path.parent()
        && std::fs::write(parent.join("cgroup.procs"), "0").is_ok()
    {
        let _ = std::fs::remove_dir(beside(path, "-guardian"));
    }
}

fn guardian(
    options: &Options,
    mut group: Group,
    ready: OwnedFd,
    log_file: File,
    warnings: Vec<String>,
    oom_score: String,
) -> Result<i32, Step> {
    let second = sys::pidfd_open(nix::unistd::getppid().as_raw()).map_err(at("hold the second process"))?;
    prctl::set_child_subreaper(true).map_err(at("become subreaper"))?;
    let _ = prctl::set_name(c"pgvigil-guard");
    group.set_root(own_pid());

    let mut signals = SigSet::thread_get_mask().map_err(at("read the signal mask"))?;
    signals.remove(Signal::SIGQUIT);
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(at("make a signal descriptor"))?;
    // BOOTTIME: a machine that was suspended past the deadline wakes up with the timer due.
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
        .map_err(at("make a timer"))?;
    let listener = bind_socket(&options.socket).map_err(at("listen"))?;

    redirect(&log_file).map_err(at("redirect the log"))?;
    for warning in &warnings {
        log(format_args!("{warning}"));
    }
    // The whole way of a kill once, before anything depends on it: its pages are in memory when it counts, and what an
    // earlier guardian left behind is gone.
    let left = group.left().all();
    group.kill(None);
    group.kill_is_over();
    let (real_time, memory_locked) = protect(options.priority);
    log(format_args!(
        "listening; real-time priority: {real_time}, memory locked: {memory_locked}, control group: {}, {left} old processes",
        group.control().is_some()
    ));
    File::from(ready).write_all(&[0]).map_err(at("say that the guardian listens"))?;

    let guardian = Guardian {
        listener,
        signals,
        timer,
        group,
        second: Some(second),
        real_time,
        memory_locked,
        oom_score,
        state: State::new(left > 0),
    };
    guardian.run();
    // A new guardian cannot be there yet: the lock is still held.
    let _ = std::fs::remove_file(&options.socket);
    Ok(0)
}

/// Real-time priority and locked memory; neither is necessary, both are said.
fn protect(priority: u8) -> (bool, bool) {
    if let Ok(maps) = std::fs::read_to_string("/proc/self/maps") {
        sys::forget_startup_text(&maps);
    }
    let memory_locked = sys::lock_memory().inspect_err(|e| log(format_args!("memory is not locked: {e}"))).is_ok();
    let real_time = priority > 0
        && sys::set_real_time(priority).inspect_err(|e| log(format_args!("no real-time priority: {e}"))).is_ok();
    if !real_time {
        // Timers of normal processes are allowed to be late by this; 50 µs by default.
        let _ = prctl::set_timerslack(1);
    }
    (real_time, memory_locked)
}

fn control_group(name: &str) -> io::Result<ControlGroup> {
    let path = ControlGroup::locate(name)?;
    let control = ControlGroup::create(&path)?;
    // Apart from PostgreSQL and from the agent, so that a kill of either control group leaves the guardian alone.
    ControlGroup::enter(&beside(&path, "-guardian"))?;
    Ok(control)
}

fn bind_socket(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listen(&listener, Backlog::new(8)?)?;
    Ok(listener)
}

fn open_private(path: &Path) -> io::Result<File> {
    std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn open_log(path: &Path) -> io::Result<File> {
    let file = open_private(path)?;
    if file.metadata()?.len() > MAX_LOG {
        file.set_len(0)?;
    }
    Ok(file)
}

fn redirect(log: &File) -> io::Result<()> {
    dup2_stdout(log.as_fd())?;
    dup2_stderr(log.as_fd())?;
    Ok(())
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}
