//! Schedules that broke an earlier state of the decision core, found by reading it against the protocol.

use std::time::Duration;

use pgvigil::core::decide::decide;
use pgvigil::core::election::{Verdict, judge};
use pgvigil::core::plan::Step;
use pgvigil::core::records::{Durability, Entry, Keyed, LeaderState, Operation, Outcome, TimelineReservation};
use pgvigil::core::timeline::{History, HistoryEntry, Term, TimelineId};
use pgvigil::core::view::DataDirectory;
use pgvigil::core::{Lsn, MemberName};

use crate::decide::{ask, running, two_standbys};
use crate::toy::{Pg, Toy, name};

fn others(leader: &MemberName) -> Vec<MemberName> {
    ["a", "b", "c"].into_iter().map(name).filter(|n| n != leader).collect()
}

/// L1: the holder renewed for ever although it had nothing to lead with.
#[test]
fn a_leader_that_loses_its_data_lets_others_lead() {
    for data in [
        DataDirectory::Empty,
        DataDirectory::Foreign { why: "lost+found".to_owned() },
        DataDirectory::Unknown { why: "input/output error".to_owned() },
    ] {
        let mut toy = running(Durability::Sync);
        let old = toy.leader().unwrap();
        toy.member(old.as_str()).data = data;
        toy.member(old.as_str()).die("signal 6");
        toy.until("another leader", 100, |t| t.leader().is_some_and(|l| l != old));
    }
}

/// S2: what was acknowledged on a promoted timeline that was not published yet lost to the old primary's unacknowledged tail.
#[test]
fn a_promoted_but_unpublished_timeline_outranks_the_old_primarys_tail() {
    let toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let mut records = toy.records.clone();
    let mut record = records.leader().unwrap().clone();
    let line = record.last.as_ref().unwrap().timeline;
    let next = TimelineId(line.0 + 1);
    record.term = Term(record.term.0 + 2);
    record.state = LeaderState::Electing { coordinator: old.clone(), preferred: None, winner: None };
    let switch = Lsn(10_090);
    records.timelines.insert(next, TimelineReservation { term: Term(record.term.0 - 1), parent: line, switch });
    let claim = records.sync.value().unwrap().clone();
    for id in claim.electorate() {
        let was_primary = id.name == old;
        let history = toy.members[&id.name].disk.1.clone();
        let position = if was_primary {
            (line, Lsn(10_100), history)
        } else {
            let mut longer: History = history;
            longer.0.push(HistoryEntry { timeline: line, switch });
            (next, Lsn(10_095), longer)
        };
        let seal = pgvigil::core::records::SealRecord {
            term: record.term,
            incarnation: id.incarnation,
            position: pgvigil::core::records::Position {
                timeline: position.0,
                replayed: position.1,
                received: position.1,
                history: position.2,
            },
            tags: Default::default(),
        };
        records.seals.insert(id.name.clone(), Keyed { revision: 9_000, value: seal });
    }
    match judge(&records, &record, 1 << 20, None) {
        Verdict::Elected(elected) => assert_ne!(elected.winner.member.name, old, "S2: acknowledged rows are lost"),
        other => panic!("{other:?}"),
    }
}

/// S1: a reading that was old by the time it was decided on took over from a leader that had renewed since.
#[test]
fn a_stale_reading_cannot_take_over() {
    let mut toy = running(Durability::Async);
    let leader = toy.leader().unwrap();
    let b = others(&leader).remove(0);
    let mut stale = toy.view(&b);
    for _ in 0..20 {
        toy.round();
    }
    stale.now = stale.now.plus(Duration::from_secs(60));
    let plan = decide(&stale);
    assert_eq!(plan.rule, "takeover", "{}", plan.reason);
    for step in &plan.steps {
        if let Step::Commit { what, transaction } = step
            && what == "begin an election"
        {
            assert!(toy.commit(transaction).is_none(), "the leader renewed since: it must not be overtaken");
        }
    }
}

