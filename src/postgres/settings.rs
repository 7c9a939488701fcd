//! PostgreSQL's settings: which ones pgvigil owns, where each stands so that nothing outranks it, and how they are written.
//!
//! Three places, weakest first (PostgreSQL lets a later one win):
//!   postgresql.conf       in the state directory: base values, then the operator's
//!   pgvigil.dynamic.conf  included last: whom to follow, whom to wait for. Changed by reload
//!   command line          what no ALTER SYSTEM and no file may change
//! `postgresql.auto.conf` in PGDATA outranks both files, so owned names are taken out of it before each start and each write.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::Config;
use crate::core::plan::{Follow, SyncRule, parse_walreceiver_name};
use crate::core::storage::slot_bound;
use crate::core::timeline::{Term, TimelineId};
use crate::core::{names::MemberName, plan::Source};

use super::controldata::{ControlFile, FLOORS};
use super::layout::Layout;

/// Set on the command line at each start.
const STATIC: &[&str] = &[
    "cluster_name",
    "config_file",
    "data_directory",
    "fsync",
    "full_page_writes",
    "hba_file",
    "hot_standby",
    "ident_file",
    "listen_addresses",
    "port",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restart_after_crash",
    "unix_socket_directories",
    "wal_log_hints",
];

/// In the dynamic file. `promote_trigger_file` (gone in 16) is here to be refused: it promotes without a term.
const DYNAMIC: &[&str] = &[
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "restore_command",
    "synchronous_standby_names",
    "wal_retrieve_retry_interval",
];

/// Names that an operator's configuration may not set.
pub fn owned_parameters() -> impl Iterator<Item = &'static str> {
    STATIC.iter().chain(DYNAMIC).copied()
}

/// One sentence when the operator's parameters cannot be taken.
pub fn check_parameters(parameters: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in parameters {
        let name = name.to_ascii_lowercase();
        if let Some(owned) = owned_parameters().find(|owned| *owned == name) {
            return Err(format!("postgresql.parameters.{owned} is set by pgvigil: remove it"));
        }
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c)) || name.is_empty() {
            return Err(format!("postgresql.parameters: `{name}` is not the name of a setting"));
        }
        if value.contains(['\n', '\r', '\0']) {
            return Err(format!("postgresql.parameters.{name}: a value has no line breaks"));
        }
        let allowed: &[&str] = match name.as_str() {
            "synchronous_commit" => &["on", "remote_apply"],
            "wal_level" => &["replica", "logical"],
            "zero_damaged_pages" | "ignore_checksum_failure" => &["off"],
            _ => continue,
        };
        if !allowed.contains(&value.as_str()) {
            return Err(format!("postgresql.parameters.{name} = {value}: only {} is safe here", allowed.join(" or ")));
        }
    }
    Ok(())
}

/// Values under which a cluster works out of the box; the operator's own come after them.
fn base(config: &Config, layout: &Layout, major: u32, free_for_wal: Option<u64>) -> Vec<(&'static str, String)> {
    let senders = (config.members.len() * 2 + 6).max(10).to_string();
    let mut base: Vec<(&'static str, String)> = vec![
        ("max_connections", "100".into()),
        ("shared_buffers", "128MB".into()),
        ("dynamic_shared_memory_type", "posix".into()),
        ("wal_level", "replica".into()),
        // Each follower uses one, a clone two, each agent one to ask for the timeline.
        ("max_wal_senders", senders.clone()),
        ("max_replication_slots", senders),
        ("wal_keep_size", "128MB".into()),
        // A member that stays away must not fill the disk of the one that works; it is cloned again instead.
        ("max_slot_wal_keep_size", free_for_wal.map_or("8GB".into(), |free| format!("{}MB", slot_bound(free) >> 20))),
        ("max_wal_size", "1GB".into()),
        ("min_wal_size", "80MB".into()),
        ("password_encryption", "scram-sha-256".into()),
        ("max_standby_archive_delay", "30s".into()),
        ("max_standby_streaming_delay", "30s".into()),
        ("hot_standby_feedback", "off".into()),
        // A standby reports at least each second: the primary tells a silent one from an idle one.
        ("wal_receiver_status_interval", "1s".into()),
        ("wal_receiver_timeout", "5s".into()),
        ("wal_sender_timeout", "5s".into()),
        ("tcp_keepalives_idle", "5".into()),
        ("tcp_keepalives_interval", "1".into()),
        ("tcp_keepalives_count", "4".into()),
        ("log_destination", "stderr".into()),
        ("logging_collector", "on".into()),
        ("log_directory", layout.log_dir.display().to_string()),
        ("log_filename", "postgresql-%a.log".into()),
        ("log_truncate_on_rotation", "on".into()),
        ("log_rotation_age", "1d".into()),
        ("log_line_prefix", "%m [%p] %q%u@%d %a ".into()),
        ("log_timezone", "Etc/UTC".into()),
        ("timezone", "Etc/UTC".into()),
        ("lc_messages", "C".into()),
        ("default_text_search_config", "pg_catalog.english".into()),
    ];
    if major >= 16 {
        // Clients may fill the server; the agent still has to get in. Its role holds pg_use_reserved_connections.
        base.push(("reserved_connections", "5".into()));
    }
    if major >= 17 {
        // ALTER SYSTEM is the way by which a session could change the set behind the agent's back.
        base.push(("allow_alter_system", "off".into()));
    }
    base
}

