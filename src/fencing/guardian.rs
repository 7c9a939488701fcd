//! The agent's side of the guardian (protocol §6): starts it, attaches to it, asks it, and stands in for it when it is dead.
//!
//! One task per attachment reads the guardian's answers and events; it ends with the connection and is aborted when the
//! fence is dropped. Every request has a deadline. Dropping a request's future is safe: its answer is then thrown away,
//! but what was asked may still be done.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, send, socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::by_hand;
use crate::config::GuardianConfig;
use crate::core::Moment;
use crate::core::names::{ClusterName, MemberName};
use crate::core::timeline::Term;
use crate::core::view::{Exit, Guard, GuardState};
use crate::guardian::page::{Deadline, GateWord, Page};
use crate::guardian::wire::{self, Answer, Clocks, How, MAX_ANSWER, MAX_MESSAGE, Order, Request, Start, Status};
use crate::guardian::{ALREADY_RUNNING, ControlGroup, Processes, pidfd_open, receive_with_descriptor};
use crate::ports::{DeadlinePage, Fence, FenceError, Killed, Launch, StopSignal};

/// An answer to anything but a kill: the guardian answers in less than a millisecond when it lives.
const ANSWER: Duration = Duration::from_secs(1);
/// A start answers after the exec, which reads the program and opens the log file.
const START: Duration = Duration::from_secs(10);
/// A guardian that has not carried out a kill after this is helped: it may be stopped or hung, and the order stands.
const PATIENCE: Duration = Duration::from_millis(250);
/// For the guardian's program to be read, to set itself up, and to listen.
const SPAWN: Duration = Duration::from_secs(5);
/// A dying guardian's second holds the lock for up to five seconds while it kills.
const ATTACH: Duration = Duration::from_secs(8);
const RETRY: Duration = Duration::from_millis(20);

#[derive(Clone, Debug)]
pub struct GuardianOptions {
    /// Belongs on a file system in memory (/run); lock and log are beside it.
    pub socket: PathBuf,
    /// SCHED_FIFO priority 1..99; 0: do not ask for it.
    pub real_time_priority: u8,
    /// Name of PostgreSQL's control group; `None`: kill by process tree.
    pub control_group: Option<String>,
    /// T_h: no deadline further away than this is ever taken.
    pub ttl: Duration,
    /// What is started as `<program> guardian …`.
    pub program: PathBuf,
    /// Replace an agent that is attached and alive (stopped, hung). Only when a person or supervisor says so.
    pub take_over: bool,
}

impl GuardianOptions {
    pub fn new(config: &GuardianConfig, cluster: &ClusterName, member: &MemberName, ttl: Duration) -> GuardianOptions {
        GuardianOptions {
            socket: config.socket.clone(),
            real_time_priority: config.real_time_priority,
            control_group: Some(control_group_name(cluster.as_str(), member.as_str(), &config.socket)),
            ttl,
            // The running program itself, also after its file was replaced by an upgrade.
            program: PathBuf::from("/proc/self/exe"),
            take_over: false,
        }
    }
}

/// Named after the socket too: a second agent that was given the same member's name by mistake must not find the first
/// one's PostgreSQL in its group and kill it as left over (S7).
pub fn control_group_name(cluster: &str, member: &str, socket: &Path) -> String {
    // FNV-1a.
    let mut hash: u32 = 0x811c_9dc5;
    for byte in socket.as_os_str().as_encoded_bytes() {
        hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    }
    format!("pgvigil-{cluster}-{member}-{hash:08x}")
}

pub struct GuardianFence {
    options: GuardianOptions,
    shared: Arc<Shared>,
    /// One attach at a time.
    attaching: tokio::sync::Mutex<()>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    socket: PathBuf,
    link: Mutex<Option<Arc<Link>>>,
    known: Mutex<Known>,
    changes: watch::Sender<u64>,
}

/// What the last guardian said, for when it does not answer any more.
#[derive(Clone, Default)]
struct Known {
    status: Option<Status>,
    group: Option<PathBuf>,
    /// Why nobody is attached.
    why: String,
}

