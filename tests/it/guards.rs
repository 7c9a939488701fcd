//! Guards that usually stand behind another one, each alone: a view that only this one refuses, beside the same view that
//! nobody refuses.

use std::time::Duration;

use pgvigil::core::Lsn;
use pgvigil::core::decide::decide;
use pgvigil::core::election::{Verdict, judge};
use pgvigil::core::lint;
use pgvigil::core::plan::{Follow, Plan, PromoteOrder, Source, Step, SyncRule, walreceiver_name};
use pgvigil::core::records::{
    DataSummary, Durability, Entry, Key, Keyed, LeaderRecord, LeaderState, Membership, Position, SealRecord,
    TimelineReservation, Transaction, Winner, Write,
};
use pgvigil::core::testing::{Cluster, END, SYSTEM, cluster, id, lag, name, secs};
use pgvigil::core::timeline::{HistoryEntry, Term, TimelineId};
use pgvigil::core::view::{DataDirectory, GuardState, LeaseView, LocalPostgres, Store, View};

fn led() -> Cluster {
    cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(0)).sync(1, ["b", "c"])
}

fn kills(view: &View) -> bool {
    decide(view).steps.contains(&Step::Kill)
}

fn records(view: &mut View) -> &mut pgvigil::core::records::ClusterRecords {
    match &mut view.store {
        Store::Known { records, .. } => records,
        Store::Unknown { .. } => panic!("the store is known in these tests"),
    }
}

fn leader(view: &mut View) -> &mut LeaderRecord {
    match &mut records(view).leader {
        Entry::Present(keyed) => &mut keyed.value,
        _ => panic!("there is a leader in these tests"),
    }
}

// === The end of a term (S1, S4) ===

#[test]
fn a_healthy_leader_is_left_alone() {
    assert!(!kills(&led().seen_by("a")));
}

#[test]
fn a_primary_dies_when_one_clock_says_that_its_lease_is_over() {
    let mut view = led().seen_by("a");
    view.now.boottime += 8_000_000_000;
    assert!(kills(&view));
}

#[test]
fn a_primary_dies_when_somebody_else_holds_the_record() {
    let mut view = led().seen_by("a");
    let record = leader(&mut view);
    (record.holder, record.term) = (id("b"), Term(5));
    assert!(kills(&view));
}

#[test]
fn a_primary_dies_when_its_term_is_released_or_being_elected() {
    for state in [
        LeaderState::Released { to: None, why: "test".to_owned() },
        LeaderState::Fenced { survivors: 1 },
        LeaderState::Electing { coordinator: name("a"), preferred: None, winner: None },
    ] {
        let mut view = led().seen_by("a");
        leader(&mut view).state = state.clone();
        assert!(kills(&view), "{state:?}");
    }
}

#[test]
fn a_destroyed_record_is_mended_only_while_the_guardian_would_not_kill_yet() {
    let mut view = led().seen_by("a");
    view.memory.held = Some(leader(&mut view).clone());
    records(&mut view).leader = Entry::Absent;
    assert_eq!(decide(&view).rule, "leader.mend");
    let mut late = view.clone();
    late.lease = LeaseView::Held { term: Term(4), deadline: view.now.plus(Duration::from_millis(900)) };
    assert!(kills(&late));
    // Another life of the agent, or a record that was destroyed again before its first renewal: the guardian's word counts.
    for lease in [LeaseView::None, LeaseView::Claimed { term: Term(5) }] {
        view.lease = lease;
        assert_eq!(decide(&view).rule, "leader.mend");
        let mut unarmed = view.clone();
        unarmed.local.guard.state = GuardState::Running { postmaster: 1, armed: None };
        assert!(kills(&unarmed));
        let mut later = view.clone();
        later.memory.durable.highest_term = Term(6);
        assert!(kills(&later), "somebody led since");
    }
}

/// In async mode the end of the last process is the proof that nothing more is acknowledged; in sync mode the seals are.
#[test]
fn an_async_leader_is_dead_before_it_says_that_it_is_finished() {
    let mut view = led().policy(|p| p.durability = Durability::Async).sync(0, []).seen_by("a");
    view.memory.kept_revision = Some(50);
    view.local.postgres = LocalPostgres::Unknown { why: "dying".to_owned() };
    view.local.guard.state = GuardState::Survivors { count: 2 };
    view.memory.streamed.insert(name("b"), (END, view.now));
    let plan = decide(&view);
    let at = |wanted: &dyn Fn(&Step) -> bool| plan.steps.iter().position(wanted).unwrap();
    assert_eq!(plan.rule, "leader.crash_release");
    let said = at(&|s| matches!(s, Step::Commit { what, .. } if what == "release the term"));
    assert!(at(&|s| matches!(s, Step::Kill)) < said);
}

