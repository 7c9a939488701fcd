//! A whole cluster: starts it, waits for states, breaks it, ends it without leaving anything behind.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::etcd::Etcd;
use super::member::{Common, Member, Owner};
use super::sql::{self, Login, Session};
use super::writer::{Address, Ids, Writer};
use super::{DemoError, Host};
use super::{ports, processes};
use crate::client::Client;
use crate::config::Secret;
use crate::fencing::control_group_name;

/// Between two looks at the agents' answers while a state is waited for: they tell no strangers of changes.
const LOOK: Duration = Duration::from_millis(50);
/// An agent asked to stop hands over and stops PostgreSQL; more is a fault of its own.
const ORDERLY_STOP: Duration = Duration::from_secs(40);
/// SIGKILL takes effect at once, except in uninterruptible sleep.
const KILL: Duration = Duration::from_secs(10);

/// Of the directories of all clusters; `control` looks for them.
pub(super) const BASE_PREFIX: &str = "pgvigil-demo-";
/// Holds the number of the process that the cluster belongs to, and which set of numbers that is, as long as nobody wants to keep its files.
const OWNER: &str = "owner.pid";

#[derive(Clone, Debug)]
pub struct Options {
    pub members: usize,
    pub etcd: usize,
    /// Where members and members of etcd run, in their order; loopback for those that have none.
    pub hosts: Vec<Host>,
    pub etcd_hosts: Vec<Host>,
    /// The program under test; `None`: this one.
    pub binary: Option<PathBuf>,
    /// Where base directories are made; `None`: the system's directory for temporary files.
    pub parent: Option<PathBuf>,
    pub durability: String,
    /// Lines of `[lease]`; empty: defaults.
    pub lease: String,
    /// etcd.try_timeout; has to fit a shorter lease.
    pub etcd_try_timeout: String,
    /// Lines of [postgresql.parameters].
    pub parameters: String,
    /// Lines of `[endpoint]` besides its ports; `None`: no endpoint.
    pub endpoint: Option<String>,
    pub log_level: String,
    /// Keep files and logs after the end; a cluster that failed keeps them anyway.
    pub keep: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            members: 3,
            etcd: 3,
            hosts: Vec::new(),
            etcd_hosts: Vec::new(),
            binary: None,
            parent: None,
            durability: "sync".to_owned(),
            lease: String::new(),
            etcd_try_timeout: "700ms".to_owned(),
            // Three servers on one small machine; nothing that changes what is shown.
            parameters: "shared_buffers = \"32MB\"".to_owned(),
            endpoint: None,
            log_level: "info".to_owned(),
            keep: false,
        }
    }
}

pub struct Cluster {
    pub name: String,
    pub base: PathBuf,
    pub members: Vec<Member>,
    pub etcd: Etcd,
    /// Rows of all writers have ids from here.
    pub ids: Ids,
    pub started: Instant,
    /// What the agents ask from those who change something; they get it through their hosts' environment.
    pub token: Option<Secret>,
    binary: PathBuf,
    keep: bool,
    ended: bool,
}

/// What one agent answers to `GET /primary`: a verdict and the node's document.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// HTTP status; `None`: no answer.
    pub primary: Option<u16>,
    pub node: Value,
}

impl Look {
    pub fn is_primary(&self) -> bool {
        self.primary == Some(200)
    }

    pub fn is_streaming(&self) -> bool {
        self.text("role") != "primary" && self.text("replication_state") == "streaming"
    }

    pub fn text(&self, key: &str) -> &str {
        self.node.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    pub fn timeline(&self) -> Option<u64> {
        self.node.get("timeline").and_then(Value::as_u64)
    }
}

impl Cluster {
    /// Starts all processes; `ready` waits for what becomes of them.
    pub async fn start(options: Options) -> Result<Cluster, DemoError> {
        let mut cluster = Cluster::prepare(options)?;
        for index in 0..cluster.members.len() {
            cluster.start_agent(index)?;
        }
        Ok(cluster)
    }

