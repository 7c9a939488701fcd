//! Whole clusters on this machine, on loopback or on hosts that somebody made: etcd, agents, PostgreSQL, writers. `pgvigil demo`, tests/cluster and
//! scripts/bench all run this code, so what a visitor sees is what the tests check.
//!
//! Everything that a cluster owns (files, sockets, processes) carries the path of its own fresh base directory: in its
//! arguments or as its working directory. That is how processes are found to be ended, the ones too that outlive their
//! parents on purpose; nothing else on the machine is ever touched.

mod cluster;
pub mod control;
pub mod disk;
mod error;
mod etcd;
pub mod figures;
pub mod history;
mod host;
pub mod live;
mod member;
mod ports;
pub mod probe;
pub mod processes;
pub mod scenarios;
pub mod sql;
pub mod workload;
pub mod writer;

/// Clients that write while something is measured.
const CLIENTS: usize = 2;

pub use cluster::{Cluster, Look, Options, is_healthy};
pub use disk::Disk;
pub use error::DemoError;
pub use host::Host;
pub use member::Member;
