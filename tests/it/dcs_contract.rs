//! The store's contract: the same cases against the store in memory and a real etcd of three members; then what only a real
//! etcd can do to us.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pgvigil::config::{EtcdConfig, Secret};
use pgvigil::core::Lsn;
use pgvigil::core::names::{ClusterName, Incarnation, MemberId, MemberName};
use pgvigil::core::records::*;
use pgvigil::core::timeline::{Term, TimelineId};
use pgvigil::dcs::etcd::EtcdDcs;
use pgvigil::dcs::memory::{Fault, Link, MemoryDcs, MemoryStore};
use pgvigil::ports::{Dcs, DcsError};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::support::etcd::{Certificates, Cluster, Options};
use crate::support::wait_until;

/// A deadline that nothing should need.
const WITHIN: Duration = Duration::from_secs(5);

fn cluster(name: &str) -> ClusterName {
    ClusterName::new(name).unwrap()
}

fn member(name: &str) -> MemberName {
    MemberName::new(name).unwrap()
}

fn leader(term: u64) -> LeaderRecord {
    LeaderRecord {
        holder: MemberId { name: member("node-a"), incarnation: Incarnation(1) },
        boot_id: "boot".to_owned(),
        term: Term(term),
        state: LeaderState::Held,
        ttl_ms: 8000,
        takeover_ms: 2000,
        taken: None,
        lsn: None,
        last: None,
        store_id: u64::MAX,
    }
}

fn lease(seq: u64) -> Write {
    Write::Lease(LeaseRecord { term: Term(1), seq, lsn: None })
}

fn membership(names: &[&str]) -> Write {
    Write::Membership(Membership { term: Term(1), members: names.iter().map(|n| member(n)).collect() })
}

fn reservation(parent: u32) -> TimelineReservation {
    TimelineReservation { term: Term(1), parent: TimelineId(parent), switch: Lsn(64) }
}

async fn commit(dcs: &dyn Dcs, transaction: Transaction) -> i64 {
    dcs.commit(&transaction, WITHIN).await.unwrap()
}

async fn read(dcs: &dyn Dcs) -> ClusterRecords {
    dcs.read(WITHIN).await.unwrap()
}

fn is_conflict(result: Result<i64, DcsError>) -> bool {
    matches!(result, Err(DcsError::Conflict { .. }))
}

async fn hint(changes: &mut watch::Receiver<u64>) {
    timeout(WITHIN, changes.changed()).await.expect("a hint that something changed").unwrap();
}

// === The contract ===

/// A store, with a person's way into it.
#[async_trait]
trait Store: Sync {
    fn agent(&self, cluster: &ClusterName) -> Box<dyn Dcs>;
    async fn put(&self, key: &str, value: &str);
    async fn delete(&self, key: &str);
    async fn value(&self, key: &str) -> Option<Vec<u8>>;
}

async fn json_value(store: &dyn Store, key: &str) -> Value {
    serde_json::from_slice(&store.value(key).await.unwrap()).unwrap()
}

/// Each case has a cluster of its own in the store.
macro_rules! contract {
    ($($case:ident),* $(,)?) => {
        async fn passes_the_contract(store: &dyn Store) {
            $(
                eprintln!("case: {}", stringify!($case));
                let name = format!("c-{}", stringify!($case).replace('_', "-"));
                $case(store, &cluster(&name[..name.len().min(26)])).await;
            )*
        }
    };
}

contract!(
    an_empty_store_has_nothing,
    absent_present_unreadable,
    created_once,
    conflict_changes_nothing,
    all_writes_or_none,
    revisions_tell_what_was_written,
    guarded_after_leader_moved,
    renewals_of_a_lease,
    unknown_fields_are_kept,
    deleted_keys_are_absent,
    another_cluster_is_not_seen,
    refusals_write_nothing,
    a_change_is_hinted_at,
    separate_handle_on_a_thread,
    garbage_in_every_key,
);

async fn an_empty_store_has_nothing(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let records = read(&*dcs).await;
    assert_ne!(records.store_id, 0);
    let ClusterRecords { store_id, revision, .. } = records;
    assert_eq!(records, ClusterRecords { store_id, revision, ..Default::default() });
}