/// S2, async: the election's own heartbeat erased the position that bounds the loss.
#[test]
fn async_never_promotes_beyond_max_lag() {
    let mut toy = Toy::new(&["a", "b", "c"], Durability::Async);
    toy.policy.max_lag = 50;
    toy.until("a cluster", 300, two_standbys);
    for _ in 0..40 {
        toy.round();
    }
    let leader = toy.leader().unwrap();
    for n in others(&leader) {
        toy.member(n.as_str()).die("power");
        toy.member(n.as_str()).agent = false;
    }
    for _ in 0..20 {
        toy.round();
    }
    toy.member(leader.as_str()).die("power");
    toy.member(leader.as_str()).agent = false;
    for n in others(&leader) {
        toy.member(n.as_str()).restart_agent();
    }
    for _ in 0..300 {
        toy.round();
        assert!(toy.leader().is_none(), "a standby beyond max_lag leads");
    }
}

/// L3: after the record was written again under a new term, the guardian still counted the old one's deadline.
#[test]
fn a_mended_record_does_not_cost_the_primary_its_life() {
    let mut toy = running(Durability::Sync);
    let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
    toy.records.leader = Entry::Absent;
    for _ in 0..150 {
        toy.round();
    }
    assert_eq!(toy.leader(), Some(leader));
    assert_eq!(toy.writers.len(), writers);
}

/// L3: an old record that somebody restored is written over by the sitting leader.
#[test]
fn an_old_leader_record_that_comes_back_is_mended() {
    let mut toy = running(Durability::Sync);
    let first = toy.records.leader.clone();
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("signal 9");
    toy.until("another leader", 100, |t| t.leader().is_some_and(|l| l != old));
    toy.until("whole again", 300, two_standbys);
    let (leader, writers) = (toy.leader().unwrap(), toy.writers.len());
    let Entry::Present(mut keyed) = first else { panic!("there was a record") };
    toy.records.revision += 1;
    keyed.revision = toy.records.revision;
    toy.records.leader = Entry::Present(keyed);
    for _ in 0..150 {
        toy.round();
    }
    assert_eq!(toy.leader(), Some(leader));
    assert_eq!(toy.writers.len(), writers);
}

/// L1: a full state disk on the first candidate kept everybody waiting.
#[test]
fn a_full_state_disk_on_a_candidate_does_not_block_the_others() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let first = others(&old).remove(0);
    toy.member(first.as_str()).state_disk_full = true;
    toy.member(old.as_str()).die("signal 9");
    toy.until("another leader", 300, |t| t.leader().is_some());
}

/// L1: the patience with followers began anew in every round after a restart of the agent.
#[test]
fn an_agent_restart_between_promotion_and_publication_does_not_wait_for_ever() {
    let mut toy = Toy::new(&["a", "b"], Durability::Sync);
    toy.until("a cluster", 300, |t| t.leader().is_some() && t.records.sync.value().is_some_and(|s| s.k == 1));
    let old = toy.leader().unwrap();
    let other = ["a", "b"].into_iter().map(name).find(|n| *n != old).unwrap();
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    toy.until("promoted", 200, |t| {
        matches!(t.members[&other].pg, Pg::Primary { .. })
            && t.records.leader().is_some_and(|l| matches!(l.state, LeaderState::Electing { .. }))
    });
    toy.member(other.as_str()).restart_agent();
    toy.until("open", 60, |t| t.leader().as_ref() == Some(&other));
}

/// S9: after a restart of the agent a write of an earlier life may still land; one guarded write rules it out first.
#[test]
fn a_late_write_of_the_claim_cannot_land_after_an_agent_restart() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let revision = toy.records.sync.revision();
    let rewritten = toy.records.sync.revision();
    toy.member(leader.as_str()).restart_agent();
    for _ in 0..20 {
        toy.round();
    }
    assert_eq!(revision, rewritten);
    assert!(toy.records.sync.revision() > revision, "the claim was not settled after the restart");
    assert_eq!(toy.leader(), Some(leader));
}

/// S2: a snapshot of a member is brought back, promises, data and all; what it acknowledged since is not on it.
#[test]
fn a_member_from_the_past_does_not_vote_for_the_present() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let (b, c) = (others(&leader).remove(0), others(&leader).remove(1));
    let snapshot = toy.members[&b].clone();
    toy.member(c.as_str()).die("power");
    toy.member(c.as_str()).agent = false;
    // Longer than a publication: what a member has not said since cannot be held against its snapshot.
    for _ in 0..50 {
        toy.round();
    }
    toy.member(leader.as_str()).die("power");
    toy.member(leader.as_str()).agent = false;
    let mut back = snapshot;
    back.die("power");
    back.restart_agent();
    toy.members.insert(b, back);
    toy.member(c.as_str()).restart_agent();
    for _ in 0..300 {
        toy.round();
        assert!(toy.leader().is_none(), "S2: a disk of the past was counted");
    }
}

