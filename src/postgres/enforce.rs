//! Putting a synchronous rule into force so that it is true for every commit that is acknowledged afterwards.
//!
//! "In the file" and "in force" are far apart in PostgreSQL (protocol §4, findings 3, 4 and 12):
//!   - the checkpointer alone sets the flag that makes backends wait at all;
//!   - each walsender releases waiting commits by its own copy of the rule, loaded at its own time;
//!   - walsenders are counted by name.
//!
//! The way between two rules goes through `pgvigil_nobody` where the flag may not be set or a walsender may hold a weaker
//! rule that no row shows (k raised, or the old rule unknown):
//!
//!   write nobody ─► a commit of ours is seen waiting ─► every walsender shows priority 0 ─► write the rule
//!     ─► walsenders outside the rule show 0 ─► barrier ─► the commit that waited has returned too
//!
//! Priority 0 is a walsender's own word: it computes it from the rule that it has loaded, and under 0 it releases nobody.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use crate::core::plan::{SyncRule, parse_walreceiver_name, walreceiver_name};
use crate::ports::PostgresError;

use super::LocalServer;
use super::follow::{ChangeError, pause, put_in_force};
use super::processes::{self, Ask};
use super::session::{Session, SessionError};
use super::settings::Dynamic;

const BARRIER: &str = include_str!("../../sql/barrier.sql");

pub async fn enforce(
    server: &LocalServer,
    from: Option<&SyncRule>,
    to: &SyncRule,
    within: Duration,
) -> Result<(), PostgresError> {
    let deadline = Instant::now() + within;
    let mut step = "write it and reload".to_owned();
    let result = in_force(server, from, to, deadline, &mut step).await;
    result.map_err(|e| e.into_port(&format!("put synchronous_standby_names = '{to}' into force: {step}"), within))
}

async fn in_force(
    server: &LocalServer,
    from: Option<&SyncRule>,
    to: &SyncRule,
    deadline: Instant,
    step: &mut String,
) -> Result<(), ChangeError> {
    let mut waiting = None;
    if goes_through_nobody(from, to) {
        *step = "write the rule that names nobody".to_owned();
        let mut control = change(server, &SyncRule::Nobody, deadline).await?;
        *step = "see a commit of ours waiting for nobody".to_owned();
        waiting = Some(see_waiting(server, &mut control, deadline).await?);
        *step = "wait until every walsender has the rule that names nobody".to_owned();
        priorities_gone(&mut control, &BTreeSet::new(), deadline).await?;
    }
    let SyncRule::Any { members, term, .. } = to else {
        // Nobody: the commit that was seen waiting is the proof; it is ended, never acknowledged, when `waiting` drops.
        // Cleared: commits stop waiting when the checkpointer takes it; until then they only wait too long.
        if *to == SyncRule::Cleared {
            *step = "write the empty rule".to_owned();
            change(server, to, deadline).await?;
        }
        return Ok(());
    };
    let names: BTreeSet<String> = members.iter().map(|id| walreceiver_name(id, *term)).collect();

    *step = "write the rule".to_owned();
    let mut control = change(server, to, deadline).await?;
    *step = "end walsenders that double a name".to_owned();
    end_doubles(server, &mut control, deadline).await?;
    *step = "wait until no walsender outside the rule counts".to_owned();
    priorities_gone(&mut control, &names, deadline).await?;
    *step = format!("wait for the barrier commit ({})", connected(&mut control, deadline).await?);
    // The new commit first: a walsender looks for commits to release only when its standby reports something new, so the
    // older one, and every client's that waits since then, returns with this one's WAL and not with the next status message.
    Commit::begin(server, deadline).await?.returns(deadline).await?;
    if let Some(waiting) = waiting {
        waiting.returns(deadline).await?;
    }
    // A name doubled while the barrier ran may have answered for a member that did not.
    let walsenders = Walsender::read_all(&mut control, deadline).await?;
    if !doubles(&walsenders).is_empty() {
        let why = "a second walsender of the same name came while the barrier ran; it has to be begun again".to_owned();
        return Err(SessionError::Unexpected(why).into());
    }
    Ok(())
}

