//! What a person can ask for, through the command line: exit codes and JSON.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn operations_are_done_or_refused_with_a_reason() {
    let (mut cluster, leader, mut writer) = playing(options()).await;
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    let name = |member: usize| format!("node-{}", ["a", "b", "c"][member]);
    let began = term(&cluster, leader).await;

    // Refused: nothing was changed, and the sentence says why.
    for (arguments, word) in [
        (vec!["switchover", "--to", "nobody"], "nobody"),
        (vec!["switchover", "--to", &name(leader)], "leads already"),
        (vec!["failover", "--yes", "--to", &name(leader)], "leads already"),
        (vec!["reinit", "--yes", &name(leader)], "switch over first"),
        (vec!["restart", "nobody"], "nobody"),
        (vec!["reinit", "--yes", "nobody"], "nobody"),
    ] {
        let (code, body) = ask(&cluster, &arguments).await;
        assert_eq!((code, body["exit"].as_i64()), (4, Some(4)), "{arguments:?}: {body}");
        assert!(body["error"].as_str().unwrap_or_default().contains(word), "{arguments:?}: {body}");
        assert!(!body["hint"].as_str().unwrap_or_default().is_empty(), "{arguments:?}: {body}");
    }
    // Nobody is there to be asked: a wrong command line, nothing was tried.
    let (code, _) = ask(&cluster, &["reinit", &name(one)]).await;
    assert_eq!(code, 2);
    assert_eq!(term(&cluster, leader).await, began);
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));

    let postmaster = cluster.members[one].postmaster();
    let (code, body) = ask(&cluster, &["restart", &name(one)]).await;
    assert_eq!((code, body["state"].as_str()), (0, Some("done")), "{body}");
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    assert_ne!(cluster.members[one].postmaster(), postmaster);

    assert!(set_aside(&cluster, one).is_empty());
    let (code, body) = ask(&cluster, &["reinit", "--yes", &name(one)]).await;
    assert_eq!((code, body["state"].as_str()), (0, Some("done")), "{body}");
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    until("the old data beside the new", async || (set_aside(&cluster, one).len() == 1).then_some(())).await;

    // The leader's PostgreSQL in place: the same member leads the next term.
    synchronous(&cluster, leader).await;
    let (code, body) = ask(&cluster, &["restart", &name(leader)]).await;
    assert_eq!((code, body["state"].as_str()), (0, Some("done")), "{body}");
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);

    synchronous(&cluster, leader).await;
    let (code, body) = ask(&cluster, &["switchover", "--to", &name(two)]).await;
    assert_eq!((code, body["state"].as_str()), (0, Some("done")), "{body}");
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), two);

    // Two of three gone: explain says whom it waits for, and failover cannot do what is not safe.
    writes(&writer).await;
    writer.stop().await;
    synchronous(&cluster, two).await;
    for member in [leader, two] {
        cluster.kill_member(member);
        cluster.agent_gone(member, PATIENCE).await.unwrap();
    }
    until_status(&cluster, one, "a reason to wait", |status| rule(status) == "takeover.wait").await;
    let (code, body) = ask(&cluster, &["explain"]).await;
    assert_eq!((code, body["member"].as_str()), (0, Some(name(one).as_str())), "{body}");
    assert!(body["reason"].as_str().unwrap_or_default().contains("waiting for"), "{body}");
    let (code, body) = ask(&cluster, &["failover", "--yes", "--to", &name(one), "--wait", "2"]).await;
    assert_eq!(code, 5, "asked, and no outcome within the time: {body}");
    assert_eq!(cluster.primary().await, None);
    let (code, _) = ask(&cluster, &["status"]).await;
    assert_eq!(code, 1, "there is no primary");

    for member in [leader, two] {
        cluster.start_agent(member).unwrap();
    }
    cluster.healthy(PATIENCE).await.unwrap();
    assert_eq!(lost(&cluster, &writer).await, Vec::<i64>::new());
    let again = cluster.pinned_writer();
    ends_well(cluster, again).await;
}
