//! The dead man's switch: a small process between agent and PostgreSQL (protocol §6). It starts PostgreSQL, and kills
//! every process of it when the deadline F passes, whatever has become of the agent.
//!
//! Apart from everything: std, nix and its own wire structs; `fencing::guardian` is the agent's side. One thread, no
//! async, no allocation and no fork on the way to a kill, no file but the kernel's and its log (one line per event, beside
//! the socket, which belongs on /run and not on PostgreSQL's disk).
//!
//! ```text
//! agent ── spawns ──► launcher (ends when all is ready)
//!                       └─► second: waits for the guardian's end, then kills the group       (start.rs)
//!                             └─► guardian: socket, page, deadline                            (run.rs)
//!                                   └─► postmaster ─► backends …  in a control group of their own
//! ```
//!
//! Decisions, and why:
//! - *Nothing extends F but the armed term's agent.* The page belongs to one attachment; F in it counts when it is for the
//!   armed term, later on all clocks, and no further than T_h (given at arm) from now. A passed deadline stays passed.
//! - *Armed until disarmed.* A kill does not disarm: otherwise an agent could promote a new PostgreSQL in the belief that
//!   it is still guarded. A start under a passed deadline is refused; the agent disarms first, which it can when PostgreSQL
//!   is dead.
//! - *One agent.* A second is refused while the first lives. One that lives but does not answer (stopped, hung) is replaced
//!   only by an attach that says so; its page is not read any more. The page of an agent that died is read until the next
//!   attach: its last word was lawful.
//! - *The agent's end does nothing*: PostgreSQL runs on while F holds, a standby (not armed) for ever.
//! - *The postmaster's end ends its children*: backends without postmaster go on acknowledging. After an orderly shutdown
//!   the log collector has a moment to finish.
//! - *SIGTERM, SIGINT and SIGHUP are ignored while PostgreSQL runs*, with a line in the log: stopping in order is the
//!   agent's work. With nothing to guard they end the guardian.
//! - *The guardian's own death* is covered by its second, its parent process, which then kills the group (of which it
//!   becomes the subreaper) and holds the lock meanwhile, so that no new guardian starts beside a dying PostgreSQL; and by
//!   PDEATHSIG on the postmaster and the agent's client besides. Not covered: both killed at the same instant, without a
//!   unit or PID namespace around. A PID namespace would cover that too, at the price of process numbers that nobody
//!   outside understands (postmaster.pid, pg_ctl, operators).
//! - *A guardian that starts where processes of PostgreSQL are left* (control group not empty) kills them first.

mod group;
mod launch;
pub mod page;
mod processes;
mod run;
mod start;
mod sys;
pub mod wire;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

pub use group::ControlGroup;
pub use processes::Processes;
pub use run::now;
pub use start::{ALREADY_RUNNING, lock_file};
pub use sys::{SharedCells, pidfd_open, receive_with_descriptor};

/// `pgvigil guardian --socket PATH --priority N --cgroup NAME|none --log PATH`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    pub socket: PathBuf,
    /// SCHED_FIFO priority; 0: do not ask for it.
    pub priority: u8,
    /// Name of PostgreSQL's control group below the caller's own; `None`: do without.
    pub control_group: Option<String>,
    pub log: PathBuf,
}

/// The hidden subcommand; `args` is what follows `pgvigil guardian`. Returns in the launcher when the guardian listens
/// (0), or when it could not be started (the reason is on standard error).
pub fn main_from_args(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse(args) {
        Ok(options) => start::start(&options),
        Err(why) => {
            eprintln!("pgvigil guardian: {why}");
            ExitCode::from(2)
        }
    }
}

fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Options, String> {
    let (mut socket, mut priority, mut control_group, mut log) = (None, 0, None, None);
    let mut args = args.into_iter();
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{} needs a value", name.to_string_lossy()))?;
        match name.to_str() {
            Some("--socket") => socket = Some(PathBuf::from(value)),
            Some("--log") => log = Some(PathBuf::from(value)),
            Some("--priority") => {
                let value = value.to_string_lossy();
                priority = value.parse().ok().filter(|p| *p <= 99).ok_or_else(|| format!("no priority: {value}"))?;
            }
            Some("--cgroup") => {
                let value = value.into_string().map_err(|_| "the control group's name is not text")?;
                if value.contains('/') || value.starts_with('.') || value.is_empty() {
                    return Err(format!("no name for a control group: {value}"));
                }
                control_group = (value != "none").then_some(value);
            }
            _ => return Err(format!("unknown option {}", name.to_string_lossy())),
        }
    }
    let socket = socket.ok_or("--socket is missing")?;
    let log = log.unwrap_or_else(|| start::beside(&socket, ".log"));
    Ok(Options { socket, priority, control_group, log })
}
