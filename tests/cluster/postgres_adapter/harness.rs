//! One member for a test: a `LocalServer` in a temporary directory, and its PostgreSQL started as the guardian would.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgvigil::config::*;
use pgvigil::core::lease::{Takeover, Timings};
use pgvigil::core::names::{ClusterName, Incarnation, MemberId, MemberName};
use pgvigil::core::plan::{Follow, PromoteOrder, Source, SyncRule, walreceiver_name};
use pgvigil::core::records::{Durability, Tags};
use pgvigil::core::storage::StoragePolicy;
use pgvigil::core::timeline::{Term, TimelineId};
use pgvigil::core::view::{Guard, GuardState, LocalPostgres, Policy, PrimaryFacts, Receiver, StandbyFacts};
use pgvigil::ports::{self, Launch, Postgres, PostgresError, Promotion, StartMode};
use pgvigil::postgres::LocalServer;

pub const LONG: Duration = Duration::from_secs(20);

/// Prints and returns true where there is nothing to test with.
pub fn skipped() -> bool {
    let found = Path::new("/usr/lib/postgresql").exists() || Path::new("/usr/pgsql-15").exists();
    if !found {
        println!("skipped: no postgresql is installed here");
    }
    !found
}

pub struct Cluster {
    pub directory: tempfile::TempDir,
    members: Vec<MemberAddress>,
}

pub struct Member {
    pub server: LocalServer,
    pub config: Config,
    pub id: MemberId,
    pub process: Option<Child>,
}

impl Cluster {
    pub fn new(names: &[&str]) -> Cluster {
        let directory = tempfile::tempdir().unwrap();
        // PostgreSQL's user has to pass.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        // All held at once, so that no two are equal.
        let listeners: Vec<_> = names.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let member = |(name, listener): (&&str, &TcpListener)| MemberAddress {
            name: MemberName::new(*name).unwrap(),
            host: "127.0.0.1".to_owned(),
            port: listener.local_addr().unwrap().port(),
            api_port: 1,
        };
        let members = names.iter().zip(&listeners).map(member).collect();
        Cluster { directory, members }
    }

    pub fn member(&self, name: &str) -> Member {
        self.member_with(name, &[])
    }

    pub fn member_with(&self, name: &str, parameters: &[(&str, &str)]) -> Member {
        let config = self.config(name, parameters);
        let id = MemberId { name: config.name.clone(), incarnation: Incarnation(7) };
        Member { server: LocalServer::new(&config).unwrap(), config, id, process: None }
    }

    fn config(&self, name: &str, parameters: &[(&str, &str)]) -> Config {
        let home = self.directory.path().join(name);
        std::fs::create_dir_all(&home).unwrap();
        // As root the data directory is made inside a directory of PostgreSQL's user.
        let name = MemberName::new(name).unwrap();
        let port = self.members.iter().find(|m| m.name == name).unwrap().port;
        let ms = Duration::from_millis;
        Config {
            endpoint: None,
            path: home.join("pgvigil.toml"),
            cluster: ClusterName::new("test").unwrap(),
            name,
            state_dir: home.join("state"),
            members: self.members.clone(),
            etcd: EtcdConfig {
                endpoints: Vec::new(),
                user: None,
                ca_file: None,
                cert_file: None,
                key_file: None,
                try_timeout: ms(500),
                prefix: "/pgvigil".into(),
            },
            postgresql: PostgresConfig {
                data_dir: home.join("data"),
                bin_dir: None,
                os_user: "postgres".into(),
                listen: "127.0.0.1".into(),
                port,
                socket_dir: home.join("run"),
                superuser: "postgres".into(),
                superuser_password: Secret::new("super secret"),
                internal_password: Secret::new(r"internal: it's \secret"),
                parameters: parameters.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
                hba: Vec::new(),
                set_aside_budget: 1 << 30,
                initdb_options: Vec::new(),
            },
            policy: Policy {
                timings: Timings {
                    heartbeat: ms(1000),
                    ttl: ms(8000),
                    kill_budget: ms(1000),
                    renewal_timeout: ms(2000),
                },
                durability: Durability::Sync,
                k: 1,
                max_stall: ms(5000),
                max_lag: 1 << 20,
                election_wait: ms(500),
                election_give_up: ms(3000),
                crash_failover: true,
                crash_max_restarts: 3,
                crash_window: ms(60_000),
                start_timeout: ms(60_000),
                stop_timeout: ms(60_000),
                member_publish: ms(3000),
                rejoin_timeout: Duration::from_secs(60),
                reclone: true,
                storage: StoragePolicy::default(),
                takeover: Takeover::default(),
                cold_start_wait: Duration::from_secs(60),
            },
            tags: Tags::default(),
            api: ApiConfig {
                listen: "127.0.0.1:1".parse().unwrap(),
                token: None,
                max_connections: 10,
                header_timeout: ms(1000),
            },
            guardian: GuardianConfig { socket: home.join("guardian"), real_time_priority: 0 },
            log: LogConfig { level: "info".into(), json: false },
        }
    }
}

