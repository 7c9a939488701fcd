//! The store is lost, the cluster is not (protocol §7): promises, and a store that comes back other than it was. S1, S2 and
//! the lint are checked in every round; each story ends with who leads and who wrote.

use pgvigil::core::MemberName;
use pgvigil::core::records::{ClusterRecords, Durability, Entry};
use pgvigil::core::timeline::Term;

use crate::decide::{running, two_standbys};
use crate::toy::{Pg, Toy, name};

const ALL: [&str; 3] = ["a", "b", "c"];

fn others(leader: &MemberName) -> Vec<MemberName> {
    ALL.into_iter().map(name).filter(|n| n != leader).collect()
}

fn store(toy: &mut Toy, there: bool) {
    ALL.iter().for_each(|n| toy.member(n).store = there);
}

fn rounds(toy: &mut Toy, n: usize) {
    (0..n).for_each(|_| toy.round());
}

fn writes(toy: &Toy, n: &MemberName) -> bool {
    matches!(toy.members[n].pg, Pg::Primary { .. })
}

fn reason(toy: &Toy, n: &MemberName) -> String {
    toy.members[n].last.as_ref().map(|plan| format!("{}: {}", plan.rule, plan.reason)).unwrap_or_default()
}

/// What was acknowledged by now, on all timelines.
fn acknowledged(toy: &Toy) -> u64 {
    toy.acknowledged.values().sum()
}

fn cut(toy: &mut Toy, n: &MemberName, there: bool) {
    let m = toy.member(n.as_str());
    (m.network, m.port) = (there, there);
}

fn power_off(toy: &mut Toy, n: &MemberName) {
    let m = toy.member(n.as_str());
    m.die("power");
    m.agent = false;
}

// === All of the store is away ===

/// L3: for a minute, in both modes: the same primary, the same term, commits acknowledged all the while.
#[test]
fn all_of_the_store_lost_costs_nothing() {
    for durability in [Durability::Sync, Durability::Async] {
        let mut toy = running(durability);
        let (leader, term, writers) = (toy.leader().unwrap(), toy.records.leader().unwrap().term, toy.writers.len());
        store(&mut toy, false);
        for _ in 0..60 {
            let before = acknowledged(&toy);
            rounds(&mut toy, 10);
            assert!(writes(&toy, &leader), "{durability:?}: {}", reason(&toy, &leader));
            assert!(acknowledged(&toy) > before, "commits are acknowledged");
        }
        assert!(reason(&toy, &leader).contains("held by promises of"), "{}", reason(&toy, &leader));
        store(&mut toy, true);
        rounds(&mut toy, 150);
        assert_eq!((toy.leader(), toy.records.leader().unwrap().term), (Some(leader), term));
        assert_eq!(toy.writers.len(), writers);
        assert!(toy.members.values().all(|m| m.memory.durable.promise.is_none()), "promises end when renewals go on");
    }
}

/// k = 0: nobody else can be elected, so nobody has to promise.
#[test]
fn a_leader_alone_outlives_the_store_alone() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    others(&leader).iter().for_each(|n| power_off(&mut toy, n));
    toy.until("a claim of one", 100, |t| t.records.sync.value().is_some_and(|s| s.k == 0));
    rounds(&mut toy, 20);
    store(&mut toy, false);
    rounds(&mut toy, 300);
    assert!(writes(&toy, &leader), "{}", reason(&toy, &leader));
    assert!(reason(&toy, &leader).contains("of nobody"), "{}", reason(&toy, &leader));
}

/// In async mode everybody in the membership could be elected, so everybody has to promise.
#[test]
fn in_async_one_missing_promise_ends_it() {
    let mut toy = running(Durability::Async);
    let leader = toy.leader().unwrap();
    power_off(&mut toy, &others(&leader)[0]);
    store(&mut toy, false);
    rounds(&mut toy, 100);
    assert!(!writes(&toy, &leader));
}

