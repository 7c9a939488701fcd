//! Patroni's operations: the same paths, bodies and codes, answered when the operation is over.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::Value;

use super::App;
use super::error::ApiError;
use super::operations::{caller, default_timeout, is_member, read_body, timeout};
use super::{node, requests};
use crate::core::health::sitting_leader;
use crate::core::names::MemberName;
use crate::core::records::Operation;
use crate::core::view::{LocalPostgres, View};

/// On top of the operation's own timeout: the outcome has to come through the store.
const OUTCOME_TRAVELS: Duration = Duration::from_secs(5);

#[derive(Debug, Deserialize)]
struct Change {
    leader: Option<String>,
    candidate: Option<String>,
    scheduled_at: Option<Value>,
}

pub(super) async fn switchover(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: Change = read_body(&app, request).await?;
    let view = view(&app)?;
    let Some(leader) = body.leader.as_deref().filter(|leader| !leader.is_empty()) else {
        return Err(ApiError::bad_request("no leader is named", "send {\"leader\": …, \"candidate\": …}"));
    };
    hand_over(&app, &view, caller, leader, &body).await
}

pub(super) async fn failover(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: Change = read_body(&app, request).await?;
    let view = view(&app)?;
    // Patroni's rule: whoever names the leader means a switchover.
    if let Some(leader) = body.leader.as_deref().filter(|leader| !leader.is_empty()) {
        return hand_over(&app, &view, caller, leader, &body).await;
    }
    not_scheduled(body.scheduled_at.as_ref())?;
    let Some(to) = candidate(&view, &body)? else {
        return Err(ApiError::bad_request("no candidate is named", "send {\"candidate\": …}"));
    };
    finish(&app, &view, Operation::Failover { to: Some(to) }, None, caller, StatusCode::PRECONDITION_FAILED).await
}

#[derive(Debug, Deserialize)]
struct Restart {
    schedule: Option<Value>,
    role: Option<String>,
    postgres_version: Option<Value>,
    /// Seconds, as Patroni counts.
    timeout: Option<u64>,
    #[serde(default)]
    restart_pending: bool,
}

/// Restarts the PostgreSQL of this member.
pub(super) async fn restart(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: Restart = read_body(&app, request).await?;
    let view = view(&app)?;
    not_scheduled(body.schedule.as_ref())?;
    if body.postgres_version.is_some() {
        return Err(not_implemented(
            "restarting by PostgreSQL version",
            "look at server_version in GET /patroni first",
        ));
    }
    if let Some(wanted) = &body.role {
        let role = node::role(&view.local.postgres);
        let known = ["primary", "master", "replica"].contains(&wanted.as_str());
        if !known {
            return Err(ApiError::bad_request("there is no such role", "write primary or replica"));
        }
        if role != wanted && !(role == "primary" && wanted == "master") {
            return Err(conditions(&format!("the role is {role}")));
        }
    }
    if body.restart_pending && !pending_restart(&view) {
        return Err(conditions("no restart is pending"));
    }
    let what = Operation::Restart { member: view.me.id.name.clone() };
    let timeout_ms = body.timeout.map(|seconds| seconds.saturating_mul(1000));
    finish(&app, &view, what, timeout_ms, caller, StatusCode::SERVICE_UNAVAILABLE).await
}

#[derive(Debug, Deserialize)]
struct Reinitialize {
    /// Accepted and without effect: there is one way, which sets the old directory aside.
    #[serde(rename = "force")]
    _force: Option<bool>,
    #[serde(rename = "from_leader", alias = "from-leader")]
    _from_leader: Option<bool>,
}

/// Sets the data of this member aside and clones it again.
pub(super) async fn reinitialize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let _: Reinitialize = read_body(&app, request).await?;
    let view = view(&app)?;
    let what = Operation::Reinit { member: view.me.id.name.clone() };
    finish(&app, &view, what, None, caller, StatusCode::SERVICE_UNAVAILABLE).await
}

/// `DELETE /switchover`, `DELETE /restart`: there are no schedules to take back.
pub(super) async fn nothing_scheduled() -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "nothing is scheduled",
        "operations are not scheduled here: they begin when asked for",
    )
}

async fn hand_over(app: &App, view: &View, caller: String, leader: &str, body: &Change) -> Result<Response, ApiError> {
    not_scheduled(body.scheduled_at.as_ref())?;
    let to = candidate(view, body)?;
    let Some(sitting) = sitting_leader(view, app.now()) else {
        return Err(not_possible("there is no leader to hand over from", "POST /v1/failover elects one"));
    };
    if sitting.holder.name.as_str() != leader {
        return Err(not_possible(
            &format!("leader name does not match: {} leads under term {}", sitting.holder.name, sitting.term),
            "name the present leader",
        ));
    }
    if to.as_ref() == Some(&sitting.holder.name) {
        return Err(ApiError::bad_request("switchover target and source are the same", "name another candidate"));
    }
    finish(app, view, Operation::Switchover { to }, None, caller, StatusCode::PRECONDITION_FAILED).await
}

/// Waits for the outcome. `refused` is the code of "cannot be done", which Patroni gives differently by operation.
async fn finish(
    app: &App,
    view: &View,
    what: Operation,
    timeout_ms: Option<u64>,
    caller: String,
    refused: StatusCode,
) -> Result<Response, ApiError> {
    let timeout = timeout(timeout_ms, default_timeout(&what, view))?;
    let submitted = requests::submit(app, what, None, timeout, caller).await?;
    let report = requests::outcome(app, &submitted.id, timeout + OUTCOME_TRAVELS).await;
    let unknown = |id: &str| {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "status unknown: there is no outcome yet",
            format!("GET /v1/requests/{id} tells"),
        )
    };
    let Some(report) = report else { return Err(unknown(&submitted.id)) };
    let message = report.message.unwrap_or_default();
    match report.state {
        "done" => Ok((StatusCode::OK, message).into_response()),
        "refused" => Err(ApiError::new(refused, message, "GET /v1/status shows what each member waits for")),
        "put_back" => {
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message, "everything is as it was before; ask again"))
        }
        "unknown" => Err(ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("status unknown: {message}"),
            "GET /v1/status shows who leads now",
        )),
        _ => Err(unknown(&submitted.id)),
    }
}

fn view(app: &App) -> Result<Arc<View>, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    match status.view.store {
        crate::core::view::Store::Known { .. } => Ok(status.view.clone()),
        crate::core::view::Store::Unknown { ref why, .. } => Err(ApiError::store_unknown(why)),
    }
}

fn candidate(view: &View, body: &Change) -> Result<Option<MemberName>, ApiError> {
    let Some(text) = body.candidate.as_deref().filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let known = MemberName::new(text).ok().filter(|name| is_member(view, name));
    known.map(Some).ok_or_else(|| not_possible("candidate does not exist", "GET /cluster lists the members"))
}

fn pending_restart(view: &View) -> bool {
    match &view.local.postgres {
        LocalPostgres::Primary(facts) => facts.pending_restart,
        LocalPostgres::Standby(facts) => facts.pending_restart,
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => false,
    }
}

fn not_scheduled(schedule: Option<&Value>) -> Result<(), ApiError> {
    match schedule {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(not_implemented("scheduling an operation", "ask for it when it is time, for example from cron")),
    }
}

fn not_implemented(what: &str, hint: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_IMPLEMENTED, format!("{what} is not implemented"), hint)
}

fn not_possible(why: &str, hint: &str) -> ApiError {
    ApiError::new(StatusCode::PRECONDITION_FAILED, why, hint)
}

fn conditions(why: &str) -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, format!("restart conditions are not satisfied: {why}"), "")
}