async fn absent_present_unreadable(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let at = commit(&*dcs, Transaction::when(Key::Leader, 0).put(Write::Leader(leader(1)))).await;
    store.put(&format!("/pgvigil/{cluster}/sync"), "nonsense").await;
    store.put(&format!("/pgvigil/{cluster}/members/node-a"), r#"{"v": 7}"#).await;
    let records = read(&*dcs).await;
    assert_eq!(records.leader, Entry::Present(Keyed { revision: at, value: leader(1) }));
    assert_eq!(records.lease, Entry::Absent);
    assert!(matches!(&records.sync, Entry::Unreadable { revision, why } if *revision > at && why.contains("not JSON")));
    assert!(records.unreadable["members/node-a"].contains("format 7"));
    assert!(records.members.is_empty());
    // What cannot be read can be replaced by who names its revision.
    let claim =
        SyncClaim { mode: Durability::Sync, primary: leader(1).holder, members: BTreeSet::new(), k: 0, term: Term(1) };
    let repair = Transaction::when(Key::Sync, records.sync.revision()).put(Write::Sync(claim.clone()));
    commit(&*dcs, repair).await;
    assert_eq!(read(&*dcs).await.sync.value(), Some(&claim));
}

async fn created_once(store: &dyn Store, cluster: &ClusterName) {
    let (a, b) = (store.agent(cluster), store.agent(cluster));
    let create = |system| Transaction::when(Key::Init, 0).put(Write::Init(ClusterInit { system_identifier: system }));
    commit(&*a, create(u64::MAX)).await;
    assert!(is_conflict(b.commit(&create(2), WITHIN).await));
    assert_eq!(read(&*b).await.init.value(), Some(&ClusterInit { system_identifier: u64::MAX }));
    let reserve = |parent| {
        Transaction::when(Key::Timeline(TimelineId(4)), 0).put(Write::Timeline(TimelineId(4), reservation(parent)))
    };
    commit(&*b, reserve(3)).await;
    assert!(is_conflict(a.commit(&reserve(2), WITHIN).await));
    assert_eq!(read(&*a).await.timelines[&TimelineId(4)], reservation(3));
}

async fn conflict_changes_nothing(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let first = commit(&*dcs, Transaction::default().put(membership(&["node-a"]))).await;
    commit(&*dcs, Transaction::when(Key::Membership, first).put(membership(&["node-b"]))).await;
    let before = read(&*dcs).await;
    assert!(is_conflict(dcs.commit(&Transaction::when(Key::Membership, first).put(membership(&[])), WITHIN).await));
    assert!(is_conflict(dcs.commit(&Transaction::when(Key::Membership, 0).put(membership(&[])), WITHIN).await));
    assert!(is_conflict(dcs.commit(&Transaction::when(Key::Lease, first).put(lease(1)), WITHIN).await));
    let after = read(&*dcs).await;
    assert_eq!((after.membership, after.lease), (before.membership, Entry::Absent));
}

async fn all_writes_or_none(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let both = |seq| Transaction::when(Key::Leader, 0).put(Write::Leader(leader(1))).put(lease(seq));
    let at = commit(&*dcs, both(1)).await;
    assert!(is_conflict(dcs.commit(&both(2).and(Key::Lease, at), WITHIN).await));
    let records = read(&*dcs).await;
    assert_eq!((records.leader.revision(), records.lease.revision()), (at, at));
    assert_eq!(records.lease.value().unwrap().seq, 1);
}

async fn revisions_tell_what_was_written(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let before = read(&*dcs).await;
    let first = commit(&*dcs, Transaction::default().put(lease(1))).await;
    let second = commit(&*dcs, Transaction::default().put(lease(1))).await;
    assert!(before.revision < first && first < second, "{} {first} {second}", before.revision);
    let after = read(&*dcs).await;
    assert_eq!((after.lease.revision(), after.store_id), (second, before.store_id));
    assert!(after.revision >= second);
    // Nothing written: only the comparison counts.
    commit(&*dcs, Transaction::when(Key::Lease, second)).await;
    assert!(is_conflict(dcs.commit(&Transaction::when(Key::Lease, first), WITHIN).await));
}

async fn guarded_after_leader_moved(store: &dyn Store, cluster: &ClusterName) {
    let (old, new) = (store.agent(cluster), store.agent(cluster));
    let held = commit(&*old, Transaction::when(Key::Leader, 0).put(Write::Leader(leader(1)))).await;
    let renew = |seq| Transaction::when(Key::Leader, held).put(lease(seq));
    commit(&*old, renew(1)).await;
    let taken = commit(&*new, Transaction::when(Key::Leader, held).put(Write::Leader(leader(2)))).await;
    assert!(is_conflict(old.commit(&renew(2), WITHIN).await));
    // The same value again is another revision: nothing of the old leader gets through.
    commit(&*new, Transaction::when(Key::Leader, taken).put(Write::Leader(leader(1)))).await;
    assert!(is_conflict(old.commit(&renew(3), WITHIN).await));
    assert_eq!(read(&*old).await.lease.value().unwrap().seq, 1);
}

async fn renewals_of_a_lease(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let held = commit(&*dcs, Transaction::when(Key::Leader, 0).put(Write::Leader(leader(1)))).await;
    let mut last = held;
    for seq in 1..=20 {
        let at = commit(&*dcs, Transaction::when(Key::Leader, held).put(lease(seq))).await;
        assert!(at > last);
        last = at;
    }
    let records = read(&*dcs).await;
    assert_eq!((records.lease.value().unwrap().seq, records.leader.revision()), (20, held));
}

async fn unknown_fields_are_kept(store: &dyn Store, cluster: &ClusterName) {
    let key = format!("/pgvigil/{cluster}/lease");
    store.put(&key, r#"{"v": 1, "term": 1, "seq": 1, "lsn": null, "added_later": [1, {"x": "y"}]}"#).await;
    let dcs = store.agent(cluster);
    read(&*dcs).await;
    let expect = |seq| json!({"v": 1, "term": 1, "seq": seq, "lsn": null, "added_later": [1, {"x": "y"}]});
    commit(&*dcs, Transaction::default().put(lease(2))).await;
    assert_eq!(json_value(store, &key).await, expect(2));
    commit(&*dcs, Transaction::default().put(lease(3))).await;
    assert_eq!(json_value(store, &key).await, expect(3));
    // The lease keeper's handle never reads.
    commit(&*dcs.separate().await.unwrap(), Transaction::default().put(lease(4))).await;
    assert_eq!(json_value(store, &key).await, expect(4));
}

async fn deleted_keys_are_absent(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let at = commit(&*dcs, Transaction::default().put(lease(1))).await;
    let gone = commit(&*dcs, Transaction::when(Key::Lease, at).put(Write::Delete(Key::Lease))).await;
    assert!(gone > at);
    assert_eq!(read(&*dcs).await.lease, Entry::Absent);
    assert!(is_conflict(dcs.commit(&Transaction::when(Key::Lease, at).put(lease(2)), WITHIN).await));
    // Absent is what it has to be for "must not exist", and deleting it again is no error.
    commit(&*dcs, Transaction::when(Key::Lease, 0).put(Write::Delete(Key::Lease))).await;
    commit(&*dcs, Transaction::when(Key::Lease, 0).put(lease(3))).await;
    store.delete(&format!("/pgvigil/{cluster}/lease")).await;
    assert_eq!(read(&*dcs).await.lease, Entry::Absent);
}

async fn another_cluster_is_not_seen(store: &dyn Store, _: &ClusterName) {
    let (one, longer) = (store.agent(&cluster("same")), store.agent(&cluster("same-start")));
    commit(&*longer, Transaction::default().put(lease(1))).await;
    assert_eq!(read(&*one).await.lease, Entry::Absent);
    commit(&*one, Transaction::when(Key::Lease, 0).put(lease(2))).await;
    assert_eq!(read(&*longer).await.lease.value().unwrap().seq, 1);
}

async fn refusals_write_nothing(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let check = async |transaction: Transaction, expect: &str| {
        let error = dcs.commit(&transaction, WITHIN).await.unwrap_err();
        assert!(matches!(&error, DcsError::Refused { why, .. } if why.contains(expect)), "{error}");
    };
    let request = |id: &str, asked_by: &str| {
        Write::Request(Request {
            id: id.to_owned(),
            what: Operation::Failover { to: None },
            asked_by: asked_by.to_owned(),
            at_unix_ms: 0,
            timeout_ms: 0,
            began: None,
            outcome: None,
            force: None,
        })
    };
    let large = request("r", &"x".repeat(70_000));
    check(Transaction::default().put(lease(1)).put(large), "requests/r: ").await;
    check(Transaction::default().put(lease(1)).put(request("../leader", "x")), "not an id of a request").await;
    check(Transaction::default().put(lease(1)).put(Write::Delete(Key::Lease)), "written twice").await;
    assert_eq!(read(&*dcs).await.lease, Entry::Absent);
}

async fn a_change_is_hinted_at(store: &dyn Store, cluster: &ClusterName) {
    let (writer, reader) = (store.agent(cluster), store.agent(cluster));
    let mut changes = reader.changes();
    for seq in 1..=3 {
        changes.borrow_and_update();
        commit(&*writer, Transaction::default().put(lease(seq))).await;
        // Hints may come for other reasons too; this one comes in any case, and then the read shows it.
        hint(&mut changes).await;
        assert_eq!(read(&*reader).await.lease.value().unwrap().seq, seq);
    }
    changes.borrow_and_update();
    store.put(&format!("/pgvigil/{cluster}/leader"), "by a person").await;
    hint(&mut changes).await;
    changes.borrow_and_update();
    store.delete(&format!("/pgvigil/{cluster}/leader")).await;
    hint(&mut changes).await;
}

/// As the lease keeper has it: a thread of its own with a runtime of its own, which goes on when the first runtime is busy.
async fn separate_handle_on_a_thread(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let held = commit(&*dcs, Transaction::when(Key::Leader, 0).put(Write::Leader(leader(1)))).await;
    let separate = dcs.separate().await.unwrap();
    let keeper = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for seq in 1..=5 {
                commit(&*separate, Transaction::when(Key::Leader, held).put(lease(seq))).await;
            }
        });
    });
    // Joining blocks this test's only worker: the keeper needs nothing from it.
    keeper.join().unwrap();
    assert_eq!(read(&*dcs).await.lease.value().unwrap().seq, 5);
}

