//! Sealing: after it this standby takes no WAL from the old leader any more, and its position is final (protocol §5 step 2).
//!
//! The order is the proof. Each condition below was broken once on a real server by the order before it
//! (`protocol-review.md`, findings 2 and 21); none of them may be left out because another one "usually" implies it.

use std::time::Duration;

use tokio::time::Instant;

use crate::core::Lsn;
use crate::core::plan::SyncRule;
use crate::core::records::Position;
use crate::ports::PostgresError;

use super::follow::{ChangeError, pause, put_in_force};
use super::processes::{self, Ask};
use super::session::{Session, SessionError};
use super::settings::Dynamic;
use super::{LocalServer, timelines};

/// How long a receiver may take to end by itself, and a cancelled query to let go, before it gets a (further) signal.
const PATIENCE: Duration = Duration::from_millis(10);

pub async fn seal(server: &LocalServer, within: Duration) -> Result<Position, PostgresError> {
    let deadline = Instant::now() + within;
    let what = "seal this standby";
    let mut step = "set the configuration to follow nobody";
    match sealed(server, deadline, &mut step).await {
        Ok(position) => Ok(position),
        // The step names what the seal waited for: that is the reason a person reads.
        Err(e) => Err(e.into_port(&format!("{what}: {step}"), within)),
    }
}

async fn sealed(server: &LocalServer, deadline: Instant, step: &mut &str) -> Result<Position, ChangeError> {
    // Nobody to follow, no archive, no delay, no patience with queries; and a connection opened after the postmaster
    // passed the signal on shows it.
    let quiet = Dynamic { hurry: true, ..Dynamic::alone(SyncRule::Nobody) };
    let (mut session, shown) = put_in_force(server, &quiet, deadline).await?;
    if !shown.in_recovery {
        let why = "postgresql runs read-write; it has to be killed and started parked".to_owned();
        return Err(SessionError::Unexpected(why).into());
    }

    *step = "wait until the startup process has taken the change (it answers `paused`)";
    startup_has_taken_it(server, &mut session, deadline).await?;

    *step = "wait until no walreceiver is left";
    no_receiver(server, &mut session, deadline).await?;

    *step = "wait until everything received is replayed";
    let state = replay_at_its_end(server, &mut session, deadline).await?;

    *step = "read the position";
    let identity = server.identify(deadline).await?;
    let history = timelines::history(&server.layout, identity.timeline)?;
    let received = state.received.unwrap_or_default().max(state.replayed);
    Ok(Position { timeline: identity.timeline, replayed: state.replayed, received, history })
}

/// The startup process takes its signals before it confirms a pause that was asked for after the reload. So once it says
/// `paused`, it knows that there is nobody to follow, and starts no receiver any more. A pause that somebody else asked for
/// before proves nothing: it is lifted first.
async fn startup_has_taken_it(
    server: &LocalServer,
    session: &mut Session,
    deadline: Instant,
) -> Result<(), SessionError> {
    let mut blockers = Blockers::default();
    session.query("select pg_wal_replay_resume()", deadline).await?;
    // `paused` from before must be seen to end: else it would be taken for the answer to our own request.
    while State::read(session, deadline).await?.paused != Paused::No {
        blockers.clear_away(server, session, deadline).await?;
        pause(deadline).await?;
    }
    session.query("select pg_wal_replay_pause()", deadline).await?;
    loop {
        let state = State::read(session, deadline).await?;
        if state.paused == Paused::Yes {
            break;
        }
        blockers.clear_away(server, session, deadline).await?;
        pause(deadline).await?;
    }
    session.query("select pg_wal_replay_resume()", deadline).await?;
    Ok(())
}

/// By type of process: pg_stat_wal_receiver hides a receiver that is still connecting. One that stays gets SIGTERM.
async fn no_receiver(server: &LocalServer, session: &mut Session, deadline: Instant) -> Result<(), SessionError> {
    let mut patient_until = Instant::now() + PATIENCE;
    loop {
        let Some(receiver) = State::read(session, deadline).await?.receiver else { return Ok(()) };
        if Instant::now() >= patient_until {
            processes::signal(&server.layout.data_dir, receiver, Ask::End);
            patient_until = Instant::now() + 5 * PATIENCE;
        }
        pause(deadline).await?;
    }
}

/// The startup process sleeps because there is nothing more to read from anywhere, seen twice. This comes after the
/// pause, so it has gone through its loop once with nobody to follow: a receiver that it had asked the postmaster for, and
/// that is not forked yet, is called off. "Replay has reached what was received" alone would not prove that, and "replay
/// stopped moving" proves nothing.
async fn replay_at_its_end(
    server: &LocalServer,
    session: &mut Session,
    deadline: Instant,
) -> Result<State, SessionError> {
    let mut blockers = Blockers::default();
    let mut seen_before = false;
    loop {
        let state = State::read(session, deadline).await?;
        // A receiver cannot come back once the startup process knows; if one does, that knowledge was wrong.
        if state.receiver.is_some() {
            let why = "a walreceiver came back after the startup process had taken the change".to_owned();
            return Err(SessionError::Unexpected(why));
        }
        let nothing_more = state.wait_event == "RecoveryRetrieveRetryInterval";
        if nothing_more && seen_before {
            return Ok(state);
        }
        seen_before = nothing_more;
        if !nothing_more {
            blockers.clear_away(server, session, deadline).await?;
            pause(deadline).await?;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paused {
    No,
    Requested,
    Yes,
}

#[derive(Clone, Debug)]
struct State {
    paused: Paused,
    wait_event: String,
    receiver: Option<i32>,
    replayed: Lsn,
    received: Option<Lsn>,
}

impl State {
    async fn read(session: &mut Session, deadline: Instant) -> Result<State, SessionError> {
        let rows = session.query(include_str!("../../sql/recovery.sql"), deadline).await?;
        let row = rows.one()?;
        if !row.flag("in_recovery")? {
            return Err(SessionError::Unexpected("recovery has ended meanwhile".to_owned()));
        }
        Ok(State {
            paused: match row.text("pause_state")? {
                "paused" => Paused::Yes,
                "pause requested" => Paused::Requested,
                _ => Paused::No,
            },
            wait_event: row.text("wait_event")?.to_owned(),
            receiver: row.parsed_optional("receiver_pid")?,
            replayed: row.parsed("replayed")?,
            received: row.parsed_optional("received")?,
        })
    }
}

/// Sessions that keep the startup process from going on: a query is cancelled first, what stays is ended.
#[derive(Default)]
struct Blockers {
    asked_at: Option<Instant>,
}

impl Blockers {
    async fn clear_away(
        &mut self,
        server: &LocalServer,
        session: &mut Session,
        deadline: Instant,
    ) -> Result<(), SessionError> {
        if self.asked_at.is_some_and(|at| at.elapsed() < PATIENCE) {
            return Ok(());
        }
        let rows = session.query(include_str!("../../sql/replay_blockers.sql"), deadline).await?;
        for row in rows.iter() {
            // An idle transaction has no query to cancel, and one that was asked before did not let go.
            let gently = self.asked_at.is_none() && row.optional("active")? == Some("t");
            let ask = if gently { Ask::Cancel } else { Ask::End };
            let backend = row.parsed("pid")?;
            processes::signal(&server.layout.data_dir, backend, ask);
            tracing::info!(backend, "ended a session that replay waited for, to seal this standby");
        }
        if !rows.is_empty() {
            self.asked_at = Some(Instant::now());
        }
        Ok(())
    }
}
