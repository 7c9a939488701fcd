//! Disks that stall or are full, and standbys that stream without acknowledging (protocol §3, §4, L4).

use std::collections::BTreeMap;
use std::time::Duration;

use pgvigil::core::decide::decide;
use pgvigil::core::plan::Step;
use pgvigil::core::records::{Durability, LeaderState, StorageSummary, Write};
use pgvigil::core::storage::{Disk, Failure, Place, Probe, Space, StoragePolicy};
use pgvigil::core::testing::{NOW, cluster, lag, name, secs};
use pgvigil::core::view::{DataDirectory, GuardState, LocalPostgres, View};
use pgvigil::core::{Lsn, MemberName, Moment};

use crate::decide::{running, two_standbys};
use crate::toy::{Pg, ROUND, Toy};

fn others(leader: &MemberName) -> Vec<MemberName> {
    ["a", "b", "c"].into_iter().map(name).filter(|n| n != leader).collect()
}

fn rounds(span: Duration) -> usize {
    (span.as_millis() / ROUND.as_millis()) as usize
}

// === Tables ===

/// The leader a with standbys b and c, whose disk shows `probe` since the loop came round a moment ago.
fn leading(probe: Probe) -> View {
    let mut view = cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(0)).sync(1, ["b", "c"]).seen_by("a");
    for n in ["b", "c"] {
        view.memory.streamed.insert(name(n), (lag(0), NOW));
    }
    view.memory.kept_revision = Some(50);
    view.memory.sync_settled = true;
    with_disk(&mut view, Place::Data, probe);
    view
}

fn with_disk(view: &mut View, place: Place, probe: Probe) {
    if let Probe::Waiting { since } | Probe::Failed { since, .. } = &probe {
        view.memory.storage.insert(place, (*since, *since));
    }
    let space = Some(Space { free_bytes: 50 << 30, total_bytes: 100 << 30 });
    view.local.storage.places.insert(place, Disk { path: "/data".to_owned(), probe, space });
}

fn ago(seconds: u64) -> Moment {
    NOW.minus(secs(seconds))
}

fn waiting(seconds: u64) -> Probe {
    Probe::Waiting { since: ago(seconds) }
}

fn failing(failure: Failure) -> Probe {
    Probe::Failed { since: ago(5), failure, why: "input/output error".to_owned() }
}

#[test]
fn a_leader_whose_disk_takes_no_writes_gives_up_and_nothing_less_makes_it() {
    for (probe, rule) in [
        (Probe::Works { at: NOW, latency_ms: 1 }, "leader"),
        (Probe::Unknown { why: "it does not run".to_owned() }, "leader"),
        (waiting(3), "leader"),
        (waiting(4), "storage"),
        (failing(Failure::Io), "storage"),
        (failing(Failure::ReadOnly), "storage"),
        (failing(Failure::Full), "leader"),
        (failing(Failure::Other), "leader"),
    ] {
        let plan = decide(&leading(probe.clone()));
        assert_eq!(plan.rule.split('.').next(), Some(rule), "{probe:?}: {}", plan.reason);
    }
    let mut state = leading(Probe::Works { at: NOW, latency_ms: 1 });
    with_disk(&mut state, Place::State, waiting(10));
    let plan = decide(&state);
    assert_ne!(plan.rule, "storage", "PostgreSQL can commit");
    assert!(plan.reason.contains("nothing can be promised"), "{}", plan.reason);
    let mut wal = leading(Probe::Works { at: NOW, latency_ms: 1 });
    with_disk(&mut wal, Place::Wal, waiting(10));
    assert_eq!(decide(&wal).rule, "storage");
}

#[test]
fn a_stall_is_noticed_at_its_time_and_not_at_the_next_heartbeat() {
    let plan = decide(&leading(waiting(3)));
    assert_eq!(plan.wake, Some(NOW.plus(secs(1))));
}

