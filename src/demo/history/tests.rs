//! Histories with one planted anomaly of each kind, which must be found, and clean ones, which must pass.

use super::*;

const MS: u64 = 1_000_000;

/// Member `a` writes timeline 1, `b` timeline 2.
fn member(timeline: Option<u32>) -> String {
    timeline.map_or("s", |timeline| ["a", "b", "c"][timeline as usize - 1]).to_owned()
}

fn op(session: u64, what: What, from_to: (u64, u64), timeline: Option<u32>) -> Op {
    Op {
        client: 1,
        session,
        member: member(timeline),
        what,
        invoked: from_to.0 * MS,
        completed: Some(from_to.1 * MS),
        outcome: Outcome::Ok { timeline },
    }
}

fn append(value: Value, from_to: (u64, u64), timeline: u32) -> Op {
    op(u64::from(timeline), What::Append { key: 1, value }, from_to, Some(timeline))
}

fn read(values: &[Value], from_to: (u64, u64), timeline: u32) -> Op {
    op(u64::from(timeline), What::Read { key: 1, values: values.to_vec() }, from_to, Some(timeline))
}

fn on_standby(session: u64, values: &[Value], from_to: (u64, u64)) -> Op {
    op(session, What::Read { key: 1, values: values.to_vec() }, from_to, None)
}

fn finally(values: &[Value]) -> Op {
    op(99, What::Final { key: 1, values: values.to_vec() }, (9_000, 9_001), Some(3)).at("b")
}

impl Op {
    fn at(self, member: &str) -> Op {
        Op { member: member.to_owned(), ..self }
    }

    fn unknown(self) -> Op {
        Op { completed: None, outcome: Outcome::Unknown { why: "connection closed".to_owned() }, ..self }
    }

    fn failed(self) -> Op {
        Op { outcome: Outcome::Failed { why: "25006".to_owned() }, ..self }
    }
}

/// A failover from a to b at 100 ms: two acknowledged appends survive, one of unknown outcome is there, one is not.
fn clean() -> Vec<Op> {
    vec![
        append(1, (10, 20), 1),
        read(&[1], (21, 22), 1),
        append(2, (30, 40), 1),
        append(3, (90, 100), 1).unknown(),
        append(4, (91, 100), 1).unknown(),
        append(9, (95, 96), 1).failed(),
        // Seen by another before its standbys had it, and gone with its primary.
        read(&[1, 2, 3, 4], (92, 93), 1),
        on_standby(7, &[1], (50, 51)),
        on_standby(7, &[1, 2], (60, 61)),
        on_standby(8, &[1], (62, 63)),
        append(5, (150, 160), 2),
        read(&[1, 2, 3, 5], (170, 171), 2),
        finally(&[1, 2, 3, 5]),
    ]
}

fn kinds(ops: &[Op]) -> Vec<&'static str> {
    found(ops, Rules::default())
}

fn found(ops: &[Op], rules: Rules) -> Vec<&'static str> {
    let mut kinds: Vec<&str> = check(ops, rules).anomalies.iter().map(Anomaly::kind).collect();
    kinds.dedup();
    kinds
}

fn with(more: impl IntoIterator<Item = Op>) -> Vec<Op> {
    clean().into_iter().chain(more).collect()
}

/// The last reading is another one.
fn ending(values: &[Value]) -> Vec<Op> {
    let ops = clean().into_iter().filter(|op| !matches!(op.what, What::Final { .. }));
    ops.filter(|op| op.invoked != 170 * MS).chain([finally(values)]).collect()
}

#[test]
fn a_clean_history_passes_with_what_is_unknown_in_it() {
    let verdict = check(&clean(), Rules::default());
    assert_eq!(verdict.anomalies, []);
    let summary = verdict.summary;
    assert_eq!((summary.acknowledged, summary.failed, summary.unknown, summary.unknown_present), (3, 1, 2, 1));
    assert_eq!((summary.reads, summary.seen_and_gone, summary.lost_by_rule), (6, 1, 0));
    assert_eq!(summary.timelines[&2], ("b".to_owned(), 160, 160));
    assert_eq!(check(&[], Rules::default()).anomalies, []);
}

