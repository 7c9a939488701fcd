//! What members say of themselves decides who leads.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn tags_choose_the_next_leader() {
    let (mut cluster, leader, writer) = playing(options()).await;
    let (low, high) = ((leader + 1) % 3, (leader + 2) % 3);
    // A configuration counts from the agent's next start; PostgreSQL runs on meanwhile.
    configure(&cluster, low, "[tags]\nnofailover = true");
    configure(&cluster, high, "[tags]\nfailover_priority = 5");
    for standby in [low, high] {
        cluster.members[standby].signal_agent(Signal::SIGUSR1);
        cluster.agent_gone(standby, PATIENCE).await.unwrap();
        cluster.start_agent(standby).unwrap();
    }
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    let low_name = cluster.members[low].name.clone();
    until_status(&cluster, leader, "the tag in the store", |status| {
        let members = status["members"].as_array().into_iter().flatten();
        members.into_iter().any(|m| m["name"] == low_name.as_str() && m["tags"]["nofailover"] == true)
    })
    .await;

    let (code, body) = ask(&cluster, &["switchover", "--to", &low_name]).await;
    assert_eq!(code, 4, "{body}");
    assert!(body.to_string().contains("nofailover"), "{body}");

    cluster.kill_postmaster(leader).unwrap();
    assert_eq!(cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap(), high);
    writes(&writer).await;
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), high);

    synchronous(&cluster, high).await;
    // Agent and PostgreSQL gone: no release by name, the members choose by themselves.
    cluster.kill_member(high);
    cluster.agent_gone(high, PATIENCE).await.unwrap();
    assert_eq!(cluster.wait_for_primary_but(high, PATIENCE).await.unwrap(), leader);
    writes(&writer).await;

    // Without node `high`, which is down: the two others are all that is needed.
    synchronous(&cluster, leader).await;
    // Only the member that must not lead is left: nobody leads, and it says why.
    let waits = {
        cluster.kill_member(leader);
        cluster.agent_gone(leader, PATIENCE).await.unwrap();
        until_status(&cluster, low, "a reason not to stand", |status| rule(status) == "takeover.wait").await
    };
    assert!(reason(&waits).contains("nofailover"), "{}", reason(&waits));
    assert_eq!(cluster.primary().await, None);
    let (code, body) = ask(&cluster, &["explain"]).await;
    assert_eq!(code, 0, "{body}");
    assert!(body.to_string().contains("nofailover"), "{body}");

    cluster.start_agent(leader).unwrap();
    cluster.start_agent(high).unwrap();
    let next = cluster.healthy(PATIENCE).await.unwrap();
    assert_ne!(next, low);
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_lead_copies_what_it_lacks_from_who_must_not() {
    let mut cluster = Cluster::prepare(options()).unwrap();
    for member in 0..3 {
        if member == 2 {
            configure(&cluster, member, "[tags]\nnofailover = true");
        }
        cluster.start_agent(member).unwrap();
    }
    let (mut cluster, mut leader, mut writer) = played(cluster).await;
    if leader == 2 {
        // The first leader is whoever created the cluster.
        let to = cluster.members[0].name.clone();
        let (code, body) = ask(&cluster, &["switchover", "--to", &to]).await;
        assert_eq!(code, 0, "{body}");
        leader = cluster.healthy(PATIENCE).await.unwrap();
    }
    writer.stop().await;
    let behind = 1 - leader;
    synchronous(&cluster, leader).await;

    // Its walsender is held: what is acknowledged from here on is on the leader and on who must not lead.
    let superuser = cluster.connect(leader, &Login::superuser()).await.unwrap();
    let sender = "SELECT pid FROM pg_stat_replication WHERE application_name LIKE $1";
    let of = format!("{}_%", cluster.members[behind].name);
    let sender: i32 = superuser.query_one(sender, &[&of]).await.unwrap().get(0);
    kill(Pid::from_raw(sender), Signal::SIGSTOP).unwrap();
    let session = cluster.connect(leader, &Login::app()).await.unwrap();
    for id in [-1, -2, -3] {
        write_row(&session, id).await.unwrap();
    }
    assert!(!has_row(&cluster, behind, -1).await);
    cluster.kill_member(leader);
    cluster.agent_gone(leader, PATIENCE).await.unwrap();

    assert_eq!(cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap(), behind);
    for id in [-1, -2, -3] {
        assert!(has_row(&cluster, behind, id).await, "S2: acknowledged, and on who must not lead");
    }
    let log = std::fs::read_to_string(cluster.members[behind].agent_log()).unwrap();
    assert!(log.contains("must not lead"), "it copied");
    cluster.start_agent(leader).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), behind);
    let again = cluster.pinned_writer();
    ends_well(cluster, again).await;
}
