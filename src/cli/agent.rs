//! `pgvigil agent --config FILE`

use super::{Exit, Failure, Global};
use crate::config::Config;

pub fn run(global: &Global) -> Result<Exit, Failure> {
    let _config = Config::load(&global.config_path())?;
    Err(Failure::failed("this build has no agent yet", ""))
}
