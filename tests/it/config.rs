//! The configuration file: what is taken, what is refused, and in which words.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgvigil::config::access::{AccessMethod, AccessRule};
use pgvigil::config::keys::{Fallback, KEYS, OWNED_PARAMETERS, VARIABLES};
use pgvigil::config::{Config, ConfigError};
use pgvigil::core::records::Durability;

const SAMPLE: &str = include_str!("../../docs/pgvigil.sample.toml");
const TABLE: &str = include_str!("../../docs/CONFIGURATION.md");

/// The least that has to be written; `{more}` goes where it says.
const LEAST: &str = r#"
cluster = "maas"
name = "node-a"
[[members]]
name = "node-a"
host = "10.0.0.1"
[[members]]
name = "node-b"
host = "10.0.0.2"
[etcd]
endpoints = ["http://127.0.0.1:2379"]
[postgresql]
data_dir = "/var/lib/postgresql/15/pgvigil"
"#;

fn secrets(name: &str) -> Option<String> {
    matches!(name, "PGVIGIL_SUPERUSER_PASSWORD" | "PGVIGIL_INTERNAL_PASSWORD").then(|| "secret".to_owned())
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/pgvigil.toml"), text, &secrets)
}

/// `LEAST` with a section added or continued, e.g. `("lease", "ttl = 5")`; an empty section is the top level.
fn with(section: &str, line: &str) -> String {
    let header = format!("[{section}]\n");
    if section.is_empty() {
        format!("{line}\n{LEAST}")
    } else if LEAST.contains(&header) {
        LEAST.replace(&header, &format!("{header}{line}\n"))
    } else {
        format!("{LEAST}{header}{line}\n")
    }
}

