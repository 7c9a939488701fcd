//! `/patroni`: this member in the shape of Patroni's node document, which monitoring made for Patroni reads.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use axum::response::Response;
use serde::Serialize;
use serde_json::Value;

use super::App;
use super::error::ApiError;
use crate::agent::status::Status;
use crate::core::Lsn;
use crate::core::health::{counted, sitting_leader};
use crate::core::plan::parse_walreceiver_name;
use crate::core::records::Tags;
use crate::core::view::{GuardState, JobKind, LocalPostgres, PrimaryFacts, Receiver, Store, View};

#[derive(Debug, Serialize)]
pub(super) struct Node {
    state: &'static str,
    role: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    xlog: Option<Xlog>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeline: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replication_state: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replication: Vec<Replication>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    sync_standby: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    quorum_standby: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pending_restart: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    database_system_identifier: Option<String>,
    cluster_unlocked: bool,
    /// Seconds since 1970 of the last reading of the store.
    dcs_last_seen: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tags: BTreeMap<String, Value>,
    patroni: Software,
    /// Why the check that was asked answers as it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// Positions as integers, like Patroni: a primary has one, a standby two.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Xlog {
    Primary { location: u64 },
    Standby { received_location: u64, replayed_location: u64, paused: bool },
}

#[derive(Debug, Serialize)]
struct Replication {
    application_name: String,
    /// The member behind the name, where it is one of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    member: Option<String>,
    state: String,
    sync_state: &'static str,
    sync_priority: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    flush_lsn: Option<Lsn>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay_lsn: Option<Lsn>,
}

#[derive(Debug, Serialize)]
struct Software {
    version: String,
    scope: String,
    name: String,
    software: &'static str,
}

pub(super) async fn get(State(app): State<Arc<App>>) -> Response {
    match app.status() {
        Some(status) => Json(document(&app, &status, None)).into_response(),
        None => ApiError::starting().into_response(),
    }
}

pub(super) fn document(app: &App, status: &Status, reason: Option<String>) -> Node {
    let view = &*status.view;
    let postgres = &view.local.postgres;
    let (primary, standby) = (postgres.primary(), postgres.standby());
    let claim = counted(view, &view.me.id);
    let everybody_waited_for = claim.is_some_and(|claim| claim.members.len() <= claim.k as usize);
    Node {
        state: state(view),
        role: role(postgres),
        server_version: primary.map(|p| p.version).or(standby.map(|s| s.version)),
        xlog: match postgres {
            LocalPostgres::Primary(facts) => Some(Xlog::Primary { location: facts.flushed.0 }),
            LocalPostgres::Standby(facts) => Some(Xlog::Standby {
                received_location: facts.received.unwrap_or_default().0,
                replayed_location: facts.replayed.0,
                paused: facts.replay_paused,
            }),
            LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => None,
        },
        timeline: primary.map(|p| p.timeline.0).or(standby.map(|s| s.timeline.0)),
        replication_state: standby.filter(|s| s.receiver == Receiver::Streaming).map(|_| "streaming"),
        replication: primary.map(replication).unwrap_or_default(),
        sync_standby: standby.is_some() && everybody_waited_for,
        quorum_standby: standby.is_some() && claim.is_some() && !everybody_waited_for,
        pending_restart: primary.is_some_and(|p| p.pending_restart) || standby.is_some_and(|s| s.pending_restart),
        database_system_identifier: view.me.system_identifier.map(|id| id.to_string()),
        cluster_unlocked: sitting_leader(view, app.now()).is_none() && view.store.records().is_some(),
        dcs_last_seen: app.unix_ms_of(store_seen_at(&view.store)) / 1000,
        tags: tags(&view.me.tags),
        patroni: Software {
            version: view.me.agent_version.clone(),
            scope: app.cluster.to_string(),
            name: view.me.id.name.to_string(),
            software: "pgvigil",
        },
        reason,
    }
}

pub(super) fn store_seen_at(store: &Store) -> crate::core::Moment {
    match store {
        Store::Known { observed_at, .. } => *observed_at,
        Store::Unknown { since, .. } => *since,
    }
}

/// The words of Patroni's `PostgresqlState`.
fn state(view: &View) -> &'static str {
    if let Some(job) = view.job.as_ref().filter(|job| job.result.is_none()) {
        match &job.what {
            JobKind::Bootstrap => return "initializing new cluster",
            JobKind::Clone { .. } => return "creating replica",
            JobKind::Rewind { .. } => return "running pg_rewind",
            JobKind::Restart => return "restarting",
            JobKind::HandOver { .. } | JobKind::Stop => return "stopping",
            JobKind::Seal { .. } | JobKind::Promote { .. } | JobKind::Enforce { .. } => {}
        }
    }
    match &view.local.postgres {
        LocalPostgres::Primary(_) | LocalPostgres::Standby(_) => "running",
        LocalPostgres::Starting { .. } => "starting",
        LocalPostgres::Unknown { .. } => "unknown",
        LocalPostgres::Down => match &view.local.guard.state {
            GuardState::Idle { exit: Some(exit) } if !exit.orderly => "crashed",
            _ => "stopped",
        },
    }
}

pub(super) fn role(postgres: &LocalPostgres) -> &'static str {
    match postgres {
        LocalPostgres::Primary(_) => "primary",
        LocalPostgres::Standby(_) => "replica",
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => "uninitialized",
    }
}

fn replication(facts: &PrimaryFacts) -> Vec<Replication> {
    let row = |replica: &crate::core::view::Replica| Replication {
        application_name: replica.application_name.clone(),
        member: parse_walreceiver_name(&replica.application_name).map(|(id, _)| id.name.to_string()),
        state: replica.state.clone(),
        sync_state: if replica.sync_priority > 0 { "quorum" } else { "async" },
        sync_priority: replica.sync_priority,
        flush_lsn: replica.flushed,
        replay_lsn: replica.replayed,
    };
    facts.replicas.iter().map(row).collect()
}

/// As Patroni shows them: only what differs from the defaults, and the operator's own.
pub(super) fn tags(tags: &Tags) -> BTreeMap<String, Value> {
    let defaults = Tags::default();
    let mut shown: BTreeMap<String, Value> =
        tags.custom.iter().map(|(key, value)| (key.clone(), Value::from(value.clone()))).collect();
    let mut flag = |name: &str, value: bool, default: bool| {
        if value != default {
            shown.insert(name.to_owned(), Value::from(value));
        }
    };
    flag("nofailover", tags.nofailover, defaults.nofailover);
    flag("noloadbalance", tags.noloadbalance, defaults.noloadbalance);
    flag("nosync", tags.nosync, defaults.nosync);
    if tags.failover_priority != defaults.failover_priority {
        shown.insert("failover_priority".to_owned(), Value::from(tags.failover_priority));
    }
    shown
}
