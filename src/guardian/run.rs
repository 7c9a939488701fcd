//! The guardian's loop: the deadline first, then everything else. One thread, level-triggered: each round looks at the
//! deadline, at PostgreSQL and at the group again, whatever woke it.

use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, recv, send, sendmsg, sockopt};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};

use super::group::{Group, Postmaster};
use super::launch::{self, Program, Started};
use super::page::{Deadline, Page};
use super::sys::{self, Ended};
use super::wire::{self, Answer, Clocks, Exit, How, MAX_ANSWER, MAX_MESSAGE, Order, Request, Status};

const MILLISECOND: u64 = 1_000_000;

/// The agent renews only while it sees this beat; a tenth of a second is a tenth of its own heartbeat.
const BEAT: u64 = 100 * MILLISECOND;
/// How often a kill under way is looked at. The victims need the processor to die, so the guardian sleeps in between.
const KILL_STEP: u64 = MILLISECOND;
/// What a kill could not reach in this time sits in uninterruptible sleep: look less often.
const KILL_PATIENCE: u64 = 1_000 * MILLISECOND;
/// After an orderly shutdown the log collector writes what it still has, and ends by itself.
const ORDERLY_GRACE: u64 = 200 * MILLISECOND;
/// No lease is longer; a longer reach is a mistake of the agent's.
const FURTHEST: u64 = 3_600_000 * MILLISECOND;
/// The agent, its successor, and somebody who looks.
const CONNECTIONS: usize = 4;

pub struct Guardian {
    pub listener: OwnedFd,
    pub signals: SignalFd,
    pub timer: TimerFd,
    pub group: Group,
    /// The process that kills the group when this one dies.
    pub second: Option<OwnedFd>,
    pub real_time: bool,
    pub memory_locked: bool,
    pub oom_score: String,
    pub state: State,
}

/// What changes while it runs.
#[derive(Default)]
pub struct State {
    connections: [Option<Connection>; CONNECTIONS],
    serial: u64,
    attachment: Option<Attachment>,
    /// Page of an agent that is gone: its last word still counts until the next agent's page.
    last_page: Option<Page>,
    armed: Option<Armed>,
    postgres: Option<Postgres>,
    /// Processes of the group may live; true from a start until the group was seen empty without a postmaster.
    occupied: bool,
    survivors: u32,
    killing: Option<Killing>,
    grace_until: u64,
    waiting: Option<Waiting>,
    start_number: u64,
    exit: Option<Exit>,
    ignored_terms: u64,
    ignored_deadlines: u64,
    /// What was in the page and not taken: counted once, and never taken later (a far deadline comes nearer).
    ignored: Option<Deadline>,
    told: Status,
    leaving: bool,
}

struct Connection {
    socket: OwnedFd,
    serial: u64,
    pid: i32,
}

struct Attachment {
    serial: u64,
    page: Page,
    agent: OwnedFd,
    pid: i32,
}

struct Armed {
    term: u64,
    deadline: Clocks,
    furthest: u64,
    fired: bool,
}

struct Postgres {
    pid: i32,
    process: OwnedFd,
    /// Until the exec.
    starting: Option<Starting>,
    /// There was none: why, and who has to hear it.
    failed: Option<(String, u64, u64)>,
}

/// Where a failure of the start is told, and who asked for it.
struct Starting {
    failure: OwnedFd,
    serial: u64,
    id: u64,
}

#[derive(Clone, Copy)]
struct Killing {
    cause: Cause,
    since: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    Deadline(u64),
    Asked,
    /// The postmaster is gone, its children are not: they would go on acknowledging.
    Orphans,
}

/// Who waits for the end of a kill.
struct Waiting {
    serial: u64,
    id: u64,
    until: u64,
}

