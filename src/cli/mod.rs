//! The command line: one file per command. Exit codes are `exit`'s, talking to agents is `crate::client`'s.

mod agent;
mod completions;
mod config;
mod contact;
mod demo;
mod exit;
mod explain;
mod operation;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

pub use config::newest_bin_dir;
pub use exit::{Exit, Failure, say};

/// Where the agent's package puts the file.
pub const DEFAULT_CONFIG: &str = "/etc/pgvigil/pgvigil.toml";

const AFTER_HELP: &str = "\
Exit codes:
  0  done; for `status`: there is a primary
  1  tried and failed, or put back; for `status`: there is no primary
  2  wrong command line or configuration, nothing was tried
  3  no agent answered
  4  refused by the cluster, nothing was changed
  5  begun, outcome unknown

The commands that ask the cluster find it through --url, PGVIGIL_URL, or the member list of the configuration file; every
member is tried until one answers.";

#[derive(Parser)]
#[command(name = "pgvigil", version, about = "High availability for PostgreSQL", after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Configuration file (default: /etc/pgvigil/pgvigil.toml)
    #[arg(long, short, global = true, env = "PGVIGIL_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Agent to ask, e.g. http://10.0.0.1:8008; several with commas between
    #[arg(long, global = true, env = "PGVIGIL_URL", value_name = "URL", value_delimiter = ',')]
    pub url: Vec<String>,
    /// File with the token for requests that change something (or PGVIGIL_API_TOKEN)
    #[arg(long, global = true, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent of one member, beside its PostgreSQL
    Agent,
    /// Show members, roles, lag and what each of them waits for
    Status(status::Arguments),
    /// Hand the leadership over, without losing or failing a transaction
    Switchover(operation::Switchover),
    /// Elect a new leader although the present one is not there
    Failover(operation::Failover),
    /// Restart PostgreSQL of one member
    Restart(operation::Restart),
    /// Set the data of a standby aside and clone it again
    Reinit(operation::Reinit),
    /// Say what the cluster would do now, and why
    Explain(explain::Arguments),
    /// Look at a configuration file
    #[command(subcommand)]
    Config(config::Command),
    /// Run a whole cluster on this machine and break it
    Demo(demo::Arguments),
    /// Print a script that completes pgvigil's commands in a shell
    Completions(completions::Arguments),
}

pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // --help and --version are answers, not errors.
            return ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { Exit::Ok as u8 });
        }
    };
    let json = cli.global.json;
    match run(cli) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(failure) => failure.report(json),
    }
}

fn run(cli: Cli) -> Result<Exit, Failure> {
    let global = cli.global;
    match cli.command {
        Command::Agent => agent::run(&global),
        Command::Status(arguments) => status::run(&global, &arguments),
        Command::Switchover(arguments) => operation::run(&global, &arguments.order()),
        Command::Failover(arguments) => operation::run(&global, &arguments.order()?),
        Command::Restart(arguments) => operation::run(&global, &arguments.order(&global)?),
        Command::Reinit(arguments) => operation::run(&global, &arguments.order()?),
        Command::Explain(arguments) => explain::run(&global, &arguments),
        Command::Config(command) => config::run(&global, &command),
        Command::Demo(arguments) => demo::run(&global, &arguments),
        Command::Completions(arguments) => completions::run(&arguments),
    }
}

impl Global {
    pub fn config_path(&self) -> PathBuf {
        self.config.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG))
    }
}

/// One thread is enough for asking questions.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("start the runtime: {error}"), ""))
}

/// The command's definition, for completions.
fn definition() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}