/// Where the flag may not be set (nothing was awaited, or it is not known), or k grows: a walsender with the old k shows
/// the same priority as one with the new.
fn goes_through_nobody(from: Option<&SyncRule>, to: &SyncRule) -> bool {
    match (from, to) {
        (_, SyncRule::Cleared) => false,
        (_, SyncRule::Nobody) => true,
        (None | Some(SyncRule::Cleared), SyncRule::Any { .. }) => true,
        (Some(SyncRule::Nobody), SyncRule::Any { .. }) => false,
        (Some(SyncRule::Any { k: old, .. }), SyncRule::Any { k: new, .. }) => new > old,
    }
}

/// A session that showed the rule, on a server that is read-write.
async fn change(server: &LocalServer, rule: &SyncRule, deadline: Instant) -> Result<Session, ChangeError> {
    let (session, shown) = put_in_force(server, &Dynamic::alone(rule.clone()), deadline).await?;
    if shown.in_recovery {
        let why = "postgresql is a standby, it has no sync set to put into force".to_owned();
        return Err(SessionError::Unexpected(why).into());
    }
    Ok(session)
}

// === A commit of our own ===

/// A commit that may wait for standbys. Given up, it is ended: a wait is never cancelled, which would look like success.
struct Commit {
    backend: i32,
    answer: Pin<Box<dyn Future<Output = Result<(), SessionError>> + Send>>,
    end: EndOnDrop,
}

struct EndOnDrop {
    data_dir: std::path::PathBuf,
    backend: i32,
    armed: bool,
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        if self.armed {
            // The backend does not notice that its client has gone while it waits for standbys.
            processes::signal(&self.data_dir, self.backend, Ask::End);
        }
    }
}

impl Commit {
    async fn begin(server: &LocalServer, deadline: Instant) -> Result<Commit, SessionError> {
        let mut session = server.barrier_session(deadline).await?;
        let backend = session.backend;
        let data_dir = server.layout.data_dir.clone();
        let answer = Box::pin(async move { session.query(BARRIER, deadline).await.map(|_| ()) });
        Ok(Commit { backend, answer, end: EndOnDrop { data_dir, backend, armed: true } })
    }

    async fn returns(mut self, deadline: Instant) -> Result<(), SessionError> {
        let answer = tokio::time::timeout_at(deadline, &mut self.answer).await.map_err(|_| SessionError::Timeout)?;
        self.end.armed = answer.is_err();
        answer
    }
}

/// Begins commits until one is seen waiting. One that returned at once shows that the checkpointer has not set the flag yet.
async fn see_waiting(server: &LocalServer, control: &mut Session, deadline: Instant) -> Result<Commit, SessionError> {
    loop {
        let mut commit = Commit::begin(server, deadline).await?;
        let waits = include_str!("../../sql/waits.sql").replace("<pid>", &commit.backend.to_string());
        loop {
            if let Some(answer) = (&mut commit.answer).now_or_never() {
                commit.end.armed = answer.is_err();
                answer?;
                break;
            }
            let rows = control.query(&waits, deadline).await?;
            if rows.first().is_some_and(|row| row.text("wait_event").is_ok_and(|event| event == "SyncRep")) {
                return Ok(commit);
            }
            pause(deadline).await?;
        }
        pause(deadline).await?;
    }
}

// === Walsenders ===

#[derive(Clone, Debug)]
struct Walsender {
    pid: i32,
    name: String,
    state: String,
    priority: i32,
    flushed: String,
}

impl Walsender {
    /// The newest first.
    async fn read_all(control: &mut Session, deadline: Instant) -> Result<Vec<Walsender>, SessionError> {
        let rows = control.query(include_str!("../../sql/walsenders.sql"), deadline).await?;
        let read = rows.iter().map(|row| {
            Ok(Walsender {
                pid: row.parsed("pid")?,
                name: row.text("application_name")?.to_owned(),
                state: row.text("state")?.to_owned(),
                priority: row.parsed("sync_priority")?,
                flushed: row.text("flushed")?.to_owned(),
            })
        });
        read.collect()
    }
}