// === Beginning an election ===

/// b has seen the leader's silence for longer than W.
fn silent(by: Duration) -> View {
    let mut view = led().seen_by("b");
    if let Some(silence) = &mut view.memory.silence {
        silence.first_seen = view.now.minus(by);
    }
    view
}

fn takes_over(view: &View) -> bool {
    decide(view).rule == "takeover"
}

#[test]
fn nobody_is_overtaken_before_w_on_every_clock() {
    assert!(takes_over(&silent(secs(9))));
    assert!(!takes_over(&silent(Duration::from_millis(8_100))), "longer than T_h, shorter than W");
    let mut view = silent(secs(9));
    view.now.raw -= 1_000_000_000;
    assert!(!takes_over(&view), "one clock does not agree");
    let mut view = silent(secs(9));
    leader(&mut view).ttl_ms = 20_000;
    assert!(!takes_over(&view), "the holder said that it may act for longer");
}

/// S12: who remembers more than the store says believes nothing that it says.
#[test]
fn an_older_store_elects_nobody() {
    let mut cases: Vec<(&str, View)> = Vec::new();
    let mut case = |why, change: &dyn Fn(&mut View)| {
        let mut view = silent(secs(9));
        change(&mut view);
        cases.push((why, view));
    };
    case("another store", &|v| v.memory.durable.store_id = 2);
    case("an older revision", &|v| v.memory.durable.store_revision = 101);
    case("a lower term", &|v| v.memory.durable.highest_term = Term(5));
    case("an older claim", &|v| v.memory.durable.highest_sync_term = Term(5));
    case("no record", &|v| records(v).leader = Entry::Absent);
    case("garbage", &|v| records(v).leader = Entry::Unreadable { revision: 50, why: "garbage".to_owned() });
    case("no claim", &|v| records(v).sync = Entry::Absent);
    case("the store is silent", &|v| v.store = Store::Unknown { why: "cut".to_owned(), since: v.now });
    case("the data cannot be judged", &|v| v.local.data = DataDirectory::Unknown { why: "EIO".to_owned() });
    case("no guardian", &|v| v.local.guard.state = GuardState::Absent { why: "dead".to_owned() });
    for (why, view) in cases {
        let plan = decide(&view);
        let elects = |s: &Step| matches!(s, Step::Commit { transaction, .. } if transaction.write.iter().any(|w| matches!(w, Write::Leader(_))));
        assert!(!plan.steps.iter().any(elects), "{why}: {}: {}", plan.rule, plan.reason);
    }
}

#[test]
fn an_election_that_cannot_end_well_is_not_begun() {
    let mut view = silent(secs(9));
    view.memory.spoke.retain(|n, _| *n == name("b"));
    let plan = decide(&view);
    assert_eq!(plan.rule, "takeover.wait");
    assert!(plan.reason.contains("waiting for a and c"), "{}", plan.reason);

    let mut view = silent(secs(9));
    view.me.id.incarnation = pgvigil::core::Incarnation(999);
    view.memory.beats.remove(&name("b"));
    assert!(!takes_over(&view), "another incarnation than the claim names");
}

// === Who is who (S7) ===

#[test]
fn what_does_not_belong_together_is_refused() {
    let present = |system_identifier| DataDirectory::Present {
        system_identifier,
        checkpoint_timeline: TimelineId(1),
        version: 15,
        cleanly_stopped: true,
    };
    let mut cases: Vec<(&str, View)> = Vec::new();
    let mut case = |why, change: &dyn Fn(&mut View)| {
        let mut view = led().seen_by("b");
        change(&mut view);
        cases.push((why, view));
    };
    case("another database in the directory", &|v| v.local.data = present(1));
    case("another database in the directory, the store is silent", &|v| {
        v.local.data = present(1);
        v.store = Store::Unknown { why: "cut".to_owned(), since: v.now };
    });
    case("a state file of another cluster", &|v| {
        (v.local.data, v.me.system_identifier) = (DataDirectory::Empty, Some(1))
    });
    case("directory and state file of another cluster", &|v| {
        (v.local.data, v.me.system_identifier) = (present(1), Some(1))
    });
    case("a database that nobody knows", &|v| (v.local.data, v.me.system_identifier) = (present(SYSTEM), None));
    case("something else", &|v| v.local.data = DataDirectory::Foreign { why: "photos".to_owned() });
    for (why, view) in cases {
        let plan = decide(&view);
        assert!(
            plan.rule == "identity.refused" && plan.steps.iter().all(|s| matches!(s, Step::Remember { .. })),
            "{why}"
        );
    }
    assert_ne!(decide(&led().seen_by("b")).rule, "identity.refused");
}