/// Nobody to promise: the primary is dead by F, before anybody else may act.
#[test]
fn without_enough_promises_the_primary_ends_by_its_deadline() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    others(&leader).iter().for_each(|n| toy.member(n.as_str()).port = false);
    toy.member(leader.as_str()).store = false;
    rounds(&mut toy, 60);
    assert!(writes(&toy, &leader), "the last renewal still counts");
    rounds(&mut toy, 15);
    assert!(!writes(&toy, &leader));
    toy.until("another leader", 100, |t| t.leader().is_some_and(|l| l != leader));
}

/// The leader alone is cut from the store; who promised to it takes no part in any election while it does.
#[test]
fn who_is_bound_neither_stands_nor_seals() {
    let mut toy = running(Durability::Sync);
    let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
    let (b, c) = (others(&leader)[0].clone(), others(&leader)[1].clone());
    toy.member(leader.as_str()).store = false;
    // c is cut from the leader: it sees the silence and is free to stand, but b is not free to be sealed.
    toy.member(c.as_str()).port = false;
    rounds(&mut toy, 300);
    assert!(writes(&toy, &leader), "{}; {}", reason(&toy, &leader), reason(&toy, &b));
    assert_eq!(toy.writers.len(), writers);
}

/// Changes of `sync` wait for the store: who lost its standby stalls, loses nothing, and says so.
#[test]
fn a_standby_lost_while_the_store_is_away_stalls_and_says_why() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    store(&mut toy, false);
    rounds(&mut toy, 30);
    others(&leader).iter().for_each(|n| toy.member(n.as_str()).network = false);
    rounds(&mut toy, 2);
    let before = acknowledged(&toy);
    rounds(&mut toy, 100);
    assert!(writes(&toy, &leader), "the agents still reach each other");
    assert_eq!(acknowledged(&toy), before, "S9: nothing is published, so nothing is acknowledged alone");
    let named = format!("commits wait for {} and {}", others(&leader)[0], others(&leader)[1]);
    assert!(reason(&toy, &leader).contains(&named), "{}", reason(&toy, &leader));
    store(&mut toy, true);
    toy.until("the claim is lowered", 100, |t| t.records.sync.value().is_some_and(|s| s.k == 0));
}

/// The store away and the primary dead: nobody is elected, and everybody says why; then the store comes back.
#[test]
fn nobody_is_elected_without_the_store_and_somebody_is_with_it() {
    let mut toy = running(Durability::Sync);
    let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
    store(&mut toy, false);
    rounds(&mut toy, 30);
    power_off(&mut toy, &leader);
    rounds(&mut toy, 200);
    assert_eq!(toy.writers.len(), writers);
    assert!(reason(&toy, &others(&leader)[0]).contains("cannot be read"));
    store(&mut toy, true);
    toy.until("another leader", 100, |t| t.leader().is_some_and(|l| l != leader));
}

/// A leader that says in the store that it is finished gives back what was promised to it: no waiting for W.
#[test]
fn a_release_gives_the_promises_back() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    store(&mut toy, false);
    rounds(&mut toy, 50);
    store(&mut toy, true);
    toy.member(leader.as_str()).die("signal 9");
    toy.until("another leader", 30, |t| t.leader().is_some_and(|l| l != leader));
}

// === Restarts ===

/// S10: the guardian is armed under the term, the state file says what it rests on: promises are asked for anew.
#[test]
fn an_agent_restarted_while_the_store_is_away_goes_on_by_promises() {
    let mut toy = running(Durability::Sync);
    let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
    store(&mut toy, false);
    rounds(&mut toy, 30);
    toy.member(leader.as_str()).agent = false;
    rounds(&mut toy, 10);
    toy.member(leader.as_str()).restart_agent();
    rounds(&mut toy, 300);
    assert!(writes(&toy, &leader), "{}", reason(&toy, &leader));
    store(&mut toy, true);
    rounds(&mut toy, 100);
    assert_eq!((toy.leader(), toy.writers.len()), (Some(leader), writers));
}

