//! What a cluster of deciding members does, from the empty store on. Each test is a story; S1 (never two writers), lint and
//! the replay of every view are checked in every round of all of them.

use pgvigil::core::records::{Durability, Entry, Keyed, LeaderState, Operation, Outcome, Request};
use pgvigil::core::timeline::Term;
use pgvigil::core::view::DataDirectory;

use crate::toy::{Pg, Toy, name};

pub fn running(durability: Durability) -> Toy {
    let mut toy = Toy::new(&["a", "b", "c"], durability);
    toy.until("a leader with two standbys", 300, |t| t.leader().is_some() && t.streaming() == 2);
    if durability == Durability::Sync {
        toy.until("the synchronous set", 100, |t| {
            t.records.sync.value().is_some_and(|s| s.k == 1 && s.members.len() == 2)
        });
    }
    for _ in 0..40 {
        toy.round();
    }
    toy
}

pub fn two_standbys(t: &Toy) -> bool {
    t.leader().is_some() && t.streaming() == 2
}

pub fn ask(toy: &mut Toy, what: Operation) {
    let began = what.begun_when_asked(toy.records.leader(), toy.leader().is_none());
    let request = Request {
        id: "r1".to_owned(),
        what,
        asked_by: "test".to_owned(),
        at_unix_ms: 1,
        timeout_ms: 60_000,
        began,
        outcome: None,
        force: None,
    };
    toy.records.revision += 1;
    toy.records.requests.insert("r1".to_owned(), Keyed { revision: toy.records.revision, value: request });
}

#[test]
fn an_empty_cluster_is_created_once_and_everybody_joins() {
    let toy = running(Durability::Sync);
    assert_eq!(toy.writers.len(), 1, "{:?}", toy.writers);
    assert_eq!(toy.records.membership.value().unwrap().members.len(), 3);
}

#[test]
fn nothing_is_created_while_a_configured_member_is_silent() {
    let mut toy = Toy::new(&["a", "b", "c"], Durability::Sync);
    toy.member("c").agent = false;
    for _ in 0..200 {
        toy.round();
    }
    assert!(toy.records.init.value().is_none());
    let reason = &toy.member("a").last.as_ref().unwrap().reason;
    assert!(reason.contains("waiting for c"), "{reason}");
}

#[test]
fn a_wiped_store_never_leads_to_initdb() {
    let mut toy = running(Durability::Sync);
    let writers = toy.writers.len();
    for m in toy.members.values_mut() {
        m.die("power");
        m.restart_agent();
    }
    toy.records = pgvigil::core::records::ClusterRecords { store_id: 7, revision: 1, ..Default::default() };
    for _ in 0..300 {
        toy.round();
    }
    assert!(toy.records.init.value().is_none(), "S5");
    assert_eq!(toy.writers.len(), writers);
}

#[test]
fn a_crash_of_postgresql_hands_over_at_once() {
    for durability in [Durability::Sync, Durability::Async] {
        let mut toy = running(durability);
        let old = toy.leader().unwrap();
        toy.member(old.as_str()).die("signal 9");
        toy.until("another leader", 25, |t| t.leader().is_some_and(|l| l != old));
        toy.until("the old primary follows", 300, two_standbys);
    }
}

#[test]
fn in_async_agent_and_postgresql_dead_are_replaced_after_w() {
    let mut toy = running(Durability::Async);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    for _ in 0..70 {
        toy.round();
    }
    assert!(toy.leader().is_none(), "nobody may act before W");
    toy.until("another leader", 60, |t| t.leader().is_some_and(|l| l != old));
    toy.member(old.as_str()).restart_agent();
    toy.until("the old primary follows", 300, two_standbys);
}

#[test]
fn a_frozen_agent_is_fenced_before_anybody_else_writes() {
    for durability in [Durability::Sync, Durability::Async] {
        let mut toy = running(durability);
        let old = toy.leader().unwrap();
        toy.member(old.as_str()).agent = false;
        // S1 is asserted in every round: the guardian kills at F, the others act at W.
        toy.until("another leader", 150, |t| t.leader().is_some_and(|l| l != old));
        toy.member(old.as_str()).agent = true;
        toy.until("the thawed member follows", 300, two_standbys);
    }
}

#[test]
fn a_restarted_agent_changes_nothing() {
    let mut toy = running(Durability::Sync);
    let (leader, term, writers) = (toy.leader().unwrap(), toy.records.leader().unwrap().term, toy.writers.len());
    for _ in 0..3 {
        toy.member(leader.as_str()).agent = false;
        for _ in 0..20 {
            toy.round();
        }
        toy.member(leader.as_str()).restart_agent();
        for _ in 0..20 {
            toy.round();
        }
    }
    assert_eq!(toy.leader(), Some(leader));
    assert_eq!(toy.records.leader().unwrap().term, term);
    assert_eq!(toy.writers.len(), writers, "S10: no promotion");
}

