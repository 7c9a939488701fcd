//! pg_control, read directly: it is read each round, and a fork of pg_controldata costs more than the round.
//!
//! Only fields at offsets that are the same from PostgreSQL 14 to 18 on 64-bit platforms are used. Two things are checked
//! before any is believed: the constant 1234567.0 that PostgreSQL keeps behind them (a moved field moves it too), and the
//! checksum. A checksum that does not match is a torn read of a file being rewritten: read again, then unknown (S12).

use std::io::Read;
use std::path::Path;

use crate::core::Lsn;
use crate::core::timeline::TimelineId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlFile {
    pub system_identifier: u64,
    pub state: ClusterState,
    pub checkpoint: Lsn,
    pub redo: Lsn,
    pub checkpoint_timeline: TimelineId,
    pub min_recovery_timeline: TimelineId,
    pub wal_block_size: u32,
    pub wal_segment_size: u32,
    /// Values of [`FLOORS`] under which the WAL was written: a hot standby with less refuses to start.
    pub floors: [i32; FLOORS.len()],
}

/// Settings of which a standby needs at least as much as its primary had, in the control file's order.
pub const FLOORS: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];
const FLOORS_AT: usize = 180;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

impl ClusterState {
    pub fn cleanly_stopped(self) -> bool {
        matches!(self, ClusterState::ShutDown | ClusterState::ShutDownInRecovery)
    }
}

/// A writer needs well under a millisecond; five tries outlast it.
const TRIES: u32 = 5;

const FLOAT_FORMAT: f64 = 1_234_567.0;
const FLOAT_FORMAT_AT: usize = 208;
/// The checksum is the last field; what stands before it differs in length by version (288 in 14 to 16).
const CHECKSUM_AT: std::ops::RangeInclusive<usize> = 280..=320;

impl ControlFile {
    pub fn read(data_dir: &Path) -> Result<ControlFile, String> {
        let path = data_dir.join("global/pg_control");
        let mut last = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(std::time::Duration::from_micros(500));
            }
            let mut bytes = Vec::with_capacity(8192);
            let file = std::fs::File::open(&path).map_err(|e| format!("open {}: {e}", path.display()))?;
            file.take(8192).read_to_end(&mut bytes).map_err(|e| format!("read {}: {e}", path.display()))?;
            match ControlFile::parse(&bytes) {
                Ok(control) => return Ok(control),
                Err(why) => last = why,
            }
        }
        Err(format!("{}: {last}", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<ControlFile, String> {
        if bytes.len() < *CHECKSUM_AT.end() + 4 {
            return Err(format!("only {} bytes long", bytes.len()));
        }
        let u32_at = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(field)
        };
        if f64::from_bits(u64_at(FLOAT_FORMAT_AT)) != FLOAT_FORMAT {
            return Err(format!("pg_control version {} has a layout that is not known", u32_at(8)));
        }
        if !CHECKSUM_AT.step_by(4).any(|at| crc32c(&bytes[..at]) == u32_at(at)) {
            return Err("its checksum does not match (torn read, or damaged)".to_owned());
        }
        let state = match u32_at(16) {
            0 => ClusterState::StartingUp,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            other => return Err(format!("its state {other} is not known")),
        };
        Ok(ControlFile {
            system_identifier: u64_at(0),
            state,
            checkpoint: Lsn(u64_at(32)),
            redo: Lsn(u64_at(40)),
            checkpoint_timeline: TimelineId(u32_at(48)),
            min_recovery_timeline: TimelineId(u32_at(144)),
            wal_block_size: u32_at(224),
            wal_segment_size: u32_at(228),
            floors: std::array::from_fn(|n| u32_at(FLOORS_AT + 4 * n).cast_signed()),
        })
    }

    /// Where the record of the shutdown checkpoint ends: what a standby must have flushed to have everything.
    ///
    /// The record is 24 bytes of header, 2 of data header and 88 of CheckPoint (14 to 18) = 114, padded to 120; where it
    /// crosses a page, the next page's header (24 bytes, 40 at the beginning of a segment) comes in between. Checked
    /// against what a standby has received after a fast stop in `tests/cluster/postgres_adapter.rs`.
    pub fn shutdown_end(&self) -> Option<Lsn> {
        if self.state != ClusterState::ShutDown || self.wal_block_size == 0 || self.wal_segment_size == 0 {
            return None;
        }
        const RECORD: u64 = 120;
        let page = u64::from(self.wal_block_size);
        let left = page - self.checkpoint.0 % page;
        if RECORD <= left {
            return Some(Lsn(self.checkpoint.0 + RECORD));
        }
        let next_page = self.checkpoint.0 + left;
        let header = if next_page.is_multiple_of(u64::from(self.wal_segment_size)) { 40 } else { 24 };
        Some(Lsn(self.checkpoint.0 + RECORD + header))
    }
}

/// CRC-32C (Castagnoli), bit by bit: three hundred bytes a round need no table.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82F6_3B78 & 0u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn the_shutdown_record_ends_behind_page_headers() {
        let control = |checkpoint: u64| ControlFile {
            system_identifier: 1,
            state: ClusterState::ShutDown,
            checkpoint: Lsn(checkpoint),
            redo: Lsn(checkpoint),
            checkpoint_timeline: TimelineId(1),
            min_recovery_timeline: TimelineId(0),
            wal_block_size: 8192,
            wal_segment_size: 16 << 20,
            floors: [0; 5],
        };
        for (checkpoint, end) in [
            (0x0300_0028, 0x0300_00A0),
            (0x0300_2000 - 120, 0x0300_2000),
            (0x0300_2000 - 112, 0x0300_2000 + 8 + 24),
            (0x0400_0000 - 24, 0x0400_0000 + 96 + 40),
        ] {
            assert_eq!(control(checkpoint).shutdown_end(), Some(Lsn(end)), "{checkpoint:x}");
        }
        let mut running = control(0x0300_0028);
        running.state = ClusterState::InProduction;
        assert_eq!(running.shutdown_end(), None);
    }

    #[test]
    fn a_damaged_file_is_not_believed() {
        assert!(ControlFile::parse(&[0; 8192]).is_err());
        assert!(ControlFile::parse(&[]).is_err());
    }
}
