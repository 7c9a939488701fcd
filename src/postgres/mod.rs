//! PostgreSQL of this member: its files, its configuration, and talking SQL to it. Implements `ports::Postgres`.
//!
//! What this must never do: decide anything; start, stop or kill PostgreSQL (the guardian does, it gets a `Launch`);
//! delete a data directory (S5); put a clear password into SQL, a log or a command line.
//!
//! It runs no task of its own. Every future here may be dropped: sessions given up in the middle are not used again,
//! programs are killed with their process group, a commit of ours that still waits is ended. What a job leaves in PGDATA is
//! marked as unfinished until it is whole.
//!
//! One noun a file: `session` (wire), `layout` and `files`, `settings` and `hba`, `controldata`, `timelines`,
//! `data_directory`, `roles` (bootstrap), `start`, `observe`, `follow`, `seal`, `promote`, `enforce`, `slots`, `clone`,
//! `rewind`, `kept`, `set_aside`, `programs` and `processes`.

mod clone;
mod controldata;
mod data_directory;
mod enforce;
mod files;
mod follow;
mod hba;
mod kept;
mod layout;
mod observe;
mod processes;
mod programs;
mod promote;
mod reader;
mod rewind;
pub(crate) mod roles;
mod seal;
mod session;
mod set_aside;
mod settings;
mod slots;
mod start;
mod timelines;

use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, timeout_at};

use crate::config::Config;
use crate::core::Lsn;
use crate::core::names::MemberName;
use crate::core::plan::{Follow, PromoteOrder, SyncRule};
use crate::core::records::{KeptWal, Position};
use crate::core::timeline::{History, TimelineId};
use crate::core::view::{DataDirectory, Guard, LocalPostgres};
use crate::ports::{Launch, Postgres, PostgresError, Progress, Promotion, Source, StartMode};

use controldata::ControlFile;
use files::{Owner, broken};
use layout::Layout;
use reader::Reader;
use session::{Address, Login, Session, SessionError};

pub use roles::script as roles_script;
pub use settings::{check_parameters, owned_parameters};

/// The name under which the agents' own connections show in pg_stat_activity.
const OBSERVER: &str = "pgvigil_observer";

/// The member's PostgreSQL.
pub struct LocalServer {
    config: Config,
    layout: Layout,
    owner: Owner,
    /// Kept open between observations. Taken out while in use, so a dropped observation costs a connection, not a lock.
    observer: Mutex<Option<Session>>,
    /// In replication mode, for IDENTIFY_SYSTEM: only it tells which timeline a standby replays.
    timeline_teller: Mutex<Option<Session>>,
    program_version: OnceLock<(PathBuf, u32)>,
    reader: Reader,
}

impl LocalServer {
    /// Fails when the operating system user that PostgreSQL is to run as does not exist. Touches nothing.
    pub fn new(config: &Config) -> Result<LocalServer, PostgresError> {
        let server = LocalServer {
            config: config.clone(),
            layout: Layout::new(config),
            owner: Owner::find(&config.postgresql.os_user)?,
            observer: Mutex::new(None),
            timeline_teller: Mutex::new(None),
            program_version: OnceLock::new(),
            reader: Reader::start().map_err(|e| broken("start a thread", e))?,
        };
        // Where nothing is yet, everything begins with the programs: refused before a word goes to the store. Where
        // PostgreSQL may be running they may be missing for a moment (a package is being upgraded), and nobody is to
        // notice (S10).
        if files::is_empty_directory(&server.layout.data_dir).unwrap_or(false) {
            server.program("postgres")?;
        }
        Ok(server)
    }

    /// A program of PostgreSQL's, by the version of the data where there are any.
    fn program(&self, name: &str) -> Result<PathBuf, PostgresError> {
        let version = data_directory::version(&self.layout.data_dir).unwrap_or_default();
        programs::directory(self.config.postgresql.bin_dir.as_deref(), version).map(|directory| directory.join(name))
    }

    /// Major version of the programs. Asked once for each path: `postgres --version` is a fork.
    async fn major(&self) -> Result<u32, PostgresError> {
        self.major_of(self.program("postgres")?).await
    }

    async fn major_of(&self, program: PathBuf) -> Result<u32, PostgresError> {
        if let Some((_, version)) = self.program_version.get().filter(|(known, _)| *known == program) {
            return Ok(*version);
        }
        let what = format!("ask {} for its version", program.display());
        let arguments = vec!["--version".to_owned()];
        let run = programs::Run { what: &what, program: program.clone(), arguments, input: None, owner: &self.owner };
        let said = run.succeed(|_| ()).await?;
        let version = programs::parse_version(&said).ok_or_else(|| broken(&what, format!("it says `{said}`")))?;
        // A second path (another version installed meanwhile) is asked each time; that is rare and right.
        let _ = self.program_version.set((program, version));
        Ok(version)
    }

