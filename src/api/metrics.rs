//! `/metrics`: OpenMetrics text, made from the published status at each scrape. All names stand in one table, so nothing is
//! counted in two places and a metric without a fact shows no sample instead of a zero.

use std::fmt;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::Registry;

use super::error::ApiError;
use super::members::{Member, Standing, SyncStanding, members};
use super::overview::wanted_k;
use super::{App, node};
use crate::agent::status::{Counters, Status};
use crate::core::endpoint::Report;
use crate::core::health::{Check, Query, judge, leader_position};
use crate::core::storage::{Disk, Place, Probe};
use crate::core::view::{GuardState, LeaseView, LocalPostgres, Receiver, View};
use crate::core::{Lsn, Moment};

/// Prometheus misreads counters under its older content type.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Gauge,
    /// `_total` is added by the encoder.
    Counter,
    /// `_info` is added by the encoder; the labels are what it says.
    Info,
}

struct Metric {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    samples: fn(&Scrape) -> Vec<Sample>,
}

#[derive(Debug)]
struct Sample {
    labels: Vec<(&'static str, String)>,
    value: f64,
}

/// What one scrape shows.
#[derive(Debug)]
struct Scrape {
    status: Option<Arc<Status>>,
    members: Vec<Member>,
    now: Moment,
    cluster: String,
    connections: super::server::Numbers,
    endpoint: Option<Report>,
}

impl Scrape {
    fn view(&self) -> Option<&View> {
        self.status.as_ref().map(|status| &*status.view)
    }

    fn passes(&self, check: Check) -> Vec<Sample> {
        let verdict = |status: &Arc<Status>| judge(check, &status.view, status.at, self.now, &Query::default()).is_ok();
        number(self.status.as_ref().map(verdict).map(flag))
    }

    fn counter(&self, read: fn(&Counters) -> u64) -> Vec<Sample> {
        number(self.status.as_ref().map(|status| read(&status.counters) as f64))
    }

    fn at_endpoint(&self, read: fn(&Report) -> u64) -> Vec<Sample> {
        number(self.endpoint.as_ref().map(|report| read(report) as f64))
    }

