//! `/v1/endpoint`: where clients go, for routers and whoever wants to know; and what the endpoint here says of itself.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::App;
use super::error::ApiError;
use crate::core::endpoint::Report;
use crate::core::route::{Published, published};

#[derive(Serialize)]
struct Document {
    #[serde(flatten)]
    route: Published,
    /// `null`: none is configured here, or it does not answer.
    endpoint: Option<Report>,
}

/// An agent whose loop hangs says the old thing for a shorter and shorter time, then nothing that is valid.
pub(super) async fn get(State(app): State<Arc<App>>) -> Response {
    match app.status() {
        Some(status) => {
            let route = published(&status.view, app.now());
            Json(Document { route, endpoint: app.endpoint() }).into_response()
        }
        None => ApiError::starting().into_response(),
    }
}
