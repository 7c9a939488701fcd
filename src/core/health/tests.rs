use super::*;
use crate::core::records::Entry;
use crate::core::testing::{Cluster, NOW, cluster, id, lag, secs};

/// Primary `a` under term 4; `b` is synchronous, `c` is not.
fn healthy() -> Cluster {
    cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(2_000)).sync(1, ["b"])
}

fn passes(check: Check, view: &View) {
    let verdict = judge(check, view, NOW, NOW, &Query::default());
    assert!(verdict.is_ok(), "{check:?}: {verdict:?}");
}

fn fails(check: Check, view: &View, because: &str) {
    fails_with(check, view, &Query::default(), because);
}

fn fails_with(check: Check, view: &View, query: &Query, because: &str) {
    let verdict = judge(check, view, NOW, NOW, query);
    let reason = verdict.expect_err(&format!("{check:?} must fail because of `{because}`"));
    assert!(reason.contains(because), "{check:?}: `{reason}` does not say `{because}`");
}

const ALL: [Check; 13] = [
    Check::Primary,
    Check::Leader,
    Check::StandbyLeader,
    Check::Replica,
    Check::ReadOnly,
    Check::Synchronous,
    Check::Asynchronous,
    Check::Quorum,
    Check::ReadOnlySynchronous,
    Check::ReadOnlyQuorum,
    Check::Health,
    Check::Liveness,
    Check::Readiness,
];

fn yes(view: &View) -> Vec<Check> {
    ALL.into_iter().filter(|check| judge(*check, view, NOW, NOW, &Query::default()).is_ok()).collect()
}

#[test]
fn each_role_passes_its_own_checks_and_no_others() {
    use Check::*;
    let primary = [Primary, Leader, ReadOnly, ReadOnlySynchronous, ReadOnlyQuorum, Health, Liveness, Readiness];
    assert_eq!(yes(&healthy().seen_by("a")), primary);
    let synchronous =
        [Replica, ReadOnly, Synchronous, Quorum, ReadOnlySynchronous, ReadOnlyQuorum, Health, Liveness, Readiness];
    assert_eq!(yes(&healthy().seen_by("b")), synchronous);
    assert_eq!(yes(&healthy().seen_by("c")), [Replica, ReadOnly, Asynchronous, Health, Liveness, Readiness]);
    let mut down = healthy().seen_by("b");
    down.local.postgres = LocalPostgres::Down;
    assert_eq!(yes(&down), [Liveness]);
}

#[test]
fn primary_needs_the_record_the_lease_and_a_writable_postgresql() {
    let a = healthy().seen_by("a");
    let with = |change: &dyn Fn(&mut View)| {
        let mut view = a.clone();
        change(&mut view);
        view
    };
    passes(Check::Primary, &a);
    fails(Check::Primary, &with(&|v| v.lease = LeaseView::None), "no lease");
    fails(Check::Primary, &with(&|v| v.lease = LeaseView::Lost { term: Term(4), deadline: None }), "no lease");
    fails(Check::Primary, &with(&|v| v.lease = LeaseView::Held { term: Term(4), deadline: NOW }), "is over");
    fails(Check::Primary, &with(&|v| v.local.postgres = LocalPostgres::Down), "does not run");
    let standby = healthy().seen_by("b").local.postgres;
    fails(Check::Primary, &with(&|v| v.local.postgres = standby.clone()), "is a standby");
    let read_only = |v: &mut View| {
        if let LocalPostgres::Primary(facts) = &mut v.local.postgres {
            facts.writable = false;
        }
    };
    fails(Check::Primary, &with(&read_only), "read-only");
    passes(Check::Leader, &with(&read_only));
}

#[test]
fn a_record_of_another_holder_or_state_outweighs_the_lease() {
    let leader = |change: &dyn Fn(&mut LeaderRecord)| {
        let mut view = healthy().seen_by("a");
        if let Store::Known { records, .. } = &mut view.store
            && let Entry::Present(keyed) = &mut records.leader
        {
            change(&mut keyed.value);
        }
        view
    };
    fails(Check::Primary, &leader(&|l| l.holder = id("b")), "b leads under term 4");
    fails(Check::Primary, &leader(&|l| l.term = Term(5)), "under term 5");
    fails(Check::Primary, &leader(&|l| l.state = LeaderState::Released { to: None, why: "x".into() }), "released");
    let electing = LeaderState::Electing { coordinator: id("a").name, preferred: None, winner: None };
    fails(Check::Primary, &leader(&|l| l.state = electing.clone()), "not yet open");
    // A store that was set back is rewritten by the sitting leader (protocol §7).
    passes(Check::Primary, &leader(&|l| l.term = Term(3)));
}

