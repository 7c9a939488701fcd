use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::core::Lsn;
use crate::core::names::{Incarnation, MemberId};
use crate::core::records::*;
use crate::core::timeline::{History, HistoryEntry};

const SYSTEM: u64 = 7_439_812_345_678_901_234;

fn member(name: &str) -> MemberName {
    MemberName::new(name).unwrap()
}

fn id(name: &str, incarnation: u64) -> MemberId {
    MemberId { name: member(name), incarnation: Incarnation(incarnation) }
}

fn position() -> Position {
    Position {
        timeline: TimelineId(2),
        replayed: Lsn(0x16_B374_D848),
        received: Lsn(0x16_B374_D900),
        history: History(vec![HistoryEntry { timeline: TimelineId(1), switch: Lsn(0x300_0000) }]),
    }
}

/// One of each kind, with every option filled, and how it stands in the store. This is the format: agents of two releases
/// read each other's values, so a change here is a new `v`, unless it only adds a field.
fn golden() -> Vec<(Write, &'static str, Value)> {
    let tags = Tags { custom: BTreeMap::from([("term".to_owned(), "7".to_owned())]), ..Tags::default() };
    let tags_wire = json!({"nofailover": false, "failover_priority": 1, "noloadbalance": false, "nosync": false, "custom": {"term": "7"}});
    let position_wire = json!({"timeline": 2, "replayed": "16/B374D848", "received": "16/B374D900",
        "history": [{"timeline": 1, "switch": "0/3000000"}]});
    let leader = |state| LeaderRecord {
        holder: id("node-a", 1),
        boot_id: "boot".to_owned(),
        term: Term(5),
        state,
        ttl_ms: 8000,
        takeover_ms: 2000,
        taken: Some(Taken { from: id("node-b", 0xabc), term: Term(4), doubled: 1 }),
        lsn: None,
        last: Some(Published {
            member: id("node-b", 0xabc),
            term: Term(4),
            timeline: TimelineId(2),
            parent: Some(TimelineId(1)),
            switch: Some(Lsn(0x300_0000)),
        }),
    };
    let leader_wire = |state: Value| {
        json!({"v": 1, "holder": {"name": "node-a", "incarnation": "0000000000000001"}, "boot_id": "boot", "term": 5,
            "state": state, "ttl_ms": 8000, "takeover_ms": 2000,
            "taken": {"from": {"name": "node-b", "incarnation": "0000000000000abc"}, "term": 4, "doubled": 1},
            "lsn": null, "last": {"member": {"name": "node-b", "incarnation": "0000000000000abc"}, "term": 4, "timeline": 2, "parent": 1, "switch": "0/3000000"}})
    };
    let winner =
        Winner { member: id("node-c", 3), timeline: TimelineId(3), parent: TimelineId(2), switch: Lsn(0x400_0000) };
    let winner_wire = json!({"member": {"name": "node-c", "incarnation": "0000000000000003"}, "timeline": 3, "parent": 2, "switch": "0/4000000"});
    let person = MemberRecord {
        incarnation: Incarnation(1),
        start_counter: 12,
        boot_id: "boot".to_owned(),
        data: DataSummary::Present { system_identifier: SYSTEM },
        role: Role::Standby,
        state: "streaming".to_owned(),
        timeline: Some(TimelineId(2)),
        received: Some(Lsn(0x16_B374_D900)),
        replayed: Some(Lsn(0x16_B374_D848)),
        term: Term(5),
        host: "10.0.0.1".to_owned(),
        port: 5432,
        api_url: "http://10.0.0.1:8008".to_owned(),
        endpoint: None,
        tags: tags.clone(),
        postgres_version: 150018,
        agent_version: "0.1.0".to_owned(),
        pending_restart: false,
        job: Some(JobProgress {
            what: "clone from node-b".to_owned(),
            done_bytes: Some(1),
            total_bytes: Some(u64::MAX),
        }),
        overtaken: Some(Term(3)),
        rule: "follow".to_owned(),
        reason: "follows node-b under term 5".to_owned(),
        storage: StorageSummary { free_bytes: Some(5), ..Default::default() },
        beat: 77,
        witness: true,
        kept: vec![KeptWal {
            timeline: TimelineId(2),
            left_at: Lsn(0x300_0000),
            transactions: 3,
            directory: "/d".to_owned(),
        }],
    };
    let person_wire = json!({"v": 1, "incarnation": "0000000000000001", "start_counter": 12, "boot_id": "boot",
        "data": {"is": "present", "system_identifier": "7439812345678901234"}, "role": "standby", "state": "streaming",
        "timeline": 2, "received": "16/B374D900", "replayed": "16/B374D848", "term": 5, "host": "10.0.0.1", "port": 5432,
        "api_url": "http://10.0.0.1:8008", "endpoint": null, "tags": tags_wire.clone(), "postgres_version": 150018, "agent_version": "0.1.0",
        "pending_restart": false,
        "job": {"what": "clone from node-b", "done_bytes": 1, "total_bytes": "18446744073709551615"},
        "overtaken": 3, "rule": "follow", "reason": "follows node-b under term 5", "storage": {"trouble": null, "full": null, "free_bytes": 5, "data_bytes": null}, "beat": 77, "witness": true,
         "kept": [{"timeline": 2, "left_at": "0/3000000", "transactions": 3, "directory": "/d"}]});
    let request = |what, outcome| {
        Write::Request(Request {
            id: "r-1".to_owned(),
            what,
            asked_by: "cli".to_owned(),
            at_unix_ms: 1_790_000_000_000,
            timeout_ms: 60_000,
            began: None,
            outcome,
            force: None,
        })
    };
    let request_wire = |what: Value, outcome: Value| json!({"v": 1, "id": "r-1", "what": what, "asked_by": "cli", "at_unix_ms": 1_790_000_000_000u64, "timeout_ms": 60000, "began": null, "outcome": outcome});
    let message = || "why".to_owned();
    vec![
        (
            Write::Init(ClusterInit { system_identifier: SYSTEM }),
            "init",
            json!({"v": 1, "system_identifier": "7439812345678901234"}),
        ),
        (Write::Leader(leader(LeaderState::Held)), "leader", leader_wire(json!({"is": "held"}))),
        (
            Write::Leader(leader(LeaderState::Electing {
                coordinator: member("node-a"),
                preferred: Some(member("node-c")),
                winner: Some(winner),
            })),
            "leader",
            leader_wire(
                json!({"is": "electing", "coordinator": "node-a", "preferred": "node-c", "winner": winner_wire}),
            ),
        ),
        (
            Write::Leader(leader(LeaderState::Released { to: None, why: message() })),
            "leader",
            leader_wire(json!({"is": "released", "to": null, "why": "why"})),
        ),
        (
            Write::Leader(leader(LeaderState::Fenced { survivors: 2 })),
            "leader",
            leader_wire(json!({"is": "fenced", "survivors": 2})),
        ),
        (
            Write::Lease(LeaseRecord { term: Term(5), seq: 42, lsn: Some(Lsn(0x16_B374_D848)) }),
            "lease",
            json!({"v": 1, "term": 5, "seq": 42, "lsn": "16/B374D848"}),
        ),
        (
            Write::Sync(SyncClaim {
                mode: Durability::Sync,
                primary: id("node-a", 1),
                members: BTreeSet::from([id("node-b", 2), id("node-c", 3)]),
                k: 1,
                term: Term(5),
            }),
            "sync",
            json!({"v": 1, "mode": "sync", "primary": {"name": "node-a", "incarnation": "0000000000000001"},
                "members": [{"name": "node-b", "incarnation": "0000000000000002"}, {"name": "node-c", "incarnation": "0000000000000003"}],
                "k": 1, "term": 5}),
        ),
        (
            Write::Membership(Membership {
                term: Term(5),
                members: BTreeSet::from([member("node-a"), member("node-b")]),
            }),
            "membership",
            json!({"v": 1, "term": 5, "members": ["node-a", "node-b"]}),
        ),
        (
            Write::Timeline(
                TimelineId(3),
                TimelineReservation { term: Term(6), parent: TimelineId(2), switch: Lsn(0x400_0000) },
            ),
            "timelines/3",
            json!({"v": 1, "term": 6, "parent": 2, "switch": "0/4000000"}),
        ),
        (Write::Member(member("node-a"), Box::new(person)), "members/node-a", person_wire),
        (
            Write::Seal(
                member("node-a"),
                SealRecord { term: Term(6), incarnation: Incarnation(1), position: position(), tags },
            ),
            "seals/node-a",
            json!({"v": 1, "term": 6, "incarnation": "0000000000000001", "position": position_wire, "tags": tags_wire}),
        ),
        (
            request(Operation::Switchover { to: Some(member("node-b")) }, None),
            "requests/r-1",
            request_wire(json!({"is": "switchover", "to": "node-b"}), json!(null)),
        ),
        (
            request(Operation::Failover { to: None }, Some(Outcome::Done { message: message() })),
            "requests/r-1",
            request_wire(json!({"is": "failover", "to": null}), json!({"is": "done", "message": "why"})),
        ),
        (
            request(Operation::Restart { member: member("node-b") }, Some(Outcome::Refused { message: message() })),
            "requests/r-1",
            request_wire(json!({"is": "restart", "member": "node-b"}), json!({"is": "refused", "message": "why"})),
        ),
        (
            request(Operation::Reinit { member: member("node-b") }, Some(Outcome::PutBack { message: message() })),
            "requests/r-1",
            request_wire(json!({"is": "reinit", "member": "node-b"}), json!({"is": "put_back", "message": "why"})),
        ),
        (
            Write::History(HistoryRecord {
                term: Term(6),
                leader: member("node-c"),
                timeline: TimelineId(3),
                switch: Some(Lsn(0x400_0000)),
                reason: "crash".to_owned(),
                at_unix_ms: 1_790_000_000_000,
                phases_ms: BTreeMap::from([("promoted".to_owned(), 24), ("sealed".to_owned(), 9)]),
            }),
            "history/6",
            json!({"v": 1, "term": 6, "leader": "node-c", "timeline": 3, "switch": "0/4000000", "reason": "crash",
                "at_unix_ms": 1_790_000_000_000u64, "phases_ms": {"promoted": 24, "sealed": 9}}),
        ),
    ]
}