    fn per_member(&self, read: impl Fn(&Member) -> Option<f64>) -> Vec<Sample> {
        let sample =
            |member: &Member| Some(Sample { labels: vec![("member", member.name.to_string())], value: read(member)? });
        self.members.iter().filter_map(sample).collect()
    }
}

/// The facts that are there: none, or one without labels.
fn number(value: Option<f64>) -> Vec<Sample> {
    value.map(|value| Sample { labels: Vec::new(), value }).into_iter().collect()
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

fn bytes(lsn: Lsn) -> f64 {
    lsn.0 as f64
}

const fn gauge(name: &'static str, help: &'static str, samples: fn(&Scrape) -> Vec<Sample>) -> Metric {
    Metric { name, help, kind: Kind::Gauge, samples }
}

const fn counter(name: &'static str, help: &'static str, samples: fn(&Scrape) -> Vec<Sample>) -> Metric {
    Metric { name, help, kind: Kind::Counter, samples }
}

const fn info(name: &'static str, help: &'static str, samples: fn(&Scrape) -> Vec<Sample>) -> Metric {
    Metric { name, help, kind: Kind::Info, samples }
}

/// Every metric, each name without the prefix `pgvigil_`.
#[rustfmt::skip]
const METRICS: &[Metric] = &[
    info("build", "Version of the agent, and whose it is", build),
    info("decision", "The rule that decides now, with its reason; numbers in the reason are blotted out", decision),

    // --- this member ---
    gauge("primary", "1: leads, and PostgreSQL takes writes (as GET /primary)", |s| s.passes(Check::Primary)),
    gauge("leader", "1: holds the leader record under a valid lease (as GET /leader)", |s| s.passes(Check::Leader)),
    gauge("replica", "1: a standby that takes readers (as GET /replica)", |s| s.passes(Check::Replica)),
    gauge("synchronous", "1: a standby of the synchronous set (as GET /sync)", |s| s.passes(Check::Synchronous)),
    gauge("postgres_running", "1: PostgreSQL accepts connections (as GET /health)", |s| s.passes(Check::Health)),
    gauge("ready", "1: leads, or streams within the lag limit (as GET /readiness)", |s| s.passes(Check::Readiness)),
    gauge("standby", "1: PostgreSQL is in recovery", |s| number(s.view().map(|v| flag(v.local.postgres.standby().is_some())))),
    gauge("postgres_version", "server_version_num of the running PostgreSQL", |s| number(version(s.view()))),
    gauge("timeline", "Timeline of the local PostgreSQL", |s| number(timeline(s.view()))),
    gauge("wal_flushed_bytes", "Primary: where its WAL is flushed to", |s| number(flushed(s.view()))),
    gauge("wal_received_bytes", "Standby: where its WAL is received to", |s| number(received(s.view()))),
    gauge("wal_replayed_bytes", "Standby: where its WAL is replayed to", |s| number(replayed(s.view()))),
    gauge("wal_replay_paused", "Standby: 1 while replay is paused", |s| number(standby(s).map(|f| flag(f.replay_paused)))),
    gauge("wal_streaming", "Standby: 1 while it streams", |s| number(standby(s).map(|f| flag(f.receiver == Receiver::Streaming)))),
    gauge("replay_delay_seconds", "Standby: age of the last replayed commit", |s| number(standby(s).and_then(|f| f.replay_delay_ms).map(|ms| ms as f64 / 1000.0))),
    gauge("lag_bytes", "Standby: bytes between the leader's last known position and what is replayed here", |s| number(own_lag(s))),
    gauge("pending_restart", "1: settings wait for a restart of PostgreSQL", |s| number(pending_restart(s.view()))),
    gauge("job_running", "1 while a job (clone, rewind, promotion, …) runs", |s| number(s.view().map(|v| flag(v.job.as_ref().is_some_and(|j| j.result.is_none()))))),

    // --- endpoint ---
    gauge("endpoint_up", "1: the endpoint here answers its agent", |s| number(Some(flag(s.endpoint.is_some())))),
    gauge("endpoint_connections", "Connections to the endpoint, also those that wait", |s| s.at_endpoint(|e| e.connections)),
    gauge("endpoint_waiting", "Connections that wait for a primary or for a place", |s| s.at_endpoint(|e| e.waiting)),
    gauge("endpoint_sessions", "Sessions of the port for writers", |s| s.at_endpoint(|e| e.sessions)),
    gauge("endpoint_readers", "Sessions of the port for readers", |s| s.at_endpoint(|e| e.readers)),
    gauge("endpoint_synchronous_commit_named", "Sessions that have named synchronous_commit in their SQL", |s| s.at_endpoint(|e| e.setting_named)),
    counter("endpoint_accepted", "Connections accepted", |s| s.at_endpoint(|e| e.accepted)),
    counter("endpoint_refused", "Connections refused", |s| s.at_endpoint(|e| e.refused)),
    counter("endpoint_cancels", "Cancel requests", |s| s.at_endpoint(|e| e.cancels)),
    counter("endpoint_answers_held", "Answers that waited for a barrier because a commit was in doubt", |s| s.at_endpoint(|e| e.doubtful)),
    counter("endpoint_outcomes_unknown", "Sessions that were told 08007", |s| s.at_endpoint(|e| e.unknown)),
    counter("endpoint_sessions_cut", "Sessions ended because the gate was shut", |s| s.at_endpoint(|e| e.cut)),

    // --- lease and fence ---
    gauge("term", "Highest term that this member has seen", |s| number(s.view().map(|v| v.memory.durable.highest_term.0 as f64))),
    gauge("lease_remaining_seconds", "Leader: time until it must have stopped unless the lease is renewed", |s| number(lease_remaining(s))),
    gauge("leader_silent_seconds", "Since the leader's last sign of life was seen here", |s| number(s.view().and_then(|v| v.memory.silence).map(|x| s.now.since(x.first_seen).as_secs_f64()))),
    gauge("guardian_present", "1: the guardian answers", |s| number(s.view().map(|v| flag(!matches!(v.local.guard.state, GuardState::Absent { .. }))))),
    gauge("guardian_armed", "1: the guardian would kill PostgreSQL at the lease's deadline", |s| number(s.view().map(|v| flag(matches!(v.local.guard.state, GuardState::Running { armed: Some(_), .. }))))),
    gauge("guardian_real_time", "1: the guardian runs with real-time priority", |s| number(s.view().map(|v| flag(v.local.guard.real_time)))),

    // --- disks ---
    gauge("storage_free_bytes", "Free bytes on the file system of this place (data, wal, state)", |s| per_place(s, |disk, _| disk.space.map(|space| space.free_bytes as f64))),
    gauge("storage_total_bytes", "Size of the file system of this place", |s| per_place(s, |disk, _| disk.space.map(|space| space.total_bytes as f64))),
    gauge("storage_probe_seconds", "How long the last probe's write and fsync took, or has not returned yet", |s| per_place(s, probe_seconds)),
    gauge("storage_stalled", "1: a write has not returned, or fails, for storage.stall_after", |s| number(s.view().map(|v| flag(crate::core::storage::trouble(v).is_some())))),
    gauge("data_bytes", "Size of the data directory without its WAL", |s| number(s.view().and_then(|v| v.local.storage.data_bytes).map(|b| b as f64))),
    gauge("set_aside_bytes", "Size of the data directories that were set aside", |s| number(s.view().and_then(|v| v.local.storage.aside_bytes).map(|b| b as f64))),

    // --- durability ---
    gauge("sync_wanted", "Acknowledgements from standbys that the settings want", |s| number(s.view().map(|v| f64::from(wanted_k(v))))),
    gauge("sync_required", "Acknowledgements from standbys that a commit waits for, as published", |s| number(required(s.view()).map(f64::from))),
    gauge("sync_members", "Standbys in the published synchronous set", |s| number(claimed(s.view()).map(|n| n as f64))),
    gauge("sync_degraded", "1: commits wait for fewer standbys than the settings want", |s| number(s.view().map(|v| flag(required(Some(v)).unwrap_or(0) < wanted_k(v))))),

    // --- store and loop ---
    gauge("store_readable", "1: the last reading of the store succeeded", |s| number(s.view().map(|v| flag(v.store.records().is_some())))),
    gauge("store_read_age_seconds", "Age of the last reading of the store", |s| number(s.view().map(|v| s.now.since(node::store_seen_at(&v.store)).as_secs_f64()))),
    gauge("round_age_seconds", "Since the agent's loop last ended a round", |s| number(s.status.as_ref().map(|x| s.now.since(x.at).as_secs_f64()))),
    counter("rounds", "Rounds of the agent's loop", |s| s.counter(|c| c.rounds)),
    counter("decision_changes", "Changes of decision", |s| s.counter(|c| c.decision_changes)),
    counter("step_failures", "Steps that failed", |s| s.counter(|c| c.step_failures)),
    counter("store_errors", "Failed calls to the store", |s| s.counter(|c| c.store_errors)),
    counter("postgres_errors", "Failed calls to PostgreSQL", |s| s.counter(|c| c.postgres_errors)),
    counter("renewals", "Renewals of the lease", |s| s.counter(|c| c.renewals)),
    counter("renewal_failures", "Renewals of the lease that failed", |s| s.counter(|c| c.renewal_failures)),
    counter("promotions", "Promotions of the local PostgreSQL", |s| s.counter(|c| c.promotions)),
    counter("kills", "Kills of the local PostgreSQL", |s| s.counter(|c| c.kills)),

    // --- the cluster as seen from here ---
    gauge("members", "Members by role, as seen from here", members_by_role),
    gauge("member_lag_bytes", "Bytes that a member's replay is behind the leader", |s| s.per_member(|m| m.lag_bytes.map(|b| b as f64))),
    gauge("member_synchronous", "1: the member is in the synchronous set", |s| s.per_member(|m| m.sync.map(|x| flag(x == SyncStanding::Synchronous)))),
    gauge("member_silent", "1: the member has not been heard of for long", |s| s.per_member(|m| Some(flag(m.silent)))),

    // --- this API ---
    gauge("api_connections", "Open connections to this API", |s| number(Some(s.connections.open as f64))),
    counter("api_requests", "Requests to this API", |s| number(Some(s.connections.requests as f64))),
    counter("api_connections_evicted", "Idle connections closed to make room for new ones", |s| number(Some(s.connections.evicted as f64))),
    counter("api_connections_refused", "Connections closed at once because every other one was busy", |s| number(Some(s.connections.refused as f64))),
];

pub(super) async fn get(State(app): State<Arc<App>>) -> Response {
    let status = app.status();
    let last = app.last_reading();
    let now = app.now();
    let members = status.as_ref().map(|status| members(&status.view, last.as_deref(), now)).unwrap_or_default();
    let scrape = Scrape {
        status,
        members,
        now,
        cluster: app.cluster.to_string(),
        connections: app.connections.numbers(),
        endpoint: app.endpoint(),
    };
    match text(scrape) {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(why) => {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("write the metrics: {why}"), "").into_response()
        }
    }
}

fn text(scrape: Scrape) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("pgvigil");
    registry.register_collector(Box::new(scrape));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        for metric in METRICS {
            let kind = match metric.kind {
                Kind::Gauge => MetricType::Gauge,
                Kind::Counter => MetricType::Counter,
                Kind::Info => MetricType::Info,
            };
            let samples = (metric.samples)(self);
            if samples.is_empty() {
                continue;
            }
            let mut family = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            for sample in samples {
                encode_sample(metric.kind, &mut family, sample)?;
            }
        }
        Ok(())
    }
}