async fn garbage_in_every_key(store: &dyn Store, cluster: &ClusterName) {
    let dcs = store.agent(cluster);
    let names = [
        "init",
        "leader",
        "lease",
        "sync",
        "membership",
        "timelines/2",
        "timelines/x",
        "members/node-a",
        "members/B",
        "seals/node-a",
        "seals/",
        "requests/r",
        "requests/a b",
        "history/1",
        "history/-",
    ];
    for garbage in ["", "garbage", "{", "null", "[]", "{}", r#"{"v":1}"#, r#"{"v":99}"#, r#"{"v":1,"term":-1}"#] {
        for name in names {
            store.put(&format!("/pgvigil/{cluster}/{name}"), garbage).await;
        }
        store.put(&format!("/pgvigil/{cluster}/of-a-later-version"), garbage).await;
        let records = read(&*dcs).await;
        let unreadable: BTreeSet<&str> = records.unreadable.keys().map(String::as_str).collect();
        assert_eq!(unreadable, BTreeSet::from(names), "{garbage}");
        for entry in [records.init.revision(), records.leader.revision(), records.sync.revision()] {
            assert!(entry > 0);
        }
        assert!(records.members.is_empty() && records.seals.is_empty() && records.timelines.is_empty());
    }
    let revision = read(&*dcs).await.leader.revision();
    commit(&*dcs, Transaction::when(Key::Leader, revision).put(Write::Leader(leader(1)))).await;
    assert_eq!(read(&*dcs).await.leader(), Some(&leader(1)));
}