impl Member {
    pub fn data_dir(&self) -> &Path {
        &self.config.postgresql.data_dir
    }

    pub fn wal_file(&self, name: &str) -> PathBuf {
        self.data_dir().join("pg_wal").join(name)
    }

    pub fn source(&self) -> ports::Source {
        let me = self.config.me();
        ports::Source { member: me.name.clone(), host: me.host.clone(), port: me.port }
    }

    /// The order to follow this member, for `follower`.
    pub fn followed_by(&self, follower: &Member, term: u64) -> Follow {
        let me = self.config.me();
        Follow {
            upstream: Source { member: me.name.clone(), host: me.host.clone(), port: me.port },
            slot: follower.id.name.slot(),
            walreceiver: walreceiver_name(&follower.id, Term(term)),
            term: Term(term),
        }
    }

    pub fn name(&self, term: u64) -> String {
        walreceiver_name(&self.id, Term(term))
    }

    // === As the guardian ===

    pub async fn start(&mut self, mode: StartMode) {
        let launch = self.server.prepare_start(&mode).await.unwrap();
        self.run(&launch);
        let started = Instant::now();
        while !matches!(self.observe().await, LocalPostgres::Standby(_)) {
            assert!(started.elapsed() < LONG, "{:?}\n{}", self.observe().await, self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn run(&mut self, launch: &Launch) {
        assert!(self.process.is_none(), "one is running already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&launch.log_file).unwrap();
        let mut command = Command::new(&launch.program);
        command.args(&launch.arguments).env_clear().envs(launch.environment.iter().cloned()).current_dir("/");
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        if let Some((uid, gid, _)) = &launch.user {
            command.uid(*uid).gid(*gid);
        }
        self.process = Some(command.process_group(0).spawn().unwrap());
    }

    pub fn guard(&self) -> Guard {
        let state = match &self.process {
            Some(process) => GuardState::Running { postmaster: process.id() as i32, armed: None },
            None => GuardState::Idle { exit: None },
        };
        Guard { state, real_time: false, control_group: false, death_covered: false }
    }

    pub fn stop(&mut self) {
        self.end(Signal::SIGINT);
    }

    fn end(&mut self, signal: Signal) {
        if let Some(mut process) = self.process.take() {
            kill(Pid::from_raw(process.id() as i32), signal).unwrap();
            process.wait().unwrap();
        }
    }

    /// As the guardian without a control group: the postmaster is stopped, its children die, then it dies.
    pub fn crash(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let postmaster = Pid::from_raw(process.id() as i32);
        kill(postmaster, Signal::SIGSTOP).unwrap();
        for child in self.children(postmaster.as_raw()) {
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        kill(postmaster, Signal::SIGKILL).unwrap();
        process.wait().unwrap();
    }

    fn children(&self, parent: i32) -> Vec<i32> {
        let path = format!("/proc/{parent}/task/{parent}/children");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }

    /// Process id of a child whose title holds `title` (`startup`, `checkpointer`, `walreceiver`, …).
    pub fn child(&self, title: &str) -> Option<i32> {
        let postmaster = self.process.as_ref()?.id() as i32;
        self.children(postmaster)
            .into_iter()
            .find(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains(title)))
    }

    pub fn freeze(&self, title: &str) -> Frozen {
        let pid = self.child(title).unwrap_or_else(|| panic!("no {title}"));
        freeze(pid)
    }

    pub fn log(&self) -> String {
        let directory = self.config.state_dir.join("postgresql/log");
        let mut text = String::new();
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            text.push_str(&std::fs::read_to_string(entry.path()).unwrap_or_default());
        }
        text
    }

    // === Looking ===

    pub async fn observe(&self) -> LocalPostgres {
        self.server.observe(&self.guard(), Duration::from_secs(2)).await
    }

    pub async fn standby(&self) -> StandbyFacts {
        match self.observe().await {
            LocalPostgres::Standby(facts) => facts,
            other => panic!("not a standby: {other:?}\n{}", self.log()),
        }
    }

    pub async fn primary(&self) -> PrimaryFacts {
        match self.observe().await {
            LocalPostgres::Primary(facts) => facts,
            other => panic!("not a primary: {other:?}\n{}", self.log()),
        }
    }

    pub async fn streams(&self) -> StandbyFacts {
        let started = Instant::now();
        loop {
            let facts = self.standby().await;
            if facts.receiver == Receiver::Streaming {
                return facts;
            }
            assert!(started.elapsed() < LONG, "{facts:?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A client of this member, as superuser.
    pub async fn client(&self) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.config.postgresql.socket_dir).port(self.config.postgresql.port);
        config.user("postgres").password("super secret").dbname("postgres");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    pub async fn sql(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.unwrap();
    }

    // === Steps ===

    /// Promotes a parked or sealed member to the number after its own.
    pub async fn promote(&self, term: u64) -> Promotion {
        let facts = self.standby().await;
        let order = PromoteOrder {
            term: Term(term),
            timeline: TimelineId(facts.timeline.0 + 1),
            parent: facts.timeline,
            switch: facts.replayed,
            between: BTreeMap::new(),
        };
        let promotion = self.server.promote(&order, LONG).await.unwrap();
        assert_eq!((promotion.timeline, promotion.parent), (order.timeline, order.parent));
        promotion
    }

    /// A new cluster, read-write, with nobody to wait for.
    pub async fn lead_alone(&mut self) {
        self.server.bootstrap().await.unwrap();
        self.start(StartMode::Parked).await;
        self.promote(1).await;
        self.enforce(Some(&SyncRule::Nobody), &SyncRule::Cleared).await.unwrap();
    }

    pub async fn join(&mut self, leader: &Member, term: u64) {
        leader.server.keep_slots(&[(self.id.name.clone(), None)], LONG).await.unwrap();
        let (progress, _) = tokio::sync::watch::channel((None, None));
        self.server.clone_from(&leader.source(), progress).await.unwrap();
        self.start(StartMode::Follow(leader.followed_by(self, term))).await;
        self.streams().await;
    }

    pub async fn enforce(&self, from: Option<&SyncRule>, to: &SyncRule) -> Result<(), PostgresError> {
        self.server.enforce(from, to, LONG).await
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- log of {} ---\n{}", self.id, self.log());
        }
        self.end(Signal::SIGQUIT);
    }
}

pub fn any(k: u32, members: &[&Member], term: u64) -> SyncRule {
    SyncRule::Any { k, members: members.iter().map(|m| m.id.clone()).collect(), term: Term(term) }
}

/// A stopped process; goes on when this is dropped.
pub struct Frozen(Pid);

pub fn freeze(pid: i32) -> Frozen {
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    Frozen(Pid::from_raw(pid))
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Waits for a level.
pub async fn until(what: &str, mut level: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !level().await {
        assert!(started.elapsed() < LONG, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
