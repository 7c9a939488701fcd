//! Logs: one line per event on standard error, as text or as JSON. Under systemd that is the journal.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogConfig;

#[derive(Debug, thiserror::Error)]
#[error(
    "log.level = `{level}` is not a filter ({why}); write error, warn, info, debug or trace, or a list like `info,pgvigil::agent=debug`"
)]
pub struct InvalidLevel {
    level: String,
    why: String,
}

/// Installs the process-wide subscriber; later calls change nothing.
pub fn init(config: &LogConfig) -> Result<(), InvalidLevel> {
    let filter = EnvFilter::try_new(&config.level)
        .map_err(|e| InvalidLevel { level: config.level.clone(), why: e.to_string() })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // An error means that a subscriber is there already (a test installed one): its lines are as good.
    let _ = if config.json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).try_init()
    };
    Ok(())
}
