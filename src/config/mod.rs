//! The agent's settings, validated. `raw` is what serde reads, `check` turns it into a [`Config`], `error` says what is
//! wrong: file, line, field, value, remedy. Nothing here reads anything but the file, the secrets' files and the
//! environment, and nothing is written.

pub mod access;
mod check;
mod endpoint;
mod error;
pub mod keys;
mod raw;
mod secrets;
pub mod units;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::core::names::{ClusterName, MemberName};
use crate::core::records::Tags;
use crate::core::view::Policy;

pub use endpoint::{EndpointAccess, EndpointTls};
pub use error::{ConfigError, nearest};

#[derive(Clone, Debug)]
pub struct Config {
    /// Where it was read from; errors name it.
    pub path: PathBuf,
    pub cluster: ClusterName,
    pub name: MemberName,
    /// Identity, promises and PostgreSQL's configuration: outside PGDATA, on another disk where there is one.
    pub state_dir: PathBuf,
    /// All members, this one included.
    pub members: Vec<MemberAddress>,
    pub etcd: EtcdConfig,
    pub postgresql: PostgresConfig,
    /// Lease timings, durability, elections: what `decide` needs.
    pub policy: Policy,
    pub tags: Tags,
    pub api: ApiConfig,
    pub guardian: GuardianConfig,
    pub endpoint: EndpointAccess,
    pub log: LogConfig,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberAddress {
    pub name: MemberName,
    /// Host name or IP address at which the other members and clients reach this one.
    pub host: String,
    /// PostgreSQL's port.
    pub port: u16,
    pub api_port: u16,
}

#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// `http://host:2379` or `https://…`, one per etcd member.
    pub endpoints: Vec<String>,
    pub user: Option<(String, Secret)>,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Deadline of one try at one etcd member, before the next one is asked.
    pub try_timeout: Duration,
    /// First part of every key; `/pgvigil` unless set.
    pub prefix: String,
}

#[derive(Clone, Debug)]
pub struct PostgresConfig {
    pub data_dir: PathBuf,
    /// Directory of `postgres`, `initdb`, `pg_basebackup`, `pg_rewind`, …; `None`: found by version.
    pub bin_dir: Option<PathBuf>,
    /// Operating system user that PostgreSQL runs as when the agent is root.
    pub os_user: String,
    /// `listen_addresses`.
    pub listen: String,
    pub port: u16,
    pub socket_dir: PathBuf,
    pub superuser: String,
    pub superuser_password: Secret,
    /// One password for pgvigil's own roles (`pgvigil`, `pgvigil_replication`, `pgvigil_rewind`), the same on all members.
    pub internal_password: Secret,
    /// Settings of the operator; those that pgvigil owns are refused.
    pub parameters: BTreeMap<String, String>,
    /// pg_hba lines for clients, after pgvigil's own.
    pub hba: Vec<String>,
    /// Set-aside data directories may take this much disk; older ones are named, not deleted, beyond it.
    pub set_aside_budget: u64,
    pub initdb_options: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct ApiConfig {
    pub listen: SocketAddr,
    /// What unsafe requests must show as `Authorization: Bearer`; `None`: unsafe requests only from this host.
    pub token: Option<Secret>,
    pub max_connections: usize,
    pub header_timeout: Duration,
}

#[derive(Clone, Debug)]
pub struct GuardianConfig {
    pub socket: PathBuf,
    /// SCHED_FIFO priority 1..99; 0: do not ask for it.
    pub real_time_priority: u8,
}

#[derive(Clone, Debug)]
pub struct LogConfig {
    pub level: String,
    pub json: bool,
}

/// A password: never shown, never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

/// What a command needs to find the cluster.
#[derive(Clone, Debug)]
pub struct Contact {
    /// The member on this host, if the file or the environment says which one it is.
    pub name: Option<MemberName>,
    pub members: Vec<MemberAddress>,
    pub token_file: Option<PathBuf>,
}

/// Where settings come from besides the file; tests give their own.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Config {
    /// Reads, validates, resolves secrets. One error names file, line, field, value and remedy.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        Config::parse(path, &error::read_file(path)?, &process_environment)
    }

    /// As [`Config::load`], from a text: files of secrets are read, the configuration file is not.
    pub fn parse(path: &Path, text: &str, environment: Environment<'_>) -> Result<Config, ConfigError> {
        check::config(path, text, environment)
    }

    /// Whom to ask: for commands that talk to the cluster and may not be allowed to read its secrets.
    pub fn contact(path: &Path) -> Result<Contact, ConfigError> {
        check::contact(path, &error::read_file(path)?, &process_environment)
    }

    pub fn me(&self) -> &MemberAddress {
        self.members.iter().find(|m| m.name == self.name).expect("validated: the member list holds this member")
    }
}

fn process_environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
