//! Patroni's health checks: paths, parameters and codes as HAProxy configurations use them. The answer is
//! `core/health.rs`'s; here is only how it is asked and said.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Query as UrlQuery, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::{App, node};
use crate::core::health::{Check, LagLimit, LagMode, Query, ReplicationState, judge};

/// Every path with its question. Exact: `/primaryx` is not `/primary`.
pub(super) const PATHS: &[(&str, Check)] = &[
    ("/", Check::Primary),
    ("/primary", Check::Primary),
    ("/read-write", Check::Primary),
    ("/master", Check::Primary),
    ("/leader", Check::Leader),
    ("/standby-leader", Check::StandbyLeader),
    ("/standby_leader", Check::StandbyLeader),
    ("/replica", Check::Replica),
    ("/read-only", Check::ReadOnly),
    ("/sync", Check::Synchronous),
    ("/synchronous", Check::Synchronous),
    ("/async", Check::Asynchronous),
    ("/asynchronous", Check::Asynchronous),
    ("/quorum", Check::Quorum),
    ("/read-only-sync", Check::ReadOnlySynchronous),
    ("/read-only-synchronous", Check::ReadOnlySynchronous),
    ("/read-only-quorum", Check::ReadOnlyQuorum),
    ("/health", Check::Health),
    ("/liveness", Check::Liveness),
    ("/readiness", Check::Readiness),
];

/// GET answers with the node's document, HEAD and OPTIONS with the status alone.
pub(super) async fn answer(State(app): State<Arc<App>>, method: Method, uri: Uri) -> Response {
    let response = respond(&app, &uri);
    if method == Method::GET { response } else { response.status().into_response() }
}

fn respond(app: &App, uri: &Uri) -> Response {
    let Some((_, check)) = PATHS.iter().find(|(path, _)| *path == uri.path()) else {
        return super::routes::unknown_path(uri).into_response();
    };
    let query = match read_query(uri) {
        Ok(query) => query,
        Err(refusal) => return refusal.into_response(),
    };
    let Some(status) = app.status() else {
        return ApiError::starting().into_response();
    };
    let verdict = judge(*check, &status.view, status.at, app.now(), &query);
    let code = if verdict.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let reason = verdict.unwrap_or_else(|why| why);
    (code, Json(node::document(app, &status, Some(reason)))).into_response()
}

fn read_query(uri: &Uri) -> Result<Query, ApiError> {
    let pairs: UrlQuery<Vec<(String, String)>> = UrlQuery::try_from_uri(uri)
        .map_err(|_| ApiError::bad_request("the query string is not readable", "write it as ?name=value&name=value"))?;
    let mut query = Query::default();
    for (name, value) in pairs.0 {
        match name.as_str() {
            "lag" => query.lag = Some(lag_limit(&value)?),
            "replication_state" => query.replication_state = Some(replication_state(&value)?),
            "mode" => query.mode = mode(&value)?,
            _ => match name.strip_prefix("tag_") {
                Some("") => return Err(ApiError::bad_request("`tag_` names no tag", "write ?tag_KEY=value")),
                Some(key) => query.tags.push((key.to_owned(), value)),
                // Balancers add parameters of their own; Patroni ignores what it does not know, too.
                None => {}
            },
        }
    }
    if matches!((query.lag, query.mode), (Some(LagLimit::Time(_)), LagMode::Write)) {
        return Err(ApiError::bad_request(
            "mode=write cannot be combined with a lag in time: only replay knows the age of what it applies",
            "write the lag in bytes, or leave mode out",
        ));
    }
    Ok(query)
}

/// Bytes, or a number with one of PostgreSQL's units. Case does not matter: `KB` can mean nothing else.
fn lag_limit(text: &str) -> Result<LagLimit, ApiError> {
    let invalid = || {
        ApiError::bad_request(
            format!("lag=`{}` is not a size or a time", shown(text)),
            "write bytes (1048576), a size (16kB, 64MB, 1GB) or a time (500ms, 10s, 2min)",
        )
    };
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (digits, unit) = trimmed.split_at(split);
    let number: u64 = digits.parse().map_err(|_| invalid())?;
    let bytes = |factor: u64| number.checked_mul(factor).map(LagLimit::Bytes).ok_or_else(invalid);
    let milliseconds = |factor: u64| {
        number.checked_mul(factor).map(|ms| LagLimit::Time(Duration::from_millis(ms))).ok_or_else(invalid)
    };
    match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => bytes(1),
        "kb" => bytes(1 << 10),
        "mb" => bytes(1 << 20),
        "gb" => bytes(1 << 30),
        "tb" => bytes(1 << 40),
        "ms" => milliseconds(1),
        "s" => milliseconds(1_000),
        "min" => milliseconds(60_000),
        "h" => milliseconds(3_600_000),
        _ => Err(invalid()),
    }
}

fn replication_state(text: &str) -> Result<ReplicationState, ApiError> {
    match text {
        "streaming" => Ok(ReplicationState::Streaming),
        "in archive recovery" => Ok(ReplicationState::InArchiveRecovery),
        _ => Err(ApiError::bad_request(
            format!("replication_state=`{}` does not exist", shown(text)),
            "write replication_state=streaming",
        )),
    }
}

fn mode(text: &str) -> Result<LagMode, ApiError> {
    match text {
        "apply" => Ok(LagMode::Apply),
        "write" => Ok(LagMode::Write),
        _ => Err(ApiError::bad_request(
            format!("mode=`{}` does not exist", shown(text)),
            "mode=apply compares what is replayed, mode=write what is received",
        )),
    }
}

/// What a stranger sent, short enough to be sent back.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read_as_people_write_them() {
        let bytes = |n| Some(LagLimit::Bytes(n));
        let time = |ms| Some(LagLimit::Time(Duration::from_millis(ms)));
        let cases = [
            ("0", bytes(0)),
            ("1048576", bytes(1 << 20)),
            ("16kB", bytes(16 << 10)),
            ("16KB", bytes(16 << 10)),
            ("64MB", bytes(64 << 20)),
            ("1 GB", bytes(1 << 30)),
            ("10s", time(10_000)),
            ("500ms", time(500)),
            ("2min", time(120_000)),
            ("", None),
            ("MB", None),
            ("-1", None),
            ("1.5MB", None),
            ("10parsecs", None),
            ("99999999999999999999", None),
            ("99999999999999999TB", None),
        ];
        for (text, expected) in cases {
            assert_eq!(lag_limit(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn queries_are_read_or_refused_with_a_sentence() {
        let read = |query: &str| read_query(&format!("/replica?{query}").parse().unwrap());
        let all = read("lag=1MB&tag_zone=east%20one&replication_state=streaming&mode=write&x=y").unwrap();
        assert_eq!(all.lag, Some(LagLimit::Bytes(1 << 20)));
        assert_eq!(all.tags, [("zone".to_owned(), "east one".to_owned())]);
        assert_eq!(all.mode, LagMode::Write);
        for wrong in ["lag=", "lag=much", "mode=x", "replication_state=x", "tag_=1", "lag=1s&mode=write"] {
            let refusal = read(wrong).expect_err(wrong);
            assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
            assert!(!refusal.hint.is_empty(), "{wrong}");
        }
    }
}
