//! Way B of protocol §5: who is overtaken before its lease has run out, by whom, and who never is. S1 and S2 are checked in
//! every round of every story (`toy.rs`).

use std::time::Duration;

use pgvigil::core::MemberName;
use pgvigil::core::decide::decide;
use pgvigil::core::peers::{Door, Heard, HolderSeen, Peer, Promise, Report, Sealable};
use pgvigil::core::plan::Step;
use pgvigil::core::records::{Durability, Key, LeaderState, MemberRecord, Taken, Write};
use pgvigil::core::rules::Facts;
use pgvigil::core::silence::{WayB, way_b};
use pgvigil::core::testing::{cluster, id, lag, name, secs};
use pgvigil::core::timeline::Term;
use pgvigil::core::view::{HolderMemory, Receiver, View};

use crate::decide::{running, two_standbys};
use crate::toy::{Pg, Toy};

fn others(leader: &MemberName) -> (MemberName, MemberName) {
    let mut names = ["a", "b", "c"].into_iter().map(name).filter(|n| n != leader);
    (names.next().unwrap(), names.next().unwrap())
}

/// Agent and PostgreSQL are killed; their host lives and says that nobody listens.
fn kill_all(toy: &mut Toy, n: &MemberName) {
    let m = toy.member(n.as_str());
    m.die("signal 9");
    (m.agent, m.refuses) = (false, true);
}

/// Every process of the member stops where it is.
fn freeze(toy: &mut Toy, n: &MemberName, frozen: bool) {
    let m = toy.member(n.as_str());
    (m.agent, m.frozen) = (!frozen, frozen);
}

fn rounds(toy: &mut Toy, n: usize) {
    (0..n).for_each(|_| toy.round());
}

/// Rounds until somebody else leads.
fn replaced(toy: &mut Toy, old: &MemberName, within: usize) -> usize {
    let mut taken = 0;
    toy.until("another leader", within, |t| {
        taken += 1;
        t.leader().is_some_and(|l| l != *old)
    });
    taken
}

fn reason(toy: &Toy, n: &MemberName) -> String {
    toy.members[n].last.as_ref().map(|p| format!("{}: {}", p.rule, p.reason)).unwrap_or_default()
}

// === Stories ===

#[test]
fn who_refuses_connections_is_replaced_within_a_second() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    kill_all(&mut toy, &old);
    let taken = replaced(&mut toy, &old, 15);
    assert!(taken > 3, "not before after_refused: {taken}");
    assert_eq!(toy.records.leader().unwrap().taken.as_ref().unwrap().from.name, old);
}

#[test]
fn a_lost_host_is_replaced_after_two_seconds_of_silence() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    toy.member(old.as_str()).die("power");
    toy.member(old.as_str()).agent = false;
    let taken = replaced(&mut toy, &old, 40);
    assert!(taken >= 20, "{taken}");
    // Nothing again when it comes back.
    toy.member(old.as_str()).restart_agent();
    let leader = toy.leader();
    toy.until("whole again", 300, two_standbys);
    assert_eq!(toy.leader(), leader);
}

/// L3, S10: neither a killed agent nor a stopped one costs the leadership while PostgreSQL streams.
#[test]
fn an_agent_that_is_restarted_keeps_the_leadership() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    let m = toy.member(leader.as_str());
    (m.agent, m.refuses) = (false, true);
    rounds(&mut toy, 15);
    toy.member(leader.as_str()).restart_agent();
    rounds(&mut toy, 30);
    toy.member(leader.as_str()).agent = false;
    rounds(&mut toy, 30);
    toy.member(leader.as_str()).agent = true;
    rounds(&mut toy, 100);
    assert_eq!((toy.leader(), toy.writers.len()), (Some(leader), 1));
}

/// The same while nobody writes and nothing is streamed: a restart within a second is shorter than takeover.after.
#[test]
fn a_restart_of_the_agent_beside_an_idle_primary_is_no_silence() {
    let mut toy = running(Durability::Sync);
    let leader = toy.leader().unwrap();
    for m in toy.members.values_mut() {
        m.network = false;
    }
    let m = toy.member(leader.as_str());
    (m.agent, m.refuses) = (false, true);
    rounds(&mut toy, 9);
    toy.member(leader.as_str()).restart_agent();
    rounds(&mut toy, 20);
    assert_eq!(toy.leader(), Some(leader));
}

