//! `postgres::LocalServer` against a real server: the whole life of a cluster, and the findings of the protocol's review
//! that were reproduced on PostgreSQL (2, 3, 4, 12, 14, 20, 21), with SIGSTOP for a process that is slow.

mod harness;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use harness::*;
use pgvigil::core::Lsn;
use pgvigil::core::plan::{PromoteOrder, SyncRule};
use pgvigil::core::records::TimelineReservation;
use pgvigil::core::timeline::{Term, TimelineId};
use pgvigil::core::view::{DataDirectory, LocalPostgres, Receiver};
use pgvigil::ports::{Postgres, PostgresError, StartMode};

const SOON: Duration = Duration::from_millis(700);

fn took(what: &str, since: Instant) {
    println!("{what}: {:.1} ms", since.elapsed().as_secs_f64() * 1000.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_made_fails_over_and_takes_the_old_leader_back() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let (mut a, mut b) = (cluster.member("node-a"), cluster.member("node-b"));
    assert_eq!(a.server.data_directory(SOON).await, DataDirectory::Empty);
    assert_eq!(a.observe().await, LocalPostgres::Down);

    let now = Instant::now();
    let system_identifier = a.server.bootstrap().await.unwrap();
    took("bootstrap", now);
    let DataDirectory::Present { system_identifier: found, cleanly_stopped, version, .. } =
        a.server.data_directory(SOON).await
    else {
        panic!("{:?}", a.server.data_directory(SOON).await)
    };
    assert_eq!((found, cleanly_stopped), (system_identifier, true));
    assert!((14..=18).contains(&version));
    assert!(a.server.bootstrap().await.is_err(), "a second bootstrap must be refused");

    let now = Instant::now();
    a.start(StartMode::Parked).await;
    took("start parked until observed", now);
    let parked = a.standby().await;
    assert_eq!((parked.timeline, parked.follows, parked.receiver), (TimelineId(1), None, Receiver::None));

    let now = Instant::now();
    let position = a.server.seal(LONG).await.unwrap();
    took("seal (parked)", now);
    assert_eq!(position.timeline, TimelineId(1));
    let now = Instant::now();
    let promotion = a.promote(1).await;
    took("promote", now);
    assert_eq!(promotion.timeline, TimelineId(2));
    assert_eq!(promotion.switch, position.replayed, "the reserved switch is the sealed position");
    assert!(a.data_dir().join("standby.signal").exists(), "S8: put back right after the promotion");
    let facts = a.primary().await;
    assert_eq!((facts.timeline, facts.rule_text.as_str()), (TimelineId(2), "ANY 1 (\"pgvigil_nobody\")"));
    assert_eq!(facts.exceptions, Vec::<String>::new());
    assert_eq!(facts.history.switch_from(TimelineId(1)), Some(promotion.switch));

    let now = Instant::now();
    a.enforce(Some(&SyncRule::Nobody), &SyncRule::Cleared).await.unwrap();
    took("enforce nobody -> cleared", now);
    a.sql("create table t (n int); insert into t select generate_series(1, 1000)").await;

    let now = Instant::now();
    b.join(&a, 1).await;
    took("clone and stream", now);
    assert_eq!(b.standby().await.follows, Some(a.followed_by(&b, 1)));
    assert_eq!(
        b.server.data_directory(SOON).await,
        DataDirectory::Present {
            system_identifier,
            checkpoint_timeline: TimelineId(2),
            version,
            cleanly_stopped: false,
        }
    );

    let now = Instant::now();
    a.enforce(Some(&SyncRule::Cleared), &any(1, &[&b], 1)).await.unwrap();
    took("enforce cleared -> ANY 1", now);
    let now = Instant::now();
    a.enforce(None, &any(1, &[&b], 1)).await.unwrap();
    took("enforce unknown -> ANY 1", now);
    for _ in 0..3 {
        let now = Instant::now();
        a.observe().await;
        took("observe (primary)", now);
    }
    let now = Instant::now();
    b.observe().await;
    took("observe (standby)", now);
    a.sql("insert into t values (-1)").await;
    let acknowledged = a.primary().await.flushed;
    assert!(b.server.position_of(&a.source(), LONG).await.unwrap() >= acknowledged);

    // The standby is sealed while the leader still writes; what it writes now is nobody else's.
    let now = Instant::now();
    let sealed = b.server.seal(LONG).await.unwrap();
    took("seal (leader alive)", now);
    a.enforce(None, &SyncRule::Cleared).await.unwrap();
    a.sql("insert into t values (-666)").await;
    a.crash();
    assert_eq!(sealed.timeline, TimelineId(2));
    assert!(sealed.replayed >= acknowledged, "an acknowledged commit is in the sealed position");
    let now = Instant::now();
    let promotion = b.promote(2).await;
    took("promote", now);
    assert_eq!(
        (promotion.timeline, promotion.parent, promotion.switch),
        (TimelineId(3), TimelineId(2), sealed.replayed)
    );
    b.enforce(Some(&SyncRule::Nobody), &SyncRule::Cleared).await.unwrap();
    b.server.keep_slots(&[(a.id.name.clone(), None)], LONG).await.unwrap();
    b.sql("insert into t values (-2)").await;

    let leader_history = b.primary().await.history;
    let now = Instant::now();
    let report = a.server.rewind(&b.source(), &leader_history, TimelineId(3)).await.unwrap();
    took("rewind", now);
    println!("{report}");
    assert!(report.contains("transactions were only here"), "{report}");
    let listed = report.rsplit(' ').next().unwrap();
    assert!(std::fs::read_to_string(listed).unwrap().contains("COMMIT"), "the lost transaction is listed");
    let now = Instant::now();
    a.start(StartMode::Follow(b.followed_by(&a, 2))).await;
    a.streams().await;
    took("start as follower until streaming", now);
    b.enforce(Some(&SyncRule::Cleared), &any(1, &[&a], 2)).await.unwrap();
    let rows = a.client().await.query("select n from t where n < 0 order by n", &[]).await.unwrap();
    let rows: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(rows, [-2, -1], "what the new leader acknowledged is here, what only the old one had is gone");
}

impl Member {
    async fn walsender(&self, name: &str) -> i32 {
        let replicas = self.primary().await.replicas;
        replicas.iter().find(|r| r.application_name == name).unwrap_or_else(|| panic!("no {name}: {replicas:?}")).pid
    }

    /// What a foreign hand would do: promoted and written to, on a number of its own.
    async fn promote_apart(&self) {
        self.sql("select pg_promote()").await;
        until("promoted", async || matches!(self.observe().await, LocalPostgres::Primary(_))).await;
        self.server.enforce(None, &SyncRule::Cleared, LONG).await.unwrap();
        self.sql("insert into t values (-666)").await;
    }
}

/// Two promotions to one number: the histories are equal, the rows are not.
#[tokio::test(flavor = "multi_thread")]
async fn finding_7_a_timeline_number_that_was_used_twice_is_not_rewound() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let (mut a, mut b) = (cluster.member("node-a"), cluster.member("node-b"));
    a.lead_alone().await;
    a.sql("create table t (n int)").await;
    b.join(&a, 1).await;
    a.stop();
    b.server.seal(LONG).await.unwrap();
    b.promote(2).await;
    a.start(StartMode::Parked).await;
    a.promote_apart().await;
    a.crash();
    let history = b.primary().await.history;
    let error = a.server.rewind(&b.source(), &history, TimelineId(3)).await.unwrap_err();
    println!("{error}");
    assert!(a.data_dir().join("PG_VERSION").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_turns_to_the_new_leader_without_a_restart() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b", "node-c"]);
    let mut a = cluster.member("node-a");
    let (mut b, mut c) = (cluster.member("node-b"), cluster.member("node-c"));
    a.lead_alone().await;
    b.join(&a, 1).await;
    c.join(&a, 1).await;
    a.enforce(Some(&SyncRule::Cleared), &any(1, &[&b, &c], 1)).await.unwrap();
    a.sql("create table t (n int)").await;
    a.crash();
    for (member, name) in [(&b, "b"), (&c, "c")] {
        let now = Instant::now();
        member.server.seal(LONG).await.unwrap();
        took(&format!("seal {name}"), now);
    }
    let whole = Instant::now();
    b.server.keep_slots(&[(c.id.name.clone(), None)], LONG).await.unwrap();
    let now = Instant::now();
    b.promote(2).await;
    took("promote b", now);
    let now = Instant::now();
    c.server.follow(Some(&b.followed_by(&c, 2)), LONG).await.unwrap();
    took("follow", now);
    c.streams().await;
    took("follow until streaming", now);
    let now = Instant::now();
    b.enforce(Some(&SyncRule::Nobody), &any(1, &[&c], 2)).await.unwrap();
    took("enforce nobody -> ANY 1 until the barrier is back", now);
    took("promotion to a commit that is on two members", whole);
    assert_eq!(c.standby().await.timeline, TimelineId(3));

    // Stopped cleanly: the follower has everything up to the end of the shutdown record, and that is the computed end.
    b.stop();
    let end = b.server.shutdown_position().await.unwrap().unwrap();
    let received = c.standby().await.received.unwrap();
    assert_eq!(received, end, "the shutdown checkpoint record ends where the control file's reader says");
    assert!(c.server.position_of(&c.source(), LONG).await.unwrap() >= end);
    assert_eq!(a.server.shutdown_position().await.unwrap(), None, "a was killed");
}

/// S2: killed right after it followed a switch, its control file still names the old timeline.
#[tokio::test(flavor = "multi_thread")]
async fn a_parked_start_reads_the_wal_of_a_timeline_that_the_control_file_does_not_name_yet() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b", "node-c"]);
    let mut a = cluster.member("node-a");
    let (mut b, mut c) = (cluster.member("node-b"), cluster.member("node-c"));
    a.lead_alone().await;
    b.join(&a, 1).await;
    c.join(&a, 1).await;
    a.stop();
    b.server.seal(LONG).await.unwrap();
    b.server.keep_slots(&[(c.id.name.clone(), None)], LONG).await.unwrap();
    b.promote(2).await;
    c.server.follow(Some(&b.followed_by(&c, 2)), LONG).await.unwrap();
    c.streams().await;
    b.enforce(Some(&SyncRule::Nobody), &any(1, &[&c], 2)).await.unwrap();
    b.sql("create table acknowledged (n int)").await;
    let acknowledged = b.primary().await.flushed;
    c.crash();
    b.crash();
    let DataDirectory::Present { checkpoint_timeline, .. } = c.server.data_directory(SOON).await else { panic!() };
    assert_eq!(checkpoint_timeline, TimelineId(2), "the premise: no restartpoint since the switch");

    // What `current` would make of it: it stops at the switch, without the commit. This is why it is not used.
    let mut launch = c.server.prepare_start(&StartMode::Parked).await.unwrap();
    for argument in launch.arguments.iter_mut().filter(|a| a.starts_with("recovery_target_timeline=")) {
        *argument = "recovery_target_timeline=current".to_owned();
    }
    c.run(&launch);
    until("a standby", async || matches!(c.observe().await, LocalPostgres::Standby(_))).await;
    let position = c.server.seal(LONG).await.unwrap();
    println!("with current: {} on {}, acknowledged {acknowledged}", position.replayed, position.timeline);
    assert!(
        position.timeline == TimelineId(2) && position.replayed < acknowledged,
        "current is safe after all: {position:?}"
    );
    c.crash();

    c.start(StartMode::Parked).await;
    let position = c.server.seal(LONG).await.unwrap();
    assert_eq!(position.timeline, TimelineId(3));
    assert!(position.replayed >= acknowledged, "{position:?} lacks a commit that was acknowledged at {acknowledged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_2_a_seal_waits_for_the_startup_process_and_ends_a_receiver_that_connects() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let (mut a, mut b) = (cluster.member("node-a"), cluster.member("node-b"));
    a.lead_alone().await;
    b.join(&a, 1).await;
    // An address that accepts and says nothing: the receiver connects for ever, and pg_stat_wal_receiver shows no row.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut follow = a.followed_by(&b, 1);
    follow.upstream.port = silent.local_addr().unwrap().port();
    b.server.follow(Some(&follow), LONG).await.unwrap();
    until("a receiver that connects", async || b.standby().await.receiver == Receiver::Connecting).await;

    let frozen = b.freeze("startup");
    let error = b.server.seal(SOON).await.unwrap_err();
    assert!(error.to_string().contains("startup process has taken the change"), "{error}");
    assert!(b.child("walreceiver").is_some());
    drop(frozen);
    let now = Instant::now();
    b.server.seal(LONG).await.unwrap();
    took("seal with a receiver that connects", now);
    assert!(b.child("walreceiver").is_none());
    assert_eq!(b.standby().await.follows, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_3_a_rule_is_not_in_force_before_the_checkpointer_has_it() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let (mut a, mut b) = (cluster.member("node-a"), cluster.member("node-b"));
    a.lead_alone().await;
    b.join(&a, 1).await;
    let rule = any(1, &[&b], 1);

    let frozen = a.freeze("checkpointer");
    let error = a.server.enforce(Some(&SyncRule::Cleared), &rule, SOON).await.unwrap_err();
    assert!(error.to_string().contains("see a commit of ours waiting"), "{error}");
    drop(frozen);
    a.enforce(None, &rule).await.unwrap();
    assert_eq!(a.primary().await.rule_text, rule.to_string());

    // Nobody answers for a ghost: the barrier does not return, and what waited for it is ended, not left behind.
    let ghost = cluster.member("node-a");
    let error = a.server.enforce(Some(&rule), &any(1, &[&ghost], 1), SOON).await.unwrap_err();
    assert!(matches!(error, PostgresError::Timeout { .. }), "{error}");
    assert!(error.to_string().contains(&b.name(1)), "the error names who is connected: {error}");
    let client = a.client().await;
    until("no session waits any more", async || {
        let sql = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
        client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    a.enforce(None, &rule).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_12_walsenders_have_the_rule_before_the_barrier() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b", "node-c"]);
    let mut a = cluster.member("node-a");
    let (mut b, mut c) = (cluster.member("node-b"), cluster.member("node-c"));
    a.lead_alone().await;
    b.join(&a, 1).await;
    c.join(&a, 1).await;
    let (both, only_b, two) = (any(1, &[&b, &c], 1), any(1, &[&b], 1), any(2, &[&b, &c], 1));
    a.enforce(Some(&SyncRule::Cleared), &both).await.unwrap();
    // Removing c while its walsender has not reloaded.
    let pid = a.walsender(&c.name(1)).await;
    let frozen = freeze(pid);
    let error = a.server.enforce(Some(&both), &only_b, SOON).await.unwrap_err();
    assert!(error.to_string().contains("no walsender outside the rule counts"), "{error}");
    drop(frozen);
    a.enforce(Some(&both), &only_b).await.unwrap();

    // Raising k while a walsender may still release by the old one.
    a.enforce(Some(&only_b), &both).await.unwrap();
    let frozen = freeze(pid);
    let error = a.server.enforce(Some(&both), &two, SOON).await.unwrap_err();
    assert!(error.to_string().contains("every walsender has the rule that names nobody"), "{error}");
    drop(frozen);
    let now = Instant::now();
    a.enforce(None, &two).await.unwrap();
    took("enforce unknown -> ANY 2", now);
    let now = Instant::now();
    a.enforce(Some(&two), &both).await.unwrap();
    took("enforce ANY 2 -> ANY 1", now);
    let now = Instant::now();
    a.enforce(Some(&both), &two).await.unwrap();
    took("enforce ANY 1 -> ANY 2", now);

    // Ended by name, they come back.
    let before = a.walsender(&b.name(1)).await;
    a.server.end_walsenders(&[b.name(1)], LONG).await.unwrap();
    b.streams().await;
    assert_ne!(a.walsender(&b.name(1)).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_4_a_doubled_name_is_ended_before_the_set_is_trusted() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b", "node-c"]);
    let mut a = cluster.member("node-a");
    let (mut b, mut c) = (cluster.member("node-b"), cluster.member("node-c"));
    a.lead_alone().await;
    b.join(&a, 1).await;
    c.join(&a, 1).await;
    // c streams through its own slot, under b's name.
    let mut follow = a.followed_by(&c, 1);
    follow.walreceiver = b.name(1);
    c.server.follow(Some(&follow), LONG).await.unwrap();
    let rows = async || a.primary().await.replicas.iter().filter(|r| r.application_name == b.name(1)).count();
    until("two walsenders of one name", async || rows().await == 2).await;
    a.server.end_walsenders(&[], LONG).await.unwrap();
    // It comes back by itself: then the set is not trusted while it is doubled, or only one is left.
    let enforced = a.server.enforce(Some(&SyncRule::Cleared), &any(1, &[&b], 1), Duration::from_secs(2)).await;
    // Either it came back while the barrier ran, and that is said, or it was away for all of it.
    if let Err(error) = enforced {
        assert!(error.to_string().contains("same name") || matches!(error, PostgresError::Timeout { .. }), "{error}");
    }
    c.server.follow(Some(&a.followed_by(&c, 1)), LONG).await.unwrap();
    until("one walsender of the name", async || rows().await == 1).await;
    a.enforce(None, &any(1, &[&b], 1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_21_a_seal_is_not_held_up_by_queries_delay_or_pause() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let mut a = cluster.member("node-a");
    let mut b = cluster.member_with("node-b", &[("max_standby_streaming_delay", "-1")]);
    a.lead_alone().await;
    b.join(&a, 1).await;
    a.sql("create table locked (n int)").await;
    let end = a.primary().await.flushed;
    until("b has the table", async || b.standby().await.replayed >= end).await;
    let reader = b.client().await;
    reader.batch_execute("begin; select * from locked").await.unwrap();
    a.sql("drop table locked; create table last (n int)").await;
    let end = a.primary().await.flushed;
    until("b received the drop", async || b.standby().await.received.unwrap() >= end).await;
    until("replay waits for the lock", async || {
        let sql = "select count(*) from pg_stat_activity where backend_type = 'startup' and wait_event_type = 'Lock'";
        b.client().await.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    let now = Instant::now();
    let position = b.server.seal(LONG).await.unwrap();
    took("seal against an idle transaction that blocks replay", now);
    assert!(position.replayed >= end, "{position:?} is not at {end}");

    // A pause by hand, and everything received after it.
    b.server.follow(Some(&a.followed_by(&b, 1)), LONG).await.unwrap();
    b.streams().await;
    b.sql("select pg_wal_replay_pause()").await;
    until("paused", async || b.standby().await.replay_paused).await;
    a.sql("insert into last values (1)").await;
    let end = a.primary().await.flushed;
    until("b received it", async || b.standby().await.received.unwrap() >= end).await;
    let now = Instant::now();
    let position = b.server.seal(LONG).await.unwrap();
    took("seal with replay paused", now);
    assert!(position.replayed >= end);
    assert!(!b.standby().await.replay_paused);
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_14_numbers_between_are_planted_truly_and_taken_away_when_unused() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let (mut a, mut b) = (cluster.member("node-a"), cluster.member("node-b"));
    a.server.bootstrap().await.unwrap();
    a.start(StartMode::Parked).await;
    let position = a.server.seal(LONG).await.unwrap();
    let reserve = |parent, switch| TimelineReservation { term: Term(1), parent: TimelineId(parent), switch };
    let mut order = PromoteOrder {
        term: Term(3),
        timeline: TimelineId(4),
        parent: TimelineId(1),
        switch: position.replayed,
        between: BTreeMap::from([(TimelineId(2), reserve(1, Lsn(0x100_0000)))]),
    };
    let error = a.server.promote(&order, LONG).await.unwrap_err();
    assert!(error.to_string().contains("timeline 3 has no reservation"), "{error}");

    // Planted by a promotion that never came: the next start takes them away, and comes up parked.
    let state = a.config.state_dir.join("postgresql");
    std::fs::write(state.join("planted"), "2\n").unwrap();
    std::fs::write(a.wal_file("00000002.history"), "1\t0/1000000\tplanted\n").unwrap();
    std::fs::write(a.wal_file("00000005.history"), "1\t0/1000000\ta leader's, fetched\n").unwrap();
    a.crash();
    a.start(StartMode::Parked).await;
    assert!(!a.wal_file("00000002.history").exists() && !state.join("planted").exists());
    assert!(!a.wal_file("00000005.history").exists() && state.join("histories/00000005.history").exists());
    assert_eq!(a.standby().await.timeline, TimelineId(1));

    let position = a.server.seal(LONG).await.unwrap();
    order.between.insert(TimelineId(3), reserve(2, Lsn(0x110_0000)));
    order.switch = position.replayed;
    let promotion = a.server.promote(&order, LONG).await.unwrap();
    assert_eq!(
        (promotion.timeline, promotion.parent, promotion.switch),
        (TimelineId(4), TimelineId(1), position.replayed)
    );
    let planted = std::fs::read_to_string(a.wal_file("00000003.history")).unwrap();
    assert!(planted.starts_with("1\t0/1000000\t") && planted.contains("\n2\t0/1100000\t"), "{planted}");
    a.enforce(Some(&SyncRule::Nobody), &SyncRule::Cleared).await.unwrap();
    b.join(&a, 3).await;
    assert_eq!(b.standby().await.timeline, TimelineId(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn finding_20_any_start_is_in_recovery_and_leftovers_are_refused() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a"]);
    let mut a = cluster.member("node-a");
    a.lead_alone().await;
    // Written as ALTER SYSTEM writes it, which PostgreSQL 17 and newer refuse under our settings.
    let auto_conf = a.data_dir().join("postgresql.auto.conf");
    std::fs::write(&auto_conf, "work_mem = '5MB'\nsynchronous_standby_names = 'somebody'\n").unwrap();
    a.sql("alter role postgres set synchronous_commit = off").await;
    a.sql("select pg_reload_conf()").await;
    until("the override is reported", async || a.primary().await.exceptions.len() == 2).await;
    println!("{:?}", a.primary().await.exceptions);
    a.crash();

    // A foreign start (pg_ctl) comes up in recovery.
    a.start(StartMode::Parked).await;
    let text = std::fs::read_to_string(&auto_conf).unwrap();
    assert!(text.contains("work_mem") && !text.contains("synchronous_standby_names"), "{text}");
    a.stop();

    std::fs::write(&auto_conf, "recovery_target_time = '2020-01-01'\n").unwrap();
    let error = a.server.prepare_start(&StartMode::Parked).await.unwrap_err();
    assert!(error.to_string().contains("recovery_target_time"), "{error}");
    std::fs::write(&auto_conf, "").unwrap();
    std::fs::write(a.data_dir().join("recovery.signal"), "").unwrap();
    let error = a.server.prepare_start(&StartMode::Parked).await.unwrap_err();
    assert!(error.to_string().contains("recovery.signal"), "{error}");
    std::fs::remove_file(a.data_dir().join("recovery.signal")).unwrap();

    std::fs::write(a.config.state_dir.join("unfinished"), "clone").unwrap();
    assert_eq!(a.server.data_directory(SOON).await, DataDirectory::Unfinished { what: "clone".into() });
    assert!(a.server.prepare_start(&StartMode::Parked).await.is_err());
    let aside = a.server.set_aside("a clone was interrupted").await.unwrap();
    assert!(aside.join("PG_VERSION").exists());
    assert_eq!(a.server.data_directory(SOON).await, DataDirectory::Empty);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_directory_is_not_touched() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let a = cluster.member("node-a");
    std::fs::create_dir(a.data_dir()).unwrap();
    std::fs::write(a.data_dir().join("somebody's"), "work").unwrap();
    assert!(matches!(a.server.data_directory(SOON).await, DataDirectory::Foreign { .. }));
    let (progress, _) = tokio::sync::watch::channel((None, None));
    let results = [
        a.server.bootstrap().await.map(|_| ()),
        a.server.clone_from(&cluster.member("node-b").source(), progress).await,
        a.server.prepare_start(&StartMode::Parked).await.map(|_| ()),
    ];
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
    }
    let there: Vec<_> = std::fs::read_dir(a.data_dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(there, ["somebody's"]);
    assert!(!a.config.state_dir.join("unfinished").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_are_made_moved_on_and_dropped() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a", "node-b"]);
    let (mut a, mut b) = (cluster.member("node-a"), cluster.member("node-b"));
    a.lead_alone().await;
    b.join(&a, 1).await;
    a.sql(
        "select pg_create_physical_replication_slot('somebodys'), pg_create_physical_replication_slot('pgvigil_gone')",
    )
    .await;
    a.server.keep_slots(&[(b.id.name.clone(), None)], LONG).await.unwrap();
    let slots = a.primary().await.slots;
    assert_eq!(slots.keys().collect::<Vec<_>>(), ["pgvigil_node_b", "somebodys"]);

    b.server.keep_slots(&[(a.id.name.clone(), None)], LONG).await.unwrap();
    let before = b.standby().await.slots["pgvigil_node_a"].unwrap();
    a.sql("create table t (n int); insert into t select generate_series(1, 10000)").await;
    let end = a.primary().await.flushed;
    until("b has it", async || b.standby().await.replayed >= end).await;
    b.server.keep_slots(&[(a.id.name.clone(), Some(end))], LONG).await.unwrap();
    let after = b.standby().await.slots["pgvigil_node_a"].unwrap();
    assert!(after > before && after <= end, "{before} to {after}, at most {end}");
    a.server.checkpoint(LONG).await.unwrap();
    b.server.reload().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_filled_by_clients_is_still_sealed() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a"]);
    let mut a = cluster.member_with("node-a", &[("max_connections", "10")]);
    a.lead_alone().await;
    a.sql("create role app login password 'app'").await;
    a.stop();
    // Lowered below what the WAL was written with: every start is one as a standby, so it goes on with the old value.
    let mut lowered = cluster.member_with("node-a", &[("max_connections", "8")]);
    lowered.start(StartMode::Parked).await;
    let shown: String = lowered.client().await.query_one("show max_connections", &[]).await.unwrap().get(0);
    assert_eq!(shown, "10");
    lowered.stop();
    a.start(StartMode::Parked).await;
    let mut clients = Vec::new();
    let full = loop {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&a.config.postgresql.socket_dir).port(a.config.postgresql.port);
        config.user("app").password("app").dbname("postgres");
        match config.connect(tokio_postgres::NoTls).await {
            Ok((client, connection)) => clients.push((client, tokio::spawn(connection))),
            Err(error) => break error,
        }
    };
    assert_eq!(full.code().map(|code| code.code()), Some("53300"));
    a.server.seal(LONG).await.unwrap();
    a.promote(2).await;
    a.enforce(Some(&SyncRule::Nobody), &SyncRule::Cleared).await.unwrap();
}

/// A read that hangs makes the directory unknown, in time, and holds up nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_whose_disk_hangs_is_unknown() {
    if skipped() {
        return;
    }
    let cluster = Cluster::new(&["node-a"]);
    let a = cluster.member("node-a");
    let data = a.data_dir().to_owned();
    std::fs::create_dir_all(data.join("global")).unwrap();
    std::fs::write(data.join("PG_VERSION"), "15\n").unwrap();
    // Opening it waits until somebody writes.
    nix::unistd::mkfifo(&data.join("global/pg_control"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    for _ in 0..3 {
        let asked = Instant::now();
        let found = a.server.data_directory(SOON).await;
        assert!(matches!(&found, DataDirectory::Unknown { why } if why.contains("hangs")), "{found:?}");
        assert!(asked.elapsed() < 3 * SOON, "{:?}", asked.elapsed());
    }
}