/// A switchover must not leave the cluster worse than it was.
#[test]
fn a_switchover_to_who_cannot_take_over_is_refused() {
    let mut toy = Toy::new(&["a", "b"], Durability::Sync);
    toy.member("a").me.tags.nosync = true;
    toy.member("b").me.tags.nosync = true;
    toy.until("a cluster", 300, |t| t.leader().is_some() && t.streaming() == 1);
    let to = ["a", "b"].into_iter().map(name).find(|n| Some(n) != toy.leader().as_ref()).unwrap();
    ask(&mut toy, Operation::Switchover { to: Some(to) });
    toy.until("an answer", 50, |t| t.records.requests["r1"].value.outcome.is_some());
    assert!(matches!(toy.records.requests["r1"].value.outcome, Some(Outcome::Refused { .. })));
    assert_eq!(toy.writers.len(), 1);

    let mut toy = running(Durability::Sync);
    let to = others(&toy.leader().unwrap()).remove(0);
    toy.member(to.as_str()).agent = false;
    for _ in 0..150 {
        toy.round();
    }
    ask(&mut toy, Operation::Switchover { to: Some(to) });
    toy.until("an answer", 50, |t| t.records.requests["r1"].value.outcome.is_some());
    assert!(matches!(toy.records.requests["r1"].value.outcome, Some(Outcome::Refused { .. })));
    assert_eq!(toy.writers.len(), 1);
}

/// S5: a complete copy was set aside for the sake of a leader that was dead already.
#[test]
fn a_reinit_waits_for_a_leader_that_speaks() {
    let mut toy = Toy::new(&["a", "b"], Durability::Sync);
    toy.until("a cluster", 300, |t| t.leader().is_some() && t.streaming() == 1);
    let leader = toy.leader().unwrap();
    let other = ["a", "b"].into_iter().map(name).find(|n| *n != leader).unwrap();
    toy.member(leader.as_str()).die("power");
    toy.member(leader.as_str()).agent = false;
    for _ in 0..40 {
        toy.round();
    }
    ask(&mut toy, Operation::Reinit { member: other.clone() });
    for _ in 0..30 {
        toy.round();
        assert!(matches!(toy.members[&other].data, DataDirectory::Present { .. }), "S5");
    }
}

/// L1: a leader that was told to stop while PostgreSQL was already down went away without a word.
#[test]
fn a_stopping_leader_without_postgresql_still_releases() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("signal 9");
    toy.member(old.as_str()).stopping = true;
    toy.until("another leader", 25, |t| t.leader().is_some_and(|l| l != old));
    toy.until("the old one ended", 30, |t| t.members[&old].exited);
}

/// The agent's own session outlives the walsenders by an instant when the postmaster dies. What it saw then made the leader
/// restart in place, for 1.8 s instead of 0.2.
#[test]
fn a_last_look_at_a_dying_primary_does_not_hide_its_standbys() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    for n in others(&old) {
        toy.member(n.as_str()).network = false;
    }
    toy.round();
    for n in others(&old) {
        toy.member(n.as_str()).network = true;
    }
    toy.member(old.as_str()).die("signal 9");
    let mut in_place = false;
    toy.until("another leader", 25, |t| {
        in_place |= t.members[&old].last.as_ref().is_some_and(|plan| plan.rule == "leader.restart_in_place");
        t.leader().is_some_and(|l| l != old)
    });
    assert!(!in_place, "it did not see that a standby could take over at once");
}

