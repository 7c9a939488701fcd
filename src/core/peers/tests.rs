use super::*;
use crate::core::records::Durability;
use crate::core::testing::{NOW, cluster, id, lag, name, secs};
use crate::core::view::Store;

#[test]
fn messages_are_as_older_and_newer_versions_read_them() {
    let question = Question {
        version: VERSION,
        cluster: ClusterName::new("maas").unwrap(),
        system_identifier: Some(7),
        from: id("b"),
        asks: Asks::Report,
    };
    let text = serde_json::to_string(&question).unwrap();
    assert_eq!(
        text,
        r#"{"version":1,"cluster":"maas","system_identifier":7,"from":{"name":"b","incarnation":"0000000000000062"},"asks":{"is":"report"}}"#
    );
    let newer = text.replace(r#"{"is":"report"}"#, r#"{"is":"riddle","which":3},"more":true"#);
    assert_eq!(serde_json::from_str::<Question>(&newer).unwrap().asks, Asks::Unknown);

    let report = r#"{"is":"report","boot_id":"x","highest_term":4,"sealed_term":3,
        "holder":{"is":"unknown","why":"starting"},"loop_age_ms":5,"of_tomorrow":1}"#;
    let Says::Report(report) = serde_json::from_str(report).unwrap() else { panic!("a report") };
    // What an older member does not say is unknown, and unknown is no consent (S12).
    assert_eq!((report.promise, report.sealable), (Promise::Unknown, Sealable::Unknown));
    assert_eq!(serde_json::from_str::<Says>(r#"{"is":"oracle"}"#).unwrap(), Says::Unknown);
}

#[test]
fn a_report_says_how_old_it_is_and_what_it_does_not_know() {
    let healthy = cluster().leader("a", 4).standby("b", lag(0)).standby("c", lag(0)).sync(1, ["b", "c"]);
    let mut view = healthy.seen_by("b");
    view.now = NOW.plus(secs(2));
    let report = Report::of(&view, view.now, view.now.plus(secs(1)));
    assert_eq!((report.loop_age_ms, report.sealable), (1_000, Sealable::Yes));
    let HolderSeen::Seen(seen) = report.holder else { panic!("the record is there") };
    assert_eq!((seen.member, seen.unchanged_ms, seen.agent), (name("a"), 2_000, Sign::Unknown));

    view.store = Store::Unknown { why: "cut".to_owned(), since: NOW };
    assert!(matches!(Report::of(&view, NOW, NOW).holder, HolderSeen::Unknown { .. }));
    assert_eq!(view.policy.durability, Durability::Sync);
}

#[test]
fn a_door_keeps_the_moment_since_when_it_is_so() {
    let at = |s| NOW.plus(secs(s));
    let refuses = Door::Unknown.after(Tried::Refused, at(1)).after(Tried::Refused, at(2));
    assert_eq!(refuses, Door::Refuses { since: at(1) });
    assert_eq!(refuses.after(Tried::Silent, at(3)), Door::Silent { since: at(3) });
    let again = refuses.after(Tried::Opened, at(3)).after(Tried::Refused, at(4));
    assert_eq!(again.refuses_since(), Some(at(4)), "an opening in between begins it anew");
}