/// S7: a copy of a member, state file and all, started elsewhere: same name, same incarnation.
#[test]
fn a_copy_of_a_member_waits_until_the_original_is_silent() {
    let refused = |view: &View| decide(view).rule == "identity.name_in_use";
    let mut copy = led().seen_by("b");
    assert!(!refused(&copy), "a restart of the agent under the same kernel");
    copy.me.start_counter = 2;
    copy.me.boot_id = "another host".to_owned();
    assert!(refused(&copy));
    assert!(decide(&copy).steps.iter().all(|step| matches!(step, Step::Remember { .. })), "nothing is touched");
    copy.now = copy.now.plus(secs(7));
    assert!(!refused(&copy), "nobody speaks: a reboot");

    // On the same host, from another directory.
    let mut copy = led().seen_by("b");
    copy.me.start_counter = 2;
    copy.me.api_url = "http://b.example:9008".to_owned();
    assert!(refused(&copy));

    // The original leads: a copy that spoke while it was cut off does not make it begin another life.
    let mut original = led().seen_by("a");
    let record = &mut records(&mut original).members.get_mut(&name("a")).unwrap().value;
    (record.start_counter, record.boot_id) = (9, "another host".to_owned());
    assert!(!decide(&original).rule.starts_with("identity."), "{}", decide(&original).rule);
}

#[test]
fn a_name_that_still_speaks_is_not_taken() {
    let mut view = led().seen_by("b");
    view.me.id.incarnation = pgvigil::core::Incarnation(999);
    assert_eq!(decide(&view).rule, "identity.name_in_use");
    view.memory.beats.insert(name("b"), (7, view.now.minus(secs(30))));
    assert_ne!(decide(&view).rule, "identity.name_in_use", "its own past is silent");
}

#[test]
fn nothing_is_created_while_a_member_remembers_a_cluster() {
    let mut view = led().seen_by("b");
    let r = records(&mut view);
    (r.init, r.leader, r.lease, r.sync) = (Entry::Absent, Entry::Absent, Entry::Absent, Entry::Absent);
    for record in r.members.values_mut() {
        record.value.data = DataSummary::Fresh;
    }
    (view.local.data, view.local.postgres) = (DataDirectory::Empty, LocalPostgres::Down);
    view.local.guard.state = GuardState::Idle { exit: None };
    view.me.system_identifier = None;
    view.memory.durable = Default::default();
    assert_eq!(decide(&view).rule, "bootstrap.claim");
    let mut tagged = view.clone();
    tagged.me.tags.nofailover = true;
    assert_eq!(decide(&tagged).rule, "bootstrap.not_to_lead", "whoever creates has to lead, or nobody ever does");
    let mut wiped = view.clone();
    wiped.me.system_identifier = Some(SYSTEM);
    assert_eq!(decide(&wiped).rule, "bootstrap.lost_init");
    for data in [
        DataSummary::Lost { system_identifier: SYSTEM },
        DataSummary::Present { system_identifier: SYSTEM },
        DataSummary::Unknown { why: "EIO".to_owned() },
    ] {
        let mut view = view.clone();
        records(&mut view).members.get_mut(&name("c")).unwrap().value.data = data.clone();
        assert_eq!(decide(&view).rule, "bootstrap.has_data", "{data:?}");
    }
    view.memory.beats.remove(&name("c"));
    assert_eq!(decide(&view).rule, "bootstrap.members", "what a silent member said once is not known now");
}

// === The last look at a plan ===

fn refused(view: &View, step: Step) -> bool {
    !lint::violations(view, &Plan::new("test", "a bad plan").step(step)).is_empty()
}