// === In memory ===

#[async_trait]
impl Store for MemoryStore {
    fn agent(&self, cluster: &ClusterName) -> Box<dyn Dcs> {
        Box::new(MemoryStore::agent(self, cluster))
    }

    async fn put(&self, key: &str, value: &str) {
        MemoryStore::put(self, key, value);
    }

    async fn delete(&self, key: &str) {
        MemoryStore::delete(self, key);
    }

    async fn value(&self, key: &str) -> Option<Vec<u8>> {
        MemoryStore::value(self, key)
    }
}

#[tokio::test]
async fn memory_passes_the_contract() {
    passes_the_contract(&MemoryStore::new(1)).await;
}

fn two_agents() -> (MemoryDcs, MemoryDcs) {
    let store = MemoryStore::new(1);
    (store.agent(&cluster("main")), store.agent(&cluster("main")))
}

#[tokio::test(start_paused = true)]
async fn memory_can_apply_a_write_and_lose_the_answer() {
    let (a, b) = two_agents();
    a.next(Fault::LoseReply, 1);
    let error = a.commit(&Transaction::default().put(lease(1)), WITHIN).await.unwrap_err();
    assert!(matches!(error, DcsError::Timeout { .. }), "{error}");
    assert_eq!(read(&b).await.lease.value().unwrap().seq, 1);
    // The one call only.
    commit(&a, Transaction::default().put(lease(2))).await;
}

#[tokio::test(start_paused = true)]
async fn memory_can_hold_a_write_back_until_later() {
    let (a, b) = two_agents();
    let first = commit(&b, Transaction::default().put(lease(1))).await;
    a.next(Fault::Hold, 2);
    let guarded = Transaction::when(Key::Lease, first).put(lease(2));
    a.commit(&guarded, WITHIN).await.unwrap_err();
    a.commit(&guarded, WITHIN).await.unwrap_err();
    assert_eq!((read(&b).await.lease.value().unwrap().seq, a.store().held()), (1, 2));
    let mut changes = b.changes();
    assert!(a.store().land().unwrap().is_ok());
    hint(&mut changes).await;
    assert_eq!(read(&b).await.lease.value().unwrap().seq, 2);
    // Judged when it lands.
    assert!(is_conflict(a.store().land().unwrap()));
    assert!(a.store().land().is_none());
}

#[tokio::test(start_paused = true)]
async fn memory_cuts_one_agent_off_and_not_the_other() {
    let (a, b) = two_agents();
    let mut changes = a.changes();
    a.set_link(Link::Silent);
    let asked = tokio::time::Instant::now();
    assert!(matches!(a.read(WITHIN).await, Err(DcsError::Timeout { .. })));
    assert_eq!(asked.elapsed(), WITHIN);
    commit(&b, Transaction::default().put(lease(1))).await;
    assert!(!changes.has_changed().unwrap());
    // The same agent's other handle is behind the same cut.
    let separate = a.separate().await.unwrap();
    a.set_link(Link::Refused);
    assert!(matches!(separate.read(WITHIN).await, Err(DcsError::Unavailable { .. })));
    a.set_link(Link::Up);
    hint(&mut changes).await;
    assert_eq!(read(&a).await.lease.value().unwrap().seq, 1);
}

#[tokio::test]
async fn memory_can_be_wiped_and_restored() {
    let (a, _) = two_agents();
    commit(&a, Transaction::default().put(lease(1))).await;
    let backup = a.store().snapshot();
    let late = commit(&a, Transaction::default().put(lease(2))).await;
    a.store().restore(backup, 1);
    let records = read(&a).await;
    assert!(records.revision < late && records.lease.value().unwrap().seq == 1);
    a.store().wipe(2);
    let records = read(&a).await;
    assert_eq!((records.store_id, records.revision, records.lease), (2, 0, Entry::Absent));
}

// === Etcd ===

#[async_trait]
impl Store for Cluster {
    fn agent(&self, cluster: &ClusterName) -> Box<dyn Dcs> {
        Box::new(EtcdDcs::connect(&self.config(), cluster).unwrap())
    }

