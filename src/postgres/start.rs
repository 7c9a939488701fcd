//! Everything that has to be true before PostgreSQL starts, and what the guardian is to start.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use crate::core::plan::SyncRule;
use crate::core::timeline::TimelineId;
use crate::core::view::DataDirectory;
use crate::ports::{Launch, PostgresError, StartMode};

use super::LocalServer;
use super::files::{self, Owner, broken};
use super::layout::Layout;
use super::settings::{self, Dynamic};
use super::{data_directory, hba, roles, timelines};

/// Asking a file system for its free space takes microseconds, or its disk hangs.
const LOOK: Duration = Duration::from_secs(1);

pub async fn prepare(server: &LocalServer, mode: &StartMode) -> Result<Launch, PostgresError> {
    let what = "prepare the start of postgresql";
    let layout = &server.layout;
    let major = server.major().await?;
    match data_directory::look(layout, Some(major)) {
        DataDirectory::Present { .. } => {}
        DataDirectory::Empty => return Err(broken(what, format!("{} is empty", layout.data_dir.display()))),
        DataDirectory::Unfinished { what: job } => {
            let why = format!("{} was left in the middle of: {job}; it is no database", layout.data_dir.display());
            return Err(broken(what, why));
        }
        DataDirectory::Foreign { why } | DataDirectory::Unknown { why } => return Err(broken(what, why)),
    }
    refuse_what_ends_recovery(server)?;
    port_is_free(server)?;
    let control = server.control_file(what)?;

    let newest = timelines::newest_own(layout, &control)?;
    for number in timelines::remove_unused(layout, newest)? {
        tracing::info!(timeline = %number, "removed a history file that was planted for a promotion that did not happen");
    }
    let timeline = match mode {
        // The leader's newest timeline, which its walreceiver brings.
        StartMode::Follow(_) => "latest".to_owned(),
        StartMode::Parked => parked_target(server, &control, newest)?,
    };

    server.prepare_directories()?;
    strip_auto_conf(server)?;
    let dynamic = match mode {
        StartMode::Parked => Dynamic::alone(SyncRule::Nobody),
        StartMode::Follow(follow) => Dynamic::following(follow, layout),
    };
    write_dynamic(server, &dynamic)?;
    write_configuration(server).await?;
    write_standby_signal(server)?;
    // PostgreSQL refuses a data directory that others can read; a copy by hand often is one.
    files::restrict(&layout.data_dir, 0o700)?;
    let mut launch = launch(server, major, &timeline)?;
    for (name, configured, needed) in settings::raised(&server.config, layout, major, &control) {
        tracing::warn!(
            setting = name,
            configured,
            needed,
            "started with more than configured: the WAL was written with it, and a standby may not have less"
        );
        launch.arguments.extend(["-c".to_owned(), format!("{name}={needed}")]);
    }
    Ok(launch)
}

/// Parked is "this directory's own line to its end, and no other": the newest own timeline, with history files of others
/// out of the way. Not `current`: the control file may still name the timeline before the last switch, and the WAL after
/// it, which this member may have acknowledged, would stay unread (S2; see [`timelines::newest_own`]). `latest` finds the
/// newest own one and lets the member follow a leader's next timeline without another start.
fn parked_target(
    server: &LocalServer,
    control: &super::controldata::ControlFile,
    newest: TimelineId,
) -> Result<String, PostgresError> {
    for number in timelines::move_foreign(&server.layout, &server.owner, newest)? {
        tracing::info!(timeline = %number, newest_own = %newest, "moved the history file of another timeline out of pg_wal");
    }
    if timelines::contiguous(&server.layout, control, newest) {
        return Ok("latest".to_owned());
    }
    // PostgreSQL would stop looking at the gap. Named outright it is found; following on wants another start then.
    Ok(settings::timeline_target(newest))
}

/// PostgreSQL itself says so in a log that nobody reads, and ends; this says who has to do what. Only what is certain: an
/// address that this program cannot judge is left to PostgreSQL.
fn port_is_free(server: &LocalServer) -> Result<(), PostgresError> {
    let port = server.config.me().port;
    for address in server.config.postgresql.listen.split(',').map(str::trim) {
        let address = match address {
            "*" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            other => match other.parse() {
                Ok(address) => address,
                Err(_) => continue,
            },
        };
        if let Err(error) = TcpListener::bind((address, port))
            && error.kind() == ErrorKind::AddrInUse
        {
            let why = format!(
                "port {port} of {address} is in use by another program: stop it (`ss -ltnp` names it), or give this member \
                 another port"
            );
            return Err(broken("start postgresql", why));
        }
    }
    Ok(())
}

