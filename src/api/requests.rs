//! The way of an operation: asked for here, written into the store by the agent, worked on by whom it concerns, and read
//! back from the store by whoever asks.
//!
//! A request is named by its id: the same id twice is the same request, so a caller that heard no answer asks again with
//! the same id and never gets two switchovers.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::App;
use super::error::ApiError;
use crate::core::records::{Force, Operation, Outcome, Request};

/// Longest wait for the agent's answer: it may be in the middle of a round with a slow store.
const AGENT_ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// Requests that are remembered until the store shows them; more than anybody has under way at once.
const REMEMBERED: usize = 64;
const LONGEST_ID: usize = 64;

/// An operation that somebody asked for. The agent writes it as `requests/<id>` if no such key exists, and answers.
#[derive(Debug)]
pub struct ApiRequest {
    pub what: Operation,
    /// For people: where it came from.
    pub asked_by: String,
    pub id: String,
    /// How long the operation may take before everything is put back.
    pub timeout: Duration,
    /// A failover that a person forces past what the store claims.
    pub force: Option<Force>,
    pub answer: oneshot::Sender<Result<Accepted, Refusal>>,
}

/// It stands in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Written just now.
    New,
    /// `requests/<id>` was there with the same operation: this is that request.
    Known,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// `requests/<id>` is there with another operation.
    #[error("request id in use for another operation")]
    IdTaken,
    /// The agent can tell already that it cannot be done; the sentence says why.
    #[error("{0}")]
    NotPossible(String),
    /// Nothing was written.
    #[error("the store is not available: {0}")]
    Unavailable(String),
    /// It may have been written or not (S11).
    #[error("the store did not confirm: {0}")]
    Unknown(String),
}

/// Where a request is, for whoever asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Report {
    pub id: String,
    pub what: Operation,
    /// `accepted`, `waiting`, `working`, then one of `done`, `refused`, `put_back`, `unknown`.
    pub state: &'static str,
    /// What the worker is at, where that is this member.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_unix_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

impl Report {
    pub fn of(request: &Request, phase: Option<String>) -> Report {
        let (state, message) = match &request.outcome {
            None if phase.is_some() => ("working", None),
            None => ("waiting", None),
            Some(Outcome::Done { message }) => ("done", Some(message)),
            Some(Outcome::Refused { message }) => ("refused", Some(message)),
            Some(Outcome::PutBack { message }) => ("put_back", Some(message)),
            Some(Outcome::Unknown { message }) => ("unknown", Some(message)),
        };
        Report {
            id: request.id.clone(),
            what: request.what.clone(),
            state,
            phase,
            message: message.cloned(),
            asked_by: Some(request.asked_by.clone()),
            at_unix_ms: Some(request.at_unix_ms),
            timeout_ms: Some(request.timeout_ms),
        }
    }

    /// Accepted, and not seen in the store's next reading yet.
    fn accepted(id: String, what: Operation) -> Report {
        Report {
            id,
            what,
            state: "accepted",
            phase: None,
            message: None,
            asked_by: None,
            at_unix_ms: None,
            timeout_ms: None,
        }
    }
}

/// Ids accepted here that the published view may not show yet, oldest first.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<VecDeque<(String, Operation)>>);

impl Recent {
    fn get(&self, id: &str) -> Option<Operation> {
        let ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ids.iter().find(|(known, _)| known == id).map(|(_, what)| what.clone())
    }

    fn remember(&self, id: &str, what: &Operation) {
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ids.len() == REMEMBERED {
            ids.pop_front();
        }
        ids.push_back((id.to_owned(), what.clone()));
    }
}

/// Hands an operation to the agent, or finds it where the same id was handed over before.
pub(super) async fn submit(
    app: &App,
    what: Operation,
    id: Option<String>,
    timeout: Duration,
    asked_by: String,
) -> Result<Report, ApiError> {
    submit_forced(app, what, id, timeout, asked_by, None).await
}

