//! A cluster on hosts of its own, made ready for faults, healed after them, and looked at: who is who, what its agents said.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pgvigil::client::Client;
use pgvigil::config::Secret;
use pgvigil::demo::sql::{Login, Session};
use pgvigil::demo::workload::{Ledger, make_tables};
use pgvigil::demo::writer::Address;
use pgvigil::demo::{Cluster, Disk, Look, Options, processes};
use serde_json::Value;

use super::hosts::{self, Hosts};
use super::scenario::Setup;

/// From the start to a cluster with everybody streaming, and from the end of the faults to the same.
const READY: Duration = Duration::from_secs(90);
pub const LOOK: Duration = Duration::from_millis(50);
/// Half of the default lease, as in tests/cluster: the same rules, half the waiting.
const LEASE: &str = "ttl = \"4s\"\nheartbeat = \"500ms\"\nrenewal_timeout = \"1200ms\"";
/// Room for a cluster, some set-aside directories, and a `fill-disk` that is over soon.
const DISK_MB: u64 = 640;
const PARAMETERS: &str =
    "shared_buffers = \"32MB\"\nmin_wal_size = \"32MB\"\nmax_wal_size = \"64MB\"\nmax_connections = 120";
pub const FILLER: &str = "filler";

pub struct Stage {
    pub setup: Setup,
    // Dropped in this order: what is frozen cannot be ended, a mounted disk keeps its directory, and namespaces go when
    // nobody is in them.
    _thaw: hosts::Thaw,
    pub disks: Vec<Disk>,
    pub cluster: Cluster,
    pub hosts: Hosts,
    pub ledger: Ledger,
    /// What `etcd-save` wrote.
    pub backup: Option<PathBuf>,
}

/// Who is who at the beginning of a scenario.
#[derive(Clone, Debug)]
pub struct Cast {
    pub primary: usize,
    pub standby: usize,
    pub other: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    Member(usize),
    Store(usize),
    /// The network between clients and members.
    Clients,
}

/// What is compared before and after.
#[derive(Clone, Debug)]
pub struct Before {
    pub primary: usize,
    pub term: Option<u64>,
    pub postmaster: Option<i32>,
    /// Inode of each member's data directory.
    pub data: Vec<Option<u64>>,
    pub system: Vec<String>,
    /// How long each agent's log was.
    pub logs: Vec<u64>,
}

impl Stage {
    pub async fn set(setup: &Setup, binary: &Path) -> Result<Stage, String> {
        sweep_mounts();
        let names: Vec<String> = ('a'..='z').take(setup.members).map(|letter| format!("node-{letter}")).collect();
        let hosts = Hosts::make(&names, 3)?;
        let options = Options {
            members: setup.members,
            hosts: names.iter().map(|name| hosts.host(name)).collect(),
            etcd_hosts: (1..=3).map(|n| hosts.host(&format!("etcd-{n}"))).collect(),
            binary: Some(binary.to_owned()),
            durability: setup.mode.clone(),
            lease: setup.lease.clone().unwrap_or_else(|| LEASE.to_owned()),
            etcd_try_timeout: "500ms".to_owned(),
            parameters: format!("{PARAMETERS}\n{}", setup.parameters),
            ..Options::default()
        };
        let mut cluster = Cluster::prepare(options).map_err(|error| error.to_string())?;
        cluster.token = Some(Secret::new(hosts::TOKEN));
        let mut stage = Stage {
            setup: setup.clone(),
            _thaw: hosts.thaw_on_drop(),
            disks: Vec::new(),
            cluster,
            hosts,
            ledger: Ledger::default(),
            backup: None,
        };
        match stage.prepare().await {
            Ok(()) => Ok(stage),
            Err(why) => {
                super::play::keep(&stage, "start");
                Err(why)
            }
        }
    }

    async fn prepare(&mut self) -> Result<(), String> {
        // Many crashes in a row are the business here, not a loop.
        let patience = "[crash]\nmax_restarts = 1000";
        for index in 0..self.cluster.members.len() {
            let name = self.cluster.members[index].name.clone();
            let own = [self.setup.settings.get("all"), self.setup.settings.get(&name)].into_iter().flatten();
            let own: Vec<&str> = own.map(String::as_str).collect();
            let lines =
                if own.iter().any(|text| text.contains("[crash]")) { String::new() } else { patience.to_owned() };
            self.configure(index, &format!("{lines}\n{}", own.join("\n")))?;
            let image = self.cluster.base.join(format!("{name}.disk"));
            let file = std::fs::File::create(&image).map_err(|error| format!("make {}: {error}", image.display()))?;
            file.set_len(DISK_MB << 20).map_err(|error| format!("make {}: {error}", image.display()))?;
            hosts::run(
                "mkfs.ext4",
                &["-q", "-F", "-m", "0", "-E", "lazy_itable_init=1", &image.to_string_lossy()],
                "",
            )?;
            let disk = self.disk(index).await?;
            self.disks.push(disk);
        }
        for index in 0..self.cluster.members.len() {
            self.cluster.start_agent(index).map_err(|error| error.to_string())?;
        }
        self.cluster.ready(READY).await.map_err(|error| error.to_string())?;
        let primary = self.whole().await?;
        let session = self.cluster.connect(primary, &Login::app()).await.map_err(|error| error.to_string())?;
        make_tables(&session).await
    }

