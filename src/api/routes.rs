//! Every route on one page. The router and the OpenAPI document are both made from this table, so neither can have a
//! route that the other has not.

use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, MethodRouter, on};

use super::error::ApiError;
use super::{
    App, auth, cluster, decisions, endpoint, health, metrics, node, openapi, operations, overview, patroni, peer,
};
use crate::core::peers;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET, and HEAD without the body.
    Get,
    /// GET with a document; HEAD and OPTIONS with the status alone, as balancers ask.
    Check,
    Post,
    Put,
    Patch,
    Delete,
}

impl Method {
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Method::Get => &["get"],
            Method::Check => &["get", "head", "options"],
            Method::Post => &["post"],
            Method::Put => &["put"],
            Method::Patch => &["patch"],
            Method::Delete => &["delete"],
        }
    }

    pub fn changes_something(self) -> bool {
        !matches!(self, Method::Get | Method::Check)
    }

    fn filter(self) -> MethodFilter {
        match self {
            Method::Get => MethodFilter::GET,
            Method::Check => MethodFilter::GET.or(MethodFilter::HEAD).or(MethodFilter::OPTIONS),
            Method::Post => MethodFilter::POST,
            Method::Put => MethodFilter::PUT,
            Method::Patch => MethodFilter::PATCH,
            Method::Delete => MethodFilter::DELETE,
        }
    }
}

pub struct Route {
    pub method: Method,
    pub path: &'static str,
    pub summary: &'static str,
    /// Query parameters, each with a sentence.
    pub query: &'static [(&'static str, &'static str)],
    /// Fields of the JSON body, each with a sentence; `!` marks those that have to be there.
    pub body: &'static [(&'static str, &'static str)],
    /// Codes beside those that every route may answer.
    pub answers: &'static [(u16, &'static str)],
    handler: fn(MethodFilter) -> MethodRouter<Arc<App>>,
}

const CHECK: Route = Route {
    method: Method::Check,
    path: "",
    summary: "",
    query: &[("tag_KEY", "the member's tag KEY has this value")],
    body: &[],
    answers: &[(200, "yes"), (400, "a parameter is not readable"), (503, "no, with the reason")],
    handler: |methods| on(methods, health::answer),
};
const READER: Route = Route {
    query: &[
        ("lag", "at most so far behind the leader: bytes, 16kB, 64MB, 1GB, or a time like 10s"),
        ("mode", "apply (default) counts what is replayed, write what is received"),
        ("replication_state", "streaming"),
        ("tag_KEY", "the member's tag KEY has this value"),
    ],
    ..CHECK
};
const GET: Route = Route {
    method: Method::Get,
    path: "",
    summary: "",
    query: &[],
    body: &[],
    answers: &[(200, "the document"), (503, "nothing is published yet")],
    handler: |methods| on(methods, node::get),
};
const FROM_STORE: Route =
    Route { answers: &[(200, "the document"), (503, "nothing is published yet, or the store is not readable")], ..GET };
const ASK: Route = Route {
    method: Method::Post,
    answers: &[
        (202, "it stands in the store; GET /v1/requests/{id} tells what comes of it"),
        (400, "the body is not readable, or names an unknown member"),
        (409, "the request id is in use for another operation"),
        (412, "it cannot be done"),
        (503, "the store is not available; the error says whether the request may stand"),
    ],
    ..GET
};
const CHANGE_BODY: &[(&str, &str)] = &[
    ("to", "the member that shall lead; the best standby unless named"),
    ("request_id", "the same id twice is the same request; one is made up unless given"),
    ("timeout_ms", "after so long everything is put back"),
];
const FAILOVER_BODY: &[(&str, &str)] = &[
    ("to", "the member that shall lead; the best standby unless named"),
    ("force", "past what the store claims: the caller has seen in /v1/explain what is lost"),
    ("off", "with force: members whose hosts are off by the caller's word, so that nobody waits for their lease"),
    ("request_id", "the same id twice is the same request; one is made up unless given"),
    ("timeout_ms", "after so long everything is put back"),
];
const MEMBER_BODY: &[(&str, &str)] = &[
    ("member!", "the member"),
    ("request_id", "the same id twice is the same request; one is made up unless given"),
    ("timeout_ms", "after so long everything is put back"),
];
const PATRONI: Route = Route {
    method: Method::Post,
    answers: &[
        (200, "done"),
        (400, "the body is not readable, or something is missing in it"),
        (412, "it cannot be done"),
        (501, "scheduling is not implemented"),
        (503, "it failed, or the outcome is not known yet"),
    ],
    ..GET
};
const CONFIG: Route = Route {
    path: "/config",
    answers: &[(501, "settings are in each member's file")],
    handler: |m| on(m, cluster::set_config),
    ..GET
};
const UNSCHEDULE: Route = Route {
    method: Method::Delete,
    summary: "takes nothing back: nothing is ever scheduled",
    answers: &[(404, "nothing is scheduled")],
    handler: |m| on(m, patroni::nothing_scheduled),
    ..GET
};

