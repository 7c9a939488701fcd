//! Ends and returns of agents, guardians and PostgreSQL's processes.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgvigil::demo::Cluster;
use pgvigil::demo::sql::Login;

use super::*;

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// The process that an agent attaches to, by the socket's own word; its second is another one.
fn guardians(cluster: &Cluster, member: usize) -> Vec<i32> {
    let is_guardian = |pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"guardian")
    };
    cluster.members[member].processes().into_iter().filter(is_guardian).collect()
}

/// The guardian is the parent of the postmaster.
fn guardian(cluster: &Cluster, member: usize) -> i32 {
    let postmaster = cluster.members[member].postmaster().expect("PostgreSQL runs");
    let status = fs::read_to_string(format!("/proc/{postmaster}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
    let parent = parent.trim().parse().unwrap();
    assert!(guardians(cluster, member).contains(&parent), "the postmaster's parent {parent} is no guardian");
    parent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaders_agent_ends_and_comes_back() {
    let (mut cluster, leader, writer) = playing(options()).await;
    let postmaster = cluster.members[leader].postmaster();
    let began = term(&cluster, leader).await;

    // Detached by SIGUSR1, then killed: S10, nothing changes for clients.
    for signal in [Signal::SIGUSR1, Signal::SIGKILL] {
        cluster.members[leader].signal_agent(signal);
        cluster.agent_gone(leader, PATIENCE).await.unwrap();
        assert_eq!(cluster.members[leader].postmaster(), postmaster, "{signal}: PostgreSQL runs on");
        writes(&writer).await;
        cluster.start_agent(leader).unwrap();
        assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader, "{signal}");
        assert_eq!(cluster.members[leader].postmaster(), postmaster, "{signal}: PostgreSQL is the same");
        assert_eq!(term(&cluster, leader).await, began, "{signal}");
        writes(&writer).await;
        assert_eq!(writer.errors(cluster.started), (0, Default::default()), "{signal}");
    }

    // SIGTERM: handed over, PostgreSQL stopped, guardian gone.
    cluster.stop_member(leader).await.unwrap();
    assert_eq!(cluster.members[leader].postmaster(), None);
    until("the guardian ends", async || cluster.members[leader].processes().is_empty().then_some(())).await;
    writes(&writer).await;
    let next = cluster.wait_for_primary(PATIENCE).await.unwrap();
    assert_ne!(next, leader);
    assert_eq!(term(&cluster, next).await, began + 1, "one change of leader");
    let log = fs::read_to_string(cluster.members[leader].agent_log()).unwrap();
    assert!(!log.contains("rewind") && !log.contains("clone"), "handed over, nothing diverged");

    cluster.start_agent(leader).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next, "it rejoins and does not take the leadership back");
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_ends_with_its_guardian() {
    let (cluster, leader, writer) = playing(options()).await;
    let began = term(&cluster, leader).await;
    let standby = (leader + 1) % 3;

    let (old, postmaster) = (guardian(&cluster, standby), cluster.members[standby].postmaster().unwrap());
    send(old, Signal::SIGKILL);
    until("the standby's PostgreSQL is killed and started under a new guardian", async || {
        let now = cluster.members[standby].postmaster()?;
        (now != postmaster && guardian(&cluster, standby) != old).then_some(())
    })
    .await;
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    assert_eq!(term(&cluster, leader).await, began, "a standby's guardian is none of the leader's business");
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));

    let (old, postmaster) = (guardian(&cluster, leader), cluster.members[leader].postmaster().unwrap());
    send(old, Signal::SIGKILL);
    let next = cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap();
    writes(&writer).await;
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);
    assert_ne!(cluster.members[leader].postmaster(), Some(postmaster));
    assert_ne!(guardian(&cluster, leader), old);
    assert_eq!(term(&cluster, next).await, began + 1);
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_backend_hands_over_and_a_crash_loop_ends() {
    let mut cluster = Cluster::prepare(options()).unwrap();
    for member in 0..3 {
        configure(&cluster, member, "[crash]\nmax_restarts = 1");
        cluster.start_agent(member).unwrap();
    }
    let (cluster, leader, writer) = played(cluster).await;
    let began = term(&cluster, leader).await;

    // restart_after_crash = off: PostgreSQL ends itself instead of coming back read-write.
    let session = cluster.connect(leader, &Login::app()).await.unwrap();
    let backend: i32 = session.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    send(backend, Signal::SIGKILL);
    let next = cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap();
    writes(&writer).await;
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);
    assert_eq!(term(&cluster, next).await, began + 1);

    // A member that never led: its crashes are its own.
    let standby = (0..3).find(|index| *index != leader && *index != next).unwrap();
    let name = cluster.members[standby].name.clone();
    let stays_down = loop {
        let postmaster = cluster.members[standby].postmaster().unwrap();
        cluster.kill_postmaster(standby).unwrap();
        let again = until("PostgreSQL starts again, or the agent says that it does not", async || {
            match cluster.members[standby].postmaster() {
                Some(now) => (now != postmaster).then_some(None),
                None => Some(status(&cluster, standby).await).filter(|s| rule(s).contains("crash_loop")).map(Some),
            }
        })
        .await;
        if let Some(status) = again {
            break status;
        }
    };
    assert!(reason(&stays_down).contains(&format!("pgvigil restart {name}")), "{}", reason(&stays_down));
    let (code, body) = ask(&cluster, &["restart", &name]).await;
    assert_eq!((code, body["state"].as_str()), (0, Some("done")), "{body}");
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);
    ends_well(cluster, writer).await;
}