    async fn put(&self, key: &str, value: &str) {
        self.client(0, None).await.put(key, value, None).await.unwrap();
    }

    async fn delete(&self, key: &str) {
        self.client(0, None).await.delete(key, None).await.unwrap();
    }

    async fn value(&self, key: &str) -> Option<Vec<u8>> {
        let answer = self.client(0, None).await.get(key, None).await.unwrap();
        answer.kvs().first().map(|kv| kv.value().to_vec())
    }
}

fn connect(config: &EtcdConfig) -> EtcdDcs {
    EtcdDcs::connect(config, &cluster("main")).unwrap()
}

fn single(config: &EtcdConfig, endpoint: String) -> EtcdConfig {
    EtcdConfig { endpoints: vec![endpoint], ..config.clone() }
}

#[tokio::test]
async fn etcd_passes_the_contract() {
    let Some(etcd) = Cluster::start(3).await else { return };
    passes_the_contract(&etcd).await;
}

#[tokio::test]
async fn etcd_latencies_on_loopback() {
    let Some(etcd) = Cluster::start(3).await else { return };
    let (dcs, other) = (connect(&etcd.config()), connect(&etcd.config()));
    let mut changes = other.changes();
    hint(&mut changes).await;
    commit(&dcs, Transaction::default().put(lease(0))).await;
    let (mut reads, mut commits, mut hints) = (Vec::new(), Vec::new(), Vec::new());
    for seq in 1..=200 {
        let begun = Instant::now();
        read(&dcs).await;
        reads.push(begun.elapsed());
        changes.borrow_and_update();
        let transaction = Transaction::default().put(lease(seq));
        let begun = Instant::now();
        let (committed, hinted) = tokio::join!(
            async {
                commit(&dcs, transaction).await;
                begun.elapsed()
            },
            async {
                hint(&mut changes).await;
                begun.elapsed()
            }
        );
        commits.push(committed);
        hints.push(hinted);
    }
    for (what, mut times) in [("read", reads), ("commit", commits), ("hint after sending", hints)] {
        times.sort();
        let at = |percent: usize| times[times.len() * percent / 100];
        eprintln!("{what}: median {:?}, p95 {:?}, worst {:?}", at(50), at(95), times[times.len() - 1]);
        assert!(at(50) < Duration::from_millis(250), "{what}: {:?}", at(50));
    }
}

/// A member dies while reads, commits and a watch go on: no read fails, each within its deadline.
async fn goes_on_without(victim_leads: bool, stop: impl Fn(&mut Cluster, usize)) {
    let Some(mut etcd) = Cluster::start(3).await else { return };
    let leader_of_etcd = etcd.leader().await;
    let victim = if victim_leads { leader_of_etcd } else { (leader_of_etcd + 1) % 3 };
    // The victim is whom everybody asks first.
    let mut config = etcd.config();
    config.endpoints.rotate_left(victim);
    let (dcs, other) = (connect(&config), connect(&config));
    let mut changes = other.changes();
    hint(&mut changes).await;
    let held = commit(&dcs, Transaction::when(Key::Leader, 0).put(Write::Leader(leader(1)))).await;
    stop(&mut etcd, victim);
    let (mut slowest, mut unknown) = (Duration::ZERO, 0);
    for seq in 1..=40 {
        let begun = Instant::now();
        let records = dcs.read(Duration::from_secs(4)).await.expect("a read while one member of three is gone");
        assert_eq!(records.leader.revision(), held);
        slowest = slowest.max(begun.elapsed());
        let begun = Instant::now();
        changes.borrow_and_update();
        match dcs.commit(&Transaction::when(Key::Leader, held).put(lease(seq)), Duration::from_secs(4)).await {
            Ok(_) => {
                hint(&mut changes).await;
                assert_eq!(read(&other).await.lease.value().unwrap().seq, seq);
            }
            Err(DcsError::Timeout { .. }) => unknown += 1,
            Err(other) => panic!("{other}"),
        }
        slowest = slowest.max(begun.elapsed());
    }
    eprintln!("slowest {slowest:?}, {unknown} unknown outcomes");
    assert!(unknown <= 1, "{unknown}");
}

#[tokio::test]
async fn etcd_follower_killed() {
    goes_on_without(false, Cluster::kill).await;
}

#[tokio::test]
async fn etcd_leader_killed() {
    goes_on_without(true, Cluster::kill).await;
}

#[tokio::test]
async fn etcd_follower_hangs() {
    goes_on_without(false, |etcd, member| etcd.pause(member)).await;
}

#[tokio::test]
async fn etcd_leader_hangs() {
    goes_on_without(true, |etcd, member| etcd.pause(member)).await;
}