fn encode_sample(kind: Kind, family: &mut MetricEncoder, sample: Sample) -> Result<(), fmt::Error> {
    let no_exemplar = None::<&Exemplar<NoLabelSet, f64>>;
    match (kind, sample.labels.is_empty()) {
        (Kind::Info, _) => family.encode_info(&sample.labels),
        (Kind::Gauge, true) => family.encode_gauge(&sample.value),
        (Kind::Gauge, false) => family.encode_family(&sample.labels)?.encode_gauge(&sample.value),
        (Kind::Counter, true) => family.encode_counter(&sample.value, no_exemplar),
        (Kind::Counter, false) => family.encode_family(&sample.labels)?.encode_counter(&sample.value, no_exemplar),
    }
}

// === Readings ===

fn build(scrape: &Scrape) -> Vec<Sample> {
    let mut labels = vec![("version", env!("CARGO_PKG_VERSION").to_owned()), ("cluster", scrape.cluster.clone())];
    if let Some(view) = scrape.view() {
        labels.push(("member", view.me.id.name.to_string()));
    }
    vec![Sample { labels, value: 1.0 }]
}

fn decision(scrape: &Scrape) -> Vec<Sample> {
    let sample = |status: &Arc<Status>| Sample {
        labels: vec![("rule", status.plan.rule.clone()), ("reason", without_numbers(&status.plan.reason))],
        value: 1.0,
    };
    scrape.status.iter().map(sample).collect()
}