/// S2: the seals prove what was acknowledged, so the release does not wait for processes that hang; S1, async: they are the
/// proof, so it does.
#[test]
fn in_sync_mode_the_release_comes_first_and_in_async_mode_the_kill() {
    let order = |view: &View| -> Vec<&'static str> {
        let step = |step: &Step| match step {
            Step::Kill => Some("kill"),
            Step::DropLease => Some("drop"),
            Step::Commit { transaction, .. } => transaction.write.iter().find_map(|write| match write {
                Write::Leader(record) if matches!(record.state, LeaderState::Released { to: Some(_), .. }) => {
                    Some("release")
                }
                _ => None,
            }),
            _ => None,
        };
        decide(view).steps.iter().filter_map(step).collect()
    };
    assert_eq!(order(&leading(waiting(5))), ["release", "kill", "drop"]);
    let mut view = cluster()
        .policy(|p| p.durability = Durability::Async)
        .leader("a", 4)
        .standby("b", lag(0))
        .sync(0, [])
        .seen_by("a");
    view.memory.streamed.insert(name("b"), (lag(0), NOW));
    with_disk(&mut view, Place::Data, waiting(5));
    assert_eq!(order(&view), ["kill", "release", "drop"]);
}

#[test]
fn a_leader_that_nobody_can_follow_stays_and_says_so() {
    let records = |view: &mut View, change: fn(&mut StorageSummary)| {
        let pgvigil::core::view::Store::Known { records, .. } = &mut view.store else { panic!("readable") };
        records.members.values_mut().for_each(|m| change(&mut m.value.storage));
    };
    let mut nobody = leading(waiting(6));
    nobody.memory.streamed.clear();
    let mut one_of_two = leading(waiting(6));
    one_of_two.memory.beats.remove(&name("c"));
    let mut all_stalled = leading(waiting(6));
    records(&mut all_stalled, |s| s.trouble = Some("stalled".to_owned()));
    let mut all_full = leading(waiting(6));
    records(&mut all_full, |s| s.full = Some("full".to_owned()));
    for (view, why) in [
        (nobody, "no standby is ready"),
        (one_of_two, "missing: c"),
        (all_stalled, "no standby is ready"),
        (all_full, "no standby is ready"),
    ] {
        let plan = decide(&view);
        assert!(!plan.steps.contains(&Step::Kill), "{}", plan.rule);
        assert!(plan.reason.contains("stalled") && plan.reason.contains(why), "{}", plan.reason);
    }
}

#[test]
fn what_waits_for_a_job_does_not_wait_when_the_disk_hangs() {
    use pgvigil::core::view::{Job, JobKind};
    let mut view = leading(waiting(5));
    let what = JobKind::HandOver { to: Some(name("b")) };
    view.job = Some(Job { what, since: ago(5), done_bytes: None, total_bytes: None, result: None });
    assert_eq!(decide(&view).rule, "storage");
}

#[test]
fn nothing_is_started_on_a_disk_that_hangs_or_is_full() {
    let down = |probe: Probe, free: u64| {
        let mut view = cluster().leader("a", 4).standby("b", lag(0)).sync(1, ["b"]).seen_by("b");
        view.local.postgres = LocalPostgres::Down;
        view.local.guard.state = GuardState::Idle { exit: None };
        with_disk(&mut view, Place::Data, probe);
        view.local.storage.places.get_mut(&Place::Data).unwrap().space =
            Some(Space { free_bytes: free, total_bytes: 100 << 30 });
        decide(&view)
    };
    let works = || Probe::Works { at: NOW, latency_ms: 1 };
    for (plan, rule) in [
        (down(works(), 50 << 30), "follow.start"),
        (down(waiting(5), 50 << 30), "follow.stalled"),
        (down(works(), 10 << 20), "follow.full"),
    ] {
        assert_eq!(plan.rule, rule, "{}", plan.reason);
        let starts = plan.steps.iter().any(|step| matches!(step, Step::Start { .. }));
        assert_eq!(starts, rule == "follow.start");
    }
    let full = down(works(), 10 << 20);
    assert!(full.reason.contains("free at least 54 MB there"), "{}", full.reason);
}