#[test]
fn a_lost_store_does_not_take_the_primary_out_of_service() {
    let mut view = healthy().seen_by("a");
    view.store = Store::Unknown { why: "no quorum".into(), since: NOW };
    passes(Check::Primary, &view);
    view.job = Some(crate::core::view::Job {
        what: JobKind::Promote { term: Term(4) },
        since: NOW,
        done_bytes: None,
        total_bytes: None,
        result: None,
    });
    fails(Check::Primary, &view, "not known to be complete");
    let deleted = healthy().records(|r| r.leader = Entry::Absent);
    let mut view = healthy().seen_by("a");
    view.store = deleted.seen_by("b").store;
    passes(Check::Primary, &view);
    let mut standby = healthy().seen_by("b");
    standby.store = Store::Unknown { why: "no quorum".into(), since: NOW };
    passes(Check::Replica, &standby);
    fails(Check::Synchronous, &standby, "store is not readable");
    fails(Check::Asynchronous, &standby, "store is not readable");
}

#[test]
fn a_hanging_loop_speaks_for_nobody() {
    for who in ["a", "b", "c"] {
        let view = healthy().seen_by(who);
        for check in ALL {
            let late = judge(check, &view, NOW, NOW.plus(secs(17)), &Query::default());
            assert!(late.is_err(), "{who} {check:?}");
        }
    }
    // Published again and again, but PostgreSQL was not looked at.
    let mut view = healthy().seen_by("b");
    view.local.observed_at = NOW.minus(secs(9));
    fails(Check::Replica, &view, "last look at PostgreSQL");
    passes(Check::Liveness, &view);
}

#[test]
fn liveness_waits_twice_as_long_for_who_has_no_lease() {
    let at =
        |who: &str, age| judge(Check::Liveness, &healthy().seen_by(who), NOW, NOW.plus(secs(age)), &Query::default());
    assert!(at("a", 7).is_ok() && at("a", 8).is_err());
    assert!(at("b", 15).is_ok() && at("b", 16).is_err());
}

#[test]
fn lag_limits_compare_with_the_leaders_position() {
    let query = |lag| Query { lag: Some(lag), ..Query::default() };
    let c = healthy().seen_by("c");
    assert!(judge(Check::Replica, &c, NOW, NOW, &query(LagLimit::Bytes(2_000))).is_ok());
    fails_with(Check::Replica, &c, &query(LagLimit::Bytes(1_999)), "2000 bytes behind, 1999 allowed");
    fails_with(Check::ReadOnly, &c, &query(LagLimit::Bytes(0)), "2000 bytes behind");
    // A primary has no lag.
    assert!(judge(Check::ReadOnly, &healthy().seen_by("a"), NOW, NOW, &query(LagLimit::Bytes(0))).is_ok());
}

#[test]
fn written_is_not_applied() {
    let mut view = healthy().seen_by("b");
    if let LocalPostgres::Standby(facts) = &mut view.local.postgres {
        facts.replayed = lag(500);
    }
    let query = |mode| Query { lag: Some(LagLimit::Bytes(0)), mode, ..Query::default() };
    assert!(judge(Check::Readiness, &view, NOW, NOW, &query(LagMode::Write)).is_ok());
    fails_with(Check::Readiness, &view, &query(LagMode::Apply), "500 bytes behind");
}

#[test]
fn an_unknown_lag_is_not_a_small_one() {
    let mut view = healthy().records(|r| r.lease = Entry::Absent).seen_by("b");
    if let LocalPostgres::Standby(facts) = &mut view.local.postgres {
        facts.receiver = Receiver::None;
        facts.replay_delay_ms = None;
    }
    let query = |lag| Query { lag: Some(lag), ..Query::default() };
    fails_with(Check::Replica, &view, &query(LagLimit::Bytes(u64::MAX)), "not known");
    fails_with(Check::Replica, &view, &query(LagLimit::Time(secs(100))), "not known");
    passes(Check::Replica, &view);
}

