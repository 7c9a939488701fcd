//! Faults of the store: keys that people or other programs wrote, members of etcd that die.

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use nix::sys::signal::Signal;
use pgvigil::demo::Cluster;

use super::*;

/// An etcd client of a stranger.
struct Stranger {
    client: etcd_client::Client,
    root: String,
}

impl Stranger {
    async fn of(cluster: &Cluster) -> Stranger {
        Stranger::at(cluster, &[0, 1, 2]).await
    }

    async fn at(cluster: &Cluster, members: &[usize]) -> Stranger {
        let endpoints = cluster.etcd.endpoints();
        let endpoints: Vec<&String> = members.iter().map(|index| &endpoints[*index]).collect();
        let client = etcd_client::Client::connect(endpoints, None).await.unwrap();
        Stranger { client, root: format!("/pgvigil/{}/", cluster.name) }
    }

    async fn put(&mut self, key: &str, value: &str) {
        self.client.put(format!("{}{key}", self.root), value, None).await.unwrap();
    }

    async fn delete(&mut self, key: &str) {
        self.client.delete(format!("{}{key}", self.root), None).await.unwrap();
    }

    async fn delete_all(&mut self) {
        let prefix = etcd_client::DeleteOptions::new().with_prefix();
        self.client.delete(self.root.clone(), Some(prefix)).await.unwrap();
    }

    /// Only where nobody was faster: an old value must not roll back what its owner has written meanwhile.
    async fn put_back(&mut self, key: &str, garbage: &str, value: Option<&str>) {
        let key = format!("{}{key}", self.root);
        let back = match value {
            Some(value) => TxnOp::put(key.clone(), value, None),
            None => TxnOp::delete(key.clone(), None),
        };
        let still = Compare::value(key, CompareOp::Equal, garbage);
        self.client.txn(Txn::new().when([still]).and_then([back])).await.unwrap();
    }

    async fn get(&mut self, key: &str) -> Option<String> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let found = loop {
            match self.client.get(format!("{}{key}", self.root), None).await {
                Ok(found) => break found,
                // etcd elects a leader of its own: asked again until it has one.
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        found.kvs().first().map(|kv| kv.value_str().unwrap_or_default().to_owned())
    }
}

const GARBAGE: [&str; 2] = ["\u{1}garbage", "{\"v\": 1, \"term\": [], \"members\": 7}"];

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_the_store_promotes_nobody() {
    let (mut cluster, leader, writer) = playing(options()).await;
    let name = cluster.members[leader].name.clone();
    let standby = (leader + 1) % 3;
    let standby_name = cluster.members[standby].name.clone();
    let postmaster = cluster.members[leader].postmaster();
    let mut stranger = Stranger::of(&cluster).await;
    let keys = [
        "leader".to_owned(),
        "lease".to_owned(),
        "sync".to_owned(),
        "timelines/2".to_owned(),
        format!("members/{name}"),
        format!("members/{standby_name}"),
        format!("seals/{standby_name}"),
        "membership".to_owned(),
        "init".to_owned(),
    ];
    for key in &keys {
        for garbage in GARBAGE {
            let before = stranger.get(key).await;
            stranger.put(key, garbage).await;
            // Written again by whoever owns it, or shown until a person mends it.
            let mended = until(&format!("`{garbage}` in {key} is mended or shown"), async || {
                if stranger.get(key).await.is_some_and(|now| now != garbage) {
                    return Some(true);
                }
                let said = status(&cluster, leader).await;
                let text = format!("{} {}", warnings(&said), reason(&said));
                let named = text.contains(&format!("{key}: ")) || text.contains(&format!("`{key}`"));
                named.then_some(false)
            })
            .await;
            println!("{key}: {}", if mended { "mended" } else { "shown" });
            writes(&writer).await;
            if !mended {
                stranger.put_back(key, garbage, before.as_deref()).await;
            }
            assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader, "{key}");
            assert_eq!(cluster.members[leader].postmaster(), postmaster, "{key}");
        }
    }
    // All of them at once: what only the sitting leader knows is written again by it.
    stranger.delete_all().await;
    for key in ["leader", "sync", "membership", "init"] {
        until(&format!("the leader writes {key} again"), async || stranger.get(key).await).await;
    }
    stranger.delete("leader").await;
    until("the leader writes its record again", async || stranger.get("leader").await).await;
    writes(&writer).await;
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));
    for member in &mut cluster.members {
        assert_eq!(member.agent_ended(), None, "no agent ended");
    }
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_lost_for_less_than_the_lease_is_nobodys_business() {
    let options = Options { lease: "ttl = \"8s\"".to_owned(), ..options() };
    let (mut cluster, leader, writer) = playing(options).await;
    let (began, postmaster) = (term(&cluster, leader).await, cluster.members[leader].postmaster());

    for member in 0..3 {
        // SIGKILL: whoever asked it has no answer and no goodbye.
        cluster.etcd.signal(member, Signal::SIGKILL);
        cluster.etcd.stop_member(member).await;
        writes(&writer).await;
        let mut stranger = Stranger::at(&cluster, &[(member + 1) % 3]).await;
        let seq = stranger.get("lease").await;
        until("a renewal without it", async || (stranger.get("lease").await != seq).then_some(())).await;
        cluster.etcd.start_member(member).unwrap();
    }

    let renewals = async || status(&cluster, leader).await["counters"]["renewals"].as_u64();
    let before = until("the leader's renewals", renewals).await;
    let stopped = Instant::now();
    for member in 0..3 {
        cluster.etcd.signal(member, Signal::SIGSTOP);
    }
    // Less than ttl minus kill budget, long enough for every renewal in it to fail.
    tokio::time::sleep(Duration::from_secs(4)).await;
    for member in 0..3 {
        cluster.etcd.signal(member, Signal::SIGCONT);
    }
    until("renewals go on", async || renewals().await.filter(|now| *now > before)).await;
    assert!(writer.outage(stopped) < Duration::from_secs(2), "{:?}", writer.outage(stopped));
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), leader);
    assert_eq!((term(&cluster, leader).await, cluster.members[leader].postmaster()), (began, postmaster));
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));
    ends_well(cluster, writer).await;
}