/// The lease keeper does nothing but write: it learns of a member that hangs by its own write, whose outcome is unknown, and
/// the next one goes elsewhere.
#[tokio::test]
async fn etcd_hangs_under_a_write() {
    let Some(etcd) = Cluster::start(3).await else { return };
    let leads = etcd.leader().await;
    for victim in [(leads + 1) % 3, leads] {
        let mut config = etcd.config();
        config.endpoints.rotate_left(victim);
        let dcs = connect(&config);
        let held = read(&dcs).await.leader.revision();
        let held = commit(&dcs, Transaction::when(Key::Leader, held).put(Write::Leader(leader(1)))).await;
        let keeper = dcs.separate().await.unwrap();
        let renew = |seq| Transaction::when(Key::Leader, held).put(lease(seq));
        commit(&*keeper, renew(1)).await;
        etcd.pause(victim);
        let begun = Instant::now();
        let error = keeper.commit(&renew(2), WITHIN).await.unwrap_err();
        let noticed = begun.elapsed();
        assert!(matches!(error, DcsError::Timeout { .. }), "{error}");
        assert!(error.to_string().contains(&config.endpoints[0]), "{error}");
        // Once to wait, once to make sure that it is not only slow; not the whole deadline.
        assert!(noticed < 2 * config.try_timeout + Duration::from_millis(300), "{noticed:?}");
        let begun = Instant::now();
        commit(&*keeper, renew(3)).await;
        eprintln!("{error}; the next renewal took {:?}", begun.elapsed());
        assert_eq!(read(&dcs).await.lease.value().unwrap().seq, 3);
        etcd.resume(victim);
    }
}

#[tokio::test]
async fn etcd_quorum_lost_and_back() {
    let Some(mut etcd) = Cluster::start(3).await else { return };
    let dcs = connect(&etcd.config());
    let held = commit(&dcs, Transaction::when(Key::Leader, 0).put(Write::Leader(leader(1)))).await;
    let within = Duration::from_millis(1500);
    let renew = Transaction::when(Key::Leader, held).put(lease(1));
    let check = async |what: &str| {
        for _ in 0..3 {
            let begun = Instant::now();
            let error = dcs.read(within).await.expect_err(what);
            assert!(matches!(error, DcsError::Timeout { .. } | DcsError::Unavailable { .. }), "{what}: {error}");
            let read = begun.elapsed();
            let error = dcs.commit(&renew, within).await.expect_err(what);
            assert!(matches!(error, DcsError::Timeout { .. } | DcsError::Unavailable { .. }), "{what}: {error}");
            eprintln!("{what}: {error}");
            let slack = Duration::from_millis(300);
            assert!(read < within + slack && begun.elapsed() < 2 * (within + slack), "{what}: {:?}", begun.elapsed());
        }
    };
    let back = async |what: &str| {
        let took = wait_until(what, Duration::from_secs(20), async || dcs.read(within).await.is_ok()).await;
        // Whatever became of the writes above, the guard still holds and the way is free.
        commit(&dcs, renew.clone()).await;
        eprintln!("{what}: {took:?}");
    };
    etcd.pause(0);
    etcd.pause(1);
    check("two of three hang").await;
    etcd.resume(0);
    etcd.resume(1);
    back("reads again after two hung").await;
    for n in 0..3 {
        etcd.kill(n);
    }
    check("all are dead").await;
    for n in 0..3 {
        etcd.start_again(n);
    }
    back("reads again after all were dead").await;
}

#[tokio::test]
async fn etcd_restarted_watch_goes_on() {
    let Some(mut etcd) = Cluster::start(3).await else { return };
    let dcs = connect(&etcd.config());
    let mut changes = dcs.changes();
    hint(&mut changes).await;
    for n in 0..3 {
        etcd.kill(n);
    }
    for n in 0..3 {
        etcd.start_again(n);
    }
    for n in 0..3 {
        etcd.ready(n).await.unwrap();
    }
    // Established anew counts as a change: something may have happened meanwhile.
    hint(&mut changes).await;
    for _ in 0..3 {
        changes.borrow_and_update();
        etcd.put("/pgvigil/main/leader", "x").await;
        hint(&mut changes).await;
    }
}

#[tokio::test]
async fn etcd_compacted_watch_goes_on() {
    let Some(mut etcd) = Cluster::start(1).await else { return };
    let dcs = connect(&etcd.config());
    let mut changes = dcs.changes();
    hint(&mut changes).await;
    for _ in 0..50 {
        etcd.put("/pgvigil/main/leader", "x").await;
    }
    let revision = read(&dcs).await.revision;
    etcd.client(0, None).await.compact(revision, None).await.unwrap();
    // A watch that begins where everything older is gone.
    etcd.kill(0);
    etcd.start_again(0);
    etcd.ready(0).await.unwrap();
    changes.borrow_and_update();
    hint(&mut changes).await;
    for _ in 0..3 {
        changes.borrow_and_update();
        etcd.put("/pgvigil/main/leader", "x").await;
        hint(&mut changes).await;
    }
}

/// Years of elections, or somebody else's keys: more than the 4 MiB at which gRPC clients stop unless told otherwise.
#[tokio::test]
async fn etcd_large_answers_are_read() {
    let Some(etcd) = Cluster::start(1).await else { return };
    let dcs = connect(&etcd.config());
    commit(&dcs, Transaction::default().put(lease(1))).await;
    let long = "x".repeat(64 * 1024);
    for n in 0..100 {
        etcd.put(&format!("/pgvigil/main/of-others/{n}"), &long).await;
    }
    assert_eq!(read(&dcs).await.lease.value().unwrap().seq, 1);
}