/// b won term 5 and is about to be promoted.
fn winner() -> (View, PromoteOrder) {
    let mut view = led().seen_by("b");
    let won = Winner { member: id("b"), timeline: TimelineId(2), parent: TimelineId(1), switch: END };
    let record = leader(&mut view);
    (record.holder, record.term) = (id("b"), Term(5));
    record.state = LeaderState::Electing { coordinator: name("b"), preferred: None, winner: Some(won) };
    view.lease = LeaseView::Held { term: Term(5), deadline: view.now.plus(secs(8)) };
    view.memory.durable.sealed_term = Term(5);
    let order = PromoteOrder {
        term: Term(5),
        timeline: TimelineId(2),
        parent: TimelineId(1),
        switch: END,
        between: Default::default(),
    };
    (view, order)
}

#[test]
fn the_lint_refuses_a_promotion_that_was_not_won() {
    let (view, order) = winner();
    let promote = |order: &PromoteOrder| Step::Promote { order: order.clone() };
    assert!(!refused(&view, promote(&order)));
    assert!(refused(&view, promote(&PromoteOrder { timeline: TimelineId(3), ..order.clone() })));
    assert!(refused(&view, promote(&PromoteOrder { switch: lag(8), ..order.clone() })));
    let mut unsealed = view.clone();
    unsealed.memory.durable.sealed_term = Term(4);
    assert!(refused(&unsealed, promote(&order)));
    let mut late = view.clone();
    late.now = late.now.plus(secs(8));
    assert!(refused(&late, promote(&order)));
    let mut other = view;
    leader(&mut other).holder = id("c");
    assert!(refused(&other, promote(&order)));
}

#[test]
fn the_lint_refuses_what_destroys_data() {
    let mut standby = led().seen_by("b");
    let set_aside = Step::SetAside { why: "test".to_owned() };
    assert!(!refused(&standby, set_aside.clone()), "another member leads");
    leader(&mut standby).state = LeaderState::Released { to: None, why: "test".to_owned() };
    assert!(refused(&standby, set_aside), "nobody leads");
    assert!(refused(&standby, Step::Bootstrap));
    let from = Source { member: name("b"), host: "b".to_owned(), port: 5432 };
    assert!(refused(&led().seen_by("a"), Step::Clone { from: from.clone() }));
    assert!(refused(&led().seen_by("a"), Step::Rewind { from, timeline: TimelineId(1) }));
}

#[test]
fn the_lint_refuses_unguarded_writes_and_lower_terms() {
    let mut view = led().seen_by("a");
    let commit = |transaction| Step::Commit { what: "test".to_owned(), transaction };
    let claim = records(&mut view).sync.value().cloned().unwrap();
    let write = || Write::Sync(claim.clone());
    let both = Transaction::when(Key::Leader, 50).and(Key::Sync, 60);
    assert!(!refused(&view, commit(both.put(write()))));
    assert!(refused(&view, commit(Transaction::when(Key::Leader, 50).put(write()))));
    assert!(refused(&view, commit(Transaction::when(Key::Sync, 60).put(write()))));
    let mut record = leader(&mut view).clone();
    let ours = |record: &LeaderRecord| commit(Transaction::when(Key::Leader, 50).put(Write::Leader(record.clone())));
    assert!(!refused(&view, ours(&record)));
    record.term = Term(3);
    record.state = LeaderState::Released { to: None, why: "test".to_owned() };
    assert!(refused(&view, ours(&record)), "a lower term");
    record.term = Term(5);
    record.state = LeaderState::Held;
    assert!(refused(&view, ours(&record)), "a term whose lease is not held");
    let step = Step::Remember { highest_term: Term(3), highest_sync_term: Term(4), store_id: 1, store_revision: 100 };
    assert!(refused(&view, step), "a lower term remembered");
}

#[test]
fn after_a_seal_nobody_of_a_lower_term_is_followed() {
    let mut view = led().seen_by("b");
    view.memory.durable.sealed_term = Term(5);
    view.memory.durable.highest_term = Term(4);
    let LocalPostgres::Standby(standby) = &mut view.local.postgres else { panic!("a standby") };
    let upstream = Source { member: name("a"), host: "a".to_owned(), port: 5432 };
    let follow = Follow { upstream, slot: "s".to_owned(), walreceiver: "w".to_owned(), term: Term(4) };
    standby.follows = None;
    assert!(refused(&view, Step::Follow { follow }));
    assert_eq!(decide(&view).rule, "follow.sealed");
}

// === Whose seal counts ===