pub const ROUTES: &[Route] = &[
    Route { path: "/", summary: "leads, and PostgreSQL takes writes", ..CHECK },
    Route { path: "/primary", summary: "leads, and PostgreSQL takes writes", ..CHECK },
    Route { path: "/read-write", summary: "leads, and PostgreSQL takes writes", ..CHECK },
    Route { path: "/master", summary: "leads, and PostgreSQL takes writes", ..CHECK },
    Route { path: "/leader", summary: "holds the leader record under a valid lease", ..CHECK },
    Route { path: "/standby-leader", summary: "never: there are no standby clusters", ..CHECK },
    Route { path: "/standby_leader", summary: "never: there are no standby clusters", ..CHECK },
    Route { path: "/replica", summary: "a standby that takes readers", ..READER },
    Route { path: "/read-only", summary: "the primary, or a standby that takes readers", ..READER },
    Route { path: "/sync", summary: "a standby of the synchronous set", ..READER },
    Route { path: "/synchronous", summary: "a standby of the synchronous set", ..READER },
    Route { path: "/async", summary: "a standby outside the synchronous set", ..READER },
    Route { path: "/asynchronous", summary: "a standby outside the synchronous set", ..READER },
    Route { path: "/quorum", summary: "a standby of the synchronous set", ..READER },
    Route { path: "/read-only-sync", summary: "the primary, or a standby of the synchronous set", ..READER },
    Route { path: "/read-only-synchronous", summary: "the primary, or a standby of the synchronous set", ..READER },
    Route { path: "/read-only-quorum", summary: "the primary, or a standby of the synchronous set", ..READER },
    Route { path: "/health", summary: "PostgreSQL accepts connections", ..CHECK },
    Route { path: "/liveness", summary: "the agent's loop runs", ..CHECK },
    Route { path: "/readiness", summary: "leads, or streams within the lag limit", ..READER },
    Route { path: "/patroni", summary: "this member, in Patroni's shape", ..GET },
    Route {
        path: "/cluster",
        summary: "all members, in Patroni's shape",
        handler: |m| on(m, cluster::cluster),
        ..FROM_STORE
    },
    Route {
        path: "/history",
        summary: "changes of leader, in Patroni's shape",
        handler: |m| on(m, cluster::history),
        ..FROM_STORE
    },
    Route { path: "/config", summary: "the effective settings", handler: |m| on(m, cluster::config), ..GET },
    Route { method: Method::Patch, summary: "not implemented", ..CONFIG },
    Route { method: Method::Put, summary: "not implemented", ..CONFIG },
    Route { path: "/metrics", summary: "OpenMetrics text", handler: |m| on(m, metrics::get), ..GET },
    Route {
        path: "/switchover",
        summary: "hands over from a living leader and waits",
        body: &[("leader!", "who leads now"), ("candidate", "who shall lead; the best standby unless named")],
        handler: |m| on(m, patroni::switchover),
        ..PATRONI
    },
    Route { path: "/switchover", ..UNSCHEDULE },
    Route {
        path: "/failover",
        summary: "elects a new leader although the old one may not be there, and waits",
        body: &[("candidate!", "who shall lead"), ("leader", "makes it a switchover")],
        handler: |m| on(m, patroni::failover),
        ..PATRONI
    },
    Route {
        path: "/restart",
        summary: "restarts PostgreSQL of this member and waits",
        body: &[
            ("role", "only if it is primary or replica"),
            ("restart_pending", "only if settings wait for a restart"),
            ("timeout", "seconds"),
        ],
        handler: |m| on(m, patroni::restart),
        ..PATRONI
    },
    Route { path: "/restart", ..UNSCHEDULE },
    Route {
        path: "/reinitialize",
        summary: "sets this standby's data aside, clones it again, and waits",
        body: &[("force", "accepted, without effect"), ("from_leader", "accepted, without effect")],
        handler: |m| on(m, patroni::reinitialize),
        ..PATRONI
    },
    Route {
        path: "/v1/status",
        summary: "the whole cluster as this member sees it",
        handler: |m| on(m, overview::get),
        ..GET
    },
    Route {
        path: "/v1/endpoint",
        summary: "where clients go now, who takes readers, and how the endpoint here is",
        handler: |m| on(m, endpoint::get),
        ..GET
    },
    Route {
        path: "/v1/decisions",
        summary: "the last changes of decision, oldest first",
        query: &[("full", "true: with views and plans"), ("limit", "the newest so many")],
        handler: |m| on(m, decisions::list),
        ..GET
    },
    Route {
        path: "/v1/explain",
        summary: "what this member decides now, and why",
        handler: |m| on(m, decisions::explain),
        ..GET
    },
    Route {
        path: "/v1/switchover",
        summary: "hands over from a living leader",
        body: CHANGE_BODY,
        handler: |m| on(m, operations::switchover),
        ..ASK
    },
    Route {
        path: "/v1/failover",
        summary: "elects a new leader although the old one may not be there",
        body: FAILOVER_BODY,
        handler: |m| on(m, operations::failover),
        ..ASK
    },
    Route {
        path: "/v1/restart",
        summary: "restarts PostgreSQL of a member",
        body: MEMBER_BODY,
        handler: |m| on(m, operations::restart),
        ..ASK
    },
    Route {
        path: "/v1/reinit",
        summary: "sets a standby's data aside and clones it again",
        body: MEMBER_BODY,
        handler: |m| on(m, operations::reinit),
        ..ASK
    },
    Route {
        path: "/v1/accept-store",
        summary: "the store is lost and no leader sits: this member's data are the cluster from now on",
        body: &[
            ("member!", "whose data"),
            ("position!", "TIMELINE@LSN where it stands, as `pgvigil explain` shows it"),
            ("request_id", "the same id twice is the same request"),
            ("timeout_ms", "how long it may take"),
        ],
        handler: |m| on(m, operations::accept_store),
        ..ASK
    },
    Route {
        path: "/v1/requests/{id}",
        summary: "what came of a request",
        query: &[("wait_ms", "answer when there is an outcome, or after so long (60000 at most)")],
        answers: &[(200, "the request"), (404, "no such request is known here")],
        handler: |m| on(m, operations::request),
        ..GET
    },
    Route {
        method: Method::Post,
        path: peers::PATH,
        summary: "what the agents of a cluster ask each other",
        body: &[
            ("version!", "of the agents' messages"),
            ("cluster!", "whose agent asks"),
            ("system_identifier", "of the database of whoever asks"),
            ("from!", "who asks"),
            ("asks!", "what is asked"),
        ],
        answers: &[(200, "the answer"), (400, "the body is not readable"), (503, "nothing is published yet")],
        handler: |m| on(m, peer::answer),
        ..GET
    },
    Route {
        path: "/v1/openapi.json",
        summary: "this description",
        answers: &[(200, "the document")],
        handler: |m| on(m, openapi::get),
        ..GET
    },
];

pub(super) fn router(app: Arc<App>) -> Router {
    let routes = ROUTES
        .iter()
        .fold(Router::new(), |router, route| router.route(route.path, (route.handler)(route.method.filter())));
    routes
        .fallback(async |uri: Uri| unknown_path(&uri))
        .method_not_allowed_fallback(async || {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path does not take this method",
                "GET /v1/openapi.json lists what it takes",
            )
        })
        .layer(from_fn_with_state(app.clone(), auth::guard))
        .with_state(app)
}

pub(super) fn unknown_path(uri: &Uri) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        format!("there is no `{}` here", health::shown(uri.path())),
        "paths are exact; GET /v1/openapi.json lists them",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_health_check_has_a_route_and_the_other_way_round() {
        let checks: Vec<&str> = ROUTES.iter().filter(|r| r.method == Method::Check).map(|r| r.path).collect();
        let paths: Vec<&str> = health::PATHS.iter().map(|(path, _)| *path).collect();
        assert_eq!(checks, paths);
    }
}