pub fn main_file(config: &Config, layout: &Layout, major: u32, free_for_wal: Option<u64>) -> String {
    let mut text = String::from(
        "# Written by pgvigil at each start and reload; changes here are lost.\n\
         # Settings belong into postgresql.parameters of pgvigil's configuration.\n\n",
    );
    for (name, value) in base(config, layout, major, free_for_wal) {
        text.push_str(&line(name, &value));
    }
    text.push_str("\n# postgresql.parameters\n");
    for (name, value) in config.postgresql.parameters.iter().filter(|(name, _)| *name != "synchronous_commit") {
        text.push_str(&line(name, value));
    }
    text.push_str("\n# Owned by pgvigil, last so that it wins.\n");
    text.push_str(&format!("include = {}\n", quote(&layout.dynamic_file.display().to_string())));
    text
}

/// `-c name=value` for everything that nothing else may change.
pub fn command_line(config: &Config, layout: &Layout, major: u32, timeline: &str) -> Vec<(&'static str, String)> {
    let postgresql = &config.postgresql;
    let synchronous_commit = postgresql.parameters.get("synchronous_commit").map_or("on", String::as_str);
    let mut all: Vec<(&'static str, String)> = vec![
        ("config_file", layout.main_file.display().to_string()),
        ("hba_file", layout.hba_file.display().to_string()),
        ("ident_file", layout.ident_file.display().to_string()),
        ("listen_addresses", postgresql.listen.clone()),
        ("port", postgresql.port.to_string()),
        ("unix_socket_directories", postgresql.socket_dir.display().to_string()),
        ("cluster_name", format!("{}/{}", config.cluster, config.name)),
        // S8: after a crash of one backend PostgreSQL would restart itself and free the commits that wait.
        ("restart_after_crash", "off".into()),
        ("fsync", "on".into()),
        ("full_page_writes", "on".into()),
        ("synchronous_commit", synchronous_commit.into()),
        // Without it a standby cannot be connected to, so it could not be sealed.
        ("hot_standby", "on".into()),
        // pg_rewind works although checksums may be off in an adopted directory.
        ("wal_log_hints", "on".into()),
        // S8: nothing but a promotion ends recovery.
        ("recovery_target", String::new()),
        ("recovery_target_name", String::new()),
        ("recovery_target_time", String::new()),
        ("recovery_target_xid", String::new()),
        ("recovery_target_lsn", String::new()),
        ("recovery_target_timeline", timeline.to_owned()),
    ];
    if major <= 15 {
        all.push(("promote_trigger_file", String::new()));
    }
    all
}

/// The settings of which a standby must not have less than its primary had, where the configuration says less: every
/// start is one as a standby, so a lowered value would keep the whole cluster down. (name, configured, needed)
pub fn raised(config: &Config, layout: &Layout, major: u32, control: &ControlFile) -> Vec<(&'static str, i32, i32)> {
    let base = base(config, layout, major, None);
    let configured = |name: &str| {
        let operator = config.postgresql.parameters.get(name).map(String::as_str);
        let ours = base.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
        // PostgreSQL's own defaults for what neither says.
        let default = match name {
            "max_worker_processes" => 8,
            "max_locks_per_transaction" => 64,
            _ => 0,
        };
        operator.or(ours).map_or(Some(default), |value| value.trim().parse::<i32>().ok())
    };
    let needed = FLOORS.iter().zip(control.floors);
    needed
        .filter_map(|(name, needed)| Some((*name, configured(name)?, needed)))
        .filter(|(_, has, needed)| has < needed)
        .collect()
}

