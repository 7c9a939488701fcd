//! What an endpoint tells of itself; API and metrics show it.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    pub version: String,
    pub pid: u32,
    /// All connections, also those that have not shown yet what they want.
    pub connections: u64,
    /// Waiting for a primary or for a place.
    pub waiting: u64,
    pub sessions: u64,
    /// Sessions of the port for readers.
    pub readers: u64,
    /// Sessions that have named synchronous_commit in their SQL: their commits may be on one disk alone.
    pub setting_named: u64,
    pub accepted: u64,
    pub refused: u64,
    pub cancels: u64,
    /// Answers that waited for a barrier.
    pub doubtful: u64,
    /// Sessions that were told 08007.
    pub unknown: u64,
    /// Sessions ended because the gate was shut.
    pub cut: u64,
    pub barriers: u64,
    pub barriers_failed: u64,
    /// What a person has to look at: an address that is in use, and the like.
    pub problems: Vec<String>,
}
