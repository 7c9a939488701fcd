//! What clients see when agents die, hang, and primaries change.

use std::time::Instant;

use nix::sys::signal::Signal;
use pgvigil::demo::writer::Writer;

use super::*;

fn signal(pid: i32, what: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), what).unwrap();
}

async fn writes(writer: &Writer) {
    assert!(writer.acknowledged_after(Instant::now(), PATIENCE).await, "no write was acknowledged within {PATIENCE:?}");
}

async fn nothing_lost(cluster: &Cluster, writer: &mut Writer) {
    writes(writer).await;
    assert_eq!(writer.two_primaries(), Vec::<String>::new());
    writer.stop().await;
    let primary = cluster.wait_for_primary(PATIENCE).await.unwrap();
    let session = cluster.connect(primary, &Login::app()).await.unwrap();
    assert_eq!(writer.check(&session).await.unwrap().lost, Vec::<i64>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agents_death_is_noticed_by_no_session() {
    // Schedule 18.
    let (mut cluster, primary) = playing(options("direct = true")).await;
    let mut writer = Writer::start(cluster.endpoints(), &Login::app(), &cluster.ids, 4);
    writes(&writer).await;
    let session = through(&cluster, primary).await;
    let pid: i32 = session.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let endpoint = endpoint_pid(&cluster, primary);
    let errors = writer.error_count();
    for _ in 0..3 {
        cluster.kill_agent(primary);
        cluster.agent_gone(primary, PATIENCE).await.unwrap();
        writes(&writer).await;
        cluster.start_agent(primary).unwrap();
        cluster.healthy(PATIENCE).await.unwrap();
    }
    assert_eq!(endpoint_pid(&cluster, primary), endpoint, "the new agent took over the one that ran");
    assert_eq!(session.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0), pid);
    assert_eq!(writer.error_count(), errors);
    nothing_lost(&cluster, &mut writer).await;
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_dies_is_started_again() {
    let (cluster, primary) = playing(options("direct = true")).await;
    let before = endpoint_pid(&cluster, primary);
    signal(before, Signal::SIGKILL);
    let begun = Instant::now();
    loop {
        if let Ok(session) = sql::connect(cluster.members[primary].endpoint_port, &Login::app(), PATIENCE).await {
            session.batch_execute("SELECT 1").await.unwrap();
            break;
        }
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_ne!(endpoint_pid(&cluster, primary), before);
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_dies_costs_connections_and_no_commit() {
    let (mut cluster, primary) = playing(options("direct = true")).await;
    let mut writer = Writer::start(cluster.endpoints(), &Login::app(), &cluster.ids, 4);
    writes(&writer).await;
    for round in 0..2 {
        let primary = if round == 0 { primary } else { cluster.wait_for_primary(PATIENCE).await.unwrap() };
        cluster.kill_postmaster(primary).unwrap();
        writes(&writer).await;
        cluster.healthy(PATIENCE).await.unwrap();
    }
    let primary = cluster.wait_for_primary(PATIENCE).await.unwrap();
    cluster.kill_member(primary);
    writes(&writer).await;
    cluster.start_agent(primary).unwrap();
    cluster.healthy(PATIENCE).await.unwrap();
    nothing_lost(&cluster, &mut writer).await;
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_agents_clients_are_closed_by_the_guardians_deadline() {
    let (cluster, primary) = playing(options("direct = true")).await;
    let session = through(&cluster, primary).await;
    session.batch_execute("SELECT 1").await.unwrap();
    let stopped = cluster.stop_agent(primary);
    let begun = Instant::now();
    while !session.is_closed() {
        assert!(begun.elapsed() < PATIENCE, "a session lives on under a term that is over");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // F = T_h - K after the last renewal; the other two elect afterwards.
    assert!(stopped.elapsed() <= Duration::from_millis(3_500), "closed after {:?}", stopped.elapsed());
    let other = through(&cluster, (primary + 1) % 3).await;
    other.execute("INSERT INTO writes (id, client) VALUES (-7, 1)", &[]).await.unwrap();
    cluster.continue_agent(primary);
    cluster.healthy(PATIENCE).await.unwrap();
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_waits_are_not_taken_for_commits() {
    // Schedule 7: with notices switched off a cancelled wait for standbys looks like success.
    let (cluster, primary) = playing(options("direct = true")).await;
    let session = through(&cluster, primary).await;
    session.batch_execute("SET client_min_messages = error").await.unwrap();
    let standbys: Vec<i32> = standby_receivers(&cluster, primary);
    let stop = |what| standbys.iter().for_each(|pid| signal(*pid, what));
    stop(Signal::SIGSTOP);
    let inserting = session.execute("INSERT INTO writes (id, client) VALUES (-8, 1)", &[]);
    let cancelling = async {
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE 'INSERT%'";
        let watcher = cluster.connect(primary, &Login::superuser()).await.unwrap();
        while watcher.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 0 {}
        session.cancel_token().cancel_query(tokio_postgres::NoTls).await.unwrap();
        // PostgreSQL has answered by now: nobody waits there any more.
        while watcher.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) > 0 {}
        watcher
    };
    let mut inserting = std::pin::pin!(inserting);
    let watcher = tokio::select! {
        answer = &mut inserting => panic!("an answer passed that no standby has: {answer:?}"),
        watcher = cancelling => watcher,
    };
    let barrier =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'pgvigil barrier'";
    let barrier_seen = async { while watcher.query_one(barrier, &[]).await.unwrap().get::<_, i64>(0) == 0 {} };
    tokio::select! {
        answer = &mut inserting => panic!("an answer passed that no standby has: {answer:?}"),
        () = barrier_seen => {}
    }
    stop(Signal::SIGCONT);
    inserting.await.unwrap();
    leaves_nothing(cluster).await;
}

/// Walreceivers of the other members.
fn standby_receivers(cluster: &Cluster, primary: usize) -> Vec<i32> {
    let all = (0..cluster.members.len()).filter(|member| *member != primary);
    let of = |member: usize| {
        let postmaster = cluster.members[member].postmaster().unwrap();
        let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children")).unwrap();
        let receiver = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("walreceiver"))
        };
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(receiver).unwrap()
    };
    all.map(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_finds_the_primary_through_changes_and_restarts() {
    let (mut cluster, primary) = playing(options("direct = true")).await;
    let directory = cluster.base.join("router");
    std::fs::create_dir_all(&directory).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = directory.join("router.toml");
    let state = directory.join("route.json");
    let text = format!(
        "[router]\nname = \"region-a\"\nmembers = {:?}\nlisten = [\"127.0.0.1:{port}\"]\nstate_file = {state:?}\n",
        cluster.urls()
    );
    std::fs::write(&file, text).unwrap();
    let router = || {
        tokio::process::Command::new(BINARY)
            .args(["router", "--config"])
            .arg(&file)
            .stderr(std::fs::OpenOptions::new().append(true).create(true).open(directory.join("log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    };
    let mut running = router();
    let at = || {
        vec![pgvigil::demo::writer::Address {
            member: "router".to_owned(),
            at: std::net::SocketAddr::from(([127, 0, 0, 1], port)),
        }]
    };
    let mut writer = Writer::start(at(), &Login::app(), &cluster.ids, 3);
    writes(&writer).await;
    cluster.kill_postmaster(primary).unwrap();
    writes(&writer).await;
    cluster.healthy(PATIENCE).await.unwrap();

    // Agents all gone, endpoints and PostgreSQL not: a router that starts now goes on with what it knew.
    running.start_kill().unwrap();
    running.wait().await.unwrap();
    for member in 0..3 {
        cluster.kill_agent(member);
    }
    let mut running = router();
    let begun = Instant::now();
    let session = loop {
        match sql::connect(port, &Login::app(), Duration::from_secs(2)).await {
            Err(why) if why.contains("refused") && begun.elapsed() < Duration::from_secs(1) => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            other => break other,
        }
    };
    let wrote = match session {
        Ok(session) => {
            session.execute("INSERT INTO writes (id, client) VALUES (-9, 1)", &[]).await.map_err(|e| e.to_string())
        }
        Err(why) => Err(why),
    };
    for member in 0..3 {
        cluster.start_agent(member).unwrap();
    }
    assert!(wrote.is_ok(), "{wrote:?}: {}", std::fs::read_to_string(directory.join("log")).unwrap());
    cluster.healthy(PATIENCE).await.unwrap();
    nothing_lost(&cluster, &mut writer).await;
    running.start_kill().unwrap();
    running.wait().await.unwrap();
    leaves_nothing(cluster).await;
}