#[test]
fn copied_data_seal_nothing_before_they_are_consistent() {
    let mut view = led().seen_by("b");
    let record = leader(&mut view);
    (record.holder, record.term) = (id("c"), Term(5));
    record.state = LeaderState::Electing { coordinator: name("c"), preferred: None, winner: None };
    view.memory.durable.highest_term = Term(5);
    assert_eq!(decide(&view).rule, "seal");
    view.memory.durable.must_follow = true;
    assert_eq!(decide(&view).rule, "seal.copied");
}

#[test]
fn a_winner_that_moved_or_was_not_sealed_is_not_promoted() {
    let (view, _) = winner();
    let mut view = view;
    (view.memory.kept_revision, view.memory.durable.highest_term) = (Some(50), Term(5));
    assert_eq!(decide(&view).rule, "election.promote");
    let mut moved = view.clone();
    if let LocalPostgres::Standby(standby) = &mut moved.local.postgres {
        standby.replayed = lag(8);
    }
    assert_eq!(decide(&moved).rule, "election.given_up");
    let mut unsealed = view.clone();
    unsealed.memory.durable.sealed_term = Term(6);
    assert_eq!(decide(&unsealed).rule, "election.given_up");
    view.memory.promotion_failed = Some(Term(5));
    assert_eq!(decide(&view).rule, "election.given_up");
}

#[test]
fn the_winner_is_written_only_over_the_seals_that_were_counted() {
    let mut view = led().seen_by("b");
    let record = leader(&mut view);
    (record.holder, record.term) = (id("b"), Term(5));
    record.state = LeaderState::Electing { coordinator: name("b"), preferred: None, winner: None };
    view.lease = LeaseView::Held { term: Term(5), deadline: view.now.plus(secs(8)) };
    (view.memory.kept_revision, view.memory.durable.highest_term) = (Some(50), Term(5));
    view.memory.durable.sealed_term = Term(5);
    let position = Position { timeline: TimelineId(1), replayed: END, received: END, history: Default::default() };
    for (n, revision) in [("b", 71), ("c", 72)] {
        let seal = SealRecord {
            term: Term(5),
            incarnation: id(n).incarnation,
            position: position.clone(),
            tags: Default::default(),
        };
        records(&mut view).seals.insert(name(n), Keyed { revision, value: seal });
    }
    let plan = decide(&view);
    assert_eq!(plan.rule, "election.winner");
    let compares = |key: Key, revision| {
        plan.steps.iter().any(|s| {
            matches!(s, Step::Commit { transaction, .. }
                if transaction.compare.iter().any(|c| c.key == key && c.revision == revision))
        })
    };
    assert!(compares(Key::Seal(name("b")), 71) && compares(Key::Seal(name("c")), 72));
    assert!(compares(Key::Leader, 50) && compares(Key::Timeline(TimelineId(2)), 0));
}

// === Opening (S6, S9) ===

/// b was promoted to timeline 2, and c follows it already.
fn promoted() -> View {
    let mut view = led().seen_by("a");
    let (winner, _) = winner();
    (view.me, view.lease, view.store) = (winner.me, winner.lease, winner.store);
    (view.memory.kept_revision, view.memory.durable.highest_term) = (Some(50), Term(5));
    (view.memory.durable.sealed_term, view.memory.term) = (Term(5), Term(5));
    view.memory.enforced = Some(SyncRule::Nobody);
    let LocalPostgres::Primary(primary) = &mut view.local.postgres else { panic!("a primary") };
    primary.timeline = TimelineId(2);
    primary.history.0.push(HistoryEntry { timeline: TimelineId(1), switch: END });
    primary.rule_text = SyncRule::Nobody.to_string();
    primary.replicas[0].application_name = walreceiver_name(&id("c"), Term(5));
    view
}

#[test]
fn a_winner_opens_only_under_its_rule() {
    let mut view = promoted();
    assert_eq!(decide(&view).rule, "election.open");
    let LocalPostgres::Primary(primary) = &mut view.local.postgres else { panic!("a primary") };
    primary.replicas[0].application_name = walreceiver_name(&id("c"), Term(4));
    assert_eq!(decide(&view).rule, "election.followers", "a receiver of another term counts for nothing");
    let target = SyncRule::Any { k: 1, members: [id("a"), id("c")].into(), term: Term(5) };
    view.memory.enforced = Some(target);
    assert_eq!(decide(&view).rule, "election.publish");
}

