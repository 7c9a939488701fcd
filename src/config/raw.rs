//! The file as serde reads it: every key optional, so that defaults, the environment and "is missing" are `check`'s.
//! No `flatten`: it takes line and column away from errors and lets unknown keys through.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::units::{Size, Span};

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    pub cluster: Option<String>,
    pub name: Option<String>,
    pub state_dir: Option<PathBuf>,
    pub durability: Option<String>,
    pub members: Vec<Member>,
    pub etcd: Etcd,
    pub lease: Lease,
    pub takeover: Takeover,
    pub sync: Sync,
    pub election: Election,
    pub crash: Crash,
    pub rejoin: Rejoin,
    pub storage: Storage,
    pub cold_start: ColdStart,
    pub member: MemberSection,
    pub postgresql: Postgresql,
    pub tags: Tags,
    pub api: Api,
    pub guardian: Guardian,
    pub endpoint: Option<Endpoint>,
    pub router: Option<Router>,
    pub log: Log,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Member {
    pub name: Option<String>,
    pub host: Option<String>,
    pub port: Option<u16>,
    pub api_port: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Etcd {
    pub endpoints: Option<Vec<String>>,
    pub prefix: Option<String>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub try_timeout: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Lease {
    pub heartbeat: Option<Span>,
    pub ttl: Option<Span>,
    pub kill_budget: Option<Span>,
    pub renewal_timeout: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Takeover {
    pub after: Option<Span>,
    pub after_refused: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Sync {
    pub k: Option<u32>,
    pub max_stall: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Election {
    pub wait: Option<Span>,
    pub give_up: Option<Span>,
    pub max_lag: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Crash {
    pub prefer: Option<String>,
    pub max_restarts: Option<u32>,
    pub window: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Rejoin {
    pub reclone: Option<bool>,
    pub timeout: Option<Span>,
    pub set_aside_budget: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Storage {
    pub stall_after: Option<Span>,
    pub min_free: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ColdStart {
    pub wait: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct MemberSection {
    pub publish: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Postgresql {
    pub data_dir: Option<PathBuf>,
    pub bin_dir: Option<PathBuf>,
    pub os_user: Option<String>,
    pub listen: Option<String>,
    pub port: Option<u16>,
    pub socket_dir: Option<PathBuf>,
    pub superuser: Option<String>,
    pub superuser_password_file: Option<PathBuf>,
    pub internal_password_file: Option<PathBuf>,
    pub start_timeout: Option<Span>,
    pub stop_timeout: Option<Span>,
    pub initdb_options: Vec<String>,
    pub hba: Vec<String>,
    pub parameters: BTreeMap<String, toml::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Tags {
    pub nofailover: Option<bool>,
    pub failover_priority: Option<u32>,
    pub noloadbalance: Option<bool>,
    pub nosync: Option<bool>,
    pub custom: BTreeMap<String, toml::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Api {
    pub listen: Option<String>,
    pub token_file: Option<PathBuf>,
    pub max_connections: Option<usize>,
    pub header_timeout: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Guardian {
    pub socket: Option<PathBuf>,
    pub real_time_priority: Option<u8>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Endpoint {
    pub listen: Option<Vec<String>>,
    pub listen_read_only: Option<Vec<String>>,
    pub socket_dir: Option<PathBuf>,
    pub direct: Option<bool>,
    pub failover_hold: Option<Span>,
    pub max_lag: Option<Size>,
    pub read_only_fallback: Option<String>,
    pub threads: Option<usize>,
    pub proxies: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Router {
    pub name: Option<String>,
    pub members: Option<Vec<String>>,
    pub listen: Option<Vec<String>>,
    pub listen_read_only: Option<Vec<String>>,
    pub socket_dir: Option<PathBuf>,
    pub failover_hold: Option<Span>,
    pub max_lag: Option<Size>,
    pub read_only_fallback: Option<String>,
    pub threads: Option<usize>,
    pub state_file: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Log {
    pub level: Option<String>,
    pub format: Option<String>,
}