/// S1: the old primary lives, wakes in the middle of it all and acknowledges nothing more.
#[test]
fn a_frozen_leader_that_wakes_acknowledges_nothing_more() {
    for wakes_at in ["electing", "winner", "held", "later"] {
        let mut toy = running(Durability::Sync);
        let old = toy.leader().unwrap();
        freeze(&mut toy, &old, true);
        toy.until(wakes_at, 60, |t| {
            let record = t.records.leader().unwrap();
            match wakes_at {
                "electing" => matches!(record.state, LeaderState::Electing { winner: None, .. }),
                "winner" => matches!(record.state, LeaderState::Electing { winner: Some(_), .. }),
                _ => t.leader().is_some_and(|l| l != old),
            }
        });
        if wakes_at == "later" {
            rounds(&mut toy, 100);
        }
        freeze(&mut toy, &old, false);
        rounds(&mut toy, 2);
        assert!(!toy.primaries().contains(&old), "{wakes_at}: it reads a higher term and kills at once");
        toy.until("whole again", 400, two_standbys);
        assert_ne!(toy.leader(), Some(old), "{wakes_at}");
    }
}

/// Pre-vote: one that hears the leader is enough to keep it, and the reason names who.
#[test]
fn a_leader_that_another_member_hears_is_left_alone() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let (b, c) = others(&old);
    // The leader is cut from the store, and its words reach c only: one-way.
    toy.member(old.as_str()).store = false;
    toy.member(b.as_str()).network = false;
    toy.cuts.insert((old.clone(), b.clone()));
    rounds(&mut toy, 35);
    assert!(reason(&toy, &b).contains(&format!("{c}: it hears {old}")), "{}", reason(&toy, &b));
    rounds(&mut toy, 30);
    assert_eq!(toy.records.leader().unwrap().holder.name, old, "not before W");
    assert_eq!(toy.writers.len(), 1);
}

#[test]
fn an_answer_that_does_not_arrive_is_no_vote() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let (b, c) = others(&old);
    // Each hears nothing of the other: two of three cannot be told from one of three.
    toy.cuts.extend([(b.clone(), c.clone())]);
    kill_all(&mut toy, &old);
    rounds(&mut toy, 60);
    assert_eq!(toy.records.leader().unwrap().holder.name, old);
    assert!(reason(&toy, &b).contains("has not answered"), "{}", reason(&toy, &b));
    toy.cuts.clear();
    replaced(&mut toy, &old, 15);
}

#[test]
fn a_promise_is_respected_and_named() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let (b, c) = others(&old);
    // Each needs the other's word. (What a member promised binds itself too; here only what it tells is modelled.)
    let until = toy.now.plus(secs(5));
    for n in [&b, &c] {
        toy.member(n.as_str()).promised = Some(until);
    }
    kill_all(&mut toy, &old);
    rounds(&mut toy, 40);
    assert!(reason(&toy, &b).contains(&format!("{c}: it has promised {old}")), "{}", reason(&toy, &b));
    assert_eq!(toy.records.leader().unwrap().holder.name, old);
    replaced(&mut toy, &old, 30);
}

/// Way B never in async: the old primary needs nobody for its acknowledgements.
#[test]
fn in_async_everybody_waits_for_the_lease() {
    let mut toy = running(Durability::Async);
    let old = toy.leader().unwrap();
    let (b, _) = others(&old);
    kill_all(&mut toy, &old);
    rounds(&mut toy, 30);
    assert!(reason(&toy, &b).contains("durability is async"), "{}", reason(&toy, &b));
    assert!(replaced(&mut toy, &old, 200) > 50);
}

