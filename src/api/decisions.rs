//! `/v1/decisions` and `/v1/explain`: why it did what it did, and what it waits for now.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::ApiError;
use super::{App, health, millis};
use crate::agent::status::Decision;
use crate::core::health::{Query as Conditions, judge};
use crate::core::names::MemberName;
use crate::core::outlook::{Outlook, outlook};
use crate::core::plan::{Plan, Step};

#[derive(Debug, Deserialize)]
pub(super) struct Choice {
    /// With the views and the plans, for `pgvigil explain --replay`.
    #[serde(default)]
    full: bool,
    /// The newest so many.
    limit: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Short<'a> {
    number: u64,
    at_unix_ms: u64,
    rule: &'a str,
    reason: &'a str,
    steps: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    rejected: &'a BTreeMap<MemberName, String>,
}

/// Oldest first, like the log.
pub(super) async fn list(
    State(app): State<Arc<App>>,
    choice: Result<Query<Choice>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(choice) = choice.map_err(|_| {
        ApiError::bad_request("the parameters are not readable", "write ?full=true&limit=20, or leave them out")
    })?;
    let status = app.status().ok_or_else(ApiError::starting)?;
    let skip = status.decisions.len().saturating_sub(choice.limit.unwrap_or(usize::MAX));
    let chosen = status.decisions.iter().skip(skip);
    if choice.full {
        return Ok(Json(chosen.collect::<Vec<&Decision>>()).into_response());
    }
    let short = chosen.map(|decision| Short {
        number: decision.number,
        at_unix_ms: decision.at_unix_ms,
        rule: &decision.plan.rule,
        reason: &decision.plan.reason,
        steps: decision.plan.steps.iter().map(step_name).collect(),
        rejected: &decision.plan.rejected,
    });
    Ok(Json(short.collect::<Vec<_>>()).into_response())
}

#[derive(Debug, Serialize)]
struct Explanation<'a> {
    member: &'a MemberName,
    rule: &'a str,
    reason: &'a str,
    rejected: &'a BTreeMap<MemberName, String>,
    steps: &'a [Step],
    wake_in_ms: Option<u64>,
    /// Why there is no failover now, and what would come of one.
    failover: Outlook,
    /// What each health check answers now, and why.
    checks: BTreeMap<&'static str, Answer>,
}

#[derive(Debug, Serialize)]
struct Answer {
    pass: bool,
    reason: String,
}

pub(super) async fn explain(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    let (view, plan, now) = (&*status.view, &*status.plan, app.now());
    let answer = |check| match judge(check, view, status.at, now, &Conditions::default()) {
        Ok(reason) => Answer { pass: true, reason },
        Err(reason) => Answer { pass: false, reason },
    };
    let explanation = Explanation {
        member: &view.me.id.name,
        rule: &plan.rule,
        reason: &plan.reason,
        rejected: &plan.rejected,
        steps: &plan.steps,
        wake_in_ms: wake_in_ms(plan, now),
        failover: outlook(view),
        checks: health::PATHS.iter().map(|(path, check)| (*path, answer(*check))).collect(),
    };
    Ok(Json(explanation).into_response())
}

pub(super) fn wake_in_ms(plan: &Plan, now: crate::core::Moment) -> Option<u64> {
    plan.wake.map(|wake| millis(now.until(wake)))
}

/// The step's name as the plan's JSON has it.
pub(super) fn step_name(step: &Step) -> String {
    let value = serde_json::to_value(step).unwrap_or_default();
    value.get("do").and_then(Value::as_str).unwrap_or("unknown").to_owned()
}