pub fn now() -> Clocks {
    let read = |clock| clock_gettime(clock).map_or(u64::MAX, nanoseconds);
    // A clock that cannot be read has reached every deadline.
    Clocks {
        raw: read(ClockId::CLOCK_MONOTONIC_RAW),
        monotonic: read(ClockId::CLOCK_MONOTONIC),
        boottime: read(ClockId::CLOCK_BOOTTIME),
    }
}

fn nanoseconds(time: TimeSpec) -> u64 {
    u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}

impl State {
    /// `occupied`: processes of an earlier PostgreSQL were found.
    pub fn new(occupied: bool) -> State {
        State { occupied, ..State::default() }
    }
}

// === The loop ===

impl Guardian {
    /// Returns when it was dismissed.
    pub fn run(mut self) {
        let mut buffer = vec![0; MAX_MESSAGE];
        while !self.state.leaving {
            let now = now();
            self.watch_deadline(now);
            self.watch_postgres(now);
            self.go_on_killing(now);
            self.tell_changes();
            let ready = match self.sleep() {
                Ok(ready) => ready,
                // Nothing is known then: look at everything. The timer still limits how long a failing poll can cheat.
                Err(_) => [PollFlags::all(); SLOTS],
            };
            // The deadline before any message: a message may take milliseconds (start), and there may be many.
            self.watch_deadline(self::now());
            self.handle(ready, &mut buffer);
        }
    }

    fn sleep(&self) -> nix::Result<[PollFlags; SLOTS]> {
        let now = now();
        let mut span = BEAT;
        if let Some(armed) = self.state.armed.as_ref().filter(|a| !a.fired) {
            span = span.min(now.until(armed.deadline));
        }
        if let Some(killing) = self.state.killing {
            let patience = if now.boottime - killing.since < KILL_PATIENCE { KILL_STEP } else { BEAT };
            span = span.min(patience);
        } else if self.state.occupied && self.state.postgres.is_none() {
            span = span.min(10 * MILLISECOND);
        }
        if let Some(waiting) = &self.state.waiting {
            span = span.min(waiting.until.saturating_sub(now.boottime));
        }
        // A zero would disarm the timer.
        let span = TimeSpec::from(std::time::Duration::from_nanos(span.max(1)));
        self.timer.set(Expiration::OneShot(span), TimerSetTimeFlags::empty())?;

        let state = &self.state;
        let mut fds = [(None, PollFlags::POLLIN); SLOTS];
        fds[TIMER].0 = Some(self.timer.as_fd());
        fds[LISTENER].0 = Some(self.listener.as_fd());
        fds[SIGNALS].0 = Some(self.signals.as_fd());
        fds[EVENTS] = (self.group.control().map(|control| control.events()), PollFlags::POLLPRI);
        fds[AGENT].0 = state.attachment.as_ref().map(|a| a.agent.as_fd());
        fds[SECOND].0 = self.second.as_ref().map(|second| second.as_fd());
        fds[STARTING].0 = state.postgres.as_ref().and_then(|p| p.starting.as_ref()).map(|s| s.failure.as_fd());
        for (slot, connection) in state.connections.iter().enumerate() {
            fds[FIRST_CONNECTION + slot].0 = connection.as_ref().map(|c| c.socket.as_fd());
        }
        let mut polled = fds.map(|(fd, flags)| match fd {
            Some(fd) => PollFd::new(fd, flags),
            None => PollFd::new(self.timer.as_fd(), PollFlags::empty()),
        });
        poll(&mut polled, PollTimeout::NONE)?;
        Ok(polled.map(|p| p.revents().unwrap_or(PollFlags::empty())))
    }

