//! Faults that the demo does not play, each on a cluster of its own: real etcd, agents and PostgreSQL on free ports. Every
//! test ends its cluster by the orderly way and looks that nothing is left.

mod bad_input;
mod cold_start;
mod commands;
mod disks;
mod durability;
mod lifecycle;
mod rejoin;
mod store;
mod tags;
mod takeover;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use pgvigil::client::Client;
use pgvigil::demo::sql::{self, Login, Session};
use pgvigil::demo::writer::Writer;
use pgvigil::demo::{Cluster, Options};
use serde_json::Value;

/// Longest wait for anything: what takes longer is broken.
const PATIENCE: Duration = Duration::from_secs(40);
/// Between two looks where nobody tells us of a change.
const LOOK: Duration = Duration::from_millis(20);
const BINARY: &str = env!("CARGO_BIN_EXE_pgvigil");

/// Half of the default lease: the same rules, half the waiting.
fn options() -> Options {
    Options {
        binary: Some(PathBuf::from(BINARY)),
        lease: "ttl = \"4s\"\nheartbeat = \"500ms\"\nrenewal_timeout = \"1200ms\"".to_owned(),
        etcd_try_timeout: "500ms".to_owned(),
        ..Options::default()
    }
}

/// A cluster with all members streaming, its primary, and one writer per member that never goes anywhere else.
async fn playing(options: Options) -> (Cluster, usize, Writer) {
    let cluster = Cluster::start(options).await.unwrap();
    played(cluster).await
}

async fn played(cluster: Cluster) -> (Cluster, usize, Writer) {
    cluster.ready(PATIENCE).await.unwrap();
    let primary = cluster.primary().await.unwrap();
    let writer = cluster.pinned_writer();
    writes(&writer).await;
    (cluster, primary, writer)
}

/// A write that is sent from now on is acknowledged.
async fn writes(writer: &Writer) {
    assert!(writer.acknowledged_after(Instant::now(), PATIENCE).await, "no write was acknowledged within {PATIENCE:?}");
}

/// Acknowledged rows that the primary does not have.
async fn lost(cluster: &Cluster, writer: &Writer) -> Vec<i64> {
    let primary = cluster.wait_for_primary(PATIENCE).await.unwrap();
    let session = cluster.connect(primary, &Login::app()).await.unwrap();
    writer.check(&session).await.unwrap().lost
}

/// No row lost, never two members that take writes, and nothing left behind.
async fn ends_well(cluster: Cluster, writer: Writer) {
    writes(&writer).await;
    assert_eq!(lost(&cluster, &writer).await, Vec::<i64>::new());
    ends(cluster, writer).await;
}

async fn ends(cluster: Cluster, mut writer: Writer) {
    assert_eq!(writer.two_primaries(), Vec::<String>::new());
    writer.stop().await;
    leaves_nothing(cluster).await;
}

async fn leaves_nothing(cluster: Cluster) {
    let base = cluster.base.clone();
    let (left, kept) = cluster.shutdown().await;
    assert_eq!((left, kept), (0, None), "processes that had to be killed, files that stayed");
    assert!(!base.exists());
}

/// Waits until `reached` gives something; panics with `what`, keeping the cluster's logs.
async fn until<T>(what: &str, mut reached: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = reached().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(LOOK).await;
    }
}

/// `/v1/status` as this member's agent says it; `Null` when it does not answer.
async fn status(cluster: &Cluster, member: usize) -> Value {
    get(cluster, member, "/v1/status").await
}

async fn get(cluster: &Cluster, member: usize, path: &str) -> Value {
    let url = cluster.members[member].url();
    let answer = Client::of(vec![url.clone()]).look(&url, path, Duration::from_secs(2)).await;
    answer.map(|(_, body)| body).unwrap_or_default()
}