    /// etcd runs and every member has its files; no agent runs yet, so the files may still be changed.
    pub fn prepare(options: Options) -> Result<Cluster, DemoError> {
        let started = Instant::now();
        let binary = match options.binary {
            Some(binary) => binary,
            None => std::env::current_exe().map_err(|error| DemoError::failed("find this program", error))?,
        };
        let owner = Owner::find()?;
        sweep(options.parent.as_deref());
        let (name, base) = base_directory(options.parent.as_deref())?;
        if let Err(error) = owner.can_reach(&base) {
            let _ = std::fs::remove_dir_all(&base);
            return Err(error);
        }
        let etcd = match Etcd::start(&base, options.etcd, &options.etcd_hosts) {
            Ok(etcd) => etcd,
            Err(error) => {
                let _ = std::fs::remove_dir_all(&base);
                return Err(error);
            }
        };
        let mut free = ports::free(4 * options.members)?.into_iter();
        let names = ('a'..='z').map(|letter| format!("node-{letter}"));
        let members: Vec<Member> = names
            .take(options.members)
            .zip(options.hosts.iter().cloned().chain(std::iter::repeat_with(Host::default)))
            .filter_map(|(name, host)| {
                Some(Member::new(&base, &name, host, [free.next()?, free.next()?, free.next()?, free.next()?]))
            })
            .collect();
        // From here on the cluster's drop cleans up, whatever fails.
        let cluster = Cluster {
            name,
            base,
            members,
            etcd,
            ids: Ids::default(),
            started,
            token: None,
            binary,
            keep: options.keep,
            ended: false,
        };
        let common = Common {
            cluster: cluster.name.clone(),
            etcd: cluster.etcd.endpoints(),
            members: cluster.members.iter().map(|m| (m.name.clone(), m.host.address, m.port, m.api_port)).collect(),
            durability: options.durability,
            lease: options.lease,
            etcd_try_timeout: options.etcd_try_timeout,
            parameters: options.parameters,
            endpoint: options.endpoint,
            log_level: options.log_level,
        };
        for index in 0..cluster.members.len() {
            cluster.members[index].write_files(&owner, &common)?;
        }
        Ok(cluster)
    }

    // === Looking ===

    pub fn index(&self, member: &str) -> Option<usize> {
        self.members.iter().position(|m| m.name == member)
    }

    pub fn urls(&self) -> Vec<String> {
        self.members.iter().map(Member::url).collect()
    }

    pub fn client(&self) -> Client {
        Client::of(self.urls()).with_token(self.token.clone())
    }

    /// All agents' answers, in the members' order.
    pub async fn look(&self) -> Vec<Look> {
        let client = self.client();
        let urls = self.urls();
        let looks = urls.iter().map(async |url| match client.look(url, "/primary", Duration::from_secs(1)).await {
            Some((status, node)) => Look { primary: Some(status), node },
            None => Look::default(),
        });
        futures_util::future::join_all(looks).await
    }

    /// The member whose agent says that it is writable under a valid lease.
    pub async fn primary(&self) -> Option<usize> {
        self.look().await.iter().position(Look::is_primary)
    }