#[test]
fn a_copy_is_refused_without_room_and_beyond_the_budget() {
    let reclone = |free: u64, aside: u64, size: u64| {
        let mut view = cluster()
            .leader("a", 4)
            .standby("b", lag(0))
            .sync(1, [])
            .records(|r| {
                r.members.get_mut(&name("a")).unwrap().value.storage.data_bytes = Some(10 << 30);
            })
            .seen_by("b");
        view.memory.not_streaming = Some(ago(100));
        with_disk(&mut view, Place::Data, Probe::Works { at: NOW, latency_ms: 1 });
        view.local.storage.places.get_mut(&Place::Data).unwrap().space =
            Some(Space { free_bytes: free, total_bytes: 100 << 30 });
        (view.local.storage.data_bytes, view.local.storage.aside_bytes) = (Some(size), Some(aside));
        decide(&view)
    };
    assert_eq!(reclone(50 << 30, 0, 10 << 30).rule, "follow.reclone");
    assert_eq!(reclone(50 << 30, 0, 30 << 30).rule, "follow.reclone", "the first is always set aside");
    let no_room = reclone(4 << 30, 0, 10 << 30);
    assert_eq!(no_room.rule, "follow.no_room");
    assert!(no_room.reason.contains("free 6208 MB there"), "{}", no_room.reason);
    assert_eq!(reclone(50 << 30, 15 << 30, 10 << 30).rule, "follow.no_room");
    let mut empty = cluster()
        .leader("a", 4)
        .sync(0, [])
        .records(|r| {
            r.members.get_mut(&name("a")).unwrap().value.storage.data_bytes = Some(10 << 30);
        })
        .seen_by("b");
    empty.local.data = DataDirectory::Empty;
    with_disk(&mut empty, Place::Data, Probe::Works { at: NOW, latency_ms: 1 });
    assert_eq!(decide(&empty).rule, "clone");
    empty.local.storage.places.get_mut(&Place::Data).unwrap().space =
        Some(Space { free_bytes: 1 << 30, total_bytes: 2 << 30 });
    assert_eq!(decide(&empty).rule, "clone.no_room");
}

#[test]
fn slots_follow_the_free_disk_and_lost_ones_are_made_anew() {
    let with = |bound: Option<u64>, free: u64, lost: bool, derive: bool| {
        let mut view = leading(Probe::Works { at: NOW, latency_ms: 1 });
        view.policy.storage = StoragePolicy { bound_slots: derive, ..StoragePolicy::default() };
        view.local.storage.places.get_mut(&Place::Data).unwrap().space =
            Some(Space { free_bytes: free, total_bytes: 100 << 30 });
        let LocalPostgres::Primary(primary) = &mut view.local.postgres else { panic!("a primary") };
        let at = |n: &str| (name(n).slot(), Some(Lsn(1)));
        primary.slots = BTreeMap::from([at("b"), at("c")]);
        if lost {
            primary.slots.insert(name("b").slot(), None);
        }
        primary.slot_bound = bound;
        view.local.storage.data_bytes = None;
        let pgvigil::core::view::Store::Known { records, .. } = &mut view.store else { panic!("readable") };
        let members = ["a", "b", "c"].map(name).into();
        records.membership = pgvigil::core::records::Entry::Present(pgvigil::core::records::Keyed {
            revision: 1,
            value: pgvigil::core::records::Membership { term: pgvigil::core::Term(4), members },
        });
        view.memory.sync_settled = true;
        decide(&view).rule
    };
    assert_eq!(with(Some(8 << 30), 20 << 30, false, true), "leader");
    assert_eq!(with(Some(8 << 30), 2 << 30, false, true), "leader.slot_bound");
    assert_eq!(with(Some(8 << 30), 2 << 30, false, false), "leader", "the operator's own");
    assert_eq!(with(None, 2 << 30, false, true), "leader");
    assert_eq!(with(Some(8 << 30), 20 << 30, true, true), "leader.slot_lost");
}

// === Stories: the disk ===

#[test]
fn a_stalled_disk_leads_to_a_failover_and_its_thaw_acknowledges_nothing() {
    for durability in [Durability::Sync, Durability::Async] {
        let mut toy = running(durability);
        let old = toy.leader().unwrap();
        let (timeline, told) = toy.acknowledged.iter().next_back().map(|(t, at)| (*t, *at)).unwrap();
        toy.member(old.as_str()).stalled = Some(toy.now);
        toy.until("another leader", rounds(secs(6)), |t| t.leader().is_some_and(|l| l != old));
        for _ in 0..100 {
            toy.round();
        }
        assert_eq!(toy.acknowledged[&timeline], told, "nothing is acknowledged on the old timeline");
        toy.member(old.as_str()).stalled = None;
        toy.until("the old one streams again", 400, two_standbys);
        assert_ne!(toy.leader(), Some(old));
    }
}