fn prepared(write: Write, known: &Objects) -> (String, Value) {
    let transaction = Transaction::default().put(write);
    let (name, bytes) = prepare(&transaction, known).unwrap().write.remove(0);
    (name, serde_json::from_slice(&bytes.unwrap()).unwrap())
}

fn read(keys: &[(&str, &[u8])]) -> ClusterRecords {
    decode(9, 100, keys.iter().map(|(name, value)| Found { name: name.as_bytes(), revision: 50, value })).0
}

/// The record back as the write that made it.
fn write_again(records: &ClusterRecords) -> Option<Write> {
    let member = records.members.iter().next().map(|(n, r)| Write::Member(n.clone(), Box::new(r.value.clone())));
    let seal = records.seals.iter().next().map(|(n, r)| Write::Seal(n.clone(), r.value.clone()));
    let timeline = records.timelines.iter().next().map(|(n, r)| Write::Timeline(*n, *r));
    None.or(records.init.value().cloned().map(Write::Init))
        .or(records.leader.value().cloned().map(Write::Leader))
        .or(records.lease.value().cloned().map(Write::Lease))
        .or(records.sync.value().cloned().map(Write::Sync))
        .or(records.membership.value().cloned().map(Write::Membership))
        .or(timeline)
        .or(member)
        .or(seal)
        .or(records.requests.values().next().map(|r| Write::Request(r.value.clone())))
        .or(records.history.values().next().map(|r| Write::History(r.clone())))
}

