//! `/v1`: what operators ask for. Each answers 202 with the request's id as soon as it stands in the store.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::to_bytes;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::App;
use super::auth::Peer;
use super::error::ApiError;
use super::requests::{self, Report};
use crate::core::Lsn;
use crate::core::health::sitting_leader;
use crate::core::names::MemberName;
use crate::core::records::{Force, Operation};
use crate::core::timeline::TimelineId;
use crate::core::view::View;

/// Nobody has more to say; what is longer is a mistake or an attack.
pub(super) const LARGEST_BODY: usize = 64 * 1024;
const SHORTEST_TIMEOUT: Duration = Duration::from_secs(1);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// One in so many connections may wait for an outcome; health checks need the others.
pub(super) const WAITERS_SHARE: usize = 4;
/// Longest `?wait_ms=`: proxies give up on a connection that says nothing for about a minute.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    to: Option<MemberName>,
    request_id: Option<String>,
    timeout_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Failover {
    to: Option<MemberName>,
    request_id: Option<String>,
    timeout_ms: Option<u64>,
    /// Past what the store claims: the caller has seen what is lost.
    #[serde(default)]
    force: bool,
    /// Members whose hosts are off, by the caller's word.
    #[serde(default)]
    off: BTreeSet<MemberName>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnMember {
    member: MemberName,
    request_id: Option<String>,
    timeout_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Accept {
    member: MemberName,
    position: String,
    request_id: Option<String>,
    timeout_ms: Option<u64>,
}

pub(super) async fn switchover(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: Change = read_body(&app, request).await?;
    change(&app, caller, body, |to| Operation::Switchover { to }).await
}

pub(super) async fn failover(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: Failover = read_body(&app, request).await?;
    let status = app.status().ok_or_else(ApiError::starting)?;
    for member in body.to.iter().chain(&body.off) {
        require_member(&status.view, member)?;
    }
    let force = if body.force { Some(force(&app, &status.view, body.off)?) } else { None };
    let what = Operation::Failover { to: body.to };
    let timeout = timeout(body.timeout_ms, default_timeout(&what, &status.view))?;
    accepted(requests::submit_forced(&app, what, body.request_id, timeout, caller, force).await?)
}

/// Good for the vacancy that the caller sees; there is nothing to be forced past a leader that speaks.
fn force(app: &App, view: &View, off: BTreeSet<MemberName>) -> Result<Force, ApiError> {
    let silent = view.memory.silence.map(|silence| app.now().since(silence.first_seen));
    let speaks = silent.is_none_or(|silent| silent < view.policy.timings.heartbeat * 2);
    if let Some(leader) = sitting_leader(view, app.now()).filter(|leader| speaks || leader.holder == view.me.id) {
        return Err(ApiError::new(
            StatusCode::PRECONDITION_FAILED,
            format!("{} leads and speaks: nothing is forced past it", leader.holder.name),
            "use switchover, or stop that member first",
        ));
    }
    let leader = view.store.records().and_then(|r| r.leader()).ok_or_else(|| {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the store, or its leader record, cannot be read: what would be forced is not known",
            "GET /v1/explain says more",
        )
    })?;
    Ok(Force { last_term: leader.last.as_ref().map(|last| last.term).unwrap_or_default(), off })
}

pub(super) async fn restart(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: OnMember = read_body(&app, request).await?;
    on_member(&app, caller, body, |member| Operation::Restart { member }).await
}

pub(super) async fn reinit(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: OnMember = read_body(&app, request).await?;
    on_member(&app, caller, body, |member| Operation::Reinit { member }).await
}

pub(super) async fn accept_store(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let caller = caller(&request);
    let body: Accept = read_body(&app, request).await?;
    let (timeline, position) = position(&body.position)?;
    let body_member = OnMember { member: body.member, request_id: body.request_id, timeout_ms: body.timeout_ms };
    on_member(&app, caller, body_member, |member| Operation::AcceptStore { member, timeline, position }).await
}

/// `3@0/5000060`: the timeline and the position on it, as `explain` shows them.
fn position(text: &str) -> Result<(TimelineId, Lsn), ApiError> {
    let parsed = text
        .split_once('@')
        .and_then(|(timeline, lsn)| Some((TimelineId(timeline.parse().ok()?), lsn.parse::<Lsn>().ok()?)));
    parsed.ok_or_else(|| {
        ApiError::bad_request(
            format!("`{text}` is not a position"),
            "write TIMELINE@LSN as the member's reason in `pgvigil explain` shows it, for example 3@0/5000060",
        )
    })
}

#[derive(Debug, Deserialize)]
pub(super) struct Wait {
    /// Answer only when there is an outcome, or after so long.
    wait_ms: Option<u64>,
}

pub(super) async fn request(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    wait: Result<Query<Wait>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(wait) = wait.map_err(|_| ApiError::bad_request("wait_ms is not a number", "write ?wait_ms=10000"))?;
    // Without a permit the answer is what is known now; whoever waits asks again anyway.
    let permit = wait.wait_ms.and_then(|wait| Some((wait, app.waiters.try_acquire().ok()?)));
    let report = match permit {
        None => requests::find(&app, &id),
        Some((wait, _permit)) => requests::outcome(&app, &id, Duration::from_millis(wait).min(LONGEST_WAIT)).await,
    };
    match report {
        Some(report) => Ok(Json(report).into_response()),
        None => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "there is no such request",
            "a member hears of requests accepted by another one within a heartbeat; finished ones are deleted after a while",
        )),
    }
}

