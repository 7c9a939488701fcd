use super::*;
use crate::api::testing::published;
use crate::core::records::Entry;
use crate::core::testing::{Cluster, NOW, cluster, idle, lag, name, secs};

fn healthy() -> Cluster {
    cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(2_000)).sync(1, ["b", "c"])
}

fn shown(view: View) -> Overview {
    overview("maas", &published(view, idle()), None, NOW)
}

#[test]
fn a_healthy_cluster_has_no_warnings_from_anywhere() {
    for who in ["a", "b", "c"] {
        let overview = shown(healthy().seen_by(who));
        assert_eq!(overview.warnings, Vec::<String>::new(), "{who}");
        assert_eq!(overview.leader.member, Some(name("a")));
        assert!(!overview.durability.degraded && !overview.durability.stalled);
        let roles: Vec<Standing> = overview.members.iter().map(|m| m.role).collect();
        assert_eq!(roles, [Standing::Leader, Standing::Standby, Standing::Standby]);
        assert_eq!(overview.members[2].lag_bytes, Some(2_000));
        assert_eq!(overview.members[0].lag_bytes, None);
    }
}

#[test]
fn durability_says_what_is_promised_now() {
    let says = |cluster: Cluster, degraded: bool, stalled: bool, text: &str| {
        let durability = shown(cluster.seen_by("a")).durability;
        assert_eq!((durability.degraded, durability.stalled), (degraded, stalled), "{}", durability.message);
        assert!(durability.message.contains(text), "{}", durability.message);
    };
    says(healthy(), false, false, "at least 1 of 2");
    says(healthy().policy(|p| p.k = 2), true, false, "1 of 2 standbys, 2 are wanted");
    says(cluster().leader("a", 4).sync(0, []), true, false, "commits are lost");
    says(cluster().leader("a", 4).sync(1, ["b"]), false, true, "only 0 of them stream");
    says(healthy().records(|r| r.sync = Entry::Absent), true, false, "no set is published");
    says(healthy().policy(|p| p.durability = Durability::Async).sync(0, []), false, false, "disk alone");
}

#[test]
fn an_unreadable_store_shows_the_last_reading_with_its_age() {
    let mut view = healthy().seen_by("b");
    let last = view.clone();
    view.now = NOW.plus(secs(5));
    view.store = Store::Unknown { why: "no quorum".into(), since: NOW };
    let overview = overview("maas", &published(view, idle()), Some(&last), NOW.plus(secs(5)));
    assert_eq!(overview.store.showing_ms_ago, Some(5_000));
    assert_eq!(overview.members[0].role, Standing::Leader);
    assert!(overview.warnings[0].contains("no quorum"), "{:?}", overview.warnings);
}

#[test]
fn members_who_never_spoke_are_named() {
    let overview = shown(cluster().leader("a", 4).standby("b", lag(0)).sync(1, ["b"]).seen_by("a"));
    assert_eq!(overview.members[2].role, Standing::Unknown);
    assert_eq!(overview.warnings, ["c has not been heard of"]);
}

#[test]
fn a_silent_leader_is_called_silent() {
    let view = healthy().seen_by("b");
    let overview = overview("maas", &published(view, idle()), None, NOW.plus(secs(9)));
    assert_eq!(overview.leader.state, "silent");
    assert_eq!(overview.leader.member, None);
    assert_eq!(overview.members[0].role, Standing::Unled);
}