#[test]
fn a_switchover_goes_to_whom_was_asked_for() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let to = ["a", "b", "c"].into_iter().map(name).rfind(|n| *n != old).unwrap();
    ask(&mut toy, Operation::Switchover { to: Some(to.clone()) });
    toy.until("the asked leader", 30, |t| t.leader().as_ref() == Some(&to));
    toy.until("an answer", 30, |t| matches!(t.records.requests["r1"].value.outcome, Some(Outcome::Done { .. })));
    toy.until("the old primary follows", 300, two_standbys);
    assert_eq!(toy.writers.len(), 2, "one switchover, not two: {:?}", toy.writers);
}

#[test]
fn a_switchover_to_a_stranger_is_refused_with_the_reason() {
    let mut toy = running(Durability::Sync);
    ask(&mut toy, Operation::Switchover { to: Some(name("nobody")) });
    toy.until("an answer", 30, |t| t.records.requests["r1"].value.outcome.is_some());
    let outcome = toy.records.requests["r1"].value.outcome.clone().unwrap();
    assert!(matches!(&outcome, Outcome::Refused { message } if message.contains("not a member")), "{outcome:?}");
    assert_eq!(toy.writers.len(), 1);
}

#[test]
fn a_restart_of_the_leader_is_answered_once() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    ask(&mut toy, Operation::Restart { member: leader.clone() });
    toy.until("an answer", 60, |t| matches!(t.records.requests["r1"].value.outcome, Some(Outcome::Done { .. })));
    assert_eq!(toy.leader(), Some(leader));
    for _ in 0..50 {
        toy.round();
    }
    assert_eq!(toy.writers.len(), 2, "{:?}", toy.writers);
}

#[test]
fn with_no_standby_left_the_store_says_so_before_postgresql_goes_on_alone() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    for n in ["a", "b", "c"] {
        if name(n) != leader {
            toy.member(n).die("power");
            toy.member(n).agent = false;
        }
    }
    toy.until("alone", 60, |t| t.records.sync.value().is_some_and(|s| s.k == 0 && s.members.is_empty()));
    toy.until(
        "PostgreSQL goes on",
        10,
        |t| matches!(&t.members[&leader].pg, Pg::Primary { rule, .. } if rule.is_empty()),
    );
    for n in ["a", "b", "c"] {
        if name(n) != leader {
            toy.member(n).restart_agent();
        }
    }
    toy.until("sync again", 200, |t| t.records.sync.value().is_some_and(|s| s.k == 1 && s.members.len() == 2));
}

/// protocol-review 1: none left is not async.
#[test]
fn after_a_degrade_nobody_but_the_lonely_primary_leads() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let others: Vec<_> = ["a", "b", "c"].into_iter().filter(|n| name(n) != leader).collect();
    for n in &others {
        toy.member(n).die("power");
        toy.member(n).agent = false;
    }
    toy.until("alone", 60, |t| t.records.sync.value().is_some_and(|s| s.k == 0));
    toy.member(leader.as_str()).die("power");
    toy.member(leader.as_str()).agent = false;
    for n in &others {
        toy.member(n).restart_agent();
    }
    for _ in 0..300 {
        toy.round();
        assert!(toy.leader().is_none(), "S2: a stale standby leads");
    }
    let reason = toy.member(others[0]).last.clone().unwrap().reason;
    assert!(reason.contains(leader.as_str()) && reason.contains("alone"), "{reason}");
    toy.member(leader.as_str()).restart_agent();
    toy.until("the lonely primary leads again", 300, |t| t.leader().as_ref() == Some(&leader));
    toy.until("whole again", 300, two_standbys);
}

#[test]
fn a_single_member_restarts_in_place() {
    let mut toy = Toy::new(&["a"], Durability::Sync);
    toy.until("a leader", 100, |t| t.leader().is_some());
    toy.member("a").die("signal 9");
    toy.until("it is back", 50, |t| t.leader().is_some());
}

#[test]
fn a_crash_loop_ends_and_a_person_can_begin_again() {
    let mut toy = Toy::new(&["a"], Durability::Sync);
    toy.until("a leader", 100, |t| t.leader().is_some());
    for _ in 0..4 {
        toy.member("a").die("signal 11");
        for _ in 0..60 {
            toy.round();
        }
    }
    assert!(toy.leader().is_none());
    let reason = toy.member("a").last.clone().unwrap().reason;
    assert!(reason.contains("pgvigil restart a"), "{reason}");
    ask(&mut toy, Operation::Restart { member: name("a") });
    toy.until("a leader", 100, |t| t.leader().is_some());
}

#[test]
fn a_stopped_leader_hands_over_and_ends() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).stopping = true;
    toy.until("another leader", 30, |t| t.leader().is_some_and(|l| l != old));
    toy.until("the old one ended", 30, |t| t.members[&old].exited);
    assert_ne!(toy.records.leader().unwrap().holder.name, old);
}

