//! What agent and guardian say to each other: one message per SOCK_SEQPACKET packet, little endian, bounded.
//!
//! A message is `magic u32, kind u32, id u64` and the fields of its kind. Whatever cannot be read is refused, with the
//! reason; nothing in it can make the guardian panic. Strings are `length u32` and bytes.

/// "pgv" and the version of this format.
const MAGIC: u32 = 0x7067_7601;

/// Longest message: a command line with its environment. Longer ones are cut by the socket and refused.
pub const MAX_MESSAGE: usize = 32 * 1024;
/// Longest message of the guardian; it is built on its stack.
pub const MAX_ANSWER: usize = 1024;
/// Longest text in an answer; cut when longer.
const MAX_TEXT: usize = 400;
/// Arguments, environment entries, groups: more than this is a mistake.
const MAX_ITEMS: u32 = 256;

/// One reading of three clocks in nanoseconds: MONOTONIC_RAW, MONOTONIC, BOOTTIME.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clocks {
    pub raw: u64,
    pub monotonic: u64,
    pub boottime: u64,
}

impl Clocks {
    pub fn any_reached(self, deadline: Clocks) -> bool {
        self.raw >= deadline.raw || self.monotonic >= deadline.monotonic || self.boottime >= deadline.boottime
    }

    /// Nanoseconds until the first clock reaches `deadline`.
    pub fn until(self, deadline: Clocks) -> u64 {
        (deadline.raw.saturating_sub(self.raw))
            .min(deadline.monotonic.saturating_sub(self.monotonic))
            .min(deadline.boottime.saturating_sub(self.boottime))
    }

    pub fn plus(self, nanoseconds: u64) -> Clocks {
        Clocks {
            raw: self.raw.saturating_add(nanoseconds),
            monotonic: self.monotonic.saturating_add(nanoseconds),
            boottime: self.boottime.saturating_add(nanoseconds),
        }
    }

    /// No clock of `self` is later than the same clock of `other`.
    pub fn within(self, other: Clocks) -> bool {
        self.raw <= other.raw && self.monotonic <= other.monotonic && self.boottime <= other.boottime
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Become the agent. `replace`: also when another live agent is attached.
    Attach {
        replace: bool,
    },
    /// From now on PostgreSQL dies at `deadline`, which the page may move, never further than `furthest` nanoseconds ahead.
    Arm {
        term: u64,
        deadline: Clocks,
        furthest: u64,
    },
    Disarm,
    Start(Start<'a>),
    Signal(Order),
    /// Kill the group; answered when it is empty, or after so many milliseconds.
    Kill {
        within: u32,
    },
    Status,
    /// End, unless PostgreSQL runs.
    Dismiss,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    FastStop,
    Reload,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Start<'a> {
    pub program: &'a [u8],
    pub arguments: Vec<&'a [u8]>,
    /// `NAME=value`; the whole environment of PostgreSQL.
    pub environment: Vec<&'a [u8]>,
    /// User, group, supplementary groups.
    pub user: Option<(u32, u32, Vec<u32>)>,
    pub log_file: &'a [u8],
}

/// Everything the guardian knows, in every answer: the agent never has to put pieces together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub guardian: i32,
    /// 0: none.
    pub postmaster: i32,
    /// Processes of the group that live without a postmaster.
    pub survivors: u32,
    pub start_number: u64,
    pub armed: Option<u64>,
    pub deadline: Clocks,
    /// The armed deadline has passed; PostgreSQL was killed or was not there.
    pub fired: bool,
    pub exit: Option<Exit>,
    pub real_time: bool,
    pub control_group: bool,
    pub death_covered: bool,
    pub memory_locked: bool,
    /// Deadlines in the page that were not taken: of another term, or too far ahead or not later on all clocks.
    pub ignored_terms: u64,
    pub ignored_deadlines: u64,
}

/// How the last postmaster ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    pub start_number: u64,
    pub how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Code(i32),
    Signal(i32),
    /// Killed because the deadline of this term passed.
    Deadline(u64),
    /// Killed because the agent asked for it.
    Asked,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done(Status),
    /// The page's descriptor comes with this message. `group`: path of PostgreSQL's control group, empty without one.
    Attached {
        nonce: u64,
        group: String,
        status: Status,
    },
    Killed {
        was_down: bool,
        status: Status,
    },
    Refused {
        why: String,
        status: Status,
    },
    /// Not an answer to anything: something changed. Its id is 0.
    Event(Status),
}