#[tokio::test]
async fn etcd_check_says_what_is_there() {
    let Some(mut etcd) = Cluster::start(3).await else { return };
    let dcs = connect(&etcd.config());
    let all = dcs.check(WITHIN).await.unwrap();
    assert_eq!(all.store_id, read(&dcs).await.store_id);
    let leads = all.members.iter().filter(|m| m.status.as_ref().is_ok_and(|s| s.is_leader)).count();
    assert_eq!((all.members.len(), leads), (3, 1));
    // A check writes nothing.
    assert_eq!(read(&dcs).await.leader, Entry::Absent);
    let version = &all.members[0].status.as_ref().unwrap().version;
    if version == "3.4.23" {
        assert!(all.warnings.iter().any(|w| w.contains("3.4.23") && w.contains("upgrade")), "{:?}", all.warnings);
    }
    etcd.kill(2);
    let two = dcs.check(WITHIN).await.unwrap();
    assert!(two.members[2].status.as_ref().unwrap_err().contains(&etcd.endpoints()[2]));
    assert!(two.warnings.iter().any(|w| w.contains("does not answer") && w.contains(&etcd.endpoints()[2])));
    let Some(other) = Cluster::start(1).await else { return };
    let mut mixed = etcd.config();
    mixed.endpoints[2] = other.endpoints().remove(0);
    let mixed = connect(&mixed).check(WITHIN).await.unwrap();
    assert!(mixed.warnings.iter().any(|w| w.contains("different etcd clusters")), "{:?}", mixed.warnings);
}

// === Logins ===

const PASSWORD: &str = "correct horse";

async fn with_users(etcd: &Cluster) {
    let mut client = etcd.client(0, None).await;
    let rights = || Some(etcd_client::Permission::read_write("/pgvigil/main/").with_prefix());
    for user in ["root", "pgvigil", "stranger"] {
        client.user_add(user, PASSWORD, None).await.unwrap();
        client.role_add(user).await.unwrap();
        client.user_grant_role(user, user).await.unwrap();
    }
    client.role_grant_permission("pgvigil", rights().unwrap()).await.unwrap();
    client.auth_enable().await.unwrap();
}

fn as_user(config: &EtcdConfig, user: &str, password: &str) -> EtcdConfig {
    EtcdConfig { user: Some((user.to_owned(), Secret::new(password))), ..config.clone() }
}