#[test]
fn a_cold_start_finds_the_leader_in_any_order() {
    for absent in ["a", "b", "c"] {
        let mut toy = running(Durability::Sync);
        for m in toy.members.values_mut() {
            m.die("power");
            m.agent = false;
        }
        for _ in 0..100 {
            toy.round();
        }
        for n in ["a", "b", "c"] {
            if n != absent {
                toy.member(n).restart_agent();
            }
        }
        toy.until("a leader", 300, |t| t.leader().is_some());
    }
}

#[test]
fn without_the_claim_nobody_is_elected() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    toy.records.sync = Entry::Absent;
    for _ in 0..300 {
        toy.round();
        assert!(toy.leader().is_none(), "S12");
    }
}

#[test]
fn a_record_that_a_hand_destroyed_is_written_again_by_the_sitting_leader() {
    for entry in [Entry::Absent, Entry::Unreadable { revision: 999, why: "garbage".to_owned() }] {
        let mut toy = running(Durability::Sync);
        let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
        toy.records.revision += 1000;
        toy.records.leader = entry;
        toy.until("the record is back", 20, |t| t.leader().as_ref() == Some(&leader));
        assert!(toy.records.leader().unwrap().term > Term(1));
        toy.until("whole again", 100, two_standbys);
        assert_eq!(toy.writers.len(), writers, "no change of leader");
    }
}

#[test]
fn a_member_tagged_nofailover_never_leads() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let tagged = ["a", "b", "c"].into_iter().map(name).find(|n| *n != old).unwrap();
    toy.member(tagged.as_str()).me.tags.nofailover = true;
    for _ in 0..50 {
        toy.round();
    }
    toy.member(old.as_str()).die("signal 9");
    toy.until("another leader", 100, |t| t.leader().is_some_and(|l| l != old));
    assert_ne!(toy.leader().unwrap(), tagged);
}

#[test]
fn a_member_with_new_data_does_not_vote_for_its_past() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let replaced = ["a", "b", "c"].into_iter().map(name).find(|n| *n != old).unwrap();
    // Its disk is replaced while it is in the claim; the primary goes at the same time.
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    let m = toy.member(replaced.as_str());
    m.me.id.incarnation = pgvigil::core::Incarnation(777);
    for _ in 0..300 {
        toy.round();
        assert!(toy.leader().is_none(), "S2: a seal of another incarnation was counted");
    }
}

#[test]
fn the_order_of_the_rules_is_pinned() {
    let order: Vec<&str> = pgvigil::core::decide::RULES.iter().map(|(name, _)| *name).collect();
    let golden = include_str!("golden/rules.txt").lines().collect::<Vec<_>>();
    assert_eq!(order, golden, "the order of the rules is a safety property; change golden/rules.txt knowingly");
}

#[test]
fn a_released_term_is_never_held_again() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("signal 9");
    let mut released = None;
    for _ in 0..100 {
        toy.round();
        let Some(record) = toy.records.leader() else { continue };
        match (&record.state, released) {
            (LeaderState::Released { .. }, _) => released = Some(record.term),
            (_, Some(term)) => assert!(record.term > term),
            _ => {}
        }
    }
    assert!(released.is_some());
}

/// Long enough for every deadline that was armed before to pass.
fn a_lease_later(toy: &mut Toy, leader: &pgvigil::core::names::MemberName, what: &str) {
    let starts = toy.members[leader].starts;
    for _ in 0..200 {
        toy.round();
    }
    assert_eq!(toy.leader().as_ref(), Some(leader), "{what}");
    assert_eq!(toy.members[leader].starts, starts, "{what}: PostgreSQL was not touched");
}

#[test]
fn a_destroyed_leader_record_is_written_again_and_nothing_else_happens() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let old = toy.records.leader.clone();
    let writers = toy.writers.len();

    toy.records.leader = Entry::Absent;
    a_lease_later(&mut toy, &leader, "deleted");

    toy.records.revision += 1;
    toy.records.leader = Entry::Unreadable { revision: toy.records.revision, why: "garbage".to_owned() };
    a_lease_later(&mut toy, &leader, "overwritten");

    // An own record of a lower term: somebody restored a key from a backup.
    let Entry::Present(mut old) = old else { panic!("{old:?}") };
    toy.records.revision += 1;
    old.revision = toy.records.revision;
    let term = toy.records.leader().unwrap().term;
    toy.records.leader = Entry::Present(old);
    a_lease_later(&mut toy, &leader, "rolled back");
    assert!(toy.records.leader().unwrap().term > term, "terms only grow");
    assert_eq!(toy.writers.len(), writers, "nobody was promoted");
}

#[test]
fn an_agent_that_refuses_its_directory_still_stops() {
    let mut toy = Toy::new(&["a", "b", "c"], Durability::Sync);
    let a = toy.member("a");
    a.data = DataDirectory::Foreign { why: "somebody else's".to_owned() };
    toy.round();
    assert_eq!(toy.member("a").last.as_ref().unwrap().rule, "identity.refused");
    toy.member("a").stopping = true;
    toy.until("the end of a", 5, |t| t.members[&name("a")].exited);
}