    fn control_file(&self, what: &str) -> Result<ControlFile, PostgresError> {
        ControlFile::read(&self.layout.data_dir).map_err(|why| broken(what, why))
    }

    /// What the control file and the history file of a timeline say, for a round of the loop.
    async fn control_and_history(
        &self,
        timeline: TimelineId,
        deadline: Instant,
    ) -> Result<(ControlFile, History), String> {
        let layout = self.layout.clone();
        let read = move || {
            let control = ControlFile::read(&layout.data_dir)?;
            let history = timelines::history(&layout, timeline).map_err(|e| e.to_string())?;
            Ok((control, history))
        };
        self.reader.read(deadline, read).await?
    }

    fn prepare_directories(&self) -> Result<(), PostgresError> {
        self.owner.directory(&self.layout.directory)?;
        self.owner.directory(&self.layout.log_dir)?;
        let sockets = &self.config.postgresql.socket_dir;
        // An existing one (like /var/run/postgresql) is the system's; only a missing one is made.
        if !sockets.exists() {
            self.owner.directory(sockets)?;
            files::restrict(sockets, 0o755)?;
        }
        Ok(())
    }

    // === Sessions ===

    fn socket(&self) -> Address {
        let postgresql = &self.config.postgresql;
        Address::Socket { directory: postgresql.socket_dir.clone(), port: postgresql.port }
    }

    fn login(&self) -> Login {
        Login {
            address: self.socket(),
            user: roles::AGENT.to_owned(),
            password: self.config.postgresql.internal_password.clone(),
            database: "postgres".to_owned(),
            replication: false,
            application_name: OBSERVER.to_owned(),
            // Nobody's function of the same name is called instead of PostgreSQL's.
            settings: vec![("search_path", "pg_catalog"), ("statement_timeout", "0"), ("DateStyle", "ISO")],
        }
    }

    /// A new connection as the agent's role. When clients have filled the server, as superuser: there are connections
    /// reserved for it, and a seal must not wait for a client to leave.
    async fn open(&self, login: &Login, deadline: Instant) -> Result<Session, SessionError> {
        match Session::open(login, deadline).await {
            Err(SessionError::Server { code, .. }) if code == "53300" && !login.replication => {
                let postgresql = &self.config.postgresql;
                let user = postgresql.superuser.clone();
                let password = postgresql.superuser_password.clone();
                Session::open(&Login { user, password, ..login.clone() }, deadline).await
            }
            other => other,
        }
    }

    /// A connection opened now: it shows what the postmaster has taken from the files by now.
    async fn new_session(&self, deadline: Instant) -> Result<Session, SessionError> {
        self.open(&self.login(), deadline).await
    }

    /// A session whose commits wait for standbys.
    async fn barrier_session(&self, deadline: Instant) -> Result<Session, SessionError> {
        let mut login = self.login();
        login.settings.extend([("synchronous_commit", "on"), ("default_transaction_read_only", "off")]);
        self.open(&login, deadline).await
    }

    /// System identifier, timeline and flushed position as PostgreSQL tells them to a follower. On a standby the timeline
    /// is the one being replayed; the control file's lags behind until the next restartpoint.
    async fn identify(&self, deadline: Instant) -> Result<Identity, SessionError> {
        let kept = take(&self.timeline_teller);
        if let Some(mut session) = kept
            && let Ok(identity) = identify_system(&mut session, deadline).await
        {
            put(&self.timeline_teller, session);
            return Ok(identity);
        }
        // A kept session that failed says nothing about the server (it may have been restarted): one new try.
        let login = Login { replication: true, ..self.login() };
        let mut session = self.open(&login, deadline).await?;
        let identity = identify_system(&mut session, deadline).await?;
        put(&self.timeline_teller, session);
        Ok(identity)
    }
}

#[derive(Clone, Copy, Debug)]
struct Identity {
    timeline: TimelineId,
    flushed: Lsn,
}

async fn identify_system(session: &mut Session, deadline: Instant) -> Result<Identity, SessionError> {
    let rows = session.query("IDENTIFY_SYSTEM", deadline).await?;
    let row = rows.one()?;
    Ok(Identity { timeline: TimelineId(row.parsed("timeline")?), flushed: row.parsed("xlogpos")? })
}

fn take(place: &Mutex<Option<Session>>) -> Option<Session> {
    place.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take().filter(Session::usable)
}

