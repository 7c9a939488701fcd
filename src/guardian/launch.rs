//! Starts PostgreSQL: fork, put into its control group, become its user, exec. The only fork of the guardian's life.

use std::ffi::{CString, OsStr};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{
    Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, execve, getppid, pipe2, setgid, setgroups, setsid, setuid,
};

use super::group::ControlGroup;
use super::sys;
use super::wire::Start;

/// What the kernel needs to hear, made before the fork.
pub struct Program {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    user: Option<(Uid, Gid, Vec<Gid>)>,
    log_file: PathBuf,
}

impl Program {
    pub fn new(start: &Start<'_>) -> Result<Program, &'static str> {
        if start.program.first() != Some(&b'/') {
            return Err("the program has to be an absolute path");
        }
        let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| "a string of the start has a zero byte in it");
        let path = text(start.program)?;
        let mut arguments = vec![path.clone()];
        for argument in &start.arguments {
            arguments.push(text(argument)?);
        }
        let environment = start.environment.iter().map(|entry| text(entry)).collect::<Result<_, _>>()?;
        let user = start.user.as_ref().map(|(user, group, groups)| {
            (Uid::from_raw(*user), Gid::from_raw(*group), groups.iter().copied().map(Gid::from_raw).collect())
        });
        let log_file = PathBuf::from(OsStr::from_bytes(start.log_file));
        Ok(Program { path, arguments, environment, user, log_file })
    }
}

pub struct Started {
    pub pid: i32,
    pub process: OwnedFd,
    /// Says why there was no exec, or nothing (end of file) when there was one. The loop waits for it, so that a slow
    /// disk under the program or its log holds up nobody else.
    pub failure: OwnedFd,
}

pub fn start(program: &Program, group: Option<&ControlGroup>, oom_score: &str) -> io::Result<Started> {
    let (failure, failure_end) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let (go, go_end) = pipe2(OFlag::O_CLOEXEC)?;
    let guardian = std::process::id();
    match sys::fork()? {
        sys::Fork::Child => {
            drop(go_end);
            let why = become_program(program, go, guardian, oom_score);
            // Nobody hears it when the guardian is gone, and then it does not matter.
            let _ = std::fs::File::from(failure_end).write_all(why.as_bytes());
            std::process::exit(127)
        }
        sys::Fork::Parent(pid) => {
            let started = Started { pid, process: sys::pidfd_open(pid)?, failure };
            // The child waits until it is in the group, so nothing of PostgreSQL ever runs outside of it. When this
            // fails the pipe closes without a word and the child ends.
            if let Some(group) = group {
                group.add(pid)?;
            }
            std::fs::File::from(go_end).write_all(b"g")?;
            Ok(started)
        }
    }
}

/// Returns only if it failed, with the reason.
fn become_program(program: &Program, go: OwnedFd, guardian: u32, oom_score: &str) -> String {
    let mut word = [0];
    if std::fs::File::from(go).read_exact(&mut word).is_err() {
        return "the guardian withdrew".into();
    }
    match prepare(program, guardian, oom_score) {
        Err((step, error)) => format!("{step}: {error}"),
        Ok(()) => match execve(&program.path, &program.arguments, &program.environment) {
            Ok(never) => match never {},
            Err(error) => format!("execute {}: {error}", program.path.to_string_lossy()),
        },
    }
}

fn prepare(program: &Program, guardian: u32, oom_score: &str) -> Result<(), (&'static str, io::Error)> {
    fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> (&'static str, io::Error) {
        move |error| (step, error.into())
    }
    setsid().map_err(at("setsid"))?;
    sys::reset_signals();
    SigSet::empty().thread_set_mask().map_err(at("unblock signals"))?;
    // The guardian's own protection from the OOM killer is not PostgreSQL's. Raising the score is always allowed.
    let _ = std::fs::write("/proc/self/oom_score_adj", oom_score);
    if let Some((user, group, groups)) = &program.user {
        // In this order: after setuid the other two are no longer allowed.
        setgroups(groups).map_err(at("setgroups"))?;
        setgid(*group).map_err(at("setgid"))?;
        setuid(*user).map_err(at("setuid"))?;
    }
    // After the change of user, which clears it. It reaches the postmaster only: the guardian's second covers the rest.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(at("set parent death signal"))?;
    if u32::try_from(getppid().as_raw()) != Ok(guardian) {
        return Err(("start", io::Error::other("the guardian died meanwhile")));
    }
    let null = std::fs::File::open("/dev/null").map_err(at("open /dev/null"))?;
    dup2_stdin(null.as_fd()).map_err(at("redirect input"))?;
    // As its own user, so that the file is its own and nothing of somebody else's is opened.
    let log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&program.log_file)
        .map_err(at("open the log file"))?;
    dup2_stdout(log.as_fd()).map_err(at("redirect output"))?;
    dup2_stderr(log.as_fd()).map_err(at("redirect errors"))?;
    Ok(())
}