/// An agent whose loop is stuck answers with an old view: no sign of life, and no vote.
#[test]
fn a_stuck_loop_is_no_sign_of_life() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let m = toy.member(old.as_str());
    m.die("power");
    (m.agent, m.stuck) = (false, true);
    let taken = replaced(&mut toy, &old, 80);
    assert!(taken > 50, "as long as its view is young it counts: {taken}");

    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let (_, c) = others(&old);
    let m = toy.member(c.as_str());
    (m.agent, m.stuck) = (false, true);
    rounds(&mut toy, 60);
    kill_all(&mut toy, &old);
    rounds(&mut toy, 50);
    assert_eq!(toy.records.leader().unwrap().holder.name, old, "a stuck voter is none");
}

#[test]
fn a_silent_coordinator_is_overtaken_like_a_leader() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    kill_all(&mut toy, &old);
    let mut coordinator = None;
    toy.until("an election", 20, |t| {
        let record = t.records.leader().unwrap();
        coordinator = Some(record.holder.name.clone());
        matches!(record.state, LeaderState::Electing { winner: None, .. })
    });
    let coordinator = coordinator.unwrap();
    let term = toy.records.leader().unwrap().term;
    let m = toy.member(coordinator.as_str());
    m.die("power");
    m.agent = false;
    toy.member(old.as_str()).restart_agent();
    toy.until("a new election", 40, |t| t.records.leader().unwrap().term > term);
    toy.until("a leader", 40, |t| t.leader().is_some());
    assert_eq!(
        toy.records.leader().unwrap().taken.as_ref().unwrap().from.name,
        old,
        "the suspicion that it began with"
    );
}

/// L5: a wrong suspicion doubles the patience with the next leader; one that is dead is replaced as fast as ever.
#[test]
fn a_wrong_suspicion_makes_the_next_one_slower() {
    let mut toy = running(Durability::Sync);
    for doubled in 1..=2 {
        let old = toy.leader().unwrap();
        freeze(&mut toy, &old, true);
        let taken = replaced(&mut toy, &old, 120);
        assert!(taken >= 20 * doubled, "after {doubled} wrong ones: {taken}");
        freeze(&mut toy, &old, false);
        toy.until("whole again", 600, two_standbys);
        rounds(&mut toy, 50);
    }
    let old = toy.leader().unwrap();
    kill_all(&mut toy, &old);
    assert!(replaced(&mut toy, &old, 15) < 15);
}

/// S1: a leader that goes over to async after the candidate has looked needs nobody for its commits any more.
#[test]
fn the_claim_that_makes_clocks_needless_is_compared_in_step_1() {
    let view = silent();
    let plan = decide(&view);
    let begins = |step: &Step| match step {
        Step::Commit { transaction, .. } if transaction.write.iter().any(|w| matches!(w, Write::Leader(_))) => {
            Some(transaction.clone())
        }
        _ => None,
    };
    let transaction = plan.steps.iter().find_map(begins).expect("it begins an election");
    let revision = view.store.records().unwrap().sync.revision();
    let compared = |key: Key| transaction.compare.iter().find(|c| c.key == key).map(|c| c.revision);
    assert_eq!(compared(Key::Sync), Some(revision));
    assert!(compared(Key::Lease).is_some() && compared(Key::Leader).is_some());
}

fn view_takes(view: &View) -> bool {
    decide(view).rule == "takeover"
}

/// S4: what the gate may let pass ends before anybody takes over in silence.
#[test]
fn the_gate_is_shut_before_a_silent_leader_is_overtaken() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    let gate = toy.view(&old).gate_until().expect("it leads in sync mode");
    freeze(&mut toy, &old, true);
    toy.until("an election", 60, |t| t.records.leader().unwrap().holder.name != old);
    assert!(toy.now.any_reached(gate));
    assert_eq!(running(Durability::Async).view(&old).gate_until(), None);
}

// === One condition at a time ===