/// A state file that knows of a higher term, or of another one than the guardian is armed for, proves nothing.
#[test]
fn an_agent_that_cannot_prove_its_term_lets_it_end() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    store(&mut toy, false);
    rounds(&mut toy, 10);
    toy.member(leader.as_str()).agent = false;
    rounds(&mut toy, 5);
    let m = toy.member(leader.as_str());
    m.memory.durable.highest_term = m.memory.durable.highest_term.next();
    m.restart_agent();
    rounds(&mut toy, 90);
    assert!(!writes(&toy, &leader));
}

/// A member that promised forgets nothing by a restart: it is bound for the whole length again.
#[test]
fn a_restart_does_not_end_a_promise() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let b = others(&leader)[0].clone();
    toy.member(leader.as_str()).store = false;
    rounds(&mut toy, 30);
    let promise = toy.members[&b].memory.durable.promise.clone();
    assert!(promise.is_some());
    cut(&mut toy, &leader, false);
    toy.member(b.as_str()).agent = false;
    rounds(&mut toy, 10);
    toy.member(b.as_str()).restart_agent();
    rounds(&mut toy, 75);
    assert!(!writes(&toy, &leader), "its last promise was 8 s ago");
    assert_eq!(toy.members[&b].memory.durable.promise, promise, "and still binds for its whole length");
    assert!(!writes(&toy, &b));
    toy.until("another leader", 120, |t| t.leader().is_some_and(|l| l != leader));
}

// === Claims ===

/// A newcomer is bound by nothing before a leader wrote it down, and may not stand before either.
#[test]
fn a_newcomer_waits_for_the_membership() {
    let mut toy = Toy::new(&ALL, Durability::Async);
    toy.member("c").me.configured = ALL.into_iter().map(name).collect();
    toy.until("a whole cluster", 300, two_standbys);
    rounds(&mut toy, 40);
    let leader = toy.leader().unwrap();
    let newcomer = others(&leader)[1].clone();
    // As if it had just been cloned: the leader has not written it down, and never can, being cut from the store.
    let Entry::Present(membership) = &mut toy.records.membership else { panic!("there is one") };
    membership.value.members.remove(&newcomer);
    let lead = toy.member(leader.as_str()).memory.durable.lead.as_mut().unwrap();
    lead.membership.remove(&newcomer);
    cut(&mut toy, &newcomer, false);
    toy.member(leader.as_str()).store = false;
    rounds(&mut toy, 300);
    assert!(!writes(&toy, &newcomer), "S1");
    assert!(writes(&toy, &leader), "{}", reason(&toy, &leader));
    assert!(reason(&toy, &newcomer).contains("not in the membership"), "{}", reason(&toy, &newcomer));
}

// === The store comes back other than it was ===

fn wiped(toy: &Toy, store_id: u64) -> ClusterRecords {
    ClusterRecords { store_id, revision: toy.records.revision.min(3), ..Default::default() }
}

/// L3: the sitting leader writes everything again under a term above every remembered one; nobody else is promoted.
#[test]
fn a_wiped_store_is_made_good_by_the_leader_that_sits() {
    for durability in [Durability::Sync, Durability::Async] {
        for id in [7, 8] {
            let mut toy = running(durability);
            let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
            let (term, timelines) = (toy.records.leader().unwrap().term, toy.records.timelines.clone());
            toy.records = wiped(&toy, id);
            toy.until("everything is there again", 60, |t| {
                t.leader().as_ref() == Some(&leader)
                    && t.records.init.value().is_some()
                    && t.records.sync.value().is_some()
                    && t.records.membership.value().is_some_and(|m| m.members.len() == 3)
            });
            toy.until("it is believed", 60, |t| t.members.values().all(|m| !m.memory.durable.store_lost));
            rounds(&mut toy, 100);
            assert_eq!((toy.leader(), toy.writers.len()), (Some(leader.clone()), writers));
            assert!(toy.records.leader().unwrap().term > term);
            assert_eq!(toy.records.timelines, timelines, "S6: reserved stays reserved");
            assert!(toy.members.values().all(|m| m.memory.durable.store_id == id));
            // And the cluster works as before.
            power_off(&mut toy, &leader);
            toy.until("another leader", 150, |t| t.leader().is_some_and(|l| l != leader));
        }
    }
}

