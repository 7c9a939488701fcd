//! Bringing a diverged data directory back onto the leader's line by pg_rewind.
//!
//! What only this member had is kept first: the WAL from the divergence on, and a list of its transactions (S5). pg_rewind's
//! own verdict is not trusted: on a number that was used twice it says "no rewind required" (finding 7), so the lines are
//! compared here, and a verdict that contradicts them is an error.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::core::timeline::{History, TimelineId};
use crate::ports::{PostgresError, Source};

use super::files::{self, broken};
use super::programs::Run;
use super::session::{Address, Login, Session, SessionError};
use super::{LocalServer, clone, data_directory, kept, roles, start, timelines};

/// How long the leader may take for the checkpoint after its promotion. Without it pg_rewind (before 16) goes by the old
/// timeline in the leader's control file.
const LEADER_CHECKPOINT: Duration = Duration::from_secs(60);

pub async fn rewind(
    server: &LocalServer,
    source: &Source,
    leader_history: &History,
    timeline: TimelineId,
) -> Result<String, PostgresError> {
    let what = format!("rewind to timeline {timeline} of {}", source.member);
    let layout = &server.layout;
    server.prepare_directories()?;
    start::write_passfile(server)?;
    let control = server.control_file(&what)?;
    let own = timelines::newest_own(layout, &control)?;
    let own_history = timelines::history(layout, own)?;
    let Some(parted) = timelines::divergence((own, &own_history), (timeline, leader_history)) else {
        let why =
            format!("both are on timeline {own} with the same history: what differs cannot be told by the histories");
        return Err(broken(&what, why));
    };
    leader_has_checkpointed(server, source, timeline, &what).await?;
    let kept = kept::keep(server, &control, own, &own_history, parted).await?;

    if !control.state.cleanly_stopped() {
        recover_alone(server, &what).await?;
    }
    // A trial first, which changes nothing: a leader that cannot be reached or WAL that is missing leaves the directory a
    // database, and the rewind can be tried again. What fails after the marker has to be cloned.
    let said = run_pg_rewind(server, source, &what, &["--dry-run"]).await?;
    if said.contains("no rewind required") {
        let why = format!(
            "pg_rewind says that nothing has to be done, but the lines part on timeline {} at {}: clone instead",
            parted.0, parted.1
        );
        return Err(broken(&what, why));
    }
    data_directory::begin(layout, "rewind")?;
    run_pg_rewind(server, source, &what, &[]).await?;
    start::strip_auto_conf(server)?;
    start::write_standby_signal(server)?;
    files::remove(&layout.planted)?;
    data_directory::finished(layout)?;
    Ok(format!(
        "rewound from timeline {own} to {timeline}, which parted on timeline {} at {}; {kept}",
        parted.0, parted.1
    ))
}

async fn run_pg_rewind(
    server: &LocalServer,
    source: &Source,
    what: &str,
    further: &[&str],
) -> Result<String, PostgresError> {
    let mut arguments = vec![
        "--target-pgdata".to_owned(),
        server.layout.data_dir.display().to_string(),
        "--source-server".to_owned(),
        clone::connection(server, source, roles::REWIND, &format!("pgvigil_rewind_{}", server.config.name)),
        // Crash recovery, where it was needed, has been done with archiving off; pg_rewind's own would not.
        "--no-ensure-shutdown".to_owned(),
        "--progress".to_owned(),
    ];
    arguments.extend(further.iter().map(|argument| (*argument).to_owned()));
    let program = server.program("pg_rewind")?;
    Run { what, program, arguments, input: None, owner: &server.owner }.succeed(|_| ()).await
}

/// Crash recovery in a server that nobody can connect to, as pg_rewind needs it. Single-user mode refuses to run beside
/// `standby.signal`, so the file is away for that moment (a deviation from S8: a foreign start in that second would be
/// read-write, on a line that the cluster has left). A crash here is mended by the next start, which writes it first.
async fn recover_alone(server: &LocalServer, what: &str) -> Result<(), PostgresError> {
    files::remove(&server.layout.standby_signal())?;
    let arguments =
        ["--single", "-D", &server.layout.data_dir.display().to_string(), "-c", "archive_mode=off", "template1"];
    let arguments = arguments.map(str::to_owned).to_vec();
    let program = server.program("postgres")?;
    let input = Some(String::new());
    let recovered = Run { what, program, arguments, input, owner: &server.owner }.succeed(|_| ()).await;
    start::write_standby_signal(server)?;
    recovered.map(|_| ())
}

async fn leader_has_checkpointed(
    server: &LocalServer,
    source: &Source,
    timeline: TimelineId,
    what: &str,
) -> Result<(), PostgresError> {
    let login = Login {
        address: Address::Network { host: source.host.clone(), port: source.port },
        user: roles::REWIND.to_owned(),
        application_name: format!("pgvigil_rewind_{}", server.config.name),
        ..server.login()
    };
    let deadline = Instant::now() + LEADER_CHECKPOINT;
    let has = async {
        let mut session = Session::open(&login, deadline).await?;
        let mut asked = false;
        loop {
            let rows = session.query(include_str!("../../sql/source_timeline.sql"), deadline).await?;
            let row = rows.one()?;
            if row.flag("in_recovery")? {
                return Err(SessionError::Unexpected("it is a standby, not the leader".to_owned()));
            }
            if row.parsed::<u32>("timeline")? == timeline.0 {
                return Ok(());
            }
            if asked {
                sleep(Duration::from_millis(100)).await;
            } else {
                asked = true;
                // On 14 the role may not; then the leader's own checkpoint after its promotion is awaited.
                if let Err(e) = session.query("checkpoint", deadline).await
                    && e.code().is_none()
                {
                    return Err(e);
                }
            }
        }
    };
    let what = format!("{what}: wait for its checkpoint on timeline {timeline}");
    has.await.map_err(|e: SessionError| e.during(what, LEADER_CHECKPOINT))
}
