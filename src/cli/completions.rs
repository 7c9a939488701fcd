//! `pgvigil completions SHELL`

use super::{Exit, Failure};

#[derive(clap::Args)]
pub struct Arguments {
    /// bash, zsh, fish, elvish or powershell
    shell: clap_complete::Shell,
}

pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::definition(), "pgvigil", &mut script);
    super::say(format_args!("{}", String::from_utf8_lossy(&script)));
    Ok(Exit::Ok)
}