/// A wiped store after an outage: promises hold over both.
#[test]
fn a_store_that_was_away_and_comes_back_empty_costs_nothing() {
    let mut toy = running(Durability::Sync);
    let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
    store(&mut toy, false);
    rounds(&mut toy, 200);
    toy.records = wiped(&toy, 9);
    store(&mut toy, true);
    rounds(&mut toy, 200);
    assert_eq!((toy.leader(), toy.writers.len()), (Some(leader), writers));
    assert!(toy.records.sync.value().is_some_and(|s| s.k == 1));
}

/// A backup of before the last change of leader comes back: the sitting leader's word counts, not the backup's.
#[test]
fn an_old_backup_is_made_good_by_the_leader_that_sits() {
    for id in [7, 8] {
        let mut toy = running(Durability::Sync);
        let backup = toy.records.clone();
        let old = toy.leader().unwrap();
        toy.member(old.as_str()).die("signal 9");
        toy.until("another leader", 100, |t| t.leader().is_some_and(|l| l != old));
        toy.until("whole again", 300, two_standbys);
        rounds(&mut toy, 40);
        let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
        toy.records = ClusterRecords { store_id: id, ..backup };
        rounds(&mut toy, 300);
        assert_eq!((toy.leader(), toy.writers.len()), (Some(leader), writers), "id {id}");
        assert!(toy.members.values().all(|m| !m.memory.durable.store_lost));
        toy.until("whole", 100, two_standbys);
    }
}

/// S2, an old claim is a stronger one: `sync` of yesterday says {b, c}, the truth until an hour ago was a alone. Nobody is
/// elected by it, however long the leader is away.
#[test]
fn an_old_claim_elects_nobody() {
    for id in [7, 8] {
        let mut toy = running(Durability::Sync);
        let backup = toy.records.clone();
        let leader = toy.leader().unwrap();
        rounds(&mut toy, 150);
        let (b, c) = (others(&leader)[0].clone(), others(&leader)[1].clone());
        for n in [&b, &c] {
            power_off(&mut toy, n);
        }
        toy.until("a claim of one", 100, |t| t.records.sync.value().is_some_and(|s| s.k == 0));
        rounds(&mut toy, 50);
        power_off(&mut toy, &leader);
        toy.records = ClusterRecords { store_id: id, ..backup };
        for n in [&b, &c] {
            toy.member(n.as_str()).restart_agent();
        }
        for _ in 0..600 {
            // Other users of the store write too: its revision grows past what is remembered.
            toy.records.revision += 10;
            toy.round();
            assert!(toy.primaries().is_empty(), "S2: elected by a claim of the past");
        }
        assert!(reason(&toy, &b).contains("store is lost"), "{}", reason(&toy, &b));
    }
}

/// Somebody pointed the leader's agent at another store: it must not be content with it while the others read the old one.
#[test]
fn a_leader_in_another_store_does_not_rely_on_it_before_the_others_do() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let term = toy.records.leader().unwrap().term;
    let (b, c) = (others(&leader)[0].clone(), others(&leader)[1].clone());
    toy.records = wiped(&toy, 8);
    // The others do not read it; they still answer.
    for n in [&b, &c] {
        toy.member(n.as_str()).store = false;
    }
    rounds(&mut toy, 100);
    assert!(writes(&toy, &leader), "{}", reason(&toy, &leader));
    assert!(toy.records.leader().is_some_and(|l| l.term > term), "it wrote everything again");
    let bound = |toy: &Toy| toy.members[&b].memory.durable.promise.as_ref().map(|p| p.term);
    assert!(bound(&toy) >= Some(term), "and goes on asking for promises");
    assert!(reason(&toy, &leader).contains("until enough members have read"), "{}", reason(&toy, &leader));
    for n in [&b, &c] {
        toy.member(n.as_str()).store = true;
    }
    toy.until("nobody is asked any more", 60, |t| {
        t.members[&leader].memory.durable.lead.as_ref().is_some_and(|lead| !lead.unconfirmed)
    });
}

