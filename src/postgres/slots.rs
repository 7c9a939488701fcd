//! Physical slots: one for each member, on every member, so that whoever becomes leader has kept what the others need.

use std::collections::BTreeMap;
use std::time::Duration;

use postgres_protocol::escape::escape_literal;
use tokio::time::Instant;

use crate::core::Lsn;
use crate::core::names::MemberName;
use crate::ports::PostgresError;

use super::LocalServer;
use super::session::{Session, SessionError};

/// Slots of this beginning are pgvigil's; all others are somebody else's and stay.
const PREFIX: &str = "pgvigil_";

struct Slot {
    name: String,
    restart: Option<Lsn>,
    active: bool,
    lost: bool,
}

pub async fn keep(
    server: &LocalServer,
    members: &[(MemberName, Option<Lsn>)],
    within: Duration,
) -> Result<(), PostgresError> {
    let deadline = Instant::now() + within;
    let kept = async {
        let mut session = server.new_session(deadline).await?;
        kept(&mut session, members, deadline).await
    };
    kept.await.map_err(|e: SessionError| e.during("keep the members' replication slots", within))
}

async fn kept(
    session: &mut Session,
    members: &[(MemberName, Option<Lsn>)],
    deadline: Instant,
) -> Result<(), SessionError> {
    let rows = session
        .query("select pg_is_in_recovery() as in_recovery, pg_last_wal_replay_lsn() as replayed", deadline)
        .await?;
    let in_recovery = rows.one()?.flag("in_recovery")?;
    let replayed: Option<Lsn> = rows.one()?.parsed_optional("replayed")?;
    let wanted: BTreeMap<String, Option<Lsn>> = members.iter().map(|(name, at)| (name.slot(), *at)).collect();
    let there = read(session, deadline).await?;

    for slot in there.iter().filter(|slot| slot.name.starts_with(PREFIX) && !slot.active) {
        // One that has lost its WAL keeps nothing; its member has to be cloned, and then needs a new one.
        if !wanted.contains_key(&slot.name) || slot.lost {
            run(session, &format!("select pg_drop_replication_slot({})", escape_literal(&slot.name)), deadline).await?;
        }
    }
    let usable = |name: &str| there.iter().find(|slot| slot.name == name && (slot.active || !slot.lost));
    for (name, at) in &wanted {
        let Some(slot) = usable(name) else {
            // `true`: WAL is kept from now on, not from the first connection.
            let sql = format!("select pg_create_physical_replication_slot({}, true)", escape_literal(name));
            run(session, &sql, deadline).await?;
            continue;
        };
        // On the leader a slot moves with its follower. On a standby nobody uses it: it is moved to what the member is known
        // to have, and never beyond what this standby has itself.
        let Some(at) = at.filter(|_| in_recovery && !slot.active) else { continue };
        let at = replayed.map_or(at, |replayed| at.min(replayed));
        if slot.restart.is_some_and(|restart| at > restart) {
            let sql = format!("select pg_replication_slot_advance({}, '{at}')", escape_literal(name));
            run(session, &sql, deadline).await?;
        }
    }
    Ok(())
}

async fn read(session: &mut Session, deadline: Instant) -> Result<Vec<Slot>, SessionError> {
    let rows = session.query(include_str!("../../sql/observe_slots.sql"), deadline).await?;
    let read = rows.iter().map(|row| {
        Ok(Slot {
            name: row.text("slot_name")?.to_owned(),
            restart: row.parsed_optional("restart_lsn")?,
            active: row.flag("active")?,
            lost: row.text("wal_status")? == "lost",
        })
    });
    read.collect()
}

/// A slot that came, went or was taken between our look and our word is no failure: the next round sees it as it is.
async fn run(session: &mut Session, sql: &str, deadline: Instant) -> Result<(), SessionError> {
    match session.query(sql, deadline).await {
        Ok(_) => Ok(()),
        // 42704 undefined_object, 42710 duplicate_object, 55006 object_in_use
        Err(e) if matches!(e.code(), Some("42704" | "42710" | "55006")) => Ok(()),
        Err(e) => Err(e),
    }
}
