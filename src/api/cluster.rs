//! `/cluster`, `/history`, `/config`: Patroni's documents about the cluster, from the store's last reading.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::members::{Member, Standing, SyncStanding, members};
use super::{App, node};
use crate::core::Lsn;
use crate::core::health::claim;
use crate::core::records::{ClusterRecords, Durability, HistoryRecord};
use crate::core::view::{Store, View};

#[derive(Debug, Serialize)]
struct Cluster {
    members: Vec<Row>,
    scope: String,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    role: &'static str,
    state: String,
    api_url: String,
    host: String,
    port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeline: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lag: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    receive_lag: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    receive_lsn: Option<Lsn>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay_lag: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay_lsn: Option<Lsn>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pending_restart: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tags: BTreeMap<String, Value>,
}

pub(super) async fn cluster(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    let view = &*status.view;
    known(view)?;
    let members = members(view, None, app.now());
    let rows = members.into_iter().filter_map(|member| row(view, member)).collect();
    Ok(Json(Cluster { members: rows, scope: app.cluster.to_string() }).into_response())
}

/// Patroni lists whoever has a key; so members that never published are not here, but in `/v1/status`.
fn row(view: &View, member: Member) -> Option<Row> {
    let follows = !matches!(member.role, Standing::Leader);
    let lag = |bytes: Option<u64>| follows.then(|| bytes.map_or(Value::from("unknown"), Value::from));
    Some(Row {
        role: role(view, &member),
        state: if member.silent { "unknown".to_owned() } else { member.state.clone() },
        api_url: format!("{}/patroni", member.api_url.as_deref()?),
        host: member.host.clone()?,
        port: member.port?,
        timeline: member.timeline.map(|t| t.0),
        lag: lag(member.receive_lag_bytes.or(member.lag_bytes)),
        receive_lag: lag(member.receive_lag_bytes),
        receive_lsn: member.received.filter(|_| follows),
        replay_lag: lag(member.lag_bytes),
        replay_lsn: member.replayed.filter(|_| follows),
        pending_restart: member.pending_restart,
        tags: member.tags.as_ref().map(node::tags).unwrap_or_default(),
        name: member.name.to_string(),
    })
}

/// Where a commit waits for everybody in the set, Patroni says "synchronous"; where it waits for some of them, "quorum".
fn role(view: &View, member: &Member) -> &'static str {
    let everybody = claim(view).is_some_and(|claim| claim.members.len() <= claim.k as usize);
    match (member.role, member.sync) {
        (Standing::Leader, _) => "leader",
        (Standing::Standby, Some(SyncStanding::Synchronous)) if everybody => "sync_standby",
        (Standing::Standby, Some(SyncStanding::Synchronous)) => "quorum_standby",
        (Standing::Standby | Standing::Down | Standing::Unknown | Standing::Unled, _) => "replica",
    }
}

/// `[timeline that ended, where, why, when, new leader]`, oldest first.
pub(super) async fn history(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    let records = known(&status.view)?;
    let line = |record: &HistoryRecord| {
        let switch = record.switch?;
        let parent = records.timelines.get(&record.timeline).map(|t| t.parent.0);
        let ended = parent.unwrap_or(record.timeline.0.saturating_sub(1));
        Some(json!([ended, switch.0, record.reason, iso8601(record.at_unix_ms), record.leader]))
    };
    Ok(Json(records.history.values().filter_map(line).collect::<Vec<Value>>()).into_response())
}

/// The effective settings under Patroni's names, and all of ours beside them.
pub(super) async fn config(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let status = app.status().ok_or_else(ApiError::starting)?;
    let policy = &status.view.policy;
    let synchronous = match policy.durability {
        Durability::Sync | Durability::Strict => Value::from("quorum"),
        Durability::Async => Value::from(false),
    };
    Ok(Json(json!({
        "ttl": policy.timings.ttl.as_secs_f64(),
        "loop_wait": policy.timings.heartbeat.as_secs_f64(),
        "retry_timeout": policy.timings.renewal_timeout.as_secs_f64(),
        "maximum_lag_on_failover": policy.max_lag,
        "synchronous_mode": synchronous,
        "synchronous_mode_strict": policy.durability == Durability::Strict,
        "synchronous_node_count": policy.k,
        "pgvigil": policy,
    }))
    .into_response())
}

pub(super) async fn set_config() -> ApiError {
    ApiError::new(
        StatusCode::NOT_IMPLEMENTED,
        "settings are not changed through the API",
        "change the configuration file on each member and reload the agent, standbys first",
    )
}

fn known(view: &View) -> Result<&ClusterRecords, ApiError> {
    match &view.store {
        Store::Known { records, .. } => Ok(records),
        Store::Unknown { why, .. } => Err(ApiError::store_unknown(why)),
    }
}

/// `2026-09-21T15:33:20.000000+00:00`, as Python writes it and Patroni's readers expect it.
fn iso8601(unix_ms: u64) -> String {
    let (days, rest) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (seconds, micros) = (rest / 1000, rest % 1000 * 1000);
    // Days to a civil date with the year beginning in March, so that the leap day is the last one (H. Hinnant).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}+00:00")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let cases = [
            (0, "1970-01-01T00:00:00.000000+00:00"),
            (951_782_400_000, "2000-02-29T00:00:00.000000+00:00"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999000+00:00"),
            (1_790_000_000_000, "2026-09-21T14:13:20.000000+00:00"),
        ];
        for (unix_ms, expected) in cases {
            assert_eq!(iso8601(unix_ms), expected);
        }
    }
}
