//! What `scripts/bench` measures on clusters of its own: `pgvigil demo --figures memory|guardian|freeze` (hidden), JSON out.
//! Nothing here judges: goals are in the script.
//!
//! Each figure owns its cluster and, for `freeze`, a mounted file system; dropped at any point, everything is ended, thawed
//! and unmounted.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::processes;
use super::writer::Writer;
use super::{Cluster, DemoError, Disk, Options, sql};
use crate::guardian::wire::{self, Clocks, How, MAX_ANSWER, Request, Status};

const PATIENCE: Duration = Duration::from_secs(90);
/// Clients that write, one backend each.
const BACKENDS: usize = 20;
/// How long they write before the agent is stopped.
const BUSY: Duration = Duration::from_secs(2);
/// After the last process of PostgreSQL is gone: what is on its way to a client has arrived.
const MARGIN: Duration = Duration::from_millis(300);
/// The guardian takes over what is in the page ten times a second.
const BEATS: Duration = Duration::from_millis(500);
/// After the kill on a frozen disk, before the thaw: whatever can still die has died.
const FROZEN: Duration = Duration::from_millis(500);
/// After the last member joined: clones and first checks are over.
const SETTLE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub enum Figure {
    /// Memory, processor and writes to the store of a cluster at rest, over so long.
    Memory { over: Duration },
    /// From the deadline to the last acknowledgement, the agent stopped.
    Guardian { runs: u32, real_time: bool },
    /// Acknowledgements after the thaw of PostgreSQL's frozen disk: a block device with an empty ext4 on it.
    Freeze { runs: u32, disk: PathBuf },
}

pub async fn measure(figure: Figure, options: Options) -> Result<Value, DemoError> {
    match figure {
        Figure::Memory { over } => memory(options, over).await,
        Figure::Guardian { runs, real_time } => guardian(options, runs, real_time).await,
        Figure::Freeze { runs, disk } => freeze(options, runs, &disk).await,
    }
}

// === At rest ===

async fn memory(options: Options, over: Duration) -> Result<Value, DemoError> {
    let cluster = Cluster::start(options).await?;
    let primary = cluster.healthy(PATIENCE).await?;
    tokio::time::sleep(SETTLE).await;
    let all: Vec<(String, &str, i32)> = cluster
        .members
        .iter()
        .enumerate()
        .flat_map(|(index, member)| {
            let role = if index == primary { "primary" } else { "standby" };
            let agent = member.agent_pid().map(|pid| (format!("agent {} ({role})", member.name), "agent", pid));
            let guardians = guardians(&member.directory).into_iter();
            let guardians = guardians.map(move |pid| (format!("guardian {} ({role})", member.name), "guardian", pid));
            agent.into_iter().chain(guardians)
        })
        .collect();
    let begun = Instant::now();
    let ticks = |pid| processor_ticks(pid).ok_or_else(|| DemoError::failed("read processor time", "a process is gone"));
    let before = all.iter().map(|(_, _, pid)| ticks(*pid)).collect::<Result<Vec<_>, _>>()?;
    let revision = revision(&cluster).await?;
    tokio::time::sleep(over).await;
    let writes = self::revision(&cluster).await? - revision;
    let seconds = begun.elapsed().as_secs_f64();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    let mut measured = Vec::new();
    for ((name, kind, pid), before) in all.iter().zip(before) {
        measured.push(json!({
            "process": name,
            "kind": kind,
            "resident_kb": memory_kb(*pid, "VmRSS:"),
            "anonymous_kb": memory_kb(*pid, "RssAnon:"),
            "cpu_percent": rounded((ticks(*pid)? - before) as f64 / per_second / seconds * 100.0),
        }));
    }
    let still = cluster.primary().await == Some(primary);
    cluster.shutdown().await;
    if !still {
        return Err(DemoError::failed("measure a cluster at rest", "its leader changed meanwhile"));
    }
    Ok(
        json!({ "seconds": rounded(seconds), "etcd_writes_per_second": rounded(writes as f64 / seconds), "processes": measured }),
    )
}

/// The guardian and its second.
fn guardians(directory: &Path) -> Vec<i32> {
    let is_guardian = |pid: &i32| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"guardian")
    };
    processes::under(directory).into_iter().filter(is_guardian).collect()
}

fn memory_kb(pid: i32, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok())
}