    fn handle(&mut self, ready: [PollFlags; SLOTS], buffer: &mut [u8]) {
        let is = |slot: usize| !ready[slot].is_empty();
        if is(SIGNALS) {
            self.read_signals();
        }
        if is(EVENTS)
            && let Some(control) = self.group.control()
        {
            // Reading makes the descriptor quiet; what it says is asked where it matters.
            let _ = control.populated();
        }
        if is(SECOND) && self.second.take().is_some() {
            log(format_args!("the second process is gone: the guardian's own death is no longer covered"));
        }
        if is(STARTING) {
            self.start_is_over();
        }
        for slot in 0..CONNECTIONS {
            if is(FIRST_CONNECTION + slot) {
                self.receive(slot, buffer);
            }
        }
        // After its messages: what an agent wrote before it died still counts.
        if is(AGENT) {
            self.detach("the agent is gone");
        }
        if is(LISTENER) {
            self.accept();
        }
    }

    /// SIGTERM ends a guardian that guards nothing. While PostgreSQL runs it is refused: stopping PostgreSQL in order is
    /// the agent's work, and without the guardian PostgreSQL dies.
    fn read_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo == Signal::SIGCHLD as u32 {
                continue;
            }
            if self.state.occupied {
                log(format_args!("signal {} ignored: postgresql runs; the agent stops it", signal.ssi_signo));
            } else {
                log(format_args!("signal {}: leaving", signal.ssi_signo));
                self.state.leaving = true;
            }
        }
    }
}

const TIMER: usize = 0;
const LISTENER: usize = 1;
const SIGNALS: usize = 2;
const EVENTS: usize = 3;
const AGENT: usize = 4;
const SECOND: usize = 5;
const STARTING: usize = 6;
const FIRST_CONNECTION: usize = 7;
const SLOTS: usize = FIRST_CONNECTION + CONNECTIONS;

// === The deadline and the kill ===

impl Guardian {
    fn watch_deadline(&mut self, now: Clocks) {
        if let Some(attachment) = &self.state.attachment {
            attachment.page.write_alive(now);
        }
        self.read_page(now);
        let Some(armed) = &mut self.state.armed else { return };
        if armed.fired || !now.any_reached(armed.deadline) {
            return;
        }
        // Never undone: an agent that wakes up later cannot extend what has passed.
        armed.fired = true;
        let term = armed.term;
        if self.state.occupied {
            self.kill(Cause::Deadline(term), now);
            log(format_args!("deadline of term {term} passed: postgresql is being killed"));
        } else {
            log(format_args!("deadline of term {term} passed, postgresql was not running"));
        }
    }

    /// Takes a later F from the page of this attachment (or, between two agents, from the last one's): for the armed term
    /// only, later on every clock, and never further away than the agent said when it armed.
    fn read_page(&mut self, now: Clocks) {
        let page = self.state.attachment.as_ref().map(|a| &a.page).or(self.state.last_page.as_ref());
        let Some(written) = page.and_then(Page::deadline) else { return };
        let Some(armed) = self.state.armed.as_mut().filter(|a| !a.fired) else { return };
        let same = written.term == armed.term && written.at == armed.deadline;
        if same || self.state.ignored == Some(written) {
            return;
        }
        if written.term != armed.term {
            self.state.ignored_terms += 1;
            self.state.ignored = Some(written);
        } else if !armed.deadline.within(written.at) || !written.at.within(now.plus(armed.furthest)) {
            self.state.ignored_deadlines += 1;
            self.state.ignored = Some(written);
        } else {
            armed.deadline = written.at;
        }
    }

    fn kill(&mut self, cause: Cause, now: Clocks) {
        if self.state.killing.is_none() {
            self.state.killing = Some(Killing { cause, since: now.boottime });
        }
        let postmaster = self.state.postgres.as_ref().map(|p| Postmaster { pid: p.pid, process: p.process.as_fd() });
        self.group.kill(postmaster);
    }

    fn go_on_killing(&mut self, now: Clocks) {
        if let Some(killing) = self.state.killing {
            self.kill(killing.cause, now);
        }
        if let Some(waiting) = &self.state.waiting
            && (!self.state.occupied || now.boottime >= waiting.until)
            && let Some(waiting) = self.state.waiting.take()
        {
            self.answer(waiting.serial, waiting.id, &Answer::Killed { was_down: false, status: self.status() });
        }
    }
}