#[test]
fn a_stall_that_nobody_can_take_over_from_is_sat_out() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let writers = toy.writers.len();
    for n in others(&old) {
        toy.member(n.as_str()).die("power");
        toy.member(n.as_str()).agent = false;
    }
    toy.member(old.as_str()).stalled = Some(toy.now);
    for _ in 0..200 {
        toy.round();
        assert!(matches!(toy.members[&old].pg, Pg::Primary { .. }), "{:?}", toy.members[&old].last);
    }
    assert!(toy.members[&old].last.as_ref().unwrap().reason.contains("nobody can take over"));
    toy.member(old.as_str()).stalled = None;
    for n in others(&old) {
        toy.member(n.as_str()).restart_agent();
    }
    toy.until("whole", 400, |t| two_standbys(t) && t.records.sync.value().is_some_and(|s| s.k == 1));
    assert_eq!((toy.leader(), toy.writers.len()), (Some(old), writers));
}

#[test]
fn a_standby_with_a_stalled_disk_does_not_stand_and_leaves_the_set() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let (b, c) = (others(&old).remove(0), others(&old).remove(1));
    toy.member(b.as_str()).stalled = Some(toy.now);
    toy.until("b left the set", rounds(secs(5)), |t| {
        t.records.sync.value().is_some_and(|s| s.k == 1 && s.members.iter().all(|id| id.name != b))
    });
    for _ in 0..30 {
        toy.round();
    }
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    for _ in 0..200 {
        toy.round();
        assert_ne!(toy.records.leader().map(|l| &l.holder.name), Some(&b), "b stood or won");
    }
    assert!(toy.members[&b].last.as_ref().unwrap().reason.contains("stalled"));
    toy.member(old.as_str()).restart_agent();
    toy.until("another leader", 400, |t| t.leader().is_some_and(|l| l == c || l == old));
}

#[test]
fn a_crash_on_a_full_disk_ends_in_one_failover_and_no_loop() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).full = true;
    toy.member(old.as_str()).die("signal 6");
    toy.until("another leader", 50, |t| t.leader().is_some_and(|l| l != old));
    let starts = toy.members[&old].starts;
    for _ in 0..1_000 {
        toy.round();
    }
    assert!(toy.members[&old].starts <= starts + 1, "started {} times", toy.members[&old].starts - starts);
    let reason = &toy.members[&old].last.as_ref().unwrap().reason;
    assert!(reason.contains("free at least") && reason.contains("/data"), "{reason}");
    toy.member(old.as_str()).full = false;
    toy.until("it comes back by itself", 700, two_standbys);
}

/// It goes before it stalls a commit, as long as the others are enough.
#[test]
fn a_standby_without_room_leaves_the_set_while_others_are_enough() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let (b, c) = (others(&leader).remove(0), others(&leader).remove(1));
    toy.member(b.as_str()).full = true;
    let alone = |t: &Toy, n: &MemberName| {
        t.records.sync.value().is_some_and(|s| s.k == 1 && s.members.iter().map(|id| &id.name).eq([n]))
    };
    toy.until("c alone", 60, |t| alone(t, &c));
    toy.member(c.as_str()).full = true;
    for _ in 0..60 {
        toy.round();
        assert!(toy.records.sync.value().is_some_and(|s| s.k == 1), "somebody is better than nobody");
    }
}

/// Crashes of the data before counted against each new copy, which was set aside without ever being started, for ever.
#[test]
fn a_copy_is_started_whatever_the_data_before_it_did() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let n = others(&leader).remove(0);
    for _ in 0..2 {
        toy.member(n.as_str()).die("signal 6");
        toy.until("it is back", 200, two_standbys);
    }
    assert_eq!(toy.members[&n].memory.crashes.len(), 2);
    crate::decide::ask(&mut toy, pgvigil::core::records::Operation::Reinit { member: n.clone() });
    let incarnation = toy.members[&n].me.id.incarnation;
    toy.until("copied and streaming", 400, |t| t.members[&n].me.id.incarnation != incarnation && two_standbys(t));
    assert_eq!(toy.members[&n].me.id.incarnation.0, incarnation.0 + 100, "one copy");
}

