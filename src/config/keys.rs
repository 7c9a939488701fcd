//! Every key of the file with its default: what unknown keys are compared with, and what keeps the sample file and
//! docs/CONFIGURATION.md true (a test reads all three).

pub struct Key {
    /// Dotted, without indices: `members.host`.
    pub name: &'static str,
    pub default: Fallback,
}

/// What counts when the key is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The file is refused without it.
    Required,
    /// Nothing: the feature is off, or the value is found out.
    None,
    /// As it would be written in the file.
    Value(&'static str),
}

use Fallback::{None, Required, Value};

const fn key(name: &'static str, default: Fallback) -> Key {
    Key { name, default }
}

pub const KEYS: &[Key] = &[
    key("cluster", Required),
    key("name", Required),
    key("state_dir", Value(r#""/var/lib/pgvigil""#)),
    key("durability", Value(r#""sync""#)),
    key("members.name", Required),
    key("members.host", Required),
    key("members.port", Value("5432")),
    key("members.api_port", Value("8008")),
    key("etcd.endpoints", Required),
    key("etcd.prefix", Value(r#""/pgvigil""#)),
    key("etcd.user", None),
    key("etcd.password_file", None),
    key("etcd.ca_file", None),
    key("etcd.cert_file", None),
    key("etcd.key_file", None),
    key("etcd.try_timeout", Value(r#""700ms""#)),
    key("lease.heartbeat", Value(r#""1s""#)),
    key("lease.ttl", Value(r#""8s""#)),
    key("lease.kill_budget", Value(r#""1s""#)),
    key("lease.renewal_timeout", Value(r#""2s""#)),
    key("takeover.after", Value(r#""2s""#)),
    key("takeover.after_refused", Value(r#""300ms""#)),
    key("sync.k", Value("1")),
    key("sync.max_stall", Value(r#""3s""#)),
    key("election.wait", Value(r#""500ms""#)),
    key("election.give_up", Value(r#""3s""#)),
    key("election.max_lag", Value(r#""1MB""#)),
    key("crash.prefer", Value(r#""failover""#)),
    key("crash.max_restarts", Value("3")),
    key("crash.window", Value(r#""10min""#)),
    key("rejoin.reclone", Value("true")),
    key("rejoin.timeout", Value(r#""60s""#)),
    key("rejoin.set_aside_budget", Value(r#""20GB""#)),
    key("storage.stall_after", Value(r#""4s""#)),
    key("storage.min_free", Value(r#""64MB""#)),
    key("cold_start.wait", Value(r#""60s""#)),
    key("member.publish", Value(r#""3s""#)),
    key("postgresql.data_dir", Required),
    key("postgresql.bin_dir", None),
    key("postgresql.os_user", Value(r#""postgres""#)),
    key("postgresql.listen", Value(r#""*""#)),
    key("postgresql.port", None),
    key("postgresql.socket_dir", Value(r#""/run/postgresql""#)),
    key("postgresql.superuser", Value(r#""postgres""#)),
    key("postgresql.superuser_password_file", Required),
    key("postgresql.internal_password_file", Required),
    key("postgresql.start_timeout", Value(r#""5min""#)),
    key("postgresql.stop_timeout", Value(r#""30s""#)),
    key("postgresql.initdb_options", Value("[]")),
    key("postgresql.hba", Value("[]")),
    key("postgresql.parameters", Value("{}")),
    key("tags.nofailover", Value("false")),
    key("tags.failover_priority", Value("1")),
    key("tags.noloadbalance", Value("false")),
    key("tags.nosync", Value("false")),
    key("tags.custom", Value("{}")),
    key("api.listen", None),
    key("api.token_file", None),
    key("api.max_connections", Value("256")),
    key("api.header_timeout", Value(r#""5s""#)),
    key("guardian.socket", None),
    key("guardian.real_time_priority", Value("10")),
    key("endpoint.listen", Value(r#"["*:6432"]"#)),
    key("endpoint.listen_read_only", Value(r#"["*:6433"]"#)),
    key("endpoint.socket_dir", None),
    key("endpoint.direct", Value("false")),
    key("endpoint.failover_hold", Value(r#""30s""#)),
    key("endpoint.max_lag", Value(r#""16MB""#)),
    key("endpoint.read_only_fallback", Value(r#""primary""#)),
    key("endpoint.threads", Value("1")),
    key("endpoint.proxies", Value("[]")),
    key("router.name", None),
    key("router.members", None),
    key("router.listen", Value(r#"["127.0.0.1:5432", "[::1]:5432"]"#)),
    key("router.listen_read_only", Value("[]")),
    key("router.socket_dir", None),
    key("router.failover_hold", Value(r#""30s""#)),
    key("router.max_lag", Value(r#""16MB""#)),
    key("router.read_only_fallback", Value(r#""primary""#)),
    key("router.threads", Value("1")),
    key("router.state_file", Value(r#""/var/lib/pgvigil/route.json""#)),
    key("log.level", Value(r#""info""#)),
    key("log.format", Value(r#""text""#)),
];

/// Environment variables and the keys that they stand for; they go before the file.
pub const VARIABLES: &[(&str, &str)] = &[
    ("PGVIGIL_NAME", "name"),
    ("PGVIGIL_STATE_DIR", "state_dir"),
    ("PGVIGIL_DATA_DIR", "postgresql.data_dir"),
    ("PGVIGIL_ETCD_ENDPOINTS", "etcd.endpoints"),
    ("PGVIGIL_ETCD_PASSWORD", "etcd.password_file"),
    ("PGVIGIL_SUPERUSER_PASSWORD", "postgresql.superuser_password_file"),
    ("PGVIGIL_INTERNAL_PASSWORD", "postgresql.internal_password_file"),
    ("PGVIGIL_API_TOKEN", "api.token_file"),
    ("PGVIGIL_API_LISTEN", "api.listen"),
    ("PGVIGIL_LOG_LEVEL", "log.level"),
    ("PGVIGIL_LOG_FORMAT", "log.format"),
];

/// PostgreSQL's parameters that pgvigil sets itself, each with why, and what to write instead. A name that ends in `*`
/// stands for all that begin so.
pub const OWNED_PARAMETERS: &[(&str, &str)] = &[
    ("listen_addresses", "set postgresql.listen"),
    ("port", "set the member's `port` in [[members]]"),
    ("unix_socket_directories", "set postgresql.socket_dir"),
    ("data_directory", "set postgresql.data_dir"),
    ("config_file", "pgvigil writes the configuration; put parameters into [postgresql.parameters]"),
    ("hba_file", "pgvigil writes pg_hba; put lines for clients into postgresql.hba"),
    ("ident_file", "pgvigil starts PostgreSQL with its own files; put lines for clients into postgresql.hba"),
    ("external_pid_file", "leave it away: the guardian knows the process"),
    ("cluster_name", "leave it away: it is made from `cluster` and `name`"),
    ("hot_standby", "leave it away: it is always on"),
    ("wal_log_hints", "leave it away: it is always on, pg_rewind needs it"),
    ("synchronous_standby_names", "set `durability` and sync.k: pgvigil keeps the set"),
    ("fsync", "leave it away: it is always on"),
    ("full_page_writes", "leave it away: it is always on"),
    ("restart_after_crash", "set crash.prefer: pgvigil decides what follows a crash"),
    ("primary_conninfo", "leave it away: pgvigil says whom a standby follows"),
    ("primary_slot_name", "leave it away: pgvigil keeps the slots"),
    ("restore_command", "leave it away: a standby follows the leader of its term only"),
    ("archive_cleanup_command", "leave it away: recovery is pgvigil's"),
    ("recovery_end_command", "leave it away: recovery is pgvigil's"),
    ("recovery_*", "leave it away: nothing but pgvigil ends recovery"),
    ("promote_trigger_file", "leave it away: nothing but pgvigil promotes"),
    (
        "allow_alter_system",
        "leave it away: pgvigil switches ALTER SYSTEM off where PostgreSQL can (17 and newer), and corrects what it wrote",
    ),
    ("wal_retrieve_retry_interval", "leave it away: how fast a standby turns to a new leader depends on it"),
];

/// Parameters that may be set, to some of their values: the others would break what the cluster promises.
pub const RESTRICTED_PARAMETERS: &[(&str, &[&str])] = &[
    ("synchronous_commit", &["on", "remote_apply"]),
    ("wal_level", &["replica", "logical"]),
    ("zero_damaged_pages", &["off"]),
    ("ignore_checksum_failure", &["off"]),
];

/// The remedy, if pgvigil owns the parameter.
pub fn owned_parameter(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    OWNED_PARAMETERS.iter().find_map(|(owned, remedy)| {
        let matches = match owned.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            Option::None => name == *owned,
        };
        matches.then_some(*remedy)
    })
}
