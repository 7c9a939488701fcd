//! The demo's whole script on real processes: no row lost, never two members that take writes, nothing left behind.

use std::path::PathBuf;

use pgvigil::demo::scenarios::{Scenario, Stage};
use pgvigil::demo::{Cluster, Options};

#[tokio::test(flavor = "multi_thread")]
async fn the_script_loses_no_row_and_leaves_nothing_behind() {
    let options = Options {
        binary: Some(PathBuf::from(env!("CARGO_BIN_EXE_pgvigil"))),
        // Half of the default lease: the same rules, half the waiting.
        lease: "ttl = \"4s\"\nheartbeat = \"500ms\"\nrenewal_timeout = \"1200ms\"".to_owned(),
        etcd_try_timeout: "500ms".to_owned(),
        ..Options::default()
    };
    let cluster = Cluster::start(options).await.unwrap();
    let base = cluster.base.clone();
    let (mut stage, ready) = match Stage::set(cluster).await {
        Ok(set) => set,
        Err((error, _cluster)) => panic!("{error}"),
    };
    println!("ready after {ready:?}");
    for scenario in Scenario::ALL {
        let outcome = stage.run(scenario).await;
        println!("{outcome:?}");
        assert!(outcome.ok, "{outcome:?}");
    }
    let Stage { cluster, writer, .. } = stage;
    drop(writer);
    let (left, kept) = cluster.shutdown().await;
    assert_eq!((left, kept), (0, None), "processes that had to be killed, files that stayed");
    assert!(!base.exists());
}