/// L1: who had sealed waited for a coordinator that was dead.
#[test]
fn a_coordinator_that_dies_is_overtaken_by_those_who_sealed_for_it() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let coordinator = others(&old).remove(0);
    toy.member(coordinator.as_str()).me.tags.failover_priority = 5;
    for _ in 0..40 {
        toy.round();
    }
    toy.member(old.as_str()).die("signal 9");
    toy.until("an election", 50, |t| {
        t.records.leader().is_some_and(
            |l| matches!(&l.state, LeaderState::Electing { coordinator: c, winner: None, .. } if *c == coordinator),
        )
    });
    toy.member(coordinator.as_str()).agent = false;
    toy.member(coordinator.as_str()).die("power");
    toy.until("another leader", 300, |t| t.leader().is_some_and(|l| l != coordinator));
}

/// One standby stays behind for `rounds`, the other is tagged and has everything; then the primary is gone for good.
fn best_may_not_lead(durability: Durability, rounds: usize) -> (Toy, MemberName, MemberName) {
    let mut toy = running(durability);
    let old = toy.leader().unwrap();
    let (tagged, behind) = (others(&old).remove(0), others(&old).remove(1));
    toy.member(tagged.as_str()).me.tags.nofailover = true;
    toy.member(behind.as_str()).network = false;
    for _ in 0..rounds {
        toy.round();
    }
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    (toy, behind, tagged)
}

/// L1: elections that cannot end must not burn terms as fast as the store answers.
#[test]
fn when_the_best_may_not_lead_and_cannot_be_copied_elections_are_paced() {
    let (mut toy, ..) = best_may_not_lead(Durability::Sync, 10);
    let term = toy.records.leader().unwrap().term;
    for _ in 0..600 {
        toy.round();
        assert!(toy.leader().is_none(), "S2: the one behind leads");
    }
    let burnt = toy.records.leader().unwrap().term.0 - term.0;
    assert!((1..15).contains(&burnt), "{burnt} terms in a minute");
}

/// L1, S2: with the one that has everything there, the one that may lead takes what it lacks and leads.
#[test]
fn the_winner_copies_its_wal_from_who_must_not_lead() {
    // Behind by a second, and long enough to have left the set that commits wait for.
    for rounds in [10, 60] {
        let (mut toy, behind, tagged) = best_may_not_lead(Durability::Sync, rounds);
        let has = toy.members[&tagged].disk.2;
        assert!(toy.members[&behind].disk.2 < has);
        toy.member(behind.as_str()).network = true;
        toy.until("the one that may", 300, |t| t.leader().as_ref() == Some(&behind));
        let Pg::Primary { history, .. } = &toy.members[&behind].pg else { panic!("it leads") };
        assert!(history.0.last().is_some_and(|entry| entry.switch.0 >= has), "S2: {history:?}, {has}");
    }
}

/// The copy is cut off by the death of either: what is on disk then is no more and no less than a sealed standby's.
#[test]
fn a_copy_that_is_cut_off_harms_nobody() {
    for dies_first in [false, true] {
        let (mut toy, behind, tagged) = best_may_not_lead(Durability::Sync, 10);
        toy.until("an election", 200, |t| {
            t.records.leader().is_some_and(|l| matches!(l.state, LeaderState::Electing { .. }))
        });
        toy.until("it copies", 100, |t| t.members[&behind].last.as_ref().is_some_and(|p| p.rule == "copy"));
        let n = if dies_first { &tagged } else { &behind };
        toy.member(n.as_str()).die("power");
        toy.member(n.as_str()).agent = false;
        for _ in 0..100 {
            toy.round();
            assert!(toy.leader().is_none(), "S2");
        }
        toy.member(behind.as_str()).network = true;
        toy.member(n.as_str()).restart_agent();
        toy.until("the one that may", 400, |t| t.leader().as_ref() == Some(&behind));
    }
}

/// L1: in async the one within max_lag may lead, although one that may not lead is ahead.
#[test]
fn in_async_the_best_that_may_lead_does() {
    let (mut toy, behind, _) = best_may_not_lead(Durability::Async, 10);
    toy.until("the one that may", 300, |t| t.leader().as_ref() == Some(&behind));
}

/// Everything is off; who comes back is told.
fn all_off(durability: Durability) -> (Toy, MemberName) {
    let mut toy = running(durability);
    let old = toy.leader().unwrap();
    for m in toy.members.values_mut() {
        m.die("power");
        m.agent = false;
    }
    toy.round();
    (toy, old)
}

fn reason(toy: &Toy, n: &MemberName) -> String {
    toy.members[n].last.as_ref().map(|plan| plan.reason.clone()).unwrap_or_default()
}

