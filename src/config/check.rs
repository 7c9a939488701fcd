//! From what the file says to a [`Config`] that can be relied on. One section per function, relations at the end.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::{Source, nearest};
use super::raw;
use super::units::{Size, Span, show_duration};
use super::{
    ApiConfig, Config, ConfigError, Contact, EndpointConfig, Environment, EtcdConfig, GuardianConfig, Listen,
    LogConfig, MemberAddress, Network, PostgresConfig, RouterConfig, keys, secrets,
};
use crate::core::lease::{InvalidTimings, Takeover, Timings};
use crate::core::names::{ClusterName, MemberName};
use crate::core::records::{Durability, Tags};
use crate::core::storage::StoragePolicy;
use crate::core::view::Policy;

/// PostgreSQL's bound on the WAL that slots keep; pgvigil's unless the operator sets one.
const SLOT_BOUND: &str = "max_slot_wal_keep_size";
/// Longest path of a unix socket that the kernel takes (sun_path without its final zero).
const MAX_SOCKET_PATH: usize = 107;

pub(super) fn config(path: &Path, text: &str, environment: Environment<'_>) -> Result<Config, ConfigError> {
    let source = Source { file: path, text };
    let file: raw::File = toml::from_str(text).map_err(|error| source.toml(&error))?;
    let check = Check { source, environment };

    let cluster = check.required("cluster", file.cluster, r#"write `cluster = "…"`, the same on all members"#)?;
    let cluster = ClusterName::new(cluster).map_err(|e| check.error("cluster", e.to_string(), ""))?;
    let members = check.members(&file.members)?;
    let name = check.name(file.name, &members)?;
    let me = members.iter().find(|m| m.name == name).expect("`name` was found among the members").clone();

    let timings = check.timings(&file.lease)?;
    let takeover = check.takeover(&file.takeover, &timings)?;
    let durability = check.durability(file.durability.as_deref(), file.sync.k, members.len())?;
    let etcd = check.etcd(file.etcd, &timings)?;
    let policy = check.policy(
        timings,
        takeover,
        durability,
        &file.sync,
        &file.election,
        &file.crash,
        &file.rejoin,
        &file.storage,
        &file.cold_start,
        &file.member,
        &file.postgresql,
    )?;
    let state_dir =
        check.path("state_dir", check.variable("PGVIGIL_STATE_DIR").map(PathBuf::from).or(file.state_dir))?;
    let state_dir = state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/pgvigil"));
    let postgresql = check.postgresql(file.postgresql, &file.rejoin, &me)?;
    check.directories(&state_dir, &postgresql)?;
    let guardian = check.guardian(file.guardian, &state_dir)?;
    let api = check.api(file.api, &me)?;
    let endpoint = file.endpoint.map(|raw| check.endpoint_section(raw, &me)).transpose()?;
    if endpoint.is_some() {
        check.clients_show_a_password(&postgresql)?;
        check.socket("state_dir", &state_dir.join("endpoint.sock"))?;
    }
    let tags = check.tags(file.tags)?;
    let log = check.log(file.log)?;

    Ok(Config {
        path: path.to_owned(),
        cluster,
        name,
        state_dir,
        members,
        etcd,
        postgresql,
        policy,
        tags,
        api,
        guardian,
        endpoint,
        log,
    })
}

/// `[router]` and `[log]`; the rest of the file is the agent's and need not be there.
pub(super) fn router(path: &Path, text: &str, environment: Environment<'_>) -> Result<RouterConfig, ConfigError> {
    let source = Source { file: path, text };
    let file: raw::File = toml::from_str(text).map_err(|error| source.toml(&error))?;
    let check = Check { source, environment };
    let raw = check.required("router", file.router, "write a section [router] with the members' addresses")?;
    let remedy = r#"write `members = ["http://host:8008", …]`, the agents' addresses"#;
    let members = check.required("router.members", raw.members, remedy)?;
    if members.is_empty() {
        return Err(check.error("router.members", "is empty", remedy));
    }
    for (index, url) in members.iter().enumerate() {
        check.endpoint(&format!("router.members[{index}]"), url)?;
    }
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let name = raw.name.unwrap_or(host);
    if name.is_empty() || name.len() > 200 {
        return Err(check.error("router.name", format!("`{name}` has no use as a name"), "write 1 to 200 characters"));
    }
    let loopback = || vec!["127.0.0.1:5432".to_owned(), "[::1]:5432".to_owned()];
    let state_file = check.path("router.state_file", raw.state_file)?;
    let endpoint = check.front(
        "router",
        Front {
            listen: raw.listen.unwrap_or_else(loopback),
            listen_read_only: raw.listen_read_only.unwrap_or_default(),
            socket_dir: raw.socket_dir,
            failover_hold: raw.failover_hold,
            max_lag: raw.max_lag,
            read_only_fallback: raw.read_only_fallback,
            threads: raw.threads,
        },
    )?;
    Ok(RouterConfig {
        name,
        members: members.iter().map(|url| url.trim_end_matches('/').to_owned()).collect(),
        endpoint,
        state_file: Some(state_file.unwrap_or_else(|| PathBuf::from("/var/lib/pgvigil/route.json"))),
        log: check.log(file.log)?,
    })
}

/// What `[endpoint]` and `[router]` have in common.
struct Front {
    listen: Vec<String>,
    listen_read_only: Vec<String>,
    socket_dir: Option<PathBuf>,
    failover_hold: Option<Span>,
    max_lag: Option<Size>,
    read_only_fallback: Option<String>,
    threads: Option<usize>,
}

/// The member list and this member's name: what a command needs to find the cluster.
pub(super) fn contact(path: &Path, text: &str, environment: Environment<'_>) -> Result<Contact, ConfigError> {
    let source = Source { file: path, text };
    let file: raw::File = toml::from_str(text).map_err(|error| source.toml(&error))?;
    let check = Check { source, environment };
    let members = check.members(&file.members)?;
    let name = check.name(file.name, &members).ok();
    Ok(Contact { name, members, token_file: file.api.token_file })
}

struct Check<'a> {
    source: Source<'a>,
    environment: Environment<'a>,
}