/// S8: nothing but a promotion may end recovery. Leftovers of a restore are a person's unfinished work: refused, kept.
fn refuse_what_ends_recovery(server: &LocalServer) -> Result<(), PostgresError> {
    let what = "prepare the start of postgresql";
    let layout = &server.layout;
    let auto_conf = files::read_if_there(&layout.auto_conf())?.unwrap_or_default();
    let targets = settings::leftover_targets(&auto_conf);
    if !targets.is_empty() {
        let why = format!(
            "{} still asks for {}: a restore that was not finished would end recovery by itself; take these lines out",
            layout.auto_conf().display(),
            targets.join(", ")
        );
        return Err(broken(what, why));
    }
    let signal = layout.data_dir.join("recovery.signal");
    if signal.exists() {
        let why = format!("{} is there: a restore was not finished; finish it, or remove the file", signal.display());
        return Err(broken(what, why));
    }
    Ok(())
}

/// Takes pgvigil's own settings out of postgresql.auto.conf, which outranks our files.
pub fn strip_auto_conf(server: &LocalServer) -> Result<(), PostgresError> {
    strip(&server.layout, &server.owner)
}

/// The same, for whoever must not wait for the disk.
pub async fn strip_auto_conf_by(server: &LocalServer, deadline: Instant) -> Result<(), PostgresError> {
    let (layout, owner) = (server.layout.clone(), server.owner.clone());
    let stripped = server.reader.read(deadline, move || strip(&layout, &owner)).await;
    stripped.unwrap_or_else(|why| Err(broken("read postgresql.auto.conf", why)))
}

fn strip(layout: &Layout, owner: &Owner) -> Result<(), PostgresError> {
    let path = layout.auto_conf();
    let Some(text) = files::read_if_there(&path)? else { return Ok(()) };
    let (kept, taken) = settings::strip_owned(&text);
    if !taken.is_empty() {
        tracing::warn!(settings = %taken.join(", "), file = %path.display(), "took settings of ALTER SYSTEM out that pgvigil owns");
        owner.write(&path, &kept, true)?;
    }
    Ok(())
}

/// Not made durable: every start writes it anew.
pub fn write_dynamic(server: &LocalServer, dynamic: &Dynamic) -> Result<(), PostgresError> {
    server.owner.write(&server.layout.dynamic_file, &dynamic.file(), false)
}

/// postgresql.conf, pg_hba.conf, pg_ident.conf, passfile; not the dynamic file.
pub async fn write_configuration(server: &LocalServer) -> Result<(), PostgresError> {
    let major = server.major().await?;
    let (layout, owner, config) = (&server.layout, &server.owner, &server.config);
    settings::check_parameters(&config.postgresql.parameters).map_err(|why| broken("write postgresql.conf", why))?;
    let data_dir = layout.data_dir.clone();
    let free = server.reader.read(Instant::now() + LOOK, move || free_for_wal(&data_dir)).await.ok().flatten();
    owner.write(&layout.main_file, &settings::main_file(config, layout, major, free), false)?;
    owner.write(&layout.hba_file, &hba::hba_file(config), false)?;
    owner.write(&layout.ident_file, &hba::ident_file(), false)?;
    write_passfile(server)
}

/// Free bytes where the WAL is.
fn free_for_wal(data_dir: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(&data_dir.join("pg_wal")).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// For libpq: the walreceiver's and the tools'. A password in a connection string would show in views and process lists.
pub fn write_passfile(server: &LocalServer) -> Result<(), PostgresError> {
    let password = server.config.postgresql.internal_password.expose().replace('\\', "\\\\").replace(':', "\\:");
    let lines = [roles::REPLICATION, roles::REWIND].map(|role| format!("*:*:*:{role}:{password}\n"));
    server.owner.write(&server.layout.passfile, &lines.concat(), false)
}

/// S8: there at all times. Durable when this returns: a power loss must not find the directory without it.
pub fn write_standby_signal(server: &LocalServer) -> Result<(), PostgresError> {
    let path = server.layout.standby_signal();
    if path.exists() {
        return Ok(());
    }
    server.owner.write(&path, "", true)
}

fn launch(server: &LocalServer, major: u32, timeline: &str) -> Result<Launch, PostgresError> {
    let (layout, owner) = (&server.layout, &server.owner);
    let mut arguments = vec!["-D".to_owned(), layout.data_dir.display().to_string()];
    for (name, value) in settings::command_line(&server.config, layout, major, timeline) {
        arguments.push("-c".to_owned());
        arguments.push(format!("{name}={value}"));
    }
    Ok(Launch {
        program: server.program("postgres")?,
        arguments,
        user: owner.switch.then(|| (owner.uid, owner.gid, owner.groups.clone())),
        log_file: layout.log_dir.join("startup.log"),
        environment: vec![("PATH".into(), "/usr/bin:/bin".into()), ("LC_ALL".into(), "C.UTF-8".into())],
    })
}
