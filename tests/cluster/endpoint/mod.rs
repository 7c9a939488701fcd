//! Clients through endpoints of real clusters.

mod changes;
mod clients;

use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use pgvigil::demo::sql::{self, Login, Session};
use pgvigil::demo::{Cluster, Options};

const PATIENCE: Duration = Duration::from_secs(40);
const BINARY: &str = env!("CARGO_BIN_EXE_pgvigil");

fn options(lines: &str) -> Options {
    Options {
        binary: Some(PathBuf::from(BINARY)),
        lease: "ttl = \"4s\"\nheartbeat = \"500ms\"\nrenewal_timeout = \"1200ms\"".to_owned(),
        etcd_try_timeout: "500ms".to_owned(),
        endpoint: Some(lines.to_owned()),
        ..Options::default()
    }
}

/// A cluster of so many members that streams, with the writers' database, and its primary.
async fn playing(options: Options) -> (Cluster, usize) {
    let cluster = Cluster::start(options).await.unwrap();
    cluster.ready(PATIENCE).await.unwrap();
    let primary = cluster.primary().await.unwrap();
    (cluster, primary)
}

async fn through(cluster: &Cluster, member: usize) -> Session {
    sql::connect(cluster.members[member].endpoint_port, &Login::app(), PATIENCE).await.unwrap()
}

/// The process of this member's endpoint.
fn endpoint_pid(cluster: &Cluster, member: usize) -> i32 {
    let socket = cluster.members[member].directory.join("state/endpoint.sock");
    let named = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut arguments = line.split(|byte| *byte == 0);
        arguments.nth(1) == Some(b"endpoint") && arguments.any(|a| a == socket.as_os_str().as_encoded_bytes())
    };
    cluster.members[member].processes().into_iter().find(named).expect("an endpoint runs")
}

/// `psql` through an endpoint's port.
async fn psql(port: u16, arguments: &[&str]) -> Output {
    tokio::process::Command::new("psql")
        .args(["-X", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", &port.to_string(), "-U", "app", "-d", "app"])
        .args(arguments)
        .env("PGPASSWORD", "app")
        .kill_on_drop(true)
        .output()
        .await
        .unwrap()
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

async fn leaves_nothing(cluster: Cluster) {
    let (left, kept) = cluster.shutdown().await;
    assert_eq!((left, kept), (0, None), "processes that had to be killed, files that stayed");
}
