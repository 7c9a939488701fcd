//! Why a demo cluster could not do what it was asked.

use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Something that has to be installed is not there.
    #[error("{what} was not found: {remedy}")]
    Missing { what: String, remedy: String },
    #[error("{what}: {why}")]
    Failed { what: String, why: String },
    /// A state that had to come did not come in time; the logs say why.
    #[error("{what}: not within {within:?} ({last}); logs are in {logs}", logs = .logs.display())]
    TimedOut { what: String, within: Duration, last: String, logs: PathBuf },
}

impl DemoError {
    pub fn failed(what: impl Into<String>, why: impl ToString) -> DemoError {
        DemoError::Failed { what: what.into(), why: why.to_string() }
    }
}