#[test]
fn a_primary_that_is_not_what_was_reserved_is_killed() {
    let mut view = promoted();
    assert!(!kills(&view));
    let LocalPostgres::Primary(primary) = &mut view.local.postgres else { panic!("a primary") };
    primary.timeline = TimelineId(3);
    assert!(kills(&view));
    let mut view = promoted();
    let LocalPostgres::Primary(primary) = &mut view.local.postgres else { panic!("a primary") };
    primary.history.0[0].switch = lag(8);
    assert!(kills(&view));
}

// === The synchronous set (S2, S9) ===

/// a leads, with everything at rest; `change` is what is not.
fn sitting(change: impl FnOnce(&mut View)) -> Plan {
    let mut view = led().seen_by("a");
    view.memory.kept_revision = Some(50);
    view.memory.term = Term(4);
    view.memory.sync_settled = true;
    let members = view.me.configured.iter().cloned().collect();
    let membership = Membership { term: Term(4), members };
    records(&mut view).membership = Entry::Present(Keyed { revision: 40, value: membership });
    change(&mut view);
    decide(&view)
}

#[test]
fn a_doubtful_claim_is_written_again_before_anything_else() {
    assert_eq!(sitting(|_| {}).rule, "leader.slots");
    assert_eq!(sitting(|v| v.memory.doubtful_sync = true).rule, "leader.sync_doubt");
    assert_eq!(sitting(|v| v.memory.sync_settled = false).rule, "leader.sync_doubt", "one of an earlier agent's");
}

#[test]
fn a_doubled_name_is_ended_before_the_set_is_trusted() {
    let plan = sitting(|v| {
        let LocalPostgres::Primary(primary) = &mut v.local.postgres else { panic!("a primary") };
        primary.replicas.push(primary.replicas[0].clone());
    });
    assert_eq!(plan.rule, "leader.doubled");
}

#[test]
fn only_who_streams_under_this_term_joins_the_set() {
    let alone = |v: &mut View| {
        let Entry::Present(claim) = &mut records(v).sync else { panic!("a claim") };
        claim.value.members.remove(&id("c"));
        let rule = SyncRule::Any { k: 1, members: [id("b")].into(), term: Term(4) };
        let LocalPostgres::Primary(primary) = &mut v.local.postgres else { panic!("a primary") };
        primary.rule_text = rule.to_string();
        v.memory.enforced = Some(rule);
    };
    assert_eq!(sitting(alone).rule, "leader.sync_publish", "c streams and joins");
    let away = sitting(|v| {
        alone(v);
        let LocalPostgres::Primary(primary) = &mut v.local.postgres else { panic!("a primary") };
        primary.replicas.truncate(1);
    });
    assert_eq!(away.rule, "leader.slots", "c does not stream");
}

// === Rejoining (S3) ===

#[test]
fn wal_of_another_history_is_rewound_and_not_followed_over() {
    let with = |replayed: u64| {
        let mut view = led().seen_by("b");
        let record = leader(&mut view);
        record.term = Term(5);
        if let Some(last) = &mut record.last {
            (last.timeline, last.parent, last.switch) = (TimelineId(2), Some(TimelineId(1)), Some(END));
        }
        view.memory.durable.highest_term = Term(5);
        let LocalPostgres::Standby(standby) = &mut view.local.postgres else { panic!("a standby") };
        standby.replayed = Lsn(replayed);
        decide(&view).rule
    };
    assert_eq!(with(END.0), "follow.turn");
    assert_eq!(with(END.0 + 8), "follow.rewind");
}

// === Counting seals and comparing positions (S1, S2, S3) ===

/// b elects for term 5; the seals as given: member, term, incarnation's member, timeline, position.
fn judged(seals: &[(&str, u64, &str, u32, Lsn)]) -> Verdict {
    let mut view = led().seen_by("b");
    let record = leader(&mut view);
    (record.holder, record.term) = (id("b"), Term(5));
    let last = record.last.as_mut().unwrap();
    (last.timeline, last.parent, last.switch) = (TimelineId(2), Some(TimelineId(1)), Some(lag(100)));
    let record = record.clone();
    let r = records(&mut view);
    let reservation = TimelineReservation { term: Term(4), parent: TimelineId(1), switch: lag(100) };
    r.timelines.insert(TimelineId(2), reservation);
    // Nobody has published more than it is sealed with.
    r.members.values_mut().for_each(|m| m.value.replayed = None);
    for (n, term, incarnation, timeline, at) in seals {
        let position =
            Position { timeline: TimelineId(*timeline), replayed: *at, received: *at, history: Default::default() };
        let incarnation = id(incarnation).incarnation;
        let seal = SealRecord { term: Term(*term), incarnation, position, tags: Default::default() };
        r.seals.insert(name(n), Keyed { revision: 70, value: seal });
    }
    judge(r, &record, 1 << 20, None)
}