fn put(place: &Mutex<Option<Session>>, session: Session) {
    if session.usable() {
        *place.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(session);
    }
}

/// Polls between tries where PostgreSQL offers no event. Long enough not to take its processor, short against a failover.
const POLL: Duration = Duration::from_millis(1);

#[async_trait]
impl Postgres for LocalServer {
    async fn observe(&self, guard: &Guard, within: Duration) -> LocalPostgres {
        observe::observe(self, guard, Instant::now() + within).await
    }

    async fn data_directory(&self, within: Duration) -> DataDirectory {
        let deadline = Instant::now() + within;
        let (layout, bin_dir) = (self.layout.clone(), self.config.postgresql.bin_dir.clone());
        let find = move || {
            let version = data_directory::version(&layout.data_dir).unwrap_or_default();
            programs::directory(bin_dir.as_deref(), version).map(|directory| directory.join("postgres"))
        };
        let program = match self.reader.read(deadline, find).await {
            Ok(program) => program.ok(),
            Err(why) => return DataDirectory::Unknown { why },
        };
        // Not knowing the programs' version is no reason not to know the directory; the start says what is missing.
        let programs = match program {
            Some(program) => timeout_at(deadline, self.major_of(program)).await.ok().and_then(Result::ok),
            None => None,
        };
        let layout = self.layout.clone();
        let look = self.reader.read(deadline, move || data_directory::look(&layout, programs)).await;
        look.unwrap_or_else(|why| DataDirectory::Unknown { why })
    }

    async fn prepare_start(&self, mode: &StartMode) -> Result<Launch, PostgresError> {
        start::prepare(self, mode).await
    }

    async fn follow(&self, follow: Option<&Follow>, within: Duration) -> Result<(), PostgresError> {
        follow::follow(self, follow, within).await
    }

    async fn seal(&self, within: Duration) -> Result<Position, PostgresError> {
        seal::seal(self, within).await
    }

    async fn promote(&self, order: &PromoteOrder, within: Duration) -> Result<Promotion, PostgresError> {
        promote::promote(self, order, within).await
    }

    async fn enforce(&self, from: Option<&SyncRule>, to: &SyncRule, within: Duration) -> Result<(), PostgresError> {
        enforce::enforce(self, from, to, within).await
    }

    async fn end_walsenders(&self, names: &[String], within: Duration) -> Result<(), PostgresError> {
        enforce::end_walsenders(self, names, within).await
    }

    async fn keep_slots(&self, members: &[(MemberName, Option<Lsn>)], within: Duration) -> Result<(), PostgresError> {
        slots::keep(self, members, within).await
    }

    async fn checkpoint(&self, within: Duration) -> Result<(), PostgresError> {
        promote::checkpoint(self, within).await
    }

    async fn shutdown_position(&self) -> Result<Option<Lsn>, PostgresError> {
        Ok(self.control_file("read where the shutdown ended")?.shutdown_end())
    }

    async fn position_of(&self, source: &Source, within: Duration) -> Result<Lsn, PostgresError> {
        let what = format!("ask {} at {}:{} for its position", source.member, source.host, source.port);
        let login = Login {
            address: Address::Network { host: source.host.clone(), port: source.port },
            user: roles::REPLICATION.to_owned(),
            replication: true,
            ..self.login()
        };
        let asked = async {
            let deadline = Instant::now() + within;
            let mut session = Session::open(&login, deadline).await?;
            identify_system(&mut session, deadline).await
        };
        asked.await.map(|identity| identity.flushed).map_err(|e| e.during(what, within))
    }

    async fn reload(&self) -> Result<(), PostgresError> {
        start::write_configuration(self).await?;
        // What a reload may take is the server's to say; its log and pg_settings show what waits for a restart.
        let within = Duration::from_secs(2);
        follow::signal_reload(self, Instant::now() + within).await.map_err(|e| e.during("reload configuration", within))
    }

    async fn bootstrap(&self) -> Result<u64, PostgresError> {
        roles::bootstrap(self).await
    }

    async fn clone_from(&self, source: &Source, progress: Progress) -> Result<(), PostgresError> {
        clone::clone_from(self, source, &progress).await
    }

    async fn rewind(
        &self,
        source: &Source,
        leader_history: &History,
        timeline: TimelineId,
    ) -> Result<String, PostgresError> {
        rewind::rewind(self, source, leader_history, timeline).await
    }

    async fn kept(&self) -> Vec<KeptWal> {
        kept::reports(&self.layout.diverged)
    }

    async fn set_aside(&self, why: &str) -> Result<PathBuf, PostgresError> {
        set_aside::set_aside(self, why)
    }
}
