//! The agent's settings, validated. `raw` is what serde reads, `check` turns it into a [`Config`], `error` says what is
//! wrong: file, line, field, value, remedy. Nothing here reads anything but the file, the secrets' files and the
//! environment, and nothing is written.

mod check;
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
    /// `None`: no section `[endpoint]`, so clients connect to PostgreSQL itself.
    pub endpoint: Option<EndpointConfig>,
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

/// The clients' way in: a process of its own beside the agent.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EndpointConfig {
    pub listen: Vec<Listen>,
    /// Empty: no port for readers.
    pub listen_read_only: Vec<Listen>,
    /// Where `.s.PGSQL.<port>` is made besides; `None`: no unix socket.
    pub socket_dir: Option<PathBuf>,
    /// Clients may reach PostgreSQL's own port too.
    pub direct: bool,
    /// How long a new connection waits while there is no primary.
    pub failover_hold: Duration,
    /// How many bytes behind a standby may be and still take readers.
    pub max_lag: u64,
    /// Readers go to the primary when no standby is near enough; else they are refused.
    pub read_only_fallback: bool,
    pub threads: usize,
    /// Besides the members, who may say on whose behalf they speak (PROXY protocol).
    pub proxies: Vec<Network>,
}

/// `pgvigil router`: the endpoint's front alone, on a host without PostgreSQL.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// How it is called towards the members.
    pub name: String,
    /// `http://host:port` of agents; one that answers is enough.
    pub members: Vec<String>,
    pub endpoint: EndpointConfig,
    /// Where the last known route is kept over a restart; `None`: nowhere.
    pub state_file: Option<PathBuf>,
    pub log: LogConfig,
}

/// An address and a port; `*` is every address of both kinds, or of the only kind that the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Listen {
    Everywhere(u16),
    At(SocketAddr),
}

impl Listen {
    pub fn port(self) -> u16 {
        match self {
            Listen::Everywhere(port) => port,
            Listen::At(address) => address.port(),
        }
    }
}

/// `10.0.0.0/8`
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Network {
    pub address: std::net::IpAddr,
    pub prefix: u8,
}

impl Network {
    pub fn contains(self, other: std::net::IpAddr) -> bool {
        use std::net::IpAddr::{V4, V6};
        // Shifted by all its bits nothing of a number is left, which `>>` does not do by itself.
        let same = |difference: u128, bits: u8| difference.checked_shr(u32::from(bits - self.prefix)).unwrap_or(0) == 0;
        match (self.address.to_canonical(), other.to_canonical()) {
            (V4(a), V4(b)) => same((a.to_bits() ^ b.to_bits()).into(), 32),
            (V6(a), V6(b)) => same(a.to_bits() ^ b.to_bits(), 128),
            _ => false,
        }
    }
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

    /// The settings of `pgvigil router`: the sections `[router]` and `[log]` of a file.
    pub fn router(path: &Path) -> Result<RouterConfig, ConfigError> {
        Config::parse_router(path, &error::read_file(path)?, &process_environment)
    }

    pub fn parse_router(path: &Path, text: &str, environment: Environment<'_>) -> Result<RouterConfig, ConfigError> {
        check::router(path, text, environment)
    }

    /// Do clients reach PostgreSQL itself?
    pub fn direct(&self) -> bool {
        self.endpoint.as_ref().is_none_or(|endpoint| endpoint.direct)
    }

    /// The endpoint's socket for its agent.
    pub fn endpoint_socket(&self) -> PathBuf {
        self.state_dir.join("endpoint.sock")
    }

    pub fn me(&self) -> &MemberAddress {
        self.members.iter().find(|m| m.name == self.name).expect("validated: the member list holds this member")
    }
}

fn process_environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