/// S2, async: after a power cut of all the last primary may have commits that nobody else has; who comes back without it
/// waits for it, by name, and nobody but a person goes on without it.
#[test]
fn an_async_cold_start_waits_for_the_last_primary_and_then_for_a_person() {
    let (mut toy, old) = all_off(Durability::Async);
    let back = others(&old);
    for n in &back {
        toy.member(n.as_str()).restart_agent();
    }
    for _ in 0..1_000 {
        toy.round();
        assert!(toy.leader().is_none(), "S2: a standby leads after a cold start");
    }
    for n in &back {
        let why = reason(&toy, n);
        assert!(why.contains(old.as_str()) && why.contains("--force") && why.contains("bytes behind"), "{why}");
    }
    // A failover without the word `force` changes nothing; with it the loss is a person's.
    force(&mut toy, None, &[]);
    toy.until("a leader", 200, |t| t.leader().is_some());
}

/// The last primary comes back in time: nothing is lost, and nobody waits for W.
#[test]
fn an_async_cold_start_ends_with_the_last_primary_back() {
    let (mut toy, old) = all_off(Durability::Async);
    for n in others(&old) {
        toy.member(n.as_str()).restart_agent();
    }
    for _ in 0..200 {
        toy.round();
    }
    toy.member(old.as_str()).restart_agent();
    toy.until("the last primary", 40, |t| t.leader().as_ref() == Some(&old));
}

/// An async failover is none: who lives has run since before the leader's last sign of life.
#[test]
fn an_async_failover_is_no_cold_start() {
    let mut toy = running(Durability::Async);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    toy.until("another leader", 110, |t| t.leader().is_some_and(|l| l != old));
}

/// L6: whom a cold start waits for is named within two seconds, and it goes on when enough are back.
#[test]
fn a_cold_start_names_whom_it_waits_for_within_two_seconds() {
    for first in ["a", "b", "c"] {
        let (mut toy, old) = all_off(Durability::Sync);
        for _ in 0..100 {
            toy.round();
        }
        toy.member(first).restart_agent();
        for _ in 0..20 {
            toy.round();
        }
        let missing: Vec<MemberName> = ["a", "b", "c"].into_iter().filter(|n| *n != first).map(name).collect();
        let mut named = false;
        // The last leader itself tries at once; the others say it while they wait for W.
        for _ in 0..100 {
            let why = reason(&toy, &name(first));
            named |= missing.iter().all(|n| why.contains(n.as_str()));
            assert!(named || old.as_str() == first, "{why}");
            toy.round();
        }
        assert!(named, "{}", reason(&toy, &name(first)));
        assert!(toy.leader().is_none());
        toy.member(missing[0].as_str()).restart_agent();
        toy.until("two of three are enough", 300, |t| t.leader().is_some());
    }
}

/// Who led last comes back with one other: its own term is over the moment it says so, and nobody waits for W.
#[test]
fn the_last_leader_back_with_another_does_not_wait_for_w() {
    let (mut toy, old) = all_off(Durability::Sync);
    toy.member(old.as_str()).restart_agent();
    toy.member(others(&old)[0].as_str()).restart_agent();
    toy.until("a leader", 50, |t| t.leader().is_some());
}

fn force(toy: &mut Toy, to: Option<&MemberName>, off: &[&MemberName]) {
    ask(toy, Operation::Failover { to: to.cloned() });
    let last_term = toy.records.leader().unwrap().last.as_ref().unwrap().term;
    let request = &mut toy.records.requests.get_mut("r1").unwrap().value;
    let off = off.iter().map(|n| (*n).clone()).collect();
    request.force = Some(pgvigil::core::records::Force { last_term, off });
}