// === PostgreSQL ===

impl Guardian {
    /// Collects who has ended, and notices when the last one of the group has.
    fn watch_postgres(&mut self, now: Clocks) {
        while let Some((pid, ended)) = sys::reap() {
            if self.state.postgres.as_ref().is_some_and(|p| p.pid == pid) {
                self.postmaster_ended(ended, now);
            }
        }
        if self.state.postgres.is_some() || !self.state.occupied {
            return;
        }
        self.state.survivors = self.group.left().all();
        if self.state.survivors == 0 {
            self.state.occupied = false;
            self.state.killing = None;
            self.group.kill_is_over();
        } else if self.state.killing.is_none() && now.boottime >= self.state.grace_until {
            log(format_args!(
                "the postmaster is gone, {} of its processes are not: killing them",
                self.state.survivors
            ));
            self.kill(Cause::Orphans, now);
        }
    }

    fn postmaster_ended(&mut self, ended: Ended, now: Clocks) {
        self.start_is_over();
        let Some(postgres) = self.state.postgres.take() else { return };
        let cause = self.state.killing.map(|k| k.cause);
        let how = match (ended, cause) {
            (Ended::Signal(libc::SIGKILL), Some(Cause::Deadline(term))) => How::Deadline(term),
            (Ended::Signal(libc::SIGKILL), Some(Cause::Asked)) => How::Asked,
            (Ended::Signal(signal), _) => How::Signal(signal),
            (Ended::Code(code), _) => How::Code(code),
        };
        self.state.grace_until = if how == How::Code(0) { now.boottime + ORDERLY_GRACE } else { 0 };
        self.state.exit = Some(Exit { start_number: self.state.start_number, how });
        log(format_args!("postmaster {} ended: {how:?}", postgres.pid));
        if let Some((why, serial, id)) = postgres.failed {
            self.answer(serial, id, &Answer::Refused { why, status: self.status() });
        }
    }

    fn start(&mut self, serial: u64, id: u64, start: &wire::Start<'_>) -> Result<(), Refusal> {
        if self.state.postgres.is_some() {
            return Err("postgresql already runs".into());
        }
        if self.state.occupied {
            return Err(format!("{} processes of the last postgresql are still there", self.state.survivors).into());
        }
        if let Some(armed) = self.state.armed.as_ref().filter(|a| a.fired) {
            return Err(format!("the deadline of term {} has passed; disarm before a start", armed.term).into());
        }
        let program = Program::new(start)?;
        // From here on somebody may live, also when the rest of the start fails.
        self.state.occupied = true;
        self.state.start_number += 1;
        let Started { pid, process, failure } = launch::start(&program, self.group.control(), &self.oom_score)
            .map_err(|error| format!("start postgresql: {error}"))?;
        log(format_args!("start {}: postmaster {pid}", self.state.start_number));
        self.state.postgres =
            Some(Postgres { pid, process, starting: Some(Starting { failure, serial, id }), failed: None });
        Ok(())
    }

    /// The child became PostgreSQL (the pipe closed at exec) or said why it could not; then it is about to end, and the
    /// answer waits for that, so that whoever hears it can start again.
    fn start_is_over(&mut self) {
        let Some(postgres) = &mut self.state.postgres else { return };
        let Some(Starting { failure, serial, id }) = postgres.starting.take() else { return };
        let mut text = [0; 400];
        match nix::unistd::read(&failure, &mut text) {
            Ok(length) if length > 0 => {
                let why = String::from_utf8_lossy(&text[..length]).into_owned();
                log(format_args!("start {}: {why}", self.state.start_number));
                postgres.failed = Some((why, serial, id));
            }
            _ => {
                let answer = Answer::Done(self.status());
                self.answer(serial, id, &answer);
            }
        }
    }
}

// === The agent ===

/// A sentence for the agent.
struct Refusal(String);