fn winner_of(verdict: &Verdict) -> Option<String> {
    match verdict {
        Verdict::Elected(elected) => Some(elected.winner.member.name.to_string()),
        Verdict::Waiting { .. } | Verdict::Copying(_) | Verdict::Impossible { .. } => None,
    }
}

#[test]
fn a_seal_counts_for_its_term_and_its_incarnation_only() {
    let b = ("b", 5, "b", 2, END);
    assert_eq!(winner_of(&judged(&[b, ("c", 5, "c", 2, END)])), Some("b".to_owned()));
    assert_eq!(winner_of(&judged(&[b])), None);
    assert_eq!(winner_of(&judged(&[b, ("c", 4, "c", 2, END)])), None, "a seal of the term before");
    assert_eq!(winner_of(&judged(&[b, ("c", 5, "x", 2, END)])), None, "another incarnation");
}

#[test]
fn the_line_of_history_decides_and_not_the_number() {
    let behind = ("b", 5, "b", 2, lag(50));
    assert_eq!(winner_of(&judged(&[behind, ("c", 5, "c", 2, END)])), Some("c".to_owned()));
    // c wrote on where timeline 1 had been left: more bytes, another history.
    assert_eq!(winner_of(&judged(&[behind, ("c", 5, "c", 1, END)])), Some("b".to_owned()));
    let diverged = judged(&[("b", 5, "b", 1, END), ("c", 5, "c", 1, END)]);
    assert_eq!(winner_of(&diverged), None, "both left the history");
    let early = judged(&[("b", 5, "b", 1, lag(100)), ("c", 5, "c", 1, lag(200))]);
    assert_eq!(winner_of(&early), Some("b".to_owned()), "both are on the way to it");
}

/// S3: nothing is copied over WAL of another history, and nobody leads before everything is copied.
#[test]
fn only_who_is_on_the_way_to_it_copies_from_who_must_not_lead() {
    let copies = |c: (u32, Lsn)| {
        let mut view = led().seen_by("b");
        let record = leader(&mut view);
        (record.holder, record.term) = (id("c"), Term(5));
        let record = record.clone();
        let r = records(&mut view);
        r.members.values_mut().for_each(|m| m.value.replayed = None);
        r.membership = Entry::Present(Keyed {
            revision: 9,
            value: Membership { term: Term(4), members: ["a", "b", "c"].map(name).into() },
        });
        for (n, (timeline, at)) in [("b", (1, END)), ("c", c)] {
            let position =
                Position { timeline: TimelineId(timeline), replayed: at, received: at, history: Default::default() };
            let mut seal =
                SealRecord { term: Term(5), incarnation: id(n).incarnation, position, tags: Default::default() };
            seal.tags.nofailover = n == "b";
            r.seals.insert(name(n), Keyed { revision: 70, value: seal });
        }
        judge(r, &record, 1 << 20, None)
    };
    match copies((1, lag(8))) {
        Verdict::Copying(copying) => assert_eq!((copying.by, copying.from, copying.end), (name("c"), name("b"), END)),
        other => panic!("{other:?}"),
    }
    assert_eq!(winner_of(&copies((1, END))), Some("c".to_owned()));
    let other_history = copies((7, lag(8)));
    assert!(matches!(other_history, Verdict::Impossible { .. }), "{other_history:?}");
}

#[test]
fn a_disk_of_the_past_is_not_counted() {
    let mut view = led().seen_by("b");
    let record = leader(&mut view);
    (record.holder, record.term) = (id("b"), Term(5));
    let record = record.clone();
    let r = records(&mut view);
    for (n, at) in [("b", END), ("c", lag(8))] {
        let position = Position { timeline: TimelineId(1), replayed: at, received: at, history: Default::default() };
        let incarnation = id(n).incarnation;
        let seal = SealRecord { term: Term(5), incarnation, position, tags: Default::default() };
        r.seals.insert(name(n), Keyed { revision: 70, value: seal });
    }
    assert_eq!(winner_of(&judge(r, &record, 1 << 20, None)), None, "c published more than it has");
    r.members.get_mut(&name("c")).unwrap().value.replayed = Some(lag(8));
    assert_eq!(winner_of(&judge(r, &record, 1 << 20, None)), Some("b".to_owned()));
}