/// What the dynamic file says. Written whole each time, so it needs no reading back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dynamic {
    pub conninfo: String,
    pub slot: String,
    pub rule: SyncRule,
    /// While sealed: replay waits for nobody's query and for no delay.
    pub hurry: bool,
}

impl Dynamic {
    pub fn alone(rule: SyncRule) -> Dynamic {
        Dynamic { conninfo: String::new(), slot: String::new(), rule, hurry: false }
    }

    pub fn following(follow: &Follow, layout: &Layout) -> Dynamic {
        let conninfo = conninfo(follow, layout);
        Dynamic { conninfo, slot: follow.slot.clone(), rule: SyncRule::Nobody, hurry: false }
    }

    pub fn file(&self) -> String {
        let mut text =
            String::from("# Written by pgvigil whenever the leader or the sync set changes; changes here are lost.\n");
        text.push_str(&line("primary_conninfo", &self.conninfo));
        text.push_str(&line("primary_slot_name", &self.slot));
        text.push_str(&line("restore_command", ""));
        text.push_str(&line("synchronous_standby_names", &self.rule.to_string()));
        // A follower tries again soon. One that follows nobody sleeps long: each wake-up looks for new history files, and
        // one planted for a promotion must not be taken for a timeline to follow. A new primary_conninfo ends the sleep.
        let interval = if self.conninfo.is_empty() { "5s" } else { "100ms" };
        text.push_str(&line("wal_retrieve_retry_interval", interval));
        if self.hurry {
            text.push_str(&line("recovery_min_apply_delay", "0"));
            text.push_str(&line("max_standby_archive_delay", "0"));
            text.push_str(&line("max_standby_streaming_delay", "0"));
        }
        text
    }
}

/// Passwords stay in the passfile: primary_conninfo is shown by views and written to logs.
pub fn conninfo(follow: &Follow, layout: &Layout) -> String {
    let port = follow.upstream.port.to_string();
    let passfile = layout.passfile.display().to_string();
    let pairs = [
        ("host", follow.upstream.host.as_str()),
        ("port", &port),
        ("user", super::roles::REPLICATION),
        ("application_name", &follow.walreceiver),
        // libpq ignores it beside application_name; here it remembers which member the address belongs to.
        ("fallback_application_name", follow.upstream.member.as_str()),
        ("passfile", &passfile),
        ("connect_timeout", "3"),
        ("keepalives_idle", "5"),
        ("keepalives_interval", "1"),
        ("keepalives_count", "4"),
        // Bounds the connect too, which the walreceiver's own timeout does not.
        ("tcp_user_timeout", "5000"),
    ];
    connection_string(&pairs)
}

pub fn connection_string(pairs: &[(&str, &str)]) -> String {
    let quoted = |value: &str| value.replace('\\', "\\\\").replace('\'', "\\'");
    let parts: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}='{}'", quoted(value))).collect();
    parts.join(" ")
}

/// Reads a running server's primary_conninfo back; `None`: it follows nobody.
///
/// A conninfo that is not ours is still somebody who is followed: it comes back with term 0 and its own name, which equals
/// no order, so it is replaced.
pub fn parse_follow(conninfo: &str, slot: &str, config: &Config) -> Option<Follow> {
    let pairs = parse_connection_string(conninfo);
    let get = |key: &str| pairs.get(key).cloned().unwrap_or_default();
    let host = get("host");
    if host.is_empty() && get("hostaddr").is_empty() {
        return None;
    }
    let port = get("port").parse().unwrap_or(5432);
    let named = MemberName::new(get("fallback_application_name")).ok();
    let by_address = || config.members.iter().find(|m| m.host == host && m.port == port).map(|m| m.name.clone());
    let member = named.or_else(by_address).or_else(|| MemberName::new("unknown").ok())?;
    let walreceiver = get("application_name");
    let term = parse_walreceiver_name(&walreceiver).map_or(Term(0), |(_, term)| term);
    Some(Follow { upstream: Source { member, host, port }, slot: slot.to_owned(), walreceiver, term })
}

fn parse_connection_string(text: &str) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    let mut rest = text.chars().peekable();
    loop {
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        let mut key = String::new();
        while let Some(c) = rest.next_if(|c| *c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        if rest.next_if_eq(&'=').is_none() {
            return pairs;
        }
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = rest.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        while let Some(c) = rest.next_if(|c| if quoted { *c != '\'' } else { !c.is_whitespace() }) {
            match c {
                '\\' => value.extend(rest.next()),
                other => value.push(other),
            }
        }
        if quoted {
            rest.next();
        }
        pairs.insert(key, value);
    }
}

