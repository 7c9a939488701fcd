//! Everything was off: whoever comes back first, with whomever missing.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgvigil::demo::sql::Login;
use pgvigil::demo::{Cluster, Options};

use super::*;

/// Agents, guardians, PostgreSQL, all at once; nothing says good-bye.
async fn power_cut(cluster: &mut Cluster) {
    for member in 0..cluster.members.len() {
        cluster.kill_member(member);
    }
    for member in 0..cluster.members.len() {
        cluster.agent_gone(member, PATIENCE).await.unwrap();
    }
}

async fn power_cut_of_the_store(cluster: &mut Cluster) {
    for member in 0..cluster.etcd.members.len() {
        cluster.etcd.signal(member, Signal::SIGKILL);
    }
    for member in 0..cluster.etcd.members.len() {
        cluster.etcd.stop_member(member).await;
        cluster.etcd.start_member(member).unwrap();
    }
}

fn names<'a>(cluster: &'a Cluster, members: &[usize]) -> Vec<&'a str> {
    members.iter().map(|member| cluster.members[*member].name.as_str()).collect()
}

/// What this member says it waits for, as soon as it names all of `members`.
async fn names_them(cluster: &Cluster, member: usize, members: &[usize]) {
    let wanted = names(cluster, members);
    let all_in = |text: &str| wanted.iter().all(|name| text.contains(name));
    until_status(cluster, member, "the names of the missing", |status| all_in(reason(status))).await;
    until("the names in `explain`", async || {
        let (_, body) = ask(cluster, &["explain"]).await;
        all_in(body["failover"]["says"].as_str().unwrap_or_default()).then_some(())
    })
    .await;
    assert_eq!(cluster.primary().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_two_of_three_come_back_from_nothing_without_a_person() {
    let (mut cluster, mut leader, writer) = playing(options()).await;
    // The last leader missing, then first, then last.
    for round in 0..3 {
        synchronous(&cluster, leader).await;
        let (b, c) = ((leader + 1) % 3, (leader + 2) % 3);
        let (first, second, third) = [(b, c, leader), (leader, b, c), (c, leader, b)][round];
        power_cut(&mut cluster).await;
        if round == 1 {
            power_cut_of_the_store(&mut cluster).await;
        }
        cluster.start_agent(first).unwrap();
        names_them(&cluster, first, &[second, third]).await;
        cluster.start_agent(second).unwrap();
        let next = cluster.wait_for_primary(PATIENCE).await.unwrap();
        assert_ne!(next, third, "it is off");
        writes(&writer).await;
        cluster.start_agent(third).unwrap();
        leader = cluster.healthy(PATIENCE).await.unwrap();
        assert_eq!(lost(&cluster, &writer).await, Vec::<i64>::new(), "round {round}");
    }
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_lost_at_once_are_waited_for_by_name_or_given_up_by_a_person() {
    let (mut cluster, leader, mut writer) = playing(options()).await;
    synchronous(&cluster, leader).await;
    let (gone, left) = ((leader + 1) % 3, (leader + 2) % 3);
    writer.stop().await;
    for member in [leader, gone] {
        cluster.kill_member(member);
    }
    for member in [leader, gone] {
        cluster.agent_gone(member, PATIENCE).await.unwrap();
    }
    names_them(&cluster, left, &[leader, gone]).await;

    // Enough are back: without a person.
    cluster.start_agent(gone).unwrap();
    let next = cluster.wait_for_primary(PATIENCE).await.unwrap();
    cluster.start_agent(leader).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);

    // Not enough come back: a person goes past the claim, having seen what it costs.
    synchronous(&cluster, next).await;
    let left = (next + 1) % 3;
    let others: Vec<usize> = (0..3).filter(|member| *member != left).collect();
    for member in &others {
        cluster.kill_member(*member);
    }
    for member in &others {
        cluster.agent_gone(*member, PATIENCE).await.unwrap();
    }
    names_them(&cluster, left, &others).await;
    let (_, body) = ask(&cluster, &["explain"]).await;
    let left_name = cluster.members[left].name.clone();
    assert_eq!(body["failover"]["forced"]["winner"], left_name.as_str(), "{body}");
    let off = cluster.members[next].name.clone();
    let (code, body) = ask(&cluster, &["failover", "--force", "--off", &off, "--yes"]).await;
    assert_eq!(code, 0, "{body}");
    assert_eq!(cluster.wait_for_primary(PATIENCE).await.unwrap(), left);
    for member in others {
        cluster.start_agent(member).unwrap();
    }
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), left);
    let again = cluster.pinned_writer();
    ends_well(cluster, again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn async_waits_for_the_last_primary_and_a_person_decides_with_the_loss_before_him() {
    let mut cluster = Cluster::prepare(Options { durability: "async".to_owned(), ..options() }).unwrap();
    for member in 0..3 {
        configure(&cluster, member, "[cold_start]\nwait = \"5s\"");
        cluster.start_agent(member).unwrap();
    }
    let (mut cluster, first, mut writer) = played(cluster).await;
    writer.stop().await;
    let (b, c) = ((first + 1) % 3, (first + 2) % 3);
    let first_name = cluster.members[first].name.clone();

    // On the primary alone, and then everything is off.
    let strand = async |cluster: &Cluster, primary: usize, ids: &[i64]| {
        let superuser = cluster.connect(primary, &Login::superuser()).await.unwrap();
        let session = cluster.connect(primary, &Login::app()).await.unwrap();
        for row in &superuser.query("SELECT pid FROM pg_stat_replication", &[]).await.unwrap() {
            kill(Pid::from_raw(row.get("pid")), Signal::SIGSTOP).unwrap();
        }
        for id in ids {
            write_row(&session, *id).await.unwrap();
        }
    };
    strand(&cluster, first, &[-1, -2]).await;
    power_cut(&mut cluster).await;
    cluster.start_agent(b).unwrap();
    cluster.start_agent(c).unwrap();
    until_status(&cluster, b, "the last primary's name", |status| {
        reason(status).contains("everything was off") && reason(status).contains(&first_name)
    })
    .await;
    assert_eq!(cluster.primary().await, None);
    // It is back in time: nothing is lost.
    cluster.start_agent(first).unwrap();
    assert_eq!(cluster.wait_for_primary(PATIENCE).await.unwrap(), first);
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), first);
    assert!(has_row(&cluster, first, -1).await && has_row(&cluster, b, -2).await);

    strand(&cluster, first, &[-3, -4, -5]).await;
    power_cut(&mut cluster).await;
    cluster.start_agent(b).unwrap();
    cluster.start_agent(c).unwrap();
    until_status(&cluster, b, "the question", |status| {
        reason(status).contains("--force") && reason(status).contains("bytes behind")
    })
    .await;
    let text = pgvigil(&["status", "--url", &cluster.members[b].url()]).await;
    assert!(String::from_utf8_lossy(&text.stdout).contains("bytes behind"), "{text:?}");
    let (code, body) = ask(&cluster, &["failover", "--force", "--yes"]).await;
    assert_eq!(code, 0, "{body}");
    let next = cluster.wait_for_primary(PATIENCE).await.unwrap();
    assert_ne!(next, first);
    assert!(!has_row(&cluster, next, -3).await);

    // The old one is back: what it alone had is listed, once, where everybody sees it.
    cluster.start_agent(first).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);
    let told = until_status(&cluster, next, "what only the old primary had", |status| {
        warnings(status).contains(&format!("{first_name} had 3 transactions"))
    })
    .await;
    assert_eq!(warnings(&told).matches("went on without").count(), 1, "{}", warnings(&told));
    let again = cluster.pinned_writer();
    ends_well(cluster, again).await;
}
