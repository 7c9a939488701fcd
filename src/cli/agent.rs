//! `pgvigil agent --config FILE`

use super::{Exit, Failure, Global};
use crate::config::Config;

pub fn run(global: &Global) -> Result<Exit, Failure> {
    let config = Config::load(&global.config_path())?;
    crate::app::run(config).map(|()| Exit::Ok).map_err(|error| Failure::failed(format!("{error:#}"), ""))
}