#[test]
fn the_wire_format_does_not_change_by_accident() {
    for (write, name, wire) in golden() {
        let (written_name, written) = prepared(write.clone(), &Objects::new());
        assert_eq!(written_name, name);
        assert_eq!(written, wire, "{name}");
        let records = read(&[(name, wire.to_string().as_bytes())]);
        assert_eq!(records.unreadable, BTreeMap::new());
        assert_eq!(write_again(&records), Some(write), "{name}");
    }
}

#[test]
fn the_largest_numbers_come_back_exactly() {
    for (write, name, _) in golden() {
        // Every whole number of the record at its largest: where that is a u64 it has to survive as a string.
        let mut value = Value::Object(fields_of(&write));
        let widened = widen(&mut value, None);
        let mut object = value.as_object().unwrap().clone();
        object.insert("v".to_owned(), json!(1));
        let name = name.replace("history/6", "history/18446744073709551615");
        let records = read(&[(&name, Value::Object(object).to_string().as_bytes())]);
        assert_eq!(records.unreadable, BTreeMap::new(), "{name}");
        let again = write_again(&records).unwrap();
        let wire = Value::Object(encode(&again, None).unwrap().unwrap());
        let strings = wire.to_string().matches("\"18446744073709551615\"").count();
        assert_eq!(strings, widened, "{name}: {wire}");
    }
}