/// A person goes past the claim: the best of who is there leads, and only in this vacancy.
#[test]
fn a_person_forces_past_the_claim_once() {
    let (mut toy, old) = all_off(Durability::Sync);
    let last = others(&old).remove(1);
    toy.member(last.as_str()).restart_agent();
    for _ in 0..200 {
        toy.round();
        assert!(toy.leader().is_none());
    }
    // What was acknowledged elsewhere is given up by his word.
    toy.acknowledged.clear();
    force(&mut toy, None, &[]);
    toy.until("the one that is there", 100, |t| t.leader().as_ref() == Some(&last));
    let claim = toy.records.sync.value().unwrap();
    assert_eq!((claim.k, claim.primary.name.clone()), (0, last.clone()));
    toy.until("an answer", 50, |t| t.records.requests["r1"].value.outcome.is_some());

    // The same words again, said of the vacancy before: they count for nothing now.
    let stale = toy.records.requests["r1"].value.clone();
    let m = toy.member(last.as_str());
    m.die("power");
    m.agent = false;
    toy.member(old.as_str()).restart_agent();
    let mut stale = stale;
    stale.outcome = None;
    toy.records.revision += 1;
    toy.records.requests.insert("r1".to_owned(), Keyed { revision: toy.records.revision, value: stale });
    for _ in 0..300 {
        toy.round();
        assert!(toy.leader().is_none(), "S2: a word for one vacancy was taken for another");
    }
}

/// The typed name of a host that is off spares W; who renews is never overtaken by it.
#[test]
fn the_name_of_a_host_that_is_off_spares_w() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let b = others(&old).remove(0);
    for _ in 0..30 {
        force(&mut toy, None, &[&old]);
        let view = toy.view(&b);
        assert_eq!(decide(&view).rule, "follow", "it renews: it is not off");
        toy.records.requests.clear();
        toy.round();
    }
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    force(&mut toy, None, &[&old]);
    toy.until("another leader", 50, |t| t.leader().is_some_and(|l| l != old));
}

/// A failover that is asked for in the middle of an election is fulfilled by who comes out of it; it was taken for a
/// switchover away from the new leader.
#[test]
fn a_failover_asked_for_during_an_election_is_over_with_it() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    toy.until("an election", 200, |t| {
        t.records.leader().is_some_and(|l| matches!(l.state, LeaderState::Electing { .. }))
    });
    ask(&mut toy, Operation::Failover { to: None });
    toy.until("an answer", 100, |t| t.records.requests["r1"].value.outcome.is_some());
    let outcome = toy.records.requests["r1"].value.outcome.clone();
    assert!(matches!(outcome, Some(Outcome::Done { .. })), "{outcome:?}");
    assert_eq!(toy.writers.len(), 2, "one change of leader");
}

/// L1: a release by name binds the others for a second, not for ever: the one who is named may be dead by then.
#[test]
fn a_release_to_who_dies_does_not_keep_the_others_waiting() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("signal 9");
    let mut named = None;
    toy.until("a release by name", 20, |t| {
        let Some(LeaderState::Released { to: Some(to), .. }) = t.records.leader().map(|l| &l.state) else {
            return false;
        };
        named = Some(to.clone());
        true
    });
    let named = named.unwrap();
    toy.member(named.as_str()).die("power");
    toy.member(named.as_str()).agent = false;
    toy.until("another one", 80, |t| t.leader().is_some_and(|l| l != named));
}

/// S1: an election that began without W has nothing but its seals to say that the old leader is over; a person's word that
/// loss is accepted is no seal.
#[test]
fn force_does_not_go_past_the_clocks() {
    let (mut toy, old) = all_off(Durability::Sync);
    force(&mut toy, None, &[]);
    assert!(toy.records.forced().is_some());
    if let Entry::Present(leader) = &mut toy.records.leader {
        let from = leader.value.holder.clone();
        leader.value.taken = Some(pgvigil::core::records::Taken { from, term: leader.value.term, doubled: 0 });
    }
    assert!(toy.records.forced().is_none(), "its lease may not be over");
    force(&mut toy, None, &[&old]);
    assert!(toy.records.forced().is_some());
}

/// L2: starts that failed before a copy were held against the copy, which was thrown away and made again for ever.
#[test]
fn crashes_of_data_that_are_gone_do_not_count_against_their_copy() {
    let mut toy = running(Durability::Sync);
    let b = others(&toy.leader().unwrap()).remove(0);
    let now = toy.now;
    let m = toy.member(b.as_str());
    m.die("signal 9");
    m.data = DataDirectory::Empty;
    m.memory.crashes = vec![(97, now), (98, now), (99, now)];
    toy.until("it streams again", 100, |t| t.streaming() == 2);
}