#[test]
fn copies_that_never_stream_end_with_a_question() {
    let mut view = cluster().leader("a", 4).standby("b", lag(0)).sync(1, []).seen_by("b");
    view.memory.not_streaming = Some(ago(100));
    assert_eq!(decide(&view).rule, "follow.reclone");
    view.memory.copies = 3;
    assert_eq!(decide(&view).rule, "follow.ask");
}

#[test]
fn diverged_data_on_a_full_disk_stay_as_they_are() {
    let mut view = cluster().leader("a", 4).standby("b", lag(0)).sync(1, []).seen_by("b");
    let pgvigil::core::view::Store::Known { records, .. } = &mut view.store else { panic!("readable") };
    let pgvigil::core::records::Entry::Present(leader) = &mut records.leader else { panic!("a leader") };
    let last = leader.value.last.as_mut().unwrap();
    (last.timeline, last.parent, last.switch) =
        (pgvigil::core::TimelineId(2), Some(pgvigil::core::TimelineId(1)), Some(lag(100)));
    assert_eq!(decide(&view).rule, "follow.rewind");
    with_disk(&mut view, Place::Data, Probe::Works { at: NOW, latency_ms: 1 });
    view.local.storage.places.get_mut(&Place::Data).unwrap().space =
        Some(Space { free_bytes: 0, total_bytes: 1 << 30 });
    assert_eq!(decide(&view).rule, "follow.full");
}

#[test]
fn a_standby_with_room_goes_before_a_full_one() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let (b, c) = (others(&old).remove(0), others(&old).remove(1));
    toy.member(b.as_str()).me.tags.failover_priority = 9;
    toy.member(b.as_str()).full = true;
    for _ in 0..40 {
        toy.round();
    }
    toy.member(old.as_str()).die("signal 9");
    toy.until("another leader", 100, |t| t.leader().is_some_and(|l| l != old));
    assert_eq!(toy.leader(), Some(c));
}

// === Stories: standbys that do not acknowledge ===

/// The longest time without an acknowledgement on the present timeline while `toy` goes through `count` rounds.
fn longest_silence(toy: &mut Toy, count: usize) -> Duration {
    let told = |t: &Toy| t.acknowledged.iter().next_back().map(|(_, at)| *at);
    let (mut last, mut since, mut longest) = (told(toy), toy.now, Duration::ZERO);
    for _ in 0..count {
        toy.round();
        let now = told(toy);
        if now != last {
            (last, since) = (now, toy.now);
        }
        longest = longest.max(toy.now.since(since));
    }
    longest
}

fn whole(toy: &Toy, k: u32, members: usize) -> bool {
    toy.leader().is_some() && toy.records.sync.value().is_some_and(|s| s.k == k && s.members.len() == members)
}

#[test]
fn who_streams_without_acknowledging_is_waited_for_no_longer_than_max_stall() {
    for (names, k, stuck) in [
        (&["a", "b"][..], 1, 1),
        (&["a", "b", "c"], 1, 1),
        (&["a", "b", "c"], 1, 2),
        (&["a", "b", "c"], 2, 1),
        (&["a", "b", "c", "d"], 2, 1),
        (&["a", "b", "c", "d"], 2, 2),
        (&["a", "b", "c", "d"], 2, 3),
    ] {
        let mut toy = Toy::new(names, Durability::Sync);
        toy.policy.k = k;
        let all = names.len() - 1;
        toy.until("a cluster", 400, |t| whole(t, k, all));
        for _ in 0..50 {
            toy.round();
        }
        let leader = toy.leader().unwrap();
        let ill: Vec<&str> = names.iter().copied().filter(|n| name(n) != leader).take(stuck).collect();
        for n in &ill {
            toy.member(n).halted = true;
        }
        let silence = longest_silence(&mut toy, 150);
        let what = format!("{names:?}, k = {k}, {stuck} stuck");
        assert!(silence <= toy.policy.max_stall + Duration::from_millis(500), "{what}: {silence:?}");
        let left = (all - stuck) as u32;
        assert!(whole(&toy, k.min(left), all - stuck), "{what}: {:?}", toy.records.sync.value());
        for n in &ill {
            toy.member(n).halted = false;
        }
        toy.until("it returns", 200, |t| whole(t, k, all));
        assert_eq!((toy.leader(), toy.writers.len()), (Some(leader), 1), "{what}");
    }
}

