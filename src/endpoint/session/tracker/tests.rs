//! Stories of an answer: what PostgreSQL sends, and how much of it may pass.

use bytes::BufMut;
use proptest::prelude::*;

use super::*;
use crate::endpoint::wire::message::message;

/// A session in sync mode, driven message by message.
struct Story {
    tracker: Tracker,
    up: Walker,
    down: Walker,
    server: Vec<u8>,
}

fn story() -> Story {
    Story { tracker: Tracker::new(true), up: Walker::default(), down: Walker::default(), server: Vec::new() }
}

fn complete(tag: &str) -> Vec<u8> {
    message(b'C', |body| {
        body.put_slice(tag.as_bytes());
        body.put_u8(0);
    })
    .to_vec()
}

fn ready(status: u8) -> Vec<u8> {
    message(b'Z', |body| body.put_u8(status)).to_vec()
}

fn notice(routine: &str) -> Vec<u8> {
    let fields = format!("SWARNING\0C01000\0Mübersetzt\0R{routine}\0\0");
    message(b'N', |body| body.put_slice(fields.as_bytes())).to_vec()
}

fn plain(tag: u8) -> Vec<u8> {
    message(tag, |_| {}).to_vec()
}

const WAIT_CUT: &str = "SyncRepWaitForLSN";

impl Story {
    fn client(mut self, tags: &[u8]) -> Story {
        for tag in tags {
            self.up.walk(&plain(*tag), &mut FromClient(&mut self.tracker)).unwrap();
        }
        self
    }

    fn server(mut self, bytes: Vec<u8>) -> Story {
        self.down.walk(&bytes, &mut FromServer(&mut self.tracker)).unwrap();
        self.server.extend(bytes);
        self
    }

    fn cancelled(mut self) -> Story {
        self.tracker.cancel_passed();
        self
    }

    /// Tags of the messages that may pass.
    fn passed(&self) -> String {
        let mut tags = String::new();
        let mut at = 0;
        let until = self.tracker.released(&self.down) as usize;
        while at < until {
            tags.push(char::from(self.server[at]));
            at += 1 + u32::from_be_bytes(self.server[at + 1..at + 5].try_into().unwrap()) as usize;
        }
        assert_eq!(at, until, "never a part of a message that matters");
        tags
    }

    fn expect(self, passed: &str, held: bool) -> Story {
        assert_eq!((self.passed().as_str(), self.tracker.held().is_some()), (passed, held));
        self
    }

    fn barrier(mut self) -> Story {
        self.tracker.barrier_returned();
        self
    }
}

#[test]
fn completion_and_readiness_pass_together_once_sync_is_sent() {
    story()
        .client(b"PBES")
        .server([plain(b'1'), plain(b'2'), complete("INSERT 0 1")].concat())
        .expect("12", false)
        .server(ready(b'I'))
        .expect("12CZ", false);
}

#[test]
fn without_sync_a_completion_passes_since_it_acknowledges_nothing() {
    story().client(b"PBEH").server(complete("INSERT 0 1")).expect("C", false);
}

#[test]
fn a_completion_that_others_follow_passes() {
    story()
        .client(b"Q")
        .server([complete("INSERT 0 1"), plain(b'T')].concat())
        .expect("CT", false)
        .server([complete("SELECT 1"), ready(b'I')].concat())
        .expect("CTCZ", false);
}

#[test]
fn a_wait_that_was_cut_short_holds_simple_answers() {
    story()
        .client(b"Q")
        .server([notice(WAIT_CUT), complete("INSERT 0 1"), ready(b'I')].concat())
        .expect("N", true)
        .barrier()
        .expect("NCZ", false);
}

#[test]
fn a_wait_that_was_cut_short_holds_extended_answers_where_the_notice_comes_last() {
    story()
        .client(b"PBES")
        .server(complete("INSERT 0 1"))
        .server(notice(WAIT_CUT))
        .expect("", false)
        .server(ready(b'I'))
        .expect("", true)
        .barrier()
        .expect("CNZ", false);
}

#[test]
fn a_notice_of_another_routine_holds_nothing_whatever_it_says() {
    story().client(b"Q").server([notice("exec_stmt_raise"), complete("DO"), ready(b'T')].concat());
    story()
        .client(b"Q")
        .server([notice("exec_stmt_raise"), complete("SELECT 1"), ready(b'I')].concat())
        .expect("NCZ", false);
}

#[test]
fn a_notice_too_long_to_be_read_to_its_end_counts_as_doubtful() {
    let long = message(b'N', |body| body.put_bytes(b'x', LONGEST_NOTICE + 1)).to_vec();
    story().client(b"Q").server([long, complete("INSERT 0 1"), ready(b'I')].concat()).expect("N", true);
}

#[test]
fn a_cancel_during_a_message_that_succeeds_holds_its_answer() {
    // Schedule 7: client_min_messages = error, so no notice tells of it.
    story()
        .client(b"Q")
        .cancelled()
        .server([complete("INSERT 0 1"), ready(b'I')].concat())
        .expect("", true)
        .barrier()
        .client(b"Q")
        .server([complete("INSERT 0 1"), ready(b'I')].concat())
        .expect("CZCZ", false);
}

#[test]
fn a_cancel_in_the_middle_of_a_batch_counts_for_its_sync_too() {
    story()
        .client(b"PBE")
        .cancelled()
        .server(complete("INSERT 0 1"))
        .expect("C", false)
        .client(b"S")
        .server(ready(b'I'))
        .expect("C", true);
}

