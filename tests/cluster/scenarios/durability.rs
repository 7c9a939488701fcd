//! What a commit is worth while standbys are away, and who may lead afterwards.

use pgvigil::demo::Options;
use pgvigil::demo::sql::Login;

use super::*;

const ALONE: i64 = -1;

fn others(primary: usize) -> [usize; 2] {
    [(primary + 1) % 3, (primary + 2) % 3]
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_of_a_lonely_primary_bind_the_next_leader() {
    let (mut cluster, primary, mut writer) = playing(options()).await;
    let name = cluster.members[primary].name.clone();
    for standby in others(primary) {
        cluster.stop_member(standby).await.unwrap();
    }
    let stopped = Instant::now();
    let session = cluster.connect(primary, &Login::app()).await.unwrap();
    write_row(&session, ALONE).await.unwrap();
    assert!(stopped.elapsed() < Duration::from_secs(5), "goes on after {:?}", stopped.elapsed());
    let degraded = status(&cluster, primary).await;
    assert_eq!(degraded["durability"]["degraded"], true, "published before anybody was told: {}", brief(&degraded));
    assert_eq!(degraded["durability"]["k"], 0);
    assert!(!warnings(&degraded).is_empty(), "visible without looking for it");

    writer.stop().await;
    cluster.kill_member(primary);
    cluster.agent_gone(primary, PATIENCE).await.unwrap();
    for standby in others(primary) {
        cluster.start_agent(standby).unwrap();
    }
    for standby in others(primary) {
        let waits = until_status(&cluster, standby, "a reason that names the old primary", |status| {
            status["leader"]["state"] == "silent" && rule(status) == "takeover.wait" && reason(status).contains(&name)
        })
        .await;
        assert_eq!(cluster.primary().await, None, "{}", brief(&waits));
    }
    cluster.start_agent(primary).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), primary);
    assert!(has_row(&cluster, primary, ALONE).await);
    until_status(&cluster, primary, "synchronous again", |s| s["durability"]["degraded"] == false).await;
    let writer_again = cluster.pinned_writer();
    writes(&writer_again).await;
    assert_eq!(lost(&cluster, &writer).await, Vec::<i64>::new());
    ends_well(cluster, writer_again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_waits_for_a_standby() {
    let options = Options { durability: "strict".to_owned(), ..options() };
    let (mut cluster, primary, writer) = playing(options).await;
    for standby in others(primary) {
        cluster.stop_member(standby).await.unwrap();
    }
    let session = cluster.connect(primary, &Login::app()).await.unwrap();
    let row = write_row(&session, ALONE);
    tokio::pin!(row);
    // Longer than sync.max_stall, after which `sync` would go on.
    let waited = tokio::time::timeout(Duration::from_secs(5), &mut row).await;
    assert!(waited.is_err(), "acknowledged although no standby is there: {waited:?}");
    let stalled = status(&cluster, primary).await;
    assert_eq!(stalled["durability"]["stalled"], true, "{}", brief(&stalled));
    assert_eq!(stalled["leader"]["member"], cluster.members[primary].name.as_str());

    cluster.start_agent(others(primary)[0]).unwrap();
    let returned = tokio::time::timeout(PATIENCE, &mut row).await.expect("goes on with one standby");
    assert_eq!(returned, Ok(1));
    cluster.start_agent(others(primary)[1]).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), primary);
    ends_well(cluster, writer).await;
}
