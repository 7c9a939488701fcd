//! Walks the headers of a byte stream without keeping it: a message of 1 GB costs five bytes of memory.
//!
//! Positions are counted from the stream's first byte, so that "may be passed on up to here" means the same in every
//! chunk, however the bytes were cut.

/// Tag and length.
pub const HEADER: usize = 5;

/// PostgreSQL itself allocates no more than this for one message.
const LONGEST: u32 = 0x4000_0000;

/// What of a body is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    Nothing,
    /// Its first bytes, in one piece, when the message ends.
    Head(usize),
    /// All of it, in whatever pieces it comes.
    Pieces,
}

pub trait Watcher {
    /// A header is complete; the message began at `start`.
    fn begin(&mut self, tag: u8, length: u32, start: u64) -> Interest;
    fn piece(&mut self, tag: u8, bytes: &[u8]);
    /// The message is complete; `head` has what was wanted of it, at most.
    fn end(&mut self, tag: u8, head: &[u8], start: u64);
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message `{}` of {length} bytes: not the protocol of postgresql", char::from(*tag).escape_default())]
pub struct BadFrame {
    pub tag: u8,
    pub length: u32,
}

#[derive(Debug)]
pub struct Walker {
    header: [u8; HEADER],
    have: u8,
    interest: Interest,
    /// Body bytes that are still to come.
    remaining: u32,
    inside: bool,
    /// Where the present (or next) message began.
    start: u64,
    seen: u64,
    /// Filled only when a body that is wanted comes in pieces.
    head: Vec<u8>,
}

impl Default for Walker {
    fn default() -> Walker {
        Walker {
            header: [0; HEADER],
            have: 0,
            interest: Interest::Nothing,
            remaining: 0,
            inside: false,
            start: 0,
            seen: 0,
            head: Vec::new(),
        }
    }
}

impl Walker {
    /// Bytes walked so far.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Where the message began whose header is not complete yet.
    pub fn partial_header(&self) -> Option<u64> {
        (self.have > 0 && !self.inside).then_some(self.start)
    }

    /// Tag and start of the message whose body is not complete yet.
    pub fn partial_body(&self) -> Option<(u8, u64)> {
        self.inside.then_some((self.header[0], self.start))
    }

    /// Nothing of a message has been seen without its end.
    pub fn at_boundary(&self) -> bool {
        !self.inside && self.have == 0
    }

    pub fn walk(&mut self, chunk: &[u8], watcher: &mut impl Watcher) -> Result<(), BadFrame> {
        let base = self.seen;
        let mut at = 0;
        while at < chunk.len() {
            if !self.inside {
                if self.have == 0 {
                    self.start = base + at as u64;
                }
                let rest = &chunk[at..];
                let take = (HEADER - usize::from(self.have)).min(rest.len());
                self.header[usize::from(self.have)..][..take].copy_from_slice(&rest[..take]);
                self.have += take as u8;
                at += take;
                if usize::from(self.have) < HEADER {
                    break;
                }
                let [tag, a, b, c, d] = self.header;
                let length = u32::from_be_bytes([a, b, c, d]);
                if !(4..=LONGEST).contains(&length) {
                    return Err(BadFrame { tag, length });
                }
                self.remaining = length - 4;
                self.interest = watcher.begin(tag, self.remaining, self.start);
                self.inside = true;
            }
            let take = (self.remaining as usize).min(chunk.len() - at);
            let body = &chunk[at..at + take];
            at += take;
            self.remaining -= take as u32;
            self.take_body(body, watcher);
        }
        self.seen = base + chunk.len() as u64;
        Ok(())
    }

    fn take_body(&mut self, body: &[u8], watcher: &mut impl Watcher) {
        let tag = self.header[0];
        let done = self.remaining == 0;
        match self.interest {
            Interest::Nothing => {}
            Interest::Pieces if body.is_empty() => {}
            Interest::Pieces => watcher.piece(tag, body),
            Interest::Head(most) => {
                if done && self.head.is_empty() {
                    // The usual case: the whole body lies in this chunk, nothing is copied.
                    self.close();
                    watcher.end(tag, &body[..most.min(body.len())], self.start);
                    return;
                }
                let room = most.saturating_sub(self.head.len()).min(body.len());
                self.head.extend_from_slice(&body[..room]);
            }
        }
        if done {
            self.close();
            let head = std::mem::take(&mut self.head);
            watcher.end(tag, &head, self.start);
        }
    }

    fn close(&mut self) {
        self.inside = false;
        self.have = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Record {
        begun: Vec<(u8, u32, u64)>,
        ended: Vec<(u8, Vec<u8>, u64)>,
        text: Vec<u8>,
    }

    impl Watcher for Record {
        fn begin(&mut self, tag: u8, length: u32, start: u64) -> Interest {
            self.begun.push((tag, length, start));
            match tag {
                b'h' => Interest::Head(4),
                b'p' => Interest::Pieces,
                _ => Interest::Nothing,
            }
        }

        fn piece(&mut self, _: u8, bytes: &[u8]) {
            self.text.extend_from_slice(bytes);
        }

        fn end(&mut self, tag: u8, head: &[u8], start: u64) {
            self.ended.push((tag, head.to_vec(), start));
        }
    }

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn record(chunks: &[&[u8]]) -> Record {
        let mut walker = Walker::default();
        let mut record = Record::default();
        for chunk in chunks {
            walker.walk(chunk, &mut record).unwrap();
        }
        record
    }

    #[test]
    fn every_split_of_every_message_is_seen_the_same() {
        let stream =
            [message(b'h', b"abcdefg"), message(b'x', b""), message(b'p', b"select"), message(b'h', b"")].concat();
        let whole = record(&[&stream]);
        assert_eq!(whole.ended[0], (b'h', b"abcd".to_vec(), 0));
        assert_eq!(whole.text, b"select");
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                assert_eq!(record(&[&stream[..first], &stream[first..second], &stream[second..]]), whole);
            }
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(record(&bytes), whole, "byte by byte");
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        for length in [0_u32, 3, 0x4000_0001, u32::MAX] {
            let mut bytes = vec![b'Q'];
            bytes.extend(length.to_be_bytes());
            let refused = Walker::default().walk(&bytes, &mut Record::default());
            assert_eq!(refused, Err(BadFrame { tag: b'Q', length }));
        }
    }

    #[test]
    fn a_message_under_way_is_told() {
        let mut walker = Walker::default();
        let mut record = Record::default();
        walker.walk(b"h\0\0", &mut record).unwrap();
        assert_eq!((walker.partial_header(), walker.partial_body()), (Some(0), None));
        walker.walk(b"\0\x06a", &mut record).unwrap();
        assert_eq!((walker.partial_header(), walker.partial_body()), (None, Some((b'h', 0))));
        walker.walk(b"b", &mut record).unwrap();
        assert!(walker.at_boundary());
    }

    proptest! {
        #[test]
        fn chunks_of_any_size_are_seen_the_same(
            bodies in prop::collection::vec((prop::sample::select(vec![b'h', b'p', b'x']), prop::collection::vec(any::<u8>(), 0..40)), 0..12),
            sizes in prop::collection::vec(1_usize..9, 1..40),
        ) {
            let stream: Vec<u8> = bodies.iter().flat_map(|(tag, body)| message(*tag, body)).collect();
            let mut chunks = Vec::new();
            let mut rest = &stream[..];
            for size in sizes.iter().cycle() {
                if rest.is_empty() { break; }
                let (chunk, after) = rest.split_at((*size).min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            prop_assert_eq!(record(&chunks), record(&[&stream]));
        }
    }
}