/// A reason names positions and seconds; as they stand, each of them would be a new time series at every scrape.
fn without_numbers(reason: &str) -> String {
    let blot = |word: &str| if word.contains(|c: char| c.is_ascii_digit()) { "#".to_owned() } else { word.to_owned() };
    reason.split_whitespace().map(blot).collect::<Vec<_>>().join(" ")
}

fn members_by_role(scrape: &Scrape) -> Vec<Sample> {
    let roles = [
        ("leader", Standing::Leader),
        ("standby", Standing::Standby),
        ("unled", Standing::Unled),
        ("down", Standing::Down),
        ("unknown", Standing::Unknown),
    ];
    let count = |role| scrape.members.iter().filter(|member| member.role == role).count();
    roles.map(|(name, role)| Sample { labels: vec![("role", name.to_owned())], value: count(role) as f64 }).into()
}

fn standby(scrape: &Scrape) -> Option<&crate::core::view::StandbyFacts> {
    scrape.view()?.local.postgres.standby()
}

fn version(view: Option<&View>) -> Option<f64> {
    match &view?.local.postgres {
        LocalPostgres::Primary(facts) => Some(f64::from(facts.version)),
        LocalPostgres::Standby(facts) => Some(f64::from(facts.version)),
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => None,
    }
}

fn timeline(view: Option<&View>) -> Option<f64> {
    match &view?.local.postgres {
        LocalPostgres::Primary(facts) => Some(f64::from(facts.timeline.0)),
        LocalPostgres::Standby(facts) => Some(f64::from(facts.timeline.0)),
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => None,
    }
}

fn flushed(view: Option<&View>) -> Option<f64> {
    view?.local.postgres.primary().map(|facts| bytes(facts.flushed))
}

fn received(view: Option<&View>) -> Option<f64> {
    view?.local.postgres.standby()?.received.map(bytes)
}

fn replayed(view: Option<&View>) -> Option<f64> {
    view?.local.postgres.standby().map(|facts| bytes(facts.replayed))
}

