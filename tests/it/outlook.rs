//! "Why does it not fail over", told for clusters in every state. Golden: `UPDATE_GOLDEN=1` writes it again.

use pgvigil::core::outlook::outlook;
use pgvigil::core::records::{DataSummary, Durability, LeaderState, Membership, Tags};
use pgvigil::core::records::{Entry, Keyed};
use pgvigil::core::testing::{Cluster, cluster, lag, name, secs};
use pgvigil::core::timeline::Term;
use pgvigil::core::view::{Store, View};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/golden/outlook.txt");

fn led(durability: Durability) -> Cluster {
    let (k, members) = if durability == Durability::Async { (0, vec![]) } else { (1, vec!["b", "c"]) };
    let cluster = cluster().policy(|p| p.durability = durability).leader("a", 4);
    let cluster = cluster.standby("b", lag(0)).standby("c", lag(0)).records(|r| {
        let members = ["a", "b", "c"].map(name).into();
        r.membership = Entry::Present(Keyed { revision: 9, value: Membership { term: Term(4), members } });
    });
    match &members[..] {
        [] => cluster.sync(k, []),
        _ => cluster.sync(k, ["b", "c"]),
    }
}

fn nofailover() -> Tags {
    Tags { nofailover: true, ..Tags::default() }
}

/// The leader has been silent for so long, and so has everybody in `silent`.
fn after(mut view: View, seconds: u64, silent: &[&str]) -> View {
    view.now = view.now.plus(secs(seconds));
    for who in silent {
        view.memory.spoke.remove(&name(who));
    }
    for (_, spoke) in view.memory.spoke.iter_mut() {
        *spoke = view.now;
    }
    view
}

fn change(mut view: View, change: impl FnOnce(&mut pgvigil::core::records::ClusterRecords)) -> View {
    if let Store::Known { records, .. } = &mut view.store {
        change(records);
    }
    view
}

fn cases() -> Vec<(&'static str, View)> {
    let sync = || led(Durability::Sync);
    let cold = |cluster: Cluster| {
        let mut view = change(cluster.seen_by("b"), |r| {
            r.members.values_mut().for_each(|m| m.value.witness = false);
        });
        view.memory.witness = false;
        view
    };
    vec![
        ("all well, seen by the leader", sync().seen_by("a")),
        ("all well, seen by a standby", sync().seen_by("b")),
        ("the leader is missed, the lease is not over", after(sync().seen_by("b"), 3, &["a"])),
        ("leader and one more are gone", after(sync().seen_by("b"), 9, &["a", "c"])),
        ("the leader went on alone and is gone", after(sync().sync(0, []).seen_by("b"), 9, &["a"])),
        ("who is level must not lead", sync().tags("c", nofailover()).seen_by("a")),
        (
            "only who must not lead has everything",
            change(after(sync().standby("b", lag(64)).tags("c", nofailover()).seen_by("b"), 9, &["a"]), |r| {
                r.members.values_mut().for_each(|m| m.value.state = "running".to_owned());
            }),
        ),
        (
            "another incarnation than the claim names",
            change(after(sync().seen_by("b"), 9, &["a"]), |r| {
                r.members.get_mut(&name("c")).unwrap().value.incarnation = pgvigil::core::Incarnation(7);
            }),
        ),
        (
            "one standby has lost its data",
            change(after(sync().seen_by("b"), 9, &["a"]), |r| {
                r.members.get_mut(&name("c")).unwrap().value.data = DataSummary::Fresh;
            }),
        ),
        (
            "an election was given up",
            change(after(sync().seen_by("b"), 1, &["a", "c"]), |r| {
                if let Entry::Present(leader) = &mut r.leader {
                    leader.value.state = LeaderState::Released { to: None, why: "not enough seals".to_owned() };
                }
            }),
        ),
        ("nobody knows the claim", change(after(sync().seen_by("b"), 9, &["a"]), |r| r.sync = Entry::Absent)),
        ("async, all well", led(Durability::Async).seen_by("b")),
        ("async, everything was off, the last primary is away", after(cold(led(Durability::Async)), 9, &["a"])),
        (
            "async, and nobody waits for it any more",
            after(cold(led(Durability::Async).standby("c", lag(5000))), 61, &["a"]),
        ),
        ("the store is away", {
            let mut view = sync().seen_by("b");
            view.store = Store::Unknown { why: "cut".to_owned(), since: view.now };
            view
        }),
    ]
}

#[test]
fn why_it_does_not_fail_over_is_told_condition_by_condition() {
    let text: Vec<String> = cases().iter().map(|(what, view)| format!("# {what}\n{}", outlook(view).lines())).collect();
    let text = text.join("\n");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(GOLDEN, &text).unwrap();
    }
    let golden = std::fs::read_to_string(GOLDEN).unwrap_or_default();
    assert!(text == golden, "{GOLDEN} is not what is told now; run with UPDATE_GOLDEN=1 and read the diff\n{text}");
}

/// A forecast that an election does not bear out is worse than none.
#[test]
fn the_forecast_is_what_comes() {
    for seed in 0..8_usize {
        let mut toy = crate::decide::running(Durability::Sync);
        for _ in 0..seed * 7 {
            toy.round();
        }
        let old = toy.leader().unwrap();
        let others: Vec<_> = ["a", "b", "c"].into_iter().map(name).filter(|n| *n != old).collect();
        if seed % 2 == 1 {
            toy.member(others[seed / 2 % 2].as_str()).me.tags.nofailover = true;
        }
        for _ in 0..40 {
            toy.round();
        }
        let forecast = outlook(&toy.view(&others[0])).winner;
        toy.member(old.as_str()).die("power");
        toy.member(old.as_str()).agent = false;
        toy.until("another leader", 200, |t| t.leader().is_some_and(|l| l != old));
        assert_eq!(forecast, toy.leader());
    }
}
