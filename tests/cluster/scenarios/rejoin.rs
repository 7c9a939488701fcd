//! An old primary that has WAL of its own: rewound, or set aside and cloned; what only it had is listed (S5).

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgvigil::demo::sql::{Login, Session};
use pgvigil::demo::{Cluster, Options};

use super::*;

/// Nothing leaves this primary any more, although everybody looks connected.
async fn hold_walsenders(superuser: &Session) {
    let rows = superuser.query("SELECT pid FROM pg_stat_replication", &[]).await.unwrap();
    for row in &rows {
        kill(Pid::from_raw(row.get("pid")), Signal::SIGSTOP).unwrap();
    }
    assert!(rows.len() >= 2);
}

/// Lists of transactions that only this member had.
fn reports(cluster: &Cluster, member: usize) -> Vec<String> {
    let found = listing(&cluster.members[member].directory.join("state/diverged"));
    let lists = found.iter().filter(|(path, _)| path.ends_with("transactions.txt"));
    lists.map(|(path, _)| std::fs::read_to_string(path).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_an_old_primary_has_is_listed_and_never_deleted() {
    let mut cluster = Cluster::prepare(Options { durability: "async".to_owned(), ..options() }).unwrap();
    for member in 0..3 {
        // Whole segments are left behind below.
        configure(&cluster, member, "[election]\nmax_lag = \"256MB\"");
        cluster.start_agent(member).unwrap();
    }
    let (mut cluster, first, mut writer) = played(cluster).await;
    writer.stop().await;

    // async: acknowledged from the primary's disk alone, and the crash comes before anybody else has it.
    let superuser = cluster.connect(first, &Login::superuser()).await.unwrap();
    let session = cluster.connect(first, &Login::app()).await.unwrap();
    hold_walsenders(&superuser).await;
    for id in [-1, -2, -3] {
        write_row(&session, id).await.unwrap();
    }
    cluster.kill_postmaster(first).unwrap();
    let second = cluster.wait_for_primary_but(first, PATIENCE).await.unwrap();
    assert!(!has_row(&cluster, second, -1).await);
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), second);
    let lists = reports(&cluster, first);
    assert_eq!(lists.iter().map(|list| list.matches("COMMIT").count()).collect::<Vec<_>>(), [3], "{lists:?}");
    assert!(set_aside(&cluster, first).is_empty(), "rewound, not cloned");
    assert_eq!(lost(&cluster, &writer).await, Vec::<i64>::new());

    // A planned change of leader loses nothing in async either.
    let mut writer = cluster.pinned_writer();
    writes(&writer).await;
    let first_name = cluster.members[first].name.clone();
    let (code, body) = ask(&cluster, &["switchover", "--to", &first_name]).await;
    assert_eq!(code, 0, "{body}");
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), first);
    writes(&writer).await;
    assert_eq!(lost(&cluster, &writer).await, Vec::<i64>::new());
    assert_eq!(writer.two_primaries(), Vec::<String>::new());
    writer.stop().await;

    // Rewinding needs the WAL from the divergence on; it is gone, recovery needs none of it.
    let superuser = cluster.connect(first, &Login::superuser()).await.unwrap();
    let session = cluster.connect(first, &Login::app()).await.unwrap();
    hold_walsenders(&superuser).await;
    let segment = "SELECT pg_walfile_name(pg_current_wal_lsn())";
    let diverging: String = superuser.query_one(segment, &[]).await.unwrap().get(0);
    for id in [-4, -5] {
        write_row(&session, id).await.unwrap();
        superuser.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        superuser.batch_execute("CHECKPOINT").await.unwrap();
    }
    cluster.kill_member(first);
    cluster.agent_gone(first, PATIENCE).await.unwrap();
    let third = cluster.wait_for_primary_but(first, PATIENCE).await.unwrap();
    std::fs::remove_file(cluster.members[first].data_dir().join("pg_wal").join(&diverging)).unwrap();
    cluster.start_agent(first).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), third);
    let aside = set_aside(&cluster, first);
    assert_eq!(aside.len(), 1, "set aside, not deleted: {aside:?}");
    assert!(aside[0].join("global/pg_control").is_file());
    assert!(!has_row(&cluster, first, -4).await);
    let again = cluster.pinned_writer();
    ends_well(cluster, again).await;
}