#[test]
fn a_state_file_of_the_past_begins_a_new_incarnation() {
    let mut view = led().seen_by("b");
    view.now = view.now.plus(secs(7));
    view.me.start_counter = 3;
    assert_ne!(decide(&view).rule, "identity.restored");
    records(&mut view).members.get_mut(&name("b")).unwrap().value.start_counter = 4;
    assert_eq!(decide(&view).rule, "identity.restored");
}

#[test]
fn the_lint_refuses_a_takeover_that_does_not_compare_the_lease() {
    let mut view = led().seen_by("b");
    let mut record = leader(&mut view).clone();
    (record.holder, record.term) = (id("b"), Term(5));
    record.state = LeaderState::Electing { coordinator: name("b"), preferred: None, winner: None };
    let take = |transaction: Transaction| Step::Commit {
        what: "test".to_owned(),
        transaction: transaction.put(Write::Leader(record.clone())),
    };
    assert!(!refused(&view, take(Transaction::when(Key::Leader, 50).and(Key::Lease, 100))));
    assert!(refused(&view, take(Transaction::when(Key::Leader, 50))));
}

/// S1: in async only the end of the lease, or a release, ends whoever holds the term.
#[test]
fn the_lint_refuses_an_async_takeover_before_w() {
    let take = |mode: Durability, silence: Duration| {
        let mut view = silent(silence);
        let Entry::Present(claim) = &mut records(&mut view).sync else { panic!("there is a claim") };
        claim.value.mode = mode;
        let mut record = leader(&mut view).clone();
        (record.holder, record.term) = (id("b"), Term(5));
        record.state = LeaderState::Electing { coordinator: name("b"), preferred: None, winner: None };
        let transaction = Transaction::when(Key::Leader, 50).and(Key::Lease, 100).put(Write::Leader(record));
        refused(&view, Step::Commit { what: "test".to_owned(), transaction })
    };
    assert!(take(Durability::Async, secs(3)));
    assert!(!take(Durability::Async, secs(9)));
    assert!(!take(Durability::Sync, secs(3)));
}

/// S12: no claim is no licence, at the counting as before the election.
#[test]
fn without_the_claim_no_seals_are_enough() {
    let mut view = led().seen_by("b");
    let record = leader(&mut view);
    (record.holder, record.term) = (id("b"), Term(5));
    let record = record.clone();
    let r = records(&mut view);
    let members = ["a", "b", "c"].map(name).into();
    r.membership = Entry::Present(Keyed { revision: 9, value: Membership { term: Term(4), members } });
    for n in ["a", "b", "c"] {
        let position = Position { timeline: TimelineId(1), replayed: END, received: END, history: Default::default() };
        let seal = SealRecord { term: Term(5), incarnation: id(n).incarnation, position, tags: Default::default() };
        r.seals.insert(name(n), Keyed { revision: 70, value: seal });
    }
    assert!(winner_of(&judge(r, &record, 1 << 20, None)).is_some());
    r.sync = Entry::Absent;
    assert!(matches!(judge(r, &record, 1 << 20, None), Verdict::Impossible { .. }));
}

/// An election is a lease like any other: past its deadline the coordinator chooses nobody.
#[test]
fn an_election_ends_with_its_lease() {
    let view = |deadline_passed: bool| {
        let mut view = led().seen_by("b");
        let record = leader(&mut view);
        (record.holder, record.term) = (id("b"), Term(5));
        record.state = LeaderState::Electing { coordinator: name("b"), preferred: None, winner: None };
        let r = records(&mut view);
        for n in ["b", "c"] {
            let position =
                Position { timeline: TimelineId(1), replayed: END, received: END, history: Default::default() };
            let seal = SealRecord { term: Term(5), incarnation: id(n).incarnation, position, tags: Default::default() };
            r.seals.insert(name(n), Keyed { revision: 70, value: seal });
        }
        let deadline = if deadline_passed { view.now.minus(secs(1)) } else { view.now.plus(secs(7)) };
        view.lease = LeaseView::Held { term: Term(5), deadline };
        view.memory.kept_revision = Some(50);
        decide(&view).rule
    };
    assert_eq!(view(false), "election.winner");
    assert_ne!(view(true), "election.winner");
}