impl Check<'_> {
    fn error(&self, field: &str, problem: impl Into<String>, remedy: impl Into<String>) -> ConfigError {
        self.source.field(field, problem, remedy)
    }

    fn required<T>(&self, field: &str, value: Option<T>, remedy: &str) -> Result<T, ConfigError> {
        value.ok_or_else(|| self.error(field, "is missing", remedy))
    }

    fn variable(&self, name: &str) -> Option<String> {
        (self.environment)(name)
    }

    /// Paths are absolute: an agent has no working directory that anybody would guess.
    fn path(&self, field: &str, path: Option<PathBuf>) -> Result<Option<PathBuf>, ConfigError> {
        match path {
            Some(path) if !path.is_absolute() => Err(self.error(
                field,
                format!("`{}` is a relative path", path.display()),
                "write the whole path, beginning with /",
            )),
            other => Ok(other),
        }
    }

    /// A duration within limits; the default counts when the file says nothing.
    fn span(
        &self,
        field: &str,
        value: Option<Span>,
        default: Duration,
        least: Duration,
        most: Duration,
    ) -> Result<Duration, ConfigError> {
        let value = value.map_or(default, |v| v.0);
        if value < least || value > most {
            let (least, most) = (show_duration(least), show_duration(most));
            return Err(self.error(
                field,
                format!("{} is outside {least} to {most}", show_duration(value)),
                format!("the default is {}", show_duration(default)),
            ));
        }
        Ok(value)
    }

    // --- who ---

    fn members(&self, raw: &[raw::Member]) -> Result<Vec<MemberAddress>, ConfigError> {
        if raw.is_empty() {
            return Err(self.error(
                "members",
                "is missing",
                "write one [[members]] section with name and host per member",
            ));
        }
        let mut members: Vec<MemberAddress> = Vec::with_capacity(raw.len());
        for (index, entry) in raw.iter().enumerate() {
            let field = |key: &str| format!("members[{index}].{key}");
            let name = self.required(&field("name"), entry.name.clone(), r#"write `name = "…"`"#)?;
            let name = MemberName::new(name).map_err(|e| self.error(&field("name"), e.to_string(), ""))?;
            let host =
                self.required(&field("host"), entry.host.clone(), "write the host name or IP address of this member")?;
            self.host(&field("host"), &host)?;
            let (port, api_port) = (entry.port.unwrap_or(5432), entry.api_port.unwrap_or(8008));
            for (key, value) in [("port", port), ("api_port", api_port)] {
                if value == 0 {
                    return Err(self.error(&field(key), "0 is not a port", "write 1 to 65535"));
                }
            }
            if port == api_port {
                return Err(self.error(
                    &field("api_port"),
                    format!("port and api_port of `{name}` are both {port}"),
                    "PostgreSQL and the agent need a port each",
                ));
            }
            for other in &members {
                if other.name == name {
                    return Err(self.error(
                        &field("name"),
                        format!("two members are called `{name}`"),
                        "give each member its own name",
                    ));
                }
                let taken = |port: u16| other.host == host && (other.port == port || other.api_port == port);
                for (key, value) in [("port", port), ("api_port", api_port)] {
                    if taken(value) {
                        return Err(self.error(
                            &field(key),
                            format!("`{}` and `{name}` both have the address {host}:{value}", other.name),
                            "give each member its own host or port",
                        ));
                    }
                }
            }
            members.push(MemberAddress { name, host, port, api_port });
        }
        Ok(members)
    }

    fn host(&self, field: &str, host: &str) -> Result<(), ConfigError> {
        if host.parse::<IpAddr>().is_ok() {
            return Ok(());
        }
        let remedy = "write a host name or an IP address alone; the ports are `port` and `api_port`";
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
        if host.is_empty() || !host.chars().all(plain) {
            return Err(self.error(field, format!("`{host}` is not a host"), remedy));
        }
        Ok(())
    }

    fn name(&self, raw: Option<String>, members: &[MemberAddress]) -> Result<MemberName, ConfigError> {
        let name = self.required(
            "name",
            self.variable("PGVIGIL_NAME").or(raw),
            "write `name = \"…\"`, or set PGVIGIL_NAME where all members share one file",
        )?;
        let name = MemberName::new(name).map_err(|e| self.error("name", e.to_string(), ""))?;
        if members.iter().any(|m| m.name == name) {
            return Ok(name);
        }
        let known: Vec<&str> = members.iter().map(|m| m.name.as_str()).collect();
        let remedy = match nearest(name.as_str(), known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("add it to [[members]], or take one of {}", known.join(", ")),
        };
        Err(self.error("name", format!("`{name}` is not among the members"), remedy))
    }

    // --- how ---

    fn timings(&self, raw: &raw::Lease) -> Result<Timings, ConfigError> {
        let or = |value: Option<Span>, default| value.map_or(Duration::from_millis(default), |v| v.0);
        let timings = Timings {
            heartbeat: or(raw.heartbeat, 1_000),
            ttl: or(raw.ttl, 8_000),
            kill_budget: or(raw.kill_budget, 1_000),
            renewal_timeout: or(raw.renewal_timeout, 2_000),
        };
        timings.validate().map_err(|error| self.invalid(&error))?;
        Ok(timings)
    }

    /// After the lease's: what counts as silence goes by the heartbeat.
    fn takeover(&self, raw: &raw::Takeover, timings: &Timings) -> Result<Takeover, ConfigError> {
        let (millis, defaults) = (Duration::from_millis, Takeover::default());
        // A slower heartbeat makes the default slower with it; what is written stands.
        let after = defaults.after.max(2 * timings.heartbeat).min(timings.candidate_wait(timings.ttl));
        let after = self.span("takeover.after", raw.after, after, millis(200), millis(300_000))?;
        let refused = defaults.after_refused.min(after);
        let after_refused =
            self.span("takeover.after_refused", raw.after_refused, refused, millis(50), millis(30_000))?;
        let takeover = Takeover { after, after_refused };
        takeover.validate(timings).map_err(|error| self.invalid(&error))?;
        Ok(takeover)
    }

    fn invalid(&self, error: &InvalidTimings) -> ConfigError {
        let field = error.field();
        // Its sentence begins with the field's name, which the error shows already.
        let text = error.to_string();
        let text = text.strip_prefix(field).map(|rest| rest.trim_start_matches([' ', '='])).unwrap_or(&text);
        self.error(field, text, "")
    }

    fn durability(&self, raw: Option<&str>, k: Option<u32>, members: usize) -> Result<(Durability, u32), ConfigError> {
        let durability = match raw {
            None | Some("sync") => Durability::Sync,
            Some("strict") => Durability::Strict,
            Some("async") => Durability::Async,
            Some(other) => {
                let meant = nearest(other, ["sync", "strict", "async"].into_iter()).map_or_else(
                    || r#"write "sync", "strict" or "async""#.to_owned(),
                    |near| format!("did you mean \"{near}\"?"),
                );
                return Err(self.error("durability", format!("`{other}` is not a kind of durability"), meant));
            }
        };
        let standbys = u32::try_from(members.saturating_sub(1)).unwrap_or(u32::MAX);
        // A cluster of one has nobody to wait for; who asks for more than there is gets an answer, not a surprise.
        let k = k.unwrap_or(1.min(standbys));
        match durability {
            Durability::Async => Ok((durability, k.min(standbys))),
            Durability::Sync | Durability::Strict => {
                if k > standbys {
                    return Err(self.error(
                        "sync.k",
                        format!(
                            "k = {k} acknowledgements are asked for, and {members} members leave {standbys} standbys"
                        ),
                        "take a k below the number of members, or add members",
                    ));
                }
                if k == 0 && standbys > 0 {
                    return Err(self.error(
                        "sync.k",
                        "0 acknowledgements are not sync",
                        r#"write `durability = "async"`"#,
                    ));
                }
                Ok((durability, k))
            }
        }
    }

    fn etcd(&self, raw: raw::Etcd, timings: &Timings) -> Result<EtcdConfig, ConfigError> {
        let from_environment = self
            .variable("PGVIGIL_ETCD_ENDPOINTS")
            .map(|list| list.split(',').map(|e| e.trim().to_owned()).filter(|e| !e.is_empty()).collect());
        let endpoints: Vec<String> = from_environment.or(raw.endpoints).unwrap_or_default();
        if endpoints.is_empty() {
            return Err(self.error(
                "etcd.endpoints",
                "is missing",
                r#"write `endpoints = ["http://host:2379", …]`, one per etcd member"#,
            ));
        }
        for (index, endpoint) in endpoints.iter().enumerate() {
            let field = format!("etcd.endpoints[{index}]");
            self.endpoint(&field, endpoint)?;
            if endpoints[..index].contains(endpoint) {
                return Err(self.error(
                    &field,
                    format!("`{endpoint}` stands there twice"),
                    "name each etcd member once",
                ));
            }
            let tls = endpoint.starts_with("https://");
            if !tls && raw.ca_file.is_some() {
                return Err(self.error(
                    &field,
                    format!("etcd.ca_file is set and `{endpoint}` is not encrypted"),
                    "write https://",
                ));
            }
        }
        for (field, file) in
            [("etcd.ca_file", &raw.ca_file), ("etcd.cert_file", &raw.cert_file), ("etcd.key_file", &raw.key_file)]
        {
            if let Some(file) = file {
                std::fs::metadata(file).map_err(|error| {
                    self.error(
                        field,
                        format!("read {}: {error}", file.display()),
                        "name a PEM file that the agent can read",
                    )
                })?;
            }
        }
        match (&raw.cert_file, &raw.key_file) {
            (Some(_), None) => {
                return Err(self.error(
                    "etcd.key_file",
                    "is missing beside etcd.cert_file",
                    "a client certificate needs both",
                ));
            }
            (None, Some(_)) => {
                return Err(self.error(
                    "etcd.cert_file",
                    "is missing beside etcd.key_file",
                    "a client certificate needs both",
                ));
            }
            _ => {}
        }
        let password = secrets::read(
            &self.source,
            self.environment,
            "etcd.password_file",
            "PGVIGIL_ETCD_PASSWORD",
            raw.password_file.as_deref(),
        )?;
        let user = match (raw.user, password) {
            (Some(user), Some(password)) => Some((user, password)),
            (Some(_), None) => {
                return Err(self.error(
                    "etcd.password_file",
                    "is missing beside etcd.user",
                    "name a file, or set PGVIGIL_ETCD_PASSWORD",
                ));
            }
            (None, Some(_)) => {
                return Err(self.error("etcd.user", "is missing beside the password", "write whose password it is"));
            }
            (None, None) => None,
        };
        let prefix = raw.prefix.unwrap_or_else(|| "/pgvigil".to_owned());
        if !prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains("//") {
            return Err(self.error(
                "etcd.prefix",
                format!("`{prefix}` is not a prefix"),
                "begin with /, end without one: \"/pgvigil\"",
            ));
        }
        let millis = Duration::from_millis;
        let try_timeout = self.span("etcd.try_timeout", raw.try_timeout, millis(700), millis(50), millis(30_000))?;
        if 2 * try_timeout > timings.renewal_timeout {
            return Err(self.error(
                "etcd.try_timeout",
                format!(
                    "2 * etcd.try_timeout = {} is more than lease.renewal_timeout = {}, so a renewal could not ask a second \
                     etcd member when the first one is silent",
                    show_duration(2 * try_timeout),
                    show_duration(timings.renewal_timeout)
                ),
                format!("lower etcd.try_timeout to {} or less", show_duration(timings.renewal_timeout / 2)),
            ));
        }
        Ok(EtcdConfig {
            endpoints,
            user,
            ca_file: raw.ca_file,
            cert_file: raw.cert_file,
            key_file: raw.key_file,
            try_timeout,
            prefix,
        })
    }

    fn endpoint(&self, field: &str, endpoint: &str) -> Result<(), ConfigError> {
        let remedy = r#"write it as "http://host:2379" or "https://host:2379""#;
        let wrong = |why: &str| Err(self.error(field, format!("`{endpoint}` {why}"), remedy));
        let Some(rest) = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://")) else {
            return wrong("does not begin with http:// or https://");
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let Some((host, port)) = rest.rsplit_once(':') else { return wrong("has no port") };
        if !port.parse::<u16>().is_ok_and(|p| p > 0) {
            return wrong("has no port number after its last colon");
        }
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        self.host(field, host)
    }

    #[allow(clippy::too_many_arguments, reason = "one per section of the file; each is a struct of its own")]
    fn policy(
        &self,
        timings: Timings,
        takeover: Takeover,
        (durability, k): (Durability, u32),
        sync: &raw::Sync,
        election: &raw::Election,
        crash: &raw::Crash,
        rejoin: &raw::Rejoin,
        storage: &raw::Storage,
        cold_start: &raw::ColdStart,
        member: &raw::MemberSection,
        postgresql: &raw::Postgresql,
    ) -> Result<Policy, ConfigError> {
        let seconds = Duration::from_secs;
        let millis = Duration::from_millis;
        let crash_failover = match crash.prefer.as_deref() {
            None | Some("failover") => true,
            Some("restart") => false,
            Some(other) => {
                return Err(self.error(
                    "crash.prefer",
                    format!("`{other}` is unknown"),
                    r#"write "failover" or "restart""#,
                ));
            }
        };
        let policy = Policy {
            timings,
            durability,
            k,
            max_stall: self.span("sync.max_stall", sync.max_stall, seconds(3), millis(200), seconds(300))?,
            max_lag: election.max_lag.map_or(1 << 20, |v| v.0),
            election_wait: self.span("election.wait", election.wait, millis(500), millis(50), seconds(30))?,
            election_give_up: self.span("election.give_up", election.give_up, seconds(3), millis(200), seconds(300))?,
            crash_failover,
            crash_max_restarts: crash.max_restarts.unwrap_or(3),
            crash_window: self.span("crash.window", crash.window, seconds(600), seconds(10), seconds(86_400))?,
            start_timeout: self.span(
                "postgresql.start_timeout",
                postgresql.start_timeout,
                seconds(300),
                seconds(5),
                seconds(86_400),
            )?,
            stop_timeout: self.span(
                "postgresql.stop_timeout",
                postgresql.stop_timeout,
                seconds(30),
                seconds(1),
                seconds(3_600),
            )?,
            member_publish: self.span("member.publish", member.publish, seconds(3), millis(200), seconds(60))?,
            reclone: rejoin.reclone.unwrap_or(true),
            cold_start_wait: self.span("cold_start.wait", cold_start.wait, seconds(60), seconds(0), seconds(86_400))?,
            rejoin_timeout: self.span("rejoin.timeout", rejoin.timeout, seconds(60), seconds(5), seconds(86_400))?,
            storage: StoragePolicy {
                stall_after: self.span(
                    "storage.stall_after",
                    storage.stall_after,
                    seconds(4),
                    millis(500),
                    seconds(300),
                )?,
                min_free: storage.min_free.map_or(64 << 20, |v| v.0),
                set_aside_budget: rejoin.set_aside_budget.map_or(20 << 30, |v| v.0),
                bound_slots: !postgresql.parameters.keys().any(|name| name.eq_ignore_ascii_case(SLOT_BOUND)),
            },
            takeover,
        };
        if policy.election_wait >= policy.election_give_up {
            return Err(self.error(
                "election.wait",
                format!(
                    "election.wait = {} is not below election.give_up = {}: every election would be given up before it chose",
                    show_duration(policy.election_wait),
                    show_duration(policy.election_give_up)
                ),
                "lower election.wait or raise election.give_up",
            ));
        }
        if policy.member_publish < policy.timings.heartbeat {
            return Err(self.error(
                "member.publish",
                format!(
                    "member.publish = {} is below lease.heartbeat = {}: members would write more often than the leader renews",
                    show_duration(policy.member_publish),
                    show_duration(policy.timings.heartbeat)
                ),
                "raise member.publish",
            ));
        }
        Ok(policy)
    }

    // --- what ---

    fn postgresql(
        &self,
        raw: raw::Postgresql,
        rejoin: &raw::Rejoin,
        me: &MemberAddress,
    ) -> Result<PostgresConfig, ConfigError> {
        let data_dir = self.variable("PGVIGIL_DATA_DIR").map(PathBuf::from).or(raw.data_dir);
        let data_dir = self.path("postgresql.data_dir", data_dir)?;
        let data_dir = self.required(
            "postgresql.data_dir",
            data_dir,
            "write where this member's data are, e.g. \"/var/lib/postgresql/15/pgvigil\"",
        )?;
        let bin_dir = self.path("postgresql.bin_dir", raw.bin_dir)?;
        let socket_dir =
            self.path("postgresql.socket_dir", raw.socket_dir)?.unwrap_or_else(|| PathBuf::from("/run/postgresql"));
        let port = raw.port.unwrap_or(me.port);
        if port != me.port {
            return Err(self.error(
                "postgresql.port",
                format!("postgresql.port = {port} and the port of `{}` in [[members]] = {}", me.name, me.port),
                "leave postgresql.port away: the member list says it",
            ));
        }
        self.socket("postgresql.socket_dir", &socket_dir.join(format!(".s.PGSQL.{port}")))?;
        let secret = |field: &str, variable: &str, file: Option<PathBuf>| {
            let found = secrets::read(&self.source, self.environment, field, variable, file.as_deref())?;
            self.required(field, found, &format!("name a file that holds the password, mode 0600, or set {variable}"))
        };
        let superuser_password =
            secret("postgresql.superuser_password_file", "PGVIGIL_SUPERUSER_PASSWORD", raw.superuser_password_file)?;
        let internal_password =
            secret("postgresql.internal_password_file", "PGVIGIL_INTERNAL_PASSWORD", raw.internal_password_file)?;
        for (index, option) in raw.initdb_options.iter().enumerate() {
            self.initdb_option(&format!("postgresql.initdb_options[{index}]"), option)?;
        }
        for (index, line) in raw.hba.iter().enumerate() {
            self.hba_line(&format!("postgresql.hba[{index}]"), line)?;
        }
        let text = |field: &str, value: Option<String>, default: &str| match value {
            Some(value) if value.trim().is_empty() || value.contains(['\n', '\'', '\0']) => Err(self.error(
                field,
                format!("`{}` cannot be used", value.escape_debug()),
                format!("the default is \"{default}\""),
            )),
            other => Ok(other.unwrap_or_else(|| default.to_owned())),
        };
        Ok(PostgresConfig {
            data_dir,
            bin_dir,
            os_user: text("postgresql.os_user", raw.os_user, "postgres")?,
            listen: text("postgresql.listen", raw.listen, "*")?,
            port,
            socket_dir,
            superuser: text("postgresql.superuser", raw.superuser, "postgres")?,
            superuser_password,
            internal_password,
            parameters: self.parameters(raw.parameters)?,
            hba: raw.hba,
            set_aside_budget: rejoin.set_aside_budget.map_or(20 << 30, |v| v.0),
            initdb_options: raw.initdb_options,
        })
    }

    fn parameters(&self, raw: BTreeMap<String, toml::Value>) -> Result<BTreeMap<String, String>, ConfigError> {
        let mut parameters = BTreeMap::new();
        for (name, value) in raw {
            let field = format!("postgresql.parameters.{name}");
            if let Some(remedy) = keys::owned_parameter(&name) {
                return Err(self.error(&field, format!("`{name}` is pgvigil's to set"), remedy));
            }
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
            if name.is_empty() || !name.chars().all(plain) {
                return Err(self.error(
                    &field,
                    format!("`{name}` is not a parameter of PostgreSQL"),
                    "take its name from pg_settings",
                ));
            }
            let value = self.scalar(&field, value)?;
            if value.contains(['\n', '\r', '\0']) {
                return Err(self.error(&field, "has more than one line", "PostgreSQL takes one line"));
            }
            let name = name.to_ascii_lowercase();
            let restricted = keys::RESTRICTED_PARAMETERS.iter().find(|(restricted, _)| *restricted == name);
            if let Some((_, allowed)) = restricted.filter(|(_, allowed)| !allowed.contains(&value.as_str())) {
                let allowed = allowed.join(" or ");
                return Err(self.error(
                    &field,
                    format!("`{value}` breaks what the cluster promises"),
                    format!("write {allowed}"),
                ));
            }
            parameters.insert(name, value);
        }
        Ok(parameters)
    }

    fn scalar(&self, field: &str, value: toml::Value) -> Result<String, ConfigError> {
        match value {
            toml::Value::String(text) => Ok(text),
            toml::Value::Integer(number) => Ok(number.to_string()),
            toml::Value::Float(number) => Ok(number.to_string()),
            toml::Value::Boolean(yes) => Ok(if yes { "on" } else { "off" }.to_owned()),
            toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => Err(self.error(
                field,
                format!("{} is not a value", if value.is_array() { "an array" } else { "this kind of TOML value" }),
                "write a string, a number or true/false",
            )),
        }
    }

    fn initdb_option(&self, field: &str, option: &str) -> Result<(), ConfigError> {
        const OURS: [&str; 13] = [
            "-D",
            "--pgdata",
            "-X",
            "--waldir",
            "-U",
            "--username",
            "-W",
            "--pwprompt",
            "--pwfile",
            "-A",
            "--auth",
            "-S",
            "-s",
        ];
        let name = option.split('=').next().unwrap_or(option);
        let ours = OURS
            .iter()
            .find(|o| **o == name || (!o.starts_with("--") && option.starts_with(*o)) || (name.starts_with("--auth")));
        if ours.is_some()
            || name == "--sync-only"
            || name == "--no-data-checksums"
            || name == "--no-sync"
            || name == "-N"
        {
            return Err(self.error(
                field,
                format!("`{option}` is pgvigil's to set"),
                "leave it away; locale, encoding and the like may be given, e.g. \"--locale=C.UTF-8\"",
            ));
        }
        if !option.starts_with('-') {
            return Err(self.error(
                field,
                format!("`{option}` is not an option"),
                "write option and value as one: \"--encoding=UTF8\"",
            ));
        }
        Ok(())
    }

    fn hba_line(&self, field: &str, line: &str) -> Result<(), ConfigError> {
        const KINDS: [&str; 6] = ["local", "host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc"];
        let remedy = r#"write a line of pg_hba.conf, e.g. "host all all 10.0.0.0/8 scram-sha-256""#;
        let mut words = line.split_whitespace();
        let kind = words.next().unwrap_or("");
        if line.contains(['\n', '\r']) || !KINDS.contains(&kind) {
            return Err(self.error(field, format!("`{}` is not a line of pg_hba.conf", line.escape_debug()), remedy));
        }
        let least = if kind == "local" { 3 } else { 4 };
        if words.count() < least {
            return Err(self.error(field, format!("`{line}` has too few columns"), remedy));
        }
        Ok(())
    }

    fn directories(&self, state_dir: &Path, postgresql: &PostgresConfig) -> Result<(), ConfigError> {
        let data = &postgresql.data_dir;
        if state_dir.starts_with(data) {
            return Err(self.error(
                "state_dir",
                format!("{} is inside postgresql.data_dir = {}", state_dir.display(), data.display()),
                "take a directory outside it: what is remembered must survive the loss of the data",
            ));
        }
        if postgresql.socket_dir.starts_with(data) {
            return Err(self.error(
                "postgresql.socket_dir",
                format!("{} is inside postgresql.data_dir = {}", postgresql.socket_dir.display(), data.display()),
                "take a directory outside it: the data directory is renamed and cloned as a whole",
            ));
        }
        Ok(())
    }

    fn guardian(&self, raw: raw::Guardian, state_dir: &Path) -> Result<GuardianConfig, ConfigError> {
        let socket = self.path("guardian.socket", raw.socket)?.unwrap_or_else(|| state_dir.join("guardian.sock"));
        self.socket("guardian.socket", &socket)?;
        let real_time_priority = raw.real_time_priority.unwrap_or(10);
        if real_time_priority > 99 {
            return Err(self.error(
                "guardian.real_time_priority",
                format!("{real_time_priority} is outside 0 to 99"),
                "0 asks for no real-time priority; the default is 10",
            ));
        }
        Ok(GuardianConfig { socket, real_time_priority })
    }

    fn endpoint_section(&self, raw: raw::Endpoint, me: &MemberAddress) -> Result<EndpointConfig, ConfigError> {
        let mut endpoint = self.front(
            "endpoint",
            Front {
                listen: raw.listen.unwrap_or_else(|| vec!["*:6432".to_owned()]),
                listen_read_only: raw.listen_read_only.unwrap_or_else(|| vec!["*:6433".to_owned()]),
                socket_dir: raw.socket_dir,
                failover_hold: raw.failover_hold,
                max_lag: raw.max_lag,
                read_only_fallback: raw.read_only_fallback,
                threads: raw.threads,
            },
        )?;
        endpoint.direct = raw.direct.unwrap_or(false);
        for (index, text) in raw.proxies.unwrap_or_default().iter().enumerate() {
            endpoint.proxies.push(self.network(&format!("endpoint.proxies[{index}]"), text)?);
        }
        // Members are told one port for each; the first address counts.
        for (field, listen) in
            [("endpoint.listen", &endpoint.listen), ("endpoint.listen_read_only", &endpoint.listen_read_only)]
        {
            for port in listen.iter().map(|listen| listen.port()) {
                let taken = [(me.port, "PostgreSQL"), (me.api_port, "the agent")];
                let everywhere = |listen: &&Listen| matches!(listen, Listen::Everywhere(p) if *p == port);
                if let Some((_, whose)) =
                    taken.iter().find(|(taken, _)| *taken == port && listen.iter().any(|l| everywhere(&l)))
                {
                    return Err(self.error(
                        field,
                        format!("port {port} is {whose}'s on every address (`{}` in [[members]])", me.name),
                        "take another port, or one address: \"127.0.0.1:5432\"",
                    ));
                }
            }
        }
        Ok(endpoint)
    }

    fn front(&self, section: &str, raw: Front) -> Result<EndpointConfig, ConfigError> {
        let field = |key: &str| format!("{section}.{key}");
        let listens = |key: &str, texts: &[String]| -> Result<Vec<Listen>, ConfigError> {
            texts.iter().enumerate().map(|(i, text)| self.listen(&format!("{section}.{key}[{i}]"), text)).collect()
        };
        let listen = listens("listen", &raw.listen)?;
        let listen_read_only = listens("listen_read_only", &raw.listen_read_only)?;
        if listen.is_empty() {
            return Err(self.error(&field("listen"), "is empty", r#"write at least one address: ["*:6432"]"#));
        }
        for (index, one) in listen_read_only.iter().enumerate() {
            if listen.contains(one) {
                return Err(self.error(
                    &format!("{section}.listen_read_only[{index}]"),
                    format!("{section}.listen has the same address and port"),
                    "take another port for readers",
                ));
            }
        }
        let socket_dir = self.path(&field("socket_dir"), raw.socket_dir)?;
        if let Some(directory) = &socket_dir {
            for one in listen.iter().chain(&listen_read_only) {
                self.socket(&field("socket_dir"), &directory.join(format!(".s.PGSQL.{}", one.port())))?;
            }
        }
        let read_only_fallback = match raw.read_only_fallback.as_deref() {
            None | Some("primary") => true,
            Some("refuse") => false,
            Some(other) => {
                let problem = format!("`{other}` is unknown");
                return Err(self.error(&field("read_only_fallback"), problem, r#"write "primary" or "refuse""#));
            }
        };
        let threads = raw.threads.unwrap_or(1);
        if !(1..=64).contains(&threads) {
            return Err(self.error(&field("threads"), format!("{threads} is outside 1 to 64"), "the default is 1"));
        }
        let seconds = Duration::from_secs;
        Ok(EndpointConfig {
            listen,
            listen_read_only,
            socket_dir,
            direct: false,
            failover_hold: self.span(
                &field("failover_hold"),
                raw.failover_hold,
                seconds(30),
                Duration::ZERO,
                seconds(3_600),
            )?,
            max_lag: raw.max_lag.map_or(16 << 20, |size| size.0),
            read_only_fallback,
            threads,
            proxies: Vec::new(),
        })
    }

    fn listen(&self, field: &str, text: &str) -> Result<Listen, ConfigError> {
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        let listen = match text.strip_prefix("*:") {
            Some(rest) => port(rest).map(Listen::Everywhere),
            None => text.parse::<SocketAddr>().ok().filter(|address| address.port() > 0).map(Listen::At),
        };
        listen.ok_or_else(|| {
            self.error(
                field,
                format!("`{text}` is not an address with a port"),
                r#"write "*:6432" for every address, or "10.0.0.1:6432", or "[fd00::1]:6432""#,
            )
        })
    }

    fn network(&self, field: &str, text: &str) -> Result<Network, ConfigError> {
        let (address, prefix) = text.split_once('/').unzip();
        let address = address.unwrap_or(text).parse::<IpAddr>().ok();
        let network = address.and_then(|address| {
            let longest = if address.is_ipv4() { 32 } else { 128 };
            let prefix = prefix.map_or(Some(longest), |text| text.parse().ok())?;
            (prefix <= longest).then_some(Network { address, prefix })
        });
        network.ok_or_else(|| {
            self.error(field, format!("`{text}` is not a network"), r#"write an address or "10.0.0.0/8""#)
        })
    }

    /// The endpoint's clients come over PostgreSQL's unix socket, so a line that lets in without a password whoever is on
    /// this host would let in everybody.
    fn clients_show_a_password(&self, postgresql: &PostgresConfig) -> Result<(), ConfigError> {
        for (index, line) in postgresql.hba.iter().enumerate() {
            let mut words = line.split_whitespace();
            let local = words.next() == Some("local");
            let method = words.nth(2).unwrap_or_default();
            if local && !matches!(method, "scram-sha-256" | "reject") {
                return Err(self.error(
                    &format!("postgresql.hba[{index}]"),
                    format!("`{line}` lets in by `{method}`, and the endpoint's clients come over the same socket"),
                    "write scram-sha-256 or reject, or leave the line away: pgvigil's own let this host in by password",
                ));
            }
        }
        Ok(())
    }

    fn socket(&self, field: &str, path: &Path) -> Result<(), ConfigError> {
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(self.error(
                field,
                format!(
                    "the socket {} has {length} characters, and Unix sockets take {MAX_SOCKET_PATH}",
                    path.display()
                ),
                "take a shorter path",
            ));
        }
        Ok(())
    }

    fn api(&self, raw: raw::Api, me: &MemberAddress) -> Result<ApiConfig, ConfigError> {
        let listen = match self.variable("PGVIGIL_API_LISTEN").or(raw.listen) {
            None => SocketAddr::from((Ipv4Addr::UNSPECIFIED, me.api_port)),
            Some(text) => text.parse::<SocketAddr>().map_err(|_| {
                self.error(
                    "api.listen",
                    format!("`{text}` is not an address with a port"),
                    format!("write an IP address and a port: \"0.0.0.0:{}\" or \"[::]:{}\"", me.api_port, me.api_port),
                )
            })?,
        };
        if listen.port() != me.api_port {
            return Err(self.error(
                "api.listen",
                format!(
                    "the port of api.listen = {} and api_port of `{}` in [[members]] = {}",
                    listen.port(),
                    me.name,
                    me.api_port
                ),
                "write the same port in both, or leave api.listen away",
            ));
        }
        let token = secrets::read(
            &self.source,
            self.environment,
            "api.token_file",
            "PGVIGIL_API_TOKEN",
            raw.token_file.as_deref(),
        )?;
        let max_connections = raw.max_connections.unwrap_or(256);
        if !(8..=65_536).contains(&max_connections) {
            return Err(self.error(
                "api.max_connections",
                format!("{max_connections} is outside 8 to 65536"),
                "the default is 256",
            ));
        }
        let header_timeout = self.span(
            "api.header_timeout",
            raw.header_timeout,
            Duration::from_secs(5),
            Duration::from_millis(100),
            Duration::from_secs(60),
        )?;
        Ok(ApiConfig { listen, token, max_connections, header_timeout })
    }

    fn tags(&self, raw: raw::Tags) -> Result<Tags, ConfigError> {
        let mut custom = BTreeMap::new();
        for (name, value) in raw.custom {
            let field = format!("tags.custom.{name}");
            let value = match value {
                // Health checks compare with `?tag_x=true`: TOML's words, not PostgreSQL's.
                toml::Value::Boolean(yes) => yes.to_string(),
                other => self.scalar(&field, other)?,
            };
            custom.insert(name, value);
        }
        let defaults = Tags::default();
        Ok(Tags {
            nofailover: raw.nofailover.unwrap_or(defaults.nofailover),
            failover_priority: raw.failover_priority.unwrap_or(defaults.failover_priority),
            noloadbalance: raw.noloadbalance.unwrap_or(defaults.noloadbalance),
            nosync: raw.nosync.unwrap_or(defaults.nosync),
            custom,
        })
    }

    fn log(&self, raw: raw::Log) -> Result<LogConfig, ConfigError> {
        const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];
        let level = self.variable("PGVIGIL_LOG_LEVEL").or(raw.level).unwrap_or_else(|| "info".to_owned());
        // Filters (`info,pgvigil::dcs=debug`) are taken as they are; a lone word must be a level.
        if level.chars().all(|c| c.is_ascii_alphabetic()) && !LEVELS.contains(&level.as_str()) {
            let remedy = nearest(&level, LEVELS.into_iter()).map_or_else(
                || format!("write one of {}", LEVELS.join(", ")),
                |near| format!("did you mean \"{near}\"?"),
            );
            return Err(self.error("log.level", format!("`{level}` is not a level"), remedy));
        }
        let json = match self.variable("PGVIGIL_LOG_FORMAT").or(raw.format).as_deref() {
            None | Some("text") => false,
            Some("json") => true,
            Some(other) => {
                return Err(self.error("log.format", format!("`{other}` is unknown"), r#"write "text" or "json""#));
            }
        };
        Ok(LogConfig { level, json })
    }
}
