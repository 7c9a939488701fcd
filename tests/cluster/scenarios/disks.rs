//! Disks that stall or are full, and standbys that stream without acknowledging.

use std::io::Write;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgvigil::demo::Options;
use pgvigil::demo::disk::Disk;
use pgvigil::demo::sql::Login;

use super::*;

/// What a client may see of a stalled disk at most (protocol §9).
const STALL: Duration = Duration::from_secs(8);
/// `sync.max_stall`, and what dropping a member takes on a loaded machine.
const MAX_STALL: Duration = Duration::from_millis(3_000 + 1_500);

/// The first member leads, with its data on a file system of its own. `None`: it cannot be had here, which was said.
async fn on_its_own_disk(
    disk: impl AsyncFn(&Cluster) -> Result<Disk, String>,
    lines: &str,
) -> Option<(Cluster, Disk, Writer)> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: mounting a file system needs root");
        return None;
    }
    let cluster =
        Cluster::prepare(Options { lease: String::new(), etcd_try_timeout: "700ms".to_owned(), ..options() }).unwrap();
    let disk = match disk(&cluster).await {
        Ok(disk) => disk,
        Err(why) => {
            println!("skipped: {why}");
            leaves_nothing(cluster).await;
            return None;
        }
    };
    let mut cluster = cluster;
    for member in 0..3 {
        if !lines.is_empty() {
            configure(&cluster, member, lines);
        }
        cluster.start_agent(member).unwrap();
    }
    cluster.ready(PATIENCE).await.unwrap();
    if cluster.primary().await != Some(0) {
        let to = cluster.members[0].name.clone();
        let mut last = Value::Null;
        until("the first member leads", async || {
            last = ask(&cluster, &["switchover", "--to", &to]).await.1;
            (cluster.primary().await == Some(0)).then_some(())
        })
        .await;
    }
    cluster.healthy(PATIENCE).await.unwrap();
    synchronous(&cluster, 0).await;
    let writer = cluster.pinned_writer();
    writes(&writer).await;
    Some((cluster, disk, writer))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_disk_of_the_primary_costs_seconds_and_its_thaw_acknowledges_nothing() {
    let frozen = async |cluster: &Cluster| {
        let (file, directory) = (cluster.base.join("disk"), cluster.members[0].directory.join("pg"));
        Disk::on_loop(&file, 1 << 30, directory).await.map_err(|error| error.to_string())
    };
    let Some((cluster, disk, writer)) = on_its_own_disk(frozen, "").await else { return };
    let last_round = async || status(&cluster, 0).await["published_ms_ago"].as_u64();

    let began = Instant::now();
    disk.freeze().await.unwrap();
    let next = until("another primary", async || cluster.primary().await.filter(|primary| *primary != 0)).await;
    writes(&writer).await;
    let outage = writer.outage(began);
    println!("write outage by a frozen disk: {outage:?}");
    assert!(outage <= STALL, "{outage:?}");
    let said =
        until_status(&cluster, next, "the reason stands in the history", |s| s["leader"]["state"] == "held").await;
    assert_ne!(said["leader"]["member"], cluster.members[0].name.as_str());

    // The agent beside the frozen disk goes on: it answers, decides, and says what is the matter.
    let waits = until_status(&cluster, 0, "a reason that names the disk", |s| reason(s).contains("stalled")).await;
    assert!(last_round().await.unwrap() < 3_000, "{}", brief(&waits));
    let before = writer.acknowledged_by(0);
    disk.thaw();
    // By itself: no process of the old PostgreSQL is left, it is started, rewound where it has to be, and streams.
    cluster.healthy(PATIENCE).await.unwrap();
    assert_eq!(writer.acknowledged_by(0), before, "acknowledged at the thaw");
    assert_eq!(cluster.primary().await, Some(next));
    // The processes first: a file system in use cannot go.
    let lost = lost(&cluster, &writer).await;
    assert_eq!(lost, Vec::<i64>::new());
    end_before(cluster, writer, disk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_of_the_primary_ends_in_one_failover_and_it_returns_when_there_is_room() {
    let small = async |cluster: &Cluster| {
        let directory = cluster.members[0].directory.join("pg");
        Disk::in_memory(400 << 20, directory).await.map_err(|error| error.to_string())
    };
    let Some((cluster, disk, writer)) = on_its_own_disk(small, "[storage]\nmin_free = \"32MB\"").await else { return };
    // What slots keep is bounded by the free disk, as soon as it is known.
    until("slots are bounded", async || {
        let session = cluster.connect(0, &Login::app()).await.ok()?;
        let row = session.query_one("SELECT current_setting('max_slot_wal_keep_size')", &[]).await.ok()?;
        (row.get::<_, &str>(0) == "128MB").then_some(())
    })
    .await;
    let filler = cluster.members[0].directory.join("pg/filler");
    {
        let mut file = std::fs::File::create(&filler).unwrap();
        while file.write_all(&[0; 1 << 20]).is_ok() {}
    }
    let began = Instant::now();
    let session = cluster.connect(0, &Login::superuser()).await.unwrap();
    let next = until("another primary", async || {
        // New segments, for which there is no room.
        let _ = session
            .batch_execute("SELECT pg_logical_emit_message(true, 'x', repeat('x', 1000)), pg_switch_wal()")
            .await;
        cluster.primary().await.filter(|primary| *primary != 0)
    })
    .await;
    writes(&writer).await;
    println!("write outage by a full disk: {:?}", writer.outage(began));

    // Not started, or parked since before the disk was seen to be full: either way it says what to free.
    let full = until_status(&cluster, 0, "what to free", |s| reason(s).contains("free at least")).await;
    assert!(reason(&full).contains("/pg/data"), "{}", reason(&full));
    assert!(warnings(&full).contains("free"), "{}", warnings(&full));
    let summary = &full["local"]["storage"];
    assert!(summary.to_string().contains("free_bytes"), "{summary}");
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next, "it returns by itself");
    assert_eq!(lost(&cluster, &writer).await, Vec::<i64>::new());
    end_before(cluster, writer, disk).await;
}

/// Stops the member on the disk before the disk goes.
async fn end_before(mut cluster: Cluster, mut writer: Writer, disk: Disk) {
    writes(&writer).await;
    assert_eq!(writer.two_primaries(), Vec::<String>::new());
    writer.stop().await;
    cluster.stop_member(0).await.unwrap();
    drop(disk);
    leaves_nothing(cluster).await;
}

/// PostgreSQL's processes of a member whose title holds `word`.
fn processes(cluster: &Cluster, member: usize, word: &str) -> Vec<i32> {
    let postmaster = cluster.members[member].postmaster().expect("PostgreSQL runs");
    let is = |pid: &i32| {
        let title = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
        parent == Some(postmaster) && title.contains(word)
    };
    let all = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let mut found: Vec<i32> = all.filter(is).collect();
    if word.is_empty() {
        found.push(postmaster);
    }
    found
}

fn send(pids: &[i32], signal: Signal) {
    for pid in pids {
        // One that ended meanwhile is no matter.
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}

/// Stops processes of one standby and lets them go on; the primary stays, writes stall once for a bounded time.
async fn stopped_standby(members: usize, k: u32, word: &str) {
    let mut cluster = Cluster::prepare(Options { members, ..options() }).unwrap();
    for member in 0..members {
        configure(&cluster, member, &format!("[sync]\nk = {k}"));
        cluster.start_agent(member).unwrap();
    }
    let (cluster, primary, writer) = played(cluster).await;
    synchronous(&cluster, primary).await;
    let until_k = async |wanted: u32, what: &str| {
        until_status(&cluster, primary, what, |s| s["durability"]["k"] == wanted && s["durability"]["stalled"] == false)
            .await
    };
    until_k(k, "the whole set").await;
    writes(&writer).await;

    let standby = (primary + 1) % members;
    let stopped = processes(&cluster, standby, word);
    assert!(!stopped.is_empty());
    let began = Instant::now();
    send(&stopped, Signal::SIGSTOP);
    until_k(k - 1, "goes on with fewer").await;
    writes(&writer).await;
    let outage = writer.outage(began);
    println!("{members} members, k = {k}, `{word}` stopped: write outage {outage:?}");
    assert!(outage <= MAX_STALL, "{outage:?}");
    let quiet = Instant::now();
    writes(&writer).await;
    send(&stopped, Signal::SIGCONT);
    until_k(k, "it returns").await;
    assert!(writer.outage(quiet) < MAX_STALL, "stalled a second time: {:?}", writer.outage(quiet));
    assert_eq!(cluster.primary().await, Some(primary));
    assert_eq!(writer.errors(began), (0, Default::default()));
    ends_well(cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_walreceiver_stalls_writes_once_and_no_longer_than_max_stall() {
    stopped_standby(2, 1, "walreceiver").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_stopped_as_a_whole_stalls_writes_once_and_no_longer_than_max_stall() {
    stopped_standby(3, 2, "").await;
}
