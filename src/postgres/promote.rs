//! Promotion to the reserved timeline, and CHECKPOINT.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::core::plan::{PromoteOrder, SyncRule};
use crate::core::timeline::TimelineId;
use crate::ports::{PostgresError, Promotion};

use super::files::broken;
use super::follow::{ChangeError, Shown, put_in_force};
use super::session::{Login, Session, SessionError};
use super::settings::{Dynamic, major};
use super::{LocalServer, start, timelines};

/// PostgreSQL tells of the end of recovery by no event that a client could await.
const POLL_PROMOTION: Duration = Duration::from_millis(2);

pub async fn promote(server: &LocalServer, order: &PromoteOrder, within: Duration) -> Result<Promotion, PostgresError> {
    let what = format!("promote to timeline {} under term {}", order.timeline, order.term);
    let deadline = Instant::now() + within;
    promoted(server, order, deadline, &what).await.map_err(|e| e.into_port(&what, within))
}

async fn promoted(
    server: &LocalServer,
    order: &PromoteOrder,
    deadline: Instant,
    what: &str,
) -> Result<Promotion, ChangeError> {
    let mut session = under_nobody(server, deadline, what).await?;

    // After the seal and right before the promotion: until now every number was somebody else's to take.
    let own = server.identify(deadline).await?.timeline;
    timelines::plant(&server.layout, &server.owner, own, order.timeline, &order.between)?;

    session.query("select pg_promote(false)", deadline).await?;
    loop {
        let rows = session.query("select pg_is_in_recovery() as in_recovery", deadline).await?;
        if !rows.one()?.flag("in_recovery")? {
            break;
        }
        if Instant::now() + POLL_PROMOTION >= deadline {
            return Err(SessionError::Timeout.into());
        }
        sleep(POLL_PROMOTION).await;
    }
    // S8: PostgreSQL has removed it; whoever starts this directory by another hand must find it.
    start::write_standby_signal(server)?;

    let rows =
        session.query("select substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) as timeline", deadline).await?;
    let text = rows.one()?.text("timeline")?;
    let timeline = u32::from_str_radix(text, 16).map(TimelineId);
    let timeline = timeline.map_err(|_| SessionError::Unexpected(format!("`{text}` is no timeline")))?;
    let history = timelines::history(&server.layout, timeline)?;
    let last = history.0.last().ok_or_else(|| {
        broken(what, format!("timeline {timeline} has no ancestor: it is not the outcome of a promotion"))
    })?;
    timelines::keep_planted(&server.layout)?;
    Ok(Promotion { timeline, parent: last.timeline, switch: last.switch })
}

/// A session on a standby whose running rule names nobody: what is promoted then acknowledges nothing until the leader
/// puts the real set into force.
///
/// An empty rule cannot be mended here. Only the checkpointer sets the flag that makes backends wait, and on a standby no
/// commit of ours could be seen waiting (finding 3); every start goes through `prepare_start`, which never leaves it empty.
async fn under_nobody(server: &LocalServer, deadline: Instant, what: &str) -> Result<Session, ChangeError> {
    let mut session = server.new_session(deadline).await?;
    let shown = Shown::read(&mut session, deadline).await?;
    if !shown.in_recovery {
        return Err(SessionError::Unexpected("postgresql runs read-write already".to_owned()).into());
    }
    if shown.rule.is_empty() {
        let why = "synchronous_standby_names is empty in the running server: the first commits would wait for nobody; \
                   stop it and start it again";
        return Err(broken(what, why).into());
    }
    if shown.rule == SyncRule::Nobody.to_string() {
        return Ok(session);
    }
    let (session, _) = put_in_force(server, &Dynamic::alone(SyncRule::Nobody), deadline).await?;
    Ok(session)
}

/// As the agent's role where PostgreSQL has a right for it (15 and later), else as superuser.
pub async fn checkpoint(server: &LocalServer, within: Duration) -> Result<(), PostgresError> {
    let deadline = Instant::now() + within;
    let asked = async {
        let mut session = server.new_session(deadline).await?;
        let rows = session.query("select current_setting('server_version_num') as version", deadline).await?;
        let version: u32 = rows.one()?.parsed("version")?;
        if major(version) < 15 {
            let postgresql = &server.config.postgresql;
            let user = postgresql.superuser.clone();
            let password = postgresql.superuser_password.clone();
            session = Session::open(&Login { user, password, ..server.login() }, deadline).await?;
        }
        session.query("checkpoint", deadline).await
    };
    asked.await.map(|_| ()).map_err(|e: SessionError| e.during("checkpoint", within))
}