impl Answer {
    pub fn status(&self) -> Status {
        match self {
            Answer::Done(status)
            | Answer::Attached { status, .. }
            | Answer::Killed { status, .. }
            | Answer::Refused { status, .. }
            | Answer::Event(status) => *status,
        }
    }
}

// === Requests ===

/// Length of the encoded message, or `None` when it does not fit.
pub fn encode_request(buffer: &mut [u8], id: u64, request: &Request<'_>) -> Option<usize> {
    let mut out = Encoder { buffer, at: 0, full: false };
    let head = |out: &mut Encoder<'_>, kind| out.head(kind, id);
    match request {
        Request::Attach { replace } => {
            head(&mut out, 1);
            out.flag(*replace);
        }
        Request::Arm { term, deadline, furthest } => {
            head(&mut out, 2);
            out.u64(*term);
            out.clocks(*deadline);
            out.u64(*furthest);
        }
        Request::Disarm => head(&mut out, 3),
        Request::Start(start) => {
            head(&mut out, 4);
            out.bytes(start.program);
            out.list(&start.arguments);
            out.list(&start.environment);
            match &start.user {
                None => out.flag(false),
                Some((user, group, groups)) => {
                    out.flag(true);
                    out.u32(*user);
                    out.u32(*group);
                    out.u32(u32::try_from(groups.len()).ok()?);
                    groups.iter().for_each(|g| out.u32(*g));
                }
            }
            out.bytes(start.log_file);
        }
        Request::Signal(order) => {
            head(&mut out, 5);
            out.u32(match order {
                Order::FastStop => 1,
                Order::Reload => 2,
            });
        }
        Request::Kill { within } => {
            head(&mut out, 6);
            out.u32(*within);
        }
        Request::Status => head(&mut out, 7),
        Request::Dismiss => head(&mut out, 8),
    }
    out.end()
}

/// The id can be told even when the rest cannot be read, so that the refusal finds its question.
pub fn decode_request(message: &[u8]) -> (u64, Result<Request<'_>, &'static str>) {
    let mut rest = Decoder { rest: message };
    let Some((kind, id)) = rest.head() else {
        return (0, Err("not a message of this guardian's version"));
    };
    let request = request_body(&mut rest, kind).and_then(|request| {
        if rest.rest.is_empty() { Ok(request) } else { Err("the message is longer than its kind") }
    });
    (id, request)
}

fn request_body<'a>(from: &mut Decoder<'a>, kind: u32) -> Result<Request<'a>, &'static str> {
    const SHORT: &str = "the message is cut or a length in it is wrong";
    let request = match kind {
        1 => Request::Attach { replace: from.flag().ok_or(SHORT)? },
        2 => Request::Arm {
            term: from.u64().ok_or(SHORT)?,
            deadline: from.clocks().ok_or(SHORT)?,
            furthest: from.u64().ok_or(SHORT)?,
        },
        3 => Request::Disarm,
        4 => Request::Start(from.start().ok_or(SHORT)?),
        5 => Request::Signal(match from.u32().ok_or(SHORT)? {
            1 => Order::FastStop,
            2 => Order::Reload,
            _ => return Err("no such order"),
        }),
        6 => Request::Kill { within: from.u32().ok_or(SHORT)? },
        7 => Request::Status,
        8 => Request::Dismiss,
        _ => return Err("no such request"),
    };
    Ok(request)
}

// === Answers ===

pub fn encode_answer(buffer: &mut [u8], id: u64, answer: &Answer) -> Option<usize> {
    let mut out = Encoder { buffer, at: 0, full: false };
    match answer {
        Answer::Done(_) => out.head(101, id),
        Answer::Attached { nonce, group, .. } => {
            out.head(102, id);
            out.u64(*nonce);
            out.bytes(group.as_bytes());
        }
        Answer::Killed { was_down, .. } => {
            out.head(103, id);
            out.flag(*was_down);
        }
        Answer::Refused { why, .. } => {
            out.head(104, id);
            out.text(why);
        }
        Answer::Event(_) => out.head(105, 0),
    }
    out.status(&answer.status());
    out.end()
}