#[tokio::test]
async fn etcd_user_and_password() {
    let options = Options { arguments: vec!["--auth-token-ttl=2".to_owned()], ..Options::default() };
    let Some(etcd) = Cluster::start_with(3, options).await else { return };
    let config = as_user(&etcd.config(), "pgvigil", PASSWORD);
    // Nobody is asked for a name yet; ours is no harm.
    let early = connect(&config);
    commit(&early, Transaction::default().put(lease(1))).await;
    with_users(&etcd).await;
    wait_until("logs in once names are asked for", WITHIN, async || early.read(WITHIN).await.is_ok()).await;
    commit(&early, Transaction::default().put(lease(2))).await;

    let dcs = connect(&config);
    let mut changes = dcs.changes();
    hint(&mut changes).await;
    commit(&dcs, Transaction::default().put(lease(3))).await;
    assert_eq!(read(&dcs).await.lease.value().unwrap().seq, 3);
    dcs.check(WITHIN).await.unwrap();

    let check = async |config: EtcdConfig, expect: &[&str]| {
        let dcs = connect(&config);
        for error in [
            dcs.read(WITHIN).await.unwrap_err(),
            dcs.commit(&Transaction::default().put(lease(9)), WITHIN).await.unwrap_err(),
            dcs.check(WITHIN).await.unwrap_err(),
        ] {
            eprintln!("{error}");
            assert!(matches!(error, DcsError::Refused { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("http://127.0.0.1:") && !text.contains(PASSWORD), "{text}");
            for part in expect {
                assert!(text.contains(part), "{text}");
            }
        }
    };
    check(as_user(&etcd.config(), "pgvigil", "wrong"), &["`pgvigil`", "check etcd.user and etcd.password"]).await;
    check(as_user(&etcd.config(), "nobody", PASSWORD), &["`nobody`", "check etcd.user and etcd.password"]).await;
    check(etcd.config(), &["set etcd.user and etcd.password"]).await;
    check(as_user(&etcd.config(), "stranger", PASSWORD), &["`stranger`", "grant-permission", "/pgvigil/main/"]).await;

    // Tokens live for two seconds here: what was connected goes on, and a watch begun anew has a token that counts.
    let ended = Instant::now() + Duration::from_millis(3500);
    let mut seq = 10;
    while Instant::now() < ended {
        seq += 1;
        commit(&dcs, Transaction::default().put(lease(seq))).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // Users changed: every token is of an old revision.
    etcd.client(0, Some(("root", PASSWORD))).await.user_add("another", "x", None).await.unwrap();
    commit(&dcs, Transaction::default().put(lease(99))).await;
    changes.borrow_and_update();
    commit(&early, Transaction::default().put(lease(100))).await;
    hint(&mut changes).await;
}

#[tokio::test]
async fn etcd_token_of_a_watch_ends() {
    let options = Options { arguments: vec!["--auth-token-ttl=2".to_owned()], ..Options::default() };
    let Some(mut etcd) = Cluster::start_with(3, options).await else { return };
    with_users(&etcd).await;
    let dcs = connect(&as_user(&etcd.config(), "pgvigil", PASSWORD));
    let mut changes = dcs.changes();
    hint(&mut changes).await;
    // Simple tokens die with the member that gave them.
    for n in 0..3 {
        etcd.kill(n);
        etcd.start_again(n);
        etcd.ready(n).await.unwrap();
    }
    let writer = connect(&as_user(&etcd.config(), "pgvigil", PASSWORD));
    wait_until("hints again", Duration::from_secs(15), async || {
        changes.borrow_and_update();
        commit(&writer, Transaction::default().put(lease(1))).await;
        timeout(Duration::from_millis(300), changes.changed()).await.is_ok()
    })
    .await;
}

// === TLS ===

#[tokio::test]
async fn etcd_tls() {
    let dir = tempfile::tempdir().unwrap();
    let Some(certificates) = Certificates::make(dir.path()) else { return };
    let options = Options { tls: Some(certificates.clone()), ..Options::default() };
    let Some(etcd) = Cluster::start_with(3, options).await else { return };
    let config = etcd.config();
    let dcs = connect(&config);
    commit(&dcs, Transaction::default().put(lease(1))).await;
    assert_eq!(read(&dcs).await.lease.value().unwrap().seq, 1);
    dcs.check(WITHIN).await.unwrap();

    let check = async |config: EtcdConfig, expect: &str| {
        let dcs = connect(&config);
        let within = Duration::from_secs(2);
        for error in [
            dcs.read(within).await.unwrap_err(),
            dcs.commit(&Transaction::default().put(lease(9)), within).await.unwrap_err(),
        ] {
            let text = error.to_string();
            eprintln!("{text}");
            assert!(matches!(error, DcsError::Refused { .. } | DcsError::Unavailable { .. }), "{text}");
            assert!(config.endpoints.iter().all(|e| text.contains(e)) && text.contains(expect), "{text}");
        }
    };
    check(EtcdConfig { ca_file: Some(certificates.other_ca.clone()), ..config.clone() }, "set etcd.ca_file").await;
    check(EtcdConfig { ca_file: None, ..config.clone() }, "etcd.ca_file").await;
    check(EtcdConfig { cert_file: None, key_file: None, ..config.clone() }, "set etcd.cert_file and etcd.key_file")
        .await;
    let by_name = config.endpoints.iter().map(|e| e.replace("127.0.0.1", "localhost")).collect();
    check(EtcdConfig { endpoints: by_name, ..config.clone() }, "does not name this address").await;
    let plain = config.endpoints.iter().map(|e| e.replace("https", "http")).collect();
    check(EtcdConfig { endpoints: plain, ..config.clone() }, "write https:// instead of http://").await;
    let Some(without) = Cluster::start(1).await else { return };
    let encrypted = without.endpoints()[0].replace("http", "https");
    check(single(&config, encrypted), "write http:// instead of https://").await;

    // Settings that cannot work are refused before anything is tried.
    let refused = |config: EtcdConfig, expect: &str| {
        let error = EtcdDcs::connect(&config, &cluster("main")).err().unwrap().to_string();
        assert!(error.contains(expect), "{error}");
    };
    refused(
        EtcdConfig { ca_file: Some("/does/not/exist".into()), ..config.clone() },
        "etcd.ca_file: read /does/not/exist",
    );
    refused(EtcdConfig { ca_file: Some(certificates.client_key.clone()), ..config.clone() }, "holds no certificate");
    refused(EtcdConfig { key_file: None, ..config.clone() }, "etcd.cert_file is set and etcd.key_file is not");
    refused(EtcdConfig { endpoints: vec![], ..config.clone() }, "set etcd.endpoints");
    refused(single(&config, "ftp://127.0.0.1:1".to_owned()), "begins with http:// or https://");
}

// === Nobody there ===

#[tokio::test]
async fn etcd_nothing_listens() {
    // A port that was free a moment ago; no etcd is needed for this.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = EtcdConfig {
        endpoints: vec![format!("http://127.0.0.1:{port}")],
        user: None,
        ca_file: None,
        cert_file: None,
        key_file: None,
        try_timeout: Duration::from_millis(200),
        prefix: "/pgvigil".to_owned(),
    };
    let dcs = connect(&config);
    let within = Duration::from_millis(500);
    for error in [
        dcs.read(within).await.unwrap_err(),
        dcs.commit(&Transaction::default().put(lease(1)), within).await.unwrap_err(),
    ] {
        // Never an unknown outcome: nothing was sent.
        assert!(matches!(error, DcsError::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains("refused") && error.to_string().contains(&config.endpoints[0]), "{error}");
    }
}
