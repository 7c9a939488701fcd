//! HTTP: Patroni's health checks and documents, so that an HAProxy configuration made for it works unchanged, and our own
//! `/v1` for the CLI and the demo.
//!
//! Reads the published [`Status`] and nothing else: it never talks to PostgreSQL or the store, so no question from the
//! network can slow the agent down, and it never decides: what is asked for goes to the agent as an [`ApiRequest`], which
//! writes it into the store. One task accepts, one per connection serves, one keeps the last reading of the store for
//! showing; all of them end with [`serve`], and each may be dropped at any await.
//!
//! May run on any runtime. Its handlers compute for well below a millisecond, but `/v1/decisions?full=true` writes
//! megabytes: a `current_thread` runtime on a thread of its own keeps that away from the loop.

mod auth;
mod cluster;
mod decisions;
mod endpoint;
mod error;
mod health;
mod members;
mod metrics;
mod node;
mod openapi;
mod operations;
mod overview;
mod patroni;
mod peer;
mod requests;
mod routes;
mod server;
#[doc(hidden)]
pub mod testing;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::agent::status::Status;
use crate::config::{ApiConfig, Secret};
use crate::core::endpoint::Report;
use crate::core::view::View;
use crate::core::{ClusterName, Moment};
use crate::ports::{Answering, Clock};

pub use openapi::document as openapi_document;
pub use requests::{Accepted, ApiRequest, Refusal};
pub use routes::{ROUTES, Route};
pub use server::serve;

/// Everything that [`serve`] needs beside its socket.
pub struct Api {
    pub config: ApiConfig,
    pub cluster: ClusterName,
    /// `None` until the agent's first round has ended.
    pub status: watch::Receiver<Option<Arc<Status>>>,
    /// What the endpoint said of itself last; `None`: there is none, or it does not answer.
    pub endpoint: watch::Receiver<Option<Report>>,
    pub requests: mpsc::Sender<ApiRequest>,
    /// What the other agents are told.
    pub answers: Arc<dyn Answering>,
    pub clock: Arc<dyn Clock>,
}

/// What the handlers share.
pub(crate) struct App {
    cluster: ClusterName,
    token: Option<Secret>,
    /// Longest time that a request's body may take.
    body_timeout: Duration,
    status: watch::Receiver<Option<Arc<Status>>>,
    endpoint: watch::Receiver<Option<Report>>,
    /// The last view in which the store was readable: shown while it is not, never used to judge.
    last_reading: watch::Receiver<Option<Arc<View>>>,
    requests: mpsc::Sender<ApiRequest>,
    answers: Arc<dyn Answering>,
    recent: requests::Recent,
    /// Strangers may wait for an outcome too, but not in every connection there is.
    waiters: Semaphore,
    connections: server::Counts,
    clock: Arc<dyn Clock>,
    shutdown: CancellationToken,
}

impl App {
    fn now(&self) -> Moment {
        self.clock.now()
    }

    fn status(&self) -> Option<Arc<Status>> {
        self.status.borrow().clone()
    }

    fn endpoint(&self) -> Option<Report> {
        self.endpoint.borrow().clone()
    }

    fn last_reading(&self) -> Option<Arc<View>> {
        self.last_reading.borrow().clone()
    }

    /// Wall-clock milliseconds of a moment in the past, for people.
    fn unix_ms_of(&self, moment: Moment) -> u64 {
        let age = u64::try_from(self.now().since(moment).as_millis()).unwrap_or(u64::MAX);
        self.clock.unix_ms().saturating_sub(age)
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