pub fn decode_answer(message: &[u8]) -> Option<(u64, Answer)> {
    let mut from = Decoder { rest: message };
    let (kind, id) = from.head()?;
    let answer = match kind {
        101 => Answer::Done(from.status()?),
        102 => Answer::Attached { nonce: from.u64()?, group: from.string()?, status: from.status()? },
        103 => Answer::Killed { was_down: from.flag()?, status: from.status()? },
        104 => Answer::Refused { why: from.string()?, status: from.status()? },
        105 => Answer::Event(from.status()?),
        _ => return None,
    };
    from.rest.is_empty().then_some((id, answer))
}

// === Fields ===

struct Encoder<'a> {
    buffer: &'a mut [u8],
    at: usize,
    full: bool,
}

impl Encoder<'_> {
    fn raw(&mut self, bytes: &[u8]) {
        match self.buffer.get_mut(self.at..self.at + bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                self.at += bytes.len();
            }
            None => self.full = true,
        }
    }

    fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    fn i32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    fn flag(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        match u32::try_from(bytes.len()) {
            Ok(length) => {
                self.u32(length);
                self.raw(bytes);
            }
            Err(_) => self.full = true,
        }
    }

    /// A text for people, cut at a character when it is too long.
    fn text(&mut self, text: &str) {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&text.as_bytes()[..end]);
    }

    fn list(&mut self, items: &[&[u8]]) {
        match u32::try_from(items.len()) {
            Ok(count) => {
                self.u32(count);
                items.iter().for_each(|item| self.bytes(item));
            }
            Err(_) => self.full = true,
        }
    }

    fn head(&mut self, kind: u32, id: u64) {
        self.u32(MAGIC);
        self.u32(kind);
        self.u64(id);
    }

    fn clocks(&mut self, clocks: Clocks) {
        self.u64(clocks.raw);
        self.u64(clocks.monotonic);
        self.u64(clocks.boottime);
    }

    fn status(&mut self, status: &Status) {
        self.i32(status.guardian);
        self.i32(status.postmaster);
        self.u32(status.survivors);
        self.u64(status.start_number);
        self.flag(status.armed.is_some());
        self.u64(status.armed.unwrap_or(0));
        self.clocks(status.deadline);
        self.flag(status.fired);
        let (kind, value, start_number) = match status.exit {
            None => (0, 0, 0),
            Some(Exit { start_number, how: How::Code(code) }) => (1, u64::from(code as u32), start_number),
            Some(Exit { start_number, how: How::Signal(signal) }) => (2, u64::from(signal as u32), start_number),
            Some(Exit { start_number, how: How::Deadline(term) }) => (3, term, start_number),
            Some(Exit { start_number, how: How::Asked }) => (4, 0, start_number),
        };
        self.u32(kind);
        self.u64(value);
        self.u64(start_number);
        self.flag(status.real_time);
        self.flag(status.control_group);
        self.flag(status.death_covered);
        self.flag(status.memory_locked);
        self.u64(status.ignored_terms);
        self.u64(status.ignored_deadlines);
    }

    fn end(self) -> Option<usize> {
        (!self.full).then_some(self.at)
    }
}

struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    fn raw(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.raw(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.raw(8)?.try_into().ok()?))
    }

    fn i32(&mut self) -> Option<i32> {
        Some(i32::from_le_bytes(self.raw(4)?.try_into().ok()?))
    }

    fn flag(&mut self) -> Option<bool> {
        match self.u32()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.raw(usize::try_from(length).ok()?)
    }

    fn string(&mut self) -> Option<String> {
        Some(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    fn count(&mut self) -> Option<u32> {
        self.u32().filter(|count| *count <= MAX_ITEMS)
    }

    fn list(&mut self) -> Option<Vec<&'a [u8]>> {
        (0..self.count()?).map(|_| self.bytes()).collect()
    }

    fn head(&mut self) -> Option<(u32, u64)> {
        if self.u32()? != MAGIC {
            return None;
        }
        Some((self.u32()?, self.u64()?))
    }

    fn clocks(&mut self) -> Option<Clocks> {
        Some(Clocks { raw: self.u64()?, monotonic: self.u64()?, boottime: self.u64()? })
    }

    fn start(&mut self) -> Option<Start<'a>> {
        let program = self.bytes()?;
        let arguments = self.list()?;
        let environment = self.list()?;
        let user = match self.flag()? {
            false => None,
            true => {
                let (user, group) = (self.u32()?, self.u32()?);
                let groups = (0..self.count()?).map(|_| self.u32()).collect::<Option<Vec<_>>>()?;
                Some((user, group, groups))
            }
        };
        Some(Start { program, arguments, environment, user, log_file: self.bytes()? })
    }

    fn status(&mut self) -> Option<Status> {
        let mut status = Status {
            guardian: self.i32()?,
            postmaster: self.i32()?,
            survivors: self.u32()?,
            start_number: self.u64()?,
            ..Status::default()
        };
        let (armed, term) = (self.flag()?, self.u64()?);
        status.armed = armed.then_some(term);
        status.deadline = self.clocks()?;
        status.fired = self.flag()?;
        let (kind, value, start_number) = (self.u32()?, self.u64()?, self.u64()?);
        let how = match kind {
            0 => None,
            1 => Some(How::Code(value as i32)),
            2 => Some(How::Signal(value as i32)),
            3 => Some(How::Deadline(value)),
            4 => Some(How::Asked),
            _ => return None,
        };
        status.exit = how.map(|how| Exit { start_number, how });
        status.real_time = self.flag()?;
        status.control_group = self.flag()?;
        status.death_covered = self.flag()?;
        status.memory_locked = self.flag()?;
        status.ignored_terms = self.u64()?;
        status.ignored_deadlines = self.u64()?;
        Some(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(request: &Request<'_>) {
        let mut buffer = [0; MAX_MESSAGE];
        let length = encode_request(&mut buffer, 7, request).unwrap();
        let (id, read) = decode_request(&buffer[..length]);
        assert_eq!((id, read.as_ref()), (7, Ok(request)));
        // Every cut message is refused, none panics.
        for cut in 0..length {
            assert!(decode_request(&buffer[..cut]).1.is_err(), "cut at {cut}");
        }
        assert!(decode_request(&buffer[..length + 1]).1.is_err(), "one byte too long");
    }

    #[test]
    fn requests_are_read_as_they_were_written_and_cut_ones_are_refused() {
        let clocks = Clocks { raw: 1, monotonic: 2, boottime: 3 };
        round_trip(&Request::Attach { replace: true });
        round_trip(&Request::Arm { term: 4, deadline: clocks, furthest: 8 });
        round_trip(&Request::Disarm);
        round_trip(&Request::Start(Start {
            program: b"/bin/postgres",
            arguments: vec![b"-D", b"/data"],
            environment: vec![b"LANG=C"],
            user: Some((1, 2, vec![3, 4])),
            log_file: b"/log",
        }));
        round_trip(&Request::Signal(Order::Reload));
        round_trip(&Request::Kill { within: 9 });
        round_trip(&Request::Status);
        round_trip(&Request::Dismiss);
    }

    #[test]
    fn answers_are_read_as_they_were_written() {
        let status = Status {
            guardian: 5,
            postmaster: 6,
            start_number: 2,
            armed: Some(4),
            exit: Some(Exit { start_number: 1, how: How::Deadline(3) }),
            real_time: true,
            ignored_deadlines: 8,
            ..Status::default()
        };
        for answer in [
            Answer::Done(status),
            Answer::Attached { nonce: 1, group: "/sys/x".into(), status },
            Answer::Killed { was_down: true, status },
            Answer::Refused { why: "no".into(), status },
        ] {
            let mut buffer = [0; MAX_ANSWER];
            let length = encode_answer(&mut buffer, 3, &answer).unwrap();
            assert_eq!(decode_answer(&buffer[..length]), Some((3, answer)));
        }
    }

    #[test]
    fn a_long_refusal_still_fits_an_answer() {
        let answer = Answer::Refused { why: "ä".repeat(5000), status: Status::default() };
        assert!(encode_answer(&mut [0; MAX_ANSWER], 1, &answer).is_some());
    }
}