impl From<&str> for Refusal {
    fn from(text: &str) -> Refusal {
        Refusal(text.to_owned())
    }
}

impl From<String> for Refusal {
    fn from(text: String) -> Refusal {
        Refusal(text)
    }
}

impl Guardian {
    fn accept(&mut self) {
        let Ok((socket, credentials)) = accept_from(&self.listener) else { return };
        let own = nix::unistd::geteuid().as_raw();
        if credentials.uid() != 0 && credentials.uid() != own {
            log(format_args!("connection of user {} refused", credentials.uid()));
            return;
        }
        self.state.serial += 1;
        let connection = Connection { socket, serial: self.state.serial, pid: credentials.pid() };
        let attached = self.state.attachment.as_ref().map(|a| a.serial);
        // A free place, else the oldest one that is not the agent's: whoever only looks must not keep an agent out.
        let place = match self.state.connections.iter_mut().position(|c| c.is_none()) {
            Some(free) => Some(free),
            None => (0..CONNECTIONS)
                .filter_map(|slot| Some((slot, self.state.connections[slot].as_ref()?.serial)))
                .filter(|(_, serial)| Some(*serial) != attached)
                .min_by_key(|(_, serial)| *serial)
                .map(|(slot, _)| slot),
        };
        if let Some(slot) = place {
            self.state.connections[slot] = Some(connection);
        }
    }