    async fn disk(&self, member: usize) -> Result<Disk, String> {
        let member = &self.cluster.members[member];
        let image = self.cluster.base.join(format!("{}.disk", member.name));
        Disk::mount(&image, member.directory.join("pg")).await.map_err(|error| error.to_string())
    }

    /// After an `unmount`; a disk that is mounted stays as it is.
    pub fn mount(&self, member: usize) -> Result<(), String> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let at = self.disks[member].mounted.display().to_string();
        if mounts.lines().any(|line| line.split(' ').nth(1) == Some(&at)) {
            return Ok(());
        }
        // Its owner is written on it; the disk that is dropped at the end takes this mount away too.
        let image = self.cluster.base.join(format!("{}.disk", self.cluster.members[member].name));
        hosts::run("mount", &[&image.to_string_lossy(), &at], "").map(|_| ())
    }

    /// In the member's directory, with what commands need in the environment; ended with its whole process group.
    pub fn command(&self, member: usize, command: &str) -> tokio::process::Command {
        let member = &self.cluster.members[member];
        let mut shell = tokio::process::Command::new("sh");
        shell
            .args(["-c", command])
            .current_dir(&member.directory)
            .env("AGENT", env!("CARGO_BIN_EXE_pgvigil"))
            .env("CONFIG", member.config_file())
            .env("DATA", member.data_dir())
            .env("BIN", pgvigil::cli::newest_bin_dir().unwrap_or_default())
            .env("PGHOST", member.host.address.to_string())
            .env("PGPORT", member.port.to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "app")
            .env("PGPASSWORD", Login::superuser().password)
            .env("URL", member.url())
            .env("POSTMASTER", member.postmaster().unwrap_or_default().to_string())
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .process_group(0)
            .kill_on_drop(true);
        shell
    }

    pub async fn shell(&self, member: usize, command: &str, fails: Option<&str>) -> Result<(), String> {
        let mut shell = self.command(member, command);
        shell.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let output = tokio::time::timeout(Duration::from_secs(60), shell.output()).await;
        let output = output.map_err(|_| "not finished within 60 s".to_owned())?.map_err(|error| error.to_string())?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match (fails, output.status.success()) {
            (None, true) => Ok(()),
            (Some(text), false) if said.contains(text) => Ok(()),
            _ => Err(format!("{}, it said: {}", output.status, said.trim())),
        }
    }

    fn configure(&self, member: usize, lines: &str) -> Result<(), String> {
        let path = self.cluster.members[member].config_file();
        let file = std::fs::OpenOptions::new().append(true).open(&path);
        file.and_then(|mut file| writeln!(file, "\n{lines}"))
            .map_err(|error| format!("write {}: {error}", path.display()))
    }

    // === Looking ===

    /// One primary, everybody else streaming, and in `sync` everybody who streams counted: any of them may be the next.
    pub async fn whole(&self) -> Result<usize, String> {
        let begun = Instant::now();
        loop {
            let left = READY.saturating_sub(begun.elapsed());
            let primary = self.cluster.healthy(left).await.map_err(|error| error.to_string())?;
            let status = self.status(primary).await;
            let counted = status["durability"]["members"].as_array().map_or(0, Vec::len);
            let nosync = self.setup.settings.values().filter(|text| text.contains("nosync = true")).count();
            let wanted = self.cluster.members.len() - 1 - nosync;
            let settled =
                status["durability"]["degraded"] == false && (self.setup.mode == "async" || counted >= wanted);
            if settled {
                return Ok(primary);
            }
            if begun.elapsed() > READY {
                return Err(format!("the synchronous set is not whole again: {}", status["durability"]));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    pub async fn cast(&self) -> Result<Cast, String> {
        let primary = self.whole().await?;
        let mut others = (1..self.cluster.members.len()).map(|step| (primary + step) % self.cluster.members.len());
        // A cluster of one is its own standby.
        let standby = others.next().unwrap_or(primary);
        Ok(Cast { primary, standby, other: others.next() })
    }

    pub async fn status(&self, member: usize) -> Value {
        let url = self.cluster.members[member].url();
        let answer = Client::of(vec![url.clone()]).look(&url, "/v1/status", Duration::from_secs(2)).await;
        answer.map(|(_, body)| body).unwrap_or_default()
    }

    pub async fn before(&self, cast: &Cast) -> Before {
        let looks = self.cluster.look().await;
        let system = |look: &Look| look.text("database_system_identifier").to_owned();
        Before {
            primary: cast.primary,
            term: self.status(cast.primary).await["leader"]["term"].as_u64(),
            postmaster: self.cluster.members[cast.primary].postmaster(),
            data: self.cluster.members.iter().map(|m| inode(&m.data_dir())).collect(),
            system: looks.iter().map(system).collect(),
            logs: self
                .cluster
                .members
                .iter()
                .map(|m| std::fs::metadata(m.agent_log()).map_or(0, |m| m.len()))
                .collect(),
        }
    }

    /// What this member's agent wrote since then.
    pub fn said(&self, member: usize, before: &Before) -> String {
        let bytes = std::fs::read(self.cluster.members[member].agent_log()).unwrap_or_default();
        let from = usize::try_from(before.logs[member]).unwrap_or(0).min(bytes.len());
        String::from_utf8_lossy(&bytes[from..]).into_owned()
    }

    /// By the address that clients are told, and by each member's own.
    pub fn addresses(&self) -> (Vec<Address>, Vec<Address>) {
        let own = self.cluster.addresses();
        let published = own.iter().map(|address| {
            let at = self.hosts.published(&address.member).map_or(address.at, |ip| (ip, address.at.port()).into());
            Address { member: address.member.clone(), at }
        });
        (published.collect(), own)
    }

    pub fn host_of(&self, target: Target) -> Option<String> {
        match target {
            Target::Member(index) => Some(self.cluster.members[index].name.clone()),
            Target::Store(index) => Some(self.cluster.etcd.members[index].name.clone()),
            Target::Clients => None,
        }
    }

    // === Processes ===

    pub fn pids(&self, member: usize, what: &str) -> Vec<i32> {
        let member = &self.cluster.members[member];
        match what {
            // One that ended and was not waited for yet has no arguments any more.
            "agent" => member.agent_pid().into_iter().filter(|pid| !arguments(*pid)[0].is_empty()).collect(),
            "postmaster" => member.postmaster().into_iter().collect(),
            "everything" => self.hosts.processes(&member.name),
            "postgres" => processes::under(&member.data_dir()),
            "guardian" => processes::under(&member.directory)
                .into_iter()
                .filter(|pid| arguments(*pid).get(1).is_some_and(|word| word == "guardian"))
                .collect(),
            // One of the clients' own.
            "backend" => titled(&member.data_dir(), " app app ").into_iter().take(1).collect(),
            title => titled(&member.data_dir(), &format!(": {title}")),
        }
    }

    // === Healing ===

    /// Ends every fault and waits until the cluster is as it was; returns the primary.
    pub async fn heal(&mut self) -> Result<usize, String> {
        self.end_faults().await?;
        self.whole().await
    }

    pub async fn end_faults(&mut self) -> Result<(), String> {
        for index in 0..self.disks.len() {
            self.mount(index)?;
            self.disks[index].thaw();
            let _ = std::fs::remove_file(self.disks[index].mounted.join(FILLER));
        }
        self.hosts.heal()?;
        for index in 0..self.cluster.etcd.members.len() {
            if self.cluster.etcd.is_down(index) {
                self.cluster.etcd.start_member(index).map_err(|error| error.to_string())?;
            }
            self.cluster.etcd.signal(index, Signal::SIGCONT);
        }
        // Of an etcd that is full, if there is one.
        let _ = self.store_alarm(false).await;
        for index in 0..self.cluster.members.len() {
            for pid in self.hosts.processes(&self.cluster.members[index].name) {
                processes::send(pid, Signal::SIGCONT);
            }
            if self.cluster.members[index].agent_ended().is_some() || self.cluster.members[index].agent_pid().is_none()
            {
                self.cluster.start_agent(index).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// Every standby has replayed what the primary has, and its lists are the primary's.
    pub async fn equal(&self, primary: usize) -> Result<(), String> {
        const LISTS: &str = "SELECT md5(string_agg(key || vals::text, ',' ORDER BY key)) FROM \
                             (SELECT * FROM lists_0 UNION ALL SELECT * FROM lists_1 UNION ALL SELECT * FROM lists_2) AS lists";
        let session = self.superuser(primary).await?;
        let ask = async |session: &Session, sql: &str| -> Result<String, String> {
            let row = session.query_one(sql, &[]).await.map_err(|error| pgvigil::demo::sql::sentence(&error))?;
            Ok(row.get::<_, Option<String>>(0).unwrap_or_default())
        };
        let position = ask(&session, "SELECT pg_current_wal_flush_lsn()::text").await?;
        let expected = ask(&session, LISTS).await?;
        let behind = format!("SELECT (pg_last_wal_replay_lsn() < '{position}')::text");
        let begun = Instant::now();
        for member in (0..self.cluster.members.len()).filter(|member| *member != primary) {
            let name = &self.cluster.members[member].name;
            let session = self.superuser(member).await?;
            while ask(&session, &behind).await? != "false" {
                if begun.elapsed() > READY {
                    return Err(format!("{name} has not replayed {position} within {READY:?}"));
                }
                tokio::time::sleep(LOOK).await;
            }
            if ask(&session, LISTS).await? != expected {
                return Err(format!("{name} holds other rows than the primary at {position}"));
            }
        }
        Ok(())
    }

    /// One timeline has one history, wherever its file lies (S6); `pg_rewind` looks for the common ancestor in them.
    pub fn one_history(&self) -> Result<(), String> {
        let mut known: BTreeMap<String, (String, String)> = BTreeMap::new();
        for member in &self.cluster.members {
            let entries = std::fs::read_dir(member.data_dir().join("pg_wal")).into_iter().flatten().flatten();
            for entry in entries.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "history")) {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                // Number and position; the reason behind them is prose.
                let lines = text.lines().filter_map(|line| {
                    let mut words = line.split_whitespace();
                    Some(format!("{} {}", words.next()?, words.next()?))
                });
                let lines = lines.collect::<Vec<_>>().join(", ");
                let file = entry.file_name().to_string_lossy().into_owned();
                let first = known.entry(file.clone()).or_insert_with(|| (member.name.clone(), lines.clone()));
                if first.1 != lines {
                    let name = &member.name;
                    return Err(format!("{file} is `{}` at {} and `{lines}` at {name}", first.1, first.0));
                }
            }
        }
        Ok(())
    }

    pub async fn superuser(&self, member: usize) -> Result<Session, String> {
        let login = Login { database: "app".to_owned(), ..Login::superuser() };
        self.cluster.connect(member, &login).await.map_err(|error| error.to_string())
    }

    /// Space for the next scenario: what was set aside was looked at.
    pub fn remove_set_aside(&self) {
        for member in &self.cluster.members {
            for path in beside(&member.data_dir()) {
                let _ = std::fs::remove_dir_all(path);
            }
        }
    }

    /// A data directory of before that is neither in place nor set aside.
    pub fn replaced(&self, before: &Before) -> Vec<(String, bool)> {
        let each = self.cluster.members.iter().zip(&before.data);
        each.filter_map(|(member, inode_before)| {
            let inode_before = (*inode_before)?;
            if inode(&member.data_dir()) == Some(inode_before) {
                return None;
            }
            let kept = beside(&member.data_dir()).iter().any(|path| inode(path) == Some(inode_before));
            Some((member.name.clone(), kept))
        })
        .collect()
    }

    /// Orderly end; the error names what was left.
    pub async fn strike(mut self) -> Result<(), String> {
        let ended = self.end_faults().await;
        for index in 0..self.cluster.members.len() {
            self.cluster.members[index].signal_agent(Signal::SIGTERM);
        }
        for index in 0..self.cluster.members.len() {
            if let Some(agent) = self.cluster.members[index].agent() {
                agent.wait(Duration::from_secs(40)).await;
            }
        }
        let Stage { disks, cluster, hosts, .. } = self;
        drop(disks);
        let (left, _) = cluster.shutdown().await;
        drop(hosts);
        ended?;
        if left > 0 {
            return Err(format!("{left} processes had to be killed at the end"));
        }
        Ok(())
    }
}

pub fn inode(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|m| m.ino())
}

/// Directories beside the data that were renamed out of the way.
fn beside(data: &Path) -> Vec<PathBuf> {
    let entries = data.parent().and_then(|parent| std::fs::read_dir(parent).ok()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains(".aside-")).collect()
}

fn arguments(pid: i32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// Processes of this data directory whose title holds the text.
fn titled(data: &Path, text: &str) -> Vec<i32> {
    processes::under(data).into_iter().filter(|pid| arguments(*pid).join(" ").contains(text)).collect()
}

/// Mounts of runs that were killed: their owner is gone, their disks are still there.
fn sweep_mounts() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let owners: BTreeMap<&str, bool> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|mounted| mounted.contains("/pgvigil-demo-"))
        .map(|mounted| {
            let base = Path::new(mounted).ancestors().nth(2).unwrap_or(Path::new("/"));
            let owner = std::fs::read_to_string(base.join("owner.pid")).unwrap_or_default();
            let pid = owner.split_whitespace().next().unwrap_or_default().to_owned();
            (mounted, !pid.is_empty() && !Path::new("/proc").join(pid).exists())
        })
        .collect();
    for (mounted, _) in owners.iter().filter(|(_, orphaned)| **orphaned) {
        let _ = hosts::run("fsfreeze", &["-u", mounted], "");
        let _ = hosts::run("umount", &["-l", mounted], "");
    }
}
