//! `pgvigil demo`

use super::{Exit, Failure, Global};

#[derive(clap::Args)]
pub struct Arguments {}

pub fn run(_global: &Global, _arguments: &Arguments) -> Result<Exit, Failure> {
    Err(Failure::failed("this build has no demo yet", ""))
}