/// One attachment.
struct Link {
    socket: AsyncFd<OwnedFd>,
    guardian: Arc<OwnedFd>,
    page: Arc<AgentPage>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    next_id: AtomicU64,
}

// === The page ===

/// The agent's end of the deadline page.
struct AgentPage {
    page: Page,
    file: OwnedFd,
    /// Held while the page is written: it has one writer at a time. Never across an await.
    last: Mutex<Option<Deadline>>,
    gate: Mutex<Option<GateWord>>,
}

impl DeadlinePage for AgentPage {
    fn extend(&self, term: Term, deadline: Moment) {
        let mut last = lock(&self.last);
        let mut at = to_clocks(deadline);
        match *last {
            // A late writer of an older term.
            Some(before) if before.term > term.0 => return,
            // F only grows, also when two renewals are told in the wrong order.
            Some(before) if before.term == term.0 => at = to_clocks(deadline.latest(to_moment(before.at))),
            _ => {}
        }
        let deadline = Deadline { term: term.0, at };
        self.page.write_deadline(deadline);
        *last = Some(deadline);
    }

    fn hold_from(&self, term: Term, at: Moment) {
        let mut gate = lock(&self.gate);
        let mut at = to_clocks(at);
        match *gate {
            // Shut is for good, and a late writer of an older term says nothing.
            Some(GateWord::Shut { term: shut }) if shut >= term.0 => return,
            Some(GateWord::HoldFrom { term: before, .. }) if before > term.0 => return,
            // Two renewals may be told in the wrong order.
            Some(GateWord::HoldFrom { term: before, at: then }) if before == term.0 => {
                at = to_clocks(to_moment(at).latest(to_moment(then)));
            }
            _ => {}
        }
        let word = GateWord::HoldFrom { term: term.0, at };
        self.page.write_gate(word);
        *gate = Some(word);
    }

    fn shut(&self, term: Term) {
        let mut gate = lock(&self.gate);
        if matches!(*gate, Some(GateWord::Shut { term: before } | GateWord::HoldFrom { term: before, .. }) if before > term.0)
        {
            return;
        }
        let word = GateWord::Shut { term: term.0 };
        self.page.write_gate(word);
        *gate = Some(word);
    }

    fn guardian_alive_at(&self) -> Moment {
        // Never alive is what a page says that nobody wrote to.
        self.page.alive().map(to_moment).unwrap_or_default()
    }
}

fn to_clocks(moment: Moment) -> Clocks {
    Clocks { raw: moment.raw, monotonic: moment.monotonic, boottime: moment.boottime }
}

fn to_moment(clocks: Clocks) -> Moment {
    Moment { raw: clocks.raw, monotonic: clocks.monotonic, boottime: clocks.boottime }
}

// === The fence ===

impl GuardianFence {
    pub fn new(options: GuardianOptions) -> GuardianFence {
        let shared = Shared {
            socket: options.socket.clone(),
            link: Mutex::new(None),
            known: Mutex::new(Known { why: "not attached yet".into(), ..Known::default() }),
            changes: watch::Sender::new(0),
        };
        GuardianFence {
            options,
            shared: Arc::new(shared),
            attaching: tokio::sync::Mutex::new(()),
            reader: Mutex::new(None),
        }
    }

    /// The page's descriptor, for a process that has to read the same deadline (the endpoint's gate).
    pub fn page_file(&self) -> Option<(u64, OwnedFd)> {
        let link = self.shared.link()?;
        Some((link.page.page.nonce(), link.page.file.try_clone().ok()?))
    }

    /// Everything the guardian says, for people and tests.
    pub async fn details(&self) -> Result<Status, FenceError> {
        self.ask("status", &Request::Status, ANSWER).await.map(|answer| answer.status())
    }

    async fn ask(&self, what: &'static str, request: &Request<'_>, within: Duration) -> Result<Answer, FenceError> {
        let link = self.shared.link().ok_or_else(|| unavailable(what, self.shared.why()))?;
        let answer = link.ask(what, request, within).await?;
        self.shared.hear(&answer);
        match answer {
            Answer::Refused { why, .. } => Err(FenceError::Refused { what: what.into(), why }),
            answer => Ok(answer),
        }
    }

