//! Way B on real processes: who takes over before the lease has run out, and that the old primary acknowledges nothing more.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;

/// The reason of whoever began the last election, from the decisions of all who still answer.
async fn takeover_reason(cluster: &Cluster, but: usize) -> Option<String> {
    for member in (0..cluster.members.len()).filter(|member| *member != but) {
        let decisions = get(cluster, member, "/v1/decisions").await;
        let listed = decisions.as_array().or_else(|| decisions["decisions"].as_array());
        let of_takeover = listed.into_iter().flatten().rev().find(|d| d["rule"] == "takeover");
        if let Some(reason) = of_takeover.and_then(|decision| decision["reason"].as_str()) {
            return Some(reason.to_owned());
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_member_is_replaced_because_its_ports_refuse() {
    let (mut cluster, leader, writer) = playing(options()).await;
    synchronous(&cluster, leader).await;
    let began = term(&cluster, leader).await;
    let fault = cluster.kill_member(leader);
    let next = cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap();
    writes(&writer).await;
    eprintln!("outage after agent and postgresql were killed: {:?}", writer.outage(fault));
    let why = takeover_reason(&cluster, leader).await.expect("somebody took over");
    assert!(why.contains("refuses connections on both ports"), "{why}");
    assert_eq!(term(&cluster, next).await, began + 1);

    cluster.start_agent(leader).unwrap();
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);
    ends_well(cluster, writer).await;
}

/// Agent, guardian and PostgreSQL are stopped at once, as when a virtual machine is paused: nothing kills the old primary, and
/// when it goes on its lease is still valid by its own clock. Only the seals keep it from acknowledging.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_member_is_replaced_and_acknowledges_nothing_when_it_goes_on() {
    // The default lease: it must not have run out when the member wakes.
    let (cluster, leader, writer) =
        playing(Options { binary: Some(PathBuf::from(BINARY)), ..Options::default() }).await;
    synchronous(&cluster, leader).await;
    let began = term(&cluster, leader).await;
    let name = cluster.members[leader].name.clone();
    let send = |signal: Signal, pids: &[i32]| {
        for pid in pids {
            // A backend may have ended by itself meanwhile.
            let _ = kill(Pid::from_raw(*pid), signal);
        }
    };
    let fault = Instant::now();
    let paused = cluster.members[leader].processes();
    send(Signal::SIGSTOP, &paused);
    let next = cluster.wait_for_primary_but(leader, PATIENCE).await.unwrap();
    writes(&writer).await;
    eprintln!("outage after the member was paused: {:?}", writer.outage(fault));
    let woken = Instant::now();
    send(Signal::SIGCONT, &paused);
    let why = takeover_reason(&cluster, leader).await.expect("somebody took over");
    assert!(why.contains(&format!("{name} gives no sign of life")), "{why}");
    assert_eq!(term(&cluster, next).await, began + 1);
    // It says itself that the suspicion was wrong, if it woke before its guardian's deadline.
    assert_eq!(cluster.healthy(PATIENCE).await.unwrap(), next);
    eprintln!("whole again after {:?}", woken.elapsed());
    let log = std::fs::read_to_string(cluster.members[leader].agent_log()).unwrap();
    assert!(log.contains("holds term") || log.contains("is an election"), "it read the higher term");
    ends_well(cluster, writer).await;
}