/// b sees the leader a refuse connections for half a second, and c says the same. Everything allows a takeover.
fn silent() -> View {
    let healthy = cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(0)).sync(1, ["b", "c"]);
    let seen = |who: &str| {
        let mut view = healthy.seen_by(who);
        let ago = |ms| view.now.minus(Duration::from_millis(ms));
        let (since, before) = (ago(500), ago(600));
        view.memory.silence.as_mut().unwrap().first_seen = before;
        view.memory.holder = Some(HolderMemory {
            member: name("a"),
            term: Term(4),
            agent_answered: true,
            postgres_answered: true,
            wal: Some((1, before)),
            looked_at: Some(before),
        });
        if let pgvigil::core::view::LocalPostgres::Standby(standby) = &mut view.local.postgres {
            (standby.receiver, standby.last_message) = (Receiver::None, None);
        }
        let said = Report::of(&healthy.seen_by("a"), before, before);
        let answer = Some(Heard { asked_at: before, at: before, from: id("a"), report: said });
        let refuses = Door::Refuses { since };
        view.peers.insert(name("a"), Peer { asked_at: Some(view.now), answer, agent: refuses, postgres: refuses });
        view
    };
    let mut view = seen("b");
    let c = seen("c");
    let report = Report::of(&c, c.now, c.now);
    let heard = Heard { asked_at: view.now, at: view.now, from: id("c"), report };
    let peer =
        Peer { asked_at: Some(view.now), answer: Some(heard), agent: Door::Open { at: view.now }, ..Peer::default() };
    view.peers.insert(name("c"), peer);
    view
}

fn peer<'a>(view: &'a mut View, who: &str) -> &'a mut Peer {
    view.peers.get_mut(&name(who)).unwrap()
}

fn report(view: &mut View) -> &mut Report {
    &mut peer(view, "c").answer.as_mut().unwrap().report
}

#[test]
fn every_condition_of_the_pre_vote_counts() {
    assert!(view_takes(&silent()));
    type Change = fn(&mut View);
    let cases: [(&str, Change); 20] = [
        ("a port that never answered in this term", |v| v.memory.holder.as_mut().unwrap().agent_answered = false),
        ("a database that never streamed to us", |v| v.memory.holder.as_mut().unwrap().postgres_answered = false),
        ("PostgreSQL's port takes connections", |v| peer(v, "a").postgres = Door::Open { at: v.now }),
        ("silent is not refused", |v| peer(v, "a").agent = Door::Silent { since: v.now.minus(secs(1)) }),
        ("refuses only just now", |v| peer(v, "a").agent = Door::Refuses { since: v.now }),
        ("a heartbeat just now", |v| v.memory.silence.as_mut().unwrap().first_seen = v.now),
        ("a message of its walsender just now", |v| v.memory.holder.as_mut().unwrap().wal = Some((2, v.now))),
        ("its agent answered just now", |v| peer(v, "a").answer.as_mut().unwrap().at = v.now),
        ("nobody asked it", |v| drop(v.peers.remove(&name("a")))),
        ("the other does not answer", |v| drop(v.peers.remove(&name("c")))),
        ("the other's answer is old", |v| {
            let old = v.now.minus(Duration::from_millis(501));
            peer(v, "c").answer.as_mut().unwrap().asked_at = old;
        }),
        ("another incarnation answers", |v| {
            peer(v, "c").answer.as_mut().unwrap().from.incarnation = pgvigil::core::Incarnation(9)
        }),
        ("it sees a newer heartbeat", |v| sighting(v).seq += 1),
        ("it sees another record", |v| sighting(v).leader_revision += 1),
        ("it hears the leader", |v| sighting(v).unchanged_ms = 100),
        ("it is bound", |v| report(v).promise = Promise::Bound { to: id("a"), term: Term(4), left_ms: 10 }),
        ("it does not say whether it is bound", |v| report(v).promise = Promise::Unknown),
        ("it cannot be sealed", |v| report(v).sealable = Sealable::No { why: "its PostgreSQL is down".to_owned() }),
        ("whether it can be sealed is not known", |v| report(v).sealable = Sealable::Unknown),
        ("this member cannot be sealed", |v| v.memory.durable.must_follow = true),
    ];
    for (why, change) in cases {
        let mut view = silent();
        change(&mut view);
        let plan = decide(&view);
        assert_ne!(plan.rule, "takeover", "{why}: {}", plan.reason);
    }
}

