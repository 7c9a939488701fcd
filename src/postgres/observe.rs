//! What PostgreSQL says of itself: one round trip on a kept connection, and the timeline of a standby on a second one.

use std::collections::BTreeMap;

use tokio::time::Instant;

use crate::core::Lsn;
use crate::core::timeline::TimelineId;
use crate::core::view::{Guard, GuardState, LastMessage, LocalPostgres, PrimaryFacts, Receiver, Replica, StandbyFacts};

use super::session::{Row, Rows, Session, SessionError};
use super::{LocalServer, put, settings, take};
use crate::config::units::size;

pub async fn observe(server: &LocalServer, guard: &Guard, deadline: Instant) -> LocalPostgres {
    match &guard.state {
        GuardState::Idle { .. } => return LocalPostgres::Down,
        GuardState::Survivors { count } => {
            let why = format!("killed; {count} processes in uninterruptible sleep are left");
            return LocalPostgres::Unknown { why };
        }
        GuardState::Running { .. } | GuardState::Absent { .. } => {}
    }
    let running = matches!(guard.state, GuardState::Running { .. });
    match read(server, deadline).await {
        Ok(facts) => facts,
        Err(Unread::Session(e)) => not_read(server, e, running),
        Err(Unread::File(why)) => LocalPostgres::Unknown { why },
    }
}

enum Unread {
    Session(SessionError),
    File(String),
}

impl From<SessionError> for Unread {
    fn from(e: SessionError) -> Unread {
        Unread::Session(e)
    }
}

fn not_read(server: &LocalServer, error: SessionError, running: bool) -> LocalPostgres {
    let address = server.socket();
    match &error {
        SessionError::Server { code, message, .. } if code == "57P03" => {
            LocalPostgres::Starting { why: message.clone() }
        }
        // Before the socket is there and after it is gone nobody can be asked; the guardian knows that processes run.
        SessionError::Gone(why) if running => LocalPostgres::Starting { why: why.clone() },
        SessionError::Timeout => LocalPostgres::Unknown { why: format!("postgresql at {address} does not answer") },
        SessionError::Gone(why) => LocalPostgres::Unknown { why: format!("no guardian, and {why}") },
        SessionError::Server { .. } | SessionError::Unexpected(_) => {
            LocalPostgres::Unknown { why: format!("query postgresql at {address}: {error}") }
        }
    }
}

async fn read(server: &LocalServer, deadline: Instant) -> Result<LocalPostgres, Unread> {
    let sql = [
        include_str!("../../sql/observe_server.sql"),
        include_str!("../../sql/observe_replicas.sql"),
        include_str!("../../sql/observe_slots.sql"),
        &include_str!("../../sql/observe_settings.sql").replace("<owned>", &settings::owned_as_sql_list()),
        include_str!("../../sql/observe_overrides.sql"),
    ]
    .concat();
    let answers = ask(server, &sql, deadline).await?;
    let [facts, replicas, slots, owned, overrides] = answers.as_slice() else {
        return Err(SessionError::Unexpected(format!("{} answers instead of five", answers.len())).into());
    };
    let server_row = facts.one()?;
    let version: u32 = server_row.parsed("version")?;
    let slots = read_slots(slots)?;
    let pending_restart = any_pending(owned)?;

    if server_row.flag("in_recovery")? {
        let identity = server.identify(deadline).await?;
        let (control, history) = server.control_and_history(identity.timeline, deadline).await.map_err(Unread::File)?;
        let receiver = match (server_row.flag("receiver_runs")?, server_row.flag("receiver_streams")?) {
            (_, true) => Receiver::Streaming,
            (true, false) => Receiver::Connecting,
            (false, false) => Receiver::None,
        };
        let (conninfo, slot) = (server_row.text("conninfo")?, server_row.text("slot")?);
        return Ok(LocalPostgres::Standby(StandbyFacts {
            version,
            system_identifier: control.system_identifier,
            timeline: identity.timeline,
            history,
            replayed: server_row.parsed("replayed")?,
            received: server_row.parsed_optional("received")?,
            replay_paused: server_row.flag("replay_paused")?,
            replay_delay_ms: milliseconds(server_row, "replay_delay_ms")?,
            follows: settings::parse_follow(conninfo, slot, &server.config),
            receiver,
            last_message: last_message(server_row)?,
            pending_restart,
            slots,
        }));
    }
    let timeline = server_row.text("timeline_hex")?;
    let timeline = u32::from_str_radix(timeline, 16)
        .map(TimelineId)
        .map_err(|_| SessionError::Unexpected(format!("`{timeline}` is no timeline")))?;
    let (control, history) = server.control_and_history(timeline, deadline).await.map_err(Unread::File)?;
    Ok(LocalPostgres::Primary(PrimaryFacts {
        version,
        system_identifier: control.system_identifier,
        timeline,
        history,
        flushed: server_row.parsed("flushed")?,
        writable: server_row.flag("writable")?,
        rule_text: server_row.text("rule")?.to_owned(),
        replicas: replicas.iter().map(read_replica).collect::<Result<_, _>>()?,
        slots,
        // `-1` is no size: unlimited.
        slot_bound: size(server_row.text("slot_bound")?).ok(),
        pending_restart,
        exceptions: exceptions(server, owned, overrides)?,
    }))
}