/// Fields of /proc/PID/stat after the name, which may hold anything: state first.
fn stat(pid: i32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// User and system time of all its threads.
fn processor_ticks(pid: i32) -> Option<i64> {
    let fields = stat(pid)?;
    Some(fields.get(11)?.parse::<i64>().ok()? + fields.get(12)?.parse::<i64>().ok()?)
}

/// The store counts every write in its revision; reading does not.
async fn revision(cluster: &Cluster) -> Result<i64, DemoError> {
    let failed = |error| DemoError::failed("ask etcd for its revision", error);
    let mut client = etcd_client::Client::connect(cluster.etcd.endpoints(), None).await.map_err(failed)?;
    let answer = client.get("revision", None).await.map_err(failed)?;
    answer.header().map(|header| header.revision()).ok_or_else(|| DemoError::failed("ask etcd", "no header"))
}

// === The deadline ===

async fn guardian(options: Options, runs: u32, real_time: bool) -> Result<Value, DemoError> {
    let cluster = Cluster::prepare(alone(options))?;
    if !real_time {
        let file = cluster.members[0].config_file();
        let text = std::fs::read_to_string(&file).map(|text| format!("{text}\n[guardian]\nreal_time_priority = 0\n"));
        text.and_then(|text| std::fs::write(&file, text))
            .map_err(|error| DemoError::failed(format!("change {}", file.display()), error))?;
    }
    let stage = Alone::start(cluster, None).await?;
    let mut late = Vec::new();
    let (mut granted, mut control_group) = (true, true);
    for run in 1..=runs {
        let busy = stage.busy().await?;
        stage.cluster.stop_agent(0);
        let stopped = stage.deadline().await?;
        let killed = stage.killed(stopped.status).await?;
        let last = stage.writer.last().ok_or_else(|| DemoError::failed("find the last acknowledgement", "none"))?;
        let late_ms = if last.at >= stopped.at {
            (last.at - stopped.at).as_secs_f64() * 1e3
        } else {
            -(stopped.at - last.at).as_secs_f64() * 1e3
        };
        eprintln!(
            "  run {run} of {runs}: last acknowledgement {late_ms:+.2} ms from the deadline, {busy:.0} commits/s"
        );
        late.push(rounded(late_ms));
        granted &= killed.real_time;
        control_group &= killed.control_group;
        stage.recover().await?;
    }
    let lost = stage.end().await?;
    Ok(json!({
        "real_time_priority": granted,
        "control_group": control_group,
        "backends": BACKENDS,
        "last_acknowledgement_ms": late,
        "lost_rows": lost,
    }))
}

/// One member: its guardian is measured, not a failover.
fn alone(options: Options) -> Options {
    Options { members: 1, etcd: 1, durability: "async".to_owned(), ..options }
}

/// A single member under load, whose agent is stopped and let go on.
struct Alone {
    // Dropped in this order: a frozen disk keeps processes from dying, a mounted one keeps its directory.
    disk: Option<Disk>,
    writer: Writer,
    cluster: Cluster,
}

/// A deadline that nobody moves any more.
struct Stopped {
    at: Instant,
    status: Status,
}

impl Alone {
    // Parameters are dropped from the last to the first: the disk before the cluster.
    async fn start(mut cluster: Cluster, disk: Option<Disk>) -> Result<Alone, DemoError> {
        cluster.start_agent(0)?;
        cluster.ready(PATIENCE).await?;
        let writer = cluster.writer(BACKENDS);
        Ok(Alone { disk, writer, cluster })
    }

    fn ask(&self) -> Result<Status, DemoError> {
        status(&self.cluster.members[0].directory.join("state/guardian.sock"))
    }

    /// Waits until it writes, and lets it; commits per second.
    async fn busy(&self) -> Result<f64, DemoError> {
        self.cluster.healthy(PATIENCE).await?;
        self.writing(Instant::now()).await?;
        tokio::time::sleep(BUSY).await;
        Ok(self.writer.rate(BUSY / 2))
    }

    /// The guardian's F, some beats after the agent was stopped.
    async fn deadline(&self) -> Result<Stopped, DemoError> {
        tokio::time::sleep(BEATS).await;
        let status = self.ask()?;
        if status.armed.is_none() || status.fired {
            return Err(DemoError::failed("read the deadline", format!("there is none to wait for: {status:?}")));
        }
        Ok(Stopped { at: Instant::now() + Duration::from_nanos(now().until(status.deadline)), status })
    }

    /// Waits until the deadline has fired.
    async fn fired(&self, before: Status) -> Result<(), DemoError> {
        self.until("the deadline passes", before, |status| status.fired).await.map(|_| ())
    }

    /// Waits until no process of PostgreSQL is left, and for what they still sent.
    async fn killed(&self, before: Status) -> Result<Status, DemoError> {
        let gone = |status: &Status| status.postmaster == 0 && status.survivors == 0;
        let status = self.until("all of PostgreSQL is killed", before, gone).await?;
        if !matches!(status.exit.map(|exit| exit.how), Some(How::Deadline(_))) {
            return Err(DemoError::failed("have PostgreSQL killed by its deadline", format!("{:?}", status.exit)));
        }
        tokio::time::sleep(MARGIN).await;
        Ok(status)
    }

    async fn until(&self, what: &str, before: Status, is: impl Fn(&Status) -> bool) -> Result<Status, DemoError> {
        let begun = Instant::now();
        loop {
            let status = self.ask()?;
            if status.deadline != before.deadline {
                return Err(DemoError::failed(what, "the deadline moved although the agent is stopped"));
            }
            if is(&status) {
                return Ok(status);
            }
            if begun.elapsed() > PATIENCE {
                return Err(DemoError::failed(what, format!("not within {PATIENCE:?}: {status:?}")));
            }
            // Seldom, so that the asking does not disturb what is measured.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The agent goes on, and clients write again: their word counts, not the first one of an agent that just woke up.
    async fn recover(&self) -> Result<(), DemoError> {
        let since = Instant::now();
        self.cluster.continue_agent(0);
        self.writing(since).await?;
        self.cluster.healthy(PATIENCE).await.map(|_| ())
    }

    async fn writing(&self, since: Instant) -> Result<(), DemoError> {
        if self.writer.acknowledged_after(since, PATIENCE).await {
            return Ok(());
        }
        Err(DemoError::failed("wait for a write", format!("none within {PATIENCE:?}")))
    }

    /// Ends it; how many acknowledged rows were not there any more.
    async fn end(mut self) -> Result<usize, DemoError> {
        self.writer.stop().await;
        let session = self.cluster.connect(0, &sql::Login::app()).await?;
        let checked = self.writer.check(&session).await;
        let lost = checked.map(|checked| checked.lost.len());
        drop(session);
        self.cluster.stop_member(0).await?;
        drop(self.disk);
        self.cluster.shutdown().await;
        lost.map_err(|why| DemoError::failed("look up acknowledged rows", why))
    }
}

fn now() -> Clocks {
    let read = |clock| {
        let time = clock_gettime(clock).map(Duration::from).unwrap_or_default();
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    };
    Clocks {
        raw: read(ClockId::CLOCK_MONOTONIC_RAW),
        monotonic: read(ClockId::CLOCK_MONOTONIC),
        boottime: read(ClockId::CLOCK_BOOTTIME),
    }
}

/// Asks a guardian as somebody who only looks: its agent stays attached. Blocks for the microseconds of an answer.
fn status(path: &Path) -> Result<Status, DemoError> {
    let failed =
        |why: &dyn std::fmt::Display| DemoError::failed(format!("ask the guardian at {}", path.display()), why);
    let ask = || -> nix::Result<Vec<u8>> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, nix::sys::socket::sockopt::ReceiveTimeout, &TimeVal::new(2, 0))?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        let mut buffer = vec![0; MAX_ANSWER];
        let length = wire::encode_request(&mut buffer, 1, &Request::Status).ok_or(nix::errno::Errno::EMSGSIZE)?;
        send(socket.as_raw_fd(), &buffer[..length], MsgFlags::MSG_NOSIGNAL)?;
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        buffer.truncate(length);
        Ok(buffer)
    };
    let answer = ask().map_err(|error| failed(&error))?;
    let (_, answer) = wire::decode_answer(&answer).ok_or_else(|| failed(&"its answer cannot be read"))?;
    Ok(answer.status())
}

// === The disk ===

async fn freeze(options: Options, runs: u32, device: &Path) -> Result<Value, DemoError> {
    let cluster = Cluster::prepare(alone(options))?;
    let disk = Disk::mount(device, cluster.members[0].directory.join("pg")).await?;
    let stage = Alone::start(cluster, Some(disk)).await?;
    let disk = stage.disk.as_ref().ok_or_else(|| DemoError::failed("freeze the disk", "there is none"))?;
    let (mut late, mut blocked) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        let busy = stage.busy().await?;
        stage.cluster.stop_agent(0);
        disk.freeze().await?;
        let stopped = stage.deadline().await?;
        stage.fired(stopped.status).await?;
        tokio::time::sleep(FROZEN).await;
        let waiting = processes::under(&stage.cluster.members[0].data_dir());
        let waiting = waiting.into_iter().filter(|pid| stat(*pid).is_some_and(|fields| fields[0] == "D")).count();
        let before = stage.writer.acknowledged();
        disk.thaw();
        stage.killed(stopped.status).await?;
        let after = stage.writer.acknowledged() - before;
        eprintln!(
            "  run {run} of {runs}: {after} commits acknowledged after the thaw; {waiting} processes waited for the disk, \
             {busy:.0} commits/s before"
        );
        late.push(after);
        blocked.push(waiting);
        stage.recover().await?;
    }
    let lost = stage.end().await?;
    Ok(json!({
        "backends": BACKENDS,
        "acknowledged_after_thaw": late,
        "blocked_at_thaw": blocked,
        "lost_rows": lost,
    }))
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