#[test]
fn a_cancelled_message_that_fails_holds_nothing() {
    story().client(b"Q").cancelled().server([plain(b'E'), ready(b'I')].concat()).expect("EZ", false);
}

#[test]
fn a_commit_without_sync_is_held_by_itself() {
    story()
        .client(b"PBEH")
        .server([notice(WAIT_CUT), complete("COMMIT")].concat())
        .expect("N", true)
        .barrier()
        .expect("NC", false);
    story().client(b"PBEH").cancelled().server(complete("PREPARE TRANSACTION")).expect("", true);
}

#[test]
fn a_commit_among_other_statements_is_held_where_it_stands() {
    story()
        .client(b"Q")
        .server([notice(WAIT_CUT), complete("COMMIT"), plain(b'T'), complete("SELECT 1"), ready(b'I')].concat())
        .expect("N", true);
}

#[test]
fn call_and_do_outside_a_transaction_wait_for_a_barrier() {
    for tag in ["CALL", "DO"] {
        story()
            .client(b"Q")
            .server([complete(tag), ready(b'I')].concat())
            .expect("", true)
            .barrier()
            .expect("CZ", false);
        story()
            .client(b"Q")
            .server([complete("BEGIN"), ready(b'T')].concat())
            .client(b"Q")
            .server([complete(tag), ready(b'T')].concat())
            .expect("CZCZ", false);
    }
    story().client(b"Q").server([complete("DOMAIN"), ready(b'I')].concat()).expect("CZ", false);
}

#[test]
fn the_last_word_of_a_terminated_session_is_held() {
    story()
        .client(b"PBES")
        .server([complete("INSERT 0 1"), notice(WAIT_CUT)].concat())
        .server(plain(b'E'))
        .expect("", true);
    let cut = story().client(b"PBES").server([complete("INSERT 0 1"), notice(WAIT_CUT)].concat());
    assert!(cut.tracker.ends_in_doubt());
    let fine = story().client(b"PBES").server(complete("INSERT 0 1"));
    assert!(!fine.tracker.ends_in_doubt());
}

#[test]
fn without_sync_durability_everything_passes_at_once() {
    let mut asynchronous = story();
    asynchronous.tracker = Tracker::new(false);
    asynchronous.client(b"Q").cancelled().server([notice(WAIT_CUT), complete("CALL")].concat()).expect("NC", false);
}

#[test]
fn notifications_do_not_pile_up_behind_a_completion() {
    let mut many =
        story().client(b"Q").server([complete("COMMIT"), plain(b'A'), plain(b'A')].concat()).expect("", false);
    many.tracker.let_kept_pass();
    let many = many.expect("CAA", false);
    many.server(ready(b'I')).expect("CAAZ", false);
}

#[test]
fn pipelined_answers_are_counted_and_copy_in_does_not_confuse_for_good() {
    let pipelined = story().client(b"PBESPBES").server([complete("INSERT 0 1"), ready(b'I')].concat());
    assert!(pipelined.tracker.in_flight());
    let pipelined = pipelined.server([complete("INSERT 0 1"), ready(b'I')].concat());
    assert!(!pipelined.tracker.in_flight());

    let copy = story().client(b"Q").server(plain(b'G')).client(b"dHSdc");
    let copy = copy.server([complete("COPY 2"), ready(b'I')].concat()).expect("GCZ", false);
    assert!(!copy.tracker.in_flight(), "Sync and Flush inside COPY are swallowed");
}

#[test]
fn transaction_status_is_the_last_one_told() {
    let status = |bytes: Vec<u8>| story().client(b"Q").server(bytes).tracker.status;
    assert_eq!(status(ready(b'T')), TxStatus::Transaction);
    assert_eq!(status(ready(b'E')), TxStatus::Failed);
    assert_eq!(status(ready(b'I')), TxStatus::Idle);
}

#[test]
fn the_settings_name_is_found_however_it_is_cut_and_spelled() {
    let named = |parts: &[&str]| {
        let mut needle = Needle::default();
        parts.iter().for_each(|part| needle.look(part.as_bytes()));
        needle.found
    };
    assert!(named(&["SET SYNCHRONOUS_Commit = off"]));
    assert!(named(&["set synchron", "ous_com", "mit to local"]));
    assert!(named(&["ssynchronous_commit"]));
    assert!(named(&["synchronousynchronous_commit"]));
    assert!(!named(&["synchronous commit"]));
}

proptest! {
    /// However the server's bytes are cut: an answer in doubt never passes before the barrier, and the same passes in the end.
    #[test]
    fn cuts_change_nothing(cuts in prop::collection::vec(1_usize..12, 1..40)) {
        let bytes = [notice(WAIT_CUT), complete("INSERT 0 1"), ready(b'I')].concat();
        let first = notice(WAIT_CUT).len() as u64;
        let mut story = story().client(b"Q");
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() { break; }
            let (chunk, after) = rest.split_at((*cut).min(rest.len()));
            story.down.walk(chunk, &mut FromServer(&mut story.tracker)).unwrap();
            prop_assert!(story.tracker.released(&story.down) <= first);
            rest = after;
        }
        prop_assert!(story.tracker.held().is_some());
        story.tracker.barrier_returned();
        prop_assert_eq!(story.tracker.released(&story.down), bytes.len() as u64);
    }
}