/// Waits until this member's status satisfies `right`, and returns it.
async fn until_status(cluster: &Cluster, member: usize, what: &str, right: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let begun = Instant::now();
    loop {
        let now = status(cluster, member).await;
        if right(&now) {
            return now;
        }
        if !now.is_null() {
            last = now;
        }
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}; last: {}", brief(&last));
        tokio::time::sleep(LOOK).await;
    }
}

/// Every member that streams is in the published set of this leader: any of them may be the next one.
async fn synchronous(cluster: &Cluster, leader: usize) {
    until_status(cluster, leader, "all streaming members in the synchronous set", |status| {
        let set: Vec<&Value> = status["durability"]["members"].as_array().into_iter().flatten().collect();
        let members = status["members"].as_array().into_iter().flatten();
        let mut streaming = members.filter(|m| m["state"] == "streaming").peekable();
        streaming.peek().is_some() && streaming.all(|m| set.contains(&&m["name"]))
    })
    .await;
}

fn brief(status: &Value) -> Value {
    serde_json::json!({
        "leader": status["leader"], "durability": status["durability"], "decision": status["decision"],
        "local": status["local"], "warnings": status["warnings"],
    })
}

fn reason(status: &Value) -> &str {
    status["decision"]["reason"].as_str().unwrap_or_default()
}

fn rule(status: &Value) -> &str {
    status["decision"]["rule"].as_str().unwrap_or_default()
}

fn warnings(status: &Value) -> String {
    status["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

async fn term(cluster: &Cluster, member: usize) -> u64 {
    until("a leader's term", async || status(cluster, member).await["leader"]["term"].as_u64()).await
}

/// Writes one row by a session of its own; the answer, or why not.
async fn write_row(session: &Session, id: i64) -> Result<u64, String> {
    session
        .execute("INSERT INTO writes (id, client) VALUES ($1, -1)", &[&id])
        .await
        .map_err(|error| sql::sentence(&error))
}

async fn has_row(cluster: &Cluster, member: usize, id: i64) -> bool {
    let session = cluster.connect(member, &Login::app()).await.unwrap();
    session.query_opt("SELECT FROM writes WHERE id = $1", &[&id]).await.unwrap().is_some()
}

/// Adds lines to a member's configuration; they count from its agent's next start.
fn configure(cluster: &Cluster, member: usize, lines: &str) {
    use std::io::Write;
    let file = cluster.members[member].config_file();
    let mut file = std::fs::OpenOptions::new().append(true).open(file).unwrap();
    writeln!(file, "\n{lines}").unwrap();
}

/// The command line as a user calls it.
async fn pgvigil(arguments: &[&str]) -> Output {
    let command = tokio::process::Command::new(BINARY)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    tokio::time::timeout(PATIENCE, command).await.expect("the command ends").unwrap()
}

/// An operation through the command line with `--json`: exit code and body.
async fn ask(cluster: &Cluster, arguments: &[&str]) -> (i32, Value) {
    let urls = cluster.urls().join(",");
    let output = pgvigil(&[arguments, &["--json", "--url", &urls]].concat()).await;
    let text = String::from_utf8_lossy(&output.stdout);
    let body = serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{arguments:?}: {error}: `{text}`, `{}`", String::from_utf8_lossy(&output.stderr))
    });
    (output.status.code().unwrap_or(-1), body)
}

/// Data directories of this member that were renamed out of the way.
fn set_aside(cluster: &Cluster, member: usize) -> Vec<PathBuf> {
    let data = cluster.members[member].data_dir();
    let entries = std::fs::read_dir(data.parent().unwrap()).unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| *path != data && path.join("PG_VERSION").is_file()).collect()
}

/// Everything below a directory with sizes, to see that nothing changed.
fn listing(directory: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            let kind = entry.metadata().unwrap();
            if kind.is_dir() {
                open.push(entry.path());
            }
            found.push((entry.path(), if kind.is_dir() { 0 } else { kind.len() }));
        }
    }
    found.sort();
    found
}