#[test]
fn an_idle_leader_makes_no_lag_in_time() {
    let query = Query { lag: Some(LagLimit::Time(secs(1))), ..Query::default() };
    let old = |who| {
        let mut view = healthy().seen_by(who);
        if let LocalPostgres::Standby(facts) = &mut view.local.postgres {
            facts.replay_delay_ms = Some(60_000);
        }
        view
    };
    assert!(judge(Check::Replica, &old("b"), NOW, NOW, &query).is_ok());
    fails_with(Check::Replica, &old("c"), &query, "60.0 s behind");
}

#[test]
fn readiness_needs_streaming_within_max_lag() {
    let far = cluster().leader("a", 4).standby("b", lag(1024 * 1024 + 1)).seen_by("b");
    fails(Check::Readiness, &far, "1048576 allowed");
    let mut parked = healthy().seen_by("b");
    if let LocalPostgres::Standby(facts) = &mut parked.local.postgres {
        facts.receiver = Receiver::Connecting;
    }
    fails(Check::Readiness, &parked, "not streaming");
    let mut unled = healthy().seen_by("a");
    unled.lease = LeaseView::None;
    fails(Check::Readiness, &unled, "no lease");
}

#[test]
fn tags_count_on_every_check() {
    let tags = Tags { custom: [("zone".to_owned(), "east".to_owned())].into(), ..Tags::default() };
    let members = healthy().tags("a", tags.clone()).tags("b", tags.clone()).tags("c", tags);
    let query = |key: &str, value: &str| Query { tags: vec![(key.to_owned(), value.to_owned())], ..Query::default() };
    for who in ["a", "b", "c"] {
        let view = members.seen_by(who);
        for check in yes(&view) {
            assert!(judge(check, &view, NOW, NOW, &query("zone", "east")).is_ok(), "{who} {check:?}");
            fails_with(check, &view, &query("zone", "west"), "tag zone is `east`, not `west`");
            fails_with(check, &view, &query("rack", "1"), "no tag rack");
            assert!(judge(check, &view, NOW, NOW, &query("nofailover", "false")).is_ok(), "{who} {check:?}");
        }
    }
}

#[test]
fn noloadbalance_hides_a_standby_from_readers_only() {
    let tags = Tags { noloadbalance: true, ..Tags::default() };
    let b = healthy().tags("b", tags.clone()).seen_by("b");
    for check in [Check::Replica, Check::ReadOnly, Check::Synchronous, Check::Quorum] {
        fails(check, &b, "noloadbalance");
    }
    passes(Check::Health, &b);
    passes(Check::Readiness, &b);
    passes(Check::ReadOnly, &healthy().tags("a", tags).seen_by("a"));
}

#[test]
fn a_claim_of_another_incarnation_or_of_nobody_is_not_synchronous() {
    let mut other = healthy().seen_by("b");
    other.me.id.incarnation.0 += 1;
    fails(Check::Synchronous, &other, "not in the synchronous set");
    let none = cluster().leader("a", 4).standby("b", lag(0)).sync(0, ["b"]).seen_by("b");
    fails(Check::Quorum, &none, "not in the synchronous set");
    passes(Check::Asynchronous, &none);
}

#[test]
fn replication_state_is_compared() {
    let query = |state| Query { replication_state: Some(state), ..Query::default() };
    let mut view = healthy().seen_by("b");
    assert!(judge(Check::Replica, &view, NOW, NOW, &query(ReplicationState::Streaming)).is_ok());
    fails_with(Check::Replica, &view, &query(ReplicationState::InArchiveRecovery), "not in archive recovery");
    if let LocalPostgres::Standby(facts) = &mut view.local.postgres {
        facts.receiver = Receiver::None;
    }
    fails_with(Check::Replica, &view, &query(ReplicationState::Streaming), "no walreceiver");
}

#[test]
fn a_silent_leader_is_no_leader() {
    let mut view = healthy().seen_by("b");
    assert!(sitting_leader(&view, NOW).is_some());
    assert!(sitting_leader(&view, NOW.plus(secs(9))).is_none());
    view.store = Store::Unknown { why: "no quorum".into(), since: NOW };
    assert!(sitting_leader(&view, NOW).is_none());
}