pub(super) async fn submit_forced(
    app: &App,
    what: Operation,
    id: Option<String>,
    timeout: Duration,
    asked_by: String,
    force: Option<Force>,
) -> Result<Report, ApiError> {
    let id = match id {
        Some(id) => valid_id(id)?,
        None => new_id()?,
    };
    if let Some(known) = find(app, &id) {
        return if known.what == what { Ok(known) } else { Err(taken(&id)) };
    }
    let (answer, answered) = oneshot::channel();
    let request = ApiRequest { what: what.clone(), asked_by, id: id.clone(), timeout, force, answer };
    app.requests.try_send(request).map_err(|refused| match refused {
        mpsc::error::TrySendError::Full(_) => unavailable(&id, "the agent has too many requests before it"),
        mpsc::error::TrySendError::Closed(_) => unavailable(&id, "the agent is stopping"),
    })?;
    match tokio::time::timeout(AGENT_ANSWERS_WITHIN, answered).await {
        Ok(Ok(Ok(Accepted::New | Accepted::Known))) => {
            app.recent.remember(&id, &what);
            Ok(Report::accepted(id, what))
        }
        Ok(Ok(Err(refusal))) => Err(refused(&id, refusal)),
        Ok(Err(_)) => Err(unconfirmed(&id, "the agent dropped the request")),
        Err(_) => Err(unconfirmed(&id, &format!("the agent did not answer within {AGENT_ANSWERS_WITHIN:?}"))),
    }
}

pub(super) fn find(app: &App, id: &str) -> Option<Report> {
    let status = app.status();
    let stored = status.as_ref().and_then(|status| {
        let request = status.view.store.records()?.requests.get(id)?;
        let working = status.view.memory.operation.as_ref().filter(|operation| operation.id == id);
        Some(Report::of(&request.value, working.map(|operation| operation.phase.clone())))
    });
    stored.or_else(|| app.recent.get(id).map(|what| Report::accepted(id.to_owned(), what)))
}

/// The report once the request has an outcome, or as it is when `within` has passed. Cancel-safe: it only reads.
pub(super) async fn outcome(app: &App, id: &str, within: Duration) -> Option<Report> {
    let mut status = app.status.clone();
    let finished = async {
        loop {
            status.borrow_and_update();
            let report = find(app, id);
            if report.as_ref().is_none_or(|report| report.message.is_some()) {
                return report;
            }
            if status.changed().await.is_err() {
                return report;
            }
        }
    };
    tokio::select! {
        report = finished => report,
        () = tokio::time::sleep(within) => find(app, id),
        () = app.shutdown.cancelled() => find(app, id),
    }
}

fn valid_id(id: String) -> Result<String, ApiError> {
    let plain = id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if plain && !id.is_empty() && id.len() <= LONGEST_ID {
        return Ok(id);
    }
    Err(ApiError::bad_request(
        "the request id is not valid",
        format!("1 to {LONGEST_ID} letters, digits, `-` and `_`; leave it out to be given one"),
    ))
}

fn new_id() -> Result<String, ApiError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|why| {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("no random numbers: {why}"),
            "send a request_id of your own",
        )
    })?;
    Ok(format!("{:016x}", u64::from_be_bytes(bytes)))
}

// === What is said when it was not accepted ===

fn refused(id: &str, refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::IdTaken => taken(id),
        Refusal::NotPossible(why) => {
            ApiError::new(StatusCode::PRECONDITION_FAILED, why, "GET /v1/status shows what each member waits for")
        }
        Refusal::Unavailable(_) => unavailable(id, &refusal.to_string()),
        Refusal::Unknown(_) => unconfirmed(id, &refusal.to_string()),
    }
}

fn taken(id: &str) -> ApiError {
    ApiError::new(
        StatusCode::CONFLICT,
        format!("request id {id} is in use for another operation"),
        format!("GET /v1/requests/{id} shows it; choose another id for this one"),
    )
}

fn unavailable(id: &str, why: &str) -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        format!("nothing was done: {why}"),
        format!("ask again, with \"request_id\": \"{id}\" if you like"),
    )
}

fn unconfirmed(id: &str, why: &str) -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        format!("it is not known whether the request stands: {why}"),
        format!("GET /v1/requests/{id} tells; asking again with \"request_id\": \"{id}\" cannot do it twice"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_fit_for_keys_and_paths() {
        for good in ["a", "A-1_b", &"x".repeat(LONGEST_ID)] {
            assert!(valid_id(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "a/b", "..", "a b", "ä", &"x".repeat(LONGEST_ID + 1)] {
            assert!(valid_id(bad.to_owned()).is_err(), "{bad}");
        }
        assert_ne!(new_id().unwrap(), new_id().unwrap());
    }

    #[test]
    fn only_so_many_are_remembered() {
        let recent = Recent::default();
        for n in 0..=REMEMBERED {
            recent.remember(&n.to_string(), &Operation::Switchover { to: None });
        }
        assert_eq!(recent.get("0"), None);
        assert!(recent.get("1").is_some());
    }
}