    /// Waits until `reached` is true of the agents' answers.
    pub async fn wait_for(
        &self,
        what: &str,
        within: Duration,
        reached: impl Fn(&[Look]) -> bool,
    ) -> Result<Vec<Look>, DemoError> {
        let begun = Instant::now();
        loop {
            let looks = self.look().await;
            if reached(&looks) {
                return Ok(looks);
            }
            if begun.elapsed() > within {
                return Err(self.timed_out(what, within, &looks));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// One primary, and every other member streams from it.
    pub async fn healthy(&self, within: Duration) -> Result<usize, DemoError> {
        let looks = self.wait_for("one primary and every other member streaming", within, is_healthy).await?;
        looks.iter().position(Look::is_primary).ok_or_else(|| DemoError::failed("find the primary", "it is gone again"))
    }

    fn timed_out(&self, what: &str, within: Duration, looks: &[Look]) -> DemoError {
        let words: Vec<String> = self
            .members
            .iter()
            .zip(looks)
            .map(|(member, look)| match look.primary {
                None => format!("{}: no answer", member.name),
                Some(_) => {
                    format!("{}: {} {}, {}", member.name, look.text("role"), look.text("state"), look.text("reason"))
                }
            })
            .collect();
        DemoError::TimedOut { what: what.to_owned(), within, last: words.join("; "), logs: self.base.clone() }
    }

    // === Clients ===

    /// From start to a cluster with all members streaming and a table to write to.
    pub async fn ready(&self, within: Duration) -> Result<Duration, DemoError> {
        let primary = self.healthy(within).await?;
        self.make_database(primary).await?;
        Ok(self.started.elapsed())
    }

    async fn make_database(&self, primary: usize) -> Result<(), DemoError> {
        let what = "make the writers' database";
        let run = async |login: Login, statements: &[&str]| -> Result<(), DemoError> {
            let session = self.connect(primary, &login).await?;
            for statement in statements {
                session.batch_execute(statement).await.map_err(|e| DemoError::failed(what, sql::sentence(&e)))?;
            }
            Ok(())
        };
        run(Login::superuser(), &["CREATE ROLE app LOGIN PASSWORD 'app'", "CREATE DATABASE app OWNER app"]).await?;
        let table = "CREATE TABLE writes (id bigint PRIMARY KEY, client int NOT NULL, \
                     at timestamptz NOT NULL DEFAULT clock_timestamp())";
        run(Login::app(), &[table]).await
    }

    pub async fn connect(&self, member: usize, login: &Login) -> Result<Session, DemoError> {
        let member = &self.members[member];
        sql::connect_to(member.address(), login, Duration::from_secs(5))
            .await
            .map_err(|why| DemoError::failed(format!("connect to PostgreSQL of {}", member.name), why))
    }

    pub fn addresses(&self) -> Vec<Address> {
        self.members.iter().map(|m| Address { member: m.name.clone(), at: m.address() }).collect()
    }

    /// Where clients come in through endpoints.
    pub fn endpoints(&self) -> Vec<Address> {
        self.members.iter().map(|m| Address { member: m.name.clone(), at: m.endpoint() }).collect()
    }

    pub fn writer(&self, clients: usize) -> Writer {
        Writer::start(self.addresses(), &Login::app(), &self.ids, clients)
    }

    pub fn pinned_writer(&self) -> Writer {
        Writer::pinned(self.addresses(), &Login::app(), &self.ids)
    }

    // === Breaking ===

    /// SIGKILL to the postmaster alone; its children outlive it for a moment.
    pub fn kill_postmaster(&self, member: usize) -> Result<Instant, DemoError> {
        let name = &self.members[member].name;
        let pid = self.members[member]
            .postmaster()
            .ok_or_else(|| DemoError::failed(format!("kill PostgreSQL of {name}"), "it does not run"))?;
        let at = Instant::now();
        processes::send(pid, Signal::SIGKILL);
        Ok(at)
    }

    pub fn kill_agent(&self, member: usize) -> Instant {
        let at = Instant::now();
        self.members[member].signal_agent(Signal::SIGKILL);
        at
    }

    /// SIGSTOP: the agent lives and does nothing.
    pub fn stop_agent(&self, member: usize) -> Instant {
        let at = Instant::now();
        self.members[member].signal_agent(Signal::SIGSTOP);
        at
    }

    pub fn continue_agent(&self, member: usize) {
        self.members[member].signal_agent(Signal::SIGCONT);
    }

    /// Agent, guardian and every process of PostgreSQL at once, as if the power of this member went away while its
    /// kernel still answers.
    pub fn kill_member(&self, member: usize) -> Instant {
        let all = self.members[member].processes();
        let at = Instant::now();
        for pid in all {
            processes::send(pid, Signal::SIGKILL);
        }
        at
    }

    /// Starts the agent again, as systemd would.
    pub fn start_agent(&mut self, member: usize) -> Result<(), DemoError> {
        self.members[member].start_agent(&self.binary)
    }

    /// SIGTERM, and waits for the agent's orderly end.
    pub async fn stop_member(&mut self, member: usize) -> Result<(), DemoError> {
        let (name, log) = (self.members[member].name.clone(), self.members[member].agent_log());
        let Some(agent) = self.members[member].agent() else { return Ok(()) };
        agent.signal(Signal::SIGTERM);
        if agent.wait(ORDERLY_STOP).await {
            return Ok(());
        }
        Err(DemoError::TimedOut {
            what: format!("stop {name}"),
            within: ORDERLY_STOP,
            last: "still running".to_owned(),
            logs: log,
        })
    }

    // === Ending ===

    /// Files and logs stay; to be called when something failed.
    pub fn keep_files(&mut self) {
        self.keep = true;
    }

    /// Ends everything in order; returns what was left to be killed (0 is right), and where the logs are if they are kept.
    pub async fn shutdown(mut self) -> (usize, Option<PathBuf>) {
        for member in &self.members {
            member.signal_agent(Signal::SIGCONT);
            member.signal_agent(Signal::SIGTERM);
        }
        let begun = Instant::now();
        for member in &mut self.members {
            if let Some(agent) = member.agent() {
                agent.wait(ORDERLY_STOP.saturating_sub(begun.elapsed())).await;
            }
        }
        // A guardian that has nothing to guard any more ends by itself.
        let mut left = 0;
        for member in &self.members {
            if !processes::gone(&member.directory, Duration::from_secs(2)).await {
                left += processes::under(&member.directory).len();
                processes::kill_under(&member.directory, KILL).await;
            }
        }
        self.etcd.stop().await;
        processes::kill_under(&self.base, KILL).await;
        (left, self.remove())
    }

    fn remove(&mut self) -> Option<PathBuf> {
        self.ended = true;
        for member in &self.members {
            let socket = member.directory.join("state/guardian.sock");
            processes::remove_control_group(&control_group_name(&self.name, &member.name, &socket));
        }
        if self.keep {
            let _ = std::fs::remove_file(self.base.join(OWNER));
            return Some(self.base.clone());
        }
        let _ = std::fs::remove_dir_all(&self.base);
        None
    }
}

impl Drop for Cluster {
    /// The way out of a panic or an early return: no orderly stop, but nothing stays, except the logs of what failed.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        end_all(&self.base);
        if std::thread::panicking() {
            self.keep = true;
            eprintln!("logs of the failed cluster are in {}", self.base.display());
        }
        self.remove();
    }
}

/// One primary, and every other member streams from it. On its timeline: a member that parted from it connects too, for
/// the moment until it notices.
pub fn is_healthy(looks: &[Look]) -> bool {
    let mut primaries = looks.iter().filter(|look| look.is_primary());
    let (Some(primary), None) = (primaries.next(), primaries.next()) else { return false };
    let follows = |look: &&Look| look.is_streaming() && look.timeline() == primary.timeline();
    looks.iter().filter(follows).count() + 1 == looks.len()
}

/// Ends what a demo left that could not end itself (SIGKILL): directories whose owner is gone. Kept ones have no owner.
fn sweep(parent: Option<&Path>) {
    let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let base = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(BASE_PREFIX)
            && entry.metadata().is_ok_and(|m| m.is_dir() && m.uid() == nix::unistd::geteuid().as_raw());
        let text = std::fs::read_to_string(base.join(OWNER)).unwrap_or_default();
        // A process of another container is not to be seen here, and may well be alive.
        let owner = text.split_once(' ').filter(|(_, numbers)| *numbers == process_numbers()).map(|(owner, _)| owner);
        if ours && owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
            end_all(&base);
            let _ = std::fs::remove_dir_all(&base);
        }
    }
}

/// Names the set of process numbers that ours belongs to.
fn process_numbers() -> String {
    std::fs::read_link("/proc/self/ns/pid").map(|link| link.display().to_string()).unwrap_or_default()
}

/// Kills everything under `base`, without awaiting: for drop, and before anything else runs.
fn end_all(base: &Path) {
    let begun = Instant::now();
    while processes::kill_once(base) > 0 && begun.elapsed() < KILL {
        #[allow(clippy::disallowed_methods, reason = "drop cannot await; nothing else is to be done on this thread")]
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A fresh directory and a name that no other cluster on this machine has: control groups are named after it.
fn base_directory(parent: Option<&Path>) -> Result<(String, PathBuf), DemoError> {
    let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
    let mut bytes = [0_u8; 4];
    getrandom::fill(&mut bytes).map_err(|error| DemoError::failed("choose a name", error))?;
    let suffix = format!("{:08x}", u32::from_le_bytes(bytes));
    let name = format!("demo-{suffix}");
    let base = parent.join(format!("{BASE_PREFIX}{suffix}"));
    let made = std::fs::create_dir(&base).and_then(|()| {
        // PostgreSQL's user has to get through.
        std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o755))?;
        std::fs::write(base.join(OWNER), format!("{} {}", std::process::id(), process_numbers()))?;
        std::fs::canonicalize(&base)
    });
    let base = made.map_err(|error| DemoError::failed(format!("make {}", base.display()), error))?;
    Ok((name, base))
}
