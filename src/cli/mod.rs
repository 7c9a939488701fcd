//! The command line: one file per command. Exit codes are `exit`'s, talking to agents is `crate::client`'s.

mod agent;
mod completions;
mod config;
mod contact;
mod demo;
mod endpoint;
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
    #[command(subcommand)]
    command: Command,
}

/// Of every command that asks something. Not clap's `global`: `demo --json` takes a file.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Configuration file (default: /etc/pgvigil/pgvigil.toml)
    #[arg(long, short, env = "PGVIGIL_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Agent to ask, e.g. http://10.0.0.1:8008; several with commas between
    #[arg(long, env = "PGVIGIL_URL", value_name = "URL", value_delimiter = ',')]
    pub url: Vec<String>,
    /// File with the token for requests that change something (or PGVIGIL_API_TOKEN)
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
}

/// A command's own arguments with the shared ones.
#[derive(Args)]
struct Asking<A: Args> {
    #[command(flatten)]
    own: A,
    #[command(flatten)]
    global: Global,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent of one member, beside its PostgreSQL
    Agent(agent::Arguments),
    /// Pass clients of this host on to the primary, wherever it is (for hosts without PostgreSQL)
    Router(endpoint::Router),
    /// Serve clients beside an agent, which starts this itself
    #[command(hide = true)]
    Endpoint(endpoint::Arguments),
    /// Show members, roles, lag and what each of them waits for
    Status(Asking<status::Arguments>),
    /// Hand the leadership over, without losing or failing a transaction
    Switchover(Asking<operation::Switchover>),
    /// Elect a new leader although the present one is not there
    Failover(Asking<operation::Failover>),
    /// Restart PostgreSQL of one member
    Restart(Asking<operation::Restart>),
    /// Set the data of a standby aside and clone it again
    Reinit(Asking<operation::Reinit>),
    /// After etcd was lost for good while nobody leads: say whose data are the cluster
    AcceptStore(Asking<operation::AcceptStore>),
    /// Say what the cluster would do now, and why
    Explain(Asking<explain::Arguments>),
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
    let json = cli.command.json();
    match run(&cli.command) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(failure) => failure.report(json),
    }
}

fn run(command: &Command) -> Result<Exit, Failure> {
    match command {
        Command::Agent(arguments) => agent::run(arguments),
        Command::Router(arguments) => endpoint::route(arguments),
        Command::Endpoint(arguments) => endpoint::run(arguments),
        Command::Status(asked) => status::run(&asked.global, &asked.own),
        Command::Switchover(asked) => operation::run(&asked.global, &asked.own.order()),
        Command::Failover(asked) => operation::run(&asked.global, &asked.own.order(&asked.global)?),
        Command::Restart(asked) => operation::run(&asked.global, &asked.own.order(&asked.global)?),
        Command::Reinit(asked) => operation::run(&asked.global, &asked.own.order()?),
        Command::AcceptStore(asked) => operation::run(&asked.global, &asked.own.order()?),
        Command::Explain(asked) => explain::run(&asked.global, &asked.own),
        Command::Config(command) => config::run(command),
        Command::Demo(arguments) => demo::run(arguments),
        Command::Completions(arguments) => completions::run(arguments),
    }
}

impl Command {
    /// Does this command answer in JSON, its errors too?
    fn json(&self) -> bool {
        match self {
            Command::Status(asked) => asked.global.json,
            Command::Switchover(asked) => asked.global.json,
            Command::Failover(asked) => asked.global.json,
            Command::Restart(asked) => asked.global.json,
            Command::Reinit(asked) => asked.global.json,
            Command::AcceptStore(asked) => asked.global.json,
            Command::Explain(asked) => asked.global.json,
            Command::Config(config::Command::Check(arguments)) => arguments.json,
            Command::Agent(_)
            | Command::Router(_)
            | Command::Endpoint(_)
            | Command::Demo(_)
            | Command::Completions(_) => false,
        }
    }
}

/// The named file, or where the package puts it.
pub fn config_path(named: Option<&PathBuf>) -> PathBuf {
    named.cloned().unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG))
}

impl Global {
    pub fn config_path(&self) -> PathBuf {
        config_path(self.config.as_ref())
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
