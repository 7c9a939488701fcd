//! The deadline page: one page of shared memory per attachment. The agent writes F without a system call, the guardian
//! writes when it was last alive, and whoever was handed the descriptor (the endpoint's gate) may read both.
//!
//! Three records, each under a sequence counter that is odd while it is being written. A writer that dies or is stopped in
//! the middle leaves the counter odd: the reader keeps what it read before, so a half-written F is never taken.
//!
//! ```text
//! cell 0   magic        16 agent's counter          32 guardian's counter                        48 agent's counter
//!      1   nonce        17 term                     33..36 alive at (raw, monotonic, boottime)   49 term
//!                       18..21 F                                                                50..53 the gate holds from
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::sys::SharedCells;
use super::wire::Clocks;

const MAGIC: u64 = u64::from_le_bytes(*b"pgvpage1");
const DEADLINE: usize = 16;
const ALIVE: usize = 32;
const GATE: usize = 48;

/// A write takes nanoseconds; a counter that stays odd this often belongs to a writer that was stopped in the middle.
const TRIES: usize = 100;

pub struct Page {
    cells: SharedCells,
}

/// Since ever: the gate of this term is shut and stays so.
const SHUT: Clocks = Clocks { raw: 0, monotonic: 0, boottime: 0 };

/// What the agent says to the endpoint's gate; the guardian does not look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateWord {
    /// From then on nothing passes until a later word moves it (protocol §3).
    HoldFrom { term: u64, at: Clocks },
    /// The holder of this term is finished: nothing passes any more.
    Shut { term: u64 },
}

/// What the agent wrote: F of a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    pub term: u64,
    pub at: Clocks,
}

impl Page {
    /// A new page and its descriptor. Sealed: whoever holds the descriptor cannot pull the memory away under a reader.
    pub fn create(nonce: u64) -> io::Result<(Page, OwnedFd)> {
        let file = memfd_create(c"pgvigil-deadline", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&file, 4096)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals() | SealFlag::F_SEAL_SEAL))?;
        let page = Page { cells: SharedCells::map(&file)? };
        page.cells.cell(1).store(nonce, Ordering::Relaxed);
        page.cells.cell(0).store(MAGIC, Ordering::Release);
        Ok((page, file))
    }

    /// The page behind a descriptor that came from the guardian.
    pub fn open(file: &OwnedFd, nonce: u64) -> io::Result<Page> {
        let have = SealFlag::from_bits_retain(fcntl(file, FcntlArg::F_GET_SEALS)?);
        if !have.contains(seals()) {
            return Err(io::Error::other("the deadline page is not sealed"));
        }
        let page = Page { cells: SharedCells::map(file)? };
        if page.cells.cell(0).load(Ordering::Acquire) != MAGIC || page.nonce() != nonce {
            return Err(io::Error::other("not the deadline page of this attachment"));
        }
        Ok(page)
    }

    pub fn nonce(&self) -> u64 {
        self.cells.cell(1).load(Ordering::Relaxed)
    }

    /// One writer at a time; the caller sees to that.
    pub fn write_deadline(&self, deadline: Deadline) {
        let Deadline { term, at } = deadline;
        self.write(DEADLINE, [term, at.raw, at.monotonic, at.boottime]);
    }

    /// `None`: never written, or being written right now by somebody who does not go on.
    pub fn deadline(&self) -> Option<Deadline> {
        let [term, raw, monotonic, boottime] = self.read(DEADLINE)?;
        Some(Deadline { term, at: Clocks { raw, monotonic, boottime } })
    }

    /// One writer at a time, as for the deadline.
    pub fn write_gate(&self, word: GateWord) {
        let (term, at) = match word {
            GateWord::HoldFrom { term, at } => (term, at),
            GateWord::Shut { term } => (term, SHUT),
        };
        self.write(GATE, [term, at.raw, at.monotonic, at.boottime]);
    }

    /// `None`: never written, or being written by somebody who does not go on.
    pub fn gate(&self) -> Option<GateWord> {
        let [term, raw, monotonic, boottime] = self.read(GATE)?;
        let at = Clocks { raw, monotonic, boottime };
        Some(if at == SHUT { GateWord::Shut { term } } else { GateWord::HoldFrom { term, at } })
    }

    /// No deadline was ever written into it.
    pub fn is_new(&self) -> bool {
        self.cells.cell(DEADLINE).load(Ordering::Acquire) == 0
    }

    pub fn write_alive(&self, now: Clocks) {
        self.write(ALIVE, [now.raw, now.monotonic, now.boottime, 0]);
    }

    pub fn alive(&self) -> Option<Clocks> {
        let [raw, monotonic, boottime, _] = self.read(ALIVE)?;
        Some(Clocks { raw, monotonic, boottime })
    }

    fn write(&self, record: usize, values: [u64; 4]) {
        let counter = self.cells.cell(record);
        // A writer before us that died in the middle left it odd: make the next number odd in any case.
        let odd = counter.load(Ordering::Relaxed) | 1;
        counter.store(odd, Ordering::Relaxed);
        fence(Ordering::Release);
        for (cell, value) in self.record(record).zip(values) {
            cell.store(value, Ordering::Relaxed);
        }
        counter.store(odd.wrapping_add(1), Ordering::Release);
    }

    fn read(&self, record: usize) -> Option<[u64; 4]> {
        let counter = self.cells.cell(record);
        for _ in 0..TRIES {
            let before = counter.load(Ordering::Acquire);
            let mut values = [0; 4];
            for (value, cell) in values.iter_mut().zip(self.record(record)) {
                *value = cell.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            let after = counter.load(Ordering::Relaxed);
            if before == after && before.is_multiple_of(2) {
                return (before != 0).then_some(values);
            }
            std::hint::spin_loop();
        }
        None
    }

    fn record(&self, record: usize) -> impl Iterator<Item = &AtomicU64> {
        (record + 1..record + 5).map(|index| self.cells.cell(index))
    }
}

fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline(value: u64) -> Deadline {
        Deadline { term: value, at: Clocks { raw: value, monotonic: value, boottime: value } }
    }

    #[test]
    fn both_sides_of_the_descriptor_see_the_same_record() {
        let (guardian, file) = Page::create(9).unwrap();
        let agent = Page::open(&file, 9).unwrap();
        assert_eq!(guardian.deadline(), None);
        agent.write_deadline(deadline(5));
        assert_eq!(guardian.deadline(), Some(deadline(5)));
        assert!(Page::open(&file, 8).is_err(), "another attachment's nonce");
    }

    #[test]
    fn a_write_that_was_stopped_in_the_middle_is_not_read_and_the_next_one_is() {
        let (page, _file) = Page::create(1).unwrap();
        page.write_deadline(deadline(5));
        page.cells.cell(DEADLINE).fetch_add(1, Ordering::Relaxed);
        assert_eq!(page.deadline(), None);
        page.write_deadline(deadline(6));
        assert_eq!(page.deadline(), Some(deadline(6)));
    }

    #[test]
    fn readers_never_see_parts_of_two_writes() {
        let (page, file) = Page::create(1).unwrap();
        let writer = std::thread::spawn(move || {
            let agent = Page::open(&file, 1).unwrap();
            (1..200_000).for_each(|value| agent.write_deadline(deadline(value)));
        });
        let mut seen = 0;
        while !writer.is_finished() {
            if let Some(read) = page.deadline() {
                assert_eq!(read, deadline(read.term));
                assert!(read.term >= seen);
                seen = read.term;
            }
        }
        writer.join().unwrap();
    }
}
