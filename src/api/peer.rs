//! The agent port: what the other members' agents ask of this one (docs/decisions/0013). Answered from what is published,
//! like everything here.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;
use super::operations::read_body;
use crate::core::peers::Question;

pub(super) async fn answer(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let question: Question = read_body(&app, request).await?;
    // Before the first round there is nothing to say, and saying so would be taken for a sign of life.
    let answer = app.answers.answer(question).await.ok_or_else(ApiError::starting)?;
    Ok(Json(answer).into_response())
}