    /// Connects and attaches once.
    async fn attach_once(&self) -> Result<(), AttachError> {
        let socket = connect_to(&self.options.socket).map_err(AttachError::NobodyListens)?;
        let guardian = getsockopt(&socket, sockopt::PeerCredentials)
            .map_err(io::Error::from)
            .and_then(|credentials| pidfd_open(credentials.pid()))
            .map_err(AttachError::Failed)?;
        #[allow(deprecated, reason = "its successor is unsafe; what that asks for is what OwnedFd guarantees")]
        let socket = AsyncFd::new(socket).map_err(AttachError::Failed)?;
        let request = Request::Attach { replace: self.options.take_over };
        let (answer, file) = timeout(ANSWER, handshake(&socket, &request))
            .await
            .map_err(|_| AttachError::Failed(io::Error::other("the guardian does not answer")))?
            .map_err(AttachError::Failed)?;
        let (nonce, group) = match answer {
            Answer::Attached { nonce, ref group, .. } => (nonce, group.clone()),
            Answer::Refused { why, .. } => return Err(AttachError::Refused(why)),
            _ => return Err(AttachError::Failed(io::Error::other("not an answer to attach"))),
        };
        let file =
            file.ok_or_else(|| AttachError::Failed(io::Error::other("no deadline page came with the answer")))?;
        let page = Page::open(&file, nonce).map_err(AttachError::Failed)?;
        let link = Arc::new(Link {
            socket,
            guardian: Arc::new(guardian),
            page: Arc::new(AgentPage { page, file, last: Mutex::new(None), gate: Mutex::new(None) }),
            waiting: Mutex::new(HashMap::new()),
            // The attach itself was 1.
            next_id: AtomicU64::new(2),
        });
        lock(&self.shared.known).group = (!group.is_empty()).then(|| PathBuf::from(group));
        *lock(&self.shared.link) = Some(link.clone());
        self.shared.hear(&answer);
        let shared = self.shared.clone();
        let reader = tokio::spawn(async move { read_all(&shared, &link).await });
        if let Some(old) = lock(&self.reader).replace(reader) {
            old.abort();
        }
        self.shared.bump();
        Ok(())
    }

    /// Starts the guardian and waits until it listens. Nothing of it is our child afterwards.
    async fn spawn(&self) -> Result<Spawned, FenceError> {
        let what = "start the guardian";
        let fail = |error: io::Error| unavailable(what, error.to_string());
        let mut arguments: Vec<OsString> = vec!["guardian".into(), "--socket".into()];
        arguments.push(self.options.socket.clone().into());
        arguments.extend(["--priority".into(), self.options.real_time_priority.to_string().into()]);
        arguments.extend(["--cgroup".into(), self.options.control_group.as_deref().unwrap_or("none").into()]);
        let launcher = tokio::process::Command::new(&self.options.program)
            .args(arguments)
            // Passwords in the agent's environment are not the guardian's business.
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(fail)?;
        let output = timeout(SPAWN, launcher.wait_with_output())
            .await
            .map_err(|_| unavailable(what, format!("it does not listen after {SPAWN:?}")))?
            .map_err(fail)?;
        match output.status.code() {
            Some(0) => Ok(Spawned::Listening),
            Some(code) if code == i32::from(ALREADY_RUNNING) => Ok(Spawned::AnotherHoldsTheLock),
            _ => {
                let why = String::from_utf8_lossy(&output.stderr);
                Err(unavailable(what, format!("{}: {}", output.status, why.trim())))
            }
        }
    }

    /// What the agent can do without the guardian's help: the same set, killed by the same means.
    async fn kill_here(&self, within: Duration) -> Result<Killed, FenceError> {
        let known = lock(&self.shared.known).clone();
        let name = self.options.control_group.clone();
        let guardian = self.shared.link().map(|link| link.guardian.clone());
        let socket = self.options.socket.clone();
        let work = move || {
            // An attached guardian said which group it has, or that it has none; without one the name tells.
            let group = match known.status {
                Some(_) => known.group.clone(),
                None => name.as_deref().and_then(|name| ControlGroup::locate(name).ok()),
            };
            match group {
                Some(group) => by_hand::kill_group(&group, within),
                None => by_hand::kill_tree(&socket, guardian.as_deref(), known.status.as_ref(), within),
            }
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| unavailable("kill", error.to_string()))?
            .map_err(|error| unavailable("kill without the guardian", error.to_string()))
    }
}