fn fields_of(write: &Write) -> Map<String, Value> {
    encode(write, None).unwrap().unwrap()
}

/// Sets every number of a `WIDE` field (and every phase) to u64::MAX, as a plain JSON number.
fn widen(value: &mut Value, field: Option<&str>) -> usize {
    match value {
        Value::Object(object) => object
            .iter_mut()
            .map(|(name, value)| match name.as_str() {
                "custom" => 0,
                "phases_ms" => value.as_object_mut().unwrap().values_mut().map(|v| widen(v, Some("term"))).sum(),
                name => widen(value, Some(name)),
            })
            .sum(),
        Value::Array(items) => items.iter_mut().map(|v| widen(v, None)).sum(),
        Value::Number(_) | Value::String(_) if field.is_some_and(|f| WIDE.contains(&f)) => {
            *value = json!(u64::MAX);
            1
        }
        _ => 0,
    }
}

#[test]
fn unknown_fields_are_kept_and_our_own_are_not_mixed_with_old_ones() {
    let stored = json!({"v": 1, "term": 5, "seq": 41, "lsn": "0/1", "added_later": {"a": [1]}});
    let stored = stored.to_string();
    let (_, mut known) = decode(9, 100, [Found { name: b"lease", revision: 5, value: stored.as_bytes() }]);
    let write = Write::Lease(LeaseRecord { term: Term(5), seq: 42, lsn: None });
    let (_, written) = prepared(write.clone(), &known);
    assert_eq!(written, json!({"v": 1, "term": 5, "seq": 42, "lsn": null, "added_later": {"a": [1]}}));
    // And once more without a read in between.
    prepare(&Transaction::default().put(write.clone()), &known).unwrap().applied(&mut known);
    assert_eq!(prepared(write, &known).1, written);
    // A deleted key has nothing to keep.
    prepare(&Transaction::default().put(Write::Delete(Key::Lease)), &known).unwrap().applied(&mut known);
    assert!(known.is_empty());
}