async fn change(
    app: &App,
    caller: String,
    body: Change,
    what: impl FnOnce(Option<MemberName>) -> Operation,
) -> Result<Response, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    if let Some(to) = &body.to {
        require_member(&status.view, to)?;
    }
    let what = what(body.to);
    let timeout = timeout(body.timeout_ms, default_timeout(&what, &status.view))?;
    accepted(requests::submit(app, what, body.request_id, timeout, caller).await?)
}

async fn on_member(
    app: &App,
    caller: String,
    body: OnMember,
    what: impl FnOnce(MemberName) -> Operation,
) -> Result<Response, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    require_member(&status.view, &body.member)?;
    let what = what(body.member);
    let timeout = timeout(body.timeout_ms, default_timeout(&what, &status.view))?;
    accepted(requests::submit(app, what, body.request_id, timeout, caller).await?)
}

fn accepted(report: Report) -> Result<Response, ApiError> {
    let location = format!("/v1/requests/{}", report.id);
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(report)).into_response())
}

// === Parts that Patroni's operations share ===

/// How long an operation may take unless the caller says otherwise.
pub(super) fn default_timeout(what: &Operation, view: &View) -> Duration {
    let policy = &view.policy;
    match what {
        // Checkpoints on both sides, an orderly stop, an election.
        Operation::Switchover { .. } => policy.stop_timeout + policy.election_give_up + Duration::from_secs(60),
        Operation::Failover { .. } => {
            policy.timings.candidate_wait(policy.timings.ttl) + policy.election_give_up + Duration::from_secs(60)
        }
        Operation::Restart { .. } => policy.stop_timeout + policy.start_timeout,
        // As long as copying takes; a terabyte at 20 MB/s.
        Operation::AcceptStore { .. } => policy.election_give_up + Duration::from_secs(60),
        Operation::Reinit { .. } => Duration::from_secs(16 * 3600),
    }
}

pub(super) fn timeout(asked_ms: Option<u64>, default: Duration) -> Result<Duration, ApiError> {
    let asked = asked_ms.map_or(default, Duration::from_millis);
    if asked < SHORTEST_TIMEOUT || asked > LONGEST_TIMEOUT {
        return Err(ApiError::bad_request(
            format!("the timeout is {asked:?}"),
            format!("between {SHORTEST_TIMEOUT:?} and {LONGEST_TIMEOUT:?}, in milliseconds"),
        ));
    }
    Ok(asked)
}

pub(super) fn is_member(view: &View, member: &MemberName) -> bool {
    view.me.configured.contains(member) || view.store.records().is_some_and(|r| r.members.contains_key(member))
}

fn require_member(view: &View, member: &MemberName) -> Result<(), ApiError> {
    if is_member(view, member) {
        return Ok(());
    }
    let members: Vec<&str> = view.me.configured.iter().map(MemberName::as_str).collect();
    Err(ApiError::bad_request(
        format!("there is no member {member}"),
        format!("the members are {}", members.join(", ")),
    ))
}

pub(super) fn caller(request: &Request) -> String {
    let peer = request.extensions().get::<Peer>().map_or("unknown".to_owned(), |peer| peer.0.ip().to_string());
    let agent = request.headers().get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    match agent {
        Some(agent) => format!("{peer} ({})", super::health::shown(agent)),
        None => peer,
    }
}

/// JSON whatever the content type says, as Patroni reads it; no body is an empty object.
pub(super) async fn read_body<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, ApiError> {
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {LARGEST_BODY} bytes"),
            "send less",
        )
    };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > LARGEST_BODY) {
        return Err(too_large());
    }
    let bytes = tokio::time::timeout(app.body_timeout, to_bytes(request.into_body(), LARGEST_BODY))
        .await
        .map_err(|_| {
            ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("the body did not come within {:?}", app.body_timeout),
                "",
            )
        })?
        .map_err(|why| {
            let too_long = std::error::Error::source(&why).is_some_and(|w| w.is::<http_body_util::LengthLimitError>());
            if too_long { too_large() } else { ApiError::bad_request("the body broke off", "send it again") }
        })?;
    let text: &[u8] = if bytes.trim_ascii().is_empty() { b"{}" } else { &bytes };
    serde_json::from_slice(text).map_err(|why| {
        ApiError::bad_request(format!("the body is not what is expected: {why}"), "GET /v1/openapi.json describes it")
    })
}