#[test]
fn order_of_the_lines_does_not_matter() {
    let mut ops = clean();
    ops.reverse();
    assert_eq!(kinds(&ops), [""; 0]);
}

#[test]
fn an_acknowledged_append_that_is_gone_is_lost() {
    assert_eq!(kinds(&ending(&[1, 3, 5])), ["lost"]);
    assert_eq!(check(&ending(&[1, 3, 5]), Rules::default()).lost(), 1);
}

#[test]
fn without_a_last_read_of_the_key_nothing_is_said_to_be_lost() {
    let ops: Vec<Op> = clean().into_iter().filter(|op| !matches!(op.what, What::Final { .. })).collect();
    assert_eq!(kinds(&ops), [""; 0]);
}

#[test]
fn asynchronous_commits_may_be_lost_but_not_acknowledged_after_the_next_primary() {
    let may_lose = Rules { may_lose: true };
    let verdict = check(&ending(&[1, 3, 5]), may_lose);
    assert_eq!((verdict.anomalies.len(), verdict.summary.lost_by_rule), (0, 1));
    // Sent before, answered after the first acknowledgement of b, and not part of b's history.
    let late = append(6, (98, 200), 1);
    assert_eq!(found(&with([late]), may_lose), ["dual primary"]);
}

#[test]
fn two_members_that_acknowledge_side_by_side_are_found() {
    // Asked for after b had acknowledged; that it is there does not excuse it.
    let mut ops = ending(&[1, 2, 3, 5, 6]);
    ops.push(append(6, (161, 170), 1));
    assert_eq!(kinds(&ops), ["dual primary"]);
    // Answered late, but part of b's history: lawful.
    let mut late = ending(&[1, 2, 3, 6, 5]);
    late.push(append(6, (98, 200), 1));
    assert_eq!(kinds(&late), [""; 0]);
}

#[test]
fn two_members_on_one_timeline_are_found() {
    let ops = with([append(6, (45, 46), 1).at("c")]);
    assert!(kinds(&ops).contains(&"shared timeline"), "{:?}", kinds(&ops));
    assert!(check(&ops, Rules::default()).dual() > 0);
}

#[test]
fn a_member_that_goes_back_in_its_epochs_is_found() {
    let mut ops = ending(&[1, 2, 3, 5, 6]);
    ops.push(append(6, (180, 190), 1).at("b"));
    assert!(kinds(&ops).contains(&"epoch went back"), "{:?}", kinds(&ops));
}

#[test]
fn a_value_that_is_there_twice_is_found() {
    assert_eq!(kinds(&ending(&[1, 2, 3, 5, 5])), ["duplicate"]);
}

#[test]
fn values_from_nowhere_are_found() {
    assert_eq!(kinds(&ending(&[1, 2, 3, 5, 77])), ["phantom"]);
    assert_eq!(kinds(&ending(&[1, 2, 3, 9, 5])), ["phantom"], "its append failed");
}

#[test]
fn two_orders_are_found() {
    assert_eq!(kinds(&with([on_standby(12, &[2, 1], (70, 71))])), ["reordered"]);
}

#[test]
fn a_read_of_a_primary_that_misses_an_acknowledged_append_is_found() {
    assert_eq!(kinds(&with([read(&[], (23, 24), 1)])), ["stale read", "read went back"]);
    // An old primary that still answers readers.
    assert!(kinds(&with([read(&[1, 2], (172, 173), 1)])).contains(&"stale read"));
    // Asked before the acknowledgement: nobody was promised anything.
    assert_eq!(kinds(&with([read(&[1], (39, 41), 1)])), [""; 0]);
}

#[test]
fn reads_that_go_back_on_one_connection_are_found() {
    assert_eq!(kinds(&with([on_standby(7, &[1], (70, 71))])), ["read went back"]);
    assert_eq!(
        kinds(&with([on_standby(13, &[1], (70, 71))])),
        [""; 0],
        "another connection may lead to a slower standby"
    );
}

#[test]
fn a_history_survives_its_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    save(&clean(), file.path()).unwrap();
    assert_eq!(load(file.path()).unwrap(), clean());
}