fn refused(text: &str, parts: &[&str]) {
    let error = parse(text).expect_err(text);
    let message = error.to_string();
    assert!(message.starts_with("/etc/pgvigil.toml"), "{message}");
    assert!(!message.contains('\n'), "one line: {message}");
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn the_least_file_gets_the_documented_defaults() {
    let config = parse(LEAST).unwrap();
    assert_eq!(config.policy.timings.ttl, Duration::from_secs(8));
    assert_eq!(config.policy.timings.heartbeat, Duration::from_secs(1));
    assert_eq!(config.policy.timings.kill_budget, Duration::from_secs(1));
    assert_eq!(config.policy.timings.renewal_timeout, Duration::from_secs(2));
    assert_eq!((config.policy.durability, config.policy.k), (Durability::Sync, 1));
    assert_eq!(config.policy.max_stall, Duration::from_secs(3));
    assert_eq!(config.policy.max_lag, 1 << 20);
    assert_eq!(config.policy.election_wait, Duration::from_millis(500));
    assert_eq!(config.policy.election_give_up, Duration::from_secs(3));
    assert!(config.policy.crash_failover && config.policy.reclone);
    assert_eq!((config.policy.crash_max_restarts, config.policy.crash_window), (3, Duration::from_secs(600)));
    assert_eq!(config.policy.start_timeout, Duration::from_secs(300));
    assert_eq!(config.policy.stop_timeout, Duration::from_secs(30));
    assert_eq!(config.policy.member_publish, Duration::from_secs(3));
    assert_eq!((config.me().port, config.me().api_port), (5432, 8008));
    assert_eq!(config.api.listen.to_string(), "0.0.0.0:8008");
    assert_eq!(config.postgresql.superuser_password.expose(), "secret");
    assert_eq!(config.guardian.socket, PathBuf::from("/var/lib/pgvigil/guardian.sock"));
}

// === documents ===

/// `#key = value` lines of the sample become keys, section by section; `#key =` has no default to show.
fn sample_with_defaults_written() -> String {
    let mut text = String::new();
    for line in SAMPLE.lines() {
        let uncommented = line.strip_prefix('#').filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
        match uncommented {
            Some(rest) if rest.trim_end().ends_with('=') => {}
            Some(rest) if rest.starts_with("shared_buffers") || rest.starts_with("zone") => {}
            Some(rest) => text.push_str(rest),
            None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[test]
fn the_sample_shows_the_defaults() {
    let as_it_is = parse(SAMPLE).unwrap();
    let written_out = parse(&sample_with_defaults_written()).unwrap();
    assert_eq!(format!("{as_it_is:?}"), format!("{written_out:?}"));
}

#[test]
fn the_sample_names_every_key_with_its_default() {
    let mut section = String::new();
    let mut seen = Vec::new();
    for line in SAMPLE.lines() {
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_matches(['[', ']']).to_owned();
            seen.push((section.clone(), "{}".to_owned()));
        }
        let bare = line.strip_prefix('#').unwrap_or(line);
        if let Some((key, value)) = bare.split_once('=')
            && key.trim_end().chars().all(|c| c.is_ascii_lowercase() || c == '_')
        {
            let dot = if section.is_empty() { "" } else { "." };
            seen.push((format!("{section}{dot}{}", key.trim()), value.trim().to_owned()));
        }
    }
    for key in KEYS {
        let values: Vec<&str> = seen.iter().filter(|(name, _)| name == key.name).map(|(_, v)| v.as_str()).collect();
        assert!(!values.is_empty(), "docs/pgvigil.sample.toml lacks {}", key.name);
        if let Fallback::Value(default) = key.default {
            assert!(values.contains(&default), "{}: {values:?} is not {default}", key.name);
        }
    }
}

#[test]
fn the_table_names_every_key_variable_and_owned_parameter() {
    for key in KEYS {
        let default = match key.default {
            Fallback::Required => "required".to_owned(),
            Fallback::None => "none".to_owned(),
            Fallback::Value(value) => format!("`{value}`"),
        };
        let row = format!("| `{}` | {default} |", key.name);
        assert!(TABLE.contains(&row), "docs/CONFIGURATION.md lacks {row}");
    }
    for (variable, key) in VARIABLES {
        assert!(TABLE.contains(&format!("| `{variable}` | `{key}`")), "docs/CONFIGURATION.md lacks {variable}");
        assert!(KEYS.iter().any(|k| k.name == *key), "{key} is not a key");
    }
    for (name, _) in OWNED_PARAMETERS {
        assert!(TABLE.contains(&format!("| `{name}` |")), "docs/CONFIGURATION.md lacks {name}");
    }
}

// === keys and units ===

#[test]
fn unknown_keys_are_answered_with_the_nearest_right_one() {
    refused(&with("lease", "tll = \"8s\""), &["pgvigil.toml:", ": lease.tll: ", "did you mean `ttl`?"]);
    refused(
        &with("", "clustre = \"x\""),
        &["`clustre` is not a key of the file's top level", "did you mean `cluster`?"],
    );
    refused(&with("", "ttl = \"8s\""), &["did you mean `lease.ttl`?"]);
    refused(&with("leese", "ttl = \"8s\""), &["did you mean `lease`?"]);
    refused(&with("etcd", "password = \"x\""), &["secrets do not stand in this file", "password_file"]);
    refused(&with("etcd", "zzz = 1"), &["it takes endpoints"]);
}

#[test]
fn errors_name_line_and_column() {
    let text = "cluster = \"maas\"\n[lease]\n  ttl = 8\n";
    refused(text, &["/etc/pgvigil.toml:3:9: lease.ttl: `8` has no unit", "\"8s\""]);
    refused("cluster = \n", &["/etc/pgvigil.toml:1:"]);
    refused(&LEAST.replace("host = \"10.0.0.2\"", "host = 7"), &[": members[1].host: ", "invalid type"]);
}

#[test]
fn wrong_units_are_named_with_examples() {
    refused(&with("lease", "ttl = \"8sec\""), &["unknown unit `sec`", "did you mean `8s`"]);
    refused(&with("election", "max_lag = \"1mb\""), &["election.max_lag", "did you mean `1MB`"]);
    refused(&with("election", "max_lag = 1048576"), &["has no unit", "16MB"]);
}

// === relations ===

#[test]
fn relations_are_refused_with_both_numbers() {
    refused(&with("lease", "ttl = \"5s\""), &["lease.ttl: 5s is too short", "1s + 2 * 2s + 1s = 6s"]);
    refused(&with("lease", "heartbeat = \"1ms\""), &["lease.heartbeat", "1ms is outside 100ms"]);
    refused(
        &with("etcd", "try_timeout = \"1500ms\""),
        &["2 * etcd.try_timeout = 3s", "lease.renewal_timeout = 2s", "1s or less"],
    );
    refused(&with("sync", "k = 2"), &["k = 2", "2 members leave 1 standbys"]);
    refused(&with("sync", "k = 0"), &["durability = \"async\""]);
    refused(&with("election", "wait = \"4s\""), &["election.wait = 4s", "election.give_up = 3s"]);
    refused(&with("member", "publish = \"500ms\""), &["member.publish = 500ms", "lease.heartbeat = 1s"]);
    refused(&with("postgresql", "port = 5433"), &["postgresql.port = 5433", "= 5432"]);
    refused(&with("api", "listen = \"0.0.0.0:9\""), &["api.listen = 9", "= 8008"]);
}

#[test]
fn directories_inside_the_data_directory_are_refused() {
    refused(
        &with("", "state_dir = \"/var/lib/postgresql/15/pgvigil/state\""),
        &["state_dir", "is inside postgresql.data_dir"],
    );
    refused(&with("", "state_dir = \"state\""), &["relative path"]);
    refused(&with("guardian", &format!("socket = \"/{}\"", "x".repeat(120))), &["121 characters", "107"]);
}

// === members ===

#[test]
fn members_are_distinct_and_hold_this_one() {
    refused(&LEAST.replace("name = \"node-b\"", "name = \"node-a\""), &["two members are called `node-a`"]);
    refused(&LEAST.replace("10.0.0.2", "10.0.0.1"), &["both have the address 10.0.0.1:5432"]);
    refused(
        &LEAST.replacen("name = \"node-a\"", "name = \"nod-a\"", 1),
        &["`nod-a` is not among the members", "did you mean `node-a`?"],
    );
    refused(&LEAST.replace("node-b", "Node_B"), &["`Node_B` is not a valid name"]);
    refused(&LEAST.replace("\"10.0.0.2\"", "\"10.0.0.2:5432\""), &["is not a host", "api_port"]);
    refused(&LEAST.replace("host = \"10.0.0.2\"", ""), &["members[1].host", "is missing"]);
    refused("cluster = \"maas\"", &["members", "is missing", "[[members]]"]);
}

#[test]
fn one_member_alone_waits_for_nobody() {
    let alone = LEAST.replace("[[members]]\nname = \"node-b\"\nhost = \"10.0.0.2\"\n", "");
    assert_eq!(parse(&alone).unwrap().policy.k, 0);
}

// === the rest ===

#[test]
fn values_are_refused_with_the_remedy() {
    refused(&with("", "durability = \"synch\""), &["durability", "did you mean \"sync\"?"]);
    refused(&with("crash", "prefer = \"hope\""), &["write \"failover\" or \"restart\""]);
    refused(&with("log", "level = \"inof\""), &["did you mean \"info\"?"]);
    refused(&LEAST.replace("http://127.0.0.1:2379", "127.0.0.1:2379"), &["etcd.endpoints[0]", "http://host:2379"]);
    refused(&LEAST.replace("http://127.0.0.1:2379", "http://127.0.0.1"), &["has no port"]);
    refused(&with("etcd", "user = \"u\""), &["etcd.password_file", "is missing beside etcd.user"]);
    refused(&with("etcd", "ca_file = \"/nowhere/ca.pem\""), &["is not encrypted"]);
    refused(&with("postgresql", "hba = [\"everybody\"]"), &["postgresql.hba[0]", "is not a line of pg_hba.conf"]);
    refused(&with("postgresql", "initdb_options = [\"--waldir=/x\"]"), &["is pgvigil's to set"]);
    refused(&with("guardian", "real_time_priority = 200"), &["outside 0 to 99"]);
    refused(
        &LEAST.replace("data_dir = \"/var/lib/postgresql/15/pgvigil\"", ""),
        &["postgresql.data_dir", "is missing"],
    );
}

#[test]
fn parameters_that_pgvigil_owns_are_refused_with_what_to_write_instead() {
    refused(&with("postgresql.parameters", "port = 5433"), &["postgresql.parameters.port", "[[members]]"]);
    refused(&with("postgresql.parameters", "recovery_target_time = \"x\""), &["nothing but pgvigil ends recovery"]);
    refused(&with("postgresql.parameters", "Synchronous_Commit = \"off\""), &["write on or remote_apply"]);
    refused(&with("postgresql.parameters", "a = [1]"), &["an array is not a value"]);
    let config =
        parse(&with("postgresql.parameters", "work_mem = \"8MB\"\njit = false\nmax_wal_senders = 12")).unwrap();
    let parameters = &config.postgresql.parameters;
    assert_eq!((parameters["work_mem"].as_str(), parameters["jit"].as_str()), ("8MB", "off"));
    assert_eq!(parameters["max_wal_senders"], "12");
}

#[test]
fn every_parameter_that_postgresql_s_files_set_is_refused() {
    for name in pgvigil::postgres::owned_parameters() {
        assert!(pgvigil::config::keys::owned_parameter(name).is_some(), "{name} can be set in the configuration");
    }
}

#[test]
fn the_environment_goes_before_the_file() {
    let environment = |name: &str| match name {
        "PGVIGIL_NAME" => Some("node-b".to_owned()),
        "PGVIGIL_ETCD_ENDPOINTS" => Some("http://e1:2379, http://e2:2379".to_owned()),
        other => secrets(other),
    };
    let config = Config::parse(Path::new("x"), LEAST, &environment).unwrap();
    assert_eq!(config.me().host, "10.0.0.2");
    assert_eq!(config.etcd.endpoints, ["http://e1:2379", "http://e2:2379"]);
}

#[test]
fn secrets_come_from_files_that_not_everybody_can_read() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    let text = with("postgresql", &format!("superuser_password_file = {file:?}\ninternal_password_file = {file:?}"));
    let read = || Config::parse(Path::new("/etc/pgvigil.toml"), &text, &|_| None);
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();

    let missing = read().unwrap_err().to_string();
    assert!(missing.contains("superuser_password_file") && missing.contains("PGVIGIL_SUPERUSER_PASSWORD"), "{missing}");

    std::fs::write(&file, "geheim\n").unwrap();
    mode(0o644);
    let open = read().unwrap_err().to_string();
    assert!(open.contains("mode 0644") && open.contains("chmod 0600"), "{open}");

    mode(0o600);
    let config = read().unwrap();
    assert_eq!(config.postgresql.internal_password.expose(), "geheim");
    assert!(!format!("{config:?}").contains("geheim"), "secrets are never shown");

    std::fs::write(&file, "\n").unwrap();
    assert!(read().unwrap_err().to_string().contains("is empty"));
    let none = Config::parse(Path::new("/etc/pgvigil.toml"), LEAST, &|_| None).unwrap_err().to_string();
    assert!(none.contains("PGVIGIL_SUPERUSER_PASSWORD"), "{none}");
}

// === the endpoint's rules ===

const TLS: &str = "[endpoint.tls]\ncert_file = \"/c\"\nkey_file = \"/k\"\nclient_ca_file = \"/ca\"\n";

/// Each text is one rule.
fn allow(before: &str, rules: &[&str]) -> String {
    let rules: String = rules.iter().map(|rule| format!("[[endpoint.allow]]\n{rule}\n")).collect();
    format!("{LEAST}{before}{rules}")
}

#[test]
fn without_rules_everybody_but_superusers_comes_in_with_a_password() {
    assert_eq!(parse(LEAST).unwrap().endpoint, None);
    let endpoint = parse(&with("endpoint", "")).unwrap().endpoint.unwrap().access;
    assert_eq!((endpoint.allow, endpoint.tls), (vec![AccessRule::default()], None));
    assert_eq!(parse(&allow("", &[""])).unwrap().endpoint.unwrap().access.allow, vec![AccessRule::default()]);
}

#[test]
fn rules_of_the_endpoint_are_read() {
    let text = allow(
        TLS,
        &[
            "user = \"maas\"\ndatabase = \"maasdb\"\naddress = \"10.0.0.0/8\"",
            "user = \"postgres\"\naddress = \"loopback\"\nclient_cert = \"verify-full\"",
            "database = \"replication\"\nmethod = \"cert\"",
            "method = \"reject\"",
        ],
    );
    let endpoint = parse(&text).unwrap().endpoint.unwrap().access;
    assert!(!endpoint.tls.unwrap().tls_1_3_only);
    let tls: Vec<bool> = endpoint.allow.iter().map(|rule| rule.tls).collect();
    assert_eq!(tls, [false, true, true, false], "who asks for a certificate asks for TLS");
    assert_eq!(endpoint.allow[3].method, AccessMethod::Reject);
}

#[test]
fn rules_that_cannot_work_are_refused_with_a_remedy() {
    let rule = |rule: &str, parts: &[&str]| refused(&allow("", &[rule]), parts);
    rule("method = \"md5\"", &["endpoint.allow[0].method: `md5` is unknown", "postgresql.hba"]);
    rule("method = \"scram-sha-256\"", &["write \"scram\""]);
    rule("method = \"rejekt\"", &["did you mean \"reject\"?"]);
    rule("methode = \"scram\"", &["did you mean `method`?"]);
    rule("address = \"10.0.0.7/8\"", &["endpoint.allow[0].address", "the network is 10.0.0.0/8"]);
    rule("address = \"region-a\"", &["not an IP address", "\"loopback\""]);
    rule("user = \"\"", &["endpoint.allow[0].user", "is not a name"]);
    rule("tls = \"require\"", &["endpoint.allow[0].tls", "no endpoint.tls.cert_file"]);
    rule("tls = \"on\"", &["endpoint.allow[0].tls", "write one of allow, require"]);
    rule("method = \"cert\"", &["endpoint.allow[0].method", "endpoint.tls.client_ca_file is missing"]);
    rule("client_cert = \"verify-ca\"", &["endpoint.allow[0].client_cert", "client_ca_file"]);
    refused(&allow(TLS, &["method = \"cert\"\ntls = \"allow\""]), &["\"allow\" contradicts method = \"cert\""]);
    refused(
        &allow("", &["", "user = \"eve\"\nmethod = \"reject\""]),
        &["endpoint.allow[1]", "rule 1 matches all that rule 2 matches", "narrower rule first"],
    );
    // A superuser's rule is not covered by one for everybody else, but it is never reached after one.
    refused(&allow("", &["", "user = \"postgres\""]), &["never reached"]);
    let replication = allow("", &["", "database = \"replication\""]);
    assert!(parse(&replication).is_ok(), "`all` leaves replication out");
}

#[test]
fn half_a_certificate_is_refused() {
    let tls = |text: &str, parts: &[&str]| refused(&with("endpoint.tls", text), parts);
    tls("cert_file = \"/c\"", &["endpoint.tls.key_file", "is missing beside endpoint.tls.cert_file"]);
    tls("key_file = \"/k\"", &["endpoint.tls.cert_file", "is missing beside endpoint.tls.key_file"]);
    tls("client_ca_file = \"/ca\"", &["endpoint.tls.client_ca_file", "cert_file"]);
    tls("cert_file = \"c\"\nkey_file = \"/k\"", &["endpoint.tls.cert_file", "relative path"]);
    tls("min_version = \"1.1\"", &["endpoint.tls.min_version", "older versions are not spoken"]);
}
