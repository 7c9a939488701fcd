//! What a session is doing, from the headers that pass: transaction status, answers outstanding; and which answer may not
//! pass yet, because the commit that it acknowledges may be on this disk alone (protocol §4).
//!
//! Acknowledged is ReadyForQuery, or CommandComplete of a transaction command. CommandComplete is kept back until what
//! follows it is there, so that it passes together with ReadyForQuery. An acknowledgement is *doubtful* when
//! - a notice of routine SyncRepWaitForLSN came: a wait for standbys was cut short (text and SQLSTATE prove nothing);
//! - a cancel was passed during the message and the answer is success: that notice can be switched off;
//! - it answers CALL or DO outside a transaction: those commit inside, where timeouts cut waits short.
//!
//! A doubtful one is held until a barrier, a commit begun afterwards, has returned.

use super::super::wire::frame::{Interest, Walker, Watcher};
use super::super::wire::message;

/// Notices longer than this cannot be read to their last field, where the routine stands: they count as doubtful.
const LONGEST_NOTICE: usize = 8192;
/// `COMMIT`, `PREPARE TRANSACTION`, `CALL`: more of a command's tag is not needed.
const TAG: usize = 32;
const CANCELLED_WAIT: &[u8] = b"SyncRepWaitForLSN";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TxStatus {
    #[default]
    Idle,
    Transaction,
    Failed,
}

#[derive(Debug, Default)]
pub struct Tracker {
    pub status: TxStatus,
    /// Messages that are answered by ReadyForQuery (Query, Sync, FunctionCall), and those answers. A Sync inside COPY is
    /// swallowed by PostgreSQL, so `sent` may stay ahead: then more counts as in flight than is, never less.
    sent: u64,
    answered: u64,
    /// Extended messages since the last Sync.
    batch: bool,
    copy_in: bool,
    /// Terminate has passed.
    pub terminated: bool,
    /// Answers up to this number may have been cut short by a cancel.
    suspect_through: u64,

    // --- the answer under way ---
    failed: bool,
    doubt: bool,
    kept: Option<Kept>,
    /// Nothing from here on passes before a barrier.
    hold: Option<u64>,

    /// Acknowledgements have to be on standbys too.
    edge: bool,
    setting: Needle,
}

/// A CommandComplete whose successor is not there yet.
#[derive(Clone, Copy, Debug)]
struct Kept {
    start: u64,
    /// It acknowledges by itself: a transaction command, CALL or DO.
    acknowledges: bool,
}

impl Tracker {
    pub fn new(edge: bool) -> Tracker {
        Tracker { edge, ..Tracker::default() }
    }

    /// Something was passed on and not answered yet.
    pub fn in_flight(&self) -> bool {
        self.sent > self.answered || self.batch
    }

    /// The session has named synchronous_commit in its SQL.
    pub fn named_synchronous_commit(&self) -> bool {
        self.setting.found
    }

    /// A cancel is being passed, or was since the last look: whatever has been sent until now may be cut short by it.
    pub fn cancel_passed(&mut self) {
        self.suspect_through = self.suspect_through.max(self.sent + u64::from(self.batch));
    }

    /// Where the first answer begins that needs a barrier.
    pub fn held(&self) -> Option<u64> {
        self.hold
    }

    /// The barrier has returned.
    pub fn barrier_returned(&mut self) {
        self.hold = None;
    }

    /// So many notifications came that the CommandComplete before them cannot be kept any longer. It acknowledges nothing:
    /// ReadyForQuery does, and that still waits its turn.
    pub fn let_kept_pass(&mut self) {
        if !self.kept.is_some_and(|kept| self.doubtful(kept, b'Z')) {
            self.kept = None;
        }
    }

    /// How much of the server's stream may pass.
    pub fn released(&self, walker: &Walker) -> u64 {
        if let Some(hold) = self.hold {
            return hold;
        }
        if let Some(kept) = self.kept {
            return kept.start;
        }
        if self.edge {
            // Undecided until it can be read.
            if let Some(start) = walker.partial_header() {
                return start;
            }
            if let Some((b'C' | b'Z', start)) = walker.partial_body() {
                return start;
            }
        }
        walker.seen()
    }

    /// The server closed: may what was kept back pass as it is?
    pub fn ends_in_doubt(&self) -> bool {
        self.hold.is_some() || self.kept.is_some_and(|kept| self.doubtful(kept, b'E'))
    }

    pub fn release_all(&mut self) {
        self.kept = None;
        self.edge = false;
    }

    fn suspect(&self) -> bool {
        self.answered < self.suspect_through
    }

    /// Is a CommandComplete, followed by `next`, an acknowledgement in doubt?
    fn doubtful(&self, kept: Kept, next: u8) -> bool {
        // A session that ends right after it gets no other answer: clients take it for one.
        let last_word = next == b'E';
        (self.doubt && (kept.acknowledges || last_word)) || (self.suspect() && kept.acknowledges)
    }

