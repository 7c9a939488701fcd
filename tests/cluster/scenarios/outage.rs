//! etcd is lost, the cluster is not; and etcd comes back other than it was. Real etcd, agents and PostgreSQL.

use pgvigil::demo::Cluster;

use super::*;

/// Longer than several leases of these tests: only promises can hold so long.
const AWAY: Duration = Duration::from_secs(30);

async fn etcd_away(cluster: &mut Cluster) {
    cluster.etcd.stop().await;
}

fn etcd_back(cluster: &mut Cluster) {
    (0..3).for_each(|index| cluster.etcd.start_member(index).unwrap());
}

/// The leader says that it holds its term by promises.
async fn promised(cluster: &Cluster, leader: usize) {
    until_status(cluster, leader, "held by promises", |s| reason(s).contains("is held by promises of")).await;
}

/// Renewals go on, and nobody is asked for promises any more.
async fn renewed(cluster: &Cluster, leader: usize) {
    until_status(cluster, leader, "renewals go on", |s| rule(s) == "leader" && s["promises"].is_null()).await;
}

/// Everything was written again under a higher term, the others believe it, and renewals are enough again.
async fn made_good(cluster: &Cluster, leader: usize, before: u64) {
    until_status(cluster, leader, "the store is made good", |s| s["leader"]["term"].as_u64() > Some(before)).await;
    renewed(cluster, leader).await;
    for index in 0..3 {
        until_status(cluster, index, "the store is believed", |s| !rule(s).starts_with("store.")).await;
    }
}