    fn receive(&mut self, slot: usize, buffer: &mut [u8]) {
        let Some(connection) = &self.state.connections[slot] else { return };
        let (serial, pid) = (connection.serial, connection.pid);
        // TRUNC: the true length, so that a message that was cut is known to be.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let length = match recv(connection.socket.as_raw_fd(), buffer, flags) {
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return,
            Ok(0) | Err(_) => {
                self.state.connections[slot] = None;
                if self.state.attachment.as_ref().is_some_and(|a| a.serial == serial) {
                    self.detach("the agent closed its connection");
                }
                return;
            }
            Ok(length) => length,
        };
        let Some(message) = buffer.get(..length) else {
            let why = format!("the message has {length} bytes, {MAX_MESSAGE} are allowed");
            self.answer(serial, 0, &Answer::Refused { why, status: self.status() });
            return;
        };
        let (id, request) = wire::decode_request(message);
        let done = request.map_err(Refusal::from).and_then(|request| self.request(serial, pid, id, request));
        let answer = match done {
            Ok(Reply::Given) => return,
            Ok(Reply::Done) => Answer::Done(self.status()),
            Err(Refusal(why)) => Answer::Refused { why, status: self.status() },
        };
        self.answer(serial, id, &answer);
    }

    fn request(&mut self, serial: u64, pid: i32, id: u64, request: Request<'_>) -> Result<Reply, Refusal> {
        let attached = self.state.attachment.as_ref().map(|a| a.serial);
        let free_for_all = matches!(request, Request::Attach { .. } | Request::Status)
            || (matches!(request, Request::Dismiss) && attached.is_none());
        if attached != Some(serial) && !free_for_all {
            return Err("attach first".into());
        }
        match request {
            Request::Attach { replace } => {
                self.attach(serial, pid, id, replace)?;
                return Ok(Reply::Given);
            }
            Request::Arm { term, deadline, furthest } => self.arm(term, deadline, furthest)?,
            Request::Disarm if self.state.armed.is_none() => {}
            Request::Disarm if self.state.occupied => return Err("postgresql is not dead".into()),
            Request::Disarm => self.state.armed = None,
            Request::Start(start) => {
                self.start(serial, id, &start)?;
                return Ok(Reply::Given);
            }
            Request::Signal(order) => {
                let postgres = self.state.postgres.as_ref().ok_or("postgresql does not run")?;
                let signal = match order {
                    Order::FastStop => Signal::SIGINT,
                    Order::Reload => Signal::SIGHUP,
                };
                sys::pidfd_send_signal(postgres.process.as_fd(), signal).map_err(|e| format!("signal: {e}"))?;
            }
            Request::Kill { within } => {
                if !self.state.occupied {
                    self.answer(serial, id, &Answer::Killed { was_down: true, status: self.status() });
                    return Ok(Reply::Given);
                }
                let now = now();
                self.kill(Cause::Asked, now);
                log(format_args!("the agent asked: postgresql is being killed"));
                let until = now.boottime.saturating_add(u64::from(within) * MILLISECOND);
                // One agent, one kill: who asked before is answered by what is known now.
                if let Some(before) = self.state.waiting.replace(Waiting { serial, id, until }) {
                    self.answer(before.serial, before.id, &Answer::Killed { was_down: false, status: self.status() });
                }
                return Ok(Reply::Given);
            }
            Request::Status => {}
            Request::Dismiss if self.state.occupied => return Err("postgresql runs".into()),
            Request::Dismiss => {
                log(format_args!("dismissed"));
                self.state.leaving = true;
            }
        }
        Ok(Reply::Done)
    }

    fn attach(&mut self, serial: u64, pid: i32, id: u64, replace: bool) -> Result<(), Refusal> {
        if let Some(attachment) = &self.state.attachment {
            if attachment.serial == serial {
                return Err("already attached".into());
            }
            // Alive may mean stopped or hung: then a person or a supervisor says `replace`.
            if !replace {
                return Err(format!("another agent is attached: process {}", attachment.pid).into());
            }
            let old = attachment.serial;
            self.detach("replaced by another agent");
            for connection in &mut self.state.connections {
                connection.take_if(|c| c.serial == old);
            }
        }
        let agent = sys::pidfd_open(pid).map_err(|error| format!("hold the agent, process {pid}: {error}"))?;
        let nonce = now().raw ^ (serial << 48);
        let (page, file) = Page::create(nonce).map_err(|error| format!("make a deadline page: {error}"))?;
        page.write_alive(now());
        self.state.attachment = Some(Attachment { serial, page, agent, pid });
        // The old page is not read any more from here on, whoever still writes to it.
        self.state.last_page = None;
        log(format_args!("agent attached: process {pid}"));
        let group = self.group.control().map(|c| c.path().to_string_lossy().into_owned()).unwrap_or_default();
        let status = self.status();
        self.answer_with(serial, id, &Answer::Attached { nonce, group, status }, Some(file.as_fd()));
        self.state.told = status;
        Ok(())
    }

    /// The end of an agent by itself does nothing: PostgreSQL runs on while F holds.
    fn detach(&mut self, why: &str) {
        self.read_page(now());
        if let Some(attachment) = self.state.attachment.take() {
            log(format_args!("agent detached: process {}: {why}", attachment.pid));
            // What a dead agent wrote last is final. One that lives on must not extend what it no longer holds.
            let dead = is_dead(&attachment.agent);
            self.state.last_page = dead.then_some(attachment.page);
            if dead {
                for connection in &mut self.state.connections {
                    connection.take_if(|c| c.serial == attachment.serial);
                }
            }
        }
    }

    fn arm(&mut self, term: u64, deadline: Clocks, furthest: u64) -> Result<(), Refusal> {
        let now = now();
        if furthest > FURTHEST {
            return Err("the lease is longer than an hour".into());
        }
        if self.state.killing.is_some() {
            return Err("postgresql is being killed".into());
        }
        if now.any_reached(deadline) {
            return Err(format!("the deadline of term {term} has passed already").into());
        }
        if !deadline.within(now.plus(furthest)) {
            return Err(format!("the deadline of term {term} is further away than the lease is long").into());
        }
        let deadline = match &self.state.armed {
            Some(armed) if armed.fired => {
                return Err(format!("the deadline of term {} has passed; disarm first", armed.term).into());
            }
            Some(armed) if armed.term > term => return Err(format!("term {} is armed", armed.term).into()),
            // F only grows.
            Some(armed) if armed.term == term && !armed.deadline.within(deadline) => armed.deadline,
            _ => deadline,
        };
        self.state.ignored = None;
        self.state.armed = Some(Armed { term, deadline, furthest, fired: false });
        log(format_args!("armed for term {term}"));
        Ok(())
    }

    fn status(&self) -> Status {
        let state = &self.state;
        Status {
            guardian: i32::try_from(std::process::id()).unwrap_or(0),
            postmaster: state.postgres.as_ref().map_or(0, |p| p.pid),
            survivors: if state.occupied { state.survivors.max(u32::from(state.postgres.is_none())) } else { 0 },
            start_number: state.start_number,
            armed: state.armed.as_ref().map(|a| a.term),
            deadline: state.armed.as_ref().map(|a| a.deadline).unwrap_or_default(),
            fired: state.armed.as_ref().is_some_and(|a| a.fired),
            exit: state.exit,
            real_time: self.real_time,
            control_group: self.group.control().is_some(),
            death_covered: self.second.is_some(),
            memory_locked: self.memory_locked,
            ignored_terms: state.ignored_terms,
            ignored_deadlines: state.ignored_deadlines,
        }
    }

    /// A level, not an edge: an event that does not fit into the socket now is sent in the next round, as it is then.
    fn tell_changes(&mut self) {
        let Some(serial) = self.state.attachment.as_ref().map(|a| a.serial) else { return };
        let status = self.status();
        let told = &self.state.told;
        let changed = (status.postmaster, status.survivors, status.exit, status.fired, status.death_covered)
            != (told.postmaster, told.survivors, told.exit, told.fired, told.death_covered);
        if changed && self.answer(serial, 0, &Answer::Event(status)) {
            self.state.told = status;
        }
    }

    fn answer(&self, serial: u64, id: u64, answer: &Answer) -> bool {
        self.answer_with(serial, id, answer, None)
    }

    /// Never waits: an agent that does not read (stopped, hung) misses the answer and asks again.
    fn answer_with(&self, serial: u64, id: u64, answer: &Answer, descriptor: Option<BorrowedFd<'_>>) -> bool {
        let Some(connection) = self.state.connections.iter().flatten().find(|c| c.serial == serial) else {
            return false;
        };
        let mut buffer = [0; MAX_ANSWER];
        let Some(length) = wire::encode_answer(&mut buffer, id, answer) else { return false };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let socket = connection.socket.as_raw_fd();
        match descriptor {
            None => send(socket, &buffer[..length], flags).is_ok(),
            Some(descriptor) => {
                let rights = [descriptor.as_raw_fd()];
                let rights = [ControlMessage::ScmRights(&rights)];
                sendmsg::<()>(socket, &[IoSlice::new(&buffer[..length])], &rights, flags, None).is_ok()
            }
        }
    }
}

enum Reply {
    Done,
    /// Answered already, or later.
    Given,
}

fn accept_from(listener: &OwnedFd) -> io::Result<(OwnedFd, nix::sys::socket::UnixCredentials)> {
    let (socket, _) = UnixListener::from(listener.try_clone()?).accept()?;
    let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
    Ok((socket.into(), credentials))
}

/// A pidfd is readable when its process has ended.
fn is_dead(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
}

/// One line, one write, no allocation; always after the deed, and only where the socket is: in memory (/run).
pub fn log(text: std::fmt::Arguments<'_>) {
    let mut line = [0; 300];
    let mut rest = &mut line[..299];
    let time = clock_gettime(ClockId::CLOCK_REALTIME).map_or(0, |t| t.tv_sec());
    // What does not fit is cut.
    let _ = write!(rest, "{time} guardian[{}]: {text}", std::process::id());
    let length = 299 - rest.len();
    line[length] = b'\n';
    let _ = nix::unistd::write(io::stderr(), &line[..=length]);
}
