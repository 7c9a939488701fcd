//! What clients asked of a cluster and what they were told, as one list that can be judged afterwards: `check` says what in
//! it no correct cluster may do. One JSON object per line in a file.
//!
//! Keys hold lists; clients append numbers that occur once in the whole history, and read. Whoever reads a list sees the
//! order of all appends to it (list-append, as in Elle).

mod check;
#[cfg(test)]
mod tests;

use std::io::{BufRead, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use check::{Anomaly, Rules, Summary, Verdict, check};

pub type Key = u32;
/// Unique in a history.
pub type Value = u64;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Op {
    pub client: u32,
    /// The connection: a new one may lead elsewhere, or to a server that was started again.
    pub session: u64,
    /// The member that the connection led to.
    pub member: String,
    pub what: What,
    /// Nanoseconds since the recording began, of one monotonic clock for all clients.
    pub invoked: u64,
    /// `None`: no answer came.
    pub completed: Option<u64>,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    Append {
        key: Key,
        value: Value,
    },
    Read {
        key: Key,
        values: Vec<Value>,
    },
    /// What the surviving primary holds after everything: the measure of what was lost.
    Final {
        key: Key,
        values: Vec<Value>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// `timeline`: the one that the server was writing; `None` where it was a standby.
    Ok { timeline: Option<u32> },
    /// Certainly not done.
    Failed { why: String },
    /// Done or not: the connection broke, or nothing came back.
    Unknown { why: String },
}

impl Op {
    pub fn key(&self) -> Key {
        match &self.what {
            What::Append { key, .. } | What::Read { key, .. } | What::Final { key, .. } => *key,
        }
    }

    fn ok(&self) -> Option<Option<u32>> {
        match self.outcome {
            Outcome::Ok { timeline } => Some(timeline),
            Outcome::Failed { .. } | Outcome::Unknown { .. } => None,
        }
    }
}

pub fn save(ops: &[Op], file: &Path) -> std::io::Result<()> {
    let mut out = std::io::BufWriter::new(std::fs::File::create(file)?);
    for op in ops {
        serde_json::to_writer(&mut out, op)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

pub fn load(file: &Path) -> std::io::Result<Vec<Op>> {
    let lines = std::io::BufReader::new(std::fs::File::open(file)?).lines();
    lines.map(|line| Ok(serde_json::from_str(&line?)?)).collect()
}