async fn nobody_else(cluster: &Cluster, leader: usize) {
    for (index, look) in cluster.look().await.iter().enumerate() {
        assert!(index == leader || !look.is_primary(), "{index} is a primary too: {}", look.node);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_etcd_lost_for_half_a_minute_costs_no_write() {
    let (mut cluster, leader, writer) = playing(options()).await;
    let (began, postmaster) = (term(&cluster, leader).await, cluster.members[leader].postmaster());
    let stopped = Instant::now();
    etcd_away(&mut cluster).await;
    promised(&cluster, leader).await;
    while stopped.elapsed() < AWAY {
        writes(&writer).await;
        nobody_else(&cluster, leader).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    etcd_back(&mut cluster);
    renewed(&cluster, leader).await;
    println!("longest gap between two acknowledged writes: {:?}", writer.outage(stopped));
    assert!(writer.outage(stopped) < Duration::from_secs(1), "{:?}", writer.outage(stopped));
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    assert_eq!((term(&cluster, leader).await, cluster.members[leader].postmaster()), (began, postmaster));
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_restarted_while_etcd_is_away_changes_nothing() {
    let (mut cluster, leader, writer) = playing(options()).await;
    let (began, postmaster) = (term(&cluster, leader).await, cluster.members[leader].postmaster());
    let stopped = Instant::now();
    etcd_away(&mut cluster).await;
    promised(&cluster, leader).await;
    cluster.kill_agent(leader);
    cluster.agent_gone(leader, PATIENCE).await.unwrap();
    cluster.start_agent(leader).unwrap();
    promised(&cluster, leader).await;
    // Longer than what was left of the deadline that the first agent wrote.
    tokio::time::sleep(Duration::from_secs(8)).await;
    writes(&writer).await;
    etcd_back(&mut cluster);
    renewed(&cluster, leader).await;
    assert!(writer.outage(stopped) < Duration::from_secs(1), "{:?}", writer.outage(stopped));
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    assert_eq!((term(&cluster, leader).await, cluster.members[leader].postmaster()), (began, postmaster));
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_etcd_nobody_is_elected_and_everybody_says_why() {
    let (mut cluster, leader, writer) = playing(options()).await;
    etcd_away(&mut cluster).await;
    promised(&cluster, leader).await;
    cluster.kill_member(leader);
    let died = Instant::now();
    while died.elapsed() < Duration::from_secs(10) {
        nobody_else(&cluster, leader).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let standby = (leader + 1) % 3;
    let said = status(&cluster, standby).await;
    assert!(reason(&said).contains("the store cannot be read"), "{}", reason(&said));
    etcd_back(&mut cluster);
    let next = cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap();
    writes(&writer).await;
    cluster.start_agent(leader).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_etcd_and_without_promises_the_primary_ends_by_its_deadline() {
    let (mut cluster, leader, writer) = playing(options()).await;
    etcd_away(&mut cluster).await;
    promised(&cluster, leader).await;
    // The standbys stream on: only their agents, who would promise, are gone.
    let gone = Instant::now();
    for standby in [(leader + 1) % 3, (leader + 2) % 3] {
        cluster.kill_agent(standby);
    }
    until("the guardian ends PostgreSQL", async || cluster.members[leader].postmaster().is_none().then_some(())).await;
    // ttl 4 s, counted from before the last promise was asked for; kill budget 1 s.
    assert!(gone.elapsed() < Duration::from_millis(4_500), "{:?}", gone.elapsed());
    for standby in [(leader + 1) % 3, (leader + 2) % 3] {
        cluster.agent_gone(standby, PATIENCE).await.unwrap();
        cluster.start_agent(standby).unwrap();
    }
    etcd_back(&mut cluster);
    cluster.healthy(PATIENCE).await.unwrap();
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_etcd_costs_no_write() {
    let (mut cluster, leader, writer) = playing(options()).await;
    let (began, postmaster) = (term(&cluster, leader).await, cluster.members[leader].postmaster());
    let stopped = Instant::now();
    etcd_away(&mut cluster).await;
    (0..3).for_each(|index| cluster.etcd.wipe_member(index).unwrap());
    etcd_back(&mut cluster);
    made_good(&cluster, leader, began).await;
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    println!("longest gap between two acknowledged writes: {:?}", writer.outage(stopped));
    assert!(writer.outage(stopped) < Duration::from_secs(1), "{:?}", writer.outage(stopped));
    assert!(term(&cluster, leader).await > began);
    assert_eq!(cluster.members[leader].postmaster(), postmaster);
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));
    // What was written again is a cluster like before.
    synchronous(&cluster, leader).await;
    cluster.kill_postmaster(leader).unwrap();
    cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap();
    writes(&writer).await;
    cluster.healthy(PATIENCE).await.unwrap();
    ends_well(cluster, writer).await;
}

/// A backup of before a change of leader, restored as the same etcd cluster and as a new one.
#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_restored_from_an_old_backup_costs_no_write() {
    let (mut cluster, first, writer) = playing(options()).await;
    let backup = cluster.base.join("backup.db");
    cluster.etcd.snapshot(&backup).unwrap();
    cluster.kill_postmaster(first).unwrap();
    let leader = cluster.wait_for_primary_but(first, PATIENCE).await.unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    synchronous(&cluster, leader).await;
    for new_id in [false, true] {
        let (began, postmaster) = (term(&cluster, leader).await, cluster.members[leader].postmaster());
        let stopped = Instant::now();
        let errors = writer.error_count();
        etcd_away(&mut cluster).await;
        (0..3).for_each(|index| cluster.etcd.restore_member(index, &backup, new_id).unwrap());
        etcd_back(&mut cluster);
        made_good(&cluster, leader, began).await;
        assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader, "new id: {new_id}");
        println!("new id {new_id}: longest gap between two acknowledged writes: {:?}", writer.outage(stopped));
        assert!(writer.outage(stopped) < Duration::from_secs(1), "{:?}", writer.outage(stopped));
        assert!(term(&cluster, leader).await > began);
        assert_eq!(cluster.members[leader].postmaster(), postmaster);
        assert_eq!(writer.error_count(), errors);
    }
    ends_well(cluster, writer).await;
}

/// Nobody leads and etcd is empty: nothing happens by itself, until a person types what one member shows.
#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_etcd_without_a_leader_waits_for_a_person() {
    let (mut cluster, leader, writer) = playing(options()).await;
    for member in 0..3 {
        cluster.kill_member(member);
    }
    for member in 0..3 {
        cluster.agent_gone(member, PATIENCE).await.unwrap();
    }
    etcd_away(&mut cluster).await;
    (0..3).for_each(|index| cluster.etcd.wipe_member(index).unwrap());
    etcd_back(&mut cluster);
    for member in 0..3 {
        cluster.start_agent(member).unwrap();
    }
    let name = cluster.members[leader].name.clone();
    let command = format!("`pgvigil accept-store {name} --position ");
    let said = until_status(&cluster, leader, "where it stands", |s| reason(s).contains(&command)).await;
    let position = reason(&said).split_once(&command).and_then(|(_, rest)| rest.split_once('`')).unwrap().0.to_owned();
    assert_eq!(cluster.primary().await, None);
    let (code, body) = ask(&cluster, &["accept-store", &name, "--position", "1@0/1", "--yes"]).await;
    assert_eq!(code, 4, "{body}");
    let (code, body) = ask(&cluster, &["accept-store", &name, "--position", &position, "--yes"]).await;
    assert_eq!((code, body["state"].as_str()), (0, Some("done")), "{body}");
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    ends_well(cluster, writer).await;
}