/// The record destroyed a second time before the first renewal of the written-again one.
#[test]
fn a_record_destroyed_again_and_again_costs_nothing() {
    let mut toy = running(Durability::Sync);
    let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
    for _ in 0..20 {
        toy.records.leader = Entry::Absent;
        toy.round();
        toy.records.leader = Entry::Unreadable { revision: toy.records.revision, why: "garbage".to_owned() };
        toy.round();
    }
    rounds(&mut toy, 100);
    assert_eq!((toy.leader(), toy.writers.len()), (Some(leader), writers));
}

/// Everything under the prefix deleted by hand, also while the leader's agent was away.
#[test]
fn all_keys_deleted_by_hand_cost_nothing() {
    for restart in [false, true] {
        let mut toy = running(Durability::Sync);
        let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
        if restart {
            toy.member(leader.as_str()).agent = false;
        }
        rounds(&mut toy, 5);
        let revision = toy.records.revision + 1;
        toy.records = ClusterRecords { store_id: 7, revision, ..Default::default() };
        rounds(&mut toy, 5);
        if restart {
            toy.member(leader.as_str()).restart_agent();
        }
        rounds(&mut toy, 200);
        assert_eq!((toy.leader(), toy.writers.len()), (Some(leader), writers), "restart {restart}");
        assert!(toy.records.init.value().is_some() && toy.records.sync.value().is_some_and(|s| s.k == 1));
    }
}

/// A holder that is told of a higher term stops at once, whatever it was promised.
#[test]
fn a_holder_that_learns_of_a_higher_term_stops() {
    let mut toy = running(Durability::Async);
    let leader = toy.leader().unwrap();
    toy.member(leader.as_str()).store = false;
    let b = others(&leader)[0].clone();
    toy.member(b.as_str()).memory.durable.highest_term = Term(99);
    rounds(&mut toy, 5);
    assert!(!writes(&toy, &leader), "{}", reason(&toy, &leader));
}

/// No leader sits: a person says whose data are the cluster, with the position before their eyes; anything else is refused.
#[test]
fn without_a_leader_a_person_accepts_the_store() {
    use pgvigil::core::Lsn;
    use pgvigil::core::records::{Operation, Outcome};
    use pgvigil::core::timeline::TimelineId;
    for id in [7, 8] {
        let mut toy = running(Durability::Sync);
        let leader = toy.leader().unwrap();
        let b = others(&leader)[0].clone();
        for n in ALL {
            power_off(&mut toy, &name(n));
        }
        toy.records = wiped(&toy, id);
        for n in others(&leader) {
            toy.member(n.as_str()).restart_agent();
        }
        rounds(&mut toy, 150);
        assert!(toy.primaries().is_empty());
        let Pg::Standby { timeline, replayed, .. } = toy.members[&b].pg.clone() else { panic!("parked") };
        assert!(reason(&toy, &b).contains(&format!("accept-store {b} --position {timeline}@{}", Lsn(replayed))));
        let accept = |position| Operation::AcceptStore { member: b.clone(), timeline: TimelineId(timeline), position };
        crate::decide::ask(&mut toy, accept(Lsn(replayed + 8)));
        rounds(&mut toy, 5);
        assert!(matches!(toy.records.requests["r1"].value.outcome, Some(Outcome::Refused { .. })));
        assert!(toy.primaries().is_empty());
        crate::decide::ask(&mut toy, accept(Lsn(replayed)));
        toy.until("b leads", 50, |t| t.leader().as_ref() == Some(&b));
        assert!(matches!(toy.records.requests["r1"].value.outcome, Some(Outcome::Done { .. })));
        toy.member(leader.as_str()).restart_agent();
        toy.until("the others follow", 300, |t| t.leader().as_ref() == Some(&b) && t.streaming() == 2);
    }
}