/// Waits until no walsender but those named gives its standby a vote.
async fn priorities_gone(control: &mut Session, but: &BTreeSet<String>, deadline: Instant) -> Result<(), SessionError> {
    loop {
        let walsenders = Walsender::read_all(control, deadline).await?;
        if walsenders.iter().all(|w| w.priority == 0 || but.contains(&w.name)) {
            return Ok(());
        }
        pause(deadline).await?;
    }
}

async fn connected(control: &mut Session, deadline: Instant) -> Result<String, SessionError> {
    let walsenders = Walsender::read_all(control, deadline).await?;
    let text: Vec<String> = walsenders.iter().map(|w| format!("{} {} {}", w.name, w.state, w.flushed)).collect();
    Ok(if text.is_empty() { "no standby is connected".to_owned() } else { format!("connected: {}", text.join(", ")) })
}

/// All but the newest walsender of each member's name: an old half-open connection, or somebody who uses the name. Names
/// that are no walreceiver's cannot vote and may be there twice (pg_basebackup has two connections).
fn doubles(walsenders: &[Walsender]) -> Vec<i32> {
    let mut seen = BTreeSet::new();
    let ours = walsenders.iter().filter(|w| parse_walreceiver_name(&w.name).is_some());
    ours.filter(|w| !seen.insert(w.name.as_str())).map(|w| w.pid).collect()
}

async fn end_doubles(server: &LocalServer, control: &mut Session, deadline: Instant) -> Result<(), SessionError> {
    end_until_gone(server, control, deadline, doubles).await
}

pub async fn end_walsenders(server: &LocalServer, names: &[String], within: Duration) -> Result<(), PostgresError> {
    let deadline = Instant::now() + within;
    let what = format!("end the walsenders {}", names.join(", "));
    let ended = async {
        let mut control = server.new_session(deadline).await?;
        // Those of now: a follower that comes back under the same name is not ended again.
        let present = Walsender::read_all(&mut control, deadline).await?;
        let mut pids: BTreeSet<i32> = doubles(&present).into_iter().collect();
        pids.extend(present.iter().filter(|w| names.contains(&w.name)).map(|w| w.pid));
        let still = |now: &[Walsender]| now.iter().map(|w| w.pid).filter(|pid| pids.contains(pid)).collect();
        end_until_gone(server, &mut control, deadline, still).await
    };
    ended.await.map_err(|e: SessionError| e.during(what, within))
}

async fn end_until_gone(
    server: &LocalServer,
    control: &mut Session,
    deadline: Instant,
    which: impl Fn(&[Walsender]) -> Vec<i32>,
) -> Result<(), SessionError> {
    let mut signalled = BTreeSet::new();
    loop {
        let pids = which(&Walsender::read_all(control, deadline).await?);
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            if signalled.insert(pid) {
                processes::signal(&server.layout.data_dir, pid, Ask::End);
            }
        }
        pause(deadline).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::names::{Incarnation, MemberId, MemberName};
    use crate::core::timeline::Term;

    fn any(k: u32) -> SyncRule {
        let id = |name: &str| MemberId { name: MemberName::new(name).unwrap(), incarnation: Incarnation(1) };
        SyncRule::Any { k, members: BTreeSet::from([id("b"), id("c")]), term: Term(1) }
    }

    #[test]
    fn an_unset_flag_and_a_raised_k_go_through_nobody() {
        for (from, to, expect) in [
            (None, any(1), true),
            (Some(SyncRule::Cleared), any(1), true),
            (Some(SyncRule::Nobody), any(1), false),
            (Some(any(1)), any(1), false),
            (Some(any(1)), any(2), true),
            (Some(any(2)), any(1), false),
            (Some(any(1)), SyncRule::Cleared, false),
            (None, SyncRule::Nobody, true),
        ] {
            assert_eq!(goes_through_nobody(from.as_ref(), &to), expect, "{from:?} to {to:?}");
        }
    }

    #[test]
    fn only_members_names_are_doubled() {
        let walsender = |pid, name: &str| Walsender {
            pid,
            name: name.to_owned(),
            state: "streaming".to_owned(),
            priority: 1,
            flushed: String::new(),
        };
        let b = "b_0000000000000001_3";
        let clone = "pgvigil_clone_c";
        let all = [walsender(9, b), walsender(8, clone), walsender(7, clone), walsender(6, b)];
        assert_eq!(doubles(&all), [6]);
    }
}