fn sighting(view: &mut View) -> &mut pgvigil::core::peers::Sighting {
    match &mut report(view).holder {
        HolderSeen::Seen(seen) => seen,
        HolderSeen::Unknown { why } => panic!("{why}"),
    }
}

/// Who waits in vain is told why.
#[test]
fn a_barred_takeover_says_who_is_missing() {
    let mut view = silent();
    view.peers.remove(&name("c"));
    let plan = decide(&view);
    assert_eq!(plan.rule, "follow");
    let expected = "a refuses connections on both ports for 0.5 s; 2 members must see it so and be free to elect, 1 are (c: its \
                    agent has not answered)";
    assert!(plan.reason.ends_with(expected), "{}", plan.reason);
    assert!(plan.wake.is_some(), "looked at again soon");
}

/// L5, in numbers: doubled after each wrong suspicion, up to W, for ten minutes, and never for refused ports.
#[test]
fn patience_doubles_up_to_w_and_not_for_ever() {
    let patience = |doubled: u32, overtaken: Option<u64>, minutes: u64| {
        let mut view = silent();
        view.memory.term_since = Some(view.now.minus(secs(60 * minutes)));
        let pgvigil::core::view::Store::Known { records, .. } = &mut view.store else { panic!("known") };
        let pgvigil::core::records::Entry::Present(leader) = &mut records.leader else { panic!("present") };
        leader.value.taken = Some(Taken { from: id("c"), term: Term(3), doubled });
        let c: &mut MemberRecord = &mut records.members.get_mut(&name("c")).unwrap().value;
        c.overtaken = overtaken.map(Term);
        let facts = Facts::of(&view).unwrap();
        let patience = pgvigil::core::silence::Patience::of(&facts, facts.records.leader().unwrap());
        assert_eq!(patience.after_refused, Duration::from_millis(300));
        assert!(matches!(way_b(&facts), WayB::Open { .. }));
        patience.after.as_millis()
    };
    assert_eq!(patience(0, None, 0), 2_000, "the old leader was dead");
    assert_eq!(patience(3, None, 0), 2_000);
    assert_eq!(patience(0, Some(3), 0), 4_000);
    assert_eq!(patience(0, Some(2), 0), 2_000, "an older story");
    assert_eq!(patience(1, Some(3), 0), 8_000);
    assert_eq!(patience(30, Some(3), 0), 8_161, "W");
    assert_eq!(patience(0, Some(3), 10), 2_000);
}

#[test]
fn the_holder_s_own_patience_counts_where_it_is_longer() {
    let mut view = silent();
    peer(&mut view, "a").agent = Door::Silent { since: view.now.minus(secs(3)) };
    peer(&mut view, "a").answer = None;
    let long_ago = view.now.minus(secs(3));
    view.memory.silence.as_mut().unwrap().first_seen = long_ago;
    view.memory.holder.as_mut().unwrap().wal = None;
    let seen = sighting(&mut view);
    (seen.unchanged_ms, seen.refused_ms) = (3_000, None);
    seen.wal = pgvigil::core::peers::Sign::Never;
    seen.agent = pgvigil::core::peers::Sign::Never;
    assert!(view_takes(&view));
    let pgvigil::core::view::Store::Known { records, .. } = &mut view.store else { panic!("known") };
    let pgvigil::core::records::Entry::Present(leader) = &mut records.leader else { panic!("present") };
    leader.value.takeover_ms = 4_000;
    assert!(!view_takes(&view), "its gate is open for longer");
}

/// A frozen PostgreSQL does not hear of its own death: the toy's clients were told the truth all the same.
#[test]
fn the_toy_tells_a_frozen_primary_from_a_dead_one() {
    let mut toy = running(Durability::Sync);
    let old = toy.leader().unwrap();
    freeze(&mut toy, &old, true);
    rounds(&mut toy, 5);
    assert!(matches!(toy.members[&old].pg, Pg::Primary { .. }));
    assert_eq!(toy.streaming(), 0);
}