#[test]
fn what_cannot_be_read_says_which_key_and_why() {
    let check = |name: &str, value: &str, expect: &str| {
        let records = read(&[(name, value.as_bytes())]);
        let why = records.unreadable.get(name).unwrap_or_else(|| panic!("{name} = {value} was read"));
        assert!(why.starts_with(&format!("{name}: ")) && why.contains(expect), "{name} = {value}: {why}");
        assert_eq!(write_again(&records), None);
    };
    check("leader", "", "not JSON");
    check("leader", "nonsense", "not JSON");
    check("leader", "[1]", "not a JSON object");
    check("leader", "{}", "`v`, the format's version, is missing");
    check("leader", r#"{"v": "1"}"#, "not a whole number");
    check("leader", r#"{"v": 0}"#, "not a whole number above 0");
    check("leader", r#"{"v": 2}"#, "written in format 2 by a newer pgvigil, this one reads format 1");
    check("lease", r#"{"v": 1, "term": 1, "lsn": null}"#, "missing field `seq`");
    check("lease", r#"{"v": 1, "term": 1, "seq": -1, "lsn": null}"#, "field `seq`: invalid value");
    check("lease", r#"{"v": 1, "term": 1, "seq": "x", "lsn": null}"#, "field `seq`: invalid type: string");
    check("lease", r#"{"v": 1, "term": 1, "seq": "01", "lsn": null}"#, "field `seq`");
    check("lease", r#"{"v": 1, "term": 1, "seq": 18446744073709551616, "lsn": null}"#, "field `seq`");
    check("lease", r#"{"v": 1, "term": 1, "seq": 1, "lsn": "16"}"#, "field `lsn`: `16` is not a WAL position");
    check("init", r#"{"v": 1, "system_identifier": "x"}"#, "field `system_identifier`");
    check("members/Node", "{}", "not a valid name");
    check("members/a/b", "{}", "not a valid name");
    check("seals/", "{}", "not a valid name");
    check("timelines/x", "{}", "`x` in the key is not a whole number");
    check("timelines/07", "{}", "`07` in the key is not a whole number");
    check("timelines/0", "{}", "0 is not a timeline");
    check("timelines/4294967296", "{}", "4294967296 is not a timeline");
    check("history/-1", "{}", "not a whole number");
    check("requests/a b", "{}", "not an id of a request");
    let big = format!(r#"{{"v": 1, "x": "{}"}}"#, "x".repeat(MAX_VALUE));
    check("sync", &big, "more than the 65536 that a value may have");
    for (write, name, wire) in golden() {
        match write {
            Write::Request(_) => check("requests/other", &wire.to_string(), "the value says that it is request `r-1`"),
            Write::History(_) => check("history/7", &wire.to_string(), "the value says that it is of term 6"),
            _ => check(name, &wire.to_string().replace("\"v\":1", "\"v\":9"), "format 9"),
        }
    }
}

#[test]
fn an_unreadable_single_key_is_an_entry_with_its_revision() {
    let records = read(&[("sync", b"nonsense")]);
    assert!(matches!(&records.sync, Entry::Unreadable { revision: 50, why } if why.starts_with("sync: not JSON")));
    assert_eq!(records.leader, Entry::Absent);
}

#[test]
fn keys_of_others_are_left_alone() {
    let records = read(&[("config", b"x"), ("consumers/1", b"x"), ("leader/x", b"x"), ("timelines", b"x"), ("", b"x")]);
    assert_eq!(records, ClusterRecords { store_id: 9, revision: 100, ..Default::default() });
}

#[test]
fn refuses_what_etcd_would_refuse_or_could_be_mistaken() {
    let lease = || Write::Lease(LeaseRecord { term: Term(1), seq: 1, lsn: None });
    let check = |transaction: Transaction, expect: &str| {
        let why = prepare(&transaction, &Objects::new()).unwrap_err();
        assert!(why.contains(expect), "{why}");
    };
    check(Transaction::default().put(lease()).put(Write::Delete(Key::Lease)), "lease is written twice");
    check(Transaction::when(Key::Request("../leader".to_owned()), 0), "`../leader` is not an id of a request");
    let many = (1..=129).map(|n| Write::Delete(Key::History(Term(n))));
    let many = Transaction { write: many.collect(), ..Transaction::default() };
    check(many, "129 writes");
    let Write::Request(mut request) = golden().into_iter().find(|g| g.1 == "requests/r-1").unwrap().0 else { panic!() };
    request.asked_by = "x".repeat(MAX_VALUE);
    check(Transaction::default().put(Write::Request(request)), "requests/r-1: ");
}

#[test]
fn the_root_is_one_path() {
    let cluster = ClusterName::new("main").unwrap();
    for prefix in ["/pgvigil", "pgvigil", "/pgvigil/", "pgvigil//"] {
        assert_eq!(Root::new(prefix, &cluster).key("leader"), "/pgvigil/main/leader");
    }
    assert_eq!(Root::new("/", &cluster).as_str(), "/main/");
}

proptest! {
    #[test]
    fn nothing_in_the_store_makes_it_panic(name in "(leader|lease|sync|init|membership|(timelines|members|seals|requests|history)/[a-z0-9]{0,3})",
        value in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            "\\{\"v\":[0-3](,\"(term|seq|members|position|state|holder|data|is|custom)\":(1|\"7\"|null|\\[\\]|\\{\\}|\\{\"is\":\"held\"\\})){0,4}\\}".prop_map(String::into_bytes),
        ]) {
        let records = read(&[(&name, &value)]);
        prop_assert!(records.unreadable.len() <= 1);
    }
}
