//! One page of shared memory: the probe writes how far it came, the agent reads it at any time.
//!
//! ```text
//! cell 0      counter, odd while the record is being written
//!      1..3   when the write under way (or the last one) began: raw, monotonic, boottime
//!      4..6   when the last one ended          7  how long it took, µs      8  its errno
//!      9..11  since when every write failed; zero: it does not
//!      12     1: a write is under way          13 1: same file system as the data
//!      14 15  free and total bytes
//!      32 33  size of the data and of what was set aside, each for itself
//! ```
//! Zero is "not known" for sizes: a file system without a single block is none.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::core::Moment;
use crate::guardian::SharedCells;

const CELLS: usize = 16;
const DATA_BYTES: usize = 32;
const ASIDE_BYTES: usize = 33;
/// A write of the record takes nanoseconds; a counter that stays odd belongs to a writer that was stopped in it.
const TRIES: usize = 100;

pub struct Page {
    cells: SharedCells,
    file: OwnedFd,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub began: Moment,
    pub ended: Moment,
    pub latency_us: u64,
    pub error: i32,
    pub failing_since: Option<Moment>,
    pub writing: bool,
    pub same_as_data: bool,
    /// Free and total bytes.
    pub space: Option<(u64, u64)>,
}

impl Page {
    pub fn create() -> io::Result<(Page, OwnedFd)> {
        let file = memfd_create(c"pgvigil-probe", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&file, 4096)?;
        // Nobody can pull the memory away under the other.
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        let copy = file.try_clone()?;
        Ok((Page { cells: SharedCells::map(&file)?, file }, copy))
    }

    /// The page behind a descriptor that the agent gave.
    pub fn open(file: impl AsFd) -> io::Result<Page> {
        let file = file.as_fd().try_clone_to_owned()?;
        let seals = SealFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::other("standard input is no page of the agent's"));
        }
        Ok(Page { cells: SharedCells::map(&file)?, file })
    }

    pub fn file(&self) -> io::Result<OwnedFd> {
        self.file.try_clone()
    }

    /// Before another process gets it: what the last one left, half-written perhaps, is nothing.
    pub fn forget(&self) {
        (0..CELLS).for_each(|index| self.cell(index).store(0, Ordering::Relaxed));
    }

    pub fn write(&self, progress: &Progress) {
        let counter = self.cell(0).load(Ordering::Relaxed);
        self.cell(0).store(counter.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        let failing = progress.failing_since.unwrap_or_default();
        let (free, total) = progress.space.unwrap_or_default();
        let values = [
            progress.began.raw,
            progress.began.monotonic,
            progress.began.boottime,
            progress.ended.raw,
            progress.ended.monotonic,
            progress.ended.boottime,
            progress.latency_us,
            u64::from(progress.error.unsigned_abs()),
            failing.raw,
            failing.monotonic,
            failing.boottime,
            u64::from(progress.writing),
            u64::from(progress.same_as_data),
            free,
            total,
        ];
        for (index, value) in values.into_iter().enumerate() {
            self.cell(index + 1).store(value, Ordering::Relaxed);
        }
        self.cell(0).store(counter.wrapping_add(2), Ordering::Release);
    }

    /// `None`: nothing was written yet, or the writer was stopped in the middle.
    pub fn read(&self) -> Option<Progress> {
        for _ in 0..TRIES {
            let before = self.cell(0).load(Ordering::Acquire);
            let values: [u64; CELLS - 1] = std::array::from_fn(|index| self.cell(index + 1).load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if before % 2 == 1 || self.cell(0).load(Ordering::Relaxed) != before {
                std::hint::spin_loop();
                continue;
            }
            let moment = |at: usize| Moment { raw: values[at], monotonic: values[at + 1], boottime: values[at + 2] };
            let failing_since = Some(moment(8)).filter(|moment| *moment != Moment::default());
            return (before > 0).then(|| Progress {
                began: moment(0),
                ended: moment(3),
                latency_us: values[6],
                error: i32::try_from(values[7]).unwrap_or(libc::EIO),
                failing_since,
                writing: values[11] == 1,
                same_as_data: values[12] == 1,
                space: Some((values[13], values[14])).filter(|(_, total)| *total > 0),
            });
        }
        None
    }

    pub fn write_sizes(&self, data: u64, aside: u64) {
        // One more than counted: zero is "not known".
        self.cell(DATA_BYTES).store(data.saturating_add(1), Ordering::Relaxed);
        self.cell(ASIDE_BYTES).store(aside.saturating_add(1), Ordering::Relaxed);
    }

    pub fn sizes(&self) -> (Option<u64>, Option<u64>) {
        let read = |index| self.cell(index).load(Ordering::Relaxed).checked_sub(1);
        (read(DATA_BYTES), read(ASIDE_BYTES))
    }

    fn cell(&self, index: usize) -> &AtomicU64 {
        self.cells.cell(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_through_another_descriptor() {
        let (page, file) = Page::create().unwrap();
        let theirs = Page::open(file).unwrap();
        assert_eq!(theirs.read(), None);
        assert_eq!(theirs.sizes(), (None, None));
        let progress = Progress {
            began: Moment::at(5),
            ended: Moment::at(4),
            latency_us: 7,
            error: libc::EROFS,
            failing_since: Some(Moment::at(3)),
            writing: true,
            same_as_data: false,
            space: Some((1, 2)),
        };
        page.write(&progress);
        page.write_sizes(0, 9);
        assert_eq!(theirs.read(), Some(progress));
        assert_eq!(theirs.sizes(), (Some(0), Some(9)));
        page.forget();
        assert_eq!(theirs.read(), None);
    }
}