/// On the kept session; when that one fails at once, on a new one: the server may have been restarted since.
async fn ask(server: &LocalServer, sql: &str, deadline: Instant) -> Result<Vec<Rows>, SessionError> {
    if let Some(mut session) = take(&server.observer) {
        match session.query_all(sql, deadline).await {
            Ok(answers) => {
                put(&server.observer, session);
                return Ok(answers);
            }
            Err(SessionError::Gone(_)) => {}
            Err(e) => {
                put(&server.observer, session);
                return Err(e);
            }
        }
    }
    let mut session: Session = server.new_session(deadline).await?;
    let answers = session.query_all(sql, deadline).await?;
    put(&server.observer, session);
    Ok(answers)
}

fn milliseconds(row: Row<'_>, column: &str) -> Result<Option<u64>, SessionError> {
    // A clock set back makes it negative: then it is no age at all.
    Ok(row.parsed_optional::<i64>(column)?.map(|ms| u64::try_from(ms).unwrap_or(0)))
}

fn last_message(row: Row<'_>) -> Result<Option<LastMessage>, SessionError> {
    let mark = row.parsed_optional("last_message_mark")?;
    let age_ms = milliseconds(row, "last_message_age_ms")?;
    Ok(mark.zip(age_ms).map(|(mark, age_ms)| LastMessage { mark, age_ms }))
}

fn read_replica(row: Row<'_>) -> Result<Replica, SessionError> {
    Ok(Replica {
        pid: row.parsed("pid")?,
        application_name: row.text("application_name")?.to_owned(),
        state: row.text("state")?.to_owned(),
        flushed: row.parsed_optional("flushed")?,
        replayed: row.parsed_optional("replayed")?,
        sync_priority: row.parsed("sync_priority")?,
        reply_age_ms: milliseconds(row, "reply_age_ms")?,
    })
}

fn read_slots(rows: &Rows) -> Result<BTreeMap<String, Option<Lsn>>, SessionError> {
    let slot = |row: Row<'_>| Ok((row.text("slot_name")?.to_owned(), row.parsed_optional("restart_lsn")?));
    rows.iter().map(slot).collect()
}

fn any_pending(rows: &Rows) -> Result<bool, SessionError> {
    rows.iter().map(|row| row.flag("pending_restart")).try_fold(false, |any, flag| Ok(any | flag?))
}

/// One sentence for each thing that weakens durability behind the agent's back.
fn exceptions(server: &LocalServer, owned: &Rows, overrides: &Rows) -> Result<Vec<String>, SessionError> {
    let mut found = Vec::new();
    for row in owned.iter() {
        let (name, value, source) = (row.text("name")?, row.text("setting")?, row.text("source")?);
        if !settings::owned_parameters().any(|owned| owned == name) {
            continue;
        }
        let file = row.text("sourcefile")?;
        let from_elsewhere = match source {
            "configuration file" => !settings::is_ours(file, &server.layout),
            "command line" | "default" | "override" => false,
            _ => true,
        };
        if from_elsewhere {
            let place = if file.is_empty() { source } else { file };
            found.push(format!("{name} is `{value}` by {place}, although pgvigil owns it"));
        }
    }
    for row in overrides.iter() {
        let (setting, role, database) = (row.text("setting")?, row.text("role")?, row.text("database")?);
        let whom = match (role, database) {
            ("", "") => "everybody".to_owned(),
            (role, "") => format!("role {role}"),
            ("", database) => format!("database {database}"),
            (role, database) => format!("role {role} in database {database}"),
        };
        found.push(format!("{setting} is set for {whom}: its commits are not covered by the sync set"));
    }
    Ok(found)
}
