//! Changing what a running server follows or waits for: the dynamic file, a reload, and a new connection that shows it.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::core::plan::{Follow, SyncRule};
use crate::ports::PostgresError;

use super::session::{Session, SessionError};
use super::settings::Dynamic;
use super::{LocalServer, POLL, put, start, take};

pub async fn follow(server: &LocalServer, follow: Option<&Follow>, within: Duration) -> Result<(), PostgresError> {
    let what =
        follow.map_or("follow nobody".to_owned(), |f| format!("follow {} under term {}", f.upstream.member, f.term));
    let deadline = Instant::now() + within;
    let dynamic = match follow {
        Some(follow) => Dynamic::following(follow, &server.layout),
        None => Dynamic::alone(SyncRule::Nobody),
    };
    let failed = |e: SessionError| e.during(what.clone(), within);
    let (_, shown) = put_in_force(server, &dynamic, deadline).await.map_err(|e| e.into_port(&what, within))?;
    if !shown.in_recovery {
        return Err(PostgresError::Refused { what, why: "postgresql runs read-write, it is no standby".to_owned() });
    }
    if follow.is_some() && shown.target_timeline != "latest" {
        let why = format!(
            "it was started for timeline {} only and cannot go on to a leader's: stop it and start it as a follower",
            shown.target_timeline
        );
        return Err(failed(SessionError::Unexpected(why)));
    }
    Ok(())
}

/// A change that could not be made: by file or by session.
#[derive(Debug)]
pub enum ChangeError {
    File(PostgresError),
    Session(SessionError),
}

impl From<SessionError> for ChangeError {
    fn from(e: SessionError) -> ChangeError {
        ChangeError::Session(e)
    }
}

impl From<PostgresError> for ChangeError {
    fn from(e: PostgresError) -> ChangeError {
        ChangeError::File(e)
    }
}

impl ChangeError {
    pub fn into_port(self, what: &str, within: Duration) -> PostgresError {
        match self {
            ChangeError::File(e) => e,
            ChangeError::Session(e) => e.during(what, within),
        }
    }
}

/// What a new connection shows.
#[derive(Clone, Debug)]
pub struct Shown {
    pub in_recovery: bool,
    pub target_timeline: String,
    pub rule: String,
    conninfo: String,
    slot: String,
    restore_command: String,
    apply_delay: String,
    streaming_delay: String,
}

impl Shown {
    pub async fn read(session: &mut Session, deadline: Instant) -> Result<Shown, SessionError> {
        let rows = session.query(include_str!("../../sql/shown.sql"), deadline).await?;
        let row = rows.one()?;
        let text = |column: &str| row.text(column).map(str::to_owned);
        Ok(Shown {
            in_recovery: row.flag("in_recovery")?,
            target_timeline: text("target_timeline")?,
            rule: text("rule")?,
            conninfo: text("conninfo")?,
            slot: text("slot")?,
            restore_command: text("restore_command")?,
            apply_delay: text("apply_delay")?,
            streaming_delay: text("streaming_delay")?,
        })
    }

    fn is(&self, wanted: &Dynamic) -> bool {
        self.conninfo == wanted.conninfo
            && self.slot == wanted.slot
            && self.restore_command.is_empty()
            && self.rule == wanted.rule.to_string()
            && (!wanted.hurry || self.apply_delay == "0" && self.streaming_delay == "0")
    }
}

/// Writes the dynamic file, reloads, and returns a connection, opened after the postmaster took the change, that shows it.
/// In the file is not in force, and neither is what an old connection shows.
pub async fn put_in_force(
    server: &LocalServer,
    wanted: &Dynamic,
    deadline: Instant,
) -> Result<(Session, Shown), ChangeError> {
    start::strip_auto_conf_by(server, deadline).await?;
    start::write_dynamic(server, wanted)?;
    signal_reload(server, deadline).await?;
    loop {
        let mut session = server.new_session(deadline).await?;
        let shown = Shown::read(&mut session, deadline).await?;
        if shown.is(wanted) {
            return Ok((session, shown));
        }
        if Instant::now() + POLL >= deadline {
            return Err(SessionError::Timeout.into());
        }
        sleep(POLL).await;
    }
}

/// SIGHUP to the postmaster, by SQL: on the observer's session where one is open, else on a new one.
pub async fn signal_reload(server: &LocalServer, deadline: Instant) -> Result<(), SessionError> {
    const RELOAD: &str = "select pg_reload_conf()";
    if let Some(mut session) = take(&server.observer)
        && session.query(RELOAD, deadline).await.is_ok()
    {
        put(&server.observer, session);
        return Ok(());
    }
    let mut session = server.new_session(deadline).await?;
    session.query(RELOAD, deadline).await?;
    put(&server.observer, session);
    Ok(())
}

/// Sleeps one poll, or says that the deadline is there.
pub async fn pause(deadline: Instant) -> Result<(), SessionError> {
    timeout_at(deadline, sleep(POLL)).await.map_err(|_| SessionError::Timeout)
}