fn own_lag(scrape: &Scrape) -> Option<f64> {
    let end = leader_position(scrape.view()?)?;
    Some(standby(scrape)?.replayed.bytes_to(end) as f64)
}

fn pending_restart(view: Option<&View>) -> Option<f64> {
    match &view?.local.postgres {
        LocalPostgres::Primary(facts) => Some(flag(facts.pending_restart)),
        LocalPostgres::Standby(facts) => Some(flag(facts.pending_restart)),
        LocalPostgres::Down | LocalPostgres::Starting { .. } | LocalPostgres::Unknown { .. } => None,
    }
}

fn lease_remaining(scrape: &Scrape) -> Option<f64> {
    match &scrape.view()?.lease {
        LeaseView::Held { deadline, .. } => Some(scrape.now.until(*deadline).as_secs_f64()),
        LeaseView::None | LeaseView::Claimed { .. } | LeaseView::Lost { .. } => None,
    }
}

fn per_place(scrape: &Scrape, read: impl Fn(&Disk, Moment) -> Option<f64>) -> Vec<Sample> {
    let places = scrape.view().into_iter().flat_map(|view| &view.local.storage.places);
    let sample = |(place, disk): (&Place, &Disk)| {
        let word = match place {
            Place::Data => "data",
            Place::Wal => "wal",
            Place::State => "state",
        };
        Some(Sample { labels: vec![("place", word.to_owned())], value: read(disk, scrape.now)? })
    };
    places.filter_map(sample).collect()
}

fn probe_seconds(disk: &Disk, now: Moment) -> Option<f64> {
    match &disk.probe {
        Probe::Works { latency_ms, .. } => Some(*latency_ms as f64 / 1000.0),
        Probe::Waiting { since } | Probe::Failed { since, .. } => Some(now.since(*since).as_secs_f64()),
        Probe::Unknown { .. } => None,
    }
}

fn required(view: Option<&View>) -> Option<u32> {
    view?.store.records()?.sync.value().map(|claim| claim.k)
}

fn claimed(view: Option<&View>) -> Option<usize> {
    view?.store.records()?.sync.value().map(|claim| claim.members.len())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::api::testing::published;
    use crate::core::testing::{NOW, cluster, idle, lag};

    fn scrape(view: View) -> String {
        let members = members(&view, None, NOW);
        let status = Some(published(view, idle()));
        text(Scrape {
            status,
            members,
            now: NOW,
            cluster: "maas".to_owned(),
            connections: Default::default(),
            endpoint: None,
        })
        .unwrap()
    }

    #[test]
    fn the_leader_and_a_standby_show_their_facts() {
        let cluster = cluster().leader("a", 4).standby("b", lag(10)).sync(1, ["b"]);
        let leader = scrape(cluster.seen_by("a"));
        for line in [
            "pgvigil_primary 1.0",
            "pgvigil_term 4.0",
            "pgvigil_lease_remaining_seconds 8.0",
            "pgvigil_sync_degraded 0.0",
            "pgvigil_rounds_total 5.0",
            "pgvigil_members{role=\"standby\"} 1.0",
            "pgvigil_member_lag_bytes{member=\"b\"} 10.0",
            "pgvigil_decision_info{rule=\"follower\",reason=\"follows the leader\"} 1",
        ] {
            assert!(leader.lines().any(|l| l == line), "{line} is not in:\n{leader}");
        }
        let standby = scrape(cluster.seen_by("b"));
        assert!(standby.contains("pgvigil_lag_bytes 10.0") && standby.contains("pgvigil_primary 0.0"), "{standby}");
        assert!(!standby.contains("pgvigil_lease_remaining"), "no fact, no sample");
    }

    #[test]
    fn nothing_published_is_no_error() {
        let text = text(Scrape {
            status: None,
            members: Vec::new(),
            now: NOW,
            cluster: "maas".to_owned(),
            connections: Default::default(),
            endpoint: None,
        });
        assert!(text.unwrap().contains("pgvigil_build_info"));
    }

    #[test]
    fn names_are_declared_once() {
        let names: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
        assert!(METRICS.iter().all(|m| !m.name.ends_with("_total") && !m.name.ends_with("_info")));
    }

    #[test]
    fn numbers_in_reasons_make_no_series() {
        assert_eq!(without_numbers("waits 3.2 s for b at 0/5A0"), "waits # s for b at #");
    }
}