enum Spawned {
    Listening,
    AnotherHoldsTheLock,
}

enum AttachError {
    NobodyListens(io::Error),
    Refused(String),
    Failed(io::Error),
}

#[async_trait]
impl Fence for GuardianFence {
    async fn attach(&self) -> Result<(), FenceError> {
        const WHAT: &str = "attach";
        let _one = self.attaching.lock().await;
        if self.shared.link().is_some() {
            return Ok(());
        }
        let begin = Instant::now();
        loop {
            let why = match self.attach_once().await {
                Ok(()) => return Ok(()),
                Err(AttachError::Refused(why)) => {
                    lock(&self.shared.known).why = why.clone();
                    return Err(FenceError::Refused { what: WHAT.into(), why });
                }
                Err(AttachError::Failed(error)) => error.to_string(),
                Err(AttachError::NobodyListens(error)) => match self.spawn().await? {
                    Spawned::Listening => continue,
                    // It is starting, or the second of a dead one is killing: both end soon.
                    Spawned::AnotherHoldsTheLock => format!("another guardian holds the lock, but: {error}"),
                },
            };
            if begin.elapsed() >= ATTACH {
                lock(&self.shared.known).why = why.clone();
                return Err(unavailable(WHAT, why));
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn status(&self) -> Guard {
        match self.details().await {
            Ok(status) => guard(&status),
            Err(error) => {
                let known = lock(&self.shared.known).status.unwrap_or_default();
                Guard {
                    state: GuardState::Absent { why: error.to_string() },
                    real_time: known.real_time,
                    control_group: known.control_group,
                    death_covered: known.death_covered,
                }
            }
        }
    }

    async fn arm(&self, term: Term, deadline: Moment) -> Result<(), FenceError> {
        let furthest = u64::try_from(self.options.ttl.as_nanos()).unwrap_or(u64::MAX);
        let request = Request::Arm { term: term.0, deadline: to_clocks(deadline), furthest };
        self.ask("arm", &request, ANSWER).await.map(drop)
    }

    async fn disarm(&self) -> Result<(), FenceError> {
        self.ask("disarm", &Request::Disarm, ANSWER).await.map(drop)
    }

    async fn start(&self, launch: &Launch) -> Result<(), FenceError> {
        let environment: Vec<String> =
            launch.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let start = Start {
            program: launch.program.as_os_str().as_bytes(),
            arguments: launch.arguments.iter().map(String::as_bytes).collect(),
            environment: environment.iter().map(String::as_bytes).collect(),
            user: launch.user.clone(),
            log_file: launch.log_file.as_os_str().as_bytes(),
        };
        self.ask("start postgresql", &Request::Start(start), START).await.map(drop)
    }

    async fn signal(&self, signal: StopSignal) -> Result<(), FenceError> {
        let order = match signal {
            StopSignal::Fast => Order::FastStop,
            StopSignal::Reload => Order::Reload,
        };
        self.ask("signal postgresql", &Request::Signal(order), ANSWER).await.map(drop)
    }

    async fn kill(&self, within: Duration) -> Result<Killed, FenceError> {
        let killed = self.kill_all(within).await?;
        if killed.survivors == 0 {
            return Ok(killed);
        }
        // Whoever sleeps in the kernel with SIGKILL pending runs no instruction of its own any more. Whoever does not may
        // still write and acknowledge: that is no kill (protocol §3).
        match self.running().await? {
            0 => Ok(killed),
            running => Err(FenceError::Refused {
                what: "kill".into(),
                why: format!("{running} processes of postgresql still run"),
            }),
        }
    }

    fn page(&self) -> Option<Arc<dyn DeadlinePage>> {
        Some(self.shared.link()?.page.clone())
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    async fn dismiss(&self) -> Result<(), FenceError> {
        self.ask("dismiss", &Request::Dismiss, ANSWER).await.map(drop)
    }
}

impl GuardianFence {
    /// By the guardian, or without it.
    async fn kill_all(&self, within: Duration) -> Result<Killed, FenceError> {
        let begin = Instant::now();
        let milliseconds = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        // The guardian answers at the latest after `within`; its answer then needs a moment to come here.
        let request = Request::Kill { within: milliseconds };
        let mut asked = std::pin::pin!(self.ask("kill", &request, within + PATIENCE));
        match timeout(PATIENCE.min(within), &mut asked).await {
            Ok(Ok(answer)) => return Ok(killed(&answer)),
            // Not attached, gone meanwhile, or not answering: the order stands, and carried out twice it hurts nobody.
            Ok(Err(_)) => return self.kill_here(within.saturating_sub(begin.elapsed())).await,
            Err(_) => {}
        }
        let here = self.kill_here(within.saturating_sub(begin.elapsed())).await;
        match &here {
            // Nobody is left, whatever the guardian may still say.
            Ok(Killed { survivors: 0, .. }) => here,
            _ => asked.await.map(|answer| killed(&answer)).or(here),
        }
    }

    /// Processes of PostgreSQL that are neither gone nor in uninterruptible sleep.
    async fn running(&self) -> Result<u32, FenceError> {
        let known = lock(&self.shared.known).clone();
        let guardian = known.status.map(|status| status.guardian);
        let look = move || match (known.group, guardian) {
            (Some(group), _) => by_hand::running_in(&group),
            (None, Some(guardian)) => Processes::open()?.descendants(guardian, None, false).map(|found| found.running),
            (None, None) => Err(io::Error::other("neither the control group nor the guardian is known")),
        };
        tokio::task::spawn_blocking(look)
            .await
            .map_err(|error| unavailable("kill", error.to_string()))?
            .map_err(|error| unavailable("look who is left of postgresql", error.to_string()))
    }
}

impl Drop for GuardianFence {
    fn drop(&mut self) {
        if let Some(reader) = lock(&self.reader).take() {
            reader.abort();
        }
    }
}

fn guard(status: &Status) -> Guard {
    let state = if status.postmaster != 0 {
        GuardState::Running { postmaster: status.postmaster, armed: status.armed.map(Term) }
    } else if status.survivors != 0 {
        GuardState::Survivors { count: status.survivors }
    } else {
        GuardState::Idle {
            exit: status.exit.map(|exit| Exit {
                how: how(exit.how),
                orderly: exit.how == How::Code(0),
                start_number: exit.start_number,
            }),
        }
    };
    Guard {
        state,
        real_time: status.real_time,
        control_group: status.control_group,
        death_covered: status.death_covered,
    }
}

fn how(how: How) -> String {
    match how {
        How::Code(code) => format!("exit code {code}"),
        How::Signal(signal) => format!("signal {signal}"),
        How::Deadline(term) => format!("killed by the guardian: deadline of term {term} passed"),
        How::Asked => "killed by the guardian: the agent asked".into(),
    }
}

fn killed(answer: &Answer) -> Killed {
    let status = answer.status();
    // A postmaster that hangs in its disk has not ended either.
    let survivors = status.survivors + u32::from(status.postmaster != 0);
    Killed { was_down: matches!(answer, Answer::Killed { was_down: true, .. }), survivors }
}

fn unavailable(what: &str, why: impl Into<String>) -> FenceError {
    FenceError::Unavailable { what: what.into(), why: why.into() }
}

// === The connection ===

impl Shared {
    fn link(&self) -> Option<Arc<Link>> {
        lock(&self.link).clone()
    }

    fn why(&self) -> String {
        lock(&self.known).why.clone()
    }

    fn hear(&self, answer: &Answer) {
        lock(&self.known).status = Some(answer.status());
    }

    fn bump(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Link {
    async fn ask(&self, what: &'static str, request: &Request<'_>, within: Duration) -> Result<Answer, FenceError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = vec![0; MAX_MESSAGE];
        let length = wire::encode_request(&mut message, id, request)
            .ok_or_else(|| FenceError::Refused { what: what.into(), why: "longer than the guardian reads".into() })?;
        let (sender, answer) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        let exchange = async {
            send_all(&self.socket, &message[..length]).await.map_err(|e| unavailable(what, e.to_string()))?;
            answer.await.map_err(|_| unavailable(what, "the connection ended before the answer"))
        };
        let result = timeout(within, exchange).await;
        lock(&self.waiting).remove(&id);
        result.map_err(|_| unavailable(what, format!("no answer within {within:?}")))?
    }
}

/// Until the connection ends. recv is one system call, so nothing is lost when the task is aborted.
async fn read_all(shared: &Shared, link: &Arc<Link>) {
    let mut buffer = vec![0; MAX_ANSWER];
    let why = loop {
        let received = link.socket.async_io(tokio::io::Interest::READABLE, |socket| {
            recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
        });
        let length = match received.await {
            Ok(0) => break "the guardian closed the connection".to_owned(),
            Ok(length) => length,
            Err(error) => break error.to_string(),
        };
        let Some((id, answer)) = wire::decode_answer(&buffer[..length]) else {
            break "the guardian speaks another version".to_owned();
        };
        shared.hear(&answer);
        if let Answer::Event(_) = answer {
            shared.bump();
        } else if let Some(waiting) = lock(&link.waiting).remove(&id) {
            // Whoever asked may have given up.
            let _ = waiting.send(answer);
        }
    };
    let dead = is_dead(&link.guardian);
    lock(&shared.known).why = if dead { "the guardian died".to_owned() } else { why };
    {
        let mut current = lock(&shared.link);
        if current.as_ref().is_some_and(|l| Arc::ptr_eq(l, link)) {
            *current = None;
        }
    }
    // Whoever waits for an answer learns that none will come.
    lock(&link.waiting).clear();
    if dead {
        let known = lock(&shared.known).clone();
        let socket = shared.socket.clone();
        // Its second kills already; this is for the case that both are dead.
        let _ = tokio::task::spawn_blocking(move || by_hand::kill_orphans(&socket, known.group.as_deref())).await;
    }
    shared.bump();
}

async fn send_all(socket: &AsyncFd<OwnedFd>, message: &[u8]) -> io::Result<()> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = socket.async_io(tokio::io::Interest::WRITABLE, |socket| {
        send(socket.as_raw_fd(), message, flags).map_err(io::Error::from)
    });
    // A packet goes whole or not at all.
    sent.await.map(drop)
}

/// The first exchange, which brings a descriptor.
async fn handshake(socket: &AsyncFd<OwnedFd>, request: &Request<'_>) -> io::Result<(Answer, Option<OwnedFd>)> {
    let mut message = [0; MAX_ANSWER];
    let length = wire::encode_request(&mut message, 1, request).ok_or_else(|| io::Error::other("too long"))?;
    send_all(socket, &message[..length]).await?;
    let receive = socket.async_io(tokio::io::Interest::READABLE, |s| receive_with_descriptor(s, &mut message));
    let (length, file) = receive.await?;
    match wire::decode_answer(&message[..length]) {
        Some((1, answer)) => Ok((answer, file)),
        _ => Err(io::Error::other("the guardian speaks another version")),
    }
}

fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// A pidfd is readable when its process has ended.
pub(super) fn is_dead(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was held left whole values: every critical section is one assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gates_word_is_for_good_once_it_is_shut() {
        let (page, file) = Page::create(7).unwrap();
        let agent =
            AgentPage { page: Page::open(&file, 7).unwrap(), file, last: Mutex::new(None), gate: Mutex::new(None) };
        let at = Moment::at;
        agent.hold_from(Term(4), at(100));
        agent.hold_from(Term(4), at(90));
        assert_eq!(page.gate(), Some(GateWord::HoldFrom { term: 4, at: to_clocks(at(100)) }), "it only grows");
        agent.shut(Term(4));
        agent.hold_from(Term(4), at(200));
        assert_eq!(page.gate(), Some(GateWord::Shut { term: 4 }), "a renewal on its way opens nothing");
        agent.hold_from(Term(5), at(300));
        agent.shut(Term(4));
        agent.hold_from(Term(4), at(400));
        assert_eq!(
            page.gate(),
            Some(GateWord::HoldFrom { term: 5, at: to_clocks(at(300)) }),
            "late words of an older term"
        );
    }
}
