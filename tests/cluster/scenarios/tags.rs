//! What members say of themselves decides who leads.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn tags_choose_the_next_leader() {
    let (mut cluster, leader, writer) = playing(options()).await;
    let (low, high) = ((leader + 1) % 3, (leader + 2) % 3);
    // A configuration counts from the agent's next start; PostgreSQL runs on meanwhile.
    configure(&cluster, low, "[tags]\nnofailover = true");
    configure(&cluster, high, "[tags]\nfailover_priority = 5");
    for standby in [low, high] {
        cluster.members[standby].signal_agent(nix::sys::signal::Signal::SIGUSR1);
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