    fn hold_from(&mut self, start: u64) {
        self.hold.get_or_insert(start);
        self.doubt = false;
    }

    fn command_complete(&mut self, tag: &[u8], start: u64) {
        let is = |word: &[u8]| tag.starts_with(word);
        let commits_inside = self.status == TxStatus::Idle && (is(b"CALL\0") || is(b"DO\0"));
        self.doubt |= commits_inside;
        let kept = Kept { start, acknowledges: commits_inside || is(b"COMMIT") || is(b"PREPARE TRANSACTION") };
        if self.sent > self.answered {
            self.kept = Some(kept);
        } else if self.doubtful(kept, 0) {
            // No Sync was sent, so nothing has to follow.
            self.hold_from(start);
        }
    }

    fn ready_for_query(&mut self, status: Option<&u8>, start: u64) {
        self.status = match status {
            Some(b'T') => TxStatus::Transaction,
            Some(b'E') => TxStatus::Failed,
            _ => TxStatus::Idle,
        };
        let doubtful = self.doubt || (self.suspect() && !self.failed);
        self.answered += 1;
        self.sent = self.sent.max(self.answered);
        if self.edge && doubtful {
            self.hold_from(self.kept.map_or(start, |kept| kept.start));
        }
        self.kept = None;
        self.doubt = false;
        self.failed = false;
    }
}

/// Watches what the client sends.
pub struct FromClient<'a>(pub &'a mut Tracker);

impl Watcher for FromClient<'_> {
    fn begin(&mut self, tag: u8, _: u32, _: u64) -> Interest {
        let tracker = &mut *self.0;
        match tag {
            b'Q' | b'F' => {
                tracker.sent += 1;
                tracker.batch = false;
            }
            b'S' if !tracker.copy_in => {
                tracker.sent += 1;
                tracker.batch = false;
            }
            b'P' | b'B' | b'E' | b'D' | b'C' => tracker.batch = true,
            b'c' | b'f' => tracker.copy_in = false,
            b'X' => tracker.terminated = true,
            _ => {}
        }
        let text = matches!(tag, b'Q' | b'P');
        tracker.setting.restart();
        if tracker.edge && text && !tracker.setting.found { Interest::Pieces } else { Interest::Nothing }
    }

    fn piece(&mut self, _: u8, bytes: &[u8]) {
        self.0.setting.look(bytes);
    }

    fn end(&mut self, _: u8, _: &[u8], _: u64) {}
}

/// Watches what PostgreSQL answers.
pub struct FromServer<'a>(pub &'a mut Tracker);

impl Watcher for FromServer<'_> {
    fn begin(&mut self, tag: u8, length: u32, _: u64) -> Interest {
        let tracker = &mut *self.0;
        // What may come at any time decides nothing about a CommandComplete before it.
        if let Some(kept) = tracker.kept
            && !matches!(tag, b'Z' | b'N' | b'A' | b'S')
        {
            if tracker.doubtful(kept, tag) {
                tracker.hold_from(kept.start);
            }
            tracker.kept = None;
        }
        match tag {
            b'Z' => Interest::Head(1),
            b'C' if tracker.edge => Interest::Head(TAG),
            b'N' if tracker.edge => {
                tracker.doubt |= length as usize > LONGEST_NOTICE;
                Interest::Head(LONGEST_NOTICE)
            }
            b'E' => {
                tracker.failed = true;
                Interest::Nothing
            }
            b'G' => {
                tracker.copy_in = true;
                Interest::Nothing
            }
            _ => Interest::Nothing,
        }
    }

    fn piece(&mut self, _: u8, _: &[u8]) {}

    fn end(&mut self, tag: u8, head: &[u8], start: u64) {
        match tag {
            b'Z' => self.0.ready_for_query(head.first(), start),
            b'C' if self.0.edge => self.0.command_complete(head, start),
            b'N' => self.0.doubt |= message::field(head, b'R') == Some(CANCELLED_WAIT),
            _ => {}
        }
    }
}

/// Finds the name of a setting in SQL that streams past, in any case, however it was cut.
#[derive(Debug, Default)]
struct Needle {
    matched: usize,
    found: bool,
}

impl Needle {
    const NAME: &'static [u8] = b"synchronous_commit";
    const SYNCHRONOUS: usize = 11;

    fn restart(&mut self) {
        self.matched = 0;
    }

    fn look(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.matched == Self::SYNCHRONOUS && !byte.eq_ignore_ascii_case(&Self::NAME[self.matched]) {
                // The only other place where the name can begin again: the last letter of `synchronous`.
                self.matched = 1;
            }
            if byte.eq_ignore_ascii_case(&Self::NAME[self.matched]) {
                self.matched += 1;
                if self.matched == Self::NAME.len() {
                    self.found = true;
                    self.matched = 0;
                }
            } else {
                self.matched = usize::from(byte.eq_ignore_ascii_case(&Self::NAME[0]));
            }
        }
    }
}

#[cfg(test)]
mod tests;
