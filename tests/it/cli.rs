//! The binary as people and scripts meet it: exit codes, and words that say what to do next.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Output};

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn pgvigil(arguments: &[&str]) -> Ran {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_pgvigil"))
        .args(arguments)
        .env_clear()
        .env("PGVIGIL_SUPERUSER_PASSWORD", "x")
        .env("PGVIGIL_INTERNAL_PASSWORD", "x")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: status.code().unwrap(), out: text(stdout), err: text(stderr) }
}

fn fails(arguments: &[&str], code: i32, parts: &[&str]) {
    let ran = pgvigil(arguments);
    assert_eq!(ran.code, code, "{arguments:?}: {}{}", ran.out, ran.err);
    for part in parts {
        assert!(ran.err.contains(part), "{arguments:?}: `{part}` is not in: {}", ran.err);
    }
}

/// Answers every connection with one HTTP response, and goes away when the test ends.
fn agent(status: &str, body: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let response = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(response.as_bytes());
        }
    });
    format!("http://{address}")
}

/// An address that nobody listens on.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn help_and_version_are_answers() {
    let help = pgvigil(&["--help"]);
    assert_eq!(help.code, 0);
    for word in ["agent", "switchover", "explain", "demo", "Exit codes:", "no agent answered"] {
        assert!(help.out.contains(word), "{word}");
    }
    assert_eq!(pgvigil(&["--version"]).code, 0);
    assert!(pgvigil(&["completions", "bash"]).out.contains("_pgvigil"));
}

#[test]
fn a_wrong_command_line_is_refused_before_anything_is_tried() {
    fails(&[], 2, &["Usage"]);
    fails(&["swichover"], 2, &["switchover"]);
    fails(&["status", "--wach"], 2, &["--watch"]);
    fails(&["reinit"], 2, &["MEMBER"]);
    fails(&["switchover", "--to", "Node_B"], 2, &["is not a valid name"]);
    fails(&["status", "--url", "https://x"], 2, &["only http:// is spoken"]);
    fails(&["failover", "--url", &nobody()], 2, &["nobody is there to be asked", "--yes"]);
}

#[test]
fn a_missing_or_wrong_configuration_is_named() {
    fails(&["agent", "--config", "/nowhere/pgvigil.toml"], 2, &["/nowhere/pgvigil.toml", "pgvigil.sample.toml"]);
    fails(&["status"], 2, &["no cluster is named", "--url"]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pgvigil.toml");
    std::fs::write(&file, "[lease]\ntll = \"8s\"\n").unwrap();
    let file = file.to_str().unwrap();
    for command in [&["agent", "--config", file][..], &["config", "check", file], &["status", "--config", file]] {
        fails(command, 2, &[":2:1: lease.tll", "did you mean `ttl`?"]);
    }
}

#[test]
fn config_check_looks_at_what_the_file_names() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(at("data")).unwrap();
    std::fs::write(at("data/letter.txt"), "not a database").unwrap();
    let etcd = nobody();
    let text = format!(
        "cluster = \"maas\"\nname = \"a\"\nstate_dir = {:?}\n[[members]]\nname = \"a\"\nhost = \"127.0.0.1\"\nport = 54999\n\
         api_port = 54998\n[etcd]\nendpoints = [{etcd:?}]\n[postgresql]\ndata_dir = {:?}\n",
        at("state"),
        at("data")
    );
    std::fs::write(at("pgvigil.toml"), text).unwrap();
    let ran = pgvigil(&["config", "check", &at("pgvigil.toml")]);
    assert_eq!(ran.code, 1, "{}", ran.out);
    assert!(ran.out.contains("no PG_VERSION among them") && ran.out.contains("is etcd running there"), "{}", ran.out);
    let json: serde_json::Value =
        serde_json::from_str(&pgvigil(&["config", "check", "--json", &at("pgvigil.toml")]).out).unwrap();
    assert_eq!(json["ok"], false);
    assert!(!directory.path().join("state").exists(), "a check changes nothing");
}

