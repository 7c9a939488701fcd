//! `pgvigil agent --config FILE`

use std::path::PathBuf;

use super::{Exit, Failure};
use crate::config::Config;

#[derive(clap::Args)]
pub struct Arguments {
    /// Configuration file (default: /etc/pgvigil/pgvigil.toml)
    #[arg(long, short, env = "PGVIGIL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let config = Config::load(&super::config_path(arguments.config.as_ref()))?;
    crate::app::run(config).map(|()| Exit::Ok).map_err(|error| Failure::failed(format!("{error:#}"), ""))
}
