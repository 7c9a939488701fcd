//! `pgvigil endpoint`, which an agent starts, and `pgvigil router --config FILE`, which a person does.

use std::path::PathBuf;

use super::{Exit, Failure};
use crate::config::{Config, LogConfig};
use crate::endpoint::{router, run};

#[derive(clap::Args)]
pub struct Arguments {
    /// Where the agent speaks to it
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    #[arg(long, default_value = "info")]
    log_level: String,
    #[arg(long)]
    log_json: bool,
}

#[derive(clap::Args)]
pub struct Router {
    /// File with a section [router] (default: /etc/pgvigil/pgvigil.toml)
    #[arg(long, short, env = "PGVIGIL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let log = LogConfig { level: arguments.log_level.clone(), json: arguments.log_json };
    ended(run::run(&run::Options { socket: arguments.socket.clone(), log }))
}

pub fn route(arguments: &Router) -> Result<Exit, Failure> {
    let config = Config::router(&super::config_path(arguments.config.as_ref()))?;
    ended(router::run(config))
}

fn ended(result: anyhow::Result<()>) -> Result<Exit, Failure> {
    result.map(|()| Exit::Ok).map_err(|error| Failure::failed(format!("{error:#}"), ""))
}