#[test]
fn strict_waits_for_who_does_not_acknowledge() {
    let mut toy = Toy::new(&["a", "b"], Durability::Strict);
    toy.until("a cluster", 400, |t| whole(t, 1, 1));
    let leader = toy.leader().unwrap();
    let other = if leader == name("a") { "b" } else { "a" };
    toy.member(other).halted = true;
    assert!(longest_silence(&mut toy, 200) > secs(15));
    assert!(whole(&toy, 1, 1), "the claim stays");
    toy.member(other).halted = false;
    assert!(longest_silence(&mut toy, 100) < secs(3));
}

/// One that comes and goes would stall every commit again and again.
#[test]
fn who_flaps_stays_away_longer_each_time() {
    let mut toy = Toy::new(&["a", "b"], Durability::Sync);
    toy.until("a cluster", 400, |t| whole(t, 1, 1));
    let other = if toy.leader() == Some(name("a")) { "b" } else { "a" };
    let mut away = Vec::new();
    for _ in 0..4 {
        toy.member(other).halted = true;
        toy.until("it leaves", 60, |t| whole(t, 0, 0));
        toy.member(other).halted = false;
        let since = toy.now;
        toy.until("it returns", 700, |t| whole(t, 1, 1));
        away.push(toy.now.since(since).as_secs());
    }
    assert!(away.is_sorted() && away[0] >= 2 && away[3] >= 4 * away[0], "{away:?}");
}

/// A barrier that cannot return left the rule unknown, and the claim was enforced again and again for ever.
#[test]
fn who_stops_acknowledging_in_the_middle_of_a_change_of_the_set_does_not_stop_commits_for_ever() {
    let mut toy = Toy::new(&["a", "b", "c", "d"], Durability::Sync);
    toy.policy.k = 2;
    toy.until("a cluster", 400, |t| whole(t, 2, 3));
    let leader = toy.leader().unwrap();
    let others: Vec<&str> = ["a", "b", "c", "d"].into_iter().filter(|n| name(n) != leader).collect();
    toy.member(others[0]).halted = true;
    // The set shrinks to the other two, and one of them goes the same way in that moment.
    let shrinks = |t: &Toy| t.members[&leader].last.as_ref().is_some_and(|p| p.rule == "leader.sync_enforce");
    for _ in 0..60 {
        toy.round();
        if !shrinks(&toy) {
            let mut ahead = toy.clone();
            ahead.round();
            if shrinks(&ahead) {
                toy.member(others[1]).halted = true;
            }
        }
    }
    assert!(toy.members[&name(others[1])].halted, "the moment was found");
    let silence = longest_silence(&mut toy, 150);
    assert!(silence < secs(6), "{silence:?}: {:?}", toy.records.sync.value());
    assert!(whole(&toy, 1, 1), "{:?}", toy.records.sync.value());
}

/// L1: a winner whose followers stream without acknowledging opens with fewer.
#[test]
fn a_winner_does_not_wait_for_ever_for_a_follower_that_stands_still() {
    let mut toy = Toy::new(&["a", "b"], Durability::Sync);
    toy.until("a cluster", 400, |t| whole(t, 1, 1));
    let old = toy.leader().unwrap();
    let other = if old == name("a") { "b" } else { "a" };
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    toy.until("promoted", 200, |t| matches!(t.members[&name(other)].pg, Pg::Primary { .. }));
    toy.member(old.as_str()).restart_agent();
    toy.member(old.as_str()).halted = true;
    toy.until("open", 200, |t| t.leader() == Some(name(other)));
}