fn line(name: &str, value: &str) -> String {
    format!("{name} = {}\n", quote(value))
}

/// A value of PostgreSQL's configuration files: quotes are doubled, and backslashes too, for they escape there.
fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// The lines of postgresql.auto.conf without names that pgvigil owns, and the names that were taken out.
pub fn strip_owned(auto_conf: &str) -> (String, Vec<String>) {
    let mut kept = String::new();
    let mut taken = Vec::new();
    for text in auto_conf.lines() {
        match setting_name(text) {
            Some(name) if owned_parameters().any(|owned| owned == name) => taken.push(name),
            _ => {
                kept.push_str(text);
                kept.push('\n');
            }
        }
    }
    (kept, taken)
}

/// Names of recovery targets (other than the timeline) that postgresql.auto.conf still asks for: a restore that was not
/// finished, and something that would end recovery by itself (S8).
pub fn leftover_targets(auto_conf: &str) -> Vec<String> {
    let is_set = |text: &&str| {
        let value = text.split_once('=').map_or("", |(_, value)| value.trim());
        !matches!(value, "" | "''")
    };
    let named = auto_conf.lines().filter(is_set).filter_map(setting_name);
    named.filter(|name| name.starts_with("recovery_target") && name != "recovery_target_timeline").collect()
}

fn setting_name(line: &str) -> Option<String> {
    let line = line.trim_start();
    let name: String = line.chars().take_while(|c| c.is_ascii_alphanumeric() || "_.".contains(*c)).collect();
    (!name.is_empty()).then(|| name.to_ascii_lowercase())
}

/// `server_version_num` or PG_VERSION to what the tables here are keyed by.
pub fn major(version_num: u32) -> u32 {
    version_num / 10_000
}

pub const SUPPORTED: std::ops::RangeInclusive<u32> = 14..=18;

/// How recovery_target_timeline is given for a timeline that has to be named.
pub fn timeline_target(timeline: TimelineId) -> String {
    timeline.0.to_string()
}

/// Settings whose running value has to come from our own places, as an SQL list.
pub fn owned_as_sql_list() -> String {
    let names: Vec<String> = owned_parameters().map(|name| format!("'{name}'")).collect();
    names.join(", ")
}

/// True when a running value comes from our files.
pub fn is_ours(source_file: &str, layout: &Layout) -> bool {
    !source_file.is_empty() && Path::new(source_file).starts_with(&layout.directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_names_are_taken_out_of_auto_conf_and_nothing_else() {
        let auto = "# Do not edit\nwork_mem = '8MB'\nprimary_conninfo = 'host=x'\n Synchronous_Standby_Names = ''\n";
        let (kept, taken) = strip_owned(auto);
        assert_eq!(kept, "# Do not edit\nwork_mem = '8MB'\n");
        assert_eq!(taken, ["primary_conninfo", "synchronous_standby_names"]);
    }

    #[test]
    fn leftover_recovery_targets_are_found() {
        let auto = "recovery_target_time = '2024-01-01'\nrecovery_target_xid = ''\nrecovery_target_timeline = '3'\n";
        assert_eq!(leftover_targets(auto), ["recovery_target_time"]);
    }

    #[test]
    fn connection_strings_read_back() {
        let text = connection_string(&[("host", "a b"), ("passfile", r"/it's\here"), ("port", "5432")]);
        let pairs = parse_connection_string(&text);
        assert_eq!(pairs["host"], "a b");
        assert_eq!(pairs["passfile"], r"/it's\here");
        assert_eq!(parse_connection_string("host = x  port=1")["port"], "1");
        assert!(parse_connection_string("").is_empty());
    }

    #[test]
    fn unsafe_parameters_are_refused() {
        let check = |name: &str, value: &str| check_parameters(&BTreeMap::from([(name.to_owned(), value.to_owned())]));
        for (name, value) in [
            ("fsync", "off"),
            ("Primary_Conninfo", "x"),
            ("synchronous_commit", "off"),
            ("wal_level", "minimal"),
            ("work_mem", "1\n2"),
            ("a b", "1"),
        ] {
            assert!(check(name, value).is_err(), "{name}");
        }
        assert!(check("work_mem", "8MB").is_ok());
        assert!(check("synchronous_commit", "remote_apply").is_ok());
    }
}