#[test]
fn another_program_on_etcd_s_port_is_told_from_etcd() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pgvigil.toml");
    let check = |etcd: String| {
        let text = format!(
            "cluster = \"maas\"\nname = \"a\"\n[[members]]\nname = \"a\"\nhost = \"127.0.0.1\"\n\
             [etcd]\nendpoints = [{etcd:?}]\n[postgresql]\ndata_dir = \"/nowhere/data\"\n"
        );
        std::fs::write(&file, text).unwrap();
        pgvigil(&["config", "check", file.to_str().unwrap()]).out
    };
    let out = check(agent("200 OK", "<html>"));
    assert!(out.contains("does not answer as etcd does"), "{out}");
    let out = check(agent("200 OK", r#"{"etcdserver":"3.4.23"}"#));
    assert!(out.contains("answers, version 3.4.23"), "{out}");
}

#[test]
fn the_demo_s_orders_are_checked_before_a_demo_is_looked_for() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().to_str().unwrap();
    fails(&["demo", "--dir", dir, "kill", "everybody"], 1, &["`kill everybody` is no order", "kill primary"]);
    fails(&["demo", "--dir", dir, "kill", "primary"], 1, &["no demo runs in", "start one"]);
    fails(&["demo", "--json", "x"], 2, &["--once"]);
    fails(&["demo", "--members", "0"], 2, &["1..=9"]);
}

#[test]
fn a_replay_wants_a_view() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("view.json");
    let path = file.to_str().unwrap();
    fails(&["explain", "--replay", path], 2, &["read ", "/v1/decisions?full=true"]);
    std::fs::write(&file, "{").unwrap();
    fails(&["explain", "--replay", path], 2, &["is not JSON"]);
    std::fs::write(&file, "{}").unwrap();
    fails(&["explain", "--replay", path], 2, &["holds no view of this version"]);
}

#[test]
fn silence_is_told_from_refusal() {
    fails(&["status", "--url", &nobody()], 3, &["no agent answered", "pgvigil agent"]);
    let refusing = agent("412 Precondition Failed", r#"{"error":"no standby is ready","hint":"wait"}"#);
    fails(&["switchover", "--url", &refusing], 4, &["no standby is ready", "wait"]);
    let json = pgvigil(&["switchover", "--json", "--url", &refusing]);
    assert_eq!(json.code, 4);
    let body: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((body["error"].as_str(), body["exit"].as_u64()), (Some("no standby is ready"), Some(4)));
    let stranger = agent("200 OK", "<html>");
    fails(&["status", "--url", &stranger], 3, &["is this a pgvigil agent?"]);
}

#[test]
fn the_next_address_is_asked_when_one_is_silent() {
    let answering = agent("200 OK", r#"{"id":"cli-1","is":"switchover","state":"done","message":"b is the leader"}"#);
    let urls = format!("{},{answering}", nobody());
    let ran = pgvigil(&["switchover", "--url", &urls]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "b is the leader\n"), "{}", ran.err);
}

#[test]
fn outcomes_have_exit_codes() {
    for (state, code) in [("put_back", 1), ("refused", 4), ("unknown", 5)] {
        let url = agent("200 OK", &format!(r#"{{"id":"1","state":"{state}","message":"words of the cluster"}}"#));
        fails(&["restart", "a", "--url", &url], code, &["words of the cluster"]);
    }
    let slow = agent("200 OK", r#"{"id":"1","state":"waiting"}"#);
    fails(&["switchover", "--wait", "0", "--url", &slow], 5, &["has no outcome after 0s"]);
}

#[test]
fn status_is_a_table_with_a_verdict() {
    let body = r#"{"version":1,"cluster":"maas","leader":{"member":"a","term":4,"state":"held","timeline":2},
        "durability":{"message":"every acknowledged commit is on the leader and at least 1 of 2 standbys"},
        "members":[{"name":"a","role":"leader","state":"running","sync":"primary","timeline":2,"lag_bytes":null,
                    "tags":{"nofailover":false,"failover_priority":1,"custom":{"zone":"x"}},"reason":"leads"},
                   {"name":"b","role":"standby","state":"streaming","sync":"synchronous","timeline":2,"lag_bytes":20480,
                    "tags":{"nofailover":true,"failover_priority":0,"custom":{}},"reason":"follows a"}],
        "warnings":["c has not been heard of"]}"#;
    let ran = pgvigil(&["status", "--url", &agent("200 OK", body)]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let expected = "\
cluster maas, leader a, term 4, timeline 2
every acknowledged commit is on the leader and at least 1 of 2 standbys

MEMBER  ROLE     STATE      TIMELINE  LAG    SYNC         TAGS                           REASON
a       leader   running    2         -      primary      zone=x                         leads
b       standby  streaming  2         20 kB  synchronous  failover_priority=0 nofailover follows a

! c has not been heard of
";
    assert_eq!(
        ran.out.split_whitespace().collect::<Vec<_>>(),
        expected.split_whitespace().collect::<Vec<_>>(),
        "{}",
        ran.out
    );
    let leaderless = r#"{"cluster":"maas","leader":{"member":null,"state":"silent"},"members":[]}"#;
    let ran = pgvigil(&["status", "--url", &agent("200 OK", leaderless)]);
    assert_eq!(ran.code, 1);
    assert!(ran.out.contains("no leader"));
}
